"""Key/value caches: of growing generations, and of a prefix that many rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mi_hops.model import Hook, LensModel, backend_of, device_of, forward

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def new_cache(model: LensModel, rows: int) -> Any:
    """An empty key/value cache for `rows` rows, of the kind the model's class reads."""
    if backend_of(model) == "hooked":
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), rows)
    from transformers import DynamicCache

    return DynamicCache()


class Prefix:
    """Keys and values of base prompts, to be reused for tokens before a position.

    Args:
        tokens: base prompts ``[base, pos]``; one forward pass fills the store.
        hooks: of that pass.

    Attributes:
        logits: what that pass gave.
    """

    def __init__(
        self, model: LensModel, tokens: Int[Tensor, "base pos"], hooks: Sequence[Hook] = ()
    ) -> None:
        cache = new_cache(model, tokens.shape[0])
        self.logits = forward(model, tokens, hooks=hooks, cache=cache)
        self._hooked = backend_of(model) == "hooked"
        self._entries: list[tuple[Tensor, Tensor]]
        if self._hooked:  # [base, pos, kv_head, d_head]
            self._entries = [(e.past_keys, e.past_values) for e in cache.entries]
        else:  # [base, kv_head, pos, d_head]
            self._entries = [(layer.keys, layer.values) for layer in cache.layers]

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
        self._entries = [_HookedEntry(self, k, v) for k, v in entries]

    def __getitem__(self, layer: int) -> _HookedEntry:
        return self._entries[layer]

    def append_attention_mask(self, mask: Tensor) -> Tensor:
        # One row of ones: it broadcasts over however many rows the batch grows to.
        return mask.new_ones(1, self._length + mask.shape[1])


class _HookedEntry:
    def __init__(self, view: _HookedView, keys: Tensor, values: Tensor) -> None:
        self._view, self.past_keys, self.past_values = view, keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _joined(self.past_keys, keys, self._view.rows, 1), _joined(
            self.past_values, values, self._view.rows, 1
        )


def _bridge_view(entries: list[tuple[Tensor, Tensor]], length: int) -> Any:
    from transformers import DynamicCache

    class BridgeView(DynamicCache):
        """Looks like transformers' cache to a forward pass; reads only, and follows the rows."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = list(range(entries[0][0].shape[0]))

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            past_keys, past_values = entries[layer_idx]
            return _joined(past_keys, key_states, self.rows, 2), _joined(
                past_values, value_states, self.rows, 2
            )

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return length

    return BridgeView()


def _joined(past: Tensor, new: Tensor, rows: list[int], axis: int) -> Tensor:
    import torch

    # A single base needs no gather: expand is free.
    grown = past.expand(len(rows), -1, -1, -1) if past.shape[0] == 1 else past[rows]
    return torch.cat([grown, new], dim=axis)
