"""Made-up worlds with known ground truth, and the training of small models on them."""

from mi_hops.worlds.hopland import CHAIN_SPLITS, SPLITS, Hopland, Relation, Single
from mi_hops.worlds.planted import (
    PlantedTruth,
    planted_facts,
    planted_models,
    planted_truth,
    planted_world,
)

__all__ = [
    "CHAIN_SPLITS",
    "SPLITS",
    "Hopland",
    "PlantedTruth",
    "Relation",
    "Single",
    "planted_facts",
    "planted_models",
    "planted_truth",
    "planted_world",
]
