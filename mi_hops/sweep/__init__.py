"""Interventions on many prompts in few forward passes, and the scores of every row."""

from mi_hops.sweep.fanout import FanOut, fan_out, plan_fan_out
from mi_hops.sweep.generate import Answered, Generation, answered, end_ids, generate
from mi_hops.sweep.interventions import (
    Change,
    Intervention,
    Site,
    ablate,
    add,
    noise,
    replace,
    scale,
)
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import (
    KL,
    METRICS,
    FullLogits,
    Greedy,
    Metric,
    Target,
    get_metric,
    target_of,
)
from mi_hops.sweep.normalising import Normalised
from mi_hops.sweep.pairs import Pairs
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.sweep.sample import sample
from mi_hops.sweep.scoring import score_prompts
from mi_hops.sweep.sites import Direction, Kind, Sites
from mi_hops.sweep.spread import TaskError, spread

__all__ = [
    "KL",
    "METRICS",
    "Answered",
    "Change",
    "Direction",
    "FanOut",
    "FullLogits",
    "Generation",
    "Greedy",
    "Intervention",
    "Kind",
    "Limits",
    "Metric",
    "Normalised",
    "Pairs",
    "Repair",
    "Rows",
    "Site",
    "Sites",
    "Target",
    "TaskError",
    "ablate",
    "add",
    "answered",
    "end_ids",
    "fan_out",
    "generate",
    "get_metric",
    "noise",
    "plan_fan_out",
    "replace",
    "sample",
    "scale",
    "score_prompts",
    "spread",
    "target_of",
]
