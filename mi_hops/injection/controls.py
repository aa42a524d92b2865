"""What a memory is compared with: other memories, and other vectors, that should not help.

A curated memory is the fact's bridge. It helps because of what it says only if it helps more than a random
word, another fact's bridge, or a random vector of the same length. The answer itself is the upper
bound: injecting it may simply write it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.encodings import memory_prompt
from mi_hops.model import HookedModel

# How byte-level and SentencePiece vocabularies write the space before a word.
_SPACE = "Ġ▁"

#: Built-in memories. ``norm_matched`` is not a text: a random direction of the bridge vector's length.
CONTROLS = ("random_word", "permuted_bridge", "answer", "norm_matched")


@dataclass(frozen=True)
class Controls:
    """Memories to inject besides the bridge. Names of controls are accepted too.

    Args:
        names: from `CONTROLS`.
        words: name -> word list (one per part of speech, say). Each makes a control
            ``random_{name}``: one word drawn for each fact. Without them ``random_word`` draws from
            the vocabulary as many whole words as the bridge has tokens, none of them in the fact's
            names.
        memories: further memories, name -> one text per fact.
        seed: of the draws.

    Raises:
        ValueError: an unknown control, an empty word list, or a memory with a built-in name.
    """

    names: Sequence[str] = CONTROLS
    words: Mapping[str, Sequence[str]] | None = None
    memories: Mapping[str, Sequence[str]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - set(CONTROLS)):
            raise ValueError(f"unknown control(s) {unknown}; expected some of {list(CONTROLS)}")
        for name, pool in (self.words or {}).items():
            if isinstance(pool, str) or not len(pool):
                raise ValueError(f"words[{name!r}] must be a sequence of words, got {pool!r:.60}")
        if taken := [name for name in self.memories or {} if name in (*CONTROLS, "bridge")]:
            raise ValueError(f"memories may not be called {taken[0]!r}, which is built in")

    def __repr__(self) -> str:
        more = [
            f"{len(given)} {what}" for what in ("words", "memories") if (given := vars(self)[what])
        ]
        return f"Controls({', '.join([*self.names, *more])}; seed {self.seed})"

    @classmethod
    def of(cls, given: ControlsLike) -> Controls:
        """Controls as they are, or of names."""
        return given if isinstance(given, Controls) else cls(tuple(given))

    @property
    def norm_matched(self) -> bool:
        """Whether random directions are requested."""
        return "norm_matched" in self.names

    def texts(
        self,
        model: HookedModel,
        facts: Sequence[TwoHopFact],
        given: Sequence[TwoHopFact] | None = None,
    ) -> dict[str, list[str]]:
        """Texts to inject for each fact, by the memory's name; ``bridge`` comes first.

        Args:
            given: the facts that `memories` are given for, in order, and that a fact may get its
                permuted bridge from where `facts` have none for it; default `facts`.

        Raises:
            ValueError: a vocabulary without whole words, another number of memories than facts, or a
                permuted bridge where there is no other for a fact.
        """
        rng = np.random.default_rng(self.seed)
        texts = {"bridge": [fact.bridge for fact in facts]}
        if "random_word" in self.names and not self.words:
            texts["random_word"] = _random_words(model, facts, rng)
        for name, pool in (self.words or {}).items():
            drawn = rng.integers(len(pool), size=len(facts))
            texts[f"random_{name}"] = [str(pool[i]) for i in drawn]
        if "permuted_bridge" in self.names:
            texts["permuted_bridge"] = permuted_bridges(facts, rng, given)
        if "answer" in self.names:
            texts["answer"] = [fact.answer for fact in facts]
        row = {id(fact): i for i, fact in enumerate(facts if given is None else given)}
        for name, column in (self.memories or {}).items():
            if isinstance(column, str) or len(column) != len(row):
                raise ValueError(
                    f"memories[{name!r}] must give one text for each of {len(row)} facts"
                )
            texts[name] = [column[row[id(fact)]] for fact in facts]
        return texts


#: What is accepted where controls are.
ControlsLike = Sequence[str] | Controls


def permuted_bridges(
    facts: Sequence[TwoHopFact],
    rng: np.random.Generator,
    more: Sequence[TwoHopFact] | None = None,
) -> list[str]:
    """Another fact's bridge for each fact: not its own, not its answer, and not leading to it.

    The bridges are randomly permuted among the facts. Where that leaves a fact with a bridge it may
    not have, and none can be swapped for it, one is drawn for it from all that it may have; where
    all other bridges lead to its answer, from these; and where there is none, from those of `more`.

    Raises:
        ValueError: a fact for which no other bridge is left.

    Examples:
        >>> import mi_hops, numpy as np
        >>> facts = mi_hops.load_facts("hopland")[::300]
        >>> len(mi_hops.permuted_bridges(facts, np.random.default_rng(0))) == len(facts)
        True
    """
    bridges = [fact.bridge for fact in facts]
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.bridge, set()).add(fact.answer)

    def differs(i: int, bridge: str) -> bool:
        return bridge not in (facts[i].bridge, facts[i].answer)

    def may(i: int, bridge: str) -> bool:
        return differs(i, bridge) and facts[i].answer not in answers[bridge]

    permuted = [bridges[k] for k in rng.permutation(len(facts))]
    for i in range(len(facts)):
        if may(i, permuted[i]):
            continue
        for j in rng.permutation(len(facts)).tolist():
            if may(i, permuted[j]) and may(j, permuted[i]):
                permuted[i], permuted[j] = permuted[j], permuted[i]
                break
        else:
            further = [fact.bridge for fact in more or ()]
            others = (
                [b for b in bridges if may(i, b)]
                or [b for b in bridges if differs(i, b)]
                or [b for b in further if differs(i, b)]
            )
            if not others:
                raise ValueError(
                    f"no other bridge is left for fact {facts[i].id!r}; permuting bridges needs "
                    "facts with different ones"
                )
            permuted[i] = others[int(rng.integers(len(others)))]
    return permuted


def _random_words(
    model: HookedModel, facts: Sequence[TwoHopFact], rng: np.random.Generator
) -> list[str]:
    vocabulary = whole_words(model)
    found = []
    for fact in facts:
        n = len(memory_prompt(model, fact.bridge))
        own = {
            w.casefold()
            for name in (fact.bridge, fact.answer, fact.first_hop)
            for w in name.split()
        }
        free = [w for w in vocabulary if w.casefold() not in own]
        if len(free) < n:
            raise ValueError(
                f"the vocabulary has {len(free)} whole words for {n} random ones; pass Controls(words=...)"
            )
        found.append(" ".join(free[i] for i in rng.choice(len(free), size=n, replace=False)))
    return found


def whole_words(model: HookedModel) -> list[str]:
    """Tokens that are words by themselves: letters only, and one token again when tokenised.

    Where the vocabulary marks the space before a word, what stands without it may be a part of a
    word and is none of them. A vocabulary without a word of letters only gives those with digits.
    """
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(len(tokenizer), model.cfg.d_vocab)) if i not in special]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    marked = [i for i, token in zip(ids, tokens, strict=True) if token and token[0] in _SPACE]
    texts = tokenizer.batch_decode([[i] for i in marked or ids])
    words = list(dict.fromkeys(text.strip() for text in texts if text.strip().isalnum()))
    words = [word for word in words if word.isalpha()] or words
    again = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    unknown = tokenizer.unk_token_id
    return [
        word
        for word, found in zip(words, again, strict=True)
        if len(found) == 1 and found[0] != unknown
    ]


def norm_matched(
    vectors: Float[Tensor, "memory layer d_model"],
    seed: int = 0,
    *,
    within: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "memory layer d_model"]:
    """Random directions with the lengths of `vectors`; one direction per memory, for all its layers.

    Args:
        within: brings directions ``[memory, layer, d_model]`` into the space that the vectors lie
            in (what some heads can write); their length is set afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(vectors.shape[0], 1, vectors.shape[-1], generator=generator)
    drawn = drawn.to(vectors.device, vectors.dtype).expand_as(vectors)
    if within is not None:
        drawn = within(drawn)
    tiny = torch.finfo(drawn.dtype).tiny
    unit = drawn / drawn.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return unit * vectors.norm(dim=-1, keepdim=True)
