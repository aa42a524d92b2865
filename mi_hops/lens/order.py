"""Who comes first: the layers at which tracked names rise, and from which the top token stays."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mi_hops.result.result import Result
from mi_hops.result.statistics import proportion_ci

if TYPE_CHECKING:
    import pandas as pd

#: A bridge is read by the mean probability of all its tokens (the papers' score: it may show by any of
#: its words), the answer by its first token, which is what the last position is to say.
SCORES = {"bridge": "mean_token_prob", "answer": "prob"}


def half_layers(values: np.ndarray) -> np.ndarray:
    """Of probabilities ``[..., layer]``, the first layer with half of their own peak, ``[...]``.

    The embedding (layer 0) is left out: it is the prompt's own, nothing recalled.

    Examples:
        >>> import numpy as np
        >>> half_layers(np.array([[0.9, 0.1, 0.3, 0.5]])).tolist()
        [2]
    """
    return 1 + _risen(values[..., 1:])


def _risen(values: np.ndarray) -> np.ndarray:
    """Where along the last axis values first have half of their own peak."""
    return (values >= 0.5 * values.max(-1, keepdims=True)).argmax(-1)


def commitment(result: Result) -> xr.DataArray:
    """The first layer read from which a lens's top token stays the one of the last layer read.

    Args:
        result: of `logit_lens` or `fact_trajectories` with ``Readout(top_k=1)`` or more, or of
            `token_map`.

    Returns:
        The layer, on the dimensions of ``top_tokens`` without ``layer`` and ``k``. The last layer
        always commits: there the normed lens is the model's output.

    Raises:
        ValueError: a result without top tokens on layers.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> read = mi_hops.token_map(model, "The spouse of Ondo is")
        >>> mi_hops.lens.commitment(read).dims
        ('example', 'position')
    """
    if "layer" not in result.data.dims or "top_tokens" not in result.data:
        raise ValueError(
            "this result has no top tokens through layers; read with readout=Readout(top_k=1)"
        )
    top = result["top_tokens"].isel(k=0).sortby("layer")
    # Texts where a file of an earlier version has no ids: several tokens may decode to one text.
    told = (top["top_id"] if "top_id" in top.coords else top).transpose(..., "layer").values
    same = told == told[..., -1:]
    stays = np.cumprod(same[..., ::-1], axis=-1).sum(-1)
    first = top["layer"].values[top.sizes["layer"] - stays]
    last = top.drop_vars("top_id", errors="ignore").isel(layer=-1, drop=True)
    return last.copy(data=first).rename("commitment")


def who_comes_first(result: Result, *, position: str | Mapping[str, str] = "last") -> pd.DataFrame:
    """For each pair of tracked names, in how many questions one rises before the other.

    A name has risen at the first of the layers read at which it reaches half of its own largest
    probability over them; the embedding is left out. Of a chain this is the order of all bridges and
    the answer.

    Args:
        result: of `fact_trajectories`; with ``bridges="all"`` for all bridges of longer chains.
        position: where all names are read, or name -> position; a name that is not in it is read at
            the last token.

    Returns:
        One row per pair: ``one``, ``other``; ``layer_one`` and ``layer_other``, the mean layers (as
        the result counts them); ``one_first`` and ``other_first``, shares of the ``n`` questions with
        their exact 95% intervals (``one_first_lower``, ...); what is left to 1 are ties. A peak may be
        tiny: the shares say who is first, not that either is there.

    Raises:
        ValueError: a result without tracked names on several layers, or a position that it lacks.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().chain_facts(3, n=2)
        >>> read = mi_hops.fact_trajectories(model, facts, bridges="all")
        >>> mi_hops.lens.who_comes_first(read)[["one", "other"]].values.tolist()
        [['bridge 1', 'bridge 2'], ['bridge 1', 'answer'], ['bridge 2', 'answer']]
    """
    import pandas as pd

    data = result.data
    if not {"tracked", "layer", "example", "position"} <= set(data.dims) or data.sizes["layer"] < 2:
        raise ValueError(
            "this result has no names tracked through layers, example by example; make it with "
            "fact_trajectories"
        )
    # The stream that enters block 0 is the prompt's own, nothing recalled.
    streams = result.provenance.get("kind", "resid") in ("resid", "resid_pre")
    layers = np.array([k for k in sorted(data["layer"].values.tolist()) if k or not streams])
    risen = {}
    for name in data["tracked"].values.tolist():
        at = position if isinstance(position, str) else position.get(name, "last")
        if at not in data["position"].values.tolist():
            raise ValueError(
                f"{name!r} is to be read at {at!r}; the result has {data['position'].values.tolist()}"
            )
        values = data[SCORES.get(name.partition(" ")[0], "prob")].sel(
            tracked=name, position=at, layer=layers
        )
        risen[name] = layers[_risen(values.transpose("example", "layer").values)]
    rows = []
    for one, other in combinations(risen, 2):
        mine, its = risen[one], risen[other]
        row = {"one": one, "other": other, "layer_one": mine.mean(), "layer_other": its.mean()}
        for name, first in (("one_first", mine < its), ("other_first", mine > its)):
            low, high = proportion_ci(int(first.sum()), len(first))
            row |= {name: first.mean(), f"{name}_lower": low, f"{name}_upper": high}
        rows.append({**row, "n": len(mine)})
    return pd.DataFrame(rows)
