"""The adapter over both TransformerLens classes, against plain transformers and each other."""

from __future__ import annotations

import json

import pytest
import torch

from mi_hops import model as M
from mi_hops.model.hooks import hook_point
from mi_hops.model.shortcuts import is_touched, may_be_rewritten
from tests.models import WORDS, tokenizer

TOKENS = torch.tensor([[1, 7, 8, 9, 30], [1, 40, 41, 6, 11]])


def hf(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("shape", ["gpt2", "llama", "llama32"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_logits_equal_transformers(load_tiny, checkpoints, shape, backend):
    with torch.no_grad():
        expected = hf(checkpoints[shape])(TOKENS).logits
    logits = M.forward(load_tiny(shape, backend), TOKENS)
    assert torch.allclose(logits, expected, atol=2e-5, rtol=0)


def test_right_padding_needs_no_mask(tiny):
    short = TOKENS[:1, :3]
    padded = torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], 1)
    alone = M.forward(tiny, short)
    assert torch.allclose(M.forward(tiny, padded)[:, :3], alone, atol=1e-5, rtol=0)


def test_right_padding_whatever_the_tokenizers_side(load_tiny):
    model = load_tiny("gpt2", "hooked", fresh=True)
    expected = M.forward(model, TOKENS)
    model.tokenizer.padding_side = "left"
    assert torch.equal(M.forward(model, TOKENS), expected)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "llama32"])
def test_fingerprint_is_the_same_on_both_classes(load_tiny, shape):
    assert M.fingerprint(load_tiny(shape, "hooked")) == M.fingerprint(load_tiny(shape, "bridge"))


def test_fingerprint_sees_a_low_rank_change(tiny):
    before = M.fingerprint(tiny)
    old = M.read_matrix(tiny, "W_O", 1)
    u = torch.zeros(old.shape[0])
    u[3] = 1e-3
    M.write_matrix(tiny, "W_O", 1, old + u[:, None] * torch.ones(old.shape[1]))
    assert M.fingerprint(tiny) != before
    M.write_matrix(tiny, "W_O", 1, old)
    assert M.fingerprint(tiny) == before


def test_fingerprint_sees_one_element_of_anything(tiny):
    before = M.fingerprint(tiny)
    for name, weight in tiny.named_parameters():
        flat = weight.data.view(-1) if weight.data.is_contiguous() else weight.data.reshape(-1)
        if flat.data_ptr() != weight.data_ptr():
            continue  # not a view; nothing would change
        old = flat[-1].item()
        flat[-1] = old + 0.01
        assert M.fingerprint(tiny) != before, name
        flat[-1] = old
    assert M.fingerprint(tiny) == before


def test_w_o_is_read_and_written_the_right_way_round(tiny):
    """z @ W_O + b_O is the attention output, although W_O is square."""
    old = M.read_matrix(tiny, "W_O", 1)
    names = [M.hook_name("z", 1), M.hook_name("attn_out", 1)]
    acts, _ = M.capture(tiny, TOKENS, names)
    z = acts[names[0]].flatten(2)
    bias = getattr(tiny.blocks[1].attn, "b_O", None)
    expected = z @ old + (0 if bias is None else bias)
    assert torch.allclose(acts[names[1]], expected, atol=1e-5)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    try:
        M.write_matrix(tiny, "W_O", 1, new)
        changed, _ = M.capture(tiny, TOKENS, names)
        assert torch.allclose(changed[names[1]], expected + z @ (new - old), atol=1e-4)
    finally:
        M.write_matrix(tiny, "W_O", 1, old)
    assert torch.equal(M.read_matrix(tiny, "W_O", 1), old)


def test_write_w_o_refuses(tiny):
    old = M.read_matrix(tiny, "W_O", 0)
    with pytest.raises(ValueError, match=r"W_O of layer 0 is \(32, 32\)"):
        M.write_matrix(tiny, "W_O", 0, old[:4])
    with pytest.raises(ValueError, match="non-finite"):
        M.write_matrix(tiny, "W_O", 0, old * float("nan"))
    with pytest.raises(ValueError, match="out of range"):
        M.write_matrix(tiny, "W_O", 3, old)
    assert torch.equal(M.read_matrix(tiny, "W_O", 0), old)


def test_half_precision_overflow_is_refused(load_tiny):
    model = load_tiny("gpt2", "bridge", "float16")
    old = M.read_matrix(model, "W_O", 0)
    with pytest.raises(ValueError, match="non-finite"):
        M.write_matrix(model, "W_O", 0, old.float() + 1e6)
    assert torch.equal(M.read_matrix(model, "W_O", 0), old)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_resid_mid_patch_is_true_on_both(load_tiny, shape):
    """A change at resid_mid reaches the skip connection: equal to the change at attn_out."""
    delta = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for backend in ("bridge", "hooked"):
        model = load_tiny(shape, backend)
        mid = M.forward(model, TOKENS, hooks=[(M.hook_name("resid_mid", 1), lambda x: x + delta)])
        out = M.forward(model, TOKENS, hooks=[(M.hook_name("attn_out", 1), lambda x: x + delta)])
        assert torch.allclose(mid, out, atol=1e-5)
        assert not torch.allclose(mid, M.forward(model, TOKENS), atol=1e-2)


def test_hook_returning_none_leaves_the_activation(tiny):
    seen = []
    out = M.forward(tiny, TOKENS, hooks=[(M.hook_name("z", 0), lambda x: seen.append(x.shape))])
    assert seen == [(2, 5, 4, 8)]
    assert torch.equal(out, M.forward(tiny, TOKENS))


def test_hooks_are_removed_after_an_exception(tiny):
    def broken(x):
        raise KeyError("boom")

    with pytest.raises(KeyError):
        M.forward(tiny, TOKENS, hooks=[(M.hook_name("mlp_out", 0), broken)])
    assert not any(p.fwd_hooks for p in tiny.hook_dict.values())


def test_a_hook_that_never_fires_raises(tiny):
    with pytest.raises(RuntimeError, match="never fired"):
        M.forward(tiny, TOKENS, hooks=[(M.hook_name("z", 2), lambda x: x)], stop_at_layer=1)


def test_hook_points_are_those_of_hook_dict(tiny):
    points = tiny.hook_dict
    assert all(hook_point(tiny, name) is point for name, point in points.items())
    for name in ("blocks.7.attn.hook_z", "blocks.0.attn", "cfg", "no", ""):
        assert hook_point(tiny, name) is None


def test_each_context_takes_off_its_own_hooks(tiny):
    """The user's stay, and those of other contexts."""
    name, seen = M.hook_name("z", 0), []
    with (
        tiny.hooks(fwd_hooks=[(name, lambda x, hook: seen.append("user's"))]),
        M.hooked(tiny, [(name, lambda x: seen.append("outer"))]),
    ):
        with M.hooked(tiny, [(name, lambda x: seen.append("inner"))]):
            tiny(TOKENS)
        tiny(TOKENS)
    tiny(TOKENS)
    assert seen == ["user's", "outer", "inner", "user's", "outer"]
    assert tiny.context_level == 0


def test_missing_hooks_are_named(tiny):
    with pytest.raises(M.MissingHookError, match=r"blocks\.7\.attn\.hook_z"):
        M.forward(tiny, TOKENS, hooks=[("blocks.7.attn.hook_z", lambda x: x)])
    with pytest.raises(ValueError, match="unknown activation kind 'zz'"):
        M.hook_name("zz")


def test_capture_stops_early_and_equals_the_full_pass(tiny):
    name = M.hook_name("resid_post", 0)
    early, none = M.capture(tiny, TOKENS, [name])
    full, logits = M.capture(tiny, TOKENS, [name], logits=True)
    assert none is None
    assert torch.equal(early[name], full[name])
    assert torch.allclose(logits, M.forward(tiny, TOKENS), atol=1e-6)


def test_read_out_is_the_models_own(tiny):
    name = M.hook_name("resid_post", 2)
    acts, logits = M.capture(tiny, TOKENS, [name], logits=True)
    assert torch.allclose(M.read_out(tiny, acts[name]), logits, atol=1e-5)
    raw = M.read_out(tiny, acts[name], norm=False)
    assert torch.allclose(raw, acts[name] @ tiny.W_U + M.unembedding(tiny)[1], atol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "llama32"])
def test_the_read_out_in_place_is_the_models_own(load_tiny, shape):
    """forward reads W_U where it lies; hooks behind the blocks act and gradients flow as ever."""
    model = load_tiny(shape, "hooked", "float64")
    tokens = torch.tensor([[1, 7, 8, 9], [1, 4, 5, 6]])
    assert torch.allclose(M.forward(model, tokens), model(tokens), atol=1e-12, rtol=0)
    for name in ("ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"):
        hooks = [(name, lambda x: 2 * x)]
        own = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 2 * x)])
        assert torch.allclose(M.forward(model, tokens, hooks=hooks), own, atol=1e-12, rtol=0), name


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_folded_weights_are_noticed(load_tiny, shape):
    for backend in ("hooked", "bridge"):
        assert M.processing_of(load_tiny(shape, backend)) == "none"
        folded = load_tiny(shape, backend, processing="fold")
        assert M.processing_of(folded) == "fold"
        assert M.provenance(folded)["processing"] == "fold"


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_weights_that_are_only_centred_are_noticed(load_tiny, backend):
    model = load_tiny("gpt2", backend, fresh=True)
    process = model.process_weights_ if backend == "hooked" else model.process_weights
    process(fold_ln=False)
    assert M.processing_of(model) == "centre"


def test_a_model_in_training_mode_is_refused_if_it_drops(load_tiny):
    tokens = torch.tensor([[1, 5, 6]])
    dropping = load_tiny("gpt2", "bridge", fresh=True)
    dropping.train()
    with pytest.raises(ValueError, match=r"training mode with dropout \(0.1\).*model.eval"):
        M.forward(dropping, tokens)
    dropping.eval()
    expected = M.forward(dropping, tokens)
    without = load_tiny("llama", "bridge", fresh=True)
    without.train()
    M.forward(without, tokens)
    assert torch.equal(M.forward(dropping, tokens), expected)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_model_loaded_in_inference_mode_gives_gradients(load_tiny, backend):
    with torch.inference_mode():
        model = load_tiny("gpt2", backend, fresh=True)
    assert not any(p.is_inference() for p in model.parameters())


def test_heads_are_counted_as_they_are(load_tiny):
    llama = load_tiny("llama")
    assert (M.n_kv_heads(llama), M.n_heads_of(llama, "v"), M.n_heads_of(llama, "z")) == (2, 2, 4)
    assert M.n_kv_heads(load_tiny("gpt2")) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(load_tiny, dtype):
    for backend in ("hooked", "bridge"):
        model = load_tiny("llama", backend, dtype)
        assert M.dtype_of(model) == getattr(torch, dtype)
        assert torch.isfinite(M.forward(model, TOKENS).float()).all()


class TestLoading:
    def test_unknown_name(self):
        with pytest.raises(OSError, match="cannot load 'no-such-model'"):
            M.load_model("no-such-model")

    def test_folder_without_config(self, tmp_path):
        with pytest.raises(ValueError, match="no config.json"):
            M.load_model(tmp_path)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="no local folder"):
            M.load_model(tmp_path / "gone")

    @pytest.mark.parametrize("more", [[], ["tokenizer_config.json"]])  # which is no tokenizer
    def test_folder_without_tokenizer(self, checkpoints, tmp_path, more):
        for name in ["config.json", "model.safetensors", *more]:
            (tmp_path / name).write_bytes((checkpoints["gpt2"] / name).read_bytes())
        with pytest.raises(ValueError, match="no tokenizer"):
            M.load_model(tmp_path)

    @pytest.mark.parametrize("backend", ["hooked", "bridge"])
    @pytest.mark.parametrize(
        ("broken", "content", "what"),
        [
            ("config.json", b"{", "config.json"),
            ("config.json", b'{"model_type": "nonsense"}', "config.json"),
            ("tokenizer.json", b"{", "tokenizer"),
            ("model.safetensors", b"no tensors", "weights"),
            ("model.safetensors", None, "weights"),
        ],
    )
    def test_a_broken_folder(self, checkpoints, tmp_path, broken, content, what, backend):
        if backend == "hooked" and M.hooked_class() is None:
            pytest.skip("this TransformerLens has no HookedTransformer")
        for file in checkpoints["gpt2"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / broken).unlink()
        if content is not None:
            (tmp_path / broken).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the {what} of this checkpoint") as found:
            M.load_model(tmp_path, device="cpu", backend=backend)
        assert "no local folder" not in str(found.value)

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x"])
    def test_a_device_that_is_not_there(self, checkpoints, device):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            M.load_model(checkpoints["gpt2"], device=device)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "float31"}, "unknown dtype"),
            ({"backend": "hoked"}, "backend is 'hoked'"),
            ({"processing": "some"}, "processing is 'some'"),
        ],
    )
    def test_bad_options(self, checkpoints, options, message):
        with pytest.raises(ValueError, match=message):
            M.load_model(checkpoints["gpt2"], **options)

    def test_weights_are_frozen_and_model_evaluates(self, tiny):
        assert not tiny.training
        assert not any(p.requires_grad for p in tiny.parameters())

    def test_another_class_is_refused(self):
        with pytest.raises(ValueError, match="got Linear"):
            M.backend_of(torch.nn.Linear(2, 2))


class TestOtherFamilies:
    """What a family has is served, what it lacks is named."""

    @pytest.fixture
    def load_other(self, tmp_path):
        from transformers import AutoModelForCausalLM

        def load(config):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
            tokenizer().save_pretrained(tmp_path)
            return M.load_model(tmp_path, device="cpu", dtype="float32"), tmp_path

        return load

    def test_neox_has_what_is_needed(self, load_other):
        from transformers import GPTNeoXConfig

        model, folder = load_other(
            GPTNeoXConfig(
                vocab_size=WORDS,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        with torch.no_grad():
            assert torch.allclose(M.forward(model, TOKENS), hf(folder)(TOKENS).logits, atol=1e-4)
        # Its rows may join late and start behind a prefix; its blocks run as they are.
        assert not is_touched(model) and not may_be_rewritten(model)
        before = M.fingerprint(model)
        old = M.read_matrix(model, "W_O", 1)
        M.write_matrix(model, "W_O", 1, old + 1)
        assert M.fingerprint(model) != before
        # Attention and MLP run side by side, so there is no state between them.
        with pytest.raises(M.MissingHookError, match=r"blocks\.1\.hook_resid_mid"):
            M.capture(model, TOKENS, [M.hook_name("resid_mid", 1)])

    def test_a_model_without_attention_is_refused_by_name(self, load_other):
        from transformers import MambaConfig

        model, _ = load_other(
            MambaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                state_size=4,
                num_hidden_layers=2,
                expand=2,
                time_step_rank=4,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
        assert not is_touched(model)
        for refused in (M.fingerprint, lambda m: M.w_o(m, 0)):
            with pytest.raises(M.MissingHookError, match=r"no weight blocks\.0\.attn"):
                refused(model)
        with pytest.raises(M.MissingHookError, match=r"no hook point blocks\.0\.attn\.hook_z"):
            M.capture(model, TOKENS, [M.hook_name("z", 0)])


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    mark = tmp_path / "was-run"
    (tmp_path / "stranger.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.Stranger"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="custom code"):
        M.load_model(tmp_path)
    assert not mark.exists()
