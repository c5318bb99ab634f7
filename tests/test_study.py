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

LIBRARIES = {"torch": "PyTorch", "optuna": "Optuna", "sklearn": "scikit-learn"} | {
    name: name for name in ("mlxtend", "matplotlib")
}
for library, name in LIBRARIES.items():
    pytest.importorskip(library, reason=f"{name} is not installed")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.study import __main__ as study  # noqa: E402
from examples.study import common, report  # noqa: E402


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


def summarized(page: str) -> list[tuple[str, list[str]]]:
    """Of each row of the summary the claim, and a cell for each source: a verdict that links to its section."""
    rows = page.split("## In short")[1].split("\n## ")[0].split("|---|---|---|\n")[1].strip().splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    return [(says, rest) for says, *rest in cells]


def claims_of(folder: Path, source: str) -> list[tuple[Any, Any]]:
    """All claims in the order of the page, each with its experiment."""
    found = []
    for name in study.EXPERIMENTS:
        experiment = import_module(f"examples.study.{name}")
        record = json.loads((report.folder_of(folder, source) / f"{name}.json").read_text())
        found += [(experiment, claim) for claim in experiment.claims(record["found"])]
    return found


@pytest.mark.parametrize("source", common.SOURCES)
@pytest.mark.parametrize("name", study.EXPERIMENTS)
def test_each_experiment(folder: Path, name: str, source: str) -> None:
    at = report.folder_of(folder, source)
    record = json.loads((at / f"{name}.json").read_text())
    assert record["seeds"] == 2
    assert record["quick"]
    assert all(math.isfinite(leaf) for leaf in leaves(record["found"]) if isinstance(leaf, float))
    assert (at / f"{name}.png").stat().st_size > 5_000
    claims = import_module(f"examples.study.{name}").claims(record["found"])
    page = (at / "README.md").read_text()
    assert claims
    for claim in claims:
        assert claim.checks, claim.says
        assert f"| {claim.says} | {claim.measured} | **{claim.verdict}** |" in page


@pytest.mark.parametrize("committed", [False, True])
def test_the_summary_has_the_verdicts_of_the_sections(folder: Path, committed: bool) -> None:
    folder = ROOT / "docs" / "study" if committed else folder
    rows = summarized((folder / "README.md").read_text())
    for column, source in enumerate(common.SOURCES):
        pages = {"digits": folder / "README.md", "mnist": folder / "mnist" / "README.md"}
        sections = pages[source].read_text().split("\n## ")
        claims = claims_of(folder, source)
        assert len(claims) == len(rows)
        for (says, cells), (experiment, claim) in zip(rows, claims, strict=True):
            assert says == claim.says
            verdict, target = cells[column][1:-1].split("](")
            page, anchor = target.split("#")
            assert (folder / page if page else folder / "README.md") == pages[source]
            (section,) = (each for each in sections if each.split("\n")[0].lower().replace(" ", "-") == anchor)
            assert section.startswith(f"{experiment.TITLE}\n")
            assert f"| {says} | {claim.measured} | **{verdict}** |" in section


def test_the_committed_pages_are_those_of_their_results() -> None:
    """Figures aside, whose bytes depend on matplotlib."""
    committed = ROOT / "docs" / "study"
    pages = report.pages(committed, study.EXPERIMENTS, common.SOURCES)
    assert len(pages) == len(common.SOURCES)
    for path, text in pages.items():
        assert path.read_text() == text
        for name in study.EXPERIMENTS:
            assert (path.parent / f"{name}.png").exists()
            assert not json.loads((path.parent / f"{name}.json").read_text())["quick"]


def test_what_prepares_the_images_learns_from_the_training_set() -> None:
    for source, (images, features) in {"digits": (1797, 64), "mnist": (5000, 784)}.items():
        data = common.split(common.Settings(data=source), seed=1)
        assert data.x.shape == (common.TRAINED_ON, features)
        assert data.test_x.shape == (images - common.TRAINED_ON, features)
        mean, std = data.x.double().mean(0), data.x.double().std(0, correction=0)
        assert mean.abs().max() < 1e-5  # float32, values of up to √1344
        assert ((std - 1).abs().lt(1e-4) | std.eq(0)).all()
        assert (data.test_x <= data.x.amax(0)).all()
        assert (data.test_x >= data.x.amin(0)).all()
        assert sorted(set(data.test_y.tolist())) == list(range(10))


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
        "0", "0.5", "1234", "2.0·10⁻⁵", "10⁻⁴", "3.0·10⁷",
    ]  # fmt: skip
    assert common.spread([3, 1, math.inf]) == "3 (1 to ∞)"
    assert common.spread([2, 2]) == "2"
