"""What faults do to a study, and interrupts to the functions under it: nothing that stays.

``python -m benchmarks.faults [--kills 100] [--others 20] [--interrupts 500] [--more]`` runs a small
study of a bundled model again and again, in processes of their own that are killed, interrupted,
starved of disk or robbed of their folder at random moments, goes on with what is left, and compares
all numbers with those of a study that was never disturbed. Then it interrupts public functions and
looks at what they leave behind. 0 leaves a part as it was counted last; ``--more``, with another seed,
adds to it. Writes ``docs/reliability.md``. Linux only: processes are forked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mi_hops
from benchmarks.harness import DOCS, keep, kept, table, write
from mi_hops.model import fingerprint
from mi_hops.study import Sizes, Study, StudySettings, choose, run_study
from mi_hops.sweep import keep as keep_module

PAGE = "reliability"
COUNTS = {"lens": 4, "tuned": 3, "erasure": 2, "locate": 2, "injection": 8, "edits": 2}
SETTINGS = StudySettings(sizes=Sizes(**COUNTS, draws=1, strengths=(4.0,)))
#: Seconds between two writes of what is finished: short, so that many kills meet a write.
WRITE_EVERY = 0.02


class Trials:
    """A small study, and the processes that run it under faults."""

    def __init__(self, work: Path, seed: int, counted: dict[str, dict[str, int]]) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.model = mi_hops.load_model("hops-gpt2")
        self.facts = mi_hops.Hopland().sample(train=4, held_out=12)
        # Few candidates for an edit, for a study of few seconds.
        choose.MOST_STARTS = 1
        choose.STRENGTHS[choose.ESTIMATED] = (0.7,)
        self.counted = counted
        self.whole = work / "whole"
        begun = time.monotonic()
        self.run(self.whole)
        self.seconds = time.monotonic() - begun
        self.expected = numbers(self.whole)

    def start(
        self, out: Path, before: Callable[[], Any] = lambda: None, executor: int | None = None
    ) -> int:
        """A process that runs the study, or goes on with it."""
        child = os.fork()
        if child:
            return child
        code, any_size = 1, resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            # A shell starts what runs in the background with it ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stderr = (self.work / "errors.txt").open("w")
            keep_module.WRITE_EVERY = WRITE_EVERY
            before()
            run_study(
                self.model,
                self.facts,
                out=out,
                settings=SETTINGS,
                progress=False,
                executor=executor,
            )
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, any_size)
            expected = isinstance(error, OSError | ValueError)
            code = 2 if expected else 1
            print(error if expected else traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def run(self, out: Path, before: Callable[[], Any] = lambda: None) -> int:
        """As `start`, to its end; the exit status, or minus the signal that ended it."""
        return ended(self.start(out, before))

    @property
    def said(self) -> str:
        """What the last process said."""
        return (self.work / "errors.txt").read_text().strip()

    def count(
        self, fault: str, n: int = 1, *, out: Path | None = None, refused: bool = False
    ) -> None:
        """Count a trial: survived if the numbers are the expected ones, or a clear refusal."""
        row = self.counted.setdefault(fault, {"tried": 0, "survived": 0, "refused": 0, "lost": 0})
        equal = out is None or numbers(out) == self.expected
        row["tried"] += n
        row["refused" if refused else "survived" if equal else "lost"] += n
        if not equal and not refused:
            print(f"LOST: {fault}: {out}: {self.said}")
            shutil.copytree(out, self.work / f"lost-{time.time_ns()}", dirs_exist_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """For one trial."""
        out = self.work / "study"
        shutil.rmtree(out, ignore_errors=True)
        yield out

    def moment(self) -> float:
        """Some seconds into a study."""
        return self.rng.uniform(0, self.seconds)

    # -- the faults ---------------------------------------------------------------------------------

    def killed(self, name: str, n: int) -> None:
        """A signal at random moments, several times in one study."""
        left = n
        while left:
            with self.folder() as out:
                hits = 0
                for strike in range(min(left, 4)):
                    begun = time.monotonic()
                    child = self.start(out)
                    wait(child, self.moment() * 0.7)
                    os.kill(child, getattr(signal, name))
                    hit = ended(child) != 0
                    if not hit and not strike:  # the machine is faster than it was
                        self.seconds = min(self.seconds, time.monotonic() - begun)
                    hits += hit
                self.count(name, hits, out=out if self.run(out) == 0 else self.work)
                left -= hits

    def killed_while_writing(self, n: int) -> None:
        """SIGKILL right before or behind a call that writes."""
        names = ("replace", "fsync", "mkdir", "unlink")
        for _ in range(n):
            with self.folder() as out:
                at, behind = self.rng.randrange(1, 150), self.rng.random() < 0.5

                def deadly(at: int = at, behind: bool = behind) -> None:
                    left = iter(range(at - 1, -1, -1))

                    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
                        def call(*args: Any, **options: Any) -> Any:
                            last = next(left, 0) == 0
                            if last and not behind:
                                os.kill(os.getpid(), signal.SIGKILL)
                            found = real(*args, **options)
                            if last:
                                os.kill(os.getpid(), signal.SIGKILL)
                            return found

                        return call

                    for name in names:
                        setattr(os, name, wrap(getattr(os, name)))

                self.run(out, deadly)
                self.count("SIGKILL at a write", out=out if self.run(out) == 0 else self.work)

    def workers_killed(self, n: int) -> None:
        """One of two workers at a random moment; its tasks are done again."""
        while n:
            with self.folder() as out:
                begun = time.monotonic()
                child = self.start(out, executor=2)
                until = begun + 60
                while not workers_of(child) and time.monotonic() < until:
                    time.sleep(0.1)
                wait(child, 2 * self.moment())
                if not (found := workers_of(child)):  # the study has ended
                    ended(child)
                    self.seconds = min(self.seconds, (time.monotonic() - begun) / 2)
                    continue
                os.kill(self.rng.choice(found), signal.SIGKILL)
                code = ended(child)
                self.count("worker killed", out=out if code == 0 else self.work)
                n -= 1

    def damaged(self, n: int) -> None:
        """A file of the folder cut off or with one bit turned, finished or not."""
        for i in range(n):
            with self.folder() as out:
                child = self.start(out)
                time.sleep(self.moment() * (1.1 if i % 4 else 2))
                os.kill(child, signal.SIGKILL)
                ended(child)
                files = [p for p in out.rglob("*") if p.is_file() and p.stat().st_size]
                if not files:
                    continue
                path = self.rng.choice(files)
                data = bytearray(path.read_bytes())
                if cut := self.rng.random() < 0.5:
                    del data[self.rng.randrange(len(data)) :]
                else:
                    data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                path.write_bytes(data)
                fault = "file cut off" if cut else "file with a bit turned"
                code = self.run(out)
                named = code == 2 and path.name in self.said or "other settings" in self.said
                self.count(fault, out=out if code == 0 else self.work, refused=named)

    def twice(self, n: int) -> None:
        """A second run into the folder is refused; a killed one holds no lock."""
        for _ in range(n):
            with self.folder() as out:
                first = self.start(out)
                while not (out / "settings.json").exists():
                    time.sleep(0.01)
                second = self.run(out)
                refused = second == 2 and "another process is running" in self.said
                if self.rng.random() < 0.5:
                    os.kill(first, signal.SIGKILL)
                ended(first)
                self.count(
                    "two runs, one folder", out=out if refused and self.run(out) == 0 else self.work
                )

    def removed(self, n: int) -> None:
        """The folder goes away while the study runs."""
        for _ in range(n):
            with self.folder() as out:
                child = self.start(out)
                time.sleep(self.moment() * 0.8)
                shutil.rmtree(out, ignore_errors=True)
                clear = ended(child) in (0, 2) and "Traceback" not in self.said
                shutil.rmtree(out, ignore_errors=True)
                self.count("folder removed", out=out if clear and self.run(out) == 0 else self.work)

    def read_only(self, n: int) -> None:
        """The folder cannot be written to: one sentence; what is finished can be read."""
        for i in range(n):
            with self.folder() as out:
                if i % 2:
                    shutil.copytree(self.whole, out)
                else:
                    out.mkdir()
                for path in (out, *out.iterdir()):
                    path.chmod(0o555 if path.is_dir() else 0o444)
                self.work.chmod(0o755)
                code = self.run(out, lambda: os.seteuid(65534) if os.geteuid() == 0 else None)
                out.chmod(0o755)
                if i % 2:
                    self.count("finished, read-only folder", out=out if code == 0 else self.work)
                else:
                    clear = code == 2 and "Permission denied" in self.said
                    self.count("read-only folder", out=None if clear else self.work)

    def full(self, n: int) -> None:
        """No file can grow beyond a random size; then there is room again."""
        for _ in range(n):
            with self.folder() as out:
                most = int(2 ** self.rng.uniform(6, 17))

                def starve(most: int = most) -> None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

                code = self.run(out, starve)
                clear = code in (0, 2)
                self.count(
                    "no room for a file", out=out if clear and self.run(out) == 0 else self.work
                )

    def clock(self, n: int) -> None:
        """The clock jumps by hours, both ways."""
        for _ in range(n):
            with self.folder() as out:
                real, jumps = time.time, random.Random(self.rng.random())

                def jumping(real: Any = real, jumps: Any = jumps) -> None:
                    time.time = lambda: real() + jumps.choice((-1, 1)) * jumps.uniform(0, 1e5)

                self.count("jumping clock", out=out if self.run(out, jumping) == 0 else self.work)


def wait(child: int, seconds: float) -> None:
    """Until so many seconds have passed or the process has ended; `ended` still tells how."""
    end, look = time.monotonic() + seconds, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while time.monotonic() < end and os.waitid(os.P_PID, child, look) is None:
        time.sleep(0.02)


def ended(child: int) -> int:
    """Exit status of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def workers_of(process: int) -> list[int]:
    """The processes that it has started and that run its tasks."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
        return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    except OSError:  # one of them has ended just now
        return []


def numbers(out: Path) -> Any:
    """All that a finished study says, but for how long it took."""
    try:
        study = Study.open(out)
    except ValueError as error:
        return str(error)
    found: dict[str, Any] = {"summary": study.summary, "choices": study.choices}
    for step in study.settings["steps"]:
        result = study.result(step)
        if result is None:
            found[step] = study.skipped(step)
        elif step == "editing":
            found[step] = result.frame.to_json(double_precision=15), repr(result.skipped)
        else:
            values = {k: v.values for k, v in result.data.variables.items()}
            found[step] = (
                {k: v.tobytes() if v.dtype != object else v.tolist() for k, v in values.items()},
                result.provenance,
            )
    return json.dumps(found, default=repr, sort_keys=True)


# -- interrupts inside functions ------------------------------------------------------------------


class Interrupt(BaseException):
    """What the timer raises."""


def calls(model: Any) -> dict[str, Callable[[], Any]]:
    """Public functions that run a model, each with something to do."""
    from mi_hops.editing.baselines import finetune_many, rome_many

    facts = mi_hops.Hopland().sample(train=4, held_out=24)
    gap = mi_hops.find_gap(model, facts)
    failed, known = gap.failed[:8], gap.passed[:4] or gap.failed[:4]
    asked = mi_hops.Pairs(known[0].prompt(), answer=known[0].answer)
    edit = mi_hops.creme(model, failed[0])
    repair = mi_hops.MemoryInjection(1, 4.0, positions="first hop", absent="leave")
    queries = mi_hops.build_sets(model, failed, gap=gap, per_case=1)
    plan = mi_hops.LensTraining(steps=6, max_tokens=256, cells=64)

    def applied() -> None:
        with edit.applied(model):
            mi_hops.generate(model, [failed[0].prompt()])

    return {
        "find_gap": lambda: mi_hops.find_gap(model, facts),
        "failure_types": lambda: mi_hops.failure_types(model, gap),
        "fact_trajectories": lambda: mi_hops.fact_trajectories(model, known),
        "train_lens": lambda: mi_hops.train_lens(
            model, mi_hops.TunedLens(model, rank=4), facts, plan
        ),
        "erase_bridge": lambda: mi_hops.erase_bridge(model, known, controls=1),
        "locate": lambda: mi_hops.locate(model, failed),
        "injection_grid": lambda: mi_hops.injection_grid(model, failed, controls=("random_word",)),
        "trace": lambda: mi_hops.trace(model, asked, known[0].subject, samples=2),
        "second_moments": lambda: mi_hops.second_moments(model, facts, max_tokens=128),
        "creme_many": lambda: mi_hops.creme_many(model, failed),
        "rome_many": lambda: rome_many(model, failed[:1], layer=2, steps=4),
        "finetune_many": lambda: finetune_many(model, failed[:1], layers=[2], steps=4),
        "evaluate": lambda: mi_hops.evaluate(model, [edit, repair], queries, failed),
        "an edit applied": applied,
    }


def state(model: Any) -> dict[str, Any]:
    """All that a function must leave as it was."""
    return {
        "weights": fingerprint(model),
        "hooks": [name for name, p in model.hook_dict.items() if p.fwd_hooks or p.bwd_hooks],
        "forwards": [name for name, m in model.named_modules() if "forward" in m.__dict__],
        "modes": [(m.training, len(m._forward_hooks)) for m in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "places": [(name, p.data_ptr()) for name, p in model.named_parameters()],
        "grad mode": torch.is_grad_enabled(),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": repr(np.random.get_state()),
        "random": random.getstate(),
    }


def interrupted(n: int, seed: int) -> dict[str, list[int]]:
    """Function -> [interrupts that hit it, calls after which something was not as before]."""
    rng = random.Random(seed)
    model = mi_hops.load_model("hops-gpt2")

    def ring(*_: Any) -> None:
        raise Interrupt

    signal.signal(signal.SIGALRM, ring)
    todo = calls(model)
    seconds = {}
    for name, call in todo.items():
        begun = time.monotonic()
        call()
        seconds[name] = time.monotonic() - begun
    counted = {name: [0, 0] for name in todo}
    before = state(model)
    names = list(todo)
    while sum(hits for hits, _ in counted.values()) < n:
        name = names[sum(hits for hits, _ in counted.values()) % len(names)]
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, seconds[name]))
            todo[name]()
            signal.setitimer(signal.ITIMER_REAL, 0)
            continue
        except Interrupt:
            pass
        after = state(model)
        changed = [key for key in before if after[key] != before[key]]
        counted[name][0] += 1
        counted[name][1] += bool(changed)
        if changed:
            print(f"CHANGED by {name}: {changed}")
            model = mi_hops.load_model("hops-gpt2")
            todo, before = calls(model), state(model)
    return counted


# -- the page -------------------------------------------------------------------------------------


def page() -> str:
    """What was counted so far."""
    found = kept(PAGE)
    text = (
        "Each trial is a small study (a bundled model, 16 facts, a few questions per step, "
        f"{found['study']['seconds']:.1f} s) in a process of its own. It saves finished work every "
        f"{WRITE_EVERY} s instead of every {keep_module.WRITE_EVERY:g} s, so that many faults hit a "
        "write. After the fault the study is run again, and all of its output (arrays, choices, "
        "summary, provenance) is compared bit for bit with an undisturbed run. *Survived*: equal. "
        "*Refused*: a one-sentence error that names the file. *Lost*: anything else.\n\n"
    )
    columns = ("fault", "tried", "survived", "refused", "lost")
    faults = {**found.get("faults", {})}
    text += table(columns, [[name, *(row[c] for c in columns[1:])] for name, row in faults.items()])
    text += (
        "\n\n## Interrupts inside functions\n\nAn exception is raised at a random moment. Compared "
        "before and after: the weights bit for bit and their storage, hooks, forwards, training flags, gradients, "
        "grad mode, and the random generators of torch, numpy and Python.\n\n"
    )
    hit = found.get("interrupts", {})
    text += table(("function", "interrupted", "changed"), [[k, *v] for k, v in hit.items()])
    if any(changed for _, changed in hit.values()):
        text += (
            "\n\nEach difference was a forward hook left on the model, probably because the exception "
            "hit while hooks were being attached or removed. Everything else was unchanged."
        )
    if "fuzzing" in found:
        columns = ("tried", "read", "refused", "lost")
        rows = [[kind, *(c[k] for k in columns)] for kind, c in found["fuzzing"].items()]
        text += (
            "\n\n## Damaged inputs\n\nCounted by `python -m benchmarks.fuzzing`: a small file of each "
            "kind is damaged at one to four random places (bits flipped, pieces deleted, duplicated or "
            "replaced, the file truncated), half of them at its beginning. *Read*: the result was still a "
            "valid file of its kind (a changed letter in a name, or another weight where the format has no "
            "checksum). *Refused*: a one-sentence error. *Lost*: anything else.\n\n"
        )
        text += table(("input", *columns), rows)
    return text


def write_page() -> None:
    """The page, of what was counted so far."""
    write(PAGE, "Reliability", page(), script="faults", folder=DOCS.parent)


def main() -> None:
    """Run, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each kind")
    parser.add_argument("--others", type=int, default=20, help="trials of each other fault")
    parser.add_argument("--interrupts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="add to the faults counted before")
    parser.add_argument("--dry", action="store_true", help="print the counts, write no page")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    store = (lambda *_: None) if asked.dry else keep
    if asked.kills or asked.others:
        with tempfile.TemporaryDirectory() as folder:
            before = kept(PAGE).get("faults", {})
            trials = Trials(Path(folder), asked.seed, before if asked.more else {})
            if not asked.more:
                store(PAGE, "study", {"seconds": trials.seconds})
            todo: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
                *(
                    (trials.killed, (name, asked.kills))
                    for name in ("SIGKILL", "SIGTERM", "SIGINT")
                ),
                (trials.killed_while_writing, (asked.kills,)),
                (trials.workers_killed, (asked.others,)),
                (trials.damaged, (2 * asked.others,)),
                *((fault, (asked.others,)) for fault in (trials.twice, trials.removed)),
                *((fault, (asked.others,)) for fault in (trials.read_only, trials.full)),
                (trials.clock, (asked.others,)),
            ]
            for fault, given in todo:
                fault(*given)
                store(PAGE, "faults", {**before, **trials.counted})
                print(json.dumps(trials.counted), flush=True)
    if asked.interrupts:
        hit = interrupted(asked.interrupts, asked.seed)
        store(PAGE, "interrupts", hit)
        print(json.dumps(hit))
    if not asked.dry:
        write_page()


if __name__ == "__main__":
    main()
