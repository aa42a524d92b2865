"""What a step of the study is: one object that runs, sums up, and shows what it found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from mi_hops.facts.reading import Facts
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.result.result import Result
from mi_hops.study.context import Run, StudySettings
from mi_hops.study.folder import Folder
from mi_hops.study.numbers import Headline
from mi_hops.study.parts import Block

#: Tokens of an answer that is written out, about.
ANSWER = 6


@dataclass(frozen=True)
class Asked:
    """What is known of a study before it runs; any of its questions may fail or be answered.

    Attributes:
        facts: facts asked.
        prompts: different prompts of all of them, in all forms.
        wordings: wordings of all relations together, in the forms tried.
        question, length, tail: tokens of a question, of a prompt with its worked examples, and of
            a prompt from its first hop's last token on; means.
        n_layers: of the model.
        reading: products that reading one position through all layers takes.
        params: of the model, the products that a token takes.
        settings: the study's.
    """

    facts: int
    prompts: int
    wordings: int
    question: float
    length: float
    tail: float
    n_layers: int
    reading: int
    params: int
    settings: StudySettings

    def most(self, n: int) -> int:
        """Facts that a step takes at most."""
        return min(n, self.facts)

    def swept(self, rows: int) -> Work:
        """Interventions at the first hop or behind it: the tail is run, from half of the layers on average."""
        return Work(rows, rows * self.tail / 2)


@dataclass(frozen=True)
class Work:
    """Rows of forward passes, at most, and what they cost: tokens run through the whole model."""

    rows: int
    tokens: float


class Step(ABC):
    """One question of the study.

    Attributes:
        name: of its file, its entry in the summary and its section in the report.
        title, question: head of its section.
        short: what it is called where it was left out.
        shown_in: name of the step in whose section it is shown; its own by default.
        kind: what `run` returns and its file is loaded as.
        share: of a study's time budget.
        files: what it writes in the study's folder beside its own file.
        optional: whether a study has it only where its settings ask for it.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    question: ClassVar[str] = ""
    short: ClassVar[str]
    shown_in: ClassVar[str] = ""
    kind: ClassVar[type[Result] | type[Evaluation]] = Result
    share: ClassVar[float] = 0.0
    files: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False

    def wanted(self, facts: Facts, settings: StudySettings) -> bool:
        """Whether a study of these facts has this step."""
        return not self.optional or self.name in settings.also

    @abstractmethod
    def run(self, run: Run) -> Result | Evaluation:
        """Measure.

        Raises:
            Skip: there is nothing to work on.
            NoUsableFactError: likewise, counted by reason.
        """

    @abstractmethod
    def work(self, asked: Asked) -> Work:
        """What it will take, roughly; nothing runs."""

    @abstractmethod
    def summarise(self, result: Any, study: Folder) -> dict[str, Any]:
        """Its entry in ``summary.json``: estimates, each with n and interval."""

    def headlines(self, entry: dict[str, Any], left_out: dict[str, int]) -> Iterable[Headline]:
        """The numbers to be read first, from its entry and the reasons of facts left out."""
        return ()

    @abstractmethod
    def section(self, result: Any, study: Folder) -> Iterable[Block]:
        """What its section of the report shows."""

    def left_out(self, result: Any, study: Folder) -> Iterable[tuple[str, str]]:
        """(id, reason) of the facts that it could not use."""
        return result.skipped
