"""The cells of a sweep: kind x layer x span x head, with the axes they make in a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from mi_hops.model import (
    HookedModel,
    hook_name,
    n_heads_of,
    n_kv_heads,
    require_hooks,
)
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.sweep.pairs import Spans

#: Which heads a sweep visits: each by itself (None), all of a layer at once, or those named.
HeadsLike = Sequence[int] | Literal["all"] | None


@dataclass(frozen=True)
class Cell:
    """One intervention of a sweep, the same in every pair.

    Attributes:
        kind: activation kind.
        layers: blocks it acts in; several for a window.
        span: index into the sweep's spans.
        head: one head, or None for all (or where there are none).
        neuron: one hidden unit of the MLP, or None for all.
    """

    kind: str
    layers: tuple[int, ...]
    span: int
    head: int | None = None
    neuron: int | None = None

    @property
    def unit(self) -> int | None:
        """The head or the neuron, whichever is named."""
        return self.head if self.neuron is None else self.neuron


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep in the order of the result's axes.

    Attributes:
        dims: names of the axes after ``example``.
        coords: labels along them.
        cells: in C order of `shape`.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: dict[str, Any]
    cells: tuple[Cell, ...]

    def hook_names(self) -> list[str]:
        """Hook points whose activations the cells touch."""
        names = {hook_name(c.kind, layer): None for c in self.cells for layer in c.layers}
        return list(names)

    def reshape(self, values: Any) -> Any:
        """``[example, cell, ...]`` as ``[example, *shape, ...]``."""
        return values.reshape(values.shape[0], *self.shape, *values.shape[2:])


def window_of(layer: int, width: int, n_layers: int) -> tuple[int, ...]:
    """`width` blocks centred on `layer`, cut off at the ends of the model (an even one leans down)."""
    return tuple(range(max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2)))


def default_positions(kinds: str | Sequence[str]) -> Literal["each", "all"]:
    """Where no positions are named: all at once for kinds with heads, else each by itself."""
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    return "all" if any(HEAD_AXIS.get(kind) is not None for kind in names) else "each"


def build_grid(
    model: HookedModel,
    spans: Spans,
    *,
    kinds: str | Sequence[str],
    layers: Sequence[int] | None = None,
    heads: HeadsLike = None,
    neurons: Sequence[int] | None = None,
    window: int = 1,
) -> Grid:
    """All combinations, checked against the model.

    Raises:
        ValueError: an unknown kind, a layer, head or neuron that does not exist, heads of a kind
            that has none, kinds whose axes differ, or a window below 1.
        MissingHookError: a hook point the model has not got.
    """
    names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    unknown = [kind for kind in names if kind not in HEAD_AXIS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"kinds {list(names)}: expected one or more of {list(HEAD_AXIS)}, each once"
        )
    n_layers = int(model.cfg.n_layers)
    visited = tuple(range(n_layers) if layers is None else _distinct("layer", layers, n_layers))
    if window < 1:
        raise ValueError(f"window is {window} layers; expected at least 1")
    units, unit_dim = _units(model, names, heads, neurons)
    axes: list[tuple[str, Sequence[Any]]] = []
    if not isinstance(kinds, str):
        axes.append(("kind", names))
    axes.append(("layer", visited))
    if spans.axis:
        axes.append(("position", spans.labels))
    if unit_dim:
        axes.append((unit_dim, units))
    cells = []
    for kind, layer, span, unit in product(names, visited, range(len(spans.labels)), units):
        where = window_of(layer, window, n_layers)
        if unit_dim == "neuron":
            cells.append(Cell(kind, where, span, neuron=unit))
        else:
            cells.append(Cell(kind, where, span, head=unit))
    grid = Grid(
        kinds=names,
        layers=visited,
        dims=tuple(dim for dim, _ in axes),
        shape=tuple(len(labels) for _, labels in axes),
        coords={dim: np.asarray(labels) for dim, labels in axes},
        cells=tuple(cells),
    )
    require_hooks(model, grid.hook_names())
    return grid


def _units(
    model: HookedModel, kinds: tuple[str, ...], heads: HeadsLike, neurons: Sequence[int] | None
) -> tuple[list[int | None], str | None]:
    """What lies on the innermost axis, and its name; ``[None]`` and no name where there is none."""
    with_heads = [kind for kind in kinds if HEAD_AXIS[kind] is not None]
    if heads is not None and heads != "all" and len(with_heads) < len(kinds):
        raise ValueError(
            f"heads were named, but {[k for k in kinds if k not in with_heads]} have no head axis"
        )
    if neurons is not None:
        wrong_kinds = [kind for kind in kinds if kind not in ("mlp_pre", "mlp_post")]
        if wrong_kinds:
            raise ValueError(f"neurons are those of mlp_pre and mlp_post, not of {wrong_kinds}")
        found = _distinct("neuron", neurons, _d_mlp(model))
        return list(found), "neuron"
    if not with_heads or heads == "all":
        return [None], None
    counts = {kind: n_heads_of(model, kind) for kind in with_heads}
    if len(with_heads) < len(kinds) or len(set(counts.values())) > 1:
        raise ValueError(
            f"kinds {list(kinds)} do not share one axis of heads ({counts}, the others have none); "
            "sweep them in calls of their own, or take all heads at once with heads='all'"
        )
    n_heads = next(iter(counts.values()))
    grouped = n_kv_heads(model) < int(model.cfg.n_heads)
    dim = "kv_head" if grouped and with_heads[0] in ("k", "v") else "head"
    return list(_distinct("head", range(n_heads) if heads is None else heads, n_heads)), dim


def _distinct(what: str, given: Sequence[int], n: int) -> Sequence[int]:
    listed = not isinstance(given, int | str)
    if (
        not listed
        or not len(given)
        or not set(given) <= set(range(n))
        or len(set(given)) < len(given)
    ):
        raise ValueError(
            f"{what}s {given!r}: expected a list of one or more of 0..{n - 1}, each once"
        )
    return given


def _d_mlp(model: HookedModel) -> int:
    return int(getattr(model.cfg, "d_mlp", None) or 4 * model.cfg.d_model)


def activation_width(model: HookedModel, kind: str, length: int) -> int:
    """Numbers in one position of an activation kind, in a prompt of `length` tokens."""
    cfg = model.cfg
    if kind == "pattern":
        return int(cfg.n_heads) * length
    if HEAD_AXIS[kind] is not None:
        return n_heads_of(model, kind) * int(cfg.d_head)
    return _d_mlp(model) if kind in ("mlp_pre", "mlp_post") else int(cfg.d_model)
