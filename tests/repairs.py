"""Repairs for tests: one that does nothing, one that adds a vector of its own to each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mi_hops.model import forward, hook_name
from mi_hops.sweep.repair import Rows


class NoRepair:
    """The unrepaired model as a repair."""

    name = "none"

    def fit(self, model, facts):
        return [None] * len(facts)

    def hooks(self, model, states, rows):
        return []


@dataclass(frozen=True)
class AddVector:
    """Adds row r's state (a vector, or None) at a layer's attn_out.

    At the prompt's last token, and with `later` also at all tokens after it.
    """

    layer: int = 1
    later: bool = False
    name: str = "add"

    def fit(self, model, facts):
        generator = torch.Generator().manual_seed(len(facts))
        return [3 * torch.randn(model.cfg.d_model, generator=generator) for _ in facts]

    def hooks(self, model, states, rows):
        def fn(x):
            out = x.clone()
            for r, (state, prompt) in enumerate(zip(states, rows.prompts, strict=True)):
                if state is None:
                    continue
                for pos in range(rows.width):
                    at = rows.offset + pos
                    if at == prompt.last or (self.later and at > prompt.last):
                        out[r, pos] += state.to(x)
            return out

        return [(hook_name("attn_out", self.layer), fn)]


def greedy_by_hand(model, prompt, n, repair=None, state=None):
    """Greedy tokens by full passes over one row, without cache, up to EOS."""
    ids = list(prompt.ids)
    for _ in range(n):
        hooks = [] if repair is None else repair.hooks(model, [state], Rows((prompt,), len(ids)))
        with torch.no_grad():
            logits = forward(model, torch.tensor([ids]), hooks=hooks)
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return tuple(ids[len(prompt) :])
