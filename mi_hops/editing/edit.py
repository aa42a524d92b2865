"""An edit as data: low-rank changes of named matrices, with what they were made for.

The same `Edit` can be added to the weights (and taken off again bit for bit), switched on by hooks
for single rows of a batch (`mi_hops.editing.rows`), saved, stacked with others and exported.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops.editing.applied import (
    applied_edits,
    check_weights,
    put_on,
    take_off,
    unwind,
)
from mi_hops.editing.change import Change, merge
from mi_hops.model import HookedModel

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = 1
_KEY = "mi_hops_edit"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Edit:
    """A change of a model's weights that has not happened yet.

    Attributes:
        method: what made it, e.g. ``"creme"``.
        changes: one a matrix; factors in float32 or wider.
        fingerprint: of the weights it was made for (`mi_hops.model.fingerprint`).
        processing: whether those weights were processed (``"fold"``) or not (``"none"``).
        request: what it was asked to do; plain JSON types.
        settings: how it was made; plain JSON types.

    Raises:
        ValueError: no changes, two of one matrix, or a request or settings that are not JSON.
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
                plain = json.loads(json.dumps(dict(getattr(self, name)), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} of an edit must be plain JSON types: {error}") from error
            object.__setattr__(self, name, plain)

    def __repr__(self) -> str:
        by_matrix: dict[str, list[Change]] = {}
        for change in self.changes:
            by_matrix.setdefault(change.matrix, []).append(change)
        where = "; ".join(
            f"{matrix} of layer{'s' * (len(found) > 1)} {', '.join(str(c.layer) for c in found)}, "
            f"rank {max(c.rank for c in found)}"
            for matrix, found in by_matrix.items()
        )
        asked = " -> ".join(
            repr(self.request[k]) for k in ("composite", "target") if self.request.get(k)
        )
        return f"<{self.method} edit{': ' * bool(asked)}{asked} | {where} | for {self.fingerprint}>"

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are touched, ascending."""
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
            AppliedError: this edit is in force already.
            ValueError: matrices of another shape, or weights that are or would be non-finite.
        """
        put_on(model, self, check=check)

    def undo(self, model: HookedModel, *, force: bool = False) -> None:
        """Put the replaced weights back, bit for bit.

        Raises:
            AppliedError: not in force, or not the last edit applied.
            ValueError: something else has changed the weights since (`force` puts back anyway).
        """
        take_off(model, self, force=force)

    @contextmanager
    def applied(self, model: HookedModel, *, check: bool = True) -> Iterator[Edit]:
        """The edit in force for the length of a ``with`` block.

        On leaving, the weights are those from before, bit for bit, whatever happened inside: edits
        that were applied inside and are still there come off as well.
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
        """Whether it is in force on `model`."""
        return any(edit is self for edit in applied_edits(model))

    def check(self, model: HookedModel) -> None:
        """Refuse a model with other weights (see `apply`)."""
        check_weights(model, self.fingerprint)
        for change in self.changes:
            change.check_fits(model)

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with everything in it.

        The file appears whole or not at all, and an older one of that name stays until then.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        from safetensors.torch import save

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
            f"{c.matrix}.{c.layer}.{name}": tensor.detach().cpu().contiguous()
            for c in self.changes
            for name, tensor in c.tensors.items()
        }
        return write_whole(Path(path), save(tensors, {_KEY: json.dumps(head)}))

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
        head, tensors = _read(Path(path))
        try:
            if head["format"] != _FORMAT:
                raise ValueError(f"format {head['format']}; this version reads {_FORMAT}")
            changes = tuple(
                Change(
                    matrix,
                    layer,
                    tensors.get(f"{matrix}.{layer}.left"),
                    tensors[f"{matrix}.{layer}.right"],
                )
                for matrix, layer in head["sites"]
            )
            edit = cls(
                method=head["method"],
                changes=changes,
                fingerprint=head["fingerprint"],
                processing=head["processing"],
                request=head["request"],
                settings=head["settings"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no edit that can be read: {error!r}") from error
        if model is not None:
            edit.check(model)
        return edit


def stack(edits: Sequence[Edit], *, check: bool = True) -> Edit:
    """Edits of the same weights as one edit: the sum of their changes, cast only once.

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
            f"for others ({wrong[0].fingerprint}); make them on one model, or pass check=False"
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


# -- files ----------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file that is there whole or not at all; an older one stays until then.

    Raises:
        OSError: with the file's name, and nothing left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, for os.replace is atomic within one file system only.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None:  # a full disk is told without a name
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # gone already where all went well
            partial.unlink()
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no such edit: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})[_KEY])
            return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no edit (a safetensors file with the key {_KEY!r}): {error}"
        ) from error
