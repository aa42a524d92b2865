"""Saved lenses: from a folder or the hub, onto the model that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from mi_hops.lens.attention import AttentionLens
from mi_hops.lens.trained import CONFIG, FORMAT, WEIGHTS, TrainedLens, unembedding_hash
from mi_hops.lens.tuned import TunedLens
from mi_hops.model import HookedModel, fingerprint, provenance

_TYPES: dict[str, type[TrainedLens]] = {cls.type_name: cls for cls in (TunedLens, AttentionLens)}


def load_lens(model: HookedModel, source: str | Path, *, transfer: bool = False) -> TrainedLens:
    """A saved lens, bound to `model`.

    Args:
        source: a folder written by `TrainedLens.save`, or a hub id of a repository with its files.
        transfer: accept a lens of another model of the same shape; else it is refused, for it would
            give numbers without a meaning.

    Raises:
        FileNotFoundError: no such folder, and nothing of that name could be fetched.
        ValueError: no lens, a broken one, one of a newer format, or one of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder(source)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, settings, version = config["type"], config["settings"], config["format"]
        stored = load_file(folder / WEIGHTS)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no lens ({CONFIG}, {WEIGHTS}: {error!r})") from error
    if version > FORMAT:
        raise ValueError(f"{folder} has lens format {version}; update mi_hops")
    if kind not in _TYPES:
        raise ValueError(f"unknown type of lens {kind!r}; expected one of {sorted(_TYPES)}")
    same = (config["fingerprint"], config["unembedding"])
    if not transfer and same != (fingerprint(model), unembedding_hash(model)):
        raise ValueError(
            f"this lens belongs to a model with fingerprint {config['fingerprint']} (weight "
            f"processing {config['provenance']['processing']!r}), this one has "
            f"{fingerprint(model)} ({provenance(model)['processing']!r}); pass transfer=True to "
            "read one model with another's lens"
        )
    lens = _TYPES[kind].from_settings(model, settings)
    for name, own in lens.parameters.items():
        if name not in stored or stored[name].shape != own.shape:
            got = list(stored[name].shape) if name in stored else "missing"
            raise ValueError(f"{name} of this lens is {got}; this model needs {list(own.shape)}")
        lens.parameters[name] = stored[name].to(own.device, own.dtype)
    lens.trained_on, lens.notes = config["fingerprint"], config["notes"]
    return lens


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {text!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG, WEIGHTS]))
    except OSError as error:
        raise FileNotFoundError(
            f"{text!r} is no local folder and could not be fetched from the hub ({error})"
        ) from error
