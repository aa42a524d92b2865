"""Facts of two to four hops from the JSON of MQuAKE-CF (Zhong et al. 2023, arXiv 2305.14795).

The benchmark's records hold chains of facts, questions about them, and counterfactual edits. The
chains become facts as the world has them; `mquake_edits` reads what the edits make of them. Their
prompts are built by the rule of CREME (arXiv 2402.14328), in both template orders, for longer chains
over and over.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hops import Hop
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
    refuse_repeated,
    refuse_same,
    texts_of,
    triple,
)
from mi_hops.facts.tables import find, refuse_named
from mi_hops.facts.templates import SLOT, Wording, capitalise, without_article


def load_mquake(
    path: str | Path,
    *,
    templates: str | Path | None = None,
    wordings: Mapping[str, Wording] | None = None,
    edited: bool = False,
    on_error: OnError = "raise",
) -> Facts:
    """Facts from a file in MQuAKE-CF's format, with as many hops as each record has.

    The file is a list of records of which these fields are read: ``questions``, ``answer``,
    ``answer_alias``, ``single_hops`` (``question``, ``answer``, ``answer_alias``), and in ``orig``
    ``triples`` (ids: subject, relation, object) and ``triples_labeled``. ``case_id`` is kept in the
    fact's id where it is there.

    With the noun phrase of each relation ("the author of [X]") and its statement ("[X] is a citizen
    of"), and with *phrase* k being the k-th relation's noun phrase about phrase k - 1 (phrase 0 the
    subject), which describes bridge k:

    * ``prompts["suffix"]`` is the last noun phrase about the last bridge's phrase, and " is";
    * ``prompts["prefix"]`` is the last statement about it, left out where that is the same;
    * ``prompts["question"]`` is the first of the record's questions that has that phrase in it,
      otherwise the last relation's question about it; the record's other questions are paraphrases;
    * the prompts of single hops are the same wordings about the subject and about each bridge, with
      the record's question of that hop.

    A fact of more than two hops is seen from its last bridge (see `TwoHopFact.at`).

    Dropped and reported: a chain of fewer than two hops, or whose facts do not meet in one entity; a
    relation without wording; an entity that occurs twice; a bridge that appears in a prompt of the
    whole question. Repaired and reported: a paraphrase that names a bridge is left out; an article
    doubled by a template ("the [X]" about "the author ...") is removed.

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
    singles = field_of(record, "single_hops", list)
    original = field_of(record, "orig", dict)
    triples = [triple(t) for t in field_of(original, "triples", list)]
    labels = [triple(t) for t in field_of(original, "triples_labeled", list)]
    if len(singles) != len(triples) or len(triples) < 2:
        raise DropRow("no chain of hops", f"{len(singles)} single hops and {len(triples)} triples")
    if len(labels) != len(triples):
        raise BadRow("unreadable record", f"{len(labels)} labelled triples for {len(triples)} hops")
    for (_, _, end), (start, _, _) in pairwise(triples):
        if end != start:
            raise DropRow("hops do not meet", f"one ends in {end}, the next starts from {start}")
    for _, relation, _ in triples:
        if relation not in table:
            raise DropRow("relation without wording", f"no noun phrase for {relation}")

    answer = field_of(record, "answer", str).strip()
    names = [labels[0][0], *(name for _, _, name in labels[:-1]), answer]
    refuse_same(names[-2], answer)
    refuse_repeated(names)
    relations = [relation for _, relation, _ in triples]
    phrases = [names[0]]  # what the next hop is asked about
    for relation in relations[:-1]:
        phrases.append(_fill(table[relation].noun, phrases[-1], fixes))
    prompts = _about(table[relations[-1]], phrases[-1], fixes)
    questions = [q.strip() for q in texts_of(record, "questions") if q.strip()]
    chosen = next((q for q in questions if find(phrases[-1], q) is not None), None)
    prompts["question"] = chosen or prompts["question"]
    bridges = names[1:-1]
    for prompt in prompts.values():
        for bridge in bridges:
            refuse_named(bridge, prompt)

    more: list[tuple[str, ...]] = [()] * len(bridges)
    more.append((*texts_of(record, "answer_alias"), labels[-1][2]))
    hops = [
        Hop(
            relation=relation,
            object=name,
            phrase=phrase,
            prompts=_about(table[relation], before, fixes) | _asked(single),
            aliases=_others(name, single, *others),
        )
        for relation, before, name, phrase, single, others in zip(
            relations, names, names[1:], [*phrases[1:], ""], singles, more, strict=False
        )
    ]
    ids = [triples[0][0], *(end for _, _, end in triples)]
    between = {"bridge_id": ids[1]} if len(bridges) == 1 else {"bridge_ids": ids[1:-1]}
    return TwoHopFact.from_hops(
        hops,
        id=f"mquake-{record.get('case_id', row)}{record.get('id_suffix', '')}",
        subject=names[0],
        prompts=prompts,
        paraphrases=_without([q for q in questions if q != chosen], bridges, fixes),
        meta={
            "dataset": "mquake",
            "row": row,
            "subject_id": ids[0],
            **between,
            "answer_id": ids[-1],
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


def _fill(template: str, thing: str, fixes: RowFixes) -> str:
    """`template` about `thing`; "the [X]" about "the author" has one article, which is noted."""
    before, after = template.split(SLOT)
    said = without_article(thing, before)
    if said != thing:
        fixes.note("doubled article", f"{before + thing!r} became {before + said!r}")
    return before + said + after


def _about(wording: Wording, thing: str, fixes: RowFixes) -> dict[str, str]:
    """All forms about `thing`, without a prefix form that only repeats the suffix form."""
    prompts = {"suffix": f"{capitalise(_fill(wording.noun, thing, fixes))} {wording.verb}"}
    prefix = capitalise(_fill(wording.statement, thing, fixes))
    if prefix != prompts["suffix"]:
        prompts["prefix"] = prefix
    prompts["question"] = capitalise(_fill(wording.question, thing, fixes))
    return prompts


def _asked(hop: Any) -> dict[str, str]:
    question = field_of(hop, "question", str).strip()
    return {"question": question} if question else {}


def _others(name: str, hop: Any, *more: str) -> tuple[str, ...]:
    """Every other spelling of `name`, in order, each once."""
    spellings = (field_of(hop, "answer", str), *texts_of(hop, "answer_alias"), *more)
    others = dict.fromkeys(text.strip() for text in spellings)
    return tuple(text for text in others if text and text != name)


def _without(questions: list[str], bridges: list[str], fixes: RowFixes) -> tuple[str, ...]:
    """The questions that name no bridge."""
    kept = tuple(q for q in questions if not any(find(bridge, q) for bridge in bridges))
    for question in questions:
        if question not in kept:
            fixes.note("paraphrase names the bridge", f"left out {question!r}")
    return kept
