"""Edge attribution and ACDC against the published loops, written plainly on TransformerLens.

``python -m benchmarks.circuits_speed [--only NAME ...] [--pairs 3]`` writes
``docs/benchmarks/circuits-speed.md``. Needs a HookedTransformer (TransformerLens 3.9). The section
``auto-circuit`` also needs that package (see `benchmarks.auto_circuit`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.auto_circuit import AutoCircuit, installed
from benchmarks.harness import gpt2_small, keep, kept, paired, table, write
from benchmarks.patching_speed import RIGHT, WRONG, difference, prompts
from mi_hops import Hopland, Limits, contrast, load_model
from mi_hops.patching import acdc, attribute_edges
from mi_hops.patching.circuit_runs import CircuitRunner
from mi_hops.patching.nodes import job_of_nodes, readers, writers
from mi_hops.sweep.pairs import as_prompts
from mi_hops.text.tokens import Prompt

PAGE = "circuits-speed"
COLUMNS = [
    "method",
    "model",
    "prompt pairs",
    "largest difference",
    "times faster: median (range)",
    "ours, s",
    "loop, s",
    "timings",
]


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2": ("GPT-2 small's size", gpt2_small),
    "smollm2": (
        "SmolLM2-135M, grouped-query",
        lambda: load_model("smollm2-135m", backend="hooked"),
    ),
}


def published_loop(
    model: Any, clean: list[Prompt], corrupted: list[Prompt], steps: int
) -> torch.Tensor:
    """EAP (one step) or EAP-IG as published: split inputs of all heads, hooked one by one.

    Gradients are taken at the same points as ours, so that the scores can be compared.
    """
    from mi_hops.patching.quadrature import path_points

    cfg = model.cfg
    senders, targets = writers(model, "all"), readers(model, "all")
    row = {u: i for i, u in enumerate(senders)}
    column = {v.name: j for j, v in enumerate(targets)}
    sides = [torch.tensor([p.ids for p in side]) for side in (clean, corrupted)]
    shape = (*sides[0].shape, len(senders), cfg.d_model)
    moved = torch.zeros(shape)
    scores = torch.zeros(len(senders), len(targets))
    ends: list[torch.Tensor] = []

    def writing(sign: float) -> list[Any]:
        def start(x: torch.Tensor, hook: Any) -> None:
            ends.append(x.detach())
            moved[:, :, 0] += sign * x

        hooks: list[Any] = [("blocks.0.hook_resid_pre", start)]
        for u in senders[1:]:
            if u.role == "head" and u.head == 0:
                where = slice(row[u], row[u] + cfg.n_heads)

                def heads(x: torch.Tensor, hook: Any, where: slice = where) -> None:
                    moved[:, :, where] += sign * x

                hooks.append((f"blocks.{u.layer}.attn.hook_result", heads))
            elif u.role == "mlp":

                def mlp(x: torch.Tensor, hook: Any, i: int = row[u]) -> None:
                    moved[:, :, i] += sign * x

                hooks.append((f"blocks.{u.layer}.hook_mlp_out", mlp))
        return hooks

    def reading(weight: float) -> list[Any]:
        hooks: list[Any] = []

        def add(name: str, first: int, n: int, before: int) -> None:
            def fn(slope: torch.Tensor, hook: Any) -> None:
                slope = slope if slope.ndim == 4 else slope[:, :, None]
                each = torch.einsum("bpsd,bprd->sr", moved[:, :, :before], slope.detach())
                scores[:before, first : first + n] += weight * each / len(clean)

            hooks.append((name, fn))

        for layer in range(cfg.n_layers):
            before = 1 + layer * (cfg.n_heads + 1)
            for role in "qkv":
                n = sum(v.role == role and v.layer == layer for v in targets)
                add(f"blocks.{layer}.hook_{role}_input", column[f"L{layer}H0.{role}"], n, before)
            add(f"blocks.{layer}.hook_mlp_in", column[f"MLP{layer}"], 1, before + cfg.n_heads)
        last = cfg.n_layers - 1
        add(f"blocks.{last}.hook_resid_post", column["logits"], 1, len(senders))
        return hooks

    with torch.no_grad(), model.hooks(writing(1.0)):
        model(sides[1])
    with torch.no_grad(), model.hooks(writing(-1.0)):
        model(sides[0])
    for point, weight in [(0.0, 1.0)] if steps == 1 else path_points(steps, "gauss"):
        begin = ends[1] + point * (ends[0] - ends[1])

        def enter(x: torch.Tensor, hook: Any, begin: torch.Tensor = begin) -> torch.Tensor:
            return begin.clone().requires_grad_()

        with model.hooks([("blocks.0.hook_resid_pre", enter)], reading(weight)):
            difference(model(sides[0])[:, -1]).sum().backward()
        model.zero_grad()
    return scores


def splitting(model: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with the hook points that the published code needs."""

    def run() -> Any:
        flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
        for flag in flags:
            setattr(model.cfg, flag, True)
        try:
            return call()
        finally:
            for flag in flags:
                setattr(model.cfg, flag, False)

    return run


def of_edges(model: Any, label: str, count: int, steps: int, pairs: int) -> list[Any]:
    """One row of the table."""
    clean, corrupted = (prompts(model, 16, count, seed) for seed in (1, 2))
    options: dict[str, Any] = {"method": "integrated", "steps": steps} if steps > 1 else {}

    def mine() -> Any:
        return attribute_edges(model, (clean, corrupted), metric=difference, **options)

    other = splitting(model, lambda: published_loop(model, clean, corrupted, steps))
    ours = mine()["change"].mean("example").values
    known = np.isfinite(ours)
    error = np.abs(ours - other().numpy())[known].max()
    assert error < 1e-4 * np.abs(ours[known]).max(), (error, np.abs(ours[known]).max())
    times = paired(mine, other, pairs=pairs, warm_up=False)
    name = "EAP" if steps == 1 else f"EAP-IG, {steps} points"
    return _row(name, label, count, f"{error:.1e} of {np.abs(ours[known]).max():.2g}", times)


def one_by_one(model: Any, pairs: Any, threshold: float) -> list[bool]:
    """ACDC with one full pass for every edge and pair; True for the edges that stay."""
    job = job_of_nodes(model, pairs, metric="kl", limits=Limits())
    runner = CircuitRunner(model)
    both = zip(job.scored(), job.corrupted, strict=True)
    ready = [runner.prepare([base], [corrupt])[0] for base, corrupt in both]
    mask = runner.mask(runner.edges)

    def badness() -> float:
        return float(torch.cat([pair.run(mask[None])[0][0] for pair in ready]).mean())

    now, stay = badness(), []
    for j in sorted(range(len(runner.readers)), key=lambda j: -runner.readers[j].stage):
        for i in sorted(range(len(runner.writers)), key=lambda i: -runner.writers[i].stage):
            if mask[i, j]:
                mask[i, j] = False
                without = badness()
                stay.append(without - now >= threshold)
                if stay[-1]:
                    mask[i, j] = True
                else:
                    now = without
    return stay


def of_acdc(name: str, count: int, pairs: int) -> list[Any]:
    """One row of the table."""
    model = load_model(name)
    facts = Hopland().two_hop_facts("seen_parts")
    some = contrast(model, facts[:12], partners=facts, form="suffix").select(range(count))

    def mine() -> Any:
        return acdc(model, some, threshold=0.01)

    stay = one_by_one(model, some, 0.01)
    same = list(mine().table["kept"]) == stay
    times = paired(mine, lambda: one_by_one(model, some, 0.01), pairs=pairs, warm_up=False)
    told = f"{'same' if same else 'OTHER'} {sum(stay)} of {len(stay)} edges"
    return _row("ACDC", name, count, told, times)


def against_auto_circuit(section: str, count: int, pairs: int) -> list[Any]:
    """One row of the second table: EAP on a random GPT-2 small or SmolLM2, ACDC on a bundled model."""
    last: dict[str, Any] = {}
    if section in MODELS:
        label, load = MODELS[section]
        model, copy = load(), load()
        clean, corrupted = (prompts(model, 16, count, seed) for seed in (1, 2))
        theirs = AutoCircuit(copy, clean, corrupted, (RIGHT, WRONG))
        for parameter in model.parameters():
            parameter.requires_grad_(False)

        def mine() -> None:
            last["ours"] = attribute_edges(model, (clean, corrupted), metric=difference)

        def other() -> None:
            last["theirs"] = theirs.eap()

        times = paired(mine, other, pairs=pairs, warm_up=False)
        ours = last["ours"]["change"].mean("example").to_pandas()
        scores = theirs.by_edge(last["theirs"])
        error = max(abs(ours.loc[u, v] - s) for (u, v), s in scores.items())
        most = max(map(abs, scores.values()))
        return _row("EAP", label, count, f"{error:.1e} of {most:.2g}", times)
    model, copy = load_model("hops-gpt2"), load_model("hops-gpt2")
    facts = Hopland().two_hop_facts("seen_parts")
    some = contrast(model, facts[:200], partners=facts, form="suffix")
    sides = [as_prompts(model, side) for side in (some.clean, some.corrupted)]
    lengths = [len(p) for p in sides[0]]
    most = max(set(lengths), key=lengths.count)
    chosen = [i for i, n in enumerate(lengths) if n == most][:count]
    some, sides = some.select(chosen), [[side[i] for i in chosen] for side in sides]
    theirs = AutoCircuit(copy, *sides)

    def found() -> None:
        last["ours"] = set(acdc(model, some, threshold=0.01, prune=False).circuit.edges)

    def kept_there() -> None:
        last["theirs"] = theirs.acdc()

    times = paired(found, kept_there, pairs=pairs, warm_up=False)
    n, other_edges = len(last["ours"]), len(last["ours"] ^ last["theirs"])
    told = f"{f'{other_edges} of' if other_edges else 'none of'} {n} edges"
    return _row("ACDC", "hops-gpt2", len(chosen), told, times)


def _row(name: str, label: str, count: int, error: str, times: dict[str, Any]) -> list[Any]:
    ratio = f"**{times['ratio']:.1f}** ({times['lowest']:.1f} to {times['highest']:.1f})"
    seconds = (f"{times['ours_s']:.2f}", f"{times['theirs_s']:.2f}")
    row = [name, label, count, error, ratio, *seconds, times["pairs"]]
    print(row, flush=True)
    return row


def measure(section: str, pairs: int) -> list[list[Any]]:
    """The rows of one section."""
    if section == "auto-circuit":
        if not installed():
            raise SystemExit("auto-circuit is not installed; see benchmarks/auto_circuit.py")
        rows: list[list[Any]] = []
        for name, n in (
            ("gpt2", 1),
            ("gpt2", 16),
            ("smollm2", 1),
            ("smollm2", 16),
            ("acdc", 1),
            ("acdc", 16),
        ):
            rows.append(against_auto_circuit(name, n, pairs))
            keep(PAGE, section, rows)
        return rows
    if section == "acdc":
        return [of_acdc("hops-gpt2", 1, pairs), of_acdc("hops-gpt2", 4, pairs)]
    label, load = MODELS[section]
    model = load()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return [of_edges(model, label, n, s, pairs) for n, s in ((1, 1), (1, 20), (16, 1), (16, 5))]


def page(found: dict[str, list[list[Any]]]) -> str:
    """What has been measured so far."""
    rows = [row for name in SECTIONS[:3] for row in found.get(name, [])]
    outside = found.get("auto-circuit", [])
    return (
        "The EAP and EAP-IG loop follows the published code: split inputs for all heads, a hook on every "
        "reader's gradient that multiplies it at once with what all writers before it write, all pairs in "
        "one batch, one forward and backward pass per integration point; the metric is a logit difference "
        "at the last of 16 tokens. The ACDC loop makes one pass per edge and pair, using the passes of "
        "`faithfulness`. Both loops were written for this page (the ACDC rows were measured before it took "
        "pairs together). EAP-IG's own code keeps its scores on CUDA and was not run. EAP-IG with 16 pairs "
        "was timed while other work ran.\n\n"
        + table(COLUMNS, rows)
        + "\n\n## The package auto-circuit\n\nIts own code (1.0.1, from PyPI), pairs in one batch, on a copy "
        "of the model: EAP as the gradient of its masks, ACDC at 0.01 nats with edges visited in our order. "
        "Differences are between scores, and between the sets of edges kept. With grouped queries it has "
        "edges into every query head's own copy of a key and value; their scores are added up.\n\n"
        + (
            table([*COLUMNS[:6], "auto-circuit, s", "timings"], outside)
            if outside
            else "Not measured."
        )
    )


SECTIONS = ("gpt2", "smollm2", "acdc", "auto-circuit")


def main() -> None:
    """Measure the sections asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS[:3])
    parser.add_argument("--pairs", type=int, default=3, help="timings of each side")
    args = parser.parse_args()
    for section in args.only:
        keep(PAGE, section, measure(section, args.pairs))
    print(write(PAGE, "Circuits: speed", page(kept(PAGE)), script="circuits_speed"))


if __name__ == "__main__":
    main()
