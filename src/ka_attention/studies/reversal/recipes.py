"""The recipes of the study of the Reversal Curse."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.harness.run.settings import ModelSettings, TrainingSettings
from ka_attention.studies.reversal.facts import BUILT_IN


@dataclass(frozen=True, kw_only=True)
class ReversalRecipe(ModelSettings, TrainingSettings):
    """One run of the experiment.

    data:      "built-in", or a folder in the layout of Berglund et al. with a ``names.txt`` (``reversal_facts.load``).
    tokenizer: "train" for a byte-level BPE trained on the facts, else a tokenizer file or Hub name.
    arms:      attention configurations; the first is asked through the other kind of cache too.
    people:    people in each of the three groups of the built-in facts.
    """

    name: str
    summary: str
    data: str = BUILT_IN
    tokenizer: str = "train"
    arms: tuple[str, ...] = ("softmax", "ka", "ka-head")
    people: int = 24


RECIPES = {
    recipe.name: recipe
    for recipe in (
        ReversalRecipe(
            name="quick",
            summary="72 invented people, two layers: minutes on two CPU cores",
            vocab_size=1024,
            hidden_size=128,
            layers=2,
            heads=4,
            intermediate_size=512,
            batch_size=32,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=50,
            epochs=10,
            patience=10,
        ),
        ReversalRecipe(
            name="h100",
            summary="six layers, for the facts of Berglund et al. (--data FOLDER --seeds 3): minutes on a GPU",
            vocab_size=4096,
            hidden_size=512,
            layers=6,
            heads=8,
            intermediate_size=2048,
            batch_size=64,
            learning_rate=5e-4,
            schedule="cosine",
            warmup_steps=100,
            epochs=20,
            patience=20,
            people=100,
        ),
    )
}
