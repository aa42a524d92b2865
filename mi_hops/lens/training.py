"""Training a lens on text or facts: held-out KL, early stopping, resumable checkpoints.

Only the lens's own tensors are trained; the model runs without gradients. Every layer has parameters
of its own, so each keeps those of its own best held-out KL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.examples import make_example, real_cells
from mi_hops.lens.reading import check_lens
from mi_hops.lens.trained import TrainedLens
from mi_hops.model import HookedModel, fingerprint
from mi_hops.text.corpus import token_batches
from mi_hops.text.tokens import Batch, batches_in_order

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from torch.optim import Adam

#: Texts or facts (as their statements), or the path of a file; read once, kept as tokens.
Corpus = Iterable[str | TwoHopFact] | str | Path


@dataclass(frozen=True)
class LensTraining:
    """Settings of a training.

    Attributes:
        steps: optimisation steps at the most.
        learning_rate: of Adam, falling linearly to 0 over `steps`.
        objective: one of the lens's; default its first.
        max_tokens: tokens in a batch, padding included.
        max_length: tokens of a text; longer ones are cut into pieces. Default the context.
        cells: positions of a batch that a step learns from, drawn at random; None for all.
        last_only: learn from the last token of each text only (as published for attention lenses).
        held_out: share of the texts that is kept for judging.
        held_out_tokens: bound on the tokens that a judgement reads.
        evaluate_every: steps between judgements.
        patience: judgements without any layer's improvement before training stops; an improvement
            is at least `tolerance` nats.
        seed: of the order of texts and of the cells drawn.
    """

    steps: int = 250
    learning_rate: float = 1e-3
    objective: str | None = None
    max_tokens: int = 2048
    max_length: int | None = None
    cells: int | None = 512
    last_only: bool = False
    held_out: float = 0.1
    held_out_tokens: int = 4096
    evaluate_every: int = 25
    patience: int = 4
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "max_tokens", "cells", "held_out_tokens", "evaluate_every", "patience")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 < self.held_out < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"held_out is {self.held_out} (expected a share between 0 and 1) and learning_rate "
                f"{self.learning_rate} (expected above 0)"
            )


@dataclass
class TrainingRun:
    """What became of a training.

    Attributes:
        curve: one row a judgement: ``step``, ``train_loss`` (mean since the last one, nats),
            ``held_out`` (mean over layers, nats), and ``layer_{l}``.
        before: layer -> held-out loss of the untrained lens, which is the logit lens.
        after: layer -> held-out loss of the parameters that were kept.
        steps: steps made.
        stopped_early: whether `patience` ended it.
    """

    curve: pd.DataFrame
    before: dict[int, float]
    after: dict[int, float]
    steps: int
    stopped_early: bool


@dataclass
class _Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    before: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    waited: int = 0
    running: list[float] = field(default_factory=list)


def train_lens(
    model: HookedModel,
    lens: TrainedLens,
    corpus: Corpus,
    settings: LensTraining | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Train a lens in place, to match the output of `model` on a corpus.

    Texts (pieces of at most `max_length` tokens, each once) are shuffled and parted into training
    and held-out ones by the seed. Padding is never learnt from. The lens ends up with each layer's best parameters on
    the held-out texts.

    Args:
        corpus: texts, facts (as their statements), or a file (see `corpus.token_batches`).
        checkpoint: a folder; the state is written there at each judgement, and a training with the
            same lens, settings and corpus goes on from it.

    Returns:
        `TrainingRun`.

    Raises:
        ValueError: a lens of another model, an unknown objective, a corpus of fewer than two texts,
            a checkpoint of another training, or a loss that is not finite.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_lens(model, lens)
    plan = settings or LensTraining()
    objective = plan.objective or lens.objectives[0]
    if objective not in lens.objectives:
        raise ValueError(
            f"unknown objective {objective!r}; a {lens.type_name} lens has {lens.objectives}"
        )
    train, held_out = _part(model, corpus, plan)
    judged = list(batches_in_order(held_out, plan.max_tokens))
    tensors = list(lens.parameters.values())
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimiser = torch.optim.Adam(tensors, lr=plan.learning_rate)
    best = {name: tensor.detach().clone() for name, tensor in lens.parameters.items()}
    state = _Progress()
    identity = _identity(lens, plan, train)
    if checkpoint is not None and (Path(checkpoint) / "training.json").exists():
        state = _resume(Path(checkpoint), identity, lens, best, optimiser)
    if not state.before:
        state.before = judge(model, lens, judged, objective, last_only=plan.last_only)
        state.best = dict(state.before)
    try:
        stream = _stream(train, plan, skip=state.step)
        with tqdm(
            total=plan.steps, initial=state.step, disable=not progress, desc=lens.name
        ) as bar:
            while state.step < plan.steps and state.waited < plan.patience:
                for group in optimiser.param_groups:
                    group["lr"] = plan.learning_rate * (1 - state.step / plan.steps)
                loss = _step(model, lens, next(stream), objective, plan, state.step, optimiser)
                state.step += 1
                state.running.append(loss)
                bar.update()
                if state.step % plan.evaluate_every and state.step < plan.steps:
                    continue
                now = judge(model, lens, judged, objective, last_only=plan.last_only)
                _keep_best(lens, best, now, state, plan)
                bar.set_postfix(held_out=f"{sum(now.values()) / len(now):.4f}")
                if checkpoint is not None:
                    _write(Path(checkpoint), identity, lens, best, optimiser, state)
    finally:
        for name, tensor in best.items():
            lens.parameters[name].requires_grad_(False)
            lens.parameters[name].copy_(tensor)
    lens.trained_on = fingerprint(model)
    lens.notes = {
        "training": asdict(plan) | {"objective": objective}, "steps": state.step,
        "held_out_before": {str(k): v for k, v in state.before.items()},
        "held_out_after": {str(k): v for k, v in state.best.items()},
    }  # fmt: skip
    return TrainingRun(
        pd.DataFrame(state.curve), state.before, state.best, state.step,
        state.waited >= plan.patience,
    )  # fmt: skip


def judge(
    model: HookedModel,
    lens: TrainedLens,
    batches: Iterable[Batch],
    objective: str,
    *,
    last_only: bool = False,
) -> dict[int, float]:
    """Layer -> mean loss of an objective over the real tokens of some batches, nats."""
    sums = dict.fromkeys(lens.layers, 0.0)
    count = 0
    with torch.no_grad():
        for batch in batches:
            cells = real_cells(batch, last_only=last_only)
            for rows, columns in zip(cells[0].split(512), cells[1].split(512), strict=True):
                example = make_example(
                    model, lens, batch, (rows, columns), without_heads=objective == "leave_one_out"
                )
                count += len(rows)
                for layer in lens.layers:
                    parts = [p.sum().item() for p in lens.losses(example, layer, objective)]
                    sums[layer] += sum(parts) / len(parts)
    return {layer: total / count for layer, total in sums.items()}


def _step(
    model: HookedModel,
    lens: TrainedLens,
    batch: Batch,
    objective: str,
    plan: LensTraining,
    step: int,
    optimiser: Adam,
) -> float:
    rows, columns = real_cells(batch, last_only=plan.last_only)
    if plan.cells is not None and len(rows) > plan.cells:
        # A generator for each step, so that a resumed training draws what it would have drawn.
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        drawn = torch.randperm(len(rows), generator=generator)[: plan.cells].sort().values
        rows, columns = rows[drawn], columns[drawn]
    example = make_example(
        model, lens, batch, (rows, columns), without_heads=objective == "leave_one_out"
    )
    optimiser.zero_grad()
    total = 0.0
    n_heads = int(model.cfg.n_heads)
    parts = len(lens.layers) * (1 if objective in ("sum", "output") else n_heads)
    with torch.enable_grad():
        for layer in lens.layers:
            for loss in lens.losses(example, layer, objective):
                mean = loss.mean()
                # Layers do not share parameters: each learns from its own loss at full strength.
                (mean * (len(lens.layers) / parts)).backward()
                total += mean.item() / parts
    if total != total or total in (float("inf"), float("-inf")):
        raise ValueError(
            f"the loss of step {step} is {total}; lower learning_rate, or load the model in float32"
        )
    optimiser.step()
    return total


def _keep_best(
    lens: TrainedLens,
    best: Mapping[str, Tensor],
    now: Mapping[int, float],
    state: _Progress,
    plan: LensTraining,
) -> None:
    better = [layer for layer in lens.layers if now[layer] < state.best[layer]]
    # Waiting is counted against the tolerance; any improvement is kept.
    gains = any(state.best[layer] - now[layer] >= plan.tolerance for layer in better)
    state.waited = 0 if gains else state.waited + 1
    for layer in better:
        state.best[layer] = now[layer]
        for name, tensor in lens.parameters.items():
            best[name][lens.row(layer)] = tensor.detach()[lens.row(layer)]
    row = {"step": float(state.step), "train_loss": sum(state.running) / len(state.running)}
    row["held_out"] = sum(now.values()) / len(now)
    state.curve.append(row | {f"layer_{layer}": value for layer, value in now.items()})
    state.running = []


# -- the corpus -----------------------------------------------------------------------------------

Row = tuple[int, ...]


def _part(model: HookedModel, corpus: Corpus, plan: LensTraining) -> tuple[list[Row], list[Row]]:
    """Token rows to learn from and to be judged on, each row once."""
    import numpy as np

    seen: dict[Row, None] = {}
    for batch in token_batches(
        model, corpus, max_tokens=plan.max_tokens, max_length=plan.max_length
    ):
        for row, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            seen[tuple(row[:n])] = None
    rows = list(seen)
    if len(rows) < 2:
        raise ValueError(
            f"the corpus has {len(rows)} distinct text(s); training needs some to learn from and "
            "others to be judged on"
        )
    order = np.random.default_rng(plan.seed).permutation(len(rows))
    n = min(len(rows) - 1, max(1, round(plan.held_out * len(rows))))
    held_out, total = [], 0
    for i in order[:n]:
        held_out.append(rows[i])
        total += len(rows[i])
        if total >= plan.held_out_tokens:
            break
    return [rows[i] for i in order[n:]], held_out


def _stream(rows: Sequence[Row], plan: LensTraining, *, skip: int) -> Iterator[Batch]:
    """Batches without end, in a new order at each round; the first `skip` are passed over."""
    import numpy as np

    n, rounds = 0, 0
    while True:
        order = np.random.default_rng([plan.seed, rounds]).permutation(len(rows))
        for batch in batches_in_order((rows[i] for i in order), plan.max_tokens):
            n += 1
            if n > skip:
                yield batch
        rounds += 1


# -- checkpoints ----------------------------------------------------------------------------------


def _identity(lens: TrainedLens, plan: LensTraining, train: Sequence[Row]) -> dict[str, Any]:
    import hashlib

    texts = hashlib.sha256(repr(train).encode()).hexdigest()[:16]
    found = {
        "lens": {"type": lens.type_name, **lens.settings}, "model": fingerprint(lens.model),
        "settings": asdict(plan), "texts": texts,
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))


def _write(
    folder: Path,
    identity: Mapping[str, Any],
    lens: TrainedLens,
    best: Mapping[str, Tensor],
    optimiser: Adam,
    state: _Progress,
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in lens.parameters.items():
        tensors |= {f"now.{name}": tensor.detach(), f"best.{name}": best[name]}
        for key, value in optimiser.state[tensor].items():
            tensors[f"adam.{key}.{name}"] = value
    plain = {k: v.cpu().contiguous() for k, v in tensors.items()}
    temporary = folder / "training.tmp"
    # The step is in the file itself: a crash between the two writes is noticed on resuming.
    save_file(plain, temporary, metadata={"step": str(state.step)})
    temporary.replace(folder / "training.safetensors")
    record = {"identity": dict(identity), "progress": asdict(state)}
    (folder / "training.json.tmp").write_text(json.dumps(record), encoding="utf-8")
    (folder / "training.json.tmp").replace(folder / "training.json")


def _resume(
    folder: Path,
    identity: Mapping[str, Any],
    lens: TrainedLens,
    best: dict[str, Tensor],
    optimiser: Adam,
) -> _Progress:
    from safetensors import safe_open

    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    known, given = record["identity"], dict(identity)
    different = [key for key in given if known.get(key) != given[key]]
    if different:
        raise ValueError(
            f"{folder} holds a training with another {', '.join(different)}; use another folder, "
            "or delete it to start anew"
        )
    found = record["progress"]
    with safe_open(folder / "training.safetensors", framework="pt") as file:
        if (file.metadata() or {}).get("step") != str(found["step"]):
            raise ValueError(f"{folder} was cut off while it was written; delete it to start anew")
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, tensor in lens.parameters.items():
            tensor.copy_(stored[f"now.{name}"])
            best[name].copy_(stored[f"best.{name}"])
            optimiser.state[tensor] = {
                key: stored[f"adam.{key}.{name}"].to(tensor.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    for key in ("before", "best"):
        found[key] = {int(layer): value for layer, value in found[key].items()}
    return _Progress(**found)
