"""A study under faults: what was done is kept, what is damaged is made again, nothing is mixed up.

At length, in processes that are killed: ``python -m benchmarks.faults``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mi_hops.study import Study, StudySettings, run_study, write_report
from mi_hops.study.folder import Folder, locked, prepare
from mi_hops.sweep import keep as keep_module
from tests.reasoning.tiny_facts import SIZES, dictated, tiny_facts
from tests.stopping import stop_making

pytestmark = pytest.mark.once

SMALL = StudySettings(sizes=replace(SIZES, edits=2, strengths=(4.0,)))


@pytest.fixture
def run(load_tiny, monkeypatch):
    """Runs the study of one tiny model in a folder; every finished part is written at once."""
    model = load_tiny("llama", "bridge")
    facts = [replace(f, split="held") for f in tiny_facts(model, 12)]
    dictated(monkeypatch)
    monkeypatch.setattr(keep_module, "WRITE_EVERY", 0.0)

    def run(out, executor=None):
        return run_study(model, facts, out=out, settings=SMALL, progress=False, executor=executor)

    return run


def assert_equal(study, other):
    """Bit for bit, but for what the steps took."""
    assert study.summary == other.summary
    assert study.choices == other.choices
    for name in study.settings["steps"]:
        a, b = study.result(name), other.result(name)
        assert study.skipped(name) == other.skipped(name)
        if name == "editing":
            assert a.frame.equals(b.frame)
        elif a is not None:
            assert a.data.identical(b.data) and a.provenance == b.provenance


@pytest.mark.slow
def test_a_study_stopped_again_and_again_is_the_undisturbed_one(run, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    made, stops = stop_making(monkeypatch, KeyboardInterrupt, 3, 9, 20, 33)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    resumed = run(tmp_path / "stopped")
    assert_equal(resumed, whole)
    assert not list(resumed.folder.glob(".*"))
    stopped = len(made)
    made.clear()
    run(tmp_path / "counted")
    # A part is made once, and a part around it begun anew at each stop.
    assert stopped <= len(made) + 2 * 4


@pytest.mark.slow
def test_workers_make_the_same_study_and_one_may_go_on_without_them(run, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with ThreadPoolExecutor(2) as executor:
        assert_equal(run(tmp_path / "workers", executor), whole)
        stop_making(monkeypatch, KeyboardInterrupt, 12)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", executor)
    assert_equal(run(tmp_path / "stopped"), whole)


def flipped(good):
    """The content with one bit changed in its middle."""
    data = bytearray(good)
    data[len(data) // 2] ^= 1
    return bytes(data)


def cut(good):
    """The content without its end."""
    return good[:-100]


@pytest.mark.slow
def test_a_damaged_file_is_made_again(run, tmp_path):
    study = run(tmp_path / "study")
    # Two at a time: each step looks at its own files alone.
    for names in (
        ("gap.nc", "tuned_lens/lens.safetensors"),
        ("lens.nc", "choices.json"),
        ("editing.nc", "summary.json"),
    ):
        good = {name: (study.folder / name).read_bytes() for name in names}
        for damages in ((flipped, cut), (cut, flipped)):
            for (name, content), damage in zip(good.items(), damages, strict=True):
                (study.folder / name).write_bytes(damage(content))
            again = run(study.folder)
            assert_equal(again, study)
            for name, content in good.items():
                found = (study.folder / name).read_bytes()
                assert found == content or name.endswith(("nc", "summary.json")), name
            assert all(again.sound(step) for step in (*again.settings["steps"], "summary")), names


def test_a_damaged_budget_is_decided_anew(tmp_path):
    settings = {"steps": ["erasure"]}
    prepare(tmp_path, settings, force=False)
    study = Folder(tmp_path, settings)
    study.write("budget.json", '{"erasure": {"seconds_each": 1.5, "facts": 40}}')
    study.record("budget")
    prepare(tmp_path, settings, force=False)
    assert study.budget["erasure"]["facts"] == 40
    study.write("budget.json", '{"erasure": {"seconds_each": 1.5, "facts": 41}}')
    prepare(tmp_path, settings, force=False)
    assert study.budget == {}


def test_damaged_settings_are_refused_by_name(tmp_path):
    (tmp_path / "settings.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        Study.open(tmp_path)


@pytest.mark.slow
def test_a_study_stopped_before_it_had_settings(run, tmp_path):
    (tmp_path / "study").mkdir()
    left = tmp_path / "study" / ".settings.json.123.0123abcd.part"
    left.write_text("{")
    assert run(tmp_path / "study").summary
    assert not left.exists()


@pytest.mark.slow
def test_two_runs_into_one_folder(run, tmp_path):
    out = tmp_path / "study"
    with locked(out), pytest.raises(BlockingIOError, match="another process is running"):
        run(out)
    assert not list(out.iterdir())
    (out / ".lock").touch()  # of a process that was killed
    assert run(out).summary
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_the_report_tells_what_each_step_took(run, tmp_path):
    study = run(tmp_path / "study")
    assert all(study.records[name]["seconds"] >= 0 for name in study.settings["steps"])
    assert study.records["gap"]["peak_memory"] > 2**26
    page = write_report(study).read_text(encoding="utf-8")
    assert "time: editing" in page and "GiB" in page


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many studies, each in a process of its own
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")
def test_real_faults():
    command = "-m benchmarks.faults --kills 1 --others 1 --interrupts 0 --dry"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, timeout=1500, check=True
    )
    counted = json.loads(done.stdout.splitlines()[-1])
    assert len(counted) > 6  # kinds of faults
    assert {name: row["lost"] for name, row in counted.items() if row["lost"]} == {}
