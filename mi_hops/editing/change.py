"""The matrices an edit may change, and the low-rank change of one of them.

A matrix is always read as ``[d_in, d_out]``, so that it maps the activation at its input hook to a
part of the activation at its output hook: ``out = in @ W (+ bias)``. That holds for both model
classes, whichever way round the checkpoint stores the weight; biases are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.model import (
    HookedModel,
    hook_name,
    overwrite,
    require_layers,
    require_unquantised,
    w_o,
    write_w_o,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: Matrix -> activation kinds of its input and its output.
MATRICES = {"W_O": ("z", "attn_out"), "W_out": ("mlp_post", "mlp_out")}


def input_hook(matrix: str, layer: int) -> str:
    """Hook name of what a matrix multiplies."""
    return hook_name(_kinds(matrix)[0], layer)


def output_hook(matrix: str, layer: int) -> str:
    """Hook name of what a matrix gives, bias included."""
    return hook_name(_kinds(matrix)[1], layer)


def _kinds(matrix: str) -> tuple[str, str]:
    if matrix not in MATRICES:
        raise ValueError(f"unknown matrix {matrix!r}; an edit changes one of {list(MATRICES)}")
    return MATRICES[matrix]


def live_weight(model: HookedModel, matrix: str, layer: int) -> Float[Tensor, "*rows d_out"]:
    """The weight itself; W_O keeps its head axis.

    Raises:
        ValueError: an unknown matrix, a layer that does not exist, a block without that matrix, or
            a weight that is not stored as floating-point numbers (quantised).
    """
    _kinds(matrix)
    require_layers(model, [layer])
    weight: Any
    if matrix == "W_O":
        weight = w_o(model, layer)
    else:
        weight = getattr(getattr(model.blocks[layer], "mlp", None), "W_out", None)
        if weight is None:
            raise ValueError(f"block {layer} of this {type(model).__name__} has no MLP with W_out")
    require_unquantised(weight, f"{matrix} of layer {layer}")
    return weight


def read_matrix(model: HookedModel, matrix: str, layer: int) -> Float[Tensor, "d_in d_out"]:
    """A copy of a matrix in its own dtype.

    Raises:
        ValueError: as `live_weight`, or values that are not finite.
    """
    weight = live_weight(model, matrix, layer).detach()
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{matrix} of layer {layer} holds non-finite values; the model is damaged, load it anew"
        )
    return weight.reshape(-1, weight.shape[-1]).clone()


def write_matrix(
    model: HookedModel, matrix: str, layer: int, value: Float[Tensor, "d_in d_out"]
) -> None:
    """Write a matrix in place, cast once to its dtype, and make sure that it reached the model.

    Raises:
        ValueError: a wrong shape, or values that are not finite after the cast.
        RuntimeError: the write had no effect.
    """
    if matrix == "W_O":
        write_w_o(model, layer, value)
        return
    weight = live_weight(model, matrix, layer)
    if value.shape != weight.shape:
        raise ValueError(
            f"{matrix} of layer {layer} is {tuple(weight.shape)}, got {tuple(value.shape)}"
        )
    overwrite(model, f"{matrix} of layer {layer}", lambda: live_weight(model, matrix, layer), value)


@dataclass(frozen=True, eq=False)
class Change:
    """A change of one matrix: ``W <- W + left^T right``.

    Attributes:
        matrix: a key of `MATRICES`.
        layer: block, from 0.
        left: ``[rank, d_in]``, the directions of the input that are read; None for the identity,
            when `right` is the whole dense change.
        right: ``[rank, d_out]``, what each of them adds to the output; on the device of `left`.

    Raises:
        ValueError: shapes that do not fit, factors on two devices, a dtype below float32, or values
            that are not finite.
    """

    matrix: str
    layer: int
    left: Float[Tensor, "rank d_in"] | None
    right: Float[Tensor, "rank d_out"]

    def __post_init__(self) -> None:
        _kinds(self.matrix)
        if self.left is not None and self.left.device != self.right.device:
            raise ValueError(
                f"factors of {self} are on {self.left.device} and {self.right.device}; a change lies "
                "on one device"
            )
        for factor in (self.right,) if self.left is None else (self.left, self.right):
            if factor.ndim != 2 or factor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"factors of {self} are 2-D in float32 or float64, got {tuple(factor.shape)} "
                    f"in {factor.dtype}"
                )
            if not torch.isfinite(factor).all():
                raise ValueError(f"the change of {self} is not finite; nothing was edited")
        if self.left is not None and self.left.shape[0] != self.right.shape[0]:
            raise ValueError(
                f"factors of {self} have ranks {self.left.shape[0]} and {self.right.shape[0]}"
            )

    def __str__(self) -> str:
        return f"{self.matrix} of layer {self.layer}"

    @property
    def site(self) -> tuple[str, int]:
        """Matrix and layer."""
        return self.matrix, self.layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)`` of the matrix."""
        return (self.right if self.left is None else self.left.T).shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of factor pairs (an upper bound of the rank)."""
        return self.right.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors that there are, by name."""
        return {"right": self.right} | ({} if self.left is None else {"left": self.left})

    def delta(self) -> Float[Tensor, "d_in d_out"]:
        """The change as a matrix, on the factors' device."""
        return self.right if self.left is None else self.left.T @ self.right

    def act(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What the change adds to the output for inputs `x` of the factors' dtype."""
        return x @ self.right if self.left is None else (x @ self.left.T) @ self.right

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Change:
        """The same change with its factors elsewhere; itself where nothing moves."""
        right = self.right.to(device, dtype or self.right.dtype)
        if right is self.right:
            return self
        left = None if self.left is None else self.left.to(right.device, right.dtype)
        return Change(self.matrix, self.layer, left, right)

    def check_fits(self, model: HookedModel) -> None:
        """Refuse a model whose matrix has another shape.

        Raises:
            ValueError: with both shapes.
        """
        weight = live_weight(model, self.matrix, self.layer)
        found = (weight.numel() // weight.shape[-1], weight.shape[-1])
        if found != self.shape:
            raise ValueError(f"the edit changes {self} as {self.shape}, the model's is {found}")


def merge(changes: list[Change]) -> Change:
    """Changes of one matrix as one: their sum, dense where its factors would take more room.

    Raises:
        ValueError: none, or changes of several matrices.
    """
    if len({c.site for c in changes}) != 1:
        raise ValueError(f"can merge changes of one matrix, got {[str(c) for c in changes]}")
    first = changes[0]
    if len(changes) == 1 and (first.left is None or first.rank <= min(first.shape)):
        return first
    device = first.right.device
    wide = torch.float64 if any(c.right.dtype == torch.float64 for c in changes) else torch.float32
    moved = [c.to(device, wide) for c in changes]
    if any(c.left is None for c in moved) or sum(c.rank for c in moved) > min(first.shape):
        total = moved[0].delta().clone()
        for c in moved[1:]:
            total += c.delta()
        return Change(first.matrix, first.layer, None, total)
    left = torch.cat([c.left for c in moved if c.left is not None])
    return Change(first.matrix, first.layer, left, torch.cat([c.right for c in moved]))
