"""The steps of a study, each an object in a file of its own, in the order they run in.

A new step is a file beside these and a place in `STEPS`.
"""

from __future__ import annotations

from mi_hops.study.step import Step
from mi_hops.study.steps.editing import Editing
from mi_hops.study.steps.erasure import Erasure
from mi_hops.study.steps.failures import Failures
from mi_hops.study.steps.gap import GapStep
from mi_hops.study.steps.injection import Injection
from mi_hops.study.steps.lens import Lens
from mi_hops.study.steps.locate import Locate

STEPS: tuple[Step, ...] = (
    GapStep(),
    Failures(),
    Lens(),
    Erasure(),
    Locate(),
    Injection(),
    Editing(),
)
