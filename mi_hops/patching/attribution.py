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

Of a window of blocks the estimate is the sum of its blocks' own. What one block's change does to
the next ones is in its gradient, while the exact patch overrides these next ones: the sum is not the
first-order effect of the window, and comes near it where blocks of the window hardly act through one
another. Of the residual stream, which every block hands on whole, it would count one change once for
each block, so windows of it are refused.

An estimate is a guess: `verify.Attribution.verify` patches the top cells exactly and says how far it
is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import Direction, PatchJob
from mi_hops.patching.atp_star import atp_star
from mi_hops.patching.core import Axes
from mi_hops.patching.gradients import run_with_gradients
from mi_hops.patching.products import Places, products, require_finite_estimates
from mi_hops.patching.quadrature import Rule, path_points
from mi_hops.patching.verify import Attribution
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, Target, score_gap
from mi_hops.sweep.pairs import PositionsLike, Text
from mi_hops.sweep.runs import Scored, score_and_capture
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, HeadsLike
from mi_hops.text.tokens import align

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["gradient", "integrated", "atp*"]


def attribute(
    model: HookedModel,
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
        window: blocks whose estimates are added up (see above); not of the residual stream.
        metric: one metric with a gradient; a divergence has none where it measures from the base
            run (``"kl"`` with direction ``"noise"``), so there it takes ``"integrated"``.
        method: see above.
        steps: points on the path, for ``"integrated"``.
        rule: ``"gauss"`` (Gauss-Legendre) or ``"trapezoid"`` (both ends included).
        dropout: gradient dropout, for ``"atp*"``; without it only the attention is mended.
        by_family: one kind of activation at a time: as many passes more, but activations and
            gradients of one kind only are held.
        batch_size: pairs in one backward pass; fewer where memory runs out.

    Returns:
        `Attribution`, whose ``result`` has ``change`` (estimated, units of the metric), ``effect``
        (over the difference of the two runs) and the baselines ``clean`` and ``corrupted``, on the
        axes of `patch`; for ``"integrated"`` also ``completeness_error``, per example: how far
        the attributions of all inputs together miss the difference of the two runs, as a share of
        it (NaN where that is 0). Products and sums are in float32 or wider whatever the model's
        dtype.

    Raises:
        ValueError: as in `patch`; a metric without a gradient, or with one that is not finite;
            several metrics; an unknown method or rule; a window of the residual stream.
        TokenError: for ``"integrated"`` and ``"atp*"``, pairs that do not correspond token by token.
    """
    if method not in ("gradient", "integrated", "atp*"):
        raise ValueError(f"method is {method!r}; expected 'gradient', 'integrated' or 'atp*'")
    of_stream = [
        k for k in ([kinds] if isinstance(kinds, str) else kinds) if k.startswith("resid_")
    ]
    if window > 1 and of_stream:
        raise ValueError(
            f"window is {window} and kinds include {of_stream}: the blocks of a window hand on one "
            "stream, so their estimates are one effect counted several times; attribute single "
            "blocks, or patch the window exactly"
        )
    job = PatchJob(
        model, clean, corrupted, answer=answer, wrong=wrong, kinds=kinds, layers=layers,
        positions=positions, heads=heads, neurons=neurons, window=window, metric=metric,
        direction=direction, source=source, prepend_bos=prepend_bos, batch_size=batch_size,
        limits=Limits(progress=progress),
    )  # fmt: skip
    job.require_one_metric()
    if method != "integrated":
        job.require_gradient()
    if method != "gradient":
        for origin, base in zip(job.sources, job.bases, strict=True):
            align(origin, base)
        if job.spans.source != job.spans.base:
            raise ValueError(
                f"method {method!r} needs activations taken from and put at the same positions"
            )
    return _Attributor(job, method, steps, rule, dropout, by_family).run(examples)


def _exact(job: PatchJob, cells: Sequence[int]) -> Tensor:
    """Exact changes ``[example, cell]`` of some cells of a job, by their numbers."""
    grid = replace(job.grid, cells=tuple(job.grid.cells[i] for i in cells))
    scores, base = replace(job.core(job.baselines()), grid=grid).run(job.values_of)
    return (scores - base[:, None])[..., 0]


@dataclass(frozen=True)
class _Attributor:
    job: PatchJob
    method: Method
    steps: int
    rule: Rule
    dropout: bool
    by_family: bool

    def run(self, examples: Sequence[str] | None) -> Attribution:

        job = self.job
        baselines = job.baselines()
        core = job.core(baselines)
        others = job.other_scored(baselines)
        # The runs that activations come from; of a third prompt, scored on the base run's answer.
        ends = [replace(b, prompt=p) for b, p in zip(core.bases, job.sources, strict=True)]
        ends = ends if job.third else others
        wide = wide_dtype(dtype_of(job.model))
        n = len(job.bases)
        change = torch.zeros(n, len(job.grid.cells), dtype=wide)
        base, other, covered = (torch.zeros(n, dtype=wide) for _ in range(3))
        cells = job.grid.cells
        families = [[i for i, c in enumerate(cells) if c.kind == kind] for kind in job.grid.kinds]
        if not self.by_family:
            families = [list(range(len(cells)))]

        def run(group: Sequence[int]) -> list[_Found]:
            return [
                self._group(
                    _Group(
                        [core.bases[i] for i in group],
                        [ends[i] for i in group],
                        [job.spans.source[i] for i in group],
                        [job.spans.base[i] for i in group],
                        [cells[i] for i in chosen],
                    )
                )
                for chosen in families
            ]

        for whole in progress_bar(core.groups(), label="groups", show=job.limits.progress):
            for group, each in batched_with_oom_backoff(whole, len(whole), run):
                for chosen, found in zip(families, each, strict=True):
                    change[torch.tensor(group)[:, None], torch.tensor(chosen)] = found.change
                    base[group], other[group] = found.base, found.end
                    covered[group] = found.covered
        require_finite_estimates(change)
        extra: dict[str, Tensor] = {}
        if self.method == "integrated":
            extra["completeness_error"] = (covered / score_gap(other, base) - 1).abs()
        if job.third:
            other = score(job.model, others)[:, 0]
        effect = change / score_gap(other, base)[:, None]
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
        return Attribution(result, partial(_exact, job))

    def _settings(self) -> dict[str, Any]:
        if self.method == "integrated":
            return {"steps": self.steps, "rule": self.rule}
        return {"dropout": self.dropout} if self.method == "atp*" else {}

    def _group(self, group: _Group) -> _Found:
        model = self.job.model
        if self.method == "atp*":
            found = atp_star(
                model, group.bases, group.ends, group.put, group.cells, dropout=self.dropout
            )
            return _Found(*found)
        if self.method == "integrated":
            return self._integrated(group)
        names = group.names
        end, there = score_and_capture(model, group.ends, names)
        run = run_with_gradients(model, group.bases, names)
        change = group.products(there, run.activations, run.gradients)
        return _Found(change, run.scores, end[:, 0])

    def _integrated(self, group: _Group) -> _Found:
        model, inputs = self.job.model, hook_name("resid_pre", 0)
        names = list(dict.fromkeys([*group.names, inputs]))
        end, there = score_and_capture(model, group.ends, names)
        base, here = score_and_capture(model, group.bases, names)
        begin = here[inputs]
        difference = torch.zeros_like(begin, dtype=base.dtype)
        for row, item in enumerate(group.bases):  # answer tokens and padding are nobody's
            n = len(item.prompt)
            difference[row, :n] = (there[inputs][row, :n] - begin[row, :n]).to(base.dtype)
        mean: dict[str, Tensor] = {}
        covered = torch.zeros(len(begin), dtype=base.dtype)
        for point, weight in path_points(self.steps, self.rule):
            at = run_with_gradients(
                model, group.bases, group.names, start=begin + point * difference
            )
            for name in group.names:
                step = weight * at.gradients[name].to(base.dtype)
                mean[name] = mean[name] + step if name in mean else step
            covered += weight * (difference * at.stream.to(base.dtype)).sum((1, 2)).cpu()
        return _Found(group.products(there, here, mean), base[:, 0], end[:, 0], covered)


@dataclass(frozen=True)
class _Group:
    """Examples that share their passes, and the cells asked for.

    Attributes:
        bases, ends: the runs that are changed, and those that activations come from.
        taken, put: positions of each span in both, ``[row][span]``.
    """

    bases: list[Scored]
    ends: list[Scored]
    taken: list[tuple[tuple[int, ...], ...]]
    put: list[tuple[tuple[int, ...], ...]]
    cells: list[Cell]

    @property
    def names(self) -> list[str]:
        """Hook points of the cells."""
        return list(dict.fromkeys(hook_name(c.kind, i) for c in self.cells for i in c.layers))

    def products(
        self, there: dict[str, Tensor], here: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> Tensor:
        """The estimates, ``[row, cell]``."""
        source, base = Places.of(self.taken), Places.of(self.put)
        return products(self.cells, source, base, there, here, gradients)


@dataclass(frozen=True)
class _Found:
    """Estimates ``[row, cell]``, and by row the two scores and what the path's points add up to."""

    change: Tensor
    base: Tensor
    end: Tensor
    covered: Tensor | float = 0.0
