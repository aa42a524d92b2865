"""The texts of a Hopland training run: a word-level tokenizer, and batches drawn by the recipe's shares."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.templates import CONTEXTS, FORMS
from mi_hops.worlds.hopland import Hopland
from mi_hops.worlds.recipe import Family, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "."

#: Tokens of a row of trees, and rows that are run at a time.
WIDTH, ROWS = 128, 32

#: Tokens of a text, and how many of them are its prompt.
Tokenised = tuple[list[int], int]


def words_of(world: Hopland) -> list[str]:
    """The words of every text the world can utter, sorted: the vocabulary."""
    texts = [c.format("") for c in CONTEXTS]
    for first, second, _ in world.compositions():
        texts += [*Hopland.record(first, second).prompts.values(), second.object]
    for fact in world.facts.values():
        texts += [*fact.prompts().values(), fact.object]
    return sorted({word for text in texts for word in re.findall(r"[.:?]|[^\s.:?]+", text)})


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
    vocab = list(dict.fromkeys(special.values()))
    vocab += [w if w in (".", ":", "?") else marker + w for w in words_of(world)]
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


def sequences(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Tokenised]:
    """(prompt, answer) pairs as BOS, prompt, answer and full stop."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    prompts = encode([p for p, _ in pairs])
    wholes = encode([f"{p} {a}{END}" for p, a in pairs])
    bos = tokenizer.bos_token_id
    for p, w in zip(prompts, wholes, strict=True):
        if w[: len(p)] != p:
            raise ValueError("a prompt's tokens are not the start of prompt + answer's tokens")
    return [([bos, *w], 1 + len(p)) for p, w in zip(prompts, wholes, strict=True)]


def padded(rows: Sequence[list[int]]) -> Tensor:
    """[row, pos]: rows filled up on the right with their last token, for nothing looks ahead."""
    width = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])


@dataclass(frozen=True)
class Trees:
    """Texts as trees of tokens, a few in each row: what texts begin with alike is there, and run, once.

    Attributes:
        tokens: [row, pos]
        depths: [row, pos], the place of each token in its text.
        seen: [row, 1, pos, pos], true where a token comes before another one in a text, or is the same.
        where: flat places in `tokens` of what is scored, once for each text.
        targets: the token that follows there.
    """

    tokens: Tensor
    depths: Tensor
    seen: Tensor
    where: Tensor
    targets: Tensor


class _Row:
    """A row of trees under way, to which texts are added in the order of their tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.paths: list[list[int]] = []
        self.scored: list[tuple[int, int]] = []
        self._path: list[int] = []

    def room_for(self, text: Tokenised) -> bool:
        """Whether the text fits; an empty row has room for any."""
        new = len(text[0]) - 1 - self._shared(text[0])
        return not self.tokens or len(self.tokens) + new <= WIDTH

    def add(self, text: Tokenised) -> None:
        """All but the text's last token, after which nothing is read."""
        tokens, prompt = text
        del self._path[self._shared(tokens) :]
        for token in tokens[len(self._path) : -1]:
            self._path.append(len(self.tokens))
            self.tokens.append(token)
            self.depths.append(len(self._path) - 1)
            self.paths.append(list(self._path))
        self.scored += zip(self._path[prompt - 1 :], tokens[prompt:], strict=True)

    def _shared(self, tokens: list[int]) -> int:
        before = (self.tokens[i] for i in self._path)
        pairs = zip(before, tokens[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def trees(texts: Sequence[Tokenised]) -> Iterator[Trees]:
    """All texts, `ROWS` rows of trees at a time; rows are filled up with single tokens."""
    rows = [_Row()]
    for text in sorted(texts):
        if not rows[-1].room_for(text):
            rows.append(_Row())
        rows[-1].add(text)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        width = max(len(row.tokens) for row in part)
        seen = torch.eye(width, dtype=torch.bool).repeat(len(part), 1, 1, 1)
        for r, row in enumerate(part):
            for i, path in enumerate(row.paths):
                seen[r, 0, i, path] = True
        filled = [[*row.tokens, *[0] * (width - len(row.tokens))] for row in part]
        depths = [[*row.depths, *[0] * (width - len(row.tokens))] for row in part]
        scored = [(r * width + i, t) for r, row in enumerate(part) for i, t in row.scored]
        where, targets = torch.tensor(scored).T
        yield Trees(torch.tensor(filled), torch.tensor(depths), seen, where, targets)


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
        if not trained:
            raise ValueError(f"{world!r} has no composition to train on; take a larger world")
        singles = list(world.facts.values())
        self.pools: dict[tuple[str, str], list[Tokenised]] = {}
        for form in FORMS:
            pairs = {
                "composed": [(f.prompts[form], f.answer) for f in trained],
                "single": [(f.prompts()[form], f.object) for f in singles],
            }
            if recipe.texts.apposed:
                pairs["apposed"] = [
                    (_apposed(f, form, name), f.answer)
                    for f in trained
                    for name in _names(f, recipe.texts.short)
                ]
            for kind, given in pairs.items():
                self.pools[kind, form] = sequences(tokenizer, given)
        lead_ins = [c.format("").strip() for c in CONTEXTS if c != "{}"]
        self.contexts = tokenizer(lead_ins, add_special_tokens=False)["input_ids"]
        self.recipe, self.rng = recipe, random.Random(recipe.seed)

    def draw(self) -> list[Tokenised]:
        """`batch_size` sequences."""
        texts, rng = self.recipe.texts, self.rng
        batch = []
        for form in rng.choices(FORMS, texts.forms, k=self.recipe.batch_size):
            kind = "composed" if rng.random() < texts.composed else "single"
            if kind == "composed" and texts.apposed and rng.random() < texts.apposed:
                kind = "apposed"
            tokens, prompt = rng.choice(self.pools[kind, form])
            if rng.random() < texts.context:
                lead = rng.choice(self.contexts)
                tokens, prompt = [tokens[0], *lead, *tokens[1:]], prompt + len(lead)
            batch.append((tokens, prompt))
        return batch

    def batch(self) -> list[Tokenised]:
        """What is drawn, with as many tokens as prompt as are not scored."""
        drawn = self.draw()
        if self.recipe.texts.apposed:
            return [(tokens, 1) for tokens, _ in drawn]  # all but BOS is scored
        return drawn
