"""The attention lens: a learned map from each head's output to the vocabulary.

Source: *Attention Lens* (Sakarvadia et al. 2023, arXiv 2310.16270). The published lens of a head is
an affine map d -> V of its own (38.6M numbers per head for GPT-2 small), started at W_U and trained so
that the *sum* of a layer's heads gives the model's output. That supervises the sum only; how it is
split among heads is left to the start. Two other objectives are offered, and two smaller layouts:

* ``full``: A [d, V] and c [V] for each head, as published;
* ``low_rank``: W_U + P Q with P [d, r], Q [r, V];
* ``translator``: (I + T) W_U with T [d, d], or of rank r, the vocabulary side shared.

All are the logit lens of the head's output before training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.lens.trained import Example, TrainedLens, check_rank, kl, low_rank
from mi_hops.lens.vectors import Layers, resolve_layers
from mi_hops.model import HookedModel, final_norm, unembedding

Variant = Literal["full", "low_rank", "translator"]
VARIANTS: tuple[Variant, ...] = ("translator", "low_rank", "full")

#: ``sum``: the heads' summed logits give the output (published); ``each``: every head's own do;
#: ``leave_one_out``: added to the logits of the model run without it (at no position), every head's
#: own do.
OBJECTIVES = ("sum", "each", "leave_one_out")


class AttentionLens(TrainedLens):
    """A lens for every head of some layers; reads ``result``.

    Args:
        layers: default all. A full lens of one layer is 12 x 38.6M numbers for GPT-2 small.
        variant: ``"translator"``, ``"low_rank"`` or ``"full"``; see the module.
        rank: of ``low_rank`` (default 8) and of ``translator`` (default None: a full d x d one).
        norm: apply the final norm to what the head wrote (translated, if so) before the vocabulary.
            Published: no.
        seed: of the random half of low-rank parts (the other half starts at 0).

    Raises:
        ValueError: an unknown variant, a rank where it does not belong, a layer out of range.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> mi_hops.lens.AttentionLens(model, layers=3, rank=4).name
        'attention (translator 4)'
    """

    type_name: ClassVar[str] = "attention"
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    kind = "result"

    def __init__(
        self,
        model: HookedModel,
        *,
        layers: Layers = None,
        variant: Variant = "translator",
        rank: int | None = None,
        norm: bool = False,
        seed: int = 0,
    ) -> None:
        _, chosen = resolve_layers(model, self.kind, layers)
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; expected one of {list(VARIANTS)}")
        if variant == "full" and rank is not None:
            raise ValueError("a full attention lens has no rank; leave it out")
        if variant == "low_rank" and rank is None:
            rank = 8
        d, vocab = int(model.cfg.d_model), int(model.cfg.d_vocab)
        check_rank(rank, d)
        self.variant, self.rank, self.norm = variant, rank, norm
        n, heads = len(chosen), int(model.cfg.n_heads)
        parameters: dict[str, Tensor] = {}
        if variant == "full":
            weight, bias = unembedding(model)
            parameters["weight"] = repeat(weight, "d vocab -> n head d vocab", n=n, head=heads)
            parameters["bias"] = repeat(bias, "vocab -> n head vocab", n=n, head=heads)
            parameters = {name: tensor.clone() for name, tensor in parameters.items()}
        elif rank is None:
            parameters["weight"] = torch.zeros(n, heads, d, d)
        else:
            width = d if variant == "translator" else vocab
            parameters |= low_rank(n, heads, d, rank=rank, width=width, seed=seed)
        if variant == "translator":
            parameters["shift"] = torch.zeros(n, heads, d)
        super().__init__(model, chosen, parameters)

    @property
    def settings(self) -> dict[str, Any]:
        """Layers, variant, rank, norm."""
        return {
            "layers": list(self.layers),
            "variant": self.variant,
            "rank": self.rank,
            "norm": self.norm,
        }

    @property
    def name(self) -> str:
        """``attention (translator)`` and the like."""
        return f"attention ({self.variant}{'' if self.rank is None else f' {self.rank}'})"

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of one head's outputs.

        Raises:
            ValueError: no head named, one that does not exist, or a layer without parameters.
        """
        n_heads = int(self.model.cfg.n_heads)
        if head is None or not 0 <= head < n_heads:
            raise ValueError(
                f"head is {head}; an attention lens reads one head's output, name it with head=, one "
                f"of 0..{n_heads - 1}"
            )
        flat = vectors.reshape(-1, 1, vectors.shape[-1])
        read = self._read(flat, self.row(layer), slice(head, head + 1))
        return read.reshape(*vectors.shape[:-1], -1)

    def sum_logits(
        self, outputs: Float[Tensor, "cell head d_model"], *, layer: int
    ) -> Float[Tensor, "cell vocab"]:
        """Summed logits of all heads; a bias is counted once per head, as published.

        The vocabulary matrix that heads share is multiplied once, with their summed vectors.
        """
        return self._read(outputs, self.row(layer), slice(None))

    def _read(
        self, outputs: Float[Tensor, "cell head d_model"], at: int, heads: slice
    ) -> Float[Tensor, "cell vocab"]:
        """Logits of the chosen heads' outputs, summed over them."""
        p = {name: tensor[at, heads] for name, tensor in self.parameters.items()}
        any_own = next(iter(p.values()))
        x = outputs.to(any_own.device, any_own.dtype)
        if self.variant == "translator":
            x = x + self._translated(x, **p) + p["shift"]
        if self.norm:
            x = final_norm(self.model, x).to(x)
        if self.variant == "full":
            # Heads and their inputs as one long input: no logits of single heads are made.
            flat = rearrange(p["weight"], "head d vocab -> (head d) vocab")
            return rearrange(x, "cell head d -> cell (head d)") @ flat + p["bias"].sum(0)
        weight, bias = unembedding(self.model)
        total = x.sum(1) @ weight.to(x.dtype) + x.shape[1] * bias.to(x.dtype)
        if self.variant == "low_rank":
            low = einsum("cell head d, head d rank -> cell head rank", x, p["down"])
            up = rearrange(p["up"], "head rank vocab -> (head rank) vocab")
            total = total + rearrange(low, "cell head rank -> cell (head rank)") @ up
        return total

    def _translated(self, x: Tensor, **p: Tensor) -> Tensor:
        if self.rank is None:
            return einsum("cell head d, head d out -> cell head out", x, p["weight"])
        low = einsum("cell head d, head d rank -> cell head rank", x, p["down"])
        return einsum("cell head rank, head rank out -> cell head out", low, p["up"])

    def losses(
        self, example: Example, layer: int, objective: str
    ) -> Iterator[Float[Tensor, "cell"]]:
        """KL(output || reading), of the sum or head by head (see `OBJECTIVES`).

        Raises:
            ValueError: an unknown objective, or leave-one-out without the runs it needs.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; expected one of {OBJECTIVES}")
        outputs = example.read[layer]
        if objective == "sum":
            yield kl(example.output, self.sum_logits(outputs, layer=layer))
            return
        _, bias = unembedding(self.model)
        for head in range(outputs.shape[1]):
            logits = self.logits(outputs[:, head], layer=layer, head=head)
            if objective == "leave_one_out":
                if example.without is None:
                    raise ValueError("leave_one_out needs the model run without each head")
                # b_U is in the model's own logits already.
                rest = example.without[layer][head].to(logits.device)
                logits = logits - bias.to(logits.dtype) + rest
            yield kl(example.output, logits)
