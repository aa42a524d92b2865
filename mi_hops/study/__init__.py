"""The study: all questions about two hops, asked in order of one model and one set of facts.

gap -> failure types -> lens -> erasure -> locate -> inject -> edit and evaluate. Every step writes
one NetCDF file into the study's folder as it ends, so a stopped study resumes where it stopped.
What is *chosen* (layers, an injection's cell, an edit's covariance) is chosen on one half of the
failures and reported on the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_hops.study.folder import STEPS, Study
    from mi_hops.study.run import run_study
    from mi_hops.study.steps import Sizes

__all__ = ["STEPS", "Sizes", "Study", "run_study"]

_HOME = {"STEPS": "folder", "Study": "folder", "Sizes": "steps", "run_study": "run"}


def __getattr__(name: str) -> Any:
    # Reading a study back needs none of what running one does.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
