"""Two-hop facts from the JSON of MQuAKE-CF (Zhong et al. 2023, arXiv 2305.14795).

The benchmark's records hold chains of two to four facts, questions about them, and counterfactual
edits. The chains of two become facts as the world has them; the edits are not read. Their prompts
are built by the rule of CREME (arXiv 2402.14328), in both template orders.
`mquake_edits` reads what the edits make of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.mquake_words import load_wordings
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
    texts_of,
    triple,
)
from mi_hops.facts.tables import find, refuse_named
from mi_hops.facts.templates import SLOT, Wording, capitalise

_ARTICLE = "the "


def load_mquake(
    path: str | Path,
    *,
    templates: str | Path | None = None,
    wordings: Mapping[str, Wording] | None = None,
    edited: bool = False,
    on_error: OnError = "raise",
) -> Facts:
    """The two-hop facts of a file of MQuAKE-CF's form.

    The file is a list of records of which these fields are read: ``questions``, ``answer``,
    ``answer_alias``, ``single_hops`` (``question``, ``answer``, ``answer_alias``), and in ``orig``
    ``triples`` (ids: subject, relation, object) and ``triples_labeled``. ``case_id`` is kept in the
    fact's id where it is there.

    With the noun phrase of each relation ("the author of [X]") and its statement ("[X] is a citizen
    of"), hop1 being the first relation's noun phrase about the subject:

    * ``prompts["suffix"]`` is the second noun phrase about hop1, and " is";
    * ``prompts["prefix"]`` is the second statement about hop1, left out where that is the same;
    * ``prompts["question"]`` is the first of the record's questions that has hop1 in it, otherwise
      the second relation's question about hop1; the record's other questions are paraphrases;
    * the prompts of single hops are the same wordings about the subject and about the bridge, with
      the record's question of that hop.

    Dropped and reported: a chain that does not have two hops or whose facts do not meet in one entity; a
    relation without wording; a bridge that equals the answer or appears in a two-hop prompt.
    Repaired and reported: a paraphrase that names the bridge is left out; an article doubled by a
    template ("the [X]" about "the author ...") is removed.

    Args:
        path: the JSON file.
        templates: folder of the benchmark's cloze and question templates, instead of our own
            statements and questions (see `load_wordings`).
        edited: the chains as each record's edits leave them: ``new_single_hops``, ``new_answer``,
            ``new_answer_alias``, ``new_triples`` and ``new_triples_labeled`` in the place of the
            fields above. The facts' ids end in the new answer, and ``meta["edited"]`` numbers the hops
            that an edit (``edit_triples``) gave their object, from 1.
        wordings: relation id -> wording, added to the table and winning over it.
        on_error: what to do with a record that lacks a field: "raise", or "drop" with a note.

    Raises:
        FileNotFoundError: no such file or folder.
        FactsFileError: not a JSON list of such records; the message has the line or the record.
    """
    table = load_wordings(templates) | dict(wordings or {})
    records = read_records(existing_file(path))

    def build(row: int, record: Any, fixes: RowFixes) -> TwoHopFact:
        return _fact(row, _edited(record) if edited else record, table, fixes)

    return collect(records, build, source=str(path), on_error=on_error)


def _fact(row: int, record: Any, table: Mapping[str, Wording], fixes: RowFixes) -> TwoHopFact:
    hops = field_of(record, "single_hops", list)
    original = field_of(record, "orig", dict)
    triples = field_of(original, "triples", list)
    if (len(hops), len(triples)) != (2, 2):
        raise DropRow("not two hops", f"{len(hops)} single hops and {len(triples)} triples")
    labels = [triple(t) for t in field_of(original, "triples_labeled", list)]
    (subject_id, relation1, bridge_id), (meets, relation2, answer_id) = map(triple, triples)
    if len(labels) != 2:
        raise BadRow("unreadable record", f"{len(labels)} labelled triples for two hops")
    if bridge_id != meets:
        raise DropRow("hops do not meet", f"one ends in {bridge_id}, the next starts from {meets}")
    for relation in (relation1, relation2):
        if relation not in table:
            raise DropRow("relation without wording", f"no noun phrase for {relation}")

    (subject, _, bridge), (_, _, label) = labels
    answer = field_of(record, "answer", str).strip()
    refuse_same(bridge, answer)
    builder = _Prompts(fixes)
    first, second = table[relation1], table[relation2]
    phrase = builder.fill(first.noun, subject)
    prompts = builder.about(second, phrase)
    questions = [q.strip() for q in texts_of(record, "questions") if q.strip()]
    asked = next((q for q in questions if find(phrase, q) is not None), None)
    prompts["question"] = asked or prompts["question"]
    for prompt in prompts.values():
        refuse_named(bridge, prompt)

    return TwoHopFact(
        id=f"mquake-{record.get('case_id', row)}{record.get('id_suffix', '')}",
        subject=subject,
        relation1=relation1,
        bridge=bridge,
        relation2=relation2,
        answer=answer,
        first_hop=phrase,
        prompts=prompts,
        first_prompts=builder.about(first, subject) | _asked(hops[0]),
        second_prompts=builder.about(second, bridge) | _asked(hops[1]),
        paraphrases=_without_bridge([q for q in questions if q != asked], bridge, fixes),
        bridge_aliases=_others(bridge, hops[0]),
        answer_aliases=_others(answer, hops[1], *texts_of(record, "answer_alias"), label),
        meta={
            "dataset": "mquake",
            "row": row,
            "subject_id": subject_id,
            "bridge_id": bridge_id,
            "answer_id": answer_id,
            **({"edited": record["edited"]} if "edited" in record else {}),
        },
    )


def _edited(record: Any) -> dict[str, Any]:
    """The record as its edits leave it, with which hops they are about."""
    original = field_of(record, "orig", dict)
    triples = [triple(t) for t in field_of(original, "new_triples", list)]
    changed = {triple(t) for t in field_of(original, "edit_triples", list)}
    answer = field_of(record, "new_answer", str).strip()
    return {
        **record,
        "single_hops": field_of(record, "new_single_hops", list),
        "answer": answer,
        "answer_alias": texts_of(record, "new_answer_alias"),
        "orig": {
            **original,
            "triples": triples,
            "triples_labeled": field_of(original, "new_triples_labeled", list),
        },
        "edited": [k for k, hop in enumerate(triples, start=1) if hop in changed],
        "id_suffix": f" -> {answer}",
    }


class _Prompts:
    """Fills wordings, noting each doubled article once."""

    def __init__(self, fixes: RowFixes) -> None:
        self._fixes = fixes

    def fill(self, template: str, thing: str) -> str:
        """`template` about `thing`; "the [X]" about "the author" has one article."""
        before, after = template.split(SLOT)
        doubled = before + thing
        opened = f" {before}".casefold().endswith(f" {_ARTICLE}")
        if opened and thing.casefold().startswith(_ARTICLE):
            thing = thing[len(_ARTICLE) :]
            self._fixes.note("doubled article", f"{doubled!r} became {before + thing!r}")
        return before + thing + after

    def about(self, wording: Wording, thing: str) -> dict[str, str]:
        """All forms about `thing`, without a prefix form that only repeats the suffix form."""
        prompts = {"suffix": capitalise(self.fill(wording.noun, thing)) + " is"}
        prefix = capitalise(self.fill(wording.statement, thing))
        if prefix != prompts["suffix"]:
            prompts["prefix"] = prefix
        prompts["question"] = capitalise(self.fill(wording.question, thing))
        return prompts


def _asked(hop: Any) -> dict[str, str]:
    question = field_of(hop, "question", str).strip()
    return {"question": question} if question else {}


def _others(name: str, hop: Any, *more: str) -> tuple[str, ...]:
    """Every other spelling of `name`, in order, each once."""
    spellings = (field_of(hop, "answer", str), *texts_of(hop, "answer_alias"), *more)
    others = dict.fromkeys(text.strip() for text in spellings)
    return tuple(text for text in others if text and text != name)


def _without_bridge(questions: list[str], bridge: str, fixes: RowFixes) -> tuple[str, ...]:
    kept = tuple(q for q in questions if find(bridge, q) is None)
    for question in questions:
        if question not in kept:
            fixes.note("paraphrase names the bridge", f"left out {question!r}")
    return kept
