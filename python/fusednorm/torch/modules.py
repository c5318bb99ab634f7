"""torch.nn's normalizations with another forward: constructors, attributes, state and error words are theirs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm

from fusednorm import functional
from fusednorm.torch.ops import norm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]


class _BatchNorm(batchnorm._BatchNorm):
    def _normalized(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None, slope: float
    ) -> Tensor:
        self._check_input_dim(input)
        training, momentum = self.training, self.momentum
        mean, var = self.running_mean, self.running_var
        own = training or (mean is None and var is None)
        if training:
            if not self.track_running_stats:
                mean = var = None
            else:
                count = self.num_batches_tracked
                if count is not None:
                    count.add_(1)
                    if momentum is None:
                        momentum = 1.0 / float(count)
        return norm(
            input, self.weight, self.bias, residual, mean, var, mask, "batch", (), own, momentum or 0.0, self.eps,
            activation, slope,
        )  # fmt: skip


class _MaskedBatchNorm(_BatchNorm):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """y like `input`. `mask`: boolean, the shape of `input` without its channels, True where a position counts for
        the statistics."""
        return self._normalized(input, None, mask, None, 0.0)


class BatchNorm1d(_MaskedBatchNorm, nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`: its arguments, defaults, state and errors.

    `input` is (N, C) or (N, C, L), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (N,) or (N, L), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes or of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class BatchNorm2d(_MaskedBatchNorm, nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`: its arguments, defaults, state and errors.

    `input` is (N, C, H, W), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (N, H, W), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes or of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class BatchNorm3d(_MaskedBatchNorm, nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`: its arguments, defaults, state and errors.

    `input` is (N, C, D, H, W), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (N, D, H, W), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes or of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class BatchNormAct(_BatchNorm):
    """Batch normalization with what follows it in a residual network: ``act(norm(x) + residual)``, in one pass.

    Arguments are those of :class:`torch.nn.BatchNorm2d`, whose state it has too, and `activation`: "relu" (unless
    another is given), "leaky_relu", "silu", "sigmoid", "tanh", ("leaky_relu", slope) or None. `input` is (N, C, *), in
    float32, float64, float16 or bfloat16, and the result has its dtype.

    Raises
    ------
    ValueError
        An unknown activation; inputs of fewer than two axes or another number of channels, a residual or mask of
        another shape; one value per channel in training.
    TypeError
        Other dtypes.
    """

    def __init__(self, *args: Any, activation: functional.Activation = "relu", **named: Any) -> None:
        functional._activation(activation)
        super().__init__(*args, **named)
        self.activation = activation

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """y like `input`, (N, C, *); `residual` is like it, in the same dtype except under autocast; `mask` boolean,
        (N, *), True where a position counts for the statistics."""
        activation, slope = self.activation, 0.01
        if isinstance(activation, tuple):
            activation, slope = activation
        return self._normalized(input, self._alike(residual, input), mask, activation, slope)

    def _alike(self, residual: Tensor | None, input: Tensor) -> Tensor | None:
        """The residual, under autocast in the input's dtype."""
        if residual is None or residual.dtype == input.dtype or not torch.is_autocast_enabled(input.device.type):
            return residual
        return residual.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class _InstanceNorm(instancenorm._InstanceNorm):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """y like `input`. `mask`: boolean, the shape of `input` without its channels, True where a position counts for
        the statistics."""
        self._check_input_dim(input)
        dim = input.dim() - self._get_no_batch_dim()
        if input.size(dim) != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={dim} to match num_features ({self.num_features}), but got: "
                    f"{input.size(dim)}."
                )
            warnings.warn(
                f"input's size at dim={dim} does not match num_features. You can silence this warning by not passing "
                "in num_features, which is not used because affine=False",
                stacklevel=2,
            )
        if dim == 0:
            input, mask = input.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
        own = self.training or not self.track_running_stats
        y = norm(
            input, self.weight, self.bias, None, self.running_mean, self.running_var, mask, "instance", (), own,
            self.momentum or 0.0, self.eps,
        )  # fmt: skip
        return y.squeeze(0) if dim == 0 else y


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Drop-in for :class:`torch.nn.InstanceNorm1d`: its arguments, defaults, state and errors.

    `input` is (C, L) or (N, C, L), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (L,) or (N, L), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes, or, with a weight, of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Drop-in for :class:`torch.nn.InstanceNorm2d`: its arguments, defaults, state and errors.

    `input` is (C, H, W) or (N, C, H, W), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (H, W) or (N, H, W), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes, or, with a weight, of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Drop-in for :class:`torch.nn.InstanceNorm3d`: its arguments, defaults, state and errors.

    `input` is (C, D, H, W) or (N, C, D, H, W), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (D, H, W) or (N, D, H, W), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of axes, or, with a weight, of channels; one value per channel in training.
    TypeError
        Other dtypes.
    """


class GroupNorm(nn.GroupNorm):
    """Drop-in for :class:`torch.nn.GroupNorm`: its arguments, defaults, state and errors.

    `input` is (N, C, *), of float32, float64, float16 or bfloat16; the result is like it.
    ``forward(input, mask=None)``: `mask` is boolean, (N, *), True where a position counts for
    the statistics.

    Raises
    ------
    ValueError
        Another number of channels; in the constructor, one that num_groups does not divide.
    TypeError
        Other dtypes.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """y like `input`. `mask`: boolean, (N, *), True where a position counts for the statistics."""
        return norm(
            input, self.weight, self.bias, None, None, None, mask, "group", (self.num_groups,), True, 0.0, self.eps
        )


class LayerNorm(nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`: its arguments, defaults, state and errors.

    `input` is (*, *normalized_shape), of float32, float64, float16 or bfloat16; the result is like it.

    Raises
    ------
    ValueError
        Last axes of other lengths than normalized_shape.
    TypeError
        Other dtypes.
    """

    def forward(self, input: Tensor) -> Tensor:
        return norm(
            input, self.weight, self.bias, None, None, None, None, "layer", self.normalized_shape, True, 0.0, self.eps
        )


class RMSNorm(nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`: its arguments, defaults, state and errors.

    `input` is (*, *normalized_shape), of float32, float64, float16 or bfloat16; the result is like it.
    eps None is ``finfo(float32).eps``, for float64 ``finfo(float64).eps``, as in PyTorch from 2.7 on.

    Raises
    ------
    ValueError
        Last axes of other lengths than normalized_shape.
    TypeError
        Other dtypes.
    """

    def forward(self, x: Tensor) -> Tensor:
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return norm(x, self.weight, None, None, None, None, None, "rms", self.normalized_shape, True, 0.0, eps)
