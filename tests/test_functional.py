"""The functions by their contract: layouts, dtypes, outputs, what is written and what never is, every error."""

from __future__ import annotations

import itertools
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import reference
from fusednorm.testing import cases
from fusednorm.testing.cases import Case, Outputs
from support import (
    DENSE,
    DTYPES,
    LAYOUTS,
    STRIDED,
    Array,
    assert_same_bits,
    bits,
    byte_swapped,
    channels_last,
    misaligned,
    normal,
    numpy_dtype,
    stepped,
)

ACTIVATIONS = [None, "relu", "leaky_relu", ("leaky_relu", 0.3), "silu", "sigmoid", "tanh"]


def check(case: Case, lay_x: Any = np.copy, lay_dy: Any = np.copy, lay_residual: Any = np.copy) -> Outputs:
    """Forward and backward of a case, its arrays laid out as told, against the reference."""
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    x, dy = lay_x(inputs.x), lay_dy(inputs.dy)
    residual = None if inputs.residual is None else lay_residual(inputs.residual)
    running = [None if a is None else a.copy() for a in (inputs.running_mean, inputs.running_var)]
    options = {
        "training": case.training,
        "axis": case.axis,
        "residual": residual,
        "activation": case.activation,
        "ghost_batch_size": case.ghost_batch_size,
    }
    y, mean, rstd = fn.batch_norm_forward(
        x, inputs.weight, inputs.bias, running_mean=running[0], running_var=running[1],
        momentum=case.momentum, eps=case.eps, **options,
    )  # fmt: skip
    dx, dweight, dbias, *rest = fn.batch_norm_backward(dy, x, mean, rstd, inputs.weight, inputs.bias, **options)
    got = Outputs(y, mean, rstd, dx, dweight, dbias, rest[0] if rest else None, *running)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got) if not deviation.ok]
    assert not wrong
    for array, source in ((x, inputs.x), (dy, inputs.dy), (residual, inputs.residual)):
        assert array is None or np.array_equal(array, source), "an input was written to"
    return got


def memory_order(a: Array) -> list[int]:
    return sorted((axis for axis in range(a.ndim) if a.shape[axis] > 1), key=lambda axis: -a.strides[axis])


def is_dense(a: Array) -> bool:
    order = memory_order(a)
    steps = np.cumprod([a.itemsize, *[a.shape[axis] for axis in reversed(order)]])
    return [a.strides[axis] for axis in reversed(order)] == steps[:-1].tolist()


# Layouts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), 1), ((6, 5, 9), 1), ((3, 4, 5, 6), -1), ((4, 6, 3), 0)])
@pytest.mark.parametrize("training", [True, False])
def test_any_layout(shape: tuple[int, ...], axis: int, layout: str, dtype: str, training: bool) -> None:
    numpy_dtype(dtype)
    case = Case("layout", shape, axis=axis, dtype=dtype, residual=True, activation="relu", training=training)
    got = check(case, LAYOUTS[layout], lay_residual=LAYOUTS[layout])
    x = LAYOUTS[layout](cases.make(case).x)
    for array in (got.y, got.dx):
        assert is_dense(array)
        # Dense in x's axis order, else C order.
        expected = memory_order(x) if layout in DENSE else list(range(x.ndim))
        assert memory_order(array) == expected
        assert array.flags.writeable
        assert not np.shares_memory(array, x)


@pytest.mark.parametrize(("lay_x", "lay_dy"), list(itertools.permutations(LAYOUTS, 2)))
def test_dy_and_residual_may_lie_differently_from_x(lay_x: str, lay_dy: str) -> None:
    case = Case("layouts", (4, 5, 3, 6), residual=True, activation="silu")
    got = check(case, LAYOUTS[lay_x], LAYOUTS[lay_dy], LAYOUTS[lay_dy])
    assert memory_order(got.dx) == memory_order(got.y)


def test_a_channels_last_view_takes_the_channels_last_kernel() -> None:
    """The same memory gives the same bits, whether as a view with axis=1 or as it lies with axis=-1."""
    x, dy = normal((6, 7, 9, 5)), normal((6, 7, 9, 5), seed=1)
    view, dy_view = np.moveaxis(x, -1, 1), np.moveaxis(dy, -1, 1)
    y, mean, rstd = fn.batch_norm_forward(x, axis=-1)
    y_view, mean_view, rstd_view = fn.batch_norm_forward(view)
    assert y_view.strides == view.strides
    assert_same_bits(np.moveaxis(y_view, 1, -1), y)
    assert_same_bits(mean_view, mean)
    assert_same_bits(rstd_view, rstd)
    of_view = fn.batch_norm_backward(dy_view, view, mean, rstd)
    for one, other in zip(of_view, fn.batch_norm_backward(dy, x, mean, rstd, axis=-1), strict=True):
        assert_same_bits(np.moveaxis(one, 1, -1) if one.ndim > 1 else one, other)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_broadcast_input(axis: int) -> None:
    for source in (normal((1, 5, 7)), normal((4, 5, 1)), normal((1, 5, 1))):
        x = np.broadcast_to(source, (4, 5, 7))
        y, mean, rstd = fn.batch_norm_forward(x, axis=axis)
        want, *_ = reference.batch_norm_forward(x, axis=axis)
        np.testing.assert_allclose(y, want, atol=2e-6 * np.abs(want).max())
        dy = np.broadcast_to(np.float32(1), x.shape)
        dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, axis=axis)
        want_dx, want_dweight, want_dbias = reference.batch_norm_backward(dy, x, mean, rstd, axis=axis)
        np.testing.assert_allclose(dx, want_dx, atol=2e-6 * rstd.max())
        np.testing.assert_allclose(dweight, want_dweight, atol=1e-6 * 35)
        np.testing.assert_allclose(dbias, want_dbias, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_byte_swapped(dtype: str) -> None:
    x, dy = normal((6, 5, 7), dtype), normal((6, 5, 7), dtype, 1)
    y, mean, rstd = fn.batch_norm_forward(x)
    dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd)
    swapped = byte_swapped(x)
    y2, mean2, rstd2 = fn.batch_norm_forward(swapped)
    assert np.array_equal(y2, y)
    assert_same_bits(mean2, mean)
    assert_same_bits(rstd2, rstd)
    dx2, dweight2, dbias2 = fn.batch_norm_backward(byte_swapped(dy), swapped, mean, rstd)
    assert np.array_equal(dx2, dx)
    assert_same_bits(dweight2, dweight)
    assert_same_bits(dbias2, dbias)


def test_the_gradient_of_a_byte_swapped_input_may_be_like_y() -> None:
    """dy made from y fits: whatever byte order y has, it is the same float32."""
    swapped = byte_swapped(normal((6, 5, 7)))
    y, mean, rstd = fn.batch_norm_forward(swapped)
    dx, *_ = fn.batch_norm_backward(np.ones_like(y), swapped, mean, rstd)
    want, *_ = fn.batch_norm_backward(np.ones_like(y), swapped.astype(np.float32), mean, rstd)
    assert np.array_equal(dx, want)


def test_axes_of_length_one_with_odd_strides() -> None:
    x = normal((6, 5, 7))
    for axis in range(4):
        shape, strides = list(x.shape), list(x.strides)
        shape.insert(axis, 1)
        strides.insert(axis, 8)
        odd = np.lib.stride_tricks.as_strided(x, shape, strides)
        channel = 2 if axis <= 1 else 1
        y, mean, rstd = fn.batch_norm_forward(odd, axis=channel)
        assert_same_bits(y.reshape(x.shape), fn.batch_norm_forward(x)[0])
        dx, *_ = fn.batch_norm_backward(np.ascontiguousarray(odd), odd, mean, rstd, axis=channel)
        assert_same_bits(dx.reshape(x.shape), fn.batch_norm_backward(x, x, mean, rstd)[0])


def test_the_bits_do_not_depend_on_the_address() -> None:
    """Vectors start at the first element, wherever in a cache line it lies."""
    for shape, axis in [((5, 3, 77), 1), ((70, 13), 1), ((3, 50, 19), 2)]:
        case = Case("address", shape, axis=axis, residual=True, activation="silu")
        inputs = cases.make(case)
        results = []
        for shift in (0, 1, 3, 7, 13):
            arrays = []
            for array in (inputs.x, inputs.dy, inputs.residual):
                assert array is not None
                raw = np.empty(array.size + 32, array.dtype)
                start = (-raw.ctypes.data // array.itemsize) % 16 + shift
                arrays.append(raw[start : start + array.size].reshape(shape))
                arrays[-1][...] = array
            x, dy, residual = arrays
            options: dict[str, Any] = {"axis": axis, "residual": residual, "activation": "silu"}
            y, mean, rstd = fn.batch_norm_forward(x, inputs.weight, inputs.bias, **options)
            gradients = fn.batch_norm_backward(dy, x, mean, rstd, inputs.weight, inputs.bias, **options)
            results.append((y, mean, rstd, *gradients))
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert_same_bits(one, other)


def test_array_subclasses_that_are_plain_arrays() -> None:
    class Own(np.ndarray):  # type: ignore[type-arg]
        pass

    x = normal((6, 5))
    assert_same_bits(fn.batch_norm_forward(x.view(Own))[0], fn.batch_norm_forward(x)[0])


# Dtypes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", [*DTYPES, None])
def test_dtypes_of_outputs(dtype: str, param_dtype: str | None) -> None:
    numpy_dtype(dtype), numpy_dtype(param_dtype or "float32")
    affine = param_dtype is not None
    case = Case("dtypes", (6, 5, 7), dtype=dtype, param_dtype=param_dtype or "float32", affine=affine, residual=True)
    got = check(case)
    assert got.y.dtype == got.dx.dtype == numpy_dtype(dtype)
    assert got.dresidual is not None
    assert got.dresidual.dtype == numpy_dtype(dtype)
    gradient = param_dtype or ("float64" if dtype == "float64" else "float32")
    assert got.dweight.dtype == got.dbias.dtype == numpy_dtype(gradient)
    assert got.mean.dtype == got.rstd.dtype == np.float64
    for array in (got.mean, got.rstd, got.dweight, got.dbias):
        assert array.shape == (5,)


def test_weight_and_bias_of_different_dtypes() -> None:
    x = normal((6, 5, 7))
    weight, bias = normal((5,), "float64"), normal((5,), "float16", 1)
    y, mean, rstd = fn.batch_norm_forward(x, weight, bias)
    want, *_ = reference.batch_norm_forward(x, weight, bias)
    np.testing.assert_allclose(y, want, atol=2e-6 * 10)
    _, dweight, dbias = fn.batch_norm_backward(x, x, mean, rstd, weight, bias)
    assert (dweight.dtype, dbias.dtype) == (np.float64, np.float16)
    _, dweight, dbias = fn.batch_norm_backward(x, x, mean, rstd, weight)
    assert (dweight.dtype, dbias.dtype) == (np.float64, np.float32)


@pytest.mark.parametrize("lay", [stepped, misaligned, byte_swapped, lambda a: a[::-1].copy()[::-1]])
def test_parameters_and_running_statistics_in_any_layout(lay: Any) -> None:
    x = normal((6, 5, 7))
    weight, bias = normal((5,), seed=1), normal((5,), seed=2)
    mean, var = normal((5,), seed=3), np.abs(normal((5,), seed=4))
    results = []
    for change in (np.copy, lay):
        w, b, m, v = (change(a) for a in (weight, bias, mean, var))
        y, *saved = fn.batch_norm_forward(x, w, b, running_mean=m, running_var=v)
        dx, dweight, dbias = fn.batch_norm_backward(x, x, *saved, w, b, activation="tanh")
        results.append([np.asarray(a, a.dtype.newbyteorder("=")) for a in (y, dx, dweight, dbias, m, v)])
        assert np.any(m != mean), "the running mean was not updated in place"
        assert dweight.dtype == w.dtype
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


# The epilogue and eps.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_activations(activation: Any, training: bool) -> None:
    for shape, axis in [((9, 5, 7), 1), ((9, 7, 5), -1)]:
        check(Case("act", shape, axis=axis, activation=activation, residual=True, training=training))


def test_leaky_relu_slope() -> None:
    x = normal((9, 5))
    default, explicit = (fn.batch_norm_forward(x, activation=a)[0] for a in ("leaky_relu", ("leaky_relu", 0.01)))
    assert_same_bits(default, explicit)
    assert np.any(default != fn.batch_norm_forward(x, activation=("leaky_relu", 0.02))[0])


def test_activations_saturate_without_overflow() -> None:
    """exp of large arguments: the limits, not NaN."""
    x = np.array([[-1.0], [1.0]], np.float32)
    for activation, low, high in [("sigmoid", 0, 1), ("tanh", -1, 1), ("silu", 0, None), ("relu", 0, None)]:
        for weight in (1e2, 1e4, 1e30, 3e38):
            w = np.array([weight], np.float32)
            y, mean, rstd = fn.batch_norm_forward(x, w, activation=activation)
            dx, dweight, _ = fn.batch_norm_backward(np.ones_like(x), x, mean, rstd, w, activation=activation)
            assert y[0, 0] == low
            assert y[1, 0] == high if high is not None else y[1, 0] > 0.99 * weight
            assert not np.any(np.isnan(dx))
            assert not np.any(np.isnan(dweight))


def test_eps_rules() -> None:
    x, m, v = normal((6, 5)), np.zeros(5), np.ones(5)
    for eps in (0.0, -1e-5, float("nan")):
        with pytest.raises(ValueError, match="eps must be positive"):
            fn.batch_norm_forward(x, eps=eps)
    for eps in (0.0, -0.5):
        y = fn.batch_norm(x, m, v, eps=eps)
        np.testing.assert_allclose(y, x / np.sqrt(1 + eps), rtol=1e-6)
    assert np.all(np.isnan(fn.batch_norm(x, m, v, eps=-2.0)))


def test_batch_norm_is_the_forward_in_pytorch_order() -> None:
    x, w, b = normal((6, 5, 7)), normal((5,), seed=1), normal((5,), seed=2)
    m, v = np.zeros(5, np.float32), np.ones(5, np.float32)
    m2, v2 = m.copy(), v.copy()
    y = fn.batch_norm(x, m, v, w, b, True, 0.3, 1e-3, activation="relu", residual=x)
    y2, *_ = fn.batch_norm_forward(
        x, w, b, running_mean=m2, running_var=v2, momentum=0.3, eps=1e-3, activation="relu", residual=x
    )
    assert_same_bits(y, y2)
    assert_same_bits(m, m2)
    assert_same_bits(v, v2)
    # Evaluation is the default, and changes nothing.
    y = fn.batch_norm(x, m, v, w, b)
    want, *_ = reference.batch_norm_forward(x, w, b, running_mean=m, running_var=v, training=False)
    np.testing.assert_allclose(y, want, atol=2e-6 * 20)
    assert_same_bits(m, m2)
    # Training without running statistics.
    assert_same_bits(fn.batch_norm(x, None, None, training=True), fn.batch_norm_forward(x)[0])


def test_momentum_is_any_number() -> None:
    x = normal((6, 5))
    for momentum in (0, 1, 0.0, 0.5, 1.0, -0.25, 1.5, np.float32(0.5)):
        m, v = np.full(5, 2.0), np.full(5, 3.0)
        fn.batch_norm(x, m, v, training=True, momentum=momentum)
        batch_mean, batch_var = x.astype(float).mean(axis=0), x.astype(float).var(axis=0, ddof=1)
        np.testing.assert_allclose(m, (1 - float(momentum)) * 2 + float(momentum) * batch_mean, atol=2e-6)
        np.testing.assert_allclose(v, (1 - float(momentum)) * 3 + float(momentum) * batch_var, atol=4e-6)


# out=


def forward(x: Array, **options: Any) -> Any:
    return fn.batch_norm_forward(x, np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5), activation="relu", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ghost", [None, 4])
def test_out_of_any_strides(layout: str, ghost: int | None) -> None:
    x, dy = normal((6, 5, 7)), normal((6, 5, 7), seed=1)
    plain, mean, rstd = forward(x, ghost_batch_size=ghost)
    out = LAYOUTS[layout](np.zeros_like(x))
    around = out.base if layout in ("stepped", "padded") else None
    nan = None if around is None else np.isnan(around)
    y, *_ = forward(x, ghost_batch_size=ghost, out=out)
    assert y is out
    assert_same_bits(out, plain)
    gradients = fn.batch_norm_backward(dy, x, mean, rstd, ghost_batch_size=ghost)
    out[...] = 0
    again = fn.batch_norm_backward(dy, x, mean, rstd, ghost_batch_size=ghost, out=out)
    assert again[0] is out
    for one, other in zip(gradients, again, strict=True):
        assert_same_bits(one, other)
    if around is not None:
        assert np.array_equal(np.isnan(around), nan), "elements between those of out were written"


SIZES = [((n, 5, k), 1) for n, k in ((1, 2), (3, 1), (2, 7), (3, 17), (2, 33), (9, 63), (2, 1029))] + [
    ((n, 5), 1) for n in (2, 3, 8, 31, 77, 1031)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["x", "residual", "dy"])
def test_in_place(dtype: str, where: str, isa: str) -> None:
    """Tails are done with overlapping vectors: nothing may be read after it was written."""
    for (shape, axis), training, activation in itertools.product(SIZES, (True, False), (None, "relu", "silu")):
        x, dy, residual = (normal(shape, dtype, seed) for seed in range(3))
        w = np.linspace(0.5, 2, 5)
        options: dict[str, Any] = {"training": training, "axis": axis, "activation": activation}
        running: dict[str, Any] = {"running_mean": np.zeros(5), "running_var": np.ones(5)}
        y, mean, rstd = fn.batch_norm_forward(x, w, residual=residual, **running, **options)
        plain = fn.batch_norm_backward(dy, x, mean, rstd, w, residual=residual, **options)
        arrays = {"x": x.copy(), "dy": dy.copy(), "residual": residual.copy()}
        if where != "dy":
            running = {"running_mean": np.zeros(5), "running_var": np.ones(5)}
            got, mean2, rstd2 = fn.batch_norm_forward(
                arrays["x"], w, residual=arrays["residual"], out=arrays[where], **running, **options
            )
            assert got is arrays[where]
            assert_same_bits(got, y, f"{shape} {training} {activation}")
            assert_same_bits(mean2, mean)
            assert_same_bits(rstd2, rstd)
        arrays = {"x": x.copy(), "dy": dy.copy(), "residual": residual.copy()}
        in_place = fn.batch_norm_backward(
            arrays["dy"], arrays["x"], mean, rstd, w, residual=arrays["residual"], out=arrays[where], **options
        )
        assert in_place[0] is arrays[where]
        for one, other in zip(plain, in_place, strict=True):
            assert_same_bits(one, other, f"{shape} {training} {activation}")


@pytest.mark.parametrize("lay", [channels_last, stepped, misaligned, byte_swapped])
def test_in_place_of_an_x_that_is_copied(lay: Any) -> None:
    x = lay(normal((6, 5, 7)))
    want = np.array(forward(x)[0])
    got, *_ = forward(x, out=x)
    assert got is x
    assert np.array_equal(x, want)


def test_in_place_with_one_array_as_x_and_residual() -> None:
    x = normal((6, 5, 7))
    want = np.array(fn.batch_norm_forward(x, residual=x)[0])
    fn.batch_norm_forward(x, residual=x, out=x)
    assert_same_bits(x, want)


def test_large_in_place_and_streamed_outputs() -> None:
    """Above 16 MiB stores go past the caches; out need not be aligned to a line then either."""
    for shape, axis in [((21, 64, 57, 57), 1), ((40, 2100, 53), 1), ((66_000, 65), 1), ((66_000, 64), 1)]:
        x = normal(shape)
        plain, mean, rstd = fn.batch_norm_forward(x, axis=axis, activation="relu")
        raw = np.empty(x.size + 3, np.float32)
        out = raw[3:].reshape(shape)
        fn.batch_norm_forward(x, axis=axis, activation="relu", out=out)
        assert np.array_equal(out, plain)
        dx, dweight, dbias = fn.batch_norm_backward(x, x, mean, rstd, axis=axis, activation="relu")
        _, dweight2, dbias2 = fn.batch_norm_backward(x, x, mean, rstd, axis=axis, activation="relu", out=out)
        assert np.array_equal(out, dx)
        assert_same_bits(dweight, dweight2)
        assert_same_bits(dbias, dbias2)
        fn.batch_norm_forward(x, axis=axis, activation="relu", out=x)
        assert np.array_equal(x, plain)


# What is refused, with everything as it was.


class State:
    """Arrays whose bits are the same at the end."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = arrays
        self.before = {name: bits(a).copy() for name, a in arrays.items() if isinstance(a, np.ndarray)}

    def check(self) -> None:
        for name, before in self.before.items():
            assert np.array_equal(bits(self.arrays[name]), before), f"{name} changed"


def forward_arguments() -> dict[str, Any]:
    return {
        "x": normal((6, 4, 3)),
        "weight": normal((4,), seed=1),
        "bias": normal((4,), seed=2),
        "running_mean": normal((4,), seed=3),
        "running_var": np.abs(normal((4,), seed=4)),
        "residual": normal((6, 4, 3), seed=5),
        "out": normal((6, 4, 3), seed=6),
        "activation": "relu",
    }


def read_only(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


class Foreign:
    """An array of another library, as it looks from outside."""

    __cuda_array_interface__ = {"shape": (6, 4, 3), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012
    shape, dtype = (6, 4, 3), np.dtype(np.float32)


KINDS = {
    "list": np.zeros((6, 4, 3)).tolist(),
    "int": np.zeros((6, 4, 3), int),
    "bool": np.zeros((6, 4, 3), bool),
    "complex": np.zeros((6, 4, 3), complex),
    "longdouble": np.zeros((6, 4, 3), np.longdouble),
    "object": np.zeros((6, 4, 3), object),
    "masked": np.ma.masked_array(np.zeros((6, 4, 3), np.float32)),
    "foreign": Foreign(),
    "number": 1.0,
}
VECTORS = {
    "list": [1.0] * 4,
    "int": np.ones(4, int),
    "complex": np.ones(4, complex),
    "masked": np.ma.masked_array(np.ones(4, np.float32)),
    "number": 1.0,
    "foreign": Foreign(),
}
FORWARD_ERRORS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "one value": (
        {"x": normal((1, 4)), "residual": normal((1, 4)), "out": normal((1, 4))},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size \(1, 4\)",
    ),
    "one value, one pixel": (
        {"x": normal((1, 4, 1)), "residual": None, "out": None},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size \(1, 4, 1\)",
    ),
    "one value in the last ghost": (
        {"x": normal((5, 4)), "residual": None, "out": None, "ghost_batch_size": 2},
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
    "1-D": ({"x": normal((4,)), "residual": None, "out": None}, ValueError, r"at least 2D input \(got 1D input\)"),
    "0-D": ({"x": np.array(1.0), "residual": None, "out": None}, ValueError, r"2D input \(got 0D input\)"),
    "axis": ({"axis": 3}, np.exceptions.AxisError, "axis 3"),
    "negative axis": ({"axis": -4}, np.exceptions.AxisError, "axis -4"),
    "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "activation": ({"activation": "gelu"}, ValueError, "relu"),
    "activation slope": ({"activation": ("relu", 0.1)}, ValueError, "relu"),
    "activation list": ({"activation": ["relu"]}, ValueError, "relu"),
    "empty activation": ({"activation": ""}, ValueError, "relu"),
    "ghost 0": ({"ghost_batch_size": 0}, ValueError, "ghost_batch_size"),
    "ghost negative": ({"ghost_batch_size": -2}, ValueError, "ghost_batch_size"),
    "weight size": ({"weight": np.ones(3)}, ValueError, "weight should contain 4 elements not 3"),
    "bias size": ({"bias": np.ones(5)}, ValueError, "bias should contain 4 elements not 5"),
    "running_mean size": ({"running_mean": np.ones(3)}, ValueError, "running_mean should contain 4 elements not 3"),
    "running_var size": ({"running_var": np.ones(3)}, ValueError, "running_var should contain 4 elements not 3"),
    "momentum None": ({"momentum": None}, TypeError, r"momentum|incompatible"),
    "momentum a word": ({"momentum": "0.1"}, TypeError, r"momentum|incompatible"),
    "residual shape": ({"residual": normal((6, 4, 2))}, ValueError, r"\(6, 4, 3\).*\(6, 4, 2\)"),
    "residual dtype": ({"residual": normal((6, 4, 3), "float64")}, TypeError, "float32.*float64"),
    "out shape": ({"out": normal((6, 3, 4))}, ValueError, r"\(6, 4, 3\).*\(6, 3, 4\)"),
    "out broadcasts": ({"out": normal((1, 4, 3))}, ValueError, r"\(6, 4, 3\).*\(1, 4, 3\)"),
    "out dtype": ({"out": normal((6, 4, 3), "float64")}, TypeError, "float32.*float64"),
    "out read-only": ({"out": read_only(normal((6, 4, 3)))}, ValueError, "read-only"),
    "out a list": ({"out": [1.0]}, TypeError, "out must be a NumPy or CuPy array"),
    "running_mean read-only": ({"running_mean": read_only(normal((4,)))}, ValueError, "read-only"),
    "running_var read-only": ({"running_var": read_only(normal((4,)))}, ValueError, "read-only"),
    "running_var read-only and strided": ({"running_var": read_only(normal((8,)))[::2]}, ValueError, "read-only"),
}
FORWARD_ERRORS |= {
    f"x {name}": ({"x": value}, TypeError, r"CuPy array|of a GPU|float32") for name, value in KINDS.items()
}
FORWARD_ERRORS |= {
    f"residual {name}": ({"residual": value}, TypeError, r"CuPy array|of a GPU|float32")
    for name, value in KINDS.items()
}
FORWARD_ERRORS |= {
    f"{which} {name}": ({which: value}, TypeError, r"CuPy array|of a GPU|float32")
    for which in ("weight", "bias", "running_mean", "running_var")
    for name, value in VECTORS.items()
}


@pytest.mark.parametrize(("wrong", "error", "message"), FORWARD_ERRORS.values(), ids=FORWARD_ERRORS.keys())
def test_forward_errors_touch_nothing(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = forward_arguments() | wrong
    state = State(**arguments)
    with pytest.raises(error, match=message):
        fn.batch_norm_forward(**arguments)
    state.check()


@pytest.mark.parametrize("missing", [("running_mean",), ("running_var",), ("running_mean", "running_var")])
def test_evaluation_needs_running_statistics(missing: tuple[str, ...]) -> None:
    arguments = forward_arguments() | dict.fromkeys(missing) | {"training": False}
    state = State(**arguments)
    with pytest.raises(ValueError, match="running_mean and running_var"):
        fn.batch_norm_forward(**arguments)
    state.check()


def test_functional_momentum_none_is_a_type_error() -> None:
    m, v = np.zeros(4), np.ones(4)
    for training in (True, False):
        with pytest.raises(TypeError):
            fn.batch_norm(normal((6, 4)), m, v, training=training, momentum=None)  # type: ignore[arg-type]
    assert np.all(m == 0)
    assert np.all(v == 1)


def backward_arguments() -> dict[str, Any]:
    x = normal((6, 4, 3))
    _, mean, rstd = fn.batch_norm_forward(x)
    return {
        "dy": normal((6, 4, 3), seed=1),
        "x": x,
        "mean": mean,
        "rstd": rstd,
        "weight": normal((4,), seed=2),
        "bias": normal((4,), seed=3),
        "residual": normal((6, 4, 3), seed=4),
        "out": normal((6, 4, 3), seed=5),
        "activation": "relu",
    }


BACKWARD_ERRORS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dy shape": ({"dy": normal((6, 4, 2))}, ValueError, r"\(6, 4, 3\).*\(6, 4, 2\)"),
    "dy dtype": ({"dy": normal((6, 4, 3), "float64")}, TypeError, "float32.*float64"),
    "residual shape": ({"residual": normal((6, 4, 2))}, ValueError, r"\(6, 4, 3\).*\(6, 4, 2\)"),
    "residual dtype": ({"residual": normal((6, 4, 3), "float64")}, TypeError, "float32.*float64"),
    "mean shape": ({"mean": np.zeros(3)}, ValueError, r"\(4,\).*\(3,\)"),
    "rstd shape": ({"rstd": np.zeros((1, 4))}, ValueError, r"\(4,\).*\(1, 4\)"),
    "mean of whole batch with ghosts": ({"ghost_batch_size": 2}, ValueError, r"\(3, 4\).*\(4,\)"),
    "mean a list": ({"mean": [0.0] * 4}, TypeError, "CuPy array|of a GPU"),
    "weight size": ({"weight": np.ones(3)}, ValueError, "weight should contain 4 elements not 3"),
    "bias size": ({"bias": np.ones(3)}, ValueError, "bias should contain 4 elements not 3"),
    "activation": ({"activation": "gelu"}, ValueError, "relu"),
    "axis": ({"axis": 3}, np.exceptions.AxisError, "axis 3"),
    "out shape": ({"out": normal((6, 3, 4))}, ValueError, r"\(6, 4, 3\).*\(6, 3, 4\)"),
    "out dtype": ({"out": normal((6, 4, 3), "float64")}, TypeError, "float32.*float64"),
    "out read-only": ({"out": read_only(normal((6, 4, 3)))}, ValueError, "read-only"),
}
BACKWARD_ERRORS |= {
    f"{which} {name}": ({which: value}, TypeError, r"CuPy array|of a GPU|float32")
    for which in ("x", "dy", "residual")
    for name, value in KINDS.items()
}
BACKWARD_ERRORS |= {
    f"{which} {name}": ({which: value}, TypeError, r"CuPy array|of a GPU|float32")
    for which in ("weight", "bias", "mean", "rstd")
    for name, value in VECTORS.items()
}


@pytest.mark.parametrize(("wrong", "error", "message"), BACKWARD_ERRORS.values(), ids=BACKWARD_ERRORS.keys())
def test_backward_errors_touch_nothing(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = backward_arguments() | wrong
    state = State(**arguments)
    with pytest.raises(error, match=message):
        fn.batch_norm_backward(**arguments)
    state.check()


@pytest.mark.parametrize("which", ["x", "residual", "dy"])
def test_partial_overlap_is_refused(which: str) -> None:
    buffer = normal((7 * 4 * 3,))
    before = buffer.copy()
    shape = (6, 4, 3)
    overlapped, out = buffer[:72].reshape(shape), buffer[12:].reshape(shape)
    x, other = normal(shape, seed=1), normal(shape, seed=2)
    _, mean, rstd = fn.batch_norm_forward(x)
    calls = {
        "x": [
            lambda: fn.batch_norm_forward(overlapped, out=out),
            lambda: fn.batch_norm_backward(other, overlapped, mean, rstd, out=out),
            # The same elements in another order.
            lambda: fn.batch_norm_forward(overlapped, out=overlapped[::-1]),
        ],
        "residual": [
            lambda: fn.batch_norm_forward(x, residual=overlapped, out=out),
            lambda: fn.batch_norm_backward(other, x, mean, rstd, residual=overlapped, activation="relu", out=out),
        ],
        "dy": [lambda: fn.batch_norm_backward(overlapped, x, mean, rstd, out=out)],
    }
    for call in calls[which]:
        with pytest.raises(ValueError, match="overlap"):
            call()
        assert_same_bits(buffer, before)


def test_out_that_overlaps_a_parameter_is_refused() -> None:
    buffer = normal((72,))
    out = buffer.reshape(6, 4, 3)
    x = normal((6, 4, 3), seed=1)
    _, mean, rstd = fn.batch_norm_forward(x)
    before = buffer.copy()
    part = buffer[8:12]
    for options in ({"weight": part}, {"bias": part}, {"running_mean": part, "running_var": np.ones(4)}):
        with pytest.raises(ValueError, match="overlap"):
            fn.batch_norm_forward(x, out=out, **options)  # type: ignore[arg-type]
    for options in ({"weight": part}, {"bias": part}):
        with pytest.raises(ValueError, match="overlap"):
            fn.batch_norm_backward(x, x, mean, rstd, out=out, **options)  # type: ignore[arg-type]
    assert_same_bits(buffer, before)


def test_interleaved_arrays_do_not_overlap() -> None:
    both = normal((6, 4, 3, 2))
    x, out = both[..., 0], both[..., 1]
    want = np.array(fn.batch_norm_forward(x)[0])
    fn.batch_norm_forward(x, out=out)
    assert_same_bits(out, want)


def sharing() -> dict[str, dict[str, Array]]:
    one, other, both = normal((4,)), np.abs(normal((4,), seed=1)), np.abs(normal((9,), seed=2))
    return {
        "one array": {"running_mean": other, "running_var": other},
        "overlapping views": {"running_mean": both[:4], "running_var": both[3:7]},
        "backwards": {"running_mean": both[4:8], "running_var": both[4:0:-1]},
        "weight": {"running_mean": one, "running_var": other, "weight": other},
        "bias": {"running_mean": one, "running_var": other, "bias": one[:]},
        "every second": {"running_mean": both[1::2], "running_var": other, "weight": both[1:5]},
    }


@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("which", sharing())
def test_running_statistics_that_share_memory_are_refused(which: str, ghost: int | None) -> None:
    """Each would overwrite the other, or a parameter; evaluation, which writes neither, takes them."""
    arguments = forward_arguments() | sharing()[which]
    state = State(**arguments)
    with pytest.raises(ValueError, match=r"running_\w+ and \w+ share memory"):
        fn.batch_norm_forward(**arguments, ghost_batch_size=ghost)
    state.check()
    fn.batch_norm_forward(**arguments, ghost_batch_size=ghost, training=False)


def test_running_statistic_that_overlaps_itself_is_refused() -> None:
    arguments = forward_arguments()
    arguments["running_var"] = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (4,), (0,))
    state = State(**arguments)
    with pytest.raises(ValueError, match="running_var overlaps itself"):
        fn.batch_norm_forward(**arguments)
    state.check()


def test_running_statistics_may_lie_side_by_side() -> None:
    table = np.abs(normal((4, 4)))
    for columns in (table, np.asfortranarray(table)):
        apart = [column.copy() for column in columns.T]
        for running_mean, running_var, weight, bias in (columns.T, apart):
            fn.batch_norm_forward(normal((6, 4, 3)), weight, bias, running_mean=running_mean, running_var=running_var)
        assert_same_bits(columns, np.stack(apart, 1))


def test_read_only_inputs_are_never_written() -> None:
    arguments = forward_arguments()
    del arguments["out"]
    frozen = {name: read_only(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()}
    state = State(**frozen)
    y = fn.batch_norm_forward(**frozen, training=False)[0]
    want = fn.batch_norm_forward(**arguments, training=False)[0]
    assert_same_bits(y, want)
    frozen |= {"running_mean": None, "running_var": None}
    _, mean, rstd = fn.batch_norm_forward(**frozen)
    dy = read_only(normal((6, 4, 3)))
    fn.batch_norm_backward(
        dy, frozen["x"], read_only(mean), read_only(rstd), frozen["weight"], frozen["bias"], residual=frozen["residual"]
    )
    state.check()


def test_repeated_calls_change_only_what_they_say() -> None:
    """Evaluation leaves the running statistics, training all but them, the backward everything."""
    arguments = forward_arguments()
    running = {name: arguments.pop(name) for name in ("running_mean", "running_var")}
    del arguments["out"]
    state, running_state = State(**arguments), State(**running)
    fn.batch_norm_forward(**arguments, **running, training=False)
    running_state.check()
    _, mean, rstd = fn.batch_norm_forward(**arguments, **running)
    with pytest.raises(AssertionError):
        running_state.check()
    saved = State(mean=mean, rstd=rstd)
    fn.batch_norm_backward(arguments["x"], arguments["x"], mean, rstd, arguments["weight"], arguments["bias"])
    state.check()
    saved.check()


# Nothing to do.


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 4), 1), ((0, 4, 3), 1), ((3, 4, 0), 1), ((3, 0, 4), -1), ((3, 4, 0, 2), 1), ((0, 0, 4), -1), ((4, 0), 0)],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ghost", [None, 2])
def test_zero_elements_per_channel(shape: tuple[int, ...], axis: int, training: bool, ghost: int | None) -> None:
    for x in (np.zeros(shape, np.float32), np.zeros(shape[::-1], np.float32).T):
        m, v = np.full(4, 2.0), np.full(4, 3.0)
        w, b = np.ones(4, np.float32), np.ones(4, np.float16)
        options: dict[str, Any] = {"training": training, "axis": axis, "ghost_batch_size": ghost, "residual": x}
        y, mean, rstd = fn.batch_norm_forward(x, w, b, running_mean=m, running_var=v, **options)
        assert y.shape == shape
        assert y.dtype == np.float32
        assert np.all(m == 2)
        assert np.all(v == 3)
        dx, dweight, dbias, dresidual = fn.batch_norm_backward(x, x, mean, rstd, w, b, **options)
        assert dx.shape == dresidual.shape == shape
        assert_same_bits(dweight, np.zeros(4, np.float32))
        assert_same_bits(dbias, np.zeros(4, np.float16))
        out = np.zeros(shape, np.float32)
        assert fn.batch_norm_forward(x, w, b, running_mean=m, running_var=v, out=out, **options)[0] is out


@pytest.mark.parametrize(("shape", "axis"), [((3, 0), 1), ((3, 0, 2), 1), ((3, 2, 0), -1)])
def test_no_channels(shape: tuple[int, ...], axis: int) -> None:
    x = np.zeros(shape, np.float32)
    y, mean, rstd = fn.batch_norm_forward(x, np.ones(0), axis=axis)
    assert y.shape == shape
    assert mean.shape == rstd.shape == (0,)
    dx, dweight, dbias = fn.batch_norm_backward(x, x, mean, rstd, axis=axis)
    assert dx.shape == shape
    assert dweight.shape == dbias.shape == (0,)


# Numbers at the edges.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((8, 19, 7), 1), ((8, 7, 19), -1), ((50, 19), 1), ((9, 1100, 3), 1)])
def test_nan_and_infinity_stay_in_their_statistic(
    shape: tuple[int, ...], axis: int, dtype: str, bad: float, isa: str
) -> None:
    x, dy = normal(shape, dtype), normal(shape, dtype, 1)
    spoilt = x.copy()
    np.moveaxis(spoilt, axis, 0)[3].ravel()[0] = bad  # a view or a copy of it
    place = [0] * len(shape)
    place[axis] = 3
    spoilt[tuple(place)] = bad
    results = []
    channels = shape[axis]
    for array in (x, spoilt):
        m, v = np.zeros(channels), np.ones(channels)
        y, mean, rstd = fn.batch_norm_forward(array, running_mean=m, running_var=v, axis=axis)
        gradients = fn.batch_norm_backward(dy, array, mean, rstd, axis=axis)
        results.append([np.moveaxis(a, axis, 0) if a.ndim > 1 else a for a in (y, mean, rstd, m, v, *gradients)])
    others = np.arange(channels) != 3
    for name, one, other in zip(["y", "mean", "rstd", "rm", "rv", "dx", "dweight", "dbias"], *results, strict=True):
        assert_same_bits(one[others], other[others], name)
    y, mean, _, m, v, dx, dweight, dbias = results[1]
    assert np.all(np.isnan(y[3]) | (y[3] == 0))
    assert np.any(np.isnan(y[3]))
    assert not np.isfinite(mean[3])
    assert not np.isfinite(m[3])
    assert not np.isfinite(v[3])
    assert np.any(np.isnan(dx[3]))
    assert np.isnan(dweight[3])
    assert np.isfinite(dbias[3])


@pytest.mark.parametrize("bad", [{0: np.nan}, {-1: np.inf}, {9000: -np.inf}, {5000: np.inf, 15000: -np.inf}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_one_number_that_is_not_finite_in_many(axis: int, dtype: str, bad: dict[int, float], isa: str) -> None:
    """A statistic of several chunks, the others of which hold finite numbers."""
    x = normal((3, 2, 7000), dtype)
    spoilt = x.copy()
    for place, value in bad.items():
        spoilt[np.unravel_index(np.arange(21000)[place], (3, 7000))[0], 1, place % 7000] = value
    results = []
    for array in (x, spoilt):
        y, mean, rstd = fn.batch_norm_forward(np.moveaxis(array, 1, axis), axis=axis)
        results.append((np.moveaxis(y, axis, 1), mean, rstd))
    (y, mean, rstd), (y2, mean2, rstd2) = results
    assert_same_bits(y[:, 0], np.ascontiguousarray(y2[:, 0]))
    assert (mean2[0], rstd2[0]) == (mean[0], rstd[0])
    assert not np.isfinite(mean2[1])
    assert np.isnan(rstd2[1])
    assert np.all(np.isnan(y2[:, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_of_a_line_that_is_not_finite(dtype: str, isa: str) -> None:
    """An infinite one has rstd 0: its finite numbers become 0, as in PyTorch."""
    x = normal((4, 9001), dtype)
    x[1, 7000], x[2, 0] = np.inf, np.nan
    y, rstd = fn.rms_norm_forward(x, 9001)
    assert rstd[1] == 0
    assert np.isnan(rstd[2])
    assert np.all(np.isfinite(y[[0, 3]]))
    assert np.all(np.delete(y[1], 7000) == 0)
    assert np.isnan(y[1, 7000])
    assert np.all(np.isnan(y[2]))


def test_nan_in_one_ghost_batch_stays_there() -> None:
    x = normal((12, 5, 7))
    spoilt = x.copy()
    spoilt[5, 2, 3] = np.nan
    y, _, _ = fn.batch_norm_forward(x, ghost_batch_size=4)
    y2, mean, rstd = fn.batch_norm_forward(spoilt, ghost_batch_size=4)
    assert_same_bits(np.delete(y, 2, axis=1), np.delete(y2, 2, axis=1))
    assert_same_bits(y[[0, 1, 2, 3, 8, 9, 10, 11], 2], y2[[0, 1, 2, 3, 8, 9, 10, 11], 2])
    assert np.all(np.isnan(y2[4:8, 2]))
    assert np.sum(np.isnan(mean)) == np.sum(np.isnan(rstd)) == 1


def test_nan_passes_through_every_activation() -> None:
    x = normal((6, 5))
    x[2, 3] = np.nan
    for activation in ACTIVATIONS:
        y = fn.batch_norm(x, np.zeros(5), np.ones(5), activation=activation)
        assert np.array_equal(np.isnan(y), np.isnan(x))


LARGEST = {"float32": 3e38, "float64": 1e308, "float16": 6e4, "bfloat16": 3e38}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1.0, 1e-2, "root", "square root overflows"])
@pytest.mark.parametrize(("shape", "axis"), [((8, 5, 67), 1), ((8, 67, 5), -1), ((3, 4, 1100), 1)])
def test_no_overflow(shape: tuple[int, ...], axis: int, dtype: str, part: Any, isa: str) -> None:
    """Numbers whose squares, sums or differences overflow: y is what it is for the same numbers divided by 2^k."""
    kind = numpy_dtype(dtype)
    largest = LARGEST[dtype]
    magnitude = {"root": largest**0.5, "square root overflows": largest**0.5 * 100}.get(part, 0) or largest * part
    rng = np.random.default_rng(0)
    x = (magnitude * rng.uniform(-1, 1, shape)).astype(kind)
    assert np.all(np.isfinite(x.astype(np.float64)))
    dy = rng.standard_normal(shape).astype(kind)
    # Powers of two are exact, in both directions; eps scales with the square, and is below any rounding anyway.
    power = 2.0 ** np.floor(np.log2(magnitude))
    small = x.astype(np.float64) / power
    eps = 1e-5 / power**2 if power < 1e150 else 5e-324
    want, want_mean, want_rstd = reference.batch_norm_forward(small, axis=axis, eps=max(eps, 5e-324))
    y, mean, rstd = fn.batch_norm_forward(x, axis=axis)
    u = 0 if dtype in ("float32", "float64") else cases.UNIT_ROUNDOFF[dtype]
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=u, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(mean / power, want_mean, atol=1e-6)
    np.testing.assert_allclose(rstd * power, want_rstd, rtol=4e-6)
    _, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, axis=axis)
    want_dx, want_dweight, want_dbias = reference.batch_norm_backward(dy, small, want_mean, want_rstd, axis=axis)
    size = np.sum(np.abs(dy.astype(np.float64)))
    np.testing.assert_allclose(dweight, want_dweight, atol=4e-6 * size)
    np.testing.assert_allclose(dbias, want_dbias, atol=1e-6 * size)
    # dx alone is too small to be stored where x is so large; with a weight of that size it is not.
    if power < 1e30:
        weight = np.full(shape[axis], power)
        dx, *_ = fn.batch_norm_backward(dy, x, mean, rstd, weight, axis=axis)
        scale = np.max(want_rstd) * np.max(np.abs(dy.astype(np.float64)))
        np.testing.assert_allclose(dx.astype(np.float64), want_dx, rtol=u, atol=2e-6 * scale + 1e-7)


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 500), 1), ((8, 500, 3), -1)])
@pytest.mark.parametrize("weight", [1.0, -1e-3, 1e-6])
@pytest.mark.parametrize(
    ("mean", "sigma"), [(0, 1e34), (0, 1e36), (0, 1e38), (3e38, 5e34), (-3e38, 1e36), (1e38, 1e37)]
)
def test_accuracy_at_the_end_of_float32(
    mean: float, sigma: float, weight: float, shape: tuple[int, ...], axis: int, isa: str
) -> None:
    """What the notes of batch_norm_forward promise where weight·rstd is subnormal or x − mean might overflow."""
    rng = np.random.default_rng(0)
    x = (mean + sigma * rng.uniform(-1.7, 1.7, shape)).clip(-3.4e38, 3.4e38).astype(np.float32)
    weights = np.full(3, weight, np.float32)
    y, *saved = fn.batch_norm_forward(x, weights, axis=axis)
    want, want_mean, want_rstd = reference.batch_norm_forward(x, weights, axis=axis)
    np.testing.assert_allclose(saved, [want_mean, want_rstd], rtol=1e-6, atol=1e-6 * sigma)
    scale = np.abs(weight * want_rstd).max()
    counted = want_rstd.max() * (np.abs(x.astype(np.float64)).max() + abs(mean))  # |x̂|, were it not for the mean
    np.testing.assert_allclose(
        y, want, rtol=0, atol=2e-6 * np.abs(want).max() + (6e-8 + 7.1e-46 / scale) * abs(weight) * counted
    )
    dy = rng.standard_normal(shape).astype(np.float32)
    _, dweight, dbias = fn.batch_norm_backward(dy, x, *saved, weights, axis=axis)
    _, want_dweight, want_dbias = reference.batch_norm_backward(dy, x, want_mean, want_rstd, axis=axis)
    size = np.abs(dy.astype(np.float64)).sum()
    np.testing.assert_allclose(dweight, want_dweight, rtol=0, atol=(2e-6 + 6e-8 * counted) * size)
    np.testing.assert_allclose(dbias, want_dbias, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 1.0, -3.7, 1e-3, 1e4, 1 / 3, "largest", "smallest"])
def test_constants_have_variance_zero(dtype: str, value: Any, isa: str) -> None:
    kind = numpy_dtype(dtype)
    number = {"largest": LARGEST[dtype], "smallest": 1e-7}.get(value, value)
    counts = [2, 3, 5, 7, 10, 31, 33, 63, 100, 1023, 1025, 3000]
    for n, (rows, columns) in itertools.product(counts, [(True, 3), (False, 3), (False, 40)]):
        x = np.full((1, columns, n) if rows else (n, columns), number, kind)
        eps = 1e-5
        y, mean, rstd = fn.batch_norm_forward(x, eps=eps)
        where = f"n = {n}, {'rows' if rows else 'columns'}"
        # rstd = 1/√(0 + eps), bit for bit.
        assert_same_bits(rstd, np.full(columns, 1 / np.sqrt(eps)), where)
        assert np.all(np.abs(mean - float(x.ravel()[0])) <= abs(float(x.ravel()[0])) * 1e-15), where
        _, variance = fn.moments(x, (0, 2) if rows else 0)
        assert np.all(variance == 0), where
        assert np.all(y == 0), where


@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_is_never_negative(dtype: str, isa: str) -> None:
    kind = numpy_dtype(dtype)
    for n, columns in itertools.product((2, 3, 17, 1000), (1, 5, 40)):
        x = np.full((n, columns), 1000.1, kind)
        x[0] = np.nextafter(kind.type(1000.1), kind.type(2000))
        for array, axes in ((x, 0), (np.ascontiguousarray(x.T), 1)):
            _, variance = fn.moments(array, axes)
            assert np.all(variance > 0)


@pytest.mark.parametrize("eps", [1e-300, 1e-100, 1e-80])
def test_a_tiny_eps_does_not_make_a_constant_nan(eps: float) -> None:
    """x − mean is 0 there, whatever 1/√eps is: y is the bias."""
    x = np.full((6, 3), 0.1, np.float32)
    y, *_ = fn.batch_norm_forward(x, np.ones(3), np.full(3, 2.0), eps=eps)
    assert np.all(y == 2)


# The promised digits, where sums are longest: short runs fill few lanes of a vector, far means round every addition.

LONG = [((2000, 4, hw), 1) for hw in (1, 2, 3, 5, 7, 16, 17, 49)]
LONG += [((8, 4, 9000), 1), ((40_000, 5), 1), ((300, 700), 1)]


@pytest.mark.parametrize(("shape", "axis"), LONG)
def test_the_variance_keeps_its_digits_at_any_distance(shape: tuple[int, ...], axis: int, isa: str) -> None:
    reduced = tuple(a for a in range(len(shape)) if a != axis)
    drawn = 1.3 * np.random.default_rng(0).standard_normal(shape)
    for ratio in (0, 1, 1e2, 1e3, 3e3, 7e3, 1.5e4, 3e4, 4.6e4, 6.5e4, 1e5, 1e6):
        x = (drawn + 1.3 * ratio).astype(np.float32)
        _, variance = fn.moments(x, reduced)
        _, want = reference.moments(x, reduced)
        np.testing.assert_allclose(variance, want, rtol=1e-6, err_msg=f"mean/σ = {ratio:g}")


@pytest.mark.parametrize(("shape", "axis"), LONG)
def test_the_variance_of_lopsided_data(shape: tuple[int, ...], axis: int, isa: str) -> None:
    """Mostly zeros, two values, one sign: roundings that do not average out."""
    rng = np.random.default_rng(0)
    reduced = tuple(a for a in range(len(shape)) if a != axis)
    sparse = np.where(rng.random(shape) < 0.01, 3.3, 0.0)
    for x in (sparse, rng.integers(0, 2, shape) * 0.1, rng.exponential(size=shape), rng.exponential(size=shape) + 100):
        x = x.astype(np.float32)
        _, variance = fn.moments(x, reduced)
        _, want = reference.moments(x, reduced)
        np.testing.assert_allclose(variance, want, rtol=1e-6)


@pytest.mark.parametrize("sigma", [1e-20, 1e-24, 1e-30])
@pytest.mark.parametrize(
    ("shape", "axis"), [*LONG, ((1000, 7), 1), ((1000, 64), 1), ((5000, 3), 1), ((64, 500), 0), ((999, 49), 0)]
)
def test_the_variance_of_tiny_numbers(shape: tuple[int, ...], axis: int, sigma: float, isa: str) -> None:
    """Whose squares are no float32; among them sums of deviations that are 0 by chance. A constant stays one."""
    x = (np.random.default_rng(0).standard_normal(shape) * sigma).astype(np.float32)
    np.moveaxis(x, axis, 0)[1] = sigma
    reduced = tuple(a for a in range(len(shape)) if a != axis)
    _, variance = fn.moments(x, reduced)
    _, want = reference.moments(x, reduced)
    np.testing.assert_allclose(variance, want, rtol=1e-6, atol=0)
    assert variance[1] == 0


@pytest.mark.parametrize(("shape", "axis"), LONG)
def test_parameter_gradients_of_a_mean(shape: tuple[int, ...], axis: int, isa: str) -> None:
    """dy is one number where the loss is a mean: the worst addends, for they all round alike."""
    x = normal(shape)
    _, mean, rstd = fn.batch_norm_forward(x, axis=axis)
    along = [1] * len(shape)
    along[axis] = shape[axis]
    xhat = (x - mean.reshape(along)) * rstd.reshape(along)
    reduced = tuple(a for a in range(len(shape)) if a != axis)
    ones = np.ones(shape[axis])
    for value in (0.1, 1 / 3, 0.7, 1e-3 / 7):
        for dy in (np.full(shape, value, np.float32), np.abs(x) * np.float32(value), xhat.astype(np.float32)):
            _, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, ones, ones, axis=axis)
            wide = dy.astype(np.float64)
            size = np.sum(np.abs(wide * xhat), axis=reduced)
            assert np.all(np.abs(dweight - np.sum(wide * xhat, axis=reduced)) <= 1e-6 * size)
            assert np.all(np.abs(dbias - np.sum(wide, axis=reduced)) <= 1e-6 * np.sum(np.abs(wide), axis=reduced))


# Ghost batches.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 4, 6, 12, 13, 50])
@pytest.mark.parametrize(("shape", "axis"), [((13, 5, 7), 1), ((13, 7, 5), -1), ((12, 5, 7), 1), ((12, 66), 1)])
def test_ghost_batches_are_calls_on_slices(shape: tuple[int, ...], axis: int, size: int, dtype: str) -> None:
    if size == 1 and len(shape) == 2:
        pytest.skip("one value per channel")
    kind = numpy_dtype(dtype)
    x, dy, residual = (normal(shape, dtype, seed) for seed in range(3))
    c = shape[axis]
    w, b = normal((c,), seed=3), normal((c,), seed=4)
    m, v = np.zeros(c), np.ones(c)
    options: dict[str, Any] = {"axis": axis, "activation": "relu"}
    y, mean, rstd = fn.batch_norm_forward(
        x, w, b, running_mean=m, running_var=v, residual=residual, ghost_batch_size=size, **options
    )
    gradients = fn.batch_norm_backward(dy, x, mean, rstd, w, b, residual=residual, ghost_batch_size=size, **options)
    assert mean.shape == rstd.shape == (-(-shape[0] // size), c)
    m2, v2 = np.zeros(c), np.ones(c)
    dweight, dbias = np.zeros(c), np.zeros(c)
    magnitude = np.zeros(c)
    for i, start in enumerate(range(0, shape[0], size)):
        part = slice(start, start + size)
        y_part, mean_part, rstd_part = fn.batch_norm_forward(
            x[part], w, b, running_mean=m2, running_var=v2, residual=residual[part], **options
        )
        assert_same_bits(y[part], y_part)
        assert_same_bits(mean[i], mean_part)
        assert_same_bits(rstd[i], rstd_part)
        dx_part, dweight_part, dbias_part, dresidual_part = fn.batch_norm_backward(
            dy[part], x[part], mean_part, rstd_part, w, b, residual=residual[part], **options
        )
        assert_same_bits(gradients[0][part], dx_part)
        assert_same_bits(gradients[3][part], dresidual_part)
        dweight += dweight_part
        dbias += dbias_part
        magnitude += np.abs(dweight_part) + np.abs(dbias_part)
    assert_same_bits(m, m2)
    assert_same_bits(v, v2)
    # The parts were rounded to float32 before they were added here.
    assert np.all(np.abs(gradients[1] - dweight) <= 2.0**-22 * magnitude)
    assert np.all(np.abs(gradients[2] - dbias) <= 2.0**-22 * magnitude)
    assert y.dtype == kind


@pytest.mark.parametrize("param_dtype", DTYPES)
def test_running_statistics_of_ghost_batches_are_those_of_slices(param_dtype: str) -> None:
    """Rounded to their dtype after every slice, as calls in turn round them."""
    kind = numpy_dtype(param_dtype)
    x = normal((26, 65, 3))
    running = [np.zeros(65, kind), np.ones(65, kind)]
    fn.batch_norm_forward(x, running_mean=running[0], running_var=running[1], ghost_batch_size=4)
    in_turn = [np.zeros(65, kind), np.ones(65, kind)]
    for start in range(0, 26, 4):
        fn.batch_norm(x[start : start + 4], *in_turn, training=True)
    for one, other in zip(running, in_turn, strict=True):
        assert_same_bits(one, other)


def test_ghost_batches_in_other_memory_orders() -> None:
    case = Case("ghosts", (13, 5, 7), ghost_batch_size=4, residual=True, activation="relu")
    for lay_x, lay_dy in itertools.product(LAYOUTS, ("C", "channels_last", "stepped")):
        check(case, LAYOUTS[lay_x], LAYOUTS[lay_dy], LAYOUTS[lay_dy])


def test_ghost_batches_with_the_channels_in_front() -> None:
    """N is the first axis that is not C."""
    x = normal((5, 12, 7))
    y, mean, rstd = fn.batch_norm_forward(x, axis=0, ghost_batch_size=4)
    moved = np.ascontiguousarray(x.swapaxes(0, 1))
    want, want_mean, want_rstd = reference.batch_norm_forward(moved, axis=1, ghost_batch_size=4)
    np.testing.assert_allclose(y.swapaxes(0, 1), want, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(mean, want_mean, atol=1e-6)
    np.testing.assert_allclose(rstd, want_rstd, rtol=1e-6)


def test_ghost_batches_in_evaluation() -> None:
    x, m, v = normal((13, 5, 7)), normal((5,), seed=1), np.abs(normal((5,), seed=2))
    options: dict[str, Any] = {"training": False, "ghost_batch_size": 4}
    y, mean, rstd = fn.batch_norm_forward(x, running_mean=m, running_var=v, **options)
    assert_same_bits(y, fn.batch_norm(x, m, v))
    dx, dweight, _ = fn.batch_norm_backward(x, x, mean, rstd, **options)
    want, want_dweight, _ = fn.batch_norm_backward(x, x, m, (v.astype(float) + 1e-5) ** -0.5, training=False)
    np.testing.assert_allclose(dx, want, rtol=1e-6)
    np.testing.assert_allclose(dweight, want_dweight, rtol=1e-5, atol=1e-5)


# moments and TensorFlow's batch_normalization.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(layout: str, dtype: str) -> None:
    shape = (3, 4, 5, 4)
    x = LAYOUTS[layout](normal(shape, dtype) + numpy_dtype(dtype).type(2))
    for n in range(5):
        for axes in itertools.combinations(range(4), n):
            mean, variance = fn.moments(x, axes)
            want_mean, want_variance = reference.moments(np.asarray(x, np.float64), axes)
            assert mean.dtype == variance.dtype == np.float64
            assert mean.shape == want_mean.shape
            np.testing.assert_allclose(mean, want_mean, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(variance, want_variance, rtol=4e-6, atol=0)


def test_moments_options() -> None:
    x = normal((6, 5, 4), "float64")
    for axes in (0, 1, -1, (0, 2), [0, 1], (-1, 0), np.int64(1)):
        tupled = tuple(axes) if isinstance(axes, list) else axes
        mean, variance = fn.moments(x, axes, correction=1, keepdims=True)  # type: ignore[arg-type]
        np.testing.assert_allclose(mean, x.mean(axis=tupled, keepdims=True), atol=1e-15)
        np.testing.assert_allclose(variance, x.var(axis=tupled, ddof=1, keepdims=True), rtol=1e-14)
        assert mean.shape == variance.shape == x.mean(axis=tupled, keepdims=True).shape
    _, variance = fn.moments(x, 0, correction=6)
    assert np.all(np.isnan(variance))
    with pytest.raises(np.exceptions.AxisError):
        fn.moments(x, 3)
    with pytest.raises(ValueError, match="duplicate"):
        fn.moments(x, (0, -3))
    for kind in KINDS.values():
        with pytest.raises(TypeError, match=r"CuPy array|of a GPU|float32"):
            fn.moments(kind, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "axes"), [((0, 4), 0), ((4, 0), 0), ((4, 0), 1), ((2, 0, 3), (0, 2)), ((2, 3, 0), (0, 1))]
)
def test_moments_of_nothing(shape: tuple[int, ...], axes: Any) -> None:
    x = np.zeros(shape, np.float32)
    mean, variance = fn.moments(x, axes)
    want_mean, want_variance = reference.moments(x, axes)
    assert mean.shape == variance.shape == want_mean.shape
    np.testing.assert_array_equal(mean, want_mean)
    np.testing.assert_array_equal(variance, want_variance)


def test_moments_of_a_scalar() -> None:
    mean, variance = fn.moments(np.array(3.5), ())
    assert mean == 3.5
    assert variance == 0


def tensorflow(x: Any, mean: Any, variance: Any, offset: Any, scale: Any, eps: float) -> Array:
    """The formula of tf.nn.batch_normalization, in float64."""
    x, mean, variance = (np.asarray(a, np.float64) for a in (x, mean, variance))
    y = (x - mean) / np.sqrt(variance + eps)
    y = y if scale is None else y * np.asarray(scale, np.float64)
    return y if offset is None else y + np.asarray(offset, np.float64)


PARAMETER_SHAPES = [(4,), (1, 4), (4, 1, 1), (1, 4, 1), (4, 4, 1), (4, 1, 4), (4, 4, 4), (4, 4), (1,), (), (1, 1, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PARAMETER_SHAPES)
def test_batch_normalization_broadcasts(layout: str, shape: tuple[int, ...]) -> None:
    """Cubes: where every axis is as long as every other, only the order of the axes tells them apart."""
    x = LAYOUTS[layout](normal((4, 4, 4)))
    mean, offset, scale = (normal(shape, seed=seed) for seed in (1, 2, 3))
    variance = np.asarray(np.abs(normal(shape, seed=4)) + np.float32(0.1))
    y = fn.batch_normalization(x, mean, variance, offset, scale, 1e-3)
    want = tensorflow(x, mean, variance, offset, scale, 1e-3)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    # 2e-6 of the largest term.
    size = np.abs(want - offset).max() + np.abs(offset).max()
    np.testing.assert_allclose(y, want, atol=2e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_normalization_dtypes_and_absent_parameters(dtype: str) -> None:
    x = normal((3, 4, 5), dtype)
    mean, variance = normal((5,), "float64"), np.abs(normal((5,), "float16")) + np.float16(0.1)
    for offset, scale in itertools.product((None, normal((5,))), (None, normal((4, 1), dtype))):
        y = fn.batch_normalization(x, mean, variance, offset, scale, 1e-3)
        want = tensorflow(x, mean, variance, offset, scale, 1e-3)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        u = 0 if dtype in ("float32", "float64") else cases.UNIT_ROUNDOFF[dtype]
        np.testing.assert_allclose(y.astype(np.float64), want, rtol=u, atol=4e-6 * np.abs(want).max())


def test_batch_normalization_of_mixed_shapes() -> None:
    x = normal((3, 4, 5))
    y = fn.batch_normalization(
        x, normal((4, 1)), np.abs(normal((5,))) + np.float32(0.1), normal((3, 1, 1)), normal((1, 4, 5)), 1e-3
    )
    want = tensorflow(
        x, normal((4, 1)), np.abs(normal((5,))) + np.float32(0.1), normal((3, 1, 1)), normal((1, 4, 5)), 1e-3
    )
    np.testing.assert_allclose(y, want, atol=4e-6 * np.abs(want).max())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_batch_normalization_of_nothing(shape: tuple[int, ...]) -> None:
    c = shape[-1]
    y = fn.batch_normalization(np.zeros(shape, np.float32), np.zeros(c), np.ones(c), None, None, 1e-3)
    assert y.shape == shape
    assert y.dtype == np.float32


def test_batch_normalization_errors() -> None:
    x, ones = normal((3, 4, 5)), np.ones(5)
    for wrong in (np.ones(4), np.ones((2, 1, 5)), np.ones((1, 3, 4, 5))):
        for place in range(4):
            arguments = [ones, ones, ones, ones]
            arguments[place] = wrong
            with pytest.raises(ValueError, match="broadcast"):
                fn.batch_normalization(x, *arguments, 1e-3)
    for name, wrong in {**VECTORS, "none": None}.items():
        for place in range(4):
            if name == "none" and place > 1:
                continue
            arguments = [np.ones(4), np.ones(4), np.ones(4), np.ones(4)]
            arguments[place] = wrong  # type: ignore[call-overload]
            with pytest.raises(TypeError, match=r"CuPy array|of a GPU|float32"):
                fn.batch_normalization(np.ones((3, 4)), *arguments, 1e-3)
    for wrong in KINDS.values():
        with pytest.raises(TypeError, match=r"CuPy array|of a GPU|float32"):
            fn.batch_normalization(wrong, np.ones(3), np.ones(3), None, None, 1e-3)  # type: ignore[arg-type]


# PyTorch, where it is installed.


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (4, 5, 6, 7), (3, 5, 2, 3, 4)])
def test_like_pytorch(torch: Any, shape: tuple[int, ...], last: bool, training: bool, dtype: str) -> None:
    x, dy = normal(shape, dtype), normal(shape, dtype, 1)
    x, dy = (channels_last(a) if last else a for a in (x, dy))
    w, b, m = (normal((5,), dtype, seed) for seed in (2, 3, 4))
    v = np.abs(normal((5,), dtype, 5)) + x.dtype.type(0.1)
    theirs = {"x": torch.from_numpy(x.copy("K")), "w": torch.from_numpy(w.copy()), "b": torch.from_numpy(b.copy())}
    for tensor in theirs.values():
        tensor.requires_grad_()
    their_m, their_v = torch.from_numpy(m.copy()), torch.from_numpy(v.copy())
    their_y = torch.nn.functional.batch_norm(
        theirs["x"], their_m, their_v, theirs["w"], theirs["b"], training, 0.3, 1e-3
    )
    their_y.backward(torch.from_numpy(dy))

    y, mean, rstd = fn.batch_norm_forward(
        x, w, b, running_mean=m, running_var=v, training=training, momentum=0.3, eps=1e-3
    )
    dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, w, b, training=training)
    # Both sides within 33 u (cases.py) of these small sums.
    tolerance = {"rtol": 0, "atol": (4e-6 if dtype == "float32" else 1e-14) * 10}
    np.testing.assert_allclose(y, their_y.detach().numpy(), **tolerance)
    np.testing.assert_allclose(dx, theirs["x"].grad.numpy(), **tolerance)
    np.testing.assert_allclose(dweight, theirs["w"].grad.numpy(), **tolerance)
    np.testing.assert_allclose(dbias, theirs["b"].grad.numpy(), **tolerance)
    np.testing.assert_allclose(m, their_m.numpy(), **tolerance)
    np.testing.assert_allclose(v, their_v.numpy(), **tolerance)
    assert y.strides == x.strides


def test_pytorch_refuses_what_we_refuse_in_the_same_words(torch: Any) -> None:
    functional = torch.nn.functional.batch_norm
    for shape, sizes in [((1, 4), {}), ((2, 4), {"m": 3}), ((2, 4), {"v": 3}), ((2, 4), {"w": 3}), ((2, 4), {"b": 3})]:
        arrays = {name: np.ones(sizes.get(name, 4), np.float32) for name in "mvwb"}
        x = np.ones(shape, np.float32)
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            functional(torch.from_numpy(x), *(torch.from_numpy(a) for a in arrays.values()), True)
        with pytest.raises(ValueError, match=r"should contain|Expected more") as ours:
            fn.batch_norm(x, *arrays.values(), True)
        words = str(theirs.value).replace("torch.Size([1, 4])", "(1, 4)")
        assert words == str(ours.value)


def test_tensors_of_pytorch_beside_numpy_are_a_type_error(torch: Any) -> None:
    with pytest.raises(TypeError, match="weight must be a NumPy or CuPy array"):
        fn.batch_norm_forward(normal((3, 4)), torch.ones(4))


def test_layout_names_are_what_they_say() -> None:
    """A control of the helpers: dense ones are dense, the others are not plain."""
    x = normal((4, 5, 3, 6))
    assert all(is_dense(lay(x)) for lay in DENSE.values())
    assert memory_order(channels_last(x)) == [0, 2, 3, 1]
    for name, lay in STRIDED.items():
        laid = lay(x)
        assert np.array_equal(laid, x)
        assert (not laid.flags.aligned) if name == "misaligned" else not is_dense(laid)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 5, 67), 1), ((4, 67, 5), -1)])
def test_half_types_round_to_nearest_even(shape: tuple[int, ...], axis: int, dtype: str, isa: str) -> None:
    """y = x + bias, exact in float32, lies half way between two numbers of the half type in most elements."""
    kind = numpy_dtype(dtype)
    step = float(np.float32(1) / {"float16": 1024, "bfloat16": 128}[dtype])  # between neighbours in [1, 2)
    x = np.random.default_rng(0).choice(1 + step * np.arange(60), shape).astype(kind)
    bias = np.array([0, step / 2, -step / 2, step * 3 / 2, step / 4])
    y = fn.batch_norm(x, np.zeros(5), np.ones(5), bias=bias, eps=0, axis=axis)
    along = [1] * len(shape)
    along[axis] = 5
    assert_same_bits(y, (x.astype(np.float32) + bias.astype(np.float32).reshape(along)).astype(kind))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 2.0**12, 1.001])
def test_every_number_of_a_half_type(dtype: str, scale: float, isa: str) -> None:
    """Subnormals, infinities and NaN, too: y = x·scale is rounded once, in float16 to subnormals and to infinity."""
    x = np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(1, 1, -1)
    y = fn.batch_norm(x, np.zeros(1), np.ones(1), np.full(1, scale), eps=0)
    with np.errstate(all="ignore"):
        want = (x.astype(np.float32) * np.float32(scale) + np.float32(0)).astype(x.dtype)
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(y), nan)
    assert_same_bits(y[~nan], want[~nan])
