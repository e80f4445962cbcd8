"""The recipes of the comparison."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import PYTHIA_70M, LanguageModelSettings
from ka_attention.harness.tasks.learning import TaskSettings
from ka_attention.harness.tasks.statements import Dereference

CHAIN_BATCH = 32
CHAIN_MODELS = (("ka", 1), ("softmax", 1), ("softmax", 2), ("softmax", 3))  # arms and numbers of layers


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(LanguageModelSettings):
    """One comparison: the same text, model and training for every arm.

    arms:          names of attention configurations (``arms.arm``); the first is what the others are compared with.
    cache_samples: validation sequences that are read token by token through each cache.
    chain_samples: training sequences of the synthetic task, chains of references, that softmax layers and one KA layer
                   learn beside the text; 0 leaves it out.
    """

    name: str
    summary: str
    arms: tuple[str, ...] = ("softmax", "ka", "ka-head", "softmax-w16", "ka-w16")
    cache_samples: int
    chain_samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise UserError(f"--set sequence_length: expected at least 2 tokens, got {self.sequence_length}")
        if self.train_samples < self.batch_size:
            raise UserError(f"--set batch_size: {self.batch_size} is more than train_samples = {self.train_samples}")
        if self.cache_samples > self.validation_samples:
            raise UserError(
                f"--set cache_samples: {self.cache_samples} is more than validation_samples = {self.validation_samples}"
            )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise UserError(f"--set arms: expected different names, got {','.join(self.arms) or 'none'}")
        if 0 < self.chain_samples < CHAIN_BATCH:
            raise UserError(f"--set chain_samples: expected 0 or {CHAIN_BATCH} and more, got {self.chain_samples}")

    @property
    def chains(self) -> tuple[Dereference, TaskSettings]:
        """The task, and how models are trained on it."""
        settings = TaskSettings(
            length=32,
            test_lengths=(32,),
            train_samples=self.chain_samples,
            test_samples=256,
            batch_size=CHAIN_BATCH,
            least_seeds=1,
        )
        return Dereference(settings.length, literals=16, chains=8), settings


COMPARE = {
    recipe.name: recipe
    for recipe in (
        CompareRecipe(
            name="quick",
            summary="a small GPT-NeoX on the Python standard library: minutes on two CPU cores, nothing downloaded",
            vocab_size=1024,
            hidden_size=64,
            layers=3,
            heads=4,
            intermediate_size=256,
            # A quarter of so small a head leaves two wavelengths, 6 and 628 tokens; these are eight, from 6 to 353.
            rotary_share=1.0,
            rotary_base=100.0,
            locality=3.0,
            # Few sequences, read until the validation loss stops falling, as in the reports.
            train_samples=640,
            validation_samples=256,
            batch_size=8,
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=20,
            epochs=9,
            patience=3,
            cache_samples=64,
            chain_samples=32 * 275,
        ),
        CompareRecipe(
            name="pythia-70m-training",
            summary="Pythia-70M from scratch, 10,000 × 128 tokens, batch 32: does KA match softmax in training?",
            **PYTHIA_70M,
            train_samples=10_000,
            validation_samples=1_000,
            batch_size=32,
            cache_samples=500,
        ),
        CompareRecipe(
            name="pythia-70m-cache",
            summary="Pythia-70M from scratch, 5,000 × 128 tokens, batch 8: what does a KA cache cost a softmax model?",
            **PYTHIA_70M,
            train_samples=5_000,
            validation_samples=500,
            batch_size=8,
            cache_samples=500,
        ),
    )
}
