"""Scoring repairs: a repair of known effect, rows against one by one, averages against hand-made."""

from __future__ import annotations

import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import fingerprint
from mi_hops.reasoning.aggregate import Scores, aggregate, reduce_scores
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.queries import Query
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep.generate import end_ids, generate
from mi_hops.sweep.metrics import METRICS, Target, target_of
from mi_hops.text.tokens import encode
from tests.repairs import AddVector, NoRepair


@dataclass(frozen=True)
class Say:
    """Makes a model say the case's answer and stop, wherever the case's first hop is asked about."""

    name: str = "say"
    skip: tuple[str, ...] = ()

    def fit(self, model, facts):
        return [None if f.id in self.skip else self._state(model, f) for f in facts]

    @staticmethod
    def _state(model, fact):
        prompt = encode(model, fact.prompt())
        ids = (*target_of(model, prompt, fact.answer).answer, model.tokenizer.eos_token_id)
        inverse = torch.linalg.pinv(model.W_U.detach())  # [vocab, d_model]
        return fact.first_hop, [1e4 * inverse[i] for i in ids]

    def hooks(self, model, states, rows):
        def fn(x):
            out = x.clone()
            for r, (state, prompt) in enumerate(zip(states, rows.prompts, strict=True)):
                if state is None or state[0] not in prompt.text:
                    continue
                for step, vector in enumerate(state[1]):
                    at = prompt.last + step - rows.offset
                    if 0 <= at < rows.width:
                        out[r, at] = vector.to(x)
            return out

        return [("unembed.hook_in", fn)]


class InPlace:
    """Puts each case's edit into the weights."""

    name = "in place"

    def __init__(self, edits):
        self.edits = edits

    def applied(self, model, fact):
        return self.edits[fact.id].applied(model)


def _fact(i):
    """w10 -w20-> w30 -w40-> 'w50 w51', and its neighbours for other i."""
    first, bridge = f"w1{i} w20", f"w3{i}"
    return TwoHopFact(
        id=f"f{i}",
        subject=f"w1{i}",
        relation1="w20",
        bridge=bridge,
        relation2="w40",
        answer=f"w5{i} w6{i}",
        first_hop=first,
        prompts={"suffix": f"w70 w40 {first}", "prefix": f"{first} w41"},
        first_prompts={"suffix": first},
        second_prompts={"suffix": f"w70 w40 {bridge}"},
        answer_aliases=(f"w7{i}",),
    )


def _other(i, relation2="w44"):
    fact = _fact(i)
    first = fact.first_hop
    return replace(
        fact,
        id=f"{fact.id}-{relation2}",
        relation2=relation2,
        answer=f"w8{i % 5}",
        prompts={"suffix": f"w70 {relation2} w45 {first}"},
        answer_aliases=(),
        second_prompts={"suffix": f"w70 {relation2} w3{i}"},
    )


CASES = [_fact(i) for i in range(3)]
POOL = [_other(i) for i in range(6)] + [_fact(i) for i in range(3, 8)]


@pytest.fixture(scope="module")
def sets():
    ids = {f.id for f in POOL}
    known = Known(answered=ids, second_hop=ids, said={"f0": "w33", "f1": "w33 w34"})
    return build_sets(None, CASES, known=known, pool=POOL, form="suffix", per_case=3, seed=1)


def test_a_repair_of_known_effect(tiny, sets):
    found = evaluate(tiny, [Say()], sets, CASES)
    frame = found.frame
    for name in ("correction", "paraphrase", "other_order"):
        part = frame[frame["set"] == name]
        assert len(part) >= 3
        for score in ("first_correct", "exact_match", "generation_correct"):
            assert (part[f"{score}_after"] == 1).all(), (name, score)
        assert (part["rank_after"] == 1).all()
        assert part["said_after"].tolist() == part["answer"].tolist()
        assert np.allclose(part["first_prob_after"], 1, atol=1e-6)
        # Two answer tokens, of which the first has all the probability at the prompt's end.
        assert np.allclose(part["mean_token_prob_after"], 0.5, atol=1e-6)
    spread = frame[frame["set"] == "generalisation"]
    assert len(spread) == 3
    assert (spread["first_correct_after"] == 0).all()
    assert (spread["target_over_wrong_after"] == 0).all()
    kept = frame[frame["set"].str.startswith("specificity") | (frame["set"] == "neutral")]
    assert len(kept) >= 9
    for score in ("first_prob", "answer_logprob", "mean_token_prob", "rank"):
        assert np.allclose(kept[f"{score}_after"], kept[f"{score}_before"], rtol=1e-4), score
    assert (kept["said_after"] == kept["said_before"]).all()
    assert np.allclose(kept["kl"], 0, atol=1e-6)
    assert frame.loc[~frame["set"].isin(kept["set"]), "kl"].isna().all()


#: Each family and each class once in the fast loop.
MODELS = [
    ("gpt2", "hooked"),
    ("llama", "bridge"),
    pytest.param(("gpt2", "bridge"), marks=pytest.mark.slow),
    pytest.param(("llama", "hooked"), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", MODELS, indirect=True, ids="-".join)
def test_rows_are_those_of_one_by_one_and_of_any_batch_size(tiny, sets):
    repair = AddVector(later=True)
    states = dict(zip((f.id for f in CASES), repair.fit(tiny, CASES), strict=True))
    found = evaluate(tiny, [repair], sets, CASES).frame
    small = evaluate(tiny, [repair], sets, CASES, batch_size=2).frame
    numbers = [c for c in found.columns if found[c].dtype.kind in "bif"]
    assert len(numbers) > 15
    for name in numbers:
        assert np.allclose(found[name], small[name], rtol=1e-3, atol=1e-5, equal_nan=True), name
    assert (found["said_after"] == small["said_after"]).all()
    assert not np.allclose(found["first_prob_before"], found["first_prob_after"])
    ends = end_ids(tiny)
    for _, row in found.groupby("set").sample(2, random_state=0).iterrows():
        prompt = encode(tiny, row["prompt"])
        target = target_of(tiny, prompt, row["answer"], row["wrong"])
        for when, state in (("before", None), ("after", states[row["case"]])):
            logits = _logits(tiny, prompt, target.answer, repair, state)
            n = len(target.answer)
            scored = logits[None, prompt.last :][:, : n + 1]
            for name in ("first_prob", "answer_logprob", "mean_token_prob", "rank"):
                expected = METRICS[name].score(scored[:, :n], target).item()
                assert math.isclose(row[f"{name}_{when}"], expected, rel_tol=1e-3, abs_tol=1e-5)
            best = scored[0].argmax(-1).tolist()
            whole = best[:n] == list(target.answer) and best[n] in ends
            assert row[f"exact_match_{when}"] == whole
            assert row[f"first_correct_{when}"] == (best[0] == target.answer[0])
            if row["wrong"] is None:
                assert math.isnan(row[f"wrong_mean_token_prob_{when}"])
                assert math.isnan(row[f"target_over_wrong_{when}"])
            else:
                wrong = METRICS["mean_token_prob"].score(scored, Target(target.wrong)).item()
                assert math.isclose(row[f"wrong_mean_token_prob_{when}"], wrong, rel_tol=1e-3)
            given = {} if state is None else {"repair": repair, "states": [state]}
            (said,) = generate(tiny, [prompt], max_new_tokens=8, **given)
            assert row[f"said_{when}"] == said.text
            if row["set"] == "neutral":
                text = logits[: prompt.last + n].log_softmax(-1)
                ids = torch.tensor([*prompt.ids[1:], *target.answer])
                loss = -text.gather(1, ids[:, None]).mean().item()
                assert math.isclose(row[f"statement_loss_{when}"], loss, rel_tol=1e-3)
        if not math.isnan(row["kl"]):
            p, q = (
                _logits(tiny, prompt, (), repair, s)[-1].log_softmax(-1)
                for s in (None, states[row["case"]])
            )
            assert math.isclose(row["kl"], (p.exp() * (p - q)).sum().item(), rel_tol=1e-3)
            assert row["kl"] > 1e-3


def _logits(model, prompt, extra, repair, state):
    """All logits of one row alone, through the model's own hooks."""
    from mi_hops.model import forward
    from mi_hops.sweep.repair import Rows

    tokens = torch.tensor([[*prompt.ids, *extra]])
    hooks = repair.hooks(model, [state], Rows((prompt,), tokens.shape[1]))
    with torch.no_grad():
        return forward(model, tokens, hooks=hooks)[0]


@pytest.fixture(scope="module")
def scored(load_tiny, sets):
    model = load_tiny("gpt2", "bridge")
    repairs = [Say(skip=("f2",)), NoRepair()]
    return evaluate(model, repairs, sets, CASES, metrics=["first_logprob"], seed=5)


def test_a_case_without_state_is_left_as_it_is_and_said(scored):
    part = scored.frame.query("repair == 'say' and case == 'f2'")
    assert not part["repaired"].any()
    assert np.allclose(part["mean_token_prob_before"], part["mean_token_prob_after"], rtol=1e-4)
    assert "say: no state for 1 cases" in scored.describe()


def test_the_table_averages_over_cases_and_counts_them(scored, sets):
    table = scored.table(n_resamples=200)
    assert table.index.is_unique
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an index that is not in order
        assert len(table.loc["say", "correction"]) == len(table.loc[("say", "correction")])
    right = table.loc[("say", "correction", "first_correct_after")]
    assert right["value"] == pytest.approx(2 / 3)
    assert (right["n_queries"], right["n_cases"], right["unit"]) == (3, 3, "share")
    assert right["lower"] < right["value"] < right["upper"]
    assert table.loc[("none", "correction", "mean_relative_change"), "value"] == pytest.approx(0)
    # Case f2 has no wrong answer on record, so two queries can be compared.
    ahead = table.loc[("say", "correction", "target_over_wrong_after")]
    assert (ahead["value"], ahead["n_queries"]) == (1.0, 2)
    counts = sets.counts()
    for name, n in counts.items():
        used, skipped = (
            table.loc[("say", name, f"cases_{w}"), "value"] for w in ("used", "skipped")
        )
        assert (used, skipped) == (n.cases, n.skipped)
    loss = scored.cases().loc[("say", "neutral"), "statement_loss_before"].mean()
    perplexity = table.loc[("say", "neutral", "perplexity_before"), "value"]
    assert perplexity == pytest.approx(math.exp(loss))
    assert ("say", "correction", "kl") not in table.index
    frame = scored.frame.query("repair == 'say' and set == 'correction'")
    change = (frame["first_logprob_after"] - frame["first_logprob_before"]).mean()
    assert table.loc[("say", "correction", "first_logprob_change"), "value"] == pytest.approx(
        change
    )


def test_retained_and_ratio_from_known_rows(scored):
    frame = scored.frame.query("repair == 'say' and set == 'specificity'").head(4).copy()
    frame["case"] = ["a", "a", "b", "c"]
    frame["first_correct_before"] = [1.0, 1.0, 0.0, 1.0]
    frame["first_correct_after"] = [1.0, 0.0, 1.0, 1.0]
    table = replace(scored, frame=frame, case_ids=("a", "b", "c", "d")).table()
    of = table.loc[("say", "specificity")]["value"]
    assert of["first_correct_before"] == pytest.approx(2 / 3)
    assert of["first_correct_after"] == pytest.approx(2.5 / 3)
    assert of["first_correct_retained"] == pytest.approx((0.5 + 1) / 2)  # b had nothing to keep
    assert of["first_correct_ratio"] == pytest.approx(2.5 / 2)
    assert (of["cases_used"], of["cases_skipped"]) == (3, 1)


def test_save_and_load_give_everything_back(scored, tmp_path):
    path = scored.save(tmp_path / "scores.nc")
    again = Evaluation.load(path)
    pd.testing.assert_frame_equal(again.frame, scored.frame, check_dtype=False)
    assert [w is None for w in again.frame["wrong"]] == [w is None for w in scored.frame["wrong"]]
    assert (again.case_ids, again.skipped) == (scored.case_ids, scored.skipped)
    assert again.provenance == scored.provenance
    assert again.describe() == scored.describe()
    pd.testing.assert_frame_equal(again.table(n_resamples=50), scored.table(n_resamples=50))
    with pytest.raises(FileExistsError, match="exists"):
        scored.save(path)


def test_the_summary_has_one_row_per_repair_with_intervals(scored):
    summary = scored.summary(n_resamples=200)
    assert summary.index.tolist() == ["unrepaired", "say", "none"]
    table = scored.table(n_resamples=200)
    for name in ("correction", "specificity"):
        row = table.loc[("say", name, "first_correct_after")]
        ends = [summary.loc["say", f"{name}{end}"] for end in ("", "_lower", "_upper", "_n")]
        assert ends == [row[k] for k in ("value", "lower", "upper", "n_cases")]
    before = table.loc[("say", "correction", "exact_match_before"), "value"]
    exact = scored.summary("exact_match", sets=["correction"], n_resamples=200)
    assert exact.loc["unrepaired", "correction"] == before
    assert list(exact) == ["correction", "correction_lower", "correction_upper", "correction_n"]
    assert (scored["case"] == scored.frame["case"]).all()
    with pytest.raises(KeyError, match="no 'cases' in the evaluation"):
        scored["cases"]


def test_one_repair_and_an_edit_are_repairs(load_tiny, sets):
    from mi_hops.editing import EditRepair, creme

    model = load_tiny()
    edit = creme(model, CASES[0], layers=[0, 1], keep=None)
    alone = evaluate(model, edit, sets, CASES, generate=False)
    named = evaluate(model, [EditRepair(edit, name="edit")], sets, CASES, generate=False)
    pd.testing.assert_frame_equal(alone.frame, named.frame)
    other = creme(model, CASES[1], layers=[1], keep=None)
    two = evaluate(model, [edit, AddVector(), other], sets, CASES, generate=False)
    assert two.summary(n_resamples=20).index.tolist()[1:] == ["edit 1", AddVector().name, "edit 2"]
    with pytest.raises(ValueError, match="'creme' is not a repair; expected an Edit"):
        evaluate(model, "creme", sets, CASES)


@pytest.mark.parametrize("tiny", MODELS, indirect=True, ids="-".join)
def test_edits_in_the_weights_score_as_on_rows(tiny, sets):
    from mi_hops.editing import EditRepair, creme_many

    made = creme_many(tiny, CASES, layers=[0, 1], form="suffix", keep=None)
    edits = {fact.id: edit for fact, edit in zip(CASES, made, strict=True)}
    repairs = [InPlace(edits), EditRepair(edits, name="on rows")]
    before = fingerprint(tiny)
    found = evaluate(tiny, repairs, sets, CASES, metrics=["first_logprob"], max_new_tokens=4)
    assert fingerprint(tiny) == before
    ours, rows = (found.frame[found.frame["repair"] == r.name] for r in repairs)
    assert ours["kl"].max() > 1e-4 and not np.allclose(
        ours["first_prob_after"], ours["first_prob_before"], rtol=0.01
    )
    pd.testing.assert_frame_equal(
        ours.drop(columns="repair").reset_index(drop=True),
        rows.drop(columns="repair").reset_index(drop=True),
        rtol=1e-3,
        atol=1e-5,
    )


def test_a_repair_that_does_not_restore_the_model_is_refused(load_tiny, sets):
    from mi_hops.editing import creme

    class Stays(InPlace):
        @contextmanager
        def applied(self, model, fact):
            creme(model, fact, layers=[1], form="suffix").apply(model)
            yield

    with pytest.raises(ValueError, match="'in place' left the model changed after fact 'f0'"):
        evaluate(load_tiny(fresh=True), Stays({}), sets, CASES, generate=False)


def test_the_unrepaired_model_is_asked_once_for_all_repairs(load_tiny, sets, monkeypatch):
    """The KL of several repairs: each as alone, from one pass of the unrepaired model a batch."""
    module = sys.modules[evaluate.__module__]

    model, repairs = load_tiny(), [AddVector(), Say(), NoRepair()]
    alone = [evaluate(model, r, sets, CASES, generate=False)["kl"] for r in repairs]
    calls = []
    real = module.logits_at
    count = lambda *args, **options: calls.append(bool(options["hooks"])) or real(*args, **options)  # noqa: E731
    monkeypatch.setattr(module, "logits_at", count)
    together = evaluate(model, repairs, sets, CASES, generate=False)
    assert together["kl"].to_numpy() == pytest.approx(np.concatenate(alone), abs=1e-6, nan_ok=True)
    assert calls.count(True) == 2 and calls.count(False) == 2  # NoRepair has no hooks


def test_cells_are_small(scored, sets):
    for shown in (scored, sets):
        assert len(repr(shown)) < 2000
        assert "<table>" in shown._repr_html_() and len(shown._repr_html_()) < 4000


@pytest.mark.slow
def test_the_figure_shows_before_and_after(scored):
    figure = scored.plot("first_correct", sets=["correction", "specificity"], n_resamples=50)
    assert [bar.name for bar in figure.data] == ["unrepaired", "say", "none"]
    assert figure.data[1].y[0] == pytest.approx(2 / 3)
    assert list(figure.data[1].text) == ["correction", "specificity"]
    with pytest.raises(ValueError, match="no score 'nice'.*first_correct"):
        scored.plot("nice")
    with pytest.raises(ValueError, match="no set.*'nice'"):
        scored.plot(sets=["nice"])


def test_without_generation_only_the_texts_are_missing(load_tiny, sets, scored):
    frame = evaluate(load_tiny(), [NoRepair()], sets, CASES, generate=False).frame
    texts = ("said", "generation_correct")
    gone = {f"{name}_{when}" for name in texts for when in ("before", "after")}
    logprob = {"first_logprob_before", "first_logprob_after"}
    assert set(scored.frame.columns) - set(frame.columns) == gone | logprob


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_half_precision_is_scored_in_float32(load_tiny, sets, shape):
    model = load_tiny(shape, "bridge", "bfloat16")
    frame = evaluate(model, [AddVector()], sets, CASES).frame
    whole = evaluate(load_tiny(shape, "bridge"), [AddVector()], sets, CASES).frame
    for when in ("before", "after"):
        close = abs(frame[f"answer_logprob_{when}"] - whole[f"answer_logprob_{when}"])
        assert close.median() < 0.3
    # A softmax in bfloat16 would sum up to a per cent off and hold few distinct values.
    exact = torch.tensor(frame["first_prob_before"].to_numpy())
    assert not torch.equal(exact, exact.bfloat16().double())


def test_a_set_without_any_query_is_still_counted(load_tiny):
    lonely = build_sets(None, CASES, known=Known(), pool=[], form="suffix")
    found = evaluate(load_tiny(), [NoRepair()], lonely, CASES, generate=False)
    table = found.table(n_resamples=20)
    assert table.loc[("none", "specificity", "cases_skipped"), "value"] == 3
    assert table.loc[("none", "specificity", "cases_used"), "value"] == 0
    why = "3 cases skipped (3 no unrelated answered question)"
    line = f"specificity: 0 queries of 0 cases, {why}"
    assert line in found.describe()


def test_aliases_count_in_what_is_said(load_tiny, sets):
    query = next(q for q in sets if q.set == "correction" and q.case == "f0")
    said = replace(query, answer="w77", aliases=("w50 w60",), wrong=None)
    frame = evaluate(load_tiny(), [Say()], [said], CASES).frame
    assert frame["said_after"].tolist() == ["w50 w60"]
    assert frame["generation_correct_after"].tolist() == [1]
    assert frame["exact_match_after"].tolist() == [0]


def test_bad_requests_are_refused(load_tiny, sets):
    model = load_tiny()
    with pytest.raises(ValueError, match="unknown case.*'f2'.*the 2 facts"):
        evaluate(model, [Say()], sets, CASES[:2])
    with pytest.raises(ValueError, match="no queries"):
        evaluate(model, [Say()], [], CASES)
    with pytest.raises(ValueError, match="each with its own name; got .*'say', 'say'"):
        evaluate(model, [Say(), Say()], sets, CASES)
    with pytest.raises(ValueError, match="one or more repairs"):
        evaluate(model, [], sets, CASES)
    with pytest.raises(ValueError, match="fact ids must be unique.*'f0'"):
        evaluate(model, [Say()], sets, [*CASES, CASES[0]])
    query = Query(case="f0", set="correction", query_id="q", prompt="w1 w2", answer="w3")
    with pytest.raises(ValueError, match="query ids must be unique.*'q'"):
        evaluate(model, [Say()], [query, query], CASES)

    class Short(Say):
        def fit(self, model, facts):
            return super().fit(model, facts)[:1]

    with pytest.raises(ValueError, match="'say' gave 1 states for 3 facts"):
        evaluate(model, [Short()], sets, CASES)


# -- aggregate against numbers worked out by hand ---------------------------------------------------

ROWS = pd.DataFrame(
    [
        # case, set, before, after, wrong_before, wrong_after
        ("a", "paraphrase", 0.1, 0.3, 0.2, 0.1),  # r = 2, wrong r = -0.5; behind, then ahead
        ("a", "paraphrase", 0.2, 0.2, 0.1, 0.2),  # r = 0, wrong r = 1; ahead, then a tie
        ("b", "paraphrase", 0.1, 0.8, 0.3, 0.3),  # r = 7, wrong r = 0; behind, then ahead
        ("c", "paraphrase", 0.0, 0.4, np.nan, np.nan),  # r = 0 by definition
        ("a", "correction", 0.5, 0.25, np.nan, np.nan),  # r = -0.5, and nothing else
    ],
    columns=["case", "set", "before", "after", "wrong_before", "wrong_after"],
)


def test_aggregate_follows_the_papers_order_of_averaging():
    table = aggregate(ROWS, n_resamples=500)
    of = table.loc["paraphrase"]
    value = of["value"]
    assert value["mean_relative_change"] == pytest.approx(((2 + 0) / 2 + 7 + 0) / 3)
    assert value["median_relative_change"] == pytest.approx(1)
    assert value["trimmed_mean_relative_change"] == pytest.approx(8 / 3)  # a tenth of 3 is none
    assert value["mean_log_change"] == pytest.approx((math.log(3) / 2 + math.log(8)) / 2)
    assert value["share_improved"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert value["mean_before"] == pytest.approx((0.15 + 0.1 + 0) / 3)
    assert value["mean_after"] == pytest.approx((0.25 + 0.8 + 0.4) / 3)
    assert value["mean_change"] == pytest.approx((0.1 + 0.7 + 0.4) / 3)
    assert value["ratio_of_means_change"] == pytest.approx(1.45 / 0.25 - 1)
    assert value["zero_before"] == 1
    # Over queries, not cases; the query without a wrong answer does not count.
    assert value["target_over_wrong_before"] == pytest.approx(1 / 3)
    assert value["target_over_wrong_after"] == pytest.approx(2 / 3)
    assert value["wrong_mean_relative_change"] == pytest.approx(((-0.5 + 1) / 2 + 0) / 2)
    assert of.loc["mean_relative_change", ["n_queries", "n_cases"]].tolist() == [4, 3]
    assert of.loc["target_over_wrong_after", ["n_queries", "n_cases"]].tolist() == [3, 2]
    assert of.loc["mean_log_change", ["n_queries", "n_cases"]].tolist() == [3, 2]
    assert of.loc["mean_relative_change", ["lower", "upper"]].isna().all()  # no honest one
    lower, upper = of.loc["median_relative_change", ["lower", "upper"]]
    assert 0 <= lower < value["mean_relative_change"] < upper <= 7
    alone = table.loc["correction"]
    assert alone.loc["mean_relative_change", "value"] == -0.5
    assert alone[["lower", "upper"]].isna().all(axis=None)
    assert math.isnan(alone.loc["target_over_wrong_after", "value"])


def test_aggregate_leaves_out_the_tails_and_needs_no_wrong_answers():
    n = 20
    frame = pd.DataFrame({"case": range(n), "set": "correction", "before": 0.01})
    frame["after"] = [0.02] * (n - 1) + [1.0]  # r = 1, and once 99
    value = aggregate(frame, n_resamples=20)["value"].loc["correction"]
    assert value["mean_relative_change"] == pytest.approx((n - 1 + 99) / n)
    assert value["trimmed_mean_relative_change"] == pytest.approx(1)
    assert value["median_relative_change"] == pytest.approx(1)
    assert not any(name.startswith(("wrong", "target")) for name in value.index)


def test_all_or_nothing_has_an_exact_interval_and_not_none_at_all():
    n, upper = 8, 1 - 0.025 ** (1 / 8)
    frame = pd.DataFrame({"case": range(n), "set": "s", "before": 0.1, "after": 0.2})
    of = aggregate(frame.assign(wrong_before=0.2, wrong_after=0.1), n_resamples=20).loc["s"]
    for name in ("share_improved", "target_over_wrong_after"):
        assert of.loc[name, ["lower", "upper"]].tolist() == pytest.approx([1 - upper, 1])
    none = of.loc["target_over_wrong_before"]
    assert none[["lower", "upper"]].tolist() == pytest.approx([0, upper])
    # 19 of 20 queries of a case each: the exact interval, whatever the bootstrap says.
    ahead = pd.DataFrame({"case": range(20), "set": "s", "before": 0.1, "after": 0.2})
    ahead["wrong_before"] = 0.2
    ahead["wrong_after"] = [0.3] + [0.1] * 19
    found = aggregate(ahead, n_resamples=20).loc[("s", "target_over_wrong_after")]
    want = proportion_ci(19, 20)
    assert found[["lower", "upper"]].tolist() == pytest.approx([float(end) for end in want])


@pytest.mark.parametrize(("before", "after"), [(1, 1), (0, 1), (0, 0), (1, 0)])
def test_the_interval_of_a_change_from_one_beginning_is_that_of_the_end(before, after):
    cases, begun, ended = np.arange(8), np.full(8, float(before)), np.full(8, float(after))
    scores = Scores(
        means={
            "first_correct_before": (begun, "share"),
            "first_correct_after": (ended, "share"),
            "first_correct_change": (ended - begun, "share"),
        }
    )
    found = reduce_scores(cases, scores, level=0.95, n_resamples=50, seed=0)
    end = found.loc["first_correct_after", ["lower", "upper"]].to_numpy(float)
    change = found.loc["first_correct_change", ["lower", "upper"]].to_numpy(float)
    assert change == pytest.approx(end - before)
    assert change[1] - change[0] > 0.3
    mixed = {"first_correct_before": (np.arange(8) % 2.0, "share")}
    mixed["first_correct_after"] = mixed["first_correct_before"]
    mixed["first_correct_change"] = (np.zeros(8), "share")
    found = reduce_scores(cases, Scores(means=mixed), level=0.95, n_resamples=50, seed=0)
    assert found.loc["first_correct_change", ["lower", "upper"]].isna().all()


def test_aggregate_keeps_repairs_apart_and_is_seeded():
    two = pd.concat([ROWS.assign(repair="x"), ROWS.assign(repair="y", after=ROWS["before"])])
    table = aggregate(two, n_resamples=100, seed=3)
    assert table.index.names == ["repair", "set", "statistic"]
    assert table.loc[("y", "paraphrase", "mean_relative_change"), "value"] == 0
    pd.testing.assert_frame_equal(table.loc["x"], aggregate(ROWS, n_resamples=100, seed=3))
    other = aggregate(ROWS, n_resamples=100, seed=4)
    assert not other["lower"].equals(table.loc["x"]["lower"])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (ROWS.drop(columns="before"), "missing: ..before.."),
        (ROWS.drop(columns="wrong_after"), "both or neither"),
        (ROWS.head(0), "no rows"),
        (ROWS.assign(after=[0.1, 0.1, -0.1, 0.1, 0.1]), "after is -0.1 in row 2 .case 'b'"),
        (ROWS.assign(before=[0.1, np.nan, 0.1, 0.1, 0.1]), "before is nan in row 1"),
    ],
)
def test_aggregate_refuses_bad_tables(frame, message):
    with pytest.raises(ValueError, match=message):
        aggregate(frame)


def test_the_difference_of_two_repairs_is_taken_case_by_case(scored):
    found = scored.difference("say", "none", "mean_token_prob", n_resamples=200)
    cases = scored.cases()["mean_token_prob_after"]
    for name, row in found.iterrows():
        mine, theirs = (cases.loc[(repair, name)] for repair in ("say", "none"))
        assert row["value"] == pytest.approx((mine - theirs).mean()) and row["n"] == len(mine)
        assert row["lower"] <= row["value"] <= row["upper"] or math.isnan(row["lower"])
    swapped = scored.difference("none", "say", "mean_token_prob", n_resamples=200)
    assert (found["value"] + swapped["value"]).abs().max() < 1e-12
    itself = scored.difference("say", "say", sets=["correction"])
    assert itself.loc["correction", "value"] == 0 and math.isnan(itself.loc["correction", "lower"])
    for given, message in (
        (("say", "nobody"), "no repair .'nobody'."),
        (("say", "none", "luck"), "no score 'luck'"),
    ):
        with pytest.raises(ValueError, match=message):
            scored.difference(*given)
    with pytest.raises(ValueError, match="no set.s. .'elsewhere'."):
        scored.difference("say", "none", sets=["elsewhere"])
