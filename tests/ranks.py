"""What each rank of tests/test_distributed.py does: `python tests/ranks.py mpi FOLDER`, started by mpiexec, or
`… gloo FOLDER RANK SIZE`, or `… failing FOLDER RANK SIZE`. What it found is pickled into the folder. Or as threads:
:func:`threads`.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import arrays, distributed
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case, Inputs

Array = np.ndarray[Any, Any]

SMALL = [
    # Gradients of parameters are rounded on each rank: not to less than is computed with.
    replace(case, param_dtype="float64") if case.dtype == "float64" else case
    for case in CASES
    if case.norm == "batch" and case.training and case.ghost_batch_size is None
    and "sanitize" in case.tags and case.param_dtype in ("float32", "float64")
]  # fmt: skip
GHOST = 3  # samples of a ghost batch on each rank


def ghost_cases(size: int) -> list[Case]:
    """Four ghost batches on each rank but the last, which has fewer, so that the last whole one is shorter, or none."""
    kinds: list[tuple[int, tuple[int, ...], int, dict[str, Any]]] = [
        (12, (5, 7), 1, {"activation": "relu", "residual": True}),
        (11, (4, 5), -1, {"mask": True}),
        (9, (6,), 1, {"dtype": "float64", "param_dtype": "float64"}),
        (10, (6, 3), 1, {"dtype": "float16"}),
        (12, (3, 4), -1, {"dtype": "bfloat16", "correction": 0}),
    ]
    return [
        Case(f"ghosts-{i}", (12 * (size - 1) + last, *rest), axis=axis, ghost_batch_size=GHOST * size, **options)
        for i, (last, rest, axis, options) in enumerate(kinds)
    ]


def rows(case: Case, size: int) -> list[Array]:
    """Which samples of the whole each rank has: some more than others, some none. The k-th ghost batches of all ranks
    follow each other."""
    samples = case.shape[cases._samples(case)]
    if case.ghost_batch_size is not None:
        whole = np.arange(samples)
        owner = whole % case.ghost_batch_size // GHOST
        full = samples - samples % case.ghost_batch_size
        owner[full:] = np.minimum(np.arange(samples - full) // GHOST, size - 1)
        return [whole[owner == rank] for rank in range(size)]
    weights = np.array([1, 2] if size == 2 else [1, 0, 3, 2][:size])
    ends = np.cumsum(weights) * samples // weights.sum()
    return np.split(np.arange(samples), ends[:-1])


def part(case: Case, inputs: Inputs, mine: Array) -> dict[str, Any]:
    """A rank's arrays."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    for name in ("x", "dy", "residual"):
        if found[name] is not None:
            found[name] = np.take(found[name], mine, axis=cases._samples(case))
    if inputs.mask is not None:
        found["mask"] = inputs.mask[mine]  # whose first axis is that of the samples
    return found


class Counted:
    """A group, and the sizes of the messages that it gathered."""

    def __init__(self, given: Any) -> None:
        self._group = distributed.group_of(given)
        self.rank, self.size = self._group.rank, self._group.size
        self.sizes: list[int] = []

    def allgather(self, numbers: Array) -> Any:
        self.sizes.append(numbers.size)
        return self._group.allgather(numbers)


def layer_of(case: Case, given: dict[str, Any], group: Any) -> fn.BatchNorm:
    ghost = None if case.ghost_batch_size is None else GHOST
    layer = fn.BatchNorm(
        case.channels, case.eps, case.momentum, case.affine, case.running, axis=case.axis, activation=case.activation,
        ghost_batch_size=ghost, correction=case.correction, dtype=case.param_dtype, process_group=group,
    )  # fmt: skip
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given[name] is not None:
            setattr(layer, name, given[name])
    return layer


def computed(case: Case, group: Any, device: str = "cpu") -> dict[str, Any]:
    """A call and its backward, by the layer; NumPy's arrays."""
    counted = Counted(group)
    given = part(case, cases.make(case), rows(case, counted.size)[counted.rank])
    layer = layer_of(case, given, counted).to(device)
    given = {name: None if a is None else arrays.moved(a, device) for name, a in given.items()}
    layer(given["x"], given["residual"], given["mask"])
    if case.running:
        layer.running_mean, layer.running_var = given["running_mean"], given["running_var"]
    counted.sizes.clear()  # of the first call, which has one more
    y = layer(given["x"], given["residual"], given["mask"])
    forward = len(counted.sizes)
    call = layer._saved.call[1]
    dx = layer.backward(given["dy"])
    if given["residual"] is not None:
        dx, dresidual = dx
    collectives = forward, len(counted.sizes) - forward
    layer.eval()(given["x"], given["residual"], given["mask"])
    found = {
        "y": y, "mean": call.mean, "rstd": call.rstd, "dx": dx, "dweight": layer.weight_grad, "dbias": layer.bias_grad,
        "dresidual": dresidual if given["residual"] is not None else None, "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }  # fmt: skip
    return {name: None if a is None else arrays.moved(a, "cpu") for name, a in found.items()} | {
        "collectives": (*collectives, len(counted.sizes) - sum(collectives)),
        "batches": layer.num_batches_tracked,
    }


def snapshot(layer: fn.BatchNorm) -> dict[str, Any]:
    state: dict[str, Any] = dict(layer.state_dict())
    return {
        name: None if a is None else np.asarray(a).tobytes()
        for name, a in (state | {"weight_grad": layer.weight_grad, "bias_grad": layer.bias_grad}).items()
    }


def attempt(layer: fn.BatchNorm, call: Callable[[], Any]) -> tuple[str, str, bool]:
    """The error's type and words, and whether the layer is as before."""
    before = snapshot(layer)
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), snapshot(layer) == before
    return "", "", snapshot(layer) == before


def refusals(group: Any) -> dict[str, tuple[str, str, bool]]:
    """Calls that must fail, on every rank. `odd` is the rank that differs."""
    rank, size = (distributed.group_of(group).rank, distributed.group_of(group).size)
    odd = rank == size - 1
    x = np.random.default_rng(rank).standard_normal((4, 6, 5)).astype(np.float32)
    found = {}

    def layer(channels: int = 6, **options: Any) -> fn.BatchNorm:
        return fn.BatchNorm(channels, process_group=group, **options)

    wide = layer(64 - odd)  # whose messages would not be as long as each other
    found["channels"] = attempt(wide, lambda: wide(np.ones((4, 64 - odd))))
    one = layer()
    found["channels of x"] = attempt(one, lambda: one(x[:, : 6 - odd]))
    found["dtype"] = attempt(one, lambda: one(x.astype(np.float64 if odd else np.float32)))
    found["mask"] = attempt(one, lambda: one(x, mask=np.ones((4, 5), float if odd else bool)))
    one(x)
    found["dtype, later"] = attempt(one, lambda: one(x.astype(np.float16 if odd else np.float32)))
    found["residual, later"] = attempt(one, lambda: one(x, x[:, :5] if odd else x))
    found["no array, later"] = attempt(one, lambda: one([1.0] if odd else x))
    one.eps = 1e-3 if odd else 1e-5
    found["eps, later"] = attempt(one, lambda: one(x))
    one.eps = 1e-5
    one(x)
    found["dy"] = attempt(one, lambda: one.backward(x[:3] if odd else x))
    found["backward, again"] = attempt(one, lambda: one.backward(x))
    one(x)
    found["pass"] = attempt(one, lambda: one(x) if odd else one.backward(x))
    other = layer(momentum=None)
    other.num_batches_tracked = int(odd)
    found["batches"] = attempt(other, lambda: other(x))
    flat = layer()
    found["lone"] = attempt(flat, lambda: flat(x[:odd, :, 0]))
    found["at last"] = attempt(one, lambda: one(x))
    return found


def alike(group: Any) -> Array:
    """dx on the first and the last rank, which have the same rows, float64, the others being far away."""
    counted = distributed.group_of(group)
    outer = counted.rank in (0, counted.size - 1)
    x, dy = np.random.default_rng(int(outer)).standard_normal((2, 40, 16))
    layer = fn.BatchNorm(16, process_group=group)
    layer(x if outer else 3 * x + 7)
    return np.asarray(layer.backward(dy if outer else 5 * dy + 1))


def growing(group: Any) -> list[tuple[list[int], int]]:
    """Messages and batches counted when ranks come to have more ghost batches."""
    counted = Counted(group)
    layer, found = fn.BatchNorm(32, ghost_batch_size=2, process_group=counted), []
    for samples in (4, 4, 6 + 2 * counted.rank, 6 + 2 * counted.rank, 2):
        counted.sizes.clear()
        layer(np.random.default_rng(0).standard_normal((samples, 32)))
        found.append((counted.sizes.copy(), layer.num_batches_tracked))
    return found


def chosen(engine: str, size: int) -> list[Case]:
    """gloo's collectives take a millisecond and more: not all cases there. Their dtypes come by fours."""
    return [*(SMALL[::5] if engine == "gloo" else SMALL), *ghost_cases(size)]


def everything(group: Any, engine: str = "threads") -> dict[str, Any]:
    size = distributed.group_of(group).size
    found: dict[str, Any] = {case.name: computed(case, group) for case in chosen(engine, size)}
    return found | {"refusals": refusals(group), "alike": alike(group), "growing": growing(group)}


# As threads.


class Threads:
    """A group whose ranks are threads. `fails`: the number of a gather that fails on rank 0 before it is done."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier, fails: int | None = None) -> None:
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier, self._fails = slots, barrier, fails
        self.gathers = 0

    def allgather(self, numbers: Array) -> list[Array]:
        self.gathers += 1
        if self.rank == 0 and self.gathers == self._fails:
            self._barrier.wait()  # the others are in this one, too
            self._barrier.abort()
            raise ConnectionError("the cable is out")
        self._slots[self.rank] = numbers.copy()
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        assert len({one.size for one in found}) == 1, "messages of different sizes met"
        return found


def threads(size: int, work: Callable[[Any], Any], fails: int | None = None) -> list[Any]:
    """What `work` returns on each rank; an exception of its own is raised here."""
    slots, barrier, found = [None] * size, threading.Barrier(size, timeout=30), [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, slots, barrier, fails))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    if failures:
        raise failures[0]
    return found


# As processes.

# Beside the Python that runs this: where pip puts it.
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def started(command: list[str]) -> subprocess.Popen[str]:
    """For more ranks than cores; Open MPI asks for words where it runs as root, or has fewer cores than ranks."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def mpi(size: int, *python: str) -> list[str]:
    """A command line; skips the test where there is no MPI."""
    if find_spec("mpi4py") is None or MPIEXEC is None:
        pytest.skip("mpi4py or mpiexec is not installed: pip install mpi4py mpich")
    return [MPIEXEC, "-n", str(size), sys.executable, *python]


def by_mpi() -> dict[str, Any]:
    from mpi4py import MPI

    return everything(MPI.COMM_WORLD, "mpi")


def by_gloo(folder: str, rank: str, size: str, limit: float = 60) -> Any:
    import torch.distributed as dist

    store = f"file://{Path(folder).resolve()}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=limit)
    )
    return dist


def modules(dist: Any) -> dict[str, Any]:
    """The cases with channels second, by SyncBatchNorm in the default group."""
    import fusednorm.torch as fnt
    import torch
    from fusednorm.torch import ops

    def tensor(a: Any) -> Any:
        if a is None or a.dtype.name != "bfloat16":
            return None if a is None else torch.from_numpy(a.copy())
        return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)

    gathers = [0]
    gather = dist.all_gather

    def counted(*args: Any, **named: Any) -> Any:
        gathers[0] += 1
        return gather(*args, **named)

    dist.all_gather = counted
    found = {}
    for case in [case for case in SMALL if case.axis == 1 and case.correction == 1][::5]:
        given = {
            name: tensor(a)
            for name, a in part(case, cases.make(case), rows(case, dist.get_world_size())[dist.get_rank()]).items()
        }
        module = fnt.SyncBatchNorm(
            case.channels, case.eps, case.momentum, case.affine, case.running, activation=case.activation,
            dtype=getattr(torch, case.param_dtype),
        )  # fmt: skip
        module(given["x"], given["residual"], given["mask"])
        state = {name: given[name] for name in module.state_dict() if name != "num_batches_tracked"}
        if case.running:
            state["num_batches_tracked"] = torch.tensor(1)
        module.load_state_dict(state)
        x = given["x"].requires_grad_()
        residual = None if given["residual"] is None else given["residual"].requires_grad_()
        gathers[0] = 0
        y = module(x, residual, given["mask"])
        forward = gathers[0]
        call = y.grad_fn.call
        y.backward(given["dy"])
        collectives = forward, gathers[0] - forward
        module.eval()(x, residual, given["mask"])
        results = {
            "y": y, "dx": x.grad, "dweight": case.affine and module.weight.grad,
            "dbias": case.affine and module.bias.grad, "dresidual": residual is not None and residual.grad,
            "running_mean": module.running_mean, "running_var": module.running_var,
        }  # fmt: skip
        plain = {name: ops._array(t) if isinstance(t, torch.Tensor) else None for name, t in results.items()}
        found[case.name] = plain | {
            "mean": call.mean, "rstd": call.rstd, "collectives": (*collectives, gathers[0] - sum(collectives)),
            "batches": int(module.num_batches_tracked) if case.running else 0,
        }  # fmt: skip
    dist.all_gather = gather
    return found


def network(dist: Any) -> dict[str, Any]:
    """A converted model under DistributedDataParallel, and the same model on all rows, in float64."""
    import copy

    import fusednorm.torch as fnt
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    mine = slice(12 // dist.get_world_size() * dist.get_rank(), 12 // dist.get_world_size() * (dist.get_rank() + 1))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), fnt.BatchNormAct(8, activation="silu")).double()
    model = fnt.convert_sync_batchnorm(copy.deepcopy(plain))
    parallel = nn.parallel.DistributedDataParallel(model)
    found = {}
    for name, one, of in (("whole", plain, x), ("parallel", parallel, x[mine])):
        y = one(of)
        (y**3).mean().backward()
        found[name] = {"y": (y if of is not x else y[mine]).detach().numpy()}
    for name, one in (("whole", plain), ("parallel", model)):
        found[name] |= {n: p.grad.numpy() for n, p in one.named_parameters()}
        found[name] |= {n: b.numpy().copy() for n, b in one.named_buffers()}
    if dist.get_world_size() == 3:  # it takes seconds
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        found["compiled"], found["eager"] = (f(x[mine]).detach().numpy() for f in (compiled, copy.deepcopy(model)))
    return found


def failing(dist: Any) -> dict[str, Any]:
    """Rank 1 comes too late for a backward, and then dies. A process of its own: such groups are of no use after."""
    rank = dist.get_rank()
    x = np.random.default_rng(rank).standard_normal((4, 6, 5)).astype(np.float32)
    late = fn.BatchNorm(6, process_group=dist.new_group(timeout=timedelta(seconds=1)))
    late(x)
    late.backward(x)
    late(x)
    if rank == 1:
        time.sleep(3)
        os._exit(0)
    found = {"late": attempt(late, lambda: late.backward(x))}
    layer = fn.BatchNorm(6, process_group=dist.group.WORLD)
    found["died"] = attempt(layer, lambda: layer(x))
    return found


def main(engine: str, folder: str, *place: str) -> None:
    found: dict[str, Any] = {}
    rank = int(place[0]) if place else int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    try:
        if engine == "mpi":
            found = by_mpi()
        elif engine == "failing":
            found = failing(by_gloo(folder, *place))
        else:
            dist = by_gloo(folder, *place)
            found = everything(dist.group.WORLD, "gloo")
            found |= {"modules": modules(dist), "network": network(dist)}
    except BaseException:
        found = {"failed": traceback.format_exc()}
    (Path(folder) / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))
    if "failed" in found:
        sys.stderr.write(found["failed"])
        sys.stderr.flush()
        os._exit(1)  # an MPI that waits for its other ranks would not end
    if engine == "failing":
        os._exit(0)  # gloo aborts when it lets go of a group that lost a rank


if __name__ == "__main__":
    main(*sys.argv[1:])
