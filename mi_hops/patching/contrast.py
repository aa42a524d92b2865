"""Pairs of two-hop questions that differ in their first hop only, ready to be patched.

A fact is paired with another one of the same two relations and as many tokens everywhere, but with
another prompt, another bridge and an answer that starts otherwise: what is patched from one into the other then
carries the first hop's difference, and a logit difference of the two answers measures it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.sweep.pairs import Pairs


def contrast(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    partners: Sequence[TwoHopFact] | None = None,
    form: str | None = None,
    seed: int = 0,
) -> Pairs:
    """Pair each fact with a randomly chosen partner among all that fit.

    Args:
        facts: their two-hop prompts are the clean ones.
        partners: where corrupted prompts come from; default `facts` themselves.
        form: of the prompts; default each fact's first.
        seed: of the draw.

    Returns:
        `Pairs` labelled by the clean facts, with the roles ``subject`` and ``first hop`` (their last
        tokens; one place where the subject ends the phrase) and ``last``. Facts without a partner,
        or that cannot be used, are listed in ``skipped``.

    Raises:
        ValueError: no fact has a partner, or none can be used.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:40]
        >>> list(mi_hops.contrast(model, facts, form="suffix").roles)
        ['subject', 'first hop', 'last']
    """
    sides, skipped = usable(model, facts, _side, purpose="pairing", form=form)
    pool = sides
    if partners is not None:
        pool, _ = usable(model, partners, _side, purpose="pairing", form=form)
    by_shape = defaultdict(list)
    for case, shape, _ in pool:
        by_shape[shape].append(case)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for case, shape, places in sides:
        fitting = [
            other
            for other in by_shape[shape]
            if other.prompt.text != case.prompt.text  # a first hop with several bridges
            and other.fact.bridge != case.fact.bridge
            and other.target.answer[0] != case.target.answer[0]
        ]
        if not fitting:
            skipped.append((case.fact.id, "no fact of the same relations and lengths"))
            continue
        drawn = int(torch.randint(len(fitting), (1,), generator=generator))
        pairs.append((case, fitting[drawn], places))
    if not pairs:
        raise ValueError(
            f"none of {len(sides)} facts has a partner with the same relations, equally many tokens "
            "and another bridge and answer; pass more facts, or `partners`"
        )
    return Pairs(
        [case.prompt.text for case, _, _ in pairs],
        [other.prompt.text for _, other, _ in pairs],
        answer=[case.fact.answer for case, _, _ in pairs],
        wrong=[other.fact.answer for _, other, _ in pairs],
        labels=[case.fact.id for case, _, _ in pairs],
        roles={name: [at[name] for _, _, at in pairs] for name in ("subject", "first hop", "last")},
        skipped=skipped,
    )


#: A fact, what a partner must share with it, and the places of its roles.
_Side = tuple[Case, tuple[Any, ...], dict[str, int]]


def _side(case: Case) -> _Side:
    subject = case.positions(case.fact.subject)
    (hop,) = case.positions("first hop")
    shape = (case.fact.relation1, case.fact.relation2, len(case.prompt), subject, hop)
    return case, shape, {"subject": subject[-1], "first hop": hop, "last": case.prompt.last}
