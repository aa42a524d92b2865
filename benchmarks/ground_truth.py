"""Which tool tells the truth? Every tool asked of models whose mechanism is known.

``python -m benchmarks.ground_truth [--models NAME ...] [--only TOOL ...] [--page]``

A tool is asked, fact by fact, at the planted place of each planted model (block and role; for
``shortcut``, where nothing is planted, at the place of its siblings: the first hop's last token after
the same block). Its decision rule for a fact stands in `benchmarks.ground_truth_tools`. For a model
it says yes if it says yes of at least `MAJORITY` of the facts. What is true depends on what it asks:

* *written*: can the unembedding read the bridge here? Yes for serial, serial-last, decoy.
* *readable*: can a reader of other codes? Yes for these and hidden.
* *used*: does the answer come from the bridge here? Yes for serial, serial-last, hidden.

*Power* is the share of facts with a yes where yes is true, *false alarms* where no is true; both with
an interval from resampling models (kind by kind, the two seeds) and facts within them.
*Localisation* takes, at the planted role, the first block after which readers say yes in at least
half as many facts as after their best block; for tools that change states, whose effect lasts as long
as the state is still read, the last such block at the first hop and the first at the last token.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ground_truth_page import body, figure
from benchmarks.ground_truth_tools import ROLES, TOOLS, Asked, ask, rule
from benchmarks.harness import keep, kept, write
from mi_hops import CremeRepair, Hopland, find_gap, load_model, second_moments
from mi_hops.facts import TwoHopFact
from mi_hops.sweep import answered
from mi_hops.worlds.planted import (
    FORM,
    KINDS,
    kind_of,
    planted_facts,
    planted_models,
    planted_truth,
    planted_world,
    taught_facts,
)

PAGE = "ground-truth"
DATA = Path(__file__).resolve().parent.parent / "mi_hops" / "data" / "ground_truth.json"
IMAGE = Path(__file__).resolve().parent.parent / "docs" / "images" / "ground-truth.svg"
MAJORITY = 0.5
#: Facts asked about, failed facts, and facts that CREME edits.
N_ANSWERED, N_FAILED, N_EDITS = 120, 80, 80
NATURAL = ("hops-gpt2", "apposed-gpt2", "hops-llama", "apposed-llama")
#: Tools that swap whole states or cut them off: first the one role, then the other carries all there is.
SWAPS = (
    "activation patching",
    "patching, same-bridge control",
    "attribution patching",
    "AtP*",
    "causal tracing",
    "attention knockout",
    "locating",
)
#: Settings of CREME to choose from, on half of the failed facts.
SPANS = ((4, 5), (2, 3, 4, 5))
CREME_STRENGTHS = (0.7,)


def asked_of(name: str) -> Asked:
    """The model with the facts that its tools are asked about."""
    model = load_model(name, device="cpu")
    if name in NATURAL:
        world = Hopland()
        held, taught = world.two_hop_facts("seen_parts"), world.two_hop_facts("train")
        unseen = world.two_hop_facts("first_unseen")
        for facts in (held, taught, unseen):
            random.Random(0).shuffle(facts)
        taught, seed = taught[:3000], 0
    else:
        used, seed = KINDS[kind_of(name)][1], int(name.rpartition("-")[2])
        held = planted_facts(name)
        taught = taught_facts(planted_world(seed), used=used)
        unseen = planted_facts(
            name, *(("first_unseen",) if used else ("stored_wrong", "not_stored"))
        )
    passed = find_gap(model, held[: 3 * N_ANSWERED], form=FORM).passed[:N_ANSWERED]
    failed = find_gap(model, unseen[: 6 * N_FAILED], form=FORM).failed[:N_FAILED]
    return Asked(model, passed, failed, taught, seed)


def creme_of(name: str) -> dict[str, Any]:
    """CREME on failed questions: chosen on one half, scored on the other, split by split."""
    asked = asked_of(name)
    model = asked.model
    if name in NATURAL or KINDS[kind_of(name)][1]:
        pools = {"first_unseen": asked.failed}
    else:
        pools = {
            split: find_gap(model, planted_facts(name, split)[:400], form=FORM).failed[:N_EDITS]
            for split in ("stored_wrong", "not_stored")
        }
    corpus = sorted({f"{f.prompt(FORM)} {f.answer}." for f in asked.taught[:1500]})
    moments = second_moments(model, corpus)
    choose = [f for facts in pools.values() for f in facts[: len(facts) // 2]]
    scores = {}
    for layers in SPANS:
        for strength in CREME_STRENGTHS:
            repair = CremeRepair(layers=layers, covariance=moments, strength=strength, form=FORM)
            right, kept_ = _corrected(model, repair, choose[:30], asked.answered)
            scores[layers, strength] = np.mean(right) + np.mean(kept_)
    layers, strength = max(scores, key=lambda cell: scores[cell])
    repair = CremeRepair(layers=layers, covariance=moments, strength=strength, form=FORM)
    found: dict[str, Any] = {"layers": list(layers), "strength": strength}
    for split, facts in pools.items():
        right, still = _corrected(model, repair, facts[len(facts) // 2 :], asked.answered)
        found[split] = {
            name: "".join(map(str, hits)) for name, hits in (("corrected", right), ("kept", still))
        }
    return found


def _corrected(
    model: Any, repair: Any, facts: list[TwoHopFact], others: list[TwoHopFact]
) -> tuple[list[int], list[int]]:
    """Which facts are answered under their own edit, and an unrelated answered question under it."""
    states = repair.fit(model, facts)
    own = answered(
        model, [f.prompt(FORM) for f in facts], [f.answer for f in facts],
        repair=repair, states=states,
    )  # fmt: skip
    unrelated = [
        next(o for o in (*others[i % len(others) :], *others) if o.relation2 != f.relation2)
        for i, f in enumerate(facts)
    ]
    still = answered(
        model, [o.prompt(FORM) for o in unrelated], [o.answer for o in unrelated],
        repair=repair, states=states,
    )  # fmt: skip
    return [int(a.right) for a in own], [int(a.right) for a in still]


def measure(name: str, tools: list[str]) -> None:
    """Ask a model, and keep what the tools say."""
    asked = asked_of(name)
    print(name, len(asked.answered), "answered", len(asked.failed), "failed", flush=True)
    for tool in tools:
        if tool == "CREME":
            value = creme_of(name)
        else:
            try:
                said = ask(tool, asked)
            except ValueError as error:  # a question that makes no sense of this model
                print(tool, "cannot be asked:", error, flush=True)
                continue
            value = {
                "yes": ["|".join("".join(map(_plain, row)) for row in fact) for fact in said.yes],
                "notes": said.notes,
                "seconds": said.seconds,
            }
            print(tool, np.nanmean(said.yes, 0).round(2).tolist(), said.seconds, flush=True)
        keep(PAGE, f"{name}--{tool.replace(' ', '_').replace('*', 'star')}", value)


def _plain(value: float) -> str:
    """One character for a fact and place: yes, no, or no value."""
    return "-" if np.isnan(value) else str(int(value))


def _read(kept_: list[str]) -> np.ndarray:
    """``[fact, role, block]`` again."""
    number = {"1": 1.0, "0": 0.0, "-": np.nan}
    return np.array([[[number[c] for c in row] for row in fact.split("|")] for fact in kept_])


# -- what it comes to ------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    """Model -> tool -> what was kept."""
    names = {t.replace(" ", "_").replace("*", "star"): t for t in (*TOOLS, "CREME")}
    found: dict[str, dict[str, Any]] = {}
    for part, value in kept(PAGE).items():
        model, _, tool = part.partition("--")
        found.setdefault(model, {})[names[tool]] = value
    return found


def place_of(name: str) -> tuple[int, int]:
    """(role, block) where a planted model is asked."""
    truth = planted_truth(name)
    if truth.layer is None or truth.position is None:
        sibling = planted_truth(name.replace("shortcut", "serial"))
        assert sibling.layer is not None
        return 0, sibling.layer
    return ROLES.index(truth.position), truth.layer


def true_of(name: str, question: str) -> bool:
    """The true answer to a tool's question."""
    truth = planted_truth(name)
    return {
        "written": truth.written,
        "readable": truth.written or truth.used,
        "used": truth.used,
    }[question]


def located(share: np.ndarray, role: int, question: str) -> int | None:
    """The block that a tool points at, by the rule above; ``share`` is ``[role, block]``."""
    row = share[role]
    if not row.max() > 0:
        return None
    good = np.flatnonzero(row >= row.max() / 2)
    return int(good[-1] if question == "used" and ROLES[role] == "first hop" else good[0])


def interval(groups: list[list[np.ndarray]], n: int = 2000) -> list[float] | None:
    """Share and 95% interval: models resampled within their kind, facts within their model."""
    if not groups:
        return None
    rng = np.random.default_rng(0)
    mean = float(np.mean([np.mean(facts) for kind in groups for facts in kind]))
    draws = []
    for _ in range(n):
        picked = [kind[i] for kind in groups for i in rng.integers(len(kind), size=len(kind))]
        draws.append(np.mean([rng.choice(f, len(f)).mean() for f in picked]))
    return [round(v, 4) for v in (mean, *np.quantile(draws, [0.025, 0.975]).tolist())]


def summary() -> dict[str, Any]:
    """Tool -> question, share by model, power, false alarms, localisation, cost."""
    found, table = results(), {}
    planted = [name for name in planted_models() if name in found]
    for tool, (question, _) in TOOLS.items():
        shares: dict[str, float] = {}
        yes: dict[bool, dict[str, list[np.ndarray]]] = {True: {}, False: {}}
        verdicts: dict[bool, list[bool]] = {True: [], False: []}
        layers, roles, seconds, n = [], [], [], 0
        for name in planted:
            if tool not in found[name]:
                continue
            values = _read(found[name][tool]["yes"])
            role, block = place_of(name)
            here = values[:, role, block]
            here = here[~np.isnan(here)]
            if not len(here):
                continue
            n += len(here)
            seconds.append(found[name][tool]["seconds"])
            shares[name] = round(float(here.mean()), 4)
            truth = true_of(name, question)
            yes[truth].setdefault(kind_of(name), []).append(here)
            verdicts[truth].append(bool(here.mean() >= MAJORITY))
            if truth:
                mean = np.nanmean(values, 0)
                block_said = located(mean, role, question)
                layers.append(None if block_said is None else abs(block_said - block))
                if tool not in SWAPS:
                    roles.append(bool(mean[role].max() > mean[1 - role].max()))
        table[tool] = {
            "question": question,
            "rule": rule(tool),
            "share": shares,
            "n": n,
            "says_yes": {
                words: [int(sum(f.sum() for f in facts)), sum(len(f) for f in facts)]
                for words, truth in (("where_true", True), ("where_not", False))
                for facts in [[f for kind in yes[truth].values() for f in kind]]
            },
            "power": interval(list(yes[True].values())),
            "false_alarms": interval(list(yes[False].values())),
            "found": [sum(verdicts[True]), len(verdicts[True])],
            "cried_wolf": [sum(verdicts[False]), len(verdicts[False])],
            "layer_error": layers,
            "role_right": [sum(roles), len(roles)],
            "seconds": round(float(np.median(seconds)), 1),
            "natural": {
                name: np.nanmean(_read(found[name][tool]["yes"]), 0).round(3).tolist()
                for name in NATURAL
                if tool in found.get(name, {})
            },
        }
    return {"tools": table, "creme": creme_summary(found), "models": planted}


def creme_summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Model -> split -> corrected and kept, as (share, low, high, n)."""
    from mi_hops.result.statistics import proportion_ci

    def share(hits: str) -> list[float]:
        k, n = hits.count("1"), len(hits)
        return [round(v, 4) for v in (k / n, *proportion_ci(k, n))] + [n]

    return {
        name: {
            split: {k: share(v) for k, v in value.items()} if isinstance(value, dict) else value
            for split, value in tools["CREME"].items()
        }
        for name, tools in found.items()
        if "CREME" in tools
    }


def publish() -> None:
    """Write the page, its figure and the table that ships as data."""
    found = summary()
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    IMAGE.write_text(figure(found))
    write(PAGE, "Which tool tells the truth?", body(found), script="ground_truth")


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*planted_models(), *NATURAL])
    parser.add_argument("--only", nargs="+", choices=[*TOOLS, "CREME"], default=[*TOOLS, "CREME"])
    parser.add_argument("--page", action="store_true", help="only write the page")
    asked = parser.parse_args()
    if not asked.page:
        for name in asked.models:
            measure(name, asked.only)
    publish()


if __name__ == "__main__":
    main()
