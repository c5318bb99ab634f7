"""Batch norm of several processes as a PyTorch module: :mod:`fusednorm.distributed` under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm

from fusednorm import arrays, distributed, functional
from fusednorm.foreign import to_torch
from fusednorm.torch import ops
from fusednorm.torch.modules import BatchNormAct

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


@ops._on_its_stream
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, sync: distributed.Sync,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
    activation: functional.Activation, mask: Tensor | None,
) -> tuple[Tensor, distributed.Call]:  # fmt: skip
    try:
        x = ops._dense(x, "batch", ())
        x_, weight_, bias_, residual_ = (ops._array(t) for t in (x, weight, bias, ops._as_lies(x, residual)))
        mean, var, mask_ = (ops._array(t) for t in (running_mean, running_var, mask))
    except Exception as error:
        sync.refuse("forward", error)
    y, call = distributed.forward(
        sync, x_, weight_, bias_, mean, var, momentum, -1, eps, 1, residual_, activation, None, mask_, 1, None,
        arrays.device(x_),
    )  # fmt: skip
    return to_torch(y), call


@ops._on_its_stream
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: distributed.Call,
    activation: functional.Activation, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    weight_, x = ops._array(weight), ops._dense(x, "batch", ())
    dx, dweight, dbias, dresidual = distributed.backward(
        call, ops._array(ops._as_lies(x, dy)), ops._array(x), weight_, weight_ if bias is None else ops._array(bias), 1,
        ops._array(ops._as_lies(x, residual)), activation, None, ops._array(mask), None,
    )  # fmt: skip
    return to_torch(dx), to_torch(dweight), to_torch(dbias), None if dresidual is None else to_torch(dresidual)


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: tuple[Any, ...]
    ) -> Tensor:
        y, ctx.call = _forward(x, weight, bias, residual, *rest)
        *_, ctx.activation, mask = rest
        if ctx.activation is None:
            ctx.save_for_backward(x, weight, None, None, mask)
        else:
            ctx.save_for_backward(x, weight, bias, residual, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            missing = NotImplementedError("a synchronized batch norm has no second gradients (create_graph=True)")
            ctx.call.sync.refuse("backward", missing)
        x, weight, bias, residual, mask = ctx.saved_tensors
        dx, dweight, dbias, dresidual = _backward(dy, x, weight, bias, residual, ctx.call, ctx.activation, mask)
        needed = ctx.needs_input_grad
        return (
            dx,
            dweight if needed[1] else None,
            dbias if needed[2] else None,
            None if not needed[3] else dy if ctx.activation is None else dresidual,
            None,
        )


class SyncBatchNorm(BatchNormAct):
    """:class:`torch.nn.SyncBatchNorm`, on the CPU as well: (N, C, *), with the statistics of all processes' batches in
    training.

    Arguments and state are those of torch.nn's; `process_group` may also be any other group that
    :mod:`fusednorm.distributed` takes, and None is the default group of torch.distributed. In evaluation, without such
    a group, or in a group of one, it is an ordinary batch norm. `activation`, None unless given, and a call's residual
    and mask are those of :class:`BatchNormAct`.

    Gradients of weight and bias are this process's; DistributedDataParallel averages them. All ranks must call the
    module, and go back through it, as often and in the same order, those with an empty batch as well.

    It is no subclass of torch.nn's, which DistributedDataParallel refuses on the CPU. A copy, and what was pickled, has
    no `process_group`: assign it, if it is not to be the default one.
    """

    # Not only in the constructor: `convert` makes torch.nn's modules ones of this class.
    activation: functional.Activation = None
    _sync: distributed.Sync | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: functional.Activation = None,
        **named: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, activation=activation, **named
        )
        self.process_group = process_group

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": None, "_sync": None}

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """y like `input`; arguments as :class:`BatchNormAct`'s. Raises as :func:`fusednorm.distributed.forward`."""
        sync = self._joined()
        if sync is None:
            return super().forward(input, residual, mask)
        return self._with_all(sync, input, residual, mask)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """:func:`convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)

    def _joined(self) -> distributed.Sync | None:
        """This module's part in its group; None where it has its statistics for itself."""
        group = self.process_group
        if not self.training:
            return None
        if group is None:
            if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
                return None
            group = torch.distributed.group.WORLD
        if self._sync is None or self._sync.given is not group:
            self._sync = distributed.Sync(group, self.num_features)
        return None if self._sync.group.size == 1 else self._sync

    @torch.compiler.disable
    def _with_all(self, sync: distributed.Sync, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        try:
            self._check_input_dim(input)
            residual = self._alike(residual, input)
            seen = self.num_batches_tracked if self.track_running_stats else None
            momentum = self.momentum
            if momentum is None:
                momentum = 0.0 if seen is None else 1 / (float(seen) + 1)
            running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        except Exception as error:
            sync.refuse("forward", error)
        y = _Synchronized.apply(
            input, self.weight, self.bias, residual, (sync, *running, momentum, self.eps, self.activation, mask)
        )
        if seen is not None:
            seen.add_(1)
        changed = tuple(a for a in running if a is not None)
        if changed:
            # Written behind PyTorch's back; whoever saved them for a backward is to know.
            torch.autograd.graph.increment_version(changed)
        return y


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every batch norm in `module`, torch.nn's or fusednorm's, be a :class:`SyncBatchNorm` of this group; returns
    `module`.

    As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, but that modules stay the same objects, with their
    parameters, buffers and hooks, and only change their class. A :class:`BatchNormAct` keeps its activation. ValueError
    for lazy modules, whose number of channels is still open; nothing is converted then.
    """
    found = [one for one in module.modules() if isinstance(one, batchnorm._BatchNorm)]
    if any(isinstance(one, batchnorm._LazyNormBase) for one in found):
        raise ValueError("a lazy batch norm has no channels before its first batch: run one through the model first")
    for one in found:
        one.__class__ = SyncBatchNorm
        one.process_group = process_group
    return module
