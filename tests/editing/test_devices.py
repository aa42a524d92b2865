"""A model placed on several devices is edited where each block lies, and to the same effect.

The middle block lies on CUDA; without it, in a place that is told apart from the rest.
"""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import Edit, creme, creme_joint, edit_hooks, second_moments
from mi_hops.editing.baselines.finetune import finetune_many
from mi_hops.editing.baselines.grace import GraceRepair
from mi_hops.editing.baselines.knowledge_editor import EditorTraining, KnowledgeEditor, train_editor
from mi_hops.editing.baselines.memit import memit
from mi_hops.editing.baselines.rome import rome
from mi_hops.editing.change import Change
from mi_hops.model import fingerprint, forward
from mi_hops.sweep.repair import Rows
from mi_hops.text.tokens import encode, pad
from tests.editing.conftest import TEMPLATES, assert_same_bits, weights
from tests.editing.test_knowledge_editor import practice
from tests.places import FAR, NEAR, TwoPlaces, put

SEARCH = {"templates": TEMPLATES, "steps": 3}


def check_same(pair, make):
    """The edit made on either is the same, and so is what it does, in weights and by hooks."""
    one, two = pair
    tokens = torch.tensor([[1, 9, 30, 7, 12]])
    before = weights(two)
    wanted, made = make(one), make(two)
    assert made.fingerprint == wanted.fingerprint
    for a, b in zip(wanted.changes, made.changes, strict=True):
        torch.testing.assert_close(b.delta().cpu(), a.delta(), atol=1e-7, rtol=1e-5)
    with torch.no_grad(), wanted.applied(one):
        want = forward(one, tokens)
    with torch.no_grad():
        hooked = forward(two, tokens, hooks=edit_hooks(two, [made]))
        with made.applied(two):
            written = forward(two, tokens)
    for found in (hooked, written):
        torch.testing.assert_close(found.cpu(), want, atol=1e-6, rtol=1e-5)
    assert_same_bits(two, before)


@pytest.mark.slow
@pytest.mark.parametrize("match", ["residual", pytest.param("attention", marks=pytest.mark.slow)])
def test_creme(pair, fact, facts, match):
    options = {"layers": [0, 1, 2], "templates": TEMPLATES, "match": match}

    def make(model):
        moments = second_moments(model, facts, shrinkage=0.1)
        return creme(model, fact, covariance=moments, **options)

    check_same(pair, make)
    check_same(pair, lambda model: creme_joint(model, facts, **options))


@pytest.mark.slow
def test_searched_values(pair, facts):
    check_same(pair, lambda model: rome(model, facts[0], layer=1, **SEARCH))
    for layers in ([0, 1], [1, 2]):
        check_same(pair, lambda model, i=layers: memit(model, facts[:3], layers=i, **SEARCH))
    check_same(pair, lambda model: finetune_many(model, facts[:1], layers=[0, 1], steps=3)[0])


@pytest.mark.slow
def test_knowledge_editor(pair, fact):
    def make(model):
        editor = KnowledgeEditor(model, EditorTraining(layers=(1, 2), width=4))
        return editor.edits(model, [fact])[0]

    check_same(pair, make)
    options = {"layers": [0, 1], "width": 4, "steps": 2, "batch_size": 3}
    logs = [train_editor(model, practice(), **options).log for model in pair]
    assert logs[1][-1]["kl"] == pytest.approx(logs[0][-1]["kl"], rel=1e-3)


@pytest.mark.slow_case("gpt2")
def test_grace(pair, facts):
    prompts = tuple(encode(pair[0], f.prompt("suffix")) for f in facts[:2])
    batch = pad([p.ids for p in prompts])
    rows = Rows(prompts, batch.tokens.shape[1])
    said = []
    for model in pair:
        repair = GraceRepair(layer=1, steps=3, form="suffix")
        hooks = repair.hooks(model, repair.fit(model, facts[:2]), rows)
        with torch.no_grad():
            said.append(forward(model, batch.tokens, hooks=hooks).cpu())
    torch.testing.assert_close(said[1], said[0], atol=1e-6, rtol=1e-5)


def test_the_places_are_told_apart():
    if torch.cuda.is_available():
        pytest.skip("devices need no telling apart")
    with TwoPlaces():
        near = torch.ones(2)
        far = near.to(FAR)
        assert (far * 2).device == FAR and near.device == NEAR and near.to(far) is not near
        with pytest.raises(RuntimeError, match="two devices"):
            near + far


def test_a_change_lies_on_one_device():
    left, right = torch.zeros(1, 3), torch.zeros(1, 2, device="meta")
    with pytest.raises(ValueError, match="are on cpu and meta"):
        Change("W_O", 0, left, right)


def test_an_edit_is_undone_where_the_model_was_moved_to(load_tiny):
    model = load_tiny(fresh=True)
    before = weights(model)
    edit = Edit(
        method="x",
        changes=(Change("W_O", 1, torch.ones(1, 32), torch.ones(1, 32)),),
        fingerprint=fingerprint(model),
    )
    with TwoPlaces():
        edit.apply(model)
        for p in model.parameters():
            put(p, FAR)
        edit.undo(model)
    assert not edit.is_applied(model)
    assert_same_bits(model, before)
