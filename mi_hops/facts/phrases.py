"""Which words of a two-hop question describe the bridge: told by its frame, or by a relation's name."""

from __future__ import annotations

import re

#: A relation of the questions' sources -> how questions name it.
_NAMES = {
    "spouse": ("spouse", "husband", "wife"),
    "child": ("child", "son", "daughter"),
    "founded by": ("founder",),
    "employer": ("employer",),
}
#: Relations whose object is a person: their question begins with "Who".
_PEOPLE = frozenset(
    "author cast_member child composer creator director editor father founded_by founder husband "
    "lyrics_by mother performer producer screenwriter sibling singer spouse wife writer".split()
)
_PREPOSITIONS = frozenset("at by for from in of on to with".split())


def counterpart(asked: str, told: str, named: tuple[int, int]) -> tuple[int, int] | None:
    """The part of `asked` in the place of ``told[named]``, where all words around it are equal.

    Args:
        asked: a two-hop prompt, "The town of the owner of Quill is".
        told: the same about the bridge, "The town of Ada Moss is".
        named: where `told` names the bridge.

    Returns:
        Its span, or None where the prompts differ elsewhere too.
    """
    left, right = told[: named[0]], told[named[1] :]
    start, end = len(left), len(asked) - len(right)
    whole = not right[:1].isalnum() and not left[-1:].isalnum()
    same = (
        asked[:start].casefold() == left.casefold() and asked[end:].casefold() == right.casefold()
    )
    return (start, end) if whole and same and asked[start:end].strip() else None


def form_of(text: str, span: tuple[int, int] | None) -> str:
    """The form of a prompt whose first hop is at `span`; None for one that is not in it."""
    if text.endswith("?"):
        return "question"
    return "prefix" if span is not None and span[0] == 0 else "suffix"


def bare(title: str) -> str:
    """A title without the remark in brackets that tells it from others."""
    return re.sub(r"\s*\([^)]*\)$", "", title)


def described(question: str, subject: str, relation: str) -> tuple[int, int] | None:
    """Where a question describes the object of a relation: "the director of film Ran", "Ran's director".

    Args:
        question: a question in English.
        subject: the relation's subject; a remark in brackets at its end may be left out.
        relation: its name, "director".

    Returns:
        The span, with an article before it; None where there is none or more than one.
    """
    for name in _NAMES.get(relation, (relation,)):
        for thing in dict.fromkeys((subject, bare(subject))):
            r, s = re.escape(name), re.escape(thing)
            for pattern in (
                rf"{r} of (?:the )?(?:\w+ )?['\"]?{s}['\"]?",
                rf"{s}['’]s? {r}",
                rf"{s} {r}",
            ):
                whole = re.compile(rf"(?<!\w)(?:the )?{pattern}(?!\w)", re.IGNORECASE)
                found = [m.span() for m in whole.finditer(question)]
                if len(found) == 1:
                    return found[0]
    return None


def asks_who(relation: str) -> str:
    """The word that asks for a relation: "Who" for people, "What" for the rest."""
    return "Who" if relation.replace(" ", "_") in _PEOPLE else "What"


def is_noun(relation: str) -> bool:
    """Whether "the RELATION of X" is English: "place of birth", not "founded by" or "located in"."""
    words = relation.casefold().split()
    if not words or words[-1] in _PREPOSITIONS:
        return False
    return not words[0].endswith("ed") and words[0] not in ("has", "part", "is")
