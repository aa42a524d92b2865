"""The study: resuming, refusing, and every step on models that know something or nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mi_hops.model import fingerprint
from mi_hops.study import STEPS as ALL_STEPS
from mi_hops.study import Study, StudySettings, run_study, write_report
from mi_hops.study.choose import choose_edit, layer_spans
from mi_hops.study.run import begin, load_study_facts
from tests.reasoning.tiny_chains import tiny_chains
from tests.reasoning.tiny_facts import SIZES, dictated, tiny_facts

#: Those of facts that come in one wording.
STEPS = [step.name for step in ALL_STEPS if step.name != "wordings"]
SMALL = StudySettings(sizes=SIZES, also=("knockout", "back_patching"))


#: Each family and each class once: a study is many forward passes.
MODELS = [("llama", "bridge"), pytest.param(("gpt2", "hooked"), marks=pytest.mark.slow)]


@pytest.fixture(params=MODELS, ids="-".join)
def tiny(request, load_tiny):
    return load_tiny(*request.param)


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def finished(request, load_tiny, tmp_path_factory):
    """(model, facts, study) of a study that is done; nobody writes to it."""
    model = load_tiny(*request.param)
    facts = [replace(f, split="held") for f in tiny_facts(model, 16)]
    before = fingerprint(model)
    with pytest.MonkeyPatch.context() as patch:
        dictated(patch)
        study = run(model, facts, tmp_path_factory.mktemp("finished") / "study")
    assert fingerprint(model) == before
    assert not any(p.fwd_hooks for p in model.hook_dict.values())
    return model, facts, study


@pytest.fixture
def dictate(monkeypatch):
    """Both hops of every fact are known, and every other question is answered."""
    return dictated(monkeypatch)


@pytest.fixture
def knowing(tiny, dictate):
    """A tiny model, and a gap dictated so that every step has something to work on."""
    return tiny, [replace(f, split="held") for f in tiny_facts(tiny, 16)]


def run(model, facts, out, *, seed=0, force=False, **sizes):
    settings = replace(SMALL, seed=seed, sizes=replace(SIZES, **sizes))
    return run_study(model, facts, out=out, settings=settings, force=force, progress=False)


def test_every_step_is_written_and_read_back(finished):
    *_, study = finished
    assert [study.skipped(step) for step in STEPS] == [None] * len(STEPS)
    for step in STEPS[:-1]:
        assert study.result(step).provenance["fingerprint"] == study.settings["fingerprint"]
    assert study.result("editing").case_ids
    gap = study.summary["gap"]
    assert gap["failed"] == gap["passed"] == 8
    assert gap["forms"]["suffix"]["gap"]["value"] == 0.5
    assert {"lens", "erasure", "locate", "injection", "editing"} <= set(study.summary)
    assert all(isinstance(v, str) for line in study.headlines() for v in line)
    json.loads((study.folder / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "backend"), [("gpt2", "hooked"), ("gpt2", "bridge"), ("llama", "bridge")]
)
def test_a_model_with_folded_weights(load_tiny, dictate, tmp_path, shape, backend):
    """As HookedTransformer.from_pretrained loads it by default: nothing is left out."""
    model = load_tiny(shape, backend, processing="fold")
    facts = [replace(f, split="held") for f in tiny_facts(model, 12)]
    study = run(model, facts, tmp_path / "study")
    assert [study.skipped(step) for step in STEPS] == [None] * len(STEPS)
    assert study.settings["processing"] == "fold"
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "weight processing: fold (norms folded into the weights" in text
    assert "cannot be exported into the checkpoint" in text
    assert f"over the {31 if shape == 'gpt2' else 32} directions" in text


@pytest.mark.once
@pytest.mark.slow
def test_facts_that_a_step_cannot_use_are_left_out_of_it(knowing, tmp_path):
    model, facts = knowing
    absent, ambiguous = {"first_hop": "w80 w81"}, {"first_hop": "w1"}
    changes = {0: absent, 1: absent, 2: ambiguous, 3: ambiguous, 5: absent}
    facts = [replace(f, **changes.get(i, {})) for i, f in enumerate(facts)]
    facts[7] = replace(facts[7], second_prompts={"prefix": facts[7].second_prompts["prefix"]})
    facts[8] = replace(facts[8], first_prompts={})
    counts = {"lens": 16, "erasure": 16, "locate": 16, "injection": 16, "edits": 8}
    study = run(model, facts, tmp_path / "study", **counts)
    assert [study.skipped(step) for step in STEPS] == [None] * len(STEPS)
    left = {step: [i for i, _ in study.result(step).skipped] for step in STEPS[:-1]}
    assert left["gap"] == ["8"]
    # Without fact 8 the failures are 1, 3, 5, 7, 10, 12 and 14.
    assert left["failures"] == ["1", "3", "5"]
    assert sorted(left["lens"]) == ["0", "1", "2", "3", "5"]
    assert left["erasure"] == ["0", "2"]
    assert sorted(left["injection_grid"] + left["injection"]) == ["1", "3", "5"]
    counts = study.summary["left_out"]
    assert counts["gap"] == {"no first-hop prompt": 1}
    assert counts["failures"] == {
        "… does not occur in the prompt …": 2,
        "… occurs 4 times in …; pass an index or a slice of token positions instead": 1,
    }
    assert counts["editing"]["fact … has no second-hop prompt of form …; it has …"] == 1
    assert sum(counts["editing"].values()) == 4
    assert not {"1", "3", "5", "7"} & set(study.result("editing").case_ids)
    assert ("facts that cannot be asked", "1: no first-hop prompt") in study.headlines()
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "left out (1: no first-hop prompt)" in text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.slow
def test_chains_stand_among_the_facts(knowing, tmp_path):
    """Every step takes them, seen from their last bridge; the report shows every single hop."""
    model, facts = knowing
    chains = [replace(f, split="held") for f in tiny_chains(6)]
    counts = {"lens": 20, "erasure": 20, "locate": 20, "injection": 20, "edits": 8}
    study = run(model, [*chains, *facts[:8]], tmp_path / "study", **counts)
    assert [study.skipped(step) for step in STEPS] == [None] * len(STEPS)
    found = study.result("gap")
    assert found.by_hops()["n"].tolist() == [8, 6]
    ids = {fact.id for fact in chains}
    for step in ("lens", "erasure", "locate"):
        assert ids & set(study.result(step)["example"].values.tolist()), step
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    first, second = (hop.prompts["suffix"] for hop in chains[0].hops[:2])
    assert f"{first} / {second}" in text


@pytest.mark.once
@pytest.mark.slow
def test_a_step_that_can_use_no_fact_is_left_out(knowing, tmp_path):
    model, facts = knowing
    facts = [replace(f, first_hop="w80 w81") for f in facts]
    study = run(model, facts, tmp_path / "study")
    assert study.skipped("gap") is None
    for step in STEPS[1:]:
        assert study.skipped(step).startswith("no fact can be used for "), step
        assert "does not" in study.skipped(step)


def test_facts_that_cannot_be_asked(tiny, tmp_path):
    """The reason is given, and not that the model knows nothing."""
    facts = [replace(f, first_prompts={}) for f in tiny_facts(tiny, 5)]
    study = run(tiny, facts, tmp_path / "study")
    for step in STEPS[1:]:
        assert study.skipped(step) == (
            "none of these facts can be asked about both hops (5: no first-hop prompt)"
        )
    assert study.summary["left_out"] == {"gap": {"no first-hop prompt": 5}}
    assert ("facts that cannot be asked", "5: no first-hop prompt") in study.headlines()
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "None of these facts can be asked about both hops" in text
    assert "the model knows both hops of none" not in text.lower()


def test_choosing_and_reporting_never_share_a_fact(finished):
    *_, study = finished
    located = set(study.result("locate")["example"].values)
    scored = set(study.result("editing").case_ids)
    chosen_on = set(study.result("injection_grid")["example"].values)
    injected = set(study.result("injection")["example"].values)
    assert located and chosen_on and scored and injected
    assert not (located | chosen_on) & (scored | injected)


def test_cells_are_small_and_unknown_steps_are_refused(finished):
    *_, study = finished
    assert study.settings["model"] in repr(study) and len(repr(study)) < 2000
    assert "<table>" in study._repr_html_() and len(study._repr_html_()) < 4000
    with pytest.raises(ValueError, match="no step 'edit'; a study has .*'editing'"):
        study.result("edit")


@pytest.mark.once
@pytest.mark.slow
def test_a_stopped_study_resumes(knowing, tmp_path, monkeypatch):
    from mi_hops.study.steps import locate as locate_module

    model, facts = knowing
    out = tmp_path / "study"
    real = locate_module.locate

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(locate_module, "locate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(model, facts, out)
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nc")}
    assert set(done) == {"gap.nc", "failures.nc", "lens.nc", "erasure.nc", "tuned.nc"}
    assert not list(out.glob(".*"))
    monkeypatch.setattr(locate_module, "locate", real)
    study = run(model, facts, out)
    assert all(study.done(step) for step in STEPS)
    assert {n: (out / n).stat().st_mtime_ns for n in done} == done


@pytest.mark.once
@pytest.mark.slow
def test_a_study_resumed_with_other_versions_says_so(knowing, tmp_path, monkeypatch):
    model, facts = knowing
    out = tmp_path / "study"
    with monkeypatch.context() as patch:
        (lens,) = (step for step in ALL_STEPS if step.name == "lens")
        patch.setattr(type(lens), "run", lambda self, run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, facts, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Study.open(out).made_with()) == 1
    monkeypatch.setattr("importlib.metadata.version", lambda package: "99.0")
    with pytest.warns(UserWarning, match="begun with torch .* goes on with torch 99.0"):
        study = run(model, facts, out)
    then, now = study.summary["made_with"]
    assert study.summary["made_with"][then] == list(STEPS[:2])
    assert now == "torch 99.0, transformer-lens 99.0, transformers 99.0 on cpu"
    assert study.summary["made_with"][now] == list(STEPS[2:])
    assert any(name == "made with different versions" for name, _ in study.headlines())
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Resumed with others, so the steps differ" in text
    with warnings.catch_warnings():  # nothing is left to do
        warnings.simplefilter("error")
        run(model, facts, out)


def test_a_finished_study_is_reopened(finished, monkeypatch):
    model, facts, first = finished
    for step in ALL_STEPS:
        stopped = lambda self, run: pytest.fail("a step ran again")  # noqa: E731
        monkeypatch.setattr(type(step), "run", stopped)
    assert run(model, facts, first.folder).summary == first.summary


@pytest.mark.once
@pytest.mark.slow
def test_other_settings_are_not_overwritten(tiny, tmp_path):
    facts = tiny_facts(tiny, 4)
    out = tmp_path / "study"
    run(tiny, facts, out)
    with pytest.raises(FileExistsError, match=r"other settings \(seed differ\)"):
        run(tiny, facts, out, seed=1)
    with pytest.raises(FileExistsError, match="facts_digest"):
        run(tiny, facts[:3], out)
    assert run(tiny, facts, out, seed=1, force=True).settings["seed"] == 1


def test_a_study_of_a_single_fact(tiny, tmp_path):
    study = run(tiny, tiny_facts(tiny, 1), tmp_path / "study")
    assert len(study.result("gap").facts) == 1 and "there is one text" in study.skipped("tuned")
    assert write_report(study).is_file()


def test_facts_may_keep_what_json_does_not_know(tiny):
    facts = tiny_facts(tiny, 2)
    asked = [replace(fact, meta={"year": np.int64(1990)}) for fact in facts]
    settings, same, plain = (
        begin(tiny, given, StudySettings(), None, None, None)[2] for given in (asked, asked, facts)
    )
    assert settings == same and settings["facts_digest"] != plain["facts_digest"]


@pytest.mark.once
@pytest.mark.slow
def test_other_files_are_not_overwritten(tiny, tmp_path):
    facts = tiny_facts(tiny, 4)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        run(tiny, facts, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    run(tiny, facts, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        run(tiny, facts, tmp_path / "thesis.txt")


def test_a_model_that_knows_nothing(tiny, tmp_path):
    facts = [replace(f, bridge="w81 w82 w83", answer="w84 w85 w86") for f in tiny_facts(tiny, 5)]
    study = run(tiny, facts, tmp_path / "study")
    assert study.result("gap") is not None
    for step in STEPS[1:]:
        assert "knows both hops of none" in study.skipped(step) or "no two-hop" in study.skipped(
            step
        )
    assert study.summary["gap"]["forms"]["suffix"]["gap"]["value"] is None
    assert any("left out" in text for _, text in study.headlines())


def test_nothing_to_ask(tiny, tmp_path):
    with pytest.raises(ValueError, match="no usable fact"):
        run(tiny, [], tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_two_facts_of_one_id_are_refused_before_anything_is_written(load_tiny, tmp_path):
    model = load_tiny()
    one, other = tiny_facts(model, 2)
    with pytest.raises(ValueError, match="fact ids must be unique; these are not: .'0'"):
        run(model, [one, replace(other, id=one.id)], tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_prompt_longer_than_the_context(tiny, tmp_path):
    facts = tiny_facts(tiny, 2)
    long = replace(facts[1], id="long", prompts={"suffix": facts[1].prompt() + " w5" * 80})
    with pytest.raises(ValueError, match=r"fact 'long': .* exceeds the model's context of 64"):
        run(tiny, [facts[0], long], tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        Study.open(tmp_path)


def test_bundled_facts_and_their_limit():
    everything, source = load_study_facts(None, StudySettings())
    some, _ = load_study_facts(None, StudySettings(limit=100))
    assert source["file"] == "hopland.jsonl"
    assert len(some) <= 100
    assert {f.split for f in some} == {f.split for f in everything}
    assert some == load_study_facts(None, StudySettings(limit=100))[0]
    assert some != load_study_facts(None, StudySettings(limit=100, seed=1))[0]
    for split in ("seen_parts", "first_unseen", "second_unseen"):
        assert sum(f.split == split for f in everything) >= 300


def test_facts_in_a_data_frame():
    some = load_study_facts(None, StudySettings(limit=3))[0]
    names = ("id", "subject", "bridge", "answer", "first_hop", "split")
    prompts = ("prompts", "first_prompts", "second_prompts")
    table = pd.DataFrame(
        {
            **{name: [getattr(f, name) for f in some] for name in names},
            **{f"{name}.suffix": [getattr(f, name)["suffix"] for f in some] for name in prompts},
        }
    )
    chosen, source = load_study_facts(table, StudySettings())
    assert [f.prompt("suffix") for f in chosen] == [f.prompt("suffix") for f in some]
    assert [f.split for f in chosen] == [f.split for f in some]
    assert "3 read / 0 dropped" in source["report"]


def test_facts_bring_their_account_along(tmp_path):
    from mi_hops.facts import load_facts

    some = load_facts("hopland")
    chosen, source = load_study_facts(some, StudySettings())
    assert list(chosen) == list(some)
    report = some.describe()
    assert source == {"file": "hopland.jsonl", "report": report[report.index("hopland.jsonl") :]}
    _, source = load_study_facts(list(some)[:3], StudySettings())
    assert source == {"file": None, "report": "3 facts given"}


def test_layer_spans():
    assert layer_spans([2, 4], 6) == [(1, 2, 3, 4), (2, 3, 4), (3, 4), (4,)]
    assert layer_spans([0], 6) == [(0,)]
    assert layer_spans([], 12) == [tuple(range(s, 9)) for s in (3, 4, 5, 6, 7, 8)]
    assert [s[0] for s in layer_spans([10, 29], 32)] == [9, 13, 17, 21, 25, 29]


def test_choose_edit():
    rows = [
        {"layers": [0, 1], "correction": 0.9, "kept": 0.9},
        {"layers": [0], "correction": 0.8, "kept": 0.99},
        {"layers": [0, 1, 2], "correction": 0.8, "kept": 0.99},
        {"layers": [5], "correction": 0.1, "kept": None},
    ]
    assert choose_edit(rows) == rows[1]


def test_optional_steps_are_left_out_unless_asked_for(finished):
    model, facts, study = finished
    assert {"knockout", "back_patching"} <= set(study.settings["steps"])
    plain = [
        s.name for s in ALL_STEPS if s.wanted(load_study_facts(facts, SMALL)[0], StudySettings())
    ]
    assert not {"knockout", "back_patching"} & set(plain)
    with pytest.raises(ValueError, match="also is .*tracing.*; expected optional steps"):
        StudySettings(also=("tracing",))


def test_optional_steps_are_those_of_patching(finished):
    from mi_hops import Pairs
    from mi_hops.patching import back_patch, knockout

    model, facts, study = finished
    by_id = {f.id: f for f in facts}
    blocked = study.result("knockout")
    names = blocked["example"].values.tolist()
    asked = Pairs([by_id[i].prompt() for i in names], answer=[by_id[i].answer for i in names])
    keys = {"first hop": [by_id[i].first_hop for i in names]}
    again = knockout(model, asked, keys, window=blocked.provenance["window"])
    there = blocked["change"].sel(position="first hop").values
    assert there == pytest.approx(again["change"].values[..., 0], abs=1e-5)
    entry = study.summary["knockout"]["first hop"]
    assert entry["change"]["value"] == pytest.approx(there.mean(0).min(), abs=1e-5)

    fed = study.result("back_patching")
    names = fed["example"].values.tolist()
    asked = Pairs([by_id[i].prompt() for i in names], answer=[by_id[i].answer for i in names])
    again = back_patch(model, asked, metric="rank")["score"].values
    assert fed["score"].sel(position="last").values == pytest.approx(again, nan_ok=True)
    told = study.summary["back_patching"]
    assert told["source"] > told["target"] and 0 <= told["corrected"]["n"] <= len(names)
    text = (study.folder / "summary.json").read_text()
    assert "back_patching" in text


def test_fed_back_corrects_where_the_first_token_comes_first():
    from mi_hops import Hopland, Pairs, load_model
    from mi_hops.patching import back_patch
    from mi_hops.study.context import choosing
    from mi_hops.study.steps import BackPatching

    facts = Hopland().two_hop_facts("first_unseen")[:12]
    asked = Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
    model, places = load_model("hops-gpt2"), {"last": -1}
    fed = back_patch(model, asked, places, metric="rank")
    told = BackPatching().summarise(fed, None)
    right = back_patch(model, asked, places, metric="first_correct")
    assert told["intact"]["value"] == pytest.approx(right["intact"].values.mean())
    score = right["score"].transpose("example", ...)
    assert told["anywhere"]["value"] == score.max(["position", "source", "target"]).mean()
    cell = {name: told[name] for name in ("position", "source", "target")}
    other = ~choosing(fed["example"].values)
    assert told["corrected"]["value"] == pytest.approx(score.sel(cell).values[other].mean())
    assert 0 < told["intact"]["value"] < 1 and told["corrected"]["value"] > 0
