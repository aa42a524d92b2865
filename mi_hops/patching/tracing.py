"""Causal tracing with noise: which clean state brings the answer back (Meng et al. 2022, 2202.05262).

The embeddings of a span (the subject) get Gaussian noise, many times over; in each noisy run one
clean state, or a window of them, is put back. Total effect: score of the clean run less that of the
noisy one. Indirect effect of a state: score with it restored less that of the noisy run. Both are
means over the noise samples.

A *severed* variant holds, at the restored tokens, the MLP (or attention) outputs of every other
block at their noisy values: what of the effect is then lost went through these modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, embedding, hook_name, hooked, require_hooks
from mi_hops.patching.core import GridSweep, Metrics, captured, put, require_effect, taken
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import each_part
from mi_hops.sweep.interventions import Change, Intervention, Site
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, require_finite
from mi_hops.sweep.normalising import score_gap
from mi_hops.sweep.pairs import Pairs, PairsLike, Texts, as_prompts, one_each
from mi_hops.sweep.runs import Sweep
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, Grid, Sites, SitesLike
from mi_hops.text.tokens import Prompt, TokenError, Where
from mi_hops.text.tokens import positions as positions_of

Severed = Literal["none", "mlp", "attn"]
_SEVERED_KIND = {"mlp": "mlp_out", "attn": "attn_out"}

# Restored kinds that a module of the same block reads; others are parts of it, or come after it.
_BEFORE = {
    "attn_out": ("resid_pre",),
    "mlp_out": ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid"),
}


def trace(
    model: HookedModel,
    pairs: PairsLike,
    subject: Where | Sequence[Where],
    sites: SitesLike = "resid_post",
    *,
    severed: Severed | Sequence[Severed] = "none",
    noise: float | str = 3.0,
    samples: int = 10,
    seed: int = 0,
    metric: MetricLike | Sequence[MetricLike] = "first_prob",
    limits: Limits | None = None,
) -> Result:
    """Causal tracing for every cell of a grid, in every clean prompt; other arguments as in `patch`.

    Args:
        pairs: clean prompts with their answers, ``Pairs(prompts, answer=...)``; corrupted ones have
            no part in it.
        subject: the span whose embeddings get noise: one for all prompts, or a list of one each.
        sites: where clean states are restored (`subject_roles` names positions for prompts of
            unequal lengths). The paper takes a window of 1 for the residual stream and of 10 for
            attention and MLP outputs of a model of 48 blocks.
        severed: ``"none"``, ``"mlp"``, ``"attn"``, or several (then the result has an axis
            ``severed``).
        noise: standard deviation, in units of that of the token embedding's entries; ``"s3"`` takes
            three times that of the subjects' own embeddings, as the published repository does.
        samples: noisy runs per prompt.
        seed: of the noise; each prompt draws its own by its tokens and its span, whatever else is
            traced.

    Returns:
        `Result` on ``example``, then ``severed``, ``kind``, ``layer``, ``position``, ``head`` and
        ``metric`` as far as they vary, all means over noise samples: ``indirect`` (unit of the
        metric), ``effect`` (as a share of the total effect; NaN where that is 0), ``score``
        (restored run's) and ``spread``, the standard error of ``indirect`` over samples (NaN for
        one sample); baselines per example ``clean``, ``noisy``, ``total`` and ``total_spread``, the
        standard error of ``total`` over samples. A label ``noised`` along ``example`` names the
        positions that got noise, as text (``"3 4"``).

    Raises:
        ValueError: as in `patch`; noise or samples that are not positive, or noise that changes no
            prompt's score.
        TokenError: a subject that is not in its prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> fact = mi_hops.Hopland().two_hop_facts("seen_parts")[0]
        >>> asked = mi_hops.Pairs(fact.prompt(), answer=fact.answer)
        >>> mi_hops.trace(model, asked, fact.subject, samples=2)["indirect"].dims
        ('example', 'layer', 'position')
    """
    times, of_subjects = _strength(noise)
    if not times > 0 or samples < 1:
        raise ValueError(f"noise is {noise} and samples {samples}; expected more than 0 of both")
    variants = (severed,) if isinstance(severed, str) else tuple(severed)
    known = ("none", *_SEVERED_KIND)
    if not variants or len(set(variants)) < len(variants) or not set(variants) <= set(known):
        raise ValueError(f"severed is {severed!r}; expected one or more of {known}, each once")
    pairs, sites, limits = Pairs.of(pairs), Sites.of(sites), limits or Limits()
    if sites.neurons is not None:
        raise ValueError("single neurons are not traced; restore all of them, or patch them")
    bases, noised = _subjects(model, pairs.clean, subject)
    grid = sites.grid(model, bases)
    held = [kind for name, kind in _SEVERED_KIND.items() if name in variants]
    require_hooks(model, [hook_name(kind, i) for kind in held for i in range(model.cfg.n_layers)])
    metrics = Metrics.of(metric)
    targets = pairs.targets(model, bases, metrics.reading_answers)
    scored = metrics.scored(bases, targets, metrics.baselines(model, bases))
    clean = score(model, scored)
    table = embedding(model).float()
    if of_subjects:
        ids = [bases[i].ids[p] for i, span in enumerate(noised) for p in span]
        table = table[torch.tensor(ids, device=table.device)]
    std = times * float(table.std())

    n_rows, n_metrics = len(variants) * len(grid.cells), len(metrics.items)
    restored = torch.empty(len(bases), samples, n_rows, n_metrics, dtype=clean.dtype)
    noisy = torch.empty(len(bases), samples, n_metrics, dtype=clean.dtype)
    quiet = replace(limits, progress=False)

    def run(i: int) -> list[Tensor]:
        states = captured(model, [bases[i]], grid.hook_names())
        tracer = _Tracer(model, bases[i], grid.base[i], grid, variants, states)
        sweep = Sweep(model, [scored[i]])
        found = []
        for draw in noise_draws(model, bases[i], noised[i], std, samples, seed):
            with add_noise(model, noised[i], draw):
                found.append(sweep.run(tracer.interventions(), quiet))
        return [torch.stack([f.rows for f in found]), torch.stack([f.base[0] for f in found])]

    said = pairs.labels, variants, noise, samples, seed, metrics.names
    parts = each_part(
        model,
        range(len(bases)),
        run,
        kept=lambda i: ("trace", said, bases[i].ids, noised[i]),
        texts=lambda i: [bases[i].text],
    )
    bar = progress_bar(parts, label="prompts", total=len(bases), show=limits.progress)
    for i, found in bar:
        restored[i], noisy[i] = found
    for m, name in enumerate(metrics.names):
        require_finite(name, restored[..., m].flatten())
    indirect, mean_noisy = restored - noisy[:, :, None], noisy.mean(1)
    effect = indirect.mean(1) / score_gap(clean, mean_noisy)[:, None]
    require_effect(effect, "the noise changes no prompt's score; raise `noise`")
    if not isinstance(severed, str):
        grid = replace(
            grid,
            coords={"severed": np.asarray(variants), **grid.coords},
            cells=grid.cells * len(variants),
        )
    result = GridSweep(model, bases, grid, metrics, pairs.labels, limits).result(
        {
            "indirect": indirect.mean(1),
            "effect": effect,
            "score": restored.mean(1),
            "spread": _standard_error(indirect),
        },
        {
            "clean": clean,
            "noisy": mean_noisy,
            "total": clean - mean_noisy,
            "total_spread": _standard_error(noisy),
        },
        title=f"Causal tracing: {', '.join(grid.kinds)}; {', '.join(metrics.names)}",
        units={"effect": "share of the total effect"},
        skipped=pairs.skipped,
        method="causal tracing",
        noise=noise,
        noise_std=std,
        samples=samples,
        seed=seed,
        window=sites.window,
        severed=list(variants),
    )
    # A label, not a setting: traces of other prompts merge.
    spans = np.array([" ".join(map(str, span)) for span in noised], dtype=object)
    result.data.coords["noised"] = ("example", spans)
    return result


def _strength(noise: float | str) -> tuple[float, bool]:
    """The number of standard deviations, and whether they are those of the subjects' embeddings."""
    if not isinstance(noise, str):
        return noise, False
    try:
        return float(noise.removeprefix("s")), noise.startswith("s")
    except ValueError:
        raise ValueError(
            f"noise is {noise!r}; expected a number, or one after an s, such as 's3', for standard "
            "deviations of the subjects' embeddings"
        ) from None


def _standard_error(
    values: Float[Tensor, "example sample *rest"],
) -> Float[Tensor, "example *rest"]:
    """Of the mean over samples; NaN for one sample."""
    n = values.shape[1]
    return values.std(1) / n**0.5 if n > 1 else values[:, 0] * float("nan")


def _subjects(
    model: HookedModel, given: Texts, subject: Where | Sequence[Where]
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Prompts, and the positions of the subject in each."""
    found = as_prompts(model, given)
    spans = one_each("subject", subject, len(found))
    return found, [positions_of(p, s) for p, s in zip(found, spans, strict=True)]


def subject_roles(
    model: HookedModel, prompts: Texts, subject: Where | Sequence[Where]
) -> dict[str, list[int]]:
    """Positions that prompts of unequal lengths share, for `trace` and `patch`.

    Returns:
        ``first subject token``, ``last subject token``, ``next token`` (the one after the subject)
        and ``last token``, each with one position per prompt.

    Raises:
        TokenError: a subject that is absent, or that ends its prompt.
    """
    found, spans = _subjects(model, prompts, subject)
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


def noise_draws(
    model: HookedModel,
    prompt: Prompt,
    span: Sequence[int],
    std: float,
    samples: int,
    seed: int,
) -> Iterator[Float[Tensor, "pos d_model"]]:
    """Noise for the span of one prompt, in float32 on the CPU, so that devices agree."""
    what = repr((int(seed), list(prompt.ids), list(span))).encode()
    drawn = int.from_bytes(hashlib.sha256(what).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(drawn)
    for _ in range(samples):
        yield std * torch.randn(len(span), int(model.cfg.d_model), generator=generator)


@contextmanager
def add_noise(
    model: HookedModel, span: Sequence[int], noise: Float[Tensor, "pos d_model"]
) -> Iterator[None]:
    """Add noise to what enters block 0 at a span, in every pass made inside the ``with`` block.

    As a hook is on the model, every pass is one from the first token on (`mi_hops.model.shortcuts`).
    """

    def fn(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, list(span)] += noise.to(x.device, x.dtype)
        return x

    with hooked(model, [(hook_name("resid_pre", 0), fn)]):
        yield


@dataclass(frozen=True)
class _Tracer:
    """The interventions of one prompt under one noise sample (made while the noise is on)."""

    model: HookedModel
    prompt: Prompt
    spans: Sequence[tuple[int, ...]]
    grid: Grid
    variants: Sequence[Severed]
    clean: dict[str, Tensor]

    def interventions(self) -> list[Intervention]:
        items = []
        layers = range(int(self.model.cfg.n_layers))
        for variant in self.variants:
            kind = _SEVERED_KIND.get(variant)
            if kind:
                names = [hook_name(kind, layer) for layer in layers]
                noisy = captured(self.model, [self.prompt], names)
            for cell in self.grid.cells:
                pairs = self._put(self.clean, cell)
                if kind:  # held at its noisy values wherever it comes after what is restored
                    after = [
                        layer
                        for layer in layers[min(cell.layers) :]
                        if layer not in cell.layers or cell.kind in _BEFORE[kind]
                    ]
                    pairs += self._put(noisy, Cell(kind, tuple(after), cell.span))
                sites, changes = zip(*pairs, strict=True)
                items.append(Intervention(sites, changes))
        return items

    def _put(self, store: dict[str, Tensor], cell: Cell) -> list[tuple[Site, Change]]:
        """A cell's sites, with what each one gets from `store`."""
        where, n = self.spans[cell.span], len(self.prompt)
        return [
            (
                Site(cell.kind, layer, where, cell.head),
                put(taken(store[hook_name(cell.kind, layer)][0], cell, where, n), cell),
            )
            for layer in cell.layers
        ]
