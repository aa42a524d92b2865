"""Draw every figure of the package in both themes, and write the page that shows them.

    python tools/gallery.py              # docs/gallery.md and docs/images/gallery
    python tools/gallery.py --only paths # one picture again

Everything is of the bundled model on a few facts: the page shows what figures look like, not what is
found. Pictures need the extra ``export`` and a Chrome or Chromium.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plotly.io as pio

import mi_hops
from mi_hops import patching

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "images" / "gallery"
THEMES = {"light": "plotly_white", "dark": "plotly_dark"}
FORM = "suffix"


@dataclass(frozen=True)
class Shown:
    """One figure of the page: what it is called, its call, how to read it, and what draws it."""

    title: str
    call: str
    reading: str
    draw: Callable[[], Any]


# -- what is drawn ---------------------------------------------------------------------------------


@cache
def _model() -> Any:
    return mi_hops.load_model("apposed-gpt2")


@cache
def _gap() -> Any:
    return mi_hops.find_gap(_model(), mi_hops.Hopland().sample(train=20, held_out=60))


@cache
def _failed() -> list[Any]:
    return [fact for fact in _gap().failed if fact.split != "train"]


@cache
def _pairs() -> Any:
    facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:150]
    answered = mi_hops.find_gap(_model(), facts, form=FORM).passed
    return mi_hops.contrast(_model(), answered[:40], partners=answered, form=FORM)


@cache
def _six() -> Any:
    return _pairs().select(range(6))


@cache
def _edges() -> Any:
    return mi_hops.attribute_edges(_model(), _pairs().select(range(4)))


@cache
def _same_length() -> Any:
    """Pairs of one length whose prompts begin alike."""
    pairs, found = _pairs(), {}
    for i, text in enumerate(pairs.clean):
        words = str(text).split()
        found.setdefault((len(_model().to_tokens(str(text))[0]), *words[:2]), []).append(i)
    return pairs.select(max(found.values(), key=len))


@cache
def _traced() -> Any:
    return mi_hops.fact_trajectories(_model(), _gap().passed[:30], form=FORM)


@cache
def _evaluated() -> Any:
    held_out = [fact for fact in _gap().facts if fact.split != "train"]
    queries = mi_hops.build_sets(
        _model(), _failed()[:8], gap=_gap(), pool=held_out, per_case=1, form=FORM
    )
    repairs = [
        mi_hops.CremeRepair(layers=range(_model().cfg.n_layers), form=FORM),
        mi_hops.MemoryInjection(layers=1, strength=4.0, positions="first hop", absent="leave"),
    ]
    return mi_hops.evaluate(_model(), repairs, queries, _failed()[:8])


@cache
def _grown() -> Any:
    return patching.extract(_model(), _edges(), 60, select="greedy")


SHOWN = {
    "gap": Shown(
        "The gap",
        "mi_hops.find_gap(model, facts).plot()",
        "Bars of shares with exact 95% intervals.",
        lambda: _gap().plot(),
    ),
    "failures": Shown(
        "How failures fail",
        "mi_hops.failure_types(model, gap).plot()",
        "Shares of the failures by type.",
        lambda: mi_hops.failure_types(_model(), _gap(), form=FORM).plot(),
    ),
    "lens": Shown(
        "Bridge and answer by layer",
        'mi_hops.fact_trajectories(model, facts).sel(position="first hop").plot("prob")',
        "A line for each tracked name; bands are 95% bootstrap intervals over facts.",
        lambda: _traced().sel(position="first hop").plot("prob"),
    ),
    "map": Shown(
        "The top token everywhere",
        "mi_hops.plot_map(mi_hops.token_map(model, prompt))",
        "Layer by token of one prompt; all top tokens on hover.",
        lambda: mi_hops.plot_map(
            mi_hops.token_map(_model(), _gap().passed[0].prompt(FORM), top_k=3)
        ),
    ),
    "tokens": Shown(
        "Patching token by token",
        'mi_hops.patch(model, pairs, mi_hops.Sites("resid_pre", positions="each")).plot()',
        "Tokens that all prompts share are named on the axis; where they differ, the position is.",
        lambda: mi_hops.patch(
            _model(), _same_length(), mi_hops.Sites("resid_pre", positions="each")
        ).plot(),
    ),
    "roles": Shown(
        "Patching by role",
        "mi_hops.patch(model, pairs, mi_hops.Sites(kinds, positions=pairs.roles)).plot()",
        "A third dimension makes panels that share one scale. Blue raises the score, red lowers it, "
        "white is 0; n and intervals are on hover.",
        lambda: mi_hops.patch(
            _model(),
            _six(),
            mi_hops.Sites(["resid_pre", "attn_out", "mlp_out"], positions=_six().roles),
        ).plot(),
    ),
    "heads": Shown(
        "Heads",
        'mi_hops.patch(model, pairs, "z").plot()',
        "Layer by head.",
        lambda: mi_hops.patch(_model(), _six(), "z").plot(),
    ),
    "paths": Shown(
        "Paths",
        'mi_hops.path_patch(model, pairs, "heads", ["v", "logits"]).plot("change")',
        "Sender by receiver; grey where no path leads. Heads into one receiver alone are drawn as "
        "layer by head.",
        lambda: mi_hops.path_patch(
            _model(), _pairs().select(range(3)), "heads", ["v", "logits"]
        ).plot("change"),
    ),
    "paths-to-logits": Shown(
        "Paths into the logits",
        'mi_hops.path_patch(model, pairs, "heads", "logits").plot()',
        "One receiver: heads where they are in the model.",
        lambda: mi_hops.path_patch(_model(), _pairs().select(range(3)), "heads", "logits").plot(),
    ),
    "circuit": Shown(
        "A circuit",
        "mi_hops.patching.circuit_figure(model, circuit, scores=edges)",
        "Edges as wide as their score is large, coloured by its sign.",
        lambda: patching.circuit_figure(_model(), _grown(), scores=_edges()),
    ),
    "circuit-inputs": Shown(
        "The same circuit without scores",
        "mi_hops.patching.circuit_figure(model, circuit)",
        "Coloured by how an edge is read: as query, key or value, or by an MLP or the logits.",
        lambda: patching.circuit_figure(_model(), _grown()),
    ),
    "faithfulness": Shown(
        "What circuits keep",
        'mi_hops.faithfulness(model, pairs, circuits).plot("faithfulness")',
        "Bars with intervals over pairs.",
        lambda: mi_hops.faithfulness(
            _model(),
            _six(),
            [patching.extract(_model(), _edges(), n, select="greedy") for n in (10, 30, 100, 300)],
        ).plot("faithfulness"),
    ),
    "erasure": Shown(
        "Erasing the bridge",
        'mi_hops.erase_bridge(model, facts).sel(variant="exact", position="first hop").plot("bridge")',
        "P(answer) by the layer whose output is changed; the dotted line is the untouched model.",
        lambda: (
            mi_hops.erase_bridge(_model(), _gap().passed[:12], form=FORM, controls=1)
            .sel(variant="exact", position="first hop")
            .plot("bridge")
        ),
    ),
    "locate": Shown(
        "Locating the second hop",
        "mi_hops.locate(model, failed).plot()",
        "A panel for each kind of module.",
        lambda: mi_hops.locate(_model(), _failed()[:10], form=FORM).plot("effect"),
    ),
    "injection": Shown(
        "Injecting the bridge",
        'mi_hops.injection_grid(model, facts).sel(memory="bridge", ...).plot("first_prob")',
        "Layer by strength; white to blue where values cannot be negative.",
        lambda: _injected().plot("first_prob"),
    ),
    "evaluation": Shown(
        "Repairs side by side",
        'mi_hops.evaluate(model, repairs, queries, cases).plot("first_correct")',
        "Bars for the unrepaired model and each repair; whiskers are 95% bootstrap intervals.",
        lambda: _evaluated().plot("first_correct", n_resamples=200),
    ),
}


def _injected() -> Any:
    grid = mi_hops.injection_grid(
        _model(),
        _failed()[:10],
        layers=list(range(_model().cfg.n_layers)),
        strengths=(0.5, 1, 2, 4, 8),
        encodings=("unembed",),
        positions="first hop",
        controls=(),
        form=FORM,
        metrics=("first_prob",),
    )
    return grid.sel(memory="bridge", encoding="unembed")


# -- the page --------------------------------------------------------------------------------------

HEAD = """# Gallery

The kinds of figure that the package draws, in this page's theme. All are plotly figures: `.show()` them, modify them
with `update_layout`, or write them to a file:

```python
import mi_hops

facts = mi_hops.Hopland().sample(train=4, held_out=4)
gap = mi_hops.find_gap(mi_hops.load_model("apposed-gpt2"), facts)
figure = gap.plot(width=700, height=400, template="plotly_dark")
figure.write_html("gap.html", include_plotlyjs=True)
```

`figure.write_image("gap.png")` (or `.svg`, `.pdf`) needs the extra `export` and a Chrome or Chromium on the machine
(`BROWSER_PATH` names one that is not found by itself). Figures follow `plotly.io.templates.default` and set no text or
background colour of their own, so set it once: `plotly.io.templates.default = "plotly_dark"`.

The examples use a bundled model and a few facts each: they show what figures look like, not findings.
`tools/gallery.py` generates this page.
"""


def _section(name: str, shown: Shown) -> str:
    images = "\n".join(
        f"![{shown.title}](images/gallery/{name}-{theme}.png#only-{theme})" for theme in THEMES
    )
    return f"\n## {shown.title}\n\n`{shown.call}`\n\n{shown.reading}\n\n{images}\n"


def main() -> None:
    """Draw the pictures and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of pictures; the page is written anyway")
    names = parser.parse_args().only or list(SHOWN)
    PICTURES.mkdir(parents=True, exist_ok=True)
    figures, paths = [], []
    for name in names:
        figure = SHOWN[name].draw()
        for theme, template in THEMES.items():
            figures.append(type(figure)(figure).update_layout(template=template, width=800))
            paths.append(PICTURES / f"{name}-{theme}.png")
    heights = [figure.layout.height for figure in figures]
    pio.write_images(figures, paths, scale=1.5, width=800, height=heights)
    text = HEAD + "".join(_section(name, shown) for name, shown in SHOWN.items())
    (ROOT / "docs" / "gallery.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
