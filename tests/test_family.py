"""Instance, group, switchable and weight norm by their contract: layouts, outputs, errors, bits, layers; the values are
tested in test_cases.py."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import fold, reference
from fusednorm.testing import cases
from fusednorm.testing.cases import Case
from support import DENSE, DTYPES, LAYOUTS, Array, assert_same_bits, byte_swapped, normal, numpy_dtype

# One of each; shapes of four axes, where channels and samples can be anywhere.
NORMS = {
    "instance": Case("instance", (3, 6, 5, 4), norm="instance", running=True),
    "instance eval": Case("eval", (3, 6, 5, 4), norm="instance", training=False),
    "instance mask": Case("mask", (3, 6, 5, 4), norm="instance", mask=True),
    "group": Case("group", (3, 6, 5, 4), norm="group", groups=2, running=False),
    "group mask": Case("mask", (3, 6, 5, 4), norm="group", groups=3, mask=True, running=False),
    "switchable": Case("switchable", (3, 6, 5, 4), norm="switchable"),
    "switchable eval": Case("eval", (3, 6, 5, 4), norm="switchable", training=False),
    "weight": Case("weight", (6, 3, 5, 4), norm="weight", running=False, eps=0.0),
}


def check(case: Case, lay: Callable[[Array], Array] = np.copy) -> cases.Outputs:
    """Forward and backward of a case, arrays of x's shape and masks laid out as told, against the reference."""
    inputs = cases.make(case)

    def given(a: Array) -> Array:
        return lay(a.copy()) if a.shape == case.shape or a.dtype == np.bool_ else a.copy()

    got = cases.run(case, inputs, fn, to_device=given)
    wrong = [
        deviation for deviation in cases.compare(case, inputs, cases.expected(case, inputs), got) if not deviation.ok
    ]
    assert not wrong
    return got


# Folds.


def enumerate_fold(f: fold.Fold) -> tuple[Array, Array, Array]:
    b, o, g, i = (a.ravel() for a in np.indices((f.batch, f.outer, f.groups, f.inner)))
    return b * f.groups + g, (g * f.inner + i) // f.span, (b * f.outer + o) * f.span + i % f.span


@pytest.mark.parametrize("shape", [(2, 6), (3, 4, 5), (2, 6, 3, 4), (1, 4, 2), (2, 1, 3), (4, 6, 1, 3), (1, 1, 1)])
def test_group_folds_by_enumeration(shape: tuple[int, ...]) -> None:
    """In any axis order whose slowest are the samples; of others there is none."""
    for order, axis in itertools.product(itertools.permutations(range(len(shape))), range(len(shape))):
        samples = 1 if axis == 0 else 0
        x = np.zeros([shape[a] for a in order], np.float32).transpose(np.argsort(order))
        found = fold.memory_order(x.shape, x.strides, x.itemsize)
        assert found is not None
        for groups in (g for g in (1, 2, 3, shape[axis]) if shape[axis] % g == 0):
            f = fold.group(shape, found, axis, groups)
            if f is None:
                assert shape[samples] > 1
                assert found[0] != samples
                continue
            indices = np.indices(shape)
            sample, channel = (indices[a].transpose(order).ravel() for a in (samples, axis))
            statistics, channels, positions = enumerate_fold(f)
            assert np.array_equal(statistics, sample * groups + channel // (shape[axis] // groups))
            assert np.array_equal(channels, channel)
            assert len(set(zip(channels.tolist(), positions.tolist(), strict=True))) == x.size


# Layouts and outputs.


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), byte_swapped], ids=[*LAYOUTS, "byte_swapped"])
@pytest.mark.parametrize("norm", NORMS)
def test_any_layout(norm: str, layout: Any, axis: int) -> None:
    shape = (6, 3, 5, 4) if axis == 0 else tuple(np.insert((3, 5, 4), axis % 4, 6).tolist())
    case = replace(NORMS[norm], shape=shape, axis=axis)
    got = check(case, layout)
    x = layout(cases.make(case).x)
    for array in (got.y, got.dx):
        if layout in DENSE.values():
            assert array.strides == x.strides
        else:
            assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.dtype.isnative


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7, 6), (4, 6, 9), (2, 6, 3, 4, 5)])
def test_any_rank(norm: str, shape: tuple[int, ...], dtype: str) -> None:
    if len(shape) == 2 and NORMS[norm].norm == "instance" and NORMS[norm].training:
        pytest.skip("one spatial element")
    numpy_dtype(dtype)
    for axis in range(len(shape)):
        if shape[axis] == 6:
            check(replace(NORMS[norm], shape=shape, axis=axis, dtype=dtype))


def calls(norm: str) -> tuple[cases.Inputs, Callable[..., Any], Callable[..., Any]]:
    """The inputs; y, and what backward needs, of x; dx and the other gradients of dy and x. Both take out."""
    case = NORMS[norm]
    inputs = cases.make(case)

    def kept(x: Array, dy: Array | None = None) -> Any:
        """With running statistics of its own for each call."""
        running = {k: None if a is None else a.copy() for k, a in vars(inputs).items() if k.startswith("running")}
        return cases.calls(case, replace(inputs, x=x, dy=inputs.dy if dy is None else dy, **running), fn)

    saved = kept(inputs.x)[0]()[1:]
    return inputs, lambda x, **out: kept(x)[0](**out), lambda dy, x, **out: kept(x, dy)[1](*saved, **out)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_out_of_any_strides(norm: str, layout: Any) -> None:
    inputs, forward, backward = calls(norm)
    for call, given in ((forward, (inputs.x,)), (backward, (inputs.dy, inputs.x))):
        expected = call(*given)
        out = layout(np.full(inputs.x.shape, np.nan, np.float32))
        got = call(*given, out=out)
        assert got[0] is out
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("norm", NORMS)
def test_in_place(norm: str) -> None:
    inputs, forward, backward = calls(norm)
    x = inputs.x.copy()
    assert_same_bits(forward(x, out=x)[0], forward(inputs.x)[0])
    for where in ("dy", "x"):
        given = {"dy": inputs.dy.copy(), "x": inputs.x.copy()}
        dx = backward(given["dy"], given["x"], out=given[where])[0]
        assert dx is given[where]
        assert_same_bits(dx, backward(inputs.dy, inputs.x)[0])


def test_the_short_forms_are_the_forwards_y() -> None:
    """In PyTorch's order, every argument passed on."""
    x, weight, bias, logits = normal((4, 6, 5)), normal((6,)), normal((6,), seed=1), normal((2, 3))
    mask, running = np.random.default_rng(0).random((4, 5)) < 0.7, (np.zeros(6), 1 + normal((6,), seed=2) ** 2)
    x, g = np.moveaxis(x, 1, 0), normal((1, 4, 1))
    saved = {"running_mean": running[0], "running_var": running[1], "eps": 0.1, "axis": 0}
    given: list[tuple[Any, Any]] = [
        (
            lambda **out: fn.instance_norm(x, *running, weight, bias, False, 0.2, 0.1, axis=0, **out),
            fn.instance_norm_forward(x, weight, bias, use_input_stats=False, **saved),
        ),
        (
            lambda **out: fn.instance_norm(x, None, None, weight, bias, eps=0.1, axis=0, mask=mask, **out),
            fn.instance_norm_forward(x, weight, bias, eps=0.1, axis=0, mask=mask),
        ),
        (
            lambda **out: fn.group_norm(x, 2, weight, bias, 0.1, axis=0, mask=mask, **out),
            fn.group_norm_forward(x, 2, weight, bias, 0.1, axis=0, mask=mask),
        ),
        (
            lambda **out: fn.switchable_norm(x, *logits, *running, weight, bias, False, 0.2, 0.1, axis=0, **out),
            fn.switchable_norm_forward(x, *logits, weight, bias, training=False, **saved),
        ),
        (lambda **out: fn.weight_norm(x, g, 1, **out), fn.weight_norm_forward(x, g, 1)),
    ]
    for short, (y, *_) in given:
        out = np.empty_like(x)
        assert short(out=out) is out
        assert_same_bits(out, y)
        assert_same_bits(short(), y)


# Bits.


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_same_bits_at_any_number_of_threads(last: bool, threads: None, isa: str) -> None:
    shapes = [(2, 6, 300, 50), (64, 12, 9, 7), (1, 6, 100_000), (700, 12)]
    for shape in shapes:
        x, dy = normal(shape), normal(shape, seed=1)
        if last:
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        weight, axis = normal((shape[1],)), -1 if last else 1
        results = []
        for n in (1, 2, 3, 7):
            fn.set_num_threads(n)
            group = fn.group_norm_forward(x, 3, weight, axis=axis)
            found = [*group, *fn.group_norm_backward(dy, x, *group[1:], weight, axis=axis)]
            if len(shape) > 2:
                instance = fn.instance_norm_forward(x, weight, axis=axis)
                found += [*instance, *fn.instance_norm_backward(dy, x, *instance[1:], weight, axis=axis)]
            logits = normal((3,)), normal((3,), seed=1)
            switchable = fn.switchable_norm_forward(x, *logits, weight, axis=axis)
            found += [*switchable, *fn.switchable_norm_backward(dy, x, *switchable[1:], *logits, weight, axis=axis)]
            g = normal(tuple(k if a == axis % x.ndim else 1 for a, k in enumerate(x.shape)))
            w, norm = fn.weight_norm_forward(x, g, axis)
            found += [w, norm, *fn.weight_norm_backward(dy, x, g, norm, axis)]
            results.append(found)
        for other in results[1:]:
            for one, same in zip(results[0], other, strict=True):
                assert_same_bits(one, same, str(shape))


@pytest.mark.parametrize("shape", [(9, 6, 13, 5), (9, 6, 1030), (9, 6)])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_sample_does_not_know_its_neighbours(shape: tuple[int, ...], last: bool, isa: str) -> None:
    x, dy, weight, axis = normal(shape), normal(shape, seed=1), normal((6,)), -1 if last else 1
    if last:
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    for groups in (1, 2) if len(shape) == 2 else (1, 2, 6):
        y, mean, rstd = fn.group_norm_forward(x, groups, weight, axis=axis)
        dx = fn.group_norm_backward(dy, x, mean, rstd, weight, axis=axis)[0]
        for at in (slice(0, 1), slice(3, 5), slice(8, 9)):
            assert_same_bits(fn.group_norm(x[at], groups, weight, axis=axis), y[at])
            assert_same_bits(fn.group_norm_backward(dy[at], x[at], mean[at], rstd[at], weight, axis=axis)[0], dx[at])
        spoiled = x.copy()
        spoiled[4] = np.nan
        kept = [i for i in range(9) if i != 4]
        assert_same_bits(fn.group_norm(spoiled, groups, weight, axis=axis)[kept], y[kept])


def test_instance_norm_is_group_norm_with_one_channel_a_group() -> None:
    x, dy, weight, bias = normal((3, 5, 7, 4)), normal((3, 5, 7, 4), seed=1), normal((5,)), normal((5,), seed=2)
    instance, group = fn.instance_norm_forward(x, weight, bias), fn.group_norm_forward(x, 5, weight, bias)
    for one, other in zip(instance, group, strict=True):
        assert_same_bits(one, other)
    backward = fn.instance_norm_backward(dy, x, *instance[1:], weight, bias)
    for one, other in zip(backward, fn.group_norm_backward(dy, x, *group[1:], weight, bias), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)])
def test_zero_elements(shape: tuple[int, ...]) -> None:
    x, weight, running = np.empty(shape, np.float32), np.ones(shape[1], np.float32), np.ones((2, shape[1]))
    instance = fn.instance_norm_forward(x, weight, running_mean=running[0], running_var=running[1])
    group = fn.group_norm_forward(x, 2, weight)
    for (y, mean, rstd), groups, backward in (
        (instance, shape[1], fn.instance_norm_backward),
        (group, 2, fn.group_norm_backward),
    ):
        assert y.shape == shape
        assert mean.shape == rstd.shape == (shape[0], groups)
        dx, dweight, dbias = backward(y, x, mean, rstd, weight)
        assert dx.shape == shape
        np.testing.assert_array_equal((dweight, dbias), np.zeros((2, shape[1])))
    np.testing.assert_array_equal(running, 1)
    logits = np.ones(3, np.float32)
    y, *saved = fn.switchable_norm_forward(x, logits, logits, running_mean=running[0], running_var=running[1])
    assert y.shape == shape
    for gradient in fn.switchable_norm_backward(y, x, *saved, logits, logits)[1:]:
        assert not gradient.any()
    np.testing.assert_array_equal(running, 1)


# PyTorch.


def test_against_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x, dy, weight, bias = normal((5, 6, 7, 4)), normal((5, 6, 7, 4), seed=1), normal((6,)), normal((6,), seed=2)
    F = torch.nn.functional
    for ours, theirs in (
        (fn.instance_norm_forward(x, weight, bias), lambda x, w, b: F.instance_norm(x, None, None, w, b)),
        (fn.group_norm_forward(x, 3, weight, bias), lambda x, w, b: F.group_norm(x, 3, w, b)),
    ):
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, weight, bias)]
        y = theirs(*tensors)
        y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours[0], y.detach(), rtol=0, atol=2e-5)
        backward = fn.instance_norm_backward if ours[1].shape[1] == 6 else fn.group_norm_backward
        for one, tensor in zip(backward(dy, x, *ours[1:], weight, bias), tensors, strict=True):
            np.testing.assert_allclose(one, tensor.grad, rtol=0, atol=2e-4)
    running = np.zeros(6, np.float32), np.ones(6, np.float32)
    theirs_running = [torch.from_numpy(a.copy()) for a in running]
    for _ in range(3):
        fn.instance_norm(x, *running, momentum=0.3)
        F.instance_norm(torch.from_numpy(x), *theirs_running, momentum=0.3)
    for one, tensor in zip(running, theirs_running, strict=True):
        np.testing.assert_allclose(one, tensor, rtol=0, atol=1e-6)
    y = F.instance_norm(torch.from_numpy(x), *theirs_running, use_input_stats=False)
    np.testing.assert_allclose(fn.instance_norm(x, *running, use_input_stats=False), y, rtol=0, atol=1e-5)
    for dim in (0, 1, 2, 3):
        g = normal(tuple(n if a == dim else 1 for a, n in enumerate(x.shape)), seed=3)
        tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, g)]
        w = (
            torch._weight_norm(*tensors, dim)
            if dim in (0, 3)
            else tensors[1] * tensors[0] / torch.norm_except_dim(tensors[0], 2, dim)
        )
        w.backward(torch.from_numpy(dy))
        mine, norm = fn.weight_norm_forward(x, g, dim)
        np.testing.assert_allclose(mine, w.detach(), rtol=0, atol=1e-5)
        for one, tensor in zip(fn.weight_norm_backward(dy, x, g, norm, dim), tensors, strict=True):
            np.testing.assert_allclose(one, tensor.grad, rtol=0, atol=1e-4)


# Switchable norm's own.


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_pure_mixtures_are_the_norms_themselves(axis: int, training: bool) -> None:
    """Logits that leave one share: instance, layer and batch norm, forward and backward."""
    x, dy = (np.ascontiguousarray(np.moveaxis(normal((4, 5, 6, 7), seed=i), 1, axis)) for i in (0, 1))
    weight, bias = normal((5,), seed=2), normal((5,), seed=3)
    running = {"running_mean": normal((5,), seed=4), "running_var": 1 + normal((5,), seed=5) ** 2}
    given = dict(running if not training else {}, training=training)
    batch = fn.batch_norm_forward(x, weight, bias, **given, axis=axis)
    same = [
        (fn.instance_norm_forward(x, weight, bias, axis=axis), fn.instance_norm_backward, {}),
        (fn.group_norm_forward(x, 1, weight, bias, axis=axis), fn.group_norm_backward, {}),
        (batch, fn.batch_norm_backward, {"training": training}),
    ]
    for j, (forward, backward, options) in enumerate(same):
        logits = np.full(3, -1e4)
        logits[j] = 0
        y, *saved = fn.switchable_norm_forward(x, logits, logits, weight, bias, **given, axis=axis)
        np.testing.assert_allclose(y, forward[0], rtol=0, atol=1e-5)
        got = fn.switchable_norm_backward(dy, x, *saved, logits, logits, weight, bias, training=training, axis=axis)
        expected = backward(dy, x, *forward[1:], weight, bias, axis=axis, **options)
        for one, other in zip(got[:3], expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(got[3:], 0)


def test_switchable_norm_by_differences() -> None:
    """Of every argument, in float64, without the reference."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((3, 4, 2, 3)), rng.standard_normal((3, 4, 2, 3))
    arguments = [x, *(rng.standard_normal(n) for n in (3, 3, 4, 4))]
    _, *saved = fn.switchable_norm_forward(*arguments)
    gradients = fn.switchable_norm_backward(dy, x, *saved, *arguments[1:])
    ordered = [gradients[0], *gradients[3:], *gradients[1:3]]
    for argument, gradient in zip(arguments, ordered, strict=True):
        for at in np.ndindex(argument.shape):
            kept, h = argument[at], 1e-6
            values = []
            for argument[at] in (kept + h, kept - h):
                values.append(np.sum(fn.switchable_norm_forward(*arguments)[0] * dy))
            argument[at] = kept
            np.testing.assert_allclose(gradient[at], (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_what_switchable_norm_writes() -> None:
    """In evaluation nothing; else the batch's part."""
    running = np.zeros(4, np.float32), np.ones(4, np.float32)
    logits = np.ones(3, np.float32)
    x = normal((3, 4, 5))
    fn.switchable_norm(x, logits, logits, *running)
    np.testing.assert_array_equal(running, (np.zeros(4), np.ones(4)))
    fn.switchable_norm(x, logits, logits, *running, training=True, momentum=0.25)
    expected = np.zeros(4, np.float32), np.ones(4, np.float32)
    fn.batch_norm(x, *expected, training=True, momentum=0.25)
    for one, other in zip(running, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


# Weight norm's own.


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_length_for_all(shape: tuple[int, ...], order: Any) -> None:
    v, dw, g = np.array(normal(shape), order=order), np.array(normal(shape, seed=1)), np.array(1.5, np.float32)
    w, norm = fn.weight_norm_forward(v, g, None)
    want, want_norm = reference.weight_norm_forward(v, g, None)
    np.testing.assert_allclose(w, want, rtol=1e-6)
    np.testing.assert_allclose(norm, want_norm, rtol=1e-6)
    assert norm.shape == ()
    dv, dg = fn.weight_norm_backward(dw, v, g, norm, None)
    want_dv, want_dg = reference.weight_norm_backward(dw, v, g, want_norm, None)
    np.testing.assert_allclose(dv, want_dv, rtol=0, atol=2e-6 * 1.5 / norm * abs(dw).max())
    np.testing.assert_allclose(dg, want_dg, rtol=0, atol=1e-6 * abs(dw).sum())
    assert (dg.shape, dg.dtype) == ((), np.float32)


@pytest.mark.parametrize("first", ["nothing", "the integer"])
def test_what_only_equals_an_integer_is_refused(first: str) -> None:
    """Whether a call with the integer came before or not: layouts are cached."""
    shape = (2, 4, 6) if first == "nothing" else (2, 4, 8)
    x, v = normal(shape), normal((4, shape[2]))
    for call, right, wrong, kind in (
        (lambda axis: fn.batch_norm_forward(x, axis=axis), 1, (1.0, True, "1"), TypeError),
        (lambda axis: fn.instance_norm(x, axis=axis), 1, (1.0, True), TypeError),
        (lambda axis: fn.switchable_norm(x, np.ones(3), np.ones(3), training=True, axis=axis), 1, (1.0,), TypeError),
        (lambda size: fn.batch_norm_forward(x, ghost_batch_size=size), 1, (1.0, True), ValueError),
        (lambda groups: fn.group_norm(x, groups), 2, (2.0, "2"), TypeError),
        (lambda groups: fn.group_norm(x, groups), 1, (True,), TypeError),
        (lambda last: fn.layer_norm(x, last), shape[2], (float(shape[2]), [shape[2] + 0.5]), TypeError),
        (lambda last: fn.rms_norm(x, last), shape[1:], (tuple(map(float, shape[1:])),), TypeError),
        (lambda dim: fn.weight_norm(v, np.ones((4, 1), np.float32), dim), 0, (0.0, False), TypeError),
        (lambda axes: fn.moments(x, axes), (0, 1), (1.0, True, [0.0, 1.0]), TypeError),
        (fn.LayerNorm, 4, (4.7, [4.7]), TypeError),
        (lambda groups: fn.GroupNorm(groups, 4), 2, (2.0,), TypeError),
    ):
        if first == "the integer":
            call(right)
            call(np.int64(right) if isinstance(right, int) else list(right))
        for value in wrong:
            with pytest.raises(kind, match="integer"):
                call(value)


def test_the_stride_of_an_axis_of_length_1_means_nothing() -> None:
    x, dy = normal((1, 4, 5, 1)), normal((1, 4, 5, 1), seed=1)
    turned, dy_turned = x[::-1, ..., ::-1], dy[::-1, ..., ::-1]
    assert min(turned.strides) < 0
    layer = fn.BatchNorm(4)
    layer(turned)
    np.testing.assert_array_equal(
        layer.backward(dy_turned), fn.batch_norm_backward(dy, x, *fn.batch_norm_forward(x)[1:])[0]
    )
    running = np.zeros(4), np.ones(4)
    for call in (
        fn.batch_norm_forward,
        lambda a: fn.batch_norm(a, *running),
        fn.instance_norm_forward,
        lambda a: fn.group_norm_forward(a, 2),
        lambda a: fn.layer_norm_forward(a, (5, 1)),
        lambda a: fn.rms_norm_forward(a, (5, 1)),
        lambda a: fn.switchable_norm_forward(a, np.ones(3), np.ones(3)),
        lambda a: fn.moments(a, 0),
        lambda a: fn.weight_norm_forward(a, np.ones((1, 1, 1, 1))),
        lambda a: fn.Standardizer().fit_transform(a.reshape(4, 5)[:, :1][:, ::-1]),
        lambda a: fn.batch_norm_forward(a, mask=np.ones((1, 5, 1), bool)[::-1]),
    ):
        for one, other in zip(call(turned), call(x), strict=True):
            np.testing.assert_array_equal(one, other)


def test_directions_of_length_zero_are_nan_alone() -> None:
    v = normal((4, 5))
    v[2] = 0
    g = np.ones((4, 1), np.float32)
    w, norm = fn.weight_norm_forward(v, g)
    assert np.isnan(w[2]).all()
    assert norm[2] == 0
    assert np.isfinite(w[[0, 1, 3]]).all()
    dv, dg = fn.weight_norm_backward(np.ones_like(v), v, g, norm)
    assert np.isnan(dv[2]).all()
    assert np.isfinite(dv[[0, 1, 3]]).all()
    assert np.isfinite(dg[[0, 1, 3]]).all()
    w, norm = fn.weight_norm_forward(np.empty((3, 0), np.float32), np.ones((3, 1), np.float32))
    assert w.shape == (3, 0)
    np.testing.assert_array_equal(norm, np.zeros((3, 1)))


# Errors.

X = normal((2, 6, 3))
V, G = normal((4, 5)), normal((4, 1))
RUNNING = np.zeros(6, np.float32), np.ones(6, np.float32)
L = normal((3,))
READ_ONLY = np.ones(6, np.float32)
READ_ONLY.flags.writeable = False
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "divisible": (lambda: fn.group_norm(X, 4), ValueError, r"num_channels \(6\) must be divisible by num_groups \(4\)"),
    "no groups": (lambda: fn.group_norm(X, 0), ValueError, "num groups to be greater than 0, got 0"),
    "groups": (lambda: fn.group_norm(X, 2.0), TypeError, "integer"),
    "group 1-D": (lambda: fn.group_norm(X[0, 0], 1), ValueError, r"expected at least 2D input \(got 1D input\)"),
    "axis": (lambda: fn.group_norm(X, 1, axis=3), np.exceptions.AxisError, "out of bounds"),
    "spatial": (
        lambda: fn.instance_norm(X[:, :, :1]),
        ValueError,
        r"Expected more than 1 spatial element when training, got input size \(2, 6, 1\)",
    ),
    "spatial (N, C)": (lambda: fn.instance_norm(X[:, :, 0]), ValueError, "more than 1 spatial element"),
    "no running": (
        lambda: fn.instance_norm(X, use_input_stats=False),
        ValueError,
        "Expected running_mean and running_var to be defined when use_input_stats is false",
    ),
    "running size": (
        lambda: fn.instance_norm(X, *(a[:4] for a in RUNNING)),
        ValueError,
        "running_mean should contain 6",
    ),
    "momentum": (lambda: fn.instance_norm(X, *RUNNING, momentum=None), TypeError, "momentum must be a number"),
    "weight": (lambda: fn.group_norm(X, 2, normal((5,))), ValueError, "weight should contain 6 elements not 5"),
    "weight list": (lambda: fn.instance_norm(X, weight=[1.0] * 6), TypeError, "weight must be a NumPy or CuPy array"),
    "list": (lambda: fn.instance_norm([[1.0]]), TypeError, "x must be a NumPy or CuPy array"),
    "int": (lambda: fn.group_norm(np.ones((2, 6), int), 2), TypeError, "float32, float64, float16 and bfloat16"),
    "mask": (lambda: fn.group_norm(X, 2, mask=np.ones((2, 6), bool)), ValueError, r"without axis 1, \(2, 3\)"),
    "mask dtype": (lambda: fn.instance_norm(X, mask=np.ones((2, 3))), TypeError, "mask must be boolean"),
    "out": (lambda: fn.group_norm(X, 2, out=normal((2, 6, 2))), ValueError, r"\(2, 6, 3\).*\(2, 6, 2\)"),
    "out overlaps": (lambda: fn.group_norm(BIG[:2], 2, out=BIG[1:]), ValueError, "overlaps"),
    "mean": (
        lambda: fn.group_norm_backward(X, X, np.zeros((2, 4)), np.ones((2, 4))),
        ValueError,
        r"num_channels \(6\) must be divisible by num_groups \(4\)",
    ),
    "flat mean": (lambda: fn.group_norm_backward(X, X, np.zeros(2), np.ones(2)), ValueError, r"\(N, num_groups\)"),
    "rstd": (
        lambda: fn.instance_norm_backward(X, X, np.zeros((2, 6)), np.ones((2, 5))),
        ValueError,
        r"rstd must have shape \(2, 6\), got \(2, 5\)",
    ),
    "dy": (
        lambda: fn.instance_norm_backward(X[:1], X, np.zeros((2, 6)), np.ones((2, 6))),
        ValueError,
        "dy must have x's shape",
    ),
    "logits": (
        lambda: fn.switchable_norm(X, L[:2], L, training=True),
        ValueError,
        "mean_logits should contain 3 elements",
    ),
    "logits dtype": (
        lambda: fn.switchable_norm(X, L, np.ones(3, int), training=True),
        TypeError,
        "var_logits has dtype",
    ),
    "logits list": (
        lambda: fn.switchable_norm(X, [1.0] * 3, L, training=True),
        TypeError,
        "mean_logits must be a NumPy",
    ),
    "one value": (
        lambda: fn.switchable_norm(X[:1, :, :1], L, L, training=True),
        ValueError,
        "more than 1 value per channel",
    ),
    "evaluation": (lambda: fn.switchable_norm(X, L, L), ValueError, "to be defined when training=False"),
    "one running": (lambda: fn.switchable_norm(X, L, L, RUNNING[0], training=True), ValueError, "go together"),
    "running sizes": (
        lambda: fn.switchable_norm(X, L, L, RUNNING[0][:5], RUNNING[1], training=True),
        ValueError,
        "running_mean should contain 6 elements not 5",
    ),
    "running dtype": (
        lambda: fn.switchable_norm(X, L, L, np.zeros(6, int), RUNNING[1], training=True),
        TypeError,
        "running_mean has dtype",
    ),
    "running alike": (
        lambda: fn.switchable_norm(X, L, L, RUNNING[0], RUNNING[0], training=True),
        ValueError,
        "shares memory",
    ),
    "running is the bias": (
        lambda: fn.switchable_norm(X, L, L, *RUNNING, bias=RUNNING[1], training=True),
        ValueError,
        "running_var shares memory",
    ),
    "running read-only": (
        lambda: fn.switchable_norm(X, L, L, RUNNING[0], READ_ONLY, training=True),
        ValueError,
        "running_var is read-only",
    ),
    "switchable weight": (
        lambda: fn.switchable_norm(X, L, L, *RUNNING, normal((5,)), training=True),
        ValueError,
        "should contain 6 elements not 5",
    ),
    "switchable out": (
        lambda: fn.switchable_norm(BIG[:2], L, L, *RUNNING, training=True, out=BIG[1:]),
        ValueError,
        "overlaps",
    ),
    "switchable momentum": (
        lambda: fn.switchable_norm(X, L, L, *RUNNING, training=True, momentum=None),
        TypeError,
        "momentum must be a number",
    ),
    "means": (
        lambda: fn.switchable_norm_backward(X, X, np.zeros((2, 6)), np.ones((3, 2, 6)), np.ones((2, 6)), L, L),
        ValueError,
        r"means must have shape \(3, 2, 6\), got \(2, 6\)",
    ),
    "g": (lambda: fn.weight_norm(V, G[:3]), ValueError, r"g must have shape \(4, 1\), got \(3, 1\)"),
    "g of all": (lambda: fn.weight_norm(V, G, None), ValueError, r"g must have shape \(\)"),
    "dim": (lambda: fn.weight_norm(V, G, 2), np.exceptions.AxisError, "out of bounds"),
    "v": (lambda: fn.weight_norm(np.ones((4, 5), int), G), TypeError, "v has dtype int64"),
    "g dtype": (lambda: fn.weight_norm(V, np.ones((4, 1), int)), TypeError, "g has dtype int64"),
    "dw": (
        lambda: fn.weight_norm_backward(V[:2], V, G, G),
        ValueError,
        r"dw must have v's shape \(4, 5\), got \(2, 5\)",
    ),
    "norm": (
        lambda: fn.weight_norm_backward(V, V, G, np.ones(4)),
        ValueError,
        r"norm must have shape \(4, 1\), got \(4,\)",
    ),
    "layer groups": (lambda: fn.GroupNorm(4, 6), ValueError, r"num_channels \(6\) must be divisible"),
    "layer dtype": (lambda: fn.InstanceNorm(4, dtype="int32"), TypeError, "float32"),
    "layer channels": (lambda: fn.GroupNorm(1, 4)(X), ValueError, "weight should contain 6 elements not 4"),
    "layer backward": (lambda: fn.InstanceNorm(6).backward(X), RuntimeError, "backward needs a call"),
    "layer momentum": (lambda: fn.InstanceNorm(6, momentum="a"), TypeError, "momentum"),
    "layer dim": (lambda: fn.WeightNorm(V, 2), np.exceptions.AxisError, "out of bounds"),
    "layer weight": (lambda: fn.WeightNorm([[1.0]]), TypeError, "weight must be a NumPy or CuPy array"),
}
BIG = normal((3, 6, 3))


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_touch_nothing(call: Any, error: type[Exception], message: str) -> None:
    watched = X, V, G, BIG, L, *RUNNING
    before = [a.copy() for a in watched]
    with pytest.raises(error, match=message):
        call()
    for one, other in zip(watched, before, strict=True):
        assert_same_bits(one, other)


# Layers.


@pytest.mark.parametrize("axis", [1, -1])
def test_instance_norm_layer(axis: int) -> None:
    x, dy = (np.moveaxis(normal((4, 5, 6, 3), seed=i), 1, axis).copy() for i in (0, 1))
    layer = fn.InstanceNorm(5, momentum=None, affine=True, track_running_stats=True, axis=axis)
    layer.weight, layer.bias = normal((5,), seed=2), normal((5,), seed=3)
    running = np.zeros(5), np.ones(5)
    for i in range(3):
        y, mean, rstd = reference.instance_norm_forward(
            x + i, layer.weight, layer.bias, running_mean=running[0], running_var=running[1], momentum=1 / (i + 1),
            axis=axis,
        )  # fmt: skip
        np.testing.assert_allclose(layer((x + i).astype(np.float32)), y, rtol=0, atol=1e-5)
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(layer.running_mean, running[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.running_var, running[1], rtol=1e-5)
    x = (x + 2).astype(np.float32)
    gradients = reference.instance_norm_backward(dy, x, mean, rstd, layer.weight, layer.bias, axis=axis)
    for ours, theirs in zip((layer.backward(dy), layer.weight_grad, layer.bias_grad), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    y = layer.eval()(x)
    want = reference.instance_norm(x, *running, layer.weight, layer.bias, use_input_stats=False, axis=axis)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
    assert layer.num_batches_tracked == 3
    scale = layer.weight / np.sqrt(layer.running_var + layer.eps)
    np.testing.assert_allclose(layer.backward(dy), dy * np.moveaxis(scale[None, :, None, None], 1, axis), rtol=1e-5)


def test_the_defaults_are_pytorch_s() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for ours, theirs in (
        (fn.InstanceNorm(3), torch.nn.InstanceNorm2d(3)),
        (
            fn.InstanceNorm(3, affine=True, track_running_stats=True),
            torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        ),
        (fn.GroupNorm(1, 3), torch.nn.GroupNorm(1, 3)),
        (fn.GroupNorm(3, 3, affine=False), torch.nn.GroupNorm(3, 3, affine=False)),
    ):
        state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
        assert ours.state_dict().keys() == state.keys()
        ours.load_state_dict(state)
        assert ours.eps == theirs.eps
        x = normal((4, 3, 5, 5))
        np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).detach(), rtol=0, atol=1e-5)
        x = normal((4, 3, 5, 5), seed=1)
        np.testing.assert_allclose(ours.eval()(x), theirs.eval()(torch.from_numpy(x)).detach(), rtol=0, atol=1e-5)
    linear = torch.nn.Linear(5, 4, bias=False)
    mine = fn.WeightNorm(linear.weight.detach().numpy())
    normed = torch.nn.utils.parametrizations.weight_norm(linear)
    for ours, theirs in zip((mine.weight_g, mine.weight_v), normed.parametrizations.weight.parameters(), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-6)


def test_group_norm_layer() -> None:
    x, dy = normal((4, 6, 5)), normal((4, 6, 5), seed=1)
    mask = np.random.default_rng(0).random((4, 5)) < 0.6
    layer = fn.GroupNorm(2, 6, eps=1e-3)
    layer.weight, layer.bias = normal((6,), seed=2), normal((6,), seed=3)
    for counted in (None, mask):
        y, mean, rstd = reference.group_norm_forward(x, 2, layer.weight, layer.bias, 1e-3, mask=counted)
        np.testing.assert_allclose(layer(x, counted), y, rtol=0, atol=1e-5)
        gradients = reference.group_norm_backward(dy, x, mean, rstd, layer.weight, layer.bias, mask=counted)
        for ours, theirs in zip((layer.backward(dy), layer.weight_grad, layer.bias_grad), gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert layer.backward(dy, out=out) is out


@pytest.mark.parametrize("axis", [1, -1])
def test_switchable_norm_layer(axis: int) -> None:
    x, dy = (np.moveaxis(normal((4, 5, 6, 3), seed=i), 1, axis).copy() for i in (0, 1))
    layer = fn.SwitchableNorm(5, momentum=None, axis=axis)
    np.testing.assert_array_equal((layer.mean_logits, layer.var_logits), 1)
    layer.weight, layer.bias, layer.mean_logits, layer.var_logits = (normal((n,), seed=n) for n in (5, 5, 3, 3))
    layer.var_logits[0] += 1
    running = np.zeros(5), np.ones(5)
    parameters = layer.mean_logits, layer.var_logits, layer.weight, layer.bias
    for i in range(3):
        y, *saved = reference.switchable_norm_forward(
            x + i, *parameters, running_mean=running[0], running_var=running[1], momentum=1 / (i + 1), axis=axis
        )
        np.testing.assert_allclose(layer((x + i).astype(np.float32)), y, rtol=0, atol=1e-5)
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(layer.running_mean, running[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.running_var, running[1], rtol=1e-5)
    gradients = reference.switchable_norm_backward(dy, (x + 2).astype(np.float32), *saved, *parameters, axis=axis)
    mine = layer.backward(dy), layer.weight_grad, layer.bias_grad, layer.mean_logits_grad, layer.var_logits_grad
    for ours, theirs in zip(mine, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    want = reference.switchable_norm(x, *parameters[:2], *running, *parameters[2:], axis=axis)
    np.testing.assert_allclose(layer.eval()(x), want, rtol=0, atol=1e-5)
    assert layer.num_batches_tracked == 3
    own = fn.SwitchableNorm(5, affine=False, track_running_stats=False, axis=axis).eval()
    np.testing.assert_array_equal(own(x), own.train()(x))
    own.backward(dy)
    assert own.weight_grad is None
    assert own.mean_logits_grad is not None


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weight_norm_layer(dim: int | None, dtype: str) -> None:
    weight = normal((4, 3, 5), dtype)
    tolerance = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 0.05}[dtype]
    layer = fn.WeightNorm(weight, dim)
    assert not np.shares_memory(layer.weight_v, weight)
    assert layer.weight_g.dtype == layer.weight_v.dtype == weight.dtype
    np.testing.assert_allclose(layer.fold().astype(float), weight.astype(float), rtol=tolerance, atol=tolerance)
    layer.weight_g = 2 * layer.weight_g
    np.testing.assert_allclose(layer().astype(float), 2 * weight.astype(float), rtol=tolerance, atol=tolerance)
    dw = normal((4, 3, 5), dtype, seed=1)
    assert layer.backward(dw) is None
    wide = layer.weight_v.astype(float), layer.weight_g.astype(float)
    dv, dg = reference.weight_norm_backward(dw, *wide, reference.weight_norm_forward(*wide, dim)[1], dim)
    for ours, theirs in ((layer.weight_v_grad, dv), (layer.weight_g_grad, dg)):
        assert ours is not None
        assert ours.shape == theirs.shape
        assert ours.dtype == weight.dtype
        np.testing.assert_allclose(ours.astype(float), theirs, rtol=tolerance, atol=10 * tolerance)
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(dw)
    layer.fold()
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(dw)
    out = np.empty_like(weight)
    assert layer(out=out) is out


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (fn.InstanceNorm(3), []),
        (fn.InstanceNorm(3, affine=True), ["weight", "bias"]),
        (
            fn.InstanceNorm(3, track_running_stats=True, dtype="float64"),
            ["running_mean", "running_var", "num_batches_tracked"],
        ),
        (fn.GroupNorm(3, 3), ["weight", "bias"]),
        (fn.GroupNorm(1, 3, affine=False), []),
        (
            fn.SwitchableNorm(3),
            ["weight", "bias", "running_mean", "running_var", "mean_logits", "var_logits", "num_batches_tracked"],
        ),
        (fn.SwitchableNorm(3, affine=False, track_running_stats=False), ["mean_logits", "var_logits"]),
        (fn.WeightNorm(normal((4, 3))), ["weight_g", "weight_v"]),
    ],
    ids=repr,
)
def test_the_state_of_layers(layer: Any, names: list[str]) -> None:
    assert list(layer.state_dict()) == names
    x = () if isinstance(layer, fn.WeightNorm) else (normal((4, 3, 5)),)
    dy = normal((4, 3)) if isinstance(layer, fn.WeightNorm) else x[0]
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        again.load_state_dict(layer.state_dict())
        assert_same_bits(again(*x), layer(*x))
        copied = copy.deepcopy(again)
        with pytest.raises(RuntimeError, match="backward needs a call"):
            copied.backward(dy)
        again.backward(dy)
    with pytest.raises(KeyError, match="Unexpected"):
        layer.load_state_dict({**layer.state_dict(), "other": np.zeros(3)})
    for name in ("weight", "bias", "weight_g", "running_mean"):
        if hasattr(type(layer), name) and name not in names:
            with pytest.raises(AttributeError, match=f"this layer has no {name}"):
                setattr(layer, name, np.zeros(3))
    assert layer.eval() is layer
    assert layer.to("cpu") is layer


# The comparison that test_cases.py relies on.


@pytest.mark.parametrize("norm", NORMS)
def test_the_comparison_sees_an_error(norm: str) -> None:
    """Positive control: one element of the library's own result, moved by four bounds."""
    case = NORMS[norm]
    inputs = cases.make(case)
    expected, got = cases.expected(case, inputs), cases.run(case, inputs, fn)
    bounds = cases.bounds(case, inputs, expected)
    assert bounds.keys() == {name for name, array in vars(got).items() if array is not None} - {"rstd"} | {"var"}
    for name in bounds.keys() - {"var"}:
        planted = np.array(getattr(got, name))
        last = np.unravel_index(planted.size - 1, planted.shape)
        if bounds[name][last] == 0:  # given statistics
            continue
        planted[last] += 4 * bounds[name][last]
        found = cases.compare(case, inputs, expected, replace(got, **{name: planted}))
        assert [deviation.name for deviation in found if not deviation.ok] == [name]
