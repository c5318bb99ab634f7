"""Every block of README.md and the documentation runs as it stands: of a shell's, what is this project's own.

The blocks of one page share their names, in order. What a block needs besides NumPy stands before it,
``<!-- needs: torch -->``: where that is not installed the block is skipped, and so is what uses its names.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import fusednorm
import numpy as np
import pytest
from fusednorm import arrays, bench
from fusednorm.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

NEEDS = ("torch", "jax", "sklearn", "ml_dtypes", "matplotlib", "mpi4py", "dask", "gpu")
_FENCE = re.compile(r"^( *)```(\S*).*$")
_MARKER = re.compile(r"<!-- needs: (.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line, from 1."""

    page: Path
    line: int
    code: str
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


PYTHON, SHELL = ("py", "python", "python3", "pycon"), ("sh", "bash", "console", "shell")


def blocks(page: Path, languages: tuple[str, ...] = PYTHON) -> Iterator[Block]:
    needs: tuple[str, ...] = ()
    language, indent, start = None, "", 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if language is None and fence:
            language, indent, start = fence[2], fence[1], number
        elif fence and not fence[2]:
            if language in languages:
                code = "\n".join(each.removeprefix(indent) for each in lines[start : number - 1])
                yield Block(page, start + 1, code, needs)
            language, needs = None, ()
        elif language is None and line.strip():
            marker = _MARKER.fullmatch(line.strip())
            needs = tuple(marker[1].split(", ")) if marker else ()
            unknown = set(needs) - set(NEEDS)
            assert not unknown, f"{page.name}:{number} needs {unknown}, which no block can have: {NEEDS}"
    assert language is None, f"{page.name}:{start}: the block has no end"


def missing(need: str) -> str:
    """Why a block that needs this cannot run; empty where it can."""
    if need == "gpu":
        try:
            arrays.checked_device("cuda:0")
        except RuntimeError as error:
            return str(error)
        return ""
    return "" if importlib.util.find_spec(need) else f"{need} is not installed"


@dataclass
class Page:
    """The names of a page as far as its blocks have run."""

    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    ran: dict[int, BaseException | None] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        if block.line not in self.ran:
            self.ran[block.line] = None
            # As many empty lines before it as the page has: a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
            try:
                exec(code, self.names)
            except BaseException as error:
                self.ran[block.line] = error
                raise
        elif self.ran[block.line]:
            raise AssertionError(f"{block} failed before") from self.ran[block.line]


@cache
def page(path: Path) -> Page:
    return Page()


def run(block: Block, on: Page) -> None:
    """The block, after those before it on its page."""
    for each in blocks(block.page):
        why = ", ".join(filter(None, map(missing, each.needs)))
        if each.line == block.line:
            if why:
                pytest.skip(f"{block}: {why}")
            on.run(each)
            return
        if not why:
            on.run(each)


BLOCKS = [each for path in PAGES for each in blocks(path)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)  # noqa: NPY002 (what pages may use is repeatable)
    run(block, page(block.page))


def commands(code: str) -> Iterator[list[str]]:
    """Those of a shell's block, a list of words each; variables that are set before one are left out."""
    for line in code.splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


# What a person does to a machine, and what .ci/run does where it takes long: the tests, the linters, the wheels.
ELSEWHERE = ("apt", "python3", "python", "pytest", "nox", ".", "cibuildwheel")
SHELL_BLOCKS = [each for path in PAGES for each in blocks(path, SHELL)]


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_commands_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fusednorm's own, in few epochs and on few cases; of what is installed from a checkout the extras exist."""
    monkeypatch.chdir(tmp_path)
    select = bench.select
    monkeypatch.setattr(bench, "select", lambda **which: sorted(select(**which), key=lambda case: case.size)[:2])
    for command, *words in commands(block.code):
        if command == "fusednorm":
            for library in ("rich", "matplotlib", "sklearn"):
                pytest.importorskip(library)
            less = {"demo": ["--epochs", "1", "--skip-timing"], "bench": ["--repeat", "1"]}
            assert main([*words, *less.get(words[0], [])]) == 0, f"{block}: {shlex.join(words)}"
        elif command == "pip":
            extras = {extra for word in words for extra in re.findall(r"^\.\[(.+)\]$", word)}
            assert extras <= {*(metadata("fusednorm").get_all("Provides-Extra") or ())}
        else:
            assert command in ELSEWHERE, f"{block}: nothing tells whether {command} works"


def test_commands_are_found() -> None:
    code = "A=1 pip install '.[demo]' && fusednorm demo  # it works\n\npython3 -m venv .venv\n"
    assert [*commands(code)] == [
        ["pip", "install", ".[demo]"],
        ["fusednorm", "demo"],
        ["python3", "-m", "venv", ".venv"],
    ]


def imported(code: str) -> set[str]:
    """What a block imports of what it must say that it needs."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        found |= {name.removeprefix("fusednorm.").split(".")[0].replace("cupy", "gpu") for name in names}
    return found & set(NEEDS)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_what_it_needs(block: Block) -> None:
    assert imported(block.code) <= set(block.needs)


def test_what_is_imported_is_seen() -> None:
    code = "import numpy, fusednorm as fn\nimport fusednorm.jax as fnj\nfrom torch.nn import functional\nimport cupy"
    assert imported(code) == {"jax", "torch", "gpu"}


def written(tmp_path: Path, text: str) -> list[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    return list(blocks(path))


def test_blocks_are_found_where_they_stand(tmp_path: Path) -> None:
    first, second, third = written(
        tmp_path,
        "# Page\n\n```python\na = 1\n```\n\n```sh\npip install\n```\n\n<!-- needs: torch, gpu -->\n```py\nb = a\n```\n"
        "\n1. in a list\n\n   ```python\n   if b:\n       c = b\n   ```\n",
    )
    assert (first.line, first.code, first.needs) == (4, "a = 1", ())
    assert (second.line, second.code, second.needs) == (13, "b = a", ("torch", "gpu"))
    assert (third.line, third.code, third.needs) == (19, "if b:\n    c = b", ())


def test_a_planted_error_is_caught_at_its_line(tmp_path: Path) -> None:
    good, bad = written(tmp_path, "```python\na = 1\n```\n\n```python\n\nassert a == 2\n```\n")
    names = Page()
    run(good, names)
    with pytest.raises(AssertionError) as caught:
        run(bad, names)
    assert caught.traceback[-1].lineno + 1 == bad.line + 1 == 7
    with pytest.raises(AssertionError, match=r"page\.md:6 failed before"):
        run(bad, names)


def test_names_are_those_of_the_page_alone(tmp_path: Path) -> None:
    first, second = written(tmp_path, "```python\na = 1\n```\n```python\nassert a\n```\n")
    run(second, Page())  # with what stands before it
    run(first, Page())
    with pytest.raises(NameError):
        Page().run(second)


def test_a_block_whose_need_is_not_there_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = written(tmp_path, "<!-- needs: torch -->\n```python\nraise ValueError\n```\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match=r"page\.md:3: torch is not installed"):
        run(block, Page())


@pytest.mark.parametrize(
    ("text", "message"),
    [("<!-- needs: tourch -->\n```python\n```\n", "tourch"), ("```python\na = 1\n", "page.md:1: the block has no end")],
)
def test_a_page_that_is_written_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        written(tmp_path, text)


def _section(doc: str, name: str) -> set[str]:
    """The names that stand in a section in NumPy's style."""
    found = re.search(rf"^{name}\n-+\n(.*?)(?=\n\n\w+\n-+\n|\Z)", doc, re.M | re.S)
    heads = [line.split(" : ")[0] for line in found[1].splitlines() if re.match(r"[\w*]", line)] if found else []
    return {each.lstrip("*") for head in heads for each in head.split(", ")}


@pytest.mark.parametrize("name", [name for name in fusednorm.__all__ if callable(getattr(fusednorm, name))])
def test_every_parameter_is_documented(name: str) -> None:
    """In the docstring, or in that of the forward to which it refers."""
    public = getattr(fusednorm, name)
    doc = inspect.getdoc(public) or ""
    if not re.search(r"see\s+:func:`\w+_forward`", doc):
        assert set(inspect.signature(public).parameters) <= _section(doc, "Parameters")
