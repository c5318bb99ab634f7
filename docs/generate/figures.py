"""The figures of the site, drawn from what the library computes now and from the committed measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
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
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, v = family.images(), family.filters()
    dy, dw = (rng.standard_normal(a.shape, dtype=np.float32) for a in (x, v))
    norms = family.norms(x, dy, v, dw)
    family.figure(norms, x, v, folder / "family.png")
    yield folder / "family.png"
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
    drawing = _figure(11, 4.5)
    for axes, of, title in zip(
        drawing.subplots(1, 2),
        ("variance", "y"),
        ("variance, relative to the true one", "y, whose elements are about 1"),
        strict=True,
    ):
        for way, (color, marker) in WAYS.items():
            points = [(row["offset"], row[of]) for row in errors()["rows"] if row["way"] == way]
            if points:
                axes.loglog(*zip(*points, strict=True), color=color, marker=marker, label=way)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"largest error of {title}", xlabel="mean/σ")
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawing


def _roofline() -> Any:
    drawing = _figure(13, 4.8)
    for axes, pass_ in zip(drawing.subplots(1, 3, sharey=True), PASSES, strict=True):
        for norm, color in COLORS.items():
            chosen = [row for row in rows() if row["pass"] == pass_ and row["norm"] == norm]
            for layout, marker in (("first", "o"), ("last", "v"), ("flat", "s")):
                some = [row for row in chosen if row["layout"] == layout]
                axes.scatter([report.megabytes(row) for row in some], [report.share(row) for row in some], s=26,
                             color=color, marker=marker, alpha=0.7, linewidth=0)  # fmt: skip
        axes.axhline(1, color="#cc3311", linewidth=1)
        axes.set_xscale("log")
        axes.set(title=pass_, xlabel="MB of x")
    drawing.axes[0].set(ylabel="part of the copy's bandwidth", ylim=(0, None))
    _legend(drawing, {"channels first": "o", "channels last": "v", "rows": "s"})
    return drawing


def _peers() -> Any:
    drawing = _figure(13, 4.8)
    for axes, pass_ in zip(drawing.subplots(1, 3, sharey=True), PASSES, strict=True):
        for norm, color in COLORS.items():
            chosen = [row for row in rows() if row["pass"] == pass_ and row["norm"] == norm and "torch" in row["ms"]]
            for lost, marker in ((False, "o"), (True, "X")):
                some = [row for row in chosen if (row["ratios"]["torch/ours"]["median"] < 1) == lost]
                axes.scatter(
                    [report.megabytes(row) for row in some],
                    [row["ratios"]["torch/ours"]["median"] for row in some],
                    s=60 if lost else 26, color=color, marker=marker, alpha=1 if lost else 0.7, linewidth=0,
                )  # fmt: skip
        axes.axhline(1, color="#cc3311", linewidth=1)
        axes.set(title=pass_, xlabel="MB of x", xscale="log", yscale="log")
    drawing.axes[0].set(ylabel="PyTorch's time / ours, both allocating")
    _legend(drawing, {"PyTorch takes longer": "o", "PyTorch is faster": "X"})
    return drawing


def _legend(drawing: Any, markers: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", marker="o", color=color, label=norm) for norm, color in COLORS.items()]
    handles += [Line2D([], [], linestyle="", marker=m, color="black", label=text) for text, m in markers.items()]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(handles))
