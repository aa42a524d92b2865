"""MEMIT: many facts written into the MLPs of several layers at once (arXiv 2210.07229).

For each fact a vector δ is searched for (as in `rome`) that, added to the residual stream behind the
last of the layers at the subject's last token, makes the prompt right. Then, layer by layer from
below, each layer writes its share of what is still missing there: with keys K as rows and
``R = (z - h) / (layers left)``, z the stream wanted and h the stream as edited so far,
``W_out <- W_out + (λ C + K^T K)^-1 K^T R``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.baselines.rome import ValueSearch, mean_by_fact, search_values, teach_requests
from mi_hops.editing.change import Change, input_hook, merge
from mi_hops.editing.checks import check_editable, check_layers
from mi_hops.editing.edit import Edit
from mi_hops.editing.moments import Moments
from mi_hops.editing.passes import run_blocks
from mi_hops.editing.request import Request, requests_of
from mi_hops.editing.rows import edit_hooks
from mi_hops.editing.solve import inverse_times, solve_keys
from mi_hops.editing.teaching import chunks, require_targets
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, dtype_of, hook_name, processing_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.repair import Rows

if TYPE_CHECKING:
    from torch import Tensor


def memit(
    model: HookedModel,
    asked: Iterable[TwoHopFact | Request],
    *,
    layers: Sequence[int],
    covariance: Moments | None = None,
    ridge: float = 0.1,
    processed: bool = False,
    batch_size: int = 16,
    **search: Any,
) -> Edit:
    """One MEMIT edit for all facts together; the model is left as it is.

    Args:
        asked: facts or requests.
        layers: blocks whose MLPs are edited.
        covariance: second moments of the input of W_out; None for C = I.
        ridge: λ above, in units of the mean of the diagonal of ``K C^-1 K^T``.
        processed: edit processed (folded) weights.
        batch_size: facts in one pass.
        search: see `rome.ValueSearch`.

    Raises:
        ValueError: no facts, a negative ridge, or as `rome.rome_many`.
    """
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form)
    ground = Ground(covariance, ridge, processed, batch_size)
    return _write(model, requests, [range(len(requests))], layers, ground, how)[0]


def memit_many(
    model: HookedModel,
    asked: Iterable[TwoHopFact | Request],
    *,
    layers: Sequence[int],
    covariance: Moments | None = None,
    ridge: float = 0.1,
    processed: bool = False,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """MEMIT edits of many facts, each for itself, searched for together; arguments as `memit`."""
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form)
    ground = Ground(covariance, ridge, processed, batch_size)
    return _write(model, requests, [[i] for i in range(len(requests))], layers, ground, how)


@dataclass(frozen=True)
class Ground:
    """What an edit stands on besides its facts; see `memit`."""

    covariance: Moments | None
    ridge: float
    processed: bool
    batch_size: int


def _write(
    model: HookedModel,
    requests: Sequence[Request],
    groups: Sequence[Sequence[int]],
    layers: Sequence[int],
    ground: Ground,
    how: ValueSearch,
) -> list[Edit]:
    """One edit a group of requests (indices); each request is in one group."""
    require_targets(requests)
    if not requests or ground.ridge < 0:
        raise ValueError(
            f"{len(requests)} facts and ridge {ground.ridge}; expected some, and 0 or more"
        )
    chosen = check_layers(model, layers, "W_out")
    covariance = ground.covariance
    made_for = check_editable(model, covariance, chosen, processed=ground.processed, matrix="W_out")
    wide = wide_dtype(dtype_of(model))
    end = hook_name("resid_post", chosen[-1])
    parts = list(chunks(len(requests), ground.batch_size))
    added = torch.cat(
        [
            search_values(model, [requests[i] for i in part], chosen[-1], how, hook=end).values
            for part in parts
        ]
    )

    def edit(group: int) -> Edit:
        joint = [requests[i].to_dict() for i in groups[group]]
        return Edit(
            method="memit",
            changes=tuple(done[group]),
            fingerprint=made_for,
            processing=processing_of(model),
            request={"joint": joint},
            settings={
                "layers": list(chosen),
                "ridge": ground.ridge,
                "c": covariance is not None,
                **asdict(how),
            },
        )

    group_of = {i: g for g, members in enumerate(groups) for i in members}
    done: list[list[Change]] = [[] for _ in groups]
    wanted: Tensor | None = None
    for step, layer in enumerate(chosen):
        below = [edit(g) if step else None for g in range(len(groups))]
        found = [
            _read(
                model, [requests[i] for i in part], layer, end, how,
                [below[group_of[i]] for i in part],
            )
            for part in parts
        ]  # fmt: skip
        keys, stream = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        if wanted is None:
            wanted = stream + added.double()
        missing = (wanted - stream) / (len(chosen) - step)
        inverse = inverse_times(covariance, layer, keys)
        for g, members in enumerate(groups):
            rows = list(members)
            left = solve_keys(keys[rows], inverse=inverse[rows], ridge=ground.ridge)
            right = missing[rows].to(left.device, wide)  # from the last layer's device
            change = Change("W_out", layer, left.to(wide), right)
            done[g].append(merge([change]))
    return [edit(g) for g in range(len(groups))]


def _read(
    model: HookedModel,
    requests: Sequence[Request],
    layer: int,
    end: str,
    how: ValueSearch,
    below: Sequence[Edit | None],
) -> tuple[Tensor, Tensor]:
    """Keys at a layer and the stream at `end`, means over templates, each under its edit so far."""
    taught, where = teach_requests(model, requests, how)
    seen: dict[str, Tensor] = {}
    hooks: list[Hook] = edit_hooks(model, [below[i] for i in where.fact.tolist()])
    hooks += [
        (name, lambda x, name=name: seen.update({name: x}))  # type: ignore[misc]
        for name in (input_hook("W_out", layer), end)
    ]
    run_blocks(model, taught.tokens, int(end.split(".")[1]), hooks)
    n = len(requests)
    return (
        mean_by_fact(seen[input_hook("W_out", layer)], where, n),
        mean_by_fact(seen[end], where, n),
    )


class MemitRepair:
    """MEMIT as a `mi_hops.sweep.repair.Repair`.

    Args:
        layers: blocks whose MLPs are edited.
        joint: one edit for all facts, on every row; else one edit a fact, on its own rows.
        name: label in tables.
        settings: as `memit`.
    """

    def __init__(
        self, *, layers: Sequence[int], joint: bool = False, name: str = "MEMIT", **settings: Any
    ) -> None:
        self._layers, self._joint, self._name, self._settings = layers, joint, name, settings

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Edit]:
        """The same edit for every fact, or one each."""
        if self._joint:
            return [memit(model, facts, layers=self._layers, **self._settings)] * len(facts)
        return memit_many(model, facts, layers=self._layers, **self._settings)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its edit."""
        return edit_hooks(model, states)
