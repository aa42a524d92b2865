"""The bundled models show what the methods are for; thresholds leave room for other machines."""

from __future__ import annotations

import json

import pytest

from mi_hops.lens import fact_trajectories
from mi_hops.model import CHECKPOINTS, bundled_models, hooked_class, load_model
from mi_hops.reasoning.erasure import erase_bridge
from mi_hops.reasoning.gap import find_gap
from mi_hops.study import StudySettings
from mi_hops.study.run import load_study_facts
from mi_hops.worlds import Hopland


@pytest.fixture(scope="module", params=["hops-gpt2", "hops-llama"])
def bundled(request):
    backend = "hooked" if hooked_class() and request.param == "hops-gpt2" else "bridge"
    facts, _ = load_study_facts(None, StudySettings(seed=0, limit=500))
    model = load_model(request.param, device="cpu", backend=backend)
    return request.param, model, facts, find_gap(model, facts, form="suffix")


NATURAL = ["hops-gpt2", "hops-llama"]
APPOSED = ["apposed-gpt2", "apposed-llama"]


def test_all_are_there_and_small():
    ours = [name for name in bundled_models() if not name.startswith("planted-")]
    assert ours == [*APPOSED, *NATURAL]
    for name in ours:
        files = list((CHECKPOINTS / name).iterdir())
        assert sum(f.stat().st_size for f in files) < 10 * 2**20
        assert {"README.md", "config.json", "model.safetensors", "training.json"} <= {
            f.name for f in files
        }


@pytest.mark.parametrize("form", ["suffix", "prefix"])
def test_what_the_card_measured_is_what_was_asked_for(form):
    for name in NATURAL + APPOSED:
        measured = json.loads((CHECKPOINTS / name / "training.json").read_text())["measured"]
        whole = {k.split("/")[0]: v["whole"] for k, v in measured.items() if k.endswith(form)}
        assert whole["single"] >= 0.99
        assert whole["train"] >= (0.97 if name in NATURAL else 0.96)
        assert whole["seen_parts"] >= 0.85
        assert whole["first_unseen"] <= (0.30 if name in NATURAL else 0.33)
        assert whole["second_unseen"] < whole["seen_parts"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["suffix", "prefix"])
@pytest.mark.parametrize("name", APPOSED)
def test_the_bridge_is_spelled_at_the_first_hops_end_and_used(name, form):
    """In a middle layer; more on questions whose first fact was composed than on others."""
    model, world = load_model(name, device="cpu"), Hopland()
    ranks, probs = {}, {}
    for split in ("seen_parts", "first_unseen"):
        read = fact_trajectories(model, world.two_hop_facts(split)[:120], form=form)
        at = read.sel(tracked="bridge", position="first hop", layer=2).data
        ranks[split] = float(at["rank"].median())
        probs[split] = float(at["prob"].mean())
    assert ranks["seen_parts"] <= 3
    assert probs["seen_parts"] >= 0.2
    assert probs["seen_parts"] - probs["first_unseen"] >= 0.1
    answered = find_gap(model, world.two_hop_facts("seen_parts")[:60], form=form).passed
    erased = erase_bridge(model, answered, form=form, variants=("exact",), controls=2)
    lost = (erased["control"] - erased["bridge"]).sel(position="first hop").mean("example")
    assert float(lost.max()) >= 0.2


@pytest.mark.slow_case("hops-gpt2")
def test_the_gap_is_where_it_was_made(bundled):
    name, _, _, gap = bundled
    splits = gap.by_split().set_index("split")
    assert splits["first"].min() > 0.95
    assert splits["second"].min() > 0.95
    assert splits.loc["seen_parts", "two_hop"] > 0.75
    assert splits.loc["first_unseen", "two_hop"] < 0.4
    assert len(gap.failed) > 50


@pytest.mark.slow
def test_erasing_the_bridge_lowers_the_answer(bundled):
    """More than erasing another entity does, with an interval that excludes zero at some layer."""
    _, model, _, gap = bundled
    passed = [f for f in gap.passed if f.split != "train"][:60]
    result = erase_bridge(model, passed, form="suffix", variants=("exact",), controls=2)
    ends = result.difference_ci("control", variable="bridge")
    assert (ends["upper"] < 0).any()


@pytest.mark.slow
def test_creme_corrects_failures(bundled):
    """First answer token, all layers, C estimated on trained facts; unrelated questions kept."""
    from mi_hops.editing import CremeRepair, second_moments
    from mi_hops.reasoning.evaluate import evaluate
    from mi_hops.reasoning.sets import build_sets
    from mi_hops.text.corpus import fact_texts

    _, model, facts, gap = bundled
    cases = [f for f in gap.failed if f.split != "train"][:60]
    moments = second_moments(model, list(fact_texts([f for f in facts if f.split == "train"])))
    queries = build_sets(model, cases, gap=gap, per_case=2).of("correction", "specificity")
    layers = list(range(model.cfg.n_layers))
    repair = CremeRepair(layers=layers, covariance=moments, form="suffix")
    frame = evaluate(model, [repair], queries, cases, generate=False).frame
    means = frame.groupby("set")[["first_correct_before", "first_correct_after"]].mean()
    assert means.loc["correction", "first_correct_after"] > 0.8
    assert means.loc["correction", "first_correct_before"] < 0.4
    assert means.loc["specificity", "first_correct_after"] > 0.9
