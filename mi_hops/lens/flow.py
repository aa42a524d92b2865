"""Logit flow: from which tokens, in which layers, attention moved a token's logit to where it is read.

At the position read, a head writes the sum over earlier tokens of (its attention to the token) times (what the
token's value becomes through W_O). With the final norm's scale frozen each term is a share of the logit, so the
head's share in direct logit attribution is divided among the tokens it came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.lens.tracking import Prompts, Track, first_tokens, rows_at
from mi_hops.lens.vectors import in_batches
from mi_hops.model import (
    HookedModel,
    capture,
    hook_name,
    linear_read_out,
    provenance,
    unembedding,
    w_o,
)
from mi_hops.model.hooks import mlp_input
from mi_hops.model.numeric import widen
from mi_hops.model.weights import require_linear
from mi_hops.result.result import Result
from mi_hops.text.tokens import Where


def logit_flow(
    model: HookedModel,
    prompts: Prompts,
    track: Track,
    *,
    position: Where | Sequence[Where] = -1,
    by_head: bool = False,
    centre: bool = True,
    batch_size: int = 16,
) -> Result:
    """Direct logit attribution by the layer that moved it and the token it came from.

    Args:
        prompts, track, position, centre: as in `logit_attribution`; prompts of any lengths.
        by_head: each head by itself, not all of a layer together.

    Returns:
        `Result`, in logits: ``flow`` (``example, layer, position, tracked``, with `by_head` ``head`` behind
        layer; NaN behind the end of shorter prompts) with the label ``token``, and ``mlps`` (``example,
        layer, tracked``), what the MLPs wrote at the position read. Over positions ``flow`` adds up to the
        ``heads`` of `logit_attribution`.

    Raises:
        ValueError: nothing to track, positions that do not fit the prompts, a model with a norm
            behind its attention, or one whose heads hand on something else than values weighted by
            the pattern (a hook on z, for instance).

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> asked = "The spouse of Ondo is", {"a name": "Mara"}
        >>> mi_hops.lens.logit_flow(model, *asked)["flow"].dims
        ('example', 'layer', 'position', 'tracked')
    """
    asked = rows_at(model, prompts, track, position)
    known = [row.prompt for row in asked]
    firsts, at = first_tokens(asked)
    layers = range(int(model.cfg.n_layers))
    width = max(map(len, known))

    def read(chosen: list[int], tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        end = hook_name("resid_post", layers[-1])
        has_mlps = mlp_input(model, 0) is not None
        kinds = ["pattern", "v", "z", "attn_out", *["mlp_out"] * has_mlps]
        names = [hook_name(kind, i) for kind in kinds for i in layers]
        found, _ = capture(model, tokens, [*names, end])
        where = at[chosen]
        place = unembedding(model)[0].device

        def there(x: Tensor) -> Tensor:
            return widen(x[rows.to(x.device), where.to(x.device)]).to(place)

        directions, _ = linear_read_out(model, there(found[end]), firsts[chosen], centre=centre)
        flow, mlps = [], []
        for i in layers:
            pattern = widen(found[hook_name("pattern", i)]).to(place)
            looked = pattern[rows.to(place), :, where.to(place)]
            value = widen(found[hook_name("v", i)]).to(place)
            value = value.repeat_interleave(looked.shape[1] // value.shape[2], dim=2)
            z, out = (there(found[hook_name(kind, i)]) for kind in ("z", "attn_out"))
            require_linear(model, "W_O", i, z, out)
            _require_weighted(i, looked, value, z, found[hook_name("z", i)].dtype)
            weight = w_o(model, i).detach().to(value)
            along = einsum("head e d, row token d -> row head e token", weight, directions)
            moved = einsum("row pos head e, row head e token -> row head pos token", value, along)
            flow.append(looked[..., None] * moved)
            wrote = there(found[hook_name("mlp_out", i)]) if has_mlps else torch.zeros_like(out)
            mlps.append(einsum("row d, row token d -> row token", wrote, directions))
        stacked = torch.stack(flow, 1)
        stacked = stacked if by_head else stacked.sum(2)
        room = stacked.new_full((*stacked.shape[:-2], width, stacked.shape[-1]), float("nan"))
        room[..., : stacked.shape[-2], :] = stacked
        for row, number in enumerate(chosen):
            room[row, ..., len(known[number]) :, :] = float("nan")
        return {"flow": room.cpu(), "mlps": torch.stack(mlps, 1).cpu()}

    found = in_batches(model, known, batch_size, read)
    tokens = [[*p.pieces, *[""] * (width - len(p))] for p in known]
    head = {"head": range(int(model.cfg.n_heads))} if by_head else {}
    return Result.from_arrays(
        {
            "flow": (("example", "layer", *head, "position", "tracked"), found["flow"]),
            "mlps": (("example", "layer", "tracked"), found["mlps"]),
        },
        coords={
            "example": [row.label for row in asked],
            "layer": layers,
            "position": range(width),
            "tracked": list(track),
            "token": (("example", "position"), np.asarray(tokens, dtype=object)),
            **head,
        },
        units={"flow": "logits", "mlps": "logits"},
        provenance=provenance(model, method="logit_flow", centre=centre),
        title="Logit moved by attention, from each token",
        allow_nonfinite=True,  # prompts of several lengths
    )


def _require_weighted(
    layer: int,
    looked: Float[Tensor, "row head pos"],
    value: Float[Tensor, "row pos head d_head"],
    z: Float[Tensor, "row head d_head"],
    dtype: torch.dtype,
) -> None:
    """Refuse heads that hand on something else than values as the pattern weights them.

    Args:
        dtype: that the model computed z in.
    """
    spec = "row head pos, row pos head e -> row head e"
    off = (einsum(spec, looked, value) - z).norm(dim=-1)
    tolerance = 5e-2 if torch.finfo(dtype).bits < 32 else 1e-3
    if bool((off > tolerance * einsum(spec, looked, value.abs()).norm(dim=-1)).any()):
        raise ValueError(
            f"z of block {layer} is not pattern @ v (off by up to {float(off.max()):.2g}), so its heads' "
            "logits cannot be divided among tokens. Does a hook on the model change z? Remove it, or "
            "read the heads with logit_attribution"
        )
