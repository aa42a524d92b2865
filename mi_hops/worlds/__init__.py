"""Made-up worlds with known ground truth, and the training of small models on them."""

from .hopland import CHAIN_SPLITS as CHAIN_SPLITS
from .hopland import SPLITS as SPLITS
from .hopland import Hopland as Hopland
from .hopland import Relation as Relation
from .hopland import Single as Single
from .planted import PlantedTruth as PlantedTruth
from .planted import planted_facts as planted_facts
from .planted import planted_models as planted_models
from .planted import planted_truth as planted_truth
from .planted import planted_world as planted_world
