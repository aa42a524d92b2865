"""Facts from a table: reading CSV strictly, and `load_table` for columns the user names."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    Facts,
    FactsFileError,
    OnError,
    RowFixes,
    collect,
    existing_file,
    not_utf8,
    refuse_same,
)

if TYPE_CHECKING:
    import pandas as pd

#: The relations of a table that does not name them.
UNNAMED_RELATIONS = ("first hop", "second hop")

WHITE_SPACE = "stray white space"
_REQUIRED = ("bridge", "answer", "first_hop")
_NAMES = (*_REQUIRED, "id", "subject", "relation1", "relation2", "split")
PROMPTS = ("prompts", "first_prompts", "second_prompts")
LISTS = ("paraphrases", "bridge_aliases", "answer_aliases")
_MAX_SHOWN = 40

#: Field (prompts with their form, "prompts.suffix") -> column; several columns for lists.
Columns = Mapping[str, str | Sequence[str]]


def load_table(
    table: str | Path | pd.DataFrame,
    *,
    columns: Columns | None = None,
    separator: str | None = None,
    on_error: OnError = "raise",
) -> Facts:
    """Facts from any table: a CSV (or tab-separated ``.tsv``) file, or a data frame.

    Args:
        table: the file's path or the frame; one row per fact.
        columns: field of a `TwoHopFact` -> its column. For ``bridge``, ``answer``, ``first_hop``
            (all three needed), ``id``, ``subject``, ``relation1``, ``relation2`` and ``split``: a
            column's name. For the prompts, the table and the form, ``"prompts.suffix": "query"``
            (one form of ``prompts`` is needed; ``first_prompts`` and ``second_prompts`` alike). For
            ``paraphrases``, ``bridge_aliases``, ``answer_aliases`` and ``meta``: a column or
            several. By default, the columns named like a field.
        separator: splits a cell of a list field into several texts, e.g. ``"|"``.
        on_error: what to do with a malformed row (an empty cell where a value is needed):
            "raise", or "drop" with a note.

    Returns:
        The facts. Without a column of their own, ids are ``{name of the table}-{row}``, the
        subject is the first-hop phrase and the relations are called "first hop" and "second hop".
        White space around a cell is removed, which is reported for names and prompts. Rows whose
        bridge equals the answer, whose prompt does not contain the first-hop phrase (without
        regard to case) or does contain the bridge are dropped and reported.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: a file that cannot be read as a table, a column that is not in it, a
            malformed row.
        ValueError: a field that `columns` must or cannot name.

    Examples:
        >>> import mi_hops, pandas as pd
        >>> films = pd.DataFrame({
        ...     "whose": ["the director of Ran"], "director": ["Akira Kurosawa"], "town": ["Tokyo"],
        ...     "query": ["The director of Ran was born in"]})
        >>> columns = {"first_hop": "whose", "bridge": "director", "answer": "town"}
        >>> mi_hops.load_table(films, columns={**columns, "prompts.prefix": "query"})
        Facts(1 from table: 1 read / 0 dropped / 0 repaired)
    """
    frame, name, stem = open_table(table)
    wanted = _wanted(_named_like_fields(frame, name) if columns is None else columns)
    require_columns(frame, [c for spec in wanted.values() for c in spec.values()], source=name)

    def build(row: int, cells: Mapping[str, Any], fixes: RowFixes) -> TwoHopFact:
        def text(column: str) -> str:
            raw = _cell(cells[column])
            return fixes.changed(WHITE_SPACE, column, raw, raw.strip())

        values: dict[str, Any] = {"id": f"{stem}-{row}"}
        for field, spec in wanted.items():
            if field in _NAMES:
                values[field] = text(spec[""])
            elif field in PROMPTS:
                values[field] = {form: t for form, c in spec.items() if (t := text(c))}
            elif field in LISTS:
                values[field] = tuple(t for c in spec for t in _texts(cells[c], separator))
            else:
                values[field] = {c: _kept(cells[c]) for c in spec}
        for field in (*_REQUIRED, "prompts"):
            if not values[field]:
                where = sorted(wanted[field].values())
                raise BadRow("empty cell", f"nothing in {where} for the fact's {field}")
        for field, default in zip(
            ("subject", "relation1", "relation2"),
            (values["first_hop"], *UNNAMED_RELATIONS),
            strict=True,
        ):
            values[field] = values.get(field) or default
        refuse_same(values["bridge"], values["answer"])
        for prompt in values["prompts"].values():
            if find(values["first_hop"], prompt) is None:
                raise DropRow(
                    "first hop not in its prompt", f"{values['first_hop']!r} is not in {prompt!r}"
                )
            refuse_named(values["bridge"], prompt)
        return TwoHopFact(**values)

    return collect(frame_rows(frame), build, source=name, on_error=on_error)


def _named_like_fields(frame: pd.DataFrame, source: str) -> dict[str, str]:
    """The columns named like a field, each under its own name."""
    names = [str(c) for c in frame.columns]
    if not has_fields(names):
        raise FactsFileError(
            f"{source}: the columns are {names[:_MAX_SHOWN]}; expected {list(_REQUIRED)} and a "
            "prompts.FORM, or columns={field: column} that says which column holds each"
        )
    fields = (*_NAMES, *LISTS)
    return {n: n for n in names if n in fields or n.partition(".")[0] in PROMPTS}


def has_fields(names: Iterable[str]) -> bool:
    """Whether the columns that a fact needs are there under the names of its fields."""
    found = set(names)
    return found >= set(_REQUIRED) and any(n.startswith("prompts.") for n in found)


def _wanted(columns: Columns) -> dict[str, dict[str, str]]:
    """Every field's specification as key -> column; the key is the form where forms matter."""
    wanted: dict[str, dict[str, str]] = {}
    for name, spec in columns.items():
        field, dot, form = name.partition(".")
        if field not in (*_NAMES, *PROMPTS, *LISTS, "meta"):
            known = sorted([*_NAMES, *(f"{table}.FORM" for table in PROMPTS), *LISTS, "meta"])
            raise ValueError(f"columns names the field {name!r}; a fact has {known}")
        if bool(dot) != (field in PROMPTS) or bool(form) != bool(dot):
            expected = f"{field}.suffix, say" if field in PROMPTS else repr(field)
            raise ValueError(f"columns names {name!r}; expected {expected}")
        if field in (*LISTS, "meta"):
            wanted[field] = {c: c for c in ((spec,) if isinstance(spec, str) else spec)}
        elif isinstance(spec, str):
            wanted.setdefault(field, {})[form] = spec
        else:
            raise ValueError(f"columns[{name!r}] is {spec!r}; expected the name of one column")
    if missing := [f for f in (*_REQUIRED, "prompts") if f not in wanted]:
        raise ValueError(f"columns lacks {missing}; say which column holds each")
    return wanted


def read_frame(path: str | Path) -> pd.DataFrame:
    """A CSV or ``.tsv`` file in which every cell is text (an answer may be "NA" or "007").

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not UTF-8, no header, two columns of one name, rows of unequal length.
    """
    import pandas as pd

    path = existing_file(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # pandas numbers records and pads short ones with NaN; the csv module knows lines, so that an
    # error can point at one.
    rows: list[list[str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header = next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise FactsFileError(
                        f"{path}: row {len(rows)} (ending in line {reader.line_num}) has "
                        f"{len(cells)} cells, the header {len(header)}: {header}"
                    )
                rows.append(cells)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except csv.Error as error:
        raise FactsFileError(f"{path}: line {reader.line_num}: not CSV ({error})") from error
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise FactsFileError(f"{path}: the header names {twice} more than once")
    return pd.DataFrame(rows, columns=header, dtype=object)


def require_columns(frame: pd.DataFrame, names: Iterable[str], *, source: str) -> None:
    """Raise `FactsFileError`, listing the columns there are, unless all of `names` are."""
    found = [str(c) for c in frame.columns]
    if missing := [name for name in dict.fromkeys(names) if name not in found]:
        raise FactsFileError(f"{source}: no column {missing}; it has {found[:_MAX_SHOWN]}")


def frame_rows(frame: pd.DataFrame) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows with their places in messages, "row 0" being the first below the header."""
    names = [str(c) for c in frame.columns]
    for row, cells in enumerate(frame.itertuples(index=False, name=None)):
        yield f"row {row}", dict(zip(names, cells, strict=True))


def find(phrase: str, text: str, *, fold_accents: bool = False) -> tuple[int, int] | None:
    """Where `phrase` appears in `text`, as whole words and without regard to case: (start, end).

    None where it does not ("Halle" is not in "Hallelujah").

    Args:
        fold_accents: also take "Simon" for "Simón".
    """
    wanted, searched = _fold(phrase, fold_accents), _fold(text, fold_accents)
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", searched) if wanted.strip() else None
    return found.span() if found else None


def _fold(text: str, accents: bool) -> str:
    """`text` in one case, character by character so that offsets stay those of `text`."""
    import unicodedata

    def fold(char: str) -> str:
        lower = char.lower()
        base = unicodedata.normalize("NFD", lower)[:1] if accents else lower
        return base if len(base) == 1 else char

    return "".join(map(fold, text))


def refuse_named(bridge: str, prompt: str) -> None:
    """Drop a question whose prompt names the bridge: it asks for one hop only."""
    if find(bridge, prompt) is not None:
        raise DropRow("bridge named in its prompt", f"{bridge!r} appears in {prompt!r}")


def open_table(table: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str, str]:
    """A frame or a file's, with its name in messages and the beginning of its facts' ids."""
    if isinstance(table, (str, Path)):
        return read_frame(table), str(table), Path(table).stem
    return table, "table", "table"


def _missing(value: Any) -> bool:
    """None, NaN and pandas's NA, the ways in which a cell of a frame can be empty."""
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of a column of integers with a gap
    return "" if _missing(value) else str(value)


def _texts(value: Any, separator: str | None) -> list[str]:
    """The texts in a cell of a list field: a list as it is, a text whole or split."""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        parts = [_cell(v) for v in value]
    else:
        parts = _cell(value).split(separator) if separator else [_cell(value)]
    return [part.strip() for part in parts if part.strip()]


def _kept(value: Any) -> Any:
    """A cell for `TwoHopFact.meta`, as a plain Python value that JSON can hold."""
    if _missing(value):
        return None
    plain = value.tolist() if hasattr(value, "tolist") else value
    return plain if isinstance(plain, str | int | float | list | tuple | dict) else str(plain)
