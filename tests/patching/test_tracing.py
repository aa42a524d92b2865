"""Causal tracing against a loop of single forward passes with the same noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.model import capture, embedding, hook_name
from mi_hops.patching import subject_roles, trace
from mi_hops.patching.tracing import noise_draws
from mi_hops.sweep import Pairs, Sites
from mi_hops.text.tokens import TokenError, encode, positions
from tests.patching.loops import put, run

TEXTS = ["w1 w7 w8 w9 w30 w31", "w2 w22 w5 w9 w17 w18"]
SUBJECTS = ["w7 w8", "w22 w5 w9"]
ANSWERS = ["w11", "w13 w12"]
ASKED = Pairs(TEXTS, answer=ANSWERS)
ONE = Pairs(TEXTS[0], answer="w11")
N, SAMPLES, NOISE, SEED = 7, 3, 2.0, 5


def noise_hook(model, text, subject, draw):
    span = list(positions(encode(model, text), subject))

    def fn(x):
        x = x.clone()
        x[0, span] += draw.to(x.dtype)
        return x

    return (hook_name("resid_pre", 0), fn)


def restore(model, text, kind, layer, pos, under=()):
    """The state of the clean run, or of the run under some hooks, put in."""
    name, tokens = hook_name(kind, layer), torch.tensor([encode(model, text).ids])
    return put(kind, layer, capture(model, tokens, [name], hooks=under)[0][name][0], [pos])


@pytest.mark.slow_case("llama-bridge-")
@pytest.mark.parametrize("kind", ["resid_post", "mlp_out", "attn_out"])
def test_equals_the_loop(tiny, kind):
    score = {"metric": "answer_logprob"}
    sites = Sites(kind, window=1 if kind == "resid_post" else 2)
    draw = {"noise": NOISE, "samples": SAMPLES, "seed": SEED}
    result = trace(tiny, ASKED, SUBJECTS, sites, **draw, **score)
    std = NOISE * float(embedding(tiny).float().std())
    assert result.provenance["noise_std"] == pytest.approx(std)
    for i, text in enumerate(TEXTS):
        prompt = encode(tiny, text)
        span = positions(prompt, SUBJECTS[i])
        draws = list(noise_draws(tiny, prompt, span, std, SAMPLES, SEED))
        noises = [noise_hook(tiny, text, SUBJECTS[i], d) for d in draws]
        clean = run(tiny, text, answer=ANSWERS[i], **score)
        each_noisy = [run(tiny, text, [n], answer=ANSWERS[i], **score) for n in noises]
        noisy = np.mean(each_noisy)
        assert float(result["clean"][i]) == pytest.approx(clean, abs=1e-5)
        assert float(result["noisy"][i]) == pytest.approx(noisy, abs=1e-5)
        assert float(result["total"][i]) == pytest.approx(clean - noisy, abs=1e-5)
        error = np.std(each_noisy, ddof=1) / SAMPLES**0.5
        assert float(result["total_spread"][i]) == pytest.approx(error, abs=1e-5)
        noised = positions(encode(tiny, text), SUBJECTS[i])
        assert result["noised"][i].item() == " ".join(map(str, noised))
        for layer in range(3):
            blocks = [layer] if kind == "resid_post" else [b for b in (layer - 1, layer) if b >= 0]
            for pos in (0, 2, 6):
                hooks = [restore(tiny, text, kind, b, pos) for b in blocks]
                scores = [run(tiny, text, [n, *hooks], answer=ANSWERS[i], **score) for n in noises]
                got = result.data.sel(example=i, layer=layer, position=pos)
                assert float(got["score"]) == pytest.approx(np.mean(scores), abs=1e-5)
                assert float(got["indirect"]) == pytest.approx(np.mean(scores) - noisy, abs=1e-5)
                each = [s - n for s, n in zip(scores, each_noisy, strict=True)]
                spread = np.std(each, ddof=1) / SAMPLES**0.5
                assert float(got["spread"]) == pytest.approx(spread, abs=1e-5)


@pytest.mark.slow_case("llama-bridge-")
@pytest.mark.parametrize("cut", ["mlp", "attn"])
@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "attn_out", "mlp_out"])
def test_severed_equals_the_loop(tiny, cut, kind):
    text, subject, pos = TEXTS[0], SUBJECTS[0], 3
    # The whole of an answer of two tokens: its first is run behind the prompt.
    asked, metrics = Pairs(text, answer="w11 w12"), ["first_prob", "answer_logprob"]
    options = {"severed": ["none", cut], "samples": 1, "seed": SEED, "metric": metrics}
    result = trace(tiny, asked, subject, kind, **options)
    assert result["indirect"].dims == ("example", "severed", "layer", "position", "metric")
    std = 3.0 * float(embedding(tiny).float().std())
    prompt = encode(tiny, text)
    draw = next(noise_draws(tiny, prompt, positions(prompt, subject), std, 1, SEED))
    noise = noise_hook(tiny, text, subject, draw)
    held = {"mlp": "mlp_out", "attn": "attn_out"}[cut]
    # By the order of things in a block: attention reads resid_pre, the MLP what attention wrote.
    same_block = {"mlp": ("resid_pre", "attn_out"), "attn": ("resid_pre",)}[cut]
    for layer in range(3):
        restored = restore(tiny, text, kind, layer, pos)
        first = layer if kind in same_block else layer + 1
        holds = [restore(tiny, text, held, b, pos, [noise]) for b in range(first, 3)]
        for variant, hooks in (("none", []), (cut, holds)):
            for metric in metrics:
                changes = [noise, restored, *hooks]
                expected = run(tiny, text, changes, answer="w11 w12", metric=metric)
                cell = {"severed": variant, "layer": layer, "position": pos, "metric": metric}
                got = result["score"].sel(example=0, **cell)
                assert float(got) == pytest.approx(expected, abs=1e-5)


def test_identities(tiny):
    """All states restored is the clean run; nothing but the subject is noisy before block 0."""
    result = trace(tiny, ASKED, SUBJECTS, Sites(positions="all"), samples=2)
    assert np.allclose(result["effect"][:, 0], 1, atol=1e-3)
    each = trace(tiny, ASKED, SUBJECTS, Sites(layers=0), samples=2)
    for i, text in enumerate(TEXTS):
        span = positions(encode(tiny, text), SUBJECTS[i])
        others = [p for p in range(N) if p not in span]
        assert np.allclose(each["indirect"][i, 0, others], 0, atol=1e-6)
        assert np.abs(each["indirect"][i, 0, list(span)]).max() > 1e-4


def test_seeded_and_free_of_other_prompts(tiny):
    options = {"sites": Sites("resid_post", layers=1), "samples": 2, "metric": "first_logprob"}
    state = torch.get_rng_state()
    one = trace(tiny, ASKED, SUBJECTS, seed=1, **options)["score"]
    two = trace(tiny, ONE, SUBJECTS[0], seed=1, **options)["score"]
    three = trace(tiny, ONE, SUBJECTS[0], seed=2, **options)["score"]
    last = Pairs(TEXTS[-1], answer=ANSWERS[-1])
    four = trace(tiny, last, SUBJECTS[-1], seed=1, **options)["score"]
    assert np.allclose(one[0], two[0], atol=1e-6)
    assert np.allclose(one[-1], four[0], atol=1e-6)
    assert not np.allclose(two, three)
    assert torch.equal(state, torch.get_rng_state())
    alone = trace(tiny, ONE, SUBJECTS[0], samples=1)
    assert np.isnan(alone["spread"]).all()
    assert np.isnan(alone["total_spread"]).all()


def test_noise_that_moves_nothing_but_rounding_has_no_share(tiny):
    """A metric that never changes: the total effect is 0 within rounding."""
    with pytest.raises(ValueError, match="raise `noise`"):
        trace(tiny, TEXTS[0], SUBJECTS[0], metric=lambda x: 3 + 1e-6 * x[:, 0].tanh(), samples=2)


@pytest.mark.slow_case("llama-bridge")
def test_roles_for_unequal_prompts(tiny):
    texts = ["w1 w7 w8 w9", "w2 w22 w5 w9 w17 w18"]
    subjects = ["w7", "w22 w5"]
    roles = subject_roles(tiny, texts, subjects)
    assert roles == {
        "first subject token": [2, 2],
        "last subject token": [2, 3],
        "next token": [3, 4],
        "last token": [4, 6],
    }
    kinds = ["mlp_out", "attn_out"]
    asked = Pairs(texts, answer=["w11", "w13"])
    result = trace(tiny, asked, subjects, Sites(kinds, positions=roles), samples=2)
    alone = trace(tiny, asked.select([0]), "w7", kinds, samples=2)
    same = alone["indirect"].sel(position=4)[0]
    assert np.allclose(result["indirect"].sel(position="last token")[0], same, atol=1e-5)
    assert result.plot().data  # a panel per kind
    with pytest.raises(TokenError, match="no token comes after"):
        subject_roles(tiny, "w1 w2", "w2")


def test_refuses(tiny):
    for options, message in (
        ({"noise": 0.0}, "more than 0"),
        ({"noise": "s0"}, "more than 0"),
        ({"noise": "3 subjects"}, "such as 's3'"),
        ({"samples": 0}, "more than 0"),
        ({"severed": "norm"}, "severed is 'norm'"),
        ({"subject": "w77"}, "does not occur"),
        ({"sites": Sites("mlp_post", neurons=1)}, "not traced"),
        ({"subject": ["w7", "w8"]}, "2 of subject for 1"),
    ):
        arguments = {"subject": "w7", **options}
        with pytest.raises(ValueError, match=message):
            trace(tiny, ONE, **arguments)


def test_noise_in_units_of_the_subjects_embeddings(tiny):
    """As the published repository has it: all entries of the embeddings of all subjects' tokens."""
    ids = [int(word[1:]) + 4 for subject in SUBJECTS for word in subject.split()]
    std = 2.5 * float(embedding(tiny)[ids].std())
    rest = {"samples": 2, "seed": SEED}
    found = trace(tiny, ASKED, SUBJECTS, noise="s2.5", **rest)
    assert found.provenance["noise_std"] == pytest.approx(std)
    same = trace(tiny, ASKED, SUBJECTS, noise=std / float(embedding(tiny).std()), **rest)
    np.testing.assert_allclose(found["indirect"], same["indirect"], atol=1e-6)
