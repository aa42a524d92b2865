"""Does SmolLM2 answer two-hop questions better when it writes the hops first, and does it read what it wrote?

``python -m benchmarks.aloud [--facts 30] [--shots 3]``

Facts of geo's reporting half, worked examples from its other half; greedy, a reply ends at a line break or
after 48 tokens. Few facts, so the intervals are wide.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.harness import keep, kept, table, write
from mi_hops import load_facts, load_model
from mi_hops.reasoning import aloud_table, reason_aloud

PAGE, MODEL = "aloud", "smollm2-135m"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
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
        [r.outcome, r.n, r.k, f"{r.share:.0%} [{r.low:.0%}, {r.high:.0%}]" if r.n else "-"]
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
    write(PAGE, "Reasoning aloud", "\n\n".join(kept(PAGE).values()), script="aloud")


if __name__ == "__main__":
    main()
