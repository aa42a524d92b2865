"""The small vocabulary of interventions: functions from an activation to a changed one.

Each function returns a `Change`: it takes the selected part of one row's activation at a hook
point (``[pos, d]``, ``[pos, head, d_head]``, or ``[pos, d_head]`` where a head was named) and
returns a tensor of that shape. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

Change = Callable[["Tensor"], "Tensor"]


def replace(value: Tensor) -> Change:
    """Put `value` in place of the activation (broadcast over what it lacks)."""

    def change(x: Tensor) -> Tensor:
        return _like(value, x).expand_as(x)

    return change


def add(vector: Tensor, strength: float = 1.0) -> Change:
    """Add ``strength * vector``."""

    def change(x: Tensor) -> Tensor:
        return x + strength * _like(vector, x)

    return change


def scale(factor: float) -> Change:
    """Multiply by `factor`."""

    def change(x: Tensor) -> Tensor:
        return x * factor

    return change


def ablate(mean: Tensor | None = None) -> Change:
    """Zero ablation, or mean ablation where a `mean` activation is given."""

    def change(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape) if mean is None else _like(mean, x).expand_as(x)

    return change


def noise(std: float, generator: Generator) -> Change:
    """Add Gaussian noise of standard deviation `std` (units of the activation).

    The noise is drawn at each call from `generator`, on its own device.
    """

    def change(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator, device=generator.device)
        return x + std * _like(drawn, x)

    return change


def _like(value: Tensor, x: Tensor) -> Tensor:
    """`value` on the activation's device and dtype, checked to broadcast to its shape.

    Raises:
        ValueError: a shape that does not broadcast to the activation's.
    """
    if value.ndim > x.ndim or any(
        v not in (1, n) for v, n in zip(value.shape[::-1], x.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"a value of shape {tuple(value.shape)} does not fit the selected activation of shape "
            f"{tuple(x.shape)}"
        )
    return value.to(x.device, x.dtype)
