"""CounterFact's and zsRE's own tests as queries, and their published scores by hand."""

from __future__ import annotations

import json

import pytest
import torch

from mi_hops.editing import load_requests
from mi_hops.editing.baselines import RomeRepair
from mi_hops.editing.request_files import Requests
from mi_hops.model import forward
from mi_hops.reasoning import evaluate, request_sets
from mi_hops.text.tokens import encode

RECORDS = [
    {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "w1 {} w2",
            "subject": f"w{5 + i}",
            "target_new": {"str": f"w{50 + i}"},
            "target_true": {"str": f"w{60 + i}"},
        },
        "paraphrase_prompts": [f"w3 w{5 + i} w2", f"w4 w{5 + i} w8"],
        "neighborhood_prompts": [f"w1 w{15 + i} w2"] * (i < 2),
    }
    for i in range(3)
]
ZSRE = {
    "subject": "w5",
    "src": "w1 w5 w2",
    "rephrase": "w3 w5 w2",
    "alt": "w50",
    "answers": ["w60", "w61"],
    "loc": "nq question: w20 w21",
    "loc_ans": "w22",
}


def read(tmp_path, *records, **options):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return load_requests(path, **options)


def test_counterfacts_queries(tmp_path):
    queries = request_sets(read(tmp_path, *RECORDS))
    counts = {name: (n.queries, n.skipped) for name, n in queries.counts().items()}
    assert counts == {"efficacy": (3, 0), "wordings": (6, 0), "same_relation": (2, 1)}
    by_set = {q.set: q for q in queries if q.case == "counterfact-1"}
    assert (by_set["efficacy"].prompt, by_set["efficacy"].answer) == ("w1 w6 w2", "w51")
    assert by_set["wordings"].wrong == "w61"
    beside = by_set["same_relation"]
    assert (beside.answer, beside.wrong) == ("w61", "w51")  # the old object is true there
    true = request_sets(read(tmp_path, *RECORDS, target="true"))
    found = {q.set: (q.answer, q.wrong) for q in true if q.case == "counterfact-1"}
    assert set(found.values()) == {("w61", "w51")}


def test_zsres_queries(tmp_path):
    taught = {q.set: q for q in request_sets(read(tmp_path, ZSRE))}
    assert set(taught) == {"efficacy", "wordings", "specificity"}
    assert (taught["wordings"].answer, taught["wordings"].wrong) == ("w50", "w60")
    asked = taught["specificity"]
    assert (asked.prompt, asked.answer, asked.wrong) == ("w20 w21?", "w22", None)
    true = {q.set: q for q in request_sets(read(tmp_path, ZSRE, target="true"))}
    assert (true["efficacy"].answer, true["efficacy"].aliases) == ("w60", ("w61",))
    assert true["efficacy"].wrong == "w50"


def test_the_published_scores(load_tiny, tmp_path):
    model = load_tiny("gpt2")
    requests = read(tmp_path, *RECORDS)
    repair = RomeRepair(layer=1, steps=15, templates=("{}",), kl=0.0)
    scores = evaluate(model, repair, request_sets(requests), requests, generate=False)
    table = scores.table(n_resamples=50).xs("target_over_wrong_after", level="statistic")
    edits = dict(zip((r.id for r in requests), repair.fit(model, requests), strict=True))
    for name in ("efficacy", "wordings", "same_relation"):
        ahead = []
        for query in request_sets(requests).of(name):
            tokens = torch.tensor([encode(model, query.prompt).ids])
            with edits[query.case].applied(model), torch.no_grad():
                logits = forward(model, tokens)[0, -1]
            right, wrong = (encode(model, text).ids[-1] for text in (query.answer, query.wrong))
            ahead.append(float(logits[right] > logits[wrong]))
        found = table.loc[(repair.name, name)]
        assert (found["value"], found["n_queries"]) == (
            pytest.approx(sum(ahead) / len(ahead)),
            len(ahead),
        )


def test_requests_without_tests_are_refused():
    with pytest.raises(ValueError, match="come without prompts that test them"):
        request_sets(Requests((), "mine", 0))
