"""The tuned lens: an affine translator per layer before the model's own read-out.

Source: *Eliciting Latent Predictions from Transformers with the Tuned Lens* (Belrose et al. 2023,
arXiv 2303.08112): logits = W_U norm(x + x A_l + b_l), trained to match the model's own output. At
A = b = 0 it is the logit lens, which is where it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.lens.trained import Example, TrainedLens, check_rank, kl, low_rank
from mi_hops.lens.vectors import Layers, resolve_layers
from mi_hops.model import HookedModel, read_out


class TunedLens(TrainedLens):
    """A translator for each layer of one kind of activation.

    Args:
        layers: default all that `kind` has but the last of ``"resid"``, which needs none.
        kind: a kind of `KINDS` without heads.
        rank: None for a full d x d translator, else the rank of x A.
        norm: apply the final norm before the unembedding.
        seed: of the random half of a low-rank translator (the other half starts at 0).

    Raises:
        ValueError: per-head vectors (see `AttentionLens`), a layer out of range, a rank that is not
            in 1..d_model.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> mi_hops.TunedLens(model, rank=4)
        TunedLens(layers=[0, 1, 2, 3, 4, 5], kind='resid', rank=4, norm=True)
    """

    type_name: ClassVar[str] = "tuned"
    objectives: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(
        self,
        model: HookedModel,
        *,
        layers: Layers = None,
        kind: str = "resid",
        rank: int | None = None,
        norm: bool = True,
        seed: int = 0,
    ) -> None:
        self.kind, chosen = resolve_layers(model, kind, layers)
        if self.kind == "result":
            raise ValueError("a tuned lens reads whole activations; AttentionLens reads heads")
        if layers is None and kind == "resid":
            chosen = chosen[:-1]
        n, d = len(chosen), int(model.cfg.d_model)
        check_rank(rank, d)
        self.norm, self.rank = norm, rank
        parameters = {"bias": torch.zeros(n, d)}
        if rank is None:
            parameters["weight"] = torch.zeros(n, d, d)
        else:
            parameters |= low_rank(n, d, rank=rank, width=d, seed=seed)
        super().__init__(model, chosen, parameters)

    @property
    def settings(self) -> dict[str, Any]:
        """Layers, kind, rank, norm."""
        return {
            "layers": list(self.layers),
            "kind": self.kind,
            "rank": self.rank,
            "norm": self.norm,
        }

    def translate(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Vectors of `layer` in the basis of the final stream."""
        p = {name: tensor[self.row(layer)] for name, tensor in self.parameters.items()}
        x = vectors.to(p["bias"].device, p["bias"].dtype)
        moved = x @ p["weight"] if self.rank is None else x @ p["down"] @ p["up"]
        return x + moved + p["bias"]

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of translated vectors; the final layer is read untranslated.

        Raises:
            ValueError: a layer without a translator.
        """
        last = self.kind == "resid" and layer == self.model.cfg.n_layers
        if not last or layer in self.layers:
            vectors = self.translate(vectors, layer=layer)
        return read_out(self.model, vectors, norm=self.norm)

    def losses(
        self, example: Example, layer: int, objective: str
    ) -> Iterator[Float[Tensor, "cell"]]:
        """KL(output || lens)."""
        yield kl(example.output, self.logits(example.read[layer], layer=layer))
