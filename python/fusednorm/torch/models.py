"""Whole models: their normalizations exchanged for these and back, and batch norm folded into what stands before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, instancenorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves

from fusednorm import arrays
from fusednorm.torch import modules
from fusednorm.torch.distributed import SyncBatchNorm

__all__ = ["Report", "convert", "fold_batch_norm", "revert"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(nn, name)
} | {nn.SyncBatchNorm: SyncBatchNorm}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_NORMS = (batchnorm._NormBase, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass
class Report:
    """What was done to which modules, by their names in the model; "" is the model itself.

    Attributes:
        done: what became of a module.
        left: why one stayed as it was.
    """

    done: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.done)} done, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.done.items()]
        lines += [f"  {name or '(the model)'} left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Report:
    """Let every BatchNorm, SyncBatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm of torch.nn in `model` compute
    here.

    Modules stay the same objects and only change their class, so parameters, buffers, hooks, training flags and all
    references to them stay, too. Subclasses are left as they are, since they may compute something else. Modules on a
    device that has no kernels are left. Returns a report; print it.
    """
    report = Report()
    for name, module in model.named_modules():
        found = type(module)
        if found in _OURS:
            why = missing(module)
            if why:
                report.left[name] = why
            else:
                module.__class__ = _OURS[found]
                report.done[name] = f"{found.__name__} now computes with fusednorm"
        elif found in _THEIRS or found is modules.BatchNormAct:
            report.left[name] = f"{found.__name__} is fusednorm's already"
        elif isinstance(module, _NORMS):
            base = next(one for one in found.__mro__ if one.__module__.startswith("torch.nn"))
            kind = f"a kind of {base.__name__} of its own" if base is not found else "without a counterpart here"
            report.left[name] = f"{found.__module__}.{found.__qualname__} is {kind}"
    return report


def revert(model: nn.Module) -> Report:
    """Undo :func:`convert`: every module of fusednorm's that torch.nn has, too, becomes torch.nn's again.

    A BatchNormAct is left, since torch.nn has no such module, and a SyncBatchNorm with an activation. Returns a report.
    """
    report = Report()
    for name, module in model.named_modules():
        found = type(module)
        if found in _THEIRS and getattr(module, "activation", None) is None:
            module.__class__ = _THEIRS[found]
            module.__dict__.pop("_sync", None)
            report.done[name] = f"{found.__name__} is torch.nn's again"
        elif isinstance(module, (*_THEIRS, modules.BatchNormAct)):
            report.left[name] = f"{found.__module__}.{found.__qualname__} has no counterpart in torch.nn"
    return report


def missing(module: nn.Module) -> str:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        kind = tensor.device.type
        if kind not in ("cpu", "cuda", "meta"):
            return f"it is on {tensor.device}, for which there are no kernels"
        if kind == "cuda" and arrays.missing_for_cuda():
            return f"it is on {tensor.device}: {arrays.missing_for_cuda()}"
    return ""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d,
)  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NORMS) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norm(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Report]:
    """A copy of `model` for inference whose batch norms are multiplied into the Linear, Conv or ConvTranspose before
    them, which must have no other use. `model` stays as it is.

    The folding itself is PyTorch's (``torch.nn.utils.fusion``). The copy is traced by torch.fx and run on `inputs`,
    as is the model; ValueError where they differ by more than rounding. A Linear is folded where it has (N, C) results:
    only there are its features the channels of the batch norm.

    Returns the copy and a report. RuntimeError where a part of the model is in training mode; torch.fx says what it
    cannot trace.
    """
    if any(module.training for module in model.modules()):
        raise RuntimeError("only inference can be folded: call model.eval() first")
    folded = fx.GraphModule(copy.deepcopy(model), _Tracer().trace(model)).eval()
    report, found = Report(), dict(folded.named_modules())
    with torch.no_grad():
        expected = model(*inputs)
        dims = _Dims(folded)
        dims.run(*inputs)
    for node in list(folded.graph.nodes):
        norm = found.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, batchnorm._BatchNorm):
            continue
        before: Any = node.args[0] if node.args else None
        why = _unfoldable(norm, node, before, found, dims.of)
        if why:
            report.left[node.target] = why
            continue
        layer = found[before.target]
        fused = (
            fuse_linear_bn_eval(layer, norm)
            if type(layer) is nn.Linear
            else fuse_conv_bn_eval(layer, norm, transpose=type(layer) in _TRANSPOSED)
        )
        folded.add_submodule(before.target, fused)
        node.replace_all_uses_with(before)
        folded.graph.erase_node(node)
        report.done[node.target] = f"folded into {before.target}, a {type(layer).__name__}"
    folded.graph.lint()
    folded.delete_all_unused_submodules()
    folded.recompile()
    with torch.no_grad():
        got = folded(*inputs)
    _expect_close(got, expected)
    return folded, report


class _Dims(fx.Interpreter):
    """How many axes each node's result has."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.of: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.of[n] = result.dim()
        return result


def _unfoldable(
    norm: batchnorm._BatchNorm, node: fx.Node, before: Any, found: dict[str, nn.Module], dims: dict[fx.Node, int]
) -> str:
    """Why a batch norm cannot be folded; empty where it can."""
    layer: Any = found.get(before.target) if isinstance(before, fx.Node) and before.op == "call_module" else None
    calls = [other for other in node.graph.nodes if other.op == "call_module"]
    if type(norm) not in _BATCH_NORMS:
        return f"{type(norm).__qualname__} is more than a batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: its scale depends on the input"
    if type(layer) not in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED):
        return "there is no Linear or Conv right before it"
    if type(layer) in _TRANSPOSED and layer.groups != 1:
        return f"{before.target} is a transposed convolution in groups, which PyTorch's folding does not know"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (norm, layer)):
        return f"it or {before.target} has hooks, which would see something else"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with more than its input"
    if len(before.users) > 1:
        return f"the result of {before.target} is used elsewhere, too"
    if any(sum(other.target == one.target for other in calls) > 1 for one in (node, before)):
        return f"it or {before.target} is called more than once"
    if type(layer) is nn.Linear and dims[before] != 2:
        return f"{before.target} is a Linear with {dims[before]}D results, whose features are not the channels"
    return ""


def _expect_close(got: Any, expected: Any) -> None:
    """That nothing else is computed, to half of the digits: scale and sum round in another order."""
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            error, bound = (one - other).abs().max(), torch.finfo(one.dtype).eps ** 0.5 * other.abs().max()
            if not error <= bound:
                raise ValueError(
                    f"the folded model's results differ by {error:.2g}, where rounding explains {bound:.2g}"
                )
