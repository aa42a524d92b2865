"""An edit as data: low-rank changes of named matrices, with what they were made for.

The same `Edit` can be added to the weights (and undone bit for bit), switched on by hooks for single
rows of a batch (`mi_hops.editing.rows`), saved, stacked with others and exported.

Each model has a stack of applied edits and of the weights they replaced. An edit goes on top; only
the top one can be undone. Nothing here keeps a model alive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import shorten
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mi_hops.editing.change import Change, merge
from mi_hops.editing.files import json_text, load_tensors, save_tensors
from mi_hops.model import HookedModel, fingerprint, live_matrix, read_matrix, write_matrix

_FORMAT = 1
_KEY = "mi_hops_edit"


class WrongWeightsError(ValueError):
    """The weights are not those that the edit was made for."""


class AppliedError(ValueError):
    """An edit is already applied, or cannot be undone because it is not the last one applied."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Edit:
    """A change of a model's weights, to be applied, saved, stacked or exported.

    Attributes:
        method: what made it, e.g. ``"creme"``.
        changes: one per matrix; factors in float32 or wider.
        fingerprint: of the weights it was made for (`mi_hops.model.fingerprint`).
        processing: how those weights were processed (``"fold"``, ``"centre"``) or ``"none"``.
        request: what it was asked to do; plain JSON types (numpy's numbers become Python's).
        settings: how it was made; the same.

    Raises:
        ValueError: no changes, two of one matrix, or a request or settings that are not JSON.

    Examples:
        >>> from mi_hops import Hopland, creme, load_model
        >>> model = load_model("hops-gpt2")
        >>> edit = creme(model, Hopland().sample(train=0, held_out=3)[0])
        >>> with edit.applied(model):
        ...     inside = edit.is_applied(model)
        >>> inside, edit.is_applied(model)
        (True, False)
    """

    method: str
    changes: tuple[Change, ...]
    fingerprint: str
    processing: str = "none"
    request: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", tuple(self.changes))
        sites = [c.site for c in self.changes]
        if not sites or len(set(sites)) != len(sites):
            raise ValueError(
                f"an edit has one change for each matrix it touches, got {sites}; merge those of "
                "one matrix (mi_hops.editing.change.merge)"
            )
        for name in ("request", "settings"):
            try:
                plain = json.loads(json_text(dict(getattr(self, name)), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} of an edit must be plain JSON types: {error}") from error
            object.__setattr__(self, name, plain)

    def __repr__(self) -> str:
        asked, where, made_for = self._parts()
        return f"<{shorten(self.method, 60)} edit{': ' * bool(asked)}{asked} | {where} | for {made_for}>"

    def _repr_html_(self) -> str:
        names = ("asked", "changes", "made for weights", "size")
        values = (*self._parts(), f"{self.n_bytes:,} bytes")
        rows = "".join(
            f"<tr><th>{n}</th><td>{escape(v)}</td></tr>"
            for n, v in zip(names, values, strict=True)
            if v
        )
        return f"<table><caption>{escape(shorten(self.method, 60))} edit</caption>{rows}</table>"

    def _parts(self) -> tuple[str, str, str]:
        """What was asked, where it changes what, and of which weights; all short."""
        by_matrix: dict[str, list[Change]] = {}
        for change in self.changes:
            by_matrix.setdefault(change.matrix, []).append(change)
        where = "; ".join(
            f"{matrix} of layer{'s' * (len(found) > 1)} "
            f"{shorten(', '.join(str(c.layer) for c in found), 100)}, "
            f"rank {max(c.rank for c in found)}"
            for matrix, found in by_matrix.items()
        )
        asked = " -> ".join(
            repr(shorten(str(self.request[k]), 200))
            for k in ("two_hop_prompt", "target")
            if self.request.get(k)
        )
        for several in ("joint", "stack"):
            if several in self.request:
                asked = f"{several} of {len(self.request[several])}"
        folded = "" if self.processing == "none" else f" (processing {self.processing!r})"
        return asked, where, f"{shorten(self.fingerprint, 80)}{folded}"

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are changed, ascending."""
        return tuple(sorted({c.layer for c in self.changes}))

    @property
    def n_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for c in self.changes for t in c.tensors.values())

    # -- in the weights --------------------------------------------------------------------------

    def apply(self, model: HookedModel, *, check: bool = True) -> None:
        """Add the changes to the weights in place, summed in float32 or wider and cast once.

        All of it happens or none. Several edits can be applied on top of one another.

        Args:
            check: refuse other weights than those the edit was made for (reads all weights once).

        Raises:
            WrongWeightsError: the model has other weights.
            AppliedError: this edit, or one that equals it, is applied already.
            ValueError: matrices of another shape, or weights that are or would be non-finite.
        """
        stack = _STACKS.get(model, [])
        if self.is_applied(model):
            raise AppliedError(f"already applied to this model: {self}; undo it first")
        if equal := [edit for edit in applied_edits(model) if self.equals(edit)]:
            raise AppliedError(
                f"an equal edit is applied to this model already: {equal[0]} (a copy, read from its file "
                "again?); undo that one first, or choose the strength of a single one"
            )
        before = check_weights(model, self.fingerprint) if check else fingerprint(model)
        for change in self.changes:
            change.check_fits(model)
        done: list[tuple[Change, Tensor]] = []
        try:
            for change in self.changes:
                old = read_matrix(model, *change.site)
                done.append((change, old))
                write_matrix(model, *change.site, _sum(old, change))
            originals = tuple(old for _, old in done)
            _STACKS[model] = [*stack, _Applied(self, before, originals)]
        except BaseException:
            _put_back(model, done, stack)
            raise

    def undo(self, model: HookedModel, *, force: bool = False) -> None:
        """Restore the original weights, bit for bit.

        Once begun it is carried through, even where it is interrupted (and then raises that).

        Args:
            force: put them back even where something else has changed those weights since.

        Raises:
            AppliedError: not applied, or not the last edit applied.
            ValueError: something else has changed the weights since, and `force` is off.
        """
        stack = _STACKS.get(model, [])
        if not self.is_applied(model):
            raise AppliedError(f"not applied to this model: {self}; applied: {describe(model)}")
        top = stack[-1]
        if top.edit is not self:
            above = [each.edit for each in stack].index(self) + 1
            raise AppliedError(
                f"edits are undone last first; above {self} are\n{describe(model, above)}"
            )
        replaced = list(zip(self.changes, top.originals, strict=True))
        for change, old in () if force else replaced:
            now = live_matrix(model, *change.site).detach()
            if now.dtype != old.dtype:
                raise ValueError(
                    f"the model was in {old.dtype} when the edit was applied and is in {now.dtype} now, "
                    "where its weights are rounded; put it back first, or pass force=True"
                )
            now = now.reshape(old.shape).to(old.device)  # the model may have been moved
            if not torch.equal(now, _sum(old, change).to(old.dtype)):
                raise ValueError(
                    f"{change} was changed by something else since the edit was applied; undo that "
                    "first, or pass force=True to put back the weights from before the edit"
                )
        _put_back(model, replaced, stack[:-1])

    @contextmanager
    def applied(self, model: HookedModel, *, check: bool = True) -> Iterator[Edit]:
        """Apply the edit within a ``with`` block.

        On leaving, the weights are those from before, bit for bit, whatever happened inside: edits
        that were applied inside and are still there are undone as well.
        """
        depth = len(applied_edits(model))
        # Applying stands inside: an interrupt may come when it has just been done. And an interrupt
        # may stop the first unwinding; the second then finishes it.
        try:
            try:
                self.apply(model, check=check)
                yield self
            finally:
                unwind(model, depth)
        finally:
            unwind(model, depth)

    def is_applied(self, model: HookedModel) -> bool:
        """Whether it is applied to `model`."""
        return any(edit is self for edit in applied_edits(model))

    def equals(self, other: Edit) -> bool:
        """Whether the other one makes the same changes of the same weights."""
        if self.fingerprint != other.fingerprint:
            return False
        mine, theirs = (
            {(c.site, name): t for c in edit.changes for name, t in c.tensors.items()}
            for edit in (self, other)
        )
        return mine.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[key].to(tensor.device)) for key, tensor in mine.items()
        )

    def check(self, model: HookedModel) -> None:
        """Refuse a model with other weights (see `apply`)."""
        check_weights(model, self.fingerprint)
        for change in self.changes:
            change.check_fits(model)

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one ``.safetensors`` file with everything in it; it appears whole or not at all.

        Raises:
            ValueError: another suffix.
            FileExistsError: the file exists, and `overwrite` is off.
            OSError: the folder cannot be written, or the disk is full.
        """
        head = {
            "format": _FORMAT,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "processing": self.processing,
            "sites": [c.site for c in self.changes],
            "request": dict(self.request),
            "settings": dict(self.settings),
        }
        tensors = {
            f"{c.matrix}.{c.layer}.{name}": tensor
            for c in self.changes
            for name, tensor in c.tensors.items()
        }
        return save_tensors(path, _KEY, head, tensors, overwrite)

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> Edit:
        """Read an edit; nothing in the file is executed.

        Args:
            model: refuse the edit here if it was made for other weights (otherwise `apply` does).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an edit, damaged, or of a newer format.
            WrongWeightsError: made for other weights than `model`'s.
        """
        head, tensors = load_tensors(path, _KEY, "an edit")
        try:
            if head.pop("format") != _FORMAT:
                raise ValueError(f"another format; this version reads {_FORMAT}")
            changes = tuple(
                Change(
                    matrix,
                    layer,
                    tensors.get(f"{matrix}.{layer}.left"),
                    tensors[f"{matrix}.{layer}.right"],
                )
                for matrix, layer in head.pop("sites")
            )
            edit = cls(changes=changes, **head)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable edit file: {error!r}") from error
        if model is not None:
            edit.check(model)
        return edit


def stack(edits: Sequence[Edit], *, check: bool = True) -> Edit:
    """Combine edits of the same weights into one: the sum of their changes, cast only once.

    Applied one after the other they would be rounded to the weights' dtype each time.

    Args:
        check: refuse edits made for different weights. Edits made one after the other, each on the
            edited model, are for different weights by nature; their stack is for the first one's.

    Raises:
        ValueError: no edits, or edits for different weights.
    """
    if not edits:
        raise ValueError("no edits to stack")
    first = edits[0]
    wrong = [
        e for e in edits if (e.fingerprint, e.processing) != (first.fingerprint, first.processing)
    ]
    if check and wrong:
        raise ValueError(
            f"the first edit is for weights {first.fingerprint}, {len(wrong)} of {len(edits)} are "
            f"for others ({wrong[0].fingerprint}); edits made one after the other, each on the edited "
            "model, are stacked with stack(edits, check=False)"
        )
    by_site: dict[tuple[str, int], list[Change]] = {}
    for edit in edits:
        for change in edit.changes:
            by_site.setdefault(change.site, []).append(change)
    return Edit(
        method="+".join(dict.fromkeys(e.method for e in edits)),
        changes=tuple(merge(found) for found in by_site.values()),
        fingerprint=first.fingerprint,
        processing=first.processing,
        request={"stack": [dict(e.request) for e in edits]},
        settings={"stack": [dict(e.settings) for e in edits]},
    )


# -- applied edits --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Applied:
    edit: Edit
    before: str  # fingerprint of the weights it was applied to
    originals: tuple[Tensor, ...]


_STACKS: WeakKeyDictionary[HookedModel, list[_Applied]] = WeakKeyDictionary()


def applied_edits(model: HookedModel) -> tuple[Edit, ...]:
    """The edits applied to a model's weights, in order of application."""
    return tuple(each.edit for each in _STACKS.get(model, ()))


def describe(model: HookedModel, start: int = 0) -> str:
    """The applied edits from the `start`-th on, one per line, in order of application."""
    lines = [f"{i}: {edit}" for i, edit in enumerate(applied_edits(model))]
    return "\n".join(lines[start:]) or "none"


def check_weights(model: HookedModel, made_for: str, what: str = "the edit was") -> str:
    """Refuse weights that `what` was not made for; returns the present fingerprint.

    The present weights are right, and those under any edit now applied: edits made for one model,
    edited or not, may be stacked, and an edit made on an edited model goes on top.

    Raises:
        WrongWeightsError: with the fingerprints.
    """
    now = fingerprint(model)
    below = list(dict.fromkeys(each.before for each in _STACKS.get(model, ())))
    if made_for not in (now, *below):
        under = f" (under the edits applied: {', '.join(below)})" if below else ""
        raise WrongWeightsError(
            f"{what} made for weights {made_for}, this model's are {now}{under}; make it again on "
            "this model, or load the model it was made on with the same dtype and weight processing"
        )
    return now


def unwind(model: HookedModel, depth: int) -> None:
    """Undo the edits above the lowest `depth` ones, whatever else happened to those weights.

    After a failure it can be called again and goes on where it stopped.
    """
    for edit in reversed(applied_edits(model)[depth:]):
        edit.undo(model, force=True)


def _sum(old: Tensor, change: Change) -> Tensor:
    """Old weight plus change, in the wider dtype of the two."""
    factors = change.to(old.device, torch.promote_types(old.dtype, change.right.dtype))
    return old.to(factors.right.dtype) + factors.delta()


def _put_back(
    model: HookedModel, originals: Sequence[tuple[Change, Tensor]], stack: list[_Applied]
) -> None:
    """Originals back into the weights, and `stack` as what is applied.

    Copying twice does no harm, so whatever stops it midway (an interrupt, a device's error)
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
    weight = live_matrix(model, *change.site)
    weight.data.copy_(old.reshape(weight.shape))
