"""What this package needs of a model, in types: the protocol, hook functions, one error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from torch import Tensor

Backend = Literal["hooked", "bridge"]
HookFn = Callable[[Tensor], Tensor | None]
Hook = tuple[str, HookFn]
#: A hook as TransformerLens's own methods take it: the function gets the hook point as ``hook=``.
PlainHook = tuple[str | Callable[..., Any], Callable[..., Any]]


class HookedModel(Protocol):
    """What this package needs from a model; both TransformerLens classes provide it."""

    #: How many contexts of hooks are open, one within the other.
    context_level: int

    # Read-only members: one class has a property where the other has an attribute.

    @property
    def cfg(self) -> Any:
        """The configuration: sizes, device, dtype."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, or None."""
        ...

    @property
    def hook_dict(self) -> Any:
        """Hook name -> hook point."""
        ...

    @property
    def W_U(self) -> Any:
        """The unembedding ``[d_model, d_vocab]``."""
        ...

    def __getattr__(self, name: str) -> Any:
        """Modules by name (``blocks``, ``ln_final``, ``unembed``), which torch looks up at run time."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """A context in which hooks are attached."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The weights."""
        ...

    def modules(self) -> Iterator[Any]:
        """The model's parts."""
        ...


class MissingHookError(ValueError):
    """A model does not have a hook point or a weight that a method needs; the message names it."""
