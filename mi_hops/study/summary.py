"""The headline numbers of a study, each with n and an interval, from the files of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.facts.unusable import count_reasons, describe_reasons
from mi_hops.result.statistics import bootstrap_ci, difference_ci, proportion_ci
from mi_hops.study.folder import STEPS

if TYPE_CHECKING:
    from mi_hops.reasoning.gap import Gap
    from mi_hops.result.result import Result
    from mi_hops.study.folder import Study


def summarise(study: Study, gap: Gap, choices: Mapping[str, Any]) -> dict[str, Any]:
    """All of ``summary.json``: one entry a step, and ``headlines`` for the terminal.

    A step that was left out has ``{"skipped": reason}``; ``left_out`` holds for each step the facts
    that it could not use, counted by reason, ``made_with`` the steps made with each set of versions.
    Every estimate is a dict with ``value``,
    ``low``, ``high`` (95% interval; exact for shares of facts, bootstrap over facts for means) and
    ``n``.
    """
    summary: dict[str, Any] = {"model": study.settings["model"], "gap": _gap(study, gap)}
    makers = {"failures": _failures, "lens": _lens, "erasure": _erasure, "locate": _locate,
              "injection": _injection}  # fmt: skip
    for step, make in makers.items():
        result = study.result(step)
        summary[step] = {"skipped": study.skipped(step)} if result is None else make(result)
    evaluation = study.evaluation()
    if evaluation is None:
        summary["editing"] = {"skipped": study.skipped("editing")}
    else:
        table = evaluation.table()
        scores: dict[str, Any] = {}
        for (repair, name, statistic), row in table.iterrows():
            scores.setdefault(repair, {}).setdefault(name, {})[statistic] = _row(row)
        summary["editing"] = {"choices": dict(choices), "scores": scores}
    summary["left_out"] = _left_out(study, choices)
    summary["made_with"] = study.made_with()
    summary["headlines"] = _headlines(summary)
    return _plain(summary)


def _left_out(study: Study, choices: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Step -> reason -> facts left out for it."""
    found = {}
    for step in STEPS:
        result = study.result(step)
        # Of an evaluation the result's own list is of queries, not of facts.
        skipped = [] if result is None else result.skipped
        if step == "editing":
            skipped = choices.get("left_out", [])
        if skipped:
            found[step] = count_reasons(skipped)
    return found


def _share(k: float, n: int) -> dict[str, Any]:
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = proportion_ci(int(k), int(n))
    return {"value": k / n, "low": low, "high": high, "n": n}


def _mean(values: Any) -> dict[str, Any]:
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = bootstrap_ci(values)
    return {"value": values.mean(), "low": float(low), "high": float(high), "n": len(values)}


def _row(row: Any) -> dict[str, Any]:
    return {"value": row["value"], "low": row["lower"], "high": row["upper"],
            "n": int(row["n_cases"])}  # fmt: skip


def _gap(study: Study, gap: Gap) -> dict[str, Any]:
    result = study.result("gap")
    assert result is not None
    forms = {}
    for form in result["form"].values.tolist():
        data = result.data.sel(form=form)
        hops = {h: data[h].values.astype(bool) for h in ("first", "second", "two_hop")}
        known = hops["first"] & hops["second"]
        splits = data["split"].values
        by_split = {}
        for split in dict.fromkeys(splits.tolist()):
            inside = splits == split
            by_split[split or "all"] = {
                "known": _share((known & inside).sum(), int(inside.sum())),
                "two_hop_of_known": _share(
                    (hops["two_hop"] & known & inside).sum(), int((known & inside).sum())
                ),
                "first_token_of_known": _share(
                    (data["first_token"].values.astype(bool) & known & inside).sum(),
                    int((known & inside).sum()),
                ),
            }
        forms[form] = {
            "first": _share(hops["first"].sum(), len(known)),
            "second": _share(hops["second"].sum(), len(known)),
            "two_hop": _share(hops["two_hop"].sum(), len(known)),
            "gap": _share((known & ~hops["two_hop"]).sum(), int(known.sum())),
            "by_split": by_split,
        }
    failed = gap.frame[gap.frame["first"] & gap.frame["second"] & ~gap.frame["two_hop"]]
    return {
        "forms": forms,
        "table": [
            {**record, "share": _share(record["n"], len(gap.frame))}
            for record in gap.table().to_dict("records")
        ],
        "failed": len(gap.failed),
        "passed": len(gap.passed),
        "failed_saying_bridge": _share(failed["says_bridge"].sum(), len(failed)),
        "skipped_facts": len(gap.skipped),
    }


def _failures(result: Result) -> dict[str, Any]:
    kinds = result["type"].values
    names = ("incomplete", "short-cut", "distorted", "hasty", "other")
    return {name: _share((kinds == name).sum(), len(kinds)) for name in names}


def _lens(result: Result) -> dict[str, Any]:
    """Where the bridge peaks, and by how much more in passed than in failed questions.

    The bridge is read by the papers' score, the mean probability of all its tokens; the answer by
    its first token. The layer of the difference is the one where it is largest on one half of each
    group; the number comes from the other half.
    """
    data = result.data
    groups = data["group"].values
    choosing = _choosing(data["example"].values)
    found: dict[str, Any] = {}
    for position in data["position"].values.tolist():
        here = data.sel(position=position).transpose("example", "layer", ...)
        bridge = here["mean_token_prob"].sel(tracked="bridge").values
        answer = here["prob"].sel(tracked="answer").values
        entry: dict[str, Any] = {}
        for group in dict.fromkeys(groups.tolist()):
            mine, told = bridge[groups == group], answer[groups == group]
            # The embedding (layer 0) is the prompt's own token, not yet anything recalled.
            where = 1 + int(mine.mean(0)[1:].argmax())
            entry[group] = {
                "bridge_peak_layer_of_mean": where,
                "bridge_at_that_layer": _mean(mine[:, where]),
                "bridge_peak": _mean(mine[:, 1:].max(1)),
                "answer_final": _mean(told[:, -1]),
                "answer_half_layer_of_mean": int((told.mean(0) >= told.mean(0)[-1] / 2).argmax()),
            }
        sides = [groups == "passed", groups == "failed"]
        if all((side & part).any() for side in sides for part in (choosing, ~choosing)):
            chosen = np.subtract(*(bridge[side & choosing].mean(0) for side in sides))[1:]
            layer = 1 + int(chosen.argmax())
            reported = [bridge[side & ~choosing, layer] for side in sides]
            value, low, high = difference_ci(*reported)
            entry["passed_minus_failed"] = {
                "layer": layer, "on_choosing_half": float(chosen.max()),
                "value": float(value), "low": float(low), "high": float(high),
                "n": len(reported[0]), "n_other": len(reported[1]),
            }  # fmt: skip
        found[position] = entry
    return found


def _erasure(result: Result) -> dict[str, Any]:
    """For each variant and position, the layer where the bridge's erasure costs most.

    That layer is chosen on one half of the questions and its cost reported on the other; the layers
    below zero are told from all of them, each by its own interval.
    """
    ends = result.difference_ci("control", variable="bridge")
    choosing = _choosing(result["example"].values)
    paired = result["bridge"] - result["control"]
    found: dict[str, Any] = {"clean": _mean(result["clean"].values)}
    for variant in ends["variant"].values.tolist():
        for position in ends["position"].values.tolist():
            cell = ends.sel(variant=variant, position=position)
            here = paired.sel(variant=variant, position=position).transpose("example", "layer")
            cost = here.values[choosing].mean(0)
            best = int(cost.argmin())
            below = cell["layer"].values[cell["upper"].values < 0]
            found[f"{variant}, {position}"] = {
                "layer": int(here["layer"].values[best]),
                "on_choosing_half": float(cost[best]),
                "bridge_minus_control": _mean(here.values[~choosing, best]),
                "layers_below_zero": [int(i) for i in below],
            }
    return found


def _choosing(examples: Any) -> np.ndarray:
    """Which examples choose a cell; the others report it. A single example does neither."""
    from mi_hops.injection.select import split_halves

    labels = examples.tolist()
    chosen = set(split_halves(labels)[0]) if len(labels) > 1 else set(labels)
    return np.array([label in chosen for label in labels])


def largest_cost(erasure: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The entry ("variant, position") of the erasure's summary with the largest cost when chosen."""
    entries = ((name, entry) for name, entry in erasure.items() if name != "clean")
    return min(entries, key=lambda item: item[1]["on_choosing_half"])


def _locate(result: Result) -> dict[str, Any]:
    from mi_hops.reasoning.locate import located_layers

    ends = result.ci(variable="effect")
    found: dict[str, Any] = {
        "clean": _mean(result["clean"].values),
        "guide": _mean(result["guide"].values),
        "located_layers": located_layers(result),
    }
    for kind in ends["kind"].values.tolist():
        cell = ends.sel(kind=kind)
        estimate = cell["estimate"].transpose("position", "layer")
        if estimate.isnull().all():
            continue
        p, layer = np.unravel_index(np.nanargmax(estimate.values), estimate.shape)
        at = cell.isel(position=p, layer=layer)
        found[kind] = {
            "position": str(estimate["position"].values[p]), "layer": int(at["layer"]),
            "effect": {"value": float(at["estimate"]), "low": float(at["lower"]),
                       "high": float(at["upper"]), "n": int(at["n"])},
        }  # fmt: skip
    return found


def _injection(result: Result) -> dict[str, Any]:
    from mi_hops.injection.select import cell_report, select_cell

    halves = {
        name: result["example"].values[result["half"].values == name].tolist()
        for name in ("choose", "report")
    }
    cell = select_cell(result, examples=halves["choose"], metric="first_correct")
    report = cell_report(result, cell, examples=halves["report"], metric="first_correct")
    memories = {
        str(name): {
            "right": {"value": row["right"], "low": row["right_lower"],
                      "high": row["right_upper"], "n": int(row["n"])},
            "bridge_minus_this": {"value": row["difference"], "low": row["difference_lower"],
                                  "high": row["difference_upper"], "n": int(row["n"])},
            "median_relative_change": row["median_relative_change"],
            "trimmed_mean_relative_change": row["trimmed_mean_relative_change"],
            "mean_relative_change": row["mean_relative_change"],
            "mean_log_change": row["mean_log_change"],
            "share_improved": row["share_improved"],
        }
        for name, row in report.iterrows()
    }  # fmt: skip
    return {
        "cell": {**cell.labels, "score_on_choosing_half": cell.score, "n_choose": cell.n},
        "memories": memories,
    }


def _headlines(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    gap = summary["gap"]
    form, main = next(iter(gap["forms"].items()))
    lines = [
        ("first hop / second hop known", f"{_pct(main['first'])} / {_pct(main['second'])}"),
        (f"gap: failed though both hops known ({form})", _pct(main["gap"])),
    ]
    not_asked = summary["left_out"].get("gap")
    if not_asked:
        lines.append(("facts that cannot be asked", describe_reasons(not_asked)))
    erasure = summary["erasure"]
    if "skipped" not in erasure:
        name, best = largest_cost(erasure)
        lines.append(
            (f"erasing the bridge less control ({name}, L{best['layer']})",
             _number(best["bridge_minus_control"]))
        )  # fmt: skip
    if "skipped" not in summary["locate"]:
        lines.append(("layers located", str(summary["locate"]["located_layers"])))
    injection = summary["injection"]
    if "skipped" not in injection:
        cell = injection["cell"]
        lines.append(
            (f"injection puts right ({_layers(str(cell['layer']).split('+'))}, "
             f"x{cell['strength']:g}, {cell['encoding']})",
             _pct(injection["memories"]["bridge"]["right"]))
        )  # fmt: skip
    for repair, sets in summary["editing"].get("scores", {}).items():
        chosen = summary["editing"]["choices"]["chosen"][repair]
        where = f"{_layers(chosen['layers'])}, strength {chosen['strength']:g}"
        for label, name, statistic in (
            ("first token put right", "correction", "first_correct_after"),
            ("whole answer put right", "correction", "exact_match_after"),
            ("unrelated accuracy kept", "specificity", "exact_match_ratio"),
        ):
            score = sets.get(name, {}).get(statistic)
            if score:
                lines.append((f"{repair} ({where}): {label}", _pct(score)))
    for step in ("failures", "lens", "erasure", "locate", "injection", "editing"):
        reason = summary[step].get("skipped")
        if reason:
            lines.append((step, f"left out: {reason}"))
    if len(summary["made_with"]) > 1:
        mixed = (f"{', '.join(steps)}: {made}" for made, steps in summary["made_with"].items())
        lines.append(("made with different versions", "; ".join(mixed)))
    return [{"name": name, "text": text} for name, text in lines]


def _layers(layers: Sequence[Any]) -> str:
    """L5, or L3-5 of a run of layers."""
    return f"L{'-'.join(map(str, dict.fromkeys((layers[0], layers[-1]))))}"


def _pct(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "no case"
    ends = "" if share["low"] is None or share["low"] != share["low"] else (
        f" [{share['low']:.1%}, {share['high']:.1%}]"
    )  # fmt: skip
    return f"{share['value']:.1%}{ends}, n = {share['n']}"


def _number(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "no case"
    return (
        f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}], "
        f"n = {estimate['n']}"
    )


def _plain(value: Any) -> Any:
    """Python's own types, NaN as None, so that the file is strict JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
