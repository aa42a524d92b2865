"""Facts from files: our own JSONL, and `load_facts`, which picks the loader for a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.geo import BUNDLED, load_geo
from mi_hops.facts.hops import Hop
from mi_hops.facts.hotpot import load_hotpot
from mi_hops.facts.memory_injections import load_memory_injections
from mi_hops.facts.mquake import load_mquake
from mi_hops.facts.musique import load_musique
from mi_hops.facts.reading import (
    BadRow,
    Facts,
    FactsFileError,
    OnError,
    RowFixes,
    collect,
    existing_file,
    line_object,
    not_utf8,
    read_lines,
    refuse_same,
)
from mi_hops.facts.tables import LISTS, PROMPTS, Columns, has_fields, load_table, read_frame
from mi_hops.facts.templates import Wording
from mi_hops.facts.twohopfact import TWO_HOP, load_two_hop_fact
from mi_hops.result.files import replacing

if TYPE_CHECKING:
    import pandas as pd

#: How a file of facts is read.
Format = Literal[
    "geo",
    "hotpotqa",
    "jsonl",
    "memory_injections",
    "mquake",
    "musique",
    "table",
    "two_hop_fact",
]

_LINE_START = 200

# Fields that open a record of these sets, and no other's.
_HOTPOT = ('"_id"', '"supporting_facts"')
_MUSIQUE = ('"paragraphs"', '"question_decomposition"')

#: Name -> file of the bundled facts.
BUNDLED_FACTS: Mapping[str, Path] = {
    "geo": BUNDLED,
    "hopland": BUNDLED.with_name("hopland.jsonl"),
}


def load_jsonl(path: str | Path, *, on_error: OnError = "raise") -> Facts:
    """Facts from a file of one JSON object per line, as `save_jsonl` writes it.

    Args:
        path: the file; blank lines are skipped.
        on_error: what to do with a line that is not a fact: "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: broken JSON, a missing, unknown or wrongly typed field, a bridge that equals
            its answer, an id used twice; the message names the line, from 1.
    """
    path = existing_file(path)
    return collect(read_lines(path), _from_line, source=str(path), on_error=on_error)


def _from_line(row: int, line: str, fixes: RowFixes) -> TwoHopFact:
    record = line_object(line)
    _check_types(record)
    if {"bridge", "answer"} <= set(record):
        try:
            refuse_same(record["bridge"], record["answer"])
        except BadRow as error:  # in a file of our own such a fact is a mistake, not a find
            raise BadRow(error.reason, str(error)) from error
    return TwoHopFact.from_dict(record)


def _check_types(record: Mapping[str, Any]) -> None:
    """JSON has types of its own; a list where a text belongs would pass for a name later."""
    for name, value in record.items():
        if name in PROMPTS or name == "meta":
            good = isinstance(value, dict) and (
                name == "meta" or all(isinstance(v, str) for v in value.values())
            )
            kind = "an object" if name == "meta" else "an object of form -> text"
        elif name in LISTS:
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
            kind = "a list of texts"
        elif name == "chain":
            good = isinstance(value, list) and all(map(_is_hop, value))
            kind = "a list of hops, objects with the fields of a Hop"
        elif name in TwoHopFact.__dataclass_fields__:
            good, kind = isinstance(value, str), "a text"
        else:
            continue  # an unknown name; `from_dict` lists the known ones
        if not good:
            raise BadRow("field of another type", f"{name} is {value!r:.80}; expected {kind}")


def _is_hop(value: Any) -> bool:
    """Whether a value of JSON has the fields of a `Hop`, and their types."""
    kinds = {"prompts": dict, "aliases": list}
    return (
        isinstance(value, dict)
        and {"relation", "object"} <= set(value) <= set(Hop.__dataclass_fields__)
        and all(isinstance(part, kinds.get(name, str)) for name, part in value.items())
        and all(isinstance(t, str) for t in value.get("prompts", {}).values())
        and all(isinstance(t, str) for t in value.get("aliases", ()))
    )


def save_jsonl(facts: Iterable[TwoHopFact], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write facts to a JSONL file, one object per line, all or nothing.

    Args:
        path: the file, its name ending in ``.jsonl``.
        overwrite: replace a file that exists; otherwise it is refused.

    Returns:
        The path written.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: another suffix, an id used twice, or a fact that would not come back as it is
            (an empty subject or relation, a value in ``meta`` that JSON cannot hold). An existing
            file is kept.

    Examples:
        >>> import mi_hops, tempfile
        >>> facts = mi_hops.load_facts("hopland")[:3]
        >>> path = mi_hops.save_jsonl(facts, f"{tempfile.mkdtemp()}/three.jsonl")
        >>> list(mi_hops.load_facts(path)) == list(facts)
        True
    """
    seen: set[str] = set()
    with (
        replacing(path, suffix=".jsonl", overwrite=overwrite) as partial,
        partial.open("x", encoding="utf-8", newline="\n") as out,
    ):
        for fact in facts:
            if fact.id in seen:
                raise ValueError(f"two facts have the id {fact.id!r}; ids must be unique")
            seen.add(fact.id)
            out.write(_to_line(fact))
    return Path(path)


def _to_line(fact: TwoHopFact) -> str:
    record = fact.to_dict()
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
        same = TwoHopFact.from_dict(json.loads(line)).to_dict() == record
    except (TypeError, ValueError) as error:
        raise ValueError(f"fact {fact.id!r} cannot be written as JSON: {error}") from error
    if not same:
        raise ValueError(
            f"fact {fact.id!r} would not come back from JSON as it is; keys must be texts"
        )
    return line + "\n"


#: Format -> its loader, and the options that are its own.
_LOADERS: Mapping[str, tuple[Callable[..., Facts], tuple[str, ...]]] = {
    "geo": (load_geo, ()),
    "hotpotqa": (load_hotpot, ()),
    "jsonl": (load_jsonl, ()),
    "memory_injections": (load_memory_injections, ("strict_reference",)),
    "mquake": (load_mquake, ("templates", "wordings")),
    "musique": (load_musique, ()),
    "table": (load_table, ("columns", "separator")),
    "two_hop_fact": (load_two_hop_fact, ()),
}
#: Those that read data frames, too.
_OF_FRAMES = ("table", "two_hop_fact")


def load_facts(
    facts: str | Path | pd.DataFrame,
    *,
    format: Format | None = None,
    on_error: OnError = "raise",
    columns: Columns | None = None,
    separator: str | None = None,
    templates: str | Path | None = None,
    wordings: Mapping[str, Wording] | None = None,
    strict_reference: bool = False,
) -> Facts:
    """Facts from a data frame, from a file of any known format, or the bundled ones.

    Args:
        facts: a data frame, a file, or the name of bundled facts: ``"hopland"`` (a made-up world)
            or ``"geo"`` (geography and chemistry; see `load_geo`).
        format: "jsonl" (our own), "geo" (gzipped JSON with wordings), "memory_injections" (CSV),
            "mquake" (JSON), "musique" (JSON Lines), "hotpotqa" (JSON, 2WikiMultiHopQA too),
            "two_hop_fact" (a table, SOCRATES too) or "table" (CSV). By default: "table" where
            `columns` are given; a frame, ``.csv`` or ``.tsv`` by its columns (TwoHopFact's, a
            fact's fields, else memory injections); other files by their ending (``.jsonl``,
            ``.gz``) and by their first characters.
        on_error: what to do with malformed records: "raise", or "drop" with a note.
        columns, separator: of a table; see `load_table`.
        templates, wordings: of MQuAKE; see `load_mquake`.
        strict_reference: of memory injections; see `load_memory_injections`.

    Returns:
        The facts, with a record of what was dropped and repaired (`Facts.describe`).

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: an empty or malformed file, or one whose format cannot be inferred.
        ValueError: an unknown format, or an option that this format does not have.

    Examples:
        >>> import mi_hops
        >>> facts = mi_hops.load_facts("hopland")
        >>> facts[0].bridge
        'Ruben van Harrow'
    """
    options = {
        "columns": columns,
        "separator": separator,
        "templates": templates,
        "wordings": wordings,
        "strict_reference": strict_reference or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    source = facts_path(facts) if isinstance(facts, str | Path) else facts
    found = format or _guess_format(source, columns is not None)
    if found not in _LOADERS:
        raise ValueError(f"unknown format {found!r}; known are {sorted(_LOADERS)}")
    load, known = _LOADERS[found]
    if unknown := sorted(set(given) - set(known)):
        name = source if isinstance(source, Path) else "the table"
        raise ValueError(
            f"{name} is read as {found!r}, which has no option {unknown}; it has {list(known)}"
        )
    if not isinstance(source, Path) and found not in _OF_FRAMES:
        raise ValueError(f"format is {found!r}, which is a file's; a data frame is a 'table'")
    return load(source, on_error=on_error, **given)


def facts_path(name_or_path: str | Path) -> Path:
    """The file of facts that a name stands for: a bundled one's, or the path itself."""
    return BUNDLED_FACTS.get(str(name_or_path), Path(name_or_path))


def _guess_format(source: Path | pd.DataFrame, has_columns: bool) -> str:
    if has_columns:
        return "table"
    if not isinstance(source, Path):
        return "two_hop_fact" if TWO_HOP in map(str, source.columns) else "table"
    ending = existing_file(source).suffix.lower()
    if ending in (".csv", ".tsv"):
        names = list(map(str, read_frame(source).columns))
        if TWO_HOP in names:
            return "two_hop_fact"
        return "table" if has_fields(names) else "memory_injections"
    if ending == ".gz":
        return "geo"
    try:
        with source.open(encoding="utf-8-sig") as text:
            start = text.read(_LINE_START).lstrip()
    except UnicodeDecodeError as error:
        raise not_utf8(source, error) from error
    if start.startswith("[") and ending != ".jsonl":
        return "hotpotqa" if any(name in start for name in _HOTPOT) else "mquake"
    if ending == ".jsonl" or start.startswith("{"):
        return "musique" if any(name in start for name in _MUSIQUE) else "jsonl"
    raise FactsFileError(
        f"{source}: cannot tell its format from {start[:40]!r}; name it with format=, one of "
        f"{sorted(_LOADERS)}"
    )
