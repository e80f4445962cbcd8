"""Clocks that wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


def now(device: torch.device) -> float:
    """Seconds on a clock, read when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(
    ways: Mapping[Key, Callable[[], Result]], device: torch.device, rounds: int = 1
) -> Iterator[tuple[Key, float, Result]]:
    """Run each way once a round; yields its key, its seconds and what it returned.

    Ways take turns, so that a slow moment of the machine touches all of them.
    """
    for _ in range(rounds):
        for key, way in ways.items():
            start = now(device)
            result = way()
            yield key, now(device) - start, result
