"""Metric gradients at any hook point, from one forward and one backward pass over many prompts.

Rows do not mix, so the gradient of the summed metric is each row's own. Neither the model's
parameters nor their ``.grad`` are touched: the graph starts at the residual stream entering the
lowest block asked for, and blocks below it keep nothing for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import Hook, HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import logits_at


@dataclass(frozen=True)
class Gradients:
    """What a pass returns; all detached.

    Attributes:
        scores: the metric of each row, ``[row]``, on the CPU, in float32 or wider.
        activations: at the named hook points, ``[row, ...]``.
        gradients: of each row's metric at them, in the same shapes.
        stream: gradient at the residual stream entering the block the graph starts at.
    """

    scores: Float[Tensor, "row"]
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    stream: Tensor


class Recorded:
    """A forward pass whose graph still stands.

    Attributes:
        scores: the metric of each row, on the CPU, in float32 or wider.
        live: activations at the named hook points, on the graph.
        stream: the residual stream that the graph starts from.
    """

    def __init__(
        self, metric: str, scores: Tensor, live: dict[str, Tensor], stream: Tensor, *, cut: bool
    ) -> None:
        self.scores, self.live, self.stream = scores, live, stream
        self._metric, self._cut = metric, cut

    def gradients(
        self, names: Iterable[str], *, keep: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of each row's score at hook points, and at the stream.

        Args:
            keep: let the graph stand, which takes memory.

        Raises:
            ValueError: a gradient that is not finite.
            RuntimeError: a hook point off the graph of this model class.
        """
        names = list(names)
        at = [*(self.live[name] for name in names), self.stream]
        slopes = _slopes(self.scores.sum(), at, keep)
        found = {}
        for name, slope in zip(names, slopes[:-1], strict=True):
            if slope is None and not self._cut:
                raise _off_the_graph(name)
            found[name] = torch.zeros_like(self.live[name]) if slope is None else slope
        stream = torch.zeros_like(self.stream) if slopes[-1] is None else slopes[-1]
        _require_finite(self._metric, {**found, hook_name("resid_pre", 0): stream})
        return found, stream

    def pull_back(
        self, result: str, entry: str, slopes: Float[Tensor, "way row *rest"]
    ) -> Float[Tensor, "way row pos d_model"]:
        """Gradients at `result` as gradients at `entry`, a hook point that it is made of.

        Only what lies between the two is passed, each gradient by itself; the graph stays.

        Raises:
            RuntimeError: nothing leads from one to the other.
        """
        (found,) = torch.autograd.grad(
            self.live[result],
            self.live[entry],
            slopes,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        if found is None:
            raise _off_the_graph(entry)
        return found


def record(
    model: HookedModel,
    prompts: Sequence[Scored],
    names: Sequence[str],
    *,
    start: Float[Tensor, "row pos d_model"] | None = None,
    drop_block: int | None = None,
) -> Recorded:
    """The forward pass of `run_with_gradients`, whose arguments these are."""
    sweep = Sweep(model, prompts)
    lowest = 0 if start is not None else min((int(n.split(".")[1]) for n in names), default=0)
    live: dict[str, Tensor] = {}
    leaf: list[Tensor] = []

    def start_graph(x: Tensor) -> Tensor:
        x = x.detach().clone() if start is None else overlaid(x.detach(), start)
        leaf.append(x.requires_grad_(True))
        return leaf[0]

    def keep(name: str, x: Tensor) -> Tensor:
        live[name] = x
        return x  # what the model goes on with, also where the hook saw a reshaped copy

    hooks: list[Hook] = [(hook_name("resid_pre", lowest), start_graph)]
    if drop_block is not None:
        hooks += [(hook_name(k, drop_block), torch.Tensor.detach) for k in ("attn_out", "mlp_out")]
    hooks += [(name, partial(keep, name)) for name in names]
    positions = torch.tensor(sweep.scored)
    with torch.enable_grad():
        logits = logits_at(model, sweep.batch.tokens, positions, hooks=hooks)
        scores = _scores(sweep, logits)
    metric = sweep.prompts[0].metrics[0].name
    return Recorded(metric, scores, live, leaf[0], cut=drop_block is not None)


def run_with_gradients(
    model: HookedModel,
    prompts: Sequence[Scored],
    names: Sequence[str],
    *,
    start: Float[Tensor, "row pos d_model"] | None = None,
    drop_block: int | None = None,
) -> Gradients:
    """Activations and metric gradients at hook points of blocks.

    Args:
        prompts: with one metric each; answer tokens it appends are run as well.
        names: hook points, ``blocks.{layer}...``.
        start: residual stream to enter block 0 with, instead of the prompts' own; it may cover
            fewer positions than are run (the rest stays).
        drop_block: let no gradient through what attention and MLP of this block write.

    Raises:
        ValueError: a metric without a gradient (a rank, a count), or one that is not finite, or
            whose gradient is not.
        RuntimeError: a hook point off the graph of this model class.
    """
    run = record(model, prompts, names, start=start, drop_block=drop_block)
    gradients, stream = run.gradients(names, keep=False)
    activations = {name: tensor.detach() for name, tensor in run.live.items()}
    return Gradients(run.scores.detach(), activations, gradients, stream)


def _off_the_graph(name: str) -> RuntimeError:
    return RuntimeError(
        f"no gradient reaches {name}: on this model the activation seen by the hook is not the one "
        "the model goes on with"
    )


def overlaid(x: Float[Tensor, "row pos *d"], value: Float[Tensor, "row pos *d"]) -> Tensor:
    """A copy of `x` with `value` over its first positions; what reaches further stays, or is cut off."""
    width = min(x.shape[1], value.shape[1])
    x = x.clone()
    x[:, :width] = value[:, :width].to(x.device, x.dtype)
    return x


def input_change(
    prompts: Sequence[Scored], there: Tensor, here: Tensor
) -> Float[Tensor, "row pos d_model"]:
    """`there` less `here` at the tokens of the prompts; 0 at answer tokens and padding, no prompt's own."""
    found = torch.zeros_like(here)
    for row, item in enumerate(prompts):
        n = len(item.prompt)
        found[row, :n] = there[row, :n] - here[row, :n]
    return found


def _require_finite(metric: str, gradients: dict[str, Tensor]) -> None:
    bad = [name for name, slope in gradients.items() if not slope.isfinite().all()]
    if bad:
        raise ValueError(
            f"the gradient of metric {metric!r} is not finite at {len(bad)} of {len(gradients)} hook "
            f"points, e.g. {bad[0]}; is the metric smooth at these logits, and does the model "
            "overflow in this dtype?"
        )


def _slopes(total: Tensor, at: Sequence[Tensor], keep: bool) -> list[Tensor | None]:
    """Gradients of `total`; None where it does not depend on a tensor."""
    on_graph = [tensor for tensor in at if tensor.requires_grad]
    found = iter(torch.autograd.grad(total, on_graph, allow_unused=True, retain_graph=keep))
    return [next(found) if tensor.requires_grad else None for tensor in at]


def _scores(sweep: Sweep, logits: Tensor) -> Tensor:
    rows = []
    for i, run in enumerate(sweep.runs):
        ((_, _, found),) = run.scores(logits[i : i + 1], sweep.prompts)
        rows.append(found[0])
    scores = torch.stack(rows)
    name = sweep.prompts[0].metrics[0].name
    if not scores.requires_grad:
        raise ValueError(
            f"metric {name!r} has no gradient with respect to the logits; attribute a smooth one "
            "(logit_diff, answer_logprob, first_prob, ...) or patch exactly"
        )
    if not scores.isfinite().all():
        raise ValueError(f"metric {name!r} is not finite on the prompts as they are")
    wide = wide_dtype(dtype_of(sweep.model))
    return scores.to("cpu", wide)
