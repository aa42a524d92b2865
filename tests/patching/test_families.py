"""Families that differ from GPT-2 and LLaMA (flat MLPs, windows), against single forward passes."""

from __future__ import annotations

import pytest
import torch

from mi_hops.model import forward, hook_name
from mi_hops.patching import Circuit, ablate, all_edges, faithfulness, patch, path_patch
from mi_hops.sweep import Pairs, Sites
from mi_hops.text.tokens import encode
from tests.models import WORDS, bridge_of
from tests.patching.loops import ONE, PAIRS, changed, put, run, source


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    from transformers import OPTConfig

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return bridge_of(OPTConfig(**sizes, **depth, **ids), tmp_path_factory.mktemp("opt"), 10)


@pytest.mark.parametrize("kind", ["resid_mid", "mlp_post", "mlp_out"])
def test_ablations_equal_the_loop(opt, kind):
    texts = [PAIRS[0][0], "w2 w22 w5"]  # of unequal lengths
    asked = Pairs(texts, answer="w11", wrong="w21")
    found = ablate(opt, asked, Sites(kind, positions=[2, -1]), how="zero")["score"]
    for i, text in enumerate(texts):
        for layer in range(3):
            for k, pos in enumerate((2, -1)):

                def zero(x, pos=pos):
                    x = x.clone()
                    x[0, pos] = 0
                    return x

                hooks = [(hook_name(kind, layer), zero)]
                expected = run(opt, text, hooks, answer="w11", wrong="w21")
                assert float(found[i, layer, k]) == pytest.approx(expected, abs=1e-4)


def test_circuits_and_paths(opt):
    pairs = changed(ONE, answer="w11", wrong="w21")
    edges = all_edges(opt)
    kept = faithfulness(opt, pairs, [Circuit(frozenset(edges))])["faithfulness"]
    assert kept.item() == pytest.approx(1, abs=1e-3)
    # All but one edge: the clean run with that path from the corrupted one.
    cut = ("MLP0", "MLP1")
    without = faithfulness(opt, pairs, [Circuit(frozenset(edges) - {cut})])["score"]
    path = path_patch(opt, pairs, *cut, direction="noise")["score"]
    assert without.item() == pytest.approx(path.item(), abs=1e-3)
    tokens = [torch.tensor([encode(opt, text).ids]) for text in PAIRS[0]]
    seen = {}

    def look(name):
        return lambda x: seen.update({name: x})

    for side, ids in enumerate(tokens):
        name = hook_name("mlp_out", 0)
        with torch.no_grad():
            forward(opt, ids, hooks=[(name, look(("write", side)))])
    moved = seen["write", 1] - seen["write", 0]
    block = opt.blocks[1]
    with torch.no_grad():
        middle = hook_name("resid_mid", 1)
        forward(opt, tokens[0], hooks=[(middle, look("input"))])
        own = block.original_component
        value = own.fc2(own.activation_fn(own.fc1(own.final_layer_norm(seen["input"] + moved))))
    hooks = [(hook_name("mlp_out", 1), lambda x: value.reshape(x.shape))]
    expected = run(opt, PAIRS[0][0], hooks, answer="w11", wrong="w21")
    assert path.item() == pytest.approx(expected, abs=1e-3)


WINDOWED = {"mistral": {}, "gemma2": {"head_dim": 8}, "starcoder2": {}}


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", pytest.param("starcoder2", marks=pytest.mark.slow)]
)
def test_layers_with_a_window_see_no_further_in_a_sweep(family, tmp_path):
    from transformers import AutoConfig

    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = AutoConfig.for_model(
        family, sliding_window=3, **sizes, **heads, **ids, **WINDOWED[family]
    )
    model = bridge_of(made, tmp_path, 10)
    asked = {"answer": "w11", "wrong": "w21"}
    pairs = Pairs(*zip(*PAIRS[:2], strict=True), **asked)
    found = patch(model, pairs, Sites("resid_pre", positions=[2, -1]))["score"]
    for i, (clean, corrupted) in enumerate(PAIRS[:2]):
        width = len(encode(model, clean))
        assert width > 5  # longer than the window
        for layer in range(3):
            value = source(model, clean, "resid_pre", layer)
            for k, pos in enumerate((2, width - 1)):
                hooks = [put("resid_pre", layer, value, [pos])]
                expected = run(model, corrupted, hooks, **asked)
                assert float(found[i, layer, k]) == pytest.approx(expected, abs=1e-4)


def test_attention_that_no_mask_can_be_made_for_is_refused(tmp_path):
    from transformers import BloomConfig

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = bridge_of(BloomConfig(**sizes), tmp_path)
    pairs = Pairs(*PAIRS[0], answer="w11", wrong="w21")
    with pytest.raises(ValueError, match=r"'alibi'.*\(bloom\).*HookedTransformer"):
        patch(model, pairs, Sites("resid_pre"))
