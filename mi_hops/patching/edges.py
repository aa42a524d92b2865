"""Edge attribution: a linear estimate of every direct path at once (EAP, EAP-IG).

What `path.path_patch` measures exactly for a writer u and a reader v is estimated by (Syed et al.
2023, arXiv 2310.10348)::

    change ~ sum of (u's write in the source run - in the base run) * d metric / d input of v

where only v's own use of its input counts: through its norm and projection, not along the stream.
Integrated, the gradient is averaged over the straight path between the inputs of the two runs
(EAP-IG: Hanna et al. 2024, arXiv 2403.17806). One forward and one backward pass per point give the
gradients at queries, keys, values and MLP outputs. From there each is pulled back, on the same graph,
through its own block's norm and projection alone, so no weight is read and key/value heads shared by
several query heads need no special case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.core import require_effect
from mi_hops.patching.gradients import Recorded, input_change, record
from mi_hops.patching.nodes import (
    Node,
    Writes,
    edge_result,
    job_of_nodes,
    read_hooks,
    readers,
    writers,
)
from mi_hops.patching.path import exact_paths, reached
from mi_hops.patching.products import require_finite_estimates
from mi_hops.patching.quadrature import Rule, path_points
from mi_hops.patching.verify import Attribution
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import score_gap
from mi_hops.sweep.pairs import PairsLike
from mi_hops.sweep.runs import Scored, score_and_capture
from mi_hops.sweep.sites import Direction


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def attribute_edges(
    model: HookedModel,
    pairs: PairsLike,
    senders: str | Sequence[str] = "all",
    receivers: str | Sequence[str] = "all",
    *,
    metric: MetricLike = "logit_diff",
    direction: Direction = "noise",
    method: Literal["gradient", "integrated"] = "gradient",
    steps: int = 20,
    rule: Rule = "gauss",
    limits: Limits | None = None,
) -> Attribution:
    """Estimate the change of the metric for every edge, in every pair, summed over positions.

    Args:
        senders, receivers: as in `path.path_patch`.
        metric: one metric with a gradient; a divergence has none where it measures from the base
            run (``"kl"`` with direction ``"noise"``), so there it takes ``"integrated"``.
        direction: ``"noise"`` corrupts an edge of the clean run (a negative change: the edge serves
            the answer), ``"denoise"`` restores one in the corrupted run.
        method: ``"gradient"`` takes the gradient in the base run (EAP); ``"integrated"`` averages it
            over the path (EAP-IG).
        steps: points on the path, for ``"integrated"``.
        rule: quadrature of the path, as in `attribution.attribute`.
        limits: ``batch_size`` (here 8 by default) bounds the rows, pairs times points, in one
            backward pass; fewer run together where memory runs out.

    Returns:
        `Attribution`, a result with ``change`` (unit of the metric) and ``effect`` (over the
        difference of the two runs; NaN where that is 0) on ``example``, ``sender`` and
        ``receiver``, NaN where there is no edge, and the baselines ``clean`` and ``corrupted``; for
        ``"integrated"`` also ``completeness_error``, as in `attribution.attribute`; in
        float32 or wider whatever the model's dtype. Its ``verify`` patches the top edges exactly,
        as `path.path_patch` does.

    Raises:
        ValueError: an unknown component, no edge between those named, a metric without a gradient
            or with one that is not finite, several metrics, an unknown method or rule.
        TokenError: pairs that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> mi_hops.attribute_edges(model, pairs.select([0]), "heads", "logits")["change"].dims
        ('example', 'sender', 'receiver')
    """
    if method not in ("gradient", "integrated"):
        raise ValueError(f"method is {method!r}; expected 'gradient' or 'integrated'")
    points = [(0.0, 1.0)] if method == "gradient" else path_points(steps, rule)
    limits = limits or Limits(batch_size=8)
    job = job_of_nodes(model, pairs, metric=metric, direction=direction, limits=limits)
    if method == "gradient":
        job.require_gradient()
    nodes = writers(model, senders), readers(model, receivers)
    edge = reached(*nodes)
    if not edge.any():
        raise ValueError("no edge leads from any of the senders to any of the receivers")
    change, base, other, covered = _Estimator(job, *nodes, points).run()
    require_finite_estimates(change[:, edge])
    change.masked_fill_(~edge, float("nan"))
    effect = change / score_gap(other, base)[:, None, None]
    require_effect(effect, job.why_no_effect(base, other))
    name = "EAP" if method == "gradient" else "EAP-IG"
    baselines = job.by_run(base, other)
    settings: dict[str, object] = {"method": name}
    units = {}
    if method == "integrated":
        baselines["completeness_error"] = (covered / score_gap(other, base) - 1).abs()
        units["completeness_error"] = "share of the difference"
        settings |= {"steps": steps, "rule": rule}
    result = edge_result(
        job,
        {"change": change, "effect": effect},
        baselines,
        nodes,
        title=f"Edge attribution ({name})",
        units=units,
        **settings,
    )
    return Attribution(result, partial(_exact, job, *nodes))


def _exact(
    job: PatchJob, sources: Sequence[Node], targets: Sequence[Node], edges: Sequence[int]
) -> Float[Tensor, "example edge"]:
    """Exact changes of some edges, by their numbers in C order of (sender, receiver)."""
    chosen = list(edges)
    wanted = torch.zeros(len(sources) * len(targets), dtype=torch.bool)
    wanted[chosen] = True
    spans = [range(len(prompt)) for prompt in job.bases]
    scores, base = exact_paths(job, sources, targets, wanted.view(len(sources), -1), spans)
    return scores.flatten(1)[:, chosen] - base[:, None]


@dataclass(frozen=True)
class _Estimator:
    """Estimates of all edges of a job.

    Attributes:
        points: (point, weight) on the path from the base run's input to the source run's.
    """

    job: PatchJob
    sources: Sequence[Node]
    targets: Sequence[Node]
    points: Sequence[tuple[float, float]]

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Changes ``[example, sender, receiver]``; by example the scores of both runs, the path's sum."""
        job, n = self.job, len(self.job.bases)
        wide = wide_dtype(dtype_of(job.model))
        change = torch.zeros(n, len(self.sources), len(self.targets), dtype=wide)
        base, other, covered = (torch.zeros(n, dtype=wide) for _ in range(3))
        every = job.scored(), job.other_scored()

        def run(group: Sequence[int]) -> tuple[Tensor, ...]:
            return self._group(*([side[i] for i in group] for side in every))

        for whole in progress_bar(job.sweep.groups(), label="groups", show=job.limits.progress):
            for part, found in batched_with_oom_backoff(whole, len(whole), run):
                change[part], base[part], other[part], covered[part] = found
        return change, base, other, covered

    def _group(self, bases: Sequence[Scored], others: Sequence[Scored]) -> tuple[Tensor, ...]:
        model, inputs, n = self.job.model, hook_name("resid_pre", 0), len(bases)
        # Senders in the order in which they act: those that reach a reader come first.
        order = sorted(range(len(self.sources)), key=lambda i: self.sources[i].stage)
        acting = [self.sources[i] for i in order]
        both = [*bases, *others]
        names = [*Writes.hook_names(acting), inputs]
        scores, store = score_and_capture(model, both, list(dict.fromkeys(names)))
        writes = Writes(model, [item.prompt for item in both], acting, store)
        moved = writes.differences(acting, range(n, 2 * n), range(n))
        begin = store[inputs][:n]
        way = input_change(bases, store[inputs][n:], begin)
        change = torch.zeros(n, len(acting), len(self.targets), dtype=moved.dtype)
        covered = torch.zeros(n, dtype=moved.dtype)
        rows = [(i, point, weight) for i in range(n) for point, weight in self.points]
        alone = len(self.points) == 1 and not self.points[0][0]

        def run(part: Sequence[tuple[int, float, float]]) -> tuple[list[int], Tensor, Tensor]:
            start = None
            if not alone:
                at = torch.tensor([point for _, point, _ in part]).to(begin)
                found = [i for i, _, _ in part]
                start = begin[found] + at[:, None, None] * way[found]
            return self._part(part, [bases[i] for i, _, _ in part], moved, start, way)

        for _, (found, estimates, sums) in batched_with_oom_backoff(
            rows, self.job.limits.batch_size, run
        ):
            change[found] += estimates
            covered[found] += sums
        sorted_back = torch.empty_like(change)
        sorted_back[:, order] = change
        return sorted_back, scores[:n, 0], scores[n:, 0], covered

    def _part(
        self,
        part: Sequence[tuple[int, float, float]],
        prompts: Sequence[Scored],
        moved: Float[Tensor, "pair sender pos d_model"],
        start: Tensor | None,
        way: Tensor,
    ) -> tuple[list[int], Float[Tensor, "pair sender receiver"], Float[Tensor, "pair"]]:
        """Numbers of the pairs of some rows; what these rows add to their estimates and sums."""
        model = self.job.model
        pairs = sorted({i for i, _, _ in part})
        # [pair, row]: how much each row counts for its pair.
        share = torch.zeros(len(pairs), len(part), dtype=moved.dtype)
        for row, (i, _, weight) in enumerate(part):
            share[pairs.index(i), row] = weight
        share = share.to(moved.device)
        moved = moved if len(pairs) == len(moved) else moved[pairs]
        stages = sorted(node.stage for node in self.sources)
        groups = defaultdict(list)  # readers that one pass backward serves
        for j, reader in enumerate(self.targets):
            groups[(reader.stage, *_hooks(reader))].append(j)
        results = list(dict.fromkeys(result for _, _, result in groups))
        entries = [entry for _, entry, _ in groups if entry is not None]
        run = record(model, prompts, list(dict.fromkeys([*results, *entries])), start=start)
        slopes, stream = run.gradients(results)
        # Other pairs of the group may be longer; behind its prompt nothing of a pair moves.
        width = min(moved.shape[2], stream.shape[1])
        moved = moved[:, :, :width]
        change = moved.new_zeros(len(pairs), moved.shape[1], len(self.targets))
        for (stage, entry, result), members in groups.items():
            n = sum(s < stage for s in stages)
            if not n:
                continue
            slope = self._slope(run, slopes[result], entry, result, members)
            slope = slope[:, :, :width].to(moved)
            mean = einsum("pair row, reader row pos d -> pair reader pos d", share, slope)
            change[:, :n, members] = torch.bmm(
                rearrange(moved[:, :n], "pair sender pos d -> pair sender (pos d)"),
                rearrange(mean, "pair reader pos d -> pair (pos d) reader"),
            )
        of_rows = way[[i for i, _, _ in part], : stream.shape[1]].to(share)
        sums = einsum("row pos d, row pos d -> row", stream.to(share), of_rows)
        return pairs, change.cpu(), (share @ sums).cpu()

    def _slope(
        self, run: Recorded, slope: Tensor, entry: str | None, result: str, members: Sequence[int]
    ) -> Float[Tensor, "reader row pos d_model"]:
        """Gradients at the own inputs of readers of one place, from that at their result."""
        if entry is None:  # the logits' input is the stream itself
            return slope[None]
        each = slope.new_zeros(len(members), *slope.shape)
        for way, j in enumerate(members):
            head = self.targets[j].head
            own = slice(None) if head is None else (slice(None), slice(None), head)
            each[way][own] = slope[own]
        return run.pull_back(result, entry, each)


def _hooks(reader: Node) -> tuple[str | None, str]:
    """Where a reader's input enters, None for the logits, and what it makes of it (there, the stream)."""
    if reader.role == "logits":
        return None, hook_name("resid_post", reader.layer - 1)
    entry, result = read_hooks(reader)
    # The stream before the MLP is the attention's write plus what is left alone; where the Bridge has
    # a hook point for it, that lies on another branch.
    return hook_name("attn_out" if entry == "resid_mid" else entry, reader.layer), result
