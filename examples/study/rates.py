"""Learning rates: how far the usable range reaches, with and without batch norm."""

from __future__ import annotations

from typing import Any

import fusednorm.torch as fnt
import numpy as np

from .common import (
    BATCH,
    LOSS,
    TRAINED_ON,
    WITH,
    WITHOUT,
    Claim,
    Found,
    Settings,
    chain,
    curve,
    evaluate,
    in_percent,
    mlp,
    panels,
    percent,
    split,
    spread,
    trained,
    widths,
)

TITLE = "Learning rates"
HIDDEN = 128, 128, 128
USABLE = 0.1  # training loss of the last epoch
EPOCH = TRAINED_ON // BATCH


def setup(found: Found) -> str:
    return (
        f"An MLP {chain(found['widths'])} with ReLU, plain gradient descent, {found['epochs']} epochs of batches of "
        f"{BATCH}, at {len(found['rates'])} learning rates, four a decade. A rate is usable if the training loss of "
        f"the last epoch is below {USABLE}."
    )


def measure(settings: Settings) -> Found:
    rates = [float(rate) for rate in 10 ** settings.pick(np.arange(-3, 2.01, 0.25), np.arange(-2.0, 1.1, 1.0))]
    epochs = settings.pick(10, 2)
    found: Found = {"widths": widths(settings, *HIDDEN), "rates": rates, "epochs": epochs}
    arms = {"with": fnt.BatchNorm1d, "without": None}
    for arm in arms:
        found[arm] = {"loss": [[] for _ in rates], "accuracy": [[] for _ in rates]}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        for i, rate in enumerate(rates):
            for arm, norm in arms.items():
                model = mlp(found["widths"], norm, seed=seed)
                found[arm]["loss"][i].append(trained(model, data, rate, epochs * EPOCH, seed=seed))
                found[arm]["accuracy"][i].append(evaluate(model, data.test_x, data.test_y)[1])
    return found


def draw(found: Found) -> Any:
    figure, (loss, accuracy) = panels(2)
    for arm, (color, label) in (("with", WITH), ("without", WITHOUT)):
        marker = "o" if arm == "with" else "s"
        curve(loss, found["rates"], found[arm]["loss"], color, label, marker=marker)
        curve(accuracy, found["rates"], found[arm]["accuracy"], color, label, marker=marker)
    loss.axhline(USABLE, color="#333333", linewidth=0.8, linestyle=":")
    loss.annotate("usable below", (found["rates"][0], USABLE), (0, 3), textcoords="offset points", fontsize=8)
    loss.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=LOSS)
    in_percent(accuracy, xscale="log", xlabel="learning rate", ylim=(0, 1.02))
    accuracy.legend(frameon=False)
    return figure


def usable(found: Found, arm: str, seed: int) -> list[float]:
    return [rate for rate, by_seed in zip(found["rates"], found[arm]["loss"], strict=True) if by_seed[seed] < USABLE]


def claims(found: Found) -> list[Claim]:
    seeds = range(len(found["with"]["loss"][0]))
    ranges = {arm: [usable(found, arm, seed) or [0.0] for seed in seeds] for arm in ("with", "without")}
    top = {arm: [rates[-1] for rates in each] for arm, each in ranges.items()}
    bottom = {arm: [rates[0] for rates in each] for arm, each in ranges.items()}
    best = {
        arm: [max(by_rate[seed] for by_rate in found[arm]["accuracy"]) for seed in seeds] for arm in ("with", "without")
    }
    least = {arm: [min(by_rate[seed] for by_rate in found[arm]["loss"]) for seed in seeds] for arm in best}
    higher = [a / b if b else float("inf") if a else 1.0 for a, b in zip(top["with"], top["without"], strict=True)]
    return [
        Claim(
            "Batch norm allows larger learning rates.",
            f"The largest usable rate is {spread(top['with'])} with, {spread(top['without'])} without: "
            f"{spread(higher)} times as large; it is checked to be more than twice, two of the rates. The smallest "
            f"usable one is {spread(bottom['with'])} with, {spread(bottom['without'])} without.",
            [ratio > 2 for ratio in higher],
        ),
        Claim(
            "Batch norm speeds up training: each at its best rate, the training loss is lower.",
            f"Lowest training loss {spread(least['with'])} with, {spread(least['without'])} without; best test "
            f"accuracy {spread(best['with'], percent)} and {spread(best['without'], percent)}.",
            [a < b for a, b in zip(least["with"], least["without"], strict=True)],
        ),
    ]
