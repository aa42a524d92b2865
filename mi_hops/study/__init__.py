"""The study: all questions about two hops, asked in order of one model and one set of facts.

gap -> failure types -> lens -> erasure -> locate -> inject -> edit and evaluate. Every step writes
one NetCDF file into the study's folder as it ends, so a stopped study resumes where it stopped.
What is *chosen* (layers, an injection's cell, an edit's covariance) is chosen on one half of the
failures and reported on the other.
"""

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
