"""Corpora: nothing lost, nothing reordered, never more than one batch held."""

from __future__ import annotations

import json

import pytest
import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.text.corpus import fact_texts, token_batches

BOS = 1


def fact(i):
    return TwoHopFact(
        id=f"f{i}",
        subject=f"w{i}",
        relation1="r",
        bridge=f"w{i + 1}",
        relation2="s",
        answer=f"w{i + 2} w{i + 3}",
        first_hop=f"r of w{i}",
        prompts={"suffix": f"s of r of w{i} is", "prefix": f"r of w{i} has s"},
        first_prompts={"suffix": f"r of w{i} is"},
        second_prompts={"suffix": f"s of w{i + 1} is"},
    )


def words(i, n):
    return " ".join(f"w{(i + k) % 80}" for k in range(n))


def pieces(batches):
    """The rows without padding."""
    return [
        row[:n].tolist()
        for batch in batches
        for row, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    ]


def ids(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def model(load_tiny):
    return load_tiny("llama")


def test_every_token_once_in_order_within_the_bound(tiny):
    texts = [words(i, 1 + (7 * i) % 23) for i in range(40)]
    batches = list(token_batches(tiny, texts, max_tokens=64, max_length=10))
    assert all(b.tokens.numel() <= 64 and b.tokens.shape[1] <= 10 for b in batches)
    rows = pieces(batches)
    assert all(r[0] == BOS and BOS not in r[1:] for r in rows)
    assert sum((r[1:] for r in rows), []) == sum((ids(tiny, t) for t in texts), [])
    # a text ends where its pieces end: no piece holds two texts
    want = [[BOS, *ids(tiny, t)[k : k + 9]] for t in texts for k in range(0, len(ids(tiny, t)), 9)]
    assert rows == want
    again = list(token_batches(tiny, texts, max_tokens=64, max_length=10))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))
    mask = torch.cat([b.mask.flatten() for b in batches])
    assert int(mask.sum()) == sum(map(len, rows))


def test_the_context_is_the_default_length(model):
    rows = pieces(token_batches(model, [words(0, 150)]))
    assert [len(r) for r in rows] == [64, 64, 25]
    rows = pieces(token_batches(model, [words(0, 150)], max_tokens=40))
    assert [len(r) for r in rows] == [40, 40, 40, 34]


def test_streams(model):
    taken = []

    def endless():
        i = 0
        while True:
            taken.append(i)
            yield words(i, 5)
            i += 1

    stream = token_batches(model, endless(), max_tokens=60)
    assert not taken
    for n in (1, 2, 3):
        assert next(stream).tokens.shape == (10, 6)
        assert len(taken) == 10 * n + 1  # one ahead: it did not fit


def test_files(model, tmp_path):
    texts = [words(i, 4) for i in range(3)]
    want = pieces(token_batches(model, texts))
    plain = tmp_path / "corpus.txt"
    plain.write_text("\n\n".join(texts) + "\n  \n", encoding="utf-8")
    lines = tmp_path / "corpus.jsonl"
    records = [{"text": t, "id": i} for i, t in enumerate([*texts, " "])]
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    assert pieces(token_batches(model, plain)) == want
    assert pieces(token_batches(model, str(lines))) == want
    for bad, message in (('{"text": 3}', "no string under the key 'text'"), ("[1", "is not")):
        lines.write_text(json.dumps(records[0]) + "\n" + bad)
        with pytest.raises(ValueError, match=rf"line 2 of corpus.jsonl.*{message}"):
            list(token_batches(model, lines))
    with pytest.raises(ValueError, match="'w1 w2' is not a file.*in a list"):
        token_batches(model, "w1 w2")
    with pytest.raises(ValueError, match="is not a file"):
        token_batches(model, "w1 " * 3000)


def test_facts_become_statements(model):
    facts = [fact(0), fact(10)]
    assert list(fact_texts(facts[:1])) == [
        "r of w0 is w1.",
        "s of w1 is w2 w3.",
        "s of r of w0 is w2 w3.",
        "r of w0 has s w2 w3.",
    ]
    assert list(fact_texts(facts, ["second"])) == ["s of w1 is w2 w3.", "s of w11 is w12 w13."]
    assert list(fact_texts(facts, ("two_hop", "first")))[:3] == [
        "s of r of w0 is w2 w3.",
        "r of w0 has s w2 w3.",
        "r of w0 is w1.",
    ]
    as_facts = pieces(token_batches(model, iter(facts)))
    assert as_facts == pieces(token_batches(model, fact_texts(facts)))
    for wrong in ((), ("third",), "first"):
        with pytest.raises(ValueError, match="expected one or more of"):
            fact_texts(facts, wrong)


def test_empty_and_contradictory(model, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for empty in ([], ["", "  "], iter(()), tmp_path / "empty.txt"):
        with pytest.raises(ValueError, match="the corpus is empty"):
            list(token_batches(model, empty))
    with pytest.raises(ValueError, match="got int: 3"):
        list(token_batches(model, [3]))
    for limits in ({"max_length": 65}, {"max_length": 1}, {"max_tokens": 8, "max_length": 9}):
        with pytest.raises(ValueError, match="max_length must be at least 2 and at most"):
            token_batches(model, ["w1"], **limits)
    with pytest.raises(ValueError, match="must be at least 2"):
        token_batches(model, ["w1"], max_tokens=1)
