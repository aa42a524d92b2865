"""Rows of unequal lengths behind a shared start, against passes over each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mi_hops.model import forward
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.plain import plain_passes
from mi_hops.model.row_cache import RowCache, takes_unequal_rows
from tests.models import SHAPES, cases

START = [1, 7, 30, 22, 5]
TAILS = [[11, 14], [11, 3, 41, 8], [60]]
NEXT = [[12, 13], [80, 6], [71, 2]]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_every_row_gets_what_it_would_get_alone(load_tiny, shape, backend, dtype, plain):
    if plain and (backend, dtype) == ("bridge", "float64"):
        pytest.skip("such a model is not run as bare sums")
    model = load_tiny(shape, backend, dtype)
    assert takes_unequal_rows(model)
    lengths = torch.tensor([len(START) + len(t) for t in TAILS])
    width = int(lengths.max())
    found = []
    with torch.no_grad(), pretransposed_weights(model):
        passes: Any = plain_passes(model) if plain else _by_the_model(model)
        start = RowCache(model, 1, len(START), plain=plain)
        passes(torch.tensor([START]), torch.tensor([4]), start.prompts(0, 1, len(START)))
        cache = RowCache(model, 3, width, 2, plain=plain)
        padded = torch.tensor([t + [0] * (4 - len(t)) for t in TAILS])
        ends = torch.tensor([len(t) - 1 for t in TAILS])
        first = passes(padded[:2], ends[:2], cache.prompts(0, 2, 4, start))
        last = passes(padded[2:, :1], ends[2:], cache.prompts(2, 1, 1, start))
        found.append([*first, *last])
        rows = torch.arange(3)
        for step in range(2):
            slots = torch.arange(width + step + 1)[None]
            seen = (slots < lengths[rows, None]) | (slots >= width)
            view = cache.step(seen, lengths[rows] + step)
            found.append([*passes(torch.tensor(NEXT)[rows, step, None], 0 * rows, view)])
            if step == 0:
                cache.keep(torch.tensor([2, 0]))
                rows = torch.tensor([2, 0])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-11, "rtol": 1e-11}
    for step, (order, logits) in enumerate(zip(((0, 1, 2), (0, 1, 2), (2, 0)), found, strict=True)):
        for row, got in zip(order, logits, strict=True):
            alone = torch.tensor([START + TAILS[row] + NEXT[row][:step]])
            torch.testing.assert_close(got, forward(model, alone)[0, -1], **close)


def _by_the_model(model):
    def run(tokens, last, view):
        return forward(model, tokens, cache=view)[torch.arange(len(tokens)), last]

    return run
