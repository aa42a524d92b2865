"""What the model answers: the compositionality gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import pandas as pd

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import describe_reasons
from mi_hops.reasoning.gap import HOPS, Gap, Score, find_gap, hop_prompt
from mi_hops.study.context import Run
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, left_out, percent, share, share_headline, share_of
from mi_hops.study.parts import Block, Figure, Table, Text, bars, row
from mi_hops.study.step import ANSWER, Asked, Step, Work

_YES = {True: "yes", False: "no"}
#: Questions that the section opens with.
SHOWN_QUESTIONS = 10

_WORDS = {"answer": "whole answer", "first_token": "first token"}
_COUNTS = {
    "answer": "It counts as answered when the whole answer and its end come out (aliases allowed).",
    "first_token": "It counts as answered when the answer's first token comes out.",
}
_ASKED = {"first": "first hop alone", "second": "second hop alone", "two_hop": "two-hop question"}

#: What the splits of Hopland mean; other facts have splits of their own, shown as they are named.
_SPLITS = {
    "train": "the question itself was trained on",
    "seen_parts": "held out, but both facts took part in other trained compositions",
    "first_unseen": "held out, and the first fact never took part in a trained composition",
    "second_unseen": "held out, and the second fact never took part in a trained composition",
}


class GapStep(Step):
    """Which two-hop questions fail although both hops are known, in each form that all facts have."""

    name, short, share = "gap", "The compositionality gap", 0.28
    title = "The compositionality gap"
    question = (
        "Which two-hop questions does the model fail although it answers both hops by themselves?"
    )
    kind = Gap

    def run(self, run: Run) -> Gap:
        """Ask every fact in every form."""

        def ask(facts: list[TwoHopFact]) -> Gap:
            return find_gap(run.model, facts, form=run.forms, score=run.settings.score)

        n = run.affordable(self, run.facts, len(run.facts), ask, few=64)
        return ask(run.draw(run.facts, n, "gap"))

    def work(self, asked: Asked) -> Work:
        """Every different prompt, answered."""
        return Work(asked.prompts, asked.prompts * (asked.question + ANSWER))

    def summarise(self, result: Gap, study: Folder) -> dict[str, Any]:
        """Shares known and answered, by form and split, and the table of the main form."""
        frame = result.frame
        known = frame["first"] & frame["second"]
        failed = frame[known & ~frame["two_hop"]]
        table = [
            {**record, "share": share(record["n"], len(frame))}
            for record in result.table().to_dict("records")
        ]
        return {
            "forms": {form: _of_form(result.in_form(form)) for form in result.forms},
            "table": table,
            "failed": len(result.failed),
            "passed": len(result.passed),
            "failed_saying_bridge": share_of(failed["says_bridge"]),
            "failed_but_other_form": share_of(failed["other_form"]),
            "score": result.score,
            "by_score": {
                score: _shares(result.scored_by(score).frame) for score in get_args(Score)
            },
            "known_in_any_form": share_of(
                result[result.score].drop_sel(asked="two_hop").max("form").min("asked").values
            ),
            "by_relations": _by_relations(result),
            "skipped_facts": len(result.skipped),
        }

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """The gap in the main form, and what the failures answer."""
        form, main = next(iter(entry["forms"].items()))
        known, asked = main["gap"]["n"], main["two_hop"]["n"]
        reasons = describe_reasons(left_out)
        for hop in ("first", "second"):
            yield share_headline(f"{hop} hop known", main[hop])
        name = f"gap: failed although both hops are known ({form})"
        if known:
            text = f"of the two-hop questions with both hops known fail ({form} form)."
            yield share_headline(name, main["gap"], text)
            if entry["failed"]:
                text = "of these failures answer with the bridge: the model stops at the first hop."
                yield share_headline("", entry["failed_saying_bridge"], text)
        elif asked:
            text = (
                "The model knows both hops of none of these facts, so nothing can be said about how "
                "it combines them."
            )
            yield Headline(name, "no case")
            yield Headline("", f"0 of {asked}", f"n = {asked} facts", text)
        else:
            n = sum(left_out.values())
            text = f"None of these facts can be asked about both hops ({reasons})."
            yield Headline(name, "no case")
            yield Headline("", "none asked", f"n = {n} facts", text)
        if reasons:
            yield Headline("facts that cannot be asked", reasons)

    def section(self, result: Gap, study: Folder) -> Iterator[Block]:
        """The shares answered, by split, by hop, and crossed."""
        summary = study.summary["gap"]
        form, main = next(iter(summary["forms"].items()))
        known = main["gap"]["n"]
        fails = (
            f" and fails {percent(main['gap'], n=False)} of their two-hop questions"
            if known
            else ""
        )
        left = left_out(study.summary["left_out"].get("gap", {}))
        yield Text(
            f"Every question is asked greedily over the whole vocabulary. {_COUNTS[summary['score']]} A "
            "hop is known when its own "
            f"question is answered. Of n = {main['two_hop']['n']} facts{left}, the model knows both "
            f"hops of {known} in the main form ({form}){fails}. Later steps use the main form."
        )
        yield from _examples(result)
        if not main["two_hop"]["n"]:
            text = (
                "None of these facts can be asked about both hops (a fact needs prompts of its own for "
                "the first and for the second hop), so there is no gap to study: the steps below have "
                "nothing to work on."
            )
            yield Text(text, style="note")
        elif not known:
            yield Text(_none_known(summary), style="note")
        yield from _by_split(summary["forms"], summary["score"])
        yield _hops(summary["forms"], summary["score"])
        yield _table(summary, form)
        yield _scores(summary)
        if len(summary["by_relations"]) > 1:
            yield _relations(summary["by_relations"])


def _examples(gap: Gap) -> Iterator[Table]:
    """Questions with what the model said: failures first, then what it knows less of."""
    frame = gap.frame
    if not len(frame):
        return
    known = frame["first"].astype(int) + frame["second"].astype(int)
    # Failures with both hops known alternate with answered ones; then one hop known, then none.
    order = frame.assign(known=known, turn=frame.groupby([known, "two_hop"]).cumcount())
    order = order.sort_values(["known", "turn", "two_hop"], ascending=[False, True, True])
    lead = _lead(gap)
    rows = []
    for i in order.index[:SHOWN_QUESTIONS]:
        fact, asked = gap.facts[i], frame.loc[i]
        said = (asked["said_first"], asked["said_second"], asked["said"])
        correct = [bool(asked[hop]) for hop in HOPS]
        cells = [
            f"{prompt} “{text}”{'' if text else ' (nothing)'} {'✓' if ok else f'→ {want}'}"
            for (prompt, want), text, ok in zip(_asked(fact, gap, lead), said, correct, strict=True)
        ]
        other = "–" if len(gap.forms) < 2 else _YES[bool(asked["other_form"])]
        rows.append([*cells, f"{asked['rank']:,.0f}", f"{asked['prob']:.3f}", other])
    after = (
        f" Before each prompt stand worked examples, here those of the first question: {lead}"
        if lead
        else ""
    )
    columns = ("first hop", "second hop", "two-hop question", "answer's rank", "its probability")
    yield Table(
        f"{len(rows)} of the questions, and what the model says ({gap.forms[0]} form)",
        (*columns, "answered in another form"),
        rows,
        texts=3,
        note="Prompt, then in quotation marks what was said. ✓ correct; → what would have been. Rank "
        "and probability are of the first token of the two-hop question's answer. Questions with "
        f"both hops known come first, failed and answered in turn.{after}",
    )


def _asked(fact: TwoHopFact, gap: Gap, lead: str) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of the three questions, without the lead; of several hops, all of them."""

    def own(prompt: str) -> str:
        return prompt.rpartition("\n")[2] if lead else prompt

    for part in (fact.hops[: fact.at_bridge], fact.hops[fact.at_bridge :]):
        prompts = (own(hop_prompt(hop.prompts, gap.form)) for hop in part)
        yield " / ".join(prompts), " / ".join(hop.object for hop in part)
    yield own(fact.prompt(gap.form)), fact.answer


def _lead(gap: Gap) -> str:
    """The worked examples before the first fact's prompts."""
    return " / ".join(gap.facts[0].prompt(gap.form).split("\n")[:-1])


def _none_known(summary: Mapping[str, Any]) -> str:
    form, main = next(iter(summary["forms"].items()))
    other = "first_token" if summary["score"] == "answer" else "answer"
    hops = ", ".join(f"{hop} hop {percent(main[hop], n=False)}" for hop in ("first", "second"))
    again = summary["by_score"][other]["both_known"]
    ways = [
        "worked examples before each question (shots=3, --shots 3)",
        "other wordings, that end where the model would name the thing itself",
        "facts about better known things",
    ]
    if again["value"]:
        words = "first token" if other == "first_token" else "whole answer"
        ways.insert(0, f'score="{other}" (by the {words} both hops of {percent(again)} are known)')
    return (
        f"The model knows both hops of none of these facts (answered in the {form} form: {hops}), so "
        "there is no gap to study: the steps below have nothing to work on. What was asked and said "
        f"stands above. What may help: {'; '.join(ways)}."
    )


def _shares(frame: pd.DataFrame) -> dict[str, Any]:
    """Of the rows of a gap's frame: each question answered, both hops known, failed of these."""
    known = frame["first"] & frame["second"]
    return {
        **{hop: share_of(frame[hop]) for hop in HOPS},
        "both_known": share_of(known),
        "gap": share_of(~frame["two_hop"][known]),
    }


def _by_relations(gap: Gap) -> list[dict[str, Any]]:
    """By pair of relations: shares known and answered, most facts first."""
    frame = gap.frame.assign(pair=[(f.relation1, f.relation2) for f in gap.facts])
    found = []
    for (first, second), part in frame.groupby("pair", sort=False):
        found.append({"first_relation": first, "second_relation": second, **_shares(part)})
    return sorted(found, key=lambda r: -r["two_hop"]["n"])


def _scores(summary: Mapping[str, Any]) -> Table:
    rows = [
        [
            words,
            *(
                percent(summary["by_score"][score][k], n=False)
                for k in (*HOPS, "both_known", "gap")
            ),
            str(summary["by_score"][score]["gap"]["n"]),
        ]
        for score, words in (("answer", "whole answer and its end"), ("first_token", "first token"))
    ]
    any_form = percent(summary["known_in_any_form"])
    other = summary["failed_but_other_form"]
    more = f" Of the failures, {percent(other)} are answered in another form." if other["n"] else ""
    columns = ("counted by", "first hop", "second hop", "two-hop question", "both hops known")
    return Table(
        "By the whole answer and by its first token",
        (*columns, "gap: failed of these", "n known"),
        rows,
        fold=True,
        note=f"The main form. This study counts by the {_WORDS[summary['score']]}. Both hops known in "
        f"any form asked: {any_form}.{more} Brackets: exact 95% intervals in percent.",
    )


def _relations(relations: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            r["first_relation"],
            r["second_relation"],
            *(percent(r[k], n=False) for k in (*HOPS, "gap")),
            str(r["gap"]["n"]),
            str(r["two_hop"]["n"]),
        ]
        for r in relations
    ]
    columns = ("first relation", "second relation", "first hop", "second hop", "two-hop question")
    return Table(
        "By pair of relations",
        (*columns, "gap: failed of known", "n known", "n"),
        rows,
        texts=2,
        fold=True,
        note="The main form; brackets: exact 95% intervals in percent. The gap is of the facts with "
        "both hops known.",
    )


def _of_form(gap: Gap) -> dict[str, Any]:
    frame = gap.frame
    known = frame["first"] & frame["second"]
    splits = {}
    for split in dict.fromkeys(frame["split"]):
        inside = frame["split"] == split
        part = frame[known & inside]
        splits[split or "all"] = {
            "known": share_of(known[inside]),
            "two_hop_of_known": share_of(part["answer"]),
            "first_token_of_known": share_of(part["first_token"]),
        }
    return {**_shares(frame), "by_split": splits}


def _by_split(forms: Mapping[str, Any], score: Score) -> Iterator[Figure | Table]:
    rows, cells = [], []
    splits: dict[str, None] = {}
    for form, entry in forms.items():
        for split, scores in entry["by_split"].items():
            splits[split] = None
            name, known, whole = _split(split), scores["known"], scores["two_hop_of_known"]
            first = scores["first_token_of_known"]
            # The bars are of what the study counts: only then is the rest to 100% its gap.
            counted = first if score == "first_token" else whole
            rows.append(row(counted, split=name, form=form))
            shares = [percent(x, n=False) for x in (known, first, whole)]
            cells.append([name, form, shares[0], str(known["n"]), *shares[1:], str(whole["n"])])
    plot = bars(rows, x="split", group="form")
    if plot is not None:
        meaning = "; ".join(f"{_split(s)}: {_SPLITS[s]}" for s in splits if s in _SPLITS)
        counts = [r["n"] for r in rows]
        caption = (
            f"Share of two-hop questions answered correctly ({_WORDS[score]}) among facts whose two "
            "hops the model both knows, by split of the facts and form of the question; "
            f"n = {min(counts)} to {max(counts)} facts per bar (on hover), whiskers are exact 95% "
            "intervals. What a bar lacks to 100% is the gap."
        )
        if meaning:
            caption += f" Splits: {meaning}."
        title = "Two-hop questions answered, both hops known"
        yield Figure(title, [("", plot)], caption, width=600)
    columns = ["split", "form", "both hops known", "n facts", "first token correct"]
    yield Table(
        "The numbers, by split and form",
        [*columns, "whole answer correct", "n known"],
        cells,
        texts=2,
        fold=True,
        note="The last three columns are of the facts with both hops known. Brackets: exact 95% "
        "intervals in percent.",
    )


def _hops(forms: Mapping[str, Any], score: Score) -> Figure | Text:
    rows = [
        row(entry[key], asked=words, form=form)
        for form, entry in forms.items()
        for key, words in _ASKED.items()
    ]
    plot = bars(rows, x="asked", group="form", height=320)
    if plot is None:
        return Text("No question could be asked.", style="note")
    return Figure(
        "The hops by themselves",
        [("", plot)],
        f"Share of all n = {rows[0]['n']} facts whose question is answered correctly "
        f"({_WORDS[score]}), for each hop alone and for the two-hop question, by form; whiskers are "
        "exact 95% intervals. If the hops were independent and combining them cost nothing, the third group "
        "would be near the product of the first two.",
        width=600,
    )


def _table(summary: Mapping[str, Any], form: str) -> Table:
    records = summary["table"]
    total = sum(r["n"] for r in records)
    bridge = summary["failed_saying_bridge"]
    answers = f"; {percent(bridge)} of these failures answer with the bridge" if bridge["n"] else ""
    rows = []
    for r in records:
        answered = [_YES[bool(r[hop])] for hop in HOPS]
        rows.append([*answered, str(r["n"]), percent(r["share"], n=False), str(r["says_bridge"])])
    gap = [i for i, r in enumerate(records) if r["first"] and r["second"] and not r["two_hop"]]
    columns = ["first hop", "second hop", "two-hop question", "n", "share"]
    return Table(
        f"Who knows what ({form} form)",
        [*columns, "answers with the bridge"],
        rows,
        texts=3,
        marked=gap,
        note=f"All {total} facts by what was answered correctly. The marked row is the gap: both "
        f"hops known, the question failed{answers}. Brackets: exact 95% intervals in percent.",
    )


def _split(name: str) -> str:
    return name.replace("_", " ")
