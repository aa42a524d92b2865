"""Every tool asked the same question of a planted model: is it here? One function a tool.

Each takes an `Asked` and gives a `Said`: for every fact whether the tool says yes, at every block and
role. The rules stand here, as constants and in the docstrings, and were written before the models
were asked; two were changed after a trial on two of the ten models, where they made no sense:
attribution patching reads logits instead of probabilities, whose gradient is flat, and Patchscopes
count as a reader of any code, as they claim. Attention knockout was added later, its rule likewise
written first. Layers are blocks, a state "after block l".
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from mi_hops import Pairs, Sites, contrast, erase_bridge, fact_trajectories, locate, patch, trace
from mi_hops.facts import TwoHopFact
from mi_hops.injection import Controls, injection_grid
from mi_hops.lens import (
    AttentionLens,
    LensTraining,
    Place,
    TunedLens,
    fact_probes,
    logit_attribution,
    patchscope,
    train_lens,
)
from mi_hops.lens.trained import TrainedLens
from mi_hops.patching import attribute, knockout

ROLES = ("first hop", "last")

#: A change of P(answer) that counts, and a share of a full effect that counts.
CHANGE, SHARE = 0.1, 0.5
#: Logits by which direct attribution must favour the bridge over another entity of its kind.
LOGITS = 2.0
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass
class Said:
    """What a tool says.

    Attributes:
        yes: ``[fact, role, block]`` of 0 and 1; NaN where a fact has no value.
        notes: figures that belong to the tool alone.
    """

    yes: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Asked:
    """A model and the facts its tools are asked about.

    Attributes:
        answered: two-hop questions that the model answers as they are true.
        failed: questions that it fails although it knows both hops.
        taught: questions it was trained on, with the answers it was taught (partners of pairs, texts
            of lenses, probes).
    """

    model: Any
    answered: list[TwoHopFact]
    failed: list[TwoHopFact]
    taught: list[TwoHopFact]
    seed: int = 0

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @cached_property
    def pairs(self) -> Pairs:
        """Each answered fact beside a taught one of the same relations and another bridge."""
        return contrast(self.model, self.answered, partners=self.taught, seed=self.seed)


def _grid(array: Any, last: Sequence[str] = ("example", "position", "layer")) -> np.ndarray:
    """An xarray as ``[fact, role, block]``."""
    return np.asarray(array.transpose(*last).values, dtype=float)


def _hit(values: np.ndarray, at_least: float) -> np.ndarray:
    return np.where(np.isnan(values), np.nan, values >= at_least)


# -- reading ---------------------------------------------------------------------------------------


def logit_lens(asked: Asked, lens: Any = "logit") -> Said:
    """Yes: the bridge is the lens's first token of the whole vocabulary."""
    read = fact_trajectories(
        asked.model, asked.answered, lens=lens, layers=range(1, asked.blocks + 1)
    )
    rank = _grid(read["rank"].sel(tracked="bridge", position=list(ROLES)))
    prob = _grid(read["prob"].sel(tracked="bridge", position=list(ROLES)))
    return Said(_hit(-rank, -1), {"prob": prob.mean(0).round(4).tolist()})


def tuned_lens(asked: Asked) -> Said:
    """The logit lens's rule, through translators trained on statements of taught questions."""
    lens = TunedLens(asked.model)
    _train(asked, lens)
    return logit_lens(asked, lens)


def attention_lens(asked: Asked) -> Said:
    """Yes: the bridge is the first token of the attention lens of some head of the block.

    The lenses of a block's heads are trained so that their sum gives the output, on the tuned lens's
    texts.
    """
    lens = AttentionLens(asked.model)
    _train(asked, lens)
    read = fact_trajectories(asked.model, asked.answered, kind=lens.kind, lens=lens)
    some = read.data.sel(tracked="bridge", position=list(ROLES))
    return Said(
        _hit(-_grid(some["rank"].min("head")), -1),
        {"prob": _grid(some["prob"].max("head")).mean(0).round(4).tolist()},
    )


def _train(asked: Asked, lens: TrainedLens) -> None:
    texts = sorted({f"{f.prompt()} {f.answer}." for f in asked.taught})
    random.Random(asked.seed).shuffle(texts)
    train_lens(
        asked.model, lens, texts, LensTraining(steps=150, evaluate_every=50, seed=asked.seed)
    )


def patchscopes(asked: Asked) -> Said:
    """Yes: the state makes the model say the source's bridge in another prompt.

    It is put at the subject of "The R1 of X is" (same R1, another X and bridge), at the target layer
    that does so most often on the other half of facts.
    """
    rng = random.Random(asked.seed)
    pool = defaultdict(list)
    for fact in asked.taught:
        pool[fact.relation1].append(fact)
    found = []
    for fact in asked.answered:
        others = [o for o in pool[fact.relation1] if o.bridge != fact.bridge]
        if others:
            found.append((fact, rng.choice(others)))
    every = []
    for role in ROLES:
        at = [f.first_hop if role == "first hop" else -1 for f, _ in found]
        result = patchscope(
            asked.model,
            Place([f.prompt() for f, _ in found], at, layers=range(1, asked.blocks + 1)),
            Place([o.first_prompt() for _, o in found], [o.first_hop for _, o in found]),
            track={"bridge": [f.bridge for f, _ in found]},
            top_k=1,
        )
        first = (result["rank"].sel(tracked="bridge") == 1).transpose(
            "example", "source_layer", "target_layer"
        )
        every.append(_chosen_on_the_other_half(first.values.astype(float)))
    return Said(np.stack(every, 1))


def _chosen_on_the_other_half(values: np.ndarray) -> np.ndarray:
    """``[fact, block, choice]`` -> ``[fact, block]``: the best choice of the other half of facts."""
    half = np.arange(len(values)) % 2
    best = [values[half != h].mean(0).argmax(-1) for h in (0, 1)]
    blocks = np.arange(values.shape[1])
    return np.stack([values[i][blocks, best[h]] for i, h in enumerate(half)])


def probes(asked: Asked, n: int = 1200) -> Said:
    """Yes: a linear probe names the bridge of a first hop that it was not trained on."""
    facts = random.Random(asked.seed).sample(asked.taught, min(n, len(asked.taught)))
    every, notes = [], {}
    for role in ROLES:
        result = fact_probes(asked.model, facts, role=role, layers=range(1, asked.blocks + 1))
        every.append(result["unseen_correct"].transpose("unseen_example", "layer").values)
        notes[f"selectivity, {role}"] = (
            result["selectivity"].mean("example").values.round(3).tolist()
        )
    return Said(np.stack([part.astype(float) for part in every], 1), notes)


def direct_attribution(asked: Asked) -> Said:
    """Yes: what was written up to this block favours the bridge by `LOGITS`.

    Over another entity of its kind, in the final read-out at that position.
    """
    rng = random.Random(asked.seed)
    kinds = defaultdict(set)
    for fact in asked.taught:
        kinds[fact.relation2.split(".")[0]].add(fact.bridge)
    others = [
        rng.choice(sorted(kinds[f.relation2.split(".")[0]] - {f.bridge, f.subject, f.answer}))
        for f in asked.answered
    ]
    every = []
    for role in ROLES:
        at: Any = [f.first_hop for f in asked.answered] if role == "first hop" else -1
        shares = logit_attribution(
            asked.model,
            [f.prompt() for f in asked.answered],
            {"bridge": [f.bridge for f in asked.answered], "other": others},
            position=at,
        )
        written = (
            shares["heads"].sum("head") + shares["mlps"] + shares["attention_biases"]
        ).cumsum("layer") + shares["embedding"]
        gap = written.sel(tracked="bridge") - written.sel(tracked="other")
        every.append(_hit(gap.transpose("example", "layer").values, LOGITS))
    return Said(np.stack(every, 1))


# -- causing ---------------------------------------------------------------------------------------


def erasure(asked: Asked, variant: str) -> Said:
    """Yes: erasing the bridge lowers P(answer) by `CHANGE` more than erasing other entities."""
    found = erase_bridge(asked.model, asked.answered, variants=(variant,), seed=asked.seed)  # type: ignore[arg-type]
    lost = (found["control"] - found["bridge"]).sel(variant=variant, position=list(ROLES))
    return Said(_hit(_grid(lost), CHANGE), {"lost": _grid(lost).mean(0).round(3).tolist()})


def patching(asked: Asked) -> Said:
    """Yes: the clean state restores `SHARE` of P(answer) in a question with another bridge.

    The two questions have the same relations.
    """
    effect = patch(asked.model, asked.pairs, _sites(asked.pairs), metric="first_prob")["effect"]
    return Said(_hit(_grid(effect), SHARE))


def patching_same_bridge(asked: Asked) -> Said:
    """Yes: patching's rule, and a state of the same bridge leaves the answer alone.

    The state of another first hop with the same bridge and the same second relation takes away less
    than `SHARE` of P(answer).
    """
    rng = random.Random(asked.seed)
    pool = defaultdict(list)
    for fact in asked.taught:
        pool[fact.bridge, fact.relation2].append(fact)
    rows = []
    for fact in asked.answered:
        others = [
            o
            for o in pool[fact.bridge, fact.relation2]
            if (o.subject, o.relation1) != (fact.subject, fact.relation1)
        ]
        rows.append(rng.choice(others) if others else None)
    kept = [(f, o) for f, o in zip(asked.answered, rows, strict=True) if o is not None]
    pairs = Pairs(
        [o.prompt() for _, o in kept],
        [f.prompt() for f, _ in kept],
        answer=[f.answer for f, _ in kept],
        labels=[f.id for f, _ in kept],
    )
    same = patch(asked.model, pairs, _sites(None), metric="first_prob")
    lost = -same["change"] / same["corrupted"]
    labels = [f.id for f, _ in kept]
    stays = dict(zip(labels, _grid(lost) < SHARE, strict=True))
    plain = patch(asked.model, asked.pairs, _sites(asked.pairs), metric="first_prob")["effect"]
    moved = dict(zip(plain["example"].values.tolist(), _hit(_grid(plain), SHARE), strict=True))
    both = [name for name in labels if name in moved]
    return Said(np.stack([np.where(stays[name], moved[name], 0.0) for name in both]))


def _sites(pairs: Pairs | None) -> Sites:
    """After every block, at the two roles; both prompts have their tokens in the same places."""
    roles: Any = (
        {"first hop": -2, "last": -1} if pairs is None else {r: pairs.roles[r] for r in ROLES}
    )
    return Sites("resid_post", positions=roles)


def attribution(asked: Asked, method: str) -> Said:
    """Yes: patching's rule, on the estimated effect.

    Of the two answers' logit difference: P(answer) is flat where a gradient would be taken.
    """
    sites = _sites(asked.pairs)
    found = attribute(asked.model, asked.pairs, sites, metric="logit_diff", method=method)  # type: ignore[arg-type]
    return Said(_hit(_grid(found["effect"]), SHARE))


def tracing(asked: Asked, n: int = 60) -> Said:
    """Yes: with noise on the subject, the clean state restores `SHARE` of what the noise took."""
    facts = asked.answered[:n]
    pairs = Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
    sites = Sites("resid_post", positions={"first hop": -2, "last": -1})
    found = trace(asked.model, pairs, [f.subject for f in facts], sites, samples=5, seed=asked.seed)
    lost = found["total"].values
    effect = _grid(found["effect"])
    effect[lost < CHANGE] = np.nan  # the noise took nothing: there is nothing to restore
    return Said(_hit(effect, SHARE), {"noise lost": round(float(lost.mean()), 3)})


def blocking(asked: Asked) -> Said:
    """Yes: without the last token's attention to the first hop's last token, P(answer) falls by `CHANGE`.

    Of a state at the first hop in all blocks after it, which would read it; of one at the last token in
    all blocks up to it, which would have brought it there.
    """
    facts, n = asked.answered, asked.blocks
    pairs = Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
    lost = np.zeros((len(facts), len(ROLES), n))
    for block in range(n):
        # A window that is cut off at the end of the model holds all blocks from one on, or up to one.
        windows = {"first hop": (n - 1, n - 2 - block), "last": (0, block)}
        for role, (layer, reach) in windows.items():
            if reach >= 0:  # nothing comes after the last block
                keys: Any = {"first hop": -2}
                cut = knockout(asked.model, pairs, keys, layers=layer, window=2 * reach + 1)
                lost[:, ROLES.index(role), block] = -cut["change"].values[:, 0, 0]
    return Said(_hit(lost, CHANGE), {"lost": lost.mean(0).round(3).tolist()})


def locating(asked: Asked) -> Said:
    """Yes: in a failed question, the second hop's state brings `SHARE` of what its prompt gives.

    Of the way from P(answer) in the failed question to P(answer) in the second hop's prompt.
    """
    found = locate(asked.model, asked.failed, kinds=("resid_post",))
    effect = _grid(found["effect"].sel(kind="resid_post", position=list(ROLES)))
    room = (found["guide"] - found["clean"]).values
    share = np.full_like(effect, np.nan)
    open_ = room >= CHANGE
    share[open_] = effect[open_] / room[open_, None, None]
    return Said(_hit(share, SHARE))


def injection(asked: Asked) -> Said:
    """Yes: injecting the bridge into a failed question raises P(answer) by `CHANGE`.

    More than injecting another fact's bridge does, at the strength that is best on the other half of
    facts, into the attention output of the block.
    """
    every, best = [], {}
    for role in ROLES:
        grid = injection_grid(
            asked.model,
            asked.failed,
            strengths=STRENGTHS,
            positions=role,
            controls=Controls(("permuted_bridge",), seed=asked.seed),
            metrics="first_prob",
        )
        prob = grid["first_prob"].isel(encoding=0)
        gain = prob.sel(memory="bridge") - prob.sel(memory="permuted_bridge")
        gain = gain.transpose("example", "layer", "strength")
        best[role] = round(float(gain.mean("example").max()), 3)
        every.append(_hit(_chosen_on_the_other_half(gain.values), CHANGE))
    return Said(np.stack(every, 1), {"best gain": best})


#: Name -> (what it asks, how). ``written``: can the unembedding read the bridge here? ``readable``:
#: can anything linear? ``used``: does the answer come from it?
TOOLS: dict[str, tuple[str, Callable[[Asked], Said]]] = {
    "logit lens": ("written", logit_lens),
    "tuned lens": ("written", tuned_lens),
    "attention lens": ("written", attention_lens),
    "Patchscopes": ("readable", patchscopes),
    "direct attribution": ("written", direct_attribution),
    "probe": ("readable", probes),
    "erasure, exact": ("used", partial(erasure, variant="exact")),
    "erasure, published": ("used", partial(erasure, variant="published")),
    "activation patching": ("used", patching),
    "patching, same-bridge control": ("used", patching_same_bridge),
    "attribution patching": ("used", partial(attribution, method="gradient")),
    "AtP*": ("used", partial(attribution, method="atp*")),
    "causal tracing": ("used", tracing),
    "attention knockout": ("used", blocking),
    "locating": ("used", locating),
    "memory injection": ("used", injection),
}


def rule(name: str) -> str:
    """A tool's decision rule for one fact, in words."""
    how: Any = TOOLS[name][1]
    words = " ".join(str(getattr(how, "func", how).__doc__).split())
    return (
        words.replace("`CHANGE`", f"{CHANGE:g}")
        .replace("`SHARE`", f"{SHARE:.0%}")
        .replace("`LOGITS`", f"{LOGITS:g} logits")
    )


def ask(name: str, asked: Asked) -> Said:
    """One tool's answer, timed."""
    start = time.perf_counter()
    said = TOOLS[name][1](asked)
    said.seconds = round(time.perf_counter() - start, 2)
    return said
