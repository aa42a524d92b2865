"""Where bridge and answer show up in the logit lens, in answered and in failed questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.lens import fact_trajectories
from mi_hops.lens.order import SCORES, half_layers
from mi_hops.lens.vectors import LensLike
from mi_hops.result.result import Result
from mi_hops.result.statistics import difference_ci
from mi_hops.study.context import Run, Skip, choosing
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import (
    Headline,
    estimate,
    mean,
    number,
    number_headline,
    percent,
    share_of,
    sign,
)
from mi_hops.study.parts import Block, Figure, Table, Text, curves, frame, used
from mi_hops.study.step import Asked, Step, Work

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLACES = {"first hop": "first hop's last token", "last": "last token", "between": "between"}
GROUPS = {"passed": "answered correctly", "failed": "failed"}
_BLOCKS = "blocks passed (0 = embedding)"


class Lens(Step):
    """Bridge and answer by layer, at the first hop's last token and at the last."""

    name, short, share = "lens", "The logit lens", 0.05
    title = "Bridge and answer in the logit lens"
    question = "Where does the bridge, which never appears in the prompt, show up inside the model?"

    def run(self, run: Run) -> Result:
        """Read a draw of the answered and one of the failed questions."""
        return read_groups(run, "logit")

    def work(self, asked: Asked) -> Work:
        """Two groups, read once."""
        return reading(asked)

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """Where the bridge peaks, and by how much more in answered than in failed questions.

        The bridge is read by the papers' score, the mean probability of all its tokens; the answer
        by its first token. The layer of the difference is the one where it is largest on one half of
        each group; the number comes from the other half.
        """
        data = result.data
        groups = data["group"].values
        half = choosing(data["example"].values)
        last = data[SCORES["answer"]].sel(tracked="answer", position="last")
        final = last.transpose("example", "layer").values
        found: dict[str, Any] = {}
        for position in data["position"].values.tolist():
            here = data.sel(position=position).transpose("example", "layer", ...)
            bridge, answer = (here[s].sel(tracked=t).values for t, s in SCORES.items())
            entry = found[position] = {
                group: {
                    **_peaks(bridge[groups == group], answer[groups == group]),
                    **comes_first(bridge[groups == group], final[groups == group]),
                }
                for group in dict.fromkeys(groups.tolist())
            }
            sides = [groups == "passed", groups == "failed"]
            if all((side & part).any() for side in sides for part in (half, ~half)):
                chosen = np.subtract(*(bridge[side & half].mean(0) for side in sides))[1:]
                layer = 1 + int(chosen.argmax())
                reported = [bridge[side & ~half, layer] for side in sides]
                entry["passed_minus_failed"] = {
                    "layer": layer,
                    "on_choosing_half": float(chosen.max()),
                    **estimate(*difference_ci(*reported), len(reported[0])),
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
        names = [name for name in GROUPS if (groups == name).any()]
        counts = " and ".join(f"n = {(groups == g).sum()} questions {GROUPS[g]}" for g in names)
        yield Text(
            "After every block the hidden state is read as if it were the last (final norm, "
            "unembedding, softmax): the mean probability of the bridge's tokens (the papers' score; a "
            "name may show by any of its words) and the probability of the answer's first token. "
            f"Facts are a seeded draw among those with both hops known: {used(result)}."
        )
        panels = [
            (f"{t.capitalize()} at the {PLACES[place]}", _trajectory(result, names, place, t))
            for t in SCORES
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
            only = GROUPS[names[0]] if names else "known"
            text = f"All questions read here are {only}, so there is nothing to compare them with."
            yield Text(text, style="note")
            return
        passed = groups == "passed"
        panels = [(t.capitalize(), _difference(result, passed, t)) for t in SCORES]
        yield Figure(
            "Answered correctly minus failed",
            panels,
            f"Difference of the two groups' mean probabilities (n = {passed.sum()} and "
            f"{(~passed).sum()}), with 95% bootstrap bands, at both positions. Where a band does "
            "not touch zero the groups differ: above zero, there is more of it where the question "
            "is answered correctly.",
        )
        yield _peak_table(study.summary["lens"])
        yield first_table(study.summary["lens"])


def read_groups(run: Run, lens: LensLike) -> Result:
    """Bridge and answer by layer, of a draw of the answered and one of the failed questions.

    The groups are named in the coordinate ``group``.
    """
    groups = {"passed": run.passed, "failed": run.failed if run.gap.failed else []}
    label: dict[str, str] = {}
    facts = []
    for name, group in groups.items():
        facts += run.draw(group, run.settings.size.lens, f"lens {name}")
        label |= {fact.id: name for fact in group}
    if not facts:
        raise Skip(run.none_known)
    result = fact_trajectories(run.model, facts, form=run.form, lens=lens)
    names = [label[i] for i in result["example"].values.tolist()]
    title = "Bridge and answer in the lens"
    return result.assign(coords={"group": ("example", names)}, title=title, main="prob")


def shown_group(result: Result) -> tuple[str, np.ndarray]:
    """The answered questions where there are any, else all: what they are called, and which."""
    passed = result["group"].values == "passed"
    return (GROUPS["passed"], passed) if passed.any() else (GROUPS["failed"], ~passed)


def reading(asked: Asked) -> Work:
    """What `read_groups` takes."""
    rows = 2 * asked.most(asked.settings.size.lens)
    return Work(rows, rows * asked.length)


def comes_first(bridge: np.ndarray, answer: np.ndarray) -> dict[str, Any]:
    """Of arrays [example, layer], which of the two reaches half of its own peak at a lower layer.

    The embedding (layer 0) is left out. Shares of the questions; what is left to 1 is a tie.
    """
    half = [half_layers(x) for x in (bridge, answer)]
    return {
        "bridge_half_layer": mean(half[0]),
        "answer_half_layer": mean(half[1]),
        "bridge_first": share_of(half[0] < half[1]),
        "answer_first": share_of(half[0] > half[1]),
    }


def first_table(summary: Mapping[str, Any]) -> Table:
    """Who comes first, by position and group."""
    rows = []
    for place, group, entry in _entries(summary):
        layers = [
            number(entry[k], n=False, signed=False)
            for k in ("bridge_half_layer", "answer_half_layer")
        ]
        shares = [percent(entry[k], n=False) for k in ("bridge_first", "answer_first")]
        rows.append(
            [PLACES[place], GROUPS[group], *layers, *shares, str(entry["bridge_first"]["n"])]
        )
    columns = ["bridge read at", "questions", "bridge: layer of half its peak", "answer: layer"]
    return Table(
        "Who comes first",
        [*columns, "bridge first", "answer first", "n"],
        rows,
        texts=2,
        note="For each question, the first layer (blocks passed, embedding left out) at which bridge "
        "and answer reach half of their own largest probability; the answer is read at the last "
        "token. Layers: means with 95% bootstrap intervals. Shares: of the questions, exact 95% "
        "intervals in percent; the rest are ties. A peak can be tiny: the shares say who is first, "
        "not that either is there.",
    )


def _entries(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for place in PLACES:
        for group in GROUPS:
            if group in summary.get(place, {}):
                yield place, group, summary[place][group]


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
        ends = here.sel(example=examples).ci(variable=SCORES[tracked])
        parts.append(frame(ends, group=GROUPS[name]))
    plot = curves(parts, group="group", x_label=_BLOCKS, y_label="probability")
    return plot.update_yaxes(rangemode="tozero")


def _difference(result: Result, passed: np.ndarray, tracked: str) -> go.Figure:
    ends = result.difference_ci(groups=passed, variable=SCORES[tracked]).sel(tracked=tracked)
    data = frame(ends)
    data["position"] = data["position"].map(lambda name: f"at the {PLACES[name]}")
    label = "difference of probability"
    return curves([data], group="position", x_label=_BLOCKS, y_label=label, zero=True)


def _peak_table(summary: Mapping[str, Any]) -> Table:
    numbers = ("bridge_at_that_layer", "bridge_peak", "answer_final")
    rows = [
        [
            PLACES[place],
            GROUPS[group],
            str(entry["bridge_peak_layer_of_mean"]),
            *(number(entry[key], n=False, signed=False) for key in numbers),
            str(entry["bridge_peak"]["n"]),
        ]
        for place, group, entry in _entries(summary)
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
