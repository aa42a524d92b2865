"""Figures: the data drawn are the data given, and labels, limits and bands say what they mean."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from mi_hops.result import plots
from mi_hops.result.figure_parts import band_outline
from mi_hops.result.plots import Colours


@pytest.fixture
def grid():
    values = np.array([[0.1, -0.4, 0.2], [0.0, 0.3, -0.1]])
    return xr.DataArray(
        values,
        dims=("layer", "position"),
        coords={"layer": [0, 1], "token": ("position", ["<s>", " of", " of"])},
        name="effect",
    )


def heatmap(array, x="position", title="t", **more):
    return plots.heatmap(array, x=x, y="layer", title=title, **more)


def scale(figure):
    axis = figure.layout.coloraxis
    return axis.cmin, axis.cmax


def test_heatmap_draws_the_values_given(grid):
    figure = heatmap(grid, colours=Colours("effect (nats)"))
    np.testing.assert_array_equal(figure.data[0].z, grid.values)
    turned = plots.heatmap(grid, x="layer", y="position", title="t")
    np.testing.assert_array_equal(turned.data[0].z, grid.values.T)
    assert figure.layout.xaxis.title.text == "position"
    assert figure.layout.yaxis.title.text == "layer"
    assert figure.layout.yaxis.autorange != "reversed"
    assert heatmap(grid, y_upward=False).layout.yaxis.autorange == "reversed"


def test_colours_are_symmetric_with_positive_blue(grid):
    figure = heatmap(grid, colours=Colours("effect (nats)"))
    assert scale(figure) == (-0.4, 0.4)
    bar = figure.layout.coloraxis.colorbar.title.text
    assert "effect (nats)" in bar and "blue: positive" in bar
    colours = figure.layout.coloraxis.colorscale
    red, _, blue = (int(part) for part in colours[-1][1].removeprefix("rgb(")[:-1].split(","))
    assert blue > red, "the high end is blue"
    moved = heatmap(grid, colours=Colours(midpoint=1.0))
    low, high = scale(moved)
    assert (low + high) / 2 == pytest.approx(1.0) and low == pytest.approx(-0.4)
    assert "above 1" in moved.layout.coloraxis.colorbar.title.text
    assert scale(heatmap(grid, colours=Colours(high=2.0))) == (-2.0, 2.0)


def test_white_stays_at_the_midpoint_between_unequal_ends(grid):
    figure = heatmap(grid, colours=Colours(low=-0.1, high=0.3))
    assert scale(figure) == (-0.1, 0.3)
    shades = figure.layout.coloraxis.colorscale
    place, colour = min(shades, key=lambda shade: abs(shade[0] - 0.25))  # 0 lies a quarter up
    assert place == 0.25
    assert min(float(part) for part in colour.removeprefix("rgb(")[:-1].split(",")) > 240


def test_sequential_scale_starts_at_zero(grid):
    figure = heatmap(abs(grid), colours=Colours(sequential=True))
    assert scale(figure) == (0.0, 0.4)
    assert "darker: higher" in figure.layout.coloraxis.colorbar.title.text


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_flat_and_empty_heatmaps_have_a_scale(grid, fill):
    for sequential in (False, True):
        low, high = scale(heatmap(xr.full_like(grid, fill), colours=Colours(sequential=sequential)))
        assert low < high


def test_equal_tokens_stay_apart_and_markup_is_escaped(grid):
    figure = heatmap(grid, title="a < b")
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt; 0", " of 1", " of 2"]
    assert len(set(figure.data[0].x)) == 3
    assert "a &lt; b" in figure.layout.title.text
    assert plots.token_label(" ", 4) == "␣ 4"
    assert plots.token_label("\n", 4) == "\\n 4"
    assert plots.token_label("a\nb", 4) == "a\\nb 4"


def test_heads_are_named_by_layer_and_head():
    array = xr.DataArray(
        np.arange(6.0).reshape(2, 3), dims=("layer", "head"), coords={"layer": [4, 7]}
    )
    figure = heatmap(array, x="head")
    assert figure.data[0].customdata[1][2].startswith("L7H2<br>")
    array = array.assign_coords(head=[0, 1, 2])
    assert plots.axis_labels(array, "head") == ["H0", "H1", "H2"]
    assert plots.axis_labels(array.isel(layer=1), "head") == ["L7H0", "L7H1", "L7H2"]


def test_hover_has_the_value_and_the_further_arrays(grid):
    n = xr.DataArray([7, 9], dims="layer", coords={"layer": [0, 1]})
    lower = (grid - 0.123456789).transpose("position", "layer")
    figure = heatmap(grid, hover={"n": n, "lower": lower})
    text = figure.data[0].customdata[1][0]
    assert text == "position: &lt;s&gt; 0<br>layer: 1<br><b>0</b><br>n: 9<br>lower: -0.123457"


def test_facets_share_one_scale_and_keep_their_order():
    array = xr.DataArray(
        np.arange(30.0).reshape(5, 2, 3),
        dims=("component", "layer", "position"),
        coords={"component": ["resid", "attn", "mlp", "q", "k"]},
    )
    figure = heatmap(array, facet="component")
    notes = [note.text for note in figure.layout.annotations]
    assert notes == ["residual stream", "attn", "mlp", "q", "k"]
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    for index, trace in enumerate(figure.data):
        np.testing.assert_array_equal(trace.z, array.values[index])


def test_heatmap_refuses_what_it_cannot_draw(grid):
    with pytest.raises(ValueError, match=r"has dimensions .* select or average"):
        heatmap(grid.expand_dims(head=2))
    with pytest.raises(ValueError, match="low < high"):
        heatmap(grid, colours=Colours(low=1.0, high=0.0))
    with pytest.raises(ValueError, match="needs numbers"):
        heatmap(grid.astype(str))


@pytest.fixture
def curve():
    return pd.DataFrame(
        {
            "layer": [0, 1, 2, 0, 1, 2],
            "value": [0.1, 0.2, 0.4, 0.3, 0.3, 0.3],
            "lower": [0.0, 0.1, 0.3, np.nan, 0.2, 0.2],
            "upper": [0.2, 0.3, 0.6, np.nan, 0.4, 0.4],
            "group": ["passed"] * 3 + ["failed"] * 3,
            "n": [5] * 6,
        }
    )


def test_lines_draw_points_bands_and_references(curve):
    figure = plots.lines(
        curve.iloc[::-1],
        x="layer",
        y="value",
        group="group",
        interval=("lower", "upper"),
        title="t",
        labels={"value": "probability"},
        references={"clean": 0.9},
    )
    drawn = {trace.name: trace for trace in figure.data if trace.name}
    assert list(drawn) == ["failed", "passed"]
    np.testing.assert_array_equal(drawn["passed"].x, [0, 1, 2])
    np.testing.assert_array_equal(drawn["passed"].y, [0.1, 0.2, 0.4])
    assert drawn["passed"].customdata[2] == " [0.3, 0.6]<br>n: 5"
    assert drawn["failed"].customdata[0] == "<br>n: 5"
    bands = {trace.legendgroup: trace for trace in figure.data if trace.fill}
    assert list(bands["passed"].x) == [0, 1, 2, 2, 1, 0]
    assert list(bands["passed"].y) == [0.2, 0.3, 0.6, 0.3, 0.1, 0.0]
    assert list(bands["failed"].x) == [1, 2, 2, 1], "no band where a bound is missing"
    assert drawn["passed"].line.color != drawn["failed"].line.color
    assert figure.layout.shapes[0].y0 == 0.9
    assert figure.layout.yaxis.title.text == "probability"


def test_a_gap_splits_the_band():
    x = np.arange(5.0)
    lower = np.array([0, 0, np.nan, 0, 0])
    across, along = band_outline(x, lower, lower + 1)
    assert across == [0, 1, 1, 0, None, 3, 4, 4, 3]
    assert along == [1, 1, 0, 0, None, 1, 1, 0, 0]


def test_bars_have_error_bars_of_the_right_length(curve):
    figure = plots.bars(
        curve, x="layer", y="value", group="group", interval=("lower", "upper"), title="t"
    )
    passed, failed = figure.data
    np.testing.assert_array_equal(passed.y, [0.1, 0.2, 0.4])
    np.testing.assert_allclose(passed.error_y.array, [0.1, 0.1, 0.2])
    np.testing.assert_allclose(passed.error_y.arrayminus, [0.1, 0.1, 0.1])
    np.testing.assert_allclose(failed.error_y.array, [0, 0.1, 0.1])
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"]
    assert plots.bars(curve.iloc[:3], x="layer", y="value", title="t").data[0].error_y.array is None


@pytest.mark.parametrize("draw", [plots.lines, plots.bars])
def test_frames_that_cannot_be_drawn_are_refused(draw, curve):
    with pytest.raises(ValueError, match=r"no column \['depth'\]"):
        draw(curve, x="depth", y="value", title="t")
    with pytest.raises(ValueError, match="several rows at one 'layer'"):
        draw(curve, x="layer", y="value", title="t")
    with pytest.raises(ValueError, match="use bars"):
        plots.lines(curve, x="group", y="value", title="t")


def test_long_titles_are_broken(grid):
    figure = heatmap(grid, title="word " * 40)
    assert figure.layout.title.text.count("<br>") == 2
    narrow = heatmap(grid, title="word " * 40, width=430)
    assert max(map(len, narrow.layout.title.text.split("<br>"))) <= 50
    short = heatmap(grid, title="word")
    assert figure.layout.margin.t > short.layout.margin.t


def test_layout_is_the_callers(grid, curve):
    drawn = [
        heatmap(grid, width=500, template="plotly_dark"),
        plots.lines(curve[:3], x="layer", y="value", title="t", width=500, template="plotly_dark"),
        plots.bars(curve[:3], x="layer", y="value", title="t", width=500, template="plotly_dark"),
    ]
    for figure in drawn:
        assert figure.layout.width == 500
        assert figure.layout.template.layout.font.color == "#f2f5fa"
    assert plots.lines(curve[:3], x="layer", y="value", title="t", height=200).layout.height == 200
    assert plots.lines(curve[:3], x="layer", y="value", title="t").layout.height == 420


def inks(figure):
    """Colours of text and lines that the figure sets by itself, not by its template."""
    layout = figure.to_plotly_json()["layout"]
    layout.pop("template")
    fonts = [layout.get("font", {}), layout["title"].get("font", {})]
    fonts += [note.get("font", {}) for note in layout.get("annotations", ())]
    return [font["color"] for font in fonts if "color" in font]


def test_ink_is_the_templates(grid, curve):
    import plotly.io as pio

    before = pio.templates.default
    try:
        pio.templates.default = "plotly_dark"
        drawn = [
            heatmap(grid),
            plots.lines(curve[:3], x="layer", y="value", title="t", references={"clean": 0.2}),
            plots.bars(curve[:3], x="layer", y="value", interval=("lower", "upper"), title="t"),
        ]
    finally:
        pio.templates.default = before
    for figure in drawn:
        assert figure.layout.template.layout.paper_bgcolor == "rgb(17,17,17)"
        assert figure.layout.paper_bgcolor is None
        assert inks(figure) == []
    assert drawn[2].data[0].error_y.color is None  # the template has one
    assert "#000000" not in plots.COLOURS


def test_tokens_are_escaped_once_wherever_they_stand(grid):
    lines = xr.concat([grid, grid], dim="layer").assign_coords(layer=[0, 1, 2, 3])
    panels = heatmap(lines.expand_dims(head=[0, 1]), x="head", facet="position")
    assert panels.layout.annotations[0].text == "&lt;s&gt; 0"
    frame = pd.DataFrame({"token": ["<s> 0"], "value": [1.0]})
    bars = plots.bars(frame, x="token", y="value", title="t")
    assert bars.layout.xaxis.ticktext == ("&lt;s&gt; 0",)
    assert bars.data[0].text == ("&lt;s&gt; 0",)
    known = grid.assign_coords(position=[4, 5, 6], token=("position", ["<s>", "", " b"]))
    assert plots.axis_labels(known, "position") == ["<s> 4", "5", " b 6"]


def test_zero_has_no_sign(grid):
    array = xr.full_like(grid, -0.0)
    figure = heatmap(array)
    assert not np.signbit(figure.data[0].z).any()
    assert "<b>0</b>" in figure.data[0].customdata[0][0]
    frame = pd.DataFrame({"x": [0, 1], "y": [-0.0, 1.0], "low": [-0.0, 0.5], "high": [0.2, 1.5]})
    for draw in (plots.lines, plots.bars):
        drawn = draw(
            frame, x="x", y="y", interval=("low", "high"), title="t", references={"a": -0.0}
        )
        points = next(t for t in drawn.data if t.customdata is not None)
        assert not np.signbit(np.asarray(points.y)).any()
        assert points.customdata[0] == " [0, 0.2]"
        assert drawn.layout.annotations[0].text == "a 0"
    assert plots.axis_labels(xr.DataArray([1.0], dims="s", coords={"s": [-0.0]}), "s") == ["0"]


def test_names_are_spelled_out(grid):
    array = grid.rename(position="kv_head").drop_vars("token")
    figure = heatmap(array, x="kv_head")
    assert figure.layout.xaxis.title.text == "key/value head"
    frame = pd.DataFrame({"set": ["other_order", "Other_Order"], "p": [1.0, 0.5]})
    drawn = plots.bars(frame, x="set", y="p", title="t")
    assert drawn.layout.xaxis.ticktext == ("other order", "Other_Order")


def test_the_colour_bars_title_stands_above_its_ticks(grid):
    label = "change of the logit difference (logits)"
    figure = heatmap(grid, colours=Colours(label))
    title = figure.layout.coloraxis.colorbar.title
    assert title.side == "top"
    assert all(len(line) <= 18 for line in title.text.split("<br>"))


@pytest.mark.slow
@pytest.mark.browser
def test_figures_become_pictures(grid, tmp_path):
    pytest.importorskip("kaleido")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    figure = heatmap(grid, width=300, height=200)
    (tmp_path / "figure.json").write_text(figure.to_json())
    code = (
        "import plotly.io as pio\n"
        "figure = pio.from_json(open('figure.json').read())\n"
        "[figure.write_image(name) for name in ('a.png', 'a.svg')]\n"
    )
    # A process of its own: now and then the browser that kaleido starts never answers.
    drawing = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    try:
        assert drawing.wait(timeout=90) == 0
    except subprocess.TimeoutExpired:
        os.killpg(drawing.pid, signal.SIGKILL)
        pytest.skip("kaleido's browser did not answer within 90 s")
    for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<svg")):
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_plotly_is_imported_late_and_its_settings_left_alone():
    code = (
        "import sys, mi_hops.result.plots, mi_hops.result.result\n"
        "assert 'plotly' not in sys.modules and 'torch' not in sys.modules\n"
        "import plotly.io as pio\n"
        "before = pio.templates.default\n"
        "figure = mi_hops.result.plots.bars({'x': ['a'], 'y': [1]}, x='x', y='y', title='t')\n"
        "assert pio.templates.default == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
