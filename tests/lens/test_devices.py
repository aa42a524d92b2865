"""A model placed on several devices is read, and lenses of it are trained, to the same effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens.attention import AttentionLens
from mi_hops.lens.attribution import logit_attribution
from mi_hops.lens.evaluation import evaluate_heads, evaluate_lens
from mi_hops.lens.logit import logit_lens, read_vectors
from mi_hops.lens.patchscopes import fit_affine, patchscope, patchscope_generate
from mi_hops.lens.reading import KINDS
from mi_hops.lens.training import LensTraining, train_lens
from mi_hops.lens.tuned import TunedLens
from tests.lens.test_trained import TEXTS

SOURCES, TARGET = ("w1 w2 w3", "w5 w6"), "w7 w8 w9"


def check_same(pair, read):
    """What is read of the model is the same on one device and on two."""
    one, two = (read(model) for model in pair)
    np.testing.assert_allclose(two, one, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logit_lens(pair, kind):
    def read(model):
        options = {"positions": "all", "kind": kind, "track": {"a": ["w7 w8", "w9"]}, "top_k": 2}
        return logit_lens(model, TEXTS[0], **options)["prob"].values

    check_same(pair, read)


def test_vectors_from_any_device(pair):
    # Those of a block on the other device, and those that lie with the model's ends.
    elsewhere = next(pair[1].blocks[1].parameters()).device
    for place in (torch.device("cpu"), elsewhere):
        got = read_vectors(pair[1], torch.ones(2, 32).to(place), track={"a": 5})
        want = read_vectors(pair[0], torch.ones(2, 32), track={"a": 5})
        np.testing.assert_allclose(got["prob"].values, want["prob"].values, atol=1e-6)


def test_patchscopes(pair):
    def grid(model):
        return patchscope(model, SOURCES, TARGET, track={"a": ["w1", "w2"]})["prob"].values

    def mapped(model):
        fitted = fit_affine(model, model, TEXTS, source_layer=2, target_layer=1)
        options = {"source_layer": 2, "target_layer": 1, "mapping": fitted, "stop": ()}
        return patchscope_generate(model, SOURCES[0], TARGET, max_new_tokens=3, **options).ids

    check_same(pair, grid)
    check_same(pair, mapped)


def test_attribution(pair):
    def shares(model):
        result = logit_attribution(model, SOURCES, {"a": ["w1", "w2"]})
        return np.concatenate([result[n].values.ravel() for n in ("heads", "mlps", "constant")])

    check_same(pair, shares)


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (TunedLens, "output"),
        (AttentionLens, "sum"),
        (lambda m: AttentionLens(m, variant="low_rank", norm=True), "each"),
        (lambda m: AttentionLens(m, layers=[1], variant="full"), "leave_one_out"),
    ],
    ids=["tuned", "sum", "each", "leave_one_out"],
)
def test_training(pair, tmp_path, make, objective):
    plan = LensTraining(
        steps=3, max_tokens=256, evaluate_every=2, held_out=0.2, cells=32, objective=objective
    )

    def trained(model, folder=None):
        lens = make(model)
        run = train_lens(model, lens, TEXTS, plan, checkpoint=folder)
        kl = evaluate_lens(model, lens, TEXTS[:3])["kl"].values
        return np.concatenate([list(run.after.values()), kl.ravel()])

    check_same(pair, trained)
    # Resumed at its end: what was stored comes back to where it lay.
    first, again = (trained(pair[1], tmp_path / "checkpoint") for _ in range(2))
    np.testing.assert_allclose(again, first, atol=1e-9)


def test_single_heads(pair):
    check_same(
        pair, lambda m: evaluate_heads(m, AttentionLens(m), TEXTS[:3])["leave_one_out_kl"].values
    )
