"""How far a step can be trusted: how its tool did on models whose mechanism is known.

The numbers are those of ``data/ground_truth.json``, which ``benchmarks/ground_truth.py`` writes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mi_hops.worlds.planted import KINDS, kind_of

_DATA = Path(__file__).parent.parent / "data" / "ground_truth.json"

#: Step -> its tools, each with what it is called in a sentence.
_TOOLS = {
    "lens": {"logit lens": "this lens"},
    "erasure": {
        "erasure, exact": "the exact erasure",
        "erasure, published": "the published erasure",
    },
    "locate": {"locating": "locating"},
    "injection": {"memory injection": "injecting the bridge"},
}
#: What a tool is asked -> what yes means.
_MEANS = {
    "written": ("the bridge is written in the unembedding's code", "it is not"),
    "used": ("the answer comes from the bridge there", "it does not"),
}


@cache
def ground_truth() -> dict[str, Any]:
    """What each tool said of the planted models: the table that ships with the package."""
    found: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return found


def how_far(step: str) -> str | None:
    """One sentence or two on how a step's tool did on the planted models; None if it was not asked.

    Examples:
        >>> from mi_hops.study.trust import how_far
        >>> how_far("lens")[:40]
        'On the planted models, whose mechanism i'
    """
    if step == "editing":
        return _creme()
    tools = _TOOLS.get(step)
    if tools is None:
        return None
    found = ground_truth()["tools"]
    said = []
    for tool, words in tools.items():
        here, not_here = _MEANS[found[tool]["question"]]
        (yes, n), (wolf, m) = (found[tool]["says_yes"][k] for k in ("where_true", "where_not"))
        said.append(
            f"{words} said yes at the planted place in {yes} of {n} questions where {here}, and in "
            f"{wolf} of {m} where {not_here}"
        )
    return f"On the planted models, whose mechanism is known, {'; '.join(said)}."


def _creme() -> str:
    counts = {True: [0, 0], False: [0, 0]}
    for model, splits in ground_truth()["creme"].items():
        if not model.startswith("planted-"):
            continue
        used = KINDS[kind_of(model)][1]
        for value in splits.values():
            if isinstance(value, dict):
                share, _, _, n = value["corrected"]
                counts[used][0] += round(share * n)
                counts[used][1] += n
    (k, n), (j, m) = counts[True], counts[False]
    return (
        "On the planted models, whose mechanism is known, CREME corrected "
        f"{k} of {n} failed questions where answers come from the bridge, and {j} of {m} where no state "
        "has a use for it. A correction alone does not show that a bridge was there."
    )
