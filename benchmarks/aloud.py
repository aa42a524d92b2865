"""Does SmolLM2 answer two-hop questions better when it writes the hops first, and does it read what it wrote?

``python -m benchmarks.aloud [--facts 30] [--shots 3] [--steps 30]``

Facts of geo's reporting half, worked examples from its other half; greedy, a reply ends at a line break or
after 48 tokens. Few facts, so the intervals are wide. Then: from which layer a lens keeps to the answer's
first token, by the logit lens and by a tuned lens trained on worked examples of the other half.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.harness import keep, kept, table, write
from mi_hops import LensTraining, TunedLens, load_facts, load_model, train_lens
from mi_hops.reasoning import (
    Layout,
    aloud_commitment,
    aloud_table,
    commitment_table,
    reason_aloud,
)

PAGE, MODEL = "aloud", "smollm2-135m"
#: Layers that the tuned lens reads (blocks passed, of 30); the last needs no translator.
TUNED = (4, 8, 12, 16, 18, 20, 22, 24, 26, 28)


def tuned_lens(model, others, steps):
    """A lens trained on worked examples of the other half, and its held-out KL before and after."""
    layout, lens = Layout(), TunedLens(model, layers=TUNED)
    texts = [layout.example(f, "suffix", aloud=True) for f in others]
    texts = ["".join(texts[i : i + 3]) for i in range(0, len(texts) - 2, 3)][:400]
    plan = LensTraining(steps=steps, max_tokens=256, cells=96, evaluate_every=max(1, steps // 2))
    run = train_lens(model, lens, texts, plan)
    kl = " ".join(
        f"{layer}: {before:.1f} to {after:.1f};"
        for layer, before, after in zip(
            TUNED, run["before"].values, run["after"].values, strict=True
        )
    )
    return lens, kl.rstrip(";")


def settled(model, found, lenses):
    """The table of commitment layers, lens by lens."""
    rows = []
    for name, (lens, layers) in lenses.items():
        counts = commitment_table(aloud_commitment(model, found, lens=lens, layers=layers))
        rows += [
            [name, r.way, r.replies, r.n, f"{r.layer:.1f} [{r.lower:.1f}, {r.upper:.1f}]"]
            for r in counts.itertuples()
            if r.n > 1
        ]
    return table(["lens", "way", "replies", "n", "layer of 30, mean [95%]"], rows)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="of the tuned lens")
    asked = parser.parse_args()
    every = list(load_facts("geo"))
    random.Random(asked.seed).shuffle(every)
    facts = [f for f in every if f.split != "choosing"][: asked.facts]
    others = [f for f in every if f.split == "choosing"]
    model = load_model(MODEL)
    found = reason_aloud(
        model, facts, others, shots=asked.shots, max_new_tokens=48, batch_size=asked.facts
    )
    counts = aloud_table(found)
    rows = [
        [r.outcome, r.n, r.k, f"{r.share:.0%} [{r.lower:.0%}, {r.upper:.0%}]" if r.n else "-"]
        for r in counts.itertuples()
    ]
    data = found.data
    both = (data["latent"].values > 0, data["aloud"].values > 0)
    cross = [
        [words, *(int((both[0] == first)[both[1] == aloud].sum()) for aloud in (True, False))]
        for words, first in (("answered at once", True), ("not answered at once", False))
    ]
    replies = [
        [f.prompt("suffix"), f"{f.bridge} → {f.answer}", said.replace("|", "/")]
        for f, said in zip(facts, data["said_aloud"].values.tolist(), strict=False)
    ][:8]
    text = (
        f"## {MODEL}\n\n{found.n_used} facts, {len(found.skipped)} skipped; {asked.shots} worked examples, "
        f"greedy, share [exact 95%].\n\n{table(['outcome', 'n', 'k', 'share'], rows)}\n\n"
        f"{table(['', 'answered aloud', 'not answered aloud'], cross)}\n\n### The first replies\n\n"
        f"{table(['question', 'bridge, answer', 'reply aloud'], replies)}"
    )
    print(text, flush=True)
    keep(PAGE, MODEL, text)
    lens, kl = tuned_lens(model, others, asked.steps)
    text = (
        "## Where the answer is settled\n\nThe layer (blocks passed) from which a lens's top token stays the "
        "model's final prediction, at the token before the answer: `latent`, of the question asked directly; "
        "`written`, where the steps of the reply aloud first give the right answer; `aloud`, after the final "
        '"So:". The tuned lens reads layers '
        f"{', '.join(map(str, TUNED))} and the last, so its numbers are rounded up to these; it was trained "
        f"for {asked.steps} steps of 96 tokens on worked examples of the other half (held-out KL to the "
        f"output, nats, of the logit lens and after training: {kl}).\n\n"
        + settled(model, found, {"logit": ("logit", None), "tuned": (lens, TUNED)})
    )
    print(text, flush=True)
    keep(PAGE, f"{MODEL}_commitment", text)
    write(PAGE, "Reasoning aloud", "\n\n".join(kept(PAGE).values()), script="aloud")


if __name__ == "__main__":
    main()
