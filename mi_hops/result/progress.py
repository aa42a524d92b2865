"""Progress of long work: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

#: Seconds between two lines where the output is piped.
LINE_EVERY = 30.0

#: Seconds after which a bar of what runs inside other work is shown.
SHOWN_AFTER = 2.0

_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def showing_progress(show: bool = True) -> Iterator[None]:
    """Show the bars of all that runs inside, while it runs and if it takes some seconds."""
    token = _inside.set(show)
    try:
        yield
    finally:
        _inside.reset(token)


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    label: str,
    show: bool = False,
    total: int | None = None,
    done: int = 0,
    unit: str = "it",
) -> Any:
    """A tqdm bar over `items`, or one of `total` steps to be moved by ``update``.

    Args:
        done: steps that an earlier run made, which say nothing about the speed of this one.
        show: False gives a bar that prints nothing, but inside `showing_progress`.
    """
    from tqdm.auto import tqdm

    inside = _inside.get()
    options: dict[str, Any] = {"total": total, "initial": done, "desc": label, "unit": unit}
    options |= {"leave": not inside, "delay": SHOWN_AFTER * inside}
    options |= {"disable": not (show or inside)}
    if sys.stderr.isatty() or _in_notebook() or options["disable"]:
        return tqdm(items, **options)
    from tqdm import tqdm as plain

    class Piped(plain):
        """What is being done shows in the next line that is due, and makes none of its own."""

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            super().set_postfix_str(s, refresh=False)

    return Piped(
        items,
        **options,
        mininterval=LINE_EVERY,
        maxinterval=LINE_EVERY,
        ascii=True,
        file=_Lines(),
        bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}",
    )


def _in_notebook() -> bool:
    # That ipykernel was imported is not enough: whoever starts kernels imports it as well.
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class _Lines:
    """Standard error without the control codes that a bar redraws itself with."""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip("\r\n ")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
