"""An edited model as an ordinary Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.change import read_matrix
from mi_hops.editing.edit import Edit, stack
from mi_hops.model import CHECKPOINTS, HookedModel, load_model

if TYPE_CHECKING:
    from torch import Tensor

#: Matrix -> where families keep it; ``{}`` is the layer. The module's class tells the order: a
#: Conv1D stores [d_in, d_out], a Linear [d_out, d_in].
_MODULES = {
    "W_O": ("transformer.h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj"),
    "W_out": ("transformer.h.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj"),
}


def export_hf(
    model_or_path: HookedModel | str | Path,
    edits: Edit | Sequence[Edit],
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: str = "5GB",
    check: bool = True,
) -> Path:
    """Write the edited model as a checkpoint folder that plain ``transformers`` loads.

    The checkpoint is read anew from where it lies, so a loaded model is not touched, and everything
    in it but the edited matrices is kept: tied weights, tokenizer, configuration. Weights are
    summed in float32 or wider and cast once. Nothing of a remote repository's code is run.

    Args:
        model_or_path: a bundled model's name, a folder, a hub id; or a loaded model, whose
            tokenizer knows where it came from. Edits that are in force on it count only if given.
        edits: one, or several to be added up.
        out: folder to make; must not exist, or be empty.
        dtype: of the new checkpoint; default that of the loaded model or of the old checkpoint.
        max_shard_size: size from which the weights are written in several files.
        check: refuse edits made for other weights. The fingerprint depends on the dtype: an edit
            of a model in float32 is refused for a checkpoint in bfloat16, unless ``dtype`` is
            float32 too.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` holds something.
        WrongWeightsError: edits for other weights.
        ValueError: edits of processed weights, a model whose source is not known, or a family whose
            modules are not known.
        OSError: a full disk; then no folder is left behind.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    edit = edits if isinstance(edits, Edit) else stack(list(edits), check=check)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; give a folder that does not exist yet")
    if edit.processing != "none":
        raise ValueError(
            "the edit is of processed (folded) weights, which are not those of the checkpoint; make "
            "it on a model loaded with processing='none'"
        )
    source, dtype = _source(model_or_path, dtype)
    edited = _edited_matrices(source, edit, dtype, check)
    hf = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    for (matrix, layer), value in edited.items():
        _write(hf, matrix, layer, value)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        folder.mkdir()
        hf.save_pretrained(folder, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        (folder / "mi_hops_edit.json").write_text(json.dumps(_record(edit), indent=2))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except Exception as error:
        told = _told(error, out)
        if told is error:
            raise
        raise told from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already where all went well
    return out


def _told(error: Exception, out: Path) -> Exception:
    """What a writer raised, as an `OSError` with the folder's name where the system refused.

    safetensors and tokenizers tell of a full disk by exceptions of their own, with the number of
    the system's error in their text only.
    """
    number = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    if isinstance(error, OSError):
        if error.filename is None:
            error.filename = str(out)
    elif number:
        code = int(number[1] or number[2])
        return OSError(code, os.strerror(code), str(out))
    return error


def _source(
    model_or_path: HookedModel | str | Path, dtype: torch.dtype | str | None
) -> tuple[str, torch.dtype | str | None]:
    if isinstance(model_or_path, str | Path):
        bundled = CHECKPOINTS / str(model_or_path)
        return str(bundled if (bundled / "config.json").exists() else model_or_path), dtype
    from mi_hops.model import dtype_of

    source = str(getattr(model_or_path.tokenizer, "name_or_path", ""))
    if not source:
        raise ValueError(
            "the model does not tell where its checkpoint lies; pass the folder or the hub id"
        )
    return source, dtype or dtype_of(model_or_path)


def _edited_matrices(
    source: str, edit: Edit, dtype: torch.dtype | str | None, check: bool
) -> dict[tuple[str, int], Tensor]:
    """The matrices with the edit in them, ``[d_in, d_out]``, as the package itself reads them."""
    model = load_model(source, device="cpu", dtype=dtype)
    with edit.applied(model, check=check):
        return {c.site: read_matrix(model, *c.site) for c in edit.changes}


def _write(hf: Any, matrix: str, layer: int, value: Tensor) -> None:
    """Put a matrix into a Hugging Face model in the order its module stores it."""
    from transformers.pytorch_utils import Conv1D

    for path in _MODULES[matrix]:
        try:
            module = hf.get_submodule(path.format(layer))
        except AttributeError:
            continue
        if isinstance(module, Conv1D):
            stored = value
        elif isinstance(module, torch.nn.Linear):
            stored = value.T
        else:
            break
        with torch.no_grad():
            module.weight.copy_(stored)
        return
    raise ValueError(
        f"cannot tell where {type(hf).__name__} keeps {matrix} of layer {layer}; known are "
        f"{', '.join(_MODULES[matrix])} as Linear or Conv1D"
    )


def _record(edit: Edit) -> dict[str, Any]:
    return {
        "method": edit.method,
        "changed": [str(c) for c in edit.changes],
        "base_fingerprint": edit.fingerprint,
        "request": dict(edit.request),
        "settings": dict(edit.settings),
    }
