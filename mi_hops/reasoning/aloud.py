"""Reasoning aloud: the same two-hop questions with the hops written out before the answer.

Every question is asked twice after the same worked examples: once the examples answer at once (latent), once
they say the first hop, the second hop, and then the answer. Decoding is greedy; a reply ends at the first line
break or after `max_new_tokens`, and the answer of a reply aloud is what stands behind its last mark ("So:").

Whether the written bridge is *used* is tried by swapping it: the reply is cut behind the first mention of the
bridge, another fact's bridge is put there, and the model goes on. A model that reads its own text answers for
the other bridge.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from mi_hops.cases import usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.tables import find
from mi_hops.facts.wordings import worked_facts
from mi_hops.model import HookedModel, provenance
from mi_hops.result.result import Result
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep.generate import Generation, generate
from mi_hops.text.matching import matches
from mi_hops.text.tokens import encode

#: Outcomes of `reason_aloud`, and what `aloud_table` calls them.
OUTCOMES = {
    "latent": "answered at once",
    "aloud": "answered aloud",
    "bridge_said": "bridge written",
    "answer_said": "answer written, anywhere",
    "follows": "after a swap: the other bridge's answer",
    "keeps": "after a swap: still its own answer",
}


@dataclass(frozen=True)
class Layout:
    """How questions, hops and answers are written.

    Attributes:
        ask: the question, with ``{prompt}``; the reply follows it.
        step: one hop, with ``{prompt}`` and ``{object}``.
        mark: what comes before the answer of a reply aloud.
        end: what ends a worked example and a reply.
    """

    ask: str = "Q: {prompt}\nA:"
    step: str = " {prompt} {object}."
    mark: str = " So:"
    end: str = "\n"

    def __post_init__(self) -> None:
        for name, slots in (("ask", ["{prompt}"]), ("step", ["{prompt}", "{object}"])):
            if any(getattr(self, name).count(slot) != 1 for slot in slots):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it needs {slots}, each once")
        if not self.mark.strip() or not self.end:
            raise ValueError(f"mark is {self.mark!r} and end {self.end!r}; neither may be empty")

    def example(self, fact: TwoHopFact, form: str, *, aloud: bool) -> str:
        """A worked example."""
        return f"{self.question(fact, form)}{self.reply(fact, form, aloud=aloud)}{self.end}"

    def question(self, fact: TwoHopFact, form: str) -> str:
        """The question of a fact."""
        return self.ask.replace("{prompt}", fact.prompt(form))

    def reply(self, fact: TwoHopFact, form: str, *, aloud: bool) -> str:
        """What an example replies."""
        if not aloud:
            return f" {fact.answer}."
        hops = ((fact.first_prompt(form), fact.bridge), (fact.second_prompt(form), fact.answer))
        steps = (self.step.replace("{prompt}", p).replace("{object}", o) for p, o in hops)
        return f"{''.join(steps)}{self.mark} {fact.answer}."

    def steps(self, text: str) -> str:
        """What a reply says before its mark, or all of it."""
        return text.rpartition(self.mark.strip())[0] or text

    def answer(self, text: str) -> str | None:
        """The answer of a reply aloud: what is behind its last mark; None without one."""
        _, found, rest = text.rpartition(self.mark.strip())
        return rest if found else None


def reason_aloud(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    others: Sequence[TwoHopFact],
    *,
    form: str = "suffix",
    shots: int = 4,
    layout: Layout | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """Ask two-hop questions directly, aloud, and aloud with another fact's bridge swapped in.

    Args:
        facts: with two-hop prompts and both single-hop prompts of the form.
        others: facts for the worked examples; pass facts that are not asked.
        form: of all prompts.
        shots: worked examples before each question, the same for both ways.
        layout: how they are written.
        max_new_tokens: of a reply.
        seed: of the choice of examples and of the bridges that are swapped in: each of another fact
            with the same second relation, another bridge and another answer.

    Returns:
        `Result`, on ``example``, 0 or 1: ``latent`` and ``aloud`` (answered correctly), ``bridge_said`` and
        ``answer_said`` (named in the reply aloud before its mark), and, NaN where no bridge was written or
        no other fact fits, ``follows`` (after the swap, answered with the other fact's answer) and ``keeps``
        (still its own). What was asked and replied are the texts ``asked_latent``, ``said_latent``,
        ``asked_aloud``, ``said_aloud``, ``said_swapped``; the bridge put in is ``swapped_in``;
        ``answer_at`` is where the answer begins in the reply aloud (characters; NaN: not before the
        mark). `aloud_table` sums up the shares.

    Raises:
        ValueError: fewer other facts than shots, a layout that does not fit.
        NoUsableFactError: no fact can be asked in the form.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.reasoning import aloud_table, reason_aloud
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")
        >>> found = reason_aloud(model, facts[:2], facts[100:200], shots=1, max_new_tokens=4)
        >>> aloud_table(found)["n"].tolist()[:2]
        [2, 2]
    """
    layout = layout or Layout()
    ask = (form, shots, seed, max_new_tokens)
    prepared, skipped = usable(
        model,
        facts,
        lambda case: (case.fact, _prompts(model, case.fact, others, layout, ask)),
        purpose="reasoning aloud",
        form=form,
    )
    asked, prompts = [fact for fact, _ in prepared], [both for _, both in prepared]

    room: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def reply(texts: Sequence[str]) -> list[Generation]:
        return generate(model, texts, stop=(layout.end,), **room)

    said = {
        "latent": reply([latent for latent, _ in prompts]),
        "aloud": reply([aloud for _, aloud in prompts]),
    }
    values: dict[str, list[float]] = {name: [] for name in (*OUTCOMES, "answer_at")}
    for i, fact in enumerate(asked):
        latent, aloud = said["latent"][i], said["aloud"][i]
        values["latent"].append(_is(latent.text, fact, finished=latent.finished))
        values["aloud"].append(_answered(layout, aloud, fact))
        steps = layout.steps(aloud.text)
        values["bridge_said"].append(_named(steps, fact.bridge, fact.bridge_aliases) is not None)
        named = _named(steps, fact.answer, fact.answer_aliases)
        values["answer_said"].append(named is not None)
        values["answer_at"].append(float("nan") if named is None else named[0])
    swaps = _swaps(asked, [r.text for r in said["aloud"]], layout, seed)
    cut = {i: f"{prompts[i][1]} {swap.text}" for i, swap in enumerate(swaps) if swap is not None}
    after = dict(zip(cut, reply(list(cut.values())) if cut else [], strict=True))
    for i, (fact, swap) in enumerate(zip(asked, swaps, strict=True)):
        follows = keeps = float("nan")
        if swap is not None:
            whole = Generation(after[i].ids, f"{swap.text} {after[i].text}", after[i].finished)
            follows = _answered(layout, whole, swap.other)
            keeps = _answered(layout, whole, fact)
        values["follows"].append(follows)
        values["keeps"].append(keeps)
    numbers = {name: [float(v) for v in found] for name, found in values.items()}
    texts = {f"said_{way}": [reply.text for reply in replies] for way, replies in said.items()}
    texts |= {f"asked_{way}": [both[i] for both in prompts] for i, way in enumerate(said)}
    texts["said_swapped"] = [after[i].text if i in after else "" for i in range(len(asked))]
    texts["swapped_in"] = [swap.other.bridge if swap else "" for swap in swaps]
    return Result.from_arrays(
        {name: ("example", column) for name, column in {**numbers, **texts}.items()},
        coords={"example": [fact.id for fact in asked]},
        units=dict.fromkeys(OUTCOMES, "share") | {"answer_at": "characters"},
        provenance=provenance(
            model,
            method="reasoning aloud",
            form=form,
            shots=shots,
            seed=seed,
            max_new_tokens=max_new_tokens,
            layout=asdict(layout),
        ),
        title="Reasoning aloud",
        skipped=skipped,
        allow_nonfinite=True,  # no bridge written, so none swapped
    )


def aloud_table(found: Result) -> pd.DataFrame:
    """Counts and shares for a result of `reason_aloud`.

    Returns:
        One row per outcome: ``n`` (facts it was tried on), ``k`` (of these), ``share`` and its exact 95%
        interval ``lower``, ``upper``. Swaps are counted among facts whose bridge was written.
    """
    rows = []
    for name, words in OUTCOMES.items():
        values = found.numbers(name).dropna("example").values
        k, n = int(values.sum()), len(values)
        rows.append((words, n, k, k / n if n else float("nan"), *proportion_ci(k, n)))
    return pd.DataFrame(rows, columns=["outcome", "n", "k", "share", "lower", "upper"])


@dataclass(frozen=True)
class _Swap:
    """A reply cut behind the bridge, with another fact's in its place."""

    other: TwoHopFact
    text: str


def _prompts(
    model: HookedModel,
    fact: TwoHopFact,
    others: Sequence[TwoHopFact],
    layout: Layout,
    settings: tuple[str, int, int, int],
) -> tuple[str, str]:
    """The prompt that is answered at once, and the one that is answered aloud."""
    form, shots, seed, room = settings
    if fact.n_hops != 2:
        raise ValueError(f"it has {fact.n_hops} hops, and two are written")
    for ask in (fact.prompt, fact.first_prompt, fact.second_prompt):
        ask(form)
    examples = worked_facts(fact, others, shots=shots, form=form, seed=seed)
    latent, aloud = (
        "".join(layout.example(e, form, aloud=way) for e in examples) + layout.question(fact, form)
        for way in (False, True)
    )
    encode(model, aloud, max_extra=2 * room)
    return latent, aloud


def _swaps(
    facts: Sequence[TwoHopFact], replies: Sequence[str], layout: Layout, seed: int
) -> list[_Swap | None]:
    """For each reply that names its bridge, the beginning of it with another fact's bridge."""
    found: list[_Swap | None] = []
    for fact, text in zip(facts, replies, strict=True):
        span = _named(layout.steps(text), fact.bridge, fact.bridge_aliases)
        fitting = [
            other
            for other in facts
            if other.relation2 == fact.relation2
            and other.bridge != fact.bridge
            and not _same(other, fact)
        ]
        if span is None or not fitting:
            found.append(None)
            continue
        other = random.Random(f"{seed}/{fact.id}").choice(sorted(fitting, key=lambda f: f.id))
        found.append(_Swap(other, f"{text[: span[0]]}{other.bridge}"))
    return found


def _same(one: TwoHopFact, other: TwoHopFact) -> bool:
    names = {n.casefold() for n in (one.answer, *one.answer_aliases)}
    return bool(names & {n.casefold() for n in (other.answer, *other.answer_aliases)})


def _named(text: str, name: str, aliases: Sequence[str]) -> tuple[int, int] | None:
    """Where a text first has one of the names, whole words."""
    spans = [find(n, text) for n in (name, *aliases)]
    return min((span for span in spans if span is not None), default=None)


def _answered(layout: Layout, said: Generation, fact: TwoHopFact) -> bool:
    text = layout.answer(said.text)
    return text is not None and _is(text, fact, finished=said.finished)


def _is(text: str, fact: TwoHopFact, *, finished: bool) -> bool:
    stripped = re.sub(r"^[\s:]+", "", text)
    return matches(stripped, fact.answer, fact.answer_aliases, finished=finished)
