"""When a generated text counts as the answer.

Answered correctly means: greedily, over the whole vocabulary, the whole answer and its end. What a
model goes on to say after the end (`STOP`) does not matter; a longer name does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

#: Strings that end an answer.
STOP = (".", "\n", ",", ";")

#: Stripped from both ends of a text before it is compared; so is a leading article.
SURROUNDING = " \t\n\"'`“”‘’„«»()[]{}<>*_.,:;!?…"
ARTICLES = ("the ", "a ", "an ")


def find_ends(text: str, stop: Sequence[str]) -> list[int]:
    """Where stop strings occur in a text, in order; blank text at the start ends nothing."""
    start = len(text) - len(text.lstrip())
    return [at for at in range(start, len(text)) if text.startswith(tuple(stop), at)]


def check_stop(stop: Sequence[str]) -> None:
    """Refuse stop strings that are not a sequence of non-empty strings."""
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop is {stop!r}; expected a sequence of non-empty strings")


def normalise(text: str) -> str:
    """Normalise a text for comparison.

    Unicode composed (NFKC), case folded, runs of white space made one space; then what stands in
    `SURROUNDING` is stripped from both ends, then one leading article (the, a, an), unless nothing
    is left. Accents, hyphens and word order count.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = plain.strip(SURROUNDING)
    article = next((article for article in ARTICLES if bare.startswith(article)), "")
    return bare.removeprefix(article).strip(SURROUNDING) or plain


def matches(
    text: str,
    answer: str,
    aliases: Sequence[str] = (),
    *,
    stop: Sequence[str] = STOP,
    finished: bool = True,
) -> bool:
    """Whether a generated text is the answer, or an alias of it, up to its end.

    The text up to some stop string, or all of it, must equal the answer after `normalise`. "New
    York." and "the New York, of course" are "New York"; "New York City" is not, nor is "New". Any
    stop string may be the end, so that answers can hold one themselves ("St. Louis").

    Args:
        text: what was generated after the prompt.
        finished: whether the text as a whole is known to be over; if not, only what a stop string
            ends can match.

    Raises:
        ValueError: an empty answer.
    """
    if isinstance(aliases, str):
        raise ValueError(f"aliases is the string {aliases!r}; expected a sequence of strings")
    if not answer.strip():
        raise ValueError("the answer to compare with is empty")
    check_stop(stop)
    ends = find_ends(text, stop)
    said = [a.strip() for a in (answer, *aliases) if a.strip()]
    if ends and not text[: ends[0]].strip():  # over before any other answer began
        said = [a for a in said if a.startswith(tuple(stop))]
    accepted = {normalise(a) for a in said}
    candidates = [text[:end] for end in ends] + ([text] if finished else [])
    return any(c.strip() and normalise(c) in accepted for c in candidates)
