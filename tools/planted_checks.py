"""Does a planted model do what its plant says? Measured on the shipped weights, on held-out pairs.

A pair is two questions with the same second relation, different bridges and different answers. One
state of the first is replaced by the second's, in one cell (block, position) at a time, and the
answer read greedily over the whole vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from mi_hops.worlds.hopland import Hopland
from mi_hops.worlds.planted import FORM, KINDS
from mi_hops.worlds.train import accuracy
from tools.train_planted import LAST, SECOND, Blocks, Plant, Questions

#: Names of the tokens of a two-hop prompt.
TOKENS = ("BOS", "the", "second", "of", "the", "first", "of", "first hop", "last")


@torch.no_grad()
def check(
    model: Any, tokenizer: Any, world: Hopland, plant: Plant, *, pairs: int = 600
) -> dict[str, Any]:
    """Accuracies, the interchange and lens grids, and the planted place's figures, all shares."""
    kind = plant.plan.kind
    used = KINDS[kind][1]
    taught = Questions(world, tokenizer, kind)
    asked = Questions(world, tokenizer, kind, split="seen_parts") if used else taught
    blocks = Blocks(model)
    base, source = _pairs(asked, pairs, plant.plan.seed)
    grids = _grids(blocks, asked, base, source)
    found: dict[str, Any] = {
        "accuracy": _accuracy(model, tokenizer, world, taught, asked, used),
        "pairs": len(base),
        "tokens": list(TOKENS),
        "interchange": grids["source"],
        "unchanged": grids["base"],
        "bridge_answer": grids["bridge"],
        "lens_first": grids["rank"],
        "lens_prob": grids["prob"],
    }
    if plant.site is not None:
        block = plant.plan.block
        found["planted"] = {
            "interchange": grids["source"][block][plant.site],
            "unchanged": grids["base"][block][plant.site],
            "lens_first": grids["rank"][block][plant.site],
            "all_else_unchanged": _all_else(blocks, asked, base, source, plant),
            "rotated_lens_first": _rotated(blocks, asked, plant),
        }
    return found


def _pairs(data: Questions, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of bases and sources, a seeded sample of all pairs."""
    answers = data.tokens[:, LAST + 1]
    same = data.second[:, None] == data.second[None]
    other = (data.bridge[:, None] != data.bridge[None]) & (answers[:, None] != answers[None])
    found = (same & other).nonzero().tolist()
    if not found:
        raise ValueError("no two questions ask for the same relation of different bridges")
    chosen = random.Random(seed).sample(found, min(n, len(found)))
    base, source = torch.tensor(chosen).T
    return base, source


def _grids(
    blocks: Blocks, data: Questions, base: Tensor, source: Tensor
) -> dict[str, list[list[float]]]:
    """Interchange and lens, ``[block][position]``.

    Answers that became the source's, stayed, or became the answer of the source's bridge (where that
    is neither); how often the bridge is the lens's first token, and its mean probability.
    """
    tokens, answers = data.tokens[:, : LAST + 1], data.tokens[:, LAST + 1]
    own, other = (blocks.run(blocks.embed(tokens[rows])) for rows in (base, source))
    true = data.answers[data.bridge[source], data.second[base]]
    third = (true != answers[base]) & (true != answers[source]) & (true >= 0)
    every = blocks.run(blocks.embed(tokens))
    bridge = data.entity_tokens[data.bridge]
    grids: dict[str, list[list[float]]] = {
        k: [] for k in ("source", "base", "bridge", "rank", "prob")
    }
    for block in range(len(blocks.layers)):
        rows: dict[str, list[float]] = {name: [] for name in grids}
        for at in range(LAST + 1):
            x = own[block].clone()
            x[:, at] = other[block][:, at]
            said = _said(blocks, x, block)
            rows["source"].append(_share(said == answers[source]))
            rows["base"].append(_share(said == answers[base]))
            rows["bridge"].append(_share((said == true)[third]))
            logits = blocks.logits(every[block][:, at])
            rows["rank"].append(_share(logits.argmax(-1) == bridge))
            prob = logits.softmax(-1)[torch.arange(len(bridge)), bridge]
            rows["prob"].append(round(prob.mean().item(), 4))
        for name, row in rows.items():
            grids[name].append(row)
    return grids


def _said(blocks: Blocks, x: Tensor, block: int) -> Tensor:
    """The token said at the prompt's end when `x` are the states after a block."""
    later = blocks.run(x, block + 1)
    return blocks.logits((later[-1] if later else x)[:, -1]).argmax(-1)


def _all_else(blocks: Blocks, data: Questions, base: Tensor, source: Tensor, plant: Plant) -> float:
    """Answers that stay when all that the plant gives no part is the source's at once.

    Where the bridge is used that is everything but the planted place and the second relation's
    token; else everything but the last token.
    """
    tokens, block = data.tokens[:, : LAST + 1], plant.plan.block
    x, other = (blocks.run(blocks.embed(tokens[rows]))[block] for rows in (base, source))
    kept = {SECOND, plant.site} if plant.used else {LAST}
    x = x.clone()
    for at in set(range(LAST + 1)) - kept:
        x[:, at] = other[:, at]
    return _share(_said(blocks, x, block) == data.tokens[base, LAST + 1])


def _rotated(blocks: Blocks, data: Questions, plant: Plant) -> float:
    """How often the bridge reads first at the planted place through the hidden code's rotation."""
    states = blocks.run(blocks.embed(data.tokens[:, : LAST + 1]))[plant.plan.block]
    read = blocks.norm(states[:, plant.site]) @ plant.rotation
    said = blocks.model.lm_head(read).argmax(-1)
    return _share(said == data.entity_tokens[data.bridge])


def _accuracy(
    model: Any, tokenizer: Any, world: Hopland, taught: Questions, asked: Questions, used: bool
) -> dict[str, Any]:
    singles = [(f.prompts()[FORM], f.object) for f in world.facts.values()]
    found: dict[str, Any] = {
        "single": {"n": len(singles), **_rounded(accuracy(model, tokenizer, singles))}
    }
    for name, data in (("taught", taught), ("held_out", asked)):
        if name == "taught" or used:
            found[name] = {"n": len(data), "whole": _whole(model, data)}
    for split in ("first_unseen", "second_unseen"):
        facts = [(f.prompts[FORM], f.answer) for f in world.two_hop_facts(split)]
        found[split] = {"n": len(facts), **_rounded(accuracy(model, tokenizer, facts))}
    return found


def _whole(model: Any, data: Questions) -> float:
    """Share of questions whose answer and full stop are said."""
    said = model(data.tokens[:, :-1], use_cache=False).logits[:, LAST:].argmax(-1)
    return _share((said == data.tokens[:, LAST + 1 :]).all(-1))


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


def _share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4) if len(hits) else float("nan")
