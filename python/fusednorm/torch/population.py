"""Running statistics of a model's batch norms, estimated anew on a population."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm

from fusednorm import distributed, population
from fusednorm.population import Estimate
from fusednorm.torch import modules, ops
from fusednorm.torch.distributed import SyncBatchNorm
from fusednorm.torch.models import Report, missing

__all__ = ["population_statistics"]


class _ForItself(SyncBatchNorm):
    """What a SyncBatchNorm is while it is estimated: ranks may have different numbers of batches."""

    def _joined(self) -> None:
        return None


def _called(model: nn.Module, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@torch.no_grad()
def population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: str = "exact",
    *,
    call: Callable[[nn.Module, Any], Any] = _called,
    progress: bool | None = None,
    process_group: Any = None,
) -> Report:
    """Estimate the running statistics of all batch norms in `model`, torch.nn's and these, anew: one pass over
    `batches`, without gradients, after training.

    Meanwhile each batch norm normalizes with the statistics of its batch, so that the layers behind it get the inputs
    of training (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", precise BN), while all other modules, dropout for
    one, are in evaluation. ``running_mean``, ``running_var`` and ``num_batches_tracked`` change at the end, in place;
    parameters, hooks and training flags stay. If anything raises, all is as it was.

    Args:
        batches: each a tensor, or a tuple or list whose first is the model's input, as data loaders give them.
        estimator: "exact", "paper" or "cumulative", as :class:`fusednorm.Population` has it.
        call: ``call(model, batch)`` calls the model on other batches: ``lambda model, batch: model(**batch)``.
        progress: whether a progress bar is written to stderr, by rich; None: if that is a terminal and rich is there.
        process_group: merges the batches of all ranks at the end; see :class:`fusednorm.Population`. Under
            DistributedDataParallel pass ``model.module``, as the wrapper would synchronize in each call. If one rank
            raises before, the others wait for it.

    Compiled models run uncompiled, by a switch of the whole process: do not estimate in several threads then. Of a
    subclass of torch.nn's batch norms the first argument is taken to be what it normalizes.

    Returns a report: which batch norms were estimated, and why others were left: without running statistics, on a
    device without kernels, or not called, like the auxiliary heads that some models have in training only.

    Raises ValueError, and changes nothing, where `batches` is empty or no batch norm was called on any rank; where one
    saw one value per channel, NaN or infinities; and for an unknown estimator.
    """
    report, group = Report(), None if process_group is None else distributed.group_of(process_group)
    estimates: dict[str, tuple[Any, Estimate]] = {}
    for name, module in model.named_modules():
        if isinstance(module, batchnorm._BatchNorm):
            why = missing(module) if module.running_mean is not None else "it has no running statistics"
            if why:
                report.left[name] = why
            else:
                estimates[name] = module, Estimate(estimator, module.num_features, 1)
    if not estimates:
        return report
    with ExitStack() as entered:
        entered.enter_context(_estimating(model, list(estimates.values())))
        for batch in entered.enter_context(_shown(batches, progress)):
            call(model, batch)
    population.merged([estimate for _, estimate in estimates.values()], group)
    found = {}
    for name, (module, estimate) in estimates.items():
        if not estimate.batches:
            report.left[name] = "it was not called"
            continue
        try:
            found[name] = module, estimate.batches, *estimate.result()
        except ValueError as why:
            raise ValueError(f"no statistics of {name or 'the model'}: {why}; all modules are as they were") from None
    if not found:
        raise ValueError("no batch norm was called on a batch: is batches empty, or an iterator that is used up?")
    for name, (module, seen, mean, variance) in found.items():
        module.running_mean.copy_(torch.from_numpy(mean))
        module.running_var.copy_(torch.from_numpy(variance))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(seen)
        report.done[name] = f"estimated on {seen} batches ({estimator})"
    return report


@contextmanager
def _estimating(model: nn.Module, estimates: list[tuple[Any, Estimate]]) -> Iterator[None]:
    """The modules' inputs are taken in. A batch norm that trains and tracks nothing writes nothing."""
    training = [(module, module.training) for module in model.modules()]
    synchronized = [module for module, _ in estimates if type(module) is SyncBatchNorm]
    tracking = [(module, module.track_running_stats) for module, _ in estimates]
    hooks = []
    try:
        for module, _ in training:
            module.training = False
        for module in synchronized:
            module.__class__ = _ForItself
        for module, estimate in estimates:
            module.training, module.track_running_stats = True, False
            hooks.append(module.register_forward_pre_hook(_taking(module, estimate), with_kwargs=True))
        with _eager():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in synchronized:
            module.__class__ = SyncBatchNorm
        for module, flag in training:
            module.training = flag
        for module, flag in tracking:
            module.track_running_stats = flag


def _eager() -> AbstractContextManager[Any]:
    """Nothing is compiled anew for a few calls with hooks. PyTorch 2.5 has no such switch, and compiles."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


def _taking(module: Any, estimate: Estimate) -> Callable[..., None]:
    """A hook that takes in the first argument of a call, with the mask of those batch norms that have one."""
    signature, masked = inspect.signature(module.forward), isinstance(module, modules._BatchNorm)

    def take(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = signature.bind(*args, **named).arguments
        x = args[0] if args else next(iter(given.values()))
        estimate.add(*ops.batch_moments(x, given.get("mask") if masked else None))

    return take


def _shown(batches: Iterable[Any], progress: bool | None) -> AbstractContextManager[Iterable[Any]]:
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("rich") is not None
    return _bar(batches) if progress else nullcontext(batches)


@contextmanager
def _bar(batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        raise ImportError("a progress bar needs rich: pip install rich, or leave progress out") from None
    columns = (
        progress.TextColumn("population statistics"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar.track(batches)
