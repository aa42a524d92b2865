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
    Greedy,
    Metric,
    Normalised,
    Target,
    get_metric,
    target_of,
)
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.sweep.scoring import score_prompts

__all__ = [
    "KL",
    "METRICS",
    "Answered",
    "Change",
    "FanOut",
    "Generation",
    "Greedy",
    "Intervention",
    "Limits",
    "Metric",
    "Normalised",
    "Repair",
    "Rows",
    "Site",
    "Target",
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
    "scale",
    "score_prompts",
    "target_of",
]
