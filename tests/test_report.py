"""The report: what it says, that it needs no network, and that a browser draws it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mi_hops.study import Study, StudySettings, compare_studies, run_study, write_report
from mi_hops.study.context import choosing
from mi_hops.study.numbers import figures, layers, number, percent, points
from mi_hops.study.report.opening import opening
from mi_hops.study.summary import headlines
from mi_hops.worlds import Hopland
from tests.reasoning.tiny_facts import SIZES, dictated, tiny_facts

pytestmark = pytest.mark.once
SMALL = StudySettings(sizes=SIZES)
SECTIONS = ("gap", "lens", "erasure", "locate", "injection", "editing")
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Ids, links, scripts and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.scripts: list[tuple[dict, str]] = []
        self.styles = ""
        self.words = ""
        self._inside: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        self.links += [(tag, name, given[name]) for name in ("src", "href") if name in given]
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append((given, ""))

    def handle_endtag(self, tag):
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self._inside:
            given, text = self.scripts[-1]
            self.scripts[-1] = (given, text + data)
        elif "style" in self._inside:
            self.styles += data
        else:
            self.words += data

    @property
    def plots(self) -> dict[str, dict]:
        """Id -> the figure that the page's script draws there."""
        return {g["data-plot"]: json.loads(t) for g, t in self.scripts if "data-plot" in g}

    @property
    def library(self) -> str:
        """plotly.js, unpacked."""
        (packed,) = (text for given, text in self.scripts if given.get("id") == "library")
        return gzip.decompress(base64.b64decode(packed)).decode()

    @property
    def rows(self) -> list[list[str]]:
        """Cells of every row of every table."""
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", self.source, re.S)
        return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)


def array(value):
    """Numbers of a plotly figure: a list, or typed and in base64."""
    if isinstance(value, dict):
        kind = np.dtype(value["dtype"])
        return np.frombuffer(base64.b64decode(value["bdata"]), dtype=kind).astype(float)
    return np.array(value, dtype=float)


@pytest.fixture(scope="module")
def study(load_tiny, tmp_path_factory):
    """A tiny model's study, with a gap dictated so that every step has something to work on."""
    model = load_tiny("llama", "bridge")
    splits = ("seen_parts", "first_unseen")
    facts = [replace(f, split=splits[i % 4 > 1]) for i, f in enumerate(tiny_facts(model, 16))]
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        dictated(patch)
        return run_study(model, facts, out=folder, settings=SMALL, progress=False)


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    return write_report(study, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


@pytest.fixture(scope="module")
def ignorant(load_tiny, tmp_path_factory):
    """The study of a model that knows both hops of no fact."""
    model = load_tiny("gpt2", "bridge")
    facts = [replace(f, answer=f"w{60 + i} w70") for i, f in enumerate(tiny_facts(model))]
    folder = tmp_path_factory.mktemp("ignorant")
    return run_study(model, facts, out=folder, settings=SMALL, progress=False)


def copied(study: Study, folder) -> Study:
    shutil.copytree(study.folder, folder)
    return Study.open(folder)


# what it says


@pytest.mark.slow
def test_every_step_has_its_section_in_order_and_in_the_contents(page):
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    targets = [link.removeprefix("#") for tag, _, link in page.links if link.startswith("#")]
    assert {*SECTIONS, "found", "terms", "sources"} <= set(targets)
    assert set(targets) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


@pytest.mark.slow
def test_every_figure_has_a_title_a_caption_with_n_and_plots(page):
    parts = page.source.split("<figure>")[1:]
    assert len(parts) == 3 + 3 + 2 + 1 + 2 + 2
    for part in parts:
        inside = part.split("</figure>")[0]
        assert re.search(r"<h3>\S.*</h3>", inside)
        caption = re.search(r"<figcaption>(.*)</figcaption>", inside).group(1)
        assert re.search(r"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}\d+", caption), caption
        assert inside.count('class="plot"') == inside.count("data-plot=") >= 1
    assert len(page.plots) == 3 + (4 + 2 + 4) + (2 + 2) + 3 + (3 + 1) + 2
    assert set(page.plots) <= set(page.ids)


@pytest.mark.slow
def test_the_head_says_what_was_studied(study, page):
    settings = study.settings
    for value in ("model", "fingerprint", "dtype", "backend", "processing", "mi_hops"):
        assert str(settings[value]) in page.text
    for name, version in settings["versions"].items():
        assert f"{name} {version}" in page.text
    assert f"n = {settings['n_facts']}" in page.text


@pytest.mark.slow
def test_the_numbers_are_those_of_the_summary(study, page):
    text = page.text
    forms = study.summary["gap"]["forms"]
    assert percent(next(iter(forms.values()))["gap"], n=False) in text
    assert number(study.summary["erasure"]["cells"][-1]["bridge_minus_control"], n=False) in text
    assert number(study.summary["locate"]["cells"]["resid_post"]["effect"], n=False) in text
    for point in study.summary["editing"]["choices"]["rule"]:
        assert point in text
    for sets in study.summary["editing"]["scores"].values():
        first = sets["correction"]["first_correct_after"]
        assert f"{first['value']:.1%}" in text
    for record in study.summary["gap"]["table"]:
        assert percent(record["share"], n=False) in text
    assert re.search(r"% \[[\d.]+, [\d.]+\] without injection", text)
    for name in ("median", "mean within 2 SD", "share raised"):  # beside the heavy-tailed mean
        assert name in text


@pytest.mark.slow
def test_the_plots_show_what_the_files_hold(study, page):
    erasure = study.result("erasure")
    expected = erasure.ci(variable="bridge").sel(variant="published", position="first hop")
    shown = next(
        t
        for t in page.plots["plot-erasure-2-1"]["data"]
        if t.get("name") == "bridge erased, published"
    )
    assert np.allclose(array(shown["y"]), expected["estimate"], rtol=1e-4)

    locate = study.result("locate").mean().data["effect"]
    panels = [page.plots[f"plot-locate-2-{i}"] for i in (1, 2, 3)]
    limits = {(p["layout"]["coloraxis"]["cmin"], p["layout"]["coloraxis"]["cmax"]) for p in panels}
    ((low, high),) = limits  # one symmetric scale
    assert low == -high
    assert high == pytest.approx(float(abs(locate).max()))
    located = study.summary["locate"]["located_layers"]
    assert [len(p["layout"].get("shapes", [])) for p in panels] == [len(located), 0, 0]

    gap = next(iter(study.summary["gap"]["forms"].values()))["by_split"]
    bars = page.plots["plot-gap-3-1"]["data"][0]
    assert np.allclose(array(bars["y"]), [s["two_hop_of_known"]["value"] for s in gap.values()])


@pytest.mark.slow
def test_it_opens_with_model_world_and_questions(study, page):
    shape = study.settings["shape"]
    begin = page.text.split("What was found")[1]
    assert f"{shape['layers']} layers of {shape['heads']} attention heads" in begin
    gap = study.result("gap")
    passed, failed = gap.passed[0], gap.failed[0]
    for fact in (passed, failed):
        assert f"{fact.prompt(gap.form)} …" in begin
    assert begin.index(passed.prompt(gap.form)) < begin.index(failed.prompt(gap.form))
    assert "made-up" not in begin


def test_a_made_up_world_is_called_one():
    world = Hopland()
    facts = world.two_hop_facts("seen_parts")[:3]
    settings = {"model": "m", "facts": {"file": None}}
    gap = SimpleNamespace(facts=facts, frame=pd.DataFrame())
    study = SimpleNamespace(settings=settings, result=lambda step: gap)
    told = opening(study)
    assert "a made-up world" in told.world and told.examples is None
    gap.facts = [replace(facts[0], relation1="author")]
    assert "made-up" not in opening(study).world


@pytest.mark.slow
def test_c_is_explained_where_it_first_stands(page):
    first = page.text.index("C = I")
    assert "C is the covariance of what the edited weights read" in page.text[first : first + 700]


@pytest.mark.slow
def test_differences_of_shares_are_percentage_points(study, page):
    other = study.summary["injection"]["memories"]["permuted_bridge"]["bridge_minus_this"]
    assert points(other) in page.text
    given = {"value": -0.125, "low": -0.2, "high": -0.0, "n": 8}
    assert points(given) == "−12.5 percentage points [−20.0, 0.0]"
    assert points({**given, "value": None}) == "no case"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.1, 0.3, "layer 1"),
        (-0.1, 0.3, "no clear layer"),
        (None, None, "no clear layer"),
    ],
)
def test_layers_are_located_only_against_the_others(study, low, high, says):
    summary = json.loads(json.dumps(study.summary))
    entry = summary["locate"]
    entry["located_layers"] = [1]
    entry["above_others"] = {"layers": [1], "value": 0.2, "low": low, "high": high, "n": 9}
    (found,) = [line for step, line in headlines(summary) if step == "locate"]
    assert found.value == says
    assert found.text.startswith("carries the second hop")
    assert ("does not stand out" in found.text) == (says == "no clear layer")
    assert "+0.200" in found.text


@pytest.mark.slow
def test_the_located_layers_are_compared_on_the_other_half(study):
    result = study.result("locate")
    effect = result["effect"].sel(kind="attn_out", position="last").transpose("example", "layer")
    above = study.summary["locate"]["above_others"]
    if above is None:
        pytest.skip("no layer, or every layer, is located on the choosing half")
    half = choosing(result["example"].values)
    inside = np.isin(result["layer"].values, above["layers"])
    values = effect.values[~half]
    expected = (values[:, inside].mean(1) - values[:, ~inside].mean(1)).mean()
    assert above["value"] == pytest.approx(expected)
    assert above["n"] == (~half).sum()


@pytest.mark.slow
def test_every_figure_has_a_text_and_no_theme_of_its_own(page):
    plots = r'class="plot" id="plot-[^"]*" role="img" aria-label="([^"]*)"'
    labels = re.findall(plots, page.source)
    assert len(labels) == len(page.plots)
    for label in labels:
        assert re.match(r".+\. (Bars|Lines|Heatmap) of .+", label), label
        assert re.search(r"\d", label), label
    for plot in page.plots.values():
        assert "template" not in plot["layout"]
        assert "color" not in plot["layout"].get("font", {})
    assert "prefers-color-scheme: dark" in page.styles


@pytest.mark.slow
def test_cases_show_what_was_said_before_and_after(study, page):
    frame = study.result("editing").frame
    first = frame[frame["set"] == "correction"].iloc[0]
    assert first["prompt"] in page.text
    assert f"of {len(study.result('editing').case_ids)}" in page.text


def test_a_model_that_knows_nothing_gets_a_report_that_says_so(ignorant, tmp_path):
    page = Page(write_report(ignorant, tmp_path / "report.html"))
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    assert "knows both hops of none of these facts" in page.text
    for step in SECTIONS[1:]:
        assert ignorant.skipped(step) in page.text.split("1. The compositionality gap")[-1]
        assert not [i for i in page.plots if i.startswith(f"plot-{step}")]
    assert "None" not in page.text
    assert "nan" not in page.text.split()


@pytest.mark.slow
def test_a_step_that_was_left_out_shows_its_reason(study, tmp_path):
    changed = copied(study, tmp_path / "study")
    for step in ("erasure", "editing"):
        changed.path(step).unlink()
        (changed.folder / f"{step}.skipped").write_text(f"no {step} today, for {EVIL}\n")
        changed.summary[step] = {"skipped": changed.skipped(step)}
    page = Page(write_report(changed, tmp_path / "r.html"))
    for step in ("erasure", "editing"):
        assert page.text.count(f"no {step} today") == 2  # among the findings, and in its place
        assert not [i for i in page.plots if i.startswith(f"plot-{step}")]
    assert "img" not in page.tags


@pytest.mark.slow
def test_text_of_models_and_facts_is_escaped(study, tmp_path):
    changed = copied(study, tmp_path / "study")
    evaluation = changed.result("editing")
    for column in ("prompt", "answer", "said_before", "said_after"):
        evaluation.frame[column] = EVIL
    evaluation.save(changed.path("editing"), overwrite=True)
    changed.settings["model"] = changed.settings["facts"]["report"] = EVIL
    for form in changed.summary["gap"]["forms"].values():  # becomes a label inside a plot
        form["by_split"][EVIL] = form["by_split"].pop("seen_parts")
    page = Page(write_report(changed, tmp_path / "r.html"))
    plain = Page(write_report(study, tmp_path / "plain.html"))
    assert EVIL in page.words
    assert page.tags == plain.tags
    labels = json.dumps(page.plots["plot-gap-3-1"])
    assert "&lt;script" in labels and "<script" not in labels


# the file


@pytest.mark.slow
def test_it_needs_no_network(report, page):
    for tag, name, link in page.links:
        text_link = tag == "a" and name == "href" and link.startswith("https://arxiv.org/abs/")
        assert text_link or link.startswith(("#", "data:")), (tag, name, link)
    assert not re.search(r"url\(|@import", page.styles)
    assert not {"iframe", "img", "object", "embed"} & set(page.tags)
    assert "plotly.js" in page.library[:200] and "MIT" in page.library[:200]
    assert report.stat().st_size < 2_000_000


@pytest.mark.slow
def test_the_same_study_gives_the_same_file(study, report, tmp_path):
    again = write_report(Study.open(study.folder), tmp_path / "again.html")
    assert again.read_bytes() == report.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


@pytest.mark.slow
def test_nothing_half_written(study, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old one")
    with pytest.raises(ValueError, match="not finished.*resume"):
        write_report(replace(study, summary={}), path, overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_report(study, path)
    with pytest.raises(ValueError, match="does not end in '.html'"):
        write_report(study, tmp_path / "report.pdf")
    broken = copied(study, tmp_path / "study")
    broken.path("locate").write_bytes(b"no NetCDF")
    with pytest.raises((ValueError, OSError)):
        write_report(broken, path, overwrite=True)
    assert path.read_text() == "the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "study"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(study, tmp_path / "missing" / "report.html")


# two studies


@pytest.fixture(scope="module")
def compared(study, ignorant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    compare_studies(study, study.folder, folder / "same.html", names=["one", "other"])
    compare_studies(study, ignorant, folder / "page.html", names=["knowing", "ignorant"])
    return folder


@pytest.mark.slow
def test_a_comparison_shows_both_studies(study, compared):
    page = Page(compared / "same.html")
    assert [i for i in page.ids if i in SECTIONS] == list(SECTIONS)
    text = page.text
    for name, value in study.headlines():
        # What was chosen stands beside the number, so that the numbers of both share a row.
        assert re.sub(r" \((?!C = I)[^)]*\)", "", name) in text and value in text
    rows = {cells[0]: cells[1:] for cells in page.rows if len(cells) == 3}
    gap = next(cells for name, cells in rows.items() if name.startswith("gap:"))
    assert gap[0] == gap[1] != "–"
    assert "nothing" in text  # differs between a study and itself
    for name, plot in page.plots.items():
        groups = [t["name"] for t in plot["data"] if t.get("showlegend")]
        assert groups == ["one", "other"], name
        drawn = {t["name"]: array(t["y"]) for t in plot["data"] if t.get("showlegend")}
        np.testing.assert_array_equal(drawn["one"], drawn["other"])


@pytest.mark.slow
def test_a_comparison_says_what_one_study_lacks(study, ignorant, compared):
    page = Page(compared / "page.html")
    assert len(page.source.encode()) < 2_000_000
    assert study.settings["fingerprint"] in page.text
    assert ignorant.settings["fingerprint"] in page.text
    assert f"ignorant: The logit lens was left out: {ignorant.skipped('lens')}" in page.text
    assert not re.search(r"\b(None|nan)\b", page.text)


@pytest.mark.slow
def test_a_comparison_refuses_what_it_cannot_compare(study, tmp_path):
    with pytest.raises(ValueError, match="not finished.*resume"):
        compare_studies(study, replace(study, summary={}), tmp_path / "a.html")
    with pytest.raises(ValueError, match="two different names"):
        compare_studies(study, study, tmp_path / "a.html", names=["x", "x"])
    with pytest.raises(ValueError, match="does not end in '.html'"):
        compare_studies(study, study, tmp_path / "a.pdf", names=["x", "y"])
    assert not list(tmp_path.iterdir())


# numbers in words


def test_numbers_in_words():
    share = {"value": 0.378, "low": 0.351, "high": 0.405, "n": 1290}
    assert percent(share) == "37.8% [35.1, 40.5], n = 1290"
    assert percent({"value": None, "low": None, "high": None, "n": 0}) == "no case"
    assert percent({**share, "low": None}, n=False) == "37.8% (no interval)"
    drop = {"value": -0.078, "low": -0.122, "high": -0.034, "n": 100}
    assert number(drop) == "−0.078 [−0.122, −0.034], n = 100"
    assert number({**drop, "high": float("nan")}, n=False) == "−0.078 (no interval)"
    assert [figures(v) for v in (0, 0.5, 60.806, 23957.7, 0.00067, 0.00002)] == [
        "0.000",
        "0.500",
        "60.806",
        "23,958",
        "0.0007",
        "2.0e−05",
    ]
    assert figures(None) == figures(float("nan")) == "–"
    assert [layers(x) for x in ([], [3], [2, 3, 4], [1, 4])] == [
        "no layer",
        "layer 3",
        "layers 2 to 4",
        "layers 1, 4",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-0.2, -0.1, "The answer rests on the bridge there."),
        (-0.2, 0.1, "not a clear difference"),
        (None, None, "not a clear difference"),
    ],
)
def test_findings_claim_only_what_the_interval_allows(study, low, high, says):
    summary = json.loads(json.dumps(study.summary))
    for entry in summary["erasure"]["cells"]:
        entry["bridge_minus_control"] |= {"value": -0.1, "low": low, "high": high}
    (found,) = [line for step, line in headlines(summary) if step == "erasure"]
    assert says in found.text
    assert found.value == "−0.100"


# the browser

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run --enable-logging=stderr --v=0 "
    "--virtual-time-budget=20000"
)
#: Whatever would leave this machine finds nothing.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH")


def browse(chromium, path, profile, *options):
    """(DOM after drawing, lines that the page wrote to the console)."""
    done = subprocess.run(
        [chromium, *FLAGS.split(), OFFLINE, f"--user-data-dir={profile}", *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_every_plot_without_errors(chromium, page, tmp_path, width):
    measure = (
        "<script>document.documentElement.dataset.width = document.documentElement.scrollWidth + "
        "'/' + window.innerWidth;</script></body>"
    )
    copy = tmp_path / "report.html"
    copy.write_text(page.source.replace("</body>", measure), "utf-8")
    dom, console = browse(
        chromium, copy, tmp_path / "profile", f"--window-size={width},1200", "--dump-dom"
    )
    assert console == []
    for name in page.plots:
        drawn = dom.split(f'id="{name}"')[1].split("data-plot=")[0]
        assert 'class="main-svg"' in drawn, f"{name} was not drawn"
        assert re.search(r'class="(trace |hm)', drawn), f"{name} is empty"
    needed, there = re.search(r'data-width="(\d+)/(\d+)"', dom).groups()
    assert int(needed) <= int(there), "the page is wider than the window"


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_draws_a_comparison(chromium, compared, tmp_path):
    path = compared / "page.html"
    dom, console = browse(chromium, path, tmp_path / "profile", "--dump-dom")
    assert console == []
    for name in Page(path).plots:
        assert 'class="main-svg"' in dom.split(f'id="{name}"')[1].split("data-plot=")[0]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "ink"), [(0, "rgb(227, 231, 236)"), (1, "rgb(28, 33, 40)")])
def test_figures_take_the_readers_theme(chromium, report, tmp_path, scheme, ink):
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom")
    dom, _ = browse(chromium, report, tmp_path / "profile", *options)
    ticks = re.findall(r'class="xtick"><text[^>]*?fill: ([^;]*);', dom)
    assert ticks and set(ticks) == {ink}


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_opens_the_report_of_a_model_that_knows_nothing(chromium, ignorant, tmp_path):
    path = write_report(ignorant, tmp_path / "report.html")
    dom, console = browse(chromium, path, tmp_path / "profile", "--dump-dom")
    assert console == []
    assert dom.count('class="main-svg"') >= 1  # the hops by themselves are shown


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("fault", ["console.error('broken')", "throw new Error('broken')"])
def test_the_browser_test_sees_errors(chromium, tmp_path, fault):
    path = tmp_path / "broken.html"
    path.write_text(f"<!doctype html><title>x</title><script>{fault}</script>")
    _, console = browse(chromium, path, tmp_path / "profile", "--dump-dom")
    assert "broken" in "".join(console)


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_takes_a_picture(chromium, report, tmp_path):
    picture = tmp_path / "report.png"
    browse(
        chromium, report, tmp_path / "profile", "--window-size=1200,1400", f"--screenshot={picture}"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
