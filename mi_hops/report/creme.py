"""CREME: does an edit of the weights repair the failed questions, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mi_hops.report.parts import (
    FAINT,
    Block,
    Figure,
    Section,
    Table,
    Text,
    bars,
    figures,
    layers,
    left_out,
    left_over,
    number,
    percent,
    row,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mi_hops.reasoning.evaluation import Evaluation
    from mi_hops.study.folder import Study

#: Cases that the page shows one by one.
SHOWN_CASES = 30

_UNREPAIRED = "unrepaired"

#: Statistics of an evaluation that count.
_COUNTS = ("zero_before", "cases_used", "cases_skipped")

#: Set of queries -> its name on the page, and what it asks.
_SETS = {
    "correction": ("correction", "the failed question itself, in the form that was repaired"),
    "paraphrase": ("paraphrase", "its other wordings: other order, question form, paraphrases"),
    "other_order": ("other order", "the part of the paraphrases that is the other template order"),
    "generalisation": ("generalisation", "same first hop, another second hop with another answer"),
    "specificity": ("unrelated", "unrelated two-hop questions that the model answers rightly"),
    "specificity_same_relation": ("unrelated, same relation",
                                  "such questions that ask for the same second relation"),
    "first_hop": ("first hop", "the case's first hop by itself (its answer is the bridge)"),
    "second_hop": ("second hop", "the case's second hop by itself"),
    "neutral": ("neutral", "statements of single facts that no case is made of"),
}  # fmt: skip


#: What the edit is to put right; the other sets are to stay as they are.
_REPAIRED = ("correction", "paraphrase", "other_order")


def creme_section(study: Study) -> Section:
    """Step 6."""
    section = Section(
        "editing",
        "CREME: repairing the weights",
        "Does an edit of the located layers put failed questions right, does it spread, and does it "
        "leave the rest alone?",
    )
    evaluation = study.evaluation()
    if evaluation is None:
        section.blocks.append(left_out(study.skipped("editing")))
        return section
    summary = study.summary["editing"]
    choices, scores = summary["choices"], summary["scores"]
    left = left_over(study.summary["left_out"].get("editing", {}))
    section.blocks.append(
        Text(
            "CREME (arXiv 2402.14328) changes the attention output matrices W_O of some layers so "
            "that, at the last token of the failed question, attention writes what it writes in the "
            "second hop with the bridge spelled out. Each failure gets its own edit, one at a time. "
            "C is the second moment of what the matrix usually reads. The edit as published ignores "
            "it (C = I) and copies the second hop's attention output at the prompt's last token. The "
            "other, this package's default, uses C to avoid the directions that other prompts need, "
            "matches the residual stream after attention, covers the answer's further tokens, holds "
            "both single hops in place, and is made at a chosen strength. Reporting half: "
            f"n = {len(evaluation.case_ids)} failures{left and f'{left} of both halves'}."
        )
    )
    if study.settings["processing"] != "none":
        section.blocks.append(
            Text(
                "The model's weights were processed when it was loaded (norms folded in, centred). "
                "The edits are edits of these weights: they cannot be exported into the checkpoint, "
                "and an edit of the weights as stored is another edit. Load the model with "
                'processing="none" for that.',
                style="note",
            )
        )
    section.blocks += [*_choices(choices), *_accuracies(scores), _accuracy_table(scores)]
    section.blocks.append(_relative(scores))
    section.blocks.append(_asked(evaluation))
    section.blocks += [_statistics(name, sets) for name, sets in scores.items()]
    section.blocks.append(_cases(evaluation))
    return section


def _choices(choices: Mapping[str, Any]) -> list[Block]:
    chosen = list(choices["chosen"].values())
    words = "; ".join(
        f"{c['kind']}: {layers(c['layers'])}, strength {c['strength']:g}" for c in chosen
    )
    n = choices["n_choose"]
    rows = [
        [c["kind"], _span(c["layers"]), f"{c['strength']:g}", _of(c["correction"], n),
         "–" if c["kept"] is None else _of(c["kept"], c["n_kept"]), str(n),
         "chosen" if c in chosen else ""]
        for c in choices["candidates"]
    ]  # fmt: skip
    return [
        Text(
            f"Chosen on the choosing half (n = {n} failures, none of them reported below): {words}. "
            f"The rule. {choices['rule']} Located: {layers(choices['located'])}."
        ),
        Table(
            "All candidates on the choosing half",
            ("edit", "layers", "strength", "first token put right", "unrelated kept", "n", ""),
            rows,
            texts=2,
            fold=True,
            marked=[i for i, c in enumerate(choices["candidates"]) if c in chosen],
            note="Used for choosing only. Brackets: exact 95% intervals in percent; for "
            "unrelated questions over all of them, several per failure.",
        ),
    ]


def _of(share: float, n: int) -> str:
    from mi_hops.result.statistics import proportion_ci

    low, high = proportion_ci(round(share * n), n)
    return percent({"value": share, "low": low, "high": high, "n": n}, n=False)


def _span(numbers: Sequence[int]) -> str:
    return layers(numbers).removeprefix("layers ").removeprefix("layer ")


def _accuracies(scores: Mapping[str, Any]) -> list[Figure]:
    kinds = {
        "first_correct": ("First answer token right", "whose first answer token is the first choice"),
        "exact_match": ("Whole answer right",
                        "for which greedy decoding gives the whole answer and its end"),
    }  # fmt: skip
    found = []
    for score, (title, words) in kinds.items():
        plot = _accuracy_bars(scores, score)
        if plot is None:
            continue
        counts = [s[f"{score}_after"]["n"] for sets in scores.values() for s in sets.values()
                  if f"{score}_after" in s]  # fmt: skip
        found.append(
            Figure(
                f"{title}, before and after the edit",
                [("", plot)],
                f"Share of queries {words}: averaged over the queries of a case, then over n = "
                f"{min(counts)} to {max(counts)} cases (on hover); whiskers are 95% bootstrap "
                "intervals over cases. On correction, paraphrase and other order a good edit rises; "
                "on all other sets it does not fall below the unrepaired model. Generalisation asks "
                "for another answer from the same bridge, so an edit that writes its own answer "
                "everywhere falls there.",
                width=600,
            )
        )
    return found


def _accuracy_bars(scores: Mapping[str, Any], score: str) -> go.Figure | None:
    rows = []
    first = next(iter(scores.values()))
    for name, statistics in first.items():
        if f"{score}_before" in statistics:
            rows.append(row(statistics[f"{score}_before"], set=_name(name), model=_UNREPAIRED))
    for repair, sets in scores.items():
        for name, statistics in sets.items():
            if f"{score}_after" in statistics:
                rows.append(row(statistics[f"{score}_after"], set=_name(name), model=repair))
    plot = bars(rows, x="set", group="model", height=420, most=1.04)
    if plot is not None:  # what a repair is compared with steps back
        plot.update_traces(marker_color=FAINT, selector={"name": _UNREPAIRED})
    return plot


def _accuracy_table(scores: Mapping[str, Any]) -> Table:
    rows = []
    for name in next(iter(scores.values())):
        for repair, sets in scores.items():
            mine = sets.get(name, {})
            if "first_correct_after" not in mine:
                continue
            ends = ("first_correct_before", "first_correct_after", "exact_match_before",
                    "exact_match_after")  # fmt: skip
            kept = "–" if name in _REPAIRED else percent(mine["exact_match_ratio"], n=False)
            rows.append([_name(name), repair, *(percent(mine[e], n=False) for e in ends), kept,
                         str(mine["first_correct_after"]["n"])])  # fmt: skip
    return Table(
        "The accuracies in numbers",
        ("asked", "edit", "first token, before", "after", "whole answer, before", "after",
         "kept (after / before)", "n cases"),
        rows, texts=2, fold=True,
        note="Brackets: 95% bootstrap intervals over cases, in percent. Kept: accuracy on whole "
        "answers after, as a share of that before (not of what was to be repaired). A bootstrap "
        "interval of 0% or 100% has no width.",
    )  # fmt: skip


def _relative(scores: Mapping[str, Any]) -> Table:
    statistics = ("mean_before", "mean_after", "share_improved", "median_relative_change",
                  "mean_relative_change", "mean_log_change")  # fmt: skip
    rows = [
        [_name(name), repair,
         *((percent if s == "share_improved" else _plain)(sets[name][s], n=False)
           for s in statistics),
         str(sets[name]["mean_before"]["n"])]
        for name in ("correction", "paraphrase", "generalisation", "specificity")
        for repair, sets in scores.items()
        if name in sets and all(s in sets[name] for s in statistics)
    ]  # fmt: skip
    return Table(
        "The CREME paper's score, and what stands behind its mean",
        ("asked", "edit", "score before", "after", "share raised", "relative change, median",
         "relative change, mean", "mean ln(after / before)", "n cases"),
        rows, texts=2, fold=True,
        note="The score is the mean probability over the answer's tokens. Its mean relative change "
        "is the paper's number; a few tiny probabilities before the edit rule it, so the median, "
        "the share raised and the mean logarithm stand beside it. Brackets: 95% bootstrap intervals.",
    )  # fmt: skip


def _plain(estimate: Mapping[str, Any], *, n: bool) -> str:
    return number(estimate, n=n, signed=False)


def _asked(evaluation: Evaluation) -> Table:
    counts = {}
    for line in evaluation.describe().splitlines()[1:]:
        name, _, text = line.partition(": ")
        counts[name] = text
    rows = [
        [label, words, counts[name]] for name, (label, words) in _SETS.items() if name in counts
    ]
    rows += [[name, "", text] for name, text in counts.items() if name not in _SETS]
    return Table("What each set asks, and of how many cases", ("asked", "what it is", "n"), rows,
                 texts=3, fold=True)  # fmt: skip


def _statistics(repair: str, sets: Mapping[str, Any]) -> Table:
    rows = [
        [_name(name), statistic.replace("_", " "),
         f"{estimate['value']:.0f}" if statistic in _COUNTS else figures(estimate["value"]),
         figures(estimate["low"]), figures(estimate["high"]), str(estimate["n"])]
        for name, statistics in sets.items()
        for statistic, estimate in statistics.items()
    ]  # fmt: skip
    return Table(
        f"All statistics: {repair}",
        ("asked", "statistic", "value", "95% from", "to", "n cases"),
        rows, texts=2, fold=True,
        note="Every name is explained in the documentation of aggregate and Evaluation.table; "
        "probabilities as fractions, log-probabilities in nats.",
    )  # fmt: skip


def _cases(evaluation: Evaluation) -> Table:
    asked = evaluation.frame[evaluation.frame["set"] == "correction"]
    repairs = list(dict.fromkeys(asked["repair"]))
    ids = list(dict.fromkeys(asked["case"]))[:SHOWN_CASES]
    rows = []
    for case in ids:
        mine = asked[asked["case"] == case].set_index("repair")
        one = mine.iloc[0]
        rows.append([one["prompt"], one["answer"], _said(one, "before"),
                     *(_said(mine.loc[r], "after") for r in repairs)])  # fmt: skip
    return Table(
        f"Case by case: the first {len(ids)} of {asked['case'].nunique()}",
        ("prompt", "answer", "said before", *(f"said after, {r}" for r in repairs)),
        rows, texts=3 + len(repairs), fold=True,
        note="Greedy answers up to their end. ✓ the answer or an alias of it.",
    )  # fmt: skip


def _said(record: pd.Series, when: str) -> str:
    text = record.get(f"said_{when}")
    if text is None or text != text:
        return "–"
    return f"{text} ✓" if record[f"generation_correct_{when}"] == 1 else str(text)


def _name(name: str) -> str:
    return _SETS[name][0] if name in _SETS else name
