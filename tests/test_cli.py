"""The command line: what it hands on, what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from mi_hops import __version__
from mi_hops.cli import app
from mi_hops.study import StudySettings
from tests.stopping import stop_training

runner = CliRunner()


class FakeStudy:
    summary = {"headlines": [{"name": "two-hop questions answered", "text": "61.0% (n = 100)"}]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """Put recorders in the place of the study and of the report; returns what they were given."""
    seen: list[dict] = []

    def run_study(model, facts, **settings):
        seen.append({"model": model, "facts": facts, **settings})
        return FakeStudy()

    def write_report(study, path, *, overwrite):
        assert isinstance(study, FakeStudy)
        assert overwrite
        seen.append({"report": path})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the report")
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mi_hops.study.run_study", run_study)
    monkeypatch.setattr("mi_hops.study.write_report", write_report)
    return seen


@pytest.fixture
def fails(monkeypatch):
    """Lets every study fail with an error; returns the recorder of the calls."""

    def fails(error):
        study = Mock(side_effect=error)
        monkeypatch.setattr("mi_hops.study.run_study", study)
        return study

    return fails


def test_study_defaults(calls):
    result = runner.invoke(app, ["study"])
    assert result.exit_code == 0, result.output
    assert calls[0] == {
        "model": "hops-gpt2",
        "facts": None,
        "out": Path("study"),
        "device": None,
        "dtype": None,
        "backend": None,
        "settings": StudySettings(seed=0, limit=None),
        "force": False,
        "progress": True,
        "executor": None,
    }
    assert calls[1] == {"report": Path("study/report.html")}
    assert "61.0% (n = 100)" in result.output
    assert "report.html" in result.output


def test_study_hands_every_option_on(calls, tmp_path):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "out"
    options = f"--model org/m --facts {facts} --out {out} --device cuda:1 --dtype bfloat16"
    options += " --backend bridge --seed 7 --limit 12 --workers 3 --force --quiet"
    result = runner.invoke(app, ["study", *options.split()])
    assert result.exit_code == 0, result.output
    assert calls[0] == {
        "model": "org/m",
        "facts": facts,
        "out": out,
        "device": "cuda:1",
        "dtype": "bfloat16",
        "backend": "bridge",
        "settings": StudySettings(seed=7, limit=12),
        "force": True,
        "progress": False,
        "executor": 3,
    }
    assert result.output == f"{out / 'report.html'}\n"


def test_join_leads_or_helps_and_takes_no_workers(calls, tmp_path):
    from mi_hops.sweep.shared import SharedFolder

    result = runner.invoke(app, ["study", "--join", "--out", str(tmp_path / "study")])
    assert result.exit_code == 0, result.output
    assert isinstance(calls[0]["executor"], SharedFolder)
    result = runner.invoke(app, ["study", "--join", "--workers", "2"])
    assert result.exit_code == 2 and "--join cannot be combined with" in result.stderr


def test_json_is_the_summary_and_nothing_else(calls):
    said = json.loads(runner.invoke(app, ["study", "--json"]).stdout)
    assert said == {"report": "study/report.html", **FakeStudy.summary}


TABLE = (
    "film,whose,director,born,question,first,second,also,too\n"
    "Ran,the director of Ran,Akira Kurosawa,Tokyo,The director of Ran was born in,"
    "Ran was directed by,Akira Kurosawa was born in,Tokio,Edo\n"
)
PAIRS = (
    "subject=film",
    "first_hop=whose",
    "bridge=director",
    "answer=born",
    "prompts.prefix=question",
    "first_prompts.prefix=first",
    "second_prompts.prefix=second",
    "answer_aliases=also",
    "answer_aliases=too",
)
COLUMNS = [part for pair in PAIRS for part in ("--columns", pair)]


def test_study_reads_any_table(calls, tmp_path):
    path = tmp_path / "films.csv"
    path.write_text(TABLE)
    result = runner.invoke(app, ["study", "--facts", str(path), *COLUMNS])
    assert result.exit_code == 0, result.output
    (fact,) = calls[0]["facts"]
    assert calls[0]["facts"].source == str(path)
    assert (fact.subject, fact.bridge, fact.answer) == ("Ran", "Akira Kurosawa", "Tokyo")
    assert fact.prompts == {"prefix": "The director of Ran was born in"}
    assert fact.first_prompts == {"prefix": "Ran was directed by"}
    assert fact.answer_aliases == ("Tokio", "Edo")


def test_malformed_rows_can_be_dropped(calls, tmp_path):
    path = tmp_path / "films.csv"
    path.write_text(TABLE + "Ran,,,,,,,,\n")
    options = ["study", "--facts", str(path), *COLUMNS]
    refused = runner.invoke(app, options)
    assert refused.exit_code == 2 and "row 1" in refused.stderr
    result = runner.invoke(app, [*options, "--on-error", "drop"])
    assert result.exit_code == 0, result.output
    assert len(calls[0]["facts"]) == 1


def test_errors_name_options_not_keyword_arguments(fails):
    fails(ValueError("use backend='bridge', dtype=\"float32\" or force=True; k=3, x[a=b]"))
    said = runner.invoke(app, ["study"]).stderr
    assert said == "Error: use --backend bridge, --dtype float32 or --force; k=3, x[a=b]\n"


def test_study_reads_mquake_with_templates(calls, tmp_path):
    record = {
        "case_id": 7,
        "questions": ["Who is the citizen?"],
        "answer": "USA",
        "answer_alias": [],
        "single_hops": [
            {"question": "Who wrote Misery?", "answer": "Stephen King", "answer_alias": []},
            {"question": "Whose citizen is Stephen King?", "answer": "USA", "answer_alias": []},
        ],
        "orig": {
            "triples": [["Q1", "P50", "Q2"], ["Q2", "P27", "Q3"]],
            "triples_labeled": [
                ["Misery", "author", "Stephen King"],
                ["Stephen King", "country of citizenship", "USA"],
            ],
        },
    }
    path = tmp_path / "facts.txt"
    path.write_text(json.dumps([record]))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "cloze_templates.json").write_text(
        json.dumps({"P27": "[X] is a citizen of __"})
    )
    (tmp_path / "templates" / "question_templates.json").write_text(
        json.dumps({"P27": "Of which country is [X] a citizen?"})
    )
    options = ["--format", "mquake", "--templates", str(tmp_path / "templates")]
    result = runner.invoke(app, ["study", "--facts", str(path), *options])
    assert result.exit_code == 0, result.output
    (fact,) = calls[0]["facts"]
    assert fact.prompts["prefix"] == "The author of Misery is a citizen of"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "table"], "name it with --facts"),
        (["--facts", "FILE", "--format", "xml"], "unknown format 'xml'"),
        (["--on-error", "drop"], "name it with --facts"),
        (["--facts", "FILE", "--format", "table"], "or --columns FIELD=COLUMN that says"),
        (["--facts", "FILE", "--columns", "bridge"], "--columns 'bridge' is not a pair"),
        (["--facts", "FILE", "--columns", "prompts.=question"], "columns names 'prompts.'"),
        (["--facts", "FILE", "--columns", "bridge=gone"], "columns lacks"),
        (
            ["--facts", "FILE", "--format", "jsonl", "--templates", "."],
            "has no option ['templates']",
        ),
    ],
)
def test_bad_words_about_facts(calls, tmp_path, options, message):
    path = tmp_path / "films.csv"
    path.write_text(TABLE)
    result = runner.invoke(app, ["study", *(str(path) if o == "FILE" else o for o in options)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert calls == []


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
@pytest.mark.parametrize("command", ["study --model hops-gpt2", "train-world --steps 1"])
def test_a_device_that_is_not_there(tmp_path, command, device):
    out = tmp_path / "out"
    result = runner.invoke(app, [*command.split(), "--device", device, "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert f"device '{device}' cannot be used" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("fact 'a': the bridge\nequals the answer"),
        FileNotFoundError("no such facts file: x.jsonl"),
        FileExistsError("study/ holds other settings' results"),
        OSError("the hub cannot be reached"),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_2(fails, error):
    fails(error)
    result = runner.invoke(app, ["study"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"Error: {' '.join(str(error).split())}\n"

    shown = runner.invoke(app, ["study", "--debug"])
    assert shown.exception is error  # raised as it is, so that Python prints the traceback


def test_an_unexpected_error_is_not_hidden(fails):
    fails(ZeroDivisionError("a bug"))
    assert isinstance(runner.invoke(app, ["study"]).exception, ZeroDivisionError)


def test_ctrl_c_says_that_the_same_command_resumes(fails):
    fails(KeyboardInterrupt)
    result = runner.invoke(app, ["study"])
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr


@pytest.mark.parametrize(
    "args", [["study", "--limit", "0"], ["study", "--nonsense"], ["frobnicate"]]
)
def test_wrong_arguments_are_refused(calls, args):
    assert runner.invoke(app, args).exit_code == 2
    assert calls == []


def test_versions():
    assert runner.invoke(app, ["--version"]).output == f"mi-hops {__version__}\n"
    lines = runner.invoke(app, ["version"]).output.splitlines()
    assert [line.split()[0] for line in lines] == [
        "mi-hops",
        "torch",
        "transformer_lens",
        "transformers",
    ]
    assert all(len(line.split()) == 2 for line in lines)


def test_python_m_shows_the_same_help_without_loading_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['mi_hops', '--help']\n"
        "try:\n    runpy.run_module('mi_hops', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformer_lens' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train-world" in done.stdout and "study" in done.stdout


def test_train_world_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = runner.invoke(app, ["train-world", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty" in result.stderr and "--force" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]

    result = runner.invoke(app, ["train-world", "--out", str(tmp_path / "notes.txt"), "--force"])
    assert result.exit_code == 2
    assert "is a file" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.once
@pytest.mark.slow
def test_train_world_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    drawn = stop_training(monkeypatch, 3)
    out = tmp_path / "world"
    command = f"train-world --steps 3 --device cpu --limit 4 --quiet --out {out}".split()
    result = runner.invoke(app, command)
    assert result.exit_code == 130 and "The same command goes on" in result.stderr
    assert [path.name for path in out.iterdir()] == ["unfinished.pt"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert len(drawn) == 4  # two before, the one that stopped it, and the last
    assert (out / "model.safetensors").exists() and not (out / "unfinished.pt").exists()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_train_world_writes_a_checkpoint_that_transformers_loads(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "world"
    options = f"--family {family} --steps 3 --seed 5 --device cpu --limit 8 --out {out}"
    result = runner.invoke(app, ["train-world", *options.split()])
    assert result.exit_code == 0, result.output
    assert f"{family} after 3 steps" in result.stdout and "seen_parts" in result.stdout

    record = json.loads((out / "training.json").read_text())
    assert record["recipe"]["steps"] == 3 and record["recipe"]["seed"] == 5
    assert record["curve"][-1]["step"] == 3
    assert {scores["n"] for scores in record["measured"].values()} == {8}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out))


@pytest.mark.slow
def test_a_dry_run_tells_what_would_run_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    options = ["study", "--sizes", "quick", "--limit", "20", "--out", str(out), "--dry-run"]
    shown = runner.invoke(app, options).stdout
    assert "gap" in shown and "editing" in shown and "in all; memory" in shown
    piped = runner.invoke(app, [*options, "--json"])
    plan = json.loads(piped.stdout)
    assert piped.stderr == ""
    assert not out.exists()
    assert plan["facts"] == 20 and plan["bytes"] > 0
    rows = {step["name"]: step["rows"] for step in plan["steps"]}
    assert 0 < rows["gap"] < 9 * 20  # three questions in three forms; some hops are shared
    # Two forms at two positions of each of six layers, for the bridge and one control.
    assert rows["erasure"] == 20 * 6 * 2 * 2 * 2
    assert all(step["minutes"] > 0 and not step["done"] for step in plan["steps"])


def _study(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A study as from a shell; says on stderr whether torch was loaded."""
    code = (
        "import sys\nfrom mi_hops.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    options = ["study", "--sizes", "quick", "--limit", "16", "--out", str(out), "-q", *more]
    return subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)


@pytest.mark.once
@pytest.mark.slow
def test_a_finished_study_is_reopened_without_torch_until_something_changes(tmp_path):
    out = tmp_path / "out"
    first = _study(out)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{out / 'report.html'}\n"

    again = _study(out)
    assert (again.stdout, again.stderr) == (first.stdout, "False\n")
    said = json.loads(_study(out, "--json").stdout)
    assert said["headlines"] == json.loads((out / "summary.json").read_text())["headlines"]

    other = _study(out, "--seed", "1")  # another study, which must not overwrite this one
    assert other.returncode == 2 and "other settings (" in other.stderr
    (out / "report.html").write_text("changed")
    mended = _study(out)
    assert mended.stderr.endswith("True\n")
    assert (out / "report.html").read_text() != "changed"


def test_compare_hands_on_both_folders_and_their_names(monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    compare = Mock(return_value=page)
    monkeypatch.setattr("mi_hops.study.compare_studies", compare)
    given = ["compare", "a", "b", "--out", str(page), "--names", "before", "after"]
    done = runner.invoke(app, given)
    assert done.exit_code == 0, done.output
    how = {"names": ("before", "after"), "overwrite": False}
    compare.assert_called_once_with(Path("a"), Path("b"), page, **how)
    assert runner.invoke(app, [*given, "-q"]).stdout == f"{page}\n"
    page.write_text("another page")
    refused = runner.invoke(app, given)
    assert refused.exit_code == 2 and "use --force" in refused.stderr
    assert runner.invoke(app, [*given, "--force"]).exit_code == 0
    assert compare.call_args.kwargs["overwrite"] is True


def test_piped_output_has_no_control_codes(calls):
    result = runner.invoke(app, ["study"])
    assert "\x1b" not in result.output and "\r" not in result.output


@pytest.mark.parametrize(
    ("text", "minutes"), [("20m", 20), ("90s", 1.5), ("2h", 120), (" 1.5h ", 90)]
)
def test_a_budget_of_time(text, minutes, fails):
    study = fails(ValueError("enough"))
    options = ["--budget", text, "--score", "first-token", "--shots", "2"]
    assert runner.invoke(app, ["study", *options]).exit_code == 2
    settings = study.call_args.kwargs["settings"]
    assert (settings.budget, settings.score, settings.shots) == (minutes, "first_token", 2)


@pytest.mark.parametrize("text", ["20", "m", "0m", "soon"])
def test_a_budget_that_is_no_time(text):
    found = runner.invoke(app, ["study", "--budget", text])
    assert found.exit_code == 2
    assert "is not a time; expected e.g. 20m" in found.output
