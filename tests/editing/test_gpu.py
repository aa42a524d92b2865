"""Editing where a CUDA device is: the same edit as on the CPU, taken off bit for bit."""

from __future__ import annotations

import pytest
import torch

from mi_hops.editing import Edit, creme, edit_hooks
from mi_hops.model import forward, load_model
from tests.editing.conftest import assert_same_bits, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = torch.tensor([[1, 9, 30, 7, 12]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_the_gpu(checkpoints, fact, tmp_path, dtype):
    model = load_model(checkpoints["llama"], device="cuda", dtype=dtype)
    before = weights(model)
    edit = creme(model, fact, layers=[0, 2])
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))  # factors on the CPU
    with torch.no_grad():
        hooked = forward(model, TOKENS, hooks=edit_hooks(model, [again]))
        with again.applied(model):
            written = forward(model, TOKENS)
    assert_same_bits(model, before)
    tolerance = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.05}[dtype]
    torch.testing.assert_close(written, hooked, atol=tolerance, rtol=0.05)


def test_the_same_edit_as_on_the_cpu(checkpoints, fact):
    made = [
        creme(load_model(checkpoints["llama"], device=d, dtype="float64"), fact, layers=[0, 1, 2])
        for d in ("cpu", "cuda")
    ]
    for a, b in zip(made[0].changes, made[1].changes, strict=True):
        torch.testing.assert_close(a.delta(), b.delta().cpu(), atol=1e-6, rtol=1e-5)
