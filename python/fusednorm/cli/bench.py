"""``fusednorm bench``: times beside PyTorch and a copy of the same tensor."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusednorm import _C, bench
from fusednorm.bench import report
from fusednorm.cli.extras import (
    Missing,
    add_device,
    positive,
    progress,
    require,
    require_device,
    require_writable,
    writing,
)
from fusednorm.testing.cases import DTYPES, NORMS, Case

if TYPE_CHECKING:
    from rich.table import Table


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="times beside PyTorch and a copy of the same tensor, results checked first",
        description="Checks every case against float64, then times it: ours and PyTorch (if installed) in turn, both "
        "writing into a ready output (out=) and allocating it, and a copy of the tensor that bypasses the caches, "
        "which nothing can beat that reads and writes it once. Rows where PyTorch is faster are red. Times are medians "
        "over rounds. The full list takes some minutes, and wants an idle machine. With --device cuda the others are "
        "PyTorch's own kernels, cuDNN, torch.compile and the formula in CuPy.",
    )
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="the small cases only, and five rounds")
    parser.add_argument("--norm", choices=NORMS, help="only this norm; with --shape: of this norm")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--layout", choices=("first", "last", "all"), default="all", help="where the channels lie")
    parser.add_argument("--pass", dest="passes", choices=(*bench.PASSES, "all"), default="all", help="only this pass")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="N,C,...",
        help="this shape instead of the list, such as 8,64,56,56 or 8x64x56x56, in the order N,C,H,W whatever the "
        "layout; may be given again",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: [] if text == "none" else text.split(","),
        metavar="NAMES",
        help="time only these beside ours and the copy: none, or of "
        f"{','.join(bench.Cpu.peers)} (CPU), {','.join(bench.Gpu.peers)} (GPU)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU: threads for ours and for PyTorch")
    parser.add_argument("--isa", metavar="NAME", help="CPU: the instruction set, of those that `fusednorm info` names")
    parser.add_argument("--repeat", type=positive, metavar="N", help="rounds; default: 7, more for short cases")
    parser.add_argument("--reference", action="store_true", help="CPU: time the float64 reference on large tensors")
    parser.add_argument("--compile", action="store_true", help="GPU: torch.compile for all cases, not only for some")
    parser.add_argument("--seconds", type=positive, metavar="N", help="begin no case after so long, and say so")
    parser.add_argument(
        "--json", metavar="FILE", help="write environment and rows there, folders made if missing; -: print them"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw it there: .png, .svg or .pdf")
    parser.add_argument("--from", dest="results", metavar="FILE", help="show the results in FILE instead of measuring")
    parser.add_argument("--compare", metavar="FILE", help="show the ratios to the copy in FILE beside each row")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.set_defaults(run=run, error=parser.error)


def _shape(text: str) -> tuple[int, ...]:
    sizes = re.split("[,x×]", text)
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"needs two sizes or more, such as 8,64,56,56, not {text}")
    return tuple(map(int, sizes))


def run(args: argparse.Namespace) -> int:
    if args.device != "cpu" and (args.threads or args.reference or args.isa):
        args.error("--threads, --reference and --isa are for the CPU")
    if args.isa and args.isa not in _C.build_info()["isa_runnable"]:
        runnable = ", ".join(_C.build_info()["isa_runnable"])
        args.error(f"--isa must be one of {runnable} on this machine, not {args.isa}")
    if args.device == "cpu" and args.compile:
        args.error("--compile is for --device cuda")
    place = bench.Cpu if args.device == "cpu" else bench.Gpu
    unknown = set(args.peers or ()) - set(place.peers)
    if unknown:
        args.error(f"--peers of {args.device} are {', '.join(place.peers)}, not {', '.join(sorted(unknown))}")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        args.error(f"--plot must end in .png, .svg or .pdf, not {args.plot}")
    printed = args.json == "-"
    if not args.results:
        require_device("bench", args.device)
    if not (args.markdown or printed):
        require("bench", "bench", rich="rich")
    if args.plot:
        require("bench --plot", "bench", matplotlib="matplotlib")
    if "torch" in (args.peers or ()) and not args.results and not importlib.util.find_spec("torch"):
        raise Missing(f"fusednorm bench: {report.WITHOUT_TORCH}")
    file = Path(args.json) if args.json and not printed else None
    figure = Path(args.plot) if args.plot else None
    for path in filter(None, (file, figure)):
        require_writable("bench", path)
    earlier = _read(args.compare) if args.compare else None
    if args.results:
        results = _read(args.results)
    else:
        results = _measure(args)
        if not any(results[key] for key in ("rows", "left_out", "failed", "interrupted")):
            print("no benchmark case fits these options", file=sys.stderr)
            return 2
    shown = results if earlier is None else bench.beside(results, earlier)
    if args.markdown:
        print(bench.table(shown), end="")
    elif not printed:
        _show(shown)
    text = json.dumps(results, indent=1)
    if printed:
        print(text)
    if file:
        with writing("bench", file):
            file.write_text(text + "\n")
    if figure:
        with writing("bench", figure):
            bench.plot(results, figure)
    if results.get("interrupted"):
        return 130
    return 1 if any(row["wrong"] for row in results["rows"]) or results.get("failed") else 0


def _read(path: str) -> dict[str, Any]:
    """What --json wrote."""
    try:
        results: dict[str, Any] = json.loads(Path(path).read_text())
        if not {"environment", "rows"} <= set(results):
            raise ValueError("it was not written by fusednorm bench --json")
    except (OSError, ValueError, TypeError) as error:
        raise Missing(f"fusednorm bench: cannot read {path}: {error}") from None
    return results


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    cases = bench.select(
        norm=args.norm, dtype=args.dtype, layout=args.layout, shapes=args.shape, quick=args.quick, device=args.device
    )
    machine = (
        bench.Cpu(args.threads, with_reference=True if args.reference else None)
        if args.device == "cpu"
        else bench.Gpu(args.device, compiles=args.compile)
    )
    passes = bench.PASSES if args.passes == "all" else (args.passes,)
    warning = report.busy(bench.environment())
    if warning:
        print(warning, file=sys.stderr)
    start = time.perf_counter()

    def show(case: Case, pass_: str) -> None:
        done = cases.index(case)
        left = ""
        if done > 2:  # roughly: cases differ in size
            seconds = (time.perf_counter() - start) / done * (len(cases) - done)
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        progress(f"{done + 1}/{len(cases)}{left}: {case.name} {pass_}")

    chosen = _C.build_info()["isa"]
    try:
        if args.isa:
            _C.select_isa(args.isa)
        return bench.run(
            cases,
            passes,
            machine=machine,
            peers=args.peers,
            repeat=args.repeat or (5 if args.quick else None),
            seconds=args.seconds,
            report=show,
        )
    finally:
        _C.select_isa(chosen)
        progress()


def _show(results: dict[str, Any]) -> None:
    """One line a row: a terminal too narrow for all columns shows fewer, empty ones being the first to go."""
    from rich.console import Console

    console = Console(highlight=False)
    names = list(report.columns(results))
    columns = zip(names, zip(*(report.cells(results, row) for row in results["rows"]), strict=True), strict=False)
    dispensable = [*(name for name, cells in columns if set(cells) == {"–"}), *report.DISPENSABLE]
    table, width = _table(results, names)
    while console.is_terminal and width > console.width and dispensable:
        name = dispensable.pop(0)
        if name in names:
            names.remove(name)
            table, width = _table(results, names)
    console.width = max(console.width, width)
    console.print(table)
    hidden = [name for name in report.columns(results) if name not in names]
    if hidden:
        console.print(f"a wider terminal also shows {', '.join(hidden)}", style="dim")
    for line in report.summary(results):
        console.print(line)
    console.print()
    for name, text in report.where(results):
        console.print(f"{name:<16} {text}", style="dim")


def _table(results: dict[str, Any], names: Sequence[str]) -> tuple[Table, int]:
    """Some columns as a table, and the width that it needs. Only what is wrong with a row may take several lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = results["rows"]
    labels = max((len(report.label(row)) for row in rows), default=0)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=report.caption(results))
    for i, name in enumerate(names):
        table.add_column(
            name.replace(" ", "\n", 1),
            justify="right" if i > 1 else "left",
            no_wrap=i > 0,
            width=max(labels, 40 if any(row["wrong"] for row in rows) else 0) if i == 0 else None,
        )
    for row in rows:
        cells = dict(zip(report.columns(results), report.cells(results, row), strict=True))
        table.add_row(*map(cells.__getitem__, names), style="red" if report.loses(row) else None)
    return table, Console(width=1000).measure(table).maximum
