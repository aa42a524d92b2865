"""Kills, full disks and interrupts at every step: neither model nor file is ever half-changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import select
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mi_hops import model as model_module
from mi_hops.editing import (
    AppliedError,
    Edit,
    Moments,
    WrongWeightsError,
    applied_edits,
    export_hf,
    second_moments,
)
from mi_hops.editing import applied as applied_module
from mi_hops.editing import change as change_module
from mi_hops.editing import edit as edit_module
from mi_hops.editing import export as export_module
from mi_hops.editing.teaching import frozen
from mi_hops.model import fingerprint
from tests.editing.conftest import weights
from tests.editing.test_edit import assert_same_edit, random_edit
from tests.editing.test_moments import TEXTS

forks = pytest.mark.skipif(sys.platform != "linux", reason="child processes are forked")
MODELS = [(s, b) for s in ("gpt2", "llama") for b in ("hooked", "bridge")]


def bits(model):
    """A digest of every parameter's bytes: unlike `torch.equal` it tells 0 from -0."""
    return {
        n: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for n, p in model.named_parameters()
    }


def on_disk(folder):
    """Path below a folder -> content; None for folders."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


# -- a child process that stops, or is stopped ----------------------------------------------------


@contextmanager
def child(work):
    """A forked process that does ``work(tell)``; yields its id and the pipe `tell` writes to."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:  # nothing of the test's own clean-up may run here
            os.close(reading)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            work(lambda text: os.write(writing, text.encode() + b"\n"))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        yield pid, reading
    finally:
        os.close(reading)
        with_pid = os.waitpid(pid, os.WNOHANG)
        if with_pid[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def heard(reading):
    """What the child tells next; "" once it has ended."""
    assert select.select([reading], [], [], 60)[0], "the child process hangs"
    return os.read(reading, 1 << 16).decode().strip()


def killed_at(step, work):
    """Kill the child at its `step`-th call of `pause`; gives that step's name, "" if it had none."""

    def stopping(tell):
        count = 0

        def pause(name):
            nonlocal count
            count += 1
            if count > step:
                tell(name)
                while True:
                    signal.pause()

        work(pause)

    with child(stopping) as (pid, reading):
        name = heard(reading)
        if name:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            with_nothing = heard(reading)
            assert not with_nothing
            os_waited.add(pid)
    return name
