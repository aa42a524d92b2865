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
from mi_hops.model import bundled_models
from mi_hops.study import STEPS, run_study, write_report


def timed_study(name: str, out: Path):
    """(study, seconds by step): the command's own path, with a clock around each step."""
    seconds: dict[str, float] = {}
    real = {type(step): type(step).run for step in STEPS}

    def clocked(step, run):
        start = time.perf_counter()
        result = real[type(step)](step, run)
        seconds[step.name] = time.perf_counter() - start
        return result

    try:
        for kind in real:
            kind.run = clocked
        start = time.perf_counter()
        study = run_study(name, out=out, progress=False)
        write_report(study)
        seconds["all, report included"] = time.perf_counter() - start
    finally:
        for kind, run in real.items():
            kind.run = run
    return study, seconds


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    times, found = {}, []
    for name in bundled_models():
        with tempfile.TemporaryDirectory() as folder:
            study, times[name] = timed_study(name, Path(folder) / "study")
        found += [f"## What the study says of {name}", ""]
        found += [table(["number", "value [95% interval]"], study.headlines()), ""]
    rows = [
        [step, *(f"{times[name][step]:.1f}" for name in times)]
        for step in (*(step.name for step in STEPS), "all, report included")
    ]
    body = table(["step, seconds", *times], rows) + "\n\n" + "\n".join(found)
    print(body)
    print(write("study", "The study: time and findings", body, script="study_time"))


if __name__ == "__main__":
    main()
