"""Which prompts share a pass: tokens that many start with are run once, and lengths differ little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix

from mi_hops.model import HookedModel, device_of

#: Beyond so many branchings the starts of prompts are no longer compared.
_DEEPEST = 64


#: What a pass costs besides its tokens, in tokens, by the kind of device: reading the weights, and
#: on a GPU filling it.
PASS_COST = {"cpu": 64}
PASS_COST_ELSEWHERE = 1024


def pass_cost(model: HookedModel) -> int:
    """What a pass of the model costs besides its tokens, in tokens."""
    return PASS_COST.get(device_of(model).type, PASS_COST_ELSEWHERE)


@dataclass(frozen=True)
class Part:
    """Rows that run in one pass.

    Attributes:
        rows: indices of the prompts.
        starts: ascending numbers of tokens that all of them start with: the first are run once for
            all, the others go on behind those before, and the rows behind the last.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]


def plan_batches(
    prompts: Sequence[tuple[int, ...]], batch_size: int, *, pass_cost: int, packed: bool = False
) -> Iterator[list[Part]]:
    """Batches of about equal size, cut into parts so that few tokens are run.

    Args:
        prompts: token ids.
        batch_size: rows of a batch, at most.
        pass_cost: what a pass costs besides its tokens, in tokens.
        packed: padding costs nothing, so that no part is cut for its length.

    Raises:
        ValueError: a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    groups = _groups(prompts, pass_cost)
    rows = [
        (i, group)
        for group, (_, members) in enumerate(groups)
        for i in sorted(members, key=lambda i: len(prompts[i]))
    ]
    n_batches = -(-len(rows) // batch_size)
    for b in range(n_batches):
        batch = rows[b * len(rows) // n_batches : (b + 1) * len(rows) // n_batches]
        parts: list[Part] = []
        for group, alike in groupby(batch, key=lambda row: row[1]):
            starts, _ = groups[group]
            members = [i for i, _ in alike]
            shared = starts[-1] if starts else 0
            cuts = [tuple(members)] if packed else _by_length(members, prompts, shared, pass_cost)
            parts += [Part(cut, starts) for cut in cuts]
        yield parts


def _groups(
    prompts: Sequence[tuple[int, ...]], cost: int
) -> list[tuple[tuple[int, ...], list[int]]]:
    """(starts, prompts): whatever prompts start with is run once where that pays for its pass."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}

    def walk(members: list[int], starts: tuple[int, ...], depth: int) -> None:
        first = prompts[members[0]]
        common = len(commonprefix([first, prompts[members[-1]]]))  # in order, so of all
        length = min(common, len(first) - 1)  # at least one token is left to be run for each
        shared = starts[-1] if starts else 0
        if (len(members) - 1) * (length - shared) > cost:
            starts = (*starts, length)
        branches: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            branches.setdefault(prompts[i][common : common + 1], []).append(i)
        if len(branches) > 1 and depth < _DEEPEST:
            for branch in branches.values():
                walk(branch, starts, depth + 1)
        else:
            key = starts, first[: starts[-1]] if starts else ()
            groups.setdefault(key, []).extend(members)

    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    if order:
        walk(order, (), 0)
    return [(starts, members) for (starts, _), members in groups.items()]


def _by_length(
    rows: list[int], prompts: Sequence[tuple[int, ...]], shared: int, cost: int
) -> list[tuple[int, ...]]:
    """Rows in order of length, cut where a further pass costs less than the padding it spares."""
    widths = [len(prompts[i]) - shared for i in rows]
    cuts = cheapest_cuts(len(rows), lambda begin, end: cost + (end - begin) * widths[end - 1])
    return [tuple(rows[begin:end]) for begin, end in cuts]


def cheapest_cuts(n: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """`n` items cut into runs ``(begin, end)`` of least ``cost(begin, end)`` in total."""
    best: list[tuple[float, int]] = [
        (0, 0)
    ]  # of the first items: their cost, where the last begins
    for end in range(1, n + 1):
        best.append(min((best[begin][0] + cost(begin, end), begin) for begin in range(end)))
    cuts, end = [], n
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]
