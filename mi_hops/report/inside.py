"""What happens inside: the lens, erasing the bridge, and where the second hop sits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mi_hops.report.parts import (
    Figure,
    Section,
    Table,
    Text,
    frame,
    heatmap,
    layers,
    number,
    opened,
    panel,
    used,
)

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

    from mi_hops.result.result import Result
    from mi_hops.study.folder import Study

_PLACES = {"first hop": "first hop's last token", "last": "last token", "between": "between"}
_GROUPS = {"passed": "answered rightly", "failed": "failed"}
_VARIANTS = {"published": "published form", "exact": "exact form"}
_KINDS = {"attn_out": "Attention output", "mlp_out": "MLP output", "resid_post": "Block output"}
#: The bridge by the papers' score (mean over its tokens), the answer by its first token.
_SCORES = {"bridge": "mean_token_prob", "answer": "prob"}
_BLOCKS = "blocks passed (0 = embedding)"


def lens_section(study: Study) -> Section:
    """Step 2."""
    section, result = opened(
        study,
        "lens",
        "Bridge and answer in the logit lens",
        "Where does the bridge, which never stands in the prompt, show up inside the model?",
    )
    if result is None:
        return section
    groups = result["group"].values
    names = [name for name in _GROUPS if (groups == name).any()]
    counts = " and ".join(f"n = {(groups == g).sum()} questions {_GROUPS[g]}" for g in names)
    section.blocks.append(
        Text(
            "After every block the hidden state is read as if it were the last (final norm, "
            "unembedding, softmax): the mean probability of the bridge's tokens (the papers' score; a "
            "name may show by any of its words) and the probability of the answer's first token. "
            f"Facts are a seeded draw among those with both hops known: {used(result)}."
        )
    )
    section.blocks.append(
        Figure(
            "Probability of bridge and answer, layer by layer",
            [(f"{tracked.capitalize()} at the {_PLACES[place]}",
              _trajectory(result, names, place, tracked))
             for tracked in ("bridge", "answer") for place in ("first hop", "last")],
            f"Lines are means over {counts}, bands their 95% bootstrap intervals. Each panel has "
            "its own scale. A model that composes shows the bridge in the middle layers before the "
            "answer's final rise, and more of it where it answers rightly.",
        )
    )  # fmt: skip
    if len(names) < 2:
        only = _GROUPS[names[0]] if names else "known"
        section.blocks.append(
            Text(f"All questions read here are {only}, so there is nothing to compare them with.",
                 style="note")
        )  # fmt: skip
        return section
    passed = groups == "passed"
    difference = {
        tracked: result.difference_ci(groups=passed, variable=score).sel(tracked=tracked)
        for tracked, score in _SCORES.items()
    }
    section.blocks.append(
        Figure(
            "Answered rightly minus failed",
            [(tracked.capitalize(), _difference(difference[tracked]))
             for tracked in ("bridge", "answer")],
            f"Difference of the two groups' mean probabilities (n = {passed.sum()} and "
            f"{(~passed).sum()}), with 95% bootstrap bands, at both positions. Where a band does "
            "not touch zero the groups differ: above zero, there is more of it where the question "
            "is answered rightly.",
        )
    )  # fmt: skip
    section.blocks.append(_peaks(study.summary["lens"]))
    return section


def _trajectory(result: Result, names: list[str], place: str, tracked: str) -> go.Figure:
    import pandas as pd

    from mi_hops.result import plots
    from mi_hops.result.result import Result as Labelled

    parts = []
    for name in names:
        score = _SCORES[tracked]
        mine = result.data[[score]].isel(example=result["group"].values == name)
        mine = mine.sel(position=place, tracked=tracked)
        ends = Labelled(mine, provenance={}, allow_nonfinite=True).ci(variable=score)
        parts.append(frame(ends, group=_GROUPS[name]))
    plot = plots.lines(
        pd.concat(parts), x="layer", y="estimate", group="group", lower="lower", upper="upper",
        title="", x_label=_BLOCKS, y_label="probability",
    )  # fmt: skip
    plot.update_yaxes(rangemode="tozero")
    return panel(plot)


def _difference(intervals: Any) -> go.Figure:
    from mi_hops.result import plots

    data = frame(intervals)
    data["position"] = data["position"].map(lambda name: f"at the {_PLACES[name]}")
    plot = plots.lines(
        data, x="layer", y="estimate", group="position", lower="lower", upper="upper", title="",
        x_label=_BLOCKS, y_label="difference of probability",
    )  # fmt: skip
    return panel(_zero_line(plot))


def _peaks(summary: dict[str, Any]) -> Table:
    rows = []
    for place, entry in summary.items():
        for group, name in _GROUPS.items():
            if group in entry:
                mine = entry[group]
                rows.append([
                    _PLACES[place], name, str(mine["bridge_peak_layer_of_mean"]),
                    number(mine["bridge_at_that_layer"], n=False, signed=False),
                    number(mine["bridge_peak"], n=False, signed=False),
                    number(mine["answer_final"], n=False, signed=False),
                    str(mine["bridge_peak"]["n"]),
                ])  # fmt: skip
    return Table(
        "Where the bridge peaks",
        ("position", "questions", "layer", "bridge at that layer", "bridge, own peak",
         "answer, last layer", "n"),
        rows, texts=2, fold=True,
        note="Layer: where the mean curve is largest, embedding left out. Own peak: mean of each "
        "question's largest probability over layers. Brackets: 95% bootstrap intervals.",
    )  # fmt: skip


def erasure_section(study: Study) -> Section:
    """Step 3."""
    section, result = opened(
        study,
        "erasure",
        "Erasing the bridge",
        "Does the bridge cause the answer, or does it merely stand beside it?",
    )
    if result is None:
        return section
    controls = result.provenance.get("controls", "several")
    section.blocks.append(
        Text(
            "At one layer and one position the block's output is changed so that the bridge's "
            "tokens read lowest in the lens, and the forward pass goes on. The exact form makes the "
            "shortest such change that leaves the answer's read-out as it was; the published form "
            "(arXiv 2402.14328) maps a wished read-out back through a pseudo-inverse and then pushes "
            "the answer back up. The control erases another entity of as many tokens by the same "
            f"formula (mean over {controls} draws). Questions answered rightly, {used(result)}."
        )
    )
    if study.settings["processing"] != "none":
        rank = result.provenance["unembedding_rank"]
        section.blocks.append(
            Text(
                "The model's weights were processed when it was loaded (norms folded in, centred), so "
                "these numbers are of another W_U than the checkpoint's own. The pseudo-inverse is "
                f"taken over the {rank} directions that it reads.",
                style="note",
            )
        )
    variants = result["variant"].values.tolist()
    places = result["position"].values.tolist()
    ends = {"bridge erased": result.ci(variable="bridge"),
            "another entity erased (control)": result.ci(variable="control")}  # fmt: skip
    clean = study.summary["erasure"]["clean"]
    spans = [e for part in ends.values() for e in (part["lower"], part["upper"], part["estimate"])]
    low = min([clean["value"], *(float(e.min()) for e in spans)])
    high = max([clean["value"], *(float(e.max()) for e in spans)])
    room = 0.08 * (high - low) or 0.01
    scale = (max(0.0, low - room), min(1.0, high + room))
    section.blocks.append(
        Figure(
            "P(answer) after erasing, by layer",
            [(_cell_name(v, p), _erased(ends, v, p, clean["value"], scale))
             for v in variants for p in places],
            "Mean probability of the answer's first token when the output of one layer is changed; "
            f"n = {result.n_used} questions, bands are 95% bootstrap intervals, the dotted line is "
            f"the untouched model ({number(clean, signed=False)}). The bridge matters where its "
            "line lies below the control's. One scale for all panels; it need not start at 0.",
        )
    )  # fmt: skip
    difference = result.difference_ci("control", variable="bridge")
    section.blocks.append(
        Figure(
            "Bridge erased minus control",
            [(f"At the {_PLACES[p]}", _less_control(difference.sel(position=p))) for p in places],
            "Difference of P(answer), question by question, averaged over "
            f"n = {result.n_used} questions; bands are 95% bootstrap intervals. Below zero, with a "
            "band that does not touch it, the answer rests on the bridge at that layer. Each band "
            "is for its own layer, without a correction for looking at all of them.",
        )
    )  # fmt: skip
    rows = []
    for variant in variants:
        for place in places:
            entry = study.summary["erasure"][f"{variant}, {place}"]
            below = entry["layers_below_zero"]
            rows.append([
                _VARIANTS.get(variant, variant), _PLACES[place], layers(below) if below else "none",
                str(entry["layer"]), number(entry["bridge_minus_control"], n=False),
                str(entry["bridge_minus_control"]["n"]),
            ])  # fmt: skip
    section.blocks.append(
        Table(
            "Where the bridge's erasure costs most",
            ("form", "position", "interval below zero at", "largest at layer",
             "bridge minus control", "n"),
            rows, texts=3,
            note="The layer with the largest cost is chosen on one half of the questions; the last "
            "two columns are its difference of P(answer), 95% interval and n on the other half.",
        )
    )  # fmt: skip
    return section


def _erased(ends: dict[str, Any], variant: str, place: str, clean: float,
            scale: tuple[float, float]) -> go.Figure:  # fmt: skip
    import pandas as pd

    from mi_hops.result import plots

    parts = [frame(e.sel(variant=variant, position=place), erased=name) for name, e in ends.items()]
    plot = plots.lines(
        pd.concat(parts), x="layer", y="estimate", group="erased", lower="lower", upper="upper",
        title="", x_label="layer whose output is changed", y_label="P(answer)",
        references={"untouched": clean},
    )  # fmt: skip
    return panel(plot, y_range=scale)


def _less_control(intervals: Any) -> go.Figure:
    from mi_hops.result import plots

    data = frame(intervals)
    data["variant"] = data["variant"].map(lambda name: _VARIANTS.get(name, name))
    plot = plots.lines(
        data, x="layer", y="estimate", group="variant", lower="lower", upper="upper", title="",
        x_label="layer whose output is changed", y_label="difference of P(answer)",
    )  # fmt: skip
    return panel(_zero_line(plot))


def _cell_name(variant: str, place: str) -> str:
    return f"{_VARIANTS.get(variant, variant).capitalize()}, {_PLACES[place]}"


def _zero_line(plot: go.Figure) -> go.Figure:
    plot.add_hline(y=0, line={"color": "#555555", "width": 1.2})
    return plot


def locate_section(study: Study) -> Section:
    """Step 4."""
    section, result = opened(
        study,
        "locate",
        "Locating the second hop",
        "Which modules, given what they compute for the plain second hop, put the answer right?",
    )
    if result is None:
        return section
    summary = study.summary["locate"]
    located = summary["located_layers"]
    section.blocks.append(
        Text(
            "Each failed question is paired with its second hop, which spells the bridge out and "
            "ends in the same words. One module's output at one position (or, for “between”, at all "
            "tokens between) is replaced by the one from the second hop, counted from the end. "
            f"Failures of the choosing half, {used(result)}. P(answer) is "
            f"{number(summary['clean'], signed=False)} untouched and "
            f"{number(summary['guide'], signed=False)} for the second hop by itself."
        )
    )
    ends = result.ci(variable="effect")
    shown = [k for k in ends["kind"].values.tolist() if k in summary]
    # Prompts without a token between the first hop and the last one have no such column.
    measured = ends["estimate"].notnull().any(["kind", "layer"])
    ends = ends.isel(position=measured.values)
    if not shown:
        section.blocks.append(Text("No cell could be measured.", style="note"))
        return section
    # One scale for all three, so that colours compare.
    extent = float(abs(ends["estimate"]).max()) or 1.0
    section.blocks.append(
        Figure(
            "Change of P(answer) when one module is replaced",
            [(_KINDS.get(kind, kind), _effects(ends.sel(kind=kind), extent, located, kind))
             for kind in shown],
            f"Mean change of the probability of the answer's first token over n = {result.n_used} "
            "failed questions, for each layer and position; numbers in the cells, intervals on "
            "hover. Blue raises the answer, red lowers it; the scale is the same in all panels. "
            f"Boxes: the located layers ({layers(located)}), those whose attention output at the "
            "last token has at least half of the largest mean effect there. Block output holds all "
            "that came before it, so at the last token it must win in the end.",
            width=290,
        )
    )  # fmt: skip
    rows = [
        [_KINDS.get(kind, kind), _PLACES[summary[kind]["position"]], str(summary[kind]["layer"]),
         number(summary[kind]["effect"], n=False), str(summary[kind]["effect"]["n"])]
        for kind in shown
    ]  # fmt: skip
    section.blocks.append(
        Table(
            "The strongest cell of each kind",
            ("module", "position", "layer", "change of P(answer)", "n"),
            rows, texts=2, note="The cell is picked on these same questions, which flatters it a "
            "little. Brackets: 95% bootstrap intervals.",
        )
    )  # fmt: skip
    return section


def _effects(ends: Any, extent: float, located: list[int], kind: str) -> go.Figure:
    array = ends["estimate"]
    columns = array["position"].values.tolist()
    rows: np.ndarray = array["layer"].values
    boxes = []
    if kind == "attn_out" and "last" in columns:
        boxes = [(int((rows == i).argmax()), columns.index("last")) for i in located]
    return heatmap(
        array, x="position", height=130 + max(180, 30 * len(rows)), limits=(-extent, extent),
        colour_label="change of P(answer)", boxes=boxes,
        hover={"n": ends["n"], "95% from": ends["lower"], "to": ends["upper"]},
    )  # fmt: skip
