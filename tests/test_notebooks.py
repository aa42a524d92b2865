"""Every notebook runs from top to bottom, and what is committed of its outputs is small and clean."""

from __future__ import annotations

import base64
import importlib.util
import re
import resource
import sys
from pathlib import Path

import nbformat
import pytest

from tests.models import require_real_model

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LIMIT_KB = 300  # of a run; the PNGs next to the figures come on top where outputs are committed
LIMIT_COMMITTED_KB = 1000
LIMIT_CPU_S = 120  # of one core, start of the kernel included; on an idle machine about half of it

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def refresh():
    spec = importlib.util.spec_from_file_location("refresh", NOTEBOOKS / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert PATHS


def _cpu_of_ended_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
# The machine may be busy with other things; cells have a limit of their own.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "path",
    # One of all on every TransformerLens: the pages' code meets each wing.
    [p if p.stem == "02_patching" else pytest.param(p, marks=pytest.mark.once) for p in PATHS],
    ids=lambda path: path.stem,
)
def test_it_runs_from_top_to_bottom(path, refresh, monkeypatch):
    if "smollm2" in _code_cells(path)[0].source:
        require_real_model()
    # The kernel is another process: let it find this package and this environment's interpreter.
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = _cpu_of_ended_children()
    notebook = refresh.thin(refresh.run(path))

    assert _cpu_of_ended_children() - before < LIMIT_CPU_S
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(refresh.PLOTLY in o.get("data", {}) for c in cells for o in c.outputs)
    assert len(nbformat.writes(notebook)) < 1000 * LIMIT_KB


@each_notebook
def test_the_model_is_named_in_the_first_cell_and_can_be_changed(path):
    first = _code_cells(path)[0].source
    assert re.search(
        r'^MODEL = os\.environ\.get\("MI_HOPS_MODEL", "(hops-|apposed-|smollm2)', first, re.M
    )


@each_notebook
def test_the_committed_outputs_are_small_and_of_one_whole_run(path):
    assert path.stat().st_size < 1000 * LIMIT_COMMITTED_KB
    cells = _code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = path.read_text()
    assert not re.search(r"(/(home|root|tmp|work)/|[A-Z]:\\\\)", text), "a path of one machine"
    assert sys.prefix not in text


@each_notebook
def test_every_committed_figure_has_a_picture_for_viewers_without_plotly(path, refresh):
    outputs = [output.get("data", {}) for cell in _code_cells(path) for output in cell.outputs]
    figures = [data for data in outputs if refresh.PLOTLY in data]
    assert figures
    for data in figures:
        assert base64.b64decode(data[refresh.PNG]).startswith(b"\x89PNG")


def test_thinning_keeps_the_figure_and_drops_the_script(refresh):
    figure = {"data": [{"y": [1]}], "layout": {"title": {"text": "t"}, "template": {"a": 1}}}
    display = nbformat.v4.new_output(
        "display_data", {refresh.PLOTLY: figure, "text/html": "<script>" + "x" * 10**6}
    )
    bar = nbformat.v4.new_output("stream", name="stderr", text="50%|#####")
    said = nbformat.v4.new_output("stream", text="Moving model to device:  cpu\nkept\n")
    cell = nbformat.v4.new_code_cell("", outputs=[display, bar, said])
    thin = refresh.thin(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs

    assert len(thin) == 2
    assert set(thin[0].data) == {refresh.PLOTLY, "text/plain"}
    assert thin[0].data[refresh.PLOTLY] == {
        "data": [{"y": [1]}],
        "layout": {"title": {"text": "t"}},
    }
    assert thin[1].text == "kept\n"
