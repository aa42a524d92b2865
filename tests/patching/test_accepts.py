"""What people hold is accepted: tokens, caches, hook names, metrics of full logits, hooks of their own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mi_hops.lens import TunedLens, evaluate_lens, logit_lens, read_head
from mi_hops.model import hooked_class
from mi_hops.patching import PatchJob, ablate, attribute, patch, path_patch, trace
from mi_hops.sweep import FullLogits, Intervention, Limits, Pairs, Site, Sites, Target, scale
from mi_hops.text.tokens import Prompt, TokenError, encode
from tests.patching.loops import ALL, ANSWERS, CLEAN, CORRUPTED, ONE, PAIRS, SCORE, changed, run


def ids(model, texts):
    return torch.tensor([encode(model, text).ids for text in texts])


def first_ids(model, answers):
    return torch.tensor([encode(model, text).ids[-1] for text in answers])


def same(found, expected, names=("score", "change", "effect", "clean", "corrupted")):
    for name in names:
        assert np.allclose(found[name], expected[name], atol=1e-5, equal_nan=True), name
    return True


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda own: [1, *own], "begin with BOS or have padding"),
        (lambda own: [*own, 0, 0], "begin with BOS or have padding"),
        (lambda own: [-100], "not all in the vocabulary, 0.."),
        (lambda own: [10**6], "not all in the vocabulary"),
    ],
)
def test_answer_tokens_that_are_none_are_refused(load_tiny, answer, message):
    model = load_tiny("llama")
    assert (model.tokenizer.bos_token_id, model.tokenizer.pad_token_id) == (1, 0)
    own = first_ids(model, ["w11"]).tolist()
    pairs = Pairs(CLEAN[0], CORRUPTED[0], answer=torch.tensor(answer(own)), wrong="w21")
    with pytest.raises(ValueError, match=message):
        patch(model, pairs, "attn_out")
    with pytest.raises(ValueError, match="token ids are 0 or more"):
        Target((-1,))


def test_heads_that_got_their_own_copies_are_counted(load_tiny):
    """TransformerLens's option to ungroup grouped-query attention."""
    if hooked_class() is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = load_tiny("llama", "hooked", fresh=True)
    model.set_ungroup_grouped_query_attention(True)
    pairs = Pairs(CLEAN[0], CORRUPTED[0], answer="w11", wrong="w21")
    n = model.cfg.n_heads
    found = patch(model, pairs, Sites("v", layers=[0]), metric="logit_diff")
    assert found["score"].dims == ("example", "layer", "head") and found["score"].shape[-1] == n
    tokens = ids(model, [CLEAN[0], CORRUPTED[0]])
    _, cache = model.run_with_cache(tokens[:1], names_filter="blocks.0.attn.hook_v")
    right, wrong = first_ids(model, ["w11", "w21"]).tolist()
    for head in range(n):

        def put(x, hook, head=head):
            x[:, :, head] = cache["blocks.0.attn.hook_v"][:, :, head]
            return x

        with torch.no_grad():
            logits = model.run_with_hooks(tokens[1:], fwd_hooks=[("blocks.0.attn.hook_v", put)])
        score = (logits[0, -1, right] - logits[0, -1, wrong]).item()
        assert found["score"].values[0, 0, head] == pytest.approx(score, abs=1e-4)


@pytest.mark.slow_case("llama-bridge")
def test_token_ids(tiny):
    expected = patch(tiny, changed(ALL, answer="w11", wrong="w21"), "attn_out")
    right, wrong = first_ids(tiny, ["w11", "w21"]).tolist()
    sides = ids(tiny, CLEAN), ids(tiny, CORRUPTED)
    for clean, corrupted in (
        sides,
        (list(sides[0]), [Prompt.from_tokens(tiny, row) for row in sides[1]]),
    ):
        found = patch(tiny, Pairs(clean, corrupted, answer=right, wrong=wrong), "attn_out")
        assert same(found, expected)
    each = Pairs(*sides, answer=torch.tensor([right] * 3), wrong=[Target((wrong,)).answer[0]] * 3)
    assert same(patch(tiny, each, "attn_out"), expected)
    one = patch(tiny, (sides[0][0], sides[1][0]), metric=lambda x: x[:, right] - x[:, wrong])
    assert same(one, patch(tiny, ONE))
    # Whatever takes pairs takes them.
    assert attribute(tiny, each, "attn_out")["change"].shape == expected["change"].shape
    assert same(path_patch(tiny, each), path_patch(tiny, changed(ALL, answer="w11", wrong="w21")))
    alone = Pairs(sides[0], answer=right, wrong=wrong)
    texts = Pairs(CLEAN, answer="w11", wrong="w21")
    assert np.allclose(ablate(tiny, alone)["score"], ablate(tiny, texts)["score"], atol=1e-5)
    noise = {"samples": 1, "sites": Sites("resid_post", layers=1)}
    traced = [trace(tiny, pairs, slice(2, 4), **noise)["score"] for pairs in (alone, texts)]
    assert np.allclose(*traced, atol=1e-5)


def test_columns_of_a_frame(tiny):
    frame = pd.DataFrame({"clean": CLEAN, "corrupted": CORRUPTED, "answer": ANSWERS})
    pairs = Pairs(frame["clean"], frame["corrupted"], answer=frame["answer"])
    found = patch(tiny, pairs, metric="answer_logprob")
    assert same(found, patch(tiny, ALL, metric="answer_logprob"))


def count_rows(model, call):
    """How many prompts enter block 0 while `call` runs."""
    rows = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda _, given, named: rows.append(next(iter([*given, *named.values()])).shape[0]),
        with_kwargs=True,
    )
    try:
        return call(), rows
    finally:
        handle.remove()


@pytest.mark.slow_case("llama-bridge")
@pytest.mark.parametrize("kind", ["resid_mid", "z", "pattern", "mlp_post"])
def test_a_cache_stands_for_the_clean_run(tiny, kind):
    clean, corrupted = ids(tiny, CLEAN), ids(tiny, CORRUPTED)
    expected = patch(tiny, changed(ALL, answer="w11", wrong="w21"), Sites(kind, positions="each"))
    with torch.no_grad():
        _, cache = tiny.run_with_cache(clean, return_type="logits")
    scored = {"answer": "w11", "wrong": "w21"}
    sites, limits = Sites(kind, positions="each"), Limits(reuse_prefix=False)
    for pairs in (Pairs(cache, corrupted, **scored), Pairs(cache, CORRUPTED, **scored)):
        found, rows = count_rows(tiny, lambda pairs=pairs: patch(tiny, pairs, sites, limits=limits))
        assert rows == [3]  # the corrupted prompts alone
        assert same(found, expected)
        assert found.provenance["given_activations"]
    beside = Pairs(clean, corrupted, source=cache, **scored)
    assert same(patch(tiny, beside, sites), expected)
    estimate = attribute(tiny, beside, kind)["change"]
    assert np.allclose(
        estimate, attribute(tiny, (changed(ALL, **scored)), kind)["change"], atol=1e-5
    )
    back = patch(tiny, beside, sites, direction="noise")  # given activations into the clean run
    assert np.allclose(back["change"], 0, atol=1e-5)


def test_activations_as_a_mapping(tiny):
    """One vector of one's own per block is enough; without the last stream no effect is known."""
    name = "blocks.1.hook_mlp_out"
    torch.manual_seed(0)
    own = torch.randn(7, tiny.cfg.d_model)
    pairs = Pairs({name: own}, CORRUPTED[0], answer="w11", wrong="w21")
    found = patch(tiny, pairs, name)
    assert set(found.data.data_vars) == {"score", "change", "corrupted"}
    assert found.main == "score"
    for pos in (2, 6):

        def put(x, pos=pos):
            x = x.clone()
            x[0, pos] = own[pos]
            return x

        expected = run(tiny, CORRUPTED[0], [(name, put)], **SCORE)
        assert float(found["score"][0, 0, pos]) == pytest.approx(expected, abs=1e-5)
    assert PatchJob(tiny, pairs, name).plan().forwards == len(
        count_rows(tiny, lambda: patch(tiny, pairs, name))[1]
    )


def test_activations_that_do_not_fit_are_refused(tiny):
    given = {"blocks.1.hook_mlp_out": torch.zeros(2, 5, tiny.cfg.d_model)}
    for pairs, options, message in (
        (Pairs(given, CORRUPTED), {}, "lack 'blocks.0.hook_mlp_out'"),
        (Pairs(given, CORRUPTED), {"sites": Sites("mlp_out", layers=1)}, r"1 or 3 rows"),
        (Pairs(given, CORRUPTED), {"direction": "noise"}, "nothing can be put into it"),
        (Pairs(given, CORRUPTED), {"metric": "kl", "sites": Sites("mlp_out", layers=1)}, "1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(tiny, pairs, **{"sites": "mlp_out", "metric": lambda x: x[:, 0], **options})
    with pytest.raises(ValueError, match="come with the corrupted prompts"):
        Pairs(given)
    with pytest.raises(ValueError, match="activations stand for the clean run"):
        Pairs(CLEAN, given)
    fits = {"blocks.1.hook_mlp_out": torch.zeros(7, tiny.cfg.d_model)}
    with pytest.raises(ValueError, match="not activations"):
        attribute(tiny, changed(ONE, source=fits), Sites("mlp_out", layers=1), method="atp*")
    with pytest.raises(ValueError, match="no other source of activations"):
        path_patch(tiny, changed(ONE, source=given))
    with pytest.raises(ValueError, match="cannot be selected"):
        Pairs(given, CORRUPTED).select([0])


def test_rows_that_are_padded_are_refused(tiny):
    one, two = (encode(tiny, text).ids for text in ("w1 w2 w3", "w4 w5"))
    pad = tiny.tokenizer.pad_token_id
    right = torch.tensor([[*one], [*two, pad]])
    left = torch.tensor([[*one], [pad, *two]])
    for padded in (right, left):
        with pytest.raises(TokenError, match=rf"begin or end with the padding token \({pad}\)"):
            logit_lens(tiny, padded)
    rows = [torch.tensor(one), torch.tensor(two)]
    tracked = {"track": {"a": ["w9", "w9"]}}
    found, texts = (logit_lens(tiny, given, **tracked) for given in (rows, ["w1 w2 w3", "w4 w5"]))
    assert np.allclose(found["logprob"], texts["logprob"], atol=1e-5)
    logit_lens(tiny, Prompt.from_tokens(tiny, right[1]))  # as they are


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series])
def test_pairs_are_selected_by_mask_number_or_slice(kind):
    pairs = Pairs(CLEAN, CORRUPTED, answer=ANSWERS)
    assert pairs.select(kind([True, False, True])).clean == [CLEAN[0], CLEAN[2]]
    assert pairs.select(kind([2, 0])).answer == [ANSWERS[2], ANSWERS[0]]
    assert pairs.select(slice(1, None)).labels == [1, 2]
    for mask in ([True, False], [True] * 4):
        with pytest.raises(ValueError, match=rf"a mask of {len(mask)} for 3 pairs"):
            pairs.select(kind(mask))
    with pytest.raises(IndexError):
        pairs.select(kind([3]))


def test_numpy_texts_are_texts():
    assert Pairs(np.array(CLEAN), np.array(CORRUPTED)).clean == list(CLEAN)


def test_hook_names_are_kinds(tiny):
    from transformer_lens.utilities import get_act_name

    expected = patch(tiny, ONE, Sites("resid_pre", layers=[1]))
    for sites in ("blocks.1.hook_resid_pre", get_act_name("resid_pre", 1), Sites(layers=1)):
        found = patch(tiny, ONE, sites)
        assert found["score"].dims == expected["score"].dims
        assert same(found, expected)
    names = [get_act_name("post", layer) for layer in (0, 2)]
    assert same(patch(tiny, ONE, names), patch(tiny, ONE, Sites("mlp_post", layers=[0, 2])))
    kinds = patch(tiny, ONE, [get_act_name(kind, 2) for kind in ("attn_out", "mlp_out")])
    assert list(kinds["kind"].values) == ["attn_out", "mlp_out"]
    assert same(patch(tiny, ONE, get_act_name("k")), patch(tiny, ONE, "k"))
    for given, message in (
        ("blocks.1.hook_nothing", "cannot act on"),
        (["blocks.0.attn.hook_z"] * 2 + ["blocks.1.attn.hook_q"] * 2, "name their layers"),
        (["blocks.1.hook_resid_pre", "z"], "name their layers"),
        (["blocks.1.hook_resid_pre", "blocks.0.hook_attn_out"], "name their layers"),
    ):
        with pytest.raises(ValueError, match=message):
            Sites(given)
    with pytest.raises(ValueError, match="name their layers"):
        Sites("blocks.1.hook_resid_pre", layers=1)
    assert len(repr(Sites(positions={"here": list(range(1000))}))) < 2000


def test_result_is_what_heads_write(load_tiny):
    """The same change as of z, without use_attn_result; there it is TransformerLens's own hook."""
    if hooked_class() is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = load_tiny("gpt2", "hooked", fresh=True)
    found = patch(model, ONE, Sites("result", positions=[3]))
    assert found.provenance["kinds"] == ["result"]
    model.set_use_attn_result(True)
    name = "blocks.1.attn.hook_result"
    _, cache = model.run_with_cache(ids(model, CLEAN[:1]))
    for head in range(4):

        def put(x, head=head):
            x = x.clone()
            x[:, 3, head] = cache[name][:, 3, head]
            return x

        expected = run(model, CORRUPTED[0], [(name, put)], **SCORE)
        got = float(found["score"].sel(layer=1, head=head)[0, 0])
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("call", [patch, attribute])
def test_metrics_of_full_logits(tiny, call):
    right, wrong = first_ids(tiny, ["w11", "w21"]).tolist()

    def difference(logits):
        return logits[0, -1, right] - logits[0, -1, wrong]

    def early(logits):  # what an early token predicts
        return logits[:, 3, right] - logits[:, 3, wrong]

    found = call(tiny, ONE, "mlp_out", metric=FullLogits(difference))
    assert found.provenance["metrics"] == ["difference"]
    assert np.allclose(found["change"], call(tiny, ONE, "mlp_out")["change"], atol=1e-5)
    before = call(tiny, ONE, "mlp_out", metric=FullLogits(early))["change"]
    cut = changed(ONE, clean="w1 w7 w8", corrupted="w1 w40 w8")
    assert np.allclose(before[..., :4], call(tiny, cut, "mlp_out")["change"], atol=1e-5)
    assert np.allclose(before[..., 4:], 0, atol=1e-6)


def test_full_logits_are_those_of_the_prompt(tiny):
    """Not of its padding, nor of answer tokens that another metric appends."""
    shapes = set()

    def watch(logits):
        shapes.add(tuple(logits.shape[:2]))
        return logits[0, -1, 5]

    uneven = Pairs(["w1 w2", CLEAN[0]], ["w3 w2", CORRUPTED[0]], answer="w11 w12")
    sites, metric = Sites("mlp_out", positions={"last": -1}), [FullLogits(watch), "answer_logprob"]
    found = patch(tiny, uneven, sites, metric=metric)
    assert shapes == {(1, 3), (1, 7)}
    alone = patch(tiny, uneven.select([0]), sites, metric=FullLogits(watch))
    assert np.allclose(found["score"][0].sel(metric="watch"), alone["score"][0], atol=1e-5)


@pytest.mark.slow_case("gpt2-hooked")
@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out", "z"])
@pytest.mark.parametrize(("shape", "backend"), [("gpt2", "hooked"), ("llama", "bridge")])
def test_a_permanent_hook_is_kept_and_acts(load_tiny, kind, shape, backend):
    """Also one that looks at a position, and lies right behind what is patched."""
    model = load_tiny(shape, backend, fresh=True)
    plain = patch(model, ONE, kind)["score"]

    def steer(x, hook):
        x = x.clone()
        x[:, 4] += 0.5 * x[:, 2].tanh()
        return x

    names = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out"]
    for name in names:
        model.add_hook(name, steer, is_permanent=True)
    sites = Sites(kind, positions="each")
    found = patch(model, ONE, sites, limits=Limits(max_rows=20))
    assert sum(len(p.fwd_hooks) for p in set(model.hook_dict.values())) == len(names)
    assert len(found.provenance["permanent_hooks"]) == len(names)
    tokens = [ids(model, [text]) for text in PAIRS[0]]
    name = {"z": "attn.hook_z"}.get(kind, f"hook_{kind}")
    right, wrong = first_ids(model, ["w11", "w21"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[0])
        for layer, pos in ((0, 4), (1, 2), (1, 6), (2, 4)):
            hook = f"blocks.{layer}.{name}"

            where = (0, pos, 1) if kind == "z" else (0, pos)

            def put(x, hook, where=where, value=cache[hook][where]):
                x = x.clone()
                x[where] = value
                return x

            logits = model.run_with_hooks(tokens[1], fwd_hooks=[(hook, put)])[0, -1]
            at = found["score"].sel(layer=layer, position=pos)[0]
            got = float(at.sel(head=1)) if kind == "z" else float(at)
            assert got == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-5)
    assert not np.allclose(plain, patch(model, ONE, kind)["score"], atol=1e-3)
    model.reset_hooks(including_permanent=True)
    assert np.allclose(plain, patch(model, ONE, kind)["score"], atol=1e-5)


def test_numbers_of_numpy(load_tiny):
    """As arg max and arange give them."""
    model, one, two = load_tiny(), np.int64(1), np.int64(2)
    token = first_ids(model, ["w11"])[0].item()
    sites = [
        (Sites("z", layers=one, positions=two, heads=two), Sites("z", 1, 2, 2)),
        (Sites("z", np.array([0, 2]), heads=np.array([1])), Sites("z", [0, 2], heads=[1])),
        (Sites(positions=np.arange(1, 3)), Sites(positions=[1, 2])),
        (Sites(positions={"there": np.array([2])}), Sites(positions={"there": [2]})),
        (Sites("mlp_post", layers=one, neurons=two), Sites("mlp_post", 1, neurons=2)),
    ]
    for given, meant in sites:
        found = patch(model, changed(ONE, answer=np.int64(token)), given)
        expected = patch(model, changed(ONE, answer=token), meant)
        assert same(found, expected)
        for dim in expected["score"].dims:
            labels = [each[dim].values.tolist() for each in (found, expected)]
            assert labels[0] == labels[1], dim
    assert Intervention.at("z", one, scale(0.0)).sites == (Site("z", 1),)
    for layers in (one, np.array([1])):
        assert logit_lens(model, CLEAN[0], layers=layers)["layer"].values.tolist() == [1]
        lens = TunedLens(model, layers=layers, rank=2)
        assert evaluate_lens(model, lens, CLEAN, layers=layers)["layer"].values.tolist() == [1]
    read = read_head(model, (one, two), np.int64(token), top=2)
    assert np.array_equal(read["score"], read_head(model, "L1H2", token, top=2)["score"])


def test_representations_are_short(tiny):
    many = Pairs([f"w{i % 60} w2" for i in range(3000)], "w61 w2", answer="w3")
    for thing in (many, Sites("z", layers=list(range(2000))), PatchJob(tiny, ONE)):
        assert len(repr(thing)) < 1000


def test_padding_is_not_read_where_attention_is_not_causal(load_tiny, monkeypatch):
    model = load_tiny("gpt2", "hooked")
    monkeypatch.setattr(model.cfg, "attention_dir", "bidirectional")
    logit_lens(model, ["w1 w2", "w3 w4"])
    with pytest.raises(TokenError, match="attention is not causal"):
        logit_lens(model, ["w1 w2", "w3 w4 w5"])
