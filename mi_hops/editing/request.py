"""What an edit is asked to do: make a two-hop prompt behave like its second hop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any, Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.hop_edits import SingleFact, single_fact
from mi_hops.facts.hops import several_texts
from mi_hops.model import HookedModel
from mi_hops.text.matching import ARTICLES
from mi_hops.text.tokens import Prompt, encode, find_text

Position = Literal["last", "first hop"]
Keep = Literal["hops"] | Callable[[TwoHopFact], Sequence[str]] | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Request:
    """A two-hop prompt, and the second-hop prompt whose computation it should copy.

    Editors that teach an answer need neither second-hop prompt nor bridge: with both left empty, a
    request is one prompt, its subject (``first_hop``) and its target.

    Attributes:
        two_hop_prompt: "The nationality of the author of Misery is".
        second_hop_prompt: the same question about the bridge, "The nationality of Stephen King is";
            what CREME needs.
        bridge: the entity between the hops, which the second-hop prompt names.
        target: the answer; a record, and needed where the whole answer is covered or taught.
        first_hop: the phrase in the two-hop prompt that the bridge replaces in the second-hop prompt.
        keep: prompts whose last token should be answered as before (used where constraints are
            asked for).
        id: of the fact it came from.

    Raises:
        ValueError: an empty prompt (a second-hop prompt may be left out where there is a target), a
            second-hop prompt without bridge or the other way round, two prompts that are equal (such an
            edit changes nothing), a single text as `keep`, a bridge that does not appear in the second-hop prompt; with a first hop, one that does not
            appear in the two-hop prompt or appears there twice, or a second-hop prompt that is not
            the two-hop prompt with the bridge in its place (case, white space and an article before
            the name aside).
    """

    two_hop_prompt: str
    second_hop_prompt: str = ""
    bridge: str = ""
    target: str = ""
    first_hop: str = ""
    keep: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        keep = several_texts(self.keep, f"edit request {self.id!r}, keep")
        object.__setattr__(self, "keep", keep)
        second = (self.second_hop_prompt, self.bridge)
        needed = ("two_hop_prompt", *(("second_hop_prompt", "bridge") if any(second) else ()))
        for name in needed:
            if not getattr(self, name).strip():
                raise ValueError(f"edit request {self.id!r}: {name} is empty")
        if not any(second):
            self._check_taught()
            return
        if _plain(self.two_hop_prompt) == _plain(self.second_hop_prompt):
            raise ValueError(
                f"edit request {self.id!r}: both prompts are {self.second_hop_prompt!r}, so the edit "
                "would change nothing; the second-hop prompt names the bridge where the two-hop "
                "prompt describes it"
            )
        if _plain(self.bridge) not in _plain(self.second_hop_prompt):
            raise ValueError(
                f"edit request {self.id!r}: the bridge {self.bridge!r} does not appear in the "
                f"second-hop prompt {self.second_hop_prompt!r}; pass the one that names it"
            )
        if self.first_hop:
            self._check_frame()

    def _check_taught(self) -> None:
        """Refuse a request without second-hop prompt that does not say what is to be taught."""
        if not self.target.strip():
            raise ValueError(
                f"edit request {self.id!r}: neither a second-hop prompt nor a target; give the prompt "
                "whose computation is to be taken over, or the answer that is to be taught"
            )
        if self.first_hop:
            self._start()

    def _start(self) -> int:
        """Where the first hop begins in the two-hop prompt; refuses one that is not there once."""
        places = places_of(self.first_hop, self.two_hop_prompt)
        if len(places) != 1:
            how = f"appears {len(places)} times" if places else "does not appear"
            raise ValueError(
                f"edit request {self.id!r}: the first hop {self.first_hop!r} {how} in the two-hop prompt "
                f"{self.two_hop_prompt!r}; expected it there once, in the place of the bridge"
            )
        return places[0]

    def _check_frame(self) -> None:
        """Refuse a second-hop prompt that asks another question about the bridge."""
        phrase, asked, start = _plain(self.first_hop), _plain(self.two_hop_prompt), self._start()
        before, after = asked[:start], asked[start + len(phrase) :]
        article = next((a for a in ARTICLES if f" {before}".endswith(f" {a}")), "")
        stem = before.removesuffix(article)
        fitting = {f"{stem}{a}{_plain(self.bridge)}{after}" for a in ("", *ARTICLES)}
        if _plain(self.second_hop_prompt) not in fitting:
            raise ValueError(
                f"edit request {self.id!r}: the second-hop prompt {self.second_hop_prompt!r} is not "
                f"{self.two_hop_prompt!r} with {self.bridge!r} in the place of {self.first_hop!r}; both "
                "must ask in the same words"
            )

    def __repr__(self) -> str:
        shown = {k: shorten(str(v), 160) for k, v in self.to_dict().items()}
        return f"Request({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @classmethod
    def from_fact(cls, fact: TwoHopFact, form: str | None = None, keep: Keep = None) -> Request:
        """The request of a two-hop fact.

        Args:
            form: of both prompts; default the first that the fact has of both.
            keep: ``"hops"`` for the fact's own single-hop prompts of that form, or a function that
                gives the prompts of a fact.

        Raises:
            ValueError: a fact without a second-hop prompt (or not of that form).
        """
        if form is None:
            both = [f for f in fact.prompts if f in fact.second_prompts]
            if not both:
                raise ValueError(
                    f"fact {fact.id!r} has two-hop prompts of {sorted(fact.prompts)} and second-hop "
                    f"prompts of {sorted(fact.second_prompts)}; an edit needs one form of both"
                )
            form = both[0]
        kept: tuple[str, ...] = ()
        if keep == "hops":
            hops = (fact.first_prompts, fact.second_prompts)
            kept = tuple(prompts[form] for prompts in hops if form in prompts)
        elif keep is not None:
            kept = several_texts(keep(fact), f"what keep gives for fact {fact.id!r}")
        return cls(
            two_hop_prompt=fact.prompt(form),
            second_hop_prompt=fact.second_prompt(form),
            bridge=single_fact(fact, "second").named,
            target=fact.answer,
            first_hop=fact.first_hop,
            keep=tuple(dict.fromkeys(kept)),
            id=fact.id,
        )

    @classmethod
    def from_slot(
        cls, prompt: str, *, first_hop: str, bridge: str, target: str = "", **more: Any
    ) -> Request:
        """From one prompt with a ``{}``: `first_hop` goes into the two-hop prompt, `bridge` into the other.

        Raises:
            ValueError: a prompt without exactly one slot.
        """
        return cls(
            two_hop_prompt=fill(prompt, first_hop, "the prompt of an edit request"),
            second_hop_prompt=fill(prompt, bridge),
            bridge=bridge,
            first_hop=first_hop,
            target=target,
            **more,
        )

    @classmethod
    def of_single(cls, single: SingleFact, form: str | None = None, *, id: str = "") -> Request:
        """The request to teach a single fact its object.

        Args:
            form: of the prompt taught; default the first the fact has.

        Raises:
            ValueError: no prompt of that form, or one that does not name the subject once.
        """
        name = next(iter(single.prompts), "") if form is None else form
        if name not in single.prompts:
            raise ValueError(
                f"edit request {id!r}: {single.relation!r} of {single.subject!r} has no prompt of form "
                f"{name!r}; it has {sorted(single.prompts)}"
            )
        prompt = single.prompts[name]
        return cls(two_hop_prompt=prompt, target=single.object, first_hop=single.named, id=id)

    def to_dict(self) -> dict[str, Any]:
        """Plain types; empty fields are left out."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}


#: What an editor takes: a two-hop fact, or the prompts themselves.
Asked = TwoHopFact | Request


def requests_of(
    asked: Iterable[Asked], form: str | None = None, keep: Keep = None, *, taught: bool = False
) -> list[Request]:
    """Requests as they are, and facts as requests.

    Args:
        taught: each needs an answer that the model is taught.

    Raises:
        ValueError: a fact without the prompts of that form, or (with `taught`) without an answer.
    """
    given = [asked] if isinstance(asked, Request | TwoHopFact) else asked
    found = [a if isinstance(a, Request) else Request.from_fact(a, form, keep) for a in given]
    for request in found if taught else ():
        if not request.target:
            raise ValueError(f"edit request {request.id!r} has no target answer to teach")
    return found


def check_together(requests: Sequence[Request]) -> None:
    """Refuse requests that one model cannot meet together.

    Raises:
        ValueError: two that give one prompt different answers (or, where they name none, different
            second-hop prompts), with both.
    """
    taught: dict[tuple[str, bool], Request] = {}
    for request in requests:
        at = _plain(request.two_hop_prompt), bool(request.target)
        other = taught.setdefault(at, request)
        first, second = (r.target or r.second_hop_prompt for r in (other, request))
        if _plain(first) != _plain(second):
            how = "answered" if request.target else "completed like"
            raise ValueError(
                f"edit requests {other.id!r} and {request.id!r} contradict one another: "
                f"{request.two_hop_prompt!r} is to be {how} {first!r} and {second!r}; leave one of "
                "them out"
            )


def fill(template: str, text: str, what: str = "a context template") -> str:
    """The template with `text` in its slot.

    Raises:
        ValueError: not exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise ValueError(f"{what} needs exactly one slot '{{}}', got {template!r}")
    return template.replace("{}", text)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Context templates as they are; refuses those that no prompt can be put into.

    Raises:
        ValueError: none at all, or one without exactly one ``{}``.
    """
    if isinstance(templates, str):
        raise ValueError(f"templates is {templates!r}; expected a sequence of context templates")
    if not templates:
        raise ValueError("no context templates; pass ('{}',) for the bare prompt")
    for template in templates:
        fill(template, "")
    return tuple(templates)


def require_second_hop(request: Request) -> None:
    """Refuse a request that only says what is to be taught.

    Raises:
        ValueError: no second-hop prompt.
    """
    if not request.second_hop_prompt:
        raise ValueError(
            f"edit request {request.id!r} has no second-hop prompt, whose computation CREME moves into "
            "the two-hop prompt; give it and its bridge, or take an editor that teaches an answer"
        )


def check_bridge_known(model: HookedModel, request: Request) -> None:
    """Refuse a bridge with tokens that the tokenizer does not know.

    Raises:
        ValueError: one of its tokens is the unknown token.
    """
    tokenizer = model.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    # GPT-2's tokenizer calls its only special token "unknown" as well.
    if unknown in {None, *(getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos"))}:
        return
    prompt = encode(model, request.second_hop_prompt)
    start, end = _span(request.second_hop_prompt, request.bridge)
    for token, (a, b) in zip(prompt.ids, prompt.offsets, strict=True):
        if token == unknown and a < end and b > start:
            raise ValueError(
                f"edit request {request.id!r}: the model's tokenizer does not know the bridge "
                f"{request.bridge!r} (it becomes {tokenizer.unk_token!r})"
            )


def key_position(prompt: Prompt, phrase: str, position: Position, template: str = "{}") -> int:
    """The token an edit reads: the last one of the prompt, or of `phrase`.

    The phrase is looked for as `Request` does, whole words first, and only in what was put into the
    template, whose own words may be the same.
    """
    if position == "last":
        return prompt.last
    if not phrase:
        raise ValueError("position 'first hop' needs a request that names its first hop")
    before, after = map(len, template.split("{}"))
    end = before + _span(prompt.text[before : len(prompt.text) - after], phrase)[1]
    return max(i for i, (a, b) in enumerate(prompt.offsets) if a < end and b > a)


def _span(text: str, phrase: str) -> tuple[int, int]:
    """Where a phrase stands in a text, case and white space aside; as whole words if it ever does.

    Raises:
        TokenError: nowhere, or several times.
    """
    words = r"\s+".join(map(re.escape, phrase.split()))
    found = [m.span() for m in re.finditer(words, text, re.IGNORECASE)]
    whole = [(a, b) for a, b in found if not re.search(r"\w", text[a - 1 : a] + text[b : b + 1])]
    places = whole or found
    return places[0] if len(places) == 1 else find_text(text, phrase)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def places_of(phrase: str, text: str) -> list[int]:
    """Where a phrase begins in a text, both in plain small letters, as whole words if it ever does."""
    phrase, text = _plain(phrase), _plain(text)
    found = [m.start() for m in re.finditer(re.escape(phrase), text)]
    ends = [(i, text[i - 1 : i] + text[i + len(phrase) : i + len(phrase) + 1]) for i in found]
    return [i for i, around in ends if not re.search(r"\w", around)] or found
