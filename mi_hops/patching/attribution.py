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
``atp+qkfix``
    the same without the dropout.

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
from typing import Any, Literal

import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.atp_star import atp_star
from mi_hops.patching.core import require_effect
from mi_hops.patching.gradients import input_change, run_with_gradients
from mi_hops.patching.products import Places, products, require_finite_estimates
from mi_hops.patching.quadrature import Rule, path_points
from mi_hops.patching.verify import Attribution
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import score_gap
from mi_hops.sweep.pairs import PairsLike
from mi_hops.sweep.runs import Scored, score_and_capture
from mi_hops.sweep.sites import Cell, Direction, SitesLike
from mi_hops.text.tokens import align

Method = Literal["gradient", "integrated", "atp*", "atp+qkfix"]


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def attribute(
    model: HookedModel,
    pairs: PairsLike,
    sites: SitesLike = "resid_pre",
    *,
    metric: MetricLike = "logit_diff",
    direction: Direction = "denoise",
    method: Method = "gradient",
    steps: int = 8,
    rule: Rule = "gauss",
    by_kind: bool = False,
    limits: Limits | None = None,
) -> Attribution:
    """Estimate the patching effect of every cell by attribution; other arguments as in `patch`.

    Args:
        sites: of a window the blocks' estimates are added up (see above); not of the residual
            stream.
        metric: one metric with a gradient; a divergence has none where it measures from the base
            run (``"kl"`` with direction ``"noise"``), so there it takes ``"integrated"``.
        method: see above.
        steps: points on the path, for ``"integrated"``.
        rule: ``"gauss"`` (Gauss-Legendre) or ``"trapezoid"`` (both ends included).
        by_kind: one kind of activation at a time: as many passes more, but activations and
            gradients of one kind only are held.
        limits: ``batch_size`` (here 8 by default) bounds the pairs in one backward pass; fewer run
            together where memory runs out.

    Returns:
        `Attribution`, a result with ``change`` (estimated, units of the metric), ``effect``
        (over the difference of the two runs) and the baselines ``clean`` and ``corrupted``, on the
        axes of `patch`; for ``"integrated"`` also ``completeness_error``, per example: how far
        the attributions of all inputs together miss the difference of the two runs, as a share of
        it (NaN where that is 0). Products and sums are in float32 or wider whatever the model's
        dtype.

    Raises:
        ValueError: as in `patch`; a metric without a gradient, or with one that is not finite;
            several metrics; an unknown method or rule; a window of the residual stream.
        TokenError: pairs that do not correspond token by token, where the method is not
            ``"gradient"``.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> estimate = mi_hops.attribute(model, pairs, "z")
        >>> estimate.verify(top=3).n_cells
        3
    """
    methods = ("gradient", "integrated", "atp*", "atp+qkfix")
    if method not in methods:
        raise ValueError(f"method is {method!r}; expected one of {methods}")
    job = PatchJob(
        model,
        pairs,
        sites,
        metric=metric,
        direction=direction,
        limits=limits or Limits(batch_size=8),
    )
    of_stream = [kind for kind in job.grid.kinds if kind.startswith("resid_")]
    if job.sites.window > 1 and of_stream:
        raise ValueError(
            f"window is {job.sites.window} and kinds include {of_stream}: the blocks of a window hand "
            "on one stream, so their estimates are one effect counted several times; attribute "
            "single blocks, or patch the window exactly"
        )
    name = job.one_metric
    if method != "integrated":
        job.require_gradient()
    if method != "gradient":
        for pair in zip(job.sources, job.bases, strict=True):
            align(*pair)
        if job.grid.source != job.grid.base:
            raise ValueError(
                f"method {method!r} needs activations taken from and put at the same positions"
            )
        if job.given is not None:
            raise ValueError(
                f"method {method!r} runs the source prompts; give them, not activations"
            )
    estimator = _Estimator(job, method, path_points(steps, rule) if method == "integrated" else [])
    change, base, end, covered = estimator.run(by_kind)
    require_finite_estimates(change)
    other: Tensor | None = end
    if job.other_apart:
        known = job.score_other()
        other = None if known is None else known[:, 0]
    values = {"change": change[..., None]}
    baselines = {k: v[:, None] for k, v in job.by_run(base, other).items()}
    if other is not None:
        effect = change / score_gap(other, base)[:, None]
        require_effect(effect, job.why_no_effect(base, other))
        values = {"effect": effect[..., None], **values}
    settings: dict[str, Any] = dict(job.settings)
    if method == "integrated":
        baselines["completeness_error"] = (covered / score_gap(end, base) - 1).abs()[:, None]
        settings |= {"steps": steps, "rule": rule}
    result = job.sweep.result(
        values,
        baselines,
        title=f"Attribution ({method}): {', '.join(job.grid.kinds)}; {name}",
        units={"effect": job.share, "completeness_error": "share of the difference"},
        skipped=job.pairs.skipped,
        method=f"attribution: {method}",
        **settings,
    )
    return Attribution(result, partial(_exact, job))


def _exact(job: PatchJob, cells: Sequence[int]) -> Float[Tensor, "example cell"]:
    """Exact changes of some cells of a job, by their numbers."""
    grid = replace(job.grid, cells=tuple(job.grid.cells[i] for i in cells))
    scores, base, _ = replace(job.sweep, grid=grid).run(
        job.scored(), job.changes_of, sources=job.source_scored()
    )
    return (scores - base[:, None])[..., 0]


@dataclass(frozen=True)
class _Estimator:
    """Estimates of all cells of a job.

    Attributes:
        points: (point, weight) on the path, for integrated gradients.
    """

    job: PatchJob
    method: Method
    points: Sequence[tuple[float, float]]

    def run(self, by_kind: bool) -> _Found:
        """Estimates ``[example, cell]``, and per example the scores of both ends."""
        job, cells = self.job, self.job.grid.cells
        bases = job.scored()
        ends = job.source_scored() or bases  # of given activations nothing is run
        n, wide = len(bases), wide_dtype(dtype_of(job.model))
        change = torch.zeros(n, len(cells), dtype=wide)
        base, end, covered = (torch.zeros(n, dtype=wide) for _ in range(3))
        families = [list(range(len(cells)))]
        if by_kind:
            families = [
                [i for i, c in enumerate(cells) if c.kind == kind] for kind in job.grid.acting
            ]

        def run(group: Sequence[int]) -> list[_Found]:
            part = [bases[i] for i in group], [ends[i] for i in group]
            return [self._group(group, *part, [cells[i] for i in chosen]) for chosen in families]

        for whole in progress_bar(job.sweep.groups(), label="groups", show=job.limits.progress):
            for group, each in batched_with_oom_backoff(whole, len(whole), run):
                for chosen, found in zip(families, each, strict=True):
                    change[torch.tensor(group)[:, None], torch.tensor(chosen)] = found[0]
                    base[group], end[group], covered[group] = found[1:]
        return change, base, end, covered

    def _group(
        self,
        group: Sequence[int],
        bases: Sequence[Scored],
        ends: Sequence[Scored],
        cells: Sequence[Cell],
    ) -> _Found:
        model, grid = self.job.model, self.job.grid
        names = list(dict.fromkeys(hook_name(c.kind, i) for c in cells for i in c.layers))
        source, base = (Places.of([of[i] for i in group]) for of in (grid.source, grid.base))
        nothing = torch.zeros(len(bases), dtype=wide_dtype(dtype_of(model)))
        if self.method in ("atp*", "atp+qkfix"):
            found = atp_star(model, bases, ends, base, cells, dropout=self.method == "atp*")
            return *found, nothing
        if self.method == "integrated":
            return self._integrated(bases, ends, names, (cells, source, base))
        if self.job.given is not None:
            there = {name: x[list(group)] for name, x in self.job.given.items()}
            end = nothing
        else:
            scores, there = score_and_capture(model, ends, names)
            end = scores[:, 0]
        run = run_with_gradients(model, bases, names)
        change = products(cells, source, base, there, run.activations, run.gradients)
        return change, run.scores, end, nothing

    def _integrated(
        self,
        bases: Sequence[Scored],
        ends: Sequence[Scored],
        names: Sequence[str],
        where: tuple[Sequence[Cell], Places, Places],
    ) -> _Found:
        model, inputs = self.job.model, hook_name("resid_pre", 0)
        kept = list(dict.fromkeys([*names, inputs]))
        end, there = score_and_capture(model, ends, kept)
        base, here = score_and_capture(model, bases, kept)
        begin = here[inputs]
        difference = input_change(bases, there[inputs], begin).to(base.dtype)
        mean: dict[str, Tensor] = {}
        covered = torch.zeros(len(begin), dtype=base.dtype)
        for point, weight in self.points:
            at = run_with_gradients(model, bases, names, start=begin + point * difference)
            for name in names:
                step = weight * at.gradients[name].to(base.dtype)
                mean[name] = mean[name] + step if name in mean else step
            slope = at.stream.to(base.dtype)
            covered += weight * einsum("row pos d, row pos d -> row", difference, slope).cpu()
        return products(*where, there, here, mean), base[:, 0], end[:, 0], covered


#: Estimates ``[row, cell]``, and by row the two scores and what the path's points add up to.
_Found = tuple["Tensor", "Tensor", "Tensor", "Tensor"]
