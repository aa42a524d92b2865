"""What the bundled models know, where they fail, and where the bridge shows in the lens.

``python -m benchmarks.bundled_models``
"""

from __future__ import annotations

import json
import random

import numpy as np

from benchmarks.harness import table, write
from mi_hops.lens import fact_trajectories
from mi_hops.model import CHECKPOINTS, load_model
from mi_hops.reasoning.gap import find_gap
from mi_hops.result.statistics import bootstrap_ci, difference_ci, proportion_ci
from mi_hops.sweep.generate import answered
from mi_hops.worlds import Hopland

SPLITS = ("seen_parts", "first_unseen", "second_unseen")
#: Questions of each group whose curves are averaged, and the seed of their draw.
SAMPLE, SEED = 600, 0


def accuracies(model, world, form):
    """Rows of single-hop, trained and held-out accuracy with exact intervals, and the gap."""
    facts = world.two_hop_facts("train", *SPLITS)
    gap = find_gap(model, facts, form=form, batch_size=256)
    frame = gap.frame
    singles = {}
    for f in gap.facts:
        singles[f.subject, f.relation1] = (f.first_prompt(form), f.bridge, f.bridge_aliases)
        singles[f.bridge, f.relation2] = (f.second_prompt(form), f.answer, f.answer_aliases)
    single = answered(model, *zip(*singles.values(), strict=True), batch_size=256)
    right = sum(a.right for a in single)
    rows = [
        (
            "single facts",
            right,
            len(single),
            np.mean([a.first_token for a in single]),
            len(single) - right,
        )
    ]
    for split in ("train", *SPLITS):
        part = frame[frame["split"] == split]
        known = part[part["first"] & part["second"]]
        rows.append(
            (
                f"two-hop, {split}",
                int(known["two_hop"].sum()),
                len(known),
                known["first_token"].mean(),
                int((~known["two_hop"]).sum()),
            )
        )
    out = []
    for label, k, n, first, failed in rows:
        low, high = proportion_ci(k, n)
        out.append([label, form, n, f"{k / n:.1%} [{low:.1%}, {high:.1%}]", f"{first:.1%}", failed])
    return out, gap


def curves(model, gap, form):
    """Mean lens probability of bridge and answer by layer, passed against failed, held out."""
    rows, notes = [], []
    groups = {}
    for name, facts in (("passed", gap.passed), ("failed", gap.failed)):
        held_out = [f for f in facts if f.split != "train"]
        groups[name] = random.Random(SEED).sample(held_out, min(SAMPLE, len(held_out)))
    for position in ("first hop", "last"):
        values = {}
        for name, facts in groups.items():
            result = fact_trajectories(model, facts, form=form)
            for tracked, score in (
                ("bridge", "prob"),
                ("bridge", "mean_token_prob"),
                ("answer", "prob"),
            ):
                data = result[score].sel(tracked=tracked, position=position)
                data = data.transpose("example", "layer").values
                values[name, tracked, score] = data
                rows.append(
                    [
                        form,
                        position,
                        name,
                        f"{tracked} ({score})",
                        len(data),
                        " ".join(f"{v:.3f}" for v in data.mean(0)),
                    ]
                )
        passed, failed = (values[n, "bridge", "mean_token_prob"] for n in ("passed", "failed"))
        peak = 1 + int(passed.mean(0)[1:].argmax())
        low, high = bootstrap_ci(passed[:, peak])
        gap_value, gap_low, gap_high = difference_ci(passed[:, peak], failed[:, peak])
        answer = values["passed", "answer", "prob"].mean(0)
        half = int(np.argmax(answer >= answer[-1] / 2))
        notes.append(
            f"- {form}, {position}: the bridge (mean over its tokens) peaks after {peak} block(s) "
            f"at {passed[:, peak].mean():.3f} [{low:.3f}, {high:.3f}] on answered questions; "
            f"answered minus failed {gap_value:+.3f} [{gap_low:+.3f}, {gap_high:+.3f}]"
            + (
                f"; the answer has half of its final probability after {half} blocks."
                if position == "last"
                else "."
            )
        )
    return rows, notes


def steps(record):
    """``2500 + 1000``: updates of each training stage."""
    recipe = record["recipe"]
    return " + ".join(str(stage["steps"]) for stage in (recipe, *recipe["then"]))


def main() -> None:
    """Measure, print, and write the page."""
    world = Hopland()
    body = []
    for name in ("hops-gpt2", "hops-llama"):
        model = load_model(name, device="cpu")
        record = json.loads((CHECKPOINTS / name / "training.json").read_text())
        scores, lens, notes = [], [], []
        for form in ("suffix", "prefix"):
            rows, gap = accuracies(model, world, form)
            scores += rows
            more, words = curves(model, gap, form)
            lens += more
            notes += words
        body += [
            f"## {name}",
            "",
            f"Trained for {steps(record)} steps; see its card.",
            "",
            table(
                [
                    "questions",
                    "order",
                    "n (both hops known)",
                    "whole answer right",
                    "first token right",
                    "failed",
                ],
                scores,
            ),
            "",
            "Lens (logit lens with the final norm), mean probability after 0, 1, ... blocks, of "
            f"held-out questions (a sample of {SAMPLE} a group, seed {SEED}); `prob` is of the first token, `mean_token_prob` the mean over all tokens:",
            "",
            table(
                ["order", "position", "questions", "tracked", "n", "after 0, 1, ... blocks"], lens
            ),
            "",
            *notes,
            "",
        ]
    text = "\n".join(body)
    print(text)
    print(write("bundled-models", "The bundled models", text, script="bundled_models"))


if __name__ == "__main__":
    main()
