"""Array kinds: which are taken, where they lie, and how outputs are allocated like them.

NumPy arrays and CuPy arrays are taken, and what has `__cuda_array_interface__` as a CuPy array over the same memory.
Where another kind arrives, the error names these; foreign.py makes such arrays of PyTorch's, JAX's and others. CuPy is
imported when the first such array comes, never before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from fusednorm import _C

# NumPy's, or CuPy's, which behaves alike where it is used here.
Array: TypeAlias = np.ndarray[Any, Any]

_POOL_BYTES = _C.POOL_BYTES


def taken(x: object, name: str) -> Array:
    """`x` as a plain NumPy or CuPy array; TypeError for anything else."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return x.view(np.ndarray)
    kind = "a masked array" if isinstance(x, np.ma.MaskedArray) else f"{type(x).__module__}.{type(x).__qualname__}"
    kind = kind.removeprefix("builtins.")
    if is_of_a_gpu(x):
        missing = missing_for_cuda()
        if missing:
            raise TypeError(f"{name} is an array of a GPU ({kind}): {missing}")
        cupy = import_module("cupy")
        return x if isinstance(x, cupy.ndarray) else cupy.asarray(x)  # type: ignore[no-any-return]
    raise TypeError(f"{name} must be a NumPy or CuPy array, not {kind}")


def is_of_a_gpu(x: object) -> bool:
    # Of some libraries all arrays have the attribute, and it raises for those of the CPU.
    try:
        return hasattr(x, "__cuda_array_interface__")
    except Exception:
        return False


def installs(extra: str) -> str:
    """How to install an extra of this package, in words."""
    return f"pip install 'fusednorm[{extra}]', or in a checkout pip install '.[{extra}]'"


def missing_for_cuda() -> str:
    """What arrays of a GPU lack here, in words; empty where they can be used."""
    if not _C.cuda_built():
        return f"in this fusednorm CUDA is {_C.build_info()['cuda']}"
    try:
        import_module("cupy")
    except ImportError:
        return f"CuPy is not installed: {installs('cuda')}"
    return ""


def namespace(x: Array) -> Any:
    """The module that makes arrays like x: numpy or cupy."""
    return np if isinstance(x, np.ndarray) else import_module("cupy")


def device(x: Array) -> str:
    """Where x lies: "cpu" or, for example, "cuda:0"."""
    return "cpu" if isinstance(x, np.ndarray) else f"cuda:{x.device.id}"


def checked_device(name: str) -> str:
    """The name of a device in full: "cuda" is "cuda:0". RuntimeError where there is no such device."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise ValueError(f'device must be "cpu", "cuda", "cuda:0", "cuda:1", …, not {name!r}')
    if name == "cpu":
        return name
    missing, ordinal = missing_for_cuda(), int(found[1] or 0)
    if not missing and ordinal >= _C.cuda_devices():
        missing = f"there are {_C.cuda_devices()} GPUs" if _C.cuda_devices() else "no GPU was found"
    if missing:
        raise RuntimeError(f"device {name!r} is not to be had: {missing}")
    return f"cuda:{ordinal}"


def on(device: str) -> AbstractContextManager[Any]:
    """Makes a device, "cpu" or "cuda:1", the current one."""
    return nullcontext() if device == "cpu" else import_module("cupy").cuda.Device(int(device[5:]))


def is_elsewhere(x: Array) -> bool:
    """Whether x is of a GPU that is not the current one."""
    return not isinstance(x, np.ndarray) and bool(x.device != import_module("cupy").cuda.Device())


def moved(a: Array, to: str) -> Array:
    """`a` on a device, "cpu" or "cuda:1": itself where it is there, else a copy."""
    if device(a) == to:
        return a
    if to == "cpu":
        return a.get()  # type: ignore[attr-defined, no-any-return]
    with on(to):
        return import_module("cupy").asarray(a)  # type: ignore[no-any-return]


def expect_on(place: str, x: object, owner: str) -> None:
    """TypeError where x is on another device than `owner`, which is on `place`."""
    found = device(taken(x, "x"))
    if found != place:
        raise TypeError(f"x is on {found}, the {owner} on {place}; its to({found!r}) moves it there")


def expect_beside(a: Array, name: str, x: Array) -> None:
    """TypeError where `a` is not on x's device."""
    if type(a) is np.ndarray and type(x) is np.ndarray:
        return
    if type(a) is not type(x) or device(a) != device(x):
        raise TypeError(f"{name} is on {device(a)}, x on {device(x)}")


# What recorded graphs of kernel launches use, until `release`: their replays read and write it.
_recorded: list[tuple[object, ...]] = []


def launched(queue: tuple[int, Array | None], *used: object) -> None:
    """To be called after a verb: keeps `used` alive where the verb was recorded into a CUDA graph."""
    if queue[1] is not None and _C.capturing(queue[0]):
        _recorded.append((queue[1], *used))


def release() -> None:
    """Lets go of what recorded graphs use."""
    _recorded.clear()


CPU: tuple[int, Array | None] = (0, None)


def queue(x: Array, folded: _C.Fold) -> tuple[int, Array | None]:
    """What a verb over x needs to be launched: the caller's current stream and scratch memory. Nothing on the CPU."""
    if isinstance(x, np.ndarray):
        return CPU
    cupy = import_module("cupy")
    with x.device:
        return cupy.cuda.get_current_stream().ptr, cupy.empty(_C.scratch_bytes(folded, x), np.uint8)


def is_floating(dtype: np.dtype[Any]) -> bool:
    """float32, float64, float16 or bfloat16 (ml_dtypes'), in any byte order."""
    return (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"


def empty(
    shape: Sequence[int], dtype: np.dtype[Any], strides: Sequence[int] | None = None, *, beside: Array | None = None
) -> Array:
    """An uninitialized dense array on the device of `beside`; large ones of the CPU lie in the output pool."""
    size = math.prod(shape) * dtype.itemsize
    if beside is not None and not isinstance(beside, np.ndarray):
        cupy = import_module("cupy")
        with beside.device:
            memory = None if strides is None else cupy.cuda.alloc(size)
            return cupy.ndarray(tuple(shape), dtype, memory, strides)
    if size < _POOL_BYTES and strides is None:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, memoryview(_C.PoolMemory(size)), 0, strides)


def statistics(x: Array, shape: Sequence[int]) -> tuple[Array, Array]:
    """Two uninitialized float64 arrays of that shape, on x's device."""
    if isinstance(x, np.ndarray):
        return np.empty(shape), np.empty(shape)
    mean, rstd = empty((2, *shape), np.dtype(np.float64), beside=x)
    return mean, rstd


def empty_like(x: Array) -> Array:
    """An uninitialized array with the shape, dtype, axis order and device of the dense array `x`."""
    if not isinstance(x, np.ndarray):
        with x.device:
            return import_module("cupy").empty_like(x)
    if x.nbytes < _POOL_BYTES:
        return np.empty_like(x)
    return np.ndarray(x.shape, x.dtype, memoryview(_C.PoolMemory(x.nbytes)), 0, x.strides)


def is_plain(x: Array) -> bool:
    """Aligned and in this machine's byte order, as all arrays of a GPU are."""
    return not isinstance(x, np.ndarray) or (x.flags.aligned and x.dtype.isnative)


def is_writeable(x: Array) -> bool:
    return not isinstance(x, np.ndarray) or x.flags.writeable


def laid_out_like(x: Array, like: Array) -> Array:
    """`x`, or a copy of it, with the strides of the dense array `like`, aligned, in native byte order."""
    if x.strides == like.strides and is_plain(x):
        return x
    copy = empty_like(like)
    copy[...] = x
    return copy


def shares(a: Array, others: tuple[Array | None, ...]) -> bool:
    """Whether `a` shares memory with one of the others. On a GPU their extents decide."""
    if _C.apart(a, others):
        return False
    return not isinstance(a, np.ndarray) or any(b is not None and np.shares_memory(a, b) for b in others)


def overlaps(a: Array, b: Array) -> bool:
    """Whether `a` and `b`, whose extents meet, share memory without being the same elements one by one. On a GPU the
    extents decide."""
    if not isinstance(a, np.ndarray):
        return not (a.data.ptr == b.data.ptr and a.strides == b.strides and a.shape == b.shape)
    if not np.may_share_memory(a, b):
        return False
    same = a.ctypes.data == b.ctypes.data and a.strides == b.strides and a.shape == b.shape
    if same:
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=1_000_000))  # type: ignore[arg-type]  # NumPy's stub knows only 0 and -1
    except np.exceptions.TooHardError:
        return True
