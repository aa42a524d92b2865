"""CREME against the procedure written out layer by layer, and its identities."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mi_hops.editing import (
    CremeRepair,
    Edit,
    Request,
    SingularError,
    creme,
    creme_joint,
    default_layers,
    edit_hooks,
    second_moments,
)
from mi_hops.facts import load_chains, load_geo
from mi_hops.model import capture, dtype_of, forward, hook_name, read_matrix, write_matrix
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.text.tokens import encode, pad
from tests.editing.conftest import (
    TEMPLATES,
    assert_same_bits,
    make_fact,
    paper,
    paper_many,
    put_back,
    weights,
)
from tests.models import cases


def last_mean(model, texts, kind, layer, position=None):
    """Mean over prompts, each run alone, of an activation at the last token."""
    found = []
    for text in texts:
        tokens = torch.tensor([encode(model, text).ids])
        cache, _ = capture(model, tokens, [hook_name(kind, layer)])
        value = cache[hook_name(kind, layer)][0].flatten(1)
        found.append(value[-1 if position is None else position(tokens)])
    return torch.stack(found).mean(0)


def plain_creme(model, composite, guide, layers, templates, inverse=None, clean_guide=False):
    """Layer by layer in the weights, which stay changed; returns the new W_O by layer."""
    comps = [t.format(composite) for t in templates]
    guides = [t.format(guide) for t in templates]
    targets = {i: last_mean(model, guides, "attn_out", i) for i in layers}
    out = {}
    for layer in sorted(layers):
        k = last_mean(model, comps, "z", layer)
        a = last_mean(model, comps, "attn_out", layer)
        v = targets[layer] if clean_guide else last_mean(model, guides, "attn_out", layer)
        direction = k if inverse is None else inverse[layer] @ k
        new = read_matrix(model, "W_O", layer) + torch.outer(direction / (direction @ k), v - a)
        write_matrix(model, "W_O", layer, new)
        out[layer] = new
    return out


@pytest.mark.parametrize(
    "layers, target", [([1], "edited"), ([2, 0, 1], "edited"), ([2, 0, 1], "clean")], ids=str
)
def test_one_pass_equals_the_layer_by_layer_procedure(wide, fact, layers, target):
    before = weights(wide)
    edit = paper(wide, fact, layers=layers, templates=TEMPLATES, target=target)
    assert_same_bits(wide, before)
    asked = fact.prompt("suffix"), fact.second_prompt("suffix")
    with put_back(wide, layers) as originals:
        plain = plain_creme(wide, *asked, layers, TEMPLATES, clean_guide=target == "clean")
    assert edit.layers == tuple(sorted(layers))
    for change in edit.changes:
        got = originals[change.layer] + change.delta()
        assert change.rank == 1
        torch.testing.assert_close(got, plain[change.layer], atol=1e-9, rtol=0)


def test_with_covariance_equals_the_plain_procedure(wide, fact, facts):
    moments = second_moments(wide, facts, layers=[0, 1], shrinkage=0.1)
    edit = paper(wide, fact, layers=[0, 1], templates=TEMPLATES, covariance=moments)
    inverse = {i: torch.linalg.inv(moments.shrunk(i)) for i in (0, 1)}
    asked = fact.prompt(), fact.second_prompt()
    with put_back(wide, [0, 1]) as originals:
        plain = plain_creme(wide, *asked, [0, 1], TEMPLATES, inverse=inverse)
    for change in edit.changes:
        got = originals[change.layer] + change.delta()
        torch.testing.assert_close(got, plain[change.layer], atol=1e-7, rtol=1e-7)
    identity = paper(wide, fact, layers=[0, 1], templates=TEMPLATES)
    assert (identity.changes[0].delta() - edit.changes[0].delta()).abs().max() > 1e-3


def test_full_shrinkage_is_the_identity(wide, fact, facts):
    moments = second_moments(wide, facts, layers=[1], shrinkage=1.0)
    with_c = paper(wide, fact, layers=[1], templates=TEMPLATES, covariance=moments)
    without = paper(wide, fact, layers=[1], templates=TEMPLATES)
    torch.testing.assert_close(with_c.changes[0].delta(), without.changes[0].delta())


def lower_part(edit, layer):
    """The edit's changes below a layer, as an edit."""
    below = tuple(c for c in edit.changes if c.layer < layer)
    return Edit(method="part", changes=below, fingerprint=edit.fingerprint) if below else None


@pytest.mark.parametrize("position", ["last", "first hop"])
def test_the_edited_weight_maps_key_to_value(wide, fact, position):
    """With the whole edit, the composite's attention output is the guide's under the lower part."""
    edit = paper(wide, fact, layers=[0, 1, 2], templates=("{}",), position=position)
    back = {"last": 0, "first hop": 1}[position]  # tokens after the first hop
    where = [encode(wide, text).last - back for text in (fact.prompt(), fact.second_prompt())]
    for layer in (0, 1, 2):
        below = lower_part(edit, layer)
        with below.applied(wide) if below else nullcontext():
            want = last_mean(
                wide, [fact.second_prompt()], "attn_out", layer, position=lambda _: where[1]
            )
        with edit.applied(wide):
            got = last_mean(wide, [fact.prompt()], "attn_out", layer, position=lambda _: where[0])
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_many_equal_one_by_one(tiny, facts):
    """Whatever the chunks; in float32."""
    alone = [paper(tiny, f, layers=[0, 2], templates=TEMPLATES) for f in facts]
    for batch_size in (1, 13, 500):
        together = paper_many(
            tiny, facts, layers=[0, 2], templates=TEMPLATES, batch_size=batch_size
        )
        for a, b in zip(alone, together, strict=True):
            assert a.request == b.request
            for x, y in zip(a.changes, b.changes, strict=True):
                torch.testing.assert_close(x.delta(), y.delta(), atol=2e-5, rtol=1e-4)


def test_one_call_takes_a_fact_a_request_or_several(tiny, facts):
    alone = creme(tiny, facts[0])
    assert isinstance(alone, Edit)
    assert alone.layers == default_layers(tiny) == (2,)  # the last third of three blocks
    assert alone.settings["strength"] == 0.7 and alone.settings["covariance"] is None
    asked = Request.from_fact(facts[0], keep="hops")
    several = creme(tiny, [facts[0], asked, facts[1]])
    assert [e.request["id"] for e in several] == ["f0", "f0", "f1"]
    for edit in (creme(tiny, asked, layers=2), *several[:2], creme(tiny, iter(facts[:1]))[0]):
        torch.testing.assert_close(edit.changes[0].delta(), alone.changes[0].delta())
    half = creme(tiny, facts[0], strength=0.35)
    torch.testing.assert_close(2 * half.changes[0].delta(), alone.changes[0].delta())


def test_form_is_taken_from_the_fact(tiny, fact):
    edit = paper(tiny, fact, layers=[1], form="prefix", templates=("{}",))
    assert edit.request["two_hop_prompt"] == fact.prompt("prefix")
    assert edit.request["second_hop_prompt"] == fact.second_prompt("prefix")


def test_kept_prompts_keep_their_output(wide, fact):
    layers = [0, 1]
    kept = [fact.first_prompt("suffix"), fact.second_prompt("suffix")]
    strict = paper(wide, fact, layers=layers, templates=("{}",), keep="hops", slack=0.0)
    assert strict.request["keep"] == kept
    loose = paper(wide, fact, layers=layers, templates=("{}",))
    clean = {(t, i): last_mean(wide, [t], "attn_out", i) for t in kept for i in layers}
    moved = {}
    for name, edit in (("strict", strict), ("loose", loose)):
        with edit.applied(wide):
            # The first edited layer sees the same keys as before, so its output stays exactly.
            moved[name] = max(
                (last_mean(wide, [t], "attn_out", 0) - clean[t, 0]).abs().max() for t in kept
            )
    assert moved["strict"] < 1e-9 < 1e-3 < moved["loose"]


def test_what_is_kept_can_be_chosen(wide, fact):
    def neighbours(f):
        return ["w8 w9 w0"]

    edit = paper(wide, fact, layers=[0], templates=("{}",), keep=neighbours, slack=0.0)
    want = last_mean(wide, neighbours(fact), "attn_out", 0)
    with edit.applied(wide):
        torch.testing.assert_close(last_mean(wide, neighbours(fact), "attn_out", 0), want)
    assert edit.settings["keep"] == "neighbours"


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
@pytest.mark.parametrize("target", ["edited", "clean"])
def test_matching_the_residual_stream(wide, fact, layers, target):
    """After the edit the stream behind the last edited attention is the guide's."""
    edit = paper(wide, fact, layers=layers, templates=("{}",), match="residual", target=target)
    below = lower_part(edit, layers[-1]) if target == "edited" else None
    with below.applied(wide) if below else nullcontext():
        want = last_mean(wide, [fact.second_prompt()], "resid_mid", layers[-1])
    with edit.applied(wide):
        got = last_mean(wide, [fact.prompt()], "resid_mid", layers[-1])
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_covering_the_answer_edits_every_answer_position(wide, fact):
    edit = paper(wide, fact, layers=[1], templates=("{}",), cover="answer")
    assert edit.changes[0].rank == 2
    for tail in ("", f" {fact.answer.split()[0]}"):
        want = last_mean(wide, [fact.second_prompt() + tail], "attn_out", 1)
        with edit.applied(wide):
            got = last_mean(wide, [fact.prompt() + tail], "attn_out", 1)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama", "llama32"))
def test_half_precision_is_solved_in_float32(load_tiny, fact, shape, backend, dtype):
    """What is left of the change at the key is the rounding of weights and activations."""
    model = load_tiny(shape, backend, dtype)
    edit = paper(model, fact, layers=[1], templates=("{}",))
    assert {f.dtype for c in edit.changes for f in c.tensors.values()} == {torch.float32}
    before, want = (
        last_mean(model, [text], "attn_out", 1).float()
        for text in (fact.prompt(), fact.second_prompt())
    )
    with edit.applied(model):
        got = last_mean(model, [fact.prompt()], "attn_out", 1).float()
    assert (got - want).norm() < 8 * torch.finfo(dtype_of(model)).eps * (before - want).norm()


def test_biases_cancel(load_tiny, fact):
    """The edit does not depend on b_O: v* - a is a difference."""
    model = load_tiny("gpt2", "bridge", "float64", fresh=True)
    a = paper(model, fact, layers=[0], templates=("{}",)).changes[0]
    z = last_mean(model, [fact.prompt()], "z", 0)
    g = last_mean(model, [fact.second_prompt()], "z", 0)
    want = torch.outer(z / (z @ z), (g - z) @ read_matrix(model, "W_O", 0))
    torch.testing.assert_close(a.delta(), want, atol=1e-10, rtol=1e-8)


def test_repair_protocol(tiny, facts):
    repair = CremeRepair(layers=[0, 1], templates=TEMPLATES)
    assert isinstance(repair, Repair) and repair.name == "CREME"
    states = repair.fit(tiny, facts[:2])
    prompts = [encode(tiny, f.prompt()) for f in facts[:3]]
    batch = pad([p.ids for p in prompts])
    rows = Rows(tuple(prompts), batch.tokens.shape[1])
    with torch.no_grad():
        clean = forward(tiny, batch.tokens)
        got = forward(tiny, batch.tokens, hooks=repair.hooks(tiny, [*states, None], rows))
        torch.testing.assert_close(got[2], clean[2])
        for i, edit in enumerate(states):
            with edit.applied(tiny):
                n = len(prompts[i])
                want = forward(tiny, torch.tensor([prompts[i].ids]))[0]
                torch.testing.assert_close(got[i, :n], want, atol=2e-4, rtol=1e-3)
                assert (got[i, :n] - clean[i, :n]).abs().max() > 1e-2


def test_works_beside_edits_that_are_applied(wide, facts):
    """Made on an edited model, an edit belongs on top of the first one."""
    first = paper(wide, facts[0], layers=[1], templates=("{}",))
    with first.applied(wide):
        second = paper(wide, facts[1], layers=[1], templates=("{}",))
        third = paper(wide, facts[2], layers=[1], templates=("{}",))
        want = last_mean(wide, [facts[1].second_prompt()], "attn_out", 1)
    assert second.fingerprint != first.fingerprint
    with pytest.raises(ValueError, match="made for weights"):
        second.apply(wide)
    assert third.fingerprint == second.fingerprint  # both made on the once edited model
    with first.applied(wide), third.applied(wide), second.applied(wide):
        pass
    with first.applied(wide), second.applied(wide):
        got = last_mean(wide, [facts[1].prompt()], "attn_out", 1)
        torch.testing.assert_close(got, want)


def test_the_defaults_equal_the_procedure_written_out(wide, fact, facts):
    """Residual matched, answer covered, hops kept: layer by layer in the weights."""
    layers, slack = [0, 2], 0.1
    moments = second_moments(wide, facts, layers=layers, shrinkage=0.1)
    edit = creme(wide, fact, layers=layers, templates=TEMPLATES, covariance=moments, form="suffix")
    said = ["", f" {fact.answer.split()[0]}"]
    comps, guides = (
        [[t.format(text) + tail for t in TEMPLATES] for tail in said]
        for text in (fact.prompt("suffix"), fact.second_prompt("suffix"))
    )
    kept = [fact.first_prompt("suffix"), fact.second_prompt("suffix")]
    with put_back(wide, layers) as originals:
        for layer, change in zip(layers, edit.changes, strict=True):
            rows = [last_mean(wide, texts, "z", layer) for texts in (*comps, *([t] for t in kept))]
            lack = [
                last_mean(wide, there, "resid_mid", layer)
                - last_mean(wide, here, "resid_mid", layer)
                for here, there in zip(comps, guides, strict=True)
            ]
            keys, right = torch.stack(rows), torch.zeros(4, len(lack[0]), dtype=torch.float64)
            right[:2] = torch.stack(lack)
            g = keys @ torch.linalg.inv(moments.shrunk(layer))
            m = keys @ g.T
            m += slack * m.diagonal().mean() * torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0]))
            want = 0.7 * g.T @ torch.linalg.solve(m, right)
            torch.testing.assert_close(change.delta(), want, atol=1e-6, rtol=1e-6)
            write_matrix(wide, "W_O", layer, originals[layer] + want)


# -- bad input ------------------------------------------------------------------------------------


def request_with(**changes):
    good = {
        "two_hop_prompt": "w3 w4 w1 w5 w0",
        "second_hop_prompt": "w3 w4 w20 w0",
        "bridge": "w20",
    }
    return Request(**(good | changes))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: request_with(second_hop_prompt="w3 w4 w1 w5 w0"), "change nothing"),
        (lambda: request_with(bridge="w21"), "does not appear in the second-hop prompt"),
        (lambda: request_with(bridge=" "), "bridge is empty"),
        (lambda: request_with(first_hop="w9 w9"), "does not appear in the two-hop prompt"),
        (
            lambda: request_with(first_hop="w1 w5", two_hop_prompt="w1 w5 w4 w1 w5"),
            "appears 2 times",
        ),
        (
            lambda: request_with(first_hop="w1 w5", second_hop_prompt="w3 w20 w0"),
            "in the same words",
        ),
        (
            lambda: request_with(first_hop="w1 w5", second_hop_prompt="w3 w4 w20 w6"),
            "in the same words",
        ),
        (lambda: Request.from_slot("w3 w4", first_hop="w5", bridge="w6"), "exactly one slot"),
        (lambda: Request.from_slot("{} w3 {}", first_hop="w5", bridge="w6"), "exactly one slot"),
        (lambda: request_with(keep="w7 w8"), "keep: got the text 'w7 w8'"),
        (
            lambda: Request.from_fact(make_fact(), keep=lambda fact: fact.first_prompt()),
            "what keep gives for fact 'f0': got the text",
        ),
    ],
    ids="null no-bridge empty no-first-hop two-first-hops before behind no-slot two-slots text "
    "function".split(),
)
def test_requests_that_cannot_be_met(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "two_hop, second_hop, bridge, first_hop",
    [
        ("The home of The author of It is", "the home of King is", "King", "the author of It"),
        ("The mayor of the birthplace of Ada", "The mayor of Adana", "Adana", "birthplace of Ada"),
        ("The head of Adana's host is", "The head of  the US's host is", "US", "Adana"),
        ("The ruler of Ada, unlike Adana, is", "The ruler of Bo, unlike Adana, is", "Bo", "Ada"),
    ],
)
def test_case_articles_and_longer_words_are_no_other_question(
    two_hop, second_hop, bridge, first_hop
):
    Request(
        two_hop_prompt=two_hop, second_hop_prompt=second_hop, bridge=bridge, first_hop=first_hop
    )


@pytest.mark.parametrize(
    "facts", [load_geo(), [c.at(1) for c in load_chains()]], ids=["geo", "chains"]
)
def test_every_bundled_fact_makes_a_request_in_every_form(facts):
    for fact in facts:
        for form in fact.prompts:
            named = Request.from_fact(fact, form).bridge
            assert named == fact.meta.get("in_text", {}).get("bridge", fact.bridge)


@pytest.mark.parametrize(
    "asked, settings, words",
    [
        (request_with(), {"layers": []}, "one or more"),
        (request_with(), {"layers": [1, 1]}, "each once"),
        (request_with(), {"layers": [3]}, "out of range"),
        (request_with(), {"layers": [-1]}, "out of range"),
        (request_with(), {"layers": [1], "templates": ()}, "no context templates"),
        (request_with(), {"layers": [1], "templates": ("w1",)}, "exactly one slot"),
        (request_with(), {"layers": [1], "target": "dirty"}, "target is 'dirty'"),
        (request_with(), {"layers": [1], "position": "first hop"}, "names its first hop"),
        (request_with(), {"layers": [1], "cover": "answer"}, "needs the target"),
        (
            request_with(second_hop_prompt="w3 nowhere w0", bridge="nowhere"),
            {"layers": [1]},
            "does not know",
        ),
        (request_with(two_hop_prompt="w3 " * 70 + "w0"), {"layers": [1]}, "context"),
    ],
    ids="no-layer twice range negative no-template no-slot target first-hop answer unknown long".split(),
)
def test_bad_input_leaves_the_model_alone(tiny, asked, settings, words):
    before = weights(tiny)
    with pytest.raises(ValueError, match=words):
        paper(tiny, asked, **settings)
    assert_same_bits(tiny, before)


def test_a_fact_without_a_second_hop_prompt(tiny):
    fact = make_fact()
    bare = fact.from_dict({k: v for k, v in fact.to_dict().items() if k != "second_prompts"})
    with pytest.raises(ValueError, match="one form of both"):
        paper(tiny, bare, layers=[1])


def test_numbers_may_be_numpys(tiny, fact, facts):
    for given in (np.int64(1), np.array([1])):
        assert creme(tiny, fact, layers=given).layers == (1,)
    half = creme(tiny, fact, layers=1, strength=np.float32(0.5))
    assert (
        half.equals(creme(tiny, fact, layers=1, strength=0.5)) and half.settings["strength"] == 0.5
    )
    joint = creme_joint(tiny, facts[:2], layers=1, ridge=np.float32(0.5))
    assert joint.equals(creme_joint(tiny, facts[:2], layers=1, ridge=0.5))


def test_singular_covariance(tiny, fact):
    moments = second_moments(tiny, ["w3 w4"], layers=[1], shrinkage=0.0)
    with pytest.raises(SingularError, match="layer 1 is singular"):
        paper(tiny, fact, layers=[1], covariance=moments)


def test_covariance_of_other_weights_or_layers(tiny, load_tiny, fact, facts):
    moments = second_moments(tiny, facts, layers=[1])
    with pytest.raises(ValueError, match=r"expected W_O at \[0, 1\]"):
        paper(tiny, fact, layers=[0, 1], covariance=moments)
    other = load_tiny("llama32", "bridge")
    with pytest.raises(ValueError, match="the covariance was made for weights"):
        paper(other, fact, layers=[1], covariance=moments)


def test_exact_keeping_of_dependent_prompts_is_refused(tiny, fact):
    twice = Request.from_fact(fact, "suffix")
    kept = Request(**{**vars(twice), "keep": (fact.prompt("suffix"),)})
    with pytest.raises(
        SingularError, match=f"{fact.prompt('suffix')}' in layer 0.*not independent"
    ):
        paper(tiny, kept, layers=[0], templates=("{}",), keep="hops", slack=0.0)


def test_an_edit_of_processed_weights_says_so(load_tiny, fact):
    model = load_tiny("gpt2", "bridge", processing="fold")
    edit = paper(model, fact, layers=[1])
    assert edit.processing == "fold" and "'fold'" in repr(edit)
    with edit.applied(model):
        got = last_mean(model, [fact.prompt()], "attn_out", 1)
    assert torch.isfinite(got).all()


def test_non_finite_activations(load_tiny, fact):
    model = load_tiny("llama", "bridge", fresh=True)
    weight = read_matrix(model, "W_O", 0)
    model.blocks[0].attn.W_O.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        paper(model, fact, layers=[1])
    write_matrix(model, "W_O", 0, weight)


def test_wrong_number_of_rows(tiny, facts):
    edits = paper_many(tiny, facts[:2], layers=[1])
    with pytest.raises(ValueError, match="given for 2 rows, the pass has 1"):
        forward(tiny, torch.tensor([[1, 5, 6]]), hooks=edit_hooks(tiny, edits))
