"""Forward passes that go no further than the edits need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mi_hops.model import Hook, HookedModel, HookFn, forward


def run_blocks(
    model: HookedModel, tokens: Int[Tensor, "row pos"], last_layer: int, hooks: Sequence[Hook]
) -> None:
    """Run the blocks 0 to `last_layer` for the sake of `hooks`.

    After the model's last block the pass goes on to the logits, of one position only.
    """
    with torch.no_grad():
        if last_layer + 1 < model.cfg.n_layers:
            forward(model, tokens, hooks=hooks, stop_at_layer=last_layer + 1)
        else:
            cut: Hook = ("unembed.hook_in", lambda x: x[:, :1])
            forward(model, tokens, hooks=[*hooks, cut])


def activations(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    last_layer: int,
    names: Sequence[str],
    hooks: Sequence[Hook] = (),
) -> list[Tensor]:
    """Activations ``[row, pos, d]`` at hook points of the blocks run, after `hooks` have acted."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        return lambda x: found.update({name: x.flatten(2)})

    run_blocks(model, tokens, last_layer, [*hooks, *((name, keep(name)) for name in names)])
    return [found[name] for name in names]
