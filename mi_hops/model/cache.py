"""Key/value caches: of growing generations, and of a prefix that many rows share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import Hook, HookedModel, backend_of, device_of


def new_cache(model: HookedModel, rows: int) -> Any:
    """An empty key/value cache for `rows` rows, of the kind the model's class reads."""
    if backend_of(model) == "hooked":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), rows)
    from transformers import DynamicCache

    return DynamicCache()


def remembering(store: dict[str, Tensor], names: Iterable[str], n_rows: int) -> list[Hook]:
    """Hooks after which `store` has copies of the first rows' activations, by hook name."""

    def keep(name: str) -> Callable[[Tensor], None]:
        def fn(x: Tensor) -> None:
            store[name] = x[:n_rows].clone()

        return fn

    return [(name, keep(name)) for name in names]


class Recorder:
    """Remembers the first rows of a pass that starts at the first token.

    Args:
        n_rows: how many rows; those that join the batch later are not remembered.
        streams: hooks of the residual stream to be remembered besides keys and values.

    Attributes:
        cache, hooks: to be given to that pass.
    """

    def __init__(self, model: HookedModel, n_rows: int, streams: Iterable[str]) -> None:
        self._hooked = backend_of(model) == "hooked"
        empty = new_cache(model, n_rows)
        self.cache = _HookedRecorder(empty) if self._hooked else _bridge_recorder(n_rows)
        self._streams: dict[str, Tensor] = {}
        self.hooks = remembering(self._streams, streams, n_rows)

    def prefix(self) -> Prefix:
        """What was remembered, once the pass has run."""
        return Prefix(list(self.cache.kept.values()), self._hooked, self._streams)


class _HookedRecorder:
    """Looks like TransformerLens's empty cache to a forward pass."""

    def __init__(self, empty: Any) -> None:
        self._entries = empty.entries
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, layer: int) -> _HookedRecording:
        return _HookedRecording(self.kept, layer, self._entries[layer])

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        # One row: it broadcasts over however many rows the batch grows to.
        return mask.new_ones(1, mask.shape[1])


class _HookedRecording:
    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], layer: int, empty: Any) -> None:
        self._kept, self._layer = kept, layer
        self.past_keys, self.past_values = empty.past_keys, empty.past_values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        n = self.past_keys.shape[0]
        self._kept[self._layer] = keys[:n].clone(), values[:n].clone()
        return keys, values


def _bridge_recorder(n_rows: int) -> Any:
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept[layer] = keys[:n_rows].clone(), values[:n_rows].clone()
        return keys, values

    cache = bridge_cache(keep, 0)
    cache.kept = kept
    return cache


def bridge_cache(join: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], length: int) -> Any:
    """Looks like transformers' cache of `length` positions to a Bridge's forward pass.

    Args:
        join: (layer, new keys, new values) -> the keys and values that are attended to.
    """
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


class Prefix:
    """What a pass over base prompts leaves for others: keys and values, and the residual stream.

    Made by `Recorder`; keys and values per layer, ``[base, pos, kv_head, d_head]`` for
    HookedTransformer and ``[base, kv_head, pos, d_head]`` for the Bridge, and ``[base, pos,
    d_model]`` at each hook where rows join.
    """

    def __init__(
        self, entries: list[tuple[Tensor, Tensor]], hooked: bool, streams: dict[str, Tensor]
    ) -> None:
        self._entries, self._hooked, self._streams = entries, hooked, streams

    def stream(self, hook: str, bases: list[int], start: int) -> Float[Tensor, "row pos d_model"]:
        """The stream at a hook, from position `start` on, one row for each of `bases`."""
        return self._streams[hook][bases, start:]

    def view(self, bases: list[int], length: int) -> Any:
        """A cache of the first `length` positions for rows that start as `bases`.

        Its attribute ``rows`` (base index of each current row, as positions in `bases`) must be
        kept up to date by whoever lets the batch grow.
        """
        axis = 1 if self._hooked else 2
        picked = [
            (k[bases].narrow(axis, 0, length), v[bases].narrow(axis, 0, length))
            for k, v in self._entries
        ]
        if self._hooked:
            return _HookedView(picked, length)
        return _bridge_view(picked, length)


class _HookedView:
    """Looks like TransformerLens's cache to a forward pass; reads only, and follows the rows."""

    def __init__(self, entries: list[tuple[Tensor, Tensor]], length: int) -> None:
        self.rows = list(range(entries[0][0].shape[0]))
        self._length = length
        self._entries = [HookedEntry(self, k, v) for k, v in entries]

    def __getitem__(self, layer: int) -> HookedEntry:
        return self._entries[layer]

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        # One row of ones: it broadcasts over however many rows the batch grows to.
        return mask.new_ones(1, self._length + mask.shape[1])


class HookedEntry:
    """A layer of a `Prefix.view` of a HookedTransformer."""

    def __init__(self, view: _HookedView, keys: Tensor, values: Tensor) -> None:
        self._view, self._keys, self._values = view, keys, values

    @property
    def past_keys(self) -> Tensor:
        """As many rows as there are now: a forward pass looks at its shape, `append` at values."""
        return self._keys[:1].expand(len(self._view.rows), -1, -1, -1)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that the rows attend to."""
        return self.append_rotated(keys, values, lambda past, offset: past)

    def append_rotated(
        self, keys: Tensor, values: Tensor, rotate: Callable[[Tensor, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same, with `keys` rotated already and those cached by `rotate(keys, 0)`."""
        rows = self._view.rows
        return _joined(rotate(self._keys, 0), keys, rows, 1), _joined(self._values, values, rows, 1)


def _bridge_view(entries: list[tuple[Tensor, Tensor]], length: int) -> Any:
    """As `_HookedView`, for the Bridge."""

    def join(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        past_keys, past_values = entries[layer]
        return _joined(past_keys, keys, cache.rows, 2), _joined(past_values, values, cache.rows, 2)

    cache = bridge_cache(join, length)
    cache.rows = list(range(entries[0][0].shape[0]))
    return cache


def _joined(past: Tensor, new: Tensor, rows: list[int], axis: int) -> Tensor:
    # A single base needs no gather: expand is free.
    grown = past.expand(len(rows), -1, -1, -1) if past.shape[0] == 1 else past[rows]
    return torch.cat([grown, new], dim=axis)
