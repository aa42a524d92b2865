"""From facts to prompts, targets and positions; facts that a method cannot use, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.model import HookedModel
from mi_hops.sweep.metrics import Target, target_of
from mi_hops.text.tokens import Prompt, Where, answer_ids, encode, last_position, positions

Prepared = TypeVar("Prepared")

#: (fact id, reason) of facts that could not be used.
Skipped = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """One fact, ready to run.

    Attributes:
        prompt: its two-hop prompt in the form asked for.
        target: its answer's tokens after that prompt.
    """

    model: HookedModel
    fact: TwoHopFact
    form: str
    prompt: Prompt
    target: Target

    @property
    def bridge(self) -> tuple[int, ...]:
        """The bridge's tokens, as a continuation of the prompt."""
        return answer_ids(self.model, self.prompt, self.fact.bridge)

    def positions(self, where: Where) -> tuple[int, ...]:
        """Token positions in the prompt; besides what `text.tokens.positions` takes, two roles.

        ``"first hop"`` is the last token of the phrase that describes the bridge, ``"last"`` the
        prompt's last token.
        """
        if where == "first hop":
            return (last_position(self.prompt, self.fact.first_hop),)
        if where == "last":
            return (self.prompt.last,)
        return positions(self.prompt, where)


def usable(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    prepare: Callable[[Case], Prepared],
    *,
    purpose: str,
    form: str | None = None,
) -> tuple[list[Prepared], Skipped]:
    """What `prepare` makes of each fact, and (id, reason) of the facts that cannot be used.

    A fact is skipped where it has no prompt of this form, where prompt and answer cannot be
    tokenised or do not fit the context, or where `prepare` raises a ``ValueError``.

    Args:
        prepare: makes of a case what the method needs of it.
        purpose: what the facts are to be used for, for the error.
        form: template order of the prompts; default each fact's first.

    Raises:
        NoUsableFactError: no fact is left; the message counts the reasons.
    """
    prepared: list[Prepared] = []
    skipped: Skipped = []
    for fact in facts:
        try:
            prompt = encode(model, fact.prompt(form))
            target = target_of(model, prompt, fact.answer)
            name = next(iter(fact.prompts)) if form is None else form
            prepared.append(prepare(Case(model, fact, name, prompt, target)))
        except ValueError as error:
            skipped.append((fact.id, str(error)))
    if not prepared:
        raise NoUsableFactError(purpose, skipped)
    return prepared, skipped
