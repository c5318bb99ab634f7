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
from fusednorm.testing.cases import Array, Case, Inputs, calls, make

PASSES = ("forward", "backward", "eval")

# Elements up to which the NumPy reference is timed unasked; above, it takes seconds a call.
REFERENCE_ELEMENTS = 1 << 20


class Cpu:
    """Where contenders run: this computer. :class:`fusednorm.bench.gpu.Gpu` is the other such place.

    Within ``with``, ours and PyTorch have the same number of threads; PyTorch would count cores its own way.

    Attributes:
        ratios: which contenders' times are divided by which.
    """

    ratios: Sequence[tuple[str, str]] = (("ours_out", "copy"), ("torch_out", "ours_out"), ("torch", "ours"))

    def __init__(self, threads: int | None = None, with_reference: bool | None = None) -> None:
        self.threads, self.with_reference = threads, with_reference

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
        they are used; ``reference``. PyTorch is left out where it is not installed or has no such operation.

        Args:
            pass_: ``forward``, ``backward`` or ``eval``.
        """
        copied = np.empty_like(inputs.x)

        def copy() -> None:
            """By all threads with stores that bypass the caches: as fast as memory goes."""
            _C.copy(copied, inputs.x)

        # The copy's own output, clean again: a copy onto lines that another kernel left dirty takes twice as long.
        found = [Contender("copy", copy, prepare=copy), *ours(case, inputs, pass_)]
        if importlib.util.find_spec("torch") and case.activation in (None, "relu"):
            found += _TORCH[case.norm](case, inputs).contenders(pass_)
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
    if case.norm != "batch":
        return _family(case, inputs, pass_)
    return _backward(case, inputs) if pass_ == "backward" else _forward(case, inputs, device)


def _forward(case: Case, inputs: Inputs, device: str) -> list[Contender]:
    layer = fusednorm.BatchNorm(
        case.channels,
        case.eps,
        case.momentum,
        affine=case.affine,
        track_running_stats=case.running,
        axis=case.axis,
        activation=case.activation,
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


def _backward(case: Case, inputs: Inputs) -> list[Contender]:
    mean, rstd = fusednorm.batch_norm_forward(
        inputs.x, inputs.weight, inputs.bias, eps=case.eps, axis=case.axis, residual=inputs.residual,
        activation=case.activation,
    )[1:]  # fmt: skip
    dx = namespace(inputs.x).empty_like(inputs.x)

    def call(out: Array | None) -> Any:
        return fusednorm.batch_norm_backward(
            inputs.dy, inputs.x, mean, rstd, inputs.weight, inputs.bias, axis=case.axis, residual=inputs.residual,
            activation=case.activation, out=out,
        )  # fmt: skip

    return [Contender("ours_out", lambda: call(dx), _first), Contender("ours", lambda: call(None), _first)]


def _family(case: Case, inputs: Inputs, pass_: str) -> list[Contender]:
    """The other norms, by their functions."""
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


def _itself(y: Array) -> Array:
    return y


def _first(results: tuple[Array, ...]) -> Array:
    return results[0]


class Torch:
    """PyTorch on the same memory: tensors that view the inputs, channels moved to axis 1 where PyTorch wants them."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.torch = importlib.import_module("torch")
        self.case = case
        self.x, self.dy = self.tensor(inputs.x), self.tensor(inputs.dy)
        self.residual = None if inputs.residual is None else self.tensor(inputs.residual)
        self.weight, self.bias = self.parameter(inputs.weight), self.parameter(inputs.bias)
        self.running_mean, self.running_var = self.parameter(inputs.running_mean), self.parameter(inputs.running_var)

    def whole(self, array: Array) -> Any:
        """A tensor over the array's memory, in its axis order."""
        if array.dtype.name == "bfloat16":  # ml_dtypes' bfloat16, which PyTorch does not know by that name
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def tensor(self, array: Array) -> Any:
        return self.torch.moveaxis(self.whole(array), self.case.axis, 1)

    def parameter(self, array: Array | None) -> Any:
        """A copy, since running statistics change; in the dtype of `statistics`, which PyTorch insists on."""
        return None if array is None else self.whole(array).to(self.statistics().dtype, copy=True)

    def statistics(self, n: int = 0) -> Any:
        """An uninitialized tensor for n saved statistics: float32, for float64 x float64."""
        double = self.x.dtype == self.torch.float64
        return self.torch.empty(n, dtype=self.torch.float64 if double else self.torch.float32, device=self.x.device)

    def array(self, tensor: Any) -> Array:
        back = self.torch.moveaxis(tensor.detach(), 1, self.case.axis)
        return np.asarray(back.float().numpy())

    def contenders(self, pass_: str) -> list[Contender]:
        forward, backward = (self.forward_out, self.forward), (self.backward_out, self.backward)
        out, default = (make() for make in (backward if pass_ == "backward" else forward))
        return [Contender("torch_out", out, self.array), Contender("torch", default, self.array)]

    def forward(self) -> Callable[[], Any]:
        """As a model calls it: batch_norm, then the residual and ReLU in place."""
        batch_norm, case = self.torch.nn.functional.batch_norm, self.case

        def call() -> Any:
            y = batch_norm(
                self.x, self.running_mean, self.running_var, self.weight, self.bias,
                case.training, case.momentum, case.eps,
            )  # fmt: skip
            return self.epilogue(y)

        return call

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
            return self.epilogue(y)

        return call

    def epilogue(self, y: Any) -> Any:
        if self.residual is not None:
            y += self.residual
        return y.relu_() if self.case.activation else y

    def saved(self) -> tuple[Any, Any, Any]:
        """y, mean and rstd for the backward."""
        y, mean, rstd = self.torch.native_batch_norm(
            self.x, self.weight, self.bias, self.running_mean, self.running_var,
            self.case.training, self.case.momentum, self.case.eps,
        )  # fmt: skip
        return self.epilogue(y), mean, rstd

    def backward(self) -> Callable[[], Any]:
        aten, case = self.torch.ops.aten, self.case
        y, mean, rstd = self.saved()

        def call() -> Any:
            u = aten.threshold_backward(self.dy, y, 0) if case.activation else self.dy
            return aten.native_batch_norm_backward(
                u, self.x, self.weight, self.running_mean, self.running_var, mean, rstd, case.training, case.eps,
                [True, True, True],
            )[0]  # fmt: skip

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


class TorchLines(Torch):
    """PyTorch's layer and RMS norm. The latter takes no out=, and its backward is autograd's."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        if case.norm == "rms" and self.weight is not None:
            self.weight = self.weight.to(self.x.dtype)  # else y would be float32 beside a bfloat16 x

    def tensor(self, array: Array) -> Any:
        return self.whole(array)

    def array(self, tensor: Any) -> Array:
        return np.asarray(tensor.detach().float().numpy())

    def contenders(self, pass_: str) -> list[Contender]:
        torch, aten, shape, eps = self.torch, self.torch.ops.aten, self.case.normalized_shape, self.case.eps
        if self.case.norm == "rms":
            x = self.x.detach().requires_grad_(pass_ == "backward")
            leaves = (x, self.weight.requires_grad_(pass_ == "backward"))
            y = torch.nn.functional.rms_norm(*leaves[:1], shape, leaves[1], eps)
            if pass_ == "backward":
                return [Contender("torch", lambda: torch.autograd.grad(y, leaves, self.dy, True)[0], self.array)]
            return [Contender("torch", lambda: torch.nn.functional.rms_norm(x, shape, leaves[1], eps), self.array)]
        y, mean, rstd = torch.native_layer_norm(self.x, shape, self.weight, self.bias, eps)
        given = (self.x, shape, mean, rstd, self.weight, self.bias, [True, True, True])
        dweight, dbias = (torch.empty_like(parameter) for parameter in (self.weight, self.bias))

        def forward_out() -> Any:
            return aten.native_layer_norm.out(
                self.x, shape, self.weight, self.bias, eps, out0=y, out1=mean, out2=rstd
            )[0]  # fmt: skip

        def backward_out() -> Any:
            return aten.native_layer_norm_backward.out(self.dy, *given, out0=y, out1=dweight, out2=dbias)[0]

        if pass_ == "backward":
            default = lambda: aten.native_layer_norm_backward(self.dy, *given)[0]  # noqa: E731
        else:
            default = lambda: torch.nn.functional.layer_norm(self.x, shape, self.weight, self.bias, eps)  # noqa: E731
        out = backward_out if pass_ == "backward" else forward_out
        return [Contender("torch_out", out, self.array), Contender("torch", default, self.array)]


class TorchAutograd(Torch):
    """Norms whose backward is autograd's, and that take no out=: instance and switchable norm."""

    def norm(self, x: Any, *parameters: Any) -> Any:
        """Of the parameters weight and bias, and for switchable norm its logits, whose formula PyTorch computes."""
        if self.case.norm == "instance":
            return self.torch.nn.functional.instance_norm(x, None, None, *parameters, True, 0.1, self.case.eps)
        weight, bias, *logits = parameters
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
        return x * scale + (bias[:, None, None] - mean * scale)

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.logits = [self.parameter(a) for a in (inputs.mean_logits, inputs.var_logits) if a is not None]

    def contenders(self, pass_: str) -> list[Contender]:
        leaves = [self.x.detach(), self.weight, self.bias, *self.logits]
        if pass_ != "backward":
            return [Contender("torch", lambda: self.norm(*leaves).to(self.x.dtype), self.array)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = self.norm(*leaves).to(self.x.dtype)
        return [Contender("torch", lambda: self.torch.autograd.grad(y, leaves, self.dy, True)[0], self.array)]


class TorchGroup(Torch):
    """PyTorch's group norm."""

    def contenders(self, pass_: str) -> list[Contender]:
        torch, aten, case = self.torch, self.torch.ops.aten, self.case
        samples, channels = self.x.shape[:2]
        sizes = samples, channels, self.x[0, 0].numel(), case.groups
        y, mean, rstd = torch.native_group_norm(self.x, self.weight, self.bias, *sizes, case.eps)
        saved = (self.x, mean, rstd, self.weight, *sizes, [True, True, True])
        dweight, dbias = (torch.empty_like(parameter) for parameter in (self.weight, self.bias))
        if pass_ == "backward":
            out = lambda: aten.native_group_norm_backward.out(self.dy, *saved, out0=y, out1=dweight, out2=dbias)[0]  # noqa: E731
            default = lambda: aten.native_group_norm_backward(self.dy, *saved)[0]  # noqa: E731
        else:
            given = self.x, self.weight, self.bias, *sizes, case.eps
            out = lambda: aten.native_group_norm.out(*given, out0=y, out1=mean, out2=rstd)[0]  # noqa: E731
            default = lambda: torch.nn.functional.group_norm(self.x, case.groups, self.weight, self.bias, case.eps)  # noqa: E731
        return [Contender("torch_out", out, self.array), Contender("torch", default, self.array)]


class TorchWeight(Torch):
    """PyTorch's weight norm, whose g has v's dtype."""

    def tensor(self, array: Array) -> Any:
        return self.whole(array)

    def array(self, tensor: Any) -> Array:
        return np.asarray(tensor.detach().float().numpy())

    def contenders(self, pass_: str) -> list[Contender]:
        torch, aten, dim = self.torch, self.torch.ops.aten, self.case.axis
        g = self.weight.to(self.x.dtype)
        w, norm = aten._weight_norm_interface(self.x, g, dim)
        dg = torch.empty_like(g)
        if pass_ == "backward":
            saved = self.dy, self.x, g, norm, dim
            out = lambda: aten._weight_norm_interface_backward.out(*saved, out0=w, out1=dg)[0]  # noqa: E731
            default = lambda: aten._weight_norm_interface_backward(*saved)[0]  # noqa: E731
        else:
            out = lambda: aten._weight_norm_interface.out(self.x, g, dim, out0=w, out1=norm)[0]  # noqa: E731
            default = lambda: torch._weight_norm(self.x, g, dim)  # noqa: E731
        return [Contender("torch_out", out, self.array), Contender("torch", default, self.array)]


_TORCH: dict[str, type[Torch]] = {
    "batch": Torch,
    "instance": TorchAutograd,
    "group": TorchGroup,
    "layer": TorchLines,
    "rms": TorchLines,
    "switchable": TorchAutograd,
    "weight": TorchWeight,
}
