"""How things are timed: all contenders in turn, round after round, so that a noisy moment hits them alike."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

# Seconds. A sample is as many calls as fill SAMPLE, far above what reading the clock costs. Rounds go on until all
# samples together took ENOUGH, ROUNDS of them at least. What takes longer than SLOW is timed once.
SAMPLE, ENOUGH, SLOW = 1e-3, 0.2, 1.0
ROUNDS = 7


@dataclass(frozen=True)
class Contender:
    """One way to compute the same.

    Attributes:
        name: the key of its times.
        call: one computation; what it returns is only looked at when results are compared.
        array: makes a NumPy array, laid out as x, of what `call` returned; None: there is nothing to compare.
        prepare: called before each sample, untimed.
        count: computations in one call.
    """

    name: str
    call: Callable[[], Any]
    array: Callable[[Any], np.ndarray[Any, Any]] | None = None
    prepare: Callable[[], Any] | None = None
    count: int = 1


def wall(call: Callable[[], Any], calls: int) -> float:
    """Seconds that so many calls take together."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return perf_counter() - start


def interleaved(
    contenders: Sequence[Contender],
    repeat: int | None = None,
    *,
    clock: Callable[[Callable[[], Any], int], float] = wall,
    sample: float = SAMPLE,
) -> dict[str, list[float]]:
    """Milliseconds a computation, one number for each round, by the contenders' names.

    Args:
        repeat: number of rounds; None: by the clock, see above.
        clock: measures calls as :func:`wall` does.
        sample: seconds of calls that make one sample.
    """
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    collects = gc.isenabled()
    gc.disable()
    try:
        for contender in contenders:
            first = _sample(contender, 1, clock)
            if first < SLOW:
                first = _sample(contender, 1, clock)
                calls[contender.name] = max(1, math.ceil(sample / max(first, 1e-9)))
                samples[contender.name] = []
            else:
                samples[contender.name] = [first / contender.count * 1e3]
        rounds, spent = 0, 0.0
        while calls and (rounds < repeat if repeat else rounds < ROUNDS or spent < ENOUGH):
            for contender in contenders:
                if contender.name in calls:
                    seconds = _sample(contender, calls[contender.name], clock)
                    samples[contender.name].append(seconds / (calls[contender.name] * contender.count) * 1e3)
                    spent += seconds
            rounds += 1
    finally:
        if collects:
            gc.enable()
    return samples


def _sample(contender: Contender, calls: int, clock: Callable[[Callable[[], Any], int], float]) -> float:
    if contender.prepare:
        contender.prepare()
    return clock(contender.call, calls)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(np.asarray(samples), (10, 50, 90))
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios round by round: a slow moment that hit a whole round cancels."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])
