"""An exception at any line of the attaching and removing of hooks leaves none behind."""

from __future__ import annotations

import sys

import pytest
import torch

from mi_hops.model import capture, forward, hooked
from mi_hops.model.lean import lean_blocks
from mi_hops.sweep.scoring import logits_at

TOKENS = torch.tensor([[1, 5, 6, 7]])


class Interrupt(BaseException):
    """What Ctrl-C could raise at that line."""


HOOKS = ("hook_points.py", "hooks.py", "module.py", "contextlib.py")


def interrupted(call, at, files=HOOKS):
    """Run `call` and raise at the line number `at` of those in some files; were there so many?"""
    lines = iter(range(at, -1, -1))

    def local(frame, event, arg):
        if event == "line" and next(lines, -1) == 0:
            sys.settrace(None)
            raise Interrupt
        return local

    def trace(frame, event, arg):
        return local if frame.f_code.co_filename.endswith(files) else None

    try:
        sys.settrace(trace)
        call()
        return False
    except Interrupt:
        return True
    finally:
        sys.settrace(None)


def attached(model):
    """All that is attached anywhere in the model, and the level of its contexts."""
    tables = [n for n in vars(torch.nn.Module()) if n.endswith(("_hooks", "_hooks_with_kwargs"))]
    return [
        [(list(getattr(m, n))) for n in tables]
        + [[h.hook.id for h in getattr(m, side, ())] for side in ("fwd_hooks", "bwd_hooks")]
        for m in model.modules()
    ], getattr(model, "context_level", None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_exception_at_any_line_leaves_no_hook(backend, load_tiny):
    model = load_tiny("gpt2", backend, fresh=True)
    model.add_perma_hook("blocks.1.hook_mlp_out", lambda x, hook: x)
    before = attached(model)
    assert before[0] != attached(load_tiny("gpt2", backend, fresh=True))[0]  # it is there

    def attach():
        with hooked(model, [("blocks.0.hook_attn_out", torch.neg)], must_fire=False):
            pass

    at = 0
    while interrupted(attach, at):
        assert attached(model) == before, at
        at += 1
    assert at > 100


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_exception_at_any_line_leaves_no_lean_block(backend, load_tiny):
    model = load_tiny("llama", backend, fresh=True)

    def enter():
        with lean_blocks(model):
            pass

    at = 0
    while interrupted(enter, at, ("lean.py", "contextlib.py")):
        assert not any("forward" in m.__dict__ for m in model.modules()), at
        at += 1
    assert at > 30


@pytest.mark.slow_case("bridge")
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_nor_does_one_in_the_middle_of_a_pass(backend, load_tiny):
    model = load_tiny("gpt2", backend, fresh=True)
    expected = forward(model, TOKENS)
    before = attached(model)

    def run():
        capture(model, TOKENS, ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"], logits=True)
        logits_at(model, TOKENS, torch.tensor([[3]]), hooks=[("hook_embed", torch.neg)])

    for at in range(0, 10**6, 211):
        if not interrupted(run, at):
            break
        assert attached(model) == before, at
    assert at > 1000
    assert torch.equal(forward(model, TOKENS), expected)
    assert attached(model) == before


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_permanent_hook_attached_inside_stays(backend, load_tiny):
    model = load_tiny("gpt2", backend, fresh=True)
    with pytest.raises(ZeroDivisionError), hooked(model, [("hook_embed", torch.neg)]):
        model.add_perma_hook("blocks.1.hook_mlp_out", lambda x, hook: x)
        raise ZeroDivisionError
    assert len(model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks) == 1
    assert not model.hook_dict["hook_embed"].fwd_hooks
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
