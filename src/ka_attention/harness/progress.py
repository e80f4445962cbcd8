"""What a run shows: one console, quiet on all processes but the main one, and progress bars on terminals only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ka_attention.harness.store import main_process

console = Console(quiet=not main_process(), highlight=False)


def quiet_libraries() -> None:
    """Keep the libraries' own notices and bars out of a run's output; errors still raise."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|huggingface_hub)\b")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def bar(label: str, total: int, *, console: Console = console) -> Iterator[Callable[[int], None]]:
    """A progress bar of ``total`` steps: call what it yields with steps done. On a terminal only, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda steps: progress.advance(task, steps)
