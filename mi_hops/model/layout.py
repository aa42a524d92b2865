"""Weights laid out in memory so that a forward pass need not copy them.

HookedTransformer keeps W_Q, W_K and W_V as ``[head, d_model, d_head]``, W_O as ``[head, d_head,
d_model]`` and a gated MLP's weights as ``[d_in, d_out]``, and turns each around in every forward pass,
which copies it. With the dimension that the turn puts last innermost in memory the same turn is a
view. Shapes and values are the same throughout, so every number is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from mi_hops.model.classes import backend_of
from mi_hops.model.types import HookedModel

#: Bytes that second copies of the weights may take together; what goes beyond stays as it is.
MOST_BYTES = 2**30


def lay_out(model: HookedModel) -> None:
    """Lay the weights out for good, one after the other. Does nothing to a Bridge."""
    for parameter, turn in _turned(model):
        parameter.data = turn(parameter.data)


@contextmanager
def pretransposed_weights(model: HookedModel) -> Iterator[None]:
    """For the length of the block, the weights lie in memory as the passes want them.

    Afterwards the parameters hold their own memory again. Does nothing to a Bridge, on a GPU, or to
    a model that is laid out already, as `load_model`'s are.
    """
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter, turn in _copied(model):
            own.append((parameter, parameter.data))
            parameter.data = turn(parameter.data)
        yield
    finally:
        for parameter, data in reversed(own):
            parameter.data = data


def copied_bytes(model: HookedModel) -> int:
    """Bytes that `pretransposed_weights` takes besides the model's own memory."""
    return sum(parameter.nbytes for parameter, _ in _copied(model))


def _copied(model: HookedModel) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """The weights that `pretransposed_weights` turns around, within its bounds."""
    room = MOST_BYTES
    for parameter, turn in _turned(model):
        room -= parameter.nbytes
        if parameter.device.type == "cpu" and room >= 0:
            yield parameter, turn


def _turned(model: HookedModel) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """The weights that a pass copies, and how they lie so that it need not."""
    if backend_of(model) != "hooked":
        return
    for block in model.blocks:
        turns = []
        for name, parameter in block.attn.named_parameters(recurse=False):
            # A grouped-query model's own key and value weights are named _W_K and _W_V.
            plain = name.lstrip("_")
            if plain in ("W_Q", "W_K", "W_V", "W_O") and parameter.ndim == 3:
                turns.append((parameter, _output_first if plain == "W_O" else _input_last))
        mlp = dict(getattr(block, "mlp", block.attn).named_parameters(recurse=False))
        if "W_gate" in mlp:
            found = (mlp[name] for name in ("W_gate", "W_in", "W_out") if name in mlp)
            turns += [(parameter, _input_last) for parameter in found if parameter.ndim == 2]
        for parameter, turn in turns:
            # On the meta device the strides alone are worked out.
            if turn(parameter.data.to("meta")).stride() != parameter.stride():
                yield parameter, turn


def _input_last(data: Tensor) -> Tensor:
    """``[..., d_in, d_out]`` with d_in innermost."""
    return data.transpose(-1, -2).contiguous().transpose(-1, -2)


def _output_first(data: Tensor) -> Tensor:
    """``[head, d_head, d_model]`` with d_model outermost."""
    return data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
