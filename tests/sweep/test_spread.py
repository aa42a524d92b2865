"""Work done by an executor: the same to the last bit, and done again where a worker is lost."""

from __future__ import annotations

import importlib.util
import os
import signal
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import pandas as pd
import pytest
import torch

import mi_hops
from mi_hops import Hopland, Limits, spread
from mi_hops.model import load_model
from mi_hops.study.join import executor_of
from mi_hops.sweep.batching import batched_with_oom_backoff, each_part
from mi_hops.sweep.keep import keeping
from mi_hops.sweep.spread import TaskError

FACTS = Hopland().sample(train=2, held_out=9)
SMALL = Limits(batch_size=3)


@pytest.fixture(
    scope="module", params=[pytest.param("hops-gpt2", marks=pytest.mark.slow), "hops-llama"]
)
def model(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def bridge():
    return load_model("hops-gpt2", backend="bridge")


class Watched(ThreadPoolExecutor):
    """Counts its tasks; `fail` raises in place of some of them."""

    def __init__(self, fail=lambda number: None):
        super().__init__(1)
        self.n, self.fail = 0, fail

    def submit(self, fn, /, *args, **kwargs):
        self.n += 1
        error = self.fail(self.n)
        if error is None:
            return super().submit(fn, *args, **kwargs)
        future = Future()
        future.set_exception(error)
        return future


def same(a, b):
    """Whether two results hold the same bits."""
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
        return True
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, mi_hops.Result):
        return a.data.identical(b.data) and a.skipped == b.skipped
    return a == b


def facts_of(model):
    gap = mi_hops.find_gap(model, FACTS)
    return gap, (gap.failed + gap.passed)[:7]


WORK = {
    "find_gap": lambda model: mi_hops.find_gap(model, FACTS),
    "generate": lambda model: mi_hops.generate(
        model, [f.prompt() for f in FACTS], batch_size=4, max_new_tokens=4
    ),
    "score_prompts": lambda model: scores(model),
    "logit attribution": lambda model: mi_hops.fact_attribution(model, FACTS, batch_size=4),
    "logit lens": lambda model: mi_hops.fact_trajectories(model, FACTS, batch_size=4),
    "erasure": lambda model: mi_hops.erase_bridge(
        model, FACTS, controls=1, layers=[1, 3], limits=SMALL
    ),
    "locate": lambda model: mi_hops.locate(model, facts_of(model)[1], limits=SMALL),
    "injection": lambda model: mi_hops.injection_grid(
        model, FACTS, strengths=(2.0,), controls=("random_word",), limits=SMALL
    ),
    "patch": lambda model: mi_hops.patch(
        model,
        mi_hops.Pairs(
            ["The spouse of Joren Ashby is", "The spouse of Vera Ashby is"],
            ["The spouse of Vera Ashby is", "The spouse of Joren Ashby is"],
            answer=[" Vera", " Joren"],
        ),
        metric="first_prob",
        limits=Limits(batch_size=1),
    ),
    "trace": lambda model: mi_hops.trace(
        model,
        mi_hops.Pairs(
            ["The spouse of Joren Ashby is", "The spouse of Vera Ashby is"], answer=" Vera"
        ),
        ["Joren Ashby", "Vera Ashby"],
        samples=2,
        metric="first_prob",
    ),
}


def scores(model):
    from mi_hops.sweep import target_of

    prompts = [mi_hops.encode(model, f.prompt()) for f in FACTS]
    targets = [target_of(model, p, f.answer) for p, f in zip(prompts, FACTS, strict=True)]
    found = mi_hops.score_prompts(
        model, prompts, targets, ["answer_logprob", lambda x: x.max(-1).values], batch_size=4
    )
    return torch.stack(list(found.values()))


@pytest.mark.slow_case("erasure", "injection", "locate")
@pytest.mark.parametrize("name", WORK)
def test_the_same_to_the_last_bit(model, name):
    expected = WORK[name](model)
    with Watched() as executor:
        with spread(model, executor):
            found = WORK[name](model)
        assert executor.n > 1
    assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["find_gap", "erasure", "patch"])
def test_on_the_bridge_as_well(bridge, name):
    expected = WORK[name](bridge)
    with Watched() as executor, spread(bridge, executor):
        found = WORK[name](bridge)
    assert executor.n > 1 and same(found, expected)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["W_O", "W_out"])
def test_moments(model, matrix):
    count = partial(mi_hops.second_moments, model, FACTS, matrix=matrix, max_tokens=64)
    expected = count()
    with Watched() as executor, spread(model, executor):
        found = count()
    assert executor.n > 2
    assert found.n == expected.n and found.fourth == expected.fourth
    assert all(torch.equal(found.second[i], c) for i, c in expected.second.items())


@pytest.mark.once
@pytest.mark.slow
def test_moments_that_are_dear_to_send_are_counted_here(model, monkeypatch):
    expected = mi_hops.second_moments(model, FACTS, max_tokens=64)
    monkeypatch.setattr("mi_hops.sweep.batching.MOST_SENT", 2 * 6 * 8 * 128**2 - 1)
    with Watched() as executor, spread(model, executor):
        found = mi_hops.second_moments(model, FACTS, max_tokens=64)
    assert not executor.n and torch.equal(found.second[0], expected.second[0])


def test_edits(model):
    facts = facts_of(model)[1]
    options = {"layers": [2, 3], "batch_size": 4}
    options["covariance"] = mi_hops.second_moments(model, facts, layers=[2, 3])
    expected = mi_hops.creme_many(model, facts, **options)
    with Watched() as executor, spread(model, executor):
        found = mi_hops.creme_many(model, facts, **options)
    assert executor.n > 3
    for a, b in zip(found, expected, strict=True):
        assert a.request == b.request
        for x, y in zip(a.changes, b.changes, strict=True):
            assert torch.equal(x.left, y.left) and torch.equal(x.right, y.right)


@pytest.mark.once
@pytest.mark.slow
def test_evaluate(model):
    gap, facts = facts_of(model)
    queries = mi_hops.build_sets(model, facts, gap=gap, per_case=1)
    edits = mi_hops.CremeRepair(layers=[3])
    ask = partial(mi_hops.evaluate, model, [edits], queries, facts)
    expected = ask()
    with Watched() as executor, spread(model, executor):
        found = ask()
    assert executor.n > 3 and same(found.frame, expected.frame)


@pytest.mark.once
@pytest.mark.slow
def test_processes_of_our_own():
    model = load_model("hops-llama")
    expected, n = WORK["find_gap"](model), len(active_children())
    with spread(model, 1):
        assert same(WORK["find_gap"](model), expected)
    assert len(active_children()) == n


@pytest.mark.once
@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced():
    model = load_model("hops-gpt2")

    here = os.getpid()

    def dies_once(n, mark):
        if n == 3 and os.getpid() != here and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    with TemporaryDirectory() as folder, spread(model, 1):
        run = partial(dies_once, mark=Path(folder) / "died")
        assert each(model, run) == {n: n * n for n in range(6)}
        assert (Path(folder) / "died").exists()


# -- faults ---------------------------------------------------------------------------------------


def each(model, run, parts=tuple(range(6))):
    found = each_part(
        model, parts, run, kept=lambda part: ("n", part), texts=lambda part: [f"number {part}"]
    )
    return dict(found)


def test_a_task_that_failed_is_tried_again(model):
    lost = {2: OSError("gone"), 3: RuntimeError("gone")}
    with Watched(lost.get) as executor, spread(model, executor):
        assert each(model, lambda n: n * n) == {n: n * n for n in range(6)}
    assert executor.n == 8


def test_a_task_that_fails_always_is_told_of_and_the_others_are_kept(model, tmp_path):
    made = []

    def fails(n):
        if n == 4:
            raise RuntimeError("no such number")
        return n * n

    with (
        pytest.raises(TaskError, match=r"1 batch.*3 times.*number 4.*no such number"),
        keeping(tmp_path / "kept", "x"),
        Watched() as executor,
        spread(model, executor),
    ):
        each(model, fails)
    assert executor.n == 8

    def makes(n):
        made.append(n)
        return n * n

    with keeping(tmp_path / "kept", "x"):
        assert each(model, makes) == {n: n * n for n in range(6)}
    assert made == [4]


def test_an_error_of_the_input_is_raised_as_it_is(model):
    def fails(n):
        raise ValueError(f"{n} is no input")

    with (
        Watched() as executor,
        spread(model, executor),
        pytest.raises(ValueError, match="no input"),
    ):
        each(model, fails)
    assert executor.n <= 6


def test_an_executor_that_is_broken_is_told_of(model):
    class Broken(Executor):
        def submit(self, fn, /, *args, **kwargs):
            raise BrokenExecutor("a process died")

    with spread(model, Broken()), pytest.raises(ChildProcessError, match="takes no more tasks"):
        each(model, lambda n: n)


def test_what_cannot_be_sent_is_refused(model):
    lock = Lock()
    with (
        Watched() as executor,
        spread(model, executor),
        pytest.raises(ValueError, match="cannot be sent"),
    ):
        each(model, lambda n: lock.locked())


def test_out_of_memory_in_a_worker_halves_that_part(model):
    def run(part):
        if len(part) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return [x * 2 for x in part]

    with Watched() as executor, spread(model, executor):
        found = list(batched_with_oom_backoff(range(4), 2, run, kept=("x",), model=model))
    assert [list(part) for part, _ in found] == [[0], [1], [2], [3]]
    assert [x for _, xs in found for x in xs] == [0, 2, 4, 6]


# -- which model ----------------------------------------------------------------------------------


def test_a_changed_or_hooked_model_works_here():
    model = load_model("hops-gpt2")
    with Watched() as executor, spread(model, executor):
        with torch.no_grad():
            model.W_E[3, 5] += 1
        each(model, lambda n: n)
        assert not executor.n
        with torch.no_grad():
            model.W_E.copy_(load_model("hops-gpt2").W_E)
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):
            each(model, lambda n: n)
        handle = model.blocks[1].mlp.register_forward_hook(lambda module, given, out: -out)
        each(model, lambda n: n)
        handle.remove()
        assert not executor.n
        each(model, lambda n: n)
        assert executor.n == 6
        each(load_model("hops-gpt2"), lambda n: n)
        assert executor.n == 6


@pytest.mark.once
@pytest.mark.slow
def test_a_model_from_elsewhere_needs_its_loader():
    import copy

    model = copy.deepcopy(load_model("hops-gpt2"))
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(ValueError, match="pass load="), spread(model, executor):
            pass
        with spread(model, executor, load=partial(load_model, "hops-gpt2")):
            assert each(model, lambda n: n + 1)[3] == 4
        with (
            spread(model, executor, load=partial(load_model, "hops-llama")),
            pytest.raises(ValueError, match="other weights"),
        ):
            each(model, lambda n: n)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two Dask workers of two threads each."""
    distributed = pytest.importorskip("distributed", reason="the scale extra is not installed")
    folder = str(tmp_path_factory.mktemp("dask"))
    options = {"dashboard_address": None, "local_directory": folder}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, **options) as cluster:
        yield cluster


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", ["find_gap", "erasure"])
def test_dask(cluster, name):
    model = load_model("hops-gpt2")
    expected = WORK[name](model)
    with executor_of(None, cluster.scheduler_address) as executor, spread(model, executor):
        assert same(WORK[name](model), expected)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_what_a_dask_worker_lost_is_done_again(cluster, how, tmp_path):
    mark = tmp_path / "tried"

    def run(n):
        if n == 3 and not mark.exists():
            mark.touch()
            if how == "raises":
                raise RuntimeError("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n

    model = load_model("hops-gpt2")
    with executor_of(None, cluster.scheduler_address) as executor, spread(model, executor):
        assert each(model, run) == {n: n * n for n in range(6)}
    assert mark.exists()


def test_the_scheduler_option_says_what_is_missing(tmp_path):
    from typer.testing import CliRunner

    from mi_hops.cli import app

    asked = ["study", "--out", str(tmp_path / "s"), "--limit", "2", "--sizes", "quick", "-q"]
    done = CliRunner().invoke(app, [*asked, "--scheduler", "tcp://127.0.0.1:1", "--workers", "2"])
    assert done.exit_code == 2 and "give one" in done.stderr
    if importlib.util.find_spec("distributed") is None:
        done = CliRunner().invoke(app, [*asked, "--scheduler", "tcp://127.0.0.1:1"])
        assert done.exit_code == 2 and "mi-hops[scale]" in done.stderr
