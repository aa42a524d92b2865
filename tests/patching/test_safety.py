"""Nothing is left behind: memory over many repeats, hooks and flags after any end."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from mi_hops import patching
from mi_hops.model import forward
from mi_hops.patching import Circuit, all_edges
from mi_hops.text.tokens import encode
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


ALL = ([c for c, _ in PAIRS], [c for _, c in PAIRS])
CIRCUITS = {"circuits": [Circuit(frozenset()), Circuit(frozenset({("embed", "logits")}))] * 2}

#: Calls, and how many rows a block may have: fewer than they try at first, so that pairs, readers,
#: circuits or senders go in smaller parts.
SCARCE = {
    "patch": (4, lambda m: patching.patch(m, *ALL, kinds="z", layers=[1], **ONE)["score"]),
    "third source": (
        2, lambda m: patching.patch(m, *ALL, layers=[1], source=ALL[0][0], **ONE)["score"]
    ),
    "ablate": (2, lambda m: patching.ablate(m, ALL[0], layers=[1], positions=2, **ONE)["score"]),
    "position_mean": (
        2,
        lambda m: patching.ablate(m, ALL[0], how="position_mean", positions=2, **ONE)["score"],
    ),
    "resample": (
        2, lambda m: patching.ablate(m, ALL[0], how="resample", positions=2, **ONE)["score"]
    ),
    "trace": (
        3, lambda m: patching.trace(m, CLEAN, "w7", answer="w11", kinds="z", samples=1)["score"]
    ),
    **{
        method: (
            1,
            lambda m, method=method: patching.attribute(
                m, *ALL, kinds="q", method=method, by_family=True, **ONE
            ).result["change"],
        )
        for method in ("gradient", "integrated", "atp*")
    },
    "path_patch": (
        4,
        lambda m: patching.path_patch(
            m, *ALL, senders="all", receivers=["v", "mlps", "logits"], **ONE
        )["score"],
    ),
    "attribute_edges": (4, lambda m: patching.attribute_edges(m, *ALL, **ONE).result["change"]),
    "faithfulness": (14, lambda m: patching.faithfulness(m, *ALL, **CIRCUITS, **ONE)["score"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCARCE)
def test_out_of_memory_halves_what_was_tried(tiny, name):
    most, call = SCARCE[name]
    expected = call(tiny)
    widths = []

    def scarce(module, arguments, output):  # rows join within the block
        widths.append((output if isinstance(output, torch.Tensor) else output[0]).shape[0])
        if widths[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny.blocks[1].register_forward_hook(scarce)
    try:
        found = call(tiny)
    finally:
        handle.remove()
    assert max(widths) > most
    assert np.allclose(found, expected, atol=1e-5, equal_nan=True)
    assert not any(h.fwd_hooks or h.bwd_hooks for h in tiny.hook_dict.values())


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
