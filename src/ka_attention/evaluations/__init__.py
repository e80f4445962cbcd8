"""What is measured of a trained model: one file per question, each of them an ``Evaluation``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.training.trained import Trained
from ka_attention.report.document import Section


class Evaluation(Protocol):
    """A question to a trained model. A module with these two functions and the dataclass of its result is one."""

    def run(self, trained: Trained, /) -> Any:
        """The answer, a frozen dataclass; None where the question does not arise. The model is left as it was."""
        ...

    def sections(self, arms: Sequence[ArmResults[Any]], /) -> list[Section]:
        """Its part of the report: of every arm that answered, the answers of all seeds."""
        ...
