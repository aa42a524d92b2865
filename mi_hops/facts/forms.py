"""Template orders of prompts: whether any fact has the one that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from mi_hops.facts.fact import TwoHopFact


def require_form(facts: Sequence[TwoHopFact], form: str | None) -> None:
    """Refuse a form that no fact has a two-hop prompt of; None is each fact's first.

    Raises:
        ValueError: with the forms there are, and the one that may have been meant.
    """
    forms = list(dict.fromkeys(name for fact in facts for name in fact.prompts))
    if form is None or form in forms or not forms:
        return
    close = get_close_matches(form, forms, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"no fact has a two-hop prompt of form {form!r}; they have {forms}{meant}")
