"""Batch norm whose statistics are those of all processes' batches together: synchronized batch norm.

::

    from mpi4py import MPI
    layer = fn.BatchNorm(64, process_group=MPI.COMM_WORLD)  # the same on every rank; mpiexec -n 4 python -m mpi4py …
    y = layer(x)  # each rank its part of the batch
    dx = layer.backward(dy)

Each rank takes count, mean and M2 of its own part (the verb ``moments``), one gather brings those of all ranks to each,
and every rank merges them in the order of the ranks (``merge``): the same numbers in the same order, so the same bits
everywhere. ``normalize`` and the running statistics follow from these. The backward gathers Σw·u and Σw·u·x̂
(``grad_sums``), adds them up in the order of the ranks, and ``grad_input`` has all it needs; the gradients of weight
and bias stay each rank's own, as in PyTorch. So a forward is one collective, a backward another, and evaluation none.

A group is an mpi4py communicator, a process group of torch.distributed, a communicator of CuPy's NCCL, or any object
that has what :class:`Group` says. No such library is imported here. docs/distributed.md says what is sent, what
happens on errors, and when to synchronize at all.

**A message** is float64 numbers, as many on all ranks: a header, and for each ghost batch (one without ghost batches)
the number of elements and of those that count, and two numbers for each channel. A rank that cannot go on, since an
argument of its call is wrong, sends the words of its error in place of them: nobody waits for it in vain. The first
message of a layer is a header alone, because only then it is known that the ranks have as many channels; and one more
is sent whenever a rank has more ghost batches than any had before.

Sources: Chan, Golub & LeVeque (1979) for the merge; Ioffe & Szegedy (2015) for the gradients, with n the count of all
ranks; ``torch.nn.SyncBatchNorm`` for what stays local.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from fusednorm import _C, arrays, functional, operands
from fusednorm.arrays import Array
from fusednorm.operands import FLOAT64, Layout

__all__ = ["Group", "Sync", "group_of"]


class Group(Protocol):
    """The processes that share statistics, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Which of them this one is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def allgather(self, numbers: Array, /) -> Any:
        """All ranks' `numbers`, float64 (n,) of NumPy, in the order of the ranks: (size, n), or `size` arrays (n,).

        Called by every rank, in the same order, with as many numbers.
        """


class _Mpi:
    def __init__(self, comm: Any) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size

    def allgather(self, numbers: Array) -> Array:
        found = np.empty((self.size, numbers.size))
        self._comm.Allgather(numbers, found)
        return found


class _Torch:
    def __init__(self, group: Any) -> None:
        distributed = sys.modules["torch.distributed"]
        self._group, self.rank, self.size = group, distributed.get_rank(group), distributed.get_world_size(group)
        self._device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"

    def allgather(self, numbers: Array) -> Array:
        torch = sys.modules["torch"]
        sent = torch.from_numpy(numbers).to(self._device)
        found = torch.empty((self.size, numbers.size), dtype=torch.float64, device=self._device)
        torch.distributed.all_gather(list(found), sent, group=self._group)
        return found.cpu().numpy()  # type: ignore[no-any-return]


class _Nccl:
    def __init__(self, comm: Any) -> None:
        self._comm = getattr(comm, "_comm", comm)  # NCCLBackend's is cupy.cuda.nccl's
        self.rank, self.size = self._comm.rank_id(), self._comm.size()

    def allgather(self, numbers: Array) -> Array:
        cupy = import_module("cupy")
        with cupy.cuda.Device(self._comm.device_id()):
            sent, found = cupy.asarray(numbers), cupy.empty((self.size, numbers.size))
            kind, stream = cupy.cuda.nccl.NCCL_FLOAT64, cupy.cuda.get_current_stream().ptr
            self._comm.allGather(sent.data.ptr, found.data.ptr, numbers.size, kind, stream)
            return found.get()  # type: ignore[no-any-return]


_ENGINES: tuple[tuple[str, str, Any], ...] = (
    ("mpi4py.MPI", "Intracomm", _Mpi),
    ("torch.distributed", "ProcessGroup", _Torch),
    ("cupyx.distributed", "NCCLBackend", _Nccl),
    ("cupy", "cuda.nccl.NcclCommunicator", _Nccl),
)


def group_of(given: Any) -> Group:
    """`given` as a :class:`Group`: itself, or a library's communicator behind one.

    TypeError where it is neither; ValueError where this process is not one of its ranks.
    """
    group: Group | None = None
    for module, name, engine in _ENGINES:
        try:
            kind = attrgetter(name)(sys.modules[module])
        except (KeyError, AttributeError):
            continue
        if isinstance(given, kind):
            group = engine(given)
    if group is None:
        if not all(hasattr(given, name) for name in ("rank", "size", "allgather")):
            kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
            raise TypeError(
                "process_group must be an mpi4py communicator, a torch.distributed process group, a CuPy NCCL "
                f"communicator, or have rank, size and allgather, not {kind}"
            )
        group = given
    assert group is not None
    if not 0 <= group.rank < group.size:
        raise ValueError(f"this process is none of the group's {group.size} ranks (its rank is {group.rank})")
    return group


_DTYPES = ("float32", "float64", "float16", "bfloat16")
_STEPS = ("forward", "backward")
_WORDS = 40  # numbers that an error's words have at least, of 4 bytes each, which float64 holds exactly


class _Header(NamedTuple):
    """What a message begins with; all but the last two must be alike on all ranks."""

    step: float  # index in _STEPS
    call: float  # forwards of this layer so far; a backward has its forward's
    channels: float
    dtype: float = -1  # index in _DTYPES
    eps: float = 0
    momentum: float = 0
    counted: float = 0  # batches so far, where the running statistics are a cumulative average
    correction: float = 0
    ghosts: float = 0  # ghost batches on this rank
    words: float = 0  # bytes of an error's words; 0: this rank can go on


def _of_dtype(code: float) -> str:
    return _DTYPES[int(code)]


# What differs, in words; how it is shown; what is raised.
_ALIKE: tuple[tuple[str, str, Any, type[Exception]], ...] = (
    ("step", "the pass", lambda code: _STEPS[int(code)], RuntimeError),
    ("channels", "the number of channels", int, ValueError),
    ("call", "the call (counted from 0)", int, RuntimeError),
    ("dtype", "the dtype of x", _of_dtype, TypeError),
    ("eps", "eps", float, ValueError),
    ("momentum", "momentum", float, ValueError),
    ("counted", "num_batches_tracked", int, ValueError),
    ("correction", "correction", int, ValueError),
)


class Sync:
    """A layer's part in its group: the collectives, and what all ranks know of each other since the first one.

    Parameters
    ----------
    given : communicator, process group or Group
        What :func:`group_of` takes.
    channels : int
        num_features of the layer.
    """

    def __init__(self, given: Any, channels: int) -> None:
        self.given = given
        self.group = group_of(given)
        self.channels = channels
        self._call = 0
        self._room = 0  # ghost batches that a message holds; 0: not even the channels are agreed on

    def header(self, step: str) -> _Header:
        return _Header(_STEPS.index(step), self._call, self.channels)

    def exchange(self, header: _Header, numbers: Array) -> Array:
        """All ranks' `numbers`, (ghosts, 2 + 2·channels) on each: (ranks, most ghosts of any, 2 + 2·channels), zeros
        where a rank has fewer. Raises on every rank alike: ValueError, TypeError or RuntimeError where ranks differ in
        what must be alike, RuntimeError where a rank refuses."""
        while True:
            fits = numbers.size <= self._room * numbers.shape[1]
            found, headers = self._gather(header, numbers if fits else numbers[:0])
            most = int(max(one.ghosts for one in headers))
            if most <= self._room:
                break
            self._room = most
        self._call += header.step == _STEPS.index("forward")
        end = self._room * numbers.shape[1]
        return found[:, :end].reshape(self.group.size, self._room, numbers.shape[1])[:, :most]

    def refuse(self, step: str, error: Exception) -> NoReturn:
        """Take part in a step that this rank cannot do, so that the others learn why, and raise `error`."""
        self._gather(self.header(step), np.empty(0), error)
        raise error

    def _gather(self, header: _Header, numbers: Array, error: Exception | None = None) -> tuple[Array, list[_Header]]:
        step = _STEPS[int(header.step)]
        message = np.zeros(len(header) + max(self._room * (2 + 2 * self.channels), _WORDS))
        body = message[len(header) :]
        if error is None:
            body[: numbers.size] = numbers.ravel()
        else:
            words = f"{type(error).__name__}: {error}".encode()[: 4 * body.size]
            header = header._replace(words=len(words))
            body[: -(-len(words) // 4)] = np.frombuffer(words + b"\0" * (-len(words) % 4), np.uint32)
        message[: len(header)] = header
        what = f"{step} of a synchronized batch norm of {self.channels} channels"
        here = f"rank {self.group.rank} of {self.group.size}"
        try:
            found = np.asarray(self.group.allgather(message), np.float64)
        except Exception as failure:
            raise RuntimeError(f"{what}: the gather of {message.size} numbers failed on {here}: {failure}") from failure
        if found.shape != (self.group.size, message.size):
            raise RuntimeError(
                f"{what}: the gather of {message.size} numbers must bring {(self.group.size, message.size)} of them on "
                f"{here}, not {found.shape}"
            )
        headers = [_Header(*one) for one in found[:, : len(header)].tolist()]
        found = found[:, len(header) :]
        if error is None:
            _expect_alike(what, headers, found)
        return found, headers


def _expect_alike(what: str, headers: Sequence[_Header], bodies: Array) -> None:
    """That all ranks can go on, and mean the same."""
    refused = [
        f"rank {rank} of {len(headers)} has {_words(body, int(header.words))}"
        for rank, (header, body) in enumerate(zip(headers, bodies, strict=True))
        if header.words
    ]
    if refused:
        raise RuntimeError(f"{what}: {'; '.join(refused)}")
    for field, name, shown, error in _ALIKE:
        ranks: dict[str, list[str]] = {}
        for rank, header in enumerate(headers):
            ranks.setdefault(str(shown(getattr(header, field))), []).append(str(rank))
        if len(ranks) > 1:
            differ = "; ".join(f"{value} on rank {', '.join(those)}" for value, those in ranks.items())
            raise error(f"{what}: the ranks must agree on {name}, and there is {differ}")


def _words(body: Array, length: int) -> str:
    return body[: -(-length // 4)].astype(np.uint32).tobytes()[:length].decode(errors="ignore")


class Call(NamedTuple):
    """What a forward leaves for its backward."""

    sync: Sync
    header: _Header
    mean: Array  # float64 (ghosts here, C), on x's device, as rstd
    rstd: Array
    counts: Array  # float64 (ghosts of all ranks, 1): elements that a statistic is over
    batches: int  # that running statistics count


def _parameter(a: Any, name: str, x: Array, channels: int) -> Array | None:
    if a is None:
        return None
    a = operands.beside(a, name, x)
    operands.expect_channels(a, name, channels)
    return a  # type: ignore[no-any-return]


def _pieces(
    layout: Layout, tensors: Iterable[Array | None], positions: Array | None, *statistics: Array
) -> Iterator[tuple[Any, ...]]:
    """For each call of a verb: fold, tensors, positions and statistics, (ghosts, C) of which it has its rows."""
    for part in layout.parts:
        rows = slice(part.first, part.first + part.fold.batch)
        pieces = (*tensors, positions)
        if part.samples is not None:
            pieces = operands.cut(part, *pieces, None, None)[:-2]
        yield (part.fold, *pieces, *(a[rows] for a in statistics))


def forward(
    sync: Sync,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    counted: int,
    eps: float,
    axis: int,
    residual: Array | None,
    activation: functional.Activation,
    ghost_batch_size: int | None,
    mask: Array | None,
    correction: int,
    out: Array | None,
    device: str,
) -> tuple[Array, Call]:
    """y, and what the backward needs. Arguments as in :func:`fusednorm.batch_norm_forward`, of which this is the
    training; `counted` ≥ 0: batches so far of a cumulative average, else -1; `device`: where all arrays must be.

    Ghost batch k is the union of all ranks' k-th ones. ValueError, TypeError: an argument of this rank, or ranks that
    differ, or one value per channel over all ranks. RuntimeError: another rank's argument, or a gather that failed.
    Nothing has been written then.
    """
    channels = sync.channels
    header = sync.header("forward")
    try:
        given = arrays.taken(x, "x")
        arrays.expect_on(device, given, "layer")
        code, slope = functional._activation(activation)
        with arrays.on(device):
            x, layout = operands.dense(given, functional._batch, (axis, ghost_batch_size))
            if layout.parameters != (channels,):
                raise ValueError(f"running_mean should contain {layout.parameters[0]} elements not {channels}")
            operands.expect_statistics(layout._replace(too_few=""), True, eps, None, None)
            weight, bias = _parameter(weight, "weight", x, channels), _parameter(bias, "bias", x, channels)
            running = operands.running(running_mean, running_var, (weight, bias), x, channels, True)
            residual = None if residual is None else operands.alike(residual, "residual", given, x)
            positions = None if mask is None else operands.positions(mask, x, layout)
            if out is None:
                y = arrays.empty_like(x)
            else:
                y, out = operands.output(out, given, x, (given, residual, weight, bias, *running))
            ghosts = layout.saved[0] if ghost_batch_size else 1
            moments = arrays.empty((3, ghosts, channels), FLOAT64, beside=x)
            elements = np.zeros((ghosts, 1))
            for folded, xs, masks, each, count, mean, m2 in _pieces(layout, (x,), positions, elements, *moments):
                _C.moments(folded, xs, masks, True, count, mean, m2, *arrays.queue(xs, folded))
                each[...] = folded.per_statistic
            count, mean, m2 = arrays.moved(moments, "cpu")
        header = header._replace(
            dtype=_DTYPES.index(x.dtype.name), eps=eps, momentum=momentum, counted=counted, correction=correction,
            ghosts=ghosts,
        )  # fmt: skip
    except Exception as error:
        sync.refuse("forward", error)
    # A mask counts alike in all channels.
    found = sync.exchange(header, np.hstack((elements, count.max(1, keepdims=True, initial=0), mean, m2)))
    total = found[:, :, 0].sum(0)
    if np.any(total == 1):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 over {sync.group.size} ranks; input size "
            f"{given.shape} on rank {sync.group.rank}"
        )
    counts, mean, m2 = _merged(found)
    rstd = 1 / np.sqrt(m2 / np.maximum(counts, 1) + eps)
    with arrays.on(device):
        mean_, rstd_ = (arrays.moved(a[:ghosts], device) for a in (mean, rstd))
        pieces = _pieces(layout, (x, residual, y), None, mean_, rstd_)
        for folded, xs, residuals, ys, _, means, rstds in pieces:
            queue = arrays.queue(xs, folded)
            _C.normalize(folded, xs, means, rstds, weight, bias, residuals, code, slope, ys, *queue)
        for k, n in enumerate(counts[:, 0]):
            if n >= 2:  # of a mask may be left fewer, which say nothing
                share = momentum if counted < 0 else 1 / (counted + k + 1)
                operands.update(running[0], share, arrays.moved(mean[k], device))
                operands.update(running[1], share, arrays.moved(m2[k] / (n - correction), device))
        if out is not None or x is not given:
            y = operands.deliver(y, out, given)
    batches = int(np.count_nonzero(total)) if channels else 0
    return y, Call(sync, header, mean_, rstd_, counts, batches)


def _merged(found: Array) -> tuple[Array, Array, Array]:
    """Counts (ghosts, 1), means and M2 (ghosts, C) of all ranks, merged in their order."""
    ranks, ghosts, numbers = found.shape
    channels = (numbers - 2) // 2
    each = (ranks, ghosts, channels)
    count, mean, m2 = (np.broadcast_to(a, each).copy() for a in np.split(found, (1, 2, 2 + channels), 2)[1:])
    merged = np.empty((3, ghosts, channels))
    _C.merge(1, ranks, ghosts * channels, count, mean, m2, *merged)
    return found[:, :, 1:2].sum(0), merged[1], merged[2]


def backward(
    call: Call,
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    axis: int,
    residual: Array | None,
    activation: functional.Activation,
    ghost_batch_size: int | None,
    mask: Array | None,
    out: Array | None,
) -> tuple[Array, Array, Array, Array | None]:
    """dx, dweight, dbias and dresidual, or None; arguments as in :func:`fusednorm.batch_norm_backward`.

    dx is the gradient of the sum of all ranks' losses; dweight and dbias are sums over this rank's x alone, whose sum
    over the ranks is the whole gradient. Raises as :func:`forward`.
    """
    sync, channels = call.sync, call.sync.channels
    try:
        given = arrays.taken(x, "x")
        device = arrays.device(given)
        code, slope = functional._activation(activation)
        with arrays.on(device):
            x, layout = operands.dense(given, functional._batch, (axis, ghost_batch_size))
            dy = operands.alike(dy, "dy", given, x)
            weight, bias = _parameter(weight, "weight", x, channels), _parameter(bias, "bias", x, channels)
            residual = None if residual is None else operands.alike(residual, "residual", given, x)
            positions = None if mask is None else operands.positions(mask, x, layout)
            if out is None:
                dx = arrays.empty_like(x)
            else:
                dx, out = operands.output(out, given, x, (given, dy, residual, weight, bias))
            dresidual = None if residual is None else arrays.empty_like(x)
            dweight, dbias = operands.gradient(weight, x, layout), operands.gradient(bias, x, layout)
            ghosts = len(call.mean)
            sums = arrays.empty((2, ghosts, channels), FLOAT64, beside=x)
            parts = arrays.empty((len(layout.parts), 2, channels), FLOAT64, beside=x)
            pieces = _pieces(layout, (dy, x, residual), None, call.mean, call.rstd, *sums)
            for (dw, db), (folded, dys, xs, residuals, _, means, rstds, s1, s2) in zip(parts, pieces, strict=True):
                _C.grad_sums(
                    folded, dys, xs, means, rstds, weight, bias, residuals, code, slope, s1, s2, dw, db,
                    *arrays.queue(xs, folded),
                )  # fmt: skip
            dweight[...], dbias[...] = parts.sum(0)
            own = arrays.moved(sums, "cpu")
    except Exception as error:
        sync.refuse("backward", error)
    header = call.header._replace(step=_STEPS.index("backward"))
    found = sync.exchange(header, np.hstack((np.zeros((ghosts, 2)), *own)))
    whole = np.zeros(found.shape[1:])
    for one in found:  # in this order, whatever NumPy's own sum would choose
        whole += one
    coefficients = -whole[:ghosts, 2:] / np.maximum(call.counts[:ghosts], 1)
    with arrays.on(device):
        c0, cx = (arrays.moved(np.ascontiguousarray(a), device) for a in np.split(coefficients, 2, 1))
        pieces = _pieces(layout, (dy, x, residual, dx, dresidual), positions, call.mean, call.rstd, cx, c0)
        for folded, dys, xs, residuals, dxs, dresiduals, masks, means, rstds, cxs, c0s in pieces:
            _C.grad_input(
                folded, dys, xs, means, rstds, weight, bias, residuals, code, slope, cxs, c0s, masks, dxs, dresiduals,
                *arrays.queue(xs, folded),
            )  # fmt: skip
        if out is not None or x is not given:
            dx = operands.deliver(dx, out, given)
    return dx, dweight, dbias, dresidual
