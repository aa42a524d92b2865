"""Two-hop facts: the record, its wordings, and loaders from files."""

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.geo import load_chains, load_geo
from mi_hops.facts.hop_edits import HopEdit, SingleFact, hop_edits, single_fact
from mi_hops.facts.hops import Hop
from mi_hops.facts.hotpot import load_hotpot
from mi_hops.facts.loaders import load_facts, load_jsonl, save_jsonl
from mi_hops.facts.memory_injections import load_memory_injections
from mi_hops.facts.mquake import load_mquake
from mi_hops.facts.mquake_edits import load_mquake_edits
from mi_hops.facts.mquake_words import load_wordings
from mi_hops.facts.musique import load_musique
from mi_hops.facts.reading import Facts, FactsFileError, RowNote
from mi_hops.facts.tables import load_table
from mi_hops.facts.templates import CONTEXTS, FORMS, Wording, capitalise
from mi_hops.facts.twohopfact import load_two_hop_fact
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.facts.wordings import (
    WordedRelation,
    default_wordings,
    few_shot_lead,
    reword,
    with_lead,
)

__all__ = [
    "CONTEXTS",
    "FORMS",
    "Facts",
    "FactsFileError",
    "Hop",
    "HopEdit",
    "NoUsableFactError",
    "RowNote",
    "SingleFact",
    "TwoHopFact",
    "WordedRelation",
    "Wording",
    "capitalise",
    "default_wordings",
    "few_shot_lead",
    "hop_edits",
    "load_chains",
    "load_facts",
    "load_geo",
    "load_hotpot",
    "load_jsonl",
    "load_memory_injections",
    "load_mquake",
    "load_mquake_edits",
    "load_musique",
    "load_table",
    "load_two_hop_fact",
    "load_wordings",
    "reword",
    "with_lead",
    "save_jsonl",
    "single_fact",
]
