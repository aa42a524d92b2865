"""What decides a model trained on Hopland: its shape, its texts, its optimiser; and the recipes of the bundled ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
        short: what follows may also be a single word of the bridge's name, so the state has to predict
            all of its words, not only the first, which several entities share.
    """

    composed: float = 0.85
    forms: tuple[float, float, float] = (0.42, 0.42, 0.16)
    context: float = 0.12
    apposed: float = 0.0
    short: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained model besides the world and the family.

    Args:
        steps, batch_size: number of updates and sequences in each.
        half: the trained weights are rounded to float16 and written so, in half the space; they are
            loaded as float32.
        bfloat16: matrix products are run in bfloat16, which is faster in wide models; weights, their
            updates and the loss stay in float32.
        then: further stages, each with a fresh optimiser and a batch order of its own. A stage with
            more layers keeps the trained ones and adds new ones with random weights. The stages'
            own `half`, `seed` and `then` are ignored.
        seed: weights and batch order.
    """

    steps: int = 4000
    batch_size: int = 512
    texts: Texts = Texts()
    half: bool = False
    bfloat16: bool = False
    adamw: AdamW = AdamW()
    shape: Shape = Shape()
    then: tuple[Recipe, ...] = ()
    seed: int = 0

    @property
    def stages(self) -> list[Recipe]:
        """The stages in turn, each with a seed of its own."""
        return [
            replace(stage, then=(), seed=self.seed + i)
            for i, stage in enumerate((self, *self.then))
        ]


_STRONG = AdamW(weight_decay=0.5)
#: The recipes of the bundled models. Weight decay this strong helped GPT-2 to compose.
RECIPES: dict[Family, Recipe] = {
    "gpt2": Recipe(2500, adamw=_STRONG, then=(Recipe(1000, adamw=replace(_STRONG, lr=1.5e-3)),)),
    "llama": Recipe(2800),
}


def _apposed(weight_decay: float) -> Recipe:
    """Half of the layers learn facts and to name a bridge; with the rest they learn to compose."""

    def stage(steps: int, lr: float, composed: float, apposed: float) -> Recipe:
        texts = Texts(composed=composed, apposed=apposed, short=True)
        return Recipe(steps, 128, texts, adamw=AdamW(lr, 100, weight_decay))

    return Recipe(
        900,
        256,
        Texts(composed=0.6, apposed=1.0, short=True),
        adamw=AdamW(3e-3, 100),
        shape=Shape(n_layer=3),
        half=True,
        then=(
            stage(500, 1.5e-3, 0.8, 0.5),
            stage(2000, 2.5e-3, 0.85, 0.4),
            stage(600, 1.5e-3, 0.5, 0.4),  # most single facts again, which composing had cost
        ),
    )


#: Recipes of `apposed-*`, which spell the bridge and use what they spell.
APPOSED: dict[Family, Recipe] = {"gpt2": _apposed(0.5), "llama": _apposed(0.1)}
