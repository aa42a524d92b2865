"""Linear estimates of all cells of a block at once: differences of activations times gradients.

The spans of a group of examples make one table of positions. Activations are gathered through it,
``[row, span, token, ...]``, and what is left of the product is one value per row, span and unit (head
or neuron), from which the cells take theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_hops.model import hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.sweep.sites import Cell


@dataclass(frozen=True)
class Places:
    """Where spans lie in each row.

    Attributes:
        index: positions; a span that is shorter than others repeats its last one.
        real: False for these repetitions.
    """

    index: Int[Tensor, "row span token"]
    real: Bool[Tensor, "row span token"]

    @classmethod
    def of(cls, spans: Sequence[Sequence[tuple[int, ...]]]) -> Places:
        """From the positions of each span in each row, ``[row][span]``."""
        width = max(len(span) for row in spans for span in row)
        index = [[[*span, *[span[-1]] * (width - len(span))] for span in row] for row in spans]
        real = [[[t < len(span) for t in range(width)] for span in row] for row in spans]
        return cls(torch.tensor(index), torch.tensor(real))

    def gather(self, activation: Tensor, kind: str) -> Float[Tensor, "row span token *rest"]:
        """An activation of all rows at the spans; of a pattern, ``[..., head, key]`` of the queries."""
        by_token = activation
        if HEAD_AXIS[kind] == 1:
            by_token = rearrange(activation, "row head query key -> row query head key")
        rows = torch.arange(len(self.index), device=activation.device)[:, None, None]
        return by_token[rows, self.index.to(activation.device)]

    def mask(self, width: int) -> Bool[Tensor, "row span pos"]:
        """True at the positions of each span."""
        found = torch.zeros(*self.index.shape[:2], width, dtype=torch.bool)
        return found.scatter_(2, self.index, torch.ones_like(self.real))


def by_place(cells: Sequence[Cell]) -> dict[tuple[str, int], list[int]]:
    """The cells (their numbers) that act at each kind and block."""
    found: dict[tuple[str, int], list[int]] = {}
    for j, cell in enumerate(cells):
        for layer in cell.layers:
            found.setdefault((cell.kind, layer), []).append(j)
    return found


def difference(
    there: Tensor, here: Tensor, kind: str, source: Places, base: Places
) -> Float[Tensor, "row span token *rest"]:
    """Source less base activation at the spans, in float32 or wider; 0 where a span has no token."""
    origin, goal = source.gather(there, kind), base.gather(here, kind)
    if HEAD_AXIS[kind] == 1:  # keys behind the prompts are seen by no query within them
        width = min(origin.shape[-1], goal.shape[-1])
        origin, goal = origin[..., :width], goal[..., :width]
    wide = wide_dtype(goal.dtype)
    moved = origin.to(goal.device, wide) - goal.to(wide)
    moved[~base.real.to(moved.device)] = 0  # padding of shorter spans
    return moved


def contract(
    moved: Float[Tensor, "row span token *rest"],
    gradient: Tensor,
    kind: str,
    base: Places,
    cell: Cell,
) -> Float[Tensor, "row span *unit"]:
    """The product with a gradient, summed over all but row, span and what `cell` names one of."""
    slope = base.gather(gradient, kind)[..., : moved.shape[-1]]
    unit = "" if cell.unit is None else "unit"
    return reduce(moved * slope.to(moved), f"row span token {unit} ... -> row span {unit}", "sum")


def add_cells(
    out: Float[Tensor, "row cell"],
    table: Float[Tensor, "row span *unit"],
    cells: Sequence[Cell],
    members: Sequence[int],
) -> None:
    """Add to the members' estimates what the table has for their span and unit."""
    spans = [cells[j].span for j in members]
    units = [cells[j].unit for j in members]
    found = table[:, spans] if units[0] is None else table[:, spans, units]
    out[:, list(members)] += found.to(out)


def products(
    cells: Sequence[Cell],
    source: Places,
    base: Places,
    there: Mapping[str, Tensor],
    here: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> Float[Tensor, "row cell"]:
    """(source - base) * gradient, summed over what each cell is about, on the CPU.

    Args:
        there, here, gradients: by hook name, ``[row, ...]``.
    """
    slope = next(iter(gradients.values()))
    wide, shape = wide_dtype(slope.dtype), (len(base.index), len(cells))
    out = torch.zeros(shape, dtype=wide, device=slope.device)
    for (kind, layer), members in by_place(cells).items():
        name = hook_name(kind, layer)
        moved = difference(there[name], here[name], kind, source, base)
        table = contract(moved, gradients[name], kind, base, cells[members[0]])
        add_cells(out, table, cells, members)
    return out.cpu()


def require_finite_estimates(change: Tensor) -> None:
    """Refuse estimates that are not finite, with a ValueError."""
    bad = int((~change.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {change.numel()} estimates are not finite; do the activations of the prompts, "
            "or the gradient, overflow in this dtype?"
        )
