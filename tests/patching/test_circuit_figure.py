"""The picture of a circuit: every edge between its components, rows by layer, nothing on top of anything."""

from __future__ import annotations

import pytest

from mi_hops import Pairs, attribute_edges
from mi_hops.patching import Circuit, all_edges, circuit_figure, extract
from mi_hops.result.plots import COLOURS

WAY = {
    ("embed", "L0H1.k"),
    ("embed", "L1H2.q"),
    ("L0H1", "L1H0.v"),
    ("L1H2", "MLP1"),
    ("MLP1", "logits"),
    ("L1H1", "logits"),
}


def nodes_of(figure):
    trace = figure.data[-1]
    return dict(zip(trace.text, zip(trace.x, trace.y, strict=True), strict=True))


def lines_of(figure):
    return [t for t in figure.data if t.mode == "lines"]


def test_edges_join_their_components_in_rows_by_layer(load_tiny):
    figure = circuit_figure(load_tiny("gpt2"), Circuit(frozenset(WAY)), title="A way", width=500)
    assert figure.layout.width == 500
    nodes = nodes_of(figure)
    assert set(nodes) == {"embed", "L0H1", "L1H0", "L1H1", "L1H2", "MLP1", "logits"}
    assert len(set(nodes.values())) == len(nodes)  # none on top of another
    heights = [nodes[n][1] for n in ("embed", "L0H1", "L1H2", "MLP1", "logits")]
    assert heights == sorted(set(heights))
    assert nodes["L1H0"][1] == nodes["L1H1"][1] == nodes["L1H2"][1]
    drawn = {((t.x[0], t.y[0]), (t.x[-1], t.y[-1])) for t in lines_of(figure)}
    want = {(nodes[u], nodes[v.split(".")[0]]) for u, v in WAY}
    assert drawn == want
    legend = {t.name for t in lines_of(figure) if t.showlegend}
    assert legend == {
        "into a query",
        "into a key",
        "into a value",
        "into an MLP or the logits",
    }
    assert "A way" in figure.layout.title.text
    assert list(figure.layout.yaxis.ticktext)[:2] == ["embedding", "heads 0"]


def test_a_shared_key_is_drawn_into_each_query_head_of_the_circuit(load_tiny):
    # Two query heads share a key head: L1H0.k is that of heads 0 and 1.
    edges = {("embed", "L1H0.k"), ("L1H0", "logits"), ("L1H1", "logits"), ("embed", "L2H1.v")}
    figure = circuit_figure(load_tiny("llama"), Circuit(frozenset(edges)))
    nodes = nodes_of(figure)
    assert set(nodes) == {"embed", "L1H0", "L1H1", "L2H2", "logits"}
    ends = [(t.x[-1], t.y[-1]) for t in lines_of(figure) if (t.x[0], t.y[0]) == nodes["embed"]]
    assert sorted(ends) == sorted(nodes[n] for n in ("L1H0", "L1H1", "L2H2"))


def test_scores_give_width_and_colour_and_choose_what_is_drawn(tiny):
    pairs = Pairs("w5 w6 w7", "w5 w8 w7", answer="w9", wrong="w10")
    scores = attribute_edges(tiny, pairs)
    circuit = extract(tiny, scores, 30, prune=False)
    figure = circuit_figure(tiny, circuit, scores=scores, most=8)
    mean = scores["change"].mean("example")
    sizes = sorted((abs(float(mean.sel(sender=u, receiver=v))) for u, v in circuit.edges))[-8:]
    hovers = figure.data[-2].text
    told = sorted({(h.split("<br>")[0], abs(float(h.split("<b>")[1][:-4]))) for h in hovers})
    assert len(told) == 8 and sorted(x for _, x in told) == pytest.approx(sizes, rel=1e-3)
    widths = [t.line.width for t in lines_of(figure)]
    assert max(widths) == 6.0 and min(widths) >= 1.0
    assert "the 8 largest of 30 edges" in figure.layout.title.text
    for trace in lines_of(figure):
        assert trace.line.color in COLOURS[:2]


def test_bad_input(load_tiny):
    model = load_tiny()
    with pytest.raises(ValueError, match="1 edges are not the model's"):
        circuit_figure(model, Circuit(frozenset({("L9H0", "logits")})))
    with pytest.raises(ValueError, match="0 edges and most=60"):
        circuit_figure(model, Circuit(frozenset()))
    with pytest.raises(ValueError, match="give scores= to draw the largest"):
        circuit_figure(model, Circuit(frozenset(all_edges(model))))
