"""Where answers are settled: places in dictated replies, read as plain transformers read them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mi_hops.lens import TunedLens
from mi_hops.reasoning import aloud as aloud_module
from mi_hops.reasoning import aloud_commitment, commitment_table, reason_aloud
from mi_hops.sweep.generate import Generation
from mi_hops.text.tokens import encode
from tests.lens.test_order import tops
from tests.reasoning.test_aloud import WORDS
from tests.reasoning.tiny_facts import tiny_facts


@pytest.fixture
def dictated(monkeypatch):
    """`reason_aloud` on four tiny facts; 0 says all, 1 and 2 all but the answer, 3 no mark."""

    def ask(model):
        facts = [replace(fact, answer=f"w{76 + i}") for i, fact in enumerate(tiny_facts(model))]
        said = [
            f"w10 {facts[0].bridge} w52 w11 {facts[0].answer} w52 w53 {facts[0].answer}",
            "w10 w52 w11 w80 w52 w53 w80",
            "w10 w53 w81",
            "w10 w11 w12",
        ]
        replies = iter([["w80"] * 4, said, ["w12"]])
        monkeypatch.setattr(
            aloud_module,
            "generate",
            lambda *_, **__: [Generation((1,), text, True) for text in next(replies)],
        )
        options = {"layout": WORDS, "shots": 1, "max_new_tokens": 6}
        return facts, reason_aloud(model, facts[:4], facts[4:], **options)

    return ask


@pytest.mark.slow_case("bridge-gpt2", "hooked-llama")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_each_place_is_read_as_plain_transformers_read_it(
    dictated, load_tiny, checkpoints, shape, backend
):
    model = load_tiny(shape, backend)
    facts, found = dictated(model)
    settled = aloud_commitment(model, found)
    assert settled["way"].values.tolist() == ["latent", "written", "aloud"]
    places = {
        (i, "latent"): found["asked_latent"].values[i] for i in range(4)
    } | {(i, "aloud"): f"{found['asked_aloud'].values[i]} {tail}" for i, tail in enumerate((
        f"w10 {facts[0].bridge} w52 w11 {facts[0].answer} w52 w53", "w10 w52 w11 w80 w52 w53", "w10 w53",
    ))}  # fmt: skip
    places[0, "written"] = f"{found['asked_aloud'].values[0]} w10 {facts[0].bridge} w52 w11"
    for i in range(4):
        for j, way in enumerate(settled["way"].values):
            layer, token = settled["layer"].values[i, j], settled["token"].values[i, j]
            if (i, way) not in places:
                assert math.isnan(layer) and token == ""
                continue
            top = tops(checkpoints[shape], encode(model, places[i, way]).ids)
            assert layer == next(k for k in range(4) if set(top[k:]) == {top[-1]})
            assert token == model.tokenizer.decode([top[-1]])
    # An untrained tuned lens is the logit lens; one row a batch is as all together.
    for options in ({"lens": TunedLens(model)}, {"batch_size": 1}):
        again = aloud_commitment(model, found, **options)
        assert (again["layer"].fillna(-1) == settled["layer"].fillna(-1)).all()
    ends = aloud_commitment(model, found, layers=[0])["layer"].values
    assert set(ends[~(ends != ends)].tolist()) <= {0.0, 3.0}


def test_the_table_counts_ways_and_replies(dictated, load_tiny):
    model = load_tiny()
    settled = aloud_commitment(model, dictated(model)[1])
    settled.data["layer"][:] = [
        [3, 1, 2],
        [3, math.nan, 3],
        [1, math.nan, 1],
        [1, math.nan, math.nan],
    ]
    settled.data["correct"][:] = [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    table = commitment_table(settled).set_index(["way", "replies"])
    assert table.loc[("latent", "all"), ["n", "layer"]].tolist() == [4, 2]
    assert table.loc[("latent", "answered"), ["n", "layer"]].tolist() == [2, 3]
    assert table.loc[("latent", "answered - not answered"), ["n", "layer"]].tolist() == [2, 2]
    assert table.loc[("aloud", "not answered"), ["n", "layer"]].tolist() == [2, 2]
    assert table.loc[("aloud - latent", "all"), ["n", "layer"]].tolist() == [
        3,
        pytest.approx(-1 / 3),
    ]
    row = table.loc[("written", "all")]
    assert (row["n"], row["layer"]) == (1, 1) and math.isnan(row["lower"])
    assert table.loc[("written", "not answered"), "n"] == 0


def test_bad_input(dictated, load_tiny):
    model = load_tiny()
    settled = aloud_commitment(model, dictated(model)[1])
    with pytest.raises(ValueError, match="no questions asked aloud; make it with reason_aloud"):
        aloud_commitment(model, settled)
    with pytest.raises(ValueError, match="no layers by way; make it with aloud_commitment"):
        commitment_table(dictated(model)[1])
