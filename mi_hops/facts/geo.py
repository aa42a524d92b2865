"""Facts of a real world whose relations come in several wordings: the bundled `geo`, or a like file.

The file is gzipped JSON. It keeps single facts and wordings once; two-hop facts and chains only say
which of them they are made of, and are spelled out here.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.reading import BadRow, Facts, FactsFileError, OnError, collect, existing_file
from mi_hops.facts.templates import Wording, first_hop_phrase, prompts_about
from mi_hops.facts.wordings import WordedRelation, alike, default_wordings

FORMAT = "mi_hops worded facts 1"
BUNDLED = Path(__file__).parent.parent / "data" / "geo.json.gz"

_KEYS = ("format", "name", "sources", "relations", "entities", "objects", "facts", "chains")


@dataclass(frozen=True, kw_only=True)
class FactChain:
    """A chain of three or more hops, subject -> ... -> answer, and the prompts that ask for it.

    Attributes:
        id: unique within a file.
        names: subject, bridges and answer, one more than there are relations.
        relations: the relations, first hop first.
        phrases: one per bridge, the phrase that describes it as it appears in the prompts ("the
            city served by Heathrow Airport"); each contains the one before.
        prompts: form -> the prompt of the whole chain.
        hop_prompts: one table per hop, form -> prompt of that hop by itself.
        aliases: per name after the subject, other accepted spellings.
        split: as `TwoHopFact.split`.
    """

    id: str
    names: tuple[str, ...]
    relations: tuple[str, ...]
    phrases: tuple[str, ...]
    prompts: Mapping[str, str]
    hop_prompts: tuple[Mapping[str, str], ...]
    aliases: tuple[tuple[str, ...], ...]
    split: str = ""

    @property
    def answer(self) -> str:
        """The object of the last hop."""
        return self.names[-1]


@dataclass(frozen=True)
class _Entry:
    """An entity: its name, how it is called in running text, other accepted spellings."""

    name: str
    text: str
    aliases: tuple[str, ...] = ()


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
        names = self.content["objects"].get(relation, {}).get(subject)
        if not names:
            raise BadRow("single fact missing", f"{relation!r} of {subject!r} is not in the file")
        kind = self.relation(relation).range
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
    file = _read(path)
    wordings = default_wordings(file.relations)

    def rows() -> Iterator[tuple[str, tuple[str, str, str, str]]]:
        for number, row in enumerate(file.content["facts"]):
            try:
                relation1, subject, split, seconds = row
            except (TypeError, ValueError):
                raise FactsFileError(
                    f"{file.path}: entry {number} of facts is {row!r:.80}; expected [first "
                    "relation, subject, split, second relations]"
                ) from None
            for relation2 in seconds:
                yield f"entry {number} of facts", (relation1, subject, split, relation2)

    found = collect(
        rows(),
        lambda _, row, __: _fact(file, wordings, *row),
        source=str(file.path),
        on_error=on_error,
    )
    return Facts(
        found.facts, found.source, found.read, found.dropped, found.repaired, file.relations
    )


def _fact(
    file: _File,
    wordings: Mapping[str, Wording],
    relation1: str,
    subject_name: str,
    split: str,
    relation2: str,
) -> TwoHopFact:
    subject = file.entry(file.relation(relation1).domain, subject_name)
    bridge = file.object(relation1, subject_name)
    answer = file.object(relation2, bridge.name)
    first, second = wordings[relation1], wordings[relation2]
    phrase = first_hop_phrase(first, subject.text)
    in_text = {
        role: entry.text
        for role, entry in (("subject", subject), ("bridge", bridge), ("answer", answer))
        if entry.text != entry.name
    }
    meta: dict[str, Any] = {"in_text": in_text} if in_text else {}
    if alike(bridge.name, answer.name):
        meta["alike"] = True
    return TwoHopFact(
        id=f"{subject_name}/{relation1}/{relation2}",
        subject=subject_name,
        relation1=relation1,
        bridge=bridge.name,
        relation2=relation2,
        answer=answer.name,
        first_hop=phrase,
        prompts=prompts_about(second, phrase),
        first_prompts=prompts_about(first, subject.text),
        second_prompts=prompts_about(second, bridge.text),
        bridge_aliases=bridge.aliases,
        answer_aliases=answer.aliases,
        split=split,
        meta=meta,
    )


def load_chains(
    path: str | Path | None = None, wordings: Mapping[str, Wording] | None = None
) -> tuple[FactChain, ...]:
    """The chains of three hops of the bundled file, or of another in its format.

    Args:
        path: the file; default the bundled one.
        wordings: relation -> wording; default the first wording of each.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not such a file, or a chain whose single facts are not in it.

    Examples:
        >>> from mi_hops.facts import load_chains
        >>> chain = load_chains()[0]
        >>> len(chain.relations), len(chain.names)
        (3, 4)
    """
    file = _read(path)
    chosen = default_wordings(file.relations) | dict(wordings or {})
    chains = []
    for number, row in enumerate(file.content["chains"]):
        try:
            subject, split, relation1, relation2, lasts = row
            chains += [
                _chain(file, chosen, subject, split, (relation1, relation2, last)) for last in lasts
            ]
        except (TypeError, ValueError) as error:
            raise FactsFileError(f"{file.path}: entry {number} of chains: {error}") from None
    return tuple(chains)


def _chain(
    file: _File,
    wordings: Mapping[str, Wording],
    subject_name: str,
    split: str,
    relations: tuple[str, ...],
) -> FactChain:
    entry = file.entry(file.relation(relations[0]).domain, subject_name)
    entries, phrases = [entry], [entry.text]
    hops = []
    for relation in relations:
        file.relation(relation)  # refuses an unknown one
        hops.append(prompts_about(wordings[relation], entry.text))
        phrases.append(first_hop_phrase(wordings[relation], phrases[-1]))
        entry = file.object(relation, entry.name)
        entries.append(entry)
    return FactChain(
        id="/".join((subject_name, *relations)),
        names=tuple(e.name for e in entries),
        relations=relations,
        phrases=tuple(phrases[1:-1]),
        prompts=prompts_about(wordings[relations[-1]], phrases[-2]),
        hop_prompts=tuple(hops),
        aliases=tuple(e.aliases for e in entries[1:]),
        split=split,
    )


def _read(path: str | Path | None) -> _File:
    path = existing_file(BUNDLED if path is None else path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as text:
            content = json.load(text)
    except (OSError, EOFError, zlib.error) as error:
        raise FactsFileError(f"{path}: not a whole gzip file ({error})") from error
    except ValueError as error:  # JSON or UTF-8
        raise FactsFileError(f"{path}: not JSON inside ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FactsFileError(f"{path}: its format is {found!r}; expected {FORMAT!r}")
    if missing := [key for key in _KEYS if key not in content]:
        raise FactsFileError(f"{path}: {missing} missing; the file needs {list(_KEYS)}")
    return _File(path, content)
