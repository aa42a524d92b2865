"""The vocabulary of interventions, by hand."""

from __future__ import annotations

import pytest
import torch

from mi_hops.sweep.interventions import add, noise, replace, scale, zero
from mi_hops.sweep.repair import Repair
from tests.repairs import NoRepair

X = torch.arange(6.0).reshape(2, 3)


def test_by_hand():
    v = torch.tensor([1.0, 0.0, -1.0])
    assert torch.equal(add(v, 2)(X), X + 2 * v)
    assert torch.equal(replace(v)(X), v.expand(2, 3))
    assert torch.equal(scale(-2)(X), -2 * X)
    assert torch.equal(zero()(X), torch.zeros(2, 3))


def test_nothing_is_changed_in_place_and_dtype_is_kept():
    x = X.to(torch.bfloat16)
    before = x.clone()
    for change in (add(X), replace(X), scale(0.0), zero(), noise(1.0, torch.Generator())):
        assert change(x).dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_noise_is_seeded_and_scaled():
    big = torch.zeros(200, 200)
    drawn = [noise(3.0, torch.Generator().manual_seed(s))(big) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert abs(drawn[0].std().item() - 3.0) < 0.05


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2,\) does not fit .* \(2, 3\)"):
        add(torch.ones(2))(X)


def test_no_repair_is_a_repair(tiny):
    repair = NoRepair()
    assert isinstance(repair, Repair)
    assert repair.fit(tiny, []) == []
