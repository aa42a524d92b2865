"""Activation patching: what changes in the answer if one activation is that of another run.

`patch` runs a *base* prompt and puts in activations of a *source* prompt, cell by cell. All cells
of a sweep go through the fan-out forward, so a layer x position grid is one pass or a few. Every
value equals that of one forward pass with one hook.

The effect is the share of the way from the base run to the other one (as the normalised logit
difference of Wang et al. 2022, arXiv 2211.00593, for any metric)::

    effect = (score - score of the base) / (score of the other run - score of the base)

so 0 means that nothing changed and 1 that the score became the other run's: restored when denoising (base =
corrupted), as broken as the corrupted run when noising (base = clean).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, hook_name, read_out
from mi_hops.model.layout import copied_bytes, pretransposed_weights
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import (
    ChangeOf,
    GridSweep,
    Metrics,
    put,
    require_effect,
    taken,
)
from mi_hops.result.display import html_table
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import HEAD_AXIS, Change
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import KL, MetricLike, Plan
from mi_hops.sweep.normalising import normalised
from mi_hops.sweep.pairs import Pairs, PairsLike, as_prompts
from mi_hops.sweep.passes import row_bytes
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import next_token_logits, score
from mi_hops.sweep.sites import Cell, Direction, Sites, SitesLike, activation_width
from mi_hops.text.tokens import Prompt


def patch(
    model: HookedModel,
    pairs: PairsLike,
    sites: SitesLike = "resid_pre",
    *,
    metric: MetricLike | Sequence[MetricLike] = "logit_diff",
    direction: Direction = "denoise",
    limits: Limits | None = None,
) -> Result:
    """Patch activations at every cell of a grid, in every pair of prompts.

    Args:
        pairs: `Pairs`, or ``(clean, corrupted)``; each of texts, token ids or `Prompt`s. Existing
            clean activations (``cache`` of ``model.run_with_cache``) can replace the clean prompts,
            or be given with them as ``Pairs(..., source=cache)``.
        sites: `Sites`, or kinds of activation, or hook names.
        metric: a metric, its name, a function ``[row, vocab] -> [row]`` of the last position's
            logits, `FullLogits` of a function of all of them, ``"kl"`` (from the clean run's
            distribution, pair by pair), or several of these (then the result has an axis
            ``metric``).
        direction: ``"denoise"`` puts clean activations into the corrupted run, ``"noise"``
            corrupted ones into the clean run.
        limits: ``batch_size`` bounds the pairs in one fan-out, and so the activations held.

    Returns:
        `Result` on ``example`` (a pair), ``kind``, ``layer``, ``position``, ``head`` and ``metric``
        as far as they vary, with ``effect`` (see above; NaN in examples whose two runs score the
        same), ``score`` (the patched run's) and ``change`` (less the base run's); and per example
        the baselines ``clean`` and ``corrupted``. Nothing is averaged. Where only a part of the
        clean run's activations is given, ``clean`` and ``effect`` are unknown and left out.

    Raises:
        ValueError: an unknown kind or metric, a layer, head or neuron that does not exist, a metric
            of the wrong shape, scores that are not finite, prompts of a pair that are the same
            tokens, or two runs that score the same in every pair.
        TokenError: prompts or spans of unequal lengths, an absent span, an empty answer.
        MissingHookError: a hook point the model does not have.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:40]
        >>> pairs = mi_hops.contrast(model, facts, form="suffix")
        >>> result = mi_hops.patch(model, pairs, mi_hops.Sites("attn_out", positions=pairs.roles))
        >>> result["effect"].dims
        ('example', 'layer', 'position')
    """
    return PatchJob(model, pairs, sites, metric=metric, direction=direction, limits=limits).run()


@dataclass(frozen=True)
class PatchPlan:
    """The cost of a sweep, computed before anything runs.

    Attributes:
        cells: interventions in each pair.
        rows: rows of all passes beside those of the prompts themselves.
        forwards: forward passes in all, those that read activations and baselines included.
        widest: most intervention rows in one pass.
        activation_bytes: source activations held at once.
        pass_bytes: estimate for the widest pass, the rows of its prompts included.
        weight_bytes: copies of weights while the sweep runs (`mi_hops.model.layout`).
    """

    cells: int
    rows: int
    forwards: int
    widest: int
    activation_bytes: int
    pass_bytes: int
    weight_bytes: int

    @property
    def bytes(self) -> int:
        """Estimated peak memory in addition to the weights."""
        return self.activation_bytes + self.pass_bytes + self.weight_bytes

    def _repr_html_(self) -> str:
        told = asdict(self) | {"bytes": self.bytes}
        rows = [(k.replace("_", " "), f"{v:,}") for k, v in told.items()]
        return html_table("What the sweep will take", ("", "number"), rows, total=len(rows))


class PatchJob:
    """A patching sweep with everything resolved and checked, before anything runs.

    The arguments are those of `patch`, which refuses what they do.

    Attributes:
        pairs: the pairs.
        bases: the prompts that are changed.
        others: those of the other run, None where only its activations are given.
        sources: those that activations come from; their places, where the activations are given.
        grid: which cells, and where they lie.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> PatchJob(model, pairs, "mlp_out").plan().forwards >= 1
        True
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: PairsLike,
        sites: SitesLike = "resid_pre",
        *,
        metric: MetricLike | Sequence[MetricLike] = "logit_diff",
        direction: Direction = "denoise",
        limits: Limits | None = None,
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise ValueError(f"direction is {direction!r}; expected 'denoise' or 'noise'")
        self.model, self.direction, self.limits = model, direction, limits or Limits()
        # Of the other run and of the base.
        self._ends = ("clean", "corrupted") if direction == "denoise" else ("corrupted", "clean")
        self.pairs = pairs = Pairs.of(pairs)
        if not pairs.corrupted:
            raise ValueError(
                "patching takes pairs of prompts, and there are no corrupted ones; pass Pairs(clean, "
                "corrupted, answer=...) or the tuple (clean, corrupted)"
            )
        self.corrupted = as_prompts(model, pairs.corrupted)
        self.clean = as_prompts(model, pairs.clean) if pairs.clean else None
        self.others: list[Prompt] | None
        if self.clean is not None:
            pairs.require_different(self.clean, self.corrupted)
        elif direction == "noise":
            raise ValueError(
                "of the clean run only activations are given, so nothing can be put into it; pass its "
                "prompts, or take direction 'denoise'"
            )
        if direction == "denoise" or self.clean is None:
            self.bases, self.others = self.corrupted, self.clean
        else:
            self.bases, self.others = self.clean, self.corrupted
        self.sources = self.others or self.bases
        if pairs.source:
            self.sources = as_prompts(model, pairs.source)
        self.metrics = Metrics.of(metric)
        needed = self.metrics.reading_answers
        self.base_targets = pairs.targets(model, self.bases, needed)
        self.other_targets = pairs.targets(model, self.others, needed) if self.others else []
        self.sites = Sites.of(sites)
        self.grid = self.sites.grid(model, self.bases, self.sources)
        self.sweep = GridSweep(
            model, self.bases, self.grid, self.metrics, pairs.labels, self.limits
        )
        self.given = None
        if pairs.activations is not None:
            self.given = self._given((c.kind, i) for c in self.grid.cells for i in c.layers)

    def __repr__(self) -> str:
        return (
            f"PatchJob: {len(self.pairs)} pairs x {len(self.grid.cells)} cells, {self.direction}, "
            f"{self.sites!r}, metrics {self.metrics.names}"
        )

    @property
    def one_metric(self) -> str:
        """The name of the only metric.

        Raises:
            ValueError: several are given.
        """
        if not self.metrics.single:
            raise ValueError(
                f"expected one metric, got the list {self.metrics.names}; run each by itself"
            )
        return self.metrics.names[0]

    def require_gradient(self) -> None:
        """Refuse a metric whose gradient is always 0 in a base run.

        Raises:
            ValueError: a divergence from the base run itself: ``"kl"`` where the base is the clean
                run, or a `KL` whose baseline is that of a base prompt.
        """
        metric, own = self.metrics.items[0], []
        if metric is None and self.direction == "noise":
            own = list(range(len(self.bases)))
        elif isinstance(metric, KL):
            logits = next_token_logits(self.model, self.bases)
            dtype = dtype_of(self.model)
            own = [i for i, x in enumerate(logits) if metric.measures_from(x.to(dtype))]
        if own:
            raise ValueError(
                f"metric 'kl' measures from the base run itself in {len(own)} of {len(self.bases)} "
                f"pairs (first: {own[:5]}; the name 'kl' measures from the clean run, which is the "
                "base where direction is 'noise'): there it is at its minimum, its gradient is 0, "
                "and estimates would rank rounding; average the gradient over the path "
                "(method='integrated'), or take the other direction or metric"
            )

    # -- what is run -----------------------------------------------------------------------------

    @cached_property
    def baselines(self) -> list[Tensor] | None:
        """The clean logits that ``"kl"`` compares with; None where it is not asked for.

        Raises:
            ValueError: only activations of the clean run are given, and not its last stream.
        """
        if None not in self.metrics.items:
            return None
        if self.clean is not None:
            return next_token_logits(self.model, self.clean)
        logits = self._given_logits()
        if logits is None:
            raise ValueError("metric 'kl' compares with the clean run; pass its prompts")
        return list(logits)

    def scored(self, baselines: Sequence[Tensor] | None = None) -> list[Scored]:
        """The base prompts, to be scored; `baselines` default to the job's own."""
        known = self.baselines if baselines is None else baselines
        return self.metrics.scored(self.bases, self.base_targets, known)

    def other_scored(self, baselines: Sequence[Tensor] | None = None) -> list[Scored]:
        """The prompts of the other run, to be scored; none where they are not given."""
        known = self.baselines if baselines is None else baselines
        return self.metrics.scored(self.others or [], self.other_targets, known)

    def source_scored(self, baselines: Sequence[Tensor] | None = None) -> list[Scored]:
        """The prompts that activations come from, to be run beside the bases.

        A third source is scored on the base run's answer, which only integrated gradients look at.
        """
        if self.given is not None:
            return []
        if not self.pairs.source:
            return self.other_scored(baselines)
        known = self.baselines if baselines is None else baselines
        return self.metrics.scored(self.sources, self.base_targets, known)

    def score_other(self) -> Float[Tensor, "example metric"] | None:
        """Scores of the other run by itself; None where what is given does not determine them."""
        others = self.other_scored()
        return score(self.model, others) if others else self._given_score()

    @property
    def other_apart(self) -> bool:
        """Whether the other run is not the one that activations come from."""
        return bool(self.pairs.source) or self.given is not None

    def plan(self) -> PatchPlan:
        """Rows, passes and bytes; nothing runs."""
        zeros = None
        if None in self.metrics.items:  # any logits will do
            zeros = [torch.zeros(int(self.model.cfg.d_vocab))] * len(self.bases)
        bases, sources = self.scored(zeros), self.source_scored(zeros)
        widest, fullest, rows, forwards, held, n_scored = 0, 0, 0, 0, 0, 1
        width = max(len(p) for p in self.bases)
        for group in self.sweep.groups():
            beside = [sources[i] for i in group] if sources else []
            sweep = Sweep(self.model, [*(bases[i] for i in group), *beside])
            items = [
                item
                for base, i in enumerate(group)
                for item in self.sweep.interventions(i, base, lambda *_: lambda x: x)
            ]
            passes = sweep.plan(items, self.limits)
            most = max(len(p.members) for p in passes)
            widest, fullest = max(widest, most), max(fullest, most + len(sweep.runs))
            rows += sum(len(p.members) for p in passes)
            forwards += len(passes)
            longest = max(len(self.sources[i]) for i in group)
            held = max(held, len(group) * self._activation_bytes(longest))
            n_scored = max(n_scored, len(sweep.scored[0]))
            width = max(width, sweep.batch.tokens.shape[1])
        apart = [self.others] if self.other_apart else []
        apart += [self.clean] if None in self.metrics.items else []
        forwards += sum(math.ceil(len(prompts) / 64) for prompts in apart if prompts)
        return PatchPlan(
            cells=len(self.grid.cells),
            rows=rows,
            forwards=forwards,
            widest=widest,
            activation_bytes=held,
            pass_bytes=fullest * row_bytes(self.model, width, n_scored),
            weight_bytes=copied_bytes(self.model),
        )

    def run(self) -> Result:
        """The sweep."""
        with pretransposed_weights(self.model):
            scores, base, other = self.sweep.run(
                self.scored(), self.changes_of, sources=self.source_scored()
            )
        values = {"score": scores, "change": scores - base[:, None]}
        known = self.score_other() if self.other_apart else other
        if known is not None:
            effect = normalised(scores, known[:, None], base[:, None], undefined="nan")
            require_effect(effect, self.why_no_effect(base, known))
            values = {"effect": effect, **values}
        source, into = self._ends
        if self.given is not None:
            source = "activations"
        elif self.pairs.source:
            source = "a third prompt"
        return self.sweep.result(
            values,
            self.by_run(base, known),
            title=(
                f"Activation patching, {source} into {into}: {', '.join(self.grid.kinds)}; "
                f"{', '.join(self.metrics.names)}"
            ),
            units={"effect": self.share},
            skipped=self.pairs.skipped,
            method="activation patching",
            **self.settings,
        )

    @property
    def settings(self) -> dict[str, object]:
        """The job's settings, as recorded in provenance."""
        return {
            "direction": self.direction,
            "third_source": bool(self.pairs.source),
            "given_activations": self.given is not None,
            "window": self.sites.window,
        }

    def by_run(self, base: Tensor, other: Tensor | None) -> dict[str, Tensor]:
        """Scores of the base prompts and of the other run, under ``clean`` and ``corrupted``."""
        return {name: x for name, x in zip(self._ends, (other, base), strict=True) if x is not None}

    def why_no_effect(self, base: Tensor, other: Tensor) -> str:
        """The reason where no pair has an effect."""
        return (
            f"the clean and the corrupted run score the same in all {len(self.pairs)} pairs (of "
            f"{self.metrics.names}, first pair: {base.reshape(-1)[0]:.6g} and "
            f"{other.reshape(-1)[0]:.6g}); take another metric, or pairs that differ in it"
        )

    def _activation_bytes(self, length: int) -> int:
        """Of one source prompt, at all hook points that are read."""
        places = {(cell.kind, layer) for cell in self.grid.cells for layer in cell.layers}
        size = dtype_of(self.model).itemsize
        return sum(activation_width(self.model, k, length) * length * size for k, _ in places)

    @property
    def share(self) -> str:
        """The unit of an effect."""
        return "share restored" if self.direction == "denoise" else "share lost"

    # -- where activations come from -------------------------------------------------------------

    def changes_of(self, example: int, row: int, shown: Mapping[str, Tensor]) -> ChangeOf:
        """The source activations of a pair, as the changes that cells make."""
        store, where, length = shown, self.grid.source[example], len(self.sources[example])
        if self.given is not None:
            store, row = self.given, example

        def change_of(cell: Cell, layer: int, sample: int) -> Change:
            def change(x: Tensor) -> Tensor:
                activation = store[hook_name(cell.kind, layer)][row]
                return put(taken(activation, cell, where[cell.span], length), cell)(x)

            return change

        return change_of

    def _given(self, places: Iterable[tuple[str, int]]) -> dict[str, Tensor]:
        """The given activations of kinds and layers, ``[pair pos ...]``."""
        store, n = self.pairs.activations, len(self.pairs)
        assert store is not None
        found = {}
        for kind, layer in places:
            name = hook_name(kind, layer)
            try:
                x = store[name]
            except KeyError:
                raise ValueError(
                    f"the activations given lack {name!r}; they have {list(store.keys())[:3]}, ...: "
                    "let run_with_cache keep it"
                ) from None
            axis = HEAD_AXIS[kind]
            x = x[None] if x.ndim == (3 if axis is None else 4) - 1 else x
            width = x.shape[2 if axis == 1 else 1]
            lengths = sorted({len(p) for p in self.sources})
            if len(x) not in (1, n) or lengths != [width]:
                raise ValueError(
                    f"the activation given at {name!r} has shape {tuple(x.shape)}: expected 1 or {n} "
                    f"rows of as many positions as the prompts have tokens, {lengths}"
                )
            found[name] = x.detach().expand(n, *x.shape[1:])
        return found

    def _given_logits(self) -> Float[Tensor, "example vocab"] | None:
        """Of the given activations' run, read out of the last block's stream if that is among them."""
        kind, layer = "resid_post", int(self.model.cfg.n_layers) - 1
        store = self.pairs.activations
        if store is None or hook_name(kind, layer) not in store.keys():  # noqa: SIM118
            return None
        (stream,) = self._given([(kind, layer)]).values()
        with torch.no_grad():
            logits = read_out(self.model, stream[:, -1]).to("cpu", wide_dtype(stream.dtype))
        return logits

    def _given_score(self) -> Float[Tensor, "example metric"] | None:
        """Scores of the given activations' run; None where they do not determine them."""
        logits = self._given_logits()
        items = self.scored()
        plain = all(m.plan(i.target) == Plan() for i in items for m in i.metrics)
        if logits is None or not plain:
            return None
        rows = rearrange(logits, "example vocab -> example 1 1 vocab")
        return torch.stack(
            [
                torch.cat([m.score(row, item.target) for m in item.metrics])
                for row, item in zip(rows, items, strict=True)
            ]
        )
