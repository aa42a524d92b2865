"""Names to follow through a lens: their spellings as tokens, and roles as positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.lens.reading import Tracked
from mi_hops.model import HookedModel
from mi_hops.text.tokens import (
    Prompt,
    TokenError,
    Where,
    answer_ids,
    encode,
    last_position,
    positions,
)

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

#: Tokens of a two-hop prompt that are read by name: the last one of its first-hop phrase, the last.
ROLES = ("first hop", "last")

#: One name: its text, several spellings of it (the first is the main one), or token ids.
Spelling = str | Sequence[str] | Sequence[int]

#: Where to read: "last", "all" (one prompt only), a position of one prompt, or role -> a position
#: for all prompts or one for each.
Positions = Where | Mapping[str, Where | Sequence[Where]]


def spell(model: HookedModel, prompt: Prompt, spelling: Spelling) -> list[tuple[int, ...]]:
    """Token ids of each spelling as a continuation of `prompt`; ids are taken as they are.

    Raises:
        TokenError: an empty name, or ids outside the vocabulary.
    """
    if isinstance(spelling, str):
        return [answer_ids(model, prompt, spelling)]
    items = list(spelling)
    if not items:
        raise TokenError(f"a tracked name has no spelling and no token (prompt {prompt.text!r})")
    if all(isinstance(item, str) for item in items):
        return [answer_ids(model, prompt, str(item)) for item in items]
    ids = tuple(int(str(item)) for item in items)
    wrong = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if wrong:
        raise TokenError(
            f"token id(s) {wrong} are outside the vocabulary 0..{model.cfg.d_vocab - 1}"
        )
    return [ids]


def spell_all(
    model: HookedModel,
    prompts: Sequence[Prompt],
    track: Mapping[str, Spelling | Sequence[Spelling]],
    *,
    single: bool,
) -> list[dict[str, list[tuple[int, ...]]]]:
    """For each prompt, name -> token ids of its spellings.

    Args:
        single: `track` was given for one prompt (name -> spelling), not as one spelling a prompt.

    Raises:
        TokenError: see `spell`.
        ValueError: a name with another number of spellings than there are prompts.
    """
    for name, given in track.items():
        if not single and (isinstance(given, str) or len(given) != len(prompts)):
            got = repr(given) if isinstance(given, str) else f"{len(given)} of them"
            raise ValueError(
                f"track[{name!r}] must give one spelling for each of {len(prompts)} prompts, got {got}"
            )
    return [
        {
            name: spell(model, prompt, given if single else given[i])  # type: ignore[arg-type]
            for name, given in track.items()
        }
        for i, prompt in enumerate(prompts)
    ]


def tracked_tokens(rows: Sequence[Mapping[str, Sequence[tuple[int, ...]]]]) -> Tracked:
    """Spellings of several rows as padded tensors."""
    mains = [[spellings[0] for spellings in row.values()] for row in rows]
    starts = [
        [tuple(dict.fromkeys(s[0] for s in spellings)) for spellings in row.values()]
        for row in rows
    ]
    return Tracked(_padded(mains), _padded(starts))


def _padded(rows: Sequence[Sequence[tuple[int, ...]]]) -> Int[Tensor, "row name item"]:
    n_names = len(rows[0]) if rows else 0
    width = max((len(cell) for row in rows for cell in row), default=1)
    out = torch.full((len(rows), n_names, width), -1, dtype=torch.long)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            out[i, j, : len(cell)] = torch.tensor(cell)
    return out


def resolve(
    prompts: Sequence[Prompt], where: Positions, *, single: bool
) -> tuple[list[str] | None, list[list[int]]]:
    """Positions of each prompt, and the names of their roles (None where they are just tokens).

    One prompt: a position may cover several tokens, and all are read. Several prompts: each role is
    one token, the last of what it covers.

    Raises:
        TokenError: a position that a prompt has not got.
        ValueError: "all" positions of several prompts, or a role with another number of positions
            than there are prompts.
    """
    if isinstance(where, Mapping):
        for role, given in where.items():
            if _is_sequence(given) and len(given) != len(prompts):  # type: ignore[arg-type]
                raise ValueError(
                    f"positions[{role!r}] gives {len(given)} positions "  # type: ignore[arg-type]
                    f"for {len(prompts)} prompts; give one for all, or one each"
                )
        if not where:
            raise ValueError("positions names no role; give e.g. {'last': -1}")
        places = [
            [last_position(p, _of(given, i)) for given in where.values()]
            for i, p in enumerate(prompts)
        ]
        return list(where), places
    if isinstance(where, str) and where == "last":
        return ["last"], [[prompt.last] for prompt in prompts]
    if single:
        whole = isinstance(where, str) and where == "all"
        return None, [list(positions(prompts[0], slice(None) if whole else where))]
    if isinstance(where, str) and where == "all":
        raise ValueError(
            "positions='all' needs one prompt: those of several do not correspond. Name roles, e.g. "
            "{'first hop': [phrase of each prompt], 'last': -1}"
        )
    name = where if isinstance(where, str) else str(where)
    return [name], [[last_position(prompt, where)] for prompt in prompts]


@dataclass(frozen=True)
class AtRole:
    """Facts that can be read at a role, and those that cannot.

    Attributes:
        facts, prompts, places: one each: the fact, its two-hop prompt, the role's token in it.
        skipped: (id, reason) of the others.
    """

    facts: list[TwoHopFact]
    prompts: list[Prompt]
    places: list[int]
    skipped: list[tuple[str, str]]


def at_role(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    role: str,
    *,
    form: str | None,
    what: str,
    names: Sequence[str] = (),
) -> AtRole:
    """The two-hop prompts of facts, and where in each a role is.

    Args:
        role: one of `ROLES`.
        form: form of the prompt; default each fact's first.
        what: what is to read them, for the error.
        names: fields of a fact (``"bridge"``, ``"answer"``) that must continue its prompt.

    Raises:
        ValueError: another role.
        NoUsableFactError: no fact is left.
    """
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; expected one of {ROLES}")
    found = AtRole([], [], [], [])
    for fact in facts:
        try:
            prompt = encode(model, fact.prompt(form))
            place = prompt.last if role == "last" else last_position(prompt, fact.first_hop)
            for name in names:
                answer_ids(model, prompt, getattr(fact, name))
        except ValueError as error:
            found.skipped.append((fact.id, str(error)))
            continue
        found.facts.append(fact)
        found.prompts.append(prompt)
        found.places.append(place)
    if not found.facts:
        raise NoUsableFactError(what, found.skipped)
    return found


def _is_sequence(given: object) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _of(given: Where | Sequence[Where], i: int) -> Where:
    return given[i] if _is_sequence(given) else given  # type: ignore[index, return-value]
