"""Encodings and single injections: the identities that must hold whatever the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mi_hops.injection import (
    ENCODINGS,
    Encoder,
    Memory,
    MemoryInjection,
    Place,
    encode_memories,
    inject,
    memory_prompt,
    restrict_to_heads,
)
from mi_hops.model import capture, embedding, forward, hook_name, unembedding, w_o
from mi_hops.sweep.generate import generate
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import TokenError, encode, pad
from tests.models import cases
from tests.reasoning.tiny_facts import tiny_fact
from tests.repairs import greedy_by_hand

TEXT = "w1 w2 w3 w4 w5"
TEXTS = (TEXT, "w9 w8", "w5 w6 w7 w3 w4 w8 w9 w10")
MEMORIES = ("w20 w21 w22", "w30", "w31 w32")


def run(model, text, *, hooks=()):
    """Logits [pos, vocab] of one unpadded run."""
    with torch.no_grad():
        return forward(model, torch.tensor([encode(model, text).ids]), hooks=hooks)[0]


def under(model, repair, text, memory, first_hop=""):
    """Logits of one unpadded run under an injection."""
    prompt = encode(model, text)
    states = repair.fit_memories(model, [memory], first_hops=[first_hop])
    return run(model, text, hooks=repair.hooks(model, states, Rows((prompt,), len(prompt))))


def tokens_of(model, text):
    return list(memory_prompt(model, text).ids)


# -- encodings --


def test_embed_and_unembed_sum_their_rows_for_every_layer(tiny):
    ids = tokens_of(tiny, "w20 w21")
    weight, _ = unembedding(tiny)
    for encoding, want in (
        ("unembed", weight[:, ids].sum(1)),
        ("embed", embedding(tiny)[ids].sum(0)),
    ):
        found = encode_memories(tiny, ["w20 w21"], encoding)
        assert found.shape == (1, 3, 32)
        assert torch.allclose(found[0], want.expand(3, -1))


@pytest.mark.parametrize("shape", ["gpt2", "llama32"])
def test_unembed_is_embed_with_tied_unprocessed_weights_only(load_tiny, shape):
    tied = load_tiny(shape)
    both = [encode_memories(tied, MEMORIES, e) for e in ("unembed", "embed")]
    assert torch.allclose(both[0], both[1])
    folded = load_tiny(shape, processing="fold")
    both = [encode_memories(folded, MEMORIES, e) for e in ("unembed", "embed")]
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_layerwise_encodings_are_the_last_tokens_activations_run_with_bos(tiny):
    for text in MEMORIES:
        tokens = torch.tensor([encode(tiny, text).ids])
        for encoding, kind in (("layerwise_code", "attn_out"), ("layerwise_text", "resid_pre")):
            found = encode_memories(tiny, MEMORIES, encoding)[MEMORIES.index(text)]
            names = [hook_name(kind, layer) for layer in range(3)]
            cache, _ = capture(tiny, tokens, names)
            want = torch.stack([cache[name][0, -1] for name in names])
            assert torch.allclose(found, want, atol=1e-5)


def test_pooling_of_repeated_tokens(load_tiny):
    model = load_tiny()
    once, twice = (encode_memories(model, [t]) for t in ("w20 w21", "w20 w21 w20"))
    assert torch.equal(once, twice)
    summed = encode_memories(model, ["w20 w21 w20"], Encoder(pooling="sum"))
    extra = encode_memories(model, ["w20"])
    assert torch.allclose(summed, once + extra)
    mean = encode_memories(model, ["w20 w21 w20"], Encoder(pooling="mean"))
    assert torch.allclose(mean, summed / 3)


def test_a_byte_level_memory_has_no_leading_space_unless_asked():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<bos>"])
    core.train_from_iterator(["George and George", "George"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=16))
    assert memory_prompt(model, " George ").labels == ("George",)
    assert memory_prompt(model, "George", leading_space=True).labels == (" George",)


def test_a_memory_of_llama_2s_tokenizer_gets_no_second_space():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "▁", "▁George", "▁Eliot", "George"]
    core = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=16))
    for space in (False, True):  # as it is in the middle of a sentence, either way
        assert memory_prompt(model, "George Eliot", leading_space=space).ids == (3, 4)


def test_heads_restriction_equals_a_change_of_their_z(tiny):
    vectors = encode_memories(tiny, ["w20 w21"])
    part = restrict_to_heads(tiny, vectors, [2])[0, 1]
    weight = w_o(tiny, 1)[2].detach()
    change = vectors[0, 1] @ torch.linalg.pinv(weight)

    def add_z(x):
        out = x.clone()
        out[:, :, 2] += 3 * change
        return out

    by_z = run(tiny, TEXT, hooks=[(hook_name("z", 1), add_z)])
    repair = MemoryInjection(1, 3.0, encoding=Encoder(heads=[2]))
    assert torch.allclose(under(tiny, repair, TEXT, "w20 w21"), by_z, atol=1e-4)
    assert not torch.allclose(part, vectors[0, 1], atol=1e-2)
    again = restrict_to_heads(tiny, part[None, None].expand(1, 3, -1), [2])[0, 1]
    assert torch.allclose(again, part, atol=1e-5)


def test_several_heads_write_the_projection_on_their_joint_space(tiny):
    vectors = encode_memories(tiny, ["w20 w21"])
    rows = w_o(tiny, 1)[[0, 2]].detach().flatten(0, 1)
    # Least squares over both heads' z at once; the sum of two projections would count twice what
    # both can write.
    z = torch.linalg.lstsq(rows.T.double(), vectors[0, 1].double()).solution
    want = (rows.T.double() @ z).float()
    part = restrict_to_heads(tiny, vectors, [0, 2])[0, 1]
    assert torch.allclose(part, want, atol=1e-4)
    single = [restrict_to_heads(tiny, vectors, [h])[0, 1] for h in (0, 2)]
    assert not torch.allclose(part, sum(single), atol=1e-3)
    assert torch.allclose(
        restrict_to_heads(tiny, part[None, None].expand(1, 3, -1), [2, 0])[0, 1], part, atol=1e-4
    )


def test_layers_have_heads_of_their_own(tiny):
    vectors = encode_memories(tiny, ["w20 w21"])
    both = restrict_to_heads(tiny, vectors, {0: [1, 3], 2: [0]})
    assert torch.equal(both[:, 0], restrict_to_heads(tiny, vectors, [1, 3])[:, 0])
    assert torch.equal(both[:, 2], restrict_to_heads(tiny, vectors, [0])[:, 2])
    assert not both[:, 1].any()
    got = under(
        tiny,
        MemoryInjection([0, 2], 2.0, encoding=Encoder(heads={2: [0], 0: [1, 3]})),
        TEXT,
        "w20 w21",
    )
    hooks = [
        (hook_name("attn_out", layer), lambda x, v=both[0, layer]: x + 2 * v) for layer in (0, 2)
    ]
    assert torch.allclose(got, run(tiny, TEXT, hooks=hooks), atol=1e-4)


# -- injections --


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strength_zero_changes_nothing(tiny, encoding):
    repair = MemoryInjection([0, 2], 0.0, encoding=encoding)
    assert torch.equal(under(tiny, repair, TEXT, "w20 w21"), run(tiny, TEXT))


def test_attention_output_equals_resid_mid_and_any_heads_output(tiny):
    vector = encode_memories(tiny, ["w20 w21"])[0, 1]
    at_attn = under(tiny, MemoryInjection(1, 4.0), TEXT, "w20 w21")
    at_mid = under(tiny, MemoryInjection(1, 4.0, kind="resid_mid"), TEXT, "w20 w21")
    assert torch.allclose(at_attn, at_mid, atol=1e-4)
    by_hand = run(tiny, TEXT, hooks=[(hook_name("attn_out", 1), lambda x: x + 4 * vector)])
    assert torch.allclose(at_attn, by_hand, atol=1e-5)
    assert not torch.allclose(at_attn, run(tiny, TEXT), atol=1e-2)


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
@pytest.mark.parametrize("head", [0, 3])
def test_the_published_place_one_heads_result_is_the_same(load_tiny, shape, backend, head):
    model = load_tiny(shape, backend, fresh=True)
    model.set_use_attn_result(True)
    vector = encode_memories(model, ["w20 w21"])[0, 1]

    def to_head(x):
        out = x.clone()
        out[:, :, head] += 4 * vector
        return out

    published = run(model, TEXT, hooks=[("blocks.1.attn.hook_result", to_head)])
    assert torch.allclose(
        published, under(model, MemoryInjection(1, 4.0), TEXT, "w20 w21"), atol=1e-4
    )


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("everywhere", (0, 1, 2, 3, 4, 5)),
        ("all", (0, 1, 2, 3, 4, 5)),
        ("last", (5,)),
        ("first hop", (4,)),
        (["first hop", "last"], (4, 5)),
        (2, (2,)),
        ("w2 w3", (2, 3)),
        (slice(1, 3), (1, 2)),
        ([0, -1], (0, 5)),
    ],
)
def test_places(load_tiny, positions, expected):
    assert Place(positions).find(encode(load_tiny(), TEXT), "w3 w4") == expected


def test_positions_before_the_injection_do_not_change(tiny):
    changed = under(tiny, MemoryInjection([0, 1], 5.0, positions="w3 w4"), TEXT, "w20")
    plain = run(tiny, TEXT)
    assert torch.allclose(changed[:3], plain[:3], atol=1e-6)
    assert ((changed - plain)[3:].abs().amax(-1) > 1e-3).all()


def test_a_constant_added_to_the_vector_does_not_matter_under_layernorm(load_tiny):
    model = load_tiny("gpt2")
    repair = MemoryInjection(1, 3.0)
    prompt = encode(model, TEXT)
    vectors = encode_memories(model, ["w20"])[0]
    states = [Memory(("w20",), vectors + c) for c in (0.0, 7.0)]
    rows = Rows((prompt,), len(prompt))
    both = [run(model, TEXT, hooks=repair.hooks(model, [s], rows)) for s in states]
    assert torch.allclose(both[0], both[1], atol=1e-4)


@pytest.mark.parametrize("positions", ["everywhere", "all", "last", "first hop", [0, "last"]])
@pytest.mark.parametrize("relative", [False, True])
def test_rows_with_their_own_memories_equal_one_by_one(tiny, positions, relative):
    repair = MemoryInjection([0, 2], [2.0, 0.5], positions=positions, relative=relative)
    hops = ("w3 w4", "w8", "w7 w3")
    prompts = tuple(encode(tiny, t) for t in TEXTS)
    states = [*repair.fit_memories(tiny, MEMORIES, first_hops=hops)]
    batch = pad([p.ids for p in prompts])
    hooks = repair.hooks(tiny, [states[0], None, states[2]], Rows(prompts, batch.tokens.shape[1]))
    with torch.no_grad():
        got = logits_at(tiny, batch.tokens, batch.last[:, None], hooks=hooks)[:, 0]
    want = [
        under(tiny, repair, TEXTS[0], MEMORIES[0], hops[0])[-1],
        run(tiny, TEXTS[1])[-1],
        under(tiny, repair, TEXTS[2], MEMORIES[2], hops[2])[-1],
    ]
    for row, one in zip(got, want, strict=True):
        assert torch.allclose(row, one, atol=1e-4)


def test_relative_strength_one_is_as_long_as_what_is_there(tiny):
    prompt = encode(tiny, TEXT)
    repair = MemoryInjection(1, 1.0, relative=True, positions="last")
    (hook,) = repair.hooks(tiny, repair.fit_memories(tiny, ["w20"]), Rows((prompt,), len(prompt)))
    x = torch.randn(1, len(prompt), 32, generator=torch.Generator().manual_seed(0))
    added = hook[1](x) - x
    assert torch.allclose(added[0, -1].norm(), x[0, -1].norm(), atol=1e-4)
    assert not added[0, :-1].any()


def test_several_memories_add_up(tiny):
    repair = MemoryInjection(1, 2.0)
    one, two, both = repair.fit_memories(tiny, ["w20", "w21 w22", ["w20", "w21 w22"]])
    assert torch.allclose(one.vectors + two.vectors, both.vectors, atol=1e-5)


@pytest.mark.parametrize("positions", ["everywhere", "all", "last", "first hop"])
def test_generation_with_its_cache_equals_generation_without(tiny, positions):
    # Strong enough to change what is said, which the last assertion checks.
    repair = MemoryInjection([0, 1], 3.0, positions=positions)
    states = repair.fit_memories(tiny, MEMORIES, first_hops=("w3 w4", "w8", "w7 w3"))
    options = {"max_new_tokens": 5, "repair": repair, "states": states, "stop": ()}
    cached = generate(tiny, TEXTS, **options)
    assert [g.ids for g in cached] == [
        greedy_by_hand(tiny, encode(tiny, text), 5, repair, state)
        for text, state in zip(TEXTS, states, strict=True)
    ]
    plain = generate(tiny, TEXTS, max_new_tokens=5, stop=())
    assert [g.ids for g in cached] != [g.ids for g in plain]


def test_facts_get_their_bridge_answer_or_what_a_function_says(load_tiny):
    model = load_tiny()
    fact = tiny_fact("w3 w11 w5", "w1 w3 w11 w5 w12")
    for memory, want in (
        ("bridge", "w20"),
        ("answer", "w40"),
        (lambda f: [f.bridge, f.answer], None),
    ):
        (state,) = MemoryInjection(1, 1.0, memory=memory).fit(model, [fact])
        texts = [want] if want else ["w20", "w40"]
        assert state.texts == tuple(texts)
        assert torch.allclose(state.vectors, encode_memories(model, texts).sum(0))
        assert state.first_hop == "w3 w11 w5"
    assert isinstance(MemoryInjection(1, 1.0), Repair)


def test_a_prompt_without_the_first_hop_is_refused_or_left(load_tiny):
    model = load_tiny()
    prompt = encode(model, "w7 w8")
    for absent in ("raise", "leave"):
        repair = MemoryInjection(1, 1.0, positions="first hop", absent=absent)
        states = repair.fit_memories(model, ["w20"], first_hops=["w3 w4"])
        if absent == "leave":
            assert repair.hooks(model, states, Rows((prompt,), 3)) == []
        else:
            with pytest.raises(TokenError, match="w3 w4"):
                repair.hooks(model, states, Rows((prompt,), 3))


def test_only_the_place_that_is_missing_is_left_out(load_tiny):
    model = load_tiny()
    both = tuple(encode(model, t) for t in ("w1 w3 w4 w5", "w7 w8"))
    repair = MemoryInjection(1, 1.0, positions=["first hop", "last"], absent="leave")
    states = repair.fit_memories(model, ["w20", "w21"], first_hops=["w3 w4"] * 2)
    assert [repair.where(p, s) for p, s in zip(both, states, strict=True)] == [(3, 4), (2,)]
    ((_, add),) = repair.hooks(model, states, Rows(both, 5))
    touched = add(torch.zeros(2, 5, 32)).abs().sum(-1) > 0
    assert touched.tolist() == [[False] * 3 + [True] * 2, [False, False, True, False, False]]
    with pytest.raises(TokenError, match="w3 w4"):
        MemoryInjection(1, 1.0, positions=["first hop", "last"]).where(both[1], states[1])


def test_rows_of_one_batch_are_brought_up_and_suppressed_at_once(tiny):
    repair = MemoryInjection(2, 2.0, positions="last")
    prompts = tuple(encode(tiny, t) for t in TEXTS[:2])
    up, down = repair.fit_memories(tiny, ["w30", "w30"])
    batch = pad([p.ids for p in prompts])
    hooks = repair.hooks(tiny, [up, down.times(-1)], Rows(prompts, batch.tokens.shape[1]))
    with torch.no_grad():
        got = logits_at(tiny, batch.tokens, batch.last[:, None], hooks=hooks)[:, 0]
    minus = MemoryInjection(2, -2.0, positions="last")
    for row, text, each in zip(got, TEXTS, (repair, minus), strict=False):
        assert torch.allclose(row, under(tiny, each, text, "w30")[-1], atol=1e-4)


# -- the context manager --


def test_the_context_manager_injects_and_leaves_nothing_behind(tiny):
    want = under(tiny, MemoryInjection(1, 4.0), TEXT, "w20 w21")
    before = run(tiny, TEXT)
    with inject(tiny, "w20 w21", layers=1, strength=4.0):
        assert torch.allclose(run(tiny, TEXT), want, atol=1e-5)
    with inject(tiny, "w20 w21", layers=1, strength=4.0, prompts=TEXT, positions="all"):
        assert torch.allclose(run(tiny, TEXT), want, atol=1e-5)
    with pytest.raises(KeyError), inject(tiny, "w20", layers=1, strength=4.0):
        raise KeyError
    assert torch.equal(run(tiny, TEXT), before)


def test_the_context_manager_never_touches_padding(tiny):
    batch = pad([encode(tiny, t).ids for t in TEXTS])
    seen = {}

    def look(x):
        seen["x"] = x.clone()

    def activations():
        with torch.no_grad():
            forward(tiny, batch.tokens, hooks=[(hook_name("attn_out", 0), look)])
        return seen["x"]

    plain = activations()
    with inject(tiny, "w20", layers=0, strength=4.0, prompts=TEXTS):
        changed = activations()
    assert torch.equal((changed != plain).any(-1), batch.mask)


def test_the_context_manager_refuses_what_it_cannot_place(load_tiny):
    model = load_tiny()
    with (
        pytest.raises(ValueError, match="pass prompts="),
        inject(model, "w20", layers=1, strength=1.0, positions="last"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="made for 1 prompts"),
        inject(model, "w20", layers=1, strength=1.0, prompts="w1 w2 w3"),
    ):
        run(model, "w1")
    with (
        pytest.raises(RuntimeError, match="never fired"),
        inject(model, "w20", layers=1, strength=1.0),
    ):
        pass


@pytest.mark.parametrize("positions", ["last", "everywhere"])
def test_rows_that_are_not_the_prompts_padded_on_the_right_are_refused(tiny, positions):
    prompts = [encode(tiny, t) for t in TEXTS[:2]]
    right = pad([p.ids for p in prompts]).tokens
    left = torch.stack([right[0], right[1].roll(len(prompts[0]) - len(prompts[1]))])
    assert left[1, 0] == 0 and left[1, -1] == prompts[1].ids[-1]
    settings = {"layers": 1, "strength": 4.0, "prompts": prompts, "positions": positions}
    with inject(tiny, "w20", **settings), torch.no_grad():
        whole = tiny(right)
        with pytest.raises(ValueError, match="row 1 does not begin with its prompt"):
            tiny(left)
        for other in (right[:1], right[[1, 0]], right[:, 1:]):
            with pytest.raises(ValueError, match="made for 2 prompts"):
                tiny(other)
        # What follows a prompt is the caller's: an answer, say.
        longer = tiny(torch.cat([right, right[:, -1:]], dim=1))
    assert torch.allclose(longer[0, : len(prompts[0])], whole[0, : len(prompts[0])], atol=1e-4)
    with torch.no_grad():
        assert tiny(left).shape == whole.shape  # nothing stays behind


# -- bad input --


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: encode_memories(m, [" "]), "memory is empty"),
        (lambda m: encode_memories(m, []), "at least one memory"),
        (lambda m: encode_memories(m, "w1"), "in a sequence"),
        (lambda m: encode_memories(m, ["w1"], "unbed"), "unknown encoding 'unbed'"),
        (lambda m: Encoder(pooling="max"), "unknown pooling 'max'"),
        (lambda m: MemoryInjection(3, 1.0).fit_memories(m, ["w1"]), "0..2"),
        (
            lambda m: MemoryInjection(1, 1.0, encoding=Encoder(heads=[4])).fit_memories(m, ["w1"]),
            "0..3",
        ),
        (lambda m: MemoryInjection(1, 1.0).fit_memories(m, [[]]), "no text"),
        (lambda m: MemoryInjection([], 1.0), "one or more"),
        (lambda m: MemoryInjection([1, 2], [1.0]), "2 layers and 1 strengths"),
        (lambda m: MemoryInjection(1, 1.0, kind="z"), "cannot inject at 'z'"),
        (
            lambda m: MemoryInjection(1, 1.0, kind="mlp_out", encoding=Encoder(heads=[1])),
            "attn_out",
        ),
        (
            lambda m: MemoryInjection([1, 2], 1.0, encoding=Encoder(heads={1: [0]})),
            "heads are given for layers",
        ),
        (lambda m: restrict_to_heads(m, torch.ones(1, 3, 32), {3: [0]}), "0..2"),
        (lambda m: restrict_to_heads(m, torch.ones(1, 3, 32), {1: []}), "distinct heads"),
        (lambda m: MemoryInjection(1, 1.0, encoding="glove"), "unknown encoding"),
        (lambda m: MemoryInjection(1, 1.0, memory="subject"), "'bridge', 'answer'"),
        (lambda m: MemoryInjection(1, 1.0, absent="skip"), "'raise' or 'leave'"),
        (
            lambda m: under(m, MemoryInjection(1, 1.0, positions="first hop"), TEXT, "w1"),
            "first hop",
        ),
        (lambda m: under(m, MemoryInjection(1, 1.0, positions=9), TEXT, "w1"), "out of range"),
        (lambda m: under(m, MemoryInjection(1, 1.0, positions=[]), TEXT, "w1"), "no position"),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tiny())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_where_they_are_read(tiny, monkeypatch, dtype):
    right = {e: encode_memories(tiny, ["w20"], e) for e in ENCODINGS if e.startswith("layerwise")}
    monkeypatch.setattr(type(tiny), "W_U", torch.zeros(32, 90).to(dtype))
    monkeypatch.setattr(type(tiny), "W_E", torch.zeros(90, 32).to(dtype))
    for encoding, name in (("unembed", "the unembedding"), ("embed", "the embedding")):
        with pytest.raises(
            ValueError, match=f"^{name} is stored as .*; load the model unquantised"
        ):
            encode_memories(tiny, ["w20"], encoding)
    # These read activations, which are numbers whatever the weights are stored as.
    for encoding, want in right.items():
        assert torch.equal(encode_memories(tiny, ["w20"], encoding), want)


def test_a_quantised_output_projection_is_refused_for_heads(load_tiny, monkeypatch):
    model = load_tiny("gpt2", fresh=True)
    codes = torch.zeros(4, 8, 32, dtype=torch.int8)
    monkeypatch.setattr(type(model.blocks[1].attn), "W_O", codes, raising=False)
    with pytest.raises(ValueError, match="W_O of layer 0 is stored as torch.int8"):
        MemoryInjection(1, 1.0, encoding=Encoder(heads=[0])).fit_memories(model, ["w20"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_memory_longer_than_the_context_is_refused(load_tiny, encoding):
    text = " ".join(f"w{i}" for i in range(80))
    with pytest.raises(TokenError, match="context of 64"):
        encode_memories(load_tiny(), [text], encoding)


# -- what a TransformerLens user types --


@pytest.mark.parametrize("kind", ["attn_out", "resid_pre", "resid_mid", "resid_post", "mlp_out"])
def test_a_vector_of_ones_own_in_transformer_lens_calls(tiny, kind):
    tokens = torch.tensor([encode(tiny, TEXT).ids])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    by_hand = run(
        tiny, TEXT, hooks=[(hook_name(kind, i), lambda x: x + 2 * vector) for i in (0, 2)]
    )
    hooks = inject(tiny, vector, layers=[0, 2], strength=2.0, kind=kind)
    with torch.no_grad():
        found = [tiny.run_with_hooks(tokens, fwd_hooks=hooks)]
        with tiny.hooks(fwd_hooks=hooks):
            found.append(tiny(tokens))
        with hooks:
            found.append(tiny(tokens))
        plain = tiny(tokens)
    for logits in found:
        assert torch.allclose(logits[0], by_hand, atol=1e-4)
    assert torch.allclose(plain[0], run(tiny, TEXT), atol=1e-5)  # nothing stays behind
    assert not torch.allclose(plain[0], by_hand, atol=1e-2)
    assert len(repr(hooks)) < 300


def test_a_vector_for_each_layer(tiny):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    hooks = [(hook_name("attn_out", i), lambda x, v=vectors[i]: x + v) for i in (0, 2)]
    want = run(tiny, TEXT, hooks=hooks)
    tokens = torch.tensor([encode(tiny, TEXT).ids])
    for memory, layers in (
        (vectors, [0, 2]),
        ({0: vectors[0], 2: vectors[2]}, None),
        (vectors.numpy(), (0, 2)),
    ):
        with torch.no_grad():
            logits = tiny.run_with_hooks(tokens, fwd_hooks=inject(tiny, memory, layers=layers))
        assert torch.allclose(logits[0], want, atol=1e-4)
    assert "a vector" in repr(MemoryInjection([0, 2], 1.0).fit_memories(tiny, [vectors])[0])


def test_a_fact_may_get_a_vector(tiny):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    repair = MemoryInjection(1, 3.0, positions="last", memory=lambda fact: vector)
    item = tiny_fact("w3 w5", TEXT)
    prompt = encode(tiny, TEXT)
    states = repair.fit(tiny, [item])
    got = run(tiny, TEXT, hooks=repair.hooks(tiny, states, Rows((prompt,), len(prompt))))

    def add(x):
        return torch.cat([x[:, :-1], x[:, -1:] + 3 * vector], dim=1)

    assert torch.allclose(got, run(tiny, TEXT, hooks=[(hook_name("attn_out", 1), add)]), atol=1e-4)


def test_own_vectors_are_restricted_to_heads(load_tiny):
    model = load_tiny()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    repair = MemoryInjection(1, 1.0, encoding=Encoder(heads=[2]))
    (state,) = repair.fit_memories(model, [vector])
    assert torch.allclose(state.vectors, restrict_to_heads(model, vector.expand(3, -1), [2]))


def test_token_ids_and_prompts_are_prompts(tiny):
    texts = ["w1 w2 w3", "w4 w5 w3"]
    prompts = [encode(tiny, text) for text in texts]
    batch = torch.tensor([prompt.ids for prompt in prompts])
    settings = {"layers": 1, "strength": 4.0, "positions": "last"}
    with torch.no_grad(), inject(tiny, "w20", prompts=texts, **settings):
        want = tiny(batch)
    for given in (batch, list(batch), prompts, [texts[0], batch[1]]):
        hooks = inject(tiny, "w20", prompts=given, **settings)
        with torch.no_grad():
            assert torch.allclose(tiny.run_with_hooks(batch, fwd_hooks=hooks), want, atol=1e-5)
        with pytest.raises(ValueError, match="made for 2 prompts"):
            tiny.run_with_hooks(batch[:1], fwd_hooks=hooks)
    with torch.no_grad(), inject(tiny, "w20", prompts=batch[0], **settings):
        assert torch.allclose(tiny(batch[:1])[0], want[0], atol=1e-4)


def test_everywhere_goes_on_behind_the_prompt_and_all_ends_with_it(load_tiny):
    model = load_tiny()
    prompt = encode(model, TEXT)
    for positions, further in (("everywhere", 2), ("all", 0), (["everywhere", 0], 2)):
        repair = MemoryInjection(1, 1.0, positions=positions)
        rows = Rows((prompt,), len(prompt) + 2)  # two answer tokens follow
        ((_, add),) = repair.hooks(model, repair.fit_memories(model, ["w20"]), rows)
        touched = add(torch.zeros(1, len(prompt) + 2, 32)).abs().sum(-1) > 0
        assert touched.sum() == len(prompt) + further


@pytest.mark.parametrize(
    ("memory", "settings", "message"),
    [
        (torch.ones(31), {"layers": 1}, r"shape \(32,\) or \(3, 32\)"),
        (torch.ones(2, 32), {"layers": [0, 1]}, r"shape \(32,\) or \(3, 32\)"),
        (torch.ones(32, dtype=torch.long), {"layers": 1}, "floating-point"),
        (torch.full((32,), torch.inf), {"layers": 1}, "not finite"),
        ({1: torch.ones(32)}, {"layers": [1, 2]}, r"no vector for layers \[2\]"),
        ({5: torch.ones(32)}, {}, "0..2"),
        (torch.ones(32), {}, "layers is missing"),
        ("w20", {"layers": 1, "strength": float("nan")}, "finite"),
    ],
)
def test_vectors_that_cannot_be_meant_are_refused(load_tiny, memory, settings, message):
    with pytest.raises(ValueError, match=message):
        inject(load_tiny(), memory, **settings)
