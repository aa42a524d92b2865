"""Work in parts that fit into memory: a part that runs out of it is halved and run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from mi_hops.model import HookedModel, capture
from mi_hops.model.shortcuts import is_touched
from mi_hops.sweep.fanout import out_of_memory
from mi_hops.sweep.keep import in_order, keep, keep_each
from mi_hops.sweep.spread import Around, spreading
from mi_hops.text.tokens import Batch, Prompt, batches, batches_by_length, pad

Item = TypeVar("Item")
Part = TypeVar("Part")
Found = TypeVar("Found")

#: Parts whose values may be in memory at once, and their bytes.
WINDOW, MOST_SENT = 32, 2**31


def batches_for(
    model: HookedModel, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """(indices into `rows`, right-padded batch) pairs; without padding where a hook of the user's may see it."""
    yield from (batches_by_length if is_touched(model) else batches)(rows, batch_size)


def each_captured(
    model: HookedModel, prompts: Sequence[Prompt], names: Iterable[str], batch_size: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(index, activations by hook name) of each prompt, with what padding there is behind its tokens.

    A hook of the user's sees no padding: then prompts of one length run together, the shortest first.
    """
    names, length = list(names), lambda i: len(prompts[i])
    touched, order = is_touched(model), range(len(prompts))

    def run(part: Sequence[int]) -> dict[str, Tensor]:
        with torch.no_grad():
            return capture(model, pad([prompts[i].ids for i in part]).tokens, names)[0]

    for part, found in batched_with_oom_backoff(
        sorted(order, key=length) if touched else order,
        batch_size,
        run,
        alike=length if touched else None,
    ):
        for row, i in enumerate(part):
            yield i, {name: x[row] for name, x in found.items()}


def each_part(
    model: HookedModel | None,
    parts: Iterable[Part],
    run: Callable[[Part], Found],
    *,
    kept: Callable[[Part], tuple[Any, ...]],
    texts: Callable[[Part], Sequence[str]],
    around: Sequence[Around] = (),
) -> Iterator[tuple[Part, Found]]:
    """Each part, in order, with what `run` makes of it: here, or by the workers of a `spread`.

    Args:
        model: whose workers may make it; None for what is to be made here.
        run: depends on the part and on what it closes over, and on nothing that another run changes.
        kept: tells the part from others (`keep.keep`).
        texts: prompts of the part, to tell of one that failed.
        around: what the caller runs this in, of the model, so that workers do as well.
    """
    elsewhere = spreading(model) if model is not None else None
    if elsewhere is None:
        for part in parts:
            yield part, keep(partial(run, part), *kept(part))
        return
    every = list(parts)

    def make(numbers: list[int]) -> Iterator[tuple[int, Any]]:
        for i, value in elsewhere.each([every[n] for n in numbers], run, around, texts):
            yield numbers[i], value

    yield from zip(every, keep_each([kept(part) for part in every], make), strict=True)


def each_made_elsewhere(
    model: HookedModel,
    parts: Iterable[Part],
    run: Callable[[Part], Found],
    *,
    size: int,
    texts: Callable[[Part], Sequence[str]],
) -> Iterator[tuple[Part, Found | None]]:
    """Each part, in order, with what the workers of a `spread` make of it; None where the caller is to.

    For sums over many parts, which keep the sum (`keep.Running`) and not the parts: in one process the
    caller adds to it as it goes, without a copy for each part.

    Args:
        size: bytes of what `run` gives. Where a few of them are gigabytes, sending them costs more
            than making them, and nothing is sent.
    """
    elsewhere = spreading(model)
    window_size = min(WINDOW, MOST_SENT // max(1, size))
    if elsewhere is None or window_size < 2:
        yield from ((part, None) for part in parts)
        return
    stream = iter(parts)
    while window := list(islice(stream, window_size)):
        made = elsewhere.each(window, run, (), texts)
        yield from zip(window, in_order(made, range(len(window))), strict=True)


def batched_with_oom_backoff(
    items: Sequence[Item],
    size: int,
    run: Callable[[Sequence[Item]], Found],
    *,
    kept: tuple[Any, ...] | None = None,
    model: HookedModel | None = None,
    texts: Callable[[Sequence[Any]], Sequence[str]] = lambda part: list(map(str, part)),
    around: Sequence[Around] = (),
    alike: Callable[[Item], Any] | None = None,
) -> Iterator[tuple[Sequence[Item], Found]]:
    """Each part of at most `size` items, in order, with what `run` makes of it.

    Where memory runs out, this part and those after it are half as long. A part is run again as a
    whole, so `run` should only return what it finds; what is done with it outside runs once.

    Args:
        kept: tells this work from other work, where what `run` makes can be kept (`keep.keep`).
        model: whose workers (`spread`) may do it, where it is kept; then a part for which their
            memory does not suffice is halved by itself, here.
        texts, around: as in `each_part`.
        alike: what the items of a part have in common, of each item.

    Raises:
        ValueError: a size below 1.
        torch.OutOfMemoryError, RuntimeError: memory runs out for one item.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")

    def end_of(start: int) -> int:
        within = range(start, min(start + size, len(items)))
        if alike is None:
            return within.stop
        first = alike(items[start])
        return next((i for i in within if alike(items[i]) != first), within.stop)

    def attempt(part: Sequence[Item]) -> list[Found]:
        """Nothing where memory runs out; a resumed process then halves the part as well."""
        try:
            return [run(part)]
        except RuntimeError as error:
            if not out_of_memory(error) or len(part) < 2:
                raise
            return []  # out of the handler, whose error holds what the failed part had allocated

    start = 0
    if model is not None and kept is not None and spreading(model):
        parts = []
        while start < len(items):
            parts.append((start, items[start : end_of(start)]))
            start += len(parts[-1][1])
        for (_, part), found in each_part(
            model,
            parts,
            lambda numbered: attempt(numbered[1]),
            kept=lambda numbered: (*kept, numbered[0], len(numbered[1])),
            texts=lambda numbered: texts(numbered[1]),
            around=around,
        ):
            if found:
                yield part, found[0]
            else:
                yield from batched_with_oom_backoff(part, len(part) // 2, run, alike=alike)
        return
    while start < len(items):
        part = items[start : end_of(start)]
        make = partial(attempt, part)
        found = make() if kept is None else keep(make, *kept, start, len(part))
        if not found:
            size = len(part) // 2
            continue
        yield part, found[0]
        start += len(part)
