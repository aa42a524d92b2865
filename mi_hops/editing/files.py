"""Tensors and a header of plain JSON in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mi_hops.result.files import replacing

SUFFIX = ".safetensors"


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """JSON of plain types and of numpy's numbers and arrays.

    Raises:
        TypeError: something else.
        ValueError: without `allow_nan`, a number that is not finite.
    """

    def plain(other: Any) -> Any:
        if isinstance(other, np.generic | np.ndarray):
            return other.tolist()
        raise TypeError(f"{type(other).__name__} is not JSON")

    return json.dumps(value, default=plain, allow_nan=allow_nan)


def save_tensors(
    path: str | Path,
    key: str,
    head: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool,
) -> Path:
    """Write one file, whole or not at all; `head` goes into its metadata under `key`.

    Raises:
        ValueError: a suffix other than ``.safetensors``.
        FileExistsError: the file exists, and `overwrite` is off.
        OSError: the folder cannot be written, or the disk is full; it names the file.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(plain, {key: json_text(head)})
    with replacing(path, suffix=SUFFIX, overwrite=overwrite) as partial:
        partial.write_bytes(content)
    return Path(path)


def load_tensors(path: str | Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Head and tensors of a file that `save_tensors` wrote; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not hold `what`, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}; expected {what}")
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})[key])
            if not isinstance(head, dict):
                raise KeyError(key)
            return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not {what} (a safetensors file with the key {key!r}): {error}"
        ) from error
