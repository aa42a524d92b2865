"""Which modules carry the second hop? Replace them with the second-hop prompt's and see.

The two-hop prompt ("The country of citizenship of the author of Misery is") and its guide, the
second hop with the bridge spelled out ("The country of citizenship of Stephen King is"), end alike.
One module's output at one position of the first is replaced by the guide's at the corresponding
position, counted from the end. Source: arXiv 2402.14328.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.model import HookedModel, capture, hook_name, provenance
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.fanout import fan_out
from mi_hops.sweep.interventions import Intervention, Site, replace
from mi_hops.text.tokens import Prompt, TokenError, answer_ids, encode, last_position, pad

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("attn_out", "mlp_out", "resid_post")
#: Positions: the last token of the phrase that stands for the bridge, all tokens between, the last.
ROLES = ("first hop", "between", "last")


@dataclass(frozen=True)
class _Pair:
    fact: TwoHopFact
    prompt: Prompt
    guide: Prompt
    tail: int
    answer: tuple[int, ...]

    def roles(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Role -> (positions in the prompt, corresponding positions in the guide)."""
        ends = {
            "first hop": range(self.tail, self.tail + 1),
            "between": range(self.tail - 1, 0, -1),
            "last": range(1),
        }
        return {
            role: (
                tuple(self.prompt.last - e for e in end),
                tuple(self.guide.last - e for e in end),
            )
            for role, end in ends.items()
            if len(end)
        }


def locate(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    kinds: Sequence[str] = KINDS,
    window: int = 1,
    batch_size: int = 8,
    prepend_bos: bool = True,
    progress: bool = False,
) -> Result:
    """Indirect effect on P(answer) of replacing module outputs by the second hop's.

    Args:
        form: template order of both prompts.
        kinds: ``attn_out``, ``mlp_out`` and ``resid_post`` (block output).
        window: layers replaced together for attention and MLP, centred as in the published code:
            for centre l the layers ``l - window // 2 .. l + (window - window // 2) - 1``. Block
            outputs are always replaced one layer at a time.
        batch_size: facts in one fan-out.

    Returns:
        `Result` ``effect`` (example, kind, position, layer): P(first answer token | replaced) minus
        P(first answer token | as it is); NaN where a prompt has no token of the role ``between``.
        Baselines ``clean`` and ``guide`` (example): P(answer) of the two prompts.

    Raises:
        NoUsableFactError: no fact can be used.
        ValueError: a window below 1.
    """
    import numpy as np

    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1 layer")
    n_layers = int(model.cfg.n_layers)
    pairs, skipped = _pairs(model, facts, form, prepend_bos)
    effect = np.full((len(pairs), len(kinds), len(ROLES), n_layers), np.nan)
    clean, guided = np.zeros(len(pairs)), np.zeros(len(pairs))
    names = {(kind, i): hook_name(kind, i) for kind in kinds for i in range(n_layers)}
    for start in progress_bar(range(0, len(pairs), batch_size), label="locate", show=progress):
        part = pairs[start : start + batch_size]
        firsts = torch.tensor([pair.answer[0] for pair in part])
        guides = pad([pair.guide.ids for pair in part])
        with torch.no_grad():
            acts, logits = capture(model, guides.tokens, names.values(), logits=True)
        assert logits is not None
        ends = logits[torch.arange(len(part)), guides.last].float().softmax(-1).cpu()
        guided[start : start + len(part)] = ends[torch.arange(len(part)), firsts].numpy()
        items, cells = [], []
        for base, pair in enumerate(part):
            for role, (here, there) in pair.roles().items():
                for k, kind in enumerate(kinds):
                    for layer in range(n_layers):
                        low = layer - window // 2
                        span = range(max(0, low), min(n_layers, low + window))
                        chosen = [layer] if kind == "resid_post" else list(span)
                        items.append(
                            Intervention(
                                tuple(Site(kind, i, here) for i in chosen),
                                tuple(
                                    replace(acts[names[kind, i]][base, list(there)]) for i in chosen
                                ),
                                base,
                            )
                        )
                        cells.append((start + base, k, ROLES.index(role), layer))

        def first_prob(logits: Tensor, bases: list[int], firsts: Tensor = firsts) -> Tensor:
            probs = logits[:, 0].float().softmax(-1)
            return probs[range(len(bases)), firsts[bases].to(probs.device)].cpu()

        out = fan_out(model, pad([pair.prompt.ids for pair in part]), items, reduce=first_prob)
        clean[start : start + len(part)] = out.base.numpy()
        for cell, value in zip(cells, out.rows.tolist(), strict=True):
            effect[cell] = value - clean[cell[0]]
    return Result.from_arrays(
        {"effect": (("example", "kind", "position", "layer"), effect)},
        coords={
            "example": [pair.fact.id for pair in pairs],
            "kind": list(kinds),
            "position": list(ROLES),
            "layer": list(range(n_layers)),
        },
        baselines={"clean": ("example", clean), "guide": ("example", guided)},
        units={"effect": "change in probability", "clean": "probability", "guide": "probability"},
        provenance=provenance(
            model, what="locate", form=form, window=window, prepend_bos=prepend_bos
        ),
        title="Replacing a module's output by the second hop's",
        skipped=skipped,
        allow_nonfinite=True,
    )


def located_layers(
    result: Result, *, kind: str = "attn_out", position: str = "last", share: float = 0.5
) -> list[int]:
    """The layers a repair should touch: those with at least `share` of the largest mean effect.

    The mean is over examples. If no layer has a positive mean effect the list is empty.
    """
    effect = result.sel(kind=kind, position=position).mean().data["effect"]
    largest = float(effect.max())
    if not largest > 0:
        return []
    return [int(i) for i in effect["layer"].values[effect.values >= share * largest]]


def _pairs(
    model: HookedModel, facts: Sequence[TwoHopFact], form: str | None, prepend_bos: bool
) -> tuple[list[_Pair], list[tuple[str, str]]]:
    pairs, skipped = [], []
    for fact in facts:
        try:
            prompt = encode(model, fact.prompt(form), prepend_bos=prepend_bos)
            name = form if form is not None else next(iter(fact.prompts))
            guide = encode(model, fact.second_prompt(name), prepend_bos=prepend_bos)
            tail = prompt.last - last_position(prompt, fact.first_hop)
            other = guide.last - last_position(guide, fact.bridge)
            answer = answer_ids(model, prompt, fact.answer)
        except (TokenError, ValueError) as error:
            skipped.append((fact.id, str(error)))
            continue
        ends = [p.ids[len(p) - n :] for p, n in ((prompt, tail), (guide, other))]
        if tail < 1 or ends[0] != ends[1]:
            reason = f"the prompts do not end alike after the bridge: {ends[0]} and {ends[1]}"
            skipped.append((fact.id, reason))
            continue
        pairs.append(_Pair(fact, prompt, guide, tail, answer))
    if not pairs:
        raise NoUsableFactError("locating", skipped)
    return pairs, skipped
