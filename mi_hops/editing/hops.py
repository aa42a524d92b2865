"""Edits of single facts: one hop of a two-hop chain taught a new object, alone or under a second edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from mi_hops.editing.edit import Edit
from mi_hops.editing.request import Asked, Request, check_together
from mi_hops.editing.rows import edit_hooks, edits_of
from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hop_edits import HopEdit
from mi_hops.model import Hook, HookedModel
from mi_hops.sweep.repair import Repair, Rows


def hop_requests(edits: HopEdit | Iterable[HopEdit], form: str | None = None) -> list[Request]:
    """Requests that teach the edited single facts their new objects, all in one model.

    One per edited single fact: an edit of both hops gives two, and what several edits share is
    asked for once. All editors that teach an answer take them (`rome_many`, `memit`, ...).

    Args:
        form: of the prompts taught; default the first each single fact has.

    Raises:
        ValueError: two edits that give one single fact different objects, with both; a single fact
            without a prompt of that form, or whose prompt does not name its subject once.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing import hop_requests
        >>> from mi_hops.facts import hop_edits
        >>> edits, _ = hop_edits(mi_hops.load_facts("hopland")[:200], "first")
        >>> hop_requests(edits[0], "suffix")[0].two_hop_prompt
        'The teacher of Corvo is'
    """
    given = [edits] if isinstance(edits, HopEdit) else list(edits)
    found = [Request.of_single(single, form, id=e.id) for e in given for single in e.singles]
    check_together(found)
    unique = {request.two_hop_prompt: request for request in reversed(found)}
    return [request for request in found if unique[request.two_hop_prompt] is request]


class TeachingRepair(Repair, Protocol):
    """A repair that can be fitted to requests as well as to facts."""

    def fit(self, model: HookedModel, facts: Sequence[Asked]) -> Sequence[Any]:
        """One state per fact or request."""
        ...


class HopRepair:
    """An editor that teaches the single facts of hop edits, as a repair.

    Each edit stands alone: the state of a fact knows nothing of the other facts (but for a shared
    GRACE codebook, which learns all). Where both hops of a chain are edited, the second edit is
    made on the model as the first left it.

    Args:
        repair: teaches answers: `RomeRepair`, `MemitRepair`, `FineTuneRepair`, `LoraRepair`,
            `GraceRepair`, or an `EditorRepair` around an editor of one's own.
        edits: what is edited; `fit` is given their facts after.
        form: of the prompts taught; default the first each single fact has. The repair's own form
            is for two-hop facts and plays no part.
        name: label in tables; default the repair's.

    Raises:
        ValueError: in `fit`, a fact that is not the after of one of the edits, or two edits in one
            chain by a repair that gives something else than edits.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing import HopRepair
        >>> from mi_hops.editing.baselines import RomeRepair
        >>> from mi_hops.facts import hop_edits
        >>> edits, _ = hop_edits(mi_hops.load_facts("hopland")[:200], "first")
        >>> repair = HopRepair(RomeRepair(layer=2, steps=2), edits[:2], form="suffix")
        >>> states = repair.fit(mi_hops.load_model("hops-gpt2"), [e.after for e in edits[:2]])
        >>> repair.name, len(states)
        ('ROME', 2)
    """

    def __init__(
        self,
        repair: TeachingRepair,
        edits: Iterable[HopEdit],
        *,
        form: str | None = None,
        name: str = "",
    ) -> None:
        self.repair, self.form, self.name = repair, form, name or repair.name
        self._edits = {edit.id: edit for edit in edits}

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Any]:
        """One state per fact: an edit, several in the order they were made, or a codebook."""
        unknown = [fact.id for fact in facts if fact.id not in self._edits]
        if unknown:
            raise ValueError(
                f"{len(unknown)} facts are not the after of an edit, {unknown[0]!r} for one; pass "
                "[edit.after for edit in edits]"
            )
        asked = [hop_requests(self._edits[fact.id], self.form) for fact in facts]
        made = iter(self.repair.fit(model, [request for each in asked for request in each]))
        return [self._state(model, each, [next(made) for _ in each]) for each in asked]

    def _state(self, model: HookedModel, asked: Sequence[Request], made: Sequence[Any]) -> Any:
        """The state of one fact, from those of its requests."""
        if all(one is made[0] for one in made):
            return made[0]
        if not all(isinstance(one, Edit) for one in made):
            raise ValueError(
                f"{self.name!r} keeps the two edits of {asked[0].id!r} apart, and one prompt runs under "
                "one of them only; use a repair that gives edits, or a shared codebook"
            )
        done = [made[0]]
        with ExitStack() as applied:
            for request in asked[1:]:
                applied.enter_context(done[-1].applied(model, check=False))
                done += self.repair.fit(model, [request])
        return tuple(done)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own state; several edits of one row act together."""
        if any(isinstance(state, tuple) for state in states):
            return edit_hooks(model, states)
        return self.repair.hooks(model, states, rows)


class OnTop:
    """Two editors stacked: the second edits the model as the first one left it, and both act.

    With a `HopRepair` below and `CremeRepair` above: a single fact is edited, then the two-hop
    question is made to go through it.

    Args:
        below, above: give edits; for each fact `above` is fitted while the fact's edits of `below`
            are in the weights.
        name: label in tables; default both names.

    Raises:
        ValueError: in `fit`, a state that is no edit.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing import EditRepair, OnTop
        >>> model, facts = mi_hops.load_model("hops-gpt2"), mi_hops.load_facts("hopland")[:2]
        >>> first = EditRepair(mi_hops.creme(model, facts[0], layers=[3]), name="first")
        >>> both = OnTop(first, mi_hops.CremeRepair(layers=[5]))
        >>> both.name, [len(edits) for edits in both.fit(model, facts)]
        ('first + CREME', [2, 2])
    """

    def __init__(self, below: Repair, above: Repair, *, name: str = "") -> None:
        self.below, self.above = below, above
        self.name = name or f"{below.name} + {above.name}"

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[tuple[Edit, ...]]:
        """The edits of each fact, in the order they were made; the model is left as it was."""
        states = []
        for fact, lower in zip(facts, self.below.fit(model, facts), strict=True):
            edits = self._edits(self.below, lower)
            with ExitStack() as applied:
                for edit in edits:
                    applied.enter_context(edit.applied(model, check=False))
                (upper,) = self.above.fit(model, [fact])
            states.append((*edits, *self._edits(self.above, upper)))
        return states

    def _edits(self, repair: Repair, state: Any) -> tuple[Edit, ...]:
        several = state if isinstance(state, list | tuple) else [state]
        if not all(isinstance(edit, Edit) for edit in several if edit is not None):
            raise ValueError(
                f"{repair.name!r} gives {type(state).__name__} states; only edits of weights can lie on "
                "top of one another"
            )
        return edits_of(state)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under all of its own edits."""
        return edit_hooks(model, states)
