"""Memories reach every block of a model that is placed on several devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.injection.encodings import ENCODINGS
from mi_hops.injection.grid import injection_grid
from mi_hops.injection.heads import head_ablation
from mi_hops.injection.memory import MemoryInjection, inject
from mi_hops.model import forward
from mi_hops.sweep.generate import generate
from tests.injection.test_grid import FACTS

TOKENS = torch.tensor([[1, 9, 30, 7, 12]])


@pytest.mark.parametrize(
    "settings",
    [
        {"encodings": ENCODINGS},
        {"heads": [0, 2], "positions": "last"},
        {"kind": "resid_mid", "relative": True, "positions": ["first hop", "last"]},
    ],
    ids=["encodings", "heads", "resid_mid"],
)
def test_grids(pair, settings):
    one, two = (
        injection_grid(
            model, FACTS, strengths=(1, 3), layers=[0, 1, (1, 2)], metrics="answer_logprob",
            **settings,
        )["answer_logprob"].values
        for model in pair
    )  # fmt: skip
    np.testing.assert_allclose(two, one, atol=1e-6)


def test_heads_are_ablated(pair):
    one, two = (head_ablation(m, FACTS, positions="last")["first_prob"].values for m in pair)
    np.testing.assert_allclose(two, one, atol=1e-6)


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
