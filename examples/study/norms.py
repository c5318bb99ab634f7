"""The norms and whitened inputs in one convolutional network, in batches of 64 and of 2: accuracy, time, memory."""

from __future__ import annotations

import math
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
    TRAINED_ON,
    Claim,
    Data,
    Found,
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
)

TITLE = "Norms side by side"
CHANNELS = 16, 32, 32
RATES = 0.01, 0.03, 0.1
SMALL = 2
HIDDEN = 128, 128  # of the MLP


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


class Components:
    """PCA whitening, zeros in the place of components that are dropped: as many features as there were."""

    def fit(self, x: Any) -> Components:
        self.whitener = fn.Whitener("pca").fit(x)
        return self

    def transform(self, x: Any) -> Any:
        z = self.whitener.transform(x)
        return np.pad(z, ((0, 0), (0, x.shape[1] - z.shape[1])))


INPUTS: dict[str, Callable[[], Any]] = {
    "standardized": fn.Standardizer,
    "PCA": Components,
    "ZCA": partial(fn.Whitener, "zca"),
}
WHITENED = "PCA", "ZCA"  # arms whose network has no norm
ARMS = *NORMS, *WHITENED


def convolutional(arm: str, side: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    inputs = 1
    for outputs in CHANNELS:
        norm = NORMS.get(arm)
        stride = first_stride(side) if inputs == 1 else 2
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=norm is None)
        nn.init.kaiming_normal_(conv.weight)
        layers += [weight_norm(conv) if arm == "weight" else conv, *([norm(outputs)] if norm else []), nn.ReLU()]
        inputs, side = outputs, -(-side // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(side**2 * inputs, 10))


def first_stride(side: int) -> int:
    """2 on MNIST, or a step would cost twelve times as much as on digits."""
    return 1 if side < 16 else 2


def setup(found: Found) -> str:
    return (
        f"A network of {len(CHANNELS)} convolutions, 3×3, {chain(CHANNELS)} channels, strides "
        f"{first_stride(found['side'])}, 2 and 2, each followed by the norm and ReLU; layer norm is over channels and "
        "pixels, group norm has 4 groups. In PCA and ZCA it has no norm, and its inputs are whitened instead of "
        "standardized, with ε = 0, which brings directions of hardly any variance up to the others; PCA's components "
        "stand, in order and padded by zeros, where pixels stood, and are no image. "
        f"Momentum 0.9, {found['epochs'][str(BATCH)]} epochs of batches of {BATCH}, {found['epochs'][str(SMALL)]} of "
        f"{SMALL}, the best of the rates {', '.join(map(number, RATES))} by training loss; for batches of {SMALL} "
        f"times √({SMALL}/{BATCH}). Time: the median step of {BATCH}, from pixels, which are standardized or whitened, "
        "to gradients; one thread, arms in turn. Memory: what autograd keeps of such a step. The last claim is of an "
        f"MLP {chain(found['widths'])} without norms, in which no pixel has a place, trained alike."
    )


def measure(settings: Settings) -> Found:
    epochs = {BATCH: settings.pick(6, 1), SMALL: settings.pick(1, 1)}
    found: Found = {"epochs": {str(size): n for size, n in epochs.items()}}
    for size in epochs:
        found[str(size)] = {arm: {"loss": [], "accuracy": []} for arm in ARMS}
    found["ms"], found["kilobytes"] = {arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}
    found["fit"] = {name: [] for name in INPUTS}  # ms
    found["mlp"] = {name: {"loss": [], "accuracy": []} for name in INPUTS}
    for seed in settings.track(range(settings.seeds), TITLE):
        prepared = {name: split(settings, seed, prepare=make()) for name, make in INPUTS.items()}
        features = prepared["standardized"].features
        found["side"], found["widths"] = math.isqrt(features), [features, *HIDDEN, 10]
        inputs = {arm: prepared.get(arm, prepared["standardized"]) for arm in ARMS}
        networks = {arm: partial(convolutional, arm, found["side"], seed) for arm in ARMS}
        for size, n in epochs.items():
            steps = settings.pick(TRAINED_ON // size * n, 8)
            rates = [rate * (size / BATCH) ** 0.5 for rate in settings.pick(RATES, RATES[:1])]
            for arm, data in inputs.items():
                into(found[str(size)][arm], best(networks[arm], data, rates, steps, size, seed))
        for arm, ms in times({arm: (networks[arm](), inputs[arm]) for arm in ARMS}, settings.pick(30, 3)).items():
            found["ms"][arm].append(ms)
            found["kilobytes"][arm].append(kept(networks[arm](), inputs[arm]) / 1024)
        for name, data in prepared.items():
            start = perf_counter()
            INPUTS[name]().fit(data.pixels)
            found["fit"][name].append(1e3 * (perf_counter() - start))
            make = partial(mlp, found["widths"], None, seed=seed)
            steps = settings.pick(TRAINED_ON // BATCH * epochs[BATCH], 8)
            into(found["mlp"][name], best(make, data, RATES, steps, BATCH, seed))
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


def times(arms: dict[str, tuple[nn.Module, Data]], rounds: int) -> dict[str, float]:
    """Milliseconds from pixels to gradients."""
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, (model, data) in arms.items():
            start = perf_counter()
            x = torch.from_numpy(data.prepare.transform(data.pixels[:BATCH]))
            functional.cross_entropy(model(x), data.y[:BATCH]).backward()
            taken[arm].append(1e3 * (perf_counter() - start))
    return {arm: median(each) for arm, each in taken.items()}


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
    figure, (accuracy, time, memory) = panels(3, width=12.5)
    at = np.arange(len(ARMS))
    for i, (size, color) in enumerate(((BATCH, BLUE), (SMALL, RED))):
        by_arm = [found[str(size)][arm]["accuracy"] for arm in ARMS]
        points(accuracy, at + 0.2 * (i - 0.5), by_arm, color, f"batches of {size}", marker="os"[i])
    labels = (time, "ms", f"a step of {BATCH}, ms"), (memory, "kilobytes", "kept for the backward, KiB")
    for axes, key, label in labels:
        by_arm = [found[key][arm] for arm in ARMS]
        axes.bar(at, [median(each) for each in by_arm], color=BLUE)
        points(axes, at, by_arm, "#333333", "", marker="none")
        axes.set(ylabel=label)
    for axes in (accuracy, time, memory):
        axes.set_xticks(at, ARMS, rotation=45)
    in_percent(accuracy)
    accuracy.legend(frameon=False)
    return figure


def claims(found: Found) -> list[Claim]:
    large, small, kilobytes, ms = found[str(BATCH)], found[str(SMALL)], found["kilobytes"], found["ms"]
    normalizing = [norm for norm in NORMS if norm != "none"]
    of_activations = [norm for norm in normalizing if norm != "weight"]

    def told(of: Found, key: str, form: Callable[[float], str] = number, arms: Sequence[str] = tuple(NORMS)) -> str:
        return ", ".join(f"{arm} {spread(of[arm][key], form)}" for arm in arms)

    def below(of: Found, names: Sequence[str], other: str) -> list[bool]:
        return [a < b for name in names for a, b in zip(of[name]["loss"], of[other]["loss"], strict=True)]

    drop = {
        norm: [a - b for a, b in zip(large[norm]["accuracy"], small[norm]["accuracy"], strict=True)] for norm in NORMS
    }
    pure = ("batch", "layer", "instance")
    behind = [
        max(of[norm]["accuracy"][i] for norm in pure) - of["switchable"]["accuracy"][i]
        for of in (large, small)
        for i in range(len(large["batch"]["accuracy"]))
    ]
    inputs = ("none", *WHITENED, "batch")
    return [
        Claim(
            "Normalized networks train better: the training loss is lower than without a norm.",
            f"Training loss, batches of {BATCH}: {told(large, 'loss')}. Test accuracy: "
            f"{told(large, 'accuracy', percent)}.",
            below(large, normalizing, "none"),
        ),
        Claim(
            "Batch norm suffers from small batches more than group norm does (Wu and He).",
            f"Test accuracy with batches of {SMALL}: {told(small, 'accuracy', percent)}. From {BATCH} to {SMALL} batch "
            f"norm loses {spread(drop['batch'], percent)}, group norm {spread(drop['group'], percent)}.",
            [a > b for a, b in zip(drop["batch"], drop["group"], strict=True)],
        ),
        Claim(
            "Switchable norm finds the norm that suits the batch (Luo et al.): it is as good as the best of its three.",
            f"Its test accuracy is {spread(behind, percent)} below the best of batch, layer and instance norm, with "
            f"batches of {BATCH} and of {SMALL}; it is checked to be at most one point.",
            [each <= 0.01 for each in behind],
        ),
        Claim(
            "Weight norm is the cheap one in memory: it keeps weights for the backward, no activations.",
            "Kept for the backward, over what is kept without a norm: "
            + ", ".join(
                f"{norm} {spread(a / b for a, b in zip(kilobytes[norm], kilobytes['none'], strict=True))}"
                for norm in normalizing
            )
            + ". It is checked to add less than half of what each of the others adds.",
            [a - none < (b - none) / 2 for norm in of_activations
             for a, b, none in zip(kilobytes["weight"], kilobytes[norm], kilobytes["none"], strict=True)],
        ),
        Claim(
            "Weight norm is the cheap one in time, too: its step is the shortest.",
            f"A step takes, in ms: {', '.join(f'{norm} {spread(ms[norm])}' for norm in NORMS)}. (Asked after the "
            "numbers on digits had been seen.)",
            [a < b for norm in of_activations for a, b in zip(ms["weight"], ms[norm], strict=True)],
        ),
        Claim(
            "Whitened inputs train faster than standardized ones: the training loss is lower.",
            f"Training loss, batches of {BATCH}: {told(large, 'loss', number, inputs)}. Test accuracy: "
            f"{told(large, 'accuracy', percent, inputs)}; with batches of {SMALL}: "
            f"{told(small, 'accuracy', percent, inputs)}. A step takes, in ms: "
            f"{', '.join(f'{arm} {spread(ms[arm])}' for arm in inputs)}; it keeps as much for the backward as without "
            "a norm. Fitted once, in ms: "
            + ", ".join(f"{name} {spread(each)}" for name, each in found["fit"].items()) + ".",
            below(large, WHITENED, "none"),
        ),
        Claim(
            "Whitened inputs train faster in an MLP, which does not care whether its inputs are an image.",
            f"Training loss: {told(found['mlp'], 'loss', number, tuple(INPUTS))}; test accuracy: "
            f"{told(found['mlp'], 'accuracy', percent, tuple(INPUTS))}.",
            below(found["mlp"], WHITENED, "standardized"),
        ),
    ]  # fmt: skip
