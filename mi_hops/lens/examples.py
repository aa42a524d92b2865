"""Batches of text turned into what a lens is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from mi_hops.lens.trained import Example, TrainedLens
from mi_hops.lens.vectors import activations, gather
from mi_hops.model import HookedModel, hook_name, hooked, read_out
from mi_hops.text.tokens import Batch


def real_cells(batch: Batch, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
    """(rows, positions) of all real tokens, or of each row's last; never padding."""
    if last_only:
        return torch.arange(len(batch.lengths)), batch.last
    rows, columns = batch.mask.nonzero().T
    return rows, columns


def make_example(
    model: HookedModel,
    lens: TrainedLens,
    batch: Batch,
    cells: tuple[Int[Tensor, "cell"], Int[Tensor, "cell"]],
    *,
    without_heads: bool = False,
) -> Example:
    """Run a batch once and keep what the lens reads, and the output, at some cells.

    Args:
        without_heads: also run it once more for every head of every layer of the lens, with that
            head's z set to 0 at all positions, not at the cell alone: what later layers read of the
            head at earlier tokens is gone as well.
    """
    with torch.no_grad():
        found = gather(model, batch.tokens, cells, kind=lens.kind, layers=lens.layers, final=True)
        assert found.final is not None  # asked for
        output = read_out(model, found.final, norm=False).log_softmax(-1)
        without = None
        if without_heads:
            without = {layer: _without_heads(model, batch, cells, layer) for layer in lens.layers}
    return Example(found.read, output, without)


def examples_of(
    model: HookedModel,
    lens: TrainedLens,
    batch: Batch,
    *,
    last_only: bool = False,
    without_heads: bool = False,
    size: int = 512,
) -> Iterator[tuple[tuple[Int[Tensor, "cell"], Int[Tensor, "cell"]], Example]]:
    """(cells, example) of all real tokens of a batch, or each row's last; `size` cells at a time."""
    rows, columns = real_cells(batch, last_only=last_only)
    for cells in zip(rows.split(size), columns.split(size), strict=True):
        yield cells, make_example(model, lens, batch, cells, without_heads=without_heads)


def _without_heads(
    model: HookedModel, batch: Batch, cells: tuple[Tensor, Tensor], layer: int
) -> Tensor:
    """Logits ``[head, cell, vocab]``."""

    def take_away(head: int, z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    out = []
    for head in range(model.cfg.n_heads):
        with hooked(model, [(hook_name("z", layer), partial(take_away, head))]):
            final = activations(model, batch.tokens, cells, ["final"])["final"]
        out.append(read_out(model, final, norm=False))
    return torch.stack(out)
