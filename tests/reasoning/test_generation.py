"""Text under a repair: drawn as the repaired model would, and scored by formulas written out here."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import mi_hops
from mi_hops.editing import EditRepair, creme
from mi_hops.model import forward
from mi_hops.reasoning import fluency, generation_entropy
from mi_hops.reasoning.generation import consistency, word_weights
from mi_hops.text.tokens import encode
from tests.editing.conftest import make_fact
from tests.models import SHAPES, cases
from tests.repairs import AddVector


@pytest.mark.parametrize("text", ["a b c", "a b a b a b", "Is it so? It is, it is.", "one"])
def test_entropy_by_hand(text):
    words = text.lower().replace("?", " ?").replace(",", " ,").replace(".", " .").split()
    want = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        total = sum(grams.values())
        want.append(weight * sum(-k / total * math.log2(k / total) for k in grams.values()))
    assert generation_entropy(text) == pytest.approx(sum(want) / 2)


def test_consistency_is_scikit_learns():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    references = ["The harp is played in Norland.", "Norland has harps, and a king!"]
    written = "A king of Norland, a king."
    words = text.TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit(references)
    one, two = words.transform([written, " ".join(references)]).toarray()
    want = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert consistency(written, references, word_weights(references)) == pytest.approx(want)
    assert math.isnan(consistency("nothing here", references, word_weights(references)))


@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_the_likeliest_token_under_a_repair_is_what_full_passes_give(load_tiny, shape, backend):
    model = load_tiny(shape, backend)
    facts = [make_fact(i) for i in range(3)]
    prompts = [f.prompt("suffix") for f in facts]
    repair = AddVector(later=True)
    states = repair.fit(model, facts)
    states[1] = None
    texts = mi_hops.sample(model, prompts, n_tokens=4, top_k=1, repair=repair, states=states)
    for prompt, state, text in zip(prompts, states, texts, strict=True):
        ids = list(encode(model, prompt).ids)
        start = len(ids)
        for _ in range(4):
            rows = mi_hops.sweep.repair.Rows((encode(model, prompt),), len(ids))
            with torch.no_grad():
                logits = forward(
                    model, torch.tensor([ids]), hooks=repair.hooks(model, [state], rows)
                )
            ids.append(int(logits[0, -1].argmax()))
        said = model.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert text == f"{prompt} {said}"


def test_edits_by_hooks_write_what_edited_weights_write(load_tiny):
    model = load_tiny()
    fact = make_fact()
    edit = creme(model, fact, layers=[1, 2], form="suffix")
    about = {fact.id: ["w50 w51 w52"]}
    how = {"form": "suffix", "n_tokens": 12, "seed": 3, "top_k": 4}
    found = fluency(model, edit, [fact], references=about, **how)
    assert found["repair"].values.tolist() == ["unrepaired", "edit"]
    plain, edited = found["text"].values[0]
    assert plain == mi_hops.sample(model, [fact.prompt("suffix")], n_tokens=12, seed=3, top_k=4)[0]
    with edit.applied(model):
        again = mi_hops.sample(model, [fact.prompt("suffix")], n_tokens=12, seed=3, top_k=4)[0]
    assert edited == again != plain
    written = edited[len(fact.prompt("suffix")) :]
    assert found["entropy"].values[0, 1] == pytest.approx(generation_entropy(written))


def test_what_is_changed_in_place_writes_as_on_rows(load_tiny):
    class InPlace:
        name = "in place"

        def applied(self, model, fact):
            return edits[fact.id].applied(model)

    model, facts = load_tiny(), [make_fact(0), make_fact(1)]
    edits = {f.id: creme(model, f, layers=[1, 2], form="suffix") for f in facts}
    how = {"form": "suffix", "n_tokens": 12, "top_k": 1}
    found = fluency(model, [InPlace(), EditRepair(edits, name="on rows")], facts, **how)
    unrepaired, ours, rows = found["text"].values.T.tolist()
    assert ours == rows != unrepaired


def test_refusals(load_tiny):
    model, fact = load_tiny(), make_fact()
    with pytest.raises(ValueError, match="no facts"):
        fluency(model, AddVector(), [])
    with pytest.raises(ValueError, match="top_k is 0"):
        mi_hops.sample(model, ["w1"], n_tokens=1, top_k=0)
    with pytest.raises(ValueError, match="go together"):
        mi_hops.sample(model, [fact.prompt()], n_tokens=1, repair=AddVector())
