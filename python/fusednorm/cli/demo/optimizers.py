"""Five optimizers. Each is given arrays once and steps them in place; weights, biases, gamma and beta are all alike.

Batch normalization allows larger rates than plain networks take; `default_rate` suits both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class SGD:
    """Plain gradient descent: ``p ← p − rate·g``."""

    default_rate = 0.2

    def __init__(self, parameters: Sequence[Array], rate: float) -> None:
        self.parameters = parameters
        self.rate = rate

    def step(self, gradients: Sequence[Array]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p -= self.rate * g


class Momentum(SGD):
    """The gradients of the past roll on: ``v ← 0.9·v − rate·g; p ← p + v`` (Polyak 1964)."""

    default_rate = 0.02
    friction = 0.9

    def __init__(self, parameters: Sequence[Array], rate: float) -> None:
        super().__init__(parameters, rate)
        self.velocities = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: Sequence[Array]) -> None:
        for p, g, v in zip(self.parameters, gradients, self.velocities, strict=True):
            v *= self.friction
            v -= self.rate * g
            p += v


class Nesterov(Momentum):
    """Momentum that looks ahead (Nesterov 1983), in the form that needs the gradient at p only (Bengio et al. 2013)."""

    def step(self, gradients: Sequence[Array]) -> None:
        for p, g, v in zip(self.parameters, gradients, self.velocities, strict=True):
            v *= self.friction
            v -= self.rate * g
            p += self.friction * v - self.rate * g


class RMSProp(SGD):
    """Every parameter has its own rate, by the size its gradients had lately (Tieleman & Hinton 2012)."""

    default_rate = 0.001
    memory = 0.9

    def __init__(self, parameters: Sequence[Array], rate: float) -> None:
        super().__init__(parameters, rate)
        self.squares = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: Sequence[Array]) -> None:
        for p, g, s in zip(self.parameters, gradients, self.squares, strict=True):
            s *= self.memory
            s += (1 - self.memory) * g * g
            p -= self.rate * g / (np.sqrt(s) + 1e-8)


class Adam(SGD):
    """RMSProp with momentum, both corrected for having started at zero (Kingma & Ba 2015)."""

    default_rate = 0.001
    memory = (0.9, 0.999)

    def __init__(self, parameters: Sequence[Array], rate: float) -> None:
        super().__init__(parameters, rate)
        self.means = [np.zeros_like(p) for p in parameters]
        self.squares = [np.zeros_like(p) for p in parameters]
        self.steps = 0

    def step(self, gradients: Sequence[Array]) -> None:
        self.steps += 1
        m_memory, s_memory = self.memory
        m_seen, s_seen = 1 - m_memory**self.steps, 1 - s_memory**self.steps
        for p, g, m, s in zip(self.parameters, gradients, self.means, self.squares, strict=True):
            m *= m_memory
            m += (1 - m_memory) * g
            s *= s_memory
            s += (1 - s_memory) * g * g
            p -= self.rate * (m / m_seen) / (np.sqrt(s / s_seen) + 1e-8)


OPTIMIZERS: dict[str, type[SGD]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "rmsprop": RMSProp,
    "adam": Adam,
}
