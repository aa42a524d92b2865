"""ROME: one fact written into one MLP as a key and a value (arXiv 2202.05262).

The key is the input of W_out at the last token of the subject (here the first-hop phrase), averaged
over context templates. The value is searched for: a vector δ added to the MLP's output there, by
gradient, so that the prompt is answered with the target while what the subject itself continues
with stays (the KL term)::

    min_δ  mean over templates of -log P(answer) / tokens
           + kl KL(P_δ[. | "subject is"] || P[. | "subject is"]) + decay |δ|^2 / |v|^2
    W_out <- W_out + (C^-1 k / k^T C^-1 k) δ^T,   |δ| <= clamp |v|

with v the MLP's output at the key before the edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.change import Change, input_hook, output_hook
from mi_hops.editing.checks import check_editable, check_layers
from mi_hops.editing.edit import Edit
from mi_hops.editing.moments import Moments
from mi_hops.editing.passes import run_blocks
from mi_hops.editing.request import (
    Position,
    Request,
    check_templates,
    fill,
    key_position,
    requests_of,
)
from mi_hops.editing.rows import edit_hooks
from mi_hops.editing.solve import inverse_times, solve_keys
from mi_hops.editing.teaching import (
    TeacherForcedBatch,
    answer_loss,
    chunks,
    frozen,
    kl,
    last_logp,
    lesson,
    minimise,
    require_targets,
)
from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import CONTEXTS, capitalise
from mi_hops.model import Hook, HookedModel, dtype_of, processing_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.repair import Rows
from mi_hops.text.tokens import Prompt, encode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How a value is searched for.

    Attributes:
        form: of the prompt taught (facts only); default the first the fact has of both hops.
        templates: context templates the loss is averaged over.
        position: where the key is read and the value written: the ``"subject"``'s last token or the
            prompt's ``"last"``.
        steps, lr: of Adam.
        kl, decay, clamp: weights and bound in the module's formula.
    """

    form: str | None = None
    templates: tuple[str, ...] = CONTEXTS
    position: Position = "subject"
    steps: int = 25
    lr: float = 0.3
    kl: float = 0.0625
    decay: float = 0.02
    clamp: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        check_templates(self.templates)
        if self.position not in ("last", "subject"):
            raise ValueError(f"position is {self.position!r}; expected 'last' or 'subject'")
        if self.steps < 1 or self.lr <= 0 or self.clamp <= 0 or min(self.kl, self.decay) < 0:
            raise ValueError(
                f"steps {self.steps}, lr {self.lr}, clamp {self.clamp}, kl {self.kl}, decay "
                f"{self.decay}; expected steps, lr and clamp above 0, the others not below"
            )


def rome_many(
    model: HookedModel,
    asked: Iterable[TwoHopFact | Request],
    *,
    layer: int,
    covariance: Moments | None = None,
    processed: bool = False,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """ROME edits of many facts, each for itself; the model is left as it is.

    Args:
        asked: facts or requests; the composite prompt is taught its target.
        layer: the block whose MLP is edited.
        covariance: second moments of the input of W_out; None for C = I.
        processed: edit processed (folded) weights.
        batch_size: facts searched for at a time.
        search: see `ValueSearch`.

    Raises:
        ValueError: as for CREME; a request without target or, for position ``"subject"``, without
            subject; a search that diverges.
    """
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form)
    require_targets(requests)
    (layer,) = check_layers(model, [layer], "W_out")
    made_for = check_editable(model, covariance, [layer], processed=processed, matrix="W_out")
    edits = []
    for part in chunks(len(requests), batch_size):
        found = search_values(model, [requests[i] for i in part], layer, how)
        inverse = inverse_times(covariance, layer, found.keys)
        for i, key, c_key, value in zip(part, found.keys, inverse, found.values, strict=True):
            left = solve_keys(key[None], inverse=c_key[None])
            change = Change("W_out", layer, left.to(value.dtype), value[None])
            edits.append(
                Edit(
                    method="rome",
                    changes=(change,),
                    fingerprint=made_for,
                    processing=processing_of(model),
                    request=requests[i].to_dict(),
                    settings={"layer": layer, "c": covariance is not None, **asdict(how)},
                )
            )
    return edits


def rome(model: HookedModel, asked: TwoHopFact | Request, *, layer: int, **settings: Any) -> Edit:
    """The ROME edit of one fact; see `rome_many`."""
    return rome_many(model, [asked], layer=layer, **settings)[0]


class RomeRepair:
    """ROME as a `mi_hops.sweep.repair.Repair`; settings as `rome_many`."""

    def __init__(self, *, layer: int, name: str = "ROME", **settings: Any) -> None:
        self._layer, self._name, self._settings = layer, name, settings

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Edit]:
        """One edit a fact."""
        return rome_many(model, facts, layer=self._layer, **self._settings)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own edit."""
        return edit_hooks(model, states)


# -- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Keys ``[fact, d_mlp]`` (float64) and searched additions ``[fact, d_model]``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Where:
    """Rows of a lesson: which fact each belongs to, and its key's position."""

    fact: Tensor
    position: Tensor


def search_values(
    model: HookedModel, requests: Sequence[Request], layer: int, how: ValueSearch, hook: str = ""
) -> Found:
    """Additions to the MLP's output (or at another `hook`) that make each fact's prompt right."""
    hook = hook or output_hook("W_out", layer)
    taught, where = teach_requests(model, requests, how)
    essence = [encode(model, _essence(r)) for r in requests]
    at_essence = Where(
        torch.arange(len(requests)), torch.tensor([p.last - _tail(p, r) for p, r in zip(essence, requests, strict=True)])
    )  # fmt: skip
    seen: dict[str, Tensor] = {}
    names = (input_hook("W_out", layer), hook)
    run_blocks(
        model,
        taught.tokens,
        layer,
        [(n, lambda x, n=n: seen.update({n: x.flatten(2)})) for n in names],  # type: ignore[misc]
    )
    keys = mean_by_fact(seen[names[0]], where, len(requests))
    size = mean_by_fact(seen[hook], where, len(requests)).norm(dim=1, keepdim=True)
    wide = wide_dtype(dtype_of(model))
    delta = torch.zeros(
        len(requests), model.cfg.d_model, dtype=wide, device=keys.device, requires_grad=True
    )
    size = size.to(wide)
    with torch.no_grad():
        before = last_logp(model, essence)

    def loss() -> Tensor:
        right = answer_loss(model, taught, [(hook, add_at(where, delta))]).sum()
        right = right / len(how.templates)
        after = last_logp(model, essence, [(hook, add_at(at_essence, delta))])
        small = (delta.norm(dim=1, keepdim=True) / size).square().sum()
        # The read-out may lie on another device than the layer searched at.
        return right + how.kl * kl(after, before).sum() + how.decay * small.to(right.device)

    def clamp() -> None:
        norm = delta.norm(dim=1, keepdim=True)
        delta.mul_((how.clamp * size / norm.clamp_min(1e-12)).clamp_max(1.0))

    with frozen(model):
        minimise([delta], loss, steps=how.steps, lr=how.lr, after=clamp)
    return Found(keys, delta.detach())


def teach_requests(
    model: HookedModel, requests: Sequence[Request], how: ValueSearch
) -> tuple[TeacherForcedBatch, Where]:
    """Each request's composite in every template with its target, and where the keys stand."""
    texts = [fill(t, r.composite) for r in requests for t in how.templates]
    taught = lesson(model, texts, [r.target for r in requests for _ in how.templates])
    owners = [i for i in range(len(requests)) for _ in how.templates]
    positions = [
        key_position(prompt, requests[i].subject, how.position)
        for i, prompt in zip(owners, taught.prompts, strict=True)
    ]
    return taught, Where(torch.tensor(owners), torch.tensor(positions))


def mean_by_fact(x: Tensor, where: Where, n: int) -> Tensor:
    """Mean over each fact's rows of `x` at its key, ``[fact, d]``, float64."""
    fact, position = where.fact.to(x.device), where.position.to(x.device)
    rows = x[torch.arange(len(fact), device=x.device), position].double()
    total = rows.new_zeros(n, rows.shape[1]).index_add_(0, fact, rows)
    return total / torch.bincount(fact, minlength=n)[:, None]


def add_at(where: Where, delta: Tensor) -> Any:
    """A hook that adds each row's fact's vector at its key; gradients flow to `delta`."""

    def fn(x: Tensor) -> Tensor:
        fact, position = where.fact.to(x.device), where.position.to(x.device)
        out = x.clone()
        rows = torch.arange(len(fact), device=x.device)
        out[rows, position] = out[rows, position] + delta.to(x.device)[fact].to(x.dtype)
        return out

    return fn


def _essence(request: Request) -> str:
    """The subject with a bare copula: what it is should stay."""
    return f"{capitalise(request.subject or request.composite)} is"


def _tail(prompt: Prompt, request: Request) -> int:
    """Tokens of the essence prompt after the subject."""
    subject = request.subject or request.composite
    return prompt.last - key_position(prompt, capitalise(subject), "subject")
