"""Numbers of tokens shown as coloured text: HTML that can be read on a light and on a dark page.

The text keeps the page's own colour; only a transparent blue (above 0) or red (below) lies behind it, the
stronger the farther from 0. Hovering tells the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from mi_hops.result.files import replacing
from mi_hops.result.result import Result

_BLUE, _RED = "33,102,172", "178,24,43"
# Behind black text as behind white this much colour leaves a contrast above 4.5.
_STRONGEST = 0.6


@dataclass(frozen=True, repr=False)
class ColouredText:
    """Tokens with one number each, shown in colour by notebooks.

    Attributes:
        tokens: as they are to be read, their spaces included.
        values: one per token; NaN is left uncoloured.
        title: said above the text.
        unit: of the numbers, for what hovering tells.
        limit: the number that gets the strongest colour; None for the largest there is.

    Raises:
        ValueError: unequal numbers of tokens and values, or a limit that is not above 0.

    Examples:
        >>> from mi_hops.result import ColouredText
        >>> text = ColouredText(["The", " end"], [0.5, -1.0], unit="nats")
        >>> text.html.count("<span")
        2
    """

    tokens: Sequence[str]
    values: Sequence[float]
    title: str = ""
    unit: str = ""
    limit: float | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(
                f"{len(self.tokens)} tokens and {len(self.values)} values; give one per token"
            )
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit}; expected a number above 0, or None")

    def __repr__(self) -> str:
        shown = [f"{t}[{v:.2g}]" for t, v in zip(self.tokens[:30], self.values, strict=False)]
        return f"ColouredText: {''.join(shown)}{'...' if len(self.tokens) > 30 else ''}"

    def _repr_html_(self) -> str:
        return self.html

    @property
    def html(self) -> str:
        """A ``<div>`` with one ``<span>`` per token."""
        limit = self.limit or max((abs(v) for v in self.values if math.isfinite(v)), default=0.0)
        spans = "".join(
            _span(token, value, limit, self.unit)
            for token, value in zip(self.tokens, self.values, strict=True)
        )
        title = f"<p>{escape(self.title, quote=False)}</p>" if self.title else ""
        return f'<div style="white-space:pre-wrap;line-height:1.9">{title}{spans}</div>'

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a standalone ``.html`` page, in the reader's light or dark colours."""
        return save_page([self], path, overwrite=overwrite)


def coloured_text(
    result: Result, variable: str | None = None, *, example: Any = None, limit: float | None = None
) -> ColouredText:
    """One example of a result on positions, as coloured text.

    Args:
        result: with a dimension ``position`` and the label ``token``, as `attribute_inputs`, and `patch` at
            every position of one prompt, give it. Other dimensions are to be selected before.
        variable: the main one by default.
        example: its label; the only one by default.
        limit: of `ColouredText`.

    Raises:
        ValueError: no tokens or positions, more dimensions, or several examples and none named.
    """
    array = result.numbers(variable)
    if "token" not in array.coords or "position" not in array.dims:
        raise ValueError(
            f"{array.name!r} has dimensions {array.dims} and labels {list(array.coords)}; coloured text "
            "needs 'position' and the label 'token'"
        )
    if "example" in array.dims:
        labels = array["example"].values.tolist()
        if example is None and len(labels) > 1:
            raise ValueError(f"there are {len(labels)} examples; name one, e.g. {labels[0]!r}")
        if example is not None and example not in labels:
            raise ValueError(f"no example {example!r}; there are {labels[:10]}")
        array = array.isel(example=0 if example is None else labels.index(example))
    if array.ndim != 1:
        raise ValueError(f"{array.name!r} also has {array.dims}; select one of each first")
    tokens = [str(token) for token in array["token"].values]
    kept = [i for i, (t, v) in enumerate(zip(tokens, array.values, strict=True)) if t or v == v]
    return ColouredText(
        [tokens[i] for i in kept],
        [float(array.values[i]) for i in kept],
        title=result.title,
        unit=str(array.attrs.get("units", "")),
        limit=limit,
    )


def coloured_texts(result: Result, variable: str | None = None) -> list[ColouredText]:
    """Every example of a result on positions, as coloured texts under one limit: the largest number of all.

    Raises:
        ValueError: as in `coloured_text`.
    """
    array = result.numbers(variable)
    largest = float(abs(array).max()) if array.notnull().any() else 0.0
    labels = array["example"].values.tolist() if "example" in array.dims else [None]
    return [
        replace(
            coloured_text(result, variable, example=label, limit=largest or None),
            title="" if label is None else str(label),
        )
        for label in labels
    ]


def save_page(texts: Sequence[ColouredText], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write several texts as one page.

    Raises:
        ValueError: a name that does not end in ``.html``.
        FileExistsError: it exists and `overwrite` is False.
    """
    body = "\n".join(text.html for text in texts)
    page = (
        '<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" '
        'content="light dark"><title>mi_hops</title></head><body style="font-family:sans-serif;'
        f'max-width:60em;margin:2em auto">\n{body}\n</body></html>\n'
    )
    with replacing(path, suffix=".html", overwrite=overwrite) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def _span(token: str, value: float, limit: float, unit: str) -> str:
    shown = escape(token.replace("\n", "↵\n").replace("\t", "⇥"), quote=False)
    if not math.isfinite(value):
        return f"<span>{shown}</span>"
    strength = _STRONGEST * min(abs(value) / limit, 1.0) if limit else 0.0
    colour = _BLUE if value > 0 else _RED
    told = escape(f"{value:.4g} {unit}".strip())
    return f'<span title="{told}" style="background:rgba({colour},{strength:.3f})">{shown}</span>'
