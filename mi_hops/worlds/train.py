"""Train a small GPT-2 or LLaMA on Hopland and write it as an ordinary Hugging Face folder.

The loss is the cross-entropy of the answer's tokens and of the full stop that ends it; prompts are
not modelled. What makes a model compose rather than memorise is the ratio of trained compositions
to single facts (compare arXiv 2405.15071), so most of each batch are compositions.

With appositions the loss is that of whole texts: where a description may be followed by its name
("the author of Misery Stephen King"), the state at its end comes to spell the bridge.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import CONTEXTS, FORMS
from mi_hops.result.progress import progress_bar
from mi_hops.worlds.card import model_card
from mi_hops.worlds.hopland import Hopland
from mi_hops.worlds.recipe import RECIPES, AdamW, Family, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END = "."


#: Pieces of similar length that a batch is cut into, which saves padding.
MICRO_BATCHES = 4


def words_of(world: Hopland) -> list[str]:
    """The words of every text the world can utter, sorted: the vocabulary."""
    texts = [c.format("") for c in CONTEXTS]
    for first, second, _ in world.compositions():
        texts += [*Hopland.record(first, second).prompts.values(), second.object]
    for fact in world.facts.values():
        texts += [*fact.prompts().values(), fact.object]
    words = set()
    for text in texts:
        for mark in (".", ":", "?"):
            text = text.replace(mark, f" {mark} ")
        words.update(text.split())
    return sorted(words)


def build_tokenizer(world: Hopland, family: Family) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the family's rule for spaces.

    GPT-2 marks the leading space in the token (as byte-level BPE does), LLaMA uses SentencePiece's
    marker. Both add BOS, as the models are trained with it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marker = {"gpt2": "\u0120", "llama": "\u2581"}[family]
    kinds, tokens = {
        "gpt2": ("bos eos unk pad", "<|endoftext|> <|endoftext|> <|unk|> <|pad|>"),
        "llama": ("unk bos eos pad", "<unk> <s> </s> <pad>"),
    }[family]
    special = {
        f"{kind}_token": token for kind, token in zip(kinds.split(), tokens.split(), strict=True)
    }
    marks = (".", ":", "?")
    vocab = list(dict.fromkeys(special.values()))
    vocab += [w if w in marks else marker + w for w in words_of(world)]
    core = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token=special["unk_token"])
    )
    if family == "gpt2":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
    else:
        split = pre_tokenizers.Split(Regex(r"[.:?]"), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), split])
        core.decoder = decoders.Metaspace()
    bos = special["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, model_max_length=64, **special
    )


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


@dataclass(frozen=True)
class Sequences:
    """Tokenised training texts of one kind and form: `tokens` padded right, `prompt` lengths."""

    tokens: list[list[int]]
    prompt: list[int]

    def __len__(self) -> int:
        return len(self.tokens)


def _sequences(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Sequences:
    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    prompts = encode([p for p, _ in pairs])
    wholes = encode([f"{p} {a}{END}" for p, a in pairs])
    bos = tokenizer.bos_token_id
    for p, w in zip(prompts, wholes, strict=True):
        if w[: len(p)] != p:
            raise ValueError("a prompt's tokens are not the start of prompt + answer's tokens")
    return Sequences([[bos, *w] for w in wholes], [1 + len(p) for p in prompts])


def _apposed(fact: TwoHopFact, form: str, name: str) -> str:
    """The prompt with a name of the bridge behind its description."""
    prompt = fact.prompts[form]
    end = prompt.lower().index(fact.first_hop.lower()) + len(fact.first_hop)
    return f"{prompt[:end]} {name}{prompt[end:]}"


def _names(fact: TwoHopFact, short: bool) -> list[str]:
    """The bridge's name, and each word of it."""
    return [fact.bridge, *(fact.bridge.split() if short else ())]


class Sampler:
    """Draws batches: kind (single or composed) and form by the recipe's shares, then uniformly."""

    def __init__(self, world: Hopland, tokenizer: Any, recipe: Recipe) -> None:
        trained = world.two_hop_facts("train")
        singles = list(world.facts.values())
        self.pools: dict[tuple[bool, str], Sequences] = {}
        for form in FORMS:
            self.pools[True, form] = _sequences(
                tokenizer, [(f.prompts[form], f.answer) for f in trained]
            )
            self.pools[False, form] = _sequences(
                tokenizer, [(f.prompts()[form], f.object) for f in singles]
            )
        self.apposed = {
            form: _sequences(
                tokenizer,
                [
                    (_apposed(f, form, name), f.answer)
                    for f in trained
                    for name in _names(f, recipe.texts.short)
                ],
            )
            for form in FORMS
            if recipe.texts.apposed
        }
        lead_ins = [c.format("").strip() for c in CONTEXTS if c != "{}"]
        self.contexts = tokenizer(lead_ins, add_special_tokens=False)["input_ids"]
        self.recipe, self.rng = recipe, random.Random(recipe.seed)

    def draw(self) -> list[tuple[list[int], int]]:
        """`batch_size` sequences, each as (tokens, length of its prompt), sorted by length."""
        recipe, rng = self.recipe, self.rng
        batch = []
        for form in rng.choices(FORMS, recipe.texts.forms, k=recipe.batch_size):
            composed = rng.random() < recipe.texts.composed
            pool = self.pools[composed, form]
            if composed and recipe.texts.apposed and rng.random() < recipe.texts.apposed:
                pool = self.apposed[form]
            i = rng.randrange(len(pool))
            tokens, prompt = pool.tokens[i], pool.prompt[i]
            if rng.random() < recipe.texts.context:
                lead = rng.choice(self.contexts)
                tokens, prompt = [tokens[0], *lead, *tokens[1:]], prompt + len(lead)
            batch.append((tokens, prompt))
        return sorted(batch, key=lambda pair: len(pair[0]))

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """(tokens [row, pos], flat scored positions, targets, scored positions of the whole batch).

        Rows are padded on the right by repeating their last token: nothing looks ahead, and
        padding is never scored.
        """
        batch = self.draw()
        if self.recipe.texts.apposed:
            batch = [(tokens, 1) for tokens, _ in batch]  # all but BOS is scored
        total = sum(len(tokens) - prompt for tokens, prompt in batch)
        size = math.ceil(len(batch) / MICRO_BATCHES)
        for start in range(0, len(batch), size):
            piece = batch[start : start + size]
            width = len(piece[-1][0])
            rows = np.array([t + t[-1:] * (width - len(t)) for t, _ in piece])
            where = [
                r * width + j
                for r, (t, prompt) in enumerate(piece)
                for j in range(prompt - 1, len(t) - 1)
            ]
            flat = np.array(where)
            yield (
                torch.from_numpy(rows),
                torch.from_numpy(flat),
                torch.from_numpy(rows.reshape(-1)[flat + 1]),
                total,
            )


def _rate(step: int, recipe: Recipe) -> float:
    warmup = recipe.adamw.warmup
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - warmup))


def _optimiser(model: PreTrainedModel, settings: AdamW) -> torch.optim.AdamW:
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
    data = _sequences(tokenizer, pairs)
    order = sorted(range(len(data)), key=lambda i: len(data.tokens[i]))
    first = whole = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(data.tokens[rows[-1]])
        tokens = torch.tensor(
            [data.tokens[i] + data.tokens[i][-1:] * (width - len(data.tokens[i])) for i in rows]
        ).to(device)
        hits = model(tokens, use_cache=False).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        for r, i in enumerate(rows):
            scored = hits[r, data.prompt[i] - 1 : len(data.tokens[i]) - 1]
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


def _step(
    model: PreTrainedModel, sampler: Sampler, optimiser: torch.optim.Optimizer, clip: float
) -> float:
    """One update; the loss of its batch, nats per scored token."""
    loss_of_batch = 0.0
    for tokens, where, targets, total in sampler.micro_batches():
        tokens, where, targets = (t.to(model.device) for t in (tokens, where, targets))
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(rearrange(hidden, "row pos d -> (row pos) d")[where])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / total
        loss.backward()
        loss_of_batch += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss_of_batch


def losses(model: PreTrainedModel, sampler: Sampler) -> Iterator[float]:
    """Train through the sampler's recipe: the loss of each update, nats per scored token."""
    recipe = sampler.recipe
    optimiser = _optimiser(model, recipe.adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_rate, recipe=recipe))
    for _ in range(recipe.steps):
        yield _step(model, sampler, optimiser, recipe.adamw.clip)
        schedule.step()


def _go_on(model: PreTrainedModel, before: Mapping[str, Tensor]) -> None:
    """Take over what there was: embeddings, final norm, and the first blocks."""
    mine = model.state_dict()
    other = {k for k, v in before.items() if k not in mine or mine[k].shape != v.shape}
    if other:
        raise ValueError(
            f"a stage has other shapes than the one before it ({sorted(other)[0]}, for one); a later "
            "stage may have more layers, and everything else must be equal"
        )
    model.load_state_dict({**mine, **before})


def train(
    world: Hopland,
    family: Family,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
    log_every: int = 100,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[dict[str, Any]]]:
    """Train from the recipe's seed.

    Args:
        recipe: default the family's in `RECIPES`.

    Returns:
        model (in evaluation mode), tokenizer, and the log: one record every `log_every` steps with
        ``step`` and ``loss`` (nats per scored token, mean over the steps since the last record).

    Raises:
        ValueError: a later stage that differs in shape other than by more layers.
    """
    recipe = recipe or RECIPES[family]
    tokenizer = build_tokenizer(world, family)
    log: list[dict[str, Any]] = []
    running: list[float] = []
    step, total = 0, sum(stage.steps for stage in recipe.stages)
    weights: dict[str, Tensor] = {}
    with progress_bar(total=total, label=f"train {family}", show=progress) as bar:
        for stage in recipe.stages:
            model = build_model(family, tokenizer, stage).train()
            _go_on(model, weights)
            weights = model.to(torch.device(device)).state_dict()
            for loss in losses(model, Sampler(world, tokenizer, stage)):
                step += 1
                running.append(loss)
                bar.update()
                if step % log_every == 0 or step == total:
                    log.append({"step": step, "loss": sum(running) / len(running)})
                    running = []
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
        "world": {"seed": world.seed, **world.counts()},
        "curve": log,
        "measured": measured,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    card = model_card(folder.name, model.config.model_type, model.num_parameters(), record)
    (folder / "README.md").write_text(card)
