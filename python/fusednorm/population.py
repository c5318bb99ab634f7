"""Test-time statistics of a whole population: running statistics, estimated anew once training is over.

docs/population.md says which estimator is which, and when they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusednorm import arrays
from fusednorm.arrays import Array
from fusednorm.distributed import Group, group_of
from fusednorm.layers import BatchNorm, SwitchableNorm
from fusednorm.statistics import Moments

__all__ = ["Population"]

ESTIMATORS = ("exact", "paper", "cumulative")


class Estimate:
    """Mean and variance of what a batch norm is called on, from the moments of its batches.

    "exact": the union of all moments, whose variance is over N − correction. Otherwise the average over the batches of
    (mean, variance), of which those that count fewer than two values have none; the variance is over m − 1, or for
    "cumulative" over m − correction.
    """

    def __init__(self, estimator: str, channels: int, correction: int) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
        self.averages = estimator != "exact"
        self.correction = 1 if estimator == "paper" else correction
        self.batches = 0
        # Of averages each batch is one observation, of the pair.
        self.seen = Moments(*np.zeros((3, 2, channels) if self.averages else (3, channels)))

    def add(self, count: Array, mean: Array, m2: Array) -> None:
        """Take in the moments of some batches: (batches, channels) float64."""
        count, mean, m2 = (arrays.moved(a, "cpu") for a in (count, mean, m2))
        some = count[:, 0] > self.averages  # a mask counts or leaves out all channels of a position
        for n, *moments in zip(count[some], mean[some], m2[some], strict=True):
            self.batches += 1
            if self.averages:
                self.seen.merge(Moments(1, [moments[0], moments[1] / (n - self.correction)]))
            else:
                self.seen.merge(Moments(n, *moments))

    def result(self) -> tuple[Array, Array]:
        """Mean and variance. ValueError where they are not to be had."""
        if not self.batches:
            raise ValueError("it saw no batch")
        mean, variance = self.seen.mean if self.averages else (self.seen.mean, self.seen.variance(self.correction))
        if not self.averages and self.seen.count[0] <= self.correction:
            raise ValueError(f"it saw one value per channel, and a variance over n − {self.correction} needs more")
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise ValueError("its inputs have NaN or infinities, or values too large to square")
        return mean, variance

    def _state(self) -> Array:
        numbers = (self.seen.count, self.seen.mean, self.seen.m2)
        return np.concatenate([[self.batches], *(a.ravel() for a in numbers)])

    def _merge(self, state: Array) -> None:
        self.batches += int(state[0])
        self.seen.merge(Moments(*state[1:].reshape(3, *self.seen.mean.shape)))


def merged(estimates: Sequence[Estimate], group: Group | None) -> None:
    """Each estimate becomes that of all ranks, merged in their order: the same bits on each. One gather for all."""
    if group is None:
        return
    own = [estimate._state() for estimate in estimates]
    gathered = np.asarray(group.allgather(np.concatenate(own)))
    ends = np.cumsum([state.size for state in own])
    if gathered.ndim != 2 or gathered.shape[1] != ends[-1]:
        raise ValueError(
            f"process_group.allgather must return (ranks, {ends[-1]}), got {gathered.shape}: are the layers the same "
            "on each rank?"
        )
    for estimate in estimates:
        estimate.batches, estimate.seen = 0, Moments(*np.zeros((3, *estimate.seen.mean.shape)))
    for states in gathered:
        for estimate, state in zip(estimates, np.split(states, ends[:-1]), strict=True):
            estimate._merge(state)


class Population:
    """Running statistics estimated anew: in this context layers take in all batches that they are called on, and at its
    end mean and variance of these replace the running ones.

    ::

        with fn.Population(layer):
            for x in batches:
                layer(x)
        layer.eval()

    Layers behave as in training, whatever their flags say: each normalizes with the statistics of its batch (Wu &
    Johnson 2021, "Rethinking 'Batch' in BatchNorm", precise BN). The running statistics stay as they are until the end,
    and if the block raises, for good. The parameters stay, so call no optimizer.

    Parameters
    ----------
    *layers : BatchNorm or SwitchableNorm
        With running statistics. A layer that is called several times for a batch takes each call in.
    estimator : "exact", "paper" or "cumulative"
        "exact": mean and variance of the union of all inputs, merged by Chan, Golub & LeVeque (1979); the variance over
        N − correction, as the layer has it. "paper": E[μ_B] and E[m/(m − 1)·σ²_B] over the batches B of m values, each
        weighing the same whatever its size (Ioffe & Szegedy 2015, Algorithm 2). "cumulative": the average of the
        batches' running updates, as ``momentum=None`` gives, which is the paper's but for a layer whose correction
        is 0; in float64, rounded once. With ghost batches, these are the batches.
    process_group : optional
        A communicator, as :mod:`fusednorm.distributed` takes them: the batches of all ranks are merged at the end, in
        the order of the ranks, by one gather. Ranks may have different numbers of batches, or none; so a layer's own
        process_group takes no part meanwhile. If one rank raises before, the others wait for it.

    Raises
    ------
    TypeError
        On entering: layers of another kind, a process_group that is none.
    RuntimeError
        On entering: layers without running statistics, or those of which a Population is taken already.
    ValueError
        On entering: no layers, one of them twice, an unknown estimator. On leaving, which then changes no layer: one
        that saw no batch (on any rank), or too few values, or values that are not finite.

    Notes
    -----
    The moments are those of the kernels, taken in one more pass over x, before an ``out=x`` overwrites it, and kept in
    float64 on the CPU: a GPU is waited for in each call. A mask's positions count or not, as in training.
    `num_batches_tracked` becomes the number of batches taken in.
    """

    def __init__(
        self,
        *layers: BatchNorm | SwitchableNorm,
        estimator: str = "exact",
        process_group: Any = None,
    ) -> None:
        self.layers = layers
        self.estimator = estimator
        self.process_group = process_group

    def __enter__(self) -> Population:
        self._group = None if self.process_group is None else group_of(self.process_group)
        estimates = []
        for layer in self.layers:
            if not isinstance(layer, BatchNorm | SwitchableNorm):
                raise TypeError(
                    f"a population is taken of BatchNorm and SwitchableNorm layers, not of {type(layer).__name__}"
                )
            if layer._running_mean is None:
                raise RuntimeError(f"{layer} has no running statistics to be estimated")
            if layer._estimate is not None:
                raise RuntimeError(f"{layer} is part of another Population, whose block has not ended")
            estimates.append(Estimate(self.estimator, layer.num_features, getattr(layer, "correction", 1)))
        if not self.layers or len({*map(id, self.layers)}) < len(self.layers):
            raise ValueError("a Population needs layers, and each once")
        for layer, estimate in zip(self.layers, estimates, strict=True):
            layer._estimate = estimate
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        estimates = [layer.__dict__.pop("_estimate") for layer in self.layers]
        if kind is not None:
            return
        merged(estimates, self._group)
        found = []
        for layer, estimate in zip(self.layers, estimates, strict=True):
            try:
                found.append(estimate.result())
            except ValueError as why:
                raise ValueError(f"no statistics of {layer}: {why}; all layers are as they were") from None
        for layer, estimate, (mean, variance) in zip(self.layers, estimates, found, strict=True):
            layer.running_mean, layer.running_var = mean, variance
            layer.num_batches_tracked = estimate.batches
