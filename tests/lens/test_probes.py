"""Probes find what is linearly there, and control tasks what can be memorised."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens import ProbeTraining, fact_probes
from mi_hops.lens.probes import control_labels, split_types

pytest.importorskip("sklearn")


def facts(n_subjects=12, n_second=6, bridges=4):
    """First hop "w3 of w{s}" leads to bridge s mod `bridges`; several second hops each."""
    return [
        TwoHopFact(
            id=f"{s}-{q}",
            subject=f"w{s}",
            relation1="r",
            bridge=f"w{60 + s % bridges}",
            relation2=f"q{q}",
            answer=f"w{70 + q}",
            first_hop=f"w3 of w{10 + s}",
            prompts={"suffix": f"w1 w{30 + q} w3 of w{10 + s} is"},
        )
        for s in range(n_subjects)
        for q in range(n_second)
    ]


def test_what_the_position_holds_is_read_and_memorised_alike(load_tiny):
    # At the embedding the first hop's last token is the subject's own: its label can only be
    # memorised, the bridge's as well as the control's; a new subject's is unknown.
    result = fact_probes(load_tiny("llama"), facts(), layers=[0])
    assert result["correct"].mean() == 1 and result["control_correct"].mean() == 1
    assert result["selectivity"].mean() == 0
    assert result["unseen_correct"].mean() < 0.8
    assert result["majority"].mean() < 0.6
    unseen = {f.id: f.bridge for f in facts()}
    right = [unseen[i] for i in result["unseen_example"].values[result["unseen_majority"] == 1]]
    assert len(set(right)) <= 1 and result["unseen_majority"].dims == ("unseen_example",)


def test_a_label_that_is_linearly_there_is_read_for_unseen_types_too(load_tiny):
    # At the embedding the last token of a first hop tells the bridge and nothing else of the phrase:
    # a phrase never met is read as well as any, and what is random about it cannot be learnt.
    made = []
    for f in facts():
        hop = f"w{10 + int(f.subject[1:])} of {f.bridge}"
        made.append(
            replace(f, first_hop=hop, prompts={"suffix": f.prompt().replace(f.first_hop, hop)})
        )
    result = fact_probes(load_tiny("llama"), made, layers=[0])
    assert result["correct"].mean() == 1 and result["unseen_correct"].mean() == 1
    assert result["unseen_majority"].mean() < 0.6
    assert result["control_correct"].mean() < 0.8 and result["selectivity"].mean() > 0.2


def test_the_last_token_of_the_embedding_tells_nothing(load_tiny):
    result = fact_probes(load_tiny("llama"), facts(), layers=[0, 3], role="last")
    at_start = result["correct"].sel(layer=0)
    assert np.isclose(at_start.mean(), result["majority"].mean())
    assert result["correct"].sel(layer=3).mean() > at_start.mean()


def test_every_layer_gets_its_interval_and_skips_are_told(load_tiny):
    made = [
        *facts(),
        facts()[0].__class__(
            **{
                **facts()[0].__dict__,
                "id": "rare",
                "bridge": "w80",
                "first_hop": "w3 of w9",
                "prompts": {"suffix": "w3 of w9"},
            }
        ),
    ]
    result = fact_probes(load_tiny(), made, layers=[1, 2], training=ProbeTraining(n_controls=2))
    interval = result.ci(variable="selectivity")
    assert interval["estimate"].dims == ("layer",)
    assert result.skipped == [("rare", "label with fewer than 3 facts")]
    again = fact_probes(load_tiny(), made, layers=[1, 2], training=ProbeTraining(n_controls=2))
    assert np.array_equal(result["correct"], again["correct"])


def test_the_split_keeps_types_apart():
    types = [f"t{i % 20}" for i in range(200)]
    train, test, unseen = split_types(types, np.random.default_rng(0))
    assert sorted([*train, *test, *unseen]) == list(range(200))
    assert {types[i] for i in test} <= {types[i] for i in train}
    assert not {types[i] for i in unseen} & {types[i] for i in train}
    with pytest.raises(ValueError, match="the split leaves 0 training"):
        split_types(["t"] * 9, np.random.default_rng(0))


def test_control_labels_are_fixed_for_a_type_and_as_frequent():
    types = [f"t{i % 20}" for i in range(100)]
    labels = [f"l{i % 20 % 4}" for i in range(100)]
    control = control_labels(types, labels, np.random.default_rng(1))
    table = dict(zip(types, control, strict=True))
    assert [table[t] for t in types] == control.tolist()
    assert sorted(control.tolist()) == sorted(labels)
    assert control.tolist() != labels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"role": "middle"}, "role is 'middle'"),
        ({"kind": "result"}, "whole activations"),
        ({"training": ProbeTraining(min_count=100)}, "0 left"),
        ({"label": lambda f: f.answer}, "has the labels"),
        ({"form": "question"}, r"no fact can be used for a probe \(72: "),
        ({"layers": [9]}, "0..3"),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        fact_probes(load_tiny(), facts(), **settings)


def test_a_probe_needs_a_control():
    with pytest.raises(ValueError, match="at least one control task"):
        ProbeTraining(n_controls=0)


def test_without_the_library_the_extra_is_named(load_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'mi-hops\[probes\]'"):
        fact_probes(load_tiny(), facts(), layers=[0])
