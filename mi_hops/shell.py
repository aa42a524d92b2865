"""What the command says in a shell: tables, one line per error, exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mi_hops.study import StudyPlan


@contextmanager
def friendly(context: typer.Context, *, debug: bool, stopped: str) -> Iterator[None]:
    """Turn expected errors into one line on stderr and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. {stopped}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        if debug:
            raise
        line = _as_options(context, " ".join(str(error).split())) or type(error).__name__
        typer.echo(f"Error: {line}", err=True)
        raise typer.Exit(2) from None


def _as_options(context: typer.Context, message: str) -> str:
    """A message with the keyword arguments it names written as the options of this command."""
    options = {option.name for option in context.command.params}

    def spell(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"].strip("'\"")
        if name not in options:
            return found[0]
        flag = "--" + name.replace("_", "-")
        return flag if value in ("", "True") else f"{flag} {value}"

    keyword = r"""\b(?P<name>[a-z_]+)=(?P<value>True\b|'[^']*'|"[^"]*"|\{field: column\}|)"""
    return re.sub(keyword, spell, message).replace("{field: column}", "FIELD=COLUMN")


def no_loading_bar() -> None:
    """Transformers shows one of its own while it loads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def tell_study(report: Path, summary: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Say what a finished study found, on stdout."""
    if as_json:
        typer.echo(json.dumps({"report": str(report), **summary}))
    elif quiet:
        typer.echo(str(report))
    else:
        rows = [(line["name"], line["text"]) for line in summary.get("headlines", [])]
        _show("Study", ("", ""), rows)
        typer.echo(f"Report: {report}")


def show_plan(plan: StudyPlan) -> None:
    """What a study would run, a row per step."""
    rows = [
        [step.name, f"{step.rows:,}", "done" if step.done else _duration(step.minutes)]
        for step in plan.steps
    ]
    note = (
        f"Rows are at most. About {_duration(plan.minutes)} in all; memory up to "
        f"{plan.bytes / 1e9:.1f} GB."
    )
    title = f"{plan.model}, {plan.facts} facts: what would run"
    _show(title, ("step", "rows", "about"), rows, note)


def show_accuracy(family: str, steps: int, measured: dict[str, dict[str, Any]]) -> None:
    """A trained model's accuracy by split and form."""
    rows = []
    for key, scores in measured.items():
        shares = (f"{scores[k]:.1%}" for k in ("first_token", "whole"))
        rows.append([*key.rsplit("/", 1), str(scores["n"]), *shares])
    title = f"{family} after {steps} steps: greedy accuracy, whole vocabulary"
    _show(title, ("split", "form", "n", "first token", "whole answer"), rows, words=2)


def _show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    note: str = "",
    words: int = 1,
) -> None:
    """A table on a terminal; elsewhere lines with tabs between the cells.

    Args:
        words: columns from the left that hold words; the others are numbers, set right.
    """
    if not sys.stdout.isatty():
        for line in (title, *map("\t".join, rows), *([note] if note else [])):
            typer.echo(line)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=note or None, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s"
