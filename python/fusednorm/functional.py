"""The norms as functions. All of them are one pass forward and one backward, over different folds.

===================  ============================================  =========================  ==========================
norm                 a statistic of                                fold, channels first       saved statistics
===================  ============================================  =========================  ==========================
batch                each channel                                  (1, N, C, HW, HW)          (C,)
batch, ghosts        each channel of B samples, the last part      (N/B, B, C, HW, HW) and    (⌈N/B⌉, C)
                     shorter                                       (1, N mod B, C, HW, HW)
instance             each channel of each sample                   (N, 1, C, HW, HW)          (N, C)
group                each group of channels of each sample         (N, 1, G, C/G·HW, HW)      (N, G)
layer, RMS           each line of the last axes                    (M, 1, 1, D, 1)            x's shape without these
weight               each index of `dim`                           (1, A, O, B, B)            (O,)
switchable           as instance, and merged from these            (N, 1, C, HW, HW)          (3, N, C), (N, C)
===================  ============================================  =========================  ==========================

The other memory layouts are in fold.py. RMS and weight norm take the mean as 0. So a norm is its layout function, which
says the above of an array, and a signature; :func:`_forward` and :func:`_backward` are the same for all.

Names, argument order and error words follow PyTorch's functional API; `axis`, the axis that is *kept*, comes from Keras
and TensorFlow. Shapes: N samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fusednorm import _C, arrays, fold, foreign, operands
from fusednorm.arrays import Array
from fusednorm.operands import FLOAT64, Layout, LayoutOf, Part

Activation = str | tuple[str, float] | None
_DType = np.dtype[Any]
_Shape = tuple[int, ...]

# The codes of csrc/core/epilogue.h.
_ACTIVATIONS: dict[Activation, tuple[int, float]] = {
    None: (0, 0.0),
    "relu": (1, 0.0),
    "leaky_relu": (2, 0.01),
    "silu": (3, 0.0),
    "sigmoid": (4, 0.0),
    "tanh": (5, 0.0),
}


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


def _check_ghosts(ghost: object) -> None:
    if ghost is not None and (isinstance(ghost, bool) or not isinstance(ghost, int | np.integer) or ghost < 1):
        raise ValueError(f"ghost_batch_size must be a positive integer or None, not {ghost!r}")


def _check_correction(correction: object) -> None:
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1, not {correction!r}")


@lru_cache(maxsize=4096, typed=True)
def _batch(shape: _Shape, strides: _Shape, dtype: _DType, axis: int, ghost: int | None) -> Layout | None:
    _check_ghosts(ghost)
    axis, samples = operands.channel_axis(shape, axis)
    order = operands.order(shape, strides, dtype)
    n, channels = shape[samples], shape[axis]
    if order is None or (ghost and n > 1 and 0 not in shape and order[0] != samples):
        return None
    parts = _ghosts(shape, order, axis, samples, ghost) if ghost else (Part(fold.batch(shape, order, axis)),)
    fewest = min((part.fold.per_statistic for part in parts), default=0)
    few = f"Expected more than 1 value per channel when training, got input size {shape}" if fewest == 1 else ""
    saved = (-(-n // ghost), channels) if ghost else (channels,)
    return Layout(parts, saved, (channels,), axis, too_few=few, evaluation="training=False", positive_eps=True)


def _ghosts(shape: _Shape, order: _Shape, axis: int, samples: int, size: int) -> tuple[Part, ...]:
    """The full ghost batches and the shorter last one."""
    n, full = shape[samples], shape[samples] // size
    parts = []
    for first, ghosts, start, stop in ((0, full, 0, full * size), (full, 1, full * size, n)):
        if stop > start:
            cut = (*shape[:samples], stop - start, *shape[samples + 1 :])
            index = None if stop - start == n else (*(slice(None),) * samples, slice(start, stop))
            parts.append(Part(fold.batch(cut, order, axis, ghosts), index, first))
    return tuple(parts)


@lru_cache(maxsize=4096, typed=True)
def _group(shape: _Shape, strides: _Shape, dtype: _DType, axis: int, groups: int) -> Layout | None:
    axis, samples = operands.channel_axis(shape, axis)
    order = operands.order(shape, strides, dtype)
    _check_groups(shape[axis], groups)
    found = None if order is None else fold.group(shape, order, axis, groups)
    return None if found is None else Layout((Part(found),), (shape[samples], groups), (shape[axis],), axis)


def _check_groups(channels: int, groups: int) -> None:
    operands.integer("num_groups", groups)
    if groups < 1:
        raise ValueError(f"Expected num groups to be greater than 0, got {groups}")
    if channels % groups:
        raise ValueError(f"num_channels ({channels}) must be divisible by num_groups ({groups})")


@lru_cache(maxsize=4096, typed=True)
def _instance(shape: _Shape, strides: _Shape, dtype: _DType, axis: int) -> Layout | None:
    axis, samples = operands.channel_axis(shape, axis)
    order = operands.order(shape, strides, dtype)
    found = None if order is None else fold.group(shape, order, axis, shape[axis])
    if found is None:
        return None
    pixels = math.prod(shape[a] for a in range(len(shape)) if a not in (axis, samples))
    few = f"Expected more than 1 spatial element when training, got input size {shape}" if pixels == 1 else ""
    return Layout(
        (Part(found),),
        (shape[samples], shape[axis]),
        (shape[axis],),
        axis,
        too_few=few,
        evaluation="use_input_stats is false",
    )


@lru_cache(maxsize=4096, typed=True)
def _switchable(shape: _Shape, strides: _Shape, dtype: _DType, axis: int) -> Layout | None:
    layout = _instance(shape, strides, dtype, axis)
    if layout is None:
        return None
    lone = math.prod(shape) == layout.saved[1] > 0
    few = f"Expected more than 1 value per channel when training, got input size {shape}" if lone else ""
    return layout._replace(too_few=few, evaluation="training=False")


@lru_cache(maxsize=4096, typed=True)
def _lines(shape: _Shape, strides: _Shape, dtype: _DType, normalized: int | _Shape) -> Layout | None:
    normalized = _shape_of(normalized)
    kept = shape[: max(len(shape) - len(normalized), 0)]
    if shape[len(kept) :] != normalized:
        expected = ", ".join(map(str, normalized))
        raise ValueError(
            f"Given normalized_shape={list(normalized)}, expected input with shape [*, {expected}], but got input of "
            f"size{list(shape)}"
        )
    order = operands.order(shape, strides, dtype)
    found = None if order is None else fold.layer(shape, order, len(normalized))
    if order is None or found is None:
        return None
    long = [a for a in order if a < len(kept)]
    as_lying = (*(a for a in range(len(kept)) if a not in long), *long)
    return Layout((Part(found),), kept, normalized, order=None if long == sorted(long) else as_lying)


@lru_cache(maxsize=4096, typed=True)
def _weight(shape: _Shape, strides: _Shape, dtype: _DType, dim: int | None) -> Layout | None:
    order = operands.order(shape, strides, dtype)
    if order is None:
        return None
    size = math.prod(shape)
    folded = fold.Fold(1, 1, 1, size, size) if dim is None else fold.batch(shape, order, dim)
    return Layout((Part(folded),), (folded.groups,), (folded.groups,), dim or 0)


def _shape_of(normalized_shape: int | Sequence[int]) -> _Shape:
    if not isinstance(normalized_shape, Iterable):
        return (operands.integer("normalized_shape", normalized_shape),)
    shape = tuple([operands.integer("normalized_shape", n) for n in normalized_shape])
    if not shape:
        raise ValueError("Expected normalized_shape to be at least 1-dimensional, but got normalized_shape=[]")
    return shape


def _hashable(normalized_shape: int | Sequence[int]) -> int | _Shape:
    return normalized_shape if type(normalized_shape) is int else _shape_of(normalized_shape)


def _forward(
    x: Array,
    layout_of: LayoutOf,
    how: tuple[Any, ...],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.0,
    counted: int = -1,
    residual: Array | None = None,
    activation: Activation = None,
    mask: Array | None = None,
    averaged: bool = False,
    center: bool = True,
    correction: int = 1,
) -> tuple[Array, Any, Array]:
    """y, mean and rstd of every norm: the one whose layout function is `layout_of`, with the arguments `how`.

    `counted` ≥ 0: momentum is 1/(counted + k) for the k-th batch, a cumulative average. `averaged`: running statistics
    take in the samples' average. Without `center` the mean is 0, and None.
    """
    if type(x) is np.ndarray:
        given = x
    elif foreign.kind_of(x) is not None:
        return foreign.called(_forward, x, locals())  # type: ignore[no-any-return]
    else:
        given = arrays.taken(x, "x")
        if arrays.is_elsewhere(given):
            with arrays.on(arrays.device(given)):
                return _forward(
                    given, layout_of, how, weight, bias, eps, out, running_mean, running_var, training, momentum,
                    counted, residual, activation, mask, averaged, center, correction,
                )  # fmt: skip
    code, slope = (0, 0.0) if activation is None else _activation(activation)
    if momentum is None:
        raise TypeError("momentum must be a number; only a layer takes None, for a cumulative average")
    x, layout = operands.dense(given, layout_of, how)
    operands.expect_statistics(layout, training, eps, running_mean, running_var)
    if residual is not None:
        residual = operands.alike(residual, "residual", given, x)
    if layout.axis is None or type(x) is not np.ndarray:
        weight, bias = operands.parameter(weight, "weight", layout), operands.parameter(bias, "bias", layout)
        if running_mean is not None and running_var is not None:
            running_mean = arrays.taken(running_mean, "running_mean")
            running_var = arrays.taken(running_var, "running_var")
    positions = None if mask is None else operands.positions(mask, x, layout)
    if out is None:
        y = arrays.empty_like(x)
    else:
        y, out = operands.output(out, given, x, (given, residual, weight, bias, running_mean, running_var))
    mean, rstd = arrays.statistics(x, layout.saved)
    used: tuple[Any, ...] = (x, residual, y, positions, mean if center else None, rstd)
    for part in layout.parts:
        folded, samples, first = part
        x_, residual_, y_, positions_, mean_, rstd_ = used if samples is None else operands.cut(part, *used)
        queue = arrays.queue(x, folded)
        _C.forward(
            folded, x_, weight, bias, running_mean, running_var, residual_, positions_, y_, mean_, rstd_,
            training, momentum, counted if counted < 0 else counted + first, averaged, correction, eps, code, slope,
            *queue,
        )  # fmt: skip
        if queue is not arrays.CPU:
            arrays.launched(queue, y, mean, rstd, positions)
    if layout.order is not None:
        mean, rstd = layout.shaped(mean), layout.shaped(rstd)
    if out is not None or x is not given:
        y = operands.deliver(y, out, given)
    return y, mean if center else None, rstd


def _backward(
    dy: Array,
    x: Array,
    layout_of: LayoutOf,
    how: tuple[Any, ...],
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
    constant: bool = False,
    residual: Array | None = None,
    activation: Activation = None,
    mask: Array | None = None,
) -> tuple[Array, Array, Array, Any]:
    """dx, dweight, dbias and dresidual, or None, of every norm. `constant`: mean and rstd were not taken from x."""
    if type(x) is np.ndarray:
        given = x
    elif foreign.kind_of(x) is not None:
        return foreign.called(_backward, x, locals())  # type: ignore[no-any-return]
    else:
        given = arrays.taken(x, "x")
        if arrays.is_elsewhere(given):
            with arrays.on(arrays.device(given)):
                return _backward(
                    dy, given, layout_of, how, mean, rstd, weight, bias, out, constant, residual, activation, mask
                )
    code, slope = (0, 0.0) if activation is None else _activation(activation)
    x, layout = operands.dense(given, layout_of, how)
    dy = operands.alike(dy, "dy", given, x)
    if mean is not None:
        mean = operands.statistics(mean, "mean", x, layout)
    rstd = operands.statistics(rstd, "rstd", x, layout)
    if residual is not None:
        residual = operands.alike(residual, "residual", given, x)
    weight, bias = operands.parameter(weight, "weight", layout), operands.parameter(bias, "bias", layout)
    positions = None if mask is None else operands.positions(mask, x, layout)
    if out is None:
        dx = arrays.empty_like(x)
    else:
        dx, out = operands.output(out, given, x, (given, dy, residual, weight, bias))
    dresidual = None if residual is None else arrays.empty_like(x)
    dweight, dbias = operands.gradient(weight, x, layout), operands.gradient(bias, x, layout)
    sums: Any = ((dweight, dbias),)
    if layout.axis is None:
        sums = ((dweight.reshape(-1), dbias.reshape(-1)),)
    elif len(layout.parts) != 1:
        sums = arrays.namespace(x).zeros((len(layout.parts), 2, *layout.parameters))
    used: tuple[Any, ...] = (dy, x, residual, dx, dresidual, positions, mean, rstd)
    for (dweight_, dbias_), part in zip(sums, layout.parts, strict=True):
        folded, samples, _ = part
        dy_, x_, residual_, dx_, dresidual_, positions_, mean_, rstd_ = (
            used if samples is None else operands.cut(part, *used)
        )
        queue = arrays.queue(x, folded)
        _C.backward(
            folded, dy_, x_, mean_, rstd_, weight, bias, residual_, positions_, constant, code, slope,
            dx_, dresidual_, dweight_, dbias_, *queue,
        )  # fmt: skip
        if queue is not arrays.CPU:
            arrays.launched(queue, dx, dresidual, dweight_, dbias_, mean, rstd, positions)
    if len(layout.parts) != 1:
        dweight[...], dbias[...] = sums.sum(0)
    if out is not None or x is not given:
        dx = operands.deliver(dx, out, given)
    return dx, dweight, dbias, dresidual


def _no_double_backward(activation: Activation, mask: object) -> str:
    """Why a norm has no double backward, in words; empty where it has one."""
    if activation is not None:
        norm = "an activation"
        reason = "its second derivative is not in the kernels; apply the activation to the norm's result"
    elif mask is not None:
        norm = "a mask"
        reason = "the gradient of a norm with a mask is not symmetric, which its kernels rely on"
    else:
        return ""
    return f"there is no double backward through a norm with {norm}: {reason}"


def _double_backward(
    v: Array,
    dy: Array,
    x: Array,
    layout_of: LayoutOf,
    how: tuple[Any, ...],
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    cweight: Array | None,
    cbias: Array | None,
    constant: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of dx, dweight and dbias of :func:`_backward`, whose own gradients are v, cweight and cbias, with
    respect to dy, x and weight; without ghost batches, activation and mask.

    dx is r·(w·dy − s1/n − x̂·s2/n) with s1 = Σ w·dy and s2 = Σ w·dy·x̂. Call that Π(w·dy): a projection, and symmetric.
    With a1 and a2 these sums of v and K = Σ w·v·dy − (a1·s1 + a2·s2)/n::

        ∂/∂dy     = w·Π(v) + cweight·x̂ + cbias
        ∂/∂weight = Σ dy·Π(v) over each channel
        ∂/∂x      = Π(cweight·dy) − r·(s2/n)·Π(v) − r·(a2/n)·Π(w·dy) − r²·(K/n)·x̂

    Constant statistics have no sums, and Π(a) = r·a; without a mean there are no s1 and a1.
    """
    given = x
    x, layout = operands.dense(arrays.taken(x, "x"), layout_of, how)
    v, dy = operands.alike(v, "v", given, x), operands.alike(dy, "dy", given, x)
    # One axis: NumPy makes a number, not an array, of a sum of arrays without axes.
    mean = None if mean is None else operands.statistics(mean, "mean", x, layout).reshape(-1)
    r = operands.statistics(rstd, "rstd", x, layout).reshape(-1)
    weight, cweight, cbias = (
        operands.parameter(a, name, layout) for a, name in ((weight, "weight"), (cweight, "cweight"), (cbias, "cbias"))
    )
    folded = layout.parts[0].fold
    xp, queue, n = arrays.namespace(x), arrays.queue(x, folded), folded.per_statistic
    one, none = xp.ones(r.shape), xp.zeros(folded.channels)
    cweight = none if cweight is None else cweight

    def sums(a: Array, of: Array, mean: Array | None, r: Array, weight: Array | None) -> tuple[Array, ...]:
        found = *arrays.statistics(x, r.shape), *arrays.statistics(x, (folded.channels,))
        _C.grad_sums(folded, a, of, mean, r, weight, None, None, 0, 0.0, *found, *queue)
        arrays.launched(queue, *found)
        return found

    def scaled(a: Array, r: Array, weight: Array | None, cx: Array | None = None, c0: Array | None = None) -> Array:
        """r·(weight·a + cx·x̂ + c0)."""
        found = arrays.empty_like(x)
        _C.grad_input(folded, a, x, mean, r, weight, None, None, 0, 0.0, cx, c0, None, found, None, *queue)
        arrays.launched(queue, r, cx, c0, found)
        return found

    def projected(a: Array, weight: Array | None, more: Array | float = 0.0) -> tuple[Array, Array, Array]:
        """Π(weight·a) + r·more·x̂, and the two sums."""
        if constant:
            return scaled(a, r, weight), one, one
        s1, s2, _, _ = sums(a, x, mean, r, weight)
        return scaled(a, r, weight, more - s2 / n, None if mean is None else -s1 / n), s1, s2

    of_v, a1, a2 = projected(v, None)
    ddy = arrays.empty_like(x)
    _C.normalize(folded, x, mean, r, cweight, cbias, scaled(of_v, one, weight), 0, 0.0, ddy, *queue)
    arrays.launched(queue, ddy, of_v, cweight)
    dweight = sums(dy, of_v, None, one, None)[2]
    if constant:
        dx = scaled(dy, r, cweight)
    else:
        of_dy, s1, s2 = projected(dy, weight)
        k = sums(v, dy, None, one, weight)[1] - ((0 if mean is None else a1 * s1) + a2 * s2) / n
        dx = projected(dy, cweight, -r * k / n)[0]
        dx += scaled(of_v, -r * s2 / n, None)
        dx += scaled(of_dy, -r * a2 / n, None)
    dweight_ = operands.gradient(weight, x, layout)
    dweight_[...] = dweight.reshape(layout.parameters)
    return ddy, dx, dweight_


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
    correction: int = 1,
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
        Updated in place when training: ``new = (1 − momentum)·old + momentum·batch``, the variance with n − correction.
        Used, and needed, when not training. What is updated must not share memory with the other, nor with weight or
        bias.
    training : bool
        Whether the statistics are the batch's or the running ones.
    momentum : float
        Weight of the new value in the running statistics; meaning and default are PyTorch's.
    eps : float
        Added to the variance under the root; the default is PyTorch's. Must be above 0 in training.
    axis : int
        The axis that keeps its own statistics; -1 for channels last.
    residual : like x, optional
        Added before the activation.
    activation : "relu", "leaky_relu", "silu", "sigmoid", "tanh" or ("leaky_relu", slope), optional
        The slope is 0.01 unless given.
    ghost_batch_size : int, optional
        Statistics over that many consecutive samples instead of the whole batch (Hoffer et al. 2017), as if called on
        each slice in turn; the last may be shorter.
    correction : 1 or 0
        1: the running variance is of n − 1, as PyTorch has it; 0: of n, as Keras and Flax do.
    mask : bool, shape of x without `axis`, optional
        True where a position counts for the statistics; y is computed everywhere. A statistic over fewer than two
        counted elements leaves the running ones as they are.
    out : like x, optional
        Where y goes, any strides. It may be x or residual itself; a backward needs the original x.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
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
    _check_correction(correction)
    return _forward(
        x, _batch, (axis, ghost_batch_size), weight, bias, eps, out, running_mean, running_var, training, momentum, -1,
        residual, activation, mask, correction=correction,
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
    """y alone, with arguments in the order of ``torch.nn.functional.batch_norm``; see :func:`batch_norm_forward`.

    As in PyTorch, and unlike there, `training` is False by default: then the running statistics are needed.
    """
    return _forward(
        x, _batch, (axis, None), weight, bias, eps, out, running_mean, running_var, training, momentum, -1, residual,
        activation, mask,
    )[0]  # fmt: skip


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
    x : like dy
        As the forward had it.
    mean, rstd : float64
        As returned by the forward.
    weight : (C,), optional
        As in the forward.
    bias : (C,), optional
        As in the forward. Only the activation's derivative needs its values.
    training : bool
        False where mean and rstd were constants (evaluation, frozen statistics): then ``dx = dy·act'·weight·rstd``.
    axis : int
        As in the forward.
    residual : like x, optional
        As in the forward. Only the activation's derivative needs its values.
    activation, ghost_batch_size, mask
        As in the forward.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight, dbias : (C,)
        In the parameter's dtype; without one float32, for float64 x float64.
    dresidual : like x
        Only where a residual was given.

    Raises
    ------
    ValueError
        Shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    gradients = _backward(
        dy, x, _batch, (axis, ghost_batch_size), mean, rstd, weight, bias, out, not training, residual, activation, mask
    )
    return gradients[:3] if residual is None else gradients


def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Instance normalization in the order of ``torch.nn.functional.instance_norm``; see
    :func:`instance_norm_forward`."""
    return _forward(
        x, _instance, (axis,), weight, bias, eps, out, running_mean, running_var, use_input_stats, momentum, mask=mask,
        averaged=True,
    )[0]  # fmt: skip


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016): ``y = (x − mean)·rstd·weight + bias``, with
    statistics of each channel of each sample.

    Parameters
    ----------
    x : (N, C, *spatial) or any other place of C
        float32, float64, float16 or bfloat16. The samples lie along the first axis that is not `axis`. Read where it
        lies if it is dense and the samples are its slowest axis, else through a copy.
    weight, bias : (C,), optional
        Any of the four dtypes, whatever x's.
    running_mean, running_var : (C,), optional
        As in :func:`batch_norm_forward`, where the new values are the samples' averages: of the means, and of the
        variances with n − 1. Used, and needed, where `use_input_stats` is False.
    use_input_stats : bool
        Whether the statistics are the instances' own or the running ones.
    momentum : float
        Weight of the new value in the running statistics; meaning and default are PyTorch's.
    eps : float
        Added to the variance under the root; the default is PyTorch's.
    axis : int
        The axis of the channels; -1 for channels last.
    mask : bool, shape of x without `axis`, optional
        True where a position counts for the statistics; y is computed everywhere. Statistics of fewer than two counted
        elements are left out of the running ones.
    out : like x, optional
        Where y goes, any strides. It may be x itself; a backward needs the original x.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
    mean, rstd : float64, (N, C)
        What the backward needs: ``rstd = 1/√(variance + eps)``.

    Raises
    ------
    ValueError
        One position with `use_input_stats`, running statistics missing without, sizes that do not fit, an array to be
        written that is read-only or shares memory with another. AxisError for the axis.
    TypeError
        Arrays of another kind, other dtypes, momentum None.
    """
    return _forward(
        x, _instance, (axis,), weight, bias, eps, out, running_mean, running_var, use_input_stats, momentum, mask=mask,
        averaged=True,
    )  # fmt: skip


def instance_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    use_input_stats: bool = True,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`instance_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x : like dy
        As the forward had it.
    mean, rstd : float64, (N, C)
        As returned by the forward.
    weight : (C,), optional
        As in the forward.
    bias : (C,), optional
        Only its dtype matters, which its gradient has.
    use_input_stats : bool
        False where mean and rstd were constants.
    axis, mask
        As in the forward.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight, dbias : (C,)
        In the parameter's dtype; without one float32, for float64 x float64.

    Raises
    ------
    ValueError
        Shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    return _backward(
        dy, x, _instance, (axis,), mean, rstd, weight, bias, out, not use_input_stats, mask=mask
    )[:3]  # fmt: skip


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Group normalization in the order of ``torch.nn.functional.group_norm``; see :func:`group_norm_forward`."""
    return _forward(x, _group, (axis, num_groups), weight, bias, eps, out, mask=mask)[0]


def group_norm_forward(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Group normalization (Wu & He 2018): ``y = (x − mean)·rstd·weight + bias``, with statistics of each group of
    channels of each sample.

    Parameters
    ----------
    x : (N, C), (N, C, *spatial) or any other place of C
        As in :func:`instance_norm_forward`.
    num_groups : int
        How many groups of ``C / num_groups`` consecutive channels there are.
    weight, bias : (C,), optional
        A weight and a bias for each channel, of any of the four dtypes, whatever x's.
    eps, axis, out
        As in :func:`instance_norm_forward`.
    mask : bool, shape of x without `axis`, optional
        True where a position counts for the statistics; y is computed everywhere.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
    mean, rstd : float64, (N, num_groups)
        What the backward needs: ``rstd = 1/√(variance + eps)``.

    Raises
    ------
    ValueError
        C not divisible by `num_groups`, sizes that do not fit, an `out` that is read-only or shares memory with another
        array. AxisError for the axis.
    TypeError
        Arrays of another kind, other dtypes.
    """
    return _forward(x, _group, (axis, num_groups), weight, bias, eps, out, mask=mask)


def group_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = 1,
    mask: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`group_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x : like dy
        As the forward had it.
    mean, rstd : float64, (N, num_groups)
        As returned by the forward. Their shape says how many groups there are.
    weight : (C,), optional
        As in the forward.
    bias : (C,), optional
        Only its dtype matters, which its gradient has.
    axis, mask
        As in the forward.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight, dbias : (C,)
        In the parameter's dtype; without one float32, for float64 x float64.

    Raises
    ------
    ValueError
        A mean that is not 2-D, shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    if type(x) is not np.ndarray and foreign.kind_of(x) is not None:
        return foreign.called(group_norm_backward, x, locals())  # type: ignore[no-any-return]
    mean = arrays.taken(mean, "mean")
    if mean.ndim != 2:
        raise ValueError(f"mean must have shape (N, num_groups), got {mean.shape}")
    return _backward(dy, x, _group, (axis, mean.shape[1]), mean, rstd, weight, bias, out, mask=mask)[:3]


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
    return _forward(x, _lines, (_hashable(normalized_shape),), weight, bias, eps, out)[0]


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
        Added to the variance under the root; the default is PyTorch's.
    out : like x, optional
        Where y goes; it may be x itself. A backward needs the original x.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
    mean, rstd : float64, x's shape without the normalized axes
        What the backward needs: ``rstd = 1/√(variance + eps)``.

    Raises
    ------
    ValueError
        Shapes that do not fit; an `out` that is read-only or shares memory with another array.
    TypeError
        Arrays of another kind, other dtypes.
    """
    return _forward(x, _lines, (_hashable(normalized_shape),), weight, bias, eps, out)


def _normalized_by(x: Array, rstd: Array) -> _Shape:
    """The lengths of x's axes that the statistics lack: the normalized ones."""
    shape: _Shape = arrays.taken(x, "x").shape
    return shape[arrays.taken(rstd, "rstd").ndim :]


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
    """Gradients of :func:`layer_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x : like dy
        As the forward had it.
    mean, rstd : float64
        As returned by the forward. The axes of x that rstd lacks are the normalized ones.
    weight : (*normalized_shape,), optional
        As in the forward.
    bias : (*normalized_shape,), optional
        Only its dtype matters, which its gradient has.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight, dbias : (*normalized_shape,)
        In the parameter's dtype; without one float32, for float64 x float64.

    Raises
    ------
    ValueError
        Shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    if type(x) is not np.ndarray and foreign.kind_of(x) is not None:
        return foreign.called(layer_norm_backward, x, locals())  # type: ignore[no-any-return]
    return _backward(dy, x, _lines, (_normalized_by(x, rstd),), mean, rstd, weight, bias, out)[:3]


def _default_eps(dtype: np.dtype[Any]) -> float:
    """RMS norm's. Of the type that the arithmetic is done in: a half type's own would be a hundredth of x's scale."""
    return float(np.finfo(np.float64 if dtype.itemsize == 8 else np.float32).eps)


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

    Parameters
    ----------
    x : (..., *normalized_shape)
        As in :func:`layer_norm_forward`: float32, float64, float16 or bfloat16.
    normalized_shape : int or sequence of ints
        The lengths of the last axes, over which the mean square is taken.
    weight : (*normalized_shape,), optional
        Any of the four dtypes, whatever x's.
    eps : float or None
        Added to the mean square under the root. None is ``finfo(float32).eps``, for float64
        ``finfo(float64).eps``, as in PyTorch from 2.7 on.
    out : like x, optional
        Where y goes; it may be x itself. A backward needs the original x.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
    rstd : float64, x's shape without the normalized axes
        What the backward needs.

    Raises
    ------
    ValueError
        Shapes that do not fit; an `out` that is read-only or shares memory with another array.
    TypeError
        Arrays of another kind, other dtypes.
    """
    if type(x) is not np.ndarray and foreign.kind_of(x) is not None:
        return foreign.called(rms_norm_forward, x, locals())  # type: ignore[no-any-return]
    x = arrays.taken(x, "x")
    operands.floating("x", x.dtype)
    eps = _default_eps(x.dtype) if eps is None else eps
    y, _, rstd = _forward(x, _lines, (_hashable(normalized_shape),), weight, None, eps, out, center=False)
    return y, rstd


def rms_norm_backward(
    dy: Array,
    x: Array,
    rstd: Array,
    weight: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Gradients of :func:`rms_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x : like dy
        As the forward had it.
    rstd : float64
        As returned by the forward. The axes of x that it lacks are the normalized ones.
    weight : (*normalized_shape,), optional
        As in the forward.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight : (*normalized_shape,)
        In weight's dtype; without one float32, for float64 x float64.

    Raises
    ------
    ValueError
        Shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    if type(x) is not np.ndarray and foreign.kind_of(x) is not None:
        return foreign.called(rms_norm_backward, x, locals())  # type: ignore[no-any-return]
    return _backward(dy, x, _lines, (_normalized_by(x, rstd),), None, rstd, weight, None, out)[:2]


def _shares(logits: Array, name: str, x: Array) -> Array:
    """The softmax of three logits."""
    logits = arrays.taken(logits, name)
    arrays.expect_beside(logits, name, x)
    operands.floating(name, logits.dtype)
    if logits.shape != (3,):
        raise ValueError(f"{name} should contain 3 elements not {logits.size}")
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max())
    return powers / powers.sum()  # type: ignore[no-any-return]


def _mixed(shares: Array, parts: Array) -> Array:
    return shares[0] * parts[0] + shares[1] * parts[1] + shares[2] * parts[2]  # type: ignore[no-any-return]


def _merged(
    shape: tuple[int, int, int], counts: Array, means: Array, m2: Array, queue: tuple[int, Array | None]
) -> tuple[Array, Array]:
    """Mean and variance of the union of moments along the second of the three lengths that they are seen in."""
    count, mean = arrays.statistics(counts, (shape[0] * shape[2],))
    merged, _ = arrays.statistics(counts, count.shape)
    _C.merge(*shape, counts, means, m2, count, mean, merged, queue[0])
    arrays.launched(queue, count, mean, merged)
    return mean, merged / arrays.namespace(counts).maximum(count, 1)


def switchable_norm(
    x: Array,
    mean_logits: Array,
    var_logits: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Switchable normalization with arguments in the order of :func:`batch_norm`; see
    :func:`switchable_norm_forward`."""
    return switchable_norm_forward(
        x, mean_logits, var_logits, weight, bias, running_mean=running_mean, running_var=running_var, training=training,
        momentum=momentum, eps=eps, axis=axis, out=out,
    )[0]  # fmt: skip


@foreign.on_its_device
def switchable_norm_forward(
    x: Array,
    mean_logits: Array,
    var_logits: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Switchable normalization (Luo et al. 2018): ``y = (x − mean)·rstd·weight + bias`` with statistics that are mixed
    from those of the instance, the layer and the batch: ``mean = Σ softmax(mean_logits)·means``, ``rstd = 1/√(Σ
    softmax(var_logits)·variances + eps)``.

    The instances' moments are one pass over x; those of the layer and of the batch are merged from them.
    docs/switchable.md derives the backward.

    Parameters
    ----------
    x : (N, C), (N, C, *spatial) or any other place of C
        As in :func:`instance_norm_forward`.
    mean_logits, var_logits : (3,)
        For instance, layer and batch, in this order. Any of the four dtypes.
    weight, bias : (C,), optional
        Any of the four dtypes, whatever x's.
    running_mean, running_var : (C,), optional
        The batch's part, as in :func:`batch_norm_forward`. Used, and needed, when not training.
    training : bool
        Whether the batch's part is x's or the running one. The others are x's in evaluation, too.
    momentum, axis
        As in :func:`batch_norm_forward`.
    eps : float
        Added to the mixed variance under the root.
    out : like x, optional
        Where y goes, any strides. It may be x itself; a backward needs the original x.

    Returns
    -------
    y : like x
        Normalized, in x's dtype and memory layout.
    means, variances : float64, (3, N, C)
        What was mixed, in the order of the logits.
    rstd : float64, (N, C)
        Of the mixed variance.

    Raises
    ------
    ValueError
        One value per channel in training, running statistics missing in evaluation, sizes that do not fit, an array to
        be written that is read-only or shares memory with another. AxisError for the axis.
    TypeError
        Arrays of another kind, other dtypes, momentum None.
    """
    if momentum is None:
        raise TypeError("momentum must be a number; only a layer takes None, for a cumulative average")
    given = arrays.taken(x, "x")
    x, layout = operands.dense(given, _switchable, (axis,))
    operands.expect_statistics(layout, training, eps, running_mean, running_var)
    folded, (n, c) = layout.parts[0].fold, layout.saved
    p, q = _shares(mean_logits, "mean_logits", x), _shares(var_logits, "var_logits", x)
    weight, bias = operands.parameter(weight, "weight", layout), operands.parameter(bias, "bias", layout)
    running = operands.running(running_mean, running_var, (weight, bias), x, c, training)
    if out is None:
        y = arrays.empty_like(x)
    else:
        y, out = operands.output(out, given, x, (given, weight, bias, mean_logits, var_logits, *running))
    means, variances = arrays.statistics(x, (3, n, c))
    counts, m2 = arrays.statistics(x, (n, c))
    queue = arrays.queue(x, folded)
    _C.moments(folded, x, None, True, counts, means[0], m2, *queue)
    arrays.launched(queue, counts, means, m2)
    variances[0] = m2 / max(folded.per_statistic, 1)
    layer = _merged((n, c, 1), counts, means[0], m2, queue)
    batch = _merged((1, n, c), counts, means[0], m2, queue) if training else running
    means[1], variances[1] = (a[:, None] for a in layer)
    means[2], variances[2] = batch
    mean, rstd = _mixed(p, means), 1 / np.sqrt(_mixed(q, variances) + eps)
    _C.normalize(folded, x, mean, rstd, weight, bias, None, 0, 0.0, y, *queue)
    arrays.launched(queue, mean, rstd, y)
    if training and x.size:
        values = folded.size // c
        operands.update(running[0], momentum, means[2, 0])
        operands.update(running[1], momentum, variances[2, 0] * (values / (values - 1)))
    if out is not None or x is not given:
        y = operands.deliver(y, out, given)
    return y, means, variances, rstd


@foreign.on_its_device
def switchable_norm_backward(
    dy: Array,
    x: Array,
    means: Array,
    variances: Array,
    rstd: Array,
    mean_logits: Array,
    var_logits: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = True,
    axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of :func:`switchable_norm_forward`.

    Parameters
    ----------
    dy : like x
        Gradient with respect to y; its memory layout may differ from x's.
    x : like dy
        As the forward had it.
    means, variances, rstd : float64
        As returned by the forward.
    mean_logits, var_logits : (3,)
        As in the forward.
    weight : (C,), optional
        As in the forward.
    bias : (C,), optional
        Only its dtype matters, which its gradient has.
    training : bool
        False where the batch's part was constant.
    axis : int
        As in the forward.
    out : like x, optional
        Where dx goes; it may be dy or x itself.

    Returns
    -------
    dx : like x
        Gradient with respect to x.
    dweight, dbias : (C,)
        In the parameter's dtype; without one float32, for float64 x float64.
    dmean_logits, dvar_logits : (3,)
        In the logits' dtypes.

    Raises
    ------
    ValueError
        Shapes that do not fit x's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    given = arrays.taken(x, "x")
    x, layout = operands.dense(given, _switchable, (axis,))
    folded, (n, c) = layout.parts[0].fold, layout.saved
    dy = operands.alike(dy, "dy", given, x)
    means = operands.statistics(means, "means", x, layout, 3)
    variances = operands.statistics(variances, "variances", x, layout, 3)
    r = operands.statistics(rstd, "rstd", x, layout)
    p, q = _shares(mean_logits, "mean_logits", x), _shares(var_logits, "var_logits", x)
    weight, bias = operands.parameter(weight, "weight", layout), operands.parameter(bias, "bias", layout)
    if out is None:
        dx = arrays.empty_like(x)
    else:
        dx, out = operands.output(out, given, x, (given, dy, weight, bias))
    dweight, dbias = operands.gradient(weight, x, layout), operands.gradient(bias, x, layout)
    s1, s2 = arrays.statistics(x, layout.saved)
    mean = _mixed(p, means)
    queue = arrays.queue(x, folded)
    _C.grad_sums(folded, dy, x, mean, r, weight, None, None, 0, 0.0, s1, s2, dweight, dbias, *queue)
    arrays.launched(queue, mean, r, s1, s2, dweight, dbias)
    # Gradients with respect to the mixed mean and variance, and from there to those of the instance.
    dmean, dvar = -r * s1, -0.5 * r * r * s2
    of_mean, of_var = p[0] * dmean, q[0] * dvar
    shared = [(1, 1, c)] + [(2, 0, n)] * training
    for part, over, count in shared:  # the layer over its channels, the batch over its samples
        dmean_, dvar_ = (a.sum(over, keepdims=True) / max(count, 1) for a in (dmean, dvar))
        of_mean += p[part] * dmean_ + 2 * q[part] * (means[0] - means[part]) * dvar_
        of_var += q[part] * dvar_
    pixels = max(folded.per_statistic, 1)
    cx, c0 = 2 * of_var / (pixels * r * r), (of_mean + 2 * of_var * (mean - means[0])) / (pixels * r)
    _C.grad_input(folded, dy, x, mean, r, weight, None, None, 0, 0.0, cx, c0, None, dx, None, *queue)
    arrays.launched(queue, cx, c0, dx)
    dmean_logits = p * (dmean * (means - mean)).sum((1, 2))
    dvar_logits = q * (dvar * (variances - _mixed(q, variances))).sum((1, 2))
    if out is not None or x is not given:
        dx = operands.deliver(dx, out, given)
    return dx, dweight, dbias, dmean_logits.astype(mean_logits.dtype), dvar_logits.astype(var_logits.dtype)


def weight_norm(v: Array, g: Array, dim: int | None = 0, *, out: Array | None = None) -> Array:
    """Weight normalization as PyTorch's ``weight_norm``; see :func:`weight_norm_forward`."""
    return weight_norm_forward(v, g, dim, out=out)[0]


@foreign.on_its_device
def weight_norm_forward(v: Array, g: Array, dim: int | None = 0, *, out: Array | None = None) -> tuple[Array, Array]:
    """Weight normalization (Salimans & Kingma 2016): ``w = g·v/‖v‖``, of length g in the direction of v.

    Parameters
    ----------
    v : any shape
        float32, float64, float16 or bfloat16. Dense arrays of any axis order are read where they lie; others through a
        copy.
    g : shape of v with length 1 for every axis but `dim`; () where that is None
        Any of the four dtypes, whatever v's.
    dim : int or None
        The axis that is kept: each of its indices has a length of its own. None: all of v has one. -1 is the last axis,
        where PyTorch takes it for None.
    out : like v, optional
        Where w goes; it may be v itself. A backward needs the original v.

    Returns
    -------
    w : like v
        NaN where v is 0 and has no direction.
    norm : float64, like g
        ``√Σv²``, which the backward needs.

    Raises
    ------
    ValueError
        A g of another shape; an `out` that is read-only or shares memory with another array. AxisError for `dim`.
    TypeError
        Arrays of another kind, other dtypes.
    """
    dim, lengths, root = _lengths(v, g, dim)
    w, _, rstd = _forward(v, _weight, (dim,), lengths, None, 0.0, out, center=False)
    return w, (root / rstd).reshape(g.shape)


@foreign.on_its_device
def weight_norm_backward(
    dw: Array, v: Array, g: Array, norm: Array, dim: int | None = 0, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Gradients of :func:`weight_norm_forward`.

    Parameters
    ----------
    dw : like v
        Gradient with respect to w; its memory layout may differ from v's.
    v, g, dim
        As in the forward.
    norm : like g
        As returned by the forward.
    out : like v, optional
        Where dv goes; it may be dw or v itself.

    Returns
    -------
    dv : like v
        Gradient with respect to v.
    dg : like g
        Gradient with respect to g, in g's dtype.

    Raises
    ------
    ValueError
        A dw that has not v's shape, a norm that has not g's, and what the forward refuses.
    TypeError
        Arrays of another kind, other dtypes.
    """
    dim, lengths, root = _lengths(v, g, dim)
    dw, norm = arrays.taken(dw, "dw"), arrays.taken(norm, "norm")
    if dw.shape != v.shape:
        raise ValueError(f"dw must have v's shape {v.shape}, got {dw.shape}")
    if norm.shape != g.shape:
        raise ValueError(f"norm must have shape {g.shape}, got {norm.shape}")
    operands.floating("norm", norm.dtype)
    with np.errstate(divide="ignore"):
        rstd = root / norm.reshape(-1).astype(np.float64)
    dv, dlengths, _, _ = _backward(dw, v, _weight, (dim,), None, rstd, lengths, None, out)
    return dv, (dlengths / root).astype(g.dtype).reshape(g.shape)


def _lengths(v: Array, g: Array, dim: int | None) -> tuple[int | None, Array, float]:
    """`dim` from the first axis on, g/√n and √n: weight norm is RMS norm, ``w = (g/√n)·v/√(Σv²/n)``."""
    v, g = arrays.taken(v, "v"), arrays.taken(g, "g")
    dim, expected, root = _shape_of_lengths(v.shape, dim)
    if g.shape != expected:
        raise ValueError(f"g must have shape {expected}, got {g.shape}")
    operands.floating("v", v.dtype)
    operands.floating("g", g.dtype)
    return dim, g.reshape(-1).astype(np.float64) / root, root


@lru_cache(maxsize=4096, typed=True)
def _shape_of_lengths(shape: _Shape, dim: int | None) -> tuple[int | None, _Shape, float]:
    """`dim` from the first axis on, g's shape and the root of the number of elements that a length is over."""
    if dim is None:
        return None, (), math.sqrt(max(math.prod(shape), 1))
    dim = operands.integer("dim", dim)
    if not -len(shape) <= dim < len(shape):
        raise np.exceptions.AxisError(dim, len(shape))
    dim %= len(shape)
    rest = math.prod(n for a, n in enumerate(shape) if a != dim)
    return dim, tuple(n if a == dim else 1 for a, n in enumerate(shape)), math.sqrt(max(rest, 1))


@foreign.on_its_device
def _moments(x: Array, axes: int | Sequence[int]) -> tuple[float, Array, Array, frozenset[int]]:
    """n, mean and m2 with the reduced axes kept as 1."""
    x = arrays.taken(x, "x")
    operands.floating("x", x.dtype)
    reduced = operands.axes(axes, x.ndim)
    shape = x.shape
    dense, _, folded, kept = operands.kept_first(x, reduced)
    count, mean, m2 = arrays.empty((3, folded.statistics), FLOAT64, beside=x)
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


@foreign.on_its_device
def _batch_moments(x: Array, axis: int, ghost: int | None, mask: Array | None) -> tuple[Array, Array, Array]:
    """Count, mean and m2 of each channel of each ghost batch, (batches, C) float64, on x's device: those that a batch
    norm in training takes of x."""
    given = arrays.taken(x, "x")
    x, layout = operands.dense(given, _batch, (axis, ghost))
    positions = None if mask is None else operands.positions(mask, x, layout)
    saved = layout.saved if ghost else (1, *layout.saved)
    count, mean, m2 = arrays.empty((3, *saved), FLOAT64, beside=x)
    for part in layout.parts:
        folded, samples, first = part
        rows = slice(first, first + folded.batch)
        used: tuple[Any, ...] = (x, positions, mean, m2)
        x_, positions_, mean_, m2_ = used if samples is None else operands.cut(part, *used)
        queue = arrays.queue(x, folded)
        _C.moments(folded, x_, positions_, True, count[rows], mean_, m2_, *queue)
        arrays.launched(queue, x, count, mean, m2, positions)
    return count, mean, m2


@foreign.on_its_device
def moments(
    x: Array, axes: int | Sequence[int], *, correction: float = 0, keepdims: bool = False
) -> tuple[Array, Array]:
    """Mean and variance over `axes` (the axes that are *reduced*), as ``tf.nn.moments``.

    Welford's update (1962), a block at a time, as Chan, Golub & LeVeque (1979) generalize it: the variance keeps its
    digits at any mean/σ.

    Parameters
    ----------
    x : any shape
        float32, float64, float16 or bfloat16.
    axes : int or sequence of ints
        The axes to reduce.
    correction : float
        The variance is over ``n − correction``; NaN where that is not positive.
    keepdims : bool
        Whether the reduced axes stay, with length 1.

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


@foreign.on_its_device
def batch_normalization(
    x: Array, mean: Array, variance: Array, offset: Array | None, scale: Array | None, variance_epsilon: float
) -> Array:
    """TensorFlow's ``tf.nn.batch_normalization``: ``(x − mean)/√(variance + variance_epsilon)·scale + offset``.

    Parameters
    ----------
    x : any shape
        float32, float64, float16 or bfloat16.
    mean, variance : broadcast against x
        (C,) for channels last, or with 1 on the axes that they do not vary along.
    offset, scale : broadcast against x, or None
        As mean and variance.
    variance_epsilon : float
        Added to the variance under the root.

    Returns
    -------
    y : like x
        In x's dtype.

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
    operands.floating("x", x.dtype)
    xp = arrays.namespace(x)
    for name, a in given.items():
        arrays.expect_beside(a, name, x)
        operands.floating(name, a.dtype)
        if a.ndim > x.ndim or any(n not in (1, m) for n, m in zip(a.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(f"{name} of shape {a.shape} does not broadcast to x's shape {x.shape}")
    union = np.broadcast_shapes((1,) * x.ndim, *(a.shape for a in given.values()))
    reduced = frozenset(a for a in range(x.ndim) if union[a] == 1)
    dense, axes, folded, kept = operands.kept_first(x, reduced)

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
