"""What an order does to K terms: a list of two-operand additions, and the tree that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    """Accumulator `into` takes accumulator `of`; `fused`: the term `of` itself, by one FMA with a single rounding.

    An accumulator is called by one of its terms. A term that was never fused is a rounded product.
    """

    into: int
    of: int
    fused: bool = False


@dataclass(frozen=True)
class Program:
    """`size` terms and the steps, in execution order, that leave their sum in one accumulator."""

    size: int
    steps: tuple[Step, ...]

    @property
    def root(self) -> int:
        """The accumulator that holds the sum in the end."""
        return self.steps[-1].into if self.steps else 0

    @cached_property
    def levels(self) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """The same steps, those together that wait for none of each other: `into`, `of` and whether all are fused."""
        if not self.steps:
            return []
        ready, waves = [0] * self.size, []
        for into, of, fused in self.steps:
            ready[into] = max(ready[into], ready[of]) + 1
            waves.append(2 * ready[into] + fused)
        wave, steps = np.array(waves), np.array(self.steps)
        order = np.argsort(wave, kind="stable")
        ends = np.flatnonzero(np.diff(wave[order])) + 1
        return [(part[:, 0], part[:, 1], bool(part[0, 2])) for part in np.split(steps[order], ends)]

    def tree(self) -> Tree:
        """The tree of these steps; which operand came first and what was fused are forgotten."""
        least, count = list(range(self.size)), [1] * self.size
        merges = []
        for into, of, _ in self.steps:
            first, second = sorted((least[into], least[of]))
            least[into], count[into] = first, count[into] + count[of]
            merges.append((count[into], first, second))
        return Tree(self.size, tuple(sorted(merges)))


@dataclass(frozen=True)
class Tree:
    """A summation tree without regard to operand order, in the one form that equal trees share.

    `merges` holds a triple for every addition, sorted: how many terms lie below it, and the least term of each of
    its two sides, the smaller first. In this order they can be executed.
    """

    size: int
    merges: tuple[tuple[int, int, int], ...]

    def program(self) -> Program:
        """Steps that make this tree, nothing fused."""
        return Program(self.size, tuple(Step(a, b) for _, a, b in self.merges))

    def spine(self) -> list[tuple[int, int]]:
        """From term 0 to the root: how many terms are below, and the least term of what was just added."""
        return [(size, b) for size, a, b in self.merges if a == 0]

    def split(self, groups: Sequence[int]) -> tuple[list[Tree], Tree] | None:
        """The tree inside each group and the tree of the groups; None when a group is no subtree.

        `groups[k]` is the group of term k; groups are numbered from 0 by their least term.
        """
        count = max(groups) + 1
        members: list[list[int]] = [[] for _ in range(count)]
        rank = []
        for term, group in enumerate(groups):
            rank.append(len(members[group]))
            members[group].append(term)
        inner: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
        outer, whole = [], [1] * count
        for size, a, b in self.merges:
            if groups[a] == groups[b] and size <= len(members[groups[a]]):
                inner[groups[a]].append((size, rank[a], rank[b]))
            elif members[groups[a]][0] == a and members[groups[b]][0] == b:
                whole[groups[a]] += whole[groups[b]]
                outer.append((whole[groups[a]], groups[a], groups[b]))
            else:
                return None
        if any(len(merges) != len(terms) - 1 for merges, terms in zip(inner, members, strict=True)):
            return None
        trees = [Tree(len(t), tuple(m)) for t, m in zip(members, inner, strict=True)]
        return trees, Tree(count, tuple(sorted(outer)))


def tree_of(size: int, merges: Sequence[tuple[int, int, int]]) -> Tree:
    """A tree from its merges in any order."""
    return Tree(size, tuple(sorted(merges)))
