"""Which of TransformerLens's two classes a model is of, and what follows from it.

`mi_hops` takes a `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4.x).
Nothing is ever decided from a model's name. Outside `mi_hops.model` nobody asks for the class.
"""

from __future__ import annotations

from functools import lru_cache

from mi_hops.model.types import Backend, HookedModel


@lru_cache(maxsize=1)
def hooked_class() -> type | None:
    """`HookedTransformer`, or None if the installed TransformerLens (4.x) no longer has it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def backend_of(model: HookedModel) -> Backend:
    """``"hooked"`` or ``"bridge"``.

    Raises:
        ValueError: `model` is of neither class.
    """
    hooked = hooked_class()
    if hooked is not None and isinstance(model, hooked):
        return "hooked"
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return "bridge"
    raise ValueError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; "
        "load one with mi_hops.load_model"
    )
