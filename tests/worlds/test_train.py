"""Training: batches that score answers only, a loss that falls, a checkpoint that others load."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mi_hops.facts.templates import CONTEXTS, FORMS
from mi_hops.worlds import Hopland
from mi_hops.worlds import train as training
from mi_hops.worlds.recipe import AdamW, Recipe, Shape, Texts
from mi_hops.worlds.texts import Sampler, build_tokenizer, trees
from mi_hops.worlds.train import accuracy, loss_of, measure, save, train
from tests.stopping import stop_training

pytestmark = pytest.mark.once

SMALL = Hopland(people=8, works=3, companies=3, cities=3, countries=3)
RECIPE = Recipe(
    steps=25,
    batch_size=48,
    adamw=AdamW(lr=1e-2, warmup=5),
    shape=Shape(n_layer=2, d_model=32, d_mlp=64, n_head=2, n_kv_head=1),
)


def sampler_of(family, **changes):
    """(tokenizer, sampler) of the small recipe with some changes."""
    tokenizer = build_tokenizer(SMALL, family)
    return tokenizer, Sampler(SMALL, tokenizer, replace(RECIPE, **changes))


@pytest.fixture(scope="module", params=[pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def trained(request):
    return request.param, *train(SMALL, request.param, RECIPE, progress=False, log_every=5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokenizer_gives_every_text_back(family):
    tokenizer = build_tokenizer(SMALL, family)
    for fact in SMALL.two_hop_facts()[:50]:
        for prompt in fact.prompts.values():
            for context in CONTEXTS:
                text = context.format(f"{prompt} {fact.answer}.")
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids).strip() == text


@pytest.mark.slow
def test_batches_score_answers_and_their_end_only():
    tokenizer, sampler = sampler_of("gpt2")
    names = {o.object for o in SMALL.facts.values()}
    batch = sampler.batch()
    for tokens, prompt in batch:
        text = tokenizer.decode(tokens[prompt:]).strip()
        assert text.endswith(".")
        assert text[:-1] in names
    targets = torch.cat([part.targets for part in trees(batch)]).tolist()
    assert sorted(targets) == sorted(t for tokens, prompt in batch for t in tokens[prompt:])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("width, rows", [(12, 3), (1000, 1)])
def test_texts_in_trees_have_the_loss_and_the_gradient_of_texts_alone(
    family, width, rows, monkeypatch
):
    monkeypatch.setattr("mi_hops.worlds.texts.WIDTH", width)
    monkeypatch.setattr("mi_hops.worlds.texts.ROWS", rows)
    tokenizer, sampler = sampler_of(family, texts=Texts(apposed=0.2))
    batch = [(t, p) for (t, _), (_, p) in zip(sampler.batch(), sampler.draw(), strict=True)]
    batch = [(t, min(p, len(t) - 1)) for t, p in batch]  # any part of a text may be scored
    model = training.build_model(family, tokenizer, RECIPE).double()
    parts = list(trees(batch))
    if rows == 1:  # nothing is there twice
        begun = {tuple(t[:i]) for t, _ in batch for i in range(1, len(t))}
        assert [part.tokens.numel() for part in parts] == [len(begun)]
    loss = sum(loss_of(model, part) for part in parts)
    loss.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    alone = 0.0
    for tokens, prompt in batch:
        logits = model(torch.tensor([tokens])).logits[0, prompt - 1 : -1]
        targets = torch.tensor(tokens[prompt:])
        alone = alone + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    alone.backward()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    for ours, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batches_hold_the_shares_asked_for():
    texts = Texts(1.0, (0.0, 1.0, 0.0), context=0.0)
    _, sampler = sampler_of("gpt2", batch_size=2000, texts=texts)
    prefix = {tuple(t) for t, _ in sampler.pools["composed", FORMS[1]]}
    assert {tuple(t) for t, _ in sampler.draw()} <= prefix


@pytest.mark.slow
def test_in_an_apposition_the_bridge_follows_its_description():
    texts = Texts(1.0, context=0.0, apposed=0.5)
    tokenizer, sampler = sampler_of("llama", batch_size=400, texts=texts)
    facts = SMALL.two_hop_facts("train")
    plain = {f"{p} {f.answer}." for f in facts for p in f.prompts.values()}
    drawn = [tokenizer.decode(tokens[1:]).strip() for tokens, _ in sampler.draw()]
    appositions = [text for text in drawn if text not in plain]
    assert 140 < len(appositions) < 260
    for text in appositions:
        assert any(
            f" {bridge}" in text and text.replace(f" {bridge}", "", 1) in plain
            for bridge in SMALL.kind_of
        )


@pytest.mark.slow
def test_with_appositions_all_tokens_are_scored():
    _, sampler = sampler_of("gpt2", texts=Texts(apposed=0.5))
    batch = sampler.batch()
    targets = torch.cat([part.targets for part in trees(batch)]).tolist()
    assert sorted(targets) == sorted(t for tokens, _ in batch for t in tokens[1:])


@pytest.mark.slow
def test_a_short_name_is_one_word_of_the_bridge():
    texts = Texts(1.0, context=0.0, apposed=1.0, short=True)
    tokenizer, sampler = sampler_of("gpt2", batch_size=400, texts=texts)
    facts = SMALL.two_hop_facts("train")
    whole = {f.bridge for f in facts}
    words = {word for bridge in whole for word in bridge.split()}
    plain = {f"{p} {f.answer}." for f in facts for p in f.prompts.values()}
    found = set()
    for tokens, _ in sampler.draw():
        text = tokenizer.decode(tokens[1:]).strip()
        found |= {n for n in whole | words if text.replace(f" {n}", "", 1) in plain}
    assert found & whole and found & (words - whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_later_stage_goes_on_from_what_there_is(family):
    """More layers on top of a first stage's, none of which a rate of 0 moves."""
    first = replace(RECIPE, steps=2)
    taller = replace(RECIPE, steps=1, adamw=AdamW(lr=0.0), shape=replace(RECIPE.shape, n_layer=3))
    (low, *_), (high, _, log) = (
        train(SMALL, family, recipe, progress=False, log_every=1)
        for recipe in (first, replace(first, then=(taller,)))
    )
    assert [record["step"] for record in log] == [1, 2, 3]
    there, new = low.state_dict(), high.state_dict()
    assert all(torch.equal(new[name], there[name]) for name in there)
    assert {name for name in new if ".2." in name} == set(new) - set(there)


def test_in_bfloat16_weights_stay_float32_and_losses_differ_by_rounding():
    losses = {}
    for low in (False, True):
        recipe = replace(RECIPE, steps=12, bfloat16=low)
        model, _, log = train(SMALL, "llama", recipe, progress=False, log_every=1)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[low] = torch.tensor([record["loss"] for record in log])
    assert not torch.equal(losses[True], losses[False])
    # Stale casts of the weights would keep the loss from falling.
    torch.testing.assert_close(losses[True], losses[False], rtol=0.02, atol=0.0)
    assert losses[True][-1] < 0.95 * losses[True][0]


def test_a_stage_of_another_shape_is_refused():
    wider = replace(RECIPE, steps=1, shape=replace(RECIPE.shape, d_model=64))
    with pytest.raises(ValueError, match="may have more layers, and everything else must be equal"):
        train(SMALL, "gpt2", replace(RECIPE, steps=1, then=(wider,)), progress=False)


def test_the_loss_falls(trained):
    _, _, _, log = trained
    assert [r["step"] for r in log] == [5, 10, 15, 20, 25]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


@pytest.mark.slow
def test_training_repeats_itself():
    short = replace(RECIPE, steps=3)
    first, second = (train(SMALL, "gpt2", short, progress=False)[0] for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.slow), 4, 6])
def test_a_stopped_run_goes_on_to_the_same_weights(family, n, tmp_path, monkeypatch):
    """Stopped in the first stage, between the two, and in the second one."""
    taller = replace(RECIPE, steps=4, shape=replace(RECIPE.shape, n_layer=3))
    recipe = replace(RECIPE, steps=3, then=(taller,))
    whole, _, log = train(SMALL, family, recipe, progress=False, log_every=2)
    with monkeypatch.context() as stop:
        stop_training(stop, n)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, family, recipe, progress=False, log_every=2, state=tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == n - 1
    again, _, log_again = train(
        SMALL, family, recipe, progress=False, log_every=2, state=tmp_path / "state.pt"
    )
    assert log_again == log
    there = again.state_dict()
    assert all(torch.equal(there[name], value) for name, value in whole.state_dict().items())


def test_a_state_of_another_run_or_damaged_is_refused(tmp_path, monkeypatch):
    path, short = tmp_path / "state.pt", replace(RECIPE, steps=2)
    monkeypatch.setattr(training, "KEPT_EVERY", 0.0)
    train(SMALL, "gpt2", short, progress=False, state=path)
    with pytest.raises(ValueError, match="another family, recipe or world"):
        train(SMALL, "gpt2", replace(short, steps=3), progress=False, state=path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged; delete it"):
            train(SMALL, "gpt2", short, progress=False, state=path)


def test_a_world_without_trained_compositions_is_refused():
    class Barred(Hopland):
        def two_hop_facts(self, *splits):
            return []

    with pytest.raises(ValueError, match="no composition to train on; take a larger world"):
        train(Barred(), "gpt2", RECIPE, progress=False)


def test_accuracy_equals_greedy_generation(trained):
    """Teacher-forced argmaxes against a generated continuation."""
    _, model, tokenizer, _ = trained
    pairs = [(f.prompts()["suffix"], f.object) for f in list(SMALL.facts.values())[:60]]
    whole = first = 0
    for prompt, answer in pairs:
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        wanted = tokenizer(f"{prompt} {answer}.", add_special_tokens=False)["input_ids"]
        wanted = wanted[len(ids) - 1 :]
        said = []
        with torch.no_grad():
            for _ in wanted:
                logits = model(torch.tensor([ids + said])).logits[0, -1]
                said.append(int(logits.argmax()))
        whole += said == wanted
        first += said[0] == wanted[0]
    scores = accuracy(model, tokenizer, pairs)
    assert scores == {"first_token": first / 60, "whole": whole / 60}


def test_saved_folder_is_an_ordinary_checkpoint(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mi_hops.model import forward, load_model

    family, model, tokenizer, log = trained
    measured = measure(model, tokenizer, SMALL, limit=5)
    save(
        tmp_path / "small", model, tokenizer, recipe=RECIPE, world=SMALL, log=log, measured=measured
    )
    folder = tmp_path / "small"
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = "The spouse of Ondo is"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        assert torch.allclose(again(**ids).logits, model(**ids).logits, atol=1e-5)
        ours = forward(load_model(folder, device="cpu"), ids["input_ids"])
    assert torch.allclose(ours, model(**ids).logits, atol=1e-4)
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"]["steps"] == 25
    assert record["curve"] == log
    card = (folder / "README.md").read_text()
    for part in ("Data", "Training", "Measured", f"--family {family}", "first fact in no trained"):
        assert part in card
