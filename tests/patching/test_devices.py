"""A model placed on several devices is patched, traced and attributed to the same effect."""

from __future__ import annotations

import pytest

from mi_hops import patching
from mi_hops.sweep import Pairs, Sites
from tests.patching.loops import ALL, ANSWERS, CLEAN, changed
from tests.patching.test_safety import CALLS
from tests.places import assert_same

ASKED = Pairs(CLEAN, answer=ANSWERS)
SITES = Sites(
    ["resid_pre", "resid_mid", "q", "z", "attn_out", "mlp_post"], positions=[2, -1], heads="all"
)

MORE = {
    "several kinds": lambda m: patching.patch(m, ALL, SITES, metric=["logit_diff", "kl"]),
    "a third source": lambda m: patching.patch(m, changed(ALL, source=CLEAN), Sites(window=2)),
    **{
        f"{how} ablation": lambda m, how=how: patching.ablate(m, ALL, Sites("z"), how=how)
        for how in ("mean", "position_mean", "resample")
    },
    "atp*": lambda m: patching.attribute(
        m, ALL, Sites(["q", "k", "v", "mlp_out"], heads="all"), method="atp*"
    ),
    "integrated edges": lambda m: patching.attribute_edges(m, ALL, method="integrated", steps=2),
    "inputs": lambda m: patching.attribute_inputs(m, ASKED, steps=3),
    "occluded inputs": lambda m: patching.attribute_inputs(m, ALL, method="occlusion"),
    "knockout": lambda m: patching.knockout(m, ASKED, heads=None),
    "back-patching": lambda m: patching.back_patch(m, ASKED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in {**CALLS, **MORE} if name != "plan"])
def test_the_same_on_two_devices(pair, name):
    assert_same(pair, {**CALLS, **MORE}[name])
