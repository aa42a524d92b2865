"""Encodings: a memory, given as text, as one vector of the residual space per layer.

The encodings are those of *Memory Injections* (Sakarvadia et al. 2023, arXiv 2309.05605). Weight
processing changes them: with folded and centred weights (``load_model(..., processing="fold")``, as
the published GPT-2 numbers were made) W_U holds the final norm's scale and Embed differs from Unembed
even for tied embeddings; without processing the two are equal there.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import (
    HookedModel,
    device_of,
    dtype_of,
    embedding,
    hook_name,
    require_layers,
    unembedding,
    w_o,
)
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.batching import each_captured
from mi_hops.text.tokens import Prompt, TokenError, encode

#: ``unembed``: rows of W_U^T (the paper's default); ``embed``: rows of W_E, no positions;
#: ``layerwise_code``: the attention output of the injected layer at the memory's last token, the
#: memory run alone with BOS (what the published code does); ``layerwise_text``: the residual stream
#: that enters the layer there (what the thesis says).
Encoding = Literal["unembed", "embed", "layerwise_code", "layerwise_text"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

#: How the tokens of a memory make one vector: each distinct token once, summed (published); every
#: token, summed; their mean. Layer-wise encodings read one token and ignore it.
Pooling = Literal["set", "sum", "mean"]

#: Heads of every layer, or layer -> its heads.
Heads = Sequence[int] | Mapping[int, Sequence[int]]


@dataclass(frozen=True, repr=False)
class Encoder:
    """How a text is turned into vectors. The name of an encoding is accepted too.

    Args:
        encoding: see `Encoding`.
        pooling: see `Pooling`.
        leading_space: tokenise memories as in the middle of a sentence. The published code does not,
            so that byte-level tokenizers give "George", never " George".
        heads: keep only the part that these heads can write together (`restrict_to_heads`): heads
            of every layer, or layer -> its heads.

    Raises:
        ValueError: an unknown encoding or pooling.
    """

    encoding: Encoding = "unembed"
    pooling: Pooling = "set"
    leading_space: bool = False
    heads: Heads | None = None

    def __post_init__(self) -> None:
        for name, known in (("encoding", ENCODINGS), ("pooling", get_args(Pooling))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {list(known)}")
        heads: Any = self.heads
        if isinstance(heads, Mapping):  # layers are texts where they come from a file
            heads = {int(layer): list(chosen) for layer, chosen in heads.items()}
        object.__setattr__(
            self, "heads", heads if heads is None or isinstance(heads, dict) else list(heads)
        )

    def __repr__(self) -> str:
        settings = [f"{name}={reprlib.repr(value)}" for name, value in vars(self).items()]
        return f"Encoder({', '.join(settings)})"

    @classmethod
    def of(cls, given: EncoderLike) -> Encoder:
        """An encoder as it is, or of an encoding's name."""
        return given if isinstance(given, Encoder) else cls(given)

    @property
    def name(self) -> str:
        """The encoding, with any differences from the published settings."""
        parts = {
            self.encoding: True,
            self.pooling: self.pooling != "set",
            "leading space": self.leading_space,
            f"heads {self.heads}": self.heads is not None,
        }
        return ", ".join(part for part, told in parts.items() if told)


#: What is accepted where an encoder is.
EncoderLike = Encoding | Encoder


def memory_prompt(
    model: HookedModel, text: str, *, leading_space: bool = False, prepend_bos: bool = False
) -> Prompt:
    """A memory as tokens.

    Args:
        leading_space: as in `Encoder`.

    Raises:
        TokenError: an empty memory, or one longer than the context.
    """
    if not text.strip():
        raise TokenError(f"the memory is empty ({text!r}); there is nothing to inject")
    clean = text.strip()
    space = " " if leading_space and not _spaces_itself(model, clean.split()[0]) else ""
    return encode(model, space + clean, prepend_bos=prepend_bos)


def _spaces_itself(model: HookedModel, word: str) -> bool:
    """Whether the tokenizer puts a space before a text; SentencePiece makes a token of one more."""
    once, twice = (encode(model, t, prepend_bos=False).ids for t in (word, f"{word} {word}"))
    return twice == once * 2


def encode_memories(
    model: HookedModel,
    texts: Sequence[str],
    encoding: EncoderLike = "unembed",
    *,
    batch_size: int = 64,
) -> Float[Tensor, "memory layer d_model"]:
    """Vectors of memories for injection at each layer, in float32 or wider.

    ``unembed`` is sum_t W_U[:, t] and ``embed`` sum_t W_E[t] over the memory's tokens, the same for
    every layer, so that the norm grows with the memory's length.

    Args:
        encoding: its name, or an `Encoder`.

    Raises:
        ValueError: no memory, an unknown encoding, heads that the model does not have, or an
            unembedding that cannot be read (quantised).
        TokenError: an empty memory, or one longer than the context.
    """
    encoder = Encoder.of(encoding)
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}; expected at least one memory, in a sequence")
    layerwise = encoder.encoding.startswith("layerwise")
    prompts = [
        memory_prompt(model, text, leading_space=encoder.leading_space, prepend_bos=layerwise)
        for text in texts
    ]
    if layerwise:
        kind = "attn_out" if encoder.encoding == "layerwise_code" else "resid_pre"
        vectors = _at_last_token(model, prompts, kind, batch_size)
    else:
        table = unembedding(model)[0].T if encoder.encoding == "unembed" else embedding(model)
        pooled = torch.stack([_pooled(table, prompt.ids, encoder.pooling) for prompt in prompts])
        vectors = repeat(pooled, "memory d -> memory layer d", layer=int(model.cfg.n_layers))
    return vectors if encoder.heads is None else restrict_to_heads(model, vectors, encoder.heads)


def encode_each(
    model: HookedModel, texts: Iterable[str], encoder: Encoder
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Text -> its vectors; a text that comes several times is encoded once."""
    distinct = list(dict.fromkeys(texts))
    vectors = encode_memories(model, distinct, encoder) if distinct else ()
    return dict(zip(distinct, vectors, strict=True))


def _pooled(
    table: Float[Tensor, "vocab d_model"], ids: Sequence[int], pooling: Pooling
) -> Float[Tensor, "d_model"]:
    chosen = list(dict.fromkeys(ids)) if pooling == "set" else list(ids)
    picked = table[torch.tensor(chosen, device=table.device)].to(wide_dtype(table.dtype))
    return picked.mean(0) if pooling == "mean" else picked.sum(0)


def _at_last_token(
    model: HookedModel, prompts: Sequence[Prompt], kind: str, batch_size: int
) -> Float[Tensor, "memory layer d_model"]:
    names = [hook_name(kind, layer) for layer in range(int(model.cfg.n_layers))]
    place, wide = device_of(model), wide_dtype(dtype_of(model))
    found: dict[int, Tensor] = {}
    for i, activations in each_captured(model, prompts, names, batch_size):
        last = prompts[i].last
        found[i] = torch.stack([activations[name][last].to(place, wide) for name in names])
    return torch.stack([found[i] for i in range(len(prompts))])


def restrict_to_heads(
    model: HookedModel, vectors: Float[Tensor, "*memory layer d_model"], heads: Heads
) -> Float[Tensor, "*memory layer d_model"]:
    """The part of each vector that the given heads can jointly write, layer by layer.

    The orthogonal projection onto the row space of their stacked W_O: adding it at ``attn_out``
    equals changing those heads' z. Head outputs are summed, so a whole memory is the same whichever
    head it is added to; this is what gives a head's number a meaning.

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
        # Heads' row spaces overlap and need not have full rank (those of centred weights do not),
        # so a basis of all of them together is taken, of the directions above rounding.
        stacked = rearrange(rows, "head d_head d_model -> (head d_head) d_model")
        _, sizes, basis = torch.linalg.svd(stacked, full_matrices=False)
        basis = basis[sizes > sizes[0] * max(basis.shape) * torch.finfo(sizes.dtype).eps]
        out[..., layer, :] = (vectors[..., layer, :] @ basis.T) @ basis
    return out
