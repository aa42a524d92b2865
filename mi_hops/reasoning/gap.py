"""The compositionality gap: which questions of several hops fail although every hop is known.

Source: arXiv 2402.14328, section 3 of its paper and its released inference code; decoding here is
greedy, so the classification is reproducible.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.forms import require_form
from mi_hops.model import HookedModel, provenance
from mi_hops.reasoning.queries import require_unique
from mi_hops.result import plots
from mi_hops.result.display import html_table
from mi_hops.result.result import Result
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep.generate import Answered, answered
from mi_hops.text.matching import STOP, matches

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What is asked of a two-hop fact; `asked_of` has the names for longer chains.
HOPS = ("first", "second", "two_hop")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
#: Label of the form where each fact is asked in its own first.
AS_GIVEN = "as given"

#: Variable of a `Gap` -> what it is of an `Answered`.
_READ = {
    "answer": "right",
    "first_token": "first_token",
    "rank": "rank",
    "prob": "prob",
    "said": "text",
}

#: The same of a hop that a fact does not have.
_UNASKED = {**dict.fromkeys(_READ, float("nan")), "said": ""}

Score = Literal["answer", "first_token"]


def check_score(score: str) -> None:
    """Refuse what is not a `Score`.

    Raises:
        ValueError: with what there is.
    """
    if score not in get_args(Score):
        raise ValueError(f"score is {score!r}; expected one of {list(get_args(Score))}")


class Gap(Result):
    """Per-fact outcome of the three questions, in one form or several (from `find_gap`).

    Variables on (example, form, asked), where ``asked`` is the first hop, the second hop or the
    two-hop question: ``answer`` (0 or 1: the whole answer and its end come out greedily, aliases
    allowed), ``first_token`` (0 or 1: the answer's first token is the most probable), its ``rank``
    and ``prob``, and the text ``said``. On (example, form): ``says_bridge``, whether the two-hop
    question was answered with the bridge. The facts are saved along with them.

    With longer chains among the facts, ``asked`` has every single hop by itself (``"third"`` and so
    on; NaN, and nothing said, where a fact has fewer) and ``"two_hop"`` is the whole question. Below,
    ``first`` then means that *every* single hop up to the bridge that the fact is seen from is
    answered, and ``second`` every one from there on; `by_hops` parts the facts by their hops.

    Everything below is of the first form, and counts as correct what `score` names; `in_form` and
    `scored_by` give the gap of another form or score.
    """

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gap:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        found = super().load(path)
        if "fact" not in found.data.coords:
            raise ValueError(f"{path} holds the result {found.title!r}, not a gap")
        return found

    @cached_property
    def facts(self) -> tuple[TwoHopFact, ...]:
        """The facts asked, in order."""
        empty = {"subject": "", "relation1": "", "relation2": ""}
        records = map(json.loads, self["fact"].values.tolist())
        return tuple(TwoHopFact(**{**empty, **record}) for record in records)

    @property
    def forms(self) -> list[str]:
        """The forms asked; ``"as given"`` where each fact was asked in its own first."""
        return self["form"].values.tolist()

    @property
    def form(self) -> str | None:
        """The first form; None where each fact was asked in its own first."""
        return None if self.forms[0] == AS_GIVEN else self.forms[0]

    def in_form(self, form: str) -> Gap:
        """The gap in one of the forms asked.

        Raises:
            ValueError: another form.
        """
        found = self.sel(form=[form])
        assert isinstance(found, Gap)
        return found

    @property
    def score(self) -> Score:
        """What counts as correct: the whole ``"answer"``, or its ``"first_token"``."""
        return "first_token" if self.provenance["score"] == "first_token" else "answer"

    def scored_by(self, score: Score) -> Gap:
        """The same answers, counted as correct by the whole answer or by its first token.

        Raises:
            ValueError: another score.
        """
        check_score(score)
        found = self._with(
            self.data, used=self.n_used, provenance={**self.provenance, "score": score}
        )
        assert isinstance(found, Gap)
        return found

    @property
    def frame(self) -> pd.DataFrame:
        """One row per fact, in the first form.

        ``id``, ``split``, ``hops`` (how many); ``first``, ``second``, ``two_hop``, whether each was
        answered correctly by `score`; of the two-hop question ``answer``, ``first_token``,
        ``says_bridge``, ``rank``, ``prob`` and ``said``; ``other_form``, whether it was answered
        correctly in another form; ``said_first`` and ``said_second`` (of several hops: all of it).
        """
        correct = self.data[self.score].fillna(0).astype(bool)
        here = self.data.isel(form=0)
        frame = pd.DataFrame({"id": here["example"].values, "split": here["split"].values})
        frame["hops"] = [fact.n_hops for fact in self.facts]
        by_itself = correct.isel(form=0).drop_sel(asked="two_hop").values
        said = here["said"].drop_sel(asked="two_hop").values
        # [example, hop]: before the bridge that the fact is seen from, or behind it
        hop = np.arange(by_itself.shape[1])
        at = np.array([fact.at_bridge for fact in self.facts], dtype=int)[:, None]
        n = frame["hops"].to_numpy(int)[:, None]
        for name, part in (("first", hop < at), ("second", (at <= hop) & (hop < n))):
            frame[name] = (by_itself | ~part).all(1)
            frame[f"said_{name}"] = [
                " / ".join(texts[which]) for texts, which in zip(said, part, strict=True)
            ]
        frame["two_hop"] = correct.isel(form=0).sel(asked="two_hop").values
        two_hop = here.sel(asked="two_hop")
        for name in ("answer", "first_token", "says_bridge"):
            frame[name] = two_hop[name].values.astype(bool)
        for name in ("rank", "prob", "said"):
            frame[name] = two_hop[name].values
        others = correct.sel(asked="two_hop").isel(form=slice(1, None))
        frame["other_form"] = others.any("form").values
        return frame

    @property
    def passed(self) -> list[TwoHopFact]:
        """Both hops known and the two-hop question answered."""
        return self._known(two_hop=True)

    @property
    def failed(self) -> list[TwoHopFact]:
        """Both hops known, the two-hop question not answered: the gap."""
        return self._known(two_hop=False)

    @property
    def gap(self) -> tuple[float, float, float]:
        """Failed / (failed + passed) with its exact 95% interval; NaN where no pair is known."""
        failed, total = len(self.failed), len(self.failed) + len(self.passed)
        if not total:
            return float("nan"), float("nan"), float("nan")
        return failed / total, *proportion_ci(failed, total)

    def table(self) -> pd.DataFrame:
        """The 2 x 2 x 2 table: n of each combination of (first, second, two_hop) answered.

        ``says_bridge`` counts those whose two-hop answer is the bridge.
        """
        index = pd.MultiIndex.from_product([[True, False]] * 3, names=list(HOPS))
        counts = self.frame.groupby(list(HOPS))["says_bridge"].agg(n="size", says_bridge="sum")
        return counts.reindex(index, fill_value=0).astype(int).reset_index()

    def by_split(self) -> pd.DataFrame:
        """Per split: n, shares answered of each hop and of the two-hop question, and the gap.

        Shares and ``gap`` (of the ``n_known``) come with exact 95% intervals.
        """
        return self._by("split")

    def by_hops(self) -> pd.DataFrame:
        """The same per number of hops: the gap counts facts whose every single hop is known."""
        return self._by("hops")

    def _by(self, column: str) -> pd.DataFrame:
        rows = []
        for value, part in self.frame.groupby(column, sort=column == "hops"):
            row: dict[str, object] = {column: value, "n": len(part)}
            for hop in HOPS:
                row |= _share(hop, part[hop])
            known = part[part["first"] & part["second"]]
            row |= {"first_token": float(part["first_token"].mean()), "n_known": len(known)}
            row |= {"n_failed": int((~known["two_hop"]).sum()), **_share("gap", ~known["two_hop"])}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(
        self, variable: str | None = None, *, kind: str | None = None, **keywords: Any
    ) -> go.Figure:
        """Bars of the share answered: each hop and the two-hop question, by form; exact intervals.

        Args:
            variable, kind: a figure of one variable instead, as in `Result.plot`.
            keywords: for `plots.bars`.
        """
        if variable is not None or kind is not None:
            return super().plot(variable, kind=kind, **keywords)
        rows = []
        for form in self.forms:
            for hop in self["asked"].values.tolist():
                correct = self.data[self.score].sel(form=form, asked=hop).dropna("example").values
                n, k = len(correct), int(correct.sum())
                low, high = proportion_ci(k, n)
                share = {"share": k / max(n, 1), "lower": low, "upper": high, "n": n}
                rows.append({"asked": hop, "form": form, **share})
        options: dict[str, Any] = {"x": "asked", "y": "share", "group": "form"}
        options |= {"interval": ("lower", "upper"), "title": self.title}
        options["labels"] = {"asked": "", "share": "share answered correctly"}
        return plots.bars(pd.DataFrame(rows), **{**options, **keywords})

    def describe(self) -> str:
        """The gap in one line, then how many facts were asked and why others were skipped."""
        share, low, high = self.gap
        known = len(self.passed) + len(self.failed)
        hops = "every hop" if any(fact.chain for fact in self.facts) else "both hops"
        gap = f"{len(self.failed)} failed of {known} questions with {hops} known"
        if known:
            gap += f": {share:.1%} [{low:.1%}, {high:.1%}]"
        return f"{gap} ({self.forms[0]})\n{super().describe()}"

    def _repr_html_(self) -> str:
        table = self.table()
        title = self.describe().partition("\n")[0]
        return html_table(title, list(table), table.values.tolist(), total=len(table))

    def _known(self, *, two_hop: bool) -> list[TwoHopFact]:
        frame = self.frame
        chosen = frame["first"] & frame["second"] & (frame["two_hop"] == two_hop)
        return [fact for fact, keep in zip(self.facts, chosen, strict=True) if keep]

    def _with(self, data: xr.Dataset, *, used: int | None, **changes: Any) -> Result:
        # An average is not a gap any more.
        kind = (
            Gap
            if {"example", "form", "asked"} <= set(data.dims) and "fact" in data.coords
            else Result
        )
        kept = {"title": self.title, "main": self.main, "provenance": self.provenance}
        return kind(
            data, used=used, skipped=self.skipped, allow_nonfinite=True, **{**kept, **changes}
        )


def find_gap(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | Sequence[str | None] | None = None,
    score: Score = "answer",
    batch_size: int = 64,
    max_new_tokens: int = 6,
    stop: Sequence[str] = STOP,
) -> Gap:
    """Ask all three questions of each fact greedily and determine which facts fall into the gap.

    Of a longer chain, every single hop and the whole question are asked; it is in the gap if all hops
    are known and the whole question fails. A fact without a first-hop or second-hop prompt, or
    without a two-hop prompt of a form asked, is skipped with the reason.

    Args:
        form: template order of all three prompts, or several; default each fact's first. A hop that
            lacks the form is asked in the first form it has.
        score: what counts as correct: the whole ``"answer"`` and its end, or its ``"first_token"``,
            for models that do not end their answers. The result holds both.
        stop: strings that end an answer; see `generate.matches`.

    Returns:
        `Gap`: ``passed`` and ``failed`` facts, the ``gap`` with its interval, tables, a figure.

    Raises:
        ValueError: no facts, two of one id, a form that no fact has, or an unknown score.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().sample(train=4, held_out=8)
        >>> gap = mi_hops.find_gap(model, facts, form="suffix")
        >>> len(gap.passed) + len(gap.failed) <= len(facts)
        True
    """
    facts = [facts] if isinstance(facts, TwoHopFact) else list(facts)
    if not facts:
        raise ValueError("no facts to ask; load some with load_facts")
    check_score(score)
    require_unique("fact ids", (fact.id for fact in facts))
    forms = [form] if form is None or isinstance(form, str) else list(form)
    for name in forms:
        require_form(facts, name)
    reasons = [(fact, _unaskable(fact, forms)) for fact in facts]
    asked = [fact for fact, reason in reasons if not reason]
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "stop": stop}
    names = asked_of(max((fact.n_hops for fact in asked), default=2))
    by_form = [_ask(model, asked, name, len(names), options) for name in forms]
    # [form][hop][fact] -> (fact, form, hop)
    values = {
        name: np.array(
            [[[getattr(a, read, _UNASKED[name]) for a in hop] for hop in one] for one in by_form]
        )
        .reshape(len(forms), len(names), len(asked))
        .transpose(2, 0, 1)
        for name, read in _READ.items()
    }
    arrays: dict[str, Any] = {
        name: (("example", "form", "asked"), v.astype(object if name == "said" else float))
        for name, v in values.items()
    }
    bridge = [
        [
            any(matches(said, hop.object, hop.aliases, stop=stop) for hop in fact.hops[:-1])
            for said in values["said"][i, :, -1]
        ]
        for i, fact in enumerate(asked)
    ]
    arrays["says_bridge"] = (
        ("example", "form"),
        np.array(bridge, dtype=float).reshape(len(asked), len(forms)),
    )
    gap = Gap.from_arrays(
        arrays,
        coords={
            "example": [fact.id for fact in asked],
            "form": [name or AS_GIVEN for name in forms],
            "asked": list(names),
            "split": ("example", [fact.split for fact in asked]),
            "fact": ("example", [json.dumps(f.to_dict(), default=str) for f in asked]),
        },
        units={
            **dict.fromkeys(("answer", "first_token", "says_bridge"), "share"),
            "prob": "probability",
            "rank": "rank",
        },
        provenance=provenance(model, method="find_gap", decoding="greedy", score=score),
        title="Questions answered correctly",
        main="answer",
        skipped=[(fact.id, reason) for fact, reason in reasons if reason],
        allow_nonfinite=len(names) > len(HOPS),
    )
    gap.__dict__["facts"] = tuple(asked)  # the very ones, not what their JSON gives back
    return gap


def hop_prompt(prompts: Mapping[str, str], form: str | None) -> str:
    """The prompt of a form, or the first there is."""
    return prompts[form] if form is not None and form in prompts else next(iter(prompts.values()))


def asked_of(n_hops: int) -> tuple[str, ...]:
    """Names of what is asked where a fact has so many hops: each hop by itself, then the whole.

    Examples:
        >>> asked_of(3)
        ('first', 'second', 'third', 'two_hop')
    """
    further = (f"hop {k}" for k in range(len(_ORDINALS) + 1, n_hops + 1))
    return (*_ORDINALS[:n_hops], *further, "two_hop")


def _share(name: str, correct: pd.Series) -> dict[str, float]:
    """A share and its exact 95% interval as columns; NaN of nothing."""
    n, k = len(correct), int(correct.sum())
    low, high = proportion_ci(k, n) if n else (float("nan"), float("nan"))
    return {name: k / n if n else float("nan"), f"{name}_lower": low, f"{name}_upper": high}


def _unaskable(fact: TwoHopFact, forms: Sequence[str | None]) -> str:
    for hop, name in zip(fact.hops, asked_of(fact.n_hops), strict=False):
        if not hop.prompts:
            return f"no {name}-hop prompt"
    lacking = [form for form in forms if form is not None and form not in fact.prompts]
    return f"no two-hop prompt of form {lacking[0]!r}" if lacking else ""


def _ask(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    form: str | None,
    n_asked: int,
    options: dict[str, Any],
) -> list[list[Answered | None]]:
    """[asked][fact], in one form; equal questions are asked once (hops are shared).

    None where a fact has fewer hops.
    """
    questions: list[list[tuple[str, str, tuple[str, ...]] | None]] = []
    for k in range(n_asked - 1):
        hops = [fact.hops[k] if k < fact.n_hops else None for fact in facts]
        questions.append(
            [(hop_prompt(h.prompts, form), h.object, h.aliases) if h else None for h in hops]
        )
    questions.append([(f.prompt(form), f.answer, f.answer_aliases) for f in facts])
    distinct = list(dict.fromkeys(q for row in questions for q in row if q))
    prompts, answers, aliases = zip(*distinct, strict=True) if distinct else ((), (), ())
    given = answered(model, list(prompts), list(answers), list(aliases), **options)
    known = dict(zip(distinct, given, strict=True))
    return [[known[q] if q else None for q in row] for row in questions]
