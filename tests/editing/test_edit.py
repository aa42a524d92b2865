"""The life cycle of an edit: weights, stack, rows, files."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_hops.editing import (
    AppliedError,
    Change,
    CremeRepair,
    CremeSettings,
    Edit,
    EditRepair,
    Request,
    WrongWeightsError,
    applied_edits,
    creme_joint,
    creme_many,
    describe,
    edit_hooks,
    second_moments,
    stack,
)
from mi_hops.editing.baselines import GraceRepair, RomeRepair
from mi_hops.model import dtype_of, fingerprint, forward, read_matrix
from mi_hops.model.plain import PlainPasses, plain_passes
from mi_hops.sweep import target_of
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.sweep.scoring import logits_at, score_prompts
from mi_hops.text.tokens import encode
from tests.editing.conftest import assert_same_bits, break_copies, make_fact, weights
from tests.models import SHAPES, cases

TOKENS = torch.tensor([[1, 9, 30, 7, 12], [1, 4, 5, 6, 50], [1, 80, 3, 2, 8]])


def random_edit(model, seed=0, matrices=("W_O", "W_out"), layers=(0, 2), rank=1, scale=0.1):
    """Random factors for a model; `rank` 0 makes a dense change."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for matrix in matrices:
        for layer in layers:
            sizes = {"W_O": model.cfg.n_heads * model.cfg.d_head, "W_out": model.cfg.d_mlp}
            d_in, d_out = sizes[matrix], model.cfg.d_model
            left = scale * torch.randn(rank, d_in, generator=generator) if rank else None
            right = torch.randn(rank or d_in, d_out, generator=generator) * (1 if rank else scale)
            changes.append(Change(matrix, layer, left, right))
    return Edit(method="random", changes=tuple(changes), fingerprint=fingerprint(model))


def by_hand(model, edits):
    """Logits with every change added to the weights by hand, then taken away."""
    before = weights(model)
    for edit in edits:
        for c in edit.changes:
            block = model.blocks[c.layer]
            w = block.attn.W_O if c.matrix == "W_O" else block.mlp.W_out
            w.data += c.delta().to(w.dtype).reshape(w.shape)
    with torch.no_grad():
        out = forward(model, TOKENS)
        for n, p in model.named_parameters():
            p.copy_(before[n])
    return out


@pytest.mark.parametrize("rank", [1, 3, 0])
def test_applied_equals_by_hand_and_comes_off(tiny, rank):
    edit = random_edit(tiny, rank=rank)
    before = weights(tiny)
    want = by_hand(tiny, [edit])
    with edit.applied(tiny) as same, torch.no_grad():
        assert same is edit and edit.is_applied(tiny)
        torch.testing.assert_close(forward(tiny, TOKENS), want)
    assert not edit.is_applied(tiny)
    assert_same_bits(tiny, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_cast_once_and_undone_bit_for_bit(load_tiny, shape, backend, dtype):
    model = load_tiny(shape, backend, dtype)
    edits = [random_edit(model, seed=i) for i in range(3)]
    before = weights(model)
    old = read_matrix(model, "W_O", 0)
    joint = stack(edits)
    with joint.applied(model):
        parts = [old.double(), *(e.changes[0].delta().double() for e in edits)]
        want, size = sum(parts), sum(p.abs() for p in parts)
        # One rounding to the weight's dtype, after a sum in float32.
        wide, narrow = torch.finfo(torch.float32).eps, torch.finfo(dtype_of(model))
        allowed = 0.5 * narrow.eps * want.abs() + 4 * wide * size + narrow.smallest_normal
        assert ((read_matrix(model, "W_O", 0) - want).abs() <= allowed).all()
    for e in edits:
        e.apply(model, check=False)
    assert applied_edits(model) == tuple(edits)
    for e in reversed(edits):
        e.undo(model)
    assert_same_bits(model, before)


def test_order_of_undoing(tiny):
    first, second = random_edit(tiny, 1), random_edit(tiny, 2)
    before = weights(tiny)
    first.apply(tiny)
    second.apply(tiny)
    assert describe(tiny).splitlines() == [f"0: {first}", f"1: {second}"]
    with pytest.raises(AppliedError, match="last first"):
        first.undo(tiny)
    with pytest.raises(AppliedError, match="already applied"):
        first.apply(tiny)
    for copied in (deepcopy(first), deepcopy(second)):
        with pytest.raises(AppliedError, match="an equal edit is applied"):
            copied.apply(tiny)
        with pytest.raises(AppliedError, match="undo it first"):
            EditRepair(copied).fit(tiny, [make_fact()])
    second.undo(tiny)
    with pytest.raises(AppliedError, match="not applied"):
        second.undo(tiny)
    first.undo(tiny)
    assert describe(tiny) == "none"
    assert_same_bits(tiny, before)


def test_leaving_a_block_undoes_what_was_left_inside(tiny):
    before = weights(tiny)
    with pytest.raises(KeyError), random_edit(tiny, 1).applied(tiny):
        random_edit(tiny, 2).apply(tiny)
        tiny.blocks[0].attn.W_O.data.add_(1)
        raise KeyError
    assert applied_edits(tiny) == ()
    assert_same_bits(tiny, before)


def test_an_undo_does_not_hide_a_foreign_change(tiny):
    edit = random_edit(tiny)
    before = weights(tiny)
    edit.apply(tiny)
    tiny.blocks[2].attn.W_O.data.add_(1)
    with pytest.raises(ValueError, match="W_O of layer 2 was changed by something else"):
        edit.undo(tiny)
    edit.undo(tiny, force=True)
    assert_same_bits(tiny, before)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_mid_apply_changes_nothing(tiny, monkeypatch, kind):
    edit = random_edit(tiny)
    before = weights(tiny)
    for when in range(4):
        with monkeypatch.context() as patch:
            break_copies(patch, kind("stop"), {when}, half=False)
            with pytest.raises(kind):
                edit.apply(tiny)
        assert applied_edits(tiny) == ()
        assert_same_bits(tiny, before)


def test_overflow_in_the_weights_dtype(load_tiny):
    model = load_tiny("llama", "bridge", "float16")
    before = weights(model)
    with pytest.raises(ValueError, match="layer 2 would hold non-finite"):
        edit = random_edit(model)
        huge = Change("W_O", 2, edit.changes[1].left, edit.changes[1].right * 1e7)
        Edit(method="x", changes=(edit.changes[0], huge), fingerprint=edit.fingerprint).apply(model)
    assert_same_bits(model, before)


def test_damaged_weights(load_tiny):
    model = load_tiny("llama", "bridge", fresh=True)
    edit = random_edit(model)
    model.blocks[0].attn.W_O.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        edit.apply(model, check=False)


def test_other_weights_are_refused(load_tiny, tmp_path):
    gpt2, llama = load_tiny("gpt2", "bridge"), load_tiny("llama", "bridge")
    edit = random_edit(gpt2, matrices=("W_O",))
    path = edit.save(tmp_path / "edit.safetensors")
    for attempt in (
        lambda: edit.apply(llama),
        lambda: Edit.load(path, llama),
        lambda: edit_hooks(llama, [edit], check=True),
    ):
        with pytest.raises(WrongWeightsError, match=edit.fingerprint):
            attempt()
    small = Edit(
        method="x",
        changes=(Change("W_O", 0, None, torch.ones(4, 4)),),
        fingerprint=fingerprint(gpt2),
    )
    with pytest.raises(ValueError, match=r"\(4, 4\), the model's is \(32, 32\)"):
        small.apply(gpt2)


def test_both_classes_share_edits(load_tiny):
    hooked, bridge = load_tiny("gpt2", "hooked"), load_tiny("gpt2", "bridge")
    edit = random_edit(hooked)
    with edit.applied(hooked), edit.applied(bridge), torch.no_grad():
        torch.testing.assert_close(
            forward(hooked, TOKENS), forward(bridge, TOKENS), atol=1e-4, rtol=1e-4
        )


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (12, 1), (0, 2), (1,)], ids=str)
def test_row_hooks_equal_the_weight_form(tiny, ranks):
    made = [random_edit(tiny, seed=i, rank=r) for i, r in enumerate(ranks)]
    under = [made[0], None, tuple(made)]
    with torch.no_grad():
        got = forward(tiny, TOKENS, hooks=edit_hooks(tiny, under))
        clean = forward(tiny, TOKENS)
    assert torch.equal(got[1], clean[1])
    for row, edits in ((0, made[:1]), (2, made)):
        torch.testing.assert_close(got[row], by_hand(tiny, edits)[row], atol=2e-4, rtol=1e-4)
        assert (got[row] - clean[row]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_row_hooks_in_every_dtype(load_tiny, shape, backend, dtype):
    """A different edit a row is each row's weights, but for the rounding of the model's dtype."""
    model = load_tiny(shape, backend, dtype)
    made = [random_edit(model, seed=i, rank=r) for i, r in enumerate((1, 3, 0))]
    under = [made[0], None, made[1:]]
    with torch.no_grad():
        clean = forward(model, TOKENS)
        got = forward(model, TOKENS, hooks=edit_hooks(model, under))
        assert got.dtype == clean.dtype and torch.equal(got[1], clean[1])
        for row, edits in ((0, made[:1]), (2, made[1:])):
            with stack(edits).applied(model):
                want = forward(model, TOKENS)[row]
            effect = (want - clean[row]).norm()
            assert (got[row] - want).norm() < 16 * torch.finfo(dtype_of(model)).eps * effect


def test_transformer_lens_takes_the_hooks_as_they_are(tiny):
    """run_with_hooks, hooks() and run_with_cache, with nothing of this package around them."""
    made = [random_edit(tiny, seed=i, rank=r) for i, r in enumerate((1, 3, 0))]
    hooks = edit_hooks(tiny, [made[0], None, made[1:]])
    name = "blocks.2.hook_resid_post"
    with torch.no_grad():
        want = forward(tiny, TOKENS, hooks=hooks)
        got = tiny.run_with_hooks(TOKENS, return_type="logits", fwd_hooks=hooks)
        with tiny.hooks(fwd_hooks=hooks):
            inside, cache = tiny.run_with_cache(TOKENS, names_filter=name, return_type="logits")
        clean = tiny.run_with_hooks(TOKENS, return_type="logits", fwd_hooks=[])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inside, want, atol=1e-5, rtol=1e-5)
    assert cache[name].shape == (*TOKENS.shape, tiny.cfg.d_model)
    torch.testing.assert_close(got[1], clean[1], atol=1e-5, rtol=1e-5)
    assert (got[0] - clean[0]).abs().max() > 1e-2


@pytest.mark.parametrize("shape, backend", cases(*SHAPES))
def test_plain_passes_take_a_different_edit_in_every_row(load_tiny, shape, backend):
    """Rows that begin alike, of one edit, of others and of none; padded, the last one shorter."""
    model = load_tiny(shape, backend, "float32")
    made = [random_edit(model, seed=i, rank=r) for i, r in enumerate((1, 3, 0))]
    tokens = torch.tensor([[1, 9, 30, 7, 12]] * 5 + [[1, 9, 30, 0, 0]])
    tokens[1, 3:] = torch.tensor([8, 4])
    scored = torch.tensor([[3, 4]] * 5 + [[1, 2]])
    for under in (
        [made[0], made[0], made[1], None, tuple(made), made[0]],
        [made[2], None, made[2], None, None, made[1]],
        [made[0]] * 6,
    ):
        hooks = edit_hooks(model, under)
        with torch.no_grad():
            found = plain_passes(model).at(tokens, scored, hooks.changes)
            torch.testing.assert_close(
                found, logits_at(model, tokens, scored, hooks=hooks), atol=2e-4, rtol=1e-4
            )
            assert (found - plain_passes(model).at(tokens, scored)).abs().max() > 1e-2


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_edits_are_scored_in_plain_passes(load_tiny, shape, backend):
    model = load_tiny(shape, backend, "float32")
    made = [random_edit(model, seed=i) for i in range(2)]
    prompts = [encode(model, text) for text in ("w7 w30 w22", "w7 w30 w9 w4", "w7 w30 w22")]
    targets = [target_of(model, p, "w8 w5") for p in prompts]
    asked = [model, prompts, targets, ["answer_logprob"]]
    states = {"repair": EditRepair({}), "states": [made[0], (made[0], made[1]), None]}
    with mock.patch.object(PlainPasses, "at", autospec=True, side_effect=PlainPasses.at) as plain:
        found = score_prompts(*asked, **states)
    assert plain.called
    with mock.patch.object(PlainPasses, "at") as plain:
        nothing = [("blocks.0.hook_resid_post", lambda x: x)]
        hooked = score_prompts(*asked, **states, hooks=nothing)
    assert not plain.called
    torch.testing.assert_close(found, hooked, atol=2e-4, rtol=1e-4)
    assert found["answer_logprob"].unique().numel() == 3


def test_one_edit_on_all_rows(tiny):
    edit = random_edit(tiny)
    with torch.no_grad():
        got = forward(tiny, TOKENS, hooks=edit_hooks(tiny, [edit] * 3))
    torch.testing.assert_close(got, by_hand(tiny, [edit]), atol=2e-4, rtol=1e-4)


def test_no_edits_no_hooks(tiny):
    assert edit_hooks(tiny, [None, (), None]) == []


def test_given_edits_as_a_repair(tiny, load_tiny, facts):
    first, second = (random_edit(tiny, seed=i) for i in range(2))
    everywhere = EditRepair(first)
    assert isinstance(everywhere, Repair)
    assert everywhere.fit(tiny, facts[:2]) == [first, first]
    some = EditRepair({facts[1].id: [first, second]}, name="two")
    states = some.fit(tiny, facts[:2])
    assert states == [None, [first, second]] and some.name == "two"
    prompt = encode(tiny, "w5 w26 w3 w8")
    tokens = torch.tensor([prompt.ids] * 2)
    with torch.no_grad():
        hooks = some.hooks(tiny, states, Rows((prompt, prompt), tokens.shape[1]))
        got = forward(tiny, tokens, hooks=hooks)
        with first.applied(tiny), second.applied(tiny):
            want = forward(tiny, tokens[1:])
        torch.testing.assert_close(got[1:], want, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(got[0], forward(tiny, tokens[:1])[0])
    with pytest.raises(WrongWeightsError):
        everywhere.fit(load_tiny("llama32", "bridge"), facts)
    with first.applied(tiny):
        assert EditRepair(second).fit(tiny, facts[:1]) == [second]
        for repair in (everywhere, some):
            with pytest.raises(AppliedError, match="undo it first"):
                repair.fit(tiny, facts[:2])


# -- stacking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 2), (0, 1), (20, 20)], ids=str)
def test_a_stack_is_the_sum(tiny, ranks):
    edits = [random_edit(tiny, seed=i, rank=r) for i, r in enumerate(ranks)]
    one = stack(edits)
    assert len(one.changes) == 4 and len(one.request["stack"]) == 2
    want = by_hand(tiny, edits)
    with one.applied(tiny), torch.no_grad():
        torch.testing.assert_close(forward(tiny, TOKENS), want, atol=2e-4, rtol=1e-4)


def test_stack_refuses_strangers(load_tiny):
    edits = [random_edit(load_tiny(s, "bridge"), matrices=("W_O",)) for s in ("gpt2", "llama")]
    with pytest.raises(ValueError, match="for weights"):
        stack(edits)
    with pytest.raises(ValueError, match="no edits"):
        stack([])
    assert stack(edits, check=False).fingerprint == edits[0].fingerprint


def test_bad_edits():
    change = Change("W_O", 0, None, torch.ones(2, 2))
    with pytest.raises(ValueError, match="one change for each matrix"):
        Edit(method="x", changes=(change, change), fingerprint="")
    with pytest.raises(ValueError, match="plain JSON"):
        Edit(method="x", changes=(change,), fingerprint="", request={"a": object()})
    with pytest.raises(ValueError, match="ranks 2 and 3"):
        Change("W_O", 0, torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        Change("W_O", 0, None, torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="float32 or float64"):
        Change("W_O", 0, None, torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="unknown matrix 'W_Q'"):
        Change("W_Q", 0, None, torch.ones(2, 2))
    with pytest.raises(ValueError, match="plain JSON"):
        Edit(method="x", changes=(change,), fingerprint="", settings={"a": np.float32("nan")})
    with pytest.raises(ValueError, match="layer is -1; expected a number from 0"):
        Change("W_O", -1, None, torch.ones(2, 2))


# -- files ----------------------------------------------------------------------------------------


def assert_same_edit(a, b):
    assert (a.method, a.fingerprint, a.processing) == (b.method, b.fingerprint, b.processing)
    assert (a.request, a.settings) == (b.request, b.settings)
    assert [c.site for c in a.changes] == [c.site for c in b.changes]
    for x, y in zip(a.changes, b.changes, strict=True):
        assert (x.left is None) == (y.left is None)
        for name in x.tensors:
            assert torch.equal(x.tensors[name], y.tensors[name])
            assert x.tensors[name].dtype == y.tensors[name].dtype


@st.composite
def edits(draw):
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
        max_leaves=5,
    )
    sites = draw(
        st.lists(
            st.tuples(st.sampled_from(["W_O", "W_out"]), st.integers(0, 40)),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    changes = []
    for matrix, layer in sites:
        rank, dtype = draw(st.integers(0, 3)), draw(st.sampled_from([torch.float32, torch.float64]))
        d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        left = torch.randn(rank, d_in, generator=generator, dtype=dtype) if rank else None
        right = torch.randn(rank or d_in, d_out, generator=generator, dtype=dtype)
        changes.append(Change(matrix, layer, left, right))
    return Edit(
        method=draw(st.text(max_size=5)),
        changes=tuple(changes),
        fingerprint=draw(st.text(max_size=5)),
        request=draw(st.dictionaries(st.text(max_size=4), json_values, max_size=3)),
        settings=draw(st.dictionaries(st.text(max_size=4), json_values, max_size=3)),
    )


@settings(max_examples=30, deadline=None)
@given(edit=edits())
def test_save_and_load_round_trip(tmp_path_factory, edit):
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    assert edit.save(path) == path
    assert_same_edit(Edit.load(path), edit)
    assert os.listdir(path.parent) == ["edit.safetensors"]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), rank=st.integers(0, 4), scale=st.sampled_from([1e-6, 0.1, 30.0]))
def test_apply_save_load_undo_round_trip(load_tiny, tmp_path_factory, seed, rank, scale):
    model = load_tiny("llama", "bridge", "bfloat16")
    before = weights(model)
    edit = random_edit(model, seed=seed, rank=rank, scale=scale)
    loaded = Edit.load(edit.save(tmp_path_factory.mktemp("e") / "x.safetensors"), model)
    with edit.applied(model):
        inside = weights(model)
    assert_same_bits(model, before)
    with loaded.applied(model):
        assert_same_bits(model, inside)
    assert_same_bits(model, before)


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "edit.safetensors"
    first, second = random_edit(tiny, 1), random_edit(tiny, 2)
    first.save(path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        second.save(path, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        second.save(tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == ["edit.safetensors"]
    assert_same_edit(Edit.load(path), first)


def test_files_that_are_no_edits(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "nothing")
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a tensor in sight")
    bare = tmp_path / "bare"
    save_file({"x": torch.ones(1)}, bare)
    newer = tmp_path / "newer"
    save_file({"x": torch.ones(1)}, newer, {"mi_hops_edit": json.dumps({"format": 99})})
    lacking = tmp_path / "lacking"
    head = {
        "format": 1,
        "method": "x",
        "fingerprint": "",
        "processing": "none",
        "sites": [["W_O", 1]],
        "request": {},
        "settings": {},
    }
    save_file({"x": torch.ones(1)}, lacking, {"mi_hops_edit": json.dumps(head)})
    damaged = []
    for i, change in enumerate(
        [{"sites": 3}, {"sites": [["W_O", "1"]]}, {"sites": [[[], 1]]}, {"request": 3}, {"more": 1}]
    ):
        damaged.append(tmp_path / f"damaged{i}")
        save_file(
            {"W_O.1.right": torch.ones(1, 1)},
            damaged[-1],
            {"mi_hops_edit": json.dumps(head | change)},
        )
    for i, text in enumerate(["[]", "3", "{", "[" * 100_000]):
        damaged.append(tmp_path / f"head{i}")
        save_file({"x": torch.ones(1)}, damaged[-1], {"mi_hops_edit": text})
    for path in (junk, bare, newer, lacking, *damaged):
        with pytest.raises(ValueError, match=path.name):
            Edit.load(path)


@pytest.mark.parametrize("what", ["edit", "moments"])
def test_one_rule_of_saving(tiny, tmp_path, what):
    made = random_edit(tiny) if what == "edit" else second_moments(tiny, ["w5 w6 w7"], layers=[0])
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        made.save(path)
    assert made.save(path, overwrite=True) == path
    for name in ("a", "a.pt", "a.safetensors.bak"):
        with pytest.raises(ValueError, match="does not end in '.safetensors'"):
            made.save(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="make it first"):
        made.save(tmp_path / "no folder" / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_printing(tiny, facts):
    edit = creme_many(tiny, facts[:1], layers=[0, 2])[0]
    text = repr(edit)
    for part in ("creme", facts[0].prompt(), facts[0].answer, "0, 2", "rank 2", edit.fingerprint):
        assert part in text and part in edit._repr_html_()
    assert edit.n_bytes == 4 * sum(t.numel() for c in edit.changes for t in c.tensors.values())


def test_nothing_floods_a_cell(tiny, facts):
    moments = second_moments(tiny, facts)
    request = Request(
        two_hop_prompt="w1 " * 3000, second_hop_prompt="w2 " * 3000, bridge="w2", keep=["w3"] * 900
    )
    (edit,) = creme_many(tiny, facts[:1], covariance=moments)
    long = Edit(
        method="x" * 3000, changes=edit.changes, fingerprint="f" * 3000, request=request.to_dict()
    )
    shown = [
        edit,
        long,
        moments,
        request,
        edit.changes,
        stack([edit] * 3),
        creme_joint(tiny, facts),
    ]
    shown += [CremeRepair(covariance=moments), EditRepair(edit), RomeRepair(layer=1)]
    shown += [CremeSettings(covariance=moments), GraceRepair(layer=1, steps=1).fit(tiny, facts[:1])]
    for each in shown:
        assert len(repr(each)) < 2000, type(each)
        html = getattr(each, "_repr_html_", str)()
        assert len(html) < 2000, type(each)
    assert (
        "<b>"
        not in Edit(
            method="<b>", changes=edit.changes, fingerprint="<b>", request={"two_hop_prompt": "<b>"}
        )._repr_html_()
    )


def test_a_model_rounded_since_is_told_before_it_is_undone(load_tiny):
    model = load_tiny("gpt2", fresh=True)
    edit = random_edit(model)
    edit.apply(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="was in torch.float32 .* is in torch.bfloat16 now"):
        edit.undo(model)
    model.to(torch.float32)
    edit.undo(model, force=True)
    assert applied_edits(model) == ()
