"""MEMIT: many facts written into the MLPs of several layers at once (arXiv 2210.07229).

For each fact a vector δ is searched for (as in `rome`) that, added to the residual stream behind the
last of the layers at the subject's last token, makes the prompt be answered correctly. Then, layer by
layer from below, each layer writes its share of what is still missing there: with keys K as rows and
``R = (z - h) / (layers left)``, z the stream wanted and h the stream as edited so far,
``W_out <- W_out + (λ C + K^T K)^-1 K^T R``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.editing.baselines.rome import ValueSearch, mean_by_fact, search_values, teach_requests
from mi_hops.editing.change import Change, input_hook, merge
from mi_hops.editing.checks import check_editable
from mi_hops.editing.edit import Edit
from mi_hops.editing.moments import Moments
from mi_hops.editing.passes import activations
from mi_hops.editing.request import Asked, Request, requests_of
from mi_hops.editing.rows import EditorRepair, edit_hooks
from mi_hops.editing.solve import solve_keys
from mi_hops.editing.teaching import chunks
from mi_hops.model import HookedModel, hook_name


@dataclass(frozen=True, kw_only=True)
class MemitSettings:
    """Where and how MEMIT writes; the search aside.

    Attributes:
        layers: blocks whose MLPs are edited.
        covariance: second moments of the input of W_out; None for C = I.
        ridge: λ above, in units of the mean of the diagonal of ``K C^-1 K^T``.
        batch_size: facts in one pass.
    """

    layers: Sequence[int]
    covariance: Moments | None = None
    ridge: float = 0.1
    batch_size: int = 16


def memit(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Sequence[int],
    covariance: Moments | None = None,
    ridge: float = 0.1,
    batch_size: int = 16,
    **search: Any,
) -> Edit:
    """One MEMIT edit for all facts together; the model is left as it is.

    Args:
        asked: facts or requests.
        layers, covariance, ridge, batch_size: as `MemitSettings`.
        search: of `rome.ValueSearch`.

    Raises:
        ValueError: no facts, a negative ridge, or as `rome.rome_many`.
    """
    where = MemitSettings(layers=layers, covariance=covariance, ridge=ridge, batch_size=batch_size)
    return _write(model, asked, where, ValueSearch(**search), joint=True)[0]


def memit_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Sequence[int],
    covariance: Moments | None = None,
    ridge: float = 0.1,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """MEMIT edits of many facts, each for itself, searched for together; arguments as `memit`."""
    where = MemitSettings(layers=layers, covariance=covariance, ridge=ridge, batch_size=batch_size)
    return _write(model, asked, where, ValueSearch(**search), joint=False)


class MemitRepair(EditorRepair):
    """MEMIT as a repair.

    Args:
        layers: blocks whose MLPs are edited.
        joint: one edit for all facts, on every row; else one edit per fact, on its own rows.
        name: label in tables.
        settings: of `memit`.
    """

    def __init__(
        self, *, layers: Sequence[int], joint: bool = False, name: str = "MEMIT", **settings: Any
    ) -> None:
        editor = _one_for_all if joint else memit_many
        super().__init__(editor, name=name, layers=layers, **settings)


def _one_for_all(model: HookedModel, facts: Sequence[Asked], **settings: Any) -> list[Edit]:
    return [memit(model, facts, **settings)] * len(facts)


def _write(
    model: HookedModel,
    asked: Iterable[Asked],
    where: MemitSettings,
    how: ValueSearch,
    *,
    joint: bool,
) -> list[Edit]:
    """One edit for all facts, or one each."""
    requests = requests_of(asked, how.form, taught=True)
    if not requests or where.ridge < 0:
        raise ValueError(
            f"{len(requests)} facts and ridge {where.ridge}; expected some, and 0 or more"
        )
    editable = check_editable(model, where.layers, "W_out", where.covariance)
    layers = editable.layers
    end = hook_name("resid_post", layers[-1])
    parts = list(chunks(len(requests), where.batch_size))
    added = torch.cat(
        [
            search_values(model, [requests[i] for i in part], layers[-1], how, hook=end).values
            for part in parts
        ]
    )
    groups = [list(range(len(requests)))] if joint else [[i] for i in range(len(requests))]
    settings = {
        "layers": list(layers),
        "ridge": where.ridge,
        "c": where.covariance is not None,
        **asdict(how),
    }

    def edit(group: int) -> Edit:
        request = {"joint": [requests[i].to_dict() for i in groups[group]]}
        return editable.edit("memit", request, done[group], settings)

    done: list[list[Change]] = [[] for _ in groups]
    wanted: Tensor | None = None
    for step, layer in enumerate(layers):
        made = [edit(g) if step else None for g in range(len(groups))]
        below = made * len(requests) if joint else made
        found = [
            _read(
                model,
                [requests[i] for i in part],
                (layer, layers[-1]),
                how,
                [below[i] for i in part],
            )
            for part in parts
        ]
        keys, stream = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        if wanted is None:
            wanted = stream + added.double()
        missing = (wanted - stream) / (len(layers) - step)
        inverse = editable.inverse_times(layer, keys)
        for g, members in enumerate(groups):
            left = solve_keys(keys[members], inverse=inverse[members], ridge=where.ridge)
            right = missing[members].to(left.device)  # from the last layer's device
            done[g].append(merge([editable.change(layer, left, right)]))
    return [edit(g) for g in range(len(groups))]


def _read(
    model: HookedModel,
    requests: Sequence[Request],
    layers: tuple[int, int],
    how: ValueSearch,
    below: Sequence[Edit | None],
) -> tuple[Float[Tensor, "fact d_mlp"], Float[Tensor, "fact d_model"]]:
    """Keys at the first layer and the stream behind the last, each fact under its edit so far."""
    batch, place = teach_requests(model, requests, how)
    hooks = edit_hooks(model, [below[i] for i in place.fact.tolist()])
    names = (input_hook("W_out", layers[0]), hook_name("resid_post", layers[1]))
    keys, stream = activations(model, batch.tokens, layers[1], names, hooks)
    n = len(requests)
    return mean_by_fact(place.at_keys(keys), n), mean_by_fact(place.at_keys(stream), n)
