"""Two-hop reasoning: the gap, erasure of the bridge, locating, and scoring repairs and edits of single facts."""

from .aggregate import aggregate as aggregate
from .aloud import Layout as Layout
from .aloud import aloud_table as aloud_table
from .aloud import reason_aloud as reason_aloud
from .erasure import erase_bridge as erase_bridge
from .evaluate import evaluate as evaluate
from .evaluation import Evaluation as Evaluation
from .failures import FailureTypes as FailureTypes
from .failures import failure_types as failure_types
from .gap import Gap as Gap
from .gap import find_gap as find_gap
from .generation import fluency as fluency
from .generation import generation_entropy as generation_entropy
from .locate import locate as locate
from .locate import located_layers as located_layers
from .merge import merge as merge
from .portability import chain_scores as chain_scores
from .portability import portability_sets as portability_sets
from .queries import Query as Query
from .queries import QuerySets as QuerySets
from .sequential import evaluate_sequential as evaluate_sequential
from .sequential import retention as retention
from .sets import Known as Known
from .sets import build_sets as build_sets
from .wordings import WordingChoice as WordingChoice
from .wordings import choose_wordings as choose_wordings
