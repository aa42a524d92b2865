"""Names that people read, for what the package calls something shorter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

_READABLE = {
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "mlp_in": "MLP input",
    "mlp_post": "MLP neurons",
    "resid": "residual stream",
    "resid_pre": "block input",
    "resid_mid": "residual stream after attention",
    "resid_post": "block output",
    "z": "heads (z)",
    "kv_head": "key/value head",
    "prob": "probability",
    "logprob": "log-probability",
    "top_probs": "probability of the top token",
    "mean_token_prob": "mean probability of its tokens",
    "any_prob": "probability of any spelling",
    "logit_diff": "logit difference",
    "normalised_logit_diff": "normalised logit difference",
    "answer_logprob": "log-probability of the answer",
    "kl": "KL divergence",
    "cka": "linear CKA",
    "first": "first hop",
    "second": "second hop",
    "two_hop": "two-hop question",
    "first_prob": "probability of the first token",
    "first_logprob": "log-probability of the first token",
    "first_correct": "first token correct",
    "exact_match": "whole answer correct",
    "says_bridge": "answers with the bridge",
}
_CODE_NAME = re.compile(r"[a-z]+(_[a-z0-9]+)+")


def readable(name: object) -> str:
    """``"attn_out" -> "attention output"``, ``"new_name" -> "new name"``; anything else as it is.

    Examples:
        >>> from mi_hops.result.names import readable
        >>> readable("attn_out"), readable("seen_parts"), readable("L3H2.q")
        ('attention output', 'seen parts', 'L3H2.q')
    """
    text = str(name)
    if text in _READABLE:
        return _READABLE[text]
    return text.replace("_", " ") if _CODE_NAME.fullmatch(text) else text


def spelled_out(text: str) -> str:
    """A sentence with the code names in it replaced by readable ones.

    Examples:
        >>> from mi_hops.result.names import spelled_out
        >>> spelled_out("Patching: attn_out; logit_diff")
        'Patching: attention output; logit difference'
    """
    return re.sub(rf"\b{_CODE_NAME.pattern}\b", lambda found: readable(found[0]), text)


def shared_tokens(array: xr.DataArray | xr.Dataset) -> dict[str, Any]:
    """The coordinate ``token``: what all examples have at each position, "" where they differ.

    Empty where positions are roles, where no tokens are known, or where few are shared: the ends of
    prompts are often alike, and then positions say it better.
    """
    tokens = array.coords.get("token")
    if tokens is None or set(tokens.dims) != {"example", "position"}:
        return {}
    if "position" in array.coords and array["position"].dtype.kind not in "iu":
        return {}
    columns = tokens.transpose("position", "example").values.tolist()
    shared = [column[0] if len(set(column)) == 1 else "" for column in columns]
    few = 2 * sum(map(bool, shared)) < len(shared)
    return {} if few else {"token": ("position", np.array(shared, dtype=object))}
