"""Results of parts of the facts, made apart, as one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pandas as pd
import torch

from mi_hops.editing import Moments
from mi_hops.patching.verify import Attribution
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.queries import in_order
from mi_hops.result.result import Result

Part = TypeVar("Part", bound=Result | Evaluation | Moments)


def merge(parts: Iterable[Part]) -> Part:
    """Merge results, evaluations or second moments of different examples, as if made together.

    Values are joined along ``example`` (evaluations: case by case), and what was skipped is counted
    together. An `Attribution` becomes a plain `Result`, as where it is loaded: the parts verify, the
    whole does not. Moments are weighted by their tokens, which makes them those of the whole text. What was
    chosen or drawn from all examples of a part (controls, cells) stays as that part had it.

    Args:
        parts: of one kind, in the order in which their examples are to come.

    Raises:
        ValueError: nothing to merge; kinds, models or settings that differ, with their names; labels
            of other dimensions that differ; an example that two parts have.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().sample(train=0, held_out=2)
        >>> halves = [mi_hops.find_gap(model, facts[:3]), mi_hops.find_gap(model, facts[3:])]
        >>> mi_hops.merge(halves).facts == tuple(facts)
        True
    """
    # `sel` gives a plain result, which holds no model.
    given: list[Any] = [p.sel() if isinstance(p, Attribution) else p for p in parts]
    if not given:
        raise ValueError("nothing to merge; expected results, evaluations or moments")
    kinds = sorted({type(part).__name__ for part in given})
    if len(kinds) > 1 or not isinstance(given[0], Result | Evaluation | Moments):
        raise ValueError(
            f"cannot merge {', '.join(kinds)}; expected Results, Evaluations or Moments, all of one kind"
        )
    if isinstance(given[0], Result):
        return cast(Part, _results(cast(Any, given)))
    if isinstance(given[0], Evaluation):
        return cast(Part, _evaluations(cast(Any, given)))
    return cast(Part, _moments(cast(Any, given)))


def load_part(path: str | os.PathLike[str]) -> Result | Evaluation | Moments:
    """What a file holds: a result, an evaluation or moments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if Path(path).suffix == ".safetensors":
        return Moments.load(Path(path))
    found = Result.load(path)
    return Evaluation.load(path) if "asked" in found.provenance else found


def _results(parts: Sequence[Result]) -> Result:
    import xarray as xr

    first = parts[0]
    _require_alike([part.provenance for part in parts])
    _require_alike(
        [{"title": p.title, "main variable": p.main, "variables": list(p.data)} for p in parts]
    )
    for part in parts:
        if "example" not in part.data.dims or "example" not in part.data.coords:
            raise ValueError(
                f"the result {part.title!r} has no labelled examples (dimensions "
                f"{list(part.data.dims)}); merge what is measured example by example"
            )
    _require_apart([part.data["example"].values.tolist() for part in parts])
    try:
        data = xr.concat(
            [part.data for part in parts],
            "example",
            data_vars="minimal",
            coords="minimal",
            compat="identical",
            join="exact",
            combine_attrs="identical",
        )
    except (ValueError, xr.MergeError) as error:
        raise ValueError(f"the labels of the parts differ: {error}") from error
    return type(first)(
        data,
        provenance=first.provenance,
        title=first.title,
        main=first.main,
        skipped=[entry for part in parts for entry in part.skipped],
        allow_nonfinite=True,  # checked when the parts were made
    )


def _evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    first = parts[0]
    _require_alike([part.provenance for part in parts])
    _require_alike([{"columns": list(part.frame)} for part in parts])
    _require_apart([part.case_ids for part in parts])
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    repairs = {name: i for i, name in enumerate(dict.fromkeys(frame["repair"]))}
    sets = {name: i for i, name in enumerate(in_order(set(frame["set"])))}
    order = pd.DataFrame({"repair": frame["repair"].map(repairs), "set": frame["set"].map(sets)})
    order = order.sort_values(["repair", "set"], kind="stable")
    names = [name for name in repairs if any(name in part.case_ids_of for part in parts)]
    return Evaluation(
        frame.loc[order.index].reset_index(drop=True),
        tuple(case for part in parts for case in part.case_ids),
        tuple(entry for part in parts for entry in part.skipped),
        first.provenance,
        {n: tuple(c for p in parts for c in p.case_ids_of.get(n, p.case_ids)) for n in names},
    )


def _moments(parts: Sequence[Moments]) -> Moments:
    first = parts[0]
    names = ("matrix", "fingerprint", "processing", "shrinkage", "null_space", "layers")
    sources = [{k: v for k, v in part.source.items() if k != "text"} for part in parts]
    said = [{name: getattr(part, name) for name in names} for part in parts]
    _require_alike([{**a, **b} for a, b in zip(said, sources, strict=True)])
    n = sum(part.n for part in parts)
    texts = "".join(str(part.source.get("text")) for part in parts)
    digest = hashlib.sha256(texts.encode()).hexdigest()
    return replace(
        first,
        second={
            i: torch.stack([part.second[i] * (part.n / n) for part in parts]).sum(0)
            for i in first.layers
        },
        fourth={i: sum(part.fourth[i] * (part.n / n) for part in parts) for i in first.layers},
        n=n,
        source={**first.source, "text": digest},
    )


def _require_alike(said: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts that were not made in the same way."""
    for i, other in enumerate(said[1:], 1):
        names = [n for n in {**said[0], **other} if said[0].get(n) != other.get(n)]
        if names:
            values = {name: (said[0].get(name), other.get(name)) for name in names}
            shown = "; ".join(
                f"{k}: {str(a)[:80]} and {str(b)[:80]}" for k, (a, b) in values.items()
            )
            raise ValueError(
                f"part {i} was made otherwise than part 0 ({shown}); they do not merge"
            )


def _require_apart(labels: Sequence[Sequence[Any]]) -> None:
    """Refuse examples that two parts have."""
    twice = [label for label, n in Counter(x for part in labels for x in part).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} example(s) are in two parts, such as {twice[:3]}")
