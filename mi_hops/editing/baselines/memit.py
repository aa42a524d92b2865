"""MEMIT: many facts written into the MLPs of several layers at once (arXiv 2210.07229).

For each fact a vector δ is searched for (as in `rome`) that, added to the residual stream behind the
last of the layers at the subject's last token, makes the model answer the prompt correctly. Then, layer by
layer from below, each layer writes its share of what is still missing there: with keys K as rows and
``R = (z - h) / (layers left)``, z the stream wanted and h the stream as edited so far,
``W_out <- W_out + (λ C + K^T K)^-1 K^T R``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
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
from mi_hops.editing.request import Asked, Request, check_together, requests_of
from mi_hops.editing.rows import EditorRepair, edit_hooks
from mi_hops.editing.solve import solve_keys
from mi_hops.editing.teaching import chunks
from mi_hops.model import HookedModel, hook_name


def memit(model: HookedModel, asked: Iterable[Asked], **settings: Any) -> Edit:
    """One MEMIT edit for all facts together; the model is left as it is; arguments as `memit_many`."""
    return memit_many(model, asked, joint=True, **settings)[0]


def memit_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: int | Sequence[int],
    joint: bool = False,
    covariance: Moments | None = None,
    ridge: float = 0.1,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """MEMIT edits of many facts, one each, or one for all of them; the model is left as it is.

    Args:
        asked: facts or requests.
        layers: blocks whose MLPs are edited.
        joint: solve the keys of all facts together; every fact gets the same edit.
        covariance: second moments of the input of W_out; None for C = I.
        ridge: λ above, in units of the mean of the diagonal of ``K C^-1 K^T``.
        batch_size: facts searched for at a time.
        search: of `rome.ValueSearch`.

    Raises:
        ValueError: no facts, a negative ridge, requests that contradict one another (`joint`), or as `rome.rome_many`.
    """
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form, taught=True)
    n = len(requests)
    if not requests or ridge < 0:
        raise ValueError(f"{n} facts and ridge {ridge}; expected some, and 0 or more")
    if joint:
        check_together(requests)
    editable = check_editable(model, layers, "W_out", covariance)
    where = editable.layers
    end = hook_name("resid_post", where[-1])
    parts = [[requests[i] for i in part] for part in chunks(n, batch_size)]
    added = torch.cat(
        [search_values(model, part, where[-1], how, hook=end).values for part in parts]
    )
    groups = [list(range(n))] if joint else [[i] for i in range(n)]
    settings = {"layers": list(where), "ridge": ridge, "c": covariance is not None, **asdict(how)}

    def edit(group: int) -> Edit:
        request = {"joint": [requests[i].to_dict() for i in groups[group]]}
        return editable.edit("memit", request, done[group], settings)

    def edits() -> list[Edit]:
        made = [edit(group) for group in range(len(groups))]
        return made * n if joint else made

    done: list[list[Change]] = [[] for _ in groups]
    wanted: Tensor | None = None
    for step, layer in enumerate(where):
        below = iter(edits() if step else [None] * n)
        found = [
            _read(model, part, (layer, where[-1]), how, [next(below) for _ in part])
            for part in parts
        ]
        keys, stream = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        if wanted is None:
            wanted = stream + added.double()
        missing = (wanted - stream) / (len(where) - step)
        inverse = editable.inverse_times(layer, keys)
        for group, members in enumerate(groups):
            left = solve_keys(keys[members], inverse=inverse[members], ridge=ridge)
            right = missing[members].to(left.device)  # from the last layer's device
            done[group].append(merge([editable.change(layer, left, right)]))
    return edits()


class MemitRepair(EditorRepair):
    """MEMIT as a repair; settings of `memit_many`."""

    def __init__(
        self, *, layers: int | Sequence[int], name: str = "MEMIT", **settings: Any
    ) -> None:
        super().__init__(memit_many, name=name, layers=layers, **settings)


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
