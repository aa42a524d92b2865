"""The slow way that everything is compared with: one forward pass, one prompt, one hook a cell."""

from __future__ import annotations

import torch

from mi_hops.model import capture, forward, hook_name
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.sweep.metrics import get_metric, target_of
from mi_hops.sweep.pairs import Pairs
from mi_hops.text.tokens import encode

PAIRS = [
    ("w1 w7 w8 w9 w30 w31", "w1 w40 w8 w12 w30 w31"),
    ("w2 w22 w5 w9 w17 w18", "w2 w22 w6 w9 w50 w18"),
    ("w3 w3 w15 w19 w60 w61", "w4 w3 w25 w29 w60 w62"),
]
ANSWERS = ["w11 w12", "w13", "w14 w2 w5"]
WRONGS = ["w21", "w23 w11", "w24"]


def run(model, text, hooks=(), metric="logit_diff", answer=None, wrong=None):
    """The metric of one prompt under hooks, by itself and without padding."""
    prompt = encode(model, text)
    target = target_of(model, prompt, answer, wrong)
    metric = get_metric(metric)
    plan = metric.plan(target)
    tokens = torch.tensor([[*prompt.ids, *plan.extra]])
    with torch.no_grad():
        logits = forward(model, tokens, hooks=hooks)
    return metric.score(logits[:, [prompt.last + s for s in plan.scored]], target)[0].item()


def source(model, text, kind, layer):
    """One activation of one prompt."""
    name = hook_name(kind, layer)
    tokens = torch.tensor([encode(model, text).ids])
    return capture(model, tokens, [name])[0][name][0]


def put(kind, layer, value, positions, head=None, neuron=None, take=None):
    """A hook that writes `value` (of a whole prompt) at positions, by explicit loops."""
    take = positions if take is None else take

    def fn(x):
        x = x.clone()
        for here, there in zip(positions, take, strict=True):
            if HEAD_AXIS[kind] == 1:
                for h in range(x.shape[1]) if head is None else [head]:
                    x[0, h, here] = 0
                    x[0, h, here, : value.shape[-1]] = value[h, there]
            elif HEAD_AXIS[kind] == 2 and head is not None:
                x[0, here, head] = value[there, head]
            elif neuron is not None:
                x[0, here, neuron] = value[there, neuron]
            else:
                x[0, here] = value[there]
        return x

    return (hook_name(kind, layer), fn)


def write(model, text, node):
    """What a writer adds to the stream, from the weights."""
    if node.role == "head":
        z = source(model, text, "z", node.layer)
        return z[:, node.head] @ model.blocks[node.layer].attn.W_O[node.head]
    return source(
        model, text, "resid_pre" if node.role == "embed" else f"{node.role}_out", node.layer
    )


def reading(model, text, reader, change, before=()):
    """A hook that gives a reader its input with a change added: its own norm and weights, by hand.

    Of a HookedTransformer, in the run that the hooks `before` make of the prompt.
    """
    if reader.role == "logits":
        return (hook_name("resid_post", reader.layer - 1), lambda x: x + change[None])
    tokens = torch.tensor([encode(model, text).ids])

    def at(kind):
        name = hook_name(kind, reader.layer)
        return capture(model, tokens, [name], hooks=list(before))[0][name][0]

    block, where = model.blocks[reader.layer], range(len(change))
    if reader.role == "mlp":
        out = block.mlp(block.ln2((at("resid_mid") + change)[None]))[0]
        return put("mlp_out", reader.layer, out, where)
    normed = block.ln1((at("resid_pre") + change)[None])[0]
    letter, value = reader.role.upper(), at(reader.role).clone()
    weight, bias = getattr(block.attn, f"W_{letter}"), getattr(block.attn, f"b_{letter}")
    # Key and value weights are expanded to all heads: every n-th is the key/value head itself.
    head = reader.head * (model.cfg.n_heads // value.shape[1])
    value[:, reader.head] = normed @ weight[head] + bias[head]
    return put(reader.role, reader.layer, value, where, reader.head)


CLEAN, CORRUPTED = [c for c, _ in PAIRS], [c for _, c in PAIRS]

#: All pairs, and the first by itself (with an answer of one token).
ALL = Pairs(CLEAN, CORRUPTED, answer=ANSWERS, wrong=WRONGS)
ONE = Pairs(*PAIRS[0], answer="w11", wrong="w21")

#: What `run` scores the first pair on.
SCORE = {"answer": "w11", "wrong": "w21"}


def changed(pairs, **fields):
    """The same pairs with other fields."""
    names = ("clean", "corrupted", "answer", "wrong", "labels", "source")
    kept = {name: getattr(pairs, name) or None for name in names}
    return Pairs(**{**kept, **fields})
