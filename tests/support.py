"""Arrays that lie in memory in every way NumPy can express, and comparisons of bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fusednorm.testing import cases

Array = np.ndarray[Any, Any]

DTYPES = ("float32", "float64", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    return cases.numpy_dtype(name)


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))


def bits(a: Array) -> Array:
    """What is stored, NaN's payload and the sign of zero included, in C order."""
    return np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)


def assert_same_bits(a: Any, b: Any, what: str = "") -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, what
    assert a.dtype == b.dtype, what
    np.testing.assert_array_equal(bits(a), bits(b), err_msg=what)


# Ways for the same numbers to lie in memory.


def f_order(x: Array) -> Array:
    return np.asfortranarray(x)


def channels_last(x: Array) -> Array:
    """Axis 1 moved to the end in memory, not in shape."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def swapped_slowest(x: Array) -> Array:
    """The first two axes exchanged in memory."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)


def stepped(x: Array) -> Array:
    """Every second element of a larger array along each axis, the gaps full of NaN."""
    big = np.full([2 * n for n in x.shape], np.nan, x.dtype)
    view = big[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def negative(x: Array) -> Array:
    """Every axis runs backwards."""
    back = tuple(slice(None, None, -1) for _ in x.shape)
    return np.ascontiguousarray(x[back])[back]


def byte_swapped(x: Array) -> Array:
    return x.astype(x.dtype.newbyteorder(">"))


def misaligned(x: Array) -> Array:
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def padded(x: Array) -> Array:
    """The front part of a larger array, as from a padded buffer."""
    big = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
    view = big[tuple(slice(n) for n in x.shape)]
    view[...] = x
    return view


DENSE = {"C": np.ascontiguousarray, "F": f_order, "channels_last": channels_last, "swapped": swapped_slowest}
STRIDED = {"stepped": stepped, "negative": negative, "misaligned": misaligned, "padded": padded}
LAYOUTS = DENSE | STRIDED


def run_python(code: str, *, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, for what may hang, crash or must be decided before the import."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
