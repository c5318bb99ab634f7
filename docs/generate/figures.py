"""The figures of the site, drawn from what the library computes now and from the committed measurements."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fusednorm.bench import report

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import family  # noqa: E402
import numerics  # noqa: E402

PASSES = "forward", "backward", "eval"
COLORS = {
    "batch": "#4477aa",
    "layer": "#ccbb44",
    "rms": "#228833",
    "instance": "#66ccee",
    "group": "#aa3377",
    "switchable": "#777777",
    "weight": "#ee7733",
}
WAYS = {
    numerics.SHORTCUT: ("#cc3311", "o"),
    numerics.FLAX: ("#ee7733", "P"),
    numerics.FLAX_SLOW: ("#228833", "X"),
    numerics.TORCH: ("#777777", "v"),
    numerics.TORCH_LAST: ("#aa3377", "^"),
    numerics.TWO_PASSES: ("#ccbb44", "s"),
    numerics.OURS: ("#4477aa", "D"),
}
NUMERICS = "numerics-xeon-2cores.json"


@cache
def errors() -> dict[str, Any]:
    """What `benchmarks/numerics.py --json` wrote: the peers need not be installed where the site is built."""
    return json.loads((ROOT / "benchmarks/results" / NUMERICS).read_text())  # type: ignore[no-any-return]


def runs() -> dict[str, Any]:
    """What `fusednorm bench --json` wrote, by file."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))}
    return {name: run for name, run in found.items() if "left_out" in run}


def rows() -> list[report.Row]:
    return [row for run in runs().values() for row in run["rows"] if row["ratios"]]


def draw(folder: Path) -> Iterator[Path]:
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, v = family.images(), family.filters()
    dy, dw = (rng.standard_normal(a.shape, dtype=np.float32) for a in (x, v))
    norms = family.norms(x, dy, v, dw)
    family.figure(norms, x, v, folder / "family.png")
    yield folder / "family.png"
    # A page is narrower than most figures, whose letters shrink with them.
    with mpl.rc_context({"font.size": 13, "legend.fontsize": 12}):
        drawings = {"folds": _folds(norms), "numerics": _numerics(), "roofline": _roofline(), "peers": _peers()}
        for name, drawing in drawings.items():
            drawing.savefig(folder / f"{name}.svg")
            yield folder / f"{name}.svg"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def _folds(norms: Sequence[family.Norm]) -> Any:
    drawing = _figure(10, 5)
    for axes, norm in zip(drawing.subplots(2, (len(norms) + 1) // 2).flat, norms, strict=True):
        axes.axis("off")
        axes.set_title(norm.name)
        names = ("filters", "channels", "k·k") if norm.name == "weight" else ("N", "C", "H·W")
        family.cube(axes, norm.folds(family.DRAWN), names)
    return drawing


def _numerics() -> Any:
    drawing = _figure(11, 5.2)
    for axes, of, title in zip(
        drawing.subplots(1, 2),
        ("variance", "y"),
        ("variance, relative", "y, absolute"),
        strict=True,
    ):
        for way, (color, marker) in WAYS.items():
            points = [(row["offset"], row[of]) for row in errors()["rows"] if row["way"] == way]
            if points:
                axes.loglog(*zip(*points, strict=True), color=color, marker=marker, label=way)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"largest error of {title}", xlabel="mean/σ")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawing


def _roofline() -> Any:
    drawing = _by_size(
        report.share,
        {"channels first": ("o", lambda row: row["layout"] == "first"),
         "channels last": ("v", lambda row: row["layout"] == "last"),
         "rows": ("s", lambda row: row["layout"] == "flat")},
        rows(),
    )  # fmt: skip
    drawing.axes[0].set(ylabel="part of the copy's bandwidth", ylim=(0, None))
    return drawing


def _peers() -> Any:
    def ratio(row: report.Row) -> float:
        return float(row["ratios"]["torch/ours"]["median"])

    drawing = _by_size(
        ratio,
        {"PyTorch takes longer": ("o", lambda row: ratio(row) >= 1),
         "PyTorch is faster": ("X", lambda row: ratio(row) < 1)},
        [row for row in rows() if "torch" in row["ms"]],
    )  # fmt: skip
    drawing.axes[0].set(ylabel="PyTorch's time / ours", yscale="log")
    drawing.axes[0].yaxis.set_major_formatter("{x:g}")
    return drawing


def _by_size(
    value: Callable[[report.Row], float],
    kinds: dict[str, tuple[str, Callable[[report.Row], bool]]],
    chosen: Sequence[report.Row],
) -> Any:
    """A panel for each pass: every row as a point, pale, and for each norm a line through the medians of sizes within a
    factor of 4."""
    from matplotlib.lines import Line2D

    drawing = _figure(11, 5.5)
    for axes, pass_ in zip(drawing.subplots(1, 3, sharey=True), PASSES, strict=True):
        for norm, color in COLORS.items():
            of = [row for row in chosen if row["pass"] == pass_ and row["norm"] == norm]
            for marker, fits in kinds.values():
                some = [row for row in of if fits(row)]
                lost = marker == "X"
                axes.scatter(
                    [report.megabytes(row) for row in some], [value(row) for row in some], s=60 if lost else 20,
                    color=color, marker=marker, alpha=1 if lost else 0.3, linewidth=0, zorder=3 if lost else 1,
                )  # fmt: skip
            bins: dict[int, list[report.Row]] = {}
            for row in of:
                bins.setdefault(round(math.log(report.megabytes(row), 4)), []).append(row)
            medians = [(4.0**exponent, median(map(value, bins[exponent]))) for exponent in sorted(bins)]
            axes.plot(*zip(*medians, strict=True), color=color, linewidth=2.2, zorder=2)
        axes.axhline(1, color="#cc3311", linewidth=1.5)
        axes.set(title=pass_, xlabel="MB of x", xscale="log")
    handles = [Line2D([], [], linewidth=2.2, color=color, label=norm) for norm, color in COLORS.items()]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color="#555555", label=text) for text, (marker, _) in kinds.items()
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=5)
    return drawing
