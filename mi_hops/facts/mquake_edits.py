"""The counterfactual edits of MQuAKE (Zhong et al. 2023, arXiv 2305.14795), as `HopEdit`s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mi_hops.facts.hop_edits import HOPS, HopEdit
from mi_hops.facts.mquake import load_mquake
from mi_hops.facts.reading import OnError
from mi_hops.facts.templates import Wording


def load_mquake_edits(
    path: str | Path,
    *,
    templates: str | Path | None = None,
    wordings: Mapping[str, Wording] | None = None,
    on_error: OnError = "raise",
) -> tuple[list[HopEdit], list[tuple[str, str]]]:
    """The two-hop chains of a file in MQuAKE's format, before and after their edits.

    A record's edits may be about its first hop, its second, or both; they belong together, and its
    questions are asked after all of them. Edits of different records may contradict one another
    (so does the benchmark's first version): make them one record at a time.

    Args:
        path, templates, wordings, on_error: see `load_mquake`.

    Returns:
        The edits, and (record, reason) of the records that give none: those that `load_mquake` drops
        before or after, longer chains than of two hops, and edits that change nothing.

    Raises:
        FileNotFoundError: no such file or folder.
        FactsFileError: not a JSON list of such records; the message has the line or the record.
    """
    before, after = (
        load_mquake(path, templates=templates, wordings=wordings, edited=edited, on_error=on_error)
        for edited in (False, True)
    )
    reasons = {note.row: note.reason for facts in (after, before) for note in facts.dropped}
    edits: list[HopEdit] = []
    new = {fact.meta["row"]: fact for fact in after}
    for old in before:
        row = old.meta["row"]
        if row not in new:
            continue
        edited = new[row].meta["edited"]
        if old.n_hops > 2:
            reasons[row] = "more than two hops"
            continue
        try:
            hops = tuple(HOPS[k - 1] for k in edited)
            edits.append(HopEdit(before=old, after=new[row], hops=hops))
        except ValueError as error:
            reasons[row] = str(error)
    return edits, [(f"record {row}", reasons[row]) for row in sorted(reasons)]
