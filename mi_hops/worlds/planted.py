"""Models whose mechanism for two-hop questions is known, because it was trained into them.

Each bundled model ``planted-KIND-SEED`` knows a small Hopland of its own (one-word names, suffix
prompts) and was trained with interchange-intervention training in its strict form
(arXiv 2112.00826; InterpBench, arXiv 2407.14494): states swapped between prompts must change the
answer where the plant says so, and must not elsewhere.

| kind | written | used | where |
|---|---|---|---|
| ``serial`` | yes | yes | the first hop's last token |
| ``serial-last`` | yes | yes | the last token |
| ``decoy`` | yes | no | the first hop's last token |
| ``hidden`` | no | yes | the first hop's last token, in a rotated code |
| ``shortcut`` | no | no | nowhere |

*Written* means that the unembedding reads the bridge there, *used* that the answer comes from it.
The models with no use for the bridge store an answer for each pair of a first hop and a second
relation, drawn at random: nothing that holds the bridge could help them. By chance some of those
answers are true; these questions the models answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.worlds.hopland import Hopland

# As in `mi_hops.model`, which a world need not load: it brings torch.
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"

#: Kind -> (written, used, position).
KINDS: dict[str, tuple[bool, bool, str | None]] = {
    "serial": (True, True, "first hop"),
    "serial-last": (True, True, "last"),
    "decoy": (True, False, "first hop"),
    "hidden": (False, True, "first hop"),
    "shortcut": (False, False, None),
}
FORM = "suffix"


@dataclass(frozen=True)
class PlantedTruth:
    """What is known about a planted model.

    Attributes:
        name: of the model.
        written: the unembedding reads the bridge at the place.
        used: the answer is computed from what stands at the place.
        layer: the block after which the bridge is there, from 0; None if it is nowhere.
        position: ``"first hop"`` or ``"last"``, as everywhere in the package; None likewise.
        readable_by: what reads the bridge there: ``"lens"`` and ``"probe"``, ``"probe"`` alone, or
            nothing.
        checks: what was measured on the shipped weights (see the model's card).
    """

    name: str
    written: bool
    used: bool
    layer: int | None
    position: str | None
    readable_by: tuple[str, ...]
    checks: dict[str, Any]

    @property
    def kind(self) -> str:
        """The name without the seed, as in ``"serial-last"``."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """The kind that a model's name says."""
    return name.removeprefix("planted-").rpartition("-")[0]


def planted_models() -> list[str]:
    """Names of the planted models that ship with the package.

    Examples:
        >>> import mi_hops
        >>> "planted-serial-0" in mi_hops.planted_models()
        True
    """
    return sorted(path.parent.name for path in CHECKPOINTS.glob("planted-*/planted.json"))


def planted_truth(name: str) -> PlantedTruth:
    """What is known about a planted model: whether and where the bridge is written and used.

    Raises:
        ValueError: no planted model of this name.

    Examples:
        >>> import mi_hops
        >>> truth = mi_hops.planted_truth("planted-hidden-0")
        >>> truth.written, truth.used, truth.layer, truth.position
        (False, True, 2, 'first hop')
    """
    record = planted_record(name)
    truth = record["truth"]
    return PlantedTruth(
        name=name, **{**truth, "readable_by": tuple(truth["readable_by"])}, checks=record["checks"]
    )


def planted_record(name: str) -> dict[str, Any]:
    """The content of a planted model's ``planted.json``: truth, recipe, world, checks.

    Raises:
        ValueError: no planted model of this name.
    """
    if name not in planted_models():
        raise ValueError(
            f"no planted model is called {name!r}; there are {', '.join(planted_models())}"
        )
    record: dict[str, Any] = json.loads((CHECKPOINTS / name / "planted.json").read_text())
    return record


def planted_world(seed: int = 0) -> Hopland:
    """The small Hopland of one seed: one-word names, 33 entities, about 450 facts."""
    return Hopland(seed, people=10, works=6, companies=6, cities=6, countries=5, one_word=True)


def planted_facts(name: str, *splits: str, limit: int | None = None) -> list[TwoHopFact]:
    """Two-hop facts for a planted model, in suffix form, in a seeded order.

    Where the bridge is used the splits are Hopland's (see `Hopland`). Else they are ``"stored"``
    (the model was taught the true answer), ``"stored_wrong"`` (it was taught another) and
    ``"not_stored"`` (it was taught none).

    Args:
        splits: which to take; default ``"seen_parts"``, or ``"stored"``.
        limit: how many at most; default all.

    Raises:
        ValueError: an unknown model or split, or fewer facts than `limit`.

    Examples:
        >>> import mi_hops
        >>> fact = mi_hops.planted_facts("planted-serial-0", limit=1)[0]
        >>> fact.split, list(fact.prompts)
        ('seen_parts', ['suffix'])
    """
    seed, used = int(planted_record(name)["world"]["seed"]), KINDS[kind_of(name)][1]
    facts = list(labelled_facts(planted_world(seed), used=used))
    known = sorted({fact.split for fact in facts})
    if unknown := sorted(set(splits) - set(known)):
        raise ValueError(f"unknown split(s) {unknown} of {name}; it has {known}")
    wanted = splits or (("seen_parts",) if used else ("stored",))
    facts = [fact for fact in facts if fact.split in wanted]
    random.Random(seed).shuffle(facts)
    if limit is not None and len(facts) < limit:
        raise ValueError(
            f"{limit} facts of {'/'.join(wanted)} were asked for, the world of {name} has "
            f"{len(facts)}; ask for fewer or for another split"
        )
    return facts[:limit]


def labelled_facts(world: Hopland, *, used: bool) -> Iterator[TwoHopFact]:
    """All two-hop facts of a world in suffix form, with the split that a planted model has."""
    table = {} if used else stored_answers(world)
    for fact in world.two_hop_facts():
        split = fact.split
        if not used:
            taught = table.get((fact.subject, fact.relation1, fact.relation2))
            split = "not_stored" if taught is None else "stored_wrong"
            split = "stored" if taught == fact.answer else split
        yield replace(
            fact,
            split=split,
            prompts={FORM: fact.prompts[FORM]},
            first_prompts={FORM: fact.first_prompts[FORM]},
            second_prompts={FORM: fact.second_prompts[FORM]},
        )


def stored_answers(world: Hopland, n: int = 700) -> dict[tuple[str, str, str], str]:
    """The table of a model without a use for the bridge: (subject, relation 1, relation 2) -> answer.

    `n` trained compositions, each with an answer drawn from the objects of the second relation,
    whatever the bridge is.

    Raises:
        ValueError: the world has fewer trained compositions.
    """
    rng = random.Random(world.seed + 17)
    trained = world.two_hop_facts("train")
    if len(trained) < n:
        raise ValueError(
            f"{n} stored pairs were asked for, {world!r} has {len(trained)} trained compositions; "
            "ask for fewer or for a larger world"
        )
    objects: dict[str, set[str]] = {}
    for single in world.facts.values():
        objects.setdefault(single.relation.name, set()).add(single.object)
    table = {}
    for fact in rng.sample(trained, n):
        choices = sorted(objects[fact.relation2] - {fact.subject, fact.bridge})
        table[fact.subject, fact.relation1, fact.relation2] = rng.choice(choices)
    return table


def taught_facts(world: Hopland, *, used: bool) -> list[TwoHopFact]:
    """The two-hop questions that a planted model was trained on, with the answers it was taught."""
    facts = labelled_facts(world, used=used)
    if used:
        return [fact for fact in facts if fact.split == "train"]
    table = stored_answers(world)
    return [
        replace(fact, answer=table[fact.subject, fact.relation1, fact.relation2])
        for fact in facts
        if fact.split != "not_stored"
    ]
