"""CUDA's verbs through the same calls and cases as the CPU's: on a GPU with CuPy, or, in a build for it, emulated."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
import ranks
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case
from support import assert_same_bits, run_python
from test_cases import marked, prepared, skip_what_is_missing
from test_distributed import wrong

STATE = fn.build_info()["cuda"]
EMULATED = STATE.startswith("emulated")
if EMULATED:
    sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
elif STATE.startswith("not built"):
    pytest.skip(f"CUDA is {STATE}", allow_module_level=True)
cupy: Any = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

# Devices that take each another way: an ordinary one; toys whose blocks, clusters and grids are soon too small; without
# clusters; without cooperative launches; one that refuses both when asked.
DEVICES = range(cupy.cuda.runtime.getDeviceCount())


def on_device(a: np.ndarray[Any, Any]) -> Any:
    """A copy of `a` on the current device, with its axis order in memory."""
    order = sorted(range(a.ndim), key=lambda i: -a.strides[i])
    return cupy.asarray(np.ascontiguousarray(a.transpose(order))).transpose(np.argsort(order).tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_case(case: Case, device: int) -> None:
    skip_what_is_missing(case)
    if EMULATED and device and case.size > 200_000:
        pytest.skip("minutes, emulated")
    inputs, expected, bounds = prepared(case)
    with cupy.cuda.Device(device):
        got = cases.run(case, inputs, fn, to_device=on_device, to_host=cupy.asnumpy)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got, bounds) if not deviation.ok]
    assert not wrong


@pytest.mark.skipif(not EMULATED, reason="a GPU's schedule is its own")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [marked(case) for case in CASES if {"quick", "sanitize"} <= case.tags])
def test_bits_do_not_depend_on_the_schedule(case: Case, device: int) -> None:
    import emulator

    skip_what_is_missing(case)
    inputs, _, _ = prepared(case)
    results = []
    try:
        for seed in (0, 1, 2):  # in order, by priority, at random
            emulator.seed(seed)
            with cupy.cuda.Device(device):
                results.append(cases.run(case, inputs, fn, to_device=on_device, to_host=cupy.asnumpy))
    finally:
        emulator.seed(0)
    for other in results[1:]:
        for field in fields(other):
            first, second = getattr(results[0], field.name), getattr(other, field.name)
            assert (first is None) == (second is None)
            if first is not None:
                assert_same_bits(first, second, field.name)


@pytest.mark.skipif(not EMULATED, reason="the kernels are compiled for this GPU")
def test_a_gpu_that_kernels_were_not_compiled_for() -> None:
    code = "import cupy, fusednorm as fn; fn.batch_norm(cupy.ones((4, 3), 'float32'), None, None, training=True)"
    done = run_python(code, PYTHONPATH=os.pathsep.join(sys.path), FUSEDNORM_EMU_DEVICES="image=0")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: cudaErrorNoKernelImageForDevice: ")
    assert STATE in message
    assert "CMAKE_CUDA_ARCHITECTURES" in message


class Foreign:
    """An array of some other library, which offers its memory."""

    def __init__(self, a: Any) -> None:
        self.owner, self.__cuda_array_interface__ = a, a.__cuda_array_interface__


def normal(*shape: int, seed: int = 0) -> Any:
    return cupy.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def same(a: Any, b: Any) -> bool:
    """Bit for bit, kind and device included."""
    return type(a) is type(b) and a.device == b.device and cupy.asnumpy(a).tobytes() == cupy.asnumpy(b).tobytes()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device, which is the current one."""
    with cupy.cuda.Device(request.param):
        yield f"cuda:{request.param}"


def test_a_layer_computes_what_the_functions_do(device: str) -> None:
    x, dy, residual = normal(6, 5, 3), normal(6, 5, 3, seed=1), normal(6, 5, 3, seed=2)
    layer = fn.BatchNorm(5, activation="relu", device=device)
    assert layer.device == device
    layer.weight, layer.bias = normal(5), np.arange(5)
    running_mean, running_var = cupy.zeros(5, np.float32), cupy.ones(5, np.float32)
    y, mean, rstd = fn.batch_norm_forward(
        x, layer.weight, layer.bias, running_mean=running_mean, running_var=running_var, residual=residual,
        activation="relu",
    )  # fmt: skip
    gradients = fn.batch_norm_backward(
        dy, x, mean, rstd, layer.weight, layer.bias, residual=residual, activation="relu"
    )
    assert same(layer(x, residual), y)
    dx, dresidual = layer.backward(dy)
    for got, expected in zip(
        (dx, layer.weight_grad, layer.bias_grad, dresidual, layer.running_mean, layer.running_var),
        (*gradients, running_mean, running_var),
        strict=True,
    ):
        assert same(got, expected)
    y = fn.batch_norm(x, running_mean, running_var, layer.weight, layer.bias, activation="relu")
    assert same(layer.eval()(x), y)


def test_a_layer_moves_with_its_state(device: str) -> None:
    layer = fn.BatchNorm(4)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    layer(x)
    layer.backward(x)
    before = {name: a.copy() for name, a in (*layer.state_dict().items(), ("grad", layer.weight_grad))}
    assert layer.to(device) is layer
    assert all(type(a) is cupy.ndarray for a in (layer.weight, layer.running_var, layer.bias_grad))
    scale, shift = layer.scale_shift()
    assert np.allclose(cupy.asnumpy(shift), -cupy.asnumpy(layer.running_mean * scale))
    state = layer.state_dict()
    other = fn.BatchNorm(4)
    other.load_state_dict(state)
    back = fn.BatchNorm(4, device=device)
    back.load_state_dict(other.state_dict())
    assert same(back.running_var, layer.running_var)
    layer.to("cpu")
    after = {**layer.state_dict(), "grad": layer.weight_grad}
    for name, a in before.items():
        assert np.array_equal(a, after[name]), name
        if name in other.state_dict():
            assert np.array_equal(a, other.state_dict()[name]), name


@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("estimator", ["exact", "paper"])
def test_populations_are_estimated_as_on_the_cpu(estimator: str, ghost: int | None, device: str) -> None:
    """Both in float64: to rounding, some hundred values a channel, that add up to a few."""
    layers = [fn.BatchNorm(3, ghost_batch_size=ghost, dtype="float64", device=place) for place in ("cpu", device)]
    switched = [fn.SwitchableNorm(3, dtype="float64", device=place) for place in ("cpu", device)]
    with fn.Population(*layers, *switched, estimator=estimator):
        for n in (6, 8, 5):
            x = np.random.default_rng(n).standard_normal((n, 3, 7))
            mask = np.random.default_rng(n).random((n, 7)) < 0.6
            layers[0](x, mask=mask)
            layers[1](cupy.asarray(x), mask=cupy.asarray(mask))
            switched[0](x)
            switched[1](cupy.asarray(x))
    for cpu, gpu in (layers, switched):
        assert gpu.num_batches_tracked == cpu.num_batches_tracked == (6 if ghost and cpu is layers[0] else 3)
        for name in ("running_mean", "running_var"):
            found = getattr(gpu, name)
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_allclose(cupy.asnumpy(found), getattr(cpu, name), rtol=1e-13, atol=1e-13)


def test_a_layer_says_that_x_is_elsewhere() -> None:
    x, layer = np.ones((4, 3), np.float32), fn.BatchNorm(3, affine=False, track_running_stats=False, device="cuda")
    assert layer.device == "cuda:0"
    with pytest.raises(TypeError, match=r"x is on cpu, the layer on cuda:0; its to\('cpu'\)"):
        layer(x)
    with pytest.raises(TypeError, match=r"x is on cuda:0, the layer on cpu"):
        layer.to("cpu")(normal(4, 3))
    with pytest.raises(RuntimeError, match=f"there are {len(DEVICES)} GPUs|GPU"):
        layer.to("cuda:99")


@pytest.mark.parametrize("mixed", [False, True], ids=["all on a GPU", "rank 0 on the CPU"])
def test_synchronized(mixed: bool) -> None:
    """Two ranks, as threads; their messages are the host's wherever x is."""
    mistakes = []
    for case in (*ranks.SMALL[::6], *ranks.ghost_cases(2)):

        def work(group: Any, case: Case = case) -> Any:
            return ranks.computed(case, group, "cpu" if mixed and group.rank == 0 else "cuda:0")

        each = ranks.threads(2, work)
        mistakes += wrong(case, each)
        if case.running:
            for name in ("running_mean", "running_var"):
                assert_same_bits(each[0][name], each[1][name], case.name)
    assert not mistakes, "\n".join(mistakes)


def test_calls_run_on_the_arrays_device() -> None:
    """Whatever the current one; which stays so."""
    with cupy.cuda.Device(DEVICES[-1]):
        x, mask = normal(6, 4, 5), cupy.asarray(np.arange(30).reshape(6, 5) % 7 > 0)
        expected = fn.batch_norm_forward(x, mask=mask, ghost_batch_size=4)
        gradients = fn.batch_norm_backward(x, x, *expected[1:], mask=mask, ghost_batch_size=4)
        statistics = fn.moments(x, (0, 2))
        tensorflows = fn.batch_normalization(x, expected[1][0, :, None], expected[2][0, :, None], None, None, 1e-3)
    with cupy.cuda.Device(0):
        got = fn.batch_norm_forward(x, mask=mask, ghost_batch_size=4)
        assert all(map(same, got, expected))
        assert all(map(same, fn.batch_norm_backward(x, x, *got[1:], mask=mask, ghost_batch_size=4), gradients))
        assert all(map(same, fn.moments(x, (0, 2)), statistics))
        m, r = expected[1][0], expected[2][0]
        with cupy.cuda.Device(DEVICES[-1]):
            m, r = m[:, None], r[:, None]
        assert same(fn.batch_normalization(x, m, r, None, None, 1e-3), tensorflows)
        assert cupy.cuda.runtime.getDevice() == 0


def test_arrays_of_other_libraries_are_seen_as_cupys(device: str) -> None:
    x, dy, weight, bias = normal(6, 4, 5), normal(6, 4, 5, seed=1), normal(4), normal(4, seed=1)
    running = [cupy.zeros(4, np.float32), cupy.ones(4, np.float32)]
    again = [a.copy() for a in running]
    mask = cupy.asarray(np.arange(30).reshape(6, 5) % 7 > 0)
    expected = fn.batch_norm_forward(
        x, weight, bias, running_mean=running[0], running_var=running[1], residual=dy, mask=mask
    )
    out = cupy.empty_like(x)
    got = fn.batch_norm_forward(
        Foreign(x), Foreign(weight), Foreign(bias), running_mean=Foreign(again[0]), running_var=Foreign(again[1]),
        residual=Foreign(dy), mask=Foreign(mask), out=Foreign(out),
    )  # fmt: skip
    assert all(map(same, (*got, *again, out), (*expected, *running, expected[0])))
    expected = fn.batch_norm_backward(dy, x, *got[1:], weight, bias, residual=dy, mask=mask)
    got = fn.batch_norm_backward(
        Foreign(dy), Foreign(x), *map(Foreign, got[1:]), Foreign(weight), Foreign(bias), residual=Foreign(dy),
        mask=Foreign(mask), out=Foreign(out),
    )  # fmt: skip
    assert all(map(same, (*got, out), (*expected, expected[0])))
    assert all(map(same, fn.moments(Foreign(x), 0), fn.moments(x, 0)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("order", "CF")
def test_tables_are_standardized_and_whitened(order: str, dtype: str, device: int) -> None:
    host = np.random.default_rng(0).normal([7, 3, 0, 0, 1], 1, (200, 5)).astype(dtype, order)  # type: ignore[call-overload]
    x = on_device(host)
    # y and x are of size 10 at most, of moments and arithmetic in float32 or wider, and rounded to the dtype.
    error = 10 * (2e-6 + float(np.finfo(dtype).eps)) if dtype != "float64" else 1e-12
    for make in (fn.Standardizer, lambda: fn.Whitener("zca")):
        ours, want = (make().partial_fit(a[:50]).partial_fit(a[50:]) for a in (x, host))
        for method, given in (("transform", host), ("inverse_transform", want.transform(host))):
            y = getattr(ours, method)(on_device(given))
            assert type(y) is cupy.ndarray
            assert y.device == x.device
            assert y.dtype == x.dtype
            np.testing.assert_allclose(cupy.asnumpy(y), getattr(want, method)(given), rtol=0, atol=error)
        assert type(ours.mean_) is np.ndarray
        for bad, refused in ((np.inf, True), (np.nan, make is not fn.Standardizer)):
            worse = x.copy()
            worse[3, 1] = bad
            if refused:
                with pytest.raises(ValueError, match=r"infinity|NaN"):
                    ours.transform(worse)
            else:
                fitted = make().fit(worse)
                np.testing.assert_allclose(fitted.mean_, make().fit(cupy.asnumpy(worse)).mean_, rtol=0, atol=error)
                assert int(cupy.isnan(fitted.transform(worse)).sum()) == 1
    assert fn.Standardizer(copy=False).fit_transform(x) is x


def test_results_repeat_bit_for_bit(device: str) -> None:
    for shape, axis in (((16, 5, 33, 7), 1), ((16, 33, 7, 5), -1), ((64, 96), 1), ((16, 33, 7, 4), -1)):
        x, dy = normal(*shape), normal(*shape, seed=1)
        results = []
        for _ in range(3):
            forward = fn.batch_norm_forward(x, axis=axis)
            results.append((*forward, *fn.batch_norm_backward(dy, x, *forward[1:], axis=axis)))
        for others in zip(*results, strict=True):
            assert all(same(others[0], other) for other in others[1:])


def test_a_captured_call_is_replayed(device: str) -> None:
    """On what the arrays hold then, also after others have allocated memory in between."""
    x, dy, weight = normal(6, 5, 9), normal(6, 5, 9, seed=1), normal(5)
    running_mean, running_var = cupy.zeros(5, np.float32), cupy.ones(5, np.float32)

    def call() -> Any:
        forward = fn.batch_norm_forward(
            x, weight, running_mean=running_mean, running_var=running_var, activation="silu"
        )
        return (*forward, *fn.batch_norm_backward(dy, x, *forward[1:], weight, activation="silu"))

    expected, stream = call(), cupy.cuda.Stream(non_blocking=True)
    after_one = running_mean.copy()
    running_mean.fill(0)
    running_var.fill(1)
    with stream:
        stream.begin_capture()
        got = call()
        call()  # its outputs are dropped: the graph still writes them
        graph = stream.end_capture()
    del call
    hold = [cupy.full_like(x, np.nan) for _ in range(100)]
    assert not cupy.asnumpy(running_mean).any()
    for times in (1, 2):
        graph.launch(stream)
        stream.synchronize()
        assert all(map(same, got, expected))
        # Each replay updates twice, each time by a tenth of the way.
        part = (1 - 0.9 ** (2 * times)) / 0.1
        np.testing.assert_allclose(cupy.asnumpy(running_mean), part * cupy.asnumpy(after_one), rtol=1e-6)
    assert all(np.isnan(cupy.asnumpy(a)).all() for a in hold)
    x *= 2
    graph.launch(stream)
    stream.synchronize()
    assert same(got[0], fn.batch_norm_forward(x, weight, activation="silu")[0])
    fn.empty_cache()  # the graph's memory goes back: it is launched no more


def test_streams_do_not_disturb_each_other(device: str) -> None:
    xs = [normal(8, 6, 50, seed=i) for i in range(4)]
    expected = [fn.batch_norm_forward(x) for x in xs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in xs]
    for _ in range(5):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with stream:
                got.append(fn.batch_norm_forward(x))
        for stream in streams:
            stream.synchronize()
        assert all(
            same(a, b) for one, other in zip(got, expected, strict=True) for a, b in zip(one, other, strict=True)
        )


@pytest.mark.slow
@pytest.mark.skipif(EMULATED, reason="emulated, it would take hours")
@pytest.mark.parametrize("shape", [(2, 2, 1 << 29, 1), (1 << 30, 1 << 1), (1, 1, (1 << 31) + 77)])
def test_more_than_2_31_elements(shape: tuple[int, ...]) -> None:
    """Every channel repeats the same numbers, whose mean and variance are known; of y and dx the ends are looked at."""
    c, n = shape[1], math.prod(shape) // shape[1]
    period = np.random.default_rng(0).standard_normal(4096).astype(np.float16)
    times = np.full(4096, n // 4096)
    times[: n % 4096] += 1
    mean = np.average(period.astype(np.float64), weights=times)
    variance = np.average((period.astype(np.float64) - mean) ** 2, weights=times)
    line = cupy.tile(cupy.asarray(period), n // 4096 + 1)[:n]
    x = cupy.empty(shape, np.float16)
    x[...] = cupy.moveaxis(line.reshape(shape[0], *shape[2:])[None], 0, 1)

    def end(a: Any) -> Any:
        return cupy.asnumpy(cupy.moveaxis(a, 1, 0).reshape(c, -1)[:, -1000:]).astype(np.float64)

    y, got_mean, got_rstd = fn.batch_norm_forward(x)
    np.testing.assert_allclose(cupy.asnumpy(got_mean), mean, atol=1e-7)
    np.testing.assert_allclose(cupy.asnumpy(got_rstd), 1 / np.sqrt(variance + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(end(y), (end(x) - mean) / np.sqrt(variance + 1e-5), rtol=2**-11, atol=1e-6)
    # With dy = x̂ dx is 0, dbias 0 and dweight n·variance/(variance + eps), but y is x̂ rounded to float16: by 2⁻¹¹ of
    # itself at most, so that nothing is off by more than that part of Σx̂², Σ|x̂| ≤ n and, in dx, of 2·|x̂| + 1.
    dx, dweight, dbias = fn.batch_norm_backward(y, x, got_mean, got_rstd, out=y)
    np.testing.assert_allclose(cupy.asnumpy(dweight), n, rtol=2**-11 + 1e-5)
    np.testing.assert_allclose(cupy.asnumpy(dbias), 0, atol=2**-11 * n)
    np.testing.assert_allclose(end(dx), 0, atol=2**-11 * (2 * abs(end(x)).max() + 1) / np.sqrt(variance))
