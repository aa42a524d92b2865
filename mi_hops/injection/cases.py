"""Facts with the places to inject at, and their scores under many injections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, Skipped, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.memory import Place, adding, places
from mi_hops.model import HookedModel
from mi_hops.sweep.interventions import Intervention, Site
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Metric, Target
from mi_hops.sweep.runs import Scored, run_sweep
from mi_hops.text.tokens import Prompt, encode


@dataclass(frozen=True)
class InjectionCase:
    """One fact, ready to run.

    Attributes:
        prompt, target: what is asked, and what is scored.
        where: positions to intervene at; None for all, answer tokens that a metric appends
            included.
    """

    fact: TwoHopFact
    prompt: Prompt
    target: Target
    where: tuple[int, ...] | None


def make_cases(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None,
    positions: Place,
    metrics: Sequence[Metric],
) -> tuple[list[InjectionCase], Skipped]:
    """Facts that can be run, and (id, reason) of those that cannot.

    Raises:
        NoUsableFactError: no fact is left.
    """
    everywhere = positions == "all" or (isinstance(positions, list | tuple) and "all" in positions)

    def prepare(case: Case) -> InjectionCase:
        longest = max(len(metric.plan(case.target).extra) for metric in metrics)
        encode(model, case.prompt.text, prepend_bos=case.prompt.has_bos, max_extra=longest)
        where = places(case.prompt, positions, case.fact.first_hop)
        return InjectionCase(case.fact, case.prompt, case.target, None if everywhere else where)

    return usable(model, facts, prepare, purpose="an injection", form=form)


def injecting(
    case: InjectionCase,
    base: int,
    vectors: Mapping[int, Float[Tensor, "d_model"]],
    strength: float,
    *,
    kind: str = "attn_out",
    relative: bool = False,
) -> Intervention:
    """A row of a case in which each layer gets its vector, at the case's positions."""
    return Intervention(
        tuple(Site(kind, layer, case.where) for layer in vectors),
        tuple(adding(vector, strength, relative=relative) for vector in vectors.values()),
        base,
    )


def run_cases(
    model: HookedModel,
    cases: Sequence[InjectionCase],
    rows_of: Callable[[int, InjectionCase, int], list[Intervention]],
    metrics: Sequence[Metric],
    *,
    limits: Limits,
    label: str,
) -> tuple[Float[Tensor, "case metric"], Float[Tensor, "case row metric"]]:
    """Scores of each case untouched, and under each of its interventions, in float64 on the CPU.

    Args:
        rows_of: (index of the case, case, base row) -> its interventions, equally many for all.
    """
    found = run_sweep(
        model,
        [Scored(case.prompt, case.target, tuple(metrics)) for case in cases],
        lambda i, base, _: rows_of(i, cases[i], base),
        limits=limits,
        label=label,
    )
    return found.base.double(), torch.stack(found.rows).double()
