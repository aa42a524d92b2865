"""Results of parts of the facts, merged, are those of all facts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mi_hops
from mi_hops import Hopland, Limits, load_model, merge
from mi_hops.cli import app
from mi_hops.reasoning import Gap
from mi_hops.reasoning.merge import load_part
from mi_hops.result.result import Result
from mi_hops.sweep import Pairs
from tests.patching.loops import ALL, ANSWERS, CLEAN

FACTS = Hopland().sample(train=0, held_out=3)


@pytest.fixture(
    scope="module", params=["hops-gpt2", pytest.param("hops-llama", marks=pytest.mark.slow)]
)
def model(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def halves(model):
    return [mi_hops.find_gap(model, part) for part in (FACTS[:4], FACTS[4:])]


def test_a_gap(model, halves, tmp_path):
    whole, merged = mi_hops.find_gap(model, FACTS), merge(halves)
    assert isinstance(merged, Gap) and merged.facts == whole.facts
    assert merged.provenance == whole.provenance and merged.title == whole.title
    for name in ("answer", "first_token", "said", "says_bridge", "rank"):
        assert (merged[name] == whole[name]).all(), name
    np.testing.assert_allclose(merged["prob"], whole["prob"], rtol=1e-4)
    assert merged.frame.drop(columns="prob").equals(whole.frame.drop(columns="prob"))
    assert merge([merged]).data.identical(merged.data)
    assert Gap.load(merged.save(tmp_path / "gap.nc")).data.identical(merged.data)


def test_a_sweep_with_one_batch_each(model):
    def sweep(facts):
        return mi_hops.locate(model, facts, limits=Limits(batch_size=1))

    whole, merged = sweep(FACTS[:4]), merge([sweep(FACTS[:2]), sweep(FACTS[2:4])])
    assert merged.data.identical(whole.data) and merged.skipped == whole.skipped
    assert merged.n_used == whole.n_used


def test_estimates_are_merged_as_a_result(load_tiny, tmp_path):
    """A whole Attribution would hold a model that patches the first part only."""
    model, site = load_tiny(), mi_hops.Sites("resid_pre", positions={"last": -1})

    def attribute(chosen):
        return mi_hops.attribute(model, ALL.select(chosen), site)

    whole, merged = attribute([0, 1, 2]), merge([attribute([0, 1]), attribute([2])])
    assert type(merged) is Result and merged.provenance == whole.provenance
    np.testing.assert_allclose(merged["change"], whole["change"], atol=1e-5)
    loaded = load_part(attribute([0, 1]).save(tmp_path / "part.nc"))
    assert merge([loaded, attribute([2])])["change"].equals(merged["change"])


def test_traces_whose_subjects_are_elsewhere(load_tiny, tmp_path):
    model = load_tiny()

    def trace(i, subject):
        pair = Pairs(CLEAN[i], answer=ANSWERS[i], labels=[str(i)])
        return mi_hops.trace(model, pair, subject, mi_hops.Sites(positions={"last": -1}), samples=1)

    merged = merge([trace(0, slice(2, 4)), trace(1, 1)])
    assert merged["noised"].values.tolist() == ["2 3", "1"]
    again = Result.load(merged.save(tmp_path / "traces.nc"))
    assert again["noised"].values.tolist() == ["2 3", "1"]
    assert merged.sel(example=["1"])["noised"].values.tolist() == ["1"]


@pytest.mark.slow
def test_an_evaluation(model, tmp_path):
    def evaluate(facts):
        own = [query for query in sets if query.case in {fact.id for fact in facts}]
        return mi_hops.evaluate(model, [mi_hops.CremeRepair(layers=[3])], own, facts, batch_size=1)

    gap = mi_hops.find_gap(model, FACTS)
    known = (gap.failed + gap.passed)[:4]
    sets = mi_hops.build_sets(model, known, gap=gap, per_case=1)
    whole, merged = evaluate(known), merge([evaluate(known[:2]), evaluate(known[2:])])
    assert merged.case_ids == whole.case_ids and set(merged.skipped) <= set(whole.skipped)
    key = ["repair", "set", "query_id"]
    pd.testing.assert_frame_equal(
        merged.frame.sort_values(key, ignore_index=True),
        whole.frame.sort_values(key, ignore_index=True),
        rtol=1e-4,
        atol=1e-5,
    )
    assert list(dict.fromkeys(merged.frame["set"])) == list(dict.fromkeys(whole.frame["set"]))
    table = mi_hops.merge([merged]).table(n_resamples=50)
    np.testing.assert_allclose(table["value"], merged.table(n_resamples=50)["value"])
    path = merged.save(tmp_path / "evaluation.nc")
    assert load_part(path).case_ids == merged.case_ids


def test_moments(model, tmp_path):
    def moments(facts, **more):
        return mi_hops.second_moments(model, facts, layers=[1, 4], max_tokens=64, **more)

    whole, merged = moments(FACTS), merge([moments(FACTS[:5]), moments(FACTS[5:])])
    assert merged.n == whole.n
    for layer in whole.layers:
        torch.testing.assert_close(merged.second[layer], whole.second[layer], rtol=1e-5, atol=1e-7)
        assert merged.fourth[layer] == pytest.approx(whole.fourth[layer], rel=1e-6)
        assert merged.share(layer) == pytest.approx(whole.share(layer), rel=1e-5)
    with pytest.raises(ValueError, match="positions: all and last"):
        merge([moments(FACTS[:5]), moments(FACTS[5:], positions="last")])
    with pytest.raises(ValueError, match=r"null_space: 0\.1 and None"):
        merge([moments(FACTS[:5]).with_null_space(0.1), moments(FACTS[5:])])
    a, b = merged.save(tmp_path / "a.safetensors"), whole.save(tmp_path / "b.safetensors")
    assert merge([load_part(a), load_part(b)]).n == 2 * whole.n


def test_what_does_not_belong_together_is_refused(model, halves):
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    with pytest.raises(ValueError, match=r"in two parts, such as \["):
        merge([halves[0], halves[0]])
    with pytest.raises(ValueError, match="cannot merge Gap, Result"):
        merge([halves[0], mi_hops.locate(model, FACTS[:1])])
    with pytest.raises(ValueError, match="cannot merge int"):
        merge([1, 2])
    with pytest.raises(ValueError, match="score: answer and first_token"):
        merge([halves[0], halves[1].scored_by("first_token")])
    other = mi_hops.find_gap(
        load_model("planted-serial-0"), mi_hops.planted_facts("planted-serial-0", limit=2)
    )
    with pytest.raises(ValueError, match="fingerprint"):
        merge([halves[0], other])
    locate = [mi_hops.locate(model, FACTS[i : i + 1]) for i in (0, 1)]
    with pytest.raises(ValueError, match="labels of the parts differ"):
        merge([locate[0], locate[1].sel(layer=[0])])
    with pytest.raises(ValueError, match="no labelled examples"):
        merge([locate[0].mean(), locate[1].mean()])


def test_the_command(halves, tmp_path):
    files = [str(h.save(tmp_path / f"{i}.nc")) for i, h in enumerate(halves)]
    out = tmp_path / "all.nc"
    done = CliRunner().invoke(app, ["merge", *files, "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "n used" in done.output
    assert Gap.load(out).data.identical(merge(halves).data)
    again = CliRunner().invoke(app, ["merge", *files, "--out", str(out)])
    assert again.exit_code == 2 and "exists" in again.stderr
    done = CliRunner().invoke(app, ["merge", files[0], files[0], "--out", str(out), "--force"])
    assert done.exit_code == 2 and "in two parts" in done.stderr
