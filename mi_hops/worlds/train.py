"""Train a small GPT-2 or LLaMA on Hopland and write it as an ordinary Hugging Face folder.

The loss is the cross-entropy of the answer's tokens and of the full stop that ends it; prompts are
not modelled. What makes a model compose rather than memorise is the ratio of trained compositions
to single facts (compare arXiv 2405.15071), so most of each batch are compositions.

With appositions the loss is that of whole texts: where a description may be followed by its name
("the author of Misery Stephen King"), the state at its end comes to spell the bridge.
"""

from __future__ import annotations

import json
import random
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from mi_hops.facts.templates import FORMS
from mi_hops.result.files import replacing
from mi_hops.result.progress import progress_bar
from mi_hops.worlds.card import model_card
from mi_hops.worlds.hopland import Hopland
from mi_hops.worlds.recipe import RECIPES, AdamW, Family, Recipe
from mi_hops.worlds.texts import Sampler, Trees, build_tokenizer, padded, sequences, trees

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Seconds after which a run's state is written again.
KEPT_EVERY = 30.0


def build_model(family: Family, tokenizer: Any, recipe: Recipe) -> PreTrainedModel:
    """An untrained model of the family in the recipe's shape, seeded."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = recipe.shape
    if family == "gpt2":
        gpt2 = GPT2Config(
            n_positions=shape.n_ctx,
            n_embd=shape.d_model,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_inner=shape.d_mlp,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            activation_function="gelu_pytorch_tanh",
            **ids,
        )
        return GPT2LMHeadModel(gpt2)
    llama = LlamaConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_kv_head,
        intermediate_size=shape.d_mlp * 2 // 3 // 8 * 8,
        max_position_embeddings=shape.n_ctx,
        tie_word_embeddings=False,
        **ids,
    )
    return LlamaForCausalLM(llama)


def _rate(step: int, recipe: Recipe) -> float:
    warmup = recipe.adamw.warmup
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - warmup))


def optimiser_of(model: PreTrainedModel, settings: AdamW) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 256
) -> dict[str, float]:
    """Greedy accuracy over the whole vocabulary of (prompt, answer) pairs.

    Returns:
        ``"first_token"`` and ``"whole"``: shares in [0, 1]; whole means every answer token and the
        full stop after it. Greedy decoding gives the whole answer exactly if every teacher-forced
        argmax along it is correct, so no generation loop is needed.
    """
    device = next(model.parameters()).device
    data = sorted(sequences(tokenizer, pairs), key=lambda pair: len(pair[0]))
    first = whole = 0
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        tokens = padded([row for row, _ in rows]).to(device)
        hits = model(tokens, use_cache=False).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        for hit, (row, prompt) in zip(hits, rows, strict=True):
            scored = hit[prompt - 1 : len(row) - 1]
            first += bool(scored[0])
            whole += bool(scored.all())
    n = max(1, len(pairs))
    return {"first_token": first / n, "whole": whole / n}


def measure(
    model: PreTrainedModel, tokenizer: Any, world: Hopland, *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy by split and form; ``limit`` takes the first of a seeded shuffle of each split."""
    rng = random.Random(0)
    splits: dict[str, list[tuple[dict[str, str], str]]] = {
        "single": [(f.prompts(), f.object) for f in world.facts.values()]
    }
    for split in ("train", "seen_parts", "first_unseen", "second_unseen"):
        splits[split] = [(dict(f.prompts), f.answer) for f in world.two_hop_facts(split)]
    report: dict[str, dict[str, Any]] = {}
    for split, items in splits.items():
        items = rng.sample(items, min(limit or len(items), len(items)))
        for form in FORMS:
            scores = accuracy(model, tokenizer, [(p[form], a) for p, a in items])
            report[f"{split}/{form}"] = {"n": len(items), **scores}
    return report


def loss_of(model: PreTrainedModel, part: Trees) -> Tensor:
    """Cross-entropy of all that is scored, summed, in nats."""
    tokens, depths, seen, where, targets = (
        t.to(model.device) for t in (part.tokens, part.depths, part.seen, part.where, part.targets)
    )
    given = {"attention_mask": seen, "position_ids": depths, "use_cache": False}
    hidden = model.base_model(tokens, **given).last_hidden_state
    logits = model.lm_head(rearrange(hidden, "row pos d -> (row pos) d")[where])
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _update(model: PreTrainedModel, sampler: Sampler, optimiser: torch.optim.Optimizer) -> float:
    """One update; the loss of its batch, nats per scored token."""
    loss_of_batch, recipe = 0.0, sampler.recipe
    batch = sampler.batch()
    total = sum(len(tokens) - prompt for tokens, prompt in batch)
    for part in trees(batch):
        # Around one part alone: autocast keeps weights it has cast until its block ends.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            loss = loss_of(model, part) / total
        loss.backward()
        loss_of_batch += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.adamw.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss_of_batch


class Training:
    """A stage under way: its model, its optimiser, and where it stands in the order of batches."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler) -> None:
        self.model, self.sampler, self.step = model, sampler, 0
        self.optimiser = optimiser_of(model, sampler.recipe.adamw)

    def losses(self) -> Iterator[float]:
        """Train to the stage's end: the loss of each update, nats per scored token."""
        recipe = self.sampler.recipe
        while self.step < recipe.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = recipe.adamw.lr * _rate(self.step, recipe)
            loss = _update(self.model, self.sampler, self.optimiser)
            self.step += 1
            yield loss

    def state(self) -> dict[str, Any]:
        """All that going on needs, between two updates."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "drawn": self.sampler.rng.getstate(),
            "step": self.step,
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take up a `state` of this stage."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.sampler.rng.setstate(state["drawn"])
        self.step = state["step"]


def _take_over(model: PreTrainedModel, before: Mapping[str, Tensor]) -> None:
    """Take over what there was: embeddings, final norm, and the first blocks."""
    mine = model.state_dict()
    other = {k for k, v in before.items() if k not in mine or mine[k].shape != v.shape}
    if other:
        raise ValueError(
            f"a stage has other shapes than the one before it ({sorted(other)[0]}, for one); a later "
            "stage may have more layers, and everything else must be equal"
        )
    model.load_state_dict({**mine, **before})


def _described(world: Hopland) -> dict[str, int]:
    return {"seed": world.seed, **world.counts()}


def _found(path: Path | None, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a stopped run of the same kind has kept; nothing where there is no file."""
    if path is None or not path.exists():
        return {}
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() is not None  # torch compares no checksums
    except (zipfile.BadZipFile, zlib.error):
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged; delete it, and training starts anew")
    found = torch.load(path, map_location=device, weights_only=True)
    if found["run"] != run:
        raise ValueError(
            f"{path} is of a run with another family, recipe or world; delete it, or keep this "
            "run's state in another file"
        )
    return found


def train(
    world: Hopland,
    family: Family,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
    log_every: int = 100,
    state: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[dict[str, Any]]]:
    """Train from the recipe's seed, or go on where a stopped run left off.

    Args:
        recipe: default the family's in `RECIPES`.
        state: file that the run's state is written to every `KEPT_EVERY` seconds. Where it is there,
            training goes on from it, and on the same machine and device the weights come out equal
            bit for bit to those of a run that was not stopped. It stays when training is done.

    Returns:
        model (in evaluation mode), tokenizer, and the log: one record every `log_every` steps with
        ``step`` and ``loss`` (nats per scored token, mean over the steps since the last record).

    Raises:
        ValueError: a later stage that differs in shape other than by more layers; a `state` that is
            damaged or of another run.
    """
    recipe = recipe or RECIPES[family]
    device, state = torch.device(device), None if state is None else Path(state)
    tokenizer = build_tokenizer(world, family)
    run = {
        "family": family,
        "recipe": asdict(recipe),
        "world": _described(world),
        "log_every": log_every,
    }
    found = _found(state, run, device)
    log: list[dict[str, Any]] = found.get("log", [])
    running: list[float] = found.get("running", [])
    stages, at, kept_at = recipe.stages, found.get("stage", 0), time.monotonic()
    step, total = found.get("step", 0), sum(stage.steps for stage in stages)
    weights: dict[str, Tensor] = {}
    with progress_bar(total=total, done=step, label=f"train {family}", show=progress) as bar:
        for i, part in enumerate(stages[at:], at):
            model = build_model(family, tokenizer, part).train()
            _take_over(model, weights)
            weights = model.to(device).state_dict()
            training = Training(model, Sampler(world, tokenizer, part))
            if found and i == at:
                training.go_on(found["training"])
            for loss in training.losses():
                step += 1
                running.append(loss)
                bar.update()
                if step % log_every == 0 or step == total:
                    log.append({"step": step, "loss": sum(running) / len(running)})
                    running = []
                if state and time.monotonic() - kept_at >= KEPT_EVERY:
                    now = {"stage": i, "step": step, "log": log, "running": running}
                    with replacing(state, overwrite=True) as file:
                        torch.save({"run": run, "training": training.state(), **now}, file)
                    kept_at = time.monotonic()
    if recipe.half:
        model.half().float()
    return model.eval(), tokenizer, log


def save(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    recipe: Recipe,
    world: Hopland,
    log: list[dict[str, Any]],
    measured: dict[str, dict[str, Any]],
) -> None:
    """Write checkpoint, tokenizer, ``training.json`` (recipe, world, curve, accuracy) and card."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.config.model_type == "gpt2":
        # Trained with the fused kernel; the file names the same function as GPT-2's own do.
        model.config.activation_function = "gelu_new"
    state = {k: v.half() if recipe.half else v for k, v in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "world": _described(world),
        "curve": log,
        "measured": measured,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    card = model_card(folder.name, model.config.model_type, model.num_parameters(), record)
    (folder / "README.md").write_text(card)
