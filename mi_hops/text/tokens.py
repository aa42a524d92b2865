"""Prompts, answers and spans as tokens: the one place where positions are made.

Policy: batches are padded on the right and run without an attention mask. Attention is causal, so
no scored position ever sees padding, and learned positions start at 0 in every row; every number
therefore equals the unpadded one. A position is resolved for each prompt by itself and never falls
on padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mi_hops.model import HookedModel, prepends_bos

#: A position: an index (negative counts from the end), a slice, a substring of the prompt, or one of
#: two words: ``"last"`` (the last token) and ``"all"`` (every token). The words win over a substring.
Where = int | slice | str

#: Tokenizer -> what its warnings about unknown tokens have been about ("prompt", "answer").
_WARNED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


class TokenError(ValueError):
    """A text does not give the tokens or positions that a method needs."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt: from a text by `encode`, from token ids by `Prompt.from_tokens`.

    Attributes:
        text: as given, without BOS.
        ids: token ids, BOS included.
        labels: one readable string per token, spaces kept.
        offsets: character span of each token in `text`, white space trimmed; (0, 0) for BOS.
        has_bos: whether ``ids[0]`` is the tokenizer's BOS.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> prompt = mi_hops.Prompt.from_tokens(model, model.to_tokens("The spouse of Joren Ashby is"))
        >>> prompt
        Prompt('The spouse of Joren Ashby is', 7 tokens, BOS first)
    """

    text: str
    ids: tuple[int, ...]
    labels: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    has_bos: bool

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        bos = "BOS first" if self.has_bos else "no BOS"
        return f"Prompt({_shortened(self.text)!r}, {len(self)} tokens, {bos})"

    @classmethod
    def from_tokens(cls, model: HookedModel, ids: Int[Tensor, "pos"] | Sequence[int]) -> Prompt:
        """The prompt with exactly these token ids: no BOS is added or removed.

        Its text is what the ids decode to, without BOS; their numbers, without a tokenizer.

        Args:
            ids: token ids ``[pos]``, or ``[1, pos]`` as ``model.to_tokens`` makes them of a text.

        Raises:
            TokenError: several rows, no tokens, ids outside the vocabulary, more tokens than the
                context holds.
        """
        given = torch.as_tensor(ids)
        if given.ndim == 2 and len(given) == 1:
            given = given[0]
        if given.ndim != 1 or not len(given) or given.is_floating_point():
            raise TokenError(
                f"expected the token ids [pos] of one prompt, got {given.dtype} of shape "
                f"{tuple(given.shape)}; for [batch pos] make one Prompt per row"
            )
        row: list[int] = given.tolist()
        size = int(model.cfg.d_vocab)
        if outside := [i for i in row if not 0 <= i < size]:
            raise TokenError(f"token ids {outside[:5]} are outside the vocabulary of {size}")
        if model.tokenizer is None:
            return _prompt(model, " ".join(map(str, row)), row, [(0, 0)] * len(row), False)
        tokenizer = _tokenizer(model)
        has_bos = row[0] == tokenizer.bos_token_id
        own = row[1:] if has_bos else row
        text = str(tokenizer.decode(own, clean_up_tokenization_spaces=False))
        again, spans = _tokenise(tokenizer, text)
        if text[:1].isspace() and _tokenise(tokenizer, text[1:])[0] == own:
            text = text[1:]  # a space that the tokenizer itself puts before the first word
            again, spans = _tokenise(tokenizer, text)
        if again != own:  # not as the tokenizer would split this text: by the length of each prefix
            ends = [
                len(str(tokenizer.decode(own[:n], clean_up_tokenization_spaces=False)))
                for n in range(1, len(own) + 1)
            ]
            spans = [_trim(text, span) for span in zip([0, *ends], ends, strict=False)]
        return _prompt(model, text, row, [(0, 0), *spans] if has_bos else spans, has_bos)

    @property
    def last(self) -> int:
        """Index of the last token."""
        return len(self.ids) - 1

    @property
    def pieces(self) -> list[str]:
        """Each token's part of the text with the white space before it; of BOS its label.

        Put together they are the text, which labels need not be: some tokenizers leave spaces out.
        """
        found, end = [], 0
        for label, (start, stop) in zip(self.labels, self.offsets, strict=True):
            found.append(label if start == stop else self.text[end:stop])
            end = max(end, stop)
        return found


def encode(
    model: HookedModel, text: str, *, prepend_bos: bool | None = None, max_extra: int = 0
) -> Prompt:
    """Tokenise one prompt; no special tokens besides BOS.

    Words that the tokenizer does not know are warned of, once per tokenizer.

    Args:
        prepend_bos: put the tokenizer's BOS first; default what the model's prompts begin with
            (`mi_hops.model.prepends_bos`). A tokenizer that has no BOS token gets none.
        max_extra: tokens that will be appended; the context must hold them as well.

    Raises:
        TokenError: an empty prompt, a tokenizer without offsets, or a prompt longer than the
            model's context.

    Examples:
        >>> import mi_hops
        >>> prompt = mi_hops.encode(mi_hops.load_model("hops-gpt2"), "The spouse of Joren Ashby is")
        >>> prompt.labels[1:4]
        (' The', ' spouse', ' of')
    """
    prompt = _encode(model, text, prepend_bos=prepend_bos, max_extra=max_extra)
    _warn_unknown(model, prompt, "prompt")
    return prompt


def _encode(
    model: HookedModel, text: str, *, prepend_bos: bool | None, max_extra: int = 0
) -> Prompt:
    tokenizer = _tokenizer(model)
    if not text.strip():
        raise TokenError(f"the prompt is empty ({text!r})")
    ids, spans = _tokenise(tokenizer, text)
    wanted = prepends_bos(model) if prepend_bos is None else prepend_bos
    bos = tokenizer.bos_token_id if wanted else None
    # Some SentencePiece templates add BOS even when told not to.
    if bos is not None and (not ids or ids[0] != bos):
        ids, spans = [bos, *ids], [(0, 0), *spans]
    return _prompt(model, text, ids, spans, bos is not None, max_extra)


def _prompt(
    model: HookedModel,
    text: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    has_bos: bool,
    max_extra: int = 0,
) -> Prompt:
    require_room(model, text, len(ids), max_extra)
    tokenizer = model.tokenizer
    labels = tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids)
    return Prompt(text, tuple(ids), labels, tuple(spans), has_bos)


def require_room(
    model: HookedModel, text: str, n_tokens: int, more: int, what: str = "to come"
) -> None:
    """Refuse a prompt of `n_tokens` that does not fit the context together with what follows it.

    Raises:
        TokenError: naming both numbers and the prompt.
    """
    if n_tokens + more > model.cfg.n_ctx:
        raise TokenError(
            f"prompt of {n_tokens} tokens (+{more} {what}) exceeds the model's context of "
            f"{model.cfg.n_ctx}: {_shortened(text)!r}"
        )


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [_trim(text, span) for span in found["offset_mapping"]]


def _warn_unknown(model: HookedModel, prompt: Prompt, what: str, start: int = 0) -> None:
    """Warn, once per tokenizer and use, of words that all become the same "unknown" token."""
    tokenizer = model.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    words = [
        prompt.text[slice(*span)]
        for token, span in zip(prompt.ids[start:], prompt.offsets[start:], strict=True)
        if token == unknown
    ]
    # A text may spell the token out; byte-level tokenizers know every other word.
    words = [word for word in words if word and word != tokenizer.unk_token]
    if not words or what in _WARNED.setdefault(tokenizer, set()):
        return
    _WARNED[tokenizer].add(what)
    warnings.warn(
        f"{len(words)} token(s) of the {what} {_shortened(prompt.text)!r} are unknown to the model's "
        f"tokenizer, such as {words[0]!r}; all of them become {tokenizer.unk_token}, so the model "
        f"cannot tell them apart. Other {what}s with unknown tokens are not mentioned again.",
        UserWarning,
        stacklevel=3,
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _tokenizer(model: HookedModel) -> Any:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TokenError("the model has no tokenizer; load it with one (mi_hops.load_model does)")
    if not getattr(tokenizer, "is_fast", False):
        raise TokenError(
            f"{type(tokenizer).__name__} gives no character offsets; use the tokenizers-backed "
            "('fast') version"
        )
    return tokenizer


def _trim(text: str, span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


# -- answers -------------------------------------------------------------------------------------


def answer_ids(model: HookedModel, prompt: Prompt, answer: str) -> tuple[int, ...]:
    """Token ids of `answer` as the continuation of `prompt`.

    Found by tokenising prompt and answer together, joined by a space, and taking what follows the
    prompt; so byte-level and SentencePiece rules for spaces are both met.

    Words that the tokenizer does not know are warned of, once per tokenizer.

    Raises:
        TokenError: an empty answer, or tokens that merge across the boundary.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> prompt = mi_hops.encode(model, "The spouse of Joren Ashby is")
        >>> len(mi_hops.answer_ids(model, prompt, "Nadia del Brandt"))
        3
    """
    answer = answer.strip()
    if not answer:
        raise TokenError(f"empty answer to the prompt {prompt.text!r}")
    joint = f"{prompt.text.rstrip()} {answer}"
    whole = _encode(model, joint, prepend_bos=prompt.has_bos)
    start = prompt.ids
    if whole.ids[: len(start)] != start and prompt.text.strip():
        # Token ids may split the text in another way than the tokenizer does.
        start = _encode(model, prompt.text, prepend_bos=prompt.has_bos).ids
    if whole.ids[: len(start)] != start or len(whole) == len(start):
        raise TokenError(
            f"the tokens of {joint!r} do not start with those of the prompt, so the answer's own "
            "tokens are undefined; end the prompt at a word boundary, without white space"
        )
    _warn_unknown(model, whole, "answer", len(start))
    return whole.ids[len(start) :]


# -- positions -----------------------------------------------------------------------------------


def find_text(text: str, phrase: str) -> tuple[int, int]:
    """Character span of the one occurrence of `phrase`, exact if it can be, else caseless.

    Raises:
        TokenError: no occurrence, or several.
    """
    if not phrase.strip():
        raise TokenError("the span to look for is empty")
    for haystack, needle in ((text, phrase), (_lowered(text), _lowered(phrase))):
        starts = [i for i in range(len(haystack)) if haystack.startswith(needle, i)]
        if len(starts) == 1:
            return starts[0], starts[0] + len(needle)
        if starts:
            raise TokenError(
                f"{phrase!r} occurs {len(starts)} times in {text!r}; pass an index or a slice of token "
                "positions instead"
            )
    raise TokenError(f"{phrase!r} does not occur in the prompt {text!r}")


def _lowered(text: str) -> str:
    """In small letters, one for each, so that places stay those of `text`: some are two when small."""
    small = text.lower()
    if len(small) == len(text):
        return small
    return "".join(c if len(c.lower()) > 1 else c.lower() for c in text)


def positions(prompt: Prompt, where: Where) -> tuple[int, ...]:
    """Token positions of an index, a slice, ``"last"``, ``"all"`` or a substring; never empty.

    A substring covers every token that shares a character with it.

    Raises:
        TokenError: out of range, an empty slice, or a substring that is absent or ambiguous.

    Examples:
        >>> import mi_hops
        >>> prompt = mi_hops.encode(mi_hops.load_model("hops-gpt2"), "The spouse of Joren Ashby is")
        >>> mi_hops.positions(prompt, "Joren Ashby"), mi_hops.positions(prompt, "last")
        ((4, 5), (6,))
    """
    n = len(prompt)
    if where == "last":
        return (prompt.last,)
    if where == "all":
        return tuple(range(n))
    if isinstance(where, str):
        start, end = find_text(prompt.text, where)
        found = tuple(
            i for i, (a, b) in enumerate(prompt.offsets) if a < end and b > start and b > a
        )
        if not found:
            raise TokenError(f"no token of {prompt.text!r} covers {where!r}")
        return found
    if isinstance(where, slice):
        found = tuple(range(n))[where]
        if not found:
            raise TokenError(f"{where} selects none of the {n} tokens {list(prompt.labels)}")
        return found
    index: Any = where
    if not isinstance(index, Integral):
        raise TokenError(
            f"a position is an index, a slice, a substring, 'last' or 'all'; got {where!r} (tokens apart "
            "from one another are positions of their own)"
        )
    if not -n <= where < n:
        raise TokenError(f"position {where} is out of range for {n} tokens {list(prompt.labels)}")
    return (int(where % n),)


def last_position(prompt: Prompt, where: Where) -> int:
    """The last token position of `where`, which has seen the whole span."""
    return positions(prompt, where)[-1]


def align(first: Prompt, second: Prompt) -> None:
    """Check that two prompts have equally many tokens, so that positions correspond.

    Raises:
        TokenError: unequal lengths; the message shows both token lists.
    """
    if len(first) != len(second):
        raise TokenError(
            f"the prompts have {len(first)} and {len(second)} tokens and cannot be aligned:\n"
            f"  {list(first.labels)}\n  {list(second.labels)}"
        )


# -- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens.

    Attributes:
        tokens: ``[row, pos]``, padded with id 0 (never read by a scored position).
        lengths: ``[row]``, tokens that are real.
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, "row"]

    def __repr__(self) -> str:
        return f"Batch({self.tokens.shape[0]} rows of up to {self.tokens.shape[1]} tokens)"

    @property
    def last(self) -> Int[Tensor, "row"]:
        """Position of each row's last real token."""
        return self.lengths - 1

    @property
    def mask(self) -> Bool[Tensor, "row pos"]:
        """True at real tokens."""
        return torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


def pad(rows: Iterable[Sequence[int] | Int[Tensor, "pos"]]) -> Batch:
    """Pad token lists on the right into one batch.

    Raises:
        TokenError: no rows, or an empty one.

    Examples:
        >>> import mi_hops
        >>> mi_hops.pad([[5, 6, 7], [8]]).tokens.tolist()
        [[5, 6, 7], [8, 0, 0]]
    """
    rows = list(rows)
    if not rows or not all(len(r) for r in rows):
        raise TokenError("a batch needs at least one row, and every row at least one token")
    tokens = [torch.as_tensor(list(row), dtype=torch.long) for row in rows]
    return Batch(pad_sequence(tokens, batch_first=True), torch.tensor([len(r) for r in rows]))


def batches_by_length(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """(indices into `rows`, batch) pairs in which all rows have one length: no padding at all."""
    for _, alike in groupby(_by_length(rows, batch_size), key=lambda i: len(rows[i])):
        yield from _cut(rows, list(alike), batch_size)


def batches(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """(indices into `rows`, right-padded batch) pairs, rows of similar length together."""
    yield from _cut(rows, _by_length(rows, batch_size), batch_size)


def _by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[int]:
    if batch_size < 1:
        raise TokenError(f"batch_size is {batch_size}; expected at least 1")
    return sorted(range(len(rows)), key=lambda i: len(rows[i]))


def _cut(
    rows: Sequence[Sequence[int]], order: list[int], batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, pad([rows[i] for i in chosen])


def batches_in_order(rows: Iterable[Sequence[int]], max_tokens: int) -> Iterator[Batch]:
    """Right-padded batches of rows as they come, each of at most `max_tokens`, padding counted.

    A longer row makes a batch by itself.
    """
    waiting: list[Sequence[int]] = []
    width = 0
    for row in rows:
        wider = max(width, len(row))
        if waiting and wider * (len(waiting) + 1) > max_tokens:
            yield pad(waiting)
            waiting, wider = [], len(row)
        waiting.append(row)
        width = wider
    if waiting:
        yield pad(waiting)


def decode(model: HookedModel, ids: Iterable[int]) -> str:
    """Text of token ids, special tokens left out."""
    return str(_tokenizer(model).decode(list(ids), skip_special_tokens=True))
