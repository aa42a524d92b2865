"""What an injection does to prompts that it was not meant for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.memory import MemoryInjection
from mi_hops.model import HookedModel, provenance
from mi_hops.result.result import Result
from mi_hops.sweep.metrics import KL, METRICS, NextToken, Target, target_of
from mi_hops.sweep.runs import Scored
from mi_hops.sweep.scoring import next_token_logits, score
from mi_hops.text.tokens import Prompt, encode


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

    Places that a prompt does not have (the first hop) are left out there; ``touched`` says which
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

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> memory = mi_hops.MemoryInjection(layers=2, strength=4.0)
        >>> found = mi_hops.side_effects(model, facts, memory, ["The spouse of Joren Ashby is"])
        >>> found["kl"].dims
        ('example', 'prompt')
    """
    if isinstance(unrelated, str) or not unrelated:
        raise ValueError("name at least one unrelated prompt, in a sequence")

    def prepare(case: Case) -> tuple[TwoHopFact, Prompt, Target]:
        prompt = encode(model, case.fact.second_prompt(form))
        return case.fact, prompt, target_of(model, prompt, case.fact.answer)

    kept, skipped = usable(model, facts, prepare, purpose="side effects", form=form)
    repair = replace(injection, absent="leave")
    states = repair.fit(model, [fact for fact, _, _ in kept])
    explicit = [(prompt, target) for _, prompt, target in kept]
    others = [(p, Target(p.ids[-1:])) for p in (encode(model, text) for text in unrelated)]
    asked = [*explicit, *others]
    logits = next_token_logits(model, [p for p, _ in asked], batch_size=batch_size)
    scored = [
        Scored(prompt, target, (KL(before), _top_changed(before), METRICS["first_prob"]))
        for before, (prompt, target) in zip(logits, asked, strict=True)
    ]
    n = len(kept)
    # Which prompt meets which memory: each fact's own explicit one, and all that are unrelated.
    met = [(i, i) for i in range(n)]
    met += [(n + k, i) for i in range(n) for k in range(len(others))]
    touched = torch.tensor([bool(repair.where(asked[p][0], states[i])) for p, i in met])
    before = score(model, scored[:n], batch_size=batch_size)[:, 2]
    after = torch.zeros(len(met), 3, dtype=before.dtype)
    after[:n, 2] = before
    run = [pair for pair, here in zip(met, touched, strict=True) if here]
    if run:
        rows, given = [scored[p] for p, _ in run], [states[i] for _, i in run]
        after[touched] = score(model, rows, batch_size=batch_size, repair=repair, states=given)
    own, other = after[:n].T, after[n:].reshape(n, len(others), 3)
    both, one = ("example", "prompt"), "example"
    return Result.from_arrays(
        {
            "kl": (both, other[..., 0]),
            "top_changed": (both, other[..., 1]),
            "touched": (both, touched[n:].reshape(n, -1).to(after.dtype)),
            "explicit_prob": (one, own[2]),
            "explicit_kl": (one, own[0]),
            "explicit_top_changed": (one, own[1]),
            "explicit_touched": (one, touched[:n].to(after.dtype)),
        },
        coords={"example": [fact.id for fact, _, _ in kept], "prompt": list(unrelated)},
        baselines={"explicit_prob_before": (one, before)},
        units={
            f"{whose}{name}": unit
            for whose in ("", "explicit_")
            for name, unit in {"kl": "nats", "top_changed": "share", "touched": "share"}.items()
        }
        | dict.fromkeys(("explicit_prob", "explicit_prob_before"), "probability"),
        title=f"side effects of {injection.name}",
        skipped=skipped,
        provenance=provenance(model, method="side_effects", injection=injection.name, form=form),
    )


def _top_changed(before: Float[Tensor, "vocab"]) -> NextToken:
    """1 where the most probable next token is another than before."""
    top = int(before.argmax())
    return NextToken(
        "top_changed", "share", False, lambda x, target: (x.argmax(-1) != top).to(x.dtype)
    )
