"""The Reversal Curse over whole sentences: perplexity of facts told forward and backward, and of shuffled facts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ka_attention.harness.figures.statistics import caution, cell, changes, mean, percent_cell, seeds_of
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.models.saved import NAMES, attention, own_cache
from ka_attention.harness.training.perplexity import token_losses
from ka_attention.harness.training.trained import Trained
from ka_attention.report.document import Section, Table

KNOWN = 5.0  # percent: how far the perplexity of true facts must lie below that of shuffled ones to call them known
GROUPS = {"real": "real-world facts", "fictitious": "fictitious facts"}


@dataclass(frozen=True)
class Told:
    """Perplexities of all tokens of the sentences of one telling each; ``ratio`` is forward / backward."""

    forward_ppl: float
    forward_shuffled_ppl: float
    backward_ppl: float
    backward_shuffled_ppl: float
    ratio: float


@dataclass(frozen=True)
class Reversal:
    """By kind of cache ("kv", "ka") and group ("all", "real", "fictitious"); ``own`` is the model's own kind."""

    sentences: int
    own: str
    by_cache: dict[str, dict[str, Told]]


def run(trained: Trained) -> Reversal:
    """Sentences are cut at the length that the model was trained with."""
    return evaluate(trained.model, trained.text.tokenizer, max_length=trained.settings.sequence_length)


def sentences() -> dict[str, dict[str, list[str]]]:
    """The built-in facts as sentences, ``[group][telling]``, in a fixed order.

    Groups: ``real`` and ``fictitious``, equally many. Tellings: ``forward`` ("A is the … of B"), ``backward`` ("B's …
    is A") and, as controls, ``forward_shuffled`` and ``backward_shuffled``: the same sentences with every B replaced
    by that of the next fact of the same relation, just as fluent and never true.
    """
    told: dict[str, dict[str, list[str]]] = {group: {} for group in GROUPS}
    for relation in json.loads(resources.files(__package__).joinpath("reversal.json").read_text(encoding="utf-8")):
        group = told["fictitious" if relation["fictitious"] else "real"]
        entities, partners = zip(*relation["pairs"], strict=True)
        for order in ("forward", "backward"):
            for telling, others in ((order, partners), (f"{order}_shuffled", partners[1:] + partners[:1])):
                facts = zip(entities, others, strict=True)
                group.setdefault(telling, []).extend(relation[order].format(a=a, b=b) for a, b in facts)
    return told


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, *, max_length: int) -> Reversal:
    """Perplexity of whole sentences told forward and backward, under both kinds of cache.

    ``tokenizer`` is a transformers tokenizer; its end-of-text token, which separates documents in training, stands
    before each sentence, so that the first entity is scored too. Sentences are cut at ``max_length`` tokens. A cache
    and the parallel operator give the same probabilities, so nothing needs to be decoded.
    """
    training = model.training
    model.eval()
    encoded = {
        group: {telling: _encode(tokenizer, texts, max_length) for telling, texts in tellings.items()}
        for group, tellings in sentences().items()
    }
    by_cache: dict[str, dict[str, Told]] = {}
    for kind in NAMES:
        with attention(model, kind):
            totals = {
                group: {telling: _total_loss(model, rows) for telling, rows in tellings.items()}
                for group, tellings in encoded.items()
            }
        pooled = {
            telling: torch.stack([totals[group][telling] for group in GROUPS]).sum(0) for telling in totals["real"]
        }
        by_cache[kind] = {group: _figures(tellings) for group, tellings in {"all": pooled, **totals}.items()}
    model.train(training)
    count = sum(len(tellings["forward"]) for tellings in encoded.values())
    return Reversal(count, own_cache(model), by_cache)


def _figures(totals: dict[str, Tensor]) -> Told:
    ppl = {f"{telling}_ppl": math.exp(loss / tokens) for telling, (loss, tokens) in totals.items()}
    return Told(**ppl, ratio=ppl["forward_ppl"] / ppl["backward_ppl"])


def _encode(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[tokenizer.eos_token_id, *row][:max_length] for row in ids]


def _total_loss(model: Any, rows: list[list[int]]) -> Tensor:
    """[summed negative log-likelihood, scored tokens], float64. Padding stands on the right, where no token sees it."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    scored = torch.tensor([[1] * (len(row) - 1) + [0] * (length - len(row)) for row in rows], device=model.device)
    losses = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    return torch.stack([(losses * scored).sum(), scored.sum().double()]).cpu()


def sections(arms: Sequence[ArmResults[Reversal]]) -> list[Section]:
    """Forward and backward perplexity and their ratio for every arm, with the control, and under both caches."""
    facts = arms[0].seeds[0].sentences
    paragraphs = [
        f"{facts} facts, half of them real and half fictitious, told forward (*A is the … of B*) and backward (*B's "
        "… is A*). The **reversal ratio** is forward PPL / backward PPL over whole sentences.",
        "Read it with its **control**, the same sentences with their Bs shuffled. A ratio near 1 can mean equally "
        "bad: only a model that finds true facts clearly less surprising than shuffled ones knows them, and only "
        "then does the ratio speak of the Reversal Curse. Whole sentences also mix in how likely the first entity "
        "and the wording are; the two orders differ in both.",
        *_words(arms),
        caution(arms),
    ]
    own = Table(
        f"Facts under each model's own attention ({seeds_of(arms)}; last columns: true against shuffled, PPL)",
        ["arm", "facts", "forward PPL", "backward PPL", "ratio", "forward", "backward"],
        [
            [arm.label, name, *_cells(arm, _own(arm), group), *map(percent_cell, _gains(arm, group))]
            for arm in arms
            for group, name in {"all": "all", **GROUPS}.items()
        ],
    )
    caches = Table(
        f"All facts under each cache ({seeds_of(arms)})",
        ["trained as", "cache", "forward PPL", "backward PPL", "ratio"],
        [
            [arm.label, f"{NAMES[kind]} ({'own' if kind == _own(arm) else 'swap'})", *_cells(arm, kind, "all")]
            for arm in arms
            for kind in NAMES
        ],
    )
    return [Section("Reversal", paragraphs, [own, caches])]


def _own(arm: ArmResults[Reversal]) -> str:
    return arm.seeds[0].own


def _figure(arm: ArmResults[Reversal], kind: str, group: str, key: str) -> list[float]:
    return arm.each(lambda found: getattr(found.by_cache[kind][group], key))


def _cells(arm: ArmResults[Reversal], kind: str, group: str) -> list[str]:
    keys = {"forward_ppl": 1, "backward_ppl": 1, "ratio": 3}
    return [cell(_figure(arm, kind, group, key), digits) for key, digits in keys.items()]


def _gains(arm: ArmResults[Reversal], group: str) -> list[list[float]]:
    """Percent by which PPL of true facts differs from that of shuffled ones, forward and backward, one a seed."""
    return [
        changes(*(_figure(arm, _own(arm), group, f"{order}{suffix}_ppl") for suffix in ("", "_shuffled")))
        for order in ("forward", "backward")
    ]


def _words(arms: Sequence[ArmResults[Reversal]]) -> list[str]:
    """What the ratios are worth, judged by the real facts (nobody can know the fictitious ones); like arms together."""
    judgements: dict[str, list[str]] = {}
    for arm in arms:
        forward, backward = (mean(gain) < -KNOWN for gain in _gains(arm, "real"))
        if forward and backward:
            judgement = "in **both orders**: no Reversal Curse shows in whole sentences"
        elif forward or backward:
            judgement = (
                f"told **{'forward' if forward else 'backward'} only**, which is what the Reversal Curse looks like"
            )
        else:
            judgement = "in **neither order**, so that the ratio says **nothing** about the Reversal Curse"
        ratio = cell(_figure(arm, _own(arm), "all", "ratio"), 3)
        judgements.setdefault(judgement, []).append(f"{arm.label} (ratio {ratio})")
    return [
        f"Real-world facts count as known where their PPL is at least {KNOWN:.0f} % below that of shuffled ones. "
        + " ".join(f"Known {judgement}: {'; '.join(labels)}." for judgement, labels in judgements.items())
    ]
