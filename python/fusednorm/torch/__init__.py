"""The norms as PyTorch modules: drop-ins for torch.nn's, with gradients, for models that train, compile and export.

::

    import fusednorm.torch as fnt

    layer = fnt.BatchNorm2d(64)  # a torch.nn.BatchNorm2d in all but how it computes
    block = fnt.BatchNormAct(64, activation="relu")  # block(x, residual): act(norm(x) + residual) in one pass
    print(fnt.convert(model))  # or all of a model at once; fnt.revert(model) undoes it

**How a call goes.** A module's ``forward`` calls one function, ``ops.norm``. It has two ways to the same kernel. The
short one, for plain tensors in eager mode, views tensors as arrays (no copy), calls :mod:`fusednorm.functional`, and
views the results as tensors; where gradients are wanted an ``autograd.Function`` does that. The other one is a custom
op, ``torch.ops.fusednorm.norm``, for all who look at operations rather than numbers: ``torch.compile`` and
``torch.export``, function transforms (``torch.func``), ``torch.jit.trace``, dispatch modes, tensor subclasses, the meta
device. The op calls what the short way calls, so that bits do not depend on the way; it costs more time a call. Ops are
functional, as compilers want it: new running statistics are results, which ``ops.norm`` copies into the buffers.

**What is kept for backward**: x, the weight, mean and rstd; bias and residual only for the derivative of an activation.

**Second gradients** (``create_graph=True``) are there for all norms without an activation and a mask; third ones are
not. Forward mode (``jvp``) is not.

**Dtypes.** x may be float32, float64, float16 or bfloat16 (which needs ml_dtypes), parameters any of these besides; y
has x's. Sums are float32 or wider whatever x is, so autocast has nothing to change: y keeps x's dtype there, too. On
CUDA, PyTorch's autocast makes the results of layer, group and RMS norm float32 instead.

**Memory.** y has x's shape and strides, channels last included; where x has gaps or overlaps, y is contiguous. On a GPU
tensors are CuPy's arrays on PyTorch's current stream; that way has not been run on a GPU yet.

**Several processes**: `SyncBatchNorm` has the statistics of all of a process group's, on the CPU, too, and
`convert_sync_batchnorm` puts it in the place of a model's batch norms. It has first gradients only, and a compiler
breaks the graph there; without a process group to share with it is an ordinary batch norm.

**vmap** calls the kernel for each entry. As in PyTorch, a batch norm that tracks statistics cannot be mapped in
training, because its buffers are not.
"""

import importlib.util

from fusednorm.arrays import installs

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(f"fusednorm.torch needs PyTorch: {installs('torch')}", name="torch")

from fusednorm.torch.distributed import SyncBatchNorm, convert_sync_batchnorm
from fusednorm.torch.models import Report, convert, fold_batch_norm, revert
from fusednorm.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from fusednorm.torch.population import population_statistics

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
    "Report",
    "SyncBatchNorm",
    "convert",
    "convert_sync_batchnorm",
    "fold_batch_norm",
    "population_statistics",
    "revert",
]
