"""Wordings: how two relations become prompts in both template orders, and neutral contexts.

The two orders are those of CREME (arXiv 2402.14328): *suffix* puts the relation first, so that the
first hop comes at the end; *prefix* puts the first hop at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOT = "[X]"
FORMS = ("suffix", "prefix", "question")

#: Short neutral lead-ins. A key averaged over them belongs to the prompt, not to its position.
CONTEXTS = (
    "{}",
    "Here is a fact. {}",
    "Note this: {}",
    "It is late. {}",
    "I read it today. {}",
    "As we know: {}",
    "Hello there. {}",
    "My friend wrote: {}",
    "The weather is fine. {}",
    "Please remember: {}",
    "This is a test. {}",
)


@dataclass(frozen=True)
class Wording:
    """Three ways to ask for the object of one relation; each has the slot ``[X]`` once.

    Attributes:
        noun: a noun phrase that stands for the object, "the author of [X]".
        statement: a clause the object completes, subject first, "[X] was written by".
        question: "Who wrote [X]?".
        verb: what follows the noun phrase in the suffix order, "is" or "is called".
    """

    noun: str
    statement: str
    question: str
    verb: str = "is"

    def __post_init__(self) -> None:
        for text in (self.noun, self.statement, self.question):
            if text.count(SLOT) != 1:
                raise ValueError(f"{text!r} must contain {SLOT} exactly once")


def capitalise(text: str) -> str:
    """Upper-case the first character and leave the rest unchanged."""
    return text[:1].upper() + text[1:]


def doubled_article(before: str, thing: str) -> bool:
    """Whether `thing` begins with the article that the text before it ends in."""
    return f" {before}".casefold().endswith(" the ") and thing.casefold().startswith("the ")


def without_article(thing: str, before: str) -> str:
    """`thing`, less the article that the text before it ends in."""
    return thing[len("the ") :] if doubled_article(before, thing) else thing


def prompts_about(wording: Wording, thing: str) -> dict[str, str]:
    """All forms of the prompt that asks for a relation of `thing`, keyed by form."""
    return {
        "suffix": f"{capitalise(wording.noun.replace(SLOT, thing))} {wording.verb}",
        "prefix": capitalise(wording.statement.replace(SLOT, thing)),
        "question": capitalise(wording.question.replace(SLOT, thing)),
    }


def first_hop_phrase(wording: Wording, subject: str) -> str:
    """The phrase that stands for the bridge: "the author of Misery"."""
    return wording.noun.replace(SLOT, subject)
