"""The flow from tokens adds up to the heads' shares, and is nothing where a head does not look."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import logit_attribution, logit_flow
from mi_hops.result import coloured_text

PROMPTS = ("w1 w2 w3 w4 w5", "w9 w8", "w5 w6 w7 w8 w9 w10 w11")
TRACK = {"a": ["w7 w8", "w9", "w10"], "b": ["w20", "w21", "w22 w1"]}


@pytest.mark.parametrize("centre", [False, True])
def test_the_flow_from_all_tokens_is_what_the_heads_wrote(tiny, centre):
    shares = logit_attribution(tiny, PROMPTS, TRACK, centre=centre)
    flow = logit_flow(tiny, PROMPTS, TRACK, by_head=True, centre=centre)
    assert np.allclose(flow["flow"].sum("position"), shares["heads"], atol=1e-4)
    assert np.allclose(flow["mlps"], shares["mlps"], atol=1e-4)
    together = logit_flow(tiny, PROMPTS, TRACK, centre=centre, batch_size=1)["flow"]
    assert np.allclose(together, flow["flow"].sum("head", skipna=False), atol=1e-4, equal_nan=True)
    assert together.isnull().any("tracked").any("layer").sum("position").values.tolist() == [
        2,
        5,
        0,
    ]


def test_a_token_that_is_not_attended_to_moves_nothing(load_tiny):
    model = load_tiny("llama")
    flow = logit_flow(model, PROMPTS[0], {"a": "w7"}, position=2, by_head=True)["flow"]
    assert float(abs(flow.sel(position=slice(3, None))).max()) == 0
    from mi_hops.text.tokens import encode

    ids = torch.tensor([encode(model, PROMPTS[0]).ids])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    # Along the value's own path: attention times value through W_O, in TransformerLens's own cache.
    pattern = cache["blocks.1.attn.hook_pattern"][0, 3, 2]
    whole = flow.sel(layer=1, head=3)[0, :, 0].values
    value = cache["blocks.1.attn.hook_v"][0, :, 1] @ model.W_O[1, 3]
    one = logit_flow(model, PROMPTS[0], {"a": "w7"}, position=2)
    assert one["flow"].dims == ("example", "layer", "position", "tracked")
    ratio = [float(whole[p] / pattern[p]) for p in range(3)]
    from mi_hops.model import linear_read_out

    final = cache["blocks.2.hook_resid_post"][0, 2:3]
    token = torch.tensor([[model.tokenizer.convert_tokens_to_ids("w7")]])
    direction = linear_read_out(model, final, token, centre=True)[0][0, 0]
    assert np.allclose(ratio, (value[:3] @ direction).detach(), atol=1e-4)


def test_a_hook_that_changes_z_is_refused(tiny):
    """The tokens that a head looked at do not say what it then hands on."""

    def without_a_head(z, hook):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    with (
        tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_z", without_a_head)]),
        pytest.raises(ValueError, match="z of block 1 is not pattern @ v .*Does a hook"),
    ):
        logit_flow(tiny, PROMPTS, TRACK)
    with tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_v", without_a_head)]):
        flow = logit_flow(tiny, PROMPTS, TRACK, by_head=True)["flow"].sum("position")
        assert np.allclose(flow, logit_attribution(tiny, PROMPTS, TRACK)["heads"], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_rounding_of_half_precision_is_no_hook(load_tiny, shape, dtype):
    flow = logit_flow(load_tiny(shape, "bridge", dtype), PROMPTS, TRACK)["flow"]
    assert np.isfinite(flow.sel(position=0)).all()


def test_it_is_shown_as_text(load_tiny):
    flow = logit_flow(load_tiny(), PROMPTS[0], {"a": "w7"})
    text = coloured_text(flow.sel(layer=2, tracked="a"))
    assert "".join(text.tokens) == f"<bos>{PROMPTS[0]}"
    with pytest.raises(ValueError, match="name something to track"):
        logit_flow(load_tiny(), "w1", {})
