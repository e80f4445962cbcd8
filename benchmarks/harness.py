"""Taking times in turns, peak memory in a process of its own, and tables."""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import distributions, version
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def machine(*packages: str) -> str:
    """One line: device, threads and versions, also of those of ``packages`` that are installed."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpus = Path("/proc/cpuinfo")
        names = (
            [x.split(":")[1].strip() for x in cpus.read_text().splitlines() if "model name" in x]
            if cpus.exists()
            else []
        )
        device = names[0] if names else platform.processor() or platform.machine()
    versions = [f"{name} {version(name)}" for name in packages if any(distributions(name=name))]
    threads = f"{torch.get_num_threads()} threads"
    return ", ".join([device, threads, f"torch {torch.__version__}", *versions, platform.system()])


def medians(functions: dict[str, Callable[[], object]], seconds: float = 2.0) -> dict[str, float]:
    """Median milliseconds of each function. They take turns, so a change of the machine's pace meets all."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_memory(function: Callable[..., Callable[[], object]], *args: object) -> float | None:
    """MiB of main memory that `function(*args)()` adds to what `function(*args)` holds; None off Linux.

    It is called once, in a fresh process, so both must be found by their module and name.
    """
    if not STATUS.exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (function, args))


def _growth(function: Callable[..., Callable[[], object]], args: Sequence[object]) -> float:
    call = function(*args)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with right-aligned columns of equal width."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *text[1:]])


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def print_tables(about: str | None, run: Callable[[Path | None], Iterator[str]]) -> None:
    """The command line of a benchmark: its tables as they come, and with --json its figures in a file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    path = parser.parse_args().json
    print(machine(), end="\n\n")
    for text in run(path):
        print(text, end="\n\n", flush=True)
