"""Queries: the prompts that a repair is scored on, each with its case and its set.

A *case* is a failed two-hop fact together with the repair fitted to it. Each query is asked while
the repair of its case is on, and belongs to one of these sets (after CREME, arXiv 2402.14328):

=============================  ===================================================================
``correction``                 the case's own two-hop prompt, in the form the repair was fitted to
``paraphrase``                 its other wordings: other template order, question form, paraphrases
``other_order``                the part of ``paraphrase`` that is the other template order
``generalisation``             same first hop, another second hop (known) with another answer
``specificity``                unrelated two-hop questions that the unedited model answers correctly
``specificity_same_relation``  such questions that ask for the same second relation
``first_hop``                  the case's first hop by itself (answer: the bridge), worded otherwise
                               than in the form the repair was fitted to
``second_hop``                 its second hop by itself, likewise
``neutral``                    statements of single facts that no case is made of, or given texts
=============================  ===================================================================

Where a case is an edited single fact, other sets are asked: those of `portability`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.result.display import html_table, shorten
from mi_hops.text.matching import normalise

#: In the order of tables and figures.
SETS = (
    "correction",
    "paraphrase",
    "other_order",
    "generalisation",
    "specificity",
    "specificity_same_relation",
    "first_hop",
    "second_hop",
    "neutral",
)

#: Sets asked besides where the cases are edited single facts (`portability`).
EDIT_SETS = (
    "efficacy",
    "wordings",
    "portability",
    "portability_own",
    "portability_wordings",
    "portability_chains",
    "old_answer",
    "reverse",
    "other_hop",
    "same_subject",
    "same_relation",
)

#: Set -> its place in tables and figures.
PLACE = {name: i for i, name in enumerate((*EDIT_SETS, *SETS))}


@dataclass(frozen=True, kw_only=True)
class Query:
    """One prompt, asked while the repair of one case is active.

    Attributes:
        case: id of the fact whose repair is on.
        set: the set the query belongs to.
        query_id: unique among the queries scored together.
        prompt: ends right before the answer, without white space.
        answer: the right answer to *this* prompt.
        aliases: other accepted spellings of it.
        wrong: a competing answer: what the unedited model wrongly said (correction, paraphrases),
            or the case's own answer where it would be leakage (all sets with another right answer).
        source: id of the fact the prompt was taken from.

    Raises:
        ValueError: an empty text, a prompt that ends in white space, or a wrong answer that is right.
    """

    case: str
    set: str
    query_id: str
    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    wrong: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aliases", tuple(self.aliases))
        for name in ("case", "set", "query_id", "prompt", "answer"):
            text = getattr(self, name)
            if not text.strip() or text != text.rstrip():
                raise ValueError(
                    f"query {self.query_id!r}: {name} is {text!r}; it must not be empty or end in "
                    "white space"
                )
        if self.wrong is not None and among(self.wrong, self.answer, *self.aliases):
            raise ValueError(
                f"query {self.query_id!r}: the wrong answer {self.wrong!r} is the answer or one of "
                "its aliases; pass None where there is no wrong answer"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {**asdict(self), "aliases": list(self.aliases)}


@dataclass(frozen=True)
class Draft:
    """A query before it has a case, a set and an id."""

    prompt: str
    answer: str
    aliases: tuple[str, ...]
    source: str
    wrong: str | None = None

    @classmethod
    def of(cls, fact: TwoHopFact, prompt: str, wrong: str | None = None) -> Draft:
        """A prompt with the fact's own answer."""
        return cls(prompt, fact.answer, fact.answer_aliases, fact.id, wrong)

    def query(self, case: str, name: str, i: int) -> Query:
        """The i-th query of a case's set; a wrong answer that is right is left out."""
        competes = self.wrong and not among(self.wrong, self.answer, *self.aliases)
        return Query(
            case=case,
            set=name,
            query_id=f"{case}#{name}#{i}",
            prompt=self.prompt,
            answer=self.answer,
            aliases=self.aliases,
            wrong=self.wrong if competes else None,
            source=self.source,
        )


@dataclass(frozen=True, repr=False)
class QuerySets:
    """The queries of several cases, with the cases that have none in a set and the reasons.

    Attributes:
        queries: all queries.
        cases: ids of the cases, those without any query included.
        skipped: (set, case id, reason) wherever a set has no query for a case.
        settings: form, seed and the like, for provenance.

    Raises:
        ValueError: a query id used twice, a query of an unknown case, or leakage: a query that
            repeats the correction prompt of its own case under another name.
    """

    queries: tuple[Query, ...]
    cases: tuple[str, ...]
    skipped: tuple[tuple[str, str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_unique("query ids", (q.query_id for q in self.queries))
        unknown_cases = sorted({q.case for q in self.queries} - set(self.cases))
        if unknown_cases:
            raise ValueError(f"queries of unknown case(s) {unknown_cases[:5]}")
        own = {(q.case, q.prompt) for q in self.queries if q.set == "correction"}
        for q in self.queries:
            if q.set != "correction" and (q.case, q.prompt) in own:
                raise ValueError(
                    f"leakage: query {q.query_id!r} of set {q.set!r} repeats the correction prompt "
                    f"of its case: {q.prompt!r}"
                )

    def __iter__(self) -> Iterator[Query]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def of(self, *sets: str) -> QuerySets:
        """The queries of some sets only.

        Raises:
            ValueError: a set there is no query and no skipped case of.
        """
        here = {q.set for q in self.queries} | {name for name, _, _ in self.skipped}
        if set(sets) - here:
            raise ValueError(f"no set(s) {sorted(set(sets) - here)}; there are {sorted(here)}")
        return QuerySets(
            tuple(q for q in self.queries if q.set in sets),
            self.cases,
            tuple(s for s in self.skipped if s[0] in sets),
            self.settings,
        )

    def of_cases(self, *cases: str) -> QuerySets:
        """The queries of some cases only; unknown ids are ignored."""
        wanted = frozenset(cases)
        return QuerySets(
            tuple(q for q in self.queries if q.case in wanted),
            tuple(case for case in self.cases if case in wanted),
            tuple(s for s in self.skipped if s[1] in wanted),
            self.settings,
        )

    def counts(self) -> dict[str, SetCount]:
        """Set -> how many queries and cases it has, and why cases have none; in the order of tables."""
        asked = [(q.set, q.case) for q in self.queries]
        return count_sets(asked, self.skipped)

    def describe(self) -> str:
        """One line per set: ``paraphrase: 80 queries of 40 cases, 3 cases skipped (3 ...)``."""
        lines = [f"{len(self.cases)} cases, {len(self.queries)} queries"]
        lines += [f"{name}: {count.describe()}" for name, count in self.counts().items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return shorten(f"QuerySets: {self.describe()}", 1900)

    def _repr_html_(self) -> str:
        rows = [
            (name, n.queries, n.cases, n.skipped, "; ".join(n.why))
            for name, n in self.counts().items()
        ]
        header = ("set", "queries", "cases", "skipped", "why")
        return html_table(f"{len(self.cases)} cases", header, rows, total=len(rows))


@dataclass(frozen=True)
class SetCount:
    """How much one set asks.

    Attributes:
        queries: how many.
        cases: of how many cases.
        skipped: cases without a query.
        why: reason -> skipped cases.
    """

    queries: int
    cases: int
    skipped: int
    why: Mapping[str, int]

    def describe(self) -> str:
        """``80 queries of 40 cases, 3 cases skipped (3 no other second hop is known)``."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.why.items())
        text = f"{self.queries} queries of {self.cases} cases, {self.skipped} cases skipped"
        return f"{text} ({why})" if why else text


def count_sets(
    asked: Sequence[tuple[str, str]], skipped: Sequence[tuple[str, str, str]]
) -> dict[str, SetCount]:
    """Counts of (set, case) of each query and (set, case, reason) of each case without one."""
    counts = {}
    for name in in_order({*(s for s, _ in asked), *(s for s, _, _ in skipped)}):
        cases = [case for s, case in asked if s == name]
        why = Counter(reason for s, _, reason in skipped if s == name)
        counts[name] = SetCount(len(cases), len(set(cases)), sum(why.values()), dict(why))
    return counts


def in_order(names: Iterable[str]) -> list[str]:
    """Names of sets in the order of tables, one's own last."""
    return sorted(names, key=lambda name: (PLACE.get(name, len(PLACE)), name))


def require_unique(what: str, ids: Iterable[str]) -> None:
    """Refuse ids that are used twice.

    Raises:
        ValueError: with the first of them.
    """
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise ValueError(f"{what} must be unique; these are not: {repeated[:5]}")


def among(text: str, *others: str) -> bool:
    """Whether a text equals one of the others after `normalise`."""
    return normalise(text) in {normalise(o) for o in others}
