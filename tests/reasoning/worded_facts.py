"""Facts of Hopland in two wordings, to choose from."""

from __future__ import annotations

from dataclasses import replace

from mi_hops.facts import Facts, WordedRelation
from mi_hops.worlds.hopland import Hopland


def worded_facts() -> Facts:
    """Facts of Hopland whose relations also come in a wording that does not say which relation it is."""
    world = Hopland()
    facts = world.two_hop_facts("seen_parts")
    names = {r for fact in facts for r in (fact.relation1, fact.relation2)}
    relations = {}
    for relation in world.relations:
        if relation.name in names:
            good = relation.wording
            relations[relation.name] = WordedRelation(
                relation.name,
                relation.domain,
                relation.range,
                nouns=(("the thing of [X]", "is"), (good.noun, good.verb)),
                statements=("[X] has", good.statement),
                questions=(good.question,),
            )
    marked = tuple(
        replace(fact, split="choosing" if i % 2 else "reported") for i, fact in enumerate(facts)
    )
    return Facts(marked, "made", len(marked), relations=relations)
