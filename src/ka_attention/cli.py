"""The command ``ka``: parse, call a study, print. The libraries behind it load only when a command needs them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ka_attention.errors import UserError

if TYPE_CHECKING:
    from ka_attention.harness.study import Study


class _Commands(TyperGroup):
    """One line instead of a traceback for a user's mistake (exit code 2) and for Ctrl-C (130)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"ka: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:  # a folder that may not be written; a full disk, which has no file name
            if error.errno is None:  # not from the operating system
                raise
            typer.echo(f"ka: {error.filename or 'writing'}: {error.strerror}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("ka: stopped; the same command continues where it was", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="KA-attention: train it beside softmax attention, and see what its cache costs and buys.",
)

RecipeName = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name (`ka recipes`).")]
Data = Annotated[str | None, typer.Option(help="stdlib, a text file or folder, hf:NAME or hf:NAME/CONFIG.")]
Tokenizer = Annotated[str | None, typer.Option(help="train, a tokenizer.json file, or a Hub name.")]
Seeds = Annotated[int, typer.Option(min=1, help="Repeat with seeds 0 … N−1.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; default runs/RECIPE.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub name of a softmax model.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")]


@app.command()
def compare(
    recipe: RecipeName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    seeds: Seeds = 1,
    out: Out = None,
    set_: Set = None,
) -> None:
    """Train softmax attention and KA-attention on the same text, evaluate both, and write a report."""
    study("compare", recipe, data, tokenizer, seeds, out, set_)


@app.command()
def train(
    recipe: RecipeName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    seeds: Seeds = 1,
    out: Out = None,
    set_: Set = None,
) -> None:
    """The first half of compare: train every arm. `ka evaluate OUT` does the rest."""
    from ka_attention.harness.study import publish
    from ka_attention.studies.compare.study import COMPARISON

    chosen, store = _open(COMPARISON, recipe, data, tokenizer, out, set_)
    publish(COMPARISON, chosen, store, seeds, COMPARISON.train(chosen, store, seeds))


@app.command()
def evaluate(out: Folder) -> None:
    """The second half of compare: evaluate the models that were trained in OUT, and write the report."""
    from ka_attention.harness.settings import restore
    from ka_attention.harness.study import open_store, publish, read, undamaged
    from ka_attention.studies.compare.recipes import CompareRecipe
    from ka_attention.studies.compare.study import COMPARISON

    stored = read(out / "parts", "identity.json")
    if stored.get("study") != COMPARISON.name:
        raise UserError(f"OUT: {out} holds a run of {stored.get('study')}; only compare is evaluated on its own")
    with undamaged(out / "parts" / "identity.json"):
        recipe = restore(CompareRecipe, stored["recipe"])
    store = open_store(COMPARISON, recipe, out)
    seeds = COMPARISON.trained_seeds(recipe, store)
    if not seeds:
        raise UserError(f"OUT: not every arm in {out} is trained; run the ka train or ka compare that began it again")
    publish(COMPARISON, recipe, store, seeds, COMPARISON.run(recipe, store, seeds))


@app.command()
def report(out: Folder) -> None:
    """Write the report of the results in OUT again."""
    from ka_attention.harness.study import read, report, undamaged
    from ka_attention.studies import catalogue

    results = read(out, "results.json")
    with undamaged(out / "results.json"):
        report(catalogue.study(results["study"]), results, out)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A study's name (`ka recipes`).")],
    recipe: RecipeName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    seeds: Seeds = 1,
    out: Out = None,
    set_: Set = None,
) -> None:
    """Run one study: a question with its own recipes and report."""
    from ka_attention.harness.study import publish
    from ka_attention.studies import catalogue

    chosen_study = catalogue.study(name)
    chosen, store = _open(chosen_study, recipe, data, tokenizer, out, set_)
    publish(chosen_study, chosen, store, seeds, chosen_study.run(chosen, store, seeds))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a softmax or KA model.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads, 2 to 128 tokens.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page to write or replace.")] = Path("inspect.html"),
) -> None:
    """Show, on one HTML page, what each head attends to in TEXT and where its output really comes from."""
    from ka_attention.commands.inspect import command

    command(model, text, out)
    typer.echo(f"Page: {out}")


@app.command()
def adapt(
    checkpoint: Checkpoint,
    method: Annotated[str, typer.Option(help="How the map from outputs to values is fitted.")] = "linear-output",
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens to fit on.")] = 100_000,
    data: Annotated[str, typer.Option(help="As in compare.")] = "stdlib",
    length: Length = 128,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("runs/adapt"),
) -> None:
    """Fit an adapter, with which a softmax model CHECKPOINT decodes with a KA cache; the model itself stays frozen."""
    from ka_attention.commands.adapt import command

    found = command(checkpoint, data=data, tokens=tokens, length=length, method=method, out=out)
    typer.echo(f"PPL {found['base']:,.1f} softmax, {found['swap']:,.1f} swapped, {found['adapted']:,.1f} adapted")
    typer.echo(f"Adapter: {out} (ka_attention.hf.load_adapter)")


@app.command()
def convert(
    checkpoint: Checkpoint,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens of the conversion.")],
    data: Annotated[str, typer.Option(help="As in compare.")] = "stdlib",
    length: Length = 128,
    window: Annotated[int | None, typer.Option(min=1, help="Attend to the last W tokens only.")] = None,
    learned: Annotated[bool, typer.Option("--learned", help="Leave the gates free instead of raising them.")] = False,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, help="Order of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the KA model.")] = Path("runs/convert"),
) -> None:
    """Turn a softmax model CHECKPOINT into a KA model by raising its gates from 0 to 1 in training."""
    from ka_attention.commands.convert import command
    from ka_attention.conversion.raising import Conversion

    if not 0 < learning_rate < float("inf"):
        raise UserError(f"--learning-rate: expected a positive number, got {learning_rate}")
    plan = Conversion(
        steps=1,
        learning_rate=learning_rate,
        target="learned" if learned else "ka",
        window=window,
        stage_one=0.0 if learned else Conversion.stage_one,
    )
    for row in command(checkpoint, data=data, tokens=tokens, length=length, plan=plan, seed=seed, out=out):
        typer.echo(f"{row['tokens']:>12,} tokens   gate {row['gate']:.2f}   PPL {row['ppl']:,.1f}")
    typer.echo(f"Model: {out}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a softmax or KA model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    cache: Annotated[str | None, typer.Option(help="kv or ka; default: the model's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 50,
    compare: Annotated[bool, typer.Option("--compare", help="Both caches side by side.")] = False,
) -> None:
    """Continue PROMPT greedily, and show the text as it comes."""
    from ka_attention.commands import generate as generation

    generation.command(model, prompt, cache=cache, max_new_tokens=max_new_tokens, compare=compare)


@app.command()
def recipes() -> None:
    """List the recipes of every study with their settings."""
    from rich.console import Console

    from ka_attention.studies.catalogue import STUDIES

    console = Console(highlight=False)
    for each in STUDIES.values():
        console.print(f"\n[bold]{each.name}[/bold]: {each.question}")
        for name, recipe in each.recipes.items():
            settings = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
            summary = settings.pop("summary", "")
            settings.pop("name", None)
            console.print(f"  [bold]{name}[/bold]  {summary}")
            console.print("    " + ", ".join(f"{key}={_shown(value)}" for key, value in settings.items()), style="dim")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "none" if value is None else str(value)


def _open(
    study: Study,
    recipe: str | None,
    data: str | None,
    tokenizer: str | None,
    out: Path | None,
    assignments: list[str] | None,
) -> tuple[Any, Any]:
    """The chosen recipe, and the store of its run; --data and --tokenizer are settings like any other."""
    from ka_attention.harness.study import choose, open_store

    given = {key: value for key, value in (("data", data), ("tokenizer", tokenizer)) if value is not None}
    default = next(iter(study.recipes.values()))
    if unread := [key for key in given if not hasattr(default, key)]:
        raise UserError(f"--{unread[0]}: {study.name} has no such setting; leave it out")
    chosen = choose(study, recipe, [*(assignments or []), *(f"{key}={value}" for key, value in given.items())])
    name = recipe or next(iter(study.recipes))
    folder = Path("runs") / (name if study.name == "compare" else f"{study.name}-{name}")
    return chosen, open_store(study, chosen, out or folder)


def main() -> None:
    """Entry point of the command."""
    app(prog_name="ka")


if __name__ == "__main__":
    main()
