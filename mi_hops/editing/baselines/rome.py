"""ROME: one fact written into one MLP as a key and a value (arXiv 2202.05262).

The key is the input of W_out at the last token of the subject (here the first-hop phrase), averaged
over context templates. The value is searched for: a vector δ added to the MLP's output there, by
gradient, so that the prompt is answered with the target while what the subject itself continues
with stays (the KL term)::

    min_δ  mean over templates of -log P(answer) / tokens
           + kl KL(P_δ[. | "subject is"] || P[. | "subject is"]) + decay |δ|^2 / |v|^2
    W_out <- W_out + (C^-1 k / k^T C^-1 k) δ^T,   |δ| <= clamp |v|

with v the MLP's output at the key before the edit, also averaged. ``repository=True`` takes the
choices of the published repository where they differ: ``decay |δ| / |v|^2``, v and the place where
δ is met are those of the first template (the bare prompt), and the search of a fact ends once its
loss is below 0.05, one step early at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.editing.change import input_hook, output_hook
from mi_hops.editing.checks import check_editable
from mi_hops.editing.edit import Edit
from mi_hops.editing.moments import Moments
from mi_hops.editing.passes import activations
from mi_hops.editing.request import (
    Asked,
    Position,
    Request,
    check_templates,
    key_position,
    requests_of,
)
from mi_hops.editing.rows import EditorRepair
from mi_hops.editing.solve import solve_keys
from mi_hops.editing.teaching import (
    TeacherForcedBatch,
    alike_in_length,
    answer_loss,
    cache_of,
    frozen,
    in_templates,
    last_logp,
    minimise,
)
from mi_hops.facts.templates import CONTEXTS, capitalise
from mi_hops.model import HookedModel, dtype_of
from mi_hops.model.numeric import kl_divergence, wide_dtype
from mi_hops.text.tokens import Prompt, encode, pad

# The repository's search of a fact ends below this loss.
_ENOUGH = 0.05


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How a value is optimised.

    Attributes:
        form: of the prompt taught (facts only); default the first the fact has of both hops.
        templates: context templates the loss is averaged over.
        position: where the key is read and the value written: the last token of the ``"first hop"``
            (what the paper calls the subject), or the prompt's ``"last"``.
        steps, lr: of Adam.
        kl, decay, clamp: weights and bound in the module's formula.
        repository: the choices of the published repository where they differ from the formula (see
            above; the first template is to be ``"{}"``).
    """

    form: str | None = None
    templates: tuple[str, ...] = CONTEXTS
    position: Position = "first hop"
    steps: int = 25
    lr: float = 0.3
    kl: float = 0.0625
    decay: float = 0.02
    clamp: float = 4.0
    repository: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates))
        if self.position not in ("last", "first hop"):
            raise ValueError(f"position is {self.position!r}; expected 'last' or 'first hop'")
        if self.steps < 1 or self.lr <= 0 or self.clamp <= 0 or min(self.kl, self.decay) < 0:
            raise ValueError(
                f"steps {self.steps}, lr {self.lr}, clamp {self.clamp}, kl {self.kl}, decay "
                f"{self.decay}; expected steps, lr and clamp above 0, the others not below"
            )


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def rome_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layer: int,
    covariance: Moments | None = None,
    batch_size: int = 16,
    **search: Any,
) -> list[Edit]:
    """ROME edits of many facts, one edit per fact; the model is left unchanged.

    Args:
        asked: facts or requests; the two-hop prompt is taught its target.
        layer: the block whose MLP is edited.
        covariance: second moments of the input of W_out; None for C = I.
        batch_size: facts searched for at a time.
        search: of `ValueSearch`.

    Raises:
        ValueError: as for CREME; a request without target or, for position ``"first hop"``,
            without one; a search that diverges.
    """
    how = ValueSearch(**search)
    requests = requests_of(asked, how.form, taught=True)
    editable = check_editable(model, layer, "W_out", covariance)
    settings = {"layer": layer, "c": covariance is not None, **asdict(how)}
    if not requests:
        return []
    found = search_values(model, requests, layer, how, batch_size=batch_size)
    inverse = editable.inverse_times(layer, found.keys)
    edits = []
    for i, request in enumerate(requests):
        left = solve_keys(found.keys[i, None], inverse=inverse[i, None])
        if how.repository:
            left = left / (left @ found.bare[i])
        change = editable.change(layer, left, found.values[i, None])
        edits.append(editable.edit("rome", request.to_dict(), [change], settings))
    return edits


def rome(model: HookedModel, asked: Asked, *, layer: int, **settings: Any) -> Edit:
    """The ROME edit of one fact; see `rome_many`."""
    return rome_many(model, [asked], layer=layer, **settings)[0]


class RomeRepair(EditorRepair):
    """ROME as a repair; settings of `rome_many`."""

    def __init__(self, *, layer: int, name: str = "ROME", **settings: Any) -> None:
        super().__init__(rome_many, name=name, layer=layer, **settings)


# -- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What was searched for.

    Attributes:
        keys: means over templates, float64.
        bare: the keys of the first template alone, float64.
        values: additions to the output.
    """

    keys: Float[Tensor, "fact d_in"]
    bare: Float[Tensor, "fact d_in"]
    values: Float[Tensor, "fact d_model"]


@dataclass(frozen=True)
class Place:
    """Rows of a batch: the fact each belongs to, and the position of its key."""

    fact: Int[Tensor, "row"]
    position: Int[Tensor, "row"]

    def behind(self, start: int) -> Place:
        """Positions counted from another one."""
        return Place(self.fact, self.position - start)

    def at_keys(self, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row d"]:
        """Each row at its key, float64."""
        rows = torch.arange(len(self.fact), device=x.device)
        return x[rows, self.position.to(x.device)].double()

    def adding(self, delta: Float[Tensor, "fact d"]) -> Callable[[Tensor], Tensor]:
        """A hook that adds each row's fact's vector at its key; gradients flow to `delta`."""

        def add(x: Tensor) -> Tensor:
            fact, position = self.fact.to(x.device), self.position.to(x.device)
            rows = torch.arange(len(fact), device=x.device)
            out = x.clone()
            out[rows, position] = out[rows, position] + delta.to(x.device)[fact].to(x.dtype)
            return out

        return add


def search_values(
    model: HookedModel,
    requests: Sequence[Request],
    layer: int,
    how: ValueSearch,
    *,
    hook: str = "",
    batch_size: int = 16,
) -> Found:
    """Additions to the MLP's output (or at another `hook`) by which each fact's prompt is answered.

    What comes before the first key of a batch is run once, and not in every step.
    """
    hook = hook or output_hook("W_out", layer)
    together, back = alike_in_length(model, requests, batch_size)
    parts = [_search([requests[i] for i in part], model, layer, how, hook) for part in together]
    keys, bare, values = (
        torch.cat([getattr(part, name) for part in parts])[back]
        for name in ("keys", "bare", "values")
    )
    return Found(keys, bare, values)


def _search(
    requests: Sequence[Request], model: HookedModel, layer: int, how: ValueSearch, hook: str
) -> Found:
    """Of one batch."""
    n = len(requests)
    batch, place = teach_requests(model, requests, how)
    essence = [encode(model, _essence(r)) for r in requests]
    ends = [p.last - _tail(p, r) for p, r in zip(essence, requests, strict=True)]
    at_essence = Place(torch.arange(n), torch.tensor(ends))
    at_key, at_output = (
        place.at_keys(x)
        for x in activations(model, batch.tokens, (input_hook("W_out", layer), hook))
    )
    keys, bare = mean_by_fact(at_key, n), at_key[:: len(how.templates)]
    output = at_output[:: len(how.templates)] if how.repository else mean_by_fact(at_output, n)
    wide = wide_dtype(dtype_of(model))
    size = output.norm(dim=1, keepdim=True).to(wide)
    delta = torch.zeros(n, model.cfg.d_model, dtype=wide, device=keys.device, requires_grad=True)
    start, at = int(place.position.min()), min(ends)
    batch, place, at_essence = (
        batch.behind(model, start),
        place.behind(start),
        at_essence.behind(at),
    )
    cached: dict[str, Any] = {
        "start": at,
        "cache": cache_of(model, pad([p.ids for p in essence]).tokens[:, :at]),
    }
    with torch.no_grad():
        before = last_logp(model, essence, **cached)

    def loss() -> Float[Tensor, "fact"]:
        taught = answer_loss(model, batch, [(hook, place.adding(delta))])
        taught = reduce(taught, "(fact template) -> fact", "mean", fact=n)
        after = last_logp(model, essence, [(hook, at_essence.adding(delta))], **cached)
        if how.repository:
            small = delta.norm(dim=1) / size[:, 0].square()
        else:
            small = (delta.norm(dim=1) / size[:, 0]).square()
        # The read-out may lie on another device than the layer searched at.
        kept = how.kl * kl_divergence(after, before)
        return taught + kept + how.decay * small.to(taught.device)

    def clamp() -> None:
        norm = delta.norm(dim=1, keepdim=True)
        delta.mul_((how.clamp * size / norm.clamp_min(1e-12)).clamp_max(1.0))

    steps, enough = (how.steps - 1, _ENOUGH) if how.repository else (how.steps, None)
    with frozen(model):
        minimise([delta], loss, steps=steps, lr=how.lr, after=clamp, enough=enough)
    return Found(keys, bare, delta.detach())


def teach_requests(
    model: HookedModel, requests: Sequence[Request], how: ValueSearch
) -> tuple[TeacherForcedBatch, Place]:
    """Each request's prompt in every template with its target, and the places of the keys."""
    batch = in_templates(model, requests, how.templates)
    facts = repeat(torch.arange(len(requests)), "fact -> (fact t)", t=len(how.templates))
    templates = how.templates * len(requests)
    positions = [
        key_position(prompt, requests[i].first_hop, how.position, template)
        for i, prompt, template in zip(facts.tolist(), batch.prompts, templates, strict=True)
    ]
    return batch, Place(facts, torch.tensor(positions))


def mean_by_fact(rows: Float[Tensor, "row d"], n: int) -> Float[Tensor, "fact d"]:
    """Means over each fact's templates."""
    return reduce(rows, "(fact template) d -> fact d", "mean", fact=n)


def _essence(request: Request) -> str:
    """The first hop with a bare copula: what it is should stay."""
    return f"{capitalise(request.first_hop or request.two_hop_prompt)} is"


def _tail(prompt: Prompt, request: Request) -> int:
    """Tokens of the essence prompt after the first hop."""
    phrase = request.first_hop or request.two_hop_prompt
    return prompt.last - key_position(prompt, capitalise(phrase), "first hop", "{} is")
