"""Memory injection: add what a prompt fails to recall to its activations while it runs."""

from mi_hops.injection.controls import CONTROLS, Controls, permuted_bridges
from mi_hops.injection.encodings import (
    ENCODINGS,
    Encoder,
    encode_memories,
    memory_prompt,
    restrict_to_heads,
)
from mi_hops.injection.grid import STRENGTHS, injection_grid
from mi_hops.injection.heads import chosen_heads, greedy_heads
from mi_hops.injection.memory import Injection, Memory, MemoryInjection, inject
from mi_hops.injection.place import STREAMS, Place
from mi_hops.injection.select import Cell, cell_report, select_cell, split_halves
from mi_hops.injection.side_effects import side_effects

__all__ = [
    "CONTROLS",
    "ENCODINGS",
    "STREAMS",
    "STRENGTHS",
    "Cell",
    "Controls",
    "Encoder",
    "Injection",
    "Memory",
    "MemoryInjection",
    "Place",
    "cell_report",
    "chosen_heads",
    "encode_memories",
    "greedy_heads",
    "inject",
    "injection_grid",
    "memory_prompt",
    "permuted_bridges",
    "restrict_to_heads",
    "select_cell",
    "side_effects",
    "split_halves",
]
