"""Joint edits against least squares written out, and sequential ones against doing it by hand."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import (
    PAPER,
    Request,
    SingularError,
    applied_edits,
    creme_sequential,
    second_moments,
    stack,
)
from mi_hops.editing.solve import solve_keys
from mi_hops.model import read_matrix, write_matrix
from tests.editing.conftest import assert_same_bits, paper, paper_joint, put_back, weights
from tests.editing.test_creme import TEMPLATES, last_mean


@pytest.mark.slow_case("llama-bridge")
def test_joint_equals_memits_normal_equations(wide, facts):
    """Layer by layer in the weights: (λC + K^T K)^-1 K^T R."""
    layers, ridge = [0, 2], 0.03
    moments = second_moments(wide, facts, layers=layers, shrinkage=0.1)
    edit = paper_joint(
        wide,
        facts,
        layers=layers,
        ridge=ridge,
        templates=TEMPLATES,
        covariance=moments,
        batch_size=13,
    )
    with put_back(wide, layers) as originals:
        for layer, change in zip(layers, edit.changes, strict=True):
            asked = [
                [[t.format(text) for t in TEMPLATES] for text in (f.prompt(), f.second_prompt())]
                for f in facts
            ]
            keys = torch.stack([last_mean(wide, comps, "z", layer) for comps, _ in asked])
            lack = torch.stack(
                [
                    last_mean(wide, guides, "attn_out", layer)
                    - last_mean(wide, comps, "attn_out", layer)
                    for comps, guides in asked
                ]
            )
            c = moments.shrunk(layer)
            weight = ridge * (keys @ torch.linalg.inv(c) @ keys.T).diagonal().mean()
            want = torch.linalg.solve(weight * c + keys.T @ keys, keys.T @ lack)
            torch.testing.assert_close(change.delta(), want, atol=1e-7, rtol=1e-6)
            write_matrix(wide, "W_O", layer, originals[layer] + want)


@pytest.mark.parametrize(
    "options", [{}, {"target": "clean", "match": "residual"}, {"strength": 0.5}], ids=str
)
def test_one_fact_alone_is_the_plain_edit(wide, fact, options):
    joint = paper_joint(wide, [fact], layers=[0, 1], ridge=0, templates=TEMPLATES, **options)
    alone = paper(wide, fact, layers=[0, 1], templates=TEMPLATES, **options)
    for a, b in zip(joint.changes, alone.changes, strict=True):
        torch.testing.assert_close(a.delta(), b.delta(), atol=1e-9, rtol=1e-9)


def test_without_ridge_every_key_is_met(wide, facts):
    edit = paper_joint(wide, facts, layers=[1], ridge=0, templates=("{}",))
    want = [last_mean(wide, [f.second_prompt()], "attn_out", 1) for f in facts]
    with edit.applied(wide):
        for f, w in zip(facts, want, strict=True):
            torch.testing.assert_close(last_mean(wide, [f.prompt()], "attn_out", 1), w)


def test_more_keys_than_dimensions_become_dense(tiny, facts):
    many = [facts[i % 5] for i in range(40)]
    edit = paper_joint(tiny, many, layers=[1], templates=("{}",), cover="answer")
    d_in = tiny.cfg.n_heads * tiny.cfg.d_head
    if d_in >= 80:
        pytest.skip("not more keys than dimensions here")
    assert edit.changes[0].left is None and edit.changes[0].shape == (d_in, tiny.cfg.d_model)
    with pytest.raises(SingularError, match="not independent"):
        paper_joint(tiny, many, layers=[1], templates=("{}",), ridge=0)


def test_bad_joint_input(tiny, facts):
    with pytest.raises(ValueError, match="no facts"):
        paper_joint(tiny, [], layers=[1])
    with pytest.raises(ValueError, match="ridge is -1"):
        paper_joint(tiny, facts, layers=[1], ridge=-1)


@pytest.mark.parametrize(
    "change", [{"answer": "w59"}, {"answer": "", "bridge": "w29 w39"}], ids=str
)
def test_edits_that_contradict_one_another_are_refused_by_name(tiny, facts, change):
    """Two answers to one prompt, or without answers two prompts it is to be completed like."""
    wanted = {"answer": facts[0].answer, "bridge": facts[0].bridge} | change

    def asked(name, bridge, target):
        return Request.from_slot(
            "w3 w4 {} w0", first_hop="w1 w2 w5", bridge=bridge, target=target, id=name
        )

    one = asked("one", facts[0].bridge, wanted["answer"] and facts[0].answer)
    other = asked("other", wanted["bridge"], wanted["answer"])
    before = weights(tiny)
    for edit in (paper_joint, creme_sequential):
        with pytest.raises(ValueError, match="'one' and 'other' contradict one another"):
            edit(tiny, [one, facts[1], other], layers=[1], cover="first")
    assert len(creme_sequential(tiny, [one, other], layers=[1], hold=False, cover="first")) == 2
    assert_same_bits(tiny, before)


def test_sequential_edits_see_the_earlier_ones(wide, facts):
    before = weights(wide)
    edits = creme_sequential(wide, facts[:3], layers=[0, 1], templates=("{}",), hold=False, **PAPER)
    assert_same_bits(wide, before)
    assert applied_edits(wide) == ()
    edits[0].apply(wide)
    second = paper(wide, facts[1], layers=[0, 1], templates=("{}",))
    for a, b in zip(second.changes, edits[1].changes, strict=True):
        torch.testing.assert_close(a.delta(), b.delta(), atol=1e-9, rtol=1e-9)
    edits[1].apply(wide)
    edits[2].apply(wide)
    inside = {i: read_matrix(wide, "W_O", i) for i in (0, 1)}
    for e in reversed(edits):
        e.undo(wide)
    assert_same_bits(wide, before)
    with stack(edits, check=False).applied(wide):
        for i, w in inside.items():
            torch.testing.assert_close(read_matrix(wide, "W_O", i), w, atol=1e-9, rtol=1e-9)


def test_later_edits_hold_what_earlier_ones_made(wide, facts):
    """The output at the first fact's key stays, to the slack; without holding it does not."""
    settings = {**PAPER, "layers": [1], "templates": ("{}",), "slack": 1e-7}
    prompt = [facts[0].prompt()]

    def after(hold: bool, n: int):
        edits = creme_sequential(wide, facts[:3], hold=hold, **settings)
        with stack(edits[:n], check=False).applied(wide):
            return last_mean(wide, prompt, "attn_out", 1)

    torch.testing.assert_close(after(True, 3), after(True, 1), atol=1e-4, rtol=1e-4)
    assert (after(False, 3) - after(False, 1)).abs().max() > 1e-2
    torch.testing.assert_close(after(False, 1), after(True, 1))
    with pytest.raises(ValueError, match="slack is 0"):
        creme_sequential(wide, facts[:2], **{**settings, "slack": 0})


def test_solver_identities():
    generator = torch.Generator().manual_seed(0)
    keys, kept = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (3, 2))
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    c = root @ root.T + torch.eye(12)
    inverse = torch.linalg.solve(c, torch.cat([keys, kept]).T).T
    left = solve_keys(keys, kept, inverse=inverse)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(keys @ left.T, eye)
    torch.testing.assert_close(kept @ left.T, torch.zeros(2, 3, dtype=torch.float64))
    # No other change with those outputs is smaller in the metric of C: it is stationary on the
    # directions that leave all outputs alone.
    free = torch.linalg.svd(torch.cat([keys, kept]))[2][5:]
    torch.testing.assert_close(free @ c @ left.T, torch.zeros(7, 3, dtype=torch.float64))
    # Slack lets the kept ones move and makes the change smaller.
    loose = solve_keys(keys, kept, inverse=inverse, slack=1.0)
    torch.testing.assert_close(keys @ loose.T, eye)
    assert (kept @ loose.T).norm() > 1e-3
    assert torch.trace(loose @ c @ loose.T) < torch.trace(left @ c @ left.T)
    with pytest.raises(SingularError, match="zero or not finite"):
        solve_keys(torch.zeros(1, 4, dtype=torch.float64))
