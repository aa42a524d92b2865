"""Tuned and attention lenses: where they start, what they learn, saving, resuming, moving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mi_hops.lens import (
    AttentionLens,
    LensTraining,
    LogitLens,
    Readout,
    TunedLens,
    evaluate_heads,
    evaluate_lens,
    fact_trajectories,
    load_lens,
    logit_lens,
    read_vectors,
    train_lens,
)
from mi_hops.lens.examples import make_example, real_cells
from mi_hops.lens.trained import kl
from mi_hops.lens.training import evaluate_heldout
from mi_hops.model import forward, hook_name, load_model, unembedding
from mi_hops.text.tokens import encode, pad
from tests.models import save_checkpoint
from tests.reasoning.tiny_facts import tiny_fact

TEXTS = [
    f"w{i % 80} w{(i * 7) % 80} w{(i * 3 + 1) % 80} w{(i * i) % 80}" + " w9" * (i % 3)
    for i in range(40)
]
FAST = LensTraining(steps=30, learning_rate=1e-2, max_tokens=256, evaluate_every=10, held_out=0.2)
MAKERS = {
    "tuned": lambda m: TunedLens(m),
    "tuned low rank": lambda m: TunedLens(m, rank=4, kind="resid_mid"),
    "translator": lambda m: AttentionLens(m, layers=[1]),
    "translator rank": lambda m: AttentionLens(m, rank=4),
    "low_rank": lambda m: AttentionLens(m, layers=[0, 2], variant="low_rank", rank=4),
    "full": lambda m: AttentionLens(m, layers=[1], variant="full"),
    "normed": lambda m: AttentionLens(m, layers=[1], norm=True),
}


def example_of(model, lens, texts=TEXTS[:5], **options):
    batch = pad([encode(model, t).ids for t in texts])
    return make_example(model, lens, batch, real_cells(batch), **options)


def perturbed(lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in lens.parameters.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return lens


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_fresh_lens_is_the_logit_lens(tiny, make):
    lens = make(tiny)
    example = example_of(tiny, lens)
    plain = LogitLens(tiny, lens.norm)
    for layer in lens.layers:
        for head in range(4) if lens.kind == "result" else [None]:
            x = example.read[layer] if head is None else example.read[layer][:, head]
            want = plain.logits(x, layer=layer)
            assert torch.allclose(lens.logits(x, layer=layer, head=head), want, atol=1e-4)


@pytest.mark.parametrize("variant", ["translator", "low_rank", "full"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_sum_of_heads_is_the_sum_of_their_readings(tiny, variant, norm):
    lens = perturbed(AttentionLens(tiny, layers=[1], variant=variant, norm=norm))
    outputs = example_of(tiny, lens).read[1]
    single = [lens.logits(outputs[:, h], layer=1, head=h) for h in range(4)]
    assert torch.allclose(lens.sum_logits(outputs, layer=1), sum(single), atol=1e-4)
    for head in (None, -1, 4):
        with pytest.raises(ValueError, match=rf"head is {head}; .* one of 0\.\.3"):
            lens.logits(outputs[:, 0], layer=1, head=head)


def test_losses_by_hand(tiny):
    lens = perturbed(AttentionLens(tiny, layers=[1]))
    texts = TEXTS[:2]
    batch = pad([encode(tiny, t).ids for t in texts])
    example = make_example(
        tiny, lens, batch, (torch.tensor([1]), torch.tensor([3])), without_heads=True
    )
    tokens = torch.tensor([encode(tiny, texts[1]).ids])

    def run(hooks=()):
        with torch.no_grad():
            return forward(tiny, tokens, hooks=hooks)[0, 3]

    output = run().log_softmax(-1)
    assert torch.allclose(example.output[0], output, atol=1e-5)
    outputs = example.read[1]
    (total,) = lens.losses(example, 1, "sum")
    summed = lens.sum_logits(outputs, layer=1)[0].log_softmax(-1)
    assert torch.allclose(total[0], (output.exp() * (output - summed)).sum(), atol=1e-4)
    each = list(lens.losses(example, 1, "each"))
    left = list(lens.losses(example, 1, "leave_one_out"))
    for head in range(4):
        reading = lens.logits(outputs[:, head], layer=1, head=head)[0]

        def without(z, head=head):
            z = z.clone()
            z[:, :, head] = 0
            return z

        rest = run([(hook_name("z", 1), without)]) - unembedding(tiny)[1]
        for loss, logits in ((each[head], reading), (left[head], rest + reading)):
            q = logits.log_softmax(-1)
            assert torch.allclose(loss[0], (output.exp() * (output - q)).sum(), atol=1e-4)


def test_kl_is_zero_for_the_same_logits_and_positive_else():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kl(logits.log_softmax(-1), logits + 3), torch.zeros(5), atol=1e-6)
    assert (kl(logits.log_softmax(-1), logits.flip(0))[[0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("last_only", [False, True])
def test_a_padded_batch_gives_the_losses_of_unpadded_texts(tiny, last_only):
    lens = perturbed(TunedLens(tiny))
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w9", "w10 w11 w12"]
    rows = [encode(tiny, t).ids for t in texts]
    whole = evaluate_heldout(tiny, lens, [pad(rows)], "output", last_only=last_only)
    single = evaluate_heldout(tiny, lens, [pad([r]) for r in rows], "output", last_only=last_only)
    for layer in lens.layers:
        assert np.isclose(whole[layer], single[layer], atol=1e-5)


# Every layout and every objective, on one family of each class.
@pytest.mark.slow_case("gpt2-hooked", "translator", "full", "normed", "low rank")
@pytest.mark.parametrize("shape", [("gpt2", "hooked"), ("llama", "bridge")], ids="-".join)
@pytest.mark.parametrize(
    ("make", "objective"),
    [
        ("tuned", "output"),
        ("tuned low rank", "output"),
        ("translator", "sum"),
        ("translator", "each"),
        pytest.param("low_rank", "leave_one_out", marks=pytest.mark.slow),
        ("full", "sum"),
        ("normed", "each"),
    ],
)
def test_training_lowers_held_out_kl_and_leaves_the_model_alone(load_tiny, shape, make, objective):
    tiny = load_tiny(*shape)
    lens = MAKERS[make](tiny)
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    run = train_lens(tiny, lens, TEXTS, LensTraining(**{**FAST.__dict__, "objective": objective}))
    assert run["after"].sum() < 0.98 * run["before"].sum()
    assert (run["after"] <= run["before"]).all()
    for name, tensor in tiny.named_parameters():
        assert torch.equal(tensor, before[name]) and tensor.grad is None
    assert run["step"].values.tolist() == [10, 20, 30]
    assert not any(p.requires_grad for p in lens.parameters.values())


def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(load_tiny, tmp_path):
    model = load_tiny()
    whole = TunedLens(model)
    run = train_lens(model, whole, TEXTS, FAST)

    class Stop(Exception):
        pass

    calls = []

    class Interrupted(TunedLens):
        def losses(self, example, layer, objective):
            calls.append(layer)
            if len(calls) > 75:
                raise Stop
            yield from super().losses(example, layer, objective)

    with pytest.raises(Stop):
        train_lens(model, Interrupted(model), TEXTS, FAST, checkpoint=tmp_path / "c")
    with safe_open(tmp_path / "c" / "training.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["training"])
    assert 0 < record["state"]["step"] < 30
    again = TunedLens(model)
    resumed = train_lens(model, again, TEXTS, FAST, checkpoint=tmp_path / "c")
    for name, tensor in whole.parameters.items():
        assert torch.equal(tensor, again.parameters[name])
    assert resumed.data.equals(run.data)
    # Finished: nothing is left to do, and another training is refused.
    assert (
        train_lens(model, TunedLens(model), TEXTS, FAST, checkpoint=tmp_path / "c")["step"][-1]
        == 30
    )
    with pytest.raises(ValueError, match="another settings"):
        train_lens(
            model, TunedLens(model), TEXTS, LensTraining(steps=31), checkpoint=tmp_path / "c"
        )


def test_training_stops_when_nothing_improves(load_tiny):
    model = load_tiny()
    plan = LensTraining(steps=50, learning_rate=1e-9, evaluate_every=2, patience=3, held_out=0.2)
    run = train_lens(model, TunedLens(model), TEXTS, plan)
    assert run.provenance["stopped_early"] and run.provenance["steps"] == 6


def test_saved_lenses_come_back_and_those_of_other_models_are_refused(load_tiny, tmp_path):
    model = load_tiny("gpt2")
    for name in ("tuned low rank", "translator", "full"):
        lens = perturbed(MAKERS[name](model))
        again = load_lens(model, lens.save(tmp_path / name))
        assert type(again) is type(lens) and again.settings == lens.settings
        for key, tensor in lens.parameters.items():
            assert torch.equal(tensor, again.parameters[key])
        with pytest.raises(FileExistsError, match="overwrite=True"):
            lens.save(tmp_path / name)
    for other in (load_tiny("gpt2", processing="fold"), load_tiny("llama")):
        with pytest.raises(ValueError, match="belongs to a model with fingerprint"):
            load_lens(other, tmp_path / "translator")
        moved = load_lens(other, tmp_path / "translator", transfer=True)
        assert moved.trained_on == lens.trained_on
    with pytest.raises(ValueError, match="holds no lens"):
        load_lens(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_lens(model, tmp_path / "nothing")


def test_a_saved_lens_can_be_read_by_whom_the_umask_lets(load_tiny, tmp_path):
    model = load_tiny("gpt2")
    (tmp_path / "plain").touch()
    folder = TunedLens(model).save(tmp_path / "lens")
    modes = {path.stat().st_mode for path in (tmp_path / "plain", *folder.iterdir())}
    assert len(modes) == 1


def test_a_lens_is_fetched_from_the_hub_by_its_id(load_tiny, tmp_path, monkeypatch):
    import huggingface_hub

    model = load_tiny("gpt2")
    lens = perturbed(TunedLens(model))
    # What the hub's client keeps of a repository that it has fetched; offline it reads that.
    kept, revision = tmp_path / "models--someone--tuned-lens", "0" * 40
    for name in ("snapshots", "refs"):
        (kept / name).mkdir(parents=True)
    lens.save(kept / "snapshots" / revision)
    (kept / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    again = load_lens(model, "someone/tuned-lens")
    for key, tensor in lens.parameters.items():
        assert torch.equal(tensor, again.parameters[key])
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"):
        load_lens(model, "someone/else")


def test_a_folder_without_its_weights_or_with_broken_ones_is_told(load_tiny, tmp_path):
    model = load_tiny()
    folder = TunedLens(model).save(tmp_path / "lens")
    weights = folder / "lens.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no lens"):
        load_lens(model, folder)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no lens"):
        load_lens(model, folder)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.pop("fingerprint"), "holds no lens .*fingerprint"),
        (lambda c: c.pop("unembedding"), "holds no lens .*unembedding"),
        (lambda c: c.update(provenance=3), "holds no lens"),
        (lambda c: c.update(format="new"), "holds no lens"),
        (lambda c: c.update(format=float("inf")), "holds no lens"),
        (lambda c: c.update(type=["tuned"]), "unknown type of lens"),
        (lambda c: c.update(settings=["rank"]), "no lens has its settings"),
        (lambda c: c["settings"].update(ranP=2), "no lens has its settings .*ranP"),
        (lambda c: c["settings"].update(layers=[float("inf")]), "no lens has its settings"),
    ],
)
def test_damaged_settings_of_a_lens_are_told(load_tiny, tmp_path, change, says):
    model = load_tiny()
    path = TunedLens(model).save(tmp_path / "lens") / "lens.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load_lens(model, path.parent)


def test_a_lens_of_another_model_is_refused_unless_it_is_moved(load_tiny):
    model, other = load_tiny("gpt2"), load_tiny("gpt2", processing="fold")
    lens, heads = TunedLens(model), AttentionLens(model, layers=[1])
    fact = tiny_fact("w3 of w5", "w1 w3 of w5 is")
    vectors = torch.ones(1, 32)
    calls = {
        "logit_lens": lambda m, x, _: logit_lens(m, TEXTS[0], lens=x),
        "fact_trajectories": lambda m, x, _: fact_trajectories(m, [fact], lens=x),
        "read_vectors": lambda m, x, _: read_vectors(m, vectors, lens=x, layer=1),
        "train_lens": lambda m, x, _: train_lens(m, x, TEXTS, LensTraining(steps=1)),
        "evaluate_lens": lambda m, x, _: evaluate_lens(m, x, TEXTS[:2]),
        "evaluate_heads": lambda m, _, y: evaluate_heads(m, y, TEXTS[:2]),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="bound to a model with fingerprint"):
            call(other, lens, heads)
        call(other, lens.moved(other), heads.moved(other))
    with pytest.raises(ValueError, match="bound to a model"):
        logit_lens(other, TEXTS[0], lens=LogitLens(model))
    # The same weights under another object are the same model.
    same = load_tiny("gpt2", fresh=True)
    assert same is not model and logit_lens(same, TEXTS[0], lens=lens).n_used == 1


def test_lenses_move_to_other_layers_and_models(load_tiny):
    model, other = load_tiny("gpt2"), load_tiny("llama")
    lens = perturbed(TunedLens(model, layers=[0, 2]))
    moved = lens.moved(layers={1: 2})
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moved.logits(x, layer=1), lens.logits(x, layer=2))
    assert moved.translate(x, layer=1).equal(lens.moved(other).translate(x, layer=2))
    with pytest.raises(ValueError, match="not 1"):
        lens.logits(x, layer=1)
    with pytest.raises(ValueError, match="not 1"):
        lens.moved(layers={0: 1})
    with pytest.raises(ValueError, match="0..3"):
        lens.moved(layers={4: 0})


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_lens_that_was_moved_is_evaluated_by_the_model_and_layer_it_reads(load_tiny, shape):
    model = load_tiny("llama")
    other = load_tiny(shape, processing="fold" if shape == "llama" else "none")
    lens = perturbed(TunedLens(model))
    result = evaluate_lens(other, lens.moved(other, layers={0: 1, 2: 1}), TEXTS[:1])
    ids = encode(other, TEXTS[0]).ids
    for layer in (0, 2):
        example = example_of(other, TunedLens(other), TEXTS[:1])
        own, x = example.output, example.read[layer]
        reading = LogitLens(other).logits(lens.translate(x, layer=1), layer=layer).log_softmax(-1)
        got = result.sel(layer=layer)
        assert np.isclose(got["kl"].item(), kl(own, reading).mean(), atol=1e-5)
        losses = [
            np.mean([-t[i, ids[i + 1]].item() for i in range(len(ids) - 1)]) for t in (reading, own)
        ]
        assert np.isclose(got["excess_cross_entropy"].item(), losses[0] - losses[1], atol=1e-5)
        plain = kl(own, LogitLens(other).logits(x, layer=layer)).mean()
        assert np.isclose(got["logit_lens_kl"].item(), plain, atol=1e-5)


def test_a_moved_lens_that_is_trained_further_belongs_to_its_new_model(load_tiny, tmp_path):
    model, other = load_tiny("gpt2"), load_tiny("llama")
    moved = TunedLens(model, layers=[1]).moved(other)
    folder = moved.save(tmp_path / "moved")
    with pytest.raises(ValueError, match="belongs to a model"):
        load_lens(other, folder)
    train_lens(other, moved, TEXTS, LensTraining(steps=1, max_tokens=256))
    load_lens(other, moved.save(folder, overwrite=True))
    with pytest.raises(ValueError, match="belongs to a model"):
        load_lens(model, folder)


def test_a_lens_of_a_model_with_other_heads_does_not_move(load_tiny, tmp_path):
    two = load_model(save_checkpoint("gpt2", tmp_path, n_head=2), device="cpu", dtype="float32")
    lens = AttentionLens(load_tiny("gpt2"), layers=[1])
    with pytest.raises(ValueError, match=r"a model of another shape: weight is \[1, 4, 32, 32\]"):
        lens.moved(two)
    with pytest.raises(ValueError, match=r"this model needs \[1, 2, 32, 32\]"):
        load_lens(two, lens.save(tmp_path / "lens"), transfer=True)


def test_evaluation_by_hand(tiny):
    lens = perturbed(TunedLens(tiny))
    texts = ["w1 w2 w3", "w7 w8 w9 w10 w11"]
    result = evaluate_lens(tiny, lens, texts, top_k=3)
    plain = LogitLens(tiny)
    for i, text in enumerate(texts):
        ids = encode(tiny, text).ids
        example = example_of(tiny, lens, [text])
        own, x = example.output, example.read[1]
        reading = lens.logits(x, layer=1).log_softmax(-1)
        got = {n: result[n].isel(example=i).sel(layer=1).item() for n in result.data.data_vars}
        assert np.isclose(got["kl"], kl(own, reading).mean(), atol=1e-5)
        assert np.isclose(got["logit_lens_kl"], kl(own, plain.logits(x, layer=1)).mean(), atol=1e-5)
        steps = range(len(ids) - 1)
        loss = -np.mean([reading[t, ids[t + 1]].item() for t in steps])
        own_loss = -np.mean([own[t, ids[t + 1]].item() for t in steps])
        assert np.isclose(got["cross_entropy"], loss, atol=1e-5)
        assert np.isclose(got["excess_cross_entropy"], loss - own_loss, atol=1e-5)
        tops = [[set(t.topk(k).indices.tolist()) for k in (1, 3)] for t in (*reading, *own)]
        both = list(zip(tops[: len(ids)], tops[len(ids) :], strict=True))
        assert np.isclose(got["agreement"], np.mean([a[0] == b[0] for a, b in both]))
        assert np.isclose(got["overlap"], np.mean([len(a[1] & b[1]) / 3 for a, b in both]))


def test_a_text_of_one_token_has_no_next_token(load_tiny, checkpoints):
    model = load_model(checkpoints["gpt2"], device="cpu", bos=False)
    found = evaluate_lens(model, TunedLens(model), ["w1 w2 w3", "w7"])
    whole = evaluate_lens(model, TunedLens(model), ["w1 w2 w3"])
    for name in ("cross_entropy", "excess_cross_entropy"):
        assert np.isnan(found[name][1]).all()
        assert np.allclose(found.mean()[name], whole[name][0])
    assert (found["kl"][1] > 0).all()


def test_heads_are_evaluated_alone_and_left_out(tiny):
    lens = AttentionLens(tiny, layers=[1])
    result = evaluate_heads(tiny, lens, TEXTS[:4])
    example = example_of(tiny, lens, TEXTS[:4], without_heads=True)
    for head in (0, 3):
        each = list(lens.losses(example, 1, "each"))[head].mean()
        without = kl(example.output, example.without[1][head]).mean()
        assert np.isclose(result["kl"].sel(layer=1, head=head), each, atol=1e-5)
        assert np.isclose(result["without_kl"].sel(layer=1, head=head), without, atol=1e-5)
    with pytest.raises(ValueError, match="not heads"):
        evaluate_heads(tiny, TunedLens(tiny), TEXTS)


def test_a_trained_lens_reads_prompts_like_the_logit_lens_does(tiny):
    lens = perturbed(TunedLens(tiny))
    result = logit_lens(tiny, TEXTS[0], positions="each", lens=lens, readout=Readout(logprobs=True))
    assert np.allclose(result["kl"].isel(layer=-1), 0, atol=1e-5)
    x = example_of(tiny, lens, TEXTS[:1]).read[1]
    want = lens.logits(x, layer=1).log_softmax(-1)
    assert np.allclose(result["logprobs"].sel(layer=1).values[0], want, atol=1e-5)
    heads = perturbed(AttentionLens(tiny))
    read = logit_lens(tiny, TEXTS[0], kind="result", lens=heads, track={"a": "w5"})
    assert read["prob"].shape == (1, 3, 1, 4, 1)


def test_small_lenses_are_small(load_tiny):
    model = load_tiny()
    full = AttentionLens(model, variant="full").n_parameters
    assert full == 3 * 4 * (32 * 90 + 90)
    assert AttentionLens(model, rank=2).n_parameters == 3 * 4 * (2 * 32 * 2 + 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: TunedLens(m, kind="result"), "AttentionLens reads heads"),
        (lambda m: TunedLens(m, rank=0), "1..32"),
        (lambda m: TunedLens(m, layers=[5]), "0..3"),
        (lambda m: AttentionLens(m, variant="svd"), "unknown variant"),
        (lambda m: AttentionLens(m, variant="full", rank=3), "has no rank"),
        (lambda m: AttentionLens(m, rank=99), "1..32"),
        (lambda m: AttentionLens(m).logits(torch.zeros(1, 32), layer=0), "name it with head="),
        (
            lambda m: train_lens(m, TunedLens(m), TEXTS, LensTraining(objective="sum")),
            "unknown objective",
        ),
        (lambda m: train_lens(m, TunedLens(m), ["w1", "w1"]), "1 distinct"),
        (lambda m: LensTraining(held_out=1.0), "share between"),
        (lambda m: LensTraining(steps=0), "steps is 0"),
        (lambda m: LensTraining(cells=0), "cells is 0"),
        (lambda m: evaluate_lens(m, TunedLens(m, layers=[1]), TEXTS, layers=[2]), "not 2"),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tiny())
