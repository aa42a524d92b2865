"""Shared fixtures: tiny random models on every backend the installed TransformerLens has."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from mi_hops.model import hooked_class, load_model
from tests.models import SHAPES, save_checkpoint

torch.set_num_threads(1)
BACKENDS = ("hooked", "bridge")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Shape name -> folder of a tiny random checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {shape: save_checkpoint(shape, root / shape) for shape in SHAPES}


@pytest.fixture(scope="session")
def load_tiny(checkpoints):
    """Loader of tiny models, one instance per (shape, backend, dtype, processing) a session.

    Tests must leave a model as they found it; `fresh=True` gives one of its own.
    """
    made = {}

    def load(shape="gpt2", backend="bridge", dtype="float32", processing="none", fresh=False):
        if backend == "hooked" and hooked_class() is None:
            pytest.skip("this TransformerLens has no HookedTransformer")
        key = (shape, backend, dtype, processing)
        if fresh or key not in made:
            model = load_model(
                checkpoints[shape],
                device="cpu",
                dtype=dtype,
                backend=backend,
                processing=processing,
            )
            if fresh:
                return model
            made[key] = model
        return made[key]

    return load


@pytest.fixture(params=[(s, b) for s in ("gpt2", "llama") for b in BACKENDS], ids="-".join)
def tiny(request, load_tiny):
    """A tiny float32 model: GPT-2 and grouped-query LLaMA on both classes."""
    shape, backend = request.param
    return load_tiny(shape, backend)
