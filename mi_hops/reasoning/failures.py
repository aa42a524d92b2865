"""How a two-hop question failed: the CREME paper's failure types, told by a stated rule.

The paper (arXiv 2402.14328) names short-cut, incomplete, distorted and hasty reasoning and assigned
them by hand. Here the first of these rules that holds decides:

1. ``incomplete``: the answer given is the bridge; the model stopped at the first hop.
2. ``short-cut``: the same answer comes when the subject itself stands in for the first hop ("The
   nationality of *Misery* is"); a surface link between subject and second relation answered.
3. ``distorted``: the bridge never rises in the lens: its probability, largest over blocks, at the
   first hop's last token and at the last token, stays below `faint` of its median peak over the
   questions answered rightly. It is the mean probability of all the bridge's tokens, the papers'
   score: names share first tokens, and one may show by any of its words.
4. ``hasty``: the answer given (its first token, which is what the last position is to say) reads at
   half of its final probability at the last token no later than the layer at which the bridge
   peaks; the answer was chosen before the bridge was there.
5. ``other``: none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens import Readout, logit_lens
from mi_hops.model import HookedModel
from mi_hops.reasoning.gap import Gap
from mi_hops.sweep.generate import generate
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import Prompt, TokenError, answer_ids, encode, find_text, last_position

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

TYPES = ("incomplete", "short-cut", "distorted", "hasty", "other")


def failure_types(
    model: HookedModel,
    gap: Gap,
    *,
    form: str | None = None,
    faint: float = 0.25,
    limit: int | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """The type of each failure of a gap.

    Args:
        form: template order, the one `gap` was found with.
        faint: share of the passed questions' median bridge peak under which a bridge counts as
            absent. Without a passed question rule 3 cannot be applied and is left out.
        limit: look at the first so many failures (and as many passed questions) only.

    Returns:
        One row a failure: ``id``, ``said``, ``type``, ``bridge_peak`` (probability),
        ``bridge_layer`` and ``said_layer`` (blocks passed), ``said_for_subject`` (the answer when
        the subject stands in for the first hop). A failure whose answer cannot be tracked (empty
        text) is ``other``. Failures that the lens cannot read (a first hop or a name that is not to
        be found or tokenised in the prompt) have no row; ``frame.attrs["skipped"]`` lists their ids
        and the reasons.
    """
    import numpy as np
    import pandas as pd

    said = dict(zip(gap.frame["id"], gap.frame["said"], strict=True))
    failed, skipped = _cases(
        model, gap.failed[:limit], lambda f: said[f.id].strip() or f.answer, form
    )
    passed, _ = _cases(model, gap.passed[:limit], lambda f: f.answer, form)
    columns = ["id", "said", "type", "bridge_peak", "bridge_layer", "said_layer"]
    if not failed:
        empty = pd.DataFrame(columns=[*columns, "said_for_subject"])
        empty.attrs["skipped"] = skipped
        return empty
    threshold = 0.0
    if passed:
        peaks, _, _ = _read(model, passed, batch_size)
        threshold = faint * float(np.median(peaks))
    peak, bridge_layer, said_layer = _read(model, failed, batch_size)
    shortcut = _without_first_hop(model, failed, batch_size)
    rows = []
    for i, fact in enumerate(case.fact for case in failed):
        answer = said[fact.id]
        if matches(answer, fact.bridge, fact.bridge_aliases):
            kind = "incomplete"
        elif answer.strip() and normalise(answer) == normalise(shortcut[i]):
            kind = "short-cut"
        elif peak[i] < threshold:
            kind = "distorted"
        elif answer.strip() and said_layer[i] <= bridge_layer[i]:
            kind = "hasty"
        else:
            kind = "other"
        rows.append((fact.id, answer, kind, peak[i], bridge_layer[i], said_layer[i], shortcut[i]))
    frame = pd.DataFrame(rows, columns=[*columns, "said_for_subject"])
    frame.attrs["skipped"] = skipped
    return frame


@dataclass(frozen=True)
class _Case:
    """A question as the lens reads it, with the tokens to follow."""

    fact: TwoHopFact
    prompt: Prompt
    first_hop: int
    bridge: tuple[int, ...]
    answer: tuple[int, ...]


def _cases(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    answer_of: Callable[[TwoHopFact], str],
    form: str | None,
) -> tuple[list[_Case], list[tuple[str, str]]]:
    """Facts that the lens can read, and (id, reason) of the others."""
    cases, skipped = [], []
    for fact in facts:
        try:
            prompt = encode(model, fact.prompt(form))
            place = last_position(prompt, fact.first_hop)
            bridge, answer = (
                answer_ids(model, prompt, name) for name in (fact.bridge, answer_of(fact))
            )
        except TokenError as error:
            skipped.append((fact.id, str(error)))
            continue
        cases.append(_Case(fact, prompt, place, bridge, answer))
    return cases, skipped


def _read(
    model: HookedModel, cases: Sequence[_Case], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bridge's peak, its layer, layer at which the answer has half of its final probability).

    The bridge by the mean over its tokens, the answer by its first.
    """
    result = logit_lens(
        model,
        [case.prompt for case in cases],
        track={"bridge": [c.bridge for c in cases], "answer": [c.answer for c in cases]},
        positions={"first hop": [case.first_hop for case in cases], "last": -1},
        readout=Readout(kl=False),
        batch_size=batch_size,
    )
    # Layer 0 is the embedding: the prompt's own token, not yet anything recalled.
    recalled = result["mean_token_prob"].sel(tracked="bridge").isel(layer=slice(1, None))
    bridge = recalled.max("position").transpose("example", "layer").values
    told = result["prob"].sel(tracked="answer", position="last")
    answer = told.transpose("example", "layer").values
    layers = told["layer"].values
    reached = answer >= 0.5 * answer[:, -1:]
    return bridge.max(1), layers[1 + bridge.argmax(1)], layers[reached.argmax(1)]


def _without_first_hop(model: HookedModel, cases: Sequence[_Case], batch_size: int) -> list[str]:
    """What the model says when the subject takes the place of the first hop; "" if it cannot."""
    texts: list[str] = []
    for case in cases:
        text, fact = case.prompt.text, case.fact
        start, end = find_text(text, fact.first_hop)
        texts.append(text[:start] + fact.subject + text[end:] if fact.subject else "")
    asked = [i for i, t in enumerate(texts) if t and t != cases[i].prompt.text]
    said = generate(model, [encode(model, texts[i]) for i in asked], batch_size=batch_size)
    found = dict(zip(asked, (g.text for g in said), strict=True))
    return [found.get(i, "") for i in range(len(cases))]
