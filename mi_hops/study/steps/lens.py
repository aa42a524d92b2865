"""Where bridge and answer show up in the logit lens, in answered and in failed questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.lens import fact_trajectories
from mi_hops.result.result import Result
from mi_hops.result.statistics import difference_ci
from mi_hops.study.context import Skip, choosing
from mi_hops.study.numbers import Headline, estimate, mean, number, number_headline, sign
from mi_hops.study.parts import Block, Figure, Table, Text, curves, frame, used
from mi_hops.study.step import Step

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mi_hops.study.context import Run
    from mi_hops.study.folder import Folder

PLACES = {"first hop": "first hop's last token", "last": "last token", "between": "between"}
_GROUPS = {"passed": "answered correctly", "failed": "failed"}
#: The bridge by the papers' score (mean over its tokens), the answer by its first token.
_SCORES = {"bridge": "mean_token_prob", "answer": "prob"}
_BLOCKS = "blocks passed (0 = embedding)"


class Lens(Step):
    """Bridge and answer by layer, at the first hop's last token and at the last."""

    name, short = "lens", "The logit lens"
    title = "Bridge and answer in the logit lens"
    question = "Where does the bridge, which never appears in the prompt, show up inside the model?"

    def run(self, run: Run) -> Result:
        """Read a draw of the answered and one of the failed questions."""
        groups = {"passed": run.draw(run.passed, run.settings.size.lens, "lens passed")}
        if run.gap.failed:
            groups["failed"] = run.draw(run.failed, run.settings.size.lens, "lens failed")
        facts = [f for group in groups.values() for f in group]
        if not facts:
            raise Skip(run.none_known)
        result = fact_trajectories(run.model, facts, form=run.form)
        label = {f.id: name for name, group in groups.items() for f in group}
        names = [label[i] for i in result["example"].values.tolist()]
        title = "Bridge and answer in the logit lens"
        return result.assign(coords={"group": ("example", names)}, title=title, main="prob")

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """Where the bridge peaks, and by how much more in answered than in failed questions.

        The bridge is read by the papers' score, the mean probability of all its tokens; the answer
        by its first token. The layer of the difference is the one where it is largest on one half of
        each group; the number comes from the other half.
        """
        data = result.data
        groups = data["group"].values
        half = choosing(data["example"].values)
        found: dict[str, Any] = {}
        for position in data["position"].values.tolist():
            here = data.sel(position=position).transpose("example", "layer", ...)
            bridge, answer = (here[s].sel(tracked=t).values for t, s in _SCORES.items())
            entry = found[position] = {
                group: _peaks(bridge[groups == group], answer[groups == group])
                for group in dict.fromkeys(groups.tolist())
            }
            sides = [groups == "passed", groups == "failed"]
            if all((side & part).any() for side in sides for part in (half, ~half)):
                chosen = np.subtract(*(bridge[side & half].mean(0) for side in sides))[1:]
                layer = 1 + int(chosen.argmax())
                reported = [bridge[side & ~half, layer] for side in sides]
                value, low, high = (float(x) for x in difference_ci(*reported))
                entry["passed_minus_failed"] = {
                    "layer": layer,
                    "on_choosing_half": float(chosen.max()),
                    **estimate(value, low, high, len(reported[0])),
                    "n_other": len(reported[1]),
                }
        return found

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The largest difference between answered and failed questions."""
        found = {
            p: e["passed_minus_failed"] for p, e in entry.items() if "passed_minus_failed" in e
        }
        if not found:
            return
        place = max(found, key=lambda p: found[p]["on_choosing_half"])
        best = found[place]
        words = {1: "more bridge", -1: "less bridge", 0: "no clearly different bridge"}[sign(best)]
        yield number_headline(
            "",
            best,
            f"mean probability of the bridge's tokens in the lens at the {PLACES[place]} after "
            f"{best['layer']} blocks, answered correctly minus failed: {words} where the question is "
            "answered correctly. (Layer and position chosen on the other half of the questions.)",
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """The curves of both groups, and their difference."""
        groups = result["group"].values
        names = [name for name in _GROUPS if (groups == name).any()]
        counts = " and ".join(f"n = {(groups == g).sum()} questions {_GROUPS[g]}" for g in names)
        yield Text(
            "After every block the hidden state is read as if it were the last (final norm, "
            "unembedding, softmax): the mean probability of the bridge's tokens (the papers' score; a "
            "name may show by any of its words) and the probability of the answer's first token. "
            f"Facts are a seeded draw among those with both hops known: {used(result)}."
        )
        panels = [
            (f"{t.capitalize()} at the {PLACES[place]}", _trajectory(result, names, place, t))
            for t in _SCORES
            for place in ("first hop", "last")
        ]
        yield Figure(
            "Probability of bridge and answer, layer by layer",
            panels,
            f"Lines are means over {counts}, bands their 95% bootstrap intervals. Each panel has "
            "its own scale. A model that composes shows the bridge in the middle layers before the "
            "answer's final rise, and more of it where it answers correctly.",
        )
        if len(names) < 2:
            only = _GROUPS[names[0]] if names else "known"
            text = f"All questions read here are {only}, so there is nothing to compare them with."
            yield Text(text, style="note")
            return
        passed = groups == "passed"
        panels = [(t.capitalize(), _difference(result, passed, t)) for t in _SCORES]
        yield Figure(
            "Answered correctly minus failed",
            panels,
            f"Difference of the two groups' mean probabilities (n = {passed.sum()} and "
            f"{(~passed).sum()}), with 95% bootstrap bands, at both positions. Where a band does "
            "not touch zero the groups differ: above zero, there is more of it where the question "
            "is answered correctly.",
        )
        yield _peak_table(study.summary["lens"])


def _peaks(bridge: np.ndarray, answer: np.ndarray) -> dict[str, Any]:
    """Of arrays [example, layer]; the embedding (layer 0) is the prompt's own, nothing recalled."""
    where = 1 + int(bridge.mean(0)[1:].argmax())
    return {
        "bridge_peak_layer_of_mean": where,
        "bridge_at_that_layer": mean(bridge[:, where]),
        "bridge_peak": mean(bridge[:, 1:].max(1)),
        "answer_final": mean(answer[:, -1]),
        "answer_half_layer_of_mean": int((answer.mean(0) >= answer.mean(0)[-1] / 2).argmax()),
    }


def _trajectory(result: Result, names: list[str], place: str, tracked: str) -> go.Figure:
    groups = result["group"].values
    here = result.sel(position=place, tracked=tracked)
    parts = []
    for name in names:
        examples = result["example"].values[groups == name].tolist()
        ends = here.sel(example=examples).ci(variable=_SCORES[tracked])
        parts.append(frame(ends, group=_GROUPS[name]))
    plot = curves(parts, group="group", x_label=_BLOCKS, y_label="probability")
    return plot.update_yaxes(rangemode="tozero")


def _difference(result: Result, passed: np.ndarray, tracked: str) -> go.Figure:
    ends = result.difference_ci(groups=passed, variable=_SCORES[tracked]).sel(tracked=tracked)
    data = frame(ends)
    data["position"] = data["position"].map(lambda name: f"at the {PLACES[name]}")
    label = "difference of probability"
    return curves([data], group="position", x_label=_BLOCKS, y_label=label, zero=True)


def _peak_table(summary: Mapping[str, Any]) -> Table:
    numbers = ("bridge_at_that_layer", "bridge_peak", "answer_final")
    rows = [
        [
            PLACES[place],
            name,
            str(entry[group]["bridge_peak_layer_of_mean"]),
            *(number(entry[group][key], n=False, signed=False) for key in numbers),
            str(entry[group]["bridge_peak"]["n"]),
        ]
        for place, entry in summary.items()
        for group, name in _GROUPS.items()
        if group in entry
    ]
    columns = ["position", "questions", "layer", "bridge at that layer", "bridge, own peak"]
    return Table(
        "Where the bridge peaks",
        [*columns, "answer, last layer", "n"],
        rows,
        texts=2,
        fold=True,
        note="Layer: where the mean curve is largest, embedding left out. Own peak: mean of each "
        "question's largest probability over layers. Brackets: 95% bootstrap intervals.",
    )
