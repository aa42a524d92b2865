"""Hook points, forward passes under hooks, and captured activations, alike on both classes.

Layers and positions count from 0; hook names are TransformerLens's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mi_hops.model.classes import backend_of
from mi_hops.model.identity import device_of, dtype_of, ln_final
from mi_hops.model.shortcuts import is_foreign
from mi_hops.model.types import Hook, HookedModel, HookFn, MissingHookError, PlainHook

#: Kind of activation -> TransformerLens hook name; ``{}`` is the layer.
HOOK_NAMES = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "pattern": "blocks.{}.attn.hook_pattern",
    "mlp_pre": "blocks.{}.mlp.hook_pre",
    "mlp_post": "blocks.{}.mlp.hook_post",
}


def hook_name(kind: str, layer: int = 0) -> str:
    """The TransformerLens hook name of an activation kind at a layer.

    Raises:
        ValueError: a kind that is not in `HOOK_NAMES`.
    """
    try:
        return HOOK_NAMES[kind].format(layer)
    except KeyError:
        raise ValueError(
            f"unknown activation kind {kind!r}; expected one of {list(HOOK_NAMES)}"
        ) from None


def hook_point(model: HookedModel, name: str) -> HookPoint | None:
    """The hook point of a name, or None.

    By attributes, as names are written: `hook_dict` of a Bridge resolves all of its names each time it is
    read, which takes as long as several blocks of a small model.
    """
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, HookPoint) else model.hook_dict.get(name)


def require_hooks(model: HookedModel, names: Iterable[str]) -> None:
    """Refuse a model that lacks a hook point, naming it.

    Raises:
        MissingHookError: with the missing names.
    """
    missing = sorted({n for n in names if hook_point(model, n) is None})
    if missing:
        raise MissingHookError(
            f"this {type(model).__name__} has no hook point {', '.join(missing)}; the method needs "
            f"it (layers run from 0 to {model.cfg.n_layers - 1}, model.hook_dict lists what exists)"
        )


def require_layers(model: HookedModel, layers: Iterable[int]) -> None:
    """Refuse layers outside the model.

    Raises:
        ValueError: with the offending layers and the range.
    """
    wrong = [layer for layer in layers if not 0 <= layer < model.cfg.n_layers]
    if wrong:
        raise ValueError(
            f"layer(s) {wrong} out of range; the model has 0..{model.cfg.n_layers - 1}"
        )


def plain_hooks(model: HookedModel, hooks: Sequence[Hook]) -> list[PlainHook]:
    """Hooks as TransformerLens takes them, in ``run_with_hooks(fwd_hooks=...)`` and ``hooks(...)``.

    ``hook_resid_mid`` is really changed on both classes: on the Bridge that hook sits on the MLP's
    branch only, so the change is made at ``hook_attn_out``, after all hooks given for that name.

    Raises:
        MissingHookError: a name the model does not have.
    """
    require_hooks(model, (name for name, _ in hooks))
    bridge = backend_of(model) == "bridge"
    first: list[PlainHook] = []
    after: list[PlainHook] = []
    for name, fn in hooks:
        if bridge and name.endswith("hook_resid_mid"):
            after += _bridge_resid_mid(name, fn)
        else:
            first.append((name, _with_hook_argument(fn)))
    return first + after


@contextmanager
def hooked(model: HookedModel, hooks: Sequence[Hook], *, must_fire: bool = True) -> Iterator[None]:
    """Attach forward hooks within a ``with`` block and remove them afterwards.

    A hook function takes the activation and returns a new one, or None to leave it. Several hooks
    at one name act in the order given; ``hook_resid_mid`` as in `plain_hooks`.

    Args:
        must_fire: raise if a hook was never reached by the end of a block that did not fail.

    Raises:
        MissingHookError: a name the model does not have.
        RuntimeError: a hook that never fired.
    """
    if not hooks:
        yield
        return
    fired = [False] * len(hooks)
    watched = [(name, _flagged(fn, fired, i)) for i, (name, fn) in enumerate(hooks)]
    points: list[HookPoint] = []
    with nothing_stays(model):
        # As model.hooks(...), which on a Bridge reads `hook_dict` for each of them.
        level = model.context_level = model.context_level + 1
        for name, fn in plain_hooks(model, watched):
            point = hook_point(model, str(name))
            assert point is not None, "plain_hooks refuses what is missing"
            point.add_hook(fn, level=level)
            points.append(point)
        yield
        for point in points:
            point.remove_hooks("fwd", level=level)
        model.context_level = level - 1
    if must_fire and not all(fired):
        silent = sorted({hooks[i][0] for i, f in enumerate(fired) if not f})
        raise RuntimeError(
            f"hook(s) {silent} never fired, so the intervention did nothing; was the forward pass "
            "stopped before that layer, or is the hook point off (model.set_use_attn_result(True) and "
            "the like switch some on)?"
        )


@contextmanager
def nothing_stays(model: HookedModel) -> Iterator[None]:
    """Take off what hooks a block put on and left, where it is ended by an exception.

    An exception may come at any line, such as that of Ctrl-C: between the one that attaches a hook
    and the one that notes it down. Hooks that were there before, and permanent ones, stay.
    """
    first, level = RemovableHandle.next_id, model.context_level
    try:
        yield
    except BaseException:
        for module in model.modules():
            _remove_since(module, first)
        model.context_level = level
        raise


def _remove_since(module: Any, first: int) -> None:
    """Hooks with numbers from `first` on, which torch gives in the order of attaching."""
    permanent: set[int] = set()
    for side in ("fwd_hooks", "bwd_hooks"):
        handles = getattr(module, side, None)
        if handles is not None:
            permanent |= {handle.hook.id for handle in handles if handle.is_permanent}
            kept = [handle for handle in handles if handle.is_permanent or handle.hook.id < first]
            setattr(module, side, kept)
    for name in _HOOK_TABLES:
        table = getattr(module, name)
        for number in [n for n in table if n >= first and n not in permanent]:
            del table[number]


#: Where a torch module has its hooks, by number.
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _flagged(fn: HookFn, fired: list[bool], i: int) -> HookFn:
    def call(tensor: Tensor) -> Tensor | None:
        fired[i] = True
        return fn(tensor)

    return call


def _with_hook_argument(fn: HookFn) -> Callable[..., Any]:
    def call(tensor: Tensor, hook: Any) -> Tensor:
        # On the Bridge a hook that returns None may have looked at a reshaped copy; handing the
        # tensor back keeps gradients on the path on both classes.
        out = fn(tensor)
        return tensor if out is None else out

    return call


def _bridge_resid_mid(name: str, fn: HookFn) -> list[PlainHook]:
    before: list[Tensor] = []

    def remember(tensor: Tensor, hook: Any) -> Tensor:
        before[:] = [tensor]
        return tensor

    def change(tensor: Tensor, hook: Any) -> Tensor:
        resid_pre = before.pop().to(tensor.device)  # seen before its block fetched it
        out = fn(resid_pre + tensor)
        return tensor if out is None else out - resid_pre

    return [
        (name.replace("hook_resid_mid", "hook_resid_pre"), remember),
        (name.replace("hook_resid_mid", "hook_attn_out"), change),
    ]


# -- forward passes ------------------------------------------------------------------------------


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    *,
    hooks: Sequence[Hook] = (),
    stop_at_layer: int | None = None,
    cache: Any = None,
    grows: bool = False,
) -> Tensor:
    """One forward pass over right-padded tokens, without an attention mask.

    Causal attention never lets a token see padding on its right, and learned positions then start
    at 0 in every row, so no mask is needed for exactness; read each row at its own positions.

    Args:
        stop_at_layer: blocks to run; must be less than the model's number of layers.
        cache: a cache from `mi_hops.model.cache`, filled as the pass runs; `tokens` are the positions
            after those it holds, and all rows have one length.
        grows: hooks append rows to the batch on the way up, or `cache` is a view of a `Prefix`.

    Returns:
        Logits ``[row, pos, vocab]``, or the residual stream entering `stop_at_layer`.
    """
    require_no_dropout(model)
    options: dict[str, Any] = {"return_type": "logits"}
    if stop_at_layer is not None:
        if not 0 <= stop_at_layer < model.cfg.n_layers:
            raise ValueError(
                f"stop_at_layer is {stop_at_layer}; expected 0..{model.cfg.n_layers - 1}"
            )
        options["stop_at_layer"] = stop_at_layer
    tokens = tokens.to(device_of(model))
    if backend_of(model) == "hooked":
        options["padding_side"] = "right"
        if cache is not None:
            # An explicit mask of ones: inferred from pad ids it would drop a real token.
            options |= {"past_kv_cache": cache, "attention_mask": tokens.new_ones(tokens.shape)}
    elif cache is not None:
        options |= {"past_key_values": cache, "use_cache": True, **getattr(cache, "options", {})}
    if grows and backend_of(model) == "bridge":
        hooks = [(name, _rows_apart(fn, tokens.shape[1])) for name, fn in hooks]
        if tokens.shape[0] > 1 or cache is not None:
            options |= _broadcasting_mask(model, tokens.shape[1], cache)
    with hooked(model, hooks):
        if stop_at_layer is None and _reads_in_place(model):
            return _unembed(model, model(tokens, **options, stop_at_layer=model.cfg.n_layers))
        return model(tokens, **options)


def require_no_dropout(model: HookedModel) -> None:
    """Refuse a model whose passes differ by chance.

    Raises:
        ValueError: a model in training mode with dropout.
    """
    if not model.training:
        return
    for module in model.modules():
        # Looked up as it is kept: this runs before every pass, over all hook points too.
        name = "p" if isinstance(module, torch.nn.Dropout) else "attention_dropout"
        rate = module.__dict__.get(name, 0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"the model is in training mode with dropout ({rate}), so that every pass gives other "
                "numbers; call `model.eval()` first"
            )


def _rows_apart(fn: HookFn, width: int) -> HookFn:
    """A hook function that sees ``[row, pos, d]`` also where rows and positions are one axis.

    They are in the MLPs of OPT; TransformerLens takes them apart by the rows that entered the block.
    """

    def call(x: Tensor) -> Tensor | None:
        if x.ndim != 2:
            return fn(x)
        out = fn(x.unflatten(0, (-1, width)))
        return None if out is None else out.flatten(0, 1)

    return call


def _reads_in_place(model: HookedModel) -> bool:
    """Whether `_unembed` gives the model's logits: a float32 or float64 HookedTransformer.

    In half precision the order of summation shows, so there the model's own read-out is kept.
    """
    return (
        backend_of(model) == "hooked"
        and model.cfg.normalization_type is not None
        and not getattr(model.cfg, "output_logits_soft_cap", 0) > 0
        and model.W_U.is_floating_point()
        and model.W_U.element_size() >= 4
        # A hook on the whole model would get the stream instead of logits.
        and not (is_foreign(model) or is_foreign(model.unembed))
    )


def _unembed(model: HookedModel, residual: Tensor) -> Tensor:
    """HookedTransformer's read-out without the copy of W_U that it makes in every pass.

    On a CPU that copy takes as long as half of GPT-2 small's blocks do for a short prompt.
    """
    end = model.unembed
    norm = ln_final(model)
    x = end.hook_in(residual if norm is None else norm(residual))
    weight, bias = end.W_U.to(x.device), end.b_U.to(x.device)
    return end.hook_out(torch.nn.functional.linear(x, weight.T, bias))


def splits_blocks(model: HookedModel) -> bool:
    """Whether the batch can grow between a block's attention and its MLP.

    The Bridge's blocks keep the stream between the two where no hook can let it grow.
    """
    return backend_of(model) == "hooked" and _attention_then_mlp(model)


def head_inputs(model: HookedModel, role: str, layer: int) -> str | None:
    """Where, under `split_heads`, each head's own input enters: ``[row, pos, head, d_model]``.

    None on the Bridge, and where projections read quantized weights.
    """
    if backend_of(model) == "hooked" and not getattr(model.cfg, "load_in_4bit", False):
        return f"blocks.{layer}.hook_{role}_input"
    return None


@contextmanager
def split_heads(model: HookedModel) -> Iterator[None]:
    """For the length of the block, the queries, keys and values of each head have inputs of their own."""
    before = model.cfg.use_split_qkv_input
    try:
        model.cfg.use_split_qkv_input = True
        yield
    finally:
        model.cfg.use_split_qkv_input = before


def earliest_cut(model: HookedModel, *, after_attention: bool) -> str:
    """The hook from which on only the positions that are scored need to be kept.

    On HookedTransformer only they pass the last MLP. The GPT-2 Bridge reshapes the final norm's
    output to the input's shape, so there the cut comes right before the unembedding.

    Args:
        after_attention: nothing after the last block's attention is needed at other positions.
    """
    last = model.cfg.n_layers - 1
    if backend_of(model) == "bridge":
        return "unembed.hook_in"
    if after_attention and _attention_then_mlp(model):
        return hook_name("resid_mid", last)
    return hook_name("resid_post", last)


def mlp_input(model: HookedModel, layer: int) -> Literal["resid_mid", "resid_pre"] | None:
    """What the MLP of a block reads: in parallel blocks what attention reads; None where there is none."""
    if getattr(model.blocks[layer], "mlp", None) is None:
        return None
    return (
        "resid_pre" if hook_point(model, f"blocks.{layer}.hook_resid_mid") is None else "resid_mid"
    )


def _attention_then_mlp(model: HookedModel) -> bool:
    cfg = model.cfg
    return not getattr(cfg, "parallel_attn_mlp", False) and not cfg.attn_only


def _broadcasting_mask(model: HookedModel, width: int, cache: Any) -> dict[str, Any]:
    """Causal masks and positions with a batch axis of one, which fit any number of rows.

    The Bridge's own would have the batch size that the pass began with. Layers with a sliding window see
    no more than that many positions.

    Raises:
        ValueError: a kind of attention that no such mask can be made for.
    """
    config: Any = model.original_model.config.get_text_config()
    window: Any = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    kinds = kinds or {"sliding_attention" if window else "full_attention"}
    unknown = kinds - {"full_attention", "sliding_attention"}
    if getattr(model.cfg, "positional_embedding_type", None) == "alibi":
        unknown.add("alibi")
    if unknown:
        raise ValueError(
            f"attention of kind {sorted(unknown)} ({config.model_type}) does not run in the batches of a "
            "sweep on a TransformerBridge; where HookedTransformer has the model, load it as one "
            '(`load_model(..., backend="hooked")`)'
        )
    past = 0 if cache is None else int(cache.get_seq_length())
    where = torch.arange(past, past + width, device=device_of(model))
    back = where[:, None] - torch.arange(past + width, device=where.device)[None]
    masks = {"full_attention": back >= 0}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = (back >= 0) & (back < window)
    made = {kind: additive_mask(model, masks[kind][None, None]) for kind in kinds}
    # One mask is for all layers; where there are two kinds of layers, each finds its own by name.
    mask = made if len(kinds) > 1 else made.popitem()[1]
    return {"attention_mask": mask, "position_ids": where[None]}


def additive_mask(
    model: HookedModel, seen: Bool[Tensor, "row head pos key"]
) -> Float[Tensor, "row head pos key"]:
    """What the Bridge adds to attention scores: 0 where a key is seen, else the lowest number."""
    dtype = dtype_of(model)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def capture(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    names: Iterable[str],
    *,
    hooks: Sequence[Hook] = (),
    logits: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Activations at hook points from one pass, after `hooks` have acted; detached.

    Returns:
        ``(activations by name, logits or None)``. Without `logits` the pass stops after the last
        block that has a name or a hook; after the model's last one, one position is unembedded.
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    require_hooks(model, wanted)
    found: dict[str, Tensor] = {}
    hooks = [*hooks, *storing(found, wanted, Tensor.detach)]
    stop = None if logits else _last_block([name for name, _ in hooks])
    if stop == model.cfg.n_layers:
        stop = None  # to the end, but not through the vocabulary
        hooks.append(("unembed.hook_in", lambda x: x[:, :1]))
    out = forward(model, tokens, hooks=hooks, stop_at_layer=stop)
    return found, out if logits else None


def storing(
    store: dict[str, Tensor], names: Iterable[str], take: Callable[[Tensor], Tensor]
) -> list[tuple[str, Callable[[Tensor], None]]]:
    """Hooks after which `store` has what `take` makes of the activations, by hook name."""

    def look(name: str) -> Callable[[Tensor], None]:
        def fn(x: Tensor) -> None:
            store[name] = take(x)

        return fn

    return [(name, look(name)) for name in names]


def _last_block(names: Iterable[str]) -> int | None:
    """The block to stop before once all names have fired, or None if some fire behind the blocks."""
    blocks = [name for name in names if name not in ("hook_embed", "hook_pos_embed")]
    if not all(name.startswith("blocks.") for name in blocks):
        return None
    return 1 + max((int(name.split(".")[1]) for name in blocks), default=-1)
