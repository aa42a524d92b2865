"""Forward passes that go no further than the edits need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mi_hops.model import Hook, HookedModel, forward

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


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
