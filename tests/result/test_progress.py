"""Bars inside bars, piped: lines without control codes."""

from __future__ import annotations

import sys
from types import ModuleType

from mi_hops.result import progress
from mi_hops.result.progress import progress_bar, showing_progress


def work():
    with showing_progress():
        for _ in progress_bar(range(3), label="outer"):
            for _ in progress_bar(range(3), label="inner"):
                pass


def test_piped_bars_are_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 1e-9)
    # Whoever starts notebooks has it imported and is none.
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    with progress_bar(total=2, label="whole", show=True) as bar:
        work()
        bar.update()
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\r" not in said
    assert "whole: 1 of 2" in said and "outer: 1 of 3" in said and "inner: 2 of 3" in said


def test_a_line_says_what_is_being_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    said = ""
    with progress_bar(total=2, label="study", show=True) as bar:
        for step in ("gap", "lens"):
            said += capsys.readouterr().err
            bar.set_postfix_str(step)
            assert capsys.readouterr().err == ""  # what is being done is no line of its own
            bar.update(1)
    lines = (said + capsys.readouterr().err).splitlines()
    assert any(line.startswith("study: 1 of 2") and line.endswith(", gap") for line in lines)


def test_what_an_earlier_run_did_is_not_this_ones_speed(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress_bar(total=100, done=60, label="train", show=True) as bar:
        bar.update()
        speed = bar.format_dict
    said = capsys.readouterr().err
    assert "train: 60 of 100" in said and "train: 61 of 100" in said
    assert speed["n"] - speed["initial"] == 1


def test_nothing_is_shown_unasked(capsys):
    for _ in progress_bar(range(3), label="quiet"):
        pass
    assert capsys.readouterr().err == ""
