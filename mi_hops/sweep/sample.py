"""Text that a model writes by itself, drawn token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mi_hops.model import HookedModel
from mi_hops.model.cache import new_cache
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import Prompt, TokenError, batches_by_length, decode, encode


def sample(
    model: HookedModel,
    prompts: Sequence[Prompt | str],
    *,
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Each prompt with `n_tokens` more, drawn from the model's own distribution.

    Equal seeds give equal texts where prompts and batches are equal; the global random state is not
    touched. What follows an end-of-text token is kept as well.

    Raises:
        ValueError: fewer than one token, or a temperature that is not above 0.
        TokenError: a prompt that does not fit the context together with what is to come.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> (text,) = mi_hops.sample(model, ["The spouse of Joren Ashby is"], n_tokens=4)
        >>> text.startswith("The spouse of Joren Ashby is ")
        True
    """
    if n_tokens < 1 or temperature <= 0:
        raise ValueError(
            f"n_tokens is {n_tokens} and temperature {temperature}; expected at least 1 token and a "
            "temperature above 0"
        )
    known = [encode(model, p) if isinstance(p, str) else p for p in prompts]
    longest = max((len(p) for p in known), default=0)
    if longest + n_tokens > model.cfg.n_ctx:
        raise TokenError(
            f"a prompt of {longest} tokens and {n_tokens} to come exceed the model's context of "
            f"{model.cfg.n_ctx}"
        )
    source = torch.Generator().manual_seed(seed)
    texts = [""] * len(known)
    with torch.no_grad():
        for chosen, batch in batches_by_length([p.ids for p in known], batch_size):
            cache, tokens, drawn = new_cache(model, len(chosen)), batch.tokens, []
            for _ in range(n_tokens):
                last = torch.full((len(chosen), 1), tokens.shape[1] - 1)
                logits = logits_at(model, tokens, last, cache=cache)[:, 0].float().cpu()
                tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=source)
                drawn.append(tokens)
            more = torch.cat(drawn, 1).tolist()
            for i, ids in zip(chosen, more, strict=True):
                texts[i] = known[i].text + decode(model, ids)
    return texts
