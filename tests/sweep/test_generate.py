"""Generation against one token at a time by hand, and the rules for what counts as the answer."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from mi_hops.model import hook_name
from mi_hops.model.plain import PlainPasses
from mi_hops.sweep import together
from mi_hops.sweep.generate import Generation, answered, end_ids, generate
from mi_hops.sweep.metrics import Greedy, Target
from mi_hops.sweep.sample import sample
from mi_hops.sweep.scoring import logits_at, score_prompts
from mi_hops.sweep.together import plan_batches
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import TokenError, answer_ids, decode, encode
from tests.repairs import AddVector, greedy_by_hand

TEXTS = ("w1 w2 w3", "w9 w8 w4", "w5 w6 w7 w8 w9 w10", "w1 w2 w3", "w40", "w11 w12 w13")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_equal_to_one_token_at_a_time(tiny, batch_size):
    prompts = [encode(tiny, t) for t in TEXTS]
    found = generate(tiny, prompts, max_new_tokens=6, batch_size=batch_size, stop=())
    for prompt, said in zip(prompts, found, strict=True):
        want = greedy_by_hand(tiny, prompt, 6)
        assert said.ids == want
        assert said.finished == (want[-1] == 2)
        assert said.text == decode(tiny, want).strip()


@pytest.mark.parametrize("later", [False, True], ids=["at-prompt", "and-later"])
def test_each_row_is_under_its_own_repair(tiny, later):
    prompts = [encode(tiny, t) for t in TEXTS]
    repair = AddVector(later=later)
    states = repair.fit(tiny, prompts)
    states[3] = None
    found = generate(tiny, prompts, max_new_tokens=5, stop=(), repair=repair, states=states)
    changed = 0
    for prompt, state, said in zip(prompts, states, found, strict=True):
        assert said.ids == greedy_by_hand(tiny, prompt, 5, repair, state)
        changed += said.ids != greedy_by_hand(tiny, prompt, 5)
    assert changed >= 3  # the repair does something, and the comparison would see it missing
    assert found[3] == generate(tiny, [prompts[3]], max_new_tokens=5, stop=())[0]


LEAD = "w7 w3 w9 w11 w2 w8 w5 w12 w30 w31 w32 w33"
MANY = [f"{LEAD} w{i} {'w4 ' * (i % 4)}w{i + 1}" for i in range(20, 32)] + [
    *TEXTS,
    LEAD,
    f"{LEAD} w40",
    f"w1 {LEAD}",
    f"w1 {LEAD} w2",
    f"w1 {LEAD} w2 w3",
]


@pytest.mark.slow_case("llama-bridge-3-0", "gpt2-hooked-3-64")
@pytest.mark.parametrize("pass_cost", [0, pytest.param(3, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("batch_size", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_a_common_lead_and_unequal_lengths_change_nothing(tiny, batch_size, pass_cost, monkeypatch):
    monkeypatch.setitem(together.PASS_COST, "cpu", pass_cost)
    found = generate(tiny, MANY, max_new_tokens=6, batch_size=batch_size, stop=())
    for text, said in zip(MANY, found, strict=True):
        assert said.ids == greedy_by_hand(tiny, encode(tiny, text), 6), text


@pytest.mark.slow_case("llama-bridge")
def test_rows_that_end_leave_the_others_alone(tiny):
    free = {t: generate(tiny, [t], max_new_tokens=10, stop=())[0] for t in MANY}
    stop = (" w1", " w2", " w3")  # many end early, at different steps
    found = generate(tiny, MANY, max_new_tokens=10, stop=stop)
    assert len({len(said.ids) for said in found}) >= 4
    for text, said in zip(MANY, found, strict=True):
        assert said.ids == free[text].ids[: len(said.ids)]
        assert said == generate(tiny, [text], max_new_tokens=10, stop=stop)[0]


def test_a_row_that_is_done_does_not_outgrow_the_context(tiny):
    prompts = [" ".join(f"w{i}" for i in range(54)), "w1 w2"]  # 55 of 64 tokens with BOS
    answers = ["w3", " ".join(f"w{i}" for i in range(30))]
    found = answered(tiny, prompts, answers, stop=("w99",))
    for i in range(2):
        alone = answered(tiny, prompts[i : i + 1], answers[i : i + 1], stop=("w99",))[0]
        assert replace(found[i], prob=alone.prob) == alone


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # as bare sums; by the model itself
def test_the_lead_is_run_once(load_tiny, monkeypatch, precision):
    model = load_tiny("llama", dtype=precision)
    run = []

    def counted(call, at):
        def record(*given, **options):
            run.append(tuple(given[at].shape))
            return call(*given, **options)

        return record

    monkeypatch.setattr(PlainPasses, "__call__", counted(PlainPasses.__call__, 1))
    for place in ("generate", "scoring"):
        monkeypatch.setattr(
            sys.modules[f"mi_hops.sweep.{place}"], "logits_at", counted(logits_at, 1)
        )
    monkeypatch.setitem(together.PASS_COST, "cpu", 8)
    prompts = [f"{LEAD} w{i} w{i + 1}" for i in range(20, 40)]
    generate(model, prompts, max_new_tokens=3, batch_size=10, stop=())
    n = len(encode(model, LEAD))
    assert run[0] == (1, n)
    assert all(rows > 1 and width <= 2 for rows, width in run[1:])
    run.clear()
    repair = AddVector()
    generate(
        model, prompts, max_new_tokens=2, stop=(), repair=repair, states=repair.fit(model, prompts)
    )
    # A repair may act on the lead, in each row its own way.
    assert run[0] == (20, n + 2) and {rows for rows, _ in run} == {20}


def test_hooks_of_the_users_own_act_as_without_batching(tiny):
    def damp(x, hook):
        x = x.clone()
        x[:, -1] *= 0.2  # by its place in the pass, which padding or a shared lead would move
        return x

    prompts = [encode(tiny, t) for t in MANY]
    plain = generate(tiny, prompts, max_new_tokens=1, stop=())
    with tiny.hooks(fwd_hooks=[(hook_name("mlp_out", 1), damp)]):
        found = generate(tiny, prompts, max_new_tokens=1, stop=())
        assert [g.ids for g in found] == [greedy_by_hand(tiny, p, 1) for p in prompts]
    assert found != plain
    assert generate(tiny, prompts, max_new_tokens=1, stop=()) == plain


def test_answers_come_with_rank_and_probability_of_the_first_token(tiny):
    answers = [f"w{i}" for i in range(len(MANY))]
    found = answered(tiny, MANY, answers, max_new_tokens=2)
    prompts = [encode(tiny, t) for t in MANY]
    targets = [Target(answer_ids(tiny, p, a)) for p, a in zip(prompts, answers, strict=True)]
    want = score_prompts(tiny, prompts, targets, ["first_prob", "rank"])
    assert [a.rank for a in found] == want["rank"].tolist()
    assert [a.prob for a in found] == pytest.approx(want["first_prob"].tolist(), rel=1e-4)
    assert [a.first_token for a in found] == [a.rank == 1 for a in found]


@pytest.mark.parametrize("cost", [0, 1, 5, 40])
def test_plans_hold_every_row_once_behind_what_it_starts_with(cost):
    prompts = [tuple(map(int, text.replace("w", "").split())) for text in MANY] * 2
    prompts += [tuple(range(50 + i)) for i in range(3)] + [(7,), (7, 3)]
    for size in (1, 4, 100):
        batches = list(plan_batches(prompts, size, pass_cost=cost))
        rows = [i for parts in batches for part in parts for i in part.rows]
        assert sorted(rows) == list(range(len(prompts)))
        for parts in batches:
            assert sum(len(part.rows) for part in parts) <= size
            for part in parts:
                assert list(part.starts) == sorted(set(part.starts))
                for length in part.starts:
                    assert len({prompts[i][:length] for i in part.rows}) == 1
                    assert length < min(len(prompts[i]) for i in part.rows)
    tokens = sum(map(len, prompts))
    (parts,) = plan_batches(prompts, 100, pass_cost=cost)
    run = {prompts[p.rows[0]][:n] for p in parts for n in p.starts}
    shared = [p.starts[-1] if p.starts else 0 for p in parts]
    widths = [max(len(prompts[i]) for i in p.rows) for p in parts]
    padded = sum(len(p.rows) * (w - s) for p, s, w in zip(parts, shared, widths, strict=True))
    assert list(plan_batches([], 4, pass_cost=cost)) == []
    (whole,) = plan_batches(prompts, 100, pass_cost=cost, packed=True)  # never cut for a length
    assert sorted(i for p in whole for i in p.rows) == list(range(len(prompts)))
    begun = [prompts[p.rows[0]][: p.starts[-1]] if p.starts else () for p in whole]
    assert len(set(begun)) == len(whole) <= len(parts)
    if cost < 40:
        assert padded + cost * len(run) < tokens


def test_stops_at_a_stop_string_and_leaves_it_out(load_tiny):
    model = load_tiny("llama")
    free = [generate(model, [t], max_new_tokens=5, stop=())[0] for t in TEXTS]
    stop = free[0].text.split()[2] + " "  # with its space: no prefix of another word
    found = generate(model, TEXTS, max_new_tokens=5, stop=(stop,))
    for said, whole in zip(found, free, strict=True):
        at = (whole.text).find(stop)
        if at < 0:
            assert said == whole
        else:
            assert said.text == whole.text[:at].strip()
            assert said.finished
            assert said.ids == whole.ids[: len(said.ids)]
            assert decode(model, said.ids[:-1]).find(stop) < 0
    assert found[0].finished and len(found[0].ids) < 5


def test_end_of_sequence_ends_and_is_no_text(load_tiny):
    model = load_tiny("llama", fresh=True)
    free = generate(model, ["w1 w2 w3"], max_new_tokens=4, stop=())[0]
    model.tokenizer.eos_token = decode(model, [free.ids[2]])
    assert model.tokenizer.eos_token_id == free.ids[2]
    at = free.ids.index(free.ids[2])
    want = Generation(free.ids[: at + 1], decode(model, free.ids[:at]), True)
    assert generate(model, ["w1 w2 w3"], max_new_tokens=4, stop=())[0] == want


def test_greedy_metric_agrees_with_generation(tiny):
    prompts = [encode(tiny, t) for t in TEXTS]
    said = generate(tiny, prompts, max_new_tokens=3, stop=())
    full = [(p, g.ids) for p, g in zip(prompts, said, strict=True) if len(g.ids) == 3]
    assert len(full) >= 3
    for prompt, ids in full:
        for answer in ((ids[0],), ids[:2], ids, (ids[1], ids[0]), (ids[0], (ids[1] + 1) % 90)):
            again = generate(tiny, [prompt], max_new_tokens=len(answer), stop=())[0].ids
            score = score_prompts(tiny, [prompt], [Target(answer)], "greedy")["greedy"].item()
            assert score == float(again == answer)


def test_end_ids_are_eos_and_tokens_that_start_with_a_stop(load_tiny):
    model = load_tiny()
    assert end_ids(model, stop=()) == (2,)
    assert end_ids(model, stop=("w8",)) == (2, 12, *range(84, 90))  # w8, w80..w85
    assert end_ids(model, stop=("8",)) == (2,)


def test_answered_compares_text_end_and_first_token(load_tiny):
    model = load_tiny("llama")
    prompt = "w9 w8 w4"
    words = generate(model, [prompt], max_new_tokens=4, stop=())[0].text.split()
    a, b, c = words[:3]
    assert len({a, b, c}) == 3 and not c.startswith((a, b)), "choose another prompt"
    stop = (f" {c}",)
    other = next(w for w in ("w70", "w71", "w72") if w not in words)

    def ask(answer, aliases=(), **more):
        return answered(model, [prompt], [answer], [aliases], **more)[0]

    right = ask(f"{a} {b}", stop=stop)
    assert (right.exact, right.alias, right.first_token, right.right) == (True, False, True, True)
    assert right.text == f"{a} {b}"
    by_alias = ask(other, (f"The {a.upper()}  {b}",), stop=stop)
    assert (by_alias.exact, by_alias.alias, by_alias.first_token) == (False, True, False)
    assert by_alias.right
    # the name goes on, or is not complete
    for answer in (a, f"{a} {b} {c}", f"{b}"):
        wrong = ask(answer, stop=stop)
        assert not wrong.right
        assert wrong.first_token == answer.startswith(a)
    # never over: without a stop nothing shows that the answer has ended
    assert not ask(f"{a} {b}", stop=()).right
    # the same verdict from the metric
    ids = encode(model, f"{a} {b}", prepend_bos=False).ids
    greedy = Greedy(ends=end_ids(model, stop=(c,)))
    known = encode(model, prompt)
    assert score_prompts(model, [known], [Target(ids)], greedy)["greedy"].item() == 1.0
    assert score_prompts(model, [known], [Target(ids[:1])], greedy)["greedy"].item() == 0.0


@pytest.mark.slow_case("llama-bridge")
def test_answered_rows_do_not_depend_on_each_other(tiny):
    said = generate(tiny, TEXTS, max_new_tokens=12, stop=())
    words = [g.text.split() or ["w1"] for g in said]  # some end at once
    answers = [" ".join(w[: 1 + i]) for i, w in enumerate(words)]
    aliases = [["w1 w2 w3 w4 w5 w6 w7 w8"] if i % 2 else [] for i in range(len(TEXTS))]
    repair = AddVector()
    states = [None if i % 3 else s for i, s in enumerate(repair.fit(tiny, TEXTS))]
    more = {"repair": repair, "max_new_tokens": 2, "stop": (" w3", " w1", " w5")}
    found = answered(tiny, TEXTS, answers, aliases, states=states, **more)
    for i, text in enumerate(TEXTS):
        alone = answered(tiny, [text], [answers[i]], [aliases[i]], states=[states[i]], **more)
        assert found[i].prob == pytest.approx(alone[0].prob, rel=1e-4)
        assert replace(found[i], prob=alone[0].prob) == alone[0]


def test_refusals(load_tiny):
    model = load_tiny("llama")
    assert generate(model, []) == []
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, ["w1"], max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        generate(model, ["w1"], batch_size=0)
    with pytest.raises(ValueError, match="sequence of non-empty strings"):
        generate(model, ["w1"], stop=".")
    with pytest.raises(ValueError, match="sequence of non-empty strings"):
        generate(model, ["w1"], stop=("",))
    with pytest.raises(
        TokenError, match=r"2 tokens \(\+63 to come\) exceeds .*context of 64: 'w1'"
    ):
        generate(model, ["w1"], max_new_tokens=63)
    assert len(generate(model, ["w1"], max_new_tokens=62)[0].ids) <= 62
    with pytest.raises(ValueError, match="repair and states go together"):
        generate(model, ["w1"], states=[None])
    with pytest.raises(ValueError, match="1 prompts, 2 answers and 1 lists"):
        answered(model, ["w1"], ["w2", "w3"], [()])
    with pytest.raises(TokenError, match="empty answer"):
        answered(model, ["w1"], [" "])


def test_nan_logits_are_refused(load_tiny):
    model = load_tiny("llama")
    repair = AddVector()
    with pytest.raises(ValueError, match="hold NaN"):
        generate(model, ["w1"], repair=repair, states=[torch.full((32,), float("nan"))])


# -- matching --


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" New York", "New York"),
        ("new  york.", "New York"),
        ("New York, of course", "New York"),
        ("New York\nQ: What", "New York"),
        ('the "New York".', "New York"),
        ("United States", "the United States"),
        ("St. Louis. It lies", "St. Louis"),
        ("Washington, D.C. is", "Washington, D.C."),
        ("Jose\u0301.", "José"),
        ("STRASSE", "Straße"),
        ("The The.", "The The"),
        ("!!!", "!!!"),
        ("\nParis\n", "Paris"),
    ],
)
def test_matches(text, answer):
    assert matches(text, answer)


def test_punctuation_inside_a_name_counts():
    assert not matches("Washington D.C.", "Washington, D.C")
    assert matches("Washington D.C.", "Washington, D.C", ["Washington D.C."])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "\n",
        "the",
        "a.",
        "New",
        "New York City",
        "York",
        "New-York",
        "Newark. New York",
    ]
    + [". New York", ", New York", "New Yorker", "not New York"],
)
def test_does_not_match(text):
    assert not matches(text, "New York", ["NYC", "", " "])


def test_an_answer_may_begin_like_an_end():
    assert (
        matches(".NET", ".NET") and matches(".NET. It", ".NET") and matches(".NET", "C#", [".NET"])
    )
    assert not matches(".NET", "Java") and not matches(". Java", "Java", [".NET"])


def test_aliases_and_unfinished_texts():
    assert matches("NYC", "New York", ["NYC"])
    assert not matches("New York", "New York", finished=False)  # "City" may follow
    assert matches("New York. It", "New York", finished=False)
    assert matches("New York|City", "New York", stop=("|",))
    assert not matches("New York. City", "New York", stop=("|",))
    with pytest.raises(ValueError, match="is empty"):
        matches("x", " ")
    with pytest.raises(ValueError, match="aliases is the string 'NYC'"):
        matches("x", "New York", "NYC")


def test_normalise_leaves_something():
    assert normalise(" The\tBeatles ") == "beatles"
    assert normalise("“A Hard Day’s Night”!") == "hard day’s night"
    assert normalise("the") == "the"
    assert normalise("?!") == "?!"
    assert normalise("") == ""


def test_one_text_is_one_prompt_and_tokens_are_prompts(load_tiny):
    model = load_tiny("llama")
    (alone,) = generate(model, "w1 w2 w3", stop=())
    assert alone == generate(model, ["w1 w2 w3"], stop=())[0]
    tokens = torch.tensor([encode(model, text).ids for text in ("w1 w2 w3", "w4 w5 w6")])
    texts = generate(model, ["w1 w2 w3", "w4 w5 w6"], stop=())
    assert generate(model, tokens, stop=()) == texts
    assert sample(model, "w1 w2", n_tokens=2) == sample(model, ["w1 w2"], n_tokens=2)
    assert answered(model, "w1 w2", "w5") == answered(model, ["w1 w2"], ["w5"])
    target = Target((7,))
    one, same = (score_prompts(model, p, [target], "rank")["rank"] for p in ("w1", ["w1"]))
    assert torch.equal(one, same)
