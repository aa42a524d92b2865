"""Attribution graphs of circuit-tracer's JSON: is the bridge a node, and how much passes through it?

Such a graph (Ameisen et al. 2025, *Circuit Tracing*) holds, for one prompt, features of transcoders at token
positions, what the transcoders miss (error nodes), the tokens' embeddings and the likeliest next tokens; a link's
weight is the direct effect of its source on its target. What a feature stands for is a label that somebody
gave it (``clerp``), or the name of a group of nodes that a reader pinned (``supernodes``).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mi_hops.facts.tables import find
from mi_hops.result.files import read_object

_LOGIT, _TOKEN, _ERROR = "logit", "embedding", "mlp reconstruction error"
_FIELDS = {"node_id": str, "layer": str, "ctx_idx": int, "feature_type": str}


@dataclass(frozen=True, repr=False)
class AttributionGraph:
    """One prompt's graph.

    Attributes:
        prompt: its text.
        tokens: its tokens.
        nodes: one row per node, by ``node``: ``type``, ``layer`` (-1 for embeddings, one more than the last
            block's for logits), ``position``, ``token`` at that position, ``label``, ``group`` (the supernode
            it is in, if any), ``probability`` (of a logit) and ``activation`` (of a feature).
        links: ``source``, ``target``, ``weight``.
    """

    prompt: str
    tokens: Sequence[str]
    nodes: pd.DataFrame
    links: pd.DataFrame

    def __repr__(self) -> str:
        return f"AttributionGraph({self.prompt!r:.80}: {len(self.nodes)} nodes, {len(self.links)} links)"

    @property
    def target(self) -> str:
        """The likeliest logit node."""
        logits = self.nodes[self.nodes["type"] == _LOGIT]
        return str(logits["probability"].idxmax())

    def find(self, names: str | Iterable[str]) -> pd.DataFrame:
        """The features and logits whose label or group contains one of the names.

        Args:
            names: of the bridge, say, with its aliases; whole words, without regard to case.

        Raises:
            ValueError: no name.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not any(n.strip() for n in wanted):
            raise ValueError("no name was given; give the bridge's and its aliases")
        said = self.nodes["label"] + " | " + self.nodes["group"]
        inner = ~self.nodes["type"].isin([_TOKEN, _ERROR])
        return self.nodes[inner & said.map(lambda text: any(find(n, text) for n in wanted))]

    def through(self, nodes: Iterable[str], target: str | None = None) -> float:
        """The share of the paths into a node, by weight, that go through one of the given nodes.

        A path's weight is the product of its links' shares; a link's share is the size of its weight among
        all links into its target. Paths begin at the tokens and at what the transcoders miss.

        Args:
            nodes: as `find` gives them (its index).
            target: default the likeliest logit.

        Returns:
            Between 0 and 1; 0 without nodes.

        Raises:
            ValueError: a node that is not in the graph.
        """
        wanted, end = set(nodes), self.target if target is None else target
        if unknown := sorted((wanted | {end}) - set(self.nodes.index)):
            raise ValueError(f"no node {unknown[:3]} in this graph of {len(self.nodes)}")
        whole = self._reach(end, set())
        return 0.0 if whole == 0 else 1 - self._reach(end, wanted) / whole

    def _reach(self, end: str, without: Set[str]) -> float:
        """The weight of all paths from beginnings to `end` that pass none of `without`."""
        into = defaultdict(list)
        for source, goal, weight in self.links.itertuples(index=False):
            into[goal].append((source, abs(weight)))
        starts = set(self.nodes.index[self.nodes["type"].isin([_TOKEN, _ERROR])])
        reach = dict.fromkeys(without, 0.0)
        order = self.nodes.sort_values("layer", kind="stable").index
        for node in order:  # links lead upward, so sources come first
            if node not in without:
                total = sum(size for _, size in into[node])
                passed = sum(size * reach.get(source, 0.0) for source, size in into[node])
                reach[node] = (passed / total if total else 0.0) + (node in starts)
        return reach[end]


def load_attribution_graph(path: str | os.PathLike[str]) -> AttributionGraph:
    """A graph file of circuit-tracer (or Neuronpedia): JSON with ``metadata``, ``nodes``, ``links``.

    Raises:
        ValueError: a file that is none, a node without an id, or a link that leads to no node or not upward.

    Examples:
        >>> import json, tempfile
        >>> from mi_hops.patching import load_attribution_graph
        >>> token = {"node_id": "E_5_1", "layer": "E", "ctx_idx": 1, "feature_type": "embedding"}
        >>> bridge = {"node_id": "3_7_1", "layer": "3", "ctx_idx": 1,
        ...     "feature_type": "cross layer transcoder", "clerp": "Texas"}
        >>> logit = {"node_id": "27_9_1", "layer": "27", "ctx_idx": 1, "feature_type": "logit",
        ...     "token_prob": 0.5, "clerp": 'Output "Austin" (p=0.500)'}
        >>> links = [{"source": "E_5_1", "target": "3_7_1", "weight": 2.0},
        ...     {"source": "3_7_1", "target": "27_9_1", "weight": 3.0},
        ...     {"source": "E_5_1", "target": "27_9_1", "weight": -1.0}]
        >>> metadata = {"prompt": "<bos>Dallas", "prompt_tokens": ["<bos>", "Dallas"]}
        >>> path = tempfile.mkdtemp() + "/graph.json"
        >>> with open(path, "w") as file:
        ...     json.dump({"metadata": metadata, "nodes": [token, bridge, logit], "links": links}, file)
        >>> graph = load_attribution_graph(path)
        >>> graph.through(graph.find("Texas").index)
        0.75
    """
    found = read_object(path)
    nodes, links, metadata = (found.get(name) for name in ("nodes", "links", "metadata"))
    if not (isinstance(nodes, list) and isinstance(links, list) and isinstance(metadata, dict)):
        raise ValueError(
            f"{path} is no attribution graph: it needs metadata, nodes and links, and has "
            f"{sorted(found)[:5]}"
        )
    tokens = [str(t) for t in metadata.get("prompt_tokens", [])]
    groups = _groups(found.get("qParams"))
    rows = [_node(path, node, tokens, groups) for node in nodes]
    layers = {row["node"]: row["layer"] for row in rows}
    if len(layers) < len(rows) or _LOGIT not in {row["type"] for row in rows}:
        raise ValueError(f"{path} is no attribution graph: a node twice, or no logit node")
    table = pd.DataFrame(rows).set_index("node")
    told = str(metadata.get("prompt", ""))
    return AttributionGraph(told, tokens, table, _links(path, links, layers))


def _node(path: Any, node: Any, tokens: Sequence[str], groups: Mapping[str, str]) -> dict[str, Any]:
    bad = [
        name
        for name, kind in _FIELDS.items()
        if not isinstance(node, dict) or not isinstance(node.get(name), kind)
    ]
    if bad:
        raise ValueError(f"{path}: a node lacks {bad}: {node!r:.120}")
    at = int(node["ctx_idx"])
    activation = node.get("activation")
    return {
        "node": node["node_id"],
        "type": node["feature_type"],
        "layer": -1 if node["layer"] == "E" else int(node["layer"]),
        "position": at,
        "token": tokens[at] if 0 <= at < len(tokens) else "",
        "label": str(node.get("clerp") or ""),
        "group": groups.get(node["node_id"], ""),
        "probability": float(node.get("token_prob") or 0.0),
        "activation": float("nan") if activation is None else float(activation),
    }


def _groups(pinned: Any) -> dict[str, str]:
    """Node -> the name of the supernode it is in; a supernode is a list of its name and its nodes."""
    listed = pinned.get("supernodes", []) if isinstance(pinned, dict) else []
    return {str(n): str(group[0]) for group in listed if group for n in group[1:]}


def _links(path: Any, links: Sequence[Any], layers: Mapping[Any, int]) -> pd.DataFrame:
    rows = []
    for link in links:
        ends = [link.get(k) for k in ("source", "target")] if isinstance(link, dict) else [None]
        if any(end not in layers for end in ends):
            raise ValueError(f"{path}: a link between nodes that are not there: {link!r:.120}")
        if layers[ends[0]] >= layers[ends[1]]:
            raise ValueError(f"{path}: a link that does not lead upward: {link!r:.120}")
        rows.append((*ends, float(link.get("weight", 0.0))))
    return pd.DataFrame(rows, columns=["source", "target", "weight"])
