"""Areas under a faithfulness curve, as the MIB benchmark defines them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mi_hops.result.result import Result

#: Shares of the edges at which MIB measures circuits.
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Areas(NamedTuple):
    """CPR: area under the curve, higher is better. CMD: area between the curve and 1, lower is."""

    cpr: float
    cmd: float


def faithfulness_areas(curve: Result) -> Areas:
    """CPR and CMD of circuits of growing size (Mueller et al. 2025, arXiv 2504.13151).

    Trapezoids over the share of the model's edges, from the smallest circuit to the largest. The
    faithfulness of a circuit is that of the mean scores: (mean score - mean corrupted) / (mean clean -
    mean corrupted). MIB takes the sizes `MIB_SHARES`, up to all edges.

    Args:
        curve: what `faithfulness` gave for circuits of different sizes.

    Raises:
        ValueError: fewer than two sizes, or clean and corrupted runs that score the same.
    """
    if "circuit" not in curve.data.dims or "edges" not in curve.data.coords:
        raise ValueError(
            "expected what faithfulness gave, with an axis circuit; got another result"
        )
    share = curve["score"]["edges"].values / curve.provenance["edges_of_model"]
    order = np.argsort(share, kind="stable")
    share = share[order]
    if len(np.unique(share)) < 2:
        raise ValueError(
            f"got circuits of {len(np.unique(share))} size(s); an area needs 2 or more"
        )
    score = curve["score"].mean("example").values[order]
    clean, corrupted = (float(curve[name].mean()) for name in ("clean", "corrupted"))
    if np.isclose(clean, corrupted, rtol=1e-6):
        raise ValueError(
            f"the clean and the corrupted runs score the same on average ({clean:.4g})"
        )
    from scipy.integrate import trapezoid  # numpy has it under this name from 2.0 on

    found = (score - corrupted) / (clean - corrupted)
    return Areas(float(trapezoid(found, share)), float(trapezoid(np.abs(1 - found), share)))
