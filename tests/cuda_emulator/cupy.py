"""A stand-in for CuPy: what fusednorm and its tests use of it, on the emulator's devices.

Like CuPy's, its arrays are no NumPy arrays and do not become any unasked; they know their device, and mix neither with
NumPy arrays nor with those of another device. Their memory is closed to the host.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import emulator
import numpy as np

__version__ = "14.0.0"

bool_, uint8, int32, int64 = np.bool_, np.uint8, np.int32, np.int64
float16, float32, float64 = np.float16, np.float32, np.float64
dtype, newaxis = np.dtype, None


# cupy.cuda


class _Current(threading.local):
    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}  # by device


_current = _Current()


def _device() -> int:
    """The current device is the runtime's: whoever changes it must put it back."""
    found: int = emulator.library().fn_emu_get_device()
    return found


class CUDARuntimeError(RuntimeError):
    pass


class Device:
    def __init__(self, device: int | Device | None = None) -> None:
        self.id = _device() if device is None else int(device)
        self._outer: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    pci_bus_id = property(lambda self: f"emulated:{self.id}")

    def use(self) -> None:
        if emulator.library().fn_emu_set_device(self.id):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self) -> Device:
        self._outer.append(_device())
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        Device(self._outer.pop()).use()

    def synchronize(self) -> None:
        pass


class Stream:
    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.device_id = -1 if null else _device()
        self.ptr: int = 0 if null else emulator.library().fn_emu_stream(self.device_id)
        self._outer: list[Stream] = []

    def use(self) -> Stream:
        _current.streams[_device()] = self
        return self

    def __enter__(self) -> Stream:
        self._outer.append(get_current_stream())
        return self.use()

    def __exit__(self, *_: object) -> None:
        self._outer.pop().use()

    def synchronize(self) -> None:
        if self.is_capturing():
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )

    def is_capturing(self) -> bool:
        return bool(emulator.library().fn_emu_capturing(self.ptr))

    def begin_capture(self, mode: int | None = None) -> None:
        self._steps: list[Any] = []
        emulator.library().fn_emu_begin_capture(self.ptr)

    def end_capture(self) -> Graph:
        return Graph(emulator.library().fn_emu_end_capture(self.ptr), self._steps)

    def _do(self, step: Callable[[], object]) -> None:
        """Now, or when the graph that is being captured is launched."""
        if not self.is_capturing():
            step()
            return
        self._steps.append(emulator.STEP(step))
        emulator.library().fn_emu_record(self.ptr, self._steps[-1])


class Graph:
    def __init__(self, ptr: int, steps: list[Any]) -> None:
        self.graph, self._steps = ptr, steps

    def launch(self, stream: Stream | None = None) -> None:
        wrong = emulator.library().fn_emu_replay(self.graph)
        if wrong:
            raise RuntimeError(wrong.decode())


class Event:
    """Launches are done when they return: the host's clock is the device's."""

    def record(self, stream: Stream) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


def get_elapsed_time(start: Event, stop: Event) -> float:
    return (stop.time - start.time) * 1e3


_null = Stream.null = Stream(null=True)  # type: ignore[attr-defined]


def get_current_stream(device_id: int | None = None) -> Stream:
    found: Stream = _current.streams.get(_device() if device_id is None else device_id, _null)
    return found


def _device_count() -> int:
    count: int = emulator.library().fn_emu_device_count()
    return count


class Memory:
    def __init__(self, size: int) -> None:
        self.size, self.device_id = size, _device()
        self.ptr: int = emulator.library().fn_emu_allocate(size)
        weakref.finalize(self, emulator.library().fn_emu_free, self.ptr)


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = _device() if device_id < 0 else device_id


class MemoryPointer:
    def __init__(self, mem: Memory | UnownedMemory, offset: int) -> None:
        self.mem, self.ptr, self.device_id, self.device = mem, mem.ptr + offset, mem.device_id, Device(mem.device_id)


def alloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


def _properties(device: int) -> dict[str, Any]:
    """What a benchmark asks for, the same of every device; L2 is small, so that few sets of tensors fill it."""
    return {
        "name": b"emulated", "multiProcessorCount": 4, "sharedMemPerMultiprocessor": 228 << 10, "l2CacheSize": 8 << 10,
        "totalGlobalMem": 1 << 30,
    }  # fmt: skip


def get_default_memory_pool() -> Any:
    return types.SimpleNamespace(free_all_blocks=lambda: None)


cuda = types.ModuleType("cupy.cuda")
cuda.__dict__.update(
    Device=Device, Stream=Stream, Graph=Graph, Memory=Memory, UnownedMemory=UnownedMemory, MemoryPointer=MemoryPointer,
    alloc=alloc, get_current_stream=get_current_stream, is_available=lambda: _device_count() > 0,
    set_allocator=lambda allocator=None: None,  # each array has memory of its own anyway
    Event=Event, get_elapsed_time=get_elapsed_time,
    runtime=types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=_device_count, getDevice=lambda: _device(),
        driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13000, getDeviceProperties=_properties,
    ),
)  # fmt: skip
sys.modules["cupy.cuda"] = cuda


# Arrays.


class _Bytes:
    """Device memory as NumPy takes it."""

    def __init__(self, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (ptr, False), "shape": shape, "strides": strides,
            "typestr": f"|V{dtype.itemsize}",
        }  # fmt: skip


class _Flags:
    def __init__(self, flags: Any, owndata: bool) -> None:
        self.c_contiguous: bool = flags.c_contiguous
        self.f_contiguous: bool = flags.f_contiguous
        self.owndata = owndata
        self.forc: bool = flags.forc
        self.fnc: bool = flags.fnc

    def __getitem__(self, name: str) -> bool:
        found: bool = getattr(self, name.lower())
        return found


class ndarray:
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        shape: int | Sequence[int],
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: str = "C",
    ) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        self.data = alloc(math.prod(shape) * dtype.itemsize) if memptr is None else memptr
        self.base: ndarray | None = None
        if strides is None and order == "F":
            strides = tuple(dtype.itemsize * math.prod(shape[:i]) for i in range(len(shape)))
        # A NumPy array over the device's memory: shapes and strides by NumPy, elements within `emulator.memory()` only.
        self._host = np.asarray(_Bytes(self.data.ptr, shape, strides, dtype)).view(dtype)

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: _Flags(self._host.flags, self.base is None))
    device = property(lambda self: self.data.device)
    T = property(lambda self: self.transpose())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "descr": self.dtype.descr,
            "data": (self.data.ptr if self.size else 0, False),
            "strides": None if self._host.flags.c_contiguous else self.strides,
            "stream": get_current_stream().ptr or 1,
        }  # fmt: skip

    def __array__(self, *_: object, **__: object) -> None:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> ndarray:
        if method != "__call__":
            return NotImplemented
        return _compute(ufunc, *inputs, out=out[0] if out else None, **options)

    def __array_function__(self, function: Any, _: Any, inputs: Any, options: Any) -> Any:
        own = globals().get(function.__name__)
        return NotImplemented if own is None else own(*inputs, **options)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray[Any, Any]:
        get_current_stream(self.data.device_id).synchronize()
        with emulator.memory():
            return self._host.copy(order)  # type: ignore[arg-type]

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return repr(self.get())

    def __getitem__(self, key: Any) -> ndarray:
        return _view(self, lambda host: host[_host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        _here(self)
        where, what = _host(key), _operand(value)
        _do(lambda: self._host.__setitem__(where, what))

    def fill(self, value: Any) -> None:
        self[...] = value

    def set(self, source: np.ndarray[Any, Any]) -> None:
        _here(self)
        _do(lambda: self._host.__setitem__(..., source))

    def copy(self, order: str = "C") -> ndarray:
        return self.astype(self.dtype, order)

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> ndarray:
        if not copy and self.dtype == dtype:
            return self
        return copyto(empty_like(self, dtype, order), self, "unsafe")

    def view(self, dtype: Any = None) -> ndarray:
        return _view(self, lambda host: host.view() if dtype is None else host.view(dtype))

    def reshape(self, *shape: Any, order: Any = "C") -> ndarray:
        return _view(self, lambda host: host.reshape(*shape, order=order))

    def ravel(self, order: Any = "C") -> ndarray:
        return _view(self, lambda host: host.ravel(order))

    def transpose(self, *axes: Any) -> ndarray:
        return _view(self, lambda host: host.transpose(*axes))

    def swapaxes(self, one: int, other: int) -> ndarray:
        return _view(self, lambda host: host.swapaxes(one, other))

    def squeeze(self, axis: Any = None) -> ndarray:
        return _view(self, lambda host: host.squeeze(axis))

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return _compute(np.sum, self, axis=axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return _compute(np.mean, self, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return _compute(np.max, self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: Any = None) -> ndarray:
        return _compute(np.argmax, self, axis=axis)

    def all(self, axis: Any = None) -> ndarray:
        return _compute(np.all, self, axis=axis)

    def any(self, axis: Any = None) -> ndarray:
        return _compute(np.any, self, axis=axis)


for _name in (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and_",
    "or_",
    "xor",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    _function, _bare = getattr(operator, _name), _name.rstrip("_")
    setattr(ndarray, f"__{_bare}__", lambda self, other, f=_function: _compute(f, self, other))
    if _bare not in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(ndarray, f"__r{_bare}__", lambda self, other, f=_function: _compute(f, other, self))
        setattr(ndarray, f"__i{_bare}__", lambda self, other, f=_function: copyto(self, _compute(f, self, other)))
for _name in ("neg", "pos", "invert"):
    _function = getattr(operator, _name)
    setattr(ndarray, f"__{_name}__", lambda self, f=_function: _compute(f, self))


def _here(a: ndarray) -> None:
    if a.data.device_id != _device():
        raise ValueError(
            f"Array device must be same as the current device: array device = {a.data.device_id} while "
            f"current = {_device()}"
        )


def _operand(a: Any) -> Any:
    """What NumPy computes with: arrays of this device, and scalars."""
    if isinstance(a, ndarray):
        _here(a)
        return a._host
    if isinstance(a, np.ndarray):
        raise TypeError(f"Unsupported type {type(a)}")
    return a


def _host(key: Any) -> Any:
    return tuple(map(_host, key)) if isinstance(key, tuple) else key._host if isinstance(key, ndarray) else key


def _do(step: Callable[[], object]) -> None:
    """Now, or when the graph that is being captured is launched."""

    def opened() -> None:
        with emulator.memory(), np.errstate(all="ignore"):
            step()

    get_current_stream()._do(opened)


def _compute(function: Callable[..., Any], *inputs: Any, out: ndarray | None = None, **options: Any) -> ndarray:
    hosts = [_operand(a) for a in inputs]
    with emulator.memory(), np.errstate(all="ignore"):
        now = np.asarray(function(*hosts, **options))
    result = ndarray(now.shape, now.dtype, strides=now.strides) if out is None else out
    later = get_current_stream().is_capturing()
    _do(lambda: result._host.__setitem__(..., function(*hosts, **options) if later else now))
    return result


def _view(a: ndarray, function: Callable[..., np.ndarray[Any, Any]]) -> ndarray:
    """The same memory where NumPy would give a view of it, else a new array."""
    with emulator.memory():
        host = np.asarray(function(a._host))
    if host.size and not np.may_share_memory(host, a._host):
        return _compute(function, a)
    at = host.__array_interface__["data"][0] if host.size else a.data.ptr
    result = ndarray(host.shape, host.dtype, MemoryPointer(a.data.mem, at - a.data.mem.ptr), host.strides)
    result.base = a if a.base is None else a.base
    return result


def _alike(function: Any) -> Any:
    return lambda a, *arguments, **options: _view(a, lambda host: function(host, *arguments, **options))


expand_dims, broadcast_to, moveaxis = map(_alike, (np.expand_dims, np.broadcast_to, np.moveaxis))
reshape, transpose, squeeze, ravel = map(_alike, (np.reshape, np.transpose, np.squeeze, np.ravel))


def _elementwise(function: Any) -> Any:
    return lambda *inputs, **options: _compute(function, *inputs, **options)


sqrt, isfinite, isinf, isnan, abs, maximum, minimum, where, count_nonzero, array_equal = map(
    _elementwise,
    (
        np.sqrt,
        np.isfinite,
        np.isinf,
        np.isnan,
        np.abs,
        np.maximum,
        np.minimum,
        np.where,
        np.count_nonzero,
        np.array_equal,
    ),
)


class linalg:
    @staticmethod
    def eigh(a: ndarray) -> tuple[ndarray, ndarray]:
        values, vectors = np.linalg.eigh(a.get())
        return array(values), array(vectors)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: Any = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    like = np.empty_like(prototype._host, dtype, order, shape=shape)
    return ndarray(like.shape, like.dtype, strides=like.strides)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    a = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order)
    a.fill(fill_value)
    return a


def full_like(a: ndarray, fill_value: Any, dtype: Any = None, order: str = "K") -> ndarray:
    a = empty_like(a, dtype, order)
    a.fill(fill_value)
    return a


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def zeros_like(a: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    return full_like(a, 0, dtype, order)


def ones_like(a: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    return full_like(a, 1, dtype, order)


def arange(*limits: Any, dtype: Any = None) -> ndarray:
    return array(np.arange(*limits, dtype=dtype))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: Any = "K") -> ndarray:
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        of = obj.__cuda_array_interface__
        memory = MemoryPointer(UnownedMemory(of["data"][0], 0, obj), 0)
        obj = ndarray(of["shape"], of["typestr"], memory, of["strides"])
    if isinstance(obj, ndarray):
        if obj.data.device_id != _device():
            return array(obj.get(), dtype, order=order)
        if copy or (dtype is not None and obj.dtype != dtype) or (order == "C" and not obj.flags.c_contiguous):
            return obj.astype(obj.dtype if dtype is None else dtype, order)
        return obj
    host = np.asarray(obj, dtype)
    host = np.array(host, host.dtype.newbyteorder("="), order=order)
    a = ndarray(host.shape, host.dtype, strides=host.strides)
    a.set(host)
    return a


def asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    return array(a, dtype, False, order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    return array(a, dtype, False, "C")


def asnumpy(a: Any, stream: Any = None, order: str = "C") -> np.ndarray[Any, Any]:
    return a.get(order=order) if isinstance(a, ndarray) else np.asarray(a)


def copyto(dst: ndarray, src: Any, casting: Any = "same_kind", where: Any = None) -> ndarray:
    """CuPy returns None; here it serves the methods as well."""
    to, what = _operand(dst), _operand(src)
    _do(lambda: np.copyto(to, what, casting=casting))
    return dst


def may_share_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return np.may_share_memory(a._host, b._host)


def shares_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return bool(np.shares_memory(a._host, b._host))


def get_array_module(*arrays: Any) -> Any:
    return sys.modules[__name__] if any(isinstance(a, ndarray) for a in arrays) else np
