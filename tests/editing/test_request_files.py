"""CounterFact and zsRE in their published layouts become requests; the records are made up."""

from __future__ import annotations

import json

import pytest

from mi_hops.editing import Request, creme, load_requests
from mi_hops.editing.baselines.rome import rome
from mi_hops.facts import FactsFileError

COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 9,
    "requested_rewrite": {
        "prompt": "The instrument of {} is",
        "relation_id": "P1303",
        "target_new": {"str": "the harp", "id": "Q1"},
        "target_true": {"str": "the drum", "id": "Q2"},
        "subject": "Ada Moss",
    },
    "paraphrase_prompts": ["Nothing more. Ada Moss plays"],
    "neighborhood_prompts": ["The instrument of Ida Rye is", "Ida Rye plays"],
    "attribute_prompts": ["Bo Lind plays", "The instrument of Bo Lind is"],
    "generation_prompts": [],
}

ZSRE = {
    "subject": "Quill Mill",
    "src": "Which town is Quill Mill in?",
    "pred": "Low Wick",
    "rephrase": "What town has Quill Mill?",
    "alt": "High Wick",
    "answers": ["Low Wick", "Wick"],
    "loc": "nq question: who sang the first song",
    "loc_ans": "Ida Rye",
    "cond": "Low Wick >> High Wick || Which town is Quill Mill in?",
}


def write(tmp_path, *records):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def without(record, name):
    return {k: v for k, v in record.items() if k != name}


def test_counterfact_teaches_the_new_object(tmp_path):
    requests = load_requests(write(tmp_path, COUNTERFACT))
    assert requests.describe().endswith("1 read / 0 dropped / 0 repaired")
    assert requests[0] == Request(
        two_hop_prompt="The instrument of Ada Moss is",
        target="the harp",
        first_hop="Ada Moss",
        keep=("The instrument of Ida Rye is", "Ida Rye plays"),
        id="counterfact-3",
    )
    assert load_requests(write(tmp_path, COUNTERFACT), target="true")[0].target == "the drum"


def test_counterfact_gives_a_second_hop_prompt_in_the_same_words(tmp_path):
    other = COUNTERFACT | {"case_id": 4, "attribute_prompts": ["Bo Lind plays"]}
    requests = load_requests(write(tmp_path, COUNTERFACT, other), second_hop=True)
    assert (requests[0].second_hop_prompt, requests[0].bridge) == (
        "The instrument of Bo Lind is",
        "Bo Lind",
    )
    assert [(n.row, n.reason) for n in requests.dropped] == [(1, "no second-hop prompt")]


def test_zsre_teaches_either_answer(tmp_path):
    path = write(tmp_path, ZSRE)
    assert load_requests(path)[0] == Request(
        two_hop_prompt="Which town is Quill Mill in?",
        target="High Wick",
        first_hop="Quill Mill",
        keep=("who sang the first song?",),
        id="zsre-0",
    )
    assert load_requests(path, target="true")[0].target == "Low Wick"
    assert [n.reason for n in load_requests(path, second_hop=True).dropped] == [
        "no second-hop prompt"
    ]


def test_records_that_ask_for_nothing_are_counted(tmp_path):
    gone = ZSRE | {"src": "Which town is it in?"}
    requests = load_requests(write(tmp_path, ZSRE | {"alt": ""}, gone))
    assert [n.reason for n in requests.dropped] == ["no target", "subject not in its question"]


def test_a_prompt_that_names_its_subject_again_is_dropped(tmp_path):
    rewrite = COUNTERFACT["requested_rewrite"] | {
        "prompt": "The language of {} was",
        "subject": "Language",
    }
    twice = ZSRE | {"src": "Which town is Quill Mill in, Quill Mill?"}
    requests = load_requests(write(tmp_path, COUNTERFACT | {"requested_rewrite": rewrite}, twice))
    assert [n.reason for n in requests.dropped] == ["subject twice in its prompt"] * 2


def test_malformed_records(tmp_path):
    with pytest.raises(FactsFileError, match=r"record 0: no field 'src'"):
        load_requests(write(tmp_path, without(ZSRE, "src")))
    rewrite = COUNTERFACT["requested_rewrite"] | {"prompt": "plays"}
    with pytest.raises(FactsFileError, match=r"record 0: 'plays' has no slot"):
        load_requests(write(tmp_path, COUNTERFACT | {"requested_rewrite": rewrite}))
    assert len(load_requests(write(tmp_path, without(ZSRE, "src"), ZSRE), on_error="drop")) == 1
    with pytest.raises(ValueError, match="target is 'old'"):
        load_requests(write(tmp_path, ZSRE), target="old")
    with pytest.raises(ValueError, match="second_hop=True gives prompts"):
        load_requests(write(tmp_path, ZSRE), second_hop=True, target="true")


def test_a_request_says_what_it_lacks():
    with pytest.raises(ValueError, match="neither a second-hop prompt nor a target"):
        Request(two_hop_prompt="Ada Moss plays")
    with pytest.raises(ValueError, match="bridge is empty"):
        Request(two_hop_prompt="Ada Moss plays", second_hop_prompt="Bo Lind plays", target="chess")
    with pytest.raises(ValueError, match="'Ada' does not appear in the two-hop prompt"):
        Request(two_hop_prompt="Bo plays", first_hop="Ada", target="chess")


def test_rome_takes_such_a_request_and_creme_says_what_it_needs(tmp_path, tiny):
    rewrite = {
        "prompt": "w5 of {} is",
        "subject": "w7 w8",
        "target_new": {"str": "w9"},
        "target_true": {"str": "w10"},
    }
    record = {"requested_rewrite": rewrite, "attribute_prompts": ["w5 of w11 is"]}
    path = write(tmp_path, record)
    plain = load_requests(path)[0]
    assert rome(tiny, plain, layer=1, steps=2, templates=("{}",)).request["target"] == "w9"
    with pytest.raises(ValueError, match="has no second-hop prompt, whose computation CREME moves"):
        creme(tiny, plain, layers=[1])
    moved = load_requests(path, second_hop=True)[0]
    assert creme(tiny, moved, layers=[1]).changes
