"""Wordings for the Wikidata relations of the MQuAKE benchmark: our own, and a user's templates.

Every noun phrase ends in its slot, so that in the suffix order the first hop stands at the end of
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


def _own(noun: str, statement: str, question: str) -> Wording:
    """A wording whose noun phrase ends in its slot and whose statement starts with it."""
    return Wording(f"{noun} {SLOT}", f"{SLOT} {statement}", question)


#: Wikidata relation id -> wording.
WORDINGS: Mapping[str, Wording] = {
    # places
    "P17": _own("the country that contains", "lies in the country of", "Which country is [X] in?"),
    "P30": _own(
        "the continent that contains", "lies on the continent of", "What continent is [X] on?"
    ),
    "P36": _own("the capital of", "has its capital at", "Which city is the capital of [X]?"),
    "P131": _own("the region that contains", "lies in the region of", "Which region is [X] in?"),
    "P159": _own(
        "the home city of", "has its headquarters in", "Where does [X] have its headquarters?"
    ),
    "P190": _own("the twin town of", "is twinned with", "Which place is [X] twinned with?"),
    "P276": _own("the location of", "can be found in", "Where can [X] be found?"),
    "P495": _own(
        "the country of origin of", "comes from the country of", "Which country does [X] come from?"
    ),
    "P740": _own("the founding place of", "was set up in", "In which place was [X] set up?"),
    # a person's life
    "P19": _own("the birthplace of", "was born in", "Where was [X] born?"),
    "P20": _own("the place of death of", "died in", "Where did [X] die?"),
    "P26": _own("the spouse of", "is married to", "To whom is [X] married?"),
    "P27": _own(
        "the country of citizenship of", "holds a passport of", "Of which country is [X] a citizen?"
    ),
    "P40": _own("the child of", "is the parent of", "Whose parent is [X]?"),
    "P69": _own("the alma mater of", "studied at", "Where did [X] study?"),
    "P106": _own("the occupation of", "has the occupation of", "What does [X] do for a living?"),
    "P108": _own("the employer of", "has a job with", "For whom does [X] work?"),
    "P140": _own(
        "the religion of", "follows the religion called", "What religion does [X] follow?"
    ),
    "P413": _own(
        "the playing position of", "plays in the position of", "In which position does [X] play?"
    ),
    "P463": _own(
        "the organisation joined by", "belongs to", "What organisation does [X] belong to?"
    ),
    "P641": _own("the sport of", "takes part in the sport of", "What sport does [X] take part in?"),
    "P800": _own("the best-known work of", "is best known for", "What is [X] best known for?"),
    "P937": _own("the place of work of", "did their work in", "Where did [X] work?"),
    # works, products and their makers
    "P50": _own("the author of", "is a text by", "Who wrote [X]?"),
    "P136": _own("the genre of", "belongs to the genre of", "What genre does [X] belong to?"),
    "P170": _own("the creator of", "is the creation of", "Who made [X]?"),
    "P175": _own(
        "the performer of", "became known in a performance by", "Whose performance is [X]?"
    ),
    "P176": _own("the manufacturer of", "is manufactured by", "Who manufactures [X]?"),
    "P178": _own("the developer of", "is a development of", "Who developed [X]?"),
    "P264": _own(
        "the record label of", "releases records with", "Which label releases the records of [X]?"
    ),
    "P449": _own("the original broadcaster of", "was first shown by", "Who first showed [X]?"),
    # languages
    "P37": _own(
        "the official language of",
        "has as its official language",
        "What language is official in [X]?",
    ),
    "P364": _own(
        "the original language of", "was originally made in", "In what language was [X] first made?"
    ),
    "P407": _own("the language of", "is a text in", "In what language is [X]?"),
    "P1412": _own("the language spoken by", "speaks", "Which language is spoken by [X]?"),
    # organisations, offices and those who hold them
    "P6": _own(
        "the head of government of", "has a government led by", "Who leads the government of [X]?"
    ),
    "P35": _own("the head of state of", "has as its head of state", "Who is head of state of [X]?"),
    "P112": _own("the founder of", "owes its founding to", "By whom was [X] founded?"),
    "P127": _own("the owner of", "is the property of", "To whom does [X] belong?"),
    "P169": _own(
        "the chief executive of", "has as its chief executive", "Which chief executive runs [X]?"
    ),
    "P286": _own("the head coach of", "is coached by", "Who coaches [X]?"),
    "P488": _own("the chairperson of", "is chaired by", "Who chairs [X]?"),
    "P1037": _own("the director of", "is under the direction of", "Who directs [X]?"),
    "P1308": _own(
        "the holder of the office of", "is an office held by", "Who holds the office of [X]?"
    ),
}


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
