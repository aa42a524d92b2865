"""Interventions: where in the model and in which row, and functions that change an activation there.

A `Change` takes the selected part of one row's activation at a hook point (``[pos, d]``,
``[pos, head, d_head]``, or ``[pos, d_head]`` where a head was named) and returns a tensor of that
shape. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Generator, Tensor

Change = Callable[[Tensor], Tensor]

#: Kinds whose activations can be changed; the axis of heads where there is one.
HEAD_AXIS: dict[str, int | None] = {
    "resid_pre": None,
    "resid_mid": None,
    "resid_post": None,
    "attn_out": None,
    "mlp_out": None,
    "mlp_pre": None,
    "mlp_post": None,
    "q": 2,
    "k": 2,
    "v": 2,
    "z": 2,
    "pattern": 1,
}


@dataclass(frozen=True)
class Site:
    """A place in the model.

    Attributes:
        kind: activation kind, a key of `HEAD_AXIS`.
        layer: block, from 0.
        positions: token positions of the base prompt (query positions for ``pattern``), -1 being
            its last; None for all of them.
        head: one head (a key/value head for ``k`` and ``v``), or None for all.
    """

    kind: str
    layer: int
    positions: tuple[int, ...] | None = None
    head: int | None = None


@dataclass(frozen=True)
class Intervention:
    """One row of a fan-out: `change` applied at every one of `sites`, on a copy of a base row.

    The function sees the selected activation of its own row: ``[pos, d]``; with heads
    ``[pos, head, d_head]`` or, one head named, ``[pos, d_head]``; patterns ``[head, query, key]``
    or ``[query, key]``. At the first site that is the base run's activation. A sequence of
    functions gives each site its own.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.sweep import zero
        >>> mi_hops.Intervention.at("attn_out", 2, zero(), positions=[-1]).sites
        (Site(kind='attn_out', layer=2, positions=(-1,), head=None),)
    """

    sites: tuple[Site, ...]
    change: Change | tuple[Change, ...]
    base: int = 0

    @classmethod
    def at(
        cls,
        kind: str,
        layer: int | Iterable[int],
        change: Change,
        *,
        positions: Iterable[int] | None = None,
        head: int | None = None,
        base: int = 0,
    ) -> Intervention:
        """An intervention at one layer, or the same one in a window of layers."""
        layers = (layer,) if isinstance(layer, int | Integral) else layer
        where = None if positions is None else tuple(positions)
        return cls(tuple(Site(kind, int(i), where, head) for i in layers), change, base)

    @property
    def pairs(self) -> list[tuple[Site, Change]]:
        """Sites with their functions."""
        if isinstance(self.change, tuple):
            return list(zip(self.sites, self.change, strict=True))
        return [(site, self.change) for site in self.sites]


# -- changes --------------------------------------------------------------------------------------


def replace(value: Tensor) -> Change:
    """Replace the activation with `value` (broadcast)."""
    return lambda x: _like(value, x).expand_as(x)


def add(vector: Tensor, strength: float = 1.0) -> Change:
    """Add ``strength * vector``."""
    return lambda x: x + strength * _like(vector, x)


def scale(factor: float) -> Change:
    """Multiply by `factor`."""
    return lambda x: x * factor


def zero() -> Change:
    """Put zeros in place of the activation (zero ablation)."""
    return torch.zeros_like


def noise(std: float, generator: Generator) -> Change:
    """Add Gaussian noise of standard deviation `std` (units of the activation).

    The noise is drawn at each call from `generator`, on its own device.
    """

    def change(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator, device=generator.device)
        return x + std * _like(drawn, x)

    return change


def _like(value: Tensor, x: Tensor) -> Tensor:
    """`value` on the activation's device and dtype, checked to broadcast to its shape."""
    if value.ndim > x.ndim or any(
        v not in (1, n) for v, n in zip(value.shape[::-1], x.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"a value of shape {tuple(value.shape)} does not fit the selected activation of shape "
            f"{tuple(x.shape)}"
        )
    return value.to(x.device, x.dtype)
