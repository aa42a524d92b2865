"""What decides a model trained on Hopland: its shape, its texts, its optimiser; and the recipes of the bundled ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class Shape:
    """The shape of a model; `n_kv_head` is for LLaMA."""

    n_layer: int = 6
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 2
    d_mlp: int = 512
    n_ctx: int = 64


@dataclass(frozen=True)
class AdamW:
    """The optimiser: `warmup` steps up to the rate `lr`, then linear decay to 0."""

    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0


@dataclass(frozen=True)
class Texts:
    """What the sequences are.

    Args:
        composed: share that are compositions; the rest are single facts.
        forms: shares of the template orders and the question form.
        context: share that follow one of the neutral lead-ins.
        apposed: share of the compositions in which the bridge follows its description. With any,
            the loss is on all tokens instead of on the answers.
    """

    composed: float = 0.85
    forms: tuple[float, float, float] = (0.42, 0.42, 0.16)
    context: float = 0.12
    apposed: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained model besides the world and the family.

    Args:
        steps, batch_size: number of updates and sequences in each.
        start: name of a bundled model to go on from; empty for random weights.
        half: the trained weights are rounded to float16 and written so, in half the space; they are
            loaded as float32.
        restarts: further cycles, each (steps, peak rate), begun with a fresh optimiser and a batch
            order of its own; `steps` and ``adamw.lr`` are the first cycle's.
        seed: weights and batch order.
    """

    steps: int = 4000
    batch_size: int = 512
    texts: Texts = Texts()
    start: str = ""
    half: bool = False
    restarts: tuple[tuple[int, float], ...] = ()
    adamw: AdamW = AdamW()
    shape: Shape = Shape()
    seed: int = 0

    @property
    def cycles(self) -> list[Recipe]:
        """A recipe for each cycle, without restarts."""
        rates = [(self.steps, self.adamw.lr), *self.restarts]
        return [
            replace(
                self, steps=n, restarts=(), adamw=replace(self.adamw, lr=lr), seed=self.seed + i
            )
            for i, (n, lr) in enumerate(rates)
        ]

    def record(self) -> dict[str, Any]:
        """All settings by name, as ``training.json`` has them."""
        flat = asdict(self)
        return {**flat, **flat.pop("texts"), **flat.pop("adamw"), **flat.pop("shape")}


#: The recipes of the bundled models. Weight decay this strong helped GPT-2 to compose.
RECIPES: dict[Family, Recipe] = {
    "gpt2": Recipe(steps=2500, adamw=AdamW(weight_decay=0.5), restarts=((1000, 1.5e-3),)),
    "llama": Recipe(steps=2800),
}


_FURTHER = Recipe(
    1200, batch_size=256, texts=Texts(composed=0.8, apposed=0.5), half=True, adamw=AdamW(lr=1.5e-3)
)
#: Going on from the bundled models, on whole texts with appositions.
APPOSED: dict[Family, Recipe] = {
    "gpt2": replace(_FURTHER, start="hops-gpt2", adamw=AdamW(lr=1.5e-3, weight_decay=0.5)),
    "llama": replace(_FURTHER, start="hops-llama"),
}
