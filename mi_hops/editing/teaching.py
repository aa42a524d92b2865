"""Rows that teach a model an answer, and the loss on them: for methods that search by gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mi_hops.editing.request import Request
from mi_hops.model import Hook, HookedModel
from mi_hops.model.numeric import kl_divergence
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import Prompt, answer_ids, encode, pad

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class TeacherForcedBatch:
    """Prompts with their answers appended (teacher forcing).

    Attributes:
        prompts: one a row.
        tokens: ``[row, pos]``, prompt and answer but its last token, right-padded.
        scored: ``[row, answer]`` positions whose next token is an answer token; rows with shorter
            answers repeat their last.
        answers: ``[row, answer]`` the tokens to be said there.
        weights: ``[row, answer]``, one over the answer's length at real tokens, 0 at repeats.
    """

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "row pos"]
    scored: Int[Tensor, "row answer"]
    answers: Int[Tensor, "row answer"]
    weights: Float[Tensor, "row answer"]


def lesson(
    model: HookedModel, prompts: Sequence[str], answers: Sequence[str]
) -> TeacherForcedBatch:
    """Rows that teach each prompt its answer.

    Raises:
        TokenError: a prompt too long or an answer that is empty or merges with its prompt.
    """
    encoded = [encode(model, p) for p in prompts]
    ids = [answer_ids(model, p, a) for p, a in zip(encoded, answers, strict=True)]
    longest = max(map(len, ids))
    filled = [[*i, *[i[-1]] * (longest - len(i))] for i in ids]
    return TeacherForcedBatch(
        tuple(encoded),
        pad([[*p.ids, *i[:-1]] for p, i in zip(encoded, ids, strict=True)]).tokens,
        torch.tensor(
            [
                [p.last + min(j, len(i) - 1) for j in range(longest)]
                for p, i in zip(encoded, ids, strict=True)
            ]
        ),
        torch.tensor(filled),
        torch.tensor([[(j < len(i)) / len(i) for j in range(longest)] for i in ids]),
    )


def answer_loss(
    model: HookedModel, taught: TeacherForcedBatch, hooks: Sequence[Hook]
) -> Float[Tensor, "row"]:
    """Mean negative log-probability of the answer's tokens, in nats, each row."""
    logits = logits_at(model, taught.tokens, taught.scored, hooks=hooks)
    logp = logits.float() if logits.element_size() < 4 else logits
    logp = logp.log_softmax(-1)
    picked = logp.gather(2, taught.answers.to(logp.device)[..., None])[..., 0]
    return -(picked * taught.weights.to(logp)).sum(1)


def answered_rightly(
    model: HookedModel, taught: TeacherForcedBatch, hooks: Sequence[Hook] = ()
) -> list[bool]:
    """Whether greedy decoding begins with the whole answer, each row."""
    with torch.no_grad():
        logits = logits_at(model, taught.tokens, taught.scored, hooks=hooks)
    return (logits.argmax(-1).cpu() == taught.answers).all(1).tolist()


def last_logp(
    model: HookedModel, prompts: Sequence[Prompt], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "row vocab"]:
    """Log-probabilities of the token after each prompt, float32 or wider."""
    batch = pad([p.ids for p in prompts])
    logits = logits_at(model, batch.tokens, batch.last[:, None], hooks=hooks)[:, 0]
    return (logits.float() if logits.element_size() < 4 else logits).log_softmax(-1)


def kl(new: Float[Tensor, "row vocab"], old: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """KL(new || old) of log-probabilities, in nats."""
    return kl_divergence(new, old)


def require_targets(requests: Sequence[Request]) -> None:
    """Refuse requests without an answer to teach.

    Raises:
        ValueError: with the first such request.
    """
    for request in requests:
        if not request.target:
            raise ValueError(f"edit request {request.id!r} has no target answer to teach")


def minimise(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    after: Callable[[], None] | None = None,
) -> None:
    """Adam on a loss that is a sum over rows, in place.

    Adam's steps go element by element, so facts that share no parameter are searched for as if each
    were alone.

    Args:
        after: called after every step, without gradients (to clamp).

    Raises:
        ValueError: the loss stops being finite.
    """
    adam = torch.optim.Adam(list(parameters), lr=lr)
    with torch.enable_grad():
        for step in range(steps):
            adam.zero_grad(set_to_none=True)
            value = loss()
            if not torch.isfinite(value):
                raise ValueError(f"the loss is {value.item()} at step {step}; lower lr ({lr})")
            value.backward()
            adam.step()
            if after is not None:
                with torch.no_grad():
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


def chunks(n: int, size: int) -> Iterator[range]:
    """Ranges of at most `size` that cover ``range(n)``.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
    for start in range(0, n, size):
        yield range(start, min(n, start + size))
