"""Linear CKA against its formula in numpy, and by its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import similarity
from mi_hops.model import capture, hook_name
from mi_hops.text.tokens import encode

TEXTS = [f"w{i} w{2 * i} w7 w{i + 20}" for i in range(1, 12)]


def states(model, layer, kind="resid_post"):
    name = hook_name(kind, layer)
    rows = [
        capture(model, torch.tensor([encode(model, text).ids]), [name])[0][name][0, -1]
        for text in TEXTS
    ]
    return torch.stack(rows).double().numpy()


def formula(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


@pytest.mark.slow
def test_equals_the_formula(tiny, load_tiny):
    found = similarity(tiny, TEXTS, batch_size=4)["cka"]
    other = load_tiny("llama32")
    across = similarity(tiny, TEXTS, other, kind="mlp_out")["cka"]
    for i in range(3):
        assert float(found[i, i]) == pytest.approx(1, abs=1e-9)
        for j in range(3):
            expected = formula(states(tiny, i), states(tiny, j))
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-5)
            expected = formula(states(tiny, i, "mlp_out"), states(other, j, "mlp_out"))
            assert float(across[i, j]) == pytest.approx(expected, abs=1e-5)


def test_a_users_hook_sees_no_padding(tiny):
    def centre(x, hook):
        return x - x.mean(1, keepdim=True)

    uneven = [text if i % 2 else f"{text} w3" for i, text in enumerate(TEXTS)]
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", centre)]):
        one, many = (similarity(tiny, uneven, batch_size=size)["cka"] for size in (1, 16))
    assert np.allclose(one, many, atol=1e-6)


def test_all_tokens_and_what_is_refused(tiny):
    every = similarity(tiny, TEXTS, positions=slice(1, None))
    assert every.provenance["n_tokens"] == 4 * len(TEXTS)
    with pytest.raises(ValueError, match="got 2 tokens"):
        similarity(tiny, TEXTS[:2])
    with pytest.raises(ValueError, match="axis of heads"):
        similarity(tiny, TEXTS, kind="z")
    with pytest.raises(ValueError, match="layer 0 is the same"):
        similarity(tiny, [TEXTS[0]] * 4)
