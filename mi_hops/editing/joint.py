"""Many CREME edits in one model: solved together, or made one after the other.

Together: at each layer, with the keys K of all facts as rows and R what their outputs lack,
``Δ = C^-1 K^T (K C^-1 K^T + λ I)^-1 R`` is the change that minimises
``|K Δ - R|^2 + λ tr(Δ^T C Δ)``; it equals MEMIT's ``(λ C + K^T K)^-1 K^T R`` (arXiv 2210.07229), there
for MLPs. Layers go in ascending order, the keys and outputs of each read from the model as edited
below it.

Spread: one matrix meets no more independent keys than it has inputs. As in MEMIT, every layer can
write its share of what the stream still lacks at the last of the layers,
``R = (v* - v) / (layers left)``, so that all layers' inputs count together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mi_hops.editing.change import Change, input_hook, merge, output_hook
from mi_hops.editing.checks import Layers
from mi_hops.editing.creme import CremeRun, as_edit, editable_for
from mi_hops.editing.edit import Edit
from mi_hops.editing.passes import activations
from mi_hops.editing.plans import CremeSettings, Plan, chunk_plans, plan_request, read_plan
from mi_hops.editing.request import Asked, check_together, requests_of
from mi_hops.editing.rows import edit_hooks
from mi_hops.editing.solve import solve_keys
from mi_hops.model import HookedModel, hook_name
from mi_hops.result.progress import progress_bar
from mi_hops.text.tokens import pad


def creme_joint(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Layers | None = None,
    ridge: float = 0.3,
    strength: float = 1.0,
    spread: bool = False,
    batch_size: int = 256,
    progress: bool = False,
    **settings: Any,
) -> Edit:
    """One edit for many facts, solved jointly; the model is left unchanged.

    Takes one pass over all prompts for each layer, in batches, so memory does not grow with the
    number of facts but for their keys and changes.

    Args:
        asked: facts, or requests.
        layers: blocks to edit, or block -> heads; default the last third.
        ridge: λ above, in units of the mean of the diagonal of ``K C^-1 K^T``. 0 meets every key
            exactly, which needs keys that do not depend on one another, fewer than d_in.
        strength: share of the change that is made; here `ridge` already holds it back.
        spread: every layer writes a share of what the stream behind the last layer's attention lacks,
            instead of what it lacks behind its own. Needs ``match="residual"``.
        batch_size: prompts in one pass.
        progress: show a progress bar over layers.
        settings: of `CremeSettings`; the kept prompts of all facts are kept together.

    Returns:
        An `Edit` with as many factors per layer as there are keys, or a dense change where those
        would take more room.

    Raises:
        ValueError: no facts, requests that contradict one another (with both), a negative ridge,
            `spread` with ``match="attention"``, or as `creme.creme_many`.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> edit = mi_hops.creme_joint(model, facts, layers=[3])
        >>> with edit.applied(model):
        ...     said = mi_hops.generate(model, [facts[0].prompt()])
    """
    how = CremeSettings(strength=strength, **settings)
    requests = requests_of(asked, how.form, how.keep)
    if not requests:
        raise ValueError("no facts to edit")
    check_together(requests)
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}; expected 0 or more")
    if spread and how.match != "residual":
        raise ValueError(
            f"spread shares out what the stream lacks, and match is {how.match!r}; pass "
            "match='residual', or spread=False"
        )
    editable = editable_for(model, layers, how)
    plans = [plan_request(model, request, how) for request in requests]
    request = {"joint": [each.to_dict() for each in requests]}
    record = {**editable.where, "ridge": ridge, "spread": spread, **how.to_dict()}
    done: list[Change] = []
    last = editable.layers[-1]
    for layer in progress_bar(editable.layers, label="joint CREME, layers", show=progress):
        below = editable.edit("creme-joint", request, done, record) if done else None
        goal = last if spread else layer
        keys, kept, change = _gather(model, plans, (layer, goal), how, below, batch_size)
        if spread:
            change = change / (len(editable.layers) - len(done))
        left = solve_keys(
            keys,
            kept if len(kept) else None,
            inverse=editable.inverse_times(layer, torch.cat([keys, kept])),
            slack=how.slack,
            ridge=ridge,
        )
        done.append(merge([editable.change(layer, left, strength * change)]))
    return editable.edit("creme-joint", request, done, record)


def _gather(
    model: HookedModel,
    plans: Sequence[Plan],
    layers: tuple[int, int],
    how: CremeSettings,
    below: Edit | None,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and kept keys of all plans at the first layer, changes at the second, with `below` applied."""
    layer, goal = layers
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    names = (hook_name("resid_pre", goal), input_hook("W_O", layer), output_hook("W_O", goal))
    for members in chunk_plans(plans, batch_size):
        part = [plans[i] for i in members]
        tokens = pad([row for plan in part for row in plan.rows]).tokens
        rows = [below if on else None for plan in part for on in plan.edited(how.target)]
        before, z, stream = activations(model, tokens, names, edit_hooks(model, rows))
        if how.match == "residual":  # what enters the block may come from another device
            stream = stream + before.to(stream.device)
        start = 0
        for plan in part:
            found.append(read_plan(plan, start, z, stream.to(z.device)))
            start += len(plan.rows)
    keys, kept, change = (torch.cat(parts) for parts in zip(*found, strict=True))
    return keys, kept, change


def creme_sequential(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Layers | None = None,
    hold: bool = True,
    progress: bool = False,
    **settings: Any,
) -> list[Edit]:
    """CREME edits in sequence, each made on the model as edited so far.

    The model is left as it is. To have the first n applied, apply the first n in order; to have
    them as one edit, ``stack(edits[:n], check=False)``.

    Args:
        asked: facts, or requests.
        layers: blocks to edit, or block -> heads; default the last third.
        hold: keep what earlier edits made: at the inputs they act on and those they keep, a later
            edit changes an output no more than `CremeSettings.slack` lets it. Those inputs are as
            they were when the earlier edit was made. False makes each edit as if it were the first.
        progress: show a progress bar over facts.
        settings: of `CremeSettings`.

    Raises:
        ValueError: as `creme.creme_many`; with `hold`, also requests that contradict one another, and
            a slack of 0, which no edit could meet once there are more inputs to hold than dimensions.
    """
    how = CremeSettings(**settings)
    if hold and how.slack == 0:
        raise ValueError(
            "slack is 0; holding earlier edits needs slack above 0, or pass hold=False"
        )
    requests = requests_of(asked, how.form, how.keep)
    if hold:
        check_together(requests)
    editable_for(model, layers, how)  # refused before any plan is made
    plans = [plan_request(model, request, how) for request in requests]
    held: dict[int, Tensor] = {}
    edits: list[Edit] = []
    with ExitStack() as applied:
        for request, plan in progress_bar(
            list(zip(requests, plans, strict=True)), label="sequential CREME", show=progress
        ):
            editable = editable_for(model, layers, how)  # of the weights as edited so far
            run = CremeRun([plan], model, editable, how, held if hold else None)
            (changes,) = run.changes()
            edits.append(as_edit(editable, request, changes, how, hold=hold))
            for layer, keys in run.keys.items():
                held[layer] = torch.cat([held[layer], keys]) if layer in held else keys
            applied.enter_context(edits[-1].applied(model, check=False))
    return edits
