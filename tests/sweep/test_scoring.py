"""Scores behind tokens that prompts have in common, which are run once where the repair does not act there."""

from __future__ import annotations

import sys

import pytest
import torch

from mi_hops.editing import Request
from mi_hops.editing.baselines.grace import GraceRepair
from mi_hops.injection import MemoryInjection
from mi_hops.model import forward, hook_name
from mi_hops.sweep import together
from mi_hops.sweep.metrics import target_of
from mi_hops.sweep.repair import LateHooks, Rows
from mi_hops.sweep.scoring import next_token_logits, score_prompts
from mi_hops.text.tokens import encode
from tests.repairs import AddVector

LEADS = ("w1 w2 w3 w4 w5 w6", "w1 w2 w9")
TEXTS = [
    f"{lead} w{20 + i}{' w70' * (i % 3)} w8 w{40 + i}" for i, lead in enumerate([*LEADS * 3, ""])
]
ANSWERS = ["w30 w31", "w32", "w33 w34 w35", "w36", "w37", "w38 w39", "w30"]


def at_the_last_token(model):
    repair = MemoryInjection(1, 4.0, positions="last")
    return repair, repair.fit_memories(model, [f"w{60 + i}" for i in range(len(TEXTS))])


def within_the_question(model):
    """Before the last token, and in some rows before what the prompts have in common ends."""
    places = ["w8", "w8", "w3", "w8", "w5", "w8", "w8"]
    repair = MemoryInjection(1, 4.0, positions="first hop")
    memories = [f"w{60 + i}" for i in range(len(TEXTS))]
    return repair, repair.fit_memories(model, memories, first_hops=places)


def a_codebook_each(model):
    repair = GraceRepair(layer=1, shared=False, steps=3)
    asked = [
        Request(two_hop_prompt=text, target=answer)
        for text, answer in zip(TEXTS, ANSWERS, strict=True)
    ]
    return repair, repair.fit(model, asked)


def anywhere(model):
    """It does not say where it acts."""
    repair = AddVector()
    return repair, repair.fit(model, TEXTS)


@pytest.fixture
def starts_run(monkeypatch):
    """Lengths of the starts that were run once for several rows; they are, from few tokens on."""
    module = sys.modules[score_prompts.__module__]
    run, prefix_of = [], module.prefix_of

    def record(model, tokens):
        run.append(tuple(tokens.shape))
        return prefix_of(model, tokens)

    monkeypatch.setattr(module, "prefix_of", record)
    monkeypatch.setitem(together.PASS_COST, "cpu", 4)
    return run


def by_hand(model, prompt, target, repair, state):
    """Log-probability of the answer, one unpadded pass over the whole row."""
    tokens = [*prompt.ids, *target.answer[:-1]]
    hooks = repair.hooks(model, [state], Rows((prompt,), len(tokens)))
    logp = forward(model, torch.tensor([tokens]), hooks=hooks)[0].log_softmax(-1)
    return sum(logp[prompt.last + i, t].item() for i, t in enumerate(target.answer))


@pytest.mark.parametrize("batch_size", [64, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("given", "shared"),
    [
        (at_the_last_token, True),
        (within_the_question, True),
        (a_codebook_each, True),
        (anywhere, False),
    ],
)
@torch.no_grad()
def test_rows_behind_one_lead_score_as_they_do_alone(tiny, given, shared, batch_size, starts_run):
    with torch.enable_grad():
        repair, states = given(tiny)
    starts_run.clear()
    states[3] = None
    prompts = [encode(tiny, text) for text in TEXTS]
    targets = [target_of(tiny, p, a) for p, a in zip(prompts, ANSWERS, strict=True)]
    found = score_prompts(
        tiny,
        prompts,
        targets,
        "answer_logprob",
        repair=repair,
        states=states,
        batch_size=batch_size,
    )["answer_logprob"]
    assert bool(starts_run) == shared
    assert all(rows == 1 and width >= 3 for rows, width in starts_run)
    for row in zip(found, prompts, targets, states, strict=True):
        assert row[0].item() == pytest.approx(by_hand(tiny, *row[1:3], repair, row[3]), abs=1e-4)


def test_with_a_users_hook_every_pass_is_whole(tiny, starts_run):
    repair, states = at_the_last_token(tiny)
    prompts = [encode(tiny, text) for text in TEXTS]
    targets = [target_of(tiny, p, a) for p, a in zip(prompts, ANSWERS, strict=True)]
    asked = (tiny, prompts, targets, "first_logprob")
    acting = [(hook_name("mlp_out", 0), lambda x, hook=None: x * (1 + (x[:, :1] > 0)))]
    with tiny.hooks(fwd_hooks=acting):
        found = score_prompts(*asked, repair=repair, states=states)["first_logprob"]
    given = score_prompts(*asked, repair=repair, states=states, hooks=acting)["first_logprob"]
    assert starts_run == []
    torch.testing.assert_close(found, given, atol=1e-5, rtol=1e-5)


def test_a_users_hook_sees_no_padding_and_no_other_metrics_tokens(tiny):
    def last(x, hook=None):
        x = x.clone()
        x[:, -1] = x.mean(1) - 2 * x[:, -1]
        return x

    names, repair, states = ["first_logprob", "answer_logprob"], *at_the_last_token(tiny)
    prompts = [encode(tiny, text) for text in TEXTS]
    targets = [target_of(tiny, p, a) for p, a in zip(prompts, ANSWERS, strict=True)]
    plain = score_prompts(tiny, prompts, targets, names)
    for options in ({}, {"repair": repair, "states": states}):
        with tiny.hooks(fwd_hooks=[(hook_name("mlp_out", 1), last)]):
            together = score_prompts(tiny, prompts, targets, names, **options)
            for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
                one = {k: [v[i]] if k == "states" else v for k, v in options.items()}
                for name in names:
                    alone = score_prompts(tiny, [prompt], [target], name, **one)[name].item()
                    assert together[name][i].item() == pytest.approx(alone, abs=1e-4), name
            nexts = next_token_logits(tiny, prompts)
            for own, prompt in zip(nexts, prompts, strict=True):
                torch.testing.assert_close(
                    own, next_token_logits(tiny, [prompt])[0], atol=1e-4, rtol=1e-4
                )
        assert not torch.allclose(together["first_logprob"], plain["first_logprob"], atol=0.1)


def test_where_late_hooks_begin(load_tiny):
    model = load_tiny("llama")
    prompts = tuple(encode(model, text) for text in TEXTS[:2])
    width = max(map(len, prompts))
    for given in (at_the_last_token, within_the_question, a_codebook_each):
        repair, states = given(model)
        hooks = repair.hooks(model, states[:2], Rows(prompts, width))
        assert isinstance(hooks, LateHooks)
        at = hooks.start
        assert 0 < at <= min(p.last for p in prompts)
        assert repair.hooks(model, states[:2], Rows(prompts, at)) == []
        assert repair.hooks(model, states[:2], Rows(prompts, width - at, at)).start == at
