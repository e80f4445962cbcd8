"""The Reversal Curse: facts are trained in one order; is the answer known when they are asked for in the other?

The experiment is that of Berglund et al., "The Reversal Curse" (arXiv 2309.12288), on models trained from scratch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from ka_attention.harness.models.arms import Arm, arm, build
from ka_attention.harness.models.saved import NAMES, attention
from ka_attention.harness.run.progress import console
from ka_attention.harness.run.store import Store
from ka_attention.harness.text import tokenizer as tokenizers
from ka_attention.harness.text.data import Sequences
from ka_attention.harness.training.perplexity import token_losses
from ka_attention.harness.training.trainer import Training, load_weights, train
from ka_attention.report.document import Section
from ka_attention.studies.reversal import report
from ka_attention.studies.reversal.facts import CONTEXT, SAME, Question, Row, load
from ka_attention.studies.reversal.recipes import RECIPES, ReversalRecipe
from ka_attention.studies.reversal.report import Answered, Asked, Data, Entry, Results

BATCH = 64


@dataclass(frozen=True)
class Quiz:
    """What models are trained on, what their weights are chosen by, and what they are asked."""

    tokenizer: Any
    training_set: Sequences
    known: Sequences
    questions: dict[str, list[Question]]


class Reversal:
    """Train on facts in one order and ask in both, of each attention, and of the first one through the other cache."""

    name = "reversal"
    question = "Does KA-attention, or a KA cache, change the Reversal Curse?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: ReversalRecipe, store: Store, seeds: int) -> Results:
        """Train every arm with every seed on the facts, then ask."""
        arms = [arm(name) for name in recipe.arms]
        facts = load(recipe.data, recipe.people)
        sentences, questions = facts.sentences(), facts.questions()
        texts = [row.prompt + row.answer for row in sentences]
        tokenizer = tokenizers.load(recipe.tokenizer, texts, recipe.vocab_size)
        training_set = padded(tokenizer, sentences, facts.lessons())
        # Weights are chosen by the questions that the curse does not touch.
        known = padded(tokenizer, [], [right for key in (*SAME, "both", *CONTEXT) for right, _ in questions[key]])
        data = Data(
            source=facts.source,
            people={group: len(facts.people[f"{group}_prompts_train"]) for group in ("p2d", "d2p", "both")},
            sentences=len(sentences),
            questions=sum(map(len, questions.values())),
            fingerprint=hashlib.sha256(training_set.input_ids.numpy().tobytes()).hexdigest(),
        )
        store.identify(data=data)
        console.print(
            f"[bold]{recipe.name}[/bold]: {escape(facts.source)}, {sum(data.people.values())} people, "
            f"{len(sentences):,} training sentences, {data.questions:,} questions"
        )
        quiz = Quiz(tokenizer, training_set, known, questions)
        entries: dict[str, Entry] = {}
        for seed in range(seeds):
            for each in arms:
                caches = sorted(NAMES, key=each.own_cache.__ne__) if each is arms[0] else [each.own_cache]
                for cache, answered in _ask(each, caches, recipe, store, seed, quiz):
                    name = each.name if cache == each.own_cache else f"{each.name}+{cache}"
                    so_far = entries[name].seeds if name in entries else ()
                    entries[name] = Entry(each, cache, (*so_far, answered))
        return Results(data, entries)

    def sections(self, recipe: ReversalRecipe, results: Results) -> list[Section]:
        """Expectation and answer, accuracy and likelihood with their controls, whole sentences."""
        return report.sections(results)


@dataclass(frozen=True)
class _Model:
    """The trained model of an arm and seed, loaded when it is first asked."""

    arm: Arm
    recipe: ReversalRecipe
    seed: int
    folder: Path

    @cached_property
    def loaded(self) -> Any:
        model: Any = build(self.arm, self.recipe, self.seed)
        load_weights(model, self.folder)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _ask(
    arm: Arm, caches: list[str], recipe: ReversalRecipe, store: Store, seed: int, quiz: Quiz
) -> Iterator[tuple[str, Answered]]:
    """Train an arm, and ask it through each of ``caches``."""
    model = _Model(arm, recipe, seed, store.folder(f"weights/seed{seed}/{arm.name}"))
    training = store.part(f"training/seed{seed}/{arm.name}", _train, model, quiz)
    for cache in caches:
        name = arm.name if cache == arm.own_cache else f"{arm.name}+{cache}"
        with console.status(f"{arm.label}, {NAMES[cache]} cache: asking"):
            yield cache, Answered(store.part(f"asked/seed{seed}/{name}", _answers, model, quiz, cache), training)


def _train(model: _Model, quiz: Quiz) -> Training:
    fresh = build(model.arm, model.recipe, model.seed)
    sets, label = (quiz.training_set, quiz.known), model.arm.label
    return train(fresh, *sets, model.recipe, model.folder, seed=model.seed, label=label, tokenizer=quiz.tokenizer)


def _answers(model: _Model, quiz: Quiz, cache: str) -> dict[str, Asked]:
    return evaluate(model.loaded, quiz.tokenizer, quiz.questions, cache)


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
def evaluate(model: Any, tokenizer: Any, questions: dict[str, list[Question]], kind: str) -> dict[str, Asked]:
    """Ask ``model`` each set of questions through a ``kind`` ("kv" or "ka") cache."""
    asked = {}
    with attention(model, kind):
        for key, pairs in questions.items():
            right, wrong = ([pair[i] for pair in pairs] for i in (0, 1))
            log_p, sentences, tokens = _log_likelihood(model, tokenizer, right)
            asked[key] = Asked(
                accuracy=sum(_begins(model, tokenizer, right)) / len(right),
                right=log_p.mean().item(),
                wrong=_log_likelihood(model, tokenizer, wrong)[0].mean().item(),
                sentence_nll=-sentences.sum().item(),
                sentence_tokens=tokens,
            )
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
