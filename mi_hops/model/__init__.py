"""TransformerLens models: loading, hooks, weights, identity, caches; the only place that knows the classes."""

from mi_hops.model.classes import backend_of, hooked_class
from mi_hops.model.hooks import (
    HOOK_NAMES,
    capture,
    forward,
    hook_name,
    hooked,
    require_hooks,
    require_layers,
)
from mi_hops.model.identity import (
    device_of,
    dtype_of,
    fingerprint,
    n_heads_of,
    n_kv_heads,
    prepends_bos,
    processing_of,
    provenance,
)
from mi_hops.model.loading import CHECKPOINTS, bundled_models, load_model, usable_device
from mi_hops.model.types import Backend, Hook, HookedModel, HookFn, MissingHookError
from mi_hops.model.weights import (
    embedding,
    final_norm,
    overwrite,
    read_out,
    read_w_o,
    require_unquantised,
    unembedding,
    w_o,
    write_w_o,
)

__all__ = [
    "Backend",
    "CHECKPOINTS",
    "HOOK_NAMES",
    "Hook",
    "HookFn",
    "HookedModel",
    "MissingHookError",
    "backend_of",
    "bundled_models",
    "capture",
    "device_of",
    "dtype_of",
    "embedding",
    "final_norm",
    "fingerprint",
    "forward",
    "hook_name",
    "hooked",
    "hooked_class",
    "load_model",
    "n_heads_of",
    "n_kv_heads",
    "overwrite",
    "prepends_bos",
    "processing_of",
    "provenance",
    "read_out",
    "read_w_o",
    "require_hooks",
    "require_layers",
    "require_unquantised",
    "unembedding",
    "usable_device",
    "w_o",
    "write_w_o",
]
