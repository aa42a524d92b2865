"""Circuits come back as they were; areas against sums by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mi_hops.patching import (
    Circuit,
    all_edges,
    attribute_edges,
    extract,
    faithfulness,
    faithfulness_areas,
    load_eap_ig,
    save_eap_ig,
)
from tests.patching.loops import ALL


def test_round_trips(tiny, tmp_path):
    scores = attribute_edges(tiny, ALL)
    circuit = extract(tiny, scores, 30, prune=False)
    circuit.save(tmp_path / "ours.json")
    assert Circuit.load(tmp_path / "ours.json") == circuit
    save_eap_ig(tiny, circuit, tmp_path / "theirs.json", scores=scores)
    assert load_eap_ig(tiny, tmp_path / "theirs.json") == circuit
    graph = json.loads((tmp_path / "theirs.json").read_text())
    n_layers, n_heads = graph["cfg"]["n_layers"], graph["cfg"]["n_heads"]
    # Their counts: each of 3 inputs of every head, each MLP, and the logits, from all before.
    before = [1 + layer * (n_heads + 1) for layer in range(n_layers)]
    many = sum(3 * n_heads * b + b + n_heads for b in before) + 1 + n_layers * (n_heads + 1)
    assert len(graph["edges"]) == many
    assert len(graph["nodes"]) == 2 + n_layers * (n_heads + 1)
    mean = scores["change"].mean("example")
    for theirs, ours in (
        ("input->a0.h0<q>", ("embed", "L0H0.q")),
        ("a0.h3->m1", ("L0H3", "MLP1")),
        ("m1->logits", ("MLP1", "logits")),
        ("m0->a2.h1<v>", ("MLP0", "L2H0.v" if len(all_edges(tiny)) < many else "L2H1.v")),
    ):
        edge = graph["edges"][theirs]
        assert edge["score"] == pytest.approx(float(mean.sel(sender=ours[0], receiver=ours[1])))
        assert edge["in_graph"] == (ours in circuit.edges)
    names = {e.split("->")[0] for e, told in graph["edges"].items() if told["in_graph"]}
    assert all(graph["nodes"][name]["in_graph"] for name in names)


def test_areas_are_trapezoids(load_tiny, monkeypatch):
    monkeypatch.delattr(np, "trapezoid", raising=False)  # numpy 1 has none
    model = load_tiny("gpt2", "bridge")
    edges = all_edges(model)
    scores = attribute_edges(model, ALL)
    sizes = [len(edges), 8, 40]  # in any order
    circuits = [Circuit(frozenset()), *(extract(model, scores, n, prune=False) for n in sizes)]
    curve = faithfulness(model, ALL, circuits)
    clean, corrupted = (float(curve[n].mean()) for n in ("clean", "corrupted"))
    kept = [(float(x) - corrupted) / (clean - corrupted) for x in curve["score"].mean("example")]
    assert kept[0] == pytest.approx(0, abs=1e-3)
    assert kept[1] == pytest.approx(1, abs=1e-3)
    points = sorted(zip([0, *sizes], kept, strict=True))
    cpr = cmd = 0.0
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        cpr += (b - a) / len(edges) * (low + high) / 2
        cmd += (b - a) / len(edges) * (abs(1 - low) + abs(1 - high)) / 2
    found = faithfulness_areas(curve)
    assert np.allclose(found, (cpr, cmd), atol=1e-6)
    with pytest.raises(ValueError, match=r"1 size\(s\)"):
        faithfulness_areas(faithfulness(model, ALL, [circuits[1]]))
    with pytest.raises(ValueError, match="axis circuit"):
        faithfulness_areas(scores)


def test_refuses(tiny, load_tiny, tmp_path):
    path = tmp_path / "c.json"
    circuit = Circuit(frozenset({("embed", "MLP0")}))
    circuit.save(path)
    with pytest.raises(FileExistsError):
        circuit.save(path)
    with pytest.raises(ValueError, match="no table of edges"):
        load_eap_ig(tiny, path)
    save_eap_ig(tiny, circuit, path, overwrite=True)
    with pytest.raises(ValueError, match="load_eap_ig"):
        Circuit.load(path)
    graph = json.loads(path.read_text())
    del graph["edges"]["input->m0"]
    path.write_text(json.dumps(graph))
    with pytest.raises(ValueError, match="not the same ones"):
        load_eap_ig(tiny, path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        Circuit.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Circuit.load(path)
    with pytest.raises(ValueError, match="not the model's"):
        save_eap_ig(tiny, Circuit(frozenset({("MLP2", "MLP1")})), tmp_path / "d.json")
    assert not (tmp_path / "d.json").exists()
