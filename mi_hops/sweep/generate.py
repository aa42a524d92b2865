"""Greedy generation, and when a generated text counts as the answer.

Answered rightly means: greedily, over the whole vocabulary, the whole answer and its end. What a
model goes on to say after the end (`STOP`) does not matter; a longer name does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.model import HookedModel
from mi_hops.model.cache import new_cache
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.sweep.scoring import check_states, logits_at
from mi_hops.text.matching import STOP, check_stop, find_ends, matches
from mi_hops.text.tokens import Prompt, TokenError, answer_ids, batches_by_length, decode, encode

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """What a model said.

    Attributes:
        ids: the tokens generated, the one that ended it included.
        text: their text up to, not including, the end; without special tokens and white space
            around it.
        finished: whether an end (a stop string or EOS) was reached within the tokens allowed.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


def generate(
    model: HookedModel,
    prompts: Sequence[Prompt | str],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    stop: Sequence[str] = STOP,
    use_cache: bool = True,
) -> list[Generation]:
    """Continue each prompt greedily, over the whole vocabulary.

    Prompts of one length run together, so that there is no padding. A row ends at EOS, at the
    first stop string after something that is not white space, or after `max_new_tokens`.

    Args:
        repair: acts on row r by ``states[r]`` at every step; needs `states`, one a prompt.
        stop: strings that end a generation, wherever they stand in the generated text; may be
            empty.
        use_cache: keep keys and values between steps; the result is the same without.

    Raises:
        ValueError: a number of states that does not fit; ``max_new_tokens`` or ``batch_size``
            below 1; an empty stop string; logits with NaN.
        TokenError: a prompt that does not fit the context together with what is to come.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be 1 or more"
        )
    check_stop(stop)
    known = [encode(model, p) if isinstance(p, str) else p for p in prompts]
    for prompt in known:
        if len(prompt) + max_new_tokens > model.cfg.n_ctx:
            raise TokenError(
                f"prompt of {len(prompt)} tokens and {max_new_tokens} to come exceed the model's "
                f"context of {model.cfg.n_ctx}: {prompt.text[:60]!r}..."
            )
    given = check_states(len(known), repair, states)
    done: dict[int, Generation] = {}
    for chosen, batch in batches_by_length([p.ids for p in known], batch_size):
        rows = Rows(tuple(known[i] for i in chosen), batch.tokens.shape[1])
        steps = _steps(model, batch.tokens, rows, repair, [given[i] for i in chosen], use_cache)
        said: list[list[int]] = [[] for _ in chosen]
        open_rows = set(range(len(chosen)))
        for _, best in zip(range(max_new_tokens), steps, strict=False):
            for r in sorted(open_rows):
                said[r].append(best[r])
                done[chosen[r]] = found = _read(model, said[r], stop)
                if found.finished:
                    open_rows.remove(r)
            if not open_rows:
                break
    return [done[i] for i in range(len(known))]


def _steps(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    rows: Rows,
    repair: Repair | None,
    states: list[Any | None],
    use_cache: bool,
) -> Iterator[list[int]]:
    """The most probable next token of each row, step by step, without end."""
    cache = new_cache(model, len(tokens)) if use_cache else None
    fed = tokens
    while True:
        offset, width = tokens.shape[1] - fed.shape[1], fed.shape[1]
        hooks = [] if repair is None else repair.hooks(model, states, rows.at(offset, width))
        last = torch.full((len(fed), 1), width - 1)
        with torch.no_grad():
            logits = logits_at(model, fed, last, hooks=hooks, cache=cache)[:, 0]
        if logits.isnan().any():
            raise ValueError("the logits hold NaN, so there is no most probable token to generate")
        best = logits.argmax(-1).cpu()
        yield best.tolist()
        tokens = torch.cat([tokens, best[:, None]], dim=1)
        fed = tokens[:, -1:] if use_cache else tokens


def _read(model: HookedModel, ids: list[int], stop: Sequence[str]) -> Generation:
    ended = ids[-1] == model.tokenizer.eos_token_id
    text = decode(model, ids[:-1] if ended else ids).strip(" ")
    ends = find_ends(text, stop)
    cut = text[: ends[0]] if ends else text
    return Generation(tuple(ids), cut.strip(), ended or bool(ends))


def end_ids(model: HookedModel, stop: Sequence[str] = STOP) -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and every token whose text starts with a stop string.

    Spaces at the start of a token are passed over. For `metrics.Greedy`; reads the whole
    vocabulary, so call it once.
    """
    check_stop(stop)
    tokenizer = model.tokenizer
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    marks = tuple(stop)
    ends = {i for i, text in enumerate(texts) if marks and text.lstrip(" ").startswith(marks)}
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return tuple(sorted(i for i in ends if i < model.cfg.d_vocab))


@dataclass(frozen=True)
class Answered:
    """How a prompt was answered.

    Attributes:
        text: what was generated, up to its end.
        exact: it is the answer.
        alias: it is an alias of the answer, and not the answer itself.
        first_token: the first token generated is the answer's first.
    """

    text: str
    exact: bool
    alias: bool
    first_token: bool

    @property
    def right(self) -> bool:
        """The answer or an alias."""
        return self.exact or self.alias


def answered(
    model: HookedModel,
    prompts: Sequence[Prompt | str],
    answers: Sequence[str],
    aliases: Sequence[Sequence[str]] | None = None,
    *,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    stop: Sequence[str] = STOP,
) -> list[Answered]:
    """Generate from each prompt and compare with its answer.

    Args:
        answers, aliases: one answer, and one (possibly empty) sequence of aliases, a prompt.
        max_new_tokens: raised, for a row whose answer or alias needs it, to the longest of them
            and three more, so that its article and its end can be seen.
        stop: a stop string that an answer or alias holds itself does not end that row's
            generation; see `matches`.

    Raises:
        ValueError: unequal numbers of prompts, answers and aliases; see also `generate`.
        TokenError: see `generate` and `tokens.answer_ids`.
    """
    others = [()] * len(prompts) if aliases is None else list(aliases)
    if not len(prompts) == len(answers) == len(others):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(answers)} answers and {len(others)} lists of "
            "aliases; need one of each"
        )
    known = [encode(model, p) if isinstance(p, str) else p for p in prompts]
    given = check_states(len(known), repair, states)
    firsts = [answer_ids(model, p, a)[0] for p, a in zip(known, answers, strict=True)]
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, (answer, more) in enumerate(zip(answers, others, strict=True)):
        accepted = (answer, *more)
        marks = tuple(s for s in stop if not any(s in a for a in accepted))
        room = max(max_new_tokens, 3 + max(_n_tokens(model, a) for a in accepted))
        groups.setdefault((room, marks), []).append(i)
    found: dict[int, Answered] = {}
    for (room, marks), members in groups.items():
        generations = generate(
            model, [known[i] for i in members], max_new_tokens=room, batch_size=batch_size,
            repair=repair, states=None if repair is None else [given[i] for i in members],
            stop=marks,
        )  # fmt: skip
        for i, said in zip(members, generations, strict=True):
            match = partial(matches, said.text, answers[i], stop=stop, finished=said.finished)
            exact = match()
            alias = not exact and match(others[i])
            found[i] = Answered(said.text, exact, alias, said.ids[0] == firsts[i])
    return [found[i] for i in range(len(known))]


def _n_tokens(model: HookedModel, text: str) -> int:
    return len(model.tokenizer(" " + text, add_special_tokens=False)["input_ids"])
