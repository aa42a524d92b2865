"""What of CREME matters: layers, templates, C and its shrinkage, what is matched, what is kept.

``python -m benchmarks.editing_ablation [--model hops-gpt2 hops-llama] [--cases 150]`` writes
``docs/benchmarks/editing-ablation.md``. One choice is varied at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.editing_setup import COLUMNS, FORM, Setup, covariance, score, set_up
from benchmarks.harness import table, write
from mi_hops.editing import PAPER, CremeRepair, second_moments
from mi_hops.facts.templates import CONTEXTS
from mi_hops.reasoning.locate import locate, located_layers


def variants(setup: Setup) -> Iterator[tuple[str, CremeRepair]]:
    """(group, repair); the first of a group is the default."""
    n, c = setup.n_layers, covariance(setup)
    third = max(1, n // 3)
    parts = {
        "early": range(third),
        "middle": range(third, n - third),
        "late": range(n - third, n),
        "all": range(n),
    }
    found = locate(setup.model, setup.choose[:60], form=FORM, kinds=("attn_out",))
    if located := located_layers(found):
        parts["located"] = located
    base = {"layers": parts["late"], "form": FORM, "covariance": c}

    def one(name: str, **changes: object) -> CremeRepair:
        return CremeRepair(name=name, **{**base, **changes})  # type: ignore[arg-type]

    for where, layers in parts.items():
        yield "layers", one(f"{where} ({', '.join(map(str, layers))})", layers=layers)
    for where, layers in parts.items():
        yield "layers, paper's edit", one(f"paper, {where}", layers=layers, **PAPER)
    for k in (len(CONTEXTS), 5, 1):
        yield "templates", one(f"{k} templates", templates=CONTEXTS[:k])
    yield "C", one("C, Ledoit-Wolf")
    for share in (0.001, 0.01, 0.1, 0.5):
        yield "C", one(f"C, shrinkage {share}", covariance=c.with_shrinkage(share))
    yield "C", one("C = I", covariance=None)
    last = second_moments(setup.model, setup.corpus, positions="last")
    yield "C", one("C of last tokens only", covariance=last)
    for match in ("residual", "attention"):
        for target in ("edited", "clean"):
            yield "match and target", one(f"{match}, {target}", match=match, target=target)
    for keep in ("hops", None):
        for slack in (0.0, 0.1, 1.0) if keep else (0.1,):
            yield "kept prompts", one(f"keep {keep}, slack {slack}", keep=keep, slack=slack)
    for cover in ("answer", "first"):
        yield "answer tokens covered", one(f"cover {cover}", cover=cover)
    for position in ("last", "subject"):
        yield "position", one(f"key at the {position} token", position=position, cover="first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--only", nargs="+", help="groups")
    given = parser.parse_args()
    parts = [
        "Unless a row says otherwise: the last third of the layers, C by Ledoit and Wolf's rule, the "
        "package's defaults."
    ]
    for name in given.model:
        setup = set_up(name, cases=given.cases)
        groups: dict[str, list[list[str]]] = {}
        for group, repair in variants(setup):
            if given.only and group not in given.only:
                continue
            groups.setdefault(group, []).extend(score(setup, [repair]))
            print(group, "|", " | ".join(groups[group][-1]), flush=True)
        parts.append(f"## {name.split('/')[-1]}: {len(setup.report)} failed held-out questions")
        for group, rows in groups.items():
            parts += [f"### {group}", table(COLUMNS, rows)]
    if not given.only:
        body = "\n\n".join(parts)
        print(write("editing-ablation", "What of CREME matters", body, script="editing_ablation"))


if __name__ == "__main__":
    main()
