"""The verbs, called as the norms call them, against sums written out in NumPy; Fold by enumeration; Moments."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import _C, fold, reference
from fusednorm.testing import cases
from support import DTYPES, Array, assert_same_bits, byte_swapped, misaligned, normal, numpy_dtype

# Fold(batch, outer, groups, inner, span) of batch norm in both layouts, of ghost batches and of statistics over several
# channels.
FOLDS = {
    "rows": (1, 6, 5, 49, 49),
    "rows, long": (1, 2, 3, 2051, 2051),
    "rows, short runs": (1, 40, 7, 3, 3),
    "columns": (1, 77, 19, 1, 1),
    "columns, wide": (1, 9, 1100, 1, 1),
    "columns, one": (1, 3000, 1, 1, 1),
    "ghost rows": (3, 4, 5, 31, 31),
    "ghost columns": (3, 50, 6, 1, 1),
    "instance rows": (4, 1, 6, 65, 65),
    "instance columns": (5, 49, 37, 1, 1),
    "group rows": (3, 1, 4, 6 * 49, 49),
    "group rows, long": (2, 1, 2, 3 * 2051, 2051),
    "group rows, one": (1, 1, 1, 70 * 33, 33),
    "group rows, outer": (2, 5, 3, 4 * 7, 7),
    "group columns": (3, 65, 4, 5, 1),
    "group columns, wide": (2, 9, 2, 550, 1),
    "group columns, one": (2, 130, 1, 6, 1),
    "lines": (9, 1, 1, 37, 1),
    "group lines": (7, 1, 3, 21, 1),
    "panels of group lines": (37, 1, 2, 4219, 1),
}
# Large enough for several threads and for runs that are written together with their neighbours.
LARGE = {
    "group rows": (8, 1, 16, 8 * 196, 196),
    "group rows, one": (16, 1, 1, 300 * 81, 81),
    "group rows, split": (1, 1, 2, 50 * 3000, 3000),
    "group columns": (8, 784, 8, 12, 1),
    "instance columns": (8, 1568, 24, 1, 1),
    "columns, wide panels": (1, 1100, 1100, 1, 1),
}
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "sigmoid": 4, "tanh": 5}


@pytest.fixture(params=FOLDS.values(), ids=FOLDS.keys())
def shape(request: pytest.FixtureRequest) -> Any:
    return request.param


def apart(a: Array, shape: tuple[int, ...]) -> Array:
    """(batch, outer, groups, inner), float64."""
    return a.astype(np.float64).reshape(shape[:4])


def per_statistic(a: Array, shape: tuple[int, ...]) -> Array:
    return a.reshape(shape[0], 1, shape[2], 1)


def per_channel(a: Array | None, shape: tuple[int, ...], absent: float) -> Any:
    return absent if a is None else np.repeat(a.astype(np.float64), shape[4]).reshape(1, 1, shape[2], shape[3])


def sums(a: Array) -> Array:
    """Per statistic."""
    return a.sum(axis=(1, 3)).ravel()


def channel_sums(a: Array, shape: tuple[int, ...]) -> Array:
    return a.sum(axis=(0, 1)).reshape(-1, shape[4]).sum(axis=1)


class Drawn:
    """x with a mean of 3, so that it matters; statistics close to its own but not equal."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.fold = _C.Fold(*shape)
        rng = np.random.default_rng(3)
        kind = numpy_dtype(dtype)
        self.x, self.dy, self.residual = (
            (offset + rng.standard_normal(self.fold.size)).astype(kind) for offset in (3, 0, 0)
        )
        self.mean = 3 + 0.1 * rng.standard_normal(self.fold.statistics)
        self.rstd = rng.uniform(0.5, 2, self.fold.statistics)
        self.weight = rng.standard_normal(self.fold.channels).astype(np.float32)
        self.bias = rng.standard_normal(self.fold.channels).astype(np.float32)
        self.xhat = (apart(self.x, shape) - per_statistic(self.mean, shape)) * per_statistic(self.rstd, shape)
        self.pre = (
            self.xhat * per_channel(self.weight, shape, 1)
            + per_channel(self.bias, shape, 0)
            + apart(self.residual, shape)
        )
        for name, value in vars(self).items():
            if name != "fold":
                value.flags.writeable = False
        self._activated: dict[Any, tuple[Array, Array]] = {}

    def activated(self, activation: Any) -> tuple[Array, Array]:
        """The activation of `pre` and its derivative there."""
        if activation not in self._activated:
            found = reference.activate(self.pre, activation), reference.activation_derivative(self.pre, activation)
            self._activated[activation] = found
        return self._activated[activation]


# The instruction sets and activations of one shape follow one another, all its dtypes in turn.
drawn_once = lru_cache(maxsize=len(DTYPES))(Drawn)


def close(got: Array, want: Array, scale: Any, dtype: str) -> None:
    """Within 2e-6 of `scale` (float64: 1e-14, some 50 roundings); a half type rounds the result besides."""
    relative = 1e-14 if dtype == "float64" else 2e-6
    bound = relative * np.broadcast_to(scale, want.shape) + 1e-30
    if dtype in ("float16", "bfloat16"):
        bound = bound + cases.UNIT_ROUNDOFF[dtype] * (np.abs(want) + bound) + cases.UNDERFLOW[dtype]
    error = np.abs(got.astype(np.float64).reshape(want.shape) - want)
    assert np.max(error - bound, initial=0.0) <= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [True, False])
def test_moments(shape: Any, dtype: str, center: bool, isa: str) -> None:
    drawn = drawn_once(shape, dtype)
    count, mean, m2 = (np.full(drawn.fold.statistics, np.nan) for _ in range(3))
    _C.moments(drawn.fold, drawn.x, None, center, count, mean, m2)
    x = apart(drawn.x, shape)
    want = x.mean(axis=(1, 3), keepdims=True) if center else np.zeros((shape[0], 1, shape[2], 1))
    assert np.all(count == shape[1] * shape[3])
    want_m2 = sums((x - want) ** 2)
    # 1e-6 of σ for the mean, of itself for M2; half types 4e-6: cases.py has the reasons.
    close(mean, want.ravel(), np.sqrt(want_m2 / count), "float64" if dtype == "float64" else "float32")
    scale = want_m2 * (1 if dtype in ("float32", "float64") else 2)
    close(m2, want_m2, scale, "float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize(
    ("before", "axis", "after"), [(1, 4, 3), (3, 2, 5), (2, 1, 1), (1, 9, 1), (2, 0, 3), (0, 3, 2)]
)
def test_merge_is_the_moments_of_the_union(before: int, axis: int, after: int, isa: str) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (before, axis, after))
    samples = [1e6 + rng.standard_normal(n) for n in counts.ravel()]
    count = counts.astype(np.float64)
    mean = np.array([s.mean() if len(s) else 0 for s in samples]).reshape(counts.shape)
    m2 = np.array([((s - s.mean()) ** 2).sum() if len(s) else 0 for s in samples]).reshape(counts.shape)
    merged = [np.full((before, after), np.nan) for _ in range(3)]
    _C.merge(before, axis, after, count, mean, m2, *merged)
    for i, k in itertools.product(range(before), range(after)):
        union = [samples[(i * axis + j) * after + k] for j in range(axis)]
        every = np.concatenate([np.empty(0), *union])
        assert merged[0][i, k] == len(every)
        if len(every) == 0:
            assert merged[1][i, k] == merged[2][i, k] == 0
            continue
        # The means are multiples of 2^-33 (1e6 has 20 bits); a few roundings of that, squared away in m2.
        assert abs(merged[1][i, k] - every.mean()) <= 1e-9
        np.testing.assert_allclose(merged[2][i, k], ((every - every.mean()) ** 2).sum(), rtol=1e-8, atol=1e-8)


def test_merge_is_in_order() -> None:
    """Chan's formula left to right, operation for operation: a fixed order."""
    rng = np.random.default_rng(1)
    count, mean, m2 = rng.integers(1, 9, 6).astype(float), rng.standard_normal(6), rng.uniform(0, 3, 6)
    merged = [np.empty(1) for _ in range(3)]
    _C.merge(1, 6, 1, count, mean, m2, *merged)
    again = [np.empty(1) for _ in range(3)]
    _C.merge(1, 3, 1, count[:3], mean[:3], m2[:3], *again)
    for i in range(3, 6):
        pair = [np.concatenate([a, b[i : i + 1]]) for a, b in zip(again, (count, mean, m2), strict=True)]
        again = [np.empty(1) for _ in range(3)]
        _C.merge(1, 2, 1, *pair, *again)
    for one, other in zip(merged, again, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_normalize(shape: Any, dtype: str, activation: Any, isa: str) -> None:
    drawn = drawn_once(shape, dtype)
    y = np.full_like(drawn.x, np.nan)
    _C.normalize(
        drawn.fold, drawn.x, drawn.mean, drawn.rstd, drawn.weight, drawn.bias, drawn.residual,
        ACTIVATIONS[activation], 0.01, y,
    )  # fmt: skip
    scale = np.abs(drawn.xhat * per_channel(drawn.weight, shape, 1)).max() + 10
    close(y, drawn.activated(activation)[0], scale, dtype)
    _C.normalize(drawn.fold, drawn.x, drawn.mean, drawn.rstd, None, None, None, 0, 0.0, y)
    close(y, drawn.xhat, np.abs(drawn.xhat).max(), dtype)


def kink_free(drawn: Drawn, activation: Any) -> Any:
    """Where rounding cannot move the derivative: 1e-4 is 30 times y's error."""
    return np.abs(drawn.pre) > 1e-4 if activation in ("relu", "leaky_relu") else np.ones(drawn.pre.shape, bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grad_sums(shape: Any, dtype: str, activation: Any, isa: str) -> None:
    drawn = drawn_once(shape, dtype)
    dy = np.where(kink_free(drawn, activation).ravel(), drawn.dy, drawn.dy.dtype.type(0))
    s, c = drawn.fold.statistics, drawn.fold.channels
    s1, s2, dweight, dbias = (np.full(n, np.nan) for n in (s, s, c, c))
    _C.grad_sums(
        drawn.fold, dy, drawn.x, drawn.mean, drawn.rstd, drawn.weight, drawn.bias, drawn.residual,
        ACTIVATIONS[activation], 0.01, s1, s2, dweight, dbias,
    )  # fmt: skip
    u = apart(dy, shape) * drawn.activated(activation)[1]
    w = per_channel(drawn.weight, shape, 1)
    # Of the sum of absolute values: 1e-6 for the sum, 1e-6 for an activation's derivative.
    size = np.abs(apart(dy, shape))
    kind = "float64" if dtype == "float64" else "float32"
    close(s1, sums(w * u), sums(np.abs(w) * size), kind)
    close(s2, sums(w * u * drawn.xhat), sums(np.abs(w * drawn.xhat) * size), kind)
    close(dweight, channel_sums(u * drawn.xhat, shape), channel_sums(size * np.abs(drawn.xhat), shape), kind)
    close(dbias, channel_sums(u, shape), channel_sums(size, shape), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("given", ["cx and c0", "cx", "none"])
def test_grad_input(shape: Any, dtype: str, activation: Any, given: str, isa: str) -> None:
    drawn = drawn_once(shape, dtype)
    rng = np.random.default_rng(5)
    cx = rng.standard_normal(drawn.fold.statistics) if "cx" in given else None
    c0 = rng.standard_normal(drawn.fold.statistics) if "c0" in given else None
    dx, dresidual = np.full_like(drawn.x, np.nan), np.full_like(drawn.x, np.nan)
    _C.grad_input(
        drawn.fold, drawn.dy, drawn.x, drawn.mean, drawn.rstd, drawn.weight, drawn.bias, drawn.residual,
        ACTIVATIONS[activation], 0.01, cx, c0, None, dx, dresidual,
    )  # fmt: skip
    u = apart(drawn.dy, shape) * drawn.activated(activation)[1]
    rstd = per_statistic(drawn.rstd, shape)
    terms = [per_channel(drawn.weight, shape, 1) * u]
    terms += [] if cx is None else [per_statistic(cx, shape) * drawn.xhat]
    terms += [] if c0 is None else [per_statistic(c0, shape) + 0 * u]
    want = rstd * sum(terms)
    keep = kink_free(drawn, activation)
    scale = np.max([np.max(np.abs(rstd * term)) for term in terms])
    close(np.where(keep, apart(dx, shape), want), want, scale, dtype)
    close(np.where(keep, apart(dresidual, shape), u), u, np.abs(u).max(), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("training", "averaged", "correction"), [(True, False, 1), (True, True, 1), (True, True, 0), (False, False, 0)]
)
def test_forward_and_backward_are_the_verbs_one_after_the_other(
    shape: Any, dtype: str, training: bool, averaged: bool, correction: int, isa: str
) -> None:
    drawn = drawn_once(shape, dtype)
    f, s, c = drawn.fold, drawn.fold.statistics, drawn.fold.channels
    tracked = c == shape[2]
    if not tracked and (averaged or not training):
        pytest.skip("running statistics go with one channel for each group")
    old_mean, old_var = np.linspace(2, 4, c), np.linspace(0.5, 2, c)
    running_mean, running_var = (old_mean.copy(), old_var.copy()) if tracked else (None, None)
    y, mean, rstd = np.full_like(drawn.x, np.nan), np.empty(s), np.empty(s)
    _C.forward(
        f, drawn.x, drawn.weight, drawn.bias, running_mean, running_var, drawn.residual, None, y, mean, rstd,
        training, 0.25, -1, averaged, correction, 1e-3, 1, 0.0,
    )  # fmt: skip
    x, n = apart(drawn.x, shape), shape[1] * shape[3]
    if training:
        var = x.var(axis=(1, 3))
    if training and tracked:
        want_mean, want_var = old_mean, old_var
        entries = [slice(None)] if averaged else [slice(b, b + 1) for b in range(shape[0])]
        for b in entries:
            want_mean = 0.75 * want_mean + 0.25 * x.mean(axis=(1, 3))[b].mean(axis=0)
            want_var = 0.75 * want_var + 0.25 * var[b].mean(axis=0) * n / (n - correction)
        np.testing.assert_allclose(running_mean, want_mean, rtol=2e-6)
        np.testing.assert_allclose(running_var, want_var, rtol=2e-6)
    if not training:
        var = np.broadcast_to(old_var, (shape[0], c))
        assert_same_bits(running_mean, old_mean)
        assert_same_bits(running_var, old_var)
    # Half types: 4e-6 in the variance, half of it in rstd; float32 1e-6; see cases.py.
    np.testing.assert_allclose(rstd, (var.ravel() + 1e-3) ** -0.5, rtol=2e-6)

    again = np.full_like(y, np.nan)
    _C.normalize(f, drawn.x, mean, rstd, drawn.weight, drawn.bias, drawn.residual, 1, 0.0, again)
    assert_same_bits(y, again)

    dx, dresidual, dweight, dbias = np.full_like(y, np.nan), np.full_like(y, np.nan), np.empty(c), np.empty(c)
    _C.backward(
        f, drawn.dy, drawn.x, mean, rstd, drawn.weight, drawn.bias, drawn.residual, None, not training, 1, 0.0,
        dx, dresidual, dweight, dbias,
    )  # fmt: skip
    s1, s2, dweight2, dbias2 = np.empty(s), np.empty(s), np.empty(c), np.empty(c)
    _C.grad_sums(
        f, drawn.dy, drawn.x, mean, rstd, drawn.weight, drawn.bias, drawn.residual, 1, 0.0, s1, s2, dweight2, dbias2
    )
    np.testing.assert_allclose(dweight, dweight2, rtol=1e-12)
    np.testing.assert_allclose(dbias, dbias2, rtol=1e-12)
    coefficients = (-s2 / n, -s1 / n) if training else (None, None)
    dx2, dresidual2 = np.full_like(y, np.nan), np.full_like(y, np.nan)
    _C.grad_input(
        f, drawn.dy, drawn.x, mean, rstd, drawn.weight, drawn.bias, drawn.residual, 1, 0.0,
        *coefficients, None, dx2, dresidual2,
    )  # fmt: skip
    assert_same_bits(dresidual, dresidual2)
    scale = np.max(per_statistic(rstd, shape) * np.abs(per_channel(drawn.weight, shape, 1))) * np.abs(x).max()
    close(dx, dx2.astype(np.float64), scale, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_large_folds(shape: Any, dtype: str, masked: bool, isa: str, threads: None) -> None:
    """Forward and backward as sums in NumPy, the same bits on any number of threads."""
    drawn = drawn_once(shape, dtype)
    f, s, c = drawn.fold, drawn.fold.statistics, drawn.fold.channels
    batch, outer, _, inner, span = shape
    mask = np.random.default_rng(7).random((batch, outer, span)) < (0.7 if masked else 2)
    counts = np.tile(mask[:, :, None, None, :], (1, 1, shape[2], inner // span, 1)).reshape(shape[:4])
    results = []
    for n in (1, 3):
        fn.set_num_threads(n)
        y, dx, mean, rstd = np.full_like(drawn.x, np.nan), np.full_like(drawn.x, np.nan), np.empty(s), np.empty(s)
        dweight, dbias = np.empty(c), np.empty(c)
        parameters, given = (drawn.weight, drawn.bias), mask.ravel() if masked else None
        _C.forward(
            f, drawn.x, *parameters, None, None, None, given, y, mean, rstd, True, 0.0, -1, False, 1, 1e-3, 0, 0.0
        )
        _C.backward(f, drawn.dy, drawn.x, mean, rstd, *parameters, None, given, False, 0, 0.0, dx, None, dweight, dbias)
        results.append((y, mean, rstd, dx, dweight, dbias))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)

    x, kind = apart(drawn.x, shape), "float32"
    total = per_statistic(sums(counts.astype(float)), shape)
    want_mean = per_statistic(sums(np.where(counts, x, 0)), shape) / total
    var = per_statistic(sums(np.where(counts, (x - want_mean) ** 2, 0)), shape) / total
    # As in test_moments, and half of M2's for rstd.
    close(mean, want_mean.ravel(), np.sqrt(var.ravel()), kind)
    np.testing.assert_allclose(rstd, (var.ravel() + 1e-3) ** -0.5, rtol=2e-6)
    xhat, w = (x - want_mean) / np.sqrt(var + 1e-3), per_channel(drawn.weight, shape, 1)
    pre = xhat * w + per_channel(drawn.bias, shape, 0)
    close(y, pre, np.abs(xhat * w).max() + np.abs(drawn.bias).max(), dtype)
    dy = apart(drawn.dy, shape)
    close(dweight, channel_sums(dy * xhat, shape), channel_sums(np.abs(dy * xhat), shape), kind)
    close(dbias, channel_sums(dy, shape), channel_sums(np.abs(dy), shape), kind)
    s1, s2 = per_statistic(sums(w * dy), shape), per_statistic(sums(w * dy * xhat), shape)
    scale = (np.abs(w) / np.sqrt(var + 1e-3)).max() * np.abs(dy).max()
    close(dx, (w * dy - np.where(counts, (s1 + xhat * s2) / total, 0)) / np.sqrt(var + 1e-3), scale, dtype)


def test_the_mask_of_relu_is_the_forward_one(isa: str) -> None:
    """dresidual is 0 exactly where y is: pre is recomputed operation for operation."""
    for shape, dtype in itertools.product(FOLDS.values(), DTYPES):
        drawn = drawn_once(shape, dtype)
        dy = np.ones_like(drawn.dy)
        y, dx, dresidual = (np.empty_like(drawn.x) for _ in range(3))
        arrays = (drawn.mean, drawn.rstd, drawn.weight, drawn.bias, drawn.residual, 1, 0.0)
        _C.normalize(drawn.fold, drawn.x, *arrays, y)
        _C.grad_input(drawn.fold, dy, drawn.x, *arrays, None, None, None, dx, dresidual)
        # y > 0 may round to 0 in a half type, never the other way round.
        assert np.all((dresidual != 0) | (y == 0))
        if dtype in ("float32", "float64"):
            np.testing.assert_array_equal(dresidual != 0, y != 0)


# What the door refuses: the kernels index with it.


def good() -> dict[str, Any]:
    return {"fold": _C.Fold(1, 4, 3, 5, 5), "x": normal((60,)), "mean": np.zeros(3), "rstd": np.ones(3)}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"x": normal((59,))}, ValueError),
        ({"x": normal((120,))[::2]}, ValueError),
        ({"x": normal((60,))[::-1]}, ValueError),
        ({"x": np.arange(60)}, TypeError),
        ({"x": [1.0] * 60}, TypeError),
        ({"mean": np.zeros(2)}, ValueError),
        ({"mean": np.zeros(3, np.float32)}, TypeError),
        ({"rstd": np.zeros(6)[::2]}, ValueError),
        ({"weight": np.zeros(4)}, ValueError),
        ({"weight": np.zeros(3, int)}, TypeError),
        ({"residual": normal((60,), "float64")}, TypeError),
        ({"residual": normal((61,))}, ValueError),
        ({"y": normal((60,), "float64")}, TypeError),
        ({"y": normal((61,))}, ValueError),
        ({"activation": 6}, ValueError),
        ({"activation": -1}, ValueError),
        ({"fold": _C.Fold(1, 4, 3, 5, 3)}, ValueError),
    ],
)
def test_the_door_checks_what_it_indexes_with(wrong: dict[str, Any], error: type[Exception]) -> None:
    options = {"weight": None, "bias": None, "residual": None, "activation": 0, "slope": 0.0}
    y = np.full(60, 7, np.float32)
    with pytest.raises(error):
        _C.normalize(**(good() | options | {"y": y} | wrong))
    assert np.all(y == 7)


def test_the_door_does_not_write_to_read_only_arrays() -> None:
    f = _C.Fold(1, 4, 3, 5, 5)
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    for place in range(3):
        found = [np.zeros(3) for _ in range(3)]
        found[place] = frozen
        with pytest.raises(ValueError, match="read-only"):
            _C.moments(f, normal((60,)), None, True, *found)


# Fold.


def enumerate_fold(f: Any) -> tuple[Array, Array, Array]:
    """Statistic, channel and position of every element, by the three formulas."""
    b, o, g, i = (a.ravel() for a in np.indices((f.batch, f.outer, f.groups, f.inner)))
    return b * f.groups + g, (g * f.inner + i) // f.span, (b * f.outer + o) * f.span + i % f.span


@pytest.mark.parametrize(
    "numbers",
    [*FOLDS.values(), (2, 1, 2, 12, 4), (3, 5, 2, 3, 1), (4, 1, 1, 7, 1), (1, 1, 6, 10, 10)],
)
def test_fold_properties(numbers: tuple[int, ...]) -> None:
    f = _C.Fold(*numbers)
    assert (f.batch, f.outer, f.groups, f.inner, f.span) == numbers
    statistic, channel, position = enumerate_fold(f)
    assert f.size == len(statistic)
    assert f.statistics == len(np.unique(statistic)) == statistic.max() + 1
    assert f.channels == len(np.unique(channel)) == channel.max() + 1
    assert np.all(np.bincount(statistic) == f.per_statistic)
    # Channel and position together name the element.
    positions = position.max() + 1
    assert f.channels * positions == f.size == len(set(zip(channel.tolist(), position.tolist(), strict=True)))
    assert repr(f) == "Fold(batch={}, outer={}, groups={}, inner={}, span={})".format(*numbers)


def test_fold_refuses_what_is_none() -> None:
    for numbers in [(-1, 1, 1, 1, 1), (1, 1, 1, 4, 3), (1, 1, 1, 4, 0)]:
        with pytest.raises(ValueError, match=r"negative|span"):
            _C.Fold(*numbers)


SHAPES = [(4, 3), (2, 3, 4), (2, 3, 1, 5), (1, 1, 2, 2), (3, 2, 2, 2), (2, 1, 3), (1, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_folds_by_enumeration(shape: tuple[int, ...]) -> None:
    """In any axis order: elements with the same index along `axis`, and only they, share statistic and channel."""
    for order, axis in itertools.product(itertools.permutations(range(len(shape))), range(len(shape))):
        x = np.zeros([shape[a] for a in order], np.float32).transpose(np.argsort(order))
        assert x.shape == shape
        found = fold.memory_order(x.shape, x.strides, x.itemsize)
        assert found is not None
        f = fold.batch(shape, found, axis)
        in_memory = np.indices(shape)[axis].transpose(order).ravel()
        statistic, channel, _ = enumerate_fold(f)
        assert np.array_equal(statistic, in_memory)
        assert np.array_equal(channel, in_memory)


def test_ghost_folds_by_enumeration() -> None:
    for (shape, axis), size in itertools.product([((12, 3), 1), ((12, 3, 5), 1), ((12, 5, 3), 2)], (1, 2, 3, 4, 6, 12)):
        f = fold.batch(shape, tuple(range(len(shape))), axis, shape[0] // size)
        sample, channel = np.indices(shape)[0].ravel(), np.indices(shape)[axis].ravel()
        statistics, channels, _ = enumerate_fold(f)
        assert np.array_equal(statistics, sample // size * shape[axis] + channel)
        assert np.array_equal(channels, channel)


def test_memory_order_sees_gaps_and_overlaps() -> None:
    x = np.zeros((4, 6, 8), np.float32)
    dense = [x, x.transpose(2, 0, 1), x[1:], x[:, :, None], x[:1]]
    others = [x[:, ::2], x[:, 1:], x[::-1], np.broadcast_to(x[:1], x.shape), x[:, :, :4]]
    for array in dense:
        assert fold.memory_order(array.shape, array.strides, array.itemsize) is not None
    for array in others:
        assert fold.memory_order(array.shape, array.strides, array.itemsize) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_reduction_folds_by_enumeration(shape: tuple[int, ...]) -> None:
    axes = range(len(shape))
    subsets = [frozenset(s) for n in range(len(shape) + 1) for s in itertools.combinations(axes, n)]
    for reduced in subsets:
        f = fold.reduction(shape, tuple(a for a in axes if shape[a] > 1), reduced)
        if f is None:
            continue
        kept = [a for a in axes if a not in reduced]
        indices = np.indices(shape)
        want = np.ravel_multi_index([indices[a].ravel() for a in kept], [shape[a] for a in kept]) if kept else 0
        assert np.all(enumerate_fold(f)[0] == want)


# Moments.


def exact(values: Array) -> tuple[float, float]:
    """Mean and Σ(x − mean)² of the stored numbers, in rational arithmetic."""
    numbers = [Fraction(float(v)) for v in values]
    mean = sum(numbers) / len(numbers)
    return float(mean), float(sum((v - mean) ** 2 for v in numbers))


# The NIST StRD sets that break one-pass formulas, as formulas: NumAcc2-4 are offset + {.1, .3}, alternating, after .2.
NUMACC = {offset: np.array([offset + 0.2] + 500 * [offset + 0.1, offset + 0.3]) for offset in (1, 1e6, 1e7)}


@pytest.mark.parametrize("offset", NUMACC)
def test_certified_digits(offset: float, isa: str) -> None:
    data = NUMACC[offset]
    mean, m2 = exact(data)
    # Certified: mean offset + 0.2, standard deviation 0.1; storing offset + .1 costs offset·2^-53 of it.
    assert abs(mean - (offset + 0.2)) <= offset * 2e-16
    assert abs(math.sqrt(m2 / 1000) - 0.1) <= offset * 2e-16
    # To the limit of the stored data: the mean rounds to u·offset, which enters m2 as a relative 2·u·offset/σ at most,
    # for each of two chunks.
    tolerance = 1e-14 + 4 * 2.0**-53 * offset / 0.1
    for layout in (data[:, None], np.ascontiguousarray(np.repeat(data[:, None], 3, axis=1))):
        got_mean, got_var = fn.moments(layout, 0, correction=1)
        np.testing.assert_allclose(got_mean, mean, rtol=4e-16)
        np.testing.assert_allclose(got_var, m2 / 1000, rtol=tolerance)
    moments = fn.Moments()
    for part in np.array_split(data, 7):
        moments.push(part)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(moments.variance(1), m2 / 1000, rtol=10 * tolerance)


def test_moments_push_merge_and_variance() -> None:
    x = 1e3 + normal((40, 5, 3), "float64")
    whole = fn.Moments().push(x)
    assert whole.mean.shape == (5, 3)
    assert np.all(whole.count == 40)
    np.testing.assert_allclose(whole.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.m2, ((x - x.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance(), x.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance(1), x.var(axis=0, ddof=1), rtol=1e-12)
    assert np.all(np.isnan(whole.variance(40)))

    parts = fn.Moments()
    for part in (x[:1], x[1:17], x[17:17], x[17:]):
        parts.push(part)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-15)
    np.testing.assert_allclose(parts.m2, whole.m2, rtol=1e-11)
    assert np.all(parts.count == 40)

    left, right = fn.Moments().push(x[:13]), fn.Moments().push(x[13:])
    untouched = right.mean.copy()
    assert left.merge(right) is left
    assert_same_bits(right.mean, untouched)
    np.testing.assert_allclose(left.m2, whole.m2, rtol=1e-11)

    channels = fn.Moments().push(x, axes=(0, 2))
    np.testing.assert_allclose(channels.variance(), x.var(axis=(0, 2)), rtol=1e-12)
    every = fn.Moments().push(x, axes=(0, 1, 2))
    assert every.mean.shape == ()
    np.testing.assert_allclose(every.variance(), x.var(), rtol=1e-12)


def test_push_one_at_a_time_is_welford() -> None:
    data = NUMACC[1e7][:51]
    _, m2 = exact(data)
    moments = fn.Moments()
    for value in data:
        moments.push(np.array([value]))
    assert moments.count == 51
    np.testing.assert_allclose(moments.m2, m2, rtol=1e-6)  # 51 roundings of the mean, u·1e7 each, over σ = 0.1


@pytest.mark.parametrize("lying", [misaligned, byte_swapped])
def test_arrays_off_a_wire_have_the_bits_of_others(lying: Callable[[Array], Array]) -> None:
    """Which loops run is decided by the order of the axes alone."""
    x = (normal((1000, 5, 8), "float64") + 1e4).astype(np.float32)
    for given, want in ((lying(x), x), (lying(x.T).T, x)):
        plain = np.array(given.astype(np.float32), order="K")
        assert not given.flags.aligned or not given.dtype.isnative
        for axes in (0, 1, (0, 2)):
            moments, of_plain = fn.Moments().push(given, axes), fn.Moments().push(plain, axes)
            assert_same_bits(moments.mean, of_plain.mean)
            assert_same_bits(moments.m2, of_plain.m2)
            np.testing.assert_allclose(moments.mean, want.mean(axes, dtype=float), rtol=1e-10)  # 1e-6 of σ


def test_merging_nothing_changes_nothing() -> None:
    x = normal((9, 4), "float64")
    for moments in (
        fn.Moments().push(x).merge(fn.Moments()),
        fn.Moments().merge(fn.Moments().push(x)),
        fn.Moments().push(x[:0]).push(x),
        fn.Moments().push(x).push(x[:0]),
    ):
        plain = fn.Moments().push(x)
        for name in ("count", "mean", "m2"):
            assert_same_bits(getattr(moments, name), getattr(plain, name))
    nothing = fn.Moments()
    assert nothing.count == nothing.mean == nothing.m2 == 0
    assert np.isnan(nothing.variance())
    assert fn.Moments().merge(fn.Moments()).count == 0


def test_merged_moments_do_not_share_memory() -> None:
    source = fn.Moments().push(normal((9, 4)))
    copy = fn.Moments().merge(source)
    copy.mean += 1
    assert np.all(copy.mean != source.mean)


def test_moments_pickle_and_repr() -> None:
    moments = fn.Moments().push(normal((9, 4)))
    again = pickle.loads(pickle.dumps(moments))
    for name in ("count", "mean", "m2"):
        assert_same_bits(getattr(again, name), getattr(moments, name))
    again.push(normal((3, 4)))
    assert np.all(again.count == 12)
    assert repr(moments).startswith("Moments(count=")


def test_moments_errors_change_nothing() -> None:
    moments = fn.Moments().push(normal((9, 4)))
    before = [a.copy() for a in (moments.count, moments.mean, moments.m2)]
    with pytest.raises(ValueError, match=r"shape \(5,\) do not merge into shape \(4,\)"):
        moments.push(normal((9, 5)))
    with pytest.raises(TypeError, match=r"CuPy array|of a GPU"):
        moments.push([[1.0, 2.0, 3.0, 4.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float32, float64, float16"):
        moments.push(np.zeros((3, 4), int))
    with pytest.raises(np.exceptions.AxisError):
        moments.push(normal((9, 4)), axes=2)
    for one, other in zip(before, (moments.count, moments.mean, moments.m2), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_verbs_of_lines_one_after_the_other(dtype: str, centered: bool, isa: str) -> None:
    f = _C.Fold(13, 1, 2, 37, 1)
    x, dy = (normal((13, 2, 37), dtype, seed) + seed for seed in (0, 1))
    weight, bias = normal((74,), "float32", 2), normal((74,), "float32", 3)
    y, mean, rstd = np.full_like(x, np.nan), np.empty(26) if centered else None, np.empty(26)
    _C.forward(f, x, weight, bias, None, None, None, None, y, mean, rstd, True, 0.0, -1, False, 1, 1e-3, 0, 0.0)
    count, own_mean, m2 = np.empty(26), np.empty(26), np.empty(26)
    _C.moments(f, x, None, centered, count, own_mean, m2)
    np.testing.assert_array_equal(count, 37)
    np.testing.assert_array_equal(own_mean, 0 if mean is None else mean)
    np.testing.assert_allclose(rstd, (m2 / 37 + 1e-3) ** -0.5, rtol=1e-15)
    again = np.full_like(x, np.nan)
    _C.normalize(f, x, mean, rstd, weight, bias, None, 0, 0.0, again)
    assert_same_bits(y, again)

    dx, dweight, dbias = np.full_like(x, np.nan), np.empty(74), np.empty(74)
    _C.backward(f, dy, x, mean, rstd, weight, bias, None, None, False, 0, 0.0, dx, None, dweight, dbias)
    s1, s2, dweight2, dbias2 = np.empty(26), np.empty(26), np.empty(74), np.empty(74)
    _C.grad_sums(f, dy, x, mean, rstd, weight, bias, None, 0, 0.0, s1, s2, dweight2, dbias2)
    assert_same_bits(dweight, dweight2)
    assert_same_bits(dbias, dbias2)
    _C.grad_input(
        f, dy, x, mean, rstd, weight, bias, None, 0, 0.0, -s2 / 37, -s1 / 37 if centered else None, None, again, None
    )
    assert_same_bits(dx, again)
    xhat = (x.astype(np.float64) - (0 if mean is None else mean.reshape(13, 2, 1))) * rstd.reshape(13, 2, 1)
    g = dy.astype(np.float64) * weight.reshape(2, 37)
    np.testing.assert_allclose(s1, g.sum(axis=2).ravel(), rtol=0, atol=1e-6 * np.abs(g).sum(axis=2).max())
    np.testing.assert_allclose(
        s2, (g * xhat).sum(axis=2).ravel(), rtol=0, atol=1e-6 * np.abs(g * xhat).sum(axis=2).max()
    )
    # Constant statistics: dx = rstd·w·dy.
    _C.backward(f, dy, x, mean, rstd, weight, bias, None, None, True, 0, 0.0, dx, None, dweight, dbias)
    _C.grad_input(f, dy, x, mean, rstd, weight, bias, None, 0, 0.0, None, None, None, again, None)
    assert_same_bits(dx, again)
    want = rstd.reshape(13, 2, 1) * g
    close(dx, want, np.abs(want).max(), dtype)


@pytest.mark.parametrize("fold_", [(3, 4, 5, 9, 9), (3, 20, 17, 1, 1), (7, 1, 1, 1, 1), (6, 1, 2, 33, 1)], ids=str)
def test_no_mean_is_a_mean_of_0(fold_: tuple[int, ...], isa: str) -> None:
    f = _C.Fold(*fold_)
    s, c, n = f.statistics, f.channels, f.per_statistic
    x, dy = normal((f.size,)) + 1, normal((f.size,), seed=1)
    weight, bias, zeros, rstd = normal((c,), seed=2), normal((c,), seed=3), np.zeros(s), np.empty(s)
    y, other = np.full_like(x, np.nan), np.full_like(x, np.nan)
    _C.forward(f, x, weight, bias, None, None, None, None, y, None, rstd, True, 0.0, -1, False, 1, 1e-3, 0, 0.0)
    squares = (x.astype(np.float64) ** 2).reshape(fold_[:4]).sum(axis=(1, 3)).ravel()
    np.testing.assert_allclose(rstd, (squares / n + 1e-3) ** -0.5, rtol=1e-6)
    for mean in (None, zeros):
        _C.normalize(f, x, mean, rstd, weight, bias, None, 0, 0.0, other)
        assert_same_bits(y, other)
    sums = [[np.empty(s), np.empty(s), np.empty(c), np.empty(c)] for _ in range(2)]
    for mean, out in zip((None, zeros), sums, strict=True):
        _C.grad_sums(f, dy, x, mean, rstd, weight, bias, None, 0, 0.0, *out)
    for one, two in zip(*sums, strict=True):
        assert_same_bits(one, two)
    dx, dweight, dbias = np.full_like(x, np.nan), np.empty(c), np.empty(c)
    _C.backward(f, dy, x, None, rstd, weight, bias, None, None, False, 0, 0.0, dx, None, dweight, dbias)
    for mean in (None, zeros):
        _C.grad_input(f, dy, x, mean, rstd, weight, bias, None, 0, 0.0, -sums[0][1] / n, None, None, other, None)
        close(dx, other, np.abs(other).max(), "float32")
    np.testing.assert_allclose(dweight, sums[0][2], rtol=1e-12)


def test_what_is_needed_must_be_given() -> None:
    x, s, c = normal((4, 3)), np.ones(3), np.ones(3, np.float32)
    f, lines = _C.Fold(1, 4, 3, 1, 1), _C.Fold(4, 1, 1, 3, 1)
    for call, name in (
        (lambda: _C.moments(f, x, None, True, s, s, None), "m2"),
        (lambda: _C.normalize(lines, x, None, None, None, None, None, 0, 0.0, x.copy()), "rstd"),
        (lambda: _C.forward(f, x, *[None] * 6, x.copy(), s, None, True, 0.1, -1, False, 1, 1e-5, 0, 0.0), "rstd"),
        (lambda: _C.backward(f, x, x, s, None, *[None] * 4, False, 0, 0.0, x.copy(), None, c, c.copy()), "rstd"),
        (lambda: _C.backward(f, x, x, s, s, *[None] * 4, False, 0, 0.0, x.copy(), None, None, c), "dweight"),
        (lambda: _C.grad_sums(f, x, x, s, s, None, None, None, 0, 0.0, None, s, c, c.copy()), "s1"),
        (lambda: _C.grad_input(f, x, x, s, None, None, None, None, 0, 0.0, s, s, None, x.copy(), None), "rstd"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* must be given"):
            call()
