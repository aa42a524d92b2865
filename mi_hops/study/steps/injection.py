"""Memory injection: can a failed question be corrected while it runs?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import count_reasons
from mi_hops.injection import (
    CONTROLS,
    Cell,
    Controls,
    Encoder,
    cell_report,
    injection_grid,
    select_cell,
)
from mi_hops.result.result import Result
from mi_hops.study.context import Run, Skip
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import (
    Headline,
    estimate,
    left_out,
    number,
    percent,
    points,
    share_headline,
    share_of,
    sign,
)
from mi_hops.study.parts import FAINT, STRONG, Block, Figure, Table, Text, bars, heatmap, row, used
from mi_hops.study.step import Asked, Step, Work

_SCORE = "first_correct"
_METRICS = (_SCORE, "first_prob", "first_logprob", "rank")
_PLACE = "first hop"
MEMORIES = {
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
    "mean_relative_change_within_2sd": "mean within 2 SD",
    "mean_relative_change": "mean",
    "mean_log_change": "mean ln(after / before)",
}


class InjectionGrid(Step):
    """Injections of the bridge on the choosing half, to choose layer, strength and encoding by."""

    name, short, shown_in = "injection_grid", "The grid of injections", "injection"
    share = 0.12

    def run(self, run: Run) -> Result:
        """Inject at the first hop: each layer and all together, every strength, three encodings."""
        every = list(range(run.model.cfg.n_layers))
        together = [every] if len(every) > 1 else []

        def inject(facts: list[TwoHopFact]) -> Result:
            return injection_grid(
                run.model,
                facts,
                layers=[*every, *together],
                strengths=run.settings.size.strengths,
                encodings=("unembed", "layerwise_code", "layerwise_text"),
                positions=_PLACE,
                controls=(),
                form=run.form,
                metrics=_METRICS,
                limits=run.limits,
            )

        choose = run.halves[0]
        n = run.affordable(self, choose, run.settings.size.injection // 2, inject)
        result = inject(run.draw(choose, n, "injection"))
        marks = [False] * len(every) + [True] * len(together)
        coords = {"all_layers": ("layer", marks)}
        return result.assign(coords=coords, title="Memory injection", main=_SCORE)

    def work(self, asked: Asked) -> Work:
        """Every layer and all together, every strength, three encodings."""
        size = asked.settings.size
        cells = (asked.n_layers + 1) * len(size.strengths) * len(_ENCODINGS)
        return asked.swept(asked.most(size.injection // 2) * cells)

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """The chosen cell."""
        return _describe(result, select_cell(result, metric=_SCORE))

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """The grid."""
        where = result.provenance.get("positions", "the chosen positions")
        yield Text(
            "A vector that stands for the bridge is multiplied by a strength and added to the "
            f"attention output of one layer, or of all (positions: {where}), after arXiv 2309.05605. "
            "Encodings: the bridge's unembedding vectors (as published); or, layerwise, what the "
            "model makes of the bridge alone at the same layer: its attention output there (as the "
            "published code does) or the stream that enters the layer (as the text says). The best "
            "of all layers, strengths and encodings is chosen on one half "
            f"of the failures, {used(result)}, and reported on the other."
        )
        yield _grid(result, study.summary["injection_grid"])


class Injection(Step):
    """The chosen injection and its controls, on the half of the failures that it was not chosen on."""

    name, short, share = "injection", "Memory injection", 0.03
    title = "Memory injection"
    question = (
        "Can a failed question be corrected while it runs, by adding the bridge inside the model?"
    )

    def run(self, run: Run) -> Result:
        """Inject the bridge and every control in the one cell."""
        path = run.study.path("injection_grid")
        if not path.exists():
            raise Skip(run.study.skipped("injection_grid"))
        grid = Result.load(path)
        cell = select_cell(grid, metric=_SCORE)
        facts = run.draw(run.halves[1], run.settings.size.injection // 2, "injection")
        bridges = {fact.bridge for fact in facts}
        alone = any(bridges <= {fact.bridge, fact.answer} for fact in facts)
        controls = [name for name in CONTROLS if not (alone and name == "permuted_bridge")]
        found = injection_grid(
            run.model,
            facts,
            layers=[cell.layers],
            strengths=(cell.strength,),
            encodings=(Encoder(**cell.settings["encoders"][cell.encoding]),),
            positions=_PLACE,
            controls=Controls(controls, seed=run.settings.seed),
            form=run.form,
            metrics=_METRICS,
            limits=run.limits,
        )
        return found.assign(title="Memory injection", main=_SCORE)

    def work(self, asked: Asked) -> Work:
        """The bridge and the controls, in one cell."""
        return asked.swept(asked.most(asked.settings.size.injection // 2) * (1 + len(CONTROLS)))

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """The chosen cell, and what each memory does in it."""
        grid = Result.load(study.path("injection_grid"))
        statistics = [*_CHANGES, "share_improved"]
        memories = {}
        for name, record in _report(result).iterrows():
            memories[str(name)] = {
                _SCORE: _ends(record, "correct"),
                "bridge_minus_this": _ends(record, "difference"),
                **{statistic: record[statistic] for statistic in statistics},
            }
        cell = _describe(grid, select_cell(grid, metric=_SCORE))
        return {"cell": cell, "memories": memories}

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The share corrected by the bridge, and by another fact's."""
        cell, memories = entry["cell"], entry["memories"]
        text = (
            "of failed questions get the correct first token when the bridge is injected at "
            f"{_place(cell)} with strength {cell['strength']:g}"
        )
        other = memories.get("permuted_bridge")
        if other is not None:
            text += (
                f"; another fact's bridge corrects {percent(other[_SCORE], n=False)}, a difference of "
                f"{points(other['bridge_minus_this'])}"
            )
            if sign(other["bridge_minus_this"]) <= 0:
                text += ", which is not clear of zero"
        where = f"{_place(cell)}, x{cell['strength']:g}, {cell['encoding']}"
        yield share_headline(
            f"injection corrects ({where})", memories["bridge"][_SCORE], f"{text}."
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """The chosen cell beside its controls."""
        yield from _memories(result, study.summary["injection"]["cell"])


def _describe(grid: Result, cell: Cell) -> dict[str, Any]:
    every = bool(grid["all_layers"].sel(layer=cell.layer))
    return {
        **cell.labels,
        "all_layers": every,
        "score_on_choosing_half": cell.score,
        "n_choose": cell.n,
    }


def _report(result: Result) -> pd.DataFrame:
    return cell_report(result, select_cell(result, metric=_SCORE), metric=_SCORE)


def _place(cell: Mapping[str, Any]) -> str:
    return "all layers" if cell["all_layers"] else f"layer {cell['layer']}"


def _ends(record: pd.Series, name: str) -> dict[str, Any]:
    """A statistic of `cell_report` as an estimate."""
    return estimate(*(record[key] for key in (name, f"{name}_lower", f"{name}_upper", "n")))


def _grid(result: Result, cell: Mapping[str, Any]) -> Figure:
    n = result.data.sizes["example"]
    ends = result.sel(memory="bridge").ci(variable=_SCORE)
    most = max(float(ends["estimate"].max()), 0.05)
    before = share_of(result[f"{_SCORE}_before"].values)
    rows, columns = (ends[dim].values.tolist() for dim in ("layer", "strength"))
    box = (rows.index(cell["layer"]), columns.index(cell["strength"]))
    every = result["all_layers"].values
    names = ["all" if together else str(row) for row, together in zip(rows, every, strict=True)]
    ends = ends.assign_coords(layer=names)
    panels = []
    for encoding in ends["encoding"].values.tolist():
        plot = heatmap(
            ends.sel(encoding=encoding),
            x="strength",
            limits=(0.0, most),
            sequential=True,
            boxes=[box] if encoding == cell["encoding"] else [],
            colour_label="first token correct, %",
            x_label="strength (factor of the vector)",
        )
        panels.append((_ENCODINGS.get(encoding, encoding), plot))
    return Figure(
        "Choosing half: questions corrected by the bridge, layer by strength",
        panels,
        f"Share of n = {n} failed questions whose first answer token is the model's first "
        "choice after the bridge was injected, in percent, for every layer and strength "
        f"({percent(before, n=False)} without injection: a failed answer can begin correctly); darker "
        "is more, one scale for all panels, intervals on hover. The box is the chosen cell: the "
        "largest share, ties broken by the answer's log-probability. As the best of many it is "
        "optimistically biased by selection; judge it by the other half, below.",
        width=430,
    )


def _memories(result: Result, cell: Mapping[str, Any]) -> Iterator[Figure | Table]:
    n, table = result.data.sizes["example"], _report(result)
    left = left_out(count_reasons(result.skipped))
    records = [
        (name, label, table.loc[name]) for name, label in MEMORIES.items() if name in table.index
    ]
    rows = [row(share_of(result[f"{_SCORE}_before"].values), injected="nothing")]
    rows += [row(_ends(record, "correct"), injected=label) for _, label, record in records]
    named = share_of(result[f"{_SCORE}_explicit"].values)
    if named["n"]:
        rows.append(row(named, injected="bridge in the prompt"))
    plot = bars(rows, x="injected", y_label="first token correct", height=380)
    encoding = _ENCODINGS.get(cell["encoding"], cell["encoding"])
    where = f"{_place(cell)}, strength {cell['strength']:g}, encoding “{encoding}”"
    if plot is not None:
        colours = [STRONG if r["injected"] == MEMORIES["bridge"] else FAINT for r in rows]
        plot.update_traces(marker_color=colours)
        yield Figure(
            "Reporting half: the chosen cell beside its controls",
            [("", plot)],
            f"Share of n = {n} failed questions{left} whose first answer token is correct "
            f"with this memory injected at {where}; whiskers are exact 95% intervals. The bridge "
            "helps because of what it says only if it helps more than random words, another fact's "
            "bridge and a random vector. The answer itself shows what writing it in directly "
            "does here; the last bar, if there is one, asks the second hop with the bridge "
            "spelled out.",
            width=600,
        )
    cells = []
    for name, label, record in records:
        gap = "–" if name == "bridge" else points(_ends(record, "difference"), "")
        right = percent(_ends(record, "correct"), n=False)
        cells.append([label, right, gap, str(int(record["n"]))])
    yield Table(
        "The chosen cell in numbers, reporting half",
        ("injected", "first token correct", "bridge minus this, percentage points", "n"),
        cells,
        marked=[0],
        note="Brackets: 95% intervals, exact for shares, paired bootstrap for differences.",
    )
    cells = []
    for _, label, record in records:
        changes = [number(_ends(record, statistic), n=False) for statistic in _CHANGES]
        raised = percent(_ends(record, "share_improved"), n=False)
        cells.append([label, *changes, raised, str(int(record["n"]))])
    yield Table(
        "Relative change of the answer's probability, reporting half",
        ("injected", *_CHANGES.values(), "share raised", "n"),
        cells,
        marked=[0],
        note="Relative change is (after − before) / before of the first answer token's "
        "probability: 1 means doubled. It has a heavy tail (a tiny probability before makes a "
        "huge ratio), so its mean must not be read alone: the median and the mean logarithm "
        "show the usual case. Within 2 SD: without ratios beyond two standard deviations. Brackets: "
        "95% bootstrap intervals, exact ones for shares; means of ratios have none.",
    )
