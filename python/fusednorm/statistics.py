"""Moments: count, mean and sum of squared deviations, to be pushed to and merged without losing a digit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusednorm import _C, foreign, functional
from fusednorm.arrays import Array

__all__ = ["Moments"]


class Moments:
    """Count, mean and M2 = Σ(x − mean)² of a stream of numbers, elementwise for arrays.

    ``push`` takes observations in, ``merge`` another Moments. Both are Chan, Golub & LeVeque's update (1979), which is
    Welford's (1962) for one observation at a time; neither cancels. Can be pickled.

    Parameters
    ----------
    count : array_like, optional
        How many observations there were. The three are broadcast to one shape, and float64 inside; unless they are
        given nothing has been seen.
    mean : array_like, optional
        Their mean.
    m2 : array_like, optional
        Their Σ(x − mean)².

    Attributes
    ----------
    count : float64 array
        How many observations there were; all three are of one shape.
    mean : float64 array
        Their mean.
    m2 : float64 array
        Their Σ(x − mean)².

    Raises
    ------
    ValueError
        Shapes that do not broadcast.
    """

    count: Array
    mean: Array
    m2: Array

    def __init__(self, count: Any = 0.0, mean: Any = 0.0, m2: Any = 0.0) -> None:
        arrays = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (count, mean, m2)))
        self.count, self.mean, self.m2 = (np.array(a, np.float64) for a in arrays)

    def push(self, x: Array, axes: int | Sequence[int] = 0) -> Moments:
        """Take in the observations that lie along `axes` of x (float32, float64, float16 or bfloat16): for x of shape
        (N, C) and axes 0, N observations of C numbers each. Returns the Moments.

        Raises ValueError where the remaining shape is not that of the moments so far, or an axis comes twice; AxisError
        for one that is not there; TypeError for other arrays.
        """
        n, mean, m2, reduced = functional._moments(foreign.plain(x, "x"), axes)
        mean, m2 = mean.squeeze(tuple(reduced)), m2.squeeze(tuple(reduced))
        return self.merge(Moments(n, mean, m2))

    def merge(self, other: Moments) -> Moments:
        """Take in all that `other` has seen. Returns the Moments. ValueError where the shapes differ."""
        if self.mean.shape == () and self.count == 0:
            self.count, self.mean, self.m2 = other.count.copy(), other.mean.copy(), other.m2.copy()
            return self
        if other.mean.shape != self.mean.shape:
            if other.mean.shape == () and other.count == 0:
                return self
            raise ValueError(f"moments of shape {other.mean.shape} do not merge into shape {self.mean.shape}")
        both = [np.stack((a, b)) for a, b in ((self.count, other.count), (self.mean, other.mean), (self.m2, other.m2))]
        into = [np.empty(self.mean.shape) for _ in both]
        (count, mean, m2), (merged_count, merged_mean, merged_m2) = both, into
        _C.merge(1, 2, self.mean.size, count, mean, m2, merged_count, merged_mean, merged_m2)
        self.count, self.mean, self.m2 = into
        return self

    def variance(self, correction: float = 0) -> Array:
        """M2 / (count − correction), float64; NaN where the divisor is not positive."""
        divisor = self.count - correction
        return np.where(divisor > 0, self.m2 / np.where(divisor > 0, divisor, 1), np.nan)

    def __repr__(self) -> str:
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"
