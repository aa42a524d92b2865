"""The model as a graph: nodes that write to the residual stream, and nodes that read it.

Writers: ``"embed"``, heads ``"L3H2"``, whole attention layers ``"ATTN3"``, ``"MLP3"``.
Readers: ``"L3H2.q"``, ``"L3H2.k"``, ``"L3H2.v"`` (key/value heads as they are counted),
``"MLP3"``, ``"logits"``. There is an edge from every writer to every reader that comes after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import repeat
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import (
    Hook,
    HookedModel,
    device_of,
    forward,
    hook_name,
    n_heads_of,
    provenance,
    w_o,
)
from mi_hops.model.hooks import mlp_input
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.core import captured
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Intervention, Site, replace
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.pairs import Pairs, PairsLike
from mi_hops.sweep.sites import Direction, Sites
from mi_hops.text.tokens import Prompt

#: (writer, reader) by name.
Edge = tuple[str, str]

Role = Literal["embed", "head", "attn", "mlp", "q", "k", "v", "logits"]


@dataclass(frozen=True)
class Node:
    """A writer or reader of the residual stream.

    Attributes:
        role: what it is.
        layer: its block; 0 for the embedding and the number of blocks for the logits.
        head: for heads and their inputs.
        beside: of an MLP: it runs beside the attention of its block, whose input it reads (parallel
            blocks, as in Pythia), and not behind it.
    """

    role: Role
    layer: int
    head: int | None = None
    beside: bool = False

    @property
    def name(self) -> str:
        """As in the module's description."""
        if self.role in ("embed", "logits"):
            return self.role
        if self.role in ("mlp", "attn"):
            return f"{self.role.upper()}{self.layer}"
        head = f"L{self.layer}H{self.head}"
        return head if self.role == "head" else f"{head}.{self.role}"

    @property
    def stage(self) -> int:
        """When it acts: writers reach the readers of later stages only."""
        if self.role == "embed":
            return -1
        return 2 * self.layer + (self.role == "mlp" and not self.beside)

    def reaches(self, reader: Node) -> bool:
        """Whether there is an edge from this writer to `reader`."""
        return self.stage < reader.stage


def writers(model: HookedModel, given: str | Iterable[str]) -> list[Node]:
    """Writers by name or group: ``"heads"``, ``"attns"``, ``"mlps"``, ``"all"`` (embedding, heads, MLPs).

    Raises:
        ValueError: an unknown name, or a layer or head that does not exist.
    """
    layers = range(int(model.cfg.n_layers))
    heads = [Node("head", i, h) for i in layers for h in range(n_heads_of(model, "z"))]
    mlps = _mlps(model)
    attns = [Node("attn", i) for i in layers]
    embed = [Node("embed", 0)]
    groups = {
        "heads": heads,
        "attns": attns,
        "mlps": mlps,
        "all": sorted([*embed, *heads, *mlps], key=lambda n: n.stage),
    }
    known = {n.name: n for n in [*embed, *heads, *attns, *mlps]}
    return _named("writer", given, groups, known)


def readers(model: HookedModel, given: str | Iterable[str]) -> list[Node]:
    """Readers by name or group: ``"q"``, ``"k"``, ``"v"``, ``"mlps"``, ``"all"`` (with the logits).

    Raises:
        ValueError: an unknown name, or a layer or head that does not exist.
    """
    n_layers = int(model.cfg.n_layers)
    groups: dict[str, list[Node]] = {"mlps": _mlps(model)}
    inputs: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    for role in inputs:
        groups[role] = [
            Node(role, i, h) for i in range(n_layers) for h in range(n_heads_of(model, role))
        ]
    logits = Node("logits", n_layers)
    every = [*(n for group in groups.values() for n in group), logits]
    known = {n.name: n for n in every}
    groups["all"] = sorted(every, key=lambda n: (n.stage, n.role))
    return _named("reader", given, groups, known)


def _mlps(model: HookedModel) -> list[Node]:
    """The MLPs; none where blocks are attention only."""
    read = {i: mlp_input(model, i) for i in range(int(model.cfg.n_layers))}
    return [Node("mlp", i, beside=kind == "resid_pre") for i, kind in read.items() if kind]


def all_edges(model: HookedModel) -> list[Edge]:
    """Every edge between embedding, heads, MLPs and logits."""
    return [
        (u.name, v.name)
        for u in writers(model, "all")
        for v in readers(model, "all")
        if u.reaches(v)
    ]


def require_edges(edges: Iterable[Edge], known: Iterable[Edge]) -> None:
    """Refuse edges that are not among the model's, with a ValueError."""
    if unknown := sorted(set(edges) - set(known)):
        raise ValueError(f"{len(unknown)} edges are not the model's, e.g. {unknown[:3]}")


def _named(
    what: str, given: str | Iterable[str], groups: dict[str, list[Node]], known: dict[str, Node]
) -> list[Node]:
    names = [given] if isinstance(given, str) else list(given)
    found: dict[Node, None] = {}
    for name in names:
        if name in groups:
            found |= dict.fromkeys(groups[name])
        elif name in known:
            found[known[name]] = None
        else:
            like = [k for k in known if re.sub(r"\d", "", k) == re.sub(r"\d", "", name)]
            hint = f"{like[0]} to {like[-1]} exist" if like else "no name is like it"
            raise ValueError(
                f"unknown {what} {name!r} ({hint}); expected a name such as {list(known)[:3]} or "
                f"a group of {list(groups)}"
            )
    if not found:
        raise ValueError(f"no {what} was given")
    return list(found)


# -- what writers write ----------------------------------------------------------------------------


class Writes:
    """What writers add to the residual stream in some prompts.

    Args:
        store: activations of the prompts at `hook_names`, where they are at hand.

    Raises:
        ValueError: heads of a model in which attention writes anything but the sum of ``z @ W_O``
            and a constant (a norm after attention, for instance).
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: Sequence[Prompt],
        nodes: Iterable[Node],
        store: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._prompts = model, list(prompts)
        nodes = list(nodes)
        if store is None:
            store = captured(model, self._prompts, self.hook_names(nodes))
        self._store = store
        for layer in sorted({n.layer for n in nodes if n.role == "head"}):
            self._check(layer)

    @classmethod
    def hook_names(cls, nodes: Iterable[Node]) -> list[str]:
        """Where activations are taken that the writes of these nodes are made of."""
        names = {cls._hook(n) for n in nodes}
        return sorted(names | {hook_name("attn_out", n.layer) for n in nodes if n.role == "head"})

    def __call__(self, node: Node, example: int) -> Float[Tensor, "pos d_model"]:
        """In float32 or wider."""
        found = self._store[self._hook(node)][example, : len(self._prompts[example])]
        wide = wide_dtype(found.dtype)
        found = found.to(wide)
        if node.role != "head":
            return found
        weight = w_o(self._model, node.layer).detach()[node.head]
        return found[:, node.head] @ weight.to(found.device, wide)

    def differences(
        self, nodes: Sequence[Node], one: Sequence[int], other: Sequence[int]
    ) -> Float[Tensor, "row sender pos d_model"]:
        """What writers write in some prompts beyond what they write in others, pair by pair.

        On the model's device; 0 behind a prompt.
        """
        device = device_of(self._model)
        lengths = [
            min(len(self._prompts[i]), len(self._prompts[j]))
            for i, j in zip(one, other, strict=True)
        ]
        width = max(lengths)
        real = torch.arange(width) < torch.tensor(lengths)[:, None]
        parts: dict[str, Tensor] = {}
        columns = []
        for node in nodes:
            name = self._hook(node)
            if name not in parts:
                found = self._store[name][:, :width]
                found = found.to(wide_dtype(found.dtype))
                moved = found[list(one)] - found[list(other)]
                moved[~real.to(moved.device)] = 0
                if node.role == "head":
                    weight = w_o(self._model, node.layer).detach().to(moved)
                    spec = "row pos head d_head, head d_head d_model -> row head pos d_model"
                    moved = einsum(spec, moved, weight)
                parts[name] = moved.to(device)
            columns.append(parts[name] if node.role != "head" else parts[name][:, node.head])
        return torch.stack(columns, 1)

    @staticmethod
    def _hook(node: Node) -> str:
        kind = {"embed": "resid_pre", "head": "z", "attn": "attn_out", "mlp": "mlp_out"}
        return hook_name(kind[node.role], node.layer)

    def _check(self, layer: int) -> None:
        z = self._store[hook_name("z", layer)][0, : len(self._prompts[0])]
        out = self._store[hook_name("attn_out", layer)][0, : len(self._prompts[0])]
        wide = wide_dtype(z.dtype)
        weight = w_o(self._model, layer).detach().to(z.device, wide)
        written = einsum("pos head d_head, head d_head d_model -> pos d_model", z.to(wide), weight)
        rest = out.to(wide) - written
        narrow = torch.finfo(z.dtype).bits < 32
        scale = float(out.abs().max()) or 1.0
        if float((rest - rest[:1]).abs().max()) > (5e-2 if narrow else 1e-4) * scale:
            raise ValueError(
                f"attention of block {layer} does not write the sum of its heads' z @ W_O (is there "
                "a norm or a scale after it?), so single heads have no write of their own; use "
                f"'ATTN{layer}'"
            )


# -- what readers make of another input ---------------------------------------------------------------


def read_hooks(reader: Node) -> tuple[str, str]:
    """Where a reader's input enters its block, and the hook point of what it makes of it."""
    if reader.role == "mlp":
        entry = "resid_pre" if reader.beside else "resid_mid"
        return entry, hook_name("mlp_out", reader.layer)
    return "resid_pre", hook_name(reader.role, reader.layer)


def probe(
    model: HookedModel,
    tokens: Int[Tensor, "1 pos"],
    reader: Node,
    changes: Float[Tensor, "row pos d_model"],
) -> Float[Tensor, "row pos *rest"]:
    """What a reader's norm and projections make of its input with changes added, exactly.

    The prompt runs up to the reader's block; there its stream is copied for each change, which nothing
    but the readers of that place ever sees. It works on any attention, for no weight is read.
    """
    entry, result = read_hooks(reader)
    found: list[Tensor] = []

    def copy(x: Tensor) -> Tensor:
        return repeat(x, "1 pos d -> row pos d", row=1 + len(changes))

    def alter(x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[:1] + changes.to(x)])

    hooks: list[Hook] = [
        (hook_name("resid_pre", reader.layer), copy),
        (hook_name(entry, reader.layer), alter),
        (result, lambda x: found.append(x[1:])),
    ]
    stop: int | None = reader.layer + 1
    if stop == int(model.cfg.n_layers):  # to the end, but not through the vocabulary
        stop = None
        hooks.append(("unembed.hook_in", lambda x: x[:1, :1]))
    with torch.no_grad():
        forward(model, tokens, hooks=hooks, stop_at_layer=stop, grows=True)
    return found[0]


def arrival(reader: Node, value: Tensor, positions: tuple[int, ...]) -> Intervention:
    """An intervention that gives a reader's own result the value it has from another input."""
    if reader.head is not None:
        value = value[:, reader.head]
    role = "mlp_out" if reader.role == "mlp" else reader.role
    site = Site(role, reader.layer, positions, reader.head)
    return Intervention((site,), replace(value[list(positions)]))


# -- pairs, and results -----------------------------------------------------------------------------


def job_of_nodes(
    model: HookedModel,
    pairs: PairsLike,
    *,
    metric: MetricLike,
    direction: Direction = "noise",
    limits: Limits | None = None,
) -> PatchJob:
    """Pairs, answers and one metric for methods that have no cells, but nodes and edges.

    Raises:
        ValueError: several metrics, or activations in place of prompts.
        TokenError: prompts that do not correspond token by token.
    """
    pairs = Pairs.of(pairs)
    if pairs.activations is not None or pairs.source:
        raise ValueError(
            "edges need both runs of each pair, and this takes no other source of activations; pass "
            "the clean and corrupted prompts alone"
        )
    every = Sites("resid_pre", layers=0, positions="all")
    job = PatchJob(model, pairs, every, metric=metric, direction=direction, limits=limits)
    _ = job.one_metric  # several are refused
    return job


def edge_result(
    job: PatchJob,
    values: Mapping[str, Float[Tensor, "example sender receiver"]],
    baselines: Mapping[str, Float[Tensor, "example"]],
    nodes: tuple[Sequence[Node], Sequence[Node]],
    *,
    title: str,
    units: Mapping[str, str] | None = None,
    **settings: Any,
) -> Result:
    """A `Result` of one value per pair and edge, NaN where there is no edge.

    Args:
        values: ``effect``, in the job's share, and others in the unit of its metric.
        baselines: in the unit of the metric.
        nodes: senders and receivers.
        units: of the baselines whose unit is another.
        settings: what else the provenance remembers.
    """
    senders, receivers = ([node.name for node in side] for side in nodes)
    own = dict.fromkeys((*values, *baselines), job.metrics.units[0])
    return Result.from_arrays(
        {name: (("example", "sender", "receiver"), value) for name, value in values.items()},
        baselines={name: (("example",), value) for name, value in baselines.items()},
        coords={"example": job.pairs.labels, "sender": senders, "receiver": receivers},
        units={**own, "effect": job.share, **(units or {})},
        provenance=provenance(
            job.model, direction=job.direction, metrics=job.metrics.names, **settings
        ),
        title=f"{title}; {job.one_metric}",
        skipped=job.pairs.skipped,
        allow_nonfinite=True,  # no edge, or no scale
    )
