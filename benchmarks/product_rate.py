"""What share of the machine's matrix-product rate the steps of a study reach on SmolLM2-135M.

``python -m benchmarks.product_rate [--threads 2] [--runs 3]`` writes
``docs/benchmarks/product-rate.md``. Needs SmolLM2-135M (docs/quickstart.md).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.asking_speed import SHOTS
from benchmarks.harness import CLASSES, backends, keep, kept, table, write
from benchmarks.patching_speed import matmul_rate
from mi_hops import (
    build_sets,
    creme,
    erase_bridge,
    evaluate,
    fact_trajectories,
    find_gap,
    injection_grid,
    load_facts,
    load_model,
    locate,
)
from mi_hops.facts.wordings import with_lead

PAGE = "product-rate"
FORM = "prefix"
N_FACTS = 24
GOAL = 0.5


def steps(model: Any) -> dict[str, Callable[[], Any]]:
    """Step of the study -> a call of it on a few facts of geography, asked behind worked examples."""
    pair = ("country of city", "currency")
    facts = [f for f in load_facts("geo") if (f.relation1, f.relation2) == pair]
    asked = [with_lead(f, facts[N_FACTS:], shots=SHOTS) for f in facts[:N_FACTS]]
    gap = find_gap(model, asked, form=FORM)
    queries = build_sets(model, asked[:8], gap=gap, pool=asked, form=FORM)
    edit = creme(model, asked[0], layers=[20, 21], form=FORM)
    return {
        "asking": lambda: find_gap(model, asked, form=FORM),
        "lens": lambda: fact_trajectories(model, asked, form=FORM),
        "erasure": lambda: erase_bridge(model, asked[:8], form=FORM, controls=1),
        "locating": lambda: locate(model, asked[:8], form=FORM),
        "injection": lambda: injection_grid(
            model, asked[:8], form=FORM, strengths=(4.0,), controls=("random_word",)
        ),
        "evaluation": lambda: evaluate(model, edit, queries, asked[:8]),
    }


def counted(call: Callable[[], Any]) -> float:
    """Operations of all matrix products of a call, as torch runs them."""
    counter = FlopCounterMode(display=False)
    # It would hook all modules to tell whose operations are counted, and under hooks rows run as a whole.
    counter.mod_tracker = _NoModules()
    with counter:
        call()
    return float(counter.get_total_flops())


class _NoModules(nullcontext[None]):
    """In place of the tracker of modules."""

    parents = frozenset({"Global"})


def measure(backend: Any, runs: int) -> None:
    """Each step in turn with a bare product, so that both meet the machine in the same state."""
    model = load_model("smollm2-135m", backend=backend, device="cpu")
    for name, call in steps(model).items():
        operations = counted(call)
        shares, seconds, rates = [], [], []
        for _ in range(runs):
            rate = matmul_rate(model)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            rates.append((rate + matmul_rate(model)) / 2)
            shares.append(operations / seconds[-1] / rates[-1])
        found = {
            "backend": backend, "step": name, "operations": operations,
            "seconds": statistics.median(seconds), "rate": statistics.median(rates),
            "share": statistics.median(shares), "shares": [min(shares), max(shares)],
        }  # fmt: skip
        print(found, flush=True)
        keep(PAGE, f"{backend}-{name}", found)


def page() -> None:
    """The table of all steps measured so far."""
    rows = [
        [
            CLASSES[p["backend"]], p["step"], f"{p['operations'] / 1e9:.0f}", f"{p['seconds']:.1f}",
            f"**{p['share']:.0%}** ({p['shares'][0]:.0%} to {p['shares'][1]:.0%})",
        ]
        for p in kept(PAGE).values()
    ]  # fmt: skip
    columns = ("model class", "step", "Gflop run", "seconds", "share of the product rate")
    body = f"""
Each step of a study on {N_FACTS} facts of the bundled geography (8 where grids of layers are swept), asked after
{SHOTS} worked examples, on SmolLM2-135M in float32. *Gflop run* counts all matrix products that torch runs, without
attention's fused kernel. Divided by the seconds, it is compared with the rate of a bare product of 512 tokens with an MLP's
matrix, timed right before and after. The goal is {GOAL:.0%} in erasure, locating, injection and evaluation. The share says how
efficiently the operations run, not how few they are ([patching](patching-speed.md) compares both with a forward pass per
cell).

{table(columns, rows)}
"""
    write(PAGE, "The steps of a study: product rate", body, script="product_rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for backend in backends():
        measure(backend, options.runs)
        page()


if __name__ == "__main__":
    main()
