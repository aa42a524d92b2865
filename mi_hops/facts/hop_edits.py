"""One hop of a two-hop fact given a new object: the fact before, the fact after, and what was edited.

Editing a single fact changes every chain that passes through it. `HopEdit` holds one such chain
twice, as it was and as it is to be, so that whatever takes facts takes the new one as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.tables import find
from mi_hops.facts.wordings import fold

#: Which single fact of a chain: subject to bridge, or bridge to answer.
WhichHop = Literal["first", "second"]
HOPS: tuple[WhichHop, ...] = ("first", "second")


@dataclass(frozen=True, kw_only=True)
class SingleFact:
    """A single hop as a fact.

    Attributes:
        subject, relation, object: what it says.
        named: the subject as prompts name it ("the Netherlands").
        aliases: other accepted spellings of the object.
        prompts: form -> prompt whose answer is the object.
    """

    subject: str
    relation: str
    object: str
    named: str
    aliases: tuple[str, ...]
    prompts: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str]:
        """Subject (ignoring case and accents) and relation, which together have one object."""
        return plain(self.subject), self.relation

    def says(self, *names: str) -> bool:
        """Whether one of the names is the object or an alias of it."""
        return bool({plain(n) for n in names} & {plain(n) for n in (self.object, *self.aliases)})


def single_fact(fact: TwoHopFact, hop: WhichHop) -> SingleFact:
    """One hop of a fact as a single fact.

    Raises:
        ValueError: another hop than ``"first"`` or ``"second"``.
    """
    if hop not in HOPS:
        raise ValueError(f"hop is {hop!r}; expected one of {list(HOPS)}")
    names: Mapping[str, str] = fact.meta.get("in_text", {})
    if hop == "first":
        return SingleFact(
            subject=fact.subject,
            relation=fact.relation1,
            object=fact.bridge,
            named=names.get("subject", fact.subject),
            aliases=fact.bridge_aliases,
            prompts=fact.first_prompts,
        )
    return SingleFact(
        subject=fact.bridge,
        relation=fact.relation2,
        object=fact.answer,
        named=names.get("bridge", fact.bridge),
        aliases=fact.answer_aliases,
        prompts=fact.second_prompts,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class HopEdit:
    """A two-hop fact before and after some of its hops get new objects.

    Attributes:
        before: the original chain.
        after: the chain after the edit: the same question, the new bridge or answer, and the prompts
            of the new single hops. Its id is the edit's.
        hops: the single facts that are edited. Where that is the first hop alone, the answer
            changes because the new bridge has another one.

    Raises:
        ValueError: no hop, a new object that is the old one (aliases count), two questions that
            differ, or a bridge or an answer that changes although nothing leads to it.

    Examples:
        >>> from mi_hops import Hopland
        >>> from mi_hops.facts import HopEdit
        >>> fact = Hopland().two_hop_facts("seen_parts")[0]
        >>> edit = HopEdit.of(fact, "second", "Quillish")
        >>> edit.before.answer == fact.answer, edit.after.answer
        (True, 'Quillish')
    """

    before: TwoHopFact
    after: TwoHopFact
    hops: tuple[WhichHop, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "hops", tuple(self.hops))
        old, new = self.before, self.after
        if longer := [f.n_hops for f in (old, new) if f.chain]:
            raise ValueError(
                f"edit {self.id!r}: the fact has {longer[0]} hops; an edit is of a two-hop fact, so take "
                "a part of it, `fact.part(1, 2)`"
            )
        if not self.hops or len(set(self.hops)) < len(self.hops) or set(self.hops) - set(HOPS):
            raise ValueError(f"edit {self.id!r}: hops are {self.hops}; expected some of {HOPS}")
        asked = [(f.subject, f.relation1, f.relation2, dict(f.prompts)) for f in (old, new)]
        if asked[0] != asked[1]:
            raise ValueError(
                f"edit {self.id!r}: {old.prompt()!r} before and {new.prompt()!r} after are not the "
                "same two-hop question in the same words about the same subject"
            )
        same_bridge = single_fact(old, "first").says(new.bridge, *new.bridge_aliases)
        same_answer = single_fact(old, "second").says(new.answer, *new.answer_aliases)
        if "first" in self.hops and same_bridge:
            raise ValueError(self._no_change("first", new.bridge))
        if "first" not in self.hops:
            if not same_bridge:
                raise ValueError(
                    f"edit {self.id!r}: the bridge is {old.bridge!r} before and {new.bridge!r} "
                    "after, but the first hop is not edited; name it in hops"
                )
            if same_answer:
                raise ValueError(self._no_change("second", new.answer))

    def _no_change(self, hop: WhichHop, new: str) -> str:
        old = single_fact(self.before, hop)
        return (
            f"edit {self.id!r}: the new object {new!r} of {old.relation!r} of {old.subject!r} is the "
            f"old one, {old.object!r}; an edit needs another"
        )

    def __repr__(self) -> str:
        chains = (" -> ".join((f.bridge, f.answer)) for f in (self.before, self.after))
        return (
            f"HopEdit({' and '.join(self.hops)} hop of {self.before.id!r}: {' => '.join(chains)})"
        )

    @property
    def id(self) -> str:
        """The id of the fact after."""
        return self.after.id

    @property
    def singles(self) -> tuple[SingleFact, ...]:
        """The edited single facts with their new objects, in the order of `hops`."""
        return tuple(single_fact(self.after, hop) for hop in self.hops)

    @classmethod
    def of(
        cls,
        fact: TwoHopFact,
        hop: WhichHop,
        new: str,
        *,
        answer: str = "",
        aliases: Sequence[str] = (),
    ) -> HopEdit:
        """Edit one hop of a fact to an object of your choice.

        The prompts of the second hop then name the new bridge in place of the old one.

        Args:
            new: the object.
            answer: of the two-hop question afterwards; needed where the first hop is edited.
            aliases: other accepted spellings of the new object.

        Raises:
            ValueError: see `HopEdit`; a first hop without the answer that follows, or second-hop
                prompts that do not name the old bridge.
        """
        if hop != "first":
            single_fact(fact, hop)  # refuses another hop
            after = {"answer": new, "answer_aliases": aliases}
            return cls(before=fact, after=_changed(fact, new, {}, **after), hops=(hop,))
        if not answer:
            raise ValueError(
                f"fact {fact.id!r}: a new bridge leads to another answer; give it with answer="
            )
        old = single_fact(fact, "second").named
        prompts = {}
        for form, text in fact.second_prompts.items():
            at = find(old, text)
            if at is None:
                raise ValueError(
                    f"fact {fact.id!r}: the second-hop prompt {text!r} does not name the bridge "
                    f"{old!r}, so it cannot be asked about {new!r}; build the fact after by hand"
                )
            prompts[form] = text[: at[0]] + new + text[at[1] :]
        changes = {
            "bridge": new,
            "bridge_aliases": aliases,
            "answer": answer,
            "answer_aliases": (),
            "second_prompts": prompts,
        }
        return cls(before=fact, after=_changed(fact, new, {}, **changes), hops=(hop,))


def hop_edits(
    facts: Iterable[TwoHopFact],
    hop: WhichHop,
    *,
    pool: Iterable[TwoHopFact] | None = None,
    seed: int = 0,
    together: bool = False,
) -> tuple[list[HopEdit], list[tuple[str, str]]]:
    """Edits of one hop per fact, with objects of other facts; and (id, reason) for facts without.

    The new object is one that the same relation has in another fact of the pool. For a new bridge, the
    pool must also have the second hop, so that the new chain's answer is known; for the second hop,
    the object is the answer. Old and new answer differ, the new object is not the subject (a new answer
    not the bridge either), and no prompt names a new bridge. A single fact gets one new
    object, however many of the facts share it; facts whose chain cannot follow it are left out. Still,
    one edit of the list may change the hop of another chain that this one leaves alone, whose answer
    (`HopEdit.after`) is then another where both are made in one model; see `together`.

    Args:
        facts: the chains of which one hop is edited.
        hop: which.
        pool: facts that objects are taken from; default `facts`.
        seed: of the draw, single fact by single fact, whatever else is in the list.
        together: also leave out, in favour of facts earlier in the list, whatever would make an answer
            wrong in one model with all edits.

    Raises:
        ValueError: another hop than ``"first"`` or ``"second"``.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.facts import hop_edits
        >>> edits, left_out = hop_edits(mi_hops.load_facts("hopland")[:200], "first")
        >>> all(e.before.bridge != e.after.bridge for e in edits)
        True
    """
    # A fact lends its answer to those of its second relation; a new bridge is lent by a fact that
    # leads on from it by the second relation that is asked for.
    facts = list(facts)
    objects: dict[str, set[str]] = {}
    lenders: dict[tuple[str, str], TwoHopFact] = {}
    for fact in facts if pool is None else pool:
        if not fact.chain:
            single = single_fact(fact, hop)
            objects.setdefault(single.relation, set()).add(plain(single.object))
            lenders.setdefault((plain(single.object), fact.relation2), fact)
    given: dict[tuple[str, str], str] = {}
    relied_on: set[tuple[str, str]] = set()  # the other hops of the chains taken
    edits: list[HopEdit] = []
    left_out: list[tuple[str, str]] = []
    for fact in facts:
        if fact.chain:
            left_out.append((fact.id, "more than two hops"))
            continue
        single = single_fact(fact, hop)
        names = sorted(objects.get(single.relation, ()))
        random.Random(f"{seed}/{hop}/{single.key}").shuffle(names)
        if single.key in given:
            names = [name for name in names if name == given[single.key]]
        found = (lenders.get((name, fact.relation2)) for name in names)
        donor, clash = None, False
        for lender in found:
            if lender is not None and _fits(fact, lender, hop):
                other = _other_hop(fact, lender, hop)
                if not (together and (single.key in relied_on or other in given)):
                    donor = lender
                    break
                clash = True
        if donor is None:
            why = "no other object of its relation leads to a known answer"
            if single.key in given:
                why = "the object that this single fact was given leads to no other known answer"
            if clash:
                why = "in one model with an edit before it, its answer or that one's would be wrong"
            left_out.append((fact.id, why))
            continue
        given[single.key] = plain(single_fact(donor, hop).object)
        relied_on.add(_other_hop(fact, donor, hop))
        edits.append(_taken(fact, donor, hop))
    return edits, left_out


def plain(text: str) -> str:
    """A name without regard to case, accents and runs of white space."""
    return " ".join(fold(text).split())


def _fits(fact: TwoHopFact, donor: TwoHopFact, hop: WhichHop) -> bool:
    """Whether the donor's object makes an edit that shows."""
    old_bridge, old_answer = single_fact(fact, "first"), single_fact(fact, "second")
    new_answer = single_fact(donor, "second")
    if old_answer.says(donor.answer, *donor.answer_aliases) or new_answer.says(fact.subject):
        return False
    if hop == "second":
        return not new_answer.says(fact.bridge, *fact.bridge_aliases)
    new_bridge = single_fact(donor, "first")
    return not (
        old_bridge.says(donor.bridge, *donor.bridge_aliases)
        or new_bridge.says(fact.subject)
        or any(find(donor.bridge, text) for text in (*fact.prompts.values(), *fact.paraphrases))
    )


def _other_hop(fact: TwoHopFact, donor: TwoHopFact, hop: WhichHop) -> tuple[str, str]:
    """Key of the hop of the new chain that is not edited."""
    return single_fact(donor, "second").key if hop == "first" else single_fact(fact, "first").key


def _taken(fact: TwoHopFact, donor: TwoHopFact, hop: WhichHop) -> HopEdit:
    """The fact with the donor's object, and with what follows from it."""
    names: Mapping[str, str] = donor.meta.get("in_text", {})
    changes: dict[str, Any] = {"answer": donor.answer, "answer_aliases": donor.answer_aliases}
    taken = ["answer"]
    if hop == "first":
        changes["bridge"], changes["bridge_aliases"] = donor.bridge, donor.bridge_aliases
        changes["second_prompts"] = donor.second_prompts
        taken.append("bridge")
    named = {role: names[role] for role in taken if role in names}
    new = single_fact(donor, hop).object
    return HopEdit(before=fact, after=_changed(fact, new, named, **changes), hops=(hop,))


def _changed(fact: TwoHopFact, new: str, named: Mapping[str, str], **changes: Any) -> TwoHopFact:
    """The fact with changes; what its `meta` says about the old objects goes."""
    kept: Mapping[str, str] = fact.meta.get("in_text", {})
    in_text = {role: text for role, text in kept.items() if role not in changes} | dict(named)
    meta = {k: v for k, v in fact.meta.items() if k not in ("in_text", "alike")}
    meta |= {"in_text": in_text} if in_text else {}
    return replace(fact, id=f"{fact.id} -> {new}", meta=meta, **changes)
