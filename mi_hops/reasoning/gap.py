"""The compositionality gap: which two-hop questions fail although both hops are known.

Source: arXiv 2402.14328, section 3 of its paper and its released inference code; decoding here is
greedy, so the classification is reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep.generate import Answered, answered
from mi_hops.text.matching import STOP, matches

if TYPE_CHECKING:
    import pandas as pd

HOPS = ("first", "second", "two_hop")


@dataclass(frozen=True)
class Gap:
    """Who was answered.

    Attributes:
        facts: the facts asked, in order.
        frame: one row a fact: ``id``, ``split``, ``first``, ``second``, ``two_hop`` (answered
            rightly: greedily, the whole answer and its end, aliases allowed),
            ``first_token`` (the two-hop answer's first token is right), ``said`` (the two-hop
            answer given) and ``says_bridge`` (it is the bridge).
        skipped: (id, reason) of facts that could not be asked.
    """

    facts: tuple[TwoHopFact, ...]
    frame: pd.DataFrame
    skipped: tuple[tuple[str, str], ...] = ()

    def _where(self, two_hop: bool) -> list[TwoHopFact]:
        f = self.frame
        chosen = f["first"] & f["second"] & (f["two_hop"] == two_hop)
        return [fact for fact, keep in zip(self.facts, chosen, strict=True) if keep]

    @property
    def passed(self) -> list[TwoHopFact]:
        """Both hops known and the two-hop question answered."""
        return self._where(True)

    @property
    def failed(self) -> list[TwoHopFact]:
        """Both hops known, the two-hop question not answered: the gap."""
        return self._where(False)

    @property
    def gap(self) -> tuple[float, float, float]:
        """Failed / (failed + passed) with its exact 95% interval; NaN where no pair is known."""
        failed, total = len(self.failed), len(self.failed) + len(self.passed)
        if not total:
            return float("nan"), float("nan"), float("nan")
        return failed / total, *proportion_ci(failed, total)

    def table(self) -> pd.DataFrame:
        """The 2 x 2 x 2 table: n of each combination of (first, second, two_hop) answered.

        ``says_bridge`` counts those whose two-hop answer is the bridge.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product([[True, False]] * 3, names=list(HOPS))
        counts = self.frame.groupby(list(HOPS))["says_bridge"].agg(n="size", says_bridge="sum")
        return counts.reindex(index, fill_value=0).astype(int).reset_index()

    def by_split(self) -> pd.DataFrame:
        """Per split: n, shares answered of each hop and of the two-hop question, with intervals."""
        import pandas as pd

        rows = []
        for split, part in self.frame.groupby("split", sort=False):
            row: dict[str, object] = {"split": split, "n": len(part)}
            for hop in HOPS:
                right = int(part[hop].sum())
                low, high = proportion_ci(right, len(part))
                row |= {hop: right / len(part), f"{hop}_low": low, f"{hop}_high": high}
            row["first_token"] = float(part["first_token"].mean())
            known = part[part["first"] & part["second"]]
            row |= {"n_known": len(known), "n_failed": int((~known["two_hop"]).sum())}
            rows.append(row)
        return pd.DataFrame(rows)


def find_gap(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 6,
    stop: Sequence[str] = STOP,
) -> Gap:
    """Ask all three questions of each fact greedily and tell which facts fall into the gap.

    Args:
        form: template order of all three prompts; default each fact's first. A hop that lacks the
            form is asked in the first form it has.
        stop: strings that end an answer; see `generate.matches`.

    A fact without a first-hop or second-hop prompt, or without the asked form of the two-hop
    prompt, is skipped, with its reason.

    Raises:
        ValueError: no facts.
    """
    import pandas as pd

    if not facts:
        raise ValueError("no facts to ask; load some with load_facts")
    asked, skipped = [], []
    for fact in facts:
        reason = _unaskable(fact, form)
        if reason:
            skipped.append((fact.id, reason))
        else:
            asked.append(fact)
    questions = {
        "first": [(hop_prompt(f.first_prompts, form), f.bridge, f.bridge_aliases) for f in asked],
        "second": [(hop_prompt(f.second_prompts, form), f.answer, f.answer_aliases) for f in asked],
        "two_hop": [(f.prompt(form), f.answer, f.answer_aliases) for f in asked],
    }
    found = {
        hop: _ask(model, items, batch_size=batch_size, max_new_tokens=max_new_tokens, stop=stop)
        for hop, items in questions.items()
    }
    frame = pd.DataFrame(
        {
            "id": [f.id for f in asked],
            "split": [f.split for f in asked],
            **{hop: [a.right for a in found[hop]] for hop in HOPS},
            "first_token": [a.first_token for a in found["two_hop"]],
            "said": [a.text for a in found["two_hop"]],
            "says_bridge": [
                matches(a.text, f.bridge, f.bridge_aliases, stop=stop)
                for a, f in zip(found["two_hop"], asked, strict=True)
            ],
        }
    )
    return Gap(tuple(asked), frame, tuple(skipped))


def hop_prompt(prompts: Mapping[str, str], form: str | None) -> str:
    """The prompt of a form, or the first there is."""
    return prompts[form] if form is not None and form in prompts else next(iter(prompts.values()))


def _unaskable(fact: TwoHopFact, form: str | None) -> str:
    if not fact.first_prompts:
        return "no first-hop prompt"
    if not fact.second_prompts:
        return "no second-hop prompt"
    if form is not None and form not in fact.prompts:
        return f"no two-hop prompt of form {form!r}"
    return ""


def _ask(
    model: HookedModel, items: Sequence[tuple[str, str, tuple[str, ...]]], **options: object
) -> list[Answered]:
    """Answers to (prompt, answer, aliases); equal ones are asked once (hops are shared)."""
    distinct = list(dict.fromkeys(items))
    prompts, answers, aliases = zip(*distinct, strict=True) if distinct else ((), (), ())
    given = answered(model, list(prompts), list(answers), list(aliases), **options)  # type: ignore[arg-type]
    known = dict(zip(distinct, given, strict=True))
    return [known[item] for item in items]
