"""How fast an edit is made and hundreds are scored, against the plain procedures; memory of C.

``python -m benchmarks.editing_speed [--pairs 5] [--edits 200]`` writes
``docs/benchmarks/editing-speed.md``. The model has the shape of a 100M-parameter LLaMA and random
weights.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import keep, kept, llama_100m, paired, table, write
from mi_hops.editing import (
    PAPER,
    EditRepair,
    Request,
    creme,
    creme_many,
    second_moments,
)
from mi_hops.facts.templates import CONTEXTS
from mi_hops.model import capture, hook_name, read_matrix, write_matrix
from mi_hops.sweep.metrics import target_of
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode, pad

LAYERS = tuple(range(3, 12))
#: As many contexts as the published code has.
TEMPLATES = (*CONTEXTS, *(f"w7 w8 {c}" for c in CONTEXTS))


def request(i: int) -> Request:
    """A two-hop question of 12 random words and its second hop."""
    g = torch.Generator().manual_seed(i)
    words = [f"w{int(n)}" for n in torch.randint(100, 30000, (16,), generator=g)]
    bridge = " ".join(words[9:12])
    return Request(
        two_hop_prompt=" ".join([*words[:9], "w50"]),
        second_hop_prompt=" ".join([*words[:3], bridge, "w50"]),
        bridge=bridge,
        target=" ".join(words[12:14]),
        first_hop=" ".join(words[3:9]),
        id=str(i),
    )


def layer_by_layer(model: Any, asked: Request) -> list[torch.Tensor]:
    """The published procedure: three passes over the prompts per layer, full depth, weights edited."""
    comps = pad([encode(model, t.replace("{}", asked.two_hop_prompt)).ids for t in TEMPLATES])
    guides = pad([encode(model, t.replace("{}", asked.second_hop_prompt)).ids for t in TEMPLATES])
    rows = torch.arange(len(TEMPLATES))
    originals = {layer: read_matrix(model, "W_O", layer) for layer in LAYERS}
    changes = []
    try:
        for layer in LAYERS:
            z, out = hook_name("z", layer), hook_name("attn_out", layer)
            with torch.no_grad():
                keys = capture(model, comps.tokens, [z], logits=True)[0][z].flatten(2)
                own = capture(model, comps.tokens, [out], logits=True)[0][out]
                wanted = capture(model, guides.tokens, [out], logits=True)[0][out]
            k = keys[rows, comps.last].mean(0)
            change = wanted[rows, guides.last].mean(0) - own[rows, comps.last].mean(0)
            changes.append(torch.outer(k / (k @ k), change))
            write_matrix(model, "W_O", layer, originals[layer] + changes[-1])
    finally:
        for layer, weight in originals.items():
            write_matrix(model, "W_O", layer, weight)
    return changes


def making(pairs: int) -> list[str]:
    """One edit in one pass against the procedure; the same edit."""
    model, asked = llama_100m(), request(0)
    settings = {**PAPER, "layers": LAYERS, "templates": TEMPLATES}
    plain, ours = layer_by_layer(model, asked), creme(model, asked, **settings)
    worst = max(
        float((c.delta() - p).abs().max() / p.abs().max())
        for c, p in zip(ours.changes, plain, strict=True)
    )
    found = paired(
        lambda: creme(model, asked, **settings), lambda: layer_by_layer(model, asked), pairs=pairs
    )
    return row(
        "one CREME edit, 9 layers, 22 templates", found, f"{worst:.1e} of the largest element"
    )


def scoring(pairs: int, n_edits: int, n_queries: int = 10) -> list[list[str]]:
    """Edits scored in batches by hooks against apply, score, undo: an edit's queries at once, or singly."""
    model = llama_100m()
    edits = creme_many(
        model, [request(i) for i in range(n_edits)], layers=LAYERS, templates=("{}",), **PAPER
    )
    texts = [request(1000 + i) for i in range(n_edits * n_queries)]
    prompts = [encode(model, r.two_hop_prompt) for r in texts]
    targets = [target_of(model, p, r.target) for p, r in zip(prompts, texts, strict=True)]

    def batched() -> torch.Tensor:
        states = [edits[i // n_queries] for i in range(len(prompts))]
        return score_prompts(
            model,
            prompts,
            targets,
            "first_prob",
            batch_size=128,
            repair=EditRepair(edits[0]),
            states=states,
        )["first_prob"]

    def one_by_one(at_once: int) -> torch.Tensor:
        found = []
        for i, edit in enumerate(edits):
            with edit.applied(model, check=False):
                for start in range(i * n_queries, (i + 1) * n_queries, at_once):
                    mine = slice(start, start + at_once)
                    score = score_prompts(model, prompts[mine], targets[mine], "first_prob")
                    found.append(score["first_prob"])
        return torch.cat(found)

    rows = []
    for at_once, how in ((n_queries, "an edit's queries in one pass"), (1, "one query a pass")):
        worst = float((batched() - one_by_one(at_once)).abs().max())
        found = paired(batched, lambda: one_by_one(at_once), pairs=pairs, warm_up=False)  # noqa: B023
        what = f"{n_edits} edits x {n_queries} queries scored; plain: {how}"
        rows.append(row(what, found, f"{worst:.1e} in probability"))
    return rows


def row(what: str, found: dict[str, Any], difference: str) -> list[str]:
    """A row of the table of pairs."""
    return [
        what,
        f"{found['ours_s']:.2f}",
        f"{found['theirs_s']:.2f}",
        f"{found['ratio']:.1f} ({found['lowest']:.1f} to {found['highest']:.1f})",
        str(found["pairs"]),
        difference,
    ]


def memory(sizes: Sequence[int]) -> list[list[str]]:
    """Peak resident memory after counting C over more and more text; it only ever grows."""
    model = llama_100m()
    rows = []
    for n in sizes:
        texts = (" ".join(f"w{(7 * i + j) % 30000}" for j in range(63)) for i in range(n // 64))
        moments = second_moments(model, texts, layers=LAYERS, max_tokens=2048)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([f"{moments.n:,}", f"{peak:,.0f}"])
    return rows


COLUMNS = ("what", "ours, s", "plain, s", "times faster (range)", "pairs", "difference")
SECTIONS = ("making", "scoring", "memory")
PAGE = "editing-speed"


def page(found: dict[str, list[list[str]]]) -> str:
    """What has been measured so far."""
    timed = [row for section in ("making", "scoring") for row in found.get(section, [])]
    parts = [
        "A LLaMA of about 100M parameters with random weights, 9 of 14 layers edited. *Plain* is, for "
        "making an edit, the published procedure (three full passes over 22 prompts per layer), and for "
        "scoring, applying an edit to the weights, scoring its queries, and undoing it.",
        table(COLUMNS, timed),
    ]
    if moments := found.get("memory"):
        title = "## Second moments of z at 9 layers"
        parts += [title, table(("tokens counted", "peak MB so far"), moments)]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args()
    for section in given.only:
        if section == "making":
            rows = [making(given.pairs)]
        elif section == "scoring":
            rows = scoring(given.pairs, given.edits)
        else:
            rows = memory((4096, 16384, 65536))
        print(table(["" for _ in rows[0]], rows), flush=True)
        keep(PAGE, section, rows)
        write(PAGE, "Speed of editing", page(kept(PAGE)), script="editing_speed")


if __name__ == "__main__":
    main()
