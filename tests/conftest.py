"""What all tests share: the instruction sets, the environment in the header, the switch for slow tests."""

from __future__ import annotations

from collections.abc import Iterator

import fusednorm as fn
import pytest
from fusednorm import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow or thorough, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or config.getoption("-m"):
        return
    short, left = [], []
    for item in items:
        (left if {"slow", "thorough"} & {mark.name for mark in item.iter_markers()} else short).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = short


def pytest_report_header() -> list[str]:
    return ["fusednorm: " + ", ".join(f"{name} {value}" for name, value in fn.build_info().items())]


@pytest.fixture(params=fn.build_info()["isa_runnable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that runs here, in turn."""
    before = fn.build_info()["isa"]
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back after the test."""
    before = fn.get_num_threads()
    yield
    fn.set_num_threads(before)
