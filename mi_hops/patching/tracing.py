"""Causal tracing with noise: which clean state brings the answer back (Meng et al. 2022, 2202.05262).

The embeddings of a span (the subject) get Gaussian noise, many times over; in each noisy run one
clean state, or a window of them, is put back. Total effect: score of the clean run less that of the
noisy one. Indirect effect of a state: score with it restored less that of the noisy run. Both are
means over the noise samples.

A *severed* variant holds, at the restored tokens, the MLP (or attention) outputs of every other
block at their noisy values: what of the effect is then lost went through these modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from mi_hops.model import HookedModel, embedding, hook_name, hooked, require_hooks
from mi_hops.patching.core import (
    Axes,
    captured,
    put,
    resolve_metrics,
    scored_alone,
    taken,
)
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.interventions import Intervention, Site
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, Target, require_finite, score_gap
from mi_hops.sweep.pairs import (
    PositionsLike,
    Text,
    as_prompts,
    one_each,
    resolve_spans,
)
from mi_hops.sweep.runs import Sweep
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, Grid, HeadsLike, build_grid, default_positions
from mi_hops.text.tokens import Prompt, TokenError, Where
from mi_hops.text.tokens import positions as positions_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.result.result import Result
    from mi_hops.sweep.interventions import Change

Severed = Literal["none", "mlp", "attn"]
_SEVERED_KIND = {"mlp": "mlp_out", "attn": "attn_out"}

# Restored kinds that a module of the same block reads; others are parts of it, or come after it.
_BEFORE = {
    "attn_out": ("resid_pre",),
    "mlp_out": ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid"),
}


def trace(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    subject: Where | Sequence[Where],
    *,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] = "resid_post",
    layers: Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    heads: HeadsLike = None,
    window: int = 1,
    severed: Severed | Sequence[Severed] = "none",
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    metric: MetricLike | Sequence[MetricLike] = "first_prob",
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Result:
    """Causal tracing of every cell of a grid, in every prompt; other arguments as in `patch`.

    Args:
        subject: the span whose embeddings get noise: one for all prompts, or a list of one each.
        positions: where clean states are restored; default every token by itself (`subject_roles`
            names tokens for prompts of unequal lengths).
        window: blocks restored together (the paper takes 1 for the residual stream and 10 for
            attention and MLP outputs of a model of 48 blocks).
        severed: ``"none"``, ``"mlp"``, ``"attn"``, or several (then the result has an axis
            ``severed``).
        noise: standard deviation, in units of that of the token embedding's entries.
        samples: noisy runs a prompt.
        seed: of the noise; each prompt draws its own, whatever else is traced.

    Returns:
        `Result` on ``example``, then ``severed``, ``kind``, ``layer``, ``position``, ``head`` and
        ``metric`` as far as they vary, all means over noise samples: ``indirect`` (unit of the
        metric), ``effect`` (as a share of the total effect; NaN where that is 0), ``score``
        (restored run's) and ``spread``, the standard error of ``indirect`` over samples (NaN for
        one sample); baselines per example ``clean``, ``noisy``, ``total`` and ``total_spread``, the
        standard error of ``total`` over samples. The provenance names the positions that got noise
        in each prompt (``noised``).

    Raises:
        ValueError: as in `patch`; noise or samples that are not positive.
        TokenError: a subject that is not in its prompt.
    """
    if not noise > 0 or samples < 1:
        raise ValueError(f"noise is {noise} and samples {samples}; expected more than 0 of both")
    variants, several = _variants(severed)
    bases = as_prompts(model, prompts, prepend_bos=prepend_bos)
    spoiled = [
        positions_of(p, s)
        for p, s in zip(bases, one_each("subject", subject, len(bases)), strict=True)
    ]
    where = default_positions(kinds) if positions is None else positions
    spans = resolve_spans(where, bases, bases)
    grid = build_grid(model, spans, kinds=kinds, layers=layers, heads=heads, window=window)
    held = [kind for name, kind in _SEVERED_KIND.items() if name in variants]
    require_hooks(model, [hook_name(kind, i) for kind in held for i in range(model.cfg.n_layers)])
    metrics, names, single = resolve_metrics(metric)
    prompts_scored = scored_alone(model, bases, answer, wrong, metrics)
    clean = score(model, prompts_scored)
    limits = Limits(max_rows=max_rows, memory=memory)
    std = noise * float(embedding(model).float().std())

    n_rows = len(variants) * len(grid.cells)
    restored = torch.empty(len(bases), samples, n_rows, len(names), dtype=clean.dtype)
    noisy = torch.empty(len(bases), samples, len(names), dtype=clean.dtype)
    for i in progress_bar(range(len(bases)), label="prompts", show=progress):
        tracer = _Tracer(model, bases[i], spoiled[i], spans.base[i], grid, variants)
        sweep = Sweep(model, [prompts_scored[i]])
        for s, draw in enumerate(_draws(model, len(spoiled[i]), std, samples, (seed, i))):
            with spoil(model, sweep.batch.tokens.shape[1], spoiled[i], draw):
                found = sweep.run(tracer.interventions(), limits)
            restored[i, s], noisy[i, s] = found.rows, found.base[0]
    indirect = restored - noisy[:, :, None]
    mean = indirect.mean(1)
    total = clean - noisy.mean(1)
    effect = mean / score_gap(clean, noisy.mean(1))[:, None]
    for m, name in enumerate(names):
        require_finite(name, restored[..., m].flatten())
    if several:
        grid = _with_axis(grid, "severed", variants)
    axes = Axes(grid, spans, bases, metrics, names, single, examples)
    return axes.result(
        model,
        {
            "indirect": mean, "effect": effect, "score": restored.mean(1),
            "spread": _standard_error(indirect),
        },
        {
            "clean": clean, "noisy": noisy.mean(1), "total": total,
            "total_spread": _standard_error(noisy),
        },
        title=f"Causal tracing: {', '.join(grid.kinds)}; {', '.join(names)}",
        units={"effect": "share of the total effect"},
        settings={
            "method": "causal tracing", "noise": noise, "noise_std": std, "samples": samples,
            "seed": seed, "noised": [list(span) for span in spoiled], "window": window,
            "severed": list(variants), "prepend_bos": prepend_bos,
        },
    )  # fmt: skip


def _standard_error(
    values: Float[Tensor, "example sample *rest"],
) -> Float[Tensor, "example *rest"]:
    """Of the mean over samples; NaN for one sample."""
    n = values.shape[1]
    return values.std(1) / n**0.5 if n > 1 else values[:, 0] * float("nan")


def subject_roles(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    subject: Where | Sequence[Where],
    *,
    prepend_bos: bool = True,
) -> dict[str, list[int]]:
    """Positions that prompts of unequal lengths share, for `trace` and `patch`.

    Returns:
        ``first subject token``, ``last subject token``, ``next token`` (the one after the subject)
        and ``last token``, each with one position a prompt.

    Raises:
        TokenError: a subject that is absent, or that ends its prompt.
    """
    found = as_prompts(model, prompts, prepend_bos=prepend_bos)
    spans = [
        positions_of(p, s)
        for p, s in zip(found, one_each("subject", subject, len(found)), strict=True)
    ]
    for prompt, span in zip(found, spans, strict=True):
        if span[-1] == prompt.last:
            raise TokenError(
                f"the subject ends the prompt {prompt.text!r}; no token comes after it"
            )
    return {
        "first subject token": [span[0] for span in spans],
        "last subject token": [span[-1] for span in spans],
        "next token": [span[-1] + 1 for span in spans],
        "last token": [prompt.last for prompt in found],
    }


def _variants(severed: Severed | Sequence[Severed]) -> tuple[tuple[Severed, ...], bool]:
    several = not isinstance(severed, str)
    variants = (severed,) if isinstance(severed, str) else tuple(severed)
    known = ("none", *_SEVERED_KIND)
    if not variants or len(set(variants)) < len(variants) or not set(variants) <= set(known):
        raise ValueError(f"severed is {severed!r}; expected one or more of {known}, each once")
    return variants, several


def _draws(
    model: HookedModel, width: int, std: float, samples: int, seed: tuple[int, int]
) -> Iterator[Float[Tensor, "pos d_model"]]:
    """Noise for the span of one prompt, in float32 on the CPU, so that devices agree."""
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    for _ in range(samples):
        yield std * torch.randn(width, int(model.cfg.d_model), generator=generator)


@contextmanager
def spoil(
    model: HookedModel, width: int, span: Sequence[int], noise: Float[Tensor, "pos d_model"]
) -> Iterator[None]:
    """Add noise to what enters block 0 at a span, in every pass made inside the ``with`` block.

    Args:
        width: tokens of a whole row; a pass over fewer is taken to be over the last of them.
    """

    def fn(x: Tensor) -> Tensor:
        start = width - x.shape[1]
        here = [j for j, p in enumerate(span) if p >= start]
        if not here:
            return x
        x = x.clone()
        where = [span[j] - start for j in here]
        x[:, where] += noise[here].to(x.device, x.dtype)
        return x

    with hooked(model, [(hook_name("resid_pre", 0), fn)]):
        yield


class _Tracer:
    """The interventions of one prompt under one noise sample (made while the noise is on)."""

    def __init__(
        self,
        model: HookedModel,
        prompt: Prompt,
        spoiled: Sequence[int],
        spans: Sequence[tuple[int, ...]],
        grid: Grid,
        variants: Sequence[Severed],
    ) -> None:
        self.model, self.prompt, self.spoiled = model, prompt, spoiled
        self.spans, self.grid, self.variants = spans, grid, variants
        self.clean = captured(model, [prompt], grid.hook_names())

    def interventions(self) -> list[Intervention]:
        items = []
        for variant in self.variants:
            kind = _SEVERED_KIND.get(variant)
            held = self._noisy(kind) if kind else {}
            for cell in self.grid.cells:
                sites, changes = self._restore(cell)
                if kind is not None:
                    severed = self._hold(cell, kind, held)
                    sites, changes = [*sites, *severed[0]], [*changes, *severed[1]]
                items.append(Intervention(tuple(sites), tuple(changes)))
        return items

    def _noisy(self, kind: str) -> dict[str, Tensor]:
        names = [hook_name(kind, layer) for layer in range(self.model.cfg.n_layers)]
        return captured(self.model, [self.prompt], names)

    def _restore(self, cell: Cell) -> tuple[list[Site], list[Change]]:
        where = self.spans[cell.span]
        sites = [Site(cell.kind, layer, where, cell.head) for layer in cell.layers]
        values = [
            taken(self.clean[hook_name(cell.kind, layer)][0], cell, where, len(self.prompt))
            for layer in cell.layers
        ]
        return sites, [put(value, cell) for value in values]

    def _hold(
        self, cell: Cell, kind: str, noisy: dict[str, Tensor]
    ) -> tuple[list[Site], list[Change]]:
        """Hold `kind` at its noisy values wherever it comes after what is restored."""
        where = self.spans[cell.span]
        layers = [
            layer
            for layer in range(min(cell.layers), int(self.model.cfg.n_layers))
            if layer not in cell.layers or cell.kind in _BEFORE[kind]
        ]
        whole = Cell(kind, tuple(layers), cell.span)
        values = [
            taken(noisy[hook_name(kind, layer)][0], whole, where, len(self.prompt))
            for layer in layers
        ]
        sites = [Site(kind, layer, where) for layer in layers]
        return sites, [put(value, whole) for value in values]


def _with_axis(grid: Grid, name: str, labels: Sequence[str]) -> Grid:
    from dataclasses import replace

    import numpy as np

    return replace(
        grid,
        dims=(name, *grid.dims),
        shape=(len(labels), *grid.shape),
        coords={name: np.asarray(labels), **grid.coords},
        cells=grid.cells * len(labels),
    )
