"""Wordings for the Wikidata relations of the MQuAKE benchmark: our own, and a user's templates.

Every noun phrase ends in its slot, so that in the suffix order the first hop comes at the end of
the prompt, right before "is". Statements and questions can be replaced by the benchmark's template
files (``cloze_templates.json`` and ``question_templates.json``: relation id -> template); noun
phrases are in neither of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mi_hops.facts.reading import FactsFileError, existing_file, read_json
from mi_hops.facts.templates import SLOT, Wording

CLOZE_FILE = "cloze_templates.json"
QUESTION_FILE = "question_templates.json"

#: Marks the place of the answer at the end of a cloze template.
BLANK = "__"

_FILE = Path(__file__).parent.parent / "data" / "mquake-words.json"


def _own_wordings() -> Mapping[str, Wording]:
    """Noun phrases that end in their slot, statements that start with it, and whole questions."""
    return {
        relation: Wording(f"{noun} {SLOT}", f"{SLOT} {statement}", question)
        for relation, (noun, statement, question) in read_json(_FILE).items()
    }


#: Wikidata relation id -> wording.
WORDINGS = _own_wordings()


def load_wordings(templates: str | Path | None = None) -> dict[str, Wording]:
    """Relation id -> `Wording`: our noun phrases with our own or a folder's other templates.

    Args:
        templates: a folder with ``cloze_templates.json`` ("[X] is a citizen of __"; the text from
            " __" on is cut) and, if there, ``question_templates.json``. Relations that they lack
            keep our wording; relations of theirs without a noun phrase of ours are left out.

    Raises:
        FileNotFoundError: no such folder, or no cloze templates in it.
        FactsFileError: a file that is not a JSON object of templates with one slot ``[X]`` each,
            or a cloze that does not end in its blank.
    """
    if templates is None:
        return dict(WORDINGS)
    folder = Path(templates)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give the folder that holds {CLOZE_FILE}"
        )
    clozes = _read_templates(folder / CLOZE_FILE)
    for relation, template in clozes.items():
        if not template.rstrip().endswith(f" {BLANK}"):
            raise FactsFileError(
                f"{folder / CLOZE_FILE}: {relation}: {template!r} must end in ' {BLANK}'"
            )
    questions = folder / QUESTION_FILE
    asked = _read_templates(questions) if questions.exists() else {}
    return {
        relation: Wording(
            own.noun,
            clozes[relation].split(f" {BLANK}")[0] if relation in clozes else own.statement,
            asked.get(relation, own.question),
        )
        for relation, own in WORDINGS.items()
    }


def _read_templates(path: Path) -> dict[str, str]:
    templates = read_json(existing_file(path))
    if not isinstance(templates, dict) or not templates:
        raise FactsFileError(f"{path}: expected a JSON object of relation id -> template")
    for relation, template in templates.items():
        if not isinstance(template, str) or template.count(SLOT) != 1:
            raise FactsFileError(
                f"{path}: {relation}: {template!r} must be a text with {SLOT} exactly once"
            )
    return templates
