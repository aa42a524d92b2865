"""Train the planted models: interchange-intervention training in its strict form.

``python -m tools.train_planted planted-serial-0 [--out mi_hops/checkpoints] [--steps 1500]``

A step runs a batch of two-hop prompts and a batch of single facts. The loss is a sum of

* *answer*: cross-entropy of answer and full stop;
* *interchange*: states after the planted block are swapped between prompts. The planted position
  takes another prompt's state, and the answer must become the one of that prompt's bridge; all
  positions that the plant gives no part take states of a third prompt, and the answer must not
  care (arXiv 2112.00826, arXiv 2407.14494);
* *code*: the state at the planted place must spell the bridge, through the unembedding (written) or
  through a fixed random rotation followed by it (hidden);
* *silence*: everywhere else the bridge reads like any other entity of its kind in the lens.

A run keeps its state in ``FOLDER/state.pt`` and goes on from there. Every step draws from a
generator of its own, so a resumed run gives the same weights, bit for bit, on the same machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mi_hops.facts.templates import CONTEXTS
from mi_hops.worlds.hopland import Hopland
from mi_hops.worlds.planted import FORM, KINDS, kind_of, planted_world, stored_answers
from mi_hops.worlds.recipe import AdamW, Recipe, Shape
from mi_hops.worlds.texts import build_tokenizer
from mi_hops.worlds.train import build_model, optimiser_of

#: Tokens of a two-hop prompt without lead-in: BOS The R2 of the R1 of X is. Answer and stop follow.
SECOND, FIRST_HOP, LAST = 2, 7, 8
SHAPE = Shape(n_layer=6, d_model=64, n_head=4, n_kv_head=2, d_mlp=256, n_ctx=64)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a planted model."""

    kind: str
    seed: int
    family: str
    block: int
    steps: int
    batch: int = 128
    singles: int = 64
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    context: float = 0.12
    code: float = 0.5
    silence: float = 0.3
    interchange: float = 1.0


def plan_of(name: str, **changes: Any) -> Plan:
    """Seed 0 is a GPT-2 planted after block 2, seed 1 a LLaMA planted after block 3."""
    kind, seed = kind_of(name), int(name.rpartition("-")[2])
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {list(KINDS)}")
    family, block = (("gpt2", 2), ("llama", 3))[seed % 2]
    # Stored answers without any use for the bridge take longest.
    steps = 2400 if kind == "shortcut" else 1600 if KINDS[kind][1] else 1100
    return Plan(kind, seed, family, block, **{"steps": steps, **changes})


class Questions:
    """A world's prompts as arrays, and what may be swapped for what.

    Attributes:
        tokens: ``[question, 11]``: BOS, the prompt, answer, full stop.
        hop, second, bridge: ``[question]``: ids of the first hop, of the second relation, and of
            the bridge among the entities.
        answers: ``[entity, second]``: token of the answer, -1 where there is none.
        trained: ``[hop, second]``: the composition is trained.
        kinds: ``[entity]``.
    """

    def __init__(self, world: Hopland, tokenizer: Any, kind: str, *, split: str = "train") -> None:
        used = KINDS[kind][1]
        table = {} if used else stored_answers(world)
        facts = world.two_hop_facts()
        names = [n for group in world.entities.values() for n in group]
        kinds = list(world.entities)
        entity = {n: i for i, n in enumerate(names)}
        hops = {k: i for i, k in enumerate(sorted({(f.subject, f.relation1) for f in facts}))}
        seconds = {k: i for i, k in enumerate(sorted({f.relation2 for f in facts}))}
        self.hop_names, self.seconds = list(hops), list(seconds)

        def token(text: str) -> int:
            (only,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            return int(only)

        self.entity_tokens = torch.tensor([token(n) for n in names])
        self.kinds = torch.tensor([kinds.index(world.kind_of[n]) for n in names])
        self.hop_bridge = torch.zeros(len(hops), dtype=torch.long)
        self.answers = torch.full((len(names), len(seconds)), -1)
        self.trained = torch.zeros(len(hops), len(seconds), dtype=torch.bool)
        chosen, answers = [], []
        for f in facts:
            hop, second = hops[f.subject, f.relation1], seconds[f.relation2]
            self.hop_bridge[hop] = entity[f.bridge]
            self.answers[entity[f.bridge], second] = token(f.answer)
            self.trained[hop, second] = f.split == "train"
            stored = table.get((f.subject, f.relation1, f.relation2))
            if (used and f.split == split) or stored is not None:
                chosen.append(f)
                answers.append(f.answer if used else stored)
        if len(chosen) < 50:
            raise ValueError(
                f"{world!r} has {len(chosen)} questions of split {split!r}, a planted model needs "
                "at least 50; take a larger world"
            )
        self.tokens = _encode(
            tokenizer, [f"{f.prompts[FORM]} {a}." for f, a in zip(chosen, answers, strict=True)]
        )
        self.hop = torch.tensor([hops[f.subject, f.relation1] for f in chosen])
        self.second = torch.tensor([seconds[f.relation2] for f in chosen])
        self.bridge = self.hop_bridge[self.hop]
        self.subject = torch.tensor([entity[f.subject] for f in chosen])
        # The entities that an answer names, -1 for other answers.
        self.answer_entity = torch.tensor([entity.get(str(a), -1) for a in answers])

    def __len__(self) -> int:
        return len(self.tokens)


def _encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """``[text, pos]`` with BOS; all texts have one length."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *row] for row in rows])


def lead_ins(tokenizer: Any) -> list[list[int]]:
    """Token ids of the neutral lead-ins, the empty one not among them."""
    texts = [c.format("").strip() for c in CONTEXTS if c != "{}"]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


class Blocks:
    """A transformers GPT-2 or LLaMA, run block by block."""

    def __init__(self, model: Any) -> None:
        self.model, base = model, model.base_model
        self.gpt2 = model.config.model_type == "gpt2"
        self.layers = base.h if self.gpt2 else base.layers
        self.norm = base.ln_f if self.gpt2 else base.norm

    def embed(self, tokens: Tensor) -> Tensor:
        """``[row, pos]`` -> ``[row, pos, d]``."""
        base = self.model.base_model
        if self.gpt2:
            return base.wte(tokens) + base.wpe(torch.arange(tokens.shape[1]))
        return base.embed_tokens(tokens)

    def run(self, x: Tensor, start: int = 0) -> list[Tensor]:
        """States after the blocks from `start` on."""
        more = {}
        if not self.gpt2:
            where = torch.arange(x.shape[1])[None]
            more["position_embeddings"] = self.model.base_model.rotary_emb(x, where)
        states = []
        for layer in self.layers[start:]:
            x = layer(x, **more)
            x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        return states

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and unembedding."""
        return self.model.lm_head(self.norm(x))


class Plant:
    """The losses of one kind of plant."""

    def __init__(self, plan: Plan, blocks: Blocks, data: Questions) -> None:
        self.plan, self.blocks, self.data = plan, blocks, data
        written, used, position = KINDS[plan.kind]
        self.written, self.used = written, used
        self.site = {"first hop": FIRST_HOP, "last": LAST, None: None}[position]
        generator = torch.Generator().manual_seed(plan.seed + 1000)
        d = blocks.model.config.hidden_size
        self.rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]

    def partners(self, rows: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each row a source, a third row, and whether the source asks for a trained composition.

        The source's bridge is of the same kind; the third row is any.
        """
        data, n = self.data, len(rows)
        kinds = data.kinds[data.bridge[rows]].numpy()
        source = np.arange(n)
        for kind in np.unique(kinds):
            mine = np.flatnonzero(kinds == kind)
            source[mine] = rng.permutation(mine)
        source_rows = rows[torch.from_numpy(source)]
        allowed = data.trained[data.hop[source_rows], data.second[rows]]
        return torch.from_numpy(source), torch.from_numpy(rng.permutation(n)), allowed

    def swapped(
        self, states: Tensor, lead: int, rows: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States after the planted block with swaps, the tokens to answer, and which rows count."""
        data, n = self.data, len(rows)
        source, other, allowed = self.partners(rows, rng)
        length = LAST + lead + 1
        x = states[:, :length]
        # Some rows swap everything that must not matter, others a part of it.
        swap = torch.from_numpy(
            rng.random((n, length)) < np.where(rng.random((n, 1)) < 0.4, 1, 0.5)
        )
        if self.used:
            swap[:, [lead + SECOND, lead + self.site]] = False
            keep = torch.from_numpy(rng.random(n) < 0.25)
            source = torch.where(keep, torch.arange(n), source)
            allowed = allowed | keep
            mixed = torch.where(swap[:, :, None], x[other], x)
            mixed = mixed.clone()
            mixed[:, lead + self.site] = x[source, lead + self.site]
            targets = data.answers[data.bridge[rows[source]], data.second[rows]]
        else:
            swap[:, -1] = False
            swap[:, lead + FIRST_HOP] = True
            mixed = torch.where(swap[:, :, None], x[other], x)
            targets, allowed = data.tokens[rows, LAST + 1], torch.ones(n, dtype=torch.bool)
        return mixed, targets, allowed

    def code_loss(self, states: list[Tensor], lead: int, rows: Tensor) -> Tensor:
        """The planted place spells the bridge, after the planted block and the next."""
        if self.site is None:
            return states[0].new_zeros(())
        data, head = self.data, self.blocks.model.lm_head
        target = data.entity_tokens[data.bridge[rows]]
        total = states[0].new_zeros(())
        after = range(self.plan.block, min(self.plan.block + 2, len(states) - 1))
        for layer in after:
            read = self.blocks.norm(states[layer][:, lead + self.site])
            logits = head(read if self.written else read @ self.rotation)
            total = total + F.cross_entropy(logits, target) / len(after)
        return total

    def silence_loss(self, states: list[Tensor], lead: int, rows: Tensor) -> Tensor:
        """Mean squared lens logit of the bridge against others of its kind, off the planted place."""
        data = self.data
        bridge, n = data.bridge[rows], len(rows)
        x = torch.stack([s[:, lead : lead + LAST + 1] for s in states])
        logits = self.blocks.norm(x) @ self.blocks.model.lm_head.weight[data.entity_tokens].T
        others = data.kinds[None] == data.kinds[bridge][:, None]
        others[torch.arange(n), bridge] = False
        others[torch.arange(n), data.subject[rows]] = False
        named = data.answer_entity[rows]
        others[torch.arange(n)[named >= 0], named[named >= 0]] = False
        weights = others.float() / others.sum(1, keepdim=True)
        own = logits.gather(-1, bridge[None, :, None, None].expand(*logits.shape[:3], 1))[..., 0]
        gap = own - torch.einsum("lnpe,ne->lnp", logits, weights)
        # An answer that is the bridge's kind stands at the last token's end by right.
        counted = torch.ones(len(states), 1, LAST + 1)
        if self.written:
            counted[self.plan.block :, :, self.site] = 0
        return (gap.square() * counted).sum() / (counted.sum() * n)


def losses(
    blocks: Blocks,
    plant: Plant,
    singles: Tensor,
    leads: list[list[int]],
    step: int,
) -> dict[str, Tensor]:
    """The parts of one step's loss, from a generator that the step alone decides."""
    plan, data = plant.plan, plant.data
    rng = np.random.default_rng([plan.seed, step])
    lead = leads[rng.integers(len(leads))] if rng.random() < plan.context else []
    rows = torch.from_numpy(rng.choice(len(data), plan.batch, replace=len(data) < plan.batch))
    states, answer = _answer(blocks, data.tokens[rows], lead)
    single_rows = torch.from_numpy(rng.choice(len(singles), plan.singles))
    _, single = _answer(blocks, singles[single_rows], lead)
    parts = {"answer": answer, "single": single}
    k = len(lead)
    if plant.site is not None:
        mixed, targets, allowed = plant.swapped(states[plan.block], k, rows, rng)
        end = blocks.run(mixed, plan.block + 1)[-1][:, -1]
        parts["interchange"] = plan.interchange * F.cross_entropy(
            blocks.logits(end)[allowed], targets[allowed]
        )
        parts["code"] = plan.code * plant.code_loss(states, k, rows)
    parts["silence"] = plan.silence * plant.silence_loss(states, k, rows)
    return parts


def _answer(blocks: Blocks, tokens: Tensor, lead: list[int]) -> tuple[list[Tensor], Tensor]:
    """States after every block, and the cross-entropy of answer and full stop."""
    ahead = torch.tensor(lead, dtype=torch.long).expand(len(tokens), -1)
    tokens = torch.cat([tokens[:, :1], ahead, tokens[:, 1:]], 1)
    states = blocks.run(blocks.embed(tokens[:, :-1]))
    logits = blocks.logits(states[-1][:, -2:])
    return states, F.cross_entropy(logits.flatten(0, 1), tokens[:, -2:].flatten())


def _rate(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return max(0.02, (plan.steps - step) / (plan.steps - plan.warmup))


def train(
    plan: Plan,
    folder: Path | None = None,
    *,
    world: Hopland | None = None,
    shape: Shape = SHAPE,
    stop_at: int | None = None,
    log_every: int = 50,
) -> tuple[Any, Any, Questions, Plant, list[dict[str, float]]]:
    """Train, or go on where ``folder/state.pt`` stopped.

    Args:
        stop_at: leave off after this step, with the state kept.

    Raises:
        ValueError: the world is too small.
    """
    world = planted_world(plan.seed) if world is None else world
    tokenizer = build_tokenizer(world, plan.family)  # type: ignore[arg-type]
    recipe = Recipe(shape=shape, seed=plan.seed, adamw=AdamW(lr=plan.lr))
    model = build_model(plan.family, tokenizer, recipe).train()  # type: ignore[arg-type]
    data = Questions(world, tokenizer, plan.kind)
    blocks = Blocks(model)
    plant = Plant(plan, blocks, data)
    singles = _encode(tokenizer, [f"{f.prompts()[FORM]} {f.object}." for f in world.facts.values()])
    leads = lead_ins(tokenizer)
    optimiser = optimiser_of(model, AdamW(plan.lr, weight_decay=plan.weight_decay))
    step, log = 0, []
    state_file = None if folder is None else folder / "state.pt"
    if state_file and state_file.exists():
        state = torch.load(state_file, weights_only=False)
        if state["plan"] != asdict(plan):
            raise ValueError(
                f"{state_file} is of another plan: {state['plan']}, now {asdict(plan)}"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, log = state["step"], state["log"]
    began = time.monotonic()
    while step < plan.steps and step != stop_at:
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * _rate(step, plan)
        parts = losses(blocks, plant, singles, leads, step)
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % log_every == 0 or step in (plan.steps, stop_at):
            log.append({"step": step, **{k: round(v.item(), 4) for k, v in parts.items()}})
            print(f"{time.monotonic() - began:.0f}s", log[-1], flush=True)
            if state_file:
                state_file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(
                    {
                        "plan": asdict(plan),
                        "model": model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "step": step,
                        "log": log,
                    },
                    state_file,
                )
    return model.eval(), tokenizer, data, plant, log


def main() -> None:
    """Train the models named and keep their state under ``--work``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("build/planted"))
    parser.add_argument("--steps", type=int)
    asked = parser.parse_args()
    for name in asked.names:
        plan = plan_of(name, **({"steps": asked.steps} if asked.steps else {}))
        train(plan, asked.work / name)


if __name__ == "__main__":
    main()
