"""What lenses read of families that do more than GPT-2 and LLaMA: soft caps, gains kept less 1, norms behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import (
    TunedLens,
    evaluate_lens,
    logit_attribution,
    logit_flow,
    logit_lens,
    neuron_attribution,
    read_head,
)
from mi_hops.model import forward, load_model
from mi_hops.patching import patch
from mi_hops.sweep import Pairs
from mi_hops.text.tokens import encode
from tests.models import WORDS, tokenizer

TEXT, TRACKED = "w1 w2 w3 w4", {"a name": "w9"}
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(family):
    import transformers

    if family == "gemma2":
        more = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
        return transformers.Gemma2Config(**SIZES, **more)
    if family == "olmo2":
        return transformers.Olmo2Config(**SIZES)
    return transformers.GraniteConfig(**SIZES, logits_scaling=4.0)


@pytest.fixture(scope="module")
def load_family(tmp_path_factory):
    """Loader of a tiny random model by family and weight processing, once for the module."""
    from transformers import AutoModelForCausalLM

    folders, made = {}, {}

    def load(family, processing="none"):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            model = AutoModelForCausalLM.from_config(config(family))
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in model.parameters():
                    size = 0.25 if p.ndim > 1 else 0.3
                    p.copy_(p * (p.ndim == 1) + size * torch.randn(p.shape, generator=generator))
            model.save_pretrained(folders[family])
            tokenizer().save_pretrained(folders[family])
        if (family, processing) not in made:
            made[family, processing] = load_model(
                folders[family],
                device="cpu",
                dtype="float32",
                backend="bridge",
                processing=processing,
            )
        return made[family, processing]

    return load


@pytest.mark.parametrize("family", ["gemma2", "granite", "olmo2"])
def test_the_last_layer_reads_as_the_model_says(load_family, family):
    model = load_family(family)
    ids = encode(model, TEXT).ids
    with torch.no_grad():
        said = forward(model, torch.tensor([ids]))[0].log_softmax(-1)
    read = logit_lens(model, TEXT, track=TRACKED).sel(layer=2)
    token = encode(model, TRACKED["a name"]).ids[-1]
    assert read["logprob"].item() == pytest.approx(said[-1, token].item(), abs=1e-4)
    assert read["kl"].item() == pytest.approx(0, abs=1e-5)
    quality = evaluate_lens(model, TunedLens(model, layers=[2], rank=2), [TEXT])
    loss = -np.mean([said[t, ids[t + 1]].item() for t in range(len(ids) - 1)])
    assert quality["cross_entropy"].item() == pytest.approx(loss, abs=1e-4)
    # Activations alone determine the clean run's score.
    pairs = {"corrupted": "w5 w2 w3 w4", "answer": "w9", "wrong": "w10"}
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    given, whole = (patch(model, Pairs(clean, **pairs)) for clean in (cache, TEXT))
    for name in ("clean", "effect"):
        assert np.allclose(given[name], whole[name], atol=1e-4)


def test_gains_that_are_kept_less_1_count_whole(load_family):
    heads = "L1H2", ["w3", "w4"], ["w5", "w9"]
    plain, folded = (
        read_head(load_family("gemma2", processing), *heads)["score"]
        for processing in ("none", "fold")
    )
    # The cap keeps the unembedding from being centred, which the scores are by themselves.
    assert np.allclose(plain, folded, atol=1e-5) and np.abs(plain).min() > 1e-3


def test_parts_behind_which_a_norm_stands_have_no_share(load_family):
    for family in ("gemma2", "olmo2"):
        model = load_family(family)
        for call, matrix in (
            (logit_attribution, "z @ W_O"),
            (logit_flow, "z @ W_O"),
            (neuron_attribution, "mlp_post @ W_out"),
        ):
            with pytest.raises(ValueError, match=f"block 0 does not write its {matrix} .*a norm"):
                call(model, TEXT, TRACKED)
