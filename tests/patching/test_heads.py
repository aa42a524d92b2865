"""Head scores on made-up patterns, and against TransformerLens's own calls and plain sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.model import forward
from mi_hops.patching.heads import attention_to, composition, head_scores, icl_score
from mi_hops.sweep import Limits, Pairs
from mi_hops.text.tokens import encode
from tests.patching.loops import source

BLOCK = [5, 6, 7, 8, 9, 10]


def test_scores_are_mean_attention_on_the_right_keys(tiny):
    """Sums by explicit loops over a block said twice."""
    row = [1, *BLOCK, *BLOCK]
    found = head_scores(tiny, tokens=torch.tensor([row]))
    text = " ".join(f"w{i - 4}" for i in row[1:])
    assert list(encode(tiny, text).ids) == row
    for layer in range(3):
        pattern = source(tiny, text, "pattern", layer)
        for head in range(4):
            p = pattern[head]
            previous = np.mean([float(p[i, i - 1]) for i in range(1, 13)])
            duplicate = np.mean([float(p[i, i - 6]) for i in range(7, 13)])
            induction = np.mean([float(p[i, i - 5]) for i in range(7, 13)])
            at = {"example": 0, "layer": layer, "head": head}
            for name, expected in (
                ("previous_token", previous),
                ("duplicate_token", duplicate),
                ("induction", induction),
            ):
                assert float(found[name].sel(at)) == pytest.approx(expected, abs=1e-5), name


def test_agrees_with_detect_head(tiny):
    from transformer_lens.head_detector import detect_head

    row = torch.tensor([[1, *BLOCK, *BLOCK]])
    text = " ".join(f"w{i - 4}" for i in row[0, 1:].tolist())
    theirs = detect_head(tiny, text, "previous_token_head")
    ours = head_scores(tiny, tokens=row)["previous_token"][0]
    assert np.allclose(theirs * 13 / 12, ours, atol=1e-5)


def test_random_blocks_are_seeded(tiny):
    one, two, other = (head_scores(tiny, length=6, samples=2, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one.values, two.values)
    assert not np.allclose(one.values, other.values)
    assert one["induction"].dims == ("example", "layer", "head")
    assert one.plot().data[0].z.shape == (3, 4)


def test_attention_to_a_span(tiny):
    texts = ["w5 w6 w7 w8", "w9 w10 w11 w12 w13 w14"]
    found = attention_to(tiny, texts, ["w6 w7", "w10 w11"])
    for i, (text, keys) in enumerate(zip(texts, ([2, 3], [2, 3]), strict=True)):
        for layer in range(3):
            pattern = source(tiny, text, "pattern", layer)
            expected = pattern[:, -1, keys].sum(-1)
            assert np.allclose(found["attention"][i, layer], expected, atol=1e-6)
    early = attention_to(tiny, texts[0], slice(0, None), query="w6")
    assert np.allclose(early.values, 1, atol=1e-5)
    named = attention_to(tiny, Pairs(texts, labels=["a", "b"]), ["w6", "w10"])
    assert list(named["example"].values) == ["a", "b"]
    with pytest.raises(ValueError, match="cannot be attended"):
        attention_to(tiny, texts[0], "w8", query="w6")


@pytest.mark.parametrize("mode", ["q", "k", "v"])
def test_composition_is_the_norm_of_the_product(load_tiny, mode):
    for shape in ("gpt2", "llama"):
        results = []
        for backend in ("hooked", "bridge"):
            try:
                model = load_tiny(shape, backend)
            except pytest.skip.Exception:
                continue
            results.append(composition(model, mode))
        found = results[0]["composition"]
        assert np.isnan(found.sel(sender="L1H0", receiver="L1H2"))
        attn = [model.blocks[i].attn for i in (0, 2)]

        def weight(block, name, head, attn=attn):
            w = getattr(attn[block], f"W_{name}")
            return w[head * w.shape[0] // 4].detach()

        ov = [weight(b, "V", h) @ weight(b, "O", h) for b, h in ((0, 1), (1, 3))]
        qk = weight(1, "Q", 3) @ weight(1, "K", 3).T
        right = {"q": qk, "k": qk.T, "v": ov[1]}[mode]
        expected = (ov[0] @ right).norm() / ov[0].norm() / right.norm()
        got = float(found.sel(sender="L0H1", receiver="L2H3"))
        assert got == pytest.approx(float(expected), abs=1e-4)
        assert all(np.allclose(found, r["composition"], atol=1e-4, equal_nan=True) for r in results)


def test_composition_needs_float32(load_tiny):
    with pytest.raises(ValueError, match=r"bfloat16.*needs float32"):
        composition(load_tiny("llama", "bridge", dtype="bfloat16"), "q")


def test_icl_score_is_a_difference_of_losses(tiny):
    texts = [" ".join(f"w{(7 * i + j) % 60}" for i in range(20)) for j in range(3)]
    found = icl_score(tiny, texts, early=5, late=15, width=2, limits=Limits(batch_size=2))
    for i, text in enumerate(texts):
        ids = torch.tensor([encode(tiny, text).ids])
        losses = -forward(tiny, ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        by_position = {p: float(losses[p - 1]) for p in range(1, 20)}
        late, early = (
            np.mean([by_position[15], by_position[14]]),
            np.mean([by_position[5], by_position[4]]),
        )
        assert float(found["icl"][i]) == pytest.approx(late - early, abs=1e-5)
    with pytest.raises(ValueError, match="no token 50"):
        icl_score(tiny, texts, early=5, late=50)
    with pytest.raises(ValueError, match="width <= early"):
        icl_score(tiny, texts, early=5, late=5)


def test_refuses(tiny):
    with pytest.raises(ValueError, match="expected 'q', 'k' or 'v'"):
        composition(tiny, "Q")
    for options in ({"length": 40}, {"tokens": torch.tensor([1, 5, 6])}):
        with pytest.raises(ValueError, match="rows of 2 to 64"):
            head_scores(tiny, **options)
    with pytest.raises(ValueError, match="no query of sequence 0"):
        head_scores(tiny, tokens=torch.tensor([[1, 5, 6, 7]]))


def test_a_float64_model_is_read_in_float64(load_tiny):
    model = load_tiny("gpt2", dtype="float64")
    assert head_scores(model, samples=1, length=6)["induction"].dtype == np.float64
    looked = attention_to(model, "w1 w2 w3", "w2")["attention"]
    assert looked.dtype == np.float64
    pattern = source(model, "w1 w2 w3", "pattern", 1)[:, -1, 2]
    assert looked[0, 1].values == pytest.approx(pattern.numpy(), abs=1e-12)
