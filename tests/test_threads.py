"""Threads, forks, limits and the memory of outputs: the same bits from any number of threads, and no hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from support import DTYPES, Array, assert_same_bits, normal, numpy_dtype, run_python

OPENMP = fn.build_info()["openmp"] is not None

# A thread is woken for 131,072 elements: all but the first two shapes occupy three. The rest are few and many channels,
# numbers that do not divide, short and long runs, one long row, sizes around chunks (1,024 to 4,096) and tiles (32 of
# them).
SHAPES = [
    ((4, 3, 7), 1),
    ((16, 32), 1),
    ((16, 64, 20, 20), 1),
    ((16, 20, 20, 64), -1),
    ((8, 2, 160, 160), 1),
    ((8, 160, 160, 2), -1),
    ((9, 7, 81, 79), 1),
    ((9, 81, 79, 7), -1),
    ((3, 1, 140_001), 1),
    ((400_003, 1), 1),
    ((1, 5, 81_921), 1),
    ((80_011, 5), 1),
    ((3100, 131), 1),
    ((200, 2051), 1),
    ((12, 700, 49), 1),
    ((64, 65, 100), 0),
]
# float32 in all of them, the other types where their loops differ from its.
THREADED = [
    (shape, axis, dtype)
    for shape, axis in SHAPES
    for dtype in (DTYPES if shape in ((16, 64, 20, 20), (9, 81, 79, 7), (12, 700, 49)) else ("float32",))
]


def everything(x: Array, dy: Array, residual: Array, axis: int, ghost: int | None = None) -> list[Array]:
    c = x.shape[axis]
    w, b, m, v = np.linspace(0.5, 2, c), np.linspace(-1, 1, c), np.zeros(c), np.ones(c)
    options: dict[str, Any] = {"axis": axis, "residual": residual, "activation": "relu", "ghost_batch_size": ghost}
    y, mean, rstd = fn.batch_norm_forward(x, w, b, running_mean=m, running_var=v, **options)
    gradients = fn.batch_norm_backward(dy, x, mean, rstd, w, b, **options)
    evaluated = fn.batch_norm(x, m, v, w, b, axis=axis)
    frozen = fn.batch_norm_backward(dy, x, m, 1 / np.sqrt(v + 1e-5), w, b, training=False, axis=axis)
    reduced = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return [y, mean, rstd, m, v, *gradients, evaluated, *frozen, *fn.moments(x, reduced)]


@pytest.mark.parametrize(("shape", "axis", "dtype"), THREADED)
def test_same_bits_from_any_number_of_threads(
    shape: tuple[int, ...], axis: int, dtype: str, isa: str, threads: None
) -> None:
    numpy_dtype(dtype)
    arrays = [normal(shape, dtype, seed) for seed in range(3)]
    arrays[0] = arrays[0] + arrays[0].dtype.type(2)
    for ghost in (None, 4) if shape[0] > 4 and shape[0] % 4 != 1 and axis != 0 else (None,):
        results = []
        for n in (1, 2, 3):
            fn.set_num_threads(n)
            assert fn.get_num_threads() == (n if OPENMP else 1)
            results.append(everything(*arrays, axis, ghost))
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert_same_bits(one, other)


def test_same_bits_where_stores_are_streamed(threads: None) -> None:
    """From 16 MiB on another store is taken, and short runs are put together first."""
    for shape, axis in [((40, 130, 29, 29), 1), ((70, 1300, 7, 7), 1), ((70, 49, 1300), -1)]:
        x = normal(shape)
        results = []
        for n in (1, 2, 3):
            fn.set_num_threads(n)
            y, mean, rstd = fn.batch_norm_forward(x, axis=axis, activation="relu")
            results.append((y, mean, rstd, *fn.batch_norm_backward(y, x, mean, rstd, axis=axis, activation="relu")))
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert np.array_equal(one, other)


def in_threads(count: int, function: Any) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(i: int) -> None:
        try:
            start.wait(timeout=30)
            function(i)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not failures


def test_python_threads_call_at_the_same_time() -> None:
    shape, axis = (16, 32, 12, 12), 1
    inputs = [[normal(shape, seed=3 * i + k) for k in range(3)] for i in range(4)]
    wanted = [everything(*arrays, axis) for arrays in inputs]

    def work(i: int) -> None:
        for _ in range(10):
            for one, other in zip(everything(*inputs[i], axis), wanted[i], strict=True):
                assert_same_bits(one, other)

    in_threads(4, work)


def test_one_layer_evaluates_in_several_threads() -> None:
    layer = fn.BatchNorm(32, activation="relu")
    layer(normal((16, 32, 12, 12)))
    layer.eval()
    inputs = [normal((16, 32, 12, 12), seed=i) for i in range(4)]
    wanted = [(layer(x), layer.backward(x)) for x in inputs]

    def work(i: int) -> None:
        for _ in range(10):
            assert_same_bits(layer(inputs[i]), wanted[i][0])
            assert_same_bits(layer.backward(inputs[i]), wanted[i][1])

    in_threads(4, work)


def test_the_gil_is_released() -> None:
    """Python goes on while a kernel runs: a counter advances during one call."""
    x, out = np.zeros((2, 64, 64, 64, 64), np.float32)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-4)

    switch = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    try:
        sys.setswitchinterval(10)  # who holds the GIL keeps it, unless he gives it away
        thread.start()
        before = counted[0]
        fn.batch_norm_forward(x, out=out)
        assert counted[0] > before
    finally:
        sys.setswitchinterval(switch)
        stop.set()
        thread.join()


# Limits.


def test_number_of_threads(threads: None) -> None:
    for n in (1, 2, 5):
        fn.set_num_threads(n)
        assert fn.get_num_threads() == fn.build_info()["threads"] == (n if OPENMP else 1)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {n}"):
            fn.set_num_threads(n)
    for wrong in (1.5, "2", None):
        with pytest.raises(TypeError):
            fn.set_num_threads(wrong)  # type: ignore[arg-type]
    assert fn.get_num_threads() == (5 if OPENMP else 1)


THREADS = "import fusednorm as fn; print(fn.get_num_threads())"


def needs_openmp() -> None:
    if not OPENMP:
        pytest.skip("built without OpenMP")


@pytest.mark.parametrize("n", [1, 3])
def test_omp_num_threads_is_honoured(n: int) -> None:
    needs_openmp()
    result = run_python(THREADS, OMP_NUM_THREADS=str(n))
    assert result.stdout.split() == [str(n)], result.stderr


def test_threadpoolctl_is_honoured() -> None:
    needs_openmp()
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    code = """
import fusednorm as fn
from threadpoolctl import threadpool_limits, threadpool_info
assert any(pool["user_api"] == "openmp" for pool in threadpool_info())
seen = [fn.get_num_threads()]
with threadpool_limits(1):
    seen.append(fn.get_num_threads())
with threadpool_limits(2, user_api="openmp"):
    seen.append(fn.get_num_threads())
seen.append(fn.get_num_threads())
fn.set_num_threads(3)
with threadpool_limits(2):
    seen.append(fn.get_num_threads())
with threadpool_limits(4):
    seen.append(fn.get_num_threads())
seen.append(fn.get_num_threads())
print(*seen)
"""
    result = run_python(code, OMP_NUM_THREADS="4")
    assert result.stdout.split() == ["4", "1", "2", "4", "2", "3", "3"], result.stderr


def test_torchs_limit_is_honoured() -> None:
    """gcc's runtime is the one that PyTorch's wheels bring; clang's knows nothing of it."""
    needs_openmp()
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if not fn.build_info()["compiler"].startswith("GNU"):
        pytest.skip("built with another OpenMP runtime")
    code = """
import fusednorm as fn, torch
torch.set_num_threads(1)
seen = [fn.get_num_threads()]
fn.set_num_threads(3)
seen.append(fn.get_num_threads())
torch.set_num_threads(2)
seen.append(fn.get_num_threads())
print(*seen)
"""
    result = run_python(code, OMP_NUM_THREADS="4")
    assert result.stdout.split() == ["1", "1", "2"], result.stderr


# fork


FORK = """
import hashlib, os, sys
import numpy as np
import fusednorm as fn

x = np.random.default_rng(0).standard_normal((16, 64, 16, 16)).astype(np.float32)

def digest():
    found = hashlib.sha256()
    for axis in (1, -1):
        y, mean, rstd = fn.batch_norm_forward(x, axis=axis, activation="relu")
        for a in (y, mean, rstd, *fn.batch_norm_backward(x, x, mean, rstd, axis=axis)):
            found.update(a.tobytes())
    return found.hexdigest()

fn.set_num_threads(3)
wanted = digest() if {before} else None
for generation in range(2):
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        again = digest()
        print(generation, os.WEXITSTATUS(status), wanted in (None, again))
        sys.stdout.flush()
        os._exit(os.WEXITSTATUS(status))
    got = digest()
    if wanted is not None and got != wanted:
        os._exit(3)
    fn.empty_cache()
    wanted = got
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("before", [True, False], ids=["after a parallel call", "before any call"])
def test_a_child_of_fork_computes_the_same_bits(before: bool) -> None:
    """And its own child does. libgomp would wait for threads that did not survive."""
    result = run_python(FORK.format(before=before), timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(result.stdout.split("\n")[:2]) == ["0 0 True", "1 0 True"], result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_multiprocessing_with_fork() -> None:
    code = """
import multiprocessing
import numpy as np
import fusednorm as fn

def work(seed):
    x = np.random.default_rng(seed).standard_normal((32, 64, 100)).astype(np.float32)
    return fn.batch_norm_forward(x)[0]

here = [work(seed) for seed in range(4)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    there = pool.map(work, range(4))
print(all(np.array_equal(a, b) for a, b in zip(here, there)))
"""
    result = run_python(code, timeout=60)
    assert result.stdout.split() == ["True"], result.stderr


# The instruction set.


@pytest.mark.parametrize("name", fn.build_info()["isa_runnable"])
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    code = "import fusednorm as fn; print(fn.build_info()['isa'])"
    result = run_python(code, FUSEDNORM_ISA=name)
    assert result.stdout.split() == [name], result.stderr


def test_the_best_instruction_set_is_the_default() -> None:
    code = "import fusednorm as fn; print(fn.build_info()['isa'])"
    result = run_python(code, FUSEDNORM_ISA="")
    assert result.stdout.split() == [fn.build_info()["isa_runnable"][0]], result.stderr


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="qemu-x86_64 (Debian: qemu-user) is not installed")
@pytest.mark.skipif("v2" not in fn.build_info()["isa_built"], reason="no generic kernels of x86-64 were built")
@pytest.mark.parametrize(("processor", "best"), [("Nehalem", "v2"), ("Haswell", "v3")])
def test_an_older_processor_runs_what_was_built_here(processor: str, best: str) -> None:
    code = (
        "import json, numpy as np, fusednorm as fn\n"
        "x = np.arange(12, dtype=np.float32).reshape(4, 3)\n"
        "y = fn.batch_norm(x, None, None, training=True)\n"
        "assert abs(y.std(0) - 1).max() < 1e-5\n"
        "print(json.dumps(fn.build_info()))"
    )
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", processor, sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["isa_best"] == best
    assert info["isa"] == (best if best in info["isa_built"] else "v2")
    assert "v4" not in info["isa_runnable"]


def test_an_unknown_instruction_set_fails_the_import_with_the_known_ones() -> None:
    result = run_python("import fusednorm", FUSEDNORM_ISA="v9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ValueError"))
    for part in ("FUSEDNORM_ISA", "v9", *fn.build_info()["isa_built"]):
        assert part in last


def test_instruction_sets_agree_to_rounding() -> None:
    """Not to the bit: the lanes of a sum differ. A control that the fixture really switches."""
    from fusednorm import _C

    info = fn.build_info()
    if len(info["isa_runnable"]) == 1:
        pytest.skip("one instruction set runs here")
    x = normal((64, 8, 100))
    results = []
    for name in info["isa_runnable"]:
        _C.select_isa(name)
        assert fn.build_info()["isa"] == name
        results.append(fn.batch_norm_forward(x)[0])
    _C.select_isa(info["isa"])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=4e-6 * np.abs(x).max())
    with pytest.raises(ValueError, match="v9"):
        _C.select_isa("v9")


# Memory of outputs.


def address(a: Array) -> int:
    return a.__array_interface__["data"][0]  # type: ignore[no-any-return]


def test_output_memory_is_reused() -> None:
    fn.empty_cache()
    x = normal((64, 64, 40, 40))
    y = fn.batch_norm_forward(x)[0]
    first, view = address(y), y[3:]
    del y
    other = fn.batch_norm_forward(x)[0]
    second = address(other)
    assert second != first, "a view keeps its memory"
    del other
    for _ in range(3):
        y = fn.batch_norm_forward(x)[0]
        assert address(y) == second
        del y
    del view
    for _ in range(4):
        y = fn.batch_norm_forward(x)[0]
        assert address(y) in (first, second)
        del y
    assert fn.empty_cache() >= 2 * x.nbytes
    assert fn.empty_cache() == 0


def test_live_outputs_never_share_memory() -> None:
    alive: list[Array] = []
    rng = np.random.default_rng(0)
    inputs = [normal((n, 16, 40, 40)) for n in (10, 11, 12, 14)]
    for _ in range(40):
        x = inputs[rng.integers(len(inputs))]
        layer = fn.BatchNorm(16)
        y = layer(x, residual=x)
        dx, dresidual = layer.backward(y)
        alive += [y, dx, dresidual]
        for a in alive[-3:]:
            assert not any(np.may_share_memory(a, b) for b in [*alive, *inputs] if b is not a)
            a[...] = len(alive)
        rng.shuffle(alive)  # type: ignore[arg-type]
        del alive[8:]
        for a in alive:
            assert np.all(a == a.flat[0]), "somebody else wrote here"


def test_outputs_outlive_the_cache() -> None:
    x = normal((64, 64, 20, 20))
    y = fn.batch_norm_forward(x)[0]
    want = y.copy()
    fn.empty_cache()
    assert_same_bits(y, want)
    transposed, raw = y.T, y.reshape(-1)
    del y
    fn.batch_norm_forward(2 * x)
    assert np.array_equal(transposed.T, want)
    assert np.array_equal(raw, want.ravel())


def test_pool_memory_in_several_threads() -> None:
    inputs = [normal((8 + i, 16, 40, 40), seed=i) for i in range(4)]
    wanted = [fn.batch_norm_forward(x)[0].copy() for x in inputs]

    def work(i: int) -> None:
        for k in range(20):
            y = fn.batch_norm_forward(inputs[i])[0]
            if k % 5 == i:
                fn.empty_cache()
            assert np.array_equal(y, wanted[i])

    in_threads(4, work)


def test_a_failed_call_gives_its_memory_back() -> None:
    x = normal((64, 16, 40, 40))
    fn.empty_cache()
    for _ in range(3):
        with pytest.raises(ValueError, match="weight"):
            fn.batch_norm_forward(x, np.ones(3))
    assert fn.empty_cache() <= 2 * x.nbytes
