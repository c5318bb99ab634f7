"""Batch normalization in float64 NumPy, straight from the formulas: for teaching and for checking.

Names, argument order and conventions are the library's. Arrays of any real dtype go in, float64 comes out.

The forward pass, with sums over the n elements of one channel (Ioffe & Szegedy 2015, algorithm 1)::

    mean = sum(x) / n
    var  = sum((x - mean)**2) / n                  biased: divided by n
    rstd = 1 / sqrt(var + eps)                     reciprocal of the standard deviation
    xhat = (x - mean) * rstd
    pre  = weight * xhat + bias + residual
    y    = activation(pre)

The backward pass, given dy = dL/dy. The mean and the variance depend on every x of the channel; that is where the two
sums in dx come from::

    u       = dy * activation'(pre)                dL/dpre, which is also dL/dresidual
    dbias   = sum(u)
    dweight = sum(u * xhat)
    g       = weight * u                           dL/dxhat
    dx      = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)

Where the statistics are constants (evaluation, a frozen layer) the two sums vanish: dx = rstd * g.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64: TypeAlias = NDArray[np.float64]
Activation: TypeAlias = str | tuple[str, float] | None

LEAKY_RELU_SLOPE = 0.01


def moments(
    x: ArrayLike, axes: int | tuple[int, ...], *, correction: int = 0, keepdims: bool = False
) -> tuple[Float64, Float64]:
    """Mean and variance of ``x`` over ``axes``, in two passes.

    The variance is ``sum((x - mean)**2) / (n - correction)``. The shorter ``mean(x**2) - mean(x)**2`` cancels: at
    ``mean / sigma = 1e6`` it loses 12 of float64's 16 digits.

    Args:
        x: any shape, any real dtype.
        axes: the axis or axes that are *reduced*; together they hold n elements.
        correction: 0 for the biased variance, 1 for the unbiased one.
        keepdims: keep the reduced axes, with length 1.

    Returns:
        ``mean, variance``, float64, in the shape of ``x`` without ``axes``. The mean is NaN where ``n = 0``, the
        variance where ``n <= correction``.

    Raises:
        numpy.exceptions.AxisError: an axis out of range.
        ValueError: an axis given twice.
    """
    axes = axes if isinstance(axes, tuple) else (axes,)
    # The reduced elements lie side by side in `rows`: NumPy then adds them pairwise, which rounds less than in a chain.
    rows = np.moveaxis(np.asarray(x, dtype=np.float64), axes, tuple(range(-len(axes), 0)))
    kept = rows.ndim - len(axes)
    n = math.prod(rows.shape[kept:])
    rows = rows.reshape(*rows.shape[:kept], n)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = rows.sum(axis=-1, keepdims=True) / n
        # The sum rounds in proportion to |mean|; what is left of it shows in the deviations, and is added back.
        mean = mean + (rows - mean).sum(axis=-1, keepdims=True) / n
        variance = ((rows - mean) ** 2).sum(axis=-1) / max(n - correction, 0)
    mean = mean[..., 0]
    if keepdims:
        return np.expand_dims(mean, axes), np.expand_dims(variance, axes)
    return mean, variance


def activate(pre: ArrayLike, activation: Activation) -> Float64:
    """The activation of ``pre``, element by element.

    Args:
        pre: any shape, any real dtype.
        activation: ``None`` (identity), ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"sigmoid"``,
            ``"tanh"``, or ``("leaky_relu", slope)``.

    Returns:
        float64, in the shape of ``pre``.

    Raises:
        ValueError: an unknown activation.
    """
    pre = np.asarray(pre, dtype=np.float64)
    name, slope = _name_and_slope(activation)
    y: Float64 = pre
    if name == "relu":
        y = np.maximum(pre, 0.0)
    elif name == "leaky_relu":
        y = np.where(pre > 0, pre, slope * pre)
    elif name == "silu":
        y = pre * _sigmoid(pre)
    elif name == "sigmoid":
        y = _sigmoid(pre)
    elif name == "tanh":
        y = np.tanh(pre)
    return y


def activation_derivative(pre: ArrayLike, activation: Activation) -> Float64:
    """The derivative of :func:`activate` at ``pre``; at the kink of ReLU and leaky ReLU, the one from the left.

    Args, shapes, dtypes and errors are those of :func:`activate`.
    """
    pre = np.asarray(pre, dtype=np.float64)
    name, slope = _name_and_slope(activation)
    derivative: Float64 = np.ones_like(pre)
    if name == "relu":
        derivative = np.where(pre > 0, 1.0, 0.0)
    elif name == "leaky_relu":
        derivative = np.where(pre > 0, 1.0, slope)
    elif name == "silu":
        derivative = _sigmoid(pre) * (1 + pre * _sigmoid(-pre))
    elif name == "sigmoid":
        derivative = _sigmoid(pre) * _sigmoid(-pre)
    elif name == "tanh":
        derivative = 1 - np.tanh(pre) ** 2
    return derivative


def batch_norm(
    x: ArrayLike,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    mask: ArrayLike | None = None,
) -> Float64:
    """Batch normalization with the arguments of ``torch.nn.functional.batch_norm``: ``y`` of
    :func:`batch_norm_forward`, where shapes, dtypes and errors are described.
    """
    y, _, _ = batch_norm_forward(
        x,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        axis=axis,
        residual=residual,
        activation=activation,
        mask=mask,
    )
    return y


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    ghost_batch_size: int | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """``y = activation(weight * (x - mean) * rstd + bias + residual)`` and the statistics it used.

    Ioffe & Szegedy, "Batch Normalization", 2015; ghost batches: Hoffer et al., "Train longer, generalize better", 2017.

    Args:
        x: ``(N, C)``, ``(N, C, *spatial)`` or any shape of at least two axes; ``axis`` holds the C channels. Any real
            dtype, here and below.
        weight, bias: ``(C,)``; absent, 1 and 0.
        running_mean, running_var: ``(C,)`` floating arrays. Training moves them *in place* by
            ``running = (1 - momentum) * running + momentum * new``, the new variance being the unbiased one, over
            ``n - 1``. Statistics of fewer than two elements leave them as they are. Evaluation needs both.
        training: normalize with the statistics of ``x``; otherwise with the running ones, as constants.
        momentum: weight of the new value.
        eps: added to the variance, under the root.
        axis: the axis that is kept, -1 for channels last.
        residual: the shape of ``x``, added before the activation.
        activation: see :func:`activate`.
        ghost_batch_size: compute statistics over slices of this many samples, as calls on these slices in turn would.
            The last slice may be shorter. Samples are counted along the first axis that does not hold the channels.
        mask: boolean, the shape of ``x`` without ``axis``; only elements with True enter the statistics. ``y`` is
            computed everywhere. Without effect in evaluation.

    Returns:
        ``y, mean, rstd``, float64. ``y`` has the shape of ``x``; ``mean`` and ``rstd`` are ``(C,)``, with ghost batches
        ``(ceil(N / ghost_batch_size), C)``. Statistics of no element are mean 0 and variance 0.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit; one value per channel in training; ``eps <= 0`` in training; running
            statistics missing in evaluation.
    """
    x = _channels_second(x, axis)
    residual = None if residual is None else _channels_second(residual, axis)
    channels = x.shape[1]
    batches = _batches(x, ghost_batch_size)
    counted = _counted(x, mask)
    for batch in batches:
        if training and x[batch].size == channels > 0:
            size = np.moveaxis(x, 1, axis).shape
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and running.shape != (channels,):
            raise ValueError(f"{name} should contain {channels} elements not {running.size}")
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")

    mean = np.zeros((len(batches), channels))
    rstd = np.zeros((len(batches), channels))
    xhat = np.zeros_like(x)
    for index, batch in enumerate(batches):
        if training:
            rows = np.moveaxis(x[batch], 1, 0)[:, counted[batch]]
            count = rows.shape[1]
            batch_mean, batch_var = moments(rows, 1) if count > 0 else (np.zeros(channels), np.zeros(channels))
            if count > 1:
                _update(running_mean, batch_mean, momentum)
                _update(running_var, batch_var * count / (count - 1), momentum)
        elif running_mean is None or running_var is None:
            raise ValueError("Expected running_mean and running_var to be defined when training=False")
        else:
            batch_mean = np.asarray(running_mean, dtype=np.float64)
            batch_var = np.asarray(running_var, dtype=np.float64)
        mean[index] = batch_mean
        rstd[index] = 1 / np.sqrt(batch_var + eps)
        xhat[batch] = (x[batch] - _along(mean[index], x)) * _along(rstd[index], x)

    y = np.moveaxis(activate(_affine(xhat, weight, bias, residual), activation), 1, axis)
    if ghost_batch_size is None:
        mean, rstd = mean[0], rstd[0]
    return np.ascontiguousarray(y), mean, rstd


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = True,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation = None,
    ghost_batch_size: int | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Float64, ...]:
    """Gradients of :func:`batch_norm_forward`.

    With a mask the sums run over *all* elements, because every output used the statistics, but they reach dx only
    through the counted elements, because only these made the statistics; n is then their count.

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, weight, bias, residual, axis, activation, ghost_batch_size, mask: as in the forward call. ``bias`` and
            ``residual`` are needed to find where the activation was differentiated.
        mean, rstd: what the forward call returned.
        training: False if ``mean`` and ``rstd`` were constants.

    Returns:
        ``dx, dweight, dbias``, and ``dresidual`` if ``residual`` is given; float64. ``dx`` and ``dresidual`` have the
        shape of ``x``, ``dweight`` and ``dbias`` are ``(C,)``.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit.
    """
    x = _channels_second(x, axis)
    dy = _channels_second(dy, axis)
    residual = None if residual is None else _channels_second(residual, axis)
    if dy.shape != x.shape:
        raise ValueError("dy must have the shape of x")
    batches = _batches(x, ghost_batch_size)
    counted = _counted(x, mask)
    mean = np.asarray(mean, dtype=np.float64).reshape(len(batches), x.shape[1])
    rstd = np.asarray(rstd, dtype=np.float64).reshape(len(batches), x.shape[1])

    xhat = np.zeros_like(x)
    for index, batch in enumerate(batches):
        xhat[batch] = (x[batch] - _along(mean[index], x)) * _along(rstd[index], x)
    u = dy * activation_derivative(_affine(xhat, weight, bias, residual), activation)
    g = u if weight is None else u * _along(weight, x)

    dx = np.zeros_like(x)
    for index, batch in enumerate(batches):
        correction = np.zeros_like(x[batch])
        count = np.count_nonzero(counted[batch])
        if training and count > 0:
            sum_g = _channel_sums(g[batch])
            sum_g_xhat = _channel_sums(g[batch] * xhat[batch])
            correction = _along(sum_g / count, x) + xhat[batch] * _along(sum_g_xhat / count, x)
            correction = correction * counted[batch][:, None]
        dx[batch] = _along(rstd[index], x) * (g[batch] - correction)

    dweight = _channel_sums(u * xhat)
    dbias = _channel_sums(u)
    dx = np.ascontiguousarray(np.moveaxis(dx, 1, axis))
    dresidual = np.ascontiguousarray(np.moveaxis(u, 1, axis))
    return (dx, dweight, dbias) if residual is None else (dx, dweight, dbias, dresidual)


def _name_and_slope(activation: Activation) -> tuple[str | None, float]:
    name, slope = activation if isinstance(activation, tuple) else (activation, LEAKY_RELU_SLOPE)
    if name not in (None, "relu", "leaky_relu", "silu", "sigmoid", "tanh"):
        raise ValueError(f"Expected activation relu, leaky_relu, silu, sigmoid, tanh or None, got {activation!r}")
    if isinstance(activation, tuple) and name != "leaky_relu":
        raise ValueError(f"Only leaky_relu takes a slope, got {activation!r}")
    return name, slope


def _sigmoid(pre: Float64) -> Float64:
    # 1 / (1 + exp(-pre)) without its overflow at large negative pre.
    sigmoid: Float64 = np.exp(-np.logaddexp(0.0, -pre))
    return sigmoid


def _channels_second(x: ArrayLike, axis: int) -> Float64:
    """``x`` with the channels on axis 1; the first of the other axes, the samples, comes to be axis 0."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    return np.moveaxis(x, axis, 1)


def _batches(x: Float64, ghost_batch_size: int | None) -> list[slice]:
    """Slices of the samples; each has statistics of its own."""
    if ghost_batch_size is None:
        return [slice(None)]
    if ghost_batch_size < 1:
        raise ValueError(f"ghost_batch_size must be a positive integer or None, not {ghost_batch_size}")
    return [slice(start, start + ghost_batch_size) for start in range(0, x.shape[0], ghost_batch_size)]


def _counted(x: Float64, mask: ArrayLike | None) -> NDArray[np.bool_]:
    """Which elements enter the statistics, in the shape of ``x`` without the channels."""
    shape = (x.shape[0], *x.shape[2:])
    counted = np.ones(shape, dtype=np.bool_) if mask is None else np.asarray(mask, dtype=np.bool_)
    if counted.shape != shape:
        raise ValueError(f"mask must have the shape of x without its channels, {shape}, got {counted.shape}")
    return counted


def _along(parameter: ArrayLike, x: Float64) -> Float64:
    """A ``(C,)`` parameter in a shape that broadcasts over ``x``."""
    return np.asarray(parameter, dtype=np.float64).reshape(1, x.shape[1], *[1] * (x.ndim - 2))


def _affine(xhat: Float64, weight: ArrayLike | None, bias: ArrayLike | None, residual: Float64 | None) -> Float64:
    pre = xhat
    if weight is not None:
        pre = pre * _along(weight, xhat)
    if bias is not None:
        pre = pre + _along(bias, xhat)
    if residual is not None:
        if residual.shape != xhat.shape:
            raise ValueError("residual must have the shape of x")
        pre = pre + residual
    return pre


def _channel_sums(values: Float64) -> Float64:
    # One row per channel, so that NumPy adds pairwise; see moments.
    channels = values.shape[1]
    rows = np.moveaxis(values, 1, 0).reshape(channels, values.size // max(channels, 1))
    sums: Float64 = rows.sum(axis=1)
    return sums


def _update(running: NDArray[Any] | None, new: Float64, momentum: float) -> None:
    if running is not None:
        running[...] = (1 - momentum) * np.asarray(running, dtype=np.float64) + momentum * new
