"""Loading facts: our own JSONL, the memory-injection CSVs, any table, and what is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mi_hops.facts import (
    Facts,
    FactsFileError,
    TwoHopFact,
    load_facts,
    load_jsonl,
    load_memory_injections,
    load_table,
    save_jsonl,
)


def make_fact(name="a", **changes):
    fields = {
        "id": name,
        "subject": "Quill",
        "relation1": "owner",
        "bridge": "Ada Moss",
        "relation2": "town",
        "answer": "Low Wick",
        "first_hop": "the owner of Quill",
        "prompts": {"suffix": "The town of the owner of Quill is"},
    }
    return TwoHopFact(**{**fields, **changes})


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


# --- JSONL ---------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=12).filter(lambda text: text.strip())
prompts = names.map(str.rstrip)
tables = st.dictionaries(st.sampled_from(["suffix", "prefix", "question"]), prompts)
texts = st.lists(st.text(max_size=8), max_size=3).map(tuple)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | names
finite = values.filter(lambda v: v not in (float("inf"), float("-inf")))


@st.composite
def facts(draw):
    bridge = draw(names)
    answer = draw(names.filter(lambda a: a.strip().casefold() != bridge.strip().casefold()))
    return TwoHopFact(
        id=draw(names),
        subject=draw(names),
        relation1=draw(names),
        bridge=bridge,
        relation2=draw(names),
        answer=answer,
        first_hop=draw(names),
        prompts=draw(tables.filter(bool)),
        first_prompts=draw(tables),
        second_prompts=draw(tables),
        paraphrases=draw(texts),
        bridge_aliases=draw(texts),
        answer_aliases=draw(texts),
        split=draw(st.text(max_size=5)),
        meta=draw(st.dictionaries(names, finite | st.lists(finite, max_size=2), max_size=3)),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(facts(), min_size=1, max_size=4, unique_by=lambda fact: fact.id))
def test_jsonl_gives_back_what_was_saved(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("round") / "facts.jsonl"
    save_jsonl(some, path)
    loaded = load_jsonl(path)
    assert list(loaded) == some
    assert (loaded.dropped, loaded.repaired, loaded.read) == ((), (), len(some))
    assert path.read_bytes().count(b"\n") == len(some)


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path):
    lines = [json.dumps(make_fact(name).to_dict()) for name in "ab"]
    path = write(tmp_path / "facts.jsonl", "\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n")
    assert [fact.id for fact in load_jsonl(path)] == ["a", "b"]


def broken_line(**changes):
    record = {**make_fact("b").to_dict(), **changes}
    return json.dumps({k: v for k, v in record.items() if v is not None})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "b", "subject"', "column 22: not JSON"),
        ("[1, 2]", r"expected an object, found \[1, 2\]"),
        (broken_line(answer="ada moss"), "bridge and answer are both 'ada moss'"),
        (broken_line(answer=None), "missing field.*'answer'"),
        (broken_line(colour="red"), "unknown field.*'colour'"),
        (broken_line(bridge=7), "bridge is 7; expected a text"),
        (broken_line(paraphrases="one"), "paraphrases is 'one'; expected a list of texts"),
        (broken_line(prompts="one"), "prompts is 'one'; expected an object of form -> text"),
        (broken_line(id="a"), "the id 'a' was used in line 1"),
        (broken_line(prompts={"suffix": "It is "}), "must not be empty or end in white space"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line_or_is_dropped(tmp_path, line, said):
    good = json.dumps(make_fact().to_dict())
    path = write(tmp_path / "facts.jsonl", f"{good}\n\n{line}\n")
    with pytest.raises(FactsFileError, match=rf"facts\.jsonl: line 3: .*{said}"):
        load_jsonl(path)
    kept = load_facts(path, on_error="drop")
    assert [fact.id for fact in kept] == ["a"]
    assert [note.row for note in kept.dropped] == [1]
    assert kept.dropped[0].done.startswith("line 3 dropped: ")
    assert kept.read == 2


def test_a_file_that_is_missing_empty_a_folder_or_not_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no facts file .*none\.jsonl"):
        load_facts(tmp_path / "none.jsonl")
    with pytest.raises(FactsFileError, match=r"empty\.jsonl is empty"):
        load_facts(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FactsFileError, match=r"blank\.jsonl: no records"):
        load_facts(write(tmp_path / "blank.jsonl", "\n \n"))
    with pytest.raises(FactsFileError, match="not a file"):
        load_facts(tmp_path)
    for name in ("latin.jsonl", "latin.csv", "latin.json"):
        (tmp_path / name).write_bytes('{"id": "Böll"}'.encode("latin-1"))
        with pytest.raises(FactsFileError, match=rf"{name}: not UTF-8"):
            load_facts(tmp_path / name)
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        load_jsonl(save_jsonl([make_fact()], tmp_path / "facts.jsonl"), on_error="ignore")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (make_fact("a"), "two facts have the id 'a'"),
        (make_fact("b", meta={"x": float("nan")}), "cannot be written as JSON"),
        (make_fact("b", meta={"x": object()}), "cannot be written as JSON"),
        (make_fact("b", meta={1: "x"}), "would not come back"),
        (make_fact("b", subject=""), "missing field.*'subject'"),
        (make_fact("b", answer="\ud800"), "cannot be written as JSON"),
    ],
)
def test_saving_is_all_or_nothing(tmp_path, bad, said):
    path = save_jsonl([make_fact("old")], tmp_path / "facts.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said):
        save_jsonl([make_fact("a"), bad], path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["facts.jsonl"]


def test_an_interruption_while_saving_leaves_the_old_file_alone(tmp_path):
    path = save_jsonl([make_fact("old")], tmp_path / "facts.jsonl")

    def interrupted():
        yield make_fact("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_jsonl(interrupted(), path, overwrite=True)
    assert [fact.id for fact in load_jsonl(path)] == ["old"]
    assert os.listdir(tmp_path) == ["facts.jsonl"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_jsonl([make_fact()], path)
    with pytest.raises(ValueError, match="does not end in '.jsonl'"):
        save_jsonl([make_fact()], tmp_path / "facts.json")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_jsonl([make_fact()], tmp_path / "nowhere" / "facts.jsonl")


# --- Memory-injection CSVs -----------------------------------------------------------------------

HAND = "explicit_sentence,obscure_sentence,explicit_entity,obscure_entity,answer\n"
FACTS = "explicit_sent,obscure_sent,explicit_entity,obscure_entity,fact1,fact2,answer\n"


def hand(tmp_path, *rows, **options):
    return load_memory_injections(write(tmp_path / "hand.csv", HAND + "\n".join(rows)), **options)


def test_a_handwritten_row_becomes_a_fact_of_the_form_that_fits(tmp_path):
    facts = hand(
        tmp_path,
        "Ada Moss lives in,The owner of Quill lives in,Ada Moss,the owner of Quill,Low Wick",
        "The town of Ada Moss is,The town of the owner of Quill is,Ada Moss,The owner of Quill,NA",
    )
    opened, ended = facts
    assert facts.describe().endswith("hand.csv: 2 read / 0 dropped / 0 repaired")
    assert opened.prompts == {"prefix": "The owner of Quill lives in"}
    assert opened.first_hop == "The owner of Quill"
    assert opened.first_prompts == {"prefix": "The owner of Quill is"}
    assert opened.second_prompts == {"prefix": "Ada Moss lives in"}
    assert (opened.bridge, opened.answer, opened.id) == ("Ada Moss", "Low Wick", "hand-0")
    assert ended.prompts == {"suffix": "The town of the owner of Quill is"}
    assert ended.first_hop == "the owner of Quill"
    assert ended.answer == "NA"
    save_jsonl(facts, tmp_path / "facts.jsonl")
    assert load_jsonl(tmp_path / "facts.jsonl").facts == facts.facts


def only_note(facts):
    (note,) = facts.repaired
    assert len(facts) == 1
    return note.reason


def test_each_defect_of_a_handwritten_row_is_repaired_and_reported(tmp_path):
    spaces = hand(tmp_path, "Ada is in,The cook is in ,Ada,The cook,Wick")
    assert only_note(spaces) == "stray white space"
    assert spaces[0].prompt() == "The cook is in"

    accents = hand(tmp_path, "In Wick José sang,In Wick the cook sang,Jose,the cook,songs")
    assert only_note(accents) == "bridge respelt as in its prompt"
    assert (accents[0].bridge, accents[0].bridge_aliases) == ("José", ("Jose",))

    phrase = hand(tmp_path, "Ada left by,The old cook left by,Ada,The old cook of Wick,boat")
    assert only_note(phrase) == "first hop taken from its prompt"
    assert phrase[0].first_hop == "The old cook"

    article = hand(tmp_path, "The firm has,The the cook of Wick has,firm,the cook of Wick,pans")
    assert only_note(article) == "doubled article"
    assert article[0].prompts == {"prefix": "The cook of Wick has"}
    assert article[0].first_hop == "The cook of Wick"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("Ada is,The cook is,Ada,The cook,ada", "bridge equals answer"),
        ("Ada is,The cook is,Ada,The cook,", "empty cell"),
        ("Ada is,Ada's cook is,Ada,Ada's cook,Bo", "bridge named in its prompt"),
        ("She is,The cook is,Ada,The cook,Bo", "bridge not in explicit prompt"),
        ("Ada is,The cook was,Ada,The baker,Bo", "first hop not in its prompt"),
    ],
)
def test_a_row_that_no_rule_repairs_is_dropped_and_reported(tmp_path, row, reason):
    facts = hand(tmp_path, "Ada is in,The cook is in,Ada,The cook,Wick", row)
    assert [fact.id for fact in facts] == ["hand-0"]
    assert [(note.row, note.reason) for note in facts.dropped] == [(1, reason)]
    assert facts.describe().endswith(f"2 read / 1 dropped (1 {reason}) / 0 repaired")


def test_strict_reference_keeps_every_row_that_a_fact_can_hold(tmp_path):
    rows = (
        "Ada is in,The cook is in ,Ada ,The cook ,Wick",
        "Ada is,The cook was,Ada,The baker,Bo",
        "Ada is,Ada's cook is,Ada,Ada's cook,Bo",
        "Ada is,The cook is,Ada,The cook,ada",
    )
    facts = hand(tmp_path, *rows, strict_reference=True)
    assert [fact.meta["row"] for fact in facts] == [0, 1, 2]
    assert facts[0].prompts == {"prefix": "The cook is in"}
    assert (facts[0].bridge, facts[0].first_hop) == ("Ada ", "The cook ")
    assert facts[1].first_hop == "The baker"
    assert not facts[0].first_prompts
    assert [(note.row, note.reason) for note in facts.repaired] == [(0, "stray white space")]
    assert [(note.row, note.reason) for note in facts.dropped] == [(3, "bridge equals answer")]


def test_facts_beside_the_prompts_give_relations_and_aliases(tmp_path):
    row = (
        "The town of Ada Moss is,The town of the owner of Quill is,Ada Moss,the owner of Quill,"
        '"[\'Quill\', \'owner\', \'A. Moss\']","[""Ada Moss"", ""town"", ""Wick""]",Low Wick'
    )
    facts = load_facts(write(tmp_path / "made.csv", FACTS + row))
    fact = facts[0]
    assert (fact.subject, fact.relation1, fact.relation2) == ("Quill", "owner", "town")
    assert (fact.bridge_aliases, fact.answer_aliases) == (("A. Moss",), ("Wick",))
    assert [note.reason for note in facts.repaired] == [
        "bridge alias from the row's facts",
        "answer alias from the row's facts",
    ]
    assert "1 repaired" in facts.describe()
    assert load_facts(tmp_path / "made.csv", strict_reference=True)[0].bridge_aliases == ()


@pytest.mark.parametrize("cell", ["", "Quill", "['Quill', 'owner']", "['Quill', 'owner', 3]"])
def test_an_unreadable_fact_is_an_error_with_its_row_and_is_never_run(tmp_path, cell):
    row = f"Ada is,The cook is,Ada,The cook,\"{cell}\",\"['Ada', 'is', 'Bo']\",Bo"
    path = write(tmp_path / "made.csv", FACTS + row)
    with pytest.raises(FactsFileError, match=r"made\.csv: row 0: fact1 is .*expected a list"):
        load_memory_injections(path)
    assert load_memory_injections(path, on_error="drop").dropped[0].reason == "unreadable fact"

    mark = tmp_path / "ran"
    code = f"open('{mark}', 'w')"
    with pytest.raises(FactsFileError, match="fact1"):
        load_memory_injections(write(path, FACTS + row.replace(f'"{cell}"', f'"{code}"')))
    assert not mark.exists()


def test_a_malformed_csv_is_an_error_that_says_where(tmp_path):
    path = tmp_path / "bad.csv"
    with pytest.raises(FactsFileError, match=r"obscure_sent.*it has \['a', 'b'\]"):
        load_facts(write(path, "a,b\n1,2\n"))
    with pytest.raises(FactsFileError, match=r"no column \['answer'\]; it has \['explicit_sent"):
        load_facts(write(path, HAND.replace(",answer", "") + "a,b,c,d\n"))
    with pytest.raises(FactsFileError, match=r"row 1 \(ending in line 4\) has 4 cells"):
        load_facts(write(path, HAND + 'a,b,"c\nc",d,e\n1,2,3,4\n'))
    with pytest.raises(FactsFileError, match="row 0 .* has 6 cells"):
        load_facts(write(path, HAND + "a,b,c,d,e,f\n"))
    with pytest.raises(FactsFileError, match="line 2: not CSV"):
        load_facts(write(path, HAND + 'a,b,c,d,"e'))
    with pytest.raises(FactsFileError, match="no records"):
        load_facts(write(path, HAND))
    with pytest.raises(FactsFileError, match=r"names \['a'\] more than once"):
        load_facts(write(path, "a,a\n1,2\n"))


# --- Tables --------------------------------------------------------------------------------------

COLUMNS = {
    "bridge": "who",
    "answer": "what",
    "first_hop": "phrase",
    "prompts.suffix": "query",
    "prompts.question": "asked",
    "answer_aliases": "also",
    "meta": ["n"],
}
TABLE = (
    "who,what,phrase,query,asked,also,n\n"
    "Ada,Wick,the cook,The town of the cook is,Where is the cook?,Low Wick|Wyck,1\n"
    "Ada,Wick,the cook,The town of the cook is ,,,2\n"
)


def test_any_table_is_read_by_the_columns_named(tmp_path):
    facts = load_facts(write(tmp_path / "mine.csv", TABLE), columns=COLUMNS, separator="|")
    first, second = facts
    assert first.prompts == {"suffix": "The town of the cook is", "question": "Where is the cook?"}
    assert first.answer_aliases == ("Low Wick", "Wyck")
    assert (first.id, first.subject, first.meta) == ("mine-0", "the cook", {"n": "1"})
    assert second.prompts == {"suffix": "The town of the cook is"}
    assert [(note.row, note.reason) for note in facts.repaired] == [(1, "stray white space")]
    tabs = write(tmp_path / "mine.tsv", TABLE.replace(",", "\t"))
    assert load_facts(tabs, columns=COLUMNS, separator="|")[0].prompts == first.prompts


def test_a_frame_is_a_table_and_its_facts_can_be_saved(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {
            "who": ["Ada", "Bo", None],
            "what": ["Wick", "Bo", "Wick"],
            "phrase": ["the cook"] * 3,
            "query": ["The town of the cook is"] * 3,
            "asked": [None, float("nan"), pd.NA],
            "also": [["Low Wick", "Wyck"], None, None],
            "n": [1, 2, 3],
            "day": pd.date_range("2020-01-01", periods=3),
        },
        index=[7, 8, 9],
    )
    with pytest.raises(FactsFileError, match=r"table: row 2: nothing in \['who'\]"):
        load_table(frame, columns=COLUMNS)
    facts = load_facts(frame, columns=COLUMNS, on_error="drop")
    assert facts == load_table(frame, columns=COLUMNS, on_error="drop")
    assert facts[0].answer_aliases == ("Low Wick", "Wyck")
    assert facts[0].meta == {"n": 1}
    assert [note.reason for note in facts.dropped] == ["bridge equals answer", "empty cell"]
    dated = load_facts(frame, columns=COLUMNS | {"meta": ["n", "day"]}, on_error="drop")
    assert dated[0].meta == {"n": 1, "day": "2020-01-01 00:00:00"}
    path = save_jsonl(dated, tmp_path / "facts.jsonl")
    assert load_jsonl(path).facts == dated.facts


def test_columns_called_like_fields_need_no_naming(tmp_path):
    import pandas as pd

    names = {"who": "bridge", "what": "answer", "phrase": "first_hop", "query": "prompts.suffix"}
    header, *rows = TABLE.splitlines()
    for old, new in names.items():
        header = header.replace(old, new)
    path = write(tmp_path / "mine.csv", "\n".join([header, *rows]))
    frame = pd.read_csv(path)
    for facts in (load_facts(path), load_facts(frame), load_facts(frame, format="table")):
        assert facts[0].prompts == {"suffix": "The town of the cook is"}
        assert (facts[0].bridge, facts[0].answer) == ("Ada", "Wick")
    with pytest.raises(ValueError, match="a data frame is a 'table'"):
        load_facts(frame, format="jsonl")
    with pytest.raises(FactsFileError, match=r"the columns are .*expected .* columns={field"):
        load_facts(frame.drop(columns="answer"))


def test_shown_in_a_notebook_facts_do_not_flood(tmp_path):
    facts = load_facts("hopland")
    assert len(facts) > 1000
    assert len(repr(facts)) < 300
    assert len(repr(facts[0])) < 300
    shown = facts._repr_html_()
    assert len(shown) < 20_000
    assert shown.count("<tr>") == 11 and f"and {len(facts) - 10} more" in shown
    risky = [make_fact(bridge="<script>")]
    assert "<script>" not in load_jsonl(save_jsonl(risky, tmp_path / "a.jsonl"))._repr_html_()


def test_a_row_whose_prompt_lacks_its_phrase_or_names_its_bridge_is_dropped(tmp_path):
    rows = TABLE + "Ada,Wick,the baker,The town of the cook is,,,3\n"
    rows += "Ada,Wick,the cook,The town of the cook Ada is,,,4\n"
    facts = load_table(write(tmp_path / "mine.csv", rows), columns=COLUMNS)
    assert [(note.row, note.reason) for note in facts.dropped] == [
        (2, "first hop not in its prompt"),
        (3, "bridge named in its prompt"),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "query"}, r"columns names 'prompts'; expected prompts.suffix, say"),
        ({"prompts.": "query"}, r"columns names 'prompts.'; expected prompts.suffix, say"),
        ({"bridge.suffix": "who"}, r"columns names 'bridge.suffix'; expected 'bridge'"),
        ({"bridge": ["who"]}, r"columns\['bridge'\].*the name of one column"),
        ({"prompts.suffix": ["query"]}, r"columns\['prompts.suffix'\].*the name of one column"),
        ({"bridges": "who"}, r"columns names the field 'bridges'; a fact has \['answer'"),
        ({"bridge": "nobody"}, r"no column \['nobody'\]; it has \['who', 'what'"),
    ],
)
def test_columns_that_make_no_sense_are_refused(tmp_path, change, said):
    path = write(tmp_path / "mine.csv", TABLE)
    with pytest.raises(ValueError, match=said):
        load_table(path, columns={**COLUMNS, **change})
    with pytest.raises(ValueError, match=r"columns lacks \['bridge'\]"):
        load_table(path, columns={k: v for k, v in COLUMNS.items() if k != "bridge"})


# --- Choosing a format ---------------------------------------------------------------------------


def test_the_format_is_told_by_the_first_character_or_named(tmp_path):
    lines = save_jsonl([make_fact()], tmp_path / "facts.jsonl").read_text()
    assert load_facts(write(tmp_path / "facts.txt", lines))[0] == make_fact()
    assert load_facts(write(tmp_path / "facts.csv", lines), format="jsonl")[0] == make_fact()
    with pytest.raises(FactsFileError, match="cannot tell its format.*name it with format="):
        load_facts(write(tmp_path / "facts.bin", "hello"))
    with pytest.raises(ValueError, match="unknown format 'yaml'; known are"):
        load_facts(tmp_path / "facts.txt", format="yaml")
    with pytest.raises(ValueError, match=r"no option \['templates'\]"):
        load_facts(tmp_path / "facts.jsonl", templates="folder")
    with pytest.raises(FactsFileError, match="or columns={field: column} that says"):
        load_facts(write(tmp_path / "other.csv", "a,b\n1,2\n"), format="table")


def test_the_result_is_a_sequence(tmp_path):
    facts = load_jsonl(save_jsonl([make_fact(n) for n in "abc"], tmp_path / "facts.jsonl"))
    assert isinstance(facts, Facts)
    assert (len(facts), facts[-1].id, [f.id for f in facts[:2]]) == (3, "c", ["a", "b"])
    assert make_fact("b") in facts
    assert facts.index(make_fact("b")) == 1


def test_naming_the_package_loads_nothing_heavy():
    code = "import sys, mi_hops.facts; print({'pandas', 'torch', 'xarray'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# --- The published files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    folder = os.environ.get("MI_HOPS_DATA")
    if not folder:
        pytest.skip("MI_HOPS_DATA is not set; it names the folder with memory_injections/")
    return Path(folder) / "memory_injections"


def test_the_published_handwritten_set(published):
    path = published / "handwritten_obscure_explicit_data.csv"
    facts = load_facts(path)
    assert (facts.read, len(facts), len(facts.dropped)) == (106, 106, 0)
    assert {note.row: note.reason for note in facts.repaired} == {
        23: "first hop taken from its prompt",
        31: "bridge respelt as in its prompt",
        39: "stray white space",
        45: "first hop taken from its prompt",
        62: "first hop taken from its prompt",
        77: "stray white space",
        103: "stray white space",
    }
    assert facts[0].bridge == "George Washington"
    assert facts[0].answer == "Revolutionary War"
    assert facts[31].bridge == "Simón Bolívar"
    assert facts[39].bridge == "Argonne National Laboratory"
    assert facts[62].first_hop == "The man who conquered most of the known world"
    assert facts[103].prompt() == "The longest known cave system is located in"
    assert all(fact.first_hop in fact.prompt() for fact in facts)

    raw = load_facts(path, strict_reference=True)
    assert len(raw) == 106
    assert raw[39].bridge == "Argonne National Laboratory "
    assert raw[62].first_hop == "The man who conquered the world"
    assert [note.row for note in raw.repaired] == [103]


def test_the_published_set_made_from_2wikimultihop(published):
    facts = load_facts(published / "multi_hop_1000.csv")
    by_row = {fact.meta["row"]: fact for fact in facts}
    assert (facts.read, len(facts)) == (1000, 999)
    # The name of the bridge, Echigues, stands in "the father of Gomes Echigues".
    assert [(n.row, n.reason) for n in facts.dropped] == [(95, "bridge named in its prompt")]
    reasons = [note.reason for note in facts.repaired]
    # 37 rows have two names for the bridge; one of them is the row dropped.
    assert reasons.count("bridge alias from the row's facts") == 36
    assert reasons.count("answer alias from the row's facts") == 2
    assert [n.row for n in facts.repaired if n.reason == "doubled article"] == [604]
    assert by_row[604].prompts == {"prefix": "The publisher of Weekly Asahi Geinō was founded by"}
    assert by_row[5].bridge_aliases == ("Joe De Grasse",)
    assert by_row[132].answer_aliases == ("20 March 851",)
    assert by_row[0].relation2 == "country of citizenship"
    assert by_row[0].subject == "Lilli's Marriage"
    # The phrase opens the 68 prompts that match only without regard to case, and the one mended.
    assert sum("prefix" in fact.prompts for fact in facts) == 69
    assert all(fact.first_hop in fact.prompt() for fact in facts)

    raw = load_facts(published / "multi_hop_1000.csv", strict_reference=True)
    assert (len(raw), raw.dropped, raw.repaired) == (1000, (), ())
    assert raw[604].prompt().startswith("The the publisher")


def test_the_bundled_facts_have_a_name():
    facts = load_facts("hopland")
    assert len(facts) > 1000 and {"first_unseen", "second_unseen"} <= {f.split for f in facts}


def test_whole_numbers_beside_a_gap_are_whole_numbers():
    import pandas as pd

    frame = pd.DataFrame(
        {
            "who": ["Ada", "Bo"],
            "what": [1947, None],  # floats, to pandas
            "phrase": ["the cook"] * 2,
            "query": ["The year of the cook is"] * 2,
        }
    )
    given = ("bridge", "answer", "first_hop", "prompts.suffix")
    facts = load_facts(frame, columns={k: COLUMNS[k] for k in given}, on_error="drop")
    assert [fact.answer for fact in facts] == ["1947"]


def test_columns_between_semicolons_are_told(tmp_path):
    path = tmp_path / "made.csv"
    path.write_text("explicit_sentence;obscure_sentence\na;b\n", encoding="utf-8")
    with pytest.raises(FactsFileError, match="separated by semicolons"):
        load_memory_injections(path)
