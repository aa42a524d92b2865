"""How public objects show themselves in a notebook: small tables, never a flood."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

#: Rows of a table and characters of a cell that are shown at the most.
ROWS = 10
CELL = 80


def html_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[object]], *, total: int
) -> str:
    """An HTML table of the first `ROWS` rows, saying how many there are in all."""

    def line(cells: Sequence[object], tag: str) -> str:
        shown = (escape(shorten(str(cell), CELL), quote=False) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in shown) + "</tr>"

    first = [line(row, "td") for row in islice(rows, ROWS)]
    more = f"<p>and {total - len(first)} more</p>" if total > len(first) else ""
    return (
        f"<p>{escape(title, quote=False)}</p><table><thead>{line(header, 'th')}</thead>"
        f"<tbody>{''.join(first)}</tbody></table>{more}"
    )


def shorten(text: str, most: int) -> str:
    """`text`, its end replaced by "..." where it is longer than `most` characters."""
    return text if len(text) <= most else text[: max(most - 3, 0)] + "..."
