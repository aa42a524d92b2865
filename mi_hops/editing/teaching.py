"""Rows that teach a model an answer, and the loss on them: for methods that search by gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.editing.request import Request, fill
from mi_hops.model import Hook, HookedModel
from mi_hops.model.numeric import widen
from mi_hops.sweep.scoring import logits_at, prefix_of
from mi_hops.text.tokens import Prompt, answer_ids, batches, encode, pad


@dataclass(frozen=True)
class TeacherForcedBatch:
    """Prompts with their answers appended (teacher forcing).

    Attributes:
        prompts: one per row.
        tokens: prompt and answer but its last token, right-padded.
        scored: positions whose next token is an answer token; rows with shorter answers repeat
            their last.
        answers: the tokens to be predicted there.
        weights: one over the answer's length at real tokens, 0 at repeats.
        cache: keys and values of the positions before `tokens`, where those are left out.
    """

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "row pos"]
    scored: Int[Tensor, "row answer"]
    answers: Int[Tensor, "row answer"]
    weights: Float[Tensor, "row answer"]
    cache: Any = None

    def behind(self, model: HookedModel, start: int) -> TeacherForcedBatch:
        """The same rows from position `start` on: what is before is run once, and not in every step.

        For searches that change nothing before that position; positions count from there then.
        """
        if start == 0:
            return self
        cache = cache_of(model, self.tokens[:, :start])
        return replace(self, tokens=self.tokens[:, start:], scored=self.scored - start, cache=cache)

    def loss_of(self, logits: Float[Tensor, "row answer vocab"]) -> Float[Tensor, "row"]:
        """Mean negative log-probability of each answer's tokens, in nats, from logits at `scored`."""
        logp = widen(logits).log_softmax(-1)
        picked = logp.gather(2, self.answers.to(logp.device)[..., None])[..., 0]
        return -(picked * self.weights.to(logp)).sum(1)


def teacher_forced(
    model: HookedModel, prompts: Sequence[str], answers: Sequence[str]
) -> TeacherForcedBatch:
    """Rows that teach each prompt its answer.

    Raises:
        TokenError: a prompt too long or an answer that is empty or merges with its prompt.
    """
    encoded = [encode(model, p) for p in prompts]
    ids = [answer_ids(model, p, a) for p, a in zip(encoded, answers, strict=True)]
    longest = max(map(len, ids))
    both = list(zip(encoded, ids, strict=True))
    scored = [[p.last + min(j, len(i) - 1) for j in range(longest)] for p, i in both]
    return TeacherForcedBatch(
        tuple(encoded),
        pad([[*p.ids, *i[:-1]] for p, i in both]).tokens,
        torch.tensor(scored),
        torch.tensor([[*i, *[i[-1]] * (longest - len(i))] for i in ids]),
        torch.tensor([[(j < len(i)) / len(i) for j in range(longest)] for i in ids]),
    )


def in_templates(
    model: HookedModel, requests: Sequence[Request], templates: Sequence[str]
) -> TeacherForcedBatch:
    """Rows that teach each request's prompt its target in every template; a request's stand together."""
    rows = [(fill(t, r.two_hop_prompt), r.target) for r in requests for t in templates]
    return teacher_forced(model, *zip(*rows, strict=True))


def cache_of(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Any:
    """A cache of tokens that any number of passes may go on from; None where there are none."""
    rows, width = tokens.shape
    return prefix_of(model, tokens).view(list(range(rows)), width) if width else None


def answer_loss(
    model: HookedModel, batch: TeacherForcedBatch, hooks: Sequence[Hook] = ()
) -> Float[Tensor, "row"]:
    """Mean negative log-probability of each answer's tokens, in nats."""
    cached = {"cache": batch.cache, "grows": batch.cache is not None}
    return batch.loss_of(logits_at(model, batch.tokens, batch.scored, hooks=hooks, **cached))


def answered_correctly(
    model: HookedModel, batch: TeacherForcedBatch, hooks: Sequence[Hook] = ()
) -> list[bool]:
    """Whether greedy decoding begins with the whole answer, each row."""
    with torch.no_grad():
        logits = logits_at(model, batch.tokens, batch.scored, hooks=hooks)
    return (logits.argmax(-1).cpu() == batch.answers).all(1).tolist()


def last_logp(
    model: HookedModel,
    prompts: Sequence[Prompt],
    hooks: Sequence[Hook] = (),
    *,
    start: int = 0,
    cache: Any = None,
) -> Float[Tensor, "row vocab"]:
    """Log-probabilities of the token after each prompt, float32 or wider.

    Args:
        start, cache: only the positions from `start` on are run, behind `cache_of` those before.
    """
    batch = pad([p.ids for p in prompts])
    tokens, last = batch.tokens[:, start:], batch.last[:, None] - start
    cached = {"cache": cache, "grows": cache is not None}
    return widen(logits_at(model, tokens, last, hooks=hooks, **cached)[:, 0]).log_softmax(-1)


def minimise(
    parameters: Sequence[Float[Tensor, "fact *shape"]],
    loss: Callable[[], Float[Tensor, "fact"]],
    *,
    steps: int,
    lr: float,
    after: Callable[[], None] | None = None,
    enough: float | None = None,
) -> None:
    """Adam on the sum of one loss per fact, in place.

    Adam's steps go element by element, so facts that share no parameter are searched for as if each
    were alone.

    Args:
        after: called after every step, without gradients (to clamp).
        enough: a fact whose loss is below is not moved any more (its rows of the parameters).

    Raises:
        ValueError: a loss that is not finite.
    """
    adam = torch.optim.Adam(list(parameters), lr=lr)
    reached: Tensor | None = None
    with torch.enable_grad():
        for step in range(steps):
            adam.zero_grad(set_to_none=True)
            each = loss()
            value = each.sum()
            if not torch.isfinite(value):
                raise ValueError(f"the loss is {value.item()} at step {step}; lower lr ({lr})")
            held: list[Tensor] = []
            if enough is not None:
                below = each.detach() < enough
                reached = below if reached is None else reached | below
                if reached.all():
                    return
                held = [p.detach()[reached.to(p.device)].clone() for p in parameters]
            value.backward()
            adam.step()
            with torch.no_grad():
                for p, old in zip(parameters, held, strict=False):
                    p[reached.to(p.device)] = old  # type: ignore[union-attr]
                if after is not None:
                    after()


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """No gradients on the model's own parameters inside the block; as before after it."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def alike_in_length(
    model: HookedModel, requests: Sequence[Request], size: int
) -> tuple[list[list[int]], Int[Tensor, "fact"]]:
    """Requests to be searched for together: their two-hop prompts are of like length.

    The less they differ, the less is padding, and the more of what comes before a change can be left
    out (`TeacherForcedBatch.behind`).

    Returns:
        Batches of at most `size` places in the list, and where each request is in all batches
        joined.

    Raises:
        ValueError: a size below 1.
    """
    rows = [encode(model, request.two_hop_prompt).ids for request in requests]
    together = [places for places, _ in batches(rows, size)]
    return together, torch.tensor([place for places in together for place in places]).argsort()


def chunks(n: int, size: int) -> Iterator[range]:
    """Ranges of at most `size` that cover ``range(n)``.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
    for start in range(0, n, size):
        yield range(start, min(n, start + size))
