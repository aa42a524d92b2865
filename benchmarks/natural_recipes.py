"""Recipes for models that spell the bridge and use what they spell: what was tried.

``python -m benchmarks.natural_recipes [--only NAME ...] [--folder FOLDER] [--page-only]``

Each recipe is trained stage by stage on one core and measured by the rules of `benchmarks.appositions`
on fewer questions; what is measured is kept and not trained again, nor is a stage that two recipes
share. Weights lie in ``--folder``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.appositions import FORMS, figures
from benchmarks.harness import keep, kept, table, write
from mi_hops import Hopland, load_model
from mi_hops.model import CHECKPOINTS
from mi_hops.worlds.recipe import AdamW, Recipe, Shape, Texts
from mi_hops.worlds.texts import Sampler, build_tokenizer
from mi_hops.worlds.train import Training, build_model

PAGE = "natural-recipes"
#: Held-out questions; answered and failed ones, half of each to choose; failed ones for locating.
ASKED, SAMPLE, LOCATED = 240, 120, 12


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        steps, batch_size: updates, sequences in each.
        blocks: of the model from here on.
        taken: blocks taken over from what was there before, from the first on; the rest are new.
        frozen: what is taken over is not trained further.
        apposed, composed: of the `Texts`.
        short: some appositions are one word of the bridge's name, so that a description asks for all of
            its words and not for the first alone, which entities share.
        cut: share of the updates that run only the first `cut_after` blocks.
    """

    steps: int
    batch_size: int = 128
    blocks: int = 6
    taken: int = 6
    frozen: bool = False
    apposed: float = 0.5
    short: bool = False
    composed: float = 0.8
    lr: float = 1.5e-3
    weight_decay: float = 0.5
    cut: float = 0.0
    cut_after: int = 2


@dataclass(frozen=True)
class Plan:
    """A recipe: the bundled model that it begins from, if any, and its stages."""

    idea: str
    stages: tuple[Stage, ...]
    start: str = ""


#: `hops-gpt2` taught to spell: on whole texts, half of whose compositions name the bridge.
SPELL = Stage(1200, 256)
FURTHER = Stage(200)
NAMES = replace(FURTHER, short=True)
#: Three blocks that know single facts and spell a bridge where its description is followed by its name.
FACTS = Stage(
    900, 256, blocks=3, taken=0, apposed=1.0, short=True, composed=0.6, lr=3e-3, weight_decay=0.1
)
#: Compositions learned by new blocks on top of those, and by all six.
ABOVE = Stage(500, taken=3, frozen=True, short=True, lr=3e-3)
ALL = replace(ABOVE, frozen=False, lr=1.5e-3)
LONGER = Stage(1600, short=True, apposed=0.4, composed=0.85, lr=2.5e-3)
#: More single facts again.
SETTLE = Stage(200, short=True, apposed=0.4, composed=0.5, lr=1.5e-3)

PLANS: dict[str, Plan] = {
    "spelling": Plan("`hops-gpt2` taught to spell", (SPELL,), "hops-gpt2"),
    "short": Plan("`spelling`, then names or one word of them", (SPELL, NAMES), "hops-gpt2"),
    "cut": Plan(
        "`short`, half of its updates through 2 blocks alone",
        (SPELL, replace(NAMES, cut=0.5)),
        "hops-gpt2",
    ),
    "fresh-3": Plan(
        "`spelling`, then blocks 3-5 learned again",
        (SPELL, replace(FURTHER, taken=3)),
        "hops-gpt2",
    ),
    "grown": Plan("3 blocks learn facts, 3 on top of them compositions", (FACTS, ABOVE)),
    "grown-free": Plan("the same, nothing frozen", (FACTS, ALL)),
    "grown-longer": Plan("the same, much longer", (FACTS, ALL, LONGER)),
    "grown-settled": Plan("the same, then more single facts", (FACTS, ALL, LONGER, SETTLE)),
}


def built(tokenizer: Any, stage: Stage, state: dict[str, Any]) -> Any:
    """The stage's model, with what it takes over from `state`."""
    recipe = Recipe(shape=Shape(n_layer=stage.blocks), seed=len(state))
    model = build_model("gpt2", tokenizer, recipe)
    taken = {}
    for key in model.state_dict().keys() & state.keys():
        block = re.search(r"\.h\.(\d+)\.", key)
        if block is None or int(block[1]) < stage.taken:
            taken[key] = state[key]
    model.load_state_dict({**model.state_dict(), **taken})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (stage.frozen and name in taken))
    return model.train()


def trained(model: Any, tokenizer: Any, world: Hopland, stage: Stage, seed: int) -> Iterator[float]:
    """Train through the stage: the losses."""
    adamw = AdamW(lr=stage.lr, warmup=min(100, stage.steps // 5), weight_decay=stage.weight_decay)
    texts = Texts(composed=stage.composed, apposed=stage.apposed, short=stage.short)
    cycle = Recipe(stage.steps, stage.batch_size, texts=texts, adamw=adamw, seed=seed)
    sampler = Sampler(world, tokenizer, cycle)
    blocks = model.transformer.h
    for step, loss in enumerate(Training(model, sampler).losses()):
        yield loss
        part = stage.cut and step % round(1 / stage.cut) == 0
        model.transformer.h = blocks[: stage.cut_after] if part else blocks
    model.transformer.h = blocks


def train(name: str, folder: Path) -> Path:
    """Train what is not trained yet, stage by stage; the finished model's folder."""
    from transformers import AutoModelForCausalLM

    plan, world = PLANS[name], Hopland()
    tokenizer = build_tokenizer(world, "gpt2")
    state: dict[str, Any] = {}
    if plan.start:
        start = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / plan.start, dtype=torch.float32)
        state = start.state_dict()
    for i, stage in enumerate(plan.stages):
        key = repr((plan.start, plan.stages[: i + 1]))
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
        if file.exists():
            state = torch.load(file)
            continue
        model = built(tokenizer, stage, state)
        began = time.monotonic()
        for step, loss in enumerate(trained(model, tokenizer, world, stage, seed=i), 1):
            if step % 50 == 0:
                print(name, i, step, f"{loss:.3f}", f"{time.monotonic() - began:.0f} s", flush=True)
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
    whole = built(tokenizer, plan.stages[-1], {})
    whole.load_state_dict(state)
    whole.config.activation_function = "gelu_new"  # the same function, as GPT-2 names it
    whole.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def measure(name: str, folder: Path) -> None:
    """The figures of a trained recipe."""
    model = load_model(folder, device="cpu")
    for form in FORMS:
        found = figures(model, form, asked=ASKED, sample=SAMPLE, located=LOCATED)
        keep(PAGE, f"{name}-{form}", found)
        print(name, form, found["shares"], found.get("prob"), found.get("drop"), flush=True)


def page() -> None:
    """All recipes that were measured."""
    parts, tried, read = kept(PAGE), [], []
    for name, plan in PLANS.items():
        both = [parts[f"{name}-{form}"] for form in FORMS if f"{name}-{form}" in parts]
        if not both:
            continue
        shares = [
            " / ".join(f"{share:.0%}" for share in column)
            for column in (
                [p["known"] for p in both],
                [p["shares"]["seen_parts"][0] for p in both],
                [p["shares"]["first_unseen"][0] for p in both],
            )
        ]
        steps = " + ".join(f"{s.steps:,} x {s.batch_size}" for s in plan.stages) or "-"
        tried.append([f"`{name}`", plan.idea, steps, *shares])
        read += [[f"`{name}`", p["form"], *_figures(p)] for p in both if "prob" in p]
    trained_on = ("recipe", "what", "steps", "facts known", "seen parts", "first fact unseen")
    columns = (
        "recipe",
        "order",
        "n",
        "blocks",
        "rank",
        "probability",
        "answered minus failed",
        "before the answer",
        "block",
        "control minus bridge",
    )
    body = WORDS.format(
        asked=ASKED,
        n=SAMPLE // 2,
        tried=table(trained_on, tried),
        read=table(columns, read),
        drops=" / ".join(
            ", ".join(f"{x:+.2f}" for x in parts[f"grown-settled-{form}"]["drops"])
            for form in FORMS
        ),
    )
    write(PAGE, "Recipes for models that use what they spell", body, script="natural_recipes")


def _figures(p: dict[str, Any]) -> list[str]:
    def interval(x: list[float], form: str = "+.2f") -> str:
        return f"{x[0]:{form}} [{x[1]:{form}}, {x[2]:{form}}]"

    return [
        f"{p['n']}",
        f"{p['layer']}",
        f"{p['rank']:g}",
        interval(p["prob"], ".2f"),
        interval(p["less_failed"]),
        interval(p["order"], ".0%"),
        f"{p['block']}",
        interval(p["drop"]),
    ]


#: The page.
WORDS = """
A model can spell out the bridge and hardly use what it spells. Goals for one that [uses it](appositions.md): seen parts
at least 90% and unseen first facts at most 30%, rank at most 3, probability at least 0.2, answered minus failed at least
0.1, before the answer in most questions, and control minus bridge at least 0.2. All recipes train GPT-2s of six blocks on
one core. Rules and columns are those of [the page on appositions](appositions.md), with {asked} questions and at most {n}
answered ones in the reported half; cells with two values are suffix / prefix.

## What they answer

{tried}

*Facts known*: questions whose two single facts are both answered; the other two columns are shares of these. The first
four recipes continue from `hops-gpt2`; the measured `spelling` had 200 warm-up steps instead of 100. *Short*: an
apposition may also be one word of the name. In only 17% of held-out questions is the bridge's first word unique to it, so
a state that spells the first word does not identify the entity; all words together always do.

## Is the bridge readable, and used?

{read}

## What it comes to

A model that already has its own code for the bridge keeps using that code: with short names, early read-outs or upper
blocks learned again, erasure has no more effect than in `spelling`. What helps is that the model never had another code.
Three blocks first learn single facts, and to spell the bridge after its description; three more are then added on top,
and all six learn compositions. Erasing the bridge then removes most of P(answer) (`grown-longer`, `grown-settled`), and
the bridge comes first in about four questions of five. All goals are met except, in the suffix order, unseen first facts
(33% and 32%) and, narrowly, the seen parts of `grown-settled` (89.9%). Learning to compose needs its updates: after 500
(`grown`, `grown-free`) few questions were answered. The price is forgotten single facts, most of which a short last stage
restores. In `grown-settled` control minus bridge is {drops} after blocks 0 to 5: the bridge is read from the early blocks
on, soon after it is first spelled. Which part matters (facts first, added blocks, short names) was not separated.

One seed, one family, few questions, and the recipes were tried one after another with their results in view: this is a
search, not a confirmation. The last recipe, with more steps in its last two stages and a seed for all of them, trained
`apposed-gpt2` and, with weight decay 0.1, `apposed-llama`: [measured](appositions.md) on more questions.

Not in the tables: `short` with noise as large as the spread of all states after 2 blocks, which left no question to
measure; and earlier recipes, read on 300 held-out questions and never erased: commas on both sides of the bridge (rank
above 60 after 600 steps of 256); no commas and a weight of 0.2 on all but the answer, with half of the descriptions named
(600 steps: seen parts 90%, rank 1, probability 0.65 after 4 blocks) or four fifths of them (1,200 steps: 91%, rank 1,
0.84); a tied model from random weights (400 steps: seen parts 9%). Together with those in the tables, thirteen.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / PAGE)
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in () if options.page_only else options.only:
        if f"{name}-{FORMS[-1]}" in kept(PAGE):
            continue
        measure(name, train(name, options.folder))
    page()


if __name__ == "__main__":
    main()
