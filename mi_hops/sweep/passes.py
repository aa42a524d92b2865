"""The passes of a fan-out: which rows share one, where each row joins it, and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mi_hops.model import Hook, HookedModel, device_of, dtype_of, forward, hook_name
from mi_hops.model.cache import Prefix, Recorder
from mi_hops.model.hooks import earliest_cut, splits_blocks
from mi_hops.sweep.interventions import HEAD_AXIS, Change, Intervention, Site
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.sites import activation_width
from mi_hops.sweep.together import cheapest_cuts
from mi_hops.text.tokens import Batch


@dataclass(frozen=True)
class Pass:
    """One forward pass of a plan: interventions (indices) whose rows start at `start`.

    The first pass of a plan holds every base from its first token; where no interventions start
    there, it has no members.
    """

    start: int
    members: tuple[int, ...]


#: Bytes that a pass may take on a CPU, where nothing else is said.
CPU_MEMORY = 2**30

# -- planning ------------------------------------------------------------------------------------


def plan_passes(
    model: HookedModel,
    prompts: Batch,
    rows: Sequence[Row],
    where: list[list[int]],
    limits: Limits,
) -> list[Pass]:
    """Rows grouped by the position they start at, in passes that fit the limits."""
    joins = [row.join for row in rows]
    starts = [_start(row, where[row.base]) if limits.reuse_prefix else 0 for row in rows]
    width = prompts.tokens.shape[1]
    limit = limits.max_rows or rows_within(model, width, len(where[0]), limits.memory)
    passes = []
    for start, members in _groups(starts, joins, width, model.cfg.n_layers, prompts):
        members.sort(key=lambda i: (joins[i], rows[i].base, i))
        for low in range(0, len(members), limit):
            passes.append(Pass(start, tuple(members[low : low + limit])))
    if not passes or passes[0].start:
        passes.insert(0, Pass(0, ()))
    return passes


def _start(row: Row, scored: Sequence[int]) -> int:
    """The first position whose value can differ from the base's, or is needed."""
    return min(*(min(s.positions or ()) for s, _ in row.pairs), *scored)


# A pass costs about as much as this many tokens through every block, whatever its size: on a CPU the
# weights are read once (measured on GPT-2 small; 16 is slower, 100 as fast).
_OVERHEAD_TOKENS = 48


def _groups(
    starts: list[int], joins: list[int], width: int, n_layers: int, prompts: Batch
) -> list[tuple[int, list[int]]]:
    """Partition rows by the position they start at so that the tokens computed are fewest.

    A group runs from its smallest start. At most 32 starts are told apart.
    """
    distinct = sorted(set(starts))
    if len(distinct) > 32:
        step = len(distinct) / 32
        distinct = sorted({distinct[int(i * step)] for i in range(32)})
    rows: dict[int, list[int]] = {s: [] for s in distinct}
    for i, start in enumerate(starts):
        rows[max(s for s in distinct if s <= start)].append(i)
    blocks = [sum(n_layers - joins[i] / 2 for i in rows[s]) for s in distinct]
    fixed = n_layers * (_OVERHEAD_TOKENS + prompts.tokens.shape[0])

    def cost(begin: int, end: int) -> float:
        return (width - distinct[begin]) * sum(blocks[begin:end]) + fixed

    return [
        (distinct[begin], [i for s in distinct[begin:end] for i in rows[s]])
        for begin, end in cheapest_cuts(len(distinct), cost)
    ]


def rows_within(model: HookedModel, width: int, n_scored: int, memory: float | None) -> int:
    """Rows of `width` tokens that fit into `memory` bytes, estimated; default as in `fan_out`."""
    if memory is None:
        device = device_of(model)
        memory = 0.4 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_MEMORY
    return max(1, int(memory / row_bytes(model, width, n_scored)))


def row_bytes(model: HookedModel, width: int, n_scored: int) -> int:
    """Estimated bytes that one row of `width` tokens needs at its widest moment."""
    cfg = model.cfg
    size = dtype_of(model).itemsize
    d_mlp = activation_width(model, "mlp_post", width)
    attention = 4 * cfg.n_heads * (cfg.d_head + width)
    token = size * (6 * cfg.d_model + max(3 * d_mlp, attention))
    return width * token + n_scored * cfg.d_vocab * (size + 4)


# -- running -------------------------------------------------------------------------------------


#: Hook points of a block up to the residual stream between attention and MLP.
_UP_TO_RESID_MID = ("hook_resid_pre", "ln1.", "attn.", "hook_attn_out", "hook_resid_mid")
#: What a block computes after the residual stream between attention and MLP.
_AFTER_RESID_MID = ("mlp_pre", "mlp_post", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Row:
    """An intervention as it is run.

    Attributes:
        join: where its row joins the batch: 2 l at the input of block l, 2 l + 1 between its
            attention and its MLP.
        pairs: the changes from there on.
        base: the row it is a copy of.
        length: tokens of its base, behind which there is padding.
        needs: hooks whose activation of the base the first change is made of.
    """

    join: int
    pairs: list[tuple[Site, Change]]
    base: int
    length: int
    needs: tuple[str, ...] = ()


def make_row(
    model: HookedModel,
    item: Intervention,
    length: int,
    seen: Mapping[str, Tensor],
    *,
    plain: bool = False,
) -> Row:
    """The latest place the row can join, and its changes put there.

    The output of a block is the input of the next. Where an output of attention or MLP is the first
    thing changed, the stream behind it is the base's stream before it plus the changed output, both
    of which `seen` will hold when the row joins, if what it `needs` is remembered there.

    Args:
        item: whose sites all name their positions.
        plain: join at the input of the first block that is changed, and change what was named: hooks
            of the user's act on what lies between.
    """
    if plain:
        return Row(2 * min(site.layer for site in item.sites), item.pairs, item.base, length)
    outputs, pairs = [], []
    for site, change in item.pairs:
        if site.kind == "resid_post" and site.layer + 1 < model.cfg.n_layers:
            outputs.append((replace(site, kind="resid_pre", layer=site.layer + 1), change))
        else:
            pairs.append((site, change))
    pairs = [*outputs, *pairs]  # a block's output is changed before the next one's input
    needs: tuple[str, ...] = ()
    if (late := _late(model, item)) is not None:
        site, into, before = late
        own = next(change for each, change in pairs if each == site)
        needs = hook_name(before, site.layer), hook_name(site.kind, site.layer)
        added = _added(seen, *needs, item.base, _index(site, 0, length), own)
        # First, so that another change of the same stream finds it.
        pairs = [(into, added), *((each, change) for each, change in pairs if each != site)]
    first = min(site.layer for site, _ in pairs)
    kinds = {site.kind for site, _ in pairs if site.layer == first}
    halfway = splits_blocks(model) and kinds <= {"resid_mid", *_AFTER_RESID_MID}
    return Row(2 * first + halfway, pairs, item.base, length, needs)


def _late(model: HookedModel, item: Intervention) -> tuple[Site, Site, str] | None:
    """The first site, the stream behind it, and the kind of the stream before it.

    None where a row has to join before its first site.
    """
    first = min(site.layer for site in item.sites)
    sites = [site for site in item.sites if site.layer == first]
    if len(sites) > 1 or not splits_blocks(model):
        return None
    (site,) = sites
    if site.kind == "attn_out":
        return site, Site("resid_mid", first, site.positions), "resid_pre"
    if site.kind == "mlp_out" and first + 1 < model.cfg.n_layers:
        return site, Site("resid_pre", first + 1, site.positions), "resid_mid"
    return None


def _added(
    seen: Mapping[str, Tensor],
    before: str,
    output: str,
    base: int,
    index: tuple[Any, ...],
    change: Change,
) -> Change:
    """The base's stream before a site plus what `change` makes of the base's output there."""

    def fn(stream: Tensor) -> Tensor:
        made = change(seen[output][base][index].clone())
        return (seen[before][base][index] + made).to(stream)

    return fn


def entry_hook(join: int) -> str:
    """The hook at which rows join."""
    return hook_name("resid_mid" if join % 2 else "resid_pre", join // 2)


def run_pass(
    model: HookedModel,
    prompts: Batch,
    items: Sequence[Row],
    start: int,
    bases: list[int],
    scored: list[list[int]],
    prefix: Prefix | None,
    recorder: Recorder | None,
    watching: Sequence[Hook],
    *,
    plain: bool = False,
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

    def grow(join: int, new: list[int]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            if view is not None:
                view.rows += [known.index(base) for base in new]
            if prefix is None:
                return torch.cat([x, x[[known.index(base) for base in new]]])
            return torch.cat([x, prefix.stream(entry_hook(join), new, start)])

        return fn

    hooks: list[Hook] = [(entry_hook(join), grow(join, new)) for join, new in joining.items()]
    hooks += watching  # before the changes, which may use what is shown
    hooks += _change_hooks(items, len(bases), start)
    where = [[p - start for p in scored[b]] for b in (*bases, *parents)]
    early = None if plain else [name for name, _ in watching]
    hooks.append(_cut(model, items, early, where))
    tokens = prompts.tokens[rows, start:]
    cache = view if recorder is None else recorder.cache
    return forward(model, tokens, hooks=hooks, cache=cache, grows=bool(items)), parents


def _cut(
    model: HookedModel, items: Sequence[Row], watched: Sequence[str] | None, where: list[list[int]]
) -> Hook:
    """A hook that keeps ``where[row]`` of each row, as early as nothing else is changed or watched.

    Where `watched` is None, or has what is neither in a block before the last nor in the last one's
    attention, that is before the unembedding.
    """
    name, last = "unembed.hook_in", model.cfg.n_layers - 1
    before = ("hook_", *(f"blocks.{i}." for i in range(last)))
    before += tuple(f"blocks.{last}.{part}" for part in _UP_TO_RESID_MID)
    if watched is not None and all(each.startswith(before) for each in watched):
        touched = any(
            site.layer == last and site.kind in _AFTER_RESID_MID
            for item in items
            for site, _ in item.pairs
        )
        name = earliest_cut(model, after_attention=not touched)

    def keep_scored(x: Tensor) -> Tensor:
        index = torch.tensor(where, device=x.device)
        return x[torch.arange(len(where), device=x.device)[:, None], index]

    return name, keep_scored


def _change_hooks(items: Sequence[Row], n_bases: int, start: int) -> list[Hook]:
    by_name: dict[str, list[tuple[int, tuple[Any, ...], Change]]] = {}
    for row, item in enumerate(items, start=n_bases):
        for site, change in item.pairs:
            name = hook_name(site.kind, site.layer)
            index = _index(site, start, item.length)
            by_name.setdefault(name, []).append((row, index, change))

    def apply(todo: list[tuple[int, tuple[Any, ...], Change]]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            x = x.clone()
            for row, index, change in todo:
                x[row][index] = change(x[row][index])
            return x

        return fn

    return [(name, apply(todo)) for name, todo in by_name.items()]


def _index(site: Site, start: int, length: int) -> tuple[Any, ...]:
    """What of a row's activation an intervention sees, as an index: nothing of the padding."""
    shifted = [p - start for p in site.positions or ()]
    contiguous = shifted == list(range(shifted[0], shifted[-1] + 1))
    where: Any = slice(shifted[0], shifted[-1] + 1) if contiguous else shifted
    head: Any = slice(None) if site.head is None else site.head
    axis = HEAD_AXIS[site.kind]
    if axis is None:
        return (where,)
    return (head, where, slice(length)) if axis == 1 else (where, head)
