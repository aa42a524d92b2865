"""What every editing method refuses before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from mi_hops.editing.applied import check_weights
from mi_hops.editing.change import input_hook, output_hook
from mi_hops.editing.moments import Moments
from mi_hops.model import HookedModel, fingerprint, processing_of, require_hooks, require_layers


def check_layers(model: HookedModel, layers: Sequence[int], matrix: str = "W_O") -> tuple[int, ...]:
    """The layers, ascending.

    Raises:
        ValueError: none, one twice, or one out of range.
        MissingHookError: a model without the hooks an edit of that matrix needs.
    """
    found = sorted(int(layer) for layer in layers)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"layers are {list(layers)}; expected one or more, each once")
    require_layers(model, found)
    require_hooks(model, (f(matrix, i) for i in found for f in (input_hook, output_hook)))
    return tuple(found)


def check_editable(
    model: HookedModel,
    covariance: Moments | None,
    layers: Sequence[int],
    *,
    processed: bool,
    matrix: str = "W_O",
) -> str:
    """The fingerprint of a model that may be edited.

    Raises:
        ValueError: processed weights not asked for, or a covariance that does not fit.
    """
    if processing_of(model) != "none" and not processed:
        raise ValueError(
            "the model's weights were processed (folded and centred), so an edit of them is not an "
            "edit of the checkpoint; load it with processing='none', or pass processed=True"
        )
    if covariance is None:
        return fingerprint(model)
    lacking = sorted(set(layers) - set(covariance.layers))
    if covariance.matrix != matrix or lacking:
        raise ValueError(
            f"the covariance is of the input of {covariance.matrix} at layers "
            f"{list(covariance.layers)}; needed: {matrix} at {list(layers)}"
        )
    return check_weights(model, covariance.fingerprint, "the covariance was")
