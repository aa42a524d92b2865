"""Blocks without what nobody looks at: the same activations at every hook point, and nothing stays."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mi_hops.model import forward
from mi_hops.model.cache import Recorder, new_cache
from mi_hops.model.lean import lean_blocks
from tests.models import SHAPES, cases

TOKENS = torch.tensor([[1, 7, 30, 22, 5, 60], [1, 9, 14, 11, 3, 41]])
#: Of the GPT-2 Bridge nothing is replaced.
CASES = [case for case in cases(*SHAPES) if case.values != ("gpt2", "bridge")]
DTYPES = {"hooked": "float64", "bridge": "float32"}
CLOSE = {
    "hooked": {"atol": 1e-10, "rtol": 1e-10},
    "bridge": {"atol": 2e-5, "rtol": 1e-4},
}


def lean(model):
    return [block.attn for block in model.blocks if "forward" in block.attn.__dict__]


def seen_at(model, names, tokens=TOKENS, cache=None):
    """What hooks at some points see, call by call, and the logits."""
    seen = []
    hooks = [(name, lambda x, name=name: seen.append((name, x.clone()))) for name in names]
    with torch.no_grad():
        logits = forward(model, tokens, hooks=hooks, cache=cache)
    return seen, logits


def fires(model, name):
    """Whether TransformerLens computes what this point shows; some points are options."""
    try:
        return bool(seen_at(model, [name])[0])
    except RuntimeError:
        return False


@pytest.mark.parametrize("shape, backend", CASES)
def test_every_hook_point_sees_what_it_saw(load_tiny, shape, backend):
    model = load_tiny(shape, backend, DTYPES[backend])
    kinds = sorted({name.split(".", 2)[2] for name in model.hook_dict if "blocks.1." in name})
    assert {"attn.hook_z", "attn.hook_rot_k"} & set(kinds)
    for kind in [k for k in kinds if fires(model, f"blocks.1.{k}")]:
        names = [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers)]
        want, logits = seen_at(model, names)
        with lean_blocks(model):
            assert len(lean(model)) == model.cfg.n_layers
            got, found = seen_at(model, names)
        torch.testing.assert_close(found, logits, **CLOSE[backend])
        assert [name for name, _ in got] == [name for name, _ in want]
        for (_, a), (_, b) in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE[backend])


@pytest.mark.parametrize("shape, backend", CASES)
def test_behind_a_prefix_and_with_the_models_own_cache(load_tiny, shape, backend):
    model = load_tiny(shape, backend, DTYPES[backend])
    _, whole = seen_at(model, [])
    with lean_blocks(model), torch.no_grad():
        recorder = Recorder(model, 2, ())
        forward(model, TOKENS[:, :4], hooks=recorder.hooks, cache=recorder.cache)
        view = recorder.prefix().view([1, 0], 3)
        tail = forward(model, TOKENS[[1, 0], 3:], cache=view, grows=True)
        torch.testing.assert_close(tail, whole[[1, 0], 3:], **CLOSE[backend])
        cache = new_cache(model, 2)
        for part in (TOKENS[:, :4], TOKENS[:, 4:]):
            last = forward(model, part, cache=cache)
        torch.testing.assert_close(last, whole[:, 4:], **CLOSE[backend])


@pytest.mark.parametrize("shape, backend", cases("llama"))
def test_changes_at_inner_points_act(load_tiny, shape, backend):
    model = load_tiny(shape, backend, DTYPES[backend])

    def cut(scores):
        scores = scores.clone()
        scores[:, :, -1, 1] = float("-inf")
        return scores

    hooks = [("blocks.1.attn.hook_attn_scores", cut)]
    with torch.no_grad():
        want = forward(model, TOKENS, hooks=hooks)
        with lean_blocks(model):
            found = forward(model, TOKENS, hooks=hooks)
    torch.testing.assert_close(found, want, **CLOSE[backend])
    assert not torch.allclose(want, forward(model, TOKENS))


@pytest.mark.parametrize("shape, backend", CASES)
def test_gradients_flow_as_before(load_tiny, shape, backend):
    model = load_tiny(shape, backend, DTYPES[backend])
    found = []
    for lean_ in (False, True):
        stream = []
        hooks = [("blocks.0.hook_resid_post", lambda x, s=stream: s.append(x.requires_grad_()))]
        if lean_:
            with lean_blocks(model):
                logits = forward(model, TOKENS, hooks=hooks)
        else:
            logits = forward(model, TOKENS, hooks=hooks)
        found.append(torch.autograd.grad(logits[0, -1, 3], stream[0])[0])
    torch.testing.assert_close(*found, **CLOSE[backend])


@pytest.mark.parametrize("shape, backend", cases("llama"))
def test_nothing_stays_and_an_outer_block_is_kept(load_tiny, shape, backend):
    model = load_tiny(shape, backend)
    with pytest.raises(KeyError), lean_blocks(model):
        with lean_blocks(model):
            pass
        assert len(lean(model)) == model.cfg.n_layers
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())
    kind = type(model.blocks[0].mlp)
    model.blocks[0].mlp.__class__ = type("Adapter", (kind,), {"__module__": __name__})
    try:
        with lean_blocks(model):
            assert not lean(model)
    finally:
        model.blocks[0].mlp.__class__ = kind


@pytest.mark.parametrize("shape, backend", cases("llama"))
def test_results_of_heads_are_computed_where_they_are_asked_for(load_tiny, shape, backend):
    """Also where that is switched on within."""
    model = load_tiny(shape, backend, DTYPES[backend])
    names = ["blocks.1.attn.hook_result"]
    found = []
    for within in (nullcontext, lean_blocks):
        with within(model):
            model.set_use_attn_result(True)
            try:
                found.append(seen_at(model, names)[0][0][1])
            finally:
                model.set_use_attn_result(False)
    torch.testing.assert_close(*found, **CLOSE[backend])


@pytest.mark.parametrize(
    "given", [("llama", "hooked", "bfloat16"), ("llama", "bridge", "bfloat16")]
)
def test_half_precision_is_left_alone(load_tiny, given):
    model = load_tiny(*given)
    with lean_blocks(model):
        assert not lean(model)
