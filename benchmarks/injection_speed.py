"""The layer x strength grid of one prompt: fan-out against one forward pass per cell; and long prompts.

``python -m benchmarks.injection_speed [--tokens 16] [--pairs 5] [--long 1000]``
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from benchmarks.harness import gpt2_small, paired, table, write
from mi_hops import MemoryInjection, TwoHopFact, encode, generate, injection_grid
from mi_hops.injection import STRENGTHS, Place, encode_memories
from mi_hops.model import hook_name
from mi_hops.sweep import target_of


def fact(n_tokens: int) -> TwoHopFact:
    """A two-hop fact whose prompt has `n_tokens` tokens, BOS included."""
    fill = " ".join(f"w{100 + i}" for i in range(n_tokens - 6))
    return TwoHopFact(
        id="long", subject="w7", relation1="r", bridge="w20 w21", relation2="q", answer="w40",
        first_hop="w3 w4 w7", prompts={"suffix": f"{fill} w1 w3 w4 w7 w9"},
    )  # fmt: skip


def sweep(model, item, positions):
    """(our grid, one hooked forward pass per cell): both give first-token probabilities [layer, strength]."""
    prompt = encode(model, item.prompt())
    first = target_of(model, prompt, item.answer).answer[0]
    tokens = torch.tensor([prompt.ids])
    where = list(Place(positions).find(prompt, item.first_hop))
    vectors = encode_memories(model, [item.bridge])[0]

    def ours():
        grid = injection_grid(
            model,
            [item],
            positions=positions,
            controls=(),
            metrics=("first_prob", "first_correct"),
        )
        return torch.from_numpy(grid["first_prob"].values[0, 0, 0])

    def theirs():
        out = torch.zeros(model.cfg.n_layers, len(STRENGTHS), dtype=torch.float64)
        with torch.no_grad():
            for layer in range(model.cfg.n_layers):
                for k, strength in enumerate(STRENGTHS):

                    def add(x, hook, layer=layer, strength=strength):
                        x[:, where] += strength * vectors[layer]
                        return x

                    logits = model.run_with_hooks(
                        tokens, fwd_hooks=[(hook_name("attn_out", layer), add)]
                    )
                    out[layer, k] = logits[0, -1].softmax(-1)[first]
        return out

    return ours, theirs


def long_prompt(model, n_tokens: int) -> list:
    """Time and memory of an injection into a long prompt, and of generating under it."""
    item = fact(n_tokens)
    rows = []
    for positions in ("everywhere", "first hop"):
        repair = MemoryInjection(6, 4.0, positions=positions)
        states = repair.fit(model, [item])
        prompt = encode(model, item.prompt())
        generate(model, [prompt], max_new_tokens=1)
        times = []
        for options in ({}, {"repair": repair, "states": states}):
            start = time.perf_counter()
            generate(model, [prompt], max_new_tokens=8, stop=(), **options)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        injection_grid(
            model, [item], positions=positions, layers=[2, 6, 10], strengths=(1, 4, 8), controls=(),
            metrics="first_prob",
        )  # fmt: skip
        grid = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append([positions, n_tokens, *(f"{t:.2f}" for t in (*times, grid)), f"{peak:.2f}"])
    return rows


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--long", type=int, default=1000)
    asked = parser.parse_args()
    model = gpt2_small()
    rows = []
    for n in asked.tokens:
        for positions in ("last", "first hop", "everywhere"):
            ours, theirs = sweep(model, fact(n), positions)
            error = (ours() - theirs()).abs().max().item()
            found = paired(ours, theirs, pairs=asked.pairs, warm_up=False)
            rows.append(
                [
                    n,
                    positions,
                    f"{error:.1e}",
                    f"**{found['ratio']:.1f}** ({found['lowest']:.1f} to {found['highest']:.1f})",
                    f"{found['ours_s']:.2f}",
                    f"{found['theirs_s']:.2f}",
                ]  # fmt: skip
            )
            print(rows[-1], flush=True)
    columns = [
        "tokens", "positions injected", "largest difference of probabilities",
        "times faster: median (range)", "fan-out grid, s", "one forward pass per cell, s",
    ]  # fmt: skip
    long_rows = long_prompt(model, asked.long)
    long_columns = [
        "positions injected", "tokens", "8 tokens generated, s", "the same under injection, s",
        "3 layers x 3 strengths, s", "peak memory of the process, GiB",
    ]  # fmt: skip
    body = (
        "A model of GPT-2 small's size (random weights, float32), one prompt, 12 layers x 15 "
        "strengths = 180 cells, Unembed. The baseline is TransformerLens's `run_with_hooks`, one "
        "forward pass per cell, with the memory encoded once. A memory *everywhere* changes every "
        "token from its layer on, so nothing of the prefix can be reused: what is saved is the "
        "layers below, the unembedding of unscored positions, and the cost of small matrix "
        f"products.\n\n{table(columns, rows)}\n\n## Long prompts\n\n{table(long_columns, long_rows)}"
    )
    print(write("injection-speed", "Injection grids: speed", body, script="injection_speed"))


if __name__ == "__main__":
    main()
