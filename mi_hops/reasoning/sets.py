"""Builds the sets of queries that a repair is scored on, from plain facts.

`queries` says what belongs in each set. Whatever is drawn is drawn from a seed, and a case's
draws depend on the other cases in one thing: what one case was repaired on is drawn for none. Where
repairs pile up in one model, such a query would ask what another repair was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.forms import require_form
from mi_hops.facts.templates import capitalise
from mi_hops.model import HookedModel
from mi_hops.reasoning.gap import Gap, find_gap
from mi_hops.reasoning.queries import Draft, Query, QuerySets, among
from mi_hops.text.matching import normalise
from mi_hops.text.tokens import TokenError, find_text

_OTHER_ORDER = {"suffix": "prefix", "prefix": "suffix"}
_Item = TypeVar("_Item")

#: Set -> why a case has no query in it.
_NOTHING = {
    "paraphrase": "no other wording",
    "other_order": "no other template order",
    "generalisation": "every other second hop is a case, or not of this wording",
    "specificity": "no unrelated answered question",
    "specificity_same_relation": "no unrelated answered question with this second relation",
    "first_hop": "no first-hop prompt",
    "second_hop": "no second-hop prompt",
    "neutral": "every single fact is part of a case",
}


@dataclass(frozen=True)
class Known:
    """What the unrepaired model is known to answer; get it from a `Gap` with `of`.

    Attributes:
        answered: ids of the facts whose two-hop prompt it answers correctly.
        second_hop: facts whose second hop it knows: their ids, or a function of the fact.
        said: case id -> what it said instead of the answer.
    """

    answered: Collection[str] = ()
    second_hop: Collection[str] | Callable[[TwoHopFact], bool] = ()
    said: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, gap: Gap, *, without: Collection[str] = ()) -> Known:
        """What a gap found, in its first form.

        Args:
            without: ids of facts whose two-hop prompt is not to be drawn as an answered one.
        """
        frame = gap.frame
        return cls(
            answered={fact.id for fact in gap.passed} - set(without),
            second_hop=set(frame.loc[frame["second"], "id"]),
            said=dict(zip(frame["id"], frame["said"], strict=True)),
        )

    def knows_second_hop(self, fact: TwoHopFact) -> bool:
        """Whether the fact's second hop is known."""
        known = self.second_hop
        return bool(known(fact)) if callable(known) else fact.id in known


def build_sets(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    gap: Gap | None = None,
    known: Known | None = None,
    pool: Sequence[TwoHopFact] | None = None,
    form: str | None = None,
    per_case: int = 5,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> QuerySets:
    """Build all query sets for the facts to be repaired.

    *Unrelated* means that subject, bridge and answer of the other fact are none of the case's.
    Generalisation takes facts of the pool with the case's bridge and puts the case's first hop in
    place of theirs (a fact with the same subject and first relation stays as it is), one for each
    answer. No case's correction prompt is drawn into generalisation or specificity. The single hops
    are asked in other forms than the case's own, as far as they have any: in that form a repair is
    given their prompts.

    Args:
        model: asked for the gap where neither `gap` nor `known` is given; not used otherwise.
        facts: the cases.
        gap: what the unrepaired model answers, from `find_gap`: in `form` where that was asked, else
            in the gap's first form.
        known: the same from another source, instead of a gap.
        pool: facts that the other questions are drawn from; it may contain the cases. By default the
            facts of the gap, else the cases.
        form: of the correction prompt and of the two-hop questions drawn; by default the gap's, else
            each fact's first.
        per_case: queries per case in each set that is drawn, at most.
        texts: neutral texts (sentences, say) for the neutral set, instead of statements from the
            pool; those that name a case's subject, bridge or answer are not drawn for it. A text's
            last word is taken as the answer, so that its perplexity is taken over all its tokens.
        seed: of the draws.

    Raises:
        ValueError: no cases, a case id used twice, ``per_case`` below 1, a form that no fact has, a
            case without `form`, both `gap` and `known`, or a text of fewer than two words.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.Hopland().sample(train=0, held_out=20))
        >>> queries = mi_hops.build_sets(model, gap.failed, gap=gap, per_case=2)
        >>> len(queries.of("correction")) == len(gap.failed)
        True
    """
    ids = [fact.id for fact in facts]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"expected one or more cases, each with its own id; got {len(ids)} with "
            f"{len(set(ids))} different ids"
        )
    if per_case < 1:
        raise ValueError(f"per_case is {per_case}; expected at least 1")
    if gap is not None and known is not None:
        raise ValueError("gap and known both say what the model answers; give one of them")
    if known is None:
        if gap is None:
            gap = find_gap(model, facts if pool is None else pool, form=form)
        known = Known.of(gap.in_form(form) if form in gap.forms else gap)
        form = gap.form if form is None else form
        pool = gap.facts if pool is None else pool
    require_form(facts, form)
    makers = _Makers(facts, facts if pool is None else pool, known, form, per_case, texts, seed)
    queries: list[Query] = []
    skipped: list[tuple[str, str, str]] = []
    for case in facts:
        for name, found in makers.sets(case).items():
            if isinstance(found, str):
                skipped.append((name, case.id, found))
            else:
                queries += found
    settings = {"form": form, "per_case": per_case, "texts": len(texts), "seed": seed}
    return QuerySets(tuple(queries), tuple(ids), tuple(skipped), settings)


class _Makers:
    """The queries of all sets for one case after another."""

    def __init__(
        self,
        cases: Sequence[TwoHopFact],
        pool: Sequence[TwoHopFact],
        known: Known,
        form: str | None,
        per_case: int,
        texts: Sequence[str],
        seed: int,
    ) -> None:
        self.form, self.per_case, self.known, self.seed = form, per_case, known, seed
        self.pool = list(pool)
        answered = frozenset(known.answered)
        self.answered = [f for f in pool if f.id in answered]
        self.by_relation2: dict[str, list[TwoHopFact]] = {}
        for fact in self.answered:
            self.by_relation2.setdefault(fact.relation2, []).append(fact)
        self.by_bridge: dict[str, list[TwoHopFact]] = {}
        for fact in pool:
            self.by_bridge.setdefault(normalise(fact.bridge), []).append(fact)
        self.texts = [_split_text(text, i) for i, text in enumerate(texts)]
        self.corrections = frozenset(case.prompt(form) for case in cases)
        # Single facts that some case is made of are not neutral, whichever repair is on.
        self.touched = {hop for case in cases for hop in _hops(case)}

    def sets(self, case: TwoHopFact) -> dict[str, list[Query] | str]:
        """Set -> a case's queries, or the reason why there are none; in the order of `SETS`."""
        form, own = self._form_of(case), case.prompt(self.form)
        said = self.known.said.get(case.id, "").strip()
        texts = [text for name, text in case.prompts.items() if name != form]
        texts += [text.rstrip() for text in case.paraphrases]
        order = case.prompts.get(_OTHER_ORDER.get(form, ""))
        first, second = (
            self._not_given(case, p) for p in (case.first_prompts, case.second_prompts)
        )
        same = self.by_relation2.get(case.relation2, [])
        drafts = {
            "correction": [Draft.of(case, own, said)],
            "paraphrase": [Draft.of(case, text, said) for text in texts],
            "other_order": [] if order is None else [Draft.of(case, order, said)],
            "generalisation": self._generalisation(case),
            "specificity": self._unrelated(case, "specificity", self.answered),
            "specificity_same_relation": self._unrelated(case, "specificity_same_relation", same),
            "first_hop": [
                Draft(text, case.bridge, case.bridge_aliases, case.id, wrong=case.answer)
                for text in first
            ],
            "second_hop": [Draft.of(case, text) for text in second],
            "neutral": self._neutral(case),
        }
        return {name: self._queries(name, case, found) for name, found in drafts.items()}

    def _queries(self, name: str, case: TwoHopFact, drafts: list[Draft] | str) -> list[Query] | str:
        if not drafts:
            return _NOTHING[name]
        if isinstance(drafts, str):
            return drafts
        own = case.prompt(self.form)
        unique = {d.prompt: d for d in drafts if name == "correction" or d.prompt != own}
        if not unique:
            return "only the correction prompt itself"
        return [draft.query(case.id, name, i) for i, draft in enumerate(unique.values())]

    def _rng(self, case: TwoHopFact, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}/{case.id}")

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

    def _generalisation(self, case: TwoHopFact) -> list[Draft] | str:
        mine = (case.answer, *case.answer_aliases, case.subject, case.bridge)
        others = [
            f
            for f in self.by_bridge.get(normalise(case.bridge), ())
            if f.relation2 != case.relation2 and not among(f.answer, *mine)
        ]
        if not others:
            return "no other second hop from this bridge"
        others = [f for f in others if self.known.knows_second_hop(f)]
        if not others:
            return "no other second hop is known"

        def draft(other: TwoHopFact) -> tuple[str, Draft] | None:
            prompt = self._with_first_hop(case, other)
            if prompt is None or prompt in self.corrections:
                return None
            return normalise(other.answer), Draft.of(other, prompt, case.answer)

        return self._drawn(others, draft, self._rng(case, "generalisation"))

    def _unrelated(self, case: TwoHopFact, name: str, facts: Sequence[TwoHopFact]) -> list[Draft]:
        mine = names_of(case)

        def draft(other: TwoHopFact) -> tuple[str, Draft] | None:
            prompt = other.prompts.get(self._form_of(other))
            if not prompt or prompt in self.corrections or mine & names_of(other):
                return None
            return prompt, Draft.of(other, prompt, case.answer)

        return self._drawn(facts, draft, self._rng(case, name))

    def _neutral(self, case: TwoHopFact) -> list[Draft] | str:
        mine, rng = names_of(case), self._rng(case, "neutral")

        def of_text(text: Draft) -> tuple[str, Draft] | None:
            said = normalise(f"{text.prompt} {text.answer}")
            if any(name in said for name in mine):
                return None
            return text.prompt, replace(text, wrong=case.answer)

        def of_fact(fact: TwoHopFact) -> tuple[str, Draft] | None:
            first, second = _hops(fact)
            choices = (
                (first, fact.first_prompts, fact.bridge, fact.bridge_aliases),
                (second, fact.second_prompts, fact.answer, fact.answer_aliases),
            )
            hop, prompts, answer, aliases = choices[rng.randrange(2)]
            form = self.form if self.form in prompts else next(iter(prompts), None)
            if form is None or hop in self.touched or mine & {hop[0], normalise(answer)}:
                return None
            return prompts[form], Draft(prompts[form], answer, aliases, fact.id, case.answer)

        if self.texts:
            return self._drawn(self.texts, of_text, rng) or "every text names it"
        return self._drawn(self.pool, of_fact, rng)

    def _drawn(
        self,
        items: Sequence[_Item],
        draft: Callable[[_Item], tuple[str, Draft] | None],
        rng: random.Random,
    ) -> list[Draft]:
        """The first `per_case` drafts of shuffled items, one for each key."""
        found: dict[str, Draft] = {}
        for item in shuffled(items, rng):
            if len(found) == self.per_case:
                break
            made = draft(item)
            if made is not None:
                found.setdefault(*made)
        return list(found.values())

    def _with_first_hop(self, case: TwoHopFact, other: TwoHopFact) -> str | None:
        """The other fact's prompt with the case's first hop in it; None where it cannot be made."""
        text = other.prompts.get(self._form_of(other))
        if text is None or (other.subject, other.relation1) == (case.subject, case.relation1):
            return text
        return with_first_hop(text, other.first_hop, case.first_hop)


def with_first_hop(text: str, old: str, new: str) -> str | None:
    """A prompt with another first-hop phrase in the place of its own; None where it has none."""
    try:
        start, end = find_text(text, old)
    except TokenError:
        return None
    return text[:start] + (capitalise(new) if text[start].isupper() else new) + text[end:]


def _split_text(text: str, i: int) -> Draft:
    """A text as a prompt and its last word."""
    prompt, *last = text.strip().rsplit(maxsplit=1)
    if not last:
        raise ValueError(f"text {i} is {text!r}; a neutral text needs two words or more")
    return Draft(prompt, last[0], (), f"text {i}")


def _hops(fact: TwoHopFact) -> tuple[tuple[str, str], tuple[str, str]]:
    return (
        (normalise(fact.subject), fact.relation1),
        (normalise(fact.bridge), fact.relation2),
    )


def names_of(fact: TwoHopFact) -> set[str]:
    """Every spelling of subject, bridge and answer, as compared."""
    named = (fact.subject, fact.bridge, *fact.bridge_aliases, fact.answer, *fact.answer_aliases)
    return {normalise(name) for name in named if name.strip()}


def shuffled(items: Sequence[_Item], rng: random.Random) -> Iterator[_Item]:
    """The items in random order, drawn one by one, so that a few of many cost little."""
    moved: dict[int, int] = {}
    for last in range(len(items) - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield items[moved.get(pick, pick)]
        moved[pick] = moved.get(last, last)
