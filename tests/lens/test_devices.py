"""A model placed on several devices is read, and lenses of it are trained, to the same effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import (
    AttentionLens,
    LensTraining,
    Place,
    Readout,
    TunedLens,
    copying,
    evaluate_heads,
    evaluate_lens,
    fact_attribution,
    fact_probes,
    fact_trajectories,
    fit_affine,
    logit_attribution,
    logit_flow,
    logit_lens,
    neuron_attribution,
    patchscope,
    patchscope_generate,
    read_head,
    read_vectors,
    similarity,
    token_map,
    top_texts,
    train_lens,
)
from tests.injection.test_grid import FACTS
from tests.lens.test_trained import TEXTS
from tests.places import assert_same

SOURCES, TARGET = ("w1 w2 w3", "w5 w6"), "w7 w8 w9"


def check_same(pair, read):
    """What is read of the model is the same on one device and on two."""
    one, two = (read(model) for model in pair)
    np.testing.assert_allclose(two, one, atol=1e-6)


@pytest.mark.slow_case("gpt2")
def test_vectors_from_any_device(pair):
    # Those of a block on the other device, and those that lie with the model's ends.
    elsewhere = next(pair[1].blocks[1].parameters()).device
    for place in (torch.device("cpu"), elsewhere):
        got = read_vectors(pair[1], torch.ones(2, 32).to(place), track={"a": 5})
        want = read_vectors(pair[0], torch.ones(2, 32), track={"a": 5})
        np.testing.assert_allclose(got["prob"].values, want["prob"].values, atol=1e-6)


@pytest.mark.slow_case("gpt2")
def test_generation_from_a_mapped_state(pair):
    def mapped(model):
        fitted = fit_affine(model, model, TEXTS, source_layer=2, target_layer=1)
        places = Place(SOURCES[0], layers=2), Place(TARGET, layers=1)
        options = {"mapping": fitted, "stop": (), "max_new_tokens": 3}
        return patchscope_generate(model, *places, **options).ids

    check_same(pair, mapped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "objective"),
    [
        pytest.param(TunedLens, "output", id="tuned"),
        pytest.param(lambda m: AttentionLens(m, layers=[1], variant="full"), "sum", id="sum"),
        pytest.param(
            lambda m: AttentionLens(m, layers=[1], variant="low_rank", norm=True),
            "leave_one_out",
            id="leave_one_out",
        ),
    ],
)
def test_training(pair, tmp_path, make, objective):
    plan = LensTraining(
        steps=3, max_tokens=256, evaluate_every=2, held_out=0.2, cells=32, objective=objective
    )

    def trained(model, folder=None):
        lens = make(model)
        run = train_lens(model, lens, TEXTS, plan, checkpoint=folder)
        kl = evaluate_lens(model, lens, TEXTS[:3])["kl"].values
        return np.concatenate([run["after"].values, kl.ravel()])

    check_same(pair, trained)
    # Resumed at its end: what was stored comes back to where it lay.
    first, again = (trained(pair[1], tmp_path / "checkpoint") for _ in range(2))
    np.testing.assert_allclose(again, first, atol=1e-9)


def probes(model):
    pytest.importorskip("sklearn")
    from tests.lens.test_probes import facts

    return fact_probes(model, facts(), layers=[0, 2])


TRACK = {"a": ["w1", "w2 w3"]}
EACH = {"positions": "each", "track": {"a": ["w7 w8", "w9"]}, "readout": Readout(top_k=2)}
READS = {
    **{
        f"logit_lens, {kind}": lambda m, kind=kind: logit_lens(m, TEXTS[0], kind=kind, **EACH)
        for kind in ("resid", "result")
    },
    "patchscope": lambda m: patchscope(m, SOURCES, TARGET, track=TRACK),
    "logit_attribution": lambda m: logit_attribution(m, SOURCES, TRACK),
    "evaluate_heads, slow": lambda m: evaluate_heads(m, AttentionLens(m), TEXTS[:3]),
    "fact_trajectories": lambda m: fact_trajectories(m, FACTS),
    "fact_attribution": lambda m: fact_attribution(m, FACTS),
    "token_map": lambda m: token_map(m, TARGET),
    "logit_flow": lambda m: logit_flow(m, SOURCES, TRACK, by_head=True),
    "neuron_attribution": lambda m: neuron_attribution(m, SOURCES, TRACK),
    "top_texts, neuron": lambda m: top_texts(m, TEXTS, layer=1, neuron=3, top=3),
    "top_texts, head": lambda m: top_texts(m, TEXTS, layer=1, head=3, top=3),
    "similarity": lambda m: similarity(m, [f"w{i} w{i + 30}" for i in range(1, 12)]),
    "fact_probes": probes,
    "read_head, OV": lambda m: read_head(m, [(0, 1), (1, 2)], ["w1", "w2"], ["w5", "w6"]),
    "read_head, QK": lambda m: read_head(m, (1, 2), ["w1", "w2"], ["w5", "w6"], circuit="qk"),
    "copying": copying,
}


@pytest.mark.slow_case("gpt2", "slow")
@pytest.mark.parametrize("name", READS)
def test_readings(pair, name):
    assert_same(pair, READS[name])
