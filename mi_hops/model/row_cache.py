"""Keys and values of prompts of unequal lengths that are continued together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mi_hops.model.cache import HookedCache, Join, bridge_cache
from mi_hops.model.classes import backend_of
from mi_hops.model.hooks import additive_mask
from mi_hops.model.identity import device_of
from mi_hops.model.plain import Slots
from mi_hops.model.types import HookedModel


def takes_unequal_rows(model: HookedModel) -> bool:
    """Whether `RowCache` gives each row what it would get alone.

    It does where a token's position matters by an embedding or a rotation only and all attention is
    causal and global; families whose passes were not compared are left out.
    """
    if backend_of(model) == "hooked":
        cfg = model.cfg
        return (
            cfg.positional_embedding_type in ("standard", "rotary")
            and cfg.attention_dir == "causal"
            and not cfg.use_local_attn
            and not getattr(cfg, "use_dynamic_ntk_rope", False)
        )
    config = getattr(model.original_model, "config", None)
    return getattr(config, "model_type", None) in ("gpt2", "llama")


class RowCache:
    """Keys and values of several rows, one buffer for each layer.

    A prompt takes the first slots of its row; the slots up to the longest prompt's length stay empty
    and are never attended to. What is generated takes the slots after, the same for all rows.

    Args:
        n_rows: how many rows.
        width: tokens of the longest prompt.
        n_new: tokens that will be appended to each, at most.
        plain: it is for `PlainPasses`, not for the model's own.
    """

    def __init__(
        self, model: HookedModel, n_rows: int, width: int, n_new: int = 0, *, plain: bool = False
    ) -> None:
        self._model, self._hooked = model, backend_of(model) == "hooked"
        self._plain = plain
        # Of positions: TransformerLens's is before the heads.
        self._axis = 1 if self._hooked and not plain else 2
        self.width = width
        self._n_rows, self._n_slots = n_rows, width + n_new
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def prompts(self, first: int, n_rows: int, width: int, start: RowCache | None = None) -> Any:
        """A cache for a pass over the prompts of `n_rows` rows from `first` on, right-padded.

        Args:
            width: positions of the pass.
            start: one row, with the tokens that all of these prompts start with; the pass goes on
                behind them.
        """
        at = 0 if start is None else start.width
        device = device_of(self._model)
        where = torch.arange(at, at + width, device=device)
        seen = torch.arange(at + width, device=device)[None] <= where[:, None]

        def join(layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
            kept = self._buffers(layer, new)
            for i, (buffer, value) in enumerate(zip(kept, new, strict=True)):
                mine = buffer.narrow(0, first, n_rows)
                if start is not None:
                    mine.narrow(self._axis, 0, at).copy_(start._kept[layer][i])
                mine.narrow(self._axis, at, width).copy_(value)
                # An empty slot's weight is 0, and 0 times a NaN would be NaN.
                mine.narrow(self._axis, at + width, self.width - at - width).zero_()
            return self._read(kept, first, n_rows, at + width)

        return self._pass(n_rows, join, seen[None, None], where[None], alike=True)

    def step(self, seen: Bool[Tensor, "row slot"], positions: Int[Tensor, "row"]) -> Any:
        """A cache for a pass over one further token of every row.

        Args:
            seen: which slots each row attends to, the new token's (the last one) included.
            positions: of the new tokens, counted within their rows.
        """
        end = seen.shape[1]

        def join(layer: int, *new: Tensor) -> tuple[Tensor, Tensor]:
            kept = self._buffers(layer, new)
            for buffer, value in zip(kept, new, strict=True):
                buffer.narrow(self._axis, end - 1, 1).copy_(value)
            return self._read(kept, 0, self._n_rows, end)

        return self._pass(self._n_rows, join, seen[:, None, None], positions[:, None], alike=False)

    def keep(self, rows: Int[Tensor, "row"]) -> None:
        """Only these rows go on, in this order."""
        self._n_rows = len(rows)
        for layer, (keys, values) in self._kept.items():
            self._kept[layer] = keys[rows.to(keys.device)], values[rows.to(values.device)]

    def _buffers(self, layer: int, new: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        axis = self._axis
        if layer not in self._kept:
            keys, values = (
                x.new_empty(self._n_rows, *x.shape[1:axis], self._n_slots, *x.shape[axis + 1 :])
                for x in new
            )
            self._kept[layer] = keys, values
        return self._kept[layer]

    def _read(
        self, kept: tuple[Tensor, Tensor], first: int, n_rows: int, end: int
    ) -> tuple[Tensor, Tensor]:
        keys, values = (x.narrow(0, first, n_rows).narrow(self._axis, 0, end) for x in kept)
        return keys, values

    def _pass(
        self,
        n_rows: int,
        join: Join,
        seen: Bool[Tensor, "row 1 pos slot"],
        positions: Int[Tensor, "row pos"],
        *,
        alike: bool,
    ) -> Any:
        if self._plain:
            return Slots(join, seen, positions, alike)
        length = seen.shape[-1] - positions.shape[-1]
        if self._hooked:  # which takes care of causality itself
            return HookedCache(self._model, join, n_rows, length, seen[:, 0, -1].long())
        cache = bridge_cache(join, length)
        # A mask of the positions themselves: made from a row of ones it would know no empty slots.
        mask = additive_mask(self._model, seen)
        cache.options = {"attention_mask": mask, "position_ids": positions}
        return cache
