"""fusednorm: batch normalization and its family, forward and backward, by fused kernels.

Arrays in, arrays of the same kind, dtype and memory format out::

    import numpy as np, fusednorm as fn

    layer = fn.BatchNorm(64, activation="relu")
    y = layer(np.random.randn(32, 64, 56, 56).astype(np.float32))
    dx = layer.backward(np.ones_like(y))
"""

from __future__ import annotations

from typing import Any

from fusednorm import _C, arrays, conventions, reference
from fusednorm.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_normalization,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    moments,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    switchable_norm,
    switchable_norm_backward,
    switchable_norm_forward,
    weight_norm,
    weight_norm_backward,
    weight_norm_forward,
)
from fusednorm.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, SwitchableNorm, WeightNorm
from fusednorm.population import Population
from fusednorm.preprocessing import Standardizer, Whitener
from fusednorm.statistics import Moments

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "Population",
    "RMSNorm",
    "Standardizer",
    "SwitchableNorm",
    "WeightNorm",
    "Whitener",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_normalization",
    "build_info",
    "conventions",
    "empty_cache",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "moments",
    "reference",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_num_threads",
    "switchable_norm",
    "switchable_norm_backward",
    "switchable_norm_forward",
    "weight_norm",
    "weight_norm_backward",
    "weight_norm_forward",
]


def build_info() -> dict[str, Any]:
    """How the kernels were built, and what they use here.

    Returns
    -------
    dict
        "version" and "compiler" (str), "isa_built" and "isa_runnable" (lists of the instruction sets that there are
        kernels for, and of those that this CPU has), "isa" (the one in use), "isa_best" (the best that this CPU has,
        whether there are kernels for it or not), "openmp" (the version's date as an int), "threads" (int), and "cuda"
        (str: its state, with the reason where there is none).
    """
    return dict(_C.build_info())


def set_num_threads(n: int) -> None:
    """Limit the threads that a kernel may use, in every Python thread.

    A limit set through OpenMP after the import holds besides, in the Python thread that sets it: threadpoolctl's, and
    ``torch.set_num_threads``, since PyTorch and a fusednorm built with gcc share one OpenMP runtime.

    Parameters
    ----------
    n : int
        The number of threads, at least 1.

    Raises
    ------
    ValueError
        n below 1.
    """
    if n < 1:
        raise ValueError(f"the number of threads must be at least 1, not {n}")
    _C.set_num_threads(n)


def get_num_threads() -> int:
    """The number of threads that a kernel called from here may use now."""
    return int(_C.get_num_threads())


def empty_cache() -> int:
    """Give the memory kept for coming outputs on the CPU (1 GiB at most) back to the system; returns its bytes.

    Lets go, too, of what calls recorded in CUDA graphs use besides their arguments (outputs, statistics, scratch
    memory): such graphs must not be launched any more.
    """
    arrays.release()
    return int(_C.empty_cache())


__version__: str = build_info()["version"]
