"""Batch norm over several processes: `mpiexec -n 2 python examples/sync.py`.

Each process has its part of a batch, the later ones more of it. What they compute together is compared with one process
that has the whole batch; and what they sent each other for it is counted.
"""

from __future__ import annotations

import sys
from typing import Any

import fusednorm as fn
import numpy as np
from fusednorm import distributed
from fusednorm.testing.cases import Array

SHAPE = 12, 64, 28, 28


class Counted:
    """A group of processes, and the bytes that this one sent: any object with these three names is a group."""

    def __init__(self, comm: Any) -> None:
        self._group = distributed.group_of(comm)
        self.rank, self.size = self._group.rank, self._group.size
        self.sent: list[int] = []

    def allgather(self, numbers: Array) -> Any:
        self.sent.append(numbers.nbytes)
        return self._group.allgather(numbers)


def train(layer: fn.BatchNorm, x: Array, dy: Array) -> dict[str, Array]:
    """One step, and what it changes."""
    y = layer(x)
    dx = layer.backward(dy)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.weight_grad is not None
    assert layer.bias_grad is not None
    return {"y": y, "dx": dx, "weight_grad": layer.weight_grad, "bias_grad": layer.bias_grad,
            "running_mean": layer.running_mean, "running_var": layer.running_var}  # fmt: skip


def main() -> int:
    try:
        from mpi4py import MPI
    except ImportError:
        print("this example needs MPI: pip install mpi4py mpich", file=sys.stderr)
        return 1
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(0)
    x, dy = (3 + rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    ends = np.cumsum(np.arange(1, comm.size + 1)) * len(x) // np.arange(1, comm.size + 1).sum()
    mine = np.split(np.arange(len(x)), ends[:-1])[comm.rank]

    group = Counted(comm)
    layer = fn.BatchNorm(SHAPE[1], activation="relu", process_group=group)
    found = train(layer, x[mine], dy[mine])
    agreed, forward, backward = group.sent

    each = comm.gather(found)
    if each is None:
        return 0
    whole = train(fn.BatchNorm(SHAPE[1], activation="relu"), x, dy)
    together = {name: np.concatenate([one[name] for one in each]) for name in ("y", "dx")}
    together |= {name: np.sum([one[name] for one in each], 0) for name in ("weight_grad", "bias_grad")}
    together |= {name: found[name] for name in ("running_mean", "running_var")}

    shares = ", ".join(str(len(one["y"])) for one in each)
    print(f"{comm.size} processes with {shares} of {len(x)} samples, each {'×'.join(map(str, SHAPE[1:]))} in float32\n")
    print("largest difference from one process with all samples, of the largest number:")
    right = True
    for name, want in whole.items():
        off = float(np.abs(together[name] - want).max() / np.abs(want).max())
        good = off < 4e-6  # each within 2e-6 of the truth
        right = right and good
        print(f"  {name:13}{off:8.1e}{'' if good else '  WRONG'}")
    same = all(np.array_equal(one["running_var"], found["running_var"]) for one in each)
    print(f"\nrunning statistics {'have the same bits' if same else 'DIFFER'} on all ranks")
    print(f"sent by each rank: {forward} bytes forward, {backward} backward, in one collective each, and {agreed} once")
    print(f"for that rank 0's x, of {found['y'].nbytes:,} bytes, stays where it is")
    return 0 if right and same else 1


if __name__ == "__main__":
    sys.exit(main())
