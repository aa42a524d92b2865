"""Memory injection: add tau * B to an activation while a prompt runs.

Source: *Memory Injections: Correcting Multi-Hop Reasoning Failures during Inference*
(Sakarvadia et al. 2023, arXiv 2309.05605). The published code adds tau * B to one head's output,
which equals adding it at ``attn_out`` of that layer, at every position; that is the default here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain
from numbers import Integral, Real
from operator import attrgetter
from typing import Any, Literal

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.encodings import (
    Encoder,
    EncoderLike,
    encode_each,
    restrict_to_heads,
)
from mi_hops.injection.place import Absent, Place, Positions, Stream, adding, adding_at
from mi_hops.model import (
    Hook,
    HookedModel,
    hook_name,
    hooked,
    nothing_stays,
    plain_hooks,
    require_hooks,
    require_layers,
)
from mi_hops.model.numeric import widen
from mi_hops.model.types import PlainHook
from mi_hops.sweep.pairs import Texts, as_prompts
from mi_hops.sweep.repair import LateHooks, Rows
from mi_hops.text.tokens import Prompt, TokenError

#: What is injected: a text, several that are added up, or a vector of one's own: ``[d_model]`` for
#: every layer, ``[layer, d_model]`` of all the model's layers, or layer -> ``[d_model]``.
MemoryLike = str | Sequence[str] | Tensor | Mapping[int, Tensor]

#: Which memory a fact gets: a named one, or what a function of the fact returns.
Chooser = Literal["bridge", "answer"] | Callable[[TwoHopFact], MemoryLike]


@dataclass(frozen=True, repr=False)
class Memory:
    """What is injected for one fact: the state of a `MemoryInjection`.

    Attributes:
        texts: the memories, which are added up; none for a vector of one's own.
        vectors: ``[layer, d_model]``, one for each layer of the model.
        first_hop: the phrase whose last token ``"first hop"`` means; may be empty.
    """

    texts: tuple[str, ...]
    vectors: Float[Tensor, "layer d_model"]
    first_hop: str = ""

    def __repr__(self) -> str:
        what = " + ".join(map(repr, self.texts))[:200] or "a vector"
        return f"Memory({what}, {self.vectors.shape[0]} layers of {self.vectors.shape[1]})"

    def times(self, factor: float) -> Memory:
        """The memory with its own strength; a negative one suppresses it.

        So rows of one batch can be corrected, repaired and suppressed at once. Under a relative
        strength only the sign of `factor` counts.
        """
        return replace(self, vectors=factor * self.vectors)


@dataclass(frozen=True)
class MemoryInjection:
    """A memory injection as a `Repair`, with its own memory for each row of a batch.

    Args:
        layers: one layer, or several at once.
        strength: tau, the factor of the vector; one for all layers, or one for each.
        encoding: how a text becomes vectors: the name of an encoding, or an `Encoder`.
        positions: where (see `place.Positions`); found in every row by itself, with earlier tokens in
            a cache or not.
        memory: which memory a fact gets: its bridge, its answer, or what a function of the fact
            returns (see `MemoryLike`).
        kind: the activation it is added to (see `place.Stream`).
        relative: scale the vector to the activation's norm where it is added, so that strength 1
            means "as long as what is there".
        absent: what to do if a prompt lacks a position (its first hop, a substring): refuse the
            prompt, or leave that position out and inject at the others; `where` says which.

    Raises:
        ValueError: an unknown encoding, kind or `absent`; no layer; a strength that is not finite; a
            number of strengths that does not fit the layers; heads with another kind than attn_out,
            or not for all of these layers.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:2]
        >>> repair = mi_hops.MemoryInjection(layers=1, strength=4.0, positions="first hop")
        >>> states = repair.fit(model, facts)
        >>> said = mi_hops.generate(model, [f.prompt() for f in facts], repair=repair, states=states)
    """

    layers: int | Sequence[int]
    strength: float | Sequence[float]
    _: KW_ONLY
    encoding: EncoderLike = "unembed"
    positions: Positions = "everywhere"
    memory: Chooser = "bridge"
    kind: Stream = "attn_out"
    relative: bool = False
    absent: Absent = "raise"

    def __post_init__(self) -> None:
        where: Any = (self.layers,) if isinstance(self.layers, Integral) else self.layers
        layers = tuple(where)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers is {self.layers}; expected one or more, each once")
        given: Any = self.strength
        strengths = (float(given),) * len(layers) if isinstance(given, Real) else tuple(given)
        if len(strengths) != len(layers):
            raise ValueError(f"{len(layers)} layers and {len(strengths)} strengths; give one each")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "strength", strengths)
        if self.absent not in ("raise", "leave"):
            raise ValueError(f"absent is {self.absent!r}; expected 'raise' or 'leave'")
        if self.memory not in ("bridge", "answer") and not callable(self.memory):
            raise ValueError(
                f"memory is {self.memory!r}; expected 'bridge', 'answer' or a function of a fact"
            )
        require_fit(self.encoder, self.place, layers, strengths)

    @property
    def name(self) -> str:
        """Label with encoding, layers and strengths."""
        pairs = [f"L{layer} x{s:g}" for layer, s in self.strengths.items()]
        return f"inject {self.encoder.name} {' '.join(pairs)}"

    @property
    def strengths(self) -> dict[int, float]:
        """Layer -> strength."""
        return dict(zip(self.layers, self.strength, strict=True))  # type: ignore[arg-type]

    @property
    def encoder(self) -> Encoder:
        """How a text becomes vectors."""
        return Encoder.of(self.encoding)

    @property
    def place(self) -> Place:
        """Where they are added."""
        return Place(self.positions, self.kind, self.relative)

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Memory]:
        """One `Memory` per fact.

        Raises:
            ValueError: a layer or head that the model does not have; see also `fit_memories`.
            TokenError: an empty memory, or one longer than the context.
        """
        choose = self.memory if callable(self.memory) else attrgetter(self.memory)
        first_hops = [fact.first_hop for fact in facts]
        return self.fit_memories(model, [choose(fact) for fact in facts], first_hops=first_hops)

    def fit_memories(
        self,
        model: HookedModel,
        memories: Sequence[MemoryLike],
        *,
        first_hops: Sequence[str] | None = None,
    ) -> list[Memory]:
        """One `Memory` per text, group of texts or vector, without facts.

        Args:
            first_hops: the phrases that ``"first hop"`` means, one per memory.

        Raises:
            ValueError: see `fit`; a vector of another shape than `MemoryLike` says, or not finite.
            TokenError: see `fit`.
        """
        require_layers(model, self.strengths)
        require_hooks(model, [hook_name(self.kind, layer) for layer in self.strengths])
        phrases = [""] * len(memories) if first_hops is None else list(first_hops)
        if len(phrases) != len(memories):
            raise ValueError(f"got {len(memories)} memories and {len(phrases)} first hops")
        groups = [_texts(i, memory) for i, memory in enumerate(memories)]
        each = encode_each(model, chain.from_iterable(groups), self.encoder)
        vectors = [
            torch.stack([each[t] for t in group]).sum(0) if group else self._own(model, memory)
            for group, memory in zip(groups, memories, strict=True)
        ]
        return [*map(Memory, groups, vectors, phrases)]

    def _own(self, model: HookedModel, memory: Any) -> Float[Tensor, "layer d_model"]:
        """A vector of the caller's, for every layer of the model."""
        n_layers, width = int(model.cfg.n_layers), int(model.cfg.d_model)
        if isinstance(memory, Mapping):
            if missing := [layer for layer in self.strengths if layer not in memory]:
                raise ValueError(f"the memory has no vector for layers {missing}, injected at")
            rows = {layer: _floats(memory[layer], [(width,)]) for layer in self.strengths}
            vectors = next(iter(rows.values())).new_zeros(n_layers, width)
            for layer, row in rows.items():
                vectors[layer] = row.to(vectors)
        else:
            vectors = _floats(memory, [(width,), (n_layers, width)])
            if vectors.ndim == 1:
                vectors = repeat(vectors, "d -> layer d", layer=n_layers)
        heads = self.encoder.heads
        return vectors if heads is None else restrict_to_heads(model, vectors, heads)

    def where(self, prompt: Prompt, state: Memory) -> tuple[int, ...]:
        """Positions of a prompt at which the memory is added; none if all are absent.

        Raises:
            TokenError: a place that the prompt does not have, unless ``absent="leave"``.
        """
        return self.place.find(prompt, state.first_hop, absent=self.absent)

    def hooks(self, model: HookedModel, states: Sequence[Memory | None], rows: Rows) -> list[Hook]:
        """Hooks that add each row's memory at that row's own positions of this pass.

        Raises:
            TokenError: a prompt without the position asked for, unless ``absent="leave"``.
        """
        if len(states) != len(rows.prompts):
            raise ValueError(f"got {len(states)} states for {len(rows.prompts)} rows")
        cells: dict[tuple[int, int], Tensor] = {}
        for row, (state, prompt) in enumerate(zip(states, rows.prompts, strict=True)):
            if state is not None:
                where = set(self.where(prompt, state))
                if self.place.everywhere:
                    where.update(range(len(prompt), rows.offset + rows.width))
                here = [p - rows.offset for p in sorted(where)]
                cells |= {(row, p): state.vectors for p in here if 0 <= p < rows.width}
        if not cells:
            return []
        made = LateHooks([], rows.offset + min(position for _, position in cells))
        for layer, strength in self.strengths.items():
            vectors = {cell: every[layer] for cell, every in cells.items()}
            add = adding_at(vectors, strength, relative=self.relative, n_rows=len(states))
            made.append((hook_name(self.kind, layer), add))
        return made


def require_fit(
    encoder: Encoder, place: Place, layers: Iterable[int], strengths: Iterable[float]
) -> None:
    """Refuse strengths that are no numbers, and heads that do not write where a memory is added.

    Raises:
        ValueError: as said; heads with another kind than attn_out, or not for all of the layers.
    """
    if wrong := [s for s in strengths if not math.isfinite(s)]:
        raise ValueError(f"strengths {wrong}: expected finite numbers")
    if encoder.heads is not None and place.kind != "attn_out":
        raise ValueError(f"heads write to attn_out, not to {place.kind!r}")
    if isinstance(encoder.heads, Mapping) and (missing := set(layers) - set(encoder.heads)):
        raise ValueError(
            f"heads are given for layers {sorted(encoder.heads)}, and none for layers "
            f"{sorted(missing)}, which are injected; name heads for each of these"
        )


def _texts(i: int, memory: MemoryLike) -> tuple[str, ...]:
    """The texts of a memory; none of a vector."""
    if isinstance(memory, str):
        return (memory,)
    if not isinstance(memory, list | tuple):
        return ()
    if not memory:
        raise TokenError(f"memory {i} has no text; there is nothing to inject")
    return tuple(memory) if isinstance(memory[0], str) else ()


def _floats(vector: Any, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    found = torch.as_tensor(vector)
    if tuple(found.shape) not in shapes or not found.is_floating_point():
        raise ValueError(
            f"a memory of one's own is floating-point numbers of shape {' or '.join(map(str, shapes))}, "
            f"or layer -> vector; got {found.dtype} of shape {tuple(found.shape)}"
        )
    if not found.isfinite().all():
        raise ValueError("the memory's vector holds values that are not finite")
    return widen(found.detach())


# -- runs of one's own ----------------------------------------------------------------------------


class Injection(list[PlainHook]):
    """What `inject` returns: hooks for TransformerLens, and a context that attaches them."""

    def __init__(self, model: HookedModel, hooks: Sequence[Hook], prompts: list[Prompt]) -> None:
        super().__init__(plain_hooks(model, hooks))
        self._given, self._stack = (model, hooks, prompts), ExitStack()

    def __repr__(self) -> str:
        return f"Injection of {len(self)} hooks: {', '.join(str(name) for name, _ in self)[:200]}"

    def __enter__(self) -> Injection:
        self._stack.enter_context(_attached(*self._given))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def inject(
    model: HookedModel,
    memory: MemoryLike,
    *,
    layers: int | Sequence[int] | None = None,
    strength: float | Sequence[float] = 1.0,
    positions: Positions = "everywhere",
    kind: Stream = "attn_out",
    relative: bool = False,
    encoding: EncoderLike = "unembed",
    prompts: Texts | None = None,
) -> Injection:
    """Inject a memory, or your own vector, into every run of the model within a ``with`` block.

    The same object is a list of TransformerLens's hooks: ``model.run_with_hooks(tokens,
    fwd_hooks=inject(...))`` or ``model.hooks(fwd_hooks=inject(...))``. Nothing stays behind.

    Args:
        memory: a text, several texts whose vectors are added up, or your own vector: ``[d_model]`` for
            each of `layers`, ``[layer, d_model]`` for all the model's layers, or layer -> vector.
        layers: one layer, or several at once; default those of a mapping.
        strength: the factor of the vector; one for all layers, or one for each.
        positions: see `place.Positions`. All but ``"everywhere"`` and ``"all"`` need `prompts`.
        kind: the activation it is added to (see `place.Stream`).
        relative: scale the vector to the activation's norm where it is added.
        encoding: how a text becomes vectors: the name of an encoding, or an `Encoder`.
        prompts: the prompts that will be run (texts, `Prompt`s, or token ids ``[pos]`` or
            ``[batch pos]``), padded on the right. Then the memory is added within them only, never to
            padding, and in a ``with`` block each row must begin with its prompt's tokens. Without
            prompts it is added at every position of every row: run prompts of one length, or one.

    Raises:
        ValueError: a layer out of range, an unknown encoding, a vector of another shape, positions
            that need prompts; from the model's run, a batch that is not these prompts.
        TokenError: an empty memory, or a prompt without the position.
        RuntimeError: nothing was run within the block.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> tokens = model.to_tokens("The spouse of Joren Ashby is")
        >>> with mi_hops.inject(model, "Nadia del Brandt", layers=2, strength=4.0):
        ...     logits = model(tokens)
        >>> hooks = mi_hops.inject(model, model.W_E[5], layers=[1, 2], kind="resid_pre")
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    """
    if layers is None:
        if not isinstance(memory, Mapping):
            raise ValueError(f"layers is missing; name one or more of 0..{model.cfg.n_layers - 1}")
        layers = list(memory)
    repair = MemoryInjection(
        layers, strength, encoding=encoding, positions=positions, kind=kind, relative=relative
    )
    (state,) = repair.fit_memories(model, [memory])
    if prompts is None:
        if repair.place.parts not in (["everywhere"], ["all"]):
            raise ValueError(f"positions {positions!r} are found in prompts; pass prompts=")
        hooks: list[Hook] = [
            (hook_name(kind, layer), adding(state.vectors[layer], s, relative=relative))
            for layer, s in repair.strengths.items()
        ]
        return Injection(model, hooks, [])
    known = as_prompts(model, prompts)
    if repair.place.everywhere:  # what follows a prompt is padding, or the caller's own
        within = ["all" if part == "everywhere" else part for part in repair.place.parts]
        repair = replace(repair, positions=within)
    rows = Rows(tuple(known), max(map(len, known)))
    return Injection(model, repair.hooks(model, [state] * len(known), rows), known)


@contextmanager
def _attached(
    model: HookedModel, hooks: Sequence[Hook], prompts: Sequence[Prompt]
) -> Iterator[None]:
    """Hooks over runs whose rows, where there are prompts, begin with these.

    Positions counted from the left of a prompt are wrong in a row that is padded on the left.
    """

    def check(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = next(t for t in (*args, *named.values()) if isinstance(t, Tensor))
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
                "right (mi_hops.generate takes an injection as a repair, with its cache)"
            )

    with nothing_stays(model), ExitStack() as stack:
        if prompts:
            embed: Any = model.embed
            stack.callback(embed.register_forward_pre_hook(check, with_kwargs=True).remove)
        stack.enter_context(hooked(model, hooks))
        yield
