"""Attribution against finite differences, identities and exact patching."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mi_hops.model import capture, forward, hook_name, n_heads_of
from mi_hops.patching import Attribution, attribute, attribute_edges, patch
from mi_hops.patching.quadrature import path_points
from mi_hops.result.result import Result
from mi_hops.sweep import KL, FullLogits, Limits, Pairs, Sites
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.text.tokens import TokenError, encode
from tests.models import cases
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

N = 7


def slope(model, text, kind, layer, there, here, positions, head=None, eps=1e-4, extra=(), **score):
    """d metric / dt of the activation here + t * (there - here), by central differences."""
    moved = (here + t * (there - here) for t in (eps, -eps))
    hooks = ([*extra, put(kind, layer, value, positions, head)] for value in moved)
    up, down = (run(model, text, each, **score) for each in hooks)
    return (up - down) / (2 * eps)


@pytest.mark.slow_case("llama-bridge-resid", "llama-bridge-mlp", "gpt2-hooked-q", "gpt2-hooked-k")
@pytest.mark.parametrize("kind", list(HEAD_AXIS))
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_every_kind_is_the_directional_derivative(load_tiny, kind, shape, backend):
    model = load_tiny(shape, backend, "float64")
    # The Bridge reckons parts in float32 whatever the dtype, so differences need a longer step.
    eps, tolerance = (1e-4, 1e-6) if backend == "hooked" else (3e-3, 2e-3)
    found = attribute(model, ALL, Sites(kind, positions="each"), metric="answer_logprob")
    for i in (0, 2):
        score = {"answer": ANSWERS[i], "wrong": WRONGS[i], "metric": "answer_logprob"}
        for layer, pos in ((0, 2), (2, 6), (1, 4)):
            there = source(model, CLEAN[i], kind, layer)
            here = source(model, CORRUPTED[i], kind, layer)
            heads = [None] if HEAD_AXIS[kind] is None else range(n_heads_of(model, kind))
            for head in heads:
                expected = slope(
                    model, CORRUPTED[i], kind, layer, there, here, [pos], head, eps, **score
                )
                at = found["change"].sel(example=i, layer=layer, position=pos)
                got = float(at) if head is None else float(at[head])
                assert got == pytest.approx(expected, abs=tolerance)
        gap = run(model, CLEAN[i], **score) - run(model, CORRUPTED[i], **score)
        assert np.allclose(found["effect"][i] * gap, found["change"][i], atol=1e-5)


@pytest.mark.slow
def test_both_classes_agree(load_tiny):
    """The Bridge's gradients, hook_resid_mid and reshaped heads included, are the true ones."""
    for shape in ("gpt2", "llama"):
        bridge = load_tiny(shape, "bridge")
        hooked = load_tiny(shape, "hooked", "float64")
        for kind in HEAD_AXIS:
            for method in ("gradient", "atp*"):
                ours = attribute(bridge, ALL, kind, method=method)["change"]
                true = attribute(hooked, ALL, kind, method=method)["change"]
                assert np.allclose(ours, true, atol=2e-4), (shape, kind, method)


def test_windows_neurons_noising_roles_and_batches(load_tiny):
    model = load_tiny("llama", "hooked", "float64")
    single = attribute(model, ALL, "mlp_out")["change"]
    window = attribute(model, ALL, Sites("mlp_out", window=3))
    assert np.allclose(window["change"][:, 1], single.sum("layer"))
    neurons = Sites("mlp_post", neurons=list(range(48)), positions=-1)
    parts = attribute(model, ALL, neurons)["change"]
    whole = attribute(model, ALL, Sites("mlp_post", positions=-1))
    assert np.allclose(parts.sum("neuron"), whole["change"])
    back = attribute(model, ALL, "mlp_out", direction="noise")
    swapped = attribute(model, changed(ALL, clean=CORRUPTED, corrupted=CLEAN), "mlp_out")
    assert np.allclose(back["change"], swapped["change"])
    for change in ({"limits": Limits(batch_size=1)}, {"by_kind": True}):
        again = attribute(model, ALL, ["mlp_out", "attn_out"], **change)
        assert np.allclose(again["change"].sel(kind="mlp_out"), single)
    both = Pairs(
        ["w5 w6 w7", CLEAN[0]],
        ["w9 w8 w5 w2 w1 w6", CORRUPTED[0]],
        answer=["w3", ANSWERS[0]],
        wrong=["w4", WRONGS[0]],
    )
    uneven = attribute(model, both, Sites("mlp_out", positions={"last": -1}))["change"]
    assert np.allclose(uneven[1, :, 0], single[0, :, -1])
    there, here = (source(model, t, "mlp_out", 1) for t in ("w5 w6 w7", "w9 w8 w5 w2 w1 w6"))
    moved = here.clone()
    moved[6] = there[3]
    expected = slope(
        model, "w9 w8 w5 w2 w1 w6", "mlp_out", 1, moved, here, [6], answer="w3", wrong="w4"
    )
    assert float(uneven[0, 1, 0]) == pytest.approx(expected, abs=1e-6)


def test_one_kind_at_a_time_holds_one_kind(load_tiny, monkeypatch):
    from mi_hops.patching import attribution

    model, held = load_tiny("llama"), []
    real = attribution.run_with_gradients

    def watched(model, prompts, names, **options):
        held.append(set(names))
        return real(model, prompts, names, **options)

    monkeypatch.setattr(attribution, "run_with_gradients", watched)
    kinds = ["mlp_out", "attn_out"]
    for by_kind, expected in ((False, [kinds]), (True, [kinds[:1], kinds[1:]])):
        held.clear()
        attribute(model, ALL, kinds, by_kind=by_kind)
        assert held == [{hook_name(k, i) for k in part for i in range(3)} for part in expected]


@pytest.mark.parametrize("method", ["gradient", "integrated", "atp*"])
def test_divergence_from_the_base_itself_has_no_slope(load_tiny, method):
    model = load_tiny("gpt2", "hooked", "float64")
    options = {"sites": Sites(layers=0), "metric": "kl", "direction": "noise", "method": method}
    if method == "integrated":  # off the base there is a slope
        found = attribute(model, PAIRS[0], steps=32, **options)
        assert float(found["completeness_error"][0]) < 1e-2
        return
    with pytest.raises(ValueError, match="its gradient is 0"):
        attribute(model, PAIRS[0], **options)
    attribute(model, PAIRS[0], **{**options, "direction": "denoise"})


@pytest.mark.slow_case("bfloat16", "float64")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_divergence_given_as_an_object_is_refused_at_its_own_base(load_tiny, dtype):
    for shape, backend in (("gpt2", "bridge"), ("llama", "hooked")):
        model = load_tiny(shape, backend, dtype)
        tokens = torch.tensor([encode(model, text).ids for text in CORRUPTED])
        with torch.no_grad():
            own = KL(forward(model, tokens)[1, -1])  # of the second base, from another batch
        for call in (attribute, attribute_edges):
            options = {"direction": "denoise", "metric": own}
            with pytest.raises(ValueError, match=r"1 of 3 pairs \(first: \[1\]"):
                call(model, (CLEAN, CORRUPTED), **options)
            call(model, (CLEAN[:1], CORRUPTED[:1]), **options)  # the base is another run
            call(model, (CLEAN, CORRUPTED), **{**options, "direction": "noise"})


def test_runs_that_score_the_same_have_no_share(tiny):
    """Not even where they differ by rounding alone; if none has one, that is an error."""
    for metric in (lambda x: 3 + 1e-6 * x[:, 0].tanh(), lambda x: x[:, 0] * 0 + 1):
        for options in ({}, {"method": "integrated", "steps": 2}):
            with pytest.raises(ValueError, match="score the same in all 1 pairs"):
                attribute(tiny, PAIRS[0], metric=metric, **options)
    same = Pairs(CLEAN[:2], [CORRUPTED[0], CLEAN[1] + " w3"], **SCORE)
    first = lambda x: x[0, 3, 11] - x[0, 3, 21]  # noqa: E731  (before the second pair differs)
    sites = Sites(layers=1, positions={"last": -1})
    found = attribute(tiny, same, sites, metric=FullLogits(first))
    assert np.isnan(found["effect"][1]).all()
    assert np.isfinite(found["effect"][0]).all()
    assert np.isfinite(found["change"]).all()


def test_gradients_that_are_not_finite_are_refused(tiny):
    def rough(logits):
        return (logits[:, 0] - logits[:, 0]).sqrt()

    for method in ("gradient", "integrated", "atp*"):
        with pytest.raises(ValueError, match="gradient of metric 'rough' is not finite"):
            attribute(tiny, PAIRS[0], metric=rough, method=method)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "resid_post"])
def test_windows_of_the_stream_are_refused(tiny, kind):
    """Their blocks hand on one change, which the sum would count once for each of them."""
    with pytest.raises(ValueError, match="counted several times"):
        attribute(tiny, ONE, Sites(["mlp_out", kind], window=2))


def test_passes(tiny):
    """Two forward passes and one backward, whatever the number of cells."""
    runs = []
    handle = tiny.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    counts = {}
    try:
        for method in ("gradient", "integrated", "atp+qkfix"):
            for kind in ("z", "q"):
                runs.clear()
                attribute(tiny, ALL, Sites(kind, positions="each"), method=method, steps=5)
                counts[method, kind] = len(runs)
    finally:
        handle.remove()
    assert counts == {
        ("gradient", "z"): 2,
        ("gradient", "q"): 2,
        ("integrated", "z"): 7,
        ("integrated", "q"): 7,
        ("atp+qkfix", "z"): 2,
        ("atp+qkfix", "q"): 4,
    }


@pytest.mark.parametrize(
    "method", ["gradient", pytest.param("integrated", marks=pytest.mark.slow), "atp+qkfix"]
)
@pytest.mark.parametrize("kind", list(HEAD_AXIS))
def test_cells_are_products_summed_over_their_part(load_tiny, method, kind):
    """Spans, heads and neurons of every size add up: one token at a time is the finest sum."""
    model = load_tiny("llama", "hooked", "float64")

    def change(**where):
        return attribute(model, ALL, Sites(kind, **where), method=method)["change"]

    fine = change(positions="each")
    spans = change(positions={"long": slice(1, 4), "short": [2, 5, 6]})
    if not (method == "atp+qkfix" and kind == "k"):  # keys patched together share their softmax
        assert np.allclose(spans.sel(position="long"), fine[:, :, 1:4].sum("position"))
        for i, pos in enumerate((2, 5, 6)):
            assert np.allclose(spans.sel(position="short")[i], fine[i, :, pos])
    if HEAD_AXIS[kind] is not None:
        whole = change(positions="each", heads="all")
        assert np.allclose(whole, fine.sum(fine.dims[-1]))
        assert np.allclose(change(positions="each", heads=1)[..., 0], fine[..., 1])


def test_third_source(load_tiny):
    model = load_tiny("gpt2", "hooked", "float64")
    third = "w70 w71 w72 w73 w74 w75"
    score = {"answer": ANSWERS[1], "wrong": WRONGS[1]}
    found = attribute(model, changed(ALL, source=third), Sites("z", positions="each"))
    there, here = (source(model, text, "z", 1) for text in (third, CORRUPTED[1]))
    expected = slope(model, CORRUPTED[1], "z", 1, there, here, [4], 2, **score)
    assert float(found["change"][1, 1, 4, 2]) == pytest.approx(expected, abs=1e-6)
    for name, text in (("clean", CLEAN[1]), ("corrupted", CORRUPTED[1])):
        assert float(found[name][1]) == pytest.approx(run(model, text, **score), abs=1e-9)
    path = attribute(
        model, changed(ALL, source=third), Sites(layers=0), method="integrated", steps=64
    )
    gap = run(model, third, **score) - run(model, CORRUPTED[1], **score)
    assert float(path["change"][1].sum()) == pytest.approx(gap, rel=1e-2)
    assert float(path["completeness_error"][1]) < 1e-2


@pytest.mark.slow
def test_integrated_gradients_are_complete(load_tiny):
    model = load_tiny("gpt2", "hooked", "float64")
    errors = {}
    for rule, steps in (("gauss", 2), ("gauss", 64), ("trapezoid", 200), ("trapezoid", 3)):
        sites = Sites(layers=0)
        result = attribute(model, ALL, sites, method="integrated", rule=rule, steps=steps)
        gap = result["clean"] - result["corrupted"]
        total = result["change"].sum(("layer", "position"))
        error = np.abs(total - gap) / np.abs(gap)
        assert np.allclose(error, result["completeness_error"], atol=1e-9)
        errors[rule, steps] = float(error.max())
    assert errors["gauss", 64] < 1e-3
    assert errors["trapezoid", 200] < 1e-2
    assert errors["gauss", 64] < errors["gauss", 2]
    assert errors["trapezoid", 200] < errors["trapezoid", 3]


def test_integrated_gradient_is_the_mean_of_gradients_along_the_path(load_tiny):
    """By hand: the gradient at each interpolated input, through finite differences."""
    model = load_tiny("gpt2", "hooked", "float64")
    steps = 3
    options = {"method": "integrated", "steps": steps, "rule": "trapezoid"}
    found = attribute(model, ONE, "mlp_out", **options)["change"]
    inputs = [source(model, text, "resid_pre", 0) for text in PAIRS[0]]
    outs = [source(model, text, "mlp_out", 1) for text in PAIRS[0]]
    total = 0.0
    for point, weight in path_points(steps, "trapezoid"):
        start = inputs[1] + point * (inputs[0] - inputs[1])
        begin = (hook_name("resid_pre", 0), lambda x, start=start: start[None].expand_as(x))
        tokens = torch.tensor([encode(model, PAIRS[0][1]).ids])
        here = capture(model, tokens, [hook_name("mlp_out", 1)], hooks=[begin])[0]
        here = here[hook_name("mlp_out", 1)][0]
        moved = here + (outs[0] - outs[1])
        at = ("mlp_out", 1, moved, here, [4])
        total += weight * slope(model, PAIRS[0][1], *at, extra=[begin], **SCORE)
    assert float(found[0, 1, 4]) == pytest.approx(total, abs=1e-6)


def test_quadrature():
    for rule, steps in (("gauss", 1), ("gauss", 5), ("trapezoid", 2), ("trapezoid", 9)):
        points = path_points(steps, rule)
        assert sum(w for _, w in points) == pytest.approx(1)
        assert sum(w * x for x, w in points) == pytest.approx(0.5)
    assert sum(w * x**9 for x, w in path_points(5, "gauss")) == pytest.approx(0.1)
    assert path_points(3, "trapezoid") == [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]
    with pytest.raises(ValueError, match="expected 'gauss'"):
        path_points(3, "simpson")
    with pytest.raises(ValueError, match="at least 2"):
        path_points(1, "trapezoid")


@pytest.mark.parametrize("shape", ["gpt2", "llama", "llama32"])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_attention_fix_recomputes_the_softmax(load_tiny, shape, kind):
    """The pattern of a truly patched query or key, and its slope by finite differences."""
    model = load_tiny(shape, "hooked", "float64")
    found = attribute(model, ONE, Sites(kind, positions="each"), method="atp+qkfix")["change"]
    text = PAIRS[0][1]
    tokens = torch.tensor([encode(model, text).ids])
    for layer, pos, head in ((0, 1, 0), (1, 3, 1), (2, 6, 1), (1, 2, 0)):
        hook = put(kind, layer, source(model, PAIRS[0][0], kind, layer), [pos], head)
        name = hook_name("pattern", layer)
        new = capture(model, tokens, [name], hooks=[hook])[0][name][0]
        old = source(model, text, "pattern", layer)
        expected = slope(model, text, "pattern", layer, new, old, range(N), **SCORE)
        assert float(found[0, layer, pos, head]) == pytest.approx(expected, abs=1e-6)


def test_other_kinds_need_no_attention_fix(load_tiny):
    model = load_tiny("llama", "hooked", "float64")
    for kind in HEAD_AXIS:
        if kind in ("q", "k"):
            continue
        plain = attribute(model, ALL, kind)["change"]
        fixed = attribute(model, ALL, kind, method="atp+qkfix")["change"]
        assert np.allclose(plain, fixed, atol=1e-10), kind


def test_gradient_dropout_freezes_what_a_block_writes(load_tiny):
    """By hand: the derivative while attention and MLP of one block are held at base values."""
    model = load_tiny("gpt2", "hooked", "float64")
    found = attribute(model, ONE, Sites("z", positions=3), method="atp*")["change"]
    clean, corrupted = PAIRS[0]
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        there, here = (source(model, t, "z", layer) for t in (clean, corrupted))
        sizes = []
        for block in range(3):
            if block == layer:
                continue
            held = [
                put(kind, block, source(model, corrupted, kind, block), range(N))
                for kind in ("attn_out", "mlp_out")
            ]
            at = ("z", layer, there, here, [3], head)
            sizes.append(abs(slope(model, corrupted, *at, extra=held, **SCORE)))
        plain = slope(model, corrupted, "z", layer, there, here, [3], head, **SCORE)
        expected = np.sign(plain) * np.mean(sizes)
        assert float(found[0, layer, head]) == pytest.approx(expected, abs=1e-6)


def test_verification_equals_patching(tiny, tmp_path):
    """The exact side is what `patch` gives; the summary numbers follow from the two."""
    sites = Sites("z", positions="each")
    estimate, exact = attribute(tiny, ALL, sites), patch(tiny, ALL, sites)["change"]
    guess = estimate["change"]
    found = estimate.verify(top=None)
    assert found.n_cells == exact[0].size
    assert found.largest_error == pytest.approx(float(np.abs(guess - exact).max()), abs=1e-5)
    means = exact.mean("example")
    for _, row in found.table.iterrows():
        at = {dim: int(row[dim]) for dim in ("layer", "position", "head")}
        assert float(means.sel(at)) == pytest.approx(row["exact"], abs=1e-5)
    top = estimate.verify(top=5)
    sizes = np.sort(np.abs(guess.mean("example").values).ravel())[::-1][:5]
    assert np.allclose(np.abs(top.table["estimated"]), sizes, atol=1e-6)
    assert "rank correlation" in top.describe()
    # What was found is part of a result, beside the estimates, and can be saved with them.
    assert int(np.isfinite(top.result["exact"][0]).sum()) == 5
    assert np.array_equal(top.result["change"], guess)
    assert np.allclose(found.result["exact"], exact, atol=1e-5)
    numbers = {k: v for k, v in vars(top).items() if k not in ("table", "result")}
    assert top.result.provenance["verification"] == numbers
    assert (top.n_cells, top.n_examples) == (5, 3)
    top.result.save(tmp_path / "checked.nc")
    assert Result.load(tmp_path / "checked.nc").provenance == top.result.provenance
    assert estimate.verify(top=1).result.provenance["verification"]["rank_correlation"] is None


def test_estimate_is_exact_where_the_model_is_linear(tiny):
    """A metric linear in the last block's MLP output, had it no final norm: near-perfect ranks."""
    sites = Sites("mlp_post", layers=[2], positions=-1, neurons=list(range(32)))
    found = attribute(tiny, ALL, sites).verify(top=None)
    assert found.rank_correlation > 0.95
    assert found.sign_agreement > 0.9
    assert found.largest_error < 0.3 * found.largest_exact


@pytest.mark.parametrize("method", ["gradient", "integrated", "atp*"])
def test_half_precision_models_score_in_float32(load_tiny, method):
    for backend in ("hooked", "bridge"):
        narrow = load_tiny("llama", backend, "bfloat16")
        wide = load_tiny("llama", backend)
        found = attribute(narrow, ALL, "z", method=method)["change"]
        true = attribute(wide, ALL, "z", method=method)["change"]
        assert found.dtype == np.float32
        assert np.corrcoef(found.values.ravel(), true.values.ravel())[0, 1] > 0.9


def test_estimates_are_a_result(tiny, tmp_path):
    """They plot, save and index like one, and leave the model behind when pickled."""
    found = attribute(tiny, changed(ONE, labels=["first"]), Sites("z", positions="each"))
    assert isinstance(found, Result)
    assert found["effect"].dims == ("example", "layer", "position", "head")
    assert found.plot("change", facet="layer", x="position", y="head").data
    found.save(tmp_path / "found.nc")
    assert np.array_equal(Result.load(tmp_path / "found.nc")["change"], found["change"])
    assert type(found.mean()) is Result
    stored = pickle.dumps(found)
    assert len(stored) < 100_000  # a model's weights would take more
    back = pickle.loads(stored)
    assert isinstance(back, Attribution)
    assert np.array_equal(back["change"], found["change"])
    with pytest.raises(ValueError, match="pickled without their model"):
        back.verify()
    assert len(repr(found.verify())) < 500


def test_refuses(tiny):
    with pytest.raises(ValueError, match="has no gradient"):
        attribute(tiny, ONE, metric="rank")
    with pytest.raises(ValueError, match="expected one metric"):
        attribute(tiny, ONE, metric=["rank", "logit_diff"])
    with pytest.raises(ValueError, match="expected one of"):
        attribute(tiny, ONE, method="grad")
    uneven = changed(ONE, corrupted="w1 w2")
    with pytest.raises(TokenError, match="7 and 3 tokens"):
        attribute(tiny, uneven, Sites(positions=-1), method="integrated")
    with pytest.raises(ValueError, match="same positions"):
        attribute(tiny, ONE, Sites(positions={"a": (1, 2)}), method="atp*")
    with pytest.raises(ValueError, match="top is 0"):
        attribute(tiny, ONE).verify(top=0)
