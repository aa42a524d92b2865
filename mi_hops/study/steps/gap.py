"""What the model answers: the compositionality gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.facts.unusable import describe_reasons
from mi_hops.reasoning.gap import HOPS, Gap, find_gap
from mi_hops.study.numbers import Headline, left_out, percent, share, share_headline, share_of
from mi_hops.study.parts import Block, Figure, Table, Text, bars, row
from mi_hops.study.step import Step

if TYPE_CHECKING:
    from mi_hops.study.context import Run
    from mi_hops.study.folder import Folder

_YES = {True: "yes", False: "no"}
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

    name, short = "gap", "The compositionality gap"
    title = "The compositionality gap"
    question = (
        "Which two-hop questions does the model fail although it answers both hops by themselves?"
    )
    kind = Gap

    def run(self, run: Run) -> Gap:
        """Ask every fact in every form."""
        return find_gap(run.model, run.facts, form=run.forms)

    def summarise(self, result: Gap, study: Folder) -> dict[str, Any]:
        """Shares known and answered, by form and split, and the table of the main form."""
        frame = result.frame
        failed = frame[frame["first"] & frame["second"] & ~frame["two_hop"]]
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
            "Every question is asked greedily over the whole vocabulary. It counts as answered when "
            "the whole answer and its end come out (aliases allowed). A hop is known when its own "
            f"question is answered. Of n = {main['two_hop']['n']} facts{left}, the model knows both "
            f"hops of {known} in the main form ({form}){fails}. Later steps use the main form."
        )
        if not known:
            why = (
                "The model knows both hops of none of these facts"
                if main["two_hop"]["n"]
                else "None of these facts can be asked about both hops (a fact needs prompts of its "
                "own for the first and for the second hop)"
            )
            text = f"{why}, so there is no gap to study: the steps below have nothing to work on."
            yield Text(text, style="note")
        yield from _by_split(summary["forms"])
        yield _hops(summary["forms"])
        yield _table(summary, form)


def _of_form(gap: Gap) -> dict[str, Any]:
    frame = gap.frame
    known = frame["first"] & frame["second"]
    splits = {}
    for split in dict.fromkeys(frame["split"]):
        inside = frame["split"] == split
        part = frame[known & inside]
        splits[split or "all"] = {
            "known": share_of(known[inside]),
            "two_hop_of_known": share_of(part["two_hop"]),
            "first_token_of_known": share_of(part["first_token"]),
        }
    shares = {hop: share_of(frame[hop]) for hop in HOPS}
    return {**shares, "gap": share_of(~frame["two_hop"][known]), "by_split": splits}


def _by_split(forms: Mapping[str, Any]) -> Iterator[Figure | Table]:
    rows, cells = [], []
    splits: dict[str, None] = {}
    for form, entry in forms.items():
        for split, scores in entry["by_split"].items():
            splits[split] = None
            name, known, whole = _split(split), scores["known"], scores["two_hop_of_known"]
            first = scores["first_token_of_known"]
            rows.append(row(whole, split=name, form=form))
            shares = [percent(x, n=False) for x in (known, first, whole)]
            cells.append([name, form, shares[0], str(known["n"]), *shares[1:], str(whole["n"])])
    plot = bars(rows, x="split", group="form")
    if plot is not None:
        meaning = "; ".join(f"{_split(s)}: {_SPLITS[s]}" for s in splits if s in _SPLITS)
        counts = [r["n"] for r in rows]
        caption = (
            "Share of two-hop questions answered correctly (whole answer) among facts whose two hops "
            f"the model both knows, by split of the facts and form of the question; n = {min(counts)}"
            f" to {max(counts)} facts per bar (on hover), whiskers are exact 95% intervals. What a "
            "bar lacks to 100% is the gap."
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


def _hops(forms: Mapping[str, Any]) -> Figure | Text:
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
        f"Share of all n = {rows[0]['n']} facts whose question is answered correctly (whole answer), "
        "for each hop alone and for the two-hop question, by form; whiskers are exact 95% "
        "intervals. If the hops were independent and combining them cost nothing, the third group "
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
