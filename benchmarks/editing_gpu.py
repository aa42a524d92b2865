"""CREME on a 7B-shaped LLaMA with random weights: seconds, peak memory, weight form against hooks.

``python -m benchmarks.editing_gpu`` needs a CUDA device with about 20 GB and writes
``docs/benchmarks/editing-gpu.md``; ``--small`` runs a tiny model on whatever there is and writes
nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.editing_speed import TEMPLATES, request
from benchmarks.harness import table, write
from mi_hops.editing import PAPER, creme, edit_hooks
from mi_hops.model import forward, read_matrix
from mi_hops.text.tokens import encode


def build(small: bool, device: str) -> Any:
    """A random LLaMA as a TransformerBridge, bfloat16, made where it will run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = (64, 176, 12, 4) if small else (4096, 11008, 32, 32)
    config = LlamaConfig(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=sizes[2],
        num_attention_heads=sizes[3],
        vocab_size=32000,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w1", eos_token="w0", pad_token="w0", unk_token="w0"
    )
    tokenizer.init_kwargs.update(name_or_path="in-memory", add_bos_token=True)
    model = TransformerBridge.boot_transformers(
        "in-memory", hf_model=hf, tokenizer=tokenizer, device=device
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def measure(model: Any, layers: range) -> list[list[str]]:
    """Rows of (what, value)."""
    cuda = torch.cuda.is_available()

    def timed(call: Any) -> tuple[float, float, Any]:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = call()
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        return time.perf_counter() - start, peak, out

    asked = request(0)
    timed(lambda: creme(model, asked, layers=layers, templates=TEMPLATES, **PAPER))
    seconds, peak, edit = timed(
        lambda: creme(model, asked, layers=layers, templates=TEMPLATES, **PAPER)
    )
    rows = [["making the edit, s", f"{seconds:.2f}"], ["peak memory, GiB", f"{peak:.2f}"]]
    before = {i: read_matrix(model, "W_O", i) for i in layers}
    tokens = torch.tensor([encode(model, asked.two_hop_prompt).ids])
    with torch.no_grad():
        clean = forward(model, tokens)
        again = forward(model, tokens.repeat(4, 1))[:1]
        hooked = forward(model, tokens, hooks=edit_hooks(model, [edit]))
        seconds, _, _ = timed(lambda: edit.apply(model, check=False))
        rows.append(["applying in place, s", f"{seconds:.3f}"])
        written = forward(model, tokens)
        seconds, _, _ = timed(lambda: edit.undo(model))
    same = all(torch.equal(read_matrix(model, "W_O", i), w) for i, w in before.items())
    rows += [
        ["undoing, s", f"{seconds:.3f}"],
        ["weights bit-identical after undo", str(same)],
        ["effect of the edit, largest logit change", f"{float((written - clean).abs().max()):.3f}"],
        ["weight form - hook form, largest", f"{float((written - hooked).abs().max()):.4f}"],
        ["two bfloat16 runs (batch 1 and 4), largest", f"{float((clean - again).abs().max()):.4f}"],
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --small runs a tiny model on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = range(2, 11) if given.small else range(15, 24)
    found = table(("what", "value"), measure(build(given.small, device), layers))
    print(found)
    if not given.small:
        title = "CREME on a 7B-shaped LLaMA, bfloat16, 9 layers"
        print(write("editing-gpu", title, found, script="editing_gpu"))


if __name__ == "__main__":
    main()
