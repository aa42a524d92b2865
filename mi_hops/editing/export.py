"""An edited model as an ordinary Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mi_hops.editing.edit import Edit, stack
from mi_hops.model import (
    HookedModel,
    checkpoint_path,
    dtype_of,
    load_model,
    prepends_bos,
    read_matrix,
)
from mi_hops.model.bos import adds_bos, make_add_bos
from mi_hops.result.files import replacing

#: Matrix -> where families keep it; ``{}`` is the layer. The module's class decides the order: a
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
    keep_tokenizer: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the edited model as a checkpoint folder that plain ``transformers`` loads.

    The checkpoint is read again from its source, so a loaded model is not touched, and everything
    in it but the edited matrices is kept: tied weights, tokenizer, configuration. Weights are
    summed in float32 or wider and cast once. Nothing of a remote repository's code is run.

    A model can be loaded with a BOS that its tokenizer (such as GPT-2's) does not add by itself. The
    exported tokenizer then adds it, so that ``transformers.pipeline("text-generation", folder)`` says
    what the edited model says.

    Args:
        model_or_path: a bundled model's name, a folder, a hub id; or a loaded model, whose
            tokenizer knows where it came from. Edits that are applied to it count only if given.
        edits: one, or several to be added up.
        out: folder to make.
        dtype: of the new checkpoint; default that of the loaded model or of the old checkpoint.
        max_shard_size: size from which the weights are written in several files.
        keep_tokenizer: write the tokenizer unchanged, even if it treats BOS differently from the
            model given.
        check: refuse edits made for other weights. The fingerprint depends on the dtype: an edit
            of a model in float32 is refused for a checkpoint in bfloat16, unless ``dtype`` is
            float32 too.
        overwrite: replace a folder (or file) that exists.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` exists, and `overwrite` is off.
        WrongWeightsError: edits for other weights.
        ValueError: edits of processed weights, a model whose source is not known, a family whose
            modules are not known, or a tokenizer that cannot be made to treat BOS as the model does.
        OSError: a full disk; then no folder is left behind.

    Examples:
        >>> import tempfile
        >>> from mi_hops import Hopland, creme, export_hf, load_model
        >>> model = load_model("hops-gpt2")
        >>> edit = creme(model, Hopland().sample(train=0, held_out=3)[0])
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = export_hf(model, edit, f"{place}/edited")
        ...     sorted(path.suffix for path in folder.iterdir())[-1]
        '.safetensors'
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    edit = edits if isinstance(edits, Edit) else stack(list(edits), check=check)
    if edit.processing != "none":
        raise ValueError(
            "the edit is of processed (folded) weights, which are not those of the checkpoint; make "
            "it on a model loaded with processing='none'"
        )
    try:
        with replacing(out, overwrite=overwrite) as folder:
            source, dtype = _source(model_or_path, dtype)
            model = load_model(source, device="cpu", dtype=dtype)
            with edit.applied(model, check=check):
                edited = {c.site: read_matrix(model, *c.site) for c in edit.changes}
            hf = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", trust_remote_code=False
            )
            for (matrix, layer), value in edited.items():
                write_hf(hf, matrix, layer, value)
            folder.mkdir()
            hf.save_pretrained(folder, max_shard_size=max_shard_size)
            if keep_tokenizer:
                AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(
                    folder
                )
            else:
                given = model if isinstance(model_or_path, str | Path) else model_or_path
                _save_tokenizer(source, prepends_bos(given), folder)
            record = {
                "method": edit.method,
                "changed": [str(c) for c in edit.changes],
                "base_fingerprint": edit.fingerprint,
                "request": edit.request,
                "settings": edit.settings,
            }
            (folder / "mi_hops_edit.json").write_text(json.dumps(record, indent=2))
    except Exception as error:
        raised = _as_os_error(error, Path(out))
        if raised is error:
            raise
        raise raised from error
    return Path(out)


def _as_os_error(error: Exception, out: Path) -> Exception:
    """What a writer raised, as an `OSError` with the folder's name where the system refused.

    safetensors and tokenizers report a full disk by exceptions of their own, with the number of
    the system's error in their text only.
    """
    number = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    if isinstance(error, OSError):
        if error.filename is None and error.errno is not None:  # else its text would be lost
            error.filename = str(out)
    elif number:
        code = int(number[1] or number[2])
        return OSError(code, os.strerror(code), str(out))
    return error


def _source(
    model_or_path: HookedModel | str | Path, dtype: torch.dtype | str | None
) -> tuple[str, torch.dtype | str | None]:
    if isinstance(model_or_path, str | Path):
        return checkpoint_path(model_or_path), dtype
    source = str(getattr(model_or_path.tokenizer, "name_or_path", ""))
    if not source:
        raise ValueError(
            "the model does not say where its checkpoint is; pass the folder or the hub id"
        )
    return source, dtype or dtype_of(model_or_path)


def _save_tokenizer(source: str, bos: bool, folder: Path) -> None:
    """The checkpoint's tokenizer, made to add BOS where the model's prompts begin with it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if bos:
        make_add_bos(tokenizer)
    tokenizer.save_pretrained(folder)
    if adds_bos(AutoTokenizer.from_pretrained(folder)) != bos:
        raise ValueError(
            f"the model's prompts {'begin' if bos else 'do not begin'} with BOS, and its tokenizer "
            "could not be made to do the same; pass keep_tokenizer=True to write it as it is"
        )


def write_hf(hf: Any, matrix: str, layer: int, value: Tensor) -> None:
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
