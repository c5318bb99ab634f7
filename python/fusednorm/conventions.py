"""What other libraries mean by the same words: one table, and their states in PyTorch's names and back.

:data:`CONVENTIONS` has a row for each library. ``fn.BatchNorm.from_convention("keras", 64)`` makes a layer by it, the
other norms alike; :func:`to_pytorch` and :func:`from_pytorch` rename what a batch norm has learned. docs/conventions.md
is about all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["CONVENTIONS", "Convention", "from_pytorch", "to_pytorch"]


@dataclass(frozen=True)
class Convention:
    """A library's defaults and names.

    Attributes:
        library: with the version that the row was read from.
        norms: by norm, the options of the layer here that are its defaults there. What is missing, it has not.
        momentum: its default, in the library's own sense.
        weighs: what momentum weighs in the running statistics, the ``new`` value or the ``old`` one.
        correction: the running variance is over ``n − correction``. All normalize by the variance over n.
        axis: of the channels, where it is not given.
        names: what the library calls ours, in the order in which it lists them; after the first, other names that are
            understood. ``/`` stands between the names of nested mappings.
        scale: whether its batch norm has a weight, unless asked.
        center: whether its batch norm has a bias, unless asked.
        always: its states have weight and bias even where its layer does not use them.
        debiased: the running statistics are the batches' weighted mean alone. They are kept as weighted sums, beside
            them, as ``scale_factor``, the sum of the weights.
        others: what its states have besides, of no use here.
        source: where all this is written.
    """

    library: str
    norms: Mapping[str, Mapping[str, Any]]
    momentum: float
    weighs: Literal["new", "old"]
    correction: int
    axis: int
    names: Mapping[str, tuple[str, ...]]
    source: str
    scale: bool = True
    center: bool = True
    always: bool = False
    debiased: bool = False
    others: Mapping[str, int] = field(default_factory=dict)

    def weight_of_new(self, momentum: float | None) -> float | None:
        """A momentum in the library's sense as ours, the weight of the new value; None, an average of all, stays."""
        return 1 - momentum if momentum is not None and self.weighs == "old" else momentum


CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(
        library="PyTorch 2.13",
        norms={
            "batch": {"eps": 1e-5},
            "instance": {"eps": 1e-5},
            "group": {"eps": 1e-5},
            "layer": {"eps": 1e-5},
            "rms": {"eps": None},
        },
        momentum=0.1,
        weighs="new",
        correction=1,
        axis=1,
        names={name: (name,) for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
        source="torch/nn/modules/batchnorm.py",
    ),
    "keras": Convention(
        library="Keras 3.15",
        norms={"batch": {"eps": 1e-3}, "group": {"eps": 1e-3}, "layer": {"eps": 1e-3}, "rms": {"eps": 1e-6}},
        momentum=0.99,
        weighs="old",
        correction=0,
        axis=-1,
        names={
            "weight": ("gamma",),
            "bias": ("beta",),
            "running_mean": ("moving_mean",),
            "running_var": ("moving_variance",),
        },
        source="keras/src/layers/normalization/batch_normalization.py",
    ),
    "flax": Convention(
        library="Flax 0.12, nnx and linen",
        norms={
            "batch": {"eps": 1e-5},
            "instance": {"eps": 1e-6, "affine": True},
            "group": {"eps": 1e-6},
            "layer": {"eps": 1e-6},
            "rms": {"eps": 1e-6},
        },
        momentum=0.99,
        weighs="old",
        correction=0,
        axis=-1,
        names={
            "weight": ("params/scale", "scale"),
            "bias": ("params/bias", "bias"),
            "running_mean": ("batch_stats/mean", "mean"),
            "running_var": ("batch_stats/var", "var"),
        },
        source="flax/nnx/nn/normalization.py, flax/linen/normalization.py",
    ),
    "onnx": Convention(
        library="ONNX, BatchNormalization-15",
        norms={
            "batch": {"eps": 1e-5},
            "instance": {"eps": 1e-5, "affine": True},
            "group": {"eps": 1e-5},
            "layer": {"eps": 1e-5},
            "rms": {"eps": 1e-5},
        },
        momentum=0.9,
        weighs="old",
        correction=0,
        axis=1,
        names={
            "weight": ("scale",),
            "bias": ("B",),
            "running_mean": ("input_mean",),
            "running_var": ("input_var",),
        },
        source="onnx.ai/onnx/operators/onnx__BatchNormalization.html",
        always=True,
    ),
    "chainer": Convention(
        library="Chainer 7",
        norms={"batch": {"eps": 2e-5}, "group": {"eps": 1e-5}, "layer": {"eps": 1e-6}},
        momentum=0.9,
        weighs="old",
        correction=1,
        axis=1,
        names={
            "weight": ("gamma",),
            "bias": ("beta",),
            "running_mean": ("avg_mean",),
            "running_var": ("avg_var",),
        },
        source="chainer/functions/normalization/batch_normalization.py",
        others={"N": 0},  # batches of its fine-tuning mode
    ),
    "caffe": Convention(
        library="Caffe 1.0",
        norms={"batch": {"eps": 1e-5}},
        momentum=0.999,
        weighs="old",
        correction=1,
        axis=1,
        names={
            "running_mean": ("BatchNorm/0",),
            "running_var": ("BatchNorm/1",),
            "scale_factor": ("BatchNorm/2",),
            "weight": ("Scale/0",),
            "bias": ("Scale/1",),
        },
        source="src/caffe/layers/batch_norm_layer.cpp, src/caffe/proto/caffe.proto",
        scale=False,
        center=False,
        debiased=True,
    ),
    "mxnet": Convention(
        library="MXNet 1.9, on the CPU",
        norms={
            "batch": {"eps": 1e-3},
            "instance": {"eps": 1e-3, "affine": True},
            "group": {"eps": 1e-5},
            "layer": {"eps": 1e-5},
        },
        momentum=0.9,
        weighs="old",
        correction=0,
        axis=1,
        names={
            "weight": ("gamma",),
            "bias": ("beta",),
            "running_mean": ("moving_mean", "running_mean"),
            "running_var": ("moving_var", "running_var"),
        },
        source="src/operator/nn/batch_norm.cc, batch_norm-inl.h",
        scale=False,
        always=True,
    ),
}


def named(convention: str) -> Convention:
    try:
        return CONVENTIONS[convention]
    except KeyError:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, not {convention!r}") from None


def options(convention: str, norm: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a layer here: the library's defaults, then what is given, whose momentum is in its sense."""
    row = named(convention)
    if norm not in row.norms:
        raise ValueError(f"{row.library} has no {norm} norm; of its norms there are {', '.join(row.norms)}")
    found = {**row.norms[norm], **({"axis": row.axis} if norm in ("batch", "instance", "group") else {})}
    if norm == "batch":
        found |= {"momentum": row.momentum, "correction": row.correction}
    found |= given
    if "momentum" in found:
        found["momentum"] = row.weight_of_new(found["momentum"])
    return found


def to_pytorch(
    convention: str,
    state: Mapping[str, Any] | Sequence[Any],
    *,
    scale: bool | None = None,
    momentum: float | None = None,
) -> dict[str, Any]:
    """A batch norm's state in PyTorch's names, for ``load_state_dict``, from another library's.

    Running statistics are renamed, not rescaled: evaluation takes them as they are, with n or with n − 1, and so gives
    what it gave there. (Caffe's are divided by their scale factor.)

    Parameters
    ----------
    convention : "torch", "keras", "flax", "onnx", "chainer", "caffe" or "mxnet"
        The library that the state is from.
    state : mapping or sequence
        By the names that :data:`CONVENTIONS` lists, nested or with ``/`` between them, or the values in that order:
        Keras's ``layer.get_weights()``, Flax's variables, the initializers of an ONNX node after X, Caffe's blobs of
        BatchNorm and of the Scale after it. gamma and beta may be missing where the layer has none.
    scale : bool, optional
        False leaves the weight out. MXNet's states need to be told, as a gamma is in them that ``fix_gamma=True`` takes
        as 1: False for that, True for ``fix_gamma=False``.
    momentum : float, optional
        Caffe's moving_average_fraction, by which its scale factor says how many batches there were.

    Raises
    ------
    KeyError
        Names that are missing or unknown.
    ValueError
        An unknown convention; MXNet's without `scale`.
    """
    row = named(convention)
    if not isinstance(state, Mapping):
        order = [theirs[0] for theirs in row.names.values()]
        if len(state) > len(order):
            raise ValueError(f"{row.library} has {len(order)} arrays in a state ({', '.join(order)}), not {len(state)}")
        state = dict(zip(order, state, strict=False))
    if convention == "mxnet" and scale is None:
        raise ValueError(
            "MXNet's state needs scale: False for fix_gamma=True (the operator's default; gamma counts as 1), True for "
            "fix_gamma=False (Gluon's default)"
        )
    flat = {name: value for name, value in _flat(state).items() if name not in row.others}
    ours = {alias: name for name, aliases in row.names.items() for alias in aliases}
    unknown = [name for name in flat if name not in ours]
    found = {ours[name]: value for name, value in flat.items() if name in ours}
    optional = (*found, "weight", "bias", "num_batches_tracked")
    missing = [aliases[0] for name, aliases in row.names.items() if name not in optional]
    if unknown or missing:
        raise KeyError(
            f"{row.library}'s state has {', '.join(aliases[0] for aliases in row.names.values())}: "
            f"missing {missing}, unknown {unknown}"
        )
    if row.debiased:
        total = np.asarray(found.pop("scale_factor")).item()
        for name in ("running_mean", "running_var"):
            found[name] = np.asarray(found[name]) * (1 / total if total else 0)
        found["num_batches_tracked"] = _batches(total, row.momentum if momentum is None else momentum)
    if scale is False:
        found.pop("weight", None)
    return {"num_batches_tracked": np.int64(0), **found}


def from_pytorch(convention: str, state: Mapping[str, Any], *, momentum: float | None = None) -> dict[str, Any]:
    """A batch norm's state in another library's names and order, from PyTorch's: the inverse of :func:`to_pytorch`.

    Parameters
    ----------
    convention : "torch", "keras", "flax", "onnx", "chainer", "caffe" or "mxnet"
        The library that the state is for.
    state : mapping
        The ``state_dict()`` of a layer here or of PyTorch's.
    momentum : float, optional
        Caffe's moving_average_fraction.

    Returns
    -------
    dict
        Flax's is nested, as ``module.apply`` takes it; of Keras's, ``list(d.values())`` is what ``set_weights`` takes.
        A weight that the library needs and the layer lacks is 1, a bias 0.

    Raises
    ------
    KeyError
        Names that are missing or unknown.
    ValueError
        An unknown convention.
    """
    row, found = named(convention), dict(state)
    known = CONVENTIONS["torch"].names
    unknown = [name for name in found if name not in known]
    missing = [name for name in ("running_mean", "running_var") if name not in found]
    if unknown or missing:
        raise KeyError(f"PyTorch's state has {', '.join(known)}: missing {missing}, unknown {unknown}")
    if row.always or (convention == "torch" and ("weight" in found) != ("bias" in found)):
        found.setdefault("weight", np.ones_like(found["running_mean"]))
        found.setdefault("bias", np.zeros_like(found["running_mean"]))
    if row.debiased:
        total = _total(int(found.get("num_batches_tracked", 0)), row.momentum if momentum is None else momentum)
        for name in ("running_mean", "running_var"):
            found[name] = found[name] * total
        found["scale_factor"] = np.array([total], np.float32)
    renamed = {theirs[0]: found[name] for name, theirs in row.names.items() if name in found}
    return _nested(renamed) if convention == "flax" else {**renamed, **row.others}


def _total(batches: int, momentum: float) -> float:
    """The sum of the weights of so many batches, momentum⁰ + momentum¹ + …; of all there could be, where there are
    statistics and no count of their batches."""
    _check_between(momentum)
    return (1 - momentum**batches if batches else 1) / (1 - momentum)


def _batches(total: float, momentum: float) -> np.int64:
    """How many batches have that sum of weights; where it is at its limit, as many as make no difference."""
    _check_between(momentum)
    left = max(1 - total * (1 - momentum), 2.0**-24)  # float32's rounding of the sum
    return np.int64(round(math.log(left) / math.log(momentum)))


def _check_between(momentum: float) -> None:
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must lie between 0 and 1, not {momentum}")


def _flat(state: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= _flat(value, f"{before}{name}/") if isinstance(value, Mapping) else {before + str(name): value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested
