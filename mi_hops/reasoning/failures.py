"""How a two-hop question failed: the CREME paper's failure types, told by a stated rule.

The paper (arXiv 2402.14328) names short-cut, incomplete, distorted and hasty reasoning and assigned
them by hand. Here the first of these rules that holds decides:

1. ``incomplete``: the answer given is the bridge; the model stopped at the first hop.
2. ``short-cut``: the same answer comes when the subject itself stands in for the first hop ("The
   nationality of *Misery* is"); a surface link between subject and second relation answered.
3. ``distorted``: the bridge never rises in the lens: its probability, largest over blocks, at the
   first hop's last token and at the last token, stays below `faint` of its median peak over the
   questions answered rightly.
4. ``hasty``: the answer given reads at half of its final probability at the last token no later
   than the layer at which the bridge peaks; the answer was chosen before the bridge was there.
5. ``other``: none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mi_hops.facts.fact import TwoHopFact
from mi_hops.generate import generate, matches, normalise
from mi_hops.lens.logit import logit_lens
from mi_hops.model import LensModel
from mi_hops.reasoning.gap import Gap
from mi_hops.tokens import TokenError, encode, find_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

TYPES = ("incomplete", "short-cut", "distorted", "hasty", "other")


def failure_types(
    model: LensModel,
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
        text) is ``other``.
    """
    import numpy as np
    import pandas as pd

    said = dict(zip(gap.frame["id"], gap.frame["said"], strict=True))
    failed, passed = gap.failed[:limit], gap.passed[:limit]
    columns = ["id", "said", "type", "bridge_peak", "bridge_layer", "said_layer"]
    if not failed:
        return pd.DataFrame(columns=[*columns, "said_for_subject"])
    threshold = 0.0
    if passed:
        peaks, _, _ = _read(model, passed, [f.answer for f in passed], form, batch_size)
        threshold = faint * float(np.median(peaks))
    tracked = [said[f.id].strip() or f.answer for f in failed]
    peak, bridge_layer, said_layer = _read(model, failed, tracked, form, batch_size)
    shortcut = _without_first_hop(model, failed, form, batch_size)
    rows = []
    for i, fact in enumerate(failed):
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
    return pd.DataFrame(rows, columns=[*columns, "said_for_subject"])


def _read(
    model: LensModel,
    facts: Sequence[TwoHopFact],
    answers: Sequence[str],
    form: str | None,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bridge's peak, its layer, layer at which the answer has half of its final probability)."""
    result = logit_lens(
        model,
        [fact.prompt(form) for fact in facts],
        track={"bridge": [f.bridge for f in facts], "answer": list(answers)},
        positions={"first hop": [f.first_hop for f in facts], "last": -1},
        compare_output=False,
        batch_size=batch_size,
    )
    prob = result["prob"].transpose("example", "tracked", "position", "layer")
    # Layer 0 is the embedding: the prompt's own token, not yet anything recalled.
    bridge = prob.sel(tracked="bridge").isel(layer=slice(1, None)).max("position").values
    answer = prob.sel(tracked="answer", position="last").values
    layers = prob["layer"].values
    reached = answer >= 0.5 * answer[:, -1:]
    return bridge.max(1), layers[1 + bridge.argmax(1)], layers[reached.argmax(1)]


def _without_first_hop(
    model: LensModel, facts: Sequence[TwoHopFact], form: str | None, batch_size: int
) -> list[str]:
    """What the model says when the subject takes the place of the first hop; "" if it cannot."""
    texts: list[str] = []
    for fact in facts:
        prompt = fact.prompt(form)
        try:
            start, end = find_text(prompt, fact.first_hop)
        except TokenError:
            texts.append("")
            continue
        texts.append(prompt[:start] + fact.subject + prompt[end:] if fact.subject else "")
    asked = [i for i, t in enumerate(texts) if t and t != facts[i].prompt(form)]
    said = generate(model, [encode(model, texts[i]) for i in asked], batch_size=batch_size)
    found = dict(zip(asked, (g.text for g in said), strict=True))
    return [found.get(i, "") for i in range(len(facts))]
