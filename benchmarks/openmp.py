"""One OpenMP runtime or two in a process with PyTorch: python benchmarks/openmp.py [--first torch] …

Linux. A build that asks for libgomp.so.1 shares that of PyTorch's wheels; one that has a copy under another name brings
a second pool of threads, and each waits busily for its next call. Prints a Markdown table of fusednorm's batch norm and
calls of PyTorch's, each alone and in turn with the other, and which runtimes are loaded. One build and one order of
import at a time, so run it for each; --json FILE keeps all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

CASES = (((8, 64, 28, 28), 256), ((32, 64, 56, 56), 1024))  # x, and the sides of the matrices
SECONDS = 0.1  # of each call in a round


def runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process, with the two folders they are in."""
    maps = Path("/proc/self/maps").read_text()
    return sorted(set(re.findall(r"[^/\s]+/[^/\s]+/lib(?:gomp|i?omp)[^/\s]*\.so\S*", maps)))


def in_turn(calls: Sequence[Callable[[], Any]], count: int) -> list[float]:
    """Median milliseconds of each."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(count):
        for call, times in zip(calls, took, strict=True):
            start = perf_counter()
            call()
            times.append(1e3 * (perf_counter() - start))
    return [median(times) for times in took]


def calls_of(fn: Any, torch: Any, shape: tuple[int, ...], side: int) -> dict[str, Callable[[], Any]]:
    """What is timed; the two norms compute the same."""
    x, a, b = torch.randn(shape), torch.randn(side, side), torch.randn(side, side)
    array, out = x.numpy(), torch.empty_like(x).numpy()
    module = torch.nn.BatchNorm2d(shape[1]).requires_grad_(False)
    mean, var, weight, bias = (torch.clone(t).numpy() for t in (*module.buffers(), *module.parameters()) if t.ndim)
    return {
        "fusednorm": lambda: fn.batch_norm(array, mean, var, weight, bias, training=True, out=out),
        "BatchNorm2d": lambda: module(x),
        "matmul": lambda: torch.mm(a, b),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", choices=("torch", "fusednorm"), default="fusednorm", help="what is imported first")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    importlib.import_module(options.first)
    import fusednorm as fn
    import torch
    from fusednorm.bench import environment, ratio, spread

    where, rows = environment(), []
    print("| x | call | alone ms | in turn with | ms | of alone |\n|---|---|---:|---|---:|---:|")
    for shape, side in CASES:
        calls = calls_of(fn, torch, shape, side)
        y, expected = (torch.as_tensor(calls[name]()) for name in ("fusednorm", "BatchNorm2d"))
        if not torch.allclose(y, expected, atol=1e-4):
            print("a result is wrong, so not timed", file=sys.stderr)
            return 1
        count = round(1e3 * SECONDS / in_turn([calls["BatchNorm2d"]], 10)[0]) + 1
        alone: dict[str, list[float]] = {name: [] for name in calls}
        turns: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for name, call in calls.items():
                alone[name] += in_turn([call], count)
            for name in ("BatchNorm2d", "matmul"):
                ours, theirs = in_turn([calls["fusednorm"], calls[name]], count)
                turns.setdefault(("fusednorm", name), []).append(ours)
                turns.setdefault((name, "fusednorm"), []).append(theirs)
        for (name, other), ms in turns.items():
            row = {"shape": shape, "call": name, "with": other, "alone": spread(alone[name]), "in_turn": spread(ms)}
            row["ratio"] = of = ratio(ms, alone[name])
            rows.append(row)
            print(
                f"| {'×'.join(map(str, shape))} | {name} | {row['alone']['median']:.3g} | {other} "
                f"| {row['in_turn']['median']:.3g} | {of['median']:.2f} ±{(of['p90'] - of['p10']) / 2:.2f} |",
                flush=True,
            )

    found: dict[str, Any] = {"first": options.first, "runtimes": runtimes()}
    found["threads"] = len(list(Path("/proc/self/task").iterdir()))
    torch.set_num_threads(1)
    found["torch_limits"] = fn.get_num_threads() == 1
    print(f"\n{options.first} imported first; OpenMP: {', '.join(found['runtimes'])}; {found['threads']} threads;")
    print(f"torch.set_num_threads limits fusednorm: {found['torch_limits']}")
    print(f"float32; {where['cpu']}, {where['cores']} cores, load {where['load_average'][0]}, {where['isa']}; "
          f"{where['versions']}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"environment": where, **found, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
