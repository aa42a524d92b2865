"""Facts made ready to be injected under any number of memories, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, Skipped, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.encodings import Encoder, encode_each
from mi_hops.injection.place import Place, adding
from mi_hops.model import HookedModel
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Intervention, Site
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, get_metrics
from mi_hops.sweep.runs import Scored, run_sweep
from mi_hops.text.tokens import encode

#: Scores of the answer's first token.
DEFAULT_METRICS = ("first_correct", "first_prob", "first_logprob", "rank")

#: One injection into every fact: layer -> (a vector for each fact, strength).
Row = Mapping[int, tuple[Float[Tensor, "fact d_model"], float]]


@dataclass(frozen=True)
class Cases:
    """Facts that can be run, with the places to inject at.

    Attributes:
        facts, scored: each fact, its prompt, and what it is scored on.
        where: positions in each prompt; None for all, what a metric appends included.
        place: where memories are added.
        skipped: (id, reason) of the facts that cannot be run.
    """

    model: HookedModel
    facts: list[TwoHopFact]
    scored: list[Scored]
    where: list[tuple[int, ...] | None]
    place: Place
    skipped: Skipped

    @classmethod
    def of(
        cls,
        model: HookedModel,
        facts: Sequence[TwoHopFact],
        place: Place,
        *,
        form: str | None,
        metrics: MetricLike | Sequence[MetricLike],
    ) -> Cases:
        """Make facts ready.

        Raises:
            NoUsableFactError: no fact is left.
            ValueError: an unknown metric.
        """
        wanted = tuple(get_metrics(metrics))

        def prepare(case: Case) -> tuple[Case, tuple[int, ...]]:
            longest = max(len(metric.plan(case.target).extra) for metric in wanted)
            encode(model, case.prompt.text, prepend_bos=case.prompt.has_bos, max_extra=longest)
            return case, place.find(case.prompt, case.fact.first_hop)

        found, skipped = usable(model, facts, prepare, purpose="an injection", form=form)
        return cls(
            model,
            [case.fact for case, _ in found],
            [Scored(case.prompt, case.target, wanted) for case, _ in found],
            [None if place.everywhere else where for _, where in found],
            place,
            skipped,
        )

    def __len__(self) -> int:
        return len(self.facts)

    def vectors(
        self, texts: Mapping[str, Sequence[str]], encoder: Encoder
    ) -> Float[Tensor, "memory fact layer d_model"]:
        """Vectors of named memories with one text per fact."""
        each = encode_each(self.model, chain.from_iterable(texts.values()), encoder)
        return torch.stack([torch.stack([each[t] for t in column]) for column in texts.values()])

    def run(
        self, rows: Sequence[Row], *, limits: Limits, label: str, only: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "fact metric"], Float[Tensor, "fact row metric"]]:
        """Scores of each fact untouched, and in each row, in float64 on the CPU.

        Args:
            only: numbers of the facts to run; default all.
        """
        chosen = range(len(self)) if only is None else only

        def rows_of(i: int, base: int, _: Any) -> list[Intervention]:
            fact = chosen[i]
            where, kind, relative = self.where[fact], self.place.kind, self.place.relative
            return [
                Intervention(
                    tuple(Site(kind, layer, where) for layer in row),
                    tuple(adding(v[fact], s, relative=relative) for v, s in row.values()),
                    base,
                )
                for row in rows
            ]

        scored = [self.scored[i] for i in chosen]
        found = run_sweep(self.model, scored, rows_of, limits=limits, label=label)
        return found.base.double(), torch.stack(found.rows).double()

    def result(
        self,
        before: Float[Tensor, "fact metric"],
        after: Float[Tensor, "fact row metric"],
        coords: Mapping[str, Sequence[Any]],
        *,
        more_coords: Mapping[str, Any] | None = None,
        baselines: Mapping[str, Any] | None = None,
        only: Sequence[int] | None = None,
        title: str,
        provenance: dict[str, Any],
    ) -> Result:
        """One variable per metric, its rows those of a grid of `coords`.

        Args:
            baselines: by metric and what was done, besides ``{metric}_before``.
        """
        metrics = self.scored[0].metrics
        dims = ("example", *coords)
        shape = [len(labels) for labels in coords.values()]
        grid = rearrange(after, "fact row metric -> metric fact row").unflatten(2, shape)
        facts = self.facts if only is None else [self.facts[i] for i in only]
        bases = {f"{m.name}_before": ("example", before[:, k]) for k, m in enumerate(metrics)}
        bases |= {name: ("example", values) for name, values in (baselines or {}).items()}
        units = {
            name: metric.unit
            for metric in metrics
            if metric.unit
            for name in (metric.name, *(b for b in bases if b.rpartition("_")[0] == metric.name))
        }
        return Result.from_arrays(
            {metric.name: (dims, values) for metric, values in zip(metrics, grid, strict=True)},
            coords={"example": [fact.id for fact in facts], **coords, **(more_coords or {})},
            baselines=bases,
            units=units,
            title=title,
            skipped=self.skipped,
            allow_nonfinite=True,
            provenance=provenance,
        )
