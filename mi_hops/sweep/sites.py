"""Where a sweep acts: kinds of activation x layers x positions x heads, as cells of a labelled grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Integral
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HOOK_NAMES, HookedModel, hook_name, n_heads_of, n_kv_heads, require_hooks
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.text.tokens import Prompt, TokenError, Where, align, positions

#: Kinds of activation. ``"result"`` is what each head writes, ``z @ W_O``: a change of it is the same
#: change of its ``z``, so it needs no ``use_attn_result``.
Kind = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_pre",
    "mlp_post",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "result",
]

#: ``"denoise"`` puts clean activations into the corrupted run, ``"noise"`` corrupted into the clean.
Direction = Literal["denoise", "noise"]

#: A span in the two prompts of a pair: one position for both, or (taken from, put at).
SpanLike = Where | tuple[Where, Where]

#: Which positions a sweep visits. ``"each"`` token by itself; ``"all"`` of the prompt at once; one
#: position (index, slice or substring); several; or roles by name, each a span for all pairs or a
#: list with one span per pair.
PositionsLike = Where | Sequence[Where] | Mapping[str, SpanLike | Sequence[SpanLike]]

Spans = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, repr=False)
class Sites:
    """Where to intervene. A kind, a hook name or a list of them is accepted too.

    Args:
        kinds: one `Kind`, or several that share their axes (then the result has an axis ``kind``).
            TransformerLens's hook names (`utils.get_act_name`) are kinds too, and name their layer.
        layers: a block or several, from 0; default all.
        positions: where (see `PositionsLike`); default every token by itself, for kinds with heads
            all tokens at once. A pair ``(from, to)`` takes from one place of the source prompt and
            puts at another of the base prompt. For ``pattern`` positions are those of the query.
        heads: of kinds with heads: each by itself (default), ``"all"`` at once, or those named.
            Key/value heads are counted as they are (axis ``kv_head`` where there are fewer of them).
        neurons: of mlp_pre and mlp_post: hidden units one by one; default all at once.
        window: blocks taken together, centred on the layer and cut off at the ends of the model.

    Examples:
        >>> import mi_hops
        >>> mi_hops.Sites("z", layers=[2, 3], positions={"last": -1}).kinds
        ('z',)
        >>> mi_hops.Sites("blocks.3.hook_resid_pre").layers
        (3,)
    """

    kinds: Kind | str | Sequence[Kind | str] = "resid_pre"
    layers: int | Sequence[int] | None = None
    positions: PositionsLike | None = None
    heads: int | Sequence[int] | Literal["all"] | None = None
    neurons: int | Sequence[int] | None = None
    window: int = 1
    several: bool = field(init=False)

    def __post_init__(self) -> None:
        given = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
        parsed = [_parsed(name) for name in given]
        kinds = tuple(dict.fromkeys(kind for kind, _ in parsed))
        named = tuple(dict.fromkeys(layer for _, layer in parsed))
        layers = _listed(self.layers)
        if named not in ((), (None,)):
            every = set(product(kinds, named))
            if (
                layers is not None
                or None in named
                or set(parsed) != every
                or len(parsed) > len(every)
            ):
                raise ValueError(
                    f"hook names {list(given)} name their layers; give each kind at each of them, and "
                    "no layers beside, or kinds and layers"
                )
            layers = tuple(layer for layer in named if layer is not None)
        elif len(kinds) < len(parsed) or not kinds:
            raise ValueError(f"kinds {list(given)}: expected one or more, each once")
        if self.window < 1:
            raise ValueError(f"window is {self.window} layers; expected at least 1")
        several = not isinstance(self.kinds, str) and (len(kinds) > 1 or named in ((), (None,)))
        units = {"heads": _listed(self.heads), "neurons": _listed(self.neurons)}
        found = {"kinds": kinds, "layers": layers, "several": several, **units}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        told = []
        for name in ("kinds", "layers", "positions", "heads", "neurons", "window"):
            text = repr(getattr(self, name))
            told.append(f"{name}={text if len(text) <= 200 else text[:200] + '...'}")
        return f"Sites({', '.join(told)})"

    @classmethod
    def of(cls, given: SitesLike) -> Sites:
        """Sites as they are, or everywhere in the kinds or at the hook names given."""
        return given if isinstance(given, Sites) else cls(given)

    def grid(
        self,
        model: HookedModel,
        bases: Sequence[Prompt],
        sources: Sequence[Prompt] | None = None,
    ) -> Grid:
        """All cells in these prompts, checked against the model.

        Args:
            bases: prompts that are changed.
            sources: prompts that activations come from; default `bases`.

        Raises:
            ValueError: a layer, head or neuron that does not exist, heads of a kind that has none,
                kinds whose axes differ, no positions, or a list of another length than the pairs.
            TokenError: spans or prompts that do not correspond, or a span that is absent.
            MissingHookError: a hook point the model does not have.
        """
        n_layers = int(model.cfg.n_layers)
        kinds: tuple[str, ...] = self.kinds  # type: ignore[assignment]
        acting = tuple("z" if kind == "result" else kind for kind in kinds)
        layers = range(n_layers) if self.layers is None else self.layers
        layers = _distinct("layer", layers, n_layers)
        units, unit_dim = self._units(model, acting)
        where = self.positions
        if where is None:
            where = "all" if any(HEAD_AXIS[kind] is not None for kind in acting) else "each"
        labels, axis, taken, put = _resolved(where, sources or bases, bases)
        if "pattern" in acting and sources is not None:  # their keys correspond token by token
            for source, base in zip(sources, bases, strict=True):
                align(source, base)
        coords: dict[str, Any] = {"kind": kinds} if self.several else {}
        coords["layer"] = layers
        if axis:
            coords["position"] = labels
        if unit_dim:
            coords[unit_dim] = units
        name = "neuron" if unit_dim == "neuron" else "head"
        cells = tuple(
            Cell(kind, window_of(layer, self.window, n_layers), span, **{name: unit})
            for kind, layer, span, unit in product(acting, layers, range(len(labels)), units)
        )
        coords = {dim: np.asarray(found) for dim, found in coords.items()}
        grid = Grid(kinds, coords, cells, labels, axis, taken, put)
        require_hooks(model, grid.hook_names())
        return grid

    def _units(
        self, model: HookedModel, kinds: Sequence[str]
    ) -> tuple[Sequence[int | None], str | None]:
        """What lies on the innermost axis, and its name; ``[None]`` and no name where nothing does."""
        heads, neurons = self.heads, self.neurons
        plain = [kind for kind in kinds if HEAD_AXIS[kind] is None]
        if heads is not None and heads != "all" and plain:
            raise ValueError(f"heads were named, but {plain} have no head axis")
        if neurons is not None:
            others = [kind for kind in kinds if kind not in ("mlp_pre", "mlp_post")]
            if others:
                raise ValueError(f"neurons are those of mlp_pre and mlp_post, not of {others}")
            return _distinct("neuron", neurons, _d_mlp(model)), "neuron"
        if len(plain) == len(kinds) or heads == "all":
            return [None], None
        counts = {kind: n_heads_of(model, kind) for kind in kinds if kind not in plain}
        if plain or len(set(counts.values())) > 1:
            raise ValueError(
                f"kinds {list(kinds)} do not share one axis of heads ({counts}, the others have "
                "none); sweep them in calls of their own, or take all heads with heads='all'"
            )
        n_heads = next(iter(counts.values()))
        grouped = n_kv_heads(model) < int(model.cfg.n_heads) and kinds[0] in ("k", "v")
        chosen = _distinct("head", range(n_heads) if heads is None else heads, n_heads)
        return chosen, "kv_head" if grouped else "head"


#: Sites, or kinds or hook names to visit everywhere.
SitesLike = Sites | Kind | str | Sequence[Kind | str]

_KIND_OF = {name.removeprefix("blocks.{}."): kind for kind, name in HOOK_NAMES.items()} | {
    "attn.hook_result": "result"
}


def _parsed(name: str) -> tuple[str, int | None]:
    """Kind and layer of a kind or a hook name."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name)
    assert match is not None
    kind = _KIND_OF.get(match[2], match[2] if match[1] is None else "")
    if kind not in (*HEAD_AXIS, "result"):
        raise ValueError(
            f"cannot act on {name!r}; expected one or more of {[*HEAD_AXIS, 'result']}, or their "
            "hook names, such as 'blocks.3.hook_resid_pre'"
        )
    return kind, None if match[1] is None else int(match[1])


def _listed(given: Any) -> Any:
    return (int(given),) if isinstance(given, Integral) else given


def _distinct(what: str, given: Any, n: int) -> Sequence[int]:
    found = [] if isinstance(given, str) else list(given)
    if not found or not set(found) <= set(range(n)) or len(set(found)) < len(found):
        raise ValueError(
            f"{what}s {given!r}: expected a list of one or more of 0..{n - 1}, each once"
        )
    return [int(i) for i in found]


def window_of(layer: int, width: int, n_layers: int) -> tuple[int, ...]:
    """`width` blocks centred on `layer`, cut off at the ends of the model (an even one leans down)."""
    return tuple(range(max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2)))


# -- the grid ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One intervention of a sweep, the same in every pair.

    Attributes:
        kind: activation kind, a key of `HEAD_AXIS`.
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
    """All cells of a sweep in the order of the result's axes, and where they lie in the prompts.

    Attributes:
        kinds: as they were named.
        coords: dimension -> labels along it, for the axes after ``example``.
        cells: in C order of the axes.
        labels: of the spans: token index, role, or the text that named it.
        has_positions: whether the spans make an axis; a single span makes none.
        source: positions to take from, ``[pair][span]``.
        base: positions to put at, ``[pair][span]``, of the same lengths.
    """

    kinds: tuple[str, ...]
    coords: dict[str, Any]
    cells: tuple[Cell, ...]
    labels: tuple[int | str, ...]
    has_positions: bool
    source: Spans
    base: Spans

    @property
    def acting(self) -> list[str]:
        """The kinds of the cells."""
        return list(dict.fromkeys(cell.kind for cell in self.cells))

    def hook_names(self) -> list[str]:
        """Hook points whose activations the cells touch."""
        names = (hook_name(cell.kind, layer) for cell in self.cells for layer in cell.layers)
        return list(dict.fromkeys(names))

    def reshape(
        self, values: Float[Tensor, "example cell *rest"]
    ) -> Float[Tensor, "example *axes_rest"]:
        """Values of the cells on the axes of the grid."""
        return values.unflatten(1, [len(labels) for labels in self.coords.values()])

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[str]] | None:
        """The base prompts' token at each span ``[pair][span]``; None where a span has several."""
        if not self.has_positions or any(len(span) != 1 for pair in self.base for span in pair):
            return None
        return [
            [prompt.labels[span[0]] for span in pair]
            for prompt, pair in zip(prompts, self.base, strict=True)
        ]


def _resolved(
    given: PositionsLike, sources: Sequence[Prompt], bases: Sequence[Prompt]
) -> tuple[tuple[int | str, ...], bool, Spans, Spans]:
    """Labels of the spans, whether they make an axis, and where they lie in every pair."""
    if isinstance(given, str) and given in ("each", "all"):
        for source, base in zip(sources, bases, strict=True):
            align(source, base)
        if given == "all":
            whole = tuple((tuple(range(len(p))),) for p in bases)
            return ("all",), False, whole, whole
        lengths = sorted({len(p) for p in bases})
        if len(lengths) > 1:
            raise TokenError(
                f"the prompts have {lengths} tokens, so their positions make no common axis; name "
                "positions by role, e.g. positions={'last': -1, 'subject': [...one per pair...]}"
            )
        each = (tuple((i,) for i in range(lengths[0])),) * len(bases)
        return tuple(range(lengths[0])), True, each, each
    single = isinstance(given, Integral | str | slice)
    named: dict[Any, Any]
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        items: list[Any] = [given] if single else list(given)  # type: ignore[arg-type]
        named = {_label(where): where for where in items}
        if len(named) < len(items):
            raise ValueError(f"positions {items} name one place twice")
    if not named:
        raise ValueError("no positions were given; pass 'each', 'all', or at least one position")
    taken: list[list[tuple[int, ...]]] = [[] for _ in bases]
    put: list[list[tuple[int, ...]]] = [[] for _ in bases]
    for name, spec in named.items():
        if isinstance(spec, np.ndarray | Tensor):
            spec = spec.tolist()
        if isinstance(spec, list) and len(spec) != len(bases):
            raise ValueError(
                f"position {name!r} lists {len(spec)} spans for {len(bases)} pairs; give one each"
            )
        for i, (source, base) in enumerate(zip(sources, bases, strict=True)):
            where = spec[i] if isinstance(spec, list) else spec
            origin, goal = where if isinstance(where, tuple) else (where, where)
            taken[i].append(positions(source, origin))
            put[i].append(positions(base, goal))
            if len(taken[i][-1]) != len(put[i][-1]):
                raise TokenError(
                    f"position {name!r} covers {len(taken[i][-1])} token(s) of {source.text!r} and "
                    f"{len(put[i][-1])} of {base.text!r}; patch the same number of tokens, e.g. the "
                    "last one of each span"
                )
    labels = list(named)
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        labels = [str(label) for label in labels]
    return tuple(labels), not single, tuple(map(tuple, taken)), tuple(map(tuple, put))


def _label(where: Where) -> int | str:
    if isinstance(where, slice):
        bounds = (where.start, where.stop, where.step)
        return ":".join("" if b is None else str(b) for b in bounds).removesuffix(":")
    return where if isinstance(where, str) else int(where)


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
