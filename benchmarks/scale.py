"""What workers gain and cost, how many tokens a fact takes in each step, and memory.

``python -m benchmarks.scale [--facts 180] [--repeats 200]`` runs the same work on a bundled model in one
process of one and of two threads, and on two worker processes of one thread each, each in a fresh
Python; times the start of a worker; times tasks, and calculates from them how long more workers would
take; counts the tokens that go through a block for each fact; repeats small sweeps while it watches the
memory of the process; and compares the memory that 1,000 and 10,000 facts take. Writes
``docs/benchmarks/scale.md``. Linux only (memory is read from ``/proc``).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import mi_hops
from benchmarks.harness import Peak, keep, kept, table, write
from mi_hops import patching

PAGE = "scale"
MODEL = "hops-gpt2"
#: name, threads of a process, worker processes (0: the process itself)
WAYS = (
    ("1 process, 1 thread", 1, 0),
    ("1 process, 2 threads", 2, 0),
    ("2 workers, 1 thread each", 1, 2),
)

#: Blocks of the model measured; the model that is calculated; what sweeps over layers.
BLOCKS = 6
LARGE = {"blocks": 80, "parameters": 7e10, "facts": 10_000, "rate": 3e14}
OVER_LAYERS = ("erase_bridge", "locate", "injection_grid")

#: Workers on paper, and for how many facts; facts whose memory is compared.
ON_PAPER = (1, 2, 4, 8, 16, 32, 64)
STREAMED = (1_000, 10_000)


def work(model: Any, facts: Any) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    return {
        "find_gap": lambda: mi_hops.find_gap(model, facts, batch_size=16),
        "erase_bridge": lambda: mi_hops.erase_bridge(model, facts, controls=1),
        "locate": lambda: mi_hops.locate(model, facts),
    }


def timed(workers: int, n: int) -> dict[str, Any]:
    """In this process: seconds of each function, and a digest of its numbers."""
    model = mi_hops.load_model(MODEL)
    facts = mi_hops.Hopland().sample(train=0, held_out=n)[:n]
    found: dict[str, Any] = {}
    with mi_hops.spread(model, workers) if workers else nullcontext():
        begun = time.perf_counter()
        mi_hops.generate(model, [f.prompt() for f in facts[:8]], batch_size=2)
        found["start"] = time.perf_counter() - begun
        for name, call in work(model, facts).items():
            begun = time.perf_counter()
            result = call()
            found[name] = time.perf_counter() - begun
            found[f"{name} digest"] = digest(result)
    return found


def digest(result: Any) -> str:
    """Of all numbers of a result, bit for bit."""
    said = hashlib.sha256()
    for variable in result.data.data_vars.values():
        values = variable.values
        said.update(values.tobytes() if values.dtype != object else repr(values.tolist()).encode())
    return said.hexdigest()[:16]


def speed(n: int, repeats: int) -> dict[str, Any]:
    """Each way in a Python of its own, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in WAYS}
    for _ in range(repeats):
        for name, threads, workers in WAYS:
            runs[name].append(alone("--one", workers, "--facts", n, threads=threads))
    return {"facts": n, "runs": runs}


def alone(*asked: Any, threads: int = 1) -> Any:
    """What this script prints with these arguments, in a Python of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.scale", *map(str, asked)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- more workers, on paper -----------------------------------------------------------------------


class Timed(Executor):
    """Does each task at once, and takes its time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
        """Make it."""
        future: Future[Any] = Future()
        begun = time.perf_counter()
        future.set_result(fn(*args, **named))
        self.seconds.append(time.perf_counter() - begun)
        return future


def tasks(n: int) -> dict[str, Any]:
    """Seconds of each task of the work, and of what the process that asks does itself."""
    model = mi_hops.load_model(MODEL)
    facts = mi_hops.Hopland().sample(train=0, held_out=n)[:n]
    found: dict[str, Any] = {}
    for name, call in work(model, facts).items():
        timed = Timed()
        with mi_hops.spread(model, timed):
            mi_hops.generate(model, ["The"])  # the model is loaded
            timed.seconds.clear()
            begun = time.perf_counter()
            call()
            whole = time.perf_counter() - begun
        found[name] = {"tasks": timed.seconds, "own": whole - sum(timed.seconds)}
    return {"facts": len(facts), "functions": found}


def makespan(seconds: Sequence[float], workers: int) -> float:
    """How long it takes if whoever is free takes the next task."""
    free = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


# -- operations -----------------------------------------------------------------------------------


def tokens(n: int) -> dict[str, float]:
    """Tokens that pass all blocks, for each fact: those of each block, over the number of blocks."""
    model = mi_hops.load_model(MODEL, backend="bridge")
    facts = mi_hops.Hopland().sample(train=0, held_out=n)[:n]
    gap = mi_hops.find_gap(model, facts)
    queries = mi_hops.build_sets(model, facts, gap=gap, per_case=3)
    counted = [0]

    def count(x: torch.Tensor, hook: Any) -> None:
        counted[0] += x.shape[0] * x.shape[1]

    for layer in range(model.cfg.n_layers):
        model.add_perma_hook(f"blocks.{layer}.hook_resid_pre", count)
    calls: dict[str, Callable[[], Any]] = {
        "find_gap, one form": lambda: mi_hops.find_gap(model, facts),
        "fact_trajectories": lambda: mi_hops.fact_trajectories(model, facts),
        "erase_bridge, 1 control": lambda: mi_hops.erase_bridge(model, facts, controls=1),
        "locate": lambda: mi_hops.locate(model, facts),
        "injection_grid, 4 strengths, 1 control": lambda: mi_hops.injection_grid(
            model, facts, strengths=(1, 2, 4, 8), controls=("random_word",)
        ),
        "creme_many": lambda: mi_hops.creme_many(model, facts),
        "evaluate CREME, 3 queries a set": lambda: mi_hops.evaluate(
            model, mi_hops.CremeRepair(), queries, facts
        ),
    }
    found = {}
    for name, call in calls.items():
        counted[0] = 0
        call()
        found[name] = counted[0] / model.cfg.n_layers / len(facts)
    return found


# -- memory ---------------------------------------------------------------------------------------


def resident() -> float:
    """Bytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def flat(repeats: int) -> None:
    """Function -> memory after the first tenth of its repeats, and what the others add to it; kept."""
    model = mi_hops.load_model(MODEL)
    facts = mi_hops.Hopland().sample(train=0, held_out=2)[:2]
    asked = mi_hops.Pairs(facts[0].prompt(), answer=facts[0].answer)
    pair = mi_hops.Pairs("The spouse of Joren Ashby is", "The spouse of Vera Ashby is", answer=" V")
    gap = mi_hops.find_gap(model, facts)
    queries = mi_hops.build_sets(model, facts, gap=gap, per_case=1)
    limits = mi_hops.Limits(batch_size=2)
    block = mi_hops.Sites(layers=[2], positions=-1)
    circuit = patching.Circuit(frozenset({("embed", "logits")}))
    plan = mi_hops.LensTraining(steps=1, max_tokens=64, cells=16)

    def edited() -> None:
        with mi_hops.creme(model, facts[0], layers=[3]).applied(model):
            mi_hops.generate(model, [facts[0].prompt()], max_new_tokens=2)

    calls: dict[str, Callable[[], Any]] = {
        "find_gap": lambda: mi_hops.find_gap(model, facts),
        "fact_trajectories": lambda: mi_hops.fact_trajectories(model, facts),
        "logit_attribution": lambda: mi_hops.fact_attribution(model, facts),
        "patchscope": lambda: mi_hops.patchscope(
            model, facts[0].prompt(), "The spouse of Joren", track={"a": facts[0].answer}
        ),
        "train_lens, 1 step": lambda: mi_hops.train_lens(
            model, mi_hops.TunedLens(model, rank=2), facts, plan
        ),
        "erase_bridge": lambda: mi_hops.erase_bridge(
            model, facts, controls=1, layers=[2, 3], limits=limits
        ),
        "locate": lambda: mi_hops.locate(model, facts, limits=limits),
        "injection_grid": lambda: mi_hops.injection_grid(
            model, facts, layers=[1, 2], strengths=(2.0,), controls=(), limits=limits
        ),
        "patch": lambda: mi_hops.patch(model, pair, block, metric="first_prob"),
        "ablate": lambda: mi_hops.ablate(model, asked, block, metric="first_prob"),
        "trace": lambda: mi_hops.trace(model, asked, facts[0].subject, block, samples=1),
        "knockout": lambda: patching.knockout(model, asked, layers=[2]),
        "back_patch": lambda: patching.back_patch(model, asked, sources=[4], targets=[1, 2]),
        "attribute": lambda: mi_hops.attribute(model, pair, metric="first_prob"),
        "attribute_inputs": lambda: patching.attribute_inputs(model, asked, steps=2),
        "path_patch": lambda: mi_hops.path_patch(
            model, pair, ["L1H1", "L2H0"], metric="first_prob"
        ),
        "attribute_edges": lambda: mi_hops.attribute_edges(
            model, pair, ["L1H1"], ["L3H1.v"], metric="first_prob"
        ),
        "faithfulness": lambda: mi_hops.faithfulness(model, pair, [circuit], metric="first_prob"),
        "second_moments": lambda: mi_hops.second_moments(model, facts, layers=[2], max_tokens=64),
        "creme, applied": edited,
        "evaluate": lambda: mi_hops.evaluate(
            model, mi_hops.CremeRepair(layers=[3]), queries, facts
        ),
    }
    found: dict[str, list[float]] = {}
    for name, call in calls.items():
        for _ in range(max(1, repeats // 10)):
            call()
        before = resident()
        for _ in range(repeats - max(1, repeats // 10)):
            call()
        found[name] = [before, resident() - before]
        keep(PAGE, "memory", {"repeats": repeats, "functions": found})


def streamed(n: int) -> dict[str, float]:
    """In this process: the most memory that facts from a file take, beyond that of the model in use."""
    model = mi_hops.load_model(MODEL)
    facts = mi_hops.Hopland().two_hop_facts()[: max(n, 2)]
    with tempfile.TemporaryDirectory() as folder:
        path = mi_hops.save_jsonl(facts[:n], Path(folder) / "facts.jsonl")
        first = facts[:64]
        del facts
        work_on(model, first, first)
        with Peak() as peak:
            read = mi_hops.load_facts(path)
            work_on(model, read, read)
    return {"facts": len(read), "MiB": peak.mib}


def work_on(model: Any, facts: Any, corpus: Any) -> None:
    """Work whose results do not grow with the tokens that were looked at."""
    mi_hops.find_gap(model, facts, form="suffix")
    mi_hops.fact_trajectories(model, facts)
    mi_hops.second_moments(model, (fact for fact in corpus))


# -- the page -------------------------------------------------------------------------------------


def page() -> str:
    """What was measured."""
    found = kept(PAGE)
    text = ""
    if "speed" in found:
        runs, n = found["speed"]["runs"], found["speed"]["facts"]
        names = [
            name for name in next(iter(runs.values()))[0] if f"{name} digest" in runs[WAYS[0][0]][0]
        ]
        rows = []
        for name in names:
            middle = {way: statistics.median(run[name] for run in runs[way]) for way, _, _ in WAYS}
            one, two, spread = (middle[way] for way, _, _ in WAYS)
            digests = {run[f"{name} digest"] for way in runs for run in runs[way]}
            cells = [f"{one:.2f}", f"{two:.2f}", f"{spread:.2f}"]
            rows.append([name, *cells, f"{one / spread:.2f}", f"{two / spread:.2f}", len(digests)])
        starts = [run["start"] for run in runs[WAYS[2][0]]]
        text += (
            f"## Two workers on two cores\n\n{MODEL}, {n} facts of Hopland, medians of "
            f"{len(starts)} run(s), seconds. The last column counts bitwise distinct results over all runs: "
            "1 means that all are equal.\n\n"
        )
        columns = [
            "function",
            *(way for way, _, _ in WAYS),
            "against 1 thread",
            "against 2 threads",
        ]
        text += table([*columns, "results"], rows)
        text += (
            "\n\nThe first call also waits for the workers to start: Python, torch and the model took "
            f"{statistics.median(starts):.1f} s, both workers in parallel.\n\n"
        )
    if "tasks" in found:
        text += on_paper(found["tasks"])
    if "tokens" in found:
        text += (
            f"## What a fact costs\n\nMeasured: tokens through all blocks per fact (each block's tokens, "
            f"summed over blocks and divided by their number), {MODEL} with {BLOCKS} blocks, "
            "Hopland's prompts of about 11 tokens. Calculated from that: the same in a model of "
            f"{LARGE['blocks']} blocks, where a sweep over layers has proportionally more rows, and the hours that "
            f"{LARGE['facts']:,} facts take on one copy of a model of {LARGE['parameters']:.0e} parameters, "
            f"at 2 operations per parameter and token and an assumed {LARGE['rate']:.0e} operations per second. "
            "Prompts twice as long cost twice as much.\n\n"
        )
        rows = []
        for name, n in found["tokens"].items():
            many = n * LARGE["blocks"] / BLOCKS if name.startswith(OVER_LAYERS) else n
            seconds = many * LARGE["facts"] * 2 * LARGE["parameters"] / LARGE["rate"]
            rows.append([name, f"{n:,.0f}", f"{many:,.0f}", f"{seconds / 3600:.2f}"])
        columns = ["step", "tokens a fact", f"at {LARGE['blocks']} blocks", "hours"]
        text += table(columns, rows) + "\n\n"
    if "memory" in found:
        repeats = found["memory"]["repeats"]
        text += (
            f"## Memory over {repeats} repeats\n\nThe process's memory after the first tenth of the repeats, "
            "and what the remaining ones added.\n\n"
        )
        rows = [
            [name, f"{before / 2**20:.0f}", f"{more / 2**20:+.1f}"]
            for name, (before, more) in found["memory"]["functions"].items()
        ]
        text += table(("function", "MiB", "added, MiB"), rows) + "\n\n"
    if "stream" in found:
        one, many = found["stream"]
        text += (
            f"## Memory for {many['facts']:,} facts\n\nFacts of Hopland from a file, each asked in one form "
            "(`find_gap`), read through the lens, and included in second moments; "
            f"{MODEL}. Peak memory beyond that of the process with the model in use: "
            f"{one['MiB']:.0f} MiB for {one['facts']:,} facts, {many['MiB']:.0f} MiB for "
            f"{many['facts']:,}, {many['MiB'] - one['MiB']:+.0f} MiB.\n"
        )
    return text.rstrip()


def on_paper(found: dict[str, Any]) -> str:
    """How long many workers would take for ten thousand facts."""
    facts = LARGE["facts"]
    text = (
        f"## Up to {ON_PAPER[-1]} workers, calculated\n\nA simulation, not a measurement. Measured, one task "
        f"after another, on {found['facts']} facts ({MODEL}): the seconds of each task, and the seconds that "
        "the calling process spends itself (splitting, pickling, combining: its *own share*). Calculated: "
        f"{facts:,} facts, for which both are repeated as often as needed; any free worker takes "
        "the next task; workers are as fast as here, already started, and have the model; sending takes no time. "
        "Speed-ups are over one process that does everything. The own share limits them: the model is small, so "
        "its tasks are short.\n\n"
    )
    rows = []
    for name, times in found["functions"].items():
        again = -(-facts // found["facts"])
        seconds, own = times["tasks"] * again, times["own"] * again
        cells = [f"{(own + sum(seconds)) / (own + makespan(seconds, n)):.1f}" for n in ON_PAPER[1:]]
        middle = f"{1000 * statistics.median(times['tasks']):.0f}"
        rows.append([name, len(seconds), middle, f"{own / (own + sum(seconds)):.1%}", *cells])
    columns = ["function", "tasks", "ms a task", "own share", *(str(n) for n in ON_PAPER[1:])]
    return text + table(columns, rows) + "\n\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=180)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--only", choices=("speed", "tasks", "tokens", "memory", "stream"))
    parser.add_argument("--one", type=int, help="time the work with so many workers, and print it")
    parser.add_argument("--streamed", type=int, help="memory of so many facts; print it")
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(timed(asked.one, asked.facts)))
        return
    if asked.streamed is not None:
        print(json.dumps(streamed(asked.streamed)))
        return
    if asked.only in (None, "speed"):
        keep(PAGE, "speed", speed(asked.facts, asked.runs))
    torch.set_num_threads(1)
    if asked.only in (None, "tasks"):
        keep(PAGE, "tasks", tasks(asked.facts))
    if asked.only in (None, "tokens"):
        keep(PAGE, "tokens", tokens(6))
    if asked.only in (None, "memory"):
        flat(asked.repeats)
    if asked.only in (None, "stream"):
        keep(PAGE, "stream", [alone("--streamed", n) for n in STREAMED])
    write(PAGE, "Beyond one process, measured", page(), script="scale")


if __name__ == "__main__":
    main()
