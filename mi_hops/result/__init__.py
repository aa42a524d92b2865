"""Labelled results, their statistics, figures and files; free of torch."""

from mi_hops.result import plots
from mi_hops.result.coloured import ColouredText, coloured_text, coloured_texts, save_page
from mi_hops.result.result import Result
from mi_hops.result.statistics import summarise_change

__all__ = [
    "ColouredText",
    "Result",
    "coloured_text",
    "coloured_texts",
    "plots",
    "save_page",
    "summarise_change",
]
