"""Generation against one token at a time by hand, and the rules for what counts as the answer."""

from __future__ import annotations

import pytest
import torch

from mi_hops.model import forward
from mi_hops.sweep.generate import Generation, answered, end_ids, generate
from mi_hops.sweep.metrics import Greedy, Target
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import TokenError, decode, encode
from tests.repairs import AddVector

TEXTS = ("w1 w2 w3", "w9 w8 w4", "w5 w6 w7 w8 w9 w10", "w1 w2 w3", "w40", "w11 w12 w13")


def by_hand(model, prompt, n, repair=None, state=None):
    """Greedy tokens by full passes over one row, without cache."""
    from mi_hops.sweep.repair import Rows

    ids = list(prompt.ids)
    for _ in range(n):
        hooks = [] if repair is None else repair.hooks(model, [state], Rows((prompt,), len(ids)))
        ids.append(int(forward(model, torch.tensor([ids]), hooks=hooks)[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def up_to_end(ids, end):
    """`ids` up to and including the first `end`."""
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_equal_to_one_token_at_a_time(tiny, use_cache, batch_size):
    prompts = [encode(tiny, t) for t in TEXTS]
    found = generate(
        tiny, prompts, max_new_tokens=6, batch_size=batch_size, use_cache=use_cache, stop=()
    )
    for prompt, said in zip(prompts, found, strict=True):
        want = up_to_end(by_hand(tiny, prompt, 6), 2)
        assert said.ids == want
        assert said.finished == (want[-1] == 2)
        assert said.text == decode(tiny, want).strip()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("later", [False, True], ids=["at-prompt", "and-later"])
def test_each_row_is_under_its_own_repair(tiny, use_cache, later):
    prompts = [encode(tiny, t) for t in TEXTS]
    repair = AddVector(later=later)
    states = repair.fit(tiny, prompts)
    states[3] = None
    found = generate(
        tiny, prompts, max_new_tokens=5, stop=(), repair=repair, states=states, use_cache=use_cache
    )
    changed = 0
    for prompt, state, said in zip(prompts, states, found, strict=True):
        assert said.ids == up_to_end(by_hand(tiny, prompt, 5, repair, state), 2)
        changed += said.ids != up_to_end(by_hand(tiny, prompt, 5), 2)
    assert changed >= 3  # the repair does something, and the comparison would see it missing
    assert found[3] == generate(tiny, [prompts[3]], max_new_tokens=5, stop=())[0]


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


def test_answered_rows_do_not_depend_on_each_other(tiny):
    said = generate(tiny, TEXTS, max_new_tokens=12, stop=())
    words = [g.text.split() or ["w1"] for g in said]  # some end at once
    answers = [" ".join(w[: 1 + i]) for i, w in enumerate(words)]
    aliases = [["w1 w2 w3 w4 w5 w6 w7 w8"] if i % 2 else [] for i in range(len(TEXTS))]
    repair = AddVector()
    states = [None if i % 3 else s for i, s in enumerate(repair.fit(tiny, TEXTS))]
    more = {"repair": repair, "max_new_tokens": 2, "stop": (" w3", " w1", " w5")}
    together = answered(tiny, TEXTS, answers, aliases, states=states, **more)
    for i, text in enumerate(TEXTS):
        alone = answered(tiny, [text], [answers[i]], [aliases[i]], states=[states[i]], **more)
        assert together[i] == alone[0]


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
        TokenError, match="2 tokens and 63 to come exceed the model's context of 64"
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
        ("Washington D.C.", "Washington, D.C"),
        ("Washington, D.C. is", "Washington, D.C."),
        ("Jose\u0301.", "José"),
        ("STRASSE", "Straße"),
        ("The The.", "The The"),
        ("!!!", "!!!"),
        ("\nParis\n", "Paris"),
    ],
)
def test_matches(text, answer):
    if answer == "Washington, D.C":  # punctuation inside a name counts
        assert not matches(text, answer)
        assert matches(text, answer, ["Washington D.C."])
        return
    assert matches(text, answer)


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
