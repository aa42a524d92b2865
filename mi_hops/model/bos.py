"""Whether a tokenizer puts BOS before a text, and how to make it do so."""

from __future__ import annotations

from typing import Any


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def make_add_bos(tokenizer: Any) -> None:
    """Let the tokenizer put BOS before a text, behind whatever else it does."""
    from tokenizers.processors import Sequence, TemplateProcessing

    if adds_bos(tokenizer):
        return
    core, name = tokenizer.backend_tokenizer, tokenizer.bos_token
    adding: Any = TemplateProcessing(
        single=[name, "$A"],
        pair=[name, "$A", "$B"],
        special_tokens=[(name, tokenizer.bos_token_id)],
    )
    own = core.post_processor
    core.post_processor = adding if own is None else Sequence([own, adding])
