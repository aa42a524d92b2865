"""Made-up worlds with known ground truth, and the training of small models on them."""

from mi_hops.worlds.hopland import SPLITS, Hopland, Relation, Single

__all__ = ["SPLITS", "Hopland", "Relation", "Single"]
