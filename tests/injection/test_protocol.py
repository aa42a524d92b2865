"""Heads, side effects, and figures recomputed from plain tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mi_hops.injection.aggregate import aggregate, tidy_published
from mi_hops.injection.encodings import encode_memories
from mi_hops.injection.grid import injection_grid
from mi_hops.injection.heads import greedy_heads, head_ablation, head_injection
from mi_hops.injection.memory import MemoryInjection
from mi_hops.injection.select import split_halves
from mi_hops.injection.side_effects import side_effects
from mi_hops.model import capture, forward, hook_name
from mi_hops.result.result import summarise_change
from mi_hops.sweep.metrics import target_of
from mi_hops.text.tokens import encode
from tests.injection.test_grid import FACTS, fact, one_by_one

UNRELATED = ("w60 w61 w62", "w63 w64")


def first_prob(model, item, hooks):
    prompt = encode(model, item.prompt())
    target = target_of(model, prompt, item.answer)
    with torch.no_grad():
        logits = forward(model, torch.tensor([prompt.ids]), hooks=hooks)
    return logits[0, -1].softmax(-1)[target.answer[0]].item()


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_head_ablation_equals_one_forward_a_head(tiny, mode):
    result = head_ablation(tiny, FACTS, positions="last", mode=mode, layers=[0, 2])
    assert result["first_prob"].dims == ("example", "layer", "head")
    lasts = []
    for item in FACTS:
        tokens = torch.tensor([encode(tiny, item.prompt()).ids])
        lasts.append(capture(tiny, tokens, [hook_name("z", 2)])[0][hook_name("z", 2)][0, -1])
    mean = torch.stack(lasts).mean(0) if mode == "mean" else torch.zeros_like(lasts[0])
    for head in (0, 3):

        def take_away(x, head=head):
            out = x.clone()
            out[:, -1, head] = mean[head]
            return out

        for item in FACTS[:2]:
            want = first_prob(tiny, item, [(hook_name("z", 2), take_away)])
            got = result["first_prob"].sel(example=item.id, layer=2, head=head).item()
            assert np.isclose(got, want, atol=1e-5)


def test_mean_ablation_leaves_a_single_position_of_a_single_fact_alone(tiny):
    one = FACTS[:1]
    result = head_ablation(tiny, one, positions="last", mode="mean")
    before = result["first_prob_before"].values
    assert np.allclose(result["first_prob"].values, before[0], atol=1e-5)
    zero = head_ablation(tiny, one, positions="last", mode="zero")
    assert np.abs(zero["first_prob"].values - before[0]).max() > 1e-4


def test_head_injection_equals_a_restricted_memory(tiny):
    result = head_injection(tiny, FACTS, strength=3.0, layers=[1], controls=("answer",))
    for memory, head in (("bridge", 0), ("answer", 3)):
        repair = MemoryInjection(1, 3.0, heads=[head], memory=memory)
        want = one_by_one(tiny, FACTS, repair, "first_prob")
        got = result["first_prob"].sel(memory=memory, layer=1, head=head).values
        assert np.allclose(got, want, atol=1e-5)


def test_all_heads_together_write_the_whole_memory(load_tiny):
    # The tiny models' W_O is square and invertible: its rows span the residual space.
    model = load_tiny()
    whole = encode_memories(model, ["w20"])
    parts = MemoryInjection(1, 1.0, heads=[0, 1, 2, 3]).fit_texts(model, ["w20"])[0].vectors
    assert torch.allclose(parts, whole[0], atol=1e-4)


def test_greedy_heads_take_the_best_head_of_each_round_and_report_the_other_half(tiny):
    facts = [*FACTS, *(fact(i) for i in range(9, 13))]
    found = greedy_heads(
        tiny, facts, strength=3.0, max_heads=2, layers=[1, 2], positions="last", seed=1
    )
    assert 1 <= len(found.order) <= 2 and len(found.scores) == len(found.order)
    choosing, reporting = split_halves([f.id for f in facts], seed=1)
    assert found.result["example"].values.tolist() == reporting
    chosen = [f for f in facts if f.id in choosing]

    def mean(heads, part, memory="bridge"):
        repair = MemoryInjection(sorted(heads), 3.0, heads=heads, memory=memory, positions="last")
        return one_by_one(tiny, part, repair, "first_logprob")

    singles = {(layer, h): mean({layer: [h]}, chosen).mean() for layer in (1, 2) for h in range(4)}
    assert found.order[0] == max(singles, key=singles.get)
    assert np.isclose(found.scores[0], max(singles.values()), atol=1e-4)
    if len(found.order) == 2:
        assert found.scores[1] > found.scores[0]
        assert np.isclose(mean(found.heads, chosen).mean(), found.scores[1], atol=1e-4)
    got = found.result["first_logprob"].sel(memory="bridge").isel(size=-1).values
    want = mean(found.heads, [f for f in facts if f.id in reporting])
    assert np.allclose(got, want, atol=1e-4)
    assert found.result["memory"].values.tolist() == ["bridge", "permuted_bridge", "random heads"]
    with pytest.raises(ValueError, match="choose_by is 'greedy'"):
        greedy_heads(tiny, facts, strength=1.0, choose_by="greedy")


@pytest.mark.parametrize("method", [head_injection, greedy_heads])
def test_a_random_direction_is_no_memory_of_heads(load_tiny, method):
    with pytest.raises(ValueError, match="leave norm_matched out"):
        method(load_tiny(), FACTS, strength=1.0, controls=("norm_matched",))


def test_negative_strength_suppresses_what_positive_strength_brings_up(tiny):
    grid = injection_grid(
        tiny, FACTS, strengths=(-2, 2), layers=[2], positions="last", controls=("answer",)
    )
    answer = grid["first_logprob"].sel(memory="answer", layer=2)
    up, down = (answer.sel(strength=s).mean().item() for s in (2, -2))
    assert down < grid["first_logprob_before"].mean().item() < up


def test_side_effects_by_hand(tiny):
    injection = MemoryInjection(1, 3.0)
    result = side_effects(tiny, FACTS[:2], injection, UNRELATED, batch_size=2)
    states = injection.fit(tiny, FACTS[:2])
    for item, state in zip(FACTS[:2], states, strict=True):
        for text in (*UNRELATED, item.second_prompts["suffix"]):
            tokens = torch.tensor([encode(tiny, text).ids])
            add = [(hook_name("attn_out", 1), lambda x, v=state.vectors[1]: x + 3 * v)]
            with torch.no_grad():
                before, after = (
                    forward(tiny, tokens, hooks=h)[0, -1].log_softmax(-1) for h in ([], add)
                )
            kl = (before.exp() * (before - after)).sum().item()
            if text in UNRELATED:
                assert np.isclose(result["kl"].sel(example=item.id, prompt=text), kl, atol=1e-4)
                changed = float(before.argmax() != after.argmax())
                assert result["top_changed"].sel(example=item.id, prompt=text) == changed
            else:
                assert np.isclose(result["explicit_kl"].sel(example=item.id), kl, atol=1e-4)


def test_side_effects_leave_prompts_without_the_first_hop_alone(load_tiny):
    injection = MemoryInjection(1, 3.0, positions="first hop")
    result = side_effects(load_tiny(), FACTS[:2], injection, UNRELATED)
    assert not result["kl"].values.any() and not result["top_changed"].values.any()
    assert not result["touched"].values.any() and not result["explicit_touched"].values.any()
    # The last token is there whatever the first hop is.
    both = side_effects(
        load_tiny(), FACTS[:2], replace(injection, positions=["first hop", "last"]), UNRELATED
    )
    last = side_effects(load_tiny(), FACTS[:2], replace(injection, positions="last"), UNRELATED)
    assert both["touched"].values.all() and both["explicit_touched"].values.all()
    assert np.allclose(both["kl"].values, last["kl"].values) and both["kl"].values.all()
    with pytest.raises(ValueError, match="unrelated prompt"):
        side_effects(load_tiny(), FACTS, injection, [])
    with pytest.raises(ValueError, match=r"no fact can be used for side effects \(5: "):
        side_effects(load_tiny(), FACTS, injection, UNRELATED, form="question")


# -- plain tables --


def test_aggregate_recomputes_the_published_statistics_on_hand_made_rows():
    before = [0.1, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    after = [0.2, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 10.1]
    frame = pd.DataFrame({"before": before, "after": after})
    row = aggregate(frame).loc["all"]
    # r = 1, -1/2, 0 (seven times), 100; the last is more than two sd from the mean and is cut.
    assert np.isclose(row["mean_relative_change_within_2sd"], 0.5 / 9)
    assert np.isclose(row["mean_relative_change"], 100.5 / 10)
    assert row["median_relative_change"] == 0
    assert np.isclose(row["ratio_of_means_change"], sum(after) / sum(before) - 1)
    assert np.isclose(row["share_improved"], 0.2)
    assert row["n"] == 10


def test_published_tables_become_long_and_group_by_layer_or_word():
    wide = pd.DataFrame(
        {
            "answer_prob_obs": [0.1, 0.2],
            "ans_prob_obs_edit_layer0": [0.2, 0.1],
            "ans_prob_obs_edit_layer11": [0.3, 0.2],
            "topk_tok_obs_edit_layer0": ["[1, 2]", "[3]"],
        }
    )
    long = tidy_published(wide)
    assert long["layer"].tolist() == [0, 0, 11, 11] and long["row"].tolist() == [0, 1, 0, 1]
    table = aggregate(long, by="layer", intervals=True, n_resamples=50)
    assert table.index.tolist() == [0, 11]
    want = summarise_change([0.1, 0.2], [0.3, 0.2], n_resamples=10)["value"]
    assert np.isclose(table.loc[11, "mean_log_change"], want["mean_log_change"])
    assert table.loc[11, "mean_relative_change_lower"] <= table.loc[11, "mean_relative_change"]
    words = wide.rename(columns={"ans_prob_obs_edit_layer0": "ans_prob_obs_edit_subject_the end"})
    words = words.drop(columns="ans_prob_obs_edit_layer11")
    assert set(tidy_published(words)["word"]) == {"the end"}
    both = aggregate(long.assign(strength=3), by=["layer", "strength"])
    assert (11, 3) in both.index


def test_tables_without_the_columns_are_refused():
    frame = pd.DataFrame({"before": [0.1], "after": [0.2]})
    with pytest.raises(ValueError, match="answer_prob_obs"):
        tidy_published(frame)
    with pytest.raises(ValueError, match="ans_prob_obs_edit"):
        tidy_published(frame, before="before")
    with pytest.raises(ValueError, match="layer"):
        aggregate(frame, by="layer")
    with pytest.raises(ValueError, match="empty"):
        aggregate(frame.iloc[:0])
