"""Activations of texts that an editor reads keys and values from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import Hook, HookedModel, capture


def activations(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    names: Sequence[str],
    hooks: Sequence[Hook] = (),
) -> list[Float[Tensor, "row pos d"]]:
    """Activations at hook points, after `hooks` have acted; heads side by side."""
    with torch.no_grad():
        found, _ = capture(model, tokens, names, hooks=hooks)
    return [found[name].flatten(2) for name in names]
