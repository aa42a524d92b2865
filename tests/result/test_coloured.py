"""Coloured text: one span per token, colours by sign and size, readable on either ground."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mi_hops.result.coloured import ColouredText, coloured_text, save_page
from mi_hops.result.result import Result


def made():
    return Result.from_arrays(
        {"score": (("example", "position"), [[1.0, -0.5, np.nan], [0.0, 0.25, 0.5]])},
        coords={
            "example": ["a", "b"],
            "position": [0, 1, 2],
            "token": (("example", "position"), np.array([["<s>", " x", ""], ["<s>", " y", " z"]])),
        },
        units={"score": "nats"},
        provenance={},
        allow_nonfinite=True,
    )


def alphas(html):
    return [
        (found[0], float(found[1]))
        for found in re.findall(r"rgba\((\d+),\d+,\d+,([0-9.]+)\)", html)
    ]


def contrast(one, other):
    """WCAG's ratio of two colours."""

    def light(colour):
        parts = [c / 255 for c in colour]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_largest_is_strongest_and_red_is_below_zero():
    html = coloured_text(made(), example="a").html
    assert alphas(html) == [("33", 0.6), ("178", 0.3)]
    assert 'title="-0.5 nats"' in html and "&lt;s&gt;" in html
    assert alphas(coloured_text(made(), example="b", limit=1.0).html)[-1] == ("33", 0.3)


@pytest.mark.parametrize(("ground", "ink"), [((255,) * 3, (0,) * 3), ((18,) * 3, (255,) * 3)])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_strongest_colour_leaves_the_text_readable(ground, ink, value):
    html = ColouredText(["x"], [value]).html
    found = re.search(r"rgba\((\d+),(\d+),(\d+),([0-9.]+)\)", html)
    *colour, alpha = map(float, found.groups())
    behind = [alpha * c + (1 - alpha) * g for c, g in zip(colour, ground, strict=True)]
    assert contrast(behind, ink) > 4.5


def test_a_page_of_its_own_follows_the_reader(tmp_path):
    texts = [ColouredText(["a\n"], [float("nan")], title="one & two"), ColouredText(["b"], [0.0])]
    page = save_page(texts, tmp_path / "text.html").read_text(encoding="utf-8")
    assert (
        'content="light dark"' in page and "one &amp; two" in page and "<span>a↵\n</span>" in page
    )
    with pytest.raises(FileExistsError):
        texts[0].save(tmp_path / "text.html")
    with pytest.raises(ValueError, match="does not end in '.html'"):
        texts[0].save(tmp_path / "text.txt")


def test_bad_input():
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        ColouredText(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="limit is 0"):
        ColouredText(["a"], [1.0], limit=0)
    with pytest.raises(ValueError, match="there are 2 examples; name one"):
        coloured_text(made())
    with pytest.raises(ValueError, match="no example 'c'"):
        coloured_text(made(), example="c")
    plain = Result.from_arrays({"x": ("layer", [1.0])}, provenance={})
    with pytest.raises(ValueError, match="needs 'position' and the label 'token'"):
        coloured_text(plain)
