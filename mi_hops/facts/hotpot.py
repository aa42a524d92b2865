"""Two-hop facts from HotpotQA (arXiv 1809.09600) and 2WikiMultiHopQA (arXiv 2011.01060), which share a layout.

2WikiMultiHopQA tells the chain of facts behind a question (``evidences``); HotpotQA only which paragraphs
are needed, so less can be told of its questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.phrases import asks_who, bare, described
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    Facts,
    OnError,
    RowFixes,
    collect,
    existing_file,
    field_of,
    read_records,
    refuse_same,
    triple,
)
from mi_hops.facts.tables import UNNAMED_RELATIONS, find, refuse_named

_EVIDENCES = "evidences"


def load_hotpot(path: str | Path, *, on_error: OnError = "raise") -> Facts:
    """The two-hop questions of a HotpotQA or 2WikiMultiHopQA file whose hops can be identified.

    A record with ``evidences`` is read as 2WikiMultiHopQA's: two facts [subject, relation, object], the
    first ending where the second starts. The first hop is the question's words for the first fact
    ("the director of film Ran", "Ran's director"); the single-hop questions are "Who is the director of
    film Ran?" and the question with the bridge in the place of those words.

    Any other record is read as HotpotQA's, of type "bridge": of its two supporting paragraphs one
    is named in the question (the subject), and its sentences name the other, the bridge, whose
    paragraph holds the answer. Where the words for the bridge begin is not told, so ``first_hop`` is the
    subject as the question names it, and there are no single-hop prompts: such facts serve the lens, erasure and
    injection, not the gap.

    Dropped and reported: comparisons; facts that do not meet; a first hop or bridge that cannot be
    told; a bridge that equals the answer or is named in the question.

    Args:
        path: a JSON list of records with ``question``, ``answer``, ``type`` and ``evidences``, or
            ``supporting_facts`` ([title, sentence]) and ``context`` ([title, sentences]).
        on_error: what to do with a malformed record: "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: not a JSON list of such records.
    """
    path = existing_file(path)
    return collect(read_records(path), _fact, source=str(path), on_error=on_error)


def _fact(row: int, record: Any, fixes: RowFixes) -> TwoHopFact:
    question = field_of(record, "question", str).strip()
    answer = field_of(record, "answer", str).strip()
    kind = field_of(record, "type", str)
    if "comparison" in kind:
        raise DropRow("a comparison", f"{question!r} compares two things")
    if not answer:
        raise BadRow("empty answer", f"{question!r} has no answer")
    if _EVIDENCES in record:
        told = _from_evidences(record, question)
    else:
        told = _from_paragraphs(record, question, answer)
    refuse_same(told["bridge"], answer)
    refuse_named(told["bridge"], question)
    dataset = "2wikimultihopqa" if _EVIDENCES in record else "hotpotqa"
    return TwoHopFact(
        id=str(record.get("_id", f"{dataset}-{row}")),
        answer=answer,
        prompts={"question": question},
        meta={"dataset": dataset, "row": row, "type": kind},
        **told,
    )


def _from_evidences(record: Any, question: str) -> dict[str, Any]:
    facts = [triple(t) for t in field_of(record, _EVIDENCES, list)]
    if len(facts) != 2:
        raise DropRow("not two hops", f"{len(facts)} facts behind {question!r}")
    (subject, relation1, bridge), (meets, relation2, _) = facts
    if bridge.casefold() != meets.casefold():
        raise DropRow("hops do not meet", f"one ends in {bridge!r}, the next starts from {meets!r}")
    span = described(question, subject, relation1)
    if span is None:
        raise DropRow(
            "first hop cannot be identified", f"{relation1!r} of {subject!r} in {question!r}"
        )
    phrase = question[slice(*span)]
    return {
        "subject": subject,
        "relation1": relation1,
        "bridge": bridge,
        "relation2": relation2,
        "first_hop": phrase,
        "first_prompts": {"question": f"{asks_who(relation1)} is {phrase}?"},
        "second_prompts": {"question": question[: span[0]] + bridge + question[span[1] :]},
    }


def _from_paragraphs(record: Any, question: str, answer: str) -> dict[str, Any]:
    pairs = field_of(record, "supporting_facts", list)
    texts = {_title(p): p[1] for p in field_of(record, "context", list)}
    titles = list(dict.fromkeys(map(_title, pairs)))
    if len(titles) != 2 or any(t not in texts for t in titles):
        raise DropRow("not two paragraphs", f"{question!r} needs the paragraphs {titles}")
    named = {title: span for title in titles if (span := find(bare(title), question))}
    if len(named) != 1:
        raise DropRow(
            f"{'both paragraphs' if named else 'neither paragraph'} named in the question",
            f"{titles} in {question!r}",
        )
    ((subject, span),) = named.items()
    (other,) = (title for title in titles if title != subject)
    bridge = bare(other)
    supporting = [p[1] for p in pairs if _title(p) == subject]
    said = [s for i, s in enumerate(texts[subject]) if i in supporting]
    if find(bridge, " ".join(map(str, said))) is None:
        raise DropRow("bridge cannot be identified", f"{bridge!r} is not in what {subject!r} says")
    if find(answer, " ".join(map(str, texts[other]))) is None:
        raise DropRow("answer not in the bridge's paragraph", f"{answer!r} of {bridge!r}")
    return {
        "subject": bare(subject),
        "relation1": UNNAMED_RELATIONS[0],
        "bridge": bridge,
        "relation2": UNNAMED_RELATIONS[1],
        "first_hop": question[slice(*span)],
    }


def _title(pair: Any) -> str:
    """The title of [title, ...]."""
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
        raise BadRow("unreadable record", f"{pair!r:.80} is not a list [title, ...]")
    return pair[0]
