"""Facts from files: our own JSONL, and `load_facts`, which picks the loader for a file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.geo import BUNDLED, load_geo
from mi_hops.facts.memory_injections import load_memory_injections
from mi_hops.facts.mquake import load_mquake
from mi_hops.facts.reading import (
    BadRow,
    Facts,
    FactsFileError,
    Mends,
    collect,
    existing_file,
    not_utf8,
    refuse_same,
)
from mi_hops.facts.tables import load_table

_TABLES = ("prompts", "first_prompts", "second_prompts")
_LISTS = ("paraphrases", "bridge_aliases", "answer_aliases")
_LINE_START = 200

#: Name -> file of the bundled facts.
BUNDLED_FACTS: Mapping[str, Path] = {
    "geo": BUNDLED,
    "hopland": BUNDLED.with_name("hopland.jsonl"),
}


def load_jsonl(path: str | Path, *, on_error: str = "raise") -> Facts:
    """Facts from a file of one JSON object a line, as `save_jsonl` writes it.

    Args:
        path: the file; blank lines are passed over.
        on_error: what to do with a line that is not a fact: "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: broken JSON, a missing, unknown or wrongly typed field, a bridge that equals
            its answer, an id used twice; the message names the line, from 1.
    """
    path = existing_file(path)
    return collect(_lines(path), _from_line, source=str(path), on_error=on_error)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        # Only "\n" ends a line: a name may hold another of Unicode's line breaks.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", line
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def _from_line(row: int, line: str, mends: Mends) -> TwoHopFact:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise BadRow("broken JSON", f"column {error.colno}: not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise BadRow("not an object", f"expected an object, found {line.strip():.80}")
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
        if name in _TABLES or name == "meta":
            good = isinstance(value, dict) and (
                name == "meta" or all(isinstance(v, str) for v in value.values())
            )
            kind = "an object" if name == "meta" else "an object of form -> text"
        elif name in _LISTS:
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
            kind = "a list of texts"
        elif name in TwoHopFact.__dataclass_fields__:
            good, kind = isinstance(value, str), "a text"
        else:
            continue  # an unknown name; `from_dict` lists the known ones
        if not good:
            raise BadRow("field of another type", f"{name} is {value!r:.80}; expected {kind}")


def save_jsonl(facts: Iterable[TwoHopFact], path: str | Path) -> Path:
    """Write facts to a JSONL file, one object a line, all or nothing.

    The lines go to a temporary file beside `path` that takes its place once complete, so a reader
    or an interruption never meets half a file.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: an id used twice, or a fact that would not come back as it is (an empty subject
            or relation, a value in ``meta`` that JSON cannot hold). An existing file is kept.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    seen: set[str] = set()
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as out:
            for fact in facts:
                if fact.id in seen:
                    raise ValueError(f"two facts have the id {fact.id!r}; ids must be unique")
                seen.add(fact.id)
                out.write(_to_line(fact))
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


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


#: Format -> its loader and the options that are its own.
_LOADERS: Mapping[str, tuple[Callable[..., Facts], tuple[str, ...]]] = {
    "geo": (load_geo, ()),
    "jsonl": (load_jsonl, ()),
    "memory_injections": (load_memory_injections, ("strict_reference",)),
    "mquake": (load_mquake, ("templates", "wordings")),
    "table": (load_table, ("columns", "separator")),
}


def load_facts(
    path: str | Path, *, format: str | None = None, on_error: str = "raise", **options: Any
) -> Facts:
    """Facts from a file of any known format, or the bundled ones.

    Args:
        path: the file, or the name of bundled facts: ``"hopland"`` (a made-up world) or ``"geo"``
            (geography and chemistry; see `load_geo`).
        format: "jsonl" (our own), "geo" (gzipped JSON with wordings), "memory_injections" (CSV),
            "mquake" (JSON) or "table" (CSV with ``columns=``). By default: "table" if ``columns``
            is given; otherwise by the name's ending, ``.jsonl``, ``.gz``, ``.csv`` or ``.tsv``; any
            other file by its first character, "[" being MQuAKE's list and "{" our objects.
        on_error: what to do with malformed records: "raise", or "drop" with a note.
        **options: passed to the format's loader: `load_memory_injections` (``strict_reference``),
            `load_mquake` (``templates``, ``wordings``), `load_table` (``columns``, ``separator``).

    Returns:
        The facts, with an account of what was dropped and mended (`Facts.describe`).

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: an empty or malformed file, or one whose format cannot be told.
        ValueError: an unknown format, or an option that the format's loader has not got.
    """
    path = facts_path(path)
    if format is None:
        format = "table" if "columns" in options else _guess_format(existing_file(path))
    if format not in _LOADERS:
        raise ValueError(f"unknown format {format!r}; known are {sorted(_LOADERS)}")
    loader, known = _LOADERS[format]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{path} is read as {format!r}, which has no option {unknown}; it has {list(known)}"
        )
    if format == "table" and "columns" not in options:
        raise ValueError(f"{path}: a table needs columns=, the columns that hold a fact's fields")
    return loader(path, on_error=on_error, **options)


def facts_path(name_or_path: str | Path) -> Path:
    """The file of facts that a name stands for: a bundled one's, or the path itself."""
    return BUNDLED_FACTS.get(str(name_or_path), Path(name_or_path))


def _guess_format(path: Path) -> str:
    by_ending = {
        ".jsonl": "jsonl",
        ".gz": "geo",
        ".csv": "memory_injections",
        ".tsv": "memory_injections",
    }
    if (ending := path.suffix.lower()) in by_ending:
        return by_ending[ending]
    try:
        with path.open(encoding="utf-8-sig") as text:
            start = text.read(_LINE_START).lstrip()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    by_start = {"[": "mquake", "{": "jsonl"}
    if start[:1] not in by_start:
        raise FactsFileError(
            f"{path}: cannot tell its format from {start[:40]!r}; pass format=, one of "
            f"{sorted(_LOADERS)}"
        )
    return by_start[start[:1]]
