"""Circuits: sets of edges, and what is left of a behaviour when all others are cut.

A circuit is run exactly: every reader's input is the corrupted run's, plus, for the circuit's edges
only, what each writer now writes beyond its corrupted write. All edges give the clean run, none the
corrupted one, all but one the direct path patching of that one. Faithfulness of a circuit (Wang et
al. 2022; Hanna et al. 2024)::

    (score of the circuit - score of the corrupted run) / (score of the clean run - of the corrupted)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum

from mi_hops.model import (
    Hook,
    HookedModel,
    device_of,
    dtype_of,
    forward,
    hook_name,
    n_heads_of,
    provenance,
    w_o,
)
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import captured, require_effect
from mi_hops.patching.nodes import Node, Writes, job_of_nodes, readers, writers
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, require_finite
from mi_hops.sweep.normalising import normalised
from mi_hops.sweep.pairs import PairsLike
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import score
from mi_hops.text.tokens import Prompt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Edge = tuple[str, str]


@dataclass(frozen=True, repr=False)
class Circuit:
    """A set of edges, each (writer, reader) by name (see `nodes`)."""

    edges: frozenset[Edge]

    def __repr__(self) -> str:
        shown = ", ".join(f"{u} -> {v}" for u, v in sorted(self.edges)[:5])
        return f"Circuit: {len(self)} edges{': ' * bool(self.edges)}{shown}"

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def nodes(self) -> list[str]:
        """Names of the components the edges join, in alphabetical order."""
        ends = {name for edge in self.edges for name in edge}
        return sorted({name.split(".")[0] for name in ends})

    def pruned(self, model: HookedModel) -> Circuit:
        """Without edges that lead nowhere: every kept one lies on a way from embedding to logits.

        A key or value head leads on to all query heads that share it.
        """
        after = _next_writers(model)
        edges = set(self.edges)
        fed = {"embed"}
        while True:  # forward: what the embedding reaches
            found = {w for u, v in edges if u in fed for w in after.get(v, ())} | fed
            if found == fed:
                break
            fed = found
        edges = {(u, v) for u, v in edges if u in fed}
        useful = {"logits"}
        while True:  # backward: what reaches the logits
            sending = {u for u, v in edges if v in useful}
            found = useful | {v for v, ws in after.items() if sending & set(ws)}
            if found == useful:
                break
            useful = found
        return Circuit(frozenset((u, v) for u, v in edges if v in useful))


def all_edges(model: HookedModel) -> list[Edge]:
    """Every edge between embedding, heads, MLPs and logits."""
    return [
        (u.name, v.name)
        for u in writers(model, "all")
        for v in readers(model, "all")
        if u.reaches(v)
    ]


def extract(
    model: HookedModel,
    scores: Result,
    n_edges: int,
    *,
    by: Literal["size", "serving"] = "size",
    select: Literal["top", "greedy"] = "top",
    prune: bool = True,
) -> Circuit:
    """The `n_edges` best edges of an edge attribution, by the mean of ``change`` over examples.

    Args:
        scores: of edges: what `attribute_edges` or `path_patch` gave.
        select: ``"top"`` takes the best edges wherever they are; ``"greedy"`` grows the circuit
            from the logits, each time by the best edge into what it already holds, so that small
            circuits hang together (Hanna et al. 2024).
        by: ``"size"`` takes the largest changes of either sign, ``"serving"`` those that serve the
            answer only (lower it when corrupted, raise it when restored).
        prune: drop edges that then lead nowhere; the circuit may be smaller than asked for.

    Raises:
        ValueError: scores of no edges; fewer than one edge, or more than there are.
    """
    if not {"sender", "receiver"} <= set(scores.data.dims):
        raise ValueError(
            f"edges have a sender and a receiver, and these scores are on {list(scores.data.dims)}; "
            "pass those of attribute_edges or path_patch"
        )
    mean = scores["change"].mean("example")
    names = product(mean["sender"].values.tolist(), mean["receiver"].values.tolist())
    values = mean.transpose("sender", "receiver").values.ravel().tolist()
    edges = [(u, v, x) for (u, v), x in zip(names, values, strict=True) if isfinite(x)]
    if not 1 <= n_edges <= len(edges):
        raise ValueError(f"n_edges is {n_edges}; expected 1 to {len(edges)}, the edges scored")
    if by == "serving":
        sign = -1 if scores.provenance.get("direction") == "noise" else 1
        edges = [(u, v, sign * x) for u, v, x in edges if sign * x > 0]
    elif by != "size":
        raise ValueError(f"by is {by!r}; expected 'size' or 'serving'")
    if select not in ("top", "greedy"):
        raise ValueError(f"select is {select!r}; expected 'top' or 'greedy'")
    ranked = [(u, v) for u, v, _ in sorted(edges, key=lambda e: -abs(e[2]))]
    best = ranked[:n_edges] if select == "top" else _grown(model, ranked, n_edges)
    circuit = Circuit(frozenset(best))
    return circuit.pruned(model) if prune else circuit


def _grown(model: HookedModel, ranked: Sequence[Edge], n_edges: int) -> list[Edge]:
    """Edges added from the logits down, each the best one whose reader matters already."""
    into: dict[str, list[str]] = {}  # writer -> the readers that shape it
    for reader, shaped in _next_writers(model).items():
        for writer in shaped:
            into.setdefault(writer, []).append(reader)
    rank = {edge: i for i, edge in enumerate(ranked)}
    by_reader: dict[str, list[Edge]] = {}
    for edge in ranked:
        by_reader.setdefault(edge[1], []).append(edge)
    open_edges = {(rank[e], e) for e in by_reader.get("logits", ())}
    held = {"logits"}
    taken: list[Edge] = []
    while open_edges and len(taken) < n_edges:
        best = min(open_edges)
        open_edges.remove(best)
        taken.append(best[1])
        for reader in into.get(best[1][0], ()):
            if reader not in held:
                held.add(reader)
                open_edges |= {(rank[e], e) for e in by_reader.get(reader, ())}
    return taken


def faithfulness(
    model: HookedModel,
    pairs: PairsLike,
    circuits: Sequence[Circuit],
    *,
    metric: MetricLike = "logit_diff",
    limits: Limits | None = None,
) -> Result:
    """What circuits keep of the metric, every edge outside them cut to its corrupted value.

    Args:
        pairs: as in `patch`.
        circuits: their edges must be edges of the model.
        limits: ``batch_size`` (here 8 by default) bounds the circuits in one pass; fewer run
            together where memory runs out.

    Returns:
        `Result` on ``example`` and ``circuit`` (its number), with ``faithfulness`` (1 = as the
        clean run, 0 = as the corrupted one; NaN where these score the same) and ``score``; a label
        ``edges`` along ``circuit`` gives their sizes; baselines ``clean`` and ``corrupted``.

    Raises:
        ValueError: no circuits, an edge the model does not have, several metrics.
        TokenError: pairs that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> whole = mi_hops.patching.Circuit(frozenset(mi_hops.patching.all_edges(model)))
        >>> kept = mi_hops.faithfulness(model, pairs.select([0]), [whole])
        >>> round(float(kept["faithfulness"][0, 0]), 2)
        1.0
    """
    limits = limits or Limits(batch_size=8)
    job = job_of_nodes(model, pairs, metric=metric, limits=limits)
    if not circuits:
        raise ValueError("got 0 circuits; need 1 or more")
    bases = job.scored()
    runner = CircuitRunner(model)
    masks = torch.stack([runner.mask(c) for c in circuits])
    scores = torch.empty(len(bases), len(circuits), dtype=wide_dtype(dtype_of(model)))
    for i in progress_bar(range(len(bases)), label="pairs", show=limits.progress):
        ready = runner.prepare(bases[i], job.corrupted[i])

        def run(part: Sequence[int], ready: _Ready = ready) -> Tensor:
            return ready.scores(masks[list(part)])

        parts = batched_with_oom_backoff(range(len(circuits)), limits.batch_size, run)
        scores[i] = torch.cat([found for _, found in parts])
    clean, corrupted = (score(model, run)[:, 0] for run in (bases, job.other_scored()))
    share = normalised(scores, clean[:, None], corrupted[:, None], undefined="nan")
    require_effect(share, job.why_no_effect(clean, corrupted))
    unit = job.metrics.units[0]
    return Result.from_arrays(
        {
            "faithfulness": (("example", "circuit"), share),
            "score": (("example", "circuit"), scores),
        },
        baselines={"clean": ("example", clean), "corrupted": ("example", corrupted)},
        coords={
            "example": job.pairs.labels,
            "circuit": range(len(circuits)),
            "edges": (("circuit",), [len(c) for c in circuits]),
        },
        units={
            "faithfulness": "share kept",
            **dict.fromkeys(("score", "clean", "corrupted"), unit),
        },
        provenance=provenance(
            model,
            method="circuit faithfulness",
            metrics=job.metrics.names,
            edges_of_model=len(runner.edges),
        ),
        title=f"Faithfulness of circuits; {job.one_metric}",
        skipped=job.pairs.skipped,
        allow_nonfinite=True,  # no scale
    )


# -- running a circuit ----------------------------------------------------------------------------


class CircuitRunner:
    """Runs circuits of one model."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.writers, self.readers = writers(model, "all"), readers(model, "all")
        self.edges = set(all_edges(model))
        self._row = {u.name: i for i, u in enumerate(self.writers)}
        self._column = {v.name: j for j, v in enumerate(self.readers)}

    def mask(self, circuit: Circuit) -> Bool[Tensor, "writer reader"]:
        """True at the circuit's edges.

        Raises:
            ValueError: an edge the model does not have.
        """
        unknown = sorted(circuit.edges - self.edges)
        if unknown:
            raise ValueError(f"{len(unknown)} edges are not the model's, e.g. {unknown[:3]}")
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for u, v in circuit.edges:
            mask[self._row[u], self._column[v]] = True
        return mask

    def prepare(self, clean: Scored, corrupted: Prompt) -> _Ready:
        """One pair, with its corrupted run cached."""
        return _Ready(self, clean, corrupted)


class _Ready:
    """A pair whose corrupted activations are at hand."""

    def __init__(self, runner: CircuitRunner, clean: Scored, corrupted: Prompt) -> None:
        self.runner, self.model = runner, runner.model
        self.sweep = Sweep(self.model, [clean])
        n_layers = int(self.model.cfg.n_layers)
        ids = self.sweep.runs[0].tokens
        extra = ids[len(clean.prompt) :]
        both = (_longer(clean.prompt, extra), _longer(corrupted, extra))
        self.corrupt = Writes(self.model, (both[1],), runner.writers)
        kinds = [("resid_pre", i) for i in range(n_layers)]
        kinds += [("resid_mid", i) for i in range(n_layers)] + [("resid_post", n_layers - 1)]
        names = [hook_name(kind, layer) for kind, layer in kinds]
        self.stream = captured(self.model, [both[1]], names)
        first = hook_name("resid_pre", 0)
        embedded = captured(self.model, [both[0]], [first])[first]
        self.embed_change = (embedded - self.stream[first])[0]

    def scores(self, masks: Bool[Tensor, "circuit writer reader"]) -> Float[Tensor, "circuit"]:
        """Scores of circuits, in one pass.

        Raises:
            ValueError: a score that is not finite.
        """
        run = _CircuitPass(self, masks)
        with torch.no_grad():
            tokens = self.sweep.batch.tokens.to(device_of(self.model))
            logits = forward(self.model, tokens, hooks=run.hooks(), grows=True)
        item = self.sweep.prompts[0]
        found = item.metrics[0].score(logits, item.target).cpu()
        require_finite(item.metrics[0].name, found)
        return found


def _longer(prompt: Prompt, extra: Sequence[int]) -> Prompt:
    """The prompt with an answer's tokens behind it."""
    n = len(extra)
    return replace(
        prompt,
        ids=(*prompt.ids, *extra),
        labels=(*prompt.labels, *[""] * n),
        offsets=(*prompt.offsets, *[(0, 0)] * n),
    )


class _CircuitPass:
    """The hooks of one pass: K circuits, each with a row of its own and one for each reader.

    At the input of a block the batch is made anew: K main rows, then, for every circuit, one row
    with the input of each query, key and value head. Norm and projections run on all; then the main
    rows take each head from its reader's row, and go on through attention and MLP.
    """

    def __init__(self, ready: _Ready, masks: Bool[Tensor, "circuit writer reader"]) -> None:
        self.ready, self.model, self.n = ready, ready.model, len(masks)
        self.wide = wide_dtype(dtype_of(self.model))
        self.columns = {node: j for j, node in enumerate(ready.runner.readers)}
        # What each writer writes beyond its corrupted write. Writers come in the order in which they
        # act, so those a reader sees are the ones written so far.
        change = ready.embed_change.to(self.wide)
        self.masks = masks.to(change)
        self.changes = change.new_zeros(self.n, len(ready.runner.writers), *change.shape)
        self.written = 0
        self._write(change)

    def hooks(self) -> list[Hook]:
        """All hooks, in order."""
        n_layers = int(self.model.cfg.n_layers)
        hooks: list[Hook] = []
        for layer in range(n_layers):
            inputs = [
                Node(role, layer, head)
                for role in _INPUTS
                for head in range(n_heads_of(self.model, role))
            ]
            hooks.append((hook_name("resid_pre", layer), self._enter(layer, inputs)))
            for role in _INPUTS:
                rows = [(i, v) for i, v in enumerate(inputs) if v.role == role]
                hooks.append((hook_name(role, layer), self._gather(rows, len(inputs))))
            hooks.append((hook_name("z", layer), self._heads(layer)))
            hooks.append((hook_name("resid_mid", layer), self._enter_mlp(layer)))
            hooks.append((hook_name("mlp_out", layer), self._mlp(layer)))
        hooks.append((hook_name("resid_post", n_layers - 1), self._leave(n_layers)))
        where = self.ready.sweep.scored[0]
        hooks.append(("unembed.hook_in", lambda x: x[:, where]))
        return hooks

    def _write(self, change: Tensor) -> None:
        """What the next writer writes beyond its corrupted write, ``[circuit, pos, d_model]``."""
        self.changes[:, self.written] = change
        self.written += 1

    def _inputs(self, found: Sequence[Node], stream: Tensor) -> Tensor:
        """The stream that readers of one place see, ``[circuit, reader, pos, d_model]``."""
        columns = [self.columns[reader] for reader in found]
        weights = self.masks[:, : self.written, columns]
        moved = einsum(
            "circuit writer reader, circuit writer pos d -> circuit reader pos d",
            weights,
            self.changes[:, : self.written],
        )
        return moved.add_(stream.to(moved))

    def _enter(self, layer: int, inputs: list[Node]) -> Any:
        def fn(x: Tensor) -> Tensor:
            stream = self.ready.stream[hook_name("resid_pre", layer)]
            rows = rearrange(
                self._inputs(inputs, stream), "circuit reader ... -> (circuit reader) ..."
            )
            main = repeat(stream, "1 pos d -> circuit pos d", circuit=self.n)
            return torch.cat([main.to(x), rows.to(x)])

        return fn

    def _gather(self, rows: list[tuple[int, Node]], n_inputs: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            x = x.clone()
            for row, reader in rows:
                own = slice(self.n + row, None, n_inputs)
                x[: self.n, :, reader.head] = x[own][:, :, reader.head]
            return x

        return fn

    def _heads(self, layer: int) -> Any:
        def fn(x: Tensor) -> None:
            weight = w_o(self.model, layer).detach().to(x.device, self.wide)
            for head in range(x.shape[2]):
                written = x[: self.n, :, head].to(self.wide) @ weight[head]
                self._write(written - self.ready.corrupt(Node("head", layer, head), 0))

        return fn

    def _enter_mlp(self, layer: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            x = x.clone()
            stream = self.ready.stream[hook_name("resid_mid", layer)]
            x[: self.n] = self._inputs([Node("mlp", layer)], stream)[:, 0].to(x)
            return x

        return fn

    def _mlp(self, layer: int) -> Any:
        def fn(x: Tensor) -> None:
            self._write(x[: self.n].to(self.wide) - self.ready.corrupt(Node("mlp", layer), 0))

        return fn

    def _leave(self, n_layers: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            stream = self.ready.stream[hook_name("resid_post", n_layers - 1)]
            return self._inputs([Node("logits", n_layers)], stream)[:, 0].to(x)

        return fn


_INPUTS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


def _next_writers(model: HookedModel) -> dict[str, list[str]]:
    """Reader -> the writers whose output it shapes (empty for the logits)."""
    found: dict[str, list[str]] = {}
    for v in readers(model, "all"):
        if v.role == "mlp":
            found[v.name] = [v.name]
        elif v.head is not None:
            shared = int(model.cfg.n_heads) // n_heads_of(model, v.role)
            group: Iterable[int] = range(v.head * shared, (v.head + 1) * shared)
            found[v.name] = [Node("head", v.layer, h).name for h in group]
    return found
