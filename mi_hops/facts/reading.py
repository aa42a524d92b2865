"""What every loader of facts shares: the result, its notes on rows, and the errors.

A loader gives `collect` its records and a function that builds a fact from one record. A record
that cannot be a fact is dropped with a note when the *content* is at fault (the question answers
itself, the relation has no wording); when the *file* is at fault (a field missing, broken JSON) the
error names file and row, unless the caller asked for such rows to be dropped too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, overload

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hops import repeated
from mi_hops.facts.wordings import WordedRelation
from mi_hops.result.display import html_table

Record = TypeVar("Record")


class HasId(Protocol):
    """What a loader makes of a record."""

    @property
    def id(self) -> str:
        """Unique within its file."""


Made = TypeVar("Made", bound=HasId)

#: What to do with a malformed record: raise an error, or drop it with a note.
OnError = Literal["raise", "drop"]


class FactsFileError(ValueError):
    """A file of facts that cannot be read; the message names the file and the row or line."""


class BadRow(ValueError):
    """A record that is not a fact because its file is at fault; `reason` is short, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class DropRow(BadRow):
    """A readable record that is not a usable two-hop question: dropped and reported, never raised."""


@dataclass(frozen=True)
class RowNote:
    """What a loader did to one row.

    Attributes:
        row: number of the record in its file, from 0 (a header or a blank line is not a record).
        reason: the kind of defect, the same words for every row that has it.
        done: what was found and what was done about it, for this row.
    """

    row: int
    reason: str
    done: str


@dataclass(frozen=True, repr=False)
class Facts(Sequence[TwoHopFact]):
    """The facts of one file, in order, with a record of dropped and repaired rows.

    Attributes:
        facts: the facts that can be used.
        source: the file, or a description of the table, they came from.
        read: number of records read, the dropped ones included.
        dropped: one note per record that was left out.
        repaired: one note per change; a row with two defects has two.
        relations: relation -> its wordings, where the file has several.

    Examples:
        >>> import mi_hops
        >>> facts = mi_hops.load_facts("hopland")
        >>> len(facts), facts.dropped
        (1854, ())
    """

    facts: tuple[TwoHopFact, ...]
    source: str
    read: int
    dropped: tuple[RowNote, ...] = ()
    repaired: tuple[RowNote, ...] = ()
    relations: Mapping[str, WordedRelation] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[TwoHopFact]:
        return iter(self.facts)

    @overload
    def __getitem__(self, index: int) -> TwoHopFact: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TwoHopFact, ...]: ...

    def __getitem__(self, index: int | slice) -> TwoHopFact | tuple[TwoHopFact, ...]:
        return self.facts[index]

    def __repr__(self) -> str:
        return f"Facts({len(self)} from {self.describe()})"

    def _repr_html_(self) -> str:
        rows = ((f.id, f.split, f.prompt(), f.bridge, f.answer) for f in self)
        header = ("id", "split", "prompt", "bridge", "answer")
        return html_table(self.describe(), header, rows, total=len(self))

    def describe(self) -> str:
        """One line: "facts.csv: 106 read / 1 dropped (1 bridge equals answer) / 0 repaired".

        Rows are counted, not notes: a row repaired twice counts once in the total and once for
        each of its reasons.
        """
        return describe_rows(self.source, self.read, self.dropped, self.repaired)


def describe_rows(
    source: str, read: int, dropped: Sequence[RowNote], repaired: Sequence[RowNote]
) -> str:
    """How many rows were read, dropped and repaired, and why, in one line."""
    return f"{source}: {read} read / {_count(dropped, 'dropped')} / {_count(repaired, 'repaired')}"


def _count(notes: Sequence[RowNote], what: str) -> str:
    rows = {note.row for note in notes}
    if not rows:
        return f"0 {what}"
    reasons = Counter(reason for _, reason in {(note.row, note.reason) for note in notes})
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return f"{len(rows)} {what} ({', '.join(f'{n} {reason}' for reason, n in ordered)})"


class RowFixes:
    """The changes made to the row being built."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def note(self, reason: str, done: str) -> None:
        """Record one change; a row that is dropped in the end keeps none of them."""
        self.notes.append((reason, done))

    def changed(self, reason: str, name: str, before: str, after: str) -> str:
        """Return `after`, with a note when it differs from `before`."""
        if after != before:
            self.note(reason, f"{name}: {before!r} became {after!r}")
        return after


def collect(
    records: Iterable[tuple[str, Record]],
    build: Callable[[int, Record, RowFixes], TwoHopFact],
    *,
    source: str,
    on_error: OnError = "raise",
) -> Facts:
    """Build a fact from every record and record those that gave none; see `collect_rows`."""
    return Facts(*collect_rows(records, build, source=source, on_error=on_error))


def collect_rows(
    records: Iterable[tuple[str, Record]],
    build: Callable[[int, Record, RowFixes], Made],
    *,
    source: str,
    on_error: OnError = "raise",
) -> tuple[tuple[Made, ...], str, int, tuple[RowNote, ...], tuple[RowNote, ...]]:
    """Build something with an id from every record, and note those that gave none.

    Args:
        records: pairs of a place ("row 3", "line 4"; for error messages) and a record.
        build: makes one thing of (row number from 0, record), noting its changes in the third.
        source: names the file in messages.
        on_error: "raise", or "drop" for malformed records too.

    Returns:
        What was built, the source, the number of records read, notes on those dropped and on those
        repaired: the fields of `Facts`.

    Raises:
        FactsFileError: a malformed record or an id used twice (with ``on_error="raise"``), or no
            record at all.
        ValueError: another `on_error`.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f'on_error is {on_error!r}; give "raise" or "drop"')
    made: list[Made] = []
    dropped: list[RowNote] = []
    repaired: list[RowNote] = []
    places: dict[str, str] = {}
    row = -1
    for row, (place, record) in enumerate(records):
        fixes = RowFixes()
        try:
            one = build(row, record, fixes)
            if one.id in places:
                raise BadRow("id used twice", f"the id {one.id!r} was used in {places[one.id]}")
        except ValueError as error:
            if on_error == "raise" and not isinstance(error, DropRow):
                raise FactsFileError(f"{source}: {place}: {error}") from error
            reason = error.reason if isinstance(error, BadRow) else "not usable"
            dropped.append(RowNote(row, reason, f"{place} dropped: {error}"))
            continue
        places[one.id] = place
        made.append(one)
        repaired.extend(RowNote(row, *note) for note in fixes.notes)
    if row < 0:
        raise FactsFileError(f"{source}: no records in it; at least one is needed")
    return tuple(made), source, row + 1, tuple(dropped), tuple(repaired)


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there and is not empty.

    Raises:
        FileNotFoundError: nothing at `path`.
        FactsFileError: a folder, or a file of no bytes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no facts file {path}; check the path and its spelling")
    if not path.is_file():
        raise FactsFileError(f"{path} is not a file; give the path of one file of facts")
    if path.stat().st_size == 0:
        raise FactsFileError(f"{path} is empty; at least one fact is needed")
    return path


def read_json(path: Path) -> Any:
    """The whole of a JSON file; `FactsFileError` with the line where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except json.JSONDecodeError as error:
        raise FactsFileError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from error


def read_records(path: Path) -> list[tuple[str, Any]]:
    """The records of a JSON list, each with its place ("record 3") for messages.

    Raises:
        FactsFileError: broken JSON, or anything but a list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise FactsFileError(
            f"{path}: expected a JSON list of records, found {type(records).__name__}"
        )
    return [(f"record {row}", record) for row, record in enumerate(records)]


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each with its place ("line 4", from 1)."""
    try:
        # Only "\n" ends a line: a name may hold another of Unicode's line breaks.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", line
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def line_object(line: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        BadRow: not JSON, or not an object.
    """
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise BadRow("broken JSON", f"column {error.colno}: not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise BadRow("not an object", f"expected an object, found {line.strip():.80}")
    return record


def field_of(record: Any, name: str, kind: type) -> Any:
    """A record's field of that name and type.

    Raises:
        BadRow: no object, no such field, or a value of another type.
    """
    if not isinstance(record, Mapping):
        raise BadRow("unreadable record", f"expected an object, found {record!r:.80}")
    if name not in record:
        raise BadRow("field missing", f"no field {name!r}; there are {sorted(record)}")
    value = record[name]
    if not isinstance(value, kind):
        raise BadRow("unreadable record", f"{name!r} is {value!r:.80}; expected {kind.__name__}")
    return value


def texts_of(record: Any, name: str) -> list[str]:
    """A record's field of that name, a list of texts.

    Raises:
        BadRow: no such field, or anything but a list of texts.
    """
    values = field_of(record, name, list)
    if not all(isinstance(value, str) for value in values):
        raise BadRow("unreadable record", f"{name!r} is {values!r:.80}; expected a list of texts")
    return values


def not_utf8(path: Path, error: UnicodeDecodeError) -> FactsFileError:
    """The error for a file in another encoding."""
    return FactsFileError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8")


def refuse_same(bridge: str, answer: str) -> None:
    """Drop a question that its first hop alone answers."""
    if bridge.strip().casefold() == answer.strip().casefold():
        raise DropRow("bridge equals answer", f"bridge and answer are both {answer!r}")


def refuse_repeated(names: Sequence[str]) -> None:
    """Drop a chain that comes back to an entity."""
    if twice := repeated(names):
        raise DropRow("entity occurs twice", f"{twice!r} occurs twice in {' -> '.join(names)}")


def triple(value: Any) -> tuple[str, str, str]:
    """``[subject, relation, object]`` of a record, white space stripped.

    Raises:
        BadRow: anything but three texts.
    """
    parts = value if isinstance(value, (list, tuple)) else ()
    if len(parts) != 3 or not all(isinstance(part, str) and part.strip() for part in parts):
        raise BadRow("unreadable fact", f"{value!r:.80} is not a list [subject, relation, object]")
    first, relation, last = (part.strip() for part in parts)
    return first, relation, last
