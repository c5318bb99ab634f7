"""The norms as functions: fold, allocate, verb.

Names, argument order and error words follow PyTorch's functional API; `axis`, the axis that is *kept*, comes from Keras
and TensorFlow. Shapes below: N samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fusednorm import _C, arrays, fold
from fusednorm.arrays import Array

Activation = str | tuple[str, float] | None

# The codes of csrc/core/epilogue.h.
_ACTIVATIONS: dict[Activation, tuple[int, float]] = {
    None: (0, 0.0),
    "relu": (1, 0.0),
    "leaky_relu": (2, 0.01),
    "silu": (3, 0.0),
    "sigmoid": (4, 0.0),
    "tanh": (5, 0.0),
}
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def _activation(activation: Activation) -> tuple[int, float]:
    try:
        return _ACTIVATIONS[activation]
    except (KeyError, TypeError):
        pass
    if isinstance(activation, tuple) and len(activation) == 2 and activation[0] == "leaky_relu":
        slope = float(activation[1])
        if math.isfinite(slope):
            return 2, slope
    names = ", ".join(str(name) for name in _ACTIVATIONS if name)
    raise ValueError(f'activation must be one of {names} or ("leaky_relu", slope), not {activation!r}')


def _floating(name: str, dtype: np.dtype[Any]) -> None:
    if not arrays.is_floating(dtype):
        raise TypeError(f"{name} has dtype {dtype}; float32, float64, float16 and bfloat16 are taken")


def _ghost(ghost: object) -> None:
    if ghost is not None and (isinstance(ghost, bool) or not isinstance(ghost, int | np.integer) or ghost < 1):
        raise ValueError(f"ghost_batch_size must be a positive integer or None, not {ghost!r}")


class _Layout(NamedTuple):
    """How an array is folded: one fold for the whole, or two where the last ghost batch is shorter."""

    channels: int
    fold: fold.Fold
    rest: fold.Fold | None  # the last, shorter ghost batch
    split: int  # samples before it
    sample_axis: int
    ghosts: int | None  # statistics per channel; None: no ghost batches asked for
    fewest: int  # elements that the smallest statistic is taken over


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], axis: int, ghost: int | None
) -> _Layout | None:
    """The folds of an array, or None where it must first be copied to C order. Cached: a model has few shapes."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"expected at least 2D input (got {ndim}D input)")
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    _floating("x", dtype)
    axis %= ndim
    order = fold.memory_order(shape, strides, dtype.itemsize)
    if order is None or not dtype.isnative:
        return None
    sample_axis = 1 if axis == 0 else 0
    samples = shape[sample_axis]
    per_sample = 1
    for a, n in enumerate(shape):
        per_sample *= n if a not in (axis, sample_axis) else 1
    if ghost is None:
        whole_fold = fold.batch(shape, order, axis)
        return _Layout(shape[axis], whole_fold, None, samples, sample_axis, None, samples * per_sample)
    if samples > 1 and order and order[0] != sample_axis and 0 not in shape:
        return None
    full, left = divmod(samples, ghost)
    whole, rest = list(shape), list(shape)
    whole[sample_axis], rest[sample_axis] = full * ghost, left
    return _Layout(
        shape[axis],
        fold.batch(whole, order, axis, max(full, 1)),
        fold.batch(rest, order, axis) if left else None,
        full * ghost,
        sample_axis,
        full + (left > 0),
        (left or ghost) * per_sample if samples else 0,
    )


def _dense(x: Array, axis: int, ghost: int | None) -> tuple[Array, _Layout]:
    """`x`, or a C-ordered copy of it, with its folds."""
    if ghost is not None:
        _ghost(ghost)
    layout = _layout(x.shape, x.strides, x.dtype, axis, ghost)
    if layout is None or not arrays.is_plain(x):
        copy = arrays.empty(x.shape, x.dtype.newbyteorder("="), beside=x)
        copy[...] = x
        x = copy
        layout = _layout(x.shape, x.strides, x.dtype, axis, ghost)
        if layout is None:  # samples are not the slowest axis in C order
            order = (1, 0, *range(2, x.ndim))
            x = arrays.namespace(x).ascontiguousarray(x.transpose(order)).transpose(order)
            layout = _layout(x.shape, x.strides, x.dtype, axis, ghost)
            assert layout is not None
    return x, layout


def _alike(a: object, name: str, x: Array, laid_out: Array) -> Array:
    """An operand with x's shape and dtype, in memory like `laid_out`."""
    a = arrays.taken(a, name)
    arrays.expect_beside(a, name, x)
    if a.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {a.shape}")
    if a.dtype.newbyteorder("=") != laid_out.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {a.dtype}")
    return arrays.laid_out_like(a, laid_out)


def _positions(mask: object, x: Array, axis: int) -> Array:
    """The mask of x's positions, flat, in the order in which the dense array `x` holds them."""
    mask = arrays.taken(mask, "mask")
    arrays.expect_beside(mask, "mask", x)
    expected = x.shape[: axis % x.ndim] + x.shape[axis % x.ndim + 1 :]
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, not {mask.dtype}")
    if mask.shape != expected:
        raise ValueError(f"mask must have x's shape without axis {axis}, {expected}, got {mask.shape}")
    order = fold.memory_order(x.shape, x.strides, x.itemsize) or ()
    full: Array = mask[(*(slice(None),) * (axis % x.ndim), None)]
    return full.transpose((*order, *(a for a in range(x.ndim) if a not in order))).ravel()


def _output(out: Array | None, x: Array, laid_out: Array, inputs: tuple[Array | None, ...]) -> Array:
    """Where the kernel writes: `out` itself if it lies right, else a fresh array that `_deliver` copies from."""
    if out is None:
        return arrays.empty_like(laid_out)
    out = arrays.taken(out, "out")
    arrays.expect_beside(out, "out", x)
    if out.shape != x.shape:
        raise ValueError(f"out must have x's shape {x.shape}, got {out.shape}")
    if out.dtype.newbyteorder("=") != laid_out.dtype:
        raise TypeError(f"out must have x's dtype {x.dtype}, got {out.dtype}")
    if not arrays.is_writeable(out):
        raise ValueError("out is read-only")
    if out.size and 0 in out.strides and any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True)):
        raise ValueError("out overlaps itself: one of its strides is 0")
    if not _C.apart(out, inputs) and any(a is not None and arrays.overlaps(out, a) for a in inputs):
        raise ValueError("out overlaps an input partly; it must be that input itself or lie apart from it")
    if out.strides == laid_out.strides and arrays.is_plain(out):
        return out
    return arrays.empty_like(laid_out)


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or out is result:
        return result
    out[...] = result
    return out


@arrays.on_its_device
def _forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    counted: int,
    eps: float,
    axis: int,
    residual: Array | None,
    activation: Activation,
    ghost: int | None,
    mask: Array | None,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    """`counted` ≥ 0: momentum is 1/(counted + k) for the k-th batch, a cumulative average."""
    given = x if type(x) is np.ndarray else arrays.taken(x, "x")
    code, slope = (0, 0.0) if activation is None else _activation(activation)
    if momentum is None:
        raise TypeError("momentum must be a number; only a layer takes None, for a cumulative average")
    x, layout = _dense(given, axis, ghost)
    if training:
        if layout.fewest == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if not eps > 0:
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    elif running_mean is None or running_var is None:
        raise ValueError("Expected running_mean and running_var to be defined when training=False")
    if residual is not None:
        residual = _alike(residual, "residual", given, x)
    weight, bias = arrays.beside(weight, "weight", x), arrays.beside(bias, "bias", x)
    running_mean = arrays.beside(running_mean, "running_mean", x)
    running_var = arrays.beside(running_var, "running_var", x)
    out = arrays.beside(out, "out", x)
    positions = None if mask is None else _positions(mask, x, axis)
    if out is None and residual is None:
        y = arrays.empty_like(x)
    else:
        y = _output(out, given, x, (given, residual, weight, bias, running_mean, running_var))
    if layout.ghosts is None:
        mean, rstd = arrays.statistics(x, layout.channels)
        queue = arrays.queue(x, layout.fold)
        _C.forward(
            layout.fold, x, weight, bias, running_mean, running_var, residual, positions, y, mean, rstd,
            training, momentum, counted, False, eps, code, slope, *queue,
        )  # fmt: skip
        if queue is not arrays.CPU:
            arrays.launched(queue, y, mean, rstd, positions)
        return y if out is None else _deliver(y, out), mean, rstd

    mean, rstd = arrays.empty((2, layout.ghosts, layout.channels), _FLOAT64, beside=x)
    if not training:  # the running statistics serve every ghost batch alike
        if layout.ghosts:
            whole = fold.batch(x.shape, fold.memory_order(x.shape, x.strides, x.itemsize) or (), axis % x.ndim)
            queue = arrays.queue(x, whole)
            _C.forward(
                whole, x, weight, bias, running_mean, running_var, residual, None, y, mean[0], rstd[0],
                False, momentum, counted, False, eps, code, slope, *queue,
            )  # fmt: skip
            arrays.launched(queue, y, mean, rstd)
            mean[1:], rstd[1:] = mean[:1], rstd[:1]
        return _deliver(y, out), mean, rstd
    for part, fold_of_part, statistics in _parts(layout):
        queue = arrays.queue(x, fold_of_part)
        _C.forward(
            fold_of_part, x[part], weight, bias, running_mean, running_var,
            None if residual is None else residual[part], _part_of(positions, part, x), y[part],
            mean[statistics], rstd[statistics],
            training, momentum, counted if counted < 0 else counted + statistics.start, False, eps, code, slope, *queue,
        )  # fmt: skip
        arrays.launched(queue, y, mean, rstd, positions)
    return _deliver(y, out), mean, rstd


def _parts(layout: _Layout) -> list[tuple[tuple[slice, ...], fold.Fold, slice]]:
    """The full ghost batches and the shorter last one: which samples, their fold, their rows of the statistics."""
    before = (slice(None),) * layout.sample_axis
    full = (layout.ghosts or 0) - (layout.rest is not None)
    parts = [((*before, slice(0, layout.split)), layout.fold, slice(0, full))] if full else []
    if layout.rest is not None:
        parts.append(((*before, slice(layout.split, None)), layout.rest, slice(full, full + 1)))
    return parts


def _part_of(positions: Array | None, part: tuple[slice, ...], x: Array) -> Array | None:
    """The positions of the samples in `part`; samples are the slowest axis of what has ghost batches."""
    return None if positions is None else positions.reshape(x.shape[len(part) - 1], -1)[part[-1]].ravel()


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Array | None = None,
    activation: Activation = None,
    ghost_batch_size: int | None = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Batch normalization (Ioffe & Szegedy 2015): ``y = act((x − mean)·rstd·weight + bias + residual)``.

    Parameters
    ----------
    x : (N, C), (N, C, *spatial) or any other place of C
        float32, float64, float16 or bfloat16, at least 2-D. Dense arrays of any axis order are read where they
        lie; others through a copy.
    weight, bias : (C,), optional
        Any of the four dtypes, whatever x's.
    running_mean, running_var : (C,), optional
        Updated in place when training: ``new = (1 − momentum)·old + momentum·batch``, the variance with n − 1. Used,
        and needed, when not training. What is updated must not share memory with the other, nor with weight or bias.
    training : bool
        Whether the statistics are the batch's or the running ones.
    axis : int
        The axis that keeps its own statistics; -1 for channels last.
    residual : like x, optional
        Added before the activation.
    activation : "relu", "leaky_relu", "silu", "sigmoid", "tanh" or ("leaky_relu", slope), optional
        The slope is 0.01 unless given.
    ghost_batch_size : int, optional
        Statistics over that many consecutive samples instead of the whole batch (Hoffer et al. 2017), as if called on
        each slice in turn; the last may be shorter.
    mask : bool, shape of x without `axis`, optional
        True where a position counts for the statistics; y is computed everywhere. A statistic over fewer than two
        counted elements leaves the running ones as they are.
    out : like x, optional
        Where y goes, any strides. It may be x or residual itself; a backward needs the original x.

    Returns
    -------
    y : like x
    mean, rstd : float64, (C,) or, with ghost batches, (⌈N / ghost_batch_size⌉, C)
        What the backward needs: ``rstd = 1/√(variance + eps)``, the variance with n. Float64, since a mean rounded to
        float32 costs the gradients their digits where mean/σ is large.

    Raises
    ------
    ValueError
        One value per channel in training, eps ≤ 0 in training, sizes that do not fit, running statistics missing in
        evaluation, an array to be written that is read-only or shares memory with another. AxisError for the axis.
    TypeError
        Arrays of another kind, other dtypes, momentum None.

    Notes
    -----
    float32 and bfloat16 x lose digits at the end of float32's range. Where σ is above 3e34, ``x − mean`` might overflow
    and is not formed: x̂ is then off by up to ``6e-8·(|x| + |mean|)·rstd``, which is much if the mean is many σ away.
    Where ``|weight·rstd|`` is below 1.2e-38 (σ = 1e36 with a weight of 1e-3), it is rounded to a multiple of 1.4e-45,
    and y is off by up to ``7e-46/|weight·rstd|`` of itself.
    """
    return _forward(
        x, weight, bias, running_mean, running_var, training, momentum, -1, eps, axis, residual, activation,
        ghost_batch_size, mask, out,
    )  # fmt: skip


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: Array | None = None,
    activation: Activation = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Batch normalization in the order of ``torch.nn.functional.batch_norm``; see :func:`batch_norm_forward`."""
    return _forward(
        x, weight, bias, running_mean, running_var, training, momentum, -1, eps, axis, residual, activation, None, mask,
        out,
    )[0]  # fmt: skip


def _statistics(a: object, name: str, shape: tuple[int, ...], x: Array) -> Array:
    a = arrays.taken(a, name)
    arrays.expect_beside(a, name, x)
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {a.shape}")
    _floating(name, a.dtype)
    return arrays.namespace(a).asarray(a, np.float64, order="C")  # type: ignore[no-any-return]


@arrays.on_its_device
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = True,
    axis: int = 1,
    residual: Array | None = None,
    activation: Activation = None,
    ghost_batch_size: int | None = None,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients of :func:`batch_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x, weight, bias, residual, axis, activation, ghost_batch_size, mask
        As in the forward. bias and residual serve to rebuild the activation's derivative; without an activation their
        values do not matter.
    mean, rstd : as returned by the forward
    training : bool
        False where mean and rstd were constants (evaluation, frozen statistics): then ``dx = dy·act'·weight·rstd``.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
    dweight, dbias : (C,)
        In the parameter's dtype; without one float32, for float64 x float64.
    dresidual : like x
        Only where a residual was given.

    Raises
    ------
    ValueError, TypeError
        As the forward.
    """
    given = arrays.taken(x, "x")
    code, slope = _activation(activation)
    x, layout = _dense(given, axis, ghost_batch_size)
    dy = _alike(dy, "dy", given, x)
    shape = (layout.channels,) if layout.ghosts is None else (layout.ghosts, layout.channels)
    mean, rstd = _statistics(mean, "mean", shape, x), _statistics(rstd, "rstd", shape, x)
    if residual is not None:
        residual = _alike(residual, "residual", given, x)
    positions = None if mask is None else _positions(mask, x, axis)
    weight = None if weight is None else arrays.taken(weight, "weight")
    bias = None if bias is None else arrays.taken(bias, "bias")
    out = arrays.beside(out, "out", x)
    dx = _output(out, given, x, (given, dy, residual, weight, bias))
    dresidual = None if residual is None else arrays.empty_like(x)
    default = _FLOAT64 if x.dtype == _FLOAT64 else _FLOAT32
    dweight = arrays.empty((layout.channels,), default if weight is None else weight.dtype, beside=x)
    dbias = arrays.empty((layout.channels,), default if bias is None else bias.dtype, beside=x)
    if layout.ghosts is None:
        queue = arrays.queue(x, layout.fold)
        _C.backward(
            layout.fold, dy, x, mean, rstd, weight, bias, residual, positions, not training, code, slope,
            dx, dresidual, dweight, dbias, *queue,
        )  # fmt: skip
        if queue is not arrays.CPU:
            arrays.launched(queue, dx, dresidual, dweight, dbias, mean, rstd, positions)
    else:
        dweight[...], dbias[...] = 0, 0
        sums = arrays.namespace(x).zeros((2, 2, layout.channels))
        for i, (part, fold_of_part, statistics) in enumerate(_parts(layout)):
            queue = arrays.queue(x, fold_of_part)
            _C.backward(
                fold_of_part, dy[part], x[part], mean[statistics], rstd[statistics], weight, bias,
                None if residual is None else residual[part], _part_of(positions, part, x), not training, code, slope,
                dx[part],
                None if dresidual is None else dresidual[part], sums[i, 0], sums[i, 1], *queue,
            )  # fmt: skip
            arrays.launched(queue, dx, dresidual, sums, mean, rstd, positions)
        dweight[...], dbias[...] = sums[0] + sums[1]
    dx = _deliver(dx, out)
    return (dx, dweight, dbias) if dresidual is None else (dx, dweight, dbias, dresidual)


def _shape_of(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int | np.integer):
        return (int(normalized_shape),)
    shape = tuple(map(int, normalized_shape))
    if not shape:
        raise ValueError("Expected normalized_shape to be at least 1-dimensional, but got normalized_shape=[]")
    return shape


def _normalized(x: Array, normalized_shape: int | Sequence[int], **parameters: Array | None) -> tuple[int, ...]:
    """The lengths of the normalized axes, the last ones; parameters must have that shape."""
    shape = _shape_of(normalized_shape)
    if x.shape[-len(shape) :] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(
            f"Given normalized_shape={list(shape)}, expected input with shape [*, {expected}], but got input of "
            f"size{list(x.shape)}"
        )
    for name, a in parameters.items():
        if a is not None and a.shape != shape:
            raise ValueError(f"Expected {name} to be of same shape as normalized_shape, but got {a.shape} and {shape}")
    return shape


class _Lines(NamedTuple):
    """How an array is seen as lines, one after the other in memory, and where the lines' statistics belong."""

    fold: fold.Fold
    kept: tuple[int, ...]  # lengths of the axes that are not normalized
    order: tuple[int, ...] | None  # of these axes in memory; None: as they are

    def shaped(self, statistic: Array) -> Array:
        """From the lines' order to that of the kept axes."""
        if self.order is None:
            return statistic.reshape(self.kept)
        lying = statistic.reshape([self.kept[a] for a in self.order]).transpose(np.argsort(self.order).tolist())
        return np.ascontiguousarray(lying)

    def flat(self, statistic: Array) -> Array:
        """And back."""
        return (statistic if self.order is None else statistic.transpose(self.order)).ravel()


@lru_cache(maxsize=4096)
def _line_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], normalized: int
) -> _Lines | None:
    """None where the array must first be copied to C order."""
    _floating("x", dtype)
    order = fold.memory_order(shape, strides, dtype.itemsize)
    found = None if order is None else fold.layer(shape, order, normalized)
    if order is None or found is None or not dtype.isnative:
        return None
    kept = shape[: len(shape) - normalized]
    long = [a for a in order if a < len(kept)]
    as_lying = (*(a for a in range(len(kept)) if a not in long), *long)
    return _Lines(found, kept, None if long == sorted(long) else as_lying)


def _lines(x: Array, normalized: int) -> tuple[Array, _Lines]:
    """`x`, or a C-ordered copy of it, and its lines."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x is on {arrays.device(x)}: layer and RMS norm run on the CPU only")
    lines = _line_layout(x.shape, x.strides, x.dtype, normalized)
    if lines is None or not arrays.is_plain(x):
        copy = arrays.empty(x.shape, x.dtype.newbyteorder("="))
        copy[...] = x
        return _lines(copy, normalized)
    return x, lines


def _line(parameter: Array | None) -> Array | None:
    return None if parameter is None else parameter.reshape(-1)


def _line_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    center: bool,
    out: Array | None,
) -> tuple[Array, Array | None, Array]:
    given = arrays.taken(x, "x")
    weight = None if weight is None else arrays.taken(weight, "weight")
    bias = None if bias is None else arrays.taken(bias, "bias")
    x, lines = _lines(given, len(_normalized(given, normalized_shape, weight=weight, bias=bias)))
    y = _output(out, given, x, (given, weight, bias))
    mean, rstd = arrays.statistics(x, lines.fold.statistics)
    _C.forward(
        lines.fold, x, _line(weight), _line(bias), None, None, None, None, y, mean if center else None, rstd,
        True, 0.0, -1, False, eps, 0, 0.0,
    )  # fmt: skip
    if x is not given and out is None:
        y = arrays.laid_out_like(y, arrays.empty_like(given))
    return _deliver(y, out), lines.shaped(mean) if center else None, lines.shaped(rstd)


def _line_backward(
    dy: Array,
    x: Array,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
) -> tuple[Array, Array, Array]:
    given = arrays.taken(x, "x")
    weight = None if weight is None else arrays.taken(weight, "weight")
    bias = None if bias is None else arrays.taken(bias, "bias")
    rstd = arrays.taken(rstd, "rstd")
    shape = _normalized(given, given.shape[rstd.ndim :], weight=weight, bias=bias)
    x, lines = _lines(given, len(shape))
    dy = _alike(dy, "dy", given, x)
    mean = None if mean is None else lines.flat(_statistics(mean, "mean", lines.kept, x))
    rstd = lines.flat(_statistics(rstd, "rstd", lines.kept, x))
    dx = _output(out, given, x, (given, dy, weight))
    default = _FLOAT64 if x.dtype == _FLOAT64 else _FLOAT32
    dweight = np.empty(shape, default if weight is None else weight.dtype)
    dbias = np.empty(shape, default if bias is None else bias.dtype)
    _C.backward(
        lines.fold, dy, x, mean, rstd, _line(weight), None, None, None, False, 0, 0.0, dx, None, dweight.reshape(-1),
        dbias.reshape(-1),
    )  # fmt: skip
    if x is not given and out is None:
        dx = arrays.laid_out_like(dx, arrays.empty_like(given))
    return _deliver(dx, out), dweight, dbias


def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Layer normalization in the order of ``torch.nn.functional.layer_norm``; see :func:`layer_norm_forward`."""
    return _line_forward(x, normalized_shape, weight, bias, eps, True, out)[0]


def layer_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Layer normalization (Ba, Kiros & Hinton 2016): ``y = (x − mean)·rstd·weight + bias`` over the last axes.

    Parameters
    ----------
    x : (..., *normalized_shape)
        float32, float64, float16 or bfloat16. Read where it lies if the normalized axes are the fastest in memory, else
        through a copy.
    normalized_shape : int or sequence of ints
        The lengths of the last axes, over which the statistics are taken.
    weight, bias : (*normalized_shape,), optional
        Any of the four dtypes, whatever x's.
    eps : float
        Added to the variance.
    out : like x, optional
        Where y goes; it may be x itself. A backward needs the original x.

    Returns
    -------
    y : like x
    mean, rstd : float64, x's shape without the normalized axes
        What the backward needs: ``rstd = 1/√(variance + eps)``.

    Raises
    ------
    ValueError
        Shapes that do not fit; an `out` that is read-only or shares memory with another array.
    TypeError
        Arrays of another kind, other dtypes.
    """
    y, mean, rstd = _line_forward(x, normalized_shape, weight, bias, eps, True, out)
    assert mean is not None
    return y, mean, rstd


def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`layer_norm_forward`: dx like x, dweight and dbias in normalized_shape.

    dy is like x, its memory layout may differ. mean and rstd are the forward's; the axes of x that they lack are the
    normalized ones. bias only says which dtype its gradient has.
    `out`, where dx goes, may be dy or x itself. dweight and dbias are in the parameter's dtype; without one float32,
    for float64 x float64. Raises as the forward.
    """
    return _line_backward(dy, x, mean, rstd, weight, bias, out)


def _finfo_eps(dtype: np.dtype[Any]) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """RMS normalization in the order of ``torch.nn.functional.rms_norm``; see :func:`rms_norm_forward`."""
    return rms_norm_forward(x, normalized_shape, weight, eps, out=out)[0]


def rms_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """RMS normalization (Zhang & Sennrich 2019): ``y = x·rstd·weight`` with ``rstd = 1/√(Σx²/n + eps)``.

    Arguments and errors are those of :func:`layer_norm_forward`; eps None is ``finfo(x.dtype).eps``.
    Returns y and rstd.
    """
    x = arrays.taken(x, "x")
    _floating("x", x.dtype)
    eps = _finfo_eps(x.dtype) if eps is None else eps
    y, _, rstd = _line_forward(x, normalized_shape, weight, None, eps, False, out)
    return y, rstd


def rms_norm_backward(
    dy: Array,
    x: Array,
    rstd: Array,
    weight: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Gradients of :func:`rms_norm_forward`, dx and dweight; arguments as in :func:`layer_norm_backward`."""
    return _line_backward(dy, x, None, rstd, weight, None, out)[:2]


def _kept_first(x: Array, reduced: frozenset[int]) -> tuple[Array, tuple[int, ...], fold.Fold, tuple[int, ...]]:
    """x as it lies, or a copy with the kept axes first, and which axis of x each of its axes is; its fold; and the axes
    that its statistics run over, in their order."""
    order = fold.memory_order(x.shape, x.strides, x.itemsize) if arrays.is_plain(x) else None
    found = None if order is None else fold.reduction(x.shape, order, reduced)
    if order is not None and found is not None:
        return x, tuple(range(x.ndim)), found, tuple(a for a in order if a not in reduced)
    kept = tuple(a for a in range(x.ndim) if a not in reduced)
    axes = (*kept, *sorted(reduced))
    moved = x.transpose(axes)
    x = arrays.empty(moved.shape, x.dtype.newbyteorder("="), beside=x)
    x[...] = moved
    s, n = math.prod(x.shape[: len(kept)]), math.prod(x.shape[len(kept) :])
    return x, axes, fold.Fold(1, 1, s, n, n), kept


def _axes(axes: int | Sequence[int], ndim: int) -> frozenset[int]:
    wanted = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    for a in wanted:
        if not -ndim <= a < ndim:
            raise np.exceptions.AxisError(a, ndim)
    unique = frozenset(int(a) % ndim for a in wanted)
    if len(unique) != len(wanted):
        raise ValueError(f"duplicate value in axes {wanted}")
    return unique


@arrays.on_its_device
def _moments(x: Array, axes: int | Sequence[int]) -> tuple[float, Array, Array, frozenset[int]]:
    """n, mean and m2 with the reduced axes kept as 1."""
    x = arrays.taken(x, "x")
    _floating("x", x.dtype)
    reduced = _axes(axes, x.ndim)
    shape = x.shape
    dense, _, folded, kept = _kept_first(x, reduced)
    count, mean, m2 = arrays.empty((3, folded.statistics), _FLOAT64, beside=x)
    queue = arrays.queue(dense, folded)
    _C.moments(folded, dense, None, True, count, mean, m2, *queue)
    arrays.launched(queue, dense, count, mean, m2)
    # From the fold's order of the kept axes to x's; axes of length 1 lie anywhere.
    full = tuple(a for a in range(x.ndim) if a not in kept)
    xp = arrays.namespace(x)
    inverse = tuple(np.argsort((*kept, *full)).tolist())

    def shaped(a: Array) -> Array:
        lying = a.reshape(tuple(shape[k] for k in kept) + (1,) * len(full))
        return xp.ascontiguousarray(lying.transpose(inverse))  # type: ignore[no-any-return]

    n = 1
    for a in reduced:
        n *= shape[a]
    return float(n), shaped(mean), shaped(m2), reduced


@arrays.on_its_device
def moments(
    x: Array, axes: int | Sequence[int], *, correction: float = 0, keepdims: bool = False
) -> tuple[Array, Array]:
    """Mean and variance over `axes` (the axes that are *reduced*), as ``tf.nn.moments``.

    Welford's update (1962), a block at a time, as Chan, Golub & LeVeque (1979) generalize it: the variance keeps its
    digits at any mean/σ. Divided by ``n − correction``; NaN where that is not positive.

    Returns
    -------
    mean, variance : float64
        Shape of x without `axes`, or with 1 in their place.

    Raises
    ------
    TypeError
        Not an array of float32, float64, float16 or bfloat16.
    ValueError
        An axis twice; AxisError for one that is not there.
    """
    n, mean, m2, reduced = _moments(x, axes)
    divisor = n - correction
    variance = m2 / divisor if divisor > 0 else arrays.namespace(m2).full_like(m2, np.nan)
    if n == 0:
        mean = arrays.namespace(mean).full_like(mean, np.nan)
    if not keepdims:
        mean, variance = mean.squeeze(tuple(reduced)), variance.squeeze(tuple(reduced))
    return mean, variance


@arrays.on_its_device
def batch_normalization(
    x: Array, mean: Array, variance: Array, offset: Array | None, scale: Array | None, variance_epsilon: float
) -> Array:
    """TensorFlow's ``tf.nn.batch_normalization``: ``(x − mean)/√(variance + variance_epsilon)·scale + offset``.

    mean, variance, offset and scale broadcast against x: (C,) for channels last, or with 1 on the axes they do not vary
    along. offset and scale may be None.

    Raises
    ------
    ValueError
        Shapes that do not broadcast to x's.
    TypeError
        Arrays of another kind or dtype.
    """
    x = arrays.taken(x, "x")
    named = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    given = {name: arrays.taken(a, name) for name, a in named.items() if a is not None or name in ("mean", "variance")}
    _floating("x", x.dtype)
    xp = arrays.namespace(x)
    for name, a in given.items():
        arrays.expect_beside(a, name, x)
        _floating(name, a.dtype)
        if a.ndim > x.ndim or any(n not in (1, m) for n, m in zip(a.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(f"{name} of shape {a.shape} does not broadcast to x's shape {x.shape}")
    union = np.broadcast_shapes((1,) * x.ndim, *(a.shape for a in given.values()))
    reduced = frozenset(a for a in range(x.ndim) if union[a] == 1)
    dense, axes, folded, kept = _kept_first(x, reduced)

    def flat(name: str) -> Array | None:
        if name not in given:
            return None
        a = xp.broadcast_to(given[name].astype(np.float64), union).transpose(*kept, *(set(range(x.ndim)) - set(kept)))
        dense_a: Array = xp.ascontiguousarray(a)
        return dense_a.reshape(folded.batch, folded.groups)

    m, v, b, w = (flat(name) for name in named)
    assert m is not None
    assert v is not None
    r = 1 / xp.sqrt(v + variance_epsilon)
    y = arrays.empty_like(dense)
    # One channel a group: each batch entry, which has parameters of its own, is a call.
    one = fold.Fold(1, folded.outer, folded.groups, folded.inner, folded.span)
    entries = zip(dense.ravel("K").reshape(folded.batch, -1), y.ravel("K").reshape(folded.batch, -1), strict=True)
    for i, (x_entry, y_entry) in enumerate(entries):
        wi, bi = None if w is None else w[i], None if b is None else b[i]
        queue = arrays.queue(x_entry, one)
        _C.normalize(one, x_entry, m[i], r[i], wi, bi, None, 0, 0.0, y_entry, *queue)
        arrays.launched(queue, x_entry, y_entry, m, r, wi, bi)
    return y if dense is x else xp.ascontiguousarray(y.transpose(tuple(np.argsort(axes).tolist())))
