"""The steps of a study, each an object in a file of its own, in the order they run in.

A new step is a file beside these and a place in `STEPS`.
"""

from __future__ import annotations

from mi_hops.study.folder import Folder
from mi_hops.study.step import Step
from mi_hops.study.steps.back_patching import BackPatching
from mi_hops.study.steps.editing import Editing
from mi_hops.study.steps.erasure import Erasure
from mi_hops.study.steps.failures import Failures
from mi_hops.study.steps.gap import GapStep
from mi_hops.study.steps.injection import Injection, InjectionGrid
from mi_hops.study.steps.knockout import Knockout
from mi_hops.study.steps.lens import Lens
from mi_hops.study.steps.locate import Locate
from mi_hops.study.steps.tuned import Tuned
from mi_hops.study.steps.wordings import Wordings

STEPS: tuple[Step, ...] = (
    Wordings(),
    GapStep(),
    Failures(),
    Lens(),
    Tuned(),
    Erasure(),
    Locate(),
    Knockout(),
    BackPatching(),
    InjectionGrid(),
    Injection(),
    Editing(),
)


def steps_of(study: Folder) -> list[Step]:
    """The steps that a study has."""
    return [step for step in STEPS if step.name in study.settings["steps"]]
