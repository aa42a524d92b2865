"""Tasks as files of a folder: done by whoever is there, and again where one is lost."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mi_hops import Hopland, StudySettings, run_study
from mi_hops.study import Sizes
from mi_hops.sweep.shared import SharedFolder, help_in
from tests.test_study_faults import assert_equal

WHO = []


def task(shared, data):
    WHO.append(threading.get_ident())
    time.sleep(0.02)
    if data == b"bad":
        raise OSError("no such number")
    return shared + data


def submitted(folder, data, shared=b"x"):
    executor = SharedFolder(folder)
    executor.begin()
    return executor, {executor.submit(task, shared, d): d for d in data}


def results(executor, futures):
    left, found = dict(futures), {}
    while left:
        for future in executor.wait(left):
            found[left.pop(future)] = future
    return found


def test_the_caller_does_what_nobody_does(tmp_path):
    executor, futures = submitted(tmp_path / "tasks", [b"1", b"2", b"bad"])
    found = results(executor, futures)
    assert found[b"1"].result() == b"x1" and found[b"2"].result() == b"x2"
    with pytest.raises(OSError, match="no such number"):
        found[b"bad"].result()
    assert not list((tmp_path / "tasks").glob("*.task"))
    executor.shutdown()
    assert not (tmp_path / "tasks").exists()


def test_others_help(tmp_path):
    WHO.clear()
    executor, futures = submitted(tmp_path / "tasks", [b"%d" % i for i in range(30)])
    stop = threading.Event()
    with ThreadPoolExecutor(2) as helpers:
        counts = [helpers.submit(help_in, tmp_path / "tasks", stop.is_set) for _ in range(2)]
        found = results(executor, futures)
        stop.set()
        assert {k: f.result() for k, f in found.items()} == {d: b"x" + d for d in futures.values()}
        assert len(WHO) == 30 and len(set(WHO)) > 1
        assert sum(c.result() for c in counts) == 30 - WHO.count(threading.get_ident())


def test_the_task_of_a_dead_helper_is_done_again(tmp_path):
    """It took the task, which a lock says, and was killed."""
    executor, futures = submitted(tmp_path / "tasks", [b"1"])
    [path] = (tmp_path / "tasks").glob("*.task")
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        f"lock = FileLock({str(path.with_suffix('.lock'))!r})\nlock.acquire()\nprint('taken', flush=True)\n"
        "time.sleep(600)"
    )
    helper = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert helper.stdout.readline() == "taken\n"
    threading.Timer(0.5, lambda: helper.send_signal(signal.SIGKILL)).start()
    begun = time.monotonic()
    assert results(executor, futures)[b"1"].result() == b"x1"
    assert time.monotonic() - begun > 0.4
    helper.wait()


def test_a_folder_that_is_gone_ends_nothing(tmp_path):
    stop = iter([False, False, True])
    assert help_in(tmp_path / "never there", lambda: next(stop)) == 0


def test_what_another_process_left_is_deleted(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "1.task").write_bytes(pickle.dumps(None))
    executor, _ = submitted(tmp_path / "tasks", [])
    assert not list(executor.folder.iterdir())


SCRIPT = """
import sys
from mi_hops import Hopland, StudySettings, run_study
from mi_hops.study import Sizes, join_study
out = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
counts = {"lens": 4, "tuned": 3, "erasure": 8, "locate": 4, "injection": 8, "edits": 2}
few = StudySettings(sizes=Sizes(**counts, draws=1, strengths=(4.0,)))
facts = Hopland().sample(train=4, held_out=12)
run = lambda executor: run_study(
    "hops-gpt2", facts, out=out, settings=few, progress=False, executor=executor
)
join_study(out, run)
"""


def start(process):
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing came within two minutes"
        time.sleep(0.05)


@pytest.mark.once
@pytest.mark.slow
def test_processes_that_join_make_the_same_study_though_the_leader_is_killed(tmp_path):
    out = tmp_path / "joined"
    (tmp_path / "join.py").write_text(SCRIPT)
    asked = [sys.executable, str(tmp_path / "join.py"), str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    leader, helper = (subprocess.Popen(asked, **pipes) for _ in range(2))
    assert leader.stdout.readline() == helper.stdout.readline() == "ready\n"
    start(leader)
    wait_for(lambda: (out / ".tasks").exists())
    start(helper)
    wait_for(lambda: list(out.glob("*.nc")))
    leader.kill()
    assert leader.wait() == -signal.SIGKILL and helper.wait() == 0
    counts = {"lens": 4, "tuned": 3, "erasure": 8, "locate": 4, "injection": 8, "edits": 2}
    few = StudySettings(sizes=Sizes(**counts, draws=1, strengths=(4.0,)))
    facts = Hopland().sample(train=4, held_out=12)
    joined = run_study("hops-gpt2", facts, out=out, settings=few, progress=False)
    assert_equal(
        joined, run_study("hops-gpt2", facts, out=tmp_path / "whole", settings=few, progress=False)
    )
    assert not list(out.glob(".*"))
