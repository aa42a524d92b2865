"""Two studies side by side: two models, two versions of one, or one before and after an edit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mi_hops.lens.order import SCORES
from mi_hops.reasoning.gap import HOPS
from mi_hops.result.figure_parts import as_text
from mi_hops.result.files import replacing
from mi_hops.study.numbers import percent
from mi_hops.study.parts import Block, Figure, Table, Text, bars, curves, frame, row
from mi_hops.study.report.opening import opening
from mi_hops.study.report.page import Section, render
from mi_hops.study.steps import STEPS
from mi_hops.study.steps.editing import SETS
from mi_hops.study.steps.injection import MEMORIES
from mi_hops.study.steps.lens import PLACES, shown_group
from mi_hops.study.steps.locate import KINDS
from mi_hops.study.study import Study, require_finished

#: What the studies are called -> the study.
Sides = Mapping[str, Study]

#: What a study chose for itself, in a number's name.
_CHOSEN = re.compile(r" \((?!C = I)[^)]*\)")
_HOPS = dict(zip(HOPS, ("first hop", "second hop", "two-hop question"), strict=True))
#: Settings that a reader must know to differ, in this order; the rest is what follows from them.
_TOLD = (
    "model fingerprint weights dtype device backend processing bos versions facts n_facts seed limit "
    "shots score budget sizes mi_hops"
).split()
_LABELS = {"bos": "BOS before every prompt", "n_facts": "number of facts"}


def compare_studies(
    first: Study | str | Path,
    second: Study | str | Path,
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare two finished studies on one page: a single HTML file that needs no network.

    It lists what differs between them, shows the numbers of `Study.headlines` side by side, and draws
    gap, lens, erasure, located layers, injection and edits of both in one figure each. The two need
    not use the same facts; if they do not, a difference may be due to the facts.

    Args:
        first, second: studies, or their folders.
        path: of the file, which ends in ``.html``; its folder must exist.
        names: names of the two; by default their models, or their folders if the models have the same
            name.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        ValueError: a study that is not finished, names that are alike, or another ending of the path.
        FileExistsError: the file exists and `overwrite` is False.

    Examples:
        >>> import mi_hops, tempfile
        >>> from mi_hops.study import compare_studies
        >>> facts = mi_hops.Hopland().sample(train=0, held_out=1)
        >>> out, few = tempfile.mkdtemp(), mi_hops.StudySettings(sizes="quick")
        >>> study = mi_hops.run_study("hops-gpt2", facts, out=f"{out}/a", settings=few, progress=False)
        >>> compare_studies(study, study, f"{out}/both.html", names=["once", "again"]).name
        'both.html'
    """
    studies = [s if isinstance(s, Study) else Study.open(s) for s in (first, second)]
    for study in studies:
        require_finished(study, "compare")
    called = list(names) if names is not None else _names(studies)
    if len(called) != 2 or called[0] == called[1]:
        raise ValueError(f"names is {called}; expected two different names, one for each study")
    path = Path(path)
    with replacing(path, suffix=".html", overwrite=overwrite) as partial:
        text = _page(dict(zip(called, studies, strict=True)))
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


def _names(studies: Sequence[Study]) -> list[str]:
    models = [str(study.settings["model"]) for study in studies]
    if models[0] != models[1]:
        return models
    folders = [study.folder.resolve().name for study in studies]
    return folders if folders[0] != folders[1] else ["first", "second"]


def _page(sides: Sides) -> str:
    sections = []
    for step in STEPS:
        if step.name not in _COMPARED:
            continue
        shared = {name: study for name, study in sides.items() if _ran(study, step.name)}
        blocks: list[Block] = []
        for name, study in sides.items():
            if name not in shared:
                why = study.summary.get(step.name, {}).get("skipped") or "it was not run"
                blocks.append(Text(f"{name}: {step.short} was left out: {why}.", style="note"))
        if shared:
            blocks += list(_COMPARED[step.name](shared))
        sections.append(Section(step.name, step.title, step.question, blocks))
    return render(
        "compare.html.jinja",
        title=f"Two-hop questions: {' and '.join(sides)}",
        found="The numbers",
        sides={name: _described(study) for name, study in sides.items()},
        differ=_differences(sides),
        numbers=_numbers(sides),
        sections=sections,
    )


def _ran(study: Study, step: str) -> bool:
    return step in study.summary and "skipped" not in study.summary[step]


def _described(study: Study) -> str:
    told = opening(study)
    n = f"n = {study.settings['n_facts']} facts"
    return f"{told.model} {told.world} ({n}; folder {study.folder.resolve().name})"


def _differences(sides: Sides) -> Table:
    """The settings that are not the same."""
    first, second = (study.settings for study in sides.values())
    rows = []
    for key in _TOLD:
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            rows += [
                [f"{key.replace('_', ' ')}: {part.replace('_', ' ')}", *map(_said, pair)]
                for part in dict.fromkeys([*one, *other])
                for pair in [(one.get(part), other.get(part))]
                if pair[0] != pair[1]
            ]
        elif one != other:
            rows.append([_LABELS.get(key, key), _said(one), _said(other)])
    if first["facts_digest"] != second["facts_digest"]:
        rows.append(["the facts asked", "others than the second's", "others than the first's"])
    rows = rows or [["nothing", "–", "–"]]
    return Table("What differs between them", ("setting", *sides), rows, texts=3)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else as_text(value)


def _numbers(sides: Sides) -> Table:
    """Every headline that either has, in the order of the study."""
    found = [
        {_CHOSEN.sub("", name): "\n".join([value, *_CHOSEN.findall(name)]) for name, value in told}
        for told in (study.headlines() for study in sides.values())
    ]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [[name, *(one.get(name, "–") for one in found)] for name in names]
    return Table(
        "Side by side",
        ("number", *sides),
        rows,
        texts=1,
        note="Brackets: 95% intervals; in parentheses the form, layers and strengths that each study chose "
        "for itself. Intervals that overlap do not show that two numbers are equal.",
    )


# -- the steps ------------------------------------------------------------------------------------


def _gap(sides: Sides) -> Iterator[Block]:
    rows = []
    for name, study in sides.items():
        main = next(iter(study.summary["gap"]["forms"].values()))
        rows += [row(main[hop], asked=words, study=name) for hop, words in _HOPS.items()]
        rows.append(row(main["gap"], asked="failed of known", study=name))
    if (plot := bars(rows, x="asked", group="study")) is not None:
        counts = ", ".join(f"{n}: n = {_asked(s)}" for n, s in sides.items())
        yield Figure(
            "Answered correctly, and the gap",
            [("", plot)],
            f"Shares of all facts asked in each study's main form ({counts}); the last group is the gap: "
            "of the facts with both hops known, those whose two-hop question failed. Whiskers are "
            "exact 95% intervals.",
            width=600,
        )
    cells = [
        [name, form, *(percent(entry[k]) for k in (*HOPS, "gap"))]
        for name, study in sides.items()
        for form, entry in study.summary["gap"]["forms"].items()
    ]
    columns = ("study", "form", *_HOPS.values(), "failed of known")
    yield Table("By form", columns, cells, texts=2, fold=True, note="Exact 95% intervals.")


def _asked(study: Study) -> int:
    return int(next(iter(study.summary["gap"]["forms"].values()))["two_hop"]["n"])


def _lens(sides: Sides) -> Iterator[Block]:
    panels, counts = [], {}
    for tracked, score in SCORES.items():
        for place in ("first hop", "last"):
            parts = []
            for name, study in sides.items():
                result: Any = study.result("lens")
                words, shown = shown_group(result)
                counts[name] = f"{name}: n = {shown.sum()} {words}"
                ids = result["example"].values[shown].tolist()
                here = result.sel(position=place, tracked=tracked, example=ids)
                parts.append(frame(here.ci(variable=score), study=name))
            plot = curves(
                parts, group="study", x_label="blocks passed (0 = embedding)", y_label="probability"
            )
            title = f"{tracked.capitalize()} at the {PLACES[place]}"
            panels.append((title, plot.update_yaxes(rangemode="tozero")))
    yield Figure(
        "Bridge and answer in the logit lens",
        panels,
        f"Mean probability by layer ({'; '.join(counts.values())}), bands are 95% bootstrap intervals.",
    )


def _erasure(sides: Sides) -> Iterator[Block]:
    results: dict[str, Any] = {name: study.result("erasure") for name, study in sides.items()}
    ends = {
        name: result.difference_ci("control", variable="bridge").sel(variant="exact")
        for name, result in results.items()
    }
    places = {f"At the {PLACES[place]}": {"position": place} for place in ("first hop", "last")}
    yield Figure(
        "Bridge erased minus another entity erased (exact form)",
        _by_layer(ends, places, "layer whose output is changed", "difference of P(answer)"),
        f"Difference of P(answer) by layer ({_used(results)}), bands are 95% bootstrap intervals. Below "
        "zero the answer rests on the bridge.",
    )


def _located(sides: Sides) -> Iterator[Block]:
    results: dict[str, Any] = {name: study.result("locate") for name, study in sides.items()}
    ends = {
        name: result.ci(variable="effect").sel(position="last") for name, result in results.items()
    }
    kinds = {f"{KINDS[kind]} at the last token": {"kind": kind} for kind in ("attn_out", "mlp_out")}
    yield Figure(
        "Change of P(answer) when a module is given what the second hop computes",
        _by_layer(ends, kinds, "layer", "change of P(answer)"),
        f"Means over failed questions ({_used(results)}), bands are 95% bootstrap intervals.",
    )


def _by_layer(
    ends: Mapping[str, Any], panels: Mapping[str, dict[str, str]], x_label: str, y_label: str
) -> list[tuple[str, Any]]:
    """Panels, each of one part of the intervals, with a line for each study."""
    found = []
    for title, part in panels.items():
        lines = [frame(interval.sel(part), study=name) for name, interval in ends.items()]
        plot = curves(lines, group="study", x_label=x_label, y_label=y_label, zero=True)
        found.append((title, plot))
    return found


def _used(results: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: n = {result.n_used}" for name, result in results.items())


def _injection(sides: Sides) -> Iterator[Block]:
    rows = [
        row(memories[memory]["first_correct"], injected=MEMORIES[memory], study=name)
        for name, study in sides.items()
        for memories in [study.summary["injection"]["memories"]]
        for memory in ("bridge", "permuted_bridge", "random_word")
        if memory in memories
    ]
    if (plot := bars(rows, x="injected", group="study", y_label="first token correct")) is not None:
        counts = sorted({r["n"] for r in rows})
        yield Figure(
            "Failed questions corrected by an injection",
            [("", plot)],
            f"Each study's own best cell, on the half that it was not chosen on (n = "
            f"{' and '.join(map(str, counts))}); whiskers are exact 95% intervals.",
            width=600,
        )


def _editing(sides: Sides) -> Iterator[Block]:
    panels, counts = [], set()
    repairs = dict.fromkeys(r for s in sides.values() for r in s.summary["editing"]["scores"])
    for repair in repairs:
        rows = [
            row(scores[name]["exact_match_after"], asked=SETS[name][0], study=side)
            for side, study in sides.items()
            for scores in [study.summary["editing"]["scores"].get(repair, {})]
            for name in ("correction", "paraphrase", "specificity")
            if "exact_match_after" in scores.get(name, {})
        ]
        plot = bars(rows, x="asked", group="study", y_label="whole answer correct")
        if plot is not None:
            panels.append((repair, plot))
            counts |= {r["n"] for r in rows}
    if panels:
        yield Figure(
            "Whole answers correct after an edit",
            panels,
            f"Averaged over cases (n = {min(counts)} to {max(counts)}), whiskers are 95% bootstrap "
            "intervals. Correction and paraphrase should rise, unrelated questions stay.",
            width=420,
        )


_COMPARED: dict[str, Callable[[Sides], Iterator[Block]]] = {
    "gap": _gap,
    "lens": _lens,
    "erasure": _erasure,
    "locate": _located,
    "injection": _injection,
    "editing": _editing,
}
