"""A language model trained on text, as an arm has it: what evaluations look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from ka_attention.harness.models.arms import Arm, build
from ka_attention.harness.run.settings import LanguageModelSettings
from ka_attention.harness.text.data import Sequences, Text
from ka_attention.harness.training.trainer import Training, load_weights, train

BATCH = 32  # sequences read at once by an evaluation


def steps_for(share: float, original_tokens: int, length: int, batch: int) -> int:
    """Steps of ``batch`` sequences of ``length`` tokens that read ``share`` of the original training tokens."""
    return max(1, round(share * original_tokens / (batch * length)))


def train_arm(
    arm: Arm, settings: LanguageModelSettings, text: Text, folder: Path, seed: int, label: str | None = None
) -> Training:
    """Train an arm from scratch and leave model and tokenizer in ``folder``; ``label`` is what the console calls it."""
    model, sets = build(arm, settings, seed), (Sequences(text.train), Sequences(text.validation))
    return train(model, *sets, settings, folder, seed=seed, label=label or arm.label, tokenizer=text.tokenizer)


@dataclass(frozen=True)
class Trained:
    """A trained arm.

    folder:      where ``train_arm`` left it; ``model`` is loaded when it is first asked for.
    sample_size: how many validation sequences are read by evaluations that ask many times.
    """

    arm: Arm
    settings: LanguageModelSettings
    text: Text
    seed: int
    training: Training
    folder: Path
    sample_size: int

    @cached_property
    def model(self) -> GPTNeoXForCausalLM:
        """In evaluation mode, on the GPU if there is one."""
        model = build(self.arm, self.settings, self.seed)
        load_weights(model, self.folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # mistyped in transformers
        return model.eval()

    @property
    def is_plain_softmax(self) -> bool:
        """Whether it was trained with plain softmax attention, so that a KA cache is a swap that could be repaired."""
        return self.arm.ka is None

    @property
    def tokens(self) -> int:
        """What the best weights were trained on, repeats counted."""
        return self.text.train.numel() * self.training.best_epoch

    @property
    def sample(self) -> Tensor:
        """``sample_size`` validation sequences, spread over all of them."""
        held = len(self.text.validation)
        return self.text.validation[torch.arange(self.sample_size) * held // self.sample_size]
