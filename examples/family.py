"""The family of norms on one batch of images: which elements share a statistic, what becomes of the images, how exact
and how fast it is. `python examples/family.py` writes family.png and prints a table.

All norms are the same passes over memory. They differ in which elements share a mean and a variance, and which share a
weight and a bias. A fold says both, in five integers (`help(fusednorm.fold)`).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
from fusednorm import arrays, bench, fold
from fusednorm.cli.extras import positive, progress
from fusednorm.fold import Fold
from fusednorm.testing import cases
from fusednorm.testing.cases import Array, Case, Inputs

N, C, H, W = IMAGES = 16, 24, 64, 64
FILTERS = 64, C, 7, 7
GROUPS, GHOST = 2, 8  # groups of channels; samples of a ghost batch
SHAPE = C, H, W

Shape = tuple[int, ...]
Pair = tuple[Array, Array]  # a tensor and the gradient with respect to what becomes of it


@dataclass(frozen=True)
class Norm:
    """One norm: its call, its gradients and, of an array of any shape, its folds.

    Attributes:
        case: the same for :mod:`fusednorm.testing.cases`, which knows the true results and how exact ours must be.
        folds: the first is the one of the call. Switchable norm mixes its statistics with the others'.
    """

    name: str
    case: Case
    folds: Callable[[Shape], Sequence[Fold]]
    forward: Callable[[], Any]
    backward: Callable[..., Any]


def norms(x: Array, dy: Array, v: Array, dw: Array) -> list[Norm]:
    """Each in two lines: forward returns y and what backward needs besides; backward returns dx and the parameters'
    gradients."""
    w, b = np.ones(C, np.float32), np.zeros(C, np.float32)
    lines_w, lines_b = np.ones(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    logits = np.ones(3, np.float32)  # a third of each kind of statistic
    g = np.ones((len(v), 1, 1, 1), np.float32)
    return [
        Norm("batch", case("batch"), lambda s: [fold.batch(s, order(s), 1)],
             lambda: fn.batch_norm_forward(x, w, b),
             lambda mean, rstd: fn.batch_norm_backward(dy, x, mean, rstd, w, b)),
        Norm("ghost batch", case("batch", ghost_batch_size=GHOST), lambda s: [fold.batch(s, order(s), 1, N // GHOST)],
             lambda: fn.batch_norm_forward(x, w, b, ghost_batch_size=GHOST),
             lambda mean, rstd: fn.batch_norm_backward(dy, x, mean, rstd, w, b, ghost_batch_size=GHOST)),
        Norm("layer", case("layer", normalized=3), lambda s: [lines(s)],
             lambda: fn.layer_norm_forward(x, SHAPE, lines_w, lines_b),
             lambda mean, rstd: fn.layer_norm_backward(dy, x, mean, rstd, lines_w, lines_b)),
        Norm("instance", case("instance"), lambda s: [group(s, s[1])],
             lambda: fn.instance_norm_forward(x, w, b),
             lambda mean, rstd: fn.instance_norm_backward(dy, x, mean, rstd, w, b)),
        Norm("group", case("group", groups=GROUPS), lambda s: [group(s, GROUPS)],
             lambda: fn.group_norm_forward(x, GROUPS, w, b),
             lambda mean, rstd: fn.group_norm_backward(dy, x, mean, rstd, w, b)),
        Norm("RMS", case("rms", normalized=3, eps=float(np.finfo(np.float32).eps)), lambda s: [lines(s)],
             lambda: fn.rms_norm_forward(x, SHAPE, lines_w),
             lambda rstd: fn.rms_norm_backward(dy, x, rstd, lines_w)),
        Norm("switchable", case("switchable"), lambda s: [group(s, s[1]), lines(s), fold.batch(s, order(s), 1)],
             lambda: fn.switchable_norm_forward(x, logits, logits, w, b),
             lambda m, var, rstd: fn.switchable_norm_backward(dy, x, m, var, rstd, logits, logits, w, b)),
        Norm("weight", case("weight", FILTERS, axis=0, eps=0.0), lambda s: [fold.batch(s, order(s), 0)],
             lambda: fn.weight_norm_forward(v, g),
             lambda norm: fn.weight_norm_backward(dw, v, g, norm)),
    ]  # fmt: skip


def case(norm: str, shape: Shape = IMAGES, **options: Any) -> Case:
    return Case(norm, shape, norm=norm, running=False, **options)


def order(shape: Shape) -> Shape:
    """The memory order of the axes of a contiguous array."""
    return tuple(range(len(shape)))


def lines(shape: Shape) -> Fold:
    """Of each sample all channels and pixels."""
    found = fold.layer(shape, order(shape), len(shape) - 1)
    assert found
    return found


def group(shape: Shape, groups: int) -> Fold:
    found = fold.group(shape, order(shape), 1, groups)
    assert found
    return found


def statistic_and_channel(f: Fold, shape: Shape) -> tuple[Array, Array]:
    """Which statistic and which weight each element of a contiguous array has, by the formulas of fusednorm.fold."""
    b, _, g, i = np.indices((f.batch, f.outer, f.groups, f.inner))
    return (b * f.groups + g).reshape(shape), ((g * f.inner + i) // f.span).reshape(shape)


def images() -> Array:
    """Four shapes, as many images of each; a channel shows them through stripes of its own direction. Images differ in
    brightness and contrast, and so do channels, those of the first group most from those of the second."""
    down, right = np.mgrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
    radius = np.hypot(down, right)
    shapes = np.array([radius < 0.75, (radius > 0.4) & (radius < 0.8), np.maximum(abs(down), abs(right)) < 0.6,
                       np.minimum(abs(down), abs(right)) < 0.25])  # fmt: skip
    channel = np.arange(C)[:, None, None]
    angle = np.pi * channel / C
    stripes = np.cos(14 * (down * np.cos(angle) + right * np.sin(angle)))
    shape = np.arange(N) // (N // 4)
    contrast, brightness = (np.array(each)[shape][:, None, None, None] for each in ([0.5, 1, 0.4, 2], [-2, 2, 0, 4]))
    gain, shift = 1 + 0.5 * np.sin(1.3 * channel), np.where(channel < C // 2, -1.5, 1.5) + 0.5 * np.cos(0.5 * channel)
    return np.asarray(gain * contrast * shapes[shape][:, None] * (2 + stripes) + brightness + shift, np.float32)


def filters() -> Array:
    """Stripes, one direction for each filter, one phase for each channel. Filters differ in length."""
    down, right = np.mgrid[-1:1:7j, -1:1:7j]
    which, channel = np.arange(FILTERS[0])[:, None, None, None], np.arange(C)[:, None, None]
    angle = np.pi * which / FILTERS[0]
    stripes = np.cos(4 * (down * np.cos(angle) + right * np.sin(angle)) + channel)
    return np.asarray(1.05**which * stripes, np.float32)


def inputs_of(case: Case, x: Array, dy: Array) -> Inputs:
    """What a norm is given, as :mod:`fusednorm.testing.cases` takes it; weights are ones, biases zeros."""
    ones, zeros = (make(case.parameter_shape, np.float32) for make in (np.ones, np.zeros))
    logits = np.ones(3, np.float32) if case.norm == "switchable" else None
    bias = zeros if case.centered else None
    return Inputs(x, dy, ones, bias, None, None, None, None, logits, logits)


def table(
    family: Sequence[Norm], images: Pair, filters: Pair, machine: bench.Cpu, timed: bool
) -> tuple[list[list[str]], bool]:
    """Two rows for each norm, its forward and its backward; and whether all results are right. Wrong ones have no
    time."""
    rows, all_right = [], True
    for norm in family:
        progress(f"{norm.name} norm …")
        inputs = inputs_of(norm.case, *(filters if norm.name == "weight" else images))
        want = cases.expected(norm.case, inputs)
        bounds = cases.bounds(norm.case, inputs, want)
        saved = norm.forward()[1:]
        names = (
            norm.name,
            str(integers(norm.folds(norm.case.shape)[0])),
            ", ".join("×".join(map(str, a.shape)) for a in saved),
        )
        for which, result, call in (
            ("forward", "y", norm.forward),
            ("backward", "dx", partial(norm.backward, *saved)),
        ):
            true = getattr(want, result)
            error = np.abs(call()[0] - true)
            right = bool(np.all(error <= bounds[result]))
            all_right &= right
            row = [*names, which, f"{error.max():.1e}" + ("" if right else " WRONG")]
            if timed:
                row += times(norm.case, inputs, which, call, true, machine) if right else ["–"] * 3
            rows.append(row)
            names = "", "", ""
    progress()
    return rows, all_right


def integers(f: Fold) -> Shape:
    return f.batch, f.outer, f.groups, f.inner, f.span


def times(
    case: Case, inputs: Inputs, which: str, call: Callable[[], Any], true: Array, machine: bench.Cpu
) -> list[str]:
    """Our time, PyTorch's, and their ratio."""
    entrants = [bench.Contender("ours", call)]
    if importlib.util.find_spec("torch") and case.ghost_batch_size is None:
        torch = next(each for each in machine.contenders(case, inputs, which) if each.name == "torch")
        assert torch.array
        if not np.mean(np.abs(torch.array(torch.call()) - true)) <= bench.SAME * np.mean(np.abs(true)):
            return ["–", "computes something else", "–"]
        entrants.append(torch)
    samples = bench.interleaved(entrants)
    found = [*map(bench.spread, samples.values())]
    if len(found) == 2:
        found.append(bench.ratio(samples["torch"], samples["ours"]))
    return [*map(with_spread, found), "–", "–"][:3]


def with_spread(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ±{(of['p90'] - of['p10']) / 2:.2f}"


def show(title: str, rows: list[list[str]]) -> None:
    """With rich, if it is installed; what is saved stands below the fold."""
    columns = ["norm", "fold, saved", "pass", "deviation", "ours ms", "PyTorch ms", "PyTorch/ours"][: len(rows[0]) - 1]
    lines = []
    for (name, of_fold, saved, *forward), backward in zip(rows[::2], rows[1::2], strict=True):
        lines += [[name, of_fold, *forward], ["", saved, *backward[3:]]]
    if importlib.util.find_spec("rich"):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=title)
        for row in lines:
            drawn.add_row(*row)
        console = Console(highlight=False)
        console.width = max(console.width, 100)  # broken lines are easier to read than broken cells
        console.print(drawn)
        return
    widths = [max(len(row[i]) for row in (columns, *lines)) for i in range(len(columns))]
    print(title)
    for row in (columns, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


DRAWN = 4, 6, 2, 3  # what the cubes are drawn of
BLUE, PALE, EMPTY, ORANGE = "#4477aa", "#aaccee", "#eeeeee", "#ee7733"
LETTERS = 18  # the largest
REACH = 2  # gray levels end that many times the root of the mean square from the middle one
OF_CUBES = (
    f"Cubes: {DRAWN[0]} samples (N),\n{DRAWN[1]} channels (C),\n{DRAWN[2]}×{DRAWN[3]} positions (H·W).\nBlue: shares a "
    "statistic\nwith the nearest corner.\nPale: is mixed into it.\nDots: share its weight."
)
OF_IMAGES = (
    f"Beneath each cube:\nsome channels of some\nimages after the norm.\nGray is 0, white {REACH}·rms.\nIn brackets: "
    "the fold\n(batch, outer, groups,\ninner, span)."
)


def figure(family: Sequence[Norm], x: Array, v: Array, path: Path) -> None:
    """For each norm the cube of its elements, and beneath it some channels of some images after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(17, 12), layout="constrained")
    FigureCanvasAgg(drawing)
    after = [(norm, norm.name, norm.forward()[0]) for norm in family]
    shown = [(None, "the images", x), *after, (None, "the filters", v)]
    half = (len(shown) + 1) // 2
    axes = drawing.subplots(4, half, height_ratios=(1.1, 1, 1.1, 1))
    for each in axes.flat:
        each.axis("off")
    for i, (norm, name, y) in enumerate(shown):
        of_filters = y.shape == v.shape
        above, below = axes[2 * (i // half) : 2 * (i // half) + 2, i % half]
        above.set_title(name, fontsize=LETTERS)
        if norm:
            folds = norm.folds(DRAWN)
            above.set_title(f"{name} {integers(folds[0])}", fontsize=LETTERS)
            cube(above, folds, ("filters", "channels", "k·k") if of_filters else ("N", "C", "H·W"))
        else:
            words = OF_IMAGES if of_filters else OF_CUBES
            above.text(0.5, 0.5, words, fontsize=LETTERS - 2, ha="center", va="center", transform=above.transAxes)
        some = np.pad(y[:: len(y) // 4, :: C // 6], ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
        center = np.nanmean(some) if y is x else 0
        reach = REACH * np.sqrt(np.nanmean((some - center) ** 2))
        mosaic = some.swapaxes(1, 2).reshape(4 * some.shape[2], -1)
        below.imshow(mosaic, "gray", vmin=center - reach, vmax=center + reach)
        below.axis("on")
        below.set(xticks=[], yticks=[])
        below.set_xlabel("channels", fontsize=LETTERS - 2)
        below.set_ylabel("filters" if of_filters else "images", fontsize=LETTERS - 2)
    drawing.savefig(path, dpi=100)


def cube(axes: Any, folds: Sequence[Fold], names: Sequence[str]) -> None:
    """DRAWN's elements: samples from left to right, channels from front to back, positions from top to bottom."""
    sides = samples, channels, positions = *DRAWN[:2], DRAWN[2] * DRAWN[3]
    corner = samples - 1, 0, 0  # the nearest
    of_folds = [[a.reshape(sides) == a.reshape(sides)[corner] for a in statistic_and_channel(f, DRAWN)] for f in folds]
    (statistic, weight), *_ = of_folds
    mixed = np.any([one for one, _ in of_folds], axis=0)
    right, back, down = np.array([(1, 0), (0.45, 0.35), (0, -1)])
    for n, c, p in np.ndindex(sides):
        at = n * right + c * back + p * down
        color = BLUE if statistic[n, c, p] else PALE if mixed[n, c, p] else EMPTY
        for seen, start, one, other in (
            (c == 0, at, right, down),
            (p == 0, at, right, back),
            (n == samples - 1, at + right, back, down),
        ):
            if seen:
                face = np.array([start, start + one, start + one + other, start + other])
                axes.fill(*face.T, facecolor=color, edgecolor="white", linewidth=0.8)
                if weight[n, c, p]:
                    axes.plot(*face.mean(0), "o", color=ORANGE, markersize=4)
    axes.set_aspect("equal")
    axes.text(*samples / 2 * right + (positions + 0.3) * down, names[0], ha="center", va="top")
    axes.text(*(samples + 0.3) * right + channels / 2 * back + positions * down, names[1], ha="left", va="top")
    axes.text(*positions / 2 * down - 0.3 * right, names[2], ha="right", va="center", rotation=90)


def main() -> int:
    parser = argparse.ArgumentParser(description="The family of norms on one batch of images: a figure and a table.")
    parser.add_argument("--output", type=Path, default=Path("family.png"), metavar="FILE", help="default: family.png")
    parser.add_argument("--threads", type=positive, metavar="N", help="for ours and for PyTorch")
    parser.add_argument("--skip-timing", action="store_true", help="results only")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x, v = images(), filters()
    dy, dw = (rng.standard_normal(a.shape, dtype=np.float32) for a in (x, v))
    family = norms(x, dy, v, dw)
    with bench.Cpu(args.threads, with_reference=False) as machine:
        title = f"{'×'.join(map(str, IMAGES))} float32 (N×C×H×W), {fn.get_num_threads()} threads"
        rows, right = table(family, (x, dy), (v, dw), machine, timed=not args.skip_timing)
    show(title, rows)
    print("Deviation: the largest from fusednorm.reference, float64. Times: medians; ± is half the distance between\n"
          "the 10th and the 90th percentile of rounds in turn. PyTorch has no ghost batch norm.")  # fmt: skip
    if not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: pip install torch compares with it.")
    if importlib.util.find_spec("matplotlib"):
        progress("drawing …")
        figure(family, x, v, args.output)
        progress()
        print(f"Figure: {args.output.resolve()}")
    else:
        print(f"No figure: it needs matplotlib, {arrays.installs('demo')}")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
