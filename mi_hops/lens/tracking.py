"""What is read: prompts, the positions in them, and names to follow as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mi_hops.cases import Case, Skipped, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.vectors import Tracked
from mi_hops.model import HookedModel
from mi_hops.sweep.pairs import Text, Texts, as_prompts, one_each
from mi_hops.text.tokens import (
    Prompt,
    TokenError,
    Where,
    answer_ids,
    last_position,
    positions,
)

#: Tokens of a two-hop prompt that are read by name: the last one of its first-hop phrase, the last.
ROLES = ("first hop", "last")

#: One prompt (text, a `Prompt`, token ids ``[pos]`` or ``[1, pos]``), several (a sequence, token ids
#: ``[batch, pos]``), or label -> prompt.
Prompts = Texts | Mapping[str, Text]

#: One name: its text, several spellings of it (the first is the main one), a token id, or several.
Spelling = str | int | Sequence[str] | Sequence[int]

#: Name -> what to follow: a text or token id for all prompts, a spelling for one prompt, or a sequence
#: of spellings for several.
Track = Mapping[str, Spelling | Sequence[Spelling]]

#: Where to read: "last", "each" token by itself (prompts of one length), a position, or role -> a
#: position for all prompts or one for each.
Positions = Where | Mapping[str, Where | Sequence[Where]]


@dataclass(frozen=True)
class Row:
    """One prompt to be read.

    Attributes:
        places: the positions that are read.
        tracked: name -> token ids of its spellings.
    """

    label: str
    prompt: Prompt
    places: Sequence[int]
    tracked: Mapping[str, Sequence[tuple[int, ...]]]


def labelled_prompts(model: HookedModel, given: Prompts) -> tuple[list[str], list[Prompt], bool]:
    """Labels (numbers, unless prompts are given by label), prompts, and whether it is one alone.

    Raises:
        TokenError: no prompt, or one that cannot be encoded.
    """
    labels: list[str] | None = None
    if isinstance(given, Mapping):
        labels, given = list(given), list(given.values())
    known = as_prompts(model, given)
    alone = len(known) == 1 and isinstance(given, str | Prompt | torch.Tensor)
    return labels or [str(i) for i in range(len(known))], known, alone


def spell(model: HookedModel, prompt: Prompt, spelling: Spelling) -> list[tuple[int, ...]]:
    """Token ids of each spelling as a continuation of `prompt`; ids are taken as they are.

    Raises:
        TokenError: an empty name, or ids outside the vocabulary.
    """
    given: Any = spelling
    items: list[Any] = [given] if isinstance(given, str | Integral) else list(given)
    if not items:
        raise TokenError(f"a tracked name has no spelling and no token (prompt {prompt.text!r})")
    if all(isinstance(item, str) for item in items):
        return [answer_ids(model, prompt, str(item)) for item in items]
    ids = tuple(int(item) for item in items)
    wrong = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if wrong:
        raise TokenError(
            f"token id(s) {wrong} are outside the vocabulary 0..{model.cfg.d_vocab - 1}"
        )
    return [ids]


def spell_all(
    model: HookedModel, prompts: Sequence[Prompt], track: Track | None, *, alone: bool
) -> list[dict[str, list[tuple[int, ...]]]]:
    """For each prompt, name -> token ids of its spellings.

    Args:
        alone: `track` was given for one prompt (name -> spelling), not as one spelling per prompt.
    """
    each: dict[str, Sequence[Any]] = {}
    for name, spellings in (track or {}).items():
        given: Any = spellings
        if alone or isinstance(given, str | Integral):  # one for all
            each[name] = [given] * len(prompts)
        elif len(given) != len(prompts):
            raise ValueError(
                f"track[{name!r}] must give one spelling for each of {len(prompts)} prompts, got "
                f"{len(given)} of them"
            )
        else:
            each[name] = given
    return [
        {name: spell(model, prompt, given[i]) for name, given in each.items()}
        for i, prompt in enumerate(prompts)
    ]


def tracked_tokens(rows: Sequence[Mapping[str, Sequence[tuple[int, ...]]]]) -> Tracked | None:
    """Spellings of several rows as padded tensors; None where no name is followed."""
    if not rows[0]:
        return None
    mains = [[spellings[0] for spellings in row.values()] for row in rows]
    starts = [
        [tuple(dict.fromkeys(s[0] for s in spellings)) for spellings in row.values()]
        for row in rows
    ]
    return Tracked(_padded(mains), _padded(starts))


def _padded(rows: Sequence[Sequence[tuple[int, ...]]]) -> Int[Tensor, "row name item"]:
    width = max(len(cell) for row in rows for cell in row)
    return torch.tensor([[[*cell, *[-1] * (width - len(cell))] for cell in row] for row in rows])


def resolve(
    prompts: Sequence[Prompt], where: Positions, *, alone: bool
) -> tuple[list[int | str], list[list[int]]]:
    """Labels of the positions that are read, and the positions themselves in each prompt.

    A position of one prompt may cover several tokens, and all are read, each by itself. Of several
    prompts, and for a role, the last token of what it covers is read.

    Raises:
        TokenError: a position that a prompt does not have.
        ValueError: "all", "each" position of prompts of several lengths, or a role with another
            number of positions than there are prompts.
    """
    if where == "all":
        raise ValueError(
            "'all' means all tokens at once, and a lens reads one at a time; use positions='each'"
        )
    if where == "last":
        where = {"last": -1}
    if where == "each":
        lengths = sorted({len(p) for p in prompts})
        if len(lengths) > 1:
            raise ValueError(
                f"positions='each' needs prompts of one length, these have {lengths} tokens. Name "
                "roles, e.g. {'first hop': [phrase of each prompt], 'last': -1}"
            )
        where, alone = slice(None), True
    if isinstance(where, Mapping):
        if not where:
            raise ValueError("positions names no role; give e.g. {'last': -1}")
        each = [one_each(f"positions[{role!r}]", at, len(prompts)) for role, at in where.items()]
        return list(where), [
            [last_position(prompt, at[i]) for at in each] for i, prompt in enumerate(prompts)
        ]
    if alone:
        found = list(positions(prompts[0], where))
        return list(found), [found] * len(prompts)
    return [str(where)], [[last_position(prompt, where)] for prompt in prompts]


def check_role(role: str) -> None:
    """Refuse a role that is not in `ROLES`, with a ValueError."""
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; expected one of {ROLES}")


def at_role(
    model: HookedModel, facts: Sequence[TwoHopFact], role: str, *, form: str | None, purpose: str
) -> tuple[list[Case], list[int], Skipped]:
    """The facts that can be read at a role, its token in each prompt, and what was skipped.

    Raises:
        ValueError: another role.
        NoUsableFactError: no fact is left.
    """
    check_role(role)
    found, skipped = usable(
        model, facts, lambda case: (case, case.positions(role)[-1]), purpose=purpose, form=form
    )
    return [case for case, _ in found], [at for _, at in found], skipped


def rows_at(
    model: HookedModel, prompts: Prompts, track: Track, position: Where | Sequence[Where]
) -> list[Row]:
    """The prompts, each read at one position, and what is tracked in it."""
    labels, known, alone = labelled_prompts(model, prompts)
    if not track:
        raise ValueError("name something to track, e.g. {'answer': 'American'}")
    _, places = resolve(known, {"here": position}, alone=alone)
    spelled = spell_all(model, known, track, alone=alone)
    return [Row(*row) for row in zip(labels, known, places, spelled, strict=True)]


def first_tokens(rows: Sequence[Row]) -> tuple[Int[Tensor, "row name"], Int[Tensor, "row"]]:
    """The first token of what each row tracks, and the first position at which it is read."""
    tracked = tracked_tokens([row.tracked for row in rows])
    assert tracked is not None  # something is tracked
    return tracked.ids[..., 0], torch.tensor([row.places[0] for row in rows])
