"""Is the text that a repaired model writes still varied, and still about the right thing?

Two scores of generated text, as ROME's evaluation defines them (arXiv 2202.05262, section 4):

* *generation entropy*: the mean over n = 2, 3 of ``w_n H_n`` with H_n the entropy, in bits, of the
  text's n-grams of words, w_2 = 2/3 and w_3 = 4/3. A model that an edit has broken repeats itself,
  and the entropy falls.
* *consistency*: the cosine of the TF-IDF vectors of the text and of reference texts, about things
  that have the new object. The weights of words are counted over the references of all cases.

The published code splits words as NLTK does; here a word is a run of letters and digits, and every
other sign is a word of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel, provenance
from mi_hops.reasoning.evaluate import Repairs, named_repairs
from mi_hops.reasoning.evaluation import UNREPAIRED
from mi_hops.result.result import Result
from mi_hops.sweep.repair import Repair
from mi_hops.sweep.sample import sample

#: n of the n-grams -> weight of their entropy.
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_WORD = re.compile(r"\w+|[^\w\s]")


def generation_entropy(text: str) -> float:
    """Weighted entropy of a text's n-grams, in bits; 0 for a text of fewer than three words.

    Examples:
        >>> generation_entropy("one word one word one word") < generation_entropy("no word is twice here")
        True
    """
    words = _words(text)
    entropies = []
    for n, weight in _WEIGHTS.items():
        counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()))
        shares = counts / max(counts.sum(), 1)
        entropies.append(weight * -float((shares * np.log2(shares)).sum()))
    return float(np.mean(entropies)) + 0.0


def consistency(text: str, references: Sequence[str], weights: Mapping[str, float]) -> float:
    """Cosine of a text's and its references' TF-IDF vectors; NaN where either has no known word.

    Args:
        weights: word -> inverse document frequency (`word_weights`); other words do not count.
    """
    one, other = (
        Counter(w for w in _words(t) if w in weights) for t in (text, " ".join(references))
    )
    norms = [math.sqrt(sum((n * weights[w]) ** 2 for w, n in c.items())) for c in (one, other)]
    if not all(norms):
        return float("nan")
    shared = sum(n * other[w] * weights[w] ** 2 for w, n in one.items())
    return shared / (norms[0] * norms[1])


def word_weights(texts: Sequence[str]) -> dict[str, float]:
    """Word -> ``ln((1 + N) / (1 + df)) + 1`` over N texts, df of which have the word."""
    seen = Counter(word for text in texts for word in set(_words(text)))
    return {word: math.log((1 + len(texts)) / (1 + df)) + 1 for word, df in seen.items()}


def fluency(
    model: HookedModel,
    repairs: Repairs | Sequence[Repairs],
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    references: Mapping[str, Sequence[str]] | None = None,
    n_tokens: int = 100,
    top_k: int | None = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> Result:
    """Entropy and consistency of the text that each repaired model writes after its case's prompt.

    Each repair is fitted to all facts at once, and each fact's two-hop prompt is continued under its
    own state, and once unrepaired. The texts are drawn with one seed, under an `InPlaceRepair` each
    alone.

    Args:
        form: of the prompts; default each fact's first.
        references: fact id -> texts about things that have the fact's answer; without them, no
            consistency.
        n_tokens: to write.
        top_k: likeliest tokens that each is drawn from (the published code's 5); None for all.

    Returns:
        `Result` on (example, repair), the first repair being ``"unrepaired"``: ``entropy`` in bits,
        ``consistency`` (NaN without references) and the ``text``, its prompt included. Scores are of
        what was written, without the prompt.

    Raises:
        ValueError: no facts, repairs of one name, a fact without prompt of the form.
        TokenError: a prompt that does not fit the context together with what is to come.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.reasoning import fluency
        >>> model, facts = mi_hops.load_model("hops-gpt2"), mi_hops.load_facts("hopland")[:2]
        >>> written = fluency(model, mi_hops.CremeRepair(), facts, n_tokens=12)
        >>> written["entropy"].dims, written["repair"].values.tolist()
        (('example', 'repair'), ['unrepaired', 'CREME'])
    """
    if not facts:
        raise ValueError("no facts whose prompts could be continued")
    named = named_repairs(repairs)
    prompts = [fact.prompt(form) for fact in facts]
    how = {"n_tokens": n_tokens, "top_k": top_k, "seed": seed, "batch_size": batch_size}
    columns = [sample(model, prompts, **how)]  # type: ignore[arg-type]
    for repair in named:
        if isinstance(repair, Repair):
            states = list(repair.fit(model, facts))
            columns.append(sample(model, prompts, repair=repair, states=states, **how))  # type: ignore[arg-type]
            continue
        alone = []
        for fact, prompt in zip(facts, prompts, strict=True):
            with repair.applied(model, fact):
                alone += sample(model, [prompt], **how)  # type: ignore[arg-type]
        columns.append(alone)
    texts = np.array(columns, dtype=object).T
    written = [[text[len(p) :] for text in row] for row, p in zip(texts, prompts, strict=True)]
    given = references or {}
    weights = word_weights([text for fact in facts for text in given.get(fact.id, ())])
    alike = [
        [consistency(text, given.get(fact.id, ()), weights) for text in row]
        for row, fact in zip(written, facts, strict=True)
    ]
    dims = ("example", "repair")
    return Result.from_arrays(
        {
            "entropy": (dims, np.array([[generation_entropy(t) for t in row] for row in written])),
            "consistency": (dims, np.array(alike)),
        },
        coords={
            "example": [fact.id for fact in facts],
            "repair": [UNREPAIRED, *(repair.name for repair in named)],
            "text": (dims, texts),
        },
        units={"entropy": "bits", "consistency": "cosine"},
        provenance=provenance(model, method="fluency", form=form, **how),
        title="Text written by the repaired model",
        main="entropy",
        allow_nonfinite=True,
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
