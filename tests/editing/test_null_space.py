"""Edits held to the null space of C: what the text uses is mapped as before, keys within it are met."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import (
    Moments,
    SingularError,
    creme_joint,
    creme_search,
    creme_sequential,
    second_moments,
    stack,
)
from mi_hops.editing.baselines import MemitRepair, memit, memit_sequential, rome
from mi_hops.editing.solve import solve_keys
from mi_hops.model import fingerprint, forward
from mi_hops.text.tokens import encode, pad
from tests.editing.conftest import assert_same_bits, paper_joint, weights
from tests.editing.test_creme import last_mean
from tests.editing.test_memit_grace import BARE

KEPT = ["w80 w81 w82", "w83 w84"]  # with BOS six inputs that differ, fewer than any matrix has
ONE = {"templates": ("{}",), "keep": None}


def moments(model, layers, matrix="W_O", **options):
    """Of a short text, which leaves most of the space free."""
    return second_moments(model, KEPT, layers=layers, matrix=matrix, **options).with_null_space(0.0)


def logits(model, texts):
    """At every position, each text run alone."""
    with torch.no_grad():
        found = [forward(model, pad([encode(model, t).ids]).tokens)[0] for t in texts]
    return torch.cat(found)


def of(c, **more):
    """Moments of one layer that are given."""
    return Moments("W_O", {0: c}, {0: 1.0}, 10, "", **more)


def test_the_projector():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    c = axes @ torch.diag(torch.tensor([6.0, 5.0, 1.0, 0.1, 0.0, -1e-17], dtype=torch.float64))
    c = of(c @ axes.T)  # the mean eigenvalue is about 2
    keys = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for threshold, rank in ((0.0, 2), (0.06, 3), (0.6, 4), (10.0, 6)):
        held = c.with_null_space(threshold)
        free = axes[:, 6 - rank :]
        assert held.rank(0) == rank
        torch.testing.assert_close(held.solve(0, keys), keys @ free @ free.T)
        basis = held.factor(0)
        torch.testing.assert_close(basis @ basis.T, free @ free.T)
    assert c.with_null_space(0.06).with_null_space(None).null_space is None


def test_the_factor_of_c_is_its_inverses():
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = of(root @ root.T, shrinkage=0.1)
    factor = c.factor(0)
    torch.testing.assert_close(factor @ factor.T, torch.linalg.inv(c.shrunk(0)))
    assert c.rank(0) == 5


def test_alphaedits_formula():
    """(P (K_p^T K_p + K^T K) + λ I)^-1 P K^T R, with the earlier keys K_p as kept ones."""
    generator = torch.Generator().manual_seed(2)
    keys, earlier, right = (
        torch.randn(n, d, generator=generator, dtype=torch.float64)
        for n, d in ((3, 8), (2, 8), (3, 5))
    )
    text = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    c = of(text.T @ text).with_null_space(0.0)
    p = c.factor(0) @ c.factor(0).T
    both = torch.cat([keys, earlier])
    ridge = 0.3
    weight = ridge * (both @ p @ both.T).diagonal().mean() * torch.eye(8)
    want = torch.linalg.solve(p @ both.T @ both + weight, p @ keys.T @ right)
    left = solve_keys(keys, earlier, inverse=c.solve(0, both), ridge=ridge, slack=ridge)
    torch.testing.assert_close(left.T @ right, want)
    torch.testing.assert_close(text @ want, torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("method", ["joint", "spread", "sequence", "search", "memit", "rome"])
def test_the_kept_text_is_answered_as_before(wide, facts, method):
    """No input of it is mapped otherwise at any layer, so no logit of it changes; undone bit for bit."""
    two = facts[:2]
    mlp = method in ("memit", "rome")
    c = moments(wide, [0, 1], "W_out" if mlp else "W_O")
    given = {"layers": [0, 1], "covariance": c}
    if method == "joint":
        edit = creme_joint(wide, two, **given, **ONE)
    elif method == "spread":
        edit = creme_joint(wide, two, spread=True, **given, **ONE)
    elif method == "sequence":
        edit = stack(creme_sequential(wide, two, **given, **ONE), check=False)
    elif method == "search":
        edit = creme_search(wide, two, c, layers=[0, 1], steps=3)
    elif method == "memit":
        edit = memit(wide, two, **given, **BARE)
    else:
        edit = rome(wide, two[0], layer=1, covariance=c, **BARE)
    before, kept, asked = weights(wide), logits(wide, KEPT), logits(wide, [two[0].prompt()])
    with edit.applied(wide):
        torch.testing.assert_close(logits(wide, KEPT), kept, atol=1e-8, rtol=1e-8)
        assert (logits(wide, [two[0].prompt()]) - asked).abs().max() > 1e-3
    assert_same_bits(wide, before)


def test_keys_within_the_free_rank_are_met(wide, facts):
    c = moments(wide, [1])
    two = facts[:2]
    edit = paper_joint(wide, two, layers=[1], ridge=0, covariance=c, templates=("{}",))
    want = [last_mean(wide, [f.second_prompt()], "attn_out", 1) for f in two]
    with edit.applied(wide):
        for f, w in zip(two, want, strict=True):
            got = last_mean(wide, [f.prompt()], "attn_out", 1)
            torch.testing.assert_close(got, w, atol=1e-6, rtol=1e-6)


def test_together_is_one_after_the_other_where_keys_are_orthogonal(wide, facts):
    """C chosen such that, in its inverse, the keys of both prompts of all facts are."""
    two = facts[:2]
    texts = [t for f in two for t in (f.prompt(), f.second_prompt())]
    keys = torch.stack([last_mean(wide, [t], "z", 1) for t in texts])
    back = torch.linalg.pinv(keys)
    rest = torch.eye(keys.shape[1]) - back @ keys
    c = Moments(
        "W_O", {1: torch.linalg.inv(back @ back.T + rest)}, {1: 1.0}, 10, fingerprint(wide)
    ).with_shrinkage(0.0)
    torch.testing.assert_close(keys @ c.solve(1, keys).T, torch.eye(4, dtype=torch.float64))
    given = {"layers": [1], "covariance": c, "cover": "first", "strength": 1.0, **ONE}
    together = creme_joint(wide, two, ridge=0, **given)
    one_by_one = stack(creme_sequential(wide, two, hold=False, **given), check=False)
    torch.testing.assert_close(together.changes[0].delta(), one_by_one.changes[0].delta())


@pytest.mark.slow
def test_memit_in_sequence(load_tiny, facts):
    """The first part is the joint edit of it; a later one leaves the first one's outputs alone."""
    model = load_tiny("llama", "bridge", "float64")
    c = moments(model, [1], "W_out")
    given = {"layers": [1], "covariance": c, "ridge": 1e-9, **BARE, "position": "last"}
    before = weights(model)
    edits = memit_sequential(model, facts[:3], size=2, **given)
    assert_same_bits(model, before)
    assert [len(e.request["joint"]) for e in edits] == [2, 1]
    first = memit(model, facts[:2], **given)
    torch.testing.assert_close(edits[0].changes[0].delta(), first.changes[0].delta())
    free = memit_sequential(model, facts[:3], size=2, hold=False, **given)

    def after(found):
        with stack(found, check=False).applied(model):
            return last_mean(model, [facts[0].prompt()], "mlp_out", 1)

    torch.testing.assert_close(after(edits), after(edits[:1]), atol=1e-5, rtol=1e-5)
    assert (after(free) - after(free[:1])).abs().max() > 1e-4
    repair = MemitRepair(layers=[1], covariance=c, joint=True, name="AlphaEdit", **BARE)
    (state,) = repair.fit(model, facts[:1])
    assert state.settings["c"]["null_space"] == 0.0


def test_an_empty_null_space_is_refused_with_the_rank(tiny, facts):
    texts = [f"w{i} w{i + 9} w{(5 * i) % 80} w{i + 2}" for i in range(1, 75)]
    c = second_moments(tiny, texts, layers=[1]).with_null_space(1e-12)
    d = tiny.cfg.n_heads * tiny.cfg.d_head
    with pytest.raises(SingularError, match=rf"layer 1 is empty: C has rank {d} of {d}.*raise"):
        creme_joint(tiny, facts, layers=[1], covariance=c)
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="null_space is"):
            c.with_null_space(wrong)


def test_keys_that_do_not_fit_are_refused_with_the_rank(wide, facts):
    inside = second_moments(wide, [f.prompt() for f in facts], layers=[1]).with_null_space(0.0)
    with pytest.raises(SingularError, match="no part in the null space"):
        paper_joint(
            wide, facts, layers=[1], ridge=0, covariance=inside, templates=("{}",), cover="first"
        )
    again = [facts[0], facts[1], facts[0]]
    with pytest.raises(SingularError, match=r"rank 2 of 3.*fewer facts"):
        paper_joint(wide, again, layers=[1], ridge=0, templates=("{}",))


def test_a_file_and_a_record_tell_of_it(tiny, facts, tmp_path):
    c = moments(tiny, [1])
    again = Moments.load(c.save(tmp_path / "m.safetensors"))
    assert again.null_space == 0.0 and "null space up to 0" in repr(again)
    edit = creme_joint(tiny, facts[:2], layers=[1], covariance=c.with_null_space(0.05), **ONE)
    assert edit.settings["covariance"]["null_space"] == 0.05
