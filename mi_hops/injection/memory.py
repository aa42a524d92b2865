"""Memory injection: add tau * B to an activation while a prompt runs.

Source: *Memory Injections: Correcting Multi-Hop Reasoning Failures during Inference*
(Sakarvadia et al. 2023, arXiv 2309.05605). The published code adds tau * B to one head's output,
which equals adding it at ``attn_out`` of that layer, at every position; that is the default here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from mi_hops.injection.encodings import (
    Encoding,
    Heads,
    Pooling,
    check_encoding,
    encode_memories,
    restrict_to_heads,
)
from mi_hops.model import Hook, HookedModel, hook_name, hooked, require_hooks, require_layers
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.repair import Rows
from mi_hops.text.tokens import (
    Prompt,
    TokenError,
    Where,
    encode,
    find_text,
    last_position,
    positions,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact
    from mi_hops.sweep.interventions import Change

#: Where a memory goes. ``"all"``: every token, the answer's and generated ones included (as
#: published); ``"prompt"``: every token of the prompt; ``"last"``: the prompt's last; ``"first hop"``:
#: the last token of the fact's first-hop phrase; else an index, a slice or a substring of the prompt
#: (all tokens that it covers), or a list of any of these.
Place = Where | Sequence[Where]

#: Hook points of width d_model that a memory can be added to.
KINDS = ("attn_out", "resid_pre", "resid_mid", "resid_post", "mlp_out")

#: Which memory a fact gets: a named one, or a function giving one text or several.
Chooser = Literal["bridge", "answer"] | Callable[["TwoHopFact"], "str | Sequence[str]"]


@dataclass(frozen=True)
class Memory:
    """What is injected for one fact: the state of a `MemoryInjection`.

    Attributes:
        texts: the memories; several are added up.
        vectors: ``[layer, d_model]``, one for each layer of the model.
        first_hop: the phrase whose last token ``"first hop"`` means; may be empty.
    """

    texts: tuple[str, ...]
    vectors: Float[Tensor, "layer d_model"]
    first_hop: str = ""

    def times(self, factor: float) -> Memory:
        """The memory with its own strength; a negative one suppresses what it says.

        So rows of one batch can be corrected, repaired and suppressed at once. Under a relative
        strength only the sign of `factor` counts.
        """
        return replace(self, vectors=factor * self.vectors)


@dataclass(frozen=True)
class MemoryInjection:
    """A memory injection as a `repair.Repair`.

    Args:
        layers: one layer, or several at once.
        strength: tau, the factor of the vector; one for all layers, or one for each.
        encoding, pooling, leading_space: see `encodings.encode_memories`.
        positions: see `Place`. The right places are found in every row, with earlier tokens in a
            cache or not.
        relative: scale the vector to the activation's norm at the place where it is added, so that
            strength 1 means "as long as what is there".
        memory: which text a fact gets; a function may return several, which are added up.
        kind: where it is added, one of `KINDS`.
        heads: add only the part that these heads can write together
            (`encodings.restrict_to_heads`); a list of heads for every layer, or layer -> its heads.
        absent: what to do about a place that a prompt lacks (its first hop, a substring): refuse
            the prompt, or leave that place out and inject at the others; `where` tells which.

    Raises:
        ValueError: an unknown encoding, pooling, kind or `absent`; no layer; a number of strengths
            that does not fit the layers; heads with another kind than attn_out, or for other layers
            than these.
    """

    layers: int | Sequence[int]
    strength: float | Sequence[float]
    encoding: Encoding = "unembed"
    positions: Place = "all"
    relative: bool = False
    memory: Chooser = "bridge"
    kind: str = "attn_out"
    heads: Heads | None = None
    pooling: Pooling = "set"
    leading_space: bool = False
    absent: Literal["raise", "leave"] = "raise"

    def __post_init__(self) -> None:
        check_encoding(self.encoding, self.pooling)
        layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers is {self.layers}; expected one or more, each once")
        one = isinstance(self.strength, int | float)
        strengths = (self.strength,) * len(layers) if one else tuple(self.strength)  # type: ignore[arg-type]
        if len(strengths) != len(layers):
            raise ValueError(f"{len(layers)} layers and {len(strengths)} strengths; give one each")
        if self.kind not in KINDS:
            raise ValueError(f"cannot inject at {self.kind!r}; expected one of {list(KINDS)}")
        if self.heads is not None and self.kind != "attn_out":
            raise ValueError(f"heads write to attn_out, not to {self.kind!r}")
        if self.absent not in ("raise", "leave"):
            raise ValueError(f"absent is {self.absent!r}; expected 'raise' or 'leave'")
        if self.memory not in ("bridge", "answer") and not callable(self.memory):
            raise ValueError(
                f"memory is {self.memory!r}; expected 'bridge', 'answer' or a function of a fact"
            )
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "strength", tuple(float(s) for s in strengths))  # type: ignore[arg-type]
        if isinstance(self.heads, Mapping):
            if set(self.heads) != set(layers):
                raise ValueError(
                    f"heads are given for layers {sorted(self.heads)}, the memory is injected at "
                    f"{list(layers)}; name heads for each of these"
                )
            object.__setattr__(self, "heads", {k: tuple(v) for k, v in self.heads.items()})
        elif self.heads is not None:
            object.__setattr__(self, "heads", tuple(self.heads))

    @property
    def name(self) -> str:
        """Label with encoding, layers and strengths."""
        pairs = [f"L{layer} x{s:g}" for layer, s in zip(self._layers, self._strengths, strict=True)]
        return f"inject {self.encoding} {' '.join(pairs)}"

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self.layers)  # type: ignore[arg-type]

    @property
    def _strengths(self) -> tuple[float, ...]:
        return tuple(self.strength)  # type: ignore[arg-type]

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Memory]:
        """One `Memory` a fact.

        Raises:
            ValueError: a layer or head the model has not got; see also `encode_memories`.
            TokenError: an empty memory, or one longer than the context.
        """
        chosen = [_chosen(self.memory, fact) for fact in facts]
        return self.fit_texts(model, chosen, first_hops=[fact.first_hop for fact in facts])

    def fit_texts(
        self,
        model: HookedModel,
        memories: Sequence[str | Sequence[str]],
        *,
        first_hops: Sequence[str] | None = None,
    ) -> list[Memory]:
        """One `Memory` for each text or group of texts, without facts."""
        require_layers(model, self._layers)
        require_hooks(model, [hook_name(self.kind, layer) for layer in self._layers])
        groups = [(m,) if isinstance(m, str) else tuple(m) for m in memories]
        if empty := [i for i, group in enumerate(groups) if not group]:
            raise TokenError(f"memory {empty[0]} has no text; there is nothing to inject")
        if not groups:
            return []
        phrases = list(first_hops) if first_hops is not None else [""] * len(groups)
        if len(phrases) != len(groups):
            raise ValueError(f"got {len(groups)} memories and {len(phrases)} first hops")
        distinct = list(dict.fromkeys(text for group in groups for text in group))
        vectors = encode_memories(
            model, distinct, self.encoding, pooling=self.pooling, leading_space=self.leading_space
        )
        if self.heads is not None:
            vectors = restrict_to_heads(model, vectors, self.heads)
        at = {text: i for i, text in enumerate(distinct)}
        return [
            Memory(group, vectors[[at[text] for text in group]].sum(0), phrase)
            for group, phrase in zip(groups, phrases, strict=True)
        ]

    def where(self, prompt: Prompt, state: Memory) -> tuple[int, ...]:
        """Positions of a prompt that the memory is added at; none where all places are absent.

        Raises:
            TokenError: a place that the prompt has not got, unless ``absent="leave"``.
        """
        if self.absent == "raise":
            return places(prompt, self.positions, state.first_hop)
        found: set[int] = set()
        for part in _parts(self.positions):
            with suppress(TokenError):
                found.update(places(prompt, part, state.first_hop))
        return tuple(sorted(found))

    def hooks(self, model: HookedModel, states: Sequence[Memory | None], rows: Rows) -> list[Hook]:
        """Hooks that add each row's memory at that row's own positions of this pass.

        Raises:
            TokenError: a prompt without the position asked for, unless ``absent="leave"``.
        """
        if len(states) != len(rows.prompts):
            raise ValueError(f"got {len(states)} states for {len(rows.prompts)} rows")
        cells: list[tuple[int, int]] = []
        for row, (state, prompt) in enumerate(zip(states, rows.prompts, strict=True)):
            if state is None:
                continue
            where = self.where(prompt, state)
            if "all" in _parts(self.positions):
                # What follows the prompt: an answer's tokens, or generated ones.
                where = (*where, *range(len(prompt), rows.offset + rows.width))
            here = sorted({p - rows.offset for p in where})
            cells += [(row, p) for p in here if 0 <= p < rows.width]
        if not cells:
            return []
        made: list[Hook] = []
        for layer, strength in zip(self._layers, self._strengths, strict=True):
            vectors = [states[row].vectors[layer] for row, _ in cells]  # type: ignore[union-attr]
            made.append(
                (
                    hook_name(self.kind, layer),
                    _adder(cells, vectors, strength, relative=self.relative),
                )
            )
        return made


def _chosen(memory: Chooser, fact: TwoHopFact) -> str | Sequence[str]:
    if callable(memory):
        return memory(fact)
    return fact.bridge if memory == "bridge" else fact.answer


def _parts(place: Place) -> list[Where]:
    return list(place) if isinstance(place, Sequence) and not isinstance(place, str) else [place]


def places(prompt: Prompt, place: Place, first_hop: str = "") -> tuple[int, ...]:
    """Positions of a `Place` within the prompt, in order, each once.

    Raises:
        TokenError: a position, substring or first hop that the prompt has not got.
    """
    found: set[int] = set()
    for part in _parts(place):
        if isinstance(part, str) and part in ("all", "prompt"):
            found.update(range(len(prompt)))
        elif isinstance(part, str) and part == "last":
            found.add(prompt.last)
        elif isinstance(part, str) and part == "first hop":
            if not first_hop:
                raise TokenError(
                    "the position 'first hop' needs the phrase; fit the injection to facts, or "
                    "pass first_hops"
                )
            find_text(prompt.text, first_hop)
            found.add(last_position(prompt, first_hop))
        else:
            found.update(positions(prompt, part))
    if not found:
        raise TokenError(f"{place!r} names no position")
    return tuple(sorted(found))


def plain_place(place: Place) -> Any:
    """A place as JSON can hold it; `read_place` is the inverse."""
    if isinstance(place, slice):
        return {"slice": [place.start, place.stop, place.step]}
    return place if isinstance(place, str | int) else [plain_place(part) for part in place]


def read_place(plain: Any) -> Place:
    """The place that `plain_place` wrote."""
    if isinstance(plain, Mapping):
        return slice(*plain["slice"])
    return plain if isinstance(plain, str | int) else [read_place(part) for part in plain]  # type: ignore[misc]


def scaled(vector: Tensor, x: Tensor, strength: float, *, relative: bool) -> Tensor:
    """What is added to activations ``[..., d_model]``: strength * vector, or strength * |x| * unit."""
    wide = wide_dtype(x.dtype)
    vector = vector.to(x.device, wide)
    if relative:
        length = vector.norm(dim=-1, keepdim=True)
        unit = vector / length.clamp_min(torch.finfo(wide).tiny)
        vector = unit * x.to(wide).norm(dim=-1, keepdim=True)
    return (strength * vector).to(x.dtype)


def adding(vector: Tensor, strength: float, *, relative: bool) -> Change:
    """`scaled`, added to all of an activation."""

    def add(x: Tensor) -> Tensor:
        return x + scaled(vector, x, strength, relative=relative)

    return add


def _adder(
    cells: Sequence[tuple[int, int]], vectors: Sequence[Tensor], strength: float, *, relative: bool
) -> Change:
    rows, columns = torch.tensor(list(cells)).T
    stacked = torch.stack(list(vectors))

    def add(x: Tensor) -> Tensor:
        index = (rows.to(x.device), columns.to(x.device))
        out = x.clone()
        out[index] = x[index] + scaled(stacked, x[index], strength, relative=relative)
        return out

    return add


@contextmanager
def inject(
    model: HookedModel,
    memory: str | Sequence[str],
    *,
    layers: int | Sequence[int],
    strength: float | Sequence[float],
    prompts: str | Prompt | Sequence[str | Prompt] | None = None,
    encoding: Encoding = "unembed",
    positions: Place = "all",
    relative: bool = False,
    kind: str = "attn_out",
    heads: Heads | None = None,
    pooling: Pooling = "set",
    leading_space: bool = False,
) -> Iterator[None]:
    """A memory over every call of the model within a ``with`` block; nothing stays behind.

    Args:
        memory: one text, or several whose vectors are added up.
        prompts: the prompts that will be run, padded on the right, as `tokens.encode` makes them
            (BOS first); needed for any other `positions` than ``"all"``. Each row that is run must
            begin with its prompt's tokens. Without prompts the memory is added at every position of
            every row: run prompts of one length, or one.
        layers, strength, encoding, positions, relative, kind, heads, pooling, leading_space: as in
            `MemoryInjection`.

    Raises:
        ValueError: a layer out of range, an unknown encoding, positions that need prompts, or a
            batch that is not these prompts padded on the right.
        TokenError: an empty memory, or a prompt without the position.
        RuntimeError: nothing was run within the block.
    """
    repair = MemoryInjection(
        layers, strength, encoding=encoding, positions=positions, relative=relative, kind=kind,
        heads=heads, pooling=pooling, leading_space=leading_space,
    )  # fmt: skip
    (state,) = repair.fit_texts(model, [memory])
    if prompts is None:
        if _parts(positions) != ["all"]:
            raise ValueError(f"positions {positions!r} are found in prompts; pass prompts=")
        hooks: list[Hook] = [
            (hook_name(kind, layer), adding(state.vectors[layer], s, relative=relative))
            for layer, s in zip(repair._layers, repair._strengths, strict=True)
        ]
        with hooked(model, hooks):
            yield
        return
    given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    known = [encode(model, p) if isinstance(p, str) else p for p in given]
    cells = [(row, p) for row, prompt in enumerate(known) for p in places(prompt, positions)]
    hooks = [
        (
            hook_name(kind, layer),
            _adder(cells, [state.vectors[layer]] * len(cells), s, relative=relative),
        )
        for layer, s in zip(repair._layers, repair._strengths, strict=True)
    ]
    with only_runs_of(model, known), hooked(model, hooks):
        yield


@contextmanager
def only_runs_of(model: HookedModel, prompts: Sequence[Prompt]) -> Iterator[None]:
    """Refuse, within a ``with`` block, batches whose rows do not begin with these prompts.

    Positions counted from the left of a prompt are wrong in a row that is padded on the left.

    Raises:
        ValueError: from the model's call: another number of rows, or a row that begins otherwise.
    """

    def check(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = next(t for t in (*args, *named.values()) if isinstance(t, torch.Tensor))
        rows = tokens.tolist()
        wrong = [
            i
            for i, (row, prompt) in enumerate(zip(rows, prompts, strict=False))
            if tuple(row[: len(prompt)]) != prompt.ids
        ]
        if wrong or len(rows) != len(prompts):
            what = f"row {wrong[0]} does not begin with its prompt" if wrong else "they differ"
            raise ValueError(
                f"the injection was made for {len(prompts)} prompts, the model is run on tokens "
                f"{tuple(tokens.shape)}: {what}. Run the same prompts, BOS first and padded on the "
                "right (mi_hops.sweep.generate takes an injection as a repair, with its cache)"
            )

    handle = model.embed.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
