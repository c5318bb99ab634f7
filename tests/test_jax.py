"""fusednorm.jax: against float64 results, the NumPy functions' bits, and what JAX asks of a function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case
from support import DTYPES, assert_same_bits, normal, run_python

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    from jax.test_util import check_grads

import fusednorm.jax as fnj
import jax.numpy as jnp


def x64(on: bool = True) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)


# The list of cases.


def of_the_adapter(case: Case) -> bool:
    if case.norm == "instance":
        return case.training
    return case.norm in ("batch", "group", "layer", "rms") and case.ghost_batch_size is None


def ours(case: Case, x: Any, weight: Any, bias: Any, residual: Any, running: Any, mask: Any) -> Any:
    """y and the running statistics."""
    if case.norm == "batch":
        return fnj.batch_norm(
            x, *running, weight, bias, case.training, case.momentum, case.eps, axis=case.axis, residual=residual,
            activation=case.activation, correction=case.correction, mask=mask,
        )  # fmt: skip
    if case.norm == "instance":
        return fnj.instance_norm(x, weight, bias, case.eps, axis=case.axis, mask=mask), running
    if case.norm == "group":
        return fnj.group_norm(x, case.groups, weight, bias, case.eps, axis=case.axis, mask=mask), running
    if case.norm == "layer":
        return fnj.layer_norm(x, case.normalized_shape, weight, bias, case.eps), running
    return fnj.rms_norm(x, case.normalized_shape, weight, case.eps), running


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if "quick" in case.tags else [pytest.mark.slow])
        for case in CASES
        if of_the_adapter(case)
    ],
)
def test_case(case: Case) -> None:
    inputs = cases.make(case)
    numpys = cases.run(case, inputs, fn)
    with x64("float64" in (case.dtype, case.param_dtype)):
        given = [None if a is None else jnp.asarray(a) for a in (inputs.x, inputs.weight, inputs.bias, inputs.residual)]
        running, dy = (inputs.running_mean, inputs.running_var), jnp.asarray(inputs.dy)

        @jax.jit
        def computed(*given: Any) -> Any:
            y, pull, new = jax.vjp(lambda *a: ours(case, *a, running, inputs.mask), *given, has_aux=True)
            return y, new, pull(dy)

        y, new, gradients = jax.tree.map(np.asarray, computed(*given))
    got = dict(zip(("dx", "dweight", "dbias", "dresidual"), gradients, strict=True)) | {"y": y}
    if case.norm == "batch":
        got |= dict(zip(("running_mean", "running_var"), new, strict=True))
    got = {name: a for name, a in got.items() if a is not None}
    for name, a in got.items():
        assert_same_bits(a, getattr(numpys, name), name)
    found = cases.compare(case, inputs, cases.expected(case, inputs), replace(numpys, **got))
    assert not [one for one in found if not one.ok]
    assert set(got) <= {one.name for one in found}


# Gradients by differences, and against JAX's own.

NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {}  # ours, the formula, and how many parameters


def norm(parameters: int = 2) -> Callable[..., Any]:
    def noted(pair: Callable[[], tuple[Any, Any]]) -> Any:
        NORMS[pair.__name__] = *pair(), parameters
        return pair

    return noted


def formula(x: Any, axes: Any, weight: Any = 1, bias: Any = 0, eps: float = 1e-5, center: bool = True) -> Any:
    mean = x.mean(axes, keepdims=True) if center else 0
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + eps) * weight + bias


def grouped(x: Any, weight: Any, bias: Any) -> Any:
    return formula(x.reshape(4, 3, 2, 3), (1, 3)).reshape(x.shape) * weight + bias


@norm()
def batch() -> Any:
    return lambda x, w, b: fnj.batch_norm(x, None, None, w, b, True)[0], lambda x, w, b: formula(x, (0, 1), w, b)


@norm()
def frozen() -> Any:
    mean, var = np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6)
    return (
        lambda x, w, b: fnj.batch_norm(x, mean, var, w, b)[0],
        lambda x, w, b: (x - mean) / jnp.sqrt(var + 1e-5) * w + b,
    )


@norm()
def instance() -> Any:
    return fnj.instance_norm, lambda x, w, b: formula(x, 1, w, b)


@norm()
def group() -> Any:
    return lambda x, w, b: fnj.group_norm(x, 2, w, b), grouped


@norm()
def layer() -> Any:
    return lambda x, w, b: fnj.layer_norm(x, 6, w, b), lambda x, w, b: formula(x, -1, w, b)


@norm(1)
def rms() -> Any:
    return lambda x, w: fnj.rms_norm(x, 6, w, 1e-5), lambda x, w: formula(x, -1, w, center=False)


@norm(0)
def plain() -> Any:
    """Without parameters, and of one line alone."""
    return lambda x: fnj.layer_norm(x.ravel(), x.size), lambda x: formula(x, None).ravel()


each_norm = pytest.mark.parametrize(
    ("ours", "theirs", "parameters"),
    [
        pytest.param(*norm, id=name, marks=[] if name in ("batch", "group") else [pytest.mark.thorough])
        for name, norm in NORMS.items()
    ],
)


def drawn(parameters: int, dtype: str = "float64") -> list[Any]:
    return [normal((4, 3, 6), dtype), *(normal((6,), dtype, seed) for seed in range(1, parameters + 1))]


@each_norm
def test_gradients(ours: Any, theirs: Any, parameters: int) -> None:
    given = drawn(parameters)
    every = tuple(range(len(given)))

    def loss(f: Any) -> Any:
        return lambda *a: jnp.sin(f(*a)).sum()

    def second(f: Any) -> Any:
        return lambda *a: sum(jnp.cos(g).sum() for g in jax.grad(loss(f), every)(*a))

    with x64():
        check_grads(ours, given, order=2, modes=["rev"])
        np.testing.assert_allclose(ours(*given), theirs(*given), atol=1e-12)
        for of in (loss, second):
            for got, want in zip(
                jax.jit(jax.grad(of(ours), every))(*given), jax.grad(of(theirs), every)(*given), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "tanh", ("leaky_relu", 0.2), None])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_gradients_with_residual_activation_and_mask(activation: Any, masked: bool) -> None:
    x, weight, bias = drawn(2)
    residual, mask = normal(x.shape, "float64", 3), normal(x.shape[:2]) < 0.5 if masked else None

    def function(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return fnj.batch_norm(
            x, None, None, weight, bias, True, residual=residual, activation=activation, mask=mask
        )[0]  # fmt: skip

    with x64():
        given = x, weight, bias, residual
        check_grads(function, given, order=1, modes=["rev"])
        if activation is None and not masked:
            check_grads(function, given, order=2, modes=["rev"])
            return
        what = "an activation" if activation is not None else "a mask"
        with pytest.raises(NotImplementedError, match=f"no double backward through a norm with {what}"):
            check_grads(function, given, order=2, modes=["rev"])


def test_what_has_no_gradient() -> None:
    x = normal((5, 4))

    def summed(x: Any) -> Any:
        return (fnj.layer_norm(x, 4) ** 3).sum()

    twice = jax.grad(lambda x: (jax.grad(summed)(x) ** 2).sum())
    with pytest.raises(NotImplementedError, match="second gradients have no gradients"):
        jax.grad(lambda x: twice(x).sum())(x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(summed, (x,), (x,))
    stats = np.zeros(4, np.float32), np.ones(4, np.float32)

    def running(x: Any, *stats: Any) -> Any:
        return sum(a.sum() for a in fnj.batch_norm(x, *stats, training=True)[1])

    for gradient in jax.grad(running, (0, 1, 2))(x, *stats):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [*DTYPES[:2], *(pytest.param(one, marks=pytest.mark.thorough) for one in DTYPES[2:])])
def test_second_gradients_have_the_dtypes_of_what_they_are_of(dtype: str) -> None:
    with x64(dtype == "float64"):
        given = [jnp.asarray(a) for a in drawn(2, dtype)]
        found = jax.grad(
            lambda *a: sum((g.astype(jnp.float32) ** 2).sum() for g in jax.grad(
                lambda *a: fnj.layer_norm(a[0], 6, *a[1:]).astype(jnp.float32).std(), (0, 1, 2)
            )(*a)), (0, 1, 2)
        )(*given)  # fmt: skip
        assert [a.dtype for a in found] == [a.dtype for a in given]
        assert all(np.isfinite(np.asarray(a, np.float64)).all() for a in found)


# JAX's transformations.


@each_norm
def test_vmap(ours: Any, theirs: Any, parameters: int) -> None:
    """The bits of a call for each entry: of x alone, of parameters alone, of both, at other axes, nested."""
    x, *rest = (jnp.asarray(a) for a in drawn(parameters, "float32"))
    xs, several = jnp.stack([x, x * 2 + 1, -x]), [jnp.stack([a, a + 1, a * 2]) for a in rest]

    def with_gradients(*a: Any) -> Any:
        y, pull = jax.vjp(ours, *a)
        return y, pull(jnp.cos(y))

    def expect(got: Any, entries: list[Any]) -> None:
        want = jax.tree.map(lambda *a: np.stack(a), *(with_gradients(*entry) for entry in entries))
        jax.tree.map(assert_same_bits, got, want)

    mapped = jax.jit(jax.vmap(with_gradients, (0, *(None for _ in rest))))
    expect(mapped(xs, *rest), [(one, *rest) for one in xs])
    expect(jax.vmap(with_gradients)(xs, *several), [(one, *(a[i] for a in several)) for i, one in enumerate(xs)])
    got = jax.vmap(with_gradients, (2, *(1 for _ in rest)))(jnp.moveaxis(xs, 0, 2), *(a.T for a in several))
    expect(got, [(one, *(a[i] for a in several)) for i, one in enumerate(xs)])
    if rest:
        got = jax.vmap(jax.vmap(with_gradients, (0, *(None for _ in rest))), (None, *(0 for _ in rest)))(xs, *several)
        for j in range(3):
            expect(jax.tree.map(lambda a, j=j: a[j], got), [(one, *(a[j] for a in several)) for one in xs])


def test_vmap_of_running_statistics() -> None:
    x, stats = normal((3, 5, 4)), (normal((3, 4)), np.abs(normal((3, 4))))
    y, new = jax.vmap(lambda x, *stats: fnj.batch_norm(x, *stats, training=True))(x, *stats)
    for i in range(3):
        jax.tree.map(assert_same_bits, (y[i], tuple(a[i] for a in new)),
                     fnj.batch_norm(x[i], *(a[i] for a in stats), training=True))  # fmt: skip


@each_norm
def test_checkpoint_and_scan(ours: Any, theirs: Any, parameters: int) -> None:
    given = drawn(parameters, "float32")

    def loss(f: Any) -> Any:
        return lambda *a: f(*a).std() + f(*a)[0].sum()

    assert_same_bits(jax.grad(loss(jax.checkpoint(ours)))(*given), jax.grad(loss(ours))(*given))
    x, *rest = given

    def steps(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (c + ours(c, *rest).reshape(c.shape), None), x, None, length=3)[0]

    by_hand = jnp.asarray(x)
    for _ in range(3):
        by_hand = by_hand + ours(by_hand, *rest).reshape(x.shape)
    assert_same_bits(steps(x), by_hand)
    assert np.isfinite(jax.jit(jax.grad(lambda x: steps(x).std()))(x)).all()


def test_a_second_call_compiles_nothing() -> None:
    x = normal((7, 11))
    fnj.layer_norm(x, 11)
    before = fnj._checked._cache_size()
    fnj.layer_norm(x + 1, 11)
    assert fnj._checked._cache_size() == before


def test_running_statistics_pass_through() -> None:
    x, mean, var = normal((8, 4)), jnp.zeros(4), jnp.ones(4)
    y, stats = fnj.batch_norm(x, mean, var)
    assert stats[0] is mean
    assert stats[1] is var
    np.testing.assert_allclose(y, x / math.sqrt(1 + 1e-5), rtol=1e-6)
    assert fnj.batch_norm(x, training=True)[1] == (None, None)
    _, (new_mean, new_var) = fnj.batch_norm(x, mean, var, training=True, momentum=0.01, correction=0)
    np.testing.assert_allclose(new_mean, 0.01 * x.mean(0), rtol=1e-5)  # Flax's momentum=0.99
    np.testing.assert_allclose(new_var, 0.99 + 0.01 * x.var(0), rtol=1e-5)
    assert not mean.any()


def test_empty() -> None:
    for shape in ((0, 3), (4, 0, 3), (0,)):
        x = np.zeros(shape, np.float32)
        assert fnj.layer_norm(x, shape[-1]).shape == shape
        assert jax.grad(lambda x: fnj.layer_norm(x, x.shape[-1]).sum())(x).shape == shape
        assert jax.vmap(lambda x: fnj.rms_norm(x, x.shape[-1]))(x[None]).shape == (1, *shape)


# Errors are those of the functions, and come when a call is traced.

X = normal((4, 3, 6))
C = np.ones(6, np.float32)
ERRORS: dict[str, Callable[[Any], Any]] = {
    "evaluation": lambda f: f.batch_norm(X, None, None, axis=-1),
    "one running": lambda f: f.batch_norm(X, C, None, training=True, axis=-1),
    "channels": lambda f: f.batch_norm(X, C, C[:5], axis=-1),
    "two axes": lambda f: f.batch_norm(X, C, C, C[None], axis=-1),
    "parameter dtype": lambda f: f.batch_norm(X, C, C, C.astype(np.int32), axis=-1),
    "one value": lambda f: f.batch_norm(X[:1, :1], None, None, training=True, axis=-1),
    "eps": lambda f: f.batch_norm(X, None, None, training=True, eps=0.0, axis=-1),
    "axis": lambda f: f.batch_norm(X, None, None, training=True, axis=3),
    "one axis": lambda f: f.batch_norm(X[0, 0], None, None, training=True, axis=-1),
    "dtype": lambda f: f.batch_norm(X.astype(np.int32), None, None, training=True, axis=-1),
    "activation": lambda f: f.batch_norm(X, None, None, training=True, axis=-1, activation=["relu"]),
    "residual": lambda f: f.batch_norm(X, None, None, training=True, axis=-1, residual=X[1:]),
    "residual dtype": lambda f: f.batch_norm(X, None, None, training=True, axis=-1, residual=X.astype(np.float16)),
    "mask": lambda f: f.batch_norm(X, None, None, training=True, axis=-1, mask=X[0] > 0),
    "mask dtype": lambda f: f.batch_norm(X, None, None, training=True, axis=-1, mask=X[..., 0]),
    "groups": lambda f: f.group_norm(X, 4, axis=-1),
    "no groups": lambda f: f.group_norm(X, 0, axis=-1),
    "group mask": lambda f: f.group_norm(X, 2, axis=-1, mask=X[0] > 0),
    "normalized": lambda f: f.layer_norm(X, 5),
    "normalized by nothing": lambda f: f.layer_norm(X, ()),
    "weight": lambda f: f.layer_norm(X, 6, C[:5]),
    "weight dtype": lambda f: f.layer_norm(X, 6, C > 0),
    "rms": lambda f: f.rms_norm(X, (3, 6), C),
    "instance": lambda f: f.instance_norm(X[:, :1], axis=-1),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS.keys())
def test_errors(call: Callable[[Any], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as numpys:
        call(fn)
    for way in (call, lambda f: jax.jit(lambda: call(f))(), lambda f: jax.eval_shape(lambda: call(f))):
        with pytest.raises(numpys.type) as jaxs:
            way(fnj)
        assert str(jaxs.value) == str(numpys.value)


def test_errors_of_its_own() -> None:
    with pytest.raises(TypeError, match="x must be a JAX or NumPy array, not list"):
        fnj.layer_norm([1.0], 1)
    with pytest.raises(TypeError, match="weight must be a JAX or NumPy array, not float"):
        fnj.rms_norm(X, 6, 1.0)
    with pytest.raises(TypeError, match="momentum must be a number"):
        fnj.batch_norm(X, training=True, momentum=None)  # type: ignore[arg-type]
    for name, value in {"eps": 1e-5, "momentum": 0.1, "training": True}.items():
        with pytest.raises(jax.errors.ConcretizationTypeError):
            jax.jit(lambda value, name=name: fnj.batch_norm(X, C, C, **{name: value}))(value)
    with pytest.raises(ValueError, match="correction must be 0 or 1"):
        fnj.batch_norm(X, training=True, correction=2)


# Calls without Python.


@pytest.mark.skipif(not fnj._HANDLERS, reason="built without FUSEDNORM_XLA")
class TestWithoutPython:
    @staticmethod
    def called(f: Callable[..., Any], *args: Any) -> dict[str, bool]:
        jaxpr = str(jax.make_jaxpr(f)(*args))
        return {call: call in jaxpr for call in ("ffi_call", "buffer_callback")}

    def test_what_is_called(self) -> None:
        """Where the kernels would read a copy, or there is nothing to do, Python calls."""
        native, python = {"ffi_call": True, "buffer_callback": False}, {"ffi_call": False, "buffer_callback": True}
        assert self.called(lambda x: fnj.layer_norm(x, 6), X) == native
        assert self.called(jax.grad(lambda x: fnj.rms_norm(x, 6).sum()), X) == native
        assert self.called(jax.vmap(lambda x: fnj.layer_norm(x, 6)), X[None]) == native
        assert self.called(lambda x: fnj.layer_norm(x, 6), X[:0]) == python
        assert self.called(lambda x: fnj.group_norm(x, 2, axis=0), jnp.ones((4, 3, 5))) == python

    def test_untraced_arrays_are_refused(self) -> None:
        """By the handlers themselves, which XLA hands whatever it is told to."""
        x = jnp.ones((4, 6))
        sizes = {"batch": 4, "outer": 1, "groups": 1, "inner": 6, "span": 1}
        flags = {"center": 1, "training": 1, "correction": 1, "activation": 0, "arguments": 1, "results": 3}
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((16,), jnp.uint32)]

        def call(x: Any, outs: Any = results, **changed: int) -> Any:
            numbers = {name: np.int64(n) for name, n in (sizes | flags | changed).items()}
            return jax.ffi.ffi_call("fusednorm_forward", outs)(
                x, **numbers, eps=np.float64(1e-5), momentum=np.float64(0), slope=np.float64(0)
            )

        assert_same_bits(np.asarray(call(x)[0]), np.asarray(fnj.layer_norm(x, 6)))
        for changed, message in (
            ({"batch": 5}, "an array of another size"),
            ({"arguments": 3}, "fewer arrays"),
            ({"training": 0}, "running statistics are missing"),
            ({"results": 1}, "the statistics are missing"),
            ({"span": 0}, "sizes that no kernel takes"),
            ({"batch": -4, "inner": -6}, "sizes that no kernel takes"),
            ({"inner": 6, "span": 4}, "sizes that no kernel takes"),
            ({"activation": 6}, "unknown activation"),
            ({"correction": 2}, "correction must be 0 or 1"),
        ):
            with pytest.raises(Exception, match=message):
                jax.block_until_ready(call(x, **changed))
        with pytest.raises(Exception, match="of another dtype"):
            jax.block_until_ready(call(jnp.ones((4, 6), jnp.int32)))
        with pytest.raises(Exception, match="of another kind"):
            jax.block_until_ready(call(x, [results[0], jax.ShapeDtypeStruct((16,), jnp.float32)]))


# Threads.


def step(x: Any, weight: Any) -> Any:
    def loss(x: Any, weight: Any) -> Any:
        a, _ = fnj.batch_norm(x, None, None, weight, training=True, activation="relu")
        b = fnj.layer_norm(jnp.tanh(x), 64, weight)
        return (fnj.rms_norm(a + b + fnj.group_norm(x * 2, 8, weight), 64) ** 2 * x).mean()

    return jax.value_and_grad(loss, (0, 1))(x, weight)


def test_several_calls_at_once() -> None:
    x, weight = normal((4, 28, 28, 64)), np.ones(64, np.float32)
    jitted = jax.jit(step)
    want = jax.tree.map(np.asarray, jitted(x, weight))

    def several(_: int) -> Any:
        return [jitted(x, weight) for _ in range(5)]  # none is waited for before the next

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(several, range(4)):
            for one in found:
                jax.tree.map(assert_same_bits, one, want)


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, numpy as np
from test_jax import step
from support import normal
x, weight = normal((4, 28, 28, 64)), np.ones(64, np.float32)
found = [jax.jit(step)(x + i, weight) for i in range(4)]
print(all(np.isfinite(a).all() for a in jax.tree.leaves(found)))
"""


def test_one_core() -> None:
    """There JAX has one thread for all: who waits in it for anything of JAX's waits for ever."""
    done = run_python(ON_ONE_CORE, timeout=600, PYTHONPATH=str(Path(__file__).parent))
    assert done.stdout.split() == ["True"], done.stderr


def test_the_package_does_without_jax() -> None:
    done = run_python("import fusednorm, sys; print('jax' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr
