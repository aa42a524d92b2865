"""What a head does by its weights alone: its QK and OV circuit between tokens, and whether it copies.

With E a token's embedding and U_t the direction of a token's logit (Elhage et al. 2021, *A Mathematical
Framework for Transformer Circuits*)::

    OV:  E_s W_V W_O U_t                       attending to s raises the logit of t
    QK:  E_q W_Q W_K^T E_k / sqrt(d_head)      a query at q looks at a key at k
    two heads, one above the other: E_s (W_V W_O) (W_V' W_O') U_t, their virtual head

Gains of the norms in between are multiplied in, and where a norm takes the mean out, so is the mean; its
scale, which depends on the prompt, and biases are not. So on a folded model the numbers are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, embedding, norm_parts, provenance, unembedding
from mi_hops.model.identity import ln_final
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.result import Result
from mi_hops.text.tokens import TokenError

#: ``"L2H3"`` or (layer, head).
Head = str | tuple[int, int]

#: Tokens by their text, as they stand in the vocabulary (" Paris"), or by their ids.
Tokens = str | int | Sequence[str | int]


def read_head(
    model: HookedModel,
    heads: Head | Sequence[Head],
    sources: Tokens,
    targets: Tokens | None = None,
    *,
    circuit: Literal["ov", "qk"] = "ov",
    top: int = 10,
) -> Result:
    """A head's circuit between tokens of the vocabulary, from its weights.

    Args:
        heads: one head; or for ``"ov"`` several in ascending layers, read as one virtual head.
        sources: tokens that are attended to (OV), or that attend (QK).
        targets: tokens whose logit is raised (OV, relative to the mean over the vocabulary), or that are
            attended to (QK). None for the `top` largest of the vocabulary.
        circuit: see above. QK is that of two tokens at one position: of a model that rotates queries and
            keys, what position adds is left out.

    Returns:
        `Result`: ``score`` on ``source, target``, in logits before the norms' scale (OV) or in attention
        scores (QK); without targets on ``source, rank``, with the label ``target``.

    Raises:
        ValueError: heads that do not exist or do not ascend, several heads for ``"qk"``, `top`.
        TokenError: a text that is not one token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> mi_hops.lens.read_head(model, "L1H0", [" the"], top=3)["score"].shape
        (1, 3)
    """
    if circuit not in ("ov", "qk"):
        raise ValueError(f"circuit is {circuit!r}; expected 'ov' or 'qk'")
    chain = _chain(model, heads)
    if circuit == "qk" and len(chain) > 1:
        raise ValueError(f"a QK circuit is one head's, got {heads!r}; read several with 'ov'")
    ids, names = _token_ids(model, sources)
    weight = embedding(model)
    rows = weight[ids].to(wide_dtype(weight.dtype))
    scores = _ov(model, rows, chain) if circuit == "ov" else _qk(model, rows, chain[0], weight)
    if targets is None:
        if not 1 <= top <= scores.shape[1]:
            raise ValueError(f"top is {top}; expected 1..{scores.shape[1]}")
        scores, best = scores.topk(top, dim=1)
        shown = [[_text(model, int(i)) for i in row] for row in best]
        dims: tuple[str, str] = ("source", "rank")
        coords: dict[str, Any] = {
            "rank": range(1, top + 1),
            "target": (dims, np.asarray(shown, dtype=object)),
        }
    else:
        others, labels = _token_ids(model, targets)
        scores, dims, coords = scores[:, others], ("source", "target"), {"target": labels}
    told = " then ".join(f"L{layer}H{head}" for layer, head in chain)
    return Result.from_arrays(
        {"score": (dims, scores.cpu())},
        coords={"source": names, **coords},
        units={"score": "logits" if circuit == "ov" else "attention score"},
        provenance=provenance(model, method=f"{circuit.upper()} circuit", heads=told),
        title=f"{circuit.upper()} circuit of {told}",
    )


def copying(model: HookedModel) -> Result:
    """Eigenvalue copying score of each head: how far OV raises the token that it attends to.

    ``sum of real parts / sum of absolute values`` of the eigenvalues of the whole OV circuit ``E W_V W_O U``
    (vocabulary by vocabulary): 1 if all are positive, so that tokens raise themselves and their like, -1 if
    all are negative, about 0 for random weights.

    Returns:
        `Result` ``copying`` on ``layer, head``; NaN for a head that writes nothing.
    """
    weight = embedding(model)
    wide = wide_dtype(weight.dtype)
    u = _into_logits(model, wide)
    # The circuit's other eigenvalues are 0, and those of A B are those of B A, which is small.
    loop = u @ weight.to(u.device, wide)
    scores = []
    for layer in range(int(model.cfg.n_layers)):
        v, o = _v_and_o(model, layer, wide)
        small = o @ loop.to(o) @ v
        eigenvalues = torch.linalg.eigvals(small)
        scores.append((eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)).cpu())
    return Result.from_arrays(
        {"copying": (("layer", "head"), torch.stack(scores))},
        coords={"layer": range(len(scores)), "head": range(int(model.cfg.n_heads))},
        units={"copying": "share"},
        provenance=provenance(model, method="eigenvalue copying score"),
        title="Copying score of the OV circuit",
        allow_nonfinite=True,
    )


def _ov(
    model: HookedModel, rows: Float[Tensor, "token d_model"], chain: Sequence[tuple[int, int]]
) -> Float[Tensor, "token vocab"]:
    for layer, head in chain:
        v, o = _v_and_o(model, layer, rows.dtype)
        rows = rows.to(v.device) @ v[head] @ o[head]
    u = _into_logits(model, rows.dtype)
    return rows.to(u.device) @ u


def _qk(
    model: HookedModel,
    rows: Float[Tensor, "token d_model"],
    head: tuple[int, int],
    weight: Float[Tensor, "vocab d_model"],
) -> Float[Tensor, "token vocab"]:
    layer, number = head
    factored = model.QK[layer, number]
    q, k = factored.A.detach().to(rows.dtype), factored.B.detach().to(rows.dtype)
    norm = model.blocks[layer].ln1
    asked = _behind(model, norm, q)
    looked = _behind(model, norm, rearrange(k, "d_head d_model -> d_model d_head"))
    keys = weight.to(looked.device, rows.dtype) @ looked
    return (rows.to(asked.device) @ asked) @ keys.T / float(model.cfg.d_head) ** 0.5


def _v_and_o(
    model: HookedModel, layer: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
    """W_V behind the norm before it, and W_O; one each per head where heads share values."""
    factored = model.OV[layer]
    v, o = factored.A.detach().to(dtype), factored.B.detach().to(dtype)
    return _behind(model, model.blocks[layer].ln1, v), o


def _behind(
    model: HookedModel, norm: Any, weight: Float[Tensor, "*heads d_model out"]
) -> Float[Tensor, "*heads d_model out"]:
    """A matrix as it acts on what enters the norm, but for the norm's scale."""
    gain, _, centred = norm_parts(model, norm, rearrange(weight, "... d out -> ... out d"))
    weight = gain[:, None] * weight
    return weight - weight.mean(-2, keepdim=True) if centred else weight


def _into_logits(model: HookedModel, dtype: torch.dtype) -> Float[Tensor, "d_model vocab"]:
    """W_U behind the final norm, relative to the mean over the vocabulary."""
    u = unembedding(model)[0].to(dtype)
    return _behind(model, ln_final(model), u - u.mean(1, keepdim=True))


def _chain(model: HookedModel, heads: Head | Sequence[Head]) -> list[tuple[int, int]]:
    single = isinstance(heads, str) or (
        isinstance(heads, tuple) and len(heads) == 2 and all(isinstance(i, Integral) for i in heads)
    )
    found = [_head(model, head) for head in ([heads] if single else heads)]  # type: ignore[arg-type]
    layers = [layer for layer, _ in found]
    if not found or layers != sorted(set(layers)):
        raise ValueError(f"heads are {heads!r}; expected one, or several in ascending layers")
    return found


def _head(model: HookedModel, head: Head) -> tuple[int, int]:
    if isinstance(head, str):
        match = re.fullmatch(r"L(\d+)H(\d+)", head)
        if match is None:
            raise ValueError(f"head is {head!r}; expected 'L2H3' or (2, 3)")
        head = int(match[1]), int(match[2])
    layer, number = head
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    if not (0 <= layer < n_layers and 0 <= number < n_heads):
        raise ValueError(
            f"no head L{layer}H{number}; the model has layers 0..{n_layers - 1} and heads "
            f"0..{n_heads - 1}"
        )
    return layer, number


def _token_ids(model: HookedModel, given: Tokens) -> tuple[list[int], list[str]]:
    items = [given] if isinstance(given, str | int | Integral) else list(given)
    if not items:
        raise TokenError("no tokens were given; name at least one")
    ids = []
    for item in items:
        if isinstance(item, str):
            if model.tokenizer is None:
                raise TokenError("the model has no tokenizer; give token ids")
            found = model.tokenizer(item, add_special_tokens=False)["input_ids"]
            if len(found) != 1:
                raise TokenError(
                    f"{item!r} is {len(found)} tokens; give one, with its leading space where the "
                    "tokenizer has one"
                )
            item = found[0]
        if not 0 <= item < int(model.cfg.d_vocab):
            raise TokenError(f"token id {item} is outside the vocabulary of {model.cfg.d_vocab}")
        ids.append(int(item))
    return ids, [_text(model, i) for i in ids]


def _text(model: HookedModel, token: int) -> str:
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))
