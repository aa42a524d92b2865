"""Shared fixtures: tiny random models on every backend the installed TransformerLens has."""

from __future__ import annotations

import os
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._pytree import tree_map_only

from mi_hops.model import hooked_class, load_model
from tests.models import SHAPES, models, require_real_model, save_checkpoint
from tests.places import FAR, NEAR, TwoPlaces, put

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A case named by ``slow_case`` is slow: the others of its test stay in the fast loop."""
    for item in items:
        for mark in item.iter_markers("slow_case"):
            if any(name in item.name.partition("[")[2] for name in mark.args):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def softmax_in_float64():
    """A float64 model is one throughout.

    LLaMA's softmax on the Bridge is in float32 whatever the model is in, and how that rounds depends
    on the processor: identities would hold to 1e-9 on one and to 1e-6 on another.
    """
    own = torch.nn.functional.softmax

    def softmax(x, *args, dtype=None, **kwargs):
        return own(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield


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


@pytest.fixture(params=models("gpt2", "llama"))
def tiny(request, load_tiny):
    """A tiny float32 model: GPT-2 and grouped-query LLaMA on both classes."""
    return load_tiny(*request.param)


@pytest.fixture(params=[pytest.param("gpt2", marks=pytest.mark.once), "llama"])
def pair(request, checkpoints):
    """The same float64 model on one device and on two; each block fetches what it is given.

    The middle block lies on CUDA; without it, in a place that is told apart from the rest.
    """
    one, two = (
        load_model(checkpoints[request.param], device="cpu", dtype="float64", backend="bridge")
        for _ in range(2)
    )
    two.cfg.n_devices = 2  # as TransformerLens says of a model that was loaded with a map
    for block in two.blocks:

        def fetch(_, given, named, block=block):
            device = next(block.parameters()).device
            return tree_map_only(torch.Tensor, lambda x: x.to(device), (given, named))

        block.original_component.register_forward_pre_hook(fetch, with_kwargs=True)
    if torch.cuda.is_available():
        two.blocks[1].to("cuda")
        places = nullcontext()
    else:
        far = set(two.blocks[1].parameters())
        for p in two.parameters():
            put(p, FAR if p in far else NEAR)
        places = TwoPlaces()
    with places:
        assert [next(b.parameters()).device.type for b in two.blocks] == ["cpu", "cuda", "cpu"]
        yield one, two


@pytest.fixture(scope="session")
def load_smollm2():
    """Loader of the real model by backend, once a session; converted once, into the user's cache."""
    require_real_model()
    made = {}

    def load(backend):
        if backend == "hooked" and hooked_class() is None:
            pytest.skip("this TransformerLens has no HookedTransformer")
        if backend not in made:
            made.clear()  # half a gigabyte each
            made[backend] = load_model("smollm2-135m", device="cpu", backend=backend)
        return made[backend]

    return load
