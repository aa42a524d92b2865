"""Sparse autoencoders, through SAELens: train a small one, find the bridge's features, clamp one.

SAELens does the training and holds the autoencoder (``pip install 'mi-hops[sae]'``; it needs
TransformerLens 3). Here are its activations, taken with this package's own reading, and what is asked
of its features. An autoencoder of ``"resid"`` layer l reads the stream after l blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.examples import real_cells
from mi_hops.lens.tracking import at_role, check_role
from mi_hops.lens.vectors import gather, hook_of, resolve_layers, states_at, stream_site
from mi_hops.model import HookedModel, device_of, fingerprint, provenance
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Change, Intervention
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import get_metrics
from mi_hops.sweep.runs import Scored, run_sweep
from mi_hops.text.corpus import Corpus, token_batches
from mi_hops.text.tokens import Batch

#: Where a trained autoencoder remembers the weights that it belongs to.
_FINGERPRINT = "mi_hops_fingerprint"


def train_sae(
    model: HookedModel,
    corpus: Corpus,
    *,
    layer: int,
    d_sae: int | None = None,
    k: int = 16,
    samples: int = 400_000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    max_tokens: int = 4096,
    seed: int = 0,
) -> Any:
    """Train a top-k sparse autoencoder on the residual stream after `layer` blocks.

    Activations at BOS, which are like no others, are left out; so is padding.

    Args:
        corpus: texts, facts or a file, visited in random order, repeatedly if need be.
        d_sae: features; default 8 d_model.
        k: features active at a time.
        samples: activations to train on, in batches of `batch_size`.

    Returns:
        An inference autoencoder of SAELens (``sae.encode``, ``sae.decode``, ``sae.W_dec``,
        ``sae.save_model``), which remembers in its metadata what it reads.

    Raises:
        ImportError: SAELens is not installed.
        ValueError: a layer out of range, k beyond d_sae, or an empty corpus.
    """
    try:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
    except ImportError as error:
        raise ImportError("autoencoders need SAELens: pip install 'mi-hops[sae]'") from error
    resolve_layers(model, "resid", layer)
    d_in, device = int(model.cfg.d_model), str(device_of(model))
    width = 8 * d_in if d_sae is None else d_sae
    if not 1 <= k <= width:
        raise ValueError(f"k is {k}; expected 1..{width}, the number of features")
    stream = _activations(model, corpus, layer, batch_size, max_tokens, seed)
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=d_in, d_sae=width, k=k, device=device, normalize_activations="expected_average_only_in"
    )
    settings = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=batch_size,
        lr=learning_rate,
        lr_end=learning_rate,
        device=device,
        n_batches_for_norm_estimate=10,
    )
    # SAELens draws its first weights from the global generator, which is restored afterwards.
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        training = sae_lens.TopKTrainingSAE(config)
        sae_lens.SAETrainer(settings, training, stream).fit()
        # Through a folder the weights become SAELens's inference class, without training's extras.
        training.save_inference_model(folder)
        sae = sae_lens.SAE.load_from_disk(folder, device=device)
    for parameter in sae.parameters():
        parameter.requires_grad_(False)
    sae.cfg.metadata.hook_name = hook_of(model, "resid", layer)
    sae.cfg.metadata.model_name = str(model.cfg.model_name)
    sae.cfg.metadata[_FINGERPRINT] = fingerprint(model)
    return sae.eval()


def sae_quality(model: HookedModel, sae: Any, corpus: Corpus, *, layer: int) -> Result:
    """Reconstruction quality and sparsity of an autoencoder on a corpus.

    Returns:
        Result without dimensions, over all tokens but BOS (``n_used`` of them): ``explained``, the
        share of the variance that is reconstructed; ``active``, features per token; ``dead``, the
        share of features that no token activates.

    Raises:
        ValueError: an empty corpus, or an autoencoder of another model or layer.
    """
    check_reads(model, sae, layer)
    squares, active, fired = 0.0, 0.0, torch.zeros(0)
    every: list[Tensor] = []
    for batch in token_batches(model, corpus):
        x = _rows_of(model, batch, layer)
        with torch.no_grad():
            features = sae.encode(x)
            squares += (x - sae.decode(features)).double().pow(2).sum().item()
        on = features > 0
        fired = on.any(0) if not every else fired | on.any(0)
        active += on.double().sum().item()
        every.append(x.double().cpu())
    rows = torch.cat(every)
    variance = (rows - rows.mean(0)).pow(2).sum().item()
    found = {
        "explained": 1 - squares / variance,
        "active": active / len(rows),
        "dead": 1 - fired.double().mean().item(),
    }
    return Result.from_arrays(
        {name: ((), value) for name, value in found.items()},
        units={"explained": "share", "active": "features", "dead": "share"},
        title=f"an autoencoder of the stream after {layer} blocks, over {len(rows)} tokens",
        used=len(rows),
        provenance=provenance(model, method="sae_quality", layer=layer),
    )


def fact_features(
    model: HookedModel,
    sae: Any,
    facts: Sequence[TwoHopFact],
    *,
    layer: int,
    role: str = "first hop",
    form: str | None = None,
    batch_size: int = 64,
) -> Result:
    """Feature activations at one position of two-hop prompts.

    Facts whose prompt or position cannot be tokenised or found are skipped, with the reason.

    Args:
        role: ``"first hop"`` (its last token) or ``"last"``.

    Returns:
        Result ``activation`` on ``example, feature``, with the coordinate ``bridge`` per fact.

    Raises:
        ValueError: another role, or an autoencoder of another model or layer.
        NoUsableFactError: no fact can be read.
    """
    check_reads(model, sae, layer)
    cases, places, skipped = at_role(model, facts, role, form=form, purpose="an autoencoder")
    prompts = [case.prompt for case in cases]
    states = states_at(model, prompts, places, layers=[layer], batch_size=batch_size)[:, 0]
    with torch.no_grad():
        found = sae.encode(states.to(sae.W_dec.device, sae.W_dec.dtype)).float().cpu()
    return Result.from_arrays(
        {"activation": (("example", "feature"), found)},
        coords={
            "example": [case.fact.id for case in cases],
            "feature": range(found.shape[1]),
            "bridge": ("example", [case.fact.bridge for case in cases]),
        },
        units={"activation": "activation"},
        title=f"feature activations at {role}, after {layer} blocks",
        skipped=skipped,
        provenance=provenance(model, method="fact_features", layer=layer, role=role, form=form),
    )


def bridge_features(
    features: Result, *, min_count: int = 4, threshold: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """For each bridge the feature that identifies it best, chosen on one half, evaluated on the other.

    "Active" (above `threshold`) is taken as saying "this bridge".

    Args:
        features: from `fact_features`.
        min_count: facts that a bridge must have; rarer ones are left out.

    Returns:
        Frame indexed by bridge: ``feature``; ``precision``, ``recall`` and ``f1`` on the other
        half (0 where the feature is never active there); ``chosen_f1`` on the half that chose;
        ``mean`` activation on the bridge's facts where active; ``n``.

    Raises:
        ValueError: no bridge with enough facts.
    """
    activation = features["activation"].values
    on = activation > threshold
    bridges = features["bridge"].values
    order = np.random.default_rng(seed).permutation(len(bridges))
    half = np.zeros(len(bridges), dtype=bool)
    half[order[: len(order) // 2]] = True
    rows = {}
    for bridge in sorted(set(bridges.tolist())):
        own = bridges == bridge
        if own.sum() < min_count or not own[half].any() or not own[~half].any():
            continue
        chosen = _detector(on[half], own[half])["f1"]
        best = int(np.argmax(chosen))
        other = _detector(on[~half][:, [best]], own[~half])
        values = activation[own & on[:, best], best]
        rows[bridge] = {
            "feature": best,
            **{name: float(value[0]) for name, value in other.items()},
            "chosen_f1": float(chosen[best]),
            "mean": float(values.mean()) if len(values) else 0.0,
            "n": int(own.sum()),
        }
    if not rows:
        raise ValueError(f"no bridge has {min_count} facts, some in each half; give more facts")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("bridge")


def clamp(sae: Any, feature: int, value: float) -> Change:
    """Set one feature to a value and leave the rest of the activation, error included, as it is."""

    def change(x: Tensor) -> Tensor:
        wide = x.to(sae.W_dec.device, sae.W_dec.dtype)
        gap = value - sae.encode(wide)[..., feature]
        return x + einsum("..., d -> ... d", gap, sae.W_dec[feature]).to(x.device, x.dtype)

    return change


def clamp_effect(
    model: HookedModel,
    sae: Any,
    facts: Sequence[TwoHopFact],
    feature_of: Mapping[str, int],
    *,
    layer: int,
    values: Sequence[float],
    role: str = "first hop",
    form: str | None = None,
    seed: int = 0,
    limits: Limits = Limits(),
) -> Result:
    """Clamp the feature of each fact's bridge and, as a control, that of another bridge.

    Args:
        feature_of: bridge -> feature (`bridge_features`); facts of other bridges, and those that
            cannot be read, are skipped.
        values: what the feature is set to; 0 takes it away.
        seed: of the draw of the other bridges.

    Returns:
        Result on ``example, feature_of, value`` (``feature_of`` = own, other): ``first_prob`` of
        the answer's first token and ``first_correct`` (share), with ``{name}_before``.

    Raises:
        ValueError: fewer than two bridges' features, a feature that the autoencoder does not have,
            no value, or an autoencoder of another model or layer.
        NoUsableFactError: no fact is left.
    """
    check_reads(model, sae, layer)
    check_role(role)
    n_features = int(sae.W_dec.shape[0])
    if wrong := {b: k for b, k in feature_of.items() if not 0 <= k < n_features}:
        raise ValueError(f"features {wrong} are out of range; there are 0..{n_features - 1}")
    if len(set(feature_of.values())) < 2 or not len(values):
        raise ValueError("clamping needs at least one value and the features of two bridges")

    def prepare(case: Case) -> tuple[Case, int]:
        if case.fact.bridge not in feature_of:
            raise ValueError("no feature for its bridge")
        return case, case.positions(role)[-1]

    found, skipped = usable(model, facts, prepare, purpose="clamping", form=form)
    rng = np.random.default_rng(seed)
    pairs = []
    for case, _ in found:
        own = feature_of[case.fact.bridge]
        others = [v for v in feature_of.values() if v != own]
        pairs.append((own, others[int(rng.integers(len(others)))]))
    metrics = get_metrics(["first_prob", "first_correct"])

    def rows_of(i: int, base: int, _: Mapping[str, Tensor]) -> list[Intervention]:
        site = stream_site(model, layer, found[i][1])
        return [
            Intervention((site,), clamp(sae, feature, value), base)
            for feature in pairs[i]
            for value in values
        ]

    scored = [Scored(case.prompt, case.target, tuple(metrics)) for case, _ in found]
    swept = run_sweep(model, scored, rows_of, limits=limits, label="clamping")
    rows = torch.stack(swept.rows)
    after = rearrange(rows, "example (own value) metric -> metric example own value", own=2)
    units = {metric.name: metric.unit for metric in metrics}
    return Result.from_arrays(
        {n: (("example", "feature_of", "value"), after[i]) for i, n in enumerate(units)},
        baselines={f"{n}_before": ("example", swept.base[:, i]) for i, n in enumerate(units)},
        coords={
            "example": [case.fact.id for case, _ in found],
            "feature_of": ["own", "other"],
            "value": [float(v) for v in values],
        },
        units=units | {f"{n}_before": u for n, u in units.items()},
        title=f"the bridge's feature clamped at {role}, after {layer} blocks",
        skipped=skipped,
        provenance=provenance(model, method="clamp_effect", layer=layer, role=role, seed=seed),
    )


# -- small parts ----------------------------------------------------------------------------------


def check_reads(model: HookedModel, sae: Any, layer: int) -> None:
    """Refuse an autoencoder that is known to read something other than this stream."""
    resolve_layers(model, "resid", layer)
    width = int(sae.W_dec.shape[1])
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None) or {}
    own = fingerprint(model)
    known = metadata.get(_FINGERPRINT) or own
    if width != model.cfg.d_model or known != own:
        raise ValueError(
            f"this autoencoder (width {width}, fingerprint {known}) belongs to another model than "
            f"the one that is read (width {model.cfg.d_model}, fingerprint {own})"
        )
    # The stream after l blocks has two names.
    same = {f"blocks.{layer}.hook_resid_pre", f"blocks.{layer - 1}.hook_resid_post"}
    hook = metadata.get("hook_name")
    if hook is not None and hook not in same:
        raise ValueError(
            f"this autoencoder reads {hook!r}, not the stream after {layer} blocks, which is "
            f"{hook_of(model, 'resid', layer)!r}"
        )


def _rows_of(model: HookedModel, batch: Batch, layer: int) -> Float[Tensor, "token d_model"]:
    """The stream at all real tokens of a batch but a BOS at its start, in float32."""
    rows, columns = real_cells(batch)
    bos = model.tokenizer.bos_token_id
    if bos is not None:
        keep = (columns > 0) | (batch.tokens[rows, columns] != bos)
        rows, columns = rows[keep], columns[keep]
    found = gather(model, batch.tokens, (rows, columns), kind="resid", layers=[layer])
    return found.read[layer].float()


def _activations(
    model: HookedModel, corpus: Corpus, layer: int, batch_size: int, max_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Batches ``[batch_size, d_model]`` without end, mixed over some forward passes."""
    kept = list(token_batches(model, corpus, max_tokens=max_tokens))
    generator = torch.Generator().manual_seed(seed)

    def stream() -> Iterator[Tensor]:
        pool: list[Tensor] = []
        while True:
            for i in torch.randperm(len(kept), generator=generator).tolist():
                pool.append(_rows_of(model, kept[i], layer))
                if sum(map(len, pool)) < 4 * batch_size:
                    continue
                mixed = torch.cat(pool)
                mixed = mixed[torch.randperm(len(mixed), generator=generator).to(mixed.device)]
                whole = len(mixed) // batch_size * batch_size
                yield from mixed[:whole].split(batch_size)
                pool = [mixed[whole:]]

    return stream()


def _detector(on: np.ndarray, own: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each column of `on` as a detector of `own`."""
    hits = (on & own[:, None]).sum(0).astype(float)
    said = on.sum(0)
    precision = np.divide(hits, said, out=np.zeros_like(hits), where=said > 0)
    recall = hits / max(own.sum(), 1)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(hits), where=both > 0)
    return {"precision": precision, "recall": recall, "f1": f1}
