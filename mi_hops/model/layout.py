"""Weights laid out in memory so that a forward pass need not copy them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mi_hops.model import HookedModel, backend_of

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes that second copies of the weights may take together; what goes beyond stays as it is.
MOST_BYTES = 2**30


@contextmanager
def pretransposed_weights(model: HookedModel) -> Iterator[None]:
    """For the length of the block, the attention's weights lie in memory as its passes want them.

    HookedTransformer keeps W_Q, W_K and W_V as ``[head, d_model, d_head]`` and W_O as
    ``[head, d_head, d_model]``, and turns each around in every forward pass, which copies it. With
    the input's dimension innermost in memory the same turn is a view. Shapes and values are the
    same throughout, so every number is the same to the last bit; afterwards the parameters hold
    their own memory again. Does nothing to a Bridge or on a GPU.
    """
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter, is_output in _turned(model):
            own.append((parameter, parameter.data))
            turn = _output_first if is_output else _model_last
            parameter.data = turn(parameter.data)
        yield
    finally:
        for parameter, data in reversed(own):
            parameter.data = data


def copied_bytes(model: HookedModel) -> int:
    """Bytes that `pretransposed_weights` takes besides the model's own memory."""
    return sum(_size(parameter) for parameter, _ in _turned(model))


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _turned(model: HookedModel) -> Iterator[tuple[Tensor, bool]]:
    """The weights that are turned around beforehand, and whether each is W_O."""
    if backend_of(model) != "hooked":
        return
    room = MOST_BYTES
    for block in model.blocks:
        for name, parameter in block.attn.named_parameters(recurse=False):
            # A grouped-query model's own key and value weights are named _W_K and _W_V.
            plain = name.lstrip("_")
            if plain in ("W_Q", "W_K", "W_V", "W_O") and parameter.ndim == 3:
                room -= _size(parameter)
                if parameter.device.type == "cpu" and room >= 0:
                    yield parameter, plain == "W_O"


def _model_last(data: Tensor) -> Tensor:
    """``[head, d_model, d_head]`` with d_model innermost; no copy where it is so already."""
    return data.transpose(1, 2).contiguous().transpose(1, 2)


def _output_first(data: Tensor) -> Tensor:
    """``[head, d_head, d_model]`` with d_model outermost."""
    return data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
