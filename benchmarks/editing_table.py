"""CREME and its baselines on failed held-out questions, in one table.

``python -m benchmarks.editing_table [--model hops-gpt2 hops-llama] [--cases 300]`` writes
``docs/benchmarks/editing-table.md`` from the rows kept in ``benchmarks/results/editing-table/``, of
which ``--only NAME ...`` measures some again. Layers and strengths are chosen on other failed questions
than those reported, by the rule that stands on the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks.editing_setup import (
    COLUMNS,
    FORM,
    FirstTokens,
    Setup,
    covariance,
    score,
    set_up,
)
from benchmarks.harness import keep, kept, table, write
from mi_hops.editing import (
    PAPER,
    CremeRepair,
    Moments,
    creme_joint,
    creme_sequential,
    edit_hooks,
    stack,
)
from mi_hops.editing.baselines import (
    FineTuneRepair,
    FullFineTuneRepair,
    GraceRepair,
    KnowledgeEditor,
    KnowledgeEditorRepair,
    LoraRepair,
    MemitRepair,
    RomeRepair,
    train_editor,
)
from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection import MemoryInjection
from mi_hops.model import Hook, capture, hook_name
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.text.tokens import TokenError, encode, last_position, pad

STRENGTHS = (0.3, 0.4, 0.5, 0.7, 1.0)
LORA_RATES = (0.001, 0.003, 0.01)
FULL_RATES = (0.00001, 0.00003, 0.0001, 0.0003)
#: Share of unrelated questions beyond which keeping more of them counts for nothing.
ENOUGH = 0.995
SLOW = 24  # questions a repair that needs gradient descent is chosen on
PAGE = "editing-table"

RULE = (
    "Every repair is given prompts in one form only (suffix). Its layers (for CREME and "
    "memory injection also the strength, for the joint edit the ridge, for LoRA and full "
    "fine-tuning the step size, for KnowledgeEditor with the norm constraint the bound) "
    "are those that correct the most first answer tokens on 100 *other* failed questions "
    "(24 for methods fitted by gradient descent; for the joint edit, as many as are "
    f"edited), where each unrelated question answered wrongly beyond {1 - ENOUGH:.1%} of "
    "them (first token) costs as much as four questions not corrected; ties go to the "
    "setting that keeps the most, then to the fewest layers. The world's single facts are "
    "split into three disjoint parts, and each question uses facts of one part only: one "
    "part is for reporting (all query sets), one for choosing settings, and one for "
    "estimating C or training a repair. GRACE keeps one codebook for all questions. CREME "
    "is constrained to keep the single hops in the form that it edits, so they are scored "
    "in the other two forms. An earlier rule, which rewarded kept questions all the way to "
    "100%, chose weaker CREME edits (94.7% and 91.0% corrected on the questions reported "
    "here); it was abandoned after that was seen. *Peak MiB* is the additional memory that "
    "fitting all questions took. A method without a row has not been measured."
)


class BridgeTransplant:
    """A state transplant in the manner of Patchscopes, as a repair.

    The state of the bridge's last token in the second-hop prompt, behind block `source`,
    takes the place of the state of the first hop's last token behind block `target`. Prompts
    without the first hop are left alone.
    """

    name = "state transplant"

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> list[tuple[str, torch.Tensor]]:
        """(first hop, state) a fact."""
        prompts = [encode(model, f.second_prompt(FORM)) for f in facts]
        name = hook_name("resid_post", self.source)
        with torch.no_grad():
            found = capture(model, pad([p.ids for p in prompts]).tokens, [name])[0][name]
        return [
            (f.first_hop, found[i, last_position(p, f.bridge)])
            for i, (f, p) in enumerate(zip(facts, prompts, strict=True))
        ]

    def hooks(self, model: Any, states: Sequence[Any], rows: Rows) -> list[Hook]:
        """The state put in wherever the first hop stands."""
        where = {}
        for row, (prompt, state) in enumerate(zip(rows.prompts, states, strict=True)):
            if state is None:
                continue
            try:
                at = last_position(prompt, state[0]) - rows.offset
            except TokenError:
                continue
            if 0 <= at < rows.width:
                where[row] = at

        def put(x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            for row, at in where.items():
                out[row, at] = states[row][1].to(x)
            return out

        return [(hook_name("resid_post", self.target), put)] if where else []


class Together:
    """CREME edits of many facts applied at once: solved jointly, or made one after the other.

    Args:
        size: facts in one model; more are divided into parts, each with a model of its own.
        ridge: of the joint edit; None makes them in sequence.
    """

    def __init__(self, size: int, *, ridge: float | None = None, **settings: Any) -> None:
        self.size, self.ridge, self.settings = size, ridge, settings
        self.name = f"CREME, {size} {'in sequence' if ridge is None else 'jointly'}"

    def fit(self, model: Any, facts: Sequence[TwoHopFact]) -> list[Any]:
        """The same edit for every fact of a part."""
        found: list[Any] = []
        for start in range(0, len(facts), self.size):
            part = facts[start : start + self.size]
            if self.ridge is None:
                edit = stack(creme_sequential(model, part, **self.settings), check=False)
            else:
                edit = creme_joint(model, part, ridge=self.ridge, **self.settings)
            found += [edit] * len(part)
        return found

    def hooks(self, model: Any, states: Sequence[Any], rows: Rows) -> list[Hook]:
        """Every row under its part's edit."""
        return edit_hooks(model, states)


def chosen(setup: Setup, make: Callable[[Any], Any], options: Sequence[Any], n: int = 100) -> Any:
    """The repair whose option does best on the choosing half, by `RULE`; it says which that was."""
    facts, model = setup.choose[:n], setup.model
    asked = FirstTokens(model, setup.choosing.of_cases(*(f.id for f in facts)), facts)
    own = asked.within("correction")

    def worth(option: Any) -> tuple[float, float]:
        right = asked.right(make(option))
        corrected, kept = float(right[own].mean()), float(right[~own].mean())
        return round(corrected + 4 * min(kept, ENOUGH), 6), round(kept, 6)

    found = [worth(option) for option in options]
    best = max(range(len(options)), key=lambda i: (*found[i], -i))
    repair = make(options[best])
    print(f"chosen for {repair.name}: {options[best]}, {found[best]}", flush=True)
    return repair


def spans(n: int) -> list[list[int]]:
    """Runs of neighbouring layers to choose from, shortest first: up to three, and up to the end."""
    short = [list(range(a, a + k)) for k in (1, 2, 3) for a in range(n - k + 1)]
    return short + [list(range(a, n)) for a in range(max(n - 3, 0))[::-1]]


def named(repair: Repair, name: str) -> Repair:
    """The repair under another label."""

    class Named:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(repair, attribute)

    wrapped = Named()
    wrapped.name = name  # type: ignore[attr-defined]
    return wrapped  # type: ignore[return-value]


def candidates(setup: Setup, c: Moments, c_mlp: Moments) -> dict[str, Callable[[], Any]]:
    """Label -> how to get the repair; nothing runs before it is asked for."""
    n = setup.n_layers
    all_spans, singles = spans(n), list(range(n))
    paper = {"form": FORM, **PAPER}

    def creme(
        name: str, strengths: Sequence[float] = (1.0,), **settings: Any
    ) -> Callable[[], CremeRepair]:
        return lambda: chosen(
            setup,
            lambda x: CremeRepair(**{**settings, "layers": x[0], "strength": x[1], "name": name}),
            [(span, strength) for span in all_spans for strength in strengths],
        )

    ours = {"form": FORM, "covariance": c}

    @cache
    def best() -> dict[str, Any]:
        repair = creme("CREME", STRENGTHS, **ours)()
        return {**repair.options, "strength": repair.settings.strength}

    def sequential(size: int) -> Callable[[], Repair]:
        return lambda: chosen(
            setup,
            lambda x: Together(size, **{**best(), "strength": x}),
            [s for s in (0.2, *STRENGTHS) if s <= best()["strength"]],
        )

    def joint(size: int) -> Callable[[], Repair]:
        return lambda: chosen(
            setup,
            lambda x: Together(size, ridge=x[1], layers=x[0], **ours),
            [(range(a, n), r) for a in (n // 2, n // 3, 0) for r in (0.03, 0.1, 0.3, 1.0)],
            max(size, 100),
        )

    @cache
    def trained(**how: Any) -> KnowledgeEditor:
        return train_editor(setup.model, setup.practice, layers=range(n), steps=600, **how)

    def editor(name: str = "KnowledgeEditor", loop: int = 1, **how: Any) -> Repair:
        return KnowledgeEditorRepair(trained(**how), form=FORM, loop=loop, name=name)

    return {
        "paper": creme("CREME, paper (C = I)", **paper),
        "paper-c": creme("CREME, paper with C", **paper, covariance=c),
        "creme-i": creme("CREME, C = I", STRENGTHS, form=FORM),
        "creme": lambda: CremeRepair(**best()),
        "creme-free": lambda: CremeRepair(name="CREME, nothing kept", keep=None, **best()),
        "sequential-10": sequential(10),
        "sequential-100": sequential(100),
        "joint-10": joint(10),
        "joint-100": joint(100),
        "joint-300": joint(300),
        "rome": lambda: chosen(
            setup, lambda x: RomeRepair(layer=x, covariance=c_mlp, form=FORM), singles, SLOW
        ),
        "memit": lambda: chosen(
            setup,
            lambda x: MemitRepair(layers=x, covariance=c_mlp, form=FORM),
            [s for s in all_spans if 2 <= len(s) <= 3],
            SLOW,
        ),
        "grace": lambda: chosen(setup, lambda x: GraceRepair(layer=x, form=FORM), singles, SLOW),
        "ft+l": lambda: chosen(
            setup, lambda x: FineTuneRepair(layers=[x], form=FORM), singles, SLOW
        ),
        "full": lambda: chosen(
            setup, lambda x: FullFineTuneRepair(form=FORM, lr=x), FULL_RATES, SLOW
        ),
        "lora": lambda: chosen(
            setup,
            lambda x: LoraRepair(setup.name, layers=x[0], lr=x[1], form=FORM),
            [(span, lr) for span in (*([i] for i in singles), singles) for lr in LORA_RATES],
            SLOW,
        ),
        "editor": editor,
        "editor-loop": lambda: editor("KnowledgeEditor, loop", loop=5),
        "editor-norm": lambda: chosen(
            setup,
            lambda x: editor("KnowledgeEditor, norm", constraint="norm", margin=x),
            (0.03, 0.1, 0.3),
        ),
        "injection": lambda: named(
            chosen(
                setup,
                lambda x: MemoryInjection(layers=x[0], strength=x[1], absent="leave"),
                [(layer, tau) for layer in singles for tau in (1, 2, 4, 8, 16)],
            ),
            "memory injection",
        ),
        "transplant": lambda: chosen(
            setup, lambda x: BridgeTransplant(*x), [(a, b) for a in singles for b in singles]
        ),
    }


def page() -> str:
    """The tables of all rows there are."""
    parts = [RULE]
    for name, found in kept(PAGE).items():
        title = f"## {name}: {found['n']} failed held-out questions"
        parts += [title, table(COLUMNS, list(found["rows"].values())), found["sets"]]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.model:
        setup = set_up(name, cases=given.cases, seed=given.seed)
        makers = candidates(setup, covariance(setup), covariance(setup, "W_out"))
        part = name.split("/")[-1]
        rows = kept(PAGE).get(part, {}).get("rows", {}) if given.only else {}
        for label in given.only or makers:
            rows[label] = score(setup, [makers[label]()])[0]
            print(" | ".join(rows[label]), flush=True)
            rows = {each: rows[each] for each in makers if each in rows}
            sets = setup.queries.describe()
            keep(PAGE, part, {"n": len(setup.report), "sets": sets, "rows": rows})
            write(PAGE, "CREME and its baselines", page(), script="editing_table")


if __name__ == "__main__":
    main()
