"""One function for PyTorch tensors, :func:`norm`, over the verbs of every norm; what it does is in the package's text.

Three custom ops say to PyTorch what the kernels are: ``fusednorm::norm``, ``fusednorm::norm_backward`` and
``fusednorm::norm_double_backward``. All are functional: running statistics go in and new ones come out.

=============  =====================================================================================================
``kind``       "batch", "instance", "group", "layer" or "rms"; channels are axis 1
``size``       group: (number of groups,); layer, RMS: normalized_shape; else ()
``own``        whether statistics are x's own; otherwise the running ones, constants in the backward
``activation`` a name, with ``slope`` for leaky ReLU, or None
=============  =====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from fusednorm import arrays, functional
from fusednorm.arrays import Array
from fusednorm.foreign import bfloat16, to_torch
from fusednorm.operands import LayoutOf

__all__ = ["norm"]

_R = TypeVar("_R")
_Saved = Array | None

_LIBRARY = torch.library.Library("fusednorm", "DEF")
# Outputs have x's strides, so a compiler must not change these.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var, "
    "Tensor? mask, str kind, int[] size, bool own, float momentum, float eps, str? activation, float slope)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor new_mean, Tensor new_var)",
    tags=_TAGS,
)
_LIBRARY.define(
    "norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, str kind, int[] size, bool own, str? activation, float slope)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=_TAGS,
)
_LIBRARY.define(
    "norm_double_backward(Tensor v, Tensor? cweight, Tensor? cbias, Tensor dy, Tensor x, Tensor mean, Tensor rstd, "
    "Tensor? weight, str kind, int[] size, bool own) -> (Tensor ddy, Tensor dx, Tensor dweight)",
    tags=_TAGS,
)


# Tensors and arrays over the same memory.


def _array(t: Tensor | None) -> Any:
    """A NumPy or CuPy array over the tensor's memory; None of None."""
    if t is None:
        return None
    if t.requires_grad:
        t = t.detach()
    if t.dtype is torch.bfloat16:
        return _array(t.view(torch.int16)).view(bfloat16())
    return t.numpy() if t.is_cpu else arrays.taken(t, "a tensor")


def _is_read_in_place(x: Tensor, kind: str, size: Sequence[int]) -> bool:
    """Without gaps and overlaps, in any order of axes, but a line's last; outputs lie as x does then."""
    if x.is_contiguous():
        return True
    if kind in ("layer", "rms") and any(
        n != 1 and stride != math.prod(size[axis + 1 :])
        for axis, (n, stride) in enumerate(zip(size, x.stride()[x.dim() - len(size) :], strict=False))
    ):
        return False
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _dense(x: Tensor, kind: str, size: Sequence[int]) -> Tensor:
    """x, or a copy, made here: NumPy would make it on one thread."""
    return x if _is_read_in_place(x, kind, size) else x.contiguous()


def _as_lies(x: Tensor, a: Tensor | None) -> Tensor | None:
    """`a`, or a copy that lies as the dense x does."""
    if a is None or a.stride() == x.stride() or a.shape != x.shape:  # of the wrong shape: an error, further on
        return a
    return torch.empty_like(x, dtype=a.dtype).copy_(a)


def _on_its_stream(kernel: Callable[..., _R]) -> Callable[..., _R]:
    """On a GPU, with the device of the first tensor, and PyTorch's current stream there, as CuPy's."""

    def called(*args: Any) -> _R:
        if args[0].is_cpu:
            return kernel(*args)
        device, missing = args[0].device, arrays.missing_for_cuda()
        if missing:
            raise TypeError(f"x is on {device}: {missing}")
        cupy, stream = import_module("cupy"), torch.cuda.current_stream(device).cuda_stream
        with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
            return kernel(*args)

    return called


# The kernels.


def _layout(kind: str, size: Sequence[int]) -> tuple[LayoutOf, tuple[Any, ...]]:
    if kind == "batch":
        return functional._batch, (1, None)
    if kind == "instance":
        return functional._instance, (1,)
    if kind == "group":
        return functional._group, (1, size[0])
    return functional._lines, (tuple(size),)


def _activation(name: str | None, slope: float) -> functional.Activation:
    return (name, slope) if name == "leaky_relu" else name


@_on_its_stream
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, mask: Tensor | None, kind: str, size: Sequence[int], own: bool, momentum: float,
    eps: float, activation: str | None, slope: float,
) -> tuple[Tensor, _Saved, Array]:  # fmt: skip
    """y, mean and rstd; running statistics change in place."""
    layout_of, how = _layout(kind, size)
    x = _dense(x, kind, size)
    residual = _as_lies(x, residual)
    y, mean, rstd = functional._forward(
        _array(x), layout_of, how, _array(weight), _array(bias), eps, None, _array(running_mean),
        _array(running_var), own, momentum, -1, _array(residual), _activation(activation, slope), _array(mask),
        kind == "instance", kind != "rms",
    )  # fmt: skip
    return to_torch(y), mean, rstd


@_on_its_stream
def _backward(
    dy: Tensor, x: Tensor, mean: _Saved, rstd: Array, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, mask: Tensor | None, kind: str, size: Sequence[int], own: bool, activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dx, dweight, dbias and dresidual. Without an activation bias serves for nothing but the dtype of dbias, and is
    not kept for it."""
    layout_of, how = _layout(kind, size)
    weight_, x = _array(weight), _dense(x, kind, size)
    dy, residual = _as_lies(x, dy), _as_lies(x, residual)
    dx, dweight, dbias, dresidual = functional._backward(
        _array(dy), _array(x), layout_of, how, mean, rstd, weight_, weight_ if bias is None else _array(bias),
        None, not own, _array(residual), _activation(activation, slope), _array(mask),
    )  # fmt: skip
    return to_torch(dx), to_torch(dweight), to_torch(dbias), None if dresidual is None else to_torch(dresidual)


@_on_its_stream
def _double_backward(
    v: Tensor, cweight: Tensor | None, cbias: Tensor | None, dy: Tensor, x: Tensor, mean: _Saved, rstd: Array,
    weight: Tensor | None, kind: str, size: Sequence[int], own: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    layout_of, how = _layout(kind, size)
    # Several passes, between which half types would round.
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    x = _dense(x, kind, size)
    v_, dy_, x_ = (_array(t.to(wide)) for t in (v, dy, x))
    found = functional._double_backward(
        v_, dy_, x_, layout_of, how, mean, rstd, _array(weight), _array(cweight), _array(cbias), not own
    )
    ddy, dx, dweight = (to_torch(a) for a in found)
    return ddy.to(x.dtype), dx.to(x.dtype), dweight


@_on_its_stream
def batch_moments(x: Tensor, mask: Tensor | None) -> tuple[Array, Array, Array]:
    """Count, mean and m2 of each channel, (1, C) float64."""
    return functional._batch_moments(_array(_dense(x, "batch", ())), 1, None, _array(mask))


# PyTorch's ops, on the CPU and on a GPU.


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _saved_tensors(x: Tensor, mean: _Saved, rstd: Array) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float64) if mean is None else to_torch(mean), to_torch(rstd)


def _saved_arrays(kind: str, mean: Tensor, rstd: Tensor) -> tuple[_Saved, Array]:
    return None if kind == "rms" else _array(mean), _array(rstd)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    own = rest[3]
    if own and running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.clone(), running_var.clone()
    y, mean, rstd = _forward(x, weight, bias, residual, running_mean, running_var, *rest)
    running = (a if own and a is not None else _none(x) for a in (running_mean, running_var))
    return (y, *_saved_tensors(x, mean, rstd), *running)


def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, mask: Tensor | None, kind: str, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    saved = _saved_arrays(kind, mean, rstd)
    *found, dresidual = _backward(dy, x, *saved, weight, bias, residual, mask, kind, *rest)
    return (*found, _none(x) if dresidual is None else dresidual)


def _norm_double_backward(
    v: Tensor, cweight: Tensor | None, cbias: Tensor | None, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, kind: str, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    saved = _saved_arrays(kind, mean, rstd)
    return _double_backward(v, cweight, cbias, dy, x, *saved, weight, kind, *rest)


for _name, _kernel in (
    ("norm", _norm),
    ("norm_backward", _norm_backward),
    ("norm_double_backward", _norm_double_backward),
):
    _LIBRARY.impl(_name, _kernel, "CPU")
    _LIBRARY.impl(_name, _kernel, "CUDA")


# The ops' shapes.


def _like(x: Tensor, kind: str, size: Sequence[int]) -> Tensor:
    in_place = _is_read_in_place(x, kind, size)
    return torch.empty_like(x) if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)


def _parameters(x: Tensor, kind: str, size: Sequence[int]) -> tuple[int, ...]:
    return tuple(size) if kind in ("layer", "rms") else (x.shape[1],)


def _gradient_dtype(x: Tensor, parameter: Tensor | None) -> torch.dtype:
    if parameter is not None:
        return parameter.dtype
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@torch.library.register_fake("fusednorm::norm", lib=_LIBRARY)
def _norm_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, mask: Tensor | None, kind: str, size: Sequence[int], own: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = {"batch": x.shape[1:2], "instance": x.shape[:2], "group": (x.shape[0], *size)}
    saved = shapes.get(kind, x.shape[: x.dim() - len(size)])
    rstd = x.new_empty(saved, dtype=torch.float64)
    mean = x.new_empty(0 if kind == "rms" else saved, dtype=torch.float64)
    running = (torch.empty_like(a) if own and a is not None else _none(x) for a in (running_mean, running_var))
    return (_like(x, kind, size), mean, rstd, *running)


@torch.library.register_fake("fusednorm::norm_backward", lib=_LIBRARY)
def _norm_backward_shapes(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, mask: Tensor | None, kind: str, size: Sequence[int], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = _parameters(x, kind, size)
    of_weight, of_bias = (_gradient_dtype(x, a) for a in (weight, weight if bias is None else bias))
    gradients = x.new_empty(shape, dtype=of_weight), x.new_empty(shape, dtype=of_bias)
    return (_like(x, kind, size), *gradients, _none(x) if residual is None else _like(x, kind, size))


@torch.library.register_fake("fusednorm::norm_double_backward", lib=_LIBRARY)
def _norm_double_backward_shapes(
    v: Tensor, cweight: Tensor | None, cbias: Tensor | None, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, kind: str, size: Sequence[int], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dweight = x.new_empty(_parameters(x, kind, size), dtype=_gradient_dtype(x, weight))
    return _like(x, kind, size), _like(x, kind, size), dweight


# Their gradients.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, _, mask, kind, size, own, _, _, activation, slope = inputs
    _, mean, rstd, *running = output
    ctx.mark_non_differentiable(mean, rstd, *running)
    ctx.set_materialize_grads(False)
    if activation is None:
        bias = residual = None
    ctx.save_for_backward(x, weight, bias, residual, mask, mean, rstd)
    ctx.how = kind, size, own, activation, slope


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 14
    x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
    found = _call("norm_backward", dy, x, mean, rstd, weight, bias, residual, mask, *ctx.how)
    return (*_needed(ctx, dy, found), *(None,) * 10)


def _needed(ctx: Any, dy: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual: those that need one. Without an activation the residual's is dy."""
    dx, dweight, dbias, dresidual = gradients
    needed = ctx.needs_input_grad
    return (
        dx,
        dweight if needed[1] else None,
        dbias if needed[2] else None,
        None if not needed[3] else dresidual if ctx.how[3] else dy,
    )


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, mean, rstd, weight, _, _, mask, kind, size, own, activation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, x, mean, rstd, weight)
    ctx.how = kind, size, own
    ctx.missing = functional._no_double_backward(activation, mask)


def _double_gradients(
    ctx: Any, v: Tensor | None, cweight: Tensor | None, cbias: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    if ctx.missing:
        raise NotImplementedError(ctx.missing)
    dy, x, mean, rstd, weight = ctx.saved_tensors
    v = torch.zeros_like(x) if v is None else v
    ddy, dx, dweight = _call("norm_double_backward", v, cweight, cbias, dy, x, mean, rstd, weight, *ctx.how)
    return (ddy, dx, None, None, None if weight is None else dweight, *(None,) * 8)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _third(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("a norm's second gradients have no gradients")


# Function transforms want gradients once more, as an autograd.Function, with a rule for vmap: a call for each entry.


def _mapped(name: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        entries = (
            [
                a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                for a, d in zip(args, in_dims, strict=True)
            ]
            for i in range(info.batch_size)
        )
        found = tuple(torch.stack(one) for one in zip(*(_call(name, *entry) for entry in entries), strict=True))
        return found, (0,) * len(found)

    return rule


_TRANSFORMED: dict[str, Any] = {}
for _name, _context, _backward_of in (
    ("norm", _keep, _gradients),
    ("norm_backward", _keep_backward, _double_gradients),
    ("norm_double_backward", _keep_nothing, _third),
):
    torch.library.register_autograd(f"fusednorm::{_name}", _backward_of, setup_context=_context, lib=_LIBRARY)
    torch.library.register_vmap(f"fusednorm::{_name}", _mapped(_name), lib=_LIBRARY)
    _members = {"forward": getattr(torch.ops.fusednorm, _name), "setup_context": _context, "backward": _backward_of}
    _members["vmap"] = _mapped(_name)
    _TRANSFORMED[_name] = type(_name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in _members.items()})


def _call(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The op, for whoever traces it."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return _TRANSFORMED[name].apply(*args)  # type: ignore[no-any-return]
    return getattr(torch.ops.fusednorm, name)(*args)  # type: ignore[no-any-return]


# The short way.


class _Norm(torch.autograd.Function):
    """The op's kernel and gradients without the op; statistics stay arrays. Arguments without a gradient come as one,
    since each costs time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: tuple[Any, ...]
    ) -> Tensor:
        y, ctx.mean, ctx.rstd = _forward(x, weight, bias, residual, *rest)
        _, _, mask, kind, size, own, _, _, activation, slope = rest
        ctx.how = kind, size, own, activation, slope
        if activation is None:
            ctx.save_for_backward(x, weight, None, None, mask)
        else:
            ctx.save_for_backward(x, weight, bias, residual, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask = ctx.saved_tensors
        # With create_graph gradients have gradients. And who looks at operations may come only now, such as autograd's
        # own, older vmap (is_grads_batched).
        if torch.is_grad_enabled() or _is_traced() or type(dy) is not Tensor or is_legacy_batchedtensor(dy):
            saved = _saved_tensors(x, ctx.mean, ctx.rstd)
            found = _call("norm_backward", dy, x, *saved, weight, bias, residual, mask, *ctx.how)
        else:
            found = _backward(dy, x, ctx.mean, ctx.rstd, weight, bias, residual, mask, *ctx.how)
        return (*_needed(ctx, dy, found), None)


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def _is_traced() -> bool:
    """Whether someone looks at the operations rather than at the numbers: compilers, function transforms, modes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    kind: str,
    size: Sequence[int] = (),
    own: bool = True,
    momentum: float = 0.0,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.0,
) -> Tensor:
    """y, of x's dtype, shape and strides; the page's head says what the arguments are. With `own` statistics the
    running ones, where given, are updated in place. Raises what the functions of :mod:`fusednorm.functional` do."""
    rest = running_mean, running_var, mask, kind, size, own, momentum, eps, activation, slope
    if (
        _is_traced()
        or not (type(x) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN and type(residual) in _PLAIN)
        or not (x.is_cpu or x.is_cuda)
    ):
        y, _, _, new_mean, new_var = _call("norm", x, weight, bias, residual, *rest)
        if own and running_mean is not None and running_var is not None:
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
        return y
    if own and running_mean is not None and running_var is not None:
        # Written behind PyTorch's back; whoever saved them for a backward is to know.
        torch.autograd.graph.increment_version((running_mean, running_var))
    if (
        torch.is_grad_enabled()
        and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
    ) or forward_ad._current_level >= 0:  # which says that there is no forward mode
        return _Norm.apply(x, weight, bias, residual, rest)
    return _forward(x, weight, bias, residual, *rest)[0]
