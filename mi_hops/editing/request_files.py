"""Edit requests from CounterFact (arXiv 2202.05262) and zsRE (arXiv 1706.04115) in their published JSON.

Both ask one hop: a subject is to get another object. Such a request teaches an answer, so it serves ROME,
MEMIT, fine-tuning and the like. CREME moves a computation instead: it needs another subject that has the new
object already, which some records of CounterFact name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from mi_hops.editing.request import Request, places_of
from mi_hops.facts.phrases import counterpart
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    OnError,
    RowFixes,
    RowNote,
    collect_rows,
    describe_rows,
    existing_file,
    field_of,
    read_records,
    texts_of,
)
from mi_hops.facts.tables import find

_SLOT = "{}"
_NQ = "nq question: "


@dataclass(frozen=True)
class Probe:
    """A prompt by which a record tests its edit.

    Attributes:
        set: ``"efficacy"`` (the prompt taught), ``"wordings"`` (paraphrases of it), ``"same_relation"``
            (CounterFact's neighbours, of which the old object is true) or ``"specificity"`` (zsRE's
            unrelated question).
        answer, aliases: what is right once the edit is made.
        wrong: what competes with it: the old object; of neighbours the new one; None where unknown.
    """

    set: str
    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    wrong: str | None = None


@dataclass(frozen=True, repr=False)
class Requests(Sequence[Request]):
    """The requests of one file, in order, with a record of dropped and repaired rows.

    Attributes:
        requests: those that can be used.
        probes: request id -> the prompts by which its record tests the edit.
        source: the file.
        read: number of records read, the dropped ones included.
        dropped: one note per record that was left out.
        repaired: one note per change.
    """

    requests: tuple[Request, ...]
    source: str
    read: int
    dropped: tuple[RowNote, ...] = ()
    repaired: tuple[RowNote, ...] = ()
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Request, ...]: ...

    def __getitem__(self, index: int | slice) -> Request | tuple[Request, ...]:
        return self.requests[index]

    def __repr__(self) -> str:
        return f"Requests({len(self)} from {self.describe()})"

    def describe(self) -> str:
        """One line: "zsre.json: 100 read / 2 dropped (2 no target) / 0 repaired"."""
        return describe_rows(self.source, self.read, self.dropped, self.repaired)


def load_requests(
    path: str | Path,
    *,
    second_hop: bool = False,
    target: Literal["new", "true"] = "new",
    on_error: OnError = "raise",
) -> Requests:
    """Load the edits requested by a CounterFact or zsRE file.

    Read of a record of CounterFact: ``requested_rewrite`` (``prompt`` with ``{}``, ``subject``,
    ``target_new``, ``target_true``) and, where they are there, ``paraphrase_prompts``,
    ``neighborhood_prompts`` and ``attribute_prompts``; of zsRE: ``src``, ``subject``, ``alt``,
    ``answers``, ``rephrase``, ``loc`` and ``loc_ans``. The subject is the request's ``first_hop``;
    prompts about neighbours (CounterFact) or the unrelated question (zsRE) are its ``keep``. What tests
    the edit is kept as `probes`, which `mi_hops.reasoning.request_sets` makes queries of.

    Args:
        path: a JSON list of such records.
        second_hop: give each request the second-hop prompt that CREME needs: the first attribute prompt
            (about a subject that has the new object) in the words of the request's own. Records
            without one, zsRE's all, are dropped and reported.
        target: ``"new"``, the counterfactual object, or ``"true"``, the world's (zsRE: its first
            answer), which is what published tables for zsRE teach.
        on_error: what to do with a record that lacks a field: "raise", or "drop" with a note. A record
            without a target, or whose prompt does not name its subject exactly once, is always dropped.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not a JSON list of records of either kind.
        ValueError: another `target`; a second-hop prompt for the true object.

    Examples:
        >>> import json, tempfile
        >>> from mi_hops.editing import load_requests
        >>> record = {"case_id": 0, "requested_rewrite": {"prompt": "{} plays", "subject": "Ada Moss",
        ...     "target_new": {"str": "the harp"}, "target_true": {"str": "chess"}},
        ...     "attribute_prompts": ["Bo Lind plays"]}
        >>> path = f"{tempfile.mkdtemp()}/counterfact.json"
        >>> with open(path, "w") as file: json.dump([record], file)
        >>> load_requests(path, second_hop=True)[0].second_hop_prompt
        'Bo Lind plays'
    """
    if target not in ("new", "true"):
        raise ValueError(f'target is {target!r}; give "new" or "true"')
    if second_hop and target == "true":
        raise ValueError(
            "second_hop=True gives prompts about subjects that have the new object; "
            'it goes with target="new"'
        )

    def build(row: int, record: Any, fixes: RowFixes) -> _Read:
        if isinstance(record, dict) and "requested_rewrite" in record:
            return _counterfact(row, record, target, second_hop)
        if second_hop:
            raise DropRow("no second-hop prompt", "zsRE names no subject that has the new object")
        return _zsre(row, record, target)

    path = existing_file(path)
    found, source, n, dropped, repaired = collect_rows(
        read_records(path), build, source=str(path), on_error=on_error
    )
    probes = {one.id: one.probes for one in found}
    return Requests(tuple(one.request for one in found), source, n, dropped, repaired, probes)


@dataclass(frozen=True)
class _Read:
    request: Request
    probes: tuple[Probe, ...]

    @property
    def id(self) -> str:
        return self.request.id


def _counterfact(row: int, record: Any, target: str, second_hop: bool) -> _Read:
    rewrite = field_of(record, "requested_rewrite", dict)
    template, subject = (field_of(rewrite, name, str).strip() for name in ("prompt", "subject"))
    answer = field_of(field_of(rewrite, f"target_{target}", dict), "str", str).strip()
    against = f"target_{'true' if target == 'new' else 'new'}"
    other = field_of(rewrite[against], "str", str).strip() if against in rewrite else ""
    if template.count(_SLOT) != 1:
        raise BadRow("unreadable prompt", f"{template!r} has no slot '{{}}' for the subject")
    _needed(subject, answer)
    second, bridge = "", ""
    if second_hop:
        second, bridge = _in_the_same_words(template, texts_of(record, "attribute_prompts"))
    asked = template.replace(_SLOT, subject)
    keep, paraphrases = (
        _prompts(record, f"{name}_prompts") for name in ("neighborhood", "paraphrase")
    )
    _once(subject, asked)
    request = Request(
        two_hop_prompt=asked,
        second_hop_prompt=second,
        bridge=bridge,
        target=answer,
        first_hop=subject,
        keep=keep,
        id=f"counterfact-{record.get('case_id', row)}",
    )
    wrong = other or None
    probes = [Probe("efficacy", asked.strip(), answer, wrong=wrong)]
    probes += [Probe("wordings", text, answer, wrong=wrong) for text in paraphrases]
    # Of the neighbours the old object is true, whichever is taught.
    true, false = (other, answer) if target == "new" else (answer, wrong)
    if true:
        probes += [Probe("same_relation", text, true, wrong=false) for text in keep]
    return _Read(request, tuple(probes))


def _prompts(record: Any, name: str) -> tuple[str, ...]:
    """The different texts of a field that a record may lack."""
    texts = texts_of(record, name) if name in record else []
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _in_the_same_words(template: str, prompts: list[str]) -> tuple[str, str]:
    """The first prompt that fills the template, and what fills it."""
    start = template.index(_SLOT)
    for prompt in map(str.strip, prompts):
        span = counterpart(prompt, template, (start, start + len(_SLOT)))
        if span is not None and prompt[slice(*span)] == prompt[slice(*span)].strip():
            return prompt, prompt[slice(*span)]
    raise DropRow("no second-hop prompt", f"no attribute prompt in the words of {template!r}")


def _zsre(row: int, record: Any, target: str) -> _Read:
    asked, subject = (field_of(record, name, str).strip() for name in ("src", "subject"))
    new = [field_of(record, "alt", str).strip()] if target == "new" or "alt" in record else []
    true = texts_of(record, "answers") if target == "true" or "answers" in record else []
    answers, others = (new, true) if target == "new" else (true, new)
    answer = answers[0].strip() if answers else ""
    _needed(subject, answer)
    span = find(subject, asked)
    if span is None:
        raise DropRow("subject not in its question", f"{subject!r} is not in {asked!r}")
    _once(subject, asked)
    other = str(record.get("loc", "")).strip().removeprefix(_NQ)
    if other and not other.endswith("?"):
        other += "?"
    request = Request(
        two_hop_prompt=asked,
        target=answer,
        first_hop=asked[slice(*span)],
        keep=(other,) if other else (),
        id=f"zsre-{record.get('case_id', row)}",
    )
    wrong = others[0].strip() or None if others else None
    aliases = tuple(text.strip() for text in answers[1:] if text.strip())
    texts = {"efficacy": asked, "wordings": str(record.get("rephrase", "")).strip()}
    probes = [Probe(name, text, answer, aliases, wrong) for name, text in texts.items() if text]
    if other and (known := str(record.get("loc_ans", "")).strip()):
        probes.append(Probe("specificity", other, known))
    return _Read(request, tuple(probes))


def _once(subject: str, asked: str) -> None:
    if len(places_of(subject, asked)) > 1:
        raise DropRow("subject twice in its prompt", f"{subject!r} is more than once in {asked!r}")


def _needed(subject: str, answer: str) -> None:
    if not subject:
        raise BadRow("no subject", "the subject is empty")
    if not answer:
        raise DropRow("no target", f"nothing to teach about {subject!r}")
