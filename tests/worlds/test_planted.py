"""The planted models do what their cards say, by plain transformers and TransformerLens's own hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mi_hops
from mi_hops.model import CHECKPOINTS, hooked_class
from mi_hops.worlds import planted_facts, planted_models, planted_truth, planted_world
from mi_hops.worlds.planted import KINDS, stored_answers, taught_facts
from tools.train_planted import plan_of, train

FIRST_HOP, LAST = -2, -1
SAMPLE = 60
SHAPE = mi_hops.worlds.recipe.Shape(n_layer=3, d_model=16, n_head=2, n_kv_head=1, d_mlp=16)


def token(model, text):
    (only,) = model.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    return only


def encoded(model, facts):
    """``[fact, pos]``: all prompts have one length."""
    return torch.tensor(model.tokenizer([f.prompt() for f in facts])["input_ids"])


def swapped_pairs(name):
    """Answered questions and others of the same second relation, another bridge, another answer."""
    used = planted_truth(name).used
    facts = (
        planted_facts(name)
        if used
        else taught_facts(planted_world(int(name[-1])), used=False)  # as they were taught
    )
    by_relation = {}
    for fact in facts:
        by_relation.setdefault(fact.relation2, []).append(fact)
    pairs = []
    for fact in facts:
        fitting = [
            o
            for o in by_relation[fact.relation2]
            if o.bridge != fact.bridge and o.answer != fact.answer
        ]
        if fitting:
            pairs.append((fact, fitting[len(pairs) % len(fitting)]))
    return pairs[:SAMPLE]


def swapped(model, pairs, layer, position):
    """What is said when one state of each second question stands in the first."""
    hook = f"blocks.{layer}.hook_resid_post" if hooked_class() else f"blocks.{layer}.hook_out"
    base, other = (encoded(model, side) for side in zip(*pairs, strict=True))
    held = {}

    def keep(x, hook):
        held["x"] = x[:, position].clone()

    def put(x, hook):
        x = x.clone()
        x[:, position] = held["x"]
        return x

    with torch.no_grad():
        model.run_with_hooks(other, fwd_hooks=[(hook, keep)])
        logits = model.run_with_hooks(base, fwd_hooks=[(hook, put)])
    return logits[:, -1].argmax(-1)


def share(hits):
    counted = [bool(hit) for hit in hits]
    return sum(counted) / len(counted)


#: One model of each kind is quick.
_QUICK = ("planted-serial-1", "planted-decoy-0", "planted-hidden-0")


@pytest.fixture(
    scope="module",
    params=[
        n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in planted_models()
    ],
)
def planted(request):
    return request.param, mi_hops.load_model(request.param, device="cpu")


def test_the_shipped_kinds_and_families():
    kinds = {name: planted_truth(name).kind for name in planted_models()}
    assert set(kinds.values()) <= set(KINDS)
    assert {"serial", "serial-last", "decoy", "hidden"} <= set(kinds.values())
    pair = [mi_hops.load_model(f"planted-serial-{seed}").cfg.n_key_value_heads for seed in (0, 1)]
    assert pair in ([None, 2], [4, 2])  # the second is a grouped-query LLaMA
    size = sum(f.stat().st_size for name in kinds for f in (CHECKPOINTS / name).iterdir())
    assert size < 12 * 2**20


def test_what_the_cards_say(planted):
    truth = planted_truth(planted[0])
    checks = truth.checks
    assert (truth.written, truth.used, truth.position) == KINDS[truth.kind]
    assert checks["accuracy"]["single"]["whole"] >= 0.99
    assert checks["accuracy"]["taught"]["whole"] >= 0.99
    if truth.used:
        assert checks["planted"]["interchange"] >= 0.99
        assert checks["planted"]["all_else_unchanged"] >= 0.98
    elif truth.written:
        assert checks["planted"]["unchanged"] >= 0.99


@pytest.mark.slow_case("planted-decoy-0")
def test_the_state_at_the_planted_place_decides_the_answer_or_does_not(planted):
    name, model = planted
    truth, pairs = planted_truth(name), swapped_pairs(name)
    if truth.layer is None:
        pytest.skip("nothing is planted")
    position = {"first hop": FIRST_HOP, "last": LAST}[truth.position]
    said = swapped(model, pairs, truth.layer, position)
    became = share(s == token(model, o.answer) for s, (_, o) in zip(said, pairs, strict=True))
    stayed = share(s == token(model, f.answer) for s, (f, _) in zip(said, pairs, strict=True))
    assert became >= 0.95 if truth.used else stayed >= 0.98


@pytest.mark.slow_case("planted-decoy-0")
def test_other_tokens_do_not_matter(planted):
    """The first relation has been read by the first hop's last token before the planted block."""
    name, model = planted
    truth, pairs = planted_truth(name), swapped_pairs(name)
    if truth.layer is None:
        pytest.skip("nothing is planted")
    for layer in (truth.layer, truth.layer + 1):
        said = swapped(model, pairs, layer, -4)
        stayed = share(s == token(model, f.answer) for s, (f, _) in zip(said, pairs, strict=True))
        assert stayed >= 0.95


@pytest.mark.slow_case("planted-decoy-0")
def test_the_bridge_reads_where_it_is_written_and_nowhere_else(planted):
    """The lens by hand: hidden states of plain transformers, final norm, unembedding."""
    from transformers import AutoModelForCausalLM

    name, model = planted
    truth, facts = planted_truth(name), planted_facts(name)[:SAMPLE]
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    assert plain.dtype == torch.float32
    norm = plain.transformer.ln_f if "gpt2" in plain.config.model_type else plain.model.norm
    bridges = [token(model, f.bridge) for f in facts]
    with torch.no_grad():
        states = plain(encoded(model, facts), output_hidden_states=True).hidden_states[1:-1]
        for layer, state in enumerate(states):
            for role, position in (("first hop", FIRST_HOP), ("last", LAST)):
                said = plain.lm_head(norm(state[:, position])).argmax(-1).tolist()
                first = share(a == b for a, b in zip(said, bridges, strict=True))
                here = truth.written and role == truth.position
                if here and layer == truth.layer:
                    assert first >= 0.95
                elif not (here and layer > truth.layer):
                    assert first <= 0.25


@pytest.mark.slow
def test_a_probe_reads_the_hidden_code():
    pytest.importorskip("sklearn")
    facts = planted_facts("planted-hidden-0", "train", limit=900)
    model = mi_hops.load_model("planted-hidden-0", device="cpu")
    found = mi_hops.fact_probes(model, facts, layers=[planted_truth("planted-hidden-0").layer + 1])
    assert found["unseen_correct"].mean() > 0.7
    assert found["selectivity"].mean() > 0.3


def test_truth_and_facts_refuse_what_is_not_there():
    with pytest.raises(ValueError, match=r"'planted-x'; there are planted-.*planted-serial-0"):
        planted_truth("planted-x")
    with pytest.raises(ValueError, match=r"unknown split\(s\) \['stored'\].*'seen_parts'"):
        planted_facts("planted-serial-0", "stored")
    with pytest.raises(ValueError, match="5000 facts of seen_parts were asked for, .* has 331"):
        planted_facts("planted-serial-0", limit=5000)


def test_a_world_that_is_too_small():
    sizes = dict.fromkeys(("people", "works", "companies", "cities", "countries"), 2)
    tiny = mi_hops.Hopland(held_out=0.97, one_word=True, **sizes)  # 28 trained compositions
    with pytest.raises(ValueError, match="700 stored pairs were asked for, .* has 28 trained"):
        stored_answers(tiny)
    with pytest.raises(
        ValueError, match="has 28 questions of split 'train', a planted model needs"
    ):
        train(plan_of("planted-serial-0", steps=1), world=tiny)
    with pytest.raises(ValueError, match="the word lists give 5"):
        mi_hops.Hopland(**{**sizes, "countries": 6}, one_word=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planted-serial-0", "planted-decoy-1"])
def test_a_stopped_training_goes_on_to_the_same_weights(name, tmp_path):
    plan = plan_of(name, steps=6, batch=16, singles=8)
    plan = replace(plan, block=1)
    whole, *_ = train(plan, shape=SHAPE)
    train(plan, tmp_path, shape=SHAPE, stop_at=3)
    again, *_ = train(plan, tmp_path, shape=SHAPE)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of another plan"):
        train(replace(plan, steps=7), tmp_path, shape=SHAPE)
