"""A model whose matrices are to be edited: checked once, and named in every edit made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.editing.change import Change, input_hook, output_hook
from mi_hops.editing.edit import Edit, check_weights
from mi_hops.editing.moments import Moments
from mi_hops.model import (
    HookedModel,
    dtype_of,
    fingerprint,
    processing_of,
    require_hooks,
    require_layers,
)
from mi_hops.model.numeric import wide_dtype

#: Blocks whose W_O is edited: one, several, or block -> heads, of which alone the rows are edited.
Layers = int | Sequence[int] | Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Editable:
    """The matrices to be edited.

    Attributes:
        layers: blocks, ascending.
        heads: block -> the heads whose rows of W_O may change; empty for all rows of all blocks.
        d_head: rows of a head.
        fingerprint: of the weights as they are.
        covariance: second moments of the matrices' input; None for C = I.
        dtype: of the factors, float32 or wider.
    """

    matrix: str
    layers: tuple[int, ...]
    fingerprint: str
    processing: str
    covariance: Moments | None
    dtype: torch.dtype
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    d_head: int = 0

    @property
    def where(self) -> dict[str, Any]:
        """Layers, and heads where those are chosen, for the record of an edit."""
        heads = {str(layer): list(found) for layer, found in self.heads.items()}
        return {"layers": list(self.layers), **({"heads": heads} if heads else {})}

    def inverse_times(
        self, layer: int, keys: Float[Tensor, "key d_in"]
    ) -> Float[Tensor, "key d_in"]:
        """``C^-1`` times each key, float64; the keys themselves for C = I.

        With `heads`, C and keys are those of the heads' own inputs, and 0 elsewhere: what is solved
        with it is the least change of those rows alone.
        """
        c = self.covariance
        if layer not in self.heads:
            return keys.double() if c is None else c.solve(layer, keys)
        rows = [h * self.d_head + i for h in self.heads[layer] for i in range(self.d_head)]
        found = torch.zeros_like(keys, dtype=torch.float64)
        part = keys[:, rows].double()
        found[:, rows] = part if c is None else c.part(layer, rows).solve(layer, part)
        return found

    def change(self, layer: int, left: Tensor | None, right: Tensor) -> Change:
        """A change of the matrix at a layer, in the factors' dtype."""
        left = None if left is None else left.to(self.dtype)
        return Change(self.matrix, layer, left, right.to(self.dtype))

    def edit(
        self,
        method: str,
        request: Mapping[str, Any],
        changes: Sequence[Change],
        settings: Mapping[str, Any],
    ) -> Edit:
        """An edit of the weights that were checked."""
        return Edit(
            method=method,
            changes=tuple(changes),
            fingerprint=self.fingerprint,
            processing=self.processing,
            request=request,
            settings=settings,
        )


def check_editable(
    model: HookedModel,
    layers: Layers,
    matrix: str = "W_O",
    covariance: Moments | None = None,
    *,
    by_head: bool = False,
) -> Editable:
    """The matrices of a model that may be edited.

    Processed (folded) weights may be as well. Such an edit says so (`Edit.processing`), fits those
    weights only, and is not an edit of the checkpoint.

    Args:
        by_head: the editor can be held to heads.

    Raises:
        ValueError: no layers, one twice or out of range; no heads of a layer, one twice or out of
            range, or heads for an editor of whole matrices; a covariance of another matrix or without
            one of the layers.
        WrongWeightsError: a covariance of other weights.
        MissingHookError: a model without the hooks an edit of that matrix needs.
    """
    given: Any = [layers] if isinstance(layers, Integral) else layers
    found = sorted(int(layer) for layer in given)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"layers are {layers}; expected one or more, each once")
    require_layers(model, found)
    heads = _heads(model, layers, by_head) if isinstance(layers, Mapping) else {}
    require_hooks(model, (f(matrix, i) for i in found for f in (input_hook, output_hook)))
    if covariance is None:
        weights = fingerprint(model)
    else:
        lacking = sorted(set(found) - set(covariance.layers))
        if covariance.matrix != matrix or lacking:
            raise ValueError(
                f"the covariance is of the input of {covariance.matrix} at layers "
                f"{list(covariance.layers)}; expected {matrix} at {found}"
            )
        weights = check_weights(model, covariance.fingerprint, "the covariance was")
    wide = wide_dtype(dtype_of(model))
    where = tuple(found), weights, processing_of(model)
    return Editable(matrix, *where, covariance, wide, heads, int(model.cfg.d_head))


def _heads(
    model: HookedModel, chosen: Mapping[int, Sequence[int]], by_head: bool
) -> dict[int, tuple[int, ...]]:
    """Block -> heads, both ascending."""
    if not by_head:
        raise ValueError(
            f"layers are {dict(chosen)}, and this editor changes whole matrices; give layers alone, or "
            "edit with creme, creme_many, creme_joint or creme_sequential"
        )
    n = int(model.cfg.n_heads)
    for layer, heads in chosen.items():
        if not heads or len(set(heads)) != len(heads) or not all(0 <= h < n for h in heads):
            raise ValueError(
                f"heads of layer {layer} are {list(heads)}; expected one or more of 0 to {n - 1}, "
                "each once"
            )
    return {int(layer): tuple(sorted(map(int, chosen[layer]))) for layer in sorted(chosen)}
