"""The norms as JAX functions: under ``jit``, ``grad`` and ``vmap``, on the CPU.

::

    import fusednorm.jax as fnj

    y = fnj.layer_norm(x, x.shape[-1], scale, bias)
    y, (mean, var) = fnj.batch_norm(x, mean, var, scale, bias, training=True)  # new running statistics come out

Arguments, names and error words are those of :mod:`fusednorm.functional`; channels are last, as in Flax, unless `axis`
says otherwise. Arguments that are no arrays (eps, momentum, training, …) are Python's, known when a function is traced.

**How a call goes.** XLA calls back into Python (``buffer_callback``), where the kernels read and write XLA's memory in
place; nothing is copied. Not ``jax.pure_callback``: it puts the arguments on a device again, in XLA's own threads, and
waits for that in one of them; where all of these wait, as on a machine with one core, that is for ever. Built with
``FUSEDNORM_XLA=ON`` beside a jaxlib, whose headers that takes, XLA calls the kernels without Python, which counts for
small arrays; results are the same. What is wrong with a call is said when it is traced.

**Gradients.** Reverse mode (``grad``, ``vjp``, ``jacrev``), and reverse mode over it for norms without an activation
and a mask; third derivatives and forward mode (``jvp``, ``jacfwd``, ``hessian``) are errors. Running statistics are
constants to gradients, the old ones and the new.

**Saved statistics** are float64, which JAX does not have unless ``jax_enable_x64`` is set. They go from forward to
backward as the bits they are, in uint32: two float32, high and low, would do for the mean, but not at the ends of
float32's range; and so results are the same, bit for bit, as those of the NumPy functions.

**vmap** calls back once, with all entries, and the kernel for each entry: they are no further axis of one norm, since
each has gradients of weights, or statistics, of its own.
"""

from __future__ import annotations

import importlib.util

from fusednorm.arrays import installs

if importlib.util.find_spec("jax") is None:
    raise ModuleNotFoundError(f"fusednorm.jax needs JAX: {installs('jax')}", name="jax")

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from fusednorm import _C, functional, operands
from fusednorm.arrays import Array
from fusednorm.functional import Activation
from fusednorm.operands import LayoutOf

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


class _How(NamedTuple):
    """What of a call is no array."""

    layout_of: LayoutOf
    where: tuple[Any, ...]  # its arguments
    eps: float
    training: bool = True
    momentum: float = 0.0
    correction: int = 1
    activation: Activation = None
    center: bool = True
    saved: tuple[int, ...] = ()  # shape of the statistics, once it is known


# The kernels, on NumPy's arrays, into `out`; of what nobody asked for that is None.


def _statistics(how: _How, saved: Array) -> tuple[Array | None, Array]:
    """Mean, if there is one, and rstd, in the bits that are saved."""
    rows = saved.view(np.float64).reshape(1 + how.center, -1)
    return (rows[0].reshape(how.saved) if how.center else None), rows[-1].reshape(how.saved)


def _forward(
    how: _How, out: Sequence[Any], x: Array, weight: Array | None, bias: Array | None, residual: Array | None,
    running_mean: Array | None, running_var: Array | None, mask: Array | None,
) -> None:  # fmt: skip
    y, saved, *new = out
    for a, running in zip(new, (running_mean, running_var), strict=True):
        if a is not None:
            a[...] = running
    if how.training:
        running_mean, running_var = new
    _, *found = functional._forward(
        x, how.layout_of, how.where, weight, bias, how.eps, y, running_mean, running_var, how.training, how.momentum,
        -1, residual, how.activation, mask, False, how.center, how.correction,
    )  # fmt: skip
    _fill(_statistics(how, saved), found)


def _backward(
    how: _How, out: Sequence[Any], dy: Array, x: Array, weight: Array | None, bias: Array | None,
    residual: Array | None, mask: Array | None, saved: Array,
) -> None:  # fmt: skip
    dx, *others = out
    _, *found = functional._backward(
        dy, x, how.layout_of, how.where, *_statistics(how, saved), weight, bias, dx, not how.training, residual,
        how.activation, mask,
    )  # fmt: skip
    _fill(others, found)


def _double_backward(
    how: _How, out: Sequence[Any], v: Array, cweight: Array | None, cbias: Array | None, dy: Array, x: Array,
    weight: Array | None, saved: Array,
) -> None:  # fmt: skip
    # Several passes, between which half types would round.
    wide = np.float64 if x.dtype == np.float64 else np.float32
    v, dy, x = (a.astype(wide, copy=False) for a in (v, dy, x))
    found = functional._double_backward(
        v, dy, x, how.layout_of, how.where, *_statistics(how, saved), weight, cweight, cbias, not how.training
    )
    _fill(out, found)


def _fill(out: Sequence[Any], found: Sequence[Any]) -> None:
    for a, value in zip(out, found, strict=True):
        if a is not None:
            a[...] = value


# Called by XLA.


@dataclass(frozen=True)
class _Callback:
    """One of the above as XLA calls it. Equal ones are one to JAX, which compiles once for each."""

    kernel: Callable[..., None]
    how: _How
    ranks: tuple[int, ...]  # of the arguments; what they have besides, in front, is vmap's

    def __call__(self, context: Any, out: Sequence[Any], *args: Any) -> None:
        results, given = ([None if a is None else np.asarray(a) for a in one] for one in (out, args))
        there = (a for a in given if a is not None)
        entries = np.broadcast_shapes(*(a.shape[: a.ndim - r] for a, r in zip(there, self.ranks, strict=True)))
        if not entries:
            return self.kernel(self.how, results, *given)
        given = [None if a is None else np.broadcast_to(a, entries + a.shape[len(entries) :]) for a in given]
        for i in np.ndindex(entries):
            its_out, its_own = ([None if a is None else a[i] for a in one] for one in (results, given))
            self.kernel(self.how, its_out, *its_own)
        return None


def _call(kernel: Callable[..., None], how: _How, results: tuple[Any, ...], *args: jax.Array | None) -> tuple[Any, ...]:
    native = _native(kernel, how, results, args)
    if native is not None:
        return native
    called = _Callback(kernel, how, tuple(a.ndim for a in args if a is not None))
    return buffer_callback(called, results, vmap_method="expand_dims")(*args)  # type: ignore[no-any-return]


# Called by XLA without Python (csrc/bind/xla.cpp).

_HANDLERS = _C.xla_handlers()
for _name, _handler in _HANDLERS.items():
    jax.ffi.register_ffi_target(f"fusednorm_{_name}", _handler, platform="cpu")


def _which(arrays: tuple[Any, ...]) -> int:
    """A bit for each, set where it is not None."""
    return sum(1 << i for i, a in enumerate(arrays) if a is not None)


def _native(
    kernel: Callable[..., None], how: _How, results: tuple[Any, ...], args: tuple[jax.Array | None, ...]
) -> tuple[Any, ...] | None:
    """What the call returns; None where a kernel has no handler, or would not read x as it lies."""
    name = kernel.__name__[1:]
    if name not in _HANDLERS:
        return None
    x = args[1] if kernel is _backward else args[0]
    assert x is not None
    layout = how.layout_of(x.shape, np.empty(x.shape, x.dtype).strides, x.dtype, *how.where)
    if layout is None or layout.order is not None or x.size == 0:
        return None
    ((folded, *_),) = layout.parts
    code, slope = functional._activation(how.activation)
    numbers: dict[str, int] = {size: getattr(folded, size) for size in ("batch", "outer", "groups", "inner", "span")}
    numbers |= {"center": how.center, "training": how.training, "correction": how.correction, "activation": code}
    numbers |= {"arguments": _which(args), "results": _which(results)}
    call = jax.ffi.ffi_call(f"fusednorm_{name}", [a for a in results if a is not None], vmap_method="sequential")
    called = call(
        *(a for a in args if a is not None), **{key: np.int64(number) for key, number in numbers.items()},
        eps=np.float64(how.eps), momentum=np.float64(how.momentum), slope=np.float64(slope),
    )  # fmt: skip
    found = iter(called)
    return tuple(None if a is None else next(found) for a in results)


def _like(a: jax.Array | None) -> Any:
    return None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)


# The functions and their gradients. A rule of differentiation calls the function itself, not its callback, so that it
# can be differentiated in turn.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(
    how: _How, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, residual: jax.Array | None,
    running_mean: jax.Array | None, running_var: jax.Array | None, mask: jax.Array | None,
) -> tuple[Any, ...]:  # fmt: skip
    """y, the saved statistics and, in training, the new running ones."""
    saved = jax.ShapeDtypeStruct((2 * (1 + how.center) * math.prod(how.saved),), np.uint32)
    new = (_like(a) if how.training else None for a in (running_mean, running_var))
    return _call(_forward, how, (_like(x), saved, *new), x, weight, bias, residual, running_mean, running_var, mask)


def _norm_and_kept(
    how: _How, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, residual: jax.Array | None, *rest: Any
) -> tuple[Any, ...]:
    found = _norm(how, x, weight, bias, residual, *rest)
    return found, (x, weight, bias, residual, rest[-1], found[1])


def _norm_vjp(how: _How, kept: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, bias, residual, mask, saved = kept
    dy = cotangents[0]
    if how.activation is not None or residual is None:
        return *_gradients(how, dy, x, weight, bias, residual, mask, saved), None, None, None
    dx, dweight, dbias, _ = _gradients(how, dy, x, weight, bias, None, mask, saved)
    return dx, dweight, dbias, dy, None, None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    how: _How, dy: jax.Array, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None,
    residual: jax.Array | None, mask: jax.Array | None, saved: jax.Array,
) -> tuple[Any, ...]:  # fmt: skip
    """dx, dweight, dbias and dresidual; None for what was not given."""
    results = tuple(map(_like, (x, weight, bias, residual)))
    return _call(_backward, how, results, dy, x, weight, bias, residual, mask, saved)


def _gradients_and_kept(how: _How, *args: Any) -> tuple[Any, ...]:
    return _gradients(how, *args), args


def _gradients_vjp(how: _How, kept: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    dy, x, weight, _, _, mask, saved = kept
    missing = functional._no_double_backward(how.activation, mask)
    if missing:
        raise NotImplementedError(missing)
    v, cweight, cbias, _ = cotangents
    return *_second_gradients(how, v, cweight, cbias, dy, x, weight, saved), None, None, None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _second_gradients(
    how: _How, v: jax.Array, cweight: jax.Array | None, cbias: jax.Array | None, dy: jax.Array, x: jax.Array,
    weight: jax.Array | None, saved: jax.Array,
) -> tuple[Any, ...]:  # fmt: skip
    results = tuple(map(_like, (dy, x, weight)))
    return _call(_double_backward, how, results, v, cweight, cbias, dy, x, weight, saved)


def _second_gradients_and_kept(how: _How, *args: Any) -> tuple[Any, ...]:
    return _second_gradients(how, *args), None


def _third(how: _How, kept: None, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    raise NotImplementedError("a norm's second gradients have no gradients")


_norm.defvjp(_norm_and_kept, _norm_vjp)
_gradients.defvjp(_gradients_and_kept, _gradients_vjp)
_second_gradients.defvjp(_second_gradients_and_kept, _third)


# What users call.


def _expect(
    how: _How, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, residual: jax.Array | None,
    running_mean: jax.Array | None, running_var: jax.Array | None, mask: jax.Array | None,
) -> operands.Layout:  # fmt: skip
    """The layout. Raises what the kernels would, of arrays of which only shapes and dtypes are known."""

    def unfilled(a: jax.Array) -> Array:
        return np.empty(a.shape, a.dtype)

    given = unfilled(x)
    dense, layout = operands.dense(given, how.layout_of, how.where)
    operands.expect_statistics(layout, how.training, how.eps, running_mean, running_var)
    operands.expect_together(running_mean, running_var)
    if residual is not None:
        operands.alike(unfilled(residual), "residual", given, dense)
    if mask is not None:
        operands.positions(unfilled(mask), dense, layout)
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, a in parameters.items():
        if a is not None and layout.axis is not None:
            operands.expect_channels(unfilled(a), name, math.prod(layout.parameters))
        elif a is not None:
            operands.floating(name, a.dtype)
            operands.parameter(unfilled(a), name, layout)
    return layout


@partial(jax.jit, static_argnums=0, inline=True)
def _checked(how: _How, x: jax.Array, *rest: Any) -> tuple[Any, ...]:
    how = how._replace(saved=_expect(how, x, *rest).saved)
    y, _, *new = _norm(how, x, *rest)
    return y, *new


def _array(a: Any, name: str) -> jax.Array:
    if not isinstance(a, (jax.Array, np.ndarray)):
        kind = f"{type(a).__module__}.{type(a).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a JAX or NumPy array, not {kind}")
    return jnp.asarray(a)


def _normed(how: _How, x: Any, weight: Any, bias: Any, **others: Any) -> tuple[Any, ...]:
    """y and, in training, the new running statistics."""
    named = {"weight": weight, "bias": bias, "residual": None, "running_mean": None, "running_var": None, "mask": None}
    given = (None if a is None else _array(a, name) for name, a in (named | others).items())
    return _checked(how, _array(x, "x"), *given)  # type: ignore[no-any-return]


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = -1,
    residual: Any = None,
    activation: Activation = None,
    correction: int = 1,
    mask: Any = None,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Batch normalization as :func:`fusednorm.batch_norm_forward`, which documents the arguments and errors; here the
    channels are on the last axis unless `axis` says otherwise, and `training` is False unless given.

    Returns y and the running statistics ``(mean, var)``: in training the new ones, otherwise those given, so that they
    can be passed through: ``y, stats = batch_norm(x, *stats, training=training)``. In the words of Flax they are
    ``batch_stats``, of ``momentum=1 - momentum`` and, unless `correction` is 0, of a variance over n - 1.
    """
    functional._activation(activation)
    functional._check_correction(correction)
    if momentum is None:
        raise TypeError("momentum must be a number; a cumulative average is momentum=1 / (batches + 1)")
    how = _How(
        functional._batch, (index(axis), None), float(eps), bool(training), float(momentum), correction, activation
    )
    y, *new = _normed(
        how, x, weight, bias, residual=residual, running_mean=running_mean, running_var=running_var, mask=mask
    )
    return y, (new[0], new[1]) if training else (running_mean, running_var)


def instance_norm(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, axis: int = -1, mask: Any = None
) -> jax.Array:
    """y, like x: instance normalization as :func:`fusednorm.instance_norm_forward`, which documents the arguments and
    errors, without running statistics; the channels are on the last axis unless `axis` says otherwise."""
    how = _How(functional._instance, (index(axis),), float(eps))
    return _normed(how, x, weight, bias, mask=mask)[0]


def group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, axis: int = -1,
    mask: Any = None,
) -> jax.Array:  # fmt: skip
    """y, like x: group normalization as :func:`fusednorm.group_norm_forward`, which documents the arguments and
    errors; the channels are on the last axis unless `axis` says otherwise."""
    how = _How(functional._group, (index(axis), index(num_groups)), float(eps))
    return _normed(how, x, weight, bias, mask=mask)[0]


def layer_norm(
    x: Any, normalized_shape: int | Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> jax.Array:
    """y, like x: layer normalization as :func:`fusednorm.layer_norm_forward`, which documents the arguments and
    errors."""
    how = _How(functional._lines, (functional._shape_of(normalized_shape),), float(eps))
    return _normed(how, x, weight, bias)[0]


def rms_norm(x: Any, normalized_shape: int | Sequence[int], weight: Any = None, eps: float | None = None) -> jax.Array:
    """y, like x: RMS normalization as :func:`fusednorm.rms_norm_forward`, which documents the arguments and errors;
    eps None is ``finfo(float32).eps``, for float64 ``finfo(float64).eps``."""
    shape = functional._shape_of(normalized_shape)
    x = _array(x, "x")
    operands.floating("x", x.dtype)
    eps = functional._default_eps(x.dtype) if eps is None else eps
    return _normed(_How(functional._lines, (shape,), float(eps), center=False), x, weight, None)[0]
