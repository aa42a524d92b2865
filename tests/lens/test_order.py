"""From which layer the top token stays: a hand-built trajectory, and the tops of plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import Readout, commitment, fact_trajectories, logit_lens, who_comes_first
from mi_hops.result.result import Result
from mi_hops.text.tokens import encode
from tests.reasoning.tiny_facts import tiny_facts

TEXTS = ["w10 w11 w12", "w20 w21 w22 w23 w24", "w31", "w40 w41 w42 w43"]


def trajectory(tokens, layers):
    """A result with one example and position and these top tokens."""
    shape = (1, len(layers), 1, 2)
    top = np.array([[t, "other"] for t in tokens], dtype=object).reshape(shape)
    return Result.from_arrays(
        {
            "entropy": (("example", "layer", "position"), np.zeros(shape[:-1])),
            "top_tokens": (("example", "layer", "position", "k"), top),
        },
        coords={"example": ["a"], "layer": layers, "position": ["last"], "k": [0, 1]},
        provenance={},
    )


@pytest.mark.parametrize(
    ("tokens", "layers", "expected"),
    [
        ("abcd", [0, 1, 2, 3], 3),
        ("aaaa", [0, 1, 2, 3], 0),
        ("dbdd", [0, 1, 2, 3], 2),  # an early visit does not count
        ("bbad", [0, 4, 8, 12], 12),
        ("badd", [0, 4, 8, 12], 8),
        ("ddba", [12, 8, 4, 0], 8),  # in whatever order the layers were asked for
        ("a", [6], 6),
    ],
)
def test_a_hand_built_trajectory(tokens, layers, expected):
    found = commitment(trajectory(tokens, layers))
    assert found.dims == ("example", "position") and found.item() == expected


def tops(checkpoint, ids):
    """The top token of plain transformers' states at the last position, after 0, 1, ... blocks."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    body = plain.base_model
    norm = body.ln_f if hasattr(body, "ln_f") else body.norm
    with torch.no_grad():
        out = plain(torch.tensor([ids]), output_hidden_states=True)
        read = [plain.lm_head(norm(x))[0, -1] for x in out.hidden_states[:-1]]
    return [int(x.argmax()) for x in (*read, out.logits[0, -1])]


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_equal_to_the_tops_of_plain_transformers(load_tiny, checkpoints, shape, backend):
    model = load_tiny(shape, backend)
    found = commitment(logit_lens(model, TEXTS, readout=Readout(top_k=2)))
    alone = [commitment(logit_lens(model, [t], readout=Readout(top_k=1))).item() for t in TEXTS]
    expected = []
    for text in TEXTS:
        top = tops(checkpoints[shape], encode(model, text).ids)
        expected.append(next(i for i in range(4) if set(top[i:]) == {top[-1]}))
    assert found.values[:, 0].tolist() == alone == expected
    only_last = logit_lens(model, TEXTS, layers=3, readout=Readout(top_k=1))
    assert set(commitment(only_last).values.ravel().tolist()) == {3}


def test_tokens_that_decode_alike_are_told_apart(load_tiny, monkeypatch, tmp_path):
    """Parts of a character all decode to one sign."""
    model, readout = load_tiny(fresh=True), Readout(top_k=2)
    expected = commitment(logit_lens(model, TEXTS, readout=readout))
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **options: "\ufffd")
    read = logit_lens(model, TEXTS, readout=readout)
    assert set(read["top_tokens"].values.ravel()) == {"\ufffd"}
    assert (commitment(read) == expected).all() and not (expected == 0).all()
    again = Result.load(read.save(tmp_path / "read.nc"))
    assert commitment(again).identical(commitment(read))


@pytest.mark.parametrize(
    ("kind", "layers", "counted"),
    [
        ("resid", None, [1, 2, 3]),
        ("resid", [2, 3], [2, 3]),
        ("resid", [3, 1, 0], [1, 3]),
        ("resid_pre", None, [1, 2]),
        ("attn_out", None, [0, 1, 2]),
    ],
)
def test_who_comes_first_counts_the_layers_that_were_read(load_tiny, kind, layers, counted):
    model = load_tiny()
    read = fact_trajectories(model, tiny_facts(model, 6), kind=kind, layers=layers)
    first = []
    for name, score in (("bridge", "mean_token_prob"), ("answer", "prob")):
        curves = read[score].sel(tracked=name, position="last")
        for i in range(curves.sizes["example"]):
            curve = {k: curves.isel(example=i).sel(layer=k).item() for k in counted}
            first.append(next(k for k in counted if curve[k] >= max(curve.values()) / 2))
    bridge, answer = np.array(first).reshape(2, -1)
    row = who_comes_first(read).iloc[0]
    assert (row["layer_one"], row["layer_other"]) == (bridge.mean(), answer.mean())
    assert (row["one_first"], row["n"]) == ((bridge < answer).mean(), len(bridge))


def test_bad_input(load_tiny):
    with pytest.raises(ValueError, match="no top tokens through layers; read with readout"):
        commitment(logit_lens(load_tiny(), "w10 w11"))
