"""One CREME protocol over sizes and families: at which depth the answer is brought, and where an edit holds.

``python -m benchmarks.sizes [--model hops-gpt2 hops-llama] [--cases 100]`` writes
``docs/benchmarks/sizes.md`` from the rows kept in ``benchmarks/results/sizes/``. ``--train FOLDER --width
256`` first trains a LLaMA of that width by the recipe of the bundled one (5M parameters, about 75 minutes on
one core; 20M at ``--width 512``, about 90 minutes on two; a stopped run goes on), and ``--real FOLDER``
measures SmolLM2-135M on the questions of `benchmarks.many_edits_real`, whose folder it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from benchmarks.editing_setup import FORM, FirstTokens, Setup, set_up
from benchmarks.harness import DOCS, keep, kept, table, write
from benchmarks.many_edits_real import Asked
from benchmarks.many_edits_real import set_up as set_up_real
from mi_hops import Hopland, TwoHopFact, creme, locate, second_moments
from mi_hops.editing import Edit, EditRepair, SingularError
from mi_hops.model import embedding, unembedding
from mi_hops.result.plots import lines
from mi_hops.result.statistics import bootstrap_ci, proportion_ci
from mi_hops.worlds.recipe import RECIPES
from mi_hops.worlds.train import save, train

PAGE = "sizes"
KINDS = ("attn_out", "mlp_out")
TITLE = "Effect of one layer's attention at the last token"
THEMES = {"light": "plotly_white", "dark": "plotly_dark"}
#: Layers edited, at most, evenly spread.
MOST = 10
STRENGTH = 0.7
#: The width from which a model is trained with matrix products in bfloat16.
IN_BFLOAT16 = 512

RULE = (
    "Every model is asked questions whose hops it knows and whose answer it gets wrong: "
    "the bundled models, and LLaMAs trained by their recipe (the 20M one with matrix products "
    "in bfloat16), held-out questions of Hopland; SmolLM2 real ones after worked examples "
    "(the questions of [many edits](many-edits.md)). *Effect* is what replacing the output of one block's "
    "attention (or MLP) at the last token by that of the second-hop prompt adds to "
    "P(answer), as a mean over questions with its 95% bootstrap interval. *Edited there* "
    f"is `creme` in that one layer (strength {STRENGTH}, C estimated, the bare prompt), one "
    f"edit per question; in models of more than {MOST} layers, in {MOST} evenly spaced "
    "ones. (All templates of `creme` were used at first, which took too long in SmolLM2; "
    "the bundled models' rows were read in that form too.) Nothing is chosen. Fixed before "
    "any number was read: the *place* is the layer whose attention has the largest mean "
    "effect, and its interval the middle 95% of the places in 2,000 bootstrap samples of "
    "the questions; depth runs from 0 (the first layer) to 1 (the last). The place is in "
    "the *middle* if the whole interval lies between depths 1/3 and 2/3, and attention is "
    "*the place* rather than the MLP if its largest mean effect is the larger one in at "
    "least 97.5% of the samples. *Largest effects* are attention's / the MLP's, with the "
    "share of samples in which attention's is larger. Added when the 20M model had no edit "
    "for some questions at some layer (the key to change depends there on keys to keep): such "
    "a question counts as not corrected, and its other answers as they are."
)


def trained(folder: Path, width: int) -> str:
    """A LLaMA of that width, trained by the bundled one's recipe; a stopped run goes on."""
    if not (folder / "training.json").exists():
        base = RECIPES["llama"]
        shape = replace(base.shape, d_model=width, d_mlp=4 * width)
        recipe = replace(base, shape=shape, bfloat16=width >= IN_BFLOAT16)
        world, state = Hopland(), folder.with_suffix(".state")
        folder.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer, log = train(world, "llama", recipe, state=state)
        save(folder, model, tokenizer, recipe=recipe, world=world, log=log, measured={})
    return str(folder)


def n_parameters(model: Any) -> int:
    """Of the checkpoint: an unembedding tied to the embedding is not counted again."""
    count = sum(p.numel() for p in model.parameters())
    tied = torch.equal(unembedding(model)[0], embedding(model).T)
    return count - (embedding(model).numel() if tied else 0)


def measure(setup: Setup, form: str) -> dict[str, Any]:
    """Effects of every layer, and edits at some."""
    n, model = setup.n_layers, setup.model
    found = locate(model, setup.report, form=form, kinds=KINDS)["effect"].sel(position="last")
    effects = {kind: found.sel(kind=kind).values for kind in KINDS}
    layers = sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST))})
    c = second_moments(model, setup.corpus, layers=layers)
    asked = FirstTokens(model, setup.queries.of("correction", "specificity"), setup.report)
    before = asked.right()
    rows, none = {}, {}
    for layer in layers:
        edits = possible(
            model,
            setup.report,
            layers=[layer],
            form=form,
            covariance=c,
            strength=STRENGTH,
            templates=("{}",),
        )
        none[layer] = edits.count(None)
        repair = EditRepair({f.id: e for f, e in zip(setup.report, edits, strict=True)})
        both = list(zip(asked.queries, before > 0, asked.right(repair).tolist(), strict=True))
        corrected = [after for q, _, after in both if q.set == "correction"]
        kept_of: dict[str, list[float]] = {}
        for q, was, after in both:
            if q.set == "specificity" and was:
                kept_of.setdefault(q.case, []).append(after)
        means = np.array([np.mean(values) for values in kept_of.values()])
        share = sum(corrected) / len(corrected)
        rows[layer] = [
            [share, *proportion_ci(int(sum(corrected)), len(corrected))],
            [float(means.mean()), *(float(x) for x in bootstrap_ci(means))],
        ]
        print(layer, rows[layer], none[layer], flush=True)
    return {
        "n": len(setup.report),
        "parameters": n_parameters(model),
        "layers": n,
        "effects": {k: np.round(v.astype(float), 5).tolist() for k, v in effects.items()},
        "edited": rows,
        "no_edit": {layer: n for layer, n in none.items() if n},
    }


def possible(model: Any, facts: Sequence[TwoHopFact], **settings: Any) -> list[Edit | None]:
    """A CREME edit of each fact; None where there is none that keeps the hops."""
    try:
        return creme(model, facts, **settings)
    except SingularError:
        if len(facts) == 1:
            return [None]
    half = len(facts) // 2
    return [e for part in (facts[:half], facts[half:]) for e in possible(model, part, **settings)]


# -- the page -------------------------------------------------------------------------------------


def place(found: dict[str, Any]) -> dict[str, Any]:
    """Where attention's largest effect is, over bootstrap samples of the questions."""
    attention, mlp = (np.array(found["effects"][kind]) for kind in KINDS)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(attention), size=(2000, len(attention)))
    means = attention[drawn].mean(1)
    depth = means.argmax(1) / (found["layers"] - 1)
    larger = (means.max(1) > mlp[drawn].mean(1).max(1)).mean()
    low, high = np.quantile(depth, [0.025, 0.975])
    at = int(attention.mean(0).argmax())
    return {
        "layer": at,
        "depth": at / (found["layers"] - 1),
        "low": low,
        "high": high,
        "attention": float(attention.mean(0).max()),
        "mlp": float(mlp.mean(0).max()),
        "larger": float(larger),
    }


def page() -> str:
    """The places of all models, and each one's curve."""
    rows, curves = [], []
    for name, found in sorted(kept(PAGE).items(), key=lambda item: item[1]["parameters"]):
        at = place(found)
        middle = at["low"] >= 1 / 3 and at["high"] <= 2 / 3
        best = max(found["edited"].items(), key=lambda item: item[1][0][0])
        rows.append(
            [
                name,
                f"{found['parameters'] / 1e6:.1f}M",
                found["n"],
                f"{at['layer']} of {found['layers']}",
                f"{at['depth']:.2f} ({at['low']:.2f} to {at['high']:.2f})",
                "yes" if middle else "no",
                f"{at['attention']:+.3f} / {at['mlp']:+.3f} ({at['larger']:.0%})",
                f"layer {best[0]} ({100 * best[1][0][0]:.0f}%)",
            ]
        )
        curves += [f"## {name}", curve(found)]
    head = (
        "model", "parameters", "questions", "place", "depth", "in the middle",
        "largest effects", "best edit",
    )  # fmt: skip
    shown = [f"![{TITLE}](../images/{PAGE}-{theme}.png#only-{theme})" for theme in THEMES]
    return "\n\n".join([RULE, table(head, rows), "\n".join(shown), *curves])


def draw() -> None:
    """The effect of attention over the depth of every model, with its 95% interval."""
    rows = []
    for name, found in sorted(kept(PAGE).items(), key=lambda item: item[1]["parameters"]):
        values = np.array(found["effects"]["attn_out"])
        low, high = bootstrap_ci(values)
        label = f"{name} ({found['parameters'] / 1e6:.0f}M)"
        depth = np.linspace(0, 1, found["layers"])
        rows += [[label, *row] for row in zip(depth, values.mean(0), low, high, strict=True)]
    frame = pd.DataFrame(rows, columns=["model", "depth", "effect", "lower", "upper"])
    labels = {"depth": "depth of the layer", "effect": "added to P(answer)"}
    figure = lines(
        frame,
        x="depth",
        y="effect",
        group="model",
        interval=("lower", "upper"),
        title=TITLE,
        labels=labels,
        width=800,
        height=420,
    )
    for theme, template in THEMES.items():
        themed = go.Figure(figure).update_layout(template=template)
        themed.write_image(DOCS.parent / "images" / f"{PAGE}-{theme}.png", scale=1.5)


def curve(found: dict[str, Any]) -> str:
    """One row per layer."""
    columns = []
    for kind in KINDS:
        values = np.array(found["effects"][kind])
        low, high = bootstrap_ci(values)
        columns.append([*zip(values.mean(0), low, high, strict=True)])
    rows = []
    for layer, effects in enumerate(zip(*columns, strict=True)):
        shares = found["edited"].get(str(layer))
        said = [f"{v:.1%} ({a:.1%} to {b:.1%})" for v, a, b in shares] if shares else ["-", "-"]
        depth = layer / (found["layers"] - 1)
        cells = [f"{v:+.3f} ({a:+.3f} to {b:+.3f})" for v, a, b in effects]
        rows.append([layer, f"{depth:.2f}", *cells, *said])
    head = (
        "layer", "depth", "effect of attention", "effect of MLP", "corrected, edited there",
        "unrelated kept",
    )  # fmt: skip
    missing = [
        f"Layer {layer}: no edit for {n} of {found['n']} questions."
        for layer, n in found.get("no_edit", {}).items()
    ]
    return "\n\n".join([table(head, rows), *missing])


def main() -> None:
    """Measure, keep what was measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--train", type=Path, help="folder of a model to train (or trained)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--real", type=Path, help="folder of benchmarks.many_edits_real")
    parser.add_argument("--cases", type=int, default=100)
    given = parser.parse_args()
    names = [*given.model, *([trained(given.train, given.width)] if given.train else [])]
    for name in names:
        setup = set_up(name, cases=given.cases)
        keep(PAGE, Path(name).name, measure(setup, FORM))
    if given.real:
        asked = Asked(given.real)
        setup = set_up_real(asked, given.cases)
        keep(PAGE, setup.name, measure(setup, asked.form))
    write(PAGE, "CREME over model sizes", page(), script="sizes")
    draw()


if __name__ == "__main__":
    main()
