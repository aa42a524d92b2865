"""Reading and writing weights: the output matrices in place, embeddings, the final norm and read-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model.classes import backend_of
from mi_hops.model.hooks import require_layers
from mi_hops.model.identity import dtype_of, ln_final, missing_weight, own_weight
from mi_hops.model.numeric import wide_dtype
from mi_hops.model.shortcuts import has_hooks
from mi_hops.model.types import HookedModel

#: Matrix -> the kinds of activation at its input and its output: ``out = in @ W (+ bias)``.
MATRICES = {"W_O": ("z", "attn_out"), "W_out": ("mlp_post", "mlp_out")}
_MODULES = {"W_O": "attn", "W_out": "mlp"}


def live_matrix(model: HookedModel, matrix: str, layer: int) -> Float[Tensor, "*rows d_out"]:
    """The weight itself; writing into it changes the model on both classes. W_O keeps its head axis.

    Raises:
        MissingHookError: a block without that matrix.
        ValueError: an unknown matrix, no such layer, or a quantised weight.
    """
    if matrix not in MATRICES:
        raise ValueError(f"unknown matrix {matrix!r}; an edit changes one of {list(MATRICES)}")
    require_layers(model, [layer])
    module = _MODULES[matrix]
    weight = getattr(getattr(model.blocks[layer], module, None), matrix, None)
    if weight is None:
        raise missing_weight(model, f"blocks.{layer}.{module}.{matrix}")
    require_unquantised(weight, f"{matrix} of layer {layer}")
    return weight


def w_o(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """The live output projection of a block (see `live_matrix`)."""
    return live_matrix(model, "W_O", layer)


def read_matrix(model: HookedModel, matrix: str, layer: int) -> Float[Tensor, "d_in d_out"]:
    """A copy of a matrix in its own dtype; the rows of W_O are the coordinates of flattened z.

    Raises:
        ValueError: as `live_matrix`, or values that are not finite.
    """
    weight = live_matrix(model, matrix, layer).detach()
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{matrix} of layer {layer} holds non-finite values; the model is damaged, load it again"
        )
    return rearrange(weight, "... d_out -> (...) d_out").clone()


def write_matrix(
    model: HookedModel, matrix: str, layer: int, value: Float[Tensor, "d_in d_out"]
) -> None:
    """Write a matrix in place, cast once to its dtype, and verify that the model has it.

    Raises:
        ValueError: a wrong shape, or values that are not finite (before or after the cast).
        RuntimeError: the write did not reach the weight (then nothing can be edited here).
    """
    weight = live_matrix(model, matrix, layer)
    expected = (weight.numel() // weight.shape[-1], weight.shape[-1])
    if tuple(value.shape) != expected:
        raise ValueError(f"{matrix} of layer {layer} is {expected}, got {tuple(value.shape)}")
    overwrite(model, f"{matrix} of layer {layer}", lambda: live_matrix(model, matrix, layer), value)


def overwrite(model: HookedModel, what: str, live: Callable[[], Tensor], value: Tensor) -> None:
    """Write a weight in place, cast once to its dtype, and make sure that it reached the model.

    Args:
        what: the weight's name in errors.
        live: gets the weight itself from the model; asked again after the write.
        value: of as many numbers, in the weight's order.

    Raises:
        ValueError: values that are not finite (before or after the cast); nothing is written.
        RuntimeError: the write did not reach the weight.
    """
    weight = live()
    cast = value.detach().to(weight.device, weight.dtype).reshape(weight.shape)
    if not torch.isfinite(cast).all():
        raise ValueError(
            f"{what} would hold non-finite values after the edit (dtype {weight.dtype}); nothing "
            "was written"
        )
    with torch.no_grad():
        weight.data.copy_(cast)
    if not torch.equal(live().detach(), cast):
        raise RuntimeError(f"writing {what} had no effect on {type(model).__name__}")


def require_linear(
    model: HookedModel,
    matrix: str,
    layer: int,
    inputs: Float[Tensor, "row *in_axes"],
    output: Float[Tensor, "row d_model"],
) -> None:
    """Refuse a block in which something acts behind a matrix, so that parts of its input write no part.

    Hooks of the user's may add to an output, and then nothing is refused.

    Args:
        inputs, output: at the kinds of `MATRICES`, in float32 or wider.

    Raises:
        ValueError: an output that is not ``inputs @ matrix + bias``.
    """
    weight = live_matrix(model, matrix, layer).detach().to(inputs)
    bias = own_weight(getattr(model.blocks[layer], _MODULES[matrix]), matrix.replace("W", "b"))
    written = inputs.flatten(1) @ weight.flatten(0, -2)
    rest = output - written - (0 if bias is None else bias.detach().to(output))
    if rest.norm() > 0.05 * (written.norm() + output.norm()) and not has_hooks(model):
        raise ValueError(
            f"block {layer} does not write its {MATRICES[matrix][0]} @ {matrix} (is there a norm or a "
            "scale behind it?), so single heads or neurons have no share of their own"
        )


def unembedding(
    model: HookedModel,
) -> tuple[Float[Tensor, "d_model vocab"], Float[Tensor, "vocab"]]:
    """W_U and b_U (zeros where the model has none), detached.

    Raises:
        ValueError: the unembedding cannot be read as floating-point numbers (quantised).
    """
    weight = model.W_U.detach()
    require_unquantised(weight, "the unembedding")
    bias = getattr(model, "b_U", None)
    if bias is None:
        bias = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return weight, bias.detach()


def embedding(model: HookedModel) -> Float[Tensor, "vocab d_model"]:
    """W_E, detached.

    Raises:
        ValueError: the embedding cannot be read as floating-point numbers (quantised).
    """
    weight = model.W_E.detach()
    require_unquantised(weight, "the embedding")
    return weight


def require_unquantised(weight: Tensor, what: str) -> None:
    """Refuse a weight that is stored as codes, which mean nothing without their scales.

    Raises:
        ValueError: integers, or floats of 8 bits.
    """
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{what} is stored as {weight.dtype}; load the model unquantised")


def final_norm(
    model: HookedModel, residual: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """The final norm of residual-stream vectors, in the model's dtype, where the norm lies.

    Of a model without norms (TransformerLens's ``normalization_type=None``), the vectors as they are.
    """
    norm = ln_final(model)
    if norm is None:
        return residual.to(dtype_of(model))
    own = next(iter(norm.parameters()), None)  # none where it is folded away
    place = residual.device if own is None else own.device
    flat = residual.reshape(-1, 1, residual.shape[-1]).to(place, dtype_of(model))
    return norm(flat).reshape(residual.shape)


def norm_parts(
    model: HookedModel, norm: Any, like: Tensor
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"], bool]:
    """Gain and shift of a norm (ones and zeros where folded away), and whether it takes the mean out.

    Args:
        like: a tensor ``[..., d_model]`` whose dtype and device they get.
    """

    def part(make: Callable[..., Tensor], *names: str) -> Tensor:
        """The norm's own, by the name that its class has for it."""
        named = (getattr(norm, name, None) for name in names)
        own = next((t for t in named if torch.is_tensor(t)), make(like.shape[-1:]))
        return own.detach().to(like)

    gain, shift = part(torch.ones, "w", "weight"), part(torch.zeros, "b", "bias")
    if getattr(model.cfg, "rmsnorm_uses_offset", False):  # Gemma keeps what its gains are beyond 1
        gain = 1 + gain
    return gain, shift, str(getattr(model.cfg, "normalization_type", "LN")).startswith("LN")


def linear_read_out(
    model: HookedModel,
    residual: Float[Tensor, "row d_model"],
    ids: Int[Tensor, "row token"],
    *,
    centre: bool = False,
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "row token"]]:
    """Final norm and unembedding as a linear map: the norm's scale is frozen at `residual`.

    What the model does to its logits behind the unembedding (a soft cap, a scale) is left out.

    Args:
        ids: the tokens whose logits are made.
        centre: logits relative to their mean over the vocabulary.

    Returns:
        Directions and constants: a logit is ``residual . direction + constant``.

    Raises:
        ValueError: a final norm that is neither LayerNorm nor RMSNorm.
    """
    weight, bias = (t.to(residual.dtype) for t in unembedding(model))
    gain, shift, layer_norm = norm_parts(model, ln_final(model), residual)
    centred = residual - residual.mean(-1, keepdim=True) if layer_norm else residual
    normed = final_norm(model, residual).to(residual)
    # The scale as the norm applied it, whatever its epsilon.
    scale = ((normed - shift) * centred * gain).sum(-1) / (centred * gain).pow(2).sum(-1)
    picked, own = weight.T[ids.to(weight.device)], bias[ids.to(bias.device)]
    if centre:
        picked, own = picked - weight.mean(1), own - bias.mean()
    directions, constant = picked * gain * scale[:, None, None], picked @ shift + own
    if layer_norm:
        # Taking the mean out of a vector is taking it out of the direction.
        directions = directions - directions.mean(-1, keepdim=True)
    total = einsum("row d, row token d -> row token", residual, directions) + constant
    want = read_out(model, residual, whole=False)
    if centre:
        want = want - want.mean(-1, keepdim=True)
    if not torch.allclose(total, want.gather(1, ids.to(want.device)), rtol=0.02, atol=0.05):
        raise ValueError(
            "the final norm of this model is neither LayerNorm nor RMSNorm as its config says, so "
            "its logits are not a linear function of the final stream"
        )
    return directions, constant


def read_out(
    model: HookedModel,
    residual: Float[Tensor, "*rows d_model"],
    *,
    norm: bool = True,
    whole: bool = True,
) -> Float[Tensor, "*rows vocab"]:
    """Logits of a residual-stream vector: final norm (optional), then W_U and b_U, in float32+.

    With ``norm=True`` this is the model's own read-out (logit lens with ln_final); with False the
    raw one of the two papers.

    Args:
        whole: with what some models do to their logits in the end, such as a soft cap or a scale.
    """
    wide = wide_dtype(residual.dtype)
    if norm:
        residual = final_norm(model, residual)
    weight, bias = unembedding(model)
    logits = residual.to(weight.device, wide) @ weight.to(wide) + bias.to(wide)
    return _finished(model, logits) if whole else logits


def _finished(model: HookedModel, logits: Tensor) -> Tensor:
    """Logits as the model gives them, from those of the unembedding."""
    if backend_of(model) == "bridge":
        return model.adapter.apply_output_logits_transform(logits)
    cap = float(getattr(model.cfg, "output_logits_soft_cap", None) or 0)
    return cap * (logits / cap).tanh() if cap > 0 else logits
