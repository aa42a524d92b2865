"""Tasks whose circuits are known, as pairs: what a tool finds can be held against what was published.

Every task is drawn from a seed for the model's own tokenizer. A drawing is kept if all its words are
known, the names it turns on are one token each, and both prompts have the same tokens up to those
that differ on purpose; what is left out is listed, with the reason, in ``skipped``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.loaders import load_facts
from mi_hops.model import HookedModel, prepends_bos
from mi_hops.patching.contrast import contrast
from mi_hops.patching.task_words import (
    CENTURIES,
    CODE_NAMES,
    DESCRIPTION,
    IOI_TEMPLATES,
    NAMES,
    NOUNS,
    PLACES,
    THINGS,
)
from mi_hops.sweep.metrics import Target
from mi_hops.sweep.pairs import Pairs
from mi_hops.text.tokens import Prompt, TokenError, answer_ids, encode

#: Drawings tried for each pair that is wanted.
_TRIES = 20


@dataclass(frozen=True)
class _Drawn:
    """One drawing.

    Attributes:
        roles: name of a place -> the character span in the clean text it stands for.
        glued: the answer follows the prompt without a space.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    glued: bool = False


def ioi(
    model: HookedModel,
    n: int = 20,
    *,
    corruption: Literal["abc", "swap"] = "abc",
    names: Sequence[str] = NAMES,
    templates: Sequence[str] = IOI_TEMPLATES,
    seed: int = 0,
) -> Pairs:
    """Indirect object identification: "When Mary and John went to the store, John gave a drink to".

    The answer is the name that occurs once, ``wrong`` the one that gives (Wang et al. 2022, arXiv
    2211.00593). Either of them is named first.

    Args:
        n: pairs wanted.
        corruption: ``"abc"`` has three other names, so that nothing points to either; ``"swap"``
            lets the other one give, so that the two answers change places.
        names: names to draw from; those of more than one token are left out.
        templates: with ``{A}``, ``{B}`` and ``{S}``; ``{place}`` and ``{thing}`` if wanted.

    Returns:
        `Pairs` with the roles ``IO``, ``S1``, ``S2`` and ``last``.

    Raises:
        ValueError: too few names, no template, `n` below 1, an unknown corruption, or no drawing
            that can be used.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.patching import tasks
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> tasks.ioi(model, 2)
        Traceback (most recent call last):
        ...
        ValueError: only 0 of 60 names are one token of this tokenizer; indirect objects need 5
    """
    if corruption not in ("abc", "swap"):
        raise ValueError(f"corruption is {corruption!r}; expected 'abc' or 'swap'")
    if not templates:
        raise ValueError("no template was given; pass at least one")
    usable = _singles(model, names, "names", "indirect objects", 5)

    def draw(rng: random.Random) -> _Drawn:
        io, subject, *others = rng.sample(usable, 5)
        template = rng.choice(templates)
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        swapped = rng.random() < 0.5

        def filled(one: str, two: str, giver: str) -> str:
            pair = (two, one) if swapped else (one, two)
            words = {"A": pair[0], "B": pair[1], "S": giver, "place": place, "thing": thing}
            return template.format(**words)

        clean = filled(io, subject, subject)
        changed = filled(*others) if corruption == "abc" else filled(io, subject, io)
        first = _span(clean, subject)
        roles = {"IO": _span(clean, io), "S1": first, "S2": _span(clean, subject, first[1])}
        return _Drawn(clean, changed, io, subject, roles)

    return _drawn_pairs(model, draw, n, seed, f"ioi ({corruption})")


def greater_than(model: HookedModel, n: int = 20, *, seed: int = 0) -> Pairs:
    """Later years: "The war lasted from the year 1732 to the year 17", continued by a larger number.

    The corrupted prompt begins in year 01 of the century, after which every number is later (Hanna et
    al. 2023, arXiv 2305.00586). The answer is one of the tens above the year, ``wrong`` one of those
    below, so that the first token decides whether the tokenizer splits years in pairs or in digits.

    Returns:
        `Pairs` with the roles ``year`` (the last token of the two digits that differ) and ``last``.

    Raises:
        ValueError: `n` below 1, or no year whose tokens can be told apart.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.patching import tasks
        >>> model = mi_hops.load_model("smollm2-135m")  # doctest: +SKIP
        >>> len(tasks.greater_than(model, 4))  # doctest: +SKIP
        4
    """

    def draw(rng: random.Random) -> _Drawn:
        noun, century = rng.choice(NOUNS), rng.choice(CENTURIES)
        tens = rng.randrange(2, 8)
        year = f"{tens}{rng.randrange(1, 10)}"
        begin = f"The {noun} lasted from the year {century}"
        end = f" to the year {century}"
        later = f"{rng.randrange(tens + 1, 10)}{rng.randrange(1, 10)}"
        earlier = f"{rng.randrange(1, tens)}{rng.randrange(1, 10)}"
        where = {"year": (len(begin), len(begin) + 2)}
        return _Drawn(begin + year + end, begin + "01" + end, later, earlier, where, glued=True)

    return _drawn_pairs(model, draw, n, seed, "greater-than")


def docstring(
    model: HookedModel, n: int = 20, *, names: Sequence[str] = CODE_NAMES, seed: int = 0
) -> Pairs:
    """The next argument that a Python docstring describes (Heimersheim & Janiak 2023).

    Two of four arguments are described already; the third is the answer, the fourth ``wrong``. In the
    corrupted prompt the function has other arguments, and the docstring describes other ones again.

    Args:
        names: of arguments; those of more than one token are left out.

    Returns:
        `Pairs` with the roles ``answer`` (where the function names it) and ``last``.

    Raises:
        ValueError: too few names, `n` below 1, or no drawing that can be used.
    """
    usable = _singles(model, names, "names", "docstrings", 11)
    words = _singles(model, DESCRIPTION, "words", "docstrings", 6)

    def draw(rng: random.Random) -> _Drawn:
        function, *found = rng.sample(usable, 11)
        told = rng.sample(words, 6)

        def text(arguments: Sequence[str], described: Sequence[str]) -> str:
            lines = [
                f"def {function}(self, {', '.join(arguments)}):",
                f'    """{told[0]} {told[1]}',
                "",
                f"    :param {described[0]}: {told[2]} {told[3]}",
                f"    :param {described[1]}: {told[4]} {told[5]}",
                "    :param",
            ]
            return "\n".join(lines)

        clean = text(found[:4], found[:2])
        start = _span(clean, f" {found[2]},")
        roles = {"answer": (start[0] + 1, start[1] - 1)}
        return _Drawn(clean, text(found[4:8], found[8:10]), found[2], found[3], roles)

    return _drawn_pairs(model, draw, n, seed, "docstring")


def induction(model: HookedModel, n: int = 20, *, length: int = 12, seed: int = 0) -> Pairs:
    """Random tokens, repeated: after the second A, what followed the first.

    In the corrupted prompt another token, ``wrong``, followed it (Olsson et al. 2022, arXiv
    2209.11895). Tokens are drawn from the vocabulary without special ones.

    Args:
        length: of the part that is repeated; the prompt ends within the repetition.

    Returns:
        `Pairs` with the roles ``previous`` (the token before the one that differs), ``answer`` (the
        one that differs) and ``last``.

    Raises:
        ValueError: `n` below 1, a `length` below 3, or two of which exceed the model's context.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.patching import tasks
        >>> pairs = tasks.induction(mi_hops.load_model("hops-gpt2"), 3, length=5)
        >>> len(pairs), len(pairs.clean[0]) <= 10
        (3, True)
    """
    _require_number(n)
    if length < 3:
        raise ValueError(f"length is {length}; expected at least 3 tokens to repeat")
    if 2 * length + 1 > int(model.cfg.n_ctx):
        raise ValueError(
            f"length is {length}; twice that does not fit the model's context of {model.cfg.n_ctx}"
        )
    tokenizer = model.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    vocabulary = [i for i in range(int(model.cfg.d_vocab)) if i not in special]
    bos = [tokenizer.bos_token_id] if tokenizer is not None and prepends_bos(model) else []
    rng = random.Random(seed)
    drawn: list[_Checked] = []
    for _ in range(n):
        *tokens, other = rng.sample(vocabulary, length + 1)
        at = rng.randrange(1, length - 1)  # the repetition ends here, before the next
        changed = [*tokens[: at + 1], other, *tokens[at + 2 :]]
        again = tokens[: at + 1]
        clean, corrupted = (
            Prompt.from_tokens(model, [*bos, *part, *again]) for part in (tokens, changed)
        )
        where = len(bos) + at
        roles = {"previous": where, "answer": where + 1, "last": clean.last}
        drawn.append((clean, corrupted, Target((tokens[at + 1],), (other,)), roles))
    return _as_pairs(drawn)


def two_hop(
    model: HookedModel,
    n: int = 20,
    *,
    facts: Sequence[TwoHopFact] | None = None,
    form: str | None = None,
    seed: int = 0,
) -> Pairs:
    """Factual two-hop questions, each beside another one of the same two relations; see `contrast`.

    Args:
        facts: to draw from, and to draw partners from; default the bundled real ones (``"geo"``).
        form: of the prompts; default each fact's first.

    Returns:
        `Pairs` as those of `contrast`; the facts that could not be used are in ``skipped``.

    Raises:
        ValueError: `n` below 1, or no fact that has a partner.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.patching import tasks
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")
        >>> len(tasks.two_hop(model, 5, facts=facts))
        5
    """
    _require_number(n)
    every = list(load_facts("geo") if facts is None else facts)
    chosen = random.Random(seed).sample(every, min(len(every), _TRIES * n))
    found = contrast(model, chosen, partners=every, form=form, seed=seed)
    return found.select(range(min(n, len(found))))


# -- drawing ------------------------------------------------------------------------------------------


def _drawn_pairs(
    model: HookedModel, draw: Callable[[random.Random], _Drawn], n: int, seed: int, task: str
) -> Pairs:
    """Drawings until `n` are usable, or twenty times as many were tried."""
    _require_number(n)
    rng = random.Random(seed)
    kept: list[_Checked] = []
    skipped: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for _ in range(_TRIES * n):
        if len(kept) == n:
            break
        item = draw(rng)
        if (item.clean, item.corrupted) in seen:
            continue
        seen.add((item.clean, item.corrupted))
        try:
            kept.append(_checked(model, item))
        except TokenError as reason:
            skipped[item.clean] = str(reason)
    if not kept:
        first = next(iter(skipped.values()))
        raise ValueError(
            f"none of {len(skipped)} drawings of {task} can be used; the first: {first}"
        )
    return _as_pairs(kept, list(skipped.items()))


#: Clean and corrupted prompt, what they are scored on, and the places of the roles.
_Checked = tuple[Prompt, Prompt, Target, dict[str, int]]


def _as_pairs(drawn: Sequence[_Checked], skipped: Sequence[tuple[str, str]] = ()) -> Pairs:
    clean, corrupted, answer, roles = (list(part) for part in zip(*drawn, strict=True))
    places = {name: [at[name] for at in roles] for name in roles[0]}
    return Pairs(clean, corrupted, answer=answer, roles=places, skipped=skipped)


def _checked(model: HookedModel, item: _Drawn) -> _Checked:
    """A drawing as prompts, answers and places, refused (`TokenError`) where these do not fit."""
    for text in (item.clean, item.corrupted, item.answer, item.wrong):
        if unknown := _unknown(model, text):
            raise TokenError(f"the tokenizer does not know {unknown!r}")
    clean, corrupted = encode(model, item.clean), encode(model, item.corrupted)
    if len(clean) != len(corrupted):
        raise TokenError(
            f"the prompts have {len(clean)} and {len(corrupted)} tokens: {list(clean.labels)}, "
            f"{list(corrupted.labels)}"
        )
    continued = _continued if item.glued else answer_ids
    ids = [continued(model, clean, text) for text in (item.answer, item.wrong)]
    if ids[0][0] == ids[1][0]:
        raise TokenError(f"{item.answer!r} and {item.wrong!r} begin with the same token")
    roles = {name: _token_of(clean, span) for name, span in item.roles.items()}
    return clean, corrupted, Target(*ids), {**roles, "last": clean.last}


def _continued(model: HookedModel, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Tokens of what follows the prompt without a space."""
    whole = encode(model, prompt.text + text).ids
    if whole[: len(prompt)] != prompt.ids or len(whole) == len(prompt):
        raise TokenError(f"{prompt.text[-12:] + text!r} has no token boundary before {text!r}")
    return whole[len(prompt) :]


def _token_of(prompt: Prompt, span: tuple[int, int]) -> int:
    """The last token that shares a character with a span."""
    start, end = span
    return max(i for i, (a, b) in enumerate(prompt.offsets) if a < end and b > start and b > a)


def _span(text: str, word: str, start: int = 0) -> tuple[int, int]:
    at = text.index(word, start)
    return at, at + len(word)


def _unknown(model: HookedModel, text: str) -> str | None:
    """A word that the tokenizer does not know."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this task is made of words, and the model has no tokenizer")
    unknown = getattr(tokenizer, "unk_token_id", None)
    for word in text.split():
        if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]:
            return word
    return None


def _singles(
    model: HookedModel, words: Sequence[str], what: str, task: str, least: int
) -> list[str]:
    """The words that are one token behind another word; at least so many."""
    found = []
    for word in dict.fromkeys(words):
        if _unknown(model, word) is None:
            ids = [
                model.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (f"{words[0]} {word}", words[0])
            ]
            if len(ids[0]) == len(ids[1]) + 1:
                found.append(word)
    if len(found) < least:
        raise ValueError(
            f"only {len(found)} of {len(words)} {what} are one token of this tokenizer; {task} need "
            f"{least}"
        )
    return found


def _require_number(n: int) -> None:
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 pair")
