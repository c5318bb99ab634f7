"""Optimizers stepping γ and β: SGD, momentum, Nesterov, RMSprop and Adam, each at several rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fusednorm.torch as fnt
import numpy as np
import torch
from torch import nn

from .common import (
    BATCH,
    BLUE,
    CYAN,
    LOSS,
    RED,
    Claim,
    Found,
    Norm,
    Settings,
    chain,
    evaluate,
    final,
    in_percent,
    mlp,
    number,
    panels,
    percent,
    points,
    split,
    spread,
    training,
    widths,
)

TITLE = "Optimizers"
HIDDEN = 64, 64, 64
OPTIMIZERS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "SGD": (torch.optim.SGD, (0.03, 0.1, 0.3, 1.0)),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), (0.003, 0.01, 0.03, 0.1)),
    "Nesterov": (partial(torch.optim.SGD, momentum=0.9, nesterov=True), (0.003, 0.01, 0.03, 0.1)),
    "RMSprop": (torch.optim.RMSprop, (0.0003, 0.001, 0.003, 0.01)),
    "Adam": (torch.optim.Adam, (0.001, 0.003, 0.01, 0.03)),
}
ARMS: dict[str, Norm | None] = {
    "learned": fnt.BatchNorm1d,
    "fixed": partial(fnt.BatchNorm1d, affine=False),
    "without": None,
}
LABELS = {"learned": ("γ, β learned", BLUE), "fixed": ("γ = 1, β = 0", CYAN), "without": ("without batch norm", RED)}


def setup(found: Found) -> str:
    return (
        f"An MLP {chain(found['widths'])} with ReLU, {found['epochs']} epochs of batches of {BATCH}. Each optimizer, "
        "with momentum 0.9 where it has any and PyTorch's defaults otherwise, has four rates, half a decade apart; the "
        "one whose training loss is the lowest counts, for each seed. It steps all parameters alike, γ and β among "
        "them."
    )


def measure(settings: Settings) -> Found:
    epochs = settings.pick(6, 1)
    found: Found = {"widths": widths(settings, *HIDDEN), "epochs": epochs}
    for name in OPTIMIZERS:
        found[name] = {arm: {key: [] for key in ("rate", "loss", "accuracy", "gamma", "beta")} for arm in ARMS}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        epoch = len(data.x) // BATCH
        for name, (make, rates) in OPTIMIZERS.items():
            for arm, norm in ARMS.items():
                runs = []
                for rate in settings.pick(rates, rates[1:3]):
                    model = mlp(found["widths"], norm, seed=seed)
                    losses = [*training(model, data, make(model.parameters(), lr=rate), epochs * epoch, seed=seed)]
                    runs.append((final(losses, epochs * epoch, epoch), rate, model))
                loss, rate, model = min(runs, key=lambda run: run[0])
                into = found[name][arm]
                into["loss"].append(loss)
                into["rate"].append(rate)
                into["accuracy"].append(evaluate(model, data.test_x, data.test_y)[1])
                if arm == "learned":
                    norms = [module for module in model if isinstance(module, nn.BatchNorm1d)]
                    into["gamma"].append(torch.cat([n.weight - 1 for n in norms]).square().mean().sqrt().item())
                    into["beta"].append(torch.cat([n.bias for n in norms]).square().mean().sqrt().item())
    return found


def draw(found: Found) -> Any:
    figure, (loss, accuracy, moved) = panels(3, width=11)
    at = np.arange(len(OPTIMIZERS))
    for i, (arm, (label, color)) in enumerate(LABELS.items()):
        for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
            by_name = [found[name][arm][key] for name in OPTIMIZERS]
            points(axes, at + 0.2 * (i - 1), by_name, color, label, marker="osD"[i])
    for i, (key, label, color) in enumerate((("gamma", "γ − 1", BLUE), ("beta", "β", CYAN))):
        by_name = [found[name]["learned"][key] for name in OPTIMIZERS]
        points(moved, at + 0.2 * (i - 0.5), by_name, color, label, marker="oD"[i])
    for axes in (loss, accuracy, moved):
        axes.set_xticks(at, OPTIMIZERS, rotation=30)
    loss.set(yscale="log", ylabel=LOSS)
    in_percent(accuracy)
    moved.set(ylabel="root mean square after training", ylim=(0, None))
    loss.legend(frameon=False, fontsize=8)
    moved.legend(frameon=False)
    return figure


def claims(found: Found) -> list[Claim]:
    def told(key: str, arm: str, form: Callable[[float], str] = number) -> str:
        return ", ".join(f"{name} {spread(found[name][arm][key], form)}" for name in OPTIMIZERS)

    def compared(one: str, other: str) -> list[bool]:
        return [a < b for name in OPTIMIZERS
                for a, b in zip(found[name][one]["loss"], found[name][other]["loss"], strict=True)]  # fmt: skip

    return [
        Claim(
            "Batch norm works with momentum, Nesterov, RMSprop and Adam as well as with plain gradient descent.",
            f"Test accuracy with it: {told('accuracy', 'learned', percent)}; it is checked to be at most one point "
            "below that of SGD.",
            [
                a >= b - 0.01
                for name in OPTIMIZERS
                if name != "SGD"
                for a, b in zip(found[name]["learned"]["accuracy"], found["SGD"]["learned"]["accuracy"], strict=True)
            ],
        ),
        Claim(
            "Batch norm speeds up training with each optimizer: the training loss is lower.",
            f"Training loss with: {told('loss', 'learned')}; without: {told('loss', 'without')}.",
            compared("learned", "without"),
        ),
        Claim(
            "Batch norm generalizes better with each optimizer: the test accuracy is higher.",
            f"Test accuracy without it: {told('accuracy', 'without', percent)}. "
            "(Asked after the numbers on digits had been seen.)",
            [
                a > b
                for name in OPTIMIZERS
                for a, b in zip(found[name]["learned"]["accuracy"], found[name]["without"]["accuracy"], strict=True)
            ],
        ),
        Claim(
            "Learning γ and β helps: the training loss is lower.",
            f"Training loss with γ = 1 and β = 0: {told('loss', 'fixed')}. Root mean square of γ − 1 after training: "
            f"{told('gamma', 'learned')}; of β: {told('beta', 'learned')}.",
            compared("learned", "fixed"),
        ),
    ]
