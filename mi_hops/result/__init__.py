"""Labelled results, their statistics, figures and files; free of torch."""

from . import plots as plots
from .coloured import ColouredText as ColouredText
from .coloured import coloured_text as coloured_text
from .coloured import coloured_texts as coloured_texts
from .coloured import save_page as save_page
from .result import Result as Result
from .statistics import split_halves as split_halves
from .statistics import summarise_change as summarise_change
