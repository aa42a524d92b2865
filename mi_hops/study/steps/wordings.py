"""In which words, and after how many worked examples, the questions are asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mi_hops.facts.reading import Facts
from mi_hops.reasoning.wordings import CHOOSING, WordingChoice, choose_wordings, wording_text
from mi_hops.result.result import Result
from mi_hops.study.context import Run, StudySettings
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, percent, share
from mi_hops.study.parts import Block, Table, Text
from mi_hops.study.step import ANSWER, Asked, Step, Work

#: Worked examples tried where their number is not given.
SHOTS = (0, 3)

#: The two template orders; the question form would need an answer in another shape.
FORMS = ("suffix", "prefix")


class Wordings(Step):
    """Chooses on facts that are not reported; shown in the section of the gap."""

    name, short, shown_in, share = "wordings", "Choosing the wordings", "gap", 0.12
    kind = WordingChoice

    def wanted(self, facts: Facts, settings: StudySettings) -> bool:
        """Facts come in several wordings, and some are set apart for choosing."""
        return bool(facts.relations) and any(fact.split == CHOOSING for fact in facts)

    def run(self, run: Run) -> WordingChoice:
        """Ask the choosing facts' single hops in every wording, with and without a lead."""
        settings = run.settings

        def choose(per_relation: int, progress: bool) -> WordingChoice:
            return choose_wordings(
                run.model,
                run.given,
                forms=FORMS,
                shots=SHOTS if settings.shots is None else (settings.shots,),
                score=settings.score,
                per_relation=per_relation,
                seed=settings.seed,
                progress=progress,
            )

        choosing = [fact for fact in run.given if fact.split == CHOOSING]
        most = settings.size.wordings
        # A trial of few facts stands for the price of one fact per relation.
        n = run.affordable(self, choosing, most, lambda few: choose(len(few), False), few=2)
        choice = choose(n, run.progress)
        _, skipped = choice.apply(run.given)
        choice.skipped.extend(skipped)
        return choice

    def work(self, asked: Asked) -> Work:
        """Every wording, with and without a lead."""
        tried = len(SHOTS) if asked.settings.shots is None else 1
        rows = asked.wordings * tried * asked.settings.size.wordings
        return Work(rows, rows * (asked.question + ANSWER))

    def summarise(self, result: WordingChoice, study: Folder) -> dict[str, Any]:
        """The number of worked examples, the forms by what is known, the wording of each relation."""
        best = result[result.provenance["score"]].sel(shots=result.shots)
        wordings = result.wordings
        n = result["n"].to_series().to_dict()
        relations = [
            {
                "relation": relation,
                "form": form,
                "text": wording_text(wordings[relation], form),
                "known": share(round(float(at.max()) * n[relation]), n[relation]),
                "worst": float(at.min()),
                "without_lead": _without_lead(result, form, relation),
            }
            for relation in n
            for form in result.forms
            for at in [best.sel(form=form, relation=relation).dropna("option")]
        ]
        return {"shots": result.shots, "forms": result.forms, "relations": relations}

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """How many worked examples stand before each question."""
        yield Headline("worked examples before each question (chosen)", str(entry["shots"]))

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """The wording of each relation, and what it is worth."""
        entry = study.summary["wordings"]
        shots = entry["shots"]
        lead = (
            f"Before every prompt stand {shots} worked examples about other things, the same ones "
            "for both hops and the two-hop question"
            if shots
            else "No worked examples stand before the prompts"
        )
        yield Text(
            f"Each relation comes in several wordings. On facts that are not reported below, the "
            f"wording was chosen under which most single hops are answered, for each template order "
            f"by itself; so was the number of worked examples. {lead}. The main form is the one in "
            f"which more is known: {entry['forms'][0]}."
        )
        rows = []
        for one in entry["relations"]:
            without = one["without_lead"]
            rest = [f"{one['worst']:.0%}", "–" if without is None else f"{without:.0%}"]
            known = percent(one["known"], n=False)
            rows.append(
                [one["relation"], one["form"], one["text"], known, *rest, str(one["known"]["n"])]
            )
        columns = ("relation", "form", "wording chosen", "known", "worst wording", "no lead", "n")
        yield Table(
            "The wordings chosen",
            columns,
            rows,
            texts=3,
            fold=True,
            note="Known: share of the choosing facts' single hops answered under this wording, as "
            "the best of several a little optimistic; brackets: exact 95% intervals in percent. "
            "Worst wording: the same under the relation's least understood wording. No lead: under "
            "its best wording without worked examples.",
        )


def _without_lead(choice: WordingChoice, form: str, relation: str) -> float | None:
    if choice.shots == 0 or 0 not in choice["shots"].values:
        return None
    known = choice[choice.provenance["score"]].sel(shots=0, form=form, relation=relation)
    return float(known.max())
