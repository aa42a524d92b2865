"""Did a repair hold, spread, and do no harm? One score for everything that meets a `Repair` protocol.

All queries are asked of the unrepaired model once, and then with each repair on, every row of a batch
under the repair of its own case; a repair of the model itself is asked case by case. The result is a table with one row per repair and query; its
averages are made by `aggregate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.editing import Edit, EditRepair
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, dtype_of, fingerprint, provenance
from mi_hops.model.numeric import kl_divergence, wide_dtype
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.queries import PLACE, Query, QuerySets, require_unique
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batches_for, each_part
from mi_hops.sweep.generate import answered, end_ids
from mi_hops.sweep.metrics import (
    AnswerLogprob,
    Greedy,
    Metric,
    MetricLike,
    NextToken,
    Plan,
    Target,
    get_metric,
    get_metrics,
    require_finite,
    target_of,
)
from mi_hops.sweep.repair import InPlaceRepair, Repair, Rows
from mi_hops.sweep.scoring import logits_at, next_token_logits, score_prompts
from mi_hops.text.tokens import Batch, encode

#: What can be scored; an `Edit` stands for itself on every row.
Repairs: TypeAlias = Repair | InPlaceRepair | Edit

#: Sets in which the whole next-token distribution should stay as it was.
KL_SETS = ("specificity", "specificity_same_relation", "neutral")
#: Sets whose prompt and answer together are a statement to take the perplexity of.
TEXT_SETS = ("neutral",)


# -- metrics that only an evaluation needs --------------------------------------------------------


def _wrong_mean_token_prob(logits: Tensor, target: Target) -> Tensor:
    if not target.wrong:  # left out of the table afterwards
        return logits.new_zeros(len(logits))
    return logits.softmax(-1)[:, list(target.wrong)].mean(-1)


@dataclass(frozen=True)
class _Statement(Target):
    """The answer, and the prompt's own tokens, which are scored as well."""

    prompt: tuple[int, ...] = ()


class _StatementLoss:
    """Mean negative log-probability of a statement's tokens, each given those before it."""

    name, unit, higher_is_better = "statement_loss", "nats per token", False

    def plan(self, target: Target) -> Plan:
        """All tokens but the last; every position of the prompt is read, and the answer's."""
        before = len(target.prompt) if isinstance(target, _Statement) else 1
        return Plan(target.answer[:-1], tuple(range(1 - before, len(target.answer))))

    def score(
        self, logits: Float[Tensor, "row scored vocab"], target: Target
    ) -> Float[Tensor, "row"]:
        """One mean per row."""
        text = target.prompt if isinstance(target, _Statement) else ()
        whole = Target((*text[1:], *target.answer))
        return -AnswerLogprob().score(logits, whole) / len(whole.answer)


# -- the work -------------------------------------------------------------------------------------


def evaluate(
    model: HookedModel,
    repairs: Repairs | Sequence[Repairs],
    queries: QuerySets | Iterable[Query],
    facts: Sequence[TwoHopFact],
    *,
    metrics: Sequence[MetricLike] = (),
    generate: bool = True,
    max_new_tokens: int = 8,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Score repairs on sets of queries, before and after each repair.

    Each repair is fitted to all `facts` at once; each query is run under the state of its case. An
    `InPlaceRepair` changes the model for one fact after another, and is asked that fact's queries.

    Args:
        repairs: one or several, each with its own name; an `Edit` stands for itself on every row.
        queries: from `build_sets`, from `portability_sets` for edited single facts, or your own.
        facts: the cases (of edited single facts the `HopEdit.after`); every query's ``case`` is the id of one of them.
        metrics: further metrics to record; their mean before, after and change is in the table.
        generate: also generate texts, for ``said`` and ``generation_correct`` (aliases count there).
            All other columns need no generation.
        max_new_tokens: of the generated texts; raised where an answer needs more.
        batch_size: prompts in one pass.
        seed: of the bootstrap intervals of the table.
        progress: show a progress bar.

    Returns:
        `Evaluation`: one row per repair and query, with tables, a summary and a figure.

    Raises:
        ValueError: no queries, no repairs or two of one name, a query of an unknown case, facts
            with one id, a repair that gives another number of states than there are facts, an
            in-place repair that does not restore the model, or a score that is not finite.
        TokenError: an answer that cannot be tokenised after its prompt, or too long a prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.Hopland().sample(train=0, held_out=20))
        >>> queries = mi_hops.build_sets(model, gap.failed, gap=gap, per_case=1)
        >>> repair = mi_hops.MemoryInjection(1, 4.0, positions="first hop", absent="leave")
        >>> scores = mi_hops.evaluate(model, repair, queries, gap.failed, generate=False)
        >>> scores.summary().index.tolist() == ["unrepaired", repair.name]
        True
    """
    named = named_repairs(repairs)
    asked, skipped = _checked(named, queries, facts)
    extra = get_metrics(metrics) if len(metrics) else []
    job = _Job(model, asked, extra, batch_size, max_new_tokens if generate else 0)
    total = (1 + len(named)) * len(asked)
    states: dict[str, Sequence[Any]] = {}
    after, kl = {}, {}
    with progress_bar(label="evaluate", show=progress, total=total, unit="query") as bar:
        before = job.scores(None, None)
        bar.update(len(asked))
        for repair in named:
            if isinstance(repair, Repair):
                states[repair.name] = job.states(repair, facts)
                after[repair.name] = job.scores(repair, states[repair.name])
            else:
                states[repair.name] = [repair] * len(asked)
                after[repair.name], kl[repair.name] = job.in_place(repair, facts)
            bar.update(len(asked))
    by_row = [repair for repair in named if isinstance(repair, Repair)]
    found = job.divergences(by_row, [states[repair.name] for repair in by_row])
    kl |= {repair.name: values for repair, values in zip(by_row, found, strict=True)}
    frames = [job.frame(n, given, after[n], kl[n], before) for n, given in states.items()]
    settings: dict[str, Any] = {
        "method": "evaluate",
        "seed": seed,
        "repairs": [repair.name for repair in named],
        "metrics": {m.name: m.unit for m in extra},
        "generated": generate,
        "max_new_tokens": max_new_tokens,
    }
    if isinstance(queries, QuerySets):
        settings["sets"] = dict(queries.settings)
    ids = tuple(fact.id for fact in facts)
    frame = pd.concat(frames, ignore_index=True)
    return Evaluation(frame, ids, skipped, provenance(model, **settings))


def named_repairs(repairs: Repairs | Sequence[Repairs]) -> list[Repair | InPlaceRepair]:
    """Repairs as a list; edits among them as repairs, numbered where there are several.

    Raises:
        ValueError: something else than a repair.
    """
    given: list[Any] = list(repairs) if isinstance(repairs, list | tuple) else [repairs]
    edits = [item for item in given if isinstance(item, Edit)]
    names = {id(e): "edit" if len(edits) == 1 else f"edit {i}" for i, e in enumerate(edits, 1)}
    named: list[Repair | InPlaceRepair] = []
    for item in given:
        if isinstance(item, Edit):
            item = EditRepair(item, name=names[id(item)])
        if not isinstance(item, Repair | InPlaceRepair):
            raise ValueError(
                f"{item!r:.80} is not a repair; expected an Edit, or an object with name, fit and hooks "
                "(or with name and applied)"
            )
        named.append(item)
    return named


def _checked(
    repairs: Sequence[Repair | InPlaceRepair],
    queries: QuerySets | Iterable[Query],
    facts: Sequence[TwoHopFact],
) -> tuple[list[Query], tuple[tuple[str, str, str], ...]]:
    """The queries in the order of their sets, and (set, case, reason) of what was skipped."""
    names = [r.name for r in repairs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more repairs, each with its own name; got {names}")
    ids = [fact.id for fact in facts]
    require_unique("fact ids", ids)
    asked = list(queries)
    if not asked:
        raise ValueError(
            "there are no queries to score; build_sets(...).describe() says why sets are empty"
        )
    unknown_cases = sorted({q.case for q in asked} - set(ids))
    if unknown_cases:
        raise ValueError(
            f"queries of unknown case(s) {unknown_cases[:5]}; each query's case must be the id of one "
            f"of the {len(ids)} facts given, which begin with {ids[:5]}"
        )
    require_unique("query ids", (q.query_id for q in asked))
    asked.sort(key=lambda q: PLACE.get(q.set, len(PLACE)))  # stable
    if isinstance(queries, QuerySets):
        return asked, tuple(entry for entry in queries.skipped if entry[1] in set(ids))
    has = {(q.set, q.case) for q in asked}
    sets = dict.fromkeys(q.set for q in asked)
    return asked, tuple((s, i, "no query") for s in sets for i in ids if (s, i) not in has)


class _Job:
    """The queries as tokens and targets, scored under one repair after another."""

    def __init__(
        self,
        model: HookedModel,
        queries: Sequence[Query],
        metrics: Sequence[Metric],
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.model, self.queries, self.batch_size = model, queries, batch_size
        self.extra, self.max_new_tokens = metrics, max_new_tokens
        texts = {q.prompt: encode(model, q.prompt) for q in queries}
        self.prompts = [texts[q.prompt] for q in queries]
        self.targets = [
            target_of(model, p, q.answer, q.wrong)
            for p, q in zip(self.prompts, queries, strict=True)
        ]
        names = ("first_prob", "first_correct", "answer_logprob", "mean_token_prob", "rank")
        own = [get_metric(name) for name in names]
        own += [
            Greedy(end_ids(model), name="exact_match"),
            NextToken("wrong_mean_token_prob", "probability", True, _wrong_mean_token_prob),
        ]
        self.metrics = get_metrics([*own, *metrics])
        self.kl_rows = [i for i, q in enumerate(queries) if q.set in KL_SETS]
        self.text_rows = [i for i, q in enumerate(queries) if q.set in TEXT_SETS]

    def scores(self, repair: Repair | None, states: Sequence[Any] | None) -> dict[str, Any]:
        """Column -> values ``[query]`` of the model under a repair (None: as it is)."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "repair": repair}
        tensors = score_prompts(
            self.model, self.prompts, self.targets, self.metrics, states=states, **options
        )
        found: dict[str, Any] = {name: score.double().numpy() for name, score in tensors.items()}
        none = np.array([q.wrong is None for q in self.queries])
        found["wrong_mean_token_prob"] = np.where(none, np.nan, found["wrong_mean_token_prob"])
        ahead = found["mean_token_prob"] > found["wrong_mean_token_prob"]
        found["target_over_wrong"] = np.where(none, np.nan, ahead)
        found["statement_loss"] = self._statement_loss(states, options)
        if self.max_new_tokens:
            found["said"], found["generation_correct"] = self._said(states, options)
        return found

    def states(self, repair: Repair, facts: Sequence[TwoHopFact]) -> list[Any]:
        """Of each query, from the repair's fit."""
        made = list(repair.fit(self.model, facts))
        if len(made) != len(facts):
            raise ValueError(
                f"repair {repair.name!r} gave {len(made)} states for {len(facts)} facts; a "
                "Repair's fit must return one per fact"
            )
        of_case = {fact.id: state for fact, state in zip(facts, made, strict=True)}
        return [of_case[q.case] for q in self.queries]

    def in_place(
        self, repair: InPlaceRepair, facts: Sequence[TwoHopFact]
    ) -> tuple[dict[str, Any], Float[np.ndarray, "query"]]:
        """Column -> values, and divergences, with the model repaired for one fact after another."""
        columns: dict[str, list[Any]] = defaultdict(lambda: [np.nan] * len(self.queries))
        kl, whole = np.full(len(self.queries), np.nan), fingerprint(self.model)
        for fact in facts:
            rows = [i for i, q in enumerate(self.queries) if q.case == fact.id]
            if not rows:
                continue
            queries = [self.queries[i] for i in rows]
            own = _Job(self.model, queries, self.extra, self.batch_size, self.max_new_tokens)
            before = own.next_logprobs()
            with repair.applied(self.model, fact):
                found = own.scores(None, None)
                changed = kl_divergence(before, own.next_logprobs()).double()
            if fingerprint(self.model) != whole:
                raise ValueError(
                    f"repair {repair.name!r} left the model changed after fact {fact.id!r}; its applied "
                    "must restore the model at the end of the with block (load the model again)"
                )
            for name, values in found.items():
                for i, value in zip(rows, values, strict=True):
                    columns[name][i] = value
            kl[[rows[i] for i in own.kl_rows]] = changed.numpy()
        return dict(columns), kl

    def frame(
        self,
        repair: str,
        states: Sequence[Any],
        after: dict[str, Any],
        kl: np.ndarray,
        before: dict[str, Any],
    ) -> pd.DataFrame:
        """One row per query."""
        names = ("case", "set", "query_id", "prompt", "answer", "wrong")
        frame = pd.DataFrame({n: [getattr(q, n) for q in self.queries] for n in names})
        # Text and None, not NaN, whatever the version of pandas makes of None.
        frame["wrong"] = pd.Series([q.wrong for q in self.queries], dtype=object)
        frame.insert(0, "repair", repair)
        frame["repaired"] = [state is not None for state in states]
        for name in after:
            frame[f"{name}_before"] = before[name]
            frame[f"{name}_after"] = after[name]
        frame["kl"] = kl
        return frame

    def _statement_loss(self, states: Sequence[Any] | None, options: dict[str, Any]) -> np.ndarray:
        found = np.full(len(self.queries), np.nan)
        rows = self.text_rows
        if rows:
            prompts = [self.prompts[i] for i in rows]
            targets = [
                _Statement(self.targets[i].answer, prompt=p.ids)
                for i, p in zip(rows, prompts, strict=True)
            ]
            given = None if states is None else [states[i] for i in rows]
            loss = [_StatementLoss()]
            score = score_prompts(self.model, prompts, targets, loss, states=given, **options)
            found[rows] = score["statement_loss"].double().numpy()
        return found

    def next_logprobs(self) -> Float[Tensor, "query vocab"]:
        """Of each query that is in `KL_SETS`, of the model as it is."""
        prompts = [self.prompts[i] for i in self.kl_rows]
        if not prompts:
            return torch.empty(0, 1)
        logits = next_token_logits(self.model, prompts, batch_size=self.batch_size)
        return torch.stack(logits).log_softmax(-1)

    def divergences(
        self, repairs: Sequence[Repair], states: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, "repair query"]:
        """KL(unrepaired || repaired) of each prompt's next token, in nats; NaN off `KL_SETS`.

        The unrepaired distributions are made batch by batch, once for all repairs, so that memory
        does not grow with the queries.
        """
        prompts = [self.prompts[i] for i in self.kl_rows]
        wide = wide_dtype(dtype_of(self.model))
        found = torch.empty(len(repairs), len(prompts), dtype=wide)
        total = len(repairs) * len(prompts)
        with torch.no_grad(), progress_bar(label="divergences", total=total, unit="query") as bar:
            for (chosen, _), kl in each_part(
                self.model,
                batches_for(self.model, [p.ids for p in prompts], self.batch_size),
                lambda part: self._divergences(*part, repairs, states),
                kept=lambda part: (
                    "kl",
                    [repair.name for repair in repairs],
                    [prompts[i].ids for i in part[0]],
                ),
                texts=lambda part: [prompts[i].text for i in part[0]],
            ):
                for r, values in enumerate(kl):
                    found[r, chosen] = values.cpu()
                    bar.update(len(chosen))
        require_finite("kl", found.flatten())
        whole = np.full((len(repairs), len(self.queries)), np.nan)
        whole[:, self.kl_rows] = found.double().numpy()
        return whole

    def _divergences(
        self,
        chosen: Sequence[int],
        batch: Batch,
        repairs: Sequence[Repair],
        states: Sequence[Sequence[Any]],
    ) -> list[Float[Tensor, "row"]]:
        """Of one batch under each repair."""
        prompts = [self.prompts[self.kl_rows[i]] for i in chosen]
        rows = Rows(tuple(prompts), batch.tokens.shape[1])

        def logprobs(hooks: Sequence[Hook]) -> Float[Tensor, "row vocab"]:
            logits = logits_at(self.model, batch.tokens, batch.last[:, None], hooks=hooks)
            return logits[:, 0].to(wide_dtype(dtype_of(self.model))).log_softmax(-1)

        before = logprobs(())
        found = []
        for repair, given in zip(repairs, states, strict=True):
            own = [given[self.kl_rows[i]] for i in chosen]
            found.append(kl_divergence(before, logprobs(repair.hooks(self.model, own, rows))))
        return found

    def _said(
        self, states: Sequence[Any] | None, options: dict[str, Any]
    ) -> tuple[list[str], np.ndarray]:
        # The same prompt in two sets, or unrepaired in many cases, is generated once.
        given = [None] * len(self.queries) if states is None else states
        keys = [
            (q.prompt, q.answer, q.aliases, id(state))
            for q, state in zip(self.queries, given, strict=True)
        ]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())
        replies = answered(
            self.model,
            [self.prompts[i] for i in rows],
            [self.queries[i].answer for i in rows],
            [self.queries[i].aliases for i in rows],
            max_new_tokens=self.max_new_tokens,
            states=None if states is None else [states[i] for i in rows],
            **options,
        )
        by_row = dict(zip(rows, replies, strict=True))
        said = [by_row[first[key]] for key in keys]
        return [reply.text for reply in said], np.array([float(reply.right) for reply in said])
