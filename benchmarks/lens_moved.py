"""What is left of a tuned lens that is moved: between the bundled models, and between SmolLM2's layers.

``python -m benchmarks.lens_moved [--steps 100] [--smol-steps 30]``

A lens is trained on one model or layer and read on another. Beside its KL to the output stand that of the
lens trained there and of the logit lens, on held-out texts.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.harness import keep, kept, table, write
from mi_hops import (
    Hopland,
    LensTraining,
    TunedLens,
    evaluate_lens,
    load_facts,
    load_model,
    train_lens,
)

PAGE = "lens-moved"
SMOL_LAYERS = (8, 15, 22)


def cell(result, layer, variable="kl"):
    """``0.12 [0.10, 0.14]``, nats, over held-out texts."""
    ci = result.sel(layer=layer).ci(variable=variable)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(ci[k].item() for k in ("estimate", "lower", "upper")))


def between_models(names, train, evaluated, plan):
    """Rows: model, layer, KL of its own lens, of the other's, of the logit lens; then excess cross-entropy."""
    models = {name: load_model(name) for name in names}
    lenses = {}
    for name, model in models.items():
        lenses[name] = TunedLens(model)
        train_lens(model, lenses[name], train, LensTraining(**plan))
    rows = []
    for name, other in zip(names, reversed(names), strict=True):
        own = evaluate_lens(models[name], lenses[name], evaluated)
        moved = evaluate_lens(models[name], lenses[other].moved(models[name]), evaluated)
        for layer in lenses[name].layers:
            excess = moved.sel(layer=layer)["excess_cross_entropy"].mean().item()
            rows.append(
                [
                    name,
                    layer,
                    cell(own, layer),
                    cell(moved, layer),
                    cell(own, layer, "logit_lens_kl"),
                    f"{excess:.2f}",
                ]
            )
    return rows


def between_layers(model, train, evaluated, plan):
    """Rows: layer that is read, the logit lens, and the translator of each layer."""
    lens = TunedLens(model, layers=SMOL_LAYERS)
    train_lens(model, lens, train, LensTraining(**plan))
    moved = {
        source: evaluate_lens(
            model, lens.moved(layers=dict.fromkeys(SMOL_LAYERS, source)), evaluated
        )
        for source in SMOL_LAYERS
    }
    return [
        [
            layer,
            cell(moved[layer], layer, "logit_lens_kl"),
            *(cell(moved[source], layer) for source in SMOL_LAYERS),
        ]
        for layer in SMOL_LAYERS
    ]


def statements(facts, seed=0):
    """Two-hop statements of facts, shuffled."""
    texts = [f"{f.prompt()} {f.answer}." for f in facts]
    random.Random(seed).shuffle(texts)
    return texts


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--smol-steps", type=int, default=30)
    parser.add_argument("--texts", type=int, default=150)
    asked = parser.parse_args()
    if asked.steps:
        world = Hopland()
        held_out = world.two_hop_facts("seen_parts", "first_unseen", "second_unseen")
        rows = between_models(
            ["hops-gpt2", "hops-llama"],
            world.two_hop_facts("train")[:2000],
            statements(held_out)[: asked.texts],
            {"steps": asked.steps, "max_tokens": 1024, "evaluate_every": 50},
        )
        head = [
            "read on",
            "layer",
            "its own lens",
            "the other's",
            "logit lens",
            "the other's: excess CE",
        ]
        told = (
            f"## Between the bundled models\n\nKL to the output, nats, mean over {asked.texts} held-out "
            f"statements [95%]; {asked.steps} steps.\n\n" + table(head, rows)
        )
        keep(PAGE, "bundled", told)
        print(told, flush=True)
    if asked.smol_steps:
        texts = statements(load_facts("geo"))
        rows = between_layers(
            load_model("smollm2-135m"),
            texts[asked.texts // 3 :][:1500],
            texts[: asked.texts // 3],
            {"steps": asked.smol_steps, "max_tokens": 256, "cells": 96, "evaluate_every": 15},
        )
        head = ["read at", "logit lens", *(f"translator of {layer}" for layer in SMOL_LAYERS)]
        told = (
            f"## Between SmolLM2's layers\n\nKL to the output, nats, mean over {asked.texts // 3} held-out "
            f"statements of geography [95%]; {asked.smol_steps} steps of 96 tokens.\n\n"
            + table(head, rows)
        )
        keep(PAGE, "smollm2", told)
        print(told, flush=True)
    write(PAGE, "Lenses moved", "\n\n".join(kept(PAGE).values()), script="lens_moved")


if __name__ == "__main__":
    main()
