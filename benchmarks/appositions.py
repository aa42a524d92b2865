"""Models that spell the bridge and use it: what training on texts with appositions changes.

``python -m benchmarks.appositions [--models hops-gpt2 apposed-gpt2 ...]`` writes
``docs/benchmarks/appositions.md``.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np

from benchmarks.harness import keep, kept, table, write
from mi_hops import Hopland, erase_bridge, fact_trajectories, find_gap, load_model, locate
from mi_hops.lens import who_comes_first
from mi_hops.result.statistics import bootstrap_ci, difference_ci, proportion_ci

PAGE = "appositions"
MODELS = ("hops-gpt2", "apposed-gpt2", "hops-llama", "apposed-llama")
FORMS = ("suffix", "prefix")
#: Held-out questions; how many of each group, half to choose the layer, half to report; their draw.
ASKED, SAMPLE, SEED = 1500, 300, 0
#: With fewer than twice as many of a group nothing but what is answered is measured.
FEWEST = 5


def halves(facts: list[Any], sample: int) -> tuple[list[Any], list[Any]]:
    """A seeded draw of at most `sample` facts in two halves, one to choose and one to report."""
    drawn = random.Random(SEED).sample(facts, min(sample, len(facts)))
    return drawn[::2], drawn[1::2]


def figures(
    model: Any, form: str, *, asked: int = ASKED, sample: int = SAMPLE, located: int = 60
) -> dict[str, Any]:
    """All figures of one model in one template order, of `asked` held-out questions."""
    facts = Hopland().two_hop_facts("seen_parts", "first_unseen")
    facts = random.Random(SEED).sample(facts, asked)
    gap = find_gap(model, facts, form=form, batch_size=256)
    shares = {}
    for split in ("seen_parts", "first_unseen"):
        frame = gap.frame
        part = frame[(frame["split"] == split) & frame["first"] & frame["second"]]
        k, n = int(part["two_hop"].sum()), len(part)
        shares[split] = (k / max(n, 1), *proportion_ci(k, max(n, 1)), n)
    shown = {
        "form": form,
        "known": float((gap.frame["first"] & gap.frame["second"]).mean()),
        "shares": shares,
    }
    if min(len(gap.passed), len(gap.failed)) < 2 * FEWEST:
        return shown
    chosen, passed = halves(gap.passed, sample)
    _, failed = halves(gap.failed, sample)

    def read(some: list[Any]) -> Any:
        return fact_trajectories(model, some, form=form)

    def bridge(result: Any, score: str) -> np.ndarray:
        data = result[score].sel(tracked="bridge", position="first hop")
        return data.transpose("example", "layer").values

    # After two blocks at least, and two before the last.
    middle = range(2, model.cfg.n_layers - 1)
    layer = max(middle, key=lambda i: float(bridge(read(chosen), "prob")[:, i].mean()))
    lens, other = read(passed), read(failed)
    at, missed = bridge(lens, "prob")[:, layer], bridge(other, "prob")[:, layer]
    first = who_comes_first(lens, position={"bridge": "first hop", "answer": "last"}).iloc[0]
    order = [first[k] for k in ("one_first", "one_first_lower", "one_first_upper", "other_first")]
    erased = {
        half: erase_bridge(model, some, form=form, variants=["exact"])
        for half, some in (("choose", chosen), ("report", passed))
    }
    drops = {
        half: (result["control"] - result["bridge"])
        .sel(variant="exact", position="first hop")
        .transpose("example", "layer")
        .values
        for half, result in erased.items()
    }
    block = int(drops["choose"].mean(0).argmax())
    drop = drops["report"][:, block]
    moved = locate(model, failed[:located], form=form)["effect"].sel(
        kind="attn_out", position="last"
    )
    effect = moved.transpose("example", "layer").values
    best = int(np.argsort(effect[::2].mean(0))[-1])
    rest = np.delete(effect[1::2], best, axis=1).mean(1)
    stands = effect[1::2][:, best] - rest
    return {
        **shown,
        "n": len(passed),
        "n_failed": len(failed),
        "layer": layer,
        "rank": float(np.median(bridge(lens, "rank")[:, layer])),
        "prob": [float(at.mean()), *map(float, bootstrap_ci(at))],
        "less_failed": [float(x) for x in difference_ci(at, missed)],
        "order": [float(x) for x in order],
        "block": block,
        "drop": [float(drop.mean()), *map(float, bootstrap_ci(drop))],
        "drops": [float(x) for x in drops["report"].mean(0)],
        "attention": [best, float(effect[1::2][:, best].mean())],
        "stands_out": [float(stands.mean()), *map(float, bootstrap_ci(stands))],
        "n_located": len(rest),
    }


def page() -> None:
    """The tables of all that was measured so far."""
    parts = kept(PAGE)
    rows = [parts[f"{m}-{f}"] for m in MODELS for f in FORMS if f"{m}-{f}" in parts]

    def interval(x: list[float], form: str = "+.2f") -> str:
        return f"{x[0]:{form}} [{x[1]:{form}}, {x[2]:{form}}]"

    def share(x: list[float]) -> str:
        return f"{x[0]:.0%} [{x[1]:.0%}, {x[2]:.0%}]"

    answering = table(
        ("model", "order", "seen parts", "first fact unseen"),
        [
            [
                p["model"],
                p["form"],
                share(p["shares"]["seen_parts"]),
                share(p["shares"]["first_unseen"]),
            ]
            for p in rows
        ],
    )
    reading = table(
        ("model", "order", "n", "blocks", "rank", "probability", "answered minus failed", "before the answer",
         "after it"),
        [
            [p["model"], p["form"], p["n"], p["layer"], f"{p['rank']:g}", interval(p["prob"], ".2f"),
             interval(p["less_failed"]), share(p["order"]), f"{p['order'][3]:.0%}"]
            for p in rows
        ],
    )  # fmt: skip
    causing = table(
        ("model", "order", "n", "block", "control minus bridge", "best attention", "effect",
         "minus other layers (n)"),
        [
            [p["model"], p["form"], p["n"], p["block"], interval(p["drop"]), p["attention"][0],
             f"{p['attention'][1]:+.2f}", f"{interval(p['stands_out'])} ({p['n_located']})"]
            for p in rows
        ],
    )  # fmt: skip
    body = f"""
`hops-*` were trained on answers only, so nothing pushed a hidden state to spell out the bridge. `apposed-*` have the
same shape and were trained from random weights on whole texts in which the bridge's name, or one word of it, may follow
its description ("the author of Misery Stephen King is from ..."): first three layers, on facts and appositions, then all
six, on compositions as well (`mi-hops train-world --appositions`). Both kinds answer questions whose two facts were part
of other trained compositions, and mostly fail where the first fact was part of none.

Rules, fixed before the reported half was read: at most {SAMPLE} answered and {SAMPLE} failed held-out questions, every
other one for choosing and the rest for reporting. The lens is read after that one of 2 to 4 (of 6) blocks where the mean
probability of the bridge's first token is largest (logit lens, first hop's last token); the bridge is erased from the
block where that has the largest mean effect on the choosing half. Intervals are 95%. Some hundred of the same questions
had been looked at before the rules were fixed.

## What they answer

{answering}

Of {ASKED:,} held-out questions, those whose hops are both known; whole answers.

## Is the bridge readable?

{reading}

After *blocks* blocks: the median *rank* of the bridge's first token and its mean *probability*. *Before the answer*: the
share of questions in which the bridge, at the first hop's last token, reaches half of its largest probability at an
earlier layer than the answer does at the last token.

## Is it used?

{causing}

*Control minus bridge*: how much more P(answer) falls when the bridge is erased from the *block*'s output at the first
hop's last token (exact form) than when another entity is. *Effect*: what copying the *best attention* layer's output at
the last token from the second-hop prompt adds to P(answer) of failed questions; *minus other layers*: the same minus the
other layers' mean effect. That layer is chosen on every other question and reported on the rest.

The recipe was found by [trying others](natural-recipes.md), whose results on {ASKED:,} or fewer of the same questions had
been seen; the models reported here were then trained anew with it.
"""
    write(PAGE, "Models that spell the bridge and use it", body, script="appositions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    for name in () if options.page_only else options.models:
        for form in FORMS:
            found = figures(load_model(name, device="cpu"), form)
            keep(PAGE, f"{name}-{form}", {"model": name, **found})
    page()


if __name__ == "__main__":
    main()
