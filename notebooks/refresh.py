"""Run the notebooks from top to bottom and write their outputs back, thinned out.

    python notebooks/refresh.py                 # all notebooks
    python notebooks/refresh.py 01_two_hops     # those whose name has it

Progress bars and what libraries print while loading are dropped, and of a figure only its plotly
data is kept, not the script that draws it (the repository would grow by megabytes with every run).
``MI_HOPS_MODEL`` names another model than the bundled one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
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


def main(wanted: list[str]) -> None:
    """Refresh the notebooks whose names have one of the texts; all of them without any."""
    import nbformat

    for path in sorted(HERE.glob("*.ipynb")):
        if wanted and not any(text in path.name for text in wanted):
            continue
        start = time.perf_counter()
        nbformat.write(thin(run(path)), path)
        took = time.perf_counter() - start
        print(f"{path.name}: {took:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
