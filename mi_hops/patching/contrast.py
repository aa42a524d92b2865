"""Pairs of two-hop questions that differ in their first hop only, ready to be patched.

A fact is paired with another one of the same two relations and as many tokens everywhere, but with
another bridge and an answer that starts otherwise: what is patched from one into the other then
carries the first hop's difference, and a logit difference of the two answers measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.text.tokens import Prompt, answer_ids, encode, last_position, positions


@dataclass(frozen=True)
class Contrast:
    """Prompt pairs with their answers and the places they share.

    Attributes:
        clean, corrupted: prompts, pair by pair of one length in tokens.
        answer: of the clean prompt; ``wrong``: of the corrupted one.
        examples: identifiers of the clean facts.
        roles: ``subject`` and ``first hop`` (their last tokens; one place where the subject ends
            the phrase) and ``last``, a position a pair.
        skipped: (identifier, reason) of facts without a partner.
    """

    clean: list[str]
    corrupted: list[str]
    answer: list[str]
    wrong: list[str]
    examples: list[str]
    roles: dict[str, list[int]]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def arguments(self) -> dict[str, Any]:
        """For `patch` and its kin: ``patch(model, **pairs.arguments, kinds="z")``."""
        names = ("clean", "corrupted", "answer", "wrong", "examples")
        return {name: getattr(self, name) for name in names}

    def select(self, keep: Sequence[int]) -> Contrast:
        """The pairs of these numbers; nothing is skipped anew."""
        fields: dict[str, Any] = {
            name: [values[i] for i in keep] for name, values in self.arguments.items()
        }
        roles = {name: [at[i] for i in keep] for name, at in self.roles.items()}
        return Contrast(**fields, roles=roles, skipped=self.skipped)


def contrast(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    partners: Sequence[TwoHopFact] | None = None,
    form: str | None = None,
    prepend_bos: bool = True,
    seed: int = 0,
) -> Contrast:
    """Pair each fact with a partner, drawn among all that fit.

    Args:
        facts: their two-hop prompts are the clean ones.
        partners: where corrupted prompts come from; default `facts` themselves.
        form: of the prompts; default each fact's first.
        seed: of the draw.

    Returns:
        `Contrast`; facts without a partner are listed in ``skipped``.

    Raises:
        ValueError: no fact has a partner.
        TokenError: a prompt whose first-hop phrase is not in it, or an empty answer.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [_Side.of(model, f, form, prepend_bos) for f in facts]
    pool = sides if partners is None else [_Side.of(model, f, form, prepend_bos) for f in partners]
    by_shape: dict[tuple[Any, ...], list[_Side]] = {}
    for side in pool:
        by_shape.setdefault(side.shape, []).append(side)
    pairs, skipped = [], []
    for side in sides:
        fitting = [
            other
            for other in by_shape.get(side.shape, [])
            if other.fact.bridge != side.fact.bridge and other.first_token != side.first_token
        ]
        if not fitting:
            skipped.append((side.fact.id, "no fact of the same relations and lengths"))
            continue
        drawn = int(torch.randint(len(fitting), (1,), generator=generator))
        pairs.append((side, fitting[drawn]))
    if not pairs:
        raise ValueError(
            f"none of {len(sides)} facts has a partner with the same relations, equally many tokens "
            "and another bridge and answer; pass more facts, or `partners`"
        )
    return Contrast(
        clean=[a.prompt.text for a, _ in pairs],
        corrupted=[b.prompt.text for _, b in pairs],
        answer=[a.fact.answer for a, _ in pairs],
        wrong=[b.fact.answer for _, b in pairs],
        examples=[a.fact.id for a, _ in pairs],
        roles={
            "subject": [a.places[0] for a, _ in pairs],
            "first hop": [a.places[1] for a, _ in pairs],
            "last": [a.places[2] for a, _ in pairs],
        },
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Side:
    fact: TwoHopFact
    prompt: Prompt
    places: tuple[int, int, int]
    shape: tuple[Any, ...]
    first_token: int

    @classmethod
    def of(cls, model: HookedModel, fact: TwoHopFact, form: str | None, prepend_bos: bool) -> _Side:
        prompt = encode(model, fact.prompt(form), prepend_bos=prepend_bos)
        subject = positions(prompt, fact.subject)
        hop = last_position(prompt, fact.first_hop)
        shape = (fact.relation1, fact.relation2, len(prompt), subject, hop)
        first = answer_ids(model, prompt, fact.answer)[0]
        return cls(fact, prompt, (subject[-1], hop, prompt.last), shape, first)
