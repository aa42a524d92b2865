"""Does the bridge cause the answer? Erase it from a hidden state and see what is left.

At one layer and position the block's output h is changed so that the bridge's tokens read lowest
in the lens, and the forward pass goes on. Two forms, both on the raw lens v = W_U h (no norm):

* ``published`` (arXiv 2402.14328, released code): a change of the lens read-out is requested, the
  bridge's logits down to the minimum, and mapped back through the pseudo-inverse of W_U (directions
  that W_U does not read, as where folding centred it, are left out of it); a
  *recheck* then pushes the answer's logits, times 10, back towards where they were. Only the part
  of the request that lies in W_U's column space is realised, so the minimum is not reached.
* ``exact``: the shortest change of h that sets the bridge's logits to the minimum and leaves the
  answer's logits exactly where they are.

Tokens that the bridge shares with the answer are kept, not lowered. The control erases another
entity's tokens, as many as are lowered of the bridge, by the same formula (the published code gave
its control no recheck; here it is treated alike).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel, hook_name, provenance, require_layers, unembedding
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Change, Intervention
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import METRICS, Target
from mi_hops.sweep.runs import Scored, run_sweep
from mi_hops.text.tokens import Prompt

Variant = Literal["published", "exact"]
ROLES = ("first hop", "last")

_CHUNK = 8192  # rows of W_U in float64 at once


class Eraser:
    """Changes of a hidden state that lower chosen tokens in the raw lens.

    Args:
        recheck: strength of the published form's push on kept tokens; 0 leaves it out.

    Attributes:
        rank: directions that W_U reads, of d_model.
    """

    def __init__(self, model: HookedModel, *, recheck: float = 10.0) -> None:
        self.model = model
        weight = unembedding(model)[0]
        wide = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        self.rows = weight.T.to(wide)  # [vocab, d_model]; no float64 copy: it is a large matrix
        gram = torch.zeros(
            weight.shape[0], weight.shape[0], dtype=torch.float64, device=weight.device
        )
        for chunk in self.rows.split(_CHUNK):
            gram += chunk.double().T @ chunk.double()
        self.inverse, self.rank = _pseudo_inverse(gram, torch.finfo(weight.dtype).eps)
        self.recheck = recheck

    def __reduce__(self) -> Any:
        # A worker makes its own: W_U is large, and the worker has it.
        return partial(type(self), recheck=self.recheck), (self.model,)

    def erasure(self, variant: Variant, lower: Sequence[int], keep: Sequence[int]) -> Erasure:
        """How `lower` is brought down to the minimum while `keep` is held (see the variants)."""
        down = self._rows([t for t in dict.fromkeys(lower) if t not in set(keep)])
        held = self._rows(list(dict.fromkeys(keep)))
        if variant == "exact":
            # Columns of the minimum-norm solution of [down; held] @ delta = [wanted; 0].
            return Erasure(down, torch.linalg.pinv(torch.cat([down, held])).T[: len(down)])
        realised = down @ self.inverse
        pushed_back = self.recheck * (realised @ held.T) @ held @ self.inverse
        return Erasure(down, realised - pushed_back)

    def floor(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row"]:
        """The smallest raw read-out of each state, over the whole vocabulary, in float64."""
        lowest = (states.to(self.rows) @ self.rows.T).argmin(-1)
        return (states.double() * self.rows[lowest].double()).sum(-1)

    def change(self, variant: Variant, lower: Sequence[int], keep: Sequence[int]) -> Change:
        """The erasure as a change of ``[pos, d_model]``."""
        erasure = self.erasure(variant, lower, keep)

        def change(x: Tensor) -> Tensor:
            h = x.to(self.rows.device, torch.float64)
            return (h + erasure.delta(h, self.floor(h))).to(x.device, x.dtype)

        return change

    def _rows(self, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
        return self.rows[torch.tensor(tokens, dtype=torch.long, device=self.rows.device)].double()


@dataclass(frozen=True)
class Erasure:
    """Tokens to be lowered as a linear map, the same for every state; float64.

    Attributes:
        down: rows of W_U of the tokens.
        response: what raising each token's read-out by one adds to the state.
    """

    down: Float[Tensor, "token d_model"]
    response: Float[Tensor, "token d_model"]

    def delta(
        self, states: Float[Tensor, "row d_model"], floor: Float[Tensor, "row"]
    ) -> Float[Tensor, "row d_model"]:
        """What is to be added to each state so that the tokens read `floor` (or tend to)."""
        wanted = floor[:, None] - states @ self.down.T
        return wanted @ self.response


class _Floors:
    """States of prompts that share a pass, with their floors: of all at once, which reads W_U once.

    Args:
        shown: activations by hook name, ``[prompt, pos, d_model]``, there when the first is asked for.
    """

    def __init__(self, eraser: Eraser, shown: Mapping[str, Tensor]) -> None:
        self.shown, self._eraser = shown, eraser
        self._prompts: list[int] = []
        self._positions: list[int] = []
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def add(
        self, prompt: int, positions: Sequence[int]
    ) -> Callable[[str], tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos"]]]:
        """What gives the states and floors of some positions of a prompt, by hook name."""
        own = slice(len(self._prompts), len(self._prompts) + len(positions))
        self._prompts += [prompt] * len(positions)
        self._positions += positions

        def of(name: str) -> tuple[Tensor, Tensor]:
            if name not in self._known:
                states = self.shown[name][self._prompts, self._positions]
                states = states.to(self._eraser.rows.device).double()
                self._known[name] = states, self._eraser.floor(states)
            states, floor = self._known[name]
            return states[own], floor[own]

        return of


def _pseudo_inverse(
    gram: Float[Tensor, "d_model d_model"], eps: float
) -> tuple[Float[Tensor, "d_model d_model"], int]:
    """The pseudo-inverse of ``W_U W_U^T`` (float64) and its rank.

    Folded LayerNorm weights are centred: the direction of equal entries then reads nothing, and its
    eigenvalue is the rounding of W_U's own dtype, `eps` of the root mean square singular value, or
    that of the decomposition. What lies under twice the one or the other is taken for zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    own = (2 * eps) ** 2 * values.mean()
    decomposed = len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    kept = values > torch.maximum(own, decomposed)
    read = vectors[:, kept]
    return (read / values[kept]) @ read.T, int(kept.sum())


@dataclass(frozen=True)
class _Erasure:
    """A prompt, the positions whose state is changed, and what is erased from it."""

    fact: TwoHopFact
    prompt: Prompt
    target: Target
    where: tuple[int, ...]
    bridge: tuple[int, ...]


def _case(case: Case) -> _Erasure:
    if set(case.bridge) <= set(case.target.answer):
        raise ValueError("every token of the bridge is one of the answer's")
    where = tuple(p for role in ROLES for p in case.positions(role))
    return _Erasure(case.fact, case.prompt, case.target, where, case.bridge)


def erase_bridge(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    variants: Variant | Sequence[Variant] = ("published", "exact"),
    layers: Sequence[int] | None = None,
    controls: int = 3,
    recheck: float = 10.0,
    seed: int = 0,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """P(answer) after erasing the bridge, by layer, with a control of the same number of tokens.

    Args:
        form: template order of the two-hop prompt.
        layers: blocks whose output is changed, one at a time; default all.
        controls: entities erased instead of the bridge, each another fact's bridge with as many
            tokens as are lowered of this one and none of them the bridge's, the answer's or the
            prompt's (random tokens where there are too few such entities); their values are averaged.
        variants: forms of the erasure, one or several (see the module's description).
        limits: facts and rows in one pass.

    Returns:
        `Result` with ``bridge`` and ``control``, dims (example, variant, position, layer), the
        probability of the answer's first token after the erasure (control: mean over its draws),
        and the baseline ``clean`` (example). Positions are the roles ``"first hop"`` (the last
        token of the first hop's phrase) and ``"last"``. Differences ``bridge - control`` are
        paired: use ``result.difference_ci("control", variable="bridge")``.

    Raises:
        NoUsableFactError: no fact can be used.
        ValueError: a bad layer, unknown or repeated variants, or no control.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> erased = mi_hops.erase_bridge(model, facts, variants=("exact",), layers=[0, 1])
        >>> erased.difference_ci("control", variable="bridge").sizes["layer"]
        2
    """
    layers = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    require_layers(model, layers)
    if controls < 1:
        raise ValueError(f"controls is {controls}; expected at least 1 to compare the bridge with")
    named = (variants,) if isinstance(variants, str) else tuple(variants)
    known = get_args(Variant)
    if not named or len(set(named)) < len(named) or not set(named) <= set(known):
        raise ValueError(f"variants is {variants!r}; expected one or more of {known}, each once")
    cases, skipped = usable(model, facts, _case, purpose="erasure", form=form)
    eraser = Eraser(model, recheck=recheck)
    rng = random.Random(seed)
    pool = sorted({case.bridge for case in cases})
    vocab = int(model.cfg.d_vocab)
    erased = [[case.bridge, *_controls(case, pool, controls, rng, vocab)] for case in cases]

    names = {layer: hook_name("resid_post", layer) for layer in layers}
    floors: list[_Floors] = []

    def rows_of(i: int, base: int, shown: Mapping[str, Tensor]) -> list[Intervention]:
        case = cases[i]
        forms = [
            eraser.erasure(variant, tokens, case.target.answer)
            for variant in named
            for tokens in erased[i]
        ]

        if not floors or floors[-1].shown is not shown:
            floors[:] = [_Floors(eraser, shown)]  # a new group of prompts
        places = floors[-1].add(base, case.where)

        @cache
        def deltas(layer: int) -> list[Tensor]:
            states, floor = places(names[layer])
            return [form.delta(states, floor) for form in forms]

        def shift(layer: int, f: int, at: int) -> Change:
            def change(x: Tensor) -> Tensor:
                return (x.double() + deltas(layer)[f][at].to(x.device)).to(x.dtype)

            return change

        return [
            Intervention.at("resid_post", layer, shift(layer, f, at), positions=[p], base=base)
            for f in range(len(forms))
            for at, p in enumerate(case.where)
            for layer in layers
        ]

    metric = (METRICS["first_prob"],)
    prompts = [Scored(case.prompt, case.target, metric) for case in cases]
    found = run_sweep(
        model,
        prompts,
        rows_of,
        limits=limits,
        sources=prompts,
        names=names.values(),
        label="erasure",
    )
    scores = rearrange(
        torch.stack(found.rows).squeeze(-1).double().numpy(),
        "example (variant erased position layer) -> erased example variant position layer",
        variant=len(named),
        erased=1 + controls,
        position=len(ROLES),
    )
    values = {"bridge": scores[0], "control": scores[1:].mean(0)}
    dims = ("example", "variant", "position", "layer")
    return Result.from_arrays(
        {name: (dims, array) for name, array in values.items()},
        coords={
            "example": [case.fact.id for case in cases],
            "variant": list(named),
            "position": list(ROLES),
            "layer": layers,
        },
        baselines={"clean": ("example", found.base[:, 0].double())},
        units={"bridge": "probability", "control": "probability", "clean": "probability"},
        provenance=provenance(
            model,
            method="erasure",
            form=form,
            controls=controls,
            recheck=recheck,
            seed=seed,
            hook="resid_post",
            unembedding_rank=eraser.rank,
        ),
        title="P(answer) after erasing the bridge",
        skipped=skipped,
    )


def _controls(
    case: _Erasure, pool: Sequence[tuple[int, ...]], n: int, rng: random.Random, vocab: int
) -> list[tuple[int, ...]]:
    """`n` token sets that share no token with bridge, answer or prompt.

    Each has as many tokens as the bridge has lowered: those it shares with the answer are kept.
    """
    taken = {*case.bridge, *case.target.answer, *case.prompt.ids}
    lowered = len({*case.bridge} - {*case.target.answer})
    fit = [c for c in pool if len({*c}) == lowered and not taken & set(c)]
    drawn: list[tuple[int, ...]] = rng.sample(fit, min(n, len(fit)))
    if len(drawn) < n and vocab - len(taken) < lowered:
        raise ValueError(
            f"fact {case.fact.id!r} leaves no {lowered} of {vocab} tokens for a control that shares none "
            "with its bridge, answer and prompt; leave the fact out"
        )
    while len(drawn) < n:
        tokens = tuple(rng.sample(range(vocab), lowered))
        if not taken & set(tokens):
            drawn.append(tokens)
    return drawn
