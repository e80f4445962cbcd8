"""What the hybrid study finds."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.harness.run.records import Json
from ka_attention.harness.tasks.learning import Learned
from ka_attention.harness.training.pretraining import Pretraining


@dataclass(frozen=True)
class TrainedArm:
    """One arm with one seed.

    operations:   floating-point operations of its training a token; ``utilisation`` of the accelerator's peak, where
                  that is known.
    gates:        for each KA layer the mean gate of each head after training.
    ungated_loss: of the trained model with its gates set to 0, which makes it softmax attention.
    trained_on:   versions, hardware and date (`harness.environment`): arms may be added on another machine.
    graphs:       whether its steps ran as CUDA graphs.
    text:         SHA-256 of the tokens it was trained on, on which its batches depend; None in records without it.
    alone:        whether it had its GPU to itself; else its seconds mean nothing, and the report leaves them out.
    """

    parameters: int
    training: Pretraining
    operations: float
    utilisation: float | None
    gates: dict[int, list[float]]
    ungated_loss: float | None
    trained_on: dict[str, Json]
    graphs: bool
    text: str | None = None
    alone: bool = True

    @property
    def loss(self) -> float:
        """Of the validation sequences after training."""
        return self.training.loss


@dataclass(frozen=True)
class Decoding:
    """Bytes that one sequence leaves, computed and measured, and seconds of a step of all sequences together."""

    computed_bytes: int
    measured_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class HybridResults:
    """By the arm's name: what was trained, one a seed, and how it decodes; the synthetic tasks.

    rates: by the arm's name and learning rate the losses of all seeds trained with it; ``arms`` holds each arm with the
           rate at which seed 0 has the lowest.
    """

    data: Json
    rates: dict[str, dict[float, tuple[float, ...]]]
    arms: dict[str, tuple[TrainedArm, ...]]
    decoding: dict[str, Decoding]
    tasks: dict[str, Learned]
