"""Neurons: how much of a token's logit each one wrote, and the texts that drive a unit most.

A neuron writes its activation times its row of W_out to the stream, so that direct logit attribution divides
an MLP's share among its neurons as it divides a logit among heads and MLPs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.lens.examples import real_cells
from mi_hops.lens.sae import check_reads
from mi_hops.lens.tracking import Prompts, Track, first_tokens, rows_at
from mi_hops.lens.vectors import Layers, activations, hook_of, in_batches, resolve_layers
from mi_hops.model import (
    HookedModel,
    hook_name,
    linear_read_out,
    live_matrix,
    provenance,
    unembedding,
)
from mi_hops.model.numeric import widen
from mi_hops.model.weights import require_linear
from mi_hops.result.result import Result
from mi_hops.text.corpus import Corpus, token_batches
from mi_hops.text.tokens import Batch, Prompt, Where


def neuron_attribution(
    model: HookedModel,
    prompts: Prompts,
    track: Track,
    *,
    layers: Layers = None,
    position: Where | Sequence[Where] = -1,
    centre: bool = True,
    batch_size: int = 8,
) -> Result:
    """Direct logit attribution of single neurons, at one position of each prompt.

    Args:
        prompts, track, position, centre: as in `logit_attribution`.
        layers: default all; each holds ``d_mlp`` numbers per prompt and tracked name.

    Returns:
        `Result`, in logits: ``neurons`` (``example, layer, neuron, tracked``) and ``biases`` (what b_out
        wrote; ``example, layer, tracked``). Over a layer they add up to its ``mlps`` in
        `logit_attribution`.

    Raises:
        ValueError: nothing to track, positions that do not fit the prompts, a layer out of range, or
            a model with a norm behind its MLPs.
        MissingHookError: a model whose MLPs have no hidden layer to read (mixtures of experts).

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> asked = "The spouse of Ondo is", {"a name": "Mara"}
        >>> mi_hops.lens.neuron_attribution(model, *asked, layers=5)["neurons"].dims
        ('example', 'layer', 'neuron', 'tracked')
    """
    asked = rows_at(model, prompts, track, position)
    known = [row.prompt for row in asked]
    firsts, at = first_tokens(asked)
    _, wanted = resolve_layers(model, "mlp_out", layers)
    end = hook_name("resid_post", int(model.cfg.n_layers) - 1)
    kinds = ("mlp_post", "mlp_out")

    def read(chosen: list[int], tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        names = [hook_name(kind, layer) for kind in kinds for layer in wanted]
        found = activations(model, tokens, (rows, at[chosen]), [*names, end])
        place = unembedding(model)[0].device
        final = widen(found[end]).to(place)
        directions, _ = linear_read_out(model, final, firsts[chosen], centre=centre)
        shares, biases = [], []
        for layer in wanted:
            hidden, out = (widen(found[hook_name(kind, layer)]).to(place) for kind in kinds)
            weight = live_matrix(model, "W_out", layer).detach().to(hidden)
            require_linear(model, "W_out", layer, hidden, out)
            along = einsum("n d, row token d -> row n token", weight, directions)
            shares.append(hidden[:, :, None] * along)
            rest = out - hidden @ weight
            biases.append(einsum("row d, row token d -> row token", rest, directions))
        return {"neurons": torch.stack(shares, 1).cpu(), "biases": torch.stack(biases, 1).cpu()}

    shares = in_batches(model, known, batch_size, read)
    return Result.from_arrays(
        {
            "neurons": (("example", "layer", "neuron", "tracked"), shares["neurons"]),
            "biases": (("example", "layer", "tracked"), shares["biases"]),
        },
        coords={
            "example": [row.label for row in asked],
            "layer": wanted,
            "neuron": range(shares["neurons"].shape[2]),
            "tracked": list(track),
        },
        units={"neurons": "logits", "biases": "logits"},
        provenance=provenance(model, method="neuron_attribution", centre=centre),
        title="direct logit attribution of neurons",
    )


def top_texts(
    model: HookedModel,
    corpus: Corpus,
    *,
    layer: int,
    neuron: int | None = None,
    head: int | None = None,
    feature: int | None = None,
    sae: Any = None,
    top: int = 10,
    context: int = 40,
    max_tokens: int = 4096,
) -> Result:
    """The texts of a corpus in which a unit is most active, each around its most active token.

    The corpus is streamed: one batch and the best texts so far are held.

    Args:
        corpus: texts, facts, or a file (see `train_lens`); a text counts once, at its largest token.
        layer: the block of a neuron or head; of a feature, the blocks passed (as `train_sae` counts).
        neuron: a hidden unit of the MLP; its activation counts. Give one of the three.
        head: the size (norm) of what the head writes counts, b_O left out.
        feature: of the autoencoder `sae`.
        top: texts kept.
        context: tokens shown before the most active one, and a quarter as many behind it.
        max_tokens: of one batch.

    Returns:
        `Result` ``activation`` on ``example`` (from the most active text on) and ``position`` (NaN behind
        the end of shorter ones) with the label ``token``, and the baseline ``peak`` per example;
        `mi_hops.result.coloured_texts` shows them. Tokens at BOS do not count.

    Raises:
        ValueError: not exactly one unit, or one that does not exist; an empty corpus; an
            autoencoder of another model or layer.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:20]
        >>> found = mi_hops.lens.top_texts(model, facts, layer=3, neuron=7, top=3)
        >>> found.data.sizes["example"]
        3
    """
    unit = _Unit.of(model, layer, {"neuron": neuron, "head": head, "feature": feature}, sae)
    if top < 1 or context < 0:
        raise ValueError(f"top is {top} and context {context}; expected at least 1 and 0")
    lengths: list[int] = []

    def texts() -> Iterator[tuple[float, int, list[int], list[float]]]:
        """Largest value, number, ids and values around it of each text."""
        bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
        for batch in token_batches(model, corpus, max_tokens=max_tokens):
            values = unit.values(batch)
            for row, length in enumerate(batch.lengths.tolist()):
                ids, found = batch.tokens[row, :length].tolist(), values[row, :length]
                first = int(ids[0] == bos and length > 1)
                at = first + int(found[first:].argmax())
                around = slice(max(0, at - context), at + context // 4 + 1)
                # Of two texts alike the earlier one stays: its number is larger when negated.
                yield float(found[at]), -len(lengths), ids[around], found[around].tolist()
                lengths.append(length)

    best = heapq.nlargest(top, texts())
    width = max(len(ids) for _, _, ids, _ in best)
    shown = np.full((len(best), width), np.nan)
    tokens = np.full((len(best), width), "", dtype=object)
    for i, (_, _, ids, activity) in enumerate(best):
        shown[i, : len(ids)] = activity
        tokens[i, : len(ids)] = Prompt.from_tokens(model, ids).pieces
    return Result.from_arrays(
        {"activation": (("example", "position"), shown)},
        baselines={"peak": (("example",), [peak for peak, *_ in best])},
        coords={
            "example": [f"text {-number}" for _, number, _, _ in best],
            "position": range(width),
            "token": (("example", "position"), tokens),
        },
        units={"activation": "activation", "peak": "activation"},
        provenance=provenance(
            model, method="top texts", unit=unit.name, texts=len(lengths), tokens=sum(lengths)
        ),
        title=f"{unit.name}: the {len(best)} most active of {len(lengths)} texts",
        allow_nonfinite=True,  # texts of several lengths
    )


@dataclass(frozen=True)
class _Unit:
    """One neuron, head or feature, and how active it is at each token."""

    model: HookedModel
    layer: int
    kind: str
    number: int
    sae: Any

    @classmethod
    def of(cls, model: HookedModel, layer: int, units: dict[str, int | None], sae: Any) -> _Unit:
        given = {kind: number for kind, number in units.items() if number is not None}
        if len(given) != 1 or (sae is not None) != ("feature" in given):
            raise ValueError(
                f"got {given or 'no unit'}; give one neuron, one head, or one feature with its sae"
            )
        ((kind, number),) = given.items()
        if kind == "feature":
            check_reads(model, sae, layer)
            size = len(sae.W_dec)
        else:
            size = len(live_matrix(model, "W_out" if kind == "neuron" else "W_O", layer))
        if not 0 <= number < size:
            raise ValueError(f"no {kind} {number}; there are 0..{size - 1}")
        return cls(model, layer, kind, number, sae)

    @property
    def name(self) -> str:
        """For titles."""
        if self.kind == "head":
            return f"L{self.layer}H{self.number}"
        where = f"of layer {self.layer}" if self.kind == "neuron" else f"after {self.layer} blocks"
        return f"{self.kind} {self.number} {where}"

    def values(self, batch: Batch) -> Float[Tensor, "row pos"]:
        """Activity at every real token; -inf on padding."""
        cells = real_cells(batch)
        kinds = {"neuron": "mlp_post", "head": "z", "feature": "resid"}
        name = hook_of(self.model, kinds[self.kind], self.layer)
        with torch.no_grad():
            x = activations(self.model, batch.tokens, cells, [name])[name]
            if self.kind == "head":
                weight = live_matrix(self.model, "W_O", self.layer)[self.number]
                found = (widen(x[:, self.number]) @ widen(weight.to(x.device))).norm(dim=-1)
            else:
                if self.kind == "feature":
                    x = self.sae.encode(x.to(self.sae.W_dec.device, self.sae.W_dec.dtype))
                found = x[:, self.number]
        values = torch.full(batch.tokens.shape, float("-inf"))
        values[cells] = found.float().cpu()
        return values
