"""The layer x position residual sweep: one fan-out against TransformerLens's own loop.

``python -m benchmarks.fan_out [--positions 32 16] [--pairs 5]``
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.harness import gpt2_small, llama_100m, paired, table, write
from mi_hops.sweep.fanout import fan_out, plan_fan_out
from mi_hops.sweep.interventions import Intervention, replace
from mi_hops.sweep.limits import Limits
from mi_hops.text.tokens import pad


def sweep(model, clean, corrupted):
    """(our sweep, TransformerLens's sweep): both give logits-based values [layer, pos]."""
    from transformer_lens.patching import get_act_patch_resid_pre

    _, cache = model.run_with_cache(clean, names_filter=lambda n: n.endswith("hook_resid_pre"))
    n_layers, n_pos = model.cfg.n_layers, clean.shape[1]
    prompts = pad(corrupted.tolist())
    items = [
        Intervention.at(
            "resid_pre", layer, replace(cache["resid_pre", layer][0, pos]), positions=[pos]
        )
        for layer in range(n_layers)
        for pos in range(n_pos)
    ]

    def ours(**options):
        out = fan_out(
            model, prompts, items, reduce=lambda x, _: x[:, 0, 7] - x[:, 0, 11], **options
        )
        return out.rows.reshape(n_layers, n_pos)

    def theirs():
        with torch.no_grad():
            return get_act_patch_resid_pre(
                model, corrupted, cache, lambda x: x[0, -1, 7] - x[0, -1, 11]
            )

    return ours, theirs, len(plan_fan_out(model, prompts, items))


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--llama", action="store_true", help="also a 100M LLaMA with GQA")
    asked = parser.parse_args()
    rows = []
    shapes = [("GPT-2 small (12 x 768, 50,257 tokens)", gpt2_small)]
    if asked.llama:
        shapes.append(("LLaMA, grouped-query, 100M (14 x 640, 32,000 tokens)", llama_100m))
    for label, make in shapes:
        model = make()
        for n in asked.positions:
            g = torch.Generator().manual_seed(n)
            clean, corrupted = torch.randint(1, model.cfg.d_vocab, (2, 1, n), generator=g)
            ours, theirs, passes = sweep(model, clean, corrupted)
            error = (ours() - theirs().cpu()).abs().max().item()
            whole = paired(ours, theirs, pairs=asked.pairs, warm_up=False)
            plain = paired(ours, lambda: ours(limits=Limits(reuse_prefix=False)), pairs=asked.pairs)  # noqa: B023
            rows.append(
                [
                    label,
                    n,
                    model.cfg.n_layers * n,
                    passes,
                    f"{error:.1e}",
                    f"**{whole['ratio']:.1f}** ({whole['lowest']:.1f} to {whole['highest']:.1f})",
                    f"{plain['ratio']:.1f}",
                    f"{whole['ours_s']:.2f}",
                    f"{whole['theirs_s']:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    columns = [
        "model (random weights, float32)",
        "positions",
        "cells",
        "passes",
        "largest difference",
        "times faster than TransformerLens's loop: median (range)",
        "of which by reusing the prefix",
        "fan-out, s",
        "loop, s",
    ]
    body = (
        "One clean and one corrupted prompt; every cell patches `resid_pre` at one layer and "
        "position and reads a logit difference at the last token. `get_act_patch_resid_pre` runs "
        f"one forward pass per cell. Ratios are medians of {asked.pairs} interleaved pairs in one "
        "process; seconds are that run's and say little about another machine.\n\n"
        + table(columns, rows)
    )
    print(write("fan-out", "The fan-out forward", body, script="fan_out"))


if __name__ == "__main__":
    main()
