"""How alike the representations of layers and models are: linear CKA (Kornblith et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mi_hops.model import HookedModel, hook_name, provenance
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.result import Result
from mi_hops.sweep.batching import each_captured
from mi_hops.sweep.pairs import Texts, as_prompts
from mi_hops.text.tokens import Prompt, Where
from mi_hops.text.tokens import positions as positions_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: Tokens whose products with one another are held, layer by layer.
_MOST_TOKENS = 4096


def similarity(
    model: HookedModel,
    prompts: Texts,
    other: HookedModel | None = None,
    *,
    kind: str = "resid_post",
    positions: Where = "last",
    batch_size: int = 16,
) -> Result:
    """Linear CKA between all pairs of layers of one or two models, over the prompts' tokens.

    With X and Y centred, ``[token, d]``: ``|X^T Y|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms: 1 where
    one is a rotated and scaled copy of the other, whatever their widths (arXiv 1905.00414).

    Args:
        other: compared with `model`; default itself. It may have other layers, widths and tokens.
        kind: of activation, without heads: ``"resid_post"``, ``"attn_out"``, ``"mlp_out"``.
        positions: of each prompt, resolved in each model's own tokens.

    Returns:
        `Result` with ``cka`` on ``layer`` and ``other_layer``.

    Raises:
        ValueError: a kind with heads, fewer than three tokens or more than 4,096, different numbers of
            tokens in the two models, or a layer whose activations do not vary.
        TokenError: positions that are not in a prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:20]
        >>> found = mi_hops.lens.similarity(model, [f.prompt() for f in facts])
        >>> found["cka"].shape, round(float(found["cka"][2, 2]), 3)
        ((6, 6), 1.0)
    """
    one = _grams(model, as_prompts(model, prompts), kind, positions, batch_size)
    if other is None:
        two = one
    else:
        two = _grams(other, as_prompts(other, prompts), kind, positions, batch_size)
    if one.shape[1] != two.shape[1]:
        counts = [round(x.shape[1] ** 0.5) for x in (one, two)]
        raise ValueError(
            f"the models read {counts[0]} and {counts[1]} tokens, which do not correspond; name a "
            "position with equally many in both, 'last' for instance"
        )
    return Result.from_arrays(
        {"cka": (("layer", "other_layer"), one @ two.T)},
        coords={"layer": range(len(one)), "other_layer": range(len(two))},
        units={"cka": "share"},
        provenance=provenance(
            model, method="linear CKA", kind=kind, n_tokens=round(one.shape[1] ** 0.5)
        ),
        title=f"Linear CKA of {kind}",
    )


def _grams(
    model: HookedModel, prompts: Sequence[Prompt], kind: str, where: Where, batch_size: int
) -> Float[Tensor, "layer pairs"]:
    """Products of centred tokens with one another, by layer, each of norm 1."""
    layers = range(int(model.cfg.n_layers))
    names = [hook_name(kind, layer) for layer in layers]
    spans = [positions_of(prompt, where) for prompt in prompts]
    n = sum(map(len, spans))
    if not 3 <= n <= _MOST_TOKENS:
        raise ValueError(f"got {n} tokens to compare; expected 3 to {_MOST_TOKENS:,}")

    parts: list[list[Tensor]] = [[] for _ in prompts]
    for i, found in each_captured(model, prompts, names, batch_size):
        if any(x.ndim != 2 for x in found.values()):
            raise ValueError(f"{kind!r} has an axis of heads; expected one of [row, pos, d]")
        read = (found[name][list(spans[i])] for name in names)
        parts[i] = [x.to("cpu", wide_dtype(x.dtype)) for x in read]
    grams = []
    for layer in layers:
        states = torch.cat([part[layer] for part in parts]).double()
        scale = states.square().sum()
        states = states - states.mean(0)
        gram = (states @ states.T).flatten()
        size = gram.norm()
        if not size > 1e-9 * scale:  # rounding alone
            raise ValueError(f"{kind!r} of layer {layer} is the same at all {n} tokens")
        grams.append(gram / size)
    return torch.stack(grams)
