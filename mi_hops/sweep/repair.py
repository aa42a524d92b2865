"""The Repair protocols: what can be switched on over a model for a fact, per row or in place, and off.

An edit, a memory injection, a state transplant or a codebook all meet it, so that one function
scores them and one batch can hold a different repair in every row. A repair is *fitted* to facts
(one state per fact) and then gives hooks that act on each row by that row's state only. What changes
the model itself, as an editor of your own may do, is an *in-place* repair instead, one fact at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel
from mi_hops.model.plain import RowChanges
from mi_hops.text.tokens import Prompt


class RowHooks(list[Hook]):
    """Hooks that only change matrices, row by row; `changes` is what a pass without hooks does instead."""

    def __init__(self, hooks: Iterable[Hook], changes: RowChanges) -> None:
        super().__init__(hooks)
        self.changes = changes


class LateHooks(list[Hook]):
    """Hooks that neither read nor change anything before position `start`, which counts from a row's first.

    What prompts begin with alike before it is then run once for all of them.
    """

    def __init__(self, hooks: Iterable[Hook], start: int) -> None:
        super().__init__(hooks)
        self.start = start


@dataclass(frozen=True)
class Rows:
    """The rows of a forward pass, as far as a repair must know them.

    Attributes:
        prompts: the prompt of each row; tokens beyond it are an answer's (teacher-forced or
            generated).
        width: number of positions in this pass.
        offset: absolute position of this pass's first position; positive when earlier ones sit
            in a cache.
    """

    prompts: tuple[Prompt, ...]
    width: int
    offset: int = 0

    def at(self, offset: int, width: int) -> Rows:
        """The same rows for a later pass of a generation."""
        return replace(self, offset=offset, width=width)


@runtime_checkable
class Repair(Protocol):
    """Anything that changes a model's behaviour on a fact while it is active."""

    @property
    def name(self) -> str:
        """Short label for tables and figures."""
        ...

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> Sequence[Any]:
        """One state per fact, in order; the model is left as it was."""
        ...

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Hooks for a pass in which ``states[r]`` acts on row r; None leaves the row alone."""
        ...


@runtime_checkable
class InPlaceRepair(Protocol):
    """Anything that changes the model itself for one fact, and changes it back."""

    @property
    def name(self) -> str:
        """Short label for tables and figures."""
        ...

    def applied(self, model: HookedModel, fact: TwoHopFact) -> AbstractContextManager[Any]:
        """The model repaired for this fact for the length of a ``with`` block."""
        ...
