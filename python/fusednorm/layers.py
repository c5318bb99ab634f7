"""The norms as layers: parameters, running statistics and the state between forward and backward."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from fusednorm import arrays, conventions, distributed, functional
from fusednorm.arrays import Array
from fusednorm.functional import Activation

_L = TypeVar("_L", bound="_Layer")

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "SwitchableNorm", "WeightNorm"]


def _dtype(dtype: Any) -> np.dtype[Any]:
    """A parameter's dtype; "bfloat16" needs ml_dtypes, which gives NumPy the type."""
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(dtype)
    if not arrays.is_floating(found):
        raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, not {found}")
    return found


def _array(value: Any, name: str) -> Array:
    """What is copied into a parameter: an array of a GPU as it is, all else as NumPy takes it."""
    return arrays.taken(value, name) if arrays.is_of_a_gpu(value) else np.asarray(value)


def _own(name: str) -> property:
    """One of a layer's arrays; assigning copies into it."""
    return property(lambda layer: getattr(layer, "_" + name), lambda layer, value: layer._assign(name, value))


class _Layer:
    """Arrays under PyTorch's names on one device, and what a call saves for its backward."""

    _norm: ClassVar[str]  # in the table of conventions
    _arrays: ClassVar[tuple[str, ...]] = ("weight", "bias")
    _gradients: ClassVar[tuple[str, ...]] = ("weight_grad", "bias_grad")

    weight_grad: Array | None
    bias_grad: Array | None
    _weight: Array | None = None
    _bias: Array | None = None

    def __init__(self, device: str, **initial: Array | None) -> None:
        self.device = "cpu"
        self.training = True
        for name in self._gradients:
            setattr(self, name, None)
        for name in self._arrays:
            setattr(self, "_" + name, initial[name])
        self._saved = threading.local()
        self.to(device)

    @classmethod
    def from_convention(cls: type[_L], convention: str, *sizes: Any, **options: Any) -> _L:
        """The layer with the defaults of another library: "torch", "keras", "flax", "onnx", "chainer", "caffe" or
        "mxnet"; see :mod:`fusednorm.conventions`. `sizes` and `options` are the constructor's, and come before those.
        ValueError where the library has no such norm.
        """
        return cls(*sizes, **conventions.options(convention, cls._norm, options))

    def _assign(self, name: str, value: Any) -> None:
        own = getattr(self, "_" + name)
        if own is None:
            raise AttributeError(f"this layer has no {name}")
        value = _array(value, name)
        if value.shape != own.shape:
            raise ValueError(f"{name} should contain {own.size} elements not {value.size}")
        value = arrays.moved(value, self.device)
        with arrays.on(self.device):
            own[...] = value

    weight = _own("weight")
    bias = _own("bias")

    def _here(self, x: Array) -> Array:
        """x as NumPy's or CuPy's; TypeError where it is not on the layer's device."""
        if type(x) is not np.ndarray or self.device != "cpu":
            x = arrays.taken(x, "x")
            arrays.expect_on(self.device, x, "layer")
        return x

    def _keep(self, out: Array | None, *call: Any) -> None:
        """Of a call what its backward needs: nothing where `out` took the place of an array of it."""
        if out is None or not arrays.shares(out, tuple(a for a in call if isinstance(a, type(out)))):
            self._saved.call = call

    def _last_call(self) -> Any:
        saved = getattr(self._saved, "call", None)
        if saved is None:
            raise RuntimeError(
                "backward needs a call of the layer before it that did not fail or write over its input (out=x); each "
                "call's state serves one backward"
            )
        return saved

    def train(self: _L, mode: bool = True) -> _L:
        """Training mode, or evaluation where `mode` is False. Returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self: _L) -> _L:
        """Evaluation mode: running statistics are used and stay as they are. Returns the layer."""
        return self.train(False)

    def to(self: _L, device: str) -> _L:
        """The layer, after its arrays were moved to `device`; raises as the constructor. A graph that was captured with
        the layer keeps using the arrays of before.
        """
        device = arrays.checked_device(device)
        names = (*("_" + name for name in self._arrays), *self._gradients)
        there = {name: getattr(self, name) for name in names}
        there = {name: None if a is None else arrays.moved(a, device) for name, a in there.items()}
        self.__dict__.update(there, device=device)
        return self

    def _state(self) -> dict[str, Array | None]:
        return {name: getattr(self, "_" + name) for name in self._arrays}

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and statistics under PyTorch's names, on the layer's device."""
        with arrays.on(self.device):
            return {name: value.copy() for name, value in self._state().items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in, from any device, after all of it was checked. `num_batches_tracked` may be missing.

        Raises KeyError for missing or unexpected names, ValueError for sizes.
        """
        own = self.state_dict()
        missing = [name for name in own if name not in state and name != "num_batches_tracked"]
        unexpected = [name for name in state if name not in own]
        if missing:
            raise KeyError(f"Missing key(s) in state_dict: {', '.join(missing)}")
        if unexpected:
            raise KeyError(f"Unexpected key(s) in state_dict: {', '.join(unexpected)}")
        values = {name: _array(value, name) for name, value in state.items()}
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise ValueError(f"size mismatch for {name}: expected {own[name].shape}, got {value.shape}")
            if value.dtype.kind not in "fiu" and value.dtype.name != "bfloat16":
                raise ValueError(f"{name} must be numbers, got dtype {value.dtype}")
        if not math.isfinite(values.get("num_batches_tracked", 0)):
            raise ValueError("num_batches_tracked must be a finite number")
        for name, value in values.items():
            self._assign(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_saved", "_estimate")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._saved = threading.local()


class _Running(_Layer):
    """A layer whose channels have running statistics."""

    _arrays: ClassVar[tuple[str, ...]] = ("weight", "bias", "running_mean", "running_var")
    _running_mean: Array | None
    _running_var: Array | None
    _debiased = False  # of the running statistics, which are the batches' weighted mean alone then
    _estimate: Any = None  # while a Population runs: what takes the moments in, in place of the running statistics

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        axis: int,
        dtype: Any,
        device: str,
        **others: Array,
    ) -> None:
        kind = _dtype(dtype)
        if momentum is not None and not isinstance(momentum, float | int | np.number):
            raise TypeError(f"momentum must be a number or None, not {momentum!r}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.num_batches_tracked = 0
        super().__init__(
            device,
            weight=np.ones(num_features, kind) if affine else None,
            bias=np.zeros(num_features, kind) if affine else None,
            running_mean=np.zeros(num_features, kind) if track_running_stats else None,
            running_var=np.ones(num_features, kind) if track_running_stats else None,
            **others,
        )

    def _assign(self, name: str, value: Any) -> None:
        if name == "num_batches_tracked":
            self.num_batches_tracked = int(value)
        else:
            super()._assign(name, value)

    running_mean = _own("running_mean")
    running_var = _own("running_var")

    def _weighing(self) -> tuple[float, int]:
        """Momentum and the count of batches as the functions take them; for a cumulative average none and the count."""
        if self.momentum is None or (self._debiased and self.momentum == 0):
            return 0.0, self.num_batches_tracked
        if self._debiased and self.momentum < 1:
            # The k-th batch weighs 1, the one before 1 − momentum, …: (1 − (1 − momentum)^k)/momentum all of them.
            left = (self.num_batches_tracked + 1) * math.log1p(-self.momentum)
            return self.momentum / -math.expm1(left), -1
        return self.momentum, -1

    def _state(self) -> dict[str, Array | None]:
        tracked = np.asarray(self.num_batches_tracked, np.int64) if self.track_running_stats else None
        return {**super()._state(), "num_batches_tracked": tracked}


class BatchNorm(_Running):
    """Batch normalization over every axis but one (Ioffe & Szegedy 2015), with PyTorch's conventions.

    ``y = act((x − mean)/√(variance + eps)·weight + bias + residual)``. A layer starts in training mode, where mean and
    variance are the batch's and update the running ones; after :meth:`eval` the running ones are used.

    Parameters
    ----------
    num_features : int
        C, the length of `axis`.
    eps : float
        Added to the variance under the root. All defaults are PyTorch's.
    momentum : float or None
        Weight of the new value in the running statistics; None: all batches weigh the same, a cumulative average.
    affine : bool
        Whether there are a weight (ones) and a bias (zeros).
    track_running_stats : bool
        False: no running statistics; the batch's are used in evaluation too.
    axis : int
        The axis that is kept; -1 for channels last.
    activation, ghost_batch_size, correction
        As in :func:`fusednorm.batch_norm_forward`.
    dtype : float32, float64, float16 or bfloat16
        Of parameters and running statistics, whatever x's is; float32 unless given.
    device : "cpu", "cuda" or "cuda:0", "cuda:1", …
        Where x and the layer's arrays are: NumPy's on the CPU, CuPy's on a GPU. RuntimeError, with the reason, where
        there is no such device.
    process_group : optional
        Whose processes share the statistics of training: an mpi4py communicator, or another of those that
        :mod:`fusednorm.distributed` names. Every rank has such a layer and calls it, with its part of the batch, and
        its :meth:`backward`, each time the others do; weight_grad and bias_grad are sums over that part. With
        `ghost_batch_size`, the k-th ghost batches of all ranks are one. Evaluation takes no part.

    Attributes
    ----------
    weight, bias, running_mean, running_var : (num_features,) arrays or None
        Optimizers write into them in place; assigning copies into them.
    weight_grad, bias_grad : arrays or None
        Set by :meth:`backward`, in the parameter's dtype.
    num_batches_tracked : int
        Batches (ghost batches, where there are) that the running statistics have seen.
    training : bool
        Whether the layer is in training mode; :meth:`train` and :meth:`eval` set it.
    process_group
        As given, or None. Assigning one, or None, makes the layer another group's, or its own process's.

    Raises
    ------
    TypeError
        A dtype that is none of the four, a momentum that is no number, a process_group that is none.
    ValueError
        An unknown activation, a ghost_batch_size below 1, a correction other than 0 and 1, a device of another name.
    RuntimeError
        A device that is not there, with the reason.

    Notes
    -----
    A call keeps references to x and residual, and the gradients are those of x as it is when :meth:`backward` runs: do
    not write to x in between. What is kept belongs to the calling thread, and is neither copied nor pickled. Several
    threads may evaluate one layer at once; training from several needs the caller's lock.

    A copy, and what was pickled, has no process_group: assign it, on every rank.
    """

    _norm: ClassVar[str] = "batch"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        activation: Activation = None,
        ghost_batch_size: int | None = None,
        correction: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
        process_group: Any = None,
    ) -> None:
        functional._activation(activation)
        functional._check_ghosts(ghost_batch_size)
        functional._check_correction(correction)
        self.activation = activation
        self.ghost_batch_size = ghost_batch_size
        self.correction = correction
        super().__init__(num_features, eps, momentum, affine, track_running_stats, axis, dtype, device)
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        return None if self._sync is None else self._sync.given

    @process_group.setter
    def process_group(self, given: Any) -> None:
        self._sync = None if given is None else distributed.Sync(given, self.num_features)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_sync": None}

    @classmethod
    def from_convention(
        cls,
        convention: str,
        num_features: int,
        *,
        scale: bool | None = None,
        center: bool | None = None,
        **options: Any,
    ) -> BatchNorm:
        """A layer with the defaults and the meaning of another library, by :data:`fusednorm.conventions.CONVENTIONS`.

        Trained on the same batches it gives the same running statistics and outputs.
        :func:`fusednorm.conventions.to_pytorch` makes that library's state one that :meth:`load_state_dict` takes.

        Parameters
        ----------
        convention : "torch", "keras", "flax", "onnx", "chainer", "caffe" or "mxnet"
            The library.
        num_features : int
            C, the length of `axis`.
        scale : bool, optional
            Whether there is a weight. False by default for MXNet, which is its ``fix_gamma=True``, and for Caffe, which
            has a Scale layer for it; else True.
        center : bool, optional
            Whether there is a bias. False by default for Caffe, else True.
        **options
            The constructor's but for affine. `momentum` is meant as that library means it: mostly the weight of the old
            value.
        """
        row = conventions.named(convention)
        scale, center = row.scale if scale is None else scale, row.center if center is None else center
        if row.debiased and options.get("ghost_batch_size") is not None:
            raise ValueError(f"{row.library} has no ghost batches: its first batches weigh more, by their number")
        layer = cls(num_features, affine=scale or center, **conventions.options(convention, cls._norm, options))
        layer._debiased = row.debiased
        if not scale:
            layer._weight = None
        if not center:
            layer._bias = None
        return layer

    def __call__(
        self, x: Array, residual: Array | None = None, mask: Array | None = None, *, out: Array | None = None
    ) -> Array:
        """y for x of shape (N, C), (N, C, *spatial) or with C at `axis`; raises as :func:`batch_norm_forward`, and in
        a process group as :func:`fusednorm.distributed.forward`."""
        self._saved.call = None
        estimate = self._estimate
        training, tracked = self.training, self.track_running_stats and estimate is None
        momentum, counted = self._weighing()
        if self._sync is not None and training and estimate is None:
            y, call = distributed.forward(
                self._sync, x, self._weight, self._bias, self._running_mean, self._running_var, momentum, counted,
                self.eps, self.axis, residual, self.activation, self.ghost_batch_size, mask, self.correction, out,
                self.device,
            )  # fmt: skip
            if tracked:
                self.num_batches_tracked += call.batches
            self._keep(out, x, call, None, True, residual, mask)
            return y
        x = self._here(x)
        moments = None if estimate is None else functional._batch_moments(x, self.axis, self.ghost_batch_size, mask)
        batch_statistics = training or not tracked
        y, mean, rstd = functional._forward(
            x,
            functional._batch,
            (self.axis, self.ghost_batch_size),
            self._weight,
            self._bias,
            self.eps,
            out,
            self._running_mean if estimate is None else None,
            self._running_var if estimate is None else None,
            batch_statistics,
            momentum,
            counted,
            residual,
            self.activation,
            mask,
            correction=self.correction,
        )
        if training and tracked and y.size:
            self.num_batches_tracked += 1 if mean.ndim == 1 else mean.shape[0]
        if moments is not None:
            estimate.add(*moments)
        self._keep(out, x, mean, rstd, batch_statistics, residual, mask)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Any:
        """dx, or (dx, dresidual) if the last call of this thread had a residual; sets weight_grad and bias_grad.

        Raises RuntimeError where there was no call since the last backward; in a process group as
        :func:`fusednorm.distributed.backward`.
        """
        x, mean, rstd, batch_statistics, residual, mask = self._last_call()
        dresidual: tuple[Array, ...] | list[Array]
        if isinstance(mean, distributed.Call):
            dx, dweight, dbias, of_residual = distributed.backward(
                mean, dy, x, self._weight, self._bias, self.axis, residual, self.activation, self.ghost_batch_size,
                mask, out,
            )  # fmt: skip
            dresidual = () if of_residual is None else (of_residual,)
        else:
            dx, dweight, dbias, *dresidual = functional.batch_norm_backward(
                dy,
                x,
                mean,
                rstd,
                self._weight,
                self._bias,
                training=batch_statistics,
                axis=self.axis,
                residual=residual,
                activation=self.activation,
                ghost_batch_size=self.ghost_batch_size,
                mask=mask,
                out=out,
            )
        self._saved.call = None
        self.weight_grad = None if self._weight is None else dweight
        self.bias_grad = None if self._bias is None else dbias
        return (dx, *dresidual) if dresidual else dx

    def scale_shift(self) -> tuple[Array, Array]:
        """Evaluation as one scale and one shift a channel: ``y = x·scale + shift`` (before residual and activation).

        For folding into the layer before: multiply its output channels' weights by scale, its bias too, and add shift.
        float64, (C,), on the layer's device. RuntimeError without running statistics.
        """
        if self._running_mean is None or self._running_var is None:
            raise RuntimeError("scale_shift needs running statistics; this layer has track_running_stats=False")
        with arrays.on(self.device):
            scale = 1 / np.sqrt(self._running_var.astype(np.float64) + self.eps)
            if self._weight is not None:
                scale = scale * self._weight.astype(np.float64)
            shift = -self._running_mean.astype(np.float64) * scale
            if self._bias is not None:
                shift = shift + self._bias.astype(np.float64)
        return scale, shift

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis}, activation={self.activation!r}, "
            f"ghost_batch_size={self.ghost_batch_size}, correction={self.correction})"
        )


class InstanceNorm(_Running):
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016), each channel of each sample by itself:
    ``y = (x − mean)/√(variance + eps)·weight + bias``, with PyTorch's conventions and defaults.

    With running statistics, which take in the samples' average, these are used after :meth:`eval`; without, training
    and evaluation are the same.

    Parameters
    ----------
    num_features, eps, momentum, axis, dtype, device
        As in :class:`BatchNorm`.
    affine : bool
        Whether there are a weight (ones) and a bias (zeros).
    track_running_stats : bool
        Whether there are running statistics.

    Raises
    ------
    TypeError
        A dtype that is none of the four, a momentum that is no number.
    RuntimeError
        A device that is not there, with the reason.

    Notes
    -----
    Attributes and what a call keeps are those of :class:`BatchNorm`.
    """

    _norm: ClassVar[str] = "instance"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        axis: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, axis, dtype, device)

    def __call__(self, x: Array, mask: Array | None = None, *, out: Array | None = None) -> Array:
        """y for x of shape (N, C, *spatial) or with C at `axis`; raises as :func:`instance_norm_forward`."""
        self._saved.call = None
        x = self._here(x)
        own = self.training or not self.track_running_stats
        y, mean, rstd = functional._forward(
            x,
            functional._instance,
            (self.axis,),
            self._weight,
            self._bias,
            self.eps,
            out,
            self._running_mean,
            self._running_var,
            own,
            *self._weighing(),
            mask=mask,
            averaged=True,
        )
        if own and self.track_running_stats and y.size:
            self.num_batches_tracked += 1
        self._keep(out, x, mean, rstd, own, mask)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx; sets weight_grad and bias_grad. RuntimeError where there was no call since the last backward."""
        x, mean, rstd, own, mask = self._last_call()
        dx, dweight, dbias = functional.instance_norm_backward(
            dy, x, mean, rstd, self._weight, self._bias, use_input_stats=own, axis=self.axis, mask=mask, out=out
        )
        self._saved.call = None
        if self.affine:
            self.weight_grad, self.bias_grad = dweight, dbias
        return dx

    def __repr__(self) -> str:
        return (
            f"InstanceNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis})"
        )


class GroupNorm(_Layer):
    """Group normalization (Wu & He 2018): ``y = (x − mean)·rstd·weight + bias``, statistics over groups of channels.

    Parameters
    ----------
    num_groups : int
        Groups of ``num_channels / num_groups`` consecutive channels; each has statistics of its own, in each sample.
    num_channels : int
        C, the length of `axis`.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a weight (ones) and a bias (zeros) for each channel.
    axis, dtype, device
        As in :class:`BatchNorm`.

    Raises
    ------
    ValueError
        A `num_channels` that is not divisible by `num_groups`.
    TypeError
        A dtype that is none of the four.
    RuntimeError
        A device that is not there, with the reason.

    Notes
    -----
    Attributes and what a call keeps are those of :class:`BatchNorm`; training and evaluation are the same.
    """

    _norm: ClassVar[str] = "group"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        axis: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        kind = _dtype(dtype)
        functional._check_groups(num_channels, num_groups)
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self.axis = axis
        super().__init__(
            device,
            weight=np.ones(num_channels, kind) if affine else None,
            bias=np.zeros(num_channels, kind) if affine else None,
        )

    def __call__(self, x: Array, mask: Array | None = None, *, out: Array | None = None) -> Array:
        """y for x of shape (N, C), (N, C, *spatial) or with C at `axis`; raises as :func:`group_norm_forward`."""
        self._saved.call = None
        x = self._here(x)
        y, mean, rstd = functional.group_norm_forward(
            x, self.num_groups, self._weight, self._bias, self.eps, axis=self.axis, mask=mask, out=out
        )
        self._keep(out, x, mean, rstd, mask)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx; sets weight_grad and bias_grad. RuntimeError where there was no call since the last backward."""
        x, mean, rstd, mask = self._last_call()
        dx, dweight, dbias = functional.group_norm_backward(
            dy, x, mean, rstd, self._weight, self._bias, axis=self.axis, mask=mask, out=out
        )
        self._saved.call = None
        if self.affine:
            self.weight_grad, self.bias_grad = dweight, dbias
        return dx

    def __repr__(self) -> str:
        return (
            f"GroupNorm({self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, axis={self.axis})"
        )


class LayerNorm(_Layer):
    """Layer normalization over the last axes (Ba, Kiros & Hinton 2016): ``y = (x − mean)·rstd·weight + bias``.

    Parameters
    ----------
    normalized_shape : int or sequence of ints
        The lengths of the last axes of x, over which each statistic is taken.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there is a weight (ones) of normalized_shape.
    bias : bool
        Whether there is a bias (zeros) of normalized_shape; there is none without a weight.
    dtype, device
        As in :class:`BatchNorm`.

    Raises
    ------
    ValueError
        An empty `normalized_shape`.
    TypeError
        A dtype that is none of the four.
    RuntimeError
        A device that is not there, with the reason.

    Notes
    -----
    Attributes and what a call keeps are those of :class:`BatchNorm`; training and evaluation are the same.
    """

    _norm: ClassVar[str] = "layer"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        kind = _dtype(dtype)
        self.normalized_shape = functional._shape_of(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        super().__init__(
            device,
            weight=np.ones(self.normalized_shape, kind) if elementwise_affine else None,
            bias=np.zeros(self.normalized_shape, kind) if elementwise_affine and bias else None,
        )

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """y for x of shape (..., *normalized_shape); raises as :func:`layer_norm_forward`."""
        self._saved.call = None
        x = self._here(x)
        y, mean, rstd = functional.layer_norm_forward(
            x, self.normalized_shape, self._weight, self._bias, self.eps, out=out
        )
        self._keep(out, x, mean, rstd)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx; sets weight_grad and bias_grad. RuntimeError where there was no call since the last backward."""
        x, mean, rstd = self._last_call()
        dx, dweight, dbias = functional.layer_norm_backward(dy, x, mean, rstd, self._weight, self._bias, out=out)
        self._saved.call = None
        self.weight_grad = None if self._weight is None else dweight
        self.bias_grad = None if self._bias is None else dbias
        return dx

    def __repr__(self) -> str:
        return (
            f"LayerNorm({self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self._bias is not None})"
        )


class RMSNorm(_Layer):
    """RMS normalization over the last axes (Zhang & Sennrich 2019): ``y = x/√(Σx²/n + eps)·weight``.

    Parameters
    ----------
    normalized_shape : int or sequence of ints
        The lengths of the last axes of x, over which each mean square is taken.
    eps : float or None
        Added to the mean square under the root. None is ``finfo(float32).eps``, for float64
        ``finfo(float64).eps``, as in PyTorch from 2.7 on.
    elementwise_affine : bool
        Whether there is a weight (ones) of normalized_shape.
    dtype, device
        As in :class:`BatchNorm`.

    Attributes
    ----------
    weight : array or None
        Optimizers write into it in place; assigning copies into it.
    weight_grad : array or None
        Set by :meth:`backward`, in the weight's dtype.

    Raises
    ------
    ValueError
        An empty `normalized_shape`.
    TypeError
        A dtype that is none of the four.
    RuntimeError
        A device that is not there, with the reason.
    """

    _norm: ClassVar[str] = "rms"
    _arrays: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        kind = _dtype(dtype)
        self.normalized_shape = functional._shape_of(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        super().__init__(device, weight=np.ones(self.normalized_shape, kind) if elementwise_affine else None)

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """y for x of shape (..., *normalized_shape); raises as :func:`rms_norm_forward`."""
        self._saved.call = None
        x = self._here(x)
        y, rstd = functional.rms_norm_forward(x, self.normalized_shape, self._weight, self.eps, out=out)
        self._keep(out, x, rstd)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx; sets weight_grad. RuntimeError where there was no call since the last backward."""
        x, rstd = self._last_call()
        dx, dweight = functional.rms_norm_backward(dy, x, rstd, self._weight, out=out)
        self._saved.call = None
        self.weight_grad = None if self._weight is None else dweight
        return dx

    def __repr__(self) -> str:
        return f"RMSNorm({self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine})"


class SwitchableNorm(_Running):
    """Switchable normalization (Luo et al. 2018): statistics that are mixed, by learned shares, from those of the
    instance, the layer and the batch. See :func:`fusednorm.switchable_norm_forward`.

    Parameters
    ----------
    num_features, eps, momentum, affine, axis, dtype, device
        As in :class:`BatchNorm`.
    track_running_stats : bool
        False: no running statistics; the batch's part is the batch's in evaluation, too.

    Attributes
    ----------
    mean_logits, var_logits : (3,) arrays
        Their softmax is how the statistics are mixed: instance, layer, batch. Ones at first, a third each, as the
        authors' mean_weight and var_weight.
    mean_logits_grad, var_logits_grad : arrays or None
        Set by :meth:`backward`, in the parameter's dtype.

    Raises
    ------
    TypeError
        A dtype that is none of the four, a momentum that is no number.
    RuntimeError
        A device that is not there, with the reason.

    Notes
    -----
    The other attributes, and what a call keeps, are those of :class:`BatchNorm`.
    """

    _norm: ClassVar[str] = "switchable"
    _arrays: ClassVar[tuple[str, ...]] = (*_Running._arrays, "mean_logits", "var_logits")
    _gradients: ClassVar[tuple[str, ...]] = (*_Running._gradients, "mean_logits_grad", "var_logits_grad")
    mean_logits = _own("mean_logits")
    var_logits = _own("var_logits")
    mean_logits_grad: Array | None
    var_logits_grad: Array | None
    _mean_logits: Array
    _var_logits: Array

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            axis,
            dtype,
            device,
            mean_logits=np.ones(3, _dtype(dtype)),
            var_logits=np.ones(3, _dtype(dtype)),
        )

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """y for x of shape (N, C), (N, C, *spatial) or with C at `axis`; raises as :func:`switchable_norm_forward`."""
        self._saved.call = None
        x, estimate = self._here(x), self._estimate
        moments = None if estimate is None else functional._batch_moments(x, self.axis, None, None)
        tracked = self.track_running_stats and estimate is None
        of_batch = self.training or not tracked
        momentum, counted = self._weighing()
        y, *saved = functional.switchable_norm_forward(
            x,
            self._mean_logits,
            self._var_logits,
            self._weight,
            self._bias,
            running_mean=self._running_mean if estimate is None else None,
            running_var=self._running_var if estimate is None else None,
            training=of_batch,
            momentum=momentum if counted < 0 else 1 / (counted + 1),
            eps=self.eps,
            axis=self.axis,
            out=out,
        )
        if of_batch and tracked and y.size:
            self.num_batches_tracked += 1
        if moments is not None:
            estimate.add(*moments)
        self._keep(out, x, saved, of_batch)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """dx; sets weight_grad, bias_grad, mean_logits_grad and var_logits_grad. RuntimeError where there was no call
        since the last backward.
        """
        x, (means, variances, rstd), of_batch = self._last_call()
        dx, dweight, dbias, self.mean_logits_grad, self.var_logits_grad = functional.switchable_norm_backward(
            dy,
            x,
            means,
            variances,
            rstd,
            self._mean_logits,
            self._var_logits,
            self._weight,
            self._bias,
            training=of_batch,
            axis=self.axis,
            out=out,
        )
        self._saved.call = None
        if self.affine:
            self.weight_grad, self.bias_grad = dweight, dbias
        return dx

    def __repr__(self) -> str:
        return (
            f"SwitchableNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis})"
        )


class WeightNorm(_Layer):
    """Weight normalization (Salimans & Kingma 2016): a weight as its length g and its direction v, ``w = g·v/‖v‖``.

    It depends on no data: unlike the other norms it is the same for every batch, and in inference it is computed once,
    by :meth:`fold`. In training, call the layer once a step, use what it returns as the weight of a linear layer or a
    convolution, and give :meth:`backward` the gradient of that weight.

    Parameters
    ----------
    weight : array
        The weight to begin with: v is a copy of it and g its norms, as in PyTorch, so that ``w = weight``.
    dim : int or None
        The axis whose indices have a length of their own, that of the output features; None: one length for all.
    dtype : dtype, optional
        Of v and g; None: the weight's.
    device : "cpu", "cuda", "cuda:0", …
        Where the layer's arrays are, as in :class:`BatchNorm`.

    Attributes
    ----------
    weight_g : (1, …, O, …, 1) array, O on axis `dim`; () where that is None
    weight_v : array like the weight
        Optimizers write into them in place; assigning copies into them. The names are those of
        ``torch.nn.utils.weight_norm``; PyTorch's parametrization calls them original0 and original1.
    weight_g_grad, weight_v_grad : arrays or None
        Set by :meth:`backward`, in the parameter's dtype.
    """

    _norm: ClassVar[str] = "weight"
    _arrays: ClassVar[tuple[str, ...]] = ("weight_g", "weight_v")
    _gradients: ClassVar[tuple[str, ...]] = ("weight_g_grad", "weight_v_grad")
    weight_g = _own("weight_g")
    weight_v = _own("weight_v")
    weight_g_grad: Array | None
    weight_v_grad: Array | None
    _weight_g: Array
    _weight_v: Array

    def __init__(self, weight: Array, dim: int | None = 0, *, dtype: Any = None, device: str = "cpu") -> None:
        v = arrays.taken(weight, "weight")
        kind = _dtype(v.dtype if dtype is None else dtype)
        v = np.array(arrays.moved(v, "cpu"), kind, order="C")
        if dim is not None and not -v.ndim <= dim < v.ndim:
            raise np.exceptions.AxisError(dim, v.ndim)
        shape = [n if dim is not None and a == dim % v.ndim else 1 for a, n in enumerate(v.shape)]
        norm = functional.weight_norm_forward(v, np.ones(shape if dim is not None else (), kind), dim)[1]
        self.dim = dim
        super().__init__(device, weight_g=norm.astype(kind), weight_v=v)

    def __call__(self, *, out: Array | None = None) -> Array:
        """The weight; raises as :func:`weight_norm_forward`."""
        self._saved.call = None
        w, norm = functional.weight_norm_forward(self._weight_v, self._weight_g, self.dim, out=out)
        self._keep(out, self._weight_v, norm)
        return w

    def backward(self, dw: Array) -> None:
        """Sets weight_g_grad and weight_v_grad. RuntimeError where there was no call since the last backward.

        v and g must be as they were in the call: take the optimizer's step afterwards.
        """
        _, norm = self._last_call()
        dw = self._here(dw)
        dv, dg = functional.weight_norm_backward(dw, self._weight_v, self._weight_g, norm, self.dim)
        self._saved.call = None
        self.weight_v_grad, self.weight_g_grad = dv, dg

    def fold(self) -> Array:
        """The weight as a plain array, for inference without the layer."""
        return functional.weight_norm(self._weight_v, self._weight_g, self.dim)

    def __repr__(self) -> str:
        return f"WeightNorm({self._weight_v.shape}, dim={self.dim})"
