"""AtP*: attribution patching with its two known failure modes fixed (Kramár et al. 2024, 2403.00745).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import reduce
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import Hook, HookedModel, capture, hook_name, n_kv_heads
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.gradients import overlaid, run_with_gradients
from mi_hops.patching.products import Places, add_cells, by_place, contract, difference
from mi_hops.sweep.runs import Scored, Sweep, score_and_capture
from mi_hops.sweep.sites import Cell


def atp_star(
    model: HookedModel,
    bases: Sequence[Scored],
    ends: Sequence[Scored],
    places: Places,
    cells: Sequence[Cell],
    *,
    dropout: bool = True,
) -> tuple[Float[Tensor, "row cell"], Float[Tensor, "row"], Float[Tensor, "row"]]:
    """Estimated changes of the metric, and the scores of the bases and of the ends.

    Args:
        bases, ends: the runs that are changed and those that activations come from, aligned token
            by token.
        places: where the spans lie in each row.
        dropout: gradient dropout; costs a forward and a backward pass per block.

    Raises:
        ValueError: queries or keys of a model whose pattern is not the softmax of its scores.
    """
    names = dict.fromkeys(
        hook_name("pattern" if c.kind in ("q", "k") else c.kind, layer)
        for c in cells
        for layer in c.layers
    )
    run = run_with_gradients(model, bases, list(names))
    end, there = score_and_capture(
        model, ends, [hook_name(kind, layer) for kind, layer in by_place(cells)]
    )
    parts = _Parts(model, bases, places, cells, run.activations, there)
    plain = parts.estimate(run.gradients).to(run.scores.dtype)
    if not dropout:
        return plain, run.scores, end[:, 0]
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
    return plain.sign() * size, run.scores, end[:, 0]


@dataclass
class _Parts:
    """The linear forms that gradients are put into, one tensor of differences per kind and block.

    Attributes:
        here, there: activations of the bases and the ends, ``[row, ...]`` by hook name.
    """

    model: HookedModel
    bases: Sequence[Scored]
    places: Places
    cells: Sequence[Cell]
    here: dict[str, Tensor]
    there: dict[str, Tensor]

    def __post_init__(self) -> None:
        self._members = by_place(self.cells)
        self._scores: dict[tuple[str, int], Tensor] = {}
        for kind in ("q", "k"):
            layers = sorted(layer for found, layer in self._members if found == kind)
            if layers:
                self._recompute(kind, layers)
        self._moved = {place: self._difference(*place) for place in self._members}
        self._scores.clear()

    def estimate(self, gradients: dict[str, Tensor]) -> Float[Tensor, "row cell"]:
        """From gradients at the hook points of `here`; on the CPU."""
        slope = next(iter(gradients.values()))
        shape = (len(self.bases), len(self.cells))
        out = torch.zeros(shape, dtype=torch.float64, device=slope.device)
        for (kind, layer), members in self._members.items():
            moved, cell = self._moved[kind, layer], self.cells[members[0]]
            acting = "pattern" if kind in ("q", "k") else kind
            slope = gradients[hook_name(acting, layer)]
            if kind == "k":
                table = self._over_keys(moved, slope, cell)
            else:
                table = contract(moved, slope, acting, self.places, cell)
            add_cells(out, table, self.cells, members)
        return out.cpu()

    def _difference(self, kind: str, layer: int) -> Tensor:
        """Of the activation, ``[row, span, token, ...]``; for queries of the pattern they give.

        A key changes its column in the rows of all queries, so for keys it is ``[row, span, head,
        query, key]``.
        """
        if kind not in ("q", "k"):
            name = hook_name(kind, layer)
            return difference(self.there[name], self.here[name], kind, self.places, self.places)
        before, new = self._scores["base", layer], self._scores[kind, layer]
        pattern = before.softmax(-1)
        if kind == "q":
            return difference(new.softmax(-1), pattern, "pattern", self.places, self.places)
        columns = self.places.mask(before.shape[-1]).to(before.device)
        found = []
        for span in range(columns.shape[1]):
            after = torch.where(columns[:, span, None, None], new, before)
            found.append(after.softmax(-1) - pattern)
        return torch.stack(found, 1)

    def _over_keys(self, moved: Tensor, slope: Tensor, cell: Cell) -> Tensor:
        """``[row, span, key/value head]``, or ``[row, span]`` where all heads are patched at once."""
        table = einsum(
            "row span head query key, row head query key -> row span head", moved, slope.to(moved)
        )
        # A key head has a part in the patterns of all query heads that share it.
        n_keys = 1 if cell.head is None else n_kv_heads(self.model)
        shared = reduce(table, "row span (kv group) -> row span kv", "sum", kv=n_keys)
        return shared[..., 0] if cell.head is None else shared

    def _recompute(self, kind: str, layers: list[int]) -> None:
        """Scores of the base run, and with all queries (or keys) of a block from the source."""
        tokens = Sweep(self.model, self.bases).batch.tokens
        names = {i: f"blocks.{i}.attn.hook_attn_scores" for i in layers}
        base = capture(self.model, tokens, names.values())[0]
        found: dict[int, Tensor] = {}

        def restore(layer: int) -> Callable[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                found[layer] = x
                return base[names[layer]].to(x.device)

            return fn

        hooks: list[Hook] = []
        for i in layers:
            there = self.there[hook_name(kind, i)]
            hooks.append((hook_name(kind, i), partial(overlaid, value=there)))
            hooks.append((names[i], restore(i)))
        with torch.no_grad():
            # The pattern of the topmost block is asked for so that the pass runs through it.
            capture(self.model, tokens, [hook_name("pattern", max(layers))], hooks=hooks)
        for i in layers:
            wide = wide_dtype(found[i].dtype)
            self._scores[kind, i] = found[i].to(wide)
            self._scores["base", i] = base[names[i]].to(wide)
            self._check_softmax(i)

    def _check_softmax(self, layer: int) -> None:
        pattern = self.here[hook_name("pattern", layer)]
        expected = self._scores["base", layer].softmax(-1)
        narrow = torch.finfo(pattern.dtype).bits < 32
        if not torch.allclose(expected, pattern.to(expected.dtype), atol=2e-2 if narrow else 1e-4):
            raise ValueError(
                f"the attention pattern of block {layer} is not the softmax of its scores, so the "
                "attention fix of 'atp*' does not hold for this model; use method='gradient'"
            )
