"""The grid against one forward pass a cell, the controls, and choosing on one half."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection import (
    Cell,
    Controls,
    Encoder,
    MemoryInjection,
    Place,
    cell_report,
    encode_memories,
    injection_grid,
    permuted_bridges,
    restrict_to_heads,
    select_cell,
)
from mi_hops.injection.controls import norm_matched, whole_words
from mi_hops.result import split_halves
from mi_hops.result.result import Result
from mi_hops.result.statistics import summarise_change
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Plan, target_of
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode

METRICS = ("first_correct", "first_prob", "first_logprob", "rank", "answer_logprob", "greedy")


def fact(i):
    """Prompts of three lengths, answers of one and two tokens."""
    hop = f"w3 w11 w{i}"
    return TwoHopFact(
        id=f"f{i}",
        subject=f"w{i}",
        relation1="r",
        bridge=f"w{20 + i} w{21 + i}",
        relation2="q",
        answer=f"w{40 + i}" + (" w50" if i % 2 else ""),
        first_hop=hop,
        prompts={"suffix": "w1 w2 " + "w9 " * (i % 3) + f"{hop} w12"},
        second_prompts={"suffix": f"w1 w2 w{20 + i} w{21 + i} w12"},
    )


FACTS = [fact(i) for i in range(4, 9)]


def one_by_one(model, facts, repair, metrics):
    """Metrics of each fact's prompt under a repair, a forward pass each."""
    found = []
    for item, state in zip(facts, repair.fit(model, facts), strict=True):
        prompt = encode(model, item.prompt())
        target = target_of(model, prompt, item.answer)
        found.append(
            score_prompts(model, [prompt], [target], metrics, repair=repair, states=[state])
        )
    scores = {name: np.array([f[name].item() for f in found]) for name in found[0]}
    return next(iter(scores.values())) if isinstance(metrics, str) else scores


@pytest.mark.slow_case("gpt2-hooked")
@pytest.mark.parametrize(
    ("encodings", "place"),
    [
        (("unembed", "embed", "layerwise_code", "layerwise_text"), Place()),
        (("unembed",), Place("last", relative=True)),
        (("unembed",), Place(["first hop", "last"], kind="resid_mid")),
        ((Encoder(pooling="mean"), "unembed"), Place("all", kind="mlp_out")),
        ((Encoder(heads=[0, 3]),), Place()),
        ((Encoder(heads={0: [1], 1: [0, 2], 2: [3]}), Encoder(heads=[1])), Place("last")),
    ],
    ids=["encodings", "relative", "resid_mid", "pooling", "heads", "heads of layers"],
)
def test_the_grid_equals_one_forward_a_cell(tiny, encodings, place):
    grid = injection_grid(
        tiny,
        FACTS,
        layers=[2, (0, 1)],
        strengths=(0.5, 4),
        encodings=encodings,
        positions=place,
        controls=("answer",),
        metrics=METRICS,
        limits=Limits(batch_size=3, max_rows=50),
    )
    assert grid.n_used == 5
    options = {"positions": place.positions, "kind": place.kind, "relative": place.relative}
    for encoding, name in zip(encodings, grid["encoding"].values.tolist(), strict=True):
        for memory, layers, strength in (("bridge", 2, 4.0), ("answer", (0, 1), 0.5)):
            repair = MemoryInjection(layers, strength, encoding=encoding, memory=memory, **options)
            label = str(layers) if isinstance(layers, int) else "0+1"
            cell = grid.sel(memory=memory, encoding=name, layer=label, strength=strength)
            for metric, want in one_by_one(tiny, FACTS, repair, METRICS).items():
                got = cell[metric].sel(example=[f.id for f in FACTS]).values
                assert np.allclose(got, want, atol=1e-4, rtol=1e-4), (metric, memory)


def test_strength_zero_and_baselines(tiny):
    grid = injection_grid(tiny, FACTS, strengths=(0,), metrics=METRICS)
    for name in ("first_prob", "answer_logprob"):
        before = grid[f"{name}_before"].values
        assert np.allclose(grid[name].values, before[:, None, None, None, None], atol=1e-5)
        for prompts, which in (("prompts", "before"), ("second_prompts", "explicit")):
            asked = [encode(tiny, getattr(f, prompts)["suffix"]) for f in FACTS]
            targets = [target_of(tiny, p, f.answer) for p, f in zip(asked, FACTS, strict=True)]
            want = score_prompts(tiny, asked, targets, name)[name]
            assert np.allclose(grid[f"{name}_{which}"].values, want, atol=1e-5)


@dataclass(frozen=True)
class Continued:
    """First-token probability of the answer after other tokens than its own."""

    extra: tuple[int, ...]
    name: str = "continued"
    unit: str = "probability"
    higher_is_better: bool = True

    def plan(self, target):
        return Plan(self.extra, (len(self.extra),))

    def score(self, logits, target):
        return logits[:, 0].softmax(-1)[:, target.answer[0]]


def test_metrics_whose_continuations_do_not_nest_are_scored_on_their_own_tokens(tiny):
    metrics = ("answer_logprob", "greedy", Continued((3, 4, 5)), "first_prob")
    grid = injection_grid(tiny, FACTS, layers=[1], strengths=(2,), controls=(), metrics=metrics)
    repair = MemoryInjection(1, 2.0)
    for metric in metrics:
        ((name, want),) = one_by_one(tiny, FACTS, repair, [metric]).items()
        assert np.allclose(grid[name].values.ravel(), want, atol=1e-5), name


def test_a_grid_says_what_was_injected_and_round_trips(load_tiny, tmp_path):
    grid = injection_grid(
        load_tiny(), FACTS, strengths=(1,), layers=[1], controls=Controls(words={"noun": ["w70"]})
    )
    assert grid["memory"].values.tolist() == [
        "bridge",
        "random_noun",
        "permuted_bridge",
        "answer",
        "norm_matched",
    ]
    assert grid["text"].sel(example="f5", memory="bridge").item() == "w25 w26"
    assert set(grid["text"].sel(memory="random_noun").values.tolist()) == {"w70"}
    again = Result.load(grid.save(tmp_path / "grid.nc"))
    assert np.array_equal(again["first_prob"].values, grid["first_prob"].values)
    assert (
        again.provenance["positions"] == "everywhere" and again.provenance["processing"] == "none"
    )


def test_facts_that_cannot_run_are_skipped_and_memories_follow_their_facts(load_tiny):
    model = load_tiny()
    broken = replace(fact(8), id="broken", first_hop="w88 w87")
    facts = [broken, *FACTS[:2]]
    grid = injection_grid(
        model,
        facts,
        strengths=(2,),
        positions="first hop",
        layers=[1],
        controls=Controls((), memories={"mine": ["w80", "w81", "w82"]}),
    )
    assert grid["example"].values.tolist() == ["f4", "f5"]
    assert [who for who, _ in grid.skipped] == ["broken"]
    assert grid["text"].sel(memory="mine").values.tolist() == ["w81", "w82"]
    texts = {"f4": "w81", "f5": "w82"}
    repair = MemoryInjection(1, 2.0, positions="first hop", memory=lambda f: texts[f.id])
    want = one_by_one(model, FACTS[:2], repair, "first_prob")
    assert np.allclose(grid["first_prob"].sel(memory="mine").values.ravel(), want, atol=1e-5)


def test_controls(load_tiny):
    model = load_tiny()
    names = ("random_word", "permuted_bridge", "answer")
    texts = Controls(names, seed=3).texts(model, FACTS)
    assert list(texts) == ["bridge", "random_word", "permuted_bridge", "answer"]
    words = set(whole_words(model))
    assert {"w1", "w85"} <= words and "<pad>" not in words
    for i, item in enumerate(FACTS):
        drawn = texts["random_word"][i].split()
        own = f"{item.bridge} {item.answer} {item.first_hop}".split()
        assert len(drawn) == 2 and set(drawn) <= words - set(own)
        assert texts["permuted_bridge"][i] in {f.bridge for f in FACTS} - {item.bridge}
    assert texts == Controls(names, seed=3).texts(model, FACTS)
    assert texts != Controls(names, seed=4).texts(model, FACTS)


def test_random_words_are_whole_and_of_letters():
    tokens = ["<s>", *"abcdeĠ2", "Ġa", "Ġab", "ab", "cd", "Ġ2"]
    merges = [("Ġ", "a"), ("Ġa", "b"), ("a", "b"), ("c", "d"), ("Ġ", "2")]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=len(tokens)))
    assert whole_words(model) == ["a", "ab"]  # "cd" and "e" only ever stand inside a word


def test_norm_matched_vectors_have_the_lengths_and_no_direction_in_common(load_tiny):
    vectors = encode_memories(load_tiny(), [f.bridge for f in FACTS], "layerwise_text")
    random = norm_matched(vectors, seed=1)
    assert torch.allclose(random.norm(dim=-1), vectors.norm(dim=-1), rtol=1e-5)
    cosines = torch.cosine_similarity(random, vectors, dim=-1)
    assert cosines.abs().max() < 0.7
    assert torch.equal(random, norm_matched(vectors, seed=1))


def test_random_directions_of_heads_lie_in_their_space_and_have_the_lengths(load_tiny):
    model = load_tiny()
    heads = {0: [1], 2: [0, 3]}
    within = partial(restrict_to_heads, model, heads=heads)
    vectors = within(encode_memories(model, [f.bridge for f in FACTS]))
    random = norm_matched(vectors, seed=1, within=within)
    assert torch.allclose(random.norm(dim=-1), vectors.norm(dim=-1), atol=1e-5)
    assert torch.allclose(within(random), random, atol=1e-5) and not random[:, 1].any()
    assert torch.cosine_similarity(random[:, 0], vectors[:, 0], dim=-1).abs().max() < 0.95
    grid, whole, plain = (
        injection_grid(
            model,
            FACTS,
            layers=[2],
            strengths=(3,),
            encodings=[Encoder(heads=heads)],
            controls=("norm_matched",),
        )
        for heads in ([0], [0, 1, 2, 3], None)
    )
    drawn = [g["first_prob"].sel(memory="norm_matched").values for g in (grid, whole, plain)]
    # All heads of a square W_O write everything, so there the restriction changes nothing.
    assert np.allclose(drawn[1], drawn[2], atol=1e-5) and not np.allclose(drawn[0], drawn[2])


def test_bridges_are_permuted_and_none_leads_to_the_facts_answer():
    made = [  # two bridges lead to each answer
        replace(fact(4 + i), id=str(i), bridge=f"w{20 + i % 4}", answer=f"w{40 + i % 2}")
        for i in range(16)
    ]
    for seed in range(5):
        dealt = permuted_bridges(made, np.random.default_rng(seed))
        assert sorted(dealt) == sorted(f.bridge for f in made)  # each as often as it occurs
        for item, bridge in zip(made, dealt, strict=True):
            assert bridge != item.bridge
            assert item.answer not in {f.answer for f in made if f.bridge == bridge}
    assert dealt != permuted_bridges(made, np.random.default_rng(7))


def test_a_bridge_that_most_facts_have_is_drawn_for_them_from_the_others():
    made = [replace(fact(4), id=str(i)) for i in range(5)] + [fact(5)]
    dealt = permuted_bridges(made, np.random.default_rng(0))
    assert dealt == [fact(5).bridge] * 5 + [fact(4).bridge]


def test_one_bridge_cannot_be_permuted():
    same = [replace(fact(4), id=str(i)) for i in range(3)]
    with pytest.raises(ValueError, match="no other bridge"):
        permuted_bridges(same, np.random.default_rng(0))
    # One that leads to the same answer is better than none.
    both = [fact(4), replace(fact(5), answer=fact(4).answer)]
    assert permuted_bridges(both, np.random.default_rng(0)) == [fact(5).bridge, fact(4).bridge]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "0..2"),
        ({"layers": []}, "at least one"),
        ({"strengths": ()}, "at least one strength"),
        ({"strengths": (2, 2.0)}, "at least one strength and one encoding, each once"),
        ({"encodings": ("word2vec",)}, "unknown encoding"),
        ({"controls": ("noise",)}, "unknown control"),
        ({"positions": lambda: Place(kind="pattern")}, "cannot inject at"),
        ({"form": "question"}, r"no fact can be used for an injection \(5: "),
        ({"controls": lambda: Controls(memories={"mine": ["w1"]})}, "one text for each of 5"),
        ({"controls": lambda: Controls(memories={"answer": ["w1"] * 5})}, "built in"),
        ({"controls": lambda: Controls(words={"noun": []})}, "sequence of words"),
        ({"encodings": [Encoder(heads={0: [1]})]}, r"none for layers \[1, 2\]"),
        ({"encodings": ["unembed", Encoder()]}, "each once"),
        ({"layers": [1, (1,)]}, "each group once"),
        ({"strengths": (1, float("nan"))}, "finite"),
        ({"metrics": "accuracy"}, "unknown metric"),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        made = {k: v() if callable(v) else v for k, v in settings.items()}
        injection_grid(load_tiny(), FACTS, **{"strengths": (1,), **made})


# -- choosing a cell --


def made_grid():
    """Four examples, two memories; cell (layer 1, strength 2) repairs e0, e1, (0, 1) only e2."""
    right = np.zeros((4, 2, 1, 2, 2))
    right[:2, 0, 0, 1, 1] = 1
    right[2, 0, 0, 0, 0] = 1
    right[3, 1, 0, 1, 1] = 1
    probs = 0.1 + 0.5 * right
    dims = ("example", "memory", "encoding", "layer", "strength")
    return Result.from_arrays(
        {
            "first_correct": (dims, right),
            "first_prob": (dims, probs),
            "first_logprob": (dims, np.log(probs)),
        },
        coords={
            "example": ["e0", "e1", "e2", "e3"],
            "memory": ["bridge", "answer"],
            "encoding": ["unembed"],
            "layer": [0, 1],
            "strength": [1.0, 2.0],
        },
        baselines={
            "first_correct_before": ("example", np.zeros(4)),
            "first_prob_before": ("example", np.full(4, 0.1)),
        },
        provenance={},
    )


def test_the_cell_is_chosen_on_the_given_half():
    grid = made_grid()
    assert select_cell(grid, examples=["e0", "e1"]) == Cell("unembed", 1, 2.0, 1.0, 2)
    assert select_cell(grid, examples=["e2"]) == Cell("unembed", 0, 1.0, 1.0, 1)
    assert select_cell(grid) == Cell("unembed", 1, 2.0, 0.5, 4)
    assert select_cell(grid, memory="answer", examples=["e3"]).labels == {
        "encoding": "unembed",
        "layer": 1,
        "strength": 2.0,
    }
    with pytest.raises(ValueError, match="examples is empty"):
        select_cell(grid, examples=[])
    with pytest.raises(ValueError, match="no metric"):
        select_cell(grid, metric="greedy")


def test_ties_are_settled_by_log_probability():
    grid = made_grid()
    grid.data["first_logprob"].loc[{"layer": 1, "strength": 1.0}] = 0.0
    assert select_cell(grid, examples=["e3"]).labels["strength"] == 1.0
    assert select_cell(grid, examples=["e3"], tie=None).labels["layer"] == 0


def test_the_report_has_shares_intervals_and_the_papers_statistics():
    grid, cell = made_grid(), Cell("unembed", 1, 2.0, 1.0, 2)
    table = cell_report(grid, cell, n_resamples=200)
    assert table.loc["bridge", "correct"] == 0.5 and table.loc["answer", "correct"] == 0.25
    assert table.loc["answer", "difference"] == 0.25
    assert table.loc["bridge", "correct_lower"] < 0.5 < table.loc["bridge", "correct_upper"]
    want = summarise_change([0.1] * 4, [0.6, 0.6, 0.1, 0.1], n_resamples=10)["value"]
    for name in ("mean_relative_change_within_2sd", "ratio_of_means_change", "share_improved"):
        assert np.isclose(table.loc["bridge", name], want[name])
    half = cell_report(grid, cell, examples=["e2", "e3"], n_resamples=50)
    assert half.loc["bridge", "correct"] == 0 and half["n"].tolist() == [2, 2]


def test_the_report_has_rank_and_the_whole_answers_probability_where_the_grid_has(tiny):
    grid = injection_grid(
        tiny,
        FACTS,
        layers=[2],
        strengths=(4,),
        controls=("answer",),
        metrics=METRICS,
        positions="last",
    )
    table = cell_report(grid, select_cell(grid), n_resamples=20)
    for memory in ("bridge", "answer"):
        cell = grid.sel(memory=memory, encoding="unembed", layer=2, strength=4)
        row = table.loc[memory]
        assert row["rank"] == np.median(cell["rank"].values)
        assert row["rank_before"] == np.median(grid["rank_before"].values)
        assert np.isclose(row["answer_prob"], np.exp(cell["answer_logprob"].values).mean())
        before = np.exp(grid["answer_logprob_before"].values).mean()
        assert np.isclose(row["answer_prob_before"], before)
    assert table.loc["answer", "rank"] < table.loc["answer", "rank_before"]
    assert not {"rank", "answer_prob"} & set(cell_report(made_grid(), select_cell(made_grid())))


@pytest.mark.slow_case("gpt2-hooked")
@pytest.mark.parametrize(
    ("encoding", "place"),
    [
        ("unembed", Place(["first hop", "last"], relative=True)),
        (Encoder(pooling="mean"), Place([slice(1, 3), -1], kind="resid_mid")),
        (Encoder(heads={0: [1], 2: [0, 3]}, leading_space=True), Place()),
        (Encoder(heads=[2]), Place("first hop")),
    ],
    ids=str,
)
def test_the_chosen_cell_is_injected_as_the_grid_did(tiny, encoding, place, tmp_path):
    grid = injection_grid(
        tiny,
        FACTS[:3],
        layers=[(0, 2), (2,)],
        strengths=(0.5, 3),
        encodings=[encoding],
        positions=place,
        controls=(),
    )
    cell = select_cell(Result.load(grid.save(tmp_path / "grid.nc")))
    want = grid["first_prob"].sel(memory="bridge", **cell.labels).values
    assert cell.injection().layers == cell.layers == {"0+2": (0, 2), "2": (2,)}[cell.layer]
    assert np.allclose(one_by_one(tiny, FACTS[:3], cell.injection(), "first_prob"), want, atol=1e-5)
    assert cell.injection(memory="answer", absent="leave").memory == "answer"
    with pytest.raises(ValueError, match="choose it with select_cell"):
        Cell("unembed", 0, 1.0, 0.5, 4).injection()


def test_layers_strengths_and_positions_may_be_numpys(tiny):
    numbers = {"strengths": np.linspace(1, 2, 2), "positions": np.int64(-1)}
    grids = [
        injection_grid(tiny, FACTS[:2], layers=layers, controls=(), **how)
        for layers, how in (
            (np.arange(2), numbers),
            ([0, 1], {"strengths": (1, 2), "positions": -1}),
        )
    ]
    assert grids[0].data.identical(grids[1].data)
    assert grids[0].provenance == grids[1].provenance
    cell = select_cell(grids[0])
    one = MemoryInjection(np.int64(cell.layer), np.float32(cell.strength))
    assert one.strengths == cell.injection().strengths


def test_halves_part_the_examples():
    first, second = split_halves(range(7), seed=5)
    assert sorted([*first, *second]) == list(range(7)) and len(first) == 4
    assert (first, second) == split_halves(range(7), seed=5)
    assert any(split_halves(range(7), seed=s)[0] != first for s in range(3))
    with pytest.raises(ValueError, match="two distinct"):
        split_halves(["a", "a"])
