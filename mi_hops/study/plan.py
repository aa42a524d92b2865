"""What a study would run, before it does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.reading import Facts
from mi_hops.model import HookedModel, device_of, forward
from mi_hops.reasoning.wordings import CHOOSING
from mi_hops.study.context import StudySettings
from mi_hops.study.folder import same_study
from mi_hops.study.run import begin
from mi_hops.study.step import Asked
from mi_hops.study.steps import STEPS
from mi_hops.study.steps.wordings import FORMS, SHOTS
from mi_hops.sweep.passes import CPU_MEMORY
from mi_hops.text.tokens import TokenError, encode, last_position, pad

#: Questions that lengths are averaged over, and that are timed.
_LOOKED_AT, _TIMED = 64, 8


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan.

    Attributes:
        name: of the step.
        rows: rows of forward passes, at most: before the gap is known, every question may fail.
        minutes: what they take, from a few timed passes; a rough figure.
        done: the folder has this step already, made with the same settings.
    """

    name: str
    rows: int
    minutes: float
    done: bool


@dataclass(frozen=True)
class StudyPlan:
    """What a study would run.

    Attributes:
        model: its name.
        facts: facts that would be asked.
        steps: in their order.
        bytes: memory for weights and one pass, at most, on a CPU.
    """

    model: str
    facts: int
    steps: tuple[PlannedStep, ...]
    bytes: int

    @property
    def minutes(self) -> float:
        """What is left to do takes about so long."""
        return sum(step.minutes for step in self.steps if not step.done)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**asdict(self), "minutes": self.minutes}


def plan_study(
    model: str | Path | HookedModel,
    facts: str | Path | pd.DataFrame | Sequence[TwoHopFact] | None = None,
    *,
    out: str | Path | None = None,
    settings: StudySettings = StudySettings(),  # noqa: B008 (frozen)
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: Any = None,
) -> StudyPlan:
    """What `run_study` would run: steps, rows, memory, minutes. Nothing is written.

    A few questions are run to see how fast the model is.

    Args:
        model, facts, settings, device, dtype, backend: as for `run_study`.
        out: a folder, to tell which steps are done there.

    Raises:
        ValueError: as `run_study`.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.study import plan_study
        >>> plan = plan_study("hops-gpt2", settings=mi_hops.StudySettings(sizes="quick", limit=40))
        >>> plan.facts, plan.steps[0].name
        (40, 'gap')
    """
    loaded, chosen, wanted = begin(model, facts, settings, device, dtype, backend)
    asked = _asked(loaded, chosen, settings)
    seconds = _seconds_per_token(loaded, chosen)
    study = None if out is None else same_study(Path(out), wanted)
    steps = []
    for step in STEPS:
        if step.name not in wanted["steps"]:
            continue
        work = step.work(asked)
        minutes = work.tokens * seconds / 60
        if settings.budget is not None:
            minutes = min(minutes, settings.budget * step.share)
        done = study is not None and study.sound(step.name)
        steps.append(PlannedStep(step.name, work.rows, minutes, done))
    weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
    return StudyPlan(wanted["model"], asked.facts, tuple(steps), weights + CPU_MEMORY)


def _asked(model: HookedModel, facts: Facts, settings: StudySettings) -> Asked:
    cfg = model.cfg
    asked = [f for f in facts if not (facts.relations and f.split == CHOOSING)]
    texts = {
        text
        for fact in asked
        for table in (fact.prompts, fact.first_prompts, fact.second_prompts)
        for text in table.values()
    }
    some = asked[:: max(1, len(asked) // _LOOKED_AT)]
    question = fmean(len(encode(model, fact.prompt())) for fact in some)
    worded = bool(facts.relations)
    shots = settings.shots if settings.shots is not None else max(SHOTS) * worded
    wordings = sum(
        len(relation.nouns if form == "suffix" else relation.statements)
        for relation in facts.relations.values()
        for form in FORMS
    )
    return Asked(
        facts=len(asked),
        prompts=len(texts),
        wordings=wordings,
        question=question,
        length=question * (1 + shots),
        tail=fmean(_tail(model, fact) for fact in some),
        n_layers=cfg.n_layers,
        reading=cfg.n_layers * cfg.d_model * cfg.d_vocab,
        params=sum(p.numel() for p in model.parameters()),
        settings=settings,
    )


def _tail(model: HookedModel, fact: TwoHopFact) -> int:
    """Tokens of the question from its first hop's last one on."""
    prompt = encode(model, fact.prompt())
    try:
        return prompt.last - last_position(prompt, fact.first_hop) + 1
    except TokenError:  # the phrase is not there, or twice; steps leave such facts out
        return len(prompt)


def _seconds_per_token(model: HookedModel, facts: Sequence[TwoHopFact]) -> float:
    """Of a batch of questions, the faster of two passes after a first one."""
    batch = pad([encode(model, fact.prompt()).ids for fact in facts[:_TIMED]])
    tokens = batch.tokens.to(device_of(model))
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        # What comes back waits for the device.
        forward(model, tokens)[0, -1, 0].item()
        took.append(time.perf_counter() - begun)
    return min(took[1:]) / tokens.numel()
