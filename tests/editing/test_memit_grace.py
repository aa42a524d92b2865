"""MEMIT spreads what ROME's search finds; GRACE's codebook follows its rule."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import Request, second_moments
from mi_hops.editing.baselines.grace import Codebook, GraceRepair
from mi_hops.editing.baselines.memit import MemitRepair, memit
from mi_hops.editing.baselines.rome import ValueSearch, search_values
from mi_hops.editing.teaching import answer_loss, teacher_forced
from mi_hops.model import forward, hook_name, read_matrix, write_matrix
from mi_hops.sweep.generate import generate
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.text.tokens import encode, pad
from tests.editing.conftest import assert_same_bits, of_lengths, weights
from tests.editing.test_creme import last_mean
from tests.editing.test_rome import QUICK, at_subject

BARE = {**QUICK, "templates": ("{}",)}


@pytest.mark.slow_case("llama")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_last_layer_makes_up_what_is_missing(load_tiny, facts, shape):
    """At ridge 0 the stream behind the last layer is exactly what was searched for."""
    model = load_tiny(shape, "bridge", "float64")
    c = second_moments(model, facts, layers=[0, 1], matrix="W_out", shrinkage=0.2)
    two = facts[:2]
    end = hook_name("resid_post", 1)
    values = search_values(
        model, [Request.from_fact(f) for f in two], 1, ValueSearch(**BARE), hook=end
    ).values
    before = [at_subject(model, f.prompt(), f.first_hop, "resid_post", 1) for f in two]
    edit = memit(model, two, layers=[1, 0], covariance=c, ridge=0.0, **BARE)
    assert [c.site for c in edit.changes] == [("W_out", 0), ("W_out", 1)]
    with edit.applied(model):
        for f, old, value in zip(two, before, values, strict=True):
            new = at_subject(model, f.prompt(), f.first_hop, "resid_post", 1)
            torch.testing.assert_close(new - old, value, atol=1e-6, rtol=1e-5)


def test_with_a_ridge_each_layer_solves_memits_normal_equations(load_tiny, facts):
    """Layer by layer in the weights: (λC + K^T K)^-1 K^T R, R the layer's share of what is missing."""
    model = load_tiny("gpt2", "bridge", "float64", fresh=True)
    layers, ridge, three = [0, 1], 0.2, facts[:3]
    c = second_moments(model, facts, layers=layers, matrix="W_out", shrinkage=0.2)
    options = {**BARE, "position": "last"}
    requests = [Request.from_fact(f) for f in three]
    end = hook_name("resid_post", 1)
    values = search_values(model, requests, 1, ValueSearch(**options), hook=end).values

    def at_last(kind, layer):
        return torch.stack([last_mean(model, [r.two_hop_prompt], kind, layer) for r in requests])

    wanted = at_last("resid_post", 1) + values
    edit = memit(model, three, layers=layers, covariance=c, ridge=ridge, **options)
    for step, layer in enumerate(layers):
        keys = at_last("mlp_post", layer)
        share = (wanted - at_last("resid_post", 1)) / (len(layers) - step)
        metric = c.shrunk(layer)
        weight = ridge * (keys @ torch.linalg.inv(metric) @ keys.T).diagonal().mean()
        want = torch.linalg.solve(weight * metric + keys.T @ keys, keys.T @ share)
        torch.testing.assert_close(edit.changes[step].delta(), want, atol=1e-7, rtol=1e-6)
        write_matrix(model, "W_out", layer, read_matrix(model, "W_out", layer) + want)


@pytest.mark.slow_case("llama-bridge")
def test_memit_repair(tiny, facts):
    before = weights(tiny)
    joint = MemitRepair(layers=[0, 1], joint=True, **BARE)
    assert isinstance(joint, Repair)
    states = joint.fit(tiny, facts[:2])
    assert states[0] is states[1]
    alone = MemitRepair(layers=[0, 1], **BARE).fit(tiny, facts[:2])
    assert alone[0].changes[0].rank == 1
    for edit, fact in zip(alone, facts[:1], strict=False):
        single = memit(tiny, [fact], layers=[0, 1], **BARE)
        for mine, other in zip(edit.changes, single.changes, strict=True):
            torch.testing.assert_close(mine.left, other.left, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(mine.right, other.right, atol=1e-4, rtol=1e-3)
    assert_same_bits(tiny, before)
    with pytest.raises(ValueError, match="0 facts"):
        memit(tiny, [], layers=[0])


# -- GRACE ----------------------------------------------------------------------------------------


def vector(*x):
    return torch.tensor([float(v) for v in x])


def test_the_codebooks_rule():
    book = Codebook(layer=0)
    assert book.lookup(vector(0, 0)) is None
    assert book.learn(vector(0, 0), vector(1, 1), "a", 1.0) == "add"
    assert book.learn(vector(5, 0), vector(2, 2), "b", 1.0) == "add"
    assert book.learn(vector(0, 1.5), vector(3, 3), "a", 1.0) == "expand"
    assert book.radii == pytest.approx([1.5, 1.0], rel=2e-5) and len(book.keys) == 2
    assert book.lookup(vector(0, 1.500001)) is not None  # the same prompt run alone
    expanded = book.radii[0]
    assert torch.equal(book.lookup(vector(0, 1.5)), vector(1, 1))
    assert book.learn(vector(0, 0.5), vector(9, 9), "a", 1.0) == "expand"
    assert book.radii[0] == expanded  # it never shrinks by expanding
    assert book.learn(vector(0, 2), vector(4, 4), "c", 1.0) == "split"
    assert book.radii == [1.0, 1.0, 1.0]
    for state, value in (((0, 0.4), 1), ((0, 1.6), 4), ((5.5, 0), 2)):
        assert torch.equal(book.lookup(vector(*state)), vector(value, value))
    assert book.lookup(vector(0, -1.1)) is None
    assert book.lookup(vector(6.01, 0)) is None
    assert book.n_bytes == 3 * (2 * 2 * 4 + 8)


@pytest.mark.slow_case("llama-bridge")
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grace_corrects_its_facts_and_nothing_else(tiny, facts, shared):
    repair = GraceRepair(layer=1, steps=80, lr=0.5, shared=shared)
    assert isinstance(repair, Repair)
    before = weights(tiny)
    books = repair.fit(tiny, facts[:3])
    assert_same_bits(tiny, before)
    assert (books[0] is books[1]) == shared
    for i, f in enumerate(facts[:3]):
        batch = teacher_forced(tiny, [f.prompt("suffix")], [f.answer])
        rows = Rows(batch.prompts, batch.tokens.shape[1])
        with torch.no_grad():
            old = answer_loss(tiny, batch).item()
            new = answer_loss(tiny, batch, repair.hooks(tiny, [books[i]], rows)).item()
        assert new < old - 2
    unrelated = encode(tiny, "w80 w81 w82")
    batch = pad([unrelated.ids])
    with torch.no_grad():
        clean = forward(tiny, batch.tokens)
        hooks = repair.hooks(tiny, [books[0]], Rows((unrelated,), batch.tokens.shape[1]))
        assert torch.equal(forward(tiny, batch.tokens, hooks=hooks), clean)


def test_one_codebook_for_all_unless_asked_otherwise_and_no_radius_from_other_facts(tiny, facts):
    quick = {"layer": 1, "steps": 2, "radius": 0.01}
    three = GraceRepair(**quick).fit(tiny, facts[:3])
    assert len(three[0].keys) == 3 and three[0] is three[1]
    (alone,) = GraceRepair(**quick).fit(tiny, facts[:1])
    assert three[0].radii[0] == pytest.approx(alone.radii[0], rel=1e-4)
    assert alone.radii[0] == pytest.approx(0.01 * float(alone.keys[0].norm()))


def test_codebooks_come_back_in_order_each_as_if_alone(load_tiny, facts):
    model = load_tiny("llama", "bridge", "float64")
    asked = of_lengths(facts, [8, 0, 8])
    quick = {"layer": 1, "steps": 4, "shared": False}
    for request, book in zip(
        asked, GraceRepair(**quick, batch_size=2).fit(model, asked), strict=True
    ):
        (alone,) = GraceRepair(**quick).fit(model, [request])
        for name in ("keys", "values"):
            torch.testing.assert_close(
                torch.stack(getattr(book, name)),
                torch.stack(getattr(alone, name)),
                atol=1e-9,
                rtol=1e-9,
            )


@pytest.mark.slow_case("llama-bridge")
def test_a_shared_codebook_expands_splits_and_leaves_alone_what_is_correct(tiny, facts):
    """A radius that reaches everywhere: the second prompt meets the first one's entry."""
    f, other = facts[:2]
    again = {
        "bridge": f.bridge,
        "second_hop_prompt": f"w9 {f.bridge} w8",
        "two_hop_prompt": "w9 w5 w8",
    }
    first = Request.from_fact(f, "suffix")
    same = Request(**again, target=f.answer)
    different = Request(**again, target=other.answer)
    repair = GraceRepair(layer=2, steps=50, lr=0.5, radius=10.0)
    book = repair.fit(tiny, [first, same])[0]  # the last layer's value says f's answer anywhere
    assert book.answers == [f.answer]
    before = list(book.radii)
    assert repair.fit(tiny, [first, first, same])[0].radii == pytest.approx(before)
    split = repair.fit(tiny, [first, different])[0]
    assert split.answers == [f.answer, other.answer]
    assert (
        split.radii[0]
        == split.radii[1]
        == pytest.approx(float((split.keys[0] - split.keys[1]).norm()) / 2, rel=1e-4)
    )


@pytest.mark.parametrize("shared", [False, True])
def test_grace_does_not_learn_what_the_model_says_already(tiny, facts, shared):
    said = generate(tiny, [facts[0].prompt("suffix")], max_new_tokens=1)[0].text
    known = Request(**{**vars(Request.from_fact(facts[0], "suffix")), "target": said})
    books = GraceRepair(layer=1, steps=2, shared=shared).fit(tiny, [known, facts[1]])
    assert books[0].answers == ([facts[1].answer] if shared else [])
    assert books[1].answers == [facts[1].answer]


def test_grace_rows_and_offsets(tiny, facts):
    repair = GraceRepair(layer=1, steps=2)
    books = repair.fit(tiny, facts[:1])
    prompt = encode(tiny, facts[0].prompt())
    assert repair.hooks(tiny, [None], Rows((prompt,), 8)) == []
    assert repair.hooks(tiny, books, Rows((prompt,), 1, offset=len(prompt))) == []
    assert len(repair.hooks(tiny, books, Rows((prompt,), 1, offset=prompt.last))) == 2


def test_grace_refusals(tiny, facts):
    with pytest.raises(ValueError, match="above 0"):
        GraceRepair(layer=0, radius=-1.0)
    with pytest.raises(ValueError, match="out of range"):
        GraceRepair(layer=5).fit(tiny, facts)
    two = [Request(two_hop_prompt="w3 w4", target=answer, id=answer) for answer in ("w5", "w6")]
    quick = {"layer": 1, "steps": 1}
    with pytest.raises(ValueError, match="'w5' and 'w6' contradict one another"):
        GraceRepair(**quick).fit(tiny, two)
    assert len(GraceRepair(**quick, shared=False).fit(tiny, two)) == 2
    assert GraceRepair(**quick).fit(tiny, []) == []
