"""Results to TransformerLens's and back, and its own sweeps against ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.patching import ablate, attribute, patch, path_patch
from mi_hops.patching.convert import from_transformer_lens, to_transformer_lens
from mi_hops.sweep import Sites
from mi_hops.text.tokens import encode
from tests.patching.loops import ALL, CLEAN, CORRUPTED, ONE


@pytest.fixture
def theirs():
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "PatchingResult"):
        pytest.skip("this TransformerLens has no PatchingResult")
    return patching


@pytest.mark.parametrize(
    "options",
    [
        {"sites": "z"},
        {"sites": ["attn_out", "mlp_out"], "metric": ["logit_diff", "rank"]},
        {"sites": Sites("k", positions="each"), "direction": "noise"},
    ],
)
def test_there_and_back(load_tiny, theirs, options):
    model = load_tiny("llama")
    result = patch(model, ALL, **options)
    converted = to_transformer_lens(result)
    assert isinstance(converted, theirs.PatchingResult)
    assert len(converted.to_dataframe()) == result["score"].size
    effect = converted.effect()
    direction = options.get("direction", "denoise")
    other = "corrupted" if direction == "noise" else "clean"
    back = from_transformer_lens(
        converted, direction=direction, other=result[other].transpose(..., "example").values,
        provenance=result.provenance,
    )  # fmt: skip
    dims = [{"kv_head": "head"}.get(d, d) for d in result["score"].dims]
    assert list(back["score"].dims) == dims
    for name in ("score", "change", "effect", "clean", "corrupted"):
        assert np.allclose(back[name], result[name], atol=1e-5, equal_nan=True), name
    assert back.provenance["direction"] == direction
    assert back["effect"].attrs["units"] == result["effect"].attrs["units"]
    assert np.allclose(
        effect.numpy().ravel(),
        back["change"].transpose(*[d for d in ("metric",) if d in dims],
                                 *[d for d in dims if d not in ("metric", "example")],
                                 "example").values.ravel(), atol=1e-5,
    )  # fmt: skip


def test_their_sweep_is_ours(load_tiny, theirs):
    model = load_tiny("gpt2")
    tokens = [torch.tensor([encode(model, t).ids for t in side]) for side in (CLEAN, CORRUPTED)]
    _, cache = model.run_with_cache(tokens[0], return_type="logits")

    def metric(logits):
        return logits[:, -1, 7] - logits[:, -1, 9]

    found = theirs.get_act_patch_resid_pre(
        model, tokens[1], cache, metric, reduce="none", baseline=True
    )
    with torch.no_grad():
        clean = metric(model(tokens[0]))
    converted = from_transformer_lens(found, other=clean)
    ours = patch(model, (CLEAN, CORRUPTED), metric=lambda x: x[:, 7] - x[:, 9])
    for name in ("score", "change", "clean", "corrupted"):
        assert np.allclose(converted[name], ours[name], atol=1e-5), name
    assert converted["score"].dims == ("example", "layer", "position")


def test_refuses(load_tiny, theirs):
    model = load_tiny("gpt2")
    estimate = attribute(model, ALL)
    others = (
        estimate,
        path_patch(model, ONE),
        ablate(model, ALL),
    )
    for result in others:
        with pytest.raises(ValueError, match="only results of activation patching"):
            to_transformer_lens(result)
    result = to_transformer_lens(patch(model, ALL))
    with pytest.raises(ValueError, match="'denoise' or 'noise'"):
        from_transformer_lens(result, direction="back")
    with pytest.raises(ValueError, match="pass direction='noise'"):
        from_transformer_lens(result, provenance={"direction": "noise"})
    result.baseline = None
    with pytest.raises(ValueError, match="baseline=True"):
        from_transformer_lens(result, other=torch.zeros(3))


def test_runs_that_score_the_same_within_rounding_have_no_effect(load_tiny, theirs):
    result = to_transformer_lens(patch(load_tiny("gpt2"), ALL))
    nearly = result.baseline * (1 + 1e-6)
    assert np.isnan(from_transformer_lens(result, other=nearly)["effect"]).all()


def test_says_so_where_there_is_none(load_tiny):
    patching = pytest.importorskip("transformer_lens.patching")
    if hasattr(patching, "PatchingResult"):
        pytest.skip("this TransformerLens has PatchingResult")
    result = patch(load_tiny("gpt2"), ONE)
    with pytest.raises(ValueError, match="has no PatchingResult"):
        to_transformer_lens(result)
