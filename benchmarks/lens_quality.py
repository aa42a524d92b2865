"""Do trained lenses read the bundled models better than the logit lens, and the bridge earlier?

``python -m benchmarks.lens_quality [--models hops-gpt2 hops-llama] [--steps 400]``

Lenses are trained on statements of the world's trained facts and evaluated on held-out questions'
statements. The attention lens is trained for each of its objectives, and evaluated by all of them.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.harness import keep, kept, table, write
from mi_hops import Hopland, load_model
from mi_hops.lens import (
    AttentionLens,
    LensTraining,
    TunedLens,
    evaluate_heads,
    evaluate_lens,
    fact_trajectories,
    train_lens,
)
from mi_hops.sweep.metrics import target_of
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode

PAGE = "lens-quality"


def interval(ci, digits=3):
    """``0.123 [0.101, 0.145]``."""
    parts = (f"{ci[k].item():.{digits}f}" for k in ("estimate", "lower", "upper"))
    return "{} [{}, {}]".format(*parts)


def tuned_rows(model, lens, evaluated):
    """One row per layer: KL of the tuned lens, of the logit lens, and the difference."""
    result = evaluate_lens(model, lens, evaluated)
    rows = []
    for layer in lens.layers:
        part = result.sel(layer=layer)
        gap = part.difference_ci("logit_lens_kl", variable="kl")
        rows.append(
            [
                layer,
                interval(part.ci(variable="kl")),
                interval(part.ci(variable="logit_lens_kl")),
                interval(gap),
                f"{part['agreement'].mean().item():.2f}",
                f"{part['excess_cross_entropy'].mean().item():.2f}",
            ]
        )
    return rows


def moved_rows(model, lens, evaluated):
    """Mean held-out KL of each layer's translator (rows) read at each layer (columns)."""
    rows = []
    for source in lens.layers:
        moved = lens.moved(layers=dict.fromkeys(lens.layers, source))
        kls = evaluate_lens(model, moved, evaluated)["kl"].mean("example").values
        rows.append([source, *(f"{value:.2f}" for value in kls)])
    return rows


def head_rows(model, train, evaluated, plan):
    """A row an objective: what the trained heads' readings are worth by each standard."""
    rows = []
    for objective in (None, *AttentionLens.objectives):
        lens = AttentionLens(model)
        if objective is not None:
            settings = LensTraining(**{**plan, "objective": objective})
            train_lens(model, lens, train, settings)
        heads = evaluate_heads(model, lens, evaluated[:40])
        summed = evaluate_lens(model, lens, evaluated)["kl"].mean().item()
        rows.append(
            [
                objective or "untrained (logit lens)",
                f"{summed:.3f}",
                f"{heads['kl'].mean().item():.3f}",
                f"{heads['leave_one_out_kl'].mean().item():.4f}",
                f"{heads['without_kl'].mean().item():.4f}",
                f"{lens.n_parameters / 1e6:.2f}M",
            ]
        )
    return rows


def bridge_rows(model, lens, facts, form):
    """A row a group and lens: mean probability of the bridge at the first hop, layer by layer."""
    prompts = [encode(model, f.prompt(form)) for f in facts]
    targets = [target_of(model, p, f.answer) for p, f in zip(prompts, facts, strict=True)]
    ranks = score_prompts(model, prompts, targets, "rank")["rank"].tolist()
    rows = []
    for group, wanted in (("answered", True), ("failed", False)):
        part = [f for f, rank in zip(facts, ranks, strict=True) if (rank == 1) == wanted]
        if len(part) < 2:
            continue
        for name, given in (("logit", "logit"), ("tuned", lens)):
            read = fact_trajectories(model, part, form=form, lens=given)
            ci = read.sel(tracked="bridge", position="first hop").ci(variable="prob")
            rows.append([group, len(part), name, *(f"{v:.3f}" for v in ci["estimate"].values)])
    return rows


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--facts", type=int, default=600)
    asked = parser.parse_args()
    world = Hopland()
    held_out = world.two_hop_facts("seen_parts", "first_unseen", "second_unseen")
    trained = world.two_hop_facts("train")
    for facts in (held_out, trained):
        random.Random(0).shuffle(facts)
    evaluated = [f"{f.prompt()} {f.answer}." for f in held_out[: asked.facts // 2]]
    plan = {"steps": asked.steps, "max_tokens": 1024, "evaluate_every": 50}
    for name in asked.models:
        model = load_model(name)
        lens = TunedLens(model)
        run = train_lens(model, lens, trained[: 4 * asked.facts], LensTraining(**plan))
        layers = list(lens.layers)
        tuned = table(
            ["layer", "tuned KL", "logit lens KL", "difference", "agreement", "excess CE"],
            tuned_rows(model, lens, evaluated),
        )
        moved = table(
            ["translator of", *(f"at {x}" for x in layers)], moved_rows(model, lens, evaluated)
        )
        heads = table(
            [
                "trained for",
                "KL of the sum",
                "KL of one head",
                "left out, with its reading",
                "left out, without",
                "parameters",
            ],
            head_rows(model, trained[: 2 * asked.facts], evaluated, plan | {"cells": 256}),
        )
        bridges = [
            f"**{form}**\n\n"
            + table(
                ["questions", "n", "lens", *(f"layer {x}" for x in (*layers, len(layers)))],
                bridge_rows(model, lens, held_out[: asked.facts], form),
            )
            for form in ("suffix", "prefix")
        ]
        text = (
            f"## {name}\n\n### Tuned lens ({run.provenance['steps']} steps)\n\nnats, mean over held-out texts "
            f"[95%]\n\n{tuned}\n\n### A layer's translator on other layers: KL\n\n{moved}\n\n"
            f"### Attention lens, by objective\n\nnats, mean over heads and tokens\n\n{heads}\n\n"
            "### The bridge at the first hop's last token: mean probability\n\n"
            + "\n\n".join(bridges)
        )
        print(text, flush=True)
        keep(PAGE, name, text)
        write(PAGE, "Trained lenses", "\n\n".join(kept(PAGE).values()), script="lens_quality")


if __name__ == "__main__":
    main()
