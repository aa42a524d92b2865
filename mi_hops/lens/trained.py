"""What trained lenses share: parameters, where they belong, saving and loading, moving.

A trained lens keeps plain tensors, stacked over its layers, and reads through the unembedding of the
model it is bound to; the model's own weights are neither stored nor trained.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_hops.lens import tuned_files
from mi_hops.lens.tuned_files import is_tuned_lens, read_tuned_lens, reads_through
from mi_hops.lens.vectors import resolve_layers
from mi_hops.model import (
    HookedModel,
    device_of,
    dtype_of,
    fingerprint,
    processing_of,
    provenance,
    unembedding,
)
from mi_hops.model.identity import ln_final
from mi_hops.model.numeric import kl_divergence, wide_dtype
from mi_hops.result.files import replacing

#: Files of a saved lens, and the version of their layout.
CONFIG, WEIGHTS, FORMAT = "lens.json", "lens.safetensors", 1


@dataclass(frozen=True, repr=False)
class Example:
    """What a lens learns from: vectors at some cells of a batch and the model's output there.

    Attributes:
        read: layer -> ``[cell, d_model]``, or ``[cell, head, d_model]`` for ``result``.
        output: log-probabilities of the model's next token, ``[cell, vocab]``.
        without: layer -> logits ``[head, cell, vocab]`` of the model run without each head; only
            where an objective needs them.
    """

    read: Mapping[int, Float[Tensor, "cell *head d_model"]]
    output: Float[Tensor, "cell vocab"]
    without: Mapping[int, Float[Tensor, "head cell vocab"]] | None = None


class TrainedLens(ABC):
    """A lens with trained parameters; see `TunedLens` and `AttentionLens`.

    Attributes:
        model: the model whose read-out it uses.
        kind: what it reads, one of `KINDS`.
        layers: the layers it has parameters for.
        parameters: name -> tensor, the first axis along `layers`, in float32 or wider.
        norm: whether the final norm comes before the unembedding.
        trained_on: fingerprint of the model that the parameters were made for.
        notes: how they were trained; anything JSON can hold.
    """

    type_name: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]  #: what it can be trained for; the first is the default
    kind: str
    norm: bool

    def __init__(
        self, model: HookedModel, layers: Sequence[int], parameters: Mapping[str, Tensor]
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        place, wide = device_of(model), wide_dtype(dtype_of(model))
        self.parameters = {name: p.to(place, wide) for name, p in parameters.items()}
        self.trained_on = fingerprint(model)
        self.notes: dict[str, Any] = {}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that create a lens of this shape."""

    @abstractmethod
    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """As `Lens.logits`."""

    @abstractmethod
    def losses(
        self, example: Example, layer: int, objective: str
    ) -> Iterator[Float[Tensor, "cell"]]:
        """Losses (nats) of a layer at each cell, in parts that are averaged.

        One part is made and differentiated at a time, so that the logits of two never coexist.
        """

    @property
    def name(self) -> str:
        """Short label."""
        return self.type_name

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def row(self, layer: int) -> int:
        """Index of a layer in the parameters.

        Raises:
            ValueError: a layer that the lens does not have.
        """
        if layer in self.layers:
            return self.layers.index(layer)
        raise ValueError(
            f"this {self.type_name} lens has layers {list(self.layers)} of {self.kind!r}, not "
            f"{layer}; lens.moved(layers={{{layer}: one of them}}) reads with another's"
        )

    def moved(
        self, model: HookedModel | None = None, *, layers: Mapping[int, int] | None = None
    ) -> TrainedLens:
        """This lens moved to other layers, or to another model of the same width.

        Args:
            model: reads through this model's final norm and unembedding from now on.
            layers: layer to read -> layer whose parameters are used; default each its own.

        Raises:
            ValueError: a model of another width, or of another vocabulary where the lens stores
                one; layers that either does not have.
        """
        target = self.model if model is None else model
        wanted = dict(layers) if layers is not None else {layer: layer for layer in self.layers}
        resolve_layers(target, self.kind, list(wanted))
        fresh = type(self)(target, **{**self.settings, "layers": list(wanted)})
        rows = [self.row(source) for source in wanted.values()]
        fresh.fill({name: tensor[rows] for name, tensor in self.parameters.items()})
        fresh.trained_on = self.trained_on
        fresh.notes = {**self.notes, "moved_from_layers": {str(k): v for k, v in wanted.items()}}
        return fresh

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Copy in parameters of the same shapes.

        Raises:
            ValueError: one that is missing or of another shape.
        """
        for name, own in self.parameters.items():
            shape = list(given[name].shape) if name in given else "missing"
            if shape != list(own.shape):
                raise ValueError(
                    f"the lens was made for a model of another shape: {name} is {shape}, this model "
                    f"needs {list(own.shape)}"
                )
            self.parameters[name] = given[name].detach().clone().to(own.device, own.dtype)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder with ``lens.safetensors`` and ``lens.json``, which can also be pushed to the hub.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
        """
        config = {
            "format": FORMAT,
            "type": self.type_name,
            "settings": self.settings,
            "fingerprint": self.trained_on,
            "unembedding": unembedding_hash(self.model),
            "provenance": provenance(self.model),
            "notes": self.notes,
        }
        with replacing(folder, overwrite=overwrite) as partial:
            partial.mkdir()
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.parameters.items()}
            save_file(tensors, partial / WEIGHTS)
            (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return Path(folder)


def load_lens(model: HookedModel, source: str | Path, *, transfer: bool = False) -> TrainedLens:
    """Load a saved lens and bind it to `model`.

    Args:
        source: a folder written by `TrainedLens.save`, or by the tuned-lens package (``params.pt`` beside
            ``config.json``); or on the hub ``"owner/name"``, or a folder of a repository,
            ``"owner/name/folder"``, of a space, ``"spaces/owner/name/folder"``.
        transfer: accept a lens of another model of the same shape; else it is refused, because its
            readings would mean nothing.

    Raises:
        FileNotFoundError: no such folder, and nothing of that name could be fetched.
        ValueError: no lens, a broken one, one of a newer format, or one of another model.

    Examples:
        >>> import mi_hops, tempfile
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> folder = mi_hops.TunedLens(model, layers=[3], rank=2).save(tempfile.mkdtemp() + "/lens")
        >>> mi_hops.load_lens(model, folder)
        TunedLens(layers=[3], kind='resid', rank=2, norm=True)
    """
    folder = _folder(source)
    if not (folder / CONFIG).exists() and is_tuned_lens(folder):
        return _from_tuned_lens(model, folder, transfer)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, settings, version = str(config["type"]), config["settings"], int(config["format"])
        same = (config["fingerprint"], config["unembedding"])
        processing, notes = config["provenance"]["processing"], config["notes"]
        stored = load_file(folder / WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no lens ({CONFIG}, {WEIGHTS}: {error!r})") from error
    if version > FORMAT:
        raise ValueError(f"{folder} has lens format {version}; update mi_hops")
    types = {cls.type_name: cls for cls in TrainedLens.__subclasses__()}
    if kind not in types:
        raise ValueError(f"unknown type of lens {kind!r}; expected one of {sorted(types)}")
    if not transfer and same != (fingerprint(model), unembedding_hash(model)):
        raise ValueError(
            f"this lens belongs to a model with fingerprint {same[0]} (weight processing "
            f"{processing!r}), this one has "
            f"{fingerprint(model)} ({processing_of(model)!r}); pass transfer=True to read one model "
            "with another's lens"
        )
    try:
        lens = types[kind](model, **settings)
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"{folder} is damaged: no lens has its settings ({CONFIG}: {error})"
        ) from error
    lens.fill(stored)
    lens.trained_on, lens.notes = same[0], notes
    return lens


def _from_tuned_lens(model: HookedModel, folder: Path, transfer: bool) -> TrainedLens:
    config, stored = read_tuned_lens(folder)
    if not transfer and not (reads_through(config, model) and processing_of(model) == "none"):
        raise ValueError(
            f"this lens was trained for {config.get('base_model_name_or_path')!r}, with another "
            f"unembedding than this model's (weight processing {processing_of(model)!r}; such a lens "
            "reads unprocessed weights); pass transfer=True to read one model with another's lens"
        )
    (tuned,) = (cls for cls in TrainedLens.__subclasses__() if cls.type_name == "tuned")
    if len(stored["weight"]) > int(model.cfg.n_layers):
        raise ValueError(
            f"the lens was made for a model of another shape: it has {len(stored['weight'])} layers, "
            f"this model {model.cfg.n_layers}; give lens.moved(layers=...) of a model that fits"
        )
    lens = tuned(model, layers=list(range(len(stored["weight"]))))  # type: ignore[call-arg]
    lens.fill(stored)
    if transfer:
        lens.trained_on = f"tuned-lens: {config.get('base_model_name_or_path')}"
    lens.notes = {"from": "tuned-lens", "config": config}
    return lens


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    parts = text.split("/")
    space = parts[0] == "spaces"
    owner_name, within = parts[space : space + 2], "/".join(parts[space + 2 :])
    if folder.is_absolute() or text.startswith((".", "~")) or len(owner_name) != 2 or "" in parts:
        raise FileNotFoundError(f"there is no folder {text!r}")
    from huggingface_hub import snapshot_download

    names = [CONFIG, WEIGHTS, tuned_files.CONFIG, tuned_files.PARAMS]
    patterns = [f"{within}/{name}" if within else name for name in names]
    try:
        fetched = snapshot_download(
            "/".join(owner_name),
            repo_type="space" if space else None,
            allow_patterns=patterns,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{text!r} is not a local folder and could not be fetched from the hub ({error})"
        ) from error
    return Path(fetched) / within


def unembedding_hash(model: HookedModel) -> str:
    """A digest of W_U, b_U and the final norm: what a lens reads through."""
    digest = hashlib.sha256()
    norm = ln_final(model)
    tensors = [*unembedding(model), *(p.detach() for p in (norm.parameters() if norm else ()))]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 65536)][:65536].to("cpu", torch.float64)
        total = flat.sum(dtype=torch.float64).item()
        digest.update(f"{tuple(tensor.shape)}{total:.9e}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def kl(
    output: Float[Tensor, "cell vocab"], logits: Float[Tensor, "cell vocab"]
) -> Float[Tensor, "cell"]:
    """KL(output || lens) at each cell, nats; `output` holds log-probabilities."""
    return kl_divergence(output.to(logits.device), logits.log_softmax(-1))


def low_rank(*shape: int, rank: int, width: int, seed: int) -> dict[str, Tensor]:
    """The halves of a product of that rank, ``down`` at random and ``up`` at 0.

    Args:
        shape: leading axes, then the input's width.
    """
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(*shape, rank, generator=generator) / shape[-1] ** 0.5
    return {"down": down, "up": torch.zeros(*shape[:-1], rank, width)}


def check_rank(rank: int | None, d_model: int) -> None:
    """Refuse, with a ValueError, a rank that no d x d translator can have."""
    if rank is not None and not 1 <= rank <= d_model:
        raise ValueError(f"rank is {rank}; expected 1..{d_model}, or None for a full translator")
