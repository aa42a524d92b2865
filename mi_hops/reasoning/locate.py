"""Which modules carry the second hop? Replace them with the second-hop prompt's and see.

The two-hop prompt ("The country of citizenship of the author of Misery is") and its guide, the
second hop with the bridge spelled out ("The country of citizenship of Stephen King is"), end alike.
One module's output at one position of the first is replaced by the guide's at the corresponding
position, counted from the end: activation patching with named positions. Source: arXiv 2402.14328.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import xarray as xr

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import HookedModel, provenance
from mi_hops.patching.activation import patch
from mi_hops.result.result import Result
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Target
from mi_hops.sweep.pairs import Pairs
from mi_hops.sweep.sites import Sites, SpanLike
from mi_hops.text.tokens import Prompt, encode, last_position

LocatedKind = Literal["attn_out", "mlp_out", "resid_post"]
KINDS: tuple[LocatedKind, ...] = ("attn_out", "mlp_out", "resid_post")
#: Positions: the last token of the phrase that describes the bridge, all tokens between, the last.
ROLES = ("first hop", "between", "last")


@dataclass(frozen=True)
class _GuidedCase:
    """A two-hop prompt and its guide, which end in the same `tail` tokens after the bridge."""

    fact: TwoHopFact
    prompt: Prompt
    guide: Prompt
    target: Target
    tail: int

    def spans(self) -> dict[str, SpanLike]:
        """Role -> (positions in the guide, corresponding positions in the prompt)."""
        found: dict[str, SpanLike] = {"first hop": (-1 - self.tail, -1 - self.tail), "last": -1}
        if self.tail > 1:
            found["between"] = slice(-self.tail, -1)
        return found


def locate(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    kinds: Sequence[LocatedKind] = KINDS,
    window: int = 1,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Indirect effect on P(answer) of replacing module outputs by the second hop's.

    Args:
        form: template order of both prompts.
        window: layers replaced together for attention and MLP, centred as in the published code:
            for centre l the layers ``l - window // 2 .. l + (window - window // 2) - 1``. Block
            outputs are always replaced one layer at a time.
        limits: facts and rows in one pass.

    Returns:
        `Result` ``effect`` (example, kind, position, layer): P(first answer token | replaced) minus
        P(first answer token | as it is), what `patch` calls ``change``; NaN where a prompt has no
        token of the role ``between``. Baselines ``clean`` and ``guide`` (example): P(answer) of the
        two prompts. Nothing is averaged.

    Raises:
        NoUsableFactError: no fact can be used.
        ValueError: a window below 1.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:4]
        >>> located = mi_hops.locate(model, facts, form="suffix")
        >>> located["effect"].dims
        ('example', 'kind', 'position', 'layer')
    """
    if not kinds:
        raise ValueError(f"no kinds; expected one or more of {list(KINDS)}")
    cases, skipped = usable(model, facts, _guided, purpose="locating", form=form)
    parts = []
    # Only some prompts have tokens between the first hop and the last; of the kinds, only attention
    # and MLP are replaced by windows.
    for group in ([c for c in cases if c.tail > 1], [c for c in cases if c.tail == 1]):
        for chosen, width in (
            ([kind for kind in kinds if kind != "resid_post"], window),
            ([kind for kind in kinds if kind == "resid_post"], 1),
        ):
            if group and chosen:
                sites = Sites(chosen, positions=_positions(group), window=width)
                found = patch(model, _pairs(group), sites, metric="first_prob", limits=limits)
                parts.append(found.data[["change", "clean", "corrupted"]])
    data = xr.merge(parts, compat="no_conflicts", join="outer").reindex(
        example=[case.fact.id for case in cases], kind=list(kinds), position=list(ROLES)
    )
    dims = ("example", "kind", "position", "layer")
    return Result.from_arrays(
        {"effect": (dims, data["change"].transpose(*dims).values)},
        coords={dim: data[dim].values for dim in dims},
        baselines={
            "clean": ("example", data["corrupted"].values),
            "guide": ("example", data["clean"].values),
        },
        units={"effect": "change in probability", "clean": "probability", "guide": "probability"},
        provenance=provenance(model, method="locate", form=form, window=window),
        title="Replacing a module's output by the second hop's",
        skipped=skipped,
        allow_nonfinite=True,
    )


def _guided(case: Case) -> _GuidedCase:
    guide = encode(case.model, case.fact.second_prompt(case.form))
    prompt, fact = case.prompt, case.fact
    tail = prompt.last - last_position(prompt, fact.first_hop)
    other = guide.last - last_position(guide, fact.bridge)
    ends = [p.ids[len(p) - n :] for p, n in ((prompt, tail), (guide, other))]
    if tail < 1 or ends[0] != ends[1]:
        raise ValueError(f"the prompts do not end alike after the bridge: {ends[0]} and {ends[1]}")
    return _GuidedCase(fact, prompt, guide, case.target, tail)


def _pairs(group: Sequence[_GuidedCase]) -> Pairs:
    return Pairs(
        [case.guide for case in group],
        [case.prompt for case in group],
        answer=[case.target for case in group],
        labels=[case.fact.id for case in group],
    )


def _positions(group: Sequence[_GuidedCase]) -> dict[str, list[SpanLike]]:
    spans = [case.spans() for case in group]
    return {role: [each[role] for each in spans] for role in spans[0]}


def located_layers(
    result: Result, *, kind: str = "attn_out", position: str = "last", share: float = 0.5
) -> list[int]:
    """The layers a repair should touch: those with at least `share` of the largest mean effect.

    The mean is over examples. If no layer has a positive mean effect the list is empty.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> mi_hops.located_layers(mi_hops.locate(model, facts, form="suffix"))
        [1]
    """
    effect = result.sel(kind=kind, position=position).mean().data["effect"]
    largest = float(effect.max())
    if not largest > 0:
        return []
    return [int(i) for i in effect["layer"].values[effect.values >= share * largest]]
