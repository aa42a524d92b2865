"""What an injection does to prompts that it was not meant for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.injection.memory import Memory, MemoryInjection
from mi_hops.model import HookedModel, provenance
from mi_hops.model.numeric import kl_divergence, wide_dtype
from mi_hops.result.result import Result
from mi_hops.sweep.metrics import target_of
from mi_hops.sweep.repair import Rows
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import Prompt, batches, encode

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact


def side_effects(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    injection: MemoryInjection,
    unrelated: Sequence[str],
    *,
    form: str | None = None,
    batch_size: int = 64,
) -> Result:
    """Each fact's memory, injected into its explicit prompt and into unrelated prompts.

    Places that a prompt has not got (the first hop) are left out there; ``touched`` tells which
    prompts were injected at all.

    Args:
        unrelated: prompts that have nothing to do with the facts; all facts meet all of them.
        form: form of the second-hop prompt, which names the bridge; default each fact's first.

    Returns:
        Result with ``kl`` (nats, KL(before || after) of the next token), ``top_changed`` and
        ``touched`` (shares) on ``example, prompt``, where ``prompt`` lists `unrelated`;
        ``explicit_prob`` (probability of the answer's first token under injection),
        ``explicit_kl``, ``explicit_top_changed`` and ``explicit_touched`` on ``example``; and the
        baseline ``explicit_prob_before``. An untouched prompt has a ``kl`` of 0, so a mean says
        little without the share touched. Facts without an explicit prompt, or whose answer merges
        with it, are skipped.

    Raises:
        ValueError: no unrelated prompt.
        NoUsableFactError: no fact is left.
    """
    if isinstance(unrelated, str) or not unrelated:
        raise ValueError("name at least one unrelated prompt, in a sequence")
    kept: list[TwoHopFact] = []
    explicit: list[Prompt] = []
    firsts: list[int] = []
    skipped: list[tuple[str, str]] = []
    for fact in facts:
        try:
            prompt = encode(model, fact.second_prompt(form))
            target = target_of(model, prompt, fact.answer)
        except ValueError as error:
            skipped.append((fact.id, str(error)))
            continue
        kept.append(fact)
        explicit.append(prompt)
        firsts.append(target.answer[0])
    if not kept:
        raise NoUsableFactError("side effects", skipped)
    repair = replace(injection, absent="leave")
    states = repair.fit(model, kept)
    others = [encode(model, text) for text in unrelated]
    before = torch.cat([_next(model, explicit, batch_size), _next(model, others, batch_size)])
    n = len(kept)
    after = _next(model, explicit, batch_size, repair, states)
    kl, changed = _compare(before[:n], after)
    rows = torch.arange(n)
    found = [
        _compare(before[n:], _next(model, others, batch_size, repair, [state] * len(others)))
        for state in states
    ]
    return Result.from_arrays(
        {
            "kl": (("example", "prompt"), torch.stack([f[0] for f in found])),
            "top_changed": (("example", "prompt"), torch.stack([f[1] for f in found])),
            "touched": (
                ("example", "prompt"),
                [[float(bool(repair.where(p, state))) for p in others] for state in states],
            ),
            "explicit_prob": ("example", after[rows, firsts].exp()),
            "explicit_kl": ("example", kl),
            "explicit_top_changed": ("example", changed),
            "explicit_touched": (
                "example",
                [float(bool(repair.where(*pair))) for pair in zip(explicit, states, strict=True)],
            ),
        },
        coords={"example": [f.id for f in kept], "prompt": list(unrelated)},
        baselines={"explicit_prob_before": ("example", before[rows, firsts].exp())},
        units={
            "kl": "nats", "top_changed": "share", "touched": "share",
            "explicit_prob": "probability", "explicit_kl": "nats", "explicit_top_changed": "share",
            "explicit_touched": "share", "explicit_prob_before": "probability",
        },
        title=f"side effects of {injection.name}",
        skipped=skipped,
        provenance=provenance(model, method="side_effects", injection=injection.name, form=form),
    )  # fmt: skip


def _next(
    model: HookedModel,
    prompts: Sequence[Prompt],
    batch_size: int,
    repair: MemoryInjection | None = None,
    states: Sequence[Memory] | None = None,
) -> Float[Tensor, "row vocab"]:
    """Log-probabilities of the next token."""
    out: list[Tensor | None] = [None] * len(prompts)
    with torch.no_grad():
        for chosen, batch in batches([p.ids for p in prompts], batch_size):
            hooks = []
            if repair is not None and states is not None:
                rows = Rows(tuple(prompts[i] for i in chosen), batch.tokens.shape[1])
                hooks = repair.hooks(model, [states[i] for i in chosen], rows)
            logits = logits_at(model, batch.tokens, batch.last[:, None], hooks=hooks)[:, 0]
            wide = wide_dtype(logits.dtype)
            for i, row in zip(chosen, logits.to(wide).log_softmax(-1).cpu(), strict=True):
                out[i] = row
    return torch.stack([row for row in out if row is not None])


def _compare(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    kl = kl_divergence(before, after)
    return kl, (before.argmax(-1) != after.argmax(-1)).to(kl.dtype)
