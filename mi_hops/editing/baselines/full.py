"""Full fine-tuning: every parameter of the model moves, as far as the answer's loss drives it.

Plain Adam, no bound, no decay, nothing kept: what constrained editors (FT+L among them) are to be
better than. Embeddings, norms and biases move as well, so it is no `Edit`, which is a change of output
matrices alone, and no hook can put it on one row of a batch: it is applied to the weights, and
`mi_hops.evaluate` takes it as an in-place repair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mi_hops.editing.edit import WrongWeightsError, applied_edits, unwind
from mi_hops.editing.request import Asked, Request, check_templates, requests_of
from mi_hops.editing.teaching import answer_loss, in_templates, minimise
from mi_hops.model import HookedModel, fingerprint, require_unquantised


@dataclass(frozen=True, eq=False, repr=False)
class TunedWeights:
    """A model's parameters after fine-tuning, to be put in the place of its own for a while.

    Attributes:
        values: name -> parameter, of those that moved.
        fingerprint: of the weights they were tuned from.
        request, settings: what was taught, and how; plain JSON types.
    """

    values: Mapping[str, Tensor]
    fingerprint: str
    request: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        asked = f"{self.request['two_hop_prompt']!r} -> {self.request['target']!r}"
        return f"<tuned weights: {asked} | {len(self.values)} parameters | for {self.fingerprint}>"

    @property
    def n_bytes(self) -> int:
        """Bytes of all values."""
        return sum(t.numel() * t.element_size() for t in self.values.values())

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[TunedWeights]:
        """The model tuned for the length of a ``with`` block; its own weights come back bit for bit.

        Raises:
            WrongWeightsError: the model has other weights than those tuned from, or is of the other
                model class.
        """
        now, named = fingerprint(model), dict(model.named_parameters())
        if now != self.fingerprint or not set(self.values) <= set(named):
            raise WrongWeightsError(
                f"tuned from weights {self.fingerprint}, this model's are {now}; tune it again on this "
                "model, or load the model it was tuned on"
            )
        with _put_back(model):
            for name, value in self.values.items():
                named[name].data.copy_(value)
            yield self


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def finetune_full(
    model: HookedModel,
    asked: Iterable[Asked],
    *,
    form: str | None = None,
    templates: Sequence[str] = ("{}",),
    steps: int = 25,
    lr: float = 1e-3,
) -> list[TunedWeights]:
    """Full fine-tuning on each fact alone, from the same weights; the model is left as it is.

    Every parameter of the loaded model is tuned, also the zero biases that TransformerLens adds to
    families without; on a HookedTransformer tied embeddings move apart. Takes `steps` forward and
    backward passes and a copy of the model for each fact: of a large model make and use one at a time.

    Args:
        asked: facts or requests; the two-hop prompt is taught its target.
        form: of the prompts taught.
        templates: contexts the loss is averaged over.
        steps, lr: of Adam.

    Returns:
        One `TunedWeights` per fact.

    Raises:
        ValueError: a number of steps or a rate that is not positive, requests without target, weights
            that are quantised or in float16, or a loss or a tuned weight that is not finite.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing.baselines import finetune_full
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> fact = mi_hops.load_facts("hopland")[0]
        >>> tuned = finetune_full(model, [fact], steps=2)[0]
        >>> with tuned.applied(model):
        ...     said = mi_hops.generate(model, [fact.prompt()])
    """
    if steps < 1 or lr <= 0:
        raise ValueError(f"steps {steps}, lr {lr}; expected both above 0")
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError(
            "the weights are in float16, whose range is too small for Adam (it would divide by 0); load "
            "the model with dtype='bfloat16' or 'float32'"
        )
    requests = requests_of(asked, form, taught=True)
    check_templates(templates)
    settings = {"templates": list(templates), "steps": int(steps), "lr": float(lr)}
    made_for = fingerprint(model)
    return [
        TunedWeights(_tuned(model, r, settings), made_for, r.to_dict(), settings) for r in requests
    ]


def _tuned(model: HookedModel, request: Request, how: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters that Adam moved."""
    named = dict(model.named_parameters())
    for name, p in named.items():
        require_unquantised(p, name)
    batch = in_templates(model, [request], how["templates"])
    wanted = {name: p.requires_grad for name, p in named.items()}

    def loss() -> Tensor:
        return answer_loss(model, batch).mean()[None]

    with _put_back(model) as old:
        try:
            for p in named.values():
                p.requires_grad_(True)
            minimise(list(named.values()), loss, steps=how["steps"], lr=how["lr"])
            moved = [name for name, p in named.items() if not torch.equal(p, old[name])]
            if wrong := [name for name in moved if not torch.isfinite(named[name]).all()]:
                raise ValueError(
                    f"{', '.join(wrong[:3])} ({len(wrong)} parameters in all) are not finite after tuning; "
                    f"lower lr ({how['lr']})"
                )
            return {name: named[name].detach().clone() for name in moved}
        finally:
            for name, p in named.items():
                p.requires_grad_(wanted[name])
                p.grad = None


class FullFineTuneRepair:
    """Full fine-tuning as a `mi_hops.sweep.repair.InPlaceRepair`: one fact at a time, then undone.

    Args:
        name: label in tables.
        options: of `finetune_full`.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing.baselines import FullFineTuneRepair
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.Hopland().sample(train=0, held_out=20))
        >>> queries = mi_hops.build_sets(model, gap.failed[:2], gap=gap, per_case=1)
        >>> repair = FullFineTuneRepair(steps=2)
        >>> scores = mi_hops.evaluate(model, repair, queries, gap.failed[:2], generate=False)
        >>> scores.summary().index.tolist()
        ['unrepaired', 'full fine-tuning']
    """

    def __init__(self, *, name: str = "full fine-tuning", **options: Any) -> None:
        self.name, self.options = name, options

    @contextmanager
    def applied(self, model: HookedModel, fact: Asked) -> Iterator[TunedWeights]:
        """The model tuned on this fact for the length of a ``with`` block."""
        (tuned,) = finetune_full(model, [fact], **self.options)
        with tuned.applied(model):
            yield tuned


@contextmanager
def _put_back(model: HookedModel) -> Iterator[dict[str, Tensor]]:
    """Parameters are after the block what they were before it, bit for bit; gives copies of them.

    Edits that were applied inside and are still there are undone as well.
    """
    depth = len(applied_edits(model))
    old = {name: p.detach().clone() for name, p in model.named_parameters()}

    def write() -> None:
        unwind(model, depth)
        for name, p in model.named_parameters():
            p.data.copy_(old[name])

    try:
        yield old
    finally:
        try:
            write()
        except BaseException:  # interrupted; writing all of it once more does no harm
            write()
            raise
