"""Any shape, dtype, layout and option against the reference; and what the notes on batch normalization promise."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import reference
from fusednorm.testing import cases
from fusednorm.testing.cases import Case, Outputs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, Array, assert_same_bits, normal

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

# The same examples on every run: a failure here is to be found again.
settings.register_profile(
    "fusednorm",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
settings.load_profile("fusednorm")

ACTIVATIONS = [None, "relu", "leaky_relu", ("leaky_relu", 0.3), "silu", "sigmoid", "tanh"]
layouts = st.sampled_from(sorted(LAYOUTS))
# Small dimensions, and those around vectors and chunks; products stay below 40,000.
dimensions = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 513, 1023, 1025]))


@st.composite
def shapes(draw: Any) -> tuple[tuple[int, ...], int]:
    shape = tuple(draw(st.lists(dimensions, min_size=2, max_size=5)))
    assume(np.prod(shape) <= 40_000)
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@st.composite
def drawn_cases(draw: Any) -> Case:
    shape, axis = draw(shapes())
    training = draw(st.booleans())
    ghost = draw(st.one_of(st.none(), st.integers(1, shape[0] + 1))) if training and axis % len(shape) != 0 else None
    per_sample = int(np.prod(shape)) // shape[axis] // shape[0] if axis % len(shape) != 0 else 0
    smallest = (shape[0] % ghost or ghost if ghost <= shape[0] else shape[0]) if ghost else 0
    count = smallest * per_sample if ghost else int(np.prod(shape)) // shape[axis]
    assume(not training or count > 1)
    dtype = draw(st.sampled_from(DTYPES))
    param_dtype = draw(st.sampled_from(DTYPES))
    far = {"float32": [0.0, 1e2, 3e4, 1e6], "float64": [0.0, 1e2, 1e6]}.get(dtype, [0.0, 3.0])
    return Case(
        "drawn",
        shape,
        axis=axis,
        dtype=dtype,
        param_dtype=param_dtype,
        affine=draw(st.booleans()),
        training=training,
        running=not training or draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        ghost_batch_size=ghost,
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        momentum=draw(st.sampled_from([0.1, 0.5])),
        # float16 holds no running mean above 65,504.
        offset=draw(st.sampled_from([offset for offset in far if param_dtype != "float16" or offset < 1e4])),
    )


@given(case=drawn_cases(), lay_x=layouts, lay_dy=layouts, lay_residual=layouts, lay_out=st.one_of(st.none(), layouts))
def test_anything_against_the_reference(
    case: Case, lay_x: str, lay_dy: str, lay_residual: str, lay_out: str | None
) -> None:
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    x, dy = LAYOUTS[lay_x](inputs.x), LAYOUTS[lay_dy](inputs.dy)
    residual = None if inputs.residual is None else LAYOUTS[lay_residual](inputs.residual)
    running = [None if a is None else a.copy() for a in (inputs.running_mean, inputs.running_var)]
    out = None if lay_out is None else LAYOUTS[lay_out](np.zeros_like(inputs.x))
    options: dict[str, Any] = {
        "training": case.training,
        "axis": case.axis,
        "residual": residual,
        "activation": case.activation,
        "ghost_batch_size": case.ghost_batch_size,
    }
    y, mean, rstd = fn.batch_norm_forward(
        x, inputs.weight, inputs.bias, running_mean=running[0], running_var=running[1],
        momentum=case.momentum, eps=case.eps, out=out, **options,
    )  # fmt: skip
    assert out is None or y is out
    y = y.copy()
    dx, dweight, dbias, *rest = fn.batch_norm_backward(
        dy, x, mean, rstd, inputs.weight, inputs.bias, out=out, **options
    )
    got = Outputs(y, mean, rstd, dx, dweight, dbias, rest[0] if rest else None, *running)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got) if not deviation.ok]
    assert not wrong
    assert np.array_equal(x, inputs.x)
    assert np.array_equal(dy, inputs.dy)


@st.composite
def drawn_members(draw: Any) -> Case:
    """The norms but batch norm."""
    norm = draw(st.sampled_from(cases.NORMS[1:]))
    shape, axis = draw(shapes())
    samples, channels = shape[1 if axis % len(shape) == 0 else 0], shape[axis]
    positions = int(np.prod(shape)) // samples // channels
    training = norm not in ("instance", "switchable") or draw(st.booleans())
    assume(not training or norm != "instance" or positions > 1)
    assume(not training or norm != "switchable" or samples * positions > 1)
    dtype, param_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    far = {"float32": [0.0, 1e2, 3e4], "float64": [0.0, 1e2, 1e6]}.get(dtype, [0.0, 3.0])
    return Case(
        "drawn",
        shape,
        norm=norm,
        axis=axis,
        normalized=draw(st.integers(1, len(shape) - 1)) if norm in ("layer", "rms") else 1,
        groups=draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])),
        dtype=dtype,
        param_dtype=param_dtype,
        affine=norm == "weight" or draw(st.booleans()),
        training=training,
        running=norm in ("instance", "switchable") and (not training or draw(st.booleans())),
        mask=norm in ("instance", "group") and draw(st.booleans()),
        eps=0.0 if norm == "weight" else draw(st.sampled_from([1e-5, 1e-3])),
        offset=draw(st.sampled_from([offset for offset in far if param_dtype != "float16" or offset < 1e2])),
    )


@given(case=drawn_members(), lay_x=layouts, lay_dy=layouts, lay_out=st.one_of(st.none(), layouts))
def test_any_norm_against_the_reference(case: Case, lay_x: str, lay_dy: str, lay_out: str | None) -> None:
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    x, dy = LAYOUTS[lay_x](inputs.x), LAYOUTS[lay_dy](inputs.dy)
    running = {name: getattr(inputs, name) for name in ("running_mean", "running_var")}
    running = {name: None if a is None else a.copy() for name, a in running.items()}
    laid_out = SimpleNamespace()
    for name in (f"{case.norm}_norm_forward", f"{case.norm}_norm_backward"):
        out = {} if lay_out is None else {"out": LAYOUTS[lay_out](np.zeros_like(inputs.x))}
        setattr(laid_out, name, partial(getattr(fn, name), **out))
    given = {id(inputs.x): x, id(inputs.dy): dy, **{id(getattr(inputs, name)): a for name, a in running.items()}}
    got = cases.run(case, inputs, laid_out, to_device=lambda a: given.get(id(a), a), to_host=np.array)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got) if not deviation.ok]
    assert not wrong
    assert np.array_equal(x, inputs.x)
    assert np.array_equal(dy, inputs.dy)


@given(drawn=shapes(), layout=layouts, dtype=st.sampled_from(DTYPES), data=st.data())
def test_moments_of_anything(drawn: tuple[tuple[int, ...], int], layout: str, dtype: str, data: Any) -> None:
    shape, _ = drawn
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    x = LAYOUTS[layout](normal(shape, dtype))
    mean, variance = fn.moments(x, axes, keepdims=True)
    want_mean, want_variance = reference.moments(x, axes, keepdims=True)
    assert mean.shape == want_mean.shape
    # 1e-6 of σ and of itself, 4e-6 for half types (cases.py); a lone element has σ = 0 and is exact.
    np.testing.assert_array_less(
        np.abs(mean - want_mean), 1e-6 * np.sqrt(want_variance) + 1e-15 * np.abs(want_mean) + 1e-300
    )
    np.testing.assert_allclose(variance, want_variance, rtol=4e-6)


@given(drawn=shapes(), layout=layouts, dtype=st.sampled_from(DTYPES), data=st.data())
def test_batch_normalization_of_anything(
    drawn: tuple[tuple[int, ...], int], layout: str, dtype: str, data: Any
) -> None:
    shape, _ = drawn
    x = LAYOUTS[layout](normal(shape, dtype))
    parameters = []
    for seed in range(4):
        first = data.draw(st.integers(0, len(shape)))
        own = tuple(n if data.draw(st.booleans()) else 1 for n in shape[first:])
        parameters.append(np.asarray(normal(own, "float64", seed)))
    mean, variance, offset, scale = parameters
    variance = np.asarray(np.abs(variance))
    y = fn.batch_normalization(x, mean, variance, offset, scale, 0.1)
    terms = (x.astype(np.float64) - mean) / np.sqrt(variance + 0.1) * scale
    u = 0 if dtype in ("float32", "float64") else cases.UNIT_ROUNDOFF[dtype]
    assert y.dtype == x.dtype
    np.testing.assert_allclose(
        y.astype(np.float64), terms + offset, rtol=u, atol=2e-6 * (np.abs(terms).max() + np.abs(offset).max()) + 1e-7
    )


values = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    value=values, n=st.integers(2, 400), columns=st.integers(1, 40), rows=st.booleans(), dtype=st.sampled_from(DTYPES)
)
def test_any_constant_has_variance_zero(value: float, n: int, columns: int, rows: bool, dtype: str) -> None:
    kind = cases.numpy_dtype(dtype)
    assume(abs(value) <= float(np.float64(6e4 if dtype == "float16" else 3e38)))
    x = np.full((1, columns, n) if rows else (n, columns), value).astype(kind)
    y, mean, rstd = fn.batch_norm_forward(x)
    assert_same_bits(rstd, np.full(columns, 1 / np.sqrt(1e-5)))
    assert np.all(y == 0)
    assert np.all(mean == float(x.flat[0]))


@given(
    data=st.data(),
    n=st.integers(2, 70),
    columns=st.integers(1, 20),
    rows=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_any_finite_numbers(data: Any, n: int, columns: int, rows: bool, dtype: str) -> None:
    """Bit patterns at random: from the smallest subnormal to the largest number, side by side."""
    kind = cases.numpy_dtype(dtype)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    raw = rng.integers(0, 256, n * columns * kind.itemsize, np.uint8).view(kind)
    with np.errstate(invalid="ignore"):  # signaling NaN among them
        finite = np.isfinite(raw.astype(np.float64))
    x = np.where(finite, raw, kind.type(1)).reshape((columns, n) if rows else (n, columns))
    axis = 0 if rows else 1
    # Some channels small, some large.
    scale = np.exp2(rng.integers(-40, 1, columns)).astype(kind)
    x = (x.T * scale).T if rows else x * scale
    x = x.astype(kind)
    y, mean, rstd = fn.batch_norm_forward(x, axis=axis)
    want, want_mean, want_rstd = reference.batch_norm_forward(x, axis=axis)
    np.testing.assert_allclose(rstd, want_rstd, rtol=2e-6)
    sigma = 1 / want_rstd
    assert np.all(np.abs(mean - want_mean) <= 1e-6 * sigma)
    u = 0 if dtype == "float32" else cases.UNIT_ROUNDOFF[dtype]
    largest = np.abs(want).max(axis=1 - axis, keepdims=True)
    assert np.all(np.abs(y.astype(np.float64) - want) <= 2e-6 * largest + u * np.abs(want) + 1e-7)


# What the notes say.


@st.composite
def images(draw: Any) -> tuple[Array, Array, int]:
    """x and dy of a few channels, float64, and the axis; at least 8 elements a channel."""
    shape = [draw(st.integers(2, 6)), draw(st.integers(1, 5)), draw(st.integers(4, 40))]
    axis = draw(st.sampled_from([1, 2]))
    if axis == 2:
        shape[1], shape[2] = shape[2], shape[1]
    seed = draw(st.integers(0, 1000))
    return normal(tuple(shape), "float64", seed), normal(tuple(shape), "float64", seed + 1), axis


def along(a: Array, axis: int) -> Array:
    return a[:, None] if axis == 1 else a


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(drawn=images())
def test_identity_where_weight_is_sigma_and_bias_the_mean(dtype: str, drawn: tuple[Array, Array, int]) -> None:
    x, _, axis = drawn
    x = (3 + x).astype(dtype)
    reduced = tuple(a for a in range(3) if a != axis)
    mean, variance = fn.moments(x, reduced)
    y, *_ = fn.batch_norm_forward(x, np.sqrt(variance + 1e-5), mean, axis=axis)
    # y's bound: 2e-6 (float64: a few roundings) of |weight·x̂| + |bias| <= 2·max|x|.
    np.testing.assert_allclose(y, x, rtol=0, atol=(4e-6 if dtype == "float32" else 1e-14) * np.abs(x).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(drawn=images(), constant=st.integers(-1000, 1000))
def test_a_constant_added_changes_nothing(dtype: str, drawn: tuple[Array, Array, int], constant: int) -> None:
    x, dy, axis = drawn
    # Multiples of 2^-10 below 8, so that adding the constant is exact in float32, too.
    x = np.clip(np.round(x * 1024) / 1024, -8, 8).astype(dtype)
    dy = dy.astype(dtype)
    shift = along(constant * np.arange(1, x.shape[axis] + 1) % 1000, axis).astype(dtype)
    moved = x + shift
    assert np.array_equal(moved - shift, x)
    y, mean, rstd = fn.batch_norm_forward(x, axis=axis)
    y2, mean2, rstd2 = fn.batch_norm_forward(moved, axis=axis)
    bound = 4e-6 if dtype == "float32" else 1e-11  # float64: u·1000/σ in x̂
    np.testing.assert_allclose(y2, y, rtol=0, atol=bound * np.abs(y).max())
    np.testing.assert_allclose(rstd2, rstd, rtol=bound)
    dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, axis=axis)
    dx2, dweight2, dbias2 = fn.batch_norm_backward(dy, moved, mean2, rstd2, axis=axis)
    np.testing.assert_allclose(dx2, dx, rtol=0, atol=bound * np.max(rstd) * np.abs(dy).max())
    np.testing.assert_allclose(dweight2, dweight, rtol=0, atol=bound * np.sum(np.abs(dy)) * np.abs(y).max())
    np.testing.assert_allclose(dbias2, dbias, rtol=0, atol=bound * np.sum(np.abs(dy)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(drawn=images(), factor=st.floats(1e-3, 1e3))
def test_scaling_leaves_y_and_divides_dx(dtype: str, drawn: tuple[Array, Array, int], factor: float) -> None:
    x, dy, axis = drawn
    x, dy = x.astype(dtype), dy.astype(dtype)
    scaled = x * x.dtype.type(factor)
    # eps·factor² in the second call: σ² + eps scales as a whole.
    y, mean, rstd = fn.batch_norm_forward(x, axis=axis)
    y2, mean2, rstd2 = fn.batch_norm_forward(scaled, axis=axis, eps=1e-5 * factor**2)
    # The product rounds each element by u, and y's bound holds on both sides.
    bound = 5e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(y2, y, rtol=0, atol=bound * np.abs(y).max())
    dx, dweight, _ = fn.batch_norm_backward(dy, x, mean, rstd, axis=axis)
    dx2, dweight2, _ = fn.batch_norm_backward(dy, scaled, mean2, rstd2, axis=axis)
    np.testing.assert_allclose(dx2 * factor, dx, rtol=0, atol=bound * np.max(rstd) * np.abs(dy).max() * 2)
    np.testing.assert_allclose(dweight2, dweight, rtol=0, atol=bound * np.sum(np.abs(dy)) * np.abs(y).max())


@given(drawn=images())
def test_outputs_are_standardized_and_dx_is_orthogonal(drawn: tuple[Array, Array, int]) -> None:
    """Σy = 0, Σy² = n; and dx has neither a component along 1 nor, but for eps, along x̂."""
    x, dy, axis = drawn
    reduced = tuple(a for a in range(3) if a != axis)
    n = x.size // x.shape[axis]
    y, mean, rstd = fn.batch_norm_forward(x, axis=axis, eps=1e-30)
    np.testing.assert_allclose(y.sum(axis=reduced), 0, atol=1e-13 * n)
    np.testing.assert_allclose((y**2).sum(axis=reduced), n, rtol=1e-12)
    dx, *_ = fn.batch_norm_backward(dy, x, mean, rstd, axis=axis)
    size = np.max(rstd) * np.abs(dy).max() * n
    np.testing.assert_allclose(dx.sum(axis=reduced), 0, atol=1e-13 * size)
    np.testing.assert_allclose((dx * y).sum(axis=reduced), 0, atol=1e-12 * size)


@given(drawn=images(), seed=st.integers(0, 100))
def test_samples_may_come_in_any_order(drawn: tuple[Array, Array, int], seed: int) -> None:
    x, _, axis = drawn
    order = np.random.default_rng(seed).permutation(len(x))
    y, mean, _ = fn.batch_norm_forward(x, axis=axis)
    y2, mean2, _ = fn.batch_norm_forward(x[order], axis=axis)
    np.testing.assert_allclose(y2, y[order], atol=1e-13 * np.abs(y).max())
    np.testing.assert_allclose(mean2, mean, atol=1e-14)
