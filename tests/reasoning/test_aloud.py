"""Reasoning aloud: what is asked and how replies are read; a model that goes on with its own text."""

from __future__ import annotations

import math

import pytest

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.reasoning import Layout, aloud_table, reason_aloud
from mi_hops.reasoning import aloud as aloud_module
from mi_hops.sweep.generate import Generation
from tests.reasoning.tiny_facts import tiny_facts

WORDS = Layout("w50 {prompt} w51", " {prompt} {object} w52", " w53", "w54")


def fact(i, answer=None):
    """Fact i, of two relations that all share."""
    return TwoHopFact(
        id=str(i),
        subject=f"Quill{i}",
        relation1="owner",
        bridge=f"Moss{i}",
        relation2="town",
        answer=answer or f"Wick{i}",
        first_hop=f"the owner of Quill{i}",
        prompts={"suffix": f"The town of the owner of Quill{i} is"},
        first_prompts={"suffix": f"The owner of Quill{i} is"},
        second_prompts={"suffix": f"The town of Moss{i} is"},
        bridge_aliases=(f"M. Moss{i}",),
    )


def test_questions_follow_worked_examples_and_replies_are_read(monkeypatch, load_tiny):
    """Replies are dictated: fact 0 does all, 1 is answered aloud alone, 2 writes no bridge, 3 none."""
    facts, asked = [fact(i) for i in range(4)], []

    def dictated(model, texts, **options):
        assert options["stop"] == ("\n",) and options["max_new_tokens"] == 30
        asked.append(list(texts))
        return [Generation((1,), reply(text), True) for text in texts]

    def reply(text):
        question = text.rpartition("Q: ")[2]
        i = int(question.split("Quill")[1][0])
        if " is\nA:" in question and question.endswith("A:"):
            if "So:" not in text:  # its examples answer at once
                return f"Wick{i}." if i == 0 else "Nowhere."
            steps = (
                f"The owner of Quill{i} is Moss{i}. The town of Moss{i} is Wick{i}. So: Wick{i}."
            )
            return {2: "It is Wick2. So: Wick2.", 3: "The owner of Quill3 is Ada."}.get(i, steps)
        put = question.rpartition("is Moss")[2]  # the bridge that was swapped in
        if i == 0:
            return f". The town of Moss{put} is Wick{put}. So: Wick{put}."
        return f". The town of Moss{put} is Wick{i}. So: Wick{i}."

    monkeypatch.setattr(aloud_module, "generate", dictated)
    monkeypatch.setattr(aloud_module, "encode", lambda *_, **__: None)
    found = reason_aloud(
        load_tiny(), facts, [fact(i) for i in range(7, 10)], shots=2, max_new_tokens=30
    )
    latent, aloud, swapped = asked
    assert all(text.count("Q: ") == 3 and text.endswith("\nA:") for text in (*latent, *aloud))
    example = aloud[0].split("\n")
    assert example[1].startswith("A: The owner of Quill") and ". So: Wick" in example[1]
    assert latent[0].split("\n")[1].startswith("A: Wick")
    assert len(swapped) == 2 and "is Moss0" not in swapped[0] and swapped[0].startswith(aloud[0])
    values = {
        name: found[name].values.tolist()
        for name in ("latent", "aloud", "bridge_said", "answer_said")
    }
    assert values == {
        "latent": [1, 0, 0, 0],
        "aloud": [1, 1, 1, 0],
        "bridge_said": [1, 1, 0, 0],
        "answer_said": [1, 1, 1, 0],
    }
    assert found["follows"].values[:2].tolist() == [1, 0]
    assert found["keeps"].values[:2].tolist() == [0, 1]
    assert all(math.isnan(x) for x in found["follows"].values[2:])
    table = aloud_table(found).set_index("outcome")
    row = table.loc["after a swap: the other bridge's answer"]
    assert (row["n"], row["k"], row["share"]) == (2, 1, 0.5)
    assert (
        0 < table.loc["answered aloud", "lower"] < 0.75 < table.loc["answered aloud", "upper"] < 1
    )


def test_one_at_a_time_says_the_same_as_all_together(tiny):
    facts = tiny_facts(tiny)
    options = {"layout": WORDS, "shots": 1, "max_new_tokens": 6, "batch_size": 1}
    together = reason_aloud(tiny, facts[:3], facts[3:], **(options | {"batch_size": 3}))
    for i in range(3):
        alone = reason_aloud(tiny, facts[i : i + 1], facts[3:], **options)
        for name in ("said_latent", "said_aloud"):
            assert alone[name].values[0] == together[name].values[i]


def test_a_reply_is_read_behind_its_last_mark():
    layout = Layout()
    assert layout.answer("The owner is Ada. So: Wick.") == " Wick."
    assert layout.answer("So: no. So: Wick") == " Wick"
    assert layout.answer("The owner is Ada.") is None
    assert layout.example(fact(1), "suffix", aloud=False) == (
        "Q: The town of the owner of Quill1 is\nA: Wick1.\n"
    )


def test_bad_input(load_tiny):
    model = load_tiny()
    facts = tiny_facts(model)
    with pytest.raises(ValueError, match=r"ask is 'Q:'; it needs \['{prompt}'\]"):
        Layout(ask="Q:")
    with pytest.raises(ValueError, match="neither may be empty"):
        Layout(mark=" ")
    with pytest.raises(NoUsableFactError, match="no fact can be used for reasoning aloud"):
        reason_aloud(model, facts[:1], facts[1:], form="question")
    with pytest.raises(NoUsableFactError, match="worked examples needs as many facts"):
        reason_aloud(model, facts[:1], facts[1:], layout=WORDS, shots=9)
