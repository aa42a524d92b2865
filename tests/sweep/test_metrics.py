"""Metrics against hand loops, and batched scoring against one unpadded run at a time."""

from __future__ import annotations

import math

import pytest
import torch

from mi_hops.model import forward
from mi_hops.sweep.metrics import (
    KL,
    METRICS,
    AnswerLogprob,
    Greedy,
    Plan,
    Target,
    get_metric,
    get_metrics,
    target_of,
)
from mi_hops.sweep.normalising import Normalised, normalised
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import TokenError, encode
from tests.repairs import AddVector

TEXTS = ("w1 w2 w3", "w9 w8", "w5 w6 w7 w8 w9 w10", "w1 w2 w3", "w40")
ANSWERS = ("w20 w21 w22", "w30", "w31 w32", "w20 w50", "w7 w7 w7 w7")


def logits_of(*rows, dtype=torch.float64):
    """[row, 1, vocab]."""
    return torch.tensor(rows, dtype=dtype)[:, None]


@pytest.fixture
def asked(tiny):
    prompts = [encode(tiny, t) for t in TEXTS]
    return prompts, [target_of(tiny, p, a, "w60") for p, a in zip(prompts, ANSWERS, strict=True)]


def by_hand(model, prompt, target, hooks=()):
    """Log-probabilities [answer token + 1, vocab] along the answer, one unpadded run a step."""
    steps = []
    for n in range(len(target.answer) + 1):
        tokens = torch.tensor([[*prompt.ids, *target.answer[:n]]])
        steps.append(forward(model, tokens, hooks=hooks)[0, -1].double().log_softmax(-1))
    return torch.stack(steps)


# -- formulas on logits chosen by hand --


def test_first_token_metrics_on_known_probabilities():
    logits = logits_of([math.log(p) for p in (0.1, 0.2, 0.7)], [0.0, 0.0, 0.0])
    target = Target((1, 2), (0,))
    want = {
        "first_prob": [0.2, 1 / 3],
        "first_logprob": [math.log(0.2), -math.log(3)],
        "logit_diff": [math.log(2), 0.0],
        "first_correct": [0.0, 0.0],  # of equals the first token wins
        "rank": [2.0, 1.0],  # ties count in favour of the answer
        "mean_token_prob": [(0.2 + 0.7) / 2, 1 / 3],
    }
    for name, values in want.items():
        assert METRICS[name].plan(target) == Plan((), (0,))
        found = METRICS[name].score(logits, target)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(values), name


def test_kl_is_of_the_baseline_from_the_row():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64)
    found = KL(p.log() + 3).score(logits_of(q.log().tolist(), p.log().tolist()), Target((0,)))
    assert found.tolist() == pytest.approx([(p * (p / q).log()).sum().item(), 0.0], abs=1e-12)
    with pytest.raises(ValueError, match=r"one finite vector"):
        KL(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 logits, the rows have 4"):
        KL(p).score(torch.zeros(1, 1, 4), Target((0,)))


def test_greedy_looks_at_every_token_and_at_the_end_only_if_asked():
    best = lambda *ids: torch.nn.functional.one_hot(torch.tensor(ids), 6).float()[None]  # noqa: E731
    target = Target((3, 4))
    assert Greedy().plan(target) == Plan((3,), (0, 1))
    assert Greedy(ends=(5,)).plan(target) == Plan((3, 4), (0, 1, 2))
    assert Greedy().score(best(3, 4), target).tolist() == [1.0]
    assert Greedy().score(best(3, 2), target).tolist() == [0.0]
    assert Greedy().score(best(2, 4), target).tolist() == [0.0]
    assert Greedy(ends=(1, 5)).score(best(3, 4, 5), target).tolist() == [1.0]
    assert Greedy(ends=(1, 5)).score(best(3, 4, 2), target).tolist() == [0.0]


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = Target((3, 4), (5,))
    for metric in METRICS.values():
        n = len(metric.plan(target).scored)
        found = metric.score(logits[:, :n], target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, metric.score(logits[:, :n].double(), target).float())


def test_nan_logits_are_refused_by_every_metric():
    for metric in (*METRICS.values(), KL(torch.zeros(9)), Greedy(ends=(1,))):
        n = len(metric.plan(Target((3, 4), (5,))).scored)
        logits = torch.zeros(1, n, 9)
        logits[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN"):
            metric.score(logits, Target((3, 4), (5,)))


def test_targets_and_metrics_that_make_no_sense_are_refused(load_tiny):
    with pytest.raises(ValueError, match="at least one answer token"):
        Target(())
    with pytest.raises(ValueError, match="the target has none; give `wrong`"):
        METRICS["logit_diff"].score(torch.zeros(1, 1, 9), Target((1,)))
    with pytest.raises(ValueError, match="start with token 1"):
        METRICS["logit_diff"].score(torch.zeros(1, 1, 9), Target((1, 2), (1, 3)))
    model = load_tiny()
    with pytest.raises(TokenError, match="empty answer"):
        target_of(model, encode(model, "w1"), " ")
    with pytest.raises(ValueError, match="unknown metric 'prob'.*first_prob"):
        get_metric("prob")
    with pytest.raises(ValueError, match=r"KL\(baseline_logits\)"):
        get_metric("kl")
    for wrong in (3, Greedy):
        with pytest.raises(ValueError, match="is not a metric"):
            get_metric(wrong)
    with pytest.raises(ValueError, match="each under its own name"):
        get_metrics(["greedy", Greedy(ends=(2,))])
    with pytest.raises(ValueError, match="at least one metric"):
        get_metrics([])


def test_own_function_gets_the_last_position_and_is_checked():
    def top(logits):
        return logits.amax(-1)

    metric = get_metric(top)
    assert (metric.name, metric.plan(Target((1, 2)))) == ("top", Plan((), (0,)))
    assert metric.score(torch.arange(12.0).view(2, 1, 6), Target((1,))).tolist() == [5.0, 11.0]
    assert get_metric(lambda x: x[:, 0]).name == "custom"
    for wrong, got in ((lambda x: x, r"\(2, 6\)"), (lambda x: 1.0, "float")):
        with pytest.raises(ValueError, match=rf"shape \(2,\).*returned {got}"):
            get_metric(wrong).score(torch.zeros(2, 1, 6), Target((1,)))
    narrow = torch.tensor([[[1.0, 1.001]]]).bfloat16()
    seen = []
    get_metric(lambda x: seen.append(x.dtype) or x[:, 0]).score(narrow, Target((1,)))
    get_metric(lambda x: seen.append(x.dtype) or x[:, 0]).score(narrow.double(), Target((1,)))
    assert seen == [torch.float32, torch.float64]
    with pytest.raises(ValueError, match=r"not finite in 1 of 2 rows \(first: \[1\]\)"):
        get_metric(lambda x: x[:, 0].log()).score(
            torch.tensor([[[1.0, 2.0]], [[0.0, 2.0]]]), Target((1,))
        )


def test_normalised_is_0_at_corrupted_and_1_at_clean():
    clean, corrupted = torch.tensor([4.0, 1.0]), torch.tensor([2.0, 3.0])
    assert normalised(corrupted, clean, corrupted).tolist() == [0.0, 0.0]
    assert normalised(clean, clean, corrupted).tolist() == [1.0, 1.0]
    assert normalised(torch.tensor([3.0, 4.0]), clean, corrupted).tolist() == [0.5, -0.5]
    # clean and corrupted scores an example, patched ones a layer and example
    grid = torch.tensor([[2.0, 3.0], [4.0, 2.0]])
    assert normalised(grid, clean, corrupted).tolist() == [[0.0, 0.0], [1.0, 0.5]]
    with pytest.raises(ValueError, match="equal in 1 of 2 cases"):
        normalised(grid, torch.tensor([4.0, 3.0]), corrupted)
    found = normalised(grid, torch.tensor([4.0, 3.0]), corrupted, undefined="nan")
    assert found.isnan().tolist() == [[False, True]] * 2
    nearly = torch.tensor([4.0, 3.000005])  # rounding, no difference
    assert normalised(grid, nearly, corrupted, undefined="nan")[:, 1].isnan().all()
    wide = [x.double() for x in (grid, nearly, corrupted)]
    assert not normalised(*wide, undefined="nan").isnan().any()
    with pytest.raises(ValueError, match="expected 'raise' or 'nan'"):
        normalised(grid, 1.0, 0.0, undefined="zero")


def test_normalised_metric_is_the_metric_rescaled():
    logits, target = logits_of([1.0, 5.0, 2.0]), Target((1,), (2,))
    metric = Normalised(METRICS["logit_diff"], clean=4.0, corrupted=2.0)
    assert metric.name == "normalised_logit_diff"
    assert metric.score(logits, target).tolist() == [0.5]
    for clean, corrupted in ((1.0, 1.0), (float("nan"), 0.0), (float("inf"), 0.0)):
        with pytest.raises(ValueError, match="two different finite scores"):
            Normalised(METRICS["logit_diff"], clean, corrupted)


# -- many prompts --


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_scores_equal_hand_loops_over_unpadded_runs(tiny, asked, batch_size):
    found = score_prompts(tiny, *asked, list(METRICS), batch_size=batch_size)
    for r, (prompt, target) in enumerate(zip(*asked, strict=True)):
        steps = by_hand(tiny, prompt, target)
        first, n = steps[0], len(target.answer)
        right = [bool(steps[i].argmax() == target.answer[i]) for i in range(n)]
        want = {
            "first_prob": first[target.answer[0]].exp(),
            "first_logprob": first[target.answer[0]],
            "answer_logprob": sum(steps[i][target.answer[i]] for i in range(n)),
            "logit_diff": first[target.answer[0]] - first[target.wrong[0]],
            "rank": first.argsort(descending=True).tolist().index(target.answer[0]) + 1.0,
            "mean_token_prob": sum(first[t].exp() for t in target.answer) / n,
            "first_correct": float(right[0]),
            "greedy": float(all(right)),
        }
        assert set(want) == set(METRICS)
        for name, value in want.items():
            assert found[name][r].item() == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_greedy_is_1_for_what_the_model_says_and_0_for_anything_else(tiny):
    prompts = [encode(tiny, t) for t in TEXTS]
    said = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(3):
            ids.append(int(forward(tiny, torch.tensor([ids]))[0, -1].argmax()))
        said.append(ids[-3:])
    right = [Target(tuple(s)) for s in said]
    assert score_prompts(tiny, prompts, right, "greedy")["greedy"].tolist() == [1.0] * 5
    for i in range(3):
        wrong = [Target((*s[:i], (s[i] + 1) % 90, *s[i + 1 :])) for s in said]
        assert score_prompts(tiny, prompts, wrong, "greedy")["greedy"].tolist() == [0.0] * 5
    for prompt, s in zip(prompts, said, strict=True):  # the end is the third token
        ends = [Greedy(ends=(s[2], 5)), Greedy(ends=((s[2] + 1) % 90,))]
        scores = [
            score_prompts(tiny, [prompt], [Target(tuple(s[:2]))], m)["greedy"].item() for m in ends
        ]
        assert scores == [1.0, 0.0]


@pytest.mark.parametrize("later", [False, True])
def test_each_row_is_under_its_own_state(tiny, asked, later):
    prompts, targets = asked
    repair = AddVector(later=later)
    states = repair.fit(tiny, prompts)
    states[1] = None
    found = score_prompts(
        tiny,
        *asked,
        ["answer_logprob", "first_logprob"],
        repair=repair,
        states=states,
        batch_size=3,
    )
    plain = score_prompts(tiny, *asked, "answer_logprob")["answer_logprob"]
    for r, (prompt, target, state) in enumerate(zip(prompts, targets, states, strict=True)):
        single = score_prompts(
            tiny, [prompt], [target], "answer_logprob", repair=repair, states=[state]
        )["answer_logprob"].item()
        assert found["answer_logprob"][r].item() == pytest.approx(single, abs=2e-4)
        changed = abs(single - plain[r].item()) > 1e-2
        assert changed == (state is not None)
    assert found["answer_logprob"][1].item() == pytest.approx(found["first_logprob"][1].item())


def test_hooks_act_on_all_rows_and_leave_nothing_behind(tiny, asked):
    hooks = [("blocks.0.hook_mlp_out", torch.zeros_like)]
    before = score_prompts(tiny, *asked, "answer_logprob")["answer_logprob"]
    found = score_prompts(tiny, *asked, "answer_logprob", hooks=hooks)["answer_logprob"]
    for r, (prompt, target) in enumerate(zip(*asked, strict=True)):
        steps = by_hand(tiny, prompt, target, hooks)
        want = sum(steps[i][t].item() for i, t in enumerate(target.answer))
        assert found[r].item() == pytest.approx(want, abs=2e-4)
    assert not torch.allclose(found, before)
    after = score_prompts(tiny, *asked, "answer_logprob")["answer_logprob"]
    assert torch.equal(before, after)


def test_runs_are_shared_between_metrics_and_rows(load_tiny):
    model = load_tiny("llama")
    prompt = encode(model, "w1 w2")
    targets = [target_of(model, prompt, a) for a in ("w5 w6 w7", "w5 w6 w8", "w9", "w5 w9")]
    sizes = []

    def count(x):
        sizes.append(x.shape[0])

    score_prompts(
        model,
        [prompt] * 4,
        targets,
        ["first_prob", "rank", "answer_logprob", "greedy"],
        hooks=[("blocks.0.hook_resid_pre", count)],
    )
    # prompt + "w5 w6" serves the prompt alone, + "w5", and all four rows
    assert sizes == [1]
    score_prompts(
        model,
        [prompt] * 4,
        targets,
        [AnswerLogprob(), Greedy(ends=(2,))],
        hooks=[("blocks.0.hook_resid_pre", count)],
    )
    assert sizes == [1, 4]


def test_float64_model_is_scored_in_float64(load_tiny):
    model = load_tiny("gpt2", dtype="float64")
    prompts = [encode(model, t) for t in TEXTS]
    targets = [target_of(model, p, a) for p, a in zip(prompts, ANSWERS, strict=True)]
    found = score_prompts(model, prompts, targets, "answer_logprob")["answer_logprob"]
    assert found.dtype == torch.float64
    for r, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        steps = by_hand(model, prompt, target)
        want = sum(steps[i][t].item() for i, t in enumerate(target.answer))
        assert found[r].item() == pytest.approx(want, abs=1e-11)


def test_no_prompts_give_no_scores_and_bad_calls_are_refused(load_tiny):
    model = load_tiny("llama")
    assert score_prompts(model, [], [], "rank")["rank"].shape == (0,)
    prompt = encode(model, "w1 w2")
    target = Target((5, 6))
    with pytest.raises(ValueError, match="1 prompts and 2 targets"):
        score_prompts(model, [prompt], [target] * 2, "rank")
    with pytest.raises(ValueError, match="repair and states go together"):
        score_prompts(model, [prompt], [target], "rank", repair=AddVector())
    with pytest.raises(ValueError, match="repair and states go together"):
        score_prompts(model, [prompt], [target], "rank", states=[None])
    with pytest.raises(ValueError, match="1 prompts and 2 states"):
        score_prompts(model, [prompt], [target], "rank", repair=AddVector(), states=[None] * 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_prompts(model, [prompt], [target], "rank", batch_size=0)
    with pytest.raises(ValueError, match="'inverse' is not finite in 1 of 1"):

        def inverse(logits):
            return 1 / (logits[:, 0] - logits[:, 0])

        score_prompts(model, [prompt], [target], inverse)
    long = Target((5,) * 63)
    with pytest.raises(TokenError, match=r"3 tokens \(\+62 of its answer\) exceeds.*context of 64"):
        score_prompts(model, [prompt], [long], "answer_logprob")
    assert score_prompts(model, [prompt], [long], "rank")["rank"].shape == (1,)
