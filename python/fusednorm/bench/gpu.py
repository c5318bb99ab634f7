"""The same measurements on a GPU, through CuPy arrays.

**What is timed.** Each contender's calls are recorded into a CUDA graph, one call for each of several sets of tensors,
and CUDA events measure replays of it: time of the device, without Python. The sets take four times L2 together, at most
64 of them: a tensor of 1/32 of L2 or more comes from memory, as it would between other layers; smaller ones stay in L2.
What cannot be recorded is timed call by call (``eager`` lists it), which for small tensors is the time of Python; so is
the formula in CuPy, whose pool would hand out again what a graph still uses. Host time, ``host_us``, is how long a call
takes to return, in microseconds, the device not waited for.

**What it is compared with.** ``copy`` is the device's own copy of x. A pass must move at least ``floor`` tensors of x's
size, a copy moves 2: so ``floor``/2 · copy/ours is our share of the bandwidth that the copy has.

Rows have besides what those of the CPU have: ``floor``; ``sets``, how many took turns; ``host_us``; ``eager``; and
``absent``, which contenders there are not, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

import fusednorm
from fusednorm import _C, arrays
from fusednorm.bench.contenders import Torch, TorchBatch, compared, formula, has_formula, ours, torch_peer
from fusednorm.bench.timing import ROUNDS, Contender, interleaved, spread
from fusednorm.testing import cases
from fusednorm.testing.cases import Array, Case, Inputs

# Elements of a tensor that are drawn, on the host; larger ones are filled with copies of these, each rolled.
DRAWN = 1 << 22

# Bytes side by side in memory that are worth a transfer: what of a channels-last row must be kept on the chip at least.
NARROWEST = 64

# Sets of tensors that take turns, at most; and seconds of calls that are a sample of host time: few enough that the
# device's queue never fills.
SETS, HOST_SAMPLE = 64, 2e-4

OURS, TORCH = ("copy", "ours_out", "ours"), ("native", "cudnn", "compile")


def floor(case: Case, pass_: str, on_chip: int) -> int:
    """Tensors of x's size that one call must at least move between chip and memory.

    Forward and evaluation read x and write y; backward reads dy and x and writes dx; a residual is read, and dresidual
    written. A statistic needs all of its elements before the first result, so they are kept on the chip in between, in
    the shared memory of all SMs, or read again: all of a channel, group or line; channels last a strip of each row, of
    64 bytes at least. (That part of it may come from L2 instead is not counted.)

    Args:
        on_chip: bytes of shared memory of all SMs.
    """
    # What backward needs the residual for is the activation's derivative.
    reads_residual = case.residual and (pass_ != "backward" or case.activation is not None)
    again = (2 + reads_residual) if pass_ == "backward" else 1
    moved = again + 1 + case.residual if pass_ == "backward" else 2 + reads_residual
    if pass_ == "eval":
        return moved
    item = cases.numpy_dtype(case.dtype).itemsize
    *_, channels, positions = case.cells
    if case.ghost_batch_size is not None:
        samples = case.shape[0 if case.axis else 1]
        positions = positions // samples * min(case.ghost_batch_size, samples)
    row = channels * item
    if not case.has_lines and math.prod(case.shape[case.axis % len(case.shape) + 1 :]) == 1:  # channels last
        row = min(case.channels * item, max(row, NARROWEST))
    kept = positions * row
    return moved if again * kept <= on_chip else moved + again


class Gpu:
    """Where contenders run: one GPU, on a stream of its own, within ``with``.

    Contenders: ``copy``; ``ours_out`` and ``ours`` as on the CPU; ``native``, PyTorch's own kernels (of instance norm
    those that PyTorch chooses, cuDNN's included), backward by autograd where the norm is not batch norm; ``cudnn``, for
    batch norm where PyTorch would choose that; ``compile``, what torch.compile makes of the forward, and of autograd's
    backward; ``cupy``, the formula of batch norm, an operation at a time.

    Args:
        device: such as ``cuda:0``.
        compiles: torch.compile for all cases, not only for those tagged so: it takes seconds each.
    """

    peers: Sequence[str] = ("native", "cudnn", "compile", "cupy")
    ratios: Sequence[tuple[str, str]] = (
        ("copy", "ours_out"),
        ("native", "ours_out"),
        ("cudnn", "ours_out"),
        ("compile", "ours_out"),
        ("cupy", "ours_out"),
    )

    def __init__(self, device: str, compiles: bool = False) -> None:
        self.device, self.compiles = device, compiles
        self.absent: dict[str, str] = {}
        self.compiled: dict[tuple[Case, str], Callable[..., Any]] = {}

    def __enter__(self) -> Gpu:
        self.cupy = cupy = importlib.import_module("cupy")
        number = int(self.device.split(":")[1])
        self.within = ExitStack()
        self.within.enter_context(arrays.on(self.device))
        self.properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.bus = cupy.cuda.Device(number).pci_bus_id
        self.stream = self.within.enter_context(cupy.cuda.Stream(non_blocking=True))
        self.torch, self.without_torch = _pytorch()
        if self.torch:
            self.within.enter_context(self.torch.cuda.device(number))
            theirs = self.torch.cuda.ExternalStream(self.stream.ptr, device=number)
            self.within.enter_context(self.torch.cuda.stream(theirs))
        self.start, self.stop = cupy.cuda.Event(), cupy.cuda.Event()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # after a kernel failed no call succeeds; what was measured before is still wanted
            self._clear()
        self.within.close()

    def environment(self) -> dict[str, Any]:
        p, runtime, torch = self.properties, self.cupy.cuda.runtime, self.torch
        return {
            "device": self.device,
            "gpu": p["name"].decode(),
            "sms": p["multiProcessorCount"],
            "l2_bytes": p["l2CacheSize"],
            "shared_bytes": self._on_chip(),
            "memory_bytes": p["totalGlobalMem"],
            "cuda": fusednorm.build_info()["cuda"],
            "cuda_of_driver": runtime.driverGetVersion(),
            "cuda_of_cupy": runtime.runtimeGetVersion(),
            "cupy": self.cupy.__version__,
            "cudnn": torch.backends.cudnn.version() if torch else None,
            **_nvidia_smi(self.bus),
        }

    def has_room(self, case: Case) -> bool:
        # x, dy, and the results of each contender; the formula's intermediate ones, which are float32 at least.
        needed = 16 * case.size * max(cases.numpy_dtype(case.dtype).itemsize, 4)
        return needed <= int(self.properties["totalGlobalMem"])

    def make(self, case: Case) -> Inputs:
        self._clear()
        small = case
        while small.size > DRAWN:
            shape = list(small.shape)
            sizes = [0 if axis == case.axis % len(shape) else n for axis, n in enumerate(shape)]
            largest = int(np.argmax(sizes))
            if shape[largest] == 1:
                break
            shape[largest] = (shape[largest] + 1) // 2
            small = replace(small, shape=tuple(shape))
        drawn = cases.make(small)
        there = {name: self.cupy.array(array) for name, array in vars(drawn).items() if array is not None}
        if small is not case:
            there |= {name: self._filled(case.shape, there[name]) for name in there.keys() & {"x", "dy", "residual"}}
        return replace(drawn, **there)

    def _filled(self, shape: tuple[int, ...], with_: Array) -> Array:
        """An array of copies of another, each rolled differently, so that no two parts of it are the same."""
        filled: Array = self.cupy.empty(shape, with_.dtype)
        to, from_ = _bits(filled).ravel(), _bits(with_).ravel()
        for i, start in enumerate(range(0, to.size, from_.size)):
            part = to[start : start + from_.size]
            by = i * 7919 % from_.size
            head = min(from_.size - by, part.size)
            part[:head] = from_[by : by + head]
            part[head:] = from_[: part.size - head]
        return filled

    def some(self, array: Array, channels: Array, axis: int) -> Array:
        index = (*(slice(None),) * axis, self.cupy.asarray(channels))
        picked: Array = self.cupy.asnumpy(_bits(array)[index])
        return picked.view(array.dtype)

    def contenders(self, case: Case, inputs: Inputs, pass_: str) -> list[Contender]:
        """All that can compute one pass of a case; each has done so once. `absent` says why others cannot."""
        self.absent = {}
        found = []
        for name, make in self._makers(case, inputs, pass_).items():
            try:
                contender = make()
                contender.call()
                self.stream.synchronize()
            except Exception as error:
                if name in OURS:
                    raise
                self.absent[name] = str(error).splitlines()[0][:200] or type(error).__name__
            else:
                found.append(contender)
        return found

    def _makers(self, case: Case, inputs: Inputs, pass_: str) -> dict[str, Callable[[], Contender]]:
        """What makes each contender, or raises where it cannot be one."""

        def copy() -> Contender:
            copied = self.cupy.empty_like(inputs.x)
            return Contender("copy", lambda: _C.copy(copied, inputs.x, self.cupy.cuda.get_current_stream().ptr))

        both = ours(case, inputs, pass_, self.device)
        makers: dict[str, Callable[[], Contender]] = {
            "copy": copy,
            "ours_out": lambda: both[0],
            "ours": lambda: both[1],
        }
        if has_formula(case):
            makers["cupy"] = lambda: Contender("cupy", formula(self.cupy, case, inputs, pass_), lambda result: result)
        peer = torch_peer(case)
        if peer is None:
            return makers

        def theirs() -> Torch:
            if not self.torch:
                raise LookupError(self.without_torch)
            return (_Batch if peer is TorchBatch else peer)(case, inputs)

        def native() -> Contender:
            torch = theirs()
            if isinstance(torch, _Batch):
                return Contender("native", torch.chosen(pass_, cudnn=False), torch.array)
            return Contender("native", torch.of(torch.function, pass_), torch.array)

        def cudnn() -> Contender:
            torch = theirs()
            if not isinstance(torch, _Batch) or torch.normalized(cudnn=True)[-1] != 1:
                raise LookupError("PyTorch does not choose it here")
            return Contender("cudnn", torch.chosen(pass_, cudnn=True), torch.array)

        def compiled() -> Contender:
            torch = theirs()
            if not self.compiles and "compile" not in case.tags:
                raise LookupError("for few cases only, unless --compile asks for all")
            if (case, pass_) not in self.compiled:
                # Else what was compiled for cases before would count towards the limit after which it does not compile.
                self.torch.compiler.reset()
                self.compiled[case, pass_] = self.torch.compile(torch.function, dynamic=False, fullgraph=True)
            # Donated, what forward saves would be gone after the first backward.
            with importlib.import_module("torch._functorch.config").patch(donated_buffer=False):
                return Contender("compile", torch.of(self.compiled[case, pass_], pass_), torch.array)

        return makers | {"native": native, "cudnn": cudnn, "compile": compiled}

    def times(
        self, case: Case, inputs: Inputs, pass_: str, entrants: Sequence[Contender], repeat: int | None
    ) -> dict[str, Any]:
        """What becomes of a row."""
        size = (3 if pass_ == "backward" else 2) * inputs.x.nbytes
        count = min(SETS, math.ceil(4 * self.properties["l2CacheSize"] / size))
        sets = [list(entrants)]
        for _ in range(count - 1):
            own = replace(inputs, **{name: a.copy() for name, a in vars(inputs).items() if a is not None})
            makers = self._makers(case, own, pass_)
            sets.append([makers[entrant.name]() for entrant in entrants])
        eager: list[str] = []
        device = [self._recorded(calls, eager) for calls in zip(*sets, strict=True)]
        samples = interleaved(device, repeat, clock=self._elapsed)
        host = interleaved(entrants, repeat or ROUNDS, clock=self._issued, sample=HOST_SAMPLE)
        return compared(samples, self.ratios) | {
            "floor": floor(case, pass_, self._on_chip()),
            "sets": count,
            "host_us": {name: spread([ms * 1e3 for ms in each]) for name, each in host.items()},
            "eager": eager,
            "absent": self.absent,
        }

    def _recorded(self, contenders: Sequence[Contender], eager: list[str]) -> Contender:
        """One contender whose call is a call of each of these."""
        name, calls = contenders[0].name, [contender.call for contender in contenders]

        def all_of_them() -> None:
            for call in calls:
                call()

        all_of_them()  # so that nothing is set up, compiled or first allocated while recording
        self.stream.synchronize()
        if name == "cupy":
            return Contender(name, all_of_them, count=len(calls))
        try:
            replay = (self._torch_graph if name in TORCH else self._cupy_graph)(all_of_them)
            replay()
            self.stream.synchronize()
        except Exception:
            eager.append(name)
            replay = all_of_them
        return Contender(name, replay, count=len(calls))

    def _cupy_graph(self, call: Callable[[], None]) -> Callable[[], None]:
        with self.cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()
        replay: Callable[[], None] = graph.launch
        return replay

    def _torch_graph(self, call: Callable[[], None]) -> Callable[[], None]:
        assert self.torch is not None
        graph, stream = self.torch.cuda.CUDAGraph(), self.torch.cuda.Stream()
        with self.torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay

    def _elapsed(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds of the device."""
        self.start.record(self.stream)
        for _ in range(calls):
            call()
        self.stop.record(self.stream)
        self.stop.synchronize()
        milliseconds: float = self.cupy.cuda.get_elapsed_time(self.start, self.stop)
        return milliseconds / 1e3

    def _issued(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds until the calls have returned; the device finishes untimed."""
        start = perf_counter()
        for _ in range(calls):
            call()
        seconds = perf_counter() - start
        self.stream.synchronize()
        return seconds

    def _on_chip(self) -> int:
        return int(self.properties["multiProcessorCount"] * self.properties["sharedMemPerMultiprocessor"])

    def _clear(self) -> None:
        """Gives back the memory of the case before."""
        self.compiled.clear()
        fusednorm.empty_cache()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch:
            self.torch.cuda.empty_cache()


def _pytorch() -> tuple[Any, str]:
    """PyTorch; or None, and why it cannot be used on a GPU."""
    if not importlib.util.find_spec("torch"):
        return None, "PyTorch is not installed"
    torch = importlib.import_module("torch")
    return (torch, "") if torch.cuda.is_available() else (None, "this PyTorch has no CUDA")


def _bits(array: Array) -> Array:
    """The array as integers: bfloat16's are no type to all that is done with arrays here."""
    return array.view(f"u{array.dtype.itemsize}")


def _nvidia_smi(bus: str) -> dict[str, str]:
    """The driver, and the clocks as they are now; empty where nvidia-smi does not tell."""
    names = {
        "driver": "driver_version", "sm_clock": "clocks.sm", "sm_clock_max": "clocks.max.sm",
        "memory_clock": "clocks.mem", "memory_clock_max": "clocks.max.mem",
    }  # fmt: skip
    command = ["nvidia-smi", "-i", bus, f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split(",")
    except (OSError, subprocess.SubprocessError):
        told = [""] * len(names)
    return dict(zip(names, map(str.strip, told), strict=True))


class _Batch(TorchBatch):
    """PyTorch's batch norm on a GPU, with or without cuDNN."""

    def normalized(self, *, cudnn: bool) -> Any:
        """y, mean, rstd, what cuDNN keeps for the backward; and 1 where it is cuDNN that computed them, 0 where not."""
        return self.torch.ops.aten._batch_norm_impl_index(
            self.x, self.weight, self.bias, self.running_mean, self.running_var,
            self.case.training, self.case.momentum, self.case.eps, cudnn,
        )  # fmt: skip

    def chosen(self, pass_: str, *, cudnn: bool) -> Callable[[], Any]:
        """One pass by operations as a model's forward and autograd's backward choose them."""
        aten, case = self.torch.ops.aten, self.case
        if pass_ != "backward":
            return lambda: self.epilogue(self.normalized(cudnn=cudnn)[0], self.residual)
        y, mean, rstd, kept, chosen = self.normalized(cudnn=cudnn)
        y = self.epilogue(y, self.residual)

        def backward() -> Any:
            u = aten.threshold_backward(self.dy, y, 0) if case.activation else self.dy
            return aten._batch_norm_impl_index_backward(
                chosen, self.x, u, self.weight, self.running_mean, self.running_var, mean, rstd, case.training,
                case.eps, [True, True, True], kept,
            )[0]  # fmt: skip

        return backward
