"""The joint search, and least squares spread over layers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn.functional import one_hot

from mi_hops.editing import JointSearch, Request, creme_joint, creme_search, second_moments
from mi_hops.editing.change import matrix_hooks
from mi_hops.model import forward, read_matrix
from mi_hops.model.numeric import kl_divergence
from mi_hops.text.tokens import answer_ids, encode, pad
from tests.editing.conftest import assert_same_bits, weights
from tests.editing.test_creme import last_mean
from tests.editing.test_moments import TEXTS
from tests.models import cases

#: The second hop's own words, with little decay.
EXACT = {"answer_weight": 0.0, "decay": 0.01, "enough": 0.0}
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
    edit = creme_search(tiny, facts, c, kept=kept, steps=60, **EXACT)
    assert edit.layers == (1, 2) and edit.settings["kept"] == 6
    with edit.applied(tiny):
        now = {f.id: float(kl_divergence(wanted[f.id], said(tiny, f.prompt()))) for f in facts}
        assert sum(now.values()) < 0.1 * sum(apart.values())
        moved = sum(float(kl_divergence(a, said(tiny, t))) for a, t in zip(was, kept, strict=True))
    assert_same_bits(tiny, before)
    assert all(p.grad is None for p in tiny.parameters())
    free = creme_search(tiny, facts, c, steps=60, own_hops=False, **EXACT)
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
    """lr is the root mean square of the first step in B, so Δ moves the share lr^2 of the output."""
    c = second_moments(wide, TEXTS, layers=[1])
    w = read_matrix(wide, "W_O", 1)
    edit = creme_search(wide, facts, c, layers=1, steps=1, lr=0.02, decay=0.0)
    delta = edit.changes[0].delta()
    moved, all_of_it = (torch.trace(x.T @ c.shrunk(1) @ x) for x in (delta, w))
    assert float(moved / all_of_it) == pytest.approx(0.02**2, rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_first_step_goes_down_the_gradient(wide, facts, weight):
    """The gradient is that of whole passes, prompt by prompt."""
    c = second_moments(wide, TEXTS, layers=[1])
    options = {"steps": 1, "decay": 0.0, "enough": 0.0, "own_hops": False, "answer_weight": weight}
    edit = creme_search(wide, facts[:2], c, layers=1, **options)
    delta = torch.zeros_like(edit.changes[0].delta()).requires_grad_()

    def said(prompt, ids, hooks=()):
        given = encode(wide, prompt).ids
        logits = forward(wide, torch.tensor([[*given, *ids[:-1]]]), hooks=hooks)[0]
        return logits[len(given) - 1 :].log_softmax(-1)

    hooks = matrix_hooks("W_O", 1, lambda z, out: out + z @ delta)
    with torch.enable_grad():
        loss = 0.0
        for fact in facts[:2]:
            ids = answer_ids(wide, encode(wide, fact.prompt()), fact.answer)
            second = said(fact.second_prompt(), ids).detach().exp()
            wanted = (1 - weight) * second + weight * one_hot(torch.tensor(ids), second.shape[1])
            apart = wanted * (wanted.log() - said(fact.prompt(), ids, hooks))
            loss = loss + apart.sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, delta)
    factor = c.factor(1).to(gradient)
    found = torch.linalg.lstsq(factor, edit.changes[0].delta().detach()).solution
    step = -factor.T @ gradient
    torch.testing.assert_close(found / found.norm(), step / step.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama", "llama32"))
def test_passes_by_hooks_find_what_plain_ones_find(load_tiny, facts, shape, backend):
    model = load_tiny(shape, backend, "float32")
    c = second_moments(model, TEXTS)
    given = {"kept": TEXTS, "steps": 4, "rows": 3}
    with mock.patch("mi_hops.editing.search.logits_at", side_effect=AssertionError):
        plain = creme_search(model, facts, c, **given)
    with mock.patch("mi_hops.editing.search.plain_passes", lambda model: None):
        hooks = creme_search(model, facts, c, **given)
    for a, b in zip(plain.changes, hooks.changes, strict=True):
        size = float(b.delta().norm())
        assert float((a.delta() - b.delta()).norm()) < 1e-3 * size


def test_the_answer_is_said_where_the_second_hop_says_another_token(wide, facts):
    """Random models know no second hop; half of the weight on the answer's tokens says it all the same."""
    c = second_moments(wide, TEXTS)
    shared = {"steps": 50, "decay": 0.0, "enough": 0.0, "own_hops": False}
    right = {}
    for weight in (0.0, 0.5):
        edit = creme_search(wide, facts[:3], c, answer_weight=weight, **shared)
        with edit.applied(wide):
            right[weight] = [
                int(said(wide, f.prompt()).argmax())
                == answer_ids(wide, encode(wide, f.prompt()), f.answer)[0]
                for f in facts[:3]
            ]
    assert all(right[0.5]) and not all(right[0.0])


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
    a, other = (creme_search(tiny, facts, c, seed=s, **given) for s in (0, 1))
    b = creme_search(tiny, facts, c, seed=0, **(given | {"kept": iter(TEXTS)}))
    assert b.settings["kept"] == len(TEXTS)
    assert torch.equal(a.changes[0].delta(), b.changes[0].delta())
    assert not torch.equal(a.changes[0].delta(), other.changes[0].delta())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, "steps 0"),
        ({"lr": 0.0}, "lr 0"),
        ({"decay": -1.0}, "decay -1"),
        ({"enough": -1.0}, "enough -1"),
        ({"answer_weight": 1.0}, "answer_weight 1.0"),
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
    with pytest.raises(ValueError, match="kept: got the text 'w3 w4'"):
        creme_search(tiny, facts, c, layers=[1], kept="w3 w4")
    with pytest.raises(ValueError, match="'' has no second-hop prompt"):
        creme_search(tiny, [Request(two_hop_prompt="w3 w4", target="w5")], c, layers=[1])
