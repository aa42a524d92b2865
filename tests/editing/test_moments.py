"""Second moments against a direct computation, their shrinkage, cache and files."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.editing import Moments, second_moments
from mi_hops.editing import moments as module
from mi_hops.model import capture, hook_name
from mi_hops.text.tokens import encode
from tests.reasoning.tiny_facts import tiny_fact

TEXTS = [f"w{i} w{i + 3} " + "w7 " * (i % 4) + f"w{2 * i}" for i in range(1, 25)]


def inputs(model, layer, kind="z", last=False):
    """All inputs of a matrix, every text run alone."""
    found = []
    for text in TEXTS:
        tokens = torch.tensor([encode(model, text).ids])
        x = capture(model, tokens, [hook_name(kind, layer)])[0][hook_name(kind, layer)][0].flatten(
            1
        )
        found.append(x[-1:] if last else x)
    return torch.cat(found).double()


@pytest.mark.slow_case("llama-bridge-last")
@pytest.mark.parametrize("positions", ["all", "last"])
def test_equal_the_direct_computation(tiny, positions):
    moments = second_moments(tiny, TEXTS, layers=[0, 2], max_tokens=30, positions=positions)
    assert moments.layers == (0, 2)
    for layer in (0, 2):
        x = inputs(tiny, layer, last=positions == "last")
        assert moments.n == len(x)
        torch.testing.assert_close(moments.second[layer], x.T @ x / len(x), atol=1e-5, rtol=1e-4)
        fourth = x.square().sum(1).square().mean()
        assert moments.fourth[layer] == pytest.approx(float(fourth), rel=1e-4)


def test_last_is_the_end_of_a_text_however_long_it_is(load_tiny):
    model = load_tiny("llama")
    text = " ".join(f"w{i % 80}" for i in range(130))  # two pieces of the context's 64 and a rest
    moments = second_moments(model, [text, "w1 w2"], layers=[1], positions="last")
    assert moments.n == 2
    rest = " ".join(text.split()[126:])
    alone = second_moments(model, [rest, "w1 w2"], layers=[1], positions="last")
    torch.testing.assert_close(moments.second[1], alone.second[1])


def test_a_text_in_place_of_a_corpus_is_refused(load_tiny):
    with pytest.raises(ValueError, match="put a single text in a list"):
        second_moments(load_tiny("llama"), "w1 w2 w3")


def test_of_an_mlp(tiny):
    moments = second_moments(tiny, TEXTS, layers=[1], matrix="W_out", max_tokens=64)
    x = inputs(tiny, 1, "mlp_post")
    torch.testing.assert_close(moments.second[1], x.T @ x / len(x), atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter(tiny):
    a, b = (second_moments(tiny, iter(TEXTS), max_tokens=n) for n in (12, 4096))
    assert a.n == b.n and a.layers == tuple(range(tiny.cfg.n_layers))
    for layer in a.layers:
        torch.testing.assert_close(a.second[layer], b.second[layer], atol=1e-5, rtol=1e-5)


def made(x):
    """Moments of given rows."""
    x = torch.as_tensor(x, dtype=torch.float64)
    fourth = float(x.square().sum(1).square().mean())
    return Moments("W_O", {0: x.T @ x / len(x)}, {0: fourth}, len(x), "")


def test_ledoit_wolf_equals_scikit_learns():
    from_sklearn = pytest.importorskip("sklearn.covariance").ledoit_wolf
    rng = np.random.default_rng(0)
    for n, d in ((30, 8), (200, 8), (10, 20)):
        x = rng.normal(size=(n, d)) * rng.uniform(0.2, 2, size=d)
        want, share = from_sklearn(x, assume_centered=True)
        got = made(x)
        assert got.share(0) == pytest.approx(share, rel=1e-9)
        np.testing.assert_allclose(got.shrunk(0).numpy(), want, rtol=1e-9, atol=1e-12)


def test_ledoit_wolf_from_its_definition():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 6)) * np.arange(1, 7)
    c = x.T @ x / 40
    b2 = sum(((np.outer(r, r) - c) ** 2).sum() for r in x) / 40**2
    d2 = ((c - np.trace(c) / 6 * np.eye(6)) ** 2).sum()
    assert made(x).share(0) == pytest.approx(min(b2, d2) / d2)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_solve_inverts_what_is_shrunk(share):
    rng = np.random.default_rng(2)
    moments = made(rng.normal(size=(50, 5)) * np.arange(1, 6)).with_shrinkage(share)
    keys = torch.as_tensor(rng.normal(size=(3, 5)))
    torch.testing.assert_close(moments.solve(0, keys) @ moments.shrunk(0), keys)
    if share == 1.0:
        ratio = moments.solve(0, keys) / keys
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_save_and_load(tiny, tmp_path):
    moments = second_moments(tiny, TEXTS, layers=[1], shrinkage=0.2)
    again = Moments.load(moments.save(tmp_path / "m.safetensors"))
    assert torch.equal(again.second[1], moments.second[1])
    assert again.fourth == dict(moments.fourth) and again.share(1) == 0.2
    assert (again.n, again.fingerprint, again.matrix) == (
        moments.n,
        moments.fingerprint,
        moments.matrix,
    )
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a file of moments"):
        Moments.load(tmp_path / "junk")
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nothing")


def test_the_text_is_always_recorded(tiny, tmp_path):
    def named(corpus, **options):
        return second_moments(tiny, corpus, layers=[0], **options).source["text"]

    digest = named(TEXTS)
    assert digest == named(iter(TEXTS)) == named(TEXTS, cache=tmp_path) != named(TEXTS[1:])
    assert digest == named(TEXTS, cache=tmp_path)  # read back
    fact = tiny_fact("w3 w5", "w1 w3 w5")
    kept = replace(fact, meta={"year": np.int64(1990)})  # what JSON does not know
    assert named([kept]) not in (named([fact]), named(TEXTS))
    file = tmp_path / "text.txt"
    file.write_text("w1 w2")
    assert named(file) == hashlib.sha256(b"w1 w2").hexdigest()


def test_cache(tiny, tmp_path, monkeypatch):
    runs = []
    real = module.capture
    monkeypatch.setattr(module, "capture", lambda *a, **k: runs.append(1) or real(*a, **k))

    def count(**changes):
        before = len(runs)
        options = {"corpus": TEXTS, "layers": [1], "cache": tmp_path} | changes
        second_moments(tiny, **options)
        return len(runs) - before

    assert count() and not count() and not count(shrinkage=0.5)
    assert count(corpus=TEXTS[:-1]) and count(layers=[0]) and count(positions="last")
    assert not count(layers=[0])
    with pytest.raises(ValueError, match="read only once"):
        count(corpus=iter(TEXTS))
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS))
    assert count(corpus=file) and not count(corpus=file)
    assert not count(layers=np.array([1]))
    with torch.no_grad():
        w = tiny.blocks[0].attn.W_O
        old = w.data[0, 0, 0].clone()  # adding 1 and taking it away again loses bits
        w.data[0, 0, 0] += 1
        try:
            assert count()  # other weights
        finally:
            w.data[0, 0, 0] = old


def test_the_cache_tells_apart_what_makes_other_tokens(tiny, tmp_path, monkeypatch):
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_text('{"text": "w1 w2 w3"}\n')

    def counted(corpus):
        return second_moments(tiny, corpus, layers=[1], cache=tmp_path).n

    assert counted(tmp_path / "text.jsonl") == 4  # BOS, and three words
    assert counted(tmp_path / "text.txt") == second_moments(tiny, tmp_path / "text.txt").n == 5
    monkeypatch.setattr(tiny.cfg, "default_prepend_bos", False)
    assert counted(tmp_path / "text.jsonl") == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": []}, "no layers"),
        ({"layers": [7]}, "out of range"),
        ({"matrix": "W_E"}, "unknown matrix"),
        ({"positions": "first"}, "positions is"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5"),
        ({"corpus": []}, "empty"),
    ],
    ids=str,
)
def test_bad_input(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        second_moments(tiny, **({"corpus": TEXTS} | options))


def test_moments_of_a_layer_that_was_not_counted(tiny):
    with pytest.raises(ValueError, match=r"no moments of layer 0, only of \[1\]"):
        second_moments(tiny, TEXTS, layers=[1]).shrunk(0)
