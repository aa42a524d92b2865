"""More questions for two steps of the study on SmolLM2-135M: editing beside baselines, and erasure.

``OMP_NUM_THREADS=1 python -m benchmarks.real_more --folder real-study [--cases 150] [--erasure]``

Works on the folder of a finished `benchmarks.real_model`, and writes its sections of that page. It is
resumed where it was stopped: every few edits and every batch of questions scored go to disk. Questions
are edited and scored in blocks of `BLOCK`, each by all methods, so that what is finished at any time
is a table in which all methods have the same questions.

Rules, written before a reported question was edited by a baseline:

- Reported are the questions of the study's reporting half, in a seeded order, and behind them, up to
  `REPORTED` in all, questions of the other half that neither an edit, nor locating, nor injection was
  chosen on (also in a seeded order).
- CREME's layers and strength are those that the study chose, on 15 questions of the other half.
- A baseline's setting is the best of `OPTIONS` on the first `CHOOSE` of these 15, by the study's rule:
  share corrected (first token) + 4 x share of unrelated questions still answered; of equals, the first
  listed. Layers are a quarter and half up the model, and the one that the study located.
- Each question has an edit of its own, made from the prompts of the study's main form with their worked
  examples, which stand in for context templates in all methods but CREME. GRACE has a codebook for each
  question. To save time FT+L and LoRA take 12 steps (default 25) and GRACE 40 (default 100).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Peak, keep, table
from mi_hops import Sizes, StudySettings, load_model
from mi_hops.editing import PAPER, CremeRepair, Edit, Moments, edit_hooks, second_moments
from mi_hops.editing.baselines import (
    Codebook,
    FineTuneRepair,
    GraceRepair,
    LoraRepair,
    MemitRepair,
    RomeRepair,
)
from mi_hops.editing.change import Change
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import fingerprint
from mi_hops.model.gguf import gguf_checkpoint
from mi_hops.reasoning.erasure import erase_bridge
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.merge import merge
from mi_hops.reasoning.queries import Query
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.study import Study
from mi_hops.study.choose import ESTIMATED, IDENTITY
from mi_hops.study.context import Run, choosing
from mi_hops.study.numbers import estimate, mean, number, percent
from mi_hops.study.run import load_study_facts
from mi_hops.sweep import keep as parts
from mi_hops.sweep.limits import Limits
from mi_hops.text.corpus import fact_texts
from mi_hops.text.tokens import encode

MODEL, FACTS, PAGE, NAME = "smollm2-135m", "geo", "real-model", "SmolLM2-135M"

#: Questions edited and scored together, edits that are made before they are written, and questions
#: that a baseline's setting is chosen on.
BLOCK, WRITTEN, CHOOSE = 10, 5, 4
#: Questions to report.
REPORTED = 150

#: Baseline -> settings to choose from.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ROME": [{"layer": i} for i in (7, 15)],
    "MEMIT": [{"layers": [i - 2, i - 1, i]} for i in (7, 15)],
    "FT+L": [{"layers": [23], "lr": lr, "steps": 12} for lr in (0.0125, 0.05, 0.2)],
    "LoRA": [{"layers": [23], "lr": lr, "steps": 12} for lr in (0.003, 0.01)],
    "GRACE": [{"layer": i, "steps": 40} for i in (15, 23)],
}

SETS = (
    *("correction", "paraphrase", "other_order", "generalisation", "specificity"),
    *("first_hop", "second_hop"),
)
#: Sets of which a case is asked one query only, to save time.
ONE_EACH = ("first_hop", "second_hop")

#: Column -> set and statistic.
COLUMNS = {
    "corrected": ("correction", "first_correct_after"),
    "whole answer": ("correction", "exact_match_after"),
    "paraphrase": ("paraphrase", "first_correct_after"),
    "other order": ("other_order", "first_correct_after"),
    "same first hop": ("generalisation", "first_correct_after"),
    "unrelated kept": ("unrelated", "exact_match_ratio"),
    "first hop kept": ("first_hop", "exact_match_ratio"),
    "second hop kept": ("second_hop", "exact_match_ratio"),
}


class Setup:
    """What the study's folder says, with the model and its facts."""

    def __init__(self, folder: Path) -> None:
        self.study = Study.open(folder)
        asked = self.study.settings
        settings = StudySettings(seed=asked["seed"], sizes=Sizes(**asked["sizes"]))
        facts, _ = load_study_facts(FACTS, settings)
        self.model = load_model(MODEL)
        if fingerprint(self.model) != asked["fingerprint"]:
            raise ValueError(f"the study in {folder} is of other weights")
        self.run = Run(self.model, facts, self.study, settings, progress=False)
        self.folder = folder

    @cached_property
    def corpus(self) -> list[TwoHopFact]:
        """A third of the answered questions, as in the study: C is counted on their statements."""
        passed = self.run.gap.passed
        return self.run.draw(passed, len(passed) // 3, "corpus")

    @cached_property
    def halves(self) -> tuple[list[TwoHopFact], list[TwoHopFact]]:
        """Questions to choose on (those of the study) and to report, in a seeded order."""
        choose, report = self._kept_halves
        random.Random(self.run.settings.seed).shuffle(report)
        return self._drawn(choose)[:CHOOSE], report

    @property
    def _kept_halves(self) -> tuple[list[TwoHopFact], list[TwoHopFact]]:
        left_out = {who for who, _ in self.study.choices["left_out"]}
        choose, report = ([f for f in h if f.id not in left_out] for h in self.run.halves)
        return choose, report

    def _drawn(self, choose: list[TwoHopFact]) -> list[TwoHopFact]:
        return self.run.draw(choose, int(self.study.choices["n_choose"]), "edits")

    @cached_property
    def further(self) -> list[TwoHopFact]:
        """Questions of the other half on which nothing was chosen, to make up `REPORTED`."""
        drawn = {f.id for f in self._drawn(self._kept_halves[0])}
        for step in ("locate", "injection_grid"):
            result = self.study.result(step)
            assert result is not None
            drawn |= set(result["example"].values.tolist())
        rest = [f for f in self._kept_halves[0] if f.id not in drawn]
        random.Random(self.run.settings.seed).shuffle(rest)
        return rest[: max(0, REPORTED - len(self.halves[1]))]

    def moments(self, matrix: str, layers: Sequence[int]) -> Moments:
        """C, counted once."""
        path = self.folder / f"moments-{matrix}.safetensors"
        if not path.exists():
            texts = list(dict.fromkeys(fact_texts(self.corpus)))
            texts = texts[::4] if matrix == "W_out" else texts  # enough for its 1,536 dimensions
            second_moments(self.model, texts, layers=layers, matrix=matrix).save(path)
        return Moments.load(path)

    def queries(self, cases: Sequence[TwoHopFact], sets: Sequence[str] = SETS) -> list[Query]:
        """What the cases are asked; nothing that C was counted on."""
        inside = {f.id for f in self.corpus}
        asked = build_sets(
            self.model,
            cases,
            known=Known.of(self.run.gap, without=inside),
            pool=[f for f in self.run.facts if f.id not in inside],
            form=self.run.form,
            per_case=1,
            seed=self.run.settings.seed,
        )
        seen = set[tuple[str, str]]()
        chosen = []
        for query in asked:
            place = query.set, query.case
            if query.set in sets and not (query.set in ONE_EACH and place in seen):
                # Under a name of its own, this set is not asked for divergences as well.
                name = "unrelated" if query.set == "specificity" else query.set
                chosen.append(replace(query, set=name))
            seen.add(place)
        return chosen

    def repair(self, name: str, options: Mapping[str, Any]) -> Any:
        """A method with its settings."""
        form = self.run.form
        if name in (IDENTITY, ESTIMATED):
            how = dict(PAPER)
            if name == ESTIMATED:
                how = {"covariance": self.c_attention, "strength": options["strength"]}
            return CremeRepair(name=name, form=form, layers=options["layers"], **how)
        if name == "GRACE":
            return GraceRepair(form=form, shared=False, batch_size=WRITTEN, **options)
        if name == "LoRA":
            return LoraRepair(gguf_checkpoint(MODEL), form=form, **options)
        made: Callable[..., Any] = {
            "ROME": RomeRepair,
            "MEMIT": MemitRepair,
            "FT+L": FineTuneRepair,
        }[name]
        bare = {"templates": ("{}",), "covariance": self.c_mlp}
        more = {} if name == "FT+L" else bare
        return made(form=form, batch_size=WRITTEN, **more, **options)

    @cached_property
    def c_attention(self) -> Moments:
        """Of the input of W_O, at the layers that the study edits."""
        return self.moments("W_O", self.study.choices["chosen"][ESTIMATED]["layers"])

    @cached_property
    def c_mlp(self) -> Moments:
        """Of the input of W_out, at all layers that ROME and MEMIT may edit."""
        wanted = {i for one in OPTIONS["MEMIT"] for i in one["layers"]}
        return self.moments("W_out", sorted(wanted))


class Made:
    """A repair's states, made few by few, each of them kept, with seconds and memory."""

    def __init__(self, setup: Setup, name: str, options: Mapping[str, Any]) -> None:
        self.setup, self.name = setup, name
        self.repair = setup.repair(name, options)
        self.options = dict(options)
        self.seconds, self.peak = 0.0, 0.0

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> list[Any]:
        """Codebooks or edits."""
        found: list[Any] = []
        # Questions of like lengths share more of what a search needs to run once only.
        order = sorted(range(len(facts)), key=lambda i: len(encode(model, _asked(facts[i]))))
        for start in range(0, len(facts), WRITTEN):
            few = [facts[i] for i in order[start : start + WRITTEN]]

            def make(few: Sequence[TwoHopFact] = few) -> dict[str, Any]:
                with Peak() as peak:
                    begun = time.perf_counter()
                    states = self.repair.fit(model, few)
                    seconds = time.perf_counter() - begun
                print(f"  {self.name}: {seconds / len(few):.2f} s an edit", flush=True)
                return {"states": [_packed(s) for s in states], "s": seconds, "mib": peak.mib}

            made = parts.keep(make, self.name, self.options, [f.id for f in few])
            self.seconds += made["s"]
            self.peak = max(self.peak, made["mib"])
            found += [_unpacked(state, self.setup) for state in made["states"]]
        by_place = dict(zip(order, found, strict=True))
        return [by_place[i] for i in range(len(facts))]

    def hooks(self, model: Any, states: Sequence[Any], rows: Any) -> Any:
        """The repair's."""
        if self.name == "GRACE":
            return self.repair.hooks(model, states, rows)
        return edit_hooks(model, states)


def _asked(fact: TwoHopFact) -> str:
    return fact.prompt(next(iter(fact.prompts)))


def _packed(state: Any) -> dict[str, Any]:
    """An edit or a codebook as plain data and tensors."""
    if isinstance(state, Codebook):
        names = ("layer", "keys", "values", "radii", "answers")
        return {name: getattr(state, name) for name in names}
    names = ("matrix", "layer", "left", "right")
    return {"changes": [{name: getattr(c, name) for name in names} for c in state.changes]}


def _unpacked(given: Mapping[str, Any], setup: Setup) -> Any:
    if "changes" not in given:
        return Codebook(**given)
    changes = tuple(Change(**change) for change in given["changes"])
    return Edit(method="kept", changes=changes, fingerprint=setup.study.settings["fingerprint"])


def choose(setup: Setup) -> dict[str, Any]:
    """Method -> its settings, and what was tried, by the rules above; written once."""
    path = setup.folder / "baselines.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    cases, _ = setup.halves
    queries = setup.queries(cases, ("correction", "specificity"))
    chosen: dict[str, Any] = {
        name: {"options": {k: one[k] for k in ("layers", "strength")}, "tried": []}
        for name, one in setup.study.choices["chosen"].items()
    }
    with parts.keeping(setup.folder / ".choosing.kept", f"choosing {len(cases)} {OPTIONS}"):
        for name, options in OPTIONS.items():
            tried = []
            for each in options:
                made = Made(setup, name, each)
                frame = evaluate(setup.model, made, queries, cases, generate=False).frame
                right = frame.groupby("set")[["first_correct_after", "exact_match_after"]].mean()
                tried.append(
                    {
                        "options": each,
                        "corrected": float(right["first_correct_after"]["correction"]),
                        "kept": float(right["exact_match_after"]["unrelated"]),
                        "seconds": made.seconds / len(cases),
                    }
                )
                print(name, tried[-1], flush=True)
            best = max(tried, key=lambda t: t["corrected"] + 4 * t["kept"])  # the first of equals
            chosen[name] = {"options": best["options"], "tried": tried}
    found = {"n_choose": len(cases), "methods": chosen}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def blocks(folder: Path) -> Iterator[tuple[Evaluation, dict[str, Any]]]:
    """What is finished: the scores of each block, and what its edits took."""
    for path in sorted(folder.glob("block-*.json")):
        yield Evaluation.load(path.with_suffix(".nc")), json.loads(path.read_text())


def measure(setup: Setup, cases: int) -> None:
    """Edit and score block by block."""
    chosen = choose(setup)["methods"]
    half = len(setup.halves[1])
    report = [*setup.halves[1], *setup.further]
    queries = setup.queries(report)
    starts = [*range(0, half, BLOCK), *range(half, len(report), BLOCK)]
    for start, end in zip(starts, [*starts[1:], len(report)], strict=True):
        if start >= cases:
            break
        path = setup.folder / f"block-{start:03d}.json"
        if path.exists():
            continue
        mine = report[start:end]
        ids = {f.id for f in mine}
        with parts.keeping(
            setup.folder / f".block-{start:03d}.kept", f"block {sorted(ids)} {chosen}"
        ):
            repairs = [Made(setup, name, one["options"]) for name, one in chosen.items()]
            asked = [q for q in queries if q.case in ids]
            found = evaluate(setup.model, repairs, asked, mine, generate=False)
        found.save(path.with_suffix(".nc"), overwrite=True)
        took = {r.name: {"seconds": r.seconds, "mib": r.peak, "n": len(mine)} for r in repairs}
        path.write_text(json.dumps(took, indent=1) + "\n")
        print(f"{end} of {len(report)} questions", flush=True)


def cost(setup: Setup) -> None:
    """Processor seconds and memory of each method's edits of two questions that are not reported."""
    few = setup.halves[0][:2]
    found: dict[str, Any] = {}
    for name, one in choose(setup)["methods"].items():
        repair = setup.repair(name, one["options"])
        with Peak() as peak:
            begun = time.process_time()
            repair.fit(setup.model, few)
            seconds = time.process_time() - begun
        found[name] = {"seconds": seconds / len(few), "mib": peak.mib}
        print(name, found[name], flush=True)
    (setup.folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n")


def numbers(folder: Path) -> dict[str, Any]:
    """The table: method -> estimates by column, seconds and memory of an edit."""
    evaluations, took = zip(*blocks(folder), strict=True)
    scores = merge(evaluations).table()
    chosen = json.loads((folder / "baselines.json").read_text())
    costs = json.loads((folder / "cost.json").read_text())
    rows: dict[str, Any] = {}
    for name in chosen["methods"]:
        found = {column: _estimate(scores, name, *where) for column, where in COLUMNS.items()}
        rows[name] = found | costs[name]
    before = {
        column: _estimate(scores, IDENTITY, where, "first_correct_before")
        for column, (where, _) in COLUMNS.items()
    }
    n = sum(t[IDENTITY]["n"] for t in took)
    return {"n": n, "rows": rows, "before": before, **chosen}


def _estimate(scores: Any, repair: str, name: str, statistic: str) -> dict[str, Any]:
    row = scores.loc[(repair, name, statistic)]
    return estimate(row["value"], row["lower"], row["upper"], row["n_cases"])


def section(found: Mapping[str, Any]) -> Iterator[str]:
    """CREME beside the baselines."""
    yield (
        f"The same {found['n']} questions for every method (the reporting half, plus questions of "
        "the other half that nothing was chosen on), one edit each, made "
        "from the prompts with their worked examples; shares of first tokens unless stated otherwise, in "
        "percent, means over cases with bootstrap intervals. *Kept* is accuracy (whole answers) after / accuracy before; "
        "the hops are asked in the form that no edit was given. Processor seconds (one thread of a busy "
        "machine) and additional memory are for two edits made together; ROME's and MEMIT's include "
        "inverting C, LoRA's loading the checkpoint. Script: `benchmarks.real_more`."
    )
    rows = [
        [
            name,
            *(percent(one[column], n=False).replace("%", "") for column in COLUMNS),
            f"{one['seconds']:.1f}",
            f"{one['mib']:,.0f}",
        ]
        for name, one in found["rows"].items()
    ]
    before = [
        percent(e, n=False).replace("%", "") if "kept" not in column else "–"
        for column, e in found["before"].items()
    ]
    rows.append(["unrepaired", before[0], "–", *before[2:], "–", "–"])
    yield table(["edit", *COLUMNS, "processor s an edit", "peak MiB"], rows)
    yield verdict(found)
    tried = [
        [name, _settings(t["options"]), f"{t['corrected']:.0%}", f"{t['kept']:.0%}"]
        + ["chosen" * (t["options"] == one["options"])]
        for name, one in found["methods"].items()
        for t in one["tried"]
    ]
    yield (
        f"Settings of the baselines were chosen on {found['n_choose']} questions of the choosing half (CREME's on 15), "
        "by share corrected + 4 x share of unrelated questions kept; of equals, the first:"
    )
    yield table(["edit", "setting", "corrected", "unrelated kept", ""], tried)


def _settings(options: Mapping[str, Any]) -> str:
    where = options.get("layers", [options.get("layer")])
    text = f"layer {where[0]}" if len(where) == 1 else f"layers {where[0]} to {where[-1]}"
    return text + (f", lr {options['lr']:g}" if "lr" in options else "")


def verdict(found: Mapping[str, Any]) -> str:
    """In each column the best method; where that is a baseline, it is said."""
    rows = found["rows"]
    ours = (IDENTITY, ESTIMATED)
    words = []
    for column in COLUMNS:
        value = {name: one[column]["value"] or 0.0 for name, one in rows.items()}
        best = max(value, key=lambda name: value[name])
        mine = max(ours, key=lambda name: value[name])
        if best not in ours and value[best] > value[mine]:
            words.append(f"{column}: {best} ({value[best]:.1%} against {value[mine]:.1%})")
    if not words:
        return "No baseline does better than the better of the two CREME edits in any column."
    return "Where a baseline does better than both CREME edits: " + "; ".join(words) + "."


def ours(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of CREME."""
    return [found["rows"][name] for name in (IDENTITY, ESTIMATED)]


def claim(found: Mapping[str, Any]) -> str:
    """For the table of claims: every method's share corrected, and of unrelated questions kept."""
    rows = found["rows"]
    said = [
        f"{name} {one['corrected']['value']:.0%} / {one['unrelated kept']['value']:.0%}"
        for name, one in rows.items()
    ]
    return f"corrected / unrelated kept of {found['n']} questions by all methods: " + ", ".join(
        said
    )


# -- erasure --------------------------------------------------------------------------------------


def erase(setup: Setup) -> dict[str, Any]:
    """Erasure in the cells that the study chose, on all answered questions that did not choose them."""
    result = setup.study.result("erasure")
    assert result is not None
    ids = result["example"].values
    chose = set(ids[choosing(ids)].tolist())
    facts = [f for f in setup.run.answered if f.id not in chose]
    cells = setup.study.summary["erasure"]["cells"]
    found: dict[str, Any] = {}
    with parts.keeping(setup.folder / ".more-erasure.kept", "erasure"):
        for variant in dict.fromkeys(cell["variant"] for cell in cells):
            found[variant] = erase_bridge(
                setup.model,
                facts,
                form=setup.run.form,
                variants=(variant,),
                layers=sorted({c["layer"] for c in cells if c["variant"] == variant}),
                seed=setup.run.settings.seed,
                limits=Limits(batch_size=8, progress=True),
            )
    told = []
    for cell in cells:
        where = {key: cell[key] for key in ("variant", "position", "layer")}
        erased = found[cell["variant"]]
        here = (erased["bridge"] - erased["control"]).sel(where).values
        told.append({**where, "bridge_minus_control": mean(here)})
    return {"cells": told, "clean": mean(erased["clean"].values)}


def erasure_section(found: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    """The same cells on more questions."""
    yield (
        "The same cells on every answered question that did not choose them (three controls each; "
        f"P(answer) without erasure: {number(found['clean'], signed=False)}):"
    )
    rows = [
        [c["variant"], places[c["position"]], c["layer"], number(c["bridge_minus_control"])]
        for c in found["cells"]
    ]
    yield table(["form", "position", "layer (chosen)", "change of P(answer), less control's"], rows)


def main() -> None:
    """Measure (or go on), keep the numbers, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("real-study"))
    parser.add_argument("--cases", type=int, default=10**6, help="questions, at most")
    parser.add_argument("--erasure", action="store_true", help="erasure alone")
    parser.add_argument("--cost", action="store_true", help="what an edit takes, alone")
    parser.add_argument("--page-only", action="store_true", help="of the blocks that are finished")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts.WRITE_EVERY = 0.0
    if given.cost:
        return cost(Setup(given.folder))
    if given.erasure:
        keep(PAGE, "erasure", erase(Setup(given.folder)))
    else:
        if not given.page_only:
            measure(Setup(given.folder), given.cases)
        keep(PAGE, "editing", numbers(given.folder))
    from benchmarks import real_model

    print(real_model.write_page())


if __name__ == "__main__":
    main()
