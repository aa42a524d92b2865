"""A tuned lens for the model studied, beside the logit lens: which of the two reads what."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mi_hops.facts.reading import Facts
from mi_hops.lens import LensTraining, TunedLens, train_lens
from mi_hops.result import plots
from mi_hops.result.result import Result
from mi_hops.study.context import EXAMPLES, Run, Skip, StudySettings
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline, figures, mean
from mi_hops.study.parts import Block, Figure, Table, Text, panel
from mi_hops.study.step import Asked, Step, Work
from mi_hops.study.steps.lens import (
    PLACES,
    comes_first,
    first_table,
    read_groups,
    reading,
    shown_group,
)
from mi_hops.sweep.sample import sample

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Texts the lens is trained on, and the tokens of each that the model writes itself.
TEXTS, WRITTEN = 160, 16

#: Products of d_model and vocabulary that an update may cost: positions learned from, over layers.
_WORK = 3e10
_BATCH = 256

#: Texts of the trial that tells what an update costs.
_TRIAL = 20


class Tuned(Step):
    """Trains a tuned lens on text that the model writes, and reads what the logit lens read."""

    name, short, shown_in, share = "tuned", "The tuned lens", "lens", 0.14
    files = ("tuned_lens/lens.json", "tuned_lens/lens.safetensors")

    def wanted(self, facts: Facts, settings: StudySettings) -> bool:
        """Unless the study's sizes leave it out."""
        return settings.size.tuned > 0

    def run(self, run: Run) -> Result:
        """Train on continuations of questions that are not scored where there are such."""
        pool = [f for f in run.given if f.split in EXAMPLES] or run.facts
        starts = [fact.prompt() for fact in run.draw(pool, TEXTS, "tuned")]
        seed = run.settings.seed
        texts = sample(run.model, starts, n_tokens=WRITTEN, seed=seed)
        if len(set(texts)) < 2:
            raise Skip("a lens is trained on some texts and judged on others; there is one text")
        cfg = run.model.cfg

        def train(lens: TunedLens, texts: list[str], steps: int, progress: bool) -> Result:
            plan = LensTraining(
                steps=steps,
                max_tokens=_BATCH,
                cells=_cells(cfg.n_layers * cfg.d_model * cfg.d_vocab),
                evaluate_every=steps,  # an evaluation costs as much as several updates
                seed=seed,
            )
            return train_lens(run.model, lens, texts, plan, progress=progress)

        def trial(few: list[int]) -> None:
            train(TunedLens(run.model), texts[:_TRIAL], len(few), False)

        most = run.settings.size.tuned
        steps = run.affordable(self, range(most), most, trial)
        lens = TunedLens(run.model)
        trained = train(lens, texts, steps, run.progress)
        found = read_groups(run, lens)
        lens.save(run.study.folder / "tuned_lens", overwrite=True)
        loss = {name: trained[name].values.tolist() for name in ("before", "after")}
        return found.assign(provenance={"training": loss, "n_texts": len(texts), "steps": steps})

    def work(self, asked: Asked) -> Work:
        """Writing the texts, training, reading."""
        read, texts = reading(asked), TEXTS * (asked.length + WRITTEN)
        learned = 3 * _cells(asked.reading) * asked.reading / asked.params  # forward and back
        trained = asked.settings.size.tuned * (_BATCH + learned)
        return Work(read.rows + TEXTS, read.tokens + texts + trained)

    def summarise(self, result: Result, study: Folder) -> dict[str, Any]:
        """The best median rank of the bridge in either lens, and who comes first in this one."""
        plain = Result.load(study.path("lens"))
        answer = _values(result, "prob", "answer", "last")
        groups = result["group"].values
        found: dict[str, Any] = {}
        for place in PLACES:
            if place not in result["position"].values:
                continue
            bridge = _values(result, "mean_token_prob", "bridge", place)
            found[place] = {
                name: comes_first(bridge[groups == name], answer[groups == name])
                for name in dict.fromkeys(groups.tolist())
            }
        reads = [
            {"tracked": tracked, "position": place, "lens": name, **_best(which, tracked, place)}
            for tracked in ("bridge", "answer")
            for place in found
            for name, which in (("logit", plain), ("tuned", result))
        ]
        training = result.provenance["training"]
        return {**found, "reads": reads, **{k: mean(v) for k, v in training.items()}}

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterator[Headline]:
        """Where each lens reads the bridge best."""
        best = {
            name: min(
                (r for r in entry["reads"] if (r["lens"], r["tracked"]) == (name, "bridge")),
                key=lambda r: r["median_rank"],
            )
            for name in ("logit", "tuned")
        }
        tuned, plain = best["tuned"], best["logit"]
        yield Headline(
            "",
            f"rank {tuned['median_rank']:,.0f}",
            f"n = {tuned['n']}",
            f"is the bridge's median rank in the tuned lens where it reads it best (at the "
            f"{PLACES[tuned['position']]}, after {tuned['layer']} block{'s' * (tuned['layer'] != 1)}); the logit lens gets to "
            f"rank {plain['median_rank']:,.0f} at best (at the {PLACES[plain['position']]}, after "
            f"{plain['layer']} block{'s' * (plain['layer'] != 1)}).",
        )

    def section(self, result: Result, study: Folder) -> Iterator[Block]:
        """Ranks by layer in both lenses, and the table."""
        entry, provenance = study.summary["tuned"], result.provenance
        yield Text(
            "The logit lens assumes that every layer already speaks the last layer's language. A tuned "
            "lens (arXiv 2303.08112) learns one affine map per layer to the model's own output: "
            f"{provenance['steps']} updates on {provenance['n_texts']} texts that the model wrote "
            "itself as continuations of such questions. Its KL divergence from the output, over "
            f"held-out tokens and layers, fell from {figures(entry['before']['value'])} to "
            f"{figures(entry['after']['value'])} nats. It is kept in the folder as tuned_lens."
        )
        plain = Result.load(study.path("lens"))
        panels = [
            (
                f"{tracked.capitalize()} at the {PLACES[place]}",
                _ranks(plain, result, tracked, place),
            )
            for tracked in ("bridge", "answer")
            for place in PLACES
            if place in entry
        ]
        shown, which = shown_group(result)
        yield Figure(
            "Median rank in either lens, layer by layer",
            panels,
            f"Median rank (1 = most probable of the vocabulary) of the first token over n = {which.sum()} "
            f"questions {shown}; logarithmic axis, lower is better read. Where only the tuned "
            "lens reads a name, the state holds it in another basis than the unembedding's.",
        )
        rows = [
            [
                r["tracked"],
                PLACES[r["position"]],
                f"{r['lens']} lens",
                f"{r['median_rank']:,.1f}".removesuffix(".0"),
                str(r["layer"]),
                str(r["n"]),
            ]
            for r in entry["reads"]
        ]
        yield Table(
            "Which lens reads what",
            ("tracked", "position", "lens", "best median rank", "after blocks", "n"),
            rows,
            texts=3,
            note=f"The layer with the lowest median rank over questions {shown} (the last "
            "layer, which both lenses read alike, and the embedding are left out).",
        )
        yield first_table(entry)


def _cells(reading: int) -> int:
    """Positions that an update learns from, where reading one takes so many products."""
    return min(max(int(_WORK / reading), 16), _BATCH)


def _values(result: Result, variable: str, tracked: str, place: str) -> np.ndarray:
    """[example, layer]."""
    found = result[variable].sel(tracked=tracked, position=place)
    return found.transpose("example", "layer").values


def _medians(result: Result, tracked: str, place: str) -> np.ndarray:
    """Median rank by layer, of the questions shown."""
    return np.median(_values(result, "rank", tracked, place)[shown_group(result)[1]], axis=0)


def _best(result: Result, tracked: str, place: str) -> dict[str, Any]:
    medians = _medians(result, tracked, place)[1:]
    medians = medians[:-1] if len(medians) > 1 else medians
    at = int(medians.argmin())
    n = int(shown_group(result)[1].sum())
    return {"median_rank": float(medians[at]), "layer": at + 1, "n": n}


def _ranks(plain: Result, tuned: Result, tracked: str, place: str) -> go.Figure:
    medians = {
        f"{name} lens": {"layer": result["layer"].values, "rank": _medians(result, tracked, place)}
        for name, result in (("logit", plain), ("tuned", tuned))
    }
    data = pd.concat([pd.DataFrame(columns).assign(lens=lens) for lens, columns in medians.items()])
    labels = {"layer": "blocks passed (0 = embedding)", "rank": "median rank"}
    plot = plots.lines(data, x="layer", y="rank", group="lens", title="", labels=labels)
    decades = (floor(log10(data["rank"].min())), max(1, ceil(log10(data["rank"].max()))))
    return panel(plot).update_yaxes(type="log", dtick=1, exponentformat="none", range=decades)
