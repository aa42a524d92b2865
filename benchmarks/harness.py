"""What the benchmark scripts share: random models of real sizes, paired timings, tables in docs."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

#: TransformerLens's two classes, as `load_model` and as readers name them.
CLASSES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
RESULTS = Path(__file__).resolve().parent / "results"


def backends() -> list[Any]:
    """The classes that are installed."""
    from mi_hops.model import hooked_class

    return [name for name in CLASSES if name == "bridge" or hooked_class()]


def machine() -> str:
    """Processor, threads and versions, in one line."""
    from importlib import metadata

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformer-lens"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}; {versions}, "
        f"Python {platform.python_version()}"
    )


def gpt2_small(seed: int = 0, *, layers: int = 12, vocabulary: int = 50257) -> Any:
    """A random model of GPT-2 small's size as a HookedTransformer (or a Bridge on TransformerLens 4).

    Its tokenizer knows tokens as ``w0``, ``w1``, ...; nothing is downloaded.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=layers, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return wrap(GPT2LMHeadModel(config))


def llama_100m(seed: int = 0) -> Any:
    """A random LLaMA-shaped model of about 100M parameters with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=640,
        intermediate_size=1760,
        num_hidden_layers=14,
        num_attention_heads=10,
        num_key_value_heads=5,
        vocab_size=32000,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return wrap(LlamaForCausalLM(config))


def wrap(hf: Any) -> Any:
    """A random Hugging Face model, saved to a temporary folder and loaded as users load theirs."""
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mi_hops import load_model

    words = {f"w{i}": i for i in range(hf.config.vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w0", eos_token="w0", pad_token="w0", unk_token="w0"
    )
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_model(folder, bos=True)


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int = 5, warm_up: bool = True
) -> dict[str, Any]:
    """Times both in turn, A B A B ..., and gives the ratio pair by pair.

    Returns:
        ``ratio`` (theirs / ours: median, lowest, highest) and the median seconds of each.
    """
    if warm_up:
        ours()
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        row = []
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            row.append(time.perf_counter() - start)
        times.append((row[0], row[1]))
    ratios = [b / a for a, b in times]
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "ours_s": statistics.median(a for a, _ in times),
        "theirs_s": statistics.median(b for _, b in times),
        "pairs": pairs,
    }


class Peak:
    """Memory a block takes beyond what the process holds when it begins, in MiB (Linux; else nan)."""

    mib = float("nan")

    def __enter__(self) -> Peak:
        gc.collect()
        if self._readable():
            # What was freed goes back first; else a block that uses it again would seem to take none.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            self._before = self._resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._readable():
            self.mib = self._resident("VmHWM") - self._before

    @staticmethod
    def _readable() -> bool:
        return os.access("/proc/self/clear_refs", os.W_OK)

    @staticmethod
    def _resident(which: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def keep(page: str, part: str, value: Any) -> None:
    """Keep one measured part of a page, so that another run need not measure it again.

    Parts lie one to a file in ``benchmarks/results/<page>/``: several processes may write, and what
    was measured before a crash is not lost.
    """
    folder = RESULTS / page
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "value": value}, indent=1)
    (folder / f"{part}.json").write_text(text + "\n")


def kept(page: str) -> dict[str, Any]:
    """The parts of a page measured so far, by name."""
    files = sorted((RESULTS / page).glob("*.json"))
    return {file.stem: json.loads(file.read_text())["value"] for file in files}


def machines(page: str) -> str:
    """Where the parts of a page were measured."""
    found = {json.loads(f.read_text())["machine"] for f in (RESULTS / page).glob("*.json")}
    return "; or ".join(sorted(found)) or machine()


def write(name: str, title: str, body: str, *, script: str, folder: Path = DOCS) -> Path:
    """Write ``docs/benchmarks/<name>.md``, with what made it and where it ran."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(
        f"# {title}\n\n*Written by `python -m benchmarks.{script}`. Machine: {machines(name)}.*\n\n"
        f"{body.strip()}\n"
    )
    return path
