"""Every kind of sweep against one forward pass per cell, in every precision that is promised.

What the documentation states of exactness is what these tests assert.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from mi_hops.model import capture, embedding, hook_name, n_heads_of
from mi_hops.patching import ablate, patch, path_patch, trace
from mi_hops.patching.nodes import read_hooks, readers, writers
from mi_hops.patching.tracing import noise_draws
from mi_hops.sweep import Pairs, Sites
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.text.tokens import encode, positions
from tests.patching.loops import ALL, ANSWERS, PAIRS, WRONGS, changed, put, run, source, write
from tests.patching.test_tracing import noise_hook

#: Class, dtype, and how far a sweep may be from the loop, in the unit of the metric. The Bridge
#: computes parts in float32 whatever the model's dtype: as a rule rows round alike there, but they need
#: not.
PRECISIONS = [
    ("hooked", "float32", 1e-5),
    ("bridge", "float32", 1e-5),
    ("hooked", "float64", 1e-10),
    ("bridge", "float64", 1e-6),
]

#: Prompts of one length, and a metric that appends nothing; prompts of unequal lengths, and one that
#: appends answers of unequal lengths.
BATCHES = {
    "unpadded": (PAIRS, "logit_diff"),
    "padded": (
        [("w5 w6 w7", "w9 w6 w8"), PAIRS[1], ("w2 w22 w5 w9 w17", "w3 w22 w6 w9 w50")],
        "answer_logprob",
    ),
}

NEURONS = [1, 30]


MODELS = [(shape, *p) for shape in ("gpt2", "llama") for p in PRECISIONS]


def on_models(*axes):
    """Each case on four of the eight models: every pair of family, class and dtype once.

    One of them is quick, so that each model has its share of the cases; the other three are slow.
    """
    cases = list(product(*axes))
    params = []
    for c, case in enumerate(cases):
        quick = (3 * c + c // 2) % len(MODELS)
        for differs in (0b000, 0b011, 0b101, 0b110):  # in two of the three
            model = MODELS[quick ^ differs]
            name = "-".join(map(str, (*model[:3], *case)))
            params.append(
                pytest.param(model, *case, id=name, marks=pytest.mark.slow if differs else ())
            )
    return params


@pytest.fixture
def precise(request, load_tiny):
    """A model, and how to compare a sweep on it with the loop."""
    shape, backend, dtype, tolerance = request.param
    model = load_tiny(shape, backend, dtype)
    return model, lambda expected: pytest.approx(expected, rel=0, abs=tolerance)


def precisely(names, *axes):
    """Run a test on every case and model, with the fixture `precise`."""
    return pytest.mark.parametrize(f"precise,{names}", on_models(*axes), indirect=["precise"])


def units_of(model, kind, of="each"):
    """What lies on the innermost axis of a result, as arguments of `put`."""
    if of == "neurons":
        return [{"neuron": n} for n in NEURONS]
    whole = of == "all" or HEAD_AXIS[kind] is None
    return [{"head": h} for h in ([None] if whole else range(n_heads_of(model, kind)))]


#: Kinds of activation, and what of them is swept.
SWEEPS = [
    *((kind, "each") for kind in HEAD_AXIS),
    *((kind, "all") for kind, axis in HEAD_AXIS.items() if axis is not None),
    *((kind, "neurons") for kind in ("mlp_pre", "mlp_post")),
]


@pytest.mark.slow_case("float64", "gpt2-bridge", "llama-hooked")
@precisely("sweep,batch", SWEEPS, BATCHES)
def test_patching(precise, sweep, batch):
    model, near = precise
    kind, of = sweep
    pairs, metric = BATCHES[batch]
    pairs, layers = pairs[:2], [0, 2]
    sites = Sites(
        kind,
        layers=layers,
        positions={"late": -2, "all but BOS": slice(1, None)},
        heads="all" if of == "all" else None,
        neurons=NEURONS if of == "neurons" else None,
    )
    sides = {"clean": [c for c, _ in pairs], "corrupted": [c for _, c in pairs]}
    asked = Pairs(**sides, answer=ANSWERS[:2], wrong=WRONGS[:2])
    found = patch(model, asked, sites, metric=metric)["score"]
    units = units_of(model, kind, of)
    assert found.size == 2 * 2 * 2 * len(units)
    for i, (clean, corrupted) in enumerate(pairs):
        score = {"answer": ANSWERS[i], "wrong": WRONGS[i], "metric": metric}
        n = len(encode(model, clean))
        for at, layer in enumerate(layers):
            value = source(model, clean, kind, layer)
            for s, span in enumerate(([n - 2], range(1, n))):
                for got, unit in zip(found[i, at, s].values.flat, units, strict=True):
                    hook = put(kind, layer, value, span, **unit)
                    assert float(got) == near(run(model, corrupted, [hook], **score)), unit


def replacements(how, values, i, kind):
    """What may stand in for a prompt's activation, and at which of its positions."""
    own = values[i]
    if how == "zero":
        return [(own * 0, -2)]
    if how == "mean":
        return [(torch.cat([v[1:] for v in values]).mean(0).expand_as(own), -2)]
    if how == "resample":  # two draws of two others: both
        return [(v, -2) for j, v in enumerate(values) if j != i]
    if HEAD_AXIS[kind] == 1:
        return [(torch.stack(values).mean(0), -2)]
    return [(torch.stack([v[-2] for v in values]).mean(0).expand_as(own), -2)]


@pytest.mark.slow_case("float64", "gpt2-bridge", "llama-hooked")
@precisely("kind,batch", HEAD_AXIS, BATCHES)
def test_ablation(precise, kind, batch):
    model, near = precise
    pairs, metric = BATCHES[batch]
    texts, layer = [clean for clean, _ in pairs], 1
    values = [source(model, text, kind, layer) for text in texts]
    hows = ["zero", "mean", "position_mean", "resample"]
    if kind == "pattern":  # no mean over rows of unequal lengths, nor other prompts' of any
        hows = ["zero"] if batch == "padded" else ["zero", "position_mean", "resample"]
    units = units_of(model, kind)
    for how in hows:
        result = ablate(
            model,
            Pairs(texts, answer=ANSWERS, wrong=WRONGS),
            Sites(kind, layers=layer, positions=-2),
            how=how,
            samples=2 if how == "resample" else 1,
            metric=metric,
        )
        for i, text in enumerate(texts):
            score = {"answer": ANSWERS[i], "wrong": WRONGS[i], "metric": metric}
            here = len(encode(model, text)) - 2
            for got, unit in zip(result["score"][i, 0].values.flat, units, strict=True):
                expected = [
                    run(model, text, [put(kind, layer, v, [here], take=[at], **unit)], **score)
                    for v, at in replacements(how, values, i, kind)
                ]
                assert float(got) == near(np.mean(expected)), (how, unit)
            assert float(result["intact"][i]) == near(run(model, text, **score))


@precisely("kind", HEAD_AXIS)
def test_tracing(precise, kind):
    """One prompt at a time, so that only its answer is appended."""
    model, near = precise
    text, subject, seed = PAIRS[0][0], "w7 w8", 4
    score = {"answer": "w11 w12", "metric": "answer_logprob"}
    asked, sites = Pairs(text, answer="w11 w12"), Sites(kind, positions=[2, 6])
    found = trace(model, asked, subject, sites, samples=1, seed=seed, metric="answer_logprob")
    std = 3.0 * float(embedding(model).float().std())
    prompt = encode(model, text)
    draw = next(noise_draws(model, prompt, positions(prompt, subject), std, 1, seed))
    noise = noise_hook(model, text, subject, draw)
    for layer in range(3):
        value = source(model, text, kind, layer)
        for p, pos in enumerate((2, 6)):
            for got, unit in zip(
                found["score"][0, layer, p].values.flat, units_of(model, kind), strict=True
            ):
                hooks = [noise, put(kind, layer, value, [pos], **unit)]
                assert float(got) == near(run(model, text, hooks, **score)), unit


def path(model, pair, sender, receiver, score):
    """Two passes: what the reader makes of its changed input, and the base run with that put in."""
    clean, corrupted = pair
    change = write(model, clean, sender) - write(model, corrupted, sender)
    n = len(change)

    def moved(x):
        return torch.cat([x[:, :n] + change, x[:, n:]], 1)

    if receiver.role == "logits":
        return run(model, corrupted, [(hook_name("resid_post", 2), moved)], **score)
    entry, name = read_hooks(receiver)
    tokens = torch.tensor([encode(model, corrupted).ids])
    before = [(hook_name(entry, receiver.layer), moved)]
    value = capture(model, tokens, [name], hooks=before)[0][name][0]
    kind = "mlp_out" if receiver.role == "mlp" else receiver.role
    hook = put(kind, receiver.layer, value, range(n), receiver.head)
    return run(model, corrupted, [hook], **score)


@pytest.mark.slow_case("float64", "gpt2-bridge", "llama-hooked")
@pytest.mark.parametrize("precise", MODELS, ids=lambda p: "-".join(p[:3]), indirect=True)
def test_paths(precise):
    model, near = precise
    score = {"answer": ANSWERS[2], "metric": "answer_logprob"}
    senders = ["embed", "L0H1", "ATTN0", "MLP0", "L1H3", "MLP2"]
    receivers = ["L1H2.q", "L1H1.k", "L2H0.v", "MLP1", "MLP2", "logits"]
    pair = changed(ALL, wrong=None).select([2])
    found = path_patch(model, pair, senders, receivers, metric="answer_logprob")["score"]
    checked = 0
    for u in writers(model, senders):
        for v in readers(model, receivers):
            got = float(found.sel(sender=u.name, receiver=v.name)[0])
            if u.reaches(v):
                assert got == near(path(model, PAIRS[2], u, v, score)), (u.name, v.name)
                checked += 1
            else:
                assert np.isnan(got)
    assert checked == 29
