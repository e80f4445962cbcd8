"""Some of the random calls, other ones for each backend. Thousands: ``python tests/ops/random_calls.py 2000``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_calls import SMALL, SMALL_DTYPES, Call

FIRST = {"blocked": 0, None: 100_000, "reference": 200_000}


@pytest.mark.parametrize("backend", FIRST)
@pytest.mark.parametrize("part", range(3))
def test_random_calls(backend, part):
    for seed in range(FIRST[backend] + 8 * part, FIRST[backend] + 8 * part + 8):
        Call(seed).check(backend)


if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":

    def test_random_calls_of_the_kernels():
        """Few, as each takes the interpreter seconds: one after a past, one of packed sequences in a window."""
        for seed in (1, 4):
            Call(seed, SMALL, SMALL_DTYPES).check("triton")

else:

    def test_kernels_in_the_interpreter():
        pytest.importorskip("triton")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernels", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
