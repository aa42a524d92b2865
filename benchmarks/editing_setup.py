"""What the editing benchmarks share: the cases, the facts kept apart, the row of a table."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Peak
from mi_hops import Hopland, TwoHopFact, load_model
from mi_hops.editing import Moments, second_moments
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.gap import find_gap
from mi_hops.reasoning.queries import Query, QuerySets
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.sweep.metrics import NextToken, target_of
from mi_hops.sweep.repair import InPlaceRepair, Repair
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode

FORM = "suffix"
#: Only these come into C and into what repairs practise on; never a fact that is scored.
TRAINED = "train"
HELD_OUT = ("first_unseen", "second_unseen")
#: Part -> its share of the barred single facts (each held-out question has one) and of the others.
PARTS = {"report": (0.55, 0.35), "choose": (0.45, 0.30), "practice": (0.0, 0.35)}


@dataclass(frozen=True)
class Setup:
    """A model, failed held-out questions to report and to choose settings on, and facts to learn from.

    The single facts of the world are divided into three parts, and every question is made of facts of
    one part: those scored for the report, those scored for a choice, and those learned from share
    none, whichever set a question is in.

    Attributes:
        choose: cases settings may be chosen on.
        report: cases that are reported.
        queries: of `report`.
        choosing: of `choose`: the question itself and unrelated ones.
        corpus: statements of trained facts, which C is counted on.
        practice: trained questions for a repair that has to be trained.
    """

    model: Any
    name: str
    choose: list[TwoHopFact]
    report: list[TwoHopFact]
    queries: QuerySets
    choosing: QuerySets
    corpus: list[str]
    practice: list[TwoHopFact]

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return int(self.model.cfg.n_layers)


def set_up(name: str, *, cases: int, seed: int = 0, world: Hopland | None = None) -> Setup:
    """Find the gap on held-out questions of two parts and make the sets; the third is learned from."""
    rng = random.Random(seed)
    world = world or Hopland()
    model = load_model(name)
    part = deal(world, rng)

    def made_of(wanted: str, *splits: str) -> list[TwoHopFact]:
        facts = world.two_hop_facts(*splits)
        return [f for f in facts if all(part[hop] == wanted for hop in hops(f))]

    def scored(wanted: str) -> tuple[list[TwoHopFact], QuerySets]:
        held, trained = made_of(wanted, *HELD_OUT), made_of(wanted, TRAINED)
        held = rng.sample(held, min(len(held), 5 * cases))
        gap = find_gap(model, held + rng.sample(trained, min(len(trained), 750)), form=FORM)
        failed = [f for f in gap.failed if f.split in HELD_OUT]
        failed = rng.sample(failed, min(len(failed), cases))
        frame = gap.frame
        known = Known(
            answered=set(frame["id"][frame["two_hop"]]),
            second_hop=set(frame["id"][frame["second"]]),
        )
        sets = build_sets(model, failed, known=known, pool=gap.facts, form=FORM, seed=seed)
        return failed, sets

    report, queries = scored("report")
    choose, choosing = scored("choose")
    practice = made_of("practice", TRAINED)
    rng.shuffle(practice)
    stated = practice[:1500]
    corpus = {f"{f.prompt(FORM)} {f.answer}." for f in stated}
    corpus |= {f"{f.first_prompt(FORM)} {f.bridge}." for f in stated}
    corpus |= {f"{f.second_prompt(FORM)} {f.answer}." for f in stated}
    return Setup(
        model,
        str(name),
        choose,
        report,
        queries,
        choosing.of("correction", "specificity"),
        sorted(corpus),
        practice,
    )


def deal(world: Hopland, rng: random.Random) -> dict[tuple[str, str], str]:
    """The part of each single fact, by `PARTS`."""
    dealt = {}
    barred, others = sorted(world.barred), sorted(set(world.facts) - world.barred)
    for column, keys in enumerate((barred, others)):
        shares = [share[column] for share in PARTS.values()]
        drawn = rng.choices(list(PARTS), shares, k=len(keys))
        dealt.update(zip(keys, drawn, strict=True))
    return dealt


def hops(fact: TwoHopFact) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two single facts of a question."""
    return (fact.subject, fact.relation1), (fact.bridge, fact.relation2)


def covariance(setup: Setup, matrix: str = "W_O") -> Moments:
    """C of every layer, over statements of trained facts of which no question is scored."""
    return second_moments(setup.model, setup.corpus, matrix=matrix)


FIRST_RIGHT = NextToken(
    "first_right", "share", True, lambda x, target: (x.argmax(-1) == target.answer[0]).float()
)


class FirstTokens:
    """Queries of some facts, encoded once, of which the first tokens are read under many repairs."""

    def __init__(self, model: Any, queries: Iterable[Query], facts: Sequence[TwoHopFact]) -> None:
        self._model, self._facts = model, list(facts)
        self.queries = list(queries)
        self._prompts = [encode(model, q.prompt) for q in self.queries]
        self._targets = [
            target_of(model, p, q.answer) for p, q in zip(self._prompts, self.queries, strict=True)
        ]
        place = {fact.id: i for i, fact in enumerate(self._facts)}
        self._case = [place[q.case] for q in self.queries]

    def within(self, *names: str) -> torch.Tensor:
        """Which queries are of these sets."""
        return torch.tensor([q.set in names for q in self.queries])

    def right(self, repair: Any = None) -> torch.Tensor:
        """Whether each query's first token is right: 1 or 0, under a repair that is fitted first."""
        every = range(len(self.queries))
        if repair is None:
            return self._right(every)
        if isinstance(repair, Repair):
            fitted = repair.fit(self._model, self._facts)
            return self._right(every, repair=repair, states=[fitted[i] for i in self._case])
        found = torch.zeros(len(self.queries))
        for case, fact in enumerate(self._facts):
            own = [i for i in every if self._case[i] == case]
            with repair.applied(self._model, fact):
                found[own] = self._right(own)
        return found

    def _right(self, which: Sequence[int], **options: Any) -> torch.Tensor:
        prompts = [self._prompts[i] for i in which]
        targets = [self._targets[i] for i in which]
        return score_prompts(self._model, prompts, targets, FIRST_RIGHT, **options)["first_right"]


class Timed:
    """A repair with the seconds and the memory of its fit and the bytes of its states."""

    def __init__(self, repair: Repair) -> None:
        self.repair, self.name, self.n_bytes = repair, repair.name, 0
        self.seconds = self.peak = float("nan")

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> Any:
        """The repair's, timed."""
        with Peak() as peak:
            start = time.perf_counter()
            states = self.repair.fit(model, facts)
            self.seconds = (time.perf_counter() - start) / len(facts)
        self.peak = peak.mib
        self.n_bytes = sum({id(s): bytes_of(s) for s in states}.values()) // len(facts)
        return states

    def hooks(self, model: Any, states: Any, rows: Any) -> Any:
        """The repair's."""
        return self.repair.hooks(model, states, rows)


class TimedInPlace:
    """The same of an in-place repair: seconds per fact, memory of the fact that took most."""

    def __init__(self, repair: InPlaceRepair) -> None:
        self.repair, self.name, self.n_bytes, self.peak = repair, repair.name, 0, 0.0
        self._seconds: list[float] = []

    @property
    def seconds(self) -> float:
        """Mean over the facts there were."""
        return sum(self._seconds) / len(self._seconds)

    @contextmanager
    def applied(self, model: Any, fact: TwoHopFact) -> Iterator[Any]:
        """The repair's, timed."""
        with ExitStack() as stack:
            with Peak() as peak:
                start = time.perf_counter()
                state = stack.enter_context(self.repair.applied(model, fact))
                self._seconds.append(time.perf_counter() - start)
            self.peak, self.n_bytes = max(self.peak, peak.mib), bytes_of(state)
            yield state


def timed(repair: Repair | InPlaceRepair) -> Timed | TimedInPlace:
    """The repair with what it costs."""
    return Timed(repair) if isinstance(repair, Repair) else TimedInPlace(repair)


def bytes_of(state: Any) -> int:
    """Bytes a state takes: edits and codebooks tell, of anything else its tensors are counted."""
    if hasattr(state, "n_bytes"):
        return int(state.n_bytes)
    if hasattr(state, "element_size"):
        return int(state.numel() * state.element_size())
    if isinstance(state, list | tuple):
        return sum(map(bytes_of, state))
    return sum(map(bytes_of, vars(state).values())) if hasattr(state, "__dict__") else 0


COLUMNS = (
    "repair",
    "n",
    "corrected (first token)",
    "whole answer",
    "paraphrase",
    "other order",
    "same first hop: before",
    "after",
    "unrelated kept",
    "same relation kept",
    "first hop kept",
    "second hop kept",
    "KL neutral",
    "perplexity x",
    "s / fact",
    "peak MiB",
    "bytes / fact",
)


def score(setup: Setup, repairs: Sequence[Any]) -> list[list[str]]:
    """One row of `COLUMNS` a repair; shares of first answer tokens unless named otherwise."""
    return [row_of(setup, timed(repair)) for repair in repairs]


def row_of(setup: Setup, repair: Timed | TimedInPlace) -> list[str]:
    """One row of `COLUMNS`."""
    found = evaluate(setup.model, repair, setup.queries, setup.report, generate=False)
    table = found.table(n_resamples=500).loc[repair.name]

    def get(name: str, stat: str) -> float:
        try:
            return float(table.loc[(name, stat), "value"])
        except KeyError:
            return float("nan")

    def share(name: str, stat: str = "first_correct_after") -> str:
        try:
            row = table.loc[(name, stat)]
        except KeyError:
            return "-"
        return f"{row['value']:.1%} ({row['lower']:.1%} to {row['upper']:.1%})"

    ratio = get("neutral", "perplexity_after") / get("neutral", "perplexity_before")
    return [
        repair.name,
        str(len(setup.report)),
        share("correction"),
        share("correction", "exact_match_after"),
        share("paraphrase"),
        share("other_order"),
        share("generalisation", "first_correct_before"),
        share("generalisation"),
        share("specificity", "first_correct_ratio"),
        share("specificity_same_relation", "first_correct_ratio"),
        share("first_hop", "first_correct_ratio"),
        share("second_hop", "first_correct_ratio"),
        f"{get('neutral', 'kl'):.4f}",
        f"{ratio:.3f}",
        f"{repair.seconds:.3f}",
        f"{repair.peak:.0f}",
        f"{repair.n_bytes:,}",
    ]
