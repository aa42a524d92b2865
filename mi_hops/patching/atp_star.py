"""AtP*: attribution patching with its two known failures mended (Kramár et al. 2024, 2403.00745).

*Attention.* A changed query or key acts through a softmax, which is flat where it is saturated, so
its gradient misleads. Here the attention row that the patched query (or key) gives is computed
exactly, and only what follows the pattern is linear::

    change ~ sum of (new pattern - pattern) * d metric / d pattern

One forward pass gives the scores of all patched queries: each block's queries are the source's,
and the scores are put back before the softmax, so that later blocks see the base run.

*Cancellation.* A node's effects through different paths may cancel to first order and not in truth.
With gradient dropout the gradient is taken once for every block, with no gradient through what that
block writes, and the sizes are averaged over all blocks but the node's own. The paper's score has no
sign; here it carries that of the estimate without dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mi_hops.model import Hook, LensModel, capture, hook_name, n_kv_heads
from mi_hops.patching.core import captured, taken
from mi_hops.patching.gradients import run_with_gradients
from mi_hops.patching.grid import Cell
from mi_hops.patching.sweep import Scored, Sweep
from mi_hops.tokens import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor


def atp_star(
    model: LensModel,
    bases: Sequence[Scored],
    sources: Sequence[Prompt],
    spans: Sequence[Sequence[tuple[int, ...]]],
    cells: Sequence[Cell],
    *,
    dropout: bool = True,
) -> tuple[Float[Tensor, "row cell"], Float[Tensor, "row"]]:
    """Estimated changes of the metric, and the base scores.

    Args:
        bases, sources: aligned token by token.
        spans: positions of each span in each row, ``[row][span]``.
        dropout: gradient dropout; costs a forward and a backward pass a block.

    Raises:
        ValueError: queries or keys of a model whose pattern is not the softmax of its scores.
    """
    import torch

    names = dict.fromkeys(
        hook_name("pattern" if c.kind in ("q", "k") else c.kind, layer)
        for c in cells
        for layer in c.layers
    )
    run = run_with_gradients(model, bases, list(names))
    parts = _Parts(model, bases, sources, spans, cells, run.activations)
    plain = parts.estimate(run.gradients).to(run.scores.dtype)
    if not dropout:
        return plain, run.scores
    n_layers = int(model.cfg.n_layers)
    lowest = min(min(c.layers) for c in cells)
    total = torch.zeros_like(plain)
    count = torch.zeros(len(cells), dtype=plain.dtype)
    for block in range(n_layers):
        free = torch.tensor([block not in c.layers for c in cells], dtype=plain.dtype)
        # What a block below a node writes has no part in the gradient at the node.
        if block <= lowest:
            found = plain
        else:
            dropped = run_with_gradients(model, bases, list(names), drop_block=block)
            found = parts.estimate(dropped.gradients).to(plain.dtype)
        total += found.abs() * free
        count += free
    size = torch.where(count > 0, total / count.clamp(min=1), plain.abs())
    return plain.sign() * size, run.scores


@dataclass
class _Parts:
    """The linear forms that gradients are put into: one tensor of differences a cell."""

    model: LensModel
    bases: Sequence[Scored]
    sources: Sequence[Prompt]
    spans: Sequence[Sequence[tuple[int, ...]]]
    cells: Sequence[Cell]
    activations: dict[str, Tensor]

    def __post_init__(self) -> None:
        plain = [c for c in self.cells if c.kind not in ("q", "k")]
        self._store = captured(self.model, self.sources, _names(plain)) if plain else {}
        self._scores: dict[tuple[str, int], Tensor] = {}
        for kind in ("q", "k"):
            layers = sorted({i for c in self.cells if c.kind == kind for i in c.layers})
            if layers:
                self._recompute(kind, layers)
        self._forms = [[self._form(row, c) for c in self.cells] for row in range(len(self.bases))]

    def estimate(self, gradients: dict[str, Tensor]) -> Tensor:
        """``[row, cell]`` for gradients at the hook points of `activations`."""
        import torch

        out = torch.zeros(len(self.bases), len(self.cells), dtype=torch.float64)
        for row, forms in enumerate(self._forms):
            for j, parts in enumerate(forms):
                for name, difference, index in parts:
                    slope = gradients[name][row][index].to(difference.dtype)
                    out[row, j] += (difference * slope).sum().cpu()
        return out

    def _form(
        self, row: int, cell: Cell
    ) -> list[tuple[str, Tensor, tuple[slice | list[int], ...]]]:
        """Of each block: hook name, difference there, and which part of the activation it is of."""
        found = []
        for layer in cell.layers:
            if cell.kind in ("q", "k"):
                found.append(self._attention(row, cell, layer))
            else:
                found.append(self._plain(row, cell, layer))
        return found

    def _plain(
        self, row: int, cell: Cell, layer: int
    ) -> tuple[str, Tensor, tuple[slice | list[int], ...]]:
        import torch

        name = hook_name(cell.kind, layer)
        where = list(self.spans[row][cell.span])
        n = len(self.bases[row].prompt)
        every = Cell(cell.kind, cell.layers, cell.span)
        there = taken(self._store[name][row], every, where, n)
        here = taken(self.activations[name][row], every, where, n)
        wide = torch.promote_types(here.dtype, torch.float32)
        difference = there.to(here.device, wide) - here.to(wide)
        unit = cell.head if cell.neuron is None else cell.neuron
        pick = slice(None) if unit is None else slice(unit, unit + 1)
        if cell.kind == "pattern":
            return name, difference[pick], (pick, where, slice(0, n))
        if unit is None:
            return name, difference, (where,)
        return name, difference[:, pick], (where, pick)

    def _attention(
        self, row: int, cell: Cell, layer: int
    ) -> tuple[str, Tensor, tuple[slice | list[int], ...]]:
        where = list(self.spans[row][cell.span])
        heads = _query_heads(self.model, cell)
        before = self._scores["base", layer][row, heads]
        new = self._scores[cell.kind, layer][row, heads]
        name = hook_name("pattern", layer)
        if cell.kind == "q":
            change = new[:, where].softmax(-1) - before[:, where].softmax(-1)
            return name, change, (heads, where)
        after = before.clone()
        after[..., where] = new[..., where]
        return name, after.softmax(-1) - before.softmax(-1), (heads,)

    def _recompute(self, kind: str, layers: list[int]) -> None:
        """Scores of the base run, and with all queries (or keys) of a block from the source."""
        import torch

        tokens = Sweep(self.model, self.bases).batch.tokens
        names = {i: f"blocks.{i}.attn.hook_attn_scores" for i in layers}
        base = capture(self.model, tokens, names.values())[0]
        activations = captured(self.model, self.sources, [hook_name(kind, i) for i in layers])
        found: dict[int, Tensor] = {}

        def put(value: Tensor) -> Callable[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                x = x.clone()
                x[:, : value.shape[1]] = value.to(x.device, x.dtype)
                return x

            return fn

        def restore(layer: int) -> Callable[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                found[layer] = x
                return base[names[layer]].to(x.device)

            return fn

        hooks: list[Hook] = []
        for i in layers:
            hooks.append((hook_name(kind, i), put(activations[hook_name(kind, i)])))
            hooks.append((names[i], restore(i)))
        with torch.no_grad():
            # The pattern of the topmost block is asked for so that the pass runs through it.
            capture(self.model, tokens, [hook_name("pattern", max(layers))], hooks=hooks)
        for i in layers:
            wide = torch.promote_types(found[i].dtype, torch.float32)
            self._scores[kind, i] = found[i].to(wide)
            self._scores["base", i] = base[names[i]].to(wide)
            self._check_softmax(i)

    def _check_softmax(self, layer: int) -> None:
        import torch

        pattern = self.activations[hook_name("pattern", layer)]
        expected = self._scores["base", layer].softmax(-1)
        narrow = torch.finfo(pattern.dtype).bits < 32
        if not torch.allclose(expected, pattern.to(expected.dtype), atol=2e-2 if narrow else 1e-4):
            raise ValueError(
                f"the attention pattern of block {layer} is not the softmax of its scores, so the "
                "attention fix of 'atp*' does not hold for this model; use method='gradient'"
            )


def _names(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(hook_name(c.kind, layer) for c in cells for layer in c.layers))


def _query_heads(model: LensModel, cell: Cell) -> slice:
    """The heads whose pattern a query or key/value head has a part in."""
    if cell.head is None:
        return slice(None)
    shared = int(model.cfg.n_heads) // n_kv_heads(model) if cell.kind == "k" else 1
    return slice(cell.head * shared, (cell.head + 1) * shared)
