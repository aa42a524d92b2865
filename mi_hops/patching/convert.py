"""To and from `transformer_lens.patching.PatchingResult`, which TransformerLens 4 has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_hops.model.numeric import widen
from mi_hops.result.result import Result
from mi_hops.sweep.metrics import score_gap

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.patching.activation import Direction

_THEIR_NAME = {"layer": "layer", "position": "pos", "head": "head", "kv_head": "head",
               "kind": "patch_type", "neuron": "neuron"}  # fmt: skip
_OUR_NAME = {"layer": "layer", "pos": "position", "dest_pos": "position", "head": "head",
             "head_index": "head", "src_pos": "source_position", "patch_type": "kind"}  # fmt: skip


def _their_class() -> Any:
    from transformer_lens import patching

    cls = getattr(patching, "PatchingResult", None)
    if cls is None:
        raise ValueError(
            "this TransformerLens has no PatchingResult; it came with version 4 "
            "(pip install 'transformer_lens>=4')"
        )
    return cls


def to_transformer_lens(result: Result) -> Any:
    """A result of `activation.patch` as a `PatchingResult`: scores, baseline and axes.

    Labels become the columns of its ``index_df``; the baseline is the unpatched base run: the
    corrupted one of a denoising sweep, the clean one of a noising sweep. What it has no place for
    (direction, effects, units, provenance) stays behind.

    Raises:
        ValueError: a TransformerLens without the class, or a result that is no patching sweep.
    """
    import itertools

    import pandas as pd

    cls = _their_class()
    method = result.provenance.get("method")
    own = "clean" if result.provenance.get("direction") == "noise" else "corrupted"
    if method != "activation patching" or not {"score", own} <= set(result.data):
        raise ValueError(
            f"only results of activation patching convert: they have 'score' and {own!r}; this one "
            f"is of {method!r} and has {list(result.data.data_vars)}"
        )
    array = result["score"]
    axes = [str(d) for d in array.dims if d not in ("example", "metric")]
    several = "metric" in array.dims
    order = [*(["metric"] if several else []), *axes, "example"]
    base = result[own].transpose(*(d for d in order if d in result[own].dims))
    labels = {d: (range(array.sizes[d]) if d == "kind" else array[d].values.tolist()) for d in axes}
    index = pd.DataFrame(
        list(itertools.product(*labels.values())), columns=[_THEIR_NAME[d] for d in axes]
    )
    names = result["metric"].values.tolist() if several else list(result.provenance["metrics"])
    kinds = array["kind"].values.tolist() if "kind" in axes else None
    return cls(
        values=torch.tensor(array.transpose(*order).values),
        axis_names=[_THEIR_NAME[d] for d in axes],
        index_df=index,
        metric_names=names,
        reduced=False,
        baseline=torch.tensor(base.values),
        has_metric_axis=several,
        patch_type_names=kinds,
    )


def from_transformer_lens(
    theirs: Any,
    *,
    direction: Direction = "denoise",
    other: Any = None,
    provenance: Mapping[str, Any] | None = None,
    examples: Sequence[str] | None = None,
) -> Result:
    """A `PatchingResult` as a `Result`.

    Args:
        direction: of the sweep, which it does not know: ``"denoise"`` put clean activations into
            the corrupted run (its baseline is the corrupted score), ``"noise"`` the other way round.
        other: the metric on the run that the baseline is not of (clean when denoising), shaped like
            the baseline; with it ``effect`` is reckoned.
        provenance: what is known of model and sweep.
        examples: labels of the batch; default numbers.

    Returns:
        `Result` with ``score``; with a baseline also ``change`` and the base run's score, under
        ``corrupted`` (``clean`` when noising); with `other` too ``effect``, and the other run's
        score under the other name. A result reduced over its batch has one example, ``mean``. Zeros
        that pad key/value heads there are zeros here.

    Raises:
        ValueError: a flat result (made with an index frame of one's own), another run's score
            without a baseline or of another shape, or an unknown direction, or one that the
            provenance contradicts.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is {direction!r}; expected 'denoise' or 'noise'")
    known = dict(provenance or {})
    if known.get("direction", direction) != direction:
        raise ValueError(
            f"the provenance tells of a sweep in direction {known['direction']!r}; pass "
            f"direction={known['direction']!r}"
        )
    if not theirs.axis_names:
        raise ValueError("a flat PatchingResult has no axes to label; run the sweep by axis names")
    values = _wide(theirs.values)
    base = None if theirs.baseline is None else _wide(theirs.baseline)
    if theirs.reduced:
        values, base = values[..., None], None if base is None else base[..., None]
    lead = ["metric"] if theirs.has_metric_axis else []
    axes = [_OUR_NAME.get(name, name) for name in theirs.axis_names]
    dims, base_dims = [*lead, *axes, "example"], [*lead, "example"]
    n = values.shape[-1]
    labels = ["mean"] if theirs.reduced else list(range(n)) if examples is None else list(examples)
    coords: dict[str, Any] = {"example": labels}
    for axis, name in zip(axes, theirs.axis_names, strict=True):
        column = theirs.index_df[name].drop_duplicates().to_numpy()
        kinds = theirs.patch_type_names if axis == "kind" else None
        coords[axis] = np.asarray(kinds) if kinds else column
    if lead:
        coords["metric"] = list(theirs.metric_names)
    arrays = {"score": values}
    baselines = {}
    own_name, other_name = (
        ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
    )
    if base is None and other is not None:
        raise ValueError(f"an effect needs the {own_name} baseline; run with baseline=True")
    if base is not None:
        shape = (*base.shape[: len(lead)], *(1 for _ in axes), base.shape[-1])
        change = values - base.reshape(shape)
        arrays["change"], baselines[own_name] = change, base
        if other is not None:
            other = _wide(other).reshape(base.shape)
            arrays = {"effect": change / score_gap(other, base).reshape(shape), **arrays}
            baselines[other_name] = other
    order = ["example", *axes, *lead]

    def sorted_dims(array: Any, names: list[str]) -> tuple[list[str], Any]:
        kept = [d for d in order if d in names]
        return kept, array.permute([names.index(d) for d in kept])

    share = "share restored" if direction == "denoise" else "share lost"
    return Result.from_arrays(
        {name: sorted_dims(array, dims) for name, array in arrays.items()},
        baselines={name: sorted_dims(array, base_dims) for name, array in baselines.items()},
        coords=coords,
        units={"effect": share} if "effect" in arrays else {},
        provenance={
            "method": "activation patching", "from": "transformer_lens PatchingResult",
            "metrics": list(theirs.metric_names), **known, "direction": direction,
        },
        title="Activation patching",
        allow_nonfinite=True,  # an effect without a scale
    )  # fmt: skip


def _wide(values: Any) -> Tensor:
    found = torch.as_tensor(values).detach().cpu()
    return widen(found)
