"""Two-hop facts from TwoHopFact (Yang et al. 2024, arXiv 2402.16837) and SOCRATES (arXiv 2411.16679).

Both are tables, one row per chain e1 -> e2 -> e3, whose columns name a function of the entities:
``r1(e1).prompt`` asks for the bridge, ``r2(e2).prompt`` about the bridge, ``r2(r1(e1)).prompt`` is the
two-hop prompt. The first-hop phrase is the part of the two-hop prompt that stands where
``r2(e2).prompt`` names the bridge.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.phrases import counterpart, form_of
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    Facts,
    OnError,
    RowFixes,
    collect,
    refuse_same,
)
from mi_hops.facts.tables import (
    UNNAMED_RELATIONS,
    WHITE_SPACE,
    find,
    frame_rows,
    open_table,
    refuse_named,
    require_columns,
)

if TYPE_CHECKING:
    import pandas as pd

#: The column by which such a table is recognised.
TWO_HOP = "r2(r1(e1)).prompt"
_NEEDED = (TWO_HOP, "r1(e1).prompt", "r2(e2).prompt", "e2.value", "e3.value")
_KEPT = ("fact_comp_type", "category", "r2(r1(e1')).prompt", "mu.template")


def load_two_hop_fact(table: str | Path | pd.DataFrame, *, on_error: OnError = "raise") -> Facts:
    """Facts from a table in TwoHopFact's or SOCRATES's layout.

    Read are ``r1(e1).prompt``, ``r2(e2).prompt``, ``r2(r1(e1)).prompt``, ``e2.value`` and ``e3.value``,
    which must be there, and where they are ``uid``, ``e1.value``, ``r1.category``, ``r2.category``
    (or ``r1.template_id``, ``r2.template_id``), ``e2.aliases`` and ``e3.aliases`` (or
    ``minimal_aliases``; a list of names, or of lists of names, as Python writes it).

    The form of a fact's prompts is ``"question"`` where they end in a question mark, ``"prefix"``
    where the first hop begins the prompt, ``"suffix"`` otherwise; all three prompts are of one form.

    Dropped and reported: a bridge that equals the answer, is not in ``r2(e2).prompt`` or is in the two-hop
    prompt; prompts that differ in more than the bridge's description, so that the first hop cannot be
    told. Repaired and reported: white space at the end of a prompt.

    Args:
        table: a CSV or ``.tsv`` file, or a frame already loaded.
        on_error: what to do with a row that lacks a value or whose aliases cannot be read:
            "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not a table of this layout; a malformed row.

    Examples:
        >>> import pandas as pd
        >>> from mi_hops.facts import load_two_hop_fact
        >>> row = {"e1.value": "Ran", "e2.value": "Akira Kurosawa", "e3.value": "Tokyo",
        ...     "r1(e1).prompt": "The director of Ran is",
        ...     "r2(e2).prompt": "The birthplace of Akira Kurosawa is",
        ...     "r2(r1(e1)).prompt": "The birthplace of the director of Ran is"}
        >>> load_two_hop_fact(pd.DataFrame([row]))[0].first_hop
        'the director of Ran'
    """
    frame, name, stem = open_table(table)
    require_columns(frame, _NEEDED, source=name)

    def build(row: int, cells: Mapping[str, Any], fixes: RowFixes) -> TwoHopFact:
        return _fact(row, cells, stem, fixes)

    return collect(frame_rows(frame), build, source=name, on_error=on_error)


def _fact(row: int, cells: Mapping[str, Any], stem: str, fixes: RowFixes) -> TwoHopFact:
    for column in _NEEDED:
        if not isinstance(cells[column], str) or not cells[column].strip():
            raise BadRow("empty cell", f"{column} is {cells[column]!r:.80}; expected a text")
    asked, first, second = (
        fixes.changed(WHITE_SPACE, column, cells[column], cells[column].strip())
        for column in _NEEDED[:3]
    )
    bridge, answer = cells["e2.value"].strip(), cells["e3.value"].strip()
    refuse_same(bridge, answer)
    refuse_named(bridge, asked)
    named = find(bridge, second)
    if named is None:
        raise DropRow("bridge not in second-hop prompt", f"{bridge!r} is not in {second!r}")
    span = counterpart(asked, second, named)
    if span is None:
        raise DropRow(
            "first hop cannot be identified", f"{asked!r} and {second!r} differ elsewhere too"
        )
    form, phrase = form_of(asked, span), asked[slice(*span)]
    relation1, relation2 = (
        _first(cells, f"{r}.category", f"{r}.template_id") or unnamed
        for r, unnamed in zip(("r1", "r2"), UNNAMED_RELATIONS, strict=True)
    )
    return TwoHopFact(
        id=_first(cells, "uid") or f"{stem}-{row}",
        subject=_first(cells, "e1.value") or phrase,
        relation1=relation1,
        bridge=bridge,
        relation2=relation2,
        answer=answer,
        first_hop=phrase,
        prompts={form: asked},
        first_prompts={form: first},
        second_prompts={form: second},
        bridge_aliases=_aliases(cells, "e2", bridge),
        answer_aliases=_aliases(cells, "e3", answer),
        meta={"dataset": "two_hop_fact", "row": row}
        | {name: text for name in _KEPT if (text := _first(cells, name))},
    )


def _first(cells: Mapping[str, Any], *columns: str) -> str:
    """The text of the first of the columns that has one."""
    for column in columns:
        value = cells.get(column)
        if isinstance(value, str | int) and str(value).strip():
            return str(value).strip()
    return ""


def _aliases(cells: Mapping[str, Any], entity: str, name: str) -> tuple[str, ...]:
    """Every other name of an entity, each once."""
    for column in (f"{entity}.aliases", f"{entity}.minimal_aliases"):
        if (value := cells.get(column)) is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, str):
            text = value
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = ast.literal_eval(text)
            if isinstance(value, str):
                raise BadRow(
                    "unreadable aliases", f"{column} is {text!r:.80}; expected a list of names"
                )
        if isinstance(value, float):  # a frame's empty cell
            continue
        return tuple(dict.fromkeys(a for a in _flat(value, column) if a and a != name))
    return ()


def _flat(value: Any, column: str) -> Iterable[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Iterable):
        for part in value:
            yield from _flat(part, column)
    else:
        raise BadRow("unreadable aliases", f"{column} holds {value!r:.80}; expected names")
