"""CUDA's verbs through the same calls and cases as the CPU's: on a GPU with CuPy, or, in a build for it, emulated."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case
from support import assert_same_bits
from test_cases import marked, prepared, skip_what_is_missing

STATE = fn.build_info()["cuda"]
EMULATED = STATE.startswith("emulated")
if EMULATED:
    sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
elif STATE.startswith("not built"):
    pytest.skip(f"CUDA is {STATE}", allow_module_level=True)
cupy: Any = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

# Devices that take each another way: an ordinary one; toys whose blocks, clusters and grids are soon too small; without
# clusters; without cooperative launches; one that refuses both when asked.
DEVICES = range(cupy.cuda.runtime.getDeviceCount())


def on_device(a: np.ndarray[Any, Any]) -> Any:
    """A copy of `a` on the current device, with its axis order in memory."""
    order = sorted(range(a.ndim), key=lambda i: -a.strides[i])
    return cupy.asarray(np.ascontiguousarray(a.transpose(order))).transpose(np.argsort(order).tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_case(case: Case, device: int) -> None:
    skip_what_is_missing(case)
    if EMULATED and device and case.size > 200_000:
        pytest.skip("minutes, emulated")
    inputs, expected = prepared(case)
    with cupy.cuda.Device(device):
        got = cases.run(case, inputs, fn, to_device=on_device, to_host=cupy.asnumpy)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got) if not deviation.ok]
    assert not wrong


@pytest.mark.skipif(not EMULATED, reason="a GPU's schedule is its own")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [marked(case) for case in CASES if {"quick", "sanitize"} <= case.tags])
def test_bits_do_not_depend_on_the_schedule(case: Case, device: int) -> None:
    import emulator

    skip_what_is_missing(case)
    inputs, _ = prepared(case)
    results = []
    try:
        for seed in (0, 1, 2):  # in order, by priority, at random
            emulator.seed(seed)
            with cupy.cuda.Device(device):
                results.append(cases.run(case, inputs, fn, to_device=on_device, to_host=cupy.asnumpy))
    finally:
        emulator.seed(0)
    for other in results[1:]:
        for field in fields(other):
            first, second = getattr(results[0], field.name), getattr(other, field.name)
            assert (first is None) == (second is None)
            if first is not None:
                assert_same_bits(first, second, field.name)
