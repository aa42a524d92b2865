"""Linear probes with control tasks: is the bridge linearly there, beyond what a probe can memorise?

A probe's accuracy alone says little: with enough dimensions it can learn any labels by heart. A
*control task* (Hewitt and Liang 2019, arXiv 1909.03368) gives every type of input a fixed random label
drawn from the same labels; here a type is a first-hop phrase. *Selectivity* is the accuracy on the
task less that on the control. Classifiers are scikit-learn's (``pip install mi-hops[probes]``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_hops.lens.reading import check_layers, gather
from mi_hops.lens.tracking import at_role
from mi_hops.model import HookedModel, provenance
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.text.tokens import Prompt, batches

if TYPE_CHECKING:
    from mi_hops.facts.fact import TwoHopFact


def fact_probes(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    label: Callable[[TwoHopFact], str] | None = None,
    kind_of_input: Callable[[TwoHopFact], str] | None = None,
    role: str = "first hop",
    form: str | None = None,
    kind: str = "resid",
    layers: Sequence[int] | None = None,
    probe: Callable[[], Any] | None = None,
    min_count: int = 3,
    test_share: float = 0.25,
    unseen_share: float = 0.2,
    n_controls: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Result:
    """Train a probe for each layer, and one for each control task beside it.

    A share of the input types is kept out altogether; the facts of the others are parted into
    training and test facts, so that test facts are new but their types are not: there, and only
    there, a control task can be got right by memorising.

    Args:
        label: what is to be read; default the bridge.
        kind_of_input: the type of an input; default its first-hop phrase. One type must always have
            one label.
        role: ``"first hop"`` or ``"last"``: where the prompt is read.
        form: form of the prompt; default each fact's first.
        kind, layers: what is read (`reading.KINDS`, without heads), and where; default all layers.
        probe: makes an untrained classifier with ``fit`` and ``predict``; default multinomial
            logistic regression on standardised inputs.
        min_count: facts that a label must have; others are skipped.
        test_share: share of the seen types' facts that is tested on.
        unseen_share: share of types that is kept out.
        n_controls: control tasks, each with labels of its own, averaged.
        seed: of the split and the control labels.

    Returns:
        Result with ``correct`` and ``control_correct`` (share, 0 to 1) and ``selectivity``, their
        difference, on ``example`` (test facts) and ``layer``; ``unseen_correct`` on
        ``unseen_example`` (facts of the types kept out) and ``layer``; and the baselines
        ``majority`` and ``unseen_majority`` (share): guessing the most frequent training label.

    Raises:
        ValueError: an unknown role, heads, no control task, a type with two labels, fewer than two
            labels left, or an empty part of the split.
        NoUsableFactError: no fact can be read.
        ImportError: scikit-learn is not installed.
    """
    make = probe or _logistic
    if n_controls < 1:
        raise ValueError(f"n_controls is {n_controls}; selectivity needs at least one control task")
    if kind == "head_out":
        raise ValueError("probes read whole activations; choose another kind")
    chosen = check_layers(model, kind, layers)
    read_label = label or (lambda fact: fact.bridge)
    read_type = kind_of_input or (lambda fact: fact.first_hop)
    read = at_role(model, facts, role, form=form, what="a probe")
    kept, prompts, places, skipped = read.facts, read.prompts, read.places, read.skipped
    labels, types = ([tell(f) for f in kept] for tell in (read_label, read_type))
    _check_types(types, labels)
    counts = Counter(labels)
    enough = [i for i, name in enumerate(labels) if counts[name] >= min_count]
    skipped += [
        (kept[i].id, f"label with fewer than {min_count} facts")
        for i in range(len(kept))
        if counts[labels[i]] < min_count
    ]
    kept = [kept[i] for i in enough]
    prompts, places = [prompts[i] for i in enough], [places[i] for i in enough]
    labels, types = [labels[i] for i in enough], [types[i] for i in enough]
    if len(set(labels)) < 2:
        raise ValueError(
            f"a probe needs at least two labels with {min_count} facts each; {len(set(labels))} left"
        )
    rng = np.random.default_rng(seed)
    train, test, unseen = _split(types, test_share, unseen_share, rng)
    target = np.array(labels)
    controls = [_control(types, labels, rng) for _ in range(n_controls)]
    inputs = _inputs(model, prompts, places, kind, chosen, batch_size)
    shape = (len(test), len(chosen))
    correct, control_correct = np.zeros(shape), np.zeros(shape)
    unseen_correct = np.zeros((len(unseen), len(chosen)))
    for k, layer in enumerate(progress_bar(chosen, label="probes", show=progress)):
        x = inputs[layer]
        fitted = make().fit(x[train], target[train])
        correct[:, k] = fitted.predict(x[test]) == target[test]
        unseen_correct[:, k] = fitted.predict(x[unseen]) == target[unseen]
        for control in controls:
            fitted = make().fit(x[train], control[train])
            control_correct[:, k] += (fitted.predict(x[test]) == control[test]) / n_controls
    common = Counter(target[train].tolist()).most_common(1)[0][0]
    dims = ("example", "layer")
    return Result.from_arrays(
        {
            "correct": (dims, correct),
            "control_correct": (dims, control_correct),
            "selectivity": (dims, correct - control_correct),
            "unseen_correct": (("unseen_example", "layer"), unseen_correct),
        },
        baselines={
            "majority": ("example", (target[test] == common).astype(float)),
            "unseen_majority": ("unseen_example", (target[unseen] == common).astype(float)),
        },
        coords={
            "example": [kept[i].id for i in test], "layer": chosen,
            "unseen_example": [kept[i].id for i in unseen], "label": ("example", target[test]),
        },
        units=dict.fromkeys(
            ("correct", "control_correct", "unseen_correct", "majority", "unseen_majority"),
            "share",
        ) | {"selectivity": "difference of shares"},
        title=f"linear probe at {role}, {kind}",
        skipped=skipped,
        provenance=provenance(
            model, method="fact_probes", role=role, kind=kind, form=form, seed=seed,
            n_train=len(train), n_labels=len(set(labels)), n_types=len(set(types)),
        ),
    )  # fmt: skip


def _logistic() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "probes need scikit-learn: pip install 'mi-hops[probes]', or pass probe="
        ) from error
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


def _check_types(types: Sequence[str], labels: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for kind, name in zip(types, labels, strict=True):
        if seen.setdefault(kind, name) != name:
            raise ValueError(
                f"the input type {kind!r} has the labels {seen[kind]!r} and {name!r}; give a finer "
                "kind_of_input, or a label that it determines"
            )


def _split(
    types: Sequence[str], test_share: float, unseen_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    for name, share in (("test_share", test_share), ("unseen_share", unseen_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is {share}; expected a share between 0 and 1")
    distinct = sorted(set(types))
    n = max(1, round(unseen_share * len(distinct)))
    out = {distinct[i] for i in rng.permutation(len(distinct))[:n]}
    unseen = np.array([i for i, kind in enumerate(types) if kind in out], dtype=int)
    rest = rng.permutation([i for i, kind in enumerate(types) if kind not in out]).astype(int)
    cut = round(test_share * len(rest))
    test, train = rest[:cut], rest[cut:]
    # A type that training has not seen cannot be memorised; such facts are unseen as well.
    known = {types[i] for i in train}
    strangers = np.array([types[i] not in known for i in test], dtype=bool)
    unseen = np.sort(np.concatenate([unseen, test[strangers]]))
    test = np.sort(test[~strangers])
    if not len(train) or not len(test) or not len(unseen):
        raise ValueError(
            f"the split leaves {len(train)} training, {len(test)} test and {len(unseen)} unseen "
            "facts; each needs some: give more facts, several for each first hop"
        )
    return train, test, unseen


def _control(types: Sequence[str], labels: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """A random label for each type, drawn as often as labels are among types."""
    own = dict(zip(types, labels, strict=True))
    distinct = sorted(own)
    drawn = rng.permutation([own[kind] for kind in distinct])
    table = dict(zip(distinct, drawn.tolist(), strict=True))
    return np.array([table[kind] for kind in types])


def _inputs(
    model: HookedModel,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    kind: str,
    layers: Sequence[int],
    batch_size: int,
) -> dict[int, np.ndarray]:
    """Layer -> ``[fact, d_model]``."""
    out = {
        layer: np.empty((len(prompts), int(model.cfg.d_model)), dtype=np.float32)
        for layer in layers
    }
    for chosen, batch in batches([p.ids for p in prompts], batch_size):
        cells = (torch.arange(len(chosen)), torch.tensor([places[i] for i in chosen]))
        found = gather(model, batch.tokens, cells, kind=kind, layers=layers).read
        for layer in layers:
            out[layer][chosen] = found[layer].float().cpu().numpy()
    return out
