"""The tables of the site that are measurements: a page names one, ``<!-- table: NAME ARGUMENTS -->``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import geometric_mean

import figures
import numerics
from fusednorm.bench import report

RESULTS = figures.ROOT / "benchmarks/results"
LARGE = 50  # MB of x


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Numbers to the right, after so many columns of text."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def errors(of: str) -> str:
    """The largest error of the variance or of y: mean/σ downwards, ways to the right."""
    found = figures.errors()["rows"]
    names = list(dict.fromkeys(row["way"] for row in found))
    by = {(row["offset"], row["way"]): f"{row[of]:.0e}" for row in found}
    body = ([f"{offset:g}", *(by[offset, way] for way in names)] for offset in numerics.OFFSETS)
    return _table(["mean/σ", *names], body)


def errors_where() -> str:
    """Where the errors were measured, in a sentence."""
    where = figures.errors()["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    run = f"[{figures.NUMERICS}](../benchmarks/results/{figures.NUMERICS})"
    return f"Measured on {where['date']} on an {where['cpu']}, {where['threads']} threads, with {versions}: {run}.\n"


def machine() -> str:
    """Of the runs of fusednorm bench: those with all the same in a row."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for name, run in figures.runs().items():
        where = dict(report.where(run))
        machine = tuple(where[key] for key in ("CPU", "caches", "threads", "instruction set", "versions"))
        runs.setdefault(machine, []).append(f"[{name}](../benchmarks/results/{name}), {where['date']}")
    rows = [["<br>".join(links), *machine] for machine, links in runs.items()]
    return _table(["runs", "CPU", "caches", "threads", "instruction set", "versions"], rows, texts=6)


def norms() -> str:
    """For every norm and pass: how often PyTorch takes longer, on large tensors, and what is lost."""
    rows = []
    for norm in figures.COLORS:
        for pass_ in figures.PASSES:
            of = [row for row in figures.rows() if row["norm"] == norm and row["pass"] == pass_]
            large = [row for row in of if report.megabytes(row) >= LARGE]
            if not of:
                continue
            peers = [row["ratios"]["torch/ours"]["median"] for row in large if "torch/ours" in row["ratios"]]
            shares = [report.share(row) for row in large]
            rows.append(
                [norm, pass_, str(len(large)), _from_to(peers, ".1f"), _from_to([100 * s for s in shares], ".0f"),
                 f"{sum(map(report.loses, of))} of {len(of)}"]
            )  # fmt: skip
    return _table(["norm", "pass", "rows", "PyTorch/ours", "of the copy's bandwidth, %", "lost, of all sizes"], rows, 2)


def _from_to(numbers: Sequence[float], digits: str) -> str:
    if not numbers:
        return "–"
    return f"{min(numbers):{digits}} to {max(numbers):{digits}}, mean {geometric_mean(numbers):{digits}}"


def lost() -> str:
    """Every row in which PyTorch is faster, of every run."""
    rows = [row for row in figures.rows() if report.loses(row)]
    body = []
    for row in sorted(rows, key=lambda row: min(_peers(row).values())):
        ratios = [_peers(row).get(name) for name in ("torch_out/ours_out", "torch/ours")]
        body.append([report.label(row), row["pass"], f"{report.megabytes(row):.2g}",
                     *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                     f"{row['ms']['ours']['median'] * 1e3:.0f}"])  # fmt: skip
    return _table(["case", "pass", "MB of x", "PyTorch/ours, out=", "PyTorch/ours", "ours, µs"], body, 2)


def _peers(row: report.Row) -> dict[str, float]:
    return {name: spread["median"] for name, spread in row["ratios"].items() if name.startswith("torch")}


def bench(name: str) -> str:
    """All rows of one run, folded away."""
    results = figures.runs()[name]
    table = report.table(results).replace("\n", "\n    ").rstrip()
    return f'??? note "{name}: {len(results["rows"])} rows"\n\n    {table}\n'


def all_runs() -> str:
    return "\n".join(map(bench, figures.runs()))


def versus(name: str, theirs: str) -> str:
    """A run of the scripts in benchmarks/: by shape, times of theirs and ours, and their ratio."""
    rows = []
    for row in json.loads((RESULTS / name).read_text())["rows"]:
        what = " ".join(str(row[key]) for key in ("norm", "pass") if key in row)
        what += " channels last" * (row.get("layout") == "last")
        shape = "×".join(map(str, row["shape"])) if "shape" in row else ""
        times = [_three_digits(row["ms"][who]["median"]) for who in (theirs, "ours")]
        rows.append([f"{shape} {what}".strip(), *times, f"{row['ratio']['median']:.2f}"])
    return _table(["", f"{theirs}, ms", "ours, ms", "ratio"], rows)


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def resnet() -> str:
    """Steps of whole models, by run: how many times as fast as with torch.nn's norms. What was run several times has
    several rows, told apart by their date."""
    body = []
    for run in json.loads((RESULTS / "resnet-epyc-zen4-2cores.json").read_text()):
        name = {"resnet50": "ResNet-50", "convnext": "ConvNeXt-T"}[run["model"]]
        kept = ", memory kept" if run["environment"]["malloc"] else ""
        ratios = [run["ratios"].get(f"torch.nn/{form}") for form in ("converted", "BatchNormAct")]
        cells = ["–" if r is None else f"{r['median']:.2f} ±{(r['p90'] - r['p10']) / 2:.2f}" for r in ratios]
        parts = [run["profile_ms"][form] for form in ("torch.nn", "converted")]
        norms = " → ".join(f"{part['norms'] / sum(part.values()):.0%}" for part in parts)
        step = f"{run['ms']['torch.nn']['median']:.0f}"
        model = f"{name}, {run['dtype']}, channels {run['layout']}{kept}"
        body.append([model, run["environment"]["date"], step, *cells, norms])
    return _table(["model", "run", "torch.nn, ms", "converted", "`BatchNormAct`", "norms' part"], sorted(body), 2)
