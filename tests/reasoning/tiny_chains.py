"""Chains of three hops over the tiny models' words."""

from __future__ import annotations

from mi_hops.facts import Hop, TwoHopFact


def tiny_chain(i, answer, *, phrases=True, split="tiny"):
    """Subject -> two bridges -> `answer`; every question has words of its own."""
    subject, first, second = f"w{20 + i} w{30 + i}", f"w{40 + i}", f"w{50 + i}"
    near, far = f"w10 {subject}", f"w11 w10 {subject}"
    return TwoHopFact.from_hops(
        [
            Hop(
                relation="r1",
                object=first,
                phrase=near if phrases else "w80 w80",
                prompts={"suffix": f"{near} w13"},
            ),
            Hop(relation="r2", object=second, phrase=far, prompts={"suffix": f"w11 {first} w13"}),
            Hop(relation="r3", object=answer, prompts={"suffix": f"w12 {second} w13"}),
        ],
        id=f"chain {i}",
        subject=subject,
        prompts={"suffix": f"w12 {far} w13", "prefix": f"w14 {far} w15"},
        split=split,
    )


def tiny_chains(n=4):
    """Some with answers of two words."""
    return [tiny_chain(i, f"w{60 + i} w{70 + i}" if i % 2 else f"w{60 + i}") for i in range(n)]
