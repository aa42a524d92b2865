"""Many edits in SmolLM2-135M: the questions that a study found it fails, all edited in one model.

``OMP_NUM_THREADS=1 python -m benchmarks.many_edits_real --folder real-study [--edits 300] [--only NAME]``
works on the folder of a finished `benchmarks.real_model` and adds its rows to the page of
`benchmarks.many_edits`. The rule stands there, and here as `RULE`; it was written before a question was
edited.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.editing_setup import Setup
from benchmarks.harness import keep, kept, write
from benchmarks.many_edits import PAGE, Editor, keys_per_edit, measured, page
from benchmarks.real_more import FACTS, MODEL
from benchmarks.real_more import Setup as Studied
from mi_hops import TwoHopFact, find_gap, load_facts
from mi_hops.editing import Request, creme_joint, creme_search, second_moments
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.text.corpus import fact_texts

RULE = (
    "Real facts, in the wordings and behind the worked examples that the [study of this model]"
    "(real-model.md) chose. Edited are the questions of which it knows both hops and fails the whole "
    "answer: those of the study, and of facts that the study did not ask as many as are missing. Nothing is "
    "chosen here: the search has the decay that both bundled models got for 300 edits, and half of their "
    "rows per step; the least squares have the upper half of the layers and the middle of the ridges that "
    "were tried there. C is counted on statements of a third of the answered questions, which are not "
    "asked as unrelated ones; prompts to keep are those questions' and those of facts that the model does "
    "not know. Answers are shared by many facts (a country's currency), so that, other than in the bundled "
    "models, single facts that are scored may be among what is kept and counted. One query of a set is "
    "asked for each edit."
)
#: Facts beyond the study's that are asked in one go until there are enough failed questions.
MORE = 200


def set_up(studied: Studied, edits: int) -> Setup:
    """The questions edited, what is asked behind each edit, and what is counted and kept."""
    run, model = studied.run, studied.model
    gaps = [run.gap]
    asked = {fact.id for fact in run.gap.facts}
    assert run.choice is not None, "a study of facts in several wordings"
    rest = [fact for fact in run.choice.apply(load_facts(FACTS))[0] if fact.id not in asked]
    random.Random(run.settings.seed).shuffle(rest)

    def failed() -> list[TwoHopFact]:
        return [f for gap in gaps for f in gap.failed if editable(f, run.form)]

    while len(failed()) < edits and rest:
        gaps.append(find_gap(model, rest[:MORE], form=run.form))
        rest = rest[MORE:]
    report = failed()[:edits]
    inside = {fact.id for fact in studied.corpus}
    scored = {fact.id for gap in gaps for fact in (*gap.passed, *gap.failed)}
    known = Known(
        answered={fact.id for gap in gaps for fact in gap.passed} - inside,
        second_hop={i for gap in gaps for i in gap.frame.loc[gap.frame["second"], "id"]},
    )
    queries = build_sets(
        model,
        report,
        known=known,
        pool=[fact for gap in gaps for fact in gap.facts if fact.id not in inside],
        form=run.form,
        per_case=1,
        seed=run.settings.seed,
    )
    unknown = [fact for fact in run.facts if fact.id not in scored]
    corpus = list(dict.fromkeys(fact_texts(studied.corpus)))
    return Setup(model, MODEL, [], report, queries, queries, corpus, [*studied.corpus, *unknown])


def editable(fact: TwoHopFact, form: str | None) -> bool:
    """Whether both of its prompts ask in the same words."""
    try:
        Request.from_fact(fact, form)
    except ValueError:
        return False
    return True


def editors(setup: Setup, form: str | None) -> list[Editor]:
    """The search, and the least squares that it starts from in the other models."""
    model, half = setup.model, list(range(setup.n_layers // 2, setup.n_layers))
    c = second_moments(model, setup.corpus, layers=half)
    kept_prompts = [fact.prompt(form) for fact in setup.practice[:1500]]
    search = partial(
        creme_search, model, covariance=c, kept=kept_prompts, form=form, rows=64, progress=True
    )
    joint = partial(creme_joint, model, covariance=c, form=form, templates=("{}",), layers=half)
    return [
        Editor("CREME, searched", search, [{"decay": 0.3}]),
        Editor("CREME, jointly", joint, [{"ridge": 0.3}]),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, keep the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--steps", type=int, help="of the search (default: its own)")
    parser.add_argument("--only", nargs="+", help="labels of editors")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no page")
    given = parser.parse_args(argv)
    studied = Studied(given.folder)
    form = studied.run.form
    setup = set_up(studied, given.edits)
    print(f"{len(setup.report)} questions, {len(setup.practice)} to keep", flush=True)
    found: dict[str, Any] = kept(PAGE).get(MODEL, {"rows": {}, "room": []})
    found |= {"keys": keys_per_edit(setup, form), "rule": RULE}
    for editor in editors(setup, form):
        if given.only and editor.name not in given.only:
            continue
        option = dict(editor.options[0])
        if given.steps and "decay" in option:
            option["steps"] = given.steps
        row = {"editor": editor.name, **measured(setup, editor, len(setup.report), option)}
        print(row, flush=True)
        if not given.dry:
            found["rows"][f"{row['n']} {editor.name}"] = row
            keep(PAGE, MODEL, found)
            write(PAGE, "Many edits in one model", page(), script="many_edits")


if __name__ == "__main__":
    main()
