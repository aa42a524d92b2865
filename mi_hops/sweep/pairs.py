"""What a sweep runs on: tokenised prompts, their answers, and spans named in both prompts of a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mi_hops.model import HookedModel
from mi_hops.sweep.metrics import KL, Custom, Metric, Target, target_of
from mi_hops.text.tokens import Prompt, TokenError, Where, align, encode, positions

Text = str | Prompt

#: A span in the two prompts of a pair: one position for both, or (taken from, put at).
SpanLike = Where | tuple[Where, Where]

#: Which positions a sweep visits. ``"each"`` token by itself; ``"all"`` of the prompt at once; one
#: position (index, slice or substring); several; or roles by name, each a span for all pairs or a
#: list with one span a pair.
PositionsLike = Where | Sequence[Where] | Mapping[str, SpanLike | Sequence[SpanLike]]


def as_prompts(
    model: HookedModel, given: Text | Sequence[Text], *, prepend_bos: bool = True
) -> list[Prompt]:
    """One or several prompts, tokenised.

    Raises:
        TokenError: no prompt at all, something that is no text (token ids, say), or one that cannot
            be encoded.
    """
    texts = [given] if isinstance(given, str | Prompt) else list(given)
    if not texts:
        raise TokenError("no prompts were given; pass a string or a sequence of strings")
    others = [type(t).__name__ for t in texts if not isinstance(t, str | Prompt)]
    if others:
        raise TokenError(f"prompts are text, or a Prompt that mi_hops.encode made; got {others[0]}")
    return [
        t if isinstance(t, Prompt) else encode(model, t, prepend_bos=prepend_bos) for t in texts
    ]


def one_each(what: str, given: Any, n: int) -> list[Any]:
    """`given` for each of `n` examples: a single string for all of them, or one each.

    Raises:
        ValueError: another number of them.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given] * n
    if len(given) != n:
        raise ValueError(f"got {len(given)} of {what} for {n} examples; give one, or one each")
    return list(given)


def example_labels(given: Sequence[str] | None, n: int) -> list[Any]:
    """Labels of `n` examples: those given, or their numbers.

    Raises:
        ValueError: another number of labels.
    """
    labels = list(range(n)) if given is None else list(given)
    if len(labels) != n:
        raise ValueError(f"got {len(labels)} example labels for {n} examples; give one each")
    return labels


def as_targets(
    model: HookedModel,
    prompts: Sequence[Prompt],
    answer: str | Target | Sequence[str | Target] | None,
    wrong: str | Sequence[str] | None,
    metrics: Sequence[Metric | None],
) -> list[Target]:
    """What each prompt is scored on.

    Without an answer only metrics that read none may be asked for: a divergence (None stands for
    ``"kl"``) or a function.

    Raises:
        ValueError: no answer where a metric needs one, or one that is neither text nor a `Target`.
        TokenError: an answer that has no tokens of its own after its prompt.
    """
    if answer is None:
        needing = [m.name for m in metrics if m is not None and not isinstance(m, KL | Custom)]
        if needing:
            raise ValueError(f"metric(s) {needing} score an answer, and none was given")
        return [Target(prompt.ids[-1:]) for prompt in prompts]  # read by no metric
    answers = one_each("answer", answer, len(prompts))
    wrongs = one_each("wrong", wrong, len(prompts))
    others = [a for a in answers if not isinstance(a, str | Target)]
    if others:
        raise ValueError(f"answers are text, or a metrics.Target of token ids; got {others[0]!r}")
    return [
        a if isinstance(a, Target) else target_of(model, prompt, a, w)
        for prompt, a, w in zip(prompts, answers, wrongs, strict=True)
    ]


@dataclass(frozen=True)
class Spans:
    """The spans a sweep visits, resolved in every pair.

    Attributes:
        labels: one a span: token index, role, or the text that named it.
        axis: whether the spans make an axis of the result; a single span makes none.
        source: positions to take from, ``[pair][span]``.
        base: positions to put at, ``[pair][span]``, of the same lengths.
    """

    labels: tuple[int | str, ...]
    axis: bool
    source: tuple[tuple[tuple[int, ...], ...], ...]
    base: tuple[tuple[tuple[int, ...], ...], ...]

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[str]] | None:
        """The base prompts' token at each span ``[pair][span]``; None where a span has several."""
        if any(len(span) != 1 for pair in self.base for span in pair):
            return None
        return [
            [prompt.labels[span[0]] for span in pair]
            for prompt, pair in zip(prompts, self.base, strict=True)
        ]


def resolve_spans(
    given: PositionsLike, sources: Sequence[Prompt], bases: Sequence[Prompt]
) -> Spans:
    """Positions in every pair of prompts (see `PositionsLike`).

    Raises:
        TokenError: prompts that have to correspond token by token and have unequal lengths, a span
            that is absent, or one that covers unequal numbers of tokens in the two prompts.
        ValueError: no positions, or a list of another length than the pairs.
    """
    if isinstance(given, str) and given in ("each", "all"):
        for source, base in zip(sources, bases, strict=True):
            align(source, base)
        if given == "all":
            whole = tuple((tuple(range(len(p))),) for p in bases)
            return Spans(("all",), False, whole, whole)
        lengths = sorted({len(p) for p in bases})
        if len(lengths) > 1:
            raise TokenError(
                f"the prompts have {lengths} tokens, so their positions make no common axis; name "
                "positions by role, e.g. positions={'last': -1, 'subject': [...one a pair...]}"
            )
        tokens = tuple((i,) for i in range(lengths[0]))
        each = (tokens,) * len(bases)
        return Spans(tuple(range(lengths[0])), True, each, each)
    if isinstance(given, int | str | slice):
        return _resolved({_label(given): given}, sources, bases, axis=False)
    if isinstance(given, Mapping):
        return _resolved(given, sources, bases, axis=True)
    items = list(given)
    named: dict[Any, Any] = {_label(where): where for where in items}
    if len(named) < len(items):
        raise ValueError(f"positions {items} name one place twice")
    return _resolved(named, sources, bases, axis=True)


def _label(where: Where) -> int | str:
    if isinstance(where, slice):
        bounds = (where.start, where.stop, where.step)
        return ":".join("" if b is None else str(b) for b in bounds).removesuffix(":")
    return where


def _resolved(
    named: Mapping[Any, Any], sources: Sequence[Prompt], bases: Sequence[Prompt], *, axis: bool
) -> Spans:
    if not named:
        raise ValueError("no positions were given; pass 'each', 'all', or at least one position")
    taken: list[list[tuple[int, ...]]] = [[] for _ in bases]
    put: list[list[tuple[int, ...]]] = [[] for _ in bases]
    for name, spec in named.items():
        if isinstance(spec, list) and len(spec) != len(bases):
            raise ValueError(
                f"position {name!r} lists {len(spec)} spans for {len(bases)} pairs; give one each"
            )
        for i, (source, base) in enumerate(zip(sources, bases, strict=True)):
            where = spec[i] if isinstance(spec, list) else spec
            origin, goal = where if isinstance(where, tuple) else (where, where)
            taken[i].append(positions(source, origin))
            put[i].append(positions(base, goal))
            if len(taken[i][-1]) != len(put[i][-1]):
                raise TokenError(
                    f"position {name!r} covers {len(taken[i][-1])} token(s) of {source.text!r} and "
                    f"{len(put[i][-1])} of {base.text!r}; patch the same number of tokens, e.g. the "
                    "last one of each span"
                )
    labels = list(named)
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        labels = [str(label) for label in labels]
    return Spans(tuple(labels), axis, tuple(map(tuple, taken)), tuple(map(tuple, put)))
