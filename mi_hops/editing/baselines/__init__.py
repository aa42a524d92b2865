"""General editors that CREME is compared with: ROME, MEMIT, GRACE, fine-tuning, LoRA, KnowledgeEditor."""

from mi_hops.editing.baselines.finetune import (
    FineTuneRepair,
    LoraRepair,
    finetune_many,
    lora_many,
)
from mi_hops.editing.baselines.full import TunedWeights, finetune_full
from mi_hops.editing.baselines.grace import Codebook, GraceRepair
from mi_hops.editing.baselines.knowledge_editor import (
    EditorTraining,
    KnowledgeEditor,
    KnowledgeEditorRepair,
    train_editor,
)
from mi_hops.editing.baselines.memit import MemitRepair, memit, memit_many, memit_sequential
from mi_hops.editing.baselines.rome import RomeRepair, ValueSearch, rome, rome_many

__all__ = [
    "Codebook",
    "EditorTraining",
    "FineTuneRepair",
    "GraceRepair",
    "KnowledgeEditor",
    "KnowledgeEditorRepair",
    "LoraRepair",
    "MemitRepair",
    "RomeRepair",
    "TunedWeights",
    "ValueSearch",
    "finetune_full",
    "finetune_many",
    "lora_many",
    "memit",
    "memit_many",
    "memit_sequential",
    "rome",
    "rome_many",
    "train_editor",
]
