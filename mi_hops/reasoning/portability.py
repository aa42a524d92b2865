"""Portability: a single fact is edited, and the two-hop questions through it are asked.

A *case* is one `HopEdit`; its repair is fitted to the fact after. Each query is asked while the edit
of its case alone is on. What is asked, with (s, r, o -> o') the edited single fact:

========================  ========================================================================
``efficacy``              the edited fact, in the form it was taught in (answer: o')
``wordings``              the edited fact in its other forms
``portability``           two-hop questions that pass through it, with the new chain's answer
``portability_own``       of these, the case's own question in the form taught: the prompt that a
                          repair of the composition (CREME on top) is given
``portability_wordings``  of these, the case's own question in other orders and wordings
``portability_chains``    of these, other questions through the same fact, in every form
``old_answer``            the questions of ``portability`` with the answer from before the edit, as
                          far as it is known: right before, and wrong afterwards
``reverse``               the reverse relation of o' (answer: s), where the facts have one
``other_hop``             the hop of the new chain that is not edited: stays
``same_subject``          other known single facts of s: stay
``same_relation``         known facts of the same relation about other subjects: stay
``specificity``           unrelated two-hop questions that the unedited model answers: stay
``neutral``               statements of single facts that no case touches
========================  ========================================================================

A first hop (s, r, o -> o') is asked for through the relations of o'; a second hop through the
first hops that lead to s.

**Protocol.** MQuAKE (arXiv 2305.14795) edits facts of a chain and asks whether questions about the
chain have the new answer; it keeps only chains whose facts the unedited model recalls, and counts a
chain as answered if any of its three questions is. *Portability* is the name of Yao et al. (arXiv
2305.13172), who average over further prompts of an edit: another name of the subject, the reverse
relation, and one more hop. Here the hops, the reverse and the wordings are sets of their own, each
averaged over a case's queries and then over cases; chains are asked only where the unedited model
knows the hop that is not edited, and where old and new answer differ. `chain_scores` gives MQuAKE's
three numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import pandas as pd

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hop_edits import HOPS, HopEdit, SingleFact, plain, single_fact
from mi_hops.reasoning.aggregate import with_interval
from mi_hops.reasoning.evaluation import ACCURACIES, UNREPAIRED, Evaluation
from mi_hops.reasoning.gap import Gap, hop_prompt
from mi_hops.reasoning.queries import Draft, Query, QuerySets, require_unique
from mi_hops.reasoning.sets import names_of, shuffled, with_first_hop
from mi_hops.result.statistics import proportion_ci

_Key = tuple[str, str]

#: Set -> why a case has no query in it.
_NOTHING = {
    "wordings": "the edited fact has no other form",
    "portability": "no two-hop question through the edited fact with a known other hop",
    "portability_own": "the other hop is not known, or the answer does not change",
    "portability_wordings": "no other wording, or no own question",
    "portability_chains": "no other chain through the edited fact with a known other hop",
    "old_answer": "no question whose old answer is known",
    "reverse": "no known reverse relation",
    "other_hop": "both hops are edited, or the other is not known",
    "same_subject": "no other fact about the subject is known",
    "same_relation": "no fact of the relation about another subject is known",
    "specificity": "no unrelated answered question",
    "neutral": "every single fact is touched by an edit",
}
#: Pairs of facts by which a relation must be seen to be the reverse of another.
_SEEN = 3


def portability_sets(
    edits: Sequence[HopEdit], gap: Gap, *, per_case: int = 5, seed: int = 0
) -> QuerySets:
    """Query sets for edited single facts: portability and others (see the module).

    Everything is drawn from the facts of the gap, which also says what the unedited model knows: a
    single fact counts as known where that hop was answered correctly, by the gap's score. Chains
    that a benchmark adds (`load_mquake_edits`) are known only if the gap was asked about the facts
    after as well: ``find_gap(model, [*befores, *afters])``.

    Args:
        edits: the cases; the ids of their facts after are the cases' ids.
        gap: of the unedited model, on the facts that questions are drawn from; its form is the one
            taught.
        per_case: other chains, neighbouring facts and unrelated questions per case, at most; a
            chain is asked in every form it has.
        seed: of the draws.

    Raises:
        ValueError: no edits, an id used twice, or ``per_case`` below 1.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.facts import hop_edits
        >>> from mi_hops.reasoning import portability_sets
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.load_facts("hopland")[:60], form="suffix")
        >>> edits, _ = hop_edits(gap.passed, "second", pool=gap.facts)
        >>> queries = portability_sets(edits[:3], gap, per_case=2)
        >>> len(queries.of("efficacy"))
        3
    """
    if not edits:
        raise ValueError("no edits to ask about; make some with hop_edits")
    if per_case < 1:
        raise ValueError(f"per_case is {per_case}; expected at least 1")
    require_unique("ids of edits", (edit.id for edit in edits))
    makers = _Makers(edits, _World(gap), per_case, seed)
    queries: list[Query] = []
    skipped: list[tuple[str, str, str]] = []
    for edit in edits:
        for name, drafts in makers.sets(edit).items():
            unique = {(draft.prompt, plain(draft.answer)): draft for draft in drafts}
            queries += [draft.query(edit.id, name, i) for i, draft in enumerate(unique.values())]
            if not drafts:
                skipped.append((name, edit.id, _NOTHING[name]))
    settings = {"form": makers.form, "per_case": per_case, "seed": seed, "edited": "single facts"}
    return QuerySets(tuple(queries), tuple(e.id for e in edits), tuple(skipped), settings)


def chain_scores(
    evaluation: Evaluation, score: str = "exact_match", *, level: float = 0.95
) -> pd.DataFrame:
    """MQuAKE's three numbers for each repair of an evaluation of `portability_sets`.

    Args:
        score: an accuracy of the evaluation: ``"first_correct"``, ``"exact_match"`` or, where texts
            were generated, ``"generation_correct"``.

    Returns:
        Frame indexed by repair (the first row ``"unrepaired"``) with, as shares of cases:
        ``edit_wise``, all edited facts recalled as taught; ``instance_wise``, all single facts of the
        new chain recalled; ``multi_hop``, any wording of the case's own question answered with the
        new answer. Each with ``..._lower``, ``..._upper`` (Clopper-Pearson) and ``..._n``, the cases
        that were asked: ``instance_wise`` and ``multi_hop`` leave out those whose other hop the
        unedited model does not know.

    Raises:
        ValueError: a score that is no accuracy, or that the evaluation does not have, or no such sets.

    Source: arXiv 2305.14795, section 4.
    """
    if score not in ACCURACIES:
        raise ValueError(
            f"score is {score!r}; expected an accuracy, right or wrong of each question, one of "
            f"{list(ACCURACIES)}"
        )
    frame = evaluation.frame
    if f"{score}_after" not in frame or not {"efficacy", "portability_own"} & set(frame["set"]):
        raise ValueError(
            f"chain_scores needs the score {score!r} on the sets efficacy and portability_own; the "
            f"evaluation has the sets {sorted(set(frame['set']))} and the columns {list(frame.columns)}"
        )
    wanted = {
        "edit_wise": (("efficacy",), "min"),
        "instance_wise": (("efficacy", "other_hop"), "min"),
        "multi_hop": (("portability_own", "portability_wordings"), "max"),
    }
    rows: dict[str, dict[str, float]] = {}
    repairs = list(dict.fromkeys(frame["repair"]))
    for label, repair, when in [
        (UNREPAIRED, repairs[0], "before"),
        *((repair, repair, "after") for repair in repairs),
    ]:
        part = frame[frame["repair"] == repair]
        row = rows.setdefault(label, {})
        for name, (sets, reduce) in wanted.items():
            asked = part[part["set"].isin(sets)].groupby("case")[f"{score}_{when}"]
            each = asked.agg(reduce)
            if name == "instance_wise":
                each = each[asked.size() == len(HOPS)]
            right, n = int(each.sum()), len(each)
            ends = proportion_ci(right, n, level=level) if n else (float("nan"),) * 2
            row |= with_interval(name, right / n if n else float("nan"), *ends, n)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("repair")


# -- the facts, one hop at a time -----------------------------------------------------------------


class _World:
    """The single facts and the chains of a gap, and what the unedited model knows of them."""

    def __init__(self, gap: Gap) -> None:
        self.form = gap.form
        frame = gap.frame
        columns = (frame[c].tolist() for c in ("first", "second", "two_hop"))
        self.known: set[tuple[_Key, str]] = set()
        self.singles: dict[_Key, SingleFact] = {}
        self.by_bridge: dict[str, list[TwoHopFact]] = {}
        self.by_second: dict[_Key, list[TwoHopFact]] = {}
        self.answered: list[TwoHopFact] = []
        for fact, first, second, two_hop in zip(gap.facts, *columns, strict=True):
            for hop, knows in zip(HOPS, (first, second), strict=True):
                single = single_fact(fact, hop)
                if knows:
                    self.known.add((single.key, plain(single.object)))
                if knows or single.key not in self.singles:
                    self.singles[single.key] = single
            self.by_bridge.setdefault(plain(fact.bridge), []).append(fact)
            self.by_second.setdefault(single_fact(fact, "second").key, []).append(fact)
            if two_hop:
                self.answered.append(fact)
        self.by_subject: dict[str, list[SingleFact]] = {}
        self.by_relation: dict[str, list[SingleFact]] = {}
        for (subject, relation), single in self.singles.items():
            if self.knows(single):
                self.by_subject.setdefault(subject, []).append(single)
                self.by_relation.setdefault(relation, []).append(single)
        self.reverse = self._reverse()

    def knows(self, single: SingleFact) -> bool:
        """Whether the unedited model answers a single fact with this object."""
        return (single.key, plain(single.object)) in self.known

    def get(self, subject: str, relation: str) -> SingleFact | None:
        """The known single fact of a subject, if there is one."""
        single = self.singles.get((plain(subject), relation))
        return single if single is not None and self.knows(single) else None

    def _reverse(self) -> dict[str, str]:
        """Relation -> the one that leads back, wherever the facts have both."""
        back: dict[tuple[str, str], list[bool]] = {}
        relations: dict[str, list[str]] = {}
        for subject, relation in self.singles:
            relations.setdefault(subject, []).append(relation)
        for (subject, relation), single in self.singles.items():
            there = plain(single.object)
            for other in relations.get(there, ()):
                returns = self.singles[there, other].says(subject)
                back.setdefault((relation, other), []).append(returns)
        return {r: other for (r, other), seen in back.items() if len(seen) >= _SEEN and all(seen)}


def _single(single: SingleFact, prompt: str, wrong: str | None = None) -> Draft:
    """A prompt with a single fact's object."""
    source = f"{single.subject}/{single.relation}"
    return Draft(prompt, single.object, single.aliases, source, wrong)


class _Makers:
    """The drafts of all sets of one edit."""

    def __init__(self, edits: Sequence[HopEdit], world: _World, per_case: int, seed: int) -> None:
        self.world, self.form, self.per_case, self.seed = world, world.form, per_case, seed
        self.touched = {single.key for edit in edits for single in edit.singles}

    def sets(self, edit: HopEdit) -> dict[str, list[Draft]]:
        """Set -> its drafts, none where there is nothing to ask."""
        own, chains = self._own(edit), self._chains(edit)
        given, others = own[:1], own[1:]
        old = [
            Draft(d.prompt, d.wrong, (), d.source, wrong=d.answer)
            for d in (*own, *chains)
            if d.wrong is not None
        ]
        return {
            "efficacy": [self._taught(edit, s, self._form(s.prompts)) for s in edit.singles],
            "wordings": [
                self._taught(edit, single, form)
                for single in edit.singles
                for form in single.prompts
                if form != self._form(single.prompts)
            ],
            "portability": [*own, *chains],
            "portability_own": given,
            "portability_wordings": others,
            "portability_chains": chains,
            "old_answer": old,
            "reverse": list(self._reverse(edit)),
            "other_hop": self._other_hop(edit),
            "same_subject": self._near(edit, "same_subject"),
            "same_relation": self._near(edit, "same_relation"),
            "specificity": self._specificity(edit),
            "neutral": self._neutral(edit),
        }

    def _form(self, prompts: Mapping[str, str]) -> str:
        form = self.form or ""
        return form if form in prompts else next(iter(prompts))

    def _rng(self, edit: HopEdit, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}/{edit.id}")

    # -- the edited fact --------------------------------------------------------------------------

    def _taught(self, edit: HopEdit, single: SingleFact, form: str) -> Draft:
        before = [single_fact(edit.before, hop) for hop in edit.hops]
        old = next((b.object for b in before if b.key == single.key), None)
        return _single(single, single.prompts[form], wrong=old)

    def _reverse(self, edit: HopEdit) -> Iterator[Draft]:
        for single in edit.singles:
            relation = self.world.reverse.get(single.relation, "")
            back = self.world.get(single.object, relation)
            before = self.world.singles.get(single.key)
            if back is None or before is None or self.world.get(before.object, relation) is None:
                continue
            for prompt in back.prompts.values():
                yield Draft(prompt, single.subject, (), back.subject, wrong=back.object)

    def _other_hop(self, edit: HopEdit) -> list[Draft]:
        kept = [single_fact(edit.after, hop) for hop in HOPS if hop not in edit.hops]
        return [
            _single(single, hop_prompt(single.prompts, self.form))
            for single in kept
            if single.prompts and self.world.knows(single)
        ]

    # -- two hops through it ----------------------------------------------------------------------

    def _own(self, edit: HopEdit) -> list[Draft]:
        """The case's own question, in the form taught first; none where it says nothing."""
        after, before = edit.after, edit.before
        kept = [single_fact(after, hop) for hop in HOPS if hop not in edit.hops]
        same = single_fact(after, "second").says(before.answer, *before.answer_aliases)
        if same or not all(self.world.knows(single) for single in kept):
            return []
        taught = hop_prompt(after.prompts, self.form)
        texts = (taught, *after.prompts.values(), *(p.rstrip() for p in after.paraphrases))
        return [Draft.of(after, text, wrong=before.answer) for text in dict.fromkeys(texts)]

    def _chains(self, edit: HopEdit) -> list[Draft]:
        found: list[Callable[[], list[Draft]]] = []
        if "first" in edit.hops:
            found += self._from_bridge(edit)
        if "second" in edit.hops:
            found += self._to_subject(edit)
        asked = set(edit.after.prompts.values()) | set(edit.after.paraphrases)
        chains: list[Draft] = []
        taken = 0
        for make in shuffled(found, self._rng(edit, "portability")):
            new = [draft for draft in make() if draft.prompt not in asked]
            if new:
                chains, taken = [*chains, *new], taken + 1
            if taken == self.per_case:
                break
        return chains

    def _from_bridge(self, edit: HopEdit) -> list[Callable[[], list[Draft]]]:
        """Other second hops from the new bridge, behind the case's first hop."""
        after, before = edit.after, edit.before
        others: dict[str, TwoHopFact] = {}
        for fact in self.world.by_bridge.get(plain(after.bridge), ()):
            single = single_fact(fact, "second")
            if fact.relation2 == after.relation2 or not self.world.knows(single):
                continue
            old = self.world.get(before.bridge, fact.relation2)
            if single.says(after.subject, *([old.object] if old else ())):
                continue
            others.setdefault(fact.relation2, fact)

        def drafts(fact: TwoHopFact) -> list[Draft]:
            old = self.world.get(before.bridge, fact.relation2)
            wrong = old.object if old is not None else None
            texts = [
                with_first_hop(text, fact.first_hop, after.first_hop)
                for text in fact.prompts.values()
            ]
            return [Draft.of(fact, text, wrong) for text in texts if text is not None]

        return [partial(drafts, fact) for fact in others.values()]

    def _to_subject(self, edit: HopEdit) -> list[Callable[[], list[Draft]]]:
        """Other first hops that lead to the bridge whose second hop is edited."""
        after = edit.after
        second = single_fact(after, "second")
        others: dict[_Key, TwoHopFact] = {}
        for fact in self.world.by_second.get(second.key, ()):
            first = single_fact(fact, "first")
            mine = first.key == single_fact(after, "first").key
            if mine or not self.world.knows(first) or second.says(fact.subject, fact.answer):
                continue
            others.setdefault(first.key, fact)

        def drafts(fact: TwoHopFact) -> list[Draft]:
            texts = (*fact.prompts.values(), *(p.rstrip() for p in fact.paraphrases))
            return [
                Draft(text, after.answer, after.answer_aliases, fact.id, wrong=fact.answer)
                for text in texts
            ]

        return [partial(drafts, fact) for fact in others.values()]

    # -- what is to stay --------------------------------------------------------------------------

    def _near(self, edit: HopEdit, name: str) -> list[Draft]:
        """Known single facts about an edited subject, or of an edited relation."""
        world, edited = self.world, {single.key for single in edit.singles}
        found: list[Draft] = []
        for single in edit.singles:
            if name == "same_subject":
                pool = world.by_subject.get(plain(single.subject), [])
            else:
                pool = world.by_relation.get(single.relation, [])
            pool = [s for s in pool if s.key not in edited and not s.says(single.object)]
            for other in islice(shuffled(pool, self._rng(edit, name)), self.per_case):
                prompt = hop_prompt(other.prompts, self.form)
                found.append(_single(other, prompt, wrong=single.object))
        return found

    def _specificity(self, edit: HopEdit) -> list[Draft]:
        mine = names_of(edit.before) | names_of(edit.after)
        unrelated = (
            Draft.of(f, hop_prompt(f.prompts, self.form))
            for f in shuffled(self.world.answered, self._rng(edit, "specificity"))
            if not mine & names_of(f)
        )
        return list(islice(unrelated, self.per_case))

    def _neutral(self, edit: HopEdit) -> list[Draft]:
        facts = (edit.before, edit.after)
        mine = {plain(name) for f in facts for name in (f.subject, f.bridge, f.answer)}
        singles = list(self.world.singles.values())
        untouched = (
            _single(single, hop_prompt(single.prompts, self.form))
            for single in shuffled(singles, self._rng(edit, "neutral"))
            if single.key not in self.touched
            and not mine & {plain(single.subject), plain(single.object)}
        )
        return list(islice(untouched, self.per_case))
