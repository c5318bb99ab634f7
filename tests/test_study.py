"""The study's experiments run, with tiny settings, and their page says what was measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

for library, name in (("torch", "PyTorch"), ("optuna", "Optuna"), ("sklearn", "scikit-learn"), ("matplotlib",) * 2):
    pytest.importorskip(library, reason=f"{name} is not installed")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.study import __main__ as study  # noqa: E402
from examples.study import common  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m examples.study all` writes, with tiny settings."""
    path = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "examples.study", "all", "--quick", "--seeds", "2", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr  # no bar: it is no terminal
    return path


def leaves(found: Any) -> Any:
    if isinstance(found, dict):
        found = [*found.values()]
    if isinstance(found, list):
        for each in found:
            yield from leaves(each)
    else:
        yield found


@pytest.mark.parametrize("name", study.EXPERIMENTS)
def test_each_experiment(folder: Path, name: str) -> None:
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["seeds"] == 2
    assert record["quick"]
    assert all(math.isfinite(leaf) for leaf in leaves(record["found"]) if isinstance(leaf, float))
    assert (folder / f"{name}.png").stat().st_size > 5_000
    claims = import_module(f"examples.study.{name}").claims(record["found"])
    page = (folder / "README.md").read_text()
    assert claims
    for claim in claims:
        assert claim.checks, claim.says
        assert f"| {claim.says} | {claim.measured} | **{claim.verdict}** |" in page


def test_the_committed_page_is_that_of_its_results(tmp_path: Path) -> None:
    """Figures aside, whose bytes depend on matplotlib."""
    from examples.study import report

    committed = ROOT / "docs" / "study"
    assert (committed / "README.md").read_text() == report.page(committed, study.EXPERIMENTS)
    for name in study.EXPERIMENTS:
        assert (committed / f"{name}.png").exists()
        assert not json.loads((committed / f"{name}.json").read_text())["quick"]


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([True, True], "holds (2 of 2)"),
        ([True, False], "holds partly (1 of 2)"),
        ([True, False, False], "does not hold here (1 of 3)"),
    ],
)
def test_verdicts(checks: list[bool], verdict: str) -> None:
    assert common.Claim("", "", checks).verdict == verdict


def test_numbers() -> None:
    assert [common.number(x) for x in (0, 0.5, 1234.4, 2e-5, 1e-4, 3e7)] == [
        "0", "0.5", "1234", "2.0·10^-5", "10^-4", "3.0·10^7",
    ]  # fmt: skip
    assert common.spread([3, 1, math.inf]) == "3 (1 to ∞)"
    assert common.spread([2, 2]) == "2"
