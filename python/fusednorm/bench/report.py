"""Results as text and as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

CAPTION = "Medians; ± is half the distance between the 10th and the 90th percentile of the rounds."

WITHOUT_TORCH = "PyTorch is not installed: no other library to compare with (pip install torch)"

# Columns that a terminal too narrow for all of them does without, the first of them first.
DISPENSABLE = (
    *("reference/ours", "host native", "host ours", "CuPy/ours", "tensors moved", "compile/ours", "cuDNN/ours"),
    *("copy ms", "copy µs", "ours ms", "ours µs", "torch/ours out=", "ours/copy"),
)

# Who must be slower than ours, on the CPU and on a GPU.
_AGAINST = ("torch_out/ours_out", "torch/ours", "native/ours_out", "cudnn/ours_out", "compile/ours_out")
_SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def label(row: Row) -> str:
    """``32×64×112×112 f32``, with what is fused to it; the shape as it lies in memory, ``last`` for channels last."""
    parts = ["×".join(map(str, row["shape"])), _SHORT[row["dtype"]]]
    if row["layout"] == "last":
        parts.insert(1, "last")
    if row["norm"] != "batch":
        parts.insert(0, row["norm"])
    if row.get("ghost_batch_size"):  # which older results lack
        parts.append(f"ghosts of {row['ghost_batch_size']}")
    if row["residual"]:
        parts.append("+ residual")
    if row["activation"]:
        parts.append(f"+ {row['activation']}")
    return " ".join(parts)


def loses(row: Row) -> bool:
    """Whether PyTorch is faster, or a result is wrong."""
    ratios = row["ratios"]
    return bool(row["wrong"]) or any(name in ratios and ratios[name]["median"] < 1 for name in _AGAINST)


def columns(results: Mapping[str, Any]) -> dict[str, Callable[[Row], str]]:
    """What the table shows of a row, by column."""
    gpu = _is_of_a_gpu(results)
    found = dict(_GPU if gpu else _CPU)
    if not any("before" in row for row in results["rows"]):
        return found
    after = "of copy" if gpu else "ours/copy"
    at = list(found).index(after) + 1
    names, texts = list(found), list(found.values())
    names[at:at], texts[at:at] = [f"before {after}"], [_share_before if gpu else _ratio_before]
    return dict(zip(names, texts, strict=True))


def beside(results: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Results whose rows have, as ``before``, the ratios of the same row in an earlier run; empty where it has none."""
    before = {(label(row), row["pass"]): row["ratios"] for row in earlier["rows"]}
    rows = [{**row, "before": before.get((label(row), row["pass"]), {})} for row in results["rows"]]
    return {**results, "rows": rows}


def cells(results: Mapping[str, Any], row: Row) -> list[str]:
    """The texts of one row, under :func:`columns`."""
    texts = columns(results)
    if row["wrong"]:
        return [f"{label(row)}: WRONG, {'; '.join(row['wrong'])}", row["pass"], *["–"] * (len(texts) - 2)]
    return [text(row) for text in texts.values()]


def floor(row: Row) -> int:
    """Tensors of x's size that a call must at least read or write; a GPU's row tells what is read again, too."""
    if "floor" in row:
        return int(row["floor"])
    # What backward needs the residual for is the activation's derivative.
    backward, residual = row["pass"] == "backward", bool(row["residual"])
    reads_residual = residual and not (backward and row["activation"] is None)
    return 2 + reads_residual + (1 + residual if backward else 0)


def share(row: Row) -> float:
    """The part of the copy's bandwidth at which the fewest bytes that must move would take our time."""
    ratios = row["ratios"]
    copies = ratios["copy/ours_out"]["median"] if "copy/ours_out" in ratios else 1 / ratios["ours_out/copy"]["median"]
    part: float = floor(row) / 2 * copies
    return part


def megabytes(row: Row) -> float:
    """Of x."""
    return math.prod(row["shape"]) * _BYTES[row["dtype"]] / 1e6


def _is_of_a_gpu(results: Mapping[str, Any]) -> bool:
    return "gpu" in results["environment"]


def _reference(row: Row) -> str:
    ms = row["ms"]
    if "reference" not in ms:
        return "–"
    times = ms["reference"]["median"] / ms["ours"]["median"]
    return f"{times:.{2 if times < 1 else 1 if times < 10 else 0}f}"


def _ms(name: str) -> Callable[[Row], str]:
    return lambda row: _digits(row["ms"][name]["median"])


def _us(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['ms'][name]['median'] * 1e3:.1f}"


def _host(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['host_us'][name]['median']:.0f}" if name in row["host_us"] else "–"


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: _times(row["ratios"], name)


def _ratio_before(row: Row) -> str:
    return _times(row["before"], "ours_out/copy")


def _share_before(row: Row) -> str:
    return f"{share({**row, 'ratios': row['before']}):.0%}" if "copy/ours_out" in row["before"] else "–"


def _digits(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def _times(ratios: Mapping[str, Any], name: str) -> str:
    if name not in ratios:
        return "–"
    spread = ratios[name]
    return f"{spread['median']:.2f} ±{(spread['p90'] - spread['p10']) / 2:.2f}"


# "out=": both write into a ready array; without it both allocate.
_CPU: dict[str, Callable[[Row], str]] = {
    "case": label,
    "pass": lambda row: str(row["pass"]),
    "copy ms": _ms("copy"),
    "ours ms": _ms("ours_out"),
    "ours/copy": _ratio("ours_out/copy"),
    "torch/ours out=": _ratio("torch_out/ours_out"),
    "torch/ours": _ratio("torch/ours"),
    "reference/ours": _reference,
}
_GPU: dict[str, Callable[[Row], str]] = {
    "case": label,
    "pass": lambda row: str(row["pass"]),
    "copy µs": _us("copy"),
    "ours µs": _us("ours_out"),
    "tensors moved": lambda row: str(row["floor"]),
    "of copy": lambda row: f"{share(row):.0%}",
    "native/ours": _ratio("native/ours_out"),
    "cuDNN/ours": _ratio("cudnn/ours_out"),
    "compile/ours": _ratio("compile/ours_out"),
    "CuPy/ours": _ratio("cupy/ours_out"),
    "host ours": _host("ours"),
    "host native": _host("native"),
}
_CAPTION_GPU = (
    " Times of the device, by replays of CUDA graphs, over sets of tensors that L2 does not hold (at most 64 sets); "
    "host: µs until a call returns. tensors moved: as many of x's size a call moves at least. of copy: that, in our "
    "time, as a part of the bandwidth of the device's own copy."
)


def caption(results: Mapping[str, Any]) -> str:
    return CAPTION + (_CAPTION_GPU if _is_of_a_gpu(results) else "")


def where(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment, by name."""
    env = results["environment"]
    load = env["load_average"]
    return [
        *(_where_gpu(env) if _is_of_a_gpu(results) else ()),
        ("CPU", env["cpu"]),
        ("caches", ", ".join(f"{name} {size}" for name, size in env["caches"].items()) or "unknown"),
        ("threads", f"{env['threads']} on {env['cores']} cores"),
        ("instruction set", f"{env['isa']}, {env['compiler']}"),
        ("versions", ", ".join(f"{name} {version or 'absent'}" for name, version in env["versions"].items())),
        ("Python", f"{env['python']} on {env['platform']}"),
        ("load before", ", ".join(map(str, load)) if load else "unknown"),
        ("date", env["date"]),
    ]


def _where_gpu(env: Mapping[str, Any]) -> list[tuple[str, str]]:
    def version(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    clocks = f"SM {env['sm_clock']} of {env['sm_clock_max']}, memory {env['memory_clock']} of {env['memory_clock_max']}"
    return [
        (
            "GPU",
            f"{env['gpu']} ({env['device']}), {env['sms']} SMs, {env['shared_bytes'] / 1e6:.1f} MB of shared memory, "
            f"{env['l2_bytes'] / 1e6:.1f} MB of L2, {env['memory_bytes'] / 1e9:.0f} GB",
        ),
        ("clocks after", clocks if env["sm_clock"] else "unknown"),
        (
            "CUDA",
            f"{env['cuda']}; driver {env['driver'] or 'unknown'} for CUDA {version(env['cuda_of_driver'])}; CuPy "
            f"{env['cupy']} for CUDA {version(env['cuda_of_cupy'])}; cuDNN {env['cudnn'] or 'absent'}",
        ),
    ]


def summary(results: Mapping[str, Any]) -> list[str]:
    """Geometric means, what was lost, and how far the results were checked."""
    rows = results["rows"]
    lines = []
    for name, text in (
        ("ours_out/copy", "ours takes as long as {} copies of the tensor"),
        ("torch_out/ours_out", "PyTorch with out= takes {} times as long as ours with out="),
        ("torch/ours", "PyTorch takes {} times as long as ours, both allocating"),
        ("native/ours_out", "PyTorch's own kernels take {} times as long as ours"),
        ("cudnn/ours_out", "cuDNN takes {} times as long as ours"),
        ("compile/ours_out", "torch.compile takes {} times as long as ours"),
        ("cupy/ours_out", "the formula in CuPy takes {} times as long as ours"),
    ):
        ratios = [row["ratios"][name]["median"] for row in rows if name in row["ratios"]]
        if ratios:
            lines.append(f"{text.format(f'{_mean(ratios):.2f}')} (geometric mean of {len(ratios)} rows)")
    both = [row for row in rows if row["ratios"] and row.get("before")]
    changes = [share(row) / share({**row, "ratios": row["before"]}) for row in both]
    if changes:
        lines.append(
            f"beside the copy, {_mean(changes):.2f} times as fast as before (geometric mean of {len(both)} rows)"
        )
    for pass_ in dict.fromkeys(row["pass"] for row in rows if row.get("floor")):
        shares = [share(row) for row in rows if row.get("floor") and row["pass"] == pass_]
        lines.append(f"{pass_} reaches {_mean(shares):.0%} of the copy's bandwidth (geometric mean)")
    if any(name in row["ratios"] for row in rows for name in _AGAINST):
        lines.append(f"{sum(map(loses, rows))} of {len(rows)} rows lost")
    elif rows:
        lines.append("no other library was timed" if results["environment"]["versions"].get("torch") else WITHOUT_TORCH)
    partly = sum(row["checked"][0] < row["checked"][1] for row in rows)
    some = f", {partly} of them on some of their channels or lines" if partly else ""
    lines.append(f"all rows checked against float64 before timing{some}")
    if busy(results["environment"]):
        lines.append(busy(results["environment"]))
    eager = sorted({name for row in rows for name in row.get("eager", ())})
    if eager:
        count = sum(bool(row.get("eager")) for row in rows)
        lines.append(f"{', '.join(eager)} could not be recorded in {count} rows: timed call by call")
    reasons = dict.fromkeys(f"{name}: {why}" for row in rows for name, why in row.get("absent", {}).items())
    lines += [f"left out in some rows: {reason}" for reason in reasons]
    for key, text in (("left_out", "were not measured"), ("failed", "FAILED")):
        names = results.get(key, ())
        if names:
            lines.append(f"{len(names)} cases {text}, the first of them {names[0]}")
    interrupted = results.get("interrupted", ())
    if interrupted:
        finished = (
            len({(row["case"], row["pass"] == "eval") for row in rows})
            + len(results["left_out"])
            + len(results["failed"])
        )
        lines.append(f"stopped after {finished} of {finished + len(interrupted)} cases")
    return lines


def busy(environment: Mapping[str, Any]) -> str:
    """A warning where others kept more than half of the cores busy before the run: times mean little then."""
    load, cores = environment.get("load_average"), environment["cores"] or 1
    if not load or load[0] <= cores / 2:
        return ""
    return f"the machine was busy (load {load[0]:g} on {cores} cores): times are too long, measure when it is idle"


def _mean(numbers: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def table(results: Mapping[str, Any]) -> str:
    """GitHub's Markdown: one row a measurement, lost ones in bold with a cross, then the environment."""
    names = columns(results)
    lines = [
        "| " + " | ".join(names) + " |",
        "|---|---|" + "---:|" * (len(names) - 2),
    ]
    for row in results["rows"]:
        texts = cells(results, row)
        lines.append("| " + " | ".join((f"**✗ {texts[0]}**", *texts[1:]) if loses(row) else texts) + " |")
    lines += ["", f"{caption(results)} " + "; ".join(summary(results)) + "."]
    lines += ["", "; ".join(f"{name}: {text}" for name, text in where(results))]
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Two panels for each pass: our share of the copy's bandwidth by size; and bars, PyTorch's time over ours, of a GPU
    the shares of ours and of the others. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpu = _is_of_a_gpu(results)
    panels: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if row["ratios"]:
            panels.setdefault(row["pass"], []).append(row)
    tallest = max(map(len, panels.values()), default=1)
    bars = 1.5 + (0.2 if gpu else 0.3) * tallest
    figure = Figure(figsize=(6.5 * max(len(panels), 1), 3 + bars), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, max(len(panels), 1), height_ratios=(3, bars))
    for column, (pass_, panel) in enumerate(panels.items()):
        above, axes = (figure.add_subplot(grid[line, column]) for line in (0, 1))
        roofline(above, panel)
        above.set_title(pass_)
        (_shares if gpu else _bars)(axes, panel)
        axes.axvline(1, color="#cc3311", linewidth=1)
        axes.set_yticks(range(len(panel)), [label(row) for row in panel], fontsize=8)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        if column == 0:
            figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    env = results["environment"]
    figure.suptitle(env["gpu"] if gpu else f"{env['cpu']}, {env['threads']} threads")
    figure.savefig(path, dpi=100 if gpu else 150)


def roofline(axes: Any, rows: Sequence[Row]) -> None:
    """Our share of the copy's bandwidth by the size of x; a row that is lost is red."""
    for lost, color, text in ((False, "#4477aa", "ours"), (True, "#ee6677", "ours, where another is faster")):
        chosen = [row for row in rows if loses(row) == lost]
        if chosen:
            axes.scatter(list(map(megabytes, chosen)), list(map(share, chosen)), s=14, color=color, label=text)
    axes.axhline(1, color="#cc3311", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="MB of x", ylabel="part of the copy's bandwidth")


def _bars(axes: Any, panel: Sequence[Row]) -> None:
    positions = range(len(panel))
    for name, text, color, offset in (
        ("torch/ours", "PyTorch, allocating", "#4477aa", -0.2),
        ("torch_out/ours_out", "PyTorch, out=", "#99bbdd", 0.2),
    ):
        heights = [row["ratios"].get(name, {"median": math.nan})["median"] for row in panel]
        axes.barh([p + offset for p in positions], heights, 0.4, color=color, label=text)
    copies = [row["ratios"]["ours_out/copy"]["median"] for row in panel]
    axes.plot([1 / c for c in copies], positions, "k|", markersize=9, label="a copy of the tensor")
    axes.set_xlabel("time / our time")


def _shares(axes: Any, panel: Sequence[Row]) -> None:
    positions = range(len(panel))
    shares = [share(row) for row in panel]
    axes.barh(positions, shares, 0.7, color=["#ee6677" if loses(row) else "#4477aa" for row in panel], label="ours")
    for name, text, marker in (
        ("native", "PyTorch", "k|"),
        ("cudnn", "cuDNN", "k."),
        ("compile", "torch.compile", "kx"),
    ):
        times = [row["ratios"].get(f"{name}/ours_out", {"median": math.nan})["median"] for row in panel]
        axes.plot([s / t for s, t in zip(shares, times, strict=True)], positions, marker, markersize=6, label=text)
    axes.set_xlabel("part of the bandwidth of the device's copy")
