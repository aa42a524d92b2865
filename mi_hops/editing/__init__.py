"""Editing weights: CREME on the attention's output matrix, its life cycle, and its rivals."""

from mi_hops.editing.applied import AppliedError, WrongWeightsError, applied_edits, describe
from mi_hops.editing.change import Change
from mi_hops.editing.creme import CremeRepair, creme, creme_many
from mi_hops.editing.edit import Edit, stack
from mi_hops.editing.export import export_hf
from mi_hops.editing.joint import creme_joint, creme_sequential
from mi_hops.editing.moments import Moments, SingularError, second_moments
from mi_hops.editing.plans import PAPER, CremeSettings
from mi_hops.editing.request import Request
from mi_hops.editing.rows import EditRepair, edit_hooks

__all__ = [
    "AppliedError",
    "Change",
    "CremeRepair",
    "CremeSettings",
    "Edit",
    "EditRepair",
    "Moments",
    "PAPER",
    "Request",
    "SingularError",
    "WrongWeightsError",
    "applied_edits",
    "creme",
    "creme_joint",
    "creme_many",
    "creme_sequential",
    "describe",
    "edit_hooks",
    "export_hf",
    "second_moments",
    "stack",
]
