"""Edits as hooks: a different edit in every row of a batch, with no weight touched.

At the matrix's input hook the activation is remembered, at its output hook ``x left^T right`` is
added at every position of the row, which is what the edited weight would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mi_hops.editing.change import Change, matrix_hooks, merge
from mi_hops.editing.edit import AppliedError, Edit, applied_edits
from mi_hops.editing.request import Asked
from mi_hops.model import Hook, HookedModel
from mi_hops.model.plain import RowChanges
from mi_hops.sweep.repair import RowHooks, Rows

#: The edit of one row: none, one, or several at once.
RowEdit = Edit | Sequence[Edit] | None

# Changes up to this rank are padded to one rank and multiplied in one batched product.
_BATCHED_RANK = 8


def edit_hooks(
    model: HookedModel, edits: Sequence[RowEdit], *, check: bool = False
) -> list[tuple[Any, Any]]:
    """Hooks for a forward pass that applies ``edits[r]`` to row r.

    Equal to the weight form up to rounding; sums are made in the wider dtype of factors (float32
    at least) and model. Rows without an edit pass through bit for bit. TransformerLens takes the
    hooks as they are, in ``model.run_with_hooks(tokens, fwd_hooks=...)`` and ``model.hooks(...)``.

    Args:
        edits: one per row; None leaves the row alone, a sequence puts several edits on it.
        check: compare the model's fingerprint with every edit's.

    Raises:
        ValueError: changes that do not fit the model; with `check`, edits for other weights.

    Examples:
        >>> from mi_hops import Hopland, creme, load_model
        >>> from mi_hops.editing import edit_hooks
        >>> model = load_model("hops-gpt2")
        >>> fact = Hopland().sample(train=0, held_out=3)[0]
        >>> hooks = edit_hooks(model, [creme(model, fact)])
        >>> logits = model.run_with_hooks(model.to_tokens(fact.prompt()), fwd_hooks=hooks)
    """
    by_site: dict[tuple[str, int], dict[int, list[Change]]] = {}
    seen: set[int] = set()
    first: dict[tuple[int, ...], int] = {}
    alike = []
    for row, item in enumerate(edits):
        alike.append(first.setdefault(tuple(map(id, edits_of(item))), row))
        for edit in edits_of(item):
            if id(edit) not in seen:
                seen.add(id(edit))
                if check:
                    edit.check(model)
                for change in edit.changes:
                    change.check_fits(model)
            for change in edit.changes:
                by_site.setdefault(change.site, {}).setdefault(row, []).append(change)
    acts = {
        site: _row_changes(rows, len(edits))
        for site, rows in sorted(by_site.items(), key=lambda item: item[0][1])
    }
    hooks = [hook for site, act in acts.items() for hook in matrix_hooks(*site, act)]
    return RowHooks(hooks, RowChanges(acts, alike))


def require_not_applied(model: HookedModel, edits: Sequence[Edit]) -> None:
    """Refuse edits that hooks would put on weights which have them already.

    Raises:
        AppliedError: with the first such edit.
    """
    applied = applied_edits(model)
    for edit in {id(edit): edit for edit in edits}.values():
        if any(edit.equals(other) for other in applied):
            raise AppliedError(
                f"{edit} is applied to the model's weights, and scoring it would add it once more; "
                "undo it first"
            )


def edits_of(item: RowEdit) -> tuple[Edit, ...]:
    """The edits of one row."""
    if item is None:
        return ()
    return (item,) if isinstance(item, Edit) else tuple(item)


def _row_changes(rows: dict[int, list[Change]], n_rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What one matrix's output becomes when each row is under its own changes."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, changes in rows.items():
        groups.setdefault(tuple(map(id, changes)), []).append(row)
    found = [(merge(rows[where[0]]), where) for where in groups.values()]
    small = [
        (c.left, c.right, where)
        for c, where in found
        if c.left is not None and c.rank <= _BATCHED_RANK
    ]
    batched = _batched(small) if len(small) > 1 else None
    whole = [
        (c, where)
        for c, where in found
        if batched is None or c.left is None or c.rank > _BATCHED_RANK
    ]

    def act(x: Tensor, out: Tensor) -> Tensor:
        if out.shape[0] != n_rows:
            raise ValueError(f"edits were given for {n_rows} rows, the pass has {out.shape[0]}")
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

    return act


def _batched(
    small: list[tuple[Tensor, Tensor, list[int]]],
) -> tuple[list[int], Float[Tensor, "row rank d_in"], Float[Tensor, "row rank d_out"]]:
    """Rows, and their factors padded with zeros to one rank."""
    wide = reduce(torch.promote_types, (right.dtype for _, right, _ in small), torch.float32)
    rows = [row for _, _, where in small for row in where]
    lefts = [left.to(wide) for left, _, where in small for _ in where]
    rights = [right.to(wide) for _, right, where in small for _ in where]
    return rows, pad_sequence(lefts, batch_first=True), pad_sequence(rights, batch_first=True)


# -- repairs --------------------------------------------------------------------------------------


class EditorRepair:
    """An editor as a `mi_hops.sweep.repair.Repair`: one edit per fact, applied to its rows with hooks.

    Args:
        editor: makes the edits: ``editor(model, facts, **options)``, one per fact.
        name: label in tables.
        options: for the editor.

    Examples:
        >>> from mi_hops import Hopland, load_model
        >>> from mi_hops.editing import EditorRepair
        >>> from mi_hops.editing.baselines import rome_many
        >>> repair = EditorRepair(rome_many, name="ROME", layer=2, steps=2)
        >>> edits = repair.fit(load_model("hops-gpt2"), Hopland().sample(train=0, held_out=3)[:2])
        >>> len(edits)
        2
    """

    def __init__(
        self, editor: Callable[..., Sequence[RowEdit]], *, name: str, **options: Any
    ) -> None:
        self._editor, self.name, self.options = editor, name, options

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={str(v)[:60]}" for k, v in self.options.items())
        return f"{type(self).__name__}({self.name!r}{', ' * bool(given)}{given})"

    def fit(self, model: HookedModel, facts: Sequence[Asked]) -> list[RowEdit]:
        """One edit per fact (or request), as the editor makes it."""
        return list(self._editor(model, facts, **self.options))

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own edit."""
        return edit_hooks(model, states)


class EditRepair(EditorRepair):
    """Existing edits as a repair.

    Args:
        edits: one edit for every fact, or fact id -> the edit(s) of its rows; facts that are not
            named are left alone.
        name: label in tables.
    """

    def __init__(self, edits: Edit | Mapping[str, RowEdit], *, name: str = "edit") -> None:
        super().__init__(self._given, name=name)
        self._edits = edits

    def _given(self, model: HookedModel, facts: Sequence[Asked]) -> list[RowEdit]:
        """The edits given; nothing is made.

        Raises:
            WrongWeightsError: edits for other weights.
            AppliedError: one of them is applied to the weights.
        """
        given = self._edits
        states = [given if isinstance(given, Edit) else given.get(f.id) for f in facts]
        require_not_applied(model, [edit for state in states for edit in edits_of(state)])
        # Of edits made one after the other only the first is for the model's own weights.
        bottom = {id(found[0]): found[0] for found in map(edits_of, states) if found}
        for edit in bottom.values():
            edit.check(model)
        return states
