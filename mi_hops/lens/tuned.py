"""The tuned lens: an affine translator per layer before the model's own read-out.

Source: *Eliciting Latent Predictions from Transformers with the Tuned Lens* (Belrose et al. 2023,
arXiv 2303.08112): logits = W_U norm(x + x A_l + b_l), trained to match the model's own output. At
A = b = 0 it is the logit lens, which is where it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mi_hops.lens.reading import check_layers
from mi_hops.lens.trained import Example, TrainedLens, kl
from mi_hops.model import HookedModel, device_of, dtype_of, read_out
from mi_hops.model.numeric import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TunedLens(TrainedLens):
    """A translator for each layer of one kind of activation.

    Args:
        layers: default all that `kind` has but the last of ``"resid"``, which needs none.
        kind: a kind of `reading.KINDS` without heads.
        rank: None for a full d x d translator, else the rank of x A.
        norm: apply the final norm before the unembedding.
        seed: of the random half of a low-rank translator (the other half starts at 0).

    Raises:
        ValueError: per-head vectors (see `attention.AttentionLens`), a layer out of range, a rank
            that is not in 1..d_model.
    """

    type_name: ClassVar[str] = "tuned"

    def __init__(
        self,
        model: HookedModel,
        *,
        layers: Sequence[int] | None = None,
        kind: str = "resid",
        rank: int | None = None,
        norm: bool = True,
        seed: int = 0,
    ) -> None:
        if kind == "head_out":
            raise ValueError("a tuned lens reads whole activations; AttentionLens reads heads")
        every = check_layers(model, kind, layers)
        chosen = every[:-1] if layers is None and kind == "resid" else every
        d = int(model.cfg.d_model)
        if rank is not None and not 1 <= rank <= d:
            raise ValueError(f"rank is {rank}; expected 1..{d}, or None for a full translator")
        self.kind, self.norm, self.rank = kind, norm, rank
        options: dict[str, Any] = {
            "dtype": wide_dtype(dtype_of(model)),
            "device": device_of(model),
        }
        n = len(chosen)
        parameters = {"bias": torch.zeros(n, d, **options)}
        if rank is None:
            parameters["weight"] = torch.zeros(n, d, d, **options)
        else:
            generator = torch.Generator().manual_seed(seed)
            down = torch.randn(n, d, rank, generator=generator) / d**0.5
            parameters["down"] = down.to(**options)
            parameters["up"] = torch.zeros(n, rank, d, **options)
        super().__init__(model, chosen, parameters)

    @property
    def settings(self) -> dict[str, Any]:
        """Layers, kind, rank, norm."""
        return {
            "layers": list(self.layers), "kind": self.kind, "rank": self.rank, "norm": self.norm
        }  # fmt: skip

    @classmethod
    def from_settings(cls, model: HookedModel, settings: Mapping[str, Any]) -> TunedLens:
        """A fresh lens of the given shape."""
        return cls(model, **settings)

    @property
    def objectives(self) -> tuple[str, ...]:
        """KL to the model's output."""
        return ("output",)

    def translate(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Vectors of `layer` in the basis of the final stream."""
        at, p = self.row(layer), self.parameters
        x = vectors.to(p["bias"].device, p["bias"].dtype)
        moved = x @ p["weight"][at] if self.rank is None else x @ p["down"][at] @ p["up"][at]
        return x + moved + p["bias"][at]

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of translated vectors; the last layer of the stream is read as it is.

        Raises:
            ValueError: a layer without a translator.
        """
        last = self.kind == "resid" and layer == self.model.cfg.n_layers
        if last and layer not in self.layers:
            return read_out(self.model, vectors, norm=self.norm)
        return read_out(self.model, self.translate(vectors, layer=layer), norm=self.norm)

    def losses(
        self, example: Example, layer: int, objective: str
    ) -> Iterator[Float[Tensor, "cell"]]:
        """KL(output || lens)."""
        yield kl(example.output, self.logits(example.read[layer], layer=layer))
