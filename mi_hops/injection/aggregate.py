"""Figures of a paper from its raw rows: plain tables of probabilities before and after.

`tidy_published` turns the published wide tables (one column a layer, or one a random word) into long
form; `aggregate` gives every statistic of `results.summarise_change` for each group of rows, the
thesis's trimmed mean among them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mi_hops.result.result import summarise_change

if TYPE_CHECKING:
    import pandas as pd

_LAYER = re.compile(r"ans_prob_obs_edit_layer_?(\d+)")
_WORD = re.compile(r"ans_prob_obs_edit_subject_(.+)")
_BEFORE = "answer_prob_obs"


def tidy_published(frame: pd.DataFrame, *, before: str = _BEFORE) -> pd.DataFrame:
    """A published table of injections as one row a cell and prompt.

    Args:
        frame: columns `before` (probability untouched) and either
            ``ans_prob_obs_edit_layer{l}`` (curated memories at layer l, from 0) or
            ``ans_prob_obs_edit_subject_{word}`` (one random word at one layer).

    Returns:
        Columns ``row`` (from 0), ``layer`` or ``word``, ``before``, ``after``.

    Raises:
        ValueError: neither kind of column, or no column `before`.
    """
    import pandas as pd

    if before not in frame.columns:
        raise ValueError(f"no column {before!r} in the table; it has {list(frame.columns)[:20]}")
    key, columns = _cells(frame)
    parts = [
        pd.DataFrame(
            {
                "row": range(len(frame)),
                key: int(label) if key == "layer" else label,
                "before": frame[before].to_numpy(dtype=float),
                "after": frame[name].to_numpy(dtype=float),
            }
        )
        for name, label in columns.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _cells(frame: pd.DataFrame) -> tuple[str, dict[str, str]]:
    """What the columns of a wide table stand for ("layer" or "word"), and column -> its label."""
    for key, pattern in (("layer", _LAYER), ("word", _WORD)):
        matches = {str(c): pattern.fullmatch(str(c)) for c in frame.columns}
        columns = {name: m.group(1) for name, m in matches.items() if m}
        if columns:
            return key, columns
    raise ValueError(
        "no column ans_prob_obs_edit_layer{l} or ans_prob_obs_edit_subject_{word} in the table; "
        f"it has {list(frame.columns)[:20]}"
    )


def aggregate(
    frame: pd.DataFrame,
    *,
    by: str | Sequence[str] = (),
    before: str = "before",
    after: str = "after",
    intervals: bool = False,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Statistics of the change from `before` to `after`, for each group of rows.

    Args:
        frame: one row a prompt (and cell), with probabilities.
        by: columns that make the groups; none: all rows are one.
        intervals: also bootstrap intervals ``{statistic}_lower`` and ``_upper`` over prompts.

    Returns:
        Frame indexed by the groups, one column a statistic of `results.summarise_change` (fractions,
        so 0.449 is the thesis's 44.9%), ``n``, and the means ``mean_before`` and ``mean_after``.

    Raises:
        ValueError: a column that is not there, an empty table, or numbers that are no probabilities.
    """
    import pandas as pd

    keys = [by] if isinstance(by, str) else list(by)
    missing = [c for c in (*keys, before, after) if c not in frame.columns]
    if missing:
        raise ValueError(f"no column(s) {missing} in the table; it has {list(frame.columns)}")
    if not len(frame):
        raise ValueError("the table is empty; there is nothing to aggregate")
    groups = frame.groupby(keys, sort=True) if keys else [("all", frame)]
    rows = {}
    for label, part in groups:
        pre, post = (part[c].to_numpy(dtype=float) for c in (before, after))
        change = summarise_change(
            pre, post, level=level, n_resamples=n_resamples if intervals else 1, seed=seed
        )
        row = {str(name): value for name, value in change["value"].items()}
        if intervals:
            for end in ("lower", "upper"):
                row |= {f"{name}_{end}": v for name, v in change[end].dropna().items()}
        key = label[0] if isinstance(label, tuple) and len(label) == 1 else label
        rows[key] = {**row, "mean_before": pre.mean(), "mean_after": post.mean()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = (
        pd.MultiIndex.from_tuples(list(rows), names=keys)
        if len(keys) > 1
        else pd.Index(list(rows), name=keys[0] if keys else None)
    )
    return table
