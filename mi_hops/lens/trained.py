"""What trained lenses share: parameters, where they belong, saving, moving.

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
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mi_hops.lens.reading import check_layers
from mi_hops.model import HookedModel, fingerprint, provenance, unembedding
from mi_hops.model.numeric import kl_divergence

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: Files of a saved lens, and the version of their layout.
CONFIG, WEIGHTS, FORMAT = "lens.json", "lens.safetensors", 1


@dataclass(frozen=True)
class Example:
    """What a lens learns from: vectors at some cells of a batch and the model's output there.

    Attributes:
        read: layer -> ``[cell, d_model]``, or ``[cell, head, d_model]`` for heads.
        output: log-probabilities of the model's next token, ``[cell, vocab]``.
        without: layer -> logits ``[head, cell, vocab]`` of the model run without each head; only
            where an objective needs them.
    """

    read: Mapping[int, Float[Tensor, "cell *head d_model"]]
    output: Float[Tensor, "cell vocab"]
    without: Mapping[int, Float[Tensor, "head cell vocab"]] | None = None


class TrainedLens(ABC):
    """A lens with parameters of its own; see `tuned.TunedLens` and `attention.AttentionLens`.

    Attributes:
        model: the model whose read-out it uses.
        kind: what it reads, one of `reading.KINDS`.
        layers: the layers it has parameters for.
        parameters: name -> tensor, the first axis along `layers`, in float32 or wider.
        norm: whether the final norm comes before the unembedding.
        trained_on: fingerprint of the model that the parameters were made for.
        notes: how they were trained; anything JSON can hold.
    """

    type_name: ClassVar[str]
    kind: str
    norm: bool

    def __init__(
        self, model: HookedModel, layers: Sequence[int], parameters: dict[str, Any]
    ) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.parameters: dict[str, Tensor] = parameters
        self.trained_on = fingerprint(model)
        self.notes: dict[str, Any] = {}

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs to make a lens of this shape again."""

    @classmethod
    @abstractmethod
    def from_settings(cls, model: HookedModel, settings: Mapping[str, Any]) -> TrainedLens:
        """A fresh lens of the given shape."""

    @property
    @abstractmethod
    def objectives(self) -> tuple[str, ...]:
        """Names of what it can be trained for; the first is the default."""

    @abstractmethod
    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """As `reading.Lens`."""

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
        """Numbers that are stored and trained."""
        return sum(p.numel() for p in self.parameters.values())

    def row(self, layer: int) -> int:
        """Index of a layer in the parameters.

        Raises:
            ValueError: a layer that the lens has not got.
        """
        try:
            return self.layers.index(layer)
        except ValueError:
            raise ValueError(
                f"this {self.type_name} lens has layers {list(self.layers)} of {self.kind!r}, not "
                f"{layer}; lens.moved(layers={{{layer}: one of them}}) reads with another's"
            ) from None

    def moved(
        self, model: HookedModel | None = None, *, layers: Mapping[int, int] | None = None
    ) -> TrainedLens:
        """This lens on other layers, or on another model of the same width.

        Args:
            model: reads through this model's final norm and unembedding from now on.
            layers: layer to read -> layer whose parameters are used; default each its own.

        Raises:
            ValueError: a model of another width, or of another vocabulary where the lens stores
                one; layers that either has not got.
        """
        target = self.model if model is None else model
        wanted = dict(layers) if layers is not None else {layer: layer for layer in self.layers}
        check_layers(target, self.kind, list(wanted))
        fresh = self.from_settings(target, {**self.settings, "layers": list(wanted)})
        rows = [self.row(source) for source in wanted.values()]
        for name, own in fresh.parameters.items():
            given = self.parameters[name][rows]
            if given.shape != own.shape:
                raise ValueError(
                    f"the lens was made for a model of another shape: {name} is "
                    f"{list(given.shape)}, this model needs {list(own.shape)}"
                )
            fresh.parameters[name] = given.detach().clone().to(own.device, own.dtype)
        fresh.trained_on = self.trained_on
        fresh.notes = {**self.notes, "moved_from_layers": {str(k): v for k, v in wanted.items()}}
        return fresh

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``lens.safetensors`` and ``lens.json`` into a folder; loadable, or pushable as it is.

        Raises:
            ValueError: the folder holds a lens and `overwrite` is False.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if (folder / CONFIG).exists() and not overwrite:
            raise ValueError(f"{folder} holds a lens already; pass overwrite=True to replace it")
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "type": self.type_name,
            "settings": self.settings,
            "fingerprint": self.trained_on,
            "unembedding": unembedding_hash(self.model),
            "provenance": provenance(self.model),
            "notes": self.notes,
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.parameters.items()}
        save_file(tensors, folder / f"{WEIGHTS}.tmp")
        (folder / f"{WEIGHTS}.tmp").replace(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return folder


def unembedding_hash(model: HookedModel) -> str:
    """A digest of W_U, b_U and the final norm: what a lens reads through."""
    digest = hashlib.sha256()
    norm = getattr(model, "ln_final", None)
    tensors = [*unembedding(model), *(p.detach() for p in (norm.parameters() if norm else ()))]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 65536)][:65536].to("cpu", torch.float64)
        total = flat.sum(dtype=torch.float64).item()
        digest.update(f"{tuple(tensor.shape)}{total:.9e}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def kl(output: Float[Tensor, "cell vocab"], logits: Float[Tensor, "cell vocab"]) -> Tensor:
    """KL(output || lens) at each cell, nats; `output` holds log-probabilities."""
    known = output.to(logits.device)
    return kl_divergence(known, logits.log_softmax(-1))
