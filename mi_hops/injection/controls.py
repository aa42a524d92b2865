"""What a memory is compared with: other memories, and other vectors, that should not help.

A curated memory is the fact's bridge. It helps for what it says only if it helps more than a random
word, another fact's bridge, or a random vector of the same length. The answer itself is the upper
bound: injecting it may simply write it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mi_hops.injection.encodings import memory_prompt
from mi_hops.model import HookedModel

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

#: Built-in memories. ``norm_matched`` is no text: a random direction of the bridge vector's length.
CONTROLS = ("random_word", "permuted_bridge", "answer", "norm_matched")


def control_texts(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    controls: Sequence[str],
    *,
    words: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Texts to inject for each fact, by the memory's name; ``bridge`` comes first.

    Args:
        controls: names from `CONTROLS`; ``norm_matched`` has no text and is left out here.
        words: name -> word list (for instance one a part of speech). Each makes a control
            ``random_{name}``: one word drawn for each fact. Without them ``random_word`` draws from
            the vocabulary as many whole words as the bridge has tokens, none of them in the fact's
            names.

    Raises:
        ValueError: an unknown control, an empty word list, a vocabulary without whole words, or a
            permuted bridge where a fact has none to be given.
    """
    unknown = sorted(set(controls) - set(CONTROLS))
    if unknown:
        raise ValueError(f"unknown control(s) {unknown}; expected some of {list(CONTROLS)}")
    rng = np.random.default_rng(seed)
    texts = {"bridge": [fact.bridge for fact in facts]}
    if "random_word" in controls and not words:
        texts["random_word"] = _random_words(model, facts, rng)
    for name, pool in (words or {}).items():
        if isinstance(pool, str) or not len(pool):
            raise ValueError(f"words[{name!r}] must be a sequence of words, got {pool!r:.60}")
        texts[f"random_{name}"] = [str(pool[i]) for i in rng.integers(len(pool), size=len(facts))]
    if "permuted_bridge" in controls:
        texts["permuted_bridge"] = permuted_bridges(facts, rng)
    if "answer" in controls:
        texts["answer"] = [fact.answer for fact in facts]
    return texts


def permuted_bridges(facts: Sequence[TwoHopFact], rng: np.random.Generator) -> list[str]:
    """For each fact another fact's bridge: not its own, not its answer, none that leads to it.

    The bridges are dealt out anew among the facts, each as often as it occurs. Where that leaves a
    fact with a bridge it may not have, and none can be swapped for it, one is drawn for it from all
    that it may have; where all other bridges lead to its answer, from these.

    Raises:
        ValueError: a fact for which no other bridge is left.
    """
    bridges = [fact.bridge for fact in facts]
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.bridge, set()).add(fact.answer)

    def differs(i: int, bridge: str) -> bool:
        return bridge not in (facts[i].bridge, facts[i].answer)

    def may(i: int, bridge: str) -> bool:
        return differs(i, bridge) and facts[i].answer not in answers[bridge]

    dealt = [bridges[k] for k in rng.permutation(len(facts))]
    for i in range(len(facts)):
        if may(i, dealt[i]):
            continue
        for j in rng.permutation(len(facts)).tolist():
            if may(i, dealt[j]) and may(j, dealt[i]):
                dealt[i], dealt[j] = dealt[j], dealt[i]
                break
        else:
            others = [b for b in bridges if may(i, b)] or [b for b in bridges if differs(i, b)]
            if not others:
                raise ValueError(
                    f"no other bridge is left for fact {facts[i].id!r}; permuting bridges needs "
                    "facts with different ones"
                )
            dealt[i] = others[int(rng.integers(len(others)))]
    return dealt


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
                f"the vocabulary has {len(free)} whole words for {n} random ones; pass words="
            )
        found.append(" ".join(free[i] for i in rng.choice(len(free), size=n, replace=False)))
    return found


def whole_words(model: HookedModel) -> list[str]:
    """Tokens that are words by themselves: letters only, and one token again when tokenised."""
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), model.cfg.d_vocab))])
    words = dict.fromkeys(
        text.strip() for i, text in enumerate(texts) if i not in special and text.strip().isalnum()
    )
    ids = tokenizer(list(words), add_special_tokens=False)["input_ids"] if words else []
    unknown = tokenizer.unk_token_id
    return [
        word
        for word, found in zip(words, ids, strict=True)
        if len(found) == 1 and found[0] != unknown
    ]


def norm_matched(
    vectors: Float[Tensor, "memory layer d_model"],
    seed: int = 0,
    *,
    within: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "memory layer d_model"]:
    """Random directions with the lengths of `vectors`; one direction a memory for all its layers.

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
