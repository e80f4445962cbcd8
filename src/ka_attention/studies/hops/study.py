"""How many hops KA-attention needs: perplexity, output error and time when its walk is cut, and how far it walks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import arm
from ka_attention.harness.models.attending import Call, attending, exact
from ka_attention.harness.models.saved import is_softmax, load_model_and_tokenizer, own_config
from ka_attention.harness.run.progress import console
from ka_attention.harness.run.store import Store
from ka_attention.harness.run.timing import in_turns
from ka_attention.harness.text.data import Text, prepare
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trained import BATCH, train_arm
from ka_attention.ops import truncated, walk
from ka_attention.report.document import Section
from ka_attention.studies.hops import report
from ka_attention.studies.hops.recipes import RECIPES, HopsRecipe
from ka_attention.studies.hops.report import Cut, Cuts, Model, Results, Row

ROUNDS = 5  # timings of each way to attend, of which the median counts


class Hops:
    """Cut the walk of a trained KA model at n hops; one hop is softmax attention."""

    name = "hops"
    question = "How many hops does KA-attention need?"
    recipes: Mapping[str, Any] = RECIPES
    results = Results

    def run(self, recipe: HopsRecipe, store: Store, seeds: int) -> Results:
        """Train a KA model with every seed, or take the checkpoint, and cut its walks."""
        vocab_size = recipe.vocab_size
        if recipe.checkpoint:
            if seeds > 1:
                raise UserError(f"--seeds: a checkpoint is one model, got {seeds}")
            model = load_model_and_tokenizer(recipe.checkpoint)[0]
            if is_softmax(own_config(model)):
                raise UserError(f"--set checkpoint: expected a KA model, {recipe.checkpoint} is a softmax model")
            vocab_size = model.get_input_embeddings().num_embeddings
            recipe = replace(recipe, tokenizer=recipe.checkpoint)
        with console.status("reading the text"):
            text = prepare(recipe, vocab_size)
        store.identify(data=text.description)
        models = []
        for seed in range(seeds):
            training, source = None, recipe.checkpoint
            if source is None:
                folder = store.folder(f"model/seed{seed}")
                training = store.part(f"training/seed{seed}", train_arm, arm("ka"), recipe, text, folder, seed)
                source = str(folder)
            with console.status("cutting the walk"):
                models.append(Model(store.part(f"hops/seed{seed}", _cuts, source, recipe, text), training))
        return Results(text.description, tuple(models))

    def sections(self, recipe: HopsRecipe, results: Results) -> list[Section]:
        """Quality and cost against hops, and the walks of every layer and head."""
        return report.sections(recipe, results)


def _cuts(source: str, recipe: HopsRecipe, text: Text) -> Cuts:
    return evaluate(load_model_and_tokenizer(source)[0], text.validation, recipe.hops, recipe.walk_samples)


@torch.inference_mode()
def evaluate(model: Any, sequences: Tensor, hops: Sequence[int], walk_samples: int) -> Cuts:
    """Cut the walks of a KA model at each number of hops, in all layers at once.

    Errors and walks are means over ``walk_samples`` sequences; seconds are medians over passes on the first batch.
    """
    ways: dict[int | None, Callable[[Call], Tensor]] = {None: exact, **{n: partial(_cut_at, n) for n in hops}}
    batch = sequences[:BATCH].to(model.device)
    passes = {n: partial(_pass, model, batch, way) for n, way in ways.items()}
    times: dict[int | None, list[float]] = {n: [] for n in ways}
    for n, taken, _ in in_turns(passes, model.device, 1 + ROUNDS):
        times[n].append(taken)
    seconds = {n: statistics.median(found[1:]) for n, found in times.items()}  # the first round warms up
    ppl = {}
    for n, way in ways.items():
        with attending(way):
            ppl[n] = perplexity.evaluate(model, sequences, batch_size=BATCH).ppl
    errors, walks = _layers(model, sequences[:walk_samples], hops)
    return Cuts(ppl[None], seconds[None], tuple(Cut(n, ppl[n], seconds[n], errors[n]) for n in hops), **walks)


def _pass(model: Any, batch: Tensor, way: Callable[[Call], Tensor]) -> None:
    with attending(way):
        model(input_ids=batch, use_cache=False)


def _cut_at(hops: int, call: Call) -> Tensor:
    options = dict(call.options)
    if options.pop("softcap") is not None:
        raise UserError("--set checkpoint: walks of a model with capped scores (softcap) cannot be cut")
    return truncated(call.q, call.k, call.v, hops=hops, **options)


def _layers(model: Any, sequences: Tensor, hops: Sequence[int]) -> tuple[dict[int, Row], dict[str, tuple[Row, ...]]]:
    """Errors by number of hops and layer; expected hops and absorption by layer and head."""
    layers = model.config.num_hidden_layers
    squares = torch.zeros(len(hops) + 1, layers, dtype=torch.float64)
    walked: list[list[Tensor]] = [[] for _ in range(layers)]
    absorbed: list[list[Tensor]] = [[] for _ in range(layers)]

    def measure(call: Call) -> Tensor:
        a = exact(call)
        squares[-1, call.layer] += a.double().square().sum().cpu()
        for row, n in enumerate(hops):
            squares[row, call.layer] += (_cut_at(n, call) - a).double().square().sum().cpu()
        w = walk(call.q, call.k, **call.options)
        walked[call.layer].append(w.hops[..., 1:].double().mean((0, 2)).cpu())
        absorbed[call.layer].append(w.first[..., 1:].double().mean((0, 2)).cpu())
        return a

    with attending(measure):
        for batch in sequences.split(1):
            model(input_ids=batch.to(model.device), use_cache=False)
    errors = (squares[:-1] / squares[-1]).sqrt()
    walks = {
        name: tuple(tuple(torch.stack(layer).mean(0).tolist()) for layer in found)
        for name, found in (("expected_hops", walked), ("absorbed", absorbed))
    }
    return dict(zip(hops, map(tuple, errors.tolist()), strict=True)), walks


HOPS = Hops()
