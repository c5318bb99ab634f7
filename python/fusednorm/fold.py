"""Fold: every normalization in five integers.

All normalizations are the same passes over memory. They differ only in which elements share a *statistic* (a mean and a
variance) and which share a *parameter* (a weight and a bias). A fold says both; the kernels know nothing else.

A contiguous tensor is seen as four axes, in memory order::

        batch      outer       groups      inner
     ┌─────────┬───────────┬───────────┬───────────┐
     │    b    │     o     │     g     │     i     │       x[b, o, g, i]
     └────┬────┴─────┬─────┴─────┬─────┴─────┬─────┘
          │      reduced over    │      reduced over
          └──────────┬───────────┘
              own statistic                                statistic  s = b·groups + g
                                                           channel    c = (g·inner + i) / span
                                                           position   p = (b·outer + o)·span + i mod span

One statistic is taken over ``outer·inner`` elements; there are ``batch·groups`` of them. ``span`` is the run of
elements along ``inner`` that share one weight and one bias; there are ``groups·inner / span`` channels. Batch
normalization of images, both layouts, as an example of what lies where (each letter a channel, each number a sample)::

    channels first (N=2, C=3, HW=4)                       channels last (N=2, HW=4, C=3)
    Fold(batch=1, outer=2, groups=3, inner=4, span=4)     Fold(batch=1, outer=8, groups=3, inner=1, span=1)

    a0 a0 a0 a0  b0 b0 b0 b0  c0 c0 c0 c0                 a0 b0 c0  a0 b0 c0  a0 b0 c0  a0 b0 c0
    a1 a1 a1 a1  b1 b1 b1 b1  c1 c1 c1 c1                 a1 b1 c1  a1 b1 c1  a1 b1 c1  a1 b1 c1
    rows: a statistic is a list of runs                   columns: a statistic is a column

The folds of the batch norms, for N samples, C channels and HW positions:

===================  ==============================  =============================
norm                 channels first (N, C, HW)       channels last (N, HW, C)
===================  ==============================  =============================
batch                (1, N, C, HW, HW)               (1, N·HW, C, 1, 1)
batch of (N, C)      (1, N, C, 1, 1)                 the same
ghost, B samples     (N/B, B, C, HW, HW)             (N/B, B·HW, C, 1, 1)
instance             (N, 1, C, HW, HW)               (N, HW, C, 1, 1)
group, G groups      (N, 1, G, C/G·HW, HW)           (N, HW, G, C/G, 1)
group of (N, C)      (N, 1, G, C/G, 1)               the same
===================  ==============================  =============================

Where a statistic spans several channels, ``inner`` is longer than ``span``. Group norm of one sample, two groups of two
channels (a b and c d), each of four positions::

    channels first                                        channels last
    Fold(batch=1, outer=1, groups=2, inner=8, span=4)     Fold(batch=1, outer=4, groups=2, inner=2, span=1)

    a a a a b b b b  c c c c d d d d                      a b c d  a b c d  a b c d  a b c d
    └── group 0 ──┘  └── group 1 ──┘                      └0┘ └1┘  └0┘ └1┘  └0┘ └1┘  └0┘ └1┘

Layer norm and RMS norm of M rows of D numbers are (M, 1, 1, D, 1): a row has one statistic, and each of its numbers a
parameter of its own. Weight norm of a tensor (A, O, B) that keeps its middle axis is batch norm's (1, A, O, B, B); with
one length for all of it, (1, 1, 1, size, size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusednorm._C import Fold

__all__ = ["Fold", "batch", "group", "layer", "memory_order", "reduction"]


def memory_order(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, ...] | None:
    """Axes longer than 1 from the slowest in memory to the fastest, or None where the array has gaps or overlaps."""
    if 0 in shape:
        return tuple(range(len(shape)))
    order = sorted((a for a, n in enumerate(shape) if n > 1), key=lambda a: -strides[a])
    step = itemsize
    for a in reversed(order):
        if strides[a] != step:
            return None
        step *= shape[a]
    return tuple(order)


def batch(shape: Sequence[int], order: Sequence[int], axis: int, ghosts: int = 1) -> Fold:
    """Batch normalization: one statistic and one channel for each index of `axis`.

    ``order`` is the memory order of the axes (:func:`memory_order`): any dense array will do, since the order of the
    reduced axes among themselves does not matter. With ``ghosts`` > 1 the slowest axis is cut into that many equal
    parts, each with statistics of its own.
    """
    before = order[: order.index(axis)] if axis in order else order
    after = order[order.index(axis) + 1 :] if axis in order else ()
    outer, inner = math.prod(shape[a] for a in before), math.prod(shape[a] for a in after)
    return Fold(ghosts, outer // ghosts, shape[axis], inner, inner)


def group(shape: Sequence[int], order: Sequence[int], axis: int, groups: int) -> Fold | None:
    """Group normalization: a statistic for each sample and each of `groups` runs of neighbouring indices of `axis`; as
    many groups as indices are instance normalization.

    Samples lie along the first axis that is not `axis`. None where that is not the slowest in memory.
    """
    samples = 1 if axis == 0 else 0
    rest = [a for a in order if a != samples]
    if shape[samples] > 1 and 0 not in shape and order[0] != samples:
        return None
    # A single channel, or none at all, has no place in the order.
    at = rest.index(axis) if axis in rest else 0
    outer = math.prod(shape[a] for a in rest[:at])
    span = math.prod(shape[a] for a in rest[at:] if a != axis)
    if span == 0:  # which would not tell how many channels there are
        outer, span = 0, 1
    return Fold(shape[samples], outer, groups, shape[axis] // max(groups, 1) * span, span)


def layer(shape: Sequence[int], order: Sequence[int], normalized: int) -> Fold | None:
    """Layer normalization over the last `normalized` axes; None where these are not the fastest in memory, in order."""
    kept = len(shape) - normalized
    inner = [a for a in order if a >= kept]
    if list(order[len(order) - len(inner) :]) != sorted(inner):
        return None
    return Fold(math.prod(shape[:kept]), 1, 1, math.prod(shape[kept:]), 1)


def reduction(shape: Sequence[int], order: Sequence[int], reduced: frozenset[int]) -> Fold | None:
    """Statistics over the axes in `reduced`, or None where kept and reduced axes alternate too often for one fold."""
    runs: list[tuple[bool, int]] = []
    for a in order:
        if runs and runs[-1][0] == (a in reduced):
            runs[-1] = (runs[-1][0], runs[-1][1] * shape[a])
        else:
            runs.append((a in reduced, shape[a]))
    # What is missing of (kept, reduced, kept, reduced) counts 1.
    sizes = [1, 1, 1, 1]
    place = 4 - len(runs) if runs and runs[-1][0] else 3 - len(runs)
    if place < 0:
        return None
    for offset, (_, n) in enumerate(runs):
        sizes[place + offset] = n
    outer_batch, outer, groups, inner = sizes
    return Fold(outer_batch, outer, groups, inner, inner)
