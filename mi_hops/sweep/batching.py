"""Work in parts that fit into memory: a part that runs out of it is halved and run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mi_hops.sweep.fanout import out_of_memory

Item = TypeVar("Item")
Found = TypeVar("Found")


def batched_with_oom_backoff(
    items: Sequence[Item], size: int, run: Callable[[Sequence[Item]], Found]
) -> Iterator[tuple[Sequence[Item], Found]]:
    """Each part of at most `size` items, in order, with what `run` makes of it.

    Where memory runs out, this part and those after it are half as long. A part is run anew as a
    whole, so `run` should only return what it finds; what is done with it outside runs once.

    Raises:
        ValueError: a size below 1.
        torch.OutOfMemoryError, RuntimeError: memory runs out for one item.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
    start = 0
    while start < len(items):
        part = items[start : start + size]
        try:
            found = run(part)
        except RuntimeError as error:
            if not out_of_memory(error) or len(part) < 2:
                raise
            size = len(part) // 2
            continue  # out of the handler, whose error holds what the failed part had allocated
        yield part, found
        start += len(part)
