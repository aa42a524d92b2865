"""Run or resume a study."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from mi_hops._version import __version__
from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.loaders import load_facts
from mi_hops.facts.reading import Facts
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.model import HookedModel, load_model, provenance
from mi_hops.reasoning.queries import require_unique
from mi_hops.reasoning.wordings import CHOOSING
from mi_hops.result.progress import progress_bar
from mi_hops.study.context import Run, Skip, StudySettings
from mi_hops.study.folder import locked, prepare
from mi_hops.study.steps import STEPS, steps_of
from mi_hops.study.study import Study, made_with
from mi_hops.study.summary import summarise
from mi_hops.sweep.spread import spread
from mi_hops.text.tokens import TokenError, encode


def run_study(
    model: str | Path | HookedModel,
    facts: str | Path | pd.DataFrame | Sequence[TwoHopFact] | None = None,
    *,
    out: str | Path,
    settings: StudySettings = StudySettings(),  # noqa: B008 (frozen)
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: Any = None,
    force: bool = False,
    progress: bool = True,
    executor: Executor | int | None = None,
) -> Study:
    """Run or resume the study of one model on one set of facts.

    Args:
        model: a name or path for `load_model`, or a loaded model.
        facts: a file, name or frame for `load_facts`, facts (those of `load_facts` keep their
            record of dropped rows), or None for the bundled ones (Hopland).
        out: folder for the results; an unfinished study with the same settings is resumed, a
            finished one reopened.
        settings: seed and limit of the facts, how they are asked, and how many each step takes.
        device, dtype, backend: for `load_model`.
        force: overwrite the files of a study with other settings, and write beside other files.
        progress: show progress bars.
        executor: does the work over facts, as in `spread`; or a number of processes. By default this
            process does it. The numbers are the same.

    Warns:
        UserWarning: an unfinished study is resumed with other versions of its libraries, or on
            another device; `Study.made_with` says which step was made with which.

    Raises:
        FileExistsError: the folder holds other files, or a study with other settings.
        BlockingIOError: another process is running a study there.
        TokenError: a prompt that is empty or longer than the model's context.
        ValueError: a facts file that cannot be read, no facts, two of one id; see also
            `load_model` and `spread`.
        TaskError: tasks of an executor failed; what is finished is kept.

    Examples:
        >>> import mi_hops, tempfile
        >>> facts = mi_hops.Hopland().sample(train=4, held_out=4)
        >>> few = mi_hops.StudySettings(sizes="quick")
        >>> folder = tempfile.mkdtemp()
        >>> study = mi_hops.run_study("hops-gpt2", facts, out=folder, settings=few, progress=False)
        >>> len(study.result("gap").facts) == len(facts)
        True
    """
    loaded, chosen, asked = begin(model, facts, settings, device, dtype, backend)
    with locked(Path(out)):
        prepare(Path(out), asked, force=force)
        study = Study.open(out)
        _warn_of_other_versions(study, asked)
        run, steps = Run(loaded, chosen, study, settings, progress), steps_of(study)
        with (
            nullcontext() if executor is None else spread(loaded, executor),
            progress_bar(total=len(steps), label="study", show=progress) as bar,
        ):
            for step in steps:
                bar.set_postfix_str(step.name)
                if not study.done(step.name):
                    with study.working(step.name, asked, files=step.files, progress=progress):
                        try:
                            step.run(run).save(study.path(step.name), overwrite=True)
                        except (Skip, NoUsableFactError) as reason:
                            study.write(f"{step.name}.skipped", f"{reason}\n")
                bar.update()
        if not study.sound("summary"):
            study.write("summary.json", json.dumps(summarise(study), indent=1) + "\n")
            study.record("summary")
    return Study.open(out)


def begin(
    model: str | Path | HookedModel,
    facts: str | Path | pd.DataFrame | Sequence[TwoHopFact] | None,
    settings: StudySettings,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    backend: Any,
) -> tuple[HookedModel, Facts, dict[str, Any]]:
    """The model, the facts, and what a study's folder says was asked for.

    Raises:
        TokenError: a prompt that is empty or longer than the model's context.
        ValueError: a facts file that cannot be read, no facts, two of one id; see also
            `load_model`.
    """
    chosen, source = load_study_facts(facts, settings)
    loaded = (
        load_model(model, device=device, dtype=dtype, backend=backend)
        if isinstance(model, str | Path)
        else model
    )
    _check_prompts(loaded, chosen)
    asked = {
        **provenance(loaded),
        "shape": {
            "layers": loaded.cfg.n_layers,
            "heads": loaded.cfg.n_heads,
            "width": loaded.cfg.d_model,
            "vocabulary": loaded.cfg.d_vocab,
        },
        "facts": source,
        "facts_digest": _digest(chosen),
        "n_facts": len(chosen),
        **{k: getattr(settings, k) for k in ("seed", "limit", "shots", "score", "budget")},
        "sizes": asdict(settings.size),
        "steps": [step.name for step in STEPS if step.wanted(chosen, settings)],
        "mi_hops": __version__,
    }
    return loaded, chosen, json.loads(json.dumps(asked))


def _warn_of_other_versions(study: Study, now: Mapping[str, Any]) -> None:
    """Say that the steps left to do will be made with something else than those that are done."""
    if all(study.done(step.name) for step in steps_of(study)):
        return
    other = [made for made in study.made_with() if made != made_with(now)]
    if other:
        warnings.warn(
            f"the study in {study.folder} was begun with {' and '.join(other)}, and goes on with "
            f"{made_with(now)}; the steps that are done stay as they are, and the report says which "
            "was made with what. To have all of one kind, run it in another folder",
            stacklevel=3,
        )


def _check_prompts(model: HookedModel, facts: Sequence[TwoHopFact]) -> None:
    """Refuse facts whose prompts the model cannot take, before anything is written.

    Raises:
        TokenError: with the fact's id and what is wrong with its prompt.
    """
    for fact in facts:
        tables = (fact.prompts, fact.first_prompts, fact.second_prompts)
        for text in (*(t for table in tables for t in table.values()), *fact.paraphrases):
            try:
                encode(model, text)
            except TokenError as error:
                raise TokenError(f"fact {fact.id!r}: {error}") from None


def load_study_facts(
    facts: str | Path | pd.DataFrame | Sequence[TwoHopFact] | None, settings: StudySettings
) -> tuple[Facts, dict[str, Any]]:
    """The facts of a study (bundled ones for None), thinned to the limit, and their source.

    Facts for choosing wordings are kept besides.

    Raises:
        ValueError: no usable fact, or two of one id.
    """
    facts = "hopland" if facts is None else facts
    if isinstance(facts, str | Path) or not isinstance(facts, Sequence):
        facts = load_facts(facts)
    given = facts if isinstance(facts, Facts) else Facts(tuple(cast(Any, facts)), "", len(facts))
    source: dict[str, Any] = {"file": None, "report": f"{len(given)} facts given"}
    if given.source:  # the folder it lay in is private
        file = Path(given.source).name
        source = {"file": file, "report": replace(given, source=file).describe()}
    if not given:
        raise ValueError(f"no usable fact in {source['file']}: {source['report']}")
    require_unique("fact ids", (fact.id for fact in given))  # steps look facts up by them
    limit = settings.size.facts if settings.limit is None else settings.limit
    keep = {id(f) for f in given if given.relations and f.split == CHOOSING}
    asked = [f for f in given if id(f) not in keep]
    keep |= {id(f) for f in _thinned(asked, limit, settings.seed)}
    return replace(given, facts=tuple(f for f in given if id(f) in keep)), source


def _thinned(facts: list[TwoHopFact], limit: int, seed: int) -> list[TwoHopFact]:
    """A seeded sample with about each split's share, in the given order."""
    if limit >= len(facts):
        return facts
    rng = random.Random(seed)
    splits: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        splits.setdefault(fact.split, []).append(i)
    keep: list[int] = []
    for members in splits.values():
        keep += rng.sample(members, max(1, round(limit * len(members) / len(facts))))
    return [facts[i] for i in sorted(keep)[:limit]]


def _digest(facts: Sequence[TwoHopFact]) -> str:
    text = "\n".join(json.dumps(f.to_dict(), sort_keys=True, default=str) for f in facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
