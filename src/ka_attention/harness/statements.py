"""Made-up tasks that more than one study asks: recall, permutations spelled out, steps along a permutation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ka_attention.harness.tasks import NOT_ASKED, Examples


@dataclass(frozen=True)
class Recall:
    """``key = value`` somewhere in the first half, ``key = ?`` somewhere in the second: name the value.

    ``pairs`` different keys a sequence; everywhere else stands a filler with a value at random, which means nothing.
    One pair is the passkey test, several are multi-query associative recall. Groups are distances between definition
    and question, rounded down to a power of two. Symbols: keys, then values, then the filler's left side, then "?".
    """

    keys: int
    values: int
    pairs: int

    @property
    def symbols(self) -> int:
        return self.keys + self.values + 2

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements, at least twice as many as pairs."""
        filler, question = self.symbols - 2, self.symbols - 1
        row, half = np.arange(count)[:, None], length // 2

        def some(of: int) -> np.ndarray:
            return random.permuted(np.tile(np.arange(of), (count, 1)), axis=1)[:, : self.pairs]

        defined, asked, keys = some(half), half + some(length - half), some(self.keys)
        meant = self.keys + random.integers(self.values, size=keys.shape)
        left = np.full((count, length), filler)
        right = self.keys + random.integers(self.values, size=left.shape)
        answers, groups = np.full_like(left, NOT_ASKED), np.zeros_like(left)
        left[row, defined], right[row, defined] = keys, meant
        left[row, asked], right[row, asked] = keys, question
        answers[row, asked] = meant
        groups[row, asked] = 2 ** np.log2(asked - defined).astype(int)
        return Examples(*map(torch.from_numpy, (left * self.symbols + right, answers, groups)))


@dataclass(frozen=True)
class Slots:
    """The product of permutations of ``degree`` things, spelled out.

    ``degree`` statements a step, "slot k now holds what slot s held before this step". The first ``degree`` statements
    put the things into the slots, in order. The answer is what the slot holds. Symbols are the slots, then the things.
    Groups are positions; a last incomplete step is allowed.
    """

    degree: int

    @property
    def symbols(self) -> int:
        return 2 * self.degree

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements."""
        n = self.degree
        steps = -(-length // n)
        sources = random.permuted(np.tile(np.arange(n), (count, steps, 1)), axis=2)
        held = np.empty_like(sources)
        held[:, 0] = np.arange(n)
        for step in range(1, steps):
            held[:, step] = np.take_along_axis(held[:, step - 1], sources[:, step], axis=1)
        right = sources.copy()
        right[:, 0] = n + np.arange(n)
        statements = np.arange(n) * self.symbols + right
        positions = np.broadcast_to(np.arange(length), (count, length)).copy()
        flat = [x.reshape(count, -1)[:, :length].copy() for x in (statements, n + held)]
        return Examples(*map(torch.from_numpy, (*flat, positions)))


@dataclass(frozen=True)
class Depo:
    """k steps along a shuffled permutation (Depo of arXiv 2512.17351), as statements.

    In the first half of a sequence of T statements the T / 2 arrows ``a → b`` of one cycle, in random order; in the
    second half questions ``(a, k)``: which node stands k steps after a? Groups are k. Symbols: ``nodes`` nodes, of
    which each sequence draws its own, then k = 1 to ``hops``.
    """

    nodes: int
    hops: int

    @property
    def symbols(self) -> int:
        return self.nodes + self.hops

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements, at most twice as many as nodes."""
        n = length // 2
        cycle = random.permuted(np.tile(np.arange(self.nodes), (count, 1)), axis=1)[:, :n]
        arrows = random.permuted(np.tile(np.arange(n), (count, 1)), axis=1)
        asked = random.integers(n, size=(count, length - n))
        k = random.integers(1, self.hops + 1, size=asked.shape)

        def at(ranks: np.ndarray) -> np.ndarray:
            return np.take_along_axis(cycle, ranks % n, axis=1)

        left = np.concatenate([at(arrows), at(asked)], axis=1)
        right = np.concatenate([at(arrows + 1), self.nodes + k - 1], axis=1)
        answers, groups = np.full_like(left, NOT_ASKED), np.zeros_like(left)
        answers[:, n:], groups[:, n:] = at(asked + k), k
        return Examples(*map(torch.from_numpy, (left * self.symbols + right, answers, groups)))
