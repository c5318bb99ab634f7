"""Results as text and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# "out=": both write into a ready array; without it both allocate.
COLUMNS = ("case", "pass", "copy ms", "ours ms", "ours/copy", "torch/ours out=", "torch/ours", "NumPy/ours")
CAPTION = "Medians; ± is half the distance between the 10th and the 90th percentile of the rounds."

_AGAINST = ("torch_out/ours_out", "torch/ours")
_SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


def label(row: Row) -> str:
    """``32×64×112×112 f32``, with what is fused to it; the shape as it lies in memory, ``last`` for channels last."""
    parts = ["×".join(map(str, row["shape"])), _SHORT[row["dtype"]]]
    if row["layout"] == "last":
        parts.insert(1, "last")
    if row["residual"]:
        parts.append("+ residual")
    if row["activation"]:
        parts.append(f"+ {row['activation']}")
    return " ".join(parts)


def loses(row: Row) -> bool:
    """Whether PyTorch is faster, or a result is wrong."""
    ratios = row["ratios"]
    return bool(row["wrong"]) or any(name in ratios and ratios[name]["median"] < 1 for name in _AGAINST)


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one row, under COLUMNS."""
    ms, ratios = row["ms"], row["ratios"]
    if row["wrong"]:
        return f"{label(row)}: WRONG, {'; '.join(row['wrong'])}", row["pass"], *["–"] * (len(COLUMNS) - 2)
    reference = f"{ms['reference']['median'] / ms['ours']['median']:.0f}" if "reference" in ms else "–"
    return (
        label(row),
        row["pass"],
        _digits(ms["copy"]["median"]),
        _digits(ms["ours_out"]["median"]),
        _times(ratios, "ours_out/copy"),
        _times(ratios, "torch_out/ours_out"),
        _times(ratios, "torch/ours"),
        reference,
    )


def _digits(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def _times(ratios: Mapping[str, Any], name: str) -> str:
    if name not in ratios:
        return "–"
    spread = ratios[name]
    return f"{spread['median']:.2f} ±{(spread['p90'] - spread['p10']) / 2:.2f}"


def where(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment, by name."""
    env = results["environment"]
    load = env["load_average"]
    return [
        ("CPU", env["cpu"]),
        ("caches", ", ".join(f"{name} {size}" for name, size in env["caches"].items()) or "unknown"),
        ("threads", f"{env['threads']} on {env['cores']} cores"),
        ("instruction set", f"{env['isa']}, {env['compiler']}"),
        ("versions", ", ".join(f"{name} {version or 'absent'}" for name, version in env["versions"].items())),
        ("Python", f"{env['python']} on {env['platform']}"),
        ("load before", ", ".join(map(str, load)) if load else "unknown"),
        ("date", env["date"]),
    ]


def summary(results: Mapping[str, Any]) -> list[str]:
    """Geometric means, what was lost, and how far the results were checked."""
    rows = results["rows"]
    lines = []
    for name, text in (
        ("ours_out/copy", "ours takes as long as {} copies of the tensor"),
        ("torch_out/ours_out", "PyTorch with out= takes {} times as long as ours with out="),
        ("torch/ours", "PyTorch takes {} times as long as ours, both allocating"),
    ):
        ratios = [row["ratios"][name]["median"] for row in rows if name in row["ratios"]]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"{text.format(f'{mean:.2f}')} (geometric mean of {len(ratios)} rows)")
    lines.append(f"{sum(map(loses, rows))} of {len(rows)} rows lost")
    partly = sum(row["checked"][0] < row["checked"][1] for row in rows)
    some = f", {partly} of them on some of their channels" if partly else ""
    return [*lines, f"all rows checked against float64 before timing{some}"]


def table(results: Mapping[str, Any]) -> str:
    """GitHub's Markdown: one row a measurement, lost ones in bold with a cross, then the environment."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
    ]
    for row in results["rows"]:
        texts = cells(row)
        lines.append("| " + " | ".join((f"**✗ {texts[0]}**", *texts[1:]) if loses(row) else texts) + " |")
    lines += ["", f"{CAPTION} " + "; ".join(summary(results)) + "."]
    lines += ["", "; ".join(f"{name}: {text}" for name, text in where(results))]
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: str | Path) -> None:
    """A bar chart of PyTorch's time over ours, one panel for each pass. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["ratios"]]
    panels: dict[str, Sequence[Row]] = {}
    for row in rows:
        panels[row["pass"]] = [*panels.get(row["pass"], ()), row]
    tallest = max(map(len, panels.values()), default=1)
    figure = Figure(figsize=(6.5 * max(len(panels), 1), 1.5 + 0.3 * tallest), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (pass_, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), column + 1)
        positions = range(len(panel))
        for name, text, color, offset in (
            ("torch/ours", "PyTorch, allocating", "#4477aa", -0.2),
            ("torch_out/ours_out", "PyTorch, out=", "#99bbdd", 0.2),
        ):
            heights = [row["ratios"].get(name, {"median": math.nan})["median"] for row in panel]
            axes.barh([p + offset for p in positions], heights, 0.4, color=color, label=text)
        copies = [row["ratios"]["ours_out/copy"]["median"] for row in panel]
        axes.plot([1 / c for c in copies], positions, "k|", markersize=9, label="a copy of the tensor")
        axes.axvline(1, color="#cc3311", linewidth=1)
        axes.set_yticks(positions, [label(row) for row in panel], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("time / our time")
        axes.set_title(pass_)
        if column == 0:
            figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{results['environment']['cpu']}, {results['environment']['threads']} threads")
    figure.savefig(path, dpi=150)
