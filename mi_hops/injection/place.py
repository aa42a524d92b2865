"""Where in a prompt a memory is added, at which hook point, and in which unit of strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.interventions import Change
from mi_hops.text.tokens import Prompt, TokenError, Where, find_text, last_position, positions

#: ``"all"``: every token of the prompt; ``"everywhere"``: also what follows it, an answer's tokens and
#: generated ones (as published); ``"last"``: the prompt's last token; ``"first hop"``: the last token
#: of the fact's first-hop phrase; else an index, a slice or a substring of the prompt (all tokens
#: that it covers). A list means all of its places together.
Positions = Where | Sequence[Where]

#: Activations of width d_model that a memory can be added to.
Stream = Literal["attn_out", "resid_pre", "resid_mid", "resid_post", "mlp_out"]
STREAMS: tuple[Stream, ...] = get_args(Stream)

#: What to do about a place that a prompt lacks: refuse the prompt, or leave that place out.
Absent = Literal["raise", "leave"]


@dataclass(frozen=True)
class Place:
    """Where a memory is added. Positions alone are accepted too.

    Args:
        positions: see `Positions`.
        kind: the activation it is added to (see `Stream`).
        relative: scale the vector to the activation's norm where it is added, so that strength 1
            means "as long as what is there".

    Raises:
        ValueError: another kind.
    """

    positions: Positions = "everywhere"
    kind: Stream = "attn_out"
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kind not in STREAMS:
            raise ValueError(f"cannot inject at {self.kind!r}; expected one of {list(STREAMS)}")

    @classmethod
    def of(cls, given: PlaceLike) -> Place:
        """A place as it is, or of its positions."""
        return given if isinstance(given, Place) else cls(given)

    @property
    def parts(self) -> list[Where]:
        """The positions one by one."""
        given: Any = self.positions
        single = isinstance(given, str | Integral | slice)
        return [given] if single else list(given)

    @property
    def everywhere(self) -> bool:
        """Whether tokens after the prompt are included."""
        return "everywhere" in self.parts

    def find(
        self, prompt: Prompt, first_hop: str = "", *, absent: Absent = "raise"
    ) -> tuple[int, ...]:
        """The positions within a prompt, in order, each once.

        Raises:
            TokenError: a position, substring or first hop that the prompt does not have, or no
                position at all; with ``absent="leave"`` such places are left out.
        """
        found: set[int] = set()
        for part in self.parts:
            with suppress(TokenError) if absent == "leave" else nullcontext():
                found.update(_find(prompt, part, first_hop))
        if not found and absent == "raise":
            raise TokenError(f"{self.positions!r} names no position")
        return tuple(sorted(found))

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON holds them; `from_json` reads them."""
        plain = [
            {"slice": [p.start, p.stop, p.step]} if isinstance(p, slice) else p for p in self.parts
        ]
        one = isinstance(self.positions, str | Integral | slice)
        return vars(self) | {"positions": plain[0] if one else plain}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Place:
        """The place that `as_json` wrote, from settings that may hold more."""
        given = settings["positions"]
        parts = given if isinstance(given, list) else [given]
        read: list[Where] = [slice(*p["slice"]) if isinstance(p, Mapping) else p for p in parts]
        return cls(read, settings["kind"], settings["relative"])


#: What is accepted where a place is.
PlaceLike = Positions | Place


def _find(prompt: Prompt, part: Where, first_hop: str) -> tuple[int, ...]:
    if part == "everywhere":
        part = "all"
    if part != "first hop":
        return positions(prompt, part)
    if not first_hop:
        raise TokenError(
            "the position 'first hop' needs the phrase; fit the injection to facts, or pass first_hops"
        )
    find_text(prompt.text, first_hop)
    return (last_position(prompt, first_hop),)


# -- adding vectors -------------------------------------------------------------------------------


def scaled(
    vector: Float[Tensor, "*rows d_model"],
    x: Float[Tensor, "*rows d_model"],
    strength: float,
    *,
    relative: bool,
) -> Float[Tensor, "*rows d_model"]:
    """What is added to activations: strength * vector, or strength * |x| * unit vector."""
    wide = wide_dtype(x.dtype)
    vector = vector.to(x.device, wide)
    if relative:
        length = vector.norm(dim=-1, keepdim=True)
        unit = vector / length.clamp_min(torch.finfo(wide).tiny)
        vector = unit * x.to(wide).norm(dim=-1, keepdim=True)
    return (strength * vector).to(x.dtype)


def adding(vector: Float[Tensor, "d_model"], strength: float, *, relative: bool) -> Change:
    """Adds to all of an activation; a change of a fan-out, or a hook."""

    def add(x: Tensor) -> Tensor:
        return x + scaled(vector, x, strength, relative=relative)

    return add


def adding_at(
    vectors: Mapping[tuple[int, int], Float[Tensor, "d_model"]],
    strength: float,
    *,
    relative: bool,
    n_rows: int,
) -> Change:
    """Adds a vector to each (row, position) of ``[row, pos, d_model]``.

    Raises:
        ValueError: from the hook: another number of rows, or fewer positions.
    """
    rows, columns = torch.tensor(list(vectors)).T
    stacked = torch.stack(list(vectors.values()))
    width = int(columns.max()) + 1

    def add(x: Tensor) -> Tensor:
        if len(x) != n_rows or x.shape[1] < width:
            raise ValueError(
                f"the injection was made for {n_rows} prompts, the longest of them injected up to "
                f"token {width}; the model is run on {len(x)} rows of {x.shape[1]} tokens"
            )
        index = (rows.to(x.device), columns.to(x.device))
        out = x.clone()
        out[index] = x[index] + scaled(stacked, x[index], strength, relative=relative)
        return out

    return add
