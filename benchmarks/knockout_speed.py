"""Attention knockout and back-patching against one TransformerLens pass a cell.

``python -m benchmarks.knockout_speed [--pairs 3] [--only SWEEP ...]`` writes ``docs/benchmarks/knockout-speed.md``.
Needs a HookedTransformer (TransformerLens 3.9).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import gpt2_small, keep, kept, llama_100m, paired, table, write
from benchmarks.patching_speed import difference, prompts
from mi_hops.patching import back_patch, knockout
from mi_hops.text.tokens import Prompt

PAGE = "knockout-speed"
COLUMNS = [
    "model",
    "sweep",
    "positions",
    "cells",
    "largest difference",
    "times faster: median (range)",
    "ours, s",
    "loop, s",
    "timings",
]


def knockout_loop(model: Any, prompt: Prompt) -> torch.Tensor:
    """One pass for each block and key that the last token does not see."""
    tokens, n = torch.tensor([prompt.ids]), len(prompt)
    out = torch.zeros(model.cfg.n_layers, n)
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            for key in range(n):

                def block(scores: torch.Tensor, hook: Any, key: int = key) -> torch.Tensor:
                    scores[:, :, -1, key] = -torch.inf
                    return scores

                name = f"blocks.{layer}.attn.hook_attn_scores"
                logits = model.run_with_hooks(tokens, fwd_hooks=[(name, block)])
                out[layer, key] = difference(logits[:, -1])[0]
    return out


def back_patch_loop(model: Any, prompt: Prompt) -> torch.Tensor:
    """One pass for each late state and earlier block, at the last token."""
    tokens, n_layers = torch.tensor([prompt.ids]), model.cfg.n_layers
    out = torch.full((n_layers, n_layers), float("nan"))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: "hook_resid_post" in n)
        for source in range(1, n_layers + 1):
            state = cache["resid_post", source - 1][:, -1]
            for target in range(min(source, n_layers)):

                def feed(x: torch.Tensor, hook: Any, state: torch.Tensor = state) -> torch.Tensor:
                    x[:, -1] = state
                    return x

                name = f"blocks.{target}.hook_resid_pre"
                logits = model.run_with_hooks(tokens, fwd_hooks=[(name, feed)])
                out[source - 1, target] = difference(logits[:, -1])[0]
    return out


def compared(label: str, sweep: str, model: Any, prompt: Prompt, pairs: int) -> list[Any]:
    """One row of the table."""
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "knockout": (knockout, knockout_loop),
        "back_patch": (back_patch, back_patch_loop),
    }
    call, loop = calls[sweep]

    def mine() -> torch.Tensor:
        return torch.as_tensor(call(model, [prompt], metric=difference)["score"].values[0])

    found, other = mine(), loop(model, prompt)
    known = other.isfinite()
    error = (found - other)[known].abs().max().item()
    times = paired(mine, lambda: loop(model, prompt), pairs=pairs, warm_up=False)
    row = [
        label,
        sweep,
        len(prompt),
        int(known.sum()),
        f"{error:.1e}",
        f"**{times['ratio']:.1f}** ({times['lowest']:.1f} to {times['highest']:.1f})",
        f"{times['ours_s']:.2f}",
        f"{times['theirs_s']:.2f}",
        pairs,
    ]
    print(row, flush=True)
    return row


def page(found: dict[str, list[Any]]) -> str:
    """What has been measured so far."""
    return (
        "The loop runs one full forward pass per cell; the package's functions run as a user calls them. "
        "Knockout: every block x every key hidden from the last token. Back-patching: every late state "
        "into every earlier block at the last token. Random weights, one prompt; values are logit "
        "differences at the last token.\n\n" + table(COLUMNS, list(found.values()))
    )


def main() -> None:
    """Measure all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="timings of each side")
    sweeps = ("knockout", "back_patch")
    parser.add_argument("--only", nargs="+", choices=sweeps, default=sweeps)
    args = parser.parse_args()
    for name, label, load in (
        ("gpt2", "GPT-2 small's size", gpt2_small),
        ("llama", "LLaMA 100M, grouped-query", llama_100m),
    ):
        model = load()
        (prompt,) = prompts(model, 32, 1, 1)
        for sweep in args.only:
            keep(PAGE, f"{name}-{sweep}", compared(label, sweep, model, prompt, args.pairs))
            print(
                write(
                    PAGE,
                    "Knockout and back-patching: speed",
                    page(kept(PAGE)),
                    script="knockout_speed",
                )
            )


if __name__ == "__main__":
    main()
