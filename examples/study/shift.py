"""Internal covariate shift, and the loss surface along the gradient (Santurkar et al. 2018): without batch norm, with
it, and with it and noise that shifts what it has normalized."""

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
    PURPLE,
    RED,
    Claim,
    Data,
    Found,
    Norm,
    Settings,
    batches,
    chain,
    curve,
    mlp,
    panels,
    split,
    spread,
    widths,
)

TITLE = "Internal covariate shift and the loss surface"
HIDDEN = [64] * 6
RATE = 0.1
ACTIVATIONS = {"tanh": nn.Tanh, "ReLU": nn.ReLU}
REACH = 0.5, 1.0, 2.0, 4.0  # of the step, times its length, as in the paper
STYLES = {"without": (RED, "s"), "with": (BLUE, "o"), "noisy": (PURPLE, "D")}
LABELS = {"without": "without", "with": "with batch norm", "noisy": "batch norm, then noise"}
MEASURES = "moved", "turned", "variation", "predictiveness", "smoothness"


class NoisyNorm(nn.Module):
    """Batch norm whose output is shifted and scaled at random: each step draws a distribution for each feature, whose
    mean is not 0 and whose deviation is not 1, and each sample a shift and a scale from it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = fnt.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if not self.training:
            return y
        shift, scale = torch.rand(y.shape[1]) - 0.5, 1 + 0.25 * torch.rand(y.shape[1])
        return y * (scale + 0.1 * torch.randn_like(y)) + shift + 0.2 * (torch.rand_like(y) - 0.5)


NORMS: dict[str, Norm | None] = {"without": None, "with": fnt.BatchNorm1d, "noisy": NoisyNorm}


def setup(found: Found) -> str:
    return (
        f"MLPs {chain(found['widths'])} with tanh and with ReLU, gradient descent, rate {RATE}, {found['steps']} steps "
        f"of batches of {BATCH}. The noise after batch norm has a shift and a scale for each feature, drawn anew at "
        "each step, so that the next layer's inputs keep changing. The figure shows ReLU. Top: the 15th, 50th and 85th "
        "percentile of one input of the last hidden layer's activation on the training set, in the first seed alone; "
        f"and losses. Bottom, every {found['every']} steps: how far the means of these inputs moved since the last "
        "time, over σ; Santurkar et al.'s shift, 1 − cos of the angle between the layer's gradient before and after "
        f"the layers below it took their step; and, {REACH[0]} to {REACH[-1]} steps along the gradient, the range of "
        "the loss and the largest change of the gradient over the distance (effective β-smoothness). Numbers in the "
        "table are means over training, the largest change of the gradient among them. ReLU was added after tanh's "
        "numbers on digits had been seen; the verdicts depend on it."
    )


def measure(settings: Settings) -> Found:
    steps, every = settings.pick(400, 20), settings.pick(20, 10)
    found: Found = {"widths": widths(settings, *HIDDEN), "steps": steps, "every": every}
    found["at"] = list(range(every, steps, every))
    for name in ACTIVATIONS:
        found[name] = {arm: {key: [] for key in ("loss", "percentiles", *MEASURES)} for arm in NORMS}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        for name, activation in ACTIVATIONS.items():
            for arm, norm in NORMS.items():
                for key, value in watched(data, norm, activation, steps, every, seed).items():
                    if key != "percentiles" or not seed:
                        found[name][arm][key].append(value)
    return found


def watched(data: Data, norm: Norm | None, activation: type[nn.Module], steps: int, every: int, seed: int) -> Found:
    model = mlp([data.features, *HIDDEN, 10], norm, activation, seed=seed)
    hidden = len(model) - 2  # the last activation
    before_last = [i for i, module in enumerate(model) if isinstance(module, nn.Linear)][-2]
    losses: list[float] = []
    found: Found = {key: [] for key in ("percentiles", *MEASURES)}
    last: tuple[Tensor, Tensor] | None = None
    for step, (x, y) in zip(range(steps), batches(data, BATCH, seed), strict=False):
        if step % every == 0:
            with torch.no_grad():
                z = model[:hidden](data.x)
            now = z.mean(0), z.std(0)
            found["percentiles"].append(np.percentile(z[:, 0].numpy(), [15, 50, 85]).tolist())
            if last:
                found["moved"].append(((now[0] - last[0]) / last[1]).square().mean().sqrt().item())
                found["turned"].append(turned(model, before_last, x, y))
                for key, value in along_gradient(model, x, y).items():
                    found[key].append(value)
            last = now
        loss, gradients = at(model, x, y)
        descend(model, gradients, RATE)
        torch.rand(1)  # the next step's noise is another
        losses.append(loss)
    loss = np.array(losses).reshape(-1, every).mean(1).tolist()
    return {"loss": loss, **found}


def at(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
    """Loss and gradients; the generator of NoisyNorm's noise is left as it was."""
    with torch.random.fork_rng():
        loss = functional.cross_entropy(model(x), y)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def descend(model: nn.Module, gradients: Sequence[Tensor], rate: float) -> None:
    """A step of as many of the first parameters as there are gradients."""
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=False):
            parameter -= rate * gradient


def turned(model: nn.Module, layer: int, x: Tensor, y: Tensor) -> float:
    """1 − cos of the angle between the gradients of a linear layer before and after all below it took their step. The
    model is left as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    here = [name for name, _ in model.named_parameters()].index(f"{layer}.weight")
    _, before = at(model, x, y)
    descend(model, before[:here], RATE)
    _, after = at(model, x, y)
    model.load_state_dict(state)
    return 1 - float(functional.cosine_similarity(before[here].flatten(), after[here].flatten(), dim=0))


def along_gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Over steps of several lengths along the gradient: the range of the loss, the largest change of the gradient, and
    the largest change over the distance. The model is left as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    _, here = at(model, x, y)
    length = torch.stack([g.norm() for g in here]).norm().item()
    losses, changes, slopes = [], [], []
    for reach in REACH:
        descend(model, here, reach * RATE)
        loss, there = at(model, x, y)
        model.load_state_dict(state)
        losses.append(loss)
        changes.append(torch.stack([(a - b).norm() for a, b in zip(there, here, strict=True)]).norm().item())
        slopes.append(changes[-1] / (reach * RATE * length))
    return {"variation": max(losses) - min(losses), "predictiveness": max(changes), "smoothness": max(slopes)}


def draw(found: Found) -> Any:
    figure, axes = panels(4, 2, width=12.5, height=2.9)
    shown = found["ReLU"]
    at_steps = np.arange(0, found["steps"], found["every"])
    for axis, arm in zip(axes, NORMS, strict=False):
        low, middle, high = np.array(shown[arm]["percentiles"][0]).T
        color = STYLES[arm][0]
        axis.fill_between(at_steps, low, high, color=color, alpha=0.25, linewidth=0)
        axis.plot(at_steps, middle, color=color)
        axis.set(title=LABELS[arm], ylabel="last ReLU's input, first seed")
    titles = {"loss": "training loss, nats", "moved": "movement of the mean / σ", "turned": "shift, 1 − cos",
              "variation": "range of the loss, nats", "smoothness": "effective β-smoothness"}  # fmt: skip
    for axis, (key, title) in zip(axes[3:], titles.items(), strict=True):
        for arm, (color, marker) in STYLES.items():
            by_step = list(zip(*shown[arm][key], strict=True))
            x = found["at"] if key != "loss" else at_steps + found["every"] / 2
            curve(axis, x, by_step, color, LABELS[arm], marker=marker, markersize=3)
        axis.set(yscale="log", ylabel=title)
    for axis in axes:
        axis.set_xlabel("step")
    axes[3].legend(frameon=False, fontsize=8)
    return figure


def claims(found: Found) -> list[Claim]:
    """A mean over training for each seed, with each activation."""
    means = {
        name: {arm: {key: np.array(found[name][arm][key]).mean(1).tolist() for key in (*MEASURES, "loss")}
               for arm in NORMS}
        for name in ACTIVATIONS
    }  # fmt: skip

    def told(key: str, arms: Sequence[str] = ("with", "without")) -> str:
        return "; ".join(
            f"{name}: " + ", ".join(f"{spread(means[name][arm][key])} {LABELS[arm]}" for arm in arms)
            for name in ACTIVATIONS
        )

    def below(key: str) -> list[bool]:
        return [a < b for each in means.values() for a, b in zip(each["with"][key], each["without"][key], strict=True)]

    return [
        Claim(
            "Batch norm reduces covariate shift: the means of an activation's inputs are steadier.",
            f"The means of the last activation's inputs move, over {found['every']} steps, in σ, {told('moved')}. "
            "Batch norm makes them β, whatever the layers below do.",
            below("moved"),
        ),
        Claim(
            "Batch norm reduces covariate shift as Santurkar et al. define it: a layer's gradient turns less when the "
            "layers below it step.",
            f"1 − cos, {told('turned')}.",
            below("turned"),
        ),
        Claim(
            "Covariate shift slows training (Ioffe and Szegedy): so does noise after batch norm that brings it back.",
            f"1 − cos with the noise, {told('turned', ('noisy',))}. Training loss, mean over training, "
            f"{told('loss', ('with', 'noisy', 'without'))}. The noise may slow training in "
            "other ways, too.",
            [
                a > b
                for each in means.values()
                for a, b in zip(each["noisy"]["loss"], each["with"]["loss"], strict=True)
            ],
        ),
        Claim(
            "Batch norm smooths the loss surface (Santurkar et al.): along the gradient the loss varies less.",
            f"Range, {told('variation')}.",
            below("variation"),
        ),
        Claim(
            "Batch norm makes gradients more predictive: along the gradient they change less.",
            f"Largest change, {told('predictiveness')}.",
            below("predictiveness"),
        ),
        Claim(
            "Batch norm lowers effective β-smoothness.",
            f"Largest change over distance, {told('smoothness')}.",
            below("smoothness"),
        ),
    ]
