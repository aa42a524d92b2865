"""Small facts over the tiny models' words, and the CREME procedure written out plainly."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

from mi_hops.editing import PAPER, Request, creme, creme_joint, creme_many
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import read_matrix, write_matrix
from tests.models import SHAPES, models


@pytest.fixture(params=models(*SHAPES))
def wide(request, load_tiny):
    """A tiny float64 model."""
    return load_tiny(*request.param, dtype="float64")


TEMPLATES = ("{}", "w40 w41 {}", "w42 {}")


def paper(model, asked, **settings):
    """`creme` with the published code's settings, where none are given."""
    return creme(model, asked, **(PAPER | settings))


def paper_many(model, asked, **settings):
    return creme_many(model, asked, **(PAPER | settings))


def paper_joint(model, asked, **settings):
    return creme_joint(model, asked, **(PAPER | settings))


def make_fact(i: int = 0) -> TwoHopFact:
    """Fact i: prompts of different lengths in two forms, single hops, two-word bridge."""
    s, b, a = f"w{5 + i}", f"w{20 + i} w{30 + i}", f"w{50 + i} w{60 + i}"
    return TwoHopFact(
        id=f"f{i}",
        subject=s,
        relation1="r1",
        bridge=b,
        relation2="r2",
        answer=a,
        first_hop=f"w1 w2 {s}",
        prompts={"suffix": f"w3 w4 w1 w2 {s} w0", "prefix": f"w1 w2 {s} w70" + " w71" * (i % 3)},
        first_prompts={"suffix": f"w1 w2 {s} w0"},
        second_prompts={"suffix": f"w3 w4 {b} w0", "prefix": f"{b} w70" + " w71" * (i % 3)},
        split="test",
    )


@pytest.fixture
def fact():
    return make_fact()


@pytest.fixture
def facts():
    return [make_fact(i) for i in range(5)]


def of_lengths(facts, longer):
    """Requests of the facts' prompts, made longer by some words each."""
    return [
        Request(
            two_hop_prompt=" ".join(["w3"] * n + [f.prompt()]), first_hop=f.first_hop, target="w7"
        )
        for n, f in zip(longer, facts, strict=False)
    ]


def weights(model):
    """Every parameter, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same_bits(model, before):
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n


@contextmanager
def put_back(model, layers, matrix="W_O"):
    """The matrices of some layers, which are in the model again after the block."""
    originals = {i: read_matrix(model, matrix, i) for i in layers}
    try:
        yield originals
    finally:
        for i, w in originals.items():
            write_matrix(model, matrix, i, w)


def break_copies(monkeypatch, error, wrong, *, half=True):
    """Have weights fail as they are written: at the calls in `wrong` (half of) it is done, then `error`."""
    real, calls = torch.Tensor.copy_, itertools.count()

    def copy(self, *args):
        if next(calls) not in wrong:
            return real(self, *args)
        old = self.clone()
        real(self, *args)
        if half:
            self[len(self) // 2 :] = old[len(self) // 2 :]
        raise error

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
