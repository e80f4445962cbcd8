"""Hybrids on plentiful text: what a few narrow layers of KA-attention give a softmax model, and what else would do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ka_attention.errors import UserError
from ka_attention.harness.models.mixers import remembered_bytes, streaming
from ka_attention.harness.models.passes import Passes, captured
from ka_attention.harness.models.saved import attention
from ka_attention.harness.run import environment, workers
from ka_attention.harness.run.progress import console
from ka_attention.harness.run.records import Json
from ka_attention.harness.run.store import Store
from ka_attention.harness.run.timing import now
from ka_attention.harness.text.tokens import TokenText, enough, prepare
from ka_attention.harness.training.pretraining import (
    evaluate,
    mean_loss,
    operations,
    pretrain,
    scores,
    utilisation,
    watched_gates,
)
from ka_attention.hf import KACache, KAStaticCache, cache_bytes
from ka_attention.report.document import Section
from ka_attention.studies.hybrid import report, tasks
from ka_attention.studies.hybrid.models import HybridArm, arm, build, count, state_bytes
from ka_attention.studies.hybrid.recipes import RECIPES, HybridRecipe
from ka_attention.studies.hybrid.results import Decoding, HybridResults, TrainedArm


class HybridStudy:
    """Train every arm on the same text, decode with each, and teach some the synthetic tasks."""

    name = "hybrid"
    question = "Where text is plentiful, what do narrow layers of KA-attention give a hybrid?"
    recipes: Mapping[str, Any] = RECIPES
    results = HybridResults

    def run(self, recipe: HybridRecipe, store: Store, seeds: int) -> HybridResults:
        """Train the arms of all seeds, several side by side where the recipe says so."""
        arms = recipe.chosen()
        with console.status("reading the text"):
            began_with = store.part("text", described, recipe, store)
            text = read(recipe, store)
        if text.description != began_with:
            raise UserError(f"--data: it is not the text with which the run in {store.out} began; name another --out")
        rates = [recipe.learning_rate * factor for factor in recipe.rates]

        def part(name: str, rate: float, seed: int) -> workers.Part:
            return workers.Part(f"{name}/{rate:g}/seed{seed}", train_arm, (recipe, name, rate, seed, text, store.out))

        def trained(name: str, rate: float) -> tuple[TrainedArm, ...]:
            """One a seed, also those of runs before that had more seeds."""
            done = itertools.takewhile(store.done, (part(name, rate, seed).name for seed in itertools.count()))
            return tuple(store.part(*_flat(part(name, rate, seed))) for seed, _ in enumerate(done))

        workers.finish([part(name, rate, 0) for name in arms for rate in rates], store, recipe.gpus)
        best = {}
        for name in arms:
            losses = {rate: trained(name, rate)[0].loss for rate in rates}
            best[name] = min(losses, key=losses.__getitem__)
        workers.finish([part(name, best[name], n) for n in range(1, seeds) for name in arms], store, recipe.gpus)
        runs = {name: {rate: trained(name, rate) for rate in rates} for name in arms}
        for name, of_rates in runs.items():
            texts = {one.text for found in of_rates.values() for one in found} - {None}
            if texts - {text.description["fingerprint"][0]}:
                raise UserError(f"--out: {store.out}/parts/{name} was trained on another text; delete it")
        decoding = {name: store.part(f"{name}/decoding", decode, recipe, name) for name in arms}
        return HybridResults(
            data=text.description,
            rates={
                name: {rate: tuple(one.loss for one in found) for rate, found in of_rates.items()}
                for name, of_rates in runs.items()
            },
            arms={name: runs[name][best[name]] for name in arms},
            decoding=decoding,
            tasks=tasks.teach(recipe, store, seeds),
        )

    def sections(self, recipe: HybridRecipe, results: HybridResults) -> list[Section]:
        """Loss against cache bytes, time of training and of decoding; gates; tasks."""
        return [*report.sections(recipe, results), *tasks.sections(recipe, results.tasks)]


def _flat(part: workers.Part) -> tuple[Any, ...]:
    return part.name, part.work, *part.arguments


def read(recipe: HybridRecipe, store: Store) -> TokenText:
    """The text as token files in the run's folder."""
    length = recipe.sequence_length
    wanted = recipe.validation_sequences * length + 1
    text = prepare(
        recipe.data,
        recipe.tokenizer,
        recipe.vocab_size,
        store.folder("tokens"),
        train_tokens=recipe.train_tokens + length,
        validation_tokens=wanted,
    )
    enough(text.train, "train", length, recipe.batch_size)
    enough(text.validation, "validation", length, recipe.validation_sequences)
    return text


def described(recipe: HybridRecipe, store: Store) -> dict[str, Json]:
    """What the text holds."""
    return read(recipe, store).description


def train_arm(recipe: HybridRecipe, name: str, rate: float, seed: int, text: TokenText, out: Path) -> TrainedArm:
    """Train one arm with one learning rate and seed, and ask what its gates are and what it is without them."""
    each = arm(name)
    said = f"{each.label}{f', rate {rate:g}' if len(recipe.rates) > 1 else ''}, seed {seed}"
    trained_on = environment.describe()  # before minutes of training: it fails where the package is not installed
    tokens = text.train.fingerprint()
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passes = _passes(recipe.compiled and device.type == "cuda")
    settings = replace(recipe, learning_rate=rate)
    model: Any = build(each, recipe, recipe.sequence_length, seed).to(device)
    folder = out / "checkpoints" / f"{name}-{rate:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    training = pretrain(
        model,
        (text.train, text.validation),
        settings,
        passes,
        folder,
        seed=seed,
        label=said,
        gate_rate=each.gate_rate,
        progress=workers.progress,
    )
    folder.rmdir()
    gates: dict[int, list[float]] = {}
    ungated = None
    if each.mixer == "ka":
        score = partial(scores, model, passes)
        with watched_gates(model) as gates:
            evaluate(score, text.validation, replace(settings, validation_sequences=recipe.batch_size), device)
        with attention(model, "kv"):
            ungated = mean_loss(evaluate(score, text.validation, settings, device))
    work = operations(model, attended(each, recipe))
    console.print(f"{said}: loss {training.loss:.4f}, {training.tokens_per_s:,.0f} tokens/s", soft_wrap=True)
    return TrainedArm(
        parameters=count(model),
        training=training,
        operations=work,
        utilisation=utilisation(work * training.tokens_per_s),
        gates=gates,
        ungated_loss=ungated,
        trained_on=trained_on,
        graphs=passes.graphs,
        text=tokens,
    )


def attended(each: HybridArm, recipe: HybridRecipe) -> list[float]:
    """For each layer, how many tokens a token attends to on average; 0 where the layer does not attend."""
    seen = dict(zip(each.narrow(recipe.layers), each.windows(recipe.layers), strict=True))
    return [seen.get(i, (recipe.sequence_length + 1) / 2) or 0 for i in range(recipe.layers)]


@cache
def _passes(compiled: bool) -> Passes:
    """One for a process: what is compiled for one arm serves the next."""
    return Passes(compiled=compiled, graphs=compiled)


@torch.inference_mode()
def decode(recipe: HybridRecipe, name: str) -> Decoding:
    """Bytes of an arm's state after ``sequence_length`` tokens, and the time of a decoding step; weights are random.

    The state is kept in bfloat16 on CUDA, else float32. A step is one token for each of ``decode_batch`` sequences
    after ``sequence_length`` others, through a cache of fixed size; on CUDA the replay of a graph. The median of
    ``decode_steps`` counts, after as many that do not.
    """
    each = arm(name)
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length, batch = recipe.sequence_length, recipe.decode_batch
    computed = state_bytes(each, recipe, length, dtype.itemsize)
    model: Any = build(each, recipe, length, 0).to(device, dtype).eval()
    past, token = (torch.zeros(batch, n, dtype=torch.long, device=device) for n in (length, 1))
    with streaming(model, batch):
        grown: Any = KACache(model.config) if model.config._attn_implementation == "ka" else DynamicCache()
        step(model, past, 0, grown)
        measured = (_filled(grown) + remembered_bytes(model)) // batch
    del grown
    seconds = []
    with streaming(model, batch):
        read_on = decoder(model, past)
        read_on = captured(read_on, token) if device.type == "cuda" else read_on
        for _ in range(2 * recipe.decode_steps):
            began = now(device)
            read_on(token)
            seconds.append(now(device) - began)
    return Decoding(computed, measured, statistics.median(seconds[recipe.decode_steps :]))


def decoder(model: Any, past: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of one more token ``[B, 1]`` after ``past`` ``[B, T]`` that gives its logits, at every call those
    after T tokens: through a cache of fixed size, without a word from the device, so that a CUDA graph can hold it."""
    length, layers = past.shape[1], model.config.num_hidden_layers
    kind: Any = KAStaticCache if model.config._attn_implementation == "ka" else StaticCache
    cache_ = kind(config=model.config, max_cache_len=length + 1)
    step(model, past, 0, cache_)
    counters = torch.full((layers,), length, device=past.device)  # one tensor: setting them back is one kernel
    for counter, layer in zip(counters, cache_.layers, strict=True):
        layer.cumulative_length = counter
    all_seen = torch.ones(len(past), 1, 1, length + 1, dtype=torch.bool, device=past.device)

    def read_on(token: torch.Tensor) -> torch.Tensor:
        counters.fill_(length)
        return step(model, token, length, cache_, all_seen)

    return read_on


def step(model: Any, ids: torch.Tensor, position: int, cache_: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The next tokens' logits. Not by way of the model, whose mask asks a first layer that may keep no tokens."""
    x = model.model.embed_tokens(ids)
    positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
    embeddings = model.model.rotary_emb(x, position_ids=positions)
    for layer in model.model.layers:
        mixed, _ = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=embeddings, attention_mask=mask, past_key_values=cache_
        )
        x = x + mixed
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[:, -1:]))


def _filled(cache_: Any) -> int:
    """Bytes of keys and values in the layers that keep some."""
    return cache_bytes(type("Filled", (), {"layers": [each for each in cache_.layers if each.is_initialized]})())


HYBRID = HybridStudy()
