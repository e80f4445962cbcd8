"""Parts of a run side by side: one process per GPU, one row of progress each."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ka_attention.errors import UserError
from ka_attention.harness.run.progress import bar, console, quiet_libraries
from ka_attention.harness.run.records import Json
from ka_attention.harness.run.store import Store

START = "spawn"  # how processes start: a forked one could not use CUDA
_SECONDS = 0.5  # between looks at whether the workers live
_relay: Any = None  # in a worker: the queue to the process that shows


class Part(NamedTuple):
    """A part of a run, as `Store.part` takes it. ``work`` and ``arguments`` must pickle."""

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


def finish(parts: Sequence[Part], store: Store, workers: int) -> None:
    """See to it that every part is stored. With several workers each is a process, with a GPU of its own if there are.

    A part that fails stops all, and so does a signal that ends this process, whichever it is; what was finished stays,
    and the same call does the rest. UserError where it was one, or where there are fewer GPUs than workers.
    """
    left = [part for part in parts if not store.done(part.name)]
    if workers == 1 or len(left) < 2:
        for part in left:
            store.part(part.name, part.work, *part.arguments)
        return
    devices = _devices(workers)
    store.alone()  # workers share what their parent holds, else the first of them would shut the others out
    context: Any = multiprocessing.get_context(START)
    tasks, messages = context.Queue(), context.Queue()
    for part in left:
        tasks.put(part)
    for _ in range(workers):
        tasks.put(None)
    processes = [
        context.Process(
            target=_work, args=(i, devices[i], workers, tasks, messages, store.out, store.identity), daemon=True
        )
        for i in range(min(workers, len(left)))
    ]
    for process in processes:
        process.start()
    try:
        _show(processes, messages, len(left))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def progress(label: str, total: int) -> Any:
    """`progress.bar`, in a worker as a row of the process that shows."""
    return bar(label, total) if _relay is None else _row(label, total)


@contextmanager
def _row(label: str, total: int) -> Iterator[Callable[[int], None]]:
    _relay.put(("begin", (label, total)))
    yield lambda steps: _relay.put(("advance", steps))


def _devices(workers: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to be in each worker."""
    if not torch.cuda.is_available():
        return [None] * workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
    if len(names) < workers:
        raise UserError(f"--gpus: expected at most {len(names)}, as many as there are, got {workers}")
    return list(names[:workers])


def _show(processes: Sequence[Any], messages: Any, left: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        rows = [shown.add_task(f"worker {i}") for i in range(len(processes))]
        while left:
            try:
                worker, (kind, what) = messages.get(timeout=_SECONDS)
            except queue.Empty:
                dead = [process for process in processes if process.exitcode not in (None, 0)]
                if dead:
                    raise RuntimeError(f"a worker ended with exit code {dead[0].exitcode}") from None
                continue
            if kind == "begin":
                shown.reset(rows[worker], description=what[0], total=what[1])
            elif kind == "advance":
                shown.advance(rows[worker], what)
            elif kind == "done":
                left -= 1
                console.print(f"done: {what}")
            elif kind == "refused":
                raise UserError(what)
            else:
                raise RuntimeError(f"a worker failed:\n{what}")


class _Relay:
    """The queue to the process that shows, with the worker's number before each message."""

    def __init__(self, number: int, messages: Any) -> None:
        self.number, self.messages = number, messages

    def put(self, message: tuple[str, Json]) -> None:
        self.messages.put((self.number, message))


def _end_with(parent: Any) -> None:
    """A worker whose parent was killed is told by nobody, and holds up whoever runs the rest."""
    wait([parent.sentinel])
    os._exit(1)  # in the middle of whatever it does: files are whole or not there


def _work(
    number: int, device: str | None, workers: int, tasks: Any, messages: Any, out: Path, identity: dict[str, Json]
) -> None:
    global _relay
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _relay = _Relay(number, messages)
    try:
        quiet_libraries()
        console.quiet = True
        store = Store(out, identity)
        while (part := tasks.get()) is not None:
            store.part(part.name, part.work, *part.arguments)
            _relay.put(("done", part.name))
    except UserError as error:
        _relay.put(("refused", str(error)))
    except Exception:
        _relay.put(("failed", traceback.format_exc()))
