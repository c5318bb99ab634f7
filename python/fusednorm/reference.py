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

Under a mask only the counted elements make the statistics, but every element uses them: the sums of the backward pass
run over *all* elements, and reach dx through the counted ones; n is the count.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64: TypeAlias = NDArray[np.float64]
Activation: TypeAlias = str | tuple[str, float] | None

LEAKY_RELU_SLOPE = 0.01


# Statistics and parameters have length 1 along the axes that they are shared over, so they broadcast over x; and their
# shapes say what a sum runs over.


def _sum_to(values: Float64, shape: tuple[int, ...]) -> Float64:
    """Sums over the axes along which ``shape`` has length 1, or that it lacks in front: a broadcast's way back."""
    padded = (1,) * (values.ndim - len(shape)) + shape
    axes = [axis for axis, length in enumerate(padded) if length == 1]
    # The summed elements lie side by side in `rows`: NumPy then adds them pairwise, which rounds less than in a chain.
    rows = np.ascontiguousarray(np.moveaxis(values, axes, list(range(-len(axes), 0))))
    kept = rows.shape[: values.ndim - len(axes)]
    sums: Float64 = rows.reshape(*kept, math.prod(rows.shape[len(kept) :])).sum(axis=-1)
    return sums.reshape(shape)


def _moments(
    x: Float64, axes: tuple[int, ...], counted: NDArray[np.bool_] | bool = True
) -> tuple[NDArray[np.int_], Float64, Float64]:
    """Count, mean and biased variance over ``axes``, which are kept with length 1; of no element, 0 and 0."""
    counted = np.broadcast_to(counted, x.shape)
    count = counted.sum(axis=axes, keepdims=True)
    n = np.maximum(count, 1)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        mean = _sum_to(np.where(counted, x, 0.0), count.shape) / n
        # The sum rounds in proportion to |mean|; what is left of it shows in the deviations, and is added back.
        mean = mean + _sum_to(np.where(counted, x - mean, 0.0), count.shape) / n
        variance = _sum_to(np.where(counted, x - mean, 0.0) ** 2, count.shape) / n
    return count, mean, variance


def _gradients(
    dy: Float64,
    xhat: Float64,
    rstd: Float64,
    weight: Float64,
    counted: NDArray[np.bool_] | bool = True,
) -> tuple[Float64, Float64, Float64]:
    """``dx, dweight, dbias`` of ``y = weight * xhat + bias``.

    ``counted`` are the elements that made the statistics: none if these were constants.
    """
    counted = np.broadcast_to(counted, xhat.shape)
    n = np.maximum(_sum_to(counted.astype(np.float64), rstd.shape), 1)
    g = weight * dy
    through_mean = _sum_to(g, rstd.shape) / n
    through_var = xhat * _sum_to(g * xhat, rstd.shape) / n
    dx = rstd * (g - np.where(counted, through_mean + through_var, 0.0))
    return dx, _sum_to(dy * xhat, weight.shape), _sum_to(dy, weight.shape)


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
    count, mean, variance = _moments(np.asarray(x, dtype=np.float64), axes)
    mean = np.where(count > 0, mean, np.nan)
    variance = np.where(count > correction, variance * count / np.maximum(count - correction, 1), np.nan)
    return (mean, variance) if keepdims else (np.squeeze(mean, axes), np.squeeze(variance, axes))


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
    weight, bias = _per_channel(weight, "weight", x, 1.0), _per_channel(bias, "bias", x, 0.0)
    residual = np.zeros_like(x) if residual is None else _alike(residual, "residual", x, axis)
    needed = "" if training else "training=False"
    stored_mean, stored_var = _running(running_mean, running_var, x, needed)
    batches, counted = _batches(x, ghost_batch_size), _counted(x, mask)
    channels = x.shape[1]
    for batch in batches:
        if training and x[batch].size == channels > 0:
            size = np.moveaxis(x, 1, axis).shape
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")

    y, mean, rstd = np.zeros_like(x), np.zeros((len(batches), channels)), np.zeros((len(batches), channels))
    for index, batch in enumerate(batches):
        batch_mean, batch_var = stored_mean, stored_var
        if training:
            count, batch_mean, batch_var = _moments(x[batch], (0, *range(2, x.ndim)), counted[batch])
        batch_rstd = 1 / np.sqrt(batch_var + eps)
        xhat = (x[batch] - batch_mean) * batch_rstd
        y[batch] = activate(weight * xhat + bias + residual[batch], activation)
        mean[index], rstd[index] = batch_mean.ravel(), batch_rstd.ravel()
        if training:
            _update(running_mean, running_var, count, batch_mean, batch_var, momentum)

    if ghost_batch_size is None:
        mean, rstd = mean[0], rstd[0]
    return _channels_back(y, axis), mean, rstd


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
    dy = _alike(dy, "dy", x, axis)
    weight, bias = _per_channel(weight, "weight", x, 1.0), _per_channel(bias, "bias", x, 0.0)
    batches, counted = _batches(x, ghost_batch_size), _counted(x, mask) & training
    saved = (x.shape[1],) if ghost_batch_size is None else (len(batches), x.shape[1])
    broadcast = (len(batches), 1, x.shape[1], *[1] * (x.ndim - 2))
    mean = _shaped(mean, "mean", saved).reshape(broadcast)
    rstd = _shaped(rstd, "rstd", saved).reshape(broadcast)
    added = np.zeros_like(x) if residual is None else _alike(residual, "residual", x, axis)

    dx, u = np.zeros_like(x), np.zeros_like(x)
    dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
    for index, batch in enumerate(batches):
        xhat = (x[batch] - mean[index]) * rstd[index]
        u[batch] = dy[batch] * activation_derivative(weight * xhat + bias + added[batch], activation)
        gradients = _gradients(u[batch], xhat, rstd[index], weight, counted[batch])
        dx[batch] = gradients[0]
        dweight, dbias = dweight + gradients[1], dbias + gradients[2]
    results = _channels_back(dx, axis), dweight.ravel(), dbias.ravel()
    return results if residual is None else (*results, _channels_back(u, axis))


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


def _shaped(value: ArrayLike, name: str, shape: tuple[int, ...]) -> Float64:
    value = np.asarray(value, dtype=np.float64)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    return value


def _channels_second(x: ArrayLike, axis: int) -> Float64:
    """``x`` with the channels on axis 1; the first of the other axes, the samples, comes to be axis 0."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    return np.moveaxis(x, axis, 1)


def _channels_back(y: Float64, axis: int) -> Float64:
    return np.ascontiguousarray(np.moveaxis(y, 1, axis))


def _alike(value: ArrayLike, name: str, x: Float64, axis: int) -> Float64:
    """An array with the shape that ``x`` was given in, its channels brought to axis 1 like those of ``x``."""
    return np.moveaxis(_shaped(value, name, np.moveaxis(x, 1, axis).shape), axis, 1)


def _per_channel(parameter: ArrayLike | None, name: str, x: Float64, default: float) -> Float64:
    """A ``(C,)`` parameter in a shape that broadcasts over ``x``, its channels on axis 1."""
    channels = x.shape[1]
    value = np.asarray(np.full(channels, default) if parameter is None else parameter, dtype=np.float64)
    if value.size != channels:
        raise ValueError(f"{name} should contain {channels} elements not {value.size}")
    return value.reshape(channels, *[1] * (x.ndim - 2))


def _running(
    running_mean: NDArray[Any] | None, running_var: NDArray[Any] | None, x: Float64, needed: str
) -> tuple[Float64, Float64]:
    """Running statistics in shapes that broadcast over ``x``; ``needed`` says when they must be there, if they must."""
    if needed and (running_mean is None or running_var is None):
        raise ValueError(f"Expected running_mean and running_var to be defined when {needed}")
    return _per_channel(running_mean, "running_mean", x, 0.0), _per_channel(running_var, "running_var", x, 1.0)


def _update(
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    count: NDArray[np.int_],
    mean: Float64,
    var: Float64,
    momentum: float,
) -> None:
    """Moves the running statistics, in place, by the average over axis 0 of those that at least two elements made."""
    several = count > 1
    if not several.any():
        return
    for running, new in ((running_mean, mean), (running_var, var * count / np.maximum(count - 1, 1))):
        if running is not None:
            average = (new.sum(axis=0, where=several) / several.sum(axis=0)).reshape(running.shape)
            running[...] = (1 - momentum) * np.asarray(running, dtype=np.float64) + momentum * average


def _batches(x: Float64, ghost_batch_size: int | None) -> list[slice]:
    """Slices of the samples; each has statistics of its own."""
    if ghost_batch_size is None:
        return [slice(None)]
    if ghost_batch_size < 1:
        raise ValueError(f"ghost_batch_size must be a positive integer or None, not {ghost_batch_size}")
    return [slice(start, start + ghost_batch_size) for start in range(0, x.shape[0], ghost_batch_size)]


def _counted(x: Float64, mask: ArrayLike | None) -> NDArray[np.bool_]:
    """Which elements enter the statistics, in a shape that broadcasts over ``x``, its channels on axis 1."""
    shape = (x.shape[0], *x.shape[2:])
    counted = np.ones(shape, dtype=np.bool_) if mask is None else np.asarray(mask, dtype=np.bool_)
    if counted.shape != shape:
        raise ValueError(f"mask must have the shape of x without its channels, {shape}, got {counted.shape}")
    return np.expand_dims(counted, 1)
