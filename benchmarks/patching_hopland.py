"""Patching on the bundled models: estimates against exact effects, and the circuit of two-hop questions.

``python -m benchmarks.patching_hopland [--models hops-gpt2 hops-llama] [--pairs 24]`` writes
``docs/benchmarks/patching-hopland.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import table, write
from mi_hops import (
    Hopland,
    Pairs,
    Sites,
    attribute,
    attribute_edges,
    contrast,
    faithfulness,
    load_model,
    patch,
)
from mi_hops.patching import Circuit, all_edges, extract, head_scores
from mi_hops.result.statistics import bootstrap_ci

KINDS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "q",
    "k",
    "v",
    "pattern",
)
METHODS = ("gradient", "integrated", "atp*")


def answered_pairs(model: Any, count: int, form: str) -> Pairs:
    """Pairs of held-out questions whose both sides the model answers (first token, logit difference)."""
    facts = Hopland().two_hop_facts("seen_parts")
    pairs = contrast(model, facts[: 40 * count], partners=facts, form=form)
    swept = patch(model, pairs, Sites("resid_pre", layers=0, positions=-1))
    good = np.flatnonzero((swept["clean"].values > 0) & (swept["corrupted"].values < 0))
    return pairs.select(good[:count].tolist())


def roles(pairs: Pairs) -> dict[str, list[int]]:
    """The places of the pairs, each once: where the subject ends the phrase they are the same."""
    found = dict(pairs.roles)
    if found["subject"] == found["first hop"]:
        del found["subject"]
    return found


def maps(model: Any, pairs: Pairs) -> list[list[Any]]:
    """The largest mean effects of every kind, by exact patching."""
    rows = []
    for kind in ("resid_post", "attn_out", "mlp_out", "z"):
        found = patch(model, pairs, Sites(kind, positions=roles(pairs)))
        mean = found["change"].mean("example") / float((found["clean"] - found["corrupted"]).mean())
        order = np.argsort(-np.abs(mean.values).ravel())[:3]
        for index in order:
            where = np.unravel_index(index, mean.shape)
            labels = [str(mean[d].values[i]) for d, i in zip(mean.dims, where, strict=True)]
            names = ", ".join(f"{d} {x}" for d, x in zip(mean.dims, labels, strict=True))
            rows.append([kind, names, f"{mean.values[where]:.2f}"])
    return rows


def estimates(model: Any, pairs: Pairs) -> list[list[Any]]:
    """Every kind and method, all cells patched exactly."""
    rows = []
    for kind in KINDS:
        for method in METHODS:
            if method == "atp*" and kind not in ("q", "k", "z", "mlp_out"):
                continue
            found = attribute(model, pairs, Sites(kind, positions=roles(pairs)), method=method)
            check = found.verify(top=None)
            rows.append(
                [
                    kind,
                    method,
                    check.n_cells,
                    f"{check.rank_correlation:.2f}",
                    f"{check.sign_agreement:.0%}",
                    f"{check.largest_error / check.largest_exact:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    return rows


def circuit(model: Any, pairs: Pairs, sizes: Sequence[int]) -> list[list[Any]]:
    """Faithfulness by number of edges, with the ranking by EAP and by EAP-IG, and at random."""
    rng = np.random.default_rng(0)
    edges = all_edges(model)
    half = len(pairs) // 2
    chosen, held = pairs.select(range(half)), pairs.select(range(half, len(pairs)))
    rows = []
    for name, method, select in (
        ("EAP, top", "gradient", "top"),
        ("EAP-IG, top", "integrated", "top"),
        ("EAP-IG, greedy", "integrated", "greedy"),
    ):
        scores = attribute_edges(model, chosen, method=method, steps=5)
        found = [extract(model, scores, min(n, len(edges)), select=select) for n in sizes]
        rows += _faithful(model, held, name, sizes, found)
    lots = [
        Circuit(frozenset(edges[i] for i in rng.permutation(len(edges))[:n])).pruned(model)
        for n in sizes
    ]
    return rows + _faithful(model, held, "random edges", sizes, lots)


def _faithful(
    model: Any, pairs: Pairs, name: str, sizes: Sequence[int], found: list[Circuit]
) -> list[list[Any]]:
    result = faithfulness(model, pairs, found)
    gap = (result["clean"] - result["corrupted"]).values
    rows = []
    for j, (n, c) in enumerate(zip(sizes, found, strict=True)):
        kept = (result["score"][:, j] - result["corrupted"]).values
        low, high = bootstrap_ci(kept / gap, statistic="median")
        rows.append(
            [
                name,
                n,
                len(c),
                f"{kept.mean() / gap.mean():.2f}",
                f"{np.median(kept / gap):.2f} ({float(low):.2f} to {float(high):.2f})",
                len(pairs),
            ]
        )
        print(rows[-1], flush=True)
    return rows


def heads(model: Any) -> list[list[Any]]:
    """The strongest head of each kind."""
    scores = head_scores(model, length=10, samples=16)
    rows = []
    for kind in ("induction", "previous_token", "duplicate_token"):
        mean = scores[kind].mean("example")
        layer, head = np.unravel_index(int(mean.values.argmax()), mean.shape)
        rows.append([kind.replace("_", " "), f"L{layer}H{head}", f"{mean.values.max():.2f}"])
    return rows


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--form", default="suffix")
    asked = parser.parse_args()
    parts = []
    for name in asked.models:
        model = load_model(name)
        pairs = answered_pairs(model, asked.pairs, asked.form)
        total = len(all_edges(model))
        sizes = [n for n in (10, 30, 100, 300) if n < total] + [total]
        parts.append(
            f"## {Path(name).name}\n\n{len(pairs)} pairs of held-out two-hop questions (form *{asked.form}*) that "
            "differ in their first hop and are both answered; metric: logit difference of the two "
            "answers' first tokens.\n\n### Where patching restores most\n\nMean change over the "
            "mean difference of the two runs, clean into corrupted; the three largest of each kind.\n\n"
            + table(["kind", "cell", "share restored"], maps(model, pairs))
            + "\n\n### Estimates against exact patching\n\nAll cells at the named places, patched "
            "exactly beside the estimate.\n\n"
            + table(
                [
                    "kind",
                    "method",
                    "cells",
                    "rank correlation",
                    "equal signs",
                    "largest error / largest effect",
                ],
                estimates(model, pairs),
            )
            + f"\n\n### The circuit\n\nEdges ranked on one half of the pairs, scored on the other; "
            f"the model has {total} edges.\n\n"
            + table(
                [
                    "ranking",
                    "edges asked for",
                    "after pruning",
                    "faithfulness of the means",
                    "median (95% interval)",
                    "pairs",
                ],
                circuit(model, pairs, sizes),
            )
            + "\n\n### Heads\n\nOn random tokens, repeated once.\n\n"
            + table(["kind", "strongest head", "attention there"], heads(model))
        )
    print(
        write(
            "patching-hopland",
            "Patching: what it finds on Hopland",
            "\n\n".join(parts),
            script="patching_hopland",
        )
    )


if __name__ == "__main__":
    main()
