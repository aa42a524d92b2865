"""Memory injection: add what a prompt fails to recall to its activations while it runs."""

from .controls import CONTROLS as CONTROLS
from .controls import Controls as Controls
from .controls import permuted_bridges as permuted_bridges
from .encodings import ENCODINGS as ENCODINGS
from .encodings import Encoder as Encoder
from .encodings import encode_memories as encode_memories
from .encodings import memory_prompt as memory_prompt
from .encodings import restrict_to_heads as restrict_to_heads
from .grid import STRENGTHS as STRENGTHS
from .grid import injection_grid as injection_grid
from .heads import chosen_heads as chosen_heads
from .heads import greedy_heads as greedy_heads
from .memory import Injection as Injection
from .memory import Memory as Memory
from .memory import MemoryInjection as MemoryInjection
from .memory import inject as inject
from .place import STREAMS as STREAMS
from .place import Place as Place
from .select import Cell as Cell
from .select import cell_report as cell_report
from .select import select_cell as select_cell
from .side_effects import side_effects as side_effects
