"""Prompts, answers, spans and padding."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from mi_hops.text.tokens import (
    Prompt,
    TokenError,
    align,
    answer_ids,
    batches,
    batches_by_length,
    encode,
    find_text,
    last_position,
    pad,
    positions,
)


@pytest.fixture
def model(load_tiny):
    return load_tiny("gpt2")


def test_encode_prepends_bos_once(model):
    prompt = encode(model, "w3 w4 w5")
    assert prompt.ids == (1, 7, 8, 9)
    assert prompt.labels[1:] == ("w3", "w4", "w5")
    assert encode(model, "w3 w4 w5", prepend_bos=False).ids == (7, 8, 9)
    assert prompt.offsets == ((0, 0), (0, 2), (3, 5), (6, 8))


class TestFromTokens:
    def test_a_text_and_its_tokens_make_the_same_prompt(self, model):
        for bos in (True, False):
            prompt = encode(model, "w3 w4 w5", prepend_bos=bos)
            assert Prompt.from_tokens(model, prompt.ids) == prompt
            assert Prompt.from_tokens(model, torch.tensor(prompt.ids)) == prompt
            assert Prompt.from_tokens(model, torch.tensor([prompt.ids])) == prompt
        assert Prompt.from_tokens(model, model.to_tokens("w3 w4")) == encode(model, "w3 w4")

    def test_two_bos_and_no_tokenizer(self, model):
        from types import SimpleNamespace

        ids = encode(model, "w1 w7 w8").ids
        twice = Prompt.from_tokens(model, [ids[0], *ids])  # no text gives two BOS
        assert len(twice) == 5
        assert positions(twice, "w8") == (4,)
        bare = SimpleNamespace(tokenizer=None, cfg=model.cfg)
        assert Prompt.from_tokens(bare, [3, 4]).labels == ("3", "4")

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.tensor([[1, 7], [1, 8]]), r"shape \(2, 2\)"),
            (torch.tensor([1.0, 7.0]), "float"),
            ([], "expected the token ids"),
            ([1, 90], "outside the vocabulary of 90"),
            ([7] * 65, "exceeds the model's context"),
        ],
    )
    def test_refused(self, model, ids, message):
        with pytest.raises(TokenError, match=message):
            Prompt.from_tokens(model, ids)

    def test_tokens_split_in_another_way_keep_their_spans(self):
        """ "a b" as three tokens where the tokenizer would make one."""
        model = _merging_model()
        prompt = Prompt.from_tokens(model, [0, 1, 2])
        assert prompt.text == "a b"
        assert prompt.offsets == ((0, 1), (2, 2), (2, 3))
        assert positions(prompt, "b") == (2,)


def test_long_objects_have_short_reprs(model):
    assert len(repr(encode(model, " ".join(["w3"] * 60)))) < 200
    assert len(repr(pad([[1] * 500] * 500))) < 200


class TestUnknownTokens:
    @pytest.fixture
    def model(self, checkpoints):
        from types import SimpleNamespace

        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"])
        return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=64, d_vocab=90))

    def test_prompts_and_answers_are_warned_of_once(self, model):
        with pytest.warns(UserWarning, match="2 token.* of the prompt .*such as 'Paris'") as seen:
            prompt = encode(model, "w3 Paris Rome w4")
            encode(model, "Berlin")
        assert len(seen) == 1
        with pytest.warns(UserWarning, match="1 token.* of the answer .*such as 'Athens'") as seen:
            assert answer_ids(model, prompt, "Athens") == (3,)
            answer_ids(model, prompt, "Sparta")
        assert len(seen) == 1

    def test_known_words_and_the_token_itself_are_not(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer_ids(model, encode(model, "w3 <unk> w4"), "w5")


def test_positions(model):
    prompt = encode(model, "w3 w4 w5 w6")
    assert positions(prompt, 0) == (0,)
    assert positions(prompt, -1) == (4,)
    assert positions(prompt, slice(1, 3)) == (1, 2)
    assert positions(prompt, "w4 w5") == (2, 3)
    assert positions(prompt, "W4 w5") == (2, 3)
    assert last_position(prompt, "w4 w5") == 3
    assert positions(prompt, "last") == (4,)
    assert positions(prompt, "all") == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("w9", "does not occur"),
        ("w", "occurs 4 times"),
        (" ", "empty"),
        (5, "out of range for 5 tokens"),
        (slice(3, 3), "selects none"),
    ],
)
def test_positions_refuse(model, where, message):
    with pytest.raises(TokenError, match=message):
        positions(encode(model, "w3 w4 w5 w6"), where)


def test_find_text_prefers_the_exact_case():
    assert find_text("The cat saw the dog", "the") == (12, 15)
    assert find_text("The author of Misery", "the author of Misery") == (0, 20)
    assert find_text("İzmir, İstanbul and Ankara", "ankara") == (20, 26)  # "İ" is two when small
    assert find_text("The mayor of İzmir", "the mayor of İzmir") == (0, 18)
    with pytest.raises(TokenError, match="'ana' occurs 2 times"):  # which overlap
        find_text("banana split", "ana")


def test_answers_are_continuations(model):
    prompt = encode(model, "w3 w4")
    assert answer_ids(model, prompt, "w7 w8") == (11, 12)
    assert answer_ids(model, prompt, " w7 ") == (11,)
    with pytest.raises(TokenError, match="empty answer"):
        answer_ids(model, prompt, "  ")


class TestRealTokenizerRules:
    """Byte-level and SentencePiece rules, on tokenizers of the bundled kind."""

    @pytest.fixture(params=["gpt2", "llama"])
    def model(self, request, load_tiny):
        from types import SimpleNamespace

        from mi_hops.worlds import Hopland
        from mi_hops.worlds.texts import build_tokenizer

        tokenizer = build_tokenizer(Hopland(), request.param)
        return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=64))

    def test_spans_and_answers(self, model):
        prompt = encode(model, "The spouse of Joren Ashby is")
        assert prompt.ids[0] == model.tokenizer.bos_token_id
        assert model.tokenizer.bos_token_id not in prompt.ids[1:]
        assert [prompt.text[a:b] for a, b in prompt.offsets[1:]] == prompt.text.split()
        where = positions(prompt, "the spouse of Joren Ashby")
        assert where == (1, 2, 3, 4, 5)
        ids = answer_ids(model, prompt, "Nadia del Brandt")
        assert model.tokenizer.decode(ids).strip() == "Nadia del Brandt"
        assert len(ids) == 3


def test_merging_boundary_is_refused():
    """A BPE whose prompt ends inside what would be one token with the answer."""
    model = _merging_model()
    with pytest.raises(TokenError, match="do not start with those of the prompt"):
        answer_ids(model, encode(model, "a"), "b")


def _merging_model():
    """A tokenizer that makes one token of "a b"."""
    from types import SimpleNamespace

    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")])
    )
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=9, d_vocab=5))


def test_prompt_longer_than_context(model):
    text = " ".join(["w3"] * 64)
    with pytest.raises(TokenError, match="context of 64"):
        encode(model, text)
    assert len(encode(model, text, prepend_bos=False)) == 64
    with pytest.raises(TokenError, match=r"\(\+2 to come\)"):
        encode(model, " ".join(["w3"] * 62), max_extra=2)


def test_empty_prompt(model):
    with pytest.raises(TokenError, match="empty"):
        encode(model, "  ")


def test_align_shows_both_token_lists(model):
    first, second = encode(model, "w3 w4"), encode(model, "w3 w4 w5")
    align(first, encode(model, "w5 w6"))
    with pytest.raises(TokenError, match=r"3 and 4 tokens(.|\n)*w4(.|\n)*w5"):
        align(first, second)


def test_padding():
    batch = pad([[1, 2, 3], [4], [5, 6]])
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert batch.last.tolist() == [2, 0, 1]
    assert batch.mask.sum(1).tolist() == [3, 1, 2]
    with pytest.raises(TokenError, match="at least one"):
        pad([])
    whole = torch.tensor([[5, 6], [7, 8]])
    for rows in (whole, whole.numpy(), iter(whole.tolist())):
        assert pad(rows).tokens.equal(whole)


def test_batches_cover_every_row_once():
    rows = [[1] * n for n in (3, 1, 2, 3, 1, 2, 3)]
    for made in (list(batches(rows, 3)), list(batches_by_length(rows, 2))):
        assert sorted(i for index, _ in made for i in index) == list(range(7))
        for index, batch in made:
            assert [len(rows[i]) for i in index] == batch.lengths.tolist()
    assert all(len(set(b.lengths.tolist())) == 1 for _, b in batches_by_length(rows, 2))
    with pytest.raises(TokenError, match="batch_size is 0"):
        next(batches(rows, 0))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_bos_follows_the_tokenizer_the_argument_or_the_users_own_setting(
    checkpoints, load_tiny, tmp_path, backend
):
    import shutil

    from mi_hops.model import load_model, provenance

    load_tiny("gpt2", backend)  # skips where the backend is missing
    silent = shutil.copytree(checkpoints["gpt2"], tmp_path / "silent")
    core = json.loads((silent / "tokenizer.json").read_text())
    core["post_processor"] = None
    (silent / "tokenizer.json").write_text(json.dumps(core))
    for folder, asked, want in (
        (checkpoints["gpt2"], None, True),
        (checkpoints["gpt2"], False, False),
        (silent, None, False),
        (silent, True, True),
    ):
        model = load_model(folder, backend=backend, device="cpu", bos=asked)
        assert encode(model, "w3 w4").ids == ((1, 7, 8) if want else (7, 8))
        assert provenance(model)["bos"] is want
        assert model.to_tokens("w3 w4").tolist() == [[1, 7, 8] if want else [7, 8]]
    model.cfg.default_prepend_bos = False  # as a model that was loaded elsewhere may have it
    assert not encode(model, "w3 w4").has_bos
    assert encode(model, "w3 w4", prepend_bos=True).has_bos
    core["added_tokens"] = [t for t in core["added_tokens"] if t["content"] != "<bos>"]
    (silent / "tokenizer.json").write_text(json.dumps(core))
    setup = json.loads((silent / "tokenizer_config.json").read_text())
    (silent / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in setup.items() if k != "bos_token"})
    )
    with pytest.raises(ValueError, match="has no BOS token"):
        load_model(silent, backend=backend, bos=True)
