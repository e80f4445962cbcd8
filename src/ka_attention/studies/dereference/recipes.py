"""The recipes of the dereference study."""

from __future__ import annotations

from dataclasses import dataclass

from ka_attention.errors import UserError
from ka_attention.harness.tasks.learning import TaskSettings
from ka_attention.harness.tasks.statements import Dereference


@dataclass(frozen=True, kw_only=True)
class DereferenceRecipe(TaskSettings):
    """Which arms with how many layers; as many names as the longest test needs.

    literals, chains: how many literals there are, and how many of them a sequence uses. Guessing gives 1 / chains.
    """

    name: str
    summary: str
    arms: tuple[str, ...] = ("softmax", "ka", "ka-token")
    layers: tuple[int, ...] = (1, 2, 3, 4)
    literals: int = 16
    chains: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chains <= self.literals:
            raise UserError(f"--set chains: expected 1 to literals = {self.literals}, got {self.chains}")

    @property
    def task(self) -> Dereference:
        return Dereference(max(self.length, *self.test_lengths), self.literals, self.chains)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        DereferenceRecipe(
            name="quick",
            summary="1 to 3 layers on chains in 32 and 96 statements, three seeds: minutes on two CPU cores",
            arms=("softmax", "ka", "ka-head"),
            layers=(1, 2, 3),
            length=32,
            test_lengths=(32, 96),
            train_samples=32 * 275,
            batch_size=32,
            test_samples=256,
        ),
        DereferenceRecipe(
            name="h100",
            summary="1 to 4 layers with seven times the training, three seeds: minutes on a GPU",
            length=32,
            test_lengths=(32, 96),
            train_samples=256 * 350,
            test_samples=2048,
            batch_size=256,
        ),
    )
}
