"""What a call's arrays must be and how they lie: everything between the caller's arrays and the verbs' pointers.

A norm has a layout function, which says the :class:`Layout` of an array by its shape, strides and dtype, or None where
the array must first be copied. Layouts are cached, since a model has few shapes; by the types of arguments, too, since
1.0 and True are equal to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusednorm import _C, arrays, fold
from fusednorm.arrays import Array
from fusednorm.fold import Fold

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


class Part(NamedTuple):
    """What one call of a verb is given of an array."""

    fold: Fold
    samples: tuple[slice, ...] | None = None  # index of x; None: all of it
    first: int = 0  # its first statistic, of each channel


class Layout(NamedTuple):
    """How an array is folded, and the shapes that go with it."""

    parts: tuple[Part, ...]  # one; two where the last ghost batch is shorter; none where there are no ghost batches
    saved: tuple[int, ...]  # shape of mean and rstd
    parameters: tuple[int, ...]  # shape of weight and bias
    axis: int | None = None  # of the channels, which a mask lacks; None: the parameters run along the last axes
    order: tuple[int, ...] | None = None  # of the axes of `saved` in memory; None: as they are
    # What is refused, and how the norm calls it.
    too_few: str = ""  # in training: a statistic is over one element
    positive_eps: bool = False  # in training
    evaluation: str = ""

    def shaped(self, statistic: Array) -> Array:
        """Statistics in `saved`'s order, from that of the memory."""
        assert self.order is not None
        lying = statistic.reshape([self.saved[a] for a in self.order]).transpose(np.argsort(self.order).tolist())
        return arrays.namespace(statistic).ascontiguousarray(lying)  # type: ignore[no-any-return]


LayoutOf = Callable[..., Layout | None]


def floating(name: str, dtype: np.dtype[Any]) -> None:
    if not arrays.is_floating(dtype):
        raise TypeError(f"{name} has dtype {dtype}; float32, float64, float16 and bfloat16 are taken")


def order(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...] | None:
    """The memory order of x's axes; None where it must first be copied."""
    floating("x", dtype)
    return fold.memory_order(shape, strides, dtype.itemsize) if dtype.isnative else None


def integer(name: str, value: object) -> int:
    """An int or what stands for one, such as NumPy's; neither a bool nor a float that happens to be whole."""
    if type(value) is int:
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} must be an integer, not {value!r}")


def channel_axis(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """The axis that is kept, counted from the first, and the axis of the samples."""
    ndim, axis = len(shape), integer("axis", axis)
    if ndim < 2:
        raise ValueError(f"expected at least 2D input (got {ndim}D input)")
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    axis %= ndim
    return axis, 1 if axis == 0 else 0


def dense(x: Array, layout_of: LayoutOf, how: tuple[Any, ...]) -> tuple[Array, Layout]:
    """`x`, or a copy of it, and its layout. The copy is C-ordered, or has its second axis as the slowest."""
    layout = layout_of(x.shape, x.strides, x.dtype, *how)
    if layout is not None and (type(x) is not np.ndarray or x.flags.aligned):
        return x, layout
    for axes in (range(x.ndim), (1, 0, *range(2, x.ndim))):
        copy = arrays.empty([x.shape[a] for a in axes], x.dtype.newbyteorder("="), beside=x).transpose(np.argsort(axes))
        layout = layout_of(copy.shape, copy.strides, copy.dtype, *how)
        if layout is not None:
            copy[...] = x
            return copy, layout
    raise AssertionError("every norm takes one of the two orders")


def beside(a: object, name: str, x: Array) -> Array:
    """An array on x's device."""
    if type(a) is np.ndarray and type(x) is np.ndarray:
        return a
    a = arrays.taken(a, name)
    arrays.expect_beside(a, name, x)
    return a


def alike(a: object, name: str, x: Array, laid_out: Array) -> Array:
    """An operand with x's shape and dtype, in memory like `laid_out`."""
    a = beside(a, name, x)
    if a.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {a.shape}")
    if a.dtype != laid_out.dtype and a.dtype.newbyteorder("=") != laid_out.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {a.dtype}")
    return arrays.laid_out_like(a, laid_out)


def positions(mask: object, x: Array, layout: Layout) -> Array:
    """The mask of x's positions, flat, in the order in which the dense array `x` holds them."""
    mask, axis = beside(mask, "mask", x), layout.axis
    assert axis is not None
    expected = x.shape[:axis] + x.shape[axis + 1 :]
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, not {mask.dtype}")
    if mask.shape != expected:
        raise ValueError(f"mask must have x's shape without axis {axis}, {expected}, got {mask.shape}")
    order = fold.memory_order(x.shape, x.strides, x.itemsize) or ()
    full: Array = mask[(*(slice(None),) * axis, None)]
    return full.transpose((*order, *(a for a in range(x.ndim) if a not in order))).ravel()


def parameter(a: Array | None, name: str, layout: Layout) -> Array | None:
    """A weight or bias as the verbs take it: one number after the other. They check the number of channels."""
    if a is None:
        return a
    if type(a) is not np.ndarray:
        a = arrays.taken(a, name)
    if layout.axis is not None:
        return a
    if a.shape != layout.parameters:
        raise ValueError(
            f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape {list(a.shape)} and "
            f"normalized_shape = {list(layout.parameters)}"
        )
    return a if a.ndim == 1 else a.reshape(-1)


def statistics(a: object, name: str, x: Array, layout: Layout, kinds: int | None = None) -> Array:
    """Saved statistics as the verbs take them; of several kinds, their number is the first length."""
    saved = layout.saved if kinds is None else (kinds, *layout.saved)
    a = beside(a, name, x)
    if a.shape != saved:
        raise ValueError(f"{name} must have shape {saved}, got {a.shape}")
    if layout.order is not None:
        a = a.transpose(layout.order)
    elif a.dtype == FLOAT64 and a.flags.c_contiguous and a.dtype.isnative:
        return a
    floating(name, a.dtype)
    return arrays.namespace(a).asarray(a, np.float64, order="C")  # type: ignore[no-any-return]


def expect_statistics(
    layout: Layout, training: bool, eps: float, running_mean: Array | None, running_var: Array | None
) -> None:
    if training:
        if layout.too_few:
            raise ValueError(layout.too_few)
        if not eps > 0 and layout.positive_eps:
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    elif running_mean is None or running_var is None:
        raise ValueError(f"Expected running_mean and running_var to be defined when {layout.evaluation}")


def expect_together(running_mean: object, running_var: object) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together")


def expect_channels(a: Array, name: str, channels: int) -> None:
    """One number for each channel, as the verbs say it."""
    if a.size != channels:
        raise ValueError(f"{name} should contain {channels} elements not {a.size}")
    if a.ndim != 1:
        raise ValueError(f"{name} must have one axis, not {a.ndim}")
    floating(name, a.dtype)


def running(
    mean: Array | None, var: Array | None, others: tuple[Array | None, ...], x: Array, channels: int, written: bool
) -> tuple[Array | None, Array | None]:
    """Running statistics that no verb checks: both or none, and where written nothing else that the call takes."""
    expect_together(mean, var)
    if mean is None or var is None:
        return None, None
    mean, var = beside(mean, "running_mean", x), beside(var, "running_var", x)
    for name, a, apart_from in (("running_mean", mean, (var, *others)), ("running_var", var, (mean, *others))):
        expect_channels(a, name, channels)
        if written and not arrays.is_writeable(a):
            raise ValueError(f"{name} is read-only")
        if written and arrays.shares(a, apart_from):
            raise ValueError(f"{name} shares memory with another array, and training writes it; give each its own")
    return mean, var


def update(running: Array | None, momentum: float, new: Array) -> None:
    if running is None:
        return
    with np.errstate(over="ignore"):
        running[...] = (1 - momentum) * running.astype(np.float64) + momentum * new


def gradient(parameter: Array | None, x: Array, layout: Layout) -> Array:
    """Where the gradient of a parameter goes, in its dtype; without one float32, for float64 x float64."""
    dtype = (FLOAT64 if x.dtype == FLOAT64 else FLOAT32) if parameter is None else parameter.dtype
    return (
        np.empty(layout.parameters, dtype)
        if type(x) is np.ndarray
        else arrays.empty(layout.parameters, dtype, beside=x)
    )


def cut(part: Part, *used: Array | None) -> tuple[Any, ...]:
    """The part's tensors, of whose positions and statistics (the last three of `used`) samples are the slowest axis."""
    folded, samples, first = part
    assert samples is not None
    *tensors, positions, mean, rstd = used
    rows = slice(first, first + folded.batch)
    if positions is not None:
        assert tensors[0] is not None
        positions = positions.reshape(tensors[0].shape[len(samples) - 1], -1)[samples[-1]].reshape(-1)
    pieces = [None if a is None else a[samples] for a in tensors]
    return (*pieces, positions, *(None if a is None else a[rows] for a in (mean, rstd)))


def output(out: Array, x: Array, laid_out: Array, inputs: tuple[Array | None, ...]) -> tuple[Array, Array]:
    """Where the kernel writes: `out` if it lies right, else a fresh array that `deliver` copies from. And `out`."""
    out = beside(out, "out", x)
    if out.shape != x.shape:
        raise ValueError(f"out must have x's shape {x.shape}, got {out.shape}")
    if out.dtype != laid_out.dtype and out.dtype.newbyteorder("=") != laid_out.dtype:
        raise TypeError(f"out must have x's dtype {x.dtype}, got {out.dtype}")
    if not arrays.is_writeable(out):
        raise ValueError("out is read-only")
    if out.size and 0 in out.strides and any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True)):
        raise ValueError("out overlaps itself: one of its strides is 0")
    if not _C.apart(out, inputs) and any(a is not None and arrays.overlaps(out, a) for a in inputs):
        raise ValueError("out overlaps an input partly; it must be that input itself or lie apart from it")
    if out.strides == laid_out.strides and arrays.is_plain(out):
        return out, out
    return arrays.empty_like(laid_out), out


def deliver(result: Array, out: Array | None, x: Array) -> Array:
    """What the caller gets: `out`, or an array that lies as x does if x is dense, else C-ordered."""
    if out is result:
        return result
    if out is None:
        is_dense = fold.memory_order(x.shape, x.strides, x.itemsize) is not None
        out = arrays.empty(x.shape, result.dtype, x.strides if is_dense else None, beside=x)
        if out.strides == result.strides:
            return result
    out[...] = result
    return out


def kept_first(x: Array, reduced: frozenset[int]) -> tuple[Array, tuple[int, ...], Fold, tuple[int, ...]]:
    """x in the order it lies in, or a copy with the kept axes first, and which axis of x each of its axes is; its fold;
    and the axes that its statistics run over, in their order."""
    order = fold.memory_order(x.shape, x.strides, x.itemsize)
    found = None if order is None else fold.reduction(x.shape, order, reduced)
    if order is not None and found is not None:
        if not arrays.is_plain(x):  # in the same order, so that it has the same bits as an aligned array
            x = x.astype(x.dtype.newbyteorder("="), order="K")
        return x, tuple(range(x.ndim)), found, tuple(a for a in order if a not in reduced)
    kept = tuple(a for a in range(x.ndim) if a not in reduced)
    axes = (*kept, *sorted(reduced))
    moved = x.transpose(axes)
    x = arrays.empty(moved.shape, x.dtype.newbyteorder("="), beside=x)
    x[...] = moved
    s, n = math.prod(x.shape[: len(kept)]), math.prod(x.shape[len(kept) :])
    return x, axes, Fold(1, 1, s, n, n), kept


def axes(axes: int | Sequence[int], ndim: int) -> frozenset[int]:
    """The axes to reduce, counted from the first."""
    wanted = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    for a in wanted:
        integer("axes", a)
        if not -ndim <= a < ndim:
            raise np.exceptions.AxisError(a, ndim)
    unique = frozenset(int(a) % ndim for a in wanted)
    if len(unique) != len(wanted):
        raise ValueError(f"duplicate value in axes {wanted}")
    return unique
