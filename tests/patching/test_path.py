"""Direct paths against the model's own norm and weights, applied by hand, and TransformerLens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.patching import patch, path_patch
from mi_hops.patching.nodes import Node, readers, writers
from mi_hops.sweep import Limits, Sites
from mi_hops.sweep.passes import row_bytes
from mi_hops.text.tokens import TokenError, encode
from tests.patching.loops import (
    ALL,
    ANSWERS,
    ONE,
    PAIRS,
    SCORE,
    WRONGS,
    changed,
    reading,
    run,
    write,
)

N = 7


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_equals_the_weights_applied_by_hand(load_tiny, shape):
    model = load_tiny(shape, "hooked", "float64")
    result = path_patch(model, ALL, ["all", "attns"], "all")
    sources, targets = writers(model, ["all", "attns"]), readers(model, "all")
    assert result["score"].shape == (3, len(sources), len(targets))
    (clean, corrupted), score = PAIRS[1], {"answer": ANSWERS[1], "wrong": WRONGS[1]}
    reached = 0
    for u in sources:
        for v in targets:
            at = {"example": 1, "sender": u.name, "receiver": v.name}
            got = float(result["score"].sel(at))
            if not u.reaches(v):
                assert np.isnan(got)
                continue
            reached += 1
            change = write(model, clean, u) - write(model, corrupted, u)
            expected = run(model, corrupted, [reading(model, corrupted, v, change)], **score)
            assert got == pytest.approx(expected, abs=1e-9)
    assert reached > 100


@pytest.mark.slow
def test_both_classes_agree(load_tiny):
    for shape in ("gpt2", "llama", "llama32"):
        found = [
            path_patch(
                load_tiny(shape, backend),
                changed(ALL, wrong=None),
                "all",
                ["q", "k", "v", "mlps", "logits"],
                metric="answer_logprob",
            )["score"]
            for backend in ("hooked", "bridge")
        ]
        assert np.allclose(*found, atol=2e-4, equal_nan=True), shape


def test_equals_transformer_lens(load_tiny):
    """Where it has the exact form: the pre-norm fork of TransformerLens 4."""
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this TransformerLens has no exact direct path patching")
    for shape, components in (("gpt2", "qkv"), ("llama", "q")):
        model = load_tiny(shape, "bridge")
        tokens = [torch.tensor([encode(model, t).ids]) for t in PAIRS[0]]
        caches = [model.run_with_cache(t, return_type="logits")[1] for t in tokens]
        right, wrong = (encode(model, w).ids[-1] for w in ("w11", "w21"))

        def metric(logits, right=right, wrong=wrong):
            return logits[0, -1, right] - logits[0, -1, wrong]

        for component in components:
            ours = path_patch(model, ONE, ["L0H1", "L1H2"], component)["score"]
            for layer, head in ((0, 1), (1, 2)):
                theirs = patching.get_act_patch_direct_path(
                    model,
                    tokens[1],
                    caches[0],
                    caches[1],
                    metric,
                    layer,
                    head,
                    component,
                    verbose=False,
                )
                mine = ours.sel(sender=f"L{layer}H{head}")[0].values.reshape(3, 4)
                assert np.allclose(mine[layer + 1 :], theirs[layer + 1 :].cpu(), atol=1e-5)


def test_all_writes_together_are_the_whole_change(load_tiny):
    """The embedding alone reaches block 0, so its path to a query is the patched query itself."""
    for backend in ("hooked", "bridge"):
        model = load_tiny("llama", backend)
        path = path_patch(model, ONE, "embed", ["L0H1.q", "L0H0.k"])
        for kind, name, dim in (("q", "L0H1.q", "head"), ("k", "L0H0.k", "kv_head")):
            exact = patch(model, ONE, Sites(kind, layers=0))
            head = 1 if kind == "q" else 0
            whole = float(exact["score"].sel({dim: head, "layer": 0})[0])
            assert float(path["score"].sel(receiver=name)[0, 0]) == pytest.approx(whole, abs=1e-5)


def test_positions_and_noising(load_tiny):
    model = load_tiny("gpt2", "hooked", "float64")
    node, reader = Node("head", 0, 1), Node("q", 2, 3)
    result = path_patch(model, ONE, "L0H1", "L2H3.q", positions=slice(3, 5), direction="noise")
    clean, corrupted = PAIRS[0]
    change = write(model, corrupted, node) - write(model, clean, node)
    change[[0, 1, 2, 5, 6]] = 0
    expected = run(model, clean, [reading(model, clean, reader, change)], **SCORE)
    assert float(result["score"][0, 0, 0]) == pytest.approx(expected, abs=1e-9)
    gap = run(model, corrupted, **SCORE) - run(model, clean, **SCORE)
    share = (expected - run(model, clean, **SCORE)) / gap
    assert float(result["effect"][0, 0, 0]) == pytest.approx(share, abs=1e-9)
    assert node.reaches(reader)


@pytest.mark.slow_case("llama-bridge")
def test_no_pass_is_wider_than_allowed(tiny):
    """The probes of readers' inputs keep to the bounds as the sweeps do."""
    nodes = "heads", ["k", "MLP2", "logits"]
    expected = path_patch(tiny, ALL, *nodes)["score"]
    rows = []

    def count(module, arguments, output):  # rows join within the block
        rows.append((output if isinstance(output, torch.Tensor) else output[0]).shape[0])

    for limits in ({"max_rows": 3}, {"memory": 3.5 * row_bytes(tiny, N, 1)}):
        rows.clear()
        handle = tiny.blocks[1].register_forward_hook(count)
        try:
            found = path_patch(tiny, ALL, *nodes, limits=Limits(**limits))["score"]
        finally:
            handle.remove()
        assert max(rows) == 4  # and the base
        assert np.allclose(found, expected, atol=1e-5, equal_nan=True)


def test_order_of_nodes():
    assert Node("head", 1, 0).reaches(Node("mlp", 1))
    assert not Node("mlp", 1).reaches(Node("mlp", 1))
    assert not Node("head", 1, 0).reaches(Node("q", 1, 2))
    assert Node("mlp", 1).reaches(Node("k", 2, 0))
    assert Node("mlp", 2).reaches(Node("logits", 3))
    assert [n.name for n in (Node("embed", 0), Node("attn", 2), Node("v", 1, 3))] == [
        "embed",
        "ATTN2",
        "L1H3.v",
    ]


def test_refuses(tiny, monkeypatch):
    with pytest.raises(ValueError, match="unknown writer 'L9H0'"):
        path_patch(tiny, ONE, senders="L9H0")
    with pytest.raises(ValueError, match="unknown reader 'L1H9.q'"):
        path_patch(tiny, ONE, receivers="L1H9.q")
    with pytest.raises(ValueError, match="no path leads"):
        path_patch(tiny, ONE, "L2H0", "L1H0.q")
    with pytest.raises(TokenError, match="7 and 3 tokens"):
        path_patch(tiny, changed(ONE, corrupted="w1 w2"))
    with pytest.raises(ValueError, match="expected one metric"):
        path_patch(tiny, ONE, metric=["rank", "logit_diff"])


def test_refuses_heads_without_a_write_of_their_own(tiny, monkeypatch):
    from mi_hops.patching import nodes

    monkeypatch.setattr(nodes, "w_o", lambda model, layer: model.blocks[layer].attn.W_O * 2)
    with pytest.raises(ValueError, match="'ATTN0'"):
        path_patch(tiny, ONE, "L0H0")
