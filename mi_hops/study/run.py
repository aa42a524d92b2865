"""Run or resume a study."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops._version import __version__
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel, load_model, provenance
from mi_hops.result.progress import progress_bar
from mi_hops.study.folder import STEPS, Study, made_with, prepare, write_text
from mi_hops.study.steps import Run, Sizes
from mi_hops.study.summary import summarise
from mi_hops.text.tokens import TokenError, encode

if TYPE_CHECKING:
    import torch


def run_study(
    model: str | Path | HookedModel,
    facts: str | Path | Sequence[TwoHopFact] | None = None,
    *,
    out: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: Any = None,
    seed: int = 0,
    limit: int | None = None,
    sizes: Sizes | None = None,
    force: bool = False,
    progress: bool = True,
) -> Study:
    """Run or resume the study of one model on one set of facts.

    Args:
        model: a name or path for `load_model`, or a loaded model.
        facts: a file or name for `load_facts`, facts (those that `load_facts` gives bring their
            account along), or None for the bundled ones (Hopland).
        out: folder for the results; an unfinished study with the same settings is resumed, a
            finished one reopened.
        device, dtype, backend: for `load_model`.
        seed: of every draw.
        limit: use a seeded sample of so many facts (an equal share of each split).
        sizes: how many facts each step takes.
        force: overwrite the files of a study with other settings, and write beside other files.
        progress: show progress bars.

    Warns:
        UserWarning: an unfinished study is resumed with other versions of its libraries, or on
            another device; `Study.made_with` tells which step was made with which.

    Raises:
        FileExistsError: the folder holds other files, or a study with other settings.
        TokenError: a prompt that is empty or longer than the model's context.
        ValueError: a facts file that cannot be read, no facts; see also `load_model`.
    """
    out = Path(out)
    chosen, source = load_study_facts(facts, limit, seed)
    loaded = (
        load_model(model, device=device, dtype=dtype, backend=backend)
        if isinstance(model, str | Path)
        else model
    )
    _check_prompts(loaded, chosen)
    sizes = sizes or Sizes()
    settings = {
        **provenance(loaded),
        "facts": source,
        "facts_digest": _digest(chosen),
        "n_facts": len(chosen),
        "seed": seed,
        "limit": limit,
        "sizes": asdict(sizes),
        "mi_hops": __version__,
    }
    settings = json.loads(json.dumps(settings))
    study = prepare(out, settings, force=force)
    _warn_of_other_versions(study, settings)
    run = Run(loaded, chosen, study, sizes, seed, progress)

    with progress_bar(STEPS, label="study", show=progress) as bar:
        for step in bar:
            bar.set_postfix_str(step)
            if not study.done(step):
                run.step(step)
    if not (out / "summary.json").exists():
        study.summary = summarise(study, run.gap, run.choices)
        write_text(out / "summary.json", json.dumps(study.summary, indent=1) + "\n")
    return Study.open(out)


def _warn_of_other_versions(study: Study, now: Mapping[str, Any]) -> None:
    """Say that the steps left to do will be made with something else than those that are done."""
    if all(study.done(step) for step in STEPS):
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
    facts: str | Path | Sequence[TwoHopFact] | None, limit: int | None, seed: int
) -> tuple[list[TwoHopFact], dict[str, Any]]:
    """The facts of a study (bundled ones for None), thinned to `limit`, and where they came from."""
    from mi_hops.facts.loaders import load_facts
    from mi_hops.facts.reading import Facts

    if facts is None or isinstance(facts, str | Path):
        facts = load_facts("hopland" if facts is None else facts)
    chosen = list(facts)
    source: dict[str, Any] = (
        {"file": Path(facts.source).name, "report": facts.describe()}
        if isinstance(facts, Facts)
        else {"file": None, "report": f"{len(facts)} facts given"}
    )
    if not chosen:
        raise ValueError(f"no usable fact in {source['file']}: {source['report']}")
    if limit is not None and limit < len(chosen):
        chosen = _thinned(chosen, limit, seed)
    return chosen, source


def _thinned(facts: list[TwoHopFact], limit: int, seed: int) -> list[TwoHopFact]:
    """A seeded sample with each split's share, in the given order."""
    rng = random.Random(seed)
    splits: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        splits.setdefault(fact.split, []).append(i)
    keep: list[int] = []
    for members in splits.values():
        keep += rng.sample(members, max(1, round(limit * len(members) / len(facts))))
    return [facts[i] for i in sorted(keep)[:limit]]


def _digest(facts: Sequence[TwoHopFact]) -> str:
    text = "\n".join(json.dumps(f.to_dict(), sort_keys=True) for f in facts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
