"""What several commands use: arguments, and what the core does not need: libraries, a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusednorm import arrays


class Missing(Exception):
    """Says in one line what is not here, and what to do about it."""


def require(command: str, extra: str, **libraries: str) -> None:
    """Raise Missing unless all can be imported.

    Args:
        extra: the name of the extra that brings them.
        libraries: name for ``pip install`` by name for ``import``.
    """
    missing = [name for module, name in libraries.items() if importlib.util.find_spec(module) is None]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last}" if others else last
        raise Missing(f"fusednorm {command} needs {names}: {arrays.installs(extra)}")


@contextmanager
def writing(command: str, path: Path) -> Iterator[None]:
    """Raise Missing if what is done within cannot write `path`."""
    try:
        yield
    except OSError as error:
        raise Missing(f"fusednorm {command}: cannot write {path}: {error.strerror or error}") from None


def require_writable(command: str, path: Path) -> None:
    """Make the folder of a file, and raise Missing unless the file can be written: before the work, not after it."""
    with writing(command, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()


def progress(text: str = "") -> None:
    """Show one line in place of the one before, or nothing, on standard error where that is a terminal."""
    if sys.stderr.isatty():
        shown = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)


def require_device(command: str, device: str) -> None:
    """Raise Missing unless `device`, such as ``cuda:0``, can be used from here."""
    try:
        arrays.checked_device(device)
    except RuntimeError as error:
        raise Missing(f"fusednorm {command}: {error}") from None


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=_device, default="cpu", metavar="DEVICE", help="cpu (default), cuda, or another GPU: cuda:1"
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, or cuda:1 and so on, not {text}")
    return "cuda:0" if text == "cuda" else text


def positive(text: str) -> int:
    """An argument that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
