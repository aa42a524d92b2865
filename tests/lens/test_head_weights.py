"""QK, OV and virtual heads from weights: equal to TransformerLens's FactoredMatrix on folded models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformer_lens import FactoredMatrix

from mi_hops.lens import copying, read_head
from mi_hops.text.tokens import TokenError
from tests.models import models

EVERY = list(range(90))


@pytest.fixture(params=models("gpt2", "llama"))
def wide(request, load_tiny):
    return load_tiny(*request.param, dtype="float64")


@pytest.fixture(params=["gpt2", "llama"])
def both(request, load_tiny):
    """A model as it is, and folded by TransformerLens."""
    return (
        load_tiny(request.param, "bridge", "float64"),
        load_tiny(request.param, "hooked", "float64", processing="fold"),
    )


def test_ov_qk_and_copying_are_transformer_lens_products_on_folded_weights(both):
    model, folded = both
    layer, head = 1, 3
    ov = folded.W_E @ folded.OV[layer, head].AB @ folded.W_U
    found = read_head(model, (layer, head), EVERY, EVERY)
    assert np.allclose(found["score"], (ov - ov.mean(1, keepdim=True)).detach(), atol=1e-6)
    qk = folded.W_E @ folded.QK[layer, head].AB @ folded.W_E.T / folded.cfg.d_head**0.5
    found = read_head(model, f"L{layer}H{head}", EVERY, EVERY, circuit="qk")
    assert np.allclose(found["score"], qk.detach(), atol=1e-6)
    u = folded.W_U - folded.W_U.mean(1, keepdim=True)
    scores = copying(model)["copying"]
    for h in range(4):
        whole = FactoredMatrix(
            folded.W_E @ folded.OV[layer, h].A, folded.OV[layer, h].B @ u
        ).eigenvalues
        want = (whole.real.sum() / whole.abs().sum()).item()
        assert scores.sel(layer=layer, head=h).item() == pytest.approx(want, abs=1e-6)


def test_two_heads_are_one_virtual_head(both):
    model, folded = both
    path = folded.OV[0, 1].AB @ folded.OV[2, 0].AB
    want = folded.W_E @ path @ folded.W_U
    found = read_head(model, [(0, 1), "L2H0"], EVERY, EVERY)["score"]
    assert np.allclose(found, (want - want.mean(1, keepdim=True)).detach(), atol=1e-6)


def test_what_a_head_attends_to_raises_logits_as_its_circuit_says(wide):
    """One head alone, one token, frozen scales: the write of z, read as logits, is the OV circuit's."""
    from mi_hops.model import linear_read_out

    layer, head, token = 0, 2, 7
    block = wide.blocks[layer]
    x = wide.W_E[token].detach()[None, None]
    scaled = block.ln1(x)[0, 0] - block.ln1(torch.zeros_like(x))[0, 0]
    v, o = wide.OV[layer, head].A.detach(), wide.OV[layer, head].B.detach()
    written = scaled @ v @ o
    ids = torch.arange(90)[None]
    direction, _ = linear_read_out(wide, x[0], ids, centre=True)
    logits = direction[0] @ written
    circuit = read_head(wide, (layer, head), token, EVERY)["score"].values[0]
    # The same but for the norms' scales, one number for all tokens.
    ratio = logits.numpy() / circuit
    assert np.allclose(ratio, ratio[0], rtol=1e-4) and ratio[0] > 0


def test_the_top_are_the_largest_of_all(wide):
    every = read_head(wide, "L1H1", ["w5", "w6"], EVERY)["score"].values
    best = read_head(wide, "L1H1", ["w5", "w6"], top=4)
    assert np.allclose(best["score"], -np.sort(-every, axis=1)[:, :4])
    assert best["target"].values[0, 0] == wide.tokenizer.decode([int(every[0].argmax())])


def test_a_head_that_writes_nothing_has_no_copying_score(load_tiny):
    model = load_tiny("gpt2", fresh=True)
    with torch.no_grad():
        model.blocks[1].attn.W_O[0] = 0
    found = copying(model)["copying"]
    assert np.isnan(found[1, 0]) and np.isfinite(found).sum() == found.size - 1


def test_bad_input(load_tiny):
    model = load_tiny()
    with pytest.raises(ValueError, match="head is 'H3'; expected 'L2H3'"):
        read_head(model, "H3", "w5")
    with pytest.raises(ValueError, match=r"no head L3H0; the model has layers 0..2"):
        read_head(model, (3, 0), "w5")
    with pytest.raises(ValueError, match="expected one, or several in ascending layers"):
        read_head(model, ["L1H0", "L1H1"], "w5")
    with pytest.raises(ValueError, match="a QK circuit is one head's"):
        read_head(model, ["L0H0", "L1H1"], "w5", circuit="qk")
    with pytest.raises(ValueError, match="circuit is 'vo'"):
        read_head(model, "L0H0", "w5", circuit="vo")
    with pytest.raises(ValueError, match="top is 0"):
        read_head(model, "L0H0", "w5", top=0)
    with pytest.raises(TokenError, match="'w5 w6' is 2 tokens"):
        read_head(model, "L0H0", "w5 w6")
    with pytest.raises(TokenError, match="token id 90 is outside"):
        read_head(model, "L0H0", 90)
    with pytest.raises(TokenError, match="no tokens were given"):
        read_head(model, "L0H0", [])
