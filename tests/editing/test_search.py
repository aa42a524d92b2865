"""The joint search, and least squares spread over layers."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import JointSearch, creme_joint, creme_search, second_moments
from mi_hops.editing.change import matrix_hooks
from mi_hops.model import forward, read_matrix
from mi_hops.model.numeric import kl_divergence
from mi_hops.text.tokens import answer_ids, encode, pad
from tests.editing.conftest import assert_same_bits, weights
from tests.editing.test_creme import last_mean
from tests.editing.test_moments import TEXTS

ONE = {"templates": ("{}",), "keep": None, "target": "clean"}


def said(model, text):
    """Log-probabilities after a text, run alone."""
    with torch.no_grad():
        return forward(model, pad([encode(model, text).ids]).tokens)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("shares", [[0, 1, 2], [1, 2], [2]], ids=str)
def test_spread_reaches_the_second_hops_stream_behind_the_last_layer(wide, facts, shares):
    edit = creme_joint(wide, facts[:3], layers=shares, spread=True, ridge=0, **ONE)
    want = [last_mean(wide, [f.second_prompt()], "resid_mid", 2) for f in facts[:3]]
    with edit.applied(wide):
        for f, w in zip(facts[:3], want, strict=True):
            got = last_mean(wide, [f.prompt()], "resid_mid", 2)
            torch.testing.assert_close(got, w, atol=1e-7, rtol=1e-7)


def test_every_layer_takes_its_share(wide, facts):
    """The first of three layers writes a third of what the stream lacks behind the last."""
    edit = creme_joint(wide, facts[:1], layers=[0, 1, 2], spread=True, ridge=0, **ONE)
    two, second = facts[0].prompt(), facts[0].second_prompt()
    key = last_mean(wide, [two], "z", 0)
    lack = last_mean(wide, [second], "resid_mid", 2) - last_mean(wide, [two], "resid_mid", 2)
    torch.testing.assert_close(key @ edit.changes[0].delta(), lack / 3)


def test_one_layer_cannot_be_spread_over(tiny, facts):
    plain, spread = (
        creme_joint(tiny, facts[:2], layers=[1], spread=yes, **ONE) for yes in (False, True)
    )
    torch.testing.assert_close(plain.changes[0].delta(), spread.changes[0].delta())
    with pytest.raises(ValueError, match="spread shares out"):
        creme_joint(tiny, facts[:2], layers=[1], spread=True, match="attention")


@pytest.mark.slow_case("llama-bridge")
def test_the_search_brings_two_hops_to_the_second_hops_words(tiny, facts):
    c = second_moments(tiny, TEXTS)
    kept = TEXTS[:6]
    before = weights(tiny)
    wanted = {f.id: said(tiny, f.second_prompt()) for f in facts}
    apart = {f.id: float(kl_divergence(wanted[f.id], said(tiny, f.prompt()))) for f in facts}
    was = [said(tiny, t) for t in kept]
    edit = creme_search(tiny, facts, c, kept=kept, steps=60, decay=0.01, enough=0.0)
    assert edit.layers == (1, 2) and edit.settings["kept"] == 6
    with edit.applied(tiny):
        now = {f.id: float(kl_divergence(wanted[f.id], said(tiny, f.prompt()))) for f in facts}
        assert sum(now.values()) < 0.1 * sum(apart.values())
        moved = sum(float(kl_divergence(a, said(tiny, t))) for a, t in zip(was, kept, strict=True))
    assert_same_bits(tiny, before)
    assert all(p.grad is None for p in tiny.parameters())
    free = creme_search(tiny, facts, c, steps=60, decay=0.01, enough=0.0, own_hops=False)
    with free.applied(tiny):
        unheld = sum(float(kl_divergence(a, said(tiny, t))) for a, t in zip(was, kept, strict=True))
    assert moved < 0.5 * unheld


@pytest.mark.slow_case("llama-bridge")
def test_decay_is_the_share_of_the_output_that_moves(wide, facts):
    """|B|^2 in the search's coordinates is tr(Δ^T C Δ) / tr(W^T C W): a heavy decay makes it small."""
    c = second_moments(wide, TEXTS, layers=[1])
    w = read_matrix(wide, "W_O", 1)
    shares = []
    for decay in (0.0, 100.0):
        edit = creme_search(wide, facts[:2], c, layers=1, steps=20, decay=decay)
        delta = edit.changes[0].delta()
        moved, all_of_it = (torch.trace(x.T @ c.shrunk(1) @ x) for x in (delta, w))
        shares.append(float(moved / all_of_it))
    assert shares[1] < 0.2 * shares[0]


def test_a_first_step_has_the_learning_rates_size(wide, facts):
    """Adam's first step is lr in every coordinate, so Δ moves the share lr^2 of the output."""
    c = second_moments(wide, TEXTS, layers=[1])
    w = read_matrix(wide, "W_O", 1)
    edit = creme_search(wide, facts, c, layers=1, steps=1, lr=0.02, decay=0.0)
    delta = edit.changes[0].delta()
    moved, all_of_it = (torch.trace(x.T @ c.shrunk(1) @ x) for x in (delta, w))
    assert float(moved / all_of_it) == pytest.approx(0.02**2, rel=1e-3)


def test_the_first_step_goes_down_the_gradient(wide, facts):
    """Adam's first step is the gradient's sign; the gradient is that of whole passes, prompt by prompt."""
    c = second_moments(wide, TEXTS, layers=[1])
    options = {"steps": 1, "decay": 0.0, "enough": 0.0, "own_hops": False}
    edit = creme_search(wide, facts[:2], c, layers=1, **options)
    delta = torch.zeros_like(edit.changes[0].delta()).requires_grad_()

    def said(prompt, answer, hooks=()):
        ids = [*encode(wide, prompt).ids, *answer_ids(wide, encode(wide, prompt), answer)[:-1]]
        logits = forward(wide, torch.tensor([ids]), hooks=hooks)[0]
        return logits[len(encode(wide, prompt).ids) - 1 :].log_softmax(-1)

    hooks = matrix_hooks("W_O", 1, lambda z, out: out + z @ delta)
    with torch.enable_grad():
        loss = 0.0
        for fact in facts[:2]:
            wanted = said(fact.second_prompt(), fact.answer).detach()
            apart = wanted.exp() * (wanted - said(fact.prompt(), fact.answer, hooks))
            loss = loss + apart.sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, delta)
    factor = c.factor(1).to(gradient)
    found = torch.linalg.lstsq(factor, edit.changes[0].delta().detach()).solution
    assert torch.equal(found.sign(), -(factor.T @ gradient).sign())


def test_steps_are_smaller_where_more_is_moved(tiny, facts):
    c = second_moments(tiny, TEXTS)
    three = creme_search(tiny, facts[:1], c, layers=[0, 1, 2], steps=1)
    assert three.settings["lr"] == 0.05  # 3 layers of width 32
    assert JointSearch().step_size(10, 576) == pytest.approx(0.05 * 3 * 128 / (10 * 576))
    assert JointSearch(lr=0.2).step_size(10, 576) == 0.2


def test_what_is_close_enough_is_not_moved(tiny, facts):
    c = second_moments(tiny, TEXTS)
    edit = creme_search(tiny, facts, c, steps=5, enough=1e6, own_hops=False)
    assert all(not change.delta().any() for change in edit.changes)


def test_the_same_seed_draws_the_same_rows(tiny, facts):
    c = second_moments(tiny, TEXTS, layers=[2])
    given = {"layers": 2, "steps": 3, "rows": 2, "kept": TEXTS}
    a, b, other = (creme_search(tiny, facts, c, seed=s, **given) for s in (0, 0, 1))
    assert torch.equal(a.changes[0].delta(), b.changes[0].delta())
    assert not torch.equal(a.changes[0].delta(), other.changes[0].delta())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, "steps 0"),
        ({"lr": 0.0}, "lr 0"),
        ({"decay": -1.0}, "decay -1"),
        ({"enough": -1.0}, "enough -1"),
        ({"layers": []}, "layers are"),
        ({"layers": [0]}, r"expected W_O at \[0\]"),
    ],
    ids=str,
)
def test_bad_input(tiny, facts, options, words):
    c = second_moments(tiny, TEXTS, layers=[1])
    with pytest.raises(ValueError, match=words):
        creme_search(tiny, facts, c, **({"layers": [1]} | options))
    with pytest.raises(ValueError, match="no facts"):
        creme_search(tiny, [], c, layers=[1])
