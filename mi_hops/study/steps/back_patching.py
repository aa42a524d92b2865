"""Whether failures come too late: a later state fed back at an earlier layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from mi_hops.facts.fact import TwoHopFact
from mi_hops.patching.back import back_patch
from mi_hops.result.result import Result
from mi_hops.study.context import Run, choosing
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, percent, share_headline, share_of
from mi_hops.study.parts import Block, Figure, Text, heatmap, used
from mi_hops.study.step import Asked, Step, Work
from mi_hops.study.steps.knockout import PLACES as KEYS
from mi_hops.study.steps.knockout import questions

#: Where states are fed back.
PLACES = ("first hop", "last")


class BackPatching(Step):
    """Feeds late states of failed questions back at earlier layers; an optional step."""

    name, short, share = "back_patching", "Back-patching", 0.04
    title, optional = "Back-patching", True
    question = "Is a failed question answered when a later state is fed back at an earlier layer?"

    def run(self, run: Run) -> Result:
        """Every later state into every earlier layer, in a draw of the failures."""

        def find(facts: list[TwoHopFact]) -> Result:
            pairs, where = questions(run.model, facts, run.form, "back-patching")
            places = {"first hop": where[KEYS[1]], "last": -1}
            return back_patch(run.model, pairs, places, metric="rank", limits=run.limits)

        n = run.affordable(self, run.failed, run.settings.size.locate, find)
        return find(run.draw(run.failed, n, self.name))

    def work(self, asked: Asked) -> Work:
        """A row for each pair of layers and place."""
        most = asked.most(asked.settings.size.locate)
        pairs = asked.n_layers * (asked.n_layers + 1) // 2
        return asked.swept(most * pairs * len(PLACES))

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """The cell that corrects most on one half, and what it corrects on the other."""
        right = _corrected(result)
        half = choosing(result["example"].values)
        chosen = right.isel(example=np.flatnonzero(half)).mean("example").fillna(-1)
        place, source, target = np.unravel_index(int(chosen.values.argmax()), chosen.shape)
        cell = right.isel(position=place, source=source, target=target)
        return {
            "position": str(right["position"].values[place]),
            "source": int(right["source"].values[source]),
            "target": int(right["target"].values[target]),
            "intact": share_of((result["intact"].values == 1).astype(float)),
            "corrected": share_of(cell.values[~half]),
            "anywhere": share_of(right.max(["position", "source", "target"]).values),
        }

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The share corrected by the chosen cell."""
        yield share_headline(
            "corrected by feeding a state back",
            entry["corrected"],
            f"of failed questions have the answer's first token first when what enters layer "
            f"{entry['source']} is fed back at layer {entry['target']}, chosen on the other half.",
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """Shares corrected, by source and target."""
        entry = study.summary[self.name]
        yield Text(
            "What enters a later layer takes the place of what enters an earlier one, at the same "
            "token. If the answer comes first then, the layers that could have made it came before "
            f"what they needed. Failed questions, {used(result)}; of the answer's first token. "
            f"Without feeding anything back it comes first in {percent(entry['intact'])}. The best "
            f"cell of one half corrects {percent(entry['corrected'])} of the other; some cell or "
            f"other, chosen for each question, {percent(entry['anywhere'])}, which is what luck with "
            "so many cells gives too."
        )
        right = _corrected(result)
        ends = result.assign({"corrected": right}).ci(variable="corrected", n_resamples=300)
        panels = []
        for place in PLACES:
            cells = ends.sel(position=place).rename(source="layer")
            plot = heatmap(
                cells,
                x="target",
                limits=(0, 1),
                colour_label="share corrected",
                sequential=True,
                x_label="fed back at layer",
            )
            panels.append(
                ("first hop's last token" if place == "first hop" else "last token", plot)
            )
        yield Figure(
            "Failed questions corrected by feeding a state back",
            panels,
            f"Share of n = {result.n_used} failed questions whose answer's first token comes first, by "
            "the layer whose input is taken (upward) and the layer it is fed back at. Both halves "
            "together; intervals on hover.",
        )


def _corrected(result: Result) -> xr.DataArray:
    """1 where the answer's first token comes first, NaN where nothing was fed back."""
    score = result["score"]
    return (score == 1).where(score.notnull()).astype(float)
