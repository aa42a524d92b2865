"""Facts that a method cannot use: their reasons counted, and the error where none is left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

# A fact's own words, quoted, and its tokens, in brackets; an apostrophe inside a word opens nothing.
_OWN = re.compile(r"""(?<!\w)'[^']*'(?!\w)|"[^"]*"|\[[^]]*\]""")


class NoUsableFactError(ValueError):
    """None of the facts given to a method can be used; the message counts the reasons.

    Args:
        what: what they were to be used for.
        skipped: (id, reason) of each.
    """

    def __init__(self, what: str, skipped: Iterable[tuple[str, str]]) -> None:
        reasons = describe_reasons(count_reasons(skipped))
        super().__init__(
            f"no fact can be used for {what} ({reasons})"
            if reasons
            else f"no facts were given for {what}"
        )


def count_reasons(skipped: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Reason -> number of facts, the most frequent first.

    What a reason quotes of its fact becomes "…", so that like reasons count together.
    """
    return dict(Counter(_OWN.sub("…", why) for _, why in skipped).most_common())


def describe_reasons(counts: Mapping[str, int], *, most: int = 3) -> str:
    """``"24: no first-hop prompt; 2: … does not occur in the prompt …"``; "" for no reason.

    Args:
        counts: as `count_reasons` gives them.
        most: reasons that are named; the facts of the others are only counted.
    """
    named = [f"{n}: {why}" for why, n in list(counts.items())[:most]]
    rest = sum(list(counts.values())[most:])
    return "; ".join([*named, *([f"{rest}: other reasons"] if rest else [])])
