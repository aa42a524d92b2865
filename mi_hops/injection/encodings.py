"""Encodings: a memory, given as text, as one vector of the residual space a layer.

The encodings are those of *Memory Injections* (Sakarvadia et al. 2023, arXiv 2309.05605). Weight
processing changes them: with folded and centred weights (``load_model(..., processing="fold")``, as
the published GPT-2 numbers were made) W_U holds the final norm's scale and Embed differs from Unembed
even for tied embeddings; without processing the two are equal there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from mi_hops.model import (
    HookedModel,
    capture,
    device_of,
    dtype_of,
    embedding,
    hook_name,
    require_layers,
    unembedding,
    w_o,
)
from mi_hops.model.numeric import wide_dtype
from mi_hops.text.tokens import Prompt, TokenError, batches, encode

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: ``unembed``: rows of W_U^T (the paper's default); ``embed``: rows of W_E, no positions;
#: ``layerwise_code``: the attention output of the injected layer at the memory's last token, the
#: memory run alone with BOS (what the published code does); ``layerwise_text``: the residual stream
#: that enters the layer there (what the thesis says).
Encoding = Literal["unembed", "embed", "layerwise_code", "layerwise_text"]
ENCODINGS: tuple[Encoding, ...] = ("unembed", "embed", "layerwise_code", "layerwise_text")

#: How the tokens of a memory make one vector: each distinct token once, summed (published); every
#: token, summed; their mean. Layer-wise encodings read one token and know no pooling.
Pooling = Literal["set", "sum", "mean"]
POOLINGS: tuple[Pooling, ...] = ("set", "sum", "mean")

#: Heads of every layer, or layer -> its heads.
Heads = Sequence[int] | Mapping[int, Sequence[int]]


def memory_prompt(
    model: HookedModel, text: str, *, leading_space: bool = False, prepend_bos: bool | None = False
) -> Prompt:
    """A memory as tokens.

    Args:
        leading_space: tokenise it as in the middle of a sentence. Published code does not, so that
            byte-level tokenizers give "George", never " George".
        prepend_bos: as in `encode`; None for what the model's prompts begin with.

    Raises:
        TokenError: an empty memory, or one longer than the context.
    """
    if not text.strip():
        raise TokenError(f"the memory is empty ({text!r}); there is nothing to inject")
    clean = text.strip()
    return encode(model, f" {clean}" if leading_space else clean, prepend_bos=prepend_bos)


def encode_memories(
    model: HookedModel,
    texts: Sequence[str],
    encoding: Encoding = "unembed",
    *,
    pooling: Pooling = "set",
    leading_space: bool = False,
    batch_size: int = 64,
) -> Float[Tensor, "memory layer d_model"]:
    """Vectors of memories for injection at each layer, in float32 or wider.

    ``unembed`` is sum_t W_U[:, t] and ``embed`` sum_t W_E[t] over the memory's tokens, the same for
    every layer, so that the norm grows with the memory's length.

    Args:
        pooling: see `Pooling`.
        leading_space: see `memory_prompt`.

    Raises:
        ValueError: an unknown encoding or pooling, no memory, or an unembedding that cannot be read
            (quantised).
        TokenError: an empty memory, or one longer than the context.
    """
    check_encoding(encoding, pooling)
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}; expected at least one memory, in a sequence")
    layerwise = encoding.startswith("layerwise")
    prompts = [
        memory_prompt(
            model, text, leading_space=leading_space, prepend_bos=None if layerwise else False
        )
        for text in texts
    ]
    n_layers = int(model.cfg.n_layers)
    if layerwise:
        return _layerwise(model, prompts, encoding, batch_size)
    table = unembedding(model)[0].T if encoding == "unembed" else embedding(model)
    wide = wide_dtype(table.dtype)
    rows = []
    for prompt in prompts:
        ids = list(dict.fromkeys(prompt.ids)) if pooling == "set" else list(prompt.ids)
        picked = table[torch.tensor(ids, device=table.device)].to(wide)
        rows.append(picked.mean(0) if pooling == "mean" else picked.sum(0))
    return torch.stack(rows)[:, None].expand(-1, n_layers, -1)


def encode_columns(
    model: HookedModel,
    columns: Mapping[str, Sequence[str]],
    encoding: Encoding = "unembed",
    *,
    pooling: Pooling = "set",
    leading_space: bool = False,
) -> Float[Tensor, "memory fact layer d_model"]:
    """`encode_memories` of named memories with one text a fact; what several share is encoded once."""
    distinct = list(dict.fromkeys(text for texts in columns.values() for text in texts))
    table = encode_memories(model, distinct, encoding, pooling=pooling, leading_space=leading_space)
    at = {text: i for i, text in enumerate(distinct)}
    return torch.stack([table[[at[text] for text in texts]] for texts in columns.values()])


def check_encoding(encoding: str, pooling: str = "set") -> None:
    """Refuse names that are no encoding or pooling.

    Raises:
        ValueError: with the names there are.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}; expected one of {list(ENCODINGS)}")
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; expected one of {list(POOLINGS)}")


def _layerwise(
    model: HookedModel, prompts: Sequence[Prompt], encoding: Encoding, batch_size: int
) -> Float[Tensor, "memory layer d_model"]:
    kind = "attn_out" if encoding == "layerwise_code" else "resid_pre"
    names = [hook_name(kind, layer) for layer in range(int(model.cfg.n_layers))]
    wide = wide_dtype(dtype_of(model))
    out = torch.empty(
        len(prompts), len(names), int(model.cfg.d_model), dtype=wide, device=device_of(model)
    )
    with torch.no_grad():
        for chosen, batch in batches([p.ids for p in prompts], batch_size):
            found, _ = capture(model, batch.tokens, names)
            rows = torch.arange(len(chosen))
            for layer, name in enumerate(names):
                x = found[name]
                last = x[rows.to(x.device), batch.last.to(x.device)]
                out[torch.tensor(chosen, device=out.device), layer] = last.to(out.device, wide)
    return out


def restrict_to_heads(
    model: HookedModel, vectors: Float[Tensor, "*memory layer d_model"], heads: Heads
) -> Float[Tensor, "*memory layer d_model"]:
    """The part of each vector that some heads can write together, layer by layer.

    The orthogonal projection onto the row space of their stacked W_O: adding it at ``attn_out``
    equals changing those heads' z. Whole memories make a head's number meaningless, for head
    outputs are summed; this is what gives it a meaning.

    Args:
        heads: for every layer, or layer -> its heads; layers without heads get zeros.

    Raises:
        ValueError: a layer or head out of range, a layer named without heads, a head named twice.
    """
    n_heads, n_layers = int(model.cfg.n_heads), vectors.shape[-2]
    each = heads if isinstance(heads, Mapping) else dict.fromkeys(range(n_layers), heads)
    require_layers(model, each)
    out = torch.zeros_like(vectors)
    for layer, chosen in each.items():
        wrong = [h for h in chosen if not 0 <= h < n_heads]
        if wrong or len(set(chosen)) < len(chosen) or not chosen:
            raise ValueError(f"heads is {heads}; expected distinct heads in 0..{n_heads - 1}")
        rows = w_o(model, layer).detach().to(vectors.device, vectors.dtype)[list(chosen)]
        # Heads' row spaces overlap and need not have full rank (centred weights have not), so a
        # basis of all of them together is taken, of the directions above rounding.
        _, sizes, basis = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
        basis = basis[sizes > sizes[0] * max(basis.shape) * torch.finfo(sizes.dtype).eps]
        out[..., layer, :] = (vectors[..., layer, :] @ basis.T) @ basis
    return out
