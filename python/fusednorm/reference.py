"""Batch normalization and its family in float64 NumPy, straight from the formulas: for teaching and for checking.

Names, argument order and conventions are the library's. Arrays of any real dtype go in, float64 comes out.

The forward pass, with sums over the n elements that share a statistic::

    mean = sum(x) / n
    var  = sum((x - mean)**2) / n                  biased: divided by n
    rstd = 1 / sqrt(var + eps)                     reciprocal of the standard deviation
    xhat = (x - mean) * rstd
    y    = weight * xhat + bias

The norms differ in what shares a statistic. With N samples of C channels, and spatial axes or none::

    norm          one statistic for each           taken over
    batch         channel                          samples, spatial axes
    instance      sample and channel               spatial axes
    group         sample and group of channels     the group's channels, spatial axes
    layer         index of the axes in front       the last axes, whatever they are
    RMS           as layer                         as layer; mean = 0, so var = sum(x**2) / n
    weight        index of one axis of v           its other axes; xhat = v / sqrt(sum(v**2))
    switchable    sample and channel               a mixture: of the instance, of its sample, of its batch

The backward pass, given dy = dL/dy. The mean and the variance depend on every x of the statistic; that is where the two
sums in dx come from::

    dbias   = sum(dy)                              over the elements that share the parameter
    dweight = sum(dy * xhat)
    g       = weight * dy                          dL/dxhat
    dx      = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n)

Where there is no mean the first of them vanishes, and where the statistics are constants (evaluation, a frozen layer)
both: dx = rstd * g.

Under a mask only the counted elements make the statistics, but every element uses them: the sums of the backward pass
run over *all* elements, and reach dx through the counted ones; n is the count.

Batch norm adds a residual and an activation: y = activation(pre), pre = weight * xhat + bias + residual. Then dL/dpre =
dy * activation'(pre), which is also dL/dresidual, takes the place of dy above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64: TypeAlias = NDArray[np.float64]
Activation: TypeAlias = str | tuple[str, float] | None

LEAKY_RELU_SLOPE = 0.01


# What all norms share. Statistics and parameters have length 1 along the axes that they are shared over, so they
# broadcast over x; and their shapes say what a sum runs over.


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
    count = np.broadcast_to(counted, x.shape).sum(axis=axes, keepdims=True)
    n = np.maximum(count, 1)

    def average(values: Float64) -> Float64:
        mean: Float64 = _sum_to(values if counted is True else np.where(counted, values, 0.0), count.shape) / n
        return mean

    with np.errstate(invalid="ignore"):  # infinity minus infinity
        mean = average(x)
        # The sum rounds in proportion to |mean|; what is left of it shows in the deviations, and is added back.
        mean = mean + average(x - mean)
        variance = average((x - mean) ** 2)
    return count, mean, variance


def _gradients(
    dy: Float64,
    xhat: Float64,
    rstd: Float64,
    weight: Float64,
    counted: NDArray[np.bool_] | bool = True,
    centered: bool = True,
) -> tuple[Float64, Float64, Float64]:
    """``dx, dweight, dbias`` of ``y = weight * xhat + bias``.

    ``counted`` are the elements that made the statistics: none if these were constants. Not ``centered``: no mean was
    subtracted.
    """
    g, through = weight * dy, np.zeros(1)
    if counted is not False:
        n = np.maximum(_sum_to(np.broadcast_to(counted, xhat.shape), rstd.shape), 1)
        through_mean = _sum_to(g, rstd.shape) / n if centered else 0.0
        through_var = xhat * _sum_to(g * xhat, rstd.shape) / n
        through = through_mean + through_var
    dx = rstd * (g - (through if counted is True else np.where(counted, through, 0.0)))
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
    correction: int = 1,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """``y = activation(weight * (x - mean) * rstd + bias + residual)`` and the statistics it used.

    Ioffe & Szegedy, "Batch Normalization", 2015; ghost batches: Hoffer et al., "Train longer, generalize better", 2017.

    Args:
        x: ``(N, C)``, ``(N, C, *spatial)`` or any shape of at least two axes; ``axis`` holds the C channels. Any real
            dtype, here and below.
        weight, bias: ``(C,)``; absent, 1 and 0.
        running_mean, running_var: ``(C,)`` floating arrays. Training moves them *in place* by
            ``running = (1 - momentum) * running + momentum * new``, the new variance being over ``n - correction``.
            Statistics of fewer than two elements leave them as they are. Evaluation needs both.
        training: normalize with the statistics of ``x``; otherwise with the running ones, as constants.
        momentum: weight of the new value.
        eps: added to the variance, under the root.
        axis: the axis that is kept, -1 for channels last.
        residual: the shape of ``x``, added before the activation.
        activation: see :func:`activate`.
        ghost_batch_size: compute statistics over slices of this many samples, as calls on these slices in turn would.
            The last slice may be shorter. Samples are counted along the first axis that does not hold the channels.
        correction: 1, the running variance is unbiased, or 0.
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
            _update(running_mean, running_var, count, batch_mean, batch_var, momentum, correction)

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


def instance_norm(
    x: ArrayLike,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> Float64:
    """Instance normalization with the arguments of ``torch.nn.functional.instance_norm``: ``y`` of
    :func:`instance_norm_forward`, where shapes, dtypes and errors are described.
    """
    y, _, _ = instance_norm_forward(
        x,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        use_input_stats=use_input_stats,
        momentum=momentum,
        eps=eps,
        axis=axis,
        mask=mask,
    )
    return y


def instance_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """``y = weight * (x - mean) * rstd + bias`` with statistics of each channel of each sample, and these.

    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016. The
    running statistics are PyTorch's: the paper has none, and normalizes by those of the instance in evaluation, too.

    Args:
        x: ``(N, C, *spatial)``, or the C channels on another ``axis``; the first of the other axes holds the samples.
        weight, bias: ``(C,)``; absent, 1 and 0.
        running_mean, running_var: ``(C,)`` floating arrays. With ``use_input_stats`` they move *in place* by
            ``running = (1 - momentum) * running + momentum * new``, where new is the mean over the samples of the
            means, and of the unbiased variances, of the instances. Instances of fewer than two elements are left out;
            if there are no others, the running statistics stay as they are.
        use_input_stats: normalize with the statistics of ``x``; otherwise with the running ones, as constants.
        momentum: weight of the new value.
        eps: added to the variance, under the root.
        axis: the axis that holds the channels, -1 for channels last.
        mask: boolean, the shape of ``x`` without ``axis``; only elements with True enter the statistics. ``y`` is
            computed everywhere.

    Returns:
        ``y, mean, rstd``, float64: ``y`` in the shape of ``x``, ``mean`` and ``rstd`` ``(N, C)``. Statistics of no
        element are mean 0 and variance 0.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit; one spatial element with ``use_input_stats``; running statistics missing
            without.
    """
    x = _channels_second(x, axis)
    weight, bias = _per_channel(weight, "weight", x, 1.0), _per_channel(bias, "bias", x, 0.0)
    needed = "" if use_input_stats else "use_input_stats is false"
    stored_mean, stored_var = _running(running_mean, running_var, x, needed)
    counted = _counted(x, mask)
    if use_input_stats and math.prod(x.shape[2:]) == 1:
        size = np.moveaxis(x, 1, axis).shape
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {size}")

    mean, var = (np.broadcast_to(stored, (x.shape[0], *stored.shape)) for stored in (stored_mean, stored_var))
    if use_input_stats:
        count, mean, var = _moments(x, tuple(range(2, x.ndim)), counted)
        _update(running_mean, running_var, count, mean, var, momentum)
    rstd = 1 / np.sqrt(var + eps)
    y = weight * ((x - mean) * rstd) + bias
    return _channels_back(y, axis), mean.reshape(x.shape[:2]), rstd.reshape(x.shape[:2])


def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_input_stats: bool = True,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Gradients of :func:`instance_norm_forward`.

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, weight, axis, mask: as in the forward call.
        mean, rstd: what the forward call returned.
        bias: without effect; the library gives its gradient its dtype.
        use_input_stats: False if ``mean`` and ``rstd`` were constants.

    Returns:
        ``dx, dweight, dbias``, float64: ``dx`` in the shape of ``x``, ``dweight`` and ``dbias`` ``(C,)``.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit.
    """
    x = _channels_second(x, axis)
    dy = _alike(dy, "dy", x, axis)
    broadcast = (*x.shape[:2], *[1] * (x.ndim - 2))
    mean = _shaped(mean, "mean", x.shape[:2]).reshape(broadcast)
    rstd = _shaped(rstd, "rstd", x.shape[:2]).reshape(broadcast)
    weight = _per_channel(weight, "weight", x, 1.0)
    counted = _counted(x, mask) & use_input_stats
    dx, dweight, dbias = _gradients(dy, (x - mean) * rstd, rstd, weight, counted)
    return _channels_back(dx, axis), dweight.ravel(), dbias.ravel()


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> Float64:
    """Group normalization with the arguments of ``torch.nn.functional.group_norm``: ``y`` of
    :func:`group_norm_forward`, where shapes, dtypes and errors are described.
    """
    y, _, _ = group_norm_forward(x, num_groups, weight, bias, eps, axis=axis, mask=mask)
    return y


def group_norm_forward(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """``y = weight * (x - mean) * rstd + bias`` with statistics of each group of channels of each sample, and these.

    Wu & He, "Group Normalization", 2018.

    Args:
        x: ``(N, C)``, ``(N, C, *spatial)``, or the C channels on another ``axis``; the first of the other axes holds
            the samples.
        num_groups: how many groups of ``C / num_groups`` consecutive channels there are. C of them are the instance
            norm; one is the layer norm over channels and positions, but for its weight and bias.
        weight, bias: ``(C,)``; absent, 1 and 0.
        eps: added to the variance, under the root.
        axis: the axis that holds the channels, -1 for channels last.
        mask: boolean, the shape of ``x`` without ``axis``; only elements with True enter the statistics. ``y`` is
            computed everywhere.

    Returns:
        ``y, mean, rstd``, float64: ``y`` in the shape of ``x``, ``mean`` and ``rstd`` ``(N, num_groups)``. Statistics
        of no element are mean 0 and variance 0.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit; C not divisible by ``num_groups``.
    """
    x = _channels_second(x, axis)
    weight, bias = _per_channel(weight, "weight", x, 1.0), _per_channel(bias, "bias", x, 0.0)
    groups = _grouped(x, num_groups)
    counted = np.expand_dims(_counted(x, mask), 1)
    _, mean, var = _moments(groups, tuple(range(2, groups.ndim)), counted)
    rstd = 1 / np.sqrt(var + eps)
    y = weight * ((groups - mean) * rstd).reshape(x.shape) + bias
    saved = x.shape[0], num_groups
    return _channels_back(y, axis), mean.reshape(saved), rstd.reshape(saved)


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Gradients of :func:`group_norm_forward`.

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, weight, axis, mask: as in the forward call.
        mean, rstd: what the forward call returned, ``(N, num_groups)``.
        bias: without effect; the library gives its gradient its dtype.

    Returns:
        ``dx, dweight, dbias``, float64: ``dx`` in the shape of ``x``, ``dweight`` and ``dbias`` ``(C,)``.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit.
    """
    x = _channels_second(x, axis)
    dy = _alike(dy, "dy", x, axis)
    num_groups = np.atleast_1d(mean).shape[-1]
    groups = _grouped(x, num_groups)
    saved, broadcast = (x.shape[0], num_groups), (x.shape[0], num_groups, *[1] * (x.ndim - 1))
    mean = _shaped(mean, "mean", saved).reshape(broadcast)
    rstd = _shaped(rstd, "rstd", saved).reshape(broadcast)
    weight = _grouped(_per_channel(weight, "weight", x, 1.0)[None], num_groups)
    counted = np.expand_dims(_counted(x, mask), 1)
    dx, dweight, dbias = _gradients(dy.reshape(groups.shape), (groups - mean) * rstd, rstd, weight, counted)
    return _channels_back(dx.reshape(x.shape), axis), dweight.ravel(), dbias.ravel()


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> Float64:
    """Layer normalization with the arguments of ``torch.nn.functional.layer_norm``: ``y`` of
    :func:`layer_norm_forward`, where shapes, dtypes and errors are described.
    """
    y, _, _ = layer_norm_forward(x, normalized_shape, weight, bias, eps)
    return y


def layer_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[Float64, Float64, Float64]:
    """``y = weight * (x - mean) * rstd + bias`` with statistics over the last axes, and these.

    Ba, Kiros & Hinton, "Layer Normalization", 2016.

    Args:
        x: ``(*, *normalized_shape)``.
        normalized_shape: lengths of the last axes, over which the statistics are taken; an integer for one axis.
        weight, bias: in ``normalized_shape``; absent, 1 and 0.
        eps: added to the variance, under the root.

    Returns:
        ``y, mean, rstd``, float64: ``y`` in the shape of ``x``, ``mean`` and ``rstd`` without the normalized axes.

    Raises:
        ValueError: a shape that does not fit; an empty ``normalized_shape``.
    """
    x = np.asarray(x, dtype=np.float64)
    normalized, kept = _normalized(x, normalized_shape)
    weight, bias = _as_normalized(weight, "weight", normalized, 1.0), _as_normalized(bias, "bias", normalized, 0.0)
    _, mean, var = _moments(x, tuple(range(len(kept), x.ndim)))
    rstd = 1 / np.sqrt(var + eps)
    y = weight * ((x - mean) * rstd) + bias
    return y, mean.reshape(kept), rstd.reshape(kept)


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    rstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Gradients of :func:`layer_norm_forward`.

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, weight: as in the forward call.
        mean, rstd: what the forward call returned. The axes of ``x`` that they lack are the normalized ones.
        bias: without effect; the library gives its gradient its dtype.

    Returns:
        ``dx, dweight, dbias``, float64: ``dx`` in the shape of ``x``, ``dweight`` and ``dbias`` in
        ``normalized_shape``.

    Raises:
        ValueError: a shape that does not fit.
    """
    x = np.asarray(x, dtype=np.float64)
    dy = _shaped(dy, "dy", x.shape)
    normalized, kept = _normalized(x, x.shape[np.ndim(mean) :])
    broadcast = kept + (1,) * len(normalized)
    mean = _shaped(mean, "mean", kept).reshape(broadcast)
    rstd = _shaped(rstd, "rstd", kept).reshape(broadcast)
    return _gradients(dy, (x - mean) * rstd, rstd, _as_normalized(weight, "weight", normalized, 1.0))


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
) -> Float64:
    """RMS normalization with the arguments of ``torch.nn.functional.rms_norm``: ``y`` of :func:`rms_norm_forward`,
    where shapes, dtypes and errors are described.
    """
    y, _ = rms_norm_forward(x, normalized_shape, weight, eps)
    return y


def rms_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
) -> tuple[Float64, Float64]:
    """``y = weight * x * rstd`` with ``rstd = 1 / sqrt(sum(x**2) / n + eps)`` over the last axes, and ``rstd``.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.

    Args:
        x: ``(*, *normalized_shape)``.
        normalized_shape: lengths of the last axes, over which the mean square is taken; an integer for one axis.
        weight: in ``normalized_shape``; absent, 1.
        eps: added to the mean square, under the root. None: the distance from 1 to the next number of float32 if ``x``
            is float32, float16 or bfloat16, otherwise of float64.

    Returns:
        ``y, rstd``, float64: ``y`` in the shape of ``x``, ``rstd`` without the normalized axes.

    Raises:
        ValueError: a shape that does not fit; an empty ``normalized_shape``.
    """
    if eps is None:
        dtype = np.asarray(x).dtype
        small = dtype.name in ("float32", "float16", "bfloat16")
        eps = float(np.finfo(np.float32 if small else np.float64).eps)
    x = np.asarray(x, dtype=np.float64)
    normalized, kept = _normalized(x, normalized_shape)
    weight = _as_normalized(weight, "weight", normalized, 1.0)
    n = max(math.prod(normalized), 1)
    rstd = 1 / np.sqrt(_sum_to(x**2, kept + (1,) * len(normalized)) / n + eps)
    return weight * (x * rstd), rstd.reshape(kept)


def rms_norm_backward(
    dy: ArrayLike, x: ArrayLike, rstd: ArrayLike, weight: ArrayLike | None = None
) -> tuple[Float64, Float64]:
    """Gradients of :func:`rms_norm_forward`.

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, weight: as in the forward call.
        rstd: what the forward call returned. The axes of ``x`` that it lacks are the normalized ones.

    Returns:
        ``dx, dweight``, float64: ``dx`` in the shape of ``x``, ``dweight`` in ``normalized_shape``.

    Raises:
        ValueError: a shape that does not fit.
    """
    x = np.asarray(x, dtype=np.float64)
    dy = _shaped(dy, "dy", x.shape)
    normalized, kept = _normalized(x, x.shape[np.ndim(rstd) :])
    rstd = _shaped(rstd, "rstd", kept).reshape(kept + (1,) * len(normalized))
    weight = _as_normalized(weight, "weight", normalized, 1.0)
    dx, dweight, _ = _gradients(dy, x * rstd, rstd, weight, centered=False)
    return dx, dweight


def switchable_norm(
    x: ArrayLike,
    mean_logits: ArrayLike,
    var_logits: ArrayLike,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Float64:
    """Switchable normalization with arguments in the order of :func:`batch_norm`: ``y`` of
    :func:`switchable_norm_forward`, where shapes, dtypes and errors are described.
    """
    y, _, _, _ = switchable_norm_forward(
        x,
        mean_logits,
        var_logits,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        axis=axis,
    )
    return y


def switchable_norm_forward(
    x: ArrayLike,
    mean_logits: ArrayLike,
    var_logits: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: NDArray[Any] | None = None,
    running_var: NDArray[Any] | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[Float64, Float64, Float64, Float64]:
    """``y = weight * (x - mean) * rstd + bias`` with a learned mixture of statistics, and what it was mixed from.

    Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", 2018. With j running over the
    statistics of the instance, of the layer (all channels and positions of a sample) and of the batch::

        mean = sum_j softmax(mean_logits)[j] * means[j]
        var  = sum_j softmax(var_logits)[j] * variances[j]
        rstd = 1 / sqrt(var + eps)

    Args:
        x: ``(N, C)``, ``(N, C, *spatial)``, or the C channels on another ``axis``; the first of the other axes holds
            the samples.
        mean_logits, var_logits: ``(3,)``, for instance, layer and batch; the paper's control parameters, λ and λ'.
        weight, bias: ``(C,)``; absent, 1 and 0.
        running_mean, running_var: ``(C,)`` floating arrays, the batch's part, as in :func:`batch_norm_forward`.
            Evaluation needs both.
        training: take the batch's part from ``x``; otherwise from the running statistics, as constants. The other
            parts come from ``x`` in evaluation, too.
        momentum: weight of the new value.
        eps: added to the variance, under the root.
        axis: the axis that holds the channels, -1 for channels last.

    Returns:
        ``y, means, variances, rstd``, float64: ``y`` in the shape of ``x``, ``means`` and ``variances`` ``(3, N, C)``,
        the parts in the order of the logits, ``rstd`` ``(N, C)``.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit; one value per channel in training; running statistics missing in
            evaluation.
    """
    x = _channels_second(x, axis)
    weight, bias = _per_channel(weight, "weight", x, 1.0), _per_channel(bias, "bias", x, 0.0)
    p, q = _softmax(mean_logits, "mean_logits"), _softmax(var_logits, "var_logits")
    needed = "" if training else "training=False"
    stored_mean, stored_var = _running(running_mean, running_var, x, needed)
    if training and x.size == x.shape[1] > 0:
        size = np.moveaxis(x, 1, axis).shape
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")

    spatial = tuple(range(2, x.ndim))
    _, instance_mean, instance_var = _moments(x, spatial)
    _, layer_mean, layer_var = _moments(x, (1, *spatial))
    batch_mean, batch_var = stored_mean, stored_var
    if training:
        count, batch_mean, batch_var = _moments(x, (0, *spatial))
        _update(running_mean, running_var, count, batch_mean, batch_var, momentum)
    means = np.stack(np.broadcast_arrays(instance_mean, layer_mean, batch_mean))
    variances = np.stack(np.broadcast_arrays(instance_var, layer_var, batch_var))
    rstd = 1 / np.sqrt(np.tensordot(q, variances, 1) + eps)
    y = weight * ((x - np.tensordot(p, means, 1)) * rstd) + bias
    saved = 3, *x.shape[:2]
    return _channels_back(y, axis), means.reshape(saved), variances.reshape(saved), rstd.reshape(saved[1:])


def switchable_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    means: ArrayLike,
    variances: ArrayLike,
    rstd: ArrayLike,
    mean_logits: ArrayLike,
    var_logits: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    training: bool = True,
    axis: int = 1,
) -> tuple[Float64, Float64, Float64, Float64, Float64]:
    """Gradients of :func:`switchable_norm_forward`.

    By the chain rule, from each instance through the statistics that it was mixed from; p and q are the softmax of the
    logits, n is how many elements made statistic j::

        dmean = -rstd * sum(g)                             over the instance
        dvar  = -rstd**2 * sum(g * xhat) / 2
        dmeans[j] = p[j] * sum(dmean)                      over the instances that share statistic j
        dvariances[j] = q[j] * sum(dvar)
        dx = rstd * g + sum_j (dmeans[j] + dvariances[j] * 2 * (x - means[j])) / n
        dmean_logits[j] = p[j] * sum(dmean * (means[j] - mean))        over all instances
        dvar_logits[j] = q[j] * sum(dvar * (variances[j] - var))

    Args:
        dy: gradient of the loss with respect to ``y``, the shape of ``x``.
        x, mean_logits, var_logits, weight, axis: as in the forward call.
        means, variances, rstd: what the forward call returned.
        bias: without effect; the library gives its gradient its dtype.
        training: False if the batch's part was constant.

    Returns:
        ``dx, dweight, dbias, dmean_logits, dvar_logits``, float64: ``dx`` in the shape of ``x``, ``dweight`` and
        ``dbias`` ``(C,)``, the gradients of the logits ``(3,)``.

    Raises:
        numpy.exceptions.AxisError: ``axis`` out of range.
        ValueError: a shape that does not fit.
    """
    x = _channels_second(x, axis)
    dy = _alike(dy, "dy", x, axis)
    weight = _per_channel(weight, "weight", x, 1.0)
    p, q = _softmax(mean_logits, "mean_logits"), _softmax(var_logits, "var_logits")
    samples, channels, *spatial = x.shape
    ones = [1] * len(spatial)
    means = _shaped(means, "means", (3, samples, channels)).reshape(3, samples, channels, *ones)
    variances = _shaped(variances, "variances", (3, samples, channels)).reshape(means.shape)
    rstd = _shaped(rstd, "rstd", (samples, channels)).reshape(means.shape[1:])

    mean, var = np.tensordot(p, means, 1), np.tensordot(q, variances, 1)
    xhat = (x - mean) * rstd
    dx, dweight, dbias = _gradients(dy, xhat, rstd, weight, counted=False)  # what passes by the statistics
    dmean = -rstd * _sum_to(weight * dy, rstd.shape)
    dvar = -(rstd**2) * _sum_to(weight * dy * xhat, rstd.shape) / 2
    shapes = [(samples, channels, *ones), (samples, 1, *ones), (1, channels, *ones)]
    for j, shape in enumerate(shapes if training else shapes[:2]):
        n = max(x.size // max(math.prod(shape), 1), 1)
        dmean_j, dvar_j = p[j] * _sum_to(dmean, shape), q[j] * _sum_to(dvar, shape)
        dx += dmean_j / n + dvar_j * 2 / n * (x - means[j])
    dmean_logits = p * (dmean * (means - mean)).reshape(3, -1).sum(axis=1)
    dvar_logits = q * (dvar * (variances - var)).reshape(3, -1).sum(axis=1)
    return _channels_back(dx, axis), dweight.ravel(), dbias.ravel(), dmean_logits, dvar_logits


def weight_norm(v: ArrayLike, g: ArrayLike, dim: int | None = 0) -> Float64:
    """Weight normalization: ``w`` of :func:`weight_norm_forward`, where shapes, dtypes and errors are described."""
    w, _ = weight_norm_forward(v, g, dim)
    return w


def weight_norm_forward(v: ArrayLike, g: ArrayLike, dim: int | None = 0) -> tuple[Float64, Float64]:
    """``w = g * v / norm``, a weight of length ``g`` in the direction of ``v``, and ``norm = sqrt(sum(v**2))``.

    Salimans & Kingma, "Weight Normalization", 2016.

    Args:
        v: any shape.
        g: the shape of ``v`` with length 1 for every axis but ``dim``; ``()`` if that is None.
        dim: the axis that is kept: each of its indices has a length of its own. None: all of ``v`` has one. -1 is the
            last axis, where PyTorch takes it for None.

    Returns:
        ``w, norm``, float64: ``w`` in the shape of ``v``, ``norm`` in that of ``g``. Where ``v`` is 0 it has no
        direction, and ``w`` is NaN.

    Raises:
        numpy.exceptions.AxisError: ``dim`` out of range.
        ValueError: a shape that does not fit.
    """
    v = np.asarray(v, dtype=np.float64)
    g = _shaped(g, "g", _norm_shape(v, dim))
    norm = np.sqrt(_sum_to(v**2, g.shape))
    with np.errstate(invalid="ignore"):
        return g * (v / norm), norm


def weight_norm_backward(
    dw: ArrayLike, v: ArrayLike, g: ArrayLike, norm: ArrayLike, dim: int | None = 0
) -> tuple[Float64, Float64]:
    """Gradients of :func:`weight_norm_forward`. ``dv`` has nothing along ``v``: that part changes no direction.

    Args:
        dw: gradient of the loss with respect to ``w``, the shape of ``v``.
        v, g, dim: as in the forward call.
        norm: what the forward call returned.

    Returns:
        ``dv, dg``, float64, in the shapes of ``v`` and ``g``.

    Raises:
        numpy.exceptions.AxisError: ``dim`` out of range.
        ValueError: a shape that does not fit.
    """
    v = np.asarray(v, dtype=np.float64)
    dw = _shaped(dw, "dw", v.shape)
    g = _shaped(g, "g", _norm_shape(v, dim))
    norm = _shaped(norm, "norm", g.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        direction = v / norm
        dg = _sum_to(dw * direction, g.shape)
        return g / norm * (dw - direction * dg), dg


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


def _softmax(logits: ArrayLike, name: str) -> Float64:
    logits = _shaped(logits, name, (3,))
    powers = np.exp(logits - logits.max())
    weights: Float64 = powers / powers.sum()
    return weights


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
    correction: int = 1,
) -> None:
    """Moves the running statistics, in place, by the average over axis 0 of those that at least two elements made."""
    several = count > 1
    if not several.any():
        return
    for running, new in ((running_mean, mean), (running_var, var * count / np.maximum(count - correction, 1))):
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


def _grouped(x: Float64, num_groups: int) -> Float64:
    """``x``, its channels on axis 1, as (N, G, C / G, *spatial)."""
    samples, channels, *spatial = x.shape
    if num_groups < 1:
        raise ValueError(f"Expected num groups to be greater than 0, got {num_groups}")
    if channels % num_groups:
        raise ValueError(f"num_channels ({channels}) must be divisible by num_groups ({num_groups})")
    return x.reshape(samples, num_groups, channels // num_groups, *spatial)


def _normalized(x: Float64, normalized_shape: int | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The normalized shape as a tuple, and the lengths of the axes before it."""
    normalized = tuple(np.atleast_1d(normalized_shape).tolist())
    if not normalized:
        raise ValueError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
            "normalized_shape = []"
        )
    kept = x.shape[: max(x.ndim - len(normalized), 0)]
    if x.shape != kept + normalized:
        wanted = ", ".join(map(str, ("*", *normalized)))
        raise ValueError(
            f"Given normalized_shape={list(normalized)}, expected input with shape [{wanted}], but got input of "
            f"size{list(x.shape)}"
        )
    return normalized, kept


def _as_normalized(parameter: ArrayLike | None, name: str, normalized: tuple[int, ...], default: float) -> Float64:
    """A parameter in the normalized shape, which broadcasts over x as it is."""
    value = np.asarray(np.full(normalized, default) if parameter is None else parameter, dtype=np.float64)
    if value.shape != normalized:
        raise ValueError(
            f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape {list(value.shape)} and "
            f"normalized_shape = {list(normalized)}"
        )
    return value


def _norm_shape(v: Float64, dim: int | None) -> tuple[int, ...]:
    """The shape of the lengths of ``v``: all its axes but ``dim`` with length 1."""
    if dim is None:
        return ()
    if not -v.ndim <= dim < v.ndim:
        raise np.exceptions.AxisError(dim, v.ndim)
    return tuple(length if axis == dim % v.ndim else 1 for axis, length in enumerate(v.shape))
