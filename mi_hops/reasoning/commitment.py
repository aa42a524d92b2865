"""Where along its layers a model settles the answer: asked at once, in its own written steps, behind the mark.

A lens reads the token before which an answer is said; the layer from which its top token stays the one that
the model gives in the end is where it commits.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mi_hops.lens import Readout, commitment, logit_lens
from mi_hops.lens.vectors import Layers, LensLike, resolve_layers
from mi_hops.model import HookedModel, provenance
from mi_hops.result.result import Result
from mi_hops.result.statistics import bootstrap_ci, difference_ci

#: Way of answering -> whether the reply that it is part of was right.
WAYS = {"latent": "latent", "written": "aloud", "aloud": "aloud"}


def aloud_commitment(
    model: HookedModel,
    found: Result,
    *,
    lens: LensLike = "logit",
    layers: Layers = None,
    batch_size: int = 16,
) -> Result:
    """The layer from which a lens keeps to the token with which each answer begins.

    Read at the last token before the answer, in three ways: ``latent``, the end of the question
    answered at once; ``written``, where the steps of the reply aloud first say the right answer;
    ``aloud``, behind the mark of that reply.

    Args:
        found: of `reason_aloud`, on the same model.
        lens: as in `logit_lens`.
        layers: blocks passed, as in `logit_lens`; the last is read in any case.

    Returns:
        `Result` on ``example`` and ``way``: ``layer`` (blocks passed; NaN where the reply does not
        have the place), ``correct`` (whether the reply is, of ``written`` the reply aloud) and the
        ``token``. `commitment_table` sums it up.

    Raises:
        ValueError: a result that is not of `reason_aloud`; as in `logit_lens`.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.reasoning import aloud_commitment, reason_aloud
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")
        >>> found = reason_aloud(model, facts[:2], facts[100:200], shots=1, max_new_tokens=4)
        >>> aloud_commitment(model, found)["layer"].dims
        ('example', 'way')
    """
    data, last = found.data, int(model.cfg.n_layers)
    if not {"asked_latent", "asked_aloud", "answer_at"} <= set(data.variables):
        raise ValueError("this result has no questions asked aloud; make it with reason_aloud")
    chosen = sorted({*resolve_layers(model, "resid", layers)[1], last})
    texts = _texts(found)
    read = logit_lens(
        model,
        {f"{i}/{way}": text for (i, way), text in texts.items()},
        lens=lens,
        layers=chosen,
        readout=Readout(top_k=1, kl=False),
        batch_size=batch_size,
    )
    at, said = commitment(read).values[:, 0], read["top_tokens"].sel(layer=last).values[:, 0, 0]
    layer = np.full((data.sizes["example"], len(WAYS)), np.nan)
    token = np.full(layer.shape, "", dtype=object)
    for row, (i, way) in enumerate(texts):
        layer[i, list(WAYS).index(way)] = at[row]
        token[i, list(WAYS).index(way)] = said[row]
    correct = np.stack([data[right].values for right in WAYS.values()], 1)
    dims = ("example", "way")
    return Result.from_arrays(
        {"layer": (dims, layer), "correct": (dims, correct), "token": (dims, token)},
        coords={"example": data["example"].values.tolist(), "way": list(WAYS)},
        units={"layer": "blocks passed", "correct": "share"},
        provenance=provenance(
            model, method="commitment", lens=read.provenance["lens"], layers=chosen
        ),
        title="Where answers are settled",
        skipped=found.skipped,
        allow_nonfinite=True,  # replies without a mark, or without the answer in their steps
    )


def commitment_table(found: Result) -> pd.DataFrame:
    """Mean layers of `aloud_commitment`, and their differences.

    Returns:
        One row per ``way`` and ``replies`` (all, answered, not answered, and the difference of the last
        two), and one for the difference of each later way from ``latent``, fact by fact: ``n`` (facts;
        of a difference between groups, of the smaller one), ``layer`` (mean) and its bootstrap 95%
        interval ``lower``, ``upper``, NaN where there are fewer than two.

    Raises:
        ValueError: a result that is not of `aloud_commitment`.
    """
    if not {"layer", "correct"} <= set(found.data) or "way" not in found.data.dims:
        raise ValueError("this result has no layers by way; make it with aloud_commitment")
    rows: list[tuple[object, ...]] = []
    latent = found["layer"].sel(way="latent").values
    for way in found["way"].values.tolist():
        layer, right = (found[name].sel(way=way).values for name in ("layer", "correct"))
        known = np.isfinite(layer)
        groups = {
            "all": layer[known],
            "answered": layer[known & (right > 0)],
            "not answered": layer[known & (right == 0)],
        }
        for replies, values in groups.items():
            mean = values.mean() if len(values) else np.nan
            rows.append((way, replies, len(values), mean, *bootstrap_ci(values)))
        sides = groups["answered"], groups["not answered"]
        rows.append((way, "answered - not answered", min(map(len, sides)), *difference_ci(*sides)))
        if way != "latent":
            change = difference_ci(layer[known], latent[known], paired=True)
            rows.append((f"{way} - latent", "all", int(known.sum()), *change))
    table = pd.DataFrame(rows, columns=["way", "replies", "n", "layer", "lower", "upper"])
    return table.astype(dict.fromkeys(("layer", "lower", "upper"), float))


def _texts(found: Result) -> dict[tuple[int, str], str]:
    """(example, way) -> the text up to where the answer is said."""
    mark = str(found.provenance["layout"]["mark"]).strip()
    texts = {}
    for i in range(found.data.sizes["example"]):
        asked, said, at = (
            found[name].values[i] for name in ("asked_aloud", "said_aloud", "answer_at")
        )
        texts[i, "latent"] = str(found["asked_latent"].values[i])
        if np.isfinite(at):
            texts[i, "written"] = f"{asked} {said[: int(at)]}".rstrip()
        steps, marked, _ = said.rpartition(mark)
        if marked:
            texts[i, "aloud"] = f"{asked} {steps}{mark}"
    return texts
