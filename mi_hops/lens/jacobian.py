"""The Jacobian lens, through TransformerLens: a transport per layer from averaged Jacobians.

TransformerLens fits it (`transformer_lens.tools.analysis.JacobianLens`), on a Bridge with unprocessed
weights only; here it becomes a lens like the others, so that `logit_lens` and `fact_trajectories`
read with it. Its source is *Verbalizable Representations Form a Global Workspace in Language Models*
(Gurnee et al. 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, fingerprint, processing_of, read_out, takes_jacobian_lens

#: Where a fitted lens remembers the weights that it belongs to.
_FINGERPRINT = "mi_hops_fingerprint"


@dataclass(frozen=True, eq=False)
class JacobianReading:
    """A fitted TransformerLens `JacobianLens` as a `Lens` for ``"resid"``.

    Layer l here is the stream after l blocks, the output of block l - 1, which that class calls
    layer l - 1. The last layer is read as it is; the embedding has no transport.

    Args:
        fitted: a `transformer_lens.tools.analysis.JacobianLens`, fitted or loaded
            (``JacobianLens.load(path)``; ``lens.fitted.save(path)`` writes it).

    Raises:
        ValueError: processed weights, or a lens of another model: of another width or depth, or
            fitted by `fit_jacobian_lens`, which notes the fingerprint, on other weights.
    """

    model: HookedModel = field(repr=False)
    fitted: Any = field(repr=False)
    name: str = "jacobian"

    def __post_init__(self) -> None:
        if processing_of(self.model) != "none":
            raise ValueError(
                "Jacobian lenses are fitted on unprocessed weights and read no others; load the "
                "model with processing='none'"
            )
        cfg, own = self.model.cfg, fingerprint(self.model)
        known = self.fitted.metadata.get(_FINGERPRINT, own)
        deepest = max(self.fitted.source_layers)
        if known != own or self.fitted.d_model != cfg.d_model or deepest >= cfg.n_layers - 1:
            raise ValueError(
                f"this Jacobian lens (width {self.fitted.d_model}, blocks up to {deepest}, "
                f"fingerprint {known}) belongs to another model than the one that is read (width "
                f"{cfg.d_model}, {cfg.n_layers} blocks, fingerprint {own})"
            )

    @property
    def layers(self) -> list[int]:
        """Layers of ``"resid"`` that it can read."""
        return [
            *(int(layer) + 1 for layer in self.fitted.source_layers),
            int(self.model.cfg.n_layers),
        ]

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """W_U norm(J x).

        Raises:
            ValueError: a layer without a transport.
        """
        if layer == self.model.cfg.n_layers:
            return read_out(self.model, vectors)
        if layer not in self.layers:
            raise ValueError(
                f"this Jacobian lens reads layers {self.layers} of 'resid', not {layer}; pass "
                "layers=lens.layers"
            )
        moved = self.fitted.transport(vectors, layer - 1)
        return read_out(self.model, moved)


def fit_jacobian_lens(
    model: HookedModel,
    prompts: Sequence[str],
    *,
    corpus: str = "unnamed",
    skip_first_positions: int = 1,
    progress: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> JacobianReading:
    """Fit a Jacobian lens with TransformerLens.

    Args:
        prompts: texts of some tokens; about 100 of 128 tokens are usable for a large model.
        corpus: name of the corpus, recorded in the fitted lens.
        skip_first_positions: positions at the start that are left out of the average.
        metadata: what else the fitted lens is to record.
        keywords: further arguments of ``JacobianLens.fit``.

    Raises:
        ValueError: a HookedTransformer, or processed weights; see also ``JacobianLens.fit``.
    """
    if not takes_jacobian_lens(model):
        raise ValueError(
            "TransformerLens fits Jacobian lenses on a TransformerBridge with unprocessed weights; "
            "load the model with backend='bridge', processing='none'"
        )
    from transformer_lens.tools.analysis import JacobianLens

    fitted = JacobianLens.fit(
        model,
        list(prompts),
        corpus=corpus,
        skip_first_positions=skip_first_positions,
        show_progress=progress,
        metadata={**(metadata or {}), _FINGERPRINT: fingerprint(model)},
        **keywords,
    )
    return JacobianReading(model, fitted)
