"""One hop edited, two asked: fact editors, CREME on top of them, and the new bridge injected.

``python -m benchmarks.portability [--model hops-gpt2 hops-llama] [--hop first second]
[--limit 200]`` writes ``docs/benchmarks/portability.md`` from the rows kept in
``benchmarks/results/portability/``, of which ``--only NAME ...`` measures some again.
``--model smollm2-135m --folder FOLDER`` asks a real model about real facts; the folder is that of
`benchmarks.many_edits_real`. Layers and strengths are chosen
on other edits than those reported, by the rule that stands on the page.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.editing_setup import FirstTokens, Timed, deal, hops
from benchmarks.editing_table import named, spans
from benchmarks.harness import keep, kept, table, write
from benchmarks.many_edits_real import APART, COUNTED, MODEL, Asked, editable
from mi_hops import Hopland, find_gap, hop_edits, load_model, merge, second_moments
from mi_hops.editing import CremeRepair, HopRepair, Moments, OnTop
from mi_hops.editing.baselines import (
    FineTuneRepair,
    GraceRepair,
    LoraRepair,
    MemitRepair,
    RomeRepair,
)
from mi_hops.facts import HopEdit, TwoHopFact
from mi_hops.injection import MemoryInjection
from mi_hops.reasoning import Evaluation, Gap, QuerySets, evaluate, portability_sets
from mi_hops.result.statistics import difference_ci

PAGE = "portability"
CHOOSE = 12  # edits that settings are chosen on
ENOUGH = 0.995
STRENGTHS = (0.7, 1.0)
TOGETHER = 2  # repairs that are scored against one unedited run

RULE = (
    "A *case* is one single fact, taken from a question that the unedited model answers "
    "both hop by hop and as a whole. The fact gets an object that the same relation has "
    "elsewhere (`hop_edits`); each edit is undone before the next, and no two cases edit "
    "the same fact. Editors are taught the single hop in one form only. CREME, alone or on "
    "top, is given the case's own two-hop question in that form, the second hop about the "
    "new bridge, and the answer for its tokens after the first; memory injection is given "
    "the new bridge's name. *Portability* is the mean over a case's two-hop questions "
    "through the edited fact (its own and up to five others, each in all its forms) whose "
    "other hop is known, then over cases. Layers (for LoRA also the step size, for "
    "AlphaEdit the threshold, for CREME and memory injection the strength) are those with "
    f"the largest efficacy + portability on {CHOOSE} *other* edits of first hops, minus "
    "four times the share of unrelated and of neighbouring facts lost beyond "
    f"{1 - ENOUGH:.1%}; ties go to the fewest layers. CREME on top uses the layers chosen "
    "on top of ROME. In the bundled models, the reported facts, those that settings are "
    "chosen on and those that C is estimated on are disjoint. All shares are of first "
    "answer tokens, with 95% intervals over cases; a pair's seconds are those of its CREME "
    "edit. It was fixed before any number was read that a pair counts as *better* than one "
    "of its parts if the 95% interval of the paired difference over cases, on the "
    "questions that CREME was not given (own question in other forms, and other chains), "
    "lies above 0."
)

#: What is different in SmolLM2; written before a row was read.
REAL_RULE = (
    "Questions are asked in the wordings and behind the worked examples of the [study of "
    "this model](real-model.md); single facts are taught behind them, too, and ROME, "
    "MEMIT and CREME see no other context templates, to save time. (Before any row was "
    "read, ROME was chosen for facts taught without examples: its worth was 0.78 with "
    "context templates and 0.15 without; behind examples it is 0.82.) Cases are of facts "
    "that the study asked; these have fewer than 200 second hops that can be edited, so "
    "other facts are asked, 200 at a time, until there are enough. Settings are chosen on "
    "four edits of facts set apart, from five layers at 0.2 to 0.8 of the depth. At most "
    "one other chain, one neighbour and one unrelated question are asked for each case. "
    "Single facts that are scored may be among what settings are chosen on and C is "
    "counted on."
)

#: Column -> (set, statistic).
COLUMNS = {
    "taught prompt": ("efficacy", "first_correct_after"),
    "its other forms": ("wordings", "first_correct_after"),
    "portability": ("portability", "first_correct_after"),
    "own question, form taught": ("portability_own", "first_correct_after"),
    "own question, other forms": ("portability_wordings", "first_correct_after"),
    "other chains": ("portability_chains", "first_correct_after"),
    "still the old answer": ("old_answer", "first_correct_after"),
    "reverse": ("reverse", "first_correct_after"),
    "other hop": ("other_hop", "first_correct_after"),
    "same subject": ("same_subject", "first_correct_after"),
    "same relation": ("same_relation", "first_correct_after"),
    "unrelated": ("specificity", "first_correct_after"),
    "KL neutral": ("neutral", "kl"),
}
HEAD = ("repair", "n", *COLUMNS, "s / edit", "bytes / edit")
#: The sets that CREME on top is not given a prompt of.
NOT_GIVEN = ("portability_wordings", "portability_chains")


@dataclass
class Bench:
    """A model, edits to choose settings on, and the gaps that reported edits are drawn from.

    Attributes:
        report: as many of these gaps are taken, in turn, as it takes for the edits wanted.
        form: that is taught.
        layers: blocks that settings may be chosen from.
        corpus: statements that C is counted on.
        n_choose: edits that settings are chosen on.
        per_case: other chains, neighbours and unrelated questions of each reported edit, at most.
        templates: of ROME, MEMIT and CREME; None for their own.
    """

    model: Any
    name: str
    form: str
    choose: Gap
    report: Callable[[], Iterator[Gap]]
    corpus: list[str]
    layers: list[int]
    n_choose: int = CHOOSE
    per_case: int = 5
    templates: tuple[str, ...] | None = None
    memo: dict[str, Any] = field(default_factory=dict)


def hopland(name: str, seed: int = 0) -> Bench:
    """The bundled models: chains of three parts of the world, which share no single fact."""
    rng, world, model, form = random.Random(seed), Hopland(), load_model(name), "suffix"
    part = deal(world, rng)

    def made_of(wanted: str, most: int) -> list[TwoHopFact]:
        facts = world.two_hop_facts("train", "seen_parts")
        facts = [f for f in facts if all(part[hop] == wanted for hop in hops(f))]
        return rng.sample(facts, min(len(facts), most))

    choose, report = (find_gap(model, made_of(w, 2000), form=form) for w in ("choose", "report"))
    layers = list(range(model.cfg.n_layers))
    return Bench(
        model,
        name,
        form,
        choose,
        lambda: iter([report]),
        statements(made_of("practice", 1500), form),
        layers,
    )


def real(folder: Path) -> Bench:
    """SmolLM2: facts of geography in the wordings and behind the worked examples of its study.

    Cases are of facts that the study asked, and of as many others as it takes; settings are chosen on
    those that are set apart.
    """
    asked = Asked(folder)
    model, form = asked.model, asked.form
    choose = asked.gap("apart", asked.rest[-APART:])
    layers = [round(model.cfg.n_layers * share) for share in (0.2, 0.35, 0.5, 0.65, 0.8)]
    corpus = statements(choose.facts[:COUNTED], form)  # type: ignore[arg-type]
    return Bench(
        model,
        MODEL,
        form,
        choose,
        asked.gaps,
        corpus,
        layers,
        n_choose=4,
        per_case=1,
        templates=("{}",),
    )


def statements(facts: Sequence[TwoHopFact], form: str) -> list[str]:
    """What C is counted on."""
    said = {f"{f.prompt(form)} {f.answer}." for f in facts}
    said |= {f"{f.first_prompt(form)} {f.bridge}." for f in facts}
    return sorted(said | {f"{f.second_prompt(form)} {f.answer}." for f in facts})


def cases(gap: Gap, hop: str, n: int, seed: int = 0) -> list[HopEdit]:
    """Edits of `n` different single facts of questions that the model answers."""
    facts = random.Random(f"{seed}/{hop}").sample(gap.passed, len(gap.passed))
    unique: dict[Any, HopEdit] = {}
    for edit in hop_edits(facts, hop, pool=gap.facts, seed=seed)[0]:  # type: ignore[arg-type]
        edit = with_one_lead(edit)
        if editable(edit.after, gap.form):
            unique.setdefault(edit.singles[0].key, edit)
    return list(unique.values())[:n]


def reported(bench: Bench, hop: str, n: int) -> tuple[Gap, list[HopEdit]]:
    """The edits that are reported, and the gap they are drawn from."""
    parts = bench.report()
    gap = next(parts)
    while len(edits := cases(gap, hop, n)) < n and (part := next(parts, None)):
        gap = merge([gap, part])
    return gap, edits


def with_one_lead(edit: HopEdit) -> HopEdit:
    """The edit, all prompts of its new chain behind the worked examples of its question.

    The new chain has the second hop of another fact, behind that one's examples.
    """

    def led(form: str, text: str) -> str:
        lead, line, _ = edit.after.prompts[form].rpartition("\n")
        return lead + line + text.rpartition("\n")[2]

    return HopEdit(before=edit.before, after=edit.after.with_prompts(led), hops=edit.hops)


class Once:
    """A repair that is fitted once: what lies on top of it starts from the same edits."""

    def __init__(self, repair: Any) -> None:
        self.repair, self.name, self._states = repair, repair.name, dict[str, Any]()

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> list[Any]:
        """The repair's states, those made before included."""
        new = [f for f in facts if f.id not in self._states]
        if new:
            found = self.repair.fit(model, new)
            self._states |= {f.id: state for f, state in zip(new, found, strict=True)}
        return [self._states[f.id] for f in facts]

    def hooks(self, model: Any, states: Any, rows: Any) -> Any:
        """The repair's."""
        return self.repair.hooks(model, states, rows)


class Chooser:
    """The settings of each method, by `RULE`."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.edits = cases(bench.choose, "first", bench.n_choose)
        sets = portability_sets(self.edits, bench.choose, per_case=3)
        scored = sets.of("efficacy", "portability", "specificity", "same_relation")
        self._asked = FirstTokens(bench.model, scored, [e.after for e in self.edits])

    def worth(self, repair: Any) -> float:
        """What `RULE` looks at."""
        right = self._asked.right(repair)

        def mean(*sets: str) -> float:
            return float(right[self._asked.within(*sets)].mean())

        lost = max(0.0, ENOUGH - mean("specificity", "same_relation"))
        return round(mean("efficacy") + mean("portability") - 4 * lost, 6)

    def best(self, name: str, make: Callable[[Any], Any], options: Sequence[Any]) -> Any:
        """The option of most worth; options are listed with the fewest layers first."""
        found = [self.worth(make(option)) for option in options]
        option = options[max(range(len(options)), key=lambda i: (found[i], -i))]
        print(f"chosen for {name}: {option}, {max(found):.3f} of {sorted(found)}", flush=True)
        return option


def methods(bench: Bench) -> dict[str, Callable[[Sequence[HopEdit]], Any]]:
    """Label -> the repair for some edits; settings are chosen when one is first asked for."""

    @cache
    def c(matrix: str) -> Moments:
        return second_moments(bench.model, bench.corpus, matrix=matrix, layers=bench.layers)

    said = {} if bench.templates is None else {"templates": bench.templates}
    few, single = bench.layers, [[i] for i in bench.layers]
    pairs = [few[i : i + k] for k in (2, 3) for i in range(len(few) - k + 1)]
    all_spans = spans(len(few)) if few == list(range(len(few))) else [*single, *pairs]
    chooser = Chooser(bench)

    def creme(x: Any, name: str = "CREME") -> CremeRepair:
        return CremeRepair(
            layers=x[0], strength=x[1], covariance=c("W_O"), form=bench.form, name=name, **said
        )

    raw: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {
        "rome": (lambda x: RomeRepair(layer=x, covariance=c("W_out"), **said), few),
        "memit": (lambda x: MemitRepair(layers=x, covariance=c("W_out"), **said), pairs),
        "alphaedit": (
            lambda x: MemitRepair(
                layers=x[0],
                covariance=c("W_out").with_null_space(x[1]),
                name="AlphaEdit",
                **said,
            ),
            [(layers, threshold) for layers in pairs for threshold in (0.1, 0.3)],
        ),
        "ft+l": (lambda x: FineTuneRepair(layers=x), single),
        "lora": (
            lambda x: LoraRepair(bench.name, layers=x[0], lr=x[1]),
            [(layers, lr) for layers in (*single, few) for lr in (0.003, 0.01)],
        ),
        "grace": (lambda x: GraceRepair(layer=x, shared=False), few),
    }

    @cache
    def option(label: str) -> Any:
        make, options = raw[label]
        return chooser.best(
            label, lambda x: HopRepair(make(x), chooser.edits, form=bench.form), options
        )

    def taught(label: str, edits: Sequence[HopEdit]) -> Any:
        key = f"{label}/{edits[0].id}/{len(edits)}"
        if key not in bench.memo:
            make = raw[label][0]
            repair = HopRepair(make(option(label)), edits, form=bench.form)
            bench.memo[key] = Once(repair)
        return bench.memo[key]

    wanted = [(span, strength) for span in all_spans for strength in STRENGTHS]

    @cache
    def on_top() -> Any:
        below = taught("rome", chooser.edits)
        return chooser.best("CREME on top of ROME", lambda x: OnTop(below, creme(x)), wanted)

    @cache
    def alone() -> Any:
        return chooser.best("CREME", creme, wanted)

    @cache
    def injected() -> Any:
        options = [(layer, tau) for layer in few for tau in (1, 2, 4, 8, 16)]
        return chooser.best("injection", injection, options)

    def injection(x: Any) -> Any:
        given = MemoryInjection(layers=x[0], strength=x[1], absent="leave")
        return named(given, "the new bridge injected")

    def pair(label: str) -> Callable[[Sequence[HopEdit]], Any]:
        return lambda edits: OnTop(taught(label, edits), creme(on_top()))

    return {
        **{label: lambda edits, label=label: taught(label, edits) for label in raw},
        "creme": lambda edits: creme(alone(), "CREME, no fact edited"),
        "injection": lambda edits: injection(injected()),
        **{f"{label}+creme": pair(label) for label in ("rome", "memit", "ft+l")},
    }


#: Methods that say nothing about a second hop's new object.
FIRST_ONLY = ("creme", "injection")


def cell(row: Any) -> str:
    """A share with its interval, or another number."""
    if row["unit"] == "nats":
        return f"{row['value']:.4f}"
    return f"{row['value']:.1%} ({row['lower']:.1%} to {row['upper']:.1%})"


def row_of(scores: Evaluation, repair: Any, n: int, when: str = "after") -> list[str]:
    """One row of the table: after the edit, or of the unedited model."""
    found = scores.table(n_resamples=500).loc[repair.name]
    cells = []
    for name, statistic in COLUMNS.values():
        key = (name, statistic.replace("after", when))
        empty = key not in found.index or (when == "before" and statistic == "kl")
        cells.append("-" if empty else cell(found.loc[key]))
    if when == "before":
        return ["unedited", str(n), *cells, "-", "-"]
    return [repair.name, str(n), *cells, f"{repair.seconds:.3f}", f"{repair.n_bytes:,}"]


def per_case(scores: Evaluation, repair: str) -> dict[str, list[float | None]]:
    """Set -> share of first tokens after the edit, case by case (None: nothing asked)."""
    each = scores.cases().loc[repair]["first_correct_after"]
    found = {
        name: each.loc[name] for name in NOT_GIVEN if name in each.index.get_level_values("set")
    }
    return {
        name: [round(float(v[i]), 4) if i in v.index else None for i in scores.case_ids]
        for name, v in found.items()
    }


def measure(bench: Bench, hop: str, n: int, only: Sequence[str] | None) -> None:
    """All rows of one hop, kept a few at a time."""
    gap, edits = reported(bench, hop, n)
    print(gap.describe(), flush=True)
    queries: QuerySets = portability_sets(edits, gap, per_case=bench.per_case)
    makers = methods(bench)
    labels = [label for label in makers if hop == "first" or label not in FIRST_ONLY]
    part = f"{bench.name.split('/')[-1]}-{hop}"
    old = kept(PAGE).get(part, {}) if only else {}
    rows, each = old.get("rows", {}), old.get("cases", {})
    wanted, facts = iter(only or labels), [e.after for e in edits]
    while together := list(islice(wanted, TOGETHER)):
        repairs = {label: Timed(makers[label](edits)) for label in together}
        scores = evaluate(bench.model, [*repairs.values()], queries, facts, generate=False)
        for label, repair in repairs.items():
            rows["unedited"] = row_of(scores, repair, len(edits), "before")
            rows[label] = row_of(scores, repair, len(edits))
            each[label] = per_case(scores, repair.name)
            print(" | ".join(rows[label]), flush=True)
        rows = {name: rows[name] for name in ("unedited", *labels) if name in rows}
        found = {"n": len(edits), "sets": queries.describe(), "rows": rows, "cases": each}
        keep(PAGE, part, found)
        write(PAGE, "One hop edited, two asked", page(), script="portability")


def compared(each: dict[str, dict[str, list[float | None]]]) -> str:
    """The pairs beside their parts, case by case, on the questions that CREME was not given."""
    rows = []
    for pair in (label for label in each if "+creme" in label):
        for other in (pair.removesuffix("+creme"), "creme"):
            for name in NOT_GIVEN:
                if name not in each.get(other, {}) or name not in each[pair]:
                    continue
                a, b = each[pair][name], each[other][name]
                both = [(x, y) for x, y in zip(a, b, strict=True) if None not in (x, y)]
                found = difference_ci(*zip(*both, strict=True), paired=True)
                mean, low, high = (100 * float(x) for x in found)
                says = "better" if low > 0 else "worse" if high < 0 else "not told apart"
                rows.append(
                    [pair, other, name, len(both), f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", says]
                )
    return table(("pair", "its part", "set", "n", "difference, points", "the pair is"), rows)


def page() -> str:
    """The tables of all rows there are."""
    parts = [RULE]
    for name, found in kept(PAGE).items():
        model, hop = name.rsplit("-", 1)
        parts.append(f"## {model}: {found['n']} edits of a {hop} hop")
        if model == MODEL:
            parts.append(REAL_RULE)
        parts.append(table(HEAD, list(found["rows"].values())))
        if any("+creme" in label for label in found["cases"]):
            parts.append(compared(found["cases"]))
        parts.append(found["sets"].replace("\n", "\n\n"))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--hop", nargs="+", default=["first", "second"])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="what SmolLM2 was asked")
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    for name in given.model:
        bench = real(given.folder) if name == MODEL else hopland(name)
        for hop in given.hop:
            measure(bench, hop, given.limit, given.only)


if __name__ == "__main__":
    main()
