"""The report: one self-contained HTML file from a finished study.

`write_report` reads the study's files and shows what each step measured, with n and intervals. It
computes nothing that the results and ``summary.json`` do not hold, save averages over facts.
"""

from __future__ import annotations

from mi_hops.report.page import write_report

__all__ = ["write_report"]
