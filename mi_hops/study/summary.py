"""The headline numbers of a study, each with n and an interval, from the files of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mi_hops.facts.unusable import count_reasons
from mi_hops.study.numbers import Headline
from mi_hops.study.step import Step
from mi_hops.study.steps import STEPS, steps_of
from mi_hops.study.study import Study


def summarise(study: Study) -> dict[str, Any]:
    """All of ``summary.json``: one entry per step, and ``headlines`` for the terminal.

    A step that was left out has ``{"skipped": reason}``; ``left_out`` holds for each step the facts
    that it could not use, counted by reason, ``made_with`` the steps made with each set of versions.
    Every estimate is a dict with ``value``, ``low``, ``high`` (95% interval; exact for shares of
    facts, bootstrap over facts for means) and ``n``.
    """
    summary: dict[str, Any] = {"model": study.settings["model"]}
    left_out = {}
    for step in steps_of(study):
        result = study.result(step.name)
        if result is None:
            summary[step.name] = {"skipped": study.skipped(step.name)}
            continue
        summary[step.name] = step.summarise(result, study)
        if skipped := step.left_out(result, study):
            left_out[step.name] = count_reasons(skipped)
    summary |= {"left_out": left_out, "made_with": study.made_with()}
    summary["headlines"] = [{"name": name, "text": text} for name, text in _terminal(summary)]
    return dict(_plain(summary))


def headlines(summary: Mapping[str, Any]) -> Iterator[tuple[str, Headline]]:
    """(step, headline) in the study's order; steps without a result say why."""
    for step in _steps(summary):
        entry = summary[step.name]
        left_out = summary["left_out"].get(step.name, {})
        if "skipped" not in entry:
            yield from ((step.name, line) for line in step.headlines(entry, left_out))
        elif not step.shown_in:
            yield step.name, Headline("", "left out", "", f"{step.short}: {entry['skipped']}.")


def _terminal(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for _, line in headlines(summary):
        if line.name:
            joint = " " if line.spread.startswith("[") else ", "
            yield line.name, joint.join(part for part in (line.value, line.spread) if part)
    for step in _steps(summary):
        if reason := summary[step.name].get("skipped"):
            yield step.name, f"left out: {reason}"
    if len(summary["made_with"]) > 1:
        mixed = (f"{', '.join(steps)}: {made}" for made, steps in summary["made_with"].items())
        yield "made with different versions", "; ".join(mixed)


def _steps(summary: Mapping[str, Any]) -> list[Step]:
    return [step for step in STEPS if step.name in summary]


def _plain(value: Any) -> Any:
    """Python's own types, NaN as None, so that the file is strict JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
