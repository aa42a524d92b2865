"""CREME: does an edit of the weights repair the failed questions, and what does it cost?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from mi_hops.cases import Case, usable
from mi_hops.editing import PAPER, CremeRepair, Moments, second_moments
from mi_hops.editing.plans import CremeSettings, plan_request
from mi_hops.editing.request import Request
from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import CONTEXTS
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.locate import located_layers
from mi_hops.reasoning.queries import QuerySets
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.result.result import Result
from mi_hops.study.choose import (
    CHOICE_RULE,
    IDENTITY,
    MOST_STARTS,
    STRENGTHS,
    choose_edit,
    layer_spans,
)
from mi_hops.study.context import Run, Skip
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import (
    Headline,
    estimate,
    figures,
    layers,
    left_out,
    number,
    percent,
    share,
    share_headline,
    span,
)
from mi_hops.study.parts import FAINT, Block, Figure, List, Table, Text, bars, row
from mi_hops.study.step import ANSWER, Asked, Step, Work
from mi_hops.text.corpus import fact_texts

#: Cases reported for each case that is used for choosing, and what one of these costs: all
#: candidates, on two sets of queries and without generation, against two edits on all sets.
_CHOOSING, _CHOOSING_COST = 4, 6.0

#: Cases that the page shows one by one.
SHOWN_CASES = 30

_UNREPAIRED = "unrepaired"
#: Said where C = I first stands on the page.
_WITHOUT_C = (
    " (C is the covariance of what the edited weights read. C = I leaves it out, as the published code "
    "does, and then nothing protects what other prompts need of these weights.)"
)

#: Statistics of an evaluation that count.
_COUNTS = ("zero_before", "cases_used", "cases_skipped")

#: Set of queries -> its name on the page, and what it asks.
SETS = {
    "correction": ("correction", "the failed question itself, in the form that was repaired"),
    "paraphrase": ("paraphrase", "its other wordings: other order, question form, paraphrases"),
    "other_order": ("other order", "the part of the paraphrases that is the other template order"),
    "generalisation": ("generalisation", "same first hop, another second hop with another answer"),
    "specificity": ("unrelated", "unrelated two-hop questions that the model answers correctly"),
    "specificity_same_relation": (
        "unrelated, same relation",
        "such questions that ask for the same second relation",
    ),
    "first_hop": ("first hop", "the case's first hop by itself (its answer is the bridge)"),
    "second_hop": ("second hop", "the case's second hop by itself"),
    "neutral": ("neutral", "statements of single facts that no case is made of"),
}

#: What the edit is to correct; the other sets are to stay as they are.
_REPAIRED = ("correction", "paraphrase", "other_order")

#: Accuracy of an evaluation -> title of its figure, and what is counted.
_ACCURACIES = {
    "first_correct": ("First answer token correct", "whose first answer token is the first choice"),
    "exact_match": (
        "Whole answer correct",
        "for which greedy decoding gives the whole answer and its end",
    ),
}


class Editing(Step):
    """CREME as published and with C estimated, chosen on one half and scored on the other."""

    name, short, share = "editing", "CREME", 0.2
    title = "CREME: repairing the weights"
    question = (
        "Does an edit of the located layers correct failed questions, does it spread, and does it "
        "leave the rest alone?"
    )
    kind = Evaluation
    files = ("choices.json",)

    def run(self, run: Run) -> Evaluation:
        """Choose layers and strength, then score both edits."""
        (choose, not_choose), (report, not_report) = (_editable(run, half) for half in run.halves)
        moments, corpus = _moments(run)

        def trial(few: list[TwoHopFact]) -> Evaluation:
            middle = layer_spans([], run.model.cfg.n_layers)[0]
            repairs = [_repair(run, k, k, middle, 1.0, moments) for k in STRENGTHS]
            return evaluate(run.model, repairs, _queries(run, few, corpus), few)

        most = run.settings.size.edits
        n = run.affordable(self, report, most, trial, times=1 + _CHOOSING_COST / _CHOOSING)
        choosing = run.draw(choose, max(2, n // _CHOOSING), "edits")
        choices = _choose(run, choosing, moments, corpus)
        choices["left_out"] = not_choose + not_report
        cases = run.draw(report, n, "edits")
        queries = _queries(run, cases, corpus)
        repairs = [
            _repair(run, name, name, choice["layers"], choice["strength"], moments)
            for name, choice in choices["chosen"].items()
        ]
        run.study.write("choices.json", json.dumps(choices, indent=1) + "\n")
        seed, progress = run.settings.seed, run.progress
        return evaluate(run.model, repairs, queries, cases, seed=seed, progress=progress)

    def work(self, asked: Asked) -> Work:
        """Making all candidates and scoring them on two sets; then both edits on all sets."""
        size = asked.settings.size
        edits, draws = asked.most(size.edits), size.draws
        tried = edits // _CHOOSING * MOST_STARTS * sum(map(len, STRENGTHS.values()))
        made = 2 * len(CONTEXTS) * (tried + edits * len(STRENGTHS))
        scored = edits * (1 + len(STRENGTHS)) * (len(SETS) + 4 * draws)
        rows = made + tried * (1 + draws) + 2 * scored
        return Work(rows, rows * asked.question + scored * ANSWER)

    def summarise(self, result: Evaluation, study: Folder) -> dict[str, Any]:
        """What was chosen, and every statistic of each repair and set."""
        scores: dict[str, Any] = {}
        for (repair, name, statistic), record in result.table().iterrows():
            ends = (record[key] for key in ("value", "lower", "upper", "n_cases"))
            scores.setdefault(repair, {}).setdefault(name, {})[statistic] = estimate(*ends)
        return {"choices": study.choices, "scores": scores}

    def left_out(self, result: Evaluation, study: Folder) -> Sequence[tuple[str, str]]:
        """Failures that cannot be edited; those of the evaluation are of queries, not of facts."""
        return [(who, why) for who, why in study.choices["left_out"]]

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """What each edit corrects, and what it costs."""
        for repair, sets in entry["scores"].items():
            wanted = {
                "first token corrected": ("correction", "first_correct_after"),
                "whole answer corrected": ("correction", "exact_match_after"),
                "unrelated accuracy kept": ("specificity", "exact_match_ratio"),
            }
            found = {
                label: sets[name][statistic]
                for label, (name, statistic) in wanted.items()
                if sets.get(name, {}).get(statistic, {"value": None})["value"] is not None
            }
            chosen = entry["choices"]["chosen"][repair]
            where = f"{layers(chosen['layers'])} at strength {chosen['strength']:g}"
            first, whole, kept = (found.get(label) for label in wanted)
            text = f"of failed questions get the correct first token by {repair} on {where}"
            if whole is not None:
                text += f"; the whole answer: {_words(whole)}"
            if kept is not None:
                text += f"; unrelated questions keep {_words(kept)} of their accuracy"
            for label, given in found.items():
                says = f"{text}.{_WITHOUT_C * (repair == IDENTITY)}" if given is first else ""
                yield share_headline(f"{repair} ({where}): {label}", given, says)

    def section(self, result: Evaluation, study: Folder) -> Iterator[Block]:
        """What was chosen, the accuracies before and after, all statistics, and single cases."""
        summary = study.summary["editing"]
        choices, scores = summary["choices"], summary["scores"]
        left = left_out(study.summary["left_out"].get("editing", {}))
        yield Text(
            "CREME (arXiv 2402.14328) changes the attention output matrices W_O of some layers so "
            "that, at the last token of the failed question, attention writes what it writes in the "
            "second hop with the bridge spelled out. Each failure gets its own edit, one at a time. "
            "C is the second moment of what the matrix usually reads. The edit as published ignores "
            "it (C = I) and copies the second hop's attention output at the prompt's last token. The "
            "other, this package's default, uses C to avoid the directions that other prompts need, "
            "matches the residual stream after attention, covers the answer's further tokens, holds "
            "both single hops in place, and is made at a chosen strength. Reporting half: "
            f"n = {len(result.case_ids)} failures{left and f'{left} of both halves'}."
        )
        if study.settings["processing"] != "none":
            text = (
                "The model's weights were processed when it was loaded (norms folded in, centred). "
                "The edits are edits of these weights: they cannot be exported into the checkpoint, "
                "and an edit of the weights as stored is another edit. Load the model with "
                'processing="none" for that.'
            )
            yield Text(text, style="note")
        yield from _choices(choices)
        yield from _accuracies(scores)
        yield _accuracy_table(scores)
        yield _relative(scores)
        yield _asked(result)
        yield from (_statistics(name, sets) for name, sets in scores.items())
        yield _cases(result)


# -- running --------------------------------------------------------------------------------------


def _editable(
    run: Run, facts: Sequence[TwoHopFact]
) -> tuple[list[TwoHopFact], list[tuple[str, str]]]:
    """Facts that can be edited, and (id, reason) of the others."""
    # The published edit needs nothing more, and the other templates no longer a context.
    how = CremeSettings(form=run.form, templates=(max(CONTEXTS, key=len),))

    def planned(case: Case) -> TwoHopFact:
        plan_request(run.model, Request.from_fact(case.fact, how.form, how.keep), how)
        return case.fact

    return usable(run.model, facts, planned, purpose="an edit on one half", form=run.form)


def _moments(run: Run) -> tuple[Moments, list[TwoHopFact]]:
    """C, from facts that no score is taken on: trained ones, else a third of the passed."""
    corpus = [f for f in run.facts if f.split == "train"]
    if not corpus:
        passed = run.gap.passed
        corpus = run.draw(passed, max(1, len(passed) // 3), "corpus")
    if not corpus:
        raise Skip("no two-hop question is answered correctly, so there is no text to estimate C")
    return second_moments(run.model, list(dict.fromkeys(fact_texts(corpus)))), corpus


def _repair(
    run: Run, name: str, kind: str, where: Sequence[int], strength: float, moments: Moments
) -> CremeRepair:
    how = PAPER if kind == IDENTITY else {"covariance": moments, "strength": strength}
    # The weights are edited as they were loaded; the report says where they are processed ones.
    return CremeRepair(name=name, form=run.form, layers=tuple(where), **how)


def _queries(run: Run, cases: list[TwoHopFact], corpus: list[TwoHopFact]) -> QuerySets:
    """What the cases are asked; nothing that C was estimated from."""
    inside = {f.id for f in corpus}
    known = Known.of(run.gap, without=inside)
    return build_sets(
        run.model,
        cases,
        known=known,
        pool=[f for f in run.facts if f.id not in inside] or run.facts,
        form=run.form,
        per_case=run.settings.size.draws,
        seed=run.settings.seed,
    )


def _choose(
    run: Run, cases: list[TwoHopFact], moments: Moments, corpus: list[TwoHopFact]
) -> dict[str, Any]:
    """Layers of each kind of edit, by `choose_edit` on the choosing half."""
    path = run.study.path("locate")
    located = located_layers(Result.load(path)) if path.exists() else []
    spans = layer_spans(located, run.model.cfg.n_layers)
    queries = _queries(run, cases, corpus).of("correction", "specificity")
    repairs = {
        (kind, where, strength): _repair(
            run, f"{kind}, {where}, {strength:g}", kind, where, strength, moments
        )
        for kind, strengths in STRENGTHS.items()
        for where in spans
        for strength in strengths
    }
    options: dict[str, Any] = {"generate": False, "progress": run.progress}
    frame = evaluate(run.model, list(repairs.values()), queries, cases, **options).frame
    candidates = []
    for (kind, where, strength), repair in repairs.items():
        part = frame[frame["repair"] == repair.name]
        first = part[part["set"] == "correction"]["first_correct_after"].mean()
        unrelated = part[part["set"] == "specificity"]["exact_match_after"]
        candidates.append(
            {
                "kind": kind,
                "layers": list(where),
                "strength": strength,
                "correction": float(first),
                "kept": float(unrelated.mean()) if len(unrelated) else None,
                "n_kept": len(unrelated),
            }
        )
    chosen = {kind: choose_edit([c for c in candidates if c["kind"] == kind]) for kind in STRENGTHS}
    rule = {"rule": CHOICE_RULE, "n_choose": len(cases), "located": located}
    return {**rule, "candidates": candidates, "chosen": chosen}


# -- showing --------------------------------------------------------------------------------------


def _choices(choices: Mapping[str, Any]) -> Iterator[Block]:
    chosen = list(choices["chosen"].values())
    words = "; ".join(
        f"{c['kind']}: {layers(c['layers'])}, strength {c['strength']:g}" for c in chosen
    )
    n = choices["n_choose"]
    yield Text(
        f"Chosen on the choosing half (n = {n} failures, none of them reported below): {words}. "
        f"Located: {layers(choices['located'])}."
    )
    yield List("The rule of the choice:", choices["rule"])
    rows = []
    for c in choices["candidates"]:
        kept = "–" if c["kept"] is None else _of(c["kept"], c["n_kept"])
        where = [c["kind"], span(c["layers"]), f"{c['strength']:g}"]
        rows.append([*where, _of(c["correction"], n), kept, str(n), "chosen" * (c in chosen)])
    yield Table(
        "All candidates on the choosing half",
        ("edit", "layers", "strength", "first token corrected", "unrelated kept", "n", ""),
        rows,
        texts=2,
        fold=True,
        marked=[i for i, c in enumerate(choices["candidates"]) if c in chosen],
        note="Used for choosing only. Brackets: exact 95% intervals in percent; for "
        "unrelated questions over all of them, several per failure.",
    )


def _of(part: float, n: int) -> str:
    return percent(share(round(part * n), n), n=False)


def _accuracies(scores: Mapping[str, Any]) -> Iterator[Figure]:
    for score, (title, words) in _ACCURACIES.items():
        before, after = f"{score}_before", f"{score}_after"
        first = next(iter(scores.values()))
        rows = [
            row(statistics[before], set=_name(name), model=_UNREPAIRED)
            for name, statistics in first.items()
            if before in statistics
        ]
        rows += [
            row(statistics[after], set=_name(name), model=repair)
            for repair, sets in scores.items()
            for name, statistics in sets.items()
            if after in statistics
        ]
        plot = bars(rows, x="set", group="model", height=420, most=1.04)
        if plot is None:
            continue
        # What a repair is compared with steps back.
        plot.update_traces(marker_color=FAINT, selector={"name": _UNREPAIRED})
        counts = [r["n"] for r in rows if r["model"] != _UNREPAIRED]
        yield Figure(
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


def _accuracy_table(scores: Mapping[str, Any]) -> Table:
    ends = [f"{score}_{when}" for score in _ACCURACIES for when in ("before", "after")]
    rows = []
    for name in next(iter(scores.values())):
        for repair, sets in scores.items():
            mine = sets.get(name, {})
            if "first_correct_after" not in mine:
                continue
            kept = "–" if name in _REPAIRED else percent(mine["exact_match_ratio"], n=False)
            shares = [percent(mine[end], n=False) for end in ends]
            n = str(mine["first_correct_after"]["n"])
            rows.append([_name(name), repair, *shares, kept, n])
    columns = ["asked", "edit", "first token, before", "after", "whole answer, before", "after"]
    return Table(
        "The accuracies in numbers",
        [*columns, "kept (after / before)", "n cases"],
        rows,
        texts=2,
        fold=True,
        note="Brackets: 95% bootstrap intervals over cases, in percent. Kept: accuracy on whole "
        "answers after, as a share of that before (not of what was to be repaired). A bootstrap "
        "interval of 0% or 100% has no width.",
    )


def _relative(scores: Mapping[str, Any]) -> Table:
    plain = ("median_relative_change", "mean_relative_change", "mean_log_change")
    rows = []
    for name in ("correction", "paraphrase", "generalisation", "specificity"):
        for repair, sets in scores.items():
            mine = sets.get(name, {})
            if "mean_before" not in mine:
                continue
            numbers = {k: number(e, n=False, signed=False) for k, e in mine.items()}
            numbers["share_improved"] = percent(mine["share_improved"], n=False)
            shown = ("mean_before", "mean_after", "share_improved", *plain)
            cells = [numbers.get(k, "–") for k in shown]
            rows.append([_name(name), repair, *cells, str(mine["mean_before"]["n"])])
    columns = ["asked", "edit", "score before", "after", "share raised", "relative change, median"]
    return Table(
        "The CREME paper's score, and what lies behind its mean",
        [*columns, "relative change, mean", "mean ln(after / before)", "n cases"],
        rows,
        texts=2,
        fold=True,
        note="The score is the mean probability over the answer's tokens. Its mean relative change "
        "is the paper's number; a few tiny probabilities before the edit dominate it, so the median, "
        "the share raised and the mean logarithm stand beside it. Brackets: 95% bootstrap intervals; the "
        "mean of ratios has none.",
    )


def _asked(evaluation: Evaluation) -> Table:
    rows = [
        [*SETS.get(name, (name, "")), count.describe()]
        for name, count in evaluation.counts().items()
    ]
    title = "What each set asks, and of how many cases"
    return Table(title, ("asked", "what it is", "n"), rows, texts=3, fold=True)


def _statistics(repair: str, sets: Mapping[str, Any]) -> Table:
    rows = []
    for name, statistics in sets.items():
        for statistic, given in statistics.items():
            value = figures(given["value"])
            if statistic in _COUNTS:
                value = f"{given['value']:.0f}"
            ends = [figures(given["low"]), figures(given["high"]), str(given["n"])]
            rows.append([_name(name), statistic.replace("_", " "), value, *ends])
    return Table(
        f"All statistics: {repair}",
        ("asked", "statistic", "value", "95% from", "to", "n cases"),
        rows,
        texts=2,
        fold=True,
        note="Every name is explained in the documentation of aggregate and Evaluation.table; "
        "probabilities as fractions, log-probabilities in nats.",
    )


def _cases(evaluation: Evaluation) -> Table:
    asked = evaluation.frame[evaluation.frame["set"] == "correction"]
    repairs = list(dict.fromkeys(asked["repair"]))
    ids = list(dict.fromkeys(asked["case"]))[:SHOWN_CASES]
    rows = []
    for case in ids:
        mine = asked[asked["case"] == case].set_index("repair")
        one = mine.iloc[0]
        after = [_said(mine.loc[repair], "after") for repair in repairs]
        rows.append([one["prompt"], one["answer"], _said(one, "before"), *after])
    return Table(
        f"Case by case: the first {len(ids)} of {asked['case'].nunique()}",
        ("prompt", "answer", "said before", *(f"said after, {r}" for r in repairs)),
        rows,
        texts=3 + len(repairs),
        fold=True,
        note="Greedy answers up to their end. ✓ the answer or an alias of it.",
    )


def _said(record: pd.Series, when: str) -> str:
    text = record.get(f"said_{when}")
    if text is None or text != text:
        return "–"
    return f"{text} ✓" if record[f"generation_correct_{when}"] == 1 else str(text)


def _words(given: Mapping[str, Any]) -> str:
    return f"{percent(given, n=False)} (n = {given['n']})"


def _name(name: str) -> str:
    return SETS[name][0] if name in SETS else name
