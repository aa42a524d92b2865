"""What a sweep runs on: pairs of prompts with their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import torch
from jaxtyping import Int

from mi_hops.model import HookedModel
from mi_hops.sweep.metrics import Target
from mi_hops.text.tokens import Prompt, TokenError, answer_ids, encode

#: One prompt: text (BOS is put first), a `Prompt`, or token ids ``[pos]`` (which run as they are).
Text = str | Prompt | torch.Tensor

#: One or several prompts; token ids of several of one length may be one tensor ``[batch pos]``.
Texts = Text | Sequence[Text]

#: An answer: text, a `Target`, a token id, or token ids ``[token]``.
Answer = str | Target | int | torch.Tensor

#: One answer for all prompts, or one each; token ids ``[batch]`` or ``[batch token]`` are one each.
Answers = Answer | Sequence[Answer]

Item = TypeVar("Item")


class Activations(Protocol):
    """Activations by hook name: TransformerLens's `ActivationCache`, or a mapping of tensors.

    They are ``[batch pos ...]``, or ``[pos ...]`` of a single prompt.
    """

    def __getitem__(self, name: Any, /) -> Any: ...

    def keys(self) -> Any: ...  # noqa: D102


class Pairs:
    """Pairs of clean and corrupted prompts, with the answers that they are scored on.

    Wherever pairs are expected, a tuple ``(clean, corrupted)`` is accepted too, and prompts alone
    where nothing is compared with (ablation, tracing). `mi_hops.patching.contrast` makes pairs of
    two-hop facts.

    Args:
        clean: one prompt, or several (see `Texts`). Or existing activations of the clean run (an
            `ActivationCache`), of one prompt or one per pair: then the clean prompts are not run.
        corrupted: one prompt for all, or one each.
        answer: the answer to the clean prompt, on which both runs are scored; one for all pairs or
            one each. None if no metric reads it. A text follows its prompt behind a space (" 4" after
            "2 + 2 ="); for an answer without one ("4" after "2+2=") give its token ids.
        wrong: the competing answer, where the metric compares two (``logit_diff``).
        labels: of the pairs; default their numbers.
        source: take activations from these prompts instead (one, or one per pair), or from these
            activations of the run they would be taken from.
        roles: positions that the pairs share, by name: token positions, one per pair.
        skipped: (label, reason) of pairs that could not be made.

    Raises:
        ValueError: unequal numbers of prompts, answers or labels; or not a single prompt.

    Examples:
        >>> import mi_hops
        >>> pairs = mi_hops.Pairs("w1 w2 w3", "w1 w4 w3", answer="w5", wrong="w6")
        >>> len(pairs)
        1
    """

    def __init__(
        self,
        clean: Texts | Activations,
        corrupted: Texts | None = None,
        *,
        answer: Answers | None = None,
        wrong: Answers | None = None,
        labels: Sequence[str] | None = None,
        source: Texts | Activations | None = None,
        roles: Mapping[str, Sequence[int]] | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.activations = None
        if _is_activations(clean):
            if corrupted is None or source is not None:
                raise ValueError(
                    "activations of the clean run come with the corrupted prompts that they are put "
                    "into, and without a source"
                )
            self.activations = clean
        elif _is_activations(source):
            self.activations = source
        self.clean = [] if self.activations is clean else texts_of(clean)  # type: ignore[arg-type]
        worse = [] if corrupted is None or _is_activations(corrupted) else texts_of(corrupted)
        n = len(worse if self.activations is clean else self.clean)
        if not n:
            raise TokenError("no prompts were given; pass a string or a sequence of strings")
        self.corrupted = worse * n if len(worse) == 1 else worse
        if _is_activations(corrupted):
            raise ValueError(
                "activations stand for the clean run: Pairs(cache, corrupted prompts); or put both prompts "
                "and give the run to take from as source="
            )
        if self.corrupted and len(self.corrupted) != n:
            raise ValueError(f"got {n} clean and {len(worse)} corrupted prompts; give one, or {n}")
        self.answer = None if answer is None else one_each("answer", answer, n)
        self.wrong = None if wrong is None else one_each("wrong", wrong, n)
        self.labels: list[Any] = list(range(n)) if labels is None else list(labels)
        if len(self.labels) != n:
            raise ValueError(f"got {len(self.labels)} labels for {n} pairs; give one each")
        third = [] if source is None or source is self.activations else texts_of(source)  # type: ignore[arg-type]
        self.source = third * n if len(third) == 1 else third
        if self.source and len(self.source) != n:
            raise ValueError(f"got {len(third)} source prompts for {n} pairs; give one, or {n}")
        self.roles = {name: list(at) for name, at in (roles or {}).items()}
        self.skipped = list(skipped)

    @classmethod
    def of(cls, given: PairsLike) -> Pairs:
        """Pairs as they are, or of ``(clean, corrupted)`` or of prompts alone."""
        if isinstance(given, Pairs):
            return given
        if isinstance(given, tuple) and len(given) == 2:
            return cls(*given)
        return cls(given)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        n, one = len(self), (self.clean or ["(activations)"])[0]
        more = f" / {_shown(self.corrupted[0])}" if self.corrupted else ""
        said = f" -> {_shown(self.answer[0])}" if self.answer else ""
        return f"Pairs: {n}, {len(self.skipped)} skipped; first: {_shown(one)}{more}{said}"

    def select(self, keep: slice | Sequence[int] | Sequence[bool] | torch.Tensor) -> Pairs:
        """Some of the pairs.

        Args:
            keep: their numbers, a slice of them, or for every pair whether it is kept; lists, arrays and
                tensors alike.

        Raises:
            ValueError: pairs whose activations are given; a mask that is not one value per pair.
            IndexError: a number beyond the last pair.
        """
        if self.activations is not None:
            raise ValueError("pairs whose activations are given cannot be selected; index both")
        where: Any = keep.cpu() if isinstance(keep, torch.Tensor) else keep
        if not isinstance(where, slice):
            where = np.asarray(where)
            if where.dtype == bool and where.shape != (len(self),):
                raise ValueError(
                    f"got a mask of {where.size} for {len(self)} pairs; need one value each"
                )
            where = where if where.size else where.astype(int)
        chosen = np.arange(len(self))[where].tolist()

        def part(items: Sequence[Item] | None) -> list[Item] | None:
            return [items[i] for i in chosen] if items else None

        return Pairs(
            part(self.clean) or [],
            part(self.corrupted),
            answer=part(self.answer),
            wrong=part(self.wrong),
            labels=part(self.labels),
            source=part(self.source),
            roles={name: [at[i] for i in chosen] for name, at in self.roles.items()},
            skipped=self.skipped,
        )

    def targets(
        self, model: HookedModel, prompts: Sequence[Prompt], needed_by: Sequence[str] = ()
    ) -> list[Target]:
        """What each of `prompts` (the clean ones, or the corrupted) is scored on.

        Args:
            needed_by: names of the metrics that read an answer.

        Raises:
            ValueError: no answer where a metric needs one, or one that is neither text nor tokens.
            TokenError: an answer that has no tokens of its own after its prompt.
        """
        if self.answer is None:
            if needed_by:
                raise ValueError(f"metric(s) {list(needed_by)} score an answer; none was given")
            return [Target(prompt.ids[-1:]) for prompt in prompts]  # read by no metric
        wrongs = [None] * len(self) if self.wrong is None else self.wrong
        return [
            a
            if isinstance(a, Target)
            else Target(_ids(model, p, a), () if w is None else _ids(model, p, w))
            for p, a, w in zip(prompts, self.answer, wrongs, strict=True)
        ]

    def require_different(self, clean: Sequence[Prompt], corrupted: Sequence[Prompt]) -> None:
        """Refuse pairs whose two prompts are the same tokens.

        Raises:
            ValueError: naming the first of them.
        """
        same = [i for i in range(len(self)) if clean[i].ids == corrupted[i].ids]
        if same:
            one, two = clean[same[0]], corrupted[same[0]]
            why = (
                ""
                if one.text == two.text
                else (
                    f" though their texts differ ({one.text!r}, {two.text!r}): words that the tokenizer "
                    "does not know became one unknown token"
                )
            )
            raise ValueError(
                f"the clean and the corrupted prompt of {len(same)} of {len(self)} pairs are the "
                f"same tokens, first in pair {self.labels[same[0]]!r}: {list(one.labels)}{why}"
            )


#: Pairs, ``(clean, corrupted)``, or, where nothing is compared with, prompts alone.
PairsLike = Pairs | tuple[Texts | Activations, Texts] | Texts


def texts_of(given: Texts) -> list[Text]:
    """One or several prompts as a list.

    Raises:
        TokenError: something that is neither text nor token ids ``[pos]`` or ``[batch pos]``.
    """
    if isinstance(given, torch.Tensor):
        if given.ndim not in (1, 2) or given.is_floating_point():
            raise TokenError(
                f"token ids are integers [pos] or [batch pos]; got {given.dtype} of shape "
                f"{tuple(given.shape)}"
            )
        return [given] if given.ndim == 1 else list(given)
    single = isinstance(given, str | Prompt) or not isinstance(given, Iterable)
    texts: list[Any] = [given] if single else list(given)  # type: ignore[arg-type]
    for text in texts:
        known = isinstance(text, str | Prompt) or (
            isinstance(text, torch.Tensor) and text.ndim == 1
        )
        if not known:
            raise TokenError(
                "a prompt is text, a Prompt, or a tensor of token ids [pos] (several: [batch pos]); "
                f"got {_shown(text)}"
            )
    return texts


def as_prompts(model: HookedModel, given: Texts) -> list[Prompt]:
    """One or several prompts, tokenised; text gets a BOS where the tokenizer has one.

    Raises:
        TokenError: no prompt at all, something that is none, or one that cannot be encoded.
    """
    prompts = prompts_of(model, given)
    if not prompts:
        raise TokenError("no prompts were given; pass a string or a sequence of strings")
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) > 1 and getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise TokenError(
            f"prompts of {sorted(lengths)} tokens, and this model's attention is not causal, so that padding "
            "would be read; give prompts of one length at a time"
        )
    return prompts


def prompts_of(model: HookedModel, given: Texts) -> list[Prompt]:
    """As `as_prompts`, where there may also be none."""
    return [
        t
        if isinstance(t, Prompt)
        else encode(model, t)
        if isinstance(t, str)
        else _unpadded(model, t)
        for t in texts_of(given)
    ]


def _unpadded(model: HookedModel, ids: Int[torch.Tensor, "pos"]) -> Prompt:
    """A prompt of token ids, none of which is padding.

    Raises:
        TokenError: ids that end in the padding token, or begin with it, behind BOS or not.
    """
    prompt = Prompt.from_tokens(model, ids)
    pad, bos = _special(model)
    begun = prompt.ids[1:] if prompt.ids[0] == bos else prompt.ids
    if pad is not None and begun and pad in (begun[0], begun[-1]):
        raise TokenError(
            f"token ids {_few(prompt.ids)} begin or end with the padding token ({pad}), which would be "
            "read as text; pass the texts, or a list of rows each cut to its own length "
            "(`Prompt.from_tokens(model, ids)` takes ids as they are)"
        )
    return prompt


def _special(model: HookedModel) -> tuple[int | None, int | None]:
    """The ids of padding and BOS."""
    pad, bos = (getattr(model.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos"))
    return pad, bos


def _few(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{ids[0]}, {ids[1]}, ..., {ids[-2]}, {ids[-1]}]"


def one_each(what: str, given: Any, n: int) -> list[Any]:
    """`given` for each of `n` examples: a single one for all of them, or one each.

    Raises:
        ValueError: another number of them.
    """
    if isinstance(given, torch.Tensor) and given.ndim:
        given = [given] if given.ndim == 1 and len(given) != n else list(given)
        if len(given) == 1:
            given = given * n
    single = isinstance(given, str | torch.Tensor) or not isinstance(given, Iterable)
    found = [given] * n if single else list(given)
    if len(found) != n:
        raise ValueError(f"got {len(found)} of {what} for {n} examples; give one, or one each")
    return found


def _is_activations(given: Any) -> TypeGuard[Activations]:
    return isinstance(given, Mapping) or hasattr(given, "cache_dict")


def _ids(model: HookedModel, prompt: Prompt, answer: Any) -> tuple[int, ...]:
    if isinstance(answer, str):
        return answer_ids(model, prompt, answer)
    found = torch.as_tensor(answer) if isinstance(answer, Integral | torch.Tensor) else None
    if found is None or found.ndim > 1 or found.is_floating_point() or not found.numel():
        raise ValueError(
            f"an answer is text, a Target, a token id or a tensor of them; got {_shown(answer)}"
        )
    ids = tuple(found.reshape(-1).tolist())
    size = int(model.cfg.d_vocab)
    if not all(0 <= i < size for i in ids):
        raise ValueError(f"answer tokens {_few(ids)} are not all in the vocabulary, 0..{size - 1}")
    pad, bos = _special(model)
    if len(ids) > 1 and (ids[0] in (pad, bos) or ids[-1] == pad):
        raise ValueError(
            f"answer tokens {_few(ids)} begin with BOS or have padding, which would be scored as part of "
            "the answer; pass the text, or tokens made with prepend_bos=False, each row cut to its own "
            "length (`Target(ids)` takes ids as they are)"
        )
    return ids


def _shown(given: Any) -> str:
    """A prompt or an answer, in a message."""
    if isinstance(given, torch.Tensor):
        return f"tokens {tuple(given.shape)}"
    text = repr(given.text if isinstance(given, Prompt) else given)
    return text if len(text) <= 200 else f"{text[:200]}..."
