"""The scores of repairs: one row per repair and query, their averages, a figure and a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mi_hops.reasoning.aggregate import Scores, by_group, case_table, change_scores, with_interval
from mi_hops.reasoning.queries import SetCount, count_sets, in_order
from mi_hops.result import plots
from mi_hops.result.display import html_table, shorten
from mi_hops.result.names import readable
from mi_hops.result.result import Result
from mi_hops.result.statistics import difference_ci

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What counts as a correct answer; the last needs generation.
ACCURACIES = ("first_correct", "exact_match", "generation_correct")

#: What tables and figures call the model without a repair.
UNREPAIRED = "unrepaired"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Scores of every repair on every query.

    Attributes:
        frame: one row per (repair, query). Columns ``repair, case, set, query_id, prompt, answer,
            wrong`` (None: no competitor), ``repaired`` (whether the repair has a state for the
            case), and with ``_before`` (unrepaired) and ``_after`` (repaired) each:

            - ``first_prob``: probability of the answer's first token;
            - ``answer_logprob``: of the whole answer, nats, teacher-forced;
            - ``mean_token_prob``, ``wrong_mean_token_prob``: the CREME paper's score
              (`metrics.METRICS`) of the correct and of the competing answer (NaN: none);
            - ``target_over_wrong``: whether the first exceeds the second (NaN: no competitor);
            - ``rank`` of the answer's first token, 1 = top;
            - ``first_correct``: the first token is the most probable one (1 or 0);
            - ``exact_match``: greedy decoding gives the whole answer and its end, token for token;
            - ``said`` and ``generation_correct``, where texts were generated: the text, and whether
              it is the answer or an alias of it (`matching.matches`);
            - ``statement_loss``: nats per token of prompt and answer, on neutral statements;
            - what other metrics were asked for.

            and ``kl``: KL(before || after) of the next token in nats, on specificity and neutral
            sets.
        case_ids: the cases that were asked for.
        case_ids_of: repair -> its cases, for a repair that was asked for some of them only.
        skipped: (set, case, reason) where a set has no query for a case.
        provenance: model, settings, versions.
    """

    frame: pd.DataFrame
    case_ids: tuple[str, ...]
    skipped: tuple[tuple[str, str, str], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    case_ids_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __getitem__(self, column: str) -> pd.Series:
        """A column of the frame.

        Raises:
            KeyError: no such column.
        """
        if column not in self.frame:
            raise KeyError(f"no {column!r} in the evaluation; there are {list(self.frame.columns)}")
        return self.frame[column]

    def __repr__(self) -> str:
        return shorten(f"Evaluation: {self.describe()}", 1900)

    def _repr_html_(self) -> str:
        rows = self._before_and_after("first_correct", None, n_resamples=500)
        cells: dict[str, list[str]] = {}
        for row in rows.itertuples():
            ends = f" [{row.lower:.0%}, {row.upper:.0%}]" if row.lower == row.lower else ""
            cells.setdefault(row.model, [row.model]).append(f"{row.value:.1%}{ends}")
        title = f"{len(self.case_ids)} cases; share whose first answer token is correct"
        header = ["repair", *dict.fromkeys(rows["set"])]
        return html_table(title, header, cells.values(), total=len(cells))

    def _n_cases(self, repair: str) -> int:
        return len(self.case_ids_of.get(repair, self.case_ids))

    def table(
        self, *, level: float = 0.95, n_resamples: int = 2000, seed: int | None = None
    ) -> pd.DataFrame:
        """Averages of each repair and set: mean over a case's queries first, then over cases.

        Args:
            level, n_resamples, seed: of the bootstrap over cases; the seed of the evaluation by
                default.

        Returns:
            Frame indexed by repair, set, statistic; columns as in `aggregate`. Statistics: those of
            `aggregate` for ``mean_token_prob``; for each accuracy (``first_correct``,
            ``exact_match``, ``generation_correct``) ``..._before``, ``..._after``, ``..._change``,
            ``..._retained`` (share correct after among queries correct before) and ``..._ratio``
            (accuracy after / before); ``first_prob``, ``answer_logprob`` and further metrics
            before, after and change; median ``rank``; ``kl``; ``perplexity_before`` and
            ``..._after`` (exp of the mean ``statement_loss``); and ``cases_used``,
            ``cases_skipped`` (cases without a query in the set).
        """
        settings: dict[str, Any] = {"level": level, "n_resamples": n_resamples}
        settings["seed"] = self.provenance.get("seed", 0) if seed is None else seed
        table = by_group(self.frame, self._scores, **settings)
        table = _with_perplexity(table)
        groups = [(r, s) for r in dict.fromkeys(self.frame["repair"]) for s in self._sets()]
        rows = {}
        for repair, name in groups:
            mine = self.frame[(self.frame["repair"] == repair) & (self.frame["set"] == name)]
            used, asked = mine["case"].nunique(), self._n_cases(repair)
            for statistic, n in (("cases_used", used), ("cases_skipped", asked - used)):
                row = (float(n), np.nan, np.nan, len(mine), used, "cases")
                rows[repair, name, statistic] = row
        counts = pd.DataFrame.from_dict(rows, orient="index", columns=list(table.columns))
        counts.index = pd.MultiIndex.from_tuples(counts.index, names=table.index.names)
        both = pd.concat([table, counts])
        order = {group: i for i, group in enumerate(groups)}
        place = [order[repair, name] for repair, name, _ in both.index]
        both = both.iloc[np.argsort(place, kind="stable")]
        # Repairs and sets in this order make an index that pandas looks up without a warning.
        parts = [
            pd.factorize(both.index.get_level_values(i), sort=i == 2)
            for i in range(both.index.nlevels)
        ]
        both.index = pd.MultiIndex(
            levels=[names for _, names in parts],
            codes=[codes for codes, _ in parts],
            names=both.index.names,
        )
        return both

    def _sets(self) -> list[str]:
        """All sets, also those without any query."""
        return in_order({*self.frame["set"], *(name for name, _, _ in self.skipped)})

    def summary(
        self,
        score: str = "first_correct",
        *,
        sets: Sequence[str] | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """One row per repair: a score on each set, with its interval, and how many cases.

        Args:
            score: a statistic of `table` without its ``_before`` / ``_after``.
            sets: which, in order; all by default.
            level, n_resamples, seed: as in `table`.

        Returns:
            Frame indexed by repair, the first row ``"unrepaired"``. For each set the columns ``SET``
            (mean over its cases), ``SET_lower``, ``SET_upper`` and ``SET_n`` (cases).

        Raises:
            ValueError: a score or set that the table does not have.
        """
        rows = self._before_and_after(score, sets, level=level, n_resamples=n_resamples, seed=seed)
        summary: dict[str, dict[str, Any]] = {}
        for row in rows.itertuples():
            found = summary.setdefault(row.model, {})
            found |= with_interval(row.set, row.value, row.lower, row.upper, int(row.n))
        return pd.DataFrame.from_dict(summary, orient="index").rename_axis("repair")

    def _before_and_after(
        self, score: str, sets: Sequence[str] | None, **options: Any
    ) -> pd.DataFrame:
        """Rows of the table for one score: ``model`` is ``"unrepaired"``, then each repair."""
        table = self.table(**options).reset_index()
        chosen = _some(sets, list(dict.fromkeys(table["set"])))
        rows = table[table["set"].isin(chosen)]
        after = rows[rows["statistic"] == f"{score}_after"].assign(model=lambda t: t["repair"])
        before = rows[rows["statistic"] == f"{score}_before"].assign(model=UNREPAIRED)
        if after.empty or before.empty:
            names = [s.removesuffix("_after") for s in table["statistic"] if s.endswith("_after")]
            raise ValueError(f"no score {score!r}; expected one of {list(dict.fromkeys(names))}")
        # The same for every repair, but for those that were asked for some of the cases only.
        before = before[before["repair"] == max(self._repairs(), key=self._n_cases)]
        data = pd.concat([before, after]).rename(columns={"n_cases": "n"})
        data = data.sort_values("set", key=lambda s: s.map(chosen.index), kind="stable")
        return data.sort_values("model", key=lambda s: s != UNREPAIRED, kind="stable")

    def difference(
        self,
        repair: str,
        other: str,
        score: str = "first_correct",
        *,
        sets: Sequence[str] | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """By how much one repair scores higher than another, case by case.

        Args:
            score: as in `summary`, or ``"kl"``.
            sets: which, in order; by default all that both repairs were asked.
            level, n_resamples, seed: of the bootstrap over cases; the seed of the evaluation by
                default.

        Returns:
            Frame indexed by set: ``value``, the mean over cases of the difference of their means over
            queries; ``lower`` and ``upper``, NaN where all cases have the same difference; ``n``, the
            cases.

        Raises:
            ValueError: a repair, score or set that the evaluation does not have.
        """
        means = self.cases()
        column = score if score in means else f"{score}_after"
        if column not in means:
            known = [c.removesuffix("_after") for c in means if c.endswith("_after") or c == "kl"]
            raise ValueError(f"no score {score!r}; expected one of {known}")
        if unknown := {repair, other} - set(self._repairs()):
            raise ValueError(f"no repair {sorted(unknown)}; there are {self._repairs()}")
        both = pd.concat([means.loc[name][column] for name in (repair, other)], axis=1).dropna()
        seed = self.provenance.get("seed", 0) if seed is None else seed
        rows = {}
        for name in _some(sets, in_order(set(both.index.get_level_values("set")))):
            mine, theirs = both.loc[name].to_numpy().T
            value, *ends = difference_ci(
                mine, theirs, paired=True, level=level, n_resamples=n_resamples, seed=seed
            )
            same = len(np.unique(mine - theirs)) == 1
            lower, upper = (np.nan if same else float(end) for end in ends)
            rows[name] = {"value": float(value), "lower": lower, "upper": upper, "n": len(mine)}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("set")

    def cases(self) -> pd.DataFrame:
        """Means over the queries of each repair, set and case; index (repair, set, case)."""
        scores = [c for c in self.frame if c.endswith(("_before", "_after")) or c == "kl"]
        return case_table(self.frame, [c for c in scores if not c.startswith("said_")])

    def plot(
        self,
        score: str = "first_correct",
        *,
        sets: Sequence[str] | None = None,
        title: str | None = None,
        **options: Any,
    ) -> go.Figure:
        """Bars of a score on each set: the unrepaired model, then every repair, with intervals.

        Args:
            score: a statistic of `table` without its ``_before`` / ``_after``.
            sets: which, in order; all by default.
            options: for `table` (``level``, ``n_resamples``, ``seed``).

        Raises:
            ValueError: a score or set that the table does not have.
        """
        shown = readable(score)
        label = f"{shown.capitalize()}, by set of queries (mean over cases, 95% intervals)"
        return plots.bars(
            self._before_and_after(score, sets, **options),
            x="set",
            y="value",
            group="model",
            interval=("lower", "upper"),
            title=title or label,
            labels={"set": "set of queries", "value": shown},
        )

    def counts(self) -> dict[str, SetCount]:
        """Set -> how many queries and cases it has, and why cases have none."""
        first = self.frame[self.frame["repair"] == max(self._repairs(), key=self._n_cases)]
        asked = list(zip(first["set"], first["case"], strict=True))
        return count_sets(asked, self.skipped)

    def _repairs(self) -> list[str]:
        return list(dict.fromkeys(self.frame["repair"]))

    def describe(self) -> str:
        """What was scored: one line per set, with skipped cases and the reasons."""
        repairs, counts = ", ".join(self._repairs()), self.counts()
        n_queries = sum(count.queries for count in counts.values())
        lines = [f"{len(self.case_ids)} cases, {n_queries} queries; repairs: {repairs}"]
        lines += [f"{name}: {count.describe()}" for name, count in counts.items()]
        for repair in self.case_ids_of:
            lines.append(f"{repair}: asked for {self._n_cases(repair)} of the cases only")
        for repair, part in self.frame.groupby("repair", sort=False):
            without = part.loc[~part["repaired"].astype(bool), "case"].nunique()
            if without:
                lines.append(f"{repair}: no state for {without} cases, which it left as they are")
        return "\n".join(lines)

    def to_result(self) -> Result:
        """The table as a `Result` with one dimension ``row``."""
        asked = {"cases": self.case_ids, "cases_of": self.case_ids_of, "without": self.skipped}
        columns = {
            str(name): ("row", self.frame[name].to_numpy(_dtype(self.frame[name])))
            for name in self.frame.columns
        }
        return Result(
            columns,
            provenance={**self.provenance, "asked": asked},
            title="evaluation of repairs",
            main="mean_token_prob_after",
            used=len(self.case_ids),
            allow_nonfinite=True,
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one NetCDF file, whole or not at all (see `Result.save`)."""
        return self.to_result().save(path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        result = Result.load(path)
        if "asked" not in result.provenance:
            raise ValueError(f"{path} holds the result {result.title!r}, not an evaluation")
        data = {str(name): array.values for name, array in result.data.data_vars.items()}
        frame = pd.DataFrame({k: _series(v) for k, v in data.items()})
        asked = result.provenance.pop("asked")
        return cls(
            frame,
            tuple(asked["cases"]),
            tuple((name, case, why) for name, case, why in asked["without"]),
            result.provenance,
            {name: tuple(ids) for name, ids in asked["cases_of"].items()},
        )

    def _scores(self, part: pd.DataFrame) -> Scores:
        def column(name: str) -> np.ndarray:
            return part[name].to_numpy(float)

        scores = change_scores(
            *(
                column(f"{p}mean_token_prob_{w}")
                for p in ("", "wrong_")
                for w in ("before", "after")
            )
        )
        accuracies = dict.fromkeys((a for a in ACCURACIES if f"{a}_after" in part), "share")
        units = {"first_prob": "probability", "answer_logprob": "nats"}
        for name, unit in {**accuracies, **units, **self.provenance.get("metrics", {})}.items():
            before, after = column(f"{name}_before"), column(f"{name}_after")
            scores.means |= {
                f"{name}_before": (before, unit),
                f"{name}_after": (after, unit),
                f"{name}_change": (after - before, unit),
            }
            if name in accuracies:
                kept = np.where(before == 1, after, np.nan)
                scores.means[f"{name}_retained"] = (kept, unit)
                scores.case_ratios[f"{name}_ratio"] = (after, before, "fraction of before", 0.0)
        for when in ("before", "after"):
            scores.spreads[f"median_rank_{when}"] = (column(f"rank_{when}"), "rank", np.median)
            scores.means[f"statement_loss_{when}"] = (column(f"statement_loss_{when}"), "nats")
        scores.means["kl"] = (column("kl"), "nats")
        scores.means = {n: mean for n, mean in scores.means.items() if not np.isnan(mean[0]).all()}
        return scores


def _some(sets: Sequence[str] | None, known: list[str]) -> list[str]:
    """The sets asked for, or all; refuses others."""
    chosen = known if sets is None else list(sets)
    if unknown := set(chosen) - set(known):
        raise ValueError(f"no set(s) {sorted(unknown)}; there are {known}")
    return chosen


def _with_perplexity(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of mean loss per token, as perplexity."""
    name = table.index.get_level_values("statistic")
    rows = table[name.str.startswith("statement_loss")].copy()
    rows[["value", "lower", "upper"]] = np.exp(rows[["value", "lower", "upper"]])
    rows["unit"] = "perplexity"
    rows = rows.rename(index=lambda s: str(s).replace("statement_loss", "perplexity"), level=-1)
    return pd.concat([table[~name.str.startswith("statement_loss")], rows])


def _dtype(column: pd.Series) -> Any:
    return column.dtype if column.dtype.kind in "bif" else object


def _series(values: np.ndarray) -> pd.Series:
    if values.dtype.kind != "O":
        return pd.Series(values.tolist() if values.dtype.kind in "UT" else values)
    # xarray and pandas make NaN of a None among texts.
    texts = [value if isinstance(value, str) else None for value in values]
    return pd.Series(texts, dtype=object if None in texts else None)
