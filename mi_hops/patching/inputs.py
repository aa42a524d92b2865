"""Input attribution: which tokens of the prompt the score rests on.

A token is taken away by giving its place the embedding of a baseline; its position stays. Methods:

``gradient``
    (embedding - baseline) * gradient of the score, summed over the dimensions: gradient x input where
    the baseline is zero. One forward and one backward pass.
``integrated``
    the same with the gradient averaged over the straight path from the baseline to the prompt
    (Sundararajan et al. 2017, arXiv 1703.01365). The attributions add up to score - baseline score; how
    far they miss it is reported.
``occlusion``
    the score less the score without that token, exactly, all tokens in fan-out passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, embedding, hook_name, provenance
from mi_hops.model.numeric import wide_dtype, widen
from mi_hops.patching.core import Metrics
from mi_hops.patching.gradients import input_change, run_with_gradients
from mi_hops.patching.quadrature import Rule, path_points
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.interventions import Intervention, add
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import score_gap
from mi_hops.sweep.pairs import Pairs, PairsLike, as_prompts
from mi_hops.sweep.runs import Scored, run_sweep, score_and_capture
from mi_hops.text.tokens import Prompt, align

Baseline = Literal["zero", "mean", "corrupted"]
Method = Literal["gradient", "integrated", "occlusion"]


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def attribute_inputs(
    model: HookedModel,
    pairs: PairsLike,
    *,
    method: Method = "integrated",
    baseline: Baseline = "mean",
    metric: MetricLike = "answer_logprob",
    steps: int = 50,
    rule: Rule = "gauss",
    limits: Limits | None = None,
) -> Result:
    """What each token of each prompt contributes to the score.

    Args:
        pairs: prompts with their answers, ``Pairs(prompts, answer=...)``; of any lengths.
        method: see above.
        baseline: what takes a token's place: the zero vector, the ``"mean"`` of all embeddings of the
            vocabulary, or the token there in the ``"corrupted"`` prompt.
        metric: one, with a gradient unless tokens are occluded.
        steps, rule: points on the path, for ``"integrated"``; see `attribute`.
        limits: ``batch_size`` bounds the prompts in one backward pass.

    Returns:
        `Result`: ``attribution`` (``example, position``; units of the metric; positive where the
        token raises the score; NaN behind the end of shorter prompts) with the label ``token``, and the
        baselines ``score`` and ``empty`` (all tokens taken away), per example; for ``"integrated"`` also
        ``completeness_error``: how far the attributions miss their difference, as a share of it.
        `mi_hops.result.coloured_text` shows it.

    Raises:
        ValueError: an unknown method or baseline, several metrics, a metric without a gradient;
            corrupted prompts that are asked for and not given.
        TokenError: corrupted prompts that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> fact = mi_hops.Hopland().two_hop_facts("seen_parts")[0]
        >>> asked = mi_hops.Pairs(fact.prompt(), answer=fact.answer)
        >>> found = mi_hops.patching.attribute_inputs(model, asked)
        >>> bool(found["completeness_error"].max() < 0.05)
        True
    """
    methods = ("gradient", "integrated", "occlusion")
    if method not in methods:
        raise ValueError(f"method is {method!r}; expected one of {methods}")
    pairs, limits = Pairs.of(pairs), limits or Limits()
    prompts = as_prompts(model, pairs.clean)
    metrics = Metrics.of(metric)
    if not metrics.single or None in metrics.items:
        raise ValueError(f"expected one metric other than 'kl', got {metrics.names}")
    targets = pairs.targets(model, prompts, metrics.reading_answers)
    items = metrics.scored(prompts, targets, None)
    absent = _Absent(model, pairs, prompts, baseline)
    points = path_points(steps, rule) if method == "integrated" else [(1.0, 1.0)]

    def run(group: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        part = [items[i] for i in group]
        score, empty, away, stream = absent.scores(part, group, limits)
        if method == "occlusion":
            return _occluded(model, part, score, away, limits), score, empty
        return _along_path(model, part, away, stream, points), score, empty

    width, wide = max(map(len, prompts)), wide_dtype(dtype_of(model))
    found = torch.full((len(prompts), width), float("nan"), dtype=wide)
    score, empty = torch.zeros(2, len(prompts), dtype=wide)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for group, (values, whole, none) in batched_with_oom_backoff(order, limits.batch_size, run):
        for row, i in enumerate(group):
            found[i, : len(prompts[i])] = values[row, : len(prompts[i])]
            score[i], empty[i] = whole[row], none[row]
    baselines = {"score": score, "empty": empty}
    units = dict.fromkeys(("attribution", "score", "empty"), metrics.units[0])
    if method == "integrated":
        baselines["completeness_error"] = (found.nansum(1) / score_gap(score, empty) - 1).abs()
        units["completeness_error"] = "share of the difference"
    tokens = [[*p.pieces, *[""] * (width - len(p))] for p in prompts]
    return Result.from_arrays(
        {"attribution": (("example", "position"), found)},
        baselines={name: (("example",), value) for name, value in baselines.items()},
        coords={
            "example": pairs.labels,
            "position": list(range(width)),
            "token": (("example", "position"), np.asarray(tokens, dtype=object)),
        },
        units=units,
        provenance=provenance(
            model,
            method=f"input attribution: {method}",
            baseline=baseline,
            metrics=metrics.names,
            **({"steps": steps, "rule": rule} if method == "integrated" else {}),
        ),
        title=f"Input attribution ({method}, against {baseline}); {metrics.names[0]}",
        skipped=pairs.skipped,
        allow_nonfinite=True,  # prompts of several lengths
    )


class _Absent:
    """What taking a token away does to the stream that enters block 0."""

    def __init__(
        self, model: HookedModel, pairs: Pairs, prompts: Sequence[Prompt], baseline: Baseline
    ) -> None:
        if baseline not in ("zero", "mean", "corrupted"):
            raise ValueError(f"baseline is {baseline!r}; expected 'zero', 'mean' or 'corrupted'")
        self.model, self.baseline = model, baseline
        self.others: list[Prompt] = []
        if baseline == "corrupted":
            if not pairs.corrupted:
                raise ValueError(
                    "baseline='corrupted' needs corrupted prompts; give Pairs(clean, corrupted, ...)"
                )
            self.others = as_prompts(model, pairs.corrupted)
            for pair in zip(prompts, self.others, strict=True):
                align(*pair)

    def scores(
        self, items: Sequence[Scored], group: Sequence[int], limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores as they are and with every token away; what each place then loses, and the stream."""
        embed, stream = hook_name("embed"), hook_name("resid_pre", 0)
        score, there = score_and_capture(self.model, items, [embed, stream])
        here = there[embed]
        if self.baseline == "corrupted":
            numbered = zip(group, items, strict=True)
            swapped = [replace(item, prompt=self.others[i]) for i, item in numbered]
            other = score_and_capture(self.model, swapped, [embed])[1][embed].to(here)
        elif self.baseline == "mean":
            other = self._mean(items[0].prompt, here).expand_as(here)
        else:
            other = torch.zeros_like(here)
        away = input_change(items, widen(here), widen(other))
        empty = _without(self.model, items, away, [[range(len(i.prompt))] for i in items], limits)
        return score[:, 0], torch.stack([rows[0] for rows in empty]), away, there[stream]

    def _mean(self, prompt: Prompt, here: Tensor) -> Tensor:
        """The mean of the vocabulary's embeddings, as the model scales them."""
        weight = embedding(self.model).detach()
        mean = weight.to(wide_dtype(weight.dtype)).mean(0).to(here)
        own = weight[prompt.ids[-1]].to(here)
        return mean * (here[0, len(prompt) - 1].norm() / own.norm())


def _without(
    model: HookedModel,
    items: Sequence[Scored],
    away: Float[Tensor, "row pos d_model"],
    places: Sequence[Sequence[Sequence[int]]],
    limits: Limits,
) -> list[Float[Tensor, "place"]]:
    """Scores with the tokens of each of a row's places taken away."""

    def rows_of(row: int, base: int, _: Mapping[str, Tensor]) -> list[Intervention]:
        rows = []
        for where in places[row]:
            less = add(away[row, list(where)], -1.0)
            rows.append(Intervention.at("resid_pre", 0, less, positions=where, base=base))
        return rows

    found = run_sweep(model, items, rows_of, limits=limits, label="tokens")
    return [rows[:, 0] for rows in found.rows]


def _occluded(
    model: HookedModel,
    items: Sequence[Scored],
    score: Float[Tensor, "row"],
    away: Float[Tensor, "row pos d_model"],
    limits: Limits,
) -> Float[Tensor, "row pos"]:
    each = [[[i] for i in range(len(item.prompt))] for item in items]
    found = torch.full(away.shape[:2], float("nan"), dtype=score.dtype)
    for row, without in enumerate(_without(model, items, away, each, limits)):
        found[row, : len(without)] = score[row] - without
    return found


def _along_path(
    model: HookedModel,
    items: Sequence[Scored],
    away: Float[Tensor, "row pos d_model"],
    stream: Float[Tensor, "row pos d_model"],
    points: Sequence[tuple[float, float]],
) -> Float[Tensor, "row pos"]:
    """(embedding - baseline) * the gradient averaged over points between them (1 is the prompt)."""
    slope = torch.zeros_like(away)
    for point, weight in points:
        start = stream.to(away.dtype) - (1 - point) * away
        run = run_with_gradients(model, items, [], start=start)
        slope += weight * run.stream.to(slope)
    return einsum("row pos d, row pos d -> row pos", away, slope).cpu()
