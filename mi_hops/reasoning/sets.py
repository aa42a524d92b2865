"""Builds the sets of queries that a repair is scored on, from plain facts.

What belongs in each set stands in `queries`. Whatever is drawn is drawn from a seed, and a case's
draws depend on the other cases in one thing: what one case was repaired on is drawn for none. Where
repairs pile up in one model, such a query would ask what another repair was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import capitalise
from mi_hops.reasoning.queries import SETS, Query, QuerySets, among
from mi_hops.text.matching import normalise
from mi_hops.text.tokens import TokenError, find_text

__all__ = ["SETS", "Query", "QuerySets", "build_sets"]

_OTHER_ORDER = {"suffix": "prefix", "prefix": "suffix"}
_Item = TypeVar("_Item")

#: Facts whose second hop is known: their ids, or a function that tells.
Known = Collection[str] | Callable[[TwoHopFact], bool]


def build_sets(
    failed: Sequence[TwoHopFact],
    pool: Sequence[TwoHopFact],
    *,
    answered_ids: Collection[str],
    known_ids: Known,
    form: str | None = None,
    per_case: int = 5,
    wrong: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> QuerySets:
    """All sets for the failed facts.

    *Unrelated* means that subject, bridge and answer of the other fact are none of the case's.
    Generalisation takes facts of the pool with the case's bridge and puts the case's first hop in
    place of theirs (a fact with the same subject and first relation stays as it is), one for each
    answer. No case's correction prompt is drawn into generalisation or specificity. The single hops
    are asked in other forms than the case's own, as far as they have any: in that form a repair is
    given their prompts.

    Args:
        failed: the cases.
        pool: facts that the other questions are drawn from; cases in it are welcome.
        answered_ids: ids of pool facts whose two-hop prompt in `form` the unedited model answers
            rightly.
        known_ids: which pool facts have a second hop that the model knows: ids, or a function of
            the fact.
        form: of the correction prompt and of the two-hop questions drawn; by default each fact's
            first.
        per_case: at most so many queries a case in each set that is drawn.
        wrong: case id -> what the unedited model said instead of the answer.
        texts: neutral texts (sentences, say) for the neutral set, in place of statements from the
            pool; those that name a case's subject, bridge or answer are not drawn for it. A text's
            last word stands as the answer, so that its perplexity is taken over all its tokens.
        seed: of the draws.

    Raises:
        ValueError: no cases, a case id used twice, ``per_case`` below 1, a case without `form`, or a
            text of fewer than two words.
    """
    ids = [fact.id for fact in failed]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"expected one or more cases, each with its own id; got {len(ids)} with "
            f"{len(set(ids))} different ids"
        )
    if per_case < 1:
        raise ValueError(f"per_case is {per_case}; expected at least 1")
    makers = _Makers(
        failed, pool, answered_ids, known_ids, form, per_case, wrong or {}, texts, seed
    )
    queries: list[Query] = []
    skipped: list[tuple[str, str, str]] = []
    for case in failed:
        for name in SETS:
            found = makers.make(name, case)
            if isinstance(found, str):
                skipped.append((name, case.id, found))
            else:
                queries += found
    settings = {"form": form, "per_case": per_case, "texts": len(texts), "seed": seed}
    return QuerySets(tuple(queries), tuple(ids), tuple(skipped), settings)


@dataclass(frozen=True)
class _Draft:
    """A query before it has a case, a set and an id."""

    prompt: str
    answer: str
    aliases: tuple[str, ...]
    source: str


class _Makers:
    """One method a set: drafts for a case, or the reason why there are none."""

    def __init__(
        self,
        failed: Sequence[TwoHopFact],
        pool: Sequence[TwoHopFact],
        answered_ids: Collection[str],
        known_ids: Known,
        form: str | None,
        per_case: int,
        wrong: Mapping[str, str],
        texts: Sequence[str],
        seed: int,
    ) -> None:
        self.form, self.per_case, self.wrong, self.seed = form, per_case, wrong, seed
        self.pool = list(pool)
        self.known = known_ids if callable(known_ids) else frozenset(known_ids).__contains__
        self.known_by_fact = callable(known_ids)
        right = frozenset(answered_ids)
        self.answered = [f for f in pool if f.id in right]
        self.by_relation2: dict[str, list[TwoHopFact]] = {}
        for fact in self.answered:
            self.by_relation2.setdefault(fact.relation2, []).append(fact)
        self.by_bridge: dict[str, list[TwoHopFact]] = {}
        for fact in pool:
            self.by_bridge.setdefault(normalise(fact.bridge), []).append(fact)
        self.texts = [_split_text(text, i) for i, text in enumerate(texts)]
        self.corrections = frozenset(case.prompt(form) for case in failed)
        # Single facts that some case is made of are not neutral, whichever repair is on.
        self.touched = {hop for case in failed for hop in _hops(case)}

    def make(self, name: str, case: TwoHopFact) -> list[Query] | str:
        rng = random.Random(f"{self.seed}/{name}/{case.id}")
        drafts = getattr(self, f"_{name}")(case, rng)
        if isinstance(drafts, str):
            return drafts
        own = case.prompt(self.form)
        unique = {d.prompt: d for d in drafts if name == "correction" or d.prompt != own}
        if not unique:
            return "only the correction prompt itself"
        return [
            Query(
                case=case.id,
                set=name,
                query_id=f"{case.id}#{name}#{i}",
                prompt=draft.prompt,
                answer=draft.answer,
                aliases=draft.aliases,
                wrong=self._wrong(name, case, draft),
                source=draft.source,
            )
            for i, draft in enumerate(unique.values())
        ]

    def _wrong(self, name: str, case: TwoHopFact, draft: _Draft) -> str | None:
        own = name in ("correction", "paraphrase", "other_order", "second_hop")
        wrong = (self.wrong.get(case.id) or "").strip() if own else case.answer
        if name == "second_hop" or not wrong or among(wrong, draft.answer, *draft.aliases):
            return None
        return wrong

    # -- the case's own prompts -------------------------------------------------------------------

    def _correction(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        return [_Draft(case.prompt(self.form), case.answer, case.answer_aliases, case.id)]

    def _paraphrase(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        texts = [t for f, t in case.prompts.items() if f != self._form_of(case)]
        found = [
            _Draft(t, case.answer, case.answer_aliases, case.id)
            for t in (*texts, *(p.rstrip() for p in case.paraphrases))
        ]
        return found or "no other wording"

    def _other_order(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        order = _OTHER_ORDER.get(self._form_of(case))
        if order is None or order not in case.prompts:
            return "no other template order"
        return [_Draft(case.prompts[order], case.answer, case.answer_aliases, case.id)]

    def _first_hop(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        found = [
            _Draft(t, case.bridge, case.bridge_aliases, case.id)
            for t in self._not_given(case, case.first_prompts)
        ]
        return found or "no first-hop prompt"

    def _second_hop(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        found = [
            _Draft(t, case.answer, case.answer_aliases, case.id)
            for t in self._not_given(case, case.second_prompts)
        ]
        return found or "no second-hop prompt"

    def _not_given(self, case: TwoHopFact, prompts: Mapping[str, str]) -> list[str]:
        """A single hop's prompts that no repair was given.

        An edit is made from the hops' prompts of the form edited, and may be held to keep them. A
        hop worded in that form alone is asked in it.
        """
        given = prompts.get(self._form_of(case))
        return [t for t in prompts.values() if t != given] or list(prompts.values())

    def _form_of(self, case: TwoHopFact) -> str:
        return next(iter(case.prompts)) if self.form is None else self.form

    # -- drawn from the pool ----------------------------------------------------------------------

    def _generalisation(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        others = [
            f
            for f in self.by_bridge.get(normalise(case.bridge), ())
            if f.relation2 != case.relation2
            and not among(f.answer, case.answer, *case.answer_aliases, case.subject, case.bridge)
        ]
        if not others:
            return "no other second hop from this bridge"
        others = [f for f in others if self._is_known(f)]
        if not others:
            return "no other second hop is known"
        found: dict[str, _Draft] = {}
        for other in _shuffled(others, rng):
            if len(found) == self.per_case:
                break
            prompt = self._with_first_hop(case, other)
            if prompt is None or prompt in self.corrections or normalise(other.answer) in found:
                continue
            draft = _Draft(prompt, other.answer, other.answer_aliases, other.id)
            found[normalise(other.answer)] = draft
        return list(found.values()) or "every other second hop is a case, or not of this wording"

    def _specificity(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        return self._unrelated(case, self.answered, rng) or "no unrelated answered question"

    def _specificity_same_relation(
        self, case: TwoHopFact, rng: random.Random
    ) -> list[_Draft] | str:
        found = self._unrelated(case, self.by_relation2.get(case.relation2, []), rng)
        return found or "no unrelated answered question with this second relation"

    def _neutral(self, case: TwoHopFact, rng: random.Random) -> list[_Draft] | str:
        found: dict[str, _Draft] = {}
        mine = _names(case)
        if self.texts:
            for draft in _shuffled(self.texts, rng):
                if len(found) == self.per_case:
                    break
                said = normalise(f"{draft.prompt} {draft.answer}")
                if not any(name in said for name in mine):
                    found.setdefault(draft.prompt, draft)
            return list(found.values()) or "every text names it"
        for fact in _shuffled(self.pool, rng):
            if len(found) == self.per_case:
                break
            first, second = _hops(fact)
            choices = (
                (first, fact.first_prompts, fact.bridge, fact.bridge_aliases),
                (second, fact.second_prompts, fact.answer, fact.answer_aliases),
            )
            hop, prompts, answer, aliases = choices[rng.randrange(2)]
            form = self.form if self.form in prompts else next(iter(prompts), None)
            if form is None or hop in self.touched or mine & {hop[0], normalise(answer)}:
                continue
            found.setdefault(prompts[form], _Draft(prompts[form], answer, aliases, fact.id))
        return list(found.values()) or "no single fact that is no part of a case"

    def _unrelated(
        self, case: TwoHopFact, facts: Sequence[TwoHopFact], rng: random.Random
    ) -> list[_Draft]:
        mine = _names(case)
        found: dict[str, _Draft] = {}
        for other in _shuffled(facts, rng):
            if len(found) == self.per_case:
                break
            form = self._form_of(other)
            prompt = other.prompts.get(form)
            if prompt and prompt not in self.corrections and not mine & _names(other):
                found[prompt] = _Draft(prompt, other.answer, other.answer_aliases, other.id)
        return list(found.values())

    def _is_known(self, fact: TwoHopFact) -> bool:
        return bool(self.known(fact if self.known_by_fact else fact.id))  # type: ignore[arg-type]

    def _with_first_hop(self, case: TwoHopFact, other: TwoHopFact) -> str | None:
        """The other fact's prompt with the case's first hop in it; None where it cannot be made."""
        text = other.prompts.get(self._form_of(other))
        if text is None or (other.subject, other.relation1) == (case.subject, case.relation1):
            return text
        try:
            start, end = find_text(text, other.first_hop)
        except TokenError:
            return None
        phrase = capitalise(case.first_hop) if text[start].isupper() else case.first_hop
        return text[:start] + phrase + text[end:]


def _split_text(text: str, i: int) -> _Draft:
    """A text as a prompt and its last word."""
    prompt, *last = text.strip().rsplit(maxsplit=1)
    if not last:
        raise ValueError(f"text {i} is {text!r}; a neutral text needs two words or more")
    return _Draft(prompt, last[0], (), f"text {i}")


def _hops(fact: TwoHopFact) -> tuple[tuple[str, str], tuple[str, str]]:
    return (
        (normalise(fact.subject), fact.relation1),
        (normalise(fact.bridge), fact.relation2),
    )


def _names(fact: TwoHopFact) -> set[str]:
    named = (fact.subject, fact.bridge, *fact.bridge_aliases, fact.answer, *fact.answer_aliases)
    return {normalise(name) for name in named if name.strip()}


def _shuffled(items: Sequence[_Item], rng: random.Random) -> Iterator[_Item]:
    """The items in random order, drawn one by one, so that a few of many cost little."""
    moved: dict[int, int] = {}
    for last in range(len(items) - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield items[moved.get(pick, pick)]
        moved[pick] = moved.get(last, last)
