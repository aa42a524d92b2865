"""Damaged files of every kind are refused by a clear error; at length: benchmarks/fuzzing.py."""

from __future__ import annotations

import pytest

from benchmarks.fuzzing import fuzz

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_no_damage_is_met_by_another_error():
    for kind, count in fuzz(72).items():
        assert not count["lost"], (kind, count["losses"])
        assert count["refused"] > 5, (kind, count)
