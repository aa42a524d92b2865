"""What heads attend to, and which heads read which: scores of heads without any patching.

Detection patterns, the share of attention that falls on them, and composition scores are
TransformerLens's own (`transformer_lens.head_detector`, `all_composition_scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import HookedModel, capture, dtype_of, hook_name, provenance
from mi_hops.model.numeric import wide_dtype, widen
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.pairs import Pairs, PairsLike, as_prompts, one_each
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import Prompt, TokenError, Where, last_position, positions

Composition = Literal["q", "k", "v"]


def head_scores(
    model: HookedModel,
    *,
    tokens: Int[Tensor, "row pos"] | None = None,
    length: int = 25,
    samples: int = 8,
    seed: int = 0,
) -> Result:
    """Induction, previous-token and duplicate-token scores of every head.

    A score is the attention that falls where such a head looks, averaged over the queries that have
    such a place: the token before (previous), earlier occurrences of the same token (duplicate),
    the tokens that followed them (induction; the prefix-matching score of Olsson et al. 2022).

    Args:
        tokens: sequences of one length to run; default `samples` blocks of `length` random tokens,
            each twice in a row, after BOS where the tokenizer has one.
        seed: of the random tokens.

    Returns:
        `Result` on ``example``, ``layer`` and ``head`` with ``induction``, ``previous_token`` and
        ``duplicate_token``, each between 0 and 1.

    Raises:
        ValueError: sequences that do not fit the context, or in which no token ever repeats.
    """
    from transformer_lens import head_detector

    rows = _repeated(model, length, samples, seed) if tokens is None else tokens
    n = rows.shape[-1]
    if rows.ndim != 2 or not 1 < n <= int(model.cfg.n_ctx):
        raise ValueError(
            f"tokens of shape {tuple(rows.shape)}; expected rows of 2 to {model.cfg.n_ctx} tokens"
        )
    detectors = {
        "induction": head_detector.get_induction_head_detection_pattern,
        "previous_token": head_detector.get_previous_token_head_detection_pattern,
        "duplicate_token": head_detector.get_duplicate_token_head_detection_pattern,
    }
    layers, heads = range(int(model.cfg.n_layers)), range(int(model.cfg.n_heads))
    shape, wide = (len(rows), len(layers), len(heads)), wide_dtype(dtype_of(model))
    found = {k: torch.zeros(shape, dtype=wide) for k in detectors}
    for i, row in enumerate(rows):
        patterns = _patterns(model, row)
        for kind, detector in detectors.items():
            expected = detector(row[None].cpu())
            queries = int((expected.sum(-1) > 0).sum())
            if not queries:
                raise ValueError(
                    f"no query of sequence {i} has a place for a {kind} head to look at"
                )
            looked = einsum(
                "layer head query key, query key -> layer head", patterns, expected.to(patterns)
            )
            found[kind][i] = looked / queries
    dims = ("example", "layer", "head")
    return Result.from_arrays(
        {kind: (dims, scores) for kind, scores in found.items()},
        coords={"example": range(len(rows)), "layer": layers, "head": heads},
        units=dict.fromkeys(found, "share"),
        provenance=provenance(
            model, method="head scores", seed=seed, length=n, given=tokens is not None
        ),
        title="Share of attention where such a head looks",
    )


def _repeated(model: HookedModel, length: int, samples: int, seed: int) -> Int[Tensor, "row pos"]:
    if length < 2 or samples < 1:
        raise ValueError(f"length {length} and samples {samples}; expected at least 2 and 1")
    tokenizer = model.tokenizer
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    usable = torch.tensor([i for i in range(int(model.cfg.d_vocab)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(usable), (samples, length), generator=generator)
    block = usable[picks]
    rows = torch.cat([block, block], 1)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if bos is not None:
        rows = torch.cat([torch.full((samples, 1), bos), rows], 1)
    return rows


def attention_to(
    model: HookedModel, prompts: PairsLike, span: Where | Sequence[Where], *, query: Where = -1
) -> Result:
    """How much each head attends from the last position to a span.

    Args:
        prompts: of pairs the clean ones.
        span: an index, slice or substring; one for all prompts, or a list of one each.
        query: the position that attends; of a span its last token.

    Returns:
        `Result` on ``example``, ``layer`` and ``head`` with ``attention``, summed over the span's
        tokens, between 0 and 1.

    Raises:
        TokenError: a span that is absent, or that no token of it comes before the query.
    """
    asked = Pairs.of(prompts)
    found = as_prompts(model, asked.clean)
    spans = one_each("span", span, len(found))
    layers, heads = range(int(model.cfg.n_layers)), range(int(model.cfg.n_heads))
    values = torch.zeros(len(found), len(layers), len(heads), dtype=wide_dtype(dtype_of(model)))
    for i, (prompt, where) in enumerate(zip(found, spans, strict=True)):
        at = last_position(prompt, query)
        keys = [p for p in positions(prompt, where) if p <= at]
        if not keys:
            raise TokenError(
                f"no token of {where!r} comes before position {at} of {prompt.text!r}, so it cannot "
                "be attended to from there"
            )
        patterns = _patterns(model, torch.tensor(prompt.ids))[:, :, at, keys]
        values[i] = reduce(patterns, "layer head key -> layer head", "sum")
    return Result.from_arrays(
        {"attention": (("example", "layer", "head"), values)},
        coords={"example": asked.labels, "layer": layers, "head": heads},
        units={"attention": "share"},
        provenance=provenance(model, method="attention to a span"),
        title="Attention to the span",
    )


def _patterns(model: HookedModel, row: Int[Tensor, "pos"]) -> Float[Tensor, "layer head query key"]:
    """All attention patterns of one row, in float32 or wider, on the CPU."""
    names = [hook_name("pattern", layer) for layer in range(int(model.cfg.n_layers))]
    with torch.no_grad():
        found, _ = capture(model, row[None], names)
    return torch.stack([widen(found[name][0]).cpu() for name in names])


def composition(model: HookedModel, mode: Composition) -> Result:
    """Composition scores: how much a later head's queries, keys or values read an earlier head's output.

    ``||W_OV W_QK|| / (||W_OV|| ||W_QK||)`` (Elhage et al. 2021), from weights alone: no prompt, no
    norm. Random weights do not score 0; compare heads with one another.

    Returns:
        `Result` on ``sender`` and ``receiver`` (names such as ``L0H3``) with ``composition``, NaN
        where the sender does not come first.

    Raises:
        ValueError: an unknown mode, or a model in half precision.
    """
    if mode not in ("q", "k", "v"):
        raise ValueError(f"mode is {mode!r}; expected 'q', 'k' or 'v'")
    if (dtype := dtype_of(model)).itemsize < 4:
        raise ValueError(
            f"the model is in {dtype}; composition needs float32: load_model(..., dtype='float32')"
        )
    found: Any = model.all_composition_scores(mode.upper())
    scores = getattr(found, "scores", found).detach().float().cpu()
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    order = torch.arange(n_layers)
    later = rearrange(order[:, None] < order, "sender receiver -> sender 1 receiver 1")
    scores = scores.masked_fill(~later, float("nan"))
    scores = rearrange(scores, "layer head later other -> (layer head) (later other)")
    names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    return Result.from_arrays(
        {"composition": (("sender", "receiver"), scores)},
        coords={"sender": names, "receiver": names},
        units={"composition": "share"},
        provenance=provenance(model, method=f"{mode.upper()}-composition"),
        title=f"{mode.upper()}-composition of heads",
        allow_nonfinite=True,
    )


def icl_score(
    model: HookedModel,
    prompts: PairsLike,
    *,
    early: int = 50,
    late: int = 500,
    width: int = 1,
    limits: Limits | None = None,
) -> Result:
    """In-context-learning score: loss at a late token minus loss at an early one (Olsson et al. 2022).

    Negative: later tokens are predicted better, so the model learns from its context.

    Args:
        early, late: token positions, from 0.
        width: positions averaged, ending at each.
        limits: ``batch_size`` (here 8 by default) bounds the prompts in one pass.

    Returns:
        `Result` on ``example`` with ``icl`` (nats), ``early_loss`` and ``late_loss``.

    Raises:
        ValueError: positions out of order, a prompt that is too short.
    """
    if not width <= early < late or width < 1:
        raise ValueError(
            f"early {early}, late {late}, width {width}; expected 1 <= width <= early < late"
        )
    asked = Pairs.of(prompts)
    found = as_prompts(model, asked.clean)
    short = [p.text[:40] for p in found if len(p) <= late]
    if short:
        raise ValueError(f"{len(short)} prompt(s) have no token {late}: {short[:3]}")
    at = torch.tensor([p - j for p in (early, late) for j in range(width)])

    def run(part: Sequence[Prompt]) -> Float[Tensor, "row at"]:
        tokens = torch.tensor([p.ids[: late + 1] for p in part])
        with torch.no_grad():
            logits = logits_at(model, tokens[:, :-1], (at - 1).expand(len(tokens), -1))
        said = widen(logits).log_softmax(-1)
        target = tokens[:, at].to(said.device)
        lost = -said.gather(-1, target[..., None])[..., 0].cpu()
        return reduce(lost, "row (end width) -> row end", "mean", end=2)

    size = (limits or Limits(batch_size=8)).batch_size
    loss = torch.cat([lost for _, lost in batched_with_oom_backoff(found, size, run)])
    values = {"icl": loss[:, 1] - loss[:, 0], "early_loss": loss[:, 0], "late_loss": loss[:, 1]}
    return Result.from_arrays(
        {name: (("example",), value) for name, value in values.items()},
        coords={"example": asked.labels},
        units=dict.fromkeys(values, "nats"),
        provenance=provenance(
            model, method="in-context-learning score", early=early, late=late, width=width
        ),
        title=f"Loss at token {late} less loss at token {early}",
    )
