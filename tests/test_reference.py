"""The reference and the list of cases, checked without the extension: finite differences, PyTorch, plain loops, and the
properties that the norms have on paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from fusednorm import reference
from fusednorm.reference import Activation, Float64
from fusednorm.testing import cases
from fusednorm.testing.cases import BENCH, BENCH_CUDA, CASES, Case, Inputs, Outputs

ACTIVATIONS: list[Activation] = [None, "relu", "leaky_relu", ("leaky_relu", 0.3), "silu", "sigmoid", "tanh"]
LAYOUTS = [((5, 3), 1), ((5, 3), -1), ((3, 5), 0), ((4, 3, 2, 2), 1), ((4, 2, 2, 3), -1), ((2, 2, 3, 2), 2)]


def draw(shape: tuple[int, ...], axis: int, seed: int = 0) -> dict[str, Float64]:
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    return {
        "x": 3 + 2 * rng.standard_normal(shape),
        "dy": rng.standard_normal(shape),
        "weight": 1 + 0.5 * rng.standard_normal(channels),
        "bias": rng.standard_normal(channels),
        "residual": rng.standard_normal(shape),
        "running_mean": 3 + rng.standard_normal(channels),
        "running_var": rng.uniform(2, 6, channels),
    }


def draw_mask(shape: tuple[int, ...], axis: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    axis %= len(shape)
    mask = np.random.default_rng(1).random(shape[:axis] + shape[axis + 1 :]) < 0.6
    mask.ravel()[:2] = True, False
    return mask


def central_difference(function: Callable[[Float64], float], at: Float64, step: float = 1e-5) -> Float64:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        above, below = at.copy(), at.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def check_quotients(
    forward: Callable[..., tuple[Float64, ...]],
    variables: dict[str, Float64],
    gradients: tuple[Float64, ...],
    dy: Float64,
) -> None:
    """``gradients``, in the order of ``variables``, against difference quotients of ``sum(dy * y)``."""
    for gradient, name in zip(gradients, variables, strict=True):

        def loss(value: Float64, name: str = name) -> float:
            return float(np.sum(dy * forward(**variables | {name: value})[0]))

        quotient = central_difference(loss, variables[name])
        assert gradient.shape == quotient.shape, name
        np.testing.assert_allclose(gradient, quotient, rtol=1e-7, atol=1e-8, err_msg=name)


def check_gradients(
    shape: tuple[int, ...],
    axis: int,
    *,
    training: bool = True,
    residual: bool = False,
    affine: bool = True,
    activation: Activation = None,
    **options: Any,
) -> None:
    arrays = draw(shape, axis)
    options |= {"training": training, "axis": axis}
    names = ["x", *(("weight", "bias") if affine else ()), *(("residual",) if residual else ())]
    variables: dict[str, Any] = {name: arrays[name] for name in names}
    running: dict[str, Any] = {} if training else {name: arrays[name] for name in ("running_mean", "running_var")}

    pre, mean, rstd = reference.batch_norm_forward(**variables, **running, **options)
    assert np.min(np.abs(pre)) > 1e-4, "an element too close to the kink for a difference quotient"
    gradients = reference.batch_norm_backward(
        arrays["dy"], mean=mean, rstd=rstd, activation=activation, **variables, **options
    )
    assert len(gradients) == 3 + residual
    by_name = dict(zip(("x", "weight", "bias", "residual"), gradients, strict=False))

    def forward(**changed: Float64) -> tuple[Float64, ...]:
        return reference.batch_norm_forward(**changed, **running, **options, activation=activation)

    check_quotients(forward, variables, tuple(by_name[name] for name in names), arrays["dy"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_gradients_in_every_layout(shape: tuple[int, ...], axis: int, training: bool) -> None:
    check_gradients(shape, axis, training=training)
    check_gradients(shape, axis, training=training, affine=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_activation(activation: Activation, residual: bool, training: bool) -> None:
    for shape, axis in [((4, 3, 2, 2), 1), ((4, 2, 2, 3), -1)]:
        check_gradients(shape, axis, training=training, residual=residual, activation=activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ghost_batch_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 2, 2), 1), ((4, 2, 2, 3), -1), ((3, 4, 2), 0)])
def test_gradients_of_ghost_batches(shape: tuple[int, ...], axis: int, ghost_batch_size: int, training: bool) -> None:
    check_gradients(shape, axis, training=training, ghost_batch_size=ghost_batch_size, activation="silu", residual=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_gradients_under_a_mask(shape: tuple[int, ...], axis: int, training: bool) -> None:
    check_gradients(shape, axis, training=training, mask=draw_mask(shape, axis), activation="tanh", residual=True)


@pytest.mark.parametrize("ghost_batch_size", [2, 3])
def test_gradients_of_masked_ghost_batches(ghost_batch_size: int) -> None:
    shape = (5, 3, 4)
    check_gradients(shape, 1, mask=draw_mask(shape, 1), ghost_batch_size=ghost_batch_size, activation="leaky_relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivative(activation: Activation) -> None:
    pre = np.array([-30.0, -3.0, -0.7, 0.3, 2.0, 30.0])
    step = 1e-6
    above, below = reference.activate(pre + step, activation), reference.activate(pre - step, activation)
    derivative = reference.activation_derivative(pre, activation)
    np.testing.assert_allclose(derivative, (above - below) / (2 * step), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out_are_finite(activation: Activation) -> None:
    pre = np.array([-1e300, -1e4, 1e4, 1e300])
    assert np.all(np.isfinite(reference.activate(pre, activation)))
    assert np.all(np.isfinite(reference.activation_derivative(pre, activation)))


def test_activations_at_zero() -> None:
    assert reference.activation_derivative(0.0, "relu") == 0
    assert reference.activation_derivative(0.0, "leaky_relu") == 0.01
    assert reference.activate(-2.0, ("leaky_relu", 0.5)) == -1


@pytest.mark.parametrize("activation", ["gelu", ("relu", 0.1), ("gelu", 0.1)])
def test_unknown_activations_are_refused(activation: Activation) -> None:
    with pytest.raises(ValueError, match="leaky_relu"):
        reference.activate(np.zeros(3), activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((4, 3, 2, 5), 1), ((4, 2, 5, 3), -1), ((3, 4, 2, 2, 2), 0)])
def test_agrees_with_torch(
    shape: tuple[int, ...], axis: int, activation: Activation, residual: bool, training: bool
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = draw(shape, axis)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    for name in ("x", "weight", "bias", "residual"):
        tensors[name].requires_grad_(True)
    x = tensors["x"].movedim(axis, 1)
    running = tensors["running_mean"], tensors["running_var"]
    functional = torch.nn.functional
    y = functional.batch_norm(
        x, *running, tensors["weight"], tensors["bias"], training=training, momentum=0.3, eps=1e-3
    ).movedim(1, axis)
    if residual:
        y = y + tensors["residual"]
    if isinstance(activation, tuple):
        y = functional.leaky_relu(y, activation[1])
    elif activation is not None:
        y = getattr(functional, activation)(y)
    y.backward(tensors["dy"])

    options: dict[str, Any] = {
        "training": training,
        "axis": axis,
        "residual": arrays["residual"] if residual else None,
        "activation": activation,
    }
    got, mean, rstd = reference.batch_norm_forward(
        arrays["x"],
        arrays["weight"],
        arrays["bias"],
        running_mean=arrays["running_mean"],
        running_var=arrays["running_var"],
        momentum=0.3,
        eps=1e-3,
        **options,
    )
    gradients = reference.batch_norm_backward(
        arrays["dy"], arrays["x"], mean, rstd, arrays["weight"], arrays["bias"], **options
    )
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(got, y.detach().numpy(), **close)
    for gradient, variable in zip(gradients, ("x", "weight", "bias", "residual"), strict=False):
        np.testing.assert_allclose(gradient, tensors[variable].grad.numpy(), **close, err_msg=variable)
    for variable in ("running_mean", "running_var"):
        np.testing.assert_allclose(arrays[variable], tensors[variable].numpy(), **close, err_msg=variable)


def test_moments_agree_with_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 6))
    axes: int | tuple[int, ...]
    for axes in (0, -1, (0, 2), (3, 1), (-1, 0, 1), (0, 1, 2, 3), ()):
        for correction in (0, 1) if axes != () else (0,):
            for keepdims in (False, True):
                mean, variance = reference.moments(x, axes, correction=correction, keepdims=keepdims)
                np.testing.assert_allclose(mean, x.mean(axis=axes, keepdims=keepdims), rtol=1e-13, atol=1e-15)
                np.testing.assert_allclose(variance, x.var(axis=axes, ddof=correction, keepdims=keepdims), rtol=1e-13)


def test_moments_of_large_means() -> None:
    x = (1e6 + np.random.default_rng(0).standard_normal((32768, 3))).astype(np.float32)
    mean, variance = reference.moments(x, 0)
    for channel, column in enumerate(x.T.tolist()):
        # Integers in units of the data's last bit, 2**-4, are exact.
        integers = [int(value * 16) for value in column]
        n, total = len(integers), sum(integers)
        exact = (n * sum(value * value for value in integers) - total * total) / (n * n) / 256
        assert mean[channel] == pytest.approx(total / n / 16, rel=2e-16)
        assert variance[channel] == pytest.approx(exact, rel=1e-13)


def test_moments_of_too_few_elements_are_nan() -> None:
    mean, variance = reference.moments(np.zeros((0, 2)), 0)
    assert np.all(np.isnan(mean))
    assert np.all(np.isnan(variance))
    mean, variance = reference.moments(np.ones((1, 2)), 0, correction=1)
    assert np.all(mean == 1)
    assert np.all(np.isnan(variance))


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_identity(shape: tuple[int, ...], axis: int) -> None:
    x = draw(shape, axis)["x"]
    others = tuple(other for other in range(x.ndim) if other != axis % x.ndim)
    mean, variance = reference.moments(x, others)
    y, _, _ = reference.batch_norm_forward(x, np.sqrt(variance + 1e-5), mean, axis=axis)
    np.testing.assert_allclose(y, x, rtol=1e-13)


def test_a_constant_added_changes_nothing() -> None:
    arrays = draw((6, 3, 4), 1)
    shifted = arrays["x"] + np.array([10.0, -20.0, 0.5])[:, None]
    y, mean, rstd = reference.batch_norm_forward(arrays["x"], arrays["weight"], arrays["bias"])
    y_shifted, mean_shifted, rstd_shifted = reference.batch_norm_forward(shifted, arrays["weight"], arrays["bias"])
    np.testing.assert_allclose(y_shifted, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean_shifted - mean, [10, -20, 0.5], rtol=1e-12)
    for gradient, gradient_shifted in zip(
        reference.batch_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"]),
        reference.batch_norm_backward(arrays["dy"], shifted, mean_shifted, rstd_shifted, arrays["weight"]),
        strict=True,
    ):
        np.testing.assert_allclose(gradient_shifted, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-2, 7.0, 1e4])
def test_scaling_divides_the_gradient(factor: float) -> None:
    arrays = draw((6, 3, 4), 1)
    scaled = factor * arrays["x"]
    # eps is not scaled: what is left of it is eps/variance, on either side.
    y, mean, rstd = reference.batch_norm_forward(arrays["x"], arrays["weight"], arrays["bias"], eps=1e-16)
    y_scaled, mean_scaled, rstd_scaled = reference.batch_norm_forward(
        scaled, arrays["weight"], arrays["bias"], eps=1e-16
    )
    np.testing.assert_allclose(y_scaled, y, rtol=1e-11)
    dx, dweight, dbias = reference.batch_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"])
    dx_scaled, dweight_scaled, dbias_scaled = reference.batch_norm_backward(
        arrays["dy"], scaled, mean_scaled, rstd_scaled, arrays["weight"]
    )
    np.testing.assert_allclose(factor * dx_scaled, dx, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dweight_scaled, dweight, rtol=1e-11)
    np.testing.assert_allclose(dbias_scaled, dbias, rtol=1e-14)


def test_output_is_standardized() -> None:
    x = draw((50, 3, 4), 1)["x"]
    y, _, _ = reference.batch_norm_forward(x, eps=1e-14)
    mean, variance = reference.moments(y, (0, 2))
    np.testing.assert_allclose(mean, 0, atol=1e-14)
    np.testing.assert_allclose(variance, 1, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_statistics_move_in_place(dtype: type[np.floating[Any]]) -> None:
    x = draw((6, 3, 4), 1)["x"]
    running_mean, running_var = np.full(3, 2, dtype=dtype), np.full(3, 5, dtype=dtype)
    reference.batch_norm_forward(x, running_mean=running_mean, running_var=running_var, momentum=0.25)
    assert running_mean.dtype == running_var.dtype == dtype
    np.testing.assert_allclose(running_mean, 0.75 * 2 + 0.25 * x.mean((0, 2)), rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(running_var, 0.75 * 5 + 0.25 * x.var((0, 2), ddof=1), rtol=4 * np.finfo(dtype).eps)


def test_evaluation_uses_and_keeps_running_statistics() -> None:
    arrays = draw((6, 3, 4), 1)
    running_mean, running_var = arrays["running_mean"].copy(), arrays["running_var"].copy()
    y, mean, rstd = reference.batch_norm_forward(
        arrays["x"], running_mean=running_mean, running_var=running_var, training=False, ghost_batch_size=2
    )
    assert mean.shape == rstd.shape == (3, 3)
    for row in range(3):
        np.testing.assert_array_equal(mean[row], arrays["running_mean"])
        np.testing.assert_allclose(rstd[row], (arrays["running_var"] + 1e-5) ** -0.5, rtol=1e-15)
    np.testing.assert_allclose(y, (arrays["x"] - mean[0, :, None]) * rstd[0, :, None], rtol=1e-14)
    np.testing.assert_array_equal(running_mean, arrays["running_mean"])
    np.testing.assert_array_equal(running_var, arrays["running_var"])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_the_forward(training: bool) -> None:
    arrays = draw((6, 3, 4), 1)
    options: dict[str, Any] = {"residual": arrays["residual"], "activation": "silu", "mask": draw_mask((6, 3, 4), 1)}
    running, running_too = ({name: arrays[name].copy() for name in ("running_mean", "running_var")} for _ in range(2))
    y, _, _ = reference.batch_norm_forward(
        arrays["x"], arrays["weight"], arrays["bias"], **running, training=training, momentum=0.2, eps=1e-3, **options
    )
    mean, var = running_too["running_mean"], running_too["running_var"]
    y_too = reference.batch_norm(
        arrays["x"], mean, var, arrays["weight"], arrays["bias"], training, 0.2, 1e-3, **options
    )
    np.testing.assert_array_equal(y_too, y)
    for name in running:
        np.testing.assert_array_equal(running_too[name], running[name])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ghost_batch_size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(("shape", "axis"), [((7, 3, 4), 1), ((7, 4, 3), -1), ((3, 7, 4), 0)])
def test_ghost_batches_are_consecutive_calls(
    shape: tuple[int, ...], axis: int, ghost_batch_size: int, masked: bool
) -> None:
    arrays = draw(shape, axis)
    weight, bias = arrays["weight"], arrays["bias"]
    mask = draw_mask(shape, axis) if masked else None
    running, running_too = ({name: arrays[name].copy() for name in ("running_mean", "running_var")} for _ in range(2))
    ghosts: dict[str, Any] = {"ghost_batch_size": ghost_batch_size, "mask": mask, "axis": axis, "activation": "silu"}
    y, mean, rstd = reference.batch_norm_forward(arrays["x"], weight, bias, **running, **ghosts)
    dx, dweight, dbias = reference.batch_norm_backward(arrays["dy"], arrays["x"], mean, rstd, weight, bias, **ghosts)
    assert mean.shape == rstd.shape == (math.ceil(7 / ghost_batch_size), 3)

    dweights, dbiases = [], []
    for index, start in enumerate(range(0, 7, ghost_batch_size)):
        samples = slice(start, start + ghost_batch_size)
        part = (slice(None), samples) if axis == 0 else samples
        single = ghosts | {"ghost_batch_size": None, "mask": None if mask is None else mask[samples]}
        y_part, mean_part, rstd_part = reference.batch_norm_forward(
            arrays["x"][part], weight, bias, **running_too, **single
        )
        gradients = reference.batch_norm_backward(
            arrays["dy"][part], arrays["x"][part], mean_part, rstd_part, weight, bias, **single
        )
        np.testing.assert_array_equal(y[part], y_part)
        np.testing.assert_array_equal(mean[index], mean_part)
        np.testing.assert_array_equal(rstd[index], rstd_part)
        np.testing.assert_array_equal(dx[part], gradients[0])
        dweights.append(gradients[1])
        dbiases.append(gradients[2])
    np.testing.assert_allclose(dweight, np.sum(dweights, axis=0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(dbias, np.sum(dbiases, axis=0), rtol=1e-13, atol=1e-14)
    for name in running:
        np.testing.assert_array_equal(running[name], running_too[name])


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_a_mask_selects_what_counts(shape: tuple[int, ...], axis: int) -> None:
    x = draw(shape, axis)["x"]
    mask = draw_mask(shape, axis)
    running_var = np.ones(x.shape[axis])
    y, mean, rstd = reference.batch_norm_forward(
        x, running_mean=np.zeros(x.shape[axis]), running_var=running_var, momentum=1.0, axis=axis, mask=mask
    )
    selected = np.moveaxis(x, axis, 0)[:, mask]
    np.testing.assert_allclose(mean, selected.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(selected.var(axis=1) + 1e-5), rtol=1e-13)
    np.testing.assert_allclose(running_var, selected.var(axis=1, ddof=1), rtol=1e-13)
    rows = np.moveaxis(x, axis, -1)
    np.testing.assert_allclose(np.moveaxis(y, axis, -1), (rows - mean) * rstd, rtol=1e-12, atol=1e-13)


def test_a_full_mask_is_no_mask() -> None:
    arrays = draw((6, 3, 4), 1)
    mask = np.ones((6, 4), dtype=bool)
    plain, masked = reference.batch_norm_forward(arrays["x"]), reference.batch_norm_forward(arrays["x"], mask=mask)
    for one, other in zip(plain, masked, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(
        reference.batch_norm_backward(arrays["dy"], arrays["x"], *plain[1:]),
        reference.batch_norm_backward(arrays["dy"], arrays["x"], *plain[1:], mask=mask),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_an_empty_mask() -> None:
    arrays = draw((6, 3, 4), 1)
    mask = np.zeros((6, 4), dtype=bool)
    running_mean, running_var = arrays["running_mean"].copy(), arrays["running_var"].copy()
    y, mean, rstd = reference.batch_norm_forward(
        arrays["x"], running_mean=running_mean, running_var=running_var, mask=mask
    )
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(rstd, 1 / np.sqrt(1e-5))
    np.testing.assert_array_equal(y, arrays["x"] * rstd[0])
    np.testing.assert_array_equal(running_mean, arrays["running_mean"])
    np.testing.assert_array_equal(running_var, arrays["running_var"])
    dx, _, _ = reference.batch_norm_backward(arrays["dy"], arrays["x"], mean, rstd, mask=mask)
    np.testing.assert_array_equal(dx, arrays["dy"] * rstd[0])


def test_a_single_counted_element_leaves_running_statistics() -> None:
    arrays = draw((6, 3, 4), 1)
    mask = np.zeros((6, 4), dtype=bool)
    mask[2, 1] = True
    running_var = np.ones(3)
    _, mean, rstd = reference.batch_norm_forward(
        arrays["x"], running_mean=np.zeros(3), running_var=running_var, mask=mask
    )
    np.testing.assert_array_equal(mean, arrays["x"][2, :, 1])
    np.testing.assert_array_equal(rstd, 1 / np.sqrt(1e-5))
    np.testing.assert_array_equal(running_var, 1)


@pytest.mark.parametrize("ghost_batch_size", [None, 2])
@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 1), ((0, 3, 4), 1), ((5, 3, 0), 1), ((5, 0, 3), -1)])
def test_zero_elements(shape: tuple[int, ...], axis: int, ghost_batch_size: int | None) -> None:
    x = np.zeros(shape)
    options: dict[str, Any] = {"axis": axis, "ghost_batch_size": ghost_batch_size}
    running_mean, running_var = np.full(3, 2.0), np.full(3, 5.0)
    y, mean, rstd = reference.batch_norm_forward(x, running_mean=running_mean, running_var=running_var, **options)
    dx, dweight, dbias = reference.batch_norm_backward(x, x, mean, rstd, **options)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(rstd, 1 / np.sqrt(1e-5))
    np.testing.assert_array_equal(dweight, np.zeros(3))
    np.testing.assert_array_equal(dbias, np.zeros(3))
    np.testing.assert_array_equal(running_mean, 2)
    np.testing.assert_array_equal(running_var, 5)


@pytest.mark.parametrize("value", [0.1, -3e5, 1e300])
def test_constants_have_no_variance(value: float) -> None:
    y, mean, rstd = reference.batch_norm_forward(np.full((7, 3, 11), value))
    np.testing.assert_array_equal(mean, value)
    np.testing.assert_array_equal(rstd, 1 / np.sqrt(1e-5))
    np.testing.assert_array_equal(y, 0)


def test_errors() -> None:
    x = np.zeros((1, 4))
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size \(1, 4\)"
    ):
        reference.batch_norm_forward(x)
    with pytest.raises(ValueError, match=r"more than 1 value per channel .* \(5, 4\)"):
        reference.batch_norm_forward(np.zeros((5, 4)), ghost_batch_size=2)
    with pytest.raises(ValueError, match="running_mean and running_var"):
        reference.batch_norm_forward(x, training=False)
    with pytest.raises(ValueError, match="running_mean should contain 4 elements not 3"):
        reference.batch_norm_forward(np.zeros((2, 4)), running_mean=np.zeros(3))
    with pytest.raises(ValueError, match="at least 2D input"):
        reference.batch_norm_forward(np.zeros(4))
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):  # AxisError
        reference.batch_norm_forward(np.zeros((2, 4)), axis=2)
    with pytest.raises(ValueError, match="eps must be positive, but got 0"):
        reference.batch_norm_forward(np.zeros((2, 4)), eps=0)
    with pytest.raises(ValueError, match="ghost_batch_size must be a positive integer"):
        reference.batch_norm_forward(np.zeros((2, 4)), ghost_batch_size=0)
    with pytest.raises(ValueError, match=r"mask must have .*, \(2, 5\), got \(2, 4\)"):
        reference.batch_norm_forward(np.zeros((2, 4, 5)), mask=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 4\), got \(2, 5\)"):
        reference.batch_norm_forward(np.zeros((2, 4)), residual=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 4\), got \(2, 5\)"):
        reference.batch_norm_backward(np.zeros((2, 5)), np.zeros((2, 4)), np.zeros(4), np.ones(4))


def test_integers_and_half_types_are_taken() -> None:
    x = np.arange(24).reshape(4, 3, 2) % 7
    y, _, _ = reference.batch_norm_forward(x)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(reference.batch_norm_forward(x.astype(np.float16))[0], y)


# The family.

SPATIAL = [((3, 6, 4), 1), ((3, 2, 2, 6), -1), ((6, 3, 4), 0), ((2, 3, 6, 2), 2)]
LAYERS = [((5, 4), 4), ((2, 3, 4), (4,)), ((2, 3, 4), (3, 4)), ((3, 4), (3, 4)), ((2, 1, 3, 2), (3, 2))]
# An eps for difference quotients of statistics of few elements, whose variance may be next to 0.
SMOOTH = 0.1
KEPT = [((4, 3, 2), 0), ((4, 3, 2), 1), ((4, 3, 2), -1), ((4, 3), None), ((5,), 0), ((5,), None), ((1, 3), 0)]


def draw_layer(shape: tuple[int, ...], normalized_shape: Any) -> dict[str, Float64]:
    rng = np.random.default_rng(0)
    return {
        "x": 3 + 2 * rng.standard_normal(shape),
        "dy": rng.standard_normal(shape),
        "weight": 1 + 0.5 * rng.standard_normal(normalized_shape),
        "bias": rng.standard_normal(normalized_shape),
    }


def draw_switchable(shape: tuple[int, ...], axis: int) -> dict[str, Float64]:
    return draw(shape, axis) | {"mean_logits": np.array([0.3, -0.8, 0.9]), "var_logits": np.array([-0.2, 0.7, 0.1])}


def draw_direction(shape: tuple[int, ...], dim: int | None) -> dict[str, Float64]:
    rng = np.random.default_rng(0)
    kept = () if dim is None else tuple(n if a == dim % len(shape) else 1 for a, n in enumerate(shape))
    return {"v": rng.standard_normal(shape), "g": np.asarray(1 + rng.random(kept)), "dw": rng.standard_normal(shape)}


def pick(arrays: dict[str, Float64], *names: str) -> dict[str, Any]:
    return {name: arrays[name].copy() for name in names}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SPATIAL)
def test_gradients_of_instance_norm(shape: tuple[int, ...], axis: int, use_input_stats: bool, masked: bool) -> None:
    arrays = draw(shape, axis)
    options: dict[str, Any] = {"use_input_stats": use_input_stats, "axis": axis}
    options["mask"] = draw_mask(shape, axis) if masked else None

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        running = pick(arrays, "running_mean", "running_var")
        return reference.instance_norm_forward(**variables, **running, **options, eps=SMOOTH)

    variables = pick(arrays, "x", "weight", "bias")
    _, mean, rstd = forward(**variables)
    gradients = reference.instance_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"], **options)
    check_quotients(forward, variables, gradients, arrays["dy"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
@pytest.mark.parametrize(("shape", "axis"), [((3, 6), 1), ((6, 3), 0), *SPATIAL])
def test_gradients_of_group_norm(shape: tuple[int, ...], axis: int, num_groups: int, masked: bool) -> None:
    arrays = draw(shape, axis)
    options: dict[str, Any] = {"axis": axis, "mask": draw_mask(shape, axis) if masked else None}

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        return reference.group_norm_forward(num_groups=num_groups, **variables, **options, eps=SMOOTH)

    variables = pick(arrays, "x", "weight", "bias")
    _, mean, rstd = forward(**variables)
    assert mean.shape == rstd.shape == (2 if shape[0] == 2 else 3, num_groups)
    gradients = reference.group_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"], **options)
    check_quotients(forward, variables, gradients, arrays["dy"])


@pytest.mark.parametrize(("shape", "normalized_shape"), LAYERS)
def test_gradients_of_layer_norm(shape: tuple[int, ...], normalized_shape: Any) -> None:
    arrays = draw_layer(shape, normalized_shape)

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        return reference.layer_norm_forward(normalized_shape=normalized_shape, **variables)

    variables = pick(arrays, "x", "weight", "bias")
    _, mean, rstd = forward(**variables)
    gradients = reference.layer_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"])
    check_quotients(forward, variables, gradients, arrays["dy"])


@pytest.mark.parametrize(("shape", "normalized_shape"), LAYERS)
def test_gradients_of_rms_norm(shape: tuple[int, ...], normalized_shape: Any) -> None:
    arrays = draw_layer(shape, normalized_shape)

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        return reference.rms_norm_forward(normalized_shape=normalized_shape, eps=SMOOTH, **variables)

    variables = pick(arrays, "x", "weight")
    _, rstd = forward(**variables)
    gradients = reference.rms_norm_backward(arrays["dy"], arrays["x"], rstd, arrays["weight"])
    check_quotients(forward, variables, gradients, arrays["dy"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((1, 3, 2), 1), ((4, 1, 3), 1), *SPATIAL])
def test_gradients_of_switchable_norm(shape: tuple[int, ...], axis: int, training: bool) -> None:
    arrays = draw_switchable(shape, axis)
    logits = arrays["mean_logits"], arrays["var_logits"]

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        running = pick(arrays, "running_mean", "running_var")
        return reference.switchable_norm_forward(**variables, **running, training=training, axis=axis)

    variables = pick(arrays, "x", "weight", "bias", "mean_logits", "var_logits")
    _, *saved = forward(**variables)
    gradients = reference.switchable_norm_backward(
        arrays["dy"], arrays["x"], *saved, *logits, arrays["weight"], training=training, axis=axis
    )
    check_quotients(forward, variables, gradients, arrays["dy"])


@pytest.mark.parametrize(("shape", "dim"), KEPT)
def test_gradients_of_weight_norm(shape: tuple[int, ...], dim: int | None) -> None:
    arrays = draw_direction(shape, dim)

    def forward(**variables: Float64) -> tuple[Float64, ...]:
        return reference.weight_norm_forward(**variables, dim=dim)

    variables = pick(arrays, "v", "g")
    _, norm = forward(**variables)
    gradients = reference.weight_norm_backward(arrays["dw"], arrays["v"], arrays["g"], norm, dim)
    check_quotients(forward, variables, gradients, arrays["dw"])


def autograd(function: Callable[..., Any], arrays: dict[str, Float64], dy: Float64) -> tuple[Any, dict[str, Float64]]:
    """``y`` and the gradients that PyTorch finds."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    y = function(**tensors)
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), {name: tensor.grad.numpy() for name, tensor in tensors.items()}


def agree(got: tuple[Float64, ...], expected: dict[str, Float64]) -> None:
    for gradient, (name, wanted) in zip(got, expected.items(), strict=True):
        assert gradient.shape == wanted.shape, name
        np.testing.assert_allclose(gradient, wanted, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SPATIAL)
def test_instance_norm_agrees_with_torch(shape: tuple[int, ...], axis: int, use_input_stats: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = draw(shape, axis)
    running = {name: torch.tensor(arrays[name]) for name in ("running_mean", "running_var")}

    def function(x: Any, weight: Any, bias: Any) -> Any:
        second = x.movedim(axis, 1)
        y = torch.nn.functional.instance_norm(second, *running.values(), weight, bias, use_input_stats, 0.3, 1e-3)
        return y.movedim(1, axis)

    wanted, gradients = autograd(function, pick(arrays, "x", "weight", "bias"), arrays["dy"])
    moved = pick(arrays, "running_mean", "running_var")
    y, mean, rstd = reference.instance_norm_forward(
        **pick(arrays, "x", "weight", "bias"),
        **moved,
        use_input_stats=use_input_stats,
        momentum=0.3,
        eps=1e-3,
        axis=axis,
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    for name, tensor in running.items():
        np.testing.assert_allclose(moved[name], tensor.numpy(), rtol=1e-12, err_msg=name)
    options: dict[str, Any] = {"use_input_stats": use_input_stats, "axis": axis}
    agree(
        reference.instance_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"], **options), gradients
    )


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize(("shape", "axis"), [((3, 6), 1), *SPATIAL])
def test_group_norm_agrees_with_torch(shape: tuple[int, ...], axis: int, num_groups: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = draw(shape, axis)

    def function(x: Any, weight: Any, bias: Any) -> Any:
        y = torch.nn.functional.group_norm(x.movedim(axis, 1), num_groups, weight, bias, 1e-3)
        return y.movedim(1, axis)

    variables = pick(arrays, "x", "weight", "bias")
    wanted, gradients = autograd(function, variables, arrays["dy"])
    y, mean, rstd = reference.group_norm_forward(num_groups=num_groups, **variables, eps=1e-3, axis=axis)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    agree(reference.group_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"], axis=axis), gradients)


@pytest.mark.parametrize(("shape", "normalized_shape"), LAYERS)
def test_layer_and_rms_norm_agree_with_torch(shape: tuple[int, ...], normalized_shape: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = draw_layer(shape, normalized_shape)
    lengths = np.atleast_1d(normalized_shape).tolist()

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        return torch.nn.functional.layer_norm(x, lengths, weight, bias, 1e-3)

    variables = pick(arrays, "x", "weight", "bias")
    wanted, gradients = autograd(layer_norm, variables, arrays["dy"])
    y, mean, rstd = reference.layer_norm_forward(normalized_shape=normalized_shape, **variables, eps=1e-3)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    assert mean.shape == rstd.shape == shape[: len(shape) - len(lengths)]
    agree(reference.layer_norm_backward(arrays["dy"], arrays["x"], mean, rstd, arrays["weight"]), gradients)

    for eps in (None, 1e-3):

        def rms_norm(x: Any, weight: Any, eps: float | None = eps) -> Any:
            return torch.nn.functional.rms_norm(x, lengths, weight, eps)

        variables = pick(arrays, "x", "weight")
        wanted, gradients = autograd(rms_norm, variables, arrays["dy"])
        y, rstd = reference.rms_norm_forward(normalized_shape=normalized_shape, **variables, eps=eps)
        np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
        assert rstd.shape == shape[: len(shape) - len(lengths)]
        agree(reference.rms_norm_backward(arrays["dy"], arrays["x"], rstd, arrays["weight"]), gradients)


@pytest.mark.parametrize(("shape", "dim"), [(shape, dim) for shape, dim in KEPT if dim is None or dim >= 0])
def test_weight_norm_agrees_with_torch(shape: tuple[int, ...], dim: int | None) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = draw_direction(shape, dim)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.tensor(arrays["v"]))
    torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    w, norm = reference.weight_norm_forward(arrays["v"], arrays["g"], dim)
    np.testing.assert_allclose(norm, g.detach().numpy(), rtol=1e-14)  # PyTorch starts with w = v
    assert norm.shape == g.shape
    with torch.no_grad():
        g.copy_(torch.tensor(arrays["g"]))
    layer.weight.backward(torch.tensor(arrays["dw"]))
    np.testing.assert_allclose(w, layer.weight.detach().numpy(), rtol=1e-13)
    gradients = reference.weight_norm_backward(arrays["dw"], arrays["v"], arrays["g"], norm, dim)
    agree(gradients, {"v": v.grad.numpy(), "g": g.grad.numpy()})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SPATIAL)
def test_switchable_norm_by_loops(shape: tuple[int, ...], axis: int, training: bool) -> None:
    arrays = draw_switchable(shape, axis)
    running = pick(arrays, "running_mean", "running_var")
    y, means, variances, rstd = reference.switchable_norm_forward(
        **pick(arrays, "x", "mean_logits", "var_logits", "weight", "bias"),
        **running,
        training=training,
        momentum=0.3,
        eps=1e-3,
        axis=axis,
    )
    p = [math.exp(logit) / sum(map(math.exp, arrays["mean_logits"])) for logit in arrays["mean_logits"]]
    q = [math.exp(logit) / sum(map(math.exp, arrays["var_logits"])) for logit in arrays["var_logits"]]
    x, y = np.moveaxis(arrays["x"], axis, 1), np.moveaxis(y, axis, 1)
    for c in range(x.shape[1]):
        old_mean, old_var = arrays["running_mean"][c], arrays["running_var"][c]
        for n in range(x.shape[0]):
            parts = [x[n, c], x[n], x[:, c]]
            three = [(part.mean(), part.var()) for part in parts]
            if not training:
                three[2] = old_mean, old_var
            mean = sum(weight * one for weight, (one, _) in zip(p, three, strict=True))
            var = sum(weight * one for weight, (_, one) in zip(q, three, strict=True))
            expected = arrays["weight"][c] * (x[n, c] - mean) / math.sqrt(var + 1e-3) + arrays["bias"][c]
            np.testing.assert_allclose(y[n, c], expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(means[:, n, c], [one for one, _ in three], rtol=1e-13)
            np.testing.assert_allclose(variances[:, n, c], [one for _, one in three], rtol=1e-13)
            np.testing.assert_allclose(rstd[n, c], 1 / math.sqrt(var + 1e-3), rtol=1e-13)
        new_mean = 0.7 * old_mean + 0.3 * x[:, c].mean() if training else old_mean
        new_var = 0.7 * old_var + 0.3 * x[:, c].var(ddof=1) if training else old_var
        np.testing.assert_allclose(running["running_mean"][c], new_mean, rtol=1e-13)
        np.testing.assert_allclose(running["running_var"][c], new_var, rtol=1e-13)


@pytest.mark.parametrize("num_groups", [2, 6])
@pytest.mark.parametrize(("shape", "axis"), SPATIAL)
def test_masked_groups_and_instances_by_loops(shape: tuple[int, ...], axis: int, num_groups: int) -> None:
    arrays = draw(shape, axis)
    mask = draw_mask(shape, axis)
    mask[-1] = False
    mask[-1].ravel()[1] = True  # one element: it moves no running statistic
    running = pick(arrays, "running_mean", "running_var")
    options: dict[str, Any] = {"eps": 1e-3, "axis": axis, "mask": mask}
    y, mean, rstd = reference.group_norm_forward(arrays["x"], num_groups, arrays["weight"], arrays["bias"], **options)
    if num_groups == 6:
        y, mean, rstd = reference.instance_norm_forward(
            arrays["x"], arrays["weight"], arrays["bias"], **running, momentum=0.3, **options
        )
    x, y = np.moveaxis(arrays["x"], axis, 1), np.moveaxis(y, axis, 1)
    channels = 6 // num_groups
    several = [n for n in range(x.shape[0]) if mask[n].sum() > 1]
    for group in range(num_groups):
        members = slice(group * channels, (group + 1) * channels)
        selected = [x[n, members][:, mask[n]] for n in range(x.shape[0])]
        for n, values in enumerate(selected):
            np.testing.assert_allclose(mean[n, group], values.mean(), rtol=1e-13)
            np.testing.assert_allclose(rstd[n, group], 1 / math.sqrt(values.var() + 1e-3), rtol=1e-12)
            for c in range(members.start, members.stop):
                expected = arrays["weight"][c] * (x[n, c] - values.mean()) / math.sqrt(values.var() + 1e-3)
                np.testing.assert_allclose(y[n, c], expected + arrays["bias"][c], rtol=1e-11, atol=1e-12)
        if num_groups == 6:
            new_mean = np.mean([selected[n].mean() for n in several])
            new_var = np.mean([selected[n].var(ddof=1) for n in several])
            for name, new in (("running_mean", new_mean), ("running_var", new_var)):
                expected = 0.7 * arrays[name][group] + 0.3 * new
                np.testing.assert_allclose(running[name][group], expected, rtol=1e-13, err_msg=name)


def every_norm(x: Float64, dy: Float64, weight: Float64, **options: Any) -> dict[str, tuple[Float64, ...]]:
    """``y, dx`` of each norm that takes channels, here six of them; ``weight`` is theirs."""
    eps = options.pop("eps", 1e-5)
    results: dict[str, tuple[Float64, ...]] = {}
    y, mean, rstd = reference.batch_norm_forward(x, weight, eps=eps, **options)
    results["batch"] = y, reference.batch_norm_backward(dy, x, mean, rstd, weight, **options)[0]
    y, mean, rstd = reference.instance_norm_forward(x, weight, eps=eps, **options)
    results["instance"] = y, reference.instance_norm_backward(dy, x, mean, rstd, weight, **options)[0]
    for groups in (1, 3):
        y, mean, rstd = reference.group_norm_forward(x, groups, weight, eps=eps, **options)
        results[f"group {groups}"] = y, reference.group_norm_backward(dy, x, mean, rstd, weight, **options)[0]
    if "mask" not in options:
        logits = np.array([0.3, -0.8, 0.9]), np.array([-0.2, 0.7, 0.1])
        y, *saved = reference.switchable_norm_forward(x, *logits, weight, eps=eps, **options)
        results["switchable"] = y, reference.switchable_norm_backward(dy, x, *saved, *logits, weight, **options)[0]
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [0, 2, 3, -1, -3])
def test_the_axis_is_only_a_place(axis: int, masked: bool) -> None:
    arrays = draw((3, 6, 4, 2), 1)
    mask: dict[str, Any] = {"mask": draw_mask((3, 6, 4, 2), 1)} if masked else {}
    second = every_norm(arrays["x"], arrays["dy"], arrays["weight"], **mask)
    x, dy = (np.ascontiguousarray(np.moveaxis(arrays[name], 1, axis)) for name in ("x", "dy"))
    for name, results in every_norm(x, dy, arrays["weight"], axis=axis, **mask).items():
        for result, expected in zip(results, second[name], strict=True):
            assert result.flags.c_contiguous
            np.testing.assert_array_equal(np.moveaxis(result, axis, 1), expected, err_msg=name)


def test_shift_and_scale_change_nothing() -> None:
    arrays = draw((3, 6, 4), 1)
    x, dy, weight = (arrays[name] for name in ("x", "dy", "weight"))
    plain = every_norm(x, dy, weight, eps=1e-16)
    for name, (y, dx) in every_norm(7 * x - 20, dy, weight, eps=1e-16).items():
        np.testing.assert_allclose(y, plain[name][0], rtol=1e-11, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(7 * dx, plain[name][1], rtol=1e-10, atol=1e-12, err_msg=name)

    last = draw_layer((5, 4), 4)
    y, mean, rstd = reference.layer_norm_forward(last["x"], 4, last["weight"], eps=1e-16)
    moved, *saved = reference.layer_norm_forward(7 * last["x"] - 20, 4, last["weight"], eps=1e-16)
    np.testing.assert_allclose(moved, y, rtol=1e-11)
    dx, _, _ = reference.layer_norm_backward(last["dy"], last["x"], mean, rstd, last["weight"])
    dx_moved, _, _ = reference.layer_norm_backward(last["dy"], 7 * last["x"] - 20, *saved, last["weight"])
    np.testing.assert_allclose(7 * dx_moved, dx, rtol=1e-10, atol=1e-12)

    y, rstd = reference.rms_norm_forward(last["x"], 4, last["weight"], eps=1e-16)
    scaled, rstd_scaled = reference.rms_norm_forward(-7 * last["x"], 4, last["weight"], eps=1e-16)
    np.testing.assert_allclose(scaled, -y, rtol=1e-13)
    dx, _ = reference.rms_norm_backward(last["dy"], last["x"], rstd, last["weight"])
    dx_scaled, _ = reference.rms_norm_backward(last["dy"], -7 * last["x"], rstd_scaled, last["weight"])
    np.testing.assert_allclose(-7 * dx_scaled, -dx, rtol=1e-10, atol=1e-12)


def test_dx_has_no_part_that_the_norm_takes_away() -> None:
    # With eps = 0 a change of x along 1, or along x itself, does not change y.
    arrays = draw((3, 6, 4), 1)
    x, dy, weight = (arrays[name] for name in ("x", "dy", "weight"))
    for name, (_, dx) in every_norm(x, dy, weight, eps=1e-16).items():
        axes = {"batch": (0, 2), "instance": (2,), "group 1": (1, 2)}.get(name, (0, 1, 2))
        np.testing.assert_allclose(dx.sum(axis=axes), 0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose((dx * x).sum(axis=axes), 0, atol=1e-12, err_msg=name)
    last = draw_layer((5, 4), 4)
    _, mean, rstd = reference.layer_norm_forward(last["x"], 4, eps=1e-16)
    dx, _, _ = reference.layer_norm_backward(last["dy"], last["x"], mean, rstd)
    np.testing.assert_allclose([dx.sum(axis=1), (dx * last["x"]).sum(axis=1)], 0, atol=1e-12)
    _, rstd = reference.rms_norm_forward(last["x"], 4, eps=1e-16)
    dx, _ = reference.rms_norm_backward(last["dy"], last["x"], rstd)
    np.testing.assert_allclose((dx * last["x"]).sum(axis=1), 0, atol=1e-12)
    assert np.all(np.abs(dx.sum(axis=1)) > 1e-3)


@pytest.mark.parametrize(("shape", "dim"), KEPT)
def test_weight_norm_has_length_g(shape: tuple[int, ...], dim: int | None) -> None:
    arrays = draw_direction(shape, dim)
    w, norm = reference.weight_norm_forward(arrays["v"], arrays["g"], dim)
    _, length = reference.weight_norm_forward(w, arrays["g"], dim)
    np.testing.assert_allclose(length, arrays["g"], rtol=1e-14)
    np.testing.assert_allclose(reference.weight_norm(5 * arrays["v"], arrays["g"], dim), w, rtol=1e-14)
    dv, _ = reference.weight_norm_backward(arrays["dw"], arrays["v"], arrays["g"], norm, dim)
    others = None if dim is None else tuple(axis for axis in range(len(shape)) if axis != dim % len(shape))
    np.testing.assert_allclose(np.sum(dv * arrays["v"], axis=others), 0, atol=1e-14)


def test_a_weight_without_direction_is_nan() -> None:
    v = np.array([[0.0, 0.0], [3.0, 4.0]])
    w, norm = reference.weight_norm_forward(v, np.array([[1.0], [10.0]]))
    np.testing.assert_array_equal(w, [[np.nan, np.nan], [6.0, 8.0]])
    dv, dg = reference.weight_norm_backward(np.ones((2, 2)), v, np.array([[1.0], [10.0]]), norm)
    assert np.all(np.isnan(dv[0]))
    assert np.all(np.isnan(dg[0]))
    np.testing.assert_allclose(dv[1], [10 / 5 * (1 - 0.6 * 1.4), 10 / 5 * (1 - 0.8 * 1.4)], rtol=1e-14)
    np.testing.assert_allclose(dg[1], [1.4], rtol=1e-15)


def test_each_norm_is_another_in_the_limit() -> None:
    arrays = draw((3, 6, 4), 1)
    x, dy = arrays["x"], arrays["dy"]
    results = every_norm(x, dy, np.ones(6))
    y, mean, rstd = reference.group_norm_forward(x, 6)
    as_group = y, reference.group_norm_backward(dy, x, mean, rstd)[0]
    y, mean, rstd = reference.layer_norm_forward(x, (6, 4))
    as_layer = y, reference.layer_norm_backward(dy, x, mean, rstd)[0]
    alone = [every_norm(x[n : n + 1], dy[n : n + 1], np.ones(6))["batch"] for n in range(3)]
    as_batch = tuple(np.concatenate(parts) for parts in zip(*alone, strict=True))
    centered = x - x.mean(axis=(1, 2), keepdims=True)
    y, rstd = reference.rms_norm_forward(centered, (6, 4), eps=1e-5)
    for got, expected in (
        *((got, results["instance"]) for got in (as_group, as_batch)),
        (as_layer, results["group 1"]),
        ((y,), results["group 1"][:1]),
    ):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("which", "name"), [*enumerate(("instance", "group 1", "batch"))])
def test_a_switch_that_is_thrown(which: int, name: str) -> None:
    arrays = draw((3, 6, 4), 1)
    logits = np.full(3, -800.0)
    logits[which] = 800.0
    y, *saved = reference.switchable_norm_forward(arrays["x"], logits, logits, arrays["weight"])
    dx, _, _, dmean_logits, dvar_logits = reference.switchable_norm_backward(
        arrays["dy"], arrays["x"], *saved, logits, logits, arrays["weight"]
    )
    expected = every_norm(arrays["x"], arrays["dy"], arrays["weight"])[name]
    np.testing.assert_allclose(y, expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dx, expected[1], rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal([dmean_logits, dvar_logits], 0)


def test_logits_matter_by_their_differences() -> None:
    arrays = draw_switchable((3, 6, 4), 1)
    x, dy = arrays["x"], arrays["dy"]
    y, *saved = reference.switchable_norm_forward(x, arrays["mean_logits"], arrays["var_logits"])
    logits = arrays["mean_logits"] + 1000, arrays["var_logits"] - 1000
    np.testing.assert_allclose(reference.switchable_norm_forward(x, *logits)[0], y, rtol=1e-11, atol=1e-12)
    _, _, _, dmean_logits, dvar_logits = reference.switchable_norm_backward(dy, x, *saved, *logits)
    np.testing.assert_allclose([dmean_logits.sum(), dvar_logits.sum()], 0, atol=1e-13)
    assert np.all(np.abs([dmean_logits, dvar_logits]) > 1e-3)


def test_absent_parameters_are_one_and_zero() -> None:
    arrays = draw_switchable((3, 6, 4), 1)
    x, dy, one, zero = arrays["x"], arrays["dy"], np.ones(6), np.zeros(6)
    logits = arrays["mean_logits"], arrays["var_logits"]
    calls: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = [
        (reference.batch_norm_forward, reference.batch_norm_backward, (), ()),
        (reference.instance_norm_forward, reference.instance_norm_backward, (), ()),
        (reference.group_norm_forward, reference.group_norm_backward, (3,), ()),
        (reference.switchable_norm_forward, reference.switchable_norm_backward, logits, logits),
        (reference.layer_norm_forward, reference.layer_norm_backward, (4,), ()),
        (reference.rms_norm_forward, reference.rms_norm_backward, (4,), ()),
    ]
    for forward, backward, before, saved_before in calls:
        length = 4 if forward in (reference.layer_norm_forward, reference.rms_norm_forward) else 6
        present = (one[:length],) if forward is reference.rms_norm_forward else (one[:length], zero[:length])
        without, given = forward(x, *before), forward(x, *before, *present)
        gradients = backward(dy, x, *without[1:], *saved_before)
        gradients_given = backward(dy, x, *given[1:], *saved_before, *present)
        for absent, explicit in zip((*without, *gradients), (*given, *gradients_given), strict=True):
            np.testing.assert_array_equal(absent, explicit, err_msg=forward.__name__)


def test_the_short_functions_are_the_forwards() -> None:
    arrays = draw_switchable((3, 6, 4), 1)
    mask = draw_mask((3, 6, 4), 1)
    x, weight, bias = arrays["x"], arrays["weight"], arrays["bias"]
    affine = weight, bias
    logits = arrays["mean_logits"], arrays["var_logits"]
    for flag in (True, False):
        running, running_too = (pick(arrays, "running_mean", "running_var") for _ in range(2))
        y = reference.instance_norm(x, *running.values(), *affine, flag, 0.3, 1e-3, mask=mask)
        options: dict[str, Any] = running_too | {"momentum": 0.3, "eps": 1e-3}
        expected = reference.instance_norm_forward(x, *affine, **options, use_input_stats=flag, mask=mask)[0]
        np.testing.assert_array_equal(y, expected)
        y = reference.switchable_norm(x, *logits, *running.values(), *affine, flag, 0.3, 1e-3)
        expected = reference.switchable_norm_forward(x, *logits, *affine, **options, training=flag)[0]
        np.testing.assert_array_equal(y, expected)
        for name, values in running.items():
            np.testing.assert_array_equal(values, running_too[name])
    np.testing.assert_array_equal(
        reference.group_norm(x, 3, *affine, 1e-3, mask=mask),
        reference.group_norm_forward(x, 3, *affine, 1e-3, mask=mask)[0],
    )
    weight, bias = weight[:4], bias[:4]
    np.testing.assert_array_equal(
        reference.layer_norm(x, 4, weight, bias, 1e-3), reference.layer_norm_forward(x, 4, weight, bias, 1e-3)[0]
    )
    np.testing.assert_array_equal(
        reference.rms_norm(x, 4, weight, 1e-3), reference.rms_norm_forward(x, 4, weight, 1e-3)[0]
    )


def test_masks_of_all_and_of_nothing() -> None:
    arrays = draw((3, 6, 4), 1)
    x, dy, weight = arrays["x"], arrays["dy"], arrays["weight"]
    plain = every_norm(x, dy, weight)
    for name, results in every_norm(x, dy, weight, mask=np.ones((3, 4), dtype=bool)).items():
        for one, other in zip(results, plain[name], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    for name, (y, dx) in every_norm(x, dy, weight, mask=np.zeros((3, 4), dtype=bool)).items():
        np.testing.assert_allclose(y, weight[:, None] * x / math.sqrt(1e-5), rtol=1e-15, err_msg=name)
        np.testing.assert_allclose(dx, weight[:, None] * dy / math.sqrt(1e-5), rtol=1e-15, err_msg=name)
    running = pick(arrays, "running_mean", "running_var")
    reference.instance_norm_forward(x, **running, mask=np.zeros((3, 4), dtype=bool))
    for name, values in running.items():
        np.testing.assert_array_equal(values, arrays[name])


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 6, 0)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape)
    running = {"running_mean": np.full(6, 2.0), "running_var": np.full(6, 5.0)}
    zero = np.zeros(3)
    rows = shape[:1]
    results: dict[str, tuple[tuple[Float64, ...], tuple[Float64, ...]]] = {}
    y, *saved = reference.instance_norm_forward(x, **running)
    results["instance"] = (y, *saved), reference.instance_norm_backward(x, x, *saved)
    y, *saved = reference.group_norm_forward(x, 3)
    results["group"] = (y, *saved), reference.group_norm_backward(x, x, *saved)
    y, *saved = reference.switchable_norm_forward(x, zero, zero, **running)
    results["switchable"] = (y, *saved), reference.switchable_norm_backward(x, x, *saved, zero, zero)
    y, *saved = reference.layer_norm_forward(x, shape[1:])
    results["layer"] = (y, *saved), reference.layer_norm_backward(x, x, *saved)
    y, *saved = reference.rms_norm_forward(x, shape[1:])
    results["rms"] = (y, *saved), reference.rms_norm_backward(x, x, *saved)
    for name, ((y, *saved), (dx, *gradients)) in results.items():
        assert y.shape == dx.shape == shape, name
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0, err_msg=name)
        eps = np.finfo(np.float64).eps if name == "rms" else 1e-5
        np.testing.assert_allclose(saved[-1], 1 / math.sqrt(eps), rtol=1e-15, err_msg=name)
        assert [one.shape for one in saved] == {
            "instance": [(*rows, 6)] * 2,
            "group": [(*rows, 3)] * 2,
            "switchable": [(3, *rows, 6)] * 2 + [(*rows, 6)],
            "layer": [rows] * 2,
            "rms": [rows],
        }[name]
    np.testing.assert_array_equal(running["running_mean"], 2)
    np.testing.assert_array_equal(running["running_var"], 5)


def test_the_eps_of_rms_norm_is_that_of_the_arithmetic() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    for dtype, eps in (
        (np.float16, 2.0**-23),
        (ml_dtypes.bfloat16, 2.0**-23),
        (np.float32, 2.0**-23),
        (np.float64, 2.0**-52),
        (np.int32, 2.0**-52),
    ):
        _, rstd = reference.rms_norm_forward(np.zeros((2, 3), dtype), 3)
        np.testing.assert_array_equal(rstd, np.full(2, 1 / math.sqrt(eps)))
    _, rstd = reference.rms_norm_forward(np.zeros((2, 3), np.float16), 3, eps=0.25)
    np.testing.assert_array_equal(rstd, [2.0, 2.0])


def test_errors_of_the_family() -> None:
    x, zero = np.zeros((2, 6, 4)), np.zeros(3)
    n, g = np.zeros((2, 6)), np.zeros((2, 3))
    per_channel: list[Callable[..., Any]] = [
        lambda x, **options: reference.instance_norm_forward(x, **options),
        lambda x, **options: reference.group_norm_forward(x, 3, **options),
        lambda x, **options: reference.switchable_norm_forward(x, zero, zero, **options),
    ]
    for forward in per_channel:
        with pytest.raises(ValueError, match="weight should contain 6 elements not 5"):
            forward(x, weight=np.ones(5))
        with pytest.raises(ValueError, match="bias should contain 6 elements not 5"):
            forward(x, bias=np.ones(5))
        with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
            forward(np.zeros(4))
        with pytest.raises(ValueError, match="axis 3 is out of bounds"):  # AxisError
            forward(x, axis=3)
    for forward in per_channel[:2]:
        with pytest.raises(ValueError, match=r"mask must have .*, \(2, 4\), got \(2, 6\)"):
            forward(x, mask=np.ones((2, 6), dtype=bool))

    for size in ((2, 6, 1), (2, 6)):
        with pytest.raises(ValueError, match="more than 1 spatial element when training, got input size") as caught:
            reference.instance_norm_forward(np.zeros(size))
        assert str(caught.value).endswith(str(size))
    with pytest.raises(ValueError, match="and running_var to be defined when use_input_stats is false"):
        reference.instance_norm_forward(x, running_mean=np.zeros(6), use_input_stats=False)
    with pytest.raises(ValueError, match=r"num_channels \(6\) must be divisible by num_groups \(4\)"):
        reference.group_norm_forward(x, 4)
    with pytest.raises(ValueError, match=r"num_channels \(6\) must be divisible by num_groups \(4\)"):
        reference.group_norm_backward(x, x, np.zeros((2, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="Expected num groups to be greater than 0, got 0"):
        reference.group_norm_forward(x, 0)
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size \(1, 6"
    ):
        reference.switchable_norm_forward(np.zeros((1, 6, 1)), zero, zero)
    with pytest.raises(ValueError, match="and running_var to be defined when training=False"):
        reference.switchable_norm_forward(x, zero, zero, running_mean=np.zeros(6), training=False)
    with pytest.raises(ValueError, match=r"mean_logits must have shape \(3,\), got \(2,\)"):
        reference.switchable_norm_forward(x, zero[:2], zero)
    with pytest.raises(ValueError, match=r"var_logits must have shape \(3,\), got \(\)"):
        reference.switchable_norm_forward(x, zero, 0.0)

    trailing: list[Callable[..., Any]] = [reference.layer_norm_forward, reference.rms_norm_forward]
    for forward in trailing:
        with pytest.raises(ValueError, match=r"Given normalized_shape=\[5\], expected input with shape \[\*, 5\], but"):
            forward(np.zeros((2, 6)), 5)
        with pytest.raises(ValueError, match=r"expected input with shape \[\*, 2, 6\], but got input of size\[6\]"):
            forward(np.zeros(6), [2, 6])
        with pytest.raises(ValueError, match="Expected normalized_shape to be at least 1-dimensional"):
            forward(np.zeros(6), ())
        with pytest.raises(
            ValueError,
            match=r"Expected weight to be of same shape as normalized_shape, but got weight of shape \[5\] and "
            r"normalized_shape = \[6\]",
        ):
            forward(np.zeros((2, 6)), 6, np.ones(5))
    with pytest.raises(ValueError, match=r"Expected bias .* but got bias of shape \[6, 1\] and"):
        reference.layer_norm_forward(np.zeros((2, 6)), 6, np.ones(6), np.ones((6, 1)))

    backward: list[tuple[Callable[..., Any], tuple[Float64, ...], str]] = [
        (reference.instance_norm_backward, (n, n), r"(\(2, 6\))"),
        (reference.group_norm_backward, (g, g), r"(\(2, 3\))"),
        (lambda dy, x, *saved: reference.switchable_norm_backward(dy, x, *saved, zero, zero),
         (np.zeros((3, 2, 6)), np.zeros((3, 2, 6)), n), r"(\(3, 2, 6\)|\(2, 6\))"),
        (reference.layer_norm_backward, (n, n), r"(\(2, 6\))"),
        (reference.rms_norm_backward, (n,), r"(\(2, 6\))"),
    ]  # fmt: skip
    for function, saved, shape in backward:
        with pytest.raises(ValueError, match=r"dy must have shape \(2, 6, 4\), got \(2, 6, 5\)"):
            function(np.zeros((2, 6, 5)), x, *saved)
        for index, array in enumerate(saved):
            wrong = *saved[:index], np.zeros((7, *array.shape[1:])), *saved[index + 1 :]
            with pytest.raises(ValueError, match=f"^(mean|rstd|means|variances) must have shape {shape}, got .7,"):
                function(x, x, *wrong)

    with pytest.raises(ValueError, match=r"g must have shape \(4, 1\), got \(4,\)"):
        reference.weight_norm_forward(np.ones((4, 3)), np.ones(4))
    with pytest.raises(ValueError, match=r"g must have shape \(\), got \(1, 1\)"):
        reference.weight_norm_forward(np.ones((4, 3)), np.ones((1, 1)), None)
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):  # AxisError
        reference.weight_norm_forward(np.ones((4, 3)), np.ones((4, 1)), 2)
    with pytest.raises(ValueError, match=r"dw must have shape \(4, 3\), got \(3, 4\)"):
        reference.weight_norm_backward(np.ones((3, 4)), np.ones((4, 3)), np.ones((4, 1)), np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"norm must have shape \(4, 1\), got \(4,\)"):
        reference.weight_norm_backward(np.ones((4, 3)), np.ones((4, 3)), np.ones((4, 1)), np.ones(4))


def test_errors_come_before_running_statistics_move() -> None:
    x, zero = draw((3, 6, 4), 1)["x"], np.zeros(3)
    running = {"running_mean": np.full(6, 2.0), "running_var": np.full(6, 5.0)}
    short = {"running_mean": running["running_mean"], "running_var": np.ones(5)}
    wrong: list[dict[str, Any]] = [running | {"weight": np.ones(5)}, running | {"bias": np.ones(5)}, short]
    masks: list[dict[str, Any]] = [running | {"mask": np.ones((3, 6), dtype=bool)}]
    for options in (*wrong, *masks):
        with pytest.raises(ValueError, match=r"should contain 6 elements not 5|mask must have"):
            reference.instance_norm_forward(x, **options)
    for options in (*wrong, *masks, running | {"residual": x[:2]}, running | {"activation": "gelu"}):
        with pytest.raises(ValueError, match=r"should contain 6|mask must have|residual must have|Expected activation"):
            reference.batch_norm_forward(x, **options)
    for options in wrong:
        with pytest.raises(ValueError, match="should contain 6 elements not 5"):
            reference.switchable_norm_forward(x, zero, zero, **options)
    np.testing.assert_array_equal(running["running_mean"], 2)
    np.testing.assert_array_equal(running["running_var"], 5)


# The cases and their tolerances.


def find(**wanted: Any) -> Case:
    """The first case with these options; small, in training, everything else plain."""
    plain = {"ghost_batch_size": None, "mask": False, "offset": 0.0, "scale": 1.0, "training": True, "affine": True}
    return next(
        case
        for case in CASES
        if case.size > 400 and all(getattr(case, name) == value for name, value in (plain | wanted).items())
    )


def skip_without_modules(case: Case) -> None:
    for module in case.requires:
        pytest.importorskip(module, reason=f"{module} is not installed")


def stored(case: Case, outputs: Outputs) -> Outputs:
    """The same results, rounded to the dtypes that the library returns."""
    dtypes = {
        "y": case.dtype,
        "dx": case.dtype,
        "dresidual": case.dtype,
        "dweight": case.gradient_dtype,
        "dbias": case.gradient_dtype,
        "running_mean": case.param_dtype,
        "running_var": case.param_dtype,
        "dmean_logits": case.param_dtype,
        "dvar_logits": case.param_dtype,
    }
    rounded = {
        name: array.astype(cases.numpy_dtype(dtype))
        for name, dtype in dtypes.items()
        if (array := getattr(outputs, name)) is not None
    }
    return replace(outputs, **rounded)


def failures(case: Case, inputs: Inputs, expected: Outputs, got: Outputs) -> set[str]:
    return {deviation.name for deviation in cases.compare(case, inputs, expected, got) if not deviation.ok}


@pytest.mark.parametrize("listed", [CASES, BENCH, BENCH_CUDA], ids=["CASES", "BENCH", "BENCH_CUDA"])
def test_the_list_is_sound(listed: tuple[Case, ...]) -> None:
    assert not [name for name, times in Counter(case.name for case in listed).items() if times > 1]
    for case in listed:
        assert case.norm in cases.NORMS
        assert case.tags <= {"quick", "slow", "sanitize", "bench", "compile"}
        assert ("bench" in case.tags) == (listed is not CASES)
        assert case.running or case.training, case.name
        assert set(case.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-"), case.name
        assert ("slow" in case.tags) == (listed is CASES and case.size > cases.SLOW_ELEMENTS)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if "quick" in case.tags else [pytest.mark.thorough])
        for case in CASES
        if "slow" not in case.tags
    ],
)
def test_the_rounded_reference_passes(case: Case) -> None:
    skip_without_modules(case)
    inputs = cases.make(case)
    for field in fields(inputs):
        array = getattr(inputs, field.name)
        assert array is None or (array.flags.c_contiguous and array.astype(np.float64).dtype == np.float64)
        assert array is None or np.all(np.isfinite(array.astype(np.float64))), field.name
    expected = cases.expected(case, inputs)
    for deviation in cases.compare(case, inputs, expected, stored(case, expected)):
        assert deviation.ok, deviation


def test_make_is_reproducible() -> None:
    case = find(residual=True)
    one, same, other = cases.make(case), cases.make(case), cases.make(case, seed=1)
    for field in fields(one):
        if getattr(one, field.name) is not None:
            np.testing.assert_array_equal(getattr(one, field.name), getattr(same, field.name))
    assert np.all(one.x != other.x)


@pytest.mark.parametrize("offset", [0.0, 1e2, 3e3, 3e4, 1e6])
def test_offsets_and_outliers_are_what_they_say(offset: float) -> None:
    for case in CASES:
        if case.offset != offset or case.scale != 1 or not case.training or case.mask or "slow" in case.tags:
            continue
        if case.size < 1000 * max(case.statistics, 1):
            continue
        skip_without_modules(case)
        x = cases.make(case).x.astype(np.float64)
        rows = cases._to_cells(x, case).reshape(case.statistics, -1)
        rest = rows[:, 1:] if case.outlier else rows
        drawn = 5 / np.sqrt(rest.shape[1])  # a mean is off by 1/√n, and five times that once in a million
        np.testing.assert_allclose(np.abs(rest.mean(axis=1) / rest.std(axis=1)), offset, rtol=0.1, atol=drawn)
        if case.outlier:
            distance = (rows[:, 0] - rest.mean(axis=1)) / rest.std(axis=1)
            np.testing.assert_allclose(distance, 100, rtol=0.1)


PLANTED = {
    "float32": find(dtype="float32", residual=True, activation="silu"),
    "float32 far": find(dtype="float32", offset=1e6, residual=True, activation="relu"),
    "float64": find(dtype="float64", residual=True, activation="silu", param_dtype="float32"),
    "float16": find(dtype="float16", residual=True, activation="tanh"),
    "ghosts": find(dtype="float32", residual=True, activation="relu", ghost_batch_size=4),
    "mask": find(dtype="float32", residual=True, activation="silu", mask=True),
}


@pytest.mark.parametrize("which", PLANTED)
@pytest.mark.parametrize(
    "name", ["y", "mean", "var", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"]
)
def test_planted_deviations_are_found(which: str, name: str) -> None:
    case = PLANTED[which]
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    got = stored(case, expected)
    bound = cases.bounds(case, inputs, expected)[name]
    # Away from the kinks; one position in the middle and the last one.
    positions = np.flatnonzero(np.isfinite(bound))
    # Where storing rounds by as much as the bound, only a coarser deviation can be planted.
    field = "rstd" if name == "var" else name
    coarse = (
        name not in ("mean", "var")
        and getattr(got, field).dtype != np.float64
        and (name.startswith(("running", "dresidual")) or case.dtype != "float32")
    )
    above, below = (4.0, 0.0) if coarse else (1.05, 0.9)
    for position in (positions[len(positions) // 2], positions[-1]):
        index = np.unravel_index(position, bound.shape)
        for factor in (above, -above, below, -below):
            planted = getattr(expected, field).copy()
            if name == "var":
                variance = 1 / planted[index] ** 2 - case.eps
                planted[index] = (variance + factor * bound[index] + case.eps) ** -0.5
            else:
                planted[index] += factor * bound[index]
            planted = planted.astype(getattr(got, field).dtype)
            if name == "dresidual" and bound[index] == 0 and abs(factor) == above:
                planted[index] = np.nextafter(planted[index], np.float32(np.inf))
            found = failures(case, inputs, expected, replace(got, **{field: planted}))
            assert found == ({name} if abs(factor) == above else set()), (factor, index)


def test_float32_bounds_are_the_promised_ones() -> None:
    case = find(dtype="float32", residual=True, activation="silu", axis=1)
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    bound = cases.bounds(case, inputs, expected)
    weight, bias = inputs.weight, inputs.bias
    assert weight is not None
    assert bias is not None
    assert inputs.residual is not None
    for c in range(case.channels):
        xhat = (inputs.x[:, c] - expected.mean[c]) * expected.rstd[c]
        dy = np.abs(inputs.dy[:, c].astype(np.float64))
        terms = np.abs(weight[c] * xhat) + abs(bias[c]) + np.abs(inputs.residual[:, c])
        np.testing.assert_allclose(bound["y"][:, c], 2e-6 * terms.max(), rtol=1e-6)
        np.testing.assert_allclose(bound["dx"][:, c], 2e-6 * abs(weight[c] * expected.rstd[c]) * dy.max(), rtol=1e-6)
        np.testing.assert_allclose(bound["dweight"][c], 1e-6 * np.sum(dy * np.abs(xhat)), rtol=1e-6)
        np.testing.assert_allclose(bound["dbias"][c], 1e-6 * np.sum(dy), rtol=1e-6)
        np.testing.assert_allclose(bound["var"][c], 1e-6 * np.var(inputs.x[:, c].astype(np.float64)), rtol=1e-6)


def test_wrong_kinds_of_results_are_found() -> None:
    case = PLANTED["float32"]
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    got = stored(case, expected)
    wrong: dict[str, Any] = {
        "dtype": replace(got, y=got.y.astype(np.float64)),
        "shape": replace(got, y=got.y[..., None]),
        "NaN": replace(got, y=np.full_like(got.y, np.nan)),
        "infinity": replace(got, y=np.where(got.y == got.y.max(), np.inf, got.y).astype(np.float32)),
    }
    for kind, outputs in wrong.items():
        assert failures(case, inputs, expected, outputs) == {"y"}, kind
    assert failures(case, inputs, expected, replace(got, dresidual=None)) == {"dresidual"}
    (deviation,) = (d for d in cases.compare(case, inputs, expected, wrong["dtype"]) if not d.ok)
    assert deviation.detail == "expected dtype float32, got float64"


def test_either_side_of_a_kink_passes() -> None:
    # x = running mean puts the elements of one position exactly at 0.
    case = Case(name="kink", shape=(8, 3, 16), activation="relu", residual=True, training=False, affine=False)
    inputs = cases.make(case)
    assert inputs.running_mean is not None
    assert inputs.residual is not None
    inputs.x[2, :, 5] = inputs.running_mean
    inputs.residual[2, :, 5] = 0
    inputs.dy[2, :, 5] = 0.01
    expected = cases.expected(case, inputs)
    got = stored(case, expected)
    assert np.all(np.isinf(cases.bounds(case, inputs, expected)["dx"][2, :, 5]))
    assert not failures(case, inputs, expected, got)

    def flipped(position: int) -> Outputs:
        """u = dy there, where the reference has 0."""
        dy = inputs.dy[2, :, position]
        xhat = (inputs.x[2, :, position] - expected.mean) * expected.rstd
        changed = {name: getattr(expected, name).copy() for name in ("dx", "dresidual", "dweight", "dbias")}
        changed["dx"][2, :, position] = dy * expected.rstd
        changed["dresidual"][2, :, position] = dy
        changed["dweight"] += dy * xhat
        changed["dbias"] += dy
        return stored(case, replace(expected, **changed))

    assert not failures(case, inputs, expected, flipped(5))
    elsewhere = next(p for p in range(16) if np.all(expected.y[2, :, p] == 0) and p != 5)
    assert failures(case, inputs, expected, flipped(elsewhere)) == {"dx", "dresidual", "dweight", "dbias"}


def test_a_flip_at_a_kink_may_move_dx_elsewhere() -> None:
    case = Case(name="kink", shape=(8, 3, 16), activation="relu", residual=True)
    inputs = cases.make(case)
    assert inputs.residual is not None
    first = cases.expected(case, inputs)
    xhat = (inputs.x[2, :, 5] - first.mean) * first.rstd
    assert inputs.weight is not None
    assert inputs.bias is not None
    inputs.residual[2, :, 5] = -(inputs.weight * xhat + inputs.bias)
    expected = cases.expected(case, inputs)
    bound = cases.bounds(case, inputs, expected)
    assert np.all(np.isinf(bound["dx"][2, :, 5]))
    # The other side of the kink: the residual a little larger, or smaller.
    other = []
    for step in (1e-5, -1e-5):
        nudged = inputs.residual.astype(np.float64)
        nudged[2, :, 5] += step
        other.append(cases.expected(case, replace(inputs, residual=nudged)))
    for outputs in other:
        moved = stored(case, replace(outputs, y=expected.y))
        assert not failures(case, inputs, expected, moved)
    assert np.any(other[0].dbias != other[1].dbias)


class OnePassVariance:
    """The reference with a float32 E[x^2] - E[x]^2 in place of its variance."""

    batch_norm_backward = staticmethod(reference.batch_norm_backward)

    @staticmethod
    def batch_norm_forward(x: Any, weight: Any, bias: Any, **options: Any) -> tuple[Float64, Float64, Float64]:
        axes = tuple(axis for axis in range(x.ndim) if axis != options["axis"] % x.ndim)
        y, mean, _ = reference.batch_norm_forward(x, weight, bias, **options)
        variance = (x * x).mean(axis=axes) - x.mean(axis=axes) ** 2
        return y, mean, 1 / np.sqrt(np.maximum(variance, 0.0).astype(np.float64) + options["eps"])


@pytest.mark.parametrize("offset", [1e2, 3e3, 3e4, 1e6])
def test_a_cancelling_variance_is_found(offset: float) -> None:
    case = find(offset=offset, outlier=False, residual=False)
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    got = cases.run(case, inputs, OnePassVariance())
    assert {"var", "dx", "dweight"} <= failures(case, inputs, expected, stored(case, got))


def test_a_mean_rounded_to_float32_is_found() -> None:
    case = find(offset=1e6, outlier=False, residual=False)
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    mean = expected.mean.astype(np.float32).astype(np.float64)
    dx, dweight, dbias = reference.batch_norm_backward(
        inputs.dy, inputs.x, mean, expected.rstd, inputs.weight, inputs.bias, axis=case.axis
    )
    got = stored(case, replace(expected, mean=mean, dx=dx, dweight=dweight, dbias=dbias))
    assert {"mean", "dx", "dweight"} <= failures(case, inputs, expected, got)


def test_run_leaves_the_inputs_alone() -> None:
    case = find(residual=True)
    inputs, untouched = cases.make(case), cases.make(case)
    cases.run(case, inputs, reference)
    for field in fields(inputs):
        if getattr(inputs, field.name) is not None:
            np.testing.assert_array_equal(getattr(inputs, field.name), getattr(untouched, field.name))
