"""How the failures fail; shown in the section of the gap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mi_hops.reasoning.failures import RULES, FailureTypes, failure_types
from mi_hops.study.context import Run
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import left_out, percent, share
from mi_hops.study.parts import Block, Figure, Table, bars, row
from mi_hops.study.step import Asked, Step, Work


class Failures(Step):
    """The failure types of all failures."""

    name, short, shown_in = "failures", "Failure types", "gap"
    kind = FailureTypes

    def run(self, run: Run) -> FailureTypes:
        """Assign a type to every failure."""
        _ = run.failed
        return failure_types(run.model, run.gap, form=run.form)

    def work(self, asked: Asked) -> Work:
        """Every question read by the lens, every failure asked about its subject."""
        return Work(2 * asked.facts, 2 * asked.facts * asked.length)

    def summarise(self, result: FailureTypes, study: Folder) -> dict[str, Any]:
        """The share of each type."""
        types = result["type"].values
        return {name: share((types == name).sum(), len(types)) for name in RULES}

    def section(self, result: FailureTypes, study: Folder) -> Iterator[Block]:
        """The shares, and the rules."""
        shares = study.summary["failures"]
        rows = [row(share, type=kind) for kind, share in shares.items()]
        plot = bars(rows, x="type", height=300, y_label="share of failures")
        left = left_out(study.summary["left_out"].get("failures", {}))
        if plot is not None:
            yield Figure(
                "How the failures fail",
                [("", plot)],
                f"Share of the n = {rows[0]['n']} failures of each type{left}; whiskers are exact 95% "
                "intervals. The names are those of arXiv 2402.14328, whose authors assigned the types "
                "by hand; here the first rule below that holds decides, so the shares depend on the "
                "rules.",
                width=600,
            )
        cells = [
            [kind, rule, percent(shares[kind], n=False), str(shares[kind]["n"])]
            for kind, rule in RULES.items()
        ]
        columns = ("type", "rule", "share [95%]", "n")
        yield Table("The rules, tried in this order", columns, cells, texts=2)
