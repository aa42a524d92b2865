"""Nothing is left behind: memory over many repeats, hooks and flags after any end."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from mi_hops import patching
from mi_hops.model import forward
from mi_hops.patching import Circuit, all_edges
from mi_hops.sweep import Pairs, Sites
from mi_hops.text.tokens import encode
from tests.patching.loops import ALL as EVERY
from tests.patching.loops import CLEAN as TEXTS
from tests.patching.loops import ONE, PAIRS, changed

CLEAN, CORRUPTED = PAIRS[0]
CUT = Sites("z", layers=[1, 2])

CALLS = {
    "patch": lambda m: patching.patch(m, ONE, CUT),
    "plan": lambda m: patching.PatchJob(m, ONE).plan(),
    "ablate": lambda m: patching.ablate(
        m, changed(ONE, corrupted=None), Sites("attn_out", layers=1, positions=-1)
    ),
    "trace": lambda m: patching.trace(
        m, ONE, "w7", Sites(positions=[2, 6]), samples=2, severed=["none", "mlp"]
    ),
    "attribute": lambda m: patching.attribute(m, ONE, Sites("q", layers=1), method="atp*").verify(
        top=2
    ),
    "integrated": lambda m: patching.attribute(
        m, ONE, Sites(layers=2), method="integrated", steps=2
    ),
    "path_patch": lambda m: patching.path_patch(m, ONE, "L0H1", ["L1H1.v", "MLP2"]),
    "attribute_edges": lambda m: patching.attribute_edges(
        m, ONE, "L0H1", ["L1H1.v", "MLP2"]
    ).verify(),
    "faithfulness": lambda m: patching.faithfulness(m, ONE, [Circuit(frozenset(all_edges(m)[:9]))]),
    "acdc": lambda m: patching.acdc(
        m, (CLEAN, CORRUPTED), threshold=0.1, start=Circuit(frozenset(all_edges(m)[:1]))
    ),
    "head_scores": lambda m: patching.head_scores(m, length=5, samples=1),
    "attention_to": lambda m: patching.attention_to(m, CLEAN, "w7"),
    "icl_score": lambda m: patching.icl_score(m, CLEAN, early=2, late=5),
    "composition": lambda m: patching.composition(m, "q"),
}
ONE_PASS = ("patch", "head_scores", "attention_to", "icl_score")


def tensors():
    gc.collect()
    # By type, not isinstance: some objects of torch warn when they are looked at.
    return sum(type(o) is torch.Tensor for o in gc.get_objects())


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_fifty_repeats_leave_memory_flat(load_tiny, name):
    model = load_tiny("llama")
    CALLS[name](model)
    before = tensors()
    for _ in range(50):
        CALLS[name](model)
    assert tensors() <= before


ALL = changed(EVERY, answer="w11", wrong="w21")
ALONE = Pairs(TEXTS, answer="w11", wrong="w21")
CIRCUITS = [Circuit(frozenset()), Circuit(frozenset({("embed", "logits")}))] * 2
AT_2 = Sites("attn_out", positions=2)
PATHS = "all", ["v", "mlps", "logits"]


def attributed(method):
    return lambda m: patching.attribute(m, ALL, "q", method=method, by_kind=True)["change"]


#: Calls, and how many rows a block may have: fewer than they try at first, so that pairs, readers,
#: circuits or senders go in smaller parts. None: one row fewer, where classes try different numbers.
SCARCE = {
    "patch": (4, lambda m: patching.patch(m, ALL, Sites("z", layers=1))["score"]),
    "third source": (
        2,
        lambda m: patching.patch(m, changed(ALL, source=CLEAN), Sites(layers=1))["score"],
    ),
    "ablate": (
        2,
        lambda m: patching.ablate(m, ALONE, Sites("attn_out", layers=1, positions=2))["score"],
    ),
    "position_mean": (
        2,
        lambda m: patching.ablate(m, ALONE, AT_2, how="position_mean")["score"],
    ),
    "resample": (2, lambda m: patching.ablate(m, ALONE, AT_2, how="resample")["score"]),
    "trace": (3, lambda m: patching.trace(m, ONE, "w7", "z", samples=1)["score"]),
    "gradient": (1, attributed("gradient")),
    "integrated": (1, attributed("integrated")),
    "atp*": (1, attributed("atp*")),
    "path_patch": (4, lambda m: patching.path_patch(m, ALL, *PATHS)["score"]),
    "attribute_edges": (4, lambda m: patching.attribute_edges(m, ALL)["change"]),
    "faithfulness": (None, lambda m: patching.faithfulness(m, ALL, CIRCUITS)["score"]),
}


@pytest.mark.parametrize("name", [*SCARCE, "inputs"])
def test_gradients_are_taken_whatever_the_caller_has_switched_off(load_tiny, name):
    calls = {name: call for name, (_, call) in SCARCE.items()}
    calls["inputs"] = lambda m: patching.attribute_inputs(m, ALL, steps=3)["attribution"]
    model = load_tiny()
    expected = calls[name](model).values
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert np.array_equal(calls[name](model).values, expected, equal_nan=True)


@pytest.mark.slow_case("llama-bridge")
@pytest.mark.parametrize("name", SCARCE)
def test_out_of_memory_halves_what_was_tried(tiny, name):
    limit, call = SCARCE[name]
    widths, most = [], float("inf")

    def scarce(module, arguments, output):  # rows join within the block
        widths.append((output if isinstance(output, torch.Tensor) else output[0]).shape[0])
        if widths[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    block = tiny.blocks[1]  # readers of a circuit have rows of their own as far as the norm only
    handles = [part.register_forward_hook(scarce) for part in (block, block.ln1)]
    try:
        expected = call(tiny)
        most = max(widths) - 1 if limit is None else limit
        widths.clear()
        found = call(tiny)
    finally:
        for handle in handles:
            handle.remove()
    assert max(widths) > most
    assert np.allclose(found, expected, atol=1e-5, equal_nan=True)
    assert not any(h.fwd_hooks or h.bwd_hooks for h in tiny.hook_dict.values())


@contextmanager
def left_as_it_was(model):
    """What is run within, and fails, leaves no hook, flag, gradient or weight behind."""
    tokens = torch.tensor([encode(model, CLEAN).ids])
    before = forward(model, tokens)
    flags = {k: v for k, v in vars(model.cfg).items() if k.startswith("use_")}
    yield
    assert not any(h.fwd_hooks or h.bwd_hooks for h in model.hook_dict.values())
    assert {k: v for k, v in vars(model.cfg).items() if k.startswith("use_")} == flags
    assert torch.is_grad_enabled()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(forward(model, tokens), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("plan", "composition")])
def test_model_is_as_before_after_a_failure_in_mid_pass(tiny, name, error):
    """A block fails from its second run on; whatever the function was doing, nothing is left."""
    runs = []

    def fail(*args):
        runs.append(1)
        if len(runs) >= (1 if name in ONE_PASS else 2):
            raise error("in mid pass")

    with left_as_it_was(tiny):
        handle = tiny.blocks[1].register_forward_pre_hook(fail)
        try:
            with pytest.raises(error):
                CALLS[name](tiny)
        finally:
            handle.remove()


#: Calls that score prompts, by a metric of one's own.
SCORING = {
    "patch": lambda m, **score: patching.patch(m, PAIRS[0], **score),
    "ablate": lambda m, **score: patching.ablate(m, CLEAN, **score),
    "trace": lambda m, **score: patching.trace(m, CLEAN, "w7", samples=2, **score),
    **{
        method: lambda m, method=method, **score: patching.attribute(
            m, PAIRS[0], "q", method=method, steps=2, **score
        )
        for method in ("gradient", "integrated", "atp*")
    },
    "path_patch": lambda m, **score: patching.path_patch(
        m, PAIRS[0], receivers=["q", "mlps"], **score
    ),
    "attribute_edges": lambda m, **score: patching.attribute_edges(m, PAIRS[0], **score),
    "faithfulness": lambda m, **score: patching.faithfulness(m, PAIRS[0], CIRCUITS, **score),
    "acdc": lambda m, **score: patching.acdc(
        m, PAIRS[0], threshold=1.0, start=CIRCUITS[1], **score
    ),
}


@pytest.mark.parametrize("name", SCORING)
def test_model_is_as_before_after_a_failure_of_the_metric(tiny, name):
    """The first time that it is asked, or the last."""

    def failing(asked, number, error):
        def metric(logits):
            asked.append(1)
            if len(asked) >= number:
                raise error("in the metric")
            return logits[:, 15] - logits[:, 25]

        return metric

    whole = []
    with left_as_it_was(tiny):
        SCORING[name](tiny, metric=failing(whole, float("inf"), None))
        for error in (KeyboardInterrupt, torch.OutOfMemoryError):
            for number in (1, len(whole)):
                with pytest.raises(error):
                    SCORING[name](tiny, metric=failing([], number, error))
