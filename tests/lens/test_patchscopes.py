"""Patchscopes: the logit lens as a special case, one hooked forward a pair, generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.lens import (
    Affine,
    Place,
    Readout,
    entity_description_prompt,
    fit_affine,
    logit_lens,
    next_token_prompt,
    patchscope,
    patchscope_generate,
)
from mi_hops.lens.patchscopes import Transplant
from mi_hops.lens.vectors import states_at
from mi_hops.model import forward, load_model
from mi_hops.sweep.generate import generate
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.repair import Rows
from mi_hops.text.corpus import fact_texts
from mi_hops.text.tokens import encode
from mi_hops.worlds import Hopland
from tests.models import save_checkpoint
from tests.patching.loops import put, run
from tests.repairs import greedy_by_hand

SOURCES = ("w1 w2 w3 w4 w5", "w9 w8")
TARGET = "w20 w21 w22 w23"


def test_the_logit_lens_is_the_patchscope_into_the_last_layer(tiny):
    track = {"a": ["w7", "w8 w9"]}
    source, target = Place(SOURCES, position=["w3", -1]), Place(TARGET, layers=3)
    scope = patchscope(tiny, source, target, top_k=3, track=track)
    here = {"here": ["w3", -1]}
    lens = logit_lens(tiny, SOURCES, positions=here, track=track, readout=Readout(top_k=3))
    for name in ("prob", "rank", "mean_token_prob", "entropy", "top_probs"):
        got = scope[name].isel(target_layer=0).values
        assert np.allclose(got, lens[name].isel(position=0).values, atol=1e-4), name
    tops = scope["top_tokens"].isel(target_layer=0).values
    assert (tops == lens["top_tokens"].isel(position=0).values).all()


def test_a_prompts_own_state_in_its_own_place_changes_nothing(tiny):
    scope = patchscope(tiny, Place(TARGET, 2), Place(TARGET, 2), track={"a": "w7"})
    for layer in range(4):
        own = scope["prob"].sel(source_layer=layer, target_layer=layer).values
        assert np.allclose(own, scope["prob_before"].values, atol=1e-6)
    assert np.abs(scope["prob"].values - scope["prob_before"].values[:, None, None]).max() > 1e-4


def test_every_pair_equals_one_hooked_forward(tiny):
    targets = (TARGET, "w30 w31 w32 w33 w34 w35")
    goal, track = Place(targets, ["w21", "w33"]), {"a": ["w7", "w8"]}
    scope = patchscope(tiny, SOURCES, goal, track=track, limits=Limits(max_rows=5))
    for i, (source, target, at) in enumerate(zip(SOURCES, targets, (2, 4), strict=True)):
        known = encode(tiny, source)
        states = states_at(tiny, [known], [known.last], layers=[0, 1, 2, 3])[0]
        for start, end in ((0, 2), (3, 0), (1, 3), (2, 2)):
            kind, layer = ("resid_post", 2) if end == 3 else ("resid_pre", end)
            hook = put(kind, layer, states[start : start + 1], [at], take=[0])
            want = run(tiny, target, [hook], "first_prob", ("w7", "w8")[i])
            got = scope["prob"].values[i, start, end, 0]
            assert np.isclose(got, want, atol=1e-5)


def test_states_are_the_stream_after_so_many_blocks(tiny):
    prompt = encode(tiny, SOURCES[0])
    last = states_at(tiny, [prompt], [2], layers=[3])[0, 0]
    with torch.no_grad():
        want = forward(tiny, torch.tensor([prompt.ids]))[0, 2]
        got = tiny.ln_final(last[None, None])[0, 0] @ tiny.W_U
        bias = getattr(tiny, "b_U", None)
    assert torch.allclose(got + (0 if bias is None else bias), want, atol=1e-4)


@pytest.mark.parametrize(("layer", "position"), [(1, 2), (3, -1), (0, "w22")])
def test_generation_goes_on_from_the_changed_state(tiny, layer, position):
    places = Place(SOURCES[0], "w3", layers=2), Place(TARGET, position, layers=layer)
    said = patchscope_generate(tiny, *places, max_new_tokens=4, stop=())
    source, target = encode(tiny, SOURCES[0]), encode(tiny, TARGET)
    state = states_at(tiny, [source], [3], layers=[2])[0, 0]
    at = {2: 2, -1: 4, "w22": 3}[position]
    assert said.ids == greedy_by_hand(tiny, target, 4, Transplant(layer, at), state)


def test_a_transplant_acts_in_the_pass_that_holds_its_position(load_tiny):
    model, prompt = load_tiny(), encode(load_tiny(), TARGET)
    repair = Transplant(1, 3)
    assert repair.hooks(model, [None], Rows((prompt,), 1, offset=4)) == []
    ((name, act),) = repair.hooks(
        model, [torch.ones(32), None], Rows((prompt, prompt), 2, offset=2)
    )
    x = act(torch.zeros(2, 2, 32))
    assert name == "blocks.1.hook_resid_pre"
    assert x[0, 1].eq(1).all() and not x[0, 0].any() and not x[1].any()
    with pytest.raises(ValueError, match="other prompts"):
        repair.fit(model, [])


def test_maps_between_models(load_tiny):
    model, other = load_tiny("gpt2"), load_tiny("llama")
    plain = patchscope(model, SOURCES[0], TARGET, track={"a": "w7"})
    identity = {
        (s, t): Affine(torch.eye(32), torch.zeros(32), s, t) for s in range(4) for t in range(4)
    }
    mapping = lambda x, s, t: identity[s, t](x, s, t)  # noqa: E731
    mapped = patchscope(model, SOURCES[0], TARGET, track={"a": "w7"}, mapping=mapping)
    assert np.allclose(plain["prob"], mapped["prob"], atol=1e-6)
    places = Place(SOURCES[0], layers=1), Place(TARGET, layers=2)
    here = patchscope(model, *places, track={"a": "w7"}, mapping=identity[1, 2])
    want = plain["prob"].sel(source_layer=1, target_layer=2)
    assert np.isclose(here["prob"].item(), want.item(), atol=1e-6)
    with pytest.raises(ValueError, match="from layer 1 to layer 2, not from 0 to 0"):
        patchscope(model, SOURCES[0], TARGET, mapping=identity[1, 2])
    across = patchscope(model, SOURCES[0], TARGET, source_model=other, track={"a": "w7"})
    assert across.provenance["source_model"] != across.provenance["fingerprint"]
    source = encode(other, SOURCES[0])
    state = states_at(other, [source], [source.last], layers=[1])[0]
    want = run(model, TARGET, [put("resid_pre", 2, state, [-1], take=[0])], "first_prob", "w7")
    assert np.isclose(across["prob"].sel(source_layer=1, target_layer=2).item(), want, atol=1e-5)


def test_a_fitted_map_finds_a_linear_relation(load_tiny):
    # After 0 blocks a LLaMA's stream is the token's embedding, which is linear in a one-hot; the
    # layer-0 stream of the same model is the simplest target whose map is known: the identity.
    model = load_tiny("llama")
    texts = [f"w{i} w{(i * 7) % 86} w{(i * 5 + 2) % 86}" for i in range(60)]
    fitted = fit_affine(model, model, texts, source_layer=0, target_layer=0, ridge=1e-9)
    assert torch.allclose(fitted.weight, torch.eye(32), atol=1e-3)
    assert fitted.bias.abs().max() < 1e-3
    # Least squares over the corpus cannot be worse there than any one affine map, such as no change.
    onward = fit_affine(model, model, texts, source_layer=2, target_layer=3, ridge=1e-9)
    two, three = torch.cat(
        [
            states_at(model, [encode(model, t)] * 4, range(4), layers=[2, 3]).transpose(0, 1)
            for t in texts
        ],
        dim=1,
    )
    assert (onward(two, 2, 3) - three).norm() < 0.9 * (two - three).norm()
    mean_only = three - three.mean(0)
    assert (onward(two, 2, 3) - three).norm() < mean_only.norm()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A GPT-2 of width 16, half that of the other tiny models, with their tokens."""
    folder = save_checkpoint("gpt2", tmp_path_factory.mktemp("narrow"), n_embd=16)
    return load_model(folder, device="cpu", dtype="float32", backend="bridge")


def test_a_fitted_map_leads_from_one_model_to_another_of_another_width(tiny, narrow):
    texts = [f"w{i} w{(i * 7) % 86} w{(i * 5 + 2) % 86}" for i in range(30)]
    fitted = fit_affine(narrow, tiny, (t for t in texts), source_layer=2, target_layer=1)
    assert fitted.weight.shape == (16, 32)
    settings = {"source_model": narrow, "mapping": fitted}
    places = Place(SOURCES[0], layers=[2]), Place(TARGET, layers=[1])
    scope = patchscope(tiny, *places, track={"a": "w7"}, **settings)
    source, prompt = encode(narrow, SOURCES[0]), encode(tiny, TARGET)
    state = states_at(narrow, [source], [source.last], layers=[2])[0, 0]
    moved = state @ fitted.weight + fitted.bias
    hook = put("resid_pre", 1, moved[None], [-1], take=[0])
    want = run(tiny, TARGET, [hook], "first_prob", "w7")
    assert np.isclose(scope["prob"].item(), want, atol=1e-5)
    said = patchscope_generate(tiny, *places, max_new_tokens=3, stop=(), **settings)
    options = {"repair": Transplant(1, prompt.last), "states": [moved], "max_new_tokens": 3}
    assert said.ids == generate(tiny, [prompt], stop=(), **options)[0].ids
    del settings["mapping"]
    for call in (patchscope, patchscope_generate):
        with pytest.raises(ValueError, match="source model is 16 wide, the target 32"):
            call(tiny, *places, **settings)


@pytest.mark.slow
def test_models_with_other_numbers_for_the_same_tokens_have_a_map():
    gpt2, llama = (load_model(name, device="cpu") for name in ("hops-gpt2", "hops-llama"))
    texts = list(fact_texts(Hopland().two_hop_facts("train")[:40], ["two_hop"]))
    fitted = fit_affine(gpt2, llama, texts, source_layer=3, target_layer=3, ridge=1e-9)
    x, y = (
        torch.cat(
            [states_at(m, [p] * len(p), range(len(p)), layers=[3])[:, 0] for p in prompts]
        ).double()
        for m in (gpt2, llama)
        for prompts in ([encode(m, t) for t in texts],)
    )
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    want = torch.linalg.lstsq(torch.cat([x, ones], dim=1), y).solution
    assert torch.allclose(fitted.weight.double(), want[:-1], atol=1e-2)
    assert torch.allclose(fitted.bias.double(), want[-1], atol=1e-2)


def test_models_that_read_a_corpus_as_other_tokens_have_no_map(load_tiny):
    model, other = load_tiny("gpt2"), load_model("hops-gpt2", device="cpu")
    for source, target in ((model, other), (other, model)):
        with pytest.raises(ValueError, match="tokenise the corpus differently"):
            fit_affine(
                source, target, ["w1 w2 w3 w4"] * 9, source_layer=1, target_layer=1, max_tokens=40
            )


def test_the_named_targets_are_the_published_ones_and_end_in_their_placeholder(load_tiny):
    assert entity_description_prompt().startswith(
        "Syria: Country in the Middle East, Leonardo DiCaprio: "
    )
    assert entity_description_prompt().endswith("electronics corporation, x")
    assert next_token_prompt() == "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
    assert entity_description_prompt({"w1": "w2 w3"}, "w4") == "w1: w2 w3, w4"
    for target in (
        entity_description_prompt({"w1": "w2", "w5": "w6"}, "w4"),
        next_token_prompt(["w1"], "w4"),
    ):
        assert encode(load_tiny(), target).labels[-1] == "w4"
    for call in (lambda: entity_description_prompt({}), lambda: next_token_prompt(["w1"], " ")):
        with pytest.raises(ValueError, match="at least one example"):
            call()


def test_the_next_token_target_reads_the_sources_next_token_prompt(tiny):
    # Into the last layer nothing of the target is left: what is read is the source's own output.
    target = next_token_prompt(["w1", "w2"], "w4")
    source, track = Place(SOURCES, layers=[1, 3]), {"a": ["w7", "w8"]}
    scope = patchscope(tiny, source, target, track=track)
    lens = logit_lens(tiny, SOURCES, track=track, layers=[1, 3])
    got = scope["prob"].sel(target_layer=3).values
    assert np.allclose(got, lens["prob"].isel(position=0).values, atol=1e-5)
    # Elsewhere it stands in the place of the placeholder, and the target's words are seen.
    other = patchscope(tiny, source, next_token_prompt(["w1", "w3"], "w4"), track=track)
    differs = np.abs(scope["prob"] - other["prob"]).max(["example", "source_layer", "tracked"])
    assert (differs.sel(target_layer=[0, 1]) > 1e-5).all() and differs.sel(target_layer=3) < 1e-5


def test_an_entity_is_described_from_the_placeholder_on(tiny):
    target = entity_description_prompt({"w1": "w2 w3", "w5": "w6"}, "w4")
    places = Place(SOURCES[0], "w3", layers=2), Place(target, layers=1)
    said = patchscope_generate(tiny, *places, max_new_tokens=4, stop=())
    prompt = encode(tiny, target)
    state = states_at(tiny, [encode(tiny, SOURCES[0])], [3], layers=[2])[0, 0]
    assert said.ids == greedy_by_hand(tiny, prompt, 4, Transplant(1, prompt.last), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: patchscope(m, SOURCES, [TARGET] * 3), "2 sources and 3 targets"),
        (lambda m: patchscope(m, Place(SOURCES[0], layers=4), TARGET), "0..3"),
        (lambda m: patchscope(m, SOURCES[0], Place(TARGET, "w99")), "does not occur"),
        (lambda m: patchscope(m, Place(SOURCES, [1]), TARGET), "got 1 of .* for 2"),
        (lambda m: patchscope(m, [], TARGET), "no prompt"),
        (lambda m: patchscope_generate(m, Place(SOURCES, layers=1), TARGET), "one of each"),
        (
            lambda m: patchscope(m, SOURCES[0], TARGET, mapping=lambda x, s, t: x[:, :5]),
            r"\(1, 32\)",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(load_tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tiny())
