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
