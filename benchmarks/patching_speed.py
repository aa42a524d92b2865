"""Patching sweeps against TransformerLens's loops, nnsight and pyvene; how cost grows; what is possible.

``python -m benchmarks.patching_speed [--only NAME ...] [--pairs 5]`` writes
``docs/benchmarks/patching-speed.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.harness import Peak, gpt2_small, keep, kept, llama_100m, paired, table, write
from mi_hops.model import backend_of
from mi_hops.patching import PatchJob, patch
from mi_hops.sweep import Limits
from mi_hops.sweep.fanout import plan_fan_out
from mi_hops.sweep.runs import Sweep
from mi_hops.text.tokens import Prompt

SWEEPS = ("resid_pre", "attn_out", "mlp_out", "z")
RIGHT, WRONG = 7, 11  # the two tokens whose logits are compared


def difference(logits: torch.Tensor) -> torch.Tensor:
    """The metric of every sweep here."""
    return logits[:, RIGHT] - logits[:, WRONG]


def prompts(model: Any, n: int, count: int, seed: int) -> list[Prompt]:
    """Random token sequences as prompts."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(20, int(model.cfg.d_vocab), (count, n), generator=g).tolist()
    return [
        Prompt(" ".join(map(str, r)), tuple(r), tuple(map(str, r)), ((0, 0),) * n, False)
        for r in rows
    ]


def ours(model: Any, kind: str, clean: list[Prompt], corrupted: list[Prompt]) -> Callable[[], Any]:
    """Our sweep as a user calls it; activations of the clean run included."""

    def call() -> Any:
        limits = Limits(batch_size=len(clean))
        found = patch(model, (clean, corrupted), kind, metric=difference, limits=limits)
        return found["score"].values

    return call


def theirs(
    model: Any, kind: str, clean: list[Prompt], corrupted: list[Prompt]
) -> Callable[[], Any]:
    """TransformerLens's own sweep, its cache included; with many pairs its loop over batches."""
    from transformer_lens import patching

    sweep = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
        "z": patching.get_act_patch_attn_head_out_all_pos,
    }[kind]
    tokens = [torch.tensor([p.ids for p in side]) for side in (clean, corrupted)]

    def call() -> Any:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens[0], names_filter=lambda n: n.endswith(f"hook_{kind}")
            )
            # It keeps one number per cell: the mean over pairs.
            return sweep(model, tokens[1], cache, lambda x: difference(x[:, -1]).mean())

    return call


# -- operation counts ---------------------------------------------------------------------------------


def flops_per_token(model: Any, width: int) -> tuple[float, float]:
    """Multiply-adds x 2 of one token through the attention and through the MLP of one block."""
    cfg = model.cfg
    d, heads = cfg.d_model, cfg.n_heads * cfg.d_head
    kv = (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
    gates = 3 if getattr(cfg, "gated_mlp", False) else 2
    return 2.0 * (d * (2 * heads + 2 * kv) + 2 * heads * width), 2.0 * gates * d * cfg.d_mlp


def of_a_row(model: Any, kind: str, layer: int, tokens: int, width: int) -> float:
    """Operations of one row of `tokens` that is changed at a site; a base counts as changed at 0.

    A HookedTransformer's row starts behind what the site leaves as it is, and only its scored token
    passes the last MLP, where that is not changed itself.
    """
    attention, mlp = flops_per_token(model, width)
    cfg, last = model.cfg, int(model.cfg.n_layers) - 1
    hooked = backend_of(model) == "hooked"
    behind = {"attn_out": 1, "resid_mid": 1, "mlp_out": 2}.get(kind, 0) if hooked else 0
    mlps = last + 1 - layer - (behind == 2 and layer < last)
    whole = not hooked or (kind == "mlp_out" and layer == last)
    return (
        tokens * (last + 1 - layer - (behind > 0)) * attention
        + (tokens * (mlps - 1) + (tokens if whole else 1)) * mlp
        + 2.0 * cfg.d_model * cfg.d_vocab
    )


def counted(
    model: Any, kind: str, clean: list[Prompt], corrupted: list[Prompt]
) -> tuple[float, float]:
    """Operations of our sweep and of one full forward pass per cell."""
    limits = Limits(batch_size=len(clean))
    job = PatchJob(model, (clean, corrupted), kind, metric=difference, limits=limits)
    sweep = Sweep(model, job.scored())
    items = [
        item
        for i in range(len(clean))
        for item in job.sweep.interventions(i, i, lambda *_: lambda x: x)
    ]
    width = len(clean[0])
    total = 2 * len(clean) * of_a_row(model, "resid_pre", 0, width, width)  # sources and bases
    for step in plan_fan_out(model, sweep.batch, items, scored=sweep.scored):
        for i in step.members:
            site = min(items[i].sites, key=lambda site: site.layer)
            total += of_a_row(model, site.kind, site.layer, width - step.start, width)
    layers, unembed = int(model.cfg.n_layers), 2.0 * model.cfg.d_model * model.cfg.d_vocab
    loop = len(items) * width * (layers * sum(flops_per_token(model, width)) + unembed)
    return total, loop


def matmul_rate(model: Any) -> float:
    """Operations a second of a product like the MLP's, at 512 tokens."""
    a, b = torch.randn(512, model.cfg.d_model), torch.randn(model.cfg.d_model, model.cfg.d_mlp)
    for _ in range(3):
        a @ b
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    return 20 * 2.0 * a.numel() * b.shape[1] / (time.perf_counter() - start)


# -- sections ------------------------------------------------------------------------------------------


def against_loops(
    model: Any, label: str, cases: list[tuple[str, int, int]], pairs: int
) -> list[list[Any]]:
    """Rows for (kind, positions, prompt pairs)."""
    rows = []
    rate = matmul_rate(model)
    for kind, n, count in cases:
        clean, corrupted = prompts(model, n, count, 1), prompts(model, n, count, 2)
        mine, other = ours(model, kind, clean, corrupted), theirs(model, kind, clean, corrupted)
        error = (torch.as_tensor(mine()).mean(0) - other().cpu()).abs().max().item()
        times = paired(mine, other, pairs=pairs, warm_up=False)
        few, many = counted(model, kind, clean, corrupted)
        rows.append(
            [
                label,
                kind,
                n,
                count,
                f"{error:.1e}",
                f"**{times['ratio']:.1f}** ({times['lowest']:.1f} to {times['highest']:.1f})",
                f"{many / few:.1f}",
                f"{few / times['ours_s'] / rate:.0%}",
                f"{times['ours_s']:.2f}",
                f"{times['theirs_s']:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    return rows


LOOP_COLUMNS = [
    "model",
    "sweep",
    "positions",
    "prompt pairs",
    "largest difference",
    "times faster: median (range)",
    "fewer operations, times",
    "of the matrix-product rate",
    "ours, s",
    "loop, s",
]


def against_libraries(model_hf: Any, n: int, pairs: int) -> list[list[Any]]:
    """The residual sweep in nnsight's and pyvene's natural code, where they are installed."""
    rows: list[list[Any]] = []
    model = model_hf
    clean, corrupted = prompts(model, n, 1, 1), prompts(model, n, 1, 2)
    mine = ours(model, "resid_pre", clean, corrupted)
    expected = torch.as_tensor(mine())[0]
    for name, make in (("nnsight", nnsight_sweep), ("pyvene", pyvene_sweep)):
        try:
            call = make(model, clean[0], corrupted[0])
        except ImportError as error:
            print(f"{name} is not installed ({error}); left out", flush=True)
            continue
        error = (call() - expected).abs().max().item()
        times = paired(mine, call, pairs=pairs, warm_up=False)
        rows.append(
            [
                name,
                n,
                f"{error:.1e}",
                f"**{times['ratio']:.1f}** ({times['lowest']:.1f} to {times['highest']:.1f})",
                f"{times['ours_s']:.2f}",
                f"{times['theirs_s']:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    return rows


def hugging_face_twin(model: Any) -> Any:
    """The same GPT-2 as a plain Hugging Face model, for libraries that wrap those."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)  # as `harness.gpt2_small`
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


def nnsight_sweep(model: Any, clean: Prompt, corrupted: Prompt) -> Callable[[], torch.Tensor]:
    """One trace per cell: set a block's input at a position, save the last logits."""
    from nnsight import NNsight

    wrapped = NNsight(hugging_face_twin(model))
    tokens = [torch.tensor([p.ids]) for p in (clean, corrupted)]
    layers, width = int(model.cfg.n_layers), len(clean)

    def call() -> torch.Tensor:
        out = torch.zeros(layers, width)
        with torch.no_grad():
            states = []
            for layer in range(layers):
                with wrapped.trace(tokens[0]):
                    state = wrapped.transformer.h[layer].input.save()
                states.append(state)
            for layer in range(layers):
                for pos in range(width):
                    with wrapped.trace(tokens[1]):
                        wrapped.transformer.h[layer].input[:, pos] = states[layer][:, pos]
                        logits = wrapped.lm_head.output[:, -1].save()
                    out[layer, pos] = difference(logits)[0]
        return out

    return call


def pyvene_sweep(model: Any, clean: Prompt, corrupted: Prompt) -> Callable[[], torch.Tensor]:
    """One intervenable model a layer, one call a position."""
    import pyvene

    twin = hugging_face_twin(model)
    tokens = [{"input_ids": torch.tensor([p.ids])} for p in (clean, corrupted)]
    layers, width = int(model.cfg.n_layers), len(clean)
    wrapped = [
        pyvene.IntervenableModel(
            {
                "layer": layer,
                "component": "block_input",
                "intervention_type": pyvene.VanillaIntervention,
            },
            twin,
        )
        for layer in range(layers)
    ]

    def call() -> torch.Tensor:
        out = torch.zeros(layers, width)
        with torch.no_grad():
            for layer in range(layers):
                for pos in range(width):
                    _, changed = wrapped[layer](tokens[1], [tokens[0]], {"sources->base": pos})
                    out[layer, pos] = difference(changed.logits[:, -1])[0]
        return out

    return call


def growth() -> list[list[Any]]:
    """Seconds, memory and operations of the residual sweep as each size grows."""
    rows: list[list[Any]] = []
    for what, sizes in GROWTH.items():
        for value in sizes:
            size = {**SMALL, what: value}
            # A process each: what one sweep freed would serve the next.
            with get_context("spawn").Pool(1) as pool:
                rows.append([what, *size.values(), *pool.apply(grown, (size,))])
            print(rows[-1], flush=True)
    return rows


def grown(size: dict[str, int]) -> list[str]:
    """One sweep of the given size, in a process of its own."""
    model = gpt2_small(layers=size["layers"], vocabulary=size["vocabulary"])
    sides = [prompts(model, size["positions"], size["pairs"], seed) for seed in (1, 2)]
    rate = matmul_rate(model)
    ours(model, "resid_pre", *(prompts(model, 4, 1, seed) for seed in (1, 2)))()
    call = ours(model, "resid_pre", *sides)
    with Peak() as peak:
        call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    few, many = counted(model, "resid_pre", *sides)
    limits = Limits(batch_size=size["pairs"])
    planned = PatchJob(model, tuple(sides), "resid_pre", metric=difference, limits=limits).plan()
    return [
        f"{planned.rows:,}",
        f"{few / 1e9:.0f}",
        f"{many / few:.1f}",
        f"{seconds:.2f}",
        f"{few / seconds / rate:.0%}",
        f"{peak.mib:.0f}",
        f"{planned.bytes / 2**20:.0f}",
    ]


LIBRARY_COLUMNS = [
    "library",
    "positions",
    "largest difference",
    "times faster: median (range)",
    "ours, s",
    "theirs, s",
]
GROWTH_COLUMNS = [
    "what grows",
    "layers",
    "vocabulary",
    "positions",
    "pairs",
    "rows",
    "Gflop",
    "fewer operations, times",
    "seconds",
    "of the matrix-product rate",
    "peak MiB",
    "MiB by `PatchJob.plan`",
]
SMALL = {"layers": 12, "vocabulary": 50257, "positions": 16, "pairs": 1}
GROWTH = {
    "layers": (6, 12, 24),
    "vocabulary": (5000, 50257, 200000),
    "positions": (8, 16, 32, 64),
    "pairs": (1, 4, 16),
}
#: Section -> (kind, positions, prompt pairs).
LOOPS = {
    "resid_pre": [("resid_pre", 16, 1), ("resid_pre", 32, 1)],
    "attn_out-16": [("attn_out", 16, 1)],
    "attn_out-32": [("attn_out", 32, 1)],
    "mlp_out-16": [("mlp_out", 16, 1)],
    "mlp_out-32": [("mlp_out", 32, 1)],
    "z": [("z", 32, 1)],
    "many": [("resid_pre", 8, 64)],
}
SECTIONS = (*LOOPS, "llama", "libraries", "growth")
PAGE = "patching-speed"


def measure(section: str, pairs: int) -> list[list[Any]]:
    """The rows of one section."""
    if section == "llama":
        return against_loops(
            llama_100m(), "LLaMA 100M, grouped-query", [("resid_pre", 16, 1)], pairs
        )
    if section == "growth":
        return growth()
    small = gpt2_small()
    if section in LOOPS:
        few = min(pairs, 3) if section == "many" else pairs
        return against_loops(small, "GPT-2 small", LOOPS[section], few)
    return against_libraries(small, 16, min(pairs, 3)) if backend_of(small) == "hooked" else []


def page(found: dict[str, list[list[Any]]]) -> str:
    """What has been measured so far."""
    parts = []
    if loops := [row for name in (*LOOPS, "llama") for row in found.get(name, [])]:
        parts.append(
            "## Against TransformerLens's loops\n\nThe loop runs one full forward pass per cell; `patch` "
            "runs as a user calls it, including the clean run's activations and all labels. "
            "*Fewer operations* is the ratio of multiplications, which an ideal machine would gain. "
            "Models have random weights; a cell's value is a logit difference at "
            "the last token. Seconds are from each section's own run.\n\n"
            + table(LOOP_COLUMNS, loops)
        )
    if found.get("libraries"):
        parts.append(
            "## Against other libraries\n\nThe residual sweep of GPT-2 small in each library's idiomatic "
            "code: one traced or intervened call per cell.\n\n"
            + table(LIBRARY_COLUMNS, found["libraries"])
        )
    if found.get("growth"):
        parts.append(
            "## How cost grows\n\nThe residual sweep of a GPT-2 of width 768, one run each. *Peak* is the "
            "additional memory that the process's first sweep takes at most; the last column is what "
            "`PatchJob.plan` predicts for its rows and its copies of weights.\n\n"
            + table(GROWTH_COLUMNS, found["growth"])
        )
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    for section in asked.only:
        keep(PAGE, section, measure(section, asked.pairs))
        print(write(PAGE, "Patching: speed", page(kept(PAGE)), script="patching_speed"))


if __name__ == "__main__":
    main()
