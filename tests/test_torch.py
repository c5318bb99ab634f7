"""fusednorm.torch: against PyTorch's float64 results, and what PyTorch asks of a module."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import arrays
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case, Inputs
from support import assert_same_bits, run_python

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import fusednorm.torch as fnt  # noqa: E402
from fusednorm.torch import models, ops  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

NO_BFLOAT16 = pytest.mark.skipif(find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed")
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=NO_BFLOAT16)]

# Name, arguments of the constructor, shape of x.
MODULES: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = [
    ("BatchNorm1d", (6,), (5, 6)),
    ("BatchNorm1d", (6,), (5, 6, 3)),
    ("BatchNorm2d", (6,), (4, 6, 3, 2)),
    ("BatchNorm3d", (6,), (3, 6, 2, 2, 2)),
    ("InstanceNorm1d", (6, 1e-5, 0.1, True, True), (3, 6, 5)),
    ("InstanceNorm2d", (6, 1e-5, 0.1, True), (2, 6, 3, 4)),
    ("InstanceNorm2d", (6,), (6, 3, 4)),
    ("InstanceNorm3d", (6, 1e-5, None, True, True), (2, 6, 3, 2, 2)),
    ("GroupNorm", (3, 6), (4, 6, 3, 2)),
    ("GroupNorm", (2, 6), (4, 6)),
    ("LayerNorm", (6,), (2, 4, 6)),
    ("LayerNorm", ((4, 6),), (3, 2, 4, 6)),
    ("LayerNorm", ((4, 6),), (4, 6)),
    ("RMSNorm", (6,), (2, 4, 6)),
    ("RMSNorm", ((4, 6), 1e-3), (3, 4, 6)),
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, _, shape in MODULES]
each_module = pytest.mark.parametrize(("name", "args", "shape"), MODULES, ids=IDS)


def some(values: Any, short: tuple[str, ...], ids: Any = None) -> list[Any]:
    """All, of which only `short` are not thorough."""
    ids = [*map(str, values)] if ids is None else ids
    assert {*short} <= {*ids}
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), id=name,
                     marks=[] if name in short else [pytest.mark.thorough])
        for value, name in zip(values, ids, strict=True)
    ]  # fmt: skip


# One of each kind.
KINDS = ("BatchNorm2d-4x6x3x2", "InstanceNorm2d-2x6x3x4", "GroupNorm-4x6x3x2", "LayerNorm-2x4x6", "RMSNorm-2x4x6")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def made(name: str, args: tuple[Any, ...], dtype: Any = torch.float64, of: Any = fnt) -> Any:
    """A module with parameters that are not the identity's."""
    torch.manual_seed(1)
    module = getattr(of, name)(*args, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
        for n, b in module.named_buffers():
            if n.startswith("running"):
                b.uniform_(0.5, 2)
    return module


def called(module: Any) -> Callable[..., Any]:
    """The module as a function of x and its parameters, for gradcheck; running statistics do not add up."""
    names = [n for n, _ in module.named_parameters()]
    start = {n: b.clone() for n, b in module.named_buffers()}

    def function(x: Any, *parameters: Any) -> Any:
        state = dict(zip(names, parameters, strict=True)) | {n: b.clone() for n, b in start.items()}
        return torch.func.functional_call(module, state, (x,))

    return function


def leaves(module: Any, shape: tuple[int, ...]) -> list[Any]:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return [x, *(p.detach().clone().requires_grad_() for p in module.parameters())]


# The list of cases.


def tensor(a: Any) -> Any:
    """A copy of an array."""
    if a is None:
        return None
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(a.copy())


def array(t: Any) -> Any:
    return None if t is None else ops._array(t)


def ours(case: Case, t: Inputs, function: Callable[..., Any]) -> Any:
    """y by `function`, which is ops.norm or takes its arguments."""
    size = {"group": (case.groups,), "layer": case.normalized_shape, "rms": case.normalized_shape}.get(case.norm, ())
    activation, slope = case.activation if isinstance(case.activation, tuple) else (case.activation, 0.01)
    return function(
        t.x, t.weight, t.bias, t.residual, t.running_mean, t.running_var, t.mask, case.norm, size, case.training,
        case.momentum, case.eps, activation, slope,
    )  # fmt: skip


def theirs(case: Case, t: Inputs) -> Any:
    """y by PyTorch."""
    running, step = (t.running_mean, t.running_var), (case.momentum, case.eps)
    if case.norm == "batch":
        y = F.batch_norm(t.x, *running, t.weight, t.bias, case.training, *step)
    elif case.norm == "instance":
        y = F.instance_norm(t.x, *running, t.weight, t.bias, case.training, *step)
    elif case.norm == "group":
        y = F.group_norm(t.x, case.groups, t.weight, t.bias, case.eps)
    elif case.norm == "layer":
        y = F.layer_norm(t.x, case.normalized_shape, t.weight, t.bias, case.eps)
    else:
        y = F.rms_norm(t.x, case.normalized_shape, t.weight, case.eps)
    if t.residual is not None:
        y = y + t.residual
    if isinstance(case.activation, tuple):
        return F.leaky_relu(y, case.activation[1])
    return y if case.activation is None else getattr(F, case.activation)(y)


def computed(inputs: Inputs, function: Callable[[Inputs], Any], wide: bool = False) -> dict[str, Any]:
    """The function's results and gradients on a case, as arrays."""
    given = {f.name: tensor(getattr(inputs, f.name)) for f in fields(inputs)}
    for name, t in given.items():
        if t is not None and t.is_floating_point():
            given[name] = t.double() if wide else t
    wanted = {"dx": "x", "dweight": "weight", "dbias": "bias", "dresidual": "residual"}
    wanted = {g: n for g, n in wanted.items() if given[n] is not None}
    for n in wanted.values():
        given[n].requires_grad_()
    y = function(Inputs(**given))
    gradients = torch.autograd.grad(y, [given[n] for n in wanted.values()], given["dy"])
    found = dict(zip(wanted, gradients, strict=True)) | {"y": y}
    found |= {n: given[n] for n in ("running_mean", "running_var")}
    return {n: array(t) for n, t in found.items()}


def of_the_adapter(case: Case) -> bool:
    layers = case.norm in ("layer", "rms")
    channels = case.norm in ("batch", "instance", "group") and case.axis == 1 and case.ghost_batch_size is None
    return (layers or channels) and case.correction == 1


def marks(case: Case) -> list[Any]:
    if "slow" in case.tags:
        return [pytest.mark.slow]
    return [] if "quick" in case.tags else [pytest.mark.thorough]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=marks(case)) for case in CASES if of_the_adapter(case)],
)
def test_case(case: Case) -> None:
    for module in case.requires:
        pytest.importorskip(module, reason=f"{module} is not installed")
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    # PyTorch has no masks, and refuses a group norm of one sample and position; where x is float64, its results are no
    # closer to the truth than ours.
    refused = case.mask or (case.norm == "group" and case.size == case.channels)
    if not refused and case.dtype != "float64" and case.size:
        wide = computed(inputs, lambda t: theirs(case, t), wide=True)
        expected = replace(expected, **{n: a for n, a in wide.items() if a is not None})
    got = computed(inputs, lambda t: ours(case, t, ops.norm))
    found = cases.compare(case, inputs, expected, replace(expected, **got))
    compared = {n for n, a in got.items() if a is not None}
    assert not [one for one in found if not one.ok and one.name in compared]
    assert compared <= {one.name for one in found}
    # What compilers call has the same bits.
    for name, a in computed(inputs, lambda t: ours(case, t, through_the_op)).items():
        if a is not None:
            assert_same_bits(a, got[name], name)


def through_the_op(*args: Any) -> Any:
    y, _, _, mean, var = torch.ops.fusednorm.norm(*args)
    own, running = args[9], args[4:6]
    if own and running[0] is not None:
        running[0].copy_(mean)
        running[1].copy_(var)
    return y


def test_the_comparison_sees_an_error() -> None:
    """Positive control: a result of the adapter's, moved by four bounds."""
    case = next(one for one in CASES if one.residual and one.activation == "silu" and of_the_adapter(one))
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    got = computed(inputs, lambda t: ours(case, t, ops.norm))
    bounds = cases.bounds(case, inputs, expected)
    for name in ("y", "dx", "dweight", "dbias", "dresidual", "running_mean"):
        planted = np.array(got[name])
        planted.flat[-1] += 4 * bounds[name].flat[-1]
        found = cases.compare(case, inputs, expected, replace(expected, **(got | {name: planted})))
        assert name in [one.name for one in found if not one.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_eps_of_rms_norm_that_is_not_given(dtype: torch.dtype) -> None:
    """At a small scale, where it shows; two roundings of y apart at most."""
    x = (torch.randn(8, 64) * 1e-3).to(dtype)
    theirs, ours = torch.nn.RMSNorm(64, dtype=dtype)(x).double(), fnt.RMSNorm(64, dtype=dtype)(x).double()
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()


# Gradients by differences.


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["training", "evaluation"]
)
@pytest.mark.parametrize(("name", "args", "shape"), some(MODULES, KINDS, IDS))
def test_gradients(name: str, args: Any, shape: Any, training: bool) -> None:
    module = made(name, args).train(training)
    function, given = called(module), leaves(module, shape)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_gradients_with_a_mask(kind: str, last: bool) -> None:
    x = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    mask = torch.rand(3, 3, 2) < 0.6
    given = [x.requires_grad_(), *(torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))]

    def function(x: Any, weight: Any, bias: Any) -> Any:
        return ops.norm(x, weight, bias, None, None, None, mask, kind, (2,) if kind == "group" else ())

    assert torch.autograd.gradcheck(function, given)
    with pytest.raises(NotImplementedError, match="no double backward through a norm with a mask"):
        torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "tanh", ("leaky_relu", 0.2), None])
def test_gradients_with_an_activation_and_a_residual(activation: Any) -> None:
    module = fnt.BatchNormAct(4, activation=activation, dtype=torch.float64)
    x, residual = (torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    function = called(module)
    names = [n for n, _ in module.named_parameters()]

    def with_residual(x: Any, residual: Any, *parameters: Any) -> Any:
        state = dict(zip(names, parameters, strict=True)) | {n: b.clone() for n, b in module.named_buffers()}
        return torch.func.functional_call(module, state, (x, residual))

    given = [x, residual, *leaves(module, x.shape)[1:]]
    assert torch.autograd.gradcheck(with_residual, given)
    if activation is None:
        assert torch.autograd.gradgradcheck(with_residual, given)
        return
    with pytest.raises(NotImplementedError, match="no double backward through a norm with an activation"):
        torch.autograd.gradgradcheck(function, [given[0], *given[2:]])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@each_module
def test_second_gradients_are_those_of_torch(name: str, args: Any, shape: Any, dtype: Any) -> None:
    """A gradient penalty, of the same stored numbers: what gradients are rounded to is rounded a few times."""
    results = []
    for of in (fnt, nn):
        wide = dtype if of is fnt else torch.float64
        module = made(name, args, dtype, of).to(wide)
        torch.manual_seed(2)
        x = torch.randn(shape).to(dtype).to(wide).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append([t.grad.double() for t in (x, *module.parameters())])
    bound = 8 * torch.finfo(dtype).eps * max(t.abs().max() for t in results[1])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= bound


def test_there_are_no_third_gradients() -> None:
    module = made("LayerNorm", (3,))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    (dxx,) = torch.autograd.grad(dx.pow(3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second gradients have no gradients"):
        dxx.sum().backward()


def test_changed_after_the_forward() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    twice = x * 2
    y = fnt.BatchNorm1d(6)(twice)
    twice.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_change_in_the_open() -> None:
    module = fnt.BatchNorm1d(6)
    weight = torch.ones(6, requires_grad=True)
    y = weight * module.running_var
    module(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Modules.


def compared(x: Any, modules: tuple[Any, Any], *more: Any, tolerance: float = 1e-12) -> None:
    """y, gradients and state of a module of ours and one of torch.nn's."""
    results: list[list[Any]] = []
    for module in modules:
        given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        module.zero_grad()
        y = module(given, *more)
        y.backward(y.detach().flip(0) + 1)
        results.append([y.detach(), given.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@each_module
def test_in_place_of_torchs(name: str, args: Any, shape: Any) -> None:
    mine, torchs = (made(name, args, of=of) for of in (fnt, nn))
    assert isinstance(mine, type(torchs))
    assert repr(mine) == repr(torchs)
    assert list(mine.state_dict()) == list(torchs.state_dict())
    mine.load_state_dict(torchs.state_dict())
    for _ in range(3):
        compared(torch.randn(shape, dtype=torch.float64), (mine, torchs))
    compared(torch.randn(shape, dtype=torch.float64), (mine.eval(), torchs.eval()))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options_of_batch_norm(options: dict[str, Any]) -> None:
    pair = tuple(of.BatchNorm1d(5, dtype=torch.float64, **options) for of in (fnt, nn))
    for mode in (True, True, False, True, False):
        for module in pair:
            module.train(mode)
        compared(torch.randn(7, 5, 2, dtype=torch.float64) * 3 + 1, pair)


def test_the_modes_of_running_statistics() -> None:
    """Statistics given later, taken away, or not tracked while there."""
    pair = (fnt.BatchNorm1d(5, dtype=torch.float64), nn.BatchNorm1d(5, dtype=torch.float64))
    x = torch.randn(7, 5, dtype=torch.float64)
    for module in pair:
        module.track_running_stats = False
    compared(x, pair)
    for module in pair:
        module.track_running_stats, module.running_mean, module.running_var = True, None, None
        module.eval()
    compared(x, pair)


@pytest.mark.parametrize("dtype", HALF)
def test_mixed_dtypes(dtype: Any) -> None:
    """x narrow, parameters float32, as autocast leaves them; and all narrow."""
    for narrow in (False, True):
        pair = fnt.BatchNorm2d(6), nn.BatchNorm2d(6)
        if narrow:
            pair = tuple(module.to(dtype) for module in pair)
        compared(torch.randn(4, 6, 3, 3).to(dtype), pair, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_masks_are_the_functions(dtype: Any) -> None:
    x, dy = torch.randn(4, 6, 3, 2).to(dtype), torch.randn(4, 6, 3, 2).to(dtype)
    mask = torch.rand(4, 3, 2) < 0.7
    for name, args, forward, backward in (
        ("BatchNorm2d", (6,), fn.batch_norm_forward, fn.batch_norm_backward),
        ("BatchNormAct", (6,), fn.batch_norm_forward, fn.batch_norm_backward),
        ("InstanceNorm2d", (6, 1e-5, 0.1, True), fn.instance_norm_forward, fn.instance_norm_backward),
        ("GroupNorm", (3, 6), fn.group_norm_forward, fn.group_norm_backward),
    ):
        module = made(name, args, torch.float32)
        weight, bias = array(module.weight), array(module.bias)
        more: dict[str, Any] = {"mask": mask.numpy()}
        if name == "BatchNormAct":
            more["activation"] = "relu"
        first = (3,) if name == "GroupNorm" else ()
        y, *saved = forward(array(x), *first, weight, bias, **more)
        gradients = backward(array(dy), array(x), *saved, weight, bias, **more)
        given = x.clone().requires_grad_()
        got = module(given, mask=mask)
        assert_same_bits(array(got), y)
        for t, a in zip(torch.autograd.grad(got, [given, module.weight, module.bias], dy), gradients, strict=True):
            assert_same_bits(array(t), a)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", ("leaky_relu", 0.3), "silu", "sigmoid", "tanh", None])
def test_fused_activation_and_residual(activation: Any) -> None:
    mine, torchs = (of(6, dtype=torch.float64) for of in (fnt.BatchNormAct, nn.BatchNorm2d))
    mine.activation = activation
    x, residual = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64)
    name, *slope = activation if isinstance(activation, tuple) else (activation,)

    class Unfused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torchs

        def forward(self, x: Any, residual: Any) -> Any:
            y = self.norm(x) + residual
            return y if name is None else getattr(F, name)(y, *slope)

    compared(x, (mine, Unfused()), residual)
    compared(x, (mine.eval(), Unfused().eval()), residual)


def test_errors_are_torchs() -> None:
    x = torch.randn(4, 6)
    for mine, torchs, given in (
        (fnt.BatchNorm2d(6), nn.BatchNorm2d(6), x),
        (fnt.BatchNorm1d(6), nn.BatchNorm1d(6), torch.randn(2, 6, 1, 1)),
        (fnt.InstanceNorm2d(6), nn.InstanceNorm2d(6), x),
        (fnt.InstanceNorm1d(5, affine=True), nn.InstanceNorm1d(5, affine=True), torch.randn(2, 6, 3)),
    ):
        with pytest.raises(ValueError) as theirs:  # noqa: PT011
            torchs(given)
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            mine(given)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        fnt.BatchNorm1d(6)(x[:1])
    with pytest.raises(ValueError, match="running_mean should contain 6 elements not 5"):
        fnt.BatchNorm1d(5)(x)
    with pytest.raises(ValueError, match=r"Given normalized_shape=\[5\], expected input with shape \[\*, 5\]"):
        fnt.LayerNorm(5)(x)
    with pytest.raises(ValueError, match=r"num_channels \(4\) must be divisible by num_groups \(3\)"):
        fnt.GroupNorm(3, 6)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        fnt.BatchNormAct(6)(x[0])
    with pytest.raises(ValueError, match="activation must be one of"):
        fnt.BatchNormAct(6, activation="gelu")
    with pytest.raises(TypeError, match="residual must have x's dtype"):
        fnt.BatchNormAct(6)(x, x.double())
    with pytest.raises(ValueError, match="mask must have x's shape without axis 1"):
        fnt.BatchNorm1d(6)(x, mask=torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="x has dtype int64"):
        fnt.LayerNorm(6)(x.long())
    with pytest.warns(UserWarning, match="does not match num_features"):
        fnt.InstanceNorm1d(5)(torch.randn(2, 6, 3))


def test_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"bfloat16 needs ml_dtypes: pip install 'fusednorm\[bf16\]'"):
        fnt.LayerNorm(6)(torch.randn(4, 6, dtype=torch.bfloat16))


@pytest.mark.skipif(not arrays.missing_for_cuda(), reason="CUDA is there")
def test_a_gpu_without_kernels() -> None:
    """As far as that can be seen without a GPU: the error comes before anything is asked of it."""
    on_a_gpu = SimpleNamespace(is_cpu=False, device=torch.device("cuda:0"))
    with pytest.raises(TypeError, match=r"x is on cuda:0: .*(CUDA|CuPy)"):
        ops._on_its_stream(print)(on_a_gpu)


def test_torch_is_not_imported_unasked() -> None:
    ran = run_python("import sys, fusednorm, fusednorm.testing.cases; assert 'torch' not in sys.modules")
    assert ran.returncode == 0, ran.stderr


# Memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_tensors_and_arrays_share_memory(dtype: Any) -> None:
    x = torch.randn(3, 4, 5).to(dtype)
    for t in (x, x.transpose(0, 2), x[:, 1::2], x[0, 0, 0].expand(3, 2)):
        a = ops._array(t)
        assert a.ctypes.data == t.data_ptr()
        assert a.strides == tuple(s * t.element_size() for s in t.stride())
        back = ops.to_torch(a)
        assert back.data_ptr() == t.data_ptr()
        assert (back.dtype, back.shape, back.stride()) == (t.dtype, t.shape, t.stride())
        assert torch.equal(back, t)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_memory_formats(dtype: Any) -> None:
    """y and dx lie as x does; where x has gaps, or a line of layer norm lies across memory, they are contiguous. dy may
    lie otherwise."""
    x = torch.randn(2, 8, 6, 4).to(dtype)
    for given in (x, x.to(memory_format=torch.channels_last), x.permute(1, 0, 3, 2), x[:, :, ::2], x.flip(0)[:, 2:]):
        is_dense = torch.ops.aten.is_non_overlapping_and_dense(given)
        _, channels, height, last = given.shape
        for name, args in (
            ("BatchNorm2d", (channels,)),
            ("GroupNorm", (2, channels)),
            ("LayerNorm", (last,)),
            ("RMSNorm", ((height, last),)),
        ):
            lines = len(args[0]) if name == "RMSNorm" else 1 if name == "LayerNorm" else 0
            in_place = is_dense and given[(0,) * (4 - lines)].is_contiguous()
            expected = given.stride() if in_place else torch.empty(given.shape).stride()
            dense = given.detach().requires_grad_()
            module = made(name, args, torch.float32)
            y = module(dense)
            assert y.stride() == expected
            dy = torch.randn(given.shape[::-1]).to(dtype).permute(3, 2, 1, 0)
            (dx,) = torch.autograd.grad(y, dense, dy, retain_graph=True)
            assert dx.stride() == expected
            plain = given.contiguous().requires_grad_()
            again = made(name, args, torch.float32)(plain)
            torch.testing.assert_close(y, again)
            torch.testing.assert_close(dx, torch.autograd.grad(again, plain, dy)[0])
            y.sum().backward()  # dy is one number, expanded


def test_large_results_come_from_the_pool() -> None:
    x = torch.randn(64, 64, 32, 32)
    module = fnt.BatchNorm2d(64)
    y = module(x)
    kept = y.clone()
    del x
    again = module(torch.randn(64, 64, 32, 32))
    assert again.data_ptr() != y.data_ptr()
    assert torch.equal(y, kept)  # which lives as long as its tensor
    y.add_(1)


# Who looks at operations.


def arguments(kind: str) -> tuple[Any, ...]:
    """Of the op norm."""
    x, mask = torch.randn(4, 6, 5, 3), torch.rand(4, 5, 3) < 0.7
    channels, running, none = (torch.randn(6), torch.randn(6)), (torch.zeros(6), torch.ones(6)), (None, None)
    line = torch.randn(5, 3)
    plain = (0.1, 1e-5, None, 0.0)
    given: dict[str, tuple[Any, ...]] = {
        "batch": (x, *channels, None, *running, None, "batch", [], True, *plain),
        "evaluation": (x, *channels, None, *running, None, "batch", [], False, *plain),
        "last": (x.to(memory_format=torch.channels_last), *channels, None, *none, None, "batch", [], True, *plain),
        "act": (x, *channels, x + 1, *running, mask, "batch", [], True, 0.1, 1e-5, "leaky_relu", 0.2),
        "half": (x.half(), *channels, None, *running, None, "batch", [], True, *plain),
        "instance": (x, *none, None, *running, None, "instance", [], True, *plain),
        "group": (x[:, :, ::2], *channels, None, *none, None, "group", [3], True, *plain),
        "layer": (x, line, line + 1, None, *none, None, "layer", [5, 3], True, *plain),
        "rms": (x.transpose(0, 1), line[0].clone(), None, None, *none, None, "rms", [3], True, *plain),
    }
    return tuple(a.requires_grad_() if i < 4 and isinstance(a, torch.Tensor) else a for i, a in enumerate(given[kind]))


@pytest.mark.parametrize(
    "kind",
    some(["batch", "evaluation", "last", "act", "half", "instance", "group", "layer", "rms"], ("act", "group", "rms")),
)
def test_opcheck(kind: str) -> None:
    given = arguments(kind)
    x, weight, bias, residual, _, _, mask, norm, size, own, _, _, activation, slope = given
    torch.library.opcheck(torch.ops.fusednorm.norm.default, given)
    y, mean, rstd, *_ = torch.ops.fusednorm.norm(*given)
    dy = torch.randn_like(y)
    if activation is None:
        backward = (dy.requires_grad_(), x, mean, rstd, weight, None, None, mask, norm, size, own, None, 0.0)
        double = (dy, torch.randn(weight.shape) if weight is not None else None, None, y, x, mean, rstd, weight)
        double = tuple(None if t is None else t.detach() for t in double)
        torch.library.opcheck(torch.ops.fusednorm.norm_double_backward.default, (*double, norm, size, own))
    else:
        x, weight, bias, residual = (t.detach() for t in (x, weight, bias, residual))
        backward = (dy, x, mean, rstd, weight, bias, residual, mask, norm, size, own, activation, slope)
    torch.library.opcheck(torch.ops.fusednorm.norm_backward.default, backward)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch, self.act = nn.Conv2d(3, 8, 3), fnt.BatchNorm2d(8), fnt.BatchNormAct(8)
        self.instance, self.group = fnt.InstanceNorm2d(8, affine=True), fnt.GroupNorm(2, 8)
        self.layer, self.rms = fnt.LayerNorm(6), fnt.RMSNorm(6)

    def forward(self, x: Any) -> Any:
        x = self.batch(self.conv(x))
        return self.rms(self.layer(self.group(self.instance(self.act(x, x)))))


def same_after_a_step(one: Any, other: Any, function: Any, shapes: list[tuple[int, ...]]) -> None:
    """`function` does what `other` does; both are stepped through, gradients and buffers too."""
    for shape in shapes:
        x = torch.randn(shape)
        y, z = function(x), other(x)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(y, z)
    for a, b in zip([*one.parameters()], [*other.parameters()], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip([*one.buffers()], [*other.buffers()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("default")  # PyTorch's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(backend: str, dynamic: bool, training: bool) -> None:
    net = Net().train(training)
    other = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=dynamic)
    same_after_a_step(net, other, compiled, [(4, 3, 8, 8), (6, 3, 8, 8)])


def test_export_and_trace() -> None:
    net, x = Net().eval(), torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        exported, traced = torch.export.export(net, (x,)).module(), torch.jit.trace(net, (x,))
    other = torch.randn(4, 3, 8, 8)
    assert torch.equal(exported(other), net(other))
    assert torch.equal(traced(other), net(other))


def test_meta_tensors_and_modes() -> None:
    x = torch.randn(4, 6, 5, device="meta")
    assert fnt.GroupNorm(2, 6, device="meta")(x).shape == x.shape
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert fnt.LayerNorm(6)(torch.randn(4, 6)).shape == (4, 6)


@each_module
def test_function_transforms(name: str, args: Any, shape: Any) -> None:
    mine, torchs = (made(name, args, of=of).eval() for of in (fnt, nn))
    xs = torch.randn((3, *shape), dtype=torch.float64)
    parameters = dict(torchs.named_parameters())
    results = []
    for module in (mine, torchs):

        def loss(parameters: Any, x: Any, module: Any = module) -> Any:
            return torch.func.functional_call(module, parameters, (x,)).pow(3).sum()

        gradient = torch.func.grad(loss, argnums=(0, 1))
        found = [torch.func.vmap(module)(xs), torch.func.vmap(gradient, in_dims=(None, 0))(parameters, xs)]
        found.append(torch.func.jacrev(lambda x, f=gradient: f(parameters, x)[1])(xs[0]))
        results.append(found)
    torch.testing.assert_close(*results)


def test_what_cannot_be_mapped() -> None:
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        torch.func.vmap(fnt.BatchNorm1d(6))(torch.randn(3, 4, 6))
    free = fnt.BatchNorm1d(6, track_running_stats=False)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(torch.func.vmap(free)(x), torch.stack([free(one) for one in x]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what PyTorch loads for it
def test_there_is_no_forward_mode() -> None:
    module, x = fnt.LayerNorm(6).requires_grad_(False), torch.randn(4, 6)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        module(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(module, (x,), (x,))


def test_gradients_of_a_batch() -> None:
    """Where the backward is mapped, but not the forward."""
    mine, torchs = (made("LayerNorm", (6,), of=of) for of in (fnt, nn))
    x = torch.randn(4, 6, dtype=torch.float64)
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        one, other = (derivative(lambda x, m=m: m(x).pow(3).sum(), x, vectorize=True) for m in (mine, torchs))
        torch.testing.assert_close(one, other)


@NO_BFLOAT16
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch's, of its own RMS norm
def test_autocast() -> None:
    for given in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            for name, args, shape in MODULES:
                x = torch.randn(shape).to(given)
                mine, torchs = (made(name, args, torch.float32, of) for of in (fnt, nn))
                y, z = mine(x), torchs(x)
                assert y.dtype == z.dtype
                torch.testing.assert_close(y, z, rtol=2**-6, atol=2**-6)
            act, x = fnt.BatchNormAct(8), nn.Conv2d(3, 8, 3)(torch.randn(2, 3, 8, 8))
            assert x.dtype == torch.bfloat16
            y = act(x, torch.randn(x.shape))
            assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert act.weight.grad.dtype == torch.float32


# Life of a module.


def test_copies_and_files() -> None:
    net = Net()
    x = torch.randn(4, 3, 8, 8)
    net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    expected = net.eval()(x)
    for one in copies:
        assert torch.equal(one.eval()(x), expected)
    state = io.BytesIO()
    torch.save(net.state_dict(), state)
    state.seek(0)
    fresh = Net().eval()
    fresh.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(fresh(x), expected)


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    net, x = fnt.LayerNorm(6), torch.randn(4, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(net(x).pow(3).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).pow(3).sum(), x)
    assert torch.equal(dx, again)


@pytest.mark.filterwarnings("default")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch is built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = Net()
        other = copy.deepcopy(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        same_after_a_step(net, other, wrapped, [(4, 3, 8, 8)])
    finally:
        torch.distributed.destroy_process_group()


# Whole models.


class Own(nn.LayerNorm):
    pass


def mixed() -> Any:
    norms = [getattr(nn, name)(*args) for name, args, _ in MODULES]
    others = nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(), nn.Sequential(nn.BatchNorm1d(4))
    return nn.Sequential(*norms, Own(4), *others)


def test_convert_and_revert() -> None:
    model = mixed()
    model[0].register_forward_hook(lambda *_: None)
    model[3].eval()
    before = {name: (module, dict(module.__dict__)) for name, module in model.named_modules()}
    state = dict([*model.named_parameters(), *model.named_buffers()])
    report = fnt.convert(model)
    synchronized, lazy, nested = (str(len(MODULES) + 1), str(len(MODULES) + 2), f"{len(MODULES) + 3}.0")
    assert list(report.done) == [*map(str, range(len(MODULES))), synchronized, nested]
    assert list(report.left) == [str(len(MODULES)), lazy]
    assert "Own is a kind of LayerNorm of its own" in str(report)
    assert "LazyBatchNorm1d is without a counterpart" in str(report)
    assert type(model[len(MODULES) + 1]) is fnt.SyncBatchNorm
    for i, (name, _, _) in enumerate(MODULES):
        assert type(model[i]) is getattr(fnt, name)
    assert type(model[len(MODULES)]) is Own
    for name, module in model.named_modules():
        assert module is before[name][0]
        assert module.__dict__.keys() == before[name][1].keys()
        assert all(module.__dict__[k] is v for k, v in before[name][1].items())
    assert all(t is state[n] for n, t in [*model.named_parameters(), *model.named_buffers()])
    again = fnt.convert(model)
    assert not again.done
    assert "already" in again.left["0"]
    reverted = fnt.revert(model)
    assert list(reverted.done) == list(report.done)
    for i, (name, _, _) in enumerate(MODULES):
        assert type(model[i]) is getattr(nn, name)
    root = nn.BatchNorm1d(4)
    assert list(fnt.convert(root).done) == [""]
    assert type(root) is fnt.BatchNorm1d
    assert "BatchNormAct has no counterpart" in str(fnt.revert(fnt.BatchNormAct(4)))
    assert "SyncBatchNorm has no counterpart" in str(fnt.revert(fnt.SyncBatchNorm(4, activation="relu")))


def test_a_converted_model_computes_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.LayerNorm((8, 6, 6)))
    model = model.double()
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(type(module)))
    other = copy.deepcopy(model)
    fnt.convert(model)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    compared(x, (model, other))
    assert seen[0] is fnt.BatchNorm2d
    compared(x, (model.eval(), other.eval()))


class Folding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a = nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.b = nn.ConvTranspose2d(8, 4, 3), fnt.BatchNorm2d(4)
        self.grouped, self.c = nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.twice, self.d = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.lone, self.free = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.conv1, self.act = nn.Conv2d(4, 4, 1), fnt.BatchNormAct(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.wide, self.e = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.linear, self.f = nn.Linear(4, 5), fnt.BatchNorm1d(5)

    def forward(self, x: Any) -> Any:
        x = self.b(self.up(torch.relu(self.a(self.conv(x)))))
        x = self.c(self.grouped(x))
        twice = self.twice(x)
        x = self.act(self.conv1(self.lone(self.d(twice) + twice)))
        x = self.free(self.conv2(x)).mean((2, 3))
        x = self.e(self.wide(x[:, :, None].expand(-1, 4, 4))).mean(2)
        return {"y": self.f(self.linear(x))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_batch_norm(dtype: Any) -> None:
    model, x = Folding().to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        fnt.fold_batch_norm(model, x)
    for _ in range(5):
        model(torch.randn(4, 3, 8, 8, dtype=dtype) * 3 + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    folded, report = fnt.fold_batch_norm(model, x)
    assert list(report.done) == ["a", "b", "f"]
    reasons = {
        "c": "in groups",
        "d": "used elsewhere",
        "lone": "no Linear or Conv right before",
        "free": "no running statistics",
        "act": "more than a batch norm",
        "e": "3D results",
    }
    assert report.left.keys() == reasons.keys()
    assert all(part in report.left[name] for name, part in reasons.items())
    assert not {"a", "b", "f"} & {name for name, _ in folded.named_modules()}
    other = torch.randn(4, 3, 8, 8, dtype=dtype)
    error = (folded(other)["y"] - model(other)["y"]).abs().max()
    assert error <= 1000 * torch.finfo(dtype).eps * model(other)["y"].abs().max()
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_what_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.randn(4, 3, 8, 8)
    model[0].register_forward_hook(lambda *_: None)
    assert "has hooks" in fnt.fold_batch_norm(model, x)[1].left["1"]
    model[1].train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        fnt.fold_batch_norm(model, x)


def test_a_wrong_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "fuse_conv_bn_eval", lambda layer, norm, transpose: layer)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model[1].running_mean.add_(1)
    with pytest.raises(ValueError, match="folded model's results differ"):
        fnt.fold_batch_norm(model, torch.randn(4, 3, 8, 8))
