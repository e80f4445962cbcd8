"""What a run shows: one console, quiet on all processes but the main one, and progress bars on terminals only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from ka_attention.harness.run.store import main_process
from ka_attention.report.document import Table

console = Console(quiet=not main_process(), highlight=False)


def quiet_libraries() -> None:
    """Keep the libraries' own notices and bars out of a run's output; errors still raise."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|huggingface_hub)\b")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


_open: list[Progress] = []  # the bar of the whole run, under which those of its parts stand


@contextmanager
def bar(label: str, total: int, *, console: Console = console) -> Iterator[Callable[[int], None]]:
    """A progress bar of ``total`` steps: call what it yields with steps done. On a terminal only, gone at the end.

    A bar that is opened within another one stands below it.
    """
    if _open:
        task = _open[0].add_task(label, total=total)
        yield lambda steps: _open[0].advance(task, steps)
        _open[0].remove_task(task)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        _open.append(progress)
        try:
            yield lambda steps: progress.advance(task, steps)
        finally:
            _open.clear()


def show(table: Table, *, console: Console = console) -> None:
    """Print a table of a report."""
    grid = Grid(*table.columns, title=Text(table.caption), box=box.SIMPLE_HEAD, title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
