"""Edge attribution: a linear estimate of every direct path at once (EAP, EAP-IG).

What `path.path_patch` measures exactly for a writer u and a reader v is estimated by (Syed et al.
2023, arXiv 2310.10348)::

    change ~ sum of (u's write in the source run - in the base run) * d metric / d input of v

where only v's own use of its input counts: through its norm and projection, not along the stream.
With several steps the gradient is averaged over the straight path between the inputs of the two runs
(EAP-IG: Hanna et al. 2024, arXiv 2403.17806). One forward and one backward pass per step give the
gradients at queries, keys, values and MLP outputs; they are pulled back through each block's own norm
and projections, so key/value heads shared by several query heads need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from einops import repeat
from fancy_einsum import einsum

from mi_hops.model import Hook, HookedModel, device_of, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.core import captured, require_effect
from mi_hops.patching.gradients import overlaid, run_with_gradients
from mi_hops.patching.nodes import (
    Node,
    Writes,
    edge_result,
    job_of_nodes,
    probe,
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
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Direction
from mi_hops.text.tokens import Prompt

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def attribute_edges(
    model: HookedModel,
    pairs: PairsLike,
    senders: str | Sequence[str] = "all",
    receivers: str | Sequence[str] = "all",
    *,
    metric: MetricLike = "logit_diff",
    direction: Direction = "noise",
    steps: int = 1,
    rule: Rule = "gauss",
    limits: Limits | None = None,
) -> Attribution:
    """Estimated change of the metric for every edge, in every pair; summed over positions.

    Args:
        senders, receivers: as in `path.path_patch`.
        metric: one metric with a gradient; a divergence has none where it measures from the base
            run (``"kl"`` with direction ``"noise"``), so there it takes more steps than one.
        direction: ``"noise"`` corrupts an edge of the clean run (a negative change: the edge serves
            the answer), ``"denoise"`` restores one in the corrupted run.
        steps: 1 takes the gradient in the base run (EAP); more average it over the path (EAP-IG).
        rule: quadrature of the path, as in `attribution.attribute`.

    Returns:
        `Attribution`, a result with ``change`` (unit of the metric) and ``effect`` (over the
        difference of the two runs; NaN where that is 0) on ``example``, ``sender`` and
        ``receiver``, NaN where there is no edge, and the baselines ``clean`` and ``corrupted``; in
        float32 or wider whatever the model's dtype. Its ``verify`` patches the top edges exactly,
        as `path.path_patch` does.

    Raises:
        ValueError: an unknown component, no edge between those named, a metric without a gradient
            or with one that is not finite, several metrics, no steps.
        TokenError: pairs that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> mi_hops.attribute_edges(model, pairs.select([0]), "heads", "logits")["change"].dims
        ('example', 'sender', 'receiver')
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    points = [(0.0, 1.0)] if steps == 1 else path_points(steps, rule)
    job = job_of_nodes(model, pairs, metric=metric, direction=direction, limits=limits)
    if steps == 1:
        job.require_gradient()
    sources, targets = nodes = writers(model, senders), readers(model, receivers)
    edge = reached(*nodes)
    if not edge.any():
        raise ValueError("no edge leads from any of the senders to any of the receivers")
    bases = job.scored()
    shape = (len(bases), len(sources), len(targets))
    change = torch.empty(shape, dtype=wide_dtype(dtype_of(model)))
    for i in progress_bar(range(len(bases)), label="pairs", show=job.limits.progress):
        writes = Writes(model, (job.sources[i], job.bases[i]), sources)
        slopes = input_gradients(model, bases[i], job.sources[i], targets, points)
        moved = torch.stack([(writes(u, 0) - writes(u, 1)).to(slopes) for u in sources])
        change[i] = einsum(
            "sender pos d_model, receiver pos d_model -> sender receiver",
            moved,
            slopes[:, : moved.shape[1]],
        ).cpu()
    require_finite_estimates(change[:, edge])
    change.masked_fill_(~edge, float("nan"))
    base, other = (score(model, run)[:, 0] for run in (bases, job.other_scored()))
    effect = change / score_gap(other, base)[:, None, None]
    require_effect(effect, job.why_no_effect(base, other))
    method = "EAP" if steps == 1 else "EAP-IG"
    result = edge_result(
        job,
        {"change": change, "effect": effect},
        job.by_run(base, other),
        nodes,
        title=f"Edge attribution ({method})",
        method=method,
        steps=steps,
        rule=rule,
    )
    return Attribution(result, partial(_exact, job, sources, targets))


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


def input_gradients(
    model: HookedModel,
    base: Scored,
    source: Prompt,
    targets: Sequence[Node],
    points: Sequence[tuple[float, float]],
) -> Float[Tensor, "reader pos d_model"]:
    """Gradient of the metric at each reader's own input, averaged over points of the path.

    Args:
        source: the prompt at the path's end.
    """
    inputs = hook_name("resid_pre", 0)
    sweep = Sweep(model, [base])
    tokens = sweep.batch.tokens
    begin = end = None
    if any(point for point, _ in points):
        begin = captured(model, [base.prompt], [inputs])[inputs]
        end = captured(model, [source], [inputs])[inputs]
    wide = wide_dtype(dtype_of(model))
    shape = (len(targets), tokens.shape[1], int(model.cfg.d_model))
    out = torch.zeros(shape, dtype=wide, device=device_of(model))
    names = list(dict.fromkeys(_result_hook(v) for v in targets))
    for point, weight in points:
        start = None
        if begin is not None and end is not None:
            start = begin + point * (end - begin)
        run = run_with_gradients(model, [base], names, start=start)
        before: list[Hook] = [] if start is None else [(inputs, partial(overlaid, value=start))]
        for layer, entry, members in _places(targets):

            def pull(
                part: Sequence[int],
                layer: int = layer,
                entry: str | None = entry,
                gradients: dict[str, Tensor] = run.gradients,
                before: Sequence[Hook] = before,
            ) -> Tensor:
                chosen = [targets[j] for j in part]
                return _pull_back(model, tokens, layer, entry, chosen, gradients, before)

            for part, slope in batched_with_oom_backoff(members, len(members), pull):
                out[list(part)] += weight * slope.to(out)
    return out


def _result_hook(reader: Node) -> str:
    """Where the gradient is taken: what the reader makes of its input; for the logits the stream."""
    if reader.role == "logits":
        return hook_name("resid_post", reader.layer - 1)
    return read_hooks(reader)[1]


def _places(targets: Sequence[Node]) -> list[tuple[int, str | None, list[int]]]:
    """Readers that one probe serves: (block, where their input enters, indices)."""
    places: dict[tuple[int, str | None], list[int]] = {}
    for j, reader in enumerate(targets):
        entry = None if reader.role == "logits" else read_hooks(reader)[0]
        places.setdefault((reader.layer, entry), []).append(j)
    return [(layer, entry, members) for (layer, entry), members in places.items()]


def _pull_back(
    model: HookedModel,
    tokens: Tensor,
    layer: int,
    entry: str | None,
    chosen: Sequence[Node],
    gradients: dict[str, Tensor],
    before: Sequence[Hook],
) -> Float[Tensor, "reader pos d_model"]:
    """Gradients at the results of readers of one place, as gradients at each one's own input.

    Every reader has a copy of the stream to itself, and only its own result counts in that copy. The
    logits' input is the stream itself.
    """
    if entry is None:
        return gradients[_result_hook(chosen[0])]
    copies: list[Tensor] = []

    def copy(x: Tensor) -> Tensor:
        copies[:] = [
            repeat(x.detach(), "1 pos d -> reader pos d", reader=len(chosen))
            .clone()
            .requires_grad_()
        ]
        return copies[0]

    names = list(dict.fromkeys(_result_hook(v) for v in chosen))
    with torch.enable_grad():
        found = probe(model, tokens, layer, entry, copy, names, before=before)
        weights = {name: torch.zeros_like(found[name]) for name in names}
        for row, reader in enumerate(chosen):
            name = _result_hook(reader)
            slope = gradients[name][0].to(found[name].device)
            if reader.head is None:
                weights[name][row] = slope
            else:
                weights[name][row, :, reader.head] = slope[:, reader.head]
        total = torch.stack([(found[name] * weights[name]).sum() for name in names]).sum()
        (at_inputs,) = torch.autograd.grad(total, copies)
    return at_inputs
