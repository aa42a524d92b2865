"""How a two-hop question failed: the CREME paper's failure types, assigned by explicit rules.

The paper (arXiv 2402.14328) names short-cut, incomplete, distorted and hasty reasoning and assigned
them by hand. Here the first of these rules that holds decides:

1. ``incomplete``: the answer given is the bridge; the model stopped at the first hop.
2. ``short-cut``: the same answer comes when the subject itself takes the place of the first hop ("The
   nationality of *Misery* is"); a surface link between subject and second relation answered.
3. ``distorted``: the bridge never rises in the lens: its probability, largest over blocks, at the
   first hop's last token and at the last token, stays below `faint` of its median peak over the
   questions answered correctly. It is the mean probability of all the bridge's tokens, the papers'
   score: names share first tokens, and one may show by any of its words.
4. ``hasty``: the answer given (its first token, which is what the last position is to say) reads at
   half of its final probability at the last token no later than the layer at which the bridge
   peaks; the answer was chosen before the bridge was there.
5. ``other``: none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mi_hops.cases import Case, usable
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.lens import Readout, logit_lens
from mi_hops.model import HookedModel, provenance
from mi_hops.reasoning.gap import Gap
from mi_hops.result import plots
from mi_hops.result.display import html_table
from mi_hops.result.result import Result
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep.generate import generate
from mi_hops.text.matching import matches, normalise
from mi_hops.text.tokens import answer_ids, encode, find_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Type -> its rule, in the order in which they are tried.
RULES = {
    "incomplete": "the answer given is the bridge: the model stopped at the first hop",
    "short-cut": "the same answer comes when the subject itself takes the place of the first hop",
    "distorted": "the bridge never rises in the lens: its peak over layers (mean probability of all "
    "its tokens), at the first hop's last token and at the last token, stays below a quarter of the "
    "median peak of the questions answered correctly",
    "hasty": "at the last token the answer given (its first token) has half of its final "
    "probability no later than the layer at which the bridge peaks",
    "other": "none of these",
}
TYPES = tuple(RULES)


class FailureTypes(Result):
    """The type of each failure, with what determined it (from `failure_types`).

    Variables on ``example``: ``type``; ``said``, the answer given; ``bridge_peak`` (probability),
    ``bridge_layer`` and ``said_layer`` (blocks passed); ``said_for_subject``, the answer when the
    subject takes the place of the first hop.
    """

    @property
    def frame(self) -> pd.DataFrame:
        """One row per failure: ``id`` and the variables."""
        return self.data.to_dataframe().reset_index().rename(columns={"example": "id"})

    def shares(self) -> pd.DataFrame:
        """Per type: ``share`` of the failures with its exact 95% interval, ``lower``, ``upper``, ``n``."""
        types, rows = self["type"].values, {}
        for name in TYPES:
            k, n = int((types == name).sum()), len(types)
            rows[name] = (k / n, *proportion_ci(k, n), n)
        columns = ["share", "lower", "upper", "n"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("type")

    def plot(
        self, variable: str | None = None, *, kind: str | None = None, **keywords: Any
    ) -> go.Figure:
        """Bars of the share of each type, with exact 95% intervals; or as in `Result.plot`."""
        if variable is not None or kind is not None:
            return super().plot(variable, kind=kind, **keywords)
        options: dict[str, Any] = {
            "x": "type",
            "y": "share",
            "interval": ("lower", "upper"),
            "title": self.title,
        }
        options["labels"] = {"type": "", "share": "share of failures"}
        return plots.bars(self.shares().reset_index(), **{**options, **keywords})

    def _repr_html_(self) -> str:
        table = self.shares().reset_index().round(3)
        return html_table(self.title, list(table), table.values.tolist(), total=len(table))


def failure_types(
    model: HookedModel,
    gap: Gap,
    *,
    form: str | None = None,
    faint: float = 0.25,
    limit: int | None = None,
    batch_size: int = 64,
) -> FailureTypes:
    """Classify each failure of a gap.

    Failures that the lens cannot read (a first hop or a name that is not to be found or tokenised in
    the prompt) are skipped, with the reason. A failure with an empty answer is never ``hasty``.

    Args:
        form: template order, one that `gap` was found with; default its first.
        faint: share of the passed questions' median bridge peak under which a bridge counts as
            absent. Without a passed question rule 3 cannot be applied and is left out.
        limit: look at the first so many failures (and as many passed questions) only.

    Raises:
        NoUsableFactError: there is no failure, or none that the lens can read.
        ValueError: a form that the gap was not asked in.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> gap = mi_hops.find_gap(model, mi_hops.Hopland().sample(train=0, held_out=20))
        >>> kinds = mi_hops.failure_types(model, gap)
        >>> list(kinds.shares().columns)
        ['share', 'lower', 'upper', 'n']
    """
    if form is not None and form not in gap.forms:
        raise ValueError(
            f"form is {form!r}; the gap was asked in {list(gap.forms)}, and answers in one form say "
            "nothing about another; name one of these, or pass find_gap this form"
        )
    form = gap.form if form is None else form
    gap = gap if form is None else gap.in_form(form)
    said = dict(zip(gap.frame["id"], gap.frame["said"], strict=True))

    def failed_case(case: Case) -> _Read:
        return _Read(case, said[case.fact.id].strip() or case.fact.answer)

    def passed_case(case: Case) -> _Read:
        return _Read(case, case.fact.answer)

    purpose = "assigning failure types"
    failed, skipped = usable(model, gap.failed[:limit], failed_case, purpose=purpose, form=form)
    try:
        passed, _ = usable(model, gap.passed[:limit], passed_case, purpose=purpose, form=form)
        threshold = faint * float(np.median(_read(model, passed, batch_size)[0]))
    except NoUsableFactError:
        threshold = 0.0
    peak, bridge_layer, said_layer = _read(model, failed, batch_size)
    shortcut = _without_first_hop(model, failed, batch_size)
    kinds = []
    for i, fact in enumerate(read.case.fact for read in failed):
        answer = said[fact.id]
        if matches(answer, fact.bridge, fact.bridge_aliases):
            kinds.append("incomplete")
        elif answer.strip() and normalise(answer) == normalise(shortcut[i]):
            kinds.append("short-cut")
        elif peak[i] < threshold:
            kinds.append("distorted")
        elif answer.strip() and said_layer[i] <= bridge_layer[i]:
            kinds.append("hasty")
        else:
            kinds.append("other")
    ids = [read.case.fact.id for read in failed]
    columns = {
        "said": [said[i] for i in ids],
        "type": kinds,
        "bridge_peak": peak,
        "bridge_layer": bridge_layer,
        "said_layer": said_layer,
        "said_for_subject": shortcut,
    }
    return FailureTypes.from_arrays(
        {name: ("example", values) for name, values in columns.items()},
        coords={"example": ids},
        units={"bridge_peak": "probability", "bridge_layer": "layer", "said_layer": "layer"},
        provenance=provenance(model, method="failure_types", form=form, faint=faint),
        title="Failure types",
        main="type",
        skipped=skipped,
    )


class _Read:
    """A question as the lens reads it, with the tokens to follow."""

    def __init__(self, case: Case, answer: str) -> None:
        self.case, self.bridge = case, case.bridge
        (self.first_hop,) = case.positions("first hop")
        self.answer = answer_ids(case.model, case.prompt, answer)


def _read(
    model: HookedModel, cases: Sequence[_Read], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bridge's peak, its layer, layer at which the answer has half of its final probability).

    The bridge by the mean over its tokens, the answer by its first.
    """
    result = logit_lens(
        model,
        [read.case.prompt for read in cases],
        track={"bridge": [c.bridge for c in cases], "answer": [c.answer for c in cases]},
        positions={"first hop": [c.first_hop for c in cases], "last": -1},
        readout=Readout(kl=False),
        batch_size=batch_size,
    )
    # Layer 0 is the embedding: the prompt's own token, not yet anything recalled.
    recalled = result["mean_token_prob"].sel(tracked="bridge").isel(layer=slice(1, None))
    bridge = recalled.max("position").transpose("example", "layer").values
    given = result["prob"].sel(tracked="answer", position="last")
    answer = given.transpose("example", "layer").values
    layers = given["layer"].values
    reached = answer >= 0.5 * answer[:, -1:]
    return bridge.max(1), layers[1 + bridge.argmax(1)], layers[reached.argmax(1)]


def _without_first_hop(model: HookedModel, cases: Sequence[_Read], batch_size: int) -> list[str]:
    """What the model says when the subject takes the place of the first hop; "" if it cannot."""
    texts: dict[int, str] = {}
    for i, case in enumerate(read.case for read in cases):
        text, subject = case.prompt.text, case.fact.subject
        start, end = find_text(text, case.fact.first_hop)
        changed = text[:start] + subject + text[end:]
        if subject and changed != text:
            texts[i] = changed
    said = generate(model, [encode(model, t) for t in texts.values()], batch_size=batch_size)
    found = dict(zip(texts, (g.text for g in said), strict=True))
    return [found.get(i, "") for i in range(len(cases))]
