"""The low-rank change of one of the matrices that an edit may change.

A matrix is always read as ``[d_in, d_out]``, so that it maps the activation at its input hook to a
part of the activation at its output hook: ``out = in @ W (+ bias)``. That holds for both model
classes, whichever way round the checkpoint stores the weight; biases are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import MATRICES, Hook, HookedModel, hook_name, live_matrix


def input_hook(matrix: str, layer: int) -> str:
    """Hook name of the activation that a matrix multiplies."""
    return hook_name(_kinds(matrix)[0], layer)


def output_hook(matrix: str, layer: int) -> str:
    """Hook name of a matrix's output, bias included."""
    return hook_name(_kinds(matrix)[1], layer)


def _kinds(matrix: str) -> tuple[str, str]:
    if matrix not in MATRICES:
        raise ValueError(f"unknown matrix {matrix!r}; an edit changes one of {list(MATRICES)}")
    return MATRICES[matrix]


def matrix_hooks(
    matrix: str, layer: int, act: Callable[[Tensor, Tensor], Tensor | None]
) -> list[Hook]:
    """Hooks by which a matrix's output becomes ``act(input, output)``; None leaves it as it is.

    `act` is given the input ``[row, pos, d_in]`` and the output ``[row, pos, d_out]`` of one pass.
    The hooks can be given to TransformerLens as they are, which passes the hook point as well.
    """
    inputs: list[Tensor] = []

    def remember(x: Tensor, hook: Any = None) -> Tensor:
        inputs[:] = [x.flatten(2)]
        return x

    def change(out: Tensor, hook: Any = None) -> Tensor:
        changed = act(inputs.pop(), out)
        return out if changed is None else changed

    return [(input_hook(matrix, layer), remember), (output_hook(matrix, layer), change)]


@dataclass(frozen=True, eq=False, repr=False)
class Change:
    """A change of one matrix: ``W <- W + left^T right``.

    Attributes:
        matrix: ``"W_O"`` or ``"W_out"``.
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
        layer: Any = self.layer  # numpy's integers will do
        if not isinstance(layer, Integral) or int(layer) < 0:
            raise ValueError(f"layer is {layer!r}; expected a number from 0")
        object.__setattr__(self, "layer", int(layer))
        if self.left is not None and self.left.device != self.right.device:
            raise ValueError(
                f"factors of {self} are on {self.left.device} and {self.right.device}; expected one "
                "device"
            )
        for factor in self.tensors.values():
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

    def __repr__(self) -> str:
        return f"<change of {self}, {'dense' if self.left is None else f'rank {self.rank}'}>"

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
        """The factors, by name."""
        return {"right": self.right} | ({} if self.left is None else {"left": self.left})

    def delta(self) -> Float[Tensor, "d_in d_out"]:
        """The change as a matrix, on the factors' device."""
        if self.left is None:
            return self.right
        return einsum("rank d_in, rank d_out -> d_in d_out", self.left, self.right)

    def act(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What the change adds to the output for inputs `x` of the factors' dtype."""
        return x @ self.right if self.left is None else (x @ self.left.T) @ self.right

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Change:
        """The same change with its factors moved or cast; itself if nothing changes."""
        right = self.right.to(device, dtype or self.right.dtype)
        if right is self.right:
            return self
        left = None if self.left is None else self.left.to(right.device, right.dtype)
        return Change(self.matrix, self.layer, left, right)

    def check_fits(self, model: HookedModel) -> None:
        """Refuse a model whose matrix has a different shape.

        Raises:
            ValueError: with both shapes.
        """
        weight = live_matrix(model, self.matrix, self.layer)
        found = (weight.numel() // weight.shape[-1], weight.shape[-1])
        if found != self.shape:
            raise ValueError(f"the edit changes {self} as {self.shape}, the model's is {found}")


def merge(changes: Sequence[Change]) -> Change:
    """Changes of one matrix as one: their sum, dense where its factors would take more room.

    Raises:
        ValueError: none, or changes of several matrices.
    """
    if len({c.site for c in changes}) != 1:
        raise ValueError(f"can merge changes of one matrix, got {[str(c) for c in changes]}")
    first = changes[0]
    if len(changes) == 1 and (first.left is None or first.rank <= min(first.shape)):
        return first
    wide = torch.float64 if any(c.right.dtype == torch.float64 for c in changes) else torch.float32
    moved = [c.to(first.right.device, wide) for c in changes]
    lefts = [c.left for c in moved if c.left is not None]
    if len(lefts) < len(moved) or sum(c.rank for c in moved) > min(first.shape):
        total = moved[0].delta().clone()
        for c in moved[1:]:
            total += c.delta()
        return Change(first.matrix, first.layer, None, total)
    return Change(first.matrix, first.layer, torch.cat(lefts), torch.cat([c.right for c in moved]))
