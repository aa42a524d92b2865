"""The gap by number of hops, the order of bridges in the lens, and repairs from each bridge.

``python -m benchmarks.chains [--models hops-gpt2 hops-llama] [--n 200] [--only gap lens repair]``;
``--models smollm2-135m`` asks that model geo's chains after three worked examples (gap and lens).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import keep, kept, table, write
from mi_hops import (
    CremeRepair,
    Hopland,
    TwoHopFact,
    answered,
    fact_trajectories,
    find_gap,
    injection_grid,
    load_model,
    second_moments,
    split_halves,
)
from mi_hops.facts import load_chains, with_lead
from mi_hops.lens import who_comes_first
from mi_hops.reasoning import Gap
from mi_hops.result.statistics import proportion_ci
from mi_hops.text import fact_texts
from mi_hops.text.matching import matches

PAGE, REAL = "chains", "smollm2-135m"
#: The order that the real model knows most in (see the page on it), and the bundled ones' usual one.
FORMS = {REAL: "prefix"}
SHOTS = 3
LENS_MOST, REPAIR_MOST, UNRELATED = 150, 120, 3
STRENGTHS = (1, 2, 4, 8)


def share(yes: Sequence[Any]) -> str:
    """``37.8% [35.1, 40.5], n = 1290``."""
    n, k = len(yes), int(sum(map(bool, yes)))
    if not n:
        return "no case"
    low, high = proportion_ci(k, n)
    return f"{k / n:.1%} [{100 * low:.1f}, {100 * high:.1f}], n = {n}"


def asked_facts(name: str, n: int) -> tuple[list[TwoHopFact], list[TwoHopFact]]:
    """Two-hop facts of their own, and chains."""
    if name != REAL:
        world = Hopland()
        rng = random.Random(0)
        splits = ("train", "seen_parts", "first_unseen", "second_unseen")
        twos = [fact for split in splits for fact in rng.sample(world.two_hop_facts(split), n)]
        return twos, [*world.chain_facts(3, n=n), *world.chain_facts(4, n=n // 2)]
    chains = load_chains()
    examples = [fact for fact in chains if fact.split == "choosing"]
    drawn = random.Random(0).sample([f for f in chains if f.split == "reported"], n)
    return [], [with_lead(fact, examples, shots=SHOTS) for fact in drawn]


def drawn(facts: Sequence[TwoHopFact], n_hops: int, most: int) -> list[TwoHopFact]:
    """At most so many of the facts of a number of hops, parts left out, of all splits alike."""
    whole = [fact for fact in facts if fact.n_hops == n_hops and "[" not in fact.id]
    return random.Random(4).sample(whole, min(most, len(whole)))


def parts_of(chains: Sequence[TwoHopFact]) -> list[TwoHopFact]:
    """Every shorter chain inside each."""
    return [
        fact.part(first, last)
        for fact in chains
        for first in range(1, fact.n_hops)
        for last in range(first + 1, fact.n_hops + 1)
        if (first, last) != (1, fact.n_hops)
    ]


# -- the gap --------------------------------------------------------------------------------------


def gap_part(gap: Gap, chains: Sequence[TwoHopFact], world: Hopland | None) -> str:
    """The gap by hops and split, on parts of the same chains, and what failures say."""
    frame = gap.frame.set_index("id")
    frame["known"] = frame["first"] & frame["second"]
    whole = frame[~frame.index.str.contains(r"\[\d")]
    rows = []
    for (hops, split), part in whole.groupby(["hops", "split"], sort=False):
        failed = ~part["two_hop"][part["known"]]
        rows.append([hops, split, share(part["known"]), share(part["two_hop"]), share(failed)])
    blocks = [
        table(
            ["hops", "split", "every hop known", "question answered", "gap: failed of known"], rows
        )
    ]
    rows = []
    for n in sorted({fact.n_hops for fact in chains}):
        known = [f for f in chains if f.n_hops == n and f.id in frame.index and frame.known[f.id]]
        for length in range(2, n + 1):
            for first in range(1, n - length + 2):
                last = first + length - 1
                right = [bool(frame.two_hop[f.part(first, last).id]) for f in known]
                rows.append([n, f"{first} to {last}", share(right)])
        twos = [f for f in known if all(frame.two_hop[f.part(k, k + 1).id] for k in range(1, n))]
        right = [bool(frame.two_hop[f.id]) for f in twos]
        rows.append([n, "whole, where all two-hop questions in it are answered", share(right)])
    blocks.append(
        "The same chains, all hops known: their parts, each asked as a question of its own.\n\n"
        + table(["chain of", "hops", "answered"], rows)
    )
    rows = []
    for n in sorted({fact.n_hops for fact in gap.failed}):
        failed = [f for f in gap.failed if f.n_hops == n and "[" not in f.id]
        said = [frame.said[f.id] for f in failed]
        for k in range(1, n):
            names = [f.hops[k - 1] for f in failed]
            hits = [matches(s, h.object, h.aliases) for s, h in zip(said, names, strict=True)]
            rows.append([n, f"bridge {k}", share(hits)])
        for k in range(n - 1) if world else ():
            of = "the subject" if k == 0 else f"bridge {k}"
            skipped, other = skips(said, failed, k, world)
            rows.append([n, f"the last relation of {of}, where it has one", share(skipped)])
            rows.append([n, "(the same of another entity of that kind)", share(other)])
    blocks.append("What failures in the gap say:\n\n" + table(["hops", "said", "share"], rows))
    return "\n\n".join(blocks)


def skips(
    said: Sequence[str], failed: Sequence[TwoHopFact], k: int, world: Hopland
) -> tuple[list[bool], list[bool]]:
    """Whether the last relation was taken of entity `k`, and of a random other one of its kind."""
    rng = random.Random(3)
    own, other = [], []
    for text, fact in zip(said, failed, strict=True):
        name, relation = fact.names[k], fact.hops[-1].relation
        if single := world.facts.get((name, relation)):
            alike = [e for e in world.entities[world.kind_of[name]] if e not in fact.names]
            drawn = world.facts[rng.choice(alike), relation]
            own.append(matches(text, single.object))
            other.append(matches(text, drawn.object))
    return own, other


# -- the lens -------------------------------------------------------------------------------------


def lens_part(model: Any, groups: dict[str, list[TwoHopFact]], form: str) -> str:
    """Who comes first, and how much there is of it, for each group of facts."""
    rows, peaks = [], []
    for group, facts in groups.items():
        if len(facts) < 10:
            continue
        read = fact_trajectories(model, facts, form=form, bridges="all")
        for name in read["tracked"].values.tolist():
            score = "prob" if name == "answer" else "mean_token_prob"
            curve = read[score].sel(tracked=name, position="last").isel(layer=slice(1, None))
            best = curve.max("layer").values
            ranks = read["rank"].sel(tracked=name, position="last").isel(layer=slice(1, None))
            peaks.append(
                [group, name, f"{best.mean():.4f}", f"{np.median(ranks.min('layer')):.0f}"]
            )
        for row in who_comes_first(read).to_dict("records"):
            cells = [
                "{:.1%} [{:.1f}, {:.1f}]".format(
                    row[f"{who}_first"],
                    100 * row[f"{who}_first_lower"],
                    100 * row[f"{who}_first_upper"],
                )
                for who in ("one", "other")
            ]
            layers = f"{row['layer_one']:.1f}, {row['layer_other']:.1f}"
            rows.append([group, f"{row['one']}, {row['other']}", layers, *cells, row["n"]])
    columns = ["questions", "one, other", "mean layers", "one first", "other first", "n"]
    return (
        table(columns, rows)
        + "\n\nLargest probability over layers at the last token (mean over questions; bridges by all "
        "their tokens), and the median of the best rank of its first token:\n\n"
        + table(["questions", "name", "largest probability", "best rank"], peaks)
    )


# -- repairs --------------------------------------------------------------------------------------


def repair_part(model: Any, gap: Gap, form: str) -> str:
    """CREME and memory injection from each bridge, on failed questions with every hop known."""
    trained = Hopland().two_hop_facts("train")
    moments = second_moments(model, fact_texts(random.Random(1).sample(trained, 600)))
    kept_ones = [f for f in gap.passed if f.n_hops == 2 and "[" not in f.id]
    creme_rows, injected = [], []
    for hops in (2, 3, 4):
        failed = drawn(gap.failed, hops, REPAIR_MOST)
        if len(failed) < 10:
            continue
        for k in range(1, hops):
            seen = [fact.at(k) for fact in failed]
            creme_rows.append([hops, k, *creme_cells(model, seen, kept_ones, form, moments)])
            injected.append([hops, k, *injection_cells(model, seen, form)])
    head = ["hops", "seen from bridge"]
    return (
        "CREME (default layers and strength, C estimated), each question under its own edit, which copies from the "
        "question that starts at the bridge:\n\n"
        + table([*head, "that question answered", "corrected", "unrelated kept"], creme_rows)
        + "\n\nMemory injection of the bridge (unembedding, at the first hop's last token, layer and "
        "strength chosen on one half by first tokens corrected, the other half reported):\n\n"
        + table([*head, "layer, strength", "bridge", "another fact's bridge"], injected)
    )


def creme_cells(
    model: Any, seen: list[TwoHopFact], others: list[TwoHopFact], form: str, moments: Any
) -> list[str]:
    """Shares: guide answered, corrected, unrelated kept."""
    repair = CremeRepair(form=form, covariance=moments)
    states = repair.fit(model, seen)

    def ask(rows: list[tuple[TwoHopFact, str]], used: list[Any] | None) -> list[bool]:
        found = answered(
            model,
            [prompt for _, prompt in rows],
            [fact.answer for fact, _ in rows],
            [fact.answer_aliases for fact, _ in rows],
            repair=repair if used else None,
            states=used,
        )
        return [one.right for one in found]

    rng = random.Random(2)
    pairs = []
    for fact, state in zip(seen, states, strict=True):
        apart = [o for o in others if not {*o.names} & {*fact.names}]
        pairs += [(other, state) for other in rng.sample(apart, UNRELATED)]
    guides = ask([(f, f.second_prompt(form)) for f in seen], None)
    corrected = ask([(f, f.prompt(form)) for f in seen], states)
    still = ask([(o, o.prompt(form)) for o, _ in pairs], [state for _, state in pairs])
    return [share(guides), share(corrected), share(still)]


def injection_cells(model: Any, seen: list[TwoHopFact], form: str) -> list[str]:
    """The cell chosen, and shares corrected by the bridge and by another fact's."""
    grid = injection_grid(
        model,
        seen,
        strengths=STRENGTHS,
        positions="first hop",
        controls=("permuted_bridge",),
        form=form,
        metrics="first_correct",
    )
    first, second = split_halves(grid["example"].values.tolist())
    right = grid["first_correct"].isel(encoding=0)
    chosen = right.sel(example=first, memory="bridge").mean("example").to_series().idxmax()
    cell = right.sel(example=second, layer=chosen[0], strength=chosen[1])
    shares = [share(cell.sel(memory=m).values.tolist()) for m in ("bridge", "permuted_bridge")]
    return [f"{chosen[0]}, {chosen[1]:g}", *shares]


# -- the page -------------------------------------------------------------------------------------

SECTIONS = {
    "gap": "The gap by number of hops",
    "lens": "Who comes first in the logit lens (last token)",
    "repair": "Repairs from each bridge",
}
ABOUT = (
    "All shares count whole answers, decoded greedily over the whole vocabulary. Brackets "
    "are exact 95% intervals, in percent; chains share hops, so the intervals are a little "
    "too narrow. The bundled models were trained on single hops and two-hop questions "
    "only, so every longer question is held out, whatever the split of the two-hop "
    "questions in it."
)


def page(found: dict[str, str]) -> str:
    """What has been measured so far."""
    parts = [ABOUT]
    for name in sorted({part.rpartition("_")[0] for part in found}):
        parts.append(f"## {name}")
        for section, title in SECTIONS.items():
            if text := found.get(f"{name}_{section}"):
                parts.append(f"### {title}\n\n{text}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--n", type=int, default=200, help="facts of each split and number of hops")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    for name in options.models:
        model, form = load_model(name), FORMS.get(name, "suffix")
        twos, chains = asked_facts(name, options.n)
        gap = find_gap(model, [*twos, *chains, *parts_of(chains)], form=form)
        for section in options.only:
            if section == "gap":
                text = gap_part(gap, chains, None if name == REAL else Hopland())
                text = f"Form: {form}.\n\n{text}"
            elif section == "lens":
                groups = {
                    f"{n} hops, {outcome}": drawn(facts, n, LENS_MOST)
                    for n in (2, 3, 4)
                    for outcome, facts in (("answered", gap.passed), ("failed", gap.failed))
                }
                text = lens_part(model, groups, form)
            elif name == REAL:
                continue
            else:
                text = repair_part(model, gap, form)
            print(name, section, text, sep="\n", flush=True)
            keep(PAGE, f"{name}_{section}", text)
            write(PAGE, "Chains: more than two hops", page(kept(PAGE)), script="chains")


if __name__ == "__main__":
    main()
