"""Editing weights: CREME on the attention's output matrix, and the life cycle of an edit."""

from mi_hops.editing.change import Change
from mi_hops.editing.creme import CremeRepair, creme, creme_many
from mi_hops.editing.edit import (
    AppliedError,
    Edit,
    WrongWeightsError,
    applied_edits,
    describe,
    stack,
)
from mi_hops.editing.export import export_hf
from mi_hops.editing.hops import HopRepair, OnTop, hop_requests
from mi_hops.editing.joint import creme_joint, creme_sequential
from mi_hops.editing.moments import Moments, second_moments
from mi_hops.editing.plans import PAPER, CremeSettings, default_layers
from mi_hops.editing.request import Request
from mi_hops.editing.request_files import Requests, load_requests
from mi_hops.editing.rows import EditorRepair, EditRepair, edit_hooks
from mi_hops.editing.search import JointSearch, creme_search
from mi_hops.editing.solve import SingularError

__all__ = [
    "AppliedError",
    "Change",
    "CremeRepair",
    "CremeSettings",
    "Edit",
    "EditRepair",
    "EditorRepair",
    "HopRepair",
    "JointSearch",
    "Moments",
    "OnTop",
    "PAPER",
    "Request",
    "Requests",
    "SingularError",
    "WrongWeightsError",
    "applied_edits",
    "creme",
    "creme_joint",
    "creme_many",
    "creme_search",
    "creme_sequential",
    "default_layers",
    "describe",
    "edit_hooks",
    "export_hf",
    "load_requests",
    "hop_requests",
    "second_moments",
    "stack",
]
