"""Many edits in one model: how many hold, what they cost what was right before, and what room there is.

``python -m benchmarks.many_edits [--model hops-gpt2 hops-llama] [--counts 1 10 100 300 1000]`` writes
``docs/benchmarks/many-edits.md`` from the rows kept in ``benchmarks/results/many-edits/``, of which
``--only NAME ...`` measures some again. Settings are chosen on other failed questions than those
reported, by the rule that stands on the page. `benchmarks.many_edits_real` adds a real model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.editing_setup import FORM, FirstTokens, Setup, bytes_of, covariance, set_up
from benchmarks.harness import Peak, keep, kept, table, write
from mi_hops import TwoHopFact
from mi_hops.editing import (
    Edit,
    Moments,
    SingularError,
    creme_joint,
    creme_search,
    creme_sequential,
    edit_hooks,
    second_moments,
    stack,
)
from mi_hops.editing.baselines import memit, memit_sequential
from mi_hops.model import Hook
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.sweep.repair import Rows
from mi_hops.text.tokens import answer_ids, encode

PAGE = "many-edits"
COUNTS = (1, 10, 100, 300, 1000)
#: Number of edits -> failed questions that are reported; where it is larger, as many as it is.
REPORTED = {1: 10, 10: 50, 100: 200}
#: Share of unrelated questions above which keeping more of them counts for nothing in a choice.
ENOUGH = 0.98
#: Of the null space, in units of the mean eigenvalue of C.
THRESHOLDS = (0.001, 0.01, 0.03, 0.1, 0.3)
SETS = ("correction", "paraphrase", "specificity", "specificity_same_relation", "first_hop")
COLUMNS = (
    "editor",
    "edits in one model",
    "questions",
    "corrected (first token)",
    "whole answer",
    "paraphrase",
    "unrelated kept",
    "same relation kept",
    "first hop kept",
    "s / edit",
    "peak MiB",
    "bytes / edit",
    "chosen",
)

ROOM = (
    "matrix",
    "threshold",
    "free dimensions by layer",
    "together",
    "share of the text's second moment in them, at most",
)

#: Number of edits -> the number that their settings are chosen at.
CHOSEN_AT = {1: 10, 10: 10, 100: 100, 300: 300, 1000: 300}

RULE = (
    "Every editor is given prompts in one form only (suffix), without context templates, "
    "and makes *n* edits in one model. Reported are the questions of ten models with one "
    "edit each, five with 10, two with 100, and one with more (all failed questions, if "
    "there are fewer than 1,000); each question is asked in the model that has its edit "
    "and n - 1 others. Unrelated questions are those that the model answered correctly "
    "before. Settings (column *chosen*) are those that correct the most first answer "
    "tokens on *other* failed questions, where each unrelated question answered wrongly "
    f"beyond {1 - ENOUGH:.0%} of them costs as much as four questions not corrected. They "
    "are chosen for 10, 100 and 300 edits; single edits use those for 10, more than 300 "
    "those for 300. As in [the other table](editing-table.md), the reported questions, "
    "those that settings are chosen on, and the text that C is estimated on and kept "
    "prompts are drawn from share no single fact. *peak MiB* is the additional memory that "
    "making a model's edits took. The search is given 1,500 prompts to keep, the least "
    "squares only C. Seconds are of one thread, partly while other work ran. An editor or "
    "a number of edits without a row has not been measured."
)


@dataclass(frozen=True)
class Editor:
    """What makes one edit of many facts, and the settings it is chosen from.

    Attributes:
        make: ``make(facts, **option)``.
        options: to choose from.
        most: edits it is tried with, at most.
    """

    name: str
    make: Callable[..., Edit]
    options: Sequence[dict[str, Any]]
    most: int = 100_000


class Many:
    """An editor as a repair: the facts in parts of `size`, the edits of a part in one model."""

    def __init__(self, editor: Editor, size: int, option: dict[str, Any]) -> None:
        self.name, self.size = editor.name, size
        self._make = partial(editor.make, **option)
        self.seconds = self.peak = 0.0
        self.n_bytes = 0

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> list[Edit]:
        """The same edit for every fact of a part; it counts what it costs."""
        found: list[Edit] = []
        for start in range(0, len(facts), self.size):
            part = facts[start : start + self.size]
            with Peak() as peak:
                begun = time.perf_counter()
                edit = self._make(part)
                self.seconds += (time.perf_counter() - begun) / len(facts)
            self.peak = max(self.peak, peak.mib)
            self.n_bytes += bytes_of(edit)
            found += [edit] * len(part)
        self.n_bytes //= len(facts)
        return found

    def hooks(self, model: Any, states: Sequence[Any], rows: Rows) -> list[Hook]:
        """Every row in its part's model."""
        return edit_hooks(model, states)


# -- editors --------------------------------------------------------------------------------------


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(values, each, strict=True)) for each in product(*values.values())]


def editors(setup: Setup) -> dict[str, Editor]:
    """Label -> editor."""
    model, n = setup.model, setup.n_layers
    c, c_mlp = covariance(setup), covariance(setup, "W_out")
    asked = [f.prompt(FORM) for f in setup.practice[:1500]]
    c_ends = second_moments(model, asked, positions="last")
    late, half, every = (list(range(n - k, n)) for k in (-(-n // 3), n // 2, n))
    one: dict[str, Any] = {"form": FORM, "templates": ("{}",)}

    def joint(facts: Any, null: float | None = None, moments: Moments = c, **how: Any) -> Edit:
        return creme_joint(model, facts, covariance=moments.with_null_space(null), **one, **how)

    def sequence(facts: Any, null: float | None = None, **how: Any) -> Edit:
        held = c.with_null_space(null)
        return stack(creme_sequential(model, facts, covariance=held, **one, **how), check=False)

    def search(facts: Any, null: float | None = None, **how: Any) -> Edit:
        return creme_search(model, facts, c.with_null_space(null), kept=asked, form=FORM, **how)

    def mlp(facts: Any, null: float | None = None, parts: int = 1, **how: Any) -> Edit:
        held = {**one, "covariance": c_mlp.with_null_space(null), **how}
        if parts == 1:
            return memit(model, facts, **held)
        size = -(-len(facts) // parts)
        return stack(memit_sequential(model, facts, size=size, **held), check=False)

    early = [list(range(a, a + 3)) for a in (0, 1)]

    def places(**more: Sequence[Any]) -> list[dict[str, Any]]:
        """At the first hop's last token in early layers (the papers' place), or at the prompt's last."""
        first = grid(position=["first hop"], layers=early, **more)
        return first + grid(position=["last"], layers=[half], **more)

    found = [
        Editor("CREME, jointly", joint, grid(layers=[late, half], ridge=[0.1, 0.3, 1.0])),
        Editor("CREME, in sequence", sequence, grid(strength=[0.3, 0.5, 0.7]), 100),
        Editor(
            "CREME + null space, jointly",
            joint,
            grid(layers=[late, half], null=[0.03, 0.1, 0.3], ridge=[0.1]),
        ),
        Editor(
            "CREME + null space, in sequence",
            sequence,
            grid(null=[0.03, 0.1, 0.3], strength=[0.5]),
            100,
        ),
        Editor(
            "CREME + spread layers",
            partial(joint, spread=True, target="clean"),
            grid(layers=[half, every], ridge=[0.03, 0.1, 0.3]),
        ),
        Editor(
            "CREME, least squares with what must be kept",
            partial(joint, moments=c_ends, spread=True, target="clean"),
            grid(layers=[half, every], ridge=[0.03, 0.1, 0.3]),
        ),
        Editor("CREME, searched", search, grid(decay=[0.3, 1.0, 3.0])),
        Editor("CREME, searched + null space", search, grid(null=[0.3], decay=[0.3]), 300),
        Editor("MEMIT, jointly", mlp, places(ridge=[0.1, 1.0])),
        Editor("AlphaEdit, jointly", mlp, places(null=[0.1], ridge=[0.1, 1.0])),
        Editor(
            "AlphaEdit, in 10 parts", partial(mlp, parts=10), places(null=[0.1], ridge=[0.1]), 300
        ),
    ]
    return {editor.name: editor for editor in found}


# -- choosing and scoring -------------------------------------------------------------------------


def chosen(setup: Setup, editor: Editor, n: int) -> dict[str, Any]:
    """The option that does best with n edits on the choosing half, by `RULE`."""
    if len(editor.options) == 1:
        return editor.options[0]
    facts = setup.choose[:n]
    asked = FirstTokens(setup.model, setup.choosing.of_cases(*(f.id for f in facts)), facts)
    own = asked.within("correction")

    def worth(option: dict[str, Any]) -> tuple[float, float]:
        repair = Many(editor, n, option)
        try:
            right = asked.right(repair)
        except SingularError as error:
            print(f"  {option}: {error}", flush=True)
            return -1.0, -1.0
        corrected, kept = float(right[own].mean()), float(right[~own].mean())
        print(f"  {option}: {corrected:.3f} {kept:.3f} ({repair.seconds:.2f} s)", flush=True)
        return round(corrected + 4 * min(kept, ENOUGH), 6), round(kept, 6)

    found = [worth(option) for option in editor.options]
    return editor.options[max(range(len(found)), key=lambda i: (*found[i], -i))]


def measured(setup: Setup, editor: Editor, n: int, option: dict[str, Any]) -> dict[str, Any]:
    """One row: shares with their intervals, and costs."""
    cases = setup.report[: REPORTED.get(n, n)]
    repair = Many(editor, n, option)
    queries = setup.queries.of(*SETS).of_cases(*(f.id for f in cases))
    found = evaluate(setup.model, repair, queries, cases, generate=False)
    rows = found.table(n_resamples=500)

    def share(name: str, stat: str) -> list[float]:
        try:
            row = rows.loc[(repair.name, name, stat)]
        except KeyError:
            return []
        return [float(row[k]) for k in ("value", "lower", "upper")]

    return {
        "n": min(n, len(cases)),
        "questions": len(cases),
        "shares": [
            share("correction", "first_correct_after"),
            share("correction", "exact_match_after"),
            share("paraphrase", "first_correct_after"),
            share("specificity", "first_correct_ratio"),
            share("specificity_same_relation", "first_correct_ratio"),
            share("first_hop", "first_correct_ratio"),
        ],
        "seconds": repair.seconds,
        "peak": repair.peak,
        "bytes": repair.n_bytes,
        "option": option,
    }


# -- the page -------------------------------------------------------------------------------------


def room(setup: Setup) -> list[list[str]]:
    """How many independent inputs a layer has left beside the text, at some thresholds."""
    rows = []
    for matrix in ("W_O", "W_out"):
        moments = covariance(setup, matrix)
        for threshold in THRESHOLDS:
            dims, shares = [], []
            for layer in moments.layers:
                values = torch.linalg.eigvalsh(moments.second[layer])
                free = values[values <= threshold * values.mean()]
                dims.append(len(free))
                shares.append(float(free.sum() / values.sum()))
            width = len(moments.second[moments.layers[0]])
            rows.append(
                [
                    matrix,
                    f"{threshold:g}",
                    ", ".join(map(str, dims)),
                    f"{sum(dims)} of {width * len(dims)}",
                    f"{max(shares):.2%}",
                ]
            )
    return rows


def keys_per_edit(setup: Setup, form: str | None) -> float:
    """Tokens of an answer, on average: each is a key of its own."""
    asked = [(encode(setup.model, f.prompt(form)), f.answer) for f in setup.report]
    keys = [len(answer_ids(setup.model, *each)) for each in asked]
    return sum(keys) / len(keys)


def page() -> str:
    """The tables of all rows there are."""
    parts = [RULE]
    for name, found in kept(PAGE).items():
        parts.append(f"## {name}")
        if "rule" in found:
            parts.append(found["rule"])
        parts.append(f"Keys per edit: {found['keys']:.2f}.")
        if found["room"]:
            parts.append(table(ROOM, found["room"]))
        rows = []
        for row in found["rows"].values():
            shares = [f"{a[0]:.1%} ({a[1]:.1%} to {a[2]:.1%})" if a else "-" for a in row["shares"]]
            option = ", ".join(f"{k} {v}" for k, v in row["option"].items())
            rows.append(
                [
                    row["editor"],
                    row["n"],
                    row["questions"],
                    *shares,
                    f"{row['seconds']:.3f}",
                    f"{row['peak']:.0f}",
                    f"{row['bytes']:,}",
                    option,
                ]
            )
        parts.append(table(COLUMNS, rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--cases", type=int, default=max(COUNTS), help="failed questions, at most")
    parser.add_argument("--only", nargs="+", help="labels of editors")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.model:
        setup = set_up(name, cases=given.cases, seed=given.seed)
        found = kept(PAGE).get(name, {"rows": {}})
        found["room"] = room(setup)
        found["keys"] = keys_per_edit(setup, FORM)
        options: dict[tuple[str, int], dict[str, Any]] = {}
        for label, editor in editors(setup).items():
            if given.only and label not in given.only:
                continue
            for n in sorted(given.counts):
                if n > editor.most:
                    continue
                at = label, min(CHOSEN_AT.get(n, n), len(setup.choose))
                if at not in options:
                    print(f"{name}, {label}, {at[1]} edits", flush=True)
                    options[at] = chosen(setup, editor, at[1])
                row = {"editor": label, **measured(setup, editor, n, options[at])}
                print(label, n, row["shares"][0], row["shares"][3], flush=True)
                found["rows"][f"{n} {label}"] = row
            order = sorted(found["rows"].items(), key=lambda r: (r[1]["n"], list(r)))
            found["rows"] = dict(order)
            keep(PAGE, name, found)
            write(PAGE, "Many edits in one model", page(), script="many_edits")


if __name__ == "__main__":
    main()
