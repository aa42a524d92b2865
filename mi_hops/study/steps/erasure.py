"""Does the bridge cause the answer?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.reasoning.erasure import erase_bridge
from mi_hops.result.figure_parts import see_through
from mi_hops.result.plots import COLOURS
from mi_hops.result.result import Result
from mi_hops.study.context import Run, choosing
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, layers, mean, number, number_headline, sign
from mi_hops.study.parts import Block, Figure, Table, Text, curves, frame, panel, used
from mi_hops.study.step import Asked, Step, Work
from mi_hops.study.steps.lens import PLACES

_VARIANTS = {"published": "published form", "exact": "exact form"}
_CHANGED = "layer whose output is changed"


class Erasure(Step):
    """P(answer) after the bridge was erased, in both forms, at both positions, by layer."""

    name, short, share = "erasure", "Erasing the bridge", 0.12
    title = "Erasing the bridge"
    question = "Does the bridge cause the answer, or does it merely appear beside it?"

    def run(self, run: Run) -> Result:
        """Erase the bridge of a draw of the answered questions."""

        def erase(facts: list[TwoHopFact]) -> Result:
            return erase_bridge(
                run.model,
                facts,
                form=run.form,
                controls=run.settings.size.draws,
                seed=run.settings.seed,
                limits=run.limits,
            )

        n = run.affordable(self, run.answered, run.settings.size.erasure, erase)
        return erase(run.draw(run.answered, n, "erasure"))

    def work(self, asked: Asked) -> Work:
        """Two forms at two positions of every layer, for the bridge and each draw of the control."""
        size = asked.settings.size
        rows = asked.most(size.erasure) * asked.n_layers * 2 * len(_VARIANTS) * (1 + size.draws)
        return asked.swept(rows)

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """For each variant and position, the layer where the bridge's erasure costs most.

        That layer is chosen on one half of the questions and its cost reported on the other; the
        layers below zero come from all of them, each by its own interval.
        """
        ends = result.difference_ci("control", variable="bridge")
        half = choosing(result["example"].values)
        paired = result["bridge"] - result["control"]
        cells = []
        for variant in ends["variant"].values.tolist():
            for position in ends["position"].values.tolist():
                where = {"variant": variant, "position": position}
                below = ends["layer"].values[ends["upper"].sel(where).values < 0]
                here = paired.sel(where).transpose("example", "layer")
                cost = here.values[half].mean(0)
                best = int(cost.argmin())
                cells.append(
                    {
                        **where,
                        "layer": int(here["layer"].values[best]),
                        "on_choosing_half": float(cost[best]),
                        "bridge_minus_control": mean(here.values[~half, best]),
                        "layers_below_zero": [int(i) for i in below],
                    }
                )
        return {"clean": mean(result["clean"].values), "cells": cells}

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The largest cost, when it was chosen."""
        best = min(entry["cells"], key=lambda cell: cell["on_choosing_half"])
        change, variant, place = (best[k] for k in ("bridge_minus_control", "variant", "position"))
        verdict = {
            -1: "The answer rests on the bridge there.",
            0: "That is not a clear difference.",
            1: "There the control costs more.",
        }[sign(change)]
        yield number_headline(
            f"erasing the bridge minus control ({variant}, {place}, L{best['layer']})",
            change,
            f"change of P(answer) by erasing the bridge at the {PLACES[place]}, layer "
            f"{best['layer']} ({variant} form), beyond what erasing another entity does. {verdict} "
            "(Layer, position and form are those with the largest cost on the other half of the "
            "questions.)",
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """P(answer) by layer, beside the control's, and their difference."""
        summary = study.summary["erasure"]
        controls = result.provenance.get("controls", "several")
        yield Text(
            "At one layer and one position the block's output is changed so that the bridge's "
            "tokens read lowest in the lens, and the forward pass goes on. The exact form makes the "
            "shortest such change that leaves the answer's logits as they were; the published form "
            "(arXiv 2402.14328) maps the desired logits back through a pseudo-inverse and then pushes "
            "the answer back up. The control erases another entity of as many tokens by the same "
            f"formula (draws: {controls}, averaged). Questions answered correctly, {used(result)}."
        )
        if study.settings["processing"] != "none":
            text = (
                "The model's weights were processed when it was loaded (norms folded in, centred), so "
                "these numbers are of another W_U than the checkpoint's own. The pseudo-inverse is "
                f"taken over the {result.provenance['unembedding_rank']} directions that it reads."
            )
            yield Text(text, style="note")
        yield _erased(result, summary["clean"])
        difference = result.difference_ci("control", variable="bridge")
        panels = []
        for place in result["position"].values.tolist():
            data = frame(difference.sel(position=place))
            data["variant"] = data["variant"].map(_VARIANTS)
            label = "difference of P(answer)"
            plot = curves([data], group="variant", x_label=_CHANGED, y_label=label, zero=True)
            panels.append((f"At the {PLACES[place]}", plot))
        yield Figure(
            "Bridge erased minus control",
            panels,
            "Difference of P(answer), question by question, averaged over "
            f"n = {result.n_used} questions; bands are 95% bootstrap intervals. Below zero, with a "
            "band that does not touch it, the answer rests on the bridge at that layer. Each band "
            "is for its own layer, without a correction for looking at all of them.",
        )
        yield _costs(summary["cells"])


def _erased(result: Result, clean: Mapping[str, Any]) -> Figure:
    colours = {"bridge": ("bridge erased", COLOURS[0]), "control": ("control", COLOURS[1])}
    ends = {name: result.ci(variable=name) for name in colours}
    # One scale for both panels.
    spans = [e for part in ends.values() for e in (part["lower"], part["upper"], part["estimate"])]
    low = min([clean["value"], *(float(e.min()) for e in spans)])
    high = max([clean["value"], *(float(e.max()) for e in spans)])
    room = 0.08 * (high - low) or 0.01
    variants = result["variant"].values.tolist()
    looks = {
        f"{words}, {variant}": (colour, dash)
        for variant, dash in zip(variants, ("solid", "dash"), strict=False)
        for words, colour in colours.values()
    }
    panels = []
    for place in result["position"].values.tolist():
        parts = [
            frame(ends[name].sel(variant=variant, position=place), erased=f"{words}, {variant}")
            for variant in variants
            for name, (words, _) in colours.items()
        ]
        plot = curves(
            parts,
            group="erased",
            x_label=_CHANGED,
            y_label="P(answer)",
            y_range=(max(0.0, low - room), min(1.0, high + room)),
            references={"untouched": clean["value"]},
        )
        for trace in plot.data:
            colour, dash = looks[trace.legendgroup]
            if trace.fill:
                trace.fillcolor = see_through(colour, 0.12)
            else:
                trace.line.update(color=colour, dash=dash)
        panels.append((f"At the {PLACES[place]}", panel(plot, height=380)))
    return Figure(
        "P(answer) after erasing, by layer",
        panels,
        "Mean probability of the answer's first token when the output of one layer is changed; "
        f"n = {result.n_used} questions, bands are 95% bootstrap intervals, the dotted line is "
        f"the untouched model ({number(clean, signed=False)}). The control erases another entity. The "
        "bridge matters where its line lies below the control's of the same form. One scale for both "
        "panels; it need not start at 0.",
        width=420,
    )


def _costs(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        below, change = cell["layers_below_zero"], cell["bridge_minus_control"]
        names = [_VARIANTS[cell["variant"]], PLACES[cell["position"]]]
        where = [layers(below) if below else "none", str(cell["layer"])]
        rows.append([*names, *where, number(change, n=False), str(change["n"])])
    columns = ["form", "position", "interval below zero at", "largest at layer"]
    return Table(
        "Where the bridge's erasure costs most",
        [*columns, "bridge minus control", "n"],
        rows,
        texts=3,
        note="The layer with the largest cost is chosen on one half of the questions; the last "
        "two columns are its difference of P(answer), 95% interval and n on the other half.",
    )
