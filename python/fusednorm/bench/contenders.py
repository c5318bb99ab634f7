"""Who computes a case: this library, PyTorch, the NumPy reference; and a copy of the tensor, the ceiling for all."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import fusednorm
from fusednorm import _C, reference
from fusednorm.arrays import namespace
from fusednorm.bench.timing import Contender, interleaved, ratio, spread
from fusednorm.testing.cases import Array, Case, Inputs, calls, make, numpy_dtype

PASSES = ("forward", "backward", "eval")

# Elements up to which the NumPy reference is timed unasked; above, it takes seconds a call.
REFERENCE_ELEMENTS = 1 << 20


class Cpu:
    """Where contenders run: this computer. :class:`fusednorm.bench.gpu.Gpu` is the other such place.

    Within ``with``, ours and PyTorch have the same number of threads; PyTorch would count cores its own way.

    Attributes:
        ratios: which contenders' times are divided by which.
        peers: the contenders that may be chosen besides ours and the copy.

    Args:
        threads: of ours and of PyTorch; None: as many as ours has now.
        with_reference: whether the NumPy reference is timed; None: of small tensors.
        with_numpy: whether batch norm's formula in NumPy is timed, in x's dtype.
    """

    peers: Sequence[str] = ("torch", "reference")
    ratios: Sequence[tuple[str, str]] = (("ours_out", "copy"), ("torch_out", "ours_out"), ("torch", "ours"))

    def __init__(
        self, threads: int | None = None, with_reference: bool | None = None, with_numpy: bool = False
    ) -> None:
        self.threads, self.with_reference, self.with_numpy = threads, with_reference, with_numpy

    def __enter__(self) -> Cpu:
        self.torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        self.before = fusednorm.get_num_threads(), self.torch.get_num_threads() if self.torch else 0
        threads = self.threads or fusednorm.get_num_threads()
        if self.torch:
            self.torch.set_num_threads(threads)
        fusednorm.set_num_threads(threads)
        return self

    def __exit__(self, *_: object) -> None:
        # PyTorch first: both may run on one OpenMP library, where its limit would hold for ours.
        if self.torch:
            self.torch.set_num_threads(self.before[1])
        fusednorm.set_num_threads(self.before[0])

    def environment(self) -> dict[str, Any]:
        """What belongs into the record of the environment besides."""
        return {}

    def has_room(self, case: Case) -> bool:
        return True

    def make(self, case: Case) -> Inputs:
        return make(case)

    def some(self, array: Array, channels: Array, axis: int) -> Array:
        """Those channels of an array, as NumPy's."""
        return np.take(array, channels, axis)

    def contenders(self, case: Case, inputs: Inputs, pass_: str) -> list[Contender]:
        """All that can compute one pass of a case.

        ``copy``; ``ours_out`` and ``torch_out`` into a ready array; ``ours`` and ``torch`` allocating their results, as
        they are used; ``numpy`` and ``reference``. PyTorch is left out where it is not installed or has no such
        operation.

        Args:
            pass_: ``forward``, ``backward`` or ``eval``.
        """
        copied = np.empty_like(inputs.x)

        def copy() -> None:
            """By all threads with stores that bypass the caches: as fast as memory goes."""
            _C.copy(copied, inputs.x)

        # The copy's own output, clean again: a copy onto lines that another kernel left dirty takes twice as long.
        found = [Contender("copy", copy, prepare=copy), *ours(case, inputs, pass_)]
        peer = torch_peer(case)
        if peer and importlib.util.find_spec("torch"):
            found += peer(case, inputs).contenders(pass_)
        if self.with_numpy and has_formula(case):
            found.append(Contender("numpy", formula(np, case, inputs, pass_), _itself))
        if self.with_reference or (self.with_reference is None and case.size <= REFERENCE_ELEMENTS):
            found.append(_reference(case, inputs, pass_))
        return found

    def times(
        self, case: Case, inputs: Inputs, pass_: str, entrants: Sequence[Contender], repeat: int | None
    ) -> dict[str, Any]:
        """What becomes of a row: ``ms``, and ``ratios`` of times of the same round."""
        return compared(interleaved(entrants, repeat), self.ratios)


def compared(samples: Mapping[str, Sequence[float]], ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "ms": {name: spread(each) for name, each in samples.items()},
        "ratios": {f"{a}/{b}": ratio(samples[a], samples[b]) for a, b in ratios if a in samples and b in samples},
    }


def ours(case: Case, inputs: Inputs, pass_: str, device: str = "cpu") -> list[Contender]:
    return _layer(case, inputs, device) if case.norm == "batch" and pass_ != "backward" else _calls(case, inputs, pass_)


def _layer(case: Case, inputs: Inputs, device: str) -> list[Contender]:
    """Batch norm's forward and evaluation."""
    layer = fusednorm.BatchNorm(
        case.channels,
        case.eps,
        case.momentum,
        affine=case.affine,
        track_running_stats=case.running,
        axis=case.axis,
        activation=case.activation,
        ghost_batch_size=case.ghost_batch_size,
        dtype=case.param_dtype,
        device=device,
    ).train(case.training)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(inputs, name)
        if value is not None:
            setattr(layer, name, value)
    x, residual, y = inputs.x, inputs.residual, namespace(inputs.x).empty_like(inputs.x)
    return [
        Contender("ours_out", lambda: layer(x, residual, out=y), _itself),
        Contender("ours", lambda: layer(x, residual), _itself),
    ]


def _calls(case: Case, inputs: Inputs, pass_: str) -> list[Contender]:
    """By the functions."""
    forward, backward = calls(case, inputs, fusednorm)
    saved, ready = forward()[1:], namespace(inputs.x).empty_like(inputs.x)
    call = partial(backward, *saved) if pass_ == "backward" else forward
    return [Contender("ours_out", lambda: call(out=ready), _first), Contender("ours", call, _first)]


def _reference(case: Case, inputs: Inputs, pass_: str) -> Contender:
    """Not compared again: it is what the results were checked against, and slow."""
    mean, var = (None if a is None else a.copy() for a in (inputs.running_mean, inputs.running_var))
    inputs = replace(inputs, running_mean=mean, running_var=var)
    forward, backward = calls(case, inputs, reference)
    return Contender("reference", partial(backward, *forward()[1:]) if pass_ == "backward" else forward)


def has_formula(case: Case) -> bool:
    return case.norm == "batch" and case.ghost_batch_size is None and case.activation in (None, "relu")


def formula(xp: Any, case: Case, inputs: Inputs, pass_: str) -> Callable[[], Array]:
    """Batch norm an operation at a time, as one writes it with NumPy or CuPy (`xp`); 16-bit types in float32."""
    case_dtype, real = numpy_dtype(case.dtype), numpy_dtype(case.accumulation_dtype)
    axes = tuple(axis for axis in range(len(case.shape)) if axis != case.axis % len(case.shape))
    shape = [case.channels if axis == case.axis % len(case.shape) else 1 for axis in range(len(case.shape))]

    def along(parameter: Array | None, default: float) -> Any:
        return default if parameter is None else parameter.astype(real).reshape(shape)

    def statistics(x: Array) -> tuple[Array, Array]:
        mean: Array = x.mean(axis=axes, keepdims=True)
        return mean, ((x - mean) ** 2).mean(axis=axes, keepdims=True)

    def pre(xhat: Array) -> Array:
        y: Array = xhat * weight + bias
        if inputs.residual is not None:
            y = y + inputs.residual.astype(real)
        return y

    def forward() -> Array:
        x = inputs.x.astype(real, copy=False)
        if case.training:
            mean, variance = statistics(x)
        else:
            mean, variance = along(inputs.running_mean, 0), along(inputs.running_var, 1)
        y = pre((x - mean) / xp.sqrt(variance + case.eps))
        return (xp.maximum(y, 0) if case.activation else y).astype(case_dtype, copy=False)

    def backward() -> Array:
        x, dy = inputs.x.astype(real, copy=False), inputs.dy.astype(real, copy=False)
        xhat = (x - saved_mean) * saved_rstd
        if case.activation:
            dy = dy * (pre(xhat) > 0)
        dbias, dweight = dy.sum(axis=axes, keepdims=True), (dy * xhat).sum(axis=axes, keepdims=True)
        n = case.size / case.channels
        dx: Array = (dy - dbias / n - xhat * (dweight / n)) * (weight * saved_rstd)
        return dx.astype(case_dtype, copy=False)

    weight, bias = along(inputs.weight, 1), along(inputs.bias, 0)
    if pass_ != "backward":
        return forward
    saved_mean, variance = statistics(inputs.x.astype(real, copy=False))
    saved_rstd = 1 / xp.sqrt(variance + case.eps)
    return backward


def _itself(y: Array) -> Array:
    return y


def _first(results: tuple[Array, ...]) -> Array:
    return results[0]


class Torch:
    """PyTorch on the same memory: tensors that view the inputs.

    :meth:`function` is what a model calls, and :meth:`of` a pass by it, with autograd's backward. Where its backward is
    an operation that can be called without autograd, `call` does so; where operations take ``out=``, `out` has that.
    """

    second = True  # PyTorch wants the channels on axis 1

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.torch = importlib.import_module("torch")
        self.case, self.arrays = case, namespace(inputs.x)
        self.x, self.dy = self.tensor(inputs.x), self.tensor(inputs.dy)
        self.residual = None if inputs.residual is None else self.tensor(inputs.residual)
        self.weight, self.bias = self.parameter(inputs.weight), self.parameter(inputs.bias)
        self.running_mean, self.running_var = self.parameter(inputs.running_mean), self.parameter(inputs.running_var)

    def whole(self, array: Array) -> Any:
        """A tensor over the array's memory, in its axis order."""
        if array.dtype.name == "bfloat16":  # ml_dtypes' bfloat16, which PyTorch does not know by that name
            return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(array)

    def tensor(self, array: Array) -> Any:
        whole = self.whole(array)
        return self.torch.moveaxis(whole, self.case.axis, 1) if self.second else whole

    def array(self, tensor: Any) -> Array:
        tensor = tensor.detach().float()
        back: Array = self.arrays.from_dlpack(self.torch.moveaxis(tensor, 1, self.case.axis) if self.second else tensor)
        return back

    def parameter(self, array: Array | None) -> Any:
        """A copy, since running statistics change."""
        return None if array is None else self.whole(array).to(self.parameter_dtype(), copy=True)

    def parameter_dtype(self) -> Any:
        """What PyTorch insists on: that of `statistics`."""
        return self.statistics().dtype

    def statistics(self, n: int = 0) -> Any:
        """An uninitialized tensor for n saved statistics: float32, for float64 x float64."""
        double = self.x.dtype == self.torch.float64
        return self.torch.empty(n, dtype=self.torch.float64 if double else self.torch.float32, device=self.x.device)

    def contenders(self, pass_: str) -> list[Contender]:
        both = ("torch_out", self.out(pass_)), ("torch", self.call(pass_))
        return [Contender(name, call, self.array) for name, call in both if call]

    def arguments(self) -> tuple[Any, ...]:
        """What :meth:`function` takes."""
        return self.x, self.weight, self.bias

    def function(self, *given: Any) -> Any:
        """y, as a model computes it."""
        raise NotImplementedError

    def of(self, function: Callable[..., Any], pass_: str) -> Callable[[], Any]:
        """One pass by :meth:`function` or what was compiled of it; backward to all that is not constant."""
        given = self.arguments()
        if pass_ != "backward":
            return partial(function, *given)
        constant = [id(a) for a in (None, self.running_mean, self.running_var)]
        given = tuple(a if id(a) in constant else a.detach().requires_grad_() for a in given)
        leaves = [a for a in given if id(a) not in constant]
        y = function(*given)
        return lambda: self.torch.autograd.grad(y, leaves, self.dy, True)[0]

    def call(self, pass_: str) -> Callable[[], Any]:
        """One pass that allocates its results."""
        return self.of(self.function, pass_)

    def out(self, pass_: str) -> Callable[[], Any] | None:
        """One pass into ready tensors."""
        return None


class TorchBatch(Torch):
    """PyTorch's batch norm, then the residual and ReLU in place."""

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.bias, self.residual, self.running_mean, self.running_var

    def function(self, *given: Any) -> Any:
        x, weight, bias, residual, mean, var = given
        case, batch_norm = self.case, self.torch.nn.functional.batch_norm
        return self.epilogue(batch_norm(x, mean, var, weight, bias, case.training, case.momentum, case.eps), residual)

    def epilogue(self, y: Any, residual: Any) -> Any:
        if residual is not None:
            y += residual
        return y.relu_() if self.case.activation else y

    def saved(self) -> tuple[Any, Any, Any]:
        """y, mean and rstd for the backward."""
        y, mean, rstd = self.torch.native_batch_norm(
            self.x, self.weight, self.bias, self.running_mean, self.running_var,
            self.case.training, self.case.momentum, self.case.eps,
        )  # fmt: skip
        return self.epilogue(y, self.residual), mean, rstd

    def call(self, pass_: str) -> Callable[[], Any]:
        if pass_ != "backward":
            return super().call(pass_)
        aten, case = self.torch.ops.aten, self.case
        y, mean, rstd = self.saved()

        def backward() -> Any:
            u = aten.threshold_backward(self.dy, y, 0) if case.activation else self.dy
            return aten.native_batch_norm_backward(
                u, self.x, self.weight, self.running_mean, self.running_var, mean, rstd, case.training, case.eps,
                [True, True, True],
            )[0]  # fmt: skip

        return backward

    def out(self, pass_: str) -> Callable[[], Any]:
        return self.backward_out() if pass_ == "backward" else self.forward_out()

    def forward_out(self) -> Callable[[], Any]:
        native, case = self.torch.ops.aten.native_batch_norm.out, self.case
        y = self.torch.empty_like(self.x)
        # In evaluation PyTorch saves nothing, and says so by empty tensors.
        mean, rstd = (self.statistics(case.channels if case.training else 0) for _ in range(2))

        def call() -> Any:
            native(
                self.x, self.weight, self.bias, self.running_mean, self.running_var,
                case.training, case.momentum, case.eps, out=y, save_mean=mean, save_invstd=rstd,
            )  # fmt: skip
            return self.epilogue(y, self.residual)

        return call

    def backward_out(self) -> Callable[[], Any]:
        aten, case = self.torch.ops.aten, self.case
        y, mean, rstd = self.saved()
        dx, u = self.torch.empty_like(self.x), self.torch.empty_like(self.x)
        dweight, dbias = (self.statistics(case.channels) for _ in range(2))

        def call() -> Any:
            if case.activation:
                aten.threshold_backward.grad_input(self.dy, y, 0, grad_input=u)
            aten.native_batch_norm_backward.out(
                u if case.activation else self.dy, self.x, self.weight, self.running_mean, self.running_var, mean, rstd,
                case.training, case.eps, [True, True, True], out0=dx, out1=dweight, out2=dbias,
            )  # fmt: skip
            return dx

        return call


class TorchLayer(Torch):
    """PyTorch's layer norm."""

    second = False

    def parameter_dtype(self) -> Any:
        return self.x.dtype if self.x.is_cuda else super().parameter_dtype()

    def function(self, *given: Any) -> Any:
        x, weight, bias = given
        return self.torch.nn.functional.layer_norm(x, self.case.normalized_shape, weight, bias, self.case.eps)

    def saved(self) -> tuple[Any, ...]:
        """y; and what its backward takes after dy."""
        given = self.x, self.case.normalized_shape
        y, mean, rstd = self.torch.native_layer_norm(*given, self.weight, self.bias, self.case.eps)
        return y, (*given, mean, rstd, self.weight, self.bias, [True, True, True])

    def call(self, pass_: str) -> Callable[[], Any]:
        if pass_ != "backward":
            return super().call(pass_)
        _, saved = self.saved()
        return lambda: self.torch.ops.aten.native_layer_norm_backward(self.dy, *saved)[0]

    def out(self, pass_: str) -> Callable[[], Any]:
        aten = self.torch.ops.aten
        y, saved = self.saved()
        if pass_ == "backward":
            dweight, dbias = (self.torch.empty_like(parameter) for parameter in (self.weight, self.bias))
            return lambda: aten.native_layer_norm_backward.out(self.dy, *saved, out0=y, out1=dweight, out2=dbias)[0]
        x, shape, mean, rstd, *parameters, _ = saved
        given = x, shape, *parameters, self.case.eps
        return lambda: aten.native_layer_norm.out(*given, out0=y, out1=mean, out2=rstd)[0]


class TorchWithoutBias(Torch):
    """A norm that PyTorch gives a weight alone, in x's dtype."""

    second = False

    def parameter_dtype(self) -> Any:
        return self.x.dtype

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight


class TorchRms(TorchWithoutBias):
    """PyTorch's RMS norm, whose weight has x's dtype: else y would be float32 beside a bfloat16 x."""

    def function(self, *given: Any) -> Any:
        x, weight = given
        return self.torch.nn.functional.rms_norm(x, self.case.normalized_shape, weight, self.case.eps)


class TorchInstance(Torch):
    """PyTorch's instance norm."""

    def function(self, *given: Any) -> Any:
        x, *parameters = given
        return self.torch.nn.functional.instance_norm(x, None, None, *parameters, True, 0.1, self.case.eps)


class TorchSwitchable(Torch):
    """The formula of switchable norm, by PyTorch's operations."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.logits = [self.parameter(a) for a in (inputs.mean_logits, inputs.var_logits) if a is not None]

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.bias, *self.logits

    def function(self, *given: Any) -> Any:
        x, weight, bias, *logits = given
        p, q = (self.torch.softmax(each, 0) for each in logits)
        variance, mean = self.torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        means, variances = [mean], [variance]
        for over in (1, 0):
            merged = mean.mean(over, keepdim=True)
            means.append(merged)
            variances.append((variance + (mean - merged) ** 2).mean(over, keepdim=True))
        mean, variance = (
            sum(share * part for share, part in zip(s, m, strict=True)) for s, m in ((p, means), (q, variances))
        )
        scale = self.torch.rsqrt(variance + self.case.eps) * weight[:, None, None]
        return (x * scale + (bias[:, None, None] - mean * scale)).to(x.dtype)


class TorchGroup(Torch):
    """PyTorch's group norm."""

    def parameter_dtype(self) -> Any:
        return self.x.dtype if self.x.is_cuda else super().parameter_dtype()

    def function(self, *given: Any) -> Any:
        x, weight, bias = given
        return self.torch.nn.functional.group_norm(x, self.case.groups, weight, bias, self.case.eps)

    def saved(self) -> tuple[Any, ...]:
        """y, mean, rstd, and the sizes that the operations take."""
        sizes = *self.x.shape[:2], self.x[0, 0].numel(), self.case.groups
        return *self.torch.native_group_norm(self.x, self.weight, self.bias, *sizes, self.case.eps), sizes

    def call(self, pass_: str) -> Callable[[], Any]:
        if pass_ != "backward":
            return super().call(pass_)
        _, mean, rstd, sizes = self.saved()
        saved = self.x, mean, rstd, self.weight, *sizes, [True, True, True]
        return lambda: self.torch.ops.aten.native_group_norm_backward(self.dy, *saved)[0]

    def out(self, pass_: str) -> Callable[[], Any]:
        aten = self.torch.ops.aten
        y, mean, rstd, sizes = self.saved()
        if pass_ != "backward":
            given = self.x, self.weight, self.bias, *sizes, self.case.eps
            return lambda: aten.native_group_norm.out(*given, out0=y, out1=mean, out2=rstd)[0]
        saved = self.x, mean, rstd, self.weight, *sizes, [True, True, True]
        dweight, dbias = (self.torch.empty_like(parameter) for parameter in (self.weight, self.bias))
        return lambda: aten.native_group_norm_backward.out(self.dy, *saved, out0=y, out1=dweight, out2=dbias)[0]


class TorchWeight(TorchWithoutBias):
    """PyTorch's weight norm, whose g has v's dtype."""

    def function(self, *given: Any) -> Any:
        return self.torch._weight_norm(*given, self.case.axis)

    def call(self, pass_: str) -> Callable[[], Any]:
        if pass_ != "backward":
            return super().call(pass_)
        aten, g, dim = self.torch.ops.aten, self.weight, self.case.axis
        _, norm = aten._weight_norm_interface(self.x, g, dim)
        return lambda: aten._weight_norm_interface_backward(self.dy, self.x, g, norm, dim)[0]

    def out(self, pass_: str) -> Callable[[], Any]:
        aten, g, dim = self.torch.ops.aten, self.weight, self.case.axis
        w, norm = aten._weight_norm_interface(self.x, g, dim)
        if pass_ != "backward":
            return lambda: aten._weight_norm_interface.out(self.x, g, dim, out0=w, out1=norm)[0]
        saved, dg = (self.dy, self.x, g, norm, dim), self.torch.empty_like(g)
        return lambda: aten._weight_norm_interface_backward.out(*saved, out0=w, out1=dg)[0]


def torch_peer(case: Case) -> type[Torch] | None:
    """PyTorch's way to compute a case, if it has one."""
    return _TORCH.get(case.norm) if case.activation in (None, "relu") and case.ghost_batch_size is None else None


_TORCH: dict[str, type[Torch]] = {
    "batch": TorchBatch,
    "instance": TorchInstance,
    "group": TorchGroup,
    "layer": TorchLayer,
    "rms": TorchRms,
    "switchable": TorchSwitchable,
    "weight": TorchWeight,
}
