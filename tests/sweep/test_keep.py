"""What is kept of long work: given again as it was, made again where it is damaged."""

from __future__ import annotations

import itertools

import pytest
import torch

import mi_hops
from mi_hops.sweep import keep as keep_module
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.keep import Running, keep, keeping
from tests.stopping import stop_making

VALUES = [torch.arange(6.0).reshape(2, 3).T, {"a": [1, 2.5, None, "é"]}, [], torch.tensor(True)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Every part is written as it comes."""
    monkeypatch.setattr(keep_module, "WRITE_EVERY", 0.0)


class Stop(BaseException):
    pass


def work(folder, *, stop=None, identity="x"):
    """Parts within parts; stopped before the making number `stop`. Gives values and makings."""
    made = itertools.count()

    def make(value):
        if next(made) == stop:
            raise Stop
        return value

    def inner(value):
        return [keep(lambda v=v: make(v), "same") for v in (value, 1.5)]

    with keeping(folder, identity):
        return [keep(lambda v=v: inner(v), "part") for v in VALUES], next(made)


def plain(values):
    return [v.tolist() if isinstance(v, torch.Tensor) else v for pair in values for v in pair]


@pytest.mark.parametrize("stop", range(8))
def test_nothing_is_made_twice(tmp_path, stop):
    whole, n = work(tmp_path / "whole")
    assert n == 8 and not (tmp_path / "whole").exists()
    with pytest.raises(Stop):
        work(tmp_path / "kept", stop=stop)
    resumed, rest = work(tmp_path / "kept")
    assert plain(resumed) == plain(whole) == plain([(v, 1.5) for v in VALUES])
    assert rest == n - stop
    assert resumed[0][0].stride() == whole[0][0].stride()
    assert not (tmp_path / "kept").exists()


def test_work_of_another_identity_is_made_again(tmp_path):
    with pytest.raises(Stop):
        work(tmp_path / "kept", stop=5)
    assert work(tmp_path / "kept", identity="y")[1] == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_files_are_noticed(tmp_path, damage):
    folder = tmp_path / "kept"
    with pytest.raises(Stop):
        work(folder, stop=5)
    paths = sorted(folder.iterdir())
    assert len(paths) > 2
    for path in paths[1:3]:
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 4
        path.write_bytes(
            {"cut": data[:-7], "empty": b"", "foreign": b"years of work"}.get(damage, data)
        )
    (folder / ".left.part").write_bytes(b"half")
    resumed, n = work(folder)
    assert plain(resumed) == plain([(v, 1.5) for v in VALUES])
    assert 3 < n <= 8


def test_without_a_folder_nothing_is_kept():
    value = object()
    assert keep(lambda: value, "part") is value
    growing = Running("sum")
    growing.put(lambda: pytest.fail("nothing asks for it"))
    assert growing.value is None


def test_a_growing_value(tmp_path):
    def total(stop=None):
        with keeping(tmp_path / "kept", "x"):
            running = Running("sum")
            n, x = running.value or (0, torch.zeros(3))
            begun = n
            while n < 10:
                n, x = n + 1, x + torch.ones(3) / (n + 1)
                running.put(lambda now=(n, x): now)
                if n == stop:
                    raise Stop
        return x, begun

    whole, _ = total()
    with pytest.raises(Stop):
        total(stop=4)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    resumed, begun = total()
    assert begun == 4
    assert torch.equal(resumed, whole)


def test_text_that_is_written_goes_on_where_it_was(load_tiny, tmp_path, monkeypatch):
    """Each batch draws on from the generator's state after the one before."""
    model = load_tiny()
    prompts = [f"w{i} w{i + 1}" for i in range(6)]
    how = {"n_tokens": 5, "seed": 3, "batch_size": 2}
    whole = mi_hops.sample(model, prompts, **how)
    made, _ = stop_making(monkeypatch, Stop, 3)
    with pytest.raises(Stop), keeping(tmp_path / "kept", "x"):
        mi_hops.sample(model, prompts, **how)
    with keeping(tmp_path / "kept", "x"):
        assert mi_hops.sample(model, prompts, **how) == whole
    assert len(made) == 4 and made[2] == made[3]  # of three batches only the last was begun anew


def test_a_batch_that_was_halved_is_halved_again(tmp_path):
    """Whatever memory there is when the work is resumed, the parts stay the same."""

    def sweep(room, stop=None):
        def run(part):
            if len(part) > room:
                raise torch.OutOfMemoryError
            if stop in part:
                raise Stop
            return torch.tensor(part)

        with keeping(tmp_path / "kept", "x"):
            parts = batched_with_oom_backoff(range(12), 8, run, kept=("rows",))
            return [found.tolist() for _, found in parts]

    with pytest.raises(Stop):
        sweep(room=3, stop=5)
    assert sweep(room=100) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_folder_that_is_removed(tmp_path):
    import shutil

    def remove():
        shutil.rmtree(tmp_path / "study")
        return 1

    (tmp_path / "study").mkdir()

    with (
        pytest.raises(FileNotFoundError, match="study has been removed while"),
        keeping(tmp_path / "study" / "kept", "x"),
    ):
        keep(remove, "part")


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(TypeError), keeping(tmp_path / "kept", "x"):
        keep(object, "part")
