"""Hopland: a fictional world of people, works, companies, cities and countries.

Every relation is functional, so each single fact and each two-hop question has one correct answer.
Names have one to three words and share first (and sometimes last) words, so that answers and spans
of several tokens are real. The facts are split so that the cause of a failure is known:

* a share of the facts is *barred*: never part of a trained composition, in either role;
* of the compositions of facts that are not barred, a share is held out (``seen_parts``);
* the rest is trained (``train``).

Questions with exactly one barred fact are ``first_unseen`` or ``second_unseen``; both facts of
every question are trained as single facts.

Longer chains are never trained: they are held out by construction. Their splits say what became of
the two-hop questions inside them (`CHAIN_SPLITS`).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hops import Hop, worded
from mi_hops.facts.templates import Wording, prompts_about

SPLITS = ("train", "seen_parts", "first_unseen", "second_unseen", "both_unseen")

#: Of chains of three hops or more: every two-hop question that two consecutive hops make up was
#: trained; some of them was held out, though all facts are in other trained compositions; some fact is
#: barred.
CHAIN_SPLITS = ("trained_parts", "held_out_part", "unseen_part")

#: Whether the first and the second fact are barred -> split.
_UNSEEN = {
    (True, False): "first_unseen",
    (False, True): "second_unseen",
    (True, True): "both_unseen",
}


@dataclass(frozen=True)
class Relation:
    """One relation: its name, the kind of thing it holds of, the kind of its object, its wording."""

    name: str
    domain: str
    range: str
    wording: Wording


def _relation(domain: str, name: str, target: str, statement: str, question: str) -> Relation:
    noun = f"the {name} of [X]"
    return Relation(f"{domain}.{name}", domain, target, Wording(noun, f"[X] {statement}", question))


#: Relations, values of attributes, and the parts that names are made of.
_WORDS = json.loads(
    (Path(__file__).parent.parent / "data" / "hopland-words.json").read_text("utf-8")
)
_RELATIONS = tuple(_relation(*row) for row in _WORDS["relations"])


def _people(n: int, rng: random.Random, one_word: bool) -> list[str]:
    first, particles, last, one = _WORDS["people"].values()
    if one_word:
        return _some(n, [*one, *first, *last], rng)
    return _mix(n, [[one], [first, last], [first, particles, last]], rng)


def _places(n: int, kind: str, rng: random.Random, one_word: bool) -> list[str]:
    heads, cores, tails = _WORDS["places"][kind]
    if one_word:
        return _some(n, cores, rng)
    return _mix(n, [[cores], [heads, cores], [heads, cores, tails]], rng)


def _mix(n: int, words: list[list[list[str]]], rng: random.Random) -> list[str]:
    """`n` distinct names, about 1/6 of one word, 1/2 of two and 1/3 of three.

    Args:
        words: for each of these lengths, what may stand in each place of a name.
    """
    one, three = max(1, n // 6), n // 3
    names = []
    for size, parts in zip((one, n - one - three, three), words, strict=True):
        names += _some(size, list(map(" ".join, product(*parts))), rng)
    rng.shuffle(names)
    return names


def _some(n: int, pool: list[str], rng: random.Random) -> list[str]:
    """`n` names of the pool."""
    if n > len(pool):
        raise ValueError(f"{n} names of a kind were asked for, the word lists give {len(pool)}")
    return rng.sample(pool, n)


@dataclass(frozen=True)
class Single:
    """One single fact: `relation` of `subject` is `object`."""

    subject: str
    relation: Relation
    object: str

    def prompts(self) -> dict[str, str]:
        """Form -> prompt that asks for the object."""
        return prompts_about(self.relation.wording, self.subject)


def _key(single: Single) -> tuple[str, str]:
    return single.subject, single.relation.name


class Hopland:
    """The world of one seed.

    Args:
        seed: everything random derives from it.
        people, works, companies, cities, countries: how many entities of each kind.
        barred: share of single facts that take part in no trained composition.
        held_out: share of the other compositions that is not trained.
        one_word: every name has one word, as a token of its own in a word-level vocabulary; the
            word lists then give few places of a kind (five countries).

    Attributes:
        relations: all `Relation` objects.
        entities: kind -> names.
        facts: (subject, relation name) -> `Single`.
        barred: keys of the barred facts.

    Raises:
        ValueError: more names of a kind than the word lists give, or a share outside [0, 1).

    Examples:
        >>> import mi_hops
        >>> world = mi_hops.Hopland()
        >>> world
        Hopland(seed=0): 136 entities, 1986 single facts
        >>> world.two_hop_facts("seen_parts")[0].prompt("suffix")
        'The language of the doctor of Adela Lindt is'
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        people: int = 50,
        works: int = 24,
        companies: int = 24,
        cities: int = 24,
        countries: int = 14,
        barred: float = 0.12,
        held_out: float = 0.10,
        one_word: bool = False,
    ) -> None:
        for name, share in (("barred", barred), ("held_out", held_out)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; expected a share in [0, 1)")
        rng = random.Random(seed)
        self.seed = seed
        self.relations = _RELATIONS
        self.entities = {
            "person": _people(people, rng, one_word),
            "work": _places(works, "work", rng, one_word),
            "company": _places(companies, "company", rng, one_word),
            "city": _places(cities, "city", rng, one_word),
            "country": _places(countries, "country", rng, one_word),
        }
        self.values: dict[str, list[str]] = {
            kind: [value for value in values if not (one_word and " " in value)]
            for kind, values in _WORDS["values"].items()
        }
        self.kind_of = {name: kind for kind, names in self.entities.items() for name in names}
        self.facts: dict[tuple[str, str], Single] = {}
        for relation in self.relations:
            pool = self.entities.get(relation.range) or self.values[relation.range]
            for subject in self.entities[relation.domain]:
                choices = [name for name in pool if name != subject]
                self.facts[subject, relation.name] = Single(subject, relation, rng.choice(choices))
        keys = sorted(self.facts)
        self.barred = frozenset(rng.sample(keys, round(barred * len(keys))))
        self._held_out, self._split_seed = held_out, rng.randrange(2**31)

    def __repr__(self) -> str:
        sizes = f"{len(self.kind_of)} entities, {len(self.facts)} single facts"
        return f"Hopland(seed={self.seed}): {sizes}"

    @cached_property
    def _by_subject(self) -> dict[str, list[Single]]:
        table: dict[str, list[Single]] = {}
        for fact in self.facts.values():
            table.setdefault(fact.subject, []).append(fact)
        return table

    def compositions(self) -> Iterator[tuple[Single, Single, str]]:
        """Every two-hop chain with its split, in a fixed order.

        Chains that end where they began or whose answer is the bridge are left out: their
        answers could be read off the prompt or off the first hop.
        """
        rng = random.Random(self._split_seed)
        for key in sorted(self.facts):
            first = self.facts[key]
            for second in self._by_subject.get(first.object, ()):
                if second.object in (first.subject, first.object):
                    continue
                split = "seen_parts" if rng.random() < self._held_out else "train"
                barred = (key in self.barred, _key(second) in self.barred)
                yield first, second, _UNSEEN.get(barred, split)

    def two_hop_facts(self, *splits: str) -> list[TwoHopFact]:
        """The compositions of `splits` (default: all) as `TwoHopFact` records."""
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"unknown split(s) {unknown}; Hopland has {list(SPLITS)}")
        return [
            self.record(first, second, split=split)
            for first, second, split in self.compositions()
            if not splits or split in splits
        ]

    def sample(self, *, train: int = 500, held_out: int = 450, seed: int = 0) -> list[TwoHopFact]:
        """A seeded sample of two-hop facts for a study, drawn first hop by first hop.

        A held-out split takes all its questions of a drawn first hop or, once it is full, none of
        them, so that a question has others with the same first hop beside it. First hops are drawn until every held-out split but
        ``both_unseen`` has `held_out` questions (or all there are); `train` trained questions of
        the drawn first hops are added.
        """
        rng = random.Random(seed)
        by_hop: dict[tuple[str, str], list[TwoHopFact]] = {}
        for fact in self.two_hop_facts():
            by_hop.setdefault((fact.subject, fact.relation1), []).append(fact)
        hops = sorted(by_hop)
        rng.shuffle(hops)
        wanted = SPLITS[1:4]
        chosen: dict[str, list[TwoHopFact]] = {split: [] for split in SPLITS}
        for hop in hops:
            new = {split: [f for f in by_hop[hop] if f.split == split] for split in SPLITS}
            if any(new[s] and len(chosen[s]) < held_out for s in wanted):
                for split in SPLITS:
                    if split not in wanted or len(chosen[split]) < held_out:
                        chosen[split] += new[split]
        trained = chosen["train"]
        chosen["train"] = rng.sample(trained, min(train, len(trained)))
        return [fact for split in ("train", *wanted) for fact in chosen[split]]

    def chains(self, hops: int = 3) -> Iterator[tuple[tuple[Single, ...], str]]:
        """Every chain of three hops or more with its split (`CHAIN_SPLITS`), in a fixed order.

        No entity occurs twice in a chain. By default there are some 180,000 chains of three, and
        nearly ten times as many with each further hop.

        Raises:
            ValueError: fewer than three hops (`compositions` has those of two).
        """
        if hops < 3:
            raise ValueError(f"hops is {hops}; expected 3 or more, `compositions` has those of 2")
        split_of = {
            (*_key(first), second.relation.name): s for first, second, s in self.compositions()
        }

        def longer(chain: tuple[Single, ...]) -> Iterator[tuple[Single, ...]]:
            if len(chain) == hops:
                yield chain
                return
            met = {chain[0].subject, *(single.object for single in chain)}
            for single in self._by_subject.get(chain[-1].object, ()):
                if single.object not in met:
                    yield from longer((*chain, single))

        for key in sorted(self.facts):
            for chain in longer((self.facts[key],)):
                if any(_key(single) in self.barred for single in chain):
                    yield chain, "unseen_part"
                else:
                    parts = {split_of[(*_key(a), b.relation.name)] for a, b in pairwise(chain)}
                    yield chain, "trained_parts" if parts == {"train"} else "held_out_part"

    def chain_facts(self, hops: int = 3, *, n: int = 300, seed: int = 0) -> list[TwoHopFact]:
        """A seeded sample of the chains of three hops or more, `n` of each split (or all there are).

        Raises:
            ValueError: fewer than three hops.

        Examples:
            >>> import mi_hops
            >>> fact = mi_hops.Hopland().chain_facts(3, n=1)[0]
            >>> fact.n_hops, fact.split, fact.prompt("suffix")
            (3, 'trained_parts', 'The director of the employer of the author of Kingdom is')
        """
        found: dict[str, list[tuple[Single, ...]]] = {split: [] for split in CHAIN_SPLITS}
        for chain, split in self.chains(hops):
            found[split].append(chain)
        rng = random.Random(seed)
        return [
            self.record(*chain, split=split)
            for split, chains in found.items()
            for chain in rng.sample(chains, min(n, len(chains)))
        ]

    @staticmethod
    def record(*singles: Single, split: str = "") -> TwoHopFact:
        """The fact that two or more single facts make up, each about the object of the one before."""
        hops = [Hop(relation=single.relation.name, object=single.object) for single in singles]
        subject = singles[0].subject
        asked, prompts = worded(hops, [single.relation.wording for single in singles], subject)
        return TwoHopFact.from_hops(
            asked,
            id="/".join((subject, *(hop.relation for hop in hops))),
            subject=subject,
            prompts=prompts,
            split=split,
        )

    def counts(self) -> dict[str, int]:
        """Sizes: entities, single facts, barred facts, compositions by split."""
        splits = Counter(split for *_, split in self.compositions())
        return {
            "entities": len(self.kind_of),
            "facts": len(self.facts),
            "barred": len(self.barred),
            **{split: splits[split] for split in SPLITS},
        }
