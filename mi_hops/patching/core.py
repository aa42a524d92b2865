"""The cells of a grid as interventions on many prompts, and their scores as a labelled result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.model import HookedModel, capture, dtype_of, provenance
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.interventions import HEAD_AXIS, Change, Intervention, Site
from mi_hops.sweep.interventions import replace as replaced
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import KL, Metric, MetricLike, Target, get_metrics
from mi_hops.sweep.pairs import Spans, as_targets, example_labels
from mi_hops.sweep.runs import Scored, Scores, Sweep, keep_in
from mi_hops.sweep.scoring import logits_at
from mi_hops.sweep.sites import Cell, Grid
from mi_hops.text.tokens import Prompt, pad

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: The change that cell `cell` makes at block `layer` in example `example`, in its sample number `s`.
Values = Callable[[int, Cell, int, int], Change]

#: Makes the `Values` of a few examples at a time, so that what they hold is bounded.
ValuesOf = Callable[[Sequence[int]], Values]

#: The same from activations of source prompts, which are there by the time a change acts.
ValuesFrom = Callable[[Sequence[int], Mapping[str, "Tensor"]], Values]


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
    a position.
    """
    if cell.neuron is not None:
        neuron = cell.neuron

        def one(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., neuron] = value.to(x.device, x.dtype)
            return x

        return one
    if HEAD_AXIS[cell.kind] == 1:

        def rows(x: Tensor) -> Tensor:
            new = x.new_zeros(x.shape)
            new[..., : value.shape[-1]] = value.to(x.device, x.dtype)
            return new

        return rows
    return replaced(value)


# -- running a grid -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """A grid of cells on base prompts.

    Attributes:
        positions: where each span lies in each base prompt, ``[example][span]``.
        batch_size: examples in one fan-out.
    """

    model: HookedModel
    bases: Sequence[Scored]
    positions: Sequence[Sequence[tuple[int, ...]]]
    grid: Grid
    batch_size: int = 16
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    def groups(self) -> list[list[int]]:
        """Examples that share a fan-out, those of similar length together."""
        order = sorted(range(len(self.bases)), key=lambda i: (len(self.bases[i].prompt), i))
        return [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]

    def interventions(
        self, group: Sequence[int], values: Values, samples: int = 1
    ) -> list[Intervention]:
        """All cells in all examples of a group; ``[example][cell][sample]`` in that order."""
        items = []
        for i, example in enumerate(group):
            for cell in self.grid.cells:
                where = self.positions[example][cell.span]
                sites = tuple(Site(cell.kind, layer, where, cell.head) for layer in cell.layers)
                for s in range(samples):
                    changes = tuple(values(example, cell, layer, s) for layer in cell.layers)
                    items.append(Intervention(sites, changes, base=i))
        return items

    def run(
        self, values_of: ValuesOf, samples: int = 1
    ) -> tuple[Float[Tensor, "example cell metric"], Float[Tensor, "example metric"]]:
        """Scores under each cell (mean over samples), and of the base prompts as they are."""
        scores, intact, _ = self._run(lambda group, shown: values_of(group), samples, [])
        return scores, intact

    def run_from(
        self, sources: Sequence[Scored], values_of: ValuesFrom
    ) -> tuple[
        Float[Tensor, "example cell metric"],
        Float[Tensor, "example metric"],
        Float[Tensor, "example metric"],
    ]:
        """Scores under each cell, of the base prompts, and of a source prompt for each of them.

        A source rides along in the pass of its base, so its activations at the grid's hooks cost no
        pass of their own; `values_of` gets the mapping that they will appear in, and its changes read
        it when they act.
        """
        return self._run(values_of, 1, sources)

    def _run(
        self, values_of: ValuesFrom, samples: int, sources: Sequence[Scored]
    ) -> tuple[Tensor, Tensor, Tensor]:

        groups = self.groups()
        n_cells, n_metrics = len(self.grid.cells), len(self.bases[0].metrics)
        wide = wide_dtype(dtype_of(self.model))
        scores = torch.empty(len(self.bases), n_cells, n_metrics, dtype=wide)
        intact = torch.empty(len(self.bases), n_metrics, dtype=wide)
        others = torch.empty(len(sources), n_metrics, dtype=wide)
        many = self.limits.progress and len(groups) > 1
        limits = replace(self.limits, progress=self.limits.progress and not many)

        def run(group: Sequence[int]) -> Scores:
            riding = [sources[i] for i in group] if sources else []
            sweep = Sweep(self.model, [*(self.bases[i] for i in group), *riding])
            shown: dict[str, Tensor] = {}
            observe = keep_in(shown, self.grid.hook_names(), len(group)) if riding else None
            items = self.interventions(group, values_of(group, shown), samples)
            return sweep.run(items, limits, observe)

        for whole in progress_bar(groups, label="groups of examples", show=many):
            for group, found in batched_with_oom_backoff(whole, len(whole), run):
                n = len(group)
                scores[group] = found.rows.reshape(n, n_cells, samples, n_metrics).mean(2)
                intact[group] = found.base[:n]
                if sources:
                    others[group] = found.base[n:]
        return scores, intact, others


# -- metrics ------------------------------------------------------------------------------------------


def resolve_metrics(
    metric: MetricLike | Sequence[MetricLike],
) -> tuple[list[Metric | None], list[str], bool]:
    """Metrics, their names, and whether there is one given by itself.

    ``"kl"`` stands as None: it needs the baseline of each example (see `scored`).
    """
    single = isinstance(metric, str) or not isinstance(metric, Sequence)
    given: Sequence[MetricLike] = [metric] if single else metric  # type: ignore[list-item,assignment]
    found: list[Metric | None] = [None if m == "kl" else get_metrics(m)[0] for m in given]
    names = [_KL_NAME if m is None else m.name for m in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected at least one metric, each under its own name, got {names}")
    return found, names, single


_KL_NAME = "kl"


def scored(
    prompts: Sequence[Prompt],
    targets: Sequence[Target],
    metrics: Sequence[Metric | None],
    baselines: Sequence[Tensor] | None,
) -> list[Scored]:
    """Prompts with their targets and metrics; `baselines` are the logits ``"kl"`` compares with."""
    out = []
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        own = tuple(
            m if m is not None else KL(baselines[i])  # type: ignore[index]
            for m in metrics
        )
        out.append(Scored(prompt, target, own))
    return out


def scored_alone(
    model: HookedModel,
    prompts: Sequence[Prompt],
    answer: str | Target | Sequence[str | Target] | None,
    wrong: str | Sequence[str] | None,
    metrics: Sequence[Metric | None],
) -> list[Scored]:
    """Prompts that belong to no pair: ``"kl"`` compares with the prompt's own untouched run.

    Raises:
        ValueError, TokenError: as in `as_targets`.
    """
    targets = as_targets(model, prompts, answer, wrong, metrics)
    baselines = next_token_logits(model, prompts) if None in metrics else None
    return scored(prompts, targets, metrics, baselines)


def next_token_logits(
    model: HookedModel, prompts: Sequence[Prompt]
) -> list[Float[Tensor, "vocab"]]:
    """Logits after each prompt, in float32 or wider, on the CPU."""
    wide = wide_dtype(dtype_of(model))

    def run(part: Sequence[int]) -> Tensor:
        batch = pad([prompts[i].ids for i in part])
        with torch.no_grad():
            return logits_at(model, batch.tokens, batch.last[:, None])[:, 0].to("cpu", wide)

    found: dict[int, Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for part, logits in batched_with_oom_backoff(order, 64, run):
        found |= zip(part, logits, strict=True)
    return [found[i] for i in range(len(prompts))]


def units_of(metrics: Sequence[Metric | None]) -> list[str]:
    """Unit of each metric's score."""
    return ["nats" if m is None else m.unit for m in metrics]


# -- results ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """What a result of per-example, per-cell, per-metric numbers is labelled with."""

    grid: Grid
    spans: Spans
    bases: Sequence[Prompt]
    metrics: Sequence[Metric | None]
    names: Sequence[str]
    single: bool
    examples: Sequence[str] | None

    def result(
        self,
        model: HookedModel,
        values: Mapping[str, Tensor],
        baselines: Mapping[str, Tensor],
        *,
        title: str,
        units: Mapping[str, str],
        settings: Mapping[str, Any],
        skipped: Sequence[tuple[str, str]] = (),
    ) -> Result:
        """A `Result` of ``[example, cell, metric]`` values and ``[example, metric]`` baselines.

        Args:
            units: of the values and baselines whose unit is not the metric's own.

        Raises:
            ValueError: another number of example labels than examples.
        """
        import numpy as np

        tail = () if self.single else ("metric",)
        last: Any = 0 if self.single else slice(None)
        dims = ("example", *self.grid.dims, *tail)
        arrays = {
            name: (dims, self.grid.reshape(value)[..., last].contiguous())
            for name, value in values.items()
        }
        base_dims = ("example", *tail)
        base_arrays = {name: (base_dims, value[..., last]) for name, value in baselines.items()}
        labels = example_labels(self.examples, len(self.bases))
        coords: dict[str, Any] = {"example": labels, **self.grid.coords}
        own = units_of(self.metrics)
        known = dict(units)
        if self.single:
            for name in (*values, *baselines):
                known.setdefault(name, own[0])
        else:
            coords["metric"] = list(self.names)
            coords["unit"] = (("metric",), np.asarray(own))
        tokens = self.spans.tokens(self.bases) if self.spans.axis else None
        if tokens is not None:
            coords["token"] = (("example", "position"), np.asarray(tokens, dtype=object))
        return Result.from_arrays(
            arrays,
            baselines=base_arrays,
            coords=coords,
            units=known,
            provenance=provenance(
                model, **settings, metrics=list(self.names), kinds=list(self.grid.kinds)
            ),
            title=title,
            skipped=skipped,
            allow_nonfinite=True,  # an effect without a scale; scores were checked before
        )
