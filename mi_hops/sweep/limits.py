"""How much one call may take at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Resource limits of a sweep; none of them changes a number.

    Args:
        batch_size: prompts (examples, facts, pairs) that share a pass, at most.
        max_rows: intervention rows in one pass, at most; default from `memory`.
        memory: bytes that the activations of a pass may take, estimated; default 1 GiB on a CPU,
            40% of what is free on CUDA. A pass that runs out of memory is halved and run again.
        reuse_prefix: run only the tail behind a prefix that rows share.
        progress: show a bar.

    Raises:
        ValueError: a bound that is not above 0.

    Examples:
        >>> import mi_hops
        >>> mi_hops.Limits(batch_size=4, memory=2**28).reuse_prefix
        True
    """

    batch_size: int = 16
    max_rows: int | None = None
    memory: float | None = None
    reuse_prefix: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_rows", "memory"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} is {bound}; expected more than 0")
