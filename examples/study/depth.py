"""Depth with sigmoid and tanh: training with and without batch norm, and the gradients' norms layer by layer."""

from __future__ import annotations

from typing import Any

import fusednorm.torch as fnt
from torch import nn
from torch.nn import functional

from .common import (
    BATCH,
    LOSS,
    WITH,
    WITHOUT,
    Claim,
    Found,
    Settings,
    curve,
    mlp,
    number,
    panels,
    split,
    spread,
    trained,
    widths,
)

TITLE = "Depth with sigmoid and tanh"
WIDTH = 64
RATES = 0.1, 1.0
USABLE = 0.5  # training loss of the last epoch; guessing has 2.3
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
ARMS = {"with": fnt.BatchNorm1d, "without": None}


def setup(found: Found) -> str:
    rates = " and ".join(map(number, RATES))
    return (
        f"MLPs of {', '.join(map(str, found['depths']))} hidden layers, {WIDTH} wide; gradient descent, "
        f"{found['epochs']} epochs of batches of {BATCH}, at the better of the rates {rates}, chosen for each seed. A "
        f"net trains if the training loss of the last epoch is below {USABLE}. Bottom: the norm of the loss's gradient "
        f"with respect to each layer's weights, before training, {found['depths'][-1]} hidden layers."
    )


def measure(settings: Settings) -> Found:
    depths, epochs = settings.pick([1, 2, 4, 8, 16], [1, 3]), settings.pick(8, 2)
    found: Found = {"depths": depths, "epochs": epochs}
    for name in ACTIVATIONS:
        found[name] = {arm: {"loss": [[] for _ in depths], "gradients": []} for arm in ARMS}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        for name, activation in ACTIVATIONS.items():
            for arm, norm in ARMS.items():
                into = found[name][arm]
                for i, depth in enumerate(depths):
                    shape = widths(settings, *[WIDTH] * depth)
                    losses = [
                        trained(mlp(shape, norm, activation, seed=seed), data, rate, epochs * len(data.x) // BATCH,
                                seed=seed)
                        for rate in RATES
                    ]  # fmt: skip
                    into["loss"][i].append(min(losses))
                model = mlp(shape, norm, activation, seed=seed)
                functional.cross_entropy(model(data.x[:BATCH]), data.y[:BATCH]).backward()
                into["gradients"].append([m.weight.grad.norm().item() for m in model if isinstance(m, nn.Linear)])
    return found


def draw(found: Found) -> Any:
    figure, axes = panels(2, 2, height=2.9)
    for i, name in enumerate(ACTIVATIONS):
        for arm, (color, label), marker in (("with", WITH, "o"), ("without", WITHOUT, "s")):
            each = found[name][arm]
            curve(axes[i], found["depths"], each["loss"], color, label, marker=marker)
            by_layer = list(zip(*each["gradients"], strict=True))
            curve(axes[2 + i], range(1, len(by_layer) + 1), by_layer, color, label, marker=marker)
        axes[i].set(xscale="log", yscale="log", title=name, xlabel="hidden layers", ylabel=LOSS)
        axes[i].set_xticks(found["depths"], found["depths"])
        axes[i].minorticks_off()
        axes[2 + i].set_xticks(range(1, len(by_layer) + 1, 2))
        axes[2 + i].set(yscale="log", xlabel="layer, from the input", ylabel="norm of ∂/∂W before training")
    axes[0].legend(frameon=False)
    return figure


def claims(found: Found) -> list[Claim]:
    seeds, depths = range(len(found["tanh"]["with"]["gradients"])), found["depths"]
    made = []
    for name in ACTIVATIONS:
        deepest = {arm: [max((d for d, by_seed in zip(depths, found[name][arm]["loss"], strict=True)
                              if by_seed[seed] < USABLE), default=0) for seed in seeds] for arm in ARMS}  # fmt: skip
        at_depth = {arm: found[name][arm]["loss"][-1] for arm in ARMS}
        made.append(
            Claim(
                f"Batch norm makes deep nets with {name} trainable that are not without it.",
                f"Of up to {depths[-1]} hidden layers the deepest net that trains has {spread(deepest['with'])} with, "
                f"{spread(deepest['without'])} without; loss at {depths[-1]}: {spread(at_depth['with'])} with, "
                f"{spread(at_depth['without'])} without.",
                [a > b for a, b in zip(deepest["with"], deepest["without"], strict=True)],
            )
        )
    for name in ACTIVATIONS:
        ratios = {arm: [each[0] / each[-2] for each in found[name][arm]["gradients"]] for arm in ARMS}
        apart = {arm: [max(r, 1 / r) if r else float("inf") for r in ratios[arm]] for arm in ARMS}
        made.append(
            Claim(
                f"Batch norm keeps gradients from vanishing or exploding with depth ({name}).",
                f"Norm in the first layer over that in the last hidden one: {spread(ratios['with'])} with, "
                f"{spread(ratios['without'])} without; with it is checked to be nearer to 1.",
                [a < b for a, b in zip(apart["with"], apart["without"], strict=True)],
            )
        )
    return made
