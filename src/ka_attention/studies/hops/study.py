"""How many hops KA-attention needs: perplexity, output error and time when its walk is cut, and how far it walks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ka_attention.errors import UserError
from ka_attention.harness import perplexity
from ka_attention.harness.arms import arm, build
from ka_attention.harness.attending import Call, attending, exact
from ka_attention.harness.data import Sequences, prepare
from ka_attention.harness.models import is_softmax, load_model, own_config
from ka_attention.harness.progress import console
from ka_attention.harness.settings import PYTHIA_70M, ModelSettings, TextSettings, TrainingSettings
from ka_attention.harness.statistics import changes, mean, mean_sd, percent, values
from ka_attention.harness.store import Json, Store
from ka_attention.harness.timing import now
from ka_attention.harness.training import train
from ka_attention.ops import truncated, walk
from ka_attention.report.document import Figure, Section, Table

BATCH = 32
ROUNDS = 5  # timings of each way to attend, of which the median counts
ENOUGH = 1.0  # percent by which a perplexity may differ from the exact walk's and count as equal


@dataclass(frozen=True, kw_only=True)
class HopsRecipe(TextSettings, ModelSettings, TrainingSettings):
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


class Hops:
    """Cut the walk of a trained KA model at n hops; one hop is softmax attention."""

    name = "hops"
    question = "How many hops does KA-attention need?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: HopsRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train a KA model with every seed, or take the checkpoint, and cut its walks."""
        if not recipe.hops or min(recipe.hops) < 1 or list(recipe.hops) != sorted(set(recipe.hops)):
            raise UserError(f"--set hops: expected ascending numbers from 1 on, got {','.join(map(str, recipe.hops))}")
        vocab_size = recipe.vocab_size
        if recipe.checkpoint:
            if seeds > 1:
                raise UserError(f"--seeds: a checkpoint is one model, got {seeds}")
            model = load_model(recipe.checkpoint)[0]
            if is_softmax(own_config(model)):
                raise UserError(f"--set checkpoint: expected a KA model, {recipe.checkpoint} is a softmax model")
            vocab_size = model.get_input_embeddings().num_embeddings
            recipe = replace(recipe, tokenizer=recipe.checkpoint)
        with console.status("reading the text"):
            text = prepare(recipe, vocab_size)
        store.identify(data=text.description)
        found = []
        for seed in range(seeds):
            folder = store.folder(f"model/seed{seed}")

            def trained() -> Json:
                model = build(arm("ka"), recipe, seed)  # noqa: B023
                data = Sequences(text.train), Sequences(text.validation)
                return train(model, *data, recipe, folder, seed=seed, label="KA", tokenizer=text.tokenizer)  # noqa: B023

            one = {} if recipe.checkpoint else {"training": store.part(f"training/seed{seed}", trained)}
            source = recipe.checkpoint or str(folder)
            with console.status("cutting the walk"):
                one["hops"] = store.part(
                    f"hops/seed{seed}",
                    lambda: evaluate(load_model(source)[0], text.validation, recipe.hops, recipe.walk_samples),  # noqa: B023
                )
            found.append(one)
        return {"data": text.description, "arms": {"ka": {"label": "KA", "seeds": found}}}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """Quality and cost against hops, and the walks of every layer and head."""
        return [_cut(results), _walks(results)]


@torch.inference_mode()
def evaluate(model: Any, sequences: Tensor, hops: Sequence[int], walk_samples: int) -> dict[str, Json]:
    """Cut the walks of a KA model at each number of hops, in all layers at once.

    ``ppl`` and ``seconds`` (median of passes over the first batch, in turns) are those of the exact model; ``cut`` has
    the same for each number, and ``error``: for each layer ‖A_n − A‖ / ‖A‖, given the exact model's inputs.
    ``expected_hops`` and ``absorbed``, ``[L][H]``: the steps of a walk and the share that ends at token 0, means over
    the tokens after the first of ``walk_samples`` sequences.
    """
    ways: dict[int | None, Callable[[Call], Tensor]] = {None: exact, **{n: partial(_cut_at, n) for n in hops}}
    ppl, seconds = {}, _seconds(model, sequences[:BATCH], ways)
    for n, way in ways.items():
        with attending(way):
            ppl[n] = perplexity.evaluate(model, sequences, batch_size=BATCH)["ppl"]
    errors, walks = _layers(model, sequences[:walk_samples], hops)
    cut = [{"hops": n, "ppl": ppl[n], "seconds": seconds[n], "error": errors[n]} for n in hops]
    return {"ppl": ppl[None], "seconds": seconds[None], "cut": cut, **walks}


def _cut_at(hops: int, call: Call) -> Tensor:
    options = dict(call.options)
    if options.pop("softcap") is not None:
        raise UserError("--set checkpoint: walks of a model with capped scores (softcap) cannot be cut")
    return truncated(call.q, call.k, call.v, hops=hops, **options)


def _seconds(model: Any, batch: Tensor, ways: Mapping[int | None, Callable[[Call], Tensor]]) -> dict[int | None, float]:
    """Median time of a pass of each way; they take turns, so that a slow moment of the machine touches all."""
    batch = batch.to(model.device)
    times: dict[int | None, list[float]] = {n: [] for n in ways}
    for _ in range(1 + ROUNDS):
        for n, way in ways.items():
            with attending(way):
                start = now(batch.device)
                model(input_ids=batch, use_cache=False)
                times[n].append(now(batch.device) - start)
    return {n: statistics.median(taken[1:]) for n, taken in times.items()}  # the first round warms up


def _layers(model: Any, sequences: Tensor, hops: Sequence[int]) -> tuple[dict[int, list[float]], dict[str, Json]]:
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
    means = ([torch.stack(layer).mean(0).tolist() for layer in found] for found in (walked, absorbed))
    return dict(zip(hops, errors.tolist(), strict=True)), dict(zip(("expected_hops", "absorbed"), means, strict=True))


def _cut(results: dict[str, Json]) -> Section:
    arm = results["arms"]["ka"]
    exact_ppl = values(arm, "hops", "ppl")
    rows, points = [], []
    for i, n in enumerate(results["recipe"]["hops"]):
        cuts = [seed["hops"]["cut"][i] for seed in arm["seeds"]]
        change = changes([cut["ppl"] for cut in cuts], exact_ppl)
        time = [cut["seconds"] / seed["hops"]["seconds"] for cut, seed in zip(cuts, arm["seeds"], strict=True)]
        errors = [mean([cut["error"][layer] for cut in cuts]) for layer in range(len(cuts[0]["error"]))]
        points.append((n, cuts, change, mean(time), errors))
        rows.append(
            [
                f"{n}" + (" (softmax attention)" if n == 1 else ""),
                mean_sd([cut["ppl"] for cut in cuts]),
                percent(change),
                f"{min(errors):.2g} to {max(errors):.2g}",
                f"{mean(time):.2f}",
            ]
        )
    rows.append(["exact", mean_sd(exact_ppl), "–", "0", "1"])
    columns = ["hops", "validation PPL", "against exact", "output error by layer", "time, × exact"]
    table = Table("The walk cut after n hops in every layer; time is that of a pass of the whole model", columns, rows)
    hops = [n for n, *_ in points]

    def draw_ppl(ax: Any) -> None:
        ax.plot(hops, [mean([cut["ppl"] for cut in cuts]) for _, cuts, *_ in points], label="cut after n hops")
        ax.axhline(mean(exact_ppl), color="C1", linestyle="--", label="exact")
        ax.set_ylabel("validation PPL")

    def draw_error(ax: Any) -> None:
        for layer in range(len(points[0][-1])):
            ax.plot(hops, [max(errors[layer], 1e-8) for *_, errors in points], label=f"layer {layer}")
        ax.set_ylabel("relative error of the output")
        ax.set_yscale("log")

    def against_hops(draw: Callable[[Any], None]) -> Callable[[Any], None]:
        def both(ax: Any) -> None:
            draw(ax)
            ax.set_xscale("log", base=2)
            ax.set_xticks(hops, map(str, hops))
            ax.set_xlabel("hops n")
            ax.legend()

        return both

    figures = [
        Figure(name, caption + " (mean over seeds)", against_hops(draw))
        for name, caption, draw in (
            ("ppl_by_hops", "Validation PPL when the walk is cut after n hops, lower is better", draw_ppl),
            ("error_by_hops", "Error of a layer's output when its walk is cut, its inputs being exact", draw_error),
        )
    ]
    expected = (
        "**Expected:** cut after n hops, KA-attention needs n attention calls and no recurrence. One hop is softmax "
        "attention on weights that were trained for KA, and should be clearly worse; from about the expected number of "
        "hops on the cut model should equal the exact one."
    )
    return Section("Cutting the walk", [expected, _came(points, arm)], [table], figures)


def _came(points: list[Any], arm: dict[str, Json]) -> str:
    n, _, change, *_ = points[0]
    text = f"**Came:** with {n} hop{'s' if n > 1 else ''} the PPL is {percent(change)} against the exact walk. "
    near = list(takewhile(lambda point: max(map(abs, point[2])) <= ENOUGH, reversed(points)))
    walked = mean([hops for seed in arm["seeds"] for layer in seed["hops"]["expected_hops"] for hops in layer])
    longest = max(hops for seed in arm["seeds"] for layer in seed["hops"]["expected_hops"] for hops in layer)
    walks = f"a walk has {walked:.1f} hops on average over all heads, {longest:.1f} in the head with the longest"
    if not near:
        return text + f"No cut comes within {ENOUGH:g} % of the exact PPL; {walks}."
    n, _, _, time, _ = near[-1]
    cost = (
        "cutting pays" if time < 0.95 else "cutting does not pay here" if time > 1.05 else "cutting gains nothing here"
    )
    return (
        text
        + f"From {n} hop{'s' if n > 1 else ''} on it stays within {ENOUGH:g} % of it; {walks}. A pass with {n} then "
        f"takes {time:.2f} × the time of the exact one: {cost}."
    )


def _walks(results: dict[str, Json]) -> Section:
    seeds = [seed["hops"] for seed in results["arms"]["ka"]["seeds"]]
    found = {key: torch.tensor([seed[key] for seed in seeds]).mean(0).tolist() for key in ("expected_hops", "absorbed")}
    heads = [(value, layer, head) for layer, row in enumerate(found["absorbed"]) for head, value in enumerate(row)]
    sinks = sum(value > 0.5 for value, *_ in heads)
    value, layer, head = max(heads)
    words = (
        "Means over the tokens after the first. A walk steps from a token to one it attends to, and ends where a token "
        "attends to itself, at token 0 at the latest. A head whose walks end at token 0 has collapsed to the value of "
        f"that token: for every query it says the same. Here {sinks} of {len(heads)} heads end more than half of their "
        f"walks there; layer {layer}, head {head} the most, {100 * value:.0f} %."
    )
    percents = [[100 * value for value in row] for row in found["absorbed"]]
    figures = [
        Figure(name, caption + ", by layer and head (mean over seeds)", partial(_heat, rows, text))
        for name, caption, rows, text in (
            ("expected_hops", "Expected hops of a walk", found["expected_hops"], "{:.1f}"),
            ("absorbed_at_0", "Percent of the walks that end at token 0", percents, "{:.0f}"),
        )
    ]
    return Section("How far heads walk", [words], (), figures)


def _heat(rows: list[list[float]], text: str, ax: Any) -> None:
    """Layers × heads as tinted cells with their numbers, readable on light and dark paper."""
    largest = max(max(map(max, rows)), 1e-9)
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            ax.fill_between(
                [head - 0.5, head + 0.5], layer - 0.5, layer + 0.5, color="C0", alpha=0.7 * value / largest, linewidth=0
            )
            ax.text(head, layer, text.format(value), ha="center", va="center", fontsize=min(9, 72 / len(row)))
    ax.set_xticks(range(len(rows[0])))
    ax.set_yticks(range(len(rows)))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


HOPS = Hops()
