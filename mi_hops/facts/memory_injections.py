"""The prompt sets of *Memory Injections* (Sakarvadia et al. 2023, arXiv 2309.05605), as CSV files.

Two sets share one layout: a handwritten one, and one made from 2WikiMultiHop (2WMH) that adds the
two facts behind each question. Each row pairs an *obscure* prompt, which describes an entity, with
an *explicit* prompt, which names it; both end right before the answer.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.phrases import counterpart, form_of
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    Facts,
    FactsFileError,
    OnError,
    RowFixes,
    collect,
    refuse_same,
    triple,
)
from mi_hops.facts.tables import (
    UNNAMED_RELATIONS,
    WHITE_SPACE,
    find,
    frame_rows,
    read_frame,
    refuse_named,
    require_columns,
)
from mi_hops.facts.templates import capitalise, doubled_article

#: The names that the two prompts' columns have had in the published files.
SENTENCE_COLUMNS = (
    ("explicit_sentence", "obscure_sentence"),
    ("explicit_sent", "obscure_sent"),
)
ENTITY_COLUMNS = ("explicit_entity", "obscure_entity", "answer")
FACT_COLUMNS = ("fact1", "fact2")


@dataclass(frozen=True)
class _Row:
    """The cells of one row under the same names for every variant of the file."""

    explicit: str
    obscure: str
    bridge: str
    phrase: str
    answer: str


def load_memory_injections(
    path: str | Path, *, strict_reference: bool = False, on_error: OnError = "raise"
) -> Facts:
    """Facts from a memory-injection CSV, handwritten or 2WMH, with either naming of its columns.

    The explicit entity (the *memory*) is the bridge, the obscure entity is the first-hop phrase,
    taken as it appears in the prompt. The obscure prompt is a two-hop prompt of form "prefix" where
    that phrase opens it and "suffix" elsewhere; the explicit prompt is the second-hop prompt of the
    same form. The files have no first-hop prompt: it is made here as "{First-hop phrase} is". 2WMH
    rows get subject and relations from ``fact1`` and ``fact2``; elsewhere the subject is the phrase
    and the relations are called "first hop" and "second hop". Ids are ``{file name}-{row}``.

    Repaired, each with a note:

    * stray and doubled white space in any cell;
    * an article doubled before the phrase ("The the publisher of");
    * a bridge that differs from its prompt's spelling in accents only: the prompt's is taken, the
      other becomes an alias;
    * a phrase that is not literally in the obscure prompt: what is there in the place that the
      bridge has in the explicit prompt is taken, if the two prompts agree in all the rest;
    * the bridge's name in ``fact1``, or the answer's in ``fact2``, where it differs: an alias.

    Dropped: an empty cell, a bridge that equals the answer or appears in the two-hop prompt, a
    bridge or phrase that no rule finds in its prompt.

    Args:
        path: the CSV file.
        strict_reference: keep every row as published, to compare with published numbers. Only what
            a `TwoHopFact` cannot hold is changed (white space at the end of a prompt, as in row 103 of
            the handwritten file) or dropped
            (bridge equals answer, an empty cell); there are no aliases and no first-hop prompts,
            and a phrase need not appear in its prompt.
        on_error: what to do with a row whose ``fact1`` or ``fact2`` is not a list of three texts:
            "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not a CSV file of these columns, or a malformed row.
    """
    frame = read_frame(path)
    found = [str(c) for c in frame.columns]
    sentences = next((s for s in SENTENCE_COLUMNS if set(s) <= set(found)), None)
    if sentences is None:
        either = " or ".join(str(list(names)) for names in SENTENCE_COLUMNS)
        hint = "A table of other columns is read with columns={field: column}"
        if len(found) == 1 and ";" in found[0]:
            hint = "Its columns are separated by semicolons; write them with commas"
        raise FactsFileError(f"{path}: expected the columns {either}; it has {found}. {hint}")
    require_columns(frame, ENTITY_COLUMNS, source=str(path))
    has_facts = set(FACT_COLUMNS) <= set(found)
    stem = Path(path).stem

    def build(row: int, cells: Mapping[str, Any], fixes: RowFixes) -> TwoHopFact:
        names = (*sentences, *ENTITY_COLUMNS)
        raw = _Row(*(cells[name] for name in names))
        if empty := [name for name in names if not cells[name].strip()]:
            raise DropRow("empty cell", f"nothing in {empty}")
        refuse_same(raw.bridge, raw.answer)
        triples = [_triple(cells[name], name) for name in FACT_COLUMNS] if has_facts else None
        fields = _as_published(raw, fixes) if strict_reference else _repaired(raw, triples, fixes)
        subject, relation1, relation2 = fields["first_hop"], *UNNAMED_RELATIONS
        if triples is not None:
            (subject, relation1, _), (_, relation2, _) = triples
        return TwoHopFact(
            id=f"{stem}-{row}",
            subject=subject,
            relation1=relation1,
            relation2=relation2,
            meta={"dataset": "memory_injections", "row": row},
            **fields,
        )

    return collect(frame_rows(frame), build, source=str(path), on_error=on_error)


def _as_published(raw: _Row, fixes: RowFixes) -> dict[str, Any]:
    obscure = fixes.changed(WHITE_SPACE, "obscure prompt", raw.obscure, raw.obscure.rstrip())
    explicit = fixes.changed(WHITE_SPACE, "explicit prompt", raw.explicit, raw.explicit.rstrip())
    form = form_of(obscure, find(raw.phrase.strip(), obscure))
    return {
        "bridge": raw.bridge,
        "answer": raw.answer,
        "first_hop": raw.phrase,
        "prompts": {form: obscure},
        "second_prompts": {form: explicit},
    }


def _repaired(
    raw: _Row, triples: list[tuple[str, str, str]] | None, fixes: RowFixes
) -> dict[str, Any]:
    row = _Row(
        **{
            name: fixes.changed(WHITE_SPACE, name, text, " ".join(text.split()))
            for name, text in vars(raw).items()
        }
    )
    explicit, bridge, bridge_aliases = row.explicit, row.bridge, []
    named = find(bridge, explicit)
    if named is None:
        named = find(bridge, explicit, fold_accents=True)
        if named is None:
            raise DropRow("bridge not in explicit prompt", f"{bridge!r} in {explicit!r}")
        bridge_aliases.append(bridge)
        spelt = explicit[slice(*named)]
        bridge = fixes.changed("bridge respelt as in its prompt", "bridge", bridge, spelt)

    obscure = row.obscure
    span = find(row.phrase, obscure)
    if span is None:
        span = counterpart(obscure, explicit, named)
        if span is None:
            raise DropRow("first hop not in its prompt", f"{row.phrase!r} in {obscure!r}")
        fixes.changed(
            "first hop taken from its prompt", "phrase", row.phrase, obscure[slice(*span)]
        )
    phrase = obscure[slice(*span)]
    before, after = obscure[: span[0]], obscure[span[1] :]
    if doubled_article(before, phrase):
        before = before[: -len("the ")]
        phrase = phrase if before else capitalise(phrase)
        obscure = fixes.changed("doubled article", "obscure", obscure, before + phrase + after)
        span = (len(before), len(before) + len(phrase))
    refuse_named(bridge, obscure)

    answer_aliases: list[str] = []
    if triples is not None:
        _alias(bridge, triples[0][2], bridge_aliases, "bridge", fixes)
        _alias(row.answer, triples[1][2], answer_aliases, "answer", fixes)
    form = form_of(obscure, span)
    return {
        "bridge": bridge,
        "answer": row.answer,
        "first_hop": phrase,
        "prompts": {form: obscure},
        "first_prompts": {form: capitalise(phrase) + " is"},
        "second_prompts": {form: explicit},
        "bridge_aliases": tuple(bridge_aliases),
        "answer_aliases": tuple(answer_aliases),
    }


def _alias(name: str, other: str, aliases: list[str], what: str, fixes: RowFixes) -> None:
    other = " ".join(other.split())
    if other and other != name and other not in aliases:
        aliases.append(other)
        fixes.note(f"{what} alias from the row's facts", f"{what} {name!r} is also {other!r}")


def _triple(cell: str, column: str) -> tuple[str, str, str]:
    """``[subject, relation, object]`` from a cell written as a Python or JSON list."""
    for parse in (ast.literal_eval, json.loads):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            first, relation, last = (" ".join(part.split()) for part in triple(parse(cell)))
            return first, relation, last
    raise BadRow(
        "unreadable fact", f"{column} is {cell!r}; expected a list [subject, relation, object]"
    )
