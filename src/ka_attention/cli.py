"""The command ``ka``: parse, call a study, print. The libraries behind it load only when a command needs them."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from ka_attention.errors import UserError, machine_fault

# What `pip install ka-attention`, which brings the operator, leaves out.
LIBRARIES = ("transformers", "accelerate", "tokenizers", "safetensors", "datasets", "rich", "matplotlib", "jinja2")


def _missing(library: str) -> str:
    return f"{library} is not installed; pip install 'ka-attention[studies]' brings all that the command needs"


try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    print(f"ka: {_missing(error.name or 'typer')}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from ka_attention.harness.run.study import Study


class _Commands(TyperGroup):
    """One line instead of a traceback for what a user or the machine did (exit code 2) and for Ctrl-C (130)."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        for arg in args:
            try:
                arg.encode()
            except UnicodeEncodeError:  # a report could not name it, at the end of a long run
                _stop(f"{os.fsencode(arg)!r} is not UTF-8; give another name")
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        for library in LIBRARIES:
            if find_spec(library) is None:
                _stop(_missing(library))
        try:
            return super().invoke(ctx)
        except UserError as error:
            _stop(str(error))
        except KeyboardInterrupt:
            typer.echo("ka: stopped; the same command continues where it was", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if getattr(error, "errno", None) == errno.EPIPE:  # who reads the output has gone
                raise
            line = machine_fault(error)
            if line is None:
                raise
            _stop(line)


def _stop(line: str) -> NoReturn:
    """End with exit code 2 and ``line``, kept one whatever the names in it hold."""
    typer.echo(f"ka: {' '.join(line.splitlines())}", err=True)
    raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="Example: ka compare --data notes.txt --out runs/notes",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"ka-attention {version('ka-attention')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """KA-attention: train it beside softmax attention, and see what its cache costs and buys."""


RecipeName = Annotated[str | None, typer.Argument(metavar="RECIPE", help="One of `ka recipes`; default: the first.")]
Data = Annotated[str | None, typer.Option(help="stdlib, a text file or folder, hf:NAME or hf:NAME/CONFIG.")]
Tokenizer = Annotated[str | None, typer.Option(help="train, a tokenizer.json file, or a Hub name.")]
Seeds = Annotated[int, typer.Option(min=1, help="Repeat with seeds 0 … N−1.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="So many arms side by side, each on a GPU of its own.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; default runs/RECIPE.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub name of a softmax model.")]
Length = Annotated[int, typer.Option(min=2, max=2**31 - 1, help="Tokens in a sequence.")]
OtherTokenizer = Annotated[
    str | None, typer.Option(help="A tokenizer.json file, folder or Hub name; default: its own.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")]


@app.command(epilog="Example: ka compare --data notes.txt --seeds 3 --out runs/notes")
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


@app.command(epilog="Example: ka train --out runs/steps")
def train(
    recipe: RecipeName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    seeds: Seeds = 1,
    out: Out = None,
    set_: Set = None,
) -> None:
    """The first half of compare: train every model. `ka evaluate OUT` does the rest."""
    from ka_attention.harness.run.study import publish
    from ka_attention.studies.compare.study import COMPARISON

    chosen, store = _open(COMPARISON, recipe, data, tokenizer, out, set_)
    publish(COMPARISON, chosen, store, seeds, COMPARISON.train(chosen, store, seeds))


@app.command(epilog="Example: ka evaluate runs/steps")
def evaluate(out: Folder) -> None:
    """The second half of compare: evaluate the models that were trained in OUT, and write the report."""
    from ka_attention.harness.run.settings import restore
    from ka_attention.harness.run.study import open_store, publish, read, undamaged
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


@app.command(epilog="Example: ka report runs/steps")
def report(out: Folder) -> None:
    """Write the report of the results in OUT again."""
    from ka_attention.harness.run.study import read, report, undamaged
    from ka_attention.studies import catalogue

    results = read(out, "results.json")
    with undamaged(out / "results.json"):
        report(catalogue.study(results["study"]), results, out)


@app.command(epilog="Example: ka study dereference --seeds 3")
def study(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A study's name; without it, what there is.")
    ] = None,
    recipe: RecipeName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    seeds: Seeds = 1,
    out: Out = None,
    set_: Set = None,
    gpus: Gpus = None,
) -> None:
    """Run one study: a question with its own recipes and report."""
    from ka_attention.harness.run.study import publish
    from ka_attention.studies import catalogue

    if name is None:
        recipes()
        return
    chosen_study = catalogue.study(name)
    chosen, store = _open(chosen_study, recipe, data, tokenizer, out, set_, gpus)
    publish(chosen_study, chosen, store, seeds, chosen_study.run(chosen, store, seeds))


@app.command(epilog="Example: ka inspect runs/quick/weights/seed0/ka 'def f(x):'")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a softmax or KA model.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads, 2 to 128 tokens.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page to write or replace.")] = Path("inspect.html"),
    tokenizer: OtherTokenizer = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show, on one HTML page, what each head attends to in TEXT and where its output really comes from."""
    from ka_attention.commands.inspect import command

    command(model, text, out, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    typer.echo(f"Page: {out}")


@app.command(epilog="Example: ka adapt runs/quick/weights/seed0/softmax --tokens 20000 --out runs/adapt")
def adapt(
    checkpoint: Checkpoint,
    method: Annotated[
        str, typer.Option(help="ridge-value, ridge-output, linear-output, mlp-output or linear-lm.")
    ] = "linear-output",
    tokens: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="Training tokens to fit on.")] = 100_000,
    data: Annotated[str, typer.Option(help="As in compare.")] = "stdlib",
    length: Length = 128,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("runs/adapt"),
    tokenizer: OtherTokenizer = None,
    trust_remote_code: Trust = False,
) -> None:
    """Fit an adapter, with which a softmax model CHECKPOINT decodes with a KA cache; the model itself stays frozen."""
    from ka_attention.commands.adapt import command

    found = command(
        checkpoint,
        data=data,
        tokens=tokens,
        length=length,
        method=method,
        out=out,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"PPL {found['base']:,.1f} softmax, {found['swap']:,.1f} swapped, {found['adapted']:,.1f} adapted")
    typer.echo(f"Adapter: {out} (ka_attention.hf.load_adapter)")


@app.command(epilog="Example: ka convert runs/quick/weights/seed0/softmax --tokens 20000 --out runs/convert")
def convert(
    checkpoint: Checkpoint,
    tokens: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="Training tokens of the conversion.")],
    data: Annotated[str, typer.Option(help="As in compare.")] = "stdlib",
    length: Length = 128,
    window: Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Attend to the last W tokens only.")] = None,
    learned: Annotated[bool, typer.Option("--learned", help="Leave the gates free instead of raising them.")] = False,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Order of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the KA model.")] = Path("runs/convert"),
    tokenizer: OtherTokenizer = None,
    trust_remote_code: Trust = False,
) -> None:
    """Turn a softmax model CHECKPOINT into a KA model by raising its gates from 0 to 1 in training."""
    from ka_attention.commands.convert import command
    from ka_attention.conversion.raising import Conversion

    if not 0 < learning_rate < 1e38:  # what float32 holds
        raise UserError(f"--learning-rate: expected a positive number, got {learning_rate}")
    plan = Conversion(
        steps=1,
        learning_rate=learning_rate,
        target="learned" if learned else "ka",
        window=window,
        stage_one=0.0 if learned else Conversion.stage_one,
    )
    rows = command(
        checkpoint,
        data=data,
        tokens=tokens,
        length=length,
        plan=plan,
        seed=seed,
        out=out,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    for row in rows:
        typer.echo(f"{row['tokens']:>12,} tokens   gate {row['gate']:.2f}   PPL {row['ppl']:,.1f}")
    typer.echo(f"Model: {out}")


@app.command(epilog="Example: ka generate runs/quick/weights/seed0/ka 'def f(x):' --compare")
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a softmax or KA model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    cache: Annotated[str | None, typer.Option(help="kv or ka; default: the model's own, the other is a swap.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="At most so many tokens.")] = 50,
    compare: Annotated[bool, typer.Option("--compare", help="Both caches side by side.")] = False,
    tokenizer: OtherTokenizer = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue PROMPT greedily, and show the text as it comes."""
    from ka_attention.commands import generate as generation

    generation.command(
        model,
        prompt,
        cache=cache,
        max_new_tokens=max_new_tokens,
        compare=compare,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )


@app.command(
    epilog="Example: ka serve runs/quick/weights/seed0/ka --port 8000",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a softmax or KA model.")],
    trust_remote_code: Trust = False,
) -> None:
    """Serve MODEL at an OpenAI-compatible endpoint; further options are those of `transformers serve`."""
    from ka_attention.commands.serve import command

    command(model, context.args, trust_remote_code=trust_remote_code)


@app.command(epilog="Example: ka recipes quick")
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A study or a recipe, to be shown with its settings.")
    ] = None,
) -> None:
    """List the studies and their recipes, or show the settings of one."""
    from ka_attention.studies.catalogue import STUDIES

    if name is None:
        for each in STUDIES.values():
            typer.echo(f"{each.name}: {each.question}\n    {', '.join(each.recipes)}")
        typer.echo("\nka recipes NAME shows the settings of a study or recipe; ka study NAME RECIPE runs it.")
        return
    found = [(each.name, *pair) for each in STUDIES.values() for pair in each.recipes.items()]
    # A recipe's name alone is that of the first study which has one of that name, of compare as a rule.
    shown = [row for row in found if row[0] == name] or [row for row in found if row[1] == name][:1]
    if not shown:
        names = dict.fromkeys(word for row in found for word in row[:2])
        raise UserError(f"NAME: no study or recipe {name!r}; there are {', '.join(names)}")
    for of, title, recipe in shown:
        typer.echo(f"{of} {title}: {getattr(recipe, 'summary', '')}")
        for field in fields(recipe):
            if field.name not in ("name", "summary"):
                typer.echo(f"    {field.name}={_text(getattr(recipe, field.name))}")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "none" if value is None else str(value)


def _open(
    study: Study,
    recipe: str | None,
    data: str | None,
    tokenizer: str | None,
    out: Path | None,
    assignments: list[str] | None,
    gpus: int | None = None,
) -> tuple[Any, Any]:
    """The chosen recipe, and the store of its run; --data, --tokenizer and --gpus are settings like any other."""
    from ka_attention.harness.run.environment import require_memory
    from ka_attention.harness.run.study import choose, open_store

    named = {"data": data, "tokenizer": tokenizer, "gpus": gpus}
    given = {key: value for key, value in named.items() if value is not None}
    default = next(iter(study.recipes.values()))
    if unread := [key for key in given if not hasattr(default, key)]:
        raise UserError(f"--{unread[0]}: {study.name} has no such setting; leave it out")
    chosen = choose(study, recipe, [*(assignments or []), *(f"{key}={value}" for key, value in given.items())])
    require_memory(chosen)
    name = recipe or next(iter(study.recipes))
    folder = Path("runs") / (name if study.name == "compare" else f"{study.name}-{name}")
    return chosen, open_store(study, chosen, out or folder)


def main() -> None:
    """Entry point of the command."""
    if "GOMP_SPINCOUNT" not in os.environ:
        # Threads that wait for work sleep: where others use the cores too, those that spin make a step several times
        # slower. Read when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(prog_name="ka")
    except SystemExit as end:
        if not end.code and "RANK" in os.environ:
            from ka_attention.harness.run.store import leave

            leave()
        raise


if __name__ == "__main__":
    main()
