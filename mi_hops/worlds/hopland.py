"""Hopland: a fictional world of people, works, companies, cities and countries.

Every relation is functional, so each single fact and each two-hop question has one correct answer.
Names have one to three words and share first (and sometimes last) words, so that answers and spans
of several tokens are real. The facts are split so that the cause of a failure is known:

* a share of the facts is *barred*: never part of a trained composition, in either role;
* of the compositions of facts that are not barred, a share is held out (``seen_parts``);
* the rest is trained (``train``).

Questions with exactly one barred fact are ``first_unseen`` or ``second_unseen``; both facts of
every question are trained as single facts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import Wording, first_hop_phrase, prompts_about

SPLITS = ("train", "seen_parts", "first_unseen", "second_unseen", "both_unseen")


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


_RELATIONS = tuple(
    _relation(*row)
    for row in (
        # people -> people, companies, cities, countries, works
        ("person", "spouse", "person", "is married to", "Who is [X] married to?"),
        ("person", "mother", "person", "was raised by", "Who raised [X]?"),
        ("person", "teacher", "person", "studied under", "Who taught [X]?"),
        ("person", "rival", "person", "competes with", "Who competes with [X]?"),
        ("person", "friend", "person", "often visits", "Who does [X] often visit?"),
        ("person", "neighbour", "person", "lives beside", "Who lives beside [X]?"),
        ("person", "doctor", "person", "is treated by", "Who treats [X]?"),
        ("person", "idol", "person", "looks up to", "Who does [X] look up to?"),
        ("person", "employer", "company", "works for", "Who does [X] work for?"),
        ("person", "birthplace", "city", "was born in", "Where was [X] born?"),
        ("person", "homeland", "country", "is a citizen of", "Where is [X] a citizen?"),
        ("person", "masterpiece", "work", "is famous for", "What is [X] famous for?"),
        # people -> attributes
        ("person", "profession", "profession", "earns money as", "What does [X] earn money as?"),
        ("person", "instrument", "instrument", "plays the", "What does [X] play?"),
        ("person", "language", "language", "speaks", "What does [X] speak?"),
        ("person", "pet", "animal", "keeps a", "What does [X] keep?"),
        ("person", "hobby", "hobby", "spends weekends on", "What does [X] spend weekends on?"),
        ("person", "colour", "colour", "always wears", "What does [X] always wear?"),
        ("person", "dish", "dish", "likes to eat", "What does [X] like to eat?"),
        ("person", "drink", "drink", "likes to drink", "What does [X] like to drink?"),
        ("person", "gem", "gem", "collects", "What does [X] collect?"),
        ("person", "flower", "flower", "grows", "What does [X] grow?"),
        ("person", "vehicle", "vehicle", "travels by", "What does [X] travel by?"),
        # works
        ("work", "author", "person", "was written by", "Who wrote [X]?"),
        ("work", "hero", "person", "tells about", "Who does [X] tell about?"),
        ("work", "editor", "person", "was edited by", "Who edited [X]?"),
        ("work", "translator", "person", "was translated by", "Who translated [X]?"),
        ("work", "publisher", "company", "was published by", "Who published [X]?"),
        ("work", "setting", "city", "takes place in", "Where does [X] take place?"),
        ("work", "genre", "genre", "belongs to", "What does [X] belong to?"),
        ("work", "season", "season", "begins in", "When does [X] begin?"),
        ("work", "cover", "colour", "is bound in", "What is [X] bound in?"),
        ("work", "emblem", "animal", "shows a", "What does [X] show?"),
        # companies
        ("company", "founder", "person", "was founded by", "Who founded [X]?"),
        ("company", "director", "person", "is led by", "Who leads [X]?"),
        ("company", "owner", "person", "is owned by", "Who owns [X]?"),
        ("company", "designer", "person", "buys drawings from", "Who sells drawings to [X]?"),
        ("company", "headquarters", "city", "is based in", "Where is [X] based?"),
        ("company", "product", "product", "makes", "What does [X] make?"),
        ("company", "metal", "metal", "trades in", "What does [X] trade in?"),
        ("company", "mascot", "animal", "advertises with a", "What does [X] advertise with?"),
        ("company", "logo", "colour", "is painted in", "What is [X] painted in?"),
        ("company", "vehicle", "vehicle", "delivers by", "What does [X] deliver by?"),
        # cities
        ("city", "mayor", "person", "is governed by", "Who governs [X]?"),
        ("city", "architect", "person", "was built by", "Who built [X]?"),
        ("city", "patron", "person", "prays to", "Who does [X] pray to?"),
        ("city", "country", "country", "is located in", "Where is [X] located?"),
        ("city", "river", "river", "lies on the", "What does [X] lie on?"),
        ("city", "festival", "season", "celebrates in", "When does [X] celebrate?"),
        ("city", "speciality", "dish", "is known for", "What is [X] known for?"),
        ("city", "tree", "tree", "is shaded by", "What is [X] shaded by?"),
        ("city", "stone", "metal", "is rich in", "What is [X] rich in?"),
        # countries
        ("country", "president", "person", "is ruled by", "Who rules [X]?"),
        ("country", "poet", "person", "loves the verses of", "Who is loved by [X]?"),
        ("country", "general", "person", "is defended by", "Who defends [X]?"),
        ("country", "capital", "city", "has its parliament in", "Where is the parliament of [X]?"),
        (
            "country",
            "tongue",
            "language",
            "teaches its children",
            "What are children taught in [X]?",
        ),
        ("country", "currency", "currency", "pays in", "What does [X] pay in?"),
        ("country", "bird", "bird", "protects the", "What does [X] protect?"),
        ("country", "bloom", "flower", "is covered with", "What is [X] covered with?"),
        ("country", "crop", "crop", "exports", "What does [X] export?"),
        ("country", "sport", "sport", "cheers for", "What does [X] cheer for?"),
    )
)

_VALUES = {
    "profession": "baker, painter, sailor, judge, miner, tailor, pilot, ship builder, clock maker, farmer",
    "instrument": "violin, flute, harp, drum, cello, bass drum, bass flute, organ, trumpet",
    "language": "Ossic, Tarvic, Old Tarvic, Lumish, Old Lumish, Brevic, Candish, Low Candish",
    "animal": "fox, heron, otter, badger, grey wolf, grey hare, lynx, raven, mole, white hare",
    "hobby": "chess, archery, pottery, rowing, bird watching, star watching, weaving, fencing",
    "colour": "red, blue, dark blue, dark green, green, amber, violet, pale amber, white, black",
    "dish": "lentil soup, onion soup, rye bread, fig bread, dumplings, trout, goat cheese, plum cake",
    "drink": "mint tea, black tea, cider, plum wine, red wine, cocoa, ginger beer, milk",
    "gem": "opal, ruby, river pearl, black pearl, topaz, jade, garnet, star ruby",
    "flower": "tulip, wild rose, white rose, iris, poppy, wild orchid, orchid, clover",
    "vehicle": "tram, ferry, night train, mail train, bicycle, balloon, sled, mail coach",
    "genre": "satire, romance, court drama, folk drama, folk tale, ghost tale, elegy, farce",
    "season": "spring, summer, autumn, winter, early spring, late summer",
    "product": "lamps, glass beads, glass bottles, carpets, paper, soap, fishing nets, copper wire, bells",
    "metal": "copper, iron, silver, tin, white gold, red gold, zinc, lead",
    "river": "Aune, Great Aune, Sorve, Little Sorve, Teld, Isk, Great Isk, Mirrow",
    "tree": "oak, silver birch, birch, black pine, pine, elm, willow, silver fir",
    "currency": "dorin, new dorin, tolm, crown, half crown, brask, silver tolm",
    "bird": "crane, owl, snow owl, swift, snow goose, wild goose, eagle",
    "crop": "barley, wheat, winter wheat, rice, wild rice, cotton, flax",
    "sport": "polo, water polo, curling, sailing, ice sailing, wrestling, cycling",
}

_FIRST = "Mara Joren Ilse Tobin Adela Ruben Nadia Casper Lotte Emil Vera Anton".split()
_PARTICLE = ("van", "del")
_LAST = (
    "Velten Osk Tarrow Brandt Calder Minz Harrow Lindt Sorrel Quill Ferro Ashby Dravik Nystrom Pell "
    "Garm Rusk Thorne Wexley Zoller Kestrel Moorland Salter Vance Whitlock Ivers"
).split()
_MONONYMS = "Ondo Tamsin Belko Yarrow Fenna Drusk Ziska Corvo".split()
_WORK = (
    ("Silver", "Burning", "Lost", "Seven", "Quiet", "Broken"),
    ("River", "Gardens", "Letters", "Kingdom", "Mirrors", "Harvest", "Bridges", "Lanterns"),
    ("Revisited", "Remembered"),
)
_COMPANY = (
    ("Orbit", "Halden", "Northgate", "Bluestone", "Meridian", "Castor"),
    ("Foods", "Glass", "Motors", "Textiles", "Press", "Shipping"),
    ("Union", "Trust"),
)
_CITY = (
    ("Port", "Lake", "Upper", "Saint", "New", "Fort"),
    ("Alder", "Brava", "Corin", "Dunmore", "Estrel", "Fallow", "Gilden", "Hollin"),
    ("Bay", "Hill"),
)
_COUNTRY = (
    ("North", "South", "East", "United"),
    ("Velia", "Karst", "Ombra", "Tyrren", "Lusk"),
    ("Isles", "Coast"),
)


def _people(n: int, rng: random.Random) -> list[str]:
    two = [f"{a} {b}" for a, b in product(_FIRST, _LAST)]
    three = [f"{a} {p} {b}" for a, p, b in product(_FIRST, _PARTICLE, _LAST)]
    return _mix(n, _MONONYMS, two, three, rng)


def _places(n: int, parts: tuple[tuple[str, ...], ...], rng: random.Random) -> list[str]:
    heads, cores, tails = parts
    two = [f"{h} {c}" for h, c in product(heads, cores)]
    three = [f"{h} {c} {t}" for h, c, t in product(heads, cores, tails)]
    return _mix(n, cores, two, three, rng)


def _mix(n: int, one: object, two: list[str], three: list[str], rng: random.Random) -> list[str]:
    """`n` distinct names, about 1/6 of one word, 1/2 of two and 1/3 of three."""
    pools = [list(one), two, three]  # type: ignore[call-overload]
    sizes = [max(1, n // 6), 0, n // 3]
    sizes[1] = n - sizes[0] - sizes[2]
    for size, pool in zip(sizes, pools, strict=True):
        if size > len(pool):
            raise ValueError(f"{n} names of a kind were asked for, the word lists give fewer")
    names = [
        name for size, pool in zip(sizes, pools, strict=True) for name in rng.sample(pool, size)
    ]
    rng.shuffle(names)
    return names


@dataclass(frozen=True)
class Single:
    """One single fact: `relation` of `subject` is `object`."""

    subject: str
    relation: Relation
    object: str

    def prompts(self) -> dict[str, str]:
        """Form -> prompt that asks for the object."""
        return prompts_about(self.relation.wording, self.subject)


class Hopland:
    """The world of one seed.

    Args:
        seed: everything random derives from it.
        people, works, companies, cities, countries: how many entities of each kind.
        barred: share of single facts that take part in no trained composition.
        held_out: share of the other compositions that is not trained.

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
    ) -> None:
        for name, share in (("barred", barred), ("held_out", held_out)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; expected a share in [0, 1)")
        rng = random.Random(seed)
        self.seed = seed
        self.relations = _RELATIONS
        self.entities = {
            "person": _people(people, rng),
            "work": _places(works, _WORK, rng),
            "company": _places(companies, _COMPANY, rng),
            "city": _places(cities, _CITY, rng),
            "country": _places(countries, _COUNTRY, rng),
        }
        self.values = {kind: text.split(", ") for kind, text in _VALUES.items()}
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
                draw = rng.random()
                out_1 = key in self.barred
                out_2 = (second.subject, second.relation.name) in self.barred
                if out_1 or out_2:
                    split = {(1, 0): "first_unseen", (0, 1): "second_unseen"}.get(
                        (out_1, out_2), "both_unseen"
                    )
                else:
                    split = "seen_parts" if draw < self._held_out else "train"
                yield first, second, split

    def two_hop_facts(self, *splits: str) -> list[TwoHopFact]:
        """The compositions of `splits` (default: all) as `TwoHopFact` records."""
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"unknown split(s) {unknown}; Hopland has {list(SPLITS)}")
        return [
            self.record(first, second, split)
            for first, second, split in self.compositions()
            if not splits or split in splits
        ]

    def sample(self, *, train: int = 500, held_out: int = 450, seed: int = 0) -> list[TwoHopFact]:
        """A seeded sample of two-hop facts for a study, whole first hops at a time.

        All held-out questions of a drawn first hop come together, so that a question has others
        with the same first hop beside it. First hops are drawn until every held-out split but
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

    @staticmethod
    def record(first: Single, second: Single, split: str = "") -> TwoHopFact:
        """The two-hop fact that two single facts make up."""
        phrase = first_hop_phrase(first.relation.wording, first.subject)
        return TwoHopFact(
            id=f"{first.subject}/{first.relation.name}/{second.relation.name}",
            subject=first.subject,
            relation1=first.relation.name,
            bridge=first.object,
            relation2=second.relation.name,
            answer=second.object,
            first_hop=phrase,
            prompts=prompts_about(second.relation.wording, phrase),
            first_prompts=first.prompts(),
            second_prompts=second.prompts(),
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
