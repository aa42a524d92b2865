"""Which edits are in force on which model, in order, and the weights they replaced.

Each model has a stack. An edit goes on top; only the top one comes off, and its originals are put
back bit for bit. Nothing here keeps a model alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch

from mi_hops.editing.change import Change, live_weight, read_matrix, write_matrix
from mi_hops.model import HookedModel, fingerprint

if TYPE_CHECKING:
    from torch import Tensor


class WrongWeightsError(ValueError):
    """An edit meets weights that it was not made for."""


class AppliedError(ValueError):
    """An edit is applied twice, or undone although it is not the last one applied."""


class Appliable(Protocol):
    """What the stack must know of an edit."""

    @property
    def changes(self) -> Sequence[Change]:
        """One a matrix."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the weights it was made for."""
        ...


@dataclass(frozen=True)
class _Layer:
    edit: Appliable
    before: str  # fingerprint of the weights it was put on
    originals: tuple[Tensor, ...]


_STACKS: WeakKeyDictionary[HookedModel, list[_Layer]] = WeakKeyDictionary()


def applied_edits(model: HookedModel) -> tuple[Appliable, ...]:
    """The edits in force on a model, first applied first."""
    return tuple(layer.edit for layer in _STACKS.get(model, ()))


def check_weights(model: HookedModel, made_for: str, what: str = "the edit was") -> str:
    """Refuse weights that `what` was not made for; gives the present fingerprint.

    Right are the present weights, and those under all edits now applied: edits made for one model
    may be stacked, and an edit made on an edited model goes on top.

    Raises:
        WrongWeightsError: with the fingerprints.
    """
    now = fingerprint(model)
    stack = _STACKS.get(model)
    base = stack[0].before if stack else now
    if made_for not in (now, base):
        under = "" if now == base else f" (under the edits applied: {base})"
        raise WrongWeightsError(
            f"{what} made for weights {made_for}, this model's are {now}{under}; make it anew on "
            "this model, or load the model it was made on with the same dtype and weight processing"
        )
    return now


def put_on(model: HookedModel, edit: Appliable, *, check: bool = True) -> None:
    """Add an edit's changes to the weights; all of them or, on any failure, none.

    Args:
        check: compare fingerprints first (reads all weights once).

    Raises:
        AppliedError: the edit is in force already.
        WrongWeightsError: other weights.
        ValueError: matrices of another shape, or weights that are (or would be) non-finite.
    """
    stack = _STACKS.get(model, [])
    if any(layer.edit is edit for layer in stack):
        raise AppliedError(f"already applied to this model: {edit}; undo it first")
    before = check_weights(model, edit.fingerprint) if check else fingerprint(model)
    for change in edit.changes:
        change.check_fits(model)
    done: list[tuple[Change, Tensor]] = []
    try:
        for change in edit.changes:
            old = read_matrix(model, *change.site)
            done.append((change, old))
            write_matrix(model, *change.site, _sum(old, change))
        originals = tuple(old for _, old in done)
        _STACKS[model] = [*stack, _Layer(edit, before, originals)]
    except BaseException:
        _put_back(model, done, stack)
        raise


def take_off(model: HookedModel, edit: Appliable, *, force: bool = False) -> None:
    """Put the weights back that the last applied edit replaced, bit for bit.

    Once begun it is carried through, even where it is interrupted (and then raises that).

    Args:
        force: put them back even where something else has changed those weights since.

    Raises:
        AppliedError: the edit is not in force, or not the last one applied.
        ValueError: something else has changed the weights since, and `force` is off.
    """
    stack = _STACKS.get(model, [])
    where = [i for i, layer in enumerate(stack) if layer.edit is edit]
    if not where:
        raise AppliedError(f"not applied to this model: {edit}; in force: {describe(model)}")
    if where[0] != len(stack) - 1:
        raise AppliedError(
            f"edits are undone last first; above {edit} lie\n{describe(model, where[0] + 1)}"
        )
    top = stack[-1]
    if not force:
        for change, old in zip(edit.changes, top.originals, strict=True):
            now = live_weight(model, *change.site).detach()
            if not torch.equal(now.reshape(old.shape), _sum(old, change).to(old.dtype)):
                raise ValueError(
                    f"{change} was changed by something else since the edit was applied; undo that "
                    "first, or pass force=True to put back the weights from before the edit"
                )
    _put_back(model, list(zip(edit.changes, top.originals, strict=True)), stack[:-1])


def unwind(model: HookedModel, depth: int) -> None:
    """Undo the edits above the lowest `depth` ones, whatever else happened to those weights.

    After a failure it can be called again and goes on where it stopped.
    """
    for layer in reversed(_STACKS.get(model, [])[depth:]):
        take_off(model, layer.edit, force=True)


def describe(model: HookedModel, start: int = 0) -> str:
    """The edits in force from the `start`-th on, one a line, first applied first."""
    lines = [f"{i}: {layer.edit}" for i, layer in enumerate(_STACKS.get(model, []))]
    return "\n".join(lines[start:]) or "none"


def _sum(old: Tensor, change: Change) -> Tensor:
    """Old weight plus change, in the wider dtype of the two."""
    factors = change.to(old.device, torch.promote_types(old.dtype, change.right.dtype))
    return old.to(factors.right.dtype) + factors.delta()


def _put_back(
    model: HookedModel, originals: Sequence[tuple[Change, Tensor]], stack: list[_Layer]
) -> None:
    """Originals back into the weights, and `stack` as what is in force.

    Copying twice does no harm, so whatever stops it in the midst (an interrupt, a device's error)
    is met by doing all of it once more. Only what fails twice leaves the stack as it was.
    """
    try:
        for change, old in originals:
            _restore(model, change, old)
        _STACKS[model] = stack
    except BaseException:
        with ExitStack() as each:  # every matrix has its turn, whatever becomes of the others
            for change, old in originals:
                each.callback(_restore, model, change, old)
        _STACKS[model] = stack
        raise


def _restore(model: HookedModel, change: Change, old: Tensor) -> None:
    weight = live_weight(model, *change.site)
    weight.data.copy_(old.reshape(weight.shape))
