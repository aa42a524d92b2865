"""Circuits as the graph JSON of EAP-IG's code, which MIB takes as well; our own is `Circuit.save`'s."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from mi_hops.model import HookedModel
from mi_hops.patching.circuit import Circuit, next_writers
from mi_hops.patching.nodes import Edge, all_edges, require_edges
from mi_hops.result.files import read_object, replacing

if TYPE_CHECKING:
    from mi_hops.result.result import Result


def save_eap_ig(
    model: HookedModel,
    circuit: Circuit,
    path: str | os.PathLike[str],
    *,
    scores: Result | None = None,
    overwrite: bool = False,
) -> None:
    """Write a circuit as EAP-IG's graph JSON: every edge, its score, and whether it is included.

    That graph has keys and values of every query head; where heads share theirs, each gets the same
    edge. So what was one edge counts as several there.

    Args:
        scores: of edges, as for `extract` (the mean of ``change``); without them every score is 0.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        ValueError: another suffix than ``.json``, or edges that are not the model's.
    """
    theirs = _their_edges(model)
    require_edges(circuit.edges, theirs.values())
    mean = None if scores is None else scores["change"].mean("example")
    edges: dict[str, dict[str, Any]] = {}
    for name, (u, v) in theirs.items():
        score = 0.0 if mean is None else float(mean.sel(sender=u, receiver=v))
        edges[name] = {"score": score, "in_graph": (u, v) in circuit.edges}
    used = {_their_node(name) for name in circuit.nodes}
    nodes = dict.fromkeys(re.split(r"->|<", name)[part] for name in edges for part in (0, 1))
    cfg = {
        "n_layers": int(model.cfg.n_layers),
        "n_heads": int(model.cfg.n_heads),
        "d_model": int(model.cfg.d_model),
        "parallel_attn_mlp": bool(getattr(model.cfg, "parallel_attn_mlp", False)),
    }
    graph = {"cfg": cfg, "nodes": {n: {"in_graph": n in used} for n in nodes}, "edges": edges}
    with replacing(path, suffix=".json", overwrite=overwrite) as partial:
        partial.write_text(json.dumps(graph), encoding="utf-8")


def load_eap_ig(model: HookedModel, path: str | os.PathLike[str]) -> Circuit:
    """Read a circuit from EAP-IG's graph JSON; edges to heads that share keys or values are merged.

    Raises:
        ValueError: a file that is no such graph, or a graph of another model's shape.
    """
    found = read_object(path)
    edges = found.get("edges")
    if not isinstance(edges, dict):
        raise ValueError(f"{path} is no graph of EAP-IG's code: it has no table of edges")
    ours = _their_edges(model)
    if edges.keys() != ours.keys():
        other = sorted(edges.keys() ^ ours.keys())
        raise ValueError(
            f"{path} has {len(edges)} edges and the model {len(ours)}, not the same ones, e.g. "
            f"{other[:3]}; is it a graph of this model?"
        )
    return Circuit(frozenset(ours[name] for name, edge in edges.items() if edge["in_graph"]))


def _their_node(name: str) -> str:
    """A component's name in EAP-IG's code."""
    if match := re.fullmatch(r"L(\d+)H(\d+)", name):
        return f"a{match[1]}.h{match[2]}"
    return {"embed": "input"}.get(name, name.replace("MLP", "m"))


def _their_edges(model: HookedModel) -> dict[str, Edge]:
    """Name in EAP-IG's code -> our edge; one edge has a name for each query head that shares its reader."""
    shaped = next_writers(model)
    found = {}
    for u, v in all_edges(model):
        role = v.partition(".")[2]
        for head in shaped.get(v, [v]):
            name = f"{_their_node(u)}->{_their_node(head)}"
            found[f"{name}<{role}>" if role else name] = (u, v)
    return found
