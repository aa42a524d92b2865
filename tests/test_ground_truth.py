"""The table of what each tool said of the planted models, and what the study's report makes of it."""

from __future__ import annotations

import pytest

import mi_hops
from mi_hops.study.trust import ground_truth, how_far
from mi_hops.worlds import planted_models, planted_truth


def test_every_tool_was_asked_of_every_planted_model():
    found = ground_truth()
    assert set(found["models"]) <= set(planted_models())
    kinds = {planted_truth(name).kind for name in found["models"]}
    assert {"serial", "decoy", "hidden"} <= kinds
    for name, row in found["tools"].items():
        assert sorted(row["share"]) == found["models"], name
        yes, no = row["says_yes"]["where_true"], row["says_yes"]["where_not"]
        assert row["n"] == yes[1] + no[1]
        assert 0 <= row["power"][1] <= row["power"][0] <= row["power"][2] <= 1


@pytest.mark.slow_case("planted-serial-0")
@pytest.mark.parametrize("name", ["planted-serial-0", "planted-decoy-0", "planted-hidden-0"])
def test_the_table_says_what_the_lens_says_now(name):
    truth, facts = planted_truth(name), mi_hops.planted_facts(name)[:60]
    model = mi_hops.load_model(name, device="cpu")
    lens = mi_hops.fact_trajectories(model, facts, layers=[truth.layer + 1])
    first = lens["rank"].sel(tracked="bridge", position=truth.position) == 1
    share = ground_truth()["tools"]["logit lens"]["share"][name]
    assert float(first.mean()) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("step", ["lens", "erasure", "locate", "injection"])
def test_a_step_says_how_its_tool_did(step):
    said = how_far(step)
    counts = [row["says_yes"] for row in ground_truth()["tools"].values()]
    assert said.startswith("On the planted models")
    assert any("{} of {}".format(*count["where_true"]) in said for count in counts)
    assert any("{} of {}".format(*count["where_not"]) in said for count in counts)


def test_creme_and_steps_that_were_not_asked():
    assert "CREME corrected" in how_far("editing")
    assert how_far("gap") is None
