"""The closed form behind every edit here: least change with given outputs at given keys."""

from __future__ import annotations

import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor


class SingularError(ValueError):
    """A system of equations that has no reliable solution."""


def solve_keys(
    keys: Float[Tensor, "key d_in"],
    kept: Float[Tensor, "kept d_in"] | None = None,
    *,
    inverse: Float[Tensor, "both d_in"] | None = None,
    slack: float = 0.0,
    ridge: float = 0.0,
) -> Float[Tensor, "key d_in"]:
    """Left factors L such that ``Δ = L^T R`` is the least change with ``k_i Δ = R_i``.

    Least means of ``tr(Δ^T C Δ)``. With A the keys above the kept ones, G = A C^-1 and
    M = A G^T + diag(ridge, slack) * mean diag(A G^T), L is the first rows of ``M^-1 G``. For one
    key and nothing kept that is ``C^-1 k / (k^T C^-1 k)``, ROME's and CREME's formula; for
    many it is MEMIT's least squares, exact at ``ridge = 0``.

    Args:
        keys: inputs whose output is to change by given amounts.
        kept: inputs whose output is to stay.
        inverse: ``C^-1`` times keys and kept; default C = I. Their parts in a null space, P times
            them, give the least change within it, AlphaEdit's formula.
        slack: 0 holds the kept ones exactly; larger lets them move where that makes the change
            much smaller.
        ridge: the same for the keys: 0 meets them exactly.

    Returns:
        Float64, on the keys' device.

    Raises:
        SingularError: keys that are zero, or that depend on one another (or on kept ones).
    """
    n = len(keys)
    a = (keys if kept is None else torch.cat([keys, kept])).double()
    g = a if inverse is None else inverse.double()
    m = einsum("row d_in, column d_in -> row column", a, g)
    scale = m.diagonal().mean()
    if not torch.isfinite(scale) or scale <= 0:
        raise SingularError(
            "a key is zero or not finite, or has no part in the null space that edits are held to, so "
            "no change of the weight acts on it"
        )
    penalty = torch.full((len(a),), float(slack), dtype=torch.float64, device=a.device)
    penalty[:n] = float(ridge)
    m = m + torch.diag(penalty * scale)
    # Scaled to a unit diagonal, the factor's smallest pivot measures dependence, not size.
    unit = m.diagonal().clamp_min(torch.finfo(m.dtype).tiny).rsqrt()
    factor, info = torch.linalg.cholesky_ex(m * unit[:, None] * unit[None])
    if info or factor.diagonal().min() ** 2 < len(a) * 1e-12:
        rank = int(torch.linalg.matrix_rank(m * unit[:, None] * unit[None], hermitian=True))
        raise SingularError(
            f"the {n} keys and {len(a) - n} kept prompts are not independent (rank {rank} of "
            f"{len(a)}), so they cannot all be met exactly; pass slack > 0 (kept) or ridge > 0 (keys), "
            "edit more layers or fewer facts, or drop duplicates"
        )
    out = torch.cholesky_solve(unit[:, None] * g, factor)
    return (unit[:, None] * out)[:n]
