"""SmolLM2-135M, as users load it, against plain transformers."""

from __future__ import annotations

import pytest
import torch

import mi_hops
from mi_hops.editing.change import Change
from mi_hops.editing.edit import Edit
from mi_hops.model import fingerprint, provenance
from tests.models import BACKENDS

pytestmark = pytest.mark.slow  # a model of 135 million parameters

PROMPT = "The capital of France is Paris. The capital of Japan is"


@pytest.fixture(params=BACKENDS)
def model(request, load_smollm2):
    return load_smollm2(request.param)


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def test_says_what_plain_transformers_says(model):
    prompt = mi_hops.encode(model, PROMPT)
    assert not prompt.has_bos
    assert prompt.labels[:3] == ("The", " capital", " of")
    ids = torch.tensor([prompt.ids])
    reference = plain(model.tokenizer.name_or_path)
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=1e-4, rtol=1e-4)
    said = mi_hops.generate(model, [PROMPT], max_new_tokens=6)[0]
    new = reference.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert said.text == "Tokyo" and list(said.ids) == new[: len(said.ids)]
    about = provenance(model)
    assert about["model"] == "SmolLM2-135M-Instruct.Q4_1"
    assert (about["weights"], about["dtype"], about["bos"]) == (
        "dequantised from Q4_1",
        "float32",
        False,
    )


def test_digits_are_tokens_of_their_own(model):
    prompt = mi_hops.encode(model, "In 1998  42")
    assert prompt.labels == ("In", " ", "1", "9", "9", "8", "  ", "4", "2")


def test_an_edit_is_exported_and_loaded_again(model, tmp_path):
    torch.manual_seed(0)
    change = Change("W_O", 20, torch.randn(1, 576), torch.randn(1, 576) * 0.1)
    edit = Edit(changes=(change,), method="test", fingerprint=fingerprint(model))
    out = mi_hops.export_hf(model, edit, tmp_path / "out")
    ids = torch.tensor([mi_hops.encode(model, PROMPT).ids])
    before = logits(model, ids)
    with edit.applied(model):
        want = logits(model, ids)
    assert (want - before).abs().max() > 0.1
    torch.testing.assert_close(logits(plain(out), ids), want, atol=1e-3, rtol=1e-4)
    again = mi_hops.load_model(out, device="cpu")
    torch.testing.assert_close(logits(again, ids), want, atol=1e-3, rtol=1e-4)
    assert provenance(again)["weights"] == "dequantised from Q4_1"
    assert provenance(again)["model"] == "SmolLM2-135M-Instruct.Q4_1"
