"""Edge attribution against derivatives of exact paths; circuits against patching identities."""

from __future__ import annotations

import numpy as np
import pytest

from mi_hops.model import hook_name
from mi_hops.patching import (
    Circuit,
    acdc,
    all_edges,
    attribute,
    attribute_edges,
    extract,
    faithfulness,
    patch,
    path_patch,
)
from mi_hops.patching.nodes import readers, writers
from mi_hops.patching.quadrature import path_points
from mi_hops.sweep import Limits, Pairs, Sites
from mi_hops.sweep.metrics import NextToken
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
    reading,
    run,
    source,
    write,
)

N = 7


def path_slope(model, pair, sender, receiver, score, before=(), eps=1e-4):
    """Derivative of the metric along a path, with the reader's weights applied by hand.

    The base is the first prompt of the pair, as `before` changes its run; the writer's difference
    is that of the two plain runs.
    """
    base, other = pair
    change = write(model, other, sender) - write(model, base, sender)
    hooks = (reading(model, base, receiver, t * change, before) for t in (eps, -eps))
    up, down = (run(model, base, [*before, hook], **score) for hook in hooks)
    return (up - down) / (2 * eps)


@pytest.mark.slow_case("gpt2")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_every_edge_is_the_derivative_of_its_path(load_tiny, shape):
    model = load_tiny(shape, "hooked", "float64")
    found = attribute_edges(model, ALL, metric="answer_logprob")
    score = {"answer": ANSWERS[2], "wrong": WRONGS[2], "metric": "answer_logprob"}
    checked = 0
    for u in writers(model, "all")[::3]:
        for v in readers(model, "all")[::4]:
            got = float(found["change"].sel(example=2, sender=u.name, receiver=v.name))
            if not u.reaches(v):
                assert np.isnan(got)
                continue
            expected = path_slope(model, PAIRS[2], u, v, score)
            assert got == pytest.approx(expected, abs=1e-6), (u.name, v.name)
            checked += 1
    assert checked > 15


def test_integrated_edges_are_means_along_the_path(load_tiny):
    model = load_tiny("llama", "hooked", "float64")
    found = attribute_edges(model, ONE, method="integrated", steps=3, rule="trapezoid")
    assert found.provenance["method"] == "EAP-IG"
    ends = [source(model, text, "resid_pre", 0) for text in PAIRS[0]]
    for sender, receiver in (
        ("L0H1", "L2H1.k"),
        ("MLP0", "MLP2"),
        ("embed", "L1H3.q"),
        ("L1H2", "logits"),
    ):
        (u,), (v,) = writers(model, sender), readers(model, receiver)
        total = 0.0
        for point, weight in path_points(3, "trapezoid"):
            start = ends[0] + point * (ends[1] - ends[0])
            begin = (hook_name("resid_pre", 0), lambda x, start=start: start[None].expand_as(x))
            total += weight * path_slope(model, PAIRS[0], u, v, SCORE, before=[begin])
        got = float(found["change"].sel(sender=sender, receiver=receiver)[0])
        assert got == pytest.approx(total, abs=1e-6), (sender, receiver)


@pytest.mark.slow_case("gpt2")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_integrated_edges_tell_how_complete_they_are(load_tiny, shape):
    model = load_tiny(shape, "hooked", "float64")
    options = {"metric": "answer_logprob", "direction": "noise", "method": "integrated"}
    for steps in (2, 5):
        edges = attribute_edges(model, ALL, "heads", "logits", steps=steps, **options)
        whole = attribute(model, ALL, Sites(layers=0), steps=steps, **options)
        error = edges["completeness_error"]
        assert np.allclose(error, whole["completeness_error"], rtol=1e-6)
    fine = attribute_edges(model, ALL, "heads", "logits", steps=60, **options)
    assert float(fine["completeness_error"].median()) < 1e-4
    assert "completeness_error" not in attribute_edges(model, ALL, "L0H0", "logits").data


@pytest.mark.slow_case("llama-bridge")
def test_no_batch_changes_an_estimate(tiny):
    """Pairs and points share passes; order of nodes and size of a pass are not seen."""
    options = {"method": "integrated", "steps": 3, "metric": "answer_logprob"}
    found = attribute_edges(tiny, ALL, **options)["change"]
    for i in range(len(ALL)):
        limits = Limits(batch_size=2)
        one = attribute_edges(tiny, ALL.select([i]), **options, limits=limits)["change"]
        assert np.allclose(one[0], found[i], atol=2e-5, equal_nan=True)
    some = ["MLP2", "L1H3", "embed", "ATTN0", "L0H2"], ["logits", "L2H0.q", "MLP1", "L1H1.v"]
    part = attribute_edges(tiny, ALL, *some, **options)["change"]
    for sender in set(some[0]) - {"ATTN0"}:
        both = part.sel(sender=sender), found.sel(sender=sender, receiver=some[1])
        assert np.allclose(*both, atol=2e-5, equal_nan=True)
    heads = found.sel(sender=[f"L0H{h}" for h in range(4)], receiver=some[1]).sum(
        "sender", skipna=False
    )
    assert np.allclose(part.sel(sender="ATTN0"), heads, atol=5e-5, equal_nan=True)


@pytest.mark.slow
def test_pairs_of_unequal_lengths_share_passes(tiny):
    short, long = "w1 w7 w8", "w1 w7 w8 w9 w30 w31 w5 w6"
    pairs = Pairs(
        [short, CLEAN[0], long],
        ["w1 w9 w8", CORRUPTED[0], long.replace("w9", "w12")],
        answer=["w11 w12", "w11", "w11"],
        wrong="w21",
    )
    for options in ({}, {"method": "integrated", "steps": 3}):
        options["metric"] = "answer_logprob"
        each = [attribute_edges(tiny, pairs.select([i]), **options)["change"][0] for i in range(3)]
        for size in (1, 2, 4, 8):
            found = attribute_edges(tiny, pairs, **options, limits=Limits(batch_size=size))
            assert np.allclose(found["change"], each, atol=2e-5, equal_nan=True), size


def test_both_classes_agree(load_tiny):
    for shape in ("gpt2", "llama"):
        models = [load_tiny(shape, "bridge"), load_tiny(shape, "hooked", "float64")]
        for options in ({}, {"direction": "denoise", "method": "integrated", "steps": 3}):
            found = [attribute_edges(model, ALL, **options)["change"] for model in models]
            assert np.allclose(*found, atol=3e-4, equal_nan=True), shape


@pytest.mark.slow
def test_estimates_rank_like_exact_paths(tiny):
    """On any class: estimates of paths to the logits order as the exact ones do."""
    from scipy.stats import spearmanr

    paths = {"senders": "heads", "receivers": ["logits", "v"]}
    estimate = attribute_edges(tiny, ALL, **paths)
    each = estimate["change"]
    guess = each.mean("example")
    exact = path_patch(tiny, ALL, direction="noise", **paths)
    true = exact["change"].mean("example")
    known = np.isfinite(true.values)
    assert np.array_equal(known, np.isfinite(guess.values))
    correlation = spearmanr(guess.values[known], true.values[known]).statistic
    assert correlation > 0.7
    # Verifying all edges is this comparison, and of some, the part of it.
    found = estimate.verify(top=None)
    assert found.n_cells == known.sum()
    assert found.rank_correlation == pytest.approx(correlation, abs=0.02)
    assert found.largest_error == pytest.approx(
        float(np.abs(each - exact["change"]).max()), abs=1e-5
    )
    assert np.allclose(found.result["exact"], exact["change"], atol=1e-5, equal_nan=True)
    some = estimate.verify(top=7)
    for _, row in some.table.iterrows():
        at = {"sender": row["sender"], "receiver": row["receiver"]}
        assert float(true.sel(at)) == pytest.approx(row["exact"], abs=1e-5)
        assert float(guess.sel(at)) == pytest.approx(row["estimated"], abs=1e-6)
    sizes = np.sort(np.abs(guess.values[known]))[::-1][:7]
    assert np.allclose(np.abs(some.table["estimated"]), sizes, atol=1e-6)
    assert int(np.isfinite(some.result["exact"][0]).sum()) == some.n_cells == 7
    told = some.result.provenance["verification"]
    assert told["rank_correlation"] == some.rank_correlation
    assert told["largest_error"] == some.largest_error


def test_divergence_from_the_base_itself_has_no_slope(load_tiny):
    """Its gradient there is 0, whatever the model; averaged over the path it is complete."""
    model = load_tiny("gpt2", "hooked", "float64")
    with pytest.raises(ValueError, match="its gradient is 0"):
        attribute_edges(model, PAIRS[0], metric="kl")
    attribute_edges(model, PAIRS[0], metric="kl", direction="denoise")
    path = attribute_edges(model, PAIRS[0], metric="kl", method="integrated").verify(top=20)
    assert path.rank_correlation > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_half_precision_models_score_in_float32(load_tiny, backend):
    narrow, wide = (load_tiny("llama", backend, dtype) for dtype in ("bfloat16", "float32"))
    full = {"circuits": [Circuit(frozenset(all_edges(wide)))]}
    paths = {"senders": "all", "receivers": ["v", "mlps", "logits"]}
    for call, options in (
        (lambda *a, **o: attribute_edges(*a, **o)["change"], {}),
        (lambda *a, **o: attribute_edges(*a, **o)["change"], {"method": "integrated", "steps": 3}),
        (lambda *a, **o: path_patch(*a, **o)["change"], paths),
        (lambda *a, **o: faithfulness(*a, **o)["score"], full),
    ):
        found, true = (call(m, ALL, **options) for m in (narrow, wide))
        assert found.dtype == np.float32
        known = np.isfinite(true.values)
        assert np.array_equal(np.isfinite(found.values), known)
        assert np.corrcoef(found.values[known], true.values[known])[0, 1] > 0.9


def test_scores_that_are_not_finite_cut_no_edges(tiny):
    """NaN is never above a threshold: without the check every edge would go."""
    broken = NextToken("broken", "", True, lambda logits, target: logits[:, 0] * float("nan"))
    for call in (
        lambda: acdc(tiny, ONE, threshold=0.1, metric=broken),
        lambda: faithfulness(tiny, ONE, [Circuit(frozenset())], metric=broken),
    ):
        with pytest.raises(ValueError, match="'broken' is not finite"):
            call()
    rough = lambda x: (x[:, 0] - x[:, 0]).sqrt()  # noqa: E731
    with pytest.raises(ValueError, match="gradient of metric 'custom' is not finite"):
        attribute_edges(tiny, PAIRS[0], metric=rough)


def circuits(model):
    """All edges, none, and all without: one edge; what a head writes; what it reads."""
    edges = set(all_edges(model))
    cuts = {
        "all": set(),
        "none": edges,
        "one": {("L0H1", "L2H0.q")},
        "mlp": {("L1H2", "MLP1")},
        "written": {(u, v) for u, v in edges if u == "L1H0"},
    }
    return {name: Circuit(frozenset(edges - cut)) for name, cut in cuts.items()}


@pytest.mark.slow_case("llama-bridge")
def test_circuits_by_identities(tiny):
    cut = circuits(tiny)
    found = faithfulness(tiny, ALL, list(cut.values()))
    score = {name: found["score"][:, j].values for j, name in enumerate(cut)}
    assert np.allclose(score["all"], found["clean"], atol=1e-4)
    assert np.allclose(score["none"], found["corrupted"], atol=1e-4)
    assert np.allclose(found["faithfulness"][:, 0], 1, atol=1e-3)
    for name, (sender, receiver) in (("one", ("L0H1", "L2H0.q")), ("mlp", ("L1H2", "MLP1"))):
        path = path_patch(tiny, ALL, sender, receiver, direction="noise")
        assert np.allclose(score[name], path["score"][:, 0, 0], atol=1e-4), name
    noised = patch(tiny, ALL, Sites("z", layers=1, heads=0), direction="noise")
    assert np.allclose(score["written"], noised["score"][:, 0, 0], atol=1e-4)
    assert list(found["edges"].values) == [len(c) for c in cut.values()]


@pytest.mark.parametrize("place", ["resid_pre", "resid_post"])
def test_a_hook_that_scales_the_stream_is_refused(tiny, place):
    """The edges' writes do not add up to the clean run then; a constant shift cancels out."""
    whole = [Circuit(frozenset(all_edges(tiny)))]
    hooked = {"scale": lambda x, hook: 0.5 * x, "shift": lambda x, hook: x + 0.5}
    with tiny.hooks(fwd_hooks=[(f"blocks.1.hook_{place}", hooked["scale"])]):
        with pytest.raises(ValueError, match="does not add up to the residual stream.* remove the"):
            faithfulness(tiny, ONE, whole)
        with pytest.raises(ValueError, match="does not add up to the residual stream"):
            acdc(tiny, ONE, threshold=0.1)
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", hooked["shift"])]):
        none = faithfulness(tiny, ONE, [Circuit(frozenset())])["faithfulness"].item()
    assert none == pytest.approx(0, abs=1e-4)
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", hooked["scale"])]):
        found = faithfulness(tiny, ONE, whole)["faithfulness"].item()
    assert found == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_rounding_of_half_precision_is_no_scale(load_tiny, shape, dtype):
    model = load_tiny(shape, "bridge", dtype)
    found = faithfulness(model, ALL, [Circuit(frozenset(all_edges(model)))])
    assert np.isfinite(found["score"]).all()


def test_cutting_what_a_head_reads_noises_it(load_tiny):
    """On a grouped model its key/value head is shared, so the whole group must lose its inputs."""
    for shape, heads in (("gpt2", [2]), ("llama", [2, 3])):
        for backend in ("bridge", "hooked"):
            model = load_tiny(shape, backend)
            edges = set(all_edges(model))
            inputs = {f"L1H{h}.q" for h in heads}
            inputs |= {f"L1H{1 if shape == 'llama' else 2}.{kind}" for kind in "kv"}
            circuit = Circuit(frozenset((u, v) for u, v in edges if v not in inputs))
            found = faithfulness(model, ONE, [circuit])
            hooks = [put("z", 1, source(model, CORRUPTED[0], "z", 1), range(N), h) for h in heads]
            expected = run(model, PAIRS[0][0], hooks, **SCORE)
            assert float(found["score"][0, 0]) == pytest.approx(expected, abs=1e-4)


def test_circuits_of_answers_of_several_tokens(tiny):
    full = Circuit(frozenset(all_edges(tiny)))
    found = faithfulness(
        tiny,
        ALL,
        [full, Circuit(frozenset())],
        metric="answer_logprob",
        limits=Limits(batch_size=1),
    )
    assert np.allclose(found["score"][:, 0], found["clean"], atol=1e-4)
    assert np.allclose(found["score"][:, 1], found["corrupted"], atol=1e-4)


def test_pruning(load_tiny):
    model = load_tiny("llama")
    edges = {
        ("embed", "L0H0.q"),
        ("L0H0", "MLP1"),
        ("MLP1", "logits"),  # a way through
        ("embed", "L1H1.k"),
        ("L1H3", "logits"),  # through a shared key head
        ("L0H2", "logits"),  # nothing feeds it
        ("embed", "MLP0"),  # it feeds nothing
    }
    kept = Circuit(frozenset(edges)).pruned(model)
    assert kept.edges == edges - {("L0H2", "logits"), ("embed", "MLP0")}
    assert "L1H3" in kept.nodes
    assert Circuit(frozenset({("embed", "MLP0")})).pruned(model).edges == frozenset()


def test_extraction_and_faithfulness_curve(tiny):
    scores = attribute_edges(tiny, ALL)
    with pytest.raises(ValueError, match="pass those of attribute_edges"):
        extract(tiny, attribute(tiny, ONE), 7)
    n = len(all_edges(tiny))
    assert int(np.isfinite(scores["change"][0]).sum()) == n
    whole = extract(tiny, scores, n)
    assert whole.edges == set(all_edges(tiny))
    some = extract(tiny, scores, 10, prune=False)
    mean = scores["change"].mean("example")
    sizes = [abs(float(mean.sel(sender=u, receiver=v))) for u, v in some.edges]
    assert min(sizes) >= np.sort(np.abs(mean.values[np.isfinite(mean.values)]))[-10] - 1e-12
    grown = extract(tiny, scores, 8, select="greedy", prune=False)
    assert len(grown) == 8
    into_logits = mean.sel(receiver="logits")
    best = str(into_logits["sender"].values[int(np.nanargmax(np.abs(into_logits.values)))])
    assert (best, "logits") in grown.edges  # the first one taken
    for u, v in grown.edges:  # every edge leads on, through the circuit, to the logits
        heads = [v.split(".")[0]]
        if v[-1] in "kv" and "." in v and tiny.cfg.n_heads != (tiny.cfg.n_key_value_heads or 4):
            group = int(heads[0][3:])
            heads = [f"{heads[0][:3]}{2 * group + j}" for j in (0, 1)]
        assert v == "logits" or any(sender in heads for sender, _ in grown.edges), (u, v)
    assert extract(tiny, scores, n, select="greedy").edges == whole.edges
    with pytest.raises(ValueError, match="'top' or 'greedy'"):
        extract(tiny, scores, 2, select="best")
    with pytest.raises(ValueError, match=f"expected 1 to {n}"):
        extract(tiny, scores, n + 1)
    with pytest.raises(ValueError, match="'size' or 'serving'"):
        extract(tiny, scores, 2, by="rank")


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_serving_edges_lead_to_the_other_run(load_tiny, direction, metric):
    """Of a divergence lower is better; the share of the way to the other run tells for any metric."""
    model = load_tiny("llama", "hooked")
    scores = path_patch(model, ONE, "mlps", "all", metric=metric, direction=direction)
    share = scores["effect"].mean("example").transpose("sender", "receiver").to_series().dropna()
    chosen = extract(model, scores, len(share), by="serving", prune=False)
    assert chosen.edges == set(share[share > 0].index)
    assert chosen.edges


def test_acdc_keeps_what_matters(load_tiny):
    model = load_tiny("llama", "hooked")
    start = Circuit(frozenset((u, v) for u, v in all_edges(model) if v in ("logits", "MLP2")))
    rest = frozenset(all_edges(model)) - start.edges
    begin = Circuit(start.edges | {e for e in rest if e[0] == "embed"})
    found = acdc(model, ALL, threshold=0.02, start=begin, prune=False)
    assert set(zip(found.table["sender"], found.table["receiver"], strict=True)) == begin.edges
    assert found.circuit.edges == {
        (r.sender, r.receiver) for r in found.table.itertuples() if r.kept
    }
    assert (found.table["harm"][found.table["kept"]] >= 0.02).all()
    assert (found.table["harm"][~found.table["kept"]] < 0.02).all()
    everything = acdc(model, ALL, threshold=1e9, start=start)
    assert len(everything.circuit) == 0


@pytest.mark.slow_case("llama-bridge")
def test_acdc_decides_as_one_edge_and_pair_at_a_time_does(tiny):
    """Each harm is the divergence of two circuits, pair by pair; pairs have two lengths."""
    longer = tuple(f"{text} w9" for text in (CLEAN[0], CORRUPTED[0]))
    pairs = Pairs([*CLEAN[:2], longer[0]], [*CORRUPTED[:2], longer[1]], answer=["w11"] * 3)
    into = ("logits", "MLP1", "L1H1.q", "L2H0.v")
    edges = frozenset(e for e in all_edges(tiny) if e[0] == "embed" or e[1] in into)
    start = Circuit(edges)
    options = {"start": start, "prune": False, "limits": Limits(batch_size=5)}
    harm = acdc(tiny, pairs, threshold=1e9, **options).table["harm"]
    found = acdc(tiny, pairs, threshold=float(harm[harm > 0].median()), **options)
    assert 0 < found.table["kept"].sum() < len(found.table) == len(start)
    assert found.table["receiver"][0] == "logits"
    tried, now, before = [start], start, []
    for row in found.table.itertuples():
        before.append(tried.index(now))
        tried.append(Circuit(now.edges - {(row.sender, row.receiver)}))
        now = now if row.kept else tried[-1]
    score = faithfulness(tiny, pairs, tried, metric="kl")["score"].mean("example").values
    assert np.allclose(found.table["harm"], score[1:] - score[before], atol=1e-5)


def test_refuses(tiny):
    with pytest.raises(ValueError, match="steps is 0"):
        attribute_edges(tiny, ONE, method="integrated", steps=0)
    with pytest.raises(ValueError, match="'gradient' or 'integrated'"):
        attribute_edges(tiny, ONE, method="eap")
    with pytest.raises(ValueError, match="no edge leads"):
        attribute_edges(tiny, ONE, "L2H0", "L1H0.q")
    with pytest.raises(ValueError, match="top is 0"):
        attribute_edges(tiny, ONE, "L0H0").verify(top=0)
    several = {"metric": ["rank", "logit_diff"]}
    for call in (
        lambda: attribute_edges(tiny, ONE, **several),
        lambda: faithfulness(tiny, ONE, [Circuit(frozenset())], **several),
        lambda: acdc(tiny, ONE, threshold=1.0, **several),
    ):
        with pytest.raises(ValueError, match="expected one metric"):
            call()
    with pytest.raises(ValueError, match="not the model's"):
        faithfulness(tiny, ONE, [Circuit(frozenset({("MLP2", "MLP1")}))])
    third = changed(ONE, source=CORRUPTED[1])
    with pytest.raises(ValueError, match="no other source of activations"):
        attribute_edges(tiny, third)
    with pytest.raises(ValueError, match="0 circuits"):
        faithfulness(tiny, ONE, [])
    with pytest.raises(ValueError, match="threshold is 0"):
        acdc(tiny, PAIRS[0], threshold=0)


def test_estimates_are_read_back_as_a_result(load_tiny, tmp_path):
    found = attribute_edges(load_tiny("gpt2"), ONE, "mlps", "logits")
    path = found.save(tmp_path / "edges.nc")
    again = type(found).load(path)
    assert np.array_equal(again["change"], found["change"], equal_nan=True)
