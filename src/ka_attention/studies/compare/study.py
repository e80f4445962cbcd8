"""The comparison: every arm trained on the same text from the same weights, then asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from ka_attention.evaluations import adapters, caches, conversion, decoding, heads, memory, repair, reversal
from ka_attention.harness import perplexity
from ka_attention.harness.arms import Arm, arm, build
from ka_attention.harness.data import Sequences, Text, prepare
from ka_attention.harness.progress import console
from ka_attention.harness.statistics import deviation, mean, values
from ka_attention.harness.store import Json, Store
from ka_attention.harness.training import load_weights, train
from ka_attention.report.document import Section
from ka_attention.studies.compare import report as compare_report
from ka_attention.studies.compare.recipes import COMPARE, CompareRecipe

BATCH = 32  # sequences read at once by an evaluation


@dataclass(frozen=True)
class Trained:
    """What an evaluation may look at."""

    model: GPTNeoXForCausalLM
    arm: Arm
    recipe: CompareRecipe
    text: Text
    seed: int
    training: dict[str, Json]

    @property
    def repairable(self) -> bool:
        """Whether it was trained with plain softmax attention, so that a KA cache is a swap that could be repaired."""
        return self.arm.ka is None

    @property
    def tokens(self) -> int:
        """What the best weights were trained on, repeats counted."""
        return self.text.train.numel() * self.training["best_epoch"]

    @property
    def sample(self) -> Tensor:
        """The ``cache_samples`` validation sequences of evaluations that ask many times, spread over all of them."""
        count, held = self.recipe.cache_samples, len(self.text.validation)
        return self.text.validation[torch.arange(count) * held // count]


class Evaluation(NamedTuple):
    """A question to every trained model: its name in the results, its figures, and its part of the report."""

    name: str
    run: Callable[[Trained], dict[str, Json]]
    sections: Callable[[dict[str, Json]], list[Section]]


def _caches(of: Trained) -> dict[str, Json]:
    return caches.evaluate(of.model, of.sample, batch_size=BATCH)


def _perplexity(of: Trained) -> dict[str, Json]:
    return perplexity.evaluate(of.model, of.text.validation, batch_size=BATCH)


def _memory(of: Trained) -> dict[str, Json]:
    return memory.evaluate(of.model.config, of.arm.ka, length=of.recipe.sequence_length)


def _reversal(of: Trained) -> dict[str, Json]:
    return reversal.evaluate(of.model, of.text.tokenizer, max_length=of.recipe.sequence_length)


def _adapters(of: Trained) -> dict[str, Json]:
    if not of.repairable:
        return {}
    steps = conversion.steps_for(adapters.SHARE, of.tokens, of.recipe.sequence_length, adapters.BATCH)
    return adapters.evaluate(of.model, of.text.train, of.sample, steps=steps, batch_size=BATCH)


def _heads(of: Trained) -> dict[str, Json]:
    if not of.repairable:
        return {}
    return heads.evaluate(of.model, of.text.train[: of.recipe.cache_samples], of.sample, batch_size=BATCH)


def _conversion(of: Trained) -> dict[str, Json]:
    if not of.repairable:
        return {}
    return conversion.evaluate(
        of.model,
        of.text.train,
        of.sample,
        original_tokens=of.tokens,
        learning_rate=of.recipe.mean_learning_rate,  # at the peak of a schedule even softmax would get worse
        batch_size=BATCH,
        seed=of.seed,
    )


def _decoding(of: Trained) -> dict[str, Json]:
    first = of.repairable and of.seed == 0  # speed depends on the model's shape, not on its weights
    return decoding.evaluate(of.model) if first else {}


EVALUATIONS = (
    Evaluation("caches", _caches, caches.sections),
    Evaluation("perplexity", _perplexity, perplexity.sections),
    Evaluation("memory", _memory, memory.sections),
    Evaluation("adapters", _adapters, repair.adapters),
    Evaluation("heads", _heads, repair.heads),
    Evaluation("conversion", _conversion, repair.conversion),
    Evaluation("decoding", _decoding, decoding.sections),
    Evaluation("reversal", _reversal, reversal.sections),
)


class Comparison:
    """Softmax attention against KA-attention in training, and KV against KA cache in decoding."""

    name = "compare"
    question = "KA-attention against softmax attention"
    recipes: Mapping[str, Any] = COMPARE

    def run(self, recipe: CompareRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train and evaluate every arm with every seed."""
        return self._run(recipe, store, seeds, evaluate=True)

    def train(self, recipe: CompareRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """The first half of ``run``: train every arm with every seed."""
        return self._run(recipe, store, seeds, evaluate=False)

    def trained_seeds(self, recipe: CompareRecipe, store: Store) -> int:
        """With how many seeds every arm of the run in ``store`` is trained."""
        seeds = 0
        while all(store.done(_part("training", name, seeds)) for name in recipe.arms):
            seeds += 1
        return seeds

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """The answer in short, the training, then a section for each evaluation."""
        return [
            *compare_report.sections(results),
            *(section for evaluation in EVALUATIONS for section in evaluation.sections(results)),
        ]

    def _run(self, recipe: CompareRecipe, store: Store, seeds: int, *, evaluate: bool) -> dict[str, Json]:
        arms = [arm(name) for name in recipe.arms]
        with console.status("reading the text, training the tokenizer"):
            text = prepare(recipe, recipe.vocab_size)
        store.identify(data=text.description)
        console.print(_announcement(recipe, text), soft_wrap=True)
        results: dict[str, Json] = {"data": text.description, "arms": {}}
        for each in arms:
            settings = None if each.ka is None else each.ka.to_dict()
            results["arms"][each.name] = {"label": each.label, "ka": settings, "seeds": []}
        for seed in range(seeds):
            for each in arms:
                answers = {"training": _train(each, recipe, text, store, seed)}
                if evaluate:
                    answers |= _evaluate(each, recipe, text, store, seed, answers["training"])
                results["arms"][each.name]["seeds"].append(answers)
        for entry in results["arms"].values():
            ppl = values(entry, "training", "best_val_ppl")
            entry["val_ppl"] = {"mean": mean(ppl), "sd": deviation(ppl), "n": len(ppl)}
        return results


def _part(kind: str, name: str, seed: int) -> str:
    return f"{kind}/seed{seed}/{name}"


def _weights(arm: Arm, store: Store, seed: int) -> Path:
    return store.folder(f"weights/seed{seed}/{arm.name}")


def _train(arm: Arm, recipe: CompareRecipe, text: Text, store: Store, seed: int) -> dict[str, Json]:
    def work() -> dict[str, Json]:
        model, folder = build(arm, recipe, seed), _weights(arm, store, seed)
        sets = Sequences(text.train), Sequences(text.validation)
        return train(model, *sets, recipe, folder, seed=seed, label=arm.label, tokenizer=text.tokenizer)

    return store.part(_part("training", arm.name, seed), work)


def _evaluate(
    arm: Arm, recipe: CompareRecipe, text: Text, store: Store, seed: int, training: dict[str, Json]
) -> dict[str, Json]:
    @cache
    def trained() -> Trained:
        model = build(arm, recipe, seed)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # mistyped in transformers
        load_weights(model, _weights(arm, store, seed))
        return Trained(model.eval(), arm, recipe, text, seed, training)

    answers = {}
    for evaluation in EVALUATIONS:
        with console.status(f"{arm.label}: {evaluation.name}"):
            name = _part(evaluation.name, arm.name, seed)
            answers[evaluation.name] = store.part(name, partial(_ask, evaluation, trained))
    return answers


def _ask(evaluation: Evaluation, trained: Callable[[], Trained]) -> dict[str, Json]:
    return evaluation.run(trained())


def _announcement(recipe: CompareRecipe, text: Text) -> str:
    about = text.description
    return (
        f"[bold]{recipe.name}[/bold]: {about['source']}, {recipe.train_samples:,} + {recipe.validation_samples:,} "
        f"sequences of {recipe.sequence_length} tokens from {about['train_documents']:,} + "
        f"{about['validation_documents']:,} documents, vocabulary {about['tokenizer_size']:,}"
    )


COMPARISON = Comparison()
