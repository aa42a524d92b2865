"""Fine-tuning on one fact: constrained (FT+L), and LoRA through `peft`.

FT+L searches for a whole change Δ of a matrix by Adam on the answer's loss, each element of it held
within a bound after every step (the L-infinity constraint used as a baseline in arXiv 2202.05262).
LoRA searches for a low-rank one (arXiv 2106.09685); the adapters are `peft`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.editing.change import Change, input_hook, output_hook, read_matrix
from mi_hops.editing.checks import check_editable, check_layers
from mi_hops.editing.edit import Edit
from mi_hops.editing.request import Request, fill, requests_of
from mi_hops.editing.rows import edit_hooks
from mi_hops.editing.teaching import (
    answer_loss,
    chunks,
    frozen,
    lesson,
    minimise,
    require_targets,
)
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, dtype_of, fingerprint, load_model, processing_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.repair import Rows

if TYPE_CHECKING:
    from torch import Tensor


def finetune_many(
    model: HookedModel,
    asked: Iterable[TwoHopFact | Request],
    *,
    layers: Sequence[int],
    matrix: str = "W_out",
    form: str | None = None,
    templates: Sequence[str] = ("{}",),
    steps: int = 25,
    lr: float = 0.2,
    bound: float = 0.5,
    processed: bool = False,
    batch_size: int = 8,
) -> list[Edit]:
    """FT+L edits of many facts, each for itself; the model is left as it is.

    The steps are those of Adam on a deep copy of the matrix, made side by side for the facts of a
    batch.

    Args:
        asked: facts or requests; the composite prompt is taught its target.
        layers: blocks whose `matrix` is changed.
        form: of the prompts taught.
        templates: contexts the loss is averaged over.
        steps: of Adam.
        lr, bound: step size and largest change of an element, in units of the matrix's root mean
            square.
        processed: edit processed (folded) weights.
        batch_size: facts at a time; each needs room for its own copies of the matrices.

    Returns:
        One `Edit` a fact, with dense changes.

    Raises:
        ValueError: as `rome.rome_many`, or a number of steps, a rate or a bound that is not positive.
    """
    if steps < 1 or lr <= 0 or bound <= 0:
        raise ValueError(f"steps {steps}, lr {lr}, bound {bound}; expected all above 0")
    requests = requests_of(asked, form)
    require_targets(requests)
    chosen = check_layers(model, layers, matrix)
    made_for = check_editable(model, None, chosen, processed=processed)
    wide = wide_dtype(dtype_of(model))
    scale = {i: _rms(read_matrix(model, matrix, i)) for i in chosen}
    settings = {
        "layers": list(chosen), "matrix": matrix, "templates": list(templates), "steps": steps,
        "lr": lr, "bound": bound,
    }  # fmt: skip
    edits = []
    for part in chunks(len(requests), batch_size):
        rows = [(i, t) for i in part for t in templates]
        taught = lesson(
            model, [fill(t, requests[i].composite) for i, t in rows], [requests[i].target for i, _ in rows]
        )  # fmt: skip
        owner = torch.tensor([i - part.start for i, _ in rows])
        # In units of the matrix's size, so that one step size serves all layers.
        unit = [
            torch.zeros(
                len(part), *w.shape, dtype=wide, device=w.device, requires_grad=True
            )
            for w in (read_matrix(model, matrix, i) for i in chosen)
        ]  # fmt: skip
        hooks: list[Hook] = []
        for layer, delta in zip(chosen, unit, strict=True):
            hooks += _dense_hooks(matrix, layer, delta, scale[layer], owner)

        def loss(taught: Any = taught, hooks: list[Hook] = hooks) -> Tensor:
            return answer_loss(model, taught, hooks).sum() / len(templates)

        def clamp(unit: list[Any] = unit) -> None:
            for delta in unit:
                delta.clamp_(-bound, bound)

        with frozen(model):
            minimise(unit, loss, steps=steps, lr=lr, after=clamp)
        for j, i in enumerate(part):
            changes = tuple(
                Change(matrix, layer, None, (delta[j] * scale[layer]).detach())
                for layer, delta in zip(chosen, unit, strict=True)
            )
            edits.append(
                Edit(
                    method="ft+l",
                    changes=changes,
                    fingerprint=made_for,
                    processing=processing_of(model),
                    request=requests[i].to_dict(),
                    settings=settings,
                )
            )
    return edits


def _rms(weight: Tensor) -> float:
    return float(weight.double().square().mean().sqrt())


def _dense_hooks(matrix: str, layer: int, delta: Tensor, scale: float, owner: Tensor) -> list[Hook]:
    """Hooks that add ``x Δ`` with each row's own fact's Δ; gradients flow to `delta`."""
    inputs: list[Tensor] = []

    def keep(x: Tensor) -> None:
        inputs[:] = [x.flatten(2)]

    def add(out: Tensor) -> Tensor:
        x = inputs.pop().to(delta.dtype)
        return out + (x @ delta[owner.to(delta.device)] * scale).to(out.dtype)

    return [(input_hook(matrix, layer), keep), (output_hook(matrix, layer), add)]


class FineTuneRepair:
    """FT+L as a `mi_hops.sweep.repair.Repair`; settings as `finetune_many`."""

    def __init__(self, *, layers: Sequence[int], name: str = "FT+L", **settings: Any) -> None:
        self._layers, self._name, self._settings = layers, name, settings

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact]) -> list[Edit]:
        """One edit a fact."""
        return finetune_many(model, facts, layers=self._layers, **self._settings)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own edit."""
        return edit_hooks(model, states)


# -- LoRA -----------------------------------------------------------------------------------------

#: Module names of the output matrices of attention and MLP, by model type.
_TARGETS = {
    "gpt2": {"attn.c_proj": "W_O", "mlp.c_proj": "W_out"},
    "llama": {"self_attn.o_proj": "W_O", "mlp.down_proj": "W_out"},
}


class LoraRepair:
    """LoRA as a `mi_hops.sweep.repair.Repair`: adapters of `peft`, taught one fact, turned into an `Edit`.

    `peft` adapts Hugging Face modules, so the checkpoint is loaded once more beside the model that
    is edited, and its weights must be the same.

    Args:
        source: the checkpoint (bundled name, folder or hub id) of the model to be edited.
        layers: blocks that are adapted.
        rank, alpha: of the adapters; what they add is scaled by ``alpha / rank``.
        form: of the prompts taught.
        templates: contexts the loss is averaged over.
        steps, lr: of Adam.
        seed: of the adapters' random half.
        name: label in tables.

    Raises:
        ValueError: `peft` is not installed (the extra ``edit``).
    """

    def __init__(
        self,
        source: str | Path,
        *,
        layers: Sequence[int],
        rank: int = 4,
        alpha: int = 8,
        form: str | None = None,
        templates: Sequence[str] = ("{}",),
        steps: int = 25,
        lr: float = 0.01,
        seed: int = 0,
        name: str = "LoRA",
    ) -> None:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ValueError("LoRA needs peft: pip install 'mi-hops[edit]'") from error
        self._source, self._layers, self._rank, self._alpha = source, layers, rank, alpha
        self._form, self._templates, self._steps, self._lr = form, tuple(templates), steps, lr
        self._seed, self._name = seed, name

    @property
    def name(self) -> str:
        """Label in tables."""
        return self._name

    def fit(self, model: HookedModel, facts: Sequence[TwoHopFact | Request]) -> list[Edit]:
        """One edit a fact; facts are taught one after the other, each from fresh adapters.

        Raises:
            ValueError: a checkpoint of other weights or of a family without known modules.
        """
        from peft import LoraConfig, get_peft_model

        requests = requests_of(facts, self._form)
        require_targets(requests)
        layers = check_layers(model, self._layers)
        made_for = check_editable(model, None, layers, processed=False)
        # The Bridge wraps the Hugging Face model whose modules peft adapts, and runs through them.
        twin: Any = load_model(
            self._source, device=str(next(iter(model.parameters())).device),
            dtype=dtype_of(model), backend="bridge",
        )  # fmt: skip
        if fingerprint(twin) != made_for:
            raise ValueError(
                f"{self._source} holds other weights than the model to be edited; give the "
                "checkpoint it was loaded from"
            )
        hf = _plain_hf(self._source, model)
        family = hf.config.model_type
        if family not in _TARGETS:
            raise ValueError(f"LoRA knows the modules of {sorted(_TARGETS)}, not of {family!r}")
        config = LoraConfig(
            r=self._rank, lora_alpha=self._alpha, lora_dropout=0.0, bias="none",
            target_modules=_pattern(family, layers), fan_in_fan_out=family == "gpt2",
        )  # fmt: skip
        del twin
        with torch.random.fork_rng():  # peft draws first adapters, which are not used
            adapted = get_peft_model(hf, config)
        generator = torch.Generator().manual_seed(self._seed)
        edits = []
        for request in requests:
            _reset(adapted, generator)
            self._teach(adapted, model, request)
            edits.append(
                Edit(
                    method="lora",
                    changes=tuple(_changes(adapted, family)),
                    fingerprint=made_for,
                    request=request.to_dict(),
                    settings={
                        "layers": list(layers), "rank": self._rank, "alpha": self._alpha,
                        "steps": self._steps, "lr": self._lr, "templates": list(self._templates),
                        "seed": self._seed,
                    },
                )
            )  # fmt: skip
        return edits

    def _teach(self, adapted: Any, model: HookedModel, request: Request) -> None:
        texts = [fill(t, request.composite) for t in self._templates]
        taught = lesson(model, texts, [request.target] * len(texts))
        rows = torch.arange(len(texts))[:, None]
        parameters = [p for p in adapted.parameters() if p.requires_grad]

        def loss() -> Tensor:
            logits = adapted(taught.tokens.to(parameters[0].device)).logits
            logp = logits[rows, taught.scored].float().log_softmax(-1)
            picked = logp.gather(2, taught.answers.to(logp.device)[..., None])[..., 0]
            return -(picked * taught.weights.to(logp)).sum() / len(texts)

        minimise(parameters, loss, steps=self._steps, lr=self._lr)

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row under its own edit."""
        return edit_hooks(model, states)


def _plain_hf(source: str | Path, model: HookedModel) -> Any:
    from transformers import AutoModelForCausalLM

    from mi_hops.model import CHECKPOINTS, device_of

    bundled = CHECKPOINTS / str(source)
    folder = bundled if (bundled / "config.json").exists() else source
    hf: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype_of(model), attn_implementation="eager"
    )
    return hf.to(device_of(model)).eval()


def _pattern(family: str, layers: Sequence[int]) -> str:
    """A regular expression for the full names of the modules to adapt."""
    numbers = "|".join(map(str, layers))
    modules = "|".join(m.replace(".", r"\.") for m in _TARGETS[family])
    return rf".*\.({numbers})\.({modules})"


def _reset(adapted: Any, generator: Any) -> None:
    """Fresh adapters: A uniform as for a linear layer, B zero."""
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                width = p.shape[1] ** -0.5
                fresh = torch.rand(p.shape, generator=generator) * 2 * width - width
                p.copy_(fresh)
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
