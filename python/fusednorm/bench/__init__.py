"""Benchmarks: check first, then time, beside PyTorch and a plain copy of the same tensor.

:func:`run` measures cases and returns what ``fusednorm bench --json`` writes::

    {"environment": {...}, "rows": [{"case": ..., "norm": ..., "shape": [...], "layout": "first", "dtype": ...,
     "pass": "forward", "activation": ..., "residual": ..., "ghost_batch_size": ..., "checked": [3, 64], "wrong": [],
     "ms": {"copy": {"median": ..., "p10": ..., "p90": ...}, "ours_out": ..., "ours": ..., "torch_out": ..., ...},
     "ratios": {"ours_out/copy": {...}, "torch_out/ours_out": {...}, "torch/ours": {...}}}],
     "left_out": ["why a case was not measured", ...], "failed": ["what a case raised", ...],
     "interrupted": ["a case that Ctrl-C left unmeasured", ...]}

``checked``: how many channels (layer and RMS norm: lines) of how many were compared with float64; ``wrong``: what was
not as it should be. Rows of a GPU have other contenders and more to tell: :mod:`fusednorm.bench.gpu`.

:func:`table` renders that as Markdown, :func:`plot` as a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

import fusednorm
from fusednorm import reference
from fusednorm.bench.contenders import PASSES, Cpu
from fusednorm.bench.environment import environment, versions
from fusednorm.bench.gpu import Gpu
from fusednorm.bench.report import beside, label, loses, plot, summary, table
from fusednorm.bench.timing import Contender, interleaved, ratio, spread
from fusednorm.testing.cases import (
    BENCH,
    BENCH_CUDA,
    Array,
    Case,
    Deviation,
    Inputs,
    Outputs,
    calls,
    compare,
    expected,
)
from fusednorm.testing.cases import run as run_case

__all__ = [
    "PASSES",
    "Contender",
    "Cpu",
    "Gpu",
    "Row",
    "beside",
    "environment",
    "interleaved",
    "label",
    "loses",
    "measure",
    "plot",
    "ratio",
    "run",
    "select",
    "spread",
    "summary",
    "table",
    "versions",
]

Row: TypeAlias = dict[str, Any]

# Elements of x that the float64 reference computes: it would take seconds for a large tensor. Of such a one as many
# channels as that makes are compared (three at least; group norm: groups), which most norms treat each for itself. Of
# layer and RMS norm as many lines, and the sums over all lines for as many columns. Switchable norm: all.
CHECKED_ELEMENTS = 1 << 20

SUMS = ("dweight", "dbias")

# Two contenders compute the same if they differ by less than this part of the mean: bfloat16 rounds to 0.4%.
SAME = 0.01


def select(
    *,
    norm: str | None = None,
    dtype: str | None = None,
    layout: str = "all",
    shapes: Sequence[tuple[int, ...]] = (),
    quick: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """Cases of ``BENCH``, of ``BENCH_CUDA`` for a GPU; or, where shapes are given, plain ones of these.

    Args:
        norm: only this one; of given shapes batch norm unless another is named.
        layout: ``first``, ``last`` or ``all``.
        shapes: N, C and the spatial sizes, whatever the layout.
        quick: of the list only what is tagged so.
    """
    if shapes:
        found = [each for shape in shapes for each in _plain(norm or "batch", shape, dtype or "float32")]
    else:
        listed = BENCH if device == "cpu" else BENCH_CUDA
        found = [case for case in listed if not quick or "quick" in case.tags]
    return [
        case
        for case in found
        if norm in (None, case.norm)
        and dtype in (None, case.dtype)
        and (layout == "all" or _layout(case) in (layout, "flat"))
    ]


def _plain(norm: str, shape: tuple[int, ...], dtype: str) -> list[Case]:
    """The cases of one norm and shape, in both layouts where it has channels and positions."""
    options: dict[str, Any] = {"norm": norm, "dtype": dtype, "running": norm in ("batch", "switchable")}
    lyings = [(shape, 1)]
    if norm == "weight":
        options |= {"eps": 0.0}
        lyings = [(shape, 0)]
    elif norm not in ("layer", "rms") and len(shape) > 2:
        lyings += [((shape[0], *shape[2:], shape[1]), -1)]
    if norm == "group":
        options |= {"groups": math.gcd(32, shape[1])}
    return [
        Case(
            name=f"{'x'.join(map(str, lying))}-axis{axis}-{dtype}" + ("" if norm == "batch" else f"-norm_{norm}"),
            shape=lying,
            axis=axis,
            training=training,
            **options,
        )
        for lying, axis in lyings
        for training in (True, False)[: 2 if norm == "batch" else 1]
    ]


def run(
    cases: Sequence[Case],
    passes: Sequence[str] = PASSES,
    *,
    machine: Cpu | Gpu | None = None,
    peers: Sequence[str] | None = None,
    repeat: int | None = None,
    seconds: float | None = None,
    report: Callable[[Case, str], object] = lambda case, pass_: None,
) -> dict[str, Any]:
    """Measure every pass of every case; training cases have ``forward`` and ``backward``, the others ``eval``.

    Args:
        machine: where; None: ``Cpu()``.
        peers: who is measured beside ours and the copy, of ``machine.peers``; None: all.
        repeat: rounds of each measurement; None: at least 7, and 0.2 s.
        seconds: no case is begun later than that; None: all are measured.
        report: told what comes next, before it is measured.
    """
    begin = perf_counter()
    rows: list[Row] = []
    left_out, failed, interrupted = [], [], []
    with machine or Cpu() as place:
        where = environment()
        for i, case in enumerate(cases):
            if seconds is not None and perf_counter() - begin > seconds:
                left_out.append(f"{case.name}: no time was left")
            elif not place.has_room(case):
                left_out.append(f"{case.name}: too large for the memory")
            else:
                try:
                    rows += measure(case, passes, machine=place, peers=peers, repeat=repeat, report=report)
                except KeyboardInterrupt:  # what was measured before is not lost
                    interrupted = [each.name for each in cases[i:]]
                    break
                except Exception as error:
                    failed.append(f"{case.name}: {type(error).__name__}: {error}")
        where |= place.environment()
    return {"environment": where, "rows": rows, "left_out": left_out, "failed": failed, "interrupted": interrupted}


def measure(
    case: Case,
    passes: Sequence[str] = PASSES,
    *,
    machine: Cpu | Gpu | None = None,
    peers: Sequence[str] | None = None,
    repeat: int | None = None,
    report: Callable[[Case, str], object] = lambda case, pass_: None,
) -> list[Row]:
    """The rows of one case, as :func:`run` describes. What computes wrong results is not timed; `wrong` says why."""
    passes = [pass_ for pass_ in passes if (pass_ == "eval") != case.training]
    if not passes:
        return []
    machine = machine or Cpu()
    report(case, passes[0])
    inputs = machine.make(case)
    channels = _checked_channels(case)
    wrong = _check(case, inputs, channels, machine)
    rows = []
    for pass_ in passes:
        report(case, pass_)
        row: Row = {
            "case": case.name,
            "norm": case.norm,
            "shape": list(case.shape),
            "layout": _layout(case),
            "dtype": case.dtype,
            "pass": pass_,
            "activation": case.activation,
            "residual": case.residual,
            "ghost_batch_size": case.ghost_batch_size,
            "checked": [len(channels), case.shape[_axis(case)]],
            "wrong": list(wrong),
            "ms": {},
            "ratios": {},
        }
        rows.append(row)
        if wrong:
            continue
        entrants = [
            each
            for each in machine.contenders(case, inputs, pass_)
            if peers is None or each.name.removesuffix("_out") in ("copy", "ours", *peers)
        ]
        row["wrong"] = _disagreements(case, entrants, channels, machine)
        if not row["wrong"]:
            row |= machine.times(case, inputs, pass_, entrants, repeat)
    return rows


def _layout(case: Case) -> str:
    """``first`` or ``last``; (N, C) is both, ``flat``."""
    if len(case.shape) == 2:
        return "flat"
    return "last" if case.axis % len(case.shape) == len(case.shape) - 1 else "first"


def _axis(case: Case) -> int:
    """Along which results are looked at: the channels, or the lines."""
    return 0 if case.has_lines else case.axis % len(case.shape)


def _checked_channels(case: Case) -> Array:
    """Or lines."""
    length = case.shape[_axis(case)]
    if case.norm == "switchable":  # all instances are in one statistic
        return np.arange(length)
    together = case.channels // case.groups
    groups = _some(case.size, length // together) if case.norm == "group" else _some(case.size, length)
    return (groups[:, None] * together + np.arange(together)).ravel() if case.norm == "group" else groups


def _some(size: int, parts: int) -> Array:
    """Which of so many parts of a tensor are compared."""
    count = min(parts, max(CHECKED_ELEMENTS * parts // max(size, 1), 3))
    return np.unique(np.linspace(0, parts - 1, count).astype(np.int64))


def _check(case: Case, inputs: Inputs, channels: Array, machine: Cpu | Gpu) -> list[str]:
    """What is wrong with our results, of the tensors as they are timed, on the given channels or lines."""
    got = run_case(case, inputs, fusednorm, to_device=lambda a: a.copy(), to_host=lambda a: a)
    axis, together = _axis(case), 1 if case.has_lines else case.cells[2]

    def some(name: str, array: Array | None) -> Array | None:
        if array is None:
            return None
        picked, along = np.arange(len(array)), 0
        if name in ("x", "dy", "residual", "y", "dx", "dresidual"):
            picked, along = channels, axis
        elif name in ("mean", "rstd", "variances"):
            picked, along = channels[::together] // together, 0 if case.has_lines else array.ndim - 1
        elif not case.has_lines and case.norm != "switchable":  # a parameter or its gradient
            picked, along = channels, axis if array.ndim == len(case.shape) else 0
        return machine.some(array, picked, along)

    shape = (*case.shape[:axis], len(channels), *case.shape[axis + 1 :])
    part = replace(case, shape=shape, groups=len(channels) // together if case.norm == "group" else case.groups)
    part_inputs = Inputs(**{name: some(name, array) for name, array in vars(inputs).items()})  # type: ignore[arg-type]
    part_got = Outputs(**{name: some(name, array) for name, array in vars(got).items()})  # type: ignore[arg-type]
    deviations = compare(part, part_inputs, expected(part, part_inputs), part_got)
    if case.has_lines and len(channels) < case.shape[axis]:
        deviations = [d for d in deviations if d.name not in SUMS] + _sums(case, inputs, got, machine)
    return [f"{d.name}: error {d.error:.3g}, allowed {d.bound:.3g} {d.detail}".rstrip() for d in deviations if not d.ok]


def _sums(case: Case, inputs: Inputs, got: Outputs, machine: Cpu | Gpu) -> list[Deviation]:
    """The gradients of layer and RMS norm's parameters, sums over all lines, of some columns: from our statistics."""
    columns = _some(case.size, case.shape[-1])

    def some(array: Array | None) -> Array | None:
        return None if array is None else machine.some(array, columns, array.ndim - 1)

    def double(array: Array | None) -> Any:
        return None if array is None else machine.some(array, np.arange(len(array)), 0).astype(np.float64)

    part = replace(case, shape=(*case.shape[:-1], len(columns)))
    part_inputs = Inputs(**{name: some(array) for name, array in vars(inputs).items()})  # type: ignore[arg-type]
    statistics = {"mean": double(got.mean), "rstd": double(got.rstd)}
    _, backward = calls(part, part_inputs, reference)
    gradients = backward(*(array for array in statistics.values() if array is not None))
    named = dict(zip(("dx", *SUMS), gradients, strict=False))
    want = replace(got, **statistics, **named, y=np.zeros_like(gradients[0]))
    ours = replace(want, dweight=some(got.dweight), dbias=some(got.dbias))
    return [d for d in compare(part, part_inputs, want, ours) if d.name in SUMS]


def _disagreements(case: Case, entrants: Sequence[Contender], channels: Array, machine: Cpu | Gpu) -> list[str]:
    """Contenders that do not compute what the first of them does."""
    axis = _axis(case)
    first: Array | None = None
    found = []
    for entrant in entrants:
        if entrant.array is None:
            continue
        result = machine.some(entrant.array(entrant.call()), channels, axis).astype(np.float64)
        if first is None:
            first = result
        # The mean, because at the kink of ReLU single gradients may be either 0 or dy.
        elif not np.mean(np.abs(result - first)) <= SAME * np.mean(np.abs(first)):
            found.append(f"{entrant.name} computes something else")
    return found
