"""Tuning: grid, random and coarse-to-fine search at the same budget; scales; one model babysat, or several at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import torch

from .common import (
    BATCH,
    BLUE,
    COLORS,
    GRAY,
    MARKERS,
    RED,
    TRAINED_ON,
    Claim,
    Data,
    Found,
    Settings,
    bars,
    chain,
    curve,
    evaluate,
    mlp,
    number,
    panels,
    split,
    spread,
    training,
    widths,
)

TITLE = "Tuning"
HIDDEN = 64, 64
TRIALS = 16
RATE, FORGET = (1e-4, 10.0), (1e-3, 1.0)  # of the learning rate, and of 1 − β
MODELS = 8
EPOCH = TRAINED_ON // BATCH

Objective = Callable[[float, float], float]
Box = tuple[tuple[float, float], tuple[float, float]]


def setup(found: Found) -> str:
    return (
        f"An MLP {chain(found['widths'])} with ReLU and batch norm, gradient descent with momentum β for "
        f"{found['epochs']} epochs of batches of {BATCH}. A search has {found['trials']} trials of a rate from "
        f"{number(RATE[0])} to {number(RATE[1])} and of 1 − β from {number(FORGET[0])} to {number(FORGET[1])} to find "
        f"the lowest loss on held-out images; for each seed there are {found['repeats']} searches of each kind, whose "
        "median counts, and one grid. Coarse to fine: half of the trials anywhere, the other half within half a decade "
        f"of the best of these. Babysat: one model for {MODELS * found['epochs']} epochs, from a rate drawn at random "
        "that is halved after an epoch whose loss is higher than the last and raised by a fifth after the others. In "
        f"parallel: the best of {MODELS} models, rates drawn at random, each for as many epochs as the babysat one, or "
        "for as many in all."
    )


def measure(settings: Settings) -> Found:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    epochs, repeats, trials = settings.pick(2, 1), settings.pick(5, 1), settings.pick(TRIALS, 4)
    found: Found = {"widths": widths(settings, *HIDDEN), "epochs": epochs, "repeats": repeats, "trials": trials}
    found |= {"best": {name: [] for name in SEARCHES}, "babysat": [], "parallel": [], "shared": []}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)

        def objective(rate: float, forget: float, data: Data = data, seed: int = seed) -> float:
            model = mlp([data.features, *HIDDEN, 10], seed=seed)
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=1 - forget)
            for _ in training(model, data, optimizer, epochs * EPOCH, seed=seed):
                pass
            return evaluate(model, data.test_x, data.test_y)[0]

        for name, search in SEARCHES.items():
            times = 1 if name == "grid" else repeats
            # Best so far, after each trial: the median of the searches.
            curves = [np.minimum.accumulate(search(objective, trials, 100 * seed + i)) for i in range(times)]
            found["best"][name].append(np.median(curves, 0).tolist())
        of_ways = [ways(data, epochs, 100 * seed + i) for i in range(repeats)]
        for key in ("babysat", "parallel", "shared"):
            found[key].append(float(np.median([each[key] for each in of_ways])))
    return found


def sampled(objective: Objective, sampler: Any, trials: int, box: Box = (RATE, FORGET), log: bool = True) -> Any:
    """Losses in the order of the trials, and the best trial's rate and 1 − β."""
    study = optuna.create_study(sampler=sampler)

    def of(trial: Any) -> float:
        return objective(*(trial.suggest_float(name, *ends, log=log) for name, ends in zip(NAMES, box, strict=True)))

    study.optimize(of, n_trials=trials)
    return [trial.value for trial in study.trials], [study.best_params[name] for name in NAMES]


NAMES = "rate", "forget"


def grid(objective: Objective, trials: int, seed: int) -> list[float]:
    side = math.isqrt(trials)
    values = [np.geomspace(*ends, side).tolist() for ends in (RATE, FORGET)]
    return sampled(objective, optuna.samplers.GridSampler(dict(zip(NAMES, values, strict=True)), seed), side**2)[0]  # type: ignore[no-any-return]


def random(objective: Objective, trials: int, seed: int, log: bool = True) -> list[float]:
    return sampled(objective, optuna.samplers.RandomSampler(seed), trials, log=log)[0]  # type: ignore[no-any-return]


def coarse_to_fine(objective: Objective, trials: int, seed: int) -> list[float]:
    sampler, near = optuna.samplers.RandomSampler(seed), math.sqrt(10)
    coarse, best = sampled(objective, sampler, trials // 2)
    (low, high), (least, most) = (
        (max(ends[0], value / near), min(ends[1], value * near))
        for value, ends in zip(best, (RATE, FORGET), strict=True)
    )
    return coarse + sampled(objective, sampler, trials - trials // 2, ((low, high), (least, most)))[0]  # type: ignore[no-any-return]


def tree(objective: Objective, trials: int, seed: int) -> list[float]:
    return sampled(objective, optuna.samplers.TPESampler(seed=seed), trials)[0]  # type: ignore[no-any-return]


SEARCHES: dict[str, Callable[[Objective, int, int], list[float]]] = {
    "grid": grid,
    "random": random,
    "random, linear scales": lambda objective, trials, seed: random(objective, trials, seed, log=False),
    "coarse to fine": coarse_to_fine,
    "Optuna's default (TPE)": tree,
}


def ways(data: Data, epochs: int, seed: int) -> dict[str, float]:
    """Held-out losses: of one model babysat, of the best of several, and of these with one model's steps in all."""
    rates = [
        float(rate)
        for rate in 10 ** np.random.default_rng(seed).uniform(math.log10(RATE[0]), math.log10(RATE[1]), MODELS)
    ]
    length = MODELS * epochs
    model = mlp([data.features, *HIDDEN, 10], seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), rates[0], momentum=0.9)
    steps, last = training(model, data, optimizer, length * EPOCH, seed=seed), math.inf
    for _ in range(length):
        loss = float(np.mean([loss for _, loss in zip(range(EPOCH), steps, strict=False)] or [math.inf]))
        for group in optimizer.param_groups:
            group["lr"] *= 1.2 if loss < last else 0.5
        last = loss
    found = {"babysat": evaluate(model, data.test_x, data.test_y)[0]}
    for key, each in (("parallel", length), ("shared", epochs)):
        losses = []
        for rate in rates:
            model = mlp([data.features, *HIDDEN, 10], seed=seed)
            for _ in training(
                model, data, torch.optim.SGD(model.parameters(), rate, momentum=0.9), each * EPOCH, seed=seed
            ):
                pass
            losses.append(evaluate(model, data.test_x, data.test_y)[0])
        found[key] = min(losses)
    return found


def draw(found: Found) -> Any:
    figure, (searches, models) = panels(2, width=11.0)
    for (name, curves), color, marker in zip(found["best"].items(), COLORS, MARKERS, strict=False):
        by_trial = list(zip(*curves, strict=True))
        curve(searches, range(1, len(by_trial) + 1), by_trial, color, name, marker=marker, markersize=3)
    searches.set(yscale="log", xlabel="trials", ylabel="lowest held-out loss so far, nats")
    searches.legend(frameon=False, fontsize=8)
    names = "one, babysat", f"{MODELS} in parallel", f"{MODELS}, as many steps in all"
    bars(models, names, [found[key] for key in ("babysat", "parallel", "shared")], [RED, BLUE, GRAY])
    models.set(xlabel="held-out loss, nats")
    return figure


def claims(found: Found) -> list[Claim]:
    last = {name: [curve[-1] for curve in curves] for name, curves in found["best"].items()}

    def told(*names: str) -> str:
        return ", ".join(f"{name} {spread(last[name])}" for name in names)

    def below(one: list[float], other: list[float]) -> list[bool]:
        return [a < b for a, b in zip(one, other, strict=True)]

    return [
        Claim(
            "Random search beats a grid at the same budget.",
            f"Lowest held-out loss of {found['trials']} trials: {told('random', 'grid')}.",
            below(last["random"], last["grid"]),
        ),
        Claim(
            "The rate and 1 − β belong on a log scale: random search on it beats random search on linear scales.",
            f"Lowest loss: {told('random', 'random, linear scales')}.",
            below(last["random"], last["random, linear scales"]),
        ),
        Claim(
            "Coarse to fine beats random search over the whole range.",
            f"Lowest loss: {told('coarse to fine', 'random')}; {told(list(SEARCHES)[-1])}.",
            below(last["coarse to fine"], last["random"]),
        ),
        Claim(
            "With enough machines, several models in parallel beat one that is babysat.",
            f"Held-out loss: {spread(found['parallel'])} of the best of {MODELS}, {spread(found['babysat'])} babysat.",
            below(found["parallel"], found["babysat"]),
        ),
        Claim(
            "With one machine, babysit one model: as many steps in all are better spent on it than on several.",
            f"Held-out loss: {spread(found['babysat'])} babysat, {spread(found['shared'])} of the best of {MODELS}.",
            below(found["babysat"], found["shared"]),
        ),
    ]
