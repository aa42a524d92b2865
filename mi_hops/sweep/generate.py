"""Greedy generation, and which prompts are answered correctly (`mi_hops.text.matching`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import HookedModel, device_of
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.lean import lean_blocks
from mi_hops.model.numeric import wide_dtype
from mi_hops.model.plain import PlainPasses, plain_passes
from mi_hops.model.row_cache import RowCache, takes_unequal_rows
from mi_hops.model.shortcuts import is_touched
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import each_part
from mi_hops.sweep.pairs import Texts, prompts_of
from mi_hops.sweep.repair import Repair
from mi_hops.sweep.scoring import check_states, logits_at, stepping
from mi_hops.sweep.together import Part, pass_cost, plan_batches
from mi_hops.text.matching import STOP, check_stop, find_ends, matches
from mi_hops.text.tokens import (
    Prompt,
    answer_ids,
    batches_by_length,
    decode,
    pad,
    require_room,
)


@dataclass(frozen=True)
class Generation:
    """What a model generated.

    Attributes:
        ids: the tokens generated, the one that ended it included.
        text: their text up to, not including, the end; without special tokens and white space
            around it.
        finished: whether an end (a stop string or EOS) was reached within the tokens allowed.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class _Ask:
    """A prompt, and how long it is continued."""

    prompt: Prompt
    state: Any | None
    room: int
    stop: tuple[str, ...]
    first: int | None = None


@dataclass
class _Reply:
    """What has been said to an `_Ask` so far; of its `first` token, rank and probability."""

    ids: list[int] = field(default_factory=list)
    said: Generation = Generation((), "", False)
    rank: int = 0
    prob: float = float("nan")


def _as_lists(replies: Sequence[_Reply]) -> list[list[Any]]:
    return [[r.ids, r.said.text, r.said.finished, r.rank, r.prob] for r in replies]


def generate(
    model: HookedModel,
    prompts: Texts,
    *,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    stop: Sequence[str] = STOP,
) -> list[Generation]:
    """Continue each prompt greedily, over the whole vocabulary.

    A row ends at EOS, at the first stop string after something that is not white space, or after
    `max_new_tokens`. Prompts of unequal lengths are continued together, each at its own positions,
    and tokens that many prompts start with (the examples of a few-shot lead) are run once. Under a
    repair, or with the user's own hooks at the model's hook points, only prompts of equal length run
    together, and whole, so that each hook sees the positions it would see without batching.

    Args:
        batch_size: rows that run together, at most.
        repair: acts on row r by ``states[r]`` at every step; needs `states`, one per prompt.
        stop: strings that end a generation, wherever they occur in the generated text; may be
            empty.

    Raises:
        ValueError: a number of states that does not fit; ``max_new_tokens`` or ``batch_size``
            below 1; an empty stop string; logits with NaN.
        TokenError: a prompt that does not fit the context together with what is to come.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> mi_hops.generate(model, ["The spouse of Joren Ashby is"])[0].text
        'Vera van Nystrom'
    """
    check_stop(stop)
    known = prompts_of(model, prompts)
    given = check_states(len(known), repair, states)
    asks = [
        _Ask(prompt, state, max_new_tokens, tuple(stop))
        for prompt, state in zip(known, given, strict=True)
    ]
    return [reply.said for reply in _replies(model, asks, batch_size, repair)]


def _replies(
    model: HookedModel, asks: Sequence[_Ask], batch_size: int, repair: Repair | None
) -> list[_Reply]:
    room = min((ask.room for ask in asks), default=1)
    if room < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens is {room} and batch_size {batch_size}; both must be 1 or more"
        )
    for ask in asks:
        require_room(model, ask.prompt.text, len(ask.prompt), ask.room)
    together = repair is None and takes_unequal_rows(model) and not is_touched(model)
    way = _Together(model, asks) if together else _Alike(model, asks, repair)
    around = (pretransposed_weights, *([] if together else [lean_blocks]))

    def what(part: _Batch) -> tuple[Any, ...]:
        rows = [asks[i] for i in part[0]]
        return "replies", [(ask.prompt.ids, ask.room, ask.stop, ask.first) for ask in rows]

    replies: dict[int, _Reply] = {}
    with (
        torch.no_grad(),
        ExitStack() as stack,
        progress_bar(total=len(asks), label="asking", unit="prompt") as bar,
    ):
        for each in around:
            stack.enter_context(each(model))
        for (rows, _), said in each_part(
            model,
            way.batches(batch_size),
            way.say,
            kept=what,
            texts=lambda part: [asks[i].prompt.text for i in part[0]],
            around=around,
        ):
            for i, (ids, text, finished, rank, prob) in zip(rows, said, strict=True):
                replies[i] = _Reply(ids, Generation(tuple(ids), text, finished), rank, prob)
            bar.update(len(rows))
    return [replies[i] for i in range(len(asks))]


#: Prompts by number, and what is to be run of them.
_Batch = tuple[Sequence[int], Any]


class _Together:
    """Rows of unequal lengths: prompts part by part, then all of a batch step by step.

    They are run as bare sums where possible, else by the model itself.
    """

    def __init__(self, model: HookedModel, asks: Sequence[_Ask]) -> None:
        self._model, self._asks = model, asks
        self._ids = [ask.prompt.ids for ask in asks]
        self._starts: dict[tuple[int, ...], RowCache] = {}  # what the last rows started with

    def __reduce__(self) -> Any:
        return type(self), (self._model, self._asks)

    @cached_property
    def _plain(self) -> PlainPasses | None:
        # Made at first use: then the weights lie in memory as passes want them.
        return plain_passes(self._model)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], list[Part]]]:
        """Rows, and the parts they are run in."""
        cost, packed = pass_cost(self._model), self._plain is not None
        for parts in plan_batches(self._ids, batch_size, pass_cost=cost, packed=packed):
            yield [i for part in parts for i in part.rows], parts

    def say(self, batch: _Batch) -> list[list[Any]]:
        """What is said to the rows, as `keep` can write it."""
        (order, parts), ids = batch, self._ids
        width = max(len(ids[i]) for i in order)
        cache = self._cache(len(order), width, max(self._asks[i].room for i in order))
        logits, first = [], 0
        for part in parts:
            start = self._run_starts(ids[part.rows[0]], part.starts)
            shared = part.starts[-1] if part.starts else 0
            batch_ = pad([ids[i][shared:] for i in part.rows])
            view = cache.prompts(first, len(part.rows), batch_.tokens.shape[1], start)
            logits.append(self._run(batch_.tokens, batch_.last, view))
            first += len(part.rows)
        asks = [self._asks[i] for i in order]
        return _as_lists(self._step_by_step(asks, torch.cat(logits), cache))

    def _cache(self, n_rows: int, width: int, n_new: int = 0) -> RowCache:
        return RowCache(self._model, n_rows, width, n_new, plain=self._plain is not None)

    def _run(
        self, tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], view: Any
    ) -> Float[Tensor, "row vocab"]:
        """Logits at each row's position `last`; `view` is of a `_cache`."""
        if self._plain is not None:
            return self._plain(tokens, last, view)
        return logits_at(self._model, tokens, last[:, None], cache=view)[:, 0]

    def _run_starts(self, ids: tuple[int, ...], starts: tuple[int, ...]) -> RowCache | None:
        """Keys and values of the tokens that several prompts start with."""
        wanted = [ids[:length] for length in starts]
        self._starts = {start: known for start, known in self._starts.items() if start in wanted}
        before = None
        for start in wanted:
            if start not in self._starts:
                begun = 0 if before is None else before.width
                self._starts[start] = self._cache(1, len(start))
                view = self._starts[start].prompts(0, 1, len(start) - begun, before)
                self._run(
                    torch.tensor([start[begun:]]), torch.tensor([len(start) - begun - 1]), view
                )
            before = self._starts[start]
        return before

    def _step_by_step(
        self, asks: list[_Ask], logits: Float[Tensor, "row vocab"], cache: RowCache
    ) -> list[_Reply]:
        model, replies = self._model, [_Reply() for _ in asks]
        lengths = torch.tensor([len(ask.prompt) for ask in asks])
        width = int(lengths.max())
        here = list(range(len(asks)))  # the rows that the cache still has
        step = 0
        while True:
            best = _take(model, [asks[r] for r in here], [replies[r] for r in here], logits)
            going = [k for k, r in enumerate(here) if _goes_on(asks[r], replies[r])]
            if not going:
                return replies
            # Fewer rows are worth a copy of what is kept of them; and none may outgrow the context.
            if len(going) <= 0.75 * len(here) or int(lengths.max()) + step >= model.cfg.n_ctx:
                picked = torch.tensor(going)
                cache.keep(picked)
                here, best, lengths = [here[k] for k in going], best[picked], lengths[picked]
            slots = torch.arange(width + step + 1)[None]
            seen = (slots < lengths[:, None]) | (slots >= width)
            place = device_of(model)
            view = cache.step(seen.to(place), (lengths + step).to(place))
            logits = self._run(best[:, None], torch.zeros(len(here), dtype=torch.long), view)
            step += 1


@dataclass
class _Alike:
    """Rows of one length, by the model's own cache."""

    model: HookedModel
    asks: Sequence[_Ask]
    repair: Repair | None

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Int[Tensor, "row pos"]]]:
        """Rows, and their tokens."""
        for chosen, batch in batches_by_length([ask.prompt.ids for ask in self.asks], batch_size):
            yield chosen, batch.tokens

    def say(self, batch: _Batch) -> list[list[Any]]:
        """What is said to the rows, as `keep` can write it."""
        rows, tokens = batch
        some = [self.asks[i] for i in rows]
        replies = [_Reply() for _ in some]
        step = stepping(
            self.model, [ask.prompt for ask in some], self.repair, [ask.state for ask in some]
        )
        while True:
            tokens = _take(self.model, some, replies, step(tokens))[:, None]
            if not any(_goes_on(ask, reply) for ask, reply in zip(some, replies, strict=True)):
                return _as_lists(replies)


def _goes_on(ask: _Ask, reply: _Reply) -> bool:
    return not reply.said.finished and len(reply.ids) < ask.room


def _take(
    model: HookedModel, asks: list[_Ask], replies: list[_Reply], logits: Float[Tensor, "row vocab"]
) -> Int[Tensor, "row"]:
    """Adds the most probable token to every row that goes on; gives it for all rows."""
    top, best = logits.max(-1)  # NaN counts as the largest
    if top.isnan().any():
        raise ValueError("the logits hold NaN, so there is no most probable token to generate")
    best = best.cpu()
    for r, (ask, reply) in enumerate(zip(asks, replies, strict=True)):
        if not _goes_on(ask, reply):
            continue
        if ask.first is not None and not reply.ids:
            row = logits[r].to(wide_dtype(logits.dtype))
            reply.rank = 1 + int((row > row[ask.first]).sum())
            reply.prob = float(row.softmax(-1)[ask.first])
        reply.ids.append(int(best[r]))
        ended = reply.ids[-1] == model.tokenizer.eos_token_id or len(reply.ids) == ask.room
        if ended or ask.stop:  # where nothing stops it, its text is read once
            reply.said = _read(model, reply.ids, ask.stop)
    return best


def _read(model: HookedModel, ids: list[int], stop: Sequence[str]) -> Generation:
    ended = ids[-1] == model.tokenizer.eos_token_id
    text = decode(model, ids[:-1] if ended else ids).strip(" ")
    ends = find_ends(text, stop)
    cut = text[: ends[0]] if ends else text
    return Generation(tuple(ids), cut.strip(), ended or bool(ends))


def end_ids(model: HookedModel, stop: Sequence[str] = STOP) -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and every token whose text starts with a stop string.

    Spaces at the start of a token are ignored. For `metrics.Greedy`; reads the whole
    vocabulary, so call it once.
    """
    check_stop(stop)
    tokenizer = model.tokenizer
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends = {i for i, text in enumerate(texts) if text.lstrip(" ").startswith(tuple(stop))}
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
        rank: of the answer's first token among all of the vocabulary, 1 for the most probable.
        prob: its probability.
    """

    text: str
    exact: bool
    alias: bool
    first_token: bool
    rank: int
    prob: float

    @property
    def right(self) -> bool:
        """The answer or an alias."""
        return self.exact or self.alias


def answered(
    model: HookedModel,
    prompts: Texts,
    answers: str | Sequence[str],
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
        answers, aliases: one answer, and one (possibly empty) sequence of aliases, per prompt.
        max_new_tokens: raised, for a row whose answer or alias needs it, to the longest of them
            and three more, so that its article and its end can be seen.
        stop: a stop string that an answer or alias holds itself does not end that row's
            generation; see `matches`.

    Raises:
        ValueError: unequal numbers of prompts, answers and aliases; see also `generate`.
        TokenError: see `generate` and `tokens.answer_ids`.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> found = mi_hops.answered(model, [f.prompt() for f in facts], [f.answer for f in facts])
        >>> [one.exact for one in found]
        [True, True, True, True]
    """
    known, answers = prompts_of(model, prompts), [answers] if isinstance(answers, str) else answers
    others = [()] * len(known) if aliases is None else list(aliases)
    if not len(known) == len(answers) == len(others):
        raise ValueError(
            f"got {len(known)} prompts, {len(answers)} answers and {len(others)} lists of "
            "aliases; need one of each"
        )
    given = check_states(len(known), repair, states)
    firsts = [answer_ids(model, p, a)[0] for p, a in zip(known, answers, strict=True)]
    check_stop(stop)
    asks = []
    for prompt, state, answer, more, first in zip(
        known, given, answers, others, firsts, strict=True
    ):
        accepted = (answer, *more)
        marks = tuple(s for s in stop if not any(s in a for a in accepted))
        spelt = model.tokenizer([" " + a for a in accepted], add_special_tokens=False)["input_ids"]
        room = max(max_new_tokens, 3 + max(map(len, spelt)))
        asks.append(_Ask(prompt, state, room, marks, first))
    found = []
    replies = _replies(model, asks, batch_size, repair)
    for ask, reply, answer, more in zip(asks, replies, answers, others, strict=True):
        said = reply.said
        match = partial(matches, said.text, answer, stop=stop, finished=said.finished)
        exact = match()
        alias = not exact and match(more)
        hit = said.ids[0] == ask.first
        found.append(Answered(said.text, exact, alias, hit, reply.rank, reply.prob))
    return found
