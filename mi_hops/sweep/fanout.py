"""The fan-out forward: many interventions on base prompts in one pass through the model.

A sweep asks for the model's output under hundreds of interventions that differ from a *base* run
only from some block on. Here the batch starts as the base prompts alone; at the input of block l
one copy of its base row is appended for each intervention that first touches block l (between
attention and MLP, for one that first touches what comes there, where the model allows), and the
intervention changes only its own row. Nothing below an intervention is computed twice. Where every
intervention of a group lies at or after position p (and so does what is scored), the tokens before
p are the base run's: their keys and values are reused and only the tail is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.model import (
    Hook,
    HookedModel,
    backend_of,
    device_of,
    dtype_of,
    forward,
    hook_name,
    n_heads_of,
    require_hooks,
    require_layers,
)
from mi_hops.model.cache import Prefix, Recorder, remembering
from mi_hops.model.layout import pretransposed_weights
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.interventions import Change
from mi_hops.text.tokens import Batch

if TYPE_CHECKING:
    from torch import Tensor

#: Kinds whose activations can be changed; the axis of heads where there is one.
HEAD_AXIS: dict[str, int | None] = {
    "resid_pre": None, "resid_mid": None, "resid_post": None, "attn_out": None, "mlp_out": None,
    "mlp_pre": None, "mlp_post": None, "q": 2, "k": 2, "v": 2, "z": 2, "pattern": 1,
}  # fmt: skip

Reduce = Callable[["Tensor", list[int]], "Tensor"]


@dataclass(frozen=True)
class Site:
    """A place in the model.

    Attributes:
        kind: activation kind, a key of `HEAD_AXIS`.
        layer: block, from 0.
        positions: token positions of the base prompt (query positions for ``pattern``); None for
            all of them.
        head: one head (a key/value head for ``k`` and ``v``), or None for all.
    """

    kind: str
    layer: int
    positions: tuple[int, ...] | None = None
    head: int | None = None


@dataclass(frozen=True)
class Intervention:
    """One row of a fan-out: `change` applied at every one of `sites`, on a copy of a base row.

    The function sees the selected activation of its own row: ``[pos, d]``; with heads
    ``[pos, head, d_head]`` or, one head named, ``[pos, d_head]``; patterns ``[head, query, key]``
    or ``[query, key]``. At the first site that is the base run's activation. A sequence of
    functions gives each site its own.
    """

    sites: tuple[Site, ...]
    change: Change | tuple[Change, ...]
    base: int = 0

    @classmethod
    def at(
        cls,
        kind: str,
        layer: int | Iterable[int],
        change: Change,
        *,
        positions: Iterable[int] | None = None,
        head: int | None = None,
        base: int = 0,
    ) -> Intervention:
        """An intervention at one layer, or the same one in a window of layers."""
        layers = (layer,) if isinstance(layer, int) else tuple(layer)
        where = None if positions is None else tuple(positions)
        return cls(tuple(Site(kind, i, where, head) for i in layers), change, base)

    @property
    def pairs(self) -> list[tuple[Site, Change]]:
        """Sites with their functions."""
        if isinstance(self.change, tuple):
            return list(zip(self.sites, self.change, strict=True))
        return [(site, self.change) for site in self.sites]


@dataclass(frozen=True)
class FanOut:
    """What a fan-out returns.

    Attributes:
        base: the base prompts' values, ``[base, ...]``.
        rows: the interventions' values in the order given, ``[intervention, ...]``. The rest is
            ``[scored, vocab]`` logits, or what `reduce` made of them.
    """

    base: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass of a plan: interventions (indices) whose rows start at `start`.

    The first pass of a plan holds every base from its first token; where no interventions start
    there, it has no members.
    """

    start: int
    members: tuple[int, ...]


def fan_out(
    model: HookedModel,
    prompts: Batch,
    interventions: Sequence[Intervention],
    *,
    scored: Sequence[Sequence[int]] | None = None,
    reduce: Reduce | None = None,
    max_rows: int | None = None,
    memory: float | None = None,
    reuse_prefix: bool = True,
    progress: bool = False,
    observe: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> FanOut:
    """Run all interventions in as few passes as the memory budget allows.

    Args:
        prompts: base prompts, right-padded (`mi_hops.text.tokens.pad`).
        interventions: rows to run; none is allowed (then only the base is run).
        scored: for each base the positions to unembed, as many for every base; default each
            prompt's last token.
        reduce: maps logits ``[row, scored, vocab]`` and the rows' base indices to ``[row, ...]``;
            applied pass by pass, so that logits of all rows never exist at once. Default: keep
            the logits.
        max_rows: rows in one pass at the most, bases aside; default from `memory`.
        memory: bytes that activations may take, estimated; default 1 GiB on CPU, 40% of what is
            free on CUDA. On running out of memory a pass is halved and run again.
        reuse_prefix: run only the tail where positions allow.
        progress: show a progress bar over rows.
        observe: hook name -> function of the bases' own activation there, ``[base, pos, ...]``,
            called once, before any intervention at that hook: a change may use what it was given,
            of any base.

    Returns:
        `FanOut`.

    Raises:
        ValueError: an unknown kind, a layer, head or position that does not exist, a base that is
            not there, or unequal numbers of scored positions.
        MissingHookError: a hook point the model has not got.
    """
    where = _scored(prompts, scored)
    _check(model, prompts, interventions)
    reduce = reduce or (lambda logits, bases: logits)
    n_bases = prompts.tokens.shape[0]
    base: Tensor | None = None
    prefix: Prefix | None = None
    out: list[Tensor | None] = [None] * len(interventions)
    seen: dict[str, Tensor] = {}
    rows = [_row(model, item, seen) for item in interventions]
    plan = _plan(model, prompts, rows, where, max_rows, memory, reuse_prefix)
    watching: list[Hook] = [(name, _of_first(n_bases, fn)) for name, fn in (observe or {}).items()]
    watching += remembering(seen, {name for row in rows for name in row.needs}, n_bases)
    entries = {_entry(row.join) for row in rows}
    with (
        torch.no_grad(),
        pretransposed_weights(model),
        progress_bar(total=len(interventions), label="interventions", show=progress) as bar,
    ):
        stack = list(reversed(plan))
        while stack:
            step = stack.pop()
            recorder = None
            if base is None and len(plan) > 1:
                recorder = Recorder(model, n_bases, entries)
            try:
                members = [rows[i] for i in step.members]
                bases = list(range(n_bases))
                if base is not None:
                    bases = sorted({row.base for row in members})
                logits, parents = _pass(
                    model, prompts, members, step.start, bases, where, prefix, recorder,
                    [*watching, *(recorder.hooks if recorder else [])] if base is None else [],
                )  # fmt: skip
                if base is None:
                    base = reduce(logits[:n_bases], list(range(n_bases)))
                    prefix = None if recorder is None else recorder.prefix()
                if parents:
                    values = reduce(logits[-len(parents) :], parents)
                    for i, value in zip(step.members, values, strict=True):
                        out[i] = value
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(step.members) < 2:
                    raise
                half = len(step.members) // 2
                stack.append(Pass(step.start, step.members[half:]))
                stack.append(Pass(step.start, step.members[:half]))
                if base is None:
                    stack.append(Pass(0, ()))
                continue
            bar.update(len(step.members))
    assert base is not None  # a plan has at least one pass
    found = [v for v in out if v is not None]
    return FanOut(base, torch.stack(found) if found else base[:0])


def _of_first(n_rows: int, fn: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def look(x: Tensor) -> None:
        fn(x[:n_rows])

    return look


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory")
    )


def _scored(prompts: Batch, scored: Sequence[Sequence[int]] | None) -> list[list[int]]:
    lengths = prompts.lengths.tolist()
    if scored is None:
        return [[n - 1] for n in lengths]
    rows = [list(r) for r in scored]
    if len(rows) != len(lengths) or len({len(r) for r in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"scored must give every one of the {len(lengths)} prompts equally many positions (at "
            f"least one); got {[len(r) for r in rows]}"
        )
    for row, n in zip(rows, lengths, strict=True):
        if not all(0 <= p < n for p in row):
            raise ValueError(f"scored positions {row} are outside a prompt of {n} tokens")
    return rows


def _check(model: HookedModel, prompts: Batch, interventions: Sequence[Intervention]) -> None:
    """Everything wrong with the sites, before anything runs."""
    lengths = prompts.lengths.tolist()
    seen: set[tuple[Site, int]] = set()
    for item in interventions:
        if not item.sites:
            raise ValueError("an intervention without a site; name at least one")
        if not 0 <= item.base < len(lengths):
            raise ValueError(f"base {item.base} of an intervention: there are {len(lengths)}")
        seen.update((site, item.base) for site in item.sites)
    for site, base in seen:
        if site.kind not in HEAD_AXIS:
            raise ValueError(f"cannot change {site.kind!r}; expected one of {list(HEAD_AXIS)}")
        require_layers(model, [site.layer])
        if site.head is not None:
            n_heads = n_heads_of(model, site.kind)
            if HEAD_AXIS[site.kind] is None:
                raise ValueError(f"{site.kind!r} has no head axis, but head {site.head} was named")
            if not 0 <= site.head < n_heads:
                raise ValueError(
                    f"head {site.head} of {site.kind!r} is out of range; it has heads "
                    f"0..{n_heads - 1} (key/value heads are counted as they are)"
                )
        if site.positions is not None:
            wrong = [p for p in site.positions if not 0 <= p < lengths[base]]
            if wrong or not site.positions:
                raise ValueError(
                    f"positions {list(site.positions)} of {site.kind!r} do not fit a prompt of "
                    f"{lengths[base]} tokens"
                )
    require_hooks(model, {hook_name(site.kind, site.layer) for site, _ in seen})


# -- planning ------------------------------------------------------------------------------------


def plan_fan_out(
    model: HookedModel,
    prompts: Batch,
    interventions: Sequence[Intervention],
    *,
    scored: Sequence[Sequence[int]] | None = None,
    max_rows: int | None = None,
    memory: float | None = None,
    reuse_prefix: bool = True,
) -> list[Pass]:
    """The passes a fan-out will make, all of them; nothing runs."""
    where = _scored(prompts, scored)
    rows = [_row(model, item, {}) for item in interventions]
    return _plan(model, prompts, rows, where, max_rows, memory, reuse_prefix)


def _plan(
    model: HookedModel,
    prompts: Batch,
    rows: Sequence[_Row],
    where: list[list[int]],
    max_rows: int | None,
    memory: float | None,
    reuse_prefix: bool,
) -> list[Pass]:
    joins = [row.join for row in rows]
    starts = [_start(row, where[row.base]) if reuse_prefix else 0 for row in rows]
    width = prompts.tokens.shape[1]
    limit = max_rows or rows_within(model, width, len(where[0]), memory)
    if limit < 1:
        raise ValueError(f"max_rows is {max_rows}; expected at least 1")
    passes = []
    for start, members in _groups(starts, joins, width, model.cfg.n_layers, prompts):
        members.sort(key=lambda i: (joins[i], rows[i].base, i))
        for low in range(0, len(members), limit):
            passes.append(Pass(start, tuple(members[low : low + limit])))
    if not passes or passes[0].start:
        passes.insert(0, Pass(0, ()))
    return passes


def _start(row: _Row, scored: Sequence[int]) -> int:
    """The first position whose value can differ from the base's, or is needed."""
    touched = [0 if s.positions is None else min(s.positions) for s, _ in row.pairs]
    return min(*touched, *scored)


# A pass costs about as much as this many tokens through every block, whatever its size: on a CPU the
# weights are read once (measured on GPT-2 small; 16 is slower, 100 as fast).
_OVERHEAD_TOKENS = 48


def _groups(
    starts: list[int], joins: list[int], width: int, n_layers: int, prompts: Batch
) -> list[tuple[int, list[int]]]:
    """Partition rows by the position they start at so that the tokens computed are fewest.

    A group runs from its smallest start. Dynamic programming over the distinct starts, of which at
    most 32 are kept apart.
    """
    if not starts:
        return []
    distinct = sorted(set(starts))
    if len(distinct) > 32:
        step = len(distinct) / 32
        distinct = sorted({distinct[int(i * step)] for i in range(32)})
    rows: dict[int, list[int]] = {s: [] for s in distinct}
    for i, start in enumerate(starts):
        rows[max(s for s in distinct if s <= start)].append(i)
    blocks = [sum(n_layers - joins[i] / 2 for i in rows[s]) for s in distinct]
    fixed = n_layers * (_OVERHEAD_TOKENS + prompts.tokens.shape[0])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(distinct) + 1):
        options = []
        for begin in range(end):
            tokens = (width - distinct[begin]) * sum(blocks[begin:end])
            options.append((best[begin][0] + tokens + fixed, begin))
        best.append(min(options))
    groups = []
    end = len(distinct)
    while end:
        begin = best[end][1]
        groups.append((distinct[begin], [i for s in distinct[begin:end] for i in rows[s]]))
        end = begin
    return groups[::-1]


def rows_within(model: HookedModel, width: int, n_scored: int, memory: float | None) -> int:
    """Rows of `width` tokens that fit into `memory` bytes, estimated; default as in `fan_out`."""
    if memory is None:
        device = device_of(model)
        memory = 0.4 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**30
    return max(1, int(memory / row_bytes(model, width, n_scored)))


def row_bytes(model: HookedModel, width: int, n_scored: int) -> int:
    """Estimated bytes that one row of `width` tokens needs at its widest moment."""
    cfg = model.cfg
    size = dtype_of(model).itemsize
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    attention = 4 * cfg.n_heads * (cfg.d_head + width)
    token = size * (6 * cfg.d_model + max(3 * d_mlp, attention))
    return width * token + n_scored * cfg.d_vocab * (size + 4)


# -- running -------------------------------------------------------------------------------------


#: What a block computes after the residual stream between attention and MLP.
_AFTER_RESID_MID = ("mlp_pre", "mlp_post", "mlp_out", "resid_post")


@dataclass(frozen=True)
class _Row:
    """An intervention as it is run.

    Attributes:
        join: where its row joins the batch: 2 l at the input of block l, 2 l + 1 between its
            attention and its MLP.
        pairs: the changes from there on.
        base: the row it is a copy of.
        needs: hooks whose activation of the base the first change is made of.
    """

    join: int
    pairs: list[tuple[Site, Change]]
    base: int
    needs: tuple[str, ...] = ()


def _row(model: HookedModel, item: Intervention, seen: Mapping[str, Tensor]) -> _Row:
    """The latest place the row can join, and its changes put there.

    The output of a block is the input of the next. Where an output of attention or MLP is the first
    thing changed, the stream behind it is the base's stream before it plus the changed output, both
    of which `seen` will hold when the row joins, if what it `needs` is remembered there.
    """
    pairs = []
    for site, change in item.pairs:
        if site.kind == "resid_post" and site.layer + 1 < model.cfg.n_layers:
            site = Site("resid_pre", site.layer + 1, site.positions, site.head)
        pairs.append((site, change))
    needs: tuple[str, ...] = ()
    if (late := _late(model, item)) is not None:
        site, into, before = late
        own = next(change for each, change in pairs if each == site)
        needs = hook_name(before, site.layer), hook_name(site.kind, site.layer)
        added = _added(seen, *needs, _index(item.base, site, 0), own)
        # First, so that another change of the same stream finds it.
        pairs = [(into, added), *((each, change) for each, change in pairs if each != site)]
    first = min(site.layer for site, _ in pairs)
    kinds = {site.kind for site, _ in pairs if site.layer == first}
    halfway = _in_halves(model) and kinds <= {"resid_mid", *_AFTER_RESID_MID}
    return _Row(2 * first + halfway, pairs, item.base, needs)


def _in_halves(model: HookedModel) -> bool:
    """Whether blocks are attention, then MLP, and a row can join in between.

    The Bridge's blocks keep the stream between the two where no hook can let it grow.
    """
    cfg = model.cfg
    return (
        backend_of(model) == "hooked"
        and not getattr(cfg, "parallel_attn_mlp", False)
        and not cfg.attn_only
    )


def _late(model: HookedModel, item: Intervention) -> tuple[Site, Site, str] | None:
    """The first site, the stream behind it, and the kind of the stream before it.

    None where a row has to join before its first site.
    """
    first = min(site.layer for site in item.sites)
    sites = [site for site in item.sites if site.layer == first]
    if len(sites) > 1 or not _in_halves(model):
        return None
    (site,) = sites
    if site.kind == "attn_out":
        return site, Site("resid_mid", first, site.positions), "resid_pre"
    if site.kind == "mlp_out" and first + 1 < model.cfg.n_layers:
        return site, Site("resid_pre", first + 1, site.positions), "resid_mid"
    return None


def _added(
    seen: Mapping[str, Tensor], before: str, output: str, index: tuple[Any, ...], change: Change
) -> Change:
    """The base's stream before a site plus what `change` makes of the base's output there."""

    def fn(stream: Tensor) -> Tensor:
        return (seen[before][index] + change(seen[output][index].clone())).to(stream)

    return fn


def _entry(join: int) -> str:
    """The hook at which rows join."""
    return hook_name("resid_mid" if join % 2 else "resid_pre", join // 2)


def _pass(
    model: HookedModel,
    prompts: Batch,
    items: Sequence[_Row],
    start: int,
    bases: list[int],
    scored: list[list[int]],
    prefix: Prefix | None,
    recorder: Recorder | None,
    watching: Sequence[Hook],
) -> tuple[Tensor, list[int]]:
    """Logits ``[bases + items, scored, vocab]`` of one pass, and the base of each item.

    The items are sorted by where they join. Where the first pass has left the bases' stream, and
    some rows join at block 0, the bases have no rows of their own.
    """
    parents, known = [item.base for item in items], bases
    joining: dict[int, list[int]] = {}
    for item in items:
        joining.setdefault(item.join, []).append(item.base)
    view = prefix.view(bases, start) if prefix is not None and start else None
    rows = list(bases)
    if prefix is not None and 0 in joining:
        rows = joining.pop(0)
        if view is not None:
            view.rows = [bases.index(base) for base in rows]
        bases = []

    def grow(entry: str, new: list[int]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            if view is not None:
                view.rows += [known.index(base) for base in new]
            if prefix is None:
                return torch.cat([x, x[[known.index(base) for base in new]]])
            return torch.cat([x, prefix.stream(entry, new, start)])

        return fn

    hooks: list[Hook] = [(_entry(join), grow(_entry(join), new)) for join, new in joining.items()]
    hooks += watching  # before the changes, which may use what is shown
    hooks += _change_hooks(items, len(bases), start)
    where = [[p - start for p in scored[b]] for b in (*bases, *parents)]
    hooks.append(_cut(model, items, [name for name, _ in watching], where))
    tokens = prompts.tokens[rows, start:]
    cache = view if recorder is None else recorder.cache
    return forward(model, tokens, hooks=hooks, cache=cache, grows=bool(items)), parents


def _cut(
    model: HookedModel, items: Sequence[_Row], watched: Sequence[str], where: list[list[int]]
) -> Hook:
    """A hook that keeps ``where[row]`` of each row, as early as nothing else is needed.

    Only scored positions are unembedded, and on HookedTransformer only they pass the last MLP,
    unless an intervention touches it or it is watched. The GPT-2 Bridge reshapes the final norm's
    output to the input's shape, so there the cut comes right before the unembedding.
    """
    last = model.cfg.n_layers - 1
    touched = any(
        site.layer == last and site.kind in _AFTER_RESID_MID
        for item in items
        for site, _ in item.pairs
    ) or any(hook_name(kind, last) in watched for kind in _AFTER_RESID_MID)
    if backend_of(model) == "bridge":
        name = "unembed.hook_in"
    elif touched or getattr(model.cfg, "parallel_attn_mlp", False) or model.cfg.attn_only:
        name = hook_name("resid_post", last)
    else:
        name = hook_name("resid_mid", last)

    def keep_scored(x: Tensor) -> Tensor:
        index = torch.tensor(where, device=x.device)
        return x[torch.arange(len(where), device=x.device)[:, None], index]

    return name, keep_scored


def _change_hooks(items: Sequence[_Row], n_bases: int, start: int) -> list[Hook]:
    by_name: dict[str, list[tuple[int, Site, Change]]] = {}
    for row, item in enumerate(items, start=n_bases):
        for site, change in item.pairs:
            name = hook_name(site.kind, site.layer)
            by_name.setdefault(name, []).append((row, site, change))

    def apply(todo: list[tuple[int, Site, Change]]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            x = x.clone()
            for row, site, change in todo:
                index = _index(row, site, start)
                x[index] = change(x[index])
            return x

        return fn

    return [(name, apply(todo)) for name, todo in by_name.items()]


def _index(row: int, site: Site, start: int) -> tuple[Any, ...]:
    """What of a hook's activation an intervention sees, as an index."""
    where: Any = slice(None)
    if site.positions is not None:
        shifted = [p - start for p in site.positions]
        contiguous = shifted == list(range(shifted[0], shifted[-1] + 1))
        where = slice(shifted[0], shifted[-1] + 1) if contiguous else shifted
    head: Any = slice(None) if site.head is None else site.head
    axis = HEAD_AXIS[site.kind]
    if axis is None:
        return (row, where)
    return (row, head, where) if axis == 1 else (row, where, head)
