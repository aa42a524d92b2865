"""Is the bridge there? Probes with control tasks, Patchscopes, and sparse autoencoders.

``python -m benchmarks.lens_bridge [--models hops-gpt2 hops-llama] [--facts 1500] [--only NAME ...]``
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from itertools import chain

from benchmarks.harness import keep, kept, table, write
from mi_hops import Hopland, load_model
from mi_hops.lens import (
    Place,
    bridge_features,
    clamp_effect,
    fact_features,
    fact_probes,
    patchscope,
    sae_quality,
    train_sae,
)


def probe_facts(facts, n, bridges=20):
    """About `n` facts of the most frequent bridges, whole first hops at a time."""
    frequent = {name for name, _ in Counter(f.bridge for f in facts).most_common(bridges)}
    hops: dict[str, list] = {}
    for fact in facts:
        if fact.bridge in frequent:
            hops.setdefault(fact.first_hop, []).append(fact)
    return list(chain.from_iterable(hops.values()))[:n]


def probe_rows(model, facts):
    """One row per layer: accuracy, control, selectivity [95%], first hops not seen."""
    result = fact_probes(model, facts)
    selectivity = result.ci(variable="selectivity")
    unseen = result["unseen_correct"].mean("unseen_example")
    return [
        [
            layer,
            f"{result['correct'].sel(layer=layer).mean().item():.2f}",
            f"{result['control_correct'].sel(layer=layer).mean().item():.2f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(
                *(selectivity[k].sel(layer=layer).item() for k in ("estimate", "lower", "upper"))
            ),
            f"{unseen.sel(layer=layer).item():.2f}",
        ]
        for layer in result["layer"].values.tolist()
    ]


def scope_rows(model, facts, seed=0):
    """A row a source layer: how often another first-hop prompt says the source's bridge.

    The state at the first hop's last token goes into a first-hop prompt of the same relation about
    another subject, at the subject's last token; the model then says the bridge that it reads.
    """
    rng = random.Random(seed)
    by_relation: dict[str, list] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation1, []).append(fact)
    pairs = []
    for fact in facts:
        others = [
            f
            for f in by_relation[fact.relation1]
            if f.subject != fact.subject and f.bridge != fact.bridge
        ]
        if others:
            pairs.append((fact, rng.choice(others)))
    result = patchscope(
        model,
        Place([f.prompt("suffix") for f, _ in pairs], [f.first_hop for f, _ in pairs]),
        Place([o.first_prompt("suffix") for _, o in pairs], [o.first_hop for _, o in pairs]),
        track={"bridge": [f.bridge for f, _ in pairs], "own": [o.bridge for _, o in pairs]},
        top_k=1,
    )
    right = (result["rank"] == 1).mean("example")
    before = (result["rank_before"] == 1).mean("example")
    rows = []
    for layer in result["source_layer"].values.tolist():
        own = right.sel(tracked="bridge", source_layer=layer)
        best = own.idxmax("target_layer").item()
        rows.append(
            [
                layer,
                f"{own.max().item():.2f}",
                best,
                f"{right.sel(tracked='own', source_layer=layer, target_layer=best).item():.2f}",
                f"{before.sel(tracked='bridge').item():.2f}",
                len(pairs),
            ]
        )
    return rows


def sae_part(model, facts, texts, layer):
    """Text on a small autoencoder: its quality, the bridge's features, clamping them."""
    sae = train_sae(model, texts, layer=layer)
    quality = sae_quality(model, sae, texts[:500], layer=layer)
    features = bridge_features(fact_features(model, sae, facts, layer=layer))
    good = features[features["f1"] >= 0.5]
    lines = [
        f"After {layer} blocks, {sae.W_dec.shape[0]} features: "
        f"{quality['explained'].item():.0%} of the variance with {quality['active'].item():.0f} active; "
        f"{quality['dead'].item():.0%} dead.",
        f"{len(good)} of {len(features)} bridges have a feature with F1 of at least 0.5 on the half "
        f"that did not choose it; median F1 {features['f1'].median():.2f}.",
    ]
    if good["feature"].nunique() > 1:
        value = 2 * float(good["mean"].median())
        effect = clamp_effect(
            model, sae, facts, good["feature"].to_dict(), layer=layer, values=[0.0, value]
        )
        means = effect["first_prob"].mean("example")
        before = effect["first_prob_before"].mean().item()
        lines.append(
            f"P(answer) {before:.3f} before (n = {effect.n_used}); the bridge's own feature at 0: "
            f"{means.sel(feature_of='own', value=0.0).item():.3f}, at {value:.1f}: "
            f"{means.sel(feature_of='own', value=value).item():.3f}; another bridge's at 0: "
            f"{means.sel(feature_of='other', value=0.0).item():.3f}, at {value:.1f}: "
            f"{means.sel(feature_of='other', value=value).item():.3f}."
        )
    return "\n\n".join(lines)


#: Section -> its title.
SECTIONS = {
    "probes": "Probes at the first hop's last token (suffix prompts)",
    "patchscopes": "Patchscopes: the bridge decoded by the model itself",
    "sae": "A sparse autoencoder",
}
PAGE = "lens-bridge"


def page(found: dict[str, str]) -> str:
    """What has been measured so far."""
    parts = []
    for name in sorted({part.rpartition("-")[0] for part in found}):
        parts.append(f"## {name}")
        for section, title in SECTIONS.items():
            if text := found.get(f"{name}-{section}"):
                parts.append(f"### {title}\n\n{text}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["hops-gpt2", "hops-llama"])
    parser.add_argument("--facts", type=int, default=1500)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sae needs SAELens"
    )
    asked = parser.parse_args()
    world = Hopland()
    seen, trained = world.two_hop_facts("seen_parts"), world.two_hop_facts("train")
    for facts in (seen, trained):
        random.Random(0).shuffle(facts)
    for name in asked.models:
        model = load_model(name)
        for section in asked.only:
            if section == "probes":
                columns = [
                    "layer",
                    "accuracy",
                    "control",
                    "selectivity [95%]",
                    "first hops not seen",
                ]
                text = table(columns, probe_rows(model, probe_facts(trained, asked.facts)))
            elif section == "patchscopes":
                columns = [
                    "source layer",
                    "says the source's bridge",
                    "best target layer",
                    "says the target's own",
                    "before",
                    "n",
                ]
                text = table(columns, scope_rows(model, seen[: asked.facts // 8]))
            else:
                texts = [f"{f.prompt()} {f.answer}." for f in trained[: 2 * asked.facts]]
                layer = int(model.cfg.n_layers) // 2
                text = sae_part(model, seen[: asked.facts], texts, layer)
            print(name, section, text, sep="\n", flush=True)
            keep(PAGE, f"{name}-{section}", text)
            write(PAGE, "Is the bridge there?", page(kept(PAGE)), script="lens_bridge")


if __name__ == "__main__":
    main()
