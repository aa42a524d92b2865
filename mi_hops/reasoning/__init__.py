"""Two-hop reasoning: the gap, erasure of the bridge, locating, and scoring repairs and edits of single facts."""

from mi_hops.reasoning.aggregate import aggregate
from mi_hops.reasoning.aloud import Layout, aloud_table, reason_aloud
from mi_hops.reasoning.erasure import erase_bridge
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.failures import FailureTypes, failure_types
from mi_hops.reasoning.gap import Gap, find_gap
from mi_hops.reasoning.generation import fluency, generation_entropy
from mi_hops.reasoning.locate import locate, located_layers
from mi_hops.reasoning.merge import merge
from mi_hops.reasoning.portability import chain_scores, portability_sets
from mi_hops.reasoning.queries import Query, QuerySets
from mi_hops.reasoning.sequential import evaluate_sequential, retention
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.reasoning.wordings import WordingChoice, choose_wordings

__all__ = [
    "Evaluation",
    "FailureTypes",
    "Gap",
    "Known",
    "Layout",
    "Query",
    "QuerySets",
    "WordingChoice",
    "aggregate",
    "aloud_table",
    "build_sets",
    "chain_scores",
    "choose_wordings",
    "erase_bridge",
    "evaluate",
    "evaluate_sequential",
    "failure_types",
    "find_gap",
    "fluency",
    "generation_entropy",
    "locate",
    "located_layers",
    "portability_sets",
    "merge",
    "retention",
    "reason_aloud",
]
