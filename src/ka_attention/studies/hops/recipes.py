"""The recipes of the hops study."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.errors import UserError
from ka_attention.harness.run.settings import PYTHIA_70M, LanguageModelSettings


@dataclass(frozen=True, kw_only=True)
class HopsRecipe(LanguageModelSettings):
    """A KA model and the lengths at which its walks are cut.

    checkpoint:   a saved KA model (folder or Hub name) to look at; none trains one.
    hops:         the greatest numbers of hops, ascending.
    walk_samples: validation sequences over which errors, hops and absorption are averaged.
    """

    name: str
    summary: str
    checkpoint: str | None = None
    hops: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    walk_samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hops or min(self.hops) < 1 or list(self.hops) != sorted(set(self.hops)):
            raise UserError(f"--set hops: expected ascending numbers from 1 on, got {','.join(map(str, self.hops))}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        HopsRecipe(
            name="quick",
            summary="a small KA model on the Python standard library: minutes on two CPU cores, nothing downloaded",
            vocab_size=2048,
            hidden_size=128,
            layers=4,
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
        HopsRecipe(
            name="h100",
            summary="Pythia-70M with KA from scratch (--data FOLDER --tokenizer FILE --seeds 3): minutes on a GPU",
            **PYTHIA_70M,
            train_samples=10_000,
            validation_samples=1_000,
            batch_size=32,
        ),
    )
}
