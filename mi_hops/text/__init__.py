"""Text as tokens: prompts, answers, positions, batches, streamed corpora, and answer matching."""

from mi_hops.text.corpus import fact_texts, token_batches
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import Batch, Prompt, TokenError, answer_ids, encode, pad, positions

__all__ = [
    "Batch",
    "Prompt",
    "TokenError",
    "answer_ids",
    "encode",
    "fact_texts",
    "matches",
    "normalise",
    "pad",
    "positions",
    "token_batches",
]
