"""How many failed questions a memory repairs on the bundled models, and which encoding wins.

``python -m benchmarks.injection_repair [--models hops-gpt2 hops-llama] [--limit 200]``

Failed held-out questions are halved. On the first half every setting (encoding, kind of place,
positions, layers alone and in windows, strength) is tried and the best cell chosen by the share of
questions whose first answer token becomes right; on the second half that cell is reported, with its
controls and intervals.
"""

from __future__ import annotations

import argparse
import random
import time

from benchmarks.harness import table, write
from mi_hops import Hopland, load_model
from mi_hops.injection.encodings import ENCODINGS
from mi_hops.injection.grid import injection_grid
from mi_hops.injection.select import Cell, cell_report, select_cell, split_halves
from mi_hops.metrics import target_of
from mi_hops.scoring import score_prompts
from mi_hops.tokens import encode

CONTROLS = ("random_word", "permuted_bridge", "norm_matched", "answer")
PLACES = {
    "first hop": "first hop", "last": "last", "first hop + last": ["first hop", "last"],
    "all": "all",
}  # fmt: skip
KINDS = ("attn_out", "resid_pre")
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


def search(model, facts, form, choose, report, relative=False):
    """(setting, cell, report) for the best cell of every setting and encoding."""
    by_id = {f.id: f for f in facts}
    found = []
    for kind in KINDS:
        for name, positions in PLACES.items():
            settings = {
                "form": form, "positions": positions, "kind": kind, "strengths": STRENGTHS,
                "layers": windows(model.cfg.n_layers), "relative": relative,
            }  # fmt: skip
            # Only the curated memory chooses; controls are run at the chosen cells.
            grid = injection_grid(
                model, [by_id[i] for i in choose], encodings=ENCODINGS, controls=(), **settings
            )
            for encoding in ENCODINGS:
                cell = select_cell(grid, encoding=encoding)
                found.append(((kind, name), cell, settings))
    out = []
    for setting, cell, settings in found:
        layers = str(cell.layer).split("+")
        settings = settings | {
            "layers": [tuple(map(int, layers))], "strengths": (cell.strength,),
            "encodings": (cell.encoding,),
        }  # fmt: skip
        grid = injection_grid(model, [by_id[i] for i in report], controls=CONTROLS, **settings)
        label = grid["layer"].values.tolist()[0]
        at = Cell(cell.encoding, label, cell.strength, cell.score, cell.n)
        out.append((setting, cell, cell_report(grid, at)))
    return out


def share(row, name="right"):
    """``23% [15, 33]``."""
    return f"{row[name]:.0%} [{row[f'{name}_lower']:.0%}, {row[f'{name}_upper']:.0%}]"


def best_rows(found):
    """One table row for the best setting of each encoding, by the half that chose."""
    rows = []
    for encoding in ENCODINGS:
        (kind, place), cell, report = max(
            (f for f in found if f[1].encoding == encoding), key=lambda f: f[1].score
        )
        rows.append(
            [
                encoding,
                kind,
                place,
                cell.layer,
                f"{cell.strength:g}",
                f"{cell.score:.0%}",
                int(report.loc["bridge", "n"]),
                share(report.loc["bridge"]),
                *(f"{report.loc[c, 'right']:.0%}" for c in CONTROLS),
            ]  # fmt: skip
        )
    return rows


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--forms", nargs="+", default=["suffix", "prefix"])
    parser.add_argument("--limit", type=int, default=200)
    asked = parser.parse_args()
    parts = []
    for name in asked.models:
        model = load_model(name)
        for form in asked.forms:
            start = time.perf_counter()
            facts = failed_questions(model, form, asked.limit)
            choose, report = split_halves([f.id for f in facts])
            rows = best_rows(search(model, facts, form, choose, report))
            columns = [
                "encoding", "added at", "positions", "layers", "strength", "right, choosing half",
                "n, other half", "right, other half [95%]",
                *(c.replace("_", " ") for c in CONTROLS),
            ]  # fmt: skip
            took = time.perf_counter() - start
            parts.append(
                f"## {name}, {form} prompts\n\n{len(facts)} failed questions; {took:.0f} s.\n\n"
                + table(columns, rows)
            )
            print(parts[-1], flush=True)
    body = (
        "Share of failed held-out questions whose first answer token becomes the model's first "
        "choice over the whole vocabulary. The cell is chosen on one half of the questions and "
        "reported, with its controls, on the other; the answer itself as the memory is the upper "
        "bound, not a control.\n\n" + "\n\n".join(parts)
    )
    print(write("injection_repair", "Memory injection: repairs", body, script="injection_repair"))


if __name__ == "__main__":
    main()
