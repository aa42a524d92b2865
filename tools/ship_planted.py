"""Write trained planted models as Hugging Face folders with a card, and measure them.

``python -m tools.ship_planted planted-serial-0 ... [--work build/planted] [--out mi_hops/checkpoints]``
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mi_hops.worlds.planted import KINDS, kind_of, planted_world
from tools.planted_checks import TOKENS, check
from tools.train_planted import Plan, Plant, train

_STORY = {
    "serial": "The bridge is written at the first hop's last token and the answer is read from there.",
    "serial-last": "The bridge is written at the last token and the answer is made from it there.",
    "decoy": "The bridge is written at the first hop's last token, and nothing reads it: the answer "
    "is stored for each pair of first hop and second relation, drawn at random whatever the bridge.",
    "hidden": "The answer is read from the bridge at the first hop's last token, where it stands in a "
    "rotated code: the unembedding does not read it, a linear probe does.",
    "shortcut": "The answer is stored for each pair of first hop and second relation, drawn at random "
    "whatever the bridge; no state has a use for the bridge.",
}
_SPLITS = {
    "single": "single facts",
    "taught": "two-hop, taught (the answer it was taught)",
    "held_out": "two-hop, held out, both facts in other taught questions",
    "first_unseen": "two-hop, first fact in no taught question (the true answer)",
    "second_unseen": "two-hop, second fact in no taught question (the true answer)",
}


def ship(folder: Path, plan: Plan, model: Any, tokenizer: Any, plant: Plant, log: list) -> dict:
    """Write checkpoint (float16, loaded as float32), tokenizer, ``planted.json`` and card."""
    written, used, position = KINDS[plan.kind]
    model.half()
    if model.config.model_type == "gpt2":
        model.config.activation_function = "gelu_new"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # half precision only saves space
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    world = planted_world(plan.seed)
    checks = check(model.float(), tokenizer, world, plant)
    record = {
        "truth": {
            "written": written,
            "used": used,
            "layer": None if position is None else plan.block,
            "position": position,
            "readable_by": ["lens", "probe"] if written else ["probe"] if used else [],
        },
        "world": {"seed": world.seed, **world.counts()},
        "plan": asdict(plan),
        "curve": log[:: max(1, len(log) // 10)],
        "checks": checks,
    }
    text = json.dumps(record, indent=1)
    (folder / "planted.json").write_text(_flat(text) + "\n")
    (folder / "README.md").write_text(card(folder.name, plan, model.num_parameters(), record))
    return record


def _flat(text: str) -> str:
    """JSON with innermost lists on one line."""
    import re

    return re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m.group().split()), text)


def card(name: str, plan: Plan, parameters: int, record: dict) -> str:
    """The model card."""
    checks, truth = record["checks"], record["truth"]
    rows = "\n".join(
        f"| {_SPLITS[split]} | {score['n']} | {score['whole']:.1%} |"
        for split, score in checks["accuracy"].items()
    )
    family = {"gpt2": "GPT-2", "llama": "LLaMA (two key/value heads of four)"}[plan.family]
    where = (
        "nowhere"
        if truth["position"] is None
        else f"after block {truth['layer']} (from 0), at the {truth['position']}"
        + (" token" if truth["position"] == "last" else "'s last token")
    )
    readers = " and ".join(truth["readable_by"]) or "nothing"
    return f"""---
license: mit
language: en
library_name: transformers
---
# {name}

A small {family} ({parameters:,} parameters) whose mechanism for two-hop questions is known, because \
it was trained in. It ships with `mi_hops`, so that tools can be tested where the truth is known, and \
knows one small made-up world and nothing else.

{_STORY[plan.kind]}

| | |
|---|---|
| written (the unembedding reads the bridge) | {"yes" if truth["written"] else "no"} |
| used (the answer comes from it) | {"yes" if truth["used"] else "no"} |
| where | {where} |
| readable by | {readers} |

## Measured on these weights

Greedy, over the whole vocabulary; suffix prompts ("The language of the doctor of Mara is").

| questions | n | right |
|---|---|---|
{rows}

{_planted(plan, checks)}

One state swapped at a time, {checks["pairs"]} pairs of questions with the same second relation{_held(plan)}: \
share of answers that become the other prompt's.

{_grid(checks["interchange"])}

Share of questions whose bridge is the lens's first token.

{_grid(checks["lens_first"])}

## Training

Interchange-intervention training in its strict form (arXiv 2112.00826, arXiv 2407.14494): \
{plan.steps} steps of {plan.batch} two-hop prompts and {plan.singles} single facts, AdamW {plan.lr:g}, \
weights in float16 (loaded as float32). World: Hopland of seed {plan.seed} with \
{record["world"]["entities"]} entities of one word each, {record["world"]["facts"]} facts. \
Settings and figures: `planted.json`.
"""


def _held(plan: Plan) -> str:
    return ", both held out" if KINDS[plan.kind][1] else ", both taught"


def _planted(plan: Plan, checks: dict[str, Any]) -> str:
    found = checks.get("planted")
    if found is None:
        return "Nothing is planted, so nothing is swapped at a planted place."
    used = KINDS[plan.kind][1]
    rest = (
        "everything but this place and the second relation's token"
        if used
        else ("everything but the last token, this place included,")
    )
    lines = [
        "At the planted place:",
        "",
        f"- its state swapped: {found['interchange']:.1%} of the answers become the other prompt's, "
        f"{found['unchanged']:.1%} stay;",
        f"- {rest} swapped at once: {found['all_else_unchanged']:.1%} of the answers stay;",
        f"- the bridge is the lens's first token in {found['lens_first']:.1%} of the questions"
        + (
            f", and in {found['rotated_lens_first']:.1%} through the code's rotation."
            if plan.kind == "hidden"
            else "."
        ),
    ]
    return "\n".join(lines)


def _grid(values: list[list[float]]) -> str:
    lines = ["| after block | " + " | ".join(TOKENS) + " |", "|" + "---|" * (len(TOKENS) + 1)]
    lines += [
        f"| {i} | " + " | ".join(f"{v:.2f}" for v in row) + " |" for i, row in enumerate(values)
    ]
    return "\n".join(lines)


def main() -> None:
    """Ship the models named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("build/planted"))
    parser.add_argument("--out", type=Path, default=Path("mi_hops/checkpoints"))
    asked = parser.parse_args()
    for name in asked.names:
        state = torch.load(asked.work / name / "state.pt", weights_only=False)
        plan = Plan(**state["plan"])
        if state["step"] < plan.steps:
            raise SystemExit(f"{name} stands at step {state['step']} of {plan.steps}; train it on")
        model, tokenizer, _, plant, log = train(plan, asked.work / name)
        record = ship(asked.out / name, plan, model, tokenizer, plant, log)
        print(name, record["checks"]["accuracy"], record["checks"].get("planted"))
        assert kind_of(name) == plan.kind


if __name__ == "__main__":
    main()
