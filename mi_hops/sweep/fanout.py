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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mi_hops.model import Hook, HookedModel, hook_name, n_heads_of, require_hooks, require_layers
from mi_hops.model.cache import Prefix, Recorder
from mi_hops.model.hooks import storing
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.lean import lean_blocks
from mi_hops.model.shortcuts import is_touched
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.interventions import HEAD_AXIS, Intervention, Site
from mi_hops.sweep.keep import keep
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.pairs import Texts, as_prompts
from mi_hops.sweep.passes import Pass, Row, entry_hook, make_row, plan_passes, run_pass
from mi_hops.text.tokens import Batch, pad

Reduce = Callable[["Tensor", list[int]], "Tensor"]


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


def fan_out(
    model: HookedModel,
    prompts: Batch | Texts,
    interventions: Sequence[Intervention],
    *,
    scored: Sequence[Sequence[int]] | None = None,
    reduce: Reduce | None = None,
    limits: Limits = Limits(),
    observe: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> FanOut:
    """Run all interventions in as few passes as the memory budget allows.

    Args:
        prompts: base prompts: texts or token ids, or already padded (`mi_hops.text.tokens.pad`).
        interventions: rows to run; none is allowed (then only the base is run).
        scored: for each base the positions to unembed, as many for every base; default each
            prompt's last token.
        reduce: maps logits ``[row, scored, vocab]`` and the rows' base indices to ``[row, ...]``;
            applied pass by pass, so that logits of all rows never exist at once. Default: keep
            the logits.
        limits: rows and memory of a pass, and the progress bar over rows.
        observe: hook name -> function of the bases' own activation there, ``[base, pos, ...]``,
            called once, before any intervention at that hook: a change may use what it was given,
            of any base.

    Returns:
        `FanOut`.

    Raises:
        ValueError: an unknown kind, a layer, head or position that does not exist, a base that is
            not there, or unequal numbers of scored positions.
        MissingHookError: a hook point the model does not have.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.sweep import zero
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> prompt = mi_hops.encode(model, "The spouse of Joren Ashby is")
        >>> rows = [mi_hops.Intervention.at("attn_out", i, zero()) for i in range(3)]
        >>> out = mi_hops.fan_out(model, mi_hops.pad([prompt.ids]), rows)
        >>> out.rows.shape == (3, 1, model.cfg.d_vocab)  # [row, scored position, vocab]
        True
    """
    if not isinstance(prompts, Batch):
        prompts = pad([prompt.ids for prompt in as_prompts(model, prompts)])
    where = _scored(prompts, scored)
    _check(model, prompts, interventions)
    reduce = reduce or (lambda logits, bases: logits)
    if alone := _alone(model, prompts, interventions, where):
        return _by_length(model, prompts, alone, len(interventions), reduce, limits, observe or {})
    n_bases = prompts.tokens.shape[0]
    base: Tensor | None = None
    prefix: Prefix | None = None
    out: list[Tensor | None] = [None] * len(interventions)
    seen: dict[str, Tensor] = {}
    rows, plan, plain = _planned(model, prompts, interventions, where, limits, seen)
    watching: list[Hook] = [(name, _of_first(n_bases, fn)) for name, fn in (observe or {}).items()]
    needed = {name for row in rows for name in row.needs}
    watching += storing(seen, needed, lambda x: x[:n_bases].clone())
    entries = {entry_hook(row.join) for row in rows}

    def attempt(step: Pass) -> list[Tensor]:
        """Values of the pass's rows; nothing where memory runs out."""
        nonlocal base, prefix
        first = base is None
        recorder = Recorder(model, n_bases, entries) if first and len(plan) > 1 else None
        members = [rows[i] for i in step.members]
        bases = list(range(n_bases)) if first else sorted({row.base for row in members})
        shown = [*watching, *(recorder.hooks if recorder else [])] if first else []
        try:
            logits, parents = run_pass(
                model,
                prompts,
                members,
                step.start,
                bases,
                where,
                prefix,
                recorder,
                shown,
                plain=plain,
            )
            found = reduce(logits[:n_bases], bases) if first else None
            values = reduce(logits[-len(parents) :], parents) if parents else logits[:0]
        except RuntimeError as error:
            if not out_of_memory(error) or len(step.members) < 2:
                raise
            return []
        if first:
            base, prefix = found, recorder.prefix() if recorder else None
        return [values]

    with (
        torch.no_grad(),
        pretransposed_weights(model),
        lean_blocks(model),
        progress_bar(total=len(interventions), label="interventions", show=limits.progress) as bar,
    ):
        stack = list(reversed(plan))
        while stack:
            step = stack.pop()
            first = base is None
            # The first pass is run again when work is resumed: the others need what it leaves.
            values = attempt(step) if first else keep(partial(attempt, step), "pass", step.members)
            if not values:
                half = len(step.members) // 2
                stack.append(Pass(step.start, step.members[half:]))
                stack.append(Pass(step.start, step.members[:half]))
                if first:
                    stack.append(Pass(0, ()))
                continue
            assert base is not None  # the first pass made it
            for i, value in zip(step.members, values[0], strict=True):
                out[i] = value.to(base.device)
            bar.update(len(step.members))
    assert base is not None  # there is at least one pass
    found = [v for v in out if v is not None]
    return FanOut(base, torch.stack(found) if found else base[:0])


@dataclass(frozen=True)
class _Alike:
    """Prompts of one length, and the interventions on them, by their numbers and made ready to run."""

    bases: list[int]
    prompts: Batch
    scored: list[list[int]]
    rows: list[int]
    items: list[Intervention]


def _alone(
    model: HookedModel,
    prompts: Batch,
    interventions: Sequence[Intervention],
    where: list[list[int]],
) -> list[_Alike]:
    """Prompts by length, where hooks of the user's would see padding; else nothing."""
    lengths = prompts.lengths.tolist()
    if len(set(lengths)) == 1 or not is_touched(model):
        return []
    found = []
    for length in sorted(set(lengths)):
        bases = [i for i, n in enumerate(lengths) if n == length]
        place = {base: i for i, base in enumerate(bases)}
        rows = [i for i, item in enumerate(interventions) if item.base in place]
        items = [replace(interventions[i], base=place[interventions[i].base]) for i in rows]
        tokens = pad(prompts.tokens[bases, :length])
        found.append(_Alike(bases, tokens, [where[i] for i in bases], rows, items))
    return found


def _by_length(
    model: HookedModel,
    prompts: Batch,
    groups: Sequence[_Alike],
    n_rows: int,
    reduce: Reduce,
    limits: Limits,
    observe: Mapping[str, Callable[[Tensor], None]],
) -> FanOut:
    """The fan-out of one group after the other. All bases are run once before, and shown."""
    n_bases, width = prompts.tokens.shape
    shown: dict[str, dict[int, Tensor]] = {name: {} for name in observe}

    def run(group: _Alike, items: Sequence[Intervention], **options: Any) -> FanOut:
        def own(logits: Tensor, bases: list[int]) -> Tensor:
            return reduce(logits, [group.bases[base] for base in bases])

        return fan_out(model, group.prompts, items, scored=group.scored, reduce=own, **options)

    def take(name: str, group: _Alike) -> Callable[[Tensor], None]:
        return lambda x: shown[name].update(zip(group.bases, x.detach().clone(), strict=True))

    bases: dict[int, Tensor] = {}
    for group in groups:
        took = {name: take(name, group) for name in observe}
        bases |= zip(group.bases, run(group, [], observe=took).base, strict=True)
    for name, fn in observe.items():
        axes = (1, 2) if name.endswith(("hook_pattern", "hook_attn_scores")) else (0,)
        fn(torch.stack([_widened(shown[name][i], width, axes) for i in range(n_bases)]))
    rows: dict[int, Tensor] = {}
    for group in groups:
        if group.rows:
            rows |= zip(group.rows, run(group, group.items, limits=limits).rows, strict=True)
    base = torch.stack([bases[i] for i in range(n_bases)])
    return FanOut(base, torch.stack([rows[i] for i in range(n_rows)]) if n_rows else base[:0])


def _widened(x: Tensor, width: int, axes: Sequence[int]) -> Tensor:
    """A row's activation with zeros where there is padding, along the axes of positions."""
    out = x.new_zeros([width if axis in axes else n for axis, n in enumerate(x.shape)])
    out[tuple(slice(n) for n in x.shape)] = x
    return out


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
            wrong = [p for p in site.positions if not -lengths[base] <= p < lengths[base]]
            if wrong or not site.positions:
                raise ValueError(
                    f"positions {list(site.positions)} of {site.kind!r} do not fit a prompt of "
                    f"{lengths[base]} tokens"
                )
    require_hooks(model, {hook_name(site.kind, site.layer) for site, _ in seen})


def _placed(item: Intervention, length: int) -> Intervention:
    """The intervention with all positions named, counted from the prompt's first token."""
    sites = tuple(
        replace(site, positions=tuple(range(length)[p] for p in site.positions or range(length)))
        for site in item.sites
    )
    return replace(item, sites=sites)


def plan_fan_out(
    model: HookedModel,
    prompts: Batch,
    interventions: Sequence[Intervention],
    *,
    scored: Sequence[Sequence[int]] | None = None,
    limits: Limits = Limits(),
) -> list[Pass]:
    """All passes that a fan-out would make; nothing runs."""
    where = _scored(prompts, scored)
    plan = []
    for group in _alone(model, prompts, interventions, where):
        own = _planned(model, group.prompts, group.items, group.scored, limits, {})[1]
        plan.append(Pass(0, ()))
        plan += [Pass(p.start, tuple(group.rows[i] for i in p.members)) for p in own if group.rows]
    return plan or _planned(model, prompts, interventions, where, limits, {})[1]


def _planned(
    model: HookedModel,
    prompts: Batch,
    interventions: Sequence[Intervention],
    where: list[list[int]],
    limits: Limits,
    seen: dict[str, Tensor],
) -> tuple[list[Row], list[Pass], bool]:
    """Rows, passes, and whether every row is run as a whole, from the first token and the first block on.

    That is so where hooks of the user's, or third-party modules, may look at any position and act between any two sites.
    """
    plain = is_touched(model)
    limits = replace(limits, reuse_prefix=limits.reuse_prefix and not plain)
    lengths = prompts.lengths.tolist()
    rows = [
        make_row(model, _placed(item, lengths[item.base]), lengths[item.base], seen, plain=plain)
        for item in interventions
    ]
    return rows, plan_passes(model, prompts, rows, where, limits), plain
