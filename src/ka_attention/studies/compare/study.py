"""The comparison: every arm trained on the same text from the same weights, then asked the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from ka_attention.harness.models.arms import Arm, ArmResults, arm, build
from ka_attention.harness.run.progress import bar, console
from ka_attention.harness.run.store import Store
from ka_attention.harness.run.timing import in_turns
from ka_attention.harness.tasks.learning import Learned, Plan, learn
from ka_attention.harness.text.data import Text, prepare
from ka_attention.harness.training.trained import Trained, train_arm
from ka_attention.report.document import Section
from ka_attention.studies.compare import report
from ka_attention.studies.compare.recipes import CHAIN_MODELS, COMPARE, CompareRecipe
from ka_attention.studies.compare.report import EVALUATIONS, Answers, Results

ROUNDS = 8  # turns of a training step, of which the median counts


class Comparison:
    """Softmax attention against KA-attention in training, and KV against KA cache in decoding."""

    name = "compare"
    question = "KA-attention against softmax attention"
    recipes: Mapping[str, Any] = COMPARE
    results = Results

    def run(self, recipe: CompareRecipe, store: Store, seeds: int) -> Results:
        """Train and evaluate every arm with every seed."""
        return self._run(recipe, store, seeds, evaluate=True)

    def train(self, recipe: CompareRecipe, store: Store, seeds: int) -> Results:
        """The first half of ``run``: train every arm with every seed."""
        return self._run(recipe, store, seeds, evaluate=False)

    def trained_seeds(self, recipe: CompareRecipe, store: Store) -> int:
        """With how many seeds every arm of the run in ``store`` is trained."""
        seeds = 0
        while all(store.done(_part("training", name, seeds)) for name in recipe.arms):
            seeds += 1
        return seeds

    def sections(self, recipe: CompareRecipe, results: Results) -> list[Section]:
        """The answer in short, the training, then a section for each evaluation."""
        return report.sections(recipe, results)

    def _run(self, recipe: CompareRecipe, store: Store, seeds: int, *, evaluate: bool) -> Results:
        arms = [arm(name) for name in recipe.arms]
        with console.status("reading the text, training the tokenizer"):
            text = prepare(recipe, recipe.vocab_size)
        store.identify(data=text.description)
        console.print(_announcement(recipe, text), soft_wrap=True)
        answers: dict[str, list[Answers]] = {each.name: [] for each in arms}
        with bar(f"{recipe.name}: all parts", _count(recipe, seeds, evaluate)) as store.on_part:
            for seed in range(seeds):
                for each in arms:
                    trained = _train(each, recipe, text, store, seed)
                    found = _evaluate(trained, store) if evaluate else {}
                    answers[each.name].append(Answers(trained.training, **found))
            steps = store.part("steps", _steps, recipe, text, arms) if evaluate else {}
            chains = _chains(recipe, store, seeds) if evaluate and recipe.chain_samples else {}
        found = {each.name: ArmResults(each, tuple(answers[each.name])) for each in arms}
        return Results(text.description, found, chains, steps)


def _count(recipe: CompareRecipe, seeds: int, evaluate: bool) -> int:
    """How many parts a run has."""
    trained = seeds * len(recipe.arms)
    if not evaluate:
        return trained
    chains = len(CHAIN_MODELS) * max(seeds, recipe.chains[1].least_seeds) if recipe.chain_samples else 0
    return trained * (1 + len(EVALUATIONS)) + 1 + chains


def _part(kind: str, name: str, seed: int) -> str:
    return f"{kind}/seed{seed}/{name}"


def _train(arm: Arm, recipe: CompareRecipe, text: Text, store: Store, seed: int) -> Trained:
    folder = store.folder(f"weights/seed{seed}/{arm.name}")
    training = store.part(_part("training", arm.name, seed), train_arm, arm, recipe, text, folder, seed)
    return Trained(arm, recipe, text, seed, training, folder, recipe.cache_samples)


def _evaluate(trained: Trained, store: Store) -> dict[str, Any]:
    answers = {}
    for name, evaluation in EVALUATIONS.items():
        with console.status(f"{trained.arm.label}: {name}"):
            answers[name] = store.part(_part(name, trained.arm.name, trained.seed), evaluation.run, trained)
    return answers


def _steps(recipe: CompareRecipe, text: Text, arms: list[Arm]) -> dict[str, float]:
    """Seconds of a training step, forward and backward, of each arm: the median of turns that all arms take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = text.train[: recipe.batch_size].to(device)
    ways = {each.name: partial(_step, build(each, recipe, 0).to(device), ids) for each in arms}  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, taken, _ in in_turns(ways, device, 1 + ROUNDS):
        seconds[name].append(taken)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first round warms up


def _step(model: Any, ids: Tensor) -> None:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad()


def _chains(recipe: CompareRecipe, store: Store, seeds: int) -> dict[str, Learned]:
    """What a KA layer is good for: softmax layers and one KA layer on chains of references."""
    task, settings = recipe.chains
    plans = {f"chains/{name}/{layers}": Plan("chains", task, arm(name), layers) for name, layers in CHAIN_MODELS}
    return learn(plans, settings, store, seeds)


def _announcement(recipe: CompareRecipe, text: Text) -> str:
    about = text.description
    return (
        f"[bold]{recipe.name}[/bold]: {escape(about.source)}, {recipe.train_samples:,} + "
        f"{recipe.validation_samples:,} sequences of {recipe.sequence_length} tokens from {about.train_documents:,} + "
        f"{about.validation_documents:,} documents, vocabulary {about.tokenizer_size:,}"
    )


COMPARISON = Comparison()
