"""A model whose matrices are to be edited: checked once, and named in every edit made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Editable:
    """The matrices to be edited.

    Attributes:
        layers: blocks, ascending.
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

    def inverse_times(
        self, layer: int, keys: Float[Tensor, "key d_in"]
    ) -> Float[Tensor, "key d_in"]:
        """``C^-1`` times each key, float64; the keys themselves for C = I."""
        return keys.double() if self.covariance is None else self.covariance.solve(layer, keys)

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
    layers: int | Sequence[int],
    matrix: str = "W_O",
    covariance: Moments | None = None,
) -> Editable:
    """The matrices of a model that may be edited.

    Processed (folded) weights may be as well. Such an edit says so (`Edit.processing`), fits those
    weights only, and is not an edit of the checkpoint.

    Raises:
        ValueError: no layers, one twice or out of range, or a covariance of another matrix or
            without one of the layers.
        WrongWeightsError: a covariance of other weights.
        MissingHookError: a model without the hooks an edit of that matrix needs.
    """
    found = sorted([layers] if isinstance(layers, int) else [int(layer) for layer in layers])
    if not found or len(set(found)) != len(found):
        raise ValueError(f"layers are {layers}; expected one or more, each once")
    require_layers(model, found)
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
    return Editable(matrix, tuple(found), weights, processing_of(model), covariance, wide)
