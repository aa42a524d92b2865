"""When passes may be bare sums, and that a model of which that is not certain runs itself."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial, wraps
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from transformers.activations import ReLUSquaredActivation

import mi_hops
from mi_hops.model import forward, hooked_class
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.lean import lean_blocks
from mi_hops.model.plain import PlainPasses, plain_passes
from mi_hops.model.shortcuts import is_touched
from mi_hops.sweep import target_of
from mi_hops.sweep.scoring import score_prompts
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


@contextmanager
def pruned(mlp):
    prune.custom_from_mask(mlp, "weight", torch.ones_like(mlp.weight))
    try:
        yield
    finally:
        prune.remove(mlp, "weight")


def wrapped_forward(module):
    own = module.forward
    return mock.patch.dict(module.__dict__, forward=wraps(own)(lambda *given: 2 * own(*given)))


def part(model, name):
    """A part of a block: the module that computes it."""
    found = getattr(model.blocks[1], name)
    return getattr(found, "original_component", found)


#: What a third party may do to a model -> a context in which it has done so.
THIRD_PARTIES = {
    "a forward that wraps the own": lambda m: wrapped_forward(m.blocks[1].mlp),
    "a partial": lambda m: mock.patch.dict(
        m.blocks[1].mlp.__dict__, forward=partial(torch.mul, other=2.0)
    ),
    "a class's forward": lambda m: mock.patch.object(
        type(m.blocks[1].mlp), "forward", lambda self, x, *rest: x
    ),
    "a hook on all modules": lambda m: register_module_forward_hook(
        lambda module, given, out: None
    ),
    "a part of torch's": lambda m: mock.patch.dict(m.blocks[1]._modules, ln1=torch.nn.Identity()),
    "a hook point": lambda m: m.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: None)]),
    "autocast": lambda m: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
@pytest.mark.parametrize("what", THIRD_PARTIES)
def test_what_a_third_party_decides_is_not_computed_without_it(load_tiny, shape, backend, what):
    model = load_tiny(shape, backend, "float32")
    with THIRD_PARTIES[what](model):
        assert not is_plain(model)
        if what != "a hook point":  # which sweeps and lean blocks heed one by one
            before = forwards(model)
            with lean_blocks(model):
                assert forwards(model) == before
        touched = is_touched(model)
    # Sweeps run the model's own modules, in whatever precision.
    assert touched == (what not in ("autocast", "a part of torch's"))
    assert is_plain(model) and not is_touched(model)


def forwards(model):
    return [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]


def test_a_pruned_weight_is_not_read_as_it_was(load_tiny):
    model = load_tiny("llama", "bridge", "float32")
    with pruned(part(model, "mlp").down_proj.original_component):
        assert not is_plain(model)
    assert is_plain(model)


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_the_activation_that_stands_in_the_block_counts(load_tiny, shape, backend):
    model = load_tiny(shape, backend, "float32")
    mlp = part(model, "mlp")
    name = "act_fn" if hasattr(mlp, "act_fn") else "act"

    other = torch.square if backend == "hooked" else ReLUSquaredActivation()
    tokens = torch.tensor([[1, 5, 9]])
    before = forward(model, tokens)
    with mock.patch.object(mlp, name, other):
        assert is_plain(model)
        assert not torch.allclose(forward(model, tokens), before)
        found = [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())]
        with mock.patch("mi_hops.sweep.generate.plain_passes", lambda model: None):
            assert [g.ids for g in mi_hops.generate(model, PROMPTS, stop=())] == found


@pytest.mark.skipif(hooked_class() is None, reason="this TransformerLens has no HookedTransformer")
def test_torchs_hooks_on_the_whole_model_and_on_the_unembedding_fire(load_tiny):
    model, tokens = load_tiny("gpt2", "hooked", "float32"), torch.tensor([[1, 5, 9]])
    logits = forward(model, tokens)
    for module in (model, model.unembed):
        with module.register_forward_hook(lambda module, given, out: 2 * out):
            torch.testing.assert_close(forward(model, tokens), 2 * logits)
    assert torch.equal(forward(model, tokens), logits)


@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_scores_are_those_of_the_models_own_passes(load_tiny, shape, backend):
    model = load_tiny(shape, backend, "float32")
    metrics = ("first_prob", "answer_logprob", "rank", "greedy")
    prompts = [mi_hops.encode(model, text) for text in PROMPTS]
    answers = ["w8", "w12 w3", "w40"]
    targets = [target_of(model, p, answer) for p, answer in zip(prompts, answers, strict=True)]
    at = mock.patch.object(PlainPasses, "at", autospec=True, side_effect=PlainPasses.at)
    with at as plain:
        found = score_prompts(model, prompts, targets, metrics)
    assert plain.called
    with at as plain:
        # A hook that changes nothing.
        hooks = [("blocks.0.hook_resid_post", lambda x: x)]
        kept = score_prompts(model, prompts, targets, metrics, hooks=hooks)
    assert not plain.called
    for name in metrics:
        torch.testing.assert_close(found[name], kept[name], rtol=1e-4, atol=1e-5)


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
