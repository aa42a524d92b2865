"""Run the notebooks from top to bottom and write their outputs back, thinned out.

    python notebooks/refresh.py                 # all notebooks
    python notebooks/refresh.py 01_two_hops     # those whose name has it

Progress bars and what libraries print while loading are dropped. Of a figure, its plotly data is
kept, but not the script that draws it (the repository would grow by megabytes with every run); next
to it goes a PNG for viewers that do not draw plotly figures, GitHub's for one (this needs the extra
``export``). ``MI_HOPS_MODEL`` names another model than the bundled one.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
PNG = "image/png"
NOISE = ("Moving model to device",)
TIMEOUT = 300


def run(path: Path) -> Any:
    """The notebook at `path` with the outputs of a fresh run; a cell that fails raises."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": HERE}}
    )
    client.execute()
    return notebook


def thin(notebook: Any) -> Any:
    """The notebook with small outputs and no trace of when and where it was run."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = [o for o in map(_thinned, cell.outputs) if o is not None]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _thinned(output: Any) -> Any | None:
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        lines = output.text.splitlines(keepends=True)
        output.text = "".join(line for line in lines if not line.startswith(NOISE))
        return output if output.text.strip() else None
    data = output.get("data", {})
    if PLOTLY in data:
        # The default look of every plotly figure; whoever draws the figure has it.
        data[PLOTLY].get("layout", {}).pop("template", None)
        data[PLOTLY].pop("config", None)
        output.data = {PLOTLY: data[PLOTLY], "text/plain": "Figure"}
    return output


def with_pictures(notebook: Any) -> Any:
    """The notebook with a PNG next to the plotly data of every figure, on white."""
    import plotly.graph_objects as go
    import plotly.io as pio

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    drawn = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    figures = [go.Figure(data[PLOTLY]).update_layout(template="plotly_white") for data in drawn]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.png") for i in range(len(drawn))]
        pio.write_images(figures, paths, width=[f.layout.width or 800 for f in figures])
        for data, path in zip(drawn, paths, strict=True):
            data[PNG] = base64.b64encode(path.read_bytes()).decode()
    return notebook


def main(wanted: list[str]) -> None:
    """Refresh the notebooks whose names have one of the texts; all of them without any."""
    import nbformat

    for path in sorted(HERE.glob("*.ipynb")):
        if wanted and not any(text in path.name for text in wanted):
            continue
        start = time.perf_counter()
        nbformat.write(with_pictures(thin(run(path))), path)
        took = time.perf_counter() - start
        print(f"{path.name}: {took:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
