"""Blocks of another layout than attention, then MLP: parallel ones, attention alone, none with norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import logit_attribution, logit_flow, logit_lens
from mi_hops.model import forward, hooked_class, provenance
from mi_hops.patching import (
    Circuit,
    acdc,
    all_edges,
    attribute,
    attribute_edges,
    faithfulness,
    patch,
    path_patch,
)
from mi_hops.sweep import Pairs, Sites
from mi_hops.text.tokens import encode
from tests.models import WORDS, bridge_of, tokenizer
from tests.patching.loops import PAIRS, changed, put, run, source

ONE = Pairs(*PAIRS[0], answer="w11", wrong="w21")


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """A tiny Pythia: attention and MLP read the same stream."""
    from transformers import GPTNeoXConfig

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return bridge_of(GPTNeoXConfig(**sizes, **depth, **ids), tmp_path_factory.mktemp("neox"), 8)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A random HookedTransformer of a layout, float64."""
    hooked = hooked_class()
    if hooked is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)  # TransformerLens asks where it is from

    def make(**layout):
        sizes = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 64}
        layout = {"normalization_type": "LN", "act_fn": "gelu", "d_mlp": 48, **layout}
        config = HookedTransformerConfig(
            **sizes, d_vocab=WORDS, dtype=torch.float64, device="cpu", seed=0, **layout
        )
        model = hooked(config, tokenizer=words)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(0.25 * noise + (p if p.ndim == 1 else 0))
        return model

    return make


@pytest.fixture(params=["neox", "parallel", "attention only", "no norms"])
def other(request, neox):
    """A model of another layout."""
    if request.param == "neox":
        return neox
    layouts = {
        "parallel": {"parallel_attn_mlp": True},
        "attention only": {"attn_only": True},
        "no norms": {"normalization_type": None},
    }
    return request.getfixturevalue("build")(**layouts[request.param])


def tolerance(model):
    return 1e-8 if next(model.parameters()).dtype == torch.float64 else 2e-3


def test_edges_are_those_of_the_layout(neox, build):
    for model in (neox, build(parallel_attn_mlp=True)):
        edges = set(all_edges(model))
        assert ("L1H0", "MLP1") not in edges and ("MLP1", "MLP1") not in edges
        assert {("L0H0", "MLP1"), ("MLP0", "L1H2.q"), ("embed", "MLP0")} < edges
    names = {name for edge in all_edges(build(attn_only=True)) for name in edge}
    assert not any(name.startswith("MLP") for name in names)
    with pytest.raises(ValueError, match="no sender|no writer"):
        path_patch(build(attn_only=True), ONE, "mlps", "logits")


def test_all_edges_are_the_clean_run_and_none_the_corrupted(other):
    pairs = changed(ONE)
    every = frozenset(all_edges(other))
    found = faithfulness(other, pairs, [Circuit(every), Circuit(frozenset())])["faithfulness"]
    assert found.values.ravel() == pytest.approx([1, 0], abs=max(1e-6, tolerance(other)))


def test_a_circuit_without_one_edge_is_a_path_patched(other):
    edges = sorted(all_edges(other))
    for edge in edges[:: len(edges) // 12]:
        without = faithfulness(other, ONE, [Circuit(frozenset(edges) - {edge})])["score"]
        path = path_patch(other, ONE, *edge, direction="noise")["score"]
        assert without.item() == pytest.approx(path.item(), abs=tolerance(other)), edge


def test_the_edges_of_the_embedding_add_up_to_its_gradient(other):
    found = attribute_edges(other, ONE, "embed", "all")["change"]
    sites = Sites("resid_pre", layers=0)
    whole = attribute(other, changed(ONE), sites, direction="noise")["change"]
    assert float(np.nansum(found)) == pytest.approx(float(whole.sum()), abs=tolerance(other))


def test_acdcs_harms_are_differences_of_circuits(other):
    table = acdc(other, ONE, threshold=0.05, prune=False).table
    harms = table["harm"].to_numpy()
    for k in range(0, len(table), len(table) // 8):
        cut = {(row.sender, row.receiver) for row in table.iloc[:k].itertuples() if not row.kept}
        now = frozenset(all_edges(other)) - cut
        edge = table["sender"].iloc[k], table["receiver"].iloc[k]
        both = [Circuit(now), Circuit(now - {edge})]
        before, after = faithfulness(other, ONE, both, metric="kl")["score"].values.ravel()
        assert harms[k] == pytest.approx(after - before, abs=tolerance(other)), edge


def test_patching_equals_the_loop(other):
    clean, corrupted = PAIRS[0]
    asked = {"answer": "w11", "wrong": "w21"}
    found = patch(other, ONE, Sites("attn_out", positions=[2, -1]))["score"]
    width = len(encode(other, clean))
    for layer in range(3):
        value = source(other, clean, "attn_out", layer)
        for k, pos in enumerate((2, width - 1)):
            expected = run(other, corrupted, [put("attn_out", layer, value, [pos])], **asked)
            assert float(found[0, layer, k]) == pytest.approx(expected, abs=tolerance(other))


def test_lenses_read_them(other):
    text, track = PAIRS[0][0], {"answer": "w11", "wrong": "w21"}
    tokens = torch.tensor([encode(other, text).ids])
    with torch.no_grad():
        logp = forward(other, tokens)[0, -1].double().log_softmax(-1)
    lens = logit_lens(other, text, track=track)["logprob"].isel(layer=-1)
    ids = [encode(other, name).ids[-1] for name in track.values()]
    assert lens.values.ravel() == pytest.approx(logp[ids].numpy(), abs=tolerance(other))
    shares = logit_attribution(other, text, track=track)
    total = sum(
        shares[name].sum([d for d in shares[name].dims if d in ("layer", "head")])
        for name in ("heads", "mlps", "attention_biases", "embedding", "constant")
    )
    assert total.values.ravel() == pytest.approx(
        shares["logit"].values.ravel(), abs=tolerance(other)
    )
    flow = logit_flow(other, text, track=track)
    assert flow["mlps"].values == pytest.approx(shares["mlps"].values, abs=tolerance(other))
    assert provenance(other)["fingerprint"]
