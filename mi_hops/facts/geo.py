"""Facts of a real world whose relations come in several wordings: the bundled `geo`, or a like file.

The file is gzipped JSON. It keeps single facts and wordings once; two-hop facts and chains of three
only say which of them they are made of, and are spelled out here.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hops import Hop, worded
from mi_hops.facts.reading import (
    BadRow,
    Facts,
    FactsFileError,
    OnError,
    collect,
    existing_file,
    refuse_repeated,
)
from mi_hops.facts.templates import Wording
from mi_hops.facts.wordings import WordedRelation, alike, default_wordings

FORMAT = "mi_hops worded facts 1"
BUNDLED = Path(__file__).parent.parent / "data" / "geo.json.gz"

_KEYS = ("format", "name", "sources", "relations", "entities", "objects", "facts", "chains")


@dataclass(frozen=True)
class _Entry:
    """An entity: its name, how it is called in running text, other accepted spellings."""

    name: str
    text: str
    aliases: tuple[str, ...] = ()

    @property
    def in_text(self) -> str:
        """How it is called in running text where that differs from its name."""
        return self.text if self.text != self.name else ""


@dataclass(frozen=True)
class _File:
    """The parsed file."""

    path: Path
    content: Mapping[str, Any]

    @cached_property
    def relations(self) -> dict[str, WordedRelation]:
        found = {}
        for name, record in self.content["relations"].items():
            try:
                found[name] = WordedRelation(
                    name,
                    record["domain"],
                    record["range"],
                    tuple((noun, verb) for noun, verb in record["nouns"]),
                    tuple(record["statements"]),
                    tuple(record["questions"]),
                )
            except KeyError as error:
                raise FactsFileError(
                    f"{self.path}: relation {name!r} has no {error.args[0]!r}; it needs its kinds "
                    "(domain, range) and its wordings (nouns, statements, questions)"
                ) from None
            except (TypeError, ValueError) as error:
                raise FactsFileError(f"{self.path}: {error}") from None
        return found

    def relation(self, name: str) -> WordedRelation:
        if name not in self.relations:
            raise BadRow(
                "unknown relation",
                f"the relation {name!r} has no wordings; there are {sorted(self.relations)}",
            )
        return self.relations[name]

    def entry(self, kind: str, name: str) -> _Entry:
        text, aliases = self.content["entities"].get(kind, {}).get(name, ("", ()))
        article = (text,) if text == f"the {name}" else ()  # its first token differs
        return _Entry(name, text or name, (*article, *aliases))

    def object(self, relation: str, subject: str) -> _Entry:
        """The object of a single fact; whatever else the fact accepts is among its aliases."""
        kind = self.relation(relation).range
        names = self.content["objects"].get(relation, {}).get(subject)
        if not names:
            raise BadRow("single fact missing", f"{relation!r} of {subject!r} is not in the file")
        entries = [self.entry(kind, name) for name in names]
        every = [text for entry in entries for text in (entry.name, *entry.aliases)]
        aliases = tuple(text for text in dict.fromkeys(every) if text != names[0])
        return _Entry(names[0], entries[0].text, aliases)


def load_geo(path: str | Path | None = None, *, on_error: OnError = "raise") -> Facts:
    """The bundled facts of geography and chemistry, or a file in their format.

    Every fact is in the default wording; ``facts.relations`` has all of them, for
    `TwoHopFact.with_wording`. Splits: ``"choosing"`` for choosing wordings and ``"reported"``;
    no subject is in both. ``meta["alike"]`` marks answers that look like their bridge ("France",
    "French"), which the second hop alone may give away.

    Args:
        path: another gzipped JSON file of the same format.
        on_error: "raise", or "drop" a fact that cannot be made, with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not such a file, or it contradicts itself; the message says where.

    Examples:
        >>> from mi_hops.facts import load_geo
        >>> facts = load_geo()
        >>> fact = next(f for f in facts if f.id == "Munich/country of city/currency")
        >>> fact.prompt("prefix")
        'The country that contains Munich uses a currency called the'
        >>> fact.bridge, fact.answer
        ('Germany', 'euro')
    """
    fields = ("first relation", "subject", "split", "second relations")
    return _collect(_read(path), "facts", fields, on_error)


def load_chains(path: str | Path | None = None, *, on_error: OnError = "raise") -> Facts:
    """The three-hop chains of the bundled file, or of another file in its format.

    Landmark or airport, city, country, and what is asked of the country; in the default wording and
    with the splits of `load_geo`.

    Args:
        path: the file; default the bundled one.
        on_error: "raise", or "drop" a chain that cannot be made, with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not such a file, one without chains, or a chain whose single facts are not in
            it. A chain that comes back to an entity is dropped and reported.

    Examples:
        >>> from mi_hops.facts import load_chains
        >>> chain = load_chains()[0]
        >>> chain.n_hops, len(chain.bridges), len(chain.names)
        (3, 2, 4)
    """
    fields = ("subject", "split", "first relation", "second relation", "third relations")
    return _collect(_read(path), "chains", fields, on_error)


def _collect(file: _File, table: str, fields: Sequence[str], on_error: OnError) -> Facts:
    """The facts of a table whose entries have these fields, the last relations in a list."""
    wordings = default_wordings(file.relations)

    def rows() -> Iterator[tuple[str, tuple[str, str, tuple[str, ...]]]]:
        for number, row in enumerate(file.content[table]):
            place = f"entry {number} of {table}"
            if not isinstance(row, list) or len(row) != len(fields):
                raise FactsFileError(
                    f"{file.path}: {place} is {row!r:.80}; expected [{', '.join(fields)}]"
                )
            entry = dict(zip(fields, row, strict=True))
            before = [entry[name] for name in fields if name.endswith(" relation")]
            for last in row[-1]:
                yield place, (entry["subject"], entry["split"], (*before, last))

    found = collect(
        rows(),
        lambda _, row, __: _fact(file, wordings, *row),
        source=str(file.path),
        on_error=on_error,
    )
    return replace(found, relations=file.relations)


def _fact(
    file: _File,
    wordings: Mapping[str, Wording],
    subject_name: str,
    split: str,
    relations: tuple[str, ...],
) -> TwoHopFact:
    subject = file.entry(file.relation(relations[0]).domain, subject_name)
    hops, entry = [], subject
    for relation in relations:
        entry = file.object(relation, entry.name)
        hops.append(
            Hop(relation=relation, object=entry.name, aliases=entry.aliases, in_text=entry.in_text)
        )
    refuse_repeated((subject_name, *(hop.object for hop in hops)))
    meta: dict[str, Any] = {"in_text": {"subject": subject.in_text}}
    if alike(hops[-2].object, hops[-1].object):
        meta["alike"] = True
    asked, prompts = worded(hops, [wordings[name] for name in relations], subject.text)
    return TwoHopFact.from_hops(
        asked,
        id="/".join((subject_name, *relations)),
        subject=subject_name,
        prompts=prompts,
        split=split,
        meta=meta,
    )


def _read(path: str | Path | None) -> _File:
    path = existing_file(BUNDLED if path is None else path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as text:
            content = json.load(text)
    except (OSError, EOFError, zlib.error) as error:
        raise FactsFileError(f"{path}: not a complete gzip file ({error})") from error
    except ValueError as error:  # JSON or UTF-8
        raise FactsFileError(f"{path}: not JSON inside ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FactsFileError(f"{path}: its format is {found!r}; expected {FORMAT!r}")
    if missing := [key for key in _KEYS if key not in content]:
        raise FactsFileError(f"{path}: {missing} missing; the file needs {list(_KEYS)}")
    return _File(path, content)
