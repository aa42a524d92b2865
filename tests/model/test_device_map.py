"""Loading through a map of devices; on one device it is the model that `device=` gives."""

from __future__ import annotations

import pytest
import torch

from mi_hops import load_model, spread
from mi_hops.model import backend_of, fingerprint, forward
from mi_hops.model.loading import loader_of

TOKENS = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["auto", {"": "cpu"}])
def test_the_same_model(shape, how, checkpoints, load_tiny):
    model = load_model(checkpoints[shape], device_map=how, max_memory={"cpu": "1GiB"})
    plain = load_tiny(shape, "bridge")
    assert backend_of(model) == "bridge" and fingerprint(model) == fingerprint(plain)
    if not torch.cuda.is_available():
        assert torch.equal(forward(model, TOKENS), forward(plain, TOKENS))
    again = loader_of(model)()
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs CUDA")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_on_cuda(shape, checkpoints, load_tiny):
    model = load_model(checkpoints[shape], device_map="auto", max_memory={0: "1GiB"})
    expected = forward(load_tiny(shape, "bridge"), TOKENS)
    torch.testing.assert_close(forward(model, TOKENS).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"device_map": "auto", "device": "cpu"}, "in place of one device"),
        ({"device_map": "auto", "backend": "hooked"}, "only the Bridge"),
        ({"max_memory": {"cpu": "1GiB"}}, "device_map='auto'"),
        ({"device_map": {"": "nowhere"}}, "cannot read the weights"),
    ],
)
def test_refusals(options, match, checkpoints):
    with pytest.raises(ValueError, match=match):
        load_model(checkpoints["gpt2"], **options)


def test_workers_load_it_in_the_same_way(checkpoints):
    from concurrent.futures import ThreadPoolExecutor

    import mi_hops

    model = load_model(checkpoints["gpt2"], device_map={"": "cpu"})
    expected = mi_hops.generate(model, ["w5 w6", "w7"], stop=())
    with ThreadPoolExecutor(1) as executor, spread(model, executor):
        assert mi_hops.generate(model, ["w5 w6", "w7"], stop=()) == expected
