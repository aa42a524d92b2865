"""What the last token must look at: attention to the first hop blocked, in answered questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.patching.knockout import knockout
from mi_hops.result.result import Result
from mi_hops.study.context import Run
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, estimate, mean, number, number_headline
from mi_hops.study.parts import Block, Figure, Text, heatmap, used
from mi_hops.study.step import Asked, Step, Work
from mi_hops.sweep.pairs import Pairs

#: Keys that the last token does not see.
PLACES = ("first hop", "first hop's last token")


def questions(
    model: HookedModel, facts: Sequence[TwoHopFact], form: str | None, purpose: str
) -> tuple[Pairs, dict[str, Any]]:
    """Questions with their answers, and where their first hops are: all of it, and its last token."""

    def prepare(case: Case) -> tuple[Case, slice, int]:
        span = case.positions(case.fact.first_hop)
        return case, slice(span[0], span[-1] + 1), case.positions("first hop")[0]

    rows, skipped = usable(model, facts, prepare, purpose=purpose, form=form)
    pairs = Pairs(
        [case.prompt for case, *_ in rows],
        answer=[case.target for case, *_ in rows],
        labels=[case.fact.id for case, *_ in rows],
        skipped=skipped,
    )
    return pairs, {PLACES[0]: [span for _, span, _ in rows], PLACES[1]: [at for *_, at in rows]}


class Knockout(Step):
    """Blocks the last token's attention to the first hop, window by window; an optional step."""

    name, short, share = "knockout", "Attention knockout", 0.04
    title, optional = "Attention knockout", True
    question = "In which layers must the last token look at the first hop?"

    def run(self, run: Run) -> Result:
        """Block attention in a draw of the answered questions."""
        window = max(1, int(run.model.cfg.n_layers) // 5)

        def find(facts: list[TwoHopFact]) -> Result:
            pairs, keys = questions(run.model, facts, run.form, "attention knockout")
            return knockout(run.model, pairs, keys, window=window, limits=run.limits)

        n = run.affordable(self, run.answered, run.settings.size.locate, find)
        return find(run.draw(run.answered, n, self.name))

    def work(self, asked: Asked) -> Work:
        """A row for each layer and place."""
        most = asked.most(asked.settings.size.locate)
        return asked.swept(most * asked.n_layers * len(PLACES))

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """For each place the layer whose block costs most, and the intact probability."""
        ends = result.ci(variable="change")
        entry: dict[str, Any] = {
            "intact": mean(result["intact"].values),
            "window": result.provenance["window"],
        }
        for place in PLACES:
            here = ends.sel(position=place)
            worst = here.isel(layer=int(np.argmin(here["estimate"].values)))
            change = (worst[k].item() for k in ("estimate", "lower", "upper", "n"))
            entry[place] = {"layer": int(worst["layer"]), "change": estimate(*change)}
        return entry

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """What is lost without the first hop, in the layer where that is most."""
        here = entry[PLACES[0]]
        yield number_headline(
            "lost without a look at the first hop",
            here["change"],
            "change of P(answer) where the last token cannot attend to the first hop around layer "
            f"{here['layer']}, the layer where that costs most.",
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """A map of layer by place."""
        entry = study.summary[self.name]
        yield Text(
            "In answered questions the last token's attention to the first hop, or to its last token "
            f"alone, is blocked in {entry['window']} layer(s) around each; the rest of its attention "
            f"is scaled up to 1 again. {used(result)}. P(answer) is "
            f"{number(entry['intact'], signed=False)} untouched."
        )
        ends = result.ci(variable="change")
        extent = float(abs(ends["estimate"]).max()) or 1.0
        plot = heatmap(
            ends, x="position", limits=(-extent, extent), colour_label="change of P(answer)"
        )
        yield Figure(
            "Change of P(answer) without attention to the first hop",
            [("", plot)],
            f"Mean change of the probability of the answer's first token over n = {result.n_used} "
            "answered questions; numbers in the cells, intervals on hover. Red: the answer needs that "
            "look. The layer named in the headline is chosen on these same questions.",
        )
