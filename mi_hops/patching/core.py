"""The cells of a grid as interventions on many prompts, and their scores as a labelled result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, capture, provenance
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import HEAD_AXIS, Change, Intervention, Site
from mi_hops.sweep.interventions import replace as replaced
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import KL, Custom, FullLogits, Metric, MetricLike, Target, get_metrics
from mi_hops.sweep.runs import Scored, run_sweep
from mi_hops.sweep.scoring import next_token_logits
from mi_hops.sweep.sites import Cell, Grid
from mi_hops.text.tokens import Prompt, pad

#: (cell, block, number of a sample) -> the change that the cell makes there.
ChangeOf = Callable[[Cell, int, int], Change]

#: (example, row, activations) -> its changes. The activations, by hook name, are those of the prompts
#: that ride along; they are there, at that row, by the time a change acts.
ChangesOf = Callable[[int, int, Mapping[str, "Tensor"]], ChangeOf]


# -- taking an activation and putting it in ---------------------------------------------------------


def captured(
    model: HookedModel, prompts: Sequence[Prompt], names: Iterable[str]
) -> dict[str, Tensor]:
    """Activations of right-padded prompts at hook points from one forward pass."""
    with torch.no_grad():
        return capture(model, pad([p.ids for p in prompts]).tokens, names)[0]


def taken(activation: Tensor, cell: Cell, positions: Sequence[int], length: int) -> Tensor:
    """What of one prompt's activation a cell is about, as an intervention at these positions sees it.

    It is a copy of that part alone, so a sweep holds no more than its cells need.

    Args:
        activation: of one prompt: ``[pos, d]``, ``[pos, head, d_head]``, ``[head, query, key]``.
        length: real tokens of that prompt; keys beyond them are cut off.
    """
    where = list(positions)
    if HEAD_AXIS[cell.kind] == 1:
        heads = activation if cell.head is None else activation[cell.head]
        return heads[..., where, :length]
    return (activation if cell.unit is None else activation[:, cell.unit])[where]


def put(value: Tensor, cell: Cell) -> Change:
    """Put `value` in place of what the cell is about; other neurons and later keys stay as they are.

    A value of a pattern has the prompt's keys; rows of the same query that reach further (answer
    tokens, padding) attend there to nothing, being causal. A value of a neuron is a number, or one
    per position.
    """

    def one(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., cell.neuron] = value.to(x.device, x.dtype)
        return x

    def rows(x: Tensor) -> Tensor:
        new = x.new_zeros(x.shape)
        new[..., : value.shape[-1]] = value.to(x.device, x.dtype)
        return new

    if cell.neuron is not None:
        return one
    return rows if HEAD_AXIS[cell.kind] == 1 else replaced(value)


# -- metrics ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """One metric, or several.

    Attributes:
        items: None stands for ``"kl"``, which needs the baseline of each example.
        single: whether one was given by itself; then a result has no axis ``metric``.
    """

    items: tuple[Metric | None, ...]
    single: bool

    @classmethod
    def of(cls, given: MetricLike | Sequence[MetricLike]) -> Metrics:
        """From names, metrics and functions.

        Raises:
            ValueError: none, an unknown one, or two of one name.
        """
        single = isinstance(given, str) or not isinstance(given, Sequence)
        listed: Sequence[Any] = [given] if single else given  # type: ignore[assignment]
        found = cls(tuple(None if m == "kl" else get_metrics(m)[0] for m in listed), single)
        names = found.names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected at least one metric, each under its own name, got {names}")
        return found

    @property
    def names(self) -> list[str]:
        """Their names."""
        return ["kl" if m is None else m.name for m in self.items]

    @property
    def units(self) -> list[str]:
        """The unit of each one's score."""
        return ["nats" if m is None else m.unit for m in self.items]

    @property
    def reading_answers(self) -> list[str]:
        """Names of those that read an answer."""
        free = (KL, Custom, FullLogits)
        return [m.name for m in self.items if m is not None and not isinstance(m, free)]

    def scored(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[Target],
        baselines: Sequence[Tensor] | None,
    ) -> list[Scored]:
        """Prompts with targets and metrics; `baselines` are the logits ``"kl"`` compares with."""

        def own(metric: Metric | None, i: int) -> Metric:
            if metric is None:
                assert baselines is not None
                return KL(baselines[i])
            return metric.of(prompts[i]) if isinstance(metric, FullLogits) else metric

        return [
            Scored(prompt, target, tuple(own(metric, i) for metric in self.items))
            for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
        ]

    def baselines(self, model: HookedModel, prompts: Sequence[Prompt]) -> list[Tensor] | None:
        """The logits of `prompts` that ``"kl"`` compares with; None where it is not asked for."""
        return next_token_logits(model, prompts) if None in self.items else None


# -- running a grid -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridSweep:
    """A grid of cells on base prompts.

    Attributes:
        labels: of the prompts in a result.
    """

    model: HookedModel
    prompts: Sequence[Prompt]
    grid: Grid
    metrics: Metrics
    labels: Sequence[Any]
    limits: Limits

    def groups(self) -> list[list[int]]:
        """Examples that share a fan-out, those of similar length together."""
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), i))
        size = self.limits.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def interventions(
        self, example: int, base: int, change_of: ChangeOf, samples: int = 1
    ) -> list[Intervention]:
        """All cells in one example, whose row is `base`; ``[cell][sample]`` in that order."""
        items = []
        for cell in self.grid.cells:
            where = self.grid.base[example][cell.span]
            sites = tuple(Site(cell.kind, layer, where, cell.head) for layer in cell.layers)
            for s in range(samples):
                changes = tuple(change_of(cell, layer, s) for layer in cell.layers)
                items.append(Intervention(sites, changes, base))
        return items

    def run(
        self,
        bases: Sequence[Scored],
        changes_of: ChangesOf,
        *,
        samples: int = 1,
        sources: Sequence[Scored] = (),
    ) -> tuple[
        Float[Tensor, "example cell metric"],
        Float[Tensor, "example metric"],
        Float[Tensor, "example metric"],
    ]:
        """Scores under each cell (mean over samples), of the bases as they are, and of the sources.

        Args:
            sources: one per base, run in the same pass; `changes_of` is shown their activations at
                the hook points of the grid.
        """

        def rows_of(example: int, base: int, shown: Mapping[str, Tensor]) -> list[Intervention]:
            return self.interventions(example, base, changes_of(example, base, shown), samples)

        found = run_sweep(
            self.model,
            bases,
            rows_of,
            limits=self.limits,
            sources=sources,
            names=self.grid.hook_names(),
        )
        rows = torch.stack(found.rows)
        scores = reduce(rows, "e (cell sample) m -> e cell m", "mean", sample=samples)
        return scores, found.base, found.sources

    def result(
        self,
        values: Mapping[str, Float[Tensor, "example cell metric"]],
        baselines: Mapping[str, Float[Tensor, "example metric"]],
        *,
        title: str,
        units: Mapping[str, str],
        skipped: Sequence[tuple[str, str]] = (),
        **settings: Any,
    ) -> Result:
        """A labelled result of values and baselines.

        Args:
            units: of the values and baselines whose unit is not the metric's own.
            settings: what the provenance remembers.
        """
        single = self.metrics.single
        tail = () if single else ("metric",)
        coords: dict[str, Any] = {"example": list(self.labels), **self.grid.coords}
        known = {k: v for k, v in units.items() if k in values or k in baselines}
        if single:
            known = dict.fromkeys((*values, *baselines), self.metrics.units[0]) | known
        else:
            coords["metric"] = self.metrics.names
            coords["unit"] = (("metric",), np.asarray(self.metrics.units))
        tokens = self.grid.tokens(self.prompts)
        if tokens is not None:
            coords["token"] = (("example", "position"), np.asarray(tokens, dtype=object))

        def labelled(value: Tensor, *dims: str) -> tuple[tuple[str, ...], Tensor]:
            value = rearrange(value, "... 1 -> ...") if single else value
            return ("example", *dims, *tail), value

        return Result.from_arrays(
            {n: labelled(self.grid.reshape(v), *self.grid.coords) for n, v in values.items()},
            baselines={name: labelled(value) for name, value in baselines.items()},
            coords=coords,
            units=known,
            provenance=provenance(
                self.model, **settings, metrics=self.metrics.names, kinds=list(self.grid.kinds)
            ),
            title=title,
            skipped=skipped,
            allow_nonfinite=True,  # an effect without a scale; scores were checked before
        )


def require_effect(effect: Tensor, why: str) -> None:
    """Refuse, with a ValueError that says why, effects of which none is a number."""
    if effect.isnan().all():
        raise ValueError(f"no effect is defined: {why}")
