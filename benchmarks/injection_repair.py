"""How many failed questions a memory repairs on the bundled models, and which encoding wins.

``python -m benchmarks.injection_repair [--models hops-gpt2 hops-llama] [--limit 200]``

Failed held-out questions are halved. On the first half every setting (encoding, kind of place,
positions, layers alone and in windows, strength) is tried; of each encoding's most promising cells the
one is chosen that corrects most questions and is at least four times as good as every control; on the
second half that cell is reported, with its controls and intervals.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.harness import keep, kept, table, write
from mi_hops import Hopland, encode, injection_grid, load_model, score_prompts
from mi_hops.injection import ENCODINGS, STREAMS, Cell, Place, cell_report
from mi_hops.result import split_halves
from mi_hops.sweep import target_of

FAIR = ("random_word", "permuted_bridge", "norm_matched")
CONTROLS = (*FAIR, "answer")
PAGE = "injection-repair"
PROMISING = 12  # cells of an encoding that are compared with their controls
ABOUT = (
    "Share of failed held-out questions for which the first answer token becomes the "
    "model's top choice over the whole vocabulary. For each encoding, the 12 cells that "
    "correct the most questions of one half are run again there with their controls; of "
    "these, the cell is chosen that maximises the share corrected, times the smaller of 1 "
    "and a quarter of its ratio to the largest control. It is reported, with its controls, "
    "on the other half. Injecting the answer itself is an upper bound, not a control."
)
PLACES = {
    "first hop": "first hop", "last": "last", "first hop + last": ["first hop", "last"],
    "everywhere": "everywhere",
}  # fmt: skip
KINDS = STREAMS[:2]
STRENGTHS = (0.5, 1, 2, 3, 4, 6, 8, 12)


def failed_questions(model, form, limit, seed=0):
    """Held-out two-hop questions whose first answer token is wrong, in random order."""
    facts = Hopland().two_hop_facts("seen_parts", "first_unseen", "second_unseen")
    random.Random(seed).shuffle(facts)
    facts = [f for f in facts if form in f.prompts][: 6 * limit]
    prompts = [encode(model, f.prompt(form)) for f in facts]
    targets = [target_of(model, p, f.answer) for p, f in zip(prompts, facts, strict=True)]
    ranks = score_prompts(model, prompts, targets, "rank")["rank"].tolist()
    return [f for f, rank in zip(facts, ranks, strict=True) if rank > 1][:limit]


def windows(n_layers):
    """Every layer alone, every window of two and three, and all layers from one on."""
    found = [(i,) for i in range(n_layers)]
    found += [tuple(range(i, i + k)) for k in (2, 3) for i in range(n_layers - k + 1)]
    found += [tuple(range(i, n_layers)) for i in range(n_layers)]
    return list(dict.fromkeys(found))


def search(model, facts, form, choose, report):
    """Encoding -> (kind, place, cell, the other half's report), the cell chosen by `worth`."""
    by_id = {f.id: f for f in facts}
    first, second = ([by_id[i] for i in half] for half in (choose, report))
    layers = windows(model.cfg.n_layers)
    found = {encoding: [] for encoding in ENCODINGS}
    for kind in KINDS:
        for place, positions in PLACES.items():
            settings = {"form": form, "positions": Place(positions, kind)}
            # Controls are run at the most promising cells only.
            grid = injection_grid(
                model, first, encodings=ENCODINGS, controls=(), strengths=STRENGTHS,
                layers=layers, **settings,
            )  # fmt: skip
            right = grid["first_correct"].sel(memory="bridge").mean("example")
            for encoding in ENCODINGS:
                best = right.sel(encoding=encoding).to_series().nlargest(PROMISING)
                for (layer, strength), score in best.items():
                    one = settings | {
                        "encodings": (encoding,), "layers": [tuple(grid.provenance["layers"][str(layer)])],
                        "strengths": (strength,),
                    }  # fmt: skip
                    found[encoding].append((score, kind, place, one))
    chosen = {}
    for encoding, cells in found.items():
        cells.sort(key=lambda c: -c[0])
        reports = [(at_cell(model, first, c[-1]), c) for c in cells[:PROMISING]]
        said, (_, kind, place, one) = max(reports, key=lambda r: worth(r[0]))
        chosen[encoding] = (kind, place, one, said, at_cell(model, second, one))
    return chosen


def at_cell(model, facts, settings):
    """The report of one cell, controls included."""
    grid = injection_grid(model, facts, controls=CONTROLS, **settings)
    labels = [grid[d].values.tolist()[0] for d in ("encoding", "layer", "strength")]
    return cell_report(grid, Cell(*labels, score=float("nan"), n=len(facts)))


def worth(report):
    """Share corrected; less where it is not four times that of every control."""
    right = report.loc["bridge", "correct"]
    worst = report.loc[list(FAIR), "correct"].max()
    return right * min(1.0, right / (4 * worst)) if worst else right


def share(row, name="correct"):
    """``23% [15, 33]``."""
    return f"{row[name]:.0%} [{row[f'{name}_lower']:.0%}, {row[f'{name}_upper']:.0%}]"


def rows_of(chosen):
    """One table row per encoding."""
    rows = []
    for encoding, (kind, place, settings, first, second) in chosen.items():
        worst = second.loc[list(FAIR), "correct"].max()
        right = second.loc["bridge", "correct"]
        rows.append(
            [
                encoding,
                kind,
                place,
                "+".join(map(str, settings["layers"][0])),
                f"{settings['strengths'][0]:g}",
                f"{first.loc['bridge', 'correct']:.0%}",
                int(second.loc["bridge", "n"]),
                share(second.loc["bridge"]),
                *(f"{second.loc[c, 'correct']:.0%}" for c in FAIR),
                f"{right / worst:.1f}" if worst else "-",
                f"{second.loc['answer', 'correct']:.0%}",
            ]  # fmt: skip
        )
    return rows


COLUMNS = [
    "encoding", "added at", "positions", "layers", "strength", "correct, choosing half",
    "n, other half", "correct, other half [95%]", *(c.replace("_", " ") for c in FAIR),
    "times the largest control", "answer (upper bound)",
]  # fmt: skip


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--forms", nargs="+", default=["suffix", "prefix"])
    parser.add_argument("--limit", type=int, default=300)
    asked = parser.parse_args()
    for name in asked.models:
        model = load_model(name)
        for form in asked.forms:
            facts = failed_questions(model, form, asked.limit)
            choose, report = split_halves([f.id for f in facts])
            part = f"## {name}, {form} prompts: {len(facts)} failed questions\n\n" + table(
                COLUMNS, rows_of(search(model, facts, form, choose, report))
            )
            print(part, flush=True)
            keep(PAGE, f"{name}-{form}", part)
            body = "\n\n".join([ABOUT, *kept(PAGE).values()])
            write(PAGE, "Memory injection: repairs", body, script="injection_repair")


if __name__ == "__main__":
    main()
