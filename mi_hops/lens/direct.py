"""Direct logit attribution: how much of a token's logit each head and MLP wrote.

The final stream is a sum of what the embedding, every head, every attention bias and every MLP wrote,
and with its scale frozen the final norm is linear, so a logit is a sum of their shares.

TransformerLens's own ``direct_logit_attribution`` takes the final norm to be folded into W_U, which
it is not in a model loaded with ``processing="none"``; here the norm's weight is applied, and the two
agree on folded models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from fancy_einsum import einsum
from torch import Tensor

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.tracking import Prompts, Row, Track, check_role, first_tokens, rows_at
from mi_hops.lens.vectors import activations, head_outputs, in_batches
from mi_hops.model import HookedModel, hook_name, linear_read_out, provenance, read_out, unembedding
from mi_hops.model.hooks import mlp_input
from mi_hops.model.numeric import widen
from mi_hops.model.weights import require_linear
from mi_hops.result.result import Result
from mi_hops.sweep.pairs import Activations
from mi_hops.text.tokens import Where

_DIMS = {
    "heads": ("example", "layer", "head", "tracked"),
    "mlps": ("example", "layer", "tracked"),
    "attention_biases": ("example", "layer", "tracked"),
    "embedding": ("example", "tracked"),
    "constant": ("example", "tracked"),
    "logit": ("example", "tracked"),
}


def logit_attribution(
    model: HookedModel,
    prompts: Prompts,
    track: Track,
    *,
    position: Where | Sequence[Where] = -1,
    centre: bool = True,
    cache: Activations | None = None,
    batch_size: int = 32,
) -> Result:
    """Direct logit attribution of heads and MLPs, at one position of each prompt.

    Args:
        prompts, track, cache: as in `logit_lens`.
        position: one token (of a span its last), for all prompts or one for each.
        centre: take logits relative to their mean over the vocabulary, which the softmax does not
            see; without it an additive constant of all tokens is shared out too.

    Returns:
        Result, in logits (before the model's soft cap or scale, where it has one), which add up to the
        baseline ``logit`` (``example, tracked``): ``heads``
        (``example, layer, head, tracked``), ``mlps`` and ``attention_biases`` (``example, layer,
        tracked``), ``embedding`` (with positions, where the model adds them) and ``constant`` (the
        norm's and the unembedding's biases) (``example, tracked``).

    Raises:
        ValueError: nothing to track, positions or a cache that do not fit the prompts, or a model
            whose parts do not add up to its final stream (for instance one with a norm after the
            attention output).

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> shares = mi_hops.logit_attribution(model, "The spouse of Ondo is", {"a name": "Mara"})
        >>> dict(shares["heads"].sizes)
        {'example': 1, 'layer': 6, 'head': 4, 'tracked': 1}
    """
    rows = rows_at(model, prompts, track, position)
    return _attributed(model, rows, centre, batch_size, cache=cache)


def fact_attribution(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    role: str = "last",
    centre: bool = True,
    batch_size: int = 32,
) -> Result:
    """`logit_attribution` for bridge and answer on two-hop prompts.

    Facts whose prompt, names or position cannot be tokenised or found are skipped, with the reason.

    Args:
        form: form of the prompt; default each fact's first.
        role: ``"last"`` or ``"first hop"``: where it is read.

    Raises:
        ValueError: another role; see also `logit_attribution`.
        NoUsableFactError: no fact can be read.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:4]
        >>> mi_hops.fact_attribution(model, facts).mean()["mlps"].sel(tracked="answer").dims
        ('layer',)
    """
    check_role(role)

    def prepare(case: Case) -> Row:
        tracked = {"bridge": [case.bridge], "answer": [case.target.answer]}
        return Row(case.fact.id, case.prompt, [case.positions(role)[-1]], tracked)

    rows, skipped = usable(model, facts, prepare, purpose="direct attribution", form=form)
    return _attributed(model, rows, centre, batch_size, skipped=skipped)


def _attributed(
    model: HookedModel,
    rows: Sequence[Row],
    centre: bool,
    batch_size: int,
    *,
    cache: Activations | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> Result:
    firsts, at = first_tokens(rows)

    def read(chosen: list[int], tokens: Tensor, where: Tensor) -> dict[str, Tensor]:
        return _shares(model, tokens, (where, at[chosen]), firsts[chosen], centre, cache)

    shares = in_batches(model, [row.prompt for row in rows], batch_size, read, cache)
    values: dict[str, Any] = {name: (dims, shares[name]) for name, dims in _DIMS.items()}
    logit = values.pop("logit")
    return Result.from_arrays(
        values,
        baselines={"logit": logit},
        coords={
            "example": [row.label for row in rows],
            "layer": range(int(model.cfg.n_layers)),
            "head": range(int(model.cfg.n_heads)),
            "tracked": list(rows[0].tracked),
        },
        units=dict.fromkeys(_DIMS, "logits"),
        title="direct logit attribution",
        skipped=skipped,
        provenance=provenance(model, method="logit_attribution", centre=centre),
    )


def _shares(
    model: HookedModel,
    tokens: Tensor,
    cells: tuple[Tensor, Tensor],
    firsts: Tensor,
    centre: bool,
    cache: Activations | None,
) -> dict[str, Tensor]:
    layers = range(int(model.cfg.n_layers))
    ends = (hook_name("resid_pre", 0), hook_name("resid_post", layers[-1]))
    names = [[hook_name(kind, i) for i in layers] for kind in ("z", "attn_out", "mlp_out")]
    has_mlps = mlp_input(model, 0) is not None
    read = names if has_mlps else names[:2]
    found = activations(model, tokens, cells, [*ends, *chain(*read)], cache)
    place = unembedding(model)[0].device  # shares are added up where logits are made
    found = {name: widen(x).to(place) for name, x in found.items()}
    start, final = (found[name] for name in ends)
    z, attention = (torch.stack([found[name] for name in each], dim=1) for each in names[:2])
    mlps = torch.zeros_like(attention)
    if has_mlps:
        mlps = torch.stack([found[name] for name in names[2]], dim=1)
    heads = torch.stack([head_outputs(model, z[:, i], i) for i in layers], dim=1)
    for i in layers if cache is None else ():
        require_linear(model, "W_O", i, z[:, i], attention[:, i])
    error = (start + attention.sum(1) + mlps.sum(1) - final).norm() / final.norm()
    if error > 0.02:
        raise ValueError(
            f"embedding, attention and MLP outputs do not add up to the final stream (off by "
            f"{float(error):.0%}); direct attribution is not defined for this architecture"
        )
    directions, constant = linear_read_out(model, final, firsts, centre=centre)

    def share(part: Tensor) -> Tensor:
        return einsum("row ... d, row token d -> row ... token", part, directions).cpu()

    logits = read_out(model, final, whole=False)
    if centre:
        logits = logits - logits.mean(-1, keepdim=True)
    return {
        "heads": share(heads),
        "mlps": share(mlps),
        "attention_biases": share(attention - heads.sum(2)),
        "embedding": share(start),
        "constant": constant.cpu(),
        "logit": logits.gather(1, firsts.to(logits.device)).cpu(),
    }
