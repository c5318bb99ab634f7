"""Every case of the list, on every instruction set that runs here, against the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm.testing import cases
from fusednorm.testing.cases import CASES, Case, Inputs, Outputs


@lru_cache(maxsize=1)  # the instruction sets of one case follow one another
def prepared(case: Case) -> tuple[Inputs, Outputs, dict[str, Any]]:
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    return inputs, expected, cases.bounds(case, inputs, expected)


def skip_what_is_missing(case: Case) -> None:
    for module in case.requires:
        pytest.importorskip(module, reason=f"{module} is not installed")


def marked(case: Case) -> Any:
    marks = [getattr(pytest.mark, tag) for tag in ("slow", "sanitize") if tag in case.tags]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_case(case: Case, isa: str) -> None:
    skip_what_is_missing(case)
    inputs, expected, bounds = prepared(case)
    got = cases.run(case, inputs, fn)
    wrong = [deviation for deviation in cases.compare(case, inputs, expected, got, bounds) if not deviation.ok]
    assert not wrong


def test_the_comparison_sees_what_this_file_would_miss() -> None:
    """Positive control: one element of the library's own result, moved by four bounds."""
    case = next(case for case in CASES if case.residual and case.activation == "silu" and case.dtype == "float32")
    inputs, expected, bounds = prepared(case)
    got = cases.run(case, inputs, fn)
    for name in ("y", "mean", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"):
        planted = np.array(getattr(got, name))
        last = np.unravel_index(planted.size - 1, planted.shape)
        planted[last] += 4 * bounds[name][last]
        found = cases.compare(case, inputs, expected, replace(got, **{name: planted}))
        assert [deviation.name for deviation in found if not deviation.ok] == [name]
