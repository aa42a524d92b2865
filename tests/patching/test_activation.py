"""Patching and ablation against one forward pass per cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.model import forward, hook_name, n_heads_of
from mi_hops.patching import PatchJob, ablate, patch
from mi_hops.patching.core import taken
from mi_hops.sweep import FullLogits, Limits, Pairs, Sites
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.sweep.passes import row_bytes
from mi_hops.sweep.sites import Cell
from mi_hops.text.tokens import TokenError, encode
from tests.patching.loops import (
    ALL,
    ANSWERS,
    CLEAN,
    CORRUPTED,
    ONE,
    PAIRS,
    SCORE,
    WRONGS,
    changed,
    put,
    run,
    source,
)

N = 7  # tokens, BOS included
ALONE = changed(ONE, corrupted=None)


@pytest.mark.slow_case(
    "llama-bridge-denoise-mlp",
    "llama-bridge-denoise-attn_out",
    "llama-bridge-denoise-resid_post",
    "gpt2-hooked-denoise-resid_mid",
)
@pytest.mark.parametrize("kind", [k for k, axis in HEAD_AXIS.items() if axis is None])
@pytest.mark.parametrize("direction", ["denoise", pytest.param("noise", marks=pytest.mark.slow)])
def test_layer_by_position_equals_the_loop(tiny, kind, direction):
    result = patch(tiny, ALL, kind, direction=direction)
    assert result["effect"].dims == ("example", "layer", "position")
    score, change, effect = (result[name].values for name in ("score", "change", "effect"))
    origins, bases = (CLEAN, CORRUPTED) if direction == "denoise" else (CORRUPTED, CLEAN)
    for i in range(len(PAIRS)):
        scores = {"answer": ANSWERS[i], "wrong": WRONGS[i]}
        clean, corrupted = run(tiny, CLEAN[i], **scores), run(tiny, CORRUPTED[i], **scores)
        base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        assert result["clean"].values[i] == pytest.approx(clean, abs=1e-5)
        assert result["corrupted"].values[i] == pytest.approx(corrupted, abs=1e-5)
        for layer in range(3) if direction == "denoise" else [1]:
            value = source(tiny, origins[i], kind, layer)
            for pos in range(N):
                found = run(tiny, bases[i], [put(kind, layer, value, [pos])], **scores)
                at = i, layer, pos
                assert score[at] == pytest.approx(found, abs=1e-5)
                assert change[at] == pytest.approx(found - base, abs=1e-5)
                expected = (found - base) / (other - base)
                assert effect[at] == pytest.approx(expected, abs=1e-4, rel=1e-4)


@pytest.mark.slow_case("llama-bridge")
@pytest.mark.parametrize("kind", [k for k, axis in HEAD_AXIS.items() if axis is not None])
def test_heads_equal_the_loop(tiny, kind):
    """Each head at all positions, and head by position, with a metric of the whole answer."""
    whole = patch(tiny, ALL, kind, metric="answer_logprob")
    spots = patch(tiny, ALL, Sites(kind, layers=1, positions="each"), metric="answer_logprob")
    n_heads = n_heads_of(tiny, kind)
    dim = "kv_head" if n_heads == 2 else "head"
    assert whole["score"].dims == ("example", "layer", dim)
    assert spots["score"].sizes[dim] == n_heads
    for i in range(len(PAIRS)):
        scores = {"answer": ANSWERS[i], "wrong": WRONGS[i], "metric": "answer_logprob"}
        for layer in range(3):
            value = source(tiny, CLEAN[i], kind, layer)
            for head in range(n_heads):
                hook = put(kind, layer, value, range(N), head)
                found = run(tiny, CORRUPTED[i], [hook], **scores)
                got = float(whole["score"][i, layer, head])
                assert got == pytest.approx(found, abs=1e-5)
        value = source(tiny, CLEAN[i], kind, 1)
        for pos in range(N):
            for head in range(n_heads):
                found = run(tiny, CORRUPTED[i], [put(kind, 1, value, [pos], head)], **scores)
                got = float(spots["score"].sel(example=i, position=pos, layer=1)[head])
                assert got == pytest.approx(found, abs=1e-5)


def test_all_heads_at_once_and_several_kinds(tiny):
    result = patch(tiny, ALL, Sites(["q", "k", "v", "z"], positions="each", heads="all"))
    assert result["effect"].dims == ("example", "kind", "layer", "position")
    value = source(tiny, CLEAN[1], "v", 2)
    found = run(tiny, CORRUPTED[1], [put("v", 2, value, [4])], answer=ANSWERS[1], wrong=WRONGS[1])
    got = float(result["score"].sel(example=1, kind="v", layer=2, position=4))
    assert got == pytest.approx(found, abs=1e-5)


def test_window_patches_blocks_together(tiny):
    result = patch(tiny, ONE, Sites("mlp_out", window=2))
    values = [source(tiny, CLEAN[0], "mlp_out", layer) for layer in range(3)]
    for layer, blocks in enumerate([(0,), (0, 1), (1, 2)]):
        hooks = [put("mlp_out", b, values[b], [4]) for b in blocks]
        found = run(tiny, CORRUPTED[0], hooks, **SCORE)
        assert float(result["score"][0, layer, 4]) == pytest.approx(found, abs=1e-5)


def test_single_neurons(tiny):
    neurons = [0, 5, 31]
    result = patch(tiny, ONE, Sites("mlp_post", layers=[1], positions=3, neurons=neurons))
    assert result["score"].dims == ("example", "layer", "neuron")
    value = source(tiny, CLEAN[0], "mlp_post", 1)
    for j, neuron in enumerate(neurons):
        hook = put("mlp_post", 1, value, [3], neuron=neuron)
        found = run(tiny, CORRUPTED[0], [hook], **SCORE)
        assert float(result["score"][0, 0, j]) == pytest.approx(found, abs=1e-5)


def test_cells_hold_no_more_than_they_need():
    """A view would keep all heads, positions or neurons in memory for each cell."""
    z, hidden, pattern = torch.randn(7, 4, 8), torch.randn(7, 48), torch.randn(4, 9, 9)
    for activation, cell, expected in (
        (z, Cell("z", (0,), 0, head=2), z[[3, 4], 2]),
        (z, Cell("z", (0,), 0), z[[3, 4]]),
        (hidden, Cell("mlp_post", (0,), 0, neuron=5), hidden[[3, 4], 5]),
        (hidden, Cell("mlp_post", (0,), 0), hidden[[3, 4]]),
        (pattern, Cell("pattern", (0,), 0, head=1), pattern[1, [3, 4], :7]),
    ):
        found = taken(activation, cell, (3, 4), 7)
        assert torch.equal(found, expected)
        assert found.untyped_storage().nbytes() == expected.numel() * 4


def test_unequal_prompts_by_role(tiny):
    """A pair of unequal lengths, patched from one place to another, in one batch with others."""
    clean = ["w5 w6 w7", "w1 w7 w8 w9 w30 w31"]
    corrupted = ["w9 w8 w5 w2 w1 w6", "w1 w40 w8 w12"]
    roles = {"subject": [("w6", "w5"), ("w8 w9", "w8 w12")], "last": -1, "from the end": (-2, -3)}
    result = patch(
        tiny,
        Pairs(clean, corrupted, answer=["w11 w12", "w13"]),
        Sites(["attn_out", "resid_post"], positions=roles),
        metric="answer_logprob",
    )
    assert list(result["position"].values) == ["subject", "last", "from the end"]
    takes = {
        0: {"subject": [2], "last": [3], "from the end": [2]},
        1: {"subject": [3, 4], "last": [6], "from the end": [5]},
    }
    puts = {
        0: {"subject": [3], "last": [6], "from the end": [4]},
        1: {"subject": [3, 4], "last": [4], "from the end": [2]},
    }
    for i, answer in enumerate(["w11 w12", "w13"]):
        for kind in ("attn_out", "resid_post"):
            for layer in range(3):
                value = source(tiny, clean[i], kind, layer)
                for role in roles:
                    hook = put(kind, layer, value, puts[i][role], take=takes[i][role])
                    found = run(tiny, corrupted[i], [hook], answer=answer, metric="answer_logprob")
                    at = {"example": i, "kind": kind, "layer": layer, "position": role}
                    assert float(result["score"].sel(at)) == pytest.approx(found, abs=1e-5)


def test_third_source(tiny):
    third = "w70 w71 w72 w73 w74 w75"
    result = patch(tiny, changed(ALL, source=third), "resid_mid")
    value = source(tiny, third, "resid_mid", 1)
    for i in range(len(PAIRS)):
        hook = put("resid_mid", 1, value, [2])
        found = run(tiny, CORRUPTED[i], [hook], answer=ANSWERS[i], wrong=WRONGS[i])
        assert float(result["score"][i, 1, 2]) == pytest.approx(found, abs=1e-5)


def test_several_metrics_in_one_sweep(tiny):
    def margin(logits):
        return logits.max(-1).values - logits.mean(-1)

    names = ["logit_diff", "answer_logprob", "greedy", "rank", "kl", "margin"]
    result = patch(tiny, ALL, "attn_out", metric=[margin if n == "margin" else n for n in names])
    assert result["score"].dims == ("example", "layer", "position", "metric")
    assert np.isnan(result["effect"].sel(metric="greedy")).all()  # no model gives any answer
    with pytest.raises(ValueError, match="score the same in all 3 pairs"):
        patch(tiny, ALL, "attn_out", metric="greedy")
    for name in set(names) - {"greedy"}:
        alone = patch(tiny, ALL, "attn_out", metric=margin if name == "margin" else name)
        together = result.sel(metric=name)
        assert np.allclose(together["score"], alone["score"], atol=1e-5), name
        # Not the effect: over a small difference of the runs it magnifies rounding.
        assert np.allclose(together["change"], alone["change"], atol=1e-5), name
        assert np.allclose(together["clean"], alone["clean"], atol=1e-5), name
    tokens = [torch.tensor([encode(tiny, t).ids]) for t in (CLEAN[0], CORRUPTED[0])]
    p, q = (forward(tiny, t)[0, -1].log_softmax(-1) for t in tokens)
    kl = float((p.exp() * (p - q)).sum())
    assert float(result["corrupted"].sel(metric="kl")[0]) == pytest.approx(kl, abs=1e-5)
    assert float(result["clean"].sel(metric="kl")[0]) == pytest.approx(0, abs=1e-6)


def test_patching_everything_restores_everything(tiny):
    """The stream at block 0 decides all; patching it at all positions is the other run."""
    result = patch(tiny, ALL, Sites("resid_pre", positions="all"))
    assert np.allclose(result["effect"][:, 0], 1, atol=1e-4)


@pytest.mark.slow_case("llama-bridge")
def test_any_batching_gives_the_same(tiny):
    kinds = ["attn_out", "mlp_out"]
    full = patch(tiny, ALL, kinds)
    for chunks in ({"batch_size": 1}, {"batch_size": 2, "max_rows": 5}, {"memory": 1e5}):
        part = patch(tiny, ALL, kinds, limits=Limits(**chunks))
        assert np.allclose(full["score"], part["score"], atol=1e-5), chunks


def test_out_of_memory_halves_the_pass_and_goes_on(tiny):
    expected = patch(tiny, ALL, "mlp_out")["score"]
    widths = []

    def scarce(module, arguments):
        rows = next(a for a in arguments if isinstance(a, torch.Tensor)).shape[0]
        widths.append(rows)
        if rows > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = tiny.blocks[2].register_forward_pre_hook(scarce)
    try:
        found = patch(tiny, ALL, "mlp_out")["score"]
    finally:
        handle.remove()
    assert max(widths) > 12
    assert np.allclose(found, expected, atol=1e-5)
    assert not any(h.fwd_hooks for h in tiny.hook_dict.values())


def test_equals_transformer_lens(load_tiny):
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos, get_act_patch_mlp_out

    model = load_tiny("gpt2", "bridge")
    tokens = [torch.tensor([encode(model, t).ids]) for t in PAIRS[0]]
    _, cache = model.run_with_cache(tokens[0], return_type="logits")
    right, wrong = (encode(model, w).ids[-1] for w in ("w11", "w21"))

    def metric(logits):
        return logits[0, -1, right] - logits[0, -1, wrong]

    for kind, theirs in (
        ("mlp_out", get_act_patch_mlp_out),
        ("z", get_act_patch_attn_head_out_all_pos),
    ):
        grid = theirs(model, tokens[1], cache, metric)
        ours = patch(model, ONE, kind)
        assert np.allclose(ours["score"][0], grid.cpu(), atol=1e-5), kind


def test_labels_and_plot(tiny):
    result = patch(tiny, changed(ONE, labels=["first"]))
    assert list(result["token"].values[0]) == list(encode(tiny, PAIRS[0][1]).labels)
    assert list(result["example"].values) == ["first"]
    assert result.provenance["method"] == "activation patching"
    figure = result.plot()
    assert figure.data[0].z.shape == (3, N)
    assert list(figure.layout.xaxis.ticktext)[1:] == [
        f"{token} {i}" for i, token in enumerate(PAIRS[0][1].split(), 1)
    ]


@pytest.mark.parametrize(
    ("pairs", "more"),
    [
        (ALL, {}),
        (changed(ALL, source=CLEAN[0]), {}),
        (ALL, {"metric": ["kl", "answer_logprob"], "direction": "noise"}),
    ],
)
def test_plan_tells_what_runs(tiny, pairs, more):
    sites, limits = Sites("z", positions="each"), Limits(batch_size=2, max_rows=50)
    job = PatchJob(tiny, pairs, sites, limits=limits, **more)
    plain, calls, widths = job.plan(), [], []

    def count(module, arguments, output):
        widths.append((output if isinstance(output, torch.Tensor) else output[0]).shape[0])

    handles = [
        tiny.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1)),
        tiny.blocks[2].register_forward_hook(count),
    ]
    try:
        plan = (
            job.plan()
        )  # these hooks see no padding and no other metric's tokens, which takes more passes
        job.run()
    finally:
        for handle in handles:
            handle.remove()
    assert "forwards" in plan._repr_html_()
    assert len(repr(job)) < 2000
    assert plan.cells == 3 * N * 4
    assert plain.rows == plan.cells * 3 <= plan.rows and plain.forwards <= plan.forwards
    assert plan.widest <= 50
    assert plan.bytes == plan.activation_bytes + plan.pass_bytes + plan.weight_bytes > 0
    held = 2 * 3 * N * 4 * tiny.cfg.d_head * 4  # pairs, layers, tokens, heads, width, bytes
    assert plan.activation_bytes == held
    assert len(calls) == plan.forwards
    assert plan.pass_bytes >= max(widths) * row_bytes(tiny, N, 1)


def test_ablation_beside_the_intact_run(tiny):
    """Change and effect, against corrupted prompts and against a score of 0."""
    metric = ["logit_diff", "answer_logprob", "kl"]
    intact = changed(ALL, corrupted=None)
    # What one has to lose, the other lacks.
    for asked in (changed(intact, answer=WRONGS, wrong=ANSWERS), intact):
        result = ablate(tiny, asked, metric=metric)
        before, score = (result[name].sel(metric="logit_diff") for name in ("intact", "score"))
        share = (1 - score / before).where(before > 0)
        if (before <= 0).all():
            assert "effect" not in result.data
        else:
            effect = result["effect"].sel(metric="logit_diff")
            assert np.allclose(effect, share, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert np.allclose(result["change"], result["score"] - result["intact"], atol=1e-6)
    if "effect" in result.data:
        assert np.isnan(result["effect"].sel(metric=["answer_logprob", "kl"])).all()
    assert "corrupted" not in result.data
    assert "effect" not in ablate(tiny, intact, metric="answer_logprob").data
    beside = ablate(tiny, ALL, metric=metric)
    noised = patch(tiny, ALL, "attn_out", direction="noise", metric=metric)
    assert np.allclose(beside["intact"], noised["clean"], atol=1e-5)
    assert np.allclose(beside["corrupted"], noised["corrupted"], atol=1e-5)
    gap = beside["intact"] - beside["corrupted"]
    assert np.allclose(beside["effect"] * gap, -beside["change"], atol=1e-5)
    assert beside["effect"].attrs["units"] == "share lost"
    assert np.array_equal(beside["change"], result["change"])
    alone = ablate(tiny, changed(ALL, corrupted=CORRUPTED[0]), metric=metric)
    assert len(np.unique(alone["corrupted"].sel(metric="logit_diff"))) == 3  # by their own answers


def test_resampling_is_seeded_and_takes_from_a_reference(tiny):
    reference = [" ".join(f"w{7 * i + j}" for j in range(6)) for i in range(5)]
    options = {"how": "resample", "reference": reference}
    asked = changed(ALL, corrupted=None)
    state = torch.get_rng_state()
    one, two = (ablate(tiny, asked, seed=3, **options)["score"] for _ in range(2))
    other = ablate(tiny, asked, seed=4, **options)["score"]
    assert np.array_equal(one, two)
    assert not np.allclose(one, other)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="as many other prompts"):
        ablate(tiny, ALONE, how="resample")


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
def test_ablated_neurons(tiny, how):
    reference = {} if how == "zero" else {"reference": CLEAN[1:2]}
    sites = Sites("mlp_post", layers=[2], neurons=[3, 30], positions=-1)
    result = ablate(tiny, ALONE, sites, how=how, **reference)
    values = source(tiny, CLEAN[1], "mlp_post", 2)
    value = {"zero": 0 * values, "mean": values[1:].mean(0).expand_as(values)}.get(how, values)
    for j, neuron in enumerate((3, 30)):
        hook = put("mlp_post", 2, value, [N - 1], neuron=neuron)
        found = run(tiny, CLEAN[0], [hook], **SCORE)
        assert float(result["score"][0, 0, j]) == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "position_mean"])
def test_references_meet_a_users_hook_without_padding(tiny, how):
    def centre(x, hook):
        return x - x.mean(1, keepdim=True)

    sites = Sites("mlp_out", positions={"last": -1})
    reference = ["w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w5 w6 w9"]
    with tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", centre)]):
        one, many = (
            ablate(
                tiny, ALONE, sites, how=how, reference=reference, limits=Limits(batch_size=size)
            )["score"]
            for size in (1, 8)
        )
    assert np.allclose(one, many, atol=1e-5)


def test_mean_of_a_prompt_alone_at_its_own_place_is_refused(tiny):
    with pytest.raises(ValueError, match="would change nothing"):
        ablate(tiny, ALONE, how="position_mean")
    moved = ablate(tiny, ALONE, how="position_mean", reference=CLEAN[1])["change"]
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("how", ["position_mean", "resample"])
def test_reference_of_other_lengths_by_token_is_refused(tiny, how):
    asked = Pairs(CLEAN, **SCORE)
    options = {"how": how, "reference": ["w1 w2", "w3 w4"]}
    with pytest.raises(TokenError, match="7 positions and the reference 3"):
        ablate(tiny, asked, **options)
    ablate(tiny, asked, Sites("attn_out", positions={"last": -1}), **options)


@pytest.mark.parametrize(
    ("pairs", "sites", "message"),
    [
        ((CLEAN, CORRUPTED[:2]), {}, "3 clean and 2 corrupted"),
        (CLEAN[0], {}, "there are no corrupted ones"),
        ((PAIRS[0][0], "w1 w2"), {}, "7 and 3 tokens"),
        (ONE, {"positions": "w99"}, "does not occur"),
        ((PAIRS[0][0], "w1 w2"), {"positions": {"a": ("w7 w8", "w1")}}, "covers 2"),
        (ONE, {"kinds": "resid"}, "expected one or more of"),
        (ONE, {"kinds": ["z", "resid_pre"]}, "do not share one axis"),
        (ONE, {"kinds": "z", "heads": [4]}, r"heads \[4\]"),
        (ONE, {"heads": [0]}, "no head axis"),
        (ONE, {"layers": [3]}, r"layers \[3\]"),
        (ONE, {"layers": 3}, r"layers \(3,\): expected a list"),
        (ONE, {"kinds": "z", "heads": "each"}, "heads 'each': expected a list"),
        (ONE, {"neurons": [1]}, "mlp_pre and mlp_post"),
        (ONE, {"kinds": "mlp_pre", "neurons": [4096]}, "neurons"),
        (ONE, {"window": 0}, "at least 1"),
        ((["w1", "w1 w2"], ["w3", "w3 w4"]), {}, "no common axis"),
        ((["w1", "w1 w2"], ["w3", "w3 w4"]), {"positions": {"a": [0]}}, "1 spans for 2"),
    ],
)
def test_refuses_places(tiny, pairs, sites, message):
    with pytest.raises(ValueError, match=message):
        patch(tiny, pairs, Sites(**sites), metric="rank" if isinstance(pairs, Pairs) else top_logit)


def top_logit(logits):
    return logits.max(-1).values


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"direction": "back"}, "'denoise' or 'noise'"),
        ({"wrong": None}, {}, "give `wrong`"),
        ({"answer": None}, {}, "none was given"),
        ({"answer": " "}, {"metric": "rank"}, "empty answer"),
        ({"answer": 1.5}, {"metric": "rank"}, "a token id or a tensor of them; got 1.5"),
        ({}, {"metric": lambda logits: logits}, "one value per row"),
        ({}, {"metric": lambda logits: logits[:, -1, 5]}, r"FullLogits\(custom\)"),
        ({}, {"metric": lambda logits: logits[:, 0] / 0}, "not finite"),
        ({}, {"metric": FullLogits(lambda logits: logits[0])}, "must return one value"),
        ({}, {"metric": FullLogits(lambda logits: logits[1, 0])}, "one prompt at a time"),
        ({}, {"metric": ["rank", "rank"]}, "under its own name"),
        ({}, {"metric": lambda logits: 0 * logits[:, 0]}, "score the same in all 1 pairs"),
        ({"corrupted": CLEAN[0]}, {}, "same tokens, first in pair 0"),
        ({"corrupted": "w1 oops w8 w9 w30 w31", "clean": "w1 aha w8 w9 w30 w31"}, {}, "not know"),
    ],
)
def test_refuses_scores(tiny, fields, options, message):
    with pytest.raises(ValueError, match=message):
        patch(tiny, changed(ONE, **fields), **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["a", "b"]}, "2 labels for 1"),
        ({"clean": CLEAN, "corrupted": CORRUPTED, "answer": ["w11"]}, "1 of answer for 3"),
        ({"source": CLEAN}, "3 source prompts for 1"),
        ({"clean": torch.zeros(1, 2, 3)}, "of shape"),
        ({"clean": 3.5}, "a prompt is text"),
        ({"clean": []}, "no prompts were given"),
    ],
)
def test_pairs_refuse(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        changed(ONE, **fields)


def test_limits_are_checked():
    for name in ("batch_size", "max_rows", "memory"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Limits(**{name: 0})


def test_refuses_patterns_of_unequal_prompts(tiny):
    with pytest.raises(TokenError, match="7 and 3 tokens"):
        patch(tiny, (PAIRS[0][0], "w1 w2"), Sites("pattern", positions=-1), metric=top_logit)


def test_wrong_key_value_head(load_tiny):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        patch(load_tiny("llama"), ONE, Sites("k", heads=[2]))


def test_missing_hook_is_named(tiny, monkeypatch):
    from mi_hops.model import MissingHookError, hooks

    name, real = hook_name("attn_out", 1), hooks.hook_point
    monkeypatch.setattr(
        hooks, "hook_point", lambda model, asked: None if asked == name else real(model, asked)
    )
    with pytest.raises(MissingHookError, match=name):
        patch(tiny, ONE, "attn_out")
