"""Which activation causes the answer: patching, ablation, tracing, attribution, paths and edges."""

from mi_hops.patching import tasks
from mi_hops.patching.ablation import ablate
from mi_hops.patching.acdc import AcdcRun, acdc
from mi_hops.patching.activation import PatchJob, PatchPlan, patch
from mi_hops.patching.areas import MIB_SHARES, Areas, faithfulness_areas
from mi_hops.patching.attribution import attribute
from mi_hops.patching.attribution_graph import AttributionGraph, load_attribution_graph
from mi_hops.patching.back import back_patch
from mi_hops.patching.circuit import Circuit, extract, faithfulness
from mi_hops.patching.circuit_figure import circuit_figure
from mi_hops.patching.circuit_files import load_eap_ig, save_eap_ig
from mi_hops.patching.contrast import contrast
from mi_hops.patching.edges import attribute_edges
from mi_hops.patching.heads import attention_to, composition, head_scores, icl_score
from mi_hops.patching.inputs import attribute_inputs
from mi_hops.patching.knockout import knockout
from mi_hops.patching.nodes import all_edges
from mi_hops.patching.path import path_patch
from mi_hops.patching.tracing import subject_roles, trace
from mi_hops.patching.verify import Attribution, Verification

__all__ = [
    "AcdcRun",
    "Areas",
    "Attribution",
    "AttributionGraph",
    "Circuit",
    "MIB_SHARES",
    "PatchJob",
    "PatchPlan",
    "Verification",
    "ablate",
    "acdc",
    "all_edges",
    "attention_to",
    "attribute",
    "attribute_edges",
    "attribute_inputs",
    "back_patch",
    "circuit_figure",
    "composition",
    "contrast",
    "extract",
    "faithfulness",
    "faithfulness_areas",
    "head_scores",
    "icl_score",
    "knockout",
    "load_attribution_graph",
    "load_eap_ig",
    "patch",
    "path_patch",
    "save_eap_ig",
    "subject_roles",
    "tasks",
    "trace",
]
