"""KnowledgeEditor: its gradient, its formula, that training helps, files."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.editing import WrongWeightsError
from mi_hops.editing.baselines import finetune_many
from mi_hops.editing.baselines.knowledge_editor import (
    EditorTraining,
    KnowledgeEditor,
    KnowledgeEditorRepair,
    train_editor,
    unit_gradients,
    unrelated,
)
from mi_hops.editing.teaching import answer_loss, answered_correctly, teacher_forced
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import live_matrix
from mi_hops.sweep.repair import Repair
from tests.editing.conftest import assert_same_bits, make_fact, weights


@pytest.mark.parametrize("matrix", ["W_out", "W_O"])
def test_factors_multiply_to_the_gradient_of_the_weight(load_tiny, facts, matrix):
    model = load_tiny("gpt2", "hooked", fresh=True)
    batch = teacher_forced(model, [f.prompt() for f in facts[:2]], [f.answer for f in facts[:2]])
    left, right = unit_gradients(model, batch, matrix, [1])[0]
    weight = live_matrix(model, matrix, 1).requires_grad_(True)
    for i, f in enumerate(facts[:2]):
        loss = answer_loss(model, teacher_forced(model, [f.prompt()], [f.answer]), []).sum()
        (want,) = torch.autograd.grad(loss, weight)
        want = want.reshape(-1, want.shape[-1])
        torch.testing.assert_close(left[i].T @ right[i], want / want.norm(), atol=1e-4, rtol=1e-3)


def test_the_change_is_the_formula(load_tiny, facts):
    model = load_tiny("llama", "bridge")
    editor = KnowledgeEditor(model, EditorTraining(layers=(1,), width=8, scale=0.7))
    f = facts[0]
    (edit,) = editor.edits(model, [f], form="suffix")
    batch = teacher_forced(model, [f.prompt("suffix")], [f.answer])
    x, g = unit_gradients(model, batch, "W_out", [1])[0]
    with torch.no_grad():
        part = editor.parts(model, [f.prompt("suffix")], [f.answer])[0]
    gradient = x[0].T @ g[0]
    gate = 0.7 * live_matrix(model, "W_out", 1).norm() * part["eta"].sigmoid()
    want = gate * (
        torch.outer(part["alpha"][0].softmax(-1), part["gamma"][0]) * gradient
        + torch.outer(part["beta"][0].softmax(-1), part["delta"][0])
    )
    torch.testing.assert_close(edit.changes[0].delta(), want, atol=1e-6, rtol=1e-4)


def test_a_loop_edits_the_edited_model_until_the_answer_is_right(load_tiny, facts):
    """Each round is the plain edit of the model with the rounds before it in its weights."""
    model = load_tiny("gpt2", "bridge")
    editor = KnowledgeEditor(model, EditorTraining(layers=(1, 2), width=8, scale=0.05))
    once = editor.edits(model, facts[:3])
    rank = once[0].changes[0].rank
    never = editor.edits(model, facts[:3], loop=3)  # an untrained editor does not get there
    assert [e.changes[0].rank for e in never] == [3 * rank] * 3
    prompts, answers = [facts[0].prompt()], [facts[0].answer]
    done = {c.layer: c.delta() for c in once[0].changes}
    batch = teacher_forced(model, prompts, answers)
    with once[0].applied(model), torch.no_grad():
        second = unit_gradients(model, batch, "W_out", [1, 2])
        parts = editor.parts(model, prompts, answers)
    twice = editor.edits(model, facts[:1], loop=2)[0]
    for change, (x, g), part in zip(twice.changes, second, parts, strict=True):
        weight = live_matrix(model, "W_out", change.layer)
        gate = 0.05 * weight.norm() * part["eta"].sigmoid()
        scaled = torch.outer(part["alpha"][0].softmax(-1), part["gamma"][0]) * (x[0].T @ g[0])
        more = gate * (scaled + torch.outer(part["beta"][0].softmax(-1), part["delta"][0]))
        want = done[change.layer] + more
        torch.testing.assert_close(change.delta(), want, atol=1e-6, rtol=1e-3)
    with pytest.raises(ValueError, match="loop is 0"):
        editor.edits(model, facts[:1], loop=0)


def test_the_norm_is_that_of_the_changes(load_tiny, facts):
    model = load_tiny("llama", "bridge")
    editor = KnowledgeEditor(model, EditorTraining(layers=(0, 2), width=8))
    prompts, answers = [f.prompt() for f in facts[:2]], [f.answer for f in facts[:2]]
    found = editor.norm(editor.factors(model, prompts, answers))
    own = sum(live_matrix(model, "W_out", i).square().sum() for i in (0, 2)).sqrt()
    for value, edit in zip(found, editor.edits(model, facts[:2]), strict=True):
        want = sum(c.delta().square().sum() for c in edit.changes).sqrt() / own
        torch.testing.assert_close(value, want, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_norm_constraint_is_kept_and_a_loop_stops_when_right(load_tiny):
    model = load_tiny("gpt2", "bridge")
    options = {"layers": [1, 2], "batch_size": 8, "lr": 1e-2, "scale": 2.0, "steps": 40}
    tight, editor = (
        train_editor(model, practice(), constraint="norm", margin=m, **options) for m in (0.02, 9.0)
    )
    assert tight.log[-1]["norm"] < 0.7 * editor.log[-1]["norm"]
    facts = [make_fact(i) for i in range(3)]
    looped = editor.edits(model, facts, loop=4)
    for f, edit, plain in zip(facts, looped, editor.edits(model, facts), strict=True):
        batch = teacher_forced(model, [f.prompt()], [f.answer])
        rounds = edit.changes[0].rank // plain.changes[0].rank
        with plain.applied(model):
            at_once = answered_correctly(model, batch)[0]
        with edit.applied(model):
            at_last = answered_correctly(model, batch)[0]
        assert (rounds == 1) == at_once and (at_last or rounds == 4)


def practice():
    """Facts in two wordings whose second relation has several answers."""
    facts = []
    for i in range(10):
        f = make_fact(i).to_dict()
        f["prompts"]["prefix"] += " w72"
        facts.append(TwoHopFact.from_dict(f))
    return facts


@pytest.mark.slow
def test_training_makes_edits_that_work(load_tiny, tmp_path):
    model = load_tiny("gpt2", "bridge")
    before = weights(model)
    state = torch.random.get_rng_state()
    options = {"layers": [1, 2], "batch_size": 8, "lr": 1e-2, "scale": 2.0, "margin": 0.5}
    editor = train_editor(model, practice(), steps=60, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_same_bits(model, before)
    assert editor.log[-1]["answer_loss"] < editor.log[0]["answer_loss"] - 1
    repair = KnowledgeEditorRepair(editor)
    assert isinstance(repair, Repair)
    facts = [make_fact(i) for i in range(3)]
    drops = []
    for f, edit in zip(facts, repair.fit(model, facts), strict=True):
        batch = teacher_forced(model, [f.prompt("suffix")], [f.answer])
        with torch.no_grad():
            old = answer_loss(model, batch).item()
            with edit.applied(model):
                drops.append(old - answer_loss(model, batch).item())
    assert sum(drops) / 3 > 0.5
    path = editor.save(tmp_path / "editor.safetensors")
    again = KnowledgeEditor.load(path, model).edits(model, facts[:1])[0]
    torch.testing.assert_close(
        again.changes[0].delta(), repair.fit(model, facts[:1])[0].changes[0].delta()
    )
    with pytest.raises(WrongWeightsError, match="the editor was made for"):
        KnowledgeEditor.load(path, load_tiny("llama", "bridge"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a knowledge editor"):
        KnowledgeEditor.load(tmp_path / "junk", model)


def test_an_editor_read_under_an_edit_is_of_the_weights_it_was_trained_on(
    load_tiny, facts, tmp_path
):
    model = load_tiny("llama", "bridge")
    editor = KnowledgeEditor(model, EditorTraining(layers=np.arange(1, 2), width=np.int64(4)))
    path = editor.save(tmp_path / "editor.safetensors")
    with finetune_many(model, facts[:1], layers=1, steps=1)[0].applied(model):
        loaded = KnowledgeEditor.load(path, model)
    assert loaded.fingerprint == editor.fingerprint
    want, got = (each.edits(model, facts[1:2])[0] for each in (editor, loaded))
    assert got.equals(want)


def test_one_seed_one_editor(load_tiny):
    model = load_tiny("llama", "bridge")
    made = [
        train_editor(model, practice(), layers=[1], steps=2, batch_size=2, seed=s)
        for s in (3, 3, 4)
    ]
    a, b, c = (torch.cat([p.flatten() for p in e.network.parameters()]) for e in made)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_unrelated_facts_share_no_entity():
    pool, rng = practice(), random.Random(0)
    fact, new = pool[0], pool[1].answer
    near = replace(pool[2], id="near", subject=fact.bridge)
    pool = [fact, pool[1], near, replace(pool[3], id="far")]
    assert {unrelated(fact, new, pool, rng).id for _ in range(20)} == {"far"}
    with pytest.raises(ValueError, match="none is unrelated to 'f0'"):
        unrelated(fact, new, pool[:3], rng)


def test_one_layer_may_be_a_number():
    assert EditorTraining(layers=1) == EditorTraining(layers=(1,))


def test_refusals(tiny):
    with pytest.raises(ValueError, match="at least two are needed"):
        train_editor(tiny, practice()[:1], layers=[0])
    with pytest.raises(ValueError, match="above 0"):
        train_editor(tiny, practice(), layers=[0], steps=0)
    with pytest.raises(ValueError, match="constraint is 'l2'"):
        train_editor(tiny, practice(), layers=[0], constraint="l2")
