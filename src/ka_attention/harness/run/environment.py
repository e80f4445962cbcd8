"""Where a result came from: versions, hardware, commit, command and date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ka_attention.errors import UserError

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


def describe() -> dict[str, Any]:
    """What a reader needs to repeat a run, as JSON; ``commit`` is None outside a git checkout."""
    return {
        "command": shlex.join(["ka", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ka-attention": metadata.version("ka-attention"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
    }


def memory() -> int:
    """Bytes of memory that a model can have: the machine's, or those of its largest GPU."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return max(machine, *(torch.cuda.get_device_properties(i).total_memory for i in devices), 0)


def require_memory(recipe: Any) -> None:
    """UserError where what a recipe asks for cannot fit into the machine, whatever is done about it.

    Counted are float32 weights with gradients and AdamW's two moments, and the logits of a batch; a run needs more.
    """

    def largest(*names: str) -> int:
        given = next((getattr(recipe, name) for name in names if hasattr(recipe, name)), 0)
        return max(given, default=0) if isinstance(given, tuple) else given or 0

    hidden, vocabulary = largest("hidden_size"), largest("vocab_size")
    wide = largest("intermediate_size") or 2 * hidden
    batch = largest("batch_size") * largest("sequence_length", "length")
    needs = _weights(hidden, vocabulary, largest("layers") or 1, wide)
    needs = {name: 16 * count for name, count in needs.items()} | {"batch_size": 4 * batch * (vocabulary + hidden)}
    needed, have = sum(needs.values()), memory()
    if needed > have:
        most = max(needs, key=lambda name: needs[name])
        raise UserError(f"--set {most}: these settings take {_beyond(needed, have)}")


def require_memory_of(config: Any, argument: str) -> None:
    """UserError where the weights that a transformers configuration describes cannot fit into the machine."""
    text = config.get_text_config(decoder=True)
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size")
    sizes = [size if isinstance(size := getattr(text, name, None), int) else 0 for name in names]
    needed, have = 2 * sum(_weights(*sizes).values()), memory()  # 2 bytes: those of half precision
    if needed > have:
        raise UserError(f"{argument}: the model that its config.json describes takes {_beyond(needed, have)}")


def _weights(hidden: int, vocabulary: int, layers: int, wide: int) -> dict[str, int]:
    """How many weights of a transformer each size is to blame for; about."""
    return {
        "vocab_size": vocabulary * hidden,
        "hidden_size": 4 * hidden**2,
        "layers": layers * hidden * (hidden + wide),
    }


def _beyond(needed: int, have: int) -> str:
    return f"at least {needed / 2**30:,.0f} GiB of memory, this machine has {have / 2**30:,.0f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with ``+`` where tracked files were changed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return run.stdout.strip()

    # Only a checkout that tracks this very file is the package's own.
    if not git("ls-files", "--error-unmatch", __file__):
        return None
    return (
        f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}"
    )
