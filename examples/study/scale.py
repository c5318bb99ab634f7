"""The scale of the initial weights: training over four decades of it; and what scaling weights does to one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fusednorm.torch as fnt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .common import (
    BATCH,
    BLUE,
    GREEN,
    LOSS,
    WITH,
    WITHOUT,
    Claim,
    Found,
    Settings,
    chain,
    curve,
    mlp,
    number,
    panels,
    split,
    spread,
    trained,
    widths,
)

TITLE = "The scale of the initial weights"
HIDDEN = 128, 128, 128
RATE = 0.1
USABLE = 0.1  # training loss of the last epoch
EPS = {"none": 1e-30, "usual": 1e-5}  # 0 is refused: a constant feature would be divided by it
FACTORS = {"tens": 10 ** np.arange(-2, 2.1, 0.5), "twos": 2.0 ** np.arange(-8, 9)}  # by twos nothing is rounded


def rounding(found: Found) -> float:
    """Of a sum over the inputs, in float32."""
    return float(found["widths"][0] * np.finfo(np.float32).eps)


def setup(found: Found) -> str:
    return (
        f"Left: an MLP {chain(found['widths'])} with ReLU, whose initial weights, output layer included, are a times "
        f"Glorot's; gradient descent, rate {RATE}, {found['epochs']} epochs of batches of {BATCH}. Right: one layer "
        "u → W·u → batch norm, with a·W for W: how far y, ∂/∂u and a·∂/∂W are at most from those at a = 1, relative to "
        f"their largest element, in float32. Rounding: {found['widths'][0]} units in the last place, for sums of as "
        "many products."
    )


def measure(settings: Settings) -> Found:
    scales = [float(a) for a in 10 ** settings.pick(np.arange(-2, 2.01, 0.5), np.arange(-2.0, 2.1, 2.0))]
    epochs = settings.pick(10, 2)
    found: Found = {"widths": widths(settings, *HIDDEN), "scales": scales, "epochs": epochs}
    found["factors"] = FACTORS["tens"].tolist()
    arms = {"with": fnt.BatchNorm1d, "without": None}
    for arm in arms:
        found[arm] = [[] for _ in scales]
    found["invariance"] = {name: [] for name in EPS}
    found["exact"] = []
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        for i, a in enumerate(scales):
            for arm, norm in arms.items():
                model = mlp(found["widths"], norm, seed=seed)
                with torch.no_grad():
                    for module in model:
                        if isinstance(module, nn.Linear):
                            module.weight *= a
                steps = epochs * len(data.x) // BATCH
                found[arm][i].append(trained(model, data, RATE, steps, seed=seed))
        for name, eps in EPS.items():
            found["invariance"][name].append(invariance(data.x[:BATCH], FACTORS["tens"], eps, seed))
        found["exact"].append(max(invariance(data.x[:BATCH], FACTORS["twos"], EPS["none"], seed)))
    return found


def invariance(u: Tensor, factors: Any, eps: float, seed: int) -> list[float]:
    """For each factor a how far y, ∂/∂u and a·∂/∂W are from those at a = 1 at most, relative to their largest."""
    torch.manual_seed(seed)
    weight, dy = torch.randn(32, u.shape[1]) / u.shape[1] ** 0.5, torch.randn(len(u), 32)

    def results(a: float) -> tuple[Tensor, Tensor, Tensor]:
        ours, scaled = u.clone().requires_grad_(), (a * weight).requires_grad_()
        y = fnt.BatchNorm1d(32, eps=eps)(functional.linear(ours, scaled))
        y.backward(dy)
        return y.detach(), ours.grad, a * scaled.grad

    true = results(1.0)
    return [
        max(((one - other).abs().max() / other.abs().max()).item()
            for one, other in zip(results(float(a)), true, strict=True))
        for a in factors
    ]  # fmt: skip


def draw(found: Found) -> Any:
    figure, (loss, invariant) = panels(2)
    for arm, (color, label), marker in (("with", WITH, "o"), ("without", WITHOUT, "s")):
        curve(loss, found["scales"], found[arm], color, label, marker=marker)
    loss.axhline(USABLE, color="#333333", linewidth=0.8, linestyle=":")
    loss.annotate("trains below", (found["scales"][0], USABLE), (0, 3), textcoords="offset points", fontsize=8)
    loss.set(xscale="log", yscale="log", xlabel="initial weights over Glorot's, a", ylabel=LOSS)
    loss.legend(frameon=False)
    for name, color, marker in (("usual", BLUE, "o"), ("none", GREEN, "D")):
        by_factor = np.maximum(np.array(found["invariance"][name]).T, 1e-8)
        label = f"ε = $10^{{{np.log10(EPS[name]):.0f}}}$"
        curve(invariant, found["factors"], by_factor.tolist(), color, label, marker=marker)
    invariant.axhline(rounding(found), color="#333333", linewidth=0.8, linestyle=":")
    invariant.annotate(
        "rounding", (found["factors"][0], rounding(found)), (0, 3), textcoords="offset points", fontsize=8
    )
    invariant.set(
        xscale="log", yscale="log", xlabel="scale of the weights, a", ylabel="largest deviation from a = 1, relative"
    )
    invariant.legend(frameon=False)
    return figure


def decades(scales: Sequence[float], by_scale: Sequence[Sequence[float]], seed: int) -> float:
    """How many decades of scales lead below USABLE."""
    good = [a for a, by_seed in zip(scales, by_scale, strict=True) if by_seed[seed] < USABLE]
    return float(np.log10(good[-1] / good[0])) if good else 0.0


def claims(found: Found) -> list[Claim]:
    seeds = range(len(found["with"][0]))
    reach = {arm: [decades(found["scales"], found[arm], seed) for seed in seeds] for arm in ("with", "without")}
    ends = {
        arm: " and ".join(
            f"{spread(found[arm][i])} at a = {number(found['scales'][i])}" for i in (0, len(found["scales"]) - 1)
        )
        for arm in reach
    }
    off = {name: list(zip(*found["invariance"][name], strict=True)) for name in EPS}
    worst = [max(each) for each in found["invariance"]["none"]]
    return [
        Claim(
            "Batch norm allows rougher initial weights.",
            f"Scales that train below {USABLE} span {spread(reach['with'])} decades with, {spread(reach['without'])} "
            f"without. At the ends, with: {ends['with']}; without: {ends['without']}.",
            [a > b for a, b in zip(reach["with"], reach["without"], strict=True)],
        ),
        Claim(
            "Scaling W by a leaves y and ∂/∂u unchanged and divides ∂/∂W by a.",
            f"With ε = {number(EPS['none'])} the largest deviation is {spread(worst)}, for powers of two "
            f"{spread(found['exact'])}; checked are rounding, {number(rounding(found))}, and 0. ε = "
            f"{number(EPS['usual'])} does not scale with the variance that it is added to: {spread(off['usual'][0])} "
            f"at a = {number(found['factors'][0])}, {spread(off['usual'][-1])} at a = {number(found['factors'][-1])}.",
            [error <= rounding(found) for error in worst] + [error == 0 for error in found["exact"]],
        ),
    ]
