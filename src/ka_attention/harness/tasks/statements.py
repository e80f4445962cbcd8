"""Synthetic tasks of more than one study: chains of references, recall, products of permutations, steps along one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ka_attention.harness.tasks.learning import NOT_ASKED, Examples


@dataclass(frozen=True)
class Dereference:
    """Assignments ``x = literal`` or ``x = earlier variable``; the answer at each is the value of x.

    ``chains`` different literals are assigned first. Every later statement copies the newest variable of one of the
    chains, picked with probability ∝ 1/rank in an order of its own for every sequence, so that some chains grow long. A
    name is assigned once; names are drawn anew for every sequence. Groups are depths, the references between a variable
    and its literal. Symbols: ``names`` names, then ``literals`` literals.
    """

    names: int
    literals: int
    chains: int

    @property
    def symbols(self) -> int:
        return self.names + self.literals

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements."""
        shuffled = [random.permuted(np.tile(np.arange(n), (count, 1)), axis=1) for n in (self.names, self.literals)]
        left, values = shuffled[0][:, :length], shuffled[1][:, : self.chains]
        share = 1 / np.arange(1, self.chains + 1)
        ranks = random.choice(self.chains, size=(count, length), p=share / share.sum())
        chain = np.take_along_axis(random.permuted(np.tile(np.arange(self.chains), (count, 1)), axis=1), ranks, axis=1)
        chain[:, : self.chains] = np.arange(self.chains)[:length]
        newest, depth = self.names + values, np.full((count, self.chains), -1)
        right, depths, row = np.empty_like(left), np.empty_like(left), np.arange(count)
        for t in range(length):
            at = row, chain[:, t]
            depth[at] += 1
            right[:, t], depths[:, t] = newest[at], depth[at]
            newest[at] = left[:, t]
        answers = self.names + np.take_along_axis(values, chain, axis=1)
        return Examples(*(torch.from_numpy(x) for x in (left * self.symbols + right, answers, depths)))


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
