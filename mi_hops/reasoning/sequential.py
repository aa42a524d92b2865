"""What survives when edits pile up in one model: scores after the first, the tenth, the hundredth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from mi_hops.editing import Edit, EditRepair, stack
from mi_hops.editing.rows import require_not_applied
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.reasoning.aggregate import with_interval
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.queries import Query, QuerySets

SIZES = (1, 10, 100)


def evaluate_sequential(
    model: HookedModel,
    edits: Sequence[Edit],
    queries: QuerySets | Iterable[Query],
    facts: Sequence[TwoHopFact],
    *,
    sizes: Sequence[int] = SIZES,
    **options: Any,
) -> Evaluation:
    """Score the model with the first n edits all applied, on the queries of their n facts.

    Each size is a repair of its own in the result (``"1 edit"``, ``"10 edits"``, ...), asked for its
    own cases (`Evaluation.case_ids_of`). Its correction shows how many of the first n edits survive
    the later ones, its specificity what all of them together cost. The evaluation's ``frame`` has a
    column ``edit`` besides: the place of the query's case among the edits, from 1, so that old and
    new ones can be told apart.

    Args:
        edits: one for each fact, in the order in which they were made, each on the model as edited
            so far (`creme_sequential`).
        sizes: how many edits are applied; those beyond ``len(edits)`` are left out, and all of them
            are always added.
        options: for `evaluate`.

    Raises:
        ValueError: not one edit per fact, a size below 1; see also `evaluate`.
        WrongWeightsError: the first edit is for other weights than the model's.
        AppliedError: one of the edits is applied to the weights.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing import creme_sequential
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.Hopland().sample(train=0, held_out=12))
        >>> cases = gap.failed[:2]
        >>> queries = mi_hops.build_sets(model, cases, gap=gap, per_case=1)
        >>> edits = creme_sequential(model, cases, layers=[3])
        >>> piled = mi_hops.evaluate_sequential(model, edits, queries, cases, generate=False)
        >>> piled.summary().index.tolist()
        ['unrepaired', '1 edit', '2 edits']
    """
    if not edits or len(edits) != len(facts):
        raise ValueError(f"expected one edit per fact; got {len(edits)} for {len(facts)} facts")
    if wrong := [n for n in sizes if n < 1]:
        raise ValueError(f"sizes {wrong}; expected numbers of edits from 1")
    require_not_applied(model, edits)
    if not isinstance(queries, QuerySets):
        queries = list(queries)
    place = {fact.id: i for i, fact in enumerate(facts, start=1)}
    ids = tuple(place)
    parts: dict[str, Evaluation] = {}
    for n in sorted({*(n for n in sizes if n < len(edits)), len(edits)}):
        together = stack(edits[:n], check=False)
        mine: QuerySets | list[Query]
        if isinstance(queries, QuerySets):
            mine = queries.of_cases(*ids[:n])
        else:
            mine = [q for q in queries if place.get(q.case, n + 1) <= n]
        label = "1 edit" if n == 1 else f"{n} edits"
        if len(mine):
            repair = EditRepair(together, name=label)
            parts[label] = evaluate(model, [repair], mine, facts[:n], **options)
    if not parts:
        raise ValueError(f"none of the {len(queries)} queries belongs to one of the facts")
    frame = pd.concat([part.frame for part in parts.values()], ignore_index=True)
    frame["edit"] = frame["case"].map(place)
    *smaller, last = parts
    return replace(
        parts[last],
        frame=frame,
        provenance={**parts[last].provenance, "repairs": list(parts)},
        case_ids_of={label: parts[label].case_ids for label in smaller},
    )


def retention(evaluation: Evaluation, score: str = "exact_match", **options: Any) -> pd.DataFrame:
    """Edit and test retention after each number of edits, the scores of lifelong editing.

    *ERR* (edit retention rate) is the share of the edits made so far that the model still answers:
    the set ``correction`` (``efficacy`` where single facts were edited). *TRR* (test retention rate) is
    the share of unrelated questions still answered correctly, of those that the unedited model answered:
    the set ``specificity``.

    Args:
        evaluation: from `evaluate_sequential`; of any other, each repair is a row.
        score: an accuracy of the evaluation.
        options: of `Evaluation.table` (``level``, ``n_resamples``, ``seed``).

    Returns:
        Frame indexed by repair ("10 edits") with ``ERR`` and ``TRR``, each with ``_lower``, ``_upper`` and
        ``_n`` (cases).

    Raises:
        ValueError: an evaluation without these sets or this score.

    Source: arXiv 2211.11031, section 3.
    """
    table = evaluation.table(**options)
    sets = set(table.index.get_level_values("set"))
    edited = "correction" if "correction" in sets else "efficacy"
    rows: dict[str, dict[str, float]] = {}
    for repair in dict.fromkeys(table.index.get_level_values("repair")):
        row = rows.setdefault(repair, {})
        for name, asked, when in (
            ("ERR", edited, "after"),
            ("TRR", "specificity", "retained"),
        ):
            key = (repair, asked, f"{score}_{when}")
            if key not in table.index:
                raise ValueError(
                    f"retention needs the score {score!r} on the sets correction (or efficacy) and "
                    f"specificity; the evaluation has {sorted(sets)}"
                )
            found = table.loc[key]
            value, lower, upper = (float(found[c]) for c in ("value", "lower", "upper"))
            row |= with_interval(name, value, lower, upper, int(found["n_cases"]))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("repair")
