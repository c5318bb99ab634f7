"""Arrays of other libraries: the same bits as with NumPy, over the same memory, and back as they came."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import arrays, foreign
from support import DTYPES, Array, assert_same_bits, channels_last, normal, numpy_dtype, run_python


class Exported:
    """What the array API standard asks of an array, and nothing more."""

    def __init__(self, a: Array) -> None:
        self.a = a

    def __dlpack__(self, **options: Any) -> Any:
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.a.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return Exported

    @staticmethod
    def from_dlpack(a: Any) -> Exported:
        return Exported(np.from_dlpack(a))


class Library(NamedTuple):
    array: Any  # its type
    of: Callable[[Array], Any]  # over the same memory, where it can
    numpy: Callable[[Any], Array]
    address: Callable[[Any], int]
    dtypes: tuple[str, ...]


def _torch() -> Library:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    def of(a: Array) -> Any:
        halves = a.dtype.name == "bfloat16"
        x = torch.from_numpy(a.view(np.int16) if halves else a)
        return x.view(torch.bfloat16) if halves else x

    def numpy(x: Any) -> Array:
        halves = x.dtype == torch.bfloat16
        return x.view(torch.int16).numpy().view(numpy_dtype("bfloat16")) if halves else x.numpy()

    return Library(torch.Tensor, of, numpy, lambda x: x.data_ptr(), DTYPES)


def _jax() -> Library:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax = pytest.importorskip("jax", reason="JAX is not installed")
    dtypes = ("float32", "float16", "bfloat16")  # float64 with jax_enable_x64
    return Library(jax.Array, jax.device_put, np.asarray, lambda x: x.unsafe_buffer_pointer(), dtypes)


def _dlpack() -> Library:
    return Library(Exported, Exported, lambda x: x.a, lambda x: x.a.ctypes.data, ("float32", "float64", "float16"))


@pytest.fixture(params=[_torch, _jax, _dlpack], ids=["torch", "jax", "dlpack"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def jax() -> Any:
    _jax()
    return import_module("jax")


X, Y = (4, 6, 5, 3), (4, 6, 5, 3)
# Every function, with arrays that `of` makes of NumPy's; forward results that a backward takes are made by the forward.
Of = Callable[[Array], Any]


def _batch(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    options: dict[str, Any] = {"residual": of(dy), "activation": "silu", "mask": of(x[:, 0].astype(np.float32) > -1)}
    y, *saved = fn.batch_norm_forward(of(x), of(w), of(b), **options)
    return y, *saved, *fn.batch_norm_backward(of(dy), of(x), *saved, of(w), of(b), **options)


def _ghosts(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    y, *saved = fn.batch_norm_forward(of(x), of(w), of(b), ghost_batch_size=3)
    return y, *saved, *fn.batch_norm_backward(of(dy), of(x), *saved, of(w), of(b), ghost_batch_size=3)


def _instance(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    y, *saved = fn.instance_norm_forward(of(x), of(w), of(b))
    return y, *saved, *fn.instance_norm_backward(of(dy), of(x), *saved, of(w), of(b))


def _group(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    y, *saved = fn.group_norm_forward(of(x), 3, of(w), of(b))
    return y, *saved, *fn.group_norm_backward(of(dy), of(x), *saved, of(w), of(b))


def _layer(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    w, b = (np.resize(a, x.shape[1:]) for a in (w, b))
    y, *saved = fn.layer_norm_forward(of(x), x.shape[1:], of(w), of(b))
    return y, *saved, *fn.layer_norm_backward(of(dy), of(x), *saved, of(w), of(b))


def _rms(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    w = np.resize(w, x.shape[-1:])
    y, rstd = fn.rms_norm_forward(of(x), x.shape[-1], of(w))
    return y, rstd, *fn.rms_norm_backward(of(dy), of(x), rstd, of(w))


def _switchable(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    logits = of(w[:3].copy()), of(b[:3].copy())
    y, *saved = fn.switchable_norm_forward(of(x), *logits, of(w), of(b))
    return y, *saved, *fn.switchable_norm_backward(of(dy), of(x), *saved, *logits, of(w), of(b))


def _weight(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    g = of(w.reshape(1, -1, 1, 1))
    y, norm = fn.weight_norm_forward(of(x), g, 1)
    return y, norm, *fn.weight_norm_backward(of(dy), of(x), g, norm, 1)


def _plain(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    return (
        fn.batch_norm(of(x), None, None, of(w), of(b), training=True),
        fn.batch_norm(of(x), of(b), of(abs(w)), of(w), of(b)),
        fn.instance_norm(of(x)),
        fn.group_norm(of(x), 2),
        fn.layer_norm(of(x), 3),
        fn.rms_norm(of(x), 3),
        fn.switchable_norm(of(x), of(w[:3].copy()), of(b[:3].copy()), training=True),
        fn.weight_norm(of(x), of(w.reshape(1, -1, 1, 1)), dim=1),
    )


def _tensorflows(of: Of, x: Array, dy: Array, w: Array, b: Array) -> Any:
    mean, variance = fn.moments(of(x), (0, 2, 3), keepdims=True)
    shape = (1, -1, 1, 1)
    y = fn.batch_normalization(of(x), mean, variance, of(b.reshape(shape)), of(w.reshape(shape)), 1e-3)
    return mean, variance, y, *fn.moments(of(x), (0, 1, 2, 3))


CALLS = (_batch, _ghosts, _instance, _group, _layer, _rms, _switchable, _weight, _plain, _tensorflows)


def inputs(dtype: str) -> tuple[Array, ...]:
    return normal(X, dtype), normal(Y, dtype, 1), normal((6,), dtype, 2), normal((6,), dtype, 3)


@pytest.mark.parametrize("call", CALLS)
def test_every_function_gives_the_same_bits(library: Library, call: Any) -> None:
    for dtype in library.dtypes:
        given = inputs(dtype)
        for got, want in zip(call(library.of, *given), call(lambda a: a, *given), strict=True):
            if want.dtype == np.float64 and "float64" not in library.dtypes:  # saved statistics, in full
                assert type(got) is np.ndarray
                assert_same_bits(got, want, dtype)
            else:
                assert isinstance(got, library.array)
                assert_same_bits(library.numpy(got), want, dtype)


def test_the_memory_is_the_callers(library: Library) -> None:
    for dtype in library.dtypes:
        a = arrays.empty((1 << 16, 8), numpy_dtype(dtype))  # of the pool, so aligned as JAX wants it
        a[...] = 1
        x = library.of(a)
        kind = foreign.kind_of(x)
        assert kind is not None
        taken = kind.taken(x, "x")
        assert type(taken) is np.ndarray
        assert taken.dtype == a.dtype
        assert taken.ctypes.data == library.address(x) == a.ctypes.data
        assert library.address(kind.handed(a, x)) == a.ctypes.data


def test_axes_keep_their_order_in_memory(torch: Any) -> None:
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    y = fn.batch_norm(x, None, None, training=True)
    assert y.stride() == x.stride()
    stepped = torch.randn(4, 12, 6)[:, ::2].transpose(0, 2)
    want = fn.batch_norm(stepped.numpy(), None, None, training=True)
    assert_same_bits(fn.batch_norm(stepped, None, None, training=True).numpy(), want)


def test_running_statistics_and_out_of_pytorch_are_written(torch: Any) -> None:
    x, w = torch.randn(5, 4, 3), torch.rand(4, dtype=torch.float64)
    mean, var, out = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4), torch.empty(5, 4, 3)
    running = numpy_dtype("bfloat16").type(0) + np.zeros(4, numpy_dtype("bfloat16")), np.ones(4, np.float32)
    want, *_ = fn.batch_norm_forward(x.numpy(), w.numpy(), running_mean=running[0], running_var=running[1])
    y, saved, _ = fn.batch_norm_forward(x, w, running_mean=mean, running_var=var, out=out)
    assert y is out
    assert saved.dtype == torch.float64
    assert_same_bits(out.numpy(), want)
    assert_same_bits(mean.view(torch.int16).numpy().view(running[0].dtype), running[0])
    assert_same_bits(var.numpy(), running[1])
    # Where to is NumPy's, with strides that PyTorch has not.
    back = np.empty((5, 4, 3), np.float32)[::-1]
    assert fn.batch_norm_forward(x, w, out=back)[0] is back
    assert_same_bits(back, want)


def test_numpys_arrays_may_stand_beside(library: Library) -> None:
    x, dy, w, b = inputs("float32")
    mean, var = np.zeros(6, np.float32), np.ones(6, np.float32)
    y = fn.batch_norm(library.of(x), mean, var, w, b, training=True)
    assert isinstance(y, library.array)
    assert_same_bits(library.numpy(y), fn.batch_norm(x, None, None, w, b, training=True))
    assert mean.any()
    with pytest.raises(TypeError, match="weight must be a NumPy or CuPy array"):
        fn.batch_norm(x, None, None, library.of(w), training=True)
    with pytest.raises(TypeError, match="dy must be a NumPy or CuPy array"):
        fn.batch_norm_backward(library.of(dy), x, np.zeros(6), np.ones(6))


def test_a_graph_is_not_cut_in_silence(torch: Any) -> None:
    x, w = torch.randn(5, 4), torch.nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match=r"weight requires grad.*weight\.detach\(\).*no_grad"):
        fn.batch_norm_forward(x, w)
    with torch.no_grad():
        y, *_ = fn.batch_norm_forward(x, w)
    assert_same_bits(y.numpy(), fn.batch_norm_forward(x, w.detach())[0].numpy())
    with pytest.raises(RuntimeError, match="x requires grad"):
        fn.moments(x.requires_grad_(), 0)


def test_what_pytorch_has_besides_is_a_type_error(torch: Any) -> None:
    for x, words in (
        (torch.ones(3, 4, device="meta"), "on meta"),
        (torch.ones(3, 4).to_sparse(), "sparse"),
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.ones(3, 4, dtype=torch.complex64), "complex64"),
    ):
        with pytest.raises(TypeError, match=words):
            fn.batch_norm_forward(x)


def test_jax_arrays_do_not_change(jax: Any) -> None:
    x, zeros, ones = (jax.numpy.asarray(a) for a in (normal((5, 4)), np.zeros(4), np.ones(4)))
    with pytest.raises(TypeError, match=r"running_mean would be written.*np\.array\(running_mean\)"):
        fn.batch_norm(x, zeros, ones, training=True)
    with pytest.raises(TypeError, match="running_var would be written"):
        fn.switchable_norm_forward(x, ones[:3], ones[:3], running_mean=np.zeros(4), running_var=ones)
    with pytest.raises(TypeError, match=r"out would be written.*leave it out"):
        fn.layer_norm(x, 4, out=x)
    assert_same_bits(fn.batch_norm(x, zeros, ones), fn.batch_norm(np.asarray(x), np.zeros(4), np.ones(4)))
    mean, var = np.array(zeros), np.array(ones)
    fn.batch_norm(x, mean, var, training=True)
    np.testing.assert_allclose(mean, 0.1 * np.asarray(x).mean(0), rtol=1e-5)
    assert not np.asarray(zeros).any()


def test_jax_with_float64(jax: Any) -> None:
    with jax.enable_x64(True):
        x = jax.numpy.asarray(normal((5, 4), "float64"))
        assert x.dtype == np.float64
        y, mean, rstd = fn.batch_norm_forward(x)
    assert {type(a) for a in (y, mean, rstd)} == {type(x)}
    assert mean.dtype == np.float64
    assert_same_bits(y, fn.batch_norm_forward(np.asarray(x))[0])


def test_a_traced_array_says_what_to_do(jax: Any) -> None:
    x = jax.numpy.ones((5, 4))
    with pytest.raises(TypeError, match=r"x is traced.*fusednorm\.jax"):
        jax.jit(lambda x: fn.layer_norm(x, 4))(x)

    def on_the_host(x: Any) -> Any:
        return np.asarray(fn.layer_norm(x, 4))

    y = jax.jit(lambda x: jax.pure_callback(on_the_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x))(x)
    assert_same_bits(y, fn.layer_norm(np.ones((5, 4), np.float32), 4))


def test_an_array_on_several_devices_is_a_type_error() -> None:
    _jax()
    code = """
import warnings
warnings.simplefilter("ignore")
import jax, fusednorm as fn
mesh = jax.sharding.Mesh(jax.devices(), ("n",))
x = jax.device_put(jax.numpy.ones((4, 3)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n")))
try:
    fn.layer_norm(x, 3)
except TypeError as error:
    print(error)
one = jax.device_put(jax.numpy.ones((4, 3)), jax.devices()[1])
print(fn.layer_norm(one, 3).devices() == one.devices())
"""
    done = run_python(code, timeout=300, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    assert "x must lie on one CPU or CUDA device" in done.stdout, done.stderr
    assert done.stdout.endswith("True\n"), done.stderr


class Bare:
    """DLPack alone, by which nothing can be handed back."""

    def __init__(self, a: Array, place: int = 1) -> None:
        self.a, self.place = a, place

    def __dlpack__(self, **options: Any) -> Any:
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place, 0


def test_dlpack_without_a_namespace_comes_back_as_numpy() -> None:
    x = normal((5, 4))
    y = fn.layer_norm(Bare(x), 4)  # type: ignore[arg-type]
    assert type(y) is np.ndarray
    assert_same_bits(y, fn.layer_norm(x, 4))


def test_what_dlpack_cannot_say_is_a_type_error() -> None:
    x = normal((5, 4))
    with pytest.raises(TypeError, match="DLPack's type 8"):
        fn.layer_norm(Bare(x, 8), 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"through DLPack: .*native"):
        fn.layer_norm(Bare(x.astype(">f4")), 4)  # type: ignore[arg-type]
    if fn.build_info()["cuda"].startswith("not built"):
        with pytest.raises(TypeError, match=r"x is an array of a GPU .*Bare.*CUDA is not built"):
            fn.layer_norm(Bare(x, 2), 4)  # type: ignore[arg-type]


def test_bfloat16_without_ml_dtypes_says_what_to_install(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"pip install 'fusednorm\[bf16\]'"):
        fn.layer_norm(torch.ones(3, 4, dtype=torch.bfloat16), 4)


def test_layers_say_what_they_take(library: Library) -> None:
    with pytest.raises(TypeError, match="x must be a NumPy or CuPy array"):
        fn.BatchNorm(6)(library.of(normal(X)))


def test_moments_are_pushed(library: Library) -> None:
    x = normal(X)
    assert_same_bits(fn.Moments().push(library.of(x), (0, 2, 3)).m2, fn.Moments().push(x, (0, 2, 3)).m2)


def test_arguments_too_many_are_not_lost(library: Library) -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        fn.moments(library.of(normal(X)), 0, 1)  # type: ignore[misc]


def test_no_library_is_imported() -> None:
    code = """
import sys
import numpy as np
import fusednorm as fn
class Bare:
    def __init__(self, a): self.a = a
    def __dlpack__(self, **options): return self.a.__dlpack__(**options)
    def __dlpack_device__(self): return self.a.__dlpack_device__()
x = np.ones((3, 4), np.float32)
for a in (x, Bare(x)):
    fn.batch_norm(a, None, None, training=True), fn.moments(a, 0), fn.rms_norm(a, 4)
try:
    fn.batch_norm([1.0], None, None)
except TypeError:
    pass
fn.BatchNorm.from_convention("keras", 4)(x)
print({"torch", "jax", "cupy", "keras", "flax", "onnx", "ml_dtypes"} & set(sys.modules))
"""
    done = run_python(code, timeout=300)
    assert done.stdout == "set()\n", done.stderr


def test_channels_last_of_jax(jax: Any) -> None:
    """JAX's arrays are C-ordered to us: what lies otherwise is copied on the way back."""
    x = channels_last(normal((2, 6, 4, 5)))
    y = fn.batch_norm(jax.numpy.asarray(x), None, None, training=True)
    assert_same_bits(y, fn.batch_norm(np.ascontiguousarray(x), None, None, training=True))
