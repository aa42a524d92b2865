"""ROME: the rank-one identity, the search, and independence of the facts in a batch."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.editing import Request, second_moments
from mi_hops.editing.baselines import FineTuneRepair, GraceRepair
from mi_hops.editing.baselines.rome import (
    RomeRepair,
    ValueSearch,
    rome,
    rome_many,
    search_values,
    teach_requests,
)
from mi_hops.editing.request import key_position
from mi_hops.editing.teaching import answer_loss, last_logp, teacher_forced
from mi_hops.facts.templates import capitalise
from mi_hops.model import capture, hook_name
from mi_hops.model.numeric import kl_divergence
from mi_hops.sweep.repair import Repair
from mi_hops.text.tokens import encode, last_position
from tests.editing.conftest import TEMPLATES, assert_same_bits, of_lengths, weights
from tests.editing.test_creme import last_mean

QUICK = {"templates": TEMPLATES, "steps": 12, "lr": 0.3, "kl": 0.0, "decay": 0.0, "clamp": 50.0}


def at_subject(model, text, phrase, kind, layer):
    prompt = encode(model, text)
    cache, _ = capture(model, torch.tensor([prompt.ids]), [hook_name(kind, layer)])
    return cache[hook_name(kind, layer)][0, last_position(prompt, phrase)]


def test_the_loss_is_the_answers_log_probability(tiny, facts):
    batch = teacher_forced(tiny, [f.prompt() for f in facts[:2]], [facts[0].answer, "w7"])
    loss = answer_loss(tiny, batch)
    for i, answer in enumerate((facts[0].answer.split(), ["w7"])):
        ids = [*encode(tiny, facts[i].prompt()).ids]
        total = 0.0
        for word in answer:
            with torch.no_grad():
                logits = tiny(torch.tensor([ids]), return_type="logits")[0, -1]
            token = encode(tiny, word).ids[-1]
            total -= logits.log_softmax(-1)[token].item()
            ids.append(token)
        assert loss[i].item() == pytest.approx(total / len(answer), abs=1e-4)


def test_what_comes_before_the_change_is_run_once_and_tells_the_same(wide, facts):
    """Losses and gradients of the rows behind a position are those of the whole rows."""
    some = facts[:3]
    whole = teacher_forced(wide, [f.prompt() for f in some], [f.answer for f in some])
    start = 2
    found = []
    for batch, at in ((whole, start + 1), (whole.behind(wide, start), 1)):
        delta = torch.full((3, wide.cfg.d_model), 0.1, dtype=torch.float64, requires_grad=True)

        def add(x, at=at, delta=delta):
            out = x.clone()
            out[:, at] = out[:, at] + delta
            return out

        for _ in range(2):  # as the steps of a search use it
            loss = answer_loss(wide, batch, [(hook_name("resid_post", 0), add)])
        loss.sum().backward()
        found.append((loss.detach(), delta.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-8)
    assert found[0][1].abs().min() > 0


@pytest.mark.slow_case("True")
@pytest.mark.parametrize("with_c", [False, True])
def test_the_edit_writes_the_value_at_the_key(load_tiny, fact, facts, with_c):
    model = load_tiny("llama", "bridge", "float64")
    c = second_moments(model, facts, layers=[1], matrix="W_out", shrinkage=0.1) if with_c else None
    how = ValueSearch(**{**QUICK, "templates": ("{}",)})
    found = search_values(model, [Request.from_fact(fact)], 1, how)
    before = at_subject(model, fact.prompt(), fact.first_hop, "mlp_out", 1)
    edit = rome(model, fact, layer=1, covariance=c, **{**QUICK, "templates": ("{}",)})
    with edit.applied(model):
        after = at_subject(model, fact.prompt(), fact.first_hop, "mlp_out", 1)
    torch.testing.assert_close(after - before, found.values[0], atol=1e-6, rtol=1e-5)
    assert edit.changes[0].matrix == "W_out" and edit.changes[0].rank == 1


@pytest.mark.slow_case("llama-bridge")
def test_the_target_becomes_likely_and_the_model_stays(tiny, facts):
    before = weights(tiny)
    grads = [p.requires_grad for p in tiny.parameters()]
    search = {**QUICK, "steps": 20, "lr": 0.6, "position": "last"}
    edits = rome_many(tiny, facts[:3], layer=1, batch_size=2, **search)
    assert_same_bits(tiny, before)
    assert grads == [p.requires_grad for p in tiny.parameters()]
    for f, edit in zip(facts, edits, strict=False):
        batch = teacher_forced(tiny, [f.prompt("suffix")], [f.answer])
        with torch.no_grad():
            old = answer_loss(tiny, batch).item()
            with edit.applied(tiny):
                assert answer_loss(tiny, batch).item() < old - 1


@pytest.mark.parametrize(
    "template, text, phrase, want",
    [
        ("w5 is late. {}", "w3 w5 w0", "w5", 5),  # not the template's own
        ("{}", "w3 w5 w50 w0", "w5", 2),  # nor a part of a longer word
        ("w4 {} w5", "w3  W5\tw6 w0", "w5 w6", 4),  # case and white space aside
        ("{}", "w50 w0", "w5", 1),
    ],
)
def test_the_key_is_at_the_first_hop_as_the_request_has_it(load_tiny, template, text, phrase, want):
    model = load_tiny("gpt2", "bridge")
    request = Request(two_hop_prompt=text, first_hop=phrase, target="w7")
    how = ValueSearch(templates=("{}", template))
    batch, place = teach_requests(model, [request], how)
    assert place.position.tolist()[1] == want, batch.prompts[1].labels
    assert key_position(batch.prompts[1], phrase, "first hop", template) == want


def test_numbers_may_be_numpys(load_tiny, fact):
    model = load_tiny("gpt2", "bridge")
    one, other = (
        rome(model, fact, layer=number(1), steps=number(2), templates=("{}",))
        for number in (int, np.int64)
    )
    assert other.equals(one) and other.settings == one.settings


@pytest.mark.slow
def test_facts_of_a_batch_do_not_meet(load_tiny, facts):
    model = load_tiny("gpt2", "bridge", "float64")
    search = {**QUICK, "kl": 0.1, "decay": 0.1}
    together = rome_many(model, facts[:3], layer=1, **search)
    for f, edit in zip(facts, together, strict=False):
        alone = rome(model, f, layer=1, **search)
        torch.testing.assert_close(
            edit.changes[0].delta(), alone.changes[0].delta(), atol=1e-6, rtol=1e-4
        )


@pytest.mark.slow
def test_searches_are_of_like_lengths_and_come_back_in_order(load_tiny, facts, monkeypatch):
    model = load_tiny("llama", "bridge", "float64")
    asked = of_lengths(facts, [0, 8, 0, 8, 0])
    how = ValueSearch(**{**QUICK, "templates": ("{}",), "steps": 3})
    together = []

    def teach(model, part, how):
        together.append([asked.index(request) for request in part])
        return teach_requests(model, part, how)

    monkeypatch.setattr(sys.modules[search_values.__module__], "teach_requests", teach)
    found = search_values(model, asked, 1, how, batch_size=3)
    assert together == [[0, 2, 4], [1, 3]]
    for i, request in enumerate(asked):
        alone = search_values(model, [request], 1, how)
        for name in ("keys", "bare", "values"):
            row, own = getattr(found, name)[i], getattr(alone, name)[0]
            torch.testing.assert_close(row, own, atol=1e-9, rtol=1e-9)


def test_clamp_and_decay_bound_the_value(load_tiny, fact):
    model = load_tiny("llama", "bridge")
    requests = [Request.from_fact(fact)]
    size = at_subject(model, fact.prompt(), fact.first_hop, "mlp_out", 1).norm()
    options = {**QUICK, "templates": ("{}",)}
    tight = search_values(model, requests, 1, ValueSearch(**{**options, "clamp": 0.1})).values
    assert tight.norm() <= 0.1001 * size
    free = search_values(model, requests, 1, ValueSearch(**options)).values
    decayed = search_values(model, requests, 1, ValueSearch(**{**options, "decay": 10.0})).values
    assert decayed.norm() < free.norm()


def test_the_kl_term_keeps_what_the_subject_goes_on_with(load_tiny, fact):
    model = load_tiny("gpt2", "bridge")
    essence = [encode(model, f"{capitalise(fact.first_hop)} is")]
    before = last_logp(model, essence)
    moved = {}
    for weight in (0.0, 5.0):
        edit = rome(model, fact, layer=1, **{**QUICK, "kl": weight})
        with edit.applied(model):
            moved[weight] = kl_divergence(last_logp(model, essence), before).item()
    assert 0 < moved[5.0] < 0.7 * moved[0.0]


def test_repair_and_refusals(tiny, fact):
    assert isinstance(RomeRepair(layer=1), Repair)
    with pytest.raises(ValueError, match="no target"):
        rome(
            tiny,
            Request(two_hop_prompt="w3 w1", second_hop_prompt="w3 w2", bridge="w2", first_hop="w1"),
            layer=0,
        )
    with pytest.raises(ValueError, match="out of range"):
        rome(tiny, fact, layer=9)
    with pytest.raises(ValueError, match="steps 0"):
        rome(tiny, fact, layer=0, steps=0)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        rome(tiny, fact, layer=0, **{**QUICK, "kl": float("inf")})


@pytest.mark.slow
def test_the_choices_of_the_repository(load_tiny, facts):
    """Its procedure for one fact, written out: decay by |δ|/|v|², early stop, the bare prompt's key."""
    model = load_tiny("llama", "bridge", "float64")
    facts = [replace(f, answer=f.answer.split()[0]) for f in facts]  # quickly learned
    fact = facts[0]
    c = second_moments(model, facts, layers=[1], matrix="W_out", shrinkage=0.1)
    kl, decay, lr, clamp = 1e-3, 1e-3, 3.0, 50.0

    def search(steps, enough):
        """δ after at most ``steps - 1`` steps of Adam, and how many were made."""
        texts = [t.format(fact.prompt()) for t in TEMPLATES]
        taught = teacher_forced(model, texts, [fact.answer] * len(texts))
        at = torch.tensor([p.last for p in taught.prompts])
        essence = encode(model, f"{capitalise(fact.first_hop)} is")
        there = last_position(essence, capitalise(fact.first_hop))
        v = last_mean(model, texts[:1], "mlp_out", 1).norm()
        delta = torch.zeros(model.cfg.d_model, dtype=torch.float64, requires_grad=True)
        before = last_logp(model, [essence]).detach()
        adam = torch.optim.Adam([delta], lr=lr)

        def adding(positions):
            def fn(x):
                out = x.clone()
                out[torch.arange(len(positions)), positions] += delta
                return out

            return [(hook_name("mlp_out", 1), fn)]

        for step in range(steps):
            loss = answer_loss(model, taught, adding(at)).mean()
            after = last_logp(model, [essence], adding(torch.tensor([there])))
            loss = loss + kl * kl_divergence(after, before).sum() + decay * delta.norm() / v**2
            if loss < enough or step == steps - 1:
                return delta.detach(), step
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta *= min(1.0, float(clamp * v / delta.norm()))

    options = {"templates": TEMPLATES, "lr": lr, "kl": kl, "decay": decay, "clamp": clamp}
    options |= {"repository": True, "position": "last"}
    bare, *_ = keys = [
        last_mean(model, [t.format(fact.prompt())], "mlp_post", 1) for t in TEMPLATES
    ]
    left = torch.linalg.solve(c.shrunk(1), torch.stack(keys).mean(0))
    for steps in (6, 60):
        delta, made = search(steps, 0.05)
        edit = rome(model, fact, layer=1, covariance=c, steps=steps, **options)
        want = torch.outer(left / (left @ bare), delta)
        torch.testing.assert_close(edit.changes[0].delta(), want, atol=1e-6, rtol=1e-5)
    assert made < 59  # the second search ended early
    together = rome_many(model, facts[:3], layer=1, covariance=c, steps=60, **options)
    torch.testing.assert_close(together[0].changes[0].delta(), want, atol=1e-6, rtol=1e-4)


def test_editors_take_gradients_under_inference_mode(load_tiny, facts):
    model = load_tiny("gpt2")
    expected = rome_many(model, facts[:1], layer=1, **QUICK)[0]
    with torch.inference_mode():
        found = rome_many(model, facts[:1], layer=1, **QUICK)[0]
        FineTuneRepair(layers=[1], steps=2).fit(model, facts[:1])
        GraceRepair(layer=1, steps=2).fit(model, facts[:1])
    torch.testing.assert_close(found.changes[0].delta(), expected.changes[0].delta())


def test_one_fact_is_a_list_of_one_and_templates_are_no_text(load_tiny, fact):
    model = load_tiny("gpt2")
    one, each = (rome_many(model, asked, layer=1, **QUICK) for asked in (fact, [fact]))
    assert torch.equal(one[0].changes[0].delta(), each[0].changes[0].delta())
    with pytest.raises(ValueError, match="templates is '{}'; expected a sequence"):
        rome_many(model, fact, layer=1, templates="{}")
