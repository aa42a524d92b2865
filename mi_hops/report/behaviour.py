"""What the model answers: the compositionality gap and how the failures fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.report.parts import (
    Figure,
    Section,
    Table,
    Text,
    bars,
    left_over,
    percent,
    row,
)

if TYPE_CHECKING:
    from mi_hops.study.folder import Study

_YES = {True: "yes", False: "no"}
_ASKED = {"first": "first hop alone", "second": "second hop alone", "two_hop": "two-hop question"}

#: What the splits of Hopland mean; other facts have splits of their own, shown as they are named.
_SPLITS = {
    "train": "the question itself was trained on",
    "seen_parts": "held out, but both facts took part in other trained compositions",
    "first_unseen": "held out, and the first fact never took part in a trained composition",
    "second_unseen": "held out, and the second fact never took part in a trained composition",
}

_RULES = (
    ("incomplete", "the answer given is the bridge: the model stopped at the first hop"),
    ("short-cut", "the same answer comes when the subject itself stands in for the first hop"),
    ("distorted", "the bridge never rises in the lens: its peak over layers (mean probability of all "
     "its tokens), at the first hop's last token and at the last token, stays below a quarter of the "
     "median peak of the questions answered rightly"),
    ("hasty", "at the last token the answer given (its first token) has half of its final "
     "probability no later than the layer at which the bridge peaks"),
    ("other", "none of these"),
)  # fmt: skip


def gap_section(study: Study) -> Section:
    """Step 1, with the failure types."""
    summary = study.summary["gap"]
    section = Section(
        "gap",
        "The compositionality gap",
        "Which two-hop questions does the model fail although it answers both hops by themselves?",
    )
    form, main = next(iter(summary["forms"].items()))
    known = main["gap"]["n"]
    left = left_over(study.summary["left_out"].get("gap", {}))
    fails = (
        f" and fails {percent(main['gap'], n=False)} of their two-hop questions" if known else ""
    )
    section.blocks.append(
        Text(
            "Every question is asked greedily over the whole vocabulary. It counts as answered when "
            "the whole answer and its end come out (aliases allowed). A hop is known when its own "
            f"question is answered. Of n = {main['two_hop']['n']} facts{left}, the model knows both "
            f"hops of {known} in the main form ({form}){fails}. Later steps use the main form."
        )
    )
    if not known:
        why = (
            "The model knows both hops of none of these facts"
            if main["two_hop"]["n"]
            else "None of these facts can be asked about both hops (a fact needs prompts of its own "
            "for the first and for the second hop)"
        )
        section.blocks.append(
            Text(f"{why}, so there is no gap to study: the steps below have nothing to work on.",
                 style="note")
        )  # fmt: skip
    section.blocks += [*_by_split(summary), _hops(summary), _table(summary, form)]
    section.blocks += _failures(study)
    return section


def _by_split(summary: Mapping[str, Any]) -> list[Figure | Table]:
    rows, cells = [], []
    splits: dict[str, None] = {}
    for form, entry in summary["forms"].items():
        for split, scores in entry["by_split"].items():
            splits[split] = None
            whole, first = scores["two_hop_of_known"], scores["first_token_of_known"]
            rows.append(row(whole, split=_split(split), form=form))
            cells.append([_split(split), form, percent(scores["known"], n=False),
                          str(scores["known"]["n"]), percent(first, n=False),
                          percent(whole, n=False), str(whole["n"])])  # fmt: skip
    plot = bars(rows, x="split", group="form")
    table = Table(
        "The numbers, by split and form",
        ("split", "form", "both hops known", "n facts", "first token right", "whole answer right",
         "n known"),
        cells, texts=2, fold=True,
        note="The last three columns are of the facts with both hops known. Brackets: exact 95% "
        "intervals in percent.",
    )  # fmt: skip
    if plot is None:
        return [table]
    meaning = "; ".join(f"{_split(s)}: {_SPLITS[s]}" for s in splits if s in _SPLITS)
    counts = [r["n"] for r in rows]
    caption = (
        "Share of two-hop questions answered rightly (whole answer) among facts whose two hops the "
        f"model both knows, by split of the facts and form of the question; n = {min(counts)} to "
        f"{max(counts)} facts a bar (on hover), whiskers are exact 95% intervals. What a bar lacks "
        "to 100% is the gap."
    )
    if meaning:
        caption += f" Splits: {meaning}."
    title = "Two-hop questions answered, both hops known"
    return [Figure(title, [("", plot)], caption, width=600), table]


def _hops(summary: Mapping[str, Any]) -> Figure | Text:
    rows = [
        row(entry[key], asked=words, form=form)
        for form, entry in summary["forms"].items()
        for key, words in _ASKED.items()
    ]
    plot = bars(rows, x="asked", group="form", height=320)
    if plot is None:
        return Text("No question could be asked.", style="note")
    return Figure(
        "The hops by themselves",
        [("", plot)],
        f"Share of all n = {rows[0]['n']} facts whose question is answered rightly (whole answer), "
        "for each hop alone and for the two-hop question, by form; whiskers are exact 95% "
        "intervals. Were the hops independent and composing free, the third group would be near "
        "the product of the first two.",
        width=600,
    )


def _table(summary: Mapping[str, Any], form: str) -> Table:
    records = summary["table"]
    total = sum(r["n"] for r in records)
    bridge = summary["failed_saying_bridge"]
    answers = f"; {percent(bridge)} of these failures answer with the bridge" if bridge["n"] else ""
    rows = [
        [*(_YES[bool(r[hop])] for hop in ("first", "second", "two_hop")),
         str(r["n"]), percent(r["share"], n=False), str(r["says_bridge"])]
        for r in records
    ]  # fmt: skip
    return Table(
        f"Who knows what ({form} form)",
        ("first hop", "second hop", "two-hop question", "n", "share", "answers with the bridge"),
        rows,
        texts=3,
        marked=[
            i for i, r in enumerate(records) if r["first"] and r["second"] and not r["two_hop"]
        ],
        note=f"All {total} facts by what was answered rightly. The marked row is the gap: both hops "
        f"known, the question failed{answers}. Brackets: exact 95% intervals in percent.",
    )


def _failures(study: Study) -> list[Figure | Table | Text]:
    shares = study.summary["failures"]
    if "skipped" in shares:
        return [Text(f"Failure types were left out: {shares['skipped']}.", style="note")]
    plot = bars([row(share, type=kind) for kind, share in shares.items()], x="type", height=300,
                y_label="share of failures")  # fmt: skip
    n = next(iter(shares.values()))["n"]
    left = left_over(study.summary["left_out"].get("failures", {}))
    blocks: list[Figure | Table | Text] = []
    if plot is not None:
        blocks.append(
            Figure(
                "How the failures fail",
                [("", plot)],
                f"Share of the n = {n} failures of each type{left}; whiskers are exact 95% intervals. The "
                "names are those of arXiv 2402.14328, whose authors told the types by hand; here the "
                "first rule below that holds decides, so the shares depend on the rules.",
                width=600,
            )
        )
    rows = [[kind, rule, percent(shares[kind], n=False), str(shares[kind]["n"])]
            for kind, rule in _RULES]  # fmt: skip
    blocks.append(
        Table("The rules, tried in this order", ("type", "rule", "share [95%]", "n"), rows, texts=2)
    )
    return blocks


def _split(name: str) -> str:
    return name.replace("_", " ")
