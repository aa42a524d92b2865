"""What the steps of one study share: model, facts, settings, and what earlier steps found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import count_reasons, describe_reasons
from mi_hops.injection.select import split_halves
from mi_hops.model import HookedModel
from mi_hops.reasoning.gap import Gap
from mi_hops.study.folder import Folder
from mi_hops.sweep.limits import Limits


class Skip(Exception):  # noqa: N818
    """A step that has nothing to work on; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """How much each step takes: what a study costs, not what it does.

    Attributes:
        lens, erasure, locate, injection: facts (of each group) at most.
        choose, edits: failures edited on the choosing and on the reporting half at most.
        controls: draws of the erasure's control.
        strengths: of the injection grid.
        per_case: queries per case in each drawn set.

    Examples:
        >>> import mi_hops
        >>> mi_hops.Sizes(edits=50).lens
        300
    """

    lens: int = 300
    erasure: int = 400
    locate: int = 100
    injection: int = 200
    choose: int = 80
    edits: int = 300
    controls: int = 3
    strengths: tuple[float, ...] = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 15)
    per_case: int = 3


_ALL = 10**9

SizeName = Literal["quick", "default", "full"]

#: Sizes by name: ``"quick"`` looks at some tens of questions, ``"full"`` bounds nothing.
SIZES: dict[SizeName, Sizes] = {
    "quick": Sizes(60, 40, 20, 40, 20, 40, 1, (1, 2, 4, 8), 1),
    "default": Sizes(),
    "full": Sizes(lens=_ALL, erasure=_ALL, locate=_ALL, injection=_ALL, choose=_ALL, edits=_ALL),
}


@dataclass(frozen=True)
class StudySettings:
    """What a study draws, and how much each step takes.

    Args:
        seed: of every draw.
        limit: facts studied at most, a seeded sample with an equal share of each split.
        sizes: a name of `SIZES`, or `Sizes` of one's own.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> import mi_hops
        >>> mi_hops.StudySettings(limit=200, sizes="quick").size.lens
        60
    """

    seed: int = 0
    limit: int | None = None
    sizes: Sizes | SizeName = "default"

    @property
    def size(self) -> Sizes:
        """The sizes themselves."""
        return self.sizes if isinstance(self.sizes, Sizes) else SIZES[self.sizes]

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Sizes) and self.sizes not in SIZES:
            raise ValueError(
                f"sizes is {self.sizes!r}; expected one of {list(SIZES)}, or mi_hops.study.Sizes(...)"
            )


@dataclass
class Run:
    """One pass through the steps; what earlier steps found is read back from their files."""

    model: HookedModel
    facts: list[TwoHopFact]
    study: Folder
    settings: StudySettings
    progress: bool
    #: Forms that every fact has; where there is none, each fact is asked in its own first.
    forms: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        first, facts = self.facts[0], self.facts
        self.forms = [f for f in first.prompts if all(f in fact.prompts for fact in facts)] or [
            None
        ]

    @property
    def limits(self) -> Limits:
        """Of a sweep over facts."""
        return Limits(batch_size=8, progress=self.progress)

    @property
    def form(self) -> str | None:
        """The main form: of lens, erasure, locating, injection and edits."""
        return self.forms[0]

    @cached_property
    def gap(self) -> Gap:
        """The gap, from its file."""
        return Gap.load(self.study.path("gap"))

    @cached_property
    def passed(self) -> list[TwoHopFact]:
        """Questions answered correctly, both hops known, held out of training where a split says so."""
        return _held_out(self.gap.passed)

    @cached_property
    def failed(self) -> list[TwoHopFact]:
        """Questions of the gap, held out of training where a split says so."""
        found = self.gap.failed
        if not found:
            passed = "no question failed although both hops are known"
            raise Skip(passed if self.gap.passed else self.none_known)
        return _held_out(found)

    @property
    def none_known(self) -> str:
        """Why there is no fact with both hops known."""
        if self.gap.facts:
            return "the model knows both hops of none of these facts"
        reasons = describe_reasons(count_reasons(self.gap.skipped))
        return f"none of these facts can be asked about both hops ({reasons})"

    @cached_property
    def halves(self) -> tuple[list[TwoHopFact], list[TwoHopFact]]:
        """The failures, split for choosing and for reporting."""
        if len(self.failed) < 4:
            raise Skip(
                f"only {len(self.failed)} question(s) failed: too few to choose on one half and "
                "report on the other"
            )
        by_id = {f.id: f for f in self.failed}
        choose, report = split_halves(list(by_id), seed=self.settings.seed)
        return [by_id[i] for i in choose], [by_id[i] for i in report]

    def draw(self, facts: Sequence[TwoHopFact], n: int, salt: str) -> list[TwoHopFact]:
        """A seeded sample of at most n, in the given order."""
        rng = random.Random(f"{self.settings.seed}/{salt}")
        chosen = rng.sample(range(len(facts)), min(n, len(facts)))
        return [facts[i] for i in sorted(chosen)]


def _held_out(facts: Sequence[TwoHopFact]) -> list[TwoHopFact]:
    """Facts not marked as trained; all of them where no split says so."""
    return [f for f in facts if f.split != "train"] or list(facts)


def choosing(examples: Any) -> np.ndarray:
    """Which examples choose a cell; the others report it. A single example does neither."""
    labels = examples.tolist()
    chosen = set(split_halves(labels)[0]) if len(labels) > 1 else set(labels)
    return np.array([label in chosen for label in labels])
