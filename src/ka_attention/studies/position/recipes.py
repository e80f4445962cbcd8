"""The recipes of the position study."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.harness.run.settings import PYTHIA_70M
from ka_attention.harness.training.lengths import LengthSettings


@dataclass(frozen=True, kw_only=True)
class PositionRecipe(LengthSettings):
    """Which arms, at which lengths."""

    name: str
    summary: str


RECIPES = {
    recipe.name: recipe
    for recipe in (
        PositionRecipe(
            name="quick",
            summary="a small GPT-NeoX, lengths 128 and 512, on the Python standard library: minutes on two CPU cores",
            lengths=(128, 512),
            vocab_size=2048,
            hidden_size=128,
            layers=2,
            heads=4,
            intermediate_size=512,
            train_samples=2048,
            validation_samples=256,
            batch_size=16,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=20,
            epochs=3,
            patience=3,
        ),
        PositionRecipe(
            name="h100",
            summary="Pythia-70M, lengths 128 to 2,048 (--data FOLDER --tokenizer FILE --seeds 3): minutes on a GPU",
            lengths=(128, 512, 2048),
            **PYTHIA_70M,
            train_samples=10_000,
            validation_samples=960,
            batch_size=32,
        ),
    )
}
