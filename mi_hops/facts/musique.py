"""Two-hop facts from MuSiQue (Trivedi et al. 2022, arXiv 2108.00573), JSON Lines.

A record decomposes its question into steps, a later one naming an earlier answer as ``#1``. A step is
a question ("Who performed Green?") or a fact with its object left out ("Green >> performer").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.phrases import asks_who, counterpart, described, is_noun
from mi_hops.facts.reading import (
    BadRow,
    DropRow,
    Facts,
    OnError,
    RowFixes,
    collect,
    existing_file,
    field_of,
    line_object,
    read_lines,
    refuse_same,
    texts_of,
)
from mi_hops.facts.tables import find, refuse_named
from mi_hops.facts.templates import capitalise

_SLOT = "#1"
_ARROW = ">>"


@dataclass(frozen=True)
class _Step:
    """One step; `subject` and `relation` only of a fact with its object left out."""

    question: str
    answer: str
    subject: str = ""
    relation: str = ""


def load_musique(path: str | Path, *, on_error: OnError = "raise") -> Facts:
    """The two-hop questions of a MuSiQue file (``musique_ans_v1.0_dev.jsonl``) with identifiable hops.

    Of a record ``question``, ``answer``, ``answer_aliases`` and ``question_decomposition`` (``question``,
    ``answer`` of each step) are read, and ``id``, ``answerable`` where they are there. The texts that
    go with a question are not: facts are asked from what the model knows.

    * Both steps facts ("Green >> performer", "#1 >> spouse"): ``prompts["suffix"]`` is "The spouse of the
      performer of Green is", and the published question a paraphrase.
    * Otherwise ``prompts["question"]`` is the published question, if its words for the bridge can be told:
      they stand in the place of ``#1`` in the second step, or name the first step's relation and
      subject ("the Green performer").

    Dropped and reported: not two steps of which the second builds on the first; not answerable;
    first hop cannot be identified; a bridge that equals the answer or is named in a prompt.

    Args:
        path: the file.
        on_error: what to do with a malformed line: "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file.
        FactsFileError: a line that is no such record.
    """
    path = existing_file(path)
    return collect(read_lines(path), _fact, source=str(path), on_error=on_error)


def _fact(row: int, line: str, fixes: RowFixes) -> TwoHopFact:
    record = line_object(line)
    steps = [_step(s) for s in field_of(record, "question_decomposition", list)]
    question = field_of(record, "question", str).strip()
    answer = field_of(record, "answer", str).strip()
    if record.get("answerable", True) is False:
        raise DropRow("not answerable", f"{question!r} has no answer in its texts")
    if len(steps) != 2 or "#" in steps[0].question or steps[1].question.count(_SLOT) != 1:
        raise DropRow("not two hops", f"{[s.question for s in steps]!r:.160}")
    first, second = steps
    bridge = first.answer
    if not bridge or not answer:
        raise BadRow("empty answer", f"the answers are {bridge!r} and {answer!r}")
    refuse_same(bridge, answer)
    names = _by_relations(first, second, bridge) or _by_question(question, first, second, bridge)
    if names is None:
        raise DropRow("first hop cannot be identified", f"{first.question!r} in {question!r}")
    for prompt in names["prompts"].values():
        refuse_named(bridge, prompt)
    rest = () if question in names["prompts"].values() else (question,)
    if any(find(bridge, text) for text in rest):
        fixes.note("paraphrase names the bridge", f"left out {question!r}")
        rest = ()
    return TwoHopFact(
        id=str(record.get("id", f"musique-{row}")),
        subject=first.subject or names["first_hop"],
        relation1=first.relation or first.question,
        bridge=bridge,
        relation2=second.relation or second.question,
        answer=answer,
        paraphrases=rest,
        answer_aliases=tuple(a for a in texts_of(record, "answer_aliases") if a != answer),
        meta={"dataset": "musique", "row": row},
        **names,
    )


def _step(record: Any) -> _Step:
    question = field_of(record, "question", str).strip()
    answer = field_of(record, "answer", str).strip()
    subject, arrow, relation = (part.strip() for part in question.partition(_ARROW))
    if not arrow:
        return _Step(question, answer)
    return _Step(question, answer, subject, relation)


def _by_relations(first: _Step, second: _Step, bridge: str) -> dict[str, Any] | None:
    """Prompts of two facts with their objects left out; None where one is something else."""
    if not (first.relation and second.relation and second.subject == _SLOT):
        return None
    if not (is_noun(first.relation) and is_noun(second.relation)):
        return None
    phrase = f"the {first.relation} of {first.subject}"
    return {
        "first_hop": phrase,
        "prompts": {"suffix": f"The {second.relation} of {phrase} is"},
        "first_prompts": {"suffix": f"{capitalise(phrase)} is"},
        "second_prompts": {"suffix": f"The {second.relation} of {bridge} is"},
    }


def _by_question(question: str, first: _Step, second: _Step, bridge: str) -> dict[str, Any] | None:
    """Prompts around the published question; None where its first hop cannot be identified."""
    span, told = None, ""
    if not second.relation:
        start = second.question.index(_SLOT)
        span = counterpart(question, second.question, (start, start + len(_SLOT)))
        told = second.question.replace(_SLOT, bridge)
    if span is None and first.relation:
        span = described(question, first.subject, first.relation)
        told = ""
    if span is None:
        return None
    phrase = question[slice(*span)]
    asked = first.question
    if first.relation:
        asked = f"{asks_who(first.relation)} is {phrase[:1].lower() + phrase[1:]}?"
    told = told or question[: span[0]] + bridge + question[span[1] :]
    return {
        "first_hop": phrase,
        "prompts": {"question": question},
        "first_prompts": {"question": asked},
        "second_prompts": {"question": told},
    }
