"""The rule by which the study chooses an edit's layers and strength, on the half it does not report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IDENTITY, ESTIMATED = "CREME as published (C = I)", "CREME, C estimated"

#: Strengths tried for each kind of edit; the published edit has only the full one.
STRENGTHS: dict[str, tuple[float, ...]] = {IDENTITY: (1.0,), ESTIMATED: (0.5, 0.7, 1.0)}

#: Runs of layers tried at most.
MOST_STARTS = 6

CHOICE_RULE = (
    "Located layers are those where replacing the attention output at the last token has at least half "
    "of the largest mean effect. Where no layer is located, the middle third of the layers is used.",
    "Candidates are runs of layers that end at the last located one and start at any layer from one "
    "before the first located one on: six starts at most, evenly spaced.",
    "The published edit is tried at full strength, the edit with estimated C at strengths 0.5, 0.7 "
    "and 1.",
    "Chosen, on the choosing half, is the candidate with the largest sum of the share of failures whose "
    "first answer token is corrected and of four times the share of unrelated questions still answered "
    "correctly; of equals, the one with the fewest layers.",
)


def layer_spans(located: Sequence[int], n_layers: int) -> list[tuple[int, ...]]:
    """The runs of layers that an edit may take, by `CHOICE_RULE`.

    Where nothing was located, the middle third is used.
    """
    first = max(0, (min(located) if located else n_layers // 3) - 1)
    last = max(located) if located else 2 * n_layers // 3
    n = min(MOST_STARTS, last - first + 1)
    starts = dict.fromkeys(first + round(i * (last - first) / max(n - 1, 1)) for i in range(n))
    return [tuple(range(start, last + 1)) for start in starts]


def choose_edit(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The candidate with the largest correction + 4 x kept; the fewest layers break ties."""

    def score(c: Mapping[str, Any]) -> tuple[float, int]:
        kept = 1.0 if c["kept"] is None else c["kept"]
        return c["correction"] + 4 * kept, -len(c["layers"])

    return dict(sorted(candidates, key=score)[-1])
