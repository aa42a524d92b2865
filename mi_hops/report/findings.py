"""What was found, in one plain sentence a step, from the study's summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mi_hops.facts.unusable import describe_reasons
from mi_hops.report.parts import cell_place, figures, layers
from mi_hops.study.summary import largest_cost

_PLACES = {"first hop": "the first hop's last token", "last": "the last token"}


@dataclass(frozen=True)
class Finding:
    """A number, its interval and n, what it says, and the section that shows it."""

    value: str
    spread: str
    text: str
    section: str


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """The headlines, in the study's order; steps without a result say why."""
    found = list(_gap(summary["gap"], summary["left_out"].get("gap", {})))
    makers = {"lens": _lens, "erasure": _erasure, "locate": _locate, "injection": _injection,
              "editing": _editing}  # fmt: skip
    for step, make in makers.items():
        entry = summary[step]
        if "skipped" in entry:
            found.append(Finding("left out", "", f"{_TITLES[step]}: {entry['skipped']}.", step))
        else:
            found += make(entry)
    return found


_TITLES = {
    "lens": "The logit lens",
    "erasure": "Erasing the bridge",
    "locate": "Locating the second hop",
    "injection": "Memory injection",
    "editing": "CREME",
}


def _gap(gap: Mapping[str, Any], left_out: Mapping[str, int]) -> Iterator[Finding]:
    form, main = next(iter(gap["forms"].items()))
    known = main["gap"]["n"]
    if not known:
        facts = main["two_hop"]["n"]
        if not facts:
            yield Finding(
                "none asked", f"n = {sum(left_out.values())} facts",
                f"None of these facts can be asked about both hops ({describe_reasons(left_out)}).",
                "gap",
            )  # fmt: skip
            return
        yield Finding(
            f"0 of {facts}", f"n = {facts} facts",
            "The model knows both hops of none of these facts, so nothing can be said about how it "
            "combines them.", "gap",
        )  # fmt: skip
        return
    yield _share(
        main["gap"],
        f"of the two-hop questions whose hops the model both knows are failed ({form} form).",
        "gap",
    )
    if gap["failed"]:
        yield _share(
            gap["failed_saying_bridge"],
            "of these failures answer with the bridge: the model stops at the first hop.",
            "gap",
        )


def _lens(lens: Mapping[str, Any]) -> list[Finding]:
    best = [
        (place, entry["passed_minus_failed"])
        for place, entry in lens.items()
        if "passed_minus_failed" in entry
    ]
    if not best:
        return []
    place, entry = max(best, key=lambda item: item[1]["on_choosing_half"])
    clear = _clear(entry)
    words = {1: "more bridge", -1: "less bridge", 0: "no clearly different bridge"}[clear]
    return [
        _value(
            entry,
            f"mean probability of the bridge's tokens in the lens at {_PLACES.get(place, place)} after "
            f"{entry['layer']} blocks, answered rightly minus failed: {words} where the question is "
            "answered rightly. (Layer and position chosen on the other half of the questions.)",
            "lens",
        )
    ]


def _erasure(erasure: Mapping[str, Any]) -> list[Finding]:
    name, entry = largest_cost(erasure)
    variant, place = name.split(", ", 1)
    change = entry["bridge_minus_control"]
    verdict = {
        -1: "The answer rests on the bridge there.",
        0: "That is no clear difference.",
        1: "There the control costs more.",
    }[_clear(change)]
    return [
        _value(
            change,
            f"change of P(answer) by erasing the bridge at {_PLACES.get(place, place)}, layer "
            f"{entry['layer']} ({variant} form), beyond what erasing another entity does. {verdict} "
            "(Layer, position and form are those with the largest cost on the other half of the "
            "questions.)",
            "erasure",
        )
    ]


def _locate(locate: Mapping[str, Any]) -> list[Finding]:
    located = locate["located_layers"]
    if not located:
        text = "No layer's attention output, taken from the second hop, raises the answer."
        return [Finding("none", f"n = {locate['clean']['n']}", text, "locate")]
    return [
        Finding(
            layers(located).replace(" to ", "–"), f"n = {locate['clean']['n']}",
            "hold the second hop: their attention output at the last token, taken from the second "
            "hop by itself, raises the answer of failed questions most.", "locate",
        )
    ]  # fmt: skip


def _injection(injection: Mapping[str, Any]) -> list[Finding]:
    cell, memories = injection["cell"], injection["memories"]
    text = (
        f"of failed questions get the right first token when the bridge is injected at "
        f"{cell_place(cell)} with strength {cell['strength']:g}"
    )
    other = memories.get("permuted_bridge")
    if other is not None:
        share = other["right"]
        clear = _clear(other["bridge_minus_this"]) > 0
        text += (
            f"; another fact's bridge gives {share['value']:.1%} [{100 * share['low']:.1f}, "
            f"{100 * share['high']:.1f}], a difference that is {'' if clear else 'not '}clear of zero"
        )
    return [_share(memories["bridge"]["right"], f"{text}.", "injection")]


def _editing(editing: Mapping[str, Any]) -> list[Finding]:
    found = []
    for repair, sets in editing["scores"].items():
        first = sets.get("correction", {}).get("first_correct_after")
        if first is None or first["value"] is None:
            continue
        chosen = editing["choices"]["chosen"][repair]
        where = f"{layers(chosen['layers'])} at strength {chosen['strength']:g}"
        text = f"of failed questions get the right first token by {repair} on {where}"
        whole = sets["correction"].get("exact_match_after")
        if whole is not None and whole["value"] is not None:
            text += f"; the whole answer: {_words(whole)}"
        kept = sets.get("specificity", {}).get("exact_match_ratio")
        if kept is not None and kept["value"] is not None:
            text += f"; unrelated questions keep {_words(kept)} of their accuracy"
        found.append(_share(first, f"{text}.", "editing"))
    return found


def _clear(estimate: Mapping[str, Any]) -> int:
    """1 or -1 where the interval lies above or below zero, else 0."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return 0
    return int(low > 0) - int(high < 0)


def _words(share: Mapping[str, Any]) -> str:
    if share["low"] is None or share["high"] is None:
        return f"{share['value']:.1%} (n = {share['n']})"
    return (f"{share['value']:.1%} [{100 * share['low']:.1f}, {100 * share['high']:.1f}] "
            f"(n = {share['n']})")  # fmt: skip


def _share(share: Mapping[str, Any], text: str, section: str) -> Finding:
    if share["value"] is None:
        return Finding("no case", "", text, section)
    spread = f"n = {share['n']}"
    if share["low"] is not None and share["high"] is not None:
        spread = f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}], {spread}"
    return Finding(f"{share['value']:.1%}", spread, text, section)


def _value(estimate: Mapping[str, Any], text: str, section: str) -> Finding:
    spread = f"n = {estimate['n']}"
    if "n_other" in estimate:
        spread += f" and {estimate['n_other']}"
    if estimate["low"] is not None and estimate["high"] is not None:
        ends = (figures(estimate[end], signed=True) for end in ("low", "high"))
        spread = f"[{', '.join(ends)}], {spread}"
    return Finding(figures(estimate["value"], signed=True), spread, text, section)
