"""How long the study takes, step by step, and what it found on each bundled model.

``python -m benchmarks.study_time [--threads 2]``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import table, write
from mi_hops.study import Study, run_study, write_report


def timed_study(name: str, out: Path) -> tuple[Study, dict[str, float]]:
    """(study, seconds by step, as the study itself wrote them down)."""
    start = time.perf_counter()
    study = run_study(name, out=out, progress=False)
    write_report(study)
    whole = time.perf_counter() - start
    seconds = {step: study.records[step]["seconds"] for step in study.settings["steps"]}
    return study, {**seconds, "all, report included": whole}


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    times: dict[str, dict[str, float]] = {}
    found: list[str] = []
    for name in ("hops-gpt2", "hops-llama"):
        with tempfile.TemporaryDirectory() as folder:
            study, times[name] = timed_study(name, Path(folder) / "study")
        found += [f"## What the study says of {name}", ""]
        found += [table(["number", "value [95% interval]"], study.headlines()), ""]
    rows = [
        [step, *(f"{times[name][step]:.1f}" for name in times)]
        for step in next(iter(times.values()))
    ]
    body = table(["step, seconds", *times], rows) + "\n\n" + "\n".join(found)
    print(body)
    print(write("study", "The study: time and findings", body, script="study_time"))


if __name__ == "__main__":
    main()
