"""Two-hop facts over the tiny models' words, with answers that a random model gives or not."""

from __future__ import annotations

from mi_hops.facts.fact import TwoHopFact
from mi_hops.reasoning import gap as gap_module
from mi_hops.study import Sizes
from mi_hops.study.steps import gap as gap_step
from mi_hops.sweep.generate import Answered, generate

#: Of a study of these facts.
SIZES = Sizes(
    lens=4, tuned=3, erasure=3, locate=3, injection=4, edits=4, draws=1, strengths=(1.0, 4.0)
)


def tiny_fact(first_hop, prompt):
    """One fact in one form, about w5 by way of w20."""
    return TwoHopFact(
        id="f",
        subject="w5",
        relation1="r",
        bridge="w20",
        relation2="q",
        answer="w40",
        first_hop=first_hop,
        prompts={"suffix": prompt},
    )


def tiny_facts(model, n=6):
    """`n` facts; the model's own greedy first words are the answers of the even ones."""
    facts = []
    for i in range(n):
        subject, bridge = f"w{20 + i} w{30 + i}", f"w{40 + i}"
        hop, second = f"w10 {subject}", {"suffix": f"w11 w12 {bridge} w13"}
        two_hop = {"suffix": f"w11 w12 {hop} w13", "prefix": f"{hop} w14 w15"}
        said = generate(model, [second["suffix"]], max_new_tokens=1)[0].text
        answer = said if i % 2 == 0 and said not in ("", bridge) else f"w{60 + i} w{70 + i}"
        facts.append(
            TwoHopFact(
                id=str(i),
                subject=subject,
                relation1="r1",
                bridge=bridge,
                relation2="r2",
                answer=answer,
                first_hop=hop,
                prompts=two_hop,
                first_prompts={"suffix": f"{hop} w13"},
                second_prompts={**second, "prefix": f"{bridge} w14 w15"},
                split="tiny",
            )
        )
    return facts


def dictate(monkeypatch, instead):
    """Every question of a gap is answered correctly, but for the prompts that have a text instead."""

    def told(model, prompts, answers, aliases, **options):
        return [
            Answered(instead.get(p, a), p not in instead, False, p not in instead, 1, 0.5)
            for p, a in zip(prompts, answers, strict=True)
        ]

    monkeypatch.setattr(gap_module, "answered", told)


def set_outcomes(gap, two_hop):
    """The gap with both hops of every fact known, and these two-hop questions answered."""
    gap.data["answer"][:] = 1.0
    gap.data["answer"].loc[{"asked": "two_hop"}] = [
        [float(answer)] * gap.data.sizes["form"] for answer in two_hop
    ]
    return gap


def dictated(monkeypatch):
    """In a study, both hops of every fact are known and every other question is answered."""
    real = gap_step.find_gap

    def find_gap(model, facts, **options):
        found = real(model, facts, **options)
        return set_outcomes(found, [i % 2 == 0 for i in range(found.data.sizes["example"])])

    monkeypatch.setattr(gap_step, "find_gap", find_gap)
