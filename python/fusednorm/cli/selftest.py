"""``fusednorm selftest``: the installed library against the float64 reference, on this machine.

It runs in places: the instruction sets of the CPU, ``v4`` and so on, or one GPU, ``cuda:0``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import fusednorm
from fusednorm import _C, arrays
from fusednorm.cli.extras import add_device, progress, require_device
from fusednorm.testing import cases
from fusednorm.testing.cases import Case, Deviation, Inputs, Outputs

# By dtype and result, then by place: the largest error as a part of its bound, and the case it came from. By
# dtype, because half types always come close to their bound, which is mostly the rounding of the result.
Worst: TypeAlias = dict[tuple[str, str], dict[str, tuple[float, str]]]


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        help="the installed library against the reference, on every instruction set of this machine or on a GPU",
        description="Runs forward and backward of every test case (but those that take long) through the installed "
        "library, once for each instruction set that this machine can run, or on a GPU, and compares all results with "
        "float64 NumPy. The table shows how close each result came to its error bound. Exit code 1 if one left it.",
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, for machines")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_device("selftest", args.device)
    chosen = [case for case in cases.CASES if "slow" not in case.tags and args.filter in case.name]
    runnable = [case for case in chosen if all(map(importlib.util.find_spec, case.requires))]
    if not runnable:
        print(f"no case has {args.filter!r} in its name", file=sys.stderr)
        return 2
    places: list[str] = _C.build_info()["isa_runnable"] if args.device == "cpu" else [args.device]
    worst: Worst = {}
    failures = []
    before = _C.build_info()["isa"]
    try:
        for case in _progress(runnable):
            for place, deviation in check(case, places):
                by_place = worst.setdefault((case.dtype, deviation.name), {})
                by_place[place] = max(by_place.get(place, (0.0, "")), (_part(deviation), case.name))
                if not deviation.ok:
                    failures.append({"case": case.name, "place": place, **vars(deviation)})
    finally:
        _C.select_isa(before)

    if args.json:
        result = {
            "build": fusednorm.build_info(),
            "cases": len(runnable),
            "skipped": len(chosen) - len(runnable),
            "worst": [
                {"dtype": dtype, "result": result, "place": place, "part": part, "case": name}
                for (dtype, result), by_place in worst.items()
                for place, (part, name) in by_place.items()
            ],
            "failures": failures,
        }
        print(json.dumps(result, indent=2))
    else:
        _show(worst, places, failures, len(runnable), len(chosen) - len(runnable))
    return 1 if failures else 0


def check(case: Case, places: Sequence[str]) -> Iterator[tuple[str, Deviation]]:
    """Every result of a case in every place. A call that raises is a failed result named ``call``."""
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    for place in places:
        try:
            deviations = cases.compare(case, inputs, expected, _results(case, inputs, place))
        except Exception as error:
            deviations = [Deviation("call", math.inf, 0.0, False, f"{type(error).__name__}: {error}")]
        for deviation in deviations:
            yield place, deviation


def _results(case: Case, inputs: Inputs, place: str) -> Outputs:
    if not place.startswith("cuda"):
        _C.select_isa(place)
        return cases.run(case, inputs, fusednorm)
    cupy = importlib.import_module("cupy")
    with arrays.on(place):
        return cases.run(case, inputs, fusednorm, to_device=cupy.array, to_host=cupy.asnumpy)


def _part(deviation: Deviation) -> float:
    """The error as a part of its bound; above 1 it fails."""
    if deviation.error == 0:
        return 0.0
    return deviation.error / deviation.bound if deviation.bound else math.inf


def _progress(chosen: Sequence[Case]) -> Iterable[Case]:
    """The cases, with a bar on standard error where that is a terminal."""
    for i, case in enumerate(chosen):
        if i % 10 == 0:
            progress(f"{'█' * (40 * i // len(chosen)):<40} {i:>4}/{len(chosen)}")
        yield case
    progress()


def _show(worst: Worst, places: Sequence[str], failures: list[dict[str, Any]], checked: int, skipped: int) -> None:
    print("largest error, as a part of its bound; up to 1 it passes")
    print(f"{'x':<10}{'result':<14}" + "".join(f"{place:>10}" for place in places))
    above = ""
    for (dtype, result), by_place in sorted(worst.items(), key=lambda item: cases.DTYPES.index(item[0][0])):
        parts = [by_place[place][0] if place in by_place else 0.0 for place in places]
        numbers = "".join(f"{part:>10.3f}" for part in parts)
        failed = "  FAILED" if max(parts) > 1 else ""
        print(f"{dtype if dtype != above else '':<10}{result:<14}{numbers}{failed}")
        above = dtype
    print()
    for failure in failures[:20]:
        detail = failure["detail"] or f"error {failure['error']:.3g}, allowed {failure['bound']:.3g}"
        print(f"FAILED {failure['place']} {failure['case']} {failure['name']}: {detail}")
    if len(failures) > 20:
        print(f"… and {len(failures) - 20} more")
    if skipped:
        print(f"{skipped} cases were skipped: they need ml_dtypes, {arrays.installs('bf16')}")
    print(f"{checked} cases on {', '.join(places)}: {f'{len(failures)} results FAILED' if failures else 'all passed'}")
