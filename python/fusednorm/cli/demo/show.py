"""What the demo draws: curves while the networks train, digits in block characters, a figure for later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fusednorm.cli.demo.network import Array, Epoch

COLORS = {"plain": "#ee6677", "normalized": "#4477aa"}
NAMES = {"plain": "without batch norm", "normalized": "with batch norm"}

Curves = Mapping[str, Sequence[Epoch]]


def curves(histories: Curves, epochs: int, *, width: int = 60, height: int = 8) -> RenderableType:
    """Held-out accuracy over the epochs, from 0 to 100%, and where both stand."""
    # Each cell holds two dots, one above the other: the lower half of "▀" is its background.
    dots: dict[tuple[int, int], str] = {}
    for name, history in histories.items():
        for column in range(width):
            epoch = column * epochs // width
            if epoch < len(history):
                dots[round((1 - history[epoch].accuracy) * (2 * height - 1)), column] = COLORS[name]
    lines = []
    for row in range(height):
        edge = {0: "100% ", height - 1: "  0% "}.get(row, "     ")
        line = Text(edge + "│", style="dim")
        for column in range(width):
            upper, lower = dots.get((2 * row, column)), dots.get((2 * row + 1, column))
            if upper and lower:
                line.append("▀", f"{upper} on {lower}")
            else:
                line.append("▀" if upper else "▄" if lower else " ", upper or lower or "")
        lines.append(line)
    lines.append(Text("     └" + "─" * width, style="dim"))
    for name, history in histories.items():
        if history:
            full = "█" * round(40 * history[-1].accuracy)
            status = f"{NAMES[name]:>18}  {full:<40} {history[-1].accuracy:6.1%}  loss {history[-1].loss:.3f}"
            lines.append(Text(status, COLORS[name]))
    return Group(*lines)


def line(histories: Curves) -> str:
    """How both stand, in one line of text."""
    epoch = max(map(len, histories.values()))
    parts = [f"{NAMES[name]} {h[-1].accuracy:6.1%} (loss {h[-1].loss:.3f})" for name, h in histories.items()]
    return f"epoch {epoch:>3}:  " + "   ".join(parts)


def digits(console: Console, images: Array, labels: Array, guesses: Mapping[str, Array], *, per_row: int = 4) -> None:
    """Images of 8 × 8 pixels from 0 to 1, with their label and what each network takes them for."""
    shades = " ░▒▓█"
    for start in range(0, len(images), per_row):
        row = slice(start, start + per_row)
        pictures = (images[row].reshape(-1, 8, 8) * 4 + 0.5).astype(int)
        for y in range(8):
            console.print("   ".join("".join(2 * shades[p] for p in picture[y]) for picture in pictures))
        for name, guess in guesses.items():
            text = Text()
            for label, digit in zip(labels[row], guess[row], strict=True):
                right = label == digit
                text.append(f"{name:>10}: {digit} {'✓' if right else '✗'}   ".ljust(19), "green" if right else "red")
            console.print(text)
        console.print()


def figure(contests: Mapping[str, Curves], path: Path) -> None:
    """Loss and held-out accuracy of every contest, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5 * len(contests), 6), layout="constrained")
    FigureCanvasAgg(drawing)
    axes: Any = drawing.subplots(2, len(contests), sharex="col", squeeze=False)
    for (title, histories), (loss, accuracy) in zip(contests.items(), axes.T, strict=True):
        for name, history in histories.items():
            epochs = range(1, len(history) + 1)
            loss.plot(epochs, [epoch.loss for epoch in history], color=COLORS[name], label=NAMES[name])
            accuracy.plot(epochs, [epoch.accuracy for epoch in history], color=COLORS[name])
        loss.set_title(title)
        loss.set_ylabel("training loss")
        loss.set_yscale("log")
        loss.legend()
        accuracy.set_ylabel("held-out accuracy")
        accuracy.set_ylim(0, 1.02)
        accuracy.set_xlabel("epoch")
    drawing.savefig(path, dpi=150)
