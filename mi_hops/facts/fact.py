"""The unit of work: one two-hop fact and the prompts that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mi_hops.facts.templates import Wording, first_hop_phrase, prompts_about
from mi_hops.result.display import shorten


@dataclass(frozen=True, kw_only=True, repr=False)
class TwoHopFact:
    """A chain ``subject --relation1--> bridge --relation2--> answer`` and its prompts.

    Prompts end right before the answer, without a trailing space, and are keyed by *form*:
    ``"suffix"`` (relation first, "The citizenship of the author of Misery is"), ``"prefix"``
    (subject first, "The author of Misery is a citizen of"), ``"question"`` ("What is ...?").
    A fact needs at least one form in `prompts`; the other tables may lack forms.

    Attributes:
        id: unique within a set of facts.
        subject: the entity named in the prompt.
        relation1, relation2: names (or ids) of the two relations.
        bridge: the entity between the hops; it does not appear in the two-hop prompt.
        answer: the object of the second hop, possibly several tokens.
        first_hop: the phrase that describes the bridge, as it appears in the prompts
            ("the author of Misery"); located without regard to the case of its first letter.
        prompts: form -> two-hop prompt.
        first_prompts: form -> prompt whose answer is the bridge.
        second_prompts: form -> prompt about the bridge whose answer is `answer`.
        paraphrases: further two-hop prompts with the same answer.
        bridge_aliases, answer_aliases: other accepted spellings; used in matching only.
        split: free label, e.g. ``"train"``, ``"seen_parts"``, ``"first_unseen"``.
        meta: anything a loader wants to keep. `with_wording` reads ``in_text``, how subject,
            bridge and answer are named in running text where that differs ("the Netherlands").

    Raises:
        ValueError: an empty name, no prompt, a bridge that equals the answer, or a prompt
            that ends in white space.

    Examples:
        >>> import mi_hops
        >>> fact = mi_hops.load_facts("hopland")[0]
        >>> fact.bridge, fact.answer, fact.prompt("suffix")
        ('Ruben van Harrow', 'mint tea', 'The drink of the translator of Lost Gardens Revisited is')
    """

    id: str
    subject: str
    relation1: str
    bridge: str
    relation2: str
    answer: str
    first_hop: str
    prompts: Mapping[str, str]
    first_prompts: Mapping[str, str] = field(default_factory=dict)
    second_prompts: Mapping[str, str] = field(default_factory=dict)
    paraphrases: tuple[str, ...] = ()
    bridge_aliases: tuple[str, ...] = ()
    answer_aliases: tuple[str, ...] = ()
    split: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "bridge", "answer", "first_hop"):
            if not str(getattr(self, name)).strip():
                raise ValueError(f"fact {self.id!r}: {name} is empty")
        if self.bridge.strip().casefold() == self.answer.strip().casefold():
            raise ValueError(
                f"fact {self.id!r}: bridge and answer are both {self.answer!r}; such a question "
                "is answered by its first hop alone, so leave it out"
            )
        if not self.prompts:
            raise ValueError(f"fact {self.id!r}: no two-hop prompt was given")
        for table in ("prompts", "first_prompts", "second_prompts"):
            for form, text in getattr(self, table).items():
                if not text.strip() or text != text.rstrip():
                    raise ValueError(
                        f"fact {self.id!r}: {table}[{form!r}] is {text!r}; a prompt must not be "
                        "empty or end in white space (the answer brings its own space)"
                    )
        for name in ("paraphrases", "bridge_aliases", "answer_aliases"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __repr__(self) -> str:
        chain = " -> ".join(shorten(t, 60) for t in (self.subject, self.bridge, self.answer))
        return f"TwoHopFact({shorten(self.id, 60)!r}: {chain}; {', '.join(self.prompts)})"

    def prompt(self, form: str | None = None) -> str:
        """The two-hop prompt of `form`, by default the first one there is."""
        return _pick(self, self.prompts, form, "two-hop")

    def first_prompt(self, form: str | None = None) -> str:
        """The first-hop prompt of `form` (answer: the bridge)."""
        return _pick(self, self.first_prompts, form, "first-hop")

    def second_prompt(self, form: str | None = None) -> str:
        """The second-hop prompt of `form` (answer: the answer)."""
        return _pick(self, self.second_prompts, form, "second-hop")

    def with_wording(self, first: Wording, second: Wording) -> TwoHopFact:
        """The same fact in other words: all prompts and the first-hop phrase are rebuilt.

        Args:
            first, second: how the first and the second relation are worded.

        Paraphrases stay as they are.

        Examples:
            >>> from mi_hops.facts import Wording, load_facts
            >>> fact = load_facts("geo")[0]
            >>> land = Wording("the land of [X]", "[X] lies in", "Where is [X]?")
            >>> seat = Wording("the seat of [X]", "[X] is run from", "What is the seat of [X]?")
            >>> fact.subject, fact.with_wording(land, seat).prompt("prefix")
            ('Beijing', 'The land of Beijing is run from')
        """
        names: Mapping[str, str] = self.meta.get("in_text", {})
        subject = names.get("subject", self.subject)
        phrase = first_hop_phrase(first, subject)
        return replace(
            self,
            first_hop=phrase,
            prompts=prompts_about(second, phrase),
            first_prompts=prompts_about(first, subject),
            second_prompts=prompts_about(second, names.get("bridge", self.bridge)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON; fields at their empty default are left out."""
        return {k: _plain(v) for k, v in asdict(self).items() if v or k == "id"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TwoHopFact:
        """The inverse of `to_dict`; unknown and missing keys raise ``ValueError``."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(record) - known)
        if unknown:
            raise ValueError(f"unknown field(s) {unknown}; a fact has {sorted(known)}")
        missing = [k for k in _REQUIRED if not record.get(k)]
        if missing:
            raise ValueError(f"missing field(s) {missing}; a fact needs {list(_REQUIRED)}")
        return cls(**dict(record))


_REQUIRED = ("id", "subject", "relation1", "bridge", "relation2", "answer", "first_hop", "prompts")


def _pick(fact: TwoHopFact, table: Mapping[str, str], form: str | None, what: str) -> str:
    if form is None and table:
        return next(iter(table.values()))
    if form is None or form not in table:
        raise ValueError(
            f"fact {fact.id!r} has no {what} prompt of form {form!r}; it has {sorted(table)}"
        )
    return table[form]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
