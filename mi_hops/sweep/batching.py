"""Work in parts that fit into memory: a part that runs out of it is halved and run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from mi_hops.sweep.fanout import out_of_memory
from mi_hops.sweep.keep import keep

Item = TypeVar("Item")
Found = TypeVar("Found")


def batched_with_oom_backoff(
    items: Sequence[Item],
    size: int,
    run: Callable[[Sequence[Item]], Found],
    *,
    kept: tuple[Any, ...] | None = None,
) -> Iterator[tuple[Sequence[Item], Found]]:
    """Each part of at most `size` items, in order, with what `run` makes of it.

    Where memory runs out, this part and those after it are half as long. A part is run again as a
    whole, so `run` should only return what it finds; what is done with it outside runs once.

    Args:
        kept: tells this work from other work, where what `run` makes can be kept (`keep.keep`).

    Raises:
        ValueError: a size below 1.
        torch.OutOfMemoryError, RuntimeError: memory runs out for one item.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")

    def attempt(part: Sequence[Item]) -> list[Found]:
        """Nothing where memory runs out; a resumed process then halves the part as well."""
        try:
            return [run(part)]
        except RuntimeError as error:
            if not out_of_memory(error) or len(part) < 2:
                raise
            return []  # out of the handler, whose error holds what the failed part had allocated

    start = 0
    while start < len(items):
        part = items[start : start + size]
        if kept is None:
            found = attempt(part)
        else:
            found = keep(partial(attempt, part), *kept, start, len(part))
        if not found:
            size = len(part) // 2
            continue
        yield part, found[0]
        start += len(part)
