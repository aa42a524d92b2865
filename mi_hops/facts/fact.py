"""The unit of work: one two-hop fact, or a longer chain, and the prompts that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mi_hops.facts.hops import Hop, asked, phrase, repeated, several_texts, worded
from mi_hops.facts.templates import Wording
from mi_hops.result.display import shorten


@dataclass(frozen=True, kw_only=True, repr=False)
class TwoHopFact:
    """A chain ``subject --relation1--> bridge --relation2--> answer`` and its prompts.

    Prompts end right before the answer, without a trailing space, and are keyed by *form*:
    ``"suffix"`` (relation first, "The citizenship of the author of Misery is"), ``"prefix"``
    (subject first, "The author of Misery is a citizen of"), ``"question"`` ("What is ...?").
    A fact needs at least one form in `prompts`; the other tables may lack forms.

    **Longer chains** are facts that are *seen from one of their bridges*, by default the last: the
    first hop is everything up to that bridge, the second everything after it, so whatever takes
    two-hop facts takes chains. `hops` and `bridges` list all of them, `at` sees the fact from another
    bridge, `part` is a shorter chain. Hops and bridges are counted from 1. `from_hops` makes chains.

    Attributes:
        id: unique within a set of facts.
        subject: the entity named in the prompt.
        relation1, relation2: names (or ids) of the two relations.
        bridge: the entity between the hops; it does not appear in the two-hop prompt.
        answer: the object of the second hop, possibly several tokens.
        first_hop: the phrase that describes the bridge, as it appears in the prompts
            ("the author of Misery"); located without regard to the case of its first letter.
        prompts: form -> prompt of the whole question.
        first_prompts: form -> prompt whose answer is the bridge.
        second_prompts: form -> prompt about the bridge whose answer is `answer`.
        paraphrases: further two-hop prompts with the same answer.
        bridge_aliases, answer_aliases: other accepted spellings; used in matching only.
        split: free label, e.g. ``"train"``, ``"seen_parts"``, ``"first_unseen"``.
        meta: anything a loader wants to keep. `with_wording` reads ``in_text``, how subject,
            bridge and answer are named in running text where that differs ("the Netherlands").
        chain: the single hops of three or more; empty for two, whose hops are the fields above.

    Raises:
        ValueError: an empty name, no prompt, a bridge that equals the answer (in a chain: any entity
            that occurs twice), a prompt that ends in white space, or a chain that does not lead
            through the bridge to the answer.

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
    chain: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        hops = tuple(h if isinstance(h, Hop) else Hop(**h) for h in self.chain)
        object.__setattr__(self, "chain", hops)
        for name in ("id", "bridge", "answer", "first_hop"):
            if not str(getattr(self, name)).strip():
                raise ValueError(f"fact {self.id!r}: {name} is empty")
        if self.bridge.strip().casefold() == self.answer.strip().casefold():
            raise ValueError(
                f"fact {self.id!r}: bridge and answer are both {self.answer!r}; such a question "
                "is answered by its first hop alone, so leave it out"
            )
        if self.chain:
            self._check_chain()
        if not self.prompts:
            raise ValueError(f"fact {self.id!r}: no two-hop prompt was given")
        tables = {n: getattr(self, n) for n in ("prompts", "first_prompts", "second_prompts")}
        tables |= {f"prompts of hop {k}": hop.prompts for k, hop in enumerate(self.chain, start=1)}
        for name, table in tables.items():
            for form, text in table.items():
                if not text.strip() or text != text.rstrip():
                    raise ValueError(
                        f"fact {self.id!r}: {name}[{form!r}] is {text!r}; a prompt must not be "
                        "empty or end in white space (the answer brings its own space)"
                    )
        for name in ("paraphrases", "bridge_aliases", "answer_aliases"):
            texts = several_texts(getattr(self, name), f"fact {self.id!r}, {name}")
            object.__setattr__(self, name, texts)

    def _check_chain(self) -> None:
        route = " -> ".join(self.names)
        if len(self.chain) < 3:
            raise ValueError(
                f"fact {self.id!r}: chain has {len(self.chain)} hop(s); it is for three or more, and "
                "two are the fact's own fields (`from_hops` sorts this out)"
            )
        if empty := [k for k, hop in enumerate(self.chain, start=1) if not hop.object.strip()]:
            raise ValueError(f"fact {self.id!r}: hop {empty[0]} of {route} has no object")
        if twice := repeated(self.names):
            raise ValueError(
                f"fact {self.id!r}: the entity {twice!r} occurs twice in {route}; its answer or a "
                "bridge can be read off another place of the chain, so leave it out"
            )
        if self.bridge not in self.bridges or self.answer != self.chain[-1].object:
            raise ValueError(
                f"fact {self.id!r}: the chain {route} does not lead over the bridge {self.bridge!r} to "
                f"the answer {self.answer!r}"
            )

    @classmethod
    def from_hops(
        cls,
        hops: Sequence[Hop],
        *,
        id: str,
        subject: str,
        prompts: Mapping[str, str],
        at: int | None = None,
        paraphrases: Sequence[str] = (),
        split: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> TwoHopFact:
        """The fact of two or more hops, seen from one of its bridges.

        The questions to and from the bridge are the single hops' own where these are asked; a longer
        one is made of them (`mi_hops.facts.hops.asked`).

        Args:
            prompts: form -> prompt of the whole question.
            at: the bridge it is seen from, counted from 1; default the last, whose second hop is
                a single one.
            meta: ``in_text`` names the subject in running text where that differs; bridge and answer
                are added.

        Raises:
            ValueError: fewer than two hops, a bridge that there is not; see also the class.

        Examples:
            >>> from mi_hops.facts import load_chains
            >>> fact = next(f for f in load_chains() if f.id.startswith("Haneda") and f.answer == "yen")
            >>> fact.bridges, fact.bridge
            (('Tokyo', 'Japan'), 'Japan')
            >>> fact.at(1).second_prompt("prefix")
            'The country that contains Tokyo uses a currency called the'
        """
        n = len(hops)
        at = n - 1 if at is None else at
        if n < 2 or not 1 <= at < n:
            raise ValueError(
                f"fact {id!r}: bridge {at} of {n} hops; expected two hops or more, and a bridge of "
                f"1..{n - 1}"
            )
        before, after = hops[:at], hops[at:]
        kept = dict(meta or {})
        texts = {"bridge": before[-1].in_text, "answer": after[-1].in_text}
        named = {k: text for k, text in {**kept.pop("in_text", {}), **texts}.items() if text}
        return cls(
            id=id,
            subject=subject,
            relation1=_path(before),
            bridge=before[-1].object,
            relation2=_path(after),
            answer=after[-1].object,
            first_hop=before[-1].phrase,
            prompts=prompts,
            first_prompts=asked(hops, prompts, 0, at),
            second_prompts=asked(hops, prompts, at, n),
            paraphrases=several_texts(paraphrases, f"fact {id!r}, paraphrases"),
            bridge_aliases=before[-1].aliases,
            answer_aliases=after[-1].aliases,
            split=split,
            meta={**({"in_text": named} if named else {}), **kept},
            chain=tuple(hops) if n > 2 else (),
        )

    def __repr__(self) -> str:
        chain = " -> ".join(shorten(t, 60) for t in self.names)
        return f"TwoHopFact({shorten(self.id, 60)!r}: {chain}; {', '.join(self.prompts)})"

    def prompt(self, form: str | None = None) -> str:
        """The two-hop prompt of `form` (default: the fact's first form)."""
        return _pick(self, self.prompts, form, "two-hop")

    def first_prompt(self, form: str | None = None) -> str:
        """The first-hop prompt of `form` (answer: the bridge)."""
        return _pick(self, self.first_prompts, form, "first-hop")

    def second_prompt(self, form: str | None = None) -> str:
        """The second-hop prompt of `form` (answer: the answer)."""
        return _pick(self, self.second_prompts, form, "second-hop")

    @property
    def hops(self) -> tuple[Hop, ...]:
        """All single hops, in order."""
        if self.chain:
            return self.chain
        named = self.meta.get("in_text", {})
        return (
            Hop(
                relation=self.relation1,
                object=self.bridge,
                phrase=self.first_hop,
                prompts=self.first_prompts,
                aliases=self.bridge_aliases,
                in_text=named.get("bridge", ""),
            ),
            Hop(
                relation=self.relation2,
                object=self.answer,
                prompts=self.second_prompts,
                aliases=self.answer_aliases,
                in_text=named.get("answer", ""),
            ),
        )

    @property
    def n_hops(self) -> int:
        """Number of hops."""
        return len(self.chain) or 2

    @property
    def bridges(self) -> tuple[str, ...]:
        """All entities between subject and answer; for two hops, only `bridge`."""
        return tuple(hop.object for hop in self.chain[:-1]) or (self.bridge,)

    @property
    def names(self) -> tuple[str, ...]:
        """Subject, bridges and answer: one more than the number of hops."""
        return (self.subject, *self.bridges, self.answer)

    @property
    def at_bridge(self) -> int:
        """Number of the bridge that the fact is seen from."""
        return 1 + self.bridges.index(self.bridge)

    def at(self, bridge: int) -> TwoHopFact:
        """The fact seen from another of its bridges, counted from 1.

        Raises:
            ValueError: a bridge that it does not have.
        """
        return self._made(self.hops, self.prompts, at=bridge)

    def part(self, first: int, last: int) -> TwoHopFact:
        """Hops `first` to `last`, counted from 1, as a shorter fact.

        Paraphrases and meta stay behind; the id says which hops.

        Raises:
            ValueError: hops that it does not have, fewer than two, or a part whose question cannot be
                made of the fact's texts.
        """
        if not 1 <= first < last <= self.n_hops:
            raise ValueError(
                f"fact {self.id!r}: hops {first} to {last} of {self.n_hops}; a part has two hops or more"
            )
        if (first, last) == (1, self.n_hops):
            return self
        hops, start = self.hops, first - 1
        phrases = [phrase(hops, start, k) for k in range(first, last)]
        prompts = asked(hops, self.prompts, start, last)
        if not (prompts and all(phrases)):
            raise ValueError(
                f"fact {self.id!r}: no question about hops {first} to {last} can be made of its texts; the "
                "description of each bridge must contain the one before it, and each question the "
                "description or the name that it asks about, once"
            )
        named = (
            self.meta.get("in_text", {}).get("subject", "")
            if not start
            else hops[start - 1].in_text
        )
        return TwoHopFact.from_hops(
            [replace(h, phrase=p) for h, p in zip(hops[start:last], [*phrases, ""], strict=True)],
            id=f"{self.id} [{first}-{last}]",
            subject=self.names[start],
            prompts=prompts,
            split=self.split,
            meta={"in_text": {"subject": named}},
        )

    def with_wording(self, *wordings: Wording) -> TwoHopFact:
        """The same fact reworded: all prompts and the descriptions of bridges are rebuilt.

        Args:
            wordings: how each relation is worded, the first hop's first.

        Paraphrases stay as they are.

        Raises:
            ValueError: another number of wordings than hops.

        Examples:
            >>> from mi_hops.facts import Wording, load_facts
            >>> fact = load_facts("geo")[0]
            >>> land = Wording("the land of [X]", "[X] lies in", "Where is [X]?")
            >>> seat = Wording("the seat of [X]", "[X] is run from", "What is the seat of [X]?")
            >>> fact.subject, fact.with_wording(land, seat).prompt("prefix")
            ('Beijing', 'The land of Beijing is run from')
        """
        subject = self.meta.get("in_text", {}).get("subject", self.subject)
        return self._made(*worded(self.hops, wordings, subject), at=self.at_bridge)

    def with_prompts(self, change: Callable[[str, str], str]) -> TwoHopFact:
        """The same fact with every prompt changed, including those of its single hops.

        Args:
            change: the new prompt, of a form and the prompt as it is.

        Paraphrases stay as they are.
        """

        def changed(table: Mapping[str, str]) -> dict[str, str]:
            return {form: change(form, text) for form, text in table.items()}

        hops = [replace(hop, prompts=changed(hop.prompts)) for hop in self.hops]
        return self._made(hops, changed(self.prompts), at=self.at_bridge)

    def _made(self, hops: Sequence[Hop], prompts: Mapping[str, str], *, at: int) -> TwoHopFact:
        """The fact with its hops asked by other prompts, or seen from another bridge."""
        return TwoHopFact.from_hops(
            hops,
            id=self.id,
            subject=self.subject,
            prompts=prompts,
            at=at,
            paraphrases=self.paraphrases,
            split=self.split,
            meta=self.meta,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON; fields at their empty default are left out."""
        return {k: _plain(v) for k, v in vars(self).items() if v or k == "id"}

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


def _path(hops: Sequence[Hop]) -> str:
    """The relations of several hops as one."""
    return " > ".join(hop.relation for hop in hops)


def _plain(value: Any) -> Any:
    if isinstance(value, Hop):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
