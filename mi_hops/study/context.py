"""What the steps of one study share: model, facts, settings, and what earlier steps found."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.reading import Facts
from mi_hops.facts.unusable import count_reasons, describe_reasons
from mi_hops.facts.wordings import with_lead
from mi_hops.model import HookedModel
from mi_hops.reasoning.gap import Gap, Score, check_score
from mi_hops.reasoning.wordings import CHOOSING, WordingChoice
from mi_hops.result.statistics import split_halves
from mi_hops.study.folder import Folder
from mi_hops.sweep.keep import keeping_nothing
from mi_hops.sweep.limits import Limits

if TYPE_CHECKING:
    from mi_hops.study.step import Step

T = TypeVar("T")

#: Splits whose facts may be worked examples; a study never scores them then.
EXAMPLES = (CHOOSING, "train")


#: Facts that a step takes at least under a time budget.
_LEAST = 8


class Skip(Exception):  # noqa: N818
    """A step that has nothing to work on; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """How many facts each step uses: this sets a study's cost, not its method.

    Attributes:
        facts: facts asked at most, a seeded sample with an equal share of each split.
        wordings: single hops per relation that each wording is tried on.
        lens, erasure, locate, injection: facts (of each group) at most.
        tuned: updates of the tuned lens; 0 leaves it out.
        edits: failures of the reporting half edited at most; a quarter as many of the choosing half.
        draws: of the erasure's control, and of queries per case in each set that is drawn.
        strengths: of the injection grid.

    Examples:
        >>> import mi_hops
        >>> mi_hops.Sizes(edits=50).lens
        300
    """

    facts: int = 2000
    wordings: int = 24
    lens: int = 300
    tuned: int = 150
    erasure: int = 400
    locate: int = 100
    injection: int = 200
    edits: int = 300
    draws: int = 3
    strengths: tuple[float, ...] = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 15)


_ALL = 10**9

SizeName = Literal["quick", "default", "full"]

#: Sizes by name: ``"quick"`` looks at some tens of questions, ``"full"`` bounds nothing.
SIZES: dict[SizeName, Sizes] = {
    "quick": Sizes(
        facts=400,
        wordings=10,
        lens=60,
        tuned=60,
        erasure=40,
        locate=20,
        injection=40,
        edits=40,
        draws=1,
        strengths=(1, 2, 4, 8),
    ),
    "default": Sizes(),
    "full": Sizes(
        facts=_ALL,
        wordings=_ALL,
        lens=_ALL,
        tuned=500,
        erasure=_ALL,
        locate=_ALL,
        injection=_ALL,
        edits=_ALL,
    ),
}


#: Steps that a study has only where they are asked for.
OptionalStep = Literal["knockout", "back_patching"]


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study: sampling, prompts, and sizes of its steps.

    Args:
        seed: of every draw.
        limit: facts asked at most, instead of the ``facts`` of `sizes`.
        sizes: a name of `SIZES`, or your own `Sizes`.
        shots: worked examples before every prompt. By default 0 or 3, whichever makes more single
            hops known, where the facts come in several wordings; else none.
        score: what counts as known and as answered: the whole answer and its end, or its first token.
        also: optional steps: ``"knockout"``, ``"back_patching"``; each takes as many facts as locating.
        budget: approximate time limit in minutes. Each step times a few facts and then takes as many as
            its share of the budget allows, at most what `sizes` says.

    Raises:
        ValueError: an unknown name, score or step, a negative number of shots, a limit or budget of
            nothing.

    Examples:
        >>> import mi_hops
        >>> mi_hops.StudySettings(limit=200, sizes="quick").size.lens
        60
    """

    seed: int = 0
    limit: int | None = None
    sizes: Sizes | SizeName = "default"
    shots: int | None = None
    score: Score = "answer"
    budget: float | None = None
    also: tuple[OptionalStep, ...] = ()

    @property
    def size(self) -> Sizes:
        """The sizes themselves."""
        return self.sizes if isinstance(self.sizes, Sizes) else SIZES[self.sizes]

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Sizes) and self.sizes not in SIZES:
            raise ValueError(
                f"sizes is {self.sizes!r}; expected one of {list(SIZES)}, or mi_hops.study.Sizes(...)"
            )
        check_score(self.score)
        also: Any = self.also
        unknown = [name for name in also if name not in get_args(OptionalStep)]
        if isinstance(also, str) or unknown:
            raise ValueError(
                f"also is {self.also!r}; expected optional steps, some of {get_args(OptionalStep)}"
            )
        if (self.shots or 0) < 0 or (self.budget is not None and self.budget <= 0):
            raise ValueError(
                f"shots is {self.shots} and budget {self.budget}; expected 0 or more worked examples, "
                "and minutes above 0"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected at least one fact, or None")


@dataclass
class Run:
    """One pass through the steps; what earlier steps found is read back from their files."""

    model: HookedModel
    given: Facts
    study: Folder
    settings: StudySettings
    progress: bool

    @cached_property
    def choice(self) -> WordingChoice | None:
        """How the facts are worded, where they come in several wordings."""
        if "wordings" not in self.study.settings["steps"]:
            return None
        return WordingChoice.load(self.study.path("wordings"))

    @cached_property
    def facts(self) -> list[TwoHopFact]:
        """The facts that are asked, in the wording and after the lead chosen.

        Raises:
            ValueError: worked examples are wanted, and there are no facts to take them from.
        """
        if self.choice is not None:
            return self.choice.apply(self.given)[0]
        shots = self.settings.shots or 0
        if not shots:
            return list(self.given)
        pool = [fact for fact in self.given if fact.split in EXAMPLES]
        asked = [fact for fact in self.given if fact.split not in EXAMPLES]
        if not pool or not asked:
            raise ValueError(
                f"shots={shots} worked examples are taken from facts of the splits {EXAMPLES}, which "
                f"are not scored then; {len(pool)} of these facts are of such a split, {len(asked)} of "
                "another. Give some facts split 'choosing', or set shots=0"
            )
        return [with_lead(fact, pool, shots=shots, seed=self.settings.seed) for fact in asked]

    @cached_property
    def forms(self) -> list[str | None]:
        """Forms to ask in, the main one first; where facts have none in common, each one's first."""
        if self.choice is not None:
            return list(self.choice.forms)
        first, facts = self.facts[0], self.facts
        return [f for f in first.prompts if all(f in fact.prompts for fact in facts)] or [None]

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

    @property
    def answered(self) -> list[TwoHopFact]:
        """`passed`; a step is left out, with the reason, where there is none."""
        if not self.passed:
            unknown = "no two-hop question is answered correctly with both hops known"
            raise Skip(unknown if self.gap.failed else self.none_known)
        return self.passed

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

    def draw(self, facts: Sequence[T], n: int, salt: str) -> list[T]:
        """A seeded sample of at most n, in the given order."""
        rng = random.Random(f"{self.settings.seed}/{salt}")
        chosen = rng.sample(range(len(facts)), min(n, len(facts)))
        return [facts[i] for i in sorted(chosen)]

    def affordable(
        self,
        step: Step,
        facts: Sequence[T],
        most: int,
        trial: Callable[[list[T]], object],
        *,
        few: int = 4,
        times: float = 1.0,
    ) -> int:
        """How many facts the step may take: `most`, or what its share of the budget pays for.

        A trial on a few facts tells what one costs, and is paid for itself. What was decided is kept
        in ``budget.json``, so a study that is resumed takes the same.

        Args:
            few: facts of the trial; what gains from company needs more.
            times: how often what the trial does is done for each fact.
        """
        if self.settings.budget is None or len(facts) <= few:
            return most
        kept = self.study.budget
        if step.name not in kept:
            chosen = self.draw(facts, few, "trial")
            begun = time.perf_counter()
            with keeping_nothing():
                trial(chosen)
            took = time.perf_counter() - begun
            each = took / few
            n = int((60 * self.settings.budget * step.share - took) / (times * each))
            kept[step.name] = {"seconds_each": each, "facts": min(max(n, _LEAST), most)}
            self.study.write("budget.json", json.dumps(kept, indent=1) + "\n")
            self.study.record("budget")
        return int(kept[step.name]["facts"])


def _held_out(facts: Sequence[TwoHopFact]) -> list[TwoHopFact]:
    """Facts not marked as trained; all of them where no split says so."""
    return [f for f in facts if f.split != "train"] or list(facts)


def choosing(examples: Any) -> np.ndarray:
    """Which examples choose a cell; the others report it. A single example does neither."""
    labels = examples.tolist()
    chosen = set(split_halves(labels)[0]) if len(labels) > 1 else set(labels)
    return np.array([label in chosen for label in labels])
