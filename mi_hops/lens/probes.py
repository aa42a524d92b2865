"""Linear probes with control tasks: is the bridge linearly there, beyond what a probe can memorise?

A probe's accuracy alone says little: with enough dimensions it can learn any labels by heart. A
*control task* (Hewitt and Liang 2019, arXiv 1909.03368) gives every type of input a fixed random label
drawn from the same labels; here a type is a first-hop phrase. *Selectivity* is the accuracy on the
task less that on the control. Classifiers are scikit-learn's (``pip install mi-hops[probes]``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.tracking import at_role
from mi_hops.lens.vectors import Layers, resolve_layers, states_at
from mi_hops.model import HookedModel, provenance
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result

#: Share of the input types kept out of training altogether, and of the other facts tested on.
UNSEEN_SHARE, TEST_SHARE = 0.2, 0.25


@dataclass(frozen=True)
class ProbeTraining:
    """How probes are trained.

    Args:
        classifier: makes an untrained classifier with ``fit`` and ``predict``; default multinomial
            logistic regression on standardised inputs.
        min_count: facts that a label must have; others are skipped.
        n_controls: control tasks, each with labels of its own, averaged.
        seed: of the split and the control labels.

    Raises:
        ValueError: no control task.
    """

    classifier: Callable[[], Any] | None = None
    min_count: int = 3
    n_controls: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_controls < 1:
            raise ValueError(
                f"n_controls is {self.n_controls}; selectivity needs at least one control task"
            )


def fact_probes(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    label: Callable[[TwoHopFact], str] = lambda fact: fact.bridge,
    role: str = "first hop",
    form: str | None = None,
    kind: str = "resid",
    layers: Layers = None,
    training: ProbeTraining = ProbeTraining(),
    batch_size: int = 64,
    progress: bool = False,
) -> Result:
    """Train a probe per layer, and another on its control task.

    A fifth of the first-hop phrases is kept out altogether; the facts of the others are split into
    training facts and a quarter of test facts, so that test facts are new but their phrases are not:
    there, and only there, a control task can be solved by memorising.

    Args:
        label: what is to be read, one label for each first-hop phrase; default the bridge.
        role: ``"first hop"`` or ``"last"``: where the prompt is read.
        form: form of the prompt; default each fact's first.
        kind, layers: what is read (`KINDS`, without heads), and where; default all layers.

    Returns:
        Result with ``correct`` and ``control_correct`` (share, 0 to 1) and ``selectivity``, their
        difference, on ``example`` (test facts) and ``layer``; ``unseen_correct`` on
        ``unseen_example`` (facts of the phrases kept out) and ``layer``; and the baselines
        ``majority`` and ``unseen_majority`` (share): guessing the most frequent training label.

    Raises:
        ValueError: an unknown role, heads, a phrase with two labels, fewer than two labels left, or
            an empty part of the split.
        NoUsableFactError: no fact can be read.
        ImportError: scikit-learn is not installed.

    Examples:
        >>> import mi_hops
        >>> model, world = mi_hops.load_model("hops-gpt2"), mi_hops.Hopland()
        >>> people = world.entities["person"][:3]
        >>> facts = [f for f in world.two_hop_facts("train") if f.bridge in people][::3]
        >>> probes = mi_hops.lens.fact_probes(model, facts, layers=[1, 3])
        >>> probes["unseen_correct"].mean("unseen_example").dims
        ('layer',)
    """
    make = training.classifier or _logistic
    name, chosen = resolve_layers(model, kind, layers)
    if name == "result":
        raise ValueError("probes read whole activations; choose another kind")
    cases, places, skipped = at_role(model, facts, role, form=form, purpose="a probe")
    labels, phrases = [label(c.fact) for c in cases], [c.fact.first_hop for c in cases]
    _check_labels(phrases, labels)
    counts, least = Counter(labels), training.min_count
    kept = [i for i, name in enumerate(labels) if counts[name] >= least]
    rare = f"label with fewer than {least} facts"
    skipped += [
        (c.fact.id, rare) for c, name in zip(cases, labels, strict=True) if counts[name] < least
    ]
    target, types, ids = (
        np.array(part)[kept] for part in (labels, phrases, [c.fact.id for c in cases])
    )
    if len(set(target)) < 2:
        raise ValueError(
            f"a probe needs at least two labels with {least} facts each; {len(set(target))} left"
        )
    rng = np.random.default_rng(training.seed)
    train, test, unseen = split_types(types.tolist(), rng)
    controls = [control_labels(types, target, rng) for _ in range(training.n_controls)]
    prompts, where = [cases[i].prompt for i in kept], [places[i] for i in kept]
    states = states_at(model, prompts, where, kind=name, layers=chosen, batch_size=batch_size)
    inputs = states.float().cpu().numpy()

    def correct(x: np.ndarray, wanted: np.ndarray, *parts: np.ndarray) -> list[np.ndarray]:
        fitted = make().fit(x[train], wanted[train])
        return [fitted.predict(x[part]) == wanted[part] for part in parts]

    found = []
    for k in progress_bar(range(len(chosen)), label="probes", show=progress):
        x = inputs[:, k]
        tested, new = correct(x, target, test, unseen)
        found.append((tested, np.mean([correct(x, c, test)[0] for c in controls], axis=0), new))
    tested, control, new = (
        np.stack(part, axis=1).astype(float) for part in zip(*found, strict=True)
    )
    common = Counter(target[train].tolist()).most_common(1)[0][0]
    dims, unseen_dims = ("example", "layer"), ("unseen_example", "layer")
    values: dict[str, Any] = {
        "correct": (dims, tested),
        "control_correct": (dims, control),
        "selectivity": (dims, tested - control),
        "unseen_correct": (unseen_dims, new),
    }
    baselines: dict[str, Any] = {
        "majority": ("example", (target[test] == common).astype(float)),
        "unseen_majority": ("unseen_example", (target[unseen] == common).astype(float)),
    }
    return Result.from_arrays(
        values,
        baselines=baselines,
        coords={
            "example": ids[test],
            "layer": chosen,
            "unseen_example": ids[unseen],
            "label": ("example", target[test]),
        },
        units=dict.fromkeys((*values, *baselines), "share")
        | {"selectivity": "difference of shares"},
        title=f"linear probe at {role}, {name}",
        skipped=skipped,
        provenance=provenance(
            model,
            method="fact_probes",
            role=role,
            kind=name,
            form=form,
            seed=training.seed,
            n_train=len(train),
            n_labels=len(set(target)),
            n_types=len(set(types)),
        ),
    )


def _logistic() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "probes need scikit-learn: pip install 'mi-hops[probes]', or pass a classifier"
        ) from error
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


def _check_labels(phrases: Sequence[str], labels: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for phrase, name in zip(phrases, labels, strict=True):
        if seen.setdefault(phrase, name) != name:
            raise ValueError(
                f"the first hop {phrase!r} has the labels {seen[phrase]!r} and {name!r}; give a label "
                "that it determines"
            )


def split_types(
    types: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of training facts, test facts of types seen in training, facts of unseen types."""
    each = np.asarray(types)
    distinct = np.unique(each)
    n = max(1, round(UNSEEN_SHARE * len(distinct)))
    out = np.isin(each, distinct[rng.permutation(len(distinct))[:n]])
    rest = rng.permutation(np.flatnonzero(~out))
    cut = round(TEST_SHARE * len(rest))
    test, train = rest[:cut], rest[cut:]
    # A type that training has not seen cannot be memorised; such facts are unseen as well.
    known = np.isin(each, each[train])
    test, unseen = np.sort(test[known[test]]), np.flatnonzero(~known)
    if not len(train) or not len(test) or not len(unseen):
        raise ValueError(
            f"the split leaves {len(train)} training, {len(test)} test and {len(unseen)} unseen "
            "facts; each needs some: give more facts, several for each first hop"
        )
    return train, test, unseen


def control_labels(
    types: Sequence[str] | np.ndarray, labels: Sequence[str] | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A random label for each type, drawn as often as labels are among types."""
    _, first, number = np.unique(types, return_index=True, return_inverse=True)
    return rng.permutation(np.asarray(labels)[first])[number]
