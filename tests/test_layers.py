"""The layer by its contract: what a call does to it, what it keeps, what travels."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import reference
from support import DTYPES, Array, assert_same_bits, normal, numpy_dtype

NAMES = ("weight", "bias", "running_mean", "running_var")


def snapshot(layer: fn.BatchNorm) -> dict[str, Any]:
    arrays = {name: getattr(layer, name) for name in (*NAMES, "weight_grad", "bias_grad")}
    state = {name: None if a is None else a.copy() for name, a in arrays.items()}
    return state | {"num_batches_tracked": layer.num_batches_tracked, "training": layer.training}


def assert_unchanged(layer: fn.BatchNorm, before: dict[str, Any]) -> None:
    for name, want in before.items():
        got = getattr(layer, name)
        if isinstance(want, np.ndarray):
            assert_same_bits(got, want, name)
        else:
            assert got is want if want is None else got == want, name


def trained(channels: int = 4, **options: Any) -> fn.BatchNorm:
    """A layer whose every number is its own."""
    layer = fn.BatchNorm(channels, **options)
    if layer.affine:
        layer.weight = normal((channels,), seed=1)
        layer.bias = normal((channels,), seed=2)
    for seed in (3, 4):
        layer(normal((6, channels, 5), seed=seed))
    return layer


def test_a_new_layer() -> None:
    layer = fn.BatchNorm(5)
    assert layer.training
    assert layer.num_batches_tracked == 0
    assert_same_bits(layer.weight, np.ones(5, np.float32))
    assert_same_bits(layer.bias, np.zeros(5, np.float32))
    assert_same_bits(layer.running_mean, np.zeros(5, np.float32))
    assert_same_bits(layer.running_var, np.ones(5, np.float32))
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (1e-5, 0.1, True, True)
    assert layer.weight_grad is None
    assert layer.bias_grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_and_evaluation_are_the_functions(dtype: str) -> None:
    x, dy = normal((6, 5, 7), dtype), normal((6, 5, 7), dtype, 1)
    layer = fn.BatchNorm(5, eps=1e-3, momentum=0.3, activation="silu")
    layer.weight = normal((5,), seed=2)
    layer.bias = normal((5,), seed=3)
    m, v = np.zeros(5, np.float32), np.ones(5, np.float32)
    for _ in range(2):
        y = layer(x)
        options: dict[str, Any] = {"activation": "silu"}
        want, mean, rstd = fn.batch_norm_forward(
            x, layer.weight, layer.bias, running_mean=m, running_var=v, momentum=0.3, eps=1e-3, **options
        )
        assert_same_bits(y, want)
        dx = layer.backward(dy)
        want_dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, layer.weight, layer.bias, **options)
        assert_same_bits(dx, want_dx)
        assert_same_bits(layer.weight_grad, dweight)
        assert_same_bits(layer.bias_grad, dbias)
        assert_same_bits(layer.running_mean, m)
        assert_same_bits(layer.running_var, v)
    assert layer.num_batches_tracked == 2

    assert layer.eval() is layer
    assert not layer.training
    before = snapshot(layer)
    assert_same_bits(layer(x), fn.batch_norm(x, m, v, layer.weight, layer.bias, eps=1e-3, **options))
    assert_unchanged(layer, before)
    dx = layer.backward(dy)
    want_dx, _, _ = fn.batch_norm_backward(
        dy, x, m, 1 / np.sqrt(v.astype(float) + 1e-3), layer.weight, layer.bias, training=False, **options
    )
    assert_same_bits(dx, want_dx)
    assert layer.train() is layer
    assert layer.training
    assert not layer.train(False).training


def test_the_mode_of_the_call_is_the_mode_of_its_backward() -> None:
    x, dy = normal((6, 4)), normal((6, 4), seed=1)
    layer = trained()
    want = copy.deepcopy(layer)
    layer(x)
    layer.eval()
    want(x)
    assert_same_bits(layer.backward(dy), want.backward(dy))


def test_without_running_statistics() -> None:
    x = normal((6, 4, 5))
    layer = fn.BatchNorm(4, track_running_stats=False)
    assert layer.running_mean is None
    assert layer.running_var is None
    y = layer(x)
    assert_same_bits(y, fn.batch_norm_forward(x, layer.weight, layer.bias)[0])
    layer.eval()
    assert_same_bits(layer(x), y)
    dx = layer.backward(x)
    layer.train()(x)
    assert_same_bits(layer.backward(x), dx)
    assert layer.num_batches_tracked in (0, None)
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer.eval()(normal((1, 4)))


def test_without_parameters() -> None:
    x = normal((6, 4))
    layer = fn.BatchNorm(4, affine=False)
    assert layer.weight is None
    assert layer.bias is None
    assert_same_bits(layer(x), fn.batch_norm_forward(x)[0])
    layer.backward(x)
    assert layer.weight_grad is None
    assert layer.bias_grad is None
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = np.ones(4)
    assert set(layer.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("ghost", [None, 4])
def test_cumulative_average(ghost: int | None) -> None:
    """momentum=None: the running statistics are the mean of those of all batches so far."""
    layer = fn.BatchNorm(5, momentum=None, ghost_batch_size=ghost, dtype="float64")
    means, variances = [], []
    for seed, n in enumerate((6, 9, 13)):
        x = normal((n, 5, 7), "float64", seed)
        layer(x)
        for start in range(0, n, ghost or n):
            part = x[start : start + (ghost or n)]
            means.append(part.mean(axis=(0, 2)))
            variances.append(part.var(axis=(0, 2), ddof=1))
        assert layer.num_batches_tracked == len(means)
        np.testing.assert_allclose(layer.running_mean, np.mean(means, axis=0), atol=1e-14)
        np.testing.assert_allclose(layer.running_var, np.mean(variances, axis=0), rtol=1e-13)
        assert layer.momentum is None
    # Evaluation does not count.
    layer.eval()(x)
    assert layer.num_batches_tracked == len(means)


def test_ghost_batches_count_each() -> None:
    layer = fn.BatchNorm(5, ghost_batch_size=4)
    m, v = np.zeros(5, np.float32), np.ones(5, np.float32)
    x = normal((10, 5, 7))
    y = layer(x)
    for start in (0, 4, 8):
        part = fn.batch_norm(x[start : start + 4], m, v, training=True)
        assert_same_bits(y[start : start + 4], part)
    assert layer.num_batches_tracked == 3
    assert_same_bits(layer.running_mean, m)
    assert_same_bits(layer.running_var, v)
    dx = layer.backward(x)
    for start in (0, 4, 8):
        part = x[start : start + 4]
        _, mean, rstd = fn.batch_norm_forward(part)
        assert_same_bits(dx[start : start + 4], fn.batch_norm_backward(part, part, mean, rstd)[0])


def test_an_empty_batch_counts_for_nothing() -> None:
    layer = trained()
    before = snapshot(layer)
    y = layer(normal((0, 4, 5)))
    assert y.shape == (0, 4, 5)
    assert_unchanged(layer, before)
    assert layer.backward(y).shape == (0, 4, 5)
    assert_same_bits(layer.weight_grad, np.zeros(4, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameter_dtypes(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    for wanted in (dtype, kind, kind.type):
        layer = fn.BatchNorm(4, dtype=wanted)
        layer(normal((6, 4)))
        layer.backward(normal((6, 4)))
        for name in (*NAMES, "weight_grad", "bias_grad"):
            assert getattr(layer, name).dtype == kind
    # A float64 array into a default layer just works.
    layer = fn.BatchNorm(4)
    x = normal((6, 4), "float64")
    assert layer(x).dtype == np.float64
    assert layer.backward(x).dtype == np.float64
    assert layer.weight_grad is not None
    assert layer.weight_grad.dtype == np.float32


def test_channels_last() -> None:
    x, dy = normal((6, 7, 4)), normal((6, 7, 4), seed=1)
    layer = fn.BatchNorm(4, axis=-1)
    y = layer(x)
    want, mean, rstd = fn.batch_norm_forward(x, axis=-1)
    assert_same_bits(y, want)
    assert_same_bits(layer.backward(dy), fn.batch_norm_backward(dy, x, mean, rstd, axis=-1)[0])


# backward


def test_backward_consumes_the_call() -> None:
    layer = fn.BatchNorm(4)
    x = normal((6, 4))
    with pytest.raises(RuntimeError, match="backward"):
        layer.backward(x)
    layer(x)
    layer.backward(x)
    grad = layer.weight_grad
    with pytest.raises(RuntimeError, match="backward"):
        layer.backward(x)
    assert layer.weight_grad is grad
    layer(x)
    layer(2 * x)  # the last call counts
    want = fn.BatchNorm(4)
    want(2 * x)
    assert_same_bits(layer.backward(x), want.backward(x))


def test_backward_overwrites_the_gradients() -> None:
    layer = fn.BatchNorm(4)
    x, dy = normal((6, 4)), normal((6, 4), seed=1)
    layer(x)
    layer.backward(dy)
    assert layer.weight_grad is not None
    first = layer.weight_grad.copy()
    layer(x)
    layer.backward(dy)
    assert_same_bits(layer.weight_grad, first)


def test_a_failed_backward_may_be_tried_again() -> None:
    layer = trained()
    x, dy = normal((6, 4)), normal((6, 4), seed=1)
    layer(x)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(5, 4\)"):
        layer.backward(dy[:5])
    with pytest.raises(TypeError, match="float64"):
        layer.backward(dy.astype(np.float64))
    assert_unchanged(layer, before)
    layer.backward(dy)


def test_residual() -> None:
    x, r, dy = (normal((6, 4, 5), seed=seed) for seed in range(3))
    layer = fn.BatchNorm(4, activation="relu")
    y = layer(x, residual=r)
    want, mean, rstd = fn.batch_norm_forward(x, residual=r, activation="relu")
    assert_same_bits(y, want)
    result = layer.backward(dy)
    assert isinstance(result, tuple)
    dx, dresidual = result
    want_dx, _, _, want_dresidual = fn.batch_norm_backward(dy, x, mean, rstd, residual=r, activation="relu")
    assert_same_bits(dx, want_dx)
    assert_same_bits(dresidual, want_dresidual)
    layer(x)
    assert isinstance(layer.backward(dy), np.ndarray)


def test_references_are_kept_until_backward_or_the_next_call() -> None:
    layer = fn.BatchNorm(4)

    class Own(np.ndarray):  # type: ignore[type-arg]
        """A ndarray that can be referred to weakly in every version of NumPy."""

    def call() -> Any:
        x = normal((6, 4)).view(Own)
        layer(x, residual=x)
        return weakref.ref(x)

    kept = call()
    gc.collect()
    assert kept() is not None
    layer.backward(normal((6, 4)))
    gc.collect()
    assert kept() is None
    kept = call()
    layer(normal((6, 4)))
    gc.collect()
    assert kept() is None


def test_saved_state_is_per_thread() -> None:
    layer = fn.BatchNorm(4).eval()
    x = normal((6, 4))
    layer(x)
    failures: list[BaseException] = []

    def other() -> None:
        try:
            with pytest.raises(RuntimeError, match="backward"):
                layer.backward(x)
            layer(2 * x)
            layer.backward(x)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not failures
    layer.backward(x)  # what this thread saved is still there


def test_saved_state_is_neither_pickled_nor_copied() -> None:
    layer = trained(activation=("leaky_relu", 0.2), ghost_batch_size=3, axis=-2, momentum=None)
    x = normal((6, 4, 5))
    layer(x)
    clones = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)]
    for clone in clones:
        assert_unchanged(clone, snapshot(layer))
        with pytest.raises(RuntimeError, match="backward"):
            clone.backward(x)
        assert repr(clone) == repr(layer)
    for clone in clones[:2]:
        for name in NAMES:
            assert not np.shares_memory(getattr(clone, name), getattr(layer, name))
    wanted = [layer(x)]
    wanted += [layer.backward(x), layer.running_var]
    for clone in clones[:2]:
        for want, got in zip(wanted, [clone(x), clone.backward(x), clone.running_var], strict=True):
            assert_same_bits(got, want)


def test_pickles_are_small() -> None:
    """Neither x nor gradients of another size travel along."""
    layer = fn.BatchNorm(4)
    layer(normal((1000, 4)))
    assert len(pickle.dumps(layer)) < 4000


# Parameters.


def test_assigning_copies() -> None:
    layer = fn.BatchNorm(4)
    for name in NAMES:
        own = getattr(layer, name)
        value = np.arange(4.0) + 1
        setattr(layer, name, value)
        assert getattr(layer, name) is own
        value[0] = 9
        assert own[0] == 1
        before = own.copy()
        for wrong in (np.ones(3), np.ones((1, 4)), np.float32(1), None):
            with pytest.raises((ValueError, TypeError)):
                setattr(layer, name, wrong)
        assert_same_bits(own, before)
    layer.weight = [1, 2, 3, 4]
    assert_same_bits(layer.weight, np.arange(1, 5, dtype=np.float32))


def test_in_place_steps_are_seen() -> None:
    layer = fn.BatchNorm(4)
    x = normal((6, 4))
    assert layer.weight is not None
    layer.weight -= 0.5
    layer.weight[...] *= 2
    assert_same_bits(layer(x), fn.batch_norm_forward(x, np.ones(4, np.float32), np.zeros(4))[0])


def test_scale_shift() -> None:
    layer = trained(eps=1e-3, dtype="float64").eval()
    x = normal((6, 4, 5), "float64")
    scale, shift = layer.scale_shift()
    assert scale.shape == shift.shape == (4,)
    np.testing.assert_allclose(x * scale[:, None] + shift[:, None], layer(x), rtol=1e-13, atol=1e-13)
    plain = trained(affine=False, dtype="float64").eval()
    scale, shift = plain.scale_shift()
    np.testing.assert_allclose(x * scale[:, None] + shift[:, None], plain(x), rtol=1e-13, atol=1e-13)
    with pytest.raises(RuntimeError, match="running"):
        fn.BatchNorm(4, track_running_stats=False).scale_shift()


def test_folding_into_the_layer_before() -> None:
    """A linear layer, then batch norm in evaluation: one linear layer."""
    layer = trained(dtype="float64").eval()
    w, b, x = normal((4, 3), "float64"), normal((4,), "float64"), normal((6, 3), "float64")
    scale, shift = layer.scale_shift()
    folded = x @ (w * scale[:, None]).T + (b * scale + shift)
    np.testing.assert_allclose(folded, layer(x @ w.T + b), rtol=1e-12, atol=1e-13)


# State.


def test_state_dict_copies_and_round_trips() -> None:
    layer = trained()
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"] == 2
    assert state["num_batches_tracked"].dtype == np.int64
    for name in NAMES:
        assert_same_bits(state[name], getattr(layer, name))
        assert not np.shares_memory(state[name], getattr(layer, name))
    other = fn.BatchNorm(4)
    own = {name: getattr(other, name) for name in NAMES}
    other.load_state_dict(state)
    for name in NAMES:
        assert getattr(other, name) is own[name]
        assert_same_bits(own[name], state[name])
    assert other.num_batches_tracked == 2
    assert isinstance(other.num_batches_tracked, int)
    state["weight"][0] = 77
    assert other.weight is not None
    assert other.weight[0] != 77
    # As PyTorch's older files: without the counter.
    del state["num_batches_tracked"]
    other.load_state_dict(state)


def test_load_errors_change_nothing() -> None:
    layer = trained()
    before = snapshot(layer)
    good = {name: value + 1 for name, value in fn.BatchNorm(4).state_dict().items()}
    wrong: list[dict[str, Any]] = [
        {"running_var": np.ones(3)},
        {"running_var": np.ones((4, 1))},
        {"running_var": np.float32(1)},
        {"running_var": np.array(list("abcd"))},
        {"running_var": np.array([None] * 4)},
        {"num_batches_tracked": np.ones(2, int)},
        {"num_batches_tracked": np.array("many")},
        {"num_batches_tracked": np.array(np.nan)},
        {"surprise": np.ones(4)},
    ]
    for change in wrong:
        with pytest.raises((ValueError, KeyError, TypeError)):
            layer.load_state_dict(good | change)
        assert_unchanged(layer, before)
    for name in NAMES:
        with pytest.raises(KeyError, match=name):
            layer.load_state_dict({key: value for key, value in good.items() if key != name})
        assert_unchanged(layer, before)


def test_pytorch_takes_the_state_and_gives_it_back() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer = trained()
    module = torch.nn.BatchNorm2d(4)
    module.load_state_dict({name: torch.from_numpy(np.asarray(a)) for name, a in layer.state_dict().items()})
    assert int(module.num_batches_tracked) == 2
    x, dy = normal((6, 4, 3, 5), seed=7), normal((6, 4, 3, 5), seed=8)
    for mode in (False, True, True):
        module.train(mode)
        layer.train(mode)
        t = torch.from_numpy(x).clone().requires_grad_()
        module.zero_grad()
        theirs = module(t)
        theirs.backward(torch.from_numpy(dy))
        # 33 u of each side on numbers below 10.
        np.testing.assert_allclose(layer(x), theirs.detach().numpy(), atol=4e-5)
        np.testing.assert_allclose(layer.backward(dy), t.grad.numpy(), atol=4e-5)
        np.testing.assert_allclose(layer.weight_grad, module.weight.grad.numpy(), atol=1e-4)
        np.testing.assert_allclose(layer.bias_grad, module.bias.grad.numpy(), atol=1e-4)
    back = fn.BatchNorm(4)
    back.load_state_dict(module.state_dict())
    for name in NAMES:
        np.testing.assert_allclose(getattr(back, name), getattr(layer, name), rtol=1e-5, atol=1e-6)
    assert back.num_batches_tracked == layer.num_batches_tracked == 4


def test_pytorch_s_cumulative_average() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer, module = fn.BatchNorm(4, momentum=None), torch.nn.BatchNorm1d(4, momentum=None)
    for seed in range(4):
        x = normal((5 + seed, 4, 3), seed=seed)
        layer(x)
        module(torch.from_numpy(x))
    np.testing.assert_allclose(layer.running_mean, module.running_mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(layer.running_var, module.running_var.numpy(), rtol=2e-6)


# Errors.


CALLS: dict[str, tuple[Any, Any, Any, str]] = {
    "one value": (normal((1, 4)), {}, ValueError, r"Expected more than 1 value per channel .* \(1, 4\)"),
    "channels": (normal((6, 5)), {}, ValueError, "should contain 5 elements not 4"),
    "1-D": (normal((4,)), {}, ValueError, r"expected at least 2D input \(got 1D input\)"),
    "list": ([[1.0] * 4] * 2, {}, TypeError, "CuPy array|of a GPU"),
    "int": (np.ones((6, 4), int), {}, TypeError, "float32"),
    "masked": (np.ma.masked_array(normal((6, 4))), {}, TypeError, "masked"),
    "residual shape": (normal((6, 4)), {"residual": normal((6, 3))}, ValueError, r"\(6, 4\).*\(6, 3\)"),
    "residual dtype": (normal((6, 4)), {"residual": normal((6, 4), "float64")}, TypeError, "float64"),
    "out": (normal((6, 4)), {"out": normal((5, 4))}, ValueError, r"\(6, 4\).*\(5, 4\)"),
}


@pytest.mark.parametrize(("x", "options", "error", "message"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_failed_call_changes_nothing(x: Any, options: Any, error: Any, message: str, momentum: Any) -> None:
    layer = trained(momentum=momentum)
    good = normal((6, 4))
    layer(good)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer(x, **options)
    assert_unchanged(layer, before)
    with pytest.raises(RuntimeError, match="did not fail"):
        layer.backward(good)  # not of the call before


def test_a_read_only_running_statistic_is_an_error_in_training() -> None:
    layer = trained()
    before = snapshot(layer)
    assert layer.running_var is not None
    layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var is read-only"):
        layer(normal((6, 4)))
    assert_unchanged(layer, before)
    layer.eval()(normal((6, 4)))


def test_devices() -> None:
    layer = fn.BatchNorm(4, device="cpu")
    assert layer.device == "cpu"
    assert layer.to("cpu") is layer
    for device in ("cuda", "cuda:99") if fn.build_info()["cuda"].startswith("not built") else ("cuda:99",):
        with pytest.raises(RuntimeError, match=rf"{device}' is not to be had: (in this fusednorm CUDA is|CuPy|.*GPU)"):
            fn.BatchNorm(4, device=device)
        with pytest.raises(RuntimeError, match="not to be had"):
            layer.to(device)
    for device in ("gpu", "cpu:0:0", "cuda:", "cuda:-1", "cuda0", ""):
        with pytest.raises(ValueError, match="device"):
            layer.to(device)
    assert layer.device == "cpu"


def test_an_array_elsewhere_is_a_type_error() -> None:
    class Elsewhere:
        __cuda_array_interface__ = {"shape": (6, 4), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012

    layer = fn.BatchNorm(4)
    before = snapshot(layer)
    with pytest.raises(TypeError, match=r"CuPy array|of a GPU"):
        layer(Elsewhere())  # type: ignore[arg-type]
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(TypeError, match=r"CuPy array|of a GPU"):
        layer(torch.ones(6, 4))
    assert_unchanged(layer, before)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float128", "bool", "O"])
def test_parameters_of_other_dtypes_are_a_type_error(dtype: str) -> None:
    with pytest.raises(TypeError, match="float32, float64, float16 or bfloat16"):
        fn.BatchNorm(4, dtype=dtype)


def test_an_unknown_activation_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="relu"):
        fn.BatchNorm(4, activation="gelu")


def test_repr_says_what_was_asked_for() -> None:
    layer = fn.BatchNorm(4, eps=1e-3, momentum=None, axis=-1, activation="relu", ghost_batch_size=2)
    for part in ("BatchNorm(4", "eps=0.001", "momentum=None", "affine=True", "axis=-1", "'relu'", "ghost_batch_size=2"):
        assert part in repr(layer)


def test_two_layers_with_relu_learn() -> None:
    """Gradients of a small network, by central differences in float64: what backward returns is what comes before."""
    x, target = normal((7, 3), "float64"), normal((7, 2), "float64", 1)
    w = normal((3, 2), "float64", 2)
    one = fn.BatchNorm(3, activation="silu", dtype="float64")
    two = fn.BatchNorm(2, dtype="float64")

    def loss() -> float:
        return float(0.5 * np.sum((two(one(x) @ w) - target) ** 2))

    out = two(one(x) @ w)
    dx = one.backward(two.backward(out - target) @ w.T)
    for parameter, gradient in ((x, dx), (one.weight, one.weight_grad), (one.bias, one.bias_grad)):
        assert parameter is not None
        assert gradient is not None
        for index in np.ndindex(parameter.shape):
            old, step = parameter[index], 1e-5
            parameter[index] = old + step
            above = loss()
            parameter[index] = old - step
            below = loss()
            parameter[index] = old
            # Truncation step² and rounding u·loss/step are both near 1e-10.
            np.testing.assert_allclose(gradient[index], (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_reference_agrees_over_a_few_steps() -> None:
    layer = fn.BatchNorm(4, activation="tanh", dtype="float64")
    weight, bias, m, v = np.ones(4), np.zeros(4), np.zeros(4), np.ones(4)
    for seed in range(5):
        x, dy = normal((9, 4, 5), "float64", seed), normal((9, 4, 5), "float64", seed + 50)
        want, mean, rstd = reference.batch_norm_forward(
            x, weight, bias, running_mean=m, running_var=v, activation="tanh"
        )
        _, dweight, dbias = reference.batch_norm_backward(dy, x, mean, rstd, weight, bias, activation="tanh")
        np.testing.assert_allclose(layer(x), want, atol=1e-12)
        layer.backward(dy)
        for own, gradient, other, wanted in (
            (layer.weight, layer.weight_grad, weight, dweight),
            (layer.bias, layer.bias_grad, bias, dbias),
        ):
            step(own, gradient)
            step(other, wanted)
    np.testing.assert_allclose(layer.weight, weight, atol=1e-11)
    np.testing.assert_allclose(layer.running_var, v, rtol=1e-12)


def step(parameter: Array | None, gradient: Array | None) -> None:
    assert parameter is not None
    assert gradient is not None
    parameter -= 0.1 * gradient


def test_a_mask_is_kept_for_the_backward() -> None:
    x, dy = normal((6, 4, 5)), normal((6, 4, 5), seed=1)
    mask = np.random.default_rng(2).random((6, 5)) < 0.6
    layer = fn.BatchNorm(4)
    y = layer(x, mask=mask)
    dx = layer.backward(dy)
    want, mean, rstd = fn.batch_norm_forward(x, layer.weight, layer.bias, mask=mask)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, fn.batch_norm_backward(dy, x, mean, rstd, layer.weight, layer.bias, mask=mask)[0])


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.ones((6, 4), bool), ValueError, "mask must have x's shape without axis 1"),
        (np.ones((6, 5)), TypeError, "mask must be boolean"),
        ([[True]], TypeError, "mask must be a NumPy or CuPy array"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, error: type[Exception], words: str) -> None:
    layer = fn.BatchNorm(4)
    with pytest.raises(error, match=words):
        layer(normal((6, 4, 5)), mask=mask)
    assert layer.num_batches_tracked == 0
    np.testing.assert_array_equal(layer.running_mean, np.zeros(4))


LAYERS: dict[str, Any] = {
    "batch": lambda: fn.BatchNorm(4, activation="silu"),
    "instance": lambda: fn.InstanceNorm(4),
    "group": lambda: fn.GroupNorm(2, 4),
    "layer": lambda: fn.LayerNorm(5),
    "rms": lambda: fn.RMSNorm(5),
    "switchable": lambda: fn.SwitchableNorm(4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_there_is_no_backward_of_what_was_written_over(name: str) -> None:
    layer, x, dy = LAYERS[name](), normal((6, 4, 5)), normal((6, 4, 5), seed=1)
    layer(x)
    for out in (x, x[:, :, :]):
        layer(x, out=out)
        with pytest.raises(RuntimeError, match=r"out=x"):
            layer.backward(dy)
    # Beside x, in the gaps between its elements, nothing of it is lost.
    both = np.zeros((6, 4, 5, 2), np.float32)
    both[..., 0] = x
    layer(both[..., 0], out=both[..., 1])
    again = LAYERS[name]()
    again(x.copy())
    np.testing.assert_array_equal(layer.backward(dy), again.backward(dy))


def test_there_is_no_backward_of_a_residual_that_was_written_over() -> None:
    layer, x, residual = fn.BatchNorm(4, activation="relu"), normal((6, 4, 5)), normal((6, 4, 5), seed=1)
    layer(x, residual=residual, out=residual)
    with pytest.raises(RuntimeError, match=r"out=x"):
        layer.backward(x)


def test_there_is_no_backward_of_a_weight_that_was_written_over() -> None:
    layer = fn.WeightNorm(normal((4, 5)))
    layer(out=layer.weight_v)
    with pytest.raises(RuntimeError, match=r"out=x"):
        layer.backward(normal((4, 5)))


@pytest.mark.parametrize("name", LAYERS)
def test_backward_does_not_take_the_call_before_one_that_failed(name: str) -> None:
    layer, x = LAYERS[name](), normal((6, 4, 5))
    layer(x)
    with pytest.raises(ValueError, match="out"):
        layer(x, out=np.empty((6, 4, 6), np.float32))
    with pytest.raises(RuntimeError, match="did not fail"):
        layer.backward(x)
