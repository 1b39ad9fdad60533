"""Associative maps along a chain, composed in a tree: log2 of its length in batched levels.

A map k takes what belongs to the end of link k to what belongs to its start. Going up the tree
composes neighbours; going down gives the values at all links from the one at the end of the chain.
Maps of equal shapes are composed in one batch, so a long chain costs few calls.

Source: G. E. Blelloch (1990), Prefix sums and their applications, CMU-CS-90-190; for control,
S. Sarkka, A. F. Garcia-Fernandez (2023), Temporal parallelisation of dynamic programming and
linear quadratic control, IEEE Trans. Automat. Control 68(2), arXiv:2104.03186.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Map = tuple[Tensor, ...]


class Chain:
    """A chain of maps with all the compositions of its tree.

    Args:
        maps: The links, first to last; tensors with the same leading batch dimensions.
        compose: `(first, then)` -> the map of both, all three given as tuples of tensors.
    """

    def __init__(self, maps: Sequence[Map], compose: Callable[[Map, Map], Map]) -> None:
        self._levels = [list(maps)]
        while len(level := self._levels[-1]) > 1:
            pairs = [(*a, *b) for a, b in zip(level[::2], level[1::2], strict=False)]
            merged = in_groups(lambda *both: compose(*map(tuple, halves(both))), pairs)
            self._levels.append(merged + level[2 * len(pairs) :])

    @property
    def whole(self) -> Map:
        """The map of the whole chain."""
        return self._levels[-1][0]

    def ends(self, last: Tensor, apply: Callable[[Map, Tensor], Tensor]) -> list[Tensor]:
        """Return the values at the end of every link, from the one at the end of the chain.

        Args:
            last: That value.
            apply: `(map, value at its end)` -> value at its start.
        """
        ends = [last]
        for level in reversed(self._levels[:-1]):
            pairs = [(*level[2 * i + 1], end) for i, end in enumerate(ends[: len(level) // 2])]
            starts = in_groups(lambda *link: (apply(link[:-1], link[-1]),), pairs)
            between = [value for (start,), end in zip(starts, ends, strict=False)
                       for value in (start, end)]  # fmt: skip
            ends = between + ends[len(pairs) :]
        return ends


def in_groups(function: Callable[..., Map], items: Sequence[Map]) -> list[Map]:
    """Apply a batched function of tensors to items, those of equal shapes together."""
    groups: dict[tuple, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(tuple(X.shape for X in item), []).append(i)
    results: list[Map] = [()] * len(items)
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = function(*items[members[0]])
            continue
        columns = zip(*(items[i] for i in members), strict=True)
        stacked = function(*(torch.stack(column) for column in columns))
        for i, *parts in zip(members, *(X.unbind(0) for X in stacked), strict=True):
            results[i] = tuple(parts)
    return results


def following(values: Sequence[Any]) -> list[Any]:
    """Return what belongs to the phase that follows each, around the cycle."""
    return [*values[1:], values[0]]


def halves(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the first and the second half."""
    middle = len(tensors) // 2
    return tensors[:middle], tensors[middle:]
