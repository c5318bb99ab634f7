"""The emulator itself: errors planted in kernels are caught, the toy devices refuse what they must, and the arrays of
the CuPy stand-in behave as CuPy's do."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import EMULATOR, SANITIZERS, compiled, needs_gcc, outcome, run

pytestmark = [needs_gcc, pytest.mark.thorough]

# What each planted error is caught by, and the words of it. Results show an error under some schedules only.
CAUGHT = {
    "no_barrier": {"plain": "rows: -?nan, not", "tsan": "data race"},
    "no_second_barrier": {"plain": r"rows: \d+, not", "tsan": "data race"},
    "early_return": {"plain": "deadlock(.|\n)*1 of 96 threads of this block have returned"},
    "no_fence": {"tsan": "data race"},
    "no_grid_barrier": {"plain": r"whole grid: \d+, not", "tsan": "data race"},
    "no_last_barrier": {"plain": "map_shared_rank of a block that has ended"},
    "overread": {"asan": "heap-buffer-overflow"},
    "misaligned": {"asan": "misaligned address"},
    "misaligned_hint": {"plain": "misaligned address"},
    "shared_overrun": {"asan": "heap-buffer-overflow"},
    "divergent": {"plain": "divergent barrier"},
    "half_warp": {"plain": "meet in different warp collectives"},
}
SCHEDULES = {"plain": range(8), "asan": range(2), "tsan": range(2)}

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles the controls, each way once; "library" is for Python."""
    folder = tmp_path_factory.mktemp("emulator")

    def built(kind: str) -> Path:
        target = folder / kind
        if target.exists():
            return target
        emulator = [folder / "emu.o", folder / "runtime.o"]
        for path in emulator:
            if not path.exists():
                compiled("-O2", "-c", EMULATOR / f"{path.stem}.cpp", "-o", path)
        if kind == "library":
            compiled("-O1", "-shared", "-x", "c++", EMULATOR / "controls.cu", "-x", "none", *emulator, "-o", target)
        else:
            flags = SANITIZERS[kind]
            compiled("-O1", *flags, "-x", "c++", EMULATOR / "controls.cu", "-x", "none", *emulator, "-o", target)
        return target

    return built


def ways(caught: bool) -> list[Any]:
    """(sanitizer, plant); compiling with sanitizers takes a while."""
    slow = [pytest.mark.slow, pytest.mark.sanitize]
    pairs = [(kind, plant) for kind in SANITIZERS for plant in CAUGHT if kind in CAUGHT[plant]]
    pairs = pairs if caught else [(kind, "none") for kind in SANITIZERS]
    return [pytest.param(*pair, marks=[] if pair[0] == "plain" else slow) for pair in pairs]


def outputs(program: Path, kind: str, plant: str) -> list[tuple[int, str]]:
    """Exit codes and words under each schedule."""
    return [outcome(kind, program, plant, seed=seed) for seed in SCHEDULES[kind]]


@pytest.mark.parametrize(("kind", "plant"), ways(caught=False))
def test_right_kernels_pass_under_every_schedule(kind: str, plant: str, build: Build) -> None:
    for code, words in outputs(build(kind), kind, plant):
        assert code == 0, words


@pytest.mark.parametrize(("kind", "plant"), ways(caught=True))
def test_planted_error_is_caught(kind: str, plant: str, build: Build) -> None:
    import re

    found = outputs(build(kind), kind, plant)
    assert any(code != 0 and re.search(CAUGHT[plant][kind], words) for code, words in found), found


@pytest.mark.parametrize("plant", ["early_return", "no_last_barrier", "divergent", "half_warp"])
def test_the_emulator_outlives_an_error(plant: str, build: Build) -> None:
    for seed in range(3):
        done = run(build("plain"), plant, "none", plant, "none", FUSEDNORM_EMU_SEED=str(seed), FUSEDNORM_EMU_DEVICES="")
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("CUDA emulator: ") == 2


# Within Python.


@pytest.fixture(scope="module")
def emulator(build: Build) -> Iterator[Any]:
    """emulator.py, on a library that holds the controls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EMULATOR))
        for name in ("cupy", "cupy.cuda", "emulator"):
            patch.delitem(sys.modules, name, raising=False)
        import emulator

        emulator.use(str(build("library")))
        yield emulator
        for name in ("cupy", "cupy.cuda", "emulator"):
            sys.modules.pop(name, None)


@pytest.fixture
def cupy(emulator: Any) -> Any:
    import cupy

    assert Path(cupy.__file__).parent == EMULATOR
    cupy.cuda.Device(0).use()
    return cupy


HOST = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import emulator
emulator.use({library!r})
import cupy
x = cupy.zeros(4)
{attempt}
"""


def launch(
    emulator: Any, x: Any = None, by: float = 1, *, blocks: int = 1, threads: int = 32, shared: int = 0,
    raised: bool = True, cluster: int = 1, cooperative: bool = False, stream: int | None = None,
) -> int:  # fmt: skip
    function = emulator.library().launch_scale
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t,
                         ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]  # fmt: skip
    pointer, size = (None, 0) if x is None else (x.data.ptr, x.size)
    code: int = function(pointer, size, by, blocks, threads, shared, raised, cluster, cooperative, stream)
    return code


INVALID_VALUE, INITIALIZATION, INVALID_CONFIGURATION, INVALID_HANDLE = 1, 3, 9, 400
OUT_OF_RESOURCES, TOO_LARGE, NOT_SUPPORTED, CLUSTER_SIZE = 701, 720, 801, 912


@pytest.mark.parametrize(
    ("settings", "options", "error"),
    [
        ("", {"blocks": 50, "threads": 1024}, 0),
        ("", {"threads": 1025}, INVALID_CONFIGURATION),
        ("threads=256", {"threads": 257}, INVALID_CONFIGURATION),
        ("", {"blocks": 0}, INVALID_CONFIGURATION),
        ("", {"shared": 48 << 10, "raised": False}, 0),
        ("", {"shared": (48 << 10) + 1, "raised": False}, INVALID_VALUE),
        ("", {"shared": 227 << 10}, 0),
        ("", {"shared": (227 << 10) + 1}, INVALID_VALUE),
        ("shared=2048", {"shared": 2049}, INVALID_VALUE),
        ("sms=2,threads_sm=64", {"blocks": 4, "cooperative": True}, 0),
        ("sms=2,threads_sm=64", {"blocks": 5, "cooperative": True}, TOO_LARGE),
        ("sms=2,shared_sm=4096,reserved=0", {"blocks": 4, "shared": 2048, "cooperative": True}, 0),
        ("sms=2,shared_sm=4096,reserved=0", {"blocks": 4, "shared": 2049, "cooperative": True}, TOO_LARGE),
        ("cooperative=0", {"cooperative": True}, NOT_SUPPORTED),
        ("refuse_cooperative=1", {"cooperative": True}, TOO_LARGE),
        ("", {"blocks": 16, "cluster": 8}, 0),
        ("", {"blocks": 12, "cluster": 8}, INVALID_CONFIGURATION),
        ("", {"blocks": 16, "cluster": 16}, CLUSTER_SIZE),
        ("cluster=1", {"blocks": 2, "cluster": 2}, NOT_SUPPORTED),
        ("refuse_clusters=1", {"blocks": 2, "cluster": 2}, OUT_OF_RESOURCES),
        ("sms=1,threads_sm=64", {"blocks": 4, "cluster": 4}, OUT_OF_RESOURCES),
    ],
)
def test_launches_keep_to_the_device(settings: str, options: dict[str, Any], error: int, emulator: Any) -> None:
    emulator.devices(settings)
    emulator.launches()
    assert launch(emulator, **options) == error
    (done,) = emulator.launches() or [None]
    assert (done is None) == (error != 0)
    if done is not None:
        assert (done.grid[0], done.block[0]) == (options.get("blocks", 1), options.get("threads", 32))
        assert (done.cluster, done.cooperative) == (options.get("cluster", 1), options.get("cooperative", False))
        assert done.shared == options.get("shared", 0)


def test_settings_of_devices(emulator: Any, cupy: Any) -> None:
    assert emulator.devices("sms=2;;threads=64") == cupy.cuda.runtime.getDeviceCount() == 3
    with pytest.raises(ValueError, match="smx=2"):
        emulator.devices("smx=2")
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidDevice"):
        cupy.cuda.Device(3).use()


def test_a_kernel_on_arrays(emulator: Any, cupy: Any) -> None:
    emulator.devices(";")
    for seed in range(4):
        emulator.seed(seed)
        x = (
            cupy.arange(1000, dtype=np.float32)
            if hasattr(cupy, "arange")
            else cupy.asarray(np.arange(1000, dtype="f4"))
        )
        assert launch(emulator, x, 2.0, threads=96) == 0
        np.testing.assert_array_equal(x.get(), 2 * np.arange(1000, dtype="f4"))
    emulator.seed(0)


def test_python_threads_launch_at_the_same_time(emulator: Any, cupy: Any) -> None:
    emulator.devices("")
    arrays = [cupy.ones(500, np.float32) for _ in range(4)]

    def work(x: Any) -> None:
        for _ in range(20):
            assert launch(emulator, x, 2.0, threads=64) == 0
            x *= 0.5

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, arrays))
    for x in arrays:
        assert (x.get() == 1).all()


def test_launches_fail_in_a_child_of_fork(build: Build) -> None:
    code = """
import os
scale = lambda: emulator.library().launch_scale(None, 0, ctypes.c_float(1), 1, 32, 0, 0, 1, 0, None)
assert scale() == 0
pid = os.fork()
if pid == 0:
    os._exit(scale())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = run(sys.executable, "-c", HOST.format(folder=str(EMULATOR), library=str(build("library")), attempt=code))
    assert done.stdout.split() == [str(INITIALIZATION)], done.stdout


def test_streams_belong_to_devices(emulator: Any, cupy: Any) -> None:
    emulator.devices(";")
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
        emulator.launches()
        assert launch(emulator, stream=stream.ptr) == 0
        (done,) = emulator.launches()
        assert (done.device, done.stream) == (1, stream.ptr)
        with stream:
            assert cupy.cuda.get_current_stream() is stream
        assert cupy.cuda.get_current_stream() is cupy.cuda.Stream.null
    assert cupy.cuda.Device().id == 0
    assert launch(emulator, stream=stream.ptr) == INVALID_HANDLE


def test_a_graph_runs_when_it_is_launched(emulator: Any, cupy: Any) -> None:
    x = cupy.ones(8, np.float32)
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        assert launch(emulator, x, 2.0, stream=stream.ptr) == 0
        y = x + 1
        x *= 3
        with pytest.raises(RuntimeError, match="StreamCapture"):
            stream.synchronize()
        graph = stream.end_capture()
        assert x.get().tolist() == [1] * 8
        for times in (1, 2):
            graph.launch()
            assert x.get().tolist() == [6**times] * 8
            assert y.get().tolist() == [2 * 6 ** (times - 1) + 1] * 8


@pytest.mark.parametrize(
    ("attempt", "caught"),
    [
        ("x + 1", False),
        ("ctypes.string_at(x.data.ptr, 8)", True),
        ("p = x.data.ptr; del x; emulator.library().fn_emu_open(1); ctypes.string_at(p, 8)", True),
        ("emulator.library().fn_emu_open(1); ctypes.string_at(x.data.ptr, 32)", False),
        ("emulator.library().fn_emu_open(1); ctypes.string_at(x.data.ptr, 33)", True),
    ],
    ids=["allowed", "from the host", "after its end", "all of it", "behind it"],
)
def test_device_memory_is_closed(attempt: str, caught: bool, build: Build) -> None:
    done = run(sys.executable, "-c", HOST.format(folder=str(EMULATOR), library=str(build("library")), attempt=attempt))
    assert done.returncode == (-signal.SIGSEGV if caught else 0), done.stdout


# The stand-in against what CuPy 14.2 does.


def test_arrays_are_not_numpys(cupy: Any) -> None:
    x = cupy.zeros((2, 3), np.float32)
    assert not isinstance(x, np.ndarray)
    assert type(x).__module__ == "cupy"
    for attempt in (np.asarray, np.array, lambda a: np.ones(3) + a, lambda a: a + np.ones(3)):
        with pytest.raises(TypeError):
            attempt(x)
    for name in ("ctypes", "__array_interface__", "newbyteorder"):
        assert not hasattr(x, name)
    for name in ("aligned", "writeable"):
        assert not hasattr(x.flags, name)
    with pytest.raises(TypeError):
        hash(x)


def test_array_attributes(cupy: Any) -> None:
    host = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    x = cupy.asarray(host)
    for a, b in [
        (x, host),
        (x.T, host.T),
        (x[:, ::2, ::-1], host[:, ::2, ::-1]),
        (x.transpose(0, 2, 1), host.transpose(0, 2, 1)),
        (x[1], host[1]),
        (x[None, ..., 0], host[None, ..., 0]),
        (x.reshape(6, -1), host.reshape(6, -1)),
        (x.reshape((4, 6)), host.reshape((4, 6))),
        (x.ravel("K"), host.ravel("K")),
        (x.view(np.int32), host.view(np.int32)),
        (x[:1].squeeze(0), host[:1].squeeze(0)),
        (cupy.expand_dims(x, 1), np.expand_dims(host, 1)),
        (np.expand_dims(x, 1), np.expand_dims(host, 1)),
        (cupy.broadcast_to(x, (5, 2, 3, 4)), np.broadcast_to(host, (5, 2, 3, 4))),
    ]:
        assert isinstance(a, cupy.ndarray)
        for name in ("shape", "strides", "dtype", "ndim", "size", "itemsize", "nbytes"):
            assert getattr(a, name) == getattr(b, name)
        assert (a.flags.c_contiguous, a.flags.f_contiguous) == (b.flags.c_contiguous, b.flags.f_contiguous)
        assert a.flags.owndata == (a is x)
        assert a.data.ptr - x.data.ptr == b.__array_interface__["data"][0] - host.__array_interface__["data"][0]
        assert cupy.shares_memory(a, x)
        np.testing.assert_array_equal(a.get(), b)
        described = a.__cuda_array_interface__
        assert described["data"] == (a.data.ptr, False)
        assert described["strides"] == (None if b.flags.c_contiguous else b.strides)
        assert (described["version"], described["shape"], described["typestr"]) == (3, b.shape, b.dtype.str)
    assert not cupy.may_share_memory(x, x.copy())
    assert x[1:].base is x
    assert x.device == cupy.cuda.Device(0)


def test_what_is_computed(cupy: Any) -> None:
    host = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    x = cupy.asarray(host)
    y = cupy.empty_like(x.T)
    assert y.strides == x.T.strides
    assert np.isnan(y.get()).all()
    y[...] = x.T
    y[0] += 1
    y[1, :2] = 7
    host2 = host.T.copy("K")
    host2[0] += 1
    host2[1, :2] = 7
    for a, b in [
        (y, host2),
        (2 * x - 1 / x, 2 * host - 1 / host),
        (np.float64(2) * x, np.float64(2) * host),
        (cupy.sqrt(x), np.sqrt(host)),
        (np.sqrt(x), np.sqrt(host)),
        (-x, -host),
        (x > 3, host > 3),
        (x[x > 3], host[host > 3]),
        (x.sum(0), host.sum(0)),
        (x.mean(), host.mean()),
        (x.T.astype(np.float64), host.T.astype(np.float64)),
        (x.T.copy(), host.T.copy()),
        (cupy.ascontiguousarray(x.T), np.ascontiguousarray(host.T)),
        (cupy.full((2, 2), 3, np.float16), np.full((2, 2), 3, np.float16)),
        (cupy.asarray(host.astype(">f4")), host),
        (x.T.reshape(-1), host.T.reshape(-1)),
    ]:
        assert isinstance(a, cupy.ndarray)
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        np.testing.assert_array_equal(a.get(), b)
    assert float(x[0, 1]) == x[0, 1].item() == 2
    cupy.copyto(x, y.T)
    np.testing.assert_array_equal(cupy.asnumpy(x), host2.T)


def test_bfloat16(cupy: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    host = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    x = cupy.asarray(host)
    assert x.dtype == host.dtype
    np.testing.assert_array_equal((x[:, ::-1] + 1).get().astype("f4"), host[:, ::-1].astype("f4") + 1)


def test_devices_do_not_mix(emulator: Any, cupy: Any) -> None:
    emulator.devices(";")
    x = cupy.ones(3)
    with cupy.cuda.Device(1):
        y = cupy.ones(3)
        assert y.device.id == y.data.device_id == 1
        with pytest.raises(ValueError, match="same as the current device"):
            x + 1
        with pytest.raises(ValueError, match="same as the current device"):
            x[0] = 1
    with pytest.raises(ValueError, match="same as the current device"):
        x + y


def test_memory_that_somebody_else_owns(cupy: Any) -> None:
    x = cupy.zeros(6, np.float32)
    memory = cupy.cuda.UnownedMemory(x.data.ptr, x.nbytes, x, 0)
    y = cupy.ndarray((2, 2), np.float32, cupy.cuda.MemoryPointer(memory, 4), strides=(12, 4))
    y[...] = 1
    assert x.get().tolist() == [0, 1, 1, 0, 1, 1]
