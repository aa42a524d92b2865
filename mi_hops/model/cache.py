"""Key/value caches: of growing generations, and of a prefix that many rows share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model.classes import backend_of
from mi_hops.model.hooks import storing
from mi_hops.model.identity import device_of, n_kv_heads
from mi_hops.model.types import HookedModel


def new_cache(model: HookedModel, rows: int) -> Any:
    """An empty key/value cache for `rows` rows, of the kind the model's class reads."""
    if backend_of(model) == "hooked":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), rows)
    from transformers import DynamicCache

    return DynamicCache()


class Recorder:
    """Remembers the first rows of a pass that starts at the first token.

    Args:
        n_rows: how many rows; those that join the batch later are not remembered.
        streams: hooks of the residual stream to be remembered besides keys and values.

    Attributes:
        cache, hooks: to be given to that pass.
    """

    def __init__(self, model: HookedModel, n_rows: int, streams: Iterable[str]) -> None:
        def keep(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self._kept[layer] = keys[:n_rows].clone(), values[:n_rows].clone()
            return keys, values

        self._model = model
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._streams: dict[str, Tensor] = {}
        self.cache = joining_cache(model, keep, n_rows, 0)
        self.hooks = storing(self._streams, streams, lambda x: x[:n_rows].clone())

    def prefix(self) -> Prefix:
        """What was remembered, once the pass has run."""
        return Prefix(self._model, list(self._kept.values()), self._streams)


class Prefix:
    """What a pass over base prompts leaves for others: keys and values, and the residual stream.

    Made by `Recorder`; keys and values per layer, ``[base, pos, kv_head, d_head]`` for
    HookedTransformer and ``[base, kv_head, pos, d_head]`` for the Bridge, and ``[base, pos,
    d_model]`` at each hook where rows join.
    """

    def __init__(
        self, model: HookedModel, entries: list[tuple[Tensor, Tensor]], streams: dict[str, Tensor]
    ) -> None:
        self._model, self._entries, self._streams = model, entries, streams

    def stream(self, hook: str, bases: list[int], start: int) -> Float[Tensor, "row pos d_model"]:
        """The stream at a hook, from position `start` on, one row for each of `bases`."""
        return self._streams[hook][bases, start:]

    def view(self, bases: list[int], length: int) -> Any:
        """A cache of the first `length` positions for rows that start as `bases`.

        Its attribute ``rows`` (base index of each current row, as positions in `bases`) must be
        kept up to date by whoever lets the batch grow.
        """
        axis = 1 if backend_of(self._model) == "hooked" else 2
        picked = [
            (k[bases].narrow(axis, 0, length), v[bases].narrow(axis, 0, length))
            for k, v in self._entries
        ]

        def join(
            layer: int, keys: Tensor, values: Tensor, rotate: Callable[..., Tensor] | None = None
        ) -> tuple[Tensor, Tensor]:
            past_keys, past_values = picked[layer]
            if rotate is not None:
                past_keys = rotate(past_keys, 0)
            return (
                _joined(past_keys, keys, cache.rows, axis),
                _joined(past_values, values, cache.rows, axis),
            )

        cache = joining_cache(self._model, join, len(bases), length)
        cache.rotates = True
        return cache


def _joined(past: Tensor, new: Tensor, rows: list[int], axis: int) -> Tensor:
    # A single base needs no gather: expand is free.
    grown = past.expand(len(rows), -1, -1, -1) if past.shape[0] == 1 else past[rows]
    return torch.cat([grown, new], dim=axis)


# -- caches whose keys and values are kept elsewhere ------------------------------------------------

#: (layer, new keys, new values) -> the keys and values that are attended to.
Join = Callable[..., tuple[Tensor, Tensor]]


def joining_cache(model: HookedModel, join: Join, n_rows: int, length: int) -> Any:
    """Looks like a cache of `length` positions to a forward pass of `n_rows` rows."""
    if backend_of(model) == "hooked":
        return HookedCache(model, join, n_rows, length)
    cache = bridge_cache(join, length)
    cache.rows = list(range(n_rows))
    return cache


class HookedCache:
    """Looks like TransformerLens's cache to a HookedTransformer's forward pass.

    Args:
        mask: of all positions; default one row of ones, which broadcasts over however many rows the
            batch grows to.

    Attributes:
        rows: one entry for each row there is now; a pass looks at their number only.
        rotates: `join` takes rotated keys, and as a fourth argument what rotates those before them.
    """

    def __init__(
        self,
        model: HookedModel,
        join: Join,
        n_rows: int,
        length: int,
        mask: Int[Tensor, "row slot"] | None = None,
    ) -> None:
        self.join, self.rows, self.rotates = join, list(range(n_rows)), False
        self._mask, self._length = mask, length
        self._heads = n_kv_heads(model), int(model.cfg.d_head)

    def __getitem__(self, layer: int) -> HookedEntry:
        return HookedEntry(self, layer)

    @property
    def past(self) -> Float[Tensor, "row pos kv_head d_head"]:
        """As many keys as lie before the pass: only their shape is looked at."""
        return torch.empty(()).expand(len(self.rows), self._length, *self._heads)

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        """That of all positions, from the one of the pass's own."""
        if self._mask is not None:
            return self._mask
        return mask.new_ones(1, self._length + mask.shape[1])


class HookedEntry:
    """A layer of a `HookedCache`."""

    def __init__(self, cache: HookedCache, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self.past_keys, self.rotates = cache.past, cache.rotates

    def append(self, *new: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the rows attend to; `new` as `join` takes them."""
        return self._cache.join(self._layer, *new)


def bridge_cache(join: Join, length: int) -> Any:
    """Looks like transformers' cache of `length` positions to a Bridge's forward pass."""
    from transformers import DynamicCache

    class BridgeCache(DynamicCache):
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            return join(layer_idx, key_states, value_states)

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return length

    return BridgeCache()
