"""Training a lens on text or facts: held-out KL, early stopping, resumable checkpoints.

Only the lens's own tensors are trained; the model runs without gradients. Every layer has parameters
of its own, so each keeps those of its own best held-out KL.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mi_hops.lens.examples import examples_of, make_example, real_cells
from mi_hops.lens.trained import TrainedLens
from mi_hops.lens.vectors import as_lens
from mi_hops.model import HookedModel, fingerprint, provenance
from mi_hops.result.files import replacing
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.keep import Running, keep
from mi_hops.text.corpus import Corpus, token_batches
from mi_hops.text.tokens import Batch, batches_in_order

if TYPE_CHECKING:
    from torch.optim import Adam

#: Tokens of one text.
TokenRow = tuple[int, ...]

#: Bound on the tokens of a held-out evaluation, and what counts as an improvement (nats).
HELD_OUT_TOKENS, TOLERANCE = 4096, 1e-4


@dataclass(frozen=True)
class LensTraining:
    """Settings for training a lens.

    Args:
        steps: optimisation steps at the most.
        learning_rate: of Adam, falling linearly to 0 over `steps`.
        objective: one of the lens's; default its first.
        max_tokens: tokens in a batch, padding included.
        cells: positions of a batch that a step learns from, drawn at random; None for all.
        last_only: learn from the last token of each text only (as published for attention lenses).
        held_out: share of the texts that is kept for evaluation (and at most some 4,096 tokens).
        evaluate_every: steps between evaluations.
        patience: evaluations without any layer's improvement (of 0.0001 nats) before training stops.
        seed: of the order of texts and of the cells drawn.

    Raises:
        ValueError: a count below 1, a share outside (0, 1), or a learning rate that is not above 0.

    Examples:
        >>> import mi_hops
        >>> mi_hops.LensTraining(steps=20, held_out=0.2).learning_rate
        0.001
    """

    steps: int = 250
    learning_rate: float = 1e-3
    objective: str | None = None
    max_tokens: int = 2048
    cells: int | None = 512
    last_only: bool = False
    held_out: float = 0.1
    evaluate_every: int = 25
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "max_tokens", "cells", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 < self.held_out < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"held_out is {self.held_out} (expected a share between 0 and 1) and learning_rate "
                f"{self.learning_rate} (expected above 0)"
            )


@dataclass
class _State:
    """How far a training has come: what a checkpoint holds besides tensors."""

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    waited: int = 0
    running: list[float] = field(default_factory=list)


def train_lens(
    model: HookedModel,
    lens: TrainedLens,
    corpus: Corpus,
    settings: LensTraining = LensTraining(),
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Result:
    """Train a lens in place, to match the output of `model` on a corpus.

    Texts (pieces as long as the context, each once) are shuffled and split into training and
    held-out ones by the seed. Padding is never trained on. The lens ends up with each layer's best
    parameters on the held-out texts.

    Args:
        corpus: texts, facts (as their statements), or a file (see `token_batches`).
        checkpoint: a folder; the state is written there at each evaluation, and a training with the
            same lens, settings and corpus goes on from it.

    Returns:
        Result, in nats, means over held-out tokens: ``held_out`` on ``step`` and ``layer``, beside
        ``train_loss`` on ``step`` (mean over layers and the steps since the last evaluation);
        ``after`` on ``layer``, of the parameters that were kept; and the baseline ``before``, of the
        untrained lens, which is the logit lens. ``provenance`` has ``steps`` and ``stopped_early``.

    Raises:
        ValueError: a lens of another model, an unknown objective, a corpus of fewer than two texts,
            a checkpoint of another training, or a loss that is not finite.

    Examples:
        >>> import mi_hops
        >>> model, world = mi_hops.load_model("hops-gpt2"), mi_hops.Hopland()
        >>> lens = mi_hops.TunedLens(model, rank=4)
        >>> plan = mi_hops.LensTraining(steps=4, max_tokens=256, cells=64)
        >>> run = mi_hops.train_lens(model, lens, world.two_hop_facts("train")[:8], plan)
        >>> bool((run["after"] <= run["before"]).all())
        True
    """
    as_lens(model, lens)
    objective = settings.objective or lens.objectives[0]
    if objective not in lens.objectives:
        raise ValueError(
            f"unknown objective {objective!r}; a {lens.type_name} lens has {lens.objectives}"
        )
    train, held_out = _split(model, corpus, settings)
    evaluation = list(batches_in_order(held_out, settings.max_tokens))
    training = _Training(lens, settings, objective, train)

    def evaluate() -> list[float]:
        found = evaluate_heldout(model, lens, evaluation, objective, last_only=settings.last_only)
        return list(found.values())

    try:
        so_far = Running("lens", training.identity)
        if checkpoint is not None:
            training.resume(Path(checkpoint))
        elif so_far.value is not None:
            training.restore(*so_far.value)
        state = training.state
        if not state.before:
            state.before = keep(evaluate, "evaluation", state.step)
            state.best = list(state.before)
        stream = _stream(train, settings, skip=state.step)
        with progress_bar(
            total=settings.steps, done=state.step, label=lens.name, show=progress
        ) as bar:
            while state.step < settings.steps and state.waited < settings.patience:
                training.step(model, next(stream))
                bar.update()
                if not state.step % settings.evaluate_every or state.step >= settings.steps:
                    training.keep_best(keep(evaluate, "evaluation", state.step))
                    bar.set_postfix(held_out=f"{np.mean(state.curve[-1]['held_out']):.4f}")
                    if checkpoint is not None:
                        training.write(Path(checkpoint))
                so_far.put(training.snapshot)
    finally:
        training.finish()
    lens.trained_on = fingerprint(model)
    lens.notes = {
        "training": asdict(settings) | {"objective": objective},
        "steps": state.step,
        "held_out_before": dict(zip(map(str, lens.layers), state.before, strict=True)),
        "held_out_after": dict(zip(map(str, lens.layers), state.best, strict=True)),
    }
    layer = ("layer",)
    values: dict[str, Any] = {
        "held_out": (("step", "layer"), [row["held_out"] for row in state.curve]),
        "train_loss": ("step", [row["train_loss"] for row in state.curve]),
        "after": (layer, state.best),
    }
    return Result.from_arrays(
        values,
        baselines={"before": (layer, state.before)},
        coords={"step": [row["step"] for row in state.curve], "layer": list(lens.layers)},
        units=dict.fromkeys((*values, "before"), "nats"),
        title=f"training of a {lens.name} lens: {objective} loss",
        used=len(train),
        provenance=provenance(
            model,
            method="train_lens",
            steps=state.step,
            stopped_early=state.waited >= settings.patience,
            settings=lens.notes["training"],
        ),
    )


def evaluate_heldout(
    model: HookedModel,
    lens: TrainedLens,
    batches: Iterable[Batch],
    objective: str,
    *,
    last_only: bool = False,
) -> dict[int, float]:
    """Layer -> mean loss of an objective over the real tokens of some batches, nats."""

    def losses(batch: Batch) -> tuple[int, list[float]]:
        """Tokens of a batch, and the summed loss of each layer."""
        count, sums = 0, [0.0] * len(lens.layers)
        without = objective == "leave_one_out"
        for (rows, _), example in examples_of(
            model, lens, batch, last_only=last_only, without_heads=without
        ):
            count += len(rows)
            for i, layer in enumerate(lens.layers):
                parts = [p.sum().item() for p in lens.losses(example, layer, objective)]
                sums[i] += sum(parts) / len(parts)
        return count, sums

    with torch.no_grad():
        found = [
            keep(partial(losses, batch), "held out", batch.tokens.tolist()) for batch in batches
        ]
    total = sum(count for count, _ in found)
    return {layer: sum(sums[i] for _, sums in found) / total for i, layer in enumerate(lens.layers)}


class _Training:
    """A training in progress: the lens's tensors, the best so far, the optimiser, the state."""

    def __init__(
        self, lens: TrainedLens, settings: LensTraining, objective: str, train: Sequence[TokenRow]
    ) -> None:
        self.lens, self.settings, self.objective = lens, settings, objective
        self.state = _State()
        self.best = {name: p.detach().clone() for name, p in lens.parameters.items()}
        for tensor in lens.parameters.values():
            tensor.requires_grad_(True)
        self.optimiser: Adam = torch.optim.Adam(
            list(lens.parameters.values()), lr=settings.learning_rate
        )
        self.identity = {
            "lens": {"type": lens.type_name, **lens.settings},
            "model": fingerprint(lens.model),
            "settings": asdict(settings),
            "texts": hashlib.sha256(repr(train).encode()).hexdigest()[:16],
        }

    def step(self, model: HookedModel, batch: Batch) -> None:
        """One update from one batch."""
        lens, plan, state = self.lens, self.settings, self.state
        rows, columns = real_cells(batch, last_only=plan.last_only)
        if plan.cells is not None and len(rows) > plan.cells:
            # A generator for each step, so that a resumed training draws what it would have drawn.
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + state.step)
            drawn = torch.randperm(len(rows), generator=generator)[: plan.cells].sort().values
            rows, columns = rows[drawn], columns[drawn]
        without = self.objective == "leave_one_out"
        example = make_example(model, lens, batch, (rows, columns), without_heads=without)
        for group in self.optimiser.param_groups:
            group["lr"] = plan.learning_rate * (1 - state.step / plan.steps)
        self.optimiser.zero_grad()
        total = 0.0
        n_layers = len(lens.layers)
        parts = n_layers * (1 if self.objective in ("sum", "output") else int(model.cfg.n_heads))
        with torch.enable_grad():
            for layer in lens.layers:
                for loss in lens.losses(example, layer, self.objective):
                    mean = loss.mean()
                    # Layers share no parameters: each learns from its own loss at full strength.
                    (mean * (n_layers / parts)).backward()
                    total += mean.item() / parts
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of step {state.step} is {total}; lower learning_rate, or load the model "
                "in float32"
            )
        self.optimiser.step()
        state.step += 1
        state.running.append(total)

    def keep_best(self, now: Sequence[float]) -> None:
        """Keep the parameters of the layers whose held-out loss is the lowest so far."""
        state = self.state
        # Waiting is counted against the tolerance; any improvement is kept.
        gains = [best - value for best, value in zip(state.best, now, strict=True)]
        state.waited = 0 if max(gains) >= TOLERANCE else state.waited + 1
        for row, gain in enumerate(gains):
            if gain > 0:
                state.best[row] = now[row]
                for name, tensor in self.lens.parameters.items():
                    self.best[name][row] = tensor.detach()[row]
        train_loss = sum(state.running) / len(state.running)
        state.curve.append({"step": state.step, "train_loss": train_loss, "held_out": list(now)})
        state.running = []

    def finish(self) -> None:
        """Leave the best parameters in the lens."""
        for name, tensor in self.best.items():
            self.lens.parameters[name].requires_grad_(False).copy_(tensor)

    def write(self, folder: Path) -> None:
        """The whole state in one file, so that a crash never leaves half of it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, state = self.snapshot()
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        record = {"identity": self.identity, "state": state}
        with replacing(folder / "training.safetensors", overwrite=True) as partial:
            save_file(plain, partial, metadata={"training": json.dumps(record)})

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, where there is one of this very training."""
        path = folder / "training.safetensors"
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("training", "{}"))
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        known, own = record.get("identity", {}), json.loads(json.dumps(self.identity))
        if different := [key for key in own if known.get(key) != own[key]]:
            raise ValueError(
                f"{folder} holds a training with another {', '.join(different)}; use another folder, "
                "or delete it to start over"
            )
        self.restore(stored, record["state"])

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and the state."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.lens.parameters.items():
            tensors |= {f"now.{name}": tensor.detach(), f"best.{name}": self.best[name]}
            for key, value in self.optimiser.state[tensor].items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors, asdict(self.state)

    def restore(self, stored: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from a `snapshot`."""
        with torch.no_grad():
            for name, tensor in self.lens.parameters.items():
                tensor.copy_(stored[f"now.{name}"])
                self.best[name].copy_(stored[f"best.{name}"])
                self.optimiser.state[tensor] = {
                    key: stored[f"adam.{key}.{name}"].to(tensor.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.state = _State(**state)


# -- the corpus -----------------------------------------------------------------------------------


def _split(
    model: HookedModel, corpus: Corpus, plan: LensTraining
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Token rows to learn from and to evaluate on, each row once."""
    seen: dict[TokenRow, None] = {}
    for batch in token_batches(model, corpus, max_tokens=plan.max_tokens):
        for row, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            seen[tuple(row[:n])] = None
    rows = list(seen)
    if len(rows) < 2:
        raise ValueError(
            f"the corpus has {len(rows)} distinct text(s); training needs some to learn from and "
            "others to evaluate on"
        )
    order = np.random.default_rng(plan.seed).permutation(len(rows))
    n = min(len(rows) - 1, max(1, round(plan.held_out * len(rows))))
    held_out, total = [], 0
    for i in order[:n]:
        held_out.append(rows[i])
        total += len(rows[i])
        if total >= HELD_OUT_TOKENS:
            break
    return [rows[i] for i in order[n:]], held_out


def _stream(rows: Sequence[TokenRow], plan: LensTraining, *, skip: int) -> Iterator[Batch]:
    """Batches without end, in a new order at each round; the first `skip` are skipped."""
    n, rounds = 0, 0
    while True:
        order = np.random.default_rng([plan.seed, rounds]).permutation(len(rows))
        for batch in batches_in_order((rows[i] for i in order), plan.max_tokens):
            n += 1
            if n > skip:
                yield batch
        rounds += 1
