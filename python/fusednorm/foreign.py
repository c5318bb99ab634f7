"""Arrays of other libraries: taken where they lie, and results handed back as arrays of the same library.

The kernels know NumPy's and CuPy's (arrays.py). PyTorch's, JAX's, and what has ``__dlpack__``, are seen as one of these
for the time of a call. No library is imported here: one whose array arrives is in ``sys.modules``. docs/arrays.md says
what is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from fusednorm import arrays
from fusednorm.arrays import Array

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Kind(NamedTuple):
    """How a library's arrays come and go."""

    taken: Callable[[Any, str], Array]  # over the same memory; the name is for errors
    handed: Callable[[Array, Any], Any]  # a result, to where the second argument lies
    running: Callable[[Any], Any] = nullcontext  # a context in which work follows what the library does on a GPU
    changes: bool = True  # whether its arrays can change


def bfloat16() -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError:
        raise TypeError(f"bfloat16 needs ml_dtypes: {arrays.installs('bf16')}") from None
    return found


def _from_torch(x: Any, name: str) -> Array:
    torch = sys.modules["torch"]
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, and what this function returns would not, without a word: pass "
                f"{name}.detach(), or call it under torch.no_grad()"
            )
        x = x.detach()
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be a dense tensor of a CPU or a CUDA device, not {x.layout} on {x.device}")
    halves = x.dtype == torch.bfloat16  # NumPy does not know it from PyTorch: as integers, then
    x = x.view(torch.int16) if halves else x
    a = x.numpy() if x.device.type == "cpu" else arrays.taken(x, name)
    return a.view(bfloat16()) if halves else a


def to_torch(a: Array, like: Any = None) -> Any:
    """A tensor over the array's memory."""
    torch = sys.modules["torch"]
    halves = a.dtype.kind == "V"  # bfloat16, which is not NumPy's own
    a = a.view(np.int16) if halves else a
    # Not from_dlpack on the CPU: of negative strides it aborts the process, where from_numpy raises.
    x = torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.from_dlpack(a)
    return x.view(torch.bfloat16) if halves else x


def _on_torchs_stream(x: Any) -> Any:
    if x.device.type != "cuda":
        return nullcontext()
    stream = sys.modules["torch"].cuda.current_stream(x.device)
    return import_module("cupy").cuda.ExternalStream(stream.cuda_stream, x.device.index)


def _from_jax(x: Any, name: str) -> Array:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{name} is traced (jax.jit, grad, vmap), and the kernels run outside of XLA: call this on arrays, or use "
            "the functions of fusednorm.jax"
        )
    devices = x.devices()
    platforms = {device.platform for device in devices}
    if len(devices) != 1 or not platforms <= {"cpu", "gpu", "cuda"}:
        raise TypeError(f"{name} must lie on one CPU or CUDA device, not on {', '.join(map(str, devices))}")
    if platforms == {"cpu"}:
        return np.asarray(x)
    return arrays.taken(x.block_until_ready(), name)


def _to_jax(a: Array, like: Any) -> Any:
    jax = sys.modules["jax"]
    if a.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        return a  # saved statistics, whose digits count: JAX would round them to float32
    (device,) = like.devices()
    return jax.device_put(a, device) if isinstance(a, np.ndarray) else jax.dlpack.from_dlpack(a)


@contextmanager
def _until_done(x: Any) -> Iterator[None]:
    """On a GPU, waits at the end: JAX's streams are its own."""
    yield
    if any(device.platform != "cpu" for device in x.devices()):
        import_module("cupy").cuda.get_current_stream().synchronize()


_DLPACK_CPU, _DLPACK_CUDA = 1, (2, 13)  # DLDeviceType: kDLCPU; kDLCUDA, kDLCUDAManaged


def _from_dlpack(x: Any, name: str) -> Array:
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    place, _ = x.__dlpack_device__()
    if place != _DLPACK_CPU and place not in _DLPACK_CUDA:
        raise TypeError(f"{name} ({kind}) must lie on a CPU or CUDA device, not on one of DLPack's type {place!r}")
    missing = arrays.missing_for_cuda() if place != _DLPACK_CPU else ""
    if missing:
        raise TypeError(f"{name} is an array of a GPU ({kind}): {missing}")
    library = np if place == _DLPACK_CPU else import_module("cupy")
    try:
        return library.from_dlpack(x)  # type: ignore[no-any-return]
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} ({kind}) is not to be had through DLPack: {error}") from error


def _to_its_namespace(a: Array, like: Any) -> Any:
    """By the array API standard; what does not follow it gets NumPy's or CuPy's."""
    return like.__array_namespace__().from_dlpack(a) if hasattr(like, "__array_namespace__") else a


_LIBRARIES = (
    ("torch", "Tensor", Kind(_from_torch, to_torch, _on_torchs_stream)),
    ("jax", "Array", Kind(_from_jax, _to_jax, _until_done, changes=False)),
)
_DLPACK = Kind(_from_dlpack, _to_its_namespace)


def kind_of(x: object) -> Kind | None:
    """The library's; None for NumPy, CuPy, what has `__cuda_array_interface__` alone, and all that is no array."""
    if isinstance(x, np.ndarray):
        return None
    for library, array, kind in _LIBRARIES:
        if isinstance(x, getattr(sys.modules.get(library), array, ())):
            return kind
    return _DLPACK if hasattr(x, "__dlpack__") and not isinstance(x, _cupys()) else None


def _cupys() -> Any:
    return getattr(sys.modules.get("cupy"), "ndarray", ())


def plain(x: Any, name: str) -> Any:
    """`x`, or NumPy's or CuPy's array in its place."""
    kind = kind_of(x)
    return x if kind is None else kind.taken(x, name)


def called(function: Callable[..., Any], like: Any, given: Mapping[str, Any]) -> Any:
    """`function(**given)` with NumPy's or CuPy's arrays in the place of others. The arrays it returns are those of the
    library of `like`; one that was given, such as out, comes back as it was given.
    """
    kind = kind_of(like)
    assert kind is not None
    taken = dict(given)
    for name, value in given.items():
        its = kind_of(value)
        if its is None:
            continue
        written = name == "out" or (name.startswith("running_") and given.get("training", True))
        if written and not its.changes:
            instead = "leave it out" if name == "out" else f"pass np.array({name}), which is updated"
            raise TypeError(f"{name} would be written to, and JAX's arrays do not change: {instead}")
        taken[name] = its.taken(value, name)
    came = {id(taken[name]): value for name, value in given.items()}

    def handed(result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(handed(one) for one in result)
        if id(result) in came:
            return came[id(result)]
        return kind.handed(result, like) if isinstance(result, (np.ndarray, _cupys())) else result

    with kind.running(like):
        return handed(function(**taken))


def on_its_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with the device of its first argument as the current one: CuPy computes on that. An array of another
    library there makes it one of that library."""
    arguments = signature(function)
    first = next(iter(arguments.parameters))

    @wraps(function)
    def on_it(*args: _P.args, **named: _P.kwargs) -> _R:
        x = args[0] if args else named.get(first)
        if type(x) is np.ndarray:
            return function(*args, **named)
        if kind_of(x) is not None:
            return called(on_it, x, arguments.bind(*args, **named).arguments)  # type: ignore[no-any-return]
        with arrays.on(arrays.device(arrays.taken(x, first))):
            return function(*args, **named)

    return on_it
