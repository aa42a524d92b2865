"""The study: all questions about two hops, asked in order of one model and one set of facts.

gap -> failure types -> lens -> erasure -> locate -> inject -> edit and evaluate. Every step writes
one NetCDF file into the study's folder as it ends, so a stopped study resumes where it stopped.
What is *chosen* (layers, an injection's cell, an edit's covariance) is chosen on one half of the
failures and reported on the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_hops.study.choose import choose_edit, layer_spans
    from mi_hops.study.context import Sizes, StudySettings
    from mi_hops.study.report.page import write_report
    from mi_hops.study.run import run_study
    from mi_hops.study.steps import STEPS
    from mi_hops.study.study import Study

__all__ = [
    "STEPS",
    "Sizes",
    "Study",
    "StudySettings",
    "choose_edit",
    "layer_spans",
    "run_study",
    "write_report",
]

_HOME = {
    "STEPS": "steps",
    "Study": "study",
    "Sizes": "context",
    "StudySettings": "context",
    "choose_edit": "choose",
    "layer_spans": "choose",
    "run_study": "run",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
