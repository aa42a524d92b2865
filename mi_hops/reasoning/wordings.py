"""Which wording, and how many worked examples, let a model show what it knows.

A small model that knows a fact may not give it under one phrasing. Wordings are chosen on facts that
are not reported: per relation and form the one under which most single hops are answered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.reading import Facts
from mi_hops.facts.templates import FORMS, Wording
from mi_hops.facts.wordings import few_shot_lead, reword, with_lead
from mi_hops.model import HookedModel, provenance
from mi_hops.reasoning.gap import Score, check_score
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.generate import answered

#: Split of the facts that wordings are chosen on; they also give the worked examples.
CHOOSING = "choosing"


class WordingChoice(Result):
    """What is known under each wording on the choosing facts (from `choose_wordings`).

    Variables on (form, relation, option, shots), NaN where a relation has fewer wordings: ``answer``
    and ``first_token``, shares of the single hops asked that are answered, wholly or in their first
    token. Coordinates: ``n`` (relation), hops asked; ``text`` (form, relation, option); ``chosen``
    (relation), the wording that was chosen, as JSON.
    """

    @property
    def shots(self) -> int:
        """Worked examples in the lead that was chosen."""
        return int(self.provenance["shots"])

    @property
    def forms(self) -> list[str]:
        """The forms that were chosen for, the one with the most single hops known first."""
        best = self[self.provenance["score"]].sel(shots=self.shots).max("option")
        share = (best * self["n"]).sum("relation") / self["n"].sum()
        return share["form"].values[np.argsort(-share.values, kind="stable")].tolist()

    @property
    def wordings(self) -> dict[str, Wording]:
        """Relation -> the wording chosen."""
        names, chosen = self["relation"].values.tolist(), self["chosen"].values.tolist()
        return {name: Wording(**json.loads(one)) for name, one in zip(names, chosen, strict=True)}

    def apply(self, facts: Sequence[TwoHopFact]) -> tuple[list[TwoHopFact], list[tuple[str, str]]]:
        """The reported facts in the chosen wording, and (id, reason) of those that cannot be reworded.

        Args:
            facts: those that were chosen on, which give the examples, and those to be asked.
        """
        wordings, seed = self.wordings, int(self.provenance["seed"])
        examples = [reword(fact, wordings) for fact in facts if fact.split == CHOOSING]
        asked: list[TwoHopFact] = []
        left_out: list[tuple[str, str]] = []
        for fact in facts:
            if fact.split == CHOOSING:
                continue
            try:
                asked.append(
                    with_lead(reword(fact, wordings), examples, shots=self.shots, seed=seed)
                )
            except ValueError as error:
                left_out.append((fact.id, str(error)))
        return asked, left_out


def choose_wordings(
    model: HookedModel,
    facts: Facts,
    *,
    forms: Sequence[str] = ("suffix", "prefix"),
    shots: Sequence[int] = (0,),
    score: Score = "answer",
    per_relation: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> WordingChoice:
    """Choose the wording of each relation, and the lead, with which most single hops are known.

    Only facts of the split ``"choosing"`` are asked, each single hop once under every wording and
    with every number of worked examples. The number of examples is the one by which most hops are
    known, each under its best wording; of equals, the smallest.

    Args:
        facts: with ``relations`` that come in several wordings, ``load_facts("geo")`` say.
        forms: template orders to choose a wording for; other forms keep their first.
        shots: numbers of worked examples to try.
        score: what counts as known: the whole answer, or its first token.
        per_relation: single hops asked per relation, drawn by `seed`.

    Raises:
        ValueError: facts without wordings or without choosing facts, an unknown form or score, or a
            relation with fewer other facts than a lead needs.

    Examples:
        >>> import mi_hops
        >>> facts = mi_hops.load_facts("geo")
        >>> model = mi_hops.load_model("smollm2-135m")  # doctest: +SKIP
        >>> choice = mi_hops.choose_wordings(model, facts, shots=(0, 4))  # doctest: +SKIP
        >>> asked, left_out = choice.apply(facts)  # doctest: +SKIP
    """
    relations = facts.relations
    hops = _single_hops(facts, per_relation, seed)
    if not relations or not hops:
        raise ValueError(
            "wordings are chosen on facts of the split 'choosing' whose relations come in several "
            f"wordings; got {len(facts)} facts with {len(relations)} such relations, "
            f"{len(hops)} of them in choosing facts"
        )
    check_score(score)
    if not forms or not set(forms) <= set(FORMS):
        raise ValueError(f"forms are {list(forms)}; expected one or more of {list(FORMS)}")
    names = sorted(hops)
    widest = max(len(relations[name].options(form)) for name in names for form in forms)
    shape = (len(forms), len(names), widest, len(shots))
    values = {name: np.full(shape, np.nan) for name in ("answer", "first_token")}
    texts = np.full(shape[:3], "", dtype=object)
    pool = [fact for fact in facts if fact.split == CHOOSING]
    with progress_bar(label="wordings", show=progress, total=len(names) * len(shots)) as bar:
        for r, name in enumerate(names):
            options = [
                (f, o, form, wording)
                for f, form in enumerate(forms)
                for o, wording in enumerate(relations[name].options(form))
            ]
            for f, o, form, wording in options:
                texts[f, r, o] = wording_text(wording, form)
            for s, n in enumerate(shots):
                lead = partial(few_shot_lead, others=pool, shots=n, seed=seed)
                found = _asked(model, hops[name], [option[2:] for option in options], lead)
                for (f, o, *_), shares in zip(options, found, strict=True):
                    for key, share in shares.items():
                        values[key][f, r, o, s] = share
                bar.update(1)
    best = np.nanmax(values[score], axis=2)
    weights = np.array([len(hops[name]) for name in names])[None, :, None]
    known = (best * weights).sum((0, 1)).round(6)  # hops known with each number of examples
    s = min(np.flatnonzero(known == known.max()).tolist(), key=lambda i: shots[i])
    options = np.nanargmax(values[score][..., s], axis=2)
    chosen = [
        relations[name].wording(**{form: int(options[f, r]) for f, form in enumerate(forms)})
        for r, name in enumerate(names)
    ]
    dims = ("form", "relation", "option", "shots")
    return WordingChoice.from_arrays(
        {name: (dims, array) for name, array in values.items()},
        coords={
            "form": list(forms),
            "relation": names,
            "option": list(range(widest)),
            "shots": list(shots),
            "n": ("relation", [len(hops[name]) for name in names]),
            "text": (dims[:3], texts),
            "chosen": ("relation", [json.dumps(asdict(wording)) for wording in chosen]),
        },
        units={"answer": "share", "first_token": "share"},
        provenance=provenance(
            model,
            method="choose_wordings",
            score=score,
            shots=int(list(shots)[s]),
            per_relation=per_relation,
            seed=seed,
        ),
        title="Single hops known under each wording",
        used=sum(len(hops[name]) for name in names),
        allow_nonfinite=True,
    )


#: A single hop: the fact that asks it, and which of its hops it is, counted from 0.
_Hop = tuple[TwoHopFact, int]


def _single_hops(facts: Facts, most: int, seed: int) -> dict[str, list[_Hop]]:
    """Relation -> distinct single hops of the choosing facts, a seeded sample."""
    found: dict[str, dict[str, _Hop]] = {}
    for fact in facts:
        if fact.split != CHOOSING:
            continue
        for k, (hop, thing) in enumerate(zip(fact.hops, fact.names, strict=False)):
            if hop.relation in facts.relations:
                found.setdefault(hop.relation, {}).setdefault(thing, (fact, k))
    rng = random.Random(seed)
    return {
        name: [things[key] for key in rng.sample(sorted(things), min(most, len(things)))]
        for name, things in sorted(found.items())
    }


def _asked(
    model: HookedModel,
    hops: Sequence[_Hop],
    options: Sequence[tuple[str, Wording]],
    lead: Callable[..., str],
) -> list[dict[str, float]]:
    """Shares answered under each (form, wording); all of them are asked together."""
    prompts, answers, aliases = [], [], []
    for form, wording in options:
        for fact, k in hops:
            hop = fact.with_wording(*[wording] * fact.n_hops).hops[k]
            prompts.append(lead(fact, form=form) + hop.prompts[form])
            answers.append(hop.object)
            aliases.append(hop.aliases)
    found = answered(model, prompts, answers, aliases)
    each = [found[i : i + len(hops)] for i in range(0, len(found), len(hops))]
    return [
        {
            "answer": float(np.mean([one.right for one in some])),
            "first_token": float(np.mean([one.first_token for one in some])),
        }
        for some in each
    ]


def wording_text(wording: Wording, form: str) -> str:
    """The text by which a wording asks in a form."""
    if form == "suffix":
        return f"{wording.noun} {wording.verb}"
    return wording.statement if form == "prefix" else wording.question
