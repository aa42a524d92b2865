"""Progress of long work: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

#: Seconds between two lines where the output is piped.
LINE_EVERY = 30.0


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    label: str,
    show: bool,
    total: int | None = None,
    unit: str = "it",
) -> Any:
    """A tqdm bar over `items`, or one of `total` steps to be moved by ``update``.

    Args:
        show: False gives a bar that prints nothing.
    """
    from tqdm.auto import tqdm

    piped = show and not sys.stderr.isatty() and "ipykernel" not in sys.modules
    if not piped:
        return tqdm(items, total=total, desc=label, unit=unit, disable=not show)
    from tqdm import tqdm as plain

    return plain(
        items,
        total=total,
        desc=label,
        unit=unit,
        mininterval=LINE_EVERY,
        ascii=True,
        file=_Lines(),
        bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left",
    )


class _Lines:
    """Standard error without the control codes that a bar redraws itself with."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ").removeprefix("\x1b[A")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
