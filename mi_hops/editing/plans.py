"""How CREME edits are made, and what that means in rows of tokens: which prompts, which keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.editing.moments import Moments
from mi_hops.editing.request import (
    Keep,
    Position,
    Request,
    check_bridge_known,
    check_templates,
    fill,
    key_position,
    require_second_hop,
)
from mi_hops.facts.templates import CONTEXTS
from mi_hops.model import HookedModel
from mi_hops.text.tokens import answer_ids, encode

Cover = Literal["first", "answer"]
Target = Literal["edited", "clean"]
Match = Literal["attention", "residual"]

#: The edit of the published code, where this package's defaults depart from it.
PAPER: dict[str, Any] = {"match": "attention", "cover": "first", "keep": None, "strength": 1.0}


@dataclass(frozen=True, kw_only=True)
class CremeSettings:
    """Settings of CREME edits, apart from the layers.

    The defaults are those measured best on the bundled models. `PAPER` holds the published code's
    settings where these depart from them, to be used with ``covariance=None``:
    ``creme(model, fact, layers=..., **PAPER)``.

    Attributes:
        form: of the prompts edited (facts only); default the first a fact has of both hops.
        covariance: second moments of z at the layers edited; None for C = I.
        templates: context templates, each with one ``{}``; keys and values are averaged over them.
        position: ``"last"`` token of the prompt, or the last one of the ``"first hop"`` (in the
            second-hop prompt: of the bridge).
        target: where v* comes from: the second-hop prompt run on the model as ``"edited"`` at lower
            layers (the published code), or on the ``"clean"`` model.
        match: what the edited layer is to reproduce at the key: the second-hop prompt's
            ``"attention"`` output (the paper), or its ``"residual"`` stream after attention, so that
            the change makes up for what earlier layers wrote differently as well.
        cover: ``"first"`` edits the prompt's key only; ``"answer"`` also the keys of the answer's
            own tokens but the last, so that the rest of the answer is carried over as well.
        keep: prompts at whose last token the attention output is to stay as it is: ``"hops"`` for
            the fact's own single-hop prompts of the form edited, or a function from a fact to
            prompts. A request brings its own; they count where this is not None.
        slack: how far kept prompts may move (see `solve.solve_keys`).
        strength: share of the change that is made; 1 reproduces the second-hop prompt at the key
            (the paper), less moves unrelated prompts less and the edited one usually still enough.
    """

    form: str | None = None
    covariance: Moments | None = None
    templates: tuple[str, ...] = CONTEXTS
    position: Position = "last"
    target: Target = "edited"
    match: Match = "residual"
    cover: Cover = "answer"
    keep: Keep = "hops"
    slack: float = 0.1
    strength: float = 0.7

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", check_templates(self.templates))
        kinds = {"position": Position, "target": Target, "match": Match, "cover": Cover}
        for name, kind in kinds.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; expected one of {get_args(kind)}")
        if not (self.keep in (None, "hops") or callable(self.keep)):
            raise ValueError(
                f"keep is {self.keep!r}; expected 'hops', a function of a fact, or None"
            )
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}; expected more than 0")
        if self.slack < 0:
            raise ValueError(f"slack is {self.slack}; expected 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the record of an edit."""
        return {
            **vars(self),
            "covariance": None if self.covariance is None else self.covariance.to_dict(),
            "templates": list(self.templates),
            "keep": getattr(self.keep, "__name__", self.keep),
        }


def default_layers(model: HookedModel) -> tuple[int, ...]:
    """The last third of the blocks (rounded up), where edits were measured to work best."""
    n = int(model.cfg.n_layers)
    return tuple(range(n - -(-n // 3), n))


@dataclass(frozen=True)
class Plan:
    """The rows of one fact: two-hop and second-hop prompts (each once per template), then kept ones.

    `two_hop` and `second_hop` hold, for each key, the position in each of those rows; `kept` the
    position in each kept row.
    """

    rows: tuple[tuple[int, ...], ...]
    two_hop: tuple[tuple[int, ...], ...]
    second_hop: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    @property
    def templates(self) -> int:
        """Number of context templates."""
        return len(self.two_hop[0])

    def edited(self, target: Target) -> list[bool]:
        """For each row whether the changes made at lower layers act on it."""
        n = self.templates
        return [True] * n + [target == "edited"] * n + [True] * len(self.kept)


def plan_request(model: HookedModel, request: Request, how: CremeSettings) -> Plan:
    """The tokens and positions of a request.

    Raises:
        ValueError: no second-hop prompt, a bridge unknown to the tokenizer, or an answer that is needed
            and lacking.
        TokenError: a prompt that does not fit the context, or a span that cannot be found.
    """
    require_second_hop(request)
    check_bridge_known(model, request)
    if how.cover == "answer" and not request.target:
        raise ValueError(
            f"edit request {request.id!r}: cover='answer' needs the target answer; "
            "name it, or pass cover='first'"
        )
    rows: list[tuple[int, ...]] = []
    where: list[list[tuple[int, ...]]] = []
    for text, phrase in (
        (request.two_hop_prompt, request.first_hop),
        (request.second_hop_prompt, request.bridge),
    ):
        at = []
        for template in how.templates:
            prompt = encode(model, fill(template, text))
            key = key_position(prompt, phrase, how.position, template)
            extra: tuple[int, ...] = ()
            if how.cover == "answer":
                extra = answer_ids(model, prompt, request.target)[:-1]
            rows.append((*prompt.ids, *extra))
            at.append((key, *(prompt.last + 1 + i for i in range(len(extra)))))
        where.append(at)
    kept = [encode(model, text) for text in request.keep] if how.keep else []
    rows += [p.ids for p in kept]
    two_hop, second_hop = (tuple(zip(*at, strict=True)) for at in where)
    return Plan(tuple(rows), two_hop, second_hop, tuple(p.last for p in kept))


def chunk_plans(plans: Sequence[Plan], batch_size: int) -> list[list[int]]:
    """Facts with prompts of similar length together, `batch_size` rows or one fact at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    order = sorted(range(len(plans)), key=lambda i: (max(map(len, plans[i].rows)), i))
    chunks: list[list[int]] = []
    rows = 0
    for i in order:
        rows += len(plans[i].rows)
        if not chunks or rows > batch_size:
            chunks.append([])
            rows = len(plans[i].rows)
        chunks[-1].append(i)
    return chunks


def read_plan(
    plan: Plan, start: int, z: Float[Tensor, "row pos d_in"], out: Float[Tensor, "row pos d_out"]
) -> tuple[Float[Tensor, "key d_in"], Float[Tensor, "kept d_in"], Float[Tensor, "key d_out"]]:
    """Keys, kept keys and changes of one fact, float64; keys and changes are means over templates.

    Args:
        start: row of `z` and `out` where the plan's rows begin.
        out: where the two-hop prompt is to become like the second-hop prompt.
    """
    n, device = plan.templates, z.device
    asked = torch.arange(start, start + n, device=device)[None]
    second = asked + n
    kept = torch.arange(len(plan.kept), device=device) + start + 2 * n
    at = torch.tensor(plan.two_hop, device=device)
    at_second = torch.tensor(plan.second_hop, device=device)
    at_kept = torch.tensor(plan.kept, dtype=torch.long, device=device)
    keys = z[asked, at].double().mean(1)
    change = out[second, at_second].double().mean(1) - out[asked, at].double().mean(1)
    return keys, z[kept, at_kept].double(), change
