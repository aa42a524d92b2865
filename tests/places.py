"""Two devices told apart on one CPU, for tests of models that lie on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

NEAR, FAR = torch.device("cpu"), torch.device("cuda", 99)
_MOVES = (torch.Tensor.to, torch.Tensor.cpu)
# These take indices, or what is copied, from another device.
_LENIENT = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_)


class TwoPlaces(TorchFunctionMode):
    """Every tensor made by Python code inside says that it is on `NEAR` or on `FAR`.

    Whoever asks for `FAR` gets the CPU and a mark; an operation on tensors of both places raises, as
    it would on real devices. What is made out of Python's sight (gradients) has no mark and passes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # made anew at each access
            return _place(args[0]) or NEAR
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        asked = [x for x in leaves if isinstance(x, torch.device)]
        if func in _MOVES:
            asked += [torch.device(x) for x in leaves if isinstance(x, str)]
        args, kwargs = tree_map_only(torch.device, lambda _: NEAR, (args, kwargs))
        out = func(*args, **kwargs)
        if func in _MOVES:
            if func is torch.Tensor.cpu:
                asked = [NEAR]
            elif len(tensors) > 1:
                asked = [_place(tensors[1]) or NEAR]
            where = asked[0] if asked else _place(tensors[0])
            if out is tensors[0] and where != _place(out):
                out = out.clone()
        elif asked:
            where = asked[0]
        elif func is torch.autograd.grad:
            where = None
        elif func in _LENIENT:
            where = _place(tensors[0])
        else:
            # A number on the CPU may meet tensors of any device.
            met = {p for x in tensors if (p := _place(x)) and (x.ndim or p == FAR)}
            if len(met) > 1:
                raise RuntimeError(f"{func} was called with tensors on two devices")
            where = met.pop() if met else None if tensors else NEAR
        return tree_map_only(torch.Tensor, lambda x: put(x, where), out)


def put(x: torch.Tensor, where: torch.device | None) -> torch.Tensor:
    """The tensor, marked."""
    x._place = where  # type: ignore[attr-defined]
    return x


def _place(x: torch.Tensor) -> torch.device | None:
    return getattr(x, "_place", None)


def assert_same(pair: Any, call: Callable[[Any], Any]) -> None:
    """What `call` finds in both models is the same, up to rounding."""
    one, two = (_frame(call(model)) for model in pair)
    pd.testing.assert_frame_equal(two, one, rtol=1e-5, atol=1e-6)


def _frame(found: Any) -> pd.DataFrame:
    found = getattr(found, "result", found)  # of estimates that were verified
    if hasattr(found, "data"):
        return found.data.to_dataframe()
    return found.frame if hasattr(found, "frame") else found.table
