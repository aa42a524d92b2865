"""CREME: make the attention of a two-hop prompt write what it writes for the second hop alone.

For each edited layer, with k the input of W_O (z, all heads) and a the attention output at the last
token of the two-hop prompt, both averaged over context templates, and v* the attention output at the
last token of the second-hop prompt (the *guide*)::

    W_O <- W_O + (C^-1 k / k^T C^-1 k) (v* - a)^T

so that the edited layer maps k to v*. Layers go in ascending order, each seeing the changes below.
C is the second moment of z over text; C = I gives the published code's edit (arXiv 2402.14328).
Attention biases cancel in ``v* - a``.

An edit at layer l changes only what comes after it, so one forward pass over all prompts yields the
whole edit: at each edited block the change is made from this pass's own z and attention outputs and
added to them, at every position of every row, as the edited weight would, before the pass goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.change import Change, input_hook, output_hook
from mi_hops.editing.checks import check_editable, check_layers
from mi_hops.editing.edit import Edit
from mi_hops.editing.passes import run_blocks
from mi_hops.editing.plans import CremeSettings, Plan, chunk_plans, plan_request, read_plan
from mi_hops.editing.request import Request, requests_of
from mi_hops.editing.rows import edit_hooks
from mi_hops.editing.solve import inverse_times, solve_keys
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, dtype_of, hook_name, processing_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.repair import Rows
from mi_hops.text.tokens import pad

if TYPE_CHECKING:
    from torch import Tensor


def creme(
    model: HookedModel, asked: TwoHopFact | Request, *, layers: Sequence[int], **settings: Any
) -> Edit:
    """The CREME edit of one fact, from one forward pass; the model is left as it is.

    Args:
        asked: a fact, or the prompts themselves.
        layers: blocks to edit.
        settings: see `CremeSettings`.

    Returns:
        An `Edit` with one key and one change a layer (more where the whole answer is covered).

    Raises:
        ValueError: as `creme_many`.
    """
    return creme_many(model, [asked], layers=layers, **settings)[0]


def creme_many(
    model: HookedModel,
    asked: Iterable[TwoHopFact | Request],
    *,
    layers: Sequence[int],
    batch_size: int = 256,
    progress: bool = False,
    **settings: Any,
) -> list[Edit]:
    """CREME edits of many facts, each for itself, many in one pass; the model is left as it is.

    Args:
        asked: facts, or requests.
        layers: blocks to edit, in any order.
        batch_size: prompts in one pass (a fact takes two for each template, and those it keeps).
        progress: show a progress bar over facts.
        settings: see `CremeSettings`.

    Returns:
        One `Edit` a fact, in order.

    Raises:
        ValueError: no layers, a layer twice or out of range; prompts that cannot be edited (see
            `Request`), or a bridge unknown to the tokenizer; processed weights without
            ``processed=True``; a covariance of other weights or without one of the layers; a
            singular system; values that are not finite.
        TokenError: a prompt that does not fit the context, or a span that cannot be found.
    """
    how = CremeSettings(**settings)
    requests = requests_of(asked, how.form, how.keep)
    chosen = check_layers(model, layers)
    fingerprint_of_weights = check_editable(model, how.covariance, chosen, processed=how.processed)
    plans = [plan_request(model, request, how) for request in requests]
    edits: list[Edit | None] = [None] * len(plans)
    with progress_bar(total=len(plans), label="CREME edits", show=progress) as bar:
        for members in chunk_plans(plans, batch_size):
            run = CremeRun([plans[i] for i in members], model, chosen, how)
            for i, changes in zip(members, run.changes(), strict=True):
                edits[i] = as_edit(model, requests[i], changes, fingerprint_of_weights, how)
            bar.update(len(members))
    return [e for e in edits if e is not None]


class CremeRepair:
    """CREME as a `mi_hops.sweep.repair.Repair`: one edit a fact, put on its rows by hooks.

    Args:
        layers: blocks to edit.
        name: label in tables.
        settings: see `CremeSettings`.
    """

    def __init__(self, *, layers: Sequence[int], name: str = "CREME", **settings: Any) -> None:
        CremeSettings(**settings)  # refuse wrong settings here rather than in fit
        self.layers, self._name, self._settings = tuple(layers), name, settings

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    @property
    def strength(self) -> float:
        """Share of the change that is made."""
        return CremeSettings(**self._settings).strength

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Edit]:
        """One edit a fact."""
        return creme_many(model, facts, layers=self.layers, **self._settings)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own edit."""
        return edit_hooks(model, states)


# -- the pass -------------------------------------------------------------------------------------


def as_edit(
    model: HookedModel,
    request: Request,
    changes: Sequence[Change],
    fingerprint_of_weights: str,
    how: CremeSettings,
    **more: Any,
) -> Edit:
    """One request's changes as an edit of weights with that fingerprint; `more` are settings."""
    return Edit(
        method="creme",
        changes=tuple(changes),
        fingerprint=fingerprint_of_weights,
        processing=processing_of(model),
        request=request.to_dict(),
        settings={"layers": [change.layer for change in changes], **more, **how.to_dict()},
    )


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
        layers: Sequence[int],
        how: CremeSettings,
        held: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._plans, self._model, self._layers, self._how = plans, model, layers, how
        self._held = held or {}
        self.keys: dict[int, Tensor] = {}
        self._wide = wide_dtype(dtype_of(model))
        self._starts = [0]
        for plan in plans:
            self._starts.append(self._starts[-1] + len(plan.rows))
        self._found: list[list[Change]] = [[] for _ in plans]
        self._z: list[Tensor] = []
        self._before: list[Tensor] = []

    def changes(self) -> list[list[Change]]:
        """For each fact its changes, lowest layer first."""
        batch = pad([row for plan in self._plans for row in plan.rows])
        hooks: list[Hook] = []
        for layer in self._layers:
            if self._how.match == "residual":
                hooks.append((hook_name("resid_pre", layer), self._keep_stream))
            hooks.append((input_hook("W_O", layer), self._keep_z))
            hooks.append((output_hook("W_O", layer), self._editor(layer)))
        run_blocks(self._model, batch.tokens, self._layers[-1], hooks)
        return self._found

    def _keep_z(self, z: Tensor) -> None:
        self._z[:] = [z.flatten(2)]

    def _keep_stream(self, x: Tensor) -> None:
        self._before[:] = [x]

    def _editor(self, layer: int) -> Any:
        def edit(out: Tensor) -> Tensor:
            z = self._z.pop()
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
            inverse = inverse_times(self._how.covariance, layer, stacked)
            sizes = [len(k) + len(kept) for k, kept, _ in read]
            edited = out.clone()
            for i, part in enumerate(inverse.split(sizes)):
                keys, kept, residual = read[i]
                left = solve_keys(
                    keys, kept if len(kept) else None, inverse=part, slack=self._how.slack
                )
                right = (self._how.strength * residual).to(self._wide)
                change = Change("W_O", layer, left.to(self._wide), right)
                self._found[i].append(change)
                rows = self._touched(i)
                edited[rows] = (out[rows].to(self._wide) + change.act(z[rows].to(self._wide))).to(
                    out.dtype
                )
            return edited

        return edit

    def _touched(self, i: int) -> list[int]:
        """Rows of fact i that its changes act on."""
        on = self._plans[i].edited(self._how.target)
        return [self._starts[i] + j for j, yes in enumerate(on) if yes]


def _stacked(read: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Each fact's keys, then what it keeps."""
    return torch.cat([torch.cat([keys, kept]) for keys, kept, _ in read])
