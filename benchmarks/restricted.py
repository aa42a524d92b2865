"""CREME held to the heads that carry a question, against the same edit of all heads.

``python -m benchmarks.restricted [--model hops-gpt2 hops-llama] [--cases 120]`` writes
``docs/benchmarks/restricted.md`` from what is kept in ``benchmarks/results/restricted/``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.editing_setup import FORM, Setup, Timed, covariance, set_up
from benchmarks.harness import keep, kept, table, write
from mi_hops import Pairs, Sites, TwoHopFact, patch
from mi_hops.editing import EditorRepair, creme, default_layers
from mi_hops.reasoning.evaluate import evaluate

PAGE = "restricted"
EVERYWHERE = "all heads"

RULE = (
    "The same edit (`creme` as called, with C: the last third of the blocks, strength 0.7) "
    "is made with all heads of these blocks and with only some of them. A question's heads "
    "are ranked by patching, before any edit: one head's z at the last token of the "
    "second-hop prompt is patched into the two-hop prompt, and heads are ordered by what "
    "that adds to the log-probability of the answer's first token. *first k* are the top k "
    "heads, *last k* the bottom k, *random k* are drawn at random for each question; "
    "*first k of all* are the top k among the heads of all blocks. Nothing else is chosen, "
    "so no question is set aside for choosing. Questions, C and columns are those of [the "
    "table of editors](editing-table.md); shares are of first answer tokens, with 95% "
    "intervals over questions. Fixed before any number was read: a restriction *gains* (or "
    "*loses*) if the 95% interval of the paired difference to all heads lies above (below) "
    "0; for KL the other way round."
)

#: Column -> (set, score of a query, statistic of the table).
COLUMNS = {
    "corrected": ("correction", "first_correct_after", "first_correct_after"),
    "whole answer": ("correction", "exact_match_after", "exact_match_after"),
    "paraphrase": ("paraphrase", "first_correct_after", "first_correct_after"),
    "same first hop": ("generalisation", "first_correct_after", "first_correct_after"),
    "unrelated kept": ("specificity", "first_correct_after", "first_correct_ratio"),
    "same relation kept": (
        "specificity_same_relation",
        "first_correct_after",
        "first_correct_ratio",
    ),
    "first hop kept": ("first_hop", "first_correct_after", "first_correct_ratio"),
    "KL neutral": ("neutral", "kl", "kl"),
}

#: Block -> heads.
Heads = dict[int, list[int]]


def ranked(setup: Setup, facts: Sequence[TwoHopFact]) -> dict[str, list[tuple[int, int]]]:
    """Fact -> every (layer, head), the one whose z adds most to the answer first."""
    asked = [f.prompt(FORM) for f in facts]
    second, answers = [f.second_prompt(FORM) for f in facts], [f.answer for f in facts]
    pairs = Pairs(second, asked, answer=answers)
    found = patch(setup.model, pairs, Sites("z", positions=-1), metric="first_logprob")["change"]
    effect = found.transpose("example", "layer", "head").values
    cells = [(i, h) for i in range(effect.shape[1]) for h in range(effect.shape[2])]
    return {
        f.id: sorted(cells, key=lambda at: -float(values[at]))
        for f, values in zip(facts, effect, strict=True)
    }


def choices(setup: Setup) -> dict[str, dict[str, Heads]]:
    """Label -> fact -> the heads that its edit is held to."""
    order = ranked(setup, setup.report)
    late, lots = default_layers(setup.model), random.Random(0)
    found: dict[str, dict[str, Heads]] = {}

    def put(label: str, fact: str, cells: Sequence[tuple[int, int]]) -> None:
        heads: Heads = {}
        for layer, head in cells:
            heads.setdefault(layer, []).append(head)
        found.setdefault(label, {})[fact] = heads

    for fact, every in order.items():
        here = [at for at in every if at[0] in late]
        put(EVERYWHERE, fact, here)
        for k in (1, 2, 4, 6):
            put(f"first {k}", fact, here[:k])
        put("random 4", fact, lots.sample(here, 4))
        put("last 4", fact, here[-4:])
        for k in (4, 8):
            put(f"first {k} of all", fact, every[:k])
    return found


def measure(setup: Setup) -> dict[str, Any]:
    """Rows with their intervals, and paired differences to the edit of all heads."""
    c = covariance(setup)
    repairs = []
    for label, heads in choices(setup).items():

        def edit(
            model: Any, facts: Sequence[TwoHopFact], heads: dict[str, Heads] = heads
        ) -> list[Any]:
            return [creme(model, f, layers=heads[f.id], covariance=c, form=FORM) for f in facts]

        repairs.append(Timed(EditorRepair(edit, name=label)))
    scores = evaluate(
        setup.model, repairs, setup.queries, setup.report, generate=False, progress=True
    )
    shares = scores.table(n_resamples=500)
    rows, differences = [], []
    for repair in repairs:
        row, against = [repair.name], [repair.name]
        for name, score, statistic in COLUMNS.values():
            cell = shares.loc[(repair.name, name, statistic)]
            ends = f"({cell['lower']:.1%} to {cell['upper']:.1%})"
            row.append(f"{cell['value']:.4f}" if score == "kl" else f"{cell['value']:.1%} {ends}")
            found = scores.difference(
                repair.name, EVERYWHERE, score.removesuffix("_after"), sets=[name]
            )
            mean, low, high = found.loc[name, ["value", "lower", "upper"]]
            if score == "kl":
                low, high, text = -high, -low, f"{mean:+.4f}"
            else:
                spread = "" if low != low else f" ({100 * low:+.1f} to {100 * high:+.1f})"
                text = f"{100 * mean:+.1f}{spread}"
            against.append(text + (" gains" if low > 0 else " loses" if high < 0 else ""))
        rows.append([*row, f"{repair.seconds:.3f}", f"{repair.n_bytes:,}"])
        differences.append(against)
    found = {"n": len(setup.report), "rows": rows, "differences": differences[1:]}
    return {**found, "sets": setup.queries.describe().replace("\n", "\n\n")}


def page() -> str:
    """All models measured so far."""
    parts = [RULE]
    for name, found in kept(PAGE).items():
        parts.append(f"## {name}: {found['n']} failed held-out questions")
        parts.append(table(("heads", *COLUMNS, "s / fact", "bytes / fact"), found["rows"]))
        parts.append("Paired differences to the edit of all heads, in points:")
        parts.append(table(("heads", *COLUMNS), found["differences"]))
        parts.append(found["sets"])
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--cases", type=int, default=120)
    given = parser.parse_args()
    for name in given.model:
        keep(PAGE, name, measure(set_up(name, cases=given.cases)))
        write(PAGE, "Edits restricted to a question's heads", page(), script="restricted")


if __name__ == "__main__":
    main()
