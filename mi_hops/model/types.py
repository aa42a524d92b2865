"""What this package needs of a model, in types: the protocol, hook functions, one error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from torch import Tensor

Backend = Literal["hooked", "bridge"]
HookFn = Callable[[Tensor], Tensor | None]
Hook = tuple[str, HookFn]


class HookedModel(Protocol):
    """What this package needs of a model; both TransformerLens classes have it."""

    cfg: Any
    tokenizer: Any
    blocks: Any
    hook_dict: Any
    W_U: Any
    ln_final: Any
    unembed: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """A context in which hooks are attached."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The weights."""
        ...


class MissingHookError(ValueError):
    """A model has not got a hook point or a weight that a method needs; the message names it."""
