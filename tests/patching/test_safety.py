"""Nothing is left behind: memory over many repeats, hooks and flags after any end."""

from __future__ import annotations

import gc

import pytest
import torch

from mi_hops import patching
from mi_hops.model import forward
from mi_hops.patching import Circuit, all_edges
from mi_hops.tokens import encode
from tests.patching.loops import PAIRS

ONE = {"answer": "w11", "wrong": "w21"}
CLEAN, CORRUPTED = PAIRS[0]

CALLS = {
    "patch": lambda m: patching.patch(m, CLEAN, CORRUPTED, kinds="z", layers=[1, 2], **ONE),
    "plan_patch": lambda m: patching.plan_patch(m, CLEAN, CORRUPTED, **ONE),
    "ablate": lambda m: patching.ablate(m, CLEAN, how="mean", layers=[1], positions=-1, **ONE),
    "trace": lambda m: patching.trace(
        m, CLEAN, "w7", answer="w11", samples=2, severed=["none", "mlp"], positions=[2, 6]
    ),
    "attribute": lambda m: patching.attribute(
        m, CLEAN, CORRUPTED, kinds="q", method="atp*", layers=[1], **ONE
    ).verify(top=2),
    "integrated": lambda m: patching.attribute(
        m, CLEAN, CORRUPTED, method="integrated", steps=2, layers=[2], **ONE
    ),
    "path_patch": lambda m: patching.path_patch(
        m, CLEAN, CORRUPTED, senders="L0H1", receivers=["L1H1.v", "MLP2"], **ONE
    ),
    "attribute_edges": lambda m: patching.attribute_edges(
        m, CLEAN, CORRUPTED, senders="L0H1", receivers=["L1H1.v", "MLP2"], **ONE
    ).verify(),
    "faithfulness": lambda m: patching.faithfulness(
        m, CLEAN, CORRUPTED, [Circuit(frozenset(all_edges(m)[:9]))], **ONE
    ),
    "acdc": lambda m: patching.acdc(
        m, CLEAN, CORRUPTED, threshold=0.1, start=Circuit(frozenset(all_edges(m)[:1]))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_fifty_repeats_leave_memory_flat(load_tiny, name):
    model = load_tiny("llama")
    CALLS[name](model)
    before = tensors()
    for _ in range(50):
        CALLS[name](model)
    assert tensors() <= before


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("plan_patch", "composition")])
def test_model_is_as_before_after_a_failure_in_mid_pass(tiny, name, error):
    """A block fails from its second run on; whatever the function was doing, nothing is left."""
    tokens = torch.tensor([encode(tiny, CLEAN).ids])
    before = forward(tiny, tokens)
    flags = {k: v for k, v in vars(tiny.cfg).items() if k.startswith("use_")}
    runs = []

    def fail(*args):
        runs.append(1)
        if len(runs) >= (1 if name in ONE_PASS else 2):
            raise error("in mid pass")

    handle = tiny.blocks[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            CALLS[name](tiny)
    finally:
        handle.remove()
    assert not any(h.fwd_hooks or h.bwd_hooks for h in tiny.hook_dict.values())
    assert {k: v for k, v in vars(tiny.cfg).items() if k.startswith("use_")} == flags
    assert torch.is_grad_enabled()
    assert not any(p.requires_grad for p in tiny.parameters())
    assert torch.equal(forward(tiny, tokens), before)
