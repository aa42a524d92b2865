"""Weights laid out for a block of code: same numbers, and their own memory afterwards."""

from __future__ import annotations

import pytest
import torch

from mi_hops.model import backend_of, forward, layout, load_model
from mi_hops.model.layout import copied_bytes, pretransposed_weights
from mi_hops.sweep.fanout import fan_out
from mi_hops.sweep.interventions import Intervention, scale
from mi_hops.text.tokens import pad
from tests.sweep.test_fanout import PROMPTS


@pytest.fixture
def plain(tiny, checkpoints):
    """As TransformerLens lays weights out; `load_model`'s lie otherwise."""
    shape = "gpt2" if tiny.cfg.positional_embedding_type == "standard" else "llama"
    return as_they_come(load_model(checkpoints[shape], device="cpu", backend=backend_of(tiny)))


def as_they_come(model):
    for p in model.parameters():
        p.data = p.data.contiguous()
    return model


def memory(model):
    """Where each parameter lies, how, and its bits."""
    return {
        name: (p.data_ptr(), p.stride(), p.detach().clone()) for name, p in model.named_parameters()
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, (pointer, stride, bits) in before.items():
        assert (pointer, stride) == after[name][:2], name
        assert torch.equal(bits, after[name][2]), name


def test_same_numbers_and_own_memory_afterwards(plain):
    tokens = torch.tensor([PROMPTS[0]])
    before = memory(plain)
    with torch.no_grad():
        expected = forward(plain, tokens)
        with pretransposed_weights(plain):
            assert torch.equal(forward(plain, tokens), expected)
            for name, (_, _, bits) in before.items():
                assert torch.equal(plain.get_parameter(name), bits), name
    assert_same(before, memory(plain))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_turn_of_a_pass_is_a_view(shape, load_tiny):
    from einops import rearrange

    model = as_they_come(load_tiny(shape, "hooked", fresh=True))
    with pretransposed_weights(model):
        for block in model.blocks:
            own = dict(block.attn.named_parameters(recurse=False))
            for name, weight in own.items():
                if name.lstrip("_") in ("W_Q", "W_K", "W_V"):
                    turned = rearrange(weight, "head model d -> (head d) model")
                elif name == "W_O":
                    turned = rearrange(weight, "head d model -> model (head d)")
                else:
                    continue
                assert turned.is_contiguous(), name
                assert turned.data_ptr() == weight.data_ptr(), name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leave_the_memory_as_it_was(plain, error):
    def fail(x):
        raise error

    before = memory(plain)
    with pytest.raises(error):
        fan_out(plain, pad(PROMPTS), [Intervention.at("mlp_out", 1, fail, positions=[2])])
    assert_same(before, memory(plain))


def test_copies_are_foretold(plain):
    before = memory(plain)
    with pretransposed_weights(plain):
        moved = [
            p.numel() * p.element_size()
            for name, p in plain.named_parameters()
            if p.data_ptr() != before[name][0]
        ]
    assert copied_bytes(plain) == sum(moved)
    assert bool(moved) == (backend_of(plain) == "hooked")


def test_large_models_are_left_alone(plain, monkeypatch):
    monkeypatch.setattr(layout, "MOST_BYTES", 0)
    before = memory(plain)
    assert copied_bytes(plain) == 0
    with pretransposed_weights(plain):
        assert_same(before, memory(plain))


def test_one_inside_the_other(load_tiny):
    """A function that reduces logits may itself run a sweep."""
    model = as_they_come(load_tiny("gpt2", "hooked", fresh=True))
    before = memory(model)
    prompts, items = pad(PROMPTS), [Intervention.at("mlp_out", 0, scale(0.5), positions=[1])]
    expected = fan_out(model, prompts, items).rows

    def nested(logits, bases):
        assert torch.equal(fan_out(model, prompts, items).rows, expected)
        assert model.blocks[0].attn.W_Q[0].T.is_contiguous()
        return logits

    assert torch.equal(fan_out(model, prompts, items, reduce=nested).rows, expected)
    assert_same(before, memory(model))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_loaded_models_are_laid_out_for_good(shape, load_tiny):
    loaded = load_tiny(shape, "hooked", fresh=True)
    tokens = torch.tensor([PROMPTS[0]])
    assert copied_bytes(loaded) == 0
    own = forward(loaded, tokens)
    for block in loaded.blocks:
        assert block.attn.W_Q.transpose(1, 2).is_contiguous()
        assert block.attn.W_O.permute(2, 0, 1).is_contiguous()
        if shape == "llama":
            assert all(
                w.T.is_contiguous() for w in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out)
            )
    assert torch.equal(forward(as_they_come(loaded), tokens), own)
    assert copied_bytes(loaded) > 0
