"""Array kinds: which are taken, and how outputs are allocated like them.

NumPy arrays are taken. Where another kind arrives, the error names what is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fusednorm import _C

Array: TypeAlias = np.ndarray[Any, Any]

_POOL_BYTES = _C.POOL_BYTES


def taken(x: object, name: str) -> Array:
    """`x` as a plain ndarray; TypeError for anything that is not a NumPy array."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return x.view(np.ndarray)
    kind = "a masked array" if isinstance(x, np.ma.MaskedArray) else f"{type(x).__module__}.{type(x).__qualname__}"
    raise TypeError(f"{name} must be a NumPy array, not {kind.removeprefix('builtins.')}")


def is_floating(dtype: np.dtype[Any]) -> bool:
    """float32, float64, float16 or bfloat16 (ml_dtypes'), in any byte order."""
    return (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"


def empty(shape: Sequence[int], dtype: np.dtype[Any], strides: Sequence[int] | None = None) -> Array:
    """An uninitialized dense array; large ones lie in the output pool."""
    size = math.prod(shape) * dtype.itemsize
    if size < _POOL_BYTES and strides is None:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, memoryview(_C.PoolMemory(size)), 0, strides)


def empty_like(x: Array) -> Array:
    """An uninitialized array with the shape, dtype and axis order of the dense array `x`."""
    if x.nbytes < _POOL_BYTES:
        return np.empty_like(x)
    return np.ndarray(x.shape, x.dtype, memoryview(_C.PoolMemory(x.nbytes)), 0, x.strides)


def is_plain(x: Array) -> bool:
    """Aligned and in this machine's byte order."""
    return x.flags.aligned and x.dtype.isnative


def laid_out_like(x: Array, like: Array) -> Array:
    """`x`, or a copy of it, with the strides of the dense array `like`, aligned, in native byte order."""
    if x.strides == like.strides and is_plain(x):
        return x
    copy = empty_like(like)
    copy[...] = x
    return copy


def overlaps(a: Array, b: Array) -> bool:
    """Whether `a` and `b` share an element's memory without being the same elements one by one."""
    if not np.may_share_memory(a, b):
        return False
    same = a.ctypes.data == b.ctypes.data and a.strides == b.strides and a.shape == b.shape
    if same:
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=1_000_000))  # type: ignore[arg-type]  # NumPy's stub knows only 0 and -1
    except np.exceptions.TooHardError:
        return True
