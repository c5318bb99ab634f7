"""The norms in one convolutional network, in batches of 64 and of 2: accuracy, time, memory; and whitened inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import fusednorm as fn
import fusednorm.torch as fnt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .common import (
    BATCH,
    BLUE,
    RED,
    Claim,
    Data,
    Found,
    Settings,
    digits,
    evaluate,
    final,
    mlp,
    number,
    panels,
    percent,
    spread,
    training,
)

TITLE = "Norms side by side"
CHANNELS = 16, 32, 32
RATES = 0.01, 0.03, 0.1
SMALL = 2
WIDTHS = 64, 128, 128, 10


class Switchable(torch.autograd.Function):
    """fusednorm's switchable norm of NumPy arrays, which are the tensors' memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, means: Tensor, variances: Tensor, weight: Tensor, bias: Tensor, layer: SwitchableNorm
    ) -> Tensor:
        given = [a.detach().numpy() for a in (x, means, variances, weight, bias)]
        running = {"running_mean": layer.running_mean.numpy(), "running_var": layer.running_var.numpy()}
        y, *ctx.saved = fn.switchable_norm_forward(*given, **running, training=layer.training)
        ctx.training = layer.training
        ctx.save_for_backward(x, means, variances, weight, bias)
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, means, variances, weight, bias = (a.numpy() for a in ctx.saved_tensors)
        means_, variances_, rstd = ctx.saved
        found = fn.switchable_norm_backward(
            dy.numpy(), x, means_, variances_, rstd, means, variances, weight, bias, training=ctx.training
        )
        dx, dweight, dbias, dmeans, dvariances = (torch.from_numpy(np.asarray(a)) for a in found)
        return dx, dmeans, dvariances, dweight, dbias, None


class SwitchableNorm(nn.Module):
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.means, self.variances = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return Switchable.apply(x.contiguous(), self.means, self.variances, self.weight, self.bias, self)


class Weighted(torch.autograd.Function):
    """fusednorm's weight norm, along the first axis."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        w, ctx.norm = fn.weight_norm_forward(v.detach().numpy(), g.detach().numpy())
        ctx.save_for_backward(v, g)
        return torch.from_numpy(w)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, Tensor]:
        v, g = ctx.saved_tensors
        dv, dg = fn.weight_norm_backward(np.ascontiguousarray(dw.numpy()), v.numpy(), g.numpy(), ctx.norm)
        return torch.from_numpy(dv), torch.from_numpy(dg)


class WeightNormed(nn.Module):
    """A parametrization: w = g·v/‖v‖."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.g = nn.Parameter(weight.detach().flatten(1).norm(dim=1)[:, None, None, None].clone())

    def forward(self, v: Tensor) -> Tensor:
        return Weighted.apply(v, self.g)


def weight_norm(conv: nn.Conv2d) -> nn.Module:
    return torch.nn.utils.parametrize.register_parametrization(conv, "weight", WeightNormed(conv.weight))


NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "batch": fnt.BatchNorm2d,
    "layer": partial(fnt.GroupNorm, 1),  # over channels and pixels, as of convolutions
    "instance": partial(fnt.InstanceNorm2d, affine=True),
    "group": partial(fnt.GroupNorm, 4),
    "switchable": SwitchableNorm,
    "weight": None,
}
INPUTS: dict[str, Any] = {
    "standardized": fn.Standardizer,
    "PCA": partial(fn.Whitener, "pca"),
    "ZCA": partial(fn.Whitener, "zca"),
}


def convolutional(norm: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    inputs = 1
    for outputs in CHANNELS:
        made = NORMS[norm]
        conv = nn.Conv2d(inputs, outputs, 3, 1 if inputs == 1 else 2, padding=1, bias=made is None)
        nn.init.kaiming_normal_(conv.weight)
        layers += [weight_norm(conv) if norm == "weight" else conv, *([made(outputs)] if made else []), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * inputs, 10))


def setup(found: Found) -> str:
    return (
        f"A network of {len(CHANNELS)} convolutions, 3×3, {'-'.join(map(str, CHANNELS))} channels, each followed by "
        "the norm and ReLU; layer norm is over channels and pixels, group norm has 4 groups. Momentum 0.9, "
        f"{found['epochs'][str(BATCH)]} epochs of batches of {BATCH}, {found['epochs'][str(SMALL)]} of {SMALL}, the "
        f"best of the rates {', '.join(map(number, RATES))} by training loss; for batches of {SMALL} times √({SMALL}/"
        f"{BATCH}). Time: the median step of {BATCH}, one thread, arms in turn; memory: what autograd keeps of such a "
        f"step. Whitened inputs go into an MLP {'-'.join(map(str, WIDTHS))} without norms, since PCA leaves no pixels, "
        "trained alike."
    )


def measure(settings: Settings) -> Found:
    epochs = {BATCH: settings.pick(6, 1), SMALL: settings.pick(1, 1)}
    found: Found = {"epochs": {str(size): n for size, n in epochs.items()}}
    for size in epochs:
        found[str(size)] = {norm: {"loss": [], "accuracy": []} for norm in NORMS}
    found["ms"] = {norm: [] for norm in NORMS}
    found["kilobytes"] = {norm: [] for norm in NORMS}
    found["inputs"] = {name: {"loss": [], "accuracy": []} for name in (*INPUTS, "batch norm")}
    for seed in settings.track(range(settings.seeds), TITLE):
        data = digits(seed)
        for size, n in epochs.items():
            steps, rates = settings.pick(len(data.x) // size * n, 20), [rate * size**0.5 / 8 for rate in RATES]
            for norm in NORMS:
                into(found[str(size)][norm], best(partial(convolutional, norm, seed), data, rates, steps, size, seed))
        for norm, ms in times(data, settings.pick(30, 3), seed).items():
            found["ms"][norm].append(ms)
            found["kilobytes"][norm].append(kept(convolutional(norm, seed), data) / 1024)
        for name, each in found["inputs"].items():
            prepared = digits(seed, prepare=INPUTS.get(name, fn.Standardizer)())
            widths, norm_ = (prepared.x.shape[1], *WIDTHS[1:]), fnt.BatchNorm1d if name == "batch norm" else None
            steps = len(data.x) // BATCH * epochs[BATCH]
            into(each, best(partial(mlp, widths, norm_, seed=seed), prepared, RATES, steps, BATCH, seed))
    return found


def into(lists: Found, found: tuple[float, float]) -> None:
    for key, value in zip(("loss", "accuracy"), found, strict=True):
        lists[key].append(value)


def best(
    make: Callable[[], nn.Module], data: Data, rates: Sequence[float], steps: int, size: int, seed: int
) -> tuple[float, float]:
    """Loss and test accuracy at the rate whose loss is the lowest."""
    runs = []
    for rate in rates:
        model = make()
        losses = [*training(model, data, torch.optim.SGD(model.parameters(), rate, 0.9), steps, size, seed)]
        runs.append((final(losses, steps, 5 * BATCH // size), evaluate(model, data.test_x, data.test_y)[1]))
    return min(runs)


def step(model: nn.Module, data: Data) -> None:
    functional.cross_entropy(model(data.x[:BATCH]), data.y[:BATCH]).backward()


def times(data: Data, rounds: int, seed: int) -> dict[str, float]:
    models = {norm: convolutional(norm, seed) for norm in NORMS}
    taken: dict[str, list[float]] = {norm: [] for norm in NORMS}
    for _ in range(rounds):
        for norm, model in models.items():
            start = perf_counter()
            step(model, data)
            taken[norm].append(1e3 * (perf_counter() - start))
    return {norm: median(each) for norm, each in taken.items()}


def kept(model: nn.Module, data: Data) -> int:
    """Bytes that autograd keeps for the backward, parameters and the batch aside."""
    own = {a.untyped_storage().data_ptr() for a in (*model.parameters(), *model.buffers(), data.x, data.y)}
    storages: dict[int, int] = {}

    def pack(a: Tensor) -> Tensor:
        storage = a.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        loss = functional.cross_entropy(model(data.x[:BATCH]), data.y[:BATCH])
        total = sum(size for pointer, size in storages.items() if pointer not in own)
    del loss
    return total


def draw(found: Found) -> Any:
    figure, (accuracy, time, memory) = panels(3, width=11.0)
    at = np.arange(len(NORMS))
    for i, (size, color) in enumerate(((BATCH, BLUE), (SMALL, RED))):
        values = np.array([found[str(size)][norm]["accuracy"] for norm in NORMS])
        middle = np.median(values, 1)
        around = np.stack((middle - values.min(1), values.max(1) - middle))
        accuracy.errorbar(
            at + 0.2 * (i - 0.5), middle, around, fmt="os"[i], color=color, label=f"batches of {size}", capsize=2
        )
    for axes, key, label in ((time, "ms", "a step of 64, ms"), (memory, "kilobytes", "kept for the backward, KiB")):
        axes.bar(at, [median(found[key][norm]) for norm in NORMS], color=BLUE)
        axes.set(ylabel=label)
    for axes in (accuracy, time, memory):
        axes.set_xticks(at, NORMS, rotation=40)
    accuracy.set(ylabel="test accuracy")
    accuracy.legend(frameon=False)
    return figure


def claims(found: Found) -> list[Claim]:
    large, small, inputs = found[str(BATCH)], found[str(SMALL)], found["inputs"]
    normalizing = [norm for norm in NORMS if norm != "none"]

    def told(of: Found, key: str, form: Callable[[float], str] = number) -> str:
        return ", ".join(f"{name} {spread(each[key], form)}" for name, each in of.items())

    drop = {
        norm: [a - b for a, b in zip(large[norm]["accuracy"], small[norm]["accuracy"], strict=True)] for norm in NORMS
    }
    pure = ("batch", "layer", "instance")
    behind = [
        max(of[norm]["accuracy"][i] for norm in pure) - of["switchable"]["accuracy"][i]
        for of in (large, small)
        for i in range(len(large["batch"]["accuracy"]))
    ]
    plain = found["kilobytes"]["none"]
    return [
        Claim(
            "Normalized networks train better: the loss is lower than without a norm.",
            f"Training loss, batches of {BATCH}: {told(large, 'loss')}. Test accuracy: "
            f"{told(large, 'accuracy', percent)}.",
            [a < b for norm in normalizing for a, b in zip(large[norm]["loss"], large["none"]["loss"], strict=True)],
        ),
        Claim(
            "Batch norm suffers from small batches more than group norm does (Wu & He).",
            f"Test accuracy with batches of {SMALL}: {told(small, 'accuracy', percent)}. From {BATCH} to {SMALL} batch "
            f"norm loses {spread(drop['batch'], percent)}, group norm {spread(drop['group'], percent)}.",
            [a > b for a, b in zip(drop["batch"], drop["group"], strict=True)],
        ),
        Claim(
            "Switchable norm finds the norm that suits the batch (Luo et al.): it is as good as the best of its three.",
            f"It is {spread(behind, percent)} below the best of batch, layer and instance norm in test accuracy; it is "
            "checked to be at most a percent.",
            [each <= 0.01 for each in behind],
        ),
        Claim(
            "Weight norm is the cheap one: it keeps weights for the backward, no activations.",
            "Kept for the backward, over what is kept without a norm: "
            + ", ".join(
                f"{norm} {spread(a / b for a, b in zip(found['kilobytes'][norm], plain, strict=True))}"
                for norm in normalizing
            )
            + f". A step takes, in ms: {', '.join(f'{norm} {spread(ms)}' for norm, ms in found['ms'].items())}.",
            [a - none < (b - none) / 2 for norm in normalizing if norm != "weight"
             for a, b, none in zip(found["kilobytes"]["weight"], found["kilobytes"][norm], plain, strict=True)],
        ),
        Claim(
            "Whitened inputs train faster than standardized ones.",
            f"Training loss: {told(inputs, 'loss')}; test accuracy: {told(inputs, 'accuracy', percent)}.",
            [a < b for name in ("PCA", "ZCA")
             for a, b in zip(inputs[name]["loss"], inputs["standardized"]["loss"], strict=True)],
        ),
    ]  # fmt: skip
