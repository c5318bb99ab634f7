"""Layer norm and RMS norm by their contract: layouts, outputs, errors, bits; the values are tested in test_cases.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import reference
from support import DENSE, DTYPES, LAYOUTS, Array, assert_same_bits, byte_swapped, normal, numpy_dtype

SHAPE = (6, 4, 33)
PARAMETERS = {"weight": normal((33,), seed=5), "bias": normal((33,), seed=6)}


def both(x: Array, dy: Array, shape: Any = 33, **out: Any) -> dict[str, Array]:
    """All results of both norms."""
    weight, bias = (np.resize(a, shape) for a in PARAMETERS.values())
    y, mean, rstd = fn.layer_norm_forward(x, shape, weight, bias)
    dx, dweight, dbias = fn.layer_norm_backward(dy, x, mean, rstd, weight, bias)
    y_rms, rstd_rms = fn.rms_norm_forward(x, shape, weight)
    dx_rms, dweight_rms = fn.rms_norm_backward(dy, x, rstd_rms, weight)
    return locals()


RESULTS = ("y", "mean", "rstd", "dx", "dweight", "dbias", "y_rms", "rstd_rms", "dx_rms", "dweight_rms")


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), byte_swapped], ids=[*LAYOUTS, "byte_swapped"])
@pytest.mark.parametrize("normalized", [1, 2, 3])
def test_strides_do_not_matter(layout: Any, normalized: int) -> None:
    x, dy = normal(SHAPE), normal(SHAPE, seed=1)
    expected = both(x, dy, SHAPE[3 - normalized :])
    got = both(layout(x), layout(dy), SHAPE[3 - normalized :])
    for name in RESULTS:
        # dweight and dbias run across the lines, whose order in memory they follow.
        if name.startswith(("dweight", "dbias")):
            np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-6 * abs(dy).sum(), err_msg=name)
        else:
            assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("layout", DENSE.values(), ids=DENSE)
def test_results_lie_as_x_does(layout: Any) -> None:
    x = layout(normal(SHAPE))
    assert fn.layer_norm(x, 33).strides == x.strides
    y, mean, rstd = fn.layer_norm_forward(x, 33)
    assert fn.layer_norm_backward(np.ascontiguousarray(y), x, mean, rstd)[0].strides == x.strides
    assert mean.flags.c_contiguous
    assert mean.shape == rstd.shape == SHAPE[:2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    x, weight = normal(SHAPE, dtype), normal((33,), dtype)
    plain = np.dtype(np.float64 if dtype == "float64" else np.float32)
    y, mean, rstd = fn.layer_norm_forward(x, 33)
    assert (y.dtype, mean.dtype, rstd.dtype) == (kind, np.float64, np.float64)
    assert [a.dtype for a in fn.layer_norm_backward(y, x, mean, rstd)] == [kind, plain, plain]
    assert [a.dtype for a in fn.layer_norm_backward(y, x, mean, rstd, weight)] == [kind, kind, plain]
    assert [a.dtype for a in fn.rms_norm_backward(y, x, fn.rms_norm_forward(x, 33)[1])] == [kind, plain]
    eps = 2.0**-52 if dtype == "float64" else 2.0**-23
    assert_same_bits(fn.rms_norm(x, 33), fn.rms_norm(x, (33,), None, eps))
    assert_same_bits(fn.reference.rms_norm(x, 33), fn.reference.rms_norm(x, 33, None, eps))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_out(layout: Any) -> None:
    x, dy = normal(SHAPE), normal(SHAPE, seed=1)
    expected = both(x, dy)
    for call, name in (
        (lambda out: fn.layer_norm(x, 33, *PARAMETERS.values(), out=out), "y"),
        (lambda out: fn.rms_norm(x, 33, PARAMETERS["weight"], out=out), "y_rms"),
        (
            lambda out: fn.layer_norm_backward(
                dy, x, expected["mean"], expected["rstd"], *PARAMETERS.values(), out=out
            )[0],
            "dx",
        ),
        (lambda out: fn.rms_norm_backward(dy, x, expected["rstd_rms"], PARAMETERS["weight"], out=out)[0], "dx_rms"),
    ):
        out = layout(np.full(SHAPE, np.nan, np.float32))
        assert call(out) is out
        assert_same_bits(out, expected[name], name)


def test_in_place() -> None:
    x, dy = normal(SHAPE), normal(SHAPE, seed=1)
    expected, mine = both(x, dy), x.copy()
    assert fn.layer_norm(mine, 33, *PARAMETERS.values(), out=mine) is mine
    assert_same_bits(mine, expected["y"])
    for out in ("dy", "x"):
        given = {"dy": dy.copy(), "x": x.copy()}
        dx = fn.layer_norm_backward(
            given["dy"], given["x"], expected["mean"], expected["rstd"], *PARAMETERS.values(), out=given[out]
        )[0]
        assert dx is given[out]
        assert_same_bits(dx, expected["dx"])


def test_the_same_bits_at_any_number_of_threads(threads: None, isa: str) -> None:
    for shape in ((5000, 64), (700, 1000), (3, 300_000), (300_000, 3)):
        x, dy = normal(shape), normal(shape, seed=1)
        results = []
        for n in (1, 2, 3, 7):
            fn.set_num_threads(n)
            results.append(both(x, dy, shape[1]))
        for name in RESULTS:
            for other in results[1:]:
                assert_same_bits(results[0][name], other[name], f"{shape} {name}")


def test_a_line_does_not_know_its_neighbours(isa: str) -> None:
    x, dy = normal((37, 129)), normal((37, 129), seed=1)
    weight = normal((129,))
    y, mean, rstd = fn.layer_norm_forward(x, 129, weight)
    dx = fn.layer_norm_backward(dy, x, mean, rstd, weight)[0]
    for at in (slice(0, 1), slice(5, 9), slice(36, 37)):
        assert_same_bits(fn.layer_norm(x[at], 129, weight), y[at])
        assert_same_bits(fn.layer_norm_backward(dy[at], x[at], mean[at], rstd[at], weight)[0], dx[at])
    x[4] = np.nan
    x[6, 7] = np.inf
    spoiled = fn.layer_norm(x, 129, weight)
    kept = [i for i in range(37) if i not in (4, 6)]
    assert_same_bits(spoiled[kept], y[kept])
    assert np.isnan(spoiled[4]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_lines(dtype: str, isa: str) -> None:
    """Variance 0, never negative, no NaN; also where the constant or 1/σ is as large as it gets."""
    for value in (0.1, -3e3, 6e4):
        x = np.full((3, 1025), value, numpy_dtype(dtype))
        y, mean, rstd = fn.layer_norm_forward(x, 1025, eps=1e-12)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_array_equal(mean, float(x[0, 0]))
        np.testing.assert_array_equal(rstd, 1e6)
        dx = fn.layer_norm_backward(np.ones_like(x), x, mean, rstd)[0]
        np.testing.assert_array_equal(dx, 0)


def test_no_lines_and_no_numbers() -> None:
    for shape, normalized in (((0, 5), 1), ((5, 0), 1), ((0, 3, 2), 2)):
        x, of = np.empty(shape, np.float32), shape[len(shape) - normalized :]
        y, mean, rstd = fn.layer_norm_forward(x, of)
        dx, dweight, dbias = fn.layer_norm_backward(y, x, mean, rstd)
        assert y.shape == dx.shape == shape
        assert mean.shape == rstd.shape == shape[: len(shape) - normalized]
        assert not dweight.any()
        assert not dbias.any()
        assert dweight.shape == of


def test_against_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x, dy, weight, bias = normal((9, 6, 20)), normal((9, 6, 20), seed=1), normal((6, 20)), normal((6, 20), seed=2)
    tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, weight, bias)]
    y = torch.nn.functional.layer_norm(tensors[0], (6, 20), *tensors[1:])
    y.backward(torch.from_numpy(dy))
    got, mean, rstd = fn.layer_norm_forward(x, (6, 20), weight, bias)
    np.testing.assert_allclose(got, y.detach(), rtol=0, atol=1e-5)
    for ours, theirs in zip(fn.layer_norm_backward(dy, x, mean, rstd, weight, bias), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=0, atol=1e-4)
    y = torch.nn.functional.rms_norm(torch.from_numpy(x), (6, 20), torch.from_numpy(weight))
    np.testing.assert_allclose(fn.rms_norm(x, (6, 20), weight), y, rtol=0, atol=1e-5)


X = normal((2, 6))
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (
        lambda: fn.layer_norm(X, [5]),
        ValueError,
        r"Given normalized_shape=\[5\], expected input with shape \[\*, 5\], but got input of size\[2, 6\]",
    ),
    "empty shape": (lambda: fn.rms_norm(X, ()), ValueError, "at least 1-dimensional"),
    "too many": (lambda: fn.rms_norm(X, (1, 2, 6)), ValueError, r"expected input with shape \[\*, 1, 2, 6\]"),
    "weight": (lambda: fn.layer_norm(X, 6, normal((5,))), ValueError, "weight to be of same shape"),
    "bias": (lambda: fn.layer_norm(X, 6, None, normal((1, 6))), ValueError, "bias to be of same shape"),
    "list": (lambda: fn.layer_norm([[1.0, 2.0]], 2), TypeError, "x must be a NumPy or CuPy array"),
    "weight list": (lambda: fn.layer_norm(X, 6, [1.0] * 6), TypeError, "weight must be a NumPy or CuPy array"),
    "int": (lambda: fn.rms_norm(np.ones((2, 6), int), 6), TypeError, "float32, float64, float16 and bfloat16"),
    "int weight": (lambda: fn.rms_norm(X, 6, np.ones(6, int)), TypeError, "float32, float64, float16 and bfloat16"),
    "out shape": (lambda: fn.layer_norm(X, 6, out=normal((2, 5))), ValueError, r"\(2, 6\).*\(2, 5\)"),
    "out dtype": (lambda: fn.layer_norm(X, 6, out=np.empty((2, 6))), TypeError, "float64"),
    "out overlaps": (lambda: fn.layer_norm(BIG[:2], 6, out=BIG[1:]), ValueError, "overlaps"),
    "out is a weight": (lambda: fn.layer_norm(BIG[:1], 6, BIG[0], out=BIG[:1]), ValueError, "overlaps"),
    "mean": (
        lambda: fn.layer_norm_backward(X, X, np.zeros(3), np.ones(2)),
        ValueError,
        r"mean must have shape \(2,\), got \(3,\)",
    ),
    "dy": (lambda: fn.rms_norm_backward(X[:1], X, np.ones(2)), ValueError, r"dy must have x's shape"),
    "layer dtype": (lambda: fn.LayerNorm(4, dtype="int32"), TypeError, "float32"),
    "layer shape": (lambda: fn.LayerNorm(4)(X), ValueError, r"expected input with shape \[\*, 4\]"),
    "layer backward": (lambda: fn.RMSNorm(6).backward(X), RuntimeError, "backward needs a call"),
}
BIG = normal((3, 6))


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    before = X.copy(), BIG.copy()
    with pytest.raises(error, match=message):
        call()
    assert_same_bits(X, before[0])
    assert_same_bits(BIG, before[1])


def test_layers() -> None:
    x, dy = normal((4, 5, 6)), normal((4, 5, 6), seed=1)
    layer = fn.LayerNorm((5, 6))
    layer.weight, layer.bias = normal((5, 6), seed=2), normal((5, 6), seed=3)
    y, mean, rstd = reference.layer_norm_forward(x, (5, 6), layer.weight, layer.bias)
    np.testing.assert_allclose(layer(x), y, rtol=0, atol=1e-5)
    gradients = reference.layer_norm_backward(dy, x, mean, rstd, layer.weight, layer.bias)
    for ours, theirs in zip((layer.backward(dy), layer.weight_grad, layer.bias_grad), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    rms = fn.RMSNorm(6, eps=1e-3)
    assert rms.bias is None
    y, rstd = reference.rms_norm_forward(x, 6, None, 1e-3)
    np.testing.assert_allclose(rms(x), y, rtol=0, atol=1e-5)
    dx, dweight = reference.rms_norm_backward(dy, x, rstd)
    np.testing.assert_allclose(rms.backward(dy), dx, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rms.weight_grad, dweight, rtol=0, atol=1e-4)
    out = np.empty_like(x)
    assert rms(x, out=out) is out
    assert rms.backward(dy, out=out) is out


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (fn.LayerNorm((2, 3)), ["weight", "bias"]),
        (fn.LayerNorm(3, bias=False), ["weight"]),
        (fn.LayerNorm(3, elementwise_affine=False), []),
        (fn.RMSNorm(3), ["weight"]),
        (fn.RMSNorm([3], elementwise_affine=False), []),
    ],
    ids=repr,
)
def test_the_state_of_layers(layer: Any, names: list[str]) -> None:
    assert list(layer.state_dict()) == names
    for name in names:
        setattr(layer, name, normal(layer.normalized_shape, seed=7))
    x = normal((4, *layer.normalized_shape))
    y = layer(x)
    other = type(layer)(layer.normalized_shape, elementwise_affine=layer.elementwise_affine)
    if list(other.state_dict()) == names:
        other.load_state_dict(layer.state_dict())
        assert_same_bits(other(x), y)
    with pytest.raises(KeyError, match="Unexpected"):
        layer.load_state_dict({**layer.state_dict(), "running_mean": np.zeros(3)})
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(again(x), y)
        assert repr(again) == repr(layer)
    layer.backward(y)
    assert (layer.weight_grad is None) == ("weight" not in names)
    assert (layer.bias_grad is None) == ("bias" not in names)
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(y)
    with pytest.raises(AttributeError if "bias" not in names else ValueError):
        layer.bias = np.zeros(7)
    assert layer.eval() is layer
