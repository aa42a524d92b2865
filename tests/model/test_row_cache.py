"""Rows of unequal lengths behind a shared start, against passes over each row alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mi_hops.model import forward, hooked_class
from mi_hops.model.plain_attention import plain_attention
from mi_hops.model.row_cache import RowCache, takes_unequal_rows
from tests.models import SHAPES, cases

START = [1, 7, 30, 22, 5]
TAILS = [[9, 14], [11, 3, 41, 8], [60]]
NEXT = [[12, 13], [80, 6], [71, 2]]


@pytest.mark.parametrize("plain", [plain_attention, lambda model: nullcontext()])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_every_row_gets_what_it_would_get_alone(load_tiny, shape, backend, dtype, plain):
    model = load_tiny(shape, backend, dtype)
    assert takes_unequal_rows(model)
    lengths = torch.tensor([len(START) + len(t) for t in TAILS])
    width = int(lengths.max())
    found = []
    with torch.no_grad(), plain(model):
        start = RowCache(model, 1, len(START))
        forward(model, torch.tensor([START]), cache=start.prompts(0, 1, len(START)))
        cache = RowCache(model, 3, width, 2)
        padded = torch.tensor([t + [0] * (4 - len(t)) for t in TAILS])
        first = forward(model, padded[:2], cache=cache.prompts(0, 2, 4, start))
        last = forward(model, padded[2:, :1], cache=cache.prompts(2, 1, 1, start))
        found.append([first[0, 1], first[1, 3], last[0, 0]])
        rows = torch.arange(3)
        for step in range(2):
            slots = torch.arange(width + step + 1)[None]
            seen = (slots < lengths[rows, None]) | (slots >= width)
            fed = torch.tensor(NEXT)[rows, step, None]
            found.append(
                list(forward(model, fed, cache=cache.step(seen, lengths[rows] + step))[:, 0])
            )
            if step == 0:
                cache.keep(torch.tensor([2, 0]))
                rows = torch.tensor([2, 0])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-11, "rtol": 1e-11}
    for step, (order, logits) in enumerate(zip(((0, 1, 2), (0, 1, 2), (2, 0)), found, strict=True)):
        for row, got in zip(order, logits, strict=True):
            alone = torch.tensor([START + TAILS[row] + NEXT[row][:step]])
            torch.testing.assert_close(got, forward(model, alone)[0, -1], **close)


@pytest.mark.skipif(hooked_class() is None, reason="this TransformerLens has no HookedTransformer")
def test_attention_is_the_models_own_again_afterwards(load_tiny):
    model = load_tiny("llama", "hooked")
    with pytest.raises(KeyError), plain_attention(model):
        assert all("forward" in block.attn.__dict__ for block in model.blocks)
        raise KeyError
    assert not any("forward" in block.attn.__dict__ for block in model.blocks)
    model.set_use_attn_result(True)
    try:
        with plain_attention(model):
            assert not any("forward" in block.attn.__dict__ for block in model.blocks)
    finally:
        model.set_use_attn_result(False)
