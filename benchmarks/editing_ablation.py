"""Which choices in CREME matter: layers, templates, C and its shrinkage, what is matched, what is kept.

``python -m benchmarks.editing_ablation [--model hops-gpt2 hops-llama] [--cases 100]`` writes
``docs/benchmarks/editing-ablation.md``. One choice is varied at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.editing_setup import COLUMNS, FORM, Setup, covariance, score, set_up
from benchmarks.harness import keep, kept, table, write
from mi_hops.editing import PAPER, CremeRepair, second_moments
from mi_hops.facts.templates import CONTEXTS
from mi_hops.reasoning.locate import locate, located_layers

PAGE = "editing-ablation"


def variants(setup: Setup) -> Iterator[tuple[str, CremeRepair]]:
    """(group, repair)."""
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
    base = {"layers": parts["late"], "form": FORM, "covariance": c, "strength": 1.0}

    def one(name: str, **changes: object) -> CremeRepair:
        return CremeRepair(name=name, **{**base, **changes})  # type: ignore[arg-type]

    yield "as called", CremeRepair(form=FORM, name="creme(model, fact)")
    yield "as called", CremeRepair(form=FORM, name="creme(model, fact, covariance=c)", covariance=c)
    for strength in (1.0, 0.7, 0.5, 0.3):
        yield "strength", one(f"strength {strength}", strength=strength)
    for where, layers in parts.items():
        yield "layers", one(f"{where} ({', '.join(map(str, layers))})", layers=layers)
    for where, layers in parts.items():
        yield "layers, paper's edit", one(f"paper, {where}", layers=layers, **PAPER)
    yield "templates", one("5 templates", templates=CONTEXTS[:5])
    yield "templates", one("1 template", templates=CONTEXTS[:1])
    for share in (0.001, 0.01, 0.1, 0.5):
        yield "C", one(f"C, shrinkage {share}", covariance=c.with_shrinkage(share))
    yield "C", one("C = I", covariance=None)
    last = second_moments(setup.model, setup.corpus, positions="last")
    yield "C", one("C of last tokens only", covariance=last)
    for match, target in (("residual", "clean"), ("attention", "edited"), ("attention", "clean")):
        yield "match and target", one(f"{match}, {target}", match=match, target=target)
    for slack in (0.0, 1.0):
        yield "kept prompts", one(f"both hops kept, slack {slack}", slack=slack)
    yield "kept prompts", one("nothing kept", keep=None)
    for position, where in (("last", "last token"), ("first hop", "first hop's last token")):
        name = f"first token covered, key at the {where}"
        yield "key", one(name, position=position, cover="first")


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="groups to measure again")
    given = parser.parse_args()
    for name in given.model:
        setup = set_up(name, cases=given.cases)
        old = kept(PAGE).get(name.split("/")[-1], {}).get("groups", {}) if given.only else {}
        groups: dict[str, list[list[str]]] = {"as called": [], **old}
        groups |= {group: [] for group in given.only or ()}
        for group, repair in variants(setup):
            if given.only and group not in given.only:
                continue
            groups.setdefault(group, []).extend(score(setup, [repair]))
            print(group, "|", " | ".join(groups[group][-1]), flush=True)
            keep(PAGE, name.split("/")[-1], {"n": len(setup.report), "groups": groups})
            write(PAGE, "Which choices in CREME matter", page(), script="editing_ablation")


def page() -> str:
    """What has been measured so far."""
    parts = [
        f"Unless a row says otherwise: the last third of the layers, strength 1, {len(CONTEXTS)} "
        'templates, C by Ledoit and Wolf\'s rule over all tokens, `match="residual"`, '
        '`target="edited"`, both hops kept with slack 0.1, the whole answer covered (the row '
        "*strength 1.0*). Each row varies one choice, all on the same questions; no setting was chosen "
        "by these rows."
    ]
    for name, found in kept(PAGE).items():
        parts.append(f"## {name}: {found['n']} failed held-out questions")
        for group, rows in found["groups"].items():
            parts += [f"### {group}", table(COLUMNS, rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
