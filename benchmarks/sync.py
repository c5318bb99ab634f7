"""Synchronized batch norm on 1, 2 and 4 processes of this machine: python benchmarks/sync.py [--repeat N] …

A batch is cut into equal parts, one for each process, which has its share of the cores. Results are checked against one
process with the whole batch first; what is wrong is not timed. Each time is that of the slowest process, from a barrier
on; "alone" is the same layer without a group. Prints a Markdown table; --json FILE keeps all. Needs mpi4py and mpiexec;
with more processes than cores the figures say what waiting for each other costs, not what a network does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import fusednorm as fn
import numpy as np
from fusednorm import distributed
from fusednorm.bench import environment, ratio, spread
from fusednorm.cli.extras import positive

SHAPES = ((64, 32), (256, 512), (32, 64, 14, 14), (32, 64, 56, 56), (32, 256, 56, 56))
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


class Sized:
    """A group that knows how large its last message was."""

    def __init__(self, comm: Any) -> None:
        self._group = distributed.group_of(comm)
        self.rank, self.size, self.numbers = self._group.rank, self._group.size, 0

    def allgather(self, numbers: Any) -> Any:
        self.numbers = numbers.size
        return self._group.allgather(numbers)


def is_right(layer: fn.BatchNorm, x: Any, dy: Any, mine: slice) -> bool:
    """To 1e-5 of the largest number, twice: the first call is a special one."""
    whole = fn.BatchNorm(layer.num_features)
    for _ in range(2):
        pairs = (layer(x[mine]), whole(x)[mine]), (layer.backward(dy[mine]), whole.backward(dy)[mine])
        if not all(np.abs(got - want).max() < 1e-5 * np.abs(want).max() for got, want in pairs):
            return False
    return True


def measured(comm: Any, shape: tuple[int, ...], repeat: int) -> dict[str, Any]:
    """Milliseconds of each contender, in turn."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    share = shape[0] // comm.size
    mine = slice(share * comm.rank, share * (comm.rank + 1))
    group = Sized(comm)
    layer, alone = fn.BatchNorm(shape[1], process_group=group), fn.BatchNorm(shape[1])
    if not all(comm.allgather(is_right(layer, x, dy, mine))):
        return {"wrong": True}
    x, dy = x[mine].copy(), dy[mine].copy()
    message = np.zeros(group.numbers)
    calls: dict[str, Callable[[], Any]] = {
        "forward alone": lambda: alone(x),
        "backward alone": lambda: alone.backward(dy),
        "forward": lambda: layer(x),
        "backward": lambda: layer.backward(dy),
        "collective": lambda: group.allgather(message),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeat + 2):
        for name, call in calls.items():
            comm.Barrier()
            start = perf_counter()
            call()
            took = perf_counter() - start
            if round_ >= 2:
                seconds[name].append(took)
    ms = {name: [1e3 * max(one) for one in zip(*comm.allgather(took), strict=True)] for name, took in seconds.items()}
    return {
        "shape": shape, "message_bytes": message.nbytes, "ms": {name: spread(took) for name, took in ms.items()},
        "ratio": {step: ratio(ms[step], ms[f"{step} alone"]) for step in ("forward", "backward")},
    }  # fmt: skip


def one_rank(repeat: int, written: Path) -> int:
    from mpi4py import MPI

    rows = [measured(MPI.COMM_WORLD, shape, repeat) for shape in SHAPES]
    if MPI.COMM_WORLD.rank == 0:
        found = {"rows": rows, "threads": fn.get_num_threads(), "mpi": MPI.Get_library_version().split("\n")[0].strip()}
        written.write_text(json.dumps(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=positive, default=50)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        return one_rank(options.repeat, options.as_rank)
    if MPIEXEC is None:
        print("no mpiexec found: pip install mpi4py mpich", file=sys.stderr)
        return 1
    where: dict[str, Any] = environment()
    rows: list[dict[str, Any]] = []
    print(
        "| ranks × threads | whole x | message bytes | collective ms | forward ms | of alone | backward ms | of alone |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for ranks in options.ranks:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "rows.json"
            command = [MPIEXEC, "-n", str(ranks), sys.executable, __file__, f"--as-rank={written}"]
            command += [f"--repeat={options.repeat}"]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            found = json.loads(written.read_text())
        where["versions"]["mpi"] = found["mpi"]
        for row in found["rows"]:
            if "wrong" in row:
                print(f"a result on {ranks} ranks is wrong, so not timed", file=sys.stderr)
                return 1
            rows.append({"ranks": ranks, "threads": found["threads"]} | row)
            cells = [f"{row['ms']['collective']['median']:.3g}"]
            for step in ("forward", "backward"):
                of = row["ratio"][step]
                half = (of["p90"] - of["p10"]) / 2
                cells += [f"{row['ms'][step]['median']:.3g}", f"{of['median']:.2f} ±{half:.2f}"]
            size = "×".join(map(str, row["shape"]))
            print(
                f"| {ranks} × {found['threads']} | {size} | {row['message_bytes']:,} | {' | '.join(cells)} |",
                flush=True,
            )
    print(f"\nfloat32; {where['cpu']}, {where['cores']} cores, {where['isa']}; {where['versions']}")
    if options.json:
        options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
