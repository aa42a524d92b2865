"""General editors that CREME is compared with: ROME, MEMIT, GRACE, fine-tuning, LoRA, KnowledgeEditor."""

from .finetune import FineTuneRepair as FineTuneRepair
from .finetune import LoraRepair as LoraRepair
from .finetune import finetune_many as finetune_many
from .finetune import lora_many as lora_many
from .full import FullFineTuneRepair as FullFineTuneRepair
from .full import TunedWeights as TunedWeights
from .full import finetune_full as finetune_full
from .grace import Codebook as Codebook
from .grace import GraceRepair as GraceRepair
from .knowledge_editor import EditorTraining as EditorTraining
from .knowledge_editor import KnowledgeEditor as KnowledgeEditor
from .knowledge_editor import KnowledgeEditorRepair as KnowledgeEditorRepair
from .knowledge_editor import train_editor as train_editor
from .memit import MemitRepair as MemitRepair
from .memit import memit as memit
from .memit import memit_many as memit_many
from .memit import memit_sequential as memit_sequential
from .rome import RomeRepair as RomeRepair
from .rome import ValueSearch as ValueSearch
from .rome import rome as rome
from .rome import rome_many as rome_many
