"""Text as tokens: prompts, answers, positions, batches, streamed corpora, and answer matching."""

from mi_hops.text.corpus import fact_texts, token_batches
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import (
    Batch,
    Prompt,
    TokenError,
    Where,
    align,
    answer_ids,
    decode,
    encode,
    last_position,
    pad,
    positions,
)

__all__ = [
    "Batch",
    "Prompt",
    "TokenError",
    "Where",
    "align",
    "answer_ids",
    "decode",
    "encode",
    "fact_texts",
    "last_position",
    "matches",
    "normalise",
    "pad",
    "positions",
    "token_batches",
]
