"""Scores of an answer: from logits to one value per row.

A metric works in two steps. It *plans* which answer tokens to append to the prompt and which
positions to read, and then maps the logits there, ``[row, scored, vocab]``, to ``[row]``. Whoever
runs the model (`mi_hops.sweep.scoring`, a sweep) needs to know nothing else about it. All built-in
metrics are computed in float32, or in the logits' dtype where that is wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel
from mi_hops.model.numeric import kl_divergence, widen
from mi_hops.text.tokens import Prompt, answer_ids


@dataclass(frozen=True)
class Target:
    """What a row is scored on: tokens that follow the prompt.

    Attributes:
        answer: token ids of the answer.
        wrong: token ids of a competing answer, for metrics that compare two.

    Raises:
        ValueError: an answer without tokens, or a negative id.
    """

    answer: tuple[int, ...]
    wrong: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", tuple(int(i) for i in self.answer))
        object.__setattr__(self, "wrong", tuple(int(i) for i in self.wrong))
        if not self.answer:
            raise ValueError("a target needs at least one answer token, got none")
        if min(*self.answer, *self.wrong, 0) < 0:
            raise ValueError(f"token ids are 0 or more; got {self.answer} and {self.wrong}")


def target_of(model: HookedModel, prompt: Prompt, answer: str, wrong: str | None = None) -> Target:
    """The target of an answer given as text (see `tokens.answer_ids`).

    Raises:
        TokenError: an answer that is empty or merges with the prompt's last token.
    """
    other = () if wrong is None else answer_ids(model, prompt, wrong)
    return Target(answer_ids(model, prompt, answer), other)


@dataclass(frozen=True)
class Plan:
    """What has to be run and read for one target.

    Attributes:
        extra: tokens to append to the prompt (teacher forcing).
        scored: positions to read, relative to the prompt's last token; 0 is the distribution of
            the token after the prompt, ``len(extra)`` that after everything.
    """

    extra: tuple[int, ...] = ()
    scored: tuple[int, ...] = (0,)


@runtime_checkable
class Metric(Protocol):
    """A score of an answer."""

    @property
    def name(self) -> str:
        """Label in tables and results."""
        ...

    @property
    def unit(self) -> str:
        """Unit of the score: ``"probability"``, ``"nats"``, ``"logits"``, ``"rank"``, ..."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score means a better answer."""
        ...

    def plan(self, target: Target) -> Plan:
        """What to run and read for `target`."""
        ...

    def score(
        self, logits: Float[Tensor, "row scored vocab"], target: Target
    ) -> Float[Tensor, "row"]:
        """Scores of rows that share one target; ``scored`` is in the order of the plan."""
        ...


#: ``[row, scored, vocab]``, as `Metric.score` takes them.
Logits = Float[Tensor, "row scored vocab"]


def _wide(logits: Tensor) -> Tensor:
    """The logits in float32 or wider.

    Raises:
        ValueError: NaN among them (a rank or an arg max would hide it).
    """
    if logits.isnan().any():
        raise ValueError(
            "the logits hold NaN, so nothing can be scored; is the intervention finite, and does "
            "the model overflow in this dtype?"
        )
    return widen(logits)


# -- metrics of the next token --------------------------------------------------------------------


class _AtPrompt:
    """The plan of metrics that look at the next token only."""

    def plan(self, target: Target) -> Plan:
        """The prompt alone, read at its last token."""
        return Plan()


@dataclass(frozen=True)
class NextToken(_AtPrompt):
    """A metric of the distribution right after the prompt.

    Attributes:
        compute: maps float32+ logits ``[row, vocab]`` and the target to ``[row]``.
    """

    name: str
    unit: str
    higher_is_better: bool
    compute: Callable[[Tensor, Target], Tensor]

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """One score per row."""
        return self.compute(_wide(logits[:, 0]), target)


def _first_prob(logits: Tensor, target: Target) -> Tensor:
    return logits.softmax(-1)[:, target.answer[0]]


def _first_logprob(logits: Tensor, target: Target) -> Tensor:
    return logits.log_softmax(-1)[:, target.answer[0]]


def _logit_diff(logits: Tensor, target: Target) -> Tensor:
    if not target.wrong:
        raise ValueError(
            "logit_diff compares with a wrong answer and the target has none; give `wrong`"
        )
    right, wrong = target.answer[0], target.wrong[0]
    if right == wrong:
        raise ValueError(
            f"logit_diff compares first tokens, and both answers start with token {right}; choose "
            "a wrong answer that differs from the start, or use answer_logprob"
        )
    return logits[:, right] - logits[:, wrong]


def _rank(logits: Tensor, target: Target) -> Tensor:
    first = target.answer[0]
    above = (logits > logits[:, first, None]).sum(-1)
    return (1 + above).to(logits.dtype)


def _first_correct(logits: Tensor, target: Target) -> Tensor:
    return (logits.argmax(-1) == target.answer[0]).to(logits.dtype)


def _mean_token_prob(logits: Tensor, target: Target) -> Tensor:
    return logits.softmax(-1)[:, list(target.answer)].mean(-1)


@dataclass(frozen=True, eq=False)
class KL(_AtPrompt):
    """Divergence of the next-token distribution from a baseline's, KL(baseline || row), in nats.

    Args:
        baseline: logits ``[vocab]`` of the run that rows are compared with.

    Raises:
        ValueError: a baseline that is not one finite vector.
    """

    baseline: Float[Tensor, "vocab"]
    name: str = "kl"
    unit: str = "nats"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if self.baseline.ndim != 1 or not self.baseline.isfinite().all():
            raise ValueError(
                "KL needs the baseline's logits as one finite vector [vocab], got shape "
                f"{tuple(self.baseline.shape)}"
            )

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """One divergence per row, at least 0 but for rounding."""
        return self._divergence(logits[:, 0])

    def measures_from(self, logits: Float[Tensor, "vocab"]) -> bool:
        """Whether these logits, in the dtype they were computed in, are the baseline's but for rounding.

        The divergence is at its minimum there, so it has no slope to estimate anything from.
        """
        coarse = max(torch.finfo(x.dtype).eps for x in (self.baseline, logits))
        # That of the sum, and what a distribution diverges by whose logits are rounded.
        rounding = min(coarse, torch.finfo(torch.float32).eps) + coarse**2
        return float(self._divergence(logits[None])[0]) <= 64 * rounding

    def _divergence(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
        rows = _wide(logits)
        if rows.shape[-1] != len(self.baseline):
            raise ValueError(
                f"the baseline has {len(self.baseline)} logits, the rows have {rows.shape[-1]}"
            )
        base = _wide(self.baseline).to(rows.device).log_softmax(-1)
        return kl_divergence(base, rows.log_softmax(-1))


# -- metrics of the whole answer ------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerLogprob:
    """Log-probability of the whole answer: the sum over its tokens, each given those before it."""

    name: str = "answer_logprob"
    unit: str = "nats"
    higher_is_better: bool = True

    def plan(self, target: Target) -> Plan:
        """All answer tokens but the last; one position for each of the answer's."""
        return Plan(target.answer[:-1], tuple(range(len(target.answer))))

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """Sum over the answer's tokens."""
        steps = torch.arange(len(target.answer), device=logits.device)
        ids = torch.tensor(target.answer, device=logits.device)
        return _wide(logits).log_softmax(-1)[:, steps, ids].sum(-1)


@dataclass(frozen=True)
class Greedy:
    """1 where greedy decoding gives the whole answer, token by token, else 0.

    Args:
        ends: tokens of which one must come next for the answer to be over (`generate.end_ids`
            lists a tokenizer's); none: the end is not looked at.
    """

    ends: tuple[int, ...] = ()
    name: str = "greedy"
    unit: str = "share"
    higher_is_better: bool = True

    def plan(self, target: Target) -> Plan:
        """The answer but its last token, or all of it where the end counts as well."""
        extra = target.answer if self.ends else target.answer[:-1]
        return Plan(extra, tuple(range(len(extra) + 1)))

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """1.0 or 0.0 per row."""
        wide = _wide(logits)
        best = wide.argmax(-1)
        answer = torch.tensor(target.answer, device=best.device)
        right = (best[:, : len(answer)] == answer).all(-1)
        if self.ends:
            right &= torch.isin(best[:, -1], torch.tensor(self.ends, device=best.device))
        return right.to(wide.dtype)


# -- a user's own ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Custom(_AtPrompt):
    """A function of the next-token logits, ``[row, vocab] -> [row]``, as a metric.

    The logits it gets are in float32 or wider whatever the model's dtype.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    unit: str = ""
    higher_is_better: bool = True

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """What the function returns, checked.

        Raises:
            ValueError: NaN logits, no tensor of shape ``[row]``, or values that are not finite.
        """
        rows = _wide(logits[:, 0])
        try:
            found = self.function(rows)
        except IndexError as error:
            raise ValueError(
                f"metric {self.name!r} got logits [row, vocab] = {tuple(rows.shape)} and failed: "
                f"{error}; if it reads logits [batch, pos, vocab], pass FullLogits({self.name})"
            ) from error
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != (len(rows),):
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(
                f"metric {self.name!r} got logits [row, vocab] = {tuple(rows.shape)} and must "
                f"return a tensor of shape ({len(rows)},), one value per row; it returned {got}; "
                f"if it reads logits [batch, pos, vocab], pass FullLogits({self.name})"
            )
        require_finite(self.name, found)
        return found


@dataclass(frozen=True)
class FullLogits:
    """A function of a prompt's logits ``[1, pos, vocab] -> value``, as a metric.

    It sees one prompt under one intervention at a time, at the prompt's own positions, in float32
    or wider. So what TransformerLens's patching calls a metric fits, such as ``lambda logits:
    logits[0, -1, right] - logits[0, -1, wrong]``. All positions are unembedded: a function of the
    last one's logits ``[row, vocab] -> [row]``, passed as it is, takes less memory.

    Args:
        length: tokens of the prompt; whoever runs the metric gives it.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> right, wrong = 20, 21
        >>> metric = mi_hops.FullLogits(lambda logits: logits[0, -1, right] - logits[0, -1, wrong])
        >>> pair = ("The spouse of Joren Ashby is", "The friend of Joren Ashby is")
        >>> mi_hops.patch(model, pair, metric=metric)["change"].dims
        ('example', 'layer', 'position')
    """

    function: Callable[[Tensor], Tensor]
    unit: str = ""
    higher_is_better: bool = True
    length: int | None = None

    @property
    def name(self) -> str:
        """The function's own name."""
        return _name_of(self.function)

    def of(self, prompt: Prompt) -> FullLogits:
        """The metric on a prompt."""
        return replace(self, length=len(prompt))

    def plan(self, target: Target) -> Plan:
        """The prompt alone, read at every token."""
        if self.length is None:
            raise ValueError(
                f"metric {self.name!r} of full logits needs each prompt's length, which only patching "
                "(patch, ablate, attribute, trace, ...) gives it; pass a function of [row, vocab]"
            )
        return Plan(scored=tuple(range(1 - self.length, 1)))

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """What the function returns for each row, checked.

        Raises:
            ValueError: NaN logits, more than one value, or one that is not finite.
        """
        return torch.stack([self._value(row[None]) for row in _wide(logits)])

    def _value(self, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
        try:
            found = self.function(logits)
        except IndexError as error:
            raise ValueError(
                f"metric {self.name!r} got logits [1, pos, vocab] = {tuple(logits.shape)} and "
                f"failed: {error}; it sees one prompt at a time"
            ) from error
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(
                f"metric {self.name!r} got logits [1, pos, vocab] = {tuple(logits.shape)} and must "
                f"return one value; it returned {got}"
            )
        require_finite(self.name, found.reshape(1))
        return found.reshape(())


# -- the table ------------------------------------------------------------------------------------

_BUILT_IN: tuple[Metric, ...] = (
    # Probability of the answer's first token.
    NextToken("first_prob", "probability", True, _first_prob),
    NextToken("first_logprob", "nats", True, _first_logprob),
    AnswerLogprob(),
    # Logit of the answer's first token less that of the wrong answer's.
    NextToken("logit_diff", "logits", True, _logit_diff),
    # 1 where the answer's first token is the model's first choice, else 0.
    NextToken("first_correct", "share", True, _first_correct),
    # 1 = top; ties count in the answer's favour.
    NextToken("rank", "rank", False, _rank),
    # The score of the CREME paper's code (arXiv 2402.14328): the mean over all answer tokens of
    # their probabilities at one and the same position. No sequence probability; at most 1/tokens.
    NextToken("mean_token_prob", "probability", True, _mean_token_prob),
    Greedy(),
)

#: Metrics by name. `KL`, `Greedy` with ends and `Normalised` are made with their arguments.
METRICS: dict[str, Metric] = {metric.name: metric for metric in _BUILT_IN}

#: What `get_metric` takes: a name, a metric, or a function ``[row, vocab] -> [row]``.
MetricLike = str | Metric | Callable[..., "Tensor"]


def get_metric(metric: MetricLike) -> Metric:
    """A metric from a name, a `Metric`, or a user's function of the last position's logits.

    Raises:
        ValueError: an unknown name, or something that is not a metric.
    """
    if isinstance(metric, str):
        if metric in METRICS:
            return METRICS[metric]
        if metric == "kl":
            raise ValueError(
                "'kl' needs a baseline: pass mi_hops.sweep.metrics.KL(baseline_logits)"
            )
        raise ValueError(f"unknown metric {metric!r}; expected one of {list(METRICS)}")
    if isinstance(metric, type) or not (isinstance(metric, Metric) or callable(metric)):
        raise ValueError(
            f"{metric!r} is not a metric; expected a name from {list(METRICS)}, an object with plan "
            "and score, or a function from logits [row, vocab] to [row]"
        )
    return metric if isinstance(metric, Metric) else Custom(metric, _name_of(metric))


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "custom")
    return "custom" if name == "<lambda>" else str(name)


def get_metrics(metrics: MetricLike | Sequence[MetricLike]) -> list[Metric]:
    """One or several metrics, each name once.

    Raises:
        ValueError: none at all, an unknown one, or two of one name.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        metrics = [metrics]
    found = [get_metric(m) for m in metrics]
    names = [m.name for m in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected at least one metric, each under its own name, got {names}")
    return found


def require_finite(name: str, scores: Float[Tensor, "row"]) -> None:
    """Refuse scores that are not finite.

    Raises:
        ValueError: naming the metric and the rows.
    """
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"metric {name!r} is not finite in {len(bad)} of {len(scores)} rows (first: "
            f"{bad[:5]}); look at the logits of these rows"
        )
