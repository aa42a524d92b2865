"""Direct logit attribution: how much of a token's logit each head and MLP wrote.

The final stream is a sum of what the embedding, every head, every attention bias and every MLP wrote,
and with its scale frozen the final norm is linear, so a logit is a sum of their shares.

TransformerLens's own ``direct_logit_attribution`` takes the final norm to be folded into W_U, which
it is not in a model loaded with ``processing="none"``; here the norm's weight is applied, and the two
agree on folded models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.lens.reading import head_outputs
from mi_hops.lens.tracking import Spelling, at_role, resolve, spell_all, tracked_tokens
from mi_hops.model import (
    HookedModel,
    capture,
    final_norm,
    hook_name,
    provenance,
    read_out,
    unembedding,
)
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.result import Result
from mi_hops.text.tokens import Prompt, Where, batches, encode

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

_PARTS = ("heads", "mlps", "attention_biases", "embedding", "constant")


def logit_attribution(
    model: HookedModel,
    prompts: str | Prompt | Sequence[str | Prompt],
    track: Mapping[str, Spelling | Sequence[Spelling]],
    *,
    position: Where | Sequence[Where] = -1,
    centre: bool = True,
    batch_size: int = 32,
    examples: Sequence[str] | None = None,
) -> Result:
    """Shares of the first tokens' logits, read at one position of each prompt.

    Args:
        track: as in `logit.logit_lens`.
        position: one token (of a span its last), for all prompts or one for each.
        centre: take logits relative to their mean over the vocabulary, which the softmax does not
            see; without it an additive constant of all tokens is shared out too.
        examples: labels of the prompts.

    Returns:
        Result, in logits, which add up to the baseline ``logit`` (``example, tracked``): ``heads``
        (``example, layer, head, tracked``), ``mlps`` and ``attention_biases`` (``example, layer,
        tracked``), ``embedding`` (with positions, where the model adds them) and ``constant`` (the
        norm's and the unembedding's biases) (``example, tracked``).

    Raises:
        ValueError: nothing to track, labels or positions that do not fit the prompts, or a model
            whose parts do not add up to its final stream (for instance one with a norm after the
            attention output).
    """
    single = isinstance(prompts, str | Prompt)
    given = [prompts] if isinstance(prompts, str | Prompt) else prompts
    known = [encode(model, p) if isinstance(p, str) else p for p in given]
    if not track or not known:
        raise ValueError("name at least one prompt and something to track")
    labels = list(examples) if examples is not None else [str(i) for i in range(len(known))]
    if len(labels) != len(known):
        raise ValueError(f"got {len(labels)} labels in examples for {len(known)} prompts")
    spelled = spell_all(model, known, track, single=single)
    _, places = resolve(known, {"here": position}, single=single)
    firsts = tracked_tokens(spelled).ids[..., 0]
    out: dict[str, list[Tensor | None]] = {n: [None] * len(known) for n in (*_PARTS, "logit")}
    with torch.no_grad():
        for chosen, batch in batches([p.ids for p in known], batch_size):
            at = torch.tensor([places[i][0] for i in chosen])
            parts = _attribute(model, batch.tokens, at, firsts[chosen], centre)
            for name, value in parts.items():
                for i, row in zip(chosen, value.cpu(), strict=True):
                    out[name][i] = row
    stacked = {n: torch.stack([r for r in rows if r is not None]) for n, rows in out.items()}
    dims = {
        "heads": ("example", "layer", "head", "tracked"),
        "mlps": ("example", "layer", "tracked"),
        "attention_biases": ("example", "layer", "tracked"),
        "embedding": ("example", "tracked"),
        "constant": ("example", "tracked"),
    }
    return Result.from_arrays(
        {name: (dims[name], stacked[name]) for name in _PARTS},
        baselines={"logit": (("example", "tracked"), stacked["logit"])},
        coords={
            "example": labels, "layer": range(int(model.cfg.n_layers)),
            "head": range(int(model.cfg.n_heads)), "tracked": list(track),
        },
        units=dict.fromkeys((*_PARTS, "logit"), "logits"),
        title="direct logit attribution",
        provenance=provenance(
            model, method="logit_attribution", position=str(position), centre=centre
        ),
    )  # fmt: skip


def fact_attribution(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    role: str = "last",
    centre: bool = True,
    batch_size: int = 32,
) -> Result:
    """`logit_attribution` of bridge and answer on two-hop prompts.

    Facts whose prompt, names or position cannot be tokenised or found are skipped, with the reason.

    Args:
        form: form of the prompt; default each fact's first.
        role: ``"last"`` or ``"first hop"``: where it is read.

    Raises:
        ValueError: another role; see also `logit_attribution`.
        NoUsableFactError: no fact can be read.
    """
    names = ("bridge", "answer")
    read = at_role(model, facts, role, form=form, what="direct attribution", names=names)
    result = logit_attribution(
        model, read.prompts, {name: [getattr(f, name) for f in read.facts] for name in names},
        position=read.places, centre=centre, batch_size=batch_size,
        examples=[f.id for f in read.facts],
    )  # fmt: skip
    result.skipped = read.skipped
    return result


def _attribute(
    model: HookedModel, tokens: Tensor, at: Tensor, firsts: Tensor, centre: bool
) -> dict[str, Tensor]:
    n_layers = int(model.cfg.n_layers)
    rows = torch.arange(len(at))
    kinds = ("z", "attn_out", "mlp_out")
    names = {(k, layer): hook_name(k, layer) for k in kinds for layer in range(n_layers)}
    ends = (hook_name("resid_pre", 0), hook_name("resid_post", n_layers - 1))
    cache, _ = capture(model, tokens, [*names.values(), *ends])

    def here(name: str) -> Tensor:
        x = cache[name]
        row = x[rows.to(x.device), at.to(x.device)]
        return row.to(place, wide_dtype(x.dtype))

    place = unembedding(model)[0].device  # shares are added up where logits are made
    start, final = (here(name) for name in ends)
    heads = torch.stack(
        [head_outputs(model, here(names["z", layer]), layer) for layer in range(n_layers)], dim=1
    )
    attention = torch.stack([here(names["attn_out", layer]) for layer in range(n_layers)], dim=1)
    mlps = torch.stack([here(names["mlp_out", layer]) for layer in range(n_layers)], dim=1)
    _check_sum(start + attention.sum(1) + mlps.sum(1), final)
    scale, directions, constant = _linear_read_out(model, final, firsts, centre)

    def share(part: Tensor) -> Tensor:
        """``[row, *any, d_model]`` to ``[row, *any, tracked]``."""
        middle = (1,) * (part.ndim - 2)
        scaled = part * scale.reshape(-1, *middle, 1)
        flat = scaled.reshape(len(part), -1, part.shape[-1])
        return (flat @ directions.transpose(1, 2)).reshape(*part.shape[:-1], -1)

    logits = read_out(model, final, norm=True)
    if centre:
        logits = logits - logits.mean(-1, keepdim=True)
    return {
        "heads": share(heads),
        "mlps": share(mlps),
        "attention_biases": share(attention - heads.sum(2)),
        "embedding": share(start),
        "constant": constant,
        "logit": logits.gather(1, firsts.to(logits.device)),
    }


def _check_sum(total: Tensor, final: Tensor) -> None:
    error = (total - final).norm() / final.norm()
    if error > 0.02:
        raise ValueError(
            f"embedding, attention and MLP outputs do not add up to the final stream (off by "
            f"{float(error):.0%}); direct attribution is not defined for this architecture"
        )


def _linear_read_out(
    model: HookedModel, final: Tensor, firsts: Tensor, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The final norm and unembedding as a linear map, its scale frozen at `final`.

    Returns:
        Scale ``[row]``, directions ``[row, tracked, d_model]``, constants ``[row, tracked]``.
    """
    weight, bias = unembedding(model)
    weight, bias = weight.to(final.dtype), bias.to(final.dtype)
    norm: Any = model.ln_final
    layer_norm = str(getattr(model.cfg, "normalization_type", "LN")).startswith("LN")
    gain, shift = (getattr(norm, n, None) for n in ("w", "b"))
    if gain is None:
        gain = getattr(norm, "weight", None)
    if shift is None:
        shift = getattr(norm, "bias", None)
    gain = torch.ones_like(final[0]) if gain is None else gain.detach().to(final)
    shift = torch.zeros_like(final[0]) if not torch.is_tensor(shift) else shift.detach().to(final)
    centred = final - final.mean(-1, keepdim=True) if layer_norm else final
    normed = final_norm(model, final).to(final)
    # The scale as the norm applied it, whatever its epsilon.
    scale = ((normed - shift) * centred * gain).sum(-1) / (centred * gain).pow(2).sum(-1)
    picked = weight.T[firsts.to(weight.device)]
    own = bias[firsts.to(bias.device)]
    if centre:
        picked, own = picked - weight.mean(1), own - bias.mean()
    directions = picked * gain
    constant = picked @ shift + own
    if layer_norm:
        # Taking the mean out of a part is taking it out of the direction.
        directions = directions - directions.mean(-1, keepdim=True)
    total = (final[:, None] * directions).sum(-1) * scale[:, None] + constant
    want = read_out(model, final, norm=True)
    if centre:
        want = want - want.mean(-1, keepdim=True)
    if not torch.allclose(total, want.gather(1, firsts.to(want.device)), rtol=0.02, atol=0.05):
        raise ValueError(
            "the final norm of this model is neither LayerNorm nor RMSNorm as its config says, so "
            "its logits cannot be shared out"
        )
    return scale, directions, constant
