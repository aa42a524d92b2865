"""Small GGUF files of both families, from random models, in llama.cpp's names and orders."""

from __future__ import annotations

import json

import torch

from tests.models import config

TEXTS = ["the cat sat on the mat", "the dog saw the cat and the other dog"]


def words():
    """A trained byte-level tokenizer: (vocabulary in order, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    found = json.loads(core.to_str())["model"]
    return sorted(found["vocab"], key=found["vocab"].get), found["merges"]


def network(shape):
    from transformers import AutoModelForCausalLM

    sizes = config(shape)
    sizes.vocab_size = len(words()[0])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(sizes)
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    return model.eval()


def rotated(weight, n_heads):
    """The order in which llama.cpp keeps the rows of W_Q and W_K: pairs side by side."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(model):
    """GGUF name -> array."""
    c, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    found = {}
    if c.model_type == "gpt2":
        parts = {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                for kind in ("weight", "bias"):
                    value = state[f"transformer.h.{i}.{ours}.{kind}"]
                    found[f"blk.{i}.{theirs}.{kind}"] = value.T
        ends = {
            "token_embd.weight": "wte.weight",
            "position_embd.weight": "wpe.weight",
            "output_norm.weight": "ln_f.weight",
            "output_norm.bias": "ln_f.bias",
        }
        return found | {k: state[f"transformer.{v}"] for k, v in ends.items()}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for i in range(c.num_hidden_layers):
        for theirs, ours in parts.items():
            value = state[f"model.layers.{i}.{ours}.weight"]
            found[f"blk.{i}.{theirs}.weight"] = (
                rotated(value, heads[theirs]) if theirs in heads else value
            )
    return found | {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }


def write(model, path, *, kind="F32", architecture=None, bos=False, extra=()):
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(str(path), architecture or c.model_type)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
    if c.model_type == "gpt2":
        writer.add_feed_forward_length(128)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(48)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(c.vocab_size)
    tokens, merges = words()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(bos)
    for name, value in {**tensors(model), **dict(extra)}.items():
        if kind == "F32" or value.ndim == 1 or value.shape[-1] % 32:
            writer.add_tensor(name, value.astype("float32").copy())
        else:
            wanted = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(value.copy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
