"""CREME held to some heads: the least change of their rows of W_O, and of no other row."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import creme, creme_search, creme_sequential, second_moments
from mi_hops.editing.baselines import finetune_many
from mi_hops.model import read_matrix
from tests.editing.conftest import TEMPLATES, assert_same_bits, paper, paper_joint, weights
from tests.editing.test_creme import last_mean


def rows_of(model, heads):
    size = model.cfg.d_head
    return [h * size + i for h in heads for i in range(size)]


def test_all_heads_are_the_whole_edit(wide, facts):
    every = {layer: range(wide.cfg.n_heads) for layer in (0, 2)}
    c = second_moments(wide, facts, layers=[0, 2], shrinkage=0.1)
    for edit, settings in (
        (lambda **how: creme(wide, facts[0], **how), {}),
        (lambda **how: creme(wide, facts[0], **how), {"covariance": c}),
        (lambda **how: paper_joint(wide, facts, **how), {"covariance": c}),
    ):
        whole = edit(layers=[0, 2], templates=TEMPLATES, **settings)
        held = edit(layers=every, templates=TEMPLATES, **settings)
        for a, b in zip(held.changes, whole.changes, strict=True):
            torch.testing.assert_close(a.delta(), b.delta(), atol=1e-9, rtol=1e-7)


def test_only_the_rows_of_the_heads_change(tiny, facts):
    before = weights(tiny)
    edit = creme(tiny, facts[0], layers={1: [1], 0: [0]}, templates=("{}",))
    assert edit.layers == (0, 1) and edit.settings["heads"] == {"0": [0], "1": [1]}
    old = {layer: read_matrix(tiny, "W_O", layer) for layer in (0, 1)}
    with edit.applied(tiny):
        for layer, head in ((0, 0), (1, 1)):
            new, mine = read_matrix(tiny, "W_O", layer), rows_of(tiny, [head])
            others = [i for i in range(len(new)) if i not in mine]
            assert torch.equal(new[others], old[layer][others])
            assert (new[mine] - old[layer][mine]).abs().max() > 1e-4
    assert_same_bits(tiny, before)


def test_a_head_alone_meets_the_key_with_the_least_change(wide, facts):
    """The rows' own least squares written out; the output at the key is the second hop's."""
    c = second_moments(wide, facts, layers=[1], shrinkage=0.1)
    edit = paper(wide, facts[0], layers={1: [1]}, covariance=c, templates=("{}",))
    asked = [facts[0].prompt()], [facts[0].second_prompt()]
    rows = rows_of(wide, [1])
    key = last_mean(wide, asked[0], "z", 1)[rows]
    lack = last_mean(wide, asked[1], "attn_out", 1) - last_mean(wide, asked[0], "attn_out", 1)
    direction = torch.linalg.solve(c.shrunk(1)[rows][:, rows], key)
    want = torch.zeros_like(edit.changes[0].delta())
    want[rows] = torch.outer(direction / (direction @ key), lack)
    torch.testing.assert_close(edit.changes[0].delta(), want, atol=1e-9, rtol=1e-7)
    goal = last_mean(wide, asked[1], "attn_out", 1)
    with edit.applied(wide):
        torch.testing.assert_close(last_mean(wide, asked[0], "attn_out", 1), goal)


def test_a_head_within_the_null_space_of_its_own_inputs(wide, facts):
    c = second_moments(wide, facts, layers=[1]).with_null_space(0.5)
    rows = rows_of(wide, [0])
    edit = creme(wide, facts[0], layers={1: [0]}, covariance=c, templates=("{}",))
    part = c.part(1, rows)
    values, vectors = torch.linalg.eigh(c.second[1][rows][:, rows])
    used = vectors[:, values > 0.5 * values.mean()]
    assert 0 < part.rank(1) == len(rows) - used.shape[1] < len(rows)
    delta = edit.changes[0].delta()[rows]
    torch.testing.assert_close(used.T @ delta, torch.zeros_like(used.T @ delta), atol=1e-9, rtol=0)


def test_later_edits_of_other_heads_leave_the_first(wide, facts):
    first, second = creme_sequential(wide, facts[:2], layers={1: [0]}, templates=("{}",))
    for edit in (first, second):
        assert not edit.changes[0].delta()[rows_of(wide, range(1, wide.cfg.n_heads))].any()


def test_heads_that_are_refused(tiny, facts):
    for heads in ([], [0, 0], [tiny.cfg.n_heads], [-1]):
        with pytest.raises(ValueError, match="heads of layer 1 are"):
            creme(tiny, facts[0], layers={1: heads})
    with pytest.raises(ValueError, match="out of range"):
        creme(tiny, facts[0], layers={99: [0]})
    with pytest.raises(ValueError, match="changes whole matrices"):
        finetune_many(tiny, facts[:1], layers={1: [0]}, matrix="W_O")
    c = second_moments(tiny, facts)
    with pytest.raises(ValueError, match="changes whole matrices"):
        creme_search(tiny, facts[:2], c, layers={1: [0]}, steps=1)
