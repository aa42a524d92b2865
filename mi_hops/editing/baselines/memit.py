"""MEMIT: many facts written into the MLPs of several layers at once (arXiv 2210.07229).

For each fact a vector δ is searched for (as in `rome`) that, added to the residual stream behind the
last of the layers at the subject's last token, makes the model answer the prompt correctly. Then, layer by
layer from below, each layer writes its share of what is still missing there: with keys K as rows and
``R = (z - h) / (layers left)``, z the stream wanted and h the stream as edited so far,
``W_out <- W_out + (λ C + K^T K)^-1 K^T R``.

AlphaEdit (arXiv 2410.02355) is the same with the changes held to the null space of C
(``covariance=c.with_null_space(...)``), and with the keys of earlier edits kept where edits are made one
after the other (`memit_sequential`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
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
    """One joint MEMIT edit for all facts; the model is unchanged. Arguments as in `memit_many`."""
    return memit_many(model, asked, joint=True, **settings)[0]


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
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
    """MEMIT edits of many facts, one each or one for all; the model is left unchanged.

    Args:
        asked: facts or requests.
        layers: blocks whose MLPs are edited.
        joint: solve the keys of all facts together; every fact gets the same edit.
        covariance: second moments of the input of W_out; None for C = I. Held to its null space,
            this is AlphaEdit.
        ridge: λ above, in units of the mean of the diagonal of ``K C^-1 K^T``.
        batch_size: facts searched for at a time.
        search: of `rome.ValueSearch`.

    Raises:
        ValueError: no facts, a negative ridge, requests that contradict one another (`joint`), or
            as `rome.rome_many`.
    """
    made = _Memit(model, layers, covariance, ridge, batch_size, ValueSearch(**search))
    requests = requests_of(asked, made.how.form, taught=True)
    if joint:
        check_together(requests)
    groups = [list(range(len(requests)))] if joint else [[i] for i in range(len(requests))]
    edits, _ = made.edits(requests, groups)
    return edits * len(requests) if joint else edits


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def memit_sequential(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: int | Sequence[int],
    size: int = 1,
    hold: bool = True,
    covariance: Moments | None = None,
    ridge: float = 0.1,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """MEMIT edits in sequence, each on the model as edited so far; the model is left unchanged.

    With a covariance held to its null space this is AlphaEdit. To have the edits as one,
    ``mi_hops.editing.stack(edits, check=False)``.

    Args:
        size: facts solved together in each edit.
        hold: the outputs at the keys of earlier edits stay, as far as `ridge` lets them.
        layers, covariance, ridge, batch_size, search: as in `memit_many`.

    Returns:
        One edit for each `size` facts.

    Raises:
        ValueError: as `memit_many`.
    """
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form, taught=True)
    check_together(requests)
    held: dict[int, Tensor] = {}
    edits: list[Edit] = []
    with ExitStack() as applied:
        for part in chunks(len(requests), size):
            made = _Memit(model, layers, covariance, ridge, batch_size, how)
            (edit,), keys = made.edits([requests[i] for i in part], [list(range(len(part)))], held)
            edits.append(edit)
            applied.enter_context(edit.applied(model, check=False))
            for layer, each in keys.items() if hold else ():
                held[layer] = torch.cat([held[layer], each]) if layer in held else each
    return edits


class _Memit:
    """The layers of a model as it is, and how they are edited."""

    def __init__(
        self,
        model: HookedModel,
        layers: int | Sequence[int],
        covariance: Moments | None,
        ridge: float,
        batch_size: int,
        how: ValueSearch,
    ) -> None:
        if ridge < 0:
            raise ValueError(f"ridge is {ridge}; expected 0 or more")
        self.editable = check_editable(model, layers, "W_out", covariance)
        self.model, self.ridge, self.batch_size, self.how = model, ridge, batch_size, how

    def edits(
        self,
        requests: Sequence[Request],
        groups: Sequence[Sequence[int]],
        held: Mapping[int, Tensor] | None = None,
    ) -> tuple[list[Edit], dict[int, Tensor]]:
        """One edit per group of requests, and by layer the keys they act on.

        Args:
            held: layer -> keys at which the outputs are to stay.
        """
        n = len(requests)
        if not n:
            raise ValueError("0 facts to edit; expected some")
        model, how, where = self.model, self.how, self.editable.layers
        covariance = self.editable.covariance
        settings = {
            "layers": list(where),
            "ridge": self.ridge,
            "c": None if covariance is None else covariance.to_dict(),
            **asdict(how),
        }
        end = hook_name("resid_post", where[-1])
        size = self.batch_size
        added = search_values(model, requests, where[-1], how, hook=end, batch_size=size).values
        parts = [[requests[i] for i in part] for part in chunks(n, size)]
        group_of = {i: g for g, members in enumerate(groups) for i in members}

        def edit(group: int) -> Edit:
            request = {"joint": [requests[i].to_dict() for i in groups[group]]}
            return self.editable.edit("memit", request, done[group], settings)

        done: list[list[Change]] = [[] for _ in groups]
        acted: dict[int, Tensor] = {}
        wanted: Tensor | None = None
        for step, layer in enumerate(where):
            so_far = [edit(group) for group in range(len(groups))] if step else [None] * len(groups)
            below = iter([so_far[group_of[i]] for i in range(n)])
            found = [
                _read(model, part, (layer, where[-1]), how, [next(below) for _ in part])
                for part in parts
            ]
            keys, stream = (torch.cat(pieces) for pieces in zip(*found, strict=True))
            if wanted is None:
                wanted = stream + added.double()
            missing = (wanted - stream) / (len(where) - step)
            kept = held[layer].to(keys.device) if held else keys[:0]
            inverse = self.editable.inverse_times(layer, torch.cat([keys, kept]))
            for group, members in enumerate(groups):
                left = solve_keys(
                    keys[members],
                    kept if len(kept) else None,
                    inverse=torch.cat([inverse[members], inverse[n:]]),
                    slack=self.ridge,
                    ridge=self.ridge,
                )
                right = missing[members].to(left.device)  # from the last layer's device
                done[group].append(merge([self.editable.change(layer, left, right)]))
            acted[layer] = keys
        return [edit(group) for group in range(len(groups))], acted


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
    keys, stream = activations(model, batch.tokens, names, hooks)
    n = len(requests)
    return mean_by_fact(place.at_keys(keys), n), mean_by_fact(place.at_keys(stream), n)
