"""The logit lens against the model's own outputs and against reading by hand."""

from __future__ import annotations

from contextlib import nullcontext
from html import unescape

import numpy as np
import pytest
import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens import (
    LogitLens,
    Readout,
    fact_trajectories,
    logit_lens,
    plot_map,
    read_vectors,
    token_map,
    vectors,
)
from mi_hops.model import capture, forward, hook_name, read_out, unembedding
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import add
from mi_hops.text.tokens import TokenError, answer_ids, encode

TEXT = "w1 w2 w3 w4 w5"
FULL = Readout(logprobs=True)
TEXTS = (TEXT, "w9 w8", "w5 w6 w7 w8 w9 w10 w11")


def output(model, text):
    """Log-probabilities [pos, vocab] of one unpadded run."""
    return forward(model, torch.tensor([encode(model, text).ids]))[0].log_softmax(-1)


def fact(i, **more):
    fields = {
        "id": f"f{i}",
        "subject": f"w{i}",
        "relation1": "r",
        "bridge": f"w{20 + i} w21",
        "relation2": "q",
        "answer": f"w{40 + i}",
        "first_hop": f"w3 of w{i}",
        "prompts": {"suffix": "w1 w2 " + "w9 " * (i % 3) + f"w3 of w{i} is"},
    }
    return TwoHopFact(**{**fields, **more})


@pytest.mark.parametrize("kind", ["resid", "resid_post"])
def test_the_last_layer_is_the_models_own_output(tiny, kind):
    result = logit_lens(tiny, TEXT, positions="each", kind=kind, readout=FULL)
    last = result["logprobs"].isel(example=0, layer=-1).values
    want = output(tiny, TEXT)
    assert np.allclose(last, want, atol=1e-5)
    assert np.allclose(result["kl"].isel(layer=-1), 0, atol=1e-5)
    assert np.allclose(
        result["entropy"].isel(example=0, layer=-1), -(want.exp() * want).sum(-1), atol=1e-5
    )
    assert result["kl"].isel(layer=0).min() > 1e-3  # an earlier layer does differ


def test_folded_weights_give_the_same_output_and_another_raw_lens(load_tiny):
    plain, folded = (load_tiny("gpt2", processing=p) for p in ("none", "fold"))
    for model in (plain, folded):
        last = logit_lens(model, TEXT, readout=FULL)["logprobs"].values[0, -1, 0]
        assert np.allclose(last, output(plain, TEXT)[-1], atol=1e-4)
    raw = [
        logit_lens(m, TEXT, lens="raw", readout=FULL)["logprobs"].values for m in (plain, folded)
    ]
    assert np.abs(raw[0] - raw[1]).max() > 0.01
    assert logit_lens(folded, TEXT).provenance["processing"] == "fold"


def test_layer_zero_of_resid_is_the_embedding_and_layer_l_enters_block_l(tiny):
    tokens = torch.tensor([encode(tiny, TEXT).ids])
    names = [hook_name("resid_pre", layer) for layer in range(3)]
    found, _ = capture(tiny, tokens, names)
    result = logit_lens(tiny, TEXT, positions=2, lens="raw", readout=FULL)
    assert result["layer"].values.tolist() == [0, 1, 2, 3]
    for layer, name in enumerate(names):
        want = read_out(tiny, found[name][0, 2], norm=False).log_softmax(-1)
        assert np.allclose(result["logprobs"].values[0, layer, 0], want, atol=1e-5)


def test_head_lenses_and_the_bias_add_up_to_the_attention_output_lens(tiny):
    tokens = torch.tensor([encode(tiny, TEXT).ids])
    where = (torch.zeros(1, 1, dtype=torch.long), torch.arange(tokens.shape[1])[None])
    heads = vectors.gather(tiny, tokens, where, kind="result", layers=[1]).read[1]
    whole = vectors.gather(tiny, tokens, where, kind="attn_out", layers=[1]).read[1]
    lens, (weight, bias) = LogitLens(tiny, norm=False), unembedding(tiny)
    parts = lens.logits(heads, layer=1) - bias  # each reading brings b_U once
    b_o = getattr(tiny.blocks[1].attn, "b_O", None)
    own = 0.0 if b_o is None else b_o @ weight
    assert torch.allclose(parts.sum(2) + own + bias, lens.logits(whole, layer=1), atol=1e-4)
    assert heads.shape == (1, 6, 4, 32)


def from_the_end(model):
    def fn(x, hook):
        x = x.clone()
        x[:, -1] = x.mean(1) - 2 * x[:, -1]
        return x

    return model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fn)])


@pytest.mark.parametrize("hooked", [nullcontext, from_the_end])
def test_padded_batches_equal_one_prompt_at_a_time(tiny, hooked):
    with hooked(tiny):
        check_batches(tiny)


def check_batches(tiny):
    track = {"a": ["w7 w8", "w9", "w10 w11 w12"]}
    where = {"first": [1, "w8", slice(1, 3)], "last": -1}
    both = logit_lens(
        tiny, TEXTS, track=track, positions=where, readout=Readout(top_k=2), batch_size=3
    )
    for i, text in enumerate(TEXTS):
        one = logit_lens(
            tiny,
            text,
            track={"a": track["a"][i]},
            readout=Readout(top_k=2),
            positions={"first": where["first"][i], "last": -1},
        )
        for name in ("prob", "logprob", "rank", "mean_token_prob", "entropy", "kl", "top_probs"):
            assert np.allclose(both[name].values[i], one[name].values[0], atol=1e-5), name
        assert (both["top_tokens"].values[i] == one["top_tokens"].values[0]).all()


@pytest.mark.parametrize("kind", ["resid_mid", "mlp_out", "result"])
def test_chunks_do_not_change_numbers(tiny, kind, monkeypatch):
    def read():
        return logit_lens(
            tiny, TEXT, positions="each", kind=kind, track={"a": "w7 w8"}, readout=Readout(top_k=2)
        )

    whole = read()
    monkeypatch.setattr(vectors, "CHUNK_BYTES", 16 * tiny.cfg.d_vocab * 2)
    parts = read()
    for name in ("prob", "rank", "kl", "top_probs"):
        assert np.allclose(whole[name].values, parts[name].values, atol=1e-6)


def test_tracked_numbers_by_hand(tiny):
    prompt = encode(tiny, TEXT)
    first, second = answer_ids(tiny, prompt, "w7 w8")
    alias = answer_ids(tiny, prompt, "w12")[0]
    track = {"name": ["w7 w8", "w12", "w7 w20"], "ids": [second]}
    result = logit_lens(tiny, TEXT, track=track, layers=[1], lens="raw", readout=FULL)
    probs = np.exp(result["logprobs"].values[0, 0, 0])
    got = {
        n: result[n].values[0, 0, 0]
        for n in ("prob", "logprob", "rank", "mean_token_prob", "any_prob")
    }
    assert np.allclose(got["prob"], [probs[first], probs[second]])
    assert np.allclose(got["logprob"], np.log([probs[first], probs[second]]), atol=1e-6)
    assert got["rank"].tolist() == [1 + (probs > probs[t]).sum() for t in (first, second)]
    assert np.allclose(got["mean_token_prob"], [(probs[first] + probs[second]) / 2, probs[second]])
    # "w7 w8" and "w7 w20" share their first token, which counts once.
    assert np.allclose(got["any_prob"], [probs[first] + probs[alias], probs[second]])


def test_statistics_on_known_logits():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    uniform = torch.full((2, 4), 0.25).log()
    found = vectors.statistics(probs.log() + 3, output=uniform, top_k=1)
    assert torch.allclose(found["entropy"], torch.tensor([1.75, 2.0]) * np.log(2))
    want = 0.25 * np.log(0.25**4 / (0.5 * 0.25 * 0.125**2))
    assert torch.allclose(found["kl"], torch.tensor([want, 0.0], dtype=torch.float32), atol=1e-6)
    assert found["top_ids"][0].item() == 0


def test_hooks_act_before_anything_is_read(tiny):
    vector = torch.linspace(-1, 1, 32)
    hooks = [(hook_name("attn_out", 1), lambda x, hook: add(vector)(x))]
    plain = logit_lens(tiny, TEXT, kind="resid_pre", readout=FULL)["logprobs"].values[0, :, 0]
    with tiny.hooks(fwd_hooks=hooks):
        changed = logit_lens(tiny, TEXT, kind="resid_pre", readout=FULL)["logprobs"].values[0, :, 0]
    assert np.allclose(plain[:2], changed[:2], atol=1e-6)
    assert np.abs(plain[2] - changed[2]).max() > 0.01


def test_fact_trajectories_read_bridge_and_answer_at_their_roles(tiny):
    facts = [fact(4), fact(5, bridge="w30 w31 w32"), fact(6)]
    result = fact_trajectories(tiny, facts, batch_size=2)
    assert result["example"].values.tolist() == ["f4", "f5", "f6"]
    assert result["position"].values.tolist() == ["first hop", "last"]
    assert result["layer"].values.tolist() == [0, 1, 2, 3]
    for item in facts:
        text = item.prompt()
        prompt = encode(tiny, text)
        for role, at in (("first hop", prompt.last - 1), ("last", prompt.last)):
            one = logit_lens(
                tiny, text, positions=at, track={"bridge": item.bridge, "answer": item.answer}
            )
            for name in ("prob", "rank", "mean_token_prob"):
                got = result[name].sel(example=item.id, position=role)
                assert np.allclose(got, one[name].isel(example=0, position=0), atol=1e-5)
    interval = result.sel(tracked="bridge").ci(variable="prob")
    assert interval["n"].values.min() == 3


def test_facts_that_cannot_be_read_are_skipped_with_the_reason(tiny):
    facts = [fact(4), fact(5, first_hop="w77 w78"), fact(6, prompts={"prefix": "w1 w3 of w6"})]
    result = fact_trajectories(tiny, facts, form="suffix")
    assert result["example"].values.tolist() == ["f4"]
    assert [who for who, _ in result.skipped] == ["f5", "f6"]
    assert "w77" in result.skipped[0][1] and "suffix" in result.skipped[1][1]
    with pytest.raises(ValueError, match="no fact can be used for the lens"):
        fact_trajectories(tiny, facts[1:2])


def test_given_vectors_are_read_like_activations(tiny):
    tokens = torch.tensor([encode(tiny, TEXT).ids])
    found, _ = capture(tiny, tokens, [hook_name("mlp_out", 1)])
    given = found[hook_name("mlp_out", 1)][0]
    direct = read_vectors(tiny, given, track={"a": 9}, lens="raw", top_k=3)
    lens = logit_lens(
        tiny,
        TEXT,
        positions="each",
        kind="mlp_out",
        track={"a": [9]},
        lens="raw",
        readout=Readout(top_k=3),
    )
    assert np.allclose(direct["prob"], lens["prob"].isel(example=0, layer=1), atol=1e-6)
    assert (direct["top_tokens"].values == lens["top_tokens"].values[0, 1]).all()


def test_a_map_shows_the_top_token_in_each_cell(tiny, tmp_path):
    result = token_map(tiny, TEXT, top_k=2)
    figure = plot_map(result)
    assert unescape(figure.data[0].text[-1][-1]) == result["top_tokens"].values[0, -1, -1, 0]
    best = output(tiny, TEXT)[-1].argmax().item()
    assert result["top_tokens"].values[0, -1, -1, 0] == tiny.tokenizer.decode([best])
    again = Result.load(result.save(tmp_path / "map.nc"))
    assert (again["top_tokens"].values == result["top_tokens"].values).all()
    heads = token_map(tiny, TEXT, kind="result", top_k=1)
    one = plot_map(heads.sel(head=2))
    assert unescape(one.data[0].text[1][3]) == heads["top_tokens"].values[0, 1, 3, 2, 0]
    for wrong, message in (
        (logit_lens(tiny, TEXT, positions="each"), "token_map"),
        (logit_lens(tiny, TEXTS, readout=Readout(top_k=1)), "select an example"),
        (heads, "a head with result.sel"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_map(wrong)


@pytest.mark.parametrize("kind", ["resid", "attn_out", "result"])
def test_a_cache_is_read_instead_of_running_the_model(tiny, kind, monkeypatch):
    _, cache = tiny.run_with_cache(torch.tensor([encode(tiny, TEXT).ids]))
    options = {"positions": "each", "kind": kind, "track": {"a": "w7 w8"}}
    want = logit_lens(tiny, TEXT, **options)
    monkeypatch.setattr(vectors, "capture", None)  # nothing may run
    for given in (cache, cache.remove_batch_dim()):
        got = logit_lens(tiny, TEXT, cache=given, **options)
        for name in ("prob", "kl", "entropy"):
            assert np.allclose(got[name], want[name], atol=1e-5), name


def test_a_cache_of_other_prompts_or_without_what_is_read_is_refused(load_tiny):
    model = load_tiny()
    _, cache = model.run_with_cache(torch.tensor([encode(model, TEXT).ids]))
    with pytest.raises(
        ValueError, match=r"holds \(1, 6\) \[batch, pos\], the prompts are \(1, 3\)"
    ):
        token_map(model, "w9 w8", cache=cache)
    some = {name: cache[name] for name in cache.keys() if "mlp_out" not in name}  # noqa: SIM118
    with pytest.raises(ValueError, match="does not hold blocks.0.hook_mlp_out"):
        token_map(model, TEXT, kind="mlp_out", cache=some)


def test_token_ids_are_read_as_they_are(load_tiny):
    model = load_tiny()
    ids = torch.tensor([encode(model, TEXT).ids])
    want = logit_lens(model, TEXT, positions="each", track={"a": "w7 w8"})
    for tokens in (ids, ids[0]):
        got = logit_lens(model, tokens, positions="each", track={"a": "w7 w8"})
        assert got.data.equals(want.data)
    two = torch.cat([ids, ids.flip(1)])
    read = logit_lens(model, two, positions="each", track={"a": ["w7", "w8"]})
    assert read["prob"].shape == (2, 4, 6, 1)
    assert np.allclose(read["entropy"][0], want["entropy"][0], atol=1e-6)
    assert logit_lens(model, [ids[0], TEXT]).n_used == 2


def test_hook_names_and_single_layers_are_accepted(load_tiny):
    model = load_tiny()
    want = logit_lens(model, TEXT, kind="mlp_out", layers=[1])
    for kind, layers in (("hook_mlp_out", 1), ("blocks.1.hook_mlp_out", None), ("mlp_out", 1)):
        assert logit_lens(model, TEXT, kind=kind, layers=layers).data.equals(want.data)
    heads = logit_lens(model, TEXT, kind="blocks.1.attn.hook_result")
    assert heads.data.equals(logit_lens(model, TEXT, kind="result", layers=1).data)


def test_prompts_may_be_given_by_label_and_read_at_each_token(load_tiny):
    model, texts = load_tiny(), ["w1 w2", "w3 w4"]
    read = logit_lens(model, dict(zip("ab", texts, strict=True)), positions="each")
    assert read["example"].values.tolist() == ["a", "b"]
    assert read["position"].values.tolist() == [0, 1, 2]
    one = logit_lens(model, texts[1], positions="each")
    assert np.allclose(read["entropy"].sel(example="b"), one["entropy"][0], atol=1e-6)


def test_vocabulary_is_kept_only_when_asked_for(load_tiny):
    assert "vocab" not in token_map(load_tiny(), TEXT, top_k=2).data.dims


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: logit_lens(m, TEXT, kind="attention"), "unknown kind 'attention'"),
        (lambda m: logit_lens(m, TEXT, layers=[4]), "0..3"),
        (lambda m: logit_lens(m, TEXT, kind="resid_post", layers=[3]), "0..2"),
        (lambda m: logit_lens(m, TEXT, layers=[]), "layers is empty"),
        (lambda m: logit_lens(m, TEXT, layers=[1, 1]), "twice over"),
        (lambda m: logit_lens(m, []), "no prompt"),
        (lambda m: logit_lens(m, TEXTS, positions="each"), "prompts of one length"),
        (lambda m: logit_lens(m, TEXTS, positions={"a": [1, 2]}), "got 2 of .* for 3 examples"),
        (lambda m: logit_lens(m, TEXTS, positions={}), "no role"),
        (lambda m: logit_lens(m, TEXTS, track={"a": ["w1"] * 2}), "one spelling for each of 3"),
        (lambda m: logit_lens(m, TEXT, track={"a": [90]}), "outside the vocabulary"),
        (lambda m: logit_lens(m, TEXT, track={"a": []}), "no spelling"),
        (lambda m: logit_lens(m, TEXT, track={"a": " "}), "empty answer"),
        (lambda m: logit_lens(m, TEXT, positions="w66"), "does not occur"),
        (lambda m: logit_lens(m, TEXT, positions=6), "out of range"),
        (lambda m: logit_lens(m, TEXT, positions={"a": [[2, 3]]}), r"is an index, .*got \[2, 3\]"),
        (lambda m: logit_lens(m, TEXT, positions="all"), "use positions='each'"),
        (lambda m: logit_lens(m, TEXT, lens="tuned"), "unknown lens 'tuned'"),
        (lambda m: logit_lens(m, TEXT, kind="blocks.1.hook_mlp_out", layers=1), "names its layer"),
        (lambda m: token_map(m, TEXT, top_k=91), "top_k is 91; expected 0..90"),
        (lambda m: read_vectors(m, torch.zeros(2, 31)), r"\[vector, 32\]"),
        (lambda m: read_vectors(m, torch.zeros(2, 32), track={"a": 90}), "outside"),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tiny())


def test_a_quantised_unembedding_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "W_U", torch.zeros(32, 90, dtype=torch.int8))
    with pytest.raises(ValueError, match="unembedding is stored as torch.int8"):
        logit_lens(tiny, TEXT)


def test_a_missing_span_is_a_token_error(load_tiny):
    with pytest.raises(TokenError):
        logit_lens(load_tiny(), TEXT, positions="w66")


def test_one_name_or_token_for_all_prompts(tiny):
    named = {"text": "w1", "id": 7}
    each = {"text": ["w1"] * 3, "id": [[7]] * 3}
    found, expected = (logit_lens(tiny, TEXTS, track=track)["logprob"] for track in (named, each))
    assert np.array_equal(found, expected)
    apart = logit_lens(tiny, TEXTS, track={"id": [7, 8, 9]})["logprob"]
    assert np.array_equal(apart[0], expected.sel(tracked=["id"])[0])


def test_a_cache_of_other_prompts_is_refused(tiny):
    _, cache = tiny.run_with_cache(torch.tensor([encode(tiny, TEXT).ids]))
    logit_lens(tiny, TEXT, cache=cache)
    words = TEXT.split()
    with pytest.raises(ValueError, match="cache is of other prompts: position 2"):
        logit_lens(tiny, " ".join([words[0], "w77", *words[2:]]), cache=cache)
    noise = [("hook_embed", lambda x, hook: x + 0.1 * torch.ones_like(x))]
    with tiny.hooks(fwd_hooks=noise):
        _, cache = tiny.run_with_cache(torch.tensor([encode(tiny, TEXT).ids]))
    logit_lens(tiny, TEXT, cache=cache)  # changed by a hook, but of these tokens
