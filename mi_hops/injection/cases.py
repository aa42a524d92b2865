"""Facts made ready for fan-out passes, and the passes themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.injection.memory import Place, adding, places
from mi_hops.model import HookedModel
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.fanout import Intervention, Site, fan_out
from mi_hops.sweep.metrics import Metric, Target, target_of
from mi_hops.text.tokens import Prompt, encode, pad

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact


@dataclass(frozen=True)
class Case:
    """One fact, ready to run.

    Attributes:
        prompt, target: what is asked, and what is scored.
        extra: answer tokens appended to the prompt, as the metrics plan them.
        where: positions to intervene at.
    """

    fact: TwoHopFact
    prompt: Prompt
    target: Target
    extra: tuple[int, ...]
    where: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the run."""
        return (*self.prompt.ids, *self.extra)


def make_cases(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None,
    positions: Place,
    metrics: Sequence[Metric],
) -> tuple[list[Case], list[tuple[str, str]]]:
    """Facts that can be run, and (id, reason) of those that cannot.

    Raises:
        NoUsableFactError: no fact is left.
    """
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    wants_all = positions == "all" or (isinstance(positions, list | tuple) and "all" in positions)
    for fact in facts:
        try:
            prompt = encode(model, fact.prompt(form))
            target = target_of(model, prompt, fact.answer)
            extra = max((m.plan(target).extra for m in metrics), key=len)
            encode(model, prompt.text, prepend_bos=prompt.has_bos, max_extra=len(extra))
            where = places(prompt, positions, fact.first_hop)
        except ValueError as error:
            skipped.append((fact.id, str(error)))
            continue
        if wants_all:
            where = (*where, *range(len(prompt), len(prompt) + len(extra)))
        cases.append(Case(fact, prompt, target, extra, where))
    if not cases:
        raise NoUsableFactError("an injection", skipped)
    return cases, skipped


def injecting(
    case: Case,
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
    cases: Sequence[Case],
    rows_of: Callable[[int, Case, int], list[Intervention]],
    metrics: Sequence[Metric],
    *,
    facts_per_pass: int = 8,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
    label: str = "facts",
) -> tuple[Float[Tensor, "case metric"], Float[Tensor, "case row metric"]]:
    """Scores of each case untouched, and under each of its interventions.

    Args:
        rows_of: (index of the case, case, base row) -> its interventions, equally many for all.
        facts_per_pass: base prompts in one pass; cases of similar length go together.
        max_rows, memory: as in `fanout.fan_out`.

    Returns:
        Both in float64 on the CPU.
    """
    from tqdm.auto import tqdm

    before = torch.empty(len(cases), len(metrics), dtype=torch.float64)
    after: Tensor | None = None
    with tqdm(total=len(cases), disable=not progress, desc=label) as bar:
        for chosen in _passes(cases, metrics, facts_per_pass):
            part = [cases[i] for i in chosen]
            rows = [
                row
                for base, (i, case) in enumerate(zip(chosen, part, strict=True))
                for row in rows_of(i, case, base)
            ]
            scored, reduce = _reading(part, metrics)
            found = fan_out(
                model,
                pad([c.ids for c in part]),
                rows,
                scored=scored,
                reduce=reduce,
                max_rows=max_rows,
                memory=memory,
            )
            values = found.rows.double().cpu().reshape(len(part), -1, len(metrics))
            if after is None:
                after = values.new_empty(len(cases), *values.shape[1:])
            before[chosen], after[chosen] = found.base.double().cpu(), values
            bar.update(len(part))
    assert after is not None  # there is at least one case
    return before, after


def _passes(
    cases: Sequence[Case], metrics: Sequence[Metric], facts_per_pass: int
) -> list[list[int]]:
    """Cases of one pass read equally many positions; those of similar length go together."""
    if facts_per_pass < 1:
        raise ValueError(f"facts_per_pass is {facts_per_pass}; expected at least 1")
    groups: dict[int, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(len(_offsets(case.target, metrics)), []).append(i)
    passes = []
    for members in groups.values():
        members.sort(key=lambda i: (len(cases[i].ids), i))
        passes += [members[k : k + facts_per_pass] for k in range(0, len(members), facts_per_pass)]
    return passes


def _offsets(target: Target, metrics: Sequence[Metric]) -> list[int]:
    """Positions to read, relative to the prompt's last token, for all metrics together."""
    return sorted({p for m in metrics for p in m.plan(target).scored})


def _reading(part: Sequence[Case], metrics: Sequence[Metric]) -> tuple[list[list[int]], Any]:
    """The positions a pass scores, and the function from its logits to ``[row, metric]``."""
    offsets = [_offsets(case.target, metrics) for case in part]
    scored = [[case.prompt.last + p for p in at] for case, at in zip(part, offsets, strict=True)]

    def reduce(logits: Tensor, bases: list[int]) -> Tensor:
        wide = wide_dtype(logits.dtype)
        out = torch.empty(len(bases), len(metrics), dtype=wide, device=logits.device)
        of = torch.tensor(bases, device=logits.device)
        for base in sorted(set(bases)):
            rows = (of == base).nonzero().flatten()
            for k, metric in enumerate(metrics):
                columns = [offsets[base].index(p) for p in metric.plan(part[base].target).scored]
                out[rows, k] = metric.score(logits[rows][:, columns], part[base].target).to(wide)
        return out

    return scored, reduce
