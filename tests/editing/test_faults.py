"""Kills, full disks and interrupts at every step: neither model nor file is ever half-changed."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import select
import shutil
import signal
import sys
from inspect import CO_GENERATOR
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_hops.editing import (
    AppliedError,
    Edit,
    Moments,
    WrongWeightsError,
    applied_edits,
    export_hf,
    second_moments,
)
from mi_hops.editing import change as change_module
from mi_hops.editing import edit as edit_module
from mi_hops.editing import export as export_module
from mi_hops.editing import teaching as teaching_module
from mi_hops.model import fingerprint, live_matrix
from mi_hops.model import weights as weights_module
from tests.editing.conftest import break_copies
from tests.editing.test_edit import assert_same_edit, random_edit
from tests.editing.test_moments import TEXTS
from tests.models import cases

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited")
FULL = OSError(errno.ENOSPC, "No space left on device")


def bits(model):
    """A digest of every parameter's bytes: unlike `torch.equal` it tells 0 from -0."""
    return {
        name: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, p in model.named_parameters()
    }


def on_disk(folder):
    """Path below a folder -> content, None for a folder."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


# -- faults ---------------------------------------------------------------------------------------


def child(work, kill_at=None):
    """Do ``work(tell)`` in a forked process, which waits for an answer whenever it tells something.

    Args:
        kill_at: how often it is answered before it is killed instead; default: it is left alone.

    Returns:
        All it told, and the signal that ended it (0: none).
    """
    up, down = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:  # whatever happens, nothing of the test's own may go on here
            os.close(down[1])  # else the parent's end would go unnoticed
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.stdout = sys.stderr = os.fdopen(null, "w")

            def tell(text):
                os.write(up[1], text.encode())
                os.read(down[0], 1)

            try:
                work(tell)
            except BaseException as error:
                tell(f"failed: {error!r}")
        finally:
            os._exit(0)
    os.close(up[1])
    os.close(down[0])
    told = []
    try:
        while True:
            assert select.select([up[0]], [], [], 60)[0], f"the child hangs after {told[-1:]}"
            text = os.read(up[0], 1 << 16).decode()
            if not text:
                break
            assert not text.startswith("failed"), text
            told.append(text)
            if len(told) - 1 == kill_at:
                os.kill(pid, signal.SIGKILL)
            else:
                os.write(down[1], b".")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(up[0])
        os.close(down[1])
        _, status = os.waitpid(pid, 0)
    return told, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def in_steps(at, patch=setattr):
    """Have files of the package written in small pieces, with ``at(name)`` called before each step."""
    fsync, replace = os.fsync, os.replace

    def written(path, content):
        at("open")
        with io.FileIO(path, "w") as file:
            for start in range(0, len(content), 700):
                at(f"byte {start}")
                file.write(content[start : start + 700])
            at("close")

    def synced(handle):
        at("fsync")
        fsync(handle)

    def replaced(old, new):
        at("replace")
        replace(old, new)
        at("replaced")

    patch(Path, "write_bytes", written)
    patch(os, "fsync", synced)
    patch(os, "replace", replaced)


def raising(step, error):
    """An ``at`` for `in_steps` that raises at its `step`-th call, and the names it was called with."""
    names = []

    def at(name):
        names.append(name)
        if len(names) == step + 1:
            raise error

    return at, names


def limit_files(size, *, fatal=False):
    """Let the kernel refuse every byte of a file beyond `size`, or kill this process at it."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def outcome(work):
    """What came of a call, as text."""
    try:
        work()
    except OSError as error:
        return json.dumps([error.errno, str(error)])
    return json.dumps([0, ""])


_FILES = {m.__file__ for m in (change_module, edit_module, teaching_module)}
_CODES = {
    getattr(weights_module, name).__code__ for name in ("live_matrix", "write_matrix", "overwrite")
}


def interrupted(when, work):
    """Do ``work()`` with an interrupt at the `when`-th line or return of the code that writes.

    Returns:
        Whether it came so far.
    """
    left = when

    def within(frame, event, arg):
        nonlocal left
        # The interpreter does not run a generator's handlers for what is raised as it yields.
        if event == "line" or event == "return" and not frame.f_code.co_flags & CO_GENERATOR:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return within

    def calls(frame, event, arg):
        code = frame.f_code
        return within if code.co_filename in _FILES or code in _CODES else None

    before, gradients = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(calls)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        # An interrupt between a block of torch.no_grad and its end leaves gradients off.
        torch.set_grad_enabled(gradients)
    return False


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def quick(tiny, monkeypatch):
    """A tiny model whose weights are not digested at each of hundreds of calls."""
    now = fingerprint(tiny)
    monkeypatch.setattr(edit_module, "fingerprint", lambda model: now)
    return tiny


def test_an_interrupt_at_any_line_of_apply_and_undo(quick):
    edit = random_edit(quick, layers=(1,))
    below = random_edit(quick, seed=1, layers=(0,))
    below.apply(quick)
    off = bits(quick)
    edit.apply(quick)
    on = bits(quick)
    edit.undo(quick)
    assert on != off

    def state():
        """In force or not, and the weights just so."""
        here = applied_edits(quick)
        assert (here, bits(quick)) in (((below,), off), ((below, edit), on))
        return edit in here

    steps = 0
    for steps in itertools.count():
        went_on = interrupted(steps, lambda: edit.apply(quick))
        if state():
            edit.undo(quick)
        if not went_on:
            break
    assert steps > 50
    for steps in itertools.count():
        edit.apply(quick)
        went_on = interrupted(steps, lambda: edit.undo(quick))
        if state():
            edit.undo(quick)
        if not went_on:
            break
    assert steps > 20
    below.undo(quick)


@pytest.mark.slow_case("gpt2-hooked")
def test_an_interrupt_at_any_line_of_a_block(quick):
    outer = random_edit(quick, layers=(1,))
    inner = random_edit(quick, seed=1, matrices=("W_O",), layers=(1,))
    before = bits(quick)

    def block():
        with outer.applied(quick):
            inner.apply(quick)

    for steps in itertools.count():
        went_on = interrupted(steps, block)
        assert applied_edits(quick) == ()
        assert bits(quick) == before
        if not went_on:
            break
    assert steps > 100


def test_an_interrupt_as_gradients_are_switched_off_leaves_them_on(quick):
    def wanted():
        return {n: p.requires_grad for n, p in quick.named_parameters()}

    loaded, inside = wanted(), []
    quick.requires_grad_(True)
    for steps in itertools.count():

        def block():
            with teaching_module.frozen(quick):
                inside.append(wanted())

        interrupted(steps, block)
        if inside:
            break
        on = all(wanted().values())
        quick.requires_grad_(True)
        assert on
    assert steps > len(loaded) and not any(inside[0].values())
    for n, p in quick.named_parameters():
        p.requires_grad_(loaded[n])


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
def test_a_layer_that_is_half_written(tiny, monkeypatch, error):
    edit = random_edit(tiny)
    before = bits(tiny)

    def fails(work, wrong):
        """Whatever `work` does, its copies in `wrong` fail, and nothing of the edit is left."""
        with monkeypatch.context() as patch:
            break_copies(patch, error, wrong)
            with pytest.raises(type(error)):
                work()
        assert bits(tiny) == before and applied_edits(tiny) == ()

    def block():
        with edit.applied(tiny):
            pass

    n = len(edit.changes)
    for layer in range(n):
        fails(lambda: edit.apply(tiny), {layer})
        fails(block, {layer})  # not entered
        fails(block, {n + layer})  # not left
        # Both at once: an edit that fails, and whose rollback fails.
        fails(lambda: edit.apply(tiny), {layer, layer + 1})
        edit.apply(tiny)
        fails(lambda: edit.undo(tiny), {layer})


def test_a_layer_that_cannot_be_put_back_keeps_the_edit_applied(tiny, monkeypatch):
    edit = random_edit(tiny)
    before = bits(tiny)
    edit.apply(tiny)
    lost, real = live_matrix(tiny, *edit.changes[1].site).data_ptr(), torch.Tensor.copy_

    def broken(self, *args):
        if self.data_ptr() == lost:
            raise RuntimeError("device lost")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            edit.undo(tiny)
    assert applied_edits(tiny) == (edit,)
    now = bits(tiny)
    assert sum(now[n] != before[n] for n in before) == 1  # the others have their weights again
    edit.undo(tiny, force=True)
    assert bits(tiny) == before and applied_edits(tiny) == ()


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def pair(load_tiny, tmp_path):
    """A saved edit, another one to be saved over it, and the path."""
    model = load_tiny("gpt2", "bridge")
    first, second = (random_edit(model, seed=i, layers=(i,)) for i in (1, 2))
    return first, second, first.save(tmp_path / "edit.safetensors")


@pytest.mark.slow_case("new")
@on_linux
@pytest.mark.parametrize("over", [True, False], ids=["over an old file", "new"])
def test_killed_at_every_step_of_saving(pair, over):
    first, second, path = pair
    old = path.read_bytes()

    def save(tell):
        in_steps(tell)
        second.save(path, overwrite=True)

    names, ended = child(save)
    assert ended == 0 and len(names) > 6 and names[-1] == "replaced"
    new = path.read_bytes()
    assert_same_edit(Edit.load(path), second)
    for step, name in enumerate(names):
        path.unlink()
        if over:
            path.write_bytes(old)
        told, ended = child(save, kill_at=step)
        assert ended == signal.SIGKILL and told == names[: step + 1]
        if name == "replaced":
            assert path.read_bytes() == new
        elif over:
            assert path.read_bytes() == old
            assert_same_edit(Edit.load(path), first)
        else:
            with pytest.raises(FileNotFoundError):
                Edit.load(path)
            path.touch()
    # What a kill leaves behind has another name, and the next one saves as if nothing had been.
    assert all(p.name.startswith(".") for p in path.parent.iterdir() if p != path)
    assert_same_edit(Edit.load(second.save(path, overwrite=True)), second)


@on_linux
def test_killed_at_any_byte_of_a_file(pair):
    first, second, path = pair
    old = path.read_bytes()
    size = len(old)

    def save(size):
        return lambda tell: (limit_files(size, fatal=True), second.save(path, overwrite=True))

    for limit in (0, 1, 8, 9, size // 3, size - 1):
        _, ended = child(save(limit))
        assert ended == signal.SIGXFSZ
        assert path.read_bytes() == old
    assert child(save(2 * size))[1] == 0
    assert_same_edit(Edit.load(path), second)


@on_linux
def test_a_disk_that_is_full_at_any_byte(pair, load_tiny):
    first, second, path = pair
    model = load_tiny("gpt2", "bridge")
    before, size = on_disk(path.parent), path.stat().st_size
    unchanged = bits(model)

    def work(limit):
        def saves(tell):
            limit_files(limit)
            tell(outcome(lambda: second.save(path, overwrite=True)))
            tell(outcome(lambda: second.save(path.with_name("new.safetensors"))))
            tell(outcome(lambda: second_moments(model, TEXTS[:2], cache=path.parent)))
            assert bits(model) == unchanged

        return saves

    for limit in (0, 1, 9, size // 2, size - 1):
        told, ended = child(work(limit))
        assert ended == 0
        for text, name in zip(told, (path.name, "new", "moments-"), strict=True):
            number, words = json.loads(text)
            assert number == errno.EFBIG
            assert "File too large" in words and f"{path.parent}/{name}" in words
        assert on_disk(path.parent) == before
    assert_same_edit(Edit.load(path), first)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "interrupt"])
@pytest.mark.parametrize("what", ["edit", "new edit", "moments"])
def test_a_failure_at_every_step_of_saving(pair, load_tiny, monkeypatch, tmp_path, what, error):
    first, second, path = pair
    model = load_tiny("gpt2", "bridge")
    second.apply(model)
    before, unchanged = on_disk(tmp_path), bits(model)
    target = path if what == "edit" else tmp_path / "new.safetensors"

    def save():
        if what == "moments":
            second_moments(model, TEXTS[:2], layers=[1], cache=tmp_path)
        else:
            second.save(target, overwrite=what == "edit")

    try:
        for step in itertools.count():
            failure = OSError(*error.args) if isinstance(error, OSError) else KeyboardInterrupt()
            at, names = raising(step, failure)
            with monkeypatch.context() as patch:
                in_steps(at, lambda *args: patch.setattr(*args, raising=False))  # noqa: B023
                try:
                    save()
                    break
                except OSError as raised:
                    assert "No space left" in str(raised) and str(tmp_path) in str(raised)
                except KeyboardInterrupt:
                    assert isinstance(error, KeyboardInterrupt)
            assert bits(model) == unchanged and applied_edits(model) == (second,)
            if names[-1] != "replaced":
                assert on_disk(tmp_path) == before
            elif what != "edit":
                (new,) = set(on_disk(tmp_path)) - set(before)
                (tmp_path / new).unlink()
        assert step == len(names) > 6 and len(on_disk(tmp_path)) == 1 + (what != "edit")
        if what == "moments":
            (cached,) = tmp_path.glob("moments-*")
            assert Moments.load(cached).layers == (1,)
        else:
            assert_same_edit(Edit.load(target), second)
    finally:
        second.undo(model)


def test_no_part_of_a_file_is_taken_for_the_whole(tiny, tmp_path):
    edit = random_edit(tiny, matrices=("W_O",), layers=(1,))
    whole = edit.save(tmp_path / "edit.safetensors").read_bytes()
    moments = second_moments(tiny, TEXTS[:2], layers=[1], cache=tmp_path)
    (cached,) = tmp_path.glob("moments-*")
    part = tmp_path / "part"
    for content, load in ((whole, Edit.load), (cached.read_bytes(), Moments.load)):
        ends = {*range(0, 40), *range(40, len(content), 41), len(content) - 1}
        for end in sorted(ends):
            part.write_bytes(content[:end])
            with pytest.raises(ValueError, match="part"):
                load(part)
        part.write_bytes(content + b"\0")
        with pytest.raises(ValueError, match="part"):
            load(part)
    again = second_moments(tiny, TEXTS[:2], layers=[1], cache=tmp_path)
    assert torch.equal(again.second[1], moments.second[1])


# -- exported folders -----------------------------------------------------------------------------


@pytest.fixture
def export(load_tiny, checkpoints, tmp_path, monkeypatch):
    """``export(out)`` that writes a real folder, from a checkpoint that was read before."""
    import transformers

    source = checkpoints["gpt2"]
    model = load_tiny("gpt2", "bridge")
    edit = random_edit(model)
    hf = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    monkeypatch.setattr(export_module, "load_model", lambda *args, **options: model)
    for name, made in (("AutoModelForCausalLM", hf), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *args, made=made, **options: made
        )
    unchanged = bits(model)

    def run(out, **options):
        try:
            return export_hf(source, edit, out, **options)
        finally:
            assert bits(model) == unchanged and applied_edits(model) == ()

    (tmp_path / "exports").mkdir()
    return run


def watch(folder, at):
    """Call ``at(name)`` before every file or folder that Python makes, renames or removes below one."""

    def hook(event, args):
        writes = event in ("os.mkdir", "os.rename", "os.rmdir") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(args[0]).startswith(str(folder)):
            at(f"{event} {Path(args[0]).name}")

    sys.addaudithook(hook)  # cannot be taken away again: only for a child


@pytest.mark.slow_case("over an old folder")
@on_linux
@pytest.mark.parametrize("over", [True, False], ids=["over an old folder", "new"])
def test_killed_at_every_step_of_an_export(export, tmp_path, over):
    folder = tmp_path / "exports"
    whole = on_disk(export(tmp_path / "whole"))
    out = folder / "out"

    def run(tell):
        watch(folder, tell)
        export(out, overwrite=over)
        tell("done")

    seen = set()
    for step in itertools.count():
        if out.exists():
            shutil.rmtree(out)
        if over:
            out.mkdir()
            (out / "old").write_text("old")
        told, ended = child(run, kill_at=step)
        if ended == 0:
            break
        assert ended == signal.SIGKILL
        now = on_disk(out) if out.exists() else None
        assert now in (None, whole, {"old": b"old"})
        seen.add("new" if now == whole else "old" if now else "none")
        if told[-1] == "done":
            assert now == whole
        assert all(p.name.startswith(".") for p in folder.iterdir() if p != out)
    assert step == len(told) and step > 6
    assert on_disk(out) == whole
    assert seen >= ({"old", "new"} if over else {"none", "new"})


@on_linux
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_failure_at_every_step_of_an_export(export, tmp_path, error):
    folder = tmp_path / "exports"
    whole = on_disk(export(tmp_path / "whole"))
    out = folder / "out"

    def run(tell):
        at, names = raising(-1, None)
        watch(folder, lambda name: at(name))
        for step in itertools.count():
            failure = OSError(*error.args) if isinstance(error, OSError) else KeyboardInterrupt()
            at, names = raising(step, failure)
            try:
                export(out)
                assert on_disk(out) == whole
                if len(names) <= step:
                    break
                shutil.rmtree(out)  # a folder that is there already need not be made
            except OSError as raised:
                assert "No space left" in str(raised) and "out" in str(raised)
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
            assert on_disk(folder) == {}, names
        assert on_disk(out) == whole and os.listdir(folder) == ["out"]
        tell(str(step))

    told, ended = child(run)
    assert ended == 0 and int(told[0]) > 6


@pytest.mark.slow_case("killed")
@on_linux
@pytest.mark.parametrize("fatal", [False, True], ids=["full", "killed"])
def test_an_export_that_meets_its_end_at_any_byte(export, tmp_path, fatal):
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path / "exports"
    whole = on_disk(export(tmp_path / "whole"))
    out = folder / "out"
    size = {name: len(content) for name, content in whole.items()}
    points = [
        # What is being written when the disk gets full, how much of a file still finds room, and
        # how it is written: configuration by Python, weights and words by libraries in Rust.
        (GPT2LMHeadModel, "save_pretrained", 0, {}),
        (GPT2LMHeadModel, "save_pretrained", size["config.json"] + 1, {}),
        (GPT2LMHeadModel, "save_pretrained", size["model.safetensors"] - 1, {}),
        (GPT2LMHeadModel, "save_pretrained", 14_000, {"max_shard_size": "20KB"}),
        (PreTrainedTokenizerFast, "save_pretrained", 0, {}),
        (PreTrainedTokenizerFast, "save_pretrained", size["tokenizer.json"] - 1, {}),
        (Path, "write_text", 0, {}),
        (Path, "write_text", size["mi_hops_edit.json"] - 1, {}),
    ]
    for owner, name, limit, options in points:

        def run(tell, owner=owner, name=name, limit=limit, options=options):
            real = getattr(owner, name)

            def limited(*args, **kwargs):
                limit_files(limit, fatal=fatal)
                return real(*args, **kwargs)

            setattr(owner, name, limited)
            tell(outcome(lambda: export(out, **options)))

        told, ended = child(run)
        assert not out.exists()
        if fatal:
            assert ended == signal.SIGXFSZ and not told
            assert all(p.name.startswith(".out.") for p in folder.iterdir())
        else:
            number, words = json.loads(told[0])
            assert number == errno.EFBIG and "File too large" in words and str(out) in words
            assert os.listdir(folder) == []
    assert on_disk(export(out)) == whole


# -- random programs ------------------------------------------------------------------------------

STEP = st.tuples(
    st.sampled_from(["apply", "apply", "apply", "undo", "undo", "block", "make", "file"]),
    st.integers(0, 5),
)
MADE = st.builds(
    dict,
    seed=st.integers(0, 2**20),
    rank=st.integers(0, 3),
    scale=st.sampled_from([1e-6, 0.1, 30.0]),
    matrices=st.sampled_from([("W_O",), ("W_out",), ("W_O", "W_out")]),
    layers=st.sampled_from([(0,), (2, 1), (0, 1, 2)]),
)


@pytest.mark.parametrize(
    "shape, backend, dtype",
    [
        ("gpt2", "hooked", "float32"),
        ("gpt2", "bridge", "bfloat16"),
        ("llama", "hooked", "bfloat16"),
        ("llama", "bridge", "float32"),
    ],
)
@settings(max_examples=12, deadline=None)
@given(made=st.lists(MADE, min_size=2, max_size=4), steps=st.lists(STEP, max_size=14))
def test_random_programs(load_tiny, tmp_path_factory, shape, backend, dtype, made, steps):
    """Whatever is asked in whatever order, only the last edit comes off and weights return by bits."""
    model = load_tiny(shape, backend, dtype)
    folder = tmp_path_factory.mktemp("edits")
    edits = [random_edit(model, **how) for how in made]
    below = [(bits(model), fingerprint(model))]  # weights under each edit in force, and the present
    force: list[int] = []
    seen = {(): below[0][0]}

    def refused(kind, work):
        with pytest.raises(kind):
            work()

    def apply(i):
        """Apply, or be refused as it should; whether it was applied."""
        edit = edits[i]
        if i in force:
            refused(AppliedError, lambda: edit.apply(model))
        elif edit.fingerprint not in [now for _, now in below]:
            refused(WrongWeightsError, lambda: edit.apply(model))
        else:
            edit.apply(model)
            force.append(i)
            below.append((bits(model), fingerprint(model)))
            return True
        return False

    for what, number in steps:
        i = number % len(edits)
        if what == "apply":
            apply(i)
        elif what == "undo" and force and force[-1] == i:
            edits[i].undo(model)
            force.pop()
            below.pop()
        elif what == "undo":
            refused(AppliedError, lambda: edits[i].undo(model))  # noqa: B023
        elif what == "block":
            expected = pytest.raises((ZeroDivisionError, AppliedError, WrongWeightsError))
            with expected, edits[i].applied(model):
                assert i not in force and bits(model) == seen.get((*force, i), bits(model))
                for other in edits:  # left for the block to take off
                    if not other.is_applied(model):
                        other.apply(model, check=False)
                raise ZeroDivisionError
        elif what == "make":  # on the model as edited so far
            edits.append(random_edit(model, seed=len(edits), layers=(1,)))
        elif i not in force:
            edits[i] = Edit.load(edits[i].save(folder / f"{i}.safetensors", overwrite=True))
        assert applied_edits(model) == tuple(edits[i] for i in force)
        # The same edits in force are the same bits, whether they come from a file or not.
        assert bits(model) == below[-1][0] == seen.setdefault(tuple(force), below[-1][0])
    while force:
        edits[force.pop()].undo(model)
        below.pop()
        assert bits(model) == below[-1][0] == seen.setdefault(tuple(force), below[-1][0])


@settings(max_examples=8, deadline=None)
@given(made=st.lists(MADE, min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_a_stack_from_files_comes_off_in_reverse_only(
    load_tiny, tmp_path_factory, shape, backend, made, data
):
    model = load_tiny(shape, backend)
    folder = tmp_path_factory.mktemp("edits")
    before = bits(model)
    edits = [random_edit(model, **how) for how in made]
    files = [e.save(folder / f"{i}.safetensors") for i, e in enumerate(edits)]
    loaded = [Edit.load(file, model) for file in files]
    inside = []
    for some in (edits, loaded):
        for e in some:
            e.apply(model)
        inside.append(bits(model))
        order = data.draw(st.permutations(range(len(some))))
        there = list(range(len(some)))
        for i in order:
            if i != there[-1]:
                with pytest.raises(AppliedError, match="last first"):
                    some[i].undo(model)
            else:
                some[i].undo(model)
                there.pop()
            assert applied_edits(model) == tuple(some[j] for j in there)
        for i in reversed(there):
            some[i].undo(model)
        assert bits(model) == before
    assert inside[0] == inside[1]
