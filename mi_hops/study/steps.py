"""The steps of a study, in order; each gives one labelled result."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import NoUsableFactError, count_reasons, describe_reasons
from mi_hops.model import HookedModel, provenance
from mi_hops.result.result import Result
from mi_hops.study.choose import (
    CHOICE_RULE,
    ESTIMATED,
    IDENTITY,
    STRENGTHS,
    choose_edit,
    layer_spans,
)
from mi_hops.study.folder import Study, write_text
from mi_hops.sweep.limits import Limits

if TYPE_CHECKING:
    from mi_hops.editing import CremeRepair, Moments
    from mi_hops.reasoning.evaluation import Evaluation
    from mi_hops.reasoning.gap import Gap


@dataclass(frozen=True)
class Sizes:
    """How many facts each step takes (seeded draws), and its grids. They decide cost, not method.

    Attributes:
        lens, erasure, locate, injection: facts (of each group) at the most.
        choose, edits: failures edited on the choosing and on the reporting half at the most.
        controls: draws of the erasure's control.
        strengths: of the injection grid.
        per_case: queries of a case in each drawn set.
    """

    lens: int = 300
    erasure: int = 400
    locate: int = 100
    injection: int = 200
    choose: int = 80
    edits: int = 300
    controls: int = 3
    strengths: tuple[float, ...] = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 15)
    per_case: int = 3


class Skip(Exception):  # noqa: N818
    """A step that has nothing to work on; the message says why."""


class Run:
    """One pass through the steps; what earlier steps found is read back from their files."""

    def __init__(
        self,
        model: HookedModel,
        facts: list[TwoHopFact],
        study: Study,
        sizes: Sizes,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.facts, self.study, self.sizes = model, facts, study, sizes
        self.seed, self.progress = seed, progress
        common = [f for f in facts[0].prompts if all(f in fact.prompts for fact in facts)]
        #: Forms that every fact has; where there is none, each fact is asked in its own first.
        self.forms: list[str | None] = list(common) if common else [None]

    @property
    def form(self) -> str | None:
        """The main form: of lens, erasure, locating, injection and edits."""
        return self.forms[0]

    def step(self, name: str) -> None:
        """Run a step and write its file, or the reason why it has none."""
        steps: Mapping[str, Callable[[], Result | Evaluation]] = {
            "gap": self._gap_result,
            "failures": self._failures,
            "lens": self._lens,
            "erasure": self._erasure,
            "locate": self._locate,
            "injection": self._injection,
            "editing": self._editing,
        }
        try:
            steps[name]().save(self.study.path(name), overwrite=True)
        except (Skip, NoUsableFactError) as reason:
            write_text(self.study.folder / f"{name}.skipped", f"{reason}\n")

    # gap

    def _gap_result(self) -> Result:
        import numpy as np

        from mi_hops.reasoning.gap import HOPS, find_gap

        skipped: list[tuple[str, str]] = []
        frames = []
        for form in self.forms:
            found = find_gap(self.model, self.facts, form=form)
            frames.append(found.frame.set_index("id"))
            skipped += [s for s in found.skipped if s not in skipped]
        numbers = [*HOPS, "first_token", "says_bridge"]
        values: dict[str, Any] = {
            name: (("example", "form"), np.stack([f[name].to_numpy(float) for f in frames], 1))
            for name in numbers
        }
        said = np.stack([f["said"].to_numpy(str) for f in frames], 1)
        return Result.from_arrays(
            {**values, "said": (("example", "form"), said)},
            coords={
                "example": frames[0].index.tolist(),
                "form": [form or "as given" for form in self.forms],
                "split": ("example", frames[0]["split"].tolist()),
            },
            units=dict.fromkeys(numbers, "share"),
            provenance=provenance(self.model, what="gap", decoding="greedy"),
            title="Questions answered rightly",
            main="two_hop",
            skipped=skipped,
        )

    @cached_property
    def gap(self) -> Gap:
        """The gap in the main form, from its file."""
        import pandas as pd

        from mi_hops.reasoning.gap import HOPS, Gap

        result = self.study.result("gap")
        assert result is not None
        data = result.data.isel(form=0)
        ids = data["example"].values.tolist()
        frame = pd.DataFrame({"id": ids, "split": data["split"].values})
        for name in (*HOPS, "first_token", "says_bridge"):
            frame[name] = data[name].values.astype(bool)
        frame["said"] = data["said"].values
        by_id = {f.id: f for f in self.facts}
        return Gap(tuple(by_id[i] for i in ids), frame, tuple(result.skipped))

    def _held_out(self, facts: Sequence[TwoHopFact]) -> list[TwoHopFact]:
        """Facts not marked as trained; all of them where no split says so."""
        kept = [f for f in facts if f.split != "train"]
        return kept or list(facts)

    @cached_property
    def passed(self) -> list[TwoHopFact]:
        """Questions answered rightly, both hops known, held out of training where that is told."""
        return self._held_out(self.gap.passed)

    @cached_property
    def failed(self) -> list[TwoHopFact]:
        """Questions of the gap, held out of training where that is told."""
        found = self.gap.failed
        if not found:
            raise Skip(
                "no question failed although both hops are known"
                if self.gap.passed
                else self._none_known
            )
        return self._held_out(found)

    @property
    def _none_known(self) -> str:
        """Why there is no fact with both hops known."""
        if self.gap.facts:
            return "the model knows both hops of none of these facts"
        reasons = describe_reasons(count_reasons(self.gap.skipped))
        return f"none of these facts can be asked about both hops ({reasons})"

    @cached_property
    def halves(self) -> tuple[list[TwoHopFact], list[TwoHopFact]]:
        """The failures, split for choosing and for reporting."""
        from mi_hops.injection.select import split_halves

        if len(self.failed) < 4:
            raise Skip(
                f"only {len(self.failed)} question(s) failed: too few to choose on one half and "
                "report on the other"
            )
        by_id = {f.id: f for f in self.failed}
        choose, report = split_halves(list(by_id), seed=self.seed)
        return [by_id[i] for i in choose], [by_id[i] for i in report]

    def _draw(self, facts: Sequence[TwoHopFact], n: int, salt: str) -> list[TwoHopFact]:
        rng = random.Random(f"{self.seed}/{salt}")
        chosen = rng.sample(range(len(facts)), min(n, len(facts)))
        return [facts[i] for i in sorted(chosen)]

    # failures, lens, erasure

    def _failures(self) -> Result:
        from mi_hops.reasoning.failures import failure_types

        _ = self.failed
        frame = failure_types(self.model, self.gap, form=self.form)
        skipped = frame.attrs["skipped"]
        if frame.empty:
            raise NoUsableFactError("telling failure types", skipped)
        return Result.from_arrays(
            {name: ("example", frame[name].to_numpy()) for name in frame.columns if name != "id"},
            coords={"example": frame["id"].tolist()},
            units={"bridge_peak": "probability", "bridge_layer": "layer", "said_layer": "layer"},
            provenance=provenance(self.model, what="failure types", form=self.form),
            title="Failure types",
            main="type",
            skipped=skipped,
        )

    def _lens(self) -> Result:
        from mi_hops.lens import fact_trajectories

        groups = {"passed": self._draw(self.passed, self.sizes.lens, "lens passed")}
        if self.gap.failed:
            groups["failed"] = self._draw(self.failed, self.sizes.lens, "lens failed")
        facts = [f for group in groups.values() for f in group]
        if not facts:
            raise Skip(self._none_known)
        result = fact_trajectories(self.model, facts, form=self.form)
        label = {f.id: name for name, group in groups.items() for f in group}
        names = [label[i] for i in result["example"].values.tolist()]
        return Result(
            result.data.assign_coords(group=("example", names)),
            provenance=result.provenance,
            title="Bridge and answer in the logit lens",
            main="prob",
            skipped=result.skipped,
        )

    def _erasure(self) -> Result:
        from mi_hops.reasoning.erasure import erase_bridge

        facts = self._draw(self.passed, self.sizes.erasure, "erasure")
        if not facts:
            raise Skip(
                "no two-hop question is answered rightly with both hops known"
                if self.gap.failed
                else self._none_known
            )
        return erase_bridge(
            self.model, facts, form=self.form, controls=self.sizes.controls, seed=self.seed,
            limits=Limits(batch_size=8, progress=self.progress),
        )  # fmt: skip

    # locate, inject

    def _locate(self) -> Result:
        from mi_hops.reasoning.locate import locate

        facts = self._draw(self.halves[0], self.sizes.locate, "locate")
        return locate(
            self.model, facts, form=self.form, limits=Limits(batch_size=8, progress=self.progress)
        )

    def _injection(self) -> Result:
        from mi_hops.injection.grid import injection_grid

        each = self.sizes.injection // 2
        halves = [self._draw(half, each, "injection") for half in self.halves]
        every = range(int(self.model.cfg.n_layers))
        half = {f.id: name for name, part in zip(("choose", "report"), halves, strict=True)
                for f in part}  # fmt: skip
        result = injection_grid(
            self.model, [f for part in halves for f in part], strengths=self.sizes.strengths,
            layers=[*every, *([tuple(every)] if len(every) > 1 else [])],
            form=self.form, positions="first hop",
            encodings=("unembed", "layerwise_code", "layerwise_text"),
            controls=("random_word", "permuted_bridge", "answer", "norm_matched"),
            metrics=("first_correct", "first_prob", "first_logprob", "rank"),
            seed=self.seed, limits=Limits(batch_size=8, progress=self.progress),
        )  # fmt: skip
        names = [half[i] for i in result["example"].values.tolist()]
        if len(set(names)) < 2:
            reasons = describe_reasons(count_reasons(result.skipped))
            raise Skip(f"one half has no failure that can be injected into ({reasons})")
        return Result(
            result.data.assign_coords(half=("example", names)),
            provenance=result.provenance,
            title="Memory injection",
            main="first_correct",
            skipped=result.skipped,
            allow_nonfinite=True,
        )

    # edit

    def _editing(self) -> Evaluation:
        from mi_hops.reasoning.evaluate import evaluate

        (choose, not_choose), (report, not_report) = map(self._editable, self.halves)
        if not choose or not report:
            raise NoUsableFactError("an edit on one half", not_report if choose else not_choose)
        moments, corpus = self._moments()
        choices = self._choose(self._draw(choose, self.sizes.choose, "edits"), moments, corpus)
        choices["left_out"] = not_choose + not_report
        cases = self._draw(report, self.sizes.edits, "edits")
        queries = self._queries(cases, corpus)
        repairs = [
            self._repair(name, name, tuple(choice["layers"]), choice["strength"], moments)
            for name, choice in choices["chosen"].items()
        ]
        write_text(self.study.folder / "choices.json", json.dumps(choices, indent=1) + "\n")
        return evaluate(self.model, repairs, queries, cases, seed=self.seed, progress=self.progress)

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen for the edits, and from what; empty if none were made."""
        path = self.study.folder / "choices.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _editable(
        self, facts: Sequence[TwoHopFact]
    ) -> tuple[list[TwoHopFact], list[tuple[str, str]]]:
        """Facts that can be edited, and (id, reason) of the others."""
        from mi_hops.editing.plans import CremeSettings, plan_request
        from mi_hops.editing.request import Request
        from mi_hops.facts.templates import CONTEXTS

        # The published edit needs nothing more, and the other templates no longer a context.
        how = CremeSettings(form=self.form, templates=(max(CONTEXTS, key=len),))
        kept, skipped = [], []
        for fact in facts:
            try:
                plan_request(self.model, Request.from_fact(fact, how.form, how.keep), how)
            except ValueError as error:
                skipped.append((fact.id, str(error)))
                continue
            kept.append(fact)
        return kept, skipped

    def _moments(self) -> tuple[Moments, list[TwoHopFact]]:
        """C, from facts that no score is taken on: trained ones, else a third of the passed."""
        from mi_hops.editing import second_moments
        from mi_hops.text.corpus import fact_texts

        corpus = [f for f in self.facts if f.split == "train"]
        if not corpus:
            corpus = self._draw(self.gap.passed, max(1, len(self.gap.passed) // 3), "corpus")
        if not corpus:
            raise Skip("no two-hop question is answered rightly, so there is no text to estimate C")
        return second_moments(self.model, list(dict.fromkeys(fact_texts(corpus)))), corpus

    def _repair(
        self, name: str, kind: str, layers: tuple[int, ...], strength: float, moments: Moments
    ) -> CremeRepair:
        from mi_hops.editing import PAPER, CremeRepair

        how = PAPER if kind == IDENTITY else {"covariance": moments, "strength": strength}
        # The weights are edited as they were loaded; the report says where they are processed ones.
        return CremeRepair(name=name, form=self.form, layers=layers, processed=True, **how)

    def _queries(self, cases: list[TwoHopFact], corpus: list[TwoHopFact]) -> Any:
        from mi_hops.reasoning.sets import build_sets

        gap = self.gap
        said = dict(zip(gap.frame["id"], gap.frame["said"], strict=True))
        known = set(gap.frame.loc[gap.frame["second"], "id"])
        inside = {f.id for f in corpus}
        answered = {f.id for f in gap.passed} - inside
        return build_sets(
            cases, [f for f in self.facts if f.id not in inside] or self.facts,
            answered_ids=answered, known_ids=known, form=self.form,
            per_case=self.sizes.per_case, wrong={f.id: said[f.id] for f in cases if said[f.id]},
            seed=self.seed,
        )  # fmt: skip

    def _choose(
        self, cases: list[TwoHopFact], moments: Moments, corpus: list[TwoHopFact]
    ) -> dict[str, Any]:
        """Layers of each kind of edit, by `choose_edit` on the choosing half."""
        from mi_hops.reasoning.evaluate import evaluate
        from mi_hops.reasoning.locate import located_layers

        located_result = self.study.result("locate")
        located = [] if located_result is None else located_layers(located_result)
        spans = layer_spans(located, int(self.model.cfg.n_layers))
        queries = self._queries(cases, corpus).of("correction", "specificity")
        repairs = {
            (kind, span, strength): self._repair(
                f"{kind}, {span}, {strength:g}", kind, span, strength, moments
            )
            for kind, strengths in STRENGTHS.items()
            for span in spans
            for strength in strengths
        }
        evaluation = evaluate(
            self.model, list(repairs.values()), queries, cases, generate=False, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip
        frame = evaluation.frame
        candidates = []
        for (kind, span, strength), repair in repairs.items():
            part = frame[frame["repair"] == repair.name]
            right = part[part["set"] == "correction"]["first_correct_after"].mean()
            told = part[part["set"] == "specificity"]["exact_match_after"]
            candidates.append(
                {"kind": kind, "layers": list(span), "strength": strength,
                 "correction": float(right), "kept": float(told.mean()) if len(told) else None,
                 "n_kept": len(told)}
            )  # fmt: skip
        chosen = {
            kind: choose_edit([c for c in candidates if c["kind"] == kind])
            for kind in (IDENTITY, ESTIMATED)
        }
        return {
            "rule": CHOICE_RULE, "n_choose": len(cases), "located": located,
            "candidates": candidates, "chosen": chosen,
        }  # fmt: skip
