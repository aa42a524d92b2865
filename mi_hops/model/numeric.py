"""The one rule of precision (float32 or wider), and the one divergence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return tensor.to(wide_dtype(tensor.dtype))


def kl_divergence(
    reference: Float[Tensor, "*rows vocab"], other: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(reference || other) of two log-probability vectors, in nats."""
    return (reference.exp() * (reference - other)).sum(-1)
