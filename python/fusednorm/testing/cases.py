"""The one list of cases, with data and tolerances, for the tests, ``fusednorm selftest`` and ``fusednorm bench``.

A :class:`Case` says what is computed, :func:`make` draws its arrays, :func:`run` calls any module that has the batch
norm functions (the library or :mod:`fusednorm.reference`), and :func:`compare` measures one result against the other::

    inputs = make(case)
    deviations = compare(case, inputs, expected(case, inputs), run(case, inputs, fusednorm))
    assert all(deviation.ok for deviation in deviations)

``CASES`` is for correctness, ``BENCH`` for time, ``BENCH_CUDA`` for time on a GPU. Tags: ``quick`` is the selection of
a self-test, ``sanitize`` holds cases small enough for instrumented builds, ``slow`` the ones above half a million
elements, ``bench`` all that are for time, ``compile`` those that torch.compile is timed on unasked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusednorm import reference
from fusednorm.reference import Activation, Float64

Array: TypeAlias = NDArray[Any]

# Largest relative error of one rounding to nearest; and the absolute one among subnormal numbers.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
UNDERFLOW = {"float64": 2.0**-1074, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}

# Bounds on |activation''|: how far an error in pre carries into the derivative.
CURVATURE = {None: 0.0, "relu": 0.0, "leaky_relu": 0.0, "silu": 0.5, "sigmoid": 0.1, "tanh": 0.8}

NORMS = ("batch", "instance", "group", "switchable", "layer", "rms", "weight")

SLOW_ELEMENTS = 500_000
SANITIZE_ELEMENTS = 3_000


@dataclass(frozen=True)
class Case:
    """One call of forward and backward: shapes, dtypes, options and the kind of data.

    Attributes:
        name: unique in its list, made of letters, digits, ``-``, ``_`` and ``.``.
        norm: one of ``NORMS``. What follows says "statistic" for what it is taken over: a channel, of all samples or
            (instance, switchable) of each, a group of channels, or a line, all of the last ``normalized`` axes.
        shape, axis: of x; ``axis`` holds the channels, and is weight norm's ``dim``. Of layer and RMS norm it has no
            meaning.
        normalized: how many axes layer and RMS norm normalize over.
        groups: of group norm.
        dtype: of x, y, dy, dx, residual: ``float32``, ``float64``, ``float16`` or ``bfloat16``.
        param_dtype: of weight, bias and the running statistics.
        affine: with weight and bias.
        training: with the statistics of x; otherwise with running ones, in the backward as well.
        running: with running statistics; evaluation needs them.
        residual, activation, ghost_batch_size, eps, momentum, correction: the arguments of that name.
        mask: with a mask that counts about 70% of the positions.
        offset: |mean| / sigma of the statistics. Signs alternate from one to the next.
        outlier: the first element of every statistic lies 100 sigma from the mean.
        scale: sigma is 0.5, 1 or 2 times this, from statistic to statistic. 0: each is over the constant ``offset``
            times that.
        tags: any of ``quick``, ``slow``, ``sanitize``, ``bench``, ``compile``.
    """

    name: str
    shape: tuple[int, ...]
    norm: str = "batch"
    axis: int = 1
    normalized: int = 1
    groups: int = 1
    dtype: str = "float32"
    param_dtype: str = "float32"
    affine: bool = True
    training: bool = True
    running: bool = True
    residual: bool = False
    activation: Activation = None
    ghost_batch_size: int | None = None
    mask: bool = False
    eps: float = 1e-5
    momentum: float = 0.1
    correction: int = 1
    offset: float = 0.0
    outlier: bool = False
    scale: float = 1.0
    tags: frozenset[str] = frozenset()

    @property
    def requires(self) -> tuple[str, ...]:
        """Modules that must be importable for :func:`make`."""
        return ("ml_dtypes",) if "bfloat16" in (self.dtype, self.param_dtype) else ()

    @property
    def size(self) -> int:
        """Elements of x."""
        return math.prod(self.shape)

    @property
    def has_lines(self) -> bool:
        """Layer and RMS norm: a statistic for each line, a weight and a bias for each number in it."""
        return self.norm in ("layer", "rms")

    @property
    def has_samples(self) -> bool:
        """Whether each sample has statistics of its own."""
        return self.norm in ("instance", "group", "switchable")

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.normalized :]

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """(N, G, K, P): x as N·G statistics over K channels of P positions each; of batch norm without ghost batches.

        Layer and RMS norm are group norm with one group, and lines for samples; weight norm is instance norm with one
        sample.
        """
        if self.has_lines:
            return math.prod(self.shape[: len(self.shape) - self.normalized]), 1, math.prod(self.normalized_shape), 1
        samples = self.shape[1 if self.axis % len(self.shape) == 0 else 0] if self.has_samples else 1
        groups, share = self.channels, 1
        if self.norm == "group":
            groups, share = self.groups, self.channels // self.groups
        positions = math.prod(n for a, n in enumerate(self.shape) if a != self.axis % len(self.shape))
        return samples, groups, share, positions // samples if samples else 0

    @property
    def statistics(self) -> int:
        """How many there are, without ghost batches."""
        return self.cells[0] * self.cells[1]

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """Of mean and rstd, without ghost batches."""
        if self.has_lines:
            return self.shape[: len(self.shape) - self.normalized]
        return self.cells[:2] if self.has_samples else (self.channels,)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Of weight and bias."""
        if self.norm == "weight":
            return tuple(n if a == self.axis % len(self.shape) else 1 for a, n in enumerate(self.shape))
        return self.normalized_shape if self.has_lines else (self.channels,)

    @property
    def centered(self) -> bool:
        """Whether the mean is taken off."""
        return self.norm not in ("rms", "weight")

    @property
    def channels(self) -> int:
        """Length of the channel axis."""
        return self.shape[self.axis]

    @property
    def accumulation_dtype(self) -> str:
        """Dtype of sums within a chunk and of arithmetic on elements."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def gradient_dtype(self) -> str:
        """Dtype of dweight and dbias: the parameters', without parameters float32 (float64 for a float64 x)."""
        if self.affine:
            return self.param_dtype
        return self.accumulation_dtype


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case, C-contiguous; what they store is the truth that results are measured against.

    ``x``, ``dy`` and ``residual`` have the case's shape and dtype, ``weight`` and ``bias`` its parameter_shape and
    param_dtype, ``running_mean`` and ``running_var`` are ``(C,)`` in the latter, ``mask`` is boolean in its shape
    without the channel axis. The logits of switchable norm are ``(3,)`` in param_dtype. What the case does not use is
    None. The running statistics are the values before the call.
    """

    x: Array
    dy: Array
    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    residual: Array | None
    mask: Array | None
    mean_logits: Array | None = None
    var_logits: Array | None = None


@dataclass(frozen=True)
class Outputs:
    """What a forward and a backward call returned, on the host; None where the case has none.

    The running statistics are the values after the call. Of weight norm rstd is √n/norm, of switchable norm mean and
    variances are the parts of the mixture.
    """

    y: Array
    mean: Array | None
    rstd: Array
    dx: Array
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None
    running_mean: Array | None
    running_var: Array | None
    variances: Array | None = None
    dmean_logits: Array | None = None
    dvar_logits: Array | None = None


@dataclass(frozen=True)
class Deviation:
    """One compared result: where it comes closest to its bound, or leaves it furthest behind.

    Attributes:
        name: of a field of :class:`Outputs`, or ``var``: what rstd says it is.
        error, bound: absolute error and its bound at the element with the largest ratio of the two.
        ok: every element is within its bound, and shape and dtype are right.
        detail: what is wrong other than a value; else empty.
    """

    name: str
    error: float
    bound: float
    ok: bool
    detail: str = ""


class Functions(Protocol):
    """A module or object with the functions of the norms, :mod:`fusednorm.reference` for one."""

    @property
    def batch_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def batch_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def instance_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def instance_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def group_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def group_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def layer_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def layer_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def rms_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def rms_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def switchable_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def switchable_norm_backward(self) -> Callable[..., Any]: ...

    @property
    def weight_norm_forward(self) -> Callable[..., Any]: ...

    @property
    def weight_norm_backward(self) -> Callable[..., Any]: ...


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; ``bfloat16`` is ml_dtypes'.

    Raises:
        ModuleNotFoundError: bfloat16 without ml_dtypes.
    """
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def make(case: Case, seed: int = 0) -> Inputs:
    """Draw the arrays of a case, the same ones for the same seed.

    Raises:
        ModuleNotFoundError: a module of ``case.requires`` is missing.
    """
    rng = np.random.default_rng(seed)
    statistics = np.arange(case.statistics)
    sigma = np.array([0.5, 1.0, 2.0])[statistics % 3]
    center = case.offset * sigma * np.where(statistics % 2 == 0, 1, -1)
    sigma = sigma * case.scale
    if case.scale != 0:
        center = center * case.scale

    dtype, param_dtype = numpy_dtype(case.dtype), numpy_dtype(case.param_dtype)
    # Drawn in float32 below float64: twice as fast, and it is what is stored that counts.
    drawn = np.dtype(case.accumulation_dtype).type

    def normal() -> Array:
        return rng.standard_normal(case.shape, dtype=drawn)

    def spread(statistic: Float64) -> Array:
        samples, groups, *_ = case.cells
        return _from_cells(statistic.reshape(samples, groups, 1, 1), case).astype(drawn)

    x = normal()
    if case.outlier:
        first = np.zeros(case.cells, np.bool_)
        first[:, :, 0, 0] = True
        x[_from_cells(first, case)] = 100
    x *= spread(sigma)
    x += spread(center)

    weight = bias = running_mean = running_var = residual = mask = None
    if case.affine:
        weight = (1 + 0.5 * rng.standard_normal(case.parameter_shape)).astype(param_dtype)
    if case.affine and case.centered:
        bias = rng.standard_normal(case.parameter_shape).astype(param_dtype)
    if case.running:
        center, sigma = np.resize(center, case.channels), np.resize(sigma, case.channels)  # those of the first sample
        running_mean = (center + 0.1 * sigma * rng.standard_normal(case.channels)).astype(param_dtype)
        running_var = (sigma**2 * rng.uniform(0.5, 1.5, case.channels)).astype(param_dtype)
    if case.mask:
        axis = case.axis % len(case.shape)
        mask = rng.random(case.shape[:axis] + case.shape[axis + 1 :]) < 0.7
    mean_logits = var_logits = None
    if case.norm == "switchable":
        mean_logits, var_logits = (rng.standard_normal(3).astype(param_dtype) for _ in range(2))
    if case.residual:
        residual = normal().astype(dtype, copy=False)
    return Inputs(
        x=x.astype(dtype, copy=False),
        dy=normal().astype(dtype, copy=False),
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        residual=residual,
        mask=mask,
        mean_logits=mean_logits,
        var_logits=var_logits,
    )


def run(
    case: Case,
    inputs: Inputs,
    functions: Functions,
    *,
    to_device: Callable[[Array], Any] = np.copy,
    to_host: Callable[[Any], Array] = np.asarray,
) -> Outputs:
    """Call the norm's ``_forward`` and ``_backward`` of ``functions`` on the case.

    Args:
        to_device: makes the array a call takes from one of ``inputs``; it must copy, because running statistics change
            in place.
        to_host: makes a NumPy array from one that a call returned.
    """
    arrays = {
        field.name: None if (array := getattr(inputs, field.name)) is None else to_device(array)
        for field in fields(inputs)
    }
    forward, backward = calls(case, Inputs(**arrays), functions)  # type: ignore[arg-type]
    y, *saved = forward()
    names = ["dx", "dweight", "dbias", "dresidual"]
    if case.norm == "switchable":
        names[3:] = ["dmean_logits", "dvar_logits"]
    outputs = dict.fromkeys(field.name for field in fields(Outputs))
    outputs |= dict(zip(names, map(to_host, backward(*saved)), strict=False)) | {"y": to_host(y)}
    if case.norm == "weight":
        with np.errstate(divide="ignore"):
            saved = [math.sqrt(max(case.cells[3], 1)) / saved[0].reshape(-1)]
    statistics = {"switchable": ("mean", "variances", "rstd")}.get(case.norm, ("mean", "rstd")[not case.centered :])
    outputs |= dict(zip(statistics, map(to_host, saved), strict=True))
    if case.running:
        outputs |= {name: to_host(arrays[name]) for name in ("running_mean", "running_var")}
    return Outputs(**outputs)  # type: ignore[arg-type]


def calls(case: Case, inputs: Inputs, functions: Functions) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The norm's ``_forward`` and its ``_backward`` of ``functions``, with the case's arguments. What the forward saves
    follows y, and is what backward takes. Both take further keywords, such as out.
    """
    x, weight, bias, shape = inputs.x, inputs.weight, inputs.bias, case.normalized_shape
    running = {
        "running_mean": inputs.running_mean,
        "running_var": inputs.running_var,
        "momentum": case.momentum,
        "eps": case.eps,
    }
    parameters: tuple[Any, ...] = (weight, bias)
    options: dict[str, Any] = {"axis": case.axis}
    first: tuple[Any, ...] = (x, weight, bias)
    if case.norm == "batch":
        options |= {"training": case.training, "residual": inputs.residual, "activation": case.activation}
        options |= {"ghost_batch_size": case.ghost_batch_size, "mask": inputs.mask}
        own = running | {"correction": case.correction}
    elif case.norm == "instance":
        options |= {"use_input_stats": case.training, "mask": inputs.mask}
        own = running
    elif case.norm == "switchable":
        options |= {"training": case.training}
        logits = inputs.mean_logits, inputs.var_logits
        first, parameters, own = (x, *logits, weight, bias), (*logits, weight, bias), running
    elif case.norm == "group":
        options |= {"mask": inputs.mask}
        first, own = (x, case.groups, weight, bias, case.eps), {}
    elif case.norm == "weight":
        first, own, options = (x, weight), {}, {"dim": case.axis}
    else:
        parameters = parameters if case.centered else (weight,)
        first, own, options = (x, shape, *parameters, case.eps), {}, {}
    forward, backward = (getattr(functions, f"{case.norm}_norm_{which}") for which in ("forward", "backward"))

    def back(*saved: Any, **more: Any) -> Any:
        if case.norm == "weight":
            return backward(inputs.dy, x, weight, *saved, **options, **more)
        return backward(inputs.dy, x, *saved, *parameters, **options, **more)

    return partial(forward, *first, **own, **options), back


def expected(case: Case, inputs: Inputs) -> Outputs:
    """The reference's results, all float64: nothing rounded to the dtypes of the case."""
    return run(case, inputs, reference, to_device=_float64)


def compare(
    case: Case, inputs: Inputs, expected: Outputs, got: Outputs, allowed: dict[str, Float64] | None = None
) -> list[Deviation]:
    """Measure ``got`` against ``expected``, one deviation for each result the case has.

    Args:
        allowed: what :func:`bounds` has of the first three, if it is there already.
    """
    allowed = bounds(case, inputs, expected) if allowed is None else allowed
    dtypes = {
        "y": case.dtype,
        "mean": "float64",
        "var": "float64",
        "dx": case.dtype,
        "dweight": case.gradient_dtype,
        "dbias": case.gradient_dtype,
        "dresidual": case.dtype,
        "running_mean": case.param_dtype,
        "running_var": case.param_dtype,
        "variances": "float64",
        "dmean_logits": case.param_dtype,
        "dvar_logits": case.param_dtype,
    }
    deviations = []
    for name, bound in allowed.items():
        want, have = _result(case, expected, name), _result(case, got, name)
        detail = ""
        if have is None:
            detail = "missing"
        elif have.shape != want.shape:
            detail = f"expected shape {want.shape}, got {have.shape}"
        elif have.dtype != numpy_dtype(dtypes[name]):
            detail = f"expected dtype {dtypes[name]}, got {have.dtype}"
        if have is None or detail:
            deviations.append(Deviation(name, math.inf, 0.0, False, detail))
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.abs(have.astype(np.float64) - want)
            ratio = np.where(error == 0, 0, error / bound)
        if ratio.size == 0:
            deviations.append(Deviation(name, 0.0, 0.0, True))
            continue
        worst = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
        deviations.append(Deviation(name, float(error[worst]), float(bound[worst]), bool(np.all(ratio <= 1))))
    return deviations


def bounds(case: Case, inputs: Inputs, expected: Outputs) -> dict[str, Float64]:
    """The largest absolute error allowed, for each element of each result that the case has.

    Infinite where an element is left out: dx and dresidual at the kink of ReLU and leaky ReLU. A result may take the
    derivative from either side there, and the sums, with everything that depends on them, get room for that.

    The float32 bounds hold for the half types as well, which accumulate in float32. u = 2^-24:

    - ``y``: 2e-6 (33 u) of ``max(|weight*xhat| + |bias| + |residual|)``. Subtraction, multiply-add, scale, shift and
      residual round about 5 times; the rest is for an activation (exp and a division, 4 u) and for the statistics.
    - ``dx``: 2e-6 of ``max|weight*rstd| * max|dy|``. The same count; the two means of the correction err by at most
      16 u of max|dy| each, see dweight.
    - ``dweight``, ``dbias``: 1e-6 (16 u) of the sum of absolute values. A chunk's lanes make chains of at most 64
      additions, whose errors add up like a random walk, to 8 u; products round once; above chunks the sums are float64.
    - ``var``: 1e-6 of itself. m2 of a chunk is such a sum, of squares that round twice.
    - ``mean``: pivot + sum(x - pivot)/n. The sum errs by 1e-6 of the mean |x - pivot|, which is at most sigma plus the
      pivot's distance from the mean; the pivot, a float32 mean of a chunk, is within 1e-6 of the mean. The arithmetic
      on these numbers is float64.

    float64 has the same steps with u = 2^-53, counted one by one below. There a mean in float64 is itself the limit:
    ``u * |mean| * rstd`` in xhat, and all that follows from it.

    Half types add their rounding of the output; float64's dweight and dbias that of float32 parameters. Maxima and sums
    run over one channel, so that no channel hides behind a larger one.
    """
    if case.norm == "switchable":
        return _mixture_bounds(case, inputs, expected)
    if case.norm != "batch":
        return _cell_bounds(case, inputs, expected)
    assert expected.mean is not None
    assert expected.dweight is not None
    assert expected.dbias is not None
    x, dy = _float64(inputs.x), _float64(inputs.dy)
    weight = _along(np.ones(case.channels) if inputs.weight is None else _float64(inputs.weight), case)
    bias = _along(np.zeros(case.channels) if inputs.bias is None else _float64(inputs.bias), case)
    residual = np.zeros(1) if inputs.residual is None else _float64(inputs.residual)
    mean, rstd = np.atleast_2d(expected.mean), np.atleast_2d(expected.rstd)
    mean_bound, var_bound = _statistics_bounds(case, mean, rstd)
    rstd_each = _per_element(rstd, case)
    xhat = (x - _per_element(mean, case)) * rstd_each
    pre = weight * xhat + bias + residual
    magnitude = _channel_max(np.abs(weight * xhat) + np.abs(bias) + np.abs(residual), case)
    max_dy = _channel_max(np.abs(dy), case)
    sum_dy = _channel_sum(np.abs(dy), case)
    sum_dy_xhat = _channel_sum(np.abs(dy * xhat), case)
    name, slope = (
        case.activation if isinstance(case.activation, tuple) else (case.activation, reference.LEAKY_RELU_SLOPE)
    )

    if case.accumulation_dtype == "float32":
        y = 2e-6 * magnitude
        derivative = 2e-6 + CURVATURE[name] * y
        dx = 2e-6 * _channel_max(np.abs(weight) * rstd_each, case) * max_dy
        dweight = 1e-6 * sum_dy_xhat
        dbias = 1e-6 * sum_dy
    else:
        u = UNIT_ROUNDOFF["float64"]
        chain = _longest_chain(case) * u
        # rstd = (variance + eps)^-1/2 errs, relatively, by half of what its argument does.
        rstd_error = _per_element(0.5 * var_bound * rstd**2, case)
        xhat_error = _per_element(mean_bound * rstd, case) + np.abs(xhat) * rstd_error
        # 1.1 is the steepest slope of an activation (SiLU).
        y = _channel_max(1.1 * np.abs(weight) * xhat_error, case) + 8 * u * magnitude
        derivative = 4 * u + CURVATURE[name] * y
        sums = np.zeros(1)
        if case.training:
            # Two means, of g and g*xhat, the second one times xhat; a mask divides by no less than half of n.
            means_error = chain + derivative + _channel_max(xhat_error, case)
            sums = (2 if case.mask else 1) * (1 + np.abs(xhat)) * means_error + xhat_error
        dx = np.abs(weight) * rstd_each * max_dy * (8 * u + derivative + rstd_error + sums)
        dweight = (chain + derivative).ravel() * sum_dy_xhat + _channel_max(xhat_error, case).ravel() * sum_dy
        dbias = (chain + derivative).ravel() * sum_dy
    # Without an activation dresidual is dy itself, with ReLU dy or 0.
    dresidual = np.zeros(1) if name in (None, "relu") else derivative * max_dy

    if name in ("relu", "leaky_relu"):
        kink = np.abs(pre) <= y + UNDERFLOW[case.dtype]
        slack = np.where(kink, abs(1 - slope if name == "leaky_relu" else 1) * np.abs(dy), 0.0)
        dweight = dweight + _channel_sum(slack * np.abs(xhat), case)
        dbias = dbias + _channel_sum(slack, case)
        if case.training:
            count = np.maximum(_counts(case, inputs), 1)[:, None]
            s1 = _per_element(_statistic_sum(np.abs(weight) * slack, case) / count, case)
            s2 = _per_element(_statistic_sum(np.abs(weight * xhat) * slack, case) / count, case)
            dx = dx + rstd_each * (s1 + np.abs(xhat) * s2)
        dx = np.where(kink, np.inf, dx)
        dresidual = np.where(kink, np.inf, dresidual)

    allowed = {
        "y": _stored(case, y, expected.y, case.dtype),
        "mean": mean_bound.reshape(expected.mean.shape),
        "var": var_bound.reshape(expected.rstd.shape),
        "dx": _stored(case, dx, expected.dx, case.dtype),
        "dweight": _stored(case, dweight, expected.dweight, case.gradient_dtype),
        "dbias": _stored(case, dbias, expected.dbias, case.gradient_dtype),
    }
    if expected.dresidual is not None:
        exact = name in (None, "relu")
        allowed["dresidual"] = dresidual if exact else _stored(case, dresidual, expected.dresidual, case.dtype)
    if expected.running_mean is not None and expected.running_var is not None:
        allowed |= _running_bounds(case, inputs, expected, mean_bound, var_bound)
    return {key: np.broadcast_to(bound, _result(case, expected, key).shape) for key, bound in allowed.items()}


def _stored(case: Case, bound: Float64, value: Float64, dtype: str) -> Float64:
    """The bound with the rounding to a dtype below that of the arithmetic."""
    if UNIT_ROUNDOFF[dtype] <= UNIT_ROUNDOFF[case.accumulation_dtype]:
        return bound
    return bound + UNIT_ROUNDOFF[dtype] * (np.abs(value) + bound) + UNDERFLOW[dtype]


def _cell_bounds(case: Case, inputs: Inputs, expected: Outputs) -> dict[str, Float64]:
    """:func:`bounds` for the other norms, by the same count of roundings, on arrays of the shape ``case.cells``.

    A statistic is over several channels, so maxima run over the statistic, and weights stay outside of them where they
    do in the formulas: y depends on its own weight, dx on all those of its statistic. A channel's dweight and dbias run
    across statistics. Each brings its own error of the mean into them, which xhat inherits as ``mean_bound * rstd``
    also where xhat itself is small.

    Weight norm is RMS norm with the weight g/√n.
    """
    samples, groups, share, positions = case.cells
    root = math.sqrt(max(positions, 1)) if case.norm == "weight" else 1.0
    x, dy = _to_cells(_float64(inputs.x), case), _to_cells(_float64(inputs.dy), case)
    weight = np.ones((1, groups, share, 1))
    if inputs.weight is not None:
        weight = _float64(inputs.weight).reshape(weight.shape) / root
    bias = 0.0 * weight if inputs.bias is None else _float64(inputs.bias).reshape(weight.shape)
    rstd = expected.rstd.reshape(samples, groups, 1, 1)
    mean = np.zeros_like(rstd) if expected.mean is None else expected.mean.reshape(rstd.shape)
    mean_bound, var_bound = _statistics_bounds(case, mean, rstd)
    if expected.mean is None:
        mean_bound = np.zeros_like(rstd)

    def most(values: Float64) -> Float64:
        """The maximum over each statistic."""
        maxima: Float64 = np.max(np.broadcast_to(values, case.cells), axis=(2, 3), keepdims=True, initial=0.0)
        return maxima

    def total(values: Float64) -> Float64:
        """The sum over what shares a weight."""
        sums: Float64 = np.sum(np.broadcast_to(values, case.cells), axis=(0, 3))
        return sums.reshape(case.parameter_shape)

    xhat = (x - mean) * rstd
    magnitude = np.abs(weight) * most(np.abs(xhat)) + np.abs(bias)
    max_dy = most(np.abs(dy))
    sum_dy, sum_dy_xhat = total(np.abs(dy)), total(np.abs(dy * xhat))
    if case.accumulation_dtype == "float32":
        xhat_error = mean_bound * rstd
        y, dx = 2e-6 * magnitude, 2e-6 * most(np.abs(weight)) * rstd * max_dy
        dweight, dbias = 1e-6 * sum_dy_xhat, 1e-6 * sum_dy
    else:
        u = UNIT_ROUNDOFF["float64"]
        chain = _longest_chain(case) * u
        rstd_error = 0.5 * var_bound * rstd**2
        xhat_error = mean_bound * rstd + np.abs(xhat) * rstd_error
        y = np.abs(weight) * most(xhat_error) + 8 * u * magnitude
        # Two means, of g and g*xhat, the second one times xhat; a mask divides by fewer than n elements.
        counted = (
            1.0
            if inputs.mask is None
            else share * positions / np.maximum(_counts(case, inputs), 1)[:, None, None, None]
        )
        sums = counted * (1 + np.abs(xhat)) * (chain + most(xhat_error)) + xhat_error
        dx = most(np.abs(weight)) * rstd * max_dy * (8 * u + rstd_error + (sums if case.training else 0.0))
        dweight, dbias = chain * sum_dy_xhat, chain * sum_dy
    dweight = (dweight + total(np.abs(dy) * xhat_error)) / root
    allowed = {
        "y": _stored(case, y, _to_cells(expected.y, case), case.dtype),
        "var": var_bound,
        "dx": _stored(case, dx, _to_cells(expected.dx, case), case.dtype),
    }
    for name in ("y", "dx"):
        allowed[name] = _from_cells(np.broadcast_to(allowed[name], case.cells), case)
    if expected.mean is not None:
        allowed["mean"] = mean_bound
    for name, bound, gradient in (("dweight", dweight, expected.dweight), ("dbias", dbias, expected.dbias)):
        if gradient is not None:
            allowed[name] = _stored(case, bound, gradient, case.gradient_dtype)
    for name in allowed.keys() & {"mean", "var"}:
        allowed[name] = allowed[name].reshape(_result(case, expected, name).shape)
    if expected.running_mean is not None and expected.running_var is not None:
        saved = (samples, groups)
        allowed |= _running_bounds(case, inputs, expected, mean_bound.reshape(saved), var_bound.reshape(saved))
    return {key: np.broadcast_to(bound, _result(case, expected, key).shape) for key, bound in allowed.items()}


def _to_cells(values: Float64, case: Case) -> Float64:
    """An array in x's shape, in that of the cells."""
    if not case.has_lines:
        values = np.moveaxis(values, *_channels_and_samples(case))
    return values.reshape(case.cells)


def _from_cells(values: Array, case: Case) -> Array:
    """And back, for what broadcasts to the cells."""
    full = np.broadcast_to(values, case.cells)
    if case.has_lines:
        return full.reshape(case.shape)
    here, there = _channels_and_samples(case)
    shape = [case.shape[a] for a in here]
    others = [n for a, n in enumerate(case.shape) if a not in here]
    return np.moveaxis(full.reshape(shape + others), there, here)


def _channels_and_samples(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where x has the axes that are not positions, and where the cells have them."""
    axis = case.axis % len(case.shape)
    return ((_samples(case), axis), (0, 1)) if case.has_samples else ((axis,), (0,))


def _mixture_bounds(case: Case, inputs: Inputs, expected: Outputs) -> dict[str, Float64]:
    """:func:`bounds` for switchable norm: errors of the instances' moments and of the sums over an instance, as counted
    there, carried to first order through what float64 computes from them.

    Merging adds the mean of the variances' errors and ``2*|m - mu|`` times those of the means, and rounds a difference
    of means. x is not standardized by a mixture: xhat errs by the error of the mixed mean times rstd, and by half the
    relative error of the mixed variance.
    """
    assert expected.mean is not None
    assert expected.variances is not None
    assert expected.dmean_logits is not None
    assert expected.dvar_logits is not None
    assert expected.dweight is not None
    assert expected.dbias is not None
    _, channels, _, k = case.cells
    unit = UNIT_ROUNDOFF["float64"]
    single = case.accumulation_dtype == "float32"
    sums = 1e-6 if single else _longest_chain(case) * unit
    point = 2e-6 if single else 8 * unit
    few = 32 * unit  # of softmax, mixture and coefficients

    x, dy = _to_cells(_float64(inputs.x), case)[:, :, 0], _to_cells(_float64(inputs.dy), case)[:, :, 0]
    weight = np.ones(channels) if inputs.weight is None else np.abs(_float64(inputs.weight))
    bias = np.zeros(channels) if inputs.bias is None else np.abs(_float64(inputs.bias))
    p, q = (reference._softmax(_float64(a), "") for a in (inputs.mean_logits, inputs.var_logits) if a is not None)
    means, variances, r = expected.mean, expected.variances, expected.rstd
    m, v = means[0], variances[0]

    of_m, of_v = _moments_bounds(case, m, v)
    mean_bounds, var_bounds = [of_m], [of_v]
    for part, over in ((1, 1), (2, 0)):
        if part == 2 and not case.training:
            mean_bounds.append(np.zeros_like(m))
            var_bounds.append(np.zeros_like(m))
            continue
        away = np.abs(m - means[part])
        of_mu = np.mean(of_m, over, keepdims=True) + few * np.max(np.abs(m), over, keepdims=True, initial=0.0)
        spread = np.mean(of_v + 2 * away * (of_m + of_mu) + few * np.abs(m) * away, over, keepdims=True)
        mean_bounds.append(of_mu + 0 * m)
        var_bounds.append(spread + few * variances[part])
    of_means, of_variances = np.array(mean_bounds), np.array(var_bounds)
    mean, variance = np.tensordot(p, means, 1), np.tensordot(q, variances, 1)
    of_mean = np.tensordot(p, of_means, 1) + few * np.tensordot(p, np.abs(means), 1)
    of_variance = np.tensordot(q, of_variances, 1) + few * variance
    rstd_error = 0.5 * of_variance * r**2 + few

    # Of each instance; what varies within one is kept to few sweeps, of |xhat| and |x - m|.
    xhat = (x - mean[:, :, None]) * r[:, :, None]
    largest, largest_dy = (np.max(np.abs(a), axis=2, initial=0.0) for a in (xhat, dy))
    sum_dy, sum_abs_dy = dy.sum(axis=2), np.abs(dy).sum(axis=2)
    xhat_dy = xhat * dy
    sum_xhat_dy, sum_abs_xhat_dy = xhat_dy.sum(axis=2), np.abs(xhat_dy, out=xhat_dy).sum(axis=2)
    xhat = np.abs(xhat, out=xhat)
    fixed = of_mean * r  # xhat errs by that and by |xhat| * rstd_error

    def within(*terms: tuple[Float64, Float64 | None]) -> Float64:
        """The sum of an instance's coefficients, each times what varies within it."""
        found = np.zeros_like(x)
        for coefficient, values in terms:
            found += coefficient[:, :, None] * (1.0 if values is None else values)
        return found

    y = within((weight * fixed + point * (weight * largest + bias), None), (weight * rstd_error, xhat))

    signed = np.ones(channels) if inputs.weight is None else _float64(inputs.weight)
    dmean, dvar = -r * signed * sum_dy, -0.5 * r**2 * signed * sum_xhat_dy
    of_dmean = r * sums * weight * sum_abs_dy + np.abs(dmean) * rstd_error
    sum_errors = fixed * sum_abs_dy + rstd_error * sum_abs_xhat_dy
    of_dvar = 0.5 * r**2 * weight * (sums * sum_abs_xhat_dy + sum_errors) + 2 * np.abs(dvar) * rstd_error
    to_m, to_v = p[0] * dmean, q[0] * dvar
    of_to_m, of_to_v = p[0] * of_dmean, q[0] * of_dvar
    for part, over in ((1, 1), (2, 0))[: 2 if case.training else 1]:
        away, off = m - means[part], of_m + of_means[part] + few * np.abs(m)

        def shared(values: Float64, over: int = over) -> Float64:
            mean_of: Float64 = values.mean(over, keepdims=True) if values.size else values
            return mean_of

        to_m = to_m + p[part] * shared(dmean) + 2 * q[part] * away * shared(dvar)
        to_v = to_v + q[part] * shared(dvar)
        of_to_m = of_to_m + p[part] * shared(of_dmean) + few * p[part] * shared(np.abs(dmean))
        of_to_m = of_to_m + 2 * q[part] * (np.abs(away) * shared(of_dvar) + off * np.abs(shared(dvar)))
        of_to_v = of_to_v + q[part] * shared(of_dvar) + few * q[part] * shared(np.abs(dvar))
    # Through the statistics: to_m + 2 * to_v * (x - m), over k; it rounds with |x - mean| + |mean - m|.
    relative = point + rstd_error
    rounded = np.abs(to_m) + 2 * np.abs(to_v) * np.abs(mean - m)
    shared_error = of_to_m + 2 * np.abs(to_v * of_m) + relative * rounded
    n = max(k, 1)
    dx = within(
        (shared_error / n + relative * r * weight * largest_dy, None),
        (2 * of_to_v / n, np.abs(x - m[:, :, None])),
        (2 * relative * np.abs(to_v) / (r * n), xhat),
    )

    def mixed(
        share: Float64, gradient: Float64, of_gradient: Float64, parts: Float64, mix: Float64, of: Any
    ) -> Float64:
        """The error of share·Σ gradient·(part − mix)."""
        of_parts, of_mix = of
        error = of_gradient * np.abs(parts - mix) + np.abs(gradient) * (of_parts + of_mix)
        found: Float64 = share * np.sum(error + few * np.abs(gradient) * (np.abs(parts) + np.abs(mix)), axis=(1, 2))
        return found

    dweight, dbias = np.sum(sums * sum_abs_xhat_dy + sum_errors, axis=0), sums * np.sum(sum_abs_dy, axis=0)
    dmean_logits = mixed(p, dmean, of_dmean, means, mean, (of_means, of_mean))
    dvar_logits = mixed(q, dvar, of_dvar, variances, variance, (of_variances, of_variance))
    y, dx = (_from_cells(np.broadcast_to(a, x.shape)[:, :, None], case) for a in (y, dx))
    allowed = {
        "y": _stored(case, y, expected.y, case.dtype),
        "mean": of_means,
        "variances": of_variances,
        "var": of_variance + 4 * unit * (variance + case.eps),
        "dx": _stored(case, dx, expected.dx, case.dtype),
        "dweight": _stored(case, dweight, expected.dweight, case.gradient_dtype),
        "dbias": _stored(case, dbias, expected.dbias, case.gradient_dtype),
        "dmean_logits": _stored(case, dmean_logits, expected.dmean_logits, case.param_dtype),
        "dvar_logits": _stored(case, dvar_logits, expected.dvar_logits, case.param_dtype),
    }
    if case.running:
        of_batch = replace(expected, mean=means[2, :1], rstd=1 / np.sqrt(variances[2, :1] + case.eps))
        allowed |= _running_bounds(case, inputs, of_batch, of_means[2, :1], of_variances[2, :1])
    return {key: np.broadcast_to(bound, _result(case, expected, key).shape) for key, bound in allowed.items()}


def _statistics_bounds(case: Case, mean: Float64, rstd: Float64) -> tuple[Float64, Float64]:
    """Bounds for the mean and the variance, in their shape; explained in :func:`bounds`."""
    variance = _variance(case, rstd)
    # The variance is read off rstd = 1/sqrt(variance + eps), which takes a few roundings of float64.
    readout = 4 * UNIT_ROUNDOFF["float64"] * (variance + case.eps)
    if not case.training:
        return np.zeros_like(mean), readout
    mean_bound, var_bound = _moments_bounds(case, mean, variance)
    return mean_bound, var_bound + readout


def _moments_bounds(case: Case, mean: Float64, variance: Float64) -> tuple[Float64, Float64]:
    u = UNIT_ROUNDOFF["float64"]
    sigma = np.sqrt(variance)
    if case.accumulation_dtype == "float32":
        return 1e-6 * (sigma + 1e-6 * np.abs(mean)) + 4 * u * np.abs(mean), 1e-6 * variance
    # Each merge of two chunks rounds a mean, and takes the difference of two that are wrong by u*|mean| into m2.
    merges = case.size / max(case.statistics, 1) / 1024
    chain = _longest_chain(case)
    mean_bound = chain * u * sigma + (6 + merges) * u * np.abs(mean)
    return mean_bound, 2 * chain * u * variance + 4 * u * np.abs(mean) * sigma + (u * mean) ** 2


def _running_bounds(
    case: Case, inputs: Inputs, expected: Outputs, mean_bound: Float64, var_bound: Float64
) -> dict[str, Float64]:
    """A step adds momentum times the statistic's error, and rounds to the stored dtype; float64 arithmetic between.

    Ghost batches take a step each, of whose errors (1 - momentum) is left after the next one. Steps that round only
    once, at the end, are within that as well.
    """
    assert expected.mean is not None
    counts = _counts(case, inputs)
    counts = counts[counts > 1] if case.training else counts[:0]
    # Instance norm's is the average of all; switchable norm's has the samples of a batch.
    steps = 1 if case.has_samples else min(len(counts), 1 / case.momentum)
    if case.norm == "switchable":
        counts = counts.sum(keepdims=True)
    unbiased = float(np.max(counts / (counts - case.correction), initial=1.0))
    u = UNIT_ROUNDOFF[case.param_dtype] + 8 * UNIT_ROUNDOFF["float64"]
    allowed = {}
    for name, old, new, statistic, bound in (
        ("running_mean", inputs.running_mean, expected.running_mean, np.atleast_2d(expected.mean), mean_bound),
        (
            "running_var",
            inputs.running_var,
            expected.running_var,
            unbiased * _variance(case, np.atleast_2d(expected.rstd)),
            unbiased * var_bound,
        ),
    ):
        assert old is not None
        assert new is not None
        largest = np.max(np.abs([_float64(old), new, *statistic]), axis=0)
        error = case.momentum * np.max(bound, axis=0, initial=0.0) + u * largest + UNDERFLOW[case.param_dtype]
        allowed[name] = steps * error
    return allowed


def _float64(array: Array) -> Float64:
    """A float64 copy; of a mask, the mask."""
    return array.copy() if array.dtype == np.bool_ else array.astype(np.float64)


def _result(case: Case, outputs: Outputs, name: str) -> Any:
    if name == "var":
        return 1 / outputs.rstd**2 - case.eps
    return getattr(outputs, name)


def _variance(case: Case, rstd: Float64) -> Float64:
    return np.maximum(1 / rstd**2 - case.eps, 0.0)


def _along(parameter: Float64, case: Case) -> Float64:
    """A (C,) array in a shape that broadcasts over x."""
    shape = [1] * len(case.shape)
    shape[case.axis] = case.channels
    return parameter.reshape(shape)


def _other_axes(case: Case) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(case.shape)) if axis != case.axis % len(case.shape))


def _channel_sum(values: Float64, case: Case) -> Float64:
    sums: Float64 = np.sum(values, axis=_other_axes(case))
    return sums


def _channel_max(values: Float64, case: Case) -> Float64:
    """Maximum over each channel, in a shape that broadcasts over x."""
    full = np.broadcast_to(values, np.broadcast_shapes(values.shape, (1,) * len(case.shape)))
    maxima: Float64 = np.max(full, axis=_other_axes(case), keepdims=True, initial=0.0)
    return maxima


def _samples(case: Case) -> int:
    """The axis that ghost batches divide."""
    return 1 if case.axis % len(case.shape) == 0 else 0


def _ghosts(case: Case) -> list[slice]:
    """Slices of the samples that share statistics."""
    if case.ghost_batch_size is None:
        return [slice(None)]
    samples = case.shape[_samples(case)]
    return [slice(start, start + case.ghost_batch_size) for start in range(0, samples, case.ghost_batch_size)]


def _counts(case: Case, inputs: Inputs) -> NDArray[np.int64]:
    """Elements in each statistic, of ghost batches or of samples."""
    axis = case.axis % len(case.shape)
    counted = np.ones(case.shape[:axis] + case.shape[axis + 1 :]) if inputs.mask is None else inputs.mask
    if case.has_samples:  # a mask's first axis is that of the samples
        return np.array([case.cells[2] * np.count_nonzero(sample) for sample in counted], dtype=np.int64)
    return np.array([np.count_nonzero(counted[ghost]) for ghost in _ghosts(case)], dtype=np.int64)


def _statistic_sum(values: Float64, case: Case) -> Float64:
    """Sums over what shares a statistic, (G, C)."""
    rows = np.moveaxis(values, (_samples(case), case.axis), (0, 1))
    rows = rows.reshape(*rows.shape[:2], -1) if values.size else np.zeros((*rows.shape[:2], 0))
    return np.array([rows[ghost].sum(axis=(0, 2)) for ghost in _ghosts(case)])


def _per_element(statistic: Float64, case: Case) -> Float64:
    """A (G, C) array in a shape that broadcasts over x."""
    if case.ghost_batch_size is None:
        return _along(statistic[0], case)
    samples = _samples(case)
    shape = [1] * len(case.shape)
    shape[samples] = len(statistic)
    shape[case.axis] = case.channels
    ghosts = statistic if samples == 0 else statistic.T
    return np.take(ghosts.reshape(shape), np.arange(case.shape[samples]) // case.ghost_batch_size, axis=samples)


def _longest_chain(case: Case) -> float:
    """Additions that one float64 sum passes through: a chunk of 4096 in the worst order, merges of 1024 or more, and
    the reference's pairwise sum (chains of 16, then log2 n)."""
    elements = max(case.size / max(n, 1) for n in (case.statistics, math.prod(case.parameter_shape)))
    return min(elements, 4096) + elements / 1024 + 32


def _case(shape: tuple[int, ...], axis: int = 1, *, tags: tuple[str, ...] = (), **options: Any) -> Case:
    """A case named after its options, with the tags that follow from its size."""
    case = Case(name="", shape=shape, axis=axis, **options)
    size: tuple[str, ...] = ()
    if "bench" not in tags and case.size > SLOW_ELEMENTS:
        size = ("slow",)
    elif "bench" not in tags and case.size <= SANITIZE_ELEMENTS:
        size = ("sanitize",)
    parts = ["x".join(map(str, shape)), f"axis{axis}", case.dtype]
    for key, value in options.items():
        if key == "dtype":
            continue
        if key == "training":
            parts.append("training" if value else "eval")
        elif key == "activation":
            parts.append(value if isinstance(value, str) else f"{value[0]}{value[1]:g}" if value else "identity")
        elif isinstance(value, bool):
            parts.append(key if value else f"no_{key}")
        elif isinstance(value, float):
            parts.append(f"{key}{value:g}".replace("e+", "e"))
        else:
            parts.append(f"{key}_{value}")
    return replace(case, name="-".join(parts), tags=frozenset({*tags, *size}))


def _layouts(samples: int, channels: int, *spatial: int) -> list[tuple[tuple[int, ...], int]]:
    """(shape, axis) of channels first and channels last."""
    return [((samples, channels, *spatial), 1), ((samples, *spatial, channels), -1)]


DTYPES = ("float32", "float64", "float16", "bfloat16")
ACTIVATIONS: tuple[Activation, ...] = (None, "relu", "leaky_relu", ("leaky_relu", 0.2), "silu", "sigmoid", "tanh")


def _layout_cases() -> list[Case]:
    """Every layout and dtype, with batch and with running statistics."""
    layouts = [
        ((37, 17), 1),
        ((37, 17), -1),
        ((5, 64), 0),
        ((17, 6, 10), 0),
        ((3, 4, 5, 6), 2),
        ((3, 4, 5, 6), -2),
        ((2, 3, 4, 5, 6), 2),
        ((2, 3, 4, 5, 6), 3),
        *_layouts(8, 5, 33),
        *_layouts(4, 17, 7, 9),
        *_layouts(2, 3, 4, 5, 6),
    ]
    return [
        _case(shape, axis, dtype=dtype, training=training, tags=("quick",) if len(shape) in (2, 4) and training else ())
        for (shape, axis), dtype, training in itertools.product(layouts, DTYPES, (True, False))
    ]


def _size_cases() -> list[Case]:
    """Around the widths of vectors, chunks (1024 elements) and tiles (32 chunks); one element more and less."""
    odd = [
        layout
        for channels, pixels in itertools.product((1, 3, 5, 17, 65), (1, 2, 7, 15, 16, 17, 49, 1023, 1025))
        for layout in _layouts(3, channels, pixels)
    ]
    long = [
        layout
        for n in (1023, 1024, 1025, 32767, 32768, 32769)
        for layout in [*_layouts(1, 3, n), *_layouts(2, 1, n), ((n, 5), 1)]
    ]
    wide = [((6, 700), 1), ((3, 2049), 1), *_layouts(4, 513, 7), *_layouts(3, 1025, 2, 3)]
    minimal = [((2, 1), 1), ((2, 3), 1), ((1, 1, 2), 1), ((1, 2, 1, 3), -1), ((3, 2), 0)]
    whole = [((64, 32), 1), ((256, 512), 1), *_layouts(2, 64, 28, 28), *_layouts(8, 32, 7, 7)]
    empty = [((0, 4), 1), ((0, 4, 3), 1), ((3, 4, 0), 1), ((3, 0, 4), -1), ((3, 0, 4), 1)]
    return [
        *[_case(shape, axis) for shape, axis in odd + long + wide],
        *[
            _case(shape, axis, activation="relu", residual=True)
            for shape, axis in _layouts(3, 17, 49) + _layouts(2, 5, 1023) + _layouts(2, 3, 16385) + wide
        ],
        *[_case(shape, axis, dtype=dtype) for (shape, axis), dtype in itertools.product(minimal, DTYPES)],
        *[_case(shape, axis, activation="relu", tags=("quick",)) for shape, axis in whole],
        *[
            _case(shape, axis, activation="relu", training=training)
            for shape, axis in empty
            for training in (True, False)
        ],
        *[_case(shape, axis, activation="relu") for shape, axis in _layouts(32, 64, 32, 32)],
        *[_case(shape, axis, dtype="bfloat16", residual=True) for shape, axis in _layouts(8, 128, 28, 28)],
    ]


def _epilogue_cases() -> list[Case]:
    """Every activation with and without residual, in both layouts and all dtypes; two dtypes in evaluation."""
    epilogues = list(itertools.product(_layouts(4, 5, 49), ACTIVATIONS, (False, True)))
    return [
        *[
            _case(
                shape,
                axis,
                dtype=dtype,
                activation=activation,
                residual=residual,
                tags=("quick",) if residual and dtype == "float32" else (),
            )
            for ((shape, axis), activation, residual), dtype in itertools.product(epilogues, DTYPES)
        ],
        *[
            _case(shape, axis, dtype=dtype, training=False, activation=activation, residual=residual)
            for ((shape, axis), activation, residual), dtype in itertools.product(epilogues, ("float32", "bfloat16"))
        ],
        *[
            _case((33, 65), activation=activation, residual=residual)
            for activation, residual in itertools.product(ACTIVATIONS, (False, True))
        ],
    ]


def _parameter_cases() -> list[Case]:
    """Parameters in another dtype than x, and none; no running statistics."""
    pairs = [
        ("float32", "float64"),
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float16", "float64"),
        ("float64", "float64"),
    ]
    layouts = _layouts(6, 5, 7, 7)
    return [
        *[
            _case(shape, axis, dtype=dtype, param_dtype=param_dtype, activation="relu", training=training)
            for (shape, axis), (dtype, param_dtype), training in itertools.product(layouts, pairs, (True, False))
        ],
        *[
            _case(shape, axis, dtype=dtype, affine=False, training=training)
            for (shape, axis), dtype, training in itertools.product(layouts, DTYPES, (True, False))
        ],
        *[
            _case(shape, axis, affine=affine, running=False, activation="relu", residual=True)
            for (shape, axis), affine in itertools.product(layouts, (True, False))
        ],
    ]


def _ghost_cases() -> list[Case]:
    """Ghost batches that divide the batch, that leave a rest, of one sample, and larger than the batch."""
    layouts = [*_layouts(12, 5, 7), *_layouts(13, 5, 7), *_layouts(6, 33, 5, 5)]
    return [
        *[
            _case(shape, axis, ghost_batch_size=size, tags=("quick",) if size == 4 else ())
            for (shape, axis), size in itertools.product(layouts, (1, 4, 6, 20))
        ],
        *[_case(shape, ghost_batch_size=4) for shape in ((12, 17), (10, 17), (66, 65))],
        *[
            _case(shape, axis, dtype=dtype, ghost_batch_size=4, activation="relu", residual=True)
            for (shape, axis), dtype in itertools.product(_layouts(13, 5, 7), DTYPES)
        ],
        *[
            _case(shape, axis, ghost_batch_size=4, affine=False, running=False, activation="silu")
            for shape, axis in _layouts(13, 5, 7)
        ],
        *[_case(shape, axis, ghost_batch_size=4, training=False) for shape, axis in _layouts(13, 5, 7)],
        *[_case((5, 13, 7), 0, ghost_batch_size=4, activation=activation) for activation in ("relu", "silu")],
        _case((0, 5, 7), ghost_batch_size=4),
    ]


def _correction_cases() -> list[Case]:
    """The running variance over n. A few elements, and a momentum near 1, let it differ from that over n − 1."""
    over_n: dict[str, Any] = {"correction": 0, "momentum": 0.9}
    layouts = [((7, 17), 1), *_layouts(3, 5, 2), *_layouts(2, 33, 3, 3)]
    return [
        *[_case(shape, axis, **over_n, tags=("quick",)) for shape, axis in layouts],
        *[_case(shape, axis, dtype=dtype, **over_n) for (shape, axis), dtype in itertools.product(layouts, DTYPES[1:])],
        *[_case(shape, axis, ghost_batch_size=3, **over_n) for shape, axis in _layouts(8, 5, 2)],
        *[_case(shape, axis, mask=True, **over_n) for shape, axis in _layouts(6, 5, 4)],
    ]


def _mask_cases() -> list[Case]:
    layouts = [((37, 5), 1), *_layouts(6, 5, 17), *_layouts(4, 17, 7, 9), ((17, 6, 10), 0), ((3, 4, 5, 6), 2)]
    return [
        *[
            _case(shape, axis, dtype=dtype, mask=True, tags=("quick",) if dtype == "float32" else ())
            for (shape, axis), dtype in itertools.product(layouts, DTYPES)
        ],
        *[
            _case(shape, axis, mask=True, activation=activation, residual=True)
            for (shape, axis), activation in itertools.product(layouts, ("relu", "silu"))
        ],
        *[_case(shape, axis, mask=True, ghost_batch_size=4, activation="relu") for shape, axis in _layouts(13, 5, 17)],
        *[_case(shape, axis, mask=True, training=False) for shape, axis in _layouts(6, 5, 17)],
        *[
            _case(shape, axis, mask=True, offset=offset, eps=1e-12)
            for shape, axis in _layouts(4, 3, 2050)
            for offset in (3e4, 1e6)
        ],
    ]


def _numerics_cases() -> list[Case]:
    """Means far from 0, outliers, constants, squares that overflow. A small eps lets rstd show the variance."""
    layouts = [*_layouts(8, 3, 65, 65), ((4097, 17), 1)]
    tiny: dict[str, Any] = {"eps": 1e-12}
    return [
        *[
            _case(
                shape,
                axis,
                offset=offset,
                outlier=outlier,
                tags=("quick",) if offset in (3e4, 1e6) and len(shape) == 4 else (),
                **tiny,
            )
            for (shape, axis), offset, outlier in itertools.product(layouts, (0.0, 1e2, 3e3, 3e4, 1e6), (False, True))
        ],
        *[
            _case(shape, axis, offset=offset, outlier=True, activation="relu", residual=True, **tiny)
            for (shape, axis), offset in itertools.product(layouts, (3e3, 1e6))
        ],
        *[
            _case(shape, axis, offset=offset, outlier=True, ghost_batch_size=3, **tiny)
            for (shape, axis), offset in itertools.product(layouts[:2], (3e4, 1e6))
        ],
        *[
            _case(shape, axis, offset=offset, training=False, **tiny)
            for (shape, axis), offset in itertools.product(layouts, (3e4, 1e6))
        ],
        *[_case(shape, axis, offset=1e6, outlier=True, **tiny) for shape, axis in _layouts(32, 2, 256, 128)],
        *[
            _case(shape, axis, dtype="float64", offset=offset, outlier=outlier, **tiny)
            for (shape, axis), offset, outlier in itertools.product(layouts, (1e6, 1e9), (False, True))
        ],
        *[
            _case(shape, axis, dtype=dtype, offset=1e2, outlier=outlier, **tiny)
            for (shape, axis), dtype, outlier in itertools.product(layouts, ("float16", "bfloat16"), (False, True))
        ],
        *[
            _case(shape, axis, dtype=dtype, offset=offset, scale=0.0)
            for (shape, axis), dtype, offset in itertools.product(_layouts(3, 5, 1025), DTYPES, (0.0, 0.1, 3e3))
        ],
        *[
            _case(shape, axis, dtype=dtype, scale=scale, running=False, tags=("quick",))
            for (shape, axis), (dtype, scale) in itertools.product(
                _layouts(3, 5, 1025), (("float32", 1e18), ("float32", 1e25), ("bfloat16", 1e25), ("float16", 4e3))
            )
        ],
    ]


def _line_cases() -> list[Case]:
    """Layer and RMS norm: around the widths of vectors, chunks and panels, few and many lines, all dtypes, far
    means."""

    def line(shape: tuple[int, ...], norm: str, **options: Any) -> Case:
        return _case(shape, norm=norm, running=False, **options)

    norms = ("layer", "rms")
    widths = (1, 2, 7, 16, 33, 64, 65, 127, 1000, 1025, 4097)
    deep = [((3, 4, 65), 1), ((3, 4, 65), 2), ((6, 17, 3, 5), 3), ((5, 3), 2)]
    empty = [((0, 4), 1), ((4, 0), 1), ((2, 0, 3), 2)]
    return [
        *[line((lines, width), norm) for lines, width, norm in itertools.product((1, 5, 37), widths, norms)],
        *[line((1300, 24), norm) for norm in norms],
        *[line((3, 70001), norm, affine=affine) for norm, affine in itertools.product(norms, (True, False))],
        *[line((70, 8221), norm, dtype=dtype) for norm, dtype in itertools.product(norms, DTYPES)],
        *[
            line(shape, norm, normalized=normalized, dtype=dtype, tags=("quick",) if len(shape) == 3 else ())
            for (shape, normalized), norm, dtype in itertools.product(deep, norms, DTYPES)
        ],
        *[
            line((21, 100), norm, dtype=dtype, param_dtype=param_dtype, affine=affine)
            for norm, dtype, param_dtype, affine in itertools.product(norms, DTYPES, DTYPES, (True, False))
            if affine or param_dtype == "float32"
        ],
        *[line(shape, norm, normalized=normalized) for (shape, normalized), norm in itertools.product(empty, norms)],
        *[
            line((9, width), norm, offset=offset, outlier=outlier, eps=1e-12)
            for width, norm, offset, outlier in itertools.product(
                (65, 3001), norms, (0.0, 3e3, 3e4, 1e6), (False, True)
            )
        ],
        *[
            line((9, 3001), norm, dtype="float64", offset=offset, outlier=True, eps=1e-12)
            for norm, offset in itertools.product(norms, (1e6, 1e9))
        ],
        *[
            line((5, 1025), norm, dtype=dtype, offset=offset, scale=0.0)
            for norm, dtype, offset in itertools.product(norms, DTYPES, (0.0, 3e3))
        ],
        *[
            line((5, 1025), norm, dtype=dtype, scale=scale)
            for norm, (dtype, scale) in itertools.product(
                norms, (("float32", 1e18), ("float32", 1e25), ("bfloat16", 1e25))
            )
        ],
    ]


def _sample_cases() -> list[Case]:
    """Instance and group norm: every layout and dtype, one group to as many as channels, masks, running statistics."""

    def group(shape: tuple[int, ...], axis: int, groups: int, **options: Any) -> Case:
        return _case(shape, axis, norm="group", groups=groups, running=False, **options)

    def instance(shape: tuple[int, ...], axis: int, *, running: bool = False, **options: Any) -> Case:
        return _case(shape, axis, norm="instance", running=running, **options)

    layouts = [
        *_layouts(4, 12, 7, 9),
        *_layouts(3, 6, 33),
        *_layouts(2, 6, 3, 4, 5),
        ((6, 5, 4, 3), 0),
        ((3, 4, 6, 5), 2),
        ((2, 3, 6, 4, 5), 2),
    ]
    sizes = [
        layout
        for channels, pixels in itertools.product((1, 2, 16, 33), (2, 7, 16, 49, 1025))
        for layout in _layouts(2, channels, pixels)
    ]
    flat = [((37, 12), 1), ((5, 64), 1), ((1, 6), 1), ((64, 512), 1)]
    large = [
        *_layouts(2, 3, 130, 130),
        *_layouts(3, 256, 14, 14),
        *_layouts(16, 64, 8, 8),
        *_layouts(1, 4, 40_000),
        *_layouts(8, 64, 64, 64),
    ]
    empty = [((0, 4, 3), 1), ((2, 4, 0), 1), ((2, 0, 3, 4), -1), ((2, 0, 4), -1)]
    far = [*_layouts(3, 4, 45, 45), *_layouts(2, 6, 1025)]
    tiny: dict[str, Any] = {"eps": 1e-12}
    offsets = list(itertools.product((0.0, 3e3, 3e4, 1e6), (False, True)))
    return [
        *[
            make(shape, axis, dtype=dtype, tags=("quick",) if len(shape) == 4 else ())
            for (shape, axis), dtype in itertools.product(layouts, DTYPES)
            for make in (instance, partial(group, groups=3))
        ],
        *[
            instance(shape, axis, dtype=dtype, training=training, running=True, affine=affine)
            for (shape, axis), dtype, training, affine in itertools.product(
                layouts[:4], DTYPES, (True, False), (True, False)
            )
        ],
        *[group(shape, axis, groups) for (shape, axis), groups in itertools.product(layouts, (1, 2, 6))],
        *[instance(shape, axis) for shape, axis in sizes + large],
        *[
            group(shape, axis, groups)
            for shape, axis in sizes + large + flat
            for groups in sorted({1, 2, 4, shape[axis] // 2, shape[axis]})
            if groups and shape[axis] % groups == 0
        ],
        *[group(shape, axis, 1) for shape, axis in _layouts(3, 5, 1)],
        *[
            make(shape, axis, dtype=dtype, param_dtype=param_dtype)
            for (shape, axis), (dtype, param_dtype) in itertools.product(
                layouts[:2], [("float32", "float64"), ("bfloat16", "bfloat16"), ("float16", "float64")]
            )
            for make in (instance, partial(group, groups=4))
        ],
        *[
            make(shape, axis, dtype=dtype, affine=False)
            for (shape, axis), dtype in itertools.product(layouts[:2], DTYPES)
            for make in (instance, partial(group, groups=4))
        ],
        *[
            make(shape, axis, dtype=dtype, mask=True, tags=("quick",) if dtype == "float32" else ())
            for (shape, axis), dtype in itertools.product(layouts, DTYPES)
            for make in (partial(instance, running=True), partial(group, groups=2))
        ],
        *[group((37, 12), 1, 3, mask=True)],
        *[
            make(shape, axis)
            for shape, axis in empty
            for make in (partial(instance, running=True), partial(group, groups=2))
        ],
        *[
            make(shape, axis, offset=offset, outlier=outlier, **tiny)
            for (shape, axis), (offset, outlier) in itertools.product(far, offsets)
            for make in (partial(instance, running=True), partial(group, groups=2))
        ],
        *[
            make(shape, axis, dtype="float64", offset=offset, outlier=True, **tiny)
            for (shape, axis), offset in itertools.product(far, (1e6, 1e9))
            for make in (instance, partial(group, groups=2))
        ],
        *[
            make(shape, axis, mask=True, offset=1e6, **tiny)
            for shape, axis in far
            for make in (instance, partial(group, groups=2))
        ],
        *[
            make(shape, axis, dtype=dtype, offset=offset, scale=0.0)
            for (shape, axis), dtype, offset in itertools.product(_layouts(2, 4, 1025), DTYPES, (0.0, 3e3))
            for make in (instance, partial(group, groups=2))
        ],
        *[
            make(shape, axis, dtype=dtype, scale=scale)
            for (shape, axis), (dtype, scale) in itertools.product(
                _layouts(2, 4, 1025), (("float32", 1e18), ("float32", 1e25), ("bfloat16", 1e25))
            )
            for make in (instance, partial(group, groups=2))
        ],
    ]


def _switchable_cases() -> list[Case]:
    """Switchable norm: layouts and dtypes in training and evaluation, parameters, far means, outliers, one sample, one
    channel, one position."""

    def switchable(shape: tuple[int, ...], axis: int, **options: Any) -> Case:
        return _case(shape, axis, norm="switchable", **options)

    layouts = [*_layouts(4, 6, 7, 9), *_layouts(3, 5, 33), *_layouts(2, 3, 4, 5, 6), ((6, 5, 4, 3), 0), ((37, 17), 1)]
    few = [
        *_layouts(1, 6, 17),
        *_layouts(5, 1, 17),
        ((5, 6, 1), 1),
        ((1, 1, 2), 1),
        *_layouts(2, 3, 130, 130),
        *_layouts(8, 64, 64, 64),
    ]
    far = _layouts(3, 4, 45, 45)
    return [
        *[
            switchable(shape, axis, dtype=dtype, training=training, tags=("quick",) if len(shape) == 4 else ())
            for (shape, axis), dtype, training in itertools.product(layouts, DTYPES, (True, False))
        ],
        *[
            switchable(shape, axis, training=training)
            for (shape, axis), training in itertools.product(few, (True, False))
        ],
        *[
            switchable(shape, axis, dtype=dtype, param_dtype=param_dtype)
            for (shape, axis), (dtype, param_dtype) in itertools.product(
                layouts[:2], [("float32", "float64"), ("bfloat16", "bfloat16"), ("float16", "float16")]
            )
        ],
        *[
            switchable(shape, axis, dtype=dtype, affine=False, running=False)
            for (shape, axis), dtype in itertools.product(layouts[:2], DTYPES)
        ],
        *[
            switchable(shape, axis, offset=offset, outlier=outlier, training=training)
            for (shape, axis), offset, outlier, training in itertools.product(
                far, (0.0, 3e3, 1e6), (False, True), (True, False)
            )
        ],
        *[
            switchable(shape, axis, dtype="float64", offset=offset, outlier=True)
            for (shape, axis), offset in itertools.product(far, (1e6, 1e9))
        ],
        *[
            switchable(shape, axis, dtype=dtype, offset=offset, scale=0.0)
            for (shape, axis), dtype, offset in itertools.product(_layouts(2, 4, 1025), DTYPES, (0.0, 3e3))
        ],
        *[switchable(shape, axis, running=False) for shape, axis in [((2, 4, 0), 1), ((2, 0, 3, 4), -1)]],
    ]


def _weight_cases() -> list[Case]:
    """Weight norm over every axis: matrices, convolutions of both layouts, far means, tiny and huge weights."""

    def weight(shape: tuple[int, ...], dim: int, **options: Any) -> Case:
        return _case(shape, dim, norm="weight", running=False, eps=0.0, **options)

    shapes = [
        (7, 5),
        (64, 33),
        (16, 8, 3, 3),
        (3, 3, 8, 16),
        (2, 3, 4, 5, 6),
        (5,),
        (1, 1),
        (300, 700),
        (3, 70001),
        (1024, 1031),
    ]
    return [
        *[
            weight(shape, dim, dtype=dtype, tags=("quick",) if len(shape) == 4 else ())
            for shape in shapes
            for dim, dtype in itertools.product(range(-1, len(shape) - 1), DTYPES)
        ],
        *[
            weight((16, 8, 3, 3), dim, dtype=dtype, param_dtype=param_dtype)
            for dim, dtype, param_dtype in itertools.product((0, 1), DTYPES, DTYPES)
        ],
        *[
            weight((9, 3001), dim, dtype=dtype, offset=offset, outlier=outlier)
            for dim, dtype, offset, outlier in itertools.product(
                (0, 1), ("float32", "float64"), (0.0, 3e4, 1e6), (False, True)
            )
        ],
        *[
            weight((5, 1025), dim, dtype=dtype, scale=scale)
            for dim, (dtype, scale) in itertools.product(
                (0, 1),
                (("float32", 1e-15), ("float32", 1e18), ("float32", 1e25), ("bfloat16", 1e25), ("float64", 1e90)),
            )
        ],
        weight((0, 3), 0),
    ]


# Channels and side of ResNet-50's batch norms.
RESNET = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))


def _bench_cases() -> list[Case]:
    """ResNet-50's layers at 32 images, small calls, and odd ones; training and evaluation, forward and backward. Ghost
    batches. The other norms."""
    resnet = [layout for channels, side in RESNET for layout in _layouts(32, channels, side, side)]
    flat: list[tuple[tuple[int, ...], int]] = [((4096, 1024), 1), ((256, 512), 1), ((64, 32), 1)]
    odd = [*_layouts(32, 3, 224, 224), *_layouts(32, 65, 56, 56)]
    quick = [*flat, *_layouts(32, 512, 7, 7), *_layouts(32, 256, 14, 14)]
    plain = [
        _case(
            shape, axis, dtype=dtype, training=training, tags=("bench", *(("quick",) if (shape, axis) in quick else ()))
        )
        for (shape, axis), dtype, training in itertools.product(
            resnet + flat + odd, ("float32", "bfloat16"), (True, False)
        )
    ]
    fused = [
        _case(shape, axis, dtype=dtype, training=training, activation="relu", residual=residual, tags=("bench",))
        for (shape, axis), dtype, training, residual in itertools.product(
            [*_layouts(32, 64, 112, 112), *_layouts(32, 256, 56, 56), *_layouts(32, 1024, 14, 14)],
            ("float32", "bfloat16"),
            (True, False),
            (False, True),
        )
    ]
    ghosts = [((256, 512), 1), *_layouts(32, 256, 14, 14), *_layouts(32, 256, 56, 56)]
    lines = [(32768, 1024), (8192, 4096), (65536, 256), (1024, 32768), (4096, 768), (256, 1024), (64, 512)]
    images = [
        *_layouts(32, 64, 112, 112),
        *_layouts(32, 256, 56, 56),
        *_layouts(32, 1024, 14, 14),
        *_layouts(8, 256, 14, 14),
        *_layouts(2, 64, 8, 8),
    ]
    by_sample: list[dict[str, Any]] = [
        {"norm": "instance", "running": False},
        {"norm": "group", "groups": 32, "running": False},
        {"norm": "switchable"},
    ]
    weights = [(8192, 2048), (2048, 512, 3, 3), (512, 512, 3, 3), (64, 64, 3, 3)]
    return [
        *plain,
        *fused,
        *[
            _case(*layout, dtype=dtype, ghost_batch_size=8, tags=("bench", *(("quick",) if layout in quick else ())))
            for layout, dtype in itertools.product(ghosts, ("float32", "bfloat16"))
        ],
        *[
            _case(
                shape, norm=norm, dtype=dtype, running=False, tags=("bench", *(("quick",) if shape[0] < 8192 else ()))
            )
            for shape, norm, dtype in itertools.product(lines, ("layer", "rms"), ("float32", "bfloat16"))
        ],
        *[
            _case(shape, axis, dtype=dtype, tags=("bench", *(("quick",) if shape[0] < 32 else ())), **norm)
            for norm, (shape, axis), dtype in itertools.product(by_sample, images, ("float32", "bfloat16"))
        ],
        *[
            _case(
                shape,
                0,
                norm="weight",
                dtype=dtype,
                running=False,
                eps=0.0,
                tags=("bench", *(("quick",) if shape[0] < 2048 else ())),
            )
            for shape, dtype in itertools.product(weights, ("float32", "bfloat16"))
        ],
    ]


def _bench_cuda_cases() -> list[Case]:
    """Batch norm: ResNet-50's layers at 32 and at 256 images, (N, C), few channels in large volumes, a small call,
    ghost batches. Layer and RMS norm: lines of 256 to 65,536 numbers, 256 MiB together, and a small call. Instance and
    group norm: two of ResNet-50's layers at 32 images, and a small call."""
    small = _layouts(8, 64, 7, 7)
    resnet = [
        layout for batch in (32, 256) for channels, side in RESNET for layout in _layouts(batch, channels, side, side)
    ]
    flat: list[tuple[tuple[int, ...], int]] = [((65536, 1024), 1), ((4096, 128, 1, 1), 1)]
    volumes = [*_layouts(4, 3, 96, 192, 192), *_layouts(4, 4, 96, 192, 192)]
    quick = [*small, *_layouts(32, 512, 7, 7), *_layouts(32, 256, 14, 14), *flat[1:]]
    compiled = [*_layouts(32, 256, 56, 56), *_layouts(256, 64, 112, 112), *flat[:1]]

    def tags(layout: tuple[tuple[int, ...], int], dtype: str) -> tuple[str, ...]:
        found = {"quick": layout in quick, "compile": layout in compiled and dtype != "float16"}
        return ("bench", *(tag for tag, is_so in found.items() if is_so))

    plain = [
        _case(*layout, dtype=dtype, training=training, tags=tags(layout, dtype))
        for layout, dtype, training in itertools.product(
            [*small, *flat, *volumes, *resnet], ("bfloat16", "float16", "float32"), (True, False)
        )
    ]
    fused = [
        _case(*layout, dtype="bfloat16", training=training, activation="relu", residual=True, tags=("bench",))
        for layout, training in itertools.product(
            [*_layouts(32, 256, 56, 56), *_layouts(32, 1024, 14, 14)], (True, False)
        )
    ]
    ghosts = [
        _case(*layout, dtype=dtype, ghost_batch_size=32, tags=("bench",))
        for layout, dtype in itertools.product(_layouts(256, 256, 14, 14), ("bfloat16", "float32"))
    ]
    family: list[Case] = []
    for dtype, bytes_ in (("bfloat16", 2), ("float32", 4)):
        wide = [(2**28 // bytes_ // width, width) for width in (256, 1024, 4096, 16384, 65536)]
        family += [
            _case(shape, norm=norm, dtype=dtype, running=False, tags=("bench", tag) if tag else ("bench",))
            for norm in ("layer", "rms")
            for shape, tag in [
                ((2048, 1024), "quick"),
                *((s, "compile" if s[1] in (1024, 16384) else "") for s in wide),
            ]
        ]
        by_sample: list[dict[str, Any]] = [{"norm": "instance"}, {"norm": "group", "groups": 32}]
        images = [(8, 256, 14, 14), (32, 256, 56, 56), (32, 64, 112, 112)]
        family += [
            _case(*layout, dtype=dtype, running=False, tags=("bench", tag) if tag else ("bench",), **norm)
            for norm, (image, tag) in itertools.product(by_sample, zip(images, ("quick", "compile", ""), strict=True))
            for layout in _layouts(*image)
        ]
    return plain + fused + ghosts + family


CASES: tuple[Case, ...] = (
    *_layout_cases(),
    *_size_cases(),
    *_epilogue_cases(),
    *_parameter_cases(),
    *_ghost_cases(),
    *_correction_cases(),
    *_mask_cases(),
    *_numerics_cases(),
    *_line_cases(),
    *_sample_cases(),
    *_switchable_cases(),
    *_weight_cases(),
)
BENCH: tuple[Case, ...] = tuple(_bench_cases())
BENCH_CUDA: tuple[Case, ...] = tuple(_bench_cuda_cases())
