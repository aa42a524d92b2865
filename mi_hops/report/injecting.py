"""Memory injection: can a failed question be put right while it runs?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.report.parts import (
    FAINT,
    STRONG,
    Figure,
    Section,
    Table,
    Text,
    bars,
    cell_place,
    heatmap,
    number,
    opened,
    percent,
    row,
    used,
)

if TYPE_CHECKING:
    import pandas as pd

    from mi_hops.result.result import Result
    from mi_hops.study.folder import Study

_MEMORIES = {
    "bridge": "the bridge",
    "random_word": "random words",
    "permuted_bridge": "another fact's bridge",
    "norm_matched": "random vector, same length",
    "answer": "the answer itself",
}
_ENCODINGS = {
    "unembed": "Unembedding (W_U)",
    "layerwise_code": "Layerwise, attention output",
    "layerwise_text": "Layerwise, stream",
}

_CHANGES = {
    "median_relative_change": "median",
    "trimmed_mean_relative_change": "trimmed mean",
    "mean_relative_change": "mean",
    "mean_log_change": "mean ln(after / before)",
}


def injection_section(study: Study) -> Section:
    """Step 5."""
    section, result = opened(
        study,
        "injection",
        "Memory injection",
        "Can a failed question be put right while it runs, by adding the bridge inside the model?",
    )
    if result is None:
        return section
    summary = study.summary["injection"]
    cell, where = summary["cell"], result.provenance.get("positions", "the chosen positions")
    section.blocks.append(
        Text(
            "A vector that stands for the bridge is multiplied by a strength and added to the "
            f"attention output of one layer, or of all (positions: {where}), after arXiv 2309.05605. "
            "Encodings: the bridge's unembedding vectors (as published); or, layerwise, what the "
            "model makes of the bridge alone at the same layer: its attention output there (as the "
            "published code does) or the stream that enters the layer (as the text says). The best "
            "of all layers, strengths and encodings is chosen on one half "
            f"of the failures and reported on the other; {used(result)} in both halves."
        )
    )
    section.blocks += [_grid(result, cell), *_memories(result, cell)]
    return section


def _half(result: Result, name: str) -> list[Any]:
    return result["example"].values[result["half"].values == name].tolist()


def _grid(result: Result, cell: Mapping[str, Any]) -> Figure:
    choose = _half(result, "choose")
    ends = result.sel(memory="bridge", example=choose).ci(variable="first_correct")
    most = max(float(ends["estimate"].max()), 0.05)
    before = _count(result.sel(example=choose)["first_correct_before"].values)
    panels = []
    for encoding in ends["encoding"].values.tolist():
        mine = ends.sel(encoding=encoding)
        boxes = []
        if encoding == cell["encoding"]:
            boxes = [(mine["layer"].values.tolist().index(cell["layer"]),
                      mine["strength"].values.tolist().index(cell["strength"]))]  # fmt: skip
        plot = heatmap(
            mine["estimate"], x="strength", height=130 + max(180, 30 * mine.sizes["layer"]),
            limits=(0.0, most), sequential=True, boxes=boxes,
            colour_label="first token right, %", x_label="strength (factor of the vector)",
            hover={"n": mine["n"], "95% from": mine["lower"], "to": mine["upper"]},
        )  # fmt: skip
        panels.append((_ENCODINGS.get(encoding, encoding), plot))
    return Figure(
        "Choosing half: questions put right by the bridge, layer by strength",
        panels,
        f"Share of n = {len(choose)} failed questions whose first answer token is the model's first "
        f"choice after the bridge was injected, in percent, for every layer and strength "
        f"({percent(before, n=False)} without injection: failed questions can begin rightly); darker is more, one "
        "scale for all panels, intervals on hover. The box is the chosen cell: the largest share, "
        "ties broken by the answer's log-probability. Being the best of many it flatters itself; "
        "judge it by the other half, below.",
        width=430,
    )


def _memories(result: Result, cell: Mapping[str, Any]) -> list[Figure | Table]:
    from mi_hops.injection.select import Cell, cell_report

    report = _half(result, "report")
    chosen = Cell(
        cell["encoding"], cell["layer"], cell["strength"], cell["score_on_choosing_half"],
        cell["n_choose"],
    )  # fmt: skip
    table = cell_report(result, chosen, examples=report, metric="first_correct")
    rest = result.sel(example=report)
    rows = [row(_count(rest["first_correct_before"].values), injected="nothing")]
    rows += [
        row(_ends(table.loc[name], "right"), injected=label)
        for name, label in _MEMORIES.items() if name in table.index
    ]  # fmt: skip
    named = rest["first_correct_explicit"].values
    if not (named != named).all():
        rows.append(row(_count(named), injected="bridge in the prompt"))
    plot = bars(rows, x="injected", y_label="first token right", height=380)
    blocks: list[Figure | Table] = []
    where = (f"{cell_place(cell)}, strength {cell['strength']:g}, encoding “"
             f"{_ENCODINGS.get(cell['encoding'], cell['encoding'])}”")  # fmt: skip
    if plot is not None:
        colours = [STRONG if r["injected"] == _MEMORIES["bridge"] else FAINT for r in rows]
        plot.update_traces(marker_color=colours)
        blocks.append(
            Figure(
                "Reporting half: the chosen cell beside its controls",
                [("", plot)],
                f"Share of n = {len(report)} failed questions whose first answer token is right "
                f"with this memory injected at {where}; whiskers are exact 95% intervals. The bridge "
                "helps for what it says only if it helps more than random words, another fact's "
                "bridge and a random vector. The answer itself shows what writing it in directly "
                "does here; the last bar, where it stands, asks the second hop with the bridge "
                "spelled out.",
                width=600,
            )
        )
    records = [(n, label, table.loc[n]) for n, label in _MEMORIES.items() if n in table.index]
    shares = [
        [label, percent(_ends(r, "right"), n=False),
         "–" if name == "bridge" else percent(_ends(r, "difference"), n=False), str(int(r["n"]))]
        for name, label, r in records
    ]  # fmt: skip
    blocks.append(
        Table(
            "The chosen cell in numbers, reporting half",
            ("injected", "first token right", "bridge minus this, in points", "n"),
            shares, marked=[0],
            note="Brackets: 95% intervals, exact for shares, paired bootstrap for differences.",
        )
    )  # fmt: skip
    changes = [
        [label, *(number(_ends(r, statistic), n=False) for statistic in _CHANGES),
         percent(_ends(r, "share_improved"), n=False), str(int(r["n"]))]
        for _, label, r in records
    ]  # fmt: skip
    blocks.append(
        Table(
            "Relative change of the answer's probability, reporting half",
            ("injected", *_CHANGES.values(), "share raised", "n"),
            changes, marked=[0],
            note="Relative change is (after − before) / before of the first answer token's "
            "probability: 1 means doubled. It has a heavy tail (a tiny probability before makes a "
            "huge ratio), so its mean must not be read alone: the median and the mean logarithm "
            "tell the usual case. Trimmed: without ratios beyond two standard deviations. Brackets: "
            "95% bootstrap intervals, exact ones for shares.",
        )
    )  # fmt: skip
    return blocks


def _count(right: Any) -> dict[str, Any]:
    """A share of zeros and ones (NaN: not measured) with its exact interval."""
    from mi_hops.result.statistics import proportion_ci

    right = right[right == right]
    n, k = len(right), int(right.sum())
    low, high = proportion_ci(k, n) if n else (None, None)
    return {"value": k / n if n else None, "low": low, "high": high, "n": n}


def _ends(record: pd.Series, name: str) -> dict[str, Any]:
    """A statistic of `cell_report` as an estimate."""
    value, low, high = (float(record[key]) for key in (name, f"{name}_lower", f"{name}_upper"))
    return {"value": None if value != value else value, "low": low, "high": high,
            "n": int(record["n"])}  # fmt: skip
