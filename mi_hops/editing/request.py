"""What an edit is asked to do: make a two-hop prompt behave like its second hop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.text.matching import ARTICLES
from mi_hops.text.tokens import Prompt, encode, find_text, last_position

Position = Literal["last", "subject"]
Keep = Literal["hops"] | Callable[[TwoHopFact], Sequence[str]] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A two-hop prompt, and the second-hop prompt whose computation it is to take over.

    Attributes:
        composite: the two-hop prompt ("The nationality of the author of Misery is").
        guide: the same question about the bridge ("The nationality of Stephen King is").
        bridge: the entity between the hops, which stands in the guide.
        target: the answer; a record, and needed where the whole answer is covered.
        subject: the phrase in `composite` that `bridge` replaces in the guide.
        keep: prompts whose last token should be answered as before (used where constraints are
            asked for).
        id: of the fact it came from.

    Raises:
        ValueError: an empty prompt, a guide that equals the composite (such an edit changes
            nothing), a bridge that does not stand in the guide; with a subject, one that does not
            stand in the composite or stands there twice, or a guide that is not the composite with
            the bridge in its place (case, white space and an article before the name aside).
    """

    composite: str
    guide: str
    bridge: str
    target: str = ""
    subject: str = ""
    keep: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("composite", "guide", "bridge"):
            if not getattr(self, name).strip():
                raise ValueError(f"edit request {self.id!r}: {name} is empty")
        if _plain(self.composite) == _plain(self.guide):
            raise ValueError(
                f"edit request {self.id!r}: composite and guide are both {self.guide!r}, so the "
                "edit would change nothing; the guide names the bridge where the composite "
                "describes it"
            )
        if _plain(self.bridge) not in _plain(self.guide):
            raise ValueError(
                f"edit request {self.id!r}: the bridge {self.bridge!r} does not stand in the guide "
                f"{self.guide!r}; pass the second-hop prompt that names it"
            )
        if self.subject:
            self._check_frame()

    def _check_frame(self) -> None:
        """Refuse a guide that is another question than the composite about another name."""
        subject, composite = _plain(self.subject), _plain(self.composite)
        places = _places(subject, composite)
        if len(places) != 1:
            how = f"stands {len(places)} times" if places else "does not stand"
            raise ValueError(
                f"edit request {self.id!r}: the subject {self.subject!r} {how} in the composite prompt "
                f"{self.composite!r}; it must stand there once, in the place of the bridge"
            )
        (start,) = places
        before, after = composite[:start], composite[start + len(subject) :]
        article = next((a for a in ARTICLES if f" {before}".endswith(f" {a}")), "")
        stem = before.removesuffix(article)
        fitting = {f"{stem}{a}{_plain(self.bridge)}{after}" for a in ("", *ARTICLES)}
        if _plain(self.guide) not in fitting:
            raise ValueError(
                f"edit request {self.id!r}: the guide {self.guide!r} is not the composite "
                f"{self.composite!r} with {self.bridge!r} in the place of {self.subject!r}; both must "
                "ask in the same words"
            )

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
            kept = tuple(keep(fact))
        return cls(
            composite=fact.prompt(form),
            guide=fact.second_prompt(form),
            bridge=fact.bridge,
            target=fact.answer,
            subject=fact.first_hop,
            keep=tuple(dict.fromkeys(kept)),
            id=fact.id,
        )

    @classmethod
    def from_slot(
        cls, prompt: str, *, subject: str, bridge: str, target: str = "", **more: Any
    ) -> Request:
        """From one prompt with a ``{}`` where the composite has `subject` and the guide `bridge`.

        Raises:
            ValueError: a prompt without exactly one slot.
        """
        fill(prompt, "", "the prompt of an edit request")
        return cls(
            composite=prompt.replace("{}", subject),
            guide=prompt.replace("{}", bridge),
            bridge=bridge,
            subject=subject,
            target=target,
            **more,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types; what is empty is left out."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}


def requests_of(
    asked: Iterable[TwoHopFact | Request], form: str | None = None, keep: Keep = None
) -> list[Request]:
    """Requests as they are, and facts as requests."""
    return [a if isinstance(a, Request) else Request.from_fact(a, form, keep) for a in asked]


def fill(template: str, text: str, what: str = "a context template") -> str:
    """The template with `text` in its slot.

    Raises:
        ValueError: not exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise ValueError(f"{what} needs exactly one slot '{{}}', got {template!r}")
    return template.replace("{}", text)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse context templates that no prompt can be put into.

    Raises:
        ValueError: none at all, or one without exactly one ``{}``.
    """
    if not templates:
        raise ValueError("no context templates; pass ('{}',) for the bare prompt")
    for template in templates:
        fill(template, "")


def check_bridge_known(model: HookedModel, request: Request) -> None:
    """Refuse a bridge the tokenizer has no words for.

    Raises:
        ValueError: one of its tokens is the unknown token.
    """
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    prompt = encode(model, request.guide)
    start, end = find_text(request.guide, request.bridge) if unknown is not None else (0, 0)
    special = {getattr(model.tokenizer, f"{k}_token_id", None) for k in ("bos", "eos")}
    if unknown in special:  # GPT-2's tokenizer calls its only special token "unknown" as well
        return
    for token, (a, b) in zip(prompt.ids, prompt.offsets, strict=True):
        if token == unknown and a < end and b > start:
            raise ValueError(
                f"edit request {request.id!r}: the model's tokenizer does not know the bridge "
                f"{request.bridge!r} (it becomes {model.tokenizer.unk_token!r})"
            )


def key_position(prompt: Prompt, phrase: str, position: Position) -> int:
    """The token an edit reads: the last one of the prompt, or of `phrase`."""
    if position == "last":
        return prompt.last
    if position != "subject":
        raise ValueError(f"position is {position!r}; expected 'last' or 'subject'")
    if not phrase:
        raise ValueError("position 'subject' needs a request that names its subject")
    return last_position(prompt, phrase)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _places(phrase: str, text: str) -> list[int]:
    """Where a phrase begins in a text, as whole words if it ever does."""
    found = [m.start() for m in re.finditer(re.escape(phrase), text)]
    ends = [(i, text[i - 1 : i] + text[i + len(phrase) : i + len(phrase) + 1]) for i in found]
    return [i for i, around in ends if not re.search(r"\w", around)] or found
