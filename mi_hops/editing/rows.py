"""Edits as hooks: a different edit in every row of a batch, with no weight touched.

At the matrix's input hook the activation is remembered, at its output hook ``x left^T right`` is
added at every position of the row, which is what the edited weight would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.applied import AppliedError, applied_edits
from mi_hops.editing.change import Change, input_hook, merge, output_hook
from mi_hops.editing.edit import Edit
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel
from mi_hops.sweep.repair import Rows

if TYPE_CHECKING:
    from torch import Tensor

#: What a row is under: nothing, an edit, or several at once.
RowEdit = Edit | Sequence[Edit] | None

# Changes up to this rank are padded to one rank and multiplied in one batched product.
_BATCHED_RANK = 8


def edit_hooks(model: HookedModel, edits: Sequence[RowEdit], *, check: bool = False) -> list[Hook]:
    """Hooks for a forward pass whose row r is under ``edits[r]``.

    Equal to the weight form up to rounding; sums are made in the wider dtype of factors (float32
    at least) and model. Rows without an edit pass through bit for bit.

    Args:
        edits: one a row; None leaves the row alone, a sequence puts several edits on it.
        check: compare the model's fingerprint with every edit's.

    Raises:
        ValueError: changes that do not fit the model; with `check`, edits for other weights.
    """
    by_site: dict[tuple[str, int], dict[int, list[Change]]] = {}
    seen: set[int] = set()
    for row, item in enumerate(edits):
        for edit in _edits_of(item):
            if id(edit) not in seen:
                seen.add(id(edit))
                if check:
                    edit.check(model)
                for change in edit.changes:
                    change.check_fits(model)
            for change in edit.changes:
                by_site.setdefault(change.site, {}).setdefault(row, []).append(change)
    hooks: list[Hook] = []
    for (matrix, layer), rows in sorted(by_site.items(), key=lambda item: item[0][1]):
        keep, add = _site_hooks(rows, len(edits))
        hooks += [(input_hook(matrix, layer), keep), (output_hook(matrix, layer), add)]
    return hooks


def require_not_applied(model: HookedModel, edits: Sequence[Edit]) -> None:
    """Refuse edits that hooks would put on weights which have them already.

    Raises:
        AppliedError: with the first such edit.
    """
    force = {id(edit) for edit in applied_edits(model)}
    for edit in edits:
        if id(edit) in force:
            raise AppliedError(
                f"{edit} is in force in the model's weights, and scoring it would put it on once more; "
                "undo it first"
            )


def _edits_of(item: RowEdit) -> tuple[Edit, ...]:
    if item is None:
        return ()
    return (item,) if isinstance(item, Edit) else tuple(item)


def _site_hooks(rows: dict[int, list[Change]], n_rows: int) -> tuple[Any, Any]:
    merged: dict[tuple[int, ...], Change] = {}
    groups: dict[int, tuple[Change, list[int]]] = {}
    for row, changes in rows.items():
        key = tuple(id(c) for c in changes)
        change = merged.setdefault(key, merge(changes))
        groups.setdefault(id(change), (change, []))[1].append(row)
    small = [
        (c.left, c.right, where)
        for c, where in groups.values()
        if c.left is not None and c.rank <= _BATCHED_RANK
    ]
    if len(small) < 2:
        small = []
    taken = {row for _, _, where in small for row in where}
    whole = [(c, where) for c, where in groups.values() if where[0] not in taken]
    batched = _batched(small) if small else None
    inputs: list[Tensor] = []

    def keep(x: Tensor) -> None:
        inputs[:] = [x]

    def add(out: Tensor) -> Tensor:
        x = inputs.pop()
        if out.shape[0] != n_rows:
            raise ValueError(f"edits were given for {n_rows} rows, the pass has {out.shape[0]}")
        x = x.reshape(*out.shape[:2], -1)
        changed = out.clone()
        for change, where in whole:
            at = where if len(where) < n_rows else slice(None)
            factors = change.to(x.device, torch.promote_types(out.dtype, change.right.dtype))
            wide = factors.right.dtype
            changed[at] = (out[at].to(wide) + factors.act(x[at].to(wide))).to(out.dtype)
        if batched is not None:
            where, left, right = batched
            wide = torch.promote_types(out.dtype, left.dtype)
            left, right = left.to(x.device, wide), right.to(x.device, wide)
            part = (x[where].to(wide) @ left.mT) @ right
            changed[where] = (out[where].to(wide) + part).to(out.dtype)
        return changed

    return keep, add


def _batched(small: list[tuple[Tensor, Tensor, list[int]]]) -> tuple[list[int], Tensor, Tensor]:
    """Rows, and their factors ``[row, rank, d]`` padded with zeros to one rank."""
    rank = max(right.shape[0] for _, right, _ in small)
    wide = torch.float32
    for _, right, _ in small:
        wide = torch.promote_types(wide, right.dtype)
    rows = [r for _, _, where in small for r in where]
    first_left, first_right, _ = small[0]
    lefts = first_left.new_zeros(len(rows), rank, first_left.shape[1], dtype=wide)
    rights = first_right.new_zeros(len(rows), rank, first_right.shape[1], dtype=wide)
    at = 0
    for left, right, where in small:
        lefts[at : at + len(where), : left.shape[0]] = left
        rights[at : at + len(where), : right.shape[0]] = right
        at += len(where)
    return rows, lefts, rights


class EditRepair:
    """Edits that are there already as a `mi_hops.sweep.repair.Repair`.

    Args:
        edits: one edit for every fact, or fact id -> what its rows are under; facts that are not
            named are left alone.
        name: label in tables.
    """

    def __init__(self, edits: Edit | Mapping[str, RowEdit], *, name: str = "edit") -> None:
        self._edits, self._name = edits, name

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[RowEdit]:
        """The edits given; nothing is made.

        Raises:
            WrongWeightsError: edits for other weights.
            AppliedError: one of them is in force in the weights.
        """
        given = self._edits
        states = [given if isinstance(given, Edit) else given.get(f.id) for f in facts]
        require_not_applied(model, [edit for state in states for edit in _edits_of(state)])
        # Of edits made one after the other only the first is for the model's own weights.
        bottom = {id(found[0]): found[0] for found in map(_edits_of, states) if found}
        for edit in bottom.values():
            edit.check(model)
        return states

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its edits."""
        return edit_hooks(model, states)
