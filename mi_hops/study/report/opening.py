"""How a report begins: which model, which world, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mi_hops.reasoning.gap import Gap
from mi_hops.study.parts import Table
from mi_hops.study.study import Study
from mi_hops.worlds import Hopland

#: Questions that the head of the page shows.
_EXAMPLES = 4

_REAL = {
    "geo.json.gz": "The facts are of the real world: countries, cities, airports, states and chemical "
    "elements."
}


@dataclass(frozen=True)
class Opening:
    """The head of a report: two sentences, and questions with their answers."""

    model: str
    world: str
    examples: Table | None


def opening(study: Study) -> Opening:
    """What a reader has to know before the first number."""
    gap: Any = study.result("gap")
    model, world = _model(study.settings), _world(study.settings, gap)
    return Opening(model, world, None if gap is None else _asked(gap))


def made_up(gap: Gap) -> bool:
    """Whether all facts are of `Hopland`, whose names and facts exist nowhere else."""
    relations = {relation.name for relation in Hopland().relations}
    found = {name for fact in gap.facts for name in (fact.relation1, fact.relation2)}
    return bool(found) and found <= relations


def _model(settings: Mapping[str, Any]) -> str:
    name, shape = settings["model"], settings.get("shape")
    if not shape:
        return f"The model studied is {name}."
    heads = f"{shape['heads']} attention heads"
    return (
        f"The model studied is {name}: {shape['layers']} layers of {heads}, {shape['width']:,} wide, with "
        f"a vocabulary of {shape['vocabulary']:,} tokens."
    )


def _world(settings: Mapping[str, Any], gap: Gap | None) -> str:
    if gap is not None and made_up(gap):
        return (
            "The facts are of Hopland, a made-up world: its people, works, companies, cities and "
            "countries exist nowhere else, so the model knows of them what it was trained on and "
            "nothing more."
        )
    file = settings["facts"]["file"]
    return _REAL.get(str(file), f"The facts come from {file}." if file else "The facts were given.")


def _asked(gap: Gap) -> Table | None:
    """Questions of both hops known, answered and failed in turn; others where there are none."""
    frame = gap.frame
    if not len(frame):
        return None
    known = frame["first"] & frame["second"]
    turn = frame.groupby([known, frame["two_hop"]]).cumcount()
    order = frame.assign(known=known, turn=turn)
    order = order.sort_values(["known", "turn", "two_hop"], ascending=[False, True, False])
    rows = []
    for i in order.index[:_EXAMPLES]:
        fact, asked = gap.facts[i], frame.loc[i]
        question = fact.prompt(gap.form).rpartition("\n")[2]
        said = str(asked["said"]) or "(nothing)"
        verdict = "✓" if asked["two_hop"] else "✗"
        if not asked["two_hop"] and asked["says_bridge"]:
            verdict += " (the bridge)"
        rows.append([f"{question} …", fact.bridge, fact.answer, f"{said} {verdict}"])
    return Table(
        "What is asked",
        ("two-hop question", "its bridge", "its answer", "the model says"),
        rows,
        texts=4,
        note="The first questions of this study whose two hops the model answers one by one, "
        "answered and failed in turn; where there are none, others.",
    )
