"""The Reversal Curse: facts are trained in one order; is the answer known when they are asked for in the other?

The experiment is that of Berglund et al., "The Reversal Curse" (arXiv 2309.12288), on models trained from scratch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ka_attention.harness import tokenizer as tokenizers
from ka_attention.harness.arms import Arm, arm, build
from ka_attention.harness.data import Sequences
from ka_attention.harness.models import NAMES, attention, is_softmax
from ka_attention.harness.perplexity import token_losses
from ka_attention.harness.progress import console
from ka_attention.harness.settings import ModelSettings, TrainingSettings
from ka_attention.harness.store import Json, Store
from ka_attention.harness.training import load_weights, train
from ka_attention.report.document import Section
from ka_attention.studies.reversal import report as reversal_report
from ka_attention.studies.reversal.facts import BUILT_IN, CONTEXT, SAME, Question, Row, load

BATCH = 64


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


class Reversal:
    """Train on facts in one order and ask in both, of each attention, and of the first one through the other cache."""

    name = "reversal"
    question = "Does KA-attention, or a KA cache, change the Reversal Curse?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: ReversalRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train every arm with every seed on the facts, then ask."""
        arms = [arm(name) for name in recipe.arms]
        facts = load(recipe.data, recipe.people)
        sentences, questions = facts.sentences(), facts.questions()
        texts = [row.prompt + row.answer for row in sentences]
        tokenizer = tokenizers.load(recipe.tokenizer, texts, recipe.vocab_size)
        training_set = padded(tokenizer, sentences, facts.lessons())
        # Weights are chosen by the questions that the curse does not touch.
        known = padded(tokenizer, [], [right for key in (*SAME, "both", *CONTEXT) for right, _ in questions[key]])
        people = {group: len(facts.people[f"{group}_prompts_train"]) for group in ("p2d", "d2p", "both")}
        data = {
            "source": facts.source,
            "people": people,
            "sentences": len(sentences),
            "questions": sum(map(len, questions.values())),
            "fingerprint": hashlib.sha256(training_set.input_ids.numpy().tobytes()).hexdigest(),
        }
        store.identify(data=data)
        console.print(
            f"[bold]{recipe.name}[/bold]: {facts.source}, {sum(people.values())} people, {len(sentences):,} training "
            f"sentences, {data['questions']:,} questions"
        )
        results: dict[str, Json] = {"data": data, "arms": {}}
        for seed in range(seeds):
            for each in arms:
                for name, label, one in self._arm(each, recipe, store, seed, training_set, known, tokenizer, questions):
                    results["arms"].setdefault(name, {"label": label, "seeds": []})["seeds"].append(one)
        return results

    def _arm(
        self,
        arm: Arm,
        recipe: ReversalRecipe,
        store: Store,
        seed: int,
        training_set: Sequences,
        known: Sequences,
        tokenizer: Any,
        questions: dict[str, list[Question]],
    ) -> Iterator[tuple[str, str, Json]]:
        """(name, label, results) of one arm and seed, and for the first arm of its other cache."""
        folder = store.folder(f"weights/seed{seed}/{arm.name}")
        fresh = partial(build, arm, recipe, seed)

        @cache
        def trained() -> Any:
            model: Any = fresh()
            load_weights(model, folder)
            return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

        def work() -> Json:
            return train(fresh(), training_set, known, recipe, folder, seed=seed, label=arm.label, tokenizer=tokenizer)

        training = store.part(f"training/seed{seed}/{arm.name}", work)
        own = "kv" if is_softmax(arm.ka) else "ka"
        for kind in sorted(NAMES, key=own.__ne__) if arm.name == recipe.arms[0] else [own]:
            name, label = arm.name, arm.label
            if kind != own:
                name, label = f"{name}+{kind}", f"{label}, {NAMES[kind]} cache"
            with console.status(f"{label}: asking"):
                asked = store.part(
                    f"asked/seed{seed}/{name}",
                    lambda: evaluate(trained(), tokenizer, questions, kind),  # noqa: B023
                )
            yield name, label, {"training": training, "asked": asked}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """Expectation and answer, accuracy and likelihood with their controls, whole sentences."""
        return reversal_report.sections(results)


def padded(tokenizer: Any, sentences: list[Row], questions: list[Row]) -> Sequences:
    """Rows as training sequences, padded on the right with end-of-text tokens that carry no loss.

    The loss is on whole ``sentences`` and the end-of-text token after them, and on nothing but the answers of
    ``questions``.
    """
    prompts, answers = _encode(tokenizer, [*sentences, *questions])
    end = tokenizer.eos_token_id
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
    ids = torch.full((len(prompts), length), end)
    labels = torch.full((len(prompts), length), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = torch.tensor(prompt + answer)
        ids[i, : len(text)] = text
        if i < len(sentences):
            labels[i, : len(text) + 1] = ids[i, : len(text) + 1]
        else:
            labels[i, len(prompt) : len(text)] = text[len(prompt) :]
    return Sequences(ids, labels)


@torch.inference_mode()
def evaluate(
    model: Any, tokenizer: Any, questions: dict[str, list[Question]], kind: str
) -> dict[str, dict[str, float]]:
    """Ask ``model`` through a ``kind`` ("kv" or "ka") cache; for each set of questions:

    ``accuracy``: the share of answers with which the greedy continuation begins, both lower-cased and stripped;
    ``right``, ``wrong``: the mean log-probability, in nats, of the right and of the wrong answers given the prompts;
    ``sentence_nll`` and ``sentence_tokens``: the sum over whole sentences, prompt and right answer, in nats.
    """
    asked = {}
    with attention(model, kind):
        for key, pairs in questions.items():
            right, wrong = ([pair[i] for pair in pairs] for i in (0, 1))
            log_p, sentences, tokens = _log_likelihood(model, tokenizer, right)
            asked[key] = {
                "accuracy": sum(_begins(model, tokenizer, right)) / len(right),
                "right": log_p.mean().item(),
                "wrong": _log_likelihood(model, tokenizer, wrong)[0].mean().item(),
                "sentence_nll": -sentences.sum().item(),
                "sentence_tokens": tokens,
            }
    return asked


def _encode(tokenizer: Any, rows: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts after the end-of-text token, which separates documents, and answers."""
    prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False)["input_ids"]
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"]
    return [[tokenizer.eos_token_id, *prompt] for prompt in prompts], answers


def _log_likelihood(model: Any, tokenizer: Any, rows: list[Row]) -> tuple[Tensor, Tensor, int]:
    """Log-probability in nats, float64 [N], of each answer and of each whole sentence; tokens of all sentences."""
    answers, sentences = padded(tokenizer, [], rows), padded(tokenizer, rows, [])
    found = []
    for i in range(0, len(rows), BATCH):
        ids = answers.input_ids[i : i + BATCH].to(model.device)
        losses = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).cpu()
        scored = answers.labels[i : i + BATCH, 1:] != -100
        inside = sentences.input_ids[i : i + BATCH, 1:] != tokenizer.eos_token_id
        found.append(torch.stack([-(losses * mask).sum(1) for mask in (scored, inside)]))
    answer, sentence = torch.cat(found, dim=1)
    return answer, sentence, int((sentences.input_ids[:, 1:] != tokenizer.eos_token_id).sum())


def _begins(model: Any, tokenizer: Any, rows: list[Row]) -> list[bool]:
    """Whether the greedy continuation of each prompt begins with the answer."""
    prompts, answers = _encode(tokenizer, rows)
    found = []
    for i in range(0, len(rows), BATCH):
        batch = prompts[i : i + BATCH]
        length = max(map(len, batch))
        ids = torch.tensor([[tokenizer.eos_token_id] * (length - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch])
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(map(len, answers)) + 1,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        found += [
            text.strip().lower().startswith(row.answer.strip().lower())
            for text, row in zip(texts, rows[i : i + BATCH], strict=True)
        ]
    return found


REVERSAL = Reversal()
