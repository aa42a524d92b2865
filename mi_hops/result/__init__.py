"""Labelled results, their statistics, figures and files; free of torch."""

from mi_hops.result.result import Result

__all__ = ["Result"]
