"""Which activation causes the answer: patching, ablation, tracing, attribution, paths and edges."""

from mi_hops.patching import tasks
from mi_hops.patching.ablation import ablate
from mi_hops.patching.acdc import AcdcRun, acdc
from mi_hops.patching.activation import PatchJob, PatchPlan, patch
from mi_hops.patching.attribution import attribute
from mi_hops.patching.back import back_patch
from mi_hops.patching.circuit import Circuit, extract, faithfulness
from mi_hops.patching.contrast import contrast
from mi_hops.patching.edges import attribute_edges
from mi_hops.patching.heads import attention_to, composition, head_scores, icl_score
from mi_hops.patching.knockout import knockout
from mi_hops.patching.nodes import all_edges
from mi_hops.patching.path import path_patch
from mi_hops.patching.tracing import subject_roles, trace
from mi_hops.patching.verify import Attribution, Verification

__all__ = [
    "AcdcRun",
    "Attribution",
    "Circuit",
    "PatchJob",
    "PatchPlan",
    "Verification",
    "ablate",
    "acdc",
    "all_edges",
    "attention_to",
    "attribute",
    "attribute_edges",
    "back_patch",
    "composition",
    "contrast",
    "extract",
    "faithfulness",
    "head_scores",
    "icl_score",
    "knockout",
    "patch",
    "path_patch",
    "subject_roles",
    "tasks",
    "trace",
]
