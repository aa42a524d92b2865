"""Streams of text as batches of tokens: a file, any iterable, or facts turned into statements."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel, prepends_bos
from mi_hops.text.tokens import Batch, batches_in_order

#: Texts, facts (as their statements), or the path of a file.
Corpus = Iterable[str | TwoHopFact] | str | Path

Hop = Literal["first", "second", "two_hop"]
HOPS: tuple[Hop, ...] = ("first", "second", "two_hop")


def fact_texts(facts: Iterable[TwoHopFact], which: Sequence[Hop] = HOPS) -> Iterator[str]:
    """Statements of facts: each prompt, a space, its answer and a full stop.

    Facts in the order given; within a fact the hops in the order of `which`, and every form there
    is. Facts that share a hop repeat its statement.

    Raises:
        ValueError: an unknown hop, or none.

    Examples:
        >>> import mi_hops
        >>> next(mi_hops.fact_texts(mi_hops.load_facts("hopland"), ["first"]))
        'The translator of Lost Gardens Revisited is Ruben van Harrow.'
    """
    unknown = [w for w in which if w not in HOPS]
    if isinstance(which, str) or unknown or not which:
        raise ValueError(f"which is {which!r}; expected one or more of {HOPS}")
    return _statements(facts, tuple(which))


def _statements(facts: Iterable[TwoHopFact], which: tuple[Hop, ...]) -> Iterator[str]:
    for fact in facts:
        tables = {
            "first": (fact.first_prompts, fact.bridge),
            "second": (fact.second_prompts, fact.answer),
            "two_hop": (fact.prompts, fact.answer),
        }
        for hop in which:
            prompts, answer = tables[hop]
            for prompt in prompts.values():
                yield f"{prompt} {answer}."


def token_batches(
    model: HookedModel,
    texts: Iterable[str | TwoHopFact] | str | Path,
    *,
    max_tokens: int = 4096,
    max_length: int | None = None,
    ends: bool = False,
) -> Iterator[Batch]:
    """Right-padded batches of a corpus, in its own order, one batch in memory at a time.

    Every piece begins with BOS where the model's prompts do (`mi_hops.model.prepends_bos`).

    Args:
        texts: an iterable (a generator will do) of texts or facts, which become their statements
            (`fact_texts`); or the path of a file: JSON Lines with a ``text`` key where its name
            ends in ``.jsonl``, else plain text, one text per line. Blank texts are skipped.
        max_tokens: bound on rows times width of a batch, padding included.
        max_length: longer texts are cut into pieces of as many tokens, BOS included; default the
            model's context, or `max_tokens` where that is less.
        ends: of longer texts only the piece that ends them.

    Raises:
        ValueError: limits that contradict one another or the model's context; a path that is not a
            file; a line that is not a JSON object with a ``text``; an element that is neither text
            nor fact; a corpus without a single token (the last three while iterating).
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; load it with one (mi_hops.load_model does)")
    bos = tokenizer.bos_token_id if prepends_bos(model) else None
    context = int(model.cfg.n_ctx)
    length = min(context, max_tokens) if max_length is None else max_length
    least = 1 if bos is None else 2
    if not least <= length <= min(context, max_tokens):
        raise ValueError(
            f"max_length is {length} and max_tokens {max_tokens}; max_length must be at least "
            f"{least} and at most max_tokens and the model's context of {context}"
        )
    source = f"the {type(texts).__name__} given"
    if isinstance(texts, str | Path):
        source = require_file(texts)
    return _packed(_pieces(tokenizer, _texts(texts), bos, length, ends), max_tokens, source)


def require_file(path: str | os.PathLike[str]) -> str:
    """The path as messages name it; refuses one that is none, such as a text.

    Raises:
        ValueError: no such file.
    """
    shown = repr(str(path)[:80])
    if not os.path.isfile(path):
        raise ValueError(
            f"{shown} is not a file; give the path of one, or put a single text in a list"
        )
    return shown


def _packed(pieces: Iterable[list[int]], max_tokens: int, source: str) -> Iterator[Batch]:
    empty = True
    for batch in batches_in_order(pieces, max_tokens):
        empty = False
        yield batch
    if empty:
        raise ValueError(f"the corpus is empty: no text with a token in it came from {source}")


def _pieces(
    tokenizer: Any, texts: Iterable[str], bos: int | None, length: int, ends: bool
) -> Iterator[list[int]]:
    start = [] if bos is None else [bos]
    room = length - len(start)
    for text in texts:
        # Not verbose: texts longer than the context are expected here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # Some SentencePiece templates add BOS even when told not to.
        if ids and ids[0] == tokenizer.bos_token_id:
            ids = ids[1:]
        for at in range(0, len(ids), room):
            if not ends or at + room >= len(ids):
                yield [*start, *ids[at : at + room]]


def _texts(source: Iterable[str | TwoHopFact] | str | Path) -> Iterator[str]:
    if isinstance(source, str | Path):
        yield from _lines(Path(source))
        return
    for item in source:
        if isinstance(item, TwoHopFact):
            yield from fact_texts([item])
        elif not isinstance(item, str):
            raise ValueError(f"a corpus holds texts or facts, got {type(item).__name__}: {item!r}")
        elif item.strip():
            yield item


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if text.strip() and path.suffix == ".jsonl":
                text = _text_of(text, f"line {number} of {path.name}")
            if text.strip():
                yield text


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): {line[:60]!r}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no string under the key 'text': {line[:60]!r}")
    return text
