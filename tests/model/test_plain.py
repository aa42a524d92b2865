"""When passes may be bare sums, and that a model of which that is not certain runs itself."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import mi_hops
from mi_hops.model import hooked_class
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.plain import plain_passes
from tests.models import SHAPES, cases

PROMPTS = ["w7 w30 w22 w5", "w7 w30 w9", "w7 w30 w22 w5 w60 w11"]


def is_plain(model):
    with pretransposed_weights(model):
        return plain_passes(model) is not None


@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_nothing_of_the_users_is_passed_by(load_tiny, shape, backend):
    model = load_tiny(shape, backend, "float32")
    assert is_plain(model)
    before = [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())]
    mlp = model.blocks[1].mlp
    # torch's own hook, of which hook points know nothing, and a module replaced by another
    handle = mlp.register_forward_hook(lambda module, given, out: 40 * out)
    assert not is_plain(model)
    with_hook = [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())]
    handle.remove()
    assert with_hook != before
    norm = model.ln_final

    class Louder(type(norm)):
        pass

    kind, norm.__class__ = type(norm), Louder
    assert not is_plain(model)
    norm.__class__ = kind
    assert is_plain(model)
    own = mlp.forward
    # on the instance, as accelerate puts its own
    with mock.patch.dict(mlp.__dict__, forward=lambda *given: own(*given)):
        assert not is_plain(model)
    assert [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())] == before


def test_weights_as_they_are_at_the_call(load_tiny):
    model = load_tiny("llama", "bridge", "float32")
    before = [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())]
    kept = model.blocks[1].mlp.W_out.detach().clone()
    assert is_plain(model)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(-30)
    edited = [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())]
    alone = [mi_hops.generate(model, [p], stop=())[0].ids for p in PROMPTS]
    assert edited == alone != before
    with torch.no_grad():
        model.blocks[1].mlp.W_out.copy_(kept)


@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_other_precisions_run_themselves(load_tiny, shape, backend):
    assert not is_plain(load_tiny(shape, backend, "bfloat16"))
    assert is_plain(load_tiny(shape, backend, "float64")) == (backend == "hooked")


@pytest.mark.skipif(hooked_class() is None, reason="this TransformerLens has no HookedTransformer")
def test_a_model_that_shows_more_runs_itself(load_tiny):
    model = load_tiny("llama", "hooked", "float32")
    model.set_use_attn_result(True)
    assert not is_plain(model)
    model.set_use_attn_result(False)
    assert is_plain(model)
