"""What several commands use: arguments, and libraries that the core does not need."""

from __future__ import annotations

import argparse
import importlib.util


class MissingLibrary(Exception):
    """Says in one line what to install."""


def require(command: str, extra: str, **libraries: str) -> None:
    """Raise MissingLibrary unless all can be imported.

    Args:
        extra: the name of the extra that brings them.
        libraries: name for ``pip install`` by name for ``import``.
    """
    missing = [name for module, name in libraries.items() if importlib.util.find_spec(module) is None]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last}" if others else last
        raise MissingLibrary(f"fusednorm {command} needs {names}: pip install 'fusednorm[{extra}]'")


def positive(text: str) -> int:
    """An argument that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
