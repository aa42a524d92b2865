"""Where the second hop sits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.reasoning.locate import locate, located_layers
from mi_hops.result.result import Result
from mi_hops.study.context import Run, choosing
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, estimate, layers, mean, number, sign
from mi_hops.study.parts import Block, Figure, Table, Text, heatmap, used
from mi_hops.study.step import Asked, Step, Work
from mi_hops.study.steps.lens import PLACES

KINDS = {"attn_out": "Attention output", "mlp_out": "MLP output", "resid_post": "Block output"}


class Locate(Step):
    """Which modules carry the second hop, on the choosing half of the failures."""

    name, short, share = "locate", "Locating the second hop", 0.08
    title = "Locating the second hop"
    question = (
        "Which modules, given what they compute for the plain second hop, correct the answer?"
    )

    def run(self, run: Run) -> Result:
        """Replace modules in a draw of the choosing half."""
        half = run.halves[0]

        def find(facts: list[TwoHopFact]) -> Result:
            return locate(run.model, facts, form=run.form, limits=run.limits)

        n = run.affordable(self, half, run.settings.size.locate, find)
        return find(run.draw(half, n, "locate"))

    def work(self, asked: Asked) -> Work:
        """Every kind of module at two positions of every layer."""
        most = asked.most(asked.settings.size.locate)
        return asked.swept(most * asked.n_layers * 2 * len(KINDS))

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """The located layers, and the strongest cell of each kind of module."""
        ends = result.ci(variable="effect")
        cells = {}
        for kind in ends["kind"].values.tolist():
            here = ends.sel(kind=kind).transpose("position", "layer")
            effect = here["estimate"].values
            if np.isnan(effect).all():
                continue
            p, layer = np.unravel_index(np.nanargmax(effect), effect.shape)
            at = here.isel(position=p, layer=layer)
            cells[kind] = {
                "position": at["position"].item(),
                "layer": int(at["layer"]),
                "effect": estimate(*(at[k].item() for k in ("estimate", "lower", "upper", "n"))),
            }
        return {
            **{name: mean(result[name].values) for name in ("clean", "guide")},
            "located_layers": located_layers(result),
            "above_others": _above_others(result),
            "cells": cells,
        }

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The located layers."""
        located, above = entry["located_layers"], entry["above_others"]
        where, n = layers(located).replace(" to ", "–"), f"n = {entry['clean']['n']}"
        if not located:
            where = "none"
            text = "No layer's attention output, taken from the second hop, raises the answer."
        elif above is None:
            text = (
                "are where attention output at the last token, taken from the second hop by itself, "
                "raises the answer of failed questions most; with no others to compare them with, that "
                "says little."
            )
        elif sign(above) > 0:
            one = len(located) == 1
            text = (
                f"{'carries' if one else 'carry'} the second hop: {'its' if one else 'their'} attention "
                "output at the last token, taken from the second hop by itself, raises the answer of "
                "failed questions most. Against the other layers P(answer) changes by "
                f"{number(above)} ({layers(above['layers'])} chosen on one half of the questions, "
                "measured on the other)."
            )
        else:
            text = (
                f"carries the second hop: {layers(located)} have the largest mean effect, but it does "
                f"not stand out. Located on one half of the questions, {layers(above['layers'])} change "
                f"P(answer) on the other half by {number(above)} against the other layers."
            )
            where, n = "no clear layer", f"{n}; largest at {where}"
        yield Headline("layers located", where, n, text)

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """A map of the effects of each kind of module."""
        summary = study.summary["locate"]
        located, cells = summary["located_layers"], summary["cells"]
        yield Text(
            "Each failed question is paired with its second hop, which spells the bridge out and "
            "ends in the same words. One module's output at one position (or, for “between”, at all "
            "tokens between) is replaced by the one from the second hop, counted from the end. "
            f"Failures of the choosing half, {used(result)}. P(answer) is "
            f"{number(summary['clean'], signed=False)} untouched and "
            f"{number(summary['guide'], signed=False)} for the second hop by itself."
        )
        if not cells:
            yield Text("No cell could be measured.", style="note")
            return
        ends = result.ci(variable="effect")
        # Prompts without a token between the first hop and the last one have no such column.
        ends = ends.isel(position=ends["estimate"].notnull().any(["kind", "layer"]).values)
        # One scale for all kinds, so that colours compare.
        extent = float(abs(ends["estimate"]).max()) or 1.0
        columns = ends["position"].values.tolist()
        rows = ends["layer"].values.tolist()
        boxes = [(rows.index(i), columns.index("last")) for i in located if "last" in columns]
        panels = []
        for kind in cells:
            plot = heatmap(
                ends.sel(kind=kind),
                x="position",
                limits=(-extent, extent),
                colour_label="change of P(answer)",
                boxes=boxes if kind == "attn_out" else [],
            )
            panels.append((KINDS.get(kind, kind), plot))
        yield Figure(
            "Change of P(answer) when one module is replaced",
            panels,
            f"Mean change of the probability of the answer's first token over n = {result.n_used} "
            "failed questions, for each layer and position; numbers in the cells, intervals on "
            "hover. Blue raises the answer, red lowers it; the scale is the same in all panels. "
            f"Boxes: the located layers ({layers(located)}), those whose attention output at the "
            "last token has at least half of the largest mean effect there. Block output holds all "
            "that came before it, so at the last token it must win in the end.",
            width=290,
        )
        if (above := summary["above_others"]) is not None:
            yield Text(
                f"Do the located layers stand out? Chosen on one half of the questions "
                f"({layers(above['layers'])}) and measured on the other, their attention output at the "
                f"last token changes P(answer) by {number(above)} against that of the other layers."
            )
        yield Table(
            "The strongest cell of each kind",
            ("module", "position", "layer", "change of P(answer)", "n"),
            [
                [
                    KINDS.get(kind, kind),
                    PLACES[cell["position"]],
                    str(cell["layer"]),
                    number(cell["effect"], n=False),
                    str(cell["effect"]["n"]),
                ]
                for kind, cell in cells.items()
            ],
            texts=2,
            note="The cell is chosen on these same questions, so its number is a little "
            "optimistic. Brackets: 95% bootstrap intervals.",
        )


def _above_others(result: Result) -> dict[str, Any] | None:
    """By how much the located layers' effect exceeds that of the others, question by question.

    The layers are located on one half of the questions, the difference is the other half's. None where
    a half has no question, or where no layer or every layer is located.
    """
    half = choosing(result["example"].values)
    if not half.any() or half.all():
        return None
    first = result.sel(example=result["example"].values[half].tolist())
    located = located_layers(first)
    every = result["layer"].values.tolist()
    others = [layer for layer in every if layer not in located]
    if not located or not others:
        return None
    effect = result["effect"].sel(kind="attn_out", position="last").transpose("example", "layer")
    there, elsewhere = (
        effect.sel(layer=chosen).values[~half].mean(1) for chosen in (located, others)
    )
    return {"layers": located, **mean(there - elsewhere)}
