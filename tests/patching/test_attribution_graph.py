"""Graphs in circuit-tracer's layout: labels, groups, and shares of paths counted one by one."""

from __future__ import annotations

import json

import pytest

from mi_hops.patching import load_attribution_graph

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"


def node(name, layer, at, kind=FEATURE, **more):
    return {
        "node_id": name,
        "feature": 1,
        "layer": str(layer),
        "ctx_idx": at,
        "feature_type": kind,
        "jsNodeId": name,
        "clerp": "",
        "influence": 0.5,
        "activation": 3.0 if kind == FEATURE else None,
    } | more


NODES = [
    node("E_5_1", "E", 1, "embedding"),
    node("E_6_2", "E", 2, "embedding"),
    node("0_-1_2", 0, 2, ERROR),
    node("1_4_1", 1, 1, clerp="the city of Dallas"),
    node("3_7_2", 3, 2, clerp="things in Texas"),
    node("4_8_2", 4, 2),
    node("27_9_2", 27, 2, "logit", token_prob=0.6, clerp='Output " Austin" (p=0.600)'),
    node("27_3_2", 27, 2, "logit", token_prob=0.1, clerp='Output " Texas" (p=0.100)'),
]
LINKS = {
    ("E_5_1", "1_4_1"): 1.0,
    ("1_4_1", "3_7_2"): 2.0,
    ("E_6_2", "3_7_2"): -2.0,
    ("0_-1_2", "4_8_2"): 1.0,
    ("E_6_2", "4_8_2"): 3.0,
    ("3_7_2", "27_9_2"): 3.0,
    ("4_8_2", "27_9_2"): -1.0,
    ("3_7_2", "27_3_2"): 1.0,
}


def write(tmp_path, nodes=NODES, links=LINKS, **changes):
    graph = {
        "metadata": {"prompt": "<bos>Dallas is", "prompt_tokens": ["<bos>", "Dallas", " is"]},
        "qParams": {"pinnedIds": [], "supernodes": [["say a capital", "4_8_2"]]},
        "nodes": nodes,
        "links": [{"source": u, "target": v, "weight": w} for (u, v), w in links.items()],
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph | changes), encoding="utf-8")
    return path


def test_the_bridge_is_found_by_label_and_group(tmp_path):
    graph = load_attribution_graph(write(tmp_path))
    assert graph.target == "27_9_2" and graph.tokens[1] == "Dallas"
    assert graph.find("Texas").index.tolist() == ["3_7_2", "27_3_2"]
    assert graph.find(["Lone Star State", "capital"]).index.tolist() == ["4_8_2"]
    assert graph.find("Tex").empty  # whole words
    row = graph.nodes.loc["3_7_2"]
    assert (row["layer"], row["token"], row["type"]) == (3, " is", FEATURE)


def test_shares_of_paths_are_those_counted_by_hand(tmp_path):
    graph = load_attribution_graph(write(tmp_path))
    # Into the logit: 3/4 by way of 3_7_2, of these half by way of 1_4_1; 1/4 by way of 4_8_2.
    assert graph.through(["3_7_2"]) == pytest.approx(0.75)
    assert graph.through(["1_4_1"]) == pytest.approx(0.375)
    assert graph.through(["1_4_1", "3_7_2"]) == pytest.approx(0.75)
    assert graph.through(["1_4_1", "4_8_2"]) == pytest.approx(0.625)
    assert graph.through(["E_6_2"]) == pytest.approx(0.375 + 0.25 * 0.75)
    assert graph.through([]) == 0 and graph.through(["3_7_2"], target="27_3_2") == 1


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no attribution graph: it needs metadata"):
        load_attribution_graph(write(tmp_path, metadata=None))
    with pytest.raises(ValueError, match="no attribution graph: a node twice"):
        load_attribution_graph(write(tmp_path, nodes=[*NODES, NODES[0]]))
    with pytest.raises(ValueError, match=r"a node lacks \['ctx_idx'\]"):
        load_attribution_graph(write(tmp_path, nodes=[NODES[0] | {"ctx_idx": "1"}]))
    with pytest.raises(ValueError, match="between nodes that are not there"):
        load_attribution_graph(write(tmp_path, links={("E_5_1", "9_9_9"): 1.0}))
    with pytest.raises(ValueError, match="does not lead upward"):
        load_attribution_graph(write(tmp_path, links={("4_8_2", "3_7_2"): 1.0}))
    graph = load_attribution_graph(write(tmp_path))
    with pytest.raises(ValueError, match=r"no node \['9_9_9'\]"):
        graph.through(["9_9_9"])
    with pytest.raises(ValueError, match="no name was given"):
        graph.find("")
