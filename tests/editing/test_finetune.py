"""FT+L, full fine-tuning and LoRA: what they learn, what they may not touch, that the edit is what was taught."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import EditRepair, OnTop, WrongWeightsError, applied_edits, creme
from mi_hops.editing.baselines import FullFineTuneRepair, finetune_full
from mi_hops.editing.baselines.finetune import FineTuneRepair, LoraRepair, finetune_many
from mi_hops.editing.teaching import answer_loss, teacher_forced
from mi_hops.model import forward, read_matrix
from mi_hops.reasoning import Query, evaluate
from mi_hops.sweep import Repair, target_of
from mi_hops.text import encode
from tests.editing.conftest import assert_same_bits, of_lengths, weights
from tests.models import cases


def losses(model, facts, edits):
    found = []
    for f, edit in zip(facts, edits, strict=True):
        batch = teacher_forced(model, [f.prompt("suffix")], [f.answer])
        with torch.no_grad():
            old = answer_loss(model, batch).item()
            with edit.applied(model):
                found.append((old, answer_loss(model, batch).item()))
    return found


@pytest.mark.slow_case("llama-bridge-W_out")
@pytest.mark.parametrize("matrix", ["W_out", pytest.param("W_O", marks=pytest.mark.slow)])
def test_ftl_learns_within_its_bound(tiny, facts, matrix):
    before = weights(tiny)
    edits = finetune_many(
        tiny, facts[:3], layers=[1, 2], matrix=matrix, steps=30, bound=0.3, batch_size=2
    )
    assert_same_bits(tiny, before)
    for edit in edits:
        for change in edit.changes:
            rms = read_matrix(tiny, matrix, change.layer).square().mean().sqrt()
            assert change.delta().abs().max() <= 0.3001 * rms
    for old, new in losses(tiny, facts[:3], edits):
        assert new < old - 2
    assert isinstance(FineTuneRepair(layers=[1]), Repair)


def test_ftl_facts_of_a_batch_do_not_meet_and_edits_come_back_in_order(load_tiny, facts):
    model = load_tiny("llama", "bridge", "float64")
    asked = of_lengths(facts, [8, 0, 8])
    together = finetune_many(model, asked, layers=[1], steps=4, batch_size=2)
    for request, edit in zip(asked, together, strict=True):
        assert edit.request == request.to_dict()
        alone = finetune_many(model, [request], layers=[1], steps=4)[0]
        torch.testing.assert_close(
            edit.changes[0].delta(), alone.changes[0].delta(), atol=1e-9, rtol=1e-6
        )


def test_ftl_refusals(tiny, facts):
    with pytest.raises(ValueError, match="above 0"):
        finetune_many(tiny, facts, layers=[0], bound=0)
    with pytest.raises(ValueError, match="out of range"):
        finetune_many(tiny, facts, layers=[8])


def test_full_fine_tuning_moves_everything_and_is_undone_bit_for_bit(tiny, facts):
    before, flags = weights(tiny), [p.requires_grad for p in tiny.parameters()]
    tuned = finetune_full(tiny, facts[:2], steps=8, lr=0.01)
    assert_same_bits(tiny, before)
    assert [p.requires_grad for p in tiny.parameters()] == flags
    assert all(p.grad is None for p in tiny.parameters())
    for old, new in losses(tiny, facts[:2], tuned):
        assert new < old - 2
    assert_same_bits(tiny, before)
    sizes = {name: before[name].numel() for name in tuned[0].values}
    assert sum(sizes.values()) > 0.9 * sum(p.numel() for p in tiny.parameters())
    alone = finetune_full(tiny, facts[1:2], steps=8, lr=0.01)[0]  # each from the same weights
    for name, value in alone.values.items():
        assert torch.equal(value, tuned[1].values[name])
    with pytest.raises(KeyError), tuned[0].applied(tiny):
        creme(tiny, facts[2], layers=[1]).apply(tiny)
        raise KeyError
    assert applied_edits(tiny) == ()
    assert_same_bits(tiny, before)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_full_fine_tuning_is_what_plain_transformers_does(load_tiny, checkpoints, fact, shape):
    from transformers import AutoModelForCausalLM

    model = load_tiny(shape, "bridge", "float64")
    (tuned,) = finetune_full(model, [fact], form="suffix", steps=4, lr=1e-3)
    batch = teacher_forced(model, [fact.prompt("suffix")], [fact.answer])
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[shape], dtype=torch.float64).eval()
    names = [name for name, _ in model.named_parameters()]
    if any(
        "lm_head" in name and name.endswith("bias") for name in names
    ):  # TransformerLens 3.9 adds one
        bias = torch.zeros(plain.config.vocab_size, dtype=torch.float64)
        plain.lm_head.bias = torch.nn.Parameter(bias)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(4):
            adam.zero_grad()
            scored = plain(batch.tokens).logits[0, batch.scored[0]]
            torch.nn.functional.cross_entropy(scored, batch.answers[0]).backward()
            adam.step()
    before = forward(model, batch.tokens)
    with tuned.applied(model), torch.no_grad():
        got, want = forward(model, batch.tokens), plain(batch.tokens).logits
    assert (want - before).abs().max() > 0.1
    # transformers keeps LLaMA's norm in float32, which Adam's first steps make much of.
    atol = {"gpt2": 1e-6, "llama": 1e-3}[shape]
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def test_full_fine_tuning_is_scored_like_a_repair(tiny, facts):
    before = weights(tiny)
    asked = [
        Query(
            case=f.id, set="correction", query_id=f.id, prompt=f.prompt("suffix"), answer=f.answer
        )
        for f in facts[:2]
    ]
    repair = FullFineTuneRepair(form="suffix", steps=8, lr=0.01)
    found = evaluate(tiny, repair, asked, facts[:2], generate=False).frame
    assert_same_bits(tiny, before)
    assert (found["repair"] == "full fine-tuning").all()
    tuned = finetune_full(tiny, facts[:2], **repair.options)
    n = [len(target_of(tiny, encode(tiny, q.prompt), q.answer).answer) for q in asked]
    old, new = zip(*losses(tiny, facts[:2], tuned), strict=True)
    assert (-found["answer_logprob_before"] / n).tolist() == pytest.approx(old, abs=1e-3)
    assert (-found["answer_logprob_after"] / n).tolist() == pytest.approx(new, abs=1e-3)


def test_full_fine_tuning_refusals(tiny, load_tiny, facts):
    with pytest.raises(ValueError, match="above 0"):
        finetune_full(tiny, facts, steps=0)
    (tuned,) = finetune_full(tiny, facts[:1], steps=1)
    with pytest.raises(ValueError, match="float16"):
        finetune_full(load_tiny("gpt2", "bridge", "float16"), facts[:1], steps=1)
    other = load_tiny("llama32", "bridge")
    with pytest.raises(WrongWeightsError, match="tuned from weights"), tuned.applied(other):
        pass


def test_full_fine_tuning_gives_no_weights_that_are_not_finite(load_tiny, fact, monkeypatch):
    model = load_tiny("gpt2", "bridge")
    before = weights(model)
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: self.param_groups[0]["params"][0].data.fill_(torch.nan),
    )
    with pytest.raises(ValueError, match="not finite after tuning"):
        finetune_full(model, [fact], steps=1)
    assert_same_bits(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_lora_edits_are_what_peft_taught(load_tiny, checkpoints, facts, shape, backend):
    pytest.importorskip("peft")
    model = load_tiny(shape, backend)
    before = weights(model)
    repair = LoraRepair(checkpoints[shape], layers=[1, 2], rank=3, steps=40, lr=0.05)
    assert isinstance(repair, Repair)
    edits = repair.fit(model, facts[:2])
    assert_same_bits(model, before)
    sites = [("W_O", 1), ("W_O", 2), ("W_out", 1), ("W_out", 2)]
    assert sorted(c.site for c in edits[0].changes) == sites
    assert all(c.rank == 3 for c in edits[0].changes)
    for old, new in losses(model, facts[:2], edits):
        assert new < old - 2


def test_a_lora_edit_does_not_depend_on_those_before_it(load_tiny, checkpoints, facts):
    pytest.importorskip("peft")
    repair = LoraRepair(checkpoints["gpt2"], layers=1, steps=2, lr=0.05)
    model = load_tiny("gpt2", "bridge")
    (_, second), (alone,) = repair.fit(model, facts[:2]), repair.fit(model, facts[1:2])
    assert second.equals(alone)


def test_the_adapter_and_the_edit_give_the_same_logits(load_tiny, checkpoints, fact, monkeypatch):
    peft = pytest.importorskip("peft")
    model = load_tiny("gpt2", "hooked")
    tokens = torch.tensor([[1, 9, 30, 7, 12]])
    made, real = [], peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *args: made.append(real(*args)) or made[0])
    (edit,) = LoraRepair(checkpoints["gpt2"], layers=[0, 2], steps=5, lr=0.05).fit(model, [fact])
    with edit.applied(model), torch.no_grad():
        got = model(tokens, return_type="logits")
        want = made[0](tokens).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_lora_on_top_of_an_edit(load_tiny, checkpoints, facts, monkeypatch, shape, backend):
    """The adapters are taught beside the weights as edited: both together give the edited logits."""
    peft = pytest.importorskip("peft")
    model = load_tiny(shape, backend)
    made, real = [], peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *args: made.append(real(*args)) or made[-1])
    below = creme(model, facts[0], layers=[1])
    repair = LoraRepair(checkpoints[shape], layers=[0, 1], steps=5, lr=0.05)
    tokens = torch.tensor([[1, 9, 30, 7, 12]])
    with below.applied(model):
        (above,) = repair.fit(model, facts[1:2])
        with above.applied(model), torch.no_grad():
            got = model(tokens, return_type="logits")
    with torch.no_grad():
        torch.testing.assert_close(got, made[0](tokens).logits, atol=1e-4, rtol=1e-4)
    (both,) = OnTop(EditRepair(below), repair).fit(model, facts[1:2])
    assert torch.equal(both[1].changes[0].right, above.changes[0].right)


def test_lora_refuses_another_checkpoint(load_tiny, checkpoints, facts):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="holds other weights"):
        LoraRepair(checkpoints["llama"], layers=[1]).fit(load_tiny("gpt2", "bridge"), facts[:1])
