"""Attribution patching: a linear estimate of every cell's patching effect from one backward pass.

The change that `activation.patch` measures is estimated to first order (Nanda 2023; Syed et al.
2023, arXiv 2310.10348)::

    change ~ sum of (source activation - base activation) * d metric / d activation, at the base

Sign: positive means that patching the cell raises the metric. Methods:

``gradient``
    two forward passes and one backward, for all cells of all kinds.
``integrated``
    the gradient averaged over the straight path between the inputs of the two runs (Hanna et al.
    2024, arXiv 2403.17806), with its completeness error.
``atp*``
    Kramár et al. 2024, arXiv 2403.00745: queries and keys through a recomputed softmax, and
    gradient dropout against cancelling paths (see `atp_star`).

An estimate is a guess: `Attribution.verify` patches the top cells exactly and says how far it is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mi_hops.metrics import MetricLike, Target
from mi_hops.model import LensModel, dtype_of, hook_name
from mi_hops.patching.activation import Direction, PatchJob
from mi_hops.patching.atp_star import atp_star
from mi_hops.patching.core import Axes, captured, taken
from mi_hops.patching.gradients import Gradients, run_with_gradients
from mi_hops.patching.grid import Cell, HeadsLike
from mi_hops.patching.pairs import PositionsLike, Text
from mi_hops.patching.quadrature import Rule, path_points
from mi_hops.patching.sweep import Limits, Scored, score
from mi_hops.patching.verify import Verification, verify
from mi_hops.tokens import Prompt, align

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.results import Result

Method = Literal["gradient", "integrated", "atp*"]


def attribute(
    model: LensModel,
    clean: Text | Sequence[Text],
    corrupted: Text | Sequence[Text],
    *,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] = "resid_pre",
    layers: Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    heads: HeadsLike = None,
    neurons: Sequence[int] | None = None,
    window: int = 1,
    metric: MetricLike = "logit_diff",
    direction: Direction = "denoise",
    source: Text | Sequence[Text] | None = None,
    method: Method = "gradient",
    steps: int = 8,
    rule: Rule = "gauss",
    dropout: bool = True,
    by_family: bool = False,
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    batch_size: int = 8,
    progress: bool = False,
) -> Attribution:
    """Estimated patching effect of every cell; other arguments as in `activation.patch`.

    Args:
        metric: one metric with a gradient.
        method: see above.
        steps: points on the path, for ``"integrated"``.
        rule: ``"gauss"`` (Gauss-Legendre) or ``"trapezoid"`` (both ends included).
        dropout: gradient dropout, for ``"atp*"``; without it only the attention is mended.
        by_family: one kind of activation at a time: as many passes more, but activations and
            gradients of one kind only are held.
        batch_size: pairs in one backward pass.

    Returns:
        `Attribution`, whose ``result`` has ``change`` (estimated, units of the metric), ``effect``
        (over the difference of the two runs) and the baselines ``clean`` and ``corrupted``, on the
        axes of `patch`; for ``"integrated"`` also ``completeness_error``, per example: how far
        the attributions of all inputs together miss the difference of the two runs, as a share of
        it. Products and sums are in float32 or wider whatever the model's dtype.

    Raises:
        ValueError: as in `patch`; a metric without a gradient; several metrics; an unknown method
            or rule.
        TokenError: for ``"integrated"`` and ``"atp*"``, pairs that do not correspond token by token.
    """
    if method not in ("gradient", "integrated", "atp*"):
        raise ValueError(f"method is {method!r}; expected 'gradient', 'integrated' or 'atp*'")
    if not isinstance(metric, str) and isinstance(metric, Sequence):
        raise ValueError("attribution is to one metric, got several; attribute each by itself")
    job = PatchJob(
        model, clean, corrupted, answer=answer, wrong=wrong, kinds=kinds, layers=layers,
        positions=positions, heads=heads, neurons=neurons, window=window, metric=metric,
        direction=direction, source=source, prepend_bos=prepend_bos, batch_size=batch_size,
        limits=Limits(progress=progress),
    )  # fmt: skip
    if method != "gradient":
        for origin, base in zip(job.sources, job.bases, strict=True):
            align(origin, base)
        if job.spans.source != job.spans.base:
            raise ValueError(
                f"method {method!r} needs activations taken from and put at the same positions"
            )
    return _Attributor(job, method, steps, rule, dropout, by_family).run(examples)


@dataclass(frozen=True)
class Attribution:
    """Estimated effects, and the means to check them.

    Attributes:
        result: the estimates, labelled.
        job: the sweep they estimate.
    """

    result: Result
    job: PatchJob

    def verify(self, *, top: int | None = 20) -> Verification:
        """Patch the `top` cells (by size of the mean estimate) exactly, in every pair.

        Args:
            top: how many; None for all cells.

        Returns:
            `Verification`: rank correlation, sign agreement and largest error, and a table.
        """
        return verify(self.job, self.result, top=top)


@dataclass(frozen=True)
class _Attributor:
    job: PatchJob
    method: Method
    steps: int
    rule: Rule
    dropout: bool
    by_family: bool

    def run(self, examples: Sequence[str] | None) -> Attribution:
        import torch
        from tqdm.auto import tqdm

        job = self.job
        baselines = job.baselines()
        core = job.core(baselines)
        wide = torch.promote_types(dtype_of(job.model), torch.float32)
        n = len(job.bases)
        change = torch.zeros(n, len(job.grid.cells), dtype=wide)
        base = torch.zeros(n, dtype=wide)
        missing = torch.zeros(n, dtype=wide)
        families = job.grid.kinds if self.by_family else (None,)
        for group in tqdm(core.groups(), disable=not job.limits.progress, desc="groups"):
            bases = [core.bases[i] for i in group]
            for family in families:
                chosen = [
                    i for i, c in enumerate(job.grid.cells) if family is None or c.kind == family
                ]
                cells = [job.grid.cells[i] for i in chosen]
                found = self._group(group, bases, cells)
                change[torch.tensor(group)[:, None], torch.tensor(chosen)] = found.change
                base[group] = found.base
                if found.missing is not None:
                    missing[group] = found.missing
        other = score(job.model, job.other_scored(baselines))[:, 0]
        gap = other - base
        effect = change / gap[:, None].masked_fill(gap[:, None] == 0, float("nan"))
        extra: dict[str, Tensor] = {}
        if self.method == "integrated":
            extra["completeness_error"] = missing
        axes = Axes(job.grid, job.spans, job.bases, job.metrics, job.names, True, examples)
        result = axes.result(
            job.model,
            {"effect": effect[..., None], "change": change[..., None]},
            {name: v[:, None] for name, v in (job.by_run(base, other) | extra).items()},
            title=f"Attribution ({self.method}): {', '.join(job.grid.kinds)}; {job.names[0]}",
            units={"effect": job.share} | dict.fromkeys(extra, "share of the difference"),
            settings={
                "method": f"attribution: {self.method}", "direction": job.direction,
                "third_source": job.third, "window": job.window, "prepend_bos": job.prepend_bos,
                **self._settings(),
            },
        )  # fmt: skip
        return Attribution(result, job)

    def _settings(self) -> dict[str, Any]:
        if self.method == "integrated":
            return {"steps": self.steps, "rule": self.rule}
        return {"dropout": self.dropout} if self.method == "atp*" else {}

    def _group(
        self, group: Sequence[int], bases: Sequence[Scored], cells: Sequence[Cell]
    ) -> _Found:
        job = self.job
        sources = [job.sources[i] for i in group]
        if self.method == "atp*":
            spans = [job.spans.base[i] for i in group]
            found, base = atp_star(job.model, bases, sources, spans, cells, dropout=self.dropout)
            return _Found(found, base)
        names = list(dict.fromkeys(hook_name(c.kind, i) for c in cells for i in c.layers))
        if self.method == "integrated":
            return self._integrated(group, bases, sources, cells, names)
        store = captured(job.model, sources, names)
        run = run_with_gradients(job.model, bases, names)
        return _Found(self._products(group, cells, store, run, run.gradients), run.scores)

    def _integrated(
        self,
        group: Sequence[int],
        bases: Sequence[Scored],
        sources: Sequence[Prompt],
        cells: Sequence[Cell],
        names: list[str],
    ) -> _Found:
        job = self.job
        inputs = hook_name("resid_pre", 0)
        store = captured(job.model, sources, [*dict.fromkeys([*names, inputs])])
        run = run_with_gradients(job.model, bases, [*dict.fromkeys([*names, inputs])])
        end = store[inputs]
        begin = run.activations[inputs][:, : end.shape[1]]  # answer tokens lie beyond
        wide = run.scores.dtype
        difference = (end - begin).to(wide)
        for row, i in enumerate(group):  # padding is nobody's
            difference[row, len(job.bases[i]) :] = 0
        mean: dict[str, Tensor] = {}
        covered = run.scores.new_zeros(len(group))
        for point, weight in path_points(self.steps, self.rule):
            start = begin + point * (end - begin)
            at = run_with_gradients(job.model, bases, names, start=start)
            for name in names:
                step = weight * at.gradients[name].to(wide)
                mean[name] = mean[name] + step if name in mean else step
            slope = at.stream[:, : end.shape[1]].to(wide)
            covered += weight * (difference * slope).sum((1, 2)).cpu()
        span = run_with_gradients(job.model, bases, names, start=end).scores - run.scores
        missing = (covered - span).abs() / span.abs()
        return _Found(self._products(group, cells, store, run, mean), run.scores, missing)

    def _products(
        self,
        group: Sequence[int],
        cells: Sequence[Cell],
        store: dict[str, Tensor],
        run: Gradients,
        gradients: dict[str, Tensor],
    ) -> Float[Tensor, "row cell"]:
        """(source - base) * gradient, summed over what each cell is about."""
        import torch

        job = self.job
        out = torch.zeros(len(group), len(cells), dtype=run.scores.dtype)
        for row, i in enumerate(group):
            n_source, n_base = len(job.sources[i]), len(job.bases[i])
            for j, cell in enumerate(cells):
                for layer in cell.layers:
                    name = hook_name(cell.kind, layer)
                    origin, goal = job.spans.source[i][cell.span], job.spans.base[i][cell.span]
                    there = taken(store[name][row], cell, origin, n_source)
                    here = taken(run.activations[name][row], cell, goal, n_base)
                    slope = taken(gradients[name][row], cell, goal, n_base)
                    out[row, j] += dot(there, here, slope, cell)
        return out


@dataclass(frozen=True)
class _Found:
    change: Tensor
    base: Tensor
    missing: Tensor | None = None


def dot(there: Tensor, here: Tensor, slope: Tensor, cell: Cell) -> Tensor:
    """Sum of ``(there - here) * slope`` in float32 or wider."""
    import torch

    if cell.neuron is not None:
        there, here, slope = (t[..., cell.neuron] for t in (there, here, slope))
    wide = torch.promote_types(slope.dtype, torch.float32)
    return ((there.to(slope.device, wide) - here.to(wide)) * slope.to(wide)).sum().cpu()
