"""CREME: make the attention of a two-hop prompt write what it writes for the second hop alone.

For each edited layer, with k the input of W_O (z, all heads) and a the attention output at the last
token of the two-hop prompt, both averaged over context templates, and v* the attention output at the
last token of the second-hop prompt::

    W_O <- W_O + (C^-1 k / k^T C^-1 k) (v* - a)^T

so that the edited layer maps k to v*. Layers go in ascending order, each seeing the changes below.
C is the second moment of z over text; C = I gives the published code's edit (arXiv 2402.14328).
Attention biases cancel in ``v* - a``.

Held to some heads, k and C are the parts of these heads' inputs, and no other row of W_O changes.

An edit at layer l changes only what comes after it, so one forward pass over all prompts yields the
whole edit: at each edited block the change is made from this pass's own z and attention outputs and
added to them, at every position of every row, as the edited weight would, before the pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor

from mi_hops.editing.change import Change, matrix_hooks
from mi_hops.editing.checks import Editable, Layers, check_editable
from mi_hops.editing.edit import Edit
from mi_hops.editing.plans import (
    CremeSettings,
    Plan,
    chunk_plans,
    default_layers,
    plan_request,
    read_plan,
)
from mi_hops.editing.request import Asked, Request, requests_of
from mi_hops.editing.rows import EditorRepair
from mi_hops.editing.solve import SingularError, solve_keys
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, capture, hook_name
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import each_part
from mi_hops.text.tokens import decode, pad


@overload
def creme(
    model: HookedModel, asked: Asked, *, layers: Layers | None = None, **settings: Any
) -> Edit: ...


@overload
def creme(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Layers | None = None,
    **settings: Any,
) -> list[Edit]: ...


def creme(
    model: HookedModel,
    asked: Asked | Iterable[Asked],
    *,
    layers: Layers | None = None,
    **settings: Any,
) -> Edit | list[Edit]:
    """The CREME edit of a two-hop fact, from one forward pass; the model is left unchanged.

    By default the attention outputs of the last third of the blocks are edited, at strength 0.7:
    what was measured best on the bundled models. C is the identity unless second moments of the
    model's own text are passed (``covariance=second_moments(model, texts)``), which disturbs
    unrelated prompts less.

    Args:
        asked: a fact or a `Request`, or several of them, each edited on its own.
        layers: blocks to edit, or block -> heads to edit only these heads' rows of W_O; default the
            last third.
        settings: of `CremeSettings`: covariance, form, strength, match, cover, keep, ...

    Returns:
        An `Edit` with one key and one change per layer (more where the whole answer is covered), or
        a list with one edit per fact.

    Raises:
        ValueError: as `creme_many`.

    Source: arXiv 2402.14328.

    Examples:
        >>> from mi_hops import Hopland, creme, load_model
        >>> model = load_model("hops-gpt2")
        >>> edit = creme(model, Hopland().sample(train=0, held_out=3)[0])
        >>> edit.layers, edit.settings["strength"]
        ((4, 5), 0.7)
    """
    if isinstance(asked, TwoHopFact | Request):
        return creme_many(model, [asked], layers=layers, **settings)[0]
    return creme_many(model, asked, layers=layers, **settings)


def creme_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: Layers | None = None,
    batch_size: int = 256,
    progress: bool = False,
    **settings: Any,
) -> list[Edit]:
    """CREME edits of many facts, one edit per fact, many per pass; the model is left unchanged.

    Args:
        asked: facts, or requests.
        layers: blocks to edit, in any order, or block -> heads; default the last third
            (`default_layers`).
        batch_size: prompts in one pass (a fact takes two for each template, and those it keeps).
        progress: show a progress bar over facts.
        settings: of `CremeSettings`.

    Returns:
        One `Edit` per fact, in order.

    Raises:
        ValueError: no layers, a layer or a head twice or out of range; prompts that cannot be edited (see
            `Request`), or a bridge unknown to the tokenizer; a covariance of other weights or
            without one of the layers; a singular system; values that are not finite.
        TokenError: a prompt that does not fit the context, or a span that cannot be found.

    Examples:
        >>> from mi_hops import Hopland, creme_many, load_model
        >>> model = load_model("hops-llama")
        >>> edits = creme_many(model, Hopland().sample(train=0, held_out=3)[:2], layers=[5])
        >>> [edit.layers for edit in edits]
        [(5,), (5,)]
    """
    how = CremeSettings(**settings)
    requests = requests_of(asked, how.form, how.keep)
    editable = editable_for(model, layers, how)
    plans = [plan_request(model, request, how) for request in requests]

    def factors(part: tuple[list[int], list[Plan]]) -> list[Any]:
        made = CremeRun(part[1], model, editable, how).changes()
        return [[(c.layer, (c.left, c.right)) for c in each] for each in made]

    chunks = chunk_plans(plans, batch_size)
    parts = each_part(
        model,
        [(members, [plans[i] for i in members]) for members in chunks],
        factors,
        kept=lambda part: (
            "CREME",
            ([requests[i] for i in part[0]], editable.where, how.to_dict()),
        ),
        texts=lambda part: [requests[i].two_hop_prompt for i in part[0]],
    )
    changes: dict[int, list[Change]] = {}
    with progress_bar(total=len(plans), label="CREME edits", show=progress) as bar:
        for (members, _), found in parts:
            for i, each in zip(members, found, strict=True):
                changes[i] = [editable.change(layer, *pair) for layer, pair in each]
            bar.update(len(members))
    return [as_edit(editable, request, changes[i], how) for i, request in enumerate(requests)]


class CremeRepair(EditorRepair):
    """CREME as a repair for `evaluate`: one edit per fact, applied to its rows with hooks.

    Args:
        layers: blocks to edit, or block -> heads; default the last third.
        name: label in tables.
        settings: of `CremeSettings`.

    Raises:
        ValueError: settings that do not exist or do not fit.

    Examples:
        >>> from mi_hops import CremeRepair, Hopland, load_model
        >>> repair = CremeRepair(strength=0.5)
        >>> edits = repair.fit(load_model("hops-gpt2"), Hopland().sample(train=0, held_out=3)[:2])
        >>> repair.name, len(edits)
        ('CREME', 2)
    """

    def __init__(
        self,
        *,
        layers: Layers | None = None,
        name: str = "CREME",
        **settings: Any,
    ) -> None:
        self.settings = CremeSettings(**settings)  # refuses wrong settings here rather than in fit
        super().__init__(creme_many, name=name, layers=layers, **settings)


# -- the pass -------------------------------------------------------------------------------------


def editable_for(model: HookedModel, layers: Layers | None, how: CremeSettings) -> Editable:
    """The W_O of the layers (or of some heads) given, or of the default ones."""
    chosen = default_layers(model) if layers is None else layers
    return check_editable(model, chosen, "W_O", how.covariance, by_head=True)


def as_edit(
    editable: Editable,
    request: Request,
    changes: Sequence[Change],
    how: CremeSettings,
    **more: Any,
) -> Edit:
    """One request's changes as an edit; `more` are settings."""
    settings = {**editable.where, **more, **how.to_dict()}
    return editable.edit("creme", request.to_dict(), changes, settings)


class CremeRun:
    """One pass over the prompts of some facts, making their edits as it goes up.

    Args:
        held: layer -> further inputs of W_O ``[key, d_in]`` at which no edit is to change the output,
            as far as `CremeSettings.slack` lets it.

    Attributes:
        keys: layer -> the inputs that the edits act on and those they keep, ``[key, d_in]``.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        model: HookedModel,
        editable: Editable,
        how: CremeSettings,
        held: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._plans, self._model, self._editable, self._how = plans, model, editable, how
        self._held = held or {}
        self.keys: dict[int, Tensor] = {}
        self._starts = [*accumulate((len(plan.rows) for plan in plans), initial=0)]
        self._found: list[list[Change]] = [[] for _ in plans]
        self._before: list[Tensor] = []

    def changes(self) -> list[list[Change]]:
        """For each fact its changes, lowest layer first."""
        batch = pad([row for plan in self._plans for row in plan.rows])
        hooks: list[Hook] = []
        for layer in self._editable.layers:
            if self._how.match == "residual":
                hooks.append((hook_name("resid_pre", layer), self._keep_stream))
            hooks += matrix_hooks("W_O", layer, self._editor(layer))
        with torch.no_grad():
            capture(self._model, batch.tokens, (), hooks=hooks)
        return self._found

    def _keep_stream(self, x: Tensor) -> None:
        self._before[:] = [x]

    def _editor(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        wide = self._editable.dtype

        def edit(z: Tensor, out: Tensor) -> Tensor:
            # The stream comes from the block below, which may lie on another device.
            stream = out + self._before.pop().to(out.device) if self._before else out
            read = [
                read_plan(plan, start, z, stream)
                for plan, start in zip(self._plans, self._starts, strict=False)
            ]
            stacked = self.keys[layer] = _stacked(read)
            if layer in self._held:
                held = self._held[layer].to(z.device)
                read = [(k, torch.cat([kept, held]), change) for k, kept, change in read]
                stacked = _stacked(read)
            inverse = self._editable.inverse_times(layer, stacked)
            sizes = [len(k) + len(kept) for k, kept, _ in read]
            edited = out.clone()
            for i, part in enumerate(inverse.split(sizes)):
                keys, kept, residual = read[i]
                try:
                    left = solve_keys(
                        keys, kept if len(kept) else None, inverse=part, slack=self._how.slack
                    )
                except SingularError as error:
                    asked = decode(self._model, self._plans[i].rows[0])
                    raise SingularError(f"edit of {asked!r} in layer {layer}: {error}") from None
                change = self._editable.change(layer, left, self._how.strength * residual)
                self._found[i].append(change)
                acts = self._plans[i].edited(self._how.target)
                rows = [row for row, on in enumerate(acts, start=self._starts[i]) if on]
                edited[rows] = (out[rows].to(wide) + change.act(z[rows].to(wide))).to(out.dtype)
            return edited

        return edit


def _stacked(read: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Each fact's keys, then what it keeps."""
    return torch.cat([torch.cat([keys, kept]) for keys, kept, _ in read])
