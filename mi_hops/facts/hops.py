"""The hops of a fact, and every question about a part of a chain.

A chain is asked by nested descriptions: "The currency of *the country that contains the city served
by Haneda Airport*" describes Japan by Tokyo, and Tokyo by its airport. So a chain needs only its own
prompts, a description of each bridge and the questions of its single hops; any question in between
follows by putting a name in the place of its description, or the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mi_hops.facts.templates import (
    Wording,
    capitalise,
    first_hop_phrase,
    prompts_about,
    without_article,
)


def several_texts(texts: Iterable[str], what: str) -> tuple[str, ...]:
    """The texts as a tuple; refuses a single one, which would fall into its characters.

    Raises:
        ValueError: a string.
    """
    if isinstance(texts, str):
        raise ValueError(f"{what}: got the text {texts!r}; expected a list of texts, [{texts!r}]")
    return tuple(texts)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One hop: a relation, its object, and how it is asked.

    Attributes:
        relation: its name or id.
        object: the entity it leads to.
        phrase: describes the object in the prompts of the whole chain ("the author of Misery");
            empty for the last hop.
        prompts: form -> prompt that asks for the object, naming the entity before it.
        aliases: other accepted spellings of the object.
        in_text: how the object is named in running text where that differs ("the Netherlands").
    """

    relation: str
    object: str
    phrase: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    in_text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aliases", several_texts(self.aliases, "aliases of a hop"))

    @property
    def text(self) -> str:
        """The object as written in running text."""
        return self.in_text or self.object

    def to_dict(self) -> dict[str, Any]:
        """Plain types; empty fields are left out."""
        plain = {**vars(self), "prompts": dict(self.prompts), "aliases": list(self.aliases)}
        return {name: value for name, value in plain.items() if value}


def worded(
    hops: Sequence[Hop], wordings: Sequence[Wording], subject: str
) -> tuple[tuple[Hop, ...], dict[str, str]]:
    """The hops asked in other words, and the prompts of the whole chain: form -> prompt.

    Args:
        wordings: one for each hop.
        subject: as running text names it.

    Raises:
        ValueError: another number of wordings than hops.
    """
    if len(wordings) != len(hops):
        raise ValueError(f"got {len(wordings)} wordings for {len(hops)} hops; give one for each")
    phrase = thing = subject
    found, prompts = [], {}
    for k, (hop, wording) in enumerate(zip(hops, wordings, strict=True), start=1):
        prompts = prompts_about(wording, phrase)
        phrase = first_hop_phrase(wording, phrase) if k < len(hops) else ""
        found.append(replace(hop, prompts=prompts_about(wording, thing), phrase=phrase))
        thing = hop.text
    return tuple(found), prompts


def asked(
    hops: Sequence[Hop], prompts: Mapping[str, str], start: int, end: int
) -> Mapping[str, str]:
    """Form -> prompt that asks for the entity `end` hops after the subject, from the one `start` after.

    Single hops and the whole chain are asked as given. What ends with the chain is the chain's own
    prompt with the name of entity `start` in the place of its description; what ends before is the
    question of its last hop with a description in the place of a name. A form whose text does not
    hold what is to be replaced, exactly once, is left out.
    """
    if (start, end) == (0, len(hops)):
        return prompts
    if end - start == 1:
        return hops[start].prompts
    if end == len(hops):
        frame, old, new = prompts, hops[start - 1].phrase, hops[start - 1].text
    else:
        frame, old, new = hops[end - 1].prompts, hops[end - 2].text, phrase(hops, start, end - 1)
    made = {form: put(text, old, new) for form, text in frame.items()}
    return {form: text for form, text in made.items() if text}


def phrase(hops: Sequence[Hop], start: int, end: int) -> str:
    """The description of entity `end` from entity `start`; empty where it cannot be made."""
    whole = hops[end - 1].phrase
    return put(whole, hops[start - 1].phrase, hops[start - 1].text) if start else whole


def put(text: str, old: str, new: str) -> str:
    """`text` with `new` in the place of its one `old`; empty where there is none, or several.

    Without regard to the case of the first letter, as whole words. At the beginning of a line the
    new one begins with a capital; an article is not doubled.

    Examples:
        >>> put("The home of the author of Misery is", "the author of Misery", "Stephen King")
        'The home of Stephen King is'
    """
    if not old or not new:
        return ""
    first = f"[{re.escape(old[0].lower())}{re.escape(old[0].upper())}]" if old[0].isalpha() else ""
    rest = old[1:] if first else old
    found = list(re.finditer(rf"(?<!\w){first}{re.escape(rest)}(?!\w)", text))
    if len(found) != 1:
        return ""
    start, end = found[0].span()
    before = text[:start]
    begins = not before or before.endswith("\n")
    new = capitalise(new) if begins else without_article(new, before)
    return before + new + text[end:]


def repeated(names: Sequence[str]) -> str:
    """The first name that occurs a second time, whatever its case; empty where all differ."""
    seen: set[str] = set()
    for name in names:
        folded = name.strip().casefold()
        if folded in seen:
            return name
        seen.add(folded)
    return ""
