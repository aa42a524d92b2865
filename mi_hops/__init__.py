"""Find out how a language model answers a two-hop question, why it fails, and repair it.

"The nationality of the author of *Misery* is ___": the model has to recall the *bridge* (Stephen
King), which never stands in the prompt, and from it the answer. This package asks a TransformerLens
model which such questions fail although both hops are known, where the bridge shows up inside the
model, whether it causes the answer, which modules carry it, and whether a repair holds.

Every name below is loaded when it is first used: ``import mi_hops`` runs nothing and imports neither
torch nor TransformerLens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mi_hops._version import __version__

if TYPE_CHECKING:  # the same names as in _HOME, for type checkers and editors
    from mi_hops.editing import CremeRepair, Edit, creme, second_moments
    from mi_hops.facts.fact import TwoHopFact
    from mi_hops.facts.loaders import load_facts
    from mi_hops.injection.grid import injection_grid
    from mi_hops.injection.memory import MemoryInjection, inject
    from mi_hops.lens.logit import fact_trajectories, logit_lens, plot_map, token_map
    from mi_hops.model import load_model
    from mi_hops.patching import attribute, patch, trace
    from mi_hops.reasoning.erasure import erase_bridge
    from mi_hops.reasoning.evaluate import evaluate
    from mi_hops.reasoning.gap import find_gap
    from mi_hops.reasoning.locate import locate, located_layers
    from mi_hops.reasoning.sequential import evaluate_sequential
    from mi_hops.reasoning.sets import build_sets
    from mi_hops.result.result import Result
    from mi_hops.study import Study, run_study
    from mi_hops.sweep.fanout import fan_out
    from mi_hops.sweep.generate import answered
    from mi_hops.text.tokens import Prompt, encode
    from mi_hops.worlds.hopland import Hopland

_HOME = {
    "CremeRepair": "mi_hops.editing",
    "Edit": "mi_hops.editing",
    "Hopland": "mi_hops.worlds.hopland",
    "MemoryInjection": "mi_hops.injection.memory",
    "Prompt": "mi_hops.text.tokens",
    "Result": "mi_hops.result.result",
    "Study": "mi_hops.study",
    "TwoHopFact": "mi_hops.facts.fact",
    "answered": "mi_hops.sweep.generate",
    "attribute": "mi_hops.patching",
    "build_sets": "mi_hops.reasoning.sets",
    "creme": "mi_hops.editing",
    "encode": "mi_hops.text.tokens",
    "erase_bridge": "mi_hops.reasoning.erasure",
    "evaluate": "mi_hops.reasoning.evaluate",
    "evaluate_sequential": "mi_hops.reasoning.sequential",
    "fact_trajectories": "mi_hops.lens.logit",
    "fan_out": "mi_hops.sweep.fanout",
    "find_gap": "mi_hops.reasoning.gap",
    "inject": "mi_hops.injection.memory",
    "injection_grid": "mi_hops.injection.grid",
    "load_facts": "mi_hops.facts.loaders",
    "load_model": "mi_hops.model",
    "locate": "mi_hops.reasoning.locate",
    "located_layers": "mi_hops.reasoning.locate",
    "logit_lens": "mi_hops.lens.logit",
    "patch": "mi_hops.patching",
    "plot_map": "mi_hops.lens.logit",
    "run_study": "mi_hops.study",
    "second_moments": "mi_hops.editing",
    "token_map": "mi_hops.lens.logit",
    "trace": "mi_hops.patching",
}

__all__ = [
    "CremeRepair",
    "Edit",
    "Hopland",
    "MemoryInjection",
    "Prompt",
    "Result",
    "Study",
    "TwoHopFact",
    "__version__",
    "answered",
    "attribute",
    "build_sets",
    "creme",
    "encode",
    "erase_bridge",
    "evaluate",
    "evaluate_sequential",
    "fact_trajectories",
    "fan_out",
    "find_gap",
    "inject",
    "injection_grid",
    "load_facts",
    "load_model",
    "locate",
    "located_layers",
    "logit_lens",
    "patch",
    "plot_map",
    "run_study",
    "second_moments",
    "token_map",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
