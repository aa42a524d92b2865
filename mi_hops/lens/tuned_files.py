"""Lenses saved by the tuned-lens package (Belrose et al. 2023): ``params.pt`` beside ``config.json``.

Its translator i reads the stream after i blocks, as ours does, and adds ``W x + b`` to it; rows of W are
outputs, so ``A = W^T``. The file is read as tensors alone: nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mi_hops.model import HookedModel, unembedding

#: The files of such a folder.
CONFIG, PARAMS = "config.json", "params.pt"

#: What reading files that hold something else may raise.
_BROKEN = (OSError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError, EOFError)


def is_tuned_lens(folder: Path) -> bool:
    """Whether a folder holds a lens of the tuned-lens package."""
    return (folder / PARAMS).is_file() and (folder / CONFIG).is_file()


def read_tuned_lens(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its config, and the parameters of a `TunedLens`: ``weight`` and ``bias``, stacked over layers."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = torch.load(folder / PARAMS, map_location="cpu", weights_only=True)
        n, d = int(config["num_hidden_layers"]), int(config["d_model"])
        weight = torch.stack([state[f"{i}.weight"].T for i in range(n)])
        zero = torch.zeros(d, dtype=weight.dtype)
        bias = torch.stack([state.get(f"{i}.bias", zero) for i in range(n)])
    except _BROKEN as error:
        raise ValueError(f"{folder} has no lens in the tuned-lens format ({error!r})") from error
    except (json.JSONDecodeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder} has no lens in the tuned-lens format ({error})") from error
    return config, {"weight": weight, "bias": bias}


def reads_through(config: dict[str, Any], model: HookedModel) -> bool:
    """Whether a model has the unembedding that the lens was trained with; also if it does not say.

    The package's digest is of the matrix as numpy prints it, shortened and to one digit, so it tells models
    apart and not their precision.
    """
    known = config.get("unembed_hash")
    if known is None:
        return True
    matrix: np.ndarray = unembedding(model)[0].detach().cpu().float().T.numpy()
    said = np.array_str(matrix, precision=1)
    return bool(hashlib.sha256(said.encode()).hexdigest() == known)
