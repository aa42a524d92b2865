"""Lenses: what the activations of a model say when they are read as vocabulary."""

from mi_hops.lens.attention import AttentionLens
from mi_hops.lens.direct import fact_attribution, logit_attribution
from mi_hops.lens.flow import logit_flow
from mi_hops.lens.head_weights import copying, read_head
from mi_hops.lens.jacobian import JacobianReading, fit_jacobian_lens
from mi_hops.lens.logit import (
    Readout,
    fact_trajectories,
    logit_lens,
    plot_map,
    read_vectors,
    token_map,
)
from mi_hops.lens.neurons import neuron_attribution, top_texts
from mi_hops.lens.order import who_comes_first
from mi_hops.lens.patchscopes import Affine, Place, fit_affine, patchscope, patchscope_generate
from mi_hops.lens.probes import ProbeTraining, fact_probes
from mi_hops.lens.quality import evaluate_heads, evaluate_lens
from mi_hops.lens.sae import (
    bridge_features,
    clamp,
    clamp_effect,
    fact_features,
    sae_quality,
    train_sae,
)
from mi_hops.lens.similarity import similarity
from mi_hops.lens.target_prompts import entity_description_prompt, next_token_prompt
from mi_hops.lens.trained import TrainedLens, load_lens
from mi_hops.lens.training import LensTraining, train_lens
from mi_hops.lens.tuned import TunedLens
from mi_hops.lens.vectors import KINDS, Lens, LogitLens

__all__ = [
    "KINDS",
    "Affine",
    "AttentionLens",
    "JacobianReading",
    "Lens",
    "LensTraining",
    "LogitLens",
    "Place",
    "ProbeTraining",
    "Readout",
    "TrainedLens",
    "TunedLens",
    "bridge_features",
    "clamp",
    "clamp_effect",
    "copying",
    "entity_description_prompt",
    "evaluate_heads",
    "evaluate_lens",
    "fact_attribution",
    "fact_features",
    "fact_probes",
    "fact_trajectories",
    "fit_affine",
    "fit_jacobian_lens",
    "load_lens",
    "logit_attribution",
    "logit_flow",
    "logit_lens",
    "neuron_attribution",
    "next_token_prompt",
    "patchscope",
    "patchscope_generate",
    "plot_map",
    "read_head",
    "read_vectors",
    "sae_quality",
    "similarity",
    "token_map",
    "top_texts",
    "train_lens",
    "train_sae",
    "who_comes_first",
]
