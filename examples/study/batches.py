"""Batch size as regularizer: plain batches and ghost batches from 2 to 512, the statistics' noise, and dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import fusednorm as fn
import fusednorm.torch as fnt
import numpy as np
import torch

from .common import (
    BLUE,
    GRAY,
    GREEN,
    RED,
    Claim,
    Data,
    Found,
    GhostNorm,
    Norm,
    Settings,
    chain,
    curve,
    evaluate,
    in_percent,
    level,
    mlp,
    number,
    panels,
    percent,
    split,
    spread,
    training,
    widths,
)

TITLE = "Batch size as regularizer"
HIDDEN = 128, 128
TRAINED_ON = 512
RATE = 0.4  # at 512; it goes with the root of the batch's size
DROPOUT = 0.2, 0.5
ARMS = "ghost", "batch", "without"


def setup(found: Found) -> str:
    return (
        f"An MLP {chain(found['widths'])} with ReLU on {TRAINED_ON} images, {found['tested']} to test. Ghost batches: "
        f"gradient descent with all {TRAINED_ON} in each of {found['steps']} steps, so that nothing but the noise of "
        f"the statistics differs. Batches, with batch norm and without: {found['epochs']} epochs at the rate "
        f"{RATE}·√(size/{TRAINED_ON}). Dropout {' and '.join(map(number, DROPOUT))} without batch norm: batches of "
        f"{TRAINED_ON}, as many steps as for ghost batches. The gap is test loss minus training loss, both as at test "
        "time. Noise: the standard deviation of μ_B and of σ_B over batches, in units of σ, for the second layer's z "
        "in an untrained net."
    )


def measure(settings: Settings) -> Found:
    sizes = settings.pick([2, 4, 8, 16, 32, 64, 128, 256, 512], [4, 64, 512])
    steps, epochs = settings.pick(150, 10), settings.pick(10, 1)
    found: Found = {"widths": widths(settings, *HIDDEN), "sizes": sizes, "steps": steps, "epochs": epochs}
    found["noise"] = {"mean": [], "deviation": []}
    for arm in ARMS:
        found[arm] = {key: [[] for _ in sizes] for key in ("train", "test", "accuracy")}
    found["dropout"] = {str(p): {key: [] for key in ("train", "test", "accuracy")} for p in (0.0, *DROPOUT)}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed, TRAINED_ON)
        found["tested"] = len(data.test_x)
        for i, size in enumerate(sizes):
            whole = measured(data, partial(GhostNorm, size=size), TRAINED_ON, steps, seed)
            batch = measured(data, fnt.BatchNorm1d, size, epochs * TRAINED_ON // size, seed)
            without = measured(data, None, size, epochs * TRAINED_ON // size, seed)
            for arm, each in zip(ARMS, (whole, batch, without), strict=True):
                for key, value in each.items():
                    found[arm][key][i].append(value)
        for p in (0.0, *DROPOUT):
            for key, value in measured(data, None, TRAINED_ON, steps, seed, p).items():
                found["dropout"][str(p)][key].append(value)
        for key, by_size in noise(data, sizes[:-1], seed).items():
            found["noise"][key].append(by_size)
    return found


def measured(data: Data, norm: Norm | None, size: int, steps: int, seed: int, dropout: float = 0.0) -> dict[str, float]:
    model = mlp([data.features, *HIDDEN, 10], norm, dropout=dropout, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE * (size / TRAINED_ON) ** 0.5)
    for _ in training(model, data, optimizer, steps, size, seed):
        pass
    (train, _), (test, accuracy) = evaluate(model, data.x, data.y), evaluate(model, data.test_x, data.test_y)
    return {"train": train, "test": test, "accuracy": accuracy}


def noise(data: Data, sizes: list[int], seed: int) -> dict[str, list[float]]:
    """Of μ_B and σ_B, relative to σ, the root of the mean square over the features."""
    model = mlp([data.features, *HIDDEN, 10], None, seed=seed)
    with torch.no_grad():
        z = model[:3](data.x).numpy()
    _, var = fn.moments(z, 0)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"mean": [], "deviation": []}
    for size in sizes:
        drawn = z[np.array([rng.choice(len(z), size, replace=False) for _ in range(200)])]
        means, variances = fn.moments(drawn, 1)
        for key, of in (("mean", means), ("deviation", np.sqrt(variances))):
            found[key].append(float(np.sqrt(np.mean(of.var(0) / var))))
    return found


def draw(found: Found) -> Any:
    figure, (gap, accuracy, noisy) = panels(3, width=11.0)
    sizes = found["sizes"]
    named = (("ghost", BLUE, f"ghost batches of m, of {TRAINED_ON}", "o"), ("batch", GREEN, "batches of m", "D"),
             ("without", RED, "batches of m, no batch norm", "s"))  # fmt: skip
    for arm, color, label, marker in named:
        curve(gap, sizes, gaps(found[arm]), color, label, marker=marker)
        curve(accuracy, sizes, found[arm]["accuracy"], color, label, marker=marker)
    for (p, each), style in zip(found["dropout"].items(), (":", "--", "-."), strict=True):
        label = f"dropout {p}, no batch norm" if float(p) else "neither"
        level(gap, np.subtract(each["test"], each["train"]).tolist(), label, color=GRAY, linestyle=style)
        level(accuracy, each["accuracy"], label, color=GRAY, linestyle=style)
    for key, color, label, marker in (("mean", BLUE, "μ_B", "o"), ("deviation", GREEN, "σ_B", "D")):
        curve(noisy, sizes[:-1], list(zip(*found["noise"][key], strict=True)), color, label, marker=marker)
    noisy.plot(sizes[:-1], np.array(sizes[:-1]) ** -0.5, color="#333333", linewidth=0.8, linestyle=":", label="1/√m")
    for axes in (gap, accuracy, noisy):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes[::2], sizes[::2])
        axes.set_xlabel("batch size m, samples")
    gap.set(ylim=(0, None), ylabel="test loss − training loss, nats")
    in_percent(accuracy)
    noisy.set(yscale="log", ylabel="standard deviation / σ")
    noisy.legend(frameon=False)
    figure.legend(*gap.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def gaps(arm: Found) -> list[list[float]]:
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(arm["train"], arm["test"], strict=True)]


def claims(found: Found) -> list[Claim]:
    sizes, ghost = found["sizes"], found["ghost"]
    whole, of_ghosts, middle = ghost["test"][-1], gaps(ghost), len(sizes) // 2
    dropped = {p: gaps({key: [by_seed] for key, by_seed in each.items()})[0] for p, each in found["dropout"].items()}
    none = dropped.pop("0.0")
    closed = {p: [1 - a / b for a, b in zip(each, none, strict=True)] for p, each in dropped.items()}
    by_ghosts = [1 - a / b for a, b in zip(of_ghosts[middle], of_ghosts[-1], strict=True)]
    slopes = [float(np.polyfit(np.log(sizes[:-1]), np.log(each), 1)[0]) for each in found["noise"]["mean"]]
    plain = found["batch"]["accuracy"]
    return [
        Claim(
            "μ_B and σ_B are noisy, and the noise of μ_B goes as 1/√m.",
            f"The noise of μ_B is {spread(each[0] for each in found['noise']['mean'])}·σ at m = {sizes[0]} and "
            f"{spread(each[-1] for each in found['noise']['mean'])}·σ at {sizes[-2]} (drawn without replacement, hence "
            f"less than 1/√m there); that of σ_B {spread(each[0] for each in found['noise']['deviation'])} and "
            f"{spread(each[-1] for each in found['noise']['deviation'])}. μ_B's goes as m to the power of "
            f"{spread(slopes)}; it is checked to be within 0.1 of −0.5.",
            [abs(slope + 0.5) < 0.1 for slope in slopes],
        ),
        Claim(
            f"The noise regularizes: with ghost batches of {sizes[middle]} gap and test loss are smaller than with "
            "statistics of all.",
            f"Gap {spread(of_ghosts[-1])} with statistics of all {sizes[-1]}, {spread(of_ghosts[middle])} with ghost "
            f"batches of {sizes[middle]}; test loss {spread(whole)} and {spread(ghost['test'][middle])}.",
            [a < b for of in (of_ghosts, ghost["test"]) for a, b in zip(of[middle], of[-1], strict=True)],
        ),
        Claim(
            f"Too small a batch is too noisy: with {sizes[0]} samples the test accuracy is lower than with "
            f"{sizes[middle]}.",
            f"Test accuracy with ghost batches of {sizes[0]}: {spread(ghost['accuracy'][0], percent)}, of "
            f"{sizes[middle]}: {spread(ghost['accuracy'][middle], percent)}; with batches of these sizes "
            f"{spread(plain[0], percent)} and {spread(plain[middle], percent)}.",
            [a < b for arm in (ghost, found["batch"])
             for a, b in zip(arm["accuracy"][0], arm["accuracy"][middle], strict=True)],
        ),
        Claim(
            "The noise regularizes as dropout does, but less.",
            f"Ghost batches of {sizes[middle]} close {spread(by_ghosts, percent)} of the gap that statistics of all "
            f"leave; dropout {' and '.join(f'{p} {spread(each, percent)}' for p, each in closed.items())} of the gap "
            "without batch norm.",
            [0 < a < b for each in closed.values() for a, b in zip(by_ghosts, each, strict=True)],
        ),
    ]  # fmt: skip
