"""Several wordings of a relation, and leads of worked examples, to choose from.

A relation is asked in three forms, and each form can be worded in several ways
(`WordedRelation`). Which way a model understands best is measured on facts that are not reported;
what is chosen is an ordinary `Wording` per relation. `TwoHopFact.with_wording` then makes an
ordinary fact of it.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import FORMS, Wording

#: Words that two names may share without telling anything about one another.
_COMMON = frozenset(
    "the and of new north south east west saint san santa los las port city united republic "
    "democratic central airport mount lake island islands international national park for".split()
)
_SHARED = 3
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class WordedRelation:
    """One relation and all its wordings; those at index 0 are the default.

    Attributes:
        name: the relation, as `TwoHopFact.relation1` and `relation2` name it.
        domain, range: the kinds of thing it relates, "city" and "country".
        nouns: noun phrases that stand for the object, each with its verb: the suffix order.
        statements: clauses that the object completes: the prefix order.
        questions: whole questions.

    Raises:
        ValueError: no wording of some form, or one without its slot.
    """

    name: str
    domain: str
    range: str
    nouns: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        for form in FORMS:
            if not self._texts(form):
                raise ValueError(f"relation {self.name!r} has no wording for the {form} form")
        for form in FORMS:
            for index, _ in enumerate(self._texts(form)):
                try:
                    self.wording(**{form: index})
                except ValueError as error:
                    raise ValueError(f"relation {self.name!r}: the wording {error}") from None

    def _texts(self, form: str) -> tuple[object, ...]:
        tables = {"suffix": self.nouns, "prefix": self.statements, "question": self.questions}
        if form not in tables:
            raise ValueError(f"the form is {form!r}; there are {list(FORMS)}")
        return tables[form]

    def wording(self, *, suffix: int = 0, prefix: int = 0, question: int = 0) -> Wording:
        """A wording with one text per form, each chosen by index."""
        noun, verb = self.nouns[suffix]
        return Wording(noun, self.statements[prefix], self.questions[question], verb)

    def options(self, form: str) -> tuple[Wording, ...]:
        """One wording per text of `form`, the other forms at their default.

        The forms can be chosen one by one: a single hop asked in one form contains no text of
        another.
        """
        return tuple(self.wording(**{form: i}) for i, _ in enumerate(self._texts(form)))


def reword(fact: TwoHopFact, wordings: Mapping[str, Wording]) -> TwoHopFact:
    """The fact in the wordings chosen for its relations.

    Args:
        wordings: relation -> wording.

    Raises:
        ValueError: a relation without a wording.
    """
    relations = [hop.relation for hop in fact.hops]
    for relation in relations:
        if relation not in wordings:
            raise ValueError(
                f"fact {fact.id!r}: no wording was given for the relation {relation!r}; there are "
                f"{sorted(wordings)}"
            )
    return fact.with_wording(*(wordings[relation] for relation in relations))


def default_wordings(relations: Mapping[str, WordedRelation]) -> dict[str, Wording]:
    """The first wording of every relation and form."""
    return {name: relation.wording() for name, relation in relations.items()}


#: What the worked examples of a lead ask, in turn.
_HOPS = ("first", "second", "two_hop")


def few_shot_lead(
    fact: TwoHopFact,
    others: Sequence[TwoHopFact],
    *,
    shots: int,
    form: str,
    seed: int = 0,
) -> str:
    """Worked examples to put before all prompts of a fact.

    The examples are facts of the same two relations about other things (where these are too few, of
    the same second relation, and then of any): none of their names is one of the fact's, nor, as far
    as there are enough, of another example's; no two share a subject.
    They ask for a first hop, a second hop and a two-hop question in turn. The order of `others` is
    shuffled once per seed and pair of relations, so facts of a pair share their lead unless it
    names them.

    Args:
        fact: the fact that is asked.
        others: facts to take examples from, worded as the examples shall be; one with the id of
            `fact` is never taken. Pass facts that are not scored.
        shots: number of examples; 0 gives the empty lead.
        form: the form that the examples are worded in.

    Returns:
        Lines "PROMPT ANSWER.", each ended by a line break.

    Raises:
        ValueError: a negative number of shots, or fewer other facts than shots.
    """
    taken = worked_facts(fact, others, shots=shots, form=form, seed=seed)
    lines = (_example(other, _HOPS[i % len(_HOPS)], form) for i, other in enumerate(taken))
    return "".join(f"{line}\n" for line in lines)


def worked_facts(
    fact: TwoHopFact, others: Sequence[TwoHopFact], *, shots: int, form: str, seed: int = 0
) -> list[TwoHopFact]:
    """The facts that the worked examples of a lead are about, in order; see `few_shot_lead`.

    Raises:
        ValueError: a negative number of shots, or fewer other facts than shots.
    """
    if shots < 0:
        raise ValueError(f"shots is {shots}; expected 0 or more worked examples")
    pair = (fact.relation1, fact.relation2)
    same = [other for other in others if (other.relation1, other.relation2) == pair]
    same = _shuffled(same, form, f"{seed}/{pair}")
    taken = _taken(fact, same, shots)
    if len(taken) < shots:
        alike = _shuffled(others, form, f"{seed}/{pair}")
        alike.sort(key=lambda other: other.relation2 != fact.relation2)
        taken = _taken(fact, [*same, *alike], shots)
    if len(taken) < shots:
        raise ValueError(
            f"fact {fact.id!r}: a lead of {shots} worked examples needs as many facts about other "
            f"things; there are {len(taken)}, so ask for fewer shots or give more facts"
        )
    return taken


def _shuffled(facts: Iterable[TwoHopFact], form: str, seed: str) -> list[TwoHopFact]:
    """Those that can be asked in the form, in an order that depends on the seed alone."""
    askable = [fact for fact in facts if all(form in table for table in _asked(fact))]
    askable.sort(key=lambda fact: fact.id)
    random.Random(seed).shuffle(askable)
    return askable


def _taken(fact: TwoHopFact, others: Sequence[TwoHopFact], shots: int) -> list[TwoHopFact]:
    """The first of the others, `shots` at most, that have no name of the fact."""
    pool = [other for other in others if other.id != fact.id and not _meet(other, fact)]
    taken: list[TwoHopFact] = []
    for other in pool:  # all names differ, first
        if len(taken) < shots and not any(_meet(other, one) for one in taken):
            taken.append(other)
    for other in pool:  # there are but six continents
        if len(taken) < shots and other.subject not in {one.subject for one in taken}:
            taken.append(other)
    return taken


def with_lead(
    fact: TwoHopFact, others: Sequence[TwoHopFact], *, shots: int, seed: int = 0
) -> TwoHopFact:
    """The fact with worked examples before every prompt, each form with its own (`few_shot_lead`).

    All prompts of a form get the same lead. Paraphrases stay as they are.

    Raises:
        ValueError: see `few_shot_lead`.
    """
    if not shots:
        return fact
    leads = {
        form: few_shot_lead(fact, others, shots=shots, form=form, seed=seed)
        for form in {form: None for table in _asked(fact) for form in table}
    }
    return fact.with_prompts(lambda form, text: leads[form] + text)


def _asked(fact: TwoHopFact) -> tuple[Mapping[str, str], ...]:
    return fact.first_prompts, fact.second_prompts, fact.prompts


def _example(fact: TwoHopFact, hop: str, form: str) -> str:
    prompts = dict(zip(_HOPS, _asked(fact), strict=True))[hop]
    role, name = ("bridge", fact.bridge) if hop == "first" else ("answer", fact.answer)
    return f"{prompts[form]} {fact.meta.get('in_text', {}).get(role, name)}."


def _meet(one: TwoHopFact, other: TwoHopFact) -> bool:
    """Whether two facts have a name in common."""
    return bool(_names(one) & _names(other))


def _names(fact: TwoHopFact) -> set[str]:
    names = [fact.subject, fact.bridge, *fact.bridge_aliases, fact.answer, *fact.answer_aliases]
    names += [name for hop in fact.chain for name in (hop.object, *hop.aliases)]
    return {" ".join(_words(name)) or name for name in names}


def fold(text: str) -> str:
    """A text without accents, case folded."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).casefold()


def _words(text: str) -> list[str]:
    return _WORD.findall(fold(text))


def alike(one: str, *others: str) -> bool:
    """Whether a name looks like one of the others, so that it gives it away.

    True where a word of the one and a word of another begin with the same three letters, or are
    the same number or shorter word. Accents, case and words such as "city" do not count.
    """
    starts = _starts([one])
    return bool(starts & _starts(others))


def _starts(names: Iterable[str]) -> set[str]:
    return {word[:_SHARED] for name in names for word in _words(name) if word not in _COMMON}
