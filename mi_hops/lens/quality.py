"""How well a lens reads a model: held-out KL beside the logit lens, cross-entropy, agreement.

The same numbers say what becomes of a lens on another layer or another model of the same width
(`TrainedLens.moved`): evaluate the moved lens on that model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mi_hops.lens.attention import AttentionLens
from mi_hops.lens.examples import examples_of
from mi_hops.lens.trained import TrainedLens, kl
from mi_hops.lens.vectors import Layers, LogitLens, as_lens, resolve_layers
from mi_hops.model import HookedModel, provenance
from mi_hops.result.result import Result
from mi_hops.text.corpus import Corpus, token_batches

_UNITS = {
    "kl": "nats",
    "logit_lens_kl": "nats",
    "cross_entropy": "nats",
    "excess_cross_entropy": "nats",
    "agreement": "share",
    "overlap": "share",
}


def evaluate_lens(
    model: HookedModel,
    lens: TrainedLens,
    corpus: Corpus,
    *,
    layers: Layers = None,
    top_k: int = 10,
    max_tokens: int = 2048,
    max_length: int | None = None,
) -> Result:
    """Compare a lens's readings with the model's output, text by text.

    For an attention lens the reading is the summed logits of a layer's heads (see
    `evaluate_heads` for one head at a time).

    Args:
        corpus: texts that the lens was not trained on (or facts, or a file).
        layers: default those of the lens.
        top_k: tokens in the top-k overlap.
        max_tokens, max_length: as in `token_batches`.

    Returns:
        Result on ``example`` (text) and ``layer``, each value a mean over the text's tokens:
        ``kl`` = KL(output || lens) and the baseline ``logit_lens_kl``, the same for the logit lens
        (nats); ``cross_entropy`` of the lens on the text's next tokens (nats; the last token of a
        text has none, and a text of one token is NaN), and ``excess_cross_entropy``, how much that is
        above the model's own, their disagreement; ``agreement``, the share of tokens with the model's first choice; ``overlap``,
        the share of the model's `top_k` tokens among the lens's.

    Raises:
        ValueError: a lens of another model (`TrainedLens.moved` binds it to this one), a layer that
            the lens does not have, or an empty corpus.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> texts = ["The spouse of Ondo is", "The teacher of Belko is"]
        >>> quality = mi_hops.lens.evaluate_lens(model, mi_hops.TunedLens(model, rank=4), texts)
        >>> dict(quality["kl"].sizes)
        {'example': 2, 'layer': 6}
    """
    as_lens(model, lens)
    chosen = list(lens.layers)
    if layers is not None:
        _, chosen = resolve_layers(model, lens.kind, layers)
    for layer in chosen:
        lens.row(layer)
    plain = LogitLens(model, lens.norm)
    per_text: list[Tensor] = []
    alone = False
    with torch.no_grad():
        for batch in token_batches(model, corpus, max_tokens=max_tokens, max_length=max_length):
            following = batch.tokens.roll(-1, dims=1)
            sums = torch.zeros(len(batch.lengths), len(chosen), len(_UNITS), dtype=torch.float64)
            for (rows, columns), example in examples_of(model, lens, batch):
                after = (following[rows, columns], columns < batch.last[rows])
                for k, layer in enumerate(chosen):
                    logits, base = (_reading(x, example.read[layer], layer) for x in (lens, plain))
                    found = _compare(example.output, logits, base, *after, top_k)
                    sums[:, k].index_add_(0, rows, found.double().cpu())
            alone |= bool((batch.lengths == 1).any())
            counts = [batch.lengths - int("entropy" in name) for name in _UNITS]
            per_text.append(sums / torch.stack(counts, dim=-1)[:, None])
    values: dict[str, Any] = {
        name: (("example", "layer"), torch.cat([text[..., i] for text in per_text]))
        for i, name in enumerate(_UNITS)
    }
    return Result.from_arrays(
        values,
        baselines={"logit_lens_kl": values.pop("logit_lens_kl")},
        coords={"example": [str(i) for i in range(sum(map(len, per_text)))], "layer": chosen},
        units=_UNITS,
        title=f"{lens.name} lens against the model's output, mean over tokens",
        allow_nonfinite=alone,  # a text of one token has no next one
        provenance=provenance(
            model,
            method="evaluate_lens",
            lens=lens.name,
            trained_on=lens.trained_on,
            top_k=top_k,
            notes=lens.notes,
        ),
    )


def evaluate_heads(
    model: HookedModel,
    lens: TrainedLens,
    corpus: Corpus,
    *,
    max_tokens: int = 1024,
    max_length: int | None = None,
) -> Result:
    """Evaluate the readings of single heads, by two measures.

    Args:
        lens: an attention lens; compare it with ``AttentionLens(model)``, untrained, which is the
            logit lens.

    Returns:
        Result on ``layer, head``, means over all tokens: ``kl`` = KL(output || the head's reading)
        and ``leave_one_out_kl`` = KL(output || logits without the head, plus its reading), both in
        nats, with the baseline ``without_kl`` = KL(output || logits without the head): a reading
        that captures what the head adds brings the second below the third.

    Raises:
        ValueError: a lens of another model, a lens that does not read heads, or an empty corpus.
    """
    as_lens(model, lens)
    if lens.kind != "result":
        raise ValueError(f"a {lens.type_name} lens reads {lens.kind!r}, not heads")
    n_heads = int(model.cfg.n_heads)
    sums = torch.zeros(3, len(lens.layers), n_heads, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for batch in token_batches(model, corpus, max_tokens=max_tokens, max_length=max_length):
            for (rows, _), example in examples_of(model, lens, batch, without_heads=True, size=256):
                assert example.without is not None  # asked for
                count += len(rows)
                for k, layer in enumerate(lens.layers):
                    kinds = [lens.losses(example, layer, o) for o in ("each", "leave_one_out")]
                    for head, (each, left) in enumerate(zip(*kinds, strict=True)):
                        without = kl(example.output, example.without[layer][head])
                        for i, value in enumerate((each, left, without)):
                            sums[i, k, head] += value.double().sum().cpu()
    dims = ("layer", "head")
    means = sums / count
    return Result.from_arrays(
        {"kl": (dims, means[0]), "leave_one_out_kl": (dims, means[1])},
        baselines={"without_kl": (dims, means[2])},
        coords={"layer": list(lens.layers), "head": range(n_heads)},
        units=dict.fromkeys(("kl", "leave_one_out_kl", "without_kl"), "nats"),
        title=f"{lens.name} lens, head by head, mean over {count} tokens",
        used=count,
        provenance=provenance(
            model,
            method="evaluate_heads",
            lens=lens.name,
            trained_on=lens.trained_on,
            notes=lens.notes,
        ),
    )


def _reading(lens: TrainedLens | LogitLens, vectors: Tensor, layer: int) -> Tensor:
    """Logits at each cell; of heads, their sum."""
    if isinstance(lens, AttentionLens):
        return lens.sum_logits(vectors, layer=layer)
    if vectors.ndim == 3:
        heads = [lens.logits(x, layer=layer, head=h) for h, x in enumerate(vectors.unbind(1))]
        return sum(heads[1:], heads[0])
    return lens.logits(vectors, layer=layer)


def _compare(
    output: Tensor, logits: Tensor, base: Tensor, following: Tensor, has_next: Tensor, top_k: int
) -> Tensor:
    """``[cell, measure]`` in the order of `_UNITS`; cells without a next token have no entropy."""
    reading = logits.log_softmax(-1)
    output, following, has_next = (t.to(reading.device) for t in (output, following, has_next))
    lens_loss, own_loss = (
        -t.gather(1, following[:, None])[:, 0] * has_next for t in (reading, output)
    )
    best, own_best = (t.topk(top_k, dim=-1).indices for t in (reading, output))
    shared = (best[:, :, None] == own_best[:, None]).any(1).to(reading.dtype).mean(-1)
    agree = best[:, 0] == own_best[:, 0]
    columns = (kl(output, logits), kl(output, base), lens_loss, lens_loss - own_loss, agree, shared)
    return torch.stack([c.to(reading.dtype) for c in columns], dim=-1)
