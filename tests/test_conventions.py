"""The conventions of other libraries: against the library itself where it is installed, else against its source."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm import conventions
from fusednorm.conventions import CONVENTIONS, from_pytorch, to_pytorch
from support import Array, assert_same_bits

C = 4
LAST = (6, 3, 2, C)  # channels last; 36 elements a channel, so that n and n − 1 differ by 3%
# Sums of 36 float32 numbers in any order are off by 36·6e-8; Flax's variance E[x²] − E[x]² by that of E[x²], here up to
# 5 variances.
FLOAT32 = 36 * 2.0**-24 * 5


def load(name: str, **environment: str) -> Any:
    """A library, or the test is skipped; what it warns of while it is imported is its own affair."""
    for variable, value in environment.items():
        os.environ.setdefault(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def keras(tmp_path: Path) -> Any:
    backend = "torch"
    try:
        import torch  # noqa: F401
    except ImportError:
        backend = "jax"
    return load("keras", KERAS_BACKEND=backend, KERAS_HOME=str(tmp_path))


def batches(axis: int = -1, steps: int = 5, dtype: str = "float32") -> Iterator[Array]:
    """Batches whose channels have means and variances of their own, from batch to batch."""
    rng = np.random.default_rng(3)
    spread, center = np.array([0.3, 1, 2, 0.7]), np.array([0.5, -1, 2, 0])
    for step in range(steps):
        x = rng.standard_normal(LAST) * (spread * (1 + 0.2 * step)) + center * (1 + 0.3 * step)
        yield np.ascontiguousarray(np.moveaxis(x, -1, axis).astype(dtype))


def parameters(dtype: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng(4)
    return {name: rng.uniform(0.5, 2, C).astype(dtype) for name in ("weight", "bias")}


def close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = np.maximum(np.abs(want), np.abs(want).max(initial=0) if what == "y" else 1)
    assert got.shape == want.shape, what
    assert np.all(np.abs(got - want) <= tolerance * scale), f"{what}: {got} is not {want}"


Step = Callable[[Array, bool], tuple[Array, Array, Array]]


def follows(convention: str, theirs: Step, tolerance: float, dtype: str = "float32", **options: Any) -> fn.BatchNorm:
    """Our layer and their `step(x, training)`, which returns y and the running statistics, through the same batches."""
    layer = fn.BatchNorm.from_convention(convention, C, dtype=dtype, **options)
    for name, value in parameters(dtype).items():
        if getattr(layer, name) is not None:
            setattr(layer, name, value)
    for training in (True, False):
        layer.train(training)
        for x in batches(layer.axis, dtype=dtype):
            y, mean, var = theirs(x, training)
            close(layer(x), y, tolerance, "y")
            close(layer.running_mean, mean, tolerance, "running_mean")
            close(layer.running_var, var, tolerance, "running_var")
    return layer


# The libraries themselves.


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 0.1}, {"momentum": None}], ids=str)
def test_pytorch(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.BatchNorm2d(C, dtype=torch.float64, **options)
    module.load_state_dict({name: torch.tensor(a) for name, a in parameters("float64").items()}, strict=False)

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        y = module.train(training)(torch.tensor(x))
        return y.detach().numpy(), module.running_mean.numpy(), module.running_var.numpy()

    layer = follows("torch", step, 1e-13, "float64", **options)
    state = to_pytorch("torch", module.state_dict())
    assert state["num_batches_tracked"] == 5
    again = fn.BatchNorm.from_convention("torch", C, dtype="float64", **options).eval()
    again.load_state_dict(state)
    x = next(batches(1, dtype="float64"))
    close(again(x), module.eval()(torch.tensor(x)).detach().numpy(), 1e-13, "y")
    module.load_state_dict({name: torch.as_tensor(a) for name, a in from_pytorch("torch", layer.state_dict()).items()})
    close(module(torch.tensor(x)).detach().numpy(), layer(x), 1e-13, "y")


# Keras's way from PyTorch to NumPy warns.
of_keras = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@of_keras
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.7, "eps": 0.1, "axis": 1}, {"scale": False}, {"center": False}], ids=str
)
def test_keras(keras: Any, options: dict[str, Any]) -> None:
    theirs = {"epsilon" if name == "eps" else name: value for name, value in options.items()}
    module = keras.layers.BatchNormalization(**theirs)
    module.build(LAST if options.get("axis", -1) == -1 else (LAST[0], C, *LAST[1:-1]))
    own = parameters()
    for name, variable in (("weight", module.gamma), ("bias", module.beta)):
        if variable is not None:
            variable.assign(own[name])

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        y = module(x, training=training)
        return tuple(keras.ops.convert_to_numpy(a) for a in (y, module.moving_mean, module.moving_variance))

    layer = follows("keras", step, FLOAT32, **options)
    x = next(batches(layer.axis))
    again = fn.BatchNorm.from_convention("keras", C, **options).eval()
    again.load_state_dict(to_pytorch("keras", {v.name: keras.ops.convert_to_numpy(v) for v in module.weights}))
    close(again(x), step(x, False)[0], FLOAT32, "y")
    module.set_weights([a + 0.5 for a in module.get_weights()])
    module.set_weights(list(from_pytorch("keras", layer.state_dict()).values()))
    close(layer(x), step(x, False)[0], FLOAT32, "y")
    if not options:
        assert to_pytorch("keras", module.get_weights()).keys() == layer.state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "eps": 0.1, "axis": 1}, {"scale": False}], ids=str)
def test_flax_linen(options: dict[str, Any]) -> None:
    load("flax")
    import jax
    from flax import linen

    theirs = {{"eps": "epsilon", "scale": "use_scale"}.get(name, name): value for name, value in options.items()}
    first = next(batches(options.get("axis", -1)))
    module, own = linen.BatchNorm(**theirs), parameters()
    variables: dict[str, Any] = dict(module.init(jax.random.key(0), first, use_running_average=False))
    names = {"scale": "weight", "bias": "bias"}
    variables["params"] = {name: own[names[name]] for name in variables["params"]}

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        y, changed = module.apply(variables, x, use_running_average=not training, mutable=["batch_stats"])
        variables.update(changed)
        return y, variables["batch_stats"]["mean"], variables["batch_stats"]["var"]

    layer = follows("flax", step, FLOAT32, **options)
    again = fn.BatchNorm.from_convention("flax", C, **options).eval()
    again.load_state_dict(to_pytorch("flax", variables))
    close(again(first), step(first, False)[0], FLOAT32, "y")
    back = module.apply(from_pytorch("flax", layer.state_dict()), first, use_running_average=True)
    close(back, layer(first), FLOAT32, "y")


def test_flax_nnx() -> None:
    load("flax")
    from flax import nnx

    module, own = nnx.BatchNorm(C, rngs=nnx.Rngs(0)), parameters()
    module.scale[...], module.bias[...] = own["weight"], own["bias"]

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        y = module(x, use_running_average=not training)
        return y, module.mean[...], module.var[...]

    follows("flax", step, FLOAT32)
    again = fn.BatchNorm.from_convention("flax", C).eval()
    again.load_state_dict(
        to_pytorch("flax", {name: getattr(module, name)[...] for name in ("scale", "bias", "mean", "var")})
    )
    x = next(batches())
    close(again(x), step(x, False)[0], FLOAT32, "y")


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "eps": 0.1}], ids=str)
def test_onnx(options: dict[str, Any]) -> None:
    onnx = load("onnx")
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    attributes = {"epsilon" if name == "eps" else name: value for name, value in options.items()}
    own = parameters("float64")
    state = {"scale": own["weight"], "B": own["bias"], "input_mean": np.zeros(C), "input_var": np.ones(C)}

    def model(training: bool) -> Any:
        outputs = ["Y", "mean", "var"] if training else ["Y"]
        inputs = ["X", "bn.scale", "bn.B", "bn.mean", "bn.var"]
        node = helper.make_node("BatchNormalization", inputs, outputs, training_mode=int(training), **attributes)
        kind = onnx.TensorProto.DOUBLE
        graph = helper.make_graph(
            [node],
            "bn",
            [helper.make_tensor_value_info("X", kind, None)],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs],
            [numpy_helper.from_array(a, name) for a, name in zip(state.values(), inputs[1:], strict=True)],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        y, *running = ReferenceEvaluator(model(training)).run(None, {"X": x})
        if running:
            state["input_mean"], state["input_var"] = running
        return y, state["input_mean"], state["input_var"]

    # The attributes are float32: 0.9 is 0.89999998.
    layer = follows("onnx", step, 1e-6, "float64", **options)
    initializers = {a.name: numpy_helper.to_array(a) for a in model(False).graph.initializer}
    again = fn.BatchNorm.from_convention("onnx", C, dtype="float64", **options).eval()
    again.load_state_dict(to_pytorch("onnx", [initializers[name] for name in model(False).graph.node[0].input[1:]]))
    x = next(batches(1, dtype="float64"))
    close(again(x), step(x, False)[0], 1e-6, "y")
    state |= from_pytorch("onnx", layer.state_dict())
    close(step(x, False)[0], layer(x), 1e-6, "y")


# Their sources, in float64.


def moments(x: Array) -> tuple[Array, Array, int]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3)), x.size // C


def normalized(x: Array, mean: Array, var: Array, eps: float, gamma: Any = 1.0, beta: Any = 0.0) -> Array:
    x = np.moveaxis(x, 1, -1)
    return np.moveaxis((x - mean) / np.sqrt(var + eps) * gamma + beta, -1, 1)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "eps": 0.1}, {"center": False}], ids=str)
def test_chainer(options: dict[str, Any]) -> None:
    """Chainer 7, chainer/functions/normalization/batch_normalization.py, BatchNormalization.forward, the generic part:

    m = x.size // gamma.size; adjust = m / max(m - 1., 1.); running_mean *= decay; running_mean += (1 - decay) * mean;
    running_var *= decay; running_var += (1 - decay) * adjust * var. eps=2e-5, decay=0.9; avg_mean 0, avg_var 1.
    """
    decay, eps = options.get("momentum", 0.9), options.get("eps", 2e-5)
    own = parameters("float64")
    own["bias"] *= options.get("center", True)
    running = {"mean": np.zeros(C), "var": np.ones(C)}

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        mean, var = running["mean"], running["var"]
        if training:
            mean, var, m = moments(x)
            running["mean"] = running["mean"] * decay + (1 - decay) * mean
            running["var"] = running["var"] * decay + (1 - decay) * (m / max(m - 1.0, 1.0)) * var
        return normalized(x, mean, var, eps, own["weight"], own["bias"]), running["mean"], running["var"]

    layer = follows("chainer", step, 1e-13, "float64", **options)
    state = from_pytorch("chainer", layer.state_dict())
    beta = ["beta"] * options.get("center", True)
    assert list(state) == ["gamma", *beta, "avg_mean", "avg_var", "N"]
    assert state["N"] == 0
    assert_same_bits(to_pytorch("chainer", state)["running_var"], layer.running_var)


def caffe(fraction: float, eps: float, gamma: Any = 1.0, beta: Any = 0.0) -> tuple[Step, list[Array]]:
    """Caffe 1.0, src/caffe/layers/batch_norm_layer.cpp, BatchNormLayer::Forward_cpu: in training

    blobs[2] *= moving_average_fraction; blobs[2] += 1; blobs[0] = mean + moving_average_fraction·blobs[0]; m =
    bottom.count()/channels; blobs[1] = (m > 1 ? m/(m-1) : 1)·variance + moving_average_fraction·blobs[1]

    and in testing, scale_factor = blobs[2] == 0 ? 0 : 1/blobs[2], by which blobs[0] and blobs[1] are multiplied. All
    blobs begin with 0. The defaults 0.999 and 1e-5 are BatchNormParameter's in src/caffe/proto/caffe.proto. gamma and
    beta are those of a Scale layer after it.
    """
    blobs = [np.zeros(C), np.zeros(C), np.zeros(1)]

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        if training:
            mean, var, m = moments(x)
            blobs[2] = blobs[2] * fraction + 1
            blobs[0] = mean + fraction * blobs[0]
            blobs[1] = m / (m - 1) * var + fraction * blobs[1]
        factor = 0 if blobs[2][0] == 0 else 1 / blobs[2][0]
        global_mean, global_var = blobs[0] * factor, blobs[1] * factor
        if not training:
            mean, var = global_mean, global_var
        return normalized(x, mean, var, eps, gamma, beta), global_mean, global_var

    return step, blobs


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "eps": 0.1}], ids=str)
def test_caffe(options: dict[str, Any], scale: bool) -> None:
    fraction = options.get("momentum", 0.999)
    own = parameters("float64")
    gamma_beta = [own["weight"], own["bias"]] if scale else []
    step, blobs = caffe(fraction, options.get("eps", 1e-5), *gamma_beta)
    layer = follows("caffe", step, 1e-12, "float64", scale=scale, center=scale, **options)

    state = to_pytorch("caffe", [*blobs, *gamma_beta], momentum=fraction)
    assert state["num_batches_tracked"] == layer.num_batches_tracked == 5
    again = fn.BatchNorm.from_convention("caffe", C, dtype="float64", scale=scale, center=scale, **options)
    again.load_state_dict(state)
    exported = from_pytorch("caffe", layer.state_dict(), momentum=fraction)
    names = ["BatchNorm/0", "BatchNorm/1", "BatchNorm/2"] + ["Scale/0", "Scale/1"] * scale
    assert list(exported) == names
    for got, want in zip(exported.values(), [*blobs, *gamma_beta], strict=True):
        close(got, want, 1e-6)  # the factor is a float32
    # It goes on as Caffe would from there.
    for x in batches(1, dtype="float64"):
        y, mean, var = step(x, True)
        close(again(x), y, 1e-12, "y")
        close(again.running_mean, mean, 1e-12)
        close(again.running_var, var, 1e-12)


def test_caffes_factor_at_its_ends() -> None:
    fresh = to_pytorch("caffe", [np.zeros(C), np.zeros(C), np.zeros(1)])
    assert fresh["num_batches_tracked"] == 0
    assert_same_bits(fresh["running_var"], np.zeros(C))
    # Statistics of an unknown number of batches weigh as many, and so do those of a very large one.
    for count in ({}, {"num_batches_tracked": 0}, {"num_batches_tracked": 10**6}):
        state = from_pytorch("caffe", {"running_mean": np.full(C, 2.0), "running_var": np.full(C, 3.0), **count})
        close(state["BatchNorm/2"], [1000], 1e-6)
        close(state["BatchNorm/1"], np.full(C, 3000), 1e-6)
        back = to_pytorch("caffe", state)
        close(back["running_mean"], np.full(C, 2), 1e-6)
        layer = fn.BatchNorm.from_convention("caffe", C, dtype="float64")
        layer.load_state_dict(back)
        layer(x := next(batches(1, dtype="float64")))
        close(layer.running_mean, 0.999 * 2 + 0.001 * x.mean((0, 2, 3)), 1e-6)
    for momentum in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            to_pytorch("caffe", [np.zeros(C), np.zeros(C), np.ones(1)], momentum=momentum)
    # A fraction of 1 is the average of all batches.
    layer = fn.BatchNorm.from_convention("caffe", C, dtype="float64", momentum=1.0)
    seen = [x.mean((0, 2, 3)) for x in batches(1, dtype="float64") if layer(x) is not None]
    close(layer.running_mean, np.mean(seen, axis=0), 1e-13)


@pytest.mark.parametrize("scale", [False, True])
def test_mxnet(scale: bool) -> None:
    """MXNet 1.9, src/operator/nn/batch_norm.cc, BatchNormForwardImpl and BatchNormBackwardImpl on the CPU:

    variance = sum / itemCountPerChannel; runningVar = runningVar · momentum + variance · (1 - momentum), the mean
    alike; fix_gamma: out = (in - mean) · invstd + bias, w = 1 and its gradient 0. The defaults 1e-3, 0.9 and
    fix_gamma=True are BatchNormParam's in batch_norm-inl.h.
    """
    own = parameters("float64")
    running = {"mean": np.zeros(C), "var": np.ones(C)}

    def step(x: Array, training: bool) -> tuple[Array, Array, Array]:
        mean, var = running["mean"], running["var"]
        if training:
            mean, var, _ = moments(x)
            running["mean"] = running["mean"] * 0.9 + mean * (1 - 0.9)
            running["var"] = running["var"] * 0.9 + var * (1 - 0.9)
        y = normalized(x, mean, var, 1e-3, own["weight"] if scale else 1, own["bias"])
        return y, running["mean"], running["var"]

    layer = follows("mxnet", step, 1e-13, "float64", scale=scale)
    x = next(batches(1, dtype="float64"))
    layer(x)
    layer.backward(x)
    assert (layer.weight_grad is None) == (not scale)
    assert layer.bias_grad is not None

    symbol = {"gamma": own["weight"], "beta": own["bias"], "moving_mean": running["mean"], "moving_var": running["var"]}
    gluon = {name.replace("moving", "running"): value for name, value in symbol.items()}
    for state in (symbol, gluon, list(symbol.values())):
        again = fn.BatchNorm.from_convention("mxnet", C, dtype="float64", scale=scale).eval()
        again.load_state_dict(to_pytorch("mxnet", state, scale=scale))
        close(again(x), step(x, False)[0], 1e-13, "y")
    back = from_pytorch("mxnet", layer.state_dict())
    assert list(back) == list(symbol)
    assert_same_bits(back["gamma"], own["weight"] if scale else np.ones(C))
    with pytest.raises(ValueError, match="fix_gamma=True"):
        to_pytorch("mxnet", symbol)


# The other norms: x of so small a variance that eps counts.


def small(shape: tuple[int, ...]) -> Array:
    return (0.01 * np.random.default_rng(5).standard_normal(shape) + 0.005).astype(np.float32)


@of_keras
def test_other_norms_of_keras(keras: Any) -> None:
    x = small((3, 5, 5, 6))
    for layer, module in (
        (fn.LayerNorm.from_convention("keras", 6), keras.layers.LayerNormalization()),
        (fn.GroupNorm.from_convention("keras", 3, 6), keras.layers.GroupNormalization(3)),
        (fn.RMSNorm.from_convention("keras", 6), keras.layers.RMSNormalization()),
    ):
        close(layer(x), keras.ops.convert_to_numpy(module(x)), FLOAT32, "y")


def test_other_norms_of_flax() -> None:
    load("flax")
    from flax import nnx

    x, rngs = small((3, 5, 5, 6)), nnx.Rngs(0)
    for layer, module in (
        (fn.LayerNorm.from_convention("flax", 6), nnx.LayerNorm(6, rngs=rngs, use_fast_variance=False)),
        (fn.GroupNorm.from_convention("flax", 3, 6), nnx.GroupNorm(6, 3, rngs=rngs, use_fast_variance=False)),
        (fn.InstanceNorm.from_convention("flax", 6), nnx.InstanceNorm(6, rngs=rngs, use_fast_variance=False)),
        (fn.RMSNorm.from_convention("flax", 6), nnx.RMSNorm(6, rngs=rngs)),
    ):
        close(layer(x), module(x), FLOAT32, "y")
        assert layer.weight is not None


def test_other_norms_of_onnx() -> None:
    onnx = load("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    x = small((3, 6, 5, 5))
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    for name, layer, arguments, attributes in (
        ("LayerNormalization", fn.LayerNorm.from_convention("onnx", 5), (ones[:5], zeros[:5]), {}),
        ("InstanceNormalization", fn.InstanceNorm.from_convention("onnx", 6), (ones, zeros), {}),
        ("GroupNormalization", fn.GroupNorm.from_convention("onnx", 3, 6), (ones, zeros), {"num_groups": 3}),
        ("RMSNormalization", fn.RMSNorm.from_convention("onnx", 5), (ones[:5],), {}),
    ):
        node = helper.make_node(name, ["x", "w", "b"][: 1 + len(arguments)], ["y"], **attributes)
        given = dict(zip(node.input, (x, *arguments), strict=True))
        kind = onnx.TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(key, kind, a.shape) for key, a in given.items()]
        graph = helper.make_graph([node], "norm", inputs, [helper.make_tensor_value_info("y", kind, x.shape)])
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph))
        (y,) = ReferenceEvaluator(model).run(None, given)
        close(layer(x), y, FLOAT32, "y")


def test_other_norms_of_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = small((3, 6, 5, 5))
    for layer, module in (
        (fn.LayerNorm.from_convention("torch", 5), torch.nn.LayerNorm(5)),
        (fn.InstanceNorm.from_convention("torch", 6), torch.nn.InstanceNorm2d(6)),
        (fn.GroupNorm.from_convention("torch", 3, 6), torch.nn.GroupNorm(3, 6)),
        (fn.RMSNorm.from_convention("torch", 5), torch.nn.RMSNorm(5)),
    ):
        close(layer(x), module(torch.tensor(x)).detach().numpy(), FLOAT32, "y")


def test_defaults_of_chainer_and_mxnet() -> None:
    """chainer/links/normalization/layer_normalization.py and group_normalization.py; MXNet's LayerNormParam in
    src/operator/nn/layer_norm-inl.h, GroupNormParam in group_norm-inl.h, InstanceNormParam in instance_norm-inl.h."""
    assert fn.LayerNorm.from_convention("chainer", 5).eps == 1e-6
    assert fn.GroupNorm.from_convention("chainer", 3, 6).eps == 1e-5
    assert fn.LayerNorm.from_convention("mxnet", 5).eps == 1e-5
    assert fn.GroupNorm.from_convention("mxnet", 3, 6).eps == 1e-5
    layer = fn.InstanceNorm.from_convention("mxnet", 6)
    assert layer.eps == 1e-3
    assert layer.weight is not None


# The table and its use.


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_states_go_there_and_back(convention: str) -> None:
    row = CONVENTIONS[convention]
    layer = fn.BatchNorm.from_convention(convention, C, scale=True, center=True)
    for x in batches(layer.axis):
        layer(x)
    layer.weight, layer.bias = parameters().values()
    state = layer.state_dict()
    there = from_pytorch(convention, state)
    back = to_pytorch(convention, there, scale=True)
    for name in ("weight", "bias", "running_mean", "running_var"):
        close(back[name], state[name], 2**-22 if row.debiased else 0, name)
        assert back[name].dtype == np.float32
    again = fn.BatchNorm(C, axis=layer.axis, eps=layer.eps).eval()
    again.load_state_dict(back)
    close(again(x), layer.eval()(x), 2**-20 if row.debiased else 0, "y")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_is_given_comes_before_the_defaults(convention: str) -> None:
    row = CONVENTIONS[convention]
    layer = fn.BatchNorm.from_convention(
        convention, C, eps=0.25, momentum=0.25, axis=2, correction=1, activation="relu"
    )
    assert (layer.eps, layer.axis, layer.correction, layer.activation) == (0.25, 2, 1, "relu")
    assert layer.momentum == (0.25 if row.weighs == "new" else 0.75)
    default = fn.BatchNorm.from_convention(convention, C)
    assert default.correction == row.correction
    assert default.eps == row.norms["batch"]["eps"]
    assert (default.weight is not None, default.bias is not None) == (row.scale, row.center)


def test_ghost_batches_and_the_mask_take_the_correction() -> None:
    x = next(batches(1, dtype="float64"))
    layer = fn.BatchNorm.from_convention("keras", C, axis=1, momentum=0.0, ghost_batch_size=3, dtype="float64")
    layer(x)
    close(layer.running_var, x[3:].var((0, 2, 3)), 1e-13)
    mask = np.random.default_rng(0).random((6, 3, 2)) < 0.7
    layer = fn.BatchNorm.from_convention("flax", C, axis=1, momentum=0.0, dtype="float64")
    layer(x, mask=mask)
    close(layer.running_var, np.moveaxis(x, 1, -1)[mask].var(0), 1e-13)


def test_errors() -> None:
    for call in (
        lambda: fn.BatchNorm.from_convention("caffe2", C),
        lambda: fn.LayerNorm.from_convention("caffe2", C),
        lambda: to_pytorch("caffe2", {}),
        lambda: from_pytorch("caffe2", {}),
    ):
        with pytest.raises(ValueError, match="convention must be one of torch, keras"):
            call()
    for norm, convention in (
        (fn.RMSNorm, "chainer"),
        (fn.InstanceNorm, "keras"),
        (fn.LayerNorm, "caffe"),
        (fn.SwitchableNorm, "torch"),
    ):
        with pytest.raises(ValueError, match=r"has no .* norm"):
            norm.from_convention(convention, C)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no ghost batches"):
        fn.BatchNorm.from_convention("caffe", C, ghost_batch_size=3)
    a = np.ones(C)
    with pytest.raises(KeyError, match=r"missing \['moving_variance'\], unknown \['gama'\]"):
        to_pytorch("keras", {"gama": a, "moving_mean": a})
    with pytest.raises(KeyError, match="moving_variance"):
        to_pytorch("keras", [a, a, a])
    with pytest.raises(ValueError, match="has 4 arrays"):
        to_pytorch("keras", [a] * 5)
    with pytest.raises(KeyError, match=r"missing \['running_mean', 'running_var'\], unknown \['gamma'\]"):
        from_pytorch("keras", {"gamma": a})
    for correction in (2, -1, 0.5, None):
        with pytest.raises(ValueError, match="correction must be 0 or 1"):
            fn.BatchNorm(C, correction=correction)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="correction must be 0 or 1"):
            fn.batch_norm_forward(np.ones((3, C)), correction=correction)  # type: ignore[arg-type]


def test_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in CONVENTIONS and len(row) == 8}
    listed = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in CONVENTIONS and len(row) == 6}

    def shown(eps: Any) -> str:
        if eps == "":
            return "none"
        return "`finfo(float32).eps`" if eps is None else f"`{eps:.0e}`".replace("e-0", "e-")

    assert list(documented) == list(listed) == list(CONVENTIONS)
    for name, row in CONVENTIONS.items():
        parameters = ("weight" * row.scale, "bias" * row.center)
        assert documented[name] == [
            row.library,
            f"the {row.weighs} value",
            f"{row.momentum:g}",
            "n − 1" if row.correction else "n",
            shown(row.norms["batch"]["eps"]),
            str(row.axis).replace("-", "−"),
            ", ".join(filter(None, parameters)) or "none",
        ], name
        assert listed[name][:4] == [
            shown(row.norms.get(norm, {"eps": ""})["eps"]) for norm in ("layer", "group", "instance", "rms")
        ], name
        assert listed[name][4] == ", ".join(f"`{theirs[0]}`" for theirs in row.names.values()), name


def test_the_table_is_what_is_public() -> None:
    assert conventions.__all__ == ["CONVENTIONS", "Convention", "from_pytorch", "to_pytorch"]
    assert fn.conventions is conventions
