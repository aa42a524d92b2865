"""Text that a model writes by itself, drawn token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mi_hops.model import HookedModel
from mi_hops.sweep.keep import keep
from mi_hops.sweep.pairs import Texts, prompts_of
from mi_hops.sweep.repair import Repair
from mi_hops.sweep.scoring import check_states, stepping
from mi_hops.text.tokens import Batch, Prompt, batches_by_length, decode, require_room


def sample(
    model: HookedModel,
    prompts: Texts,
    *,
    n_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    top_k: int | None = None,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
) -> list[str]:
    """Continue each prompt by `n_tokens` tokens, sampled from the model's own distribution.

    Args:
        top_k: draw from so many of the likeliest tokens only; default from all.
        repair: acts on row r by ``states[r]`` at every step; needs `states`, one per prompt.

    Equal seeds give equal texts where prompts and batches are equal; the global random state is not
    touched. What follows an end-of-text token is kept as well.

    Raises:
        ValueError: fewer than one token (of `top_k` too), a temperature that is not above 0, or a
            number of states that does not fit.
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
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 token or more, or None for all")
    known = prompts_of(model, prompts)
    given = check_states(len(known), repair, states)
    for prompt in known:
        require_room(model, prompt.text, len(prompt), n_tokens)
    source = torch.Generator().manual_seed(seed)
    texts = [""] * len(known)

    def write(chosen: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of a batch, and where the generator is after them."""
        step = stepping(model, [known[i] for i in chosen], repair, [given[i] for i in chosen])
        tokens, drawn = batch.tokens, []
        for _ in range(n_tokens):
            logits = step(tokens).float().cpu()
            if top_k is not None and top_k < logits.shape[1]:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=source)
            drawn.append(tokens)
        return torch.cat(drawn, 1), source.get_state()

    with torch.no_grad():
        for chosen, batch in batches_by_length([p.ids for p in known], batch_size):
            more, after = keep(
                partial(write, chosen, batch), "sample", [known[i].ids for i in chosen]
            )
            source.set_state(after)
            for i, ids in zip(chosen, more.tolist(), strict=True):
                texts[i] = known[i].text + _behind(model, known[i], ids)
    return texts


def _behind(model: HookedModel, prompt: Prompt, ids: Sequence[int]) -> str:
    """Text of tokens behind a prompt, with the space that some tokenizers leave out at a start."""
    start, whole = decode(model, prompt.ids), decode(model, [*prompt.ids, *ids])
    return whole.removeprefix(start) if whole.startswith(start) else decode(model, ids)
