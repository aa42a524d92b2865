"""The page of `benchmarks.ground_truth`: its words, its table and its figure."""

from __future__ import annotations

from html import escape
from typing import Any

from benchmarks.harness import table

KINDS = ("serial", "serial-last", "decoy", "hidden", "shortcut")
#: Question -> kinds whose true answer is yes.
TRUE = {
    "written": ("serial", "serial-last", "decoy"),
    "readable": ("serial", "serial-last", "decoy", "hidden"),
    "used": ("serial", "serial-last", "hidden"),
}


def figure(found: dict[str, Any]) -> str:
    """Tool x kind, the share of facts with a yes as SVG; a frame where the truth is yes."""
    left, top, width, height = 210, 46, 92, 26
    tools = found["tools"]
    rows = []
    for i, (name, row) in enumerate(tools.items()):
        y = top + i * height
        rows.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for j, kind in enumerate(KINDS):
            values = [v for model, v in row["share"].items() if model[8:-2] == kind]
            if not values:
                continue
            share = sum(values) / len(values)
            x, true = left + j * width, kind in TRUE[row["question"]]
            colour = "31,119,180" if true else "214,39,40"
            ink = "#fff" if share > 0.55 else "#222"
            frame = "#111" if true else "#ccc"
            rows.append(
                f'<rect x="{x + 2}" y="{y + 2}" width="{width - 4}" height="{height - 4}" '
                f'fill="rgba({colour},{max(share, 0.02):.2f})" stroke="{frame}" '
                f'stroke-width="{2 if true else 1}"/>'
                f'<text x="{x + width / 2}" y="{y + 17}" text-anchor="middle" fill="{ink}">'
                f"{' / '.join(f'{v:.0%}' for v in values)}</text>"
            )
    heads = "".join(
        f'<text x="{left + (j + 0.5) * width}" y="{top - 8}" text-anchor="middle" '
        f'font-weight="bold">{kind}</text>'
        for j, kind in enumerate(KINDS)
    )
    total = top + len(tools) * height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 5 * width + 10} {total}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="8" y="16">Share of facts of which '
        "the tool says yes at the planted place (seed 0 / seed 1). Framed and blue: yes is true; "
        f"red: a false alarm.</text>{heads}{''.join(rows)}</svg>\n"
    )


def _ci(values: list[float] | None) -> str:
    return "-" if values is None else "{:.0%} [{:.0%}, {:.0%}]".format(*values[:3])


def tools_table(found: dict[str, Any]) -> str:
    """Tool, question, power, false alarms, verdicts, localisation, cost."""
    rows = []
    for name, row in found["tools"].items():
        errors = row["layer_error"]
        known = [e for e in errors if e is not None]
        missed = f", none in {len(errors) - len(known)}" if len(known) < len(errors) else ""
        rows.append(
            [
                name,
                f"is it {row['question']}?",
                _ci(row["power"]),
                "{} of {}".format(*row["found"]),
                _ci(row["false_alarms"]),
                "{} of {}".format(*row["cried_wolf"]),
                (f"{sum(known) / len(known):.1f}" if known else "-") + missed,
                "{} of {}".format(*row["role_right"]) if row["role_right"][1] else "-",
                row["n"],
                f"{row['seconds']:.1f}",
            ]
        )
    columns = [
        "tool", "question", "power", "models found", "false alarms", "models cried wolf",
        "layer error (blocks)", "role right", "n", "s / model",
    ]  # fmt: skip
    return table(columns, rows)


def creme_table(found: dict[str, Any]) -> str:
    """CREME by model and split."""
    rows = [
        [
            model,
            split,
            _ci(value["corrected"]),
            value["corrected"][3],
            _ci(value["kept"]),
            " ".join(map(str, splits["layers"])),
            splits["strength"],
        ]
        for model, splits in found["creme"].items()
        for split, value in splits.items()
        if isinstance(value, dict)
    ]
    columns = [
        "model",
        "failed questions",
        "corrected",
        "n",
        "unrelated kept",
        "blocks",
        "strength",
    ]
    return table(columns, rows)


def natural_table(found: dict[str, Any]) -> str:
    """The highest share over blocks at each role, for models whose mechanism nobody knows."""
    models = sorted({m for row in found["tools"].values() for m in row["natural"]})
    rows = []
    for name, row in found["tools"].items():
        cells = []
        for model in models:
            for role in row["natural"].get(model, [[], []]):
                if not role:
                    cells.append("-")
                    continue
                best = max(range(len(role)), key=lambda i: role[i] if role[i] == role[i] else -1)
                cells.append(f"{role[best]:.0%} (after {best})")
        rows.append([name, *cells])
    columns = [f"{model}, {role}" for model in models for role in ("first hop", "last")]
    return table(["tool", *columns], rows) if models else "Not measured."


def _natural(found: dict[str, Any]) -> str:
    if not any(row["natural"] for row in found["tools"].values()):
        return ""
    return f"""## Models whose mechanism was not planted

The bundled `hops-*` were trained on answers alone, `apposed-*` on texts that
[name the bridge](appositions.md), which they spell and use. The highest share of facts over all blocks, and after
which block:

{natural_table(found)}
"""


def _share(found: dict[str, Any], tool: str, kind: str) -> str:
    values = [v for m, v in found["tools"][tool]["share"].items() if m[8:-2] == kind]
    return " and ".join(f"{v:.0%}" for v in values) or "(not measured)"


def _corrected(found: dict[str, Any], kind: str) -> str:
    cells = [
        "{:.0%} [{:.0%}, {:.0%}] of {:d} ({}, {})".format(*value["corrected"], model, split)
        for model, splits in found["creme"].items()
        if model[8:-2] == kind
        for split, value in splits.items()
        if isinstance(value, dict)
    ]
    return "; ".join(cells)


def body(found: dict[str, Any]) -> str:
    """The page."""
    rules = "\n".join(
        f"- **{name}** (is it {row['question']}?). {row['rule']}"
        for name, row in found["tools"].items()
    )
    models = ", ".join(f"`{name}`" for name in found["models"])
    return f"""Tools that read states or change them are run on small models whose mechanism is known, because it was
trained in (see [planted models](../methods/planted.md)): {models}. Each tool is asked, fact by fact, *is the bridge
here?* at the planted place, and is right or wrong.

![Share of facts with a yes, by tool and kind of model](../images/ground-truth.svg)

## What to trust when

{tools_table(found)}

*Power*: share of facts with a yes where yes is true. *False alarms*: share with a yes where no is true. Intervals resample the
seeds of a kind (where there are two), and facts within a model; they are rough, and say nothing about
other kinds of planted models. A model is *found* (or has *cried wolf*) if the tool says yes for at least half of
its facts. *Layer error* and *role right* (is the highest share at the planted role?) are over the models whose true
answer is yes. Tools that swap whole states are not scored on the role, because all the information sits first in one
role's state and later in the other's. This criterion was dropped for them after their results had been seen (for
attention knockout, which cuts whole states off, before).

## Does a rising bridge in the lens mean use?

No. In `decoy` the bridge is the lens's first token in {_share(found, "logit lens", "decoy")} of the
questions, as it is in {_share(found, "logit lens", "serial")} of those of `serial`, and swapping the
state changes none of the answers. What tells the two apart is a change of the state: erasing the bridge
says yes in {_share(found, "erasure, exact", "decoy")} of the decoys' facts and in
{_share(found, "erasure, exact", "serial")} of the serial models'. Nor does a flat lens mean that there is no
use: in the hidden models it says yes in {_share(found, "logit lens", "hidden")}, and erasure, which removes
what the unembedding reads, in {_share(found, "erasure, exact", "hidden")}; patching in
{_share(found, "activation patching", "hidden")}, a probe in {_share(found, "probe", "hidden")}.

## Does CREME also correct models without a bridge to repair?

In `decoy` and `shortcut` the answers are stored for pairs and nothing uses the bridge, so there is no
implicit result that an edit could correct. Of failed questions that its settings were not chosen on, CREME corrects
{_corrected(found, "decoy") or "(not measured)"} in `decoy`,
{_corrected(found, "shortcut") or "(no such model measured)"} in `shortcut`, and
{_corrected(found, "serial")} in `serial`. {_creme_verdict(found)}

{creme_table(found)}

Blocks and strength are those that correct and keep most on the other half of the failed questions.
`stored_wrong`: a wrong answer was trained; `not_stored`: none was; `first_unseen`: the first fact is in no
trained composition, so the bridge does not get to its place.

{_natural(found)}
## Rules

Stated in `benchmarks/ground_truth_tools.py` before the models were asked (two were changed after a trial
on two models, as that file says).

{rules}

## Limits

Small models, one-word names, one template order; the planted mechanisms are cleaner than anything that training on
text produces. A linear probe (and so the tuned lens) reads the bridge in earlier blocks than the planted one: the
strict training does not constrain what else a state holds, and a first hop that is computed early and
written later is still computed early. So a probe's layer error is not the probe's fault. Seconds
were taken on a machine that did other work as well. Attention knockout takes the whole token away, with whatever
else it holds. Sparse autoencoders and path patching were not tested.
"""


def _creme_verdict(found: dict[str, Any]) -> str:
    def mean(*kinds: str) -> float:
        values = [
            value["corrected"][0]
            for model, splits in found["creme"].items()
            if model[8:-2] in kinds
            for value in splits.values()
            if isinstance(value, dict)
        ]
        return sum(values) / len(values) if values else float("nan")

    without, with_ = mean("shortcut", "decoy"), mean("serial", "serial-last", "hidden")
    if without >= 0.5:
        return (
            f"On average it is {without:.0%} in models that do not use the bridge and {with_:.0%} in those that do: "
            "**a correction by CREME is no evidence that a bridge was there and failed.**"
        )
    return f"On average it is {without:.0%} in models that do not use the bridge and {with_:.0%} in those that do."
