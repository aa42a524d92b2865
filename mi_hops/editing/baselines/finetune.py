"""Fine-tuning on one fact: constrained (FT+L), and LoRA through `peft`.

FT+L searches for a whole change Δ of a matrix by Adam on the answer's loss, each element of it held
within a bound after every step (the L-infinity constraint used as a baseline in arXiv 2202.05262).
LoRA searches for a low-rank one (arXiv 2106.09685); the adapters are `peft`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor

from mi_hops.editing.change import Change, matrix_hooks
from mi_hops.editing.checks import check_editable
from mi_hops.editing.edit import Edit, WrongWeightsError, applied_edits, check_weights
from mi_hops.editing.export import write_hf
from mi_hops.editing.request import Asked, Request, check_templates, requests_of
from mi_hops.editing.rows import EditorRepair
from mi_hops.editing.teaching import (
    alike_in_length,
    answer_loss,
    frozen,
    in_templates,
    minimise,
)
from mi_hops.model import (
    HookedModel,
    checkpoint_path,
    device_of,
    dtype_of,
    fingerprint,
    load_model,
    read_matrix,
)


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def finetune_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    layers: int | Sequence[int],
    matrix: str = "W_out",
    form: str | None = None,
    templates: Sequence[str] = ("{}",),
    steps: int = 25,
    lr: float = 0.2,
    bound: float = 0.5,
    batch_size: int = 8,
) -> list[Edit]:
    """FT+L edits of many facts, one edit per fact; the model is left unchanged.

    The steps are those of Adam on a deep copy of the matrix, made side by side for the facts of a
    batch.

    Args:
        asked: facts or requests; the two-hop prompt is taught its target.
        layers: blocks whose `matrix` is changed.
        form: of the prompts taught.
        templates: contexts the loss is averaged over.
        steps: of Adam.
        lr, bound: step size and largest change of an element, in units of the matrix's root mean
            square.
        batch_size: facts at a time; each needs room for its own copies of the matrices.

    Returns:
        One `Edit` per fact, with dense changes.

    Raises:
        ValueError: as `rome.rome_many`, or a number of steps, a rate or a bound that is not positive.
    """
    if steps < 1 or lr <= 0 or bound <= 0:
        raise ValueError(f"steps {steps}, lr {lr}, bound {bound}; expected all above 0")
    requests = requests_of(asked, form, taught=True)
    check_templates(templates)
    editable = check_editable(model, layers, matrix)
    settings = {
        "layers": list(editable.layers),
        "matrix": matrix,
        "templates": list(templates),
        "steps": steps,
        "lr": lr,
        "bound": bound,
    }
    weights = {i: read_matrix(model, matrix, i) for i in editable.layers}
    scale = {i: float(w.double().square().mean().sqrt()) for i, w in weights.items()}

    def search(some: Sequence[Request]) -> dict[int, Tensor]:
        """Layer -> Δ ``[fact, d_in, d_out]``, in units of the matrix's size: one lr serves all layers."""
        n = len(some)
        unit = {
            i: torch.zeros(n, *w.shape, dtype=editable.dtype, device=w.device, requires_grad=True)
            for i, w in weights.items()
        }
        batch = in_templates(model, some, templates)
        owner = repeat(torch.arange(n), "fact -> (fact t)", t=len(templates))

        def adding(i: int) -> Callable[[Tensor, Tensor], Tensor]:
            def add(x: Tensor, out: Tensor) -> Tensor:
                own = unit[i][owner.to(unit[i].device)]
                return out + (x.to(own.dtype) @ own * scale[i]).to(out.dtype)

            return add

        hooks = [hook for i in unit for hook in matrix_hooks(matrix, i, adding(i))]

        def loss() -> Tensor:
            return reduce(answer_loss(model, batch, hooks), "(fact t) -> fact", "mean", fact=n)

        def clamp() -> None:
            for delta in unit.values():
                delta.clamp_(-bound, bound)

        with frozen(model):
            minimise(list(unit.values()), loss, steps=steps, lr=lr, after=clamp)
        return unit

    edits = []
    together, back = alike_in_length(model, requests, batch_size)
    for part in together:
        some = [requests[i] for i in part]
        found = search(some)
        for j, request in enumerate(some):
            changes = [
                editable.change(layer, None, (delta[j] * scale[layer]).detach())
                for layer, delta in found.items()
            ]
            edits.append(editable.edit("ft+l", request.to_dict(), changes, settings))
    return [edits[i] for i in back.tolist()]


class FineTuneRepair(EditorRepair):
    """FT+L as a repair; settings of `finetune_many`."""

    def __init__(self, *, layers: int | Sequence[int], name: str = "FT+L", **settings: Any) -> None:
        super().__init__(finetune_many, name=name, layers=layers, **settings)


# -- LoRA -----------------------------------------------------------------------------------------

#: Module names of the output matrices of attention and MLP, by model type.
_TARGETS = {
    "gpt2": {"attn.c_proj": "W_O", "mlp.c_proj": "W_out"},
    "llama": {"self_attn.o_proj": "W_O", "mlp.down_proj": "W_out"},
}


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def lora_many(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    source: str | Path,
    layers: int | Sequence[int],
    rank: int = 4,
    form: str | None = None,
    templates: Sequence[str] = ("{}",),
    steps: int = 25,
    lr: float = 0.01,
    seed: int = 0,
) -> list[Edit]:
    """LoRA edits: `peft` adapters trained on one fact at a time, starting fresh for each.

    `peft` adapts Hugging Face modules, so the checkpoint is loaded once more beside the model that
    is edited, and its weights must be the same but for edits that are applied. What the adapters add
    is scaled by 2 (alpha is twice the rank).

    Args:
        asked: facts or requests; the two-hop prompt is taught its target.
        source: the checkpoint (bundled name, folder or hub id) of the model to be edited.
        layers: blocks whose output matrices of attention and MLP are adapted.
        rank: of the adapters.
        form: of the prompts taught.
        templates: contexts the loss is averaged over.
        steps, lr: of Adam.
        seed: of the adapters' random half, the same for each fact.

    Raises:
        ValueError: `peft` is not installed (the extra ``edit``), a checkpoint of other weights or of
            a family without known modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'mi-hops[edit]'") from error
    from transformers import AutoModelForCausalLM

    requests = requests_of(asked, form, taught=True)
    check_templates(templates)
    editable = check_editable(model, layers)
    place: dict[str, Any] = {"device": str(device_of(model)), "dtype": dtype_of(model)}
    try:
        check_weights(model, fingerprint(load_model(source, backend="bridge", **place)))
    except WrongWeightsError:
        raise ValueError(
            f"{source} holds other weights than the model to be edited; give the checkpoint it was "
            "loaded from"
        ) from None
    hf: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint_path(source),
        dtype=place["dtype"],
        attn_implementation="eager",
        trust_remote_code=False,
    )
    family = hf.config.model_type
    if family not in _TARGETS:
        raise ValueError(f"LoRA knows the modules of {sorted(_TARGETS)}, not of {family!r}")
    for edit in applied_edits(model):
        for change in edit.changes:
            write_hf(hf, *change.site, read_matrix(model, *change.site))
    numbers = "|".join(map(str, editable.layers))
    modules = "|".join(m.replace(".", r"\.") for m in _TARGETS[family])
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=rf".*\.({numbers})\.({modules})",
        fan_in_fan_out=family == "gpt2",
    )
    with torch.random.fork_rng():  # peft draws first adapters, which are not used
        adapted = get_peft_model(hf.to(place["device"]).eval(), config)
    settings = {
        "layers": list(editable.layers),
        "rank": rank,
        "templates": list(templates),
        "steps": steps,
        "lr": lr,
        "seed": seed,
    }
    edits = []
    for request in requests:
        _reset(adapted, torch.Generator().manual_seed(seed))  # whatever requests came before
        _teach(adapted, model, request, templates, steps, lr)
        changes = _changes(adapted, family)
        edits.append(editable.edit("lora", request.to_dict(), changes, settings))
    return edits


class LoraRepair(EditorRepair):
    """LoRA as a repair.

    Args:
        source: the checkpoint (bundled name, folder or hub id) of the model to be edited.
        layers: blocks that are adapted.
        name: label in tables.
        settings: of `lora_many`.

    Raises:
        ValueError: in `fit`, as `lora_many`.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        layers: int | Sequence[int],
        name: str = "LoRA",
        **settings: Any,
    ) -> None:
        super().__init__(lora_many, name=name, source=source, layers=layers, **settings)


def _teach(
    adapted: Any,
    model: HookedModel,
    request: Request,
    templates: Sequence[str],
    steps: int,
    lr: float,
) -> None:
    """Adam on the adapters, until they answer one prompt."""
    batch = in_templates(model, [request], templates)
    rows = torch.arange(len(templates))[:, None]
    parameters = [p for p in adapted.parameters() if p.requires_grad]

    def loss() -> Tensor:
        logits = adapted(batch.tokens.to(parameters[0].device)).logits
        return batch.loss_of(logits[rows, batch.scored]) / len(templates)

    minimise(parameters, loss, steps=steps, lr=lr)


def _reset(adapted: Any, generator: torch.Generator) -> None:
    """Fresh adapters: A uniform as for a linear layer, B zero."""
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                width = p.shape[1] ** -0.5
                p.copy_(torch.rand(p.shape, generator=generator) * 2 * width - width)
            elif "lora_B" in name:
                p.zero_()


def _changes(adapted: Any, family: str) -> list[Change]:
    """Adapters as changes: the module adds ``scaling B A x``, so ``Δ = A^T (scaling B^T)``."""
    changes = []
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        matrix = next(m for path, m in _TARGETS[family].items() if name.endswith(path))
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        a = module.lora_A["default"].weight.detach().float()
        b = module.lora_B["default"].weight.detach().float()
        changes.append(Change(matrix, layer, a.clone(), b.T * module.scaling["default"]))
    return changes
