"""Scores as the share of the way from one run to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.sweep.metrics import Logits, Metric, Plan, Target


def score_gap(
    clean: Float[Tensor, "*any"], corrupted: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """``clean - corrupted``, to divide by: NaN where the two are equal and a share means nothing.

    Scores count as equal where they differ by rounding alone: by less than 64 units in the last
    place, as the same prompt's do in batches of different sizes.
    """
    gap = clean - corrupted
    rounding = 64 * torch.finfo(gap.dtype).eps * torch.maximum(clean.abs(), corrupted.abs())
    return gap.masked_fill(gap.abs() <= rounding, float("nan"))


def normalised(
    patched: Float[Tensor, "*any"],
    clean: Float[Tensor, "*any"] | float,
    corrupted: Float[Tensor, "*any"] | float,
    *,
    undefined: Literal["raise", "nan"] = "raise",
) -> Float[Tensor, "*any"]:
    """``(patched - corrupted) / (clean - corrupted)``: 0 = corrupted, 1 = restored; any metric.

    The three are broadcast together.

    Args:
        undefined: what to do where clean and corrupted are equal (see `score_gap`): refuse, or
            leave NaN there for the caller to count and leave out.

    Raises:
        ValueError: equal scores under ``"raise"``.
    """
    if undefined not in ("raise", "nan"):
        raise ValueError(f"undefined is {undefined!r}; expected 'raise' or 'nan'")
    high, low = (
        torch.as_tensor(v, device=patched.device, dtype=patched.dtype) for v in (clean, corrupted)
    )
    gap = score_gap(high, low)
    lost = gap.isnan()
    if undefined == "raise" and lost.any():
        raise ValueError(
            f"clean and corrupted scores are equal in {int(lost.sum())} of {lost.numel()} cases, "
            "where the share restored is undefined; leave these out, or pass undefined='nan'"
        )
    return (patched - low) / gap


@dataclass(frozen=True)
class Normalised:
    """Another metric as the share restored: 0 at the corrupted run's score, 1 at the clean run's.

    ``Normalised(METRICS["logit_diff"], clean, corrupted)`` is the normalised logit difference.

    Raises:
        ValueError: clean and corrupted scores that are equal or not finite.
    """

    metric: Metric
    clean: float
    corrupted: float
    unit: str = "share restored"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        gap = self.clean - self.corrupted
        if not gap or not math.isfinite(gap):
            raise ValueError(
                f"metric {self.metric.name!r} is {self.clean} on the clean and {self.corrupted} on "
                "the corrupted run; the share restored needs two different finite scores"
            )

    @property
    def name(self) -> str:
        """``normalised_`` and the metric's own name."""
        return f"normalised_{self.metric.name}"

    def plan(self, target: Target) -> Plan:
        """That of the metric."""
        return self.metric.plan(target)

    def score(self, logits: Logits, target: Target) -> Float[Tensor, "row"]:
        """Share restored, per row."""
        found = self.metric.score(logits, target)
        return (found - self.corrupted) / (self.clean - self.corrupted)
