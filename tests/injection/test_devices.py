"""Memories reach every block of a model that is placed on several devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.injection import (
    ENCODINGS,
    Encoder,
    MemoryInjection,
    Place,
    inject,
    injection_grid,
    side_effects,
)
from mi_hops.model import forward
from mi_hops.sweep.generate import generate
from tests.injection.test_grid import FACTS
from tests.places import assert_same

TOKENS = torch.tensor([[1, 9, 30, 7, 12]])


@pytest.mark.slow_case("gpt2", "heads", "resid_mid")
@pytest.mark.parametrize(
    "settings",
    [
        {"encodings": ENCODINGS},
        {"encodings": [Encoder(heads=[0, 2])], "positions": "last"},
        {"positions": Place(["first hop", "last"], kind="resid_mid", relative=True)},
    ],
    ids=["encodings", "heads", "resid_mid"],
)
def test_grids(pair, settings):
    one, two = (
        injection_grid(
            model,
            FACTS[:3],
            strengths=(3,),
            layers=[0, 1, (1, 2)],
            controls=("permuted_bridge", "norm_matched"),
            metrics="answer_logprob",
            **settings,
        )["answer_logprob"].values
        for model in pair
    )
    np.testing.assert_allclose(two, one, atol=1e-6)


@pytest.mark.slow_case("gpt2")
def test_generation_and_the_context_manager(pair):
    said, logits = [], []
    for model in pair:
        repair = MemoryInjection([0, 1, 2], 3.0, encoding="layerwise_code")
        states = repair.fit(model, FACTS)
        prompts = [f.prompt() for f in FACTS]
        found = generate(model, prompts, repair=repair, states=states, max_new_tokens=3, stop=())
        said.append([g.ids for g in found])
        with torch.no_grad(), inject(model, "w20", layers=[0, 1], strength=3.0, relative=True):
            logits.append(forward(model, TOKENS).cpu())
    assert said[0] == said[1]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=1e-5)


@pytest.mark.slow_case("gpt2")
def test_side_effects(pair):
    injection = MemoryInjection([1, 2], 3.0)
    assert_same(pair, lambda m: side_effects(m, FACTS, injection, ["w20 w21 w22", "w3 w4"]))
