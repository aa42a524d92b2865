"""GRACE: a codebook beside the model instead of a change of it (arXiv 2211.11031).

At one layer the codebook holds entries (key, value, radius, answer). A prompt whose state at the
layer's input (last token of the prompt) lies within the radius of the nearest key has the layer's
output there replaced by that entry's value; all others pass. Values are searched for by gradient.
The rule for a prompt that is answered wrongly, codebook included, with state h, right answer y and d
the distance to the nearest key i::

    no entry, or d > radius_i + radius:  add (h, value, radius, y)
    the same answer:                     radius_i <- max(radius_i, d), a hair more for d's rounding
    another answer:                      radius_i <- d/2, and add (h, value, d/2, y)

A prompt that is answered correctly already is not learned. (The paper's text lets the same answer add
the radius; its code takes the distance.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.editing.passes import activations
from mi_hops.editing.request import Asked, Request, check_together, requests_of
from mi_hops.editing.teaching import (
    alike_in_length,
    answer_loss,
    answered_correctly,
    frozen,
    minimise,
    teacher_forced,
)
from mi_hops.model import Hook, HookedModel, dtype_of, hook_name, require_hooks, require_layers
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.repair import LateHooks, Rows
from mi_hops.text.tokens import encode, pad

# More than float32 rounds, and nothing to a distance between prompts.
_HAIR = 1 + 1e-5


@dataclass(repr=False)
class Codebook:
    """Entries of one layer; grows by `learn`.

    Attributes:
        keys: ``[entry, d_model]``; values: the same shape; radii: ``[entry]``, in units of the
            residual stream; answers: one each.
    """

    layer: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<GRACE codebook at layer {self.layer}: {len(self.keys)} entries>"

    def learn(self, state: Tensor, value: Tensor, answer: str, radius: float) -> str:
        """Add a fact by the rule above; returns what was done: ``add``, ``expand``, ``split``.

        An entry that is expanded keeps its own value.
        """
        if self.keys:
            distance, i = self.nearest(state)
            if distance <= self.radii[i] + radius:
                if self.answers[i] == answer:
                    # Run in another batch, the same prompt's state differs by rounding.
                    self.radii[i] = max(self.radii[i], distance * _HAIR)
                    return "expand"
                self.radii[i] = distance / 2
                self._add(state, value, distance / 2, answer)
                return "split"
        self._add(state, value, radius, answer)
        return "add"

    def _add(self, state: Tensor, value: Tensor, radius: float, answer: str) -> None:
        self.keys.append(state)
        self.values.append(value)
        self.radii.append(radius)
        self.answers.append(answer)

    def nearest(self, state: Tensor) -> tuple[float, int]:
        """Distance to the nearest key, and its index."""
        keys = torch.stack(self.keys).to(state.device)
        distances = (keys - state.to(keys.dtype)).norm(dim=1)
        i = int(distances.argmin())
        return float(distances[i]), i

    def lookup(self, state: Tensor) -> Tensor | None:
        """The value to use for a state, or None to leave it alone."""
        if not self.keys:
            return None
        distance, i = self.nearest(state)
        # Up to and with the radius: an entry that was expanded is to reach what expanded it.
        return self.values[i] if distance <= self.radii[i] else None

    @property
    def n_bytes(self) -> int:
        """Bytes of keys, values and radii."""
        tensors = [*self.keys, *self.values]
        return sum(t.numel() * t.element_size() for t in tensors) + 8 * len(self.radii)


class GraceRepair:
    """GRACE as a `mi_hops.sweep.repair.Repair`.

    Args:
        layer: block whose output is replaced.
        radius: of a new entry, as a share of the norm of its state, so that it depends on no other
            fact.
        shared: one codebook that learns all facts in order (the method); else one per fact, on its own
            rows, where nothing is ever expanded or split.
        form: of the prompts taught; default the first a fact has of both hops.
        steps, lr: of Adam, from the layer's own output as a start.
        batch_size: facts searched for at a time.
        name: label in tables.

    Raises:
        ValueError: a radius, a number of steps or a rate that is not positive.
    """

    def __init__(
        self,
        *,
        layer: int,
        radius: float = 0.2,
        shared: bool = True,
        form: str | None = None,
        steps: int = 100,
        lr: float = 0.5,
        batch_size: int = 32,
        name: str = "GRACE",
    ) -> None:
        if steps < 1 or lr <= 0 or radius <= 0:
            raise ValueError(f"radius {radius}, steps {steps}, lr {lr}; expected all above 0")
        self.layer, self.radius, self.shared, self.form = layer, radius, shared, form
        self.steps, self.lr, self.batch_size, self.name = steps, lr, batch_size, name

    @torch.inference_mode(False)  # gradients are taken, whatever the caller is in
    def fit(self, model: HookedModel, facts: Sequence[Asked]) -> list[Codebook]:
        """One codebook per fact (or one shared by all); facts already known add nothing.

        Raises:
            ValueError: requests without target, or a shared codebook that is to give one prompt two
                answers.
        """
        requests = requests_of(facts, self.form, taught=True)
        if self.shared:
            check_together(requests)
        require_layers(model, [self.layer])
        require_hooks(model, self._ends)
        if not requests:
            return []
        states, values, known = self._search(model, requests)
        one = Codebook(self.layer)
        books = [one if self.shared else Codebook(self.layer) for _ in requests]
        for book, request, state, value, correct in zip(
            books, requests, states, values, known, strict=True
        ):
            if book.lookup(state) is not None:  # what is said now is an entry's doing
                batch = teacher_forced(model, [request.two_hop_prompt], [request.target])
                rows = Rows(batch.prompts, batch.tokens.shape[1])
                hooks = self.hooks(model, [book], rows)
                (correct,) = answered_correctly(model, batch, hooks)
            if not correct:
                book.learn(state, value, request.target, self.radius * float(state.norm()))
        return books

    @property
    def _ends(self) -> tuple[str, str]:
        """Hook names of what enters the layer and what leaves it."""
        return hook_name("resid_pre", self.layer), hook_name("resid_post", self.layer)

    def _search(
        self, model: HookedModel, requests: Sequence[Request]
    ) -> tuple[Float[Tensor, "fact d_model"], Float[Tensor, "fact d_model"], list[bool]]:
        """What the codebook may need of each fact.

        Returns:
            States at the layer's input, values by which the prompt is answered, and whether the
            model answers it correctly without.
        """
        wide = wide_dtype(dtype_of(model))
        states, values, known = [], [], list[bool]()
        together, back = alike_in_length(model, requests, self.batch_size)
        for part in together:
            texts = [requests[i].two_hop_prompt for i in part]
            prompts = pad([encode(model, text).ids for text in texts])
            rows, last = torch.arange(len(texts)), prompts.last
            found = activations(model, prompts.tokens, self._ends)
            entering, leaving = (x[rows, last].detach().clone() for x in found)
            value = leaving.to(wide).requires_grad_(True)
            batch = teacher_forced(model, texts, [requests[i].target for i in part])
            known += answered_correctly(model, batch)
            start = int(last.min())
            batch = batch.behind(model, start)
            hook: Hook = (self._ends[1], _replacing(last - start, value))
            with frozen(model):
                minimise(
                    [value],
                    lambda batch=batch, hook=hook: answer_loss(model, batch, [hook]),  # type: ignore[misc]
                    steps=self.steps,
                    lr=self.lr,
                )
            states.append(entering.to(wide))
            values.append(value.detach())
        return torch.cat(states)[back], torch.cat(values)[back], [known[i] for i in back.tolist()]

    def hooks(self, model: HookedModel, states: Sequence[Any | None], rows: Rows) -> list[Hook]:
        """Each row's prompt looked up in its own codebook, at the prompt's last token."""
        here: list[tuple[int, int, Codebook]] = [
            (row, prompt.last - rows.offset, book)
            for row, (prompt, book) in enumerate(zip(rows.prompts, states, strict=True))
            if book is not None and 0 <= prompt.last - rows.offset < rows.width
        ]
        if not here:
            return []
        found: dict[int, Tensor] = {}

        def look(x: Tensor, hook: Any = None) -> Tensor:
            found.clear()
            for row, at, book in here:
                value = book.lookup(x[row, at])
                if value is not None:
                    found[row] = value
            return x

        def put(x: Tensor, hook: Any = None) -> Tensor:
            out = x.clone()
            for row, at, _ in here:
                if row in found:
                    out[row, at] = found[row].to(x.device, x.dtype)
            return out

        start = rows.offset + min(at for _, at, _ in here)
        return LateHooks(zip(self._ends, (look, put), strict=True), start)


def _replacing(
    last: Int[Tensor, "row"], value: Float[Tensor, "row d_model"]
) -> Callable[[Tensor], Tensor]:
    """A hook that replaces each row's last prompt position; gradients flow to `value`."""

    def replace(x: Tensor) -> Tensor:
        out = x.clone()
        out[torch.arange(len(last)), last] = value.to(x.device, x.dtype)
        return out

    return replace
