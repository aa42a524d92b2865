"""Erasing the bridge: the algebra, and every cell against a forward pass of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mi_hops.facts import NoUsableFactError
from mi_hops.model import forward, hook_name, unembedding
from mi_hops.reasoning.erasure import ROLES, Eraser, erase_bridge
from mi_hops.sweep.limits import Limits
from mi_hops.text.tokens import answer_ids, encode, last_position
from tests.reasoning.tiny_facts import tiny_facts


@pytest.fixture
def hidden():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lens(model, h):
    return h @ unembedding(model)[0].double()


def test_exact_form_meets_its_targets_with_the_least_change(tiny, hidden):
    eraser = Eraser(tiny)
    lower, keep = [44, 7, 9], [12, 13]
    moved = eraser.change("exact", lower, keep)(hidden)
    before, after = lens(tiny, hidden), lens(tiny, moved)
    low = before.min(-1, keepdim=True).values.expand(-1, 3)
    assert torch.allclose(after[:, lower], low, atol=1e-9)
    assert torch.allclose(after[:, keep], before[:, keep], atol=1e-9)
    rows = eraser.rows[[*lower, *keep]].double()
    target = torch.cat([low - before[:, lower], torch.zeros(3, 2, dtype=torch.float64)], 1)
    least = torch.linalg.lstsq(rows, target.T, driver="gelsd").solution.T
    assert torch.allclose(moved - hidden, least, atol=1e-9)


def test_published_form_is_the_pseudo_inverse_of_the_request(tiny, hidden):
    lower, keep = [44, 7], [12]
    weight = unembedding(tiny)[0].double().T
    inverse = torch.linalg.pinv(weight)
    v = hidden @ weight.T
    request = torch.zeros_like(v)
    request[:, lower] = v.min(-1, keepdim=True).values - v[:, lower]
    expected = hidden + request @ inverse.T
    plain = Eraser(tiny, recheck=0).change("published", lower, keep)(hidden)
    assert torch.allclose(plain, expected, atol=1e-8)
    push = torch.zeros_like(v)
    push[:, keep] = 10 * (v - expected @ weight.T)[:, keep]
    rechecked = Eraser(tiny).change("published", lower, keep)(hidden)
    assert torch.allclose(rechecked, expected + push @ inverse.T, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize(("shape", "rank"), [("gpt2", 31), ("llama", 32)])
def test_folded_weights_are_erased_in_what_w_u_reads(
    load_tiny, hidden, shape, rank, backend, dtype
):
    """Folding centres GPT-2's W_U: the direction of equal entries then reads nothing."""
    folded = load_tiny(shape, backend, dtype, processing="fold")
    eraser = Eraser(folded, recheck=0)
    assert eraser.rank == rank
    weight = unembedding(folded)[0].double().T
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    inverse = right[:rank].T / values[:rank] @ left[:, :rank].T
    v = hidden @ weight.T
    request = torch.zeros_like(v)
    request[:, [44, 7]] = v.min(-1, keepdim=True).values - v[:, [44, 7]]
    plain = eraser.change("published", [44, 7], [12])(hidden)
    assert torch.allclose(plain, hidden + request @ inverse.T, atol=1e-5)
    result = erase_bridge(folded, tiny_facts(folded, 2), controls=1)
    assert result.provenance["unembedding_rank"] == rank
    assert result.provenance["processing"] == "fold"


def test_a_kept_token_is_never_lowered(tiny, hidden):
    moved = Eraser(tiny).change("exact", [12, 7], [12])(hidden)
    before, after = lens(tiny, hidden), lens(tiny, moved)
    assert torch.allclose(after[:, 12], before[:, 12], atol=1e-9)


def test_cells_equal_single_forward_passes(tiny):
    facts = tiny_facts(tiny, 3)
    result = erase_bridge(tiny, facts, controls=1, limits=Limits(batch_size=2))
    eraser = Eraser(tiny)
    for fact in facts:
        prompt = encode(tiny, fact.prompt())
        answer = answer_ids(tiny, prompt, fact.answer)
        bridge = answer_ids(tiny, prompt, fact.bridge)
        tokens = torch.tensor([prompt.ids])
        clean = forward(tiny, tokens)[0, -1].softmax(-1)[answer[0]]
        assert result.sel(example=fact.id)["clean"].item() == pytest.approx(clean.item(), abs=1e-6)
        for role, where in zip(
            ROLES, (last_position(prompt, fact.first_hop), prompt.last), strict=True
        ):
            for method in ("published", "exact"):
                for layer in range(3):
                    change = eraser.change(method, bridge, answer)

                    def fn(x, where=where, change=change):
                        x = x.clone()
                        x[0, where] = change(x[0, where][None])[0]
                        return x

                    logits = forward(tiny, tokens, hooks=[(hook_name("resid_post", layer), fn)])
                    cell = result["bridge"].sel(
                        example=fact.id, variant=method, position=role, layer=layer
                    )
                    expected = logits[0, -1].softmax(-1)[answer[0]].item()
                    assert cell.item() == pytest.approx(expected, abs=1e-5)


def test_controls_are_seeded_and_share_no_token(tiny):
    facts = tiny_facts(tiny, 6)
    first = erase_bridge(tiny, facts, seed=1)["control"].values
    assert (first == erase_bridge(tiny, facts, seed=1)["control"].values).all()
    assert not (first == erase_bridge(tiny, facts, seed=2)["control"].values).all()


def test_controls_lower_as_many_tokens_as_the_bridge(load_tiny, monkeypatch):
    """A token that bridge and answer share is kept, so the bridge has one less to lower."""
    model, erasure, lowered = load_tiny(), Eraser.erasure, []

    def counted(self, *arguments):
        made = erasure(self, *arguments)
        lowered.append(len(made.down))
        return made

    monkeypatch.setattr(Eraser, "erasure", counted)
    facts = [replace(f, bridge=f"{f.bridge} w{50 + i}") for i, f in enumerate(tiny_facts(model, 4))]
    facts[0] = replace(facts[0], answer=f"{facts[0].bridge.split()[0]} w72")
    erase_bridge(model, facts, variants="exact", layers=[1], controls=2)
    assert lowered == [1] * 3 + [2] * 9


def test_a_bridge_that_leaves_no_tokens_for_a_control_is_refused(tiny):
    fact = replace(tiny_facts(tiny, 1)[0], bridge=" ".join(f"w{i}" for i in range(35, 85)))
    with pytest.raises(ValueError, match=r"leaves no \d+ of 90 tokens for a control"):
        erase_bridge(tiny, [fact], variants="exact", layers=[1], controls=1)


def test_no_control_is_refused(tiny):
    with pytest.raises(ValueError, match="controls is 0; expected at least 1"):
        erase_bridge(tiny, tiny_facts(tiny, 2), controls=0)


@pytest.mark.parametrize("given", ["exat", ("published", "exat"), (), ("exact", "exact")])
def test_variants_that_are_none_are_refused(tiny, given):
    with pytest.raises(ValueError, match="variants is .*expected one or more of .'published'"):
        erase_bridge(tiny, tiny_facts(tiny, 2), variants=given)


def test_one_variant_may_be_named_by_itself(tiny):
    result = erase_bridge(tiny, tiny_facts(tiny, 2), variants="exact", layers=[1], controls=1)
    assert result["variant"].values.tolist() == ["exact"]


def test_a_fact_that_cannot_be_used_is_reported(tiny):
    facts = tiny_facts(tiny, 2)
    broken = replace(facts[0], id="broken", first_hop="w80 w81")
    result = erase_bridge(tiny, [*facts, broken])
    assert [who for who, _ in result.skipped] == ["broken"]
    assert "does not occur" in result.skipped[0][1]
    with pytest.raises(NoUsableFactError, match="no fact can be used for erasure .1: … does not"):
        erase_bridge(tiny, [broken])
